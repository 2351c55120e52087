package review

import (
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"

	"github.com/eni-guard/eni-guard/internal/auditlog"
	"github.com/eni-guard/eni-guard/webhook"
)

// Change is something that somebody has done to the guard, or to what it goes by.
type Change struct {
	Time           time.Time `json:"time"`
	User           string    `json:"user"`
	ImpersonatedBy string    `json:"impersonatedBy,omitempty"`
	// Kind is what was changed.
	Kind ChangeKind `json:"kind"`
	// Object is "RESOURCE NAME", or "RESOURCE NAMESPACE/NAME".
	Object    string `json:"object"`
	Namespace string `json:"namespace,omitempty"`
	What      string `json:"what"`
	// Weakens says that less was guarded afterwards.
	Weakens bool   `json:"weakens"`
	AuditID string `json:"auditID"`

	// value is what was set; a change that sets the same again is none.
	value string
	verb  string
}

// ChangeKind is what was changed.
type ChangeKind string

// The kinds of changes.
const (
	ChangeMode          ChangeKind = "mode"
	ChangeOverride      ChangeKind = "override"
	ChangeConfiguration ChangeKind = "configuration"
	ChangeWorkload      ChangeKind = "workload"
	ChangeNode          ChangeKind = "node"
)

// kinds are the resources of the guard's configuration, and what one object of each is called.
var kinds = map[string]string{
	"validatingwebhookconfigurations":   "validatingwebhookconfiguration",
	"validatingadmissionpolicies":       "validatingadmissionpolicy",
	"validatingadmissionpolicybindings": "validatingadmissionpolicybinding",
}

const outOfServiceTaint = corev1.TaintNodeOutOfService

// written is what is read of the body of a change: an object, a merge patch of one, or a JSON patch (RFC 6902).
type written struct {
	Metadata struct {
		Labels, Annotations map[string]*string
	}
	Spec struct {
		Replicas *int32
		Taints   []struct {
			Key, Effect string
			Patch       string `json:"$patch"`
		}
	}
	Webhooks []hook
}

type hook struct {
	Name          string
	FailurePolicy *admissionregistrationv1.FailurePolicyType
}

// readWritten reads the body of a change. It fails where there is none, and where it is none of the three.
func readWritten(body []byte) (w written, ok bool) {
	if len(body) == 0 {
		return w, false
	}
	var operations []struct {
		Path  string
		Value any
	}
	if body[0] != '[' {
		return w, json.Unmarshal(body, &w) == nil
	}
	if json.Unmarshal(body, &operations) != nil {
		return w, false
	}
	for _, operation := range operations {
		// What an operation writes at a path, as the merge patch that does the same; what it takes away as null.
		value := operation.Value
		for _, part := range slices.Backward(strings.Split(strings.TrimPrefix(operation.Path, "/"), "/")) {
			part = strings.NewReplacer("~1", "/", "~0", "~").Replace(part)
			if _, err := strconv.Atoi(part); err == nil || part == "-" {
				value = []any{value}
			} else {
				value = map[string]any{part: value}
			}
		}
		// It was JSON, so it is again.
		patch, _ := json.Marshal(value)
		if json.Unmarshal(patch, &w) != nil {
			return w, false
		}
	}
	return w, true
}

// changeOf returns what an event has changed about the guard, if it has.
func (g Guard) changeOf(e *auditlog.Event) (Change, bool) {
	if !e.Succeeded() || strings.Contains(e.RequestURI, "dryRun=") || strings.Contains(string(e.RequestObject), `"dryRun":[`) {
		return Change{}, false
	}
	ref := e.ObjectRef
	name := ref.Name
	body, bodied := readWritten(e.RequestObject)
	c := Change{Time: e.Received, User: e.Actor().Username, AuditID: e.AuditID, verb: e.Verb}
	if e.User.Username != c.User {
		c.ImpersonatedBy = e.User.Username
	}
	found := false
	switch {
	case ref.Resource == "namespaces" && ref.Subresource == "":
		c.Kind, c.Object, c.Namespace = ChangeMode, "namespace "+name, name
		found = c.mode(e.Verb, body, bodied)
	case ref.Resource == "pods" && ref.Subresource == "":
		c.Kind, c.Object, c.Namespace = ChangeOverride, "pod "+ref.Namespace+"/"+name, ref.Namespace
		found = c.override(e.Verb, body)
	case ref.Resource == "nodes" && ref.Subresource == "":
		c.Kind, c.Object = ChangeNode, "node "+name
		found = c.node(e.Verb, body)
	case kinds[ref.Resource] != "":
		c.Kind, c.Object = ChangeConfiguration, kinds[ref.Resource]+" "+name
		found = g.owns(ref.Resource, name, body)
		c.configuration(e.Verb, body, bodied)
	case (ref.Resource == "deployments" || ref.Resource == "daemonsets") && ref.Namespace == g.Namespace:
		c.Kind, c.Object, c.Namespace = ChangeWorkload, strings.TrimSuffix(ref.Resource, "s")+" "+ref.Namespace+"/"+name, ref.Namespace
		found = strings.HasPrefix(name, g.Release+"-") && c.workload(e.Verb, ref.Subresource, body)
	}
	return c, found
}

// owns says whether an object of admissionregistration.k8s.io is the guard's: by the names that the chart gives, or by the webhook in it.
func (g Guard) owns(resource, name string, body written) bool {
	if resource == "validatingwebhookconfigurations" {
		return name == g.Release || name == g.Release+"-failing-open" ||
			slices.ContainsFunc(body.Webhooks, func(h hook) bool { return h.Name == webhookName })
	}
	return strings.HasSuffix(name, "eni-guard.io")
}

func (c *Change) mode(verb string, body written, bodied bool) bool {
	if !bodied || verb == "delete" {
		return false
	}
	mode, mentioned := body.Metadata.Labels[webhook.ModeLabel]
	switch {
	case mode != nil:
		c.value, c.What = *mode, "mode "+*mode
		c.Weakens = *mode == string(webhook.ModeOff) || *mode == string(webhook.ModeAudit)
	case mentioned:
		c.What = "label of the mode taken away"
	default:
		return false
	}
	return true
}

func (c *Change) override(verb string, body written) bool {
	reason, mentioned := body.Metadata.Annotations[webhook.OverrideAnnotation]
	switch {
	case verb == "delete" || !mentioned:
		return false
	case reason == nil:
		c.What = "override taken away"
	default:
		c.value, c.What, c.Weakens = *reason, fmt.Sprintf("override: %q", *reason), true
		if until := body.Metadata.Annotations[webhook.OverrideUntilAnnotation]; until != nil {
			c.What += " until " + *until
		}
	}
	return true
}

func (c *Change) node(verb string, body written) bool {
	if verb == "delete" {
		c.What, c.Weakens = "deleted", true
		return true
	}
	for _, taint := range body.Spec.Taints {
		if taint.Key == outOfServiceTaint && taint.Patch != "delete" {
			c.What, c.value, c.Weakens = "taint "+outOfServiceTaint, outOfServiceTaint, true
			return true
		}
	}
	if verb != "patch" {
		return false
	}
	for _, label := range []string{"type", "kubernetes.io/os"} {
		if value := body.Metadata.Labels[label]; value != nil && (*value == "virtual-kubelet" || *value == "windows") {
			c.What, c.value, c.Weakens = "label "+label+"="+*value, *value, true
			return true
		}
	}
	return false
}

func (c *Change) configuration(verb string, body written, bodied bool) {
	switch verb {
	case "delete":
		c.What, c.Weakens = "deleted", true
		return
	case "create":
		c.What = "created"
	default:
		c.What = "changed"
	}
	if !bodied {
		c.What += ", to what is not on record"
	}
	for _, hook := range body.Webhooks {
		if policy := hook.FailurePolicy; policy != nil && !strings.HasSuffix(c.Object, "-failing-open") {
			c.What += fmt.Sprintf(", failurePolicy %s", *policy)
			c.Weakens = *policy == admissionregistrationv1.Ignore
		}
	}
}

func (c *Change) workload(verb, subresource string, body written) bool {
	switch {
	case verb == "delete" || verb == "deletecollection":
		c.What, c.Weakens = "deleted", true
	case subresource != "" && subresource != "scale":
		return false
	case body.Spec.Replicas != nil:
		c.value = fmt.Sprint(*body.Spec.Replicas)
		c.What, c.Weakens = "replicas "+c.value, *body.Spec.Replicas == 0
	case verb == "create":
		c.What = "created"
	default:
		c.What = "changed"
	}
	return true
}
