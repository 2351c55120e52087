package review

import (
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"time"

	"github.com/eni-guard/eni-guard/internal/auditlog"
	"github.com/eni-guard/eni-guard/webhook"
)

// Guard is where the guard is installed.
type Guard struct {
	// Namespace and Release are those of Helm.
	Namespace, Release string
	// Exempt are the namespaces that are never guarded: the chart's exemptNamespaces.
	Exempt []string
}

// keptMemory is how many bytes of what was told stay in memory, at each of four places.
const keptMemory = 1 << 20

// Review collects what events tell. Its memory is bounded, however many there are: the rest is in temporary files.
type Review struct {
	guard Guard
	// events have told something. They are in the order of time; copies of one are beside each other, the fullest first.
	events *sorter
	memory int
}

// told is what one event has told. That it has told nothing counts too: a copy of it that has less may leave something open.
type told struct {
	Removals  []Removal  `json:",omitempty"`
	Change    *Change    `json:",omitempty"`
	Departure *departure `json:",omitempty"`
	Untold    Untold     `json:",omitzero"`
	// Of is what is known of the request that something is untold of.
	Of Removal `json:",omitzero"`
}

// departure is a pod that has gone in another way than by force. Its UID is empty where the log does not have it.
type departure struct {
	Time                     time.Time
	UID, Namespace, Name, By string
	How                      How
}

// New returns a review that has seen nothing. It is to be closed.
func New(guard Guard) *Review { return newReview(guard, keptMemory) }

func newReview(guard Guard, memory int) *Review {
	return &Review{guard: guard, events: newSorter(memory), memory: memory}
}

// Close gives back memory and temporary files; a report that was made before is not touched by it.
func (v *Review) Close() error { return v.events.Close() }

// Add takes in an event. An error is one of the temporary files.
func (v *Review) Add(e *auditlog.Event) error {
	news, tells := v.guard.tells(e)
	if !tells {
		return nil
	}
	value, err := json.Marshal(news)
	if err != nil {
		return err
	}
	return v.events.add(append(eventKey(e), lacks(e)), value)
}

// tells returns what an event tells by itself.
func (g Guard) tells(e *auditlog.Event) (told, bool) {
	if d, ok := g.departureOf(e); ok {
		return told{Departure: &d}, true
	}
	news := told{}
	news.Removals = g.removalsOf(e, &news.Untold)
	if change, ok := g.changeOf(e); ok {
		news.Change = &change
	}
	path, ok := pathOf(e)
	if news.Untold != (Untold{}) {
		r := request{Event: e, guard: g, path: path}
		news.Of = r.base()
	}
	removes := ok && path != pathUpdate
	return news, removes || len(news.Removals) > 0 || news.Change != nil
}

// identitySize is that of what two copies of an event have in common, in bytes: a time, what comes first at that time, and a hash.
const identitySize = 8 + 1 + 16

// eventKey is the same for copies of one event, and sorts by time. The audit ID alone does not do: a client may choose it (the header
// Audit-ID). What pods go by comes before pods: a change counts for a removal at the same time.
func eventKey(e *auditlog.Event) []byte {
	key := appendTime(make([]byte, 0, identitySize+1), e.Received)
	class := byte(0)
	if e.ObjectRef.Resource == "pods" {
		class = 1
	}
	// Nobody may find another event with the same hash, to hide one behind it.
	hash := sha256.Sum256([]byte(strings.Join([]string{e.AuditID, e.User.Username, e.Verb, e.RequestURI}, "\x00")))
	return append(append(key, class), hash[:16]...)
}

// appendTime appends a moment so that a later one sorts after it; who collects logs may have written it in another zone.
func appendTime(to []byte, t time.Time) []byte {
	return binary.BigEndian.AppendUint64(to, uint64(t.UnixNano())^1<<63)
}

// lacks is the less, the more a copy of an event has. Backends may record one event at several levels, and cut off large ones.
func lacks(e *auditlog.Event) byte {
	var lacking byte
	for _, there := range []bool{
		e.Stage == auditlog.StageResponseComplete, len(e.Annotations) > 0, len(e.ResponseObject) > 0, len(e.RequestObject) > 0, e.ResponseStatus.Code != 0,
	} {
		lacking <<= 1
		if !there {
			lacking++
		}
	}
	return lacking
}

// departureOf tells of a kubelet's last delete of a pod, and of a held pod that the guard has freed.
func (g Guard) departureOf(e *auditlog.Event) (departure, bool) {
	if !e.Succeeded() || e.ObjectRef.Resource != "pods" || e.DryRun() {
		return departure{}, false
	}
	freed := e.Verb == "patch" && g.isGuard(e.User)
	var body struct {
		Preconditions struct{ UID string }
		Metadata      struct {
			UID    string
			Delete []string `json:"$deleteFromPrimitiveList/finalizers"`
		}
	}
	if len(e.RequestObject) > 0 && json.Unmarshal(e.RequestObject, &body) != nil {
		return departure{}, false
	}
	if freed && !slices.Contains(body.Metadata.Delete, webhook.Finalizer) || !freed && (!ownKubelet(e) || e.ObjectRef.Subresource != "") {
		return departure{}, false
	}
	d := departure{Time: e.Received, UID: cmp.Or(body.Preconditions.UID, body.Metadata.UID), Namespace: e.ObjectRef.Namespace, Name: e.ObjectRef.Name, By: e.Actor().Username, How: HowEnded}
	if freed {
		d.How = HowFreed
	}
	return d, true
}

// Report puts together what was told so far and what a filter selects of it, the same whatever the order of the events. It is to be closed. An
// error is one of the temporary files.
func (v *Review) Report(f Filter) (*Report, error) {
	r := newReport(f, v.memory)
	err := v.report(r)
	if err != nil {
		return nil, errors.Join(err, r.Close())
	}
	return r, nil
}

func (v *Review) report(r *Report) error {
	t := traces{newSorter(v.memory)}
	defer t.Close()
	explain := newExplainer(v.guard)
	last := map[string]string{}
	var before []byte
	for event, err := range v.events.all() {
		if err != nil {
			return err
		}
		identity := event.key[:identitySize]
		if slices.Equal(identity, before) {
			continue
		}
		before = append(before[:0], identity...)
		var news told
		if err := json.Unmarshal(event.value, &news); err != nil {
			return err
		}
		if c := news.Change; c != nil {
			explain.change(*c)
			if err := errors.Join(t.change(*c), r.change(*c, last)); err != nil {
				return err
			}
		}
		if d := news.Departure; d != nil {
			if err := t.departure(*d); err != nil {
				return err
			}
		}
		r.leaveOpen(news)
		for _, row := range news.Removals {
			explain.removal(&row)
			selected, err := r.removal(row)
			if err == nil {
				err = t.removal(row, selected, r.Count-1)
			}
			if err != nil {
				return err
			}
		}
	}
	r.total()
	return t.follow(r)
}

// explainer knows what was changed so far, and says why a removal has slipped past.
type explainer struct {
	guard Guard
	modes map[string]string
	// configuration is what was done to the guard's that may explain it: a reason, or nothing.
	configuration string
}

func newExplainer(guard Guard) *explainer {
	return &explainer{guard: guard, modes: map[string]string{}}
}

func (x *explainer) change(c Change) {
	switch {
	case c.Kind == ChangeMode:
		x.modes[c.Namespace] = c.Value
	case c.Kind == ChangeConfiguration && (c.Object == x.guard.configuration() || c.Object == allConfigurations):
		switch c.Value {
		case gone:
			x.configuration = ReasonConfigurationDeleted
		case narrowed:
			x.configuration = ReasonConfigurationNarrowed
		case "": // something else of it
		default:
			x.configuration = ""
		}
	}
}

func (x *explainer) removal(r *Removal) {
	if r.Mode == "" && r.Inferred {
		r.Mode = x.modes[r.Namespace]
	}
	if r.Decision != SlippedPast || r.Reason != ReasonNoTrace {
		return
	}
	switch {
	case r.Mode == string(webhook.ModeOff):
		r.Reason = string(webhook.ReasonModeOff)
	case x.configuration != "":
		r.Reason = x.configuration
	}
}

// rememberedEvents is how many events a Live review knows again. Copies of one stand close together in a log.
const rememberedEvents = 1 << 16

// Live tells removals as they come, each once.
type Live struct {
	// Untold counts what the events so far have left open.
	Untold Untold

	explain *explainer
	known   map[string]bool
	// order is that in which the known ones came, a ring.
	order []string
	next  int
}

// NewLive returns a review of a log that is still written.
func NewLive(guard Guard) *Live {
	return &Live{explain: newExplainer(guard), known: map[string]bool{}, order: make([]string, rememberedEvents)}
}

// Add takes in an event, and returns the forced removals that it has told of and no event before.
func (l *Live) Add(e *auditlog.Event) []Removal {
	news, _ := l.explain.guard.tells(e)
	if len(news.Removals) == 0 && news.Change == nil && news.Untold == (Untold{}) {
		return nil
	}
	key := string(eventKey(e))
	if l.known[key] {
		return nil
	}
	delete(l.known, l.order[l.next])
	l.known[key], l.order[l.next] = true, key
	l.next = (l.next + 1) % len(l.order)
	l.Untold.add(news.Untold)
	if news.Change != nil {
		l.explain.change(*news.Change)
	}
	for i := range news.Removals {
		l.explain.removal(&news.Removals[i])
	}
	return news.Removals
}

func (u *Untold) add(other Untold) {
	u.Deletes += other.Deletes
	u.Evictions += other.Evictions
	u.Collections += other.Collections
	u.Records += other.Records
	u.Unmatched += other.Unmatched
}

// appendNumber appends a number so that a larger one sorts after it.
func appendNumber(to []byte, n int64) []byte {
	return binary.BigEndian.AppendUint64(to, uint64(n)) //nolint:gosec // counts
}
