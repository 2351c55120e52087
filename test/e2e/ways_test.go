package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/rand"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/eni-guard/eni-guard/test/e2e/incident"
)

// docs/ways-in.md has these tests as a table for people.

// finalizer keeps the objects of held pods.
const finalizer = "eni-guard.io/sandbox-in-use"

// ignoreLabel makes Terway let go of a pod.
const ignoreLabel = "k8s.aliyun.com/ignore-by-terway"

// way is one way to take a pod out of the API server without a word from its kubelet.
type way struct {
	// path is the audit annotation "path".
	path string
	// change adapts the pod before it is created.
	change func(*corev1.Pod)
	take   func(ctx context.Context, api kubernetes.Interface, pod *corev1.Pod) error
}

var (
	byForcedDelete = way{path: "delete", take: func(ctx context.Context, api kubernetes.Interface, pod *corev1.Pod) error {
		return deletePod(ctx, api, pod, forced)
	}}
	// The caller says nothing of force, and the pod gives itself no time.
	byPlainDeleteWithoutTime = way{path: "delete", change: withoutTime, take: plainDelete}
	byForcedCollection       = way{path: "collection", take: func(ctx context.Context, api kubernetes.Interface, pod *corev1.Pod) error {
		if err := cluster.AwaitCached(ctx, pod.Namespace, pod.Name); err != nil {
			return err
		}
		return api.CoreV1().Pods(pod.Namespace).DeleteCollection(ctx, forced, onlyThis(pod))
	}}
	byForcedEviction = way{path: "eviction", take: func(ctx context.Context, api kubernetes.Interface, pod *corev1.Pod) error {
		return evict(ctx, api, pod, &forced)
	}}
	// As a drain does it, and the pod gives itself no time.
	byPlainEvictionWithoutTime = way{path: "eviction", change: withoutTime, take: func(ctx context.Context, api kubernetes.Interface, pod *corev1.Pod) error {
		return evict(ctx, api, pod, nil)
	}}
	byForcedEvictionInDryRun = way{path: "eviction", take: func(ctx context.Context, api kubernetes.Interface, pod *corev1.Pod) error {
		return evict(ctx, api, pod, &metav1.DeleteOptions{GracePeriodSeconds: forced.GracePeriodSeconds, DryRun: []string{metav1.DryRunAll}})
	}}
)

func TestForcedDeleteOfARunningPod(t *testing.T)           { byForcedDelete.ofARunningPod(t) }
func TestPlainDeleteOfARunningPodWithoutTime(t *testing.T) { byPlainDeleteWithoutTime.ofARunningPod(t) }
func TestForcedCollectionDeleteOfARunningPod(t *testing.T) { byForcedCollection.ofARunningPod(t) }
func TestForcedEvictionOfARunningPod(t *testing.T)         { byForcedEviction.ofARunningPod(t) }
func TestPlainEvictionOfARunningPodWithoutTime(t *testing.T) {
	byPlainEvictionWithoutTime.ofARunningPod(t)
}

// ofARunningPod tries the way on a pod that nobody has told to end, in every mode.
func (w way) ofARunningPod(t *testing.T) {
	t.Parallel()
	inEveryMode(t, func(t *testing.T, mode, ns string) {
		pod := sleeper(t, ns, "web-0", w.change)
		api := callAs(t, "")
		err := w.take(t.Context(), api, pod)
		switch mode {
		case "deny":
			// Also an eviction, because here waiting would never help.
			refused(t, err, "pod "+ns+"/web-0 is still alive on node node-1", "--now")
			asItWas(t, pod)
			decided(t, pod, "deny "+w.path+" denied bound SandboxBound")
			// What the refusal advises. A pod without time to end needs it also where its namespace is deleted: whoever
			// does that says nothing of time.
			wentThrough(t, cluster.CoreV1().Pods(ns).Delete(t.Context(), pod.Name, metav1.DeleteOptions{GracePeriodSeconds: new(int64(1))}))
		case "hold":
			wentThrough(t, err)
			wasHeld(t, pod)
			decided(t, pod, "hold "+w.path+" held bound SandboxBound")
			api.warned(t, "held until its node has let go of it: pod "+ns+"/web-0 is still alive on node node-1")
			// The mark tells the kubelet to end it, and a process that can be killed does not keep it for long.
			wentThrough(t, cluster.AwaitGone(t.Context(), pod))
		case "audit":
			wentThrough(t, err)
			wentThrough(t, cluster.Gone(t.Context(), pod))
			decided(t, pod, "audit "+w.path+" audited bound SandboxBound")
			api.warned(t, "eni-guard would refuse this, but only records it: pod "+ns+"/web-0 is still alive on node node-1")
		}
	})
}

// What cannot be found out counts like what is bound: whatever the way in, and whatever the mode makes of it.
func TestANodeThatCannotBeAskedCountsAsBound(t *testing.T) {
	ways := map[string]way{
		"delete": byForcedDelete, "delete-without-time": byPlainDeleteWithoutTime, "collection": byForcedCollection,
		"eviction": byForcedEviction, "eviction-without-time": byPlainEvictionWithoutTime,
	}
	type terrain struct {
		ns                                string
		pods                              map[string]*corev1.Pod
		labelled, terminating, overridden *corev1.Pod
	}
	terrains := map[string]terrain{}
	for _, mode := range []string{"deny", "hold", "audit"} {
		at := terrain{ns: moded(t, mode), pods: map[string]*corev1.Pod{}}
		for name, w := range ways {
			at.pods[name] = sleeper(t, at.ns, name, w.change)
		}
		at.labelled = sleeper(t, at.ns, "labelled", nil)
		at.terminating = sleeper(t, at.ns, "terminating", func(p *corev1.Pod) { p.Spec.TerminationGracePeriodSeconds = new(int64(600)) })
		wentThrough(t, plainDelete(t.Context(), cluster, at.terminating))
		at.overridden = sleeper(t, at.ns, "overridden", nil)
		annotate(t, at.overridden, overrideAnnotation, "the node is powered off")
		terrains[mode] = at
	}
	restart := withoutAgent(t)
	for mode, at := range terrains {
		t.Run(mode, func(t *testing.T) {
			unknown := func(pod *corev1.Pod) string {
				return "cannot tell whether pod " + at.ns + "/" + pod.Name + " is still alive on node node-1: the agent of node node-1 does not run"
			}
			const recorded = "eni-guard would refuse this, but only records it: "
			for name, w := range ways {
				pod, api := at.pods[name], callAs(t, "")
				err := w.take(t.Context(), api, pod)
				switch mode {
				case "deny":
					refused(t, err, unknown(pod), "--now`: the pod then goes", "Look at the agent: ")
					asItWas(t, pod)
					decided(t, pod, "deny "+w.path+" denied unknown NoAnswer")
				case "hold":
					wentThrough(t, err)
					isHeld(t, pod)
					decided(t, pod, "hold "+w.path+" held unknown NoAnswer")
					api.warned(t, "held until its node has let go of it: "+unknown(pod))
				case "audit":
					wentThrough(t, err)
					wentThrough(t, cluster.Gone(t.Context(), pod))
					decided(t, pod, "audit "+w.path+" audited unknown NoAnswer")
					api.warned(t, recorded+unknown(pod))
				}
			}

			api := callAs(t, "")
			wentThrough(t, byForcedDelete.take(t.Context(), api, at.overridden))
			wentThrough(t, cluster.Gone(t.Context(), at.overridden))
			decided(t, at.overridden, mode+" delete overridden unknown Override")
			api.warned(t, "overridden: "+unknown(at.overridden))

			// Where nothing can be held, mode hold refuses.
			_, err := cluster.CoreV1().Pods(at.ns).Patch(t.Context(), at.labelled.Name, types.MergePatchType, []byte(`{"metadata":{"labels":{"`+ignoreLabel+`":"true"}}}`), metav1.PatchOptions{})
			if mode == "audit" {
				wentThrough(t, err)
				decided(t, at.labelled, "audit ignore-label audited unknown NoAnswer")
			} else {
				refused(t, err, unknown(at.labelled), "Give the label to pods when they are created.")
				asItWas(t, at.labelled)
				decided(t, at.labelled, mode+" ignore-label denied unknown NoAnswer")
			}
			before := read(t, at.terminating)
			if mode == "audit" {
				wentThrough(t, forceDelete(t, at.terminating))
				wentThrough(t, cluster.Gone(t.Context(), at.terminating))
				decided(t, at.terminating, "audit delete audited unknown NoAnswer")
				return
			}
			refused(t, forceDelete(t, at.terminating), unknown(at.terminating), "It is being deleted already")
			decided(t, at.terminating, mode+" delete denied unknown NoAnswer")
			refusedWith(t, evict(t.Context(), cluster, at.terminating, &forced), http.StatusTooManyRequests, metav1.StatusReasonTooManyRequests, unknown(at.terminating))
			decided(t, at.terminating, mode+" eviction denied unknown NoAnswer")
			sameMarks(t, before)
			if mode == "hold" {
				pod := at.pods["delete"]
				_, err := cluster.CoreV1().Pods(at.ns).Patch(t.Context(), pod.Name, types.JSONPatchType, []byte(`[{"op":"remove","path":"/metadata/finalizers"}]`), metav1.PatchOptions{})
				refused(t, err, unknown(pod), "The finalizer holds it")
				isHeld(t, pod)
				decided(t, pod, "hold finalizer denied unknown NoAnswer")
			}
		})
	}
	restart()
	// What was held has ended on its node meanwhile.
	for _, pod := range terrains["hold"].pods {
		wentThrough(t, cluster.AwaitGone(t.Context(), pod))
	}
	for mode, at := range terrains {
		for _, process := range incident.Processes(at.terminating) {
			if err := syscall.Kill(process.PID, syscall.SIGKILL); !errors.Is(err, syscall.ESRCH) {
				wentThrough(t, err)
			}
		}
		if mode == "deny" {
			wentThrough(t, giveTime(t.Context(), at.ns))
		}
	}
}

// Whoever deletes a namespace says nothing of time, so that a pod that gives itself none is never told to end, and the namespace
// waits until somebody tells it.
func TestADeletedNamespaceWaitsForARunningPodWithoutTime(t *testing.T) {
	t.Parallel()
	ns := "e2e-deleted-" + rand.String(5)
	wentThrough(t, cluster.Namespace(t.Context(), ns, map[string]string{testLabel: "", "eni-guard.io/mode": "deny"}))
	pod := sleeper(t, ns, "web-0", withoutTime)
	wentThrough(t, cluster.CoreV1().Namespaces().Delete(t.Context(), ns, metav1.DeleteOptions{}))
	wentThrough(t, incident.Wait(t.Context(), 2*time.Minute, "the namespace controller to be refused", func(context.Context) error {
		for _, record := range records(t, pod) {
			if record.Actor() == "system:serviceaccount:kube-system:namespace-controller" && record.fields["decision"] == "denied" && record.ResponseStatus.Code == http.StatusConflict {
				return nil
			}
		}
		return errors.New("it has not been")
	}))
	asItWas(t, pod)
	kubectl(t, ns, "delete", "pod", pod.Name, "--now", "--wait=false")
	wentThrough(t, cluster.AwaitGone(t.Context(), pod))
}

// As drains do it. The kubelet ends the pod in its own time.
func TestPlainEvictionOfARunningPod(t *testing.T) {
	t.Parallel()
	inEveryMode(t, func(t *testing.T, mode, ns string) {
		pod := sleeper(t, ns, "web-0", nil)
		wentThrough(t, evict(t.Context(), cluster, pod, nil))
		decided(t, pod, mode+" eviction exempt not-asked NotForced")
		wentThrough(t, cluster.AwaitGone(t.Context(), pod))
	})
}

// The incident: the pod has been told to end, its process cannot, and somebody loses patience.
func TestATerminatingStuckPod(t *testing.T) {
	t.Parallel()
	ways := map[string]way{
		"forced delete":              byForcedDelete,
		"forced collection delete":   byForcedCollection,
		"forced eviction":            byForcedEviction,
		"forced eviction in dry run": byForcedEvictionInDryRun,
	}
	inEveryMode(t, func(t *testing.T, mode, ns string) {
		stuck := stuckFS(t, ns)
		if mode == "audit" {
			pods := map[string]*corev1.Pod{}
			for _, name := range []string{"forced delete", "forced collection delete", "forced eviction"} {
				pods[name] = start(t, stuck.StuckPod(ns, strings.ReplaceAll(name, " ", "-")))
			}
			for _, pod := range pods {
				wentThrough(t, plainDelete(t.Context(), cluster, pod))
			}
			for name, pod := range pods {
				w, api := ways[name], callAs(t, "")
				process := inStateD(t, pod)
				wentThrough(t, w.take(t.Context(), api, pod))
				wentThrough(t, cluster.Gone(t.Context(), pod))
				decided(t, pod, "audit "+w.path+" audited bound SandboxBound")
				api.warned(t, "eni-guard would refuse this, but only records it: pod "+ns+"/"+pod.Name+" is still alive on node node-1")
				// That is what the mode lets happen.
				onTheNode(t, pod, process)
			}
			return
		}
		pod := start(t, stuck.StuckPod(ns, "web-0"))
		process := unkillable(t, pod)
		before := read(t, pod)
		for name, w := range ways {
			api := callAs(t, "")
			err := w.take(t.Context(), api, pod)
			code, reason := http.StatusConflict, metav1.StatusReasonConflict
			if w.path == "eviction" {
				code, reason = http.StatusTooManyRequests, metav1.StatusReasonTooManyRequests
			}
			refusedWith(t, err, code, reason, "is still alive on node node-1: ")
			refusedAtLast(t, func() error { return w.take(t.Context(), cluster, pod) }, fmt.Sprintf("process %d (dd) is in state D", process.PID), "address "+pod.Status.PodIP+" still in use")
			// With a Retry-After client-go would repeat the request by itself, up to ten times.
			if answers := api.heard(); len(answers) != 1 || answers[0].Get("Retry-After") != "" {
				t.Errorf("%s: %d requests, the first answered with %v", name, len(answers), answers[0])
			}
			decided(t, pod, mode+" "+w.path+" denied bound SandboxBound")
			// A finalizer can no longer be added, so that mode hold refuses too.
			sameMarks(t, before)
		}
		// Without grace period 0 an eviction changes nothing, and is none of the guard's business: so a drain goes on.
		wentThrough(t, evict(t.Context(), cluster, pod, nil))
		decided(t, pod, mode+" eviction exempt not-asked NotForced")
		sameMarks(t, before)
		onTheNode(t, pod, process)
		wentThrough(t, stuck.Release())
		wentThrough(t, cluster.AwaitGone(t.Context(), pod))
	})
}

// Dry run in the Eviction's own deleteOptions does not show in the request, and must have no effect all the same.
func TestForcedEvictionInDryRunChangesNothing(t *testing.T) {
	t.Parallel()
	inEveryMode(t, func(t *testing.T, mode, ns string) {
		pod := sleeper(t, ns, "web-0", nil)
		err := byForcedEvictionInDryRun.take(t.Context(), cluster, pod)
		switch mode {
		case "deny":
			refused(t, err, "is still alive")
			decided(t, pod, "deny eviction denied bound SandboxBound")
		case "hold":
			wentThrough(t, err)
			decided(t, pod, "hold eviction held bound SandboxBound")
		case "audit":
			wentThrough(t, err)
			decided(t, pod, "audit eviction audited bound SandboxBound")
		}
		asItWas(t, pod)
		// Nor was there an Event: those about the next decision are the only ones.
		if _, err := cluster.Kubectl(t.Context(), "-n", ns, "delete", "pod", pod.Name, "--grace-period=0", "--force", "--wait=false"); (err != nil) != (mode == "deny") {
			t.Error(err)
		}
		for _, event := range removalEvents(t, pod) {
			if event.Action != "delete" {
				t.Errorf("an Event about path %s: %s", event.Action, event.Note)
			}
		}
	})
}

// With grace period 0 in its metadata a pod goes with any delete, one that asks for 30 s too. Here somebody else's finalizer
// keeps it in between.
func TestAStuckPodThatIsMarkedAlready(t *testing.T) {
	t.Parallel()
	inEveryMode(t, func(t *testing.T, mode, ns string) {
		stuck := stuckFS(t, ns)
		setMode(t, ns, "audit")
		pod := stuck.StuckPod(ns, "web-0")
		pod.Finalizers = []string{"example.com/keep"}
		pod = start(t, pod)
		if _, err := incident.AwaitStuck(t.Context(), pod, "S"); err != nil {
			t.Fatal(err)
		}
		wentThrough(t, forceDelete(t, pod))
		t.Cleanup(func() {
			patch := []byte(`{"metadata":{"finalizers":null}}`)
			if _, err := cluster.CoreV1().Pods(ns).Patch(context.Background(), pod.Name, types.MergePatchType, patch, metav1.PatchOptions{}); err != nil && !apierrors.IsNotFound(err) {
				t.Error(err)
			}
		})
		process := inStateD(t, pod)
		before := read(t, pod)
		if grace := before.DeletionGracePeriodSeconds; grace == nil || *grace != 0 {
			t.Fatalf("the pod has grace period %v", grace)
		}
		setMode(t, ns, mode)
		for _, options := range []metav1.DeleteOptions{{}, {GracePeriodSeconds: new(int64(30))}} {
			take := map[string]func() error{
				"delete":     func() error { return cluster.CoreV1().Pods(ns).Delete(t.Context(), pod.Name, options) },
				"collection": func() error { return cluster.CoreV1().Pods(ns).DeleteCollection(t.Context(), options, onlyThis(pod)) },
				"eviction":   func() error { return evict(t.Context(), cluster, pod, &options) },
			}
			for path, take := range take {
				if mode == "audit" {
					wentThrough(t, take())
					decided(t, pod, "audit "+path+" audited bound SandboxBound")
				} else {
					code, reason := http.StatusConflict, metav1.StatusReasonConflict
					if path == "eviction" {
						code, reason = http.StatusTooManyRequests, metav1.StatusReasonTooManyRequests
					}
					refusedWith(t, take(), code, reason, "is still alive on node node-1: ")
					refusedAtLast(t, take, "is in state D")
					decided(t, pod, mode+" "+path+" denied bound SandboxBound")
				}
				sameMarks(t, before)
			}
		}
		onTheNode(t, pod, process)
	})
}

// Controllers write phases too. To the API server a plain delete of a pod in phase Failed is a forced one.
func TestPlainDeleteOfAStuckPodThatSomebodyCallsFailed(t *testing.T) {
	t.Parallel()
	inEveryMode(t, func(t *testing.T, mode, ns string) {
		stuck := stuckFS(t, ns)
		var pod *corev1.Pod
		var process incident.Process
		var err error
		api := callAs(t, "")
		// The kubelet writes the phase anew now and then. A delete that comes after that is a graceful one, and not judged.
		for try := 0; pod == nil || err == nil && len(records(t, pod)) == 0 && try < 5; try++ {
			pod = start(t, stuck.StuckPod(ns, fmt.Sprintf("web-%d", try)))
			if process, err = incident.AwaitStuck(t.Context(), pod, "S"); err != nil {
				t.Fatal(err)
			}
			writePhase(t, pod, corev1.PodFailed)
			err = plainDelete(t.Context(), api, pod)
		}
		switch mode {
		case "deny":
			refused(t, err, "is still alive on node node-1")
			kept(t, pod)
			decided(t, pod, "deny delete denied bound SandboxBound")
		case "hold":
			wentThrough(t, err)
			isHeld(t, pod)
			decided(t, pod, "hold delete held bound SandboxBound")
			process = inStateD(t, pod)
			isHeld(t, pod)
		case "audit":
			wentThrough(t, err)
			wentThrough(t, cluster.Gone(t.Context(), pod))
			decided(t, pod, "audit delete audited bound SandboxBound")
			api.warned(t, "eni-guard would refuse this")
			process = inStateD(t, pod)
		}
		onTheNode(t, pod, process)
		wentThrough(t, stuck.Release())
		if mode == "hold" {
			wentThrough(t, cluster.AwaitGone(t.Context(), pod))
		}
	})
}

// With this label a pod has no address of Terway's; given later, it frees the one that is in use.
func TestAddingTheLabelThatFreesTheAddress(t *testing.T) {
	t.Parallel()
	const patch = `-p={"metadata":{"labels":{"` + ignoreLabel + `":"true"}}}`
	inEveryMode(t, func(t *testing.T, mode, ns string) {
		pod := sleeper(t, ns, "web-0", nil)
		add := map[string][]string{
			"by kubectl label":           {"label", "pod", pod.Name, ignoreLabel + "=true"},
			"by the status subresource":  {"patch", "pod", pod.Name, "--subresource=status", patch},
			"in place of another value":  {"label", "pod", pod.Name, ignoreLabel + "=true", "--overwrite"},
			"with a patch of the labels": {"patch", "pod", pod.Name, patch},
		}
		for name, args := range add {
			if name == "in place of another value" {
				kubectl(t, ns, "label", "pod", pod.Name, ignoreLabel+"=false", "--overwrite")
			} else {
				kubectl(t, ns, "label", "pod", pod.Name, ignoreLabel+"-")
			}
			before := read(t, pod)
			out, err := cluster.Kubectl(t.Context(), append([]string{"-n", ns}, args...)...)
			now := read(t, pod)
			if mode == "audit" {
				wentThrough(t, err)
				if !strings.Contains(out, "Warning: eni-guard would refuse this, but only records it: pod "+ns+"/web-0 is still alive") {
					t.Errorf("%s: no warning:\n%s", name, out)
				}
				if now.Labels[ignoreLabel] != "true" {
					t.Errorf("%s: labels %v", name, now.Labels)
				}
				continue
			}
			// There is nothing to hold: the object would stay, and the address go.
			if err == nil || !strings.Contains(out, "With the label "+ignoreLabel+"=true Terway would free its address") {
				t.Errorf("%s: %v\n%s", name, err, out)
			}
			if now.Labels[ignoreLabel] != before.Labels[ignoreLabel] || held(now) {
				t.Errorf("%s: labels %v, finalizers %v", name, now.Labels, now.Finalizers)
			}
		}
		want := map[string]string{"deny": "deny ignore-label denied", "hold": "hold ignore-label denied", "audit": "audit ignore-label audited"}[mode]
		decided(t, pod, want+" bound SandboxBound")
		// The label once more, when the pod has it, is no change; neither is taking it away.
		if mode == "audit" {
			wentThrough(t, cluster.AwaitCached(t.Context(), ns, pod.Name))
			count := len(records(t, pod))
			kubectl(t, ns, "label", "pod", pod.Name, ignoreLabel+"=true", "--overwrite", "again=yes")
			kubectl(t, ns, "label", "pod", pod.Name, ignoreLabel+"-")
			if n := len(records(t, pod)) - count; n != 0 {
				t.Errorf("%d decisions about changes that free nothing", n)
			}
		}
	})
}

// What else changes on pods, all day long, must not depend on the guard.
func TestOtherChangesOfPodsMakeNoCall(t *testing.T) {
	quiet(t)
	ns := namespace(t)
	pod := sleeper(t, ns, "web-0", nil)
	before := webhookCalls(t)
	kubectl(t, ns, "label", "pod", pod.Name, "app=web")
	kubectl(t, ns, "label", "pod", pod.Name, ignoreLabel+"=false")
	kubectl(t, ns, "annotate", "pod", pod.Name, "note=x")
	kubectl(t, ns, "patch", "pod", pod.Name, "--subresource=status", `-p={"status":{"message":"x"}}`)
	kubectl(t, ns, "patch", "pod", pod.Name, "--type=json", `-p=[{"op":"add","path":"/metadata/finalizers","value":["example.com/keep"]}]`)
	kubectl(t, ns, "patch", "pod", pod.Name, "--type=json", `-p=[{"op":"remove","path":"/metadata/finalizers"}]`)
	if after := webhookCalls(t); after != before {
		t.Errorf("%d calls", after-before)
	}
	// The counter does count.
	if _, err := cluster.Kubectl(t.Context(), "-n", ns, "label", "pod", pod.Name, ignoreLabel+"=true", "--overwrite"); err == nil {
		t.Error("the label was added")
	}
	if after := webhookCalls(t); after == before {
		t.Error("no call for the label that counts")
	}
}

// With the last finalizer the API server removes a marked pod, and makes no DELETE call.
func TestTakingTheFinalizerFromAHeldPod(t *testing.T) {
	t.Parallel()
	ns := moded(t, "hold")
	stuck := stuckFS(t, ns)
	pod, process := heldStuckPod(t, stuck, ns, "web-0")
	intern, operator := people(t, ns)
	take := func(api kubernetes.Interface) error {
		_, err := api.CoreV1().Pods(ns).Patch(t.Context(), pod.Name, types.JSONPatchType, []byte(`[{"op":"remove","path":"/metadata/finalizers"}]`), metav1.PatchOptions{})
		return err
	}
	out, err := cluster.Kubectl(t.Context(), "-n", ns, "patch", "pod", pod.Name, "--type=json", `-p=[{"op":"remove","path":"/metadata/finalizers"}]`)
	if err == nil || !strings.Contains(out, "The finalizer holds it, and is taken away as soon as its node has let go of it.") {
		t.Errorf("%v\n%s", err, out)
	}
	isHeld(t, pod)
	decided(t, pod, "hold finalizer denied bound SandboxBound")
	refusedAtLast(t, func() error { return take(operator) }, fmt.Sprintf("process %d (dd) is in state D", process.PID))
	isHeld(t, pod)

	annotate(t, pod, overrideAnnotation, "the node is powered off")
	refused(t, take(intern), `user `+internName+` does not have the right "override"`)
	isHeld(t, pod)
	wentThrough(t, take(operator))
	wentThrough(t, cluster.Gone(t.Context(), pod))
	record := decided(t, pod, "hold finalizer overridden bound Override")
	if record.Actor() != operatorName || record.fields["override-reason"] != "the node is powered off" {
		t.Errorf("user %s, fields %v", record.Actor(), record.fields)
	}
	onTheNode(t, pod, process)
}

// Some versions of Terway free an address by the phase alone. Controllers must be able to write phases, so that is reported,
// where the people look who wonder about the pod or the node.
func TestATerminalPhaseWhileBoundIsReported(t *testing.T) {
	for _, mode := range []string{"deny", "hold", "audit"} {
		ns := moded(t, mode)
		// Its kubelet ends a pod of this phase; until then it is bound.
		pod := sleeper(t, ns, "web-0", func(p *corev1.Pod) { p.Spec.TerminationGracePeriodSeconds = new(int64(10)) })
		const metric = "eni_guard_terminal_phase_while_bound_total"
		grown := counted(t, metric)
		writePhase(t, pod, corev1.PodFailed)
		for _, regarding := range []corev1.ObjectReference{{Kind: "Pod", Namespace: ns, Name: pod.Name, UID: pod.UID}, {Kind: "Node", Namespace: "default", Name: incident.Node, UID: incident.Node}} {
			err := incident.Wait(t.Context(), 2*time.Minute, "an Event about the "+regarding.Kind, func(context.Context) error {
				for _, event := range events(t, regarding.Namespace, regarding.UID) {
					if event.Reason == "TerminalPhaseWhileBound" && event.Type == corev1.EventTypeWarning && event.Regarding.Kind == regarding.Kind &&
						strings.HasPrefix(event.Note, "user kubernetes-admin has written a terminal phase, but pod "+ns+"/web-0 is still alive on node node-1: ") {
						return nil
					}
				}
				return errors.New("there is none")
			})
			wentThrough(t, err)
		}
		grown()
		if records := records(t, pod); len(records) != 0 {
			t.Errorf("a phase was decided about: %v", records)
		}
	}
}

// inEveryMode runs a test in a namespace of each mode that does something.
func inEveryMode(t *testing.T, test func(t *testing.T, mode, ns string)) {
	for _, mode := range []string{"deny", "hold", "audit"} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			test(t, mode, moded(t, mode))
		})
	}
}

// moded makes a namespace in a mode.
func moded(t *testing.T, mode string) string {
	t.Helper()
	ns := namespace(t)
	setMode(t, ns, mode)
	return ns
}

// setMode changes the mode of a namespace, and waits until the guard knows, by asking about a pod that is bound.
func setMode(t *testing.T, ns, mode string) {
	t.Helper()
	patch := fmt.Appendf(nil, `{"metadata":{"labels":{"eni-guard.io/mode":%q}}}`, mode)
	if _, err := cluster.CoreV1().Namespaces().Patch(t.Context(), ns, types.MergePatchType, patch, metav1.PatchOptions{}); err != nil {
		t.Fatal(err)
	}
	pods, err := cluster.CoreV1().Pods(ns).List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for _, pod := range pods.Items {
		err := incident.Wait(t.Context(), 2*time.Minute, "the mode "+mode+" to be in force in namespace "+ns, func(ctx context.Context) error {
			// A single DELETE in dry run; whatever the answer is, it is on record.
			err := cluster.CoreV1().Pods(ns).Delete(ctx, pod.Name, metav1.DeleteOptions{GracePeriodSeconds: forced.GracePeriodSeconds, DryRun: []string{metav1.DryRunAll}})
			records := records(t, &pod)
			if len(records) == 0 || records[len(records)-1].fields["mode"] != mode {
				return fmt.Errorf("answered otherwise: %w", err)
			}
			return nil
		})
		wentThrough(t, err)
	}
}

// quiet waits until nothing of earlier tests is left whose end would make the API server call the guard.
func quiet(t *testing.T) {
	t.Helper()
	wentThrough(t, removeNamespaces(t.Context()))
}

func withoutTime(pod *corev1.Pod) { pod.Spec.TerminationGracePeriodSeconds = new(int64(0)) }

func plainDelete(ctx context.Context, api kubernetes.Interface, pod *corev1.Pod) error {
	return deletePod(ctx, api, pod, metav1.DeleteOptions{})
}

// deletePod deletes a pod once the API server's cache knows all that the test has done to it.
func deletePod(ctx context.Context, api kubernetes.Interface, pod *corev1.Pod, options metav1.DeleteOptions) error {
	if err := cluster.AwaitCached(ctx, pod.Namespace, pod.Name); err != nil {
		return err
	}
	return api.CoreV1().Pods(pod.Namespace).Delete(ctx, pod.Name, options)
}

func evict(ctx context.Context, api kubernetes.Interface, pod *corev1.Pod, options *metav1.DeleteOptions) error {
	return api.PolicyV1().Evictions(pod.Namespace).Evict(ctx, &policyv1.Eviction{
		ObjectMeta: metav1.ObjectMeta{Namespace: pod.Namespace, Name: pod.Name}, DeleteOptions: options,
	})
}

// onlyThis selects one pod for a collection delete.
func onlyThis(pod *corev1.Pod) metav1.ListOptions {
	return metav1.ListOptions{FieldSelector: "metadata.name=" + pod.Name}
}

// writePhase writes a phase as controllers do, and fails the test if the API server does not take it.
func writePhase(t *testing.T, pod *corev1.Pod, phase corev1.PodPhase) {
	t.Helper()
	wentThrough(t, cluster.AwaitCached(t.Context(), pod.Namespace, pod.Name))
	if got := kubectl(t, pod.Namespace, "patch", "pod", pod.Name, "--subresource=status", fmt.Sprintf(`-p={"status":{"phase":%q}}`, phase), "--output=jsonpath={.status.phase}"); got != string(phase) {
		t.Errorf("the phase is %s", got)
	}
}

// kubectl runs kubectl in a namespace, and fails the test if that fails.
func kubectl(t *testing.T, ns string, args ...string) string {
	t.Helper()
	out, err := cluster.Kubectl(t.Context(), append([]string{"-n", ns}, args...)...)
	if err != nil {
		t.Fatalf("kubectl %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return out
}

// stuckFS mounts a file system whose readers get stuck until the test lets them go, or ends.
func stuckFS(t *testing.T, ns string) *incident.StuckFS {
	t.Helper()
	stuck, err := cluster.StartStuckFS(t.Context(), ns)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := stuck.Release(); err != nil {
			t.Error(err)
		}
	})
	return stuck
}

// unkillable deletes a stuck pod gracefully, and waits until SIGKILL has come and gone.
func unkillable(t *testing.T, pod *corev1.Pod) incident.Process {
	t.Helper()
	if _, err := incident.AwaitStuck(t.Context(), pod, "S"); err != nil {
		t.Fatal(err)
	}
	wentThrough(t, plainDelete(t.Context(), cluster, pod))
	return inStateD(t, pod)
}

// inStateD waits until SIGKILL has had no effect on a pod.
func inStateD(t *testing.T, pod *corev1.Pod) incident.Process {
	t.Helper()
	process, err := incident.AwaitStuck(t.Context(), pod, "D")
	if err != nil {
		t.Fatal(err)
	}
	return process
}

// heldStuckPod deletes a stuck pod by force, in a namespace of mode hold, and waits until SIGKILL has come and gone.
func heldStuckPod(t *testing.T, stuck *incident.StuckFS, ns, name string) (*corev1.Pod, incident.Process) {
	t.Helper()
	pod := start(t, stuck.StuckPod(ns, name))
	if _, err := incident.AwaitStuck(t.Context(), pod, "S"); err != nil {
		t.Fatal(err)
	}
	wentThrough(t, forceDelete(t, pod))
	process := inStateD(t, pod)
	isHeld(t, pod)
	return pod, process
}

// onTheNode fails the test unless the kernel still has a process of the pod in a namespace with its address.
func onTheNode(t *testing.T, pod *corev1.Pod, process incident.Process) {
	t.Helper()
	if there, err := incident.HasAddress(process.PID, pod.Status.PodIP); err != nil || !there {
		t.Errorf("process %d no longer has %s in its network namespace (%v)", process.PID, pod.Status.PodIP, err)
	}
}

func wentThrough(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// refusedWith fails the test unless err is the guard's refusal, of a kind, with every one of parts in its message.
func refusedWith(t *testing.T, err error, code int, reason metav1.StatusReason, parts ...string) {
	t.Helper()
	status := apierrors.APIStatus(nil)
	if !errors.As(err, &status) {
		t.Fatalf("not refused: %v", err)
	}
	got := status.Status()
	if int(got.Code) != code || got.Reason != reason {
		t.Errorf("refused with %d %s, not %d %s", got.Code, got.Reason, code, reason)
	}
	for _, part := range append(parts, `admission webhook "force-delete.eni-guard.io" denied the request: `) {
		if !strings.Contains(got.Message, part) {
			t.Errorf("the refusal does not say %q:\n%s", part, got.Message)
		}
	}
}

// read returns the pod as it is, and fails the test if it is not there.
func read(t *testing.T, pod *corev1.Pod) *corev1.Pod {
	t.Helper()
	now, err := cluster.CoreV1().Pods(pod.Namespace).Get(t.Context(), pod.Name, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if now.UID != pod.UID {
		t.Fatalf("pod %s is another one", pod.Name)
	}
	return now
}

func held(pod *corev1.Pod) bool { return slices.Contains(pod.Finalizers, finalizer) }

// isHeld fails the test unless the pod is marked for removal, and its object kept by the guard.
func isHeld(t *testing.T, pod *corev1.Pod) {
	t.Helper()
	marksOfHold(t, read(t, pod))
}

func marksOfHold(t *testing.T, now *corev1.Pod) {
	t.Helper()
	if grace := now.DeletionGracePeriodSeconds; now.DeletionTimestamp == nil || grace == nil || *grace != 0 || !held(now) {
		t.Errorf("deletion %v, grace period %v, finalizers %v", now.DeletionTimestamp, grace, now.Finalizers)
	}
}

// wasHeld is isHeld for a pod whose processes end within two seconds: by now it may have been freed.
func wasHeld(t *testing.T, pod *corev1.Pod) {
	t.Helper()
	now, err := cluster.CoreV1().Pods(pod.Namespace).Get(t.Context(), pod.Name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		traces(t, pod, "SandboxReleased", "is no longer held")
		return
	}
	wentThrough(t, err)
	marksOfHold(t, now)
}

// asItWas fails the test unless nothing of the pod has changed that the guard or a removal changes.
func asItWas(t *testing.T, before *corev1.Pod) {
	t.Helper()
	now := read(t, before)
	if now.DeletionTimestamp != nil || len(now.Finalizers) != len(before.Finalizers) || len(now.Labels) != len(before.Labels) || len(now.Annotations) != len(before.Annotations) {
		t.Errorf("deletion %v, finalizers %v, labels %v, annotations %v", now.DeletionTimestamp, now.Finalizers, now.Labels, now.Annotations)
	}
}

// sameMarks fails the test unless a pod that is being deleted is marked as it was.
func sameMarks(t *testing.T, before *corev1.Pod) {
	t.Helper()
	marks := func(pod *corev1.Pod) string {
		return fmt.Sprintf("deletion %v with grace period %d, finalizers %v", pod.DeletionTimestamp, *pod.DeletionGracePeriodSeconds, pod.Finalizers)
	}
	if was, is := marks(before), marks(read(t, before)); was != is {
		t.Errorf("was: %s; is: %s", was, is)
	}
}

// record is what the audit log has of one decision about a pod.
type record struct {
	incident.AuditEvent
	fields map[string]string
}

// records returns all of them, in the order they were made.
func records(t *testing.T, pod *corev1.Pod) []record {
	t.Helper()
	var found []record
	_, err := cluster.AuditEvents(func(event incident.AuditEvent) bool {
		if fields := fieldsOf(t, event, pod.UID); fields != nil {
			found = append(found, record{event, fields})
		}
		return false
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// fieldsOf returns what the guard has written about a pod into an audit event; nil if it is about another.
func fieldsOf(t *testing.T, event incident.AuditEvent, uid types.UID) map[string]string {
	t.Helper()
	fields := map[string]string{}
	if text := event.Annotation("pod." + string(uid)); text != "" {
		if err := json.Unmarshal([]byte(text), &fields); err != nil {
			t.Fatalf("the record of pod %s in a collection delete: %v\n%s", uid, err, text)
		}
		return fields
	}
	if event.Annotation("pod-uid") != string(uid) {
		return nil
	}
	for _, key := range []string{"decision", "verdict", "mode", "path", "pod", "pod-uid", "node", "pod-ips", "evidence", "reason", "override-reason"} {
		if value := event.Annotation(key); value != "" {
			fields[key] = value
		}
	}
	return fields
}

// decided fails the test unless the last record about a pod is "mode path decision verdict reason".
func decided(t *testing.T, pod *corev1.Pod, want string) record {
	t.Helper()
	all := records(t, pod)
	if len(all) == 0 {
		t.Fatalf("the audit log has no decision about pod %s", pod.Name)
	}
	last := all[len(all)-1]
	var got []string
	for _, key := range []string{"mode", "path", "decision", "verdict", "reason"} {
		got = append(got, last.fields[key])
	}
	if got := strings.Join(got, " "); got != want {
		t.Errorf("the audit log says %q, not %q", got, want)
	}
	for key, want := range map[string]string{"pod": pod.Namespace + "/" + pod.Name, "node": pod.Spec.NodeName, "pod-ips": pod.Status.PodIP} {
		if last.fields[key] != want {
			t.Errorf("the audit annotation %q is %q, not %q", key, last.fields[key], want)
		}
	}
	return last
}

// caller is a client that remembers what it hears.
type caller struct {
	kubernetes.Interface
	mu       sync.Mutex
	warnings []string
	// answers are the headers of every answer.
	answers []http.Header
}

// callAs returns a client of its own that acts as a user; the administrator if user is empty.
func callAs(t *testing.T, user string) *caller {
	t.Helper()
	config, err := clientcmd.BuildConfigFromFlags("", cluster.Kubeconfig())
	if err != nil {
		t.Fatal(err)
	}
	c := &caller{}
	config.Impersonate.UserName = user
	config.WarningHandler = c
	config.Wrap(func(next http.RoundTripper) http.RoundTripper {
		return roundTripper(func(request *http.Request) (*http.Response, error) {
			response, err := next.RoundTrip(request)
			if err == nil {
				c.mu.Lock()
				defer c.mu.Unlock()
				c.answers = append(c.answers, response.Header)
			}
			return response, err
		})
	})
	if c.Interface, err = kubernetes.NewForConfig(config); err != nil {
		t.Fatal(err)
	}
	return c
}

type roundTripper func(*http.Request) (*http.Response, error)

// RoundTrip implements http.RoundTripper.
func (r roundTripper) RoundTrip(request *http.Request) (*http.Response, error) { return r(request) }

// HandleWarningHeader implements rest.WarningHandler.
func (c *caller) HandleWarningHeader(_ int, _, text string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.warnings = append(c.warnings, text)
}

// heard returns the headers of every answer of the API server so far.
func (c *caller) heard() []http.Header {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.answers)
}

// warned fails the test unless the caller has been warned, and every warning begins so. Another replica that judges the same removal may have
// found something else first.
func (c *caller) warned(t *testing.T, prefix string) {
	t.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.warnings) == 0 || slices.ContainsFunc(c.warnings, func(w string) bool { return !strings.HasPrefix(w, prefix) }) {
		t.Errorf("warnings %q, not %q", c.warnings, prefix)
	}
}
