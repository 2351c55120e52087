package review

import (
	"fmt"
	"strings"

	"github.com/eni-guard/eni-guard/internal/auditlog"
)

// Check finds out whether the audit policy that a log was recorded with has what a review needs. A log shows that only of what has
// happened while it was recorded.
type Check struct {
	guard Guard
	seen  [len(needs)]Need
}

// Need is one thing that a review needs, and whether a log has it.
type Need struct {
	// What is recorded, and Why.
	What string `json:"what"`
	Why  string `json:"why"`
	// Level is the least level of audit that has it.
	Level string `json:"level"`
	// Seen counts requests of the kind, Lacking those that are recorded with less.
	Seen    int64 `json:"seen"`
	Lacking int64 `json:"lacking"`
	// Example is the audit ID of one that is lacking, and AtLevel its level.
	Example string `json:"example,omitempty"`
	AtLevel string `json:"atLevel,omitempty"`
}

// needs are what docs/audit.md has an audit policy for, each with what tells that an event is of the kind.
var needs = [...]struct {
	Need
	is func(Guard, *auditlog.Event) bool
}{
	{Need{What: "deletes of pods", Why: "whether they are forced, and which pod on which node they were about", Level: "RequestResponse"}, func(_ Guard, e *auditlog.Event) bool {
		return onPods(e) && e.ObjectRef.Subresource == "" && (e.Verb == "delete" || e.Verb == "deletecollection") && !ownKubelet(e)
	}},
	{Need{What: "kubelets' deletes of pods", Why: "when a pod that was refused had ended", Level: "Request"}, func(_ Guard, e *auditlog.Event) bool {
		return onPods(e) && e.ObjectRef.Subresource == "" && ownKubelet(e)
	}},
	{Need{What: "evictions", Why: "whether they are forced", Level: "Request"}, func(_ Guard, e *auditlog.Event) bool {
		return onPods(e) && e.ObjectRef.Subresource == "eviction"
	}},
	{Need{What: "changes of pods", Why: "overrides, and labels and finalizers that were taken away", Level: "Request"}, func(_ Guard, e *auditlog.Event) bool {
		return onPods(e) && e.ObjectRef.Subresource == "" && changes(e)
	}},
	{Need{What: "changes of namespaces", Why: "modes", Level: "Request"}, func(_ Guard, e *auditlog.Event) bool {
		return e.ObjectRef.Resource == "namespaces" && e.ObjectRef.Subresource == "" && changes(e)
	}},
	{Need{What: "changes of nodes", Why: "what lets pods go without a question", Level: "Request"}, func(_ Guard, e *auditlog.Event) bool {
		return e.ObjectRef.Resource == "nodes" && e.ObjectRef.Subresource == "" && changes(e)
	}},
	{Need{What: "changes of webhook configurations", Why: "whether the guard was asked at all", Level: "Request"}, func(_ Guard, e *auditlog.Event) bool {
		return e.ObjectRef.Resource == "validatingwebhookconfigurations" && changes(e)
	}},
	{Need{What: "changes of the guard's workloads", Why: "whether it ran", Level: "Request"}, func(g Guard, e *auditlog.Event) bool {
		return (e.ObjectRef.Resource == "deployments" || e.ObjectRef.Resource == "daemonsets") && e.ObjectRef.Namespace == g.Namespace &&
			(e.ObjectRef.Subresource == "" || e.ObjectRef.Subresource == "scale") && changes(e)
	}},
	{Need{What: "changes of roles and bindings", Why: "who may override", Level: "RequestResponse"}, func(_ Guard, e *auditlog.Event) bool {
		return rights[e.ObjectRef.Resource] != "" && changes(e)
	}},
}

func onPods(e *auditlog.Event) bool { return e.ObjectRef.Resource == "pods" }

func changes(e *auditlog.Event) bool {
	return e.Verb == "create" || e.Verb == "update" || e.Verb == "patch"
}

// NewCheck returns a check that has seen nothing.
func NewCheck(guard Guard) *Check {
	c := &Check{guard: guard}
	for i, need := range needs {
		c.seen[i] = need.Need
	}
	return c
}

// levels are the levels of audit, from the least on (k8s.io/apiserver pkg/apis/audit).
const levels = "None Metadata Request RequestResponse"

// Add takes in an event. Refused requests count too: they are recorded at the same level.
func (c *Check) Add(e *auditlog.Event) {
	for i, need := range needs {
		if !need.is(c.guard, e) {
			continue
		}
		seen := &c.seen[i]
		seen.Seen++
		if strings.Index(levels, e.Level) < strings.Index(levels, need.Level) || e.Annotations["audit.k8s.io/truncated"] == "true" {
			seen.Lacking++
			seen.Example, seen.AtLevel = e.AuditID, e.Level
		}
	}
}

// Needs are all needs, as far as was seen.
func (c *Check) Needs() []Need { return c.seen[:] }

// Verdict says in words whether the log has what is needed.
func (n Need) Verdict() string {
	switch {
	case n.Lacking > 0:
		return fmt.Sprintf("lacking: %d of %d, such as %s, at level %s", n.Lacking, n.Seen, n.Example, n.AtLevel)
	case n.Seen == 0:
		return "not seen"
	default:
		return fmt.Sprintf("there: all %d", n.Seen)
	}
}
