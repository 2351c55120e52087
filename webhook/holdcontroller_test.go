package webhook

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-logr/logr"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/tools/events"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"
	"sigs.k8s.io/controller-runtime/pkg/event"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/eni-guard/eni-guard/internal/sandbox"
)

// labelledPods reads as the controller's cache does, which has the pods with HeldLabel alone.
type labelledPods struct{ client.Reader }

func (l labelledPods) Get(ctx context.Context, key client.ObjectKey, object client.Object, options ...client.GetOption) error {
	err := l.Reader.Get(ctx, key, object, options...)
	if err == nil && object.GetLabels()[HeldLabel] != "true" {
		return apierrors.NewNotFound(corev1.Resource("pods"), key.Name)
	}
	return err
}

// holdTest is a controller, and what the API server has.
type holdTest struct {
	*holdController
	api    client.Client
	events *events.FakeRecorder
	asked  []sandbox.Query
}

// newHoldTest returns a controller for one held pod of node-a. Patches go through patch, if there is one.
func newHoldTest(agent agentFunc, patch func(client.WithWatch, client.Object, client.Patch) error, objects ...client.Object) *holdTest {
	h := &holdTest{events: events.NewFakeRecorder(10)}
	guard := newGuard(func(ctx context.Context, address string, query sandbox.Query) (sandbox.Report, error) {
		h.asked = append(h.asked, query)
		return agent(ctx, address, query)
	}, objects...)
	h.api, _ = guard.live.(client.Client)
	guard.events = h.events
	if patch != nil {
		watched, _ := guard.live.(client.WithWatch)
		guard.holds = holder{interceptor.NewClient(watched, interceptor.Funcs{
			Patch: func(_ context.Context, c client.WithWatch, object client.Object, p client.Patch, _ ...client.PatchOption) error {
				return patch(c, object, p)
			},
		})}
	}
	h.holdController = &holdController{Guard: guard, pods: labelledPods{h.api}, log: logr.Discard()}
	return h
}

func (h *holdTest) reconcile(t *testing.T, pod *corev1.Pod) (reconcile.Result, error) {
	t.Helper()
	return h.Reconcile(t.Context(), reconcile.Request{NamespacedName: client.ObjectKeyFromObject(pod)})
}

// now returns the pod; nil if it is gone.
func (h *holdTest) now(t *testing.T, pod *corev1.Pod) *corev1.Pod {
	t.Helper()
	now := &corev1.Pod{}
	err := h.api.Get(t.Context(), client.ObjectKeyFromObject(pod), now)
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		t.Fatal(err)
	}
	return now
}

func heldOnNodeA(change ...func(*corev1.Pod)) *corev1.Pod {
	pod := heldPod("web-0")
	pod.Spec.NodeName = "node-a"
	for _, f := range change {
		f(pod)
	}
	return pod
}

// unmarked makes a held pod one that nobody has deleted since.
func unmarked(since string) func(*corev1.Pod) {
	return func(pod *corev1.Pod) {
		pod.DeletionTimestamp, pod.DeletionGracePeriodSeconds = nil, nil
		pod.Annotations[HeldSinceAnnotation] = since
	}
}

func neverAsked(context.Context, string, sandbox.Query) (sandbox.Report, error) {
	return sandbox.Report{}, errors.New("was asked")
}

func noAnswer(context.Context, string, sandbox.Query) (sandbox.Report, error) {
	return sandbox.Report{}, errors.New("does not run")
}

// An agent that has made its caller wait is asked again at once; one that has not, because it is an old one, is not asked
// without end.
func TestAnAgentIsNotAskedWithoutAPause(t *testing.T) {
	for took, again := range map[time.Duration]time.Duration{0: holdRetry, time.Second: holdRetry - time.Second, holdWait: time.Millisecond} {
		now := testTime
		pod := heldOnNodeA()
		h := newHoldTest(func(context.Context, string, sandbox.Query) (sandbox.Report, error) {
			now = now.Add(took)
			return allProbes(open), nil
		}, nil, pod, nodeA())
		h.Guard.now = func() time.Time { return now }
		if result, err := h.reconcile(t, pod); err != nil || result.RequeueAfter != again {
			t.Errorf("an answer after %s: again after %s (%v), want %s", took, result.RequeueAfter, err, again)
		}
	}
}

func TestReconcileAHeldPod(t *testing.T) {
	alive := sandbox.Finding{Kind: sandbox.SandboxReady, Sandbox: "0123456789abcdef"}
	terminated := func(pod *corev1.Pod) {
		pod.Spec.Containers = []corev1.Container{{Name: "app"}}
		pod.Status.ContainerStatuses = []corev1.ContainerStatus{{Name: "app", State: corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{}}}}
	}
	lost := func(node *corev1.Node) {
		node.Spec.Taints = []corev1.Taint{{Key: corev1.TaintNodeOutOfService, Effect: corev1.TaintEffectNoExecute}}
	}
	notKnown := annotated(HeldBecauseAnnotation, "")
	for name, c := range map[string]struct {
		agent agentFunc
		pod   *corev1.Pod
		node  *corev1.Node
		// What becomes of it: gone or held.
		want string
		// because starts the annotation of a pod that is held; event, that of one that is freed.
		because, event string
		again          time.Duration
	}{
		"released":  {finds(), heldOnNodeA(), nodeA(), "gone", "", "nothing of it is left on node node-a", 0},
		"bound":     {finds(alive), heldOnNodeA(), nodeA(), "held", "pod shop/web-0 is still alive on node node-a: ", "", holdRetry},
		"no answer": {noAnswer, heldOnNodeA(notKnown), nodeA(), "held", "cannot tell whether pod shop/web-0 is still alive on node node-a: the agent of node node-a does not run", "", holdRetry},
		// An agent that is restarted must not take away what it has found.
		"no answer, something found before": {noAnswer, heldOnNodeA(annotated(HeldBecauseAnnotation, "pod shop/web-0 is still alive on node node-a: a process")), nodeA(), "held", "pod shop/web-0 is still alive on node node-a: a process", "", holdRetry},
		"nothing found any more, but not looked everywhere": {
			func(context.Context, string, sandbox.Query) (sandbox.Report, error) { return failedProbe(), nil },
			heldOnNodeA(annotated(HeldBecauseAnnotation, "pod shop/web-0 is still alive on node node-a: a process")), nodeA(), "held", "cannot tell whether pod shop/web-0 is still alive on node node-a: ", "", holdRetry,
		},
		"bound, not known before": {finds(alive), heldOnNodeA(annotated(HeldBecauseAnnotation, cannotTell+"shop/web-0")), nodeA(), "held", "pod shop/web-0 is still alive on node node-a: sandbox", "", holdRetry},
		// Its sandbox may be stuck: what the kubelet says of the containers does not give up a pod that was bound.
		"no answer, and finished": {noAnswer, heldOnNodeA(terminated, phase(corev1.PodFailed), notKnown), nodeA(), "held", "cannot tell whether", "", holdRetry},
		"the node is gone":        {neverAsked, heldOnNodeA(), nil, "gone", "", "node node-a is gone", 0},
		"the node is lost":        {noAnswer, heldOnNodeA(), nodeA(lost), "gone", "", "node node-a is out of service", 0},
		// Somebody who vouches for a node does not know better than the node itself.
		"bound, the node called lost": {finds(alive), heldOnNodeA(), nodeA(lost), "held", "pod shop/web-0 is still alive on node node-a: ", "", holdRetry},
		"not deleted":                 {neverAsked, heldOnNodeA(unmarked("2026-11-24T02:59:30Z")), nodeA(), "held", "pod shop/web-0 is still alive.", "", unmarkedFor},
		// The clock of the replica that has held it is behind, or somebody has written the annotation.
		"not deleted, held for long, it says": {neverAsked, heldOnNodeA(unmarked("2026-11-24T02:00:00Z")), nodeA(), "held", "pod shop/web-0 is still alive.", "", unmarkedFor},
		"not deleted, no time":                {neverAsked, heldOnNodeA(unmarked("yesterday")), nodeA(), "held", "pod shop/web-0 is still alive.", "", unmarkedFor},
	} {
		t.Run(name, func(t *testing.T) {
			objects := []client.Object{c.pod}
			if c.node != nil {
				objects = append(objects, c.node)
			}
			h := newHoldTest(c.agent, nil, objects...)
			result, err := h.reconcile(t, c.pod)
			if err != nil || result.RequeueAfter != c.again {
				t.Errorf("again after %s (%v), want %s", result.RequeueAfter, err, c.again)
			}
			now := h.now(t, c.pod)
			switch got := state(now); {
			case got != c.want:
				t.Errorf("the pod is %s, want %s", got, c.want)
			case got == "held" && !strings.HasPrefix(now.Annotations[HeldBecauseAnnotation], c.because):
				t.Errorf("held because %q", now.Annotations[HeldBecauseAnnotation])
			}
			h.expectEvent(t, c.event)
			// A kubelet takes the addresses out of the status of a pod that has ended; those it had when it was held count.
			for _, query := range h.asked {
				if len(query.IPs) != 1 || query.IPs[0].String() != "10.0.0.7" {
					t.Errorf("asked about addresses %v", query.IPs)
				}
			}
		})
	}
}

// A pod that nobody deletes after all is given back without a trace of the guard, but not before the controller itself has seen it for
// long enough: a forced eviction relies on the finalizer, and another one of the same pod begins anew.
func TestAPodThatNobodyDeletesIsGivenBack(t *testing.T) {
	pod := heldOnNodeA(unmarked("2026-11-24T02:00:00Z"))
	h := newHoldTest(neverAsked, nil, pod, nodeA())
	now := testTime
	h.Guard.now = func() time.Time { return now }
	pass := func(d time.Duration, want string) {
		t.Helper()
		now = now.Add(d)
		if _, err := h.reconcile(t, pod); err != nil {
			t.Fatal(err)
		}
		if got := state(h.now(t, pod)); got != want {
			t.Errorf("it is %s, want %s", got, want)
		}
	}
	write := func(change func(*corev1.Pod)) {
		t.Helper()
		stored := h.now(t, pod)
		change(stored)
		if err := h.api.Update(t.Context(), stored); err != nil {
			t.Fatal(err)
		}
	}
	pass(0, "held")
	pass(unmarkedFor-time.Second, "held")
	write(annotated(HeldSinceAnnotation, "2026-11-24T03:01:59Z"))
	pass(time.Second, "held")
	pass(unmarkedFor-time.Second, "held")
	pass(time.Second, "free")
	if free := h.now(t, pod); free.Labels[HeldLabel] != "" || len(free.Annotations) != 1 || free.DeletionTimestamp != nil {
		t.Errorf("labels %v, annotations %v, deletion %v", free.Labels, free.Annotations, free.DeletionTimestamp)
	}
	// One that was given back, and is held once more with the same words.
	write(keptBy(Finalizer))
	write(func(p *corev1.Pod) {
		p.Labels = map[string]string{HeldLabel: "true"}
		annotated(HeldSinceAnnotation, "2026-11-24T03:01:59Z")(p)
	})
	pass(0, "held")
}

func state(pod *corev1.Pod) string {
	switch {
	case pod == nil:
		return "gone"
	case held(pod):
		return "held"
	default:
		return "free"
	}
}

// expectEvent fails the test unless there is an Event HoldReleased with these words; none, if there are no words.
func (h *holdTest) expectEvent(t *testing.T, words string) {
	t.Helper()
	select {
	case event := <-h.events.Events:
		if words == "" || !strings.Contains(event, "HoldReleased") || !strings.Contains(event, words) {
			t.Errorf("Event %q, want %q", event, words)
		}
	default:
		if words != "" {
			t.Error("there is no Event")
		}
	}
}

// What is known already is not written again, hundreds of times an hour.
func TestReconcileWritesOnlyNews(t *testing.T) {
	writes := 0
	pod := heldOnNodeA(annotated(HeldBecauseAnnotation, ""))
	h := newHoldTest(noAnswer, func(c client.WithWatch, object client.Object, patch client.Patch) error {
		writes++
		return c.Patch(t.Context(), object, patch)
	}, pod, nodeA())
	for range 3 {
		if _, err := h.reconcile(t, pod); err != nil {
			t.Fatal(err)
		}
	}
	if writes != 1 {
		t.Errorf("%d writes", writes)
	}
}

// Nothing is given up on: an error is tried again with a growing pause, a pod that has changed since it was read at once.
func TestReconcileWhenFreeingFails(t *testing.T) {
	conflict := apierrors.NewConflict(schema.GroupResource{Resource: "pods"}, "web-0", errors.New("changed"))
	for name, c := range map[string]struct {
		failure error
		pod     *corev1.Pod
		agent   agentFunc
		fails   bool
		again   time.Duration
	}{
		"another pod's UID":     {conflict, heldOnNodeA(), finds(), true, 0},
		"conflict, not deleted": {conflict, heldOnNodeA(unmarked("")), neverAsked, false, conflictRetry},
		"refused":               {errors.New("no"), heldOnNodeA(), finds(), true, 0},
		"refused, not deleted":  {errors.New("no"), heldOnNodeA(unmarked("")), neverAsked, true, 0},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHoldTest(c.agent, func(client.WithWatch, client.Object, client.Patch) error { return c.failure }, c.pod, nodeA())
			if c.pod.DeletionTimestamp == nil {
				if _, err := h.reconcile(t, c.pod); err != nil {
					t.Fatal(err)
				}
				h.Guard.now = func() time.Time { return testTime.Add(unmarkedFor) }
			}
			if result, err := h.reconcile(t, c.pod); (err != nil) != c.fails || result.RequeueAfter != c.again {
				t.Errorf("error %v, again after %s", err, result.RequeueAfter)
			}
			if got := state(h.now(t, c.pod)); got != "held" {
				t.Errorf("the pod is %s", got)
			}
			h.expectEvent(t, "")
		})
	}
}

// While the agent is waited for, the kubelet goes on writing the status of the pod.
func TestAPodThatChangesMeanwhileIsFreed(t *testing.T) {
	pod := heldOnNodeA()
	var h *holdTest
	h = newHoldTest(func(context.Context, string, sandbox.Query) (sandbox.Report, error) {
		changed := h.now(t, pod)
		changed.Status.Message = "containers have ended"
		if err := h.api.Update(t.Context(), changed); err != nil {
			t.Error(err)
		}
		return allProbes(), nil
	}, nil, pod, nodeA())
	if _, err := h.reconcile(t, pod); err != nil {
		t.Fatal(err)
	}
	if got := state(h.now(t, pod)); got != "gone" {
		t.Errorf("the pod is %s", got)
	}
}

// What the controller is woken by, and what not: its own words above all.
func TestChangesTheHold(t *testing.T) {
	for name, test := range map[string]struct {
		change func(*corev1.Pod)
		want   bool
	}{
		"marked":         {terminating(new(int64(0))), true},
		"freed":          {func(p *corev1.Pod) { p.Finalizers = nil }, true},
		"held again":     {annotated(HeldSinceAnnotation, "2026-11-24T03:07:00Z"), true},
		"explained":      {annotated(HeldBecauseAnnotation, "something else"), false},
		"another status": {phase(corev1.PodFailed), false},
	} {
		before := runningPod(keptBy(Finalizer), annotated(HeldSinceAnnotation, "2026-11-24T03:00:00Z"))
		after := before.DeepCopy()
		test.change(after)
		if got := changesTheHold.Update(event.UpdateEvent{ObjectOld: before, ObjectNew: after}); got != test.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}

// A pod that nobody deletes is freed in the state in which it was read, or not at all.
func TestFreeingIsBoundToWhatWasJudged(t *testing.T) {
	pod := heldOnNodeA()
	h := newHoldTest(finds(), nil, pod, nodeA())
	read := h.now(t, pod)
	read.ResourceVersion = "1"
	if err := h.holds.free(t.Context(), read); !apierrors.IsConflict(err) {
		t.Errorf("error %v", err)
	}
	if got := state(h.now(t, pod)); got != "held" {
		t.Errorf("the pod is %s", got)
	}
}

func TestReconcileAPodThatHasLeftTheCache(t *testing.T) {
	unlabelled := func(pod *corev1.Pod) { delete(pod.Labels, HeldLabel) }
	t.Run("it is gone", func(t *testing.T) {
		h := newHoldTest(neverAsked, nil)
		if result, err := h.reconcile(t, heldOnNodeA()); err != nil || !result.IsZero() {
			t.Errorf("%v, %v", result, err)
		}
	})
	t.Run("it is free", func(t *testing.T) {
		pod := heldOnNodeA(unlabelled, unmarked(""), func(pod *corev1.Pod) { pod.Finalizers = nil })
		h := newHoldTest(neverAsked, nil, pod)
		if _, err := h.reconcile(t, pod); err != nil || h.now(t, pod).Labels[HeldLabel] != "" {
			t.Errorf("labels %v (%v)", h.now(t, pod).Labels, err)
		}
	})
	t.Run("it has lost its label", func(t *testing.T) {
		pod := heldOnNodeA(unlabelled)
		h := newHoldTest(neverAsked, nil, pod)
		if _, err := h.reconcile(t, pod); err != nil {
			t.Fatal(err)
		}
		if now := h.now(t, pod); now.Labels[HeldLabel] != "true" || !held(now) {
			t.Errorf("labels %v, finalizers %v", now.Labels, now.Finalizers)
		}
	})
}

// A replica that starts to lead has not seen what happened before.
func TestFindUnlabelled(t *testing.T) {
	lost := heldOnNodeA(func(pod *corev1.Pod) { delete(pod.Labels, HeldLabel) })
	other := heldPod("other")
	other.Finalizers, other.Labels = []string{"example.com/other"}, nil
	h := newHoldTest(neverAsked, nil, lost, heldPod("labelled"), other)
	if err := h.findUnlabelled(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := h.now(t, lost).Labels[HeldLabel]; got != "true" {
		t.Errorf("the label is %q", got)
	}
	if now := h.now(t, other); len(now.Labels) > 0 || !slices.Equal(now.Finalizers, []string{"example.com/other"}) {
		t.Errorf("another pod has changed: %v", now.ObjectMeta)
	}
}

// What cannot be read at first is read later: nobody else would find these pods.
func TestFindUnlabelledTriesAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		lost := heldOnNodeA(func(pod *corev1.Pod) { delete(pod.Labels, HeldLabel) })
		h := newHoldTest(neverAsked, nil, lost)
		failures := 1
		h.live = interceptor.NewClient(h.live.(client.WithWatch), interceptor.Funcs{
			List: func(ctx context.Context, c client.WithWatch, list client.ObjectList, options ...client.ListOption) error {
				if failures > 0 {
					failures--
					return errors.New("etcd is away")
				}
				return c.List(ctx, list, options...)
			},
		})
		if err := h.findUnlabelled(t.Context()); err != nil {
			t.Fatal(err)
		}
		if got := h.now(t, lost).Labels[HeldLabel]; got != "true" {
			t.Errorf("the label is %q", got)
		}
	})
}

// The cache lags behind: a pod that has been freed may be met there again. It was freed once, and is told of once.
func TestAPodThatHasBeenFreedIsNotToldOfAgain(t *testing.T) {
	pod := heldOnNodeA()
	h := newHoldTest(finds(), nil, pod, nodeA())
	stale := h.now(t, pod)
	for range 2 {
		if err := h.release(t.Context(), stale, decision{reason: ReasonReleased}); err != nil {
			t.Fatal(err)
		}
	}
	h.expectEvent(t, "nothing of it is left on node node-a")
	h.expectEvent(t, "")
}
