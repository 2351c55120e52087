package agent

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-logr/logr"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/events"

	"github.com/eni-guard/eni-guard/internal/sandbox"
)

var noon = time.Date(2026, 11, 24, 12, 0, 0, 0, time.UTC)

// recordedSweeper is a sweeper whose node condition and Events are kept.
type recordedSweeper struct {
	*sweeper
	conditions []corev1.NodeCondition
	refuses    bool // the API server does not take the condition
	recorder   *events.FakeRecorder
}

func newRecordedSweeper() *recordedSweeper {
	r := &recordedSweeper{recorder: events.NewFakeRecorder(100)}
	r.sweeper = &sweeper{
		inspector: &Inspector{node: "node-a"}, grace: time.Minute, seen: map[string]time.Time{}, events: r.recorder,
		metrics: newSweepMetrics(prometheus.NewRegistry()), log: logr.Discard(),
		read: func(context.Context) (corev1.NodeCondition, error) { return corev1.NodeCondition{}, nil },
		write: func(_ context.Context, c corev1.NodeCondition) error {
			if r.refuses {
				return errors.New("no")
			}
			r.conditions = append(r.conditions, c)
			return nil
		},
	}
	return r
}

// events are those since the last call.
func (r *recordedSweeper) told() []string {
	var got []string
	for len(r.recorder.Events) > 0 {
		text := <-r.recorder.Events
		got = append(got, strings.Join(strings.Fields(text)[:2], " "))
	}
	slices.Sort(got)
	return got
}

func trace(key string) Trace {
	return Trace{
		key: key, Pod: sandbox.Pod{Namespace: "shop", Name: "web-" + key, UID: key}, Leftover: leftoverOfGonePod,
		Findings: []sandbox.Finding{{Kind: sandbox.NetnsOpen, Netns: "/run/netns/" + key}},
	}
}

// The end of a pod takes a while: only what lasts is a leftover. What a look that was not complete did not see is not gone.
func TestWhatIsDue(t *testing.T) {
	s := newRecordedSweeper()
	look := func(after time.Duration, complete bool, found ...Trace) (string, time.Duration) {
		due, next := s.due(noon.Add(after), found, complete)
		var keys []string
		s.sweeper.told = map[string]leftover{}
		for _, l := range due {
			keys = append(keys, l.key+" since "+l.since.Sub(noon).String())
			s.sweeper.told[l.key] = l
		}
		return strings.Join(keys, ", "), next
	}
	for _, step := range []struct {
		name     string
		after    time.Duration
		complete bool
		found    []Trace
		want     string
		next     time.Duration
	}{
		{"first seen", 0, true, []Trace{trace("a")}, "", sweepEvery},
		{"still there, and another one", 50 * time.Second, true, []Trace{trace("a"), trace("b")}, "", 10 * time.Second},
		{"after the grace time", time.Minute, true, []Trace{trace("b"), trace("a")}, "a since 0s", sweepEvery},
		{"both", 110 * time.Second, true, []Trace{trace("b"), trace("a")}, "a since 0s, b since 50s", sweepEvery},
		{"an incomplete look sees one of them", 2 * time.Minute, false, []Trace{trace("b")}, "a since 0s, b since 50s", sweepEvery},
		{"an incomplete look sees nothing", 3 * time.Minute, false, nil, "a since 0s, b since 50s", sweepEvery},
		{"one has gone", 4 * time.Minute, true, []Trace{trace("b")}, "b since 50s", sweepEvery},
		{"it comes back: another time begins", 5 * time.Minute, true, []Trace{trace("a"), trace("b")}, "b since 50s", sweepEvery},
		{"all have gone", 6 * time.Minute, true, nil, "", sweepEvery},
	} {
		if got, next := look(step.after, step.complete, step.found...); got != step.want || next != step.next {
			t.Errorf("%s: got %q, next look after %s; want %q, %s", step.name, got, next, step.want, step.next)
		}
	}
}

// What the runtime has forgotten, or cannot tell while it is down, still has its name.
func TestLeftoversKeepTheirNames(t *testing.T) {
	s := newRecordedSweeper()
	s.pods = &podsOfTheAPIServer{}
	pod := sandbox.Pod{Namespace: "shop", Name: "web-0", UID: podUID}
	records := podRecords{sandboxes: []podSandbox{{pod: pod, details: details{netnsPath: "/run/netns/cni-1"}}}}
	byUID := func() []Trace { return []Trace{{Pod: sandbox.Pod{UID: podUID}}} }
	byPath := func() []Trace {
		return []Trace{{Findings: []sandbox.Finding{{Kind: sandbox.NetnsOpen, Netns: "/run/netns/cni-1"}}}}
	}
	for n, step := range []struct {
		records podRecords
		found   []Trace
		named   bool
	}{
		{podRecords{}, byUID(), false},
		{records, nil, true},
		{podRecords{}, append(byUID(), byPath()...), true},
		{podRecords{}, byPath(), true},
		{podRecords{}, nil, true},
		{podRecords{}, byPath(), false}, // it was gone in between
	} {
		s.name(step.records, step.found, true)
		for _, got := range step.found {
			if (got.Pod == pod) != step.named {
				t.Errorf("step %d: got %+v", n, got.Pod)
			}
		}
	}
}

func TestLeftoversAreReported(t *testing.T) {
	s := newRecordedSweeper()
	one := []leftover{{trace("a"), noon.Add(-time.Minute)}}
	two := append(slices.Clone(one), leftover{trace("b"), noon})
	for _, step := range []struct {
		name     string
		after    time.Duration
		due      []leftover
		failures []string
		refuses  bool
		sees     bool                   // something that is not due
		status   corev1.ConditionStatus // of the condition that is written; empty when none is
		message  string
		since    time.Duration
		events   []string
		gauges   [2]float64 // leftovers, seconds since the oldest
	}{
		{name: "the agent has just started, and sees something", sees: true},
		{name: "nothing is left", status: corev1.ConditionFalse, message: "nothing is left"},
		{name: "nothing has changed", after: time.Minute},
		{name: "for the Node object may have been made anew", after: 10 * time.Minute, status: corev1.ConditionFalse},
		{name: "a probe fails", after: 11 * time.Minute, failures: []string{"the runtime is down"}},
		{name: "it works again", after: 11*time.Minute + 59*time.Second},
		{name: "it fails again", after: 12 * time.Minute, failures: []string{"the runtime is down"}},
		{name: "it has failed for the grace time", after: 13 * time.Minute, failures: []string{"the runtime is down"},
			status: corev1.ConditionUnknown, message: "the runtime is down", since: 13 * time.Minute},
		{name: "a leftover is found though it fails", after: 14 * time.Minute, due: one, failures: []string{"the runtime is down"},
			status: corev1.ConditionTrue, since: 14 * time.Minute, events: []string{"Warning LeftoverFound"}, gauges: [2]float64{1, 900},
			message: "1 leftover (eni-guard inspect --all; not everything could be looked at since 2026-11-24T12:12:00Z, so this may be old): pod shop/web-a (UID a), since 2026-11-24T11:59:00Z, because the API server does not have its pod: network namespace /run/netns/a is open"},
		{name: "a second one, which the API server does not take", after: 15 * time.Minute, due: two, refuses: true,
			events: []string{"Warning LeftoverFound"}, gauges: [2]float64{2, 960}},
		{name: "it is written again", after: 15*time.Minute + 30*time.Second, due: two,
			status: corev1.ConditionTrue, since: 14 * time.Minute, message: "2 leftovers (eni-guard inspect --all): ", gauges: [2]float64{2, 990}},
		{name: "one has gone", after: 16 * time.Minute, due: one,
			status: corev1.ConditionTrue, since: 14 * time.Minute, message: "1 leftover ", events: []string{"Normal LeftoverGone"}, gauges: [2]float64{1, 1020}},
		{name: "a probe fails for a moment", after: 16*time.Minute + 30*time.Second, due: one, failures: []string{"the runtime is down"}, gauges: [2]float64{1, 1050}},
		{name: "both have", after: 17 * time.Minute,
			status: corev1.ConditionFalse, since: 17 * time.Minute, message: "nothing is left", events: []string{"Normal LeftoverGone"}},
	} {
		s.conditions, s.refuses, s.seen = nil, step.refuses, map[string]time.Time{}
		if step.sees {
			s.seen["x"] = noon
		}
		s.report(t.Context(), noon.Add(step.after), step.due, nil, step.failures)
		if got := s.told(); !slices.Equal(got, step.events) {
			t.Errorf("%s: Events %q, want %q", step.name, got, step.events)
		}
		if got := [2]float64{testutil.ToFloat64(s.metrics.leftovers), testutil.ToFloat64(s.metrics.oldest)}; got != step.gauges {
			t.Errorf("%s: metrics %v, want %v", step.name, got, step.gauges)
		}
		if step.status == "" {
			if len(s.conditions) > 0 {
				t.Errorf("%s: wrote %+v", step.name, s.conditions)
			}
			continue
		}
		if len(s.conditions) != 1 {
			t.Errorf("%s: %d conditions written", step.name, len(s.conditions))
			continue
		}
		c := s.conditions[0]
		if c.Type != sandbox.OrphanedCondition || c.Status != step.status || !strings.HasPrefix(c.Message, step.message) ||
			!c.LastTransitionTime.Time.Equal(noon.Add(step.since)) || !c.LastHeartbeatTime.Time.Equal(noon.Add(step.after)) {
			t.Errorf("%s: wrote %+v", step.name, c)
		}
	}
}

func TestAnAddressThatIsThereTwiceIsToldOnce(t *testing.T) {
	s := newRecordedSweeper()
	shared := []SharedAddress{{podAddress, []Trace{trace("a"), trace("b")}}}
	for n, want := range [][]string{{"Warning AddressConflict"}, nil} {
		s.report(t.Context(), noon, nil, shared, nil)
		if got := s.told(); !slices.Equal(got, want) {
			t.Errorf("look %d: Events %q", n, got)
		}
		if got := testutil.ToFloat64(s.metrics.shared); got != 1 {
			t.Errorf("metric %v", got)
		}
	}
	s.report(t.Context(), noon, nil, nil, nil)
	if got := testutil.ToFloat64(s.metrics.shared); got != 0 {
		t.Errorf("afterwards: metric %v", got)
	}
}

// The message of a node condition is read by people and watched by everybody: it must not grow with the leftovers.
func TestTheConditionIsBounded(t *testing.T) {
	c := leftoverCondition(noon, slices.Repeat([]leftover{{trace("a"), noon}}, 110))
	if len(c.Message) > maxConditionMessage || !strings.HasPrefix(c.Message, "110 leftovers") {
		t.Errorf("%d bytes: %s", len(c.Message), c.Message)
	}
}

// podsOfTheAPIServer are what the API server has, by its cache and when it is asked itself.
type podsOfTheAPIServer struct {
	cached, asked map[string]bool
	away          error
}

func (p *podsOfTheAPIServer) known(uid string) bool { return p.cached[uid] }

func (p *podsOfTheAPIServer) live(context.Context) (map[string]bool, error) { return p.asked, p.away }

// A whole look, step by step: what is on the node, what the API server says of it, and what is told.
func TestSweep(t *testing.T) {
	s := newRecordedSweeper()
	pods := &podsOfTheAPIServer{}
	var left []podSandbox
	var runtimeErr error
	s.inspector = newInspector("node-a", lookable(t).Host, fakeRuntime(func(context.Context, string) (podRecords, error) {
		return podRecords{sandboxes: left}, runtimeErr
	}))
	s.pods = pods
	web := podSandbox{id: "s1", ready: true, pod: sandbox.Pod{Namespace: "shop", Name: "web-0", UID: podUID}, details: details{netnsPath: "/run/netns/closed"}}
	has, hasNot := map[string]bool{podUID: true}, map[string]bool{}
	for _, step := range []struct {
		name    string
		after   time.Duration
		left    []podSandbox
		runtime error
		cached  map[string]bool
		asked   map[string]bool
		away    error
		events  []string
		status  corev1.ConditionStatus // of the condition as it was written last
	}{
		{name: "nothing is there", status: corev1.ConditionFalse},
		{name: "a pod that the cache does not have", after: time.Minute, left: []podSandbox{web}, asked: has, status: corev1.ConditionFalse},
		{name: "after the grace time the API server has it", after: 2 * time.Minute, left: []podSandbox{web}, asked: has, status: corev1.ConditionFalse},
		{name: "the cache has it too", after: 3 * time.Minute, left: []podSandbox{web}, cached: has, asked: has, status: corev1.ConditionFalse},
		{name: "neither does any more", after: 4 * time.Minute, left: []podSandbox{web}, asked: hasNot, status: corev1.ConditionFalse},
		{name: "after the grace time the API server cannot be asked", after: 5 * time.Minute, left: []podSandbox{web}, away: errors.New("away"), status: corev1.ConditionFalse},
		{name: "it can", after: 5*time.Minute + 30*time.Second, left: []podSandbox{web}, asked: hasNot, events: []string{"Warning LeftoverFound"}, status: corev1.ConditionTrue},
		{name: "it cannot again", after: 6 * time.Minute, left: []podSandbox{web}, away: errors.New("away"), status: corev1.ConditionTrue},
		{name: "the runtime cannot be asked, so nothing has gone", after: 7 * time.Minute, runtime: errors.New("down"), asked: hasNot, status: corev1.ConditionTrue},
		{name: "nor after a while", after: 20 * time.Minute, runtime: errors.New("down"), asked: hasNot, status: corev1.ConditionTrue},
		{name: "it has gone", after: 21 * time.Minute, asked: hasNot, events: []string{"Normal LeftoverGone"}, status: corev1.ConditionFalse},
	} {
		left, runtimeErr = step.left, step.runtime
		*pods = podsOfTheAPIServer{step.cached, step.asked, step.away}
		s.now = func() time.Time { return noon.Add(step.after) }
		s.sweep(t.Context())
		if got := s.told(); !slices.Equal(got, step.events) {
			t.Errorf("%s: Events %q, want %q", step.name, got, step.events)
		}
		if up := testutil.ToFloat64(s.metrics.probe.WithLabelValues("runtime")); (up == 1) != (step.runtime == nil) {
			t.Errorf("%s: eni_guard_probe_up is %v", step.name, up)
		}
		if got := s.conditions[len(s.conditions)-1]; got.Status != step.status {
			t.Errorf("%s: the condition is %s (%s), want %s", step.name, got.Status, got.Message, step.status)
		}
	}
}

// Whether the probes can look is told also while the API server does not answer.
func TestProbesAreToldOfWithoutTheAPIServer(t *testing.T) {
	silent := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }))
	t.Cleanup(func() { silent.CloseClientConnections(); silent.Close() })
	config := &rest.Config{Host: silent.URL}
	pods, err := newNodePods(config, "node-a")
	if err != nil {
		t.Fatal(err)
	}
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	h := lookable(t)
	h.group("kubepods/pod" + otherUID)
	down := func(context.Context, string) (podRecords, error) { return podRecords{}, errors.New("down") }
	metrics := newSweepMetrics(prometheus.NewRegistry())
	ctx, end := context.WithCancel(t.Context())
	ended := make(chan error)
	go func() {
		ended <- options{node: "node-a"}.sweeping(client, pods, newInspector("node-a", h.Host, fakeRuntime(down)), metrics, logr.Discard())(ctx)
	}()
	if err := wait.PollUntilContextTimeout(ctx, 10*time.Millisecond, time.Minute, true, func(context.Context) (bool, error) {
		return testutil.CollectAndCount(metrics.probe) == len(sandbox.Required), nil
	}); err != nil {
		t.Fatalf("%d probes are told of (%v)", testutil.CollectAndCount(metrics.probe), err)
	}
	for _, name := range sandbox.Required {
		if up := testutil.ToFloat64(metrics.probe.WithLabelValues(string(name))); (up == 1) != (name != sandbox.ProbeRuntime) {
			t.Errorf("%s: eni_guard_probe_up is %v", name, up)
		}
	}
	end()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// An agent that has just started goes on where the one before has ended: what is still there has been there since then.
func TestTheNextAgentTakesOver(t *testing.T) {
	web := podSandbox{id: "s1", ready: true, pod: sandbox.Pod{Namespace: "shop", Name: "web-0", UID: podUID}, details: details{netnsPath: "/run/netns/closed"}}
	unnamed, future := trace(otherUID), trace("clock")
	unnamed.Pod.Name = ""
	before := leftoverCondition(noon, []leftover{{trace(podUID), noon.Add(-time.Hour)}, {unnamed, noon.Add(-time.Minute)}, {future, noon.Add(time.Hour)}})
	before.LastTransitionTime = metav1.NewTime(noon.Add(-30 * time.Minute))
	for _, test := range []struct {
		name    string
		left    []podSandbox
		runtime error
		status  corev1.ConditionStatus // of the condition that is written; empty when none is
		message string
		since   time.Duration // from noon
	}{
		{"one of its leftovers is still there", []podSandbox{web}, nil, corev1.ConditionTrue, "1 leftover (eni-guard inspect --all): pod shop/web-0 (UID " + podUID + "), since 2026-11-24T11:00:00Z", -30 * time.Minute},
		{"nothing is", nil, nil, corev1.ConditionFalse, "nothing is left", time.Minute},
		{"that cannot be told", nil, errors.New("down"), "", "", 0},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := newRecordedSweeper()
			s.inspector = newInspector("node-a", lookable(t).Host, fakeRuntime(func(context.Context, string) (podRecords, error) {
				return podRecords{sandboxes: test.left}, test.runtime
			}))
			s.pods = &podsOfTheAPIServer{}
			s.now = func() time.Time { return noon.Add(time.Minute) }
			s.takeOver(before, noon)
			if want := map[string]time.Time{podUID: noon.Add(-time.Hour), otherUID: noon.Add(-time.Minute)}; !maps.Equal(s.seen, want) {
				t.Errorf("took over %v, want %v", s.seen, want)
			}
			s.sweep(t.Context())
			if test.status == "" {
				if len(s.conditions) > 0 {
					t.Errorf("wrote %+v", s.conditions)
				}
				return
			}
			if len(s.conditions) != 1 || s.conditions[0].Status != test.status || !strings.HasPrefix(s.conditions[0].Message, test.message) ||
				!s.conditions[0].LastTransitionTime.Time.Equal(noon.Add(test.since)) {
				t.Errorf("wrote %+v", s.conditions)
			}
		})
	}
}

// A pod that goes is a reason to look at once.
func TestAPodThatGoesWakesTheSweeper(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newRecordedSweeper()
		looks := 0
		s.inspector = newInspector("node-a", lookable(t).Host, fakeRuntime(func(context.Context, string) (podRecords, error) {
			looks++
			return podRecords{}, nil
		}))
		s.pods, s.now = &podsOfTheAPIServer{}, time.Now
		ctx, end := context.WithCancel(t.Context())
		podGone := make(chan struct{}, 1)
		ended := make(chan struct{})
		go func() { defer close(ended); s.run(ctx, podGone) }()
		synctest.Wait()
		if looks != 1 {
			t.Errorf("%d looks at the start", looks)
		}
		podGone <- struct{}{}
		synctest.Wait() // no time passes
		if looks != 2 {
			t.Errorf("%d looks after a pod has gone", looks)
		}
		select {
		case <-time.After(sweepEvery):
		case <-ended:
		}
		synctest.Wait()
		if looks != 3 {
			t.Errorf("%d looks after some time", looks)
		}
		end()
		<-ended
	})
}

// relatedParties keeps which other party each Event has. It implements events.EventRecorder.
type relatedParties []string

func (r *relatedParties) Eventf(_, related runtime.Object, _, reason, _, _ string, _ ...any) {
	of, _ := related.(*corev1.ObjectReference)
	*r = append(*r, fmt.Sprintf("%s %s %s %s", reason, of.Kind, of.Name, of.FieldPath))
}

// Events that differ in no party are one series, with the words of the first.
func TestEventsOfDifferentThingsAreNoSeries(t *testing.T) {
	var got relatedParties
	s := newRecordedSweeper().sweeper
	s.events = &got
	one, other := Trace{key: "net:[7] /run/netns/a"}, Trace{key: "net:[8] /run/netns/b"}
	s.tell([]leftover{{one, noon}, {other, noon}, {trace("1"), noon}})
	second := netip.MustParseAddr("fd00::5")
	s.tellShared([]SharedAddress{{podAddress, []Trace{trace("1"), one}}, {second, []Trace{trace("1"), one}}}, true)
	if want := (relatedParties{
		"LeftoverFound Node node-a net:[7] /run/netns/a", "LeftoverFound Node node-a net:[8] /run/netns/b", "LeftoverFound Pod web-1 ",
		"AddressConflict Pod web-1 " + podAddress.String(), "AddressConflict Pod web-1 fd00::5",
	}); !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

// What only processes keep, and was a pod's, is a leftover also while that pod lives: its sandbox is another one by now.
func TestWhatWasRecalledIsALeftover(t *testing.T) {
	s := newRecordedSweeper().sweeper
	at := place{"net:[7]", podAddress}
	s.recall([]Trace{{Pod: sandbox.Pod{Namespace: "shop", Name: "web-0", UID: podUID}, places: []place{at}}}, true)
	traces := []Trace{{key: "net:[7] net:[7]", unmounted: true, places: []place{at}, Findings: []sandbox.Finding{{Kind: sandbox.NetnsOpen, Netns: "net:[7]"}}}}
	s.recall(traces, true)
	if got := leftovers(traces, true, func(string) bool { return true }); len(got) != 1 || got[0].Pod.Name != "web-0" || got[0].Leftover != leftoverOfTasks {
		t.Errorf("got %+v", got)
	}
}

// A namespace whose record is gone is a leftover while its pod lives, and stays the same one when the pod goes.
func TestALeftoverOfALivingPodStaysOneWhenThePodGoes(t *testing.T) {
	s := newRecordedSweeper()
	pods := &podsOfTheAPIServer{cached: map[string]bool{podUID: true}}
	s.pods = pods
	pod := sandbox.Pod{Namespace: "shop", Name: "web-0", UID: podUID}
	records := podRecords{sandboxes: []podSandbox{{pod: pod, details: details{netnsPath: "/run/netns/cni-1"}}}}
	s.name(records, nil, true)
	look := func(after time.Duration) []leftover {
		found := []Trace{{key: "net:[1] /run/netns/cni-1", Findings: []sandbox.Finding{{Kind: sandbox.NetnsOpen, Netns: "/run/netns/cni-1"}}}}
		s.name(podRecords{}, found, true)
		due, _ := s.due(noon.Add(after), found, true)
		s.tell(due)
		return due
	}
	look(0)
	if due := look(2 * time.Minute); len(due) != 1 {
		t.Fatalf("while the pod lives: %d leftovers", len(due))
	}
	if got := s.told(); !slices.Equal(got, []string{"Warning LeftoverFound"}) {
		t.Errorf("while the pod lives: Events %q", got)
	}
	pods.cached = nil
	due := look(2*time.Minute + time.Second)
	if len(due) != 1 || !due[0].since.Equal(noon) {
		t.Errorf("when the pod has gone: %v", due)
	}
	if got := s.told(); len(got) > 0 {
		t.Errorf("when the pod has gone: Events %q", got)
	}
}
