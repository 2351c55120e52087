package agent

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/go-logr/logr"
	"github.com/prometheus/client_golang/prometheus"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/tools/events"

	"github.com/eni-guard/eni-guard/internal/sandbox"
)

const (
	// sweepEvery is how often the agent looks for leftovers without a reason to.
	sweepEvery = 30 * time.Second
	// sweepTimeout is how long one look may take.
	sweepTimeout = 20 * time.Second
	// conditionEvery is how often the node condition is written though nothing has changed: the Node object may have been made
	// anew.
	conditionEvery = 10 * time.Minute
	// leftoverEvery is the same while it says that something is left, and a new Node object would have no taint.
	leftoverEvery = time.Minute
	// nobodysGrace is how many times as long a network namespace of nobody must have been seen: a sandbox in the making has one too, and
	// the kubelet gives the runtime four minutes for it (pkg/kubelet/cri/remote, RunPodSandbox: twice its timeout).
	nobodysGrace = 5
	// maxConditionMessage bounds the message of the condition, and of the Event, in bytes; an Event's note has 1024 at most
	// (pkg/apis/core/validation, NoteLengthLimit).
	maxConditionMessage = 1000
)

// knownPods is what the agent needs of the API server to find leftovers.
type knownPods interface {
	// known says whether the API server has a pod for this node that the node knows by this UID, from a cache.
	known(uid string) bool
	// live asks the API server itself for the UIDs of all of them.
	live(ctx context.Context) (map[string]bool, error)
}

// leftover is a trace of a pod that is gone, and since when it has been seen.
type leftover struct {
	Trace
	since time.Time
}

func (l leftover) String() string {
	return fmt.Sprintf("%s, since %s, because %s: %s", who(l.Trace), l.since.UTC().Format(time.RFC3339), l.Leftover, words(l.Trace))
}

// toldSince finds the UIDs of leftovers, and since when they have been seen, in what leftover.String says.
var toldSince = regexp.MustCompile(`UID ([^ ,)]+)\)?, since ([^ ,]+), because`)

// sweeper looks for what is left on the node of pods that the API server no longer has, without being asked.
type sweeper struct {
	inspector *Inspector
	pods      knownPods
	// grace is how long something must have been seen before it is called a leftover: the end of a pod takes a while.
	grace time.Duration
	// read returns the condition as the Node has it, from an agent before this one perhaps, and write writes it.
	read    func(ctx context.Context) (corev1.NodeCondition, error)
	write   func(ctx context.Context, condition corev1.NodeCondition) error
	events  events.EventRecorder
	metrics sweepMetrics
	log     logr.Logger
	now     func() time.Time

	seen        map[string]time.Time   // by key of the trace: the first look it was seen in
	names       map[string]sandbox.Pod // by UID and by path of the namespace: pods that the runtime had a sandbox of
	places      map[place]sandbox.Pod  // whose they were at the last look
	blindSince  time.Time              // the first of the last looks that were not complete
	condition   corev1.NodeCondition   // as written last, or taken over
	conditionAt time.Time
	standsUntil time.Time           // how long what the agent before this one has told stands, while anything is seen
	told        map[string]leftover // those that have been told of, by key
	shared      []string            // addresses that were shared at the last look
}

// run sweeps until ctx ends: from time to time, when a pod goes, and when the grace time of something ends.
func (s *sweeper) run(ctx context.Context, podGone <-chan struct{}) {
	s.seen, s.names, s.places = map[string]time.Time{}, map[string]sandbox.Pod{}, map[place]sandbox.Pod{}
	if before, err := s.read(ctx); err != nil {
		s.log.Error(err, "could not read the node condition; what is left counts as seen from now on")
	} else {
		s.takeOver(before, s.now())
	}
	for {
		next := s.sweep(ctx)
		select {
		case <-time.After(next):
		case <-podGone:
		case <-ctx.Done():
			return
		}
	}
}

// lookUntil tells by the metrics whether the probes can look everywhere, and no more, until known returns: for as long as the API server has
// not said which pods there are, nothing can be told to be left over.
func (s *sweeper) lookUntil(ctx context.Context, known func() error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go wait.UntilWithContext(ctx, func(ctx context.Context) {
		look, cancel := context.WithTimeout(ctx, sweepTimeout/2)
		defer cancel()
		if survey := s.inspector.survey(look); ctx.Err() == nil {
			s.metrics.probes(survey.probes)
		}
	}, sweepEvery)
	return known()
}

// takeOver remembers since when the agent before this one has seen what it has told of. It counts only for what is found.
func (s *sweeper) takeOver(before corev1.NodeCondition, now time.Time) {
	s.condition = before
	if before.Status == corev1.ConditionTrue {
		// By then everything that it has told of and that is still there has been seen for long enough again.
		s.standsUntil = now.Add(nobodysGrace*s.grace + sweepEvery)
	}
	for _, match := range toldSince.FindAllStringSubmatch(before.Message, -1) {
		if since, err := time.Parse(time.RFC3339, match[2]); err == nil && since.Before(now) {
			s.seen[match[1]] = since
		}
	}
}

// sweep looks once, and returns after which time to look again.
func (s *sweeper) sweep(ctx context.Context) time.Duration {
	look, cancel := context.WithTimeout(ctx, sweepTimeout)
	defer cancel()
	first, cancelFirst := part(look, 1, 2) // a runtime that hangs must leave time for what follows
	defer cancelFirst()
	survey := s.inspector.survey(first)
	s.metrics.probes(survey.probes)
	traces, complete := survey.traces(), len(survey.failures()) == 0
	s.recall(traces, complete)
	found := leftovers(traces, survey.runtimeAnswered(), s.pods.known)
	s.name(survey.records, found, complete)
	now := s.now()
	due, next := s.due(now, found, complete)
	if len(due) > 0 {
		live, err := s.pods.live(look)
		if err != nil {
			s.log.Error(err, "could not make sure that the pods of leftovers are gone; looking again")
		}
		due = slices.DeleteFunc(due, func(l leftover) bool {
			_, told := s.told[l.key]
			// A pod that lives may have left a namespace of an earlier sandbox behind.
			return err != nil && !told || l.Leftover == leftoverOfGonePod && live[l.Pod.UID]
		})
	}
	for n, l := range due {
		if _, told := s.told[l.key]; told && !slices.ContainsFunc(found, l.same) {
			continue // from an earlier look, which has described it
		}
		described, err := s.inspector.described(look, survey, l.Trace)
		if err != nil {
			s.log.Error(err, "could not read a leftover in full")
		}
		due[n].Trace = described
	}
	s.report(ctx, now, due, sharedAddresses(traces), survey.failures())
	return next
}

// recall gives the namespaces of nobody that only processes keep to the pods whose they were at an earlier look. Neither record nor path nor
// cgroup leads from one to its pod.
func (s *sweeper) recall(traces []Trace, complete bool) {
	places := map[place]sandbox.Pod{}
	if !complete {
		maps.Copy(places, s.places)
	}
	for i := range traces {
		t := &traces[i]
		if t.Pod.UID == "" && t.unmounted {
			for _, at := range t.places {
				if pod, known := s.places[at]; known {
					t.Pod = pod
				}
			}
		}
		for _, at := range t.places {
			if t.Pod.UID != "" && !t.static {
				places[at] = t.Pod
			}
		}
	}
	s.places = places
}

// name gives pods their names by which the runtime knew them at an earlier look: what it has forgotten, or cannot tell at the
// moment, is found by UID, by path or by place alone.
func (s *sweeper) name(records podRecords, found []Trace, complete bool) {
	names := map[string]sandbox.Pod{}
	if !complete { // what was not found may be there
		maps.Copy(names, s.names)
	}
	for _, r := range records.sandboxes {
		if r.netnsPath != "" {
			names[r.pod.UID], names[r.netnsPath] = r.pod, r.pod
		}
	}
	for i := range found {
		t := &found[i]
		keys := []string{t.Pod.UID}
		for _, f := range t.Findings {
			keys = append(keys, f.Netns)
		}
		for _, key := range keys {
			if pod, known := s.names[key]; known && t.Pod.Name == "" {
				t.Pod = pod
			}
			if t.Pod.UID != "" && key != "" {
				names[key] = t.Pod
			}
		}
		// The same leftover, of which less is left: it has been there since it was first seen.
		if t.Pod.UID != "" && t.key != t.Pod.UID && !s.pods.known(t.Pod.UID) {
			s.rekey(t.key, t.Pod.UID)
			t.key = t.Pod.UID
		}
		for _, at := range t.places {
			if t.Pod.UID != "" {
				s.places[at] = t.Pod
			}
		}
	}
	s.names = names
}

// rekey keeps since when a leftover has been seen, and that it has been told of, where its key changes because its pod has gone. Else it would
// be told to be gone, and be no leftover for the grace time, just when its address counts as free.
func (s *sweeper) rekey(from, to string) {
	if since, seen := s.seen[from]; seen {
		if earlier, known := s.seen[to]; !known || since.Before(earlier) {
			s.seen[to] = since
		}
	}
	if l, told := s.told[from]; told {
		if _, known := s.told[to]; !known {
			l.key = to
			s.told[to] = l
		}
		delete(s.told, from)
	}
}

// due remembers what was found, and returns what has been there for the grace time, the oldest first, and after which time to
// look again. What was not found is forgotten, unless the look was not complete: then it may be there all the same.
func (s *sweeper) due(now time.Time, found []Trace, complete bool) (due []leftover, next time.Duration) {
	next = sweepEvery
	seen := map[string]time.Time{}
	if !complete {
		seen = maps.Clone(s.seen)
		for key, l := range s.told {
			if !slices.ContainsFunc(found, l.same) {
				due = append(due, l)
				seen[key] = l.since
			}
		}
	}
	for _, t := range found {
		since, known := s.seen[t.key]
		if !known {
			since = now
		}
		seen[t.key] = since
		grace := s.grace
		if t.Pod.UID == "" {
			grace *= nobodysGrace
		}
		if left := since.Add(grace).Sub(now); left > 0 {
			next = min(next, left)
		} else {
			due = append(due, leftover{t, since})
		}
	}
	s.seen = seen
	slices.SortStableFunc(due, func(a, b leftover) int { return a.since.Compare(b.since) })
	return due, next
}

// report makes metrics, node condition, Events and log say what is left.
func (s *sweeper) report(ctx context.Context, now time.Time, due []leftover, shared []SharedAddress, failures []string) {
	if len(failures) == 0 {
		s.blindSince = time.Time{}
	} else if s.blindSince.IsZero() {
		s.blindSince = now
	}
	blind := len(failures) > 0 && now.Sub(s.blindSince) >= s.grace
	var remarks []string
	if blind {
		remarks = append(remarks, fmt.Sprintf("not everything could be looked at since %s, so this may be old", s.blindSince.UTC().Format(time.RFC3339)))
	}
	condition := leftoverCondition(now, due, remarks...)
	switch {
	case len(due) > 0:
	case (s.conditionAt.IsZero() || now.Before(s.standsUntil)) && len(s.seen) > 0 && !blind:
		// The agent has just started, and does not know how long what it sees has been there: what the one before has said stands.
		return
	case blind:
		condition.Status, condition.Reason = corev1.ConditionUnknown, "ProbeFailed"
		condition.Message = clip(strings.Join(failures, "; "))
	case len(failures) > 0:
		return // for a moment: the runtime starts again, say
	}
	s.tellShared(shared, len(failures) == 0)
	s.metrics.set(now, due, len(s.shared))
	if condition.Status != corev1.ConditionUnknown {
		s.tell(due)
	}
	if condition.Status == s.condition.Status {
		condition.LastTransitionTime = s.condition.LastTransitionTime
	}
	same := condition.Status == s.condition.Status && condition.Message == s.condition.Message
	every := conditionEvery
	if condition.Status == corev1.ConditionTrue {
		every = leftoverEvery
	}
	if same && now.Sub(s.conditionAt) < every {
		return
	}
	if err := s.write(ctx, condition); err != nil {
		s.log.Error(err, "could not write the node condition; trying again at the next look")
		return
	}
	s.condition, s.conditionAt = condition, now
}

// tell says by an Event and in the log which leftovers have come or gone. Events of one kind about the same two things are put
// together, so each names its pod.
func (s *sweeper) tell(due []leftover) {
	now := map[string]leftover{}
	for _, l := range due {
		now[l.key] = l
		if _, told := s.told[l.key]; told {
			continue
		}
		s.log.Info("leftover found", "namespace", l.Pod.Namespace, "pod", l.Pod.Name, "podUID", l.Pod.UID, "because", l.Leftover, "since", l.since, "evidence", words(l.Trace))
		s.events.Eventf(s.node(), s.reference(l.Trace), corev1.EventTypeWarning, "LeftoverFound", "Sweep", "%s", clip(l.String()))
	}
	for key, l := range s.told {
		if _, left := now[key]; left {
			continue
		}
		s.log.Info("leftover gone", "namespace", l.Pod.Namespace, "pod", l.Pod.Name, "podUID", l.Pod.UID, "since", l.since)
		s.events.Eventf(s.node(), s.reference(l.Trace), corev1.EventTypeNormal, "LeftoverGone", "Sweep", "nothing is left of %s any more", who(l.Trace))
	}
	s.told = now
}

// reference names what a trace is of as the other party of an Event: its pod, of which the API server may have no object any more, or, where
// no pod is known, its network namespace as a part of the node. Events that differ in no party are one series, with the words of the first.
func (s *sweeper) reference(t Trace) *corev1.ObjectReference {
	if t.Pod.Name == "" {
		part := s.node()
		part.FieldPath = t.key
		return part
	}
	return &corev1.ObjectReference{APIVersion: "v1", Kind: "Pod", Namespace: t.Pod.Namespace, Name: t.Pod.Name, UID: types.UID(t.Pod.UID)}
}

// tellShared says by an Event and in the log that an address has come to be there twice. A look that was not complete forgets none.
func (s *sweeper) tellShared(shared []SharedAddress, complete bool) {
	var now []string
	for _, address := range shared {
		text := address.IP.String()
		now = append(now, text)
		if slices.Contains(s.shared, text) {
			continue
		}
		var holders []string
		for _, t := range address.Holders {
			holders = append(holders, who(t))
		}
		note := fmt.Sprintf("address %s is there %d times: %s", text, timesInUse(address.Holders, address.IP), strings.Join(holders, "; "))
		s.log.Info("address conflict", "address", text, "holders", holders)
		of := s.reference(address.Holders[0])
		of.FieldPath = text // a pod may have two
		s.events.Eventf(s.node(), of, corev1.EventTypeWarning, "AddressConflict", "Sweep", "%s", clip(note))
	}
	if !complete {
		now = append(now, slices.DeleteFunc(s.shared, func(text string) bool { return slices.Contains(now, text) })...)
	}
	s.shared = now
}

// node is what Events are about. Those of nodes carry the name as UID, as the kubelet's do: kubectl describe looks for that.
func (s *sweeper) node() *corev1.ObjectReference {
	return &corev1.ObjectReference{APIVersion: "v1", Kind: "Node", Name: s.inspector.node, UID: types.UID(s.inspector.node)}
}

// leftoverCondition is the node condition where every leftover is known. Remarks are about what it says, if it says that something is left.
func leftoverCondition(now time.Time, due []leftover, remarks ...string) corev1.NodeCondition {
	c := corev1.NodeCondition{
		Type: sandbox.OrphanedCondition, Status: corev1.ConditionFalse, Reason: "NothingLeft",
		Message:            "nothing is left on this node of pods that the API server no longer has",
		LastTransitionTime: metav1.NewTime(now), LastHeartbeatTime: metav1.NewTime(now),
	}
	if len(due) == 0 {
		return c
	}
	var parts []string
	for _, l := range due {
		parts = append(parts, l.String())
	}
	c.Status, c.Reason = corev1.ConditionTrue, "LeftoverFound"
	remarks = append([]string{"eni-guard inspect --all"}, remarks...)
	c.Message = clip(fmt.Sprintf("%s (%s): %s", count(len(due), "leftover"), strings.Join(remarks, "; "), strings.Join(parts, "; ")))
	return c
}

// who names the pod of a trace, or its network namespace.
func who(t Trace) string {
	if t.Pod.UID == "" {
		for _, f := range t.Findings {
			if f.Netns != "" {
				return "network namespace " + f.Netns + ", of no pod that is known"
			}
		}
	}
	return "pod " + t.Pod.String()
}

// words are the most telling findings of a trace: addresses, and the first other one. They do not change while the leftover
// does not.
func words(t Trace) string {
	var found []string
	for _, f := range t.Findings {
		if f.Kind == sandbox.IPAssigned || len(found) == 0 {
			found = append(found, f.String())
		}
	}
	return strings.Join(found, ", ")
}

// clip cuts a text to maxConditionMessage.
func clip(text string) string {
	const mark = "…"
	if len(text) <= maxConditionMessage {
		return text
	}
	return strings.ToValidUTF8(text[:maxConditionMessage-len(mark)], "") + mark
}

// orphanedCondition returns the condition of a node; empty if it has none.
func orphanedCondition(node *corev1.Node) corev1.NodeCondition {
	for _, c := range node.Status.Conditions {
		if c.Type == sandbox.OrphanedCondition {
			return c
		}
	}
	return corev1.NodeCondition{}
}

// conditionPatch is a strategic merge patch of a node's status that writes one condition and touches no other: conditions are
// merged by type (k8s.io/api/core/v1, NodeStatus).
func conditionPatch(c corev1.NodeCondition) ([]byte, error) {
	return json.Marshal(map[string]any{"status": map[string]any{"conditions": []corev1.NodeCondition{c}}})
}

// sweepMetrics are what the agent counts. None has a label for a pod.
type sweepMetrics struct {
	leftovers, oldest, shared prometheus.Gauge
	probe                     *prometheus.GaugeVec
}

func newSweepMetrics(registry prometheus.Registerer) sweepMetrics {
	gauge := func(name, help string) prometheus.Gauge {
		g := prometheus.NewGauge(prometheus.GaugeOpts{Name: name, Help: help})
		registry.MustRegister(g)
		return g
	}
	m := sweepMetrics{
		leftovers: gauge("eni_guard_leftovers", "Pods that the API server no longer has of which something is left on the node, and network namespaces of nobody."),
		oldest:    gauge("eni_guard_leftover_oldest_seconds", "How long the oldest leftover has been seen; 0 without one."),
		shared:    gauge("eni_guard_shared_addresses", "Addresses given to pods that several network namespaces of the node have."),
		probe: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "eni_guard_probe_up", Help: "Whether a probe could look everywhere at the last look at the whole node.",
		}, []string{"probe"}),
	}
	registry.MustRegister(m.probe)
	return m
}

func (m sweepMetrics) probes(probes []sandbox.Probe) {
	for _, p := range probes {
		up := 0.0
		if p.Error == "" {
			up = 1
		}
		m.probe.WithLabelValues(string(p.Name)).Set(up)
	}
}

func (m sweepMetrics) set(now time.Time, due []leftover, shared int) {
	m.leftovers.Set(float64(len(due)))
	m.shared.Set(float64(shared))
	oldest := 0.0
	if len(due) > 0 {
		oldest = now.Sub(due[0].since).Seconds()
	}
	m.oldest.Set(oldest)
}
