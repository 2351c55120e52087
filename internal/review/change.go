package review

import (
	"cmp"
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
	Object string `json:"object"`
	// Namespace is whose pods it is about; empty if it is about those of all, as all is that is done to the guard itself.
	Namespace string `json:"namespace,omitempty"`
	What      string `json:"what"`
	// Weakens says that less was guarded afterwards.
	Weakens bool   `json:"weakens"`
	AuditID string `json:"auditID"`

	// Value is what was set, and Verb that of the request. An update that sets the same again is no change.
	Value string `json:"value,omitempty"`
	Verb  string `json:"verb"`
	// Name is that of the object; empty for a collection.
	Name string `json:"name,omitempty"`
}

// ChangeKind is what was changed.
type ChangeKind string

// The kinds of changes.
const (
	ChangeMode          ChangeKind = "mode"
	ChangeOverride      ChangeKind = "override"
	ChangeFinalizers    ChangeKind = "finalizers"
	ChangeConfiguration ChangeKind = "configuration"
	ChangeWorkload      ChangeKind = "workload"
	ChangeNode          ChangeKind = "node"
	ChangeRight         ChangeKind = "right"
)

// kinds are the resources of the guard's configuration, and what one object of each is called.
var kinds = map[string]string{
	"validatingwebhookconfigurations":   "validatingwebhookconfiguration",
	"validatingadmissionpolicies":       "validatingadmissionpolicy",
	"validatingadmissionpolicybindings": "validatingadmissionpolicybinding",
}

// rights are the resources that say who may override, and what one object of each is called.
var rights = map[string]string{
	"clusterroles": "clusterrole", "roles": "role", "clusterrolebindings": "clusterrolebinding", "rolebindings": "rolebinding",
}

// allConfigurations is what a delete of a collection of webhook configurations is about.
const allConfigurations = "validatingwebhookconfiguration " + collection

// collection is the name of what was deleted by a selector: the log does not say which objects that were.
const collection = "(all, or those of a selector)"

// configuration is the object of the guard's configuration that fails closed.
func (g Guard) configuration() string { return "validatingwebhookconfiguration " + g.Release }

// overrideGroup and forceDeletes are the resource that the right to override is about.
const overrideGroup, forceDeletes = "eni-guard.io", "forcedeletes"

// copied starts a value that a patch has taken from elsewhere in the object, which the log does not have. No label can be so.
const copied = "copied from "

// gone is the value of a configuration that was deleted, or whose webhook was; narrowed of one that is asked about something else. All others
// have that of the failure policy.
const gone, narrowed = "gone", "narrowed"

const outOfServiceTaint = corev1.TaintNodeOutOfService

// written is what is read of the body of a change: an object, a merge patch of one, or a JSON patch (RFC 6902). Lists that are not mentioned
// are empty, and "null" where they are taken away.
type written struct {
	// Kind is that of a whole object; a patch that says what changes has none.
	Kind     string
	Metadata struct {
		Name                string
		Labels, Annotations map[string]*string
		Finalizers          json.RawMessage
		Taken               []string `json:"$deleteFromPrimitiveList/finalizers"`
	}
	Spec struct {
		Replicas *int32
		Taints   []struct {
			Key, Effect string
			Patch       string `json:"$patch"`
		}
	}
	Webhooks json.RawMessage
	Rules    []rule
	RoleRef  struct{ Name string }
	Subjects []struct{ Kind, Namespace, Name string }
}

// hook is a webhook of a configuration.
type hook struct {
	Name          string
	FailurePolicy *admissionregistrationv1.FailurePolicyType
	Patch         string `json:"$patch"`
	// What it is asked about, and who answers.
	Rules, MatchConditions, NamespaceSelector, ObjectSelector json.RawMessage
	ClientConfig                                              struct{ URL, Service json.RawMessage }
}

// hooks are the webhooks of a body; nil stands for one that is taken away.
func (w written) hooks() []*hook {
	var hooks []*hook
	if len(w.Webhooks) > 0 && (json.Unmarshal(w.Webhooks, &hooks) != nil || len(hooks) == 0) {
		return []*hook{nil}
	}
	return hooks
}

// narrowed names what a webhook is asked about, as far as a patch mentions it.
func (h *hook) narrowed() []string {
	var fields []string
	for _, field := range []struct {
		name  string
		value json.RawMessage
	}{
		{"rules", h.Rules}, {"matchConditions", h.MatchConditions}, {"namespaceSelector", h.NamespaceSelector}, {"objectSelector", h.ObjectSelector},
		{"clientConfig.service", h.ClientConfig.Service}, {"clientConfig.url", h.ClientConfig.URL},
	} {
		if len(field.value) > 0 {
			fields = append(fields, field.name)
		}
	}
	return fields
}

type rule struct{ Verbs, APIGroups, Resources []string }

// readWritten reads the body of a change. It fails where there is none, and where it is none of the three.
func readWritten(body []byte) (w written, ok bool) {
	if len(body) == 0 {
		return w, false
	}
	var operations []struct {
		Op, Path, From string
		Value          any
	}
	if body[0] != '[' {
		return w, json.Unmarshal(body, &w) == nil
	}
	if json.Unmarshal(body, &operations) != nil {
		return w, false
	}
	var all any
	for _, operation := range operations {
		// What an operation writes at a path, as the merge patch that does the same; what it takes away as null.
		value := operation.Value
		switch operation.Op {
		case "test":
			continue
		case "copy", "move":
			value = copied + operation.From
		}
		// The first part is before the first slash.
		for _, part := range slices.Backward(strings.Split(operation.Path, "/")[1:]) {
			part = strings.NewReplacer("~1", "/", "~0", "~").Replace(part)
			if _, err := strconv.Atoi(part); err == nil || part == "-" {
				value = []any{value}
			} else {
				value = map[string]any{part: value}
			}
		}
		all = together(all, value)
	}
	// It was JSON, so it is again.
	patch, _ := json.Marshal(all)
	return w, json.Unmarshal(patch, &w) == nil
}

// together is what two operations write, one after the other. Numbers of items are not known here, so lists have the items of both.
func together(before, after any) any {
	switch after := after.(type) {
	case map[string]any:
		if before, ok := before.(map[string]any); ok {
			for key, value := range after {
				before[key] = together(before[key], value)
			}
			return before
		}
	case []any:
		if before, ok := before.([]any); ok {
			return append(before, after...)
		}
	}
	return after
}

// changeOf returns what an event has changed about the guard, if it has.
func (g Guard) changeOf(e *auditlog.Event) (Change, bool) {
	if !e.Succeeded() || e.DryRun() {
		return Change{}, false
	}
	ref := e.ObjectRef
	name := ref.Name
	if e.Verb == "deletecollection" {
		name = collection
	}
	body, bodied := readWritten(e.RequestObject)
	c := Change{Time: e.Received.UTC(), User: e.Actor().Username, AuditID: e.AuditID, Verb: e.Verb, Name: ref.Name}
	if impersonates(e) {
		c.ImpersonatedBy = e.User.Username
	}
	found := false
	switch {
	case ref.Resource == "namespaces" && ref.Subresource == "":
		c.Kind, c.Object, c.Namespace = ChangeMode, "namespace "+name, name
		found = c.mode(e.Verb, body, bodied)
		if e.Verb == "delete" && name == g.Namespace {
			c.Kind, c.Namespace, c.What, c.Weakens, found = ChangeWorkload, "", "deleted, with all of the guard", true, true
		}
	case ref.Resource == "pods" && ref.Subresource == "":
		c.Kind, c.Object, c.Namespace = ChangeOverride, "pod "+ref.Namespace+"/"+name, ref.Namespace
		found = c.override(e.Verb, body) || c.finalizers(e.Verb, body)
	case ref.Resource == "nodes" && ref.Subresource == "":
		c.Kind, c.Object = ChangeNode, "node "+name
		found = c.node(e.Verb, body)
	case kinds[ref.Resource] != "":
		c.Kind, c.Object = ChangeConfiguration, kinds[ref.Resource]+" "+name
		found = e.Verb == "deletecollection" || g.owns(ref.Resource, name, body)
		c.configuration(e.Verb, body, bodied)
	case (ref.Resource == "deployments" || ref.Resource == "daemonsets") && ref.Namespace == g.Namespace:
		c.Kind, c.Object = ChangeWorkload, strings.TrimSuffix(ref.Resource, "s")+" "+ref.Namespace+"/"+name
		found = (e.Verb == "deletecollection" || strings.HasPrefix(name, g.Release+"-")) && c.workload(e.Verb, ref.Subresource, body)
	case rights[ref.Resource] != "":
		// The answer has the whole object, also where a patch has only a part of it, and a name that the API server has made.
		if whole, ok := readWritten(e.ResponseObject); ok && (whole.RoleRef.Name != "" || len(whole.Rules) > 0) {
			body, name = whole, cmp.Or(name, whole.Metadata.Name)
			c.Name = name
		}
		c.Kind, c.Object = ChangeRight, rights[ref.Resource]+" "+name
		if ref.Namespace != "" {
			c.Object = rights[ref.Resource] + " " + ref.Namespace + "/" + name
		}
		if ref.Namespace != g.Namespace {
			c.Namespace = ref.Namespace
		}
		found = c.right(g, e.Verb, body)
	}
	return c, found
}

// owns says whether an object of admissionregistration.k8s.io is the guard's: by the names that the chart gives, or by the webhook in it.
func (g Guard) owns(resource, name string, body written) bool {
	if resource == "validatingwebhookconfigurations" {
		return name == g.Release || name == g.Release+"-failing-open" ||
			slices.ContainsFunc(body.hooks(), func(h *hook) bool { return h != nil && h.Name == webhookName })
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
		c.Value, c.What = *mode, "mode "+*mode
		c.Weakens = *mode == string(webhook.ModeOff) || *mode == string(webhook.ModeAudit) || strings.HasPrefix(*mode, copied)
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
		c.Value, c.What, c.Weakens = *reason, fmt.Sprintf("override: %q", *reason), true
		if until := body.Metadata.Annotations[webhook.OverrideUntilAnnotation]; until != nil {
			c.What += " until " + *until
		}
	}
	return true
}

// takesFinalizers says whether a patch leaves no finalizer of those it mentions.
func (w written) takesFinalizers() bool {
	var left []*string
	if len(w.Metadata.Finalizers) == 0 || json.Unmarshal(w.Metadata.Finalizers, &left) != nil {
		return false
	}
	return !slices.ContainsFunc(left, func(name *string) bool { return name != nil })
}

// finalizers is a change that takes finalizers from a pod without saying which. One that names the guard's is a removal.
func (c *Change) finalizers(verb string, body written) bool {
	if verb != "patch" || !body.takesFinalizers() {
		return false
	}
	c.Kind, c.What, c.Weakens = ChangeFinalizers, "finalizers taken away", true
	return true
}

func (c *Change) node(verb string, body written) bool {
	if verb == "delete" || verb == "deletecollection" {
		c.What, c.Weakens = "deleted", true
		return true
	}
	for _, taint := range body.Spec.Taints {
		if taint.Key == outOfServiceTaint && taint.Patch != "delete" {
			c.What, c.Value, c.Weakens = "taint "+outOfServiceTaint, outOfServiceTaint, true
			return true
		}
	}
	if verb != "patch" {
		return false
	}
	for _, label := range []string{"type", "kubernetes.io/os"} {
		if value := body.Metadata.Labels[label]; value != nil && (*value == "virtual-kubelet" || *value == "windows") {
			c.What, c.Value, c.Weakens = "label "+label+"="+*value, *value, true
			return true
		}
	}
	return false
}

func (c *Change) configuration(verb string, body written, bodied bool) {
	switch verb {
	case "delete", "deletecollection":
		c.What, c.Value, c.Weakens = "deleted", gone, true
		return
	case "create":
		c.What = "created"
	default:
		c.What = "changed"
	}
	if !bodied {
		c.What += ", to what is not on record"
	}
	for _, hook := range body.hooks() {
		if hook == nil || hook.Patch == "delete" {
			c.What, c.Value, c.Weakens = c.What+", a webhook taken away", gone, true
			continue
		}
		if policy := hook.FailurePolicy; policy != nil && !strings.HasSuffix(c.Object, "-failing-open") {
			c.What += fmt.Sprintf(", failurePolicy %s", *policy)
			c.Value, c.Weakens = string(*policy), c.Weakens || *policy == admissionregistrationv1.Ignore
		}
		// A whole object has all of it, whatever has changed.
		if fields := hook.narrowed(); verb == "patch" && body.Kind == "" && len(fields) > 0 {
			c.What += ", what it is asked about: " + strings.Join(fields, ", ")
			c.Value, c.Weakens = narrowed, true
		}
	}
}

// right is a change of who may override, or of what the guard itself may do.
func (c *Change) right(g Guard, verb string, body written) bool {
	own := c.Name == g.Release || strings.HasPrefix(c.Name, g.Release+"-")
	var to []string
	for _, subject := range body.Subjects {
		to = append(to, strings.Join(strings.Fields(subject.Kind+" "+subject.Namespace+" "+subject.Name), " "))
	}
	overrides := slices.ContainsFunc(body.Rules, rule.overrides)
	switch {
	case verb == "deletecollection" && c.Namespace == "" || verb == "delete" && own:
		c.What, c.Weakens = "deleted", true
	case verb == "delete" || verb == "deletecollection":
		return false
	case body.RoleRef.Name == g.Release+"-override":
		c.What, c.Weakens = "the right to override for "+strings.Join(to, ", "), len(to) > 0
	case overrides && !own:
		c.What, c.Weakens = "has the right to override", true
	case !own:
		return false
	case verb == "create":
		c.What = "created"
	default:
		c.What = "changed"
	}
	return true
}

// overrides says whether a rule gives the right to override, other than by giving every right.
func (r rule) overrides() bool {
	named := false
	for _, part := range []struct {
		has  []string
		want string
	}{{r.APIGroups, overrideGroup}, {r.Resources, forceDeletes}, {r.Verbs, "override"}} {
		if !slices.Contains(part.has, part.want) && !slices.Contains(part.has, "*") {
			return false
		}
		named = named || slices.Contains(part.has, part.want)
	}
	return named
}

func (c *Change) workload(verb, subresource string, body written) bool {
	switch {
	case verb == "delete" || verb == "deletecollection":
		c.What, c.Weakens = "deleted", true
	case subresource != "" && subresource != "scale":
		return false
	case body.Spec.Replicas != nil:
		c.Value = fmt.Sprint(*body.Spec.Replicas)
		c.What, c.Weakens = "replicas "+c.Value, *body.Spec.Replicas == 0
	case verb == "create":
		c.What = "created"
	default:
		c.What = "changed"
	}
	return true
}
