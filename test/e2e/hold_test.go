package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/rand"

	"github.com/eni-guard/eni-guard/test/e2e/incident"
)

const webhookPods = "app.kubernetes.io/component=webhook"

// heldUntilReleased holds a pod with a process that no signal ends, and returns how to let the process go.
func heldUntilReleased(t *testing.T, ns string) (pod *corev1.Pod, release func()) {
	t.Helper()
	stuck := stuckFS(t, ns)
	pod, _ = heldStuckPod(t, stuck, ns, "payment-0")
	return pod, func() {
		t.Helper()
		wentThrough(t, stuck.Release())
	}
}

// stillHeld fails the test unless the pod is marked for removal at once, kept by the guard's finalizer, and has its address.
func stillHeld(t *testing.T, pod *corev1.Pod) {
	t.Helper()
	isHeld(t, pod)
	hasItsAddress(t, pod)
}

// hasItsAddress fails the test unless the address is recorded for the pod where Terway would record it.
func hasItsAddress(t *testing.T, pod *corev1.Pod) {
	t.Helper()
	addresses, err := cluster.Addresses(t.Context())
	wentThrough(t, err)
	if got := addresses.Of(pod.Namespace, pod.Name); got != pod.Status.PodIP {
		t.Errorf("address %q is recorded for pod %s, not %s", got, pod.Name, pod.Status.PodIP)
	}
}

// freed waits until a held pod is gone, and looks at the traces that must be left of it: an Event and a line of
// the log.
func freed(t *testing.T, pod *corev1.Pod, reason, words string) {
	t.Helper()
	begin := time.Now()
	err := incident.Wait(t.Context(), 3*time.Minute, "held pod "+pod.Name+" to be freed", func(ctx context.Context) error {
		return cluster.Gone(ctx, pod)
	})
	if err != nil {
		now := read(t, pod)
		t.Fatalf("%v (finalizers %v, annotations %v)", err, now.Finalizers, now.Annotations)
	}
	t.Logf("pod %s was freed after %s", pod.Name, time.Since(begin).Round(100*time.Millisecond))
	traces(t, pod, reason, words)
}

// nothingHeld fails the test if a pod anywhere has the guard's finalizer.
func nothingHeld(t *testing.T) {
	t.Helper()
	pods, err := cluster.CoreV1().Pods("").List(t.Context(), metav1.ListOptions{})
	wentThrough(t, err)
	for _, pod := range pods.Items {
		if held(&pod) {
			t.Errorf("pod %s/%s is held", pod.Namespace, pod.Name)
		}
	}
}

// traces fails the test unless the release of a held pod has left an Event and a line of the log.
func traces(t *testing.T, pod *corev1.Pod, reason, words string) {
	t.Helper()
	err := incident.Wait(t.Context(), 2*time.Minute, "an Event HoldReleased of pod "+pod.Name, func(ctx context.Context) error {
		events, err := cluster.CoreV1().Events(pod.Namespace).List(ctx, metav1.ListOptions{FieldSelector: "reason=HoldReleased,involvedObject.uid=" + string(pod.UID)})
		if err != nil {
			return err
		}
		if len(events.Items) != 1 || !strings.Contains(events.Items[0].Message, words) {
			return fmt.Errorf("there are %d: %v", len(events.Items), events.Items)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	line := inWebhookLog(t, `"msg":"freed a held pod"`, string(pod.UID))
	if !strings.Contains(line, `"reason":"`+reason+`"`) || !strings.Contains(line, pod.Status.PodIP) {
		t.Errorf("the log says of the release of pod %s: %q", pod.Name, line)
	}
}

// inWebhookLog returns the one line in the logs of the webhook with all of parts in it. A line gets there a moment after it is written.
func inWebhookLog(t *testing.T, parts ...string) string {
	t.Helper()
	var found []string
	err := incident.Wait(t.Context(), time.Minute, "a line of the webhook's logs", func(context.Context) error {
		found = nil
		for line := range strings.Lines(kubectl(t, incident.GuardNamespace, "logs", "-l", webhookPods, "--tail=-1")) {
			if !slices.ContainsFunc(parts, func(part string) bool { return !strings.Contains(line, part) }) {
				found = append(found, strings.TrimSpace(line))
			}
		}
		if len(found) == 0 {
			return errors.New("there is none")
		}
		return nil
	})
	if err != nil || len(found) != 1 {
		t.Errorf("%d lines of the webhook's logs have %q in them, not 1", len(found), parts)
		return ""
	}
	return found[0]
}

// leader waits until a replica that runs leads, and returns it.
func leader(t *testing.T) *corev1.Pod {
	t.Helper()
	var pod *corev1.Pod
	err := incident.Wait(t.Context(), 2*time.Minute, "a replica of the webhook to lead", func(ctx context.Context) error {
		lease, err := cluster.CoordinationV1().Leases(incident.GuardNamespace).Get(ctx, "eni-guard-webhook", metav1.GetOptions{})
		if err != nil {
			return err
		}
		if lease.Spec.HolderIdentity == nil || *lease.Spec.HolderIdentity == "" || lease.Spec.RenewTime == nil {
			return errors.New("nobody has the lease")
		}
		// One that has not renewed it for longer than it takes to is dead, or is about to lose it.
		if age := time.Since(lease.Spec.RenewTime.Time); age > 8*time.Second {
			return fmt.Errorf("%s has not renewed the lease for %s", *lease.Spec.HolderIdentity, age)
		}
		name, _, _ := strings.Cut(*lease.Spec.HolderIdentity, "_")
		pod, err = cluster.CoreV1().Pods(incident.GuardNamespace).Get(ctx, name, metav1.GetOptions{})
		return err
	})
	wentThrough(t, err)
	return pod
}

// One stuck pod, held, through the end of everything that could lose it. It must be there after each, with its address,
// and go as soon as its node lets go of it.
func TestAHeldPodSurvivesTheRestartOfEveryPart(t *testing.T) {
	ns := moded(t, "hold")
	pod, release := heldUntilReleased(t, ns)
	decided(t, pod, "hold delete held bound SandboxBound")

	survives := func(part string, ends func(t *testing.T)) {
		worked := t.Run(part, func(t *testing.T) {
			ends(t)
			stillHeld(t, pod)
			inStateD(t, pod)
			// Right after a restart a look may not get to the end.
			awaitBecause(t, pod, "the reason to be known again", func(got string) bool {
				return strings.HasPrefix(got, "pod "+ns+"/payment-0 is still alive on node node-1: ")
			})
		})
		if !worked {
			t.FailNow()
		}
	}
	// First, because nobody leads until its lease has run out, and the rest takes longer than that.
	survives("the leader crashes", func(t *testing.T) {
		leads := leader(t)
		for _, process := range incident.Processes(leads) {
			if err := syscall.Kill(process.PID, syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
		}
		err := incident.Wait(t.Context(), 2*time.Minute, "the leader to start again", func(context.Context) error {
			now := read(t, leads)
			if before := leads.Status.ContainerStatuses[0].RestartCount; now.Status.ContainerStatuses[0].RestartCount == before {
				return fmt.Errorf("it has started %d times, as before", before)
			}
			return nil
		})
		wentThrough(t, err)
		restored(t)
	})
	survives("etcd", func(t *testing.T) { restart(t, "etcd", ns) })
	survives("the API server", func(t *testing.T) { restart(t, "kube-apiserver", ns) })
	survives("the controller manager", func(t *testing.T) { restart(t, "kube-controller-manager", ns) })
	survives("containerd", func(t *testing.T) { restart(t, "containerd", ns) })
	survives("the kubelet", func(t *testing.T) { restart(t, "kubelet", ns) })
	survives("the agent", func(t *testing.T) { deleteGuardPods(t, "app.kubernetes.io/component=agent") })
	survives("every replica of the webhook at once", func(t *testing.T) { deleteGuardPods(t, webhookPods) })
	survives("a round of the garbage collector of addresses", func(t *testing.T) {
		if err := cluster.AwaitCollection(t.Context()); err != nil {
			t.Fatal(err)
		}
	})

	leader(t)
	release()
	freed(t, pod, "SandboxReleased", "is no longer held: nothing of it is left on node node-1")
	nothingHeld(t)
}

// deleteGuardPods deletes pods of the guard by force, which makes no call of the guard, and waits for those that come in
// their place.
func deleteGuardPods(t *testing.T, selector string) {
	t.Helper()
	replaceGuardPods(t, selector)
	restored(t)
}

// replaceGuardPods is deleteGuardPods where the guard as a whole does not work.
func replaceGuardPods(t *testing.T, selector string) {
	t.Helper()
	pods := cluster.CoreV1().Pods(incident.GuardNamespace)
	before, err := pods.List(t.Context(), metav1.ListOptions{LabelSelector: selector})
	if err != nil || len(before.Items) == 0 {
		t.Fatalf("%d pods have %s (%v)", len(before.Items), selector, err)
	}
	wentThrough(t, pods.DeleteCollection(t.Context(), forced, metav1.ListOptions{LabelSelector: selector}))
	err = incident.Wait(t.Context(), 2*time.Minute, "others in their place", func(ctx context.Context) error {
		now, err := pods.List(ctx, metav1.ListOptions{LabelSelector: selector})
		if err != nil || len(now.Items) != len(before.Items) {
			return errors.Join(fmt.Errorf("there are %d", len(now.Items)), err)
		}
		for _, pod := range now.Items {
			old := slices.ContainsFunc(before.Items, func(b corev1.Pod) bool { return b.UID == pod.UID })
			if old || len(pod.Status.ContainerStatuses) == 0 || !pod.Status.ContainerStatuses[0].Ready {
				return fmt.Errorf("pod %s: old %t, %+v", pod.Name, old, pod.Status.ContainerStatuses)
			}
		}
		return nil
	})
	wentThrough(t, err)
}

// Not knowing is held as well, and explained; what is known later is written down later.
func TestAPodWhoseNodeDoesNotAnswerIsHeld(t *testing.T) {
	ns := moded(t, "hold")
	stuck := stuckFS(t, ns)
	pod := start(t, stuck.StuckPod(ns, "payment-0"))
	if _, err := incident.AwaitStuck(t.Context(), pod, "S"); err != nil {
		t.Fatal(err)
	}
	resume := pause(t, "/eni-guard", "agent")
	wentThrough(t, forceDelete(t, pod))
	// The leader asks again, and may have waited longer.
	if got := because(t, pod); !strings.HasPrefix(got, "cannot tell whether pod "+pod.Namespace+"/payment-0 is still alive on node node-1: the agent of node node-1 did not answer within ") {
		t.Errorf("it is held because %q", got)
	}
	isHeld(t, pod)
	decided(t, pod, "hold delete held unknown NoAnswer")
	resume()
	inStateD(t, pod)
	restored(t)
	awaitBecause(t, pod, "the reason to be brought up to date", func(got string) bool {
		return strings.Contains(got, "is still alive on node node-1") && strings.Contains(got, "(dd)")
	})
	stillHeld(t, pod)
	wentThrough(t, stuck.Release())
	freed(t, pod, "SandboxReleased", "is no longer held")
}

// because is what the guard says on a held pod of why it holds it.
func because(t *testing.T, pod *corev1.Pod) string {
	t.Helper()
	return read(t, pod).Annotations["eni-guard.io/held-because"]
}

func awaitBecause(t *testing.T, pod *corev1.Pod, what string, right func(string) bool) {
	t.Helper()
	err := incident.Wait(t.Context(), 2*time.Minute, what, func(context.Context) error {
		if got := because(t, pod); !right(got) {
			return errors.New(got)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

// The controller watches held pods by their label, which anybody may change who may change pods.
func TestAHeldPodThatLosesItsLabelIsFreedAllTheSame(t *testing.T) {
	t.Parallel()
	pod, release := heldUntilReleased(t, moded(t, "hold"))
	leader(t)
	unlabel(t, pod)
	labelled(t, pod)
	inWebhookLog(t, `"msg":"a held pod had lost its label"`, string(pod.UID))
	release()
	freed(t, pod, "SandboxReleased", "is no longer held")
}

// Without the label nothing tells a replica that starts of the pod.
func TestAHeldPodThatLosesItsLabelWhileThereIsNoWebhookIsFreedAllTheSame(t *testing.T) {
	pod, release := heldUntilReleased(t, moded(t, "hold"))
	t.Run("without a webhook", func(t *testing.T) {
		withoutWebhook(t)
		unlabel(t, pod)
	})
	labelled(t, pod)
	release()
	freed(t, pod, "SandboxReleased", "is no longer held")
}

func unlabel(t *testing.T, pod *corev1.Pod) {
	t.Helper()
	if got := read(t, pod).Labels["eni-guard.io/held"]; got != "true" {
		t.Fatalf("the label was %q", got)
	}
	kubectl(t, pod.Namespace, "label", "pod", pod.Name, "eni-guard.io/held-")
}

func labelled(t *testing.T, pod *corev1.Pod) {
	t.Helper()
	// While an agent is waited for, which may take 20 s, the controller does nothing else about the pod.
	err := incident.Wait(t.Context(), 2*time.Minute, "the label to come back", func(context.Context) error {
		if got := read(t, pod).Labels["eni-guard.io/held"]; got != "true" {
			return fmt.Errorf("the label is %q", got)
		}
		return nil
	})
	wentThrough(t, err)
}

// Asking with dry run must not hold anything.
func TestDryRunHoldsNothing(t *testing.T) {
	t.Parallel()
	pod := sleeper(t, moded(t, "hold"), "web-0", nil)
	err := incident.Wait(t.Context(), 2*time.Minute, "the answer to be that of the mode", func(ctx context.Context) error {
		out, err := cluster.Kubectl(ctx, "-n", pod.Namespace, "delete", "pod", pod.Name, "--grace-period=0", "--force", "--dry-run=server")
		if err != nil || !strings.Contains(out, "held until its node has let go of it: pod "+pod.Namespace+"/web-0 is still alive on node node-1") {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	kept(t, pod)
	if now := read(t, pod); len(now.Finalizers) > 0 || now.Annotations["eni-guard.io/held-since"] != "" {
		t.Errorf("the pod has changed: %v %v", now.Finalizers, now.Annotations)
	}
}

// All webhooks are called at the same time. What the guard lets through and holds, another one may refuse: then nobody
// deletes the pod, and the finalizer is in the way of whoever deletes it later.
func TestAPodThatIsNotDeletedAfterAllIsGivenBack(t *testing.T) {
	t.Parallel()
	ns := moded(t, "hold")
	pod := sleeper(t, ns, "web-0", nil)
	other := "e2e-refuses-" + rand.String(5)
	configuration := &admissionregistrationv1.ValidatingWebhookConfiguration{
		ObjectMeta: metav1.ObjectMeta{Name: other},
		Webhooks: []admissionregistrationv1.ValidatingWebhook{{
			// Nothing listens there, and so every request that it is asked about fails.
			Name: "refuses.example.com", ClientConfig: admissionregistrationv1.WebhookClientConfig{URL: new("https://127.0.0.1:1/")},
			AdmissionReviewVersions: []string{"v1"}, SideEffects: new(admissionregistrationv1.SideEffectClassNone),
			NamespaceSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"kubernetes.io/metadata.name": ns}},
			Rules: []admissionregistrationv1.RuleWithOperations{{
				Operations: []admissionregistrationv1.OperationType{admissionregistrationv1.Delete},
				Rule:       admissionregistrationv1.Rule{APIGroups: []string{""}, APIVersions: []string{"v1"}, Resources: []string{"pods"}},
			}},
		}},
	}
	configurations := cluster.AdmissionregistrationV1().ValidatingWebhookConfigurations()
	if _, err := configurations.Create(t.Context(), configuration, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := configurations.Delete(context.Background(), other, metav1.DeleteOptions{}); err != nil {
			t.Error(err)
		}
	})
	// The API server learns of the other webhook, and both it and the guard of the mode, a moment later; dry run changes nothing.
	err := incident.Wait(t.Context(), 2*time.Minute, "the other webhook alone to refuse", func(ctx context.Context) error {
		err := cluster.CoreV1().Pods(ns).Delete(ctx, pod.Name, metav1.DeleteOptions{GracePeriodSeconds: forced.GracePeriodSeconds, DryRun: []string{metav1.DryRunAll}})
		return onlyOther(err)
	})
	wentThrough(t, err)
	wentThrough(t, onlyOther(forceDelete(t, pod)))
	kept(t, pod)
	now := read(t, pod)
	if !held(now) || now.Status.Phase != corev1.PodRunning {
		t.Fatalf("the pod was not held: finalizers %v, phase %s", now.Finalizers, now.Status.Phase)
	}
	// The guard cannot know that the request has failed, and waits for longer than any request takes: two minutes by its own clock,
	// whatever the annotation says.
	past := time.Now().Add(-3 * time.Minute).UTC().Format(time.RFC3339)
	kubectl(t, ns, "annotate", "--overwrite", "pod", pod.Name, "eni-guard.io/held-since="+past)
	err = incident.Wait(t.Context(), 5*time.Minute, "the pod to be given back", func(context.Context) error {
		now := read(t, pod)
		traces := []string{now.Labels["eni-guard.io/held"]}
		for key, value := range now.Annotations {
			if strings.HasPrefix(key, "eni-guard.io/") {
				traces = append(traces, key+"="+value)
			}
		}
		if len(now.Finalizers) > 0 || strings.Join(traces, "") != "" {
			return fmt.Errorf("finalizers %v, %v", now.Finalizers, traces)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	kept(t, pod)
	inWebhookLog(t, `"msg":"no longer holds a pod that is not being deleted"`, string(pod.UID))
}

func onlyOther(err error) error {
	switch {
	case err == nil:
		return errors.New("the delete was not refused")
	case !strings.Contains(err.Error(), `failed calling webhook "refuses.example.com"`), strings.Contains(err.Error(), "force-delete.eni-guard.io"):
		return fmt.Errorf("another refusal: %w", err)
	}
	return nil
}

// A pod stays held whatever becomes of the mode of its namespace. What may be done to it is up to the new one.
func TestAHeldPodWhoseNamespaceChangesItsMode(t *testing.T) {
	t.Parallel()
	for _, mode := range []string{"deny", "audit", "off"} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			ns := moded(t, "hold")
			stuck := stuckFS(t, ns)
			pod, process := heldStuckPod(t, stuck, ns, "web-0")
			takeFinalizer := func(options ...string) error {
				out, err := cluster.Kubectl(t.Context(), append([]string{"-n", ns, "patch", "pod", pod.Name, "--type=json", `-p=[{"op":"remove","path":"/metadata/finalizers"}]`}, options...)...)
				if err != nil {
					return errors.New(out)
				}
				return nil
			}
			switch mode {
			case "deny":
				setMode(t, ns, mode)
				refusedAtLast(t, func() error { return forceDelete(t, pod) }, "is in state D")
				if err := takeFinalizer(); err == nil || !strings.Contains(err.Error(), "The finalizer holds it") {
					t.Errorf("taking the finalizer: %v", err)
				}
				decided(t, pod, "deny finalizer denied bound SandboxBound")
				stillHeld(t, pod)
				wentThrough(t, stuck.Release())
				freed(t, pod, "SandboxReleased", "is no longer held")
				return
			case "audit":
				setMode(t, ns, mode)
				wentThrough(t, forceDelete(t, pod))
				decided(t, pod, "audit delete audited bound SandboxBound")
				stillHeld(t, pod)
				wentThrough(t, takeFinalizer())
				decided(t, pod, "audit finalizer audited bound SandboxBound")
			case "off":
				kubectl(t, ns, "label", "namespace", ns, "eni-guard.io/mode=off", "--overwrite")
				count := 0
				wentThrough(t, incident.Wait(t.Context(), 2*time.Minute, "the API server to know of the mode", func(context.Context) error {
					before := len(records(t, pod))
					err := takeFinalizer("--dry-run=server")
					if count = len(records(t, pod)); err == nil && count > before {
						err = errors.New("it asks the guard, which knows already")
					}
					return err
				}))
				stillHeld(t, pod)
				wentThrough(t, takeFinalizer())
				if n := len(records(t, pod)) - count; n != 0 {
					t.Errorf("%d decisions", n)
				}
			}
			wentThrough(t, cluster.Gone(t.Context(), pod))
			onTheNode(t, pod, process)
		})
	}
}

// Its containers have ended, and what is left is a sandbox with its address, which the runtime cannot get rid of. Nothing of
// that is in the pod's status.
func TestAHeldPodOfWhichOnlyTheSandboxIsLeft(t *testing.T) {
	ns := moded(t, "hold")
	pod := sleeper(t, ns, "web-0", nil)
	// One that cannot be held, because its kubelet is finishing it, must stay in the same way.
	terminating := sleeper(t, moded(t, "deny"), "web-1", nil)
	lock, err := os.OpenFile(filepath.Join(incident.DataDir, "eni-sim", "lock"), os.O_RDONLY, 0)
	wentThrough(t, err)
	// Closing it gives the lock back.
	t.Cleanup(func() { _ = lock.Close() })
	// Until then the CNI plugin takes no address and frees none, and so no sandbox ends.
	wentThrough(t, syscall.Flock(int(lock.Fd()), syscall.LOCK_EX))
	wentThrough(t, forceDelete(t, pod))
	wentThrough(t, plainDelete(t.Context(), cluster, terminating))
	for _, pod := range []*corev1.Pod{pod, terminating} {
		wentThrough(t, incident.Wait(t.Context(), 2*time.Minute, "the containers of the pod to end", func(context.Context) error {
			left := incident.Processes(pod)
			if slices.ContainsFunc(left, func(p incident.Process) bool { return p.Command != "pause" }) {
				return fmt.Errorf("there are %+v", left)
			}
			return nil
		}))
	}
	onlySandbox := func() {
		t.Helper()
		awaitBecause(t, pod, "the guard to see nothing but the sandbox", func(got string) bool {
			return strings.Contains(got, "is still alive on node node-1: ") && strings.Contains(got, "; sandbox ") &&
				strings.Contains(got, "address "+pod.Status.PodIP+" still in use") && !strings.Contains(got, "container ")
		})
		stillHeld(t, pod)
	}
	onlySandbox()
	restart := withoutAgent(t)
	callFinished(t, pod)
	_, err = cluster.CoreV1().Pods(ns).Patch(t.Context(), pod.Name, types.JSONPatchType, []byte(`[{"op":"remove","path":"/metadata/finalizers"}]`), metav1.PatchOptions{})
	refused(t, err, "cannot tell whether pod "+ns+"/web-0 is still alive")
	decided(t, pod, "hold finalizer denied unknown NoAnswer")
	// What was found last is still told while nobody can look.
	onlySandbox()
	before := read(t, terminating)
	callFinished(t, terminating)
	refused(t, forceDelete(t, terminating), "cannot tell whether pod "+terminating.Namespace+"/web-1 is still alive")
	sameMarks(t, before)
	hasItsAddress(t, terminating)
	restart()
	onlySandbox()
	wentThrough(t, lock.Close())
	freed(t, pod, "SandboxReleased", "is no longer held: nothing of it is left on node node-1")
	wentThrough(t, cluster.AwaitGone(t.Context(), terminating))
}

// callFinished writes into the status of a pod what its kubelet reports of one that has finished. This kubelet does so only once
// the sandbox is gone, but nothing promises that.
func callFinished(t *testing.T, pod *corev1.Pod) {
	t.Helper()
	wentThrough(t, incident.Wait(t.Context(), 2*time.Minute, "the status of pod "+pod.Name+" to be written", func(ctx context.Context) error {
		now := read(t, pod)
		now.Status.Phase = corev1.PodFailed
		for i := range now.Status.ContainerStatuses {
			now.Status.ContainerStatuses[i].State = corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{ExitCode: 137}}
		}
		_, err := cluster.CoreV1().Pods(pod.Namespace).UpdateStatus(ctx, now, metav1.UpdateOptions{})
		return err
	}))
}

// A reboot is how a node gets rid of a process that nothing can kill. Everything of the pod's sandbox goes without a word
// to the runtime, which then starts, and the kubelet after it.
func TestARebootOfTheNodeFreesAHeldPod(t *testing.T) {
	ns := moded(t, "hold")
	pod, release := heldUntilReleased(t, ns)
	process, err := incident.AwaitStuck(t.Context(), pod, "D")
	wentThrough(t, err)
	netns, shim := namespaceFile(t, process.PID), shimOf(t, pod)

	startKubelet := killDaemon(t, "kubelet")
	startRuntime := killDaemon(t, "containerd")
	release()
	wentThrough(t, shim.Kill(t.Context()))
	err = incident.Wait(t.Context(), 2*time.Minute, "the processes of the pod to end", func(context.Context) error {
		var left []error
		for _, p := range incident.Processes(pod) {
			left = append(left, fmt.Errorf("%+v", p), syscall.Kill(p.PID, syscall.SIGKILL))
		}
		return errors.Join(left...)
	})
	wentThrough(t, err)
	wentThrough(t, errors.Join(syscall.Unmount(netns, syscall.MNT_DETACH), os.Remove(netns)))
	// The kernel has nothing left of it now. But the runtime cannot be asked, so that is not known for certain.
	awaitBecause(t, pod, "the guard to say that it cannot tell", func(got string) bool { return strings.HasPrefix(got, "cannot tell") })
	stillHeld(t, pod)

	startRuntime()
	startKubelet()
	wentThrough(t, cluster.AwaitGone(t.Context(), pod))
	// The log is read through the kubelet.
	clusterWorks(t, ns, "after-reboot")
	traces(t, pod, "SandboxReleased", "is no longer held: nothing of it is left on node node-1")
}

// namespaceFile finds the file that keeps the network namespace of a process open.
func namespaceFile(t *testing.T, pid int) string {
	t.Helper()
	own, err := os.Stat(fmt.Sprintf("/proc/%d/ns/net", pid))
	wentThrough(t, err)
	files, err := filepath.Glob("/run/netns/*")
	wentThrough(t, err)
	for _, file := range files {
		if info, err := os.Stat(file); err == nil && os.SameFile(own, info) {
			return file
		}
	}
	t.Fatalf("no file in /run/netns is the network namespace of process %d", pid)
	return ""
}

// shimOf finds the process of the runtime that holds the sandbox of a pod: it is named by the sandbox's ID, and so is the
// cgroup of the sandbox's process.
func shimOf(t *testing.T, pod *corev1.Pod) incident.HostProcess {
	t.Helper()
	var groups []byte
	for _, p := range incident.Processes(pod) {
		content, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", p.PID))
		wentThrough(t, err)
		groups = append(groups, content...)
	}
	shims, err := incident.HostProcesses(func(args []string) bool {
		i := slices.Index(args, "-id")
		return i > 0 && i+1 < len(args) && strings.Contains(string(groups), "/pod"+string(pod.UID)+"/"+args[i+1]+"\n")
	})
	wentThrough(t, err)
	if len(shims) != 1 {
		t.Fatalf("%d shims hold pod %s, not 1", len(shims), pod.Name)
	}
	return shims[0]
}

// A node that is lost can never let go of anything; somebody has to say so.
func TestAHeldPodOfALostNodeIsFreed(t *testing.T) {
	t.Parallel()
	ns := moded(t, "hold")
	for _, lost := range []struct {
		name, reason, words string
		lose                func(t *testing.T, node string)
	}{
		{"its Node object is deleted", "NodeGone", "is gone", func(t *testing.T, node string) {
			if err := cluster.CoreV1().Nodes().Delete(t.Context(), node, metav1.DeleteOptions{}); err != nil {
				t.Fatal(err)
			}
		}},
		{"it is declared out of service", "NodeOutOfService", "is out of service", outOfService},
	} {
		t.Run(lost.name, func(t *testing.T) {
			node := ghost(t, nil)
			pod := haunt(t, ns, node)
			// Nothing listens where its agent would.
			err := incident.Wait(t.Context(), 2*time.Minute, "the forced delete to go through", func(ctx context.Context) error {
				return cluster.CoreV1().Pods(ns).Delete(ctx, pod.Name, forced)
			})
			wentThrough(t, err)
			decided(t, pod, "hold delete held unknown NoAnswer")
			if now := read(t, pod); !held(now) || now.DeletionTimestamp == nil {
				t.Fatalf("the pod is not held: %v", now.ObjectMeta)
			}
			leader(t)
			lost.lose(t, node)
			freed(t, pod, lost.reason, "node "+node+" "+lost.words)
		})
	}
}

// ghost makes a Node object without a node behind it. It and the pods on it are removed at the end of the test.
func ghost(t *testing.T, labels map[string]string) string {
	t.Helper()
	node := &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: "ghost-" + rand.String(5), Labels: labels},
		Spec:       corev1.NodeSpec{Unschedulable: true},
		Status: corev1.NodeStatus{
			// Where the webhook asks for an agent: in its own network namespace, where none listens.
			Addresses:  []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: "127.0.0.1"}},
			Conditions: []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionFalse, Reason: "Ghost", LastHeartbeatTime: metav1.Now(), LastTransitionTime: metav1.Now()}},
		},
	}
	if _, err := cluster.CoreV1().Nodes().Create(t.Context(), node, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx := context.Background()
		if err := cluster.CoreV1().Nodes().Delete(ctx, node.Name, metav1.DeleteOptions{}); err != nil && !strings.Contains(err.Error(), "not found") {
			t.Error(err)
		}
		err := incident.Wait(ctx, 2*time.Minute, "the pods of node "+node.Name+" to be gone", func(ctx context.Context) error {
			pods, err := cluster.CoreV1().Pods("").List(ctx, metav1.ListOptions{FieldSelector: "spec.nodeName=" + node.Name})
			if err != nil {
				return err
			}
			for _, pod := range pods.Items {
				err = errors.Join(err, errors.New(pod.Name+" was there"), cluster.CoreV1().Pods(pod.Namespace).Delete(ctx, pod.Name, forced))
			}
			return err
		})
		if err != nil {
			t.Error(err)
		}
	})
	return node.Name
}

// haunt makes a pod that is bound to such a node.
func haunt(t *testing.T, namespace, node string) *corev1.Pod {
	t.Helper()
	pod, err := cluster.CoreV1().Pods(namespace).Create(t.Context(), incident.Pod(namespace, "on-"+node, []string{"true"}, func(p *corev1.Pod) {
		p.Spec.NodeName = node
	}), metav1.CreateOptions{})
	wentThrough(t, err)
	return pod
}

// outOfService vouches, as people do, that a node is shut down.
func outOfService(t *testing.T, node string) {
	t.Helper()
	kubectl(t, "", "taint", "node", node, "node.kubernetes.io/out-of-service=nodeshutdown:NoExecute")
}
