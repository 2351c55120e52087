package review

import (
	"cmp"
	"regexp"
	"slices"
	"time"

	"github.com/eni-guard/eni-guard/internal/sandbox"
)

// Report is what a review has found.
type Report struct {
	// Removals and Changes are in the order of time.
	Removals []Removal `json:"removals"`
	Changes  []Change  `json:"changes"`
	Untold   Untold    `json:"untold"`
}

// Filter selects what a report is about. An empty list selects everything.
type Filter struct {
	Since, Until                   time.Time
	Namespaces, Users, Nodes, Pods []string
	Decisions                      []Decision
	Verdicts                       []string
}

// Select returns the part of a report that a filter selects. Changes are selected by time, namespace and user only.
func (r Report) Select(f Filter) Report {
	r.Removals = slices.DeleteFunc(slices.Clone(r.Removals), func(row Removal) bool {
		return !f.covers(row.Time) || !selects(f.Namespaces, row.Namespace) || !selects(f.Users, row.User, row.ImpersonatedBy) ||
			!selects(f.Nodes, row.Node) || !selects(f.Pods, row.Pod, row.Namespace+"/"+row.Pod, row.UID) ||
			!selects(f.Decisions, row.Decision) || !selects(f.Verdicts, row.Verdict)
	})
	r.Changes = slices.DeleteFunc(slices.Clone(r.Changes), func(c Change) bool {
		return !f.covers(c.Time) || c.Namespace != "" && !selects(f.Namespaces, c.Namespace) || !selects(f.Users, c.User, c.ImpersonatedBy)
	})
	return r
}

func (f Filter) covers(t time.Time) bool {
	return (f.Since.IsZero() || !t.Before(f.Since)) && (f.Until.IsZero() || t.Before(f.Until))
}

func selects[T comparable](wanted []T, values ...T) bool {
	return len(wanted) == 0 || slices.ContainsFunc(values, func(v T) bool { return slices.Contains(wanted, v) })
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

// Totals counts.
func (r Report) Totals() Totals {
	decisions, users, namespaces, nodes := map[string]int{}, map[string]int{}, map[string]int{}, map[string]int{}
	stuckNodes, stuckWorkloads := map[string]int{}, map[string]int{}
	seen := map[string]bool{}
	for _, row := range r.Removals {
		decisions[string(row.Decision)]++
		users[row.User]++
		namespaces[row.Namespace]++
		nodes[row.Node]++
		pod := row.Namespace + "/" + row.Pod + " " + row.UID
		if row.Stuck() && !seen[pod] {
			seen[pod] = true
			stuckNodes[row.Node]++
			stuckWorkloads[row.Namespace+"/"+Workload(row.Pod)]++
		}
	}
	return Totals{
		Decisions: counts(decisions, 1), Users: counts(users, 1), Namespaces: counts(namespaces, 1), Nodes: counts(nodes, 1),
		StuckNodes: counts(stuckNodes, 2), StuckWorkloads: counts(stuckWorkloads, 2),
	}
}

// Stuck says whether something of the pod was still on its node when it was to be removed, as far as anybody knew.
func (r *Removal) Stuck() bool {
	return r.Verdict == string(sandbox.Bound) || r.Verdict == string(sandbox.Unknown) && r.stays()
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
