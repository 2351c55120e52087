package webhook

import (
	"context"
	"encoding/json"
	"errors"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-logr/logr"
	"github.com/go-logr/logr/funcr"
	"github.com/prometheus/client_golang/prometheus/testutil"
	admissionv1 "k8s.io/api/admission/v1"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/events"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"

	"github.com/eni-guard/eni-guard/internal/sandbox"
)

// shop is the namespace of the pods of these tests, with a mode.
func shop(mode string) *corev1.Namespace {
	namespace := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "shop"}}
	if mode != "" {
		namespace.Labels = map[string]string{ModeLabel: mode}
	}
	return namespace
}

// counting is an agent that counts how often it is asked.
func counting(asked *atomic.Int32, findings ...sandbox.Finding) agentFunc {
	return func(context.Context, string, sandbox.Query) (sandbox.Report, error) {
		asked.Add(1)
		return allProbes(findings...), nil
	}
}

// reviewed is what one call leads to.
func reviewed(t *testing.T, guard *Guard, lines *[]string, request *admissionv1.AdmissionRequest) *admissionv1.AdmissionResponse {
	t.Helper()
	log := logr.Discard()
	if lines != nil {
		log = funcr.New(func(_, args string) { *lines = append(*lines, args) }, funcr.Options{})
	}
	response, err := guard.review(t.Context(), log, request)
	if err != nil {
		t.Fatal(err)
	}
	return response
}

func emitted(guard *Guard) int { return len(guard.events.(*events.FakeRecorder).Events) }

func changed(version string) func(*corev1.Pod) {
	return func(pod *corev1.Pod) { pod.ResourceVersion = version }
}

// A forced delete of a released pod as the API server runs it: mark, mark again because the object has changed in
// between, remove. One question, one decision, one line, one Event, the same annotations; and the last call agrees with the
// first even if the agent has fallen silent by then.
func TestTheCallsOfOneRemovalAreOneDecision(t *testing.T) {
	var asked atomic.Int32
	answer := allProbes()
	guard := newGuard(func(context.Context, string, sandbox.Query) (sandbox.Report, error) {
		if asked.Add(1) > 1 {
			return sandbox.Report{}, errors.New("did not answer")
		}
		return answer, nil
	}, nodeA(), shop(""))
	var lines []string
	var annotations []string
	for _, pod := range []*corev1.Pod{
		runningPod(changed("1")), runningPod(changed("2")), runningPod(changed("3"), terminating(new(int64(0)))),
	} {
		response := reviewed(t, guard, &lines, deleteRequest(t, pod, new(int64(0))))
		if !response.Allowed {
			t.Fatalf("refused at version %s", pod.ResourceVersion)
		}
		text, err := json.Marshal(response.AuditAnnotations)
		if err != nil {
			t.Fatal(err)
		}
		annotations = append(annotations, string(text))
	}
	if asked.Load() != 1 || len(lines) != 1 || emitted(guard) != 1 || len(slices.Compact(annotations)) != 1 {
		t.Errorf("%d questions, %d lines, %d Events, annotations %v", asked.Load(), len(lines), emitted(guard), annotations)
	}
	if n := testutil.ToFloat64(guard.decisions.WithLabelValues("deny", "allowed", "released", "delete")); n != 1 {
		t.Errorf("counted %v times", n)
	}
}

// Whoever reaches the webhook's port can send a review of his own about a pod, in the moment before he removes it. What he has invented
// in it, so that the pod may go, does not count for the removal.
func TestAnInventedReviewDoesNotCountForTheRealOne(t *testing.T) {
	for name, invent := range map[string]func(*admissionv1.AdmissionRequest, *corev1.Pod){
		"another node":       func(_ *admissionv1.AdmissionRequest, p *corev1.Pod) { p.Spec.NodeName = "node-b" },
		"other addresses":    func(_ *admissionv1.AdmissionRequest, p *corev1.Pod) { p.Status.PodIPs, p.Status.PodIP = nil, "" },
		"the host's network": func(_ *admissionv1.AdmissionRequest, p *corev1.Pod) { p.Spec.HostNetwork = true },
		"a mirror pod": func(_ *admissionv1.AdmissionRequest, p *corev1.Pod) {
			metav1.SetMetaDataAnnotation(&p.ObjectMeta, corev1.MirrorPodAnnotationKey, "x")
		},
		"a pod that Terway has always ignored": func(_ *admissionv1.AdmissionRequest, p *corev1.Pod) {
			metav1.SetMetaDataLabel(&p.ObjectMeta, IgnoreLabel, "true")
			p.CreationTimestamp = metav1.NewTime(testTime)
			p.ManagedFields = []metav1.ManagedFieldsEntry{{
				Time: &p.CreationTimestamp, FieldsV1: metav1.NewFieldsV1(`{"f:metadata":{"f:labels":{"f:` + IgnoreLabel + `":{}}}}`),
			}}
		},
		"groups that may override": func(r *admissionv1.AdmissionRequest, _ *corev1.Pod) { r.UserInfo.Groups = []string{"system:masters"} },
		"another namespace":        func(_ *admissionv1.AdmissionRequest, p *corev1.Pod) { p.Namespace = "audited" },
	} {
		t.Run(name, func(t *testing.T) {
			guard := newGuard(func(_ context.Context, _ string, q sandbox.Query) (sandbox.Report, error) {
				if q.Node == "node-b" || len(q.IPs) == 0 {
					return allProbes(), nil
				}
				return allProbes(stuck()...), nil
			}, nodeA(), nodeA(func(n *corev1.Node) { n.Name = "node-b" }), shop(""),
				&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "audited", Labels: map[string]string{ModeLabel: "audit"}}})
			guard.access = accessFunc(func(user authenticationv1.UserInfo, _ *corev1.Pod) (bool, error) {
				return slices.Contains(user.Groups, "system:masters"), nil
			})
			real := func() *corev1.Pod { return runningPod(annotated(OverrideAnnotation, "why")) }
			pod := real()
			request := deleteRequest(t, pod, new(int64(0)))
			invent(request, pod)
			request.OldObject = deleteRequest(t, pod, nil).OldObject
			if response := reviewed(t, guard, nil, request); !response.Allowed {
				t.Fatalf("the invented one is refused, so this proves nothing: %+v", response.Result)
			}
			if response := reviewed(t, guard, nil, deleteRequest(t, real(), new(int64(0)))); response.Allowed {
				t.Errorf("the real one is let through: %v", response.AuditAnnotations)
			}
		})
	}
}

// The same about a pod whose node does not answer: that its containers have ended is for its kubelet to say.
func TestInventedContainersDoNotCountForTheRealPod(t *testing.T) {
	guard := newGuard(func(context.Context, string, sandbox.Query) (sandbox.Report, error) {
		return sandbox.Report{}, errors.New("did not answer")
	}, nodeA(), shop(""))
	failed := func(p *corev1.Pod) { p.Status.Phase = corev1.PodFailed }
	ended := runningPod(failed, func(p *corev1.Pod) {
		p.Status.ContainerStatuses = []corev1.ContainerStatus{{Name: "app", State: corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{}}}}
	})
	if response := reviewed(t, guard, nil, deleteRequest(t, ended, new(int64(0)))); !response.Allowed {
		t.Fatalf("the invented one is refused, so this proves nothing: %+v", response.Result)
	}
	// The same pod, marked by the API server, goes on.
	terminating(new(int64(0)))(ended)
	if response := reviewed(t, guard, nil, deleteRequest(t, ended, new(int64(0)))); !response.Allowed {
		t.Errorf("the second call of the same removal is refused: %+v", response.Result)
	}
	if response := reviewed(t, guard, nil, deleteRequest(t, runningPod(failed), new(int64(0)))); response.Allowed {
		t.Errorf("the real one is let through: %v", response.AuditAnnotations)
	}
	// What is true of the containers is not all that counts.
	for name, change := range map[string]func(*corev1.Pod){"is being deleted": terminating(new(int64(30))), "is held": keptBy(Finalizer)} {
		real := ended.DeepCopy()
		real.DeletionTimestamp, real.DeletionGracePeriodSeconds = nil, nil
		if response := reviewed(t, guard, nil, deleteRequest(t, real, new(int64(0)))); !response.Allowed {
			t.Fatalf("the invented one is refused, so this proves nothing: %+v", response.Result)
		}
		change(real)
		if response := reviewed(t, guard, nil, deleteRequest(t, real, new(int64(0)))); response.Allowed {
			t.Errorf("the real one, which %s, is let through: %v", name, response.AuditAnnotations)
		}
	}
}

// What looks like a repetition, and is a removal of its own.
func TestOtherRemovalsAreJudgedAnew(t *testing.T) {
	first := func(t *testing.T) *admissionv1.AdmissionRequest {
		return deleteRequest(t, runningPod(changed("1")), new(int64(0)))
	}
	for _, test := range []struct {
		name   string
		second func(*admissionv1.AdmissionRequest)
		pod    *corev1.Pod
		later  time.Duration
		want   int32
	}{
		{"the same removal goes on", nil, runningPod(changed("2"), terminating(new(int64(0)))), 0, 1},
		{"somebody else", func(r *admissionv1.AdmissionRequest) { r.UserInfo.Username = "bob" }, runningPod(changed("2")), 0, 2},
		{"another pod of the same name", nil, runningPod(changed("2"), func(p *corev1.Pod) { p.UID = "other" }), 0, 2},
		{"the same removal goes on, and the API server has not seen its own mark yet", nil, runningPod(changed("1")), 0, 1},
		{"by another way in", func(r *admissionv1.AdmissionRequest) { r.Name = "" }, runningPod(changed("2")), 0, 2},
		{"in earnest, after a dry run", func(r *admissionv1.AdmissionRequest) { r.DryRun = new(true) }, runningPod(changed("2")), 0, 2},
		{"much later", nil, runningPod(changed("2"), terminating(new(int64(0)))), repeatWindow, 2},
	} {
		t.Run(test.name, func(t *testing.T) {
			var asked atomic.Int32
			guard := newGuard(counting(&asked), nodeA(), shop(""))
			now := testTime
			guard.now = func() time.Time { return now }
			reviewed(t, guard, nil, first(t))
			now = now.Add(test.later)
			request := deleteRequest(t, test.pod, new(int64(0)))
			if test.second != nil {
				test.second(request)
			}
			reviewed(t, guard, nil, request)
			if asked.Load() != test.want {
				t.Errorf("the agent was asked %d times, want %d", asked.Load(), test.want)
			}
		})
	}
}

// A request that is no removal is let through, and must not open the door to one that is.
func TestAGracefulDeleteDoesNotAllowAForcedOne(t *testing.T) {
	guard := newGuard(finds(stuck()...), nodeA(), shop(""))
	if response := reviewed(t, guard, nil, deleteRequest(t, runningPod(changed("1")), new(int64(30)))); !response.Allowed {
		t.Error("a graceful delete was refused")
	}
	if response := reviewed(t, guard, nil, deleteRequest(t, runningPod(changed("2"), terminating(new(int64(30)))), new(int64(0)))); response.Allowed {
		t.Error("a forced delete was let through after a graceful one")
	}
}

func TestWhoTriesAgainIsNotRefusedForThePast(t *testing.T) {
	findings := stuck()
	guard := newGuard(func(context.Context, string, sandbox.Query) (sandbox.Report, error) {
		return allProbes(findings...), nil
	}, nodeA(), shop(""))
	if reviewed(t, guard, nil, deleteRequest(t, runningPod(changed("1")), new(int64(0)))).Allowed {
		t.Error("let through while bound")
	}
	findings = nil
	if !reviewed(t, guard, nil, deleteRequest(t, runningPod(changed("1")), new(int64(0)))).Allowed {
		t.Error("refused after the release")
	}
}

func TestDecisionsAreForgotten(t *testing.T) {
	var recent recentDecisions
	now := testTime
	for i := range 1000 {
		pod := runningPod(func(p *corev1.Pod) { p.UID = types.UID(strconv.Itoa(i)) })
		recent.put(&removal{path: PathDelete, pod: pod}, decision{outcome: Allowed}, now)
		now = now.Add(time.Second)
	}
	if n := len(recent.entries); n > 5 {
		t.Errorf("%d decisions are kept after %s", n, now.Sub(testTime))
	}
}

func TestModes(t *testing.T) {
	for _, test := range []struct {
		label, standard string
		want            Mode
	}{
		{"", "deny", ModeDeny}, {"", "audit", ModeAudit}, {"hold", "deny", ModeHold}, {"audit", "deny", ModeAudit}, {"off", "deny", ModeOff},
		{"deny", "off", ModeDeny}, {"denny", "deny", ModeDeny}, {"OFF", "hold", ModeHold}, {"x", "off", ModeOff},
	} {
		guard := newGuard(nil, shop(test.label))
		guard.policy.mode = Mode(test.standard)
		if got := guard.mode(t.Context(), "shop"); got != test.want {
			t.Errorf("label %q, default %q: got %q, want %q", test.label, test.standard, got, test.want)
		}
	}
	if got := newGuard(nil).mode(t.Context(), "unknown"); got != ModeDeny {
		t.Errorf("a namespace that is not known has mode %q", got)
	}
}

// A cache that lags must not let through what the namespace does not allow any more.
func TestOnlyTheLiveNamespaceWeakens(t *testing.T) {
	guard := newGuard(nil)
	for _, mode := range []string{"audit", "off"} {
		guard.cached, guard.live = newGuard(nil, shop(mode)).live, newGuard(nil, shop("deny")).live
		if got := guard.mode(t.Context(), "shop"); got != ModeDeny {
			t.Errorf("cached %s, deny in truth: got %s", mode, got)
		}
		guard.live = failingReader{}
		for _, standard := range []Mode{ModeDeny, ModeHold, ModeAudit, ModeOff} {
			guard.policy.mode = standard
			if got := guard.mode(t.Context(), "shop"); got != ModeDeny {
				t.Errorf("cached %s, default %s, the API server does not answer: got %s", mode, standard, got)
			}
		}
	}
}

func TestExcludedNodes(t *testing.T) {
	var asked atomic.Int32
	virtual := nodeA(func(n *corev1.Node) { n.Labels = map[string]string{"type": "virtual-kubelet"} })
	for name, test := range map[string]struct {
		node *corev1.Node
		want Reason
	}{"virtual": {virtual, ReasonExcludedNode}, "real": {nodeA(), ReasonReleased}} {
		guard := newGuard(counting(&asked), test.node, shop(""))
		for _, text := range []string{"kubernetes.io/os=windows", "type=virtual-kubelet"} {
			selector, err := labels.Parse(text)
			if err != nil {
				t.Fatal(err)
			}
			guard.excludedNodes = append(guard.excludedNodes, selector)
		}
		if d := guard.judge(t.Context(), &removal{path: PathDelete, pod: runningPod(), grace: new(int64(0))}); d.reason != test.want {
			t.Errorf("%s: %s", name, d.reason)
		}
		// What the cache keeps of a node is enough to tell.
		kept, err := trimNodes(guard.excludedNodes)(test.node)
		if err != nil {
			t.Fatal(err)
		}
		guard.cached = newGuard(nil, kept.(*corev1.Node)).live
		if guard.excluded(t.Context(), "node-a") != (name == "virtual") {
			t.Errorf("%s: its trimmed labels are %v", name, kept.(*corev1.Node).Labels)
		}
	}
}

// A cache that lags must not let go the pods of a node that has lost the label since.
func TestOnlyTheLiveNodeIsExcluded(t *testing.T) {
	guard := newGuard(nil)
	guard.excludedNodes = []labels.Selector{labels.SelectorFromSet(labels.Set{"type": "virtual-kubelet"})}
	guard.cached = newGuard(nil, nodeA(func(n *corev1.Node) { n.Labels = map[string]string{"type": "virtual-kubelet"} })).live
	for name, live := range map[string]client.Reader{"no longer": newGuard(nil, nodeA()).live, "the API server does not answer": failingReader{}} {
		guard.live = live
		if guard.excluded(t.Context(), "node-a") {
			t.Errorf("%s: excluded", name)
		}
	}
}

func TestANodeThatIsGoneAllowsOnlyWhereThatIsWanted(t *testing.T) {
	guard := newGuard(nil)
	guard.allowWhenNodeIsGone = false
	if d := guard.judge(t.Context(), &removal{path: PathDelete, pod: runningPod(), grace: new(int64(0))}); d.outcome != Denied || d.reason != ReasonNoAnswer {
		t.Errorf("got %s, %s", d.outcome, d.reason)
	}
}

// evictionRequest is what the API server sends for CREATE of pods/eviction.
func evictionRequest(t testing.TB, pod *corev1.Pod, options *metav1.DeleteOptions) *admissionv1.AdmissionRequest {
	t.Helper()
	request := deleteRequest(t, pod, nil)
	request.Operation, request.SubResource = admissionv1.Create, "eviction"
	request.OldObject, request.Options = runtime.RawExtension{}, runtime.RawExtension{}
	object, err := json.Marshal(policyv1.Eviction{ObjectMeta: metav1.ObjectMeta{Namespace: pod.Namespace, Name: pod.Name}, DeleteOptions: options})
	if err != nil {
		t.Fatal(err)
	}
	request.Object.Raw = object
	return request
}

func TestEvictions(t *testing.T) {
	zero := &metav1.DeleteOptions{GracePeriodSeconds: new(int64(0))}
	for _, test := range []struct {
		name     string
		stored   *corev1.Pod // nil: there is none
		options  *metav1.DeleteOptions
		decision string
		reason   Reason
		code     int32
	}{
		{"graceful", runningPod(), nil, "exempt", ReasonNotForced, 0},
		{"graceful, with a period", runningPod(), &metav1.DeleteOptions{GracePeriodSeconds: new(int64(5))}, "exempt", ReasonNotForced, 0},
		{"forced", runningPod(), zero, "denied", ReasonBound, 409},
		{"forced, terminating", runningPod(terminating(new(int64(30)))), zero, "denied", ReasonBound, 429},
		{"of a pod without grace period", runningPod(ownGrace(new(int64(0)))), nil, "denied", ReasonBound, 409},
		{"of a pod that has ended", runningPod(phase(corev1.PodFailed)), nil, "denied", ReasonBound, 409},
		{"of a pod that is not there", nil, zero, "denied", ReasonNoSuchPod, 404},
		{"graceful, of a pod that is not there", nil, nil, "denied", ReasonNoSuchPod, 404},
	} {
		t.Run(test.name, func(t *testing.T) {
			objects := []client.Object{nodeA(), shop("")}
			if test.stored != nil {
				// The fake API server takes no object that is being deleted without a finalizer.
				if test.stored.DeletionTimestamp != nil {
					test.stored.Finalizers = []string{"example.com/keep"}
				}
				objects = append(objects, test.stored)
			}
			response := reviewed(t, newGuard(finds(stuck()...), objects...), nil, evictionRequest(t, runningPod(), test.options))
			a := response.AuditAnnotations
			if a["decision"] != test.decision || a["reason"] != string(test.reason) || a["path"] != "eviction" || response.Allowed != (test.code == 0) {
				t.Errorf("allowed %v, %v", response.Allowed, a)
			}
			if test.code != 0 && (response.Result.Code != test.code || response.Result.Details.RetryAfterSeconds != 0) {
				t.Errorf("code %d, again after %d s", response.Result.Code, response.Result.Details.RetryAfterSeconds)
			}
		})
	}
	guard := newGuard(finds(), nodeA())
	guard.live = failingReader{}
	response := reviewed(t, guard, nil, evictionRequest(t, runningPod(), zero))
	if response.Allowed || !strings.Contains(response.Result.Message, "the pod could not be read from the API server: connection refused") {
		t.Errorf("a forced eviction of a pod that could not be read: %+v", response)
	}
	if response := reviewed(t, guard, nil, evictionRequest(t, runningPod(), nil)); !response.Allowed || response.AuditAnnotations["reason"] != "PodUnreadable" {
		t.Errorf("a graceful eviction of a pod that could not be read: %+v", response)
	}
}

// holding returns a guard in mode hold that has the pod, and what it stores.
func holding(t *testing.T, pod *corev1.Pod, findings ...sandbox.Finding) (*Guard, func() *corev1.Pod) {
	t.Helper()
	guard := newGuard(finds(findings...), nodeA(), shop("hold"), pod)
	return guard, func() *corev1.Pod {
		stored := &corev1.Pod{}
		if err := guard.live.Get(t.Context(), client.ObjectKeyFromObject(pod), stored); err != nil {
			t.Fatal(err)
		}
		return stored
	}
}

func TestHold(t *testing.T) {
	pod := runningPod(func(p *corev1.Pod) { p.Finalizers = []string{"example.com/other"} })
	guard, stored := holding(t, pod, stuck()...)
	response := reviewed(t, guard, nil, deleteRequest(t, pod, new(int64(0))))
	if !response.Allowed || response.AuditAnnotations["decision"] != "held" || len(response.Warnings) != 1 {
		t.Errorf("got %+v", response)
	}
	now := stored()
	if !slices.Equal(now.Finalizers, []string{Finalizer, "example.com/other"}) && !slices.Equal(now.Finalizers, []string{"example.com/other", Finalizer}) {
		t.Errorf("finalizers %v", now.Finalizers)
	}
	if now.Labels[HeldLabel] != "true" || now.Annotations[HeldSinceAnnotation] != "2026-11-24T03:00:00Z" ||
		now.Annotations[HeldAddressesAnnotation] != "10.1.2.3,fd00::3" || !strings.HasPrefix(now.Annotations[HeldBecauseAnnotation], "pod shop/web-0 is still alive on node node-a: process 4242") {
		t.Errorf("labels %v, annotations %v", now.Labels, now.Annotations)
	}
	// The API server asks again, about what it has read anew: nothing is written any more.
	if response = reviewed(t, guard, nil, deleteRequest(t, now, new(int64(0)))); !response.Allowed || stored().ResourceVersion != now.ResourceVersion {
		t.Errorf("the second call: allowed %v, version %s after %s", response.Allowed, stored().ResourceVersion, now.ResourceVersion)
	}
	if emitted(guard) != 1 {
		t.Errorf("%d Events", emitted(guard))
	}
}

// In between, somebody has taken the finalizer away: without it the removal would go through.
func TestAHeldPodThatLostItsFinalizerGetsItAgain(t *testing.T) {
	pod := runningPod()
	guard, stored := holding(t, pod, stuck()...)
	reviewed(t, guard, nil, deleteRequest(t, pod, new(int64(0))))
	if err := guard.holds.free(t.Context(), stored()); err != nil {
		t.Fatal(err)
	}
	if held(stored()) {
		t.Fatal("it was not taken away")
	}
	if response := reviewed(t, guard, nil, deleteRequest(t, stored(), new(int64(0)))); !response.Allowed || !held(stored()) {
		t.Errorf("allowed %v, held %v", response.Allowed, held(stored()))
	}
}

// A pod that was held for a request that has failed is about to be given back. An eviction reads it only later, and must
// not find it without the finalizer; a delete that finds it so is asked about once more.
func TestAnEvictionHoldsAgain(t *testing.T) {
	const before = "2026-11-24T02:00:00Z"
	for path, since := range map[Path]string{PathEviction: "2026-11-24T03:00:00Z", PathDelete: before} {
		pod := runningPod(keptBy(Finalizer), annotated(HeldSinceAnnotation, before), func(p *corev1.Pod) { p.Labels = map[string]string{HeldLabel: "true"} })
		guard, stored := holding(t, pod, stuck()...)
		request := deleteRequest(t, pod, new(int64(0)))
		if path == PathEviction {
			request = evictionRequest(t, pod, &metav1.DeleteOptions{GracePeriodSeconds: new(int64(0))})
		}
		if response := reviewed(t, guard, nil, request); response.AuditAnnotations["decision"] != "held" {
			t.Errorf("%s: %v", path, response.AuditAnnotations)
		}
		if got := stored().Annotations[HeldSinceAnnotation]; got != since {
			t.Errorf("%s: held since %s, want %s", path, got, since)
		}
	}
}

func TestHoldLeavesNoTraceInADryRun(t *testing.T) {
	for name, request := range map[string]func(*corev1.Pod) *admissionv1.AdmissionRequest{
		"delete": func(pod *corev1.Pod) *admissionv1.AdmissionRequest {
			r := deleteRequest(t, pod, new(int64(0)))
			r.DryRun = new(true)
			return r
		},
		"eviction, asked for in its own options": func(pod *corev1.Pod) *admissionv1.AdmissionRequest {
			return evictionRequest(t, pod, &metav1.DeleteOptions{GracePeriodSeconds: new(int64(0)), DryRun: []string{metav1.DryRunAll}})
		},
	} {
		guard, stored := holding(t, runningPod(), stuck()...)
		before := stored().ResourceVersion
		response := reviewed(t, guard, nil, request(stored()))
		if !response.Allowed || response.AuditAnnotations["decision"] != "held" || stored().ResourceVersion != before || emitted(guard) != 0 {
			t.Errorf("%s: %v, version %s after %s, %d Events", name, response.AuditAnnotations, stored().ResourceVersion, before, emitted(guard))
		}
		if n := testutil.CollectAndCount(guard.decisions); n != 0 {
			t.Errorf("%s: the metric has %d decisions", name, n)
		}
	}
}

func TestWhatCannotBeHeldIsRefused(t *testing.T) {
	t.Run("terminating", func(t *testing.T) {
		pod := runningPod(terminating(new(int64(30))), func(p *corev1.Pod) { p.Finalizers = []string{"example.com/other"} })
		guard, stored := holding(t, pod, stuck()...)
		if response := reviewed(t, guard, nil, deleteRequest(t, pod, new(int64(0)))); response.Allowed || held(stored()) {
			t.Errorf("allowed %v, held %v", response.Allowed, held(stored()))
		}
	})
	t.Run("terminating, but it has the finalizer", func(t *testing.T) {
		pod := runningPod(terminating(new(int64(30))), func(p *corev1.Pod) { p.Finalizers = []string{Finalizer} })
		guard, _ := holding(t, pod, stuck()...)
		if response := reviewed(t, guard, nil, deleteRequest(t, pod, new(int64(0)))); !response.Allowed || response.AuditAnnotations["decision"] != "held" {
			t.Errorf("got %+v", response)
		}
	})
	t.Run("the API server does not take the finalizer", func(t *testing.T) {
		guard, stored := holding(t, runningPod(), stuck()...)
		guard.holds.client = fake.NewClientBuilder().WithInterceptorFuncs(interceptor.Funcs{
			Patch: func(context.Context, client.WithWatch, client.Object, client.Patch, ...client.PatchOption) error {
				return errors.New("etcd is away")
			},
		}).Build()
		response := reviewed(t, guard, nil, deleteRequest(t, stored(), new(int64(0))))
		if response.Allowed || response.AuditAnnotations["reason"] != "HoldFailed" || !strings.Contains(response.Result.Message, "etcd is away") {
			t.Errorf("got %+v", response)
		}
	})
}

// An overridden pod goes, held or not; but not before the request that removes it has been answered, and not in a dry run.
func TestAnOverrideFreesAHeldPod(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		pod := runningPod(terminating(new(int64(0))), annotated(OverrideAnnotation, "node lost"), keptBy(Finalizer))
		guard, _ := holding(t, pod, stuck()...)
		guard.access = accessFunc(func(authenticationv1.UserInfo, *corev1.Pod) (bool, error) { return true, nil })
		for _, dryRun := range []bool{true, false} {
			request := deleteRequest(t, pod, new(int64(0)))
			request.DryRun = new(dryRun)
			response := reviewed(t, guard, nil, request)
			if a := response.AuditAnnotations; a["decision"] != "overridden" || a["override-reason"] != "node lost" {
				t.Fatalf("got %+v", response)
			}
			gone := func() bool {
				return apierrors.IsNotFound(guard.live.Get(t.Context(), client.ObjectKeyFromObject(pod), &corev1.Pod{}))
			}
			if gone() {
				t.Errorf("dry run %v: it is gone before the answer", dryRun)
			}
			<-time.After(freeDelay)
			synctest.Wait()
			if gone() == dryRun {
				t.Errorf("dry run %v: gone %v", dryRun, gone())
			}
		}
	})
}

// A review that says of a held pod what the API server does not is of somebody else, who frees nothing by it.
func TestAnInventedOverrideFreesNothing(t *testing.T) {
	for name, test := range map[string]struct{ real, invented func(*corev1.Pod) }{
		"an override": {annotated(), annotated(OverrideAnnotation, "invented")},
		"another end": {annotated(OverrideAnnotation, "why", OverrideUntilAnnotation, "2026-01-01T00:00:00Z"),
			annotated(OverrideAnnotation, "why", OverrideUntilAnnotation, "2099-01-01T00:00:00Z")},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				invented := runningPod(terminating(new(int64(0))), keptBy(Finalizer), test.invented)
				guard, stored := holding(t, runningPod(terminating(new(int64(0))), keptBy(Finalizer), test.real), stuck()...)
				guard.access = accessFunc(func(authenticationv1.UserInfo, *corev1.Pod) (bool, error) { return true, nil })
				if response := reviewed(t, guard, nil, deleteRequest(t, invented, new(int64(0)))); response.AuditAnnotations["decision"] != "overridden" {
					t.Fatalf("got %+v", response)
				}
				<-time.After(freeDelay)
				synctest.Wait()
				if !held(stored()) {
					t.Error("the pod is free")
				}
			})
		})
	}
}

// updateRequest is what the API server sends for UPDATE of pods or, with subresource, of a part.
func updateRequest(t testing.TB, before, after *corev1.Pod, subresource string) *admissionv1.AdmissionRequest {
	t.Helper()
	request := deleteRequest(t, before, nil)
	request.Operation, request.SubResource, request.Options = admissionv1.Update, subresource, runtime.RawExtension{}
	object, err := json.Marshal(after)
	if err != nil {
		t.Fatal(err)
	}
	request.Object.Raw = object
	return request
}

func ignoring(pod *corev1.Pod) { pod.Labels = map[string]string{IgnoreLabel: "true"} }
func keptBy(finalizers ...string) func(*corev1.Pod) {
	return func(pod *corev1.Pod) { pod.Finalizers = finalizers }
}

func TestUpdatesThatTakeTheAddressAway(t *testing.T) {
	marked := terminating(new(int64(0)))
	for _, test := range []struct {
		name          string
		before, after *corev1.Pod
		mode          string
		decision      string
		path          string
		agent         agentFunc // nil: it finds the pod
	}{
		{"the label that makes Terway let go", runningPod(), runningPod(ignoring), "deny", "denied", "ignore-label", nil},
		{"the label, in mode hold: no finalizer would help", runningPod(), runningPod(ignoring), "hold", "denied", "ignore-label", nil},
		{"the label, in mode audit", runningPod(), runningPod(ignoring), "audit", "audited", "ignore-label", nil},
		{"the label, on the host's network", runningPod(func(p *corev1.Pod) { p.Spec.HostNetwork = true }), runningPod(ignoring), "deny", "exempt", "ignore-label", nil},
		{"the finalizer of a marked pod", runningPod(marked, keptBy(Finalizer)), runningPod(marked), "hold", "denied", "finalizer", nil},
		{"the finalizer, and others are left", runningPod(marked, keptBy(Finalizer, "x/y")), runningPod(marked, keptBy("x/y")), "hold", "denied", "finalizer", nil},
		{"the finalizer of a pod that its kubelet finishes", runningPod(terminating(new(int64(30))), keptBy(Finalizer)), runningPod(terminating(new(int64(30)))), "hold", "exempt", "finalizer", nil},
		{"the finalizer of a pod that is not being deleted", runningPod(keptBy(Finalizer)), runningPod(), "hold", "exempt", "finalizer", nil},
		{"the label, of a released pod", runningPod(), runningPod(ignoring), "deny", "allowed", "ignore-label", finds()},
		// What its kubelet says of the containers of a finished pod is not enough to let go of an address.
		{"the label, of a finished pod, and no answer", ended(), ended(ignoring), "deny", "denied", "ignore-label", noAnswer},
		{"the finalizer of a released pod", ended(marked, keptBy(Finalizer)), ended(marked), "hold", "allowed", "finalizer", finds()},
		{"the finalizer of a finished pod, and no answer", ended(marked, keptBy(Finalizer)), ended(marked), "hold", "denied", "finalizer", noAnswer},
	} {
		t.Run(test.name, func(t *testing.T) {
			for _, subresource := range []string{"", "status"} {
				agent := test.agent
				if agent == nil {
					agent = finds(stuck()...)
				}
				guard := newGuard(agent, nodeA(), shop(test.mode))
				response := reviewed(t, guard, nil, updateRequest(t, test.before, test.after, subresource))
				a := response.AuditAnnotations
				if a["decision"] != test.decision || a["path"] != test.path || response.Allowed != (test.decision != "denied") {
					t.Errorf("allowed %v, %v", response.Allowed, a)
				}
			}
		})
	}
	if _, err := newGuard(nil).review(t.Context(), logr.Discard(), updateRequest(t, runningPod(), runningPod(), "")); err == nil || !strings.Contains(err.Error(), "takes nothing from the pod") {
		t.Errorf("another UPDATE: %v", err)
	}
}

// A terminal phase is never refused, and nobody waits for what is found out about it.
func TestATerminalPhaseIsReported(t *testing.T) {
	answer := make(chan []sandbox.Finding)
	guard := newGuard(func(context.Context, string, sandbox.Query) (sandbox.Report, error) {
		return allProbes(<-answer...), nil
	}, nodeA(), shop(""))
	recorder := guard.events.(*events.FakeRecorder)
	request := updateRequest(t, runningPod(), runningPod(phase(corev1.PodFailed)), "status")
	response := reviewed(t, guard, nil, request)
	if !response.Allowed || len(response.AuditAnnotations) != 0 {
		t.Errorf("got %+v", response)
	}
	answer <- stuck()
	for range 2 {
		if event := <-recorder.Events; !strings.Contains(event, "TerminalPhaseWhileBound user alice has written a terminal phase, but pod shop/web-0 is still alive") {
			t.Errorf("an Event says %q", event)
		}
	}
	if n := testutil.ToFloat64(guard.phases.reports); n != 1 {
		t.Errorf("counted %v times", n)
	}
	// One that is released is of no interest. It gives its place back when it has been looked into.
	reviewed(t, guard, nil, request)
	answer <- nil
	for range cap(guard.phases.places) {
		guard.phases.places <- struct{}{}
	}
	if n := testutil.ToFloat64(guard.phases.reports); n != 1 || len(recorder.Events) != 0 {
		t.Errorf("counted %v times, %d Events", n, len(recorder.Events))
	}
	// With every place taken nobody waits for one.
	var lines []string
	reviewed(t, guard, &lines, request)
	if len(lines) != 1 || !strings.Contains(lines[0], "too many terminal phases at once") {
		t.Errorf("logged %q", lines)
	}
	// Those without an address of Terway's are not looked into at all, so that nothing is said of places.
	lines = nil
	for _, pod := range []*corev1.Pod{
		ignoredPod(0), runningPod(func(p *corev1.Pod) { p.Spec.HostNetwork = true }), runningPod(func(p *corev1.Pod) { p.Spec.NodeName = "" }),
	} {
		finished := pod.DeepCopy()
		finished.Status.Phase = corev1.PodFailed
		reviewed(t, guard, &lines, updateRequest(t, pod, finished, "status"))
	}
	// Neither are those that are not written.
	request.DryRun = new(true)
	reviewed(t, guard, &lines, request)
	if len(lines) != 0 {
		t.Errorf("logged %q", lines)
	}
}

// Pods that were held have lost their addresses in the status by the time they are asked about.
func TestAddressesOfAHeldPod(t *testing.T) {
	pod := runningPod(annotated(HeldAddressesAnnotation, "10.1.2.3,fd00::3"), func(p *corev1.Pod) { p.Status.PodIP, p.Status.PodIPs = "", nil })
	if got := addressWords(podIPs(pod)); got != "10.1.2.3,fd00::3" {
		t.Errorf("got %q", got)
	}
	if got := addressWords(podIPs(runningPod(annotated(HeldAddressesAnnotation, "10.1.2.3,x,,10.9.9.9")))); got != "10.1.2.3,fd00::3,10.9.9.9" {
		t.Errorf("got %q", got)
	}
}
