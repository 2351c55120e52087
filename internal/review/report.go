package review

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"iter"
	"regexp"
	"slices"
	"time"
)

// Report is what a review has found, as far as a filter selects it. It is to be closed.
type Report struct {
	Untold Untold
	Totals Totals
	// Count is how many removals there are, First and Last are when the first and the last of them were.
	Count       int64
	First, Last time.Time

	filter Filter
	counts struct{ decisions, users, namespaces, nodes map[string]int }
	// rows are the removals, answers what became of their pods, both by the number of the removal; changes are in the order of time.
	rows, answers, changes *sorter
	changed                int64
}

func newReport(f Filter, memory int) *Report {
	r := &Report{filter: f, rows: newSorter(memory), answers: newSorter(memory / 2), changes: newSorter(memory / 2)}
	r.counts.decisions, r.counts.users, r.counts.namespaces, r.counts.nodes = map[string]int{}, map[string]int{}, map[string]int{}, map[string]int{}
	return r
}

// Close gives back memory and temporary files.
func (r *Report) Close() error {
	return errors.Join(r.rows.Close(), r.answers.Close(), r.changes.Close())
}

// Filter selects what a report is about. An empty list selects everything.
type Filter struct {
	Since, Until                   time.Time
	Namespaces, Users, Nodes, Pods []string
	Decisions                      []Decision
	Verdicts                       []string
}

// match is whether something is selected.
type match int

const (
	no match = iota
	// cannotTell means: what the filter asks about is not on record.
	cannotTell
	yes
)

// Removal says whether a removal is selected.
func (f Filter) Removal(r Removal) bool { return f.removal(r) == yes }

func (f Filter) removal(r Removal) match {
	if !f.covers(r.Time) || !selects(f.Namespaces, r.Namespace) || !selects(f.Users, r.User, r.ImpersonatedBy) ||
		!selects(f.Decisions, r.Decision) || !selects(f.Verdicts, r.Verdict) {
		return no
	}
	return min(f.node(r.Node), f.pod(r.Namespace, r.Pod, r.UID))
}

func (f Filter) node(node string) match {
	switch {
	case selects(f.Nodes, node):
		return yes
	case node == "":
		return cannotTell
	default:
		return no
	}
}

func (f Filter) pod(namespace, pod, uid string) match {
	switch {
	case selects(f.Pods, pod, namespace+"/"+pod, uid):
		return yes
	// Somebody may have asked for the UID.
	case pod == "" || uid == "" && slices.ContainsFunc(f.Pods, func(wanted string) bool { return uuid.MatchString(wanted) }):
		return cannotTell
	default:
		return no
	}
}

// uuid is what UIDs of pods look like; a pod may be called so, too.
var uuid = regexp.MustCompile(`^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$`)

// change says whether a change is selected: by its time and user, and by namespace, node and pod where it is about one.
func (f Filter) change(c Change) bool {
	return f.covers(c.Time) && selects(f.Users, c.User, c.ImpersonatedBy) &&
		(c.Namespace == "" || selects(f.Namespaces, c.Namespace)) &&
		(c.Kind != ChangeNode || c.Name == "" || selects(f.Nodes, c.Name)) &&
		(c.Kind != ChangeOverride && c.Kind != ChangeFinalizers || f.pod(c.Namespace, c.Name, "") != no)
}

func (f Filter) covers(t time.Time) bool {
	return (f.Since.IsZero() || !t.Before(f.Since)) && (f.Until.IsZero() || t.Before(f.Until))
}

func selects[T comparable](wanted []T, values ...T) bool {
	return len(wanted) == 0 || slices.ContainsFunc(values, func(v T) bool { return slices.Contains(wanted, v) })
}

// removal takes in a removal, if it is selected.
func (r *Report) removal(row Removal) (bool, error) {
	switch r.filter.removal(row) {
	case no:
		return false, nil
	case cannotTell:
		r.Untold.Unmatched++
		return false, nil
	case yes:
	}
	value, err := json.Marshal(row)
	if err == nil {
		err = r.rows.add(appendNumber(nil, r.Count), value)
	}
	if r.Count++; r.Count == 1 {
		r.First = row.Time
	}
	r.Last = row.Time
	r.counts.decisions[string(row.Decision)]++
	r.counts.users[row.User]++
	r.counts.namespaces[row.Namespace]++
	r.counts.nodes[row.Node]++
	return true, err
}

// change takes in a change, if it is selected. An update that sets what was set already is none: it has the whole object, whatever it
// changes. Only of a configuration everything counts. last is what was set of each object.
func (r *Report) change(c Change, last map[string]string) error {
	key := string(c.Kind) + " " + c.Object
	before, known := last[key]
	last[key] = c.Value
	if !r.filter.change(c) || known && c.Verb == "update" && c.Kind != ChangeConfiguration && c.Value != "" && c.Value == before {
		return nil
	}
	value, err := json.Marshal(c)
	if err != nil {
		return err
	}
	r.changed++
	return r.changes.add(appendNumber(nil, r.changed), value)
}

// leaveOpen counts what an event leaves open, if the filter may select it. A request has no decision then, and no verdict.
func (r *Report) leaveOpen(news told) {
	if news.Untold == (Untold{}) {
		return
	}
	f := r.filter
	f.Decisions, f.Verdicts = nil, nil
	if f.removal(news.Of) != no {
		r.Untold.add(news.Untold)
	}
}

func (r *Report) answer(number int64, then Then) error {
	value, err := json.Marshal(then)
	if err != nil {
		return err
	}
	return r.answers.add(appendNumber(nil, number), value)
}

// Removals goes through the removals in the order of time, as often as it is asked. An error is one of the temporary files.
func (r *Report) Removals() iter.Seq2[Removal, error] {
	return func(yield func(Removal, error) bool) {
		answer, stop := iter.Pull2(r.answers.all())
		defer stop()
		then, err, more := answer()
		for row, failed := range decoded[Removal](r.rows) {
			failed = errors.Join(failed, err)
			if number := row.key; failed == nil && more && bytes.Equal(then.key, number) {
				row.value.Then = new(Then)
				failed = json.Unmarshal(then.value, row.value.Then)
				then, err, more = answer()
			}
			if !yield(row.value, failed) || failed != nil {
				return
			}
		}
	}
}

// Changes goes through the changes in the order of time, as often as it is asked. An error is one of the temporary files.
func (r *Report) Changes() iter.Seq2[Change, error] {
	return func(yield func(Change, error) bool) {
		for change, err := range decoded[Change](r.changes) {
			if !yield(change.value, err) {
				return
			}
		}
	}
}

// read is a record that was read back.
type read[T any] struct {
	key   []byte
	value T
}

func decoded[T any](from *sorter) iter.Seq2[read[T], error] {
	return func(yield func(read[T], error) bool) {
		for found, err := range from.all() {
			r := read[T]{key: found.key}
			if err == nil {
				err = json.Unmarshal(found.value, &r.value)
			}
			if !yield(r, err) {
				return
			}
		}
	}
}

// Count is how often something was there.
type Count struct {
	Name  string `json:"name"`
	Count int    `json:"count"`
}

// Totals count the rows of a report.
type Totals struct {
	Decisions  []Count `json:"byDecision"`
	Users      []Count `json:"byUser"`
	Namespaces []Count `json:"byNamespace"`
	Nodes      []Count `json:"byNode"`
	// StuckNodes and StuckWorkloads count pods that were still on their node, or could not be asked about, where there is more than one.
	StuckNodes     []Count `json:"nodesWithStuckPods"`
	StuckWorkloads []Count `json:"workloadsWithStuckPods"`
}

func (r *Report) total() {
	r.Totals.Decisions, r.Totals.Users = counts(r.counts.decisions, 1), counts(r.counts.users, 1)
	r.Totals.Namespaces, r.Totals.Nodes = counts(r.counts.namespaces, 1), counts(r.counts.nodes, 1)
}

// counts are the counts of at least so many, the highest first.
func counts(of map[string]int, atLeast int) []Count {
	all := []Count{}
	for name, count := range of {
		if count >= atLeast {
			all = append(all, Count{name, count})
		}
	}
	slices.SortFunc(all, func(a, b Count) int { return cmp.Or(cmp.Compare(b.Count, a.Count), cmp.Compare(a.Name, b.Name)) })
	return all
}

// generated are the ends that controllers give to the names of pods: of a Deployment's (a hash and five letters), of a StatefulSet's
// or an indexed Job's (a number), and of all others' (five letters), from the letters that Kubernetes uses
// (k8s.io/apimachinery pkg/util/rand).
var generated = regexp.MustCompile(`(-[bcdfghjklmnpqrstvwxz2456789]{6,10}-[bcdfghjklmnpqrstvwxz2456789]{5}|-[0-9]+-[bcdfghjklmnpqrstvwxz2456789]{5}|-[0-9]+|-[bcdfghjklmnpqrstvwxz2456789]{5})$`)

// Workload is what a pod seems to belong to, by its name: an audit log does not say.
func Workload(pod string) string { return generated.ReplaceAllString(pod, "") }
