package review

import (
	"cmp"
	"encoding/json"
	"hash/maphash"
	"slices"
	"strconv"
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

// Review collects what events tell. It keeps a row for each forced removal, and 32 bytes for each other pod that goes.
type Review struct {
	guard Guard
	seed  maphash.Seed
	// events are those that have told something, by what makes them one: told twice, as by rotated files that overlap, they count once.
	events     map[uint64]told
	departures []departure
	texts      interned
}

// told is what one event has told.
type told struct {
	stage    string
	removals []Removal
	change   *Change
	untold   Untold
}

// departure is a pod that has gone in another way than by force.
type departure struct {
	// uid and name are hashes; uid is 0 where the log does not have it.
	uid, name uint64
	at        int64 // microseconds
	by        int32
	freed     bool
}

// New returns a review that has seen nothing.
func New(guard Guard) *Review {
	return &Review{guard: guard, seed: maphash.MakeSeed(), events: map[uint64]told{}}
}

// Add takes in an event, and returns the forced removals that it has told of and no event before.
func (v *Review) Add(e *auditlog.Event) []Removal {
	if d, ok := v.departureOf(e); ok {
		v.departures = append(v.departures, d)
		return nil
	}
	var news told
	news.stage = e.Stage
	news.removals = v.guard.removalsOf(e, &news.untold)
	if change, ok := v.guard.changeOf(e); ok {
		news.change = &change
	}
	for i := range news.removals {
		v.intern(&news.removals[i])
	}
	if len(news.removals) == 0 && news.change == nil && news.untold == (Untold{}) {
		return nil
	}
	// The audit ID alone does not do: a client may choose it (the header Audit-ID).
	// The moment, not its words: who collects logs may have written it in another zone.
	key := v.hash(e.AuditID, strconv.FormatInt(e.Received.UnixNano(), 10), e.User.Username, e.Verb, e.RequestURI)
	before, known := v.events[key]
	if known && (before.stage == auditlog.StageResponseComplete || before.stage == news.stage) {
		return nil
	}
	v.events[key] = news
	if known {
		return nil
	}
	return news.removals
}

func (v *Review) hash(parts ...string) uint64 {
	var h maphash.Hash
	h.SetSeed(v.seed)
	for _, part := range parts {
		// It never fails.
		_, _ = h.WriteString(part)
		_ = h.WriteByte(0)
	}
	return h.Sum64()
}

// departureOf tells of a kubelet's last delete of a pod, and of a held pod that the guard has freed.
func (v *Review) departureOf(e *auditlog.Event) (departure, bool) {
	if !e.Succeeded() || e.ObjectRef.Resource != "pods" || strings.Contains(e.RequestURI, "dryRun=") {
		return departure{}, false
	}
	freed := e.Verb == "patch" && strings.HasPrefix(e.Actor().Username, "system:serviceaccount:"+v.guard.Namespace+":")
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
	uid := cmp.Or(body.Preconditions.UID, body.Metadata.UID)
	if freed && !slices.Contains(body.Metadata.Delete, webhook.Finalizer) || !freed && (!ownKubelet(e) || e.ObjectRef.Subresource != "") {
		return departure{}, false
	}
	return departure{uid: v.uidHash(uid), name: v.nameHash(e.ObjectRef.Namespace, e.ObjectRef.Name), at: e.Received.UnixMicro(), by: v.texts.index(e.Actor().Username), freed: freed}, true
}

func (v *Review) uidHash(uid string) uint64 {
	if uid == "" {
		return 0
	}
	return v.hash("uid", uid)
}

func (v *Review) nameHash(namespace, name string) uint64 { return v.hash("name", namespace, name) }

// intern keeps once what many removals have.
func (v *Review) intern(r *Removal) {
	for _, text := range []*string{&r.User, &r.ImpersonatedBy, &r.UserAgent, &r.Namespace, &r.Node, &r.Mode, &r.Path, &r.Verdict, &r.Reason} {
		*text = v.texts.texts[v.texts.index(*text)]
	}
	for i := range r.SourceIPs {
		r.SourceIPs[i] = v.texts.texts[v.texts.index(r.SourceIPs[i])]
	}
}

// interned numbers texts.
type interned struct {
	texts   []string
	numbers map[string]int32
}

func (i *interned) index(text string) int32 {
	if n, ok := i.numbers[text]; ok {
		return n
	}
	if i.numbers == nil {
		i.numbers = map[string]int32{}
	}
	n := int32(len(i.texts)) //nolint:gosec // as many users, nodes and namespaces as a cluster has
	i.texts, i.numbers[text] = append(i.texts, text), n
	return n
}

// Report puts together what was told so far, the same whatever the order of the events.
func (v *Review) Report() Report {
	r := Report{Removals: []Removal{}, Changes: []Change{}}
	for _, t := range v.events {
		r.Removals = append(r.Removals, t.removals...)
		if t.change != nil {
			r.Changes = append(r.Changes, *t.change)
		}
		r.Untold.add(t.untold)
	}
	slices.SortFunc(r.Removals, func(a, b Removal) int {
		return cmp.Or(a.Time.Compare(b.Time), cmp.Compare(a.AuditID, b.AuditID), cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Pod, b.Pod), cmp.Compare(a.UID, b.UID))
	})
	slices.SortFunc(r.Changes, byTime)
	r.Changes = withoutRepetitions(r.Changes)
	explain(r.Removals, r.Changes, v.guard)
	v.follow(r.Removals, r.Changes)
	return r
}

// Explained says of a removal that has just come why it has slipped past, if it has, from the changes that were told before.
func (v *Review) Explained(r Removal) Removal {
	if r.Decision != SlippedPast {
		return r
	}
	var changes []Change
	for _, t := range v.events {
		if t.change != nil {
			changes = append(changes, *t.change)
		}
	}
	slices.SortFunc(changes, byTime)
	one := []Removal{r}
	explain(one, changes, v.guard)
	return one[0]
}

func byTime(a, b Change) int {
	return cmp.Or(a.Time.Compare(b.Time), cmp.Compare(a.AuditID, b.AuditID))
}

func (u *Untold) add(other Untold) {
	u.Deletes += other.Deletes
	u.Evictions += other.Evictions
	u.Collections += other.Collections
	u.Records += other.Records
}

// withoutRepetitions leaves out updates that set what was set already: an update has the whole object, whatever it changes.
func withoutRepetitions(changes []Change) []Change {
	last := map[string]string{}
	return slices.DeleteFunc(changes, func(c Change) bool {
		key := string(c.Kind) + " " + c.Object
		before, known := last[key]
		last[key] = c.value
		return known && c.verb == "update" && c.value != "" && c.value == before
	})
}

// explain says why a removal has slipped past, from the changes before it.
func explain(removals []Removal, changes []Change, guard Guard) {
	modes, deleted := map[string]string{}, false
	for i := range removals {
		r := &removals[i]
		for len(changes) > 0 && !changes[0].Time.After(r.Time) {
			switch c := changes[0]; {
			case c.Kind == ChangeMode:
				modes[c.Namespace] = c.value
			case c.Kind == ChangeConfiguration && c.Object == "validatingwebhookconfiguration "+guard.Release:
				deleted = c.verb == "delete"
			}
			changes = changes[1:]
		}
		if r.Mode == "" && r.Inferred {
			r.Mode = modes[r.Namespace]
		}
		if r.Decision != SlippedPast || r.Reason != ReasonNoTrace {
			continue
		}
		switch {
		case r.Mode == string(webhook.ModeOff):
			r.Reason = string(webhook.ReasonModeOff)
		case deleted:
			r.Reason = ReasonConfigurationDeleted
		}
	}
}

// stays says whether the removal left the pod where it was, at least for a while.
func (r *Removal) stays() bool {
	return r.Decision == Decision(webhook.Denied) || r.Decision == Unanswered || r.Decision == Decision(webhook.Held) ||
		// A collection delete that fails does so at one pod; those before it are gone.
		r.Code >= 300 && r.Path != string(webhook.PathCollection)
}

// Gone says whether the removal took the pod away at once, or its address.
func (r *Removal) Gone() bool { return !r.stays() }

// follow finds out what became of pods that stayed.
func (v *Review) follow(removals []Removal, changes []Change) {
	byUID, byName := map[uint64][]departure{}, map[uint64][]departure{}
	wanted := map[uint64]bool{}
	for _, r := range removals {
		if r.stays() {
			wanted[v.uidHash(r.UID)], wanted[v.nameHash(r.Namespace, r.Pod)] = true, true
		}
	}
	delete(wanted, 0)
	put := func(d departure) {
		if wanted[d.uid] {
			byUID[d.uid] = append(byUID[d.uid], d)
		}
		if wanted[d.name] {
			byName[d.name] = append(byName[d.name], d)
		}
	}
	for _, d := range v.departures {
		put(d)
	}
	forced := map[departure]Decision{}
	for _, r := range removals {
		if !r.stays() && r.Path != string(webhook.PathIgnoreLabel) {
			d := departure{uid: v.uidHash(r.UID), name: v.nameHash(r.Namespace, r.Pod), at: r.Time.UnixMicro(), by: v.texts.index(r.User)}
			forced[d] = r.Decision
			put(d)
		}
	}
	for i := range removals {
		r := &removals[i]
		if !r.stays() {
			continue
		}
		uid := v.uidHash(r.UID)
		at := r.Time.UnixMicro()
		first, ok := departure{}, false
		// A kubelet's last delete of a held pod does not take the object away.
		held := r.Decision == Decision(webhook.Held)
		consider := func(d departure) {
			if d.at > at && (!ok || d.at < first.at) && (!held || d.freed || forced[d] != "") {
				first, ok = d, true
			}
		}
		for _, d := range byUID[uid] {
			if uid != 0 {
				consider(d)
			}
		}
		sameName := false
		if !ok {
			for _, d := range byName[v.nameHash(r.Namespace, r.Pod)] {
				if uid == 0 || d.uid == 0 {
					consider(d)
				}
			}
			sameName = ok
		}
		if !ok {
			continue
		}
		r.Then = &Then{Time: time.UnixMicro(first.at).UTC(), After: float64(first.at-at) / 1e6, By: v.texts.texts[first.by], How: HowEnded, ByName: sameName}
		switch {
		case first.freed:
			r.Then.How = HowFreed
		case forced[first] != "":
			r.Then.How, r.Then.Decision = HowForced, forced[first]
		}
		for _, c := range changes {
			if c.Kind == ChangeOverride && c.Object == "pod "+r.Namespace+"/"+r.Pod && c.Time.After(r.Time) && !c.Time.After(r.Then.Time) {
				r.Then.Override = c.value
			}
		}
	}
}
