package review

import (
	"bytes"
	"encoding/json"
	"time"

	"github.com/eni-guard/eni-guard/internal/sandbox"
	"github.com/eni-guard/eni-guard/webhook"
)

// traces are what is known of single pods. They come back a pod after the other, and of each the latest first: then what comes next of a pod is
// what was seen last. Pods of one workload are beside each other.
type traces struct{ *sorter }

// traceKind says what a trace is. At the same time they come in this order: what is at the time of a removal did not come after it, and an
// override at the time of a departure was there before.
type traceKind byte

const (
	traceRemoval traceKind = iota
	traceGone
	traceOverride
)

// trace is something that has happened to a pod.
type trace struct {
	Kind traceKind
	Time time.Time
	UID  string `json:",omitempty"`

	// Of a removal: its number, whether the pod stayed, or stayed until its finalizers were taken away, and whether something of it was on its node.
	Number             int64
	Stays, Held, Stuck bool   `json:",omitempty"`
	Workload, Node     string `json:",omitempty"`

	// Of a departure.
	By       string   `json:",omitempty"`
	How      How      `json:",omitempty"`
	Decision Decision `json:",omitempty"`

	// Of an override: its reason.
	Reason string `json:",omitempty"`
}

func (t traces) put(namespace, pod string, what trace) error {
	value, err := json.Marshal(what)
	if err != nil {
		return err
	}
	key := append([]byte(namespace+"/"+Workload(pod)+"\x00"+pod), 0)
	at := len(key)
	key = appendTime(key, what.Time)
	for i := range key[at:] {
		key[at+i] ^= 0xff
	}
	return t.add(append(key, byte(what.Kind)), value)
}

// podOf is the part of a key that says which pod it is about.
func podOf(key []byte) []byte { return key[:len(key)-9] }

func (t traces) change(c Change) error {
	switch c.Kind { //nolint:exhaustive // others are not about one pod
	case ChangeOverride:
		return t.put(c.Namespace, c.Name, trace{Kind: traceOverride, Time: c.Time, Reason: c.Value})
	case ChangeFinalizers:
		return t.put(c.Namespace, c.Name, trace{Kind: traceGone, Time: c.Time, By: c.User, How: HowStripped})
	}
	return nil
}

func (t traces) departure(d departure) error {
	return t.put(d.Namespace, d.Name, trace{Kind: traceGone, Time: d.Time, UID: d.UID, By: d.By, How: d.How})
}

// removal notes a removal that has this number in the report, if it is selected, and what it means for others of the same pod.
func (t traces) removal(r Removal, selected bool, number int64) error {
	if selected && (r.stays() || r.Stuck()) {
		err := t.put(r.Namespace, r.Pod, trace{
			Kind: traceRemoval, Time: r.Time, UID: r.UID, Number: number, Stays: r.stays(), Held: r.Outcome == OutcomeHeld, Stuck: r.Stuck(),
			Workload: r.Namespace + "/" + Workload(r.Pod), Node: r.Node,
		})
		if err != nil {
			return err
		}
	}
	if r.stays() || r.Path == string(webhook.PathIgnoreLabel) {
		return nil
	}
	return t.put(r.Namespace, r.Pod, trace{Kind: traceGone, Time: r.Time, UID: r.UID, By: r.User, How: HowForced, Decision: r.Decision})
}

// follow tells the report what became of pods that stayed, and where several were stuck.
func (t traces) follow(r *Report) error {
	stuckNodes, stuckWorkloads := map[string]int{}, map[string]int{}
	of, workload, stuck := newPodTraces(), "", 0
	counted := func() {
		// Only where there are several, so that there is nothing to keep of the others.
		if stuck > 1 {
			stuckWorkloads[workload] = stuck
		}
	}
	var pod []byte
	for found, err := range t.all() {
		if err != nil {
			return err
		}
		if !bytes.Equal(podOf(found.key), pod) {
			pod, of = append(pod[:0], podOf(found.key)...), newPodTraces()
		}
		var what trace
		if err := json.Unmarshal(found.value, &what); err != nil {
			return err
		}
		switch what.Kind {
		case traceGone:
			of.gone(what)
		case traceOverride:
			of.override(what.Reason)
		case traceRemoval:
			if what.Workload != workload {
				counted()
				workload, stuck = what.Workload, 0
			}
			if what.Stuck && !of.stuck[what.UID] {
				of.stuck[what.UID] = true
				stuck++
				stuckNodes[what.Node]++
			}
			if then := of.after(what); what.Stays && then != nil {
				if err := r.answer(what.Number, *then); err != nil {
					return err
				}
			}
		}
	}
	counted()
	r.Totals.StuckNodes, r.Totals.StuckWorkloads = counts(stuckNodes, 2), counts(stuckWorkloads, 2)
	return nil
}

// podTraces are what came next of the pods of one name, as seen from some time.
type podTraces struct {
	// byUID are those whose UID is on record, unnamed those whose is not, and every is both.
	byUID          map[string]*nexts
	unnamed, every nexts
	stuck          map[string]bool
}

// nexts are the next departure of all, and the next that takes away a pod with a finalizer, too.
type nexts struct{ any, final *next }

type next struct {
	trace

	// override is the last before it, and overridden says that there is one.
	overridden   bool
	overrideText string
}

func newPodTraces() *podTraces {
	return &podTraces{byUID: map[string]*nexts{}, stuck: map[string]bool{}}
}

func (p *podTraces) gone(what trace) {
	of := &p.unnamed
	if what.UID != "" {
		if of = p.byUID[what.UID]; of == nil {
			of = &nexts{}
			p.byUID[what.UID] = of
		}
	}
	n := &next{trace: what}
	for _, of := range []*nexts{of, &p.every} {
		// Finalizers that are taken away do not take away a pod that is not being deleted.
		if what.How != HowStripped {
			of.any = n
		}
		// A kubelet's last delete of a held pod does not take the object away.
		if what.How != HowEnded {
			of.final = n
		}
	}
}

func (p *podTraces) override(reason string) {
	mark := func(of *nexts) {
		for _, n := range []*next{of.any, of.final} {
			if n != nil && !n.overridden {
				n.overridden, n.overrideText = true, reason
			}
		}
	}
	mark(&p.unnamed)
	mark(&p.every)
	for _, of := range p.byUID {
		mark(of)
	}
}

// after says what became of a pod; nil if nothing tells.
func (p *podTraces) after(removal trace) *Then {
	of := func(n *nexts) *next {
		if n == nil {
			return nil
		}
		if removal.Held {
			return n.final
		}
		return n.any
	}
	found, byName := of(p.byUID[removal.UID]), false
	if found == nil {
		other := &p.unnamed
		if removal.UID == "" {
			other = &p.every
		}
		found, byName = of(other), true
	}
	if found == nil {
		return nil
	}
	return &Then{
		Time: found.Time.UTC(), After: float64(found.Time.Sub(removal.Time).Microseconds()) / 1e6, By: found.By,
		How: found.How, Decision: found.Decision, Override: found.overrideText, ByName: byName,
	}
}

// Stuck says whether something of the pod was still on its node when it was to be removed, as far as anybody knew.
func (r *Removal) Stuck() bool {
	return r.Verdict == string(sandbox.Bound) || r.Verdict == string(sandbox.Unknown) && r.stays()
}
