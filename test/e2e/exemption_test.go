package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/rand"

	"github.com/eni-guard/eni-guard/test/e2e/incident"
)

// Whom the guard must not be in the way of. (TestExemptPods, TestGracefulDeletesNeverReachTheWebhook and
// TestANamespaceThatIsOffMakesNoCall are about the others.)

// The garbage collector of pods removes by force what no kubelet can finish. It waits for a while before it does, so these
// two tests run beside each other.
func TestThePodGarbageCollectorRemovesPodsOfANodeThatIsGone(t *testing.T) {
	t.Parallel()
	inEveryMode(t, func(t *testing.T, mode, ns string) {
		node := ghost(t, nil)
		pod := haunt(t, ns, node)
		wentThrough(t, cluster.CoreV1().Nodes().Delete(t.Context(), node, metav1.DeleteOptions{}))
		collected(t, pod, mode+" delete allowed unknown NodeGone")
	})
}

func TestThePodGarbageCollectorRemovesPodsOfANodeOutOfService(t *testing.T) {
	t.Parallel()
	inEveryMode(t, func(t *testing.T, mode, ns string) {
		node := ghost(t, nil)
		pod := haunt(t, ns, node)
		// There is no kubelet to finish it.
		wentThrough(t, plainDelete(t.Context(), cluster, pod))
		if now := read(t, pod); now.DeletionTimestamp == nil {
			t.Fatal("the pod is not being deleted")
		}
		outOfService(t, node)
		collected(t, pod, mode+" delete allowed unknown NodeOutOfService")
	})
}

// collected waits until the garbage collector of pods has removed a pod.
func collected(t *testing.T, pod *corev1.Pod, want string) {
	t.Helper()
	wentThrough(t, incident.Wait(t.Context(), 3*time.Minute, "the garbage collector to remove pod "+pod.Name, func(ctx context.Context) error {
		if err := cluster.Gone(ctx, pod); err != nil {
			return err
		}
		// Somebody else's request is on record before it is answered, but after the pod is gone.
		if all := records(t, pod); len(all) == 0 || all[len(all)-1].fields["decision"] != "allowed" {
			return errors.New("it is not on record yet")
		}
		return nil
	}))
	record := decided(t, pod, want)
	if record.User.Username != "system:serviceaccount:kube-system:pod-garbage-collector" {
		t.Errorf("removed by %s", record.User.Username)
	}
}

// A namespace is deleted with what is in it. A stuck pod keeps its object until it is released, and the namespace waits.
func TestADeletedNamespaceWaitsForItsStuckPod(t *testing.T) {
	t.Parallel()
	for _, mode := range []string{"deny", "hold"} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			ns := "e2e-deleted-" + mode + "-" + rand.String(5)
			wentThrough(t, cluster.Namespace(t.Context(), ns, map[string]string{testLabel: "", "eni-guard.io/mode": mode}))
			namespaces := cluster.CoreV1().Namespaces()
			t.Cleanup(func() {
				if err := namespaces.Delete(context.Background(), ns, metav1.DeleteOptions{}); err != nil && !apierrors.IsNotFound(err) {
					t.Error(err)
				}
			})
			stuck := stuckFS(t, ns)
			pod := start(t, stuck.StuckPod(ns, "payment-0"))
			if _, err := incident.AwaitStuck(t.Context(), pod, "S"); err != nil {
				t.Fatal(err)
			}
			if mode == "hold" {
				wentThrough(t, forceDelete(t, pod))
			}
			wentThrough(t, namespaces.Delete(t.Context(), ns, metav1.DeleteOptions{}))
			process := inStateD(t, pod)
			if mode == "hold" {
				isHeld(t, pod)
			} else {
				// Nor does it go when somebody loses patience with the namespace.
				refusedAtLast(t, func() error { return forceDelete(t, pod) }, fmt.Sprintf("process %d (dd) is in state D", process.PID))
			}
			wentThrough(t, cluster.AwaitCollection(t.Context()))
			read(t, pod)
			hasItsAddress(t, pod)
			onTheNode(t, pod, process)
			now, err := namespaces.Get(t.Context(), ns, metav1.GetOptions{})
			if err != nil || now.Status.Phase != corev1.NamespaceTerminating {
				t.Errorf("the namespace is %q (%v)", now.Status.Phase, err)
			}
			wentThrough(t, stuck.Release())
			wentThrough(t, incident.Wait(t.Context(), 2*time.Minute, "the namespace to be gone", func(ctx context.Context) error {
				if _, err := namespaces.Get(ctx, ns, metav1.GetOptions{}); !apierrors.IsNotFound(err) {
					return errors.Join(errors.New("it is still there"), err)
				}
				return nil
			}))
		})
	}
}

// The object of a static pod only mirrors what runs on the node. It can be deleted, and comes back by itself.
func TestTheMirrorOfAStaticPodCanBeDeleted(t *testing.T) {
	t.Parallel()
	inEveryMode(t, func(t *testing.T, mode, ns string) {
		name := "static-" + rand.String(5)
		manifest := incident.Pod(ns, name, []string{"sleep", "86400"}, nil)
		manifest.APIVersion, manifest.Kind = "v1", "Pod"
		content, err := json.Marshal(manifest)
		wentThrough(t, err)
		dir := filepath.Join(incident.DataDir, "static-pods")
		if _, err := os.Stat(dir); err != nil {
			t.Fatalf("the node has no directory of static pods (`make cluster-down install` makes it): %v", err)
		}
		file := filepath.Join(dir, name+".json")
		// The kubelet must not read half a file; it leaves those alone that start with a dot.
		wentThrough(t, os.WriteFile(filepath.Join(dir, "."+name), content, 0o600))
		wentThrough(t, os.Rename(filepath.Join(dir, "."+name), file))
		t.Cleanup(func() {
			if err := os.Remove(file); err != nil && !errors.Is(err, os.ErrNotExist) {
				t.Error(err)
			}
		})
		mirror, err := cluster.AwaitStarted(t.Context(), ns, name+"-"+incident.Node)
		wentThrough(t, err)
		if mirror.Annotations[corev1.MirrorPodAnnotationKey] == "" || mirror.Spec.HostNetwork {
			t.Fatalf("not the mirror of a static pod with an address of its own: %v", mirror.Annotations)
		}
		wentThrough(t, forceDelete(t, mirror))
		decided(t, mirror, mode+" delete exempt not-asked MirrorPod")
		wentThrough(t, cluster.AwaitGone(t.Context(), mirror))
		again, err := cluster.AwaitStarted(t.Context(), ns, mirror.Name)
		wentThrough(t, err)
		if again.Status.PodIP != mirror.Status.PodIP {
			t.Errorf("the static pod had %s, has %s", mirror.Status.PodIP, again.Status.PodIP)
		}
		wentThrough(t, os.Remove(file))
		wentThrough(t, cluster.AwaitGone(t.Context(), again))
	})
}

// Nodes without an agent are named by labels.
func TestPodsOfNodesThatAreExcludedAreNotGuarded(t *testing.T) {
	t.Parallel()
	inEveryMode(t, func(t *testing.T, mode, ns string) {
		for _, labels := range []map[string]string{{"type": "virtual-kubelet"}, {corev1.LabelOSStable: "windows"}} {
			pod := haunt(t, ns, ghost(t, labels))
			awaitKnown(t, pod, mode)
			wentThrough(t, forceDelete(t, pod))
			wentThrough(t, cluster.Gone(t.Context(), pod))
			decided(t, pod, mode+" delete exempt not-asked ExcludedNode")
		}
	})
	t.Run("any other", func(t *testing.T) {
		ns := moded(t, "deny")
		node := ghost(t, map[string]string{"type": "virtual", corev1.LabelOSStable: "plan9"})
		pod := haunt(t, ns, node)
		awaitKnown(t, pod, "deny")
		refused(t, forceDelete(t, pod), "the agent of node "+node+" does not run", "nothing listens at 127.0.0.1:9807")
		kept(t, pod)
	})
}

// awaitKnown waits until the guard knows a namespace and a node that are new, by asking in dry run, which it does not remember.
func awaitKnown(t *testing.T, pod *corev1.Pod, mode string) {
	t.Helper()
	wentThrough(t, incident.Wait(t.Context(), 2*time.Minute, "the guard to know of the mode and the node of pod "+pod.Name, func(ctx context.Context) error {
		err := cluster.CoreV1().Pods(pod.Namespace).Delete(ctx, pod.Name, metav1.DeleteOptions{GracePeriodSeconds: forced.GracePeriodSeconds, DryRun: []string{metav1.DryRunAll}})
		all := records(t, pod)
		if len(all) == 0 {
			return errors.Join(errors.New("it is not on record"), err)
		}
		if last := all[len(all)-1].fields; last["mode"] != mode || strings.Contains(last["evidence"], " is not known") {
			return fmt.Errorf("it says %v", last)
		}
		return nil
	}))
}

// A pod that Terway has never given an address cannot lose one. One that was told later to be left alone can.
func TestOnlyAPodThatTerwayHasAlwaysIgnoredIsNotGuarded(t *testing.T) {
	t.Parallel()
	inEveryMode(t, func(t *testing.T, mode, ns string) {
		pod := sleeper(t, ns, "web-0", func(p *corev1.Pod) { p.Labels = map[string]string{ignoreLabel: "true"} })
		wentThrough(t, forceDelete(t, pod))
		wentThrough(t, cluster.Gone(t.Context(), pod))
		decided(t, pod, mode+" delete exempt not-asked IgnoredByTerway")
	})
	t.Run("since the namespace was off", func(t *testing.T) {
		t.Parallel()
		ns := namespace(t)
		kubectl(t, "", "label", "namespace", ns, "eni-guard.io/mode=off")
		pod := sleeper(t, ns, "web-0", nil)
		// The API server writes down in whole seconds when a field was written.
		wentThrough(t, incident.Wait(t.Context(), 2*time.Minute, "the pod to be two seconds old", func(context.Context) error {
			if age := time.Since(pod.CreationTimestamp.Time); age < 2*time.Second {
				return fmt.Errorf("it is %s old", age)
			}
			return nil
		}))
		wentThrough(t, incident.Wait(t.Context(), 2*time.Minute, "the label to be taken where the mode is off", func(ctx context.Context) error {
			out, err := cluster.Kubectl(ctx, "-n", ns, "label", "pod", pod.Name, ignoreLabel+"=true")
			if err != nil {
				return errors.New(out)
			}
			return nil
		}))
		setMode(t, ns, "deny")
		refused(t, forceDelete(t, pod), "is still alive on node node-1")
		kept(t, pod)
		decided(t, pod, "deny delete denied bound SandboxBound")
	})
}

// Whatever is wrong with the guard, its own pods can always be removed: the API server does not ask about them.
func TestTheGuardIsNotInItsOwnWay(t *testing.T) {
	quiet(t)
	before := webhookCalls(t)
	deleteGuardPods(t, webhookPods)
	if after := webhookCalls(t); after != before {
		t.Errorf("%d calls", after-before)
	}
	events, err := cluster.AuditEvents(func(e incident.AuditEvent) bool {
		return e.Verb == "deletecollection" && e.ObjectRef.Namespace == incident.GuardNamespace
	})
	if err != nil || len(events) == 0 {
		t.Fatalf("%d collection deletes in the audit log (%v)", len(events), err)
	}
	for key := range events[len(events)-1].Annotations {
		if strings.HasPrefix(key, "force-delete.eni-guard.io/") {
			t.Errorf("the audit log has a decision: %s", key)
		}
	}
}
