// Package review tells from the events of an audit log which pods were removed by force, what the guard decided about each,
// what became of those that it refused, and what slipped past it. It reads no files and prints nothing.
package review

import (
	"bytes"
	"cmp"
	"encoding/json"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/eni-guard/eni-guard/internal/auditlog"
	"github.com/eni-guard/eni-guard/internal/sandbox"
	"github.com/eni-guard/eni-guard/webhook"
)

// Decision is what became of a removal: what the guard has decided, or one of the two below.
type Decision string

// Decisions that no webhook has made.
const (
	// SlippedPast means: the pod was removed by force, and the guard was not asked, though the pod is none that it leaves alone.
	SlippedPast Decision = "slipped-past"
	// Unanswered means: the API server has refused, because no webhook answered.
	Unanswered Decision = "unanswered"
)

// Decisions are all there are, the worst first.
var Decisions = []Decision{
	SlippedPast, Decision(webhook.Overridden), Decision(webhook.Audited), Unanswered, Decision(webhook.Denied),
	Decision(webhook.Held), Decision(webhook.Allowed), Decision(webhook.Exempt),
}

// Reasons of decisions that no webhook has made.
const (
	// ReasonWebhookDown means: no webhook answered. With the failure policy Ignore the request went through.
	ReasonWebhookDown = "WebhookDown"
	// ReasonConfigurationDeleted means: somebody had deleted the webhook configuration.
	ReasonConfigurationDeleted = "ConfigurationDeleted"
	// ReasonConfigurationNarrowed means: somebody had changed what the guard is asked about.
	ReasonConfigurationNarrowed = "ConfigurationNarrowed"
	// ReasonNoTrace means: nothing in the log says why the guard was not asked.
	ReasonNoTrace = "NoTrace"
	// ReasonAskedAgain means: the API server has asked once more, and the guard has decided otherwise than at first.
	ReasonAskedAgain = "AskedAgain"
	// ReasonGuardNamespace means: the pod is one of the guard's own namespace.
	ReasonGuardNamespace = "GuardNamespace"
	// ReasonExemptNamespace means: the pod is one of a namespace that is never guarded.
	ReasonExemptNamespace = "ExemptNamespace"
	// ReasonImpersonated means: somebody has acted as a kubelet, or as the guard itself, which the guard asks nothing.
	ReasonImpersonated = "Impersonated"
)

// The annotations of audit events that are read here.
const (
	// guardPrefix starts those of the guard: docs/design.md.
	guardPrefix = "force-delete.eni-guard.io/"
	// collectionPrefix starts those of the pods of a collection delete, after guardPrefix.
	collectionPrefix = "pod."
	// policyReason is that of the ValidatingAdmissionPolicy about overrides, which works while no webhook does.
	policyReason = "override.eni-guard.io/override-reason"
	// failedOpenPrefix starts those of the API server about webhooks that did not answer and were not waited for
	// (k8s.io/apiserver pkg/admission/plugin/webhook/validating/dispatcher.go).
	failedOpenPrefix = "failed-open.validating.webhook.admission.k8s.io/"
	webhookName      = "force-delete.eni-guard.io"
)

// Removal is one forced removal of one pod, or one try.
type Removal struct {
	Time time.Time `json:"time"`
	// User is who counts; ImpersonatedBy is who acted as that user, if anybody did.
	User           string   `json:"user"`
	ImpersonatedBy string   `json:"impersonatedBy,omitempty"`
	UserAgent      string   `json:"userAgent,omitempty"`
	SourceIPs      []string `json:"sourceIPs,omitempty"`
	Namespace      string   `json:"namespace"`
	Pod            string   `json:"pod"`
	UID            string   `json:"uid,omitempty"`
	Node           string   `json:"node,omitempty"`
	Addresses      []string `json:"addresses,omitempty"`
	Path           string   `json:"path"`
	Mode           string   `json:"mode,omitempty"`
	Verdict        string   `json:"verdict"`
	Decision       Decision `json:"decision"`
	Reason         string   `json:"reason"`
	// Inferred says that the decision is not the guard's own word, but follows from the rest of the event.
	Inferred       bool   `json:"inferred,omitempty"`
	Evidence       string `json:"evidence,omitempty"`
	OverrideReason string `json:"overrideReason,omitempty"`
	// Outcome is what the API server has made of it, and Code that of its answer. What was let through may have failed for another reason.
	Outcome Outcome `json:"outcome"`
	Code    int     `json:"code"`
	// Finalizers are those that keep the object, as far as the answer shows.
	Finalizers []string `json:"finalizers,omitempty"`
	AuditID    string   `json:"auditID"`
	// Then is what became of a pod that was not removed at once, as far as the log tells.
	Then *Then `json:"then,omitempty"`
}

// Outcome is what became of the pod by the request itself.
type Outcome string

// Outcomes.
const (
	// OutcomeRemoved means: the pod went, or at least its address was let go.
	OutcomeRemoved Outcome = "removed"
	// OutcomeHeld means: the request went through, and a finalizer, the guard's or another one, keeps the object.
	OutcomeHeld Outcome = "held"
	// OutcomeRefused means: the guard has refused, or the API server because no webhook answered.
	OutcomeRefused Outcome = "refused"
	// OutcomeFailed means: something else has kept the API server from doing it.
	OutcomeFailed Outcome = "failed"
	// OutcomeUntold means: the log does not say how the request has ended; or it was about a collection of pods, and has failed at one of them.
	OutcomeUntold Outcome = "untold"
)

// Then is how a pod went after all.
type Then struct {
	Time time.Time `json:"time"`
	// After is the time since the removal was tried, in seconds.
	After float64 `json:"afterSeconds"`
	By    string  `json:"by"`
	How   How     `json:"how"`
	// Decision is that of the other removal, where it went by force.
	Decision Decision `json:"decision,omitempty"`
	// Override is the reason of the override that was on the pod by then, if one was given after the removal was tried.
	Override string `json:"override,omitempty"`
	// ByName says that only the name tells that it is the same pod.
	ByName bool `json:"byName,omitempty"`
}

// How a pod goes.
type How string

// The ways that the log shows.
const (
	// HowEnded means: its kubelet removed it, after everything of it had ended.
	HowEnded How = "ended"
	// HowFreed means: the guard took away its finalizer, after the node had let go.
	HowFreed How = "freed"
	// HowForced means: another removal by force, which has a row of its own.
	HowForced How = "forced"
	// HowStripped means: somebody else has taken its finalizers away.
	HowStripped How = "stripped"
)

// Untold counts requests that may have been forced removals; the log does not have what would tell.
type Untold struct {
	// Deletes are deletes of which neither a decision nor the pod is on record.
	Deletes int64 `json:"deletes"`
	// Evictions are evictions without a decision that do not ask for grace period 0: the pod would tell.
	Evictions int64 `json:"evictions"`
	// Collections are deletes of collections whose answer is not on record.
	Collections int64 `json:"collections"`
	// Records are decisions of the guard that were cut off.
	Records int64 `json:"records"`
	// Unmatched are removals of which the log does not have the node, the pod or the UID that a filter asks about.
	Unmatched int64 `json:"unmatched"`
}

// removalsOf returns the forced removals of an event; none for what is not forced, and for questions in dry run. It counts what cannot be told.
func (g Guard) removalsOf(e *auditlog.Event, untold *Untold) []Removal {
	path, ok := pathOf(e)
	if !ok {
		return nil
	}
	r := request{Event: e, guard: g, path: path}
	r.read()
	if e.DryRun() {
		return nil
	}
	rows := r.removals(untold)
	for i := range rows {
		r.end(&rows[i])
	}
	slices.SortFunc(rows, func(a, b Removal) int {
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Pod, b.Pod), cmp.Compare(a.UID, b.UID))
	})
	return rows
}

// removals are those of the request.
func (r *request) removals(untold *Untold) []Removal {
	e := r.Event
	if decided := r.decided(untold); len(decided) > 0 {
		// The guard may have been asked about some of a collection only.
		if r.path == webhook.PathCollection && e.Succeeded() {
			decided = append(decided, r.undecided(untold)...)
		}
		return slices.DeleteFunc(decided, func(row Removal) bool {
			return row.Reason == string(webhook.ReasonNotForced) || row.Reason == string(webhook.ReasonOwnKubelet) && ownKubelet(e)
		})
	}
	if r.unanswered() {
		return []Removal{r.refusedByServer()}
	}
	if gaveUp(e) && !ownKubelet(e) {
		r.unknown(untold)
	}
	if !e.Succeeded() || ownKubelet(e) {
		return nil
	}
	return r.undecided(untold)
}

// unknown counts a request that may have removed something, by its way in.
func (r *request) unknown(untold *Untold) {
	switch r.path { //nolint:exhaustive // a change is not counted
	case webhook.PathDelete:
		untold.Deletes++
	case webhook.PathEviction:
		untold.Evictions++
	case webhook.PathCollection:
		untold.Collections++
	}
}

// end says how a removal has ended.
func (r *request) end(row *Removal) {
	for _, pod := range r.pods {
		if pod.UID == row.UID && len(pod.Finalizers) > 0 && r.path != pathUpdate {
			row.Finalizers = pod.Finalizers
		}
	}
	switch {
	case gaveUp(r.Event):
		row.Outcome = OutcomeUntold
	case row.Decision == Decision(webhook.Denied) || row.Decision == Unanswered:
		row.Outcome = OutcomeRefused
	case row.Code == 0 || row.Code >= 300 && r.path == webhook.PathCollection:
		row.Outcome = OutcomeUntold
	case row.Code >= 300:
		row.Outcome = OutcomeFailed
	case row.Decision == Decision(webhook.Held) || len(row.Finalizers) > 0:
		row.Outcome = OutcomeHeld
	default:
		row.Outcome = OutcomeRemoved
	}
}

// gaveUp says whether the API server has ended the request while its work went on: nobody waits for that, or knows how it ended
// (k8s.io/apiserver pkg/endpoints/handlers/finisher).
func gaveUp(e *auditlog.Event) bool { return e.ResponseStatus.Code == http.StatusGatewayTimeout }

// stays says whether the removal left the pod where it was, at least for a while.
func (r *Removal) stays() bool {
	return r.Outcome == OutcomeRefused || r.Outcome == OutcomeHeld || r.Outcome == OutcomeFailed
}

// Gone says whether the removal took the pod away at once, or its address, as far as anybody can tell.
func (r *Removal) Gone() bool { return !r.stays() }

// ownKubelet says whether a kubelet has done it: the API server lets it remove pods of its own node only. Who acts as a kubelet is one to the
// API server and to the guard, but not here: only the log tells them apart.
func ownKubelet(e *auditlog.Event) bool {
	return e.Verb == "delete" && isKubelet(e.Actor()) && !impersonates(e)
}

func isKubelet(user authenticationv1.UserInfo) bool {
	return strings.HasPrefix(user.Username, "system:node:") && slices.Contains(user.Groups, "system:nodes")
}

// isGuard says whether a user is one of the guard's service accounts.
func (g Guard) isGuard(user authenticationv1.UserInfo) bool {
	return strings.HasPrefix(user.Username, "system:serviceaccount:"+g.Namespace+":")
}

// impersonates says whether somebody has acted as another user.
func impersonates(e *auditlog.Event) bool { return e.Actor().Username != e.User.Username }

// pathUpdate is a change of a pod; only what it changes tells by which way that takes something away.
const pathUpdate webhook.Path = "update"

// pathOf says by which way a request may take a pod or its address away.
func pathOf(e *auditlog.Event) (webhook.Path, bool) {
	if e.ObjectRef.Resource != "pods" || e.ObjectRef.APIGroup != "" {
		return "", false
	}
	switch e.Verb + " " + e.ObjectRef.Subresource {
	case "delete ":
		return webhook.PathDelete, true
	case "deletecollection ":
		return webhook.PathCollection, true
	case "create eviction":
		return webhook.PathEviction, true
	case "update ", "patch ", "update status", "patch status":
		return pathUpdate, true
	default:
		return "", false
	}
}

// request is a request that may remove pods, read.
type request struct {
	*auditlog.Event
	guard Guard
	path  webhook.Path
	// grace is the grace period that was asked for; nil if none was, or if it is not on record.
	grace *int64
	// pods are those that the answer shows.
	pods []answered
	// listed says that the answer is on record.
	listed bool
}

// answered is a pod in an answer.
type answered struct {
	Namespace, Name, UID, Node string
	Addresses, Finalizers      []string
	// LeftAlone says that the guard has nothing to say about it, for this Reason.
	LeftAlone bool
	Reason    webhook.Reason
}

// read takes options and answer out of the event. Options stand in the body or, without one, in the address.
func (r *request) read() {
	if address, err := url.ParseRequestURI(r.RequestURI); err == nil {
		if seconds, err := strconv.ParseInt(address.Query().Get("gracePeriodSeconds"), 10, 64); err == nil {
			r.grace = &seconds
		}
	}
	if len(r.RequestObject) > 0 {
		switch r.path { //nolint:exhaustive // a change has no options
		case webhook.PathDelete, webhook.PathCollection:
			r.options(r.RequestObject)
		case webhook.PathEviction:
			var eviction policyv1.Eviction
			if json.Unmarshal(r.RequestObject, &eviction) == nil && eviction.DeleteOptions != nil {
				r.grace = eviction.DeleteOptions.GracePeriodSeconds
			}
		}
	}
	if len(r.ResponseObject) > 0 && r.Succeeded() {
		r.answer()
	}
}

// answer reads the pods of the answer, one at a time: that to the delete of a collection can be long. Of each it keeps what is needed here.
func (r *request) answer() {
	var answer struct{ metav1.TypeMeta }
	if json.Unmarshal(r.ResponseObject, &answer) != nil {
		return
	}
	keep := func(decoder *json.Decoder) error {
		var pod corev1.Pod
		if err := decoder.Decode(&pod); err != nil {
			return err
		}
		kept := answered{Namespace: pod.Namespace, Name: pod.Name, UID: string(pod.UID), Node: pod.Spec.NodeName, Finalizers: pod.Finalizers}
		for _, ip := range pod.Status.PodIPs {
			kept.Addresses = append(kept.Addresses, ip.IP)
		}
		kept.Reason, kept.LeftAlone = webhook.LeftAlone(r.path, &pod, r.grace, r.User)
		r.pods = append(r.pods, kept)
		return nil
	}
	decoder := json.NewDecoder(bytes.NewReader(r.ResponseObject))
	switch answer.Kind {
	case "PodList":
		r.listed = eachItem(decoder, keep) == nil
	case "Pod":
		r.listed = keep(decoder) == nil
	}
	if !r.listed {
		r.pods = nil
	}
}

// eachItem goes through the items of a list.
func eachItem(decoder *json.Decoder, each func(*json.Decoder) error) error {
	if _, err := decoder.Token(); err != nil {
		return err
	}
	for decoder.More() {
		key, err := decoder.Token()
		if err != nil {
			return err
		}
		if key != "items" {
			if err := decoder.Decode(new(any)); err != nil {
				return err
			}
			continue
		}
		if list, err := decoder.Token(); err != nil || list != json.Delim('[') {
			return err // null is none
		}
		for decoder.More() {
			if err := each(decoder); err != nil {
				return err
			}
		}
		if _, err := decoder.Token(); err != nil {
			return err
		}
	}
	return nil
}

func (r *request) options(body []byte) {
	var options struct{ GracePeriodSeconds *int64 }
	if json.Unmarshal(body, &options) == nil {
		// The body counts alone, where there is one (k8s.io/apiserver pkg/endpoints/handlers/delete.go).
		r.grace = options.GracePeriodSeconds
	}
}

// decided are the removals that the guard has decided about.
func (r *request) decided(untold *Untold) []Removal {
	var rows []Removal
	if r.Annotations[guardPrefix+"decision"] != "" {
		fields := map[string]string{}
		for key, value := range r.Annotations {
			if name, ours := strings.CutPrefix(key, guardPrefix); ours {
				fields[name] = value
			}
		}
		rows = append(rows, r.row(fields))
	}
	for key, value := range r.Annotations {
		name, ours := strings.CutPrefix(key, guardPrefix+collectionPrefix)
		if !ours {
			continue
		}
		fields := map[string]string{}
		// An audit backend that cuts long values may have cut this one.
		if json.Unmarshal([]byte(value), &fields) != nil || fields["pod-uid"] != name {
			untold.Records++
			continue
		}
		rows = append(rows, r.row(fields))
	}
	return rows
}

// row is a removal as the guard has recorded it.
func (r *request) row(fields map[string]string) Removal {
	row := r.base()
	if namespace, name, found := strings.Cut(fields["pod"], "/"); found {
		row.Namespace, row.Pod = namespace, name
	}
	row.UID, row.Node, row.Mode, row.Path = fields["pod-uid"], fields["node"], fields["mode"], fields["path"]
	row.Verdict, row.Decision, row.Reason = fields["verdict"], Decision(fields["decision"]), fields["reason"]
	row.Evidence, row.OverrideReason = fields["evidence"], fields["override-reason"]
	if ips := fields["pod-ips"]; ips != "" {
		row.Addresses = strings.Split(ips, ",")
	}
	if row.Reason == string(webhook.ReasonOwnKubelet) && !ownKubelet(r.Event) {
		row.Decision, row.Reason, row.Inferred = SlippedPast, ReasonImpersonated, true
	}
	r.askedAgain(&row)
	return row
}

// askedAgain puts a decision right that was not the last word. The API server may ask first about a copy of the pod that is out of date,
// say without the override that was just given, and then about the pod as it is (k8s.io/apiserver pkg/storage/etcd3/store.go,
// conditionalDelete and GuaranteedUpdate). Of two values of an annotation it keeps the first (pkg/audit/context.go). The answer tells the
// last word, but of a collection not about which pod; and one that no webhook gave may be about the second step of a removal that was let
// through, after which the pod is marked, and goes.
func (r *request) askedAgain(row *Removal) {
	reason, overridden := r.Annotations[policyReason]
	one, refused := r.path != webhook.PathCollection, row.Decision == Decision(webhook.Denied)
	switch {
	// Of a collection it may have been another pod, but nobody can tell.
	case r.Succeeded() && overridden && (refused || one && overridable[row.Decision]):
		row.Decision, row.Reason, row.OverrideReason = Decision(webhook.Overridden), string(webhook.ReasonOverride), reason
	case r.Succeeded() && refused && r.failedOpen():
		row.Decision, row.Reason = SlippedPast, ReasonWebhookDown
	case r.Succeeded() && refused:
		row.Decision, row.Reason = Decision(webhook.Allowed), ReasonAskedAgain
	case one && refused && r.unanswered():
		row.Decision, row.Reason = Unanswered, ReasonWebhookDown
	case one && !refused && r.refusedByGuard():
		_, refusal, _ := strings.Cut(r.ResponseStatus.Message, denial+": ")
		row.Decision, row.Reason, row.OverrideReason = Decision(webhook.Denied), ReasonAskedAgain, ""
		row.Verdict, row.Evidence = string(webhook.RefusedVerdict(refusal)), refusal
	default:
		return
	}
	row.Inferred = true
}

// overridable are the decisions, beside Denied, in the place of which an override has the last word.
var overridable = map[Decision]bool{Decision(webhook.Held): true, Decision(webhook.Audited): true, Decision(webhook.Allowed): true}

// base is what every removal of the request has.
func (r *request) base() Removal {
	row := Removal{
		Time: r.Received.UTC(), User: r.Actor().Username, UserAgent: r.UserAgent, SourceIPs: r.SourceIPs,
		Namespace: r.ObjectRef.Namespace, Pod: r.ObjectRef.Name, UID: r.ObjectRef.UID, Path: string(r.path),
		Verdict: string(sandbox.NotAsked), Code: r.ResponseStatus.Code, AuditID: r.AuditID,
	}
	if impersonates(r.Event) {
		row.ImpersonatedBy = r.User.Username
	}
	return row
}

// refusedByServer is a removal that the API server has refused, because no webhook answered. For a collection it does not say
// at which pod.
func (r *request) refusedByServer() Removal {
	row := r.base()
	row.Decision, row.Reason, row.Inferred = Unanswered, ReasonWebhookDown, true
	if path, found := r.updatePath(); found && r.path == pathUpdate {
		row.Path = string(path)
	}
	return row
}

// undecided are the removals that went through without a decision.
func (r *request) undecided(untold *Untold) []Removal {
	switch r.path {
	case pathUpdate:
		return r.undecidedUpdate()
	case webhook.PathEviction:
		if r.grace == nil || *r.grace != 0 {
			r.unknown(untold)
			return nil
		}
		return []Removal{r.slipped(nil)}
	case webhook.PathCollection:
		if !r.listed {
			r.unknown(untold)
		}
	default:
		if !r.listed && r.grace != nil && *r.grace == 0 {
			return []Removal{r.slipped(nil)}
		}
		if !r.listed {
			r.unknown(untold)
		}
	}
	var rows []Removal
	for _, pod := range r.pods {
		if _, recorded := r.Annotations[guardPrefix+collectionPrefix+pod.UID]; recorded {
			continue // if only by a record that was cut off, which is counted
		}
		if pod.LeftAlone && pod.Reason == webhook.ReasonNotForced {
			continue
		}
		rows = append(rows, r.slipped(&pod))
	}
	return rows
}

// undecidedUpdate is a change that gives a pod the label by which Terway lets go of it, or takes the guard's finalizer from it, though
// the guard was not asked. Of an update, which has the whole object, only the API server's own notes tell that it changes one of them.
func (r *request) undecidedUpdate() []Removal {
	path, found := r.updatePath()
	_, overridden := r.Annotations[policyReason]
	if !found || r.Verb == "update" && !overridden && !r.failedOpen() || r.guard.isGuard(r.User) {
		return nil
	}
	row := r.slipped(nil)
	row.Path = string(path)
	return []Removal{row}
}

// updatePath tells the two ways apart that are an update.
func (r *request) updatePath() (webhook.Path, bool) {
	w, ok := readWritten(r.RequestObject)
	if label := w.Metadata.Labels[webhook.IgnoreLabel]; ok && label != nil && (*label == "true" || strings.HasPrefix(*label, copied)) {
		return webhook.PathIgnoreLabel, true
	}
	// A JSON patch takes a finalizer away by its number, after a test of its name, if at all. Without one only the API server's notes tell that it
	// was the guard's.
	body := string(r.RequestObject)
	named := slices.Contains(w.Metadata.Taken, webhook.Finalizer) || w.takesFinalizers() && strings.Contains(body, webhook.Finalizer)
	if named || strings.Contains(body, "finalizers") && (r.failedOpen() || r.Annotations[policyReason] != "") {
		return webhook.PathFinalizer, true
	}
	return "", false
}

// slipped is a removal that the guard was not asked about: of a pod that it leaves alone, with an override that the API server has
// checked by itself, or past the guard. Without the pod nobody can tell whether the guard would have left it alone.
func (r *request) slipped(pod *answered) Removal {
	row := r.base()
	row.Decision, row.Reason, row.Inferred = SlippedPast, ReasonNoTrace, true
	if pod != nil {
		row.Namespace, row.Pod, row.UID, row.Node, row.Addresses = pod.Namespace, pod.Name, pod.UID, pod.Node, pod.Addresses
		if pod.LeftAlone {
			row.Decision, row.Reason = Decision(webhook.Exempt), string(pod.Reason)
		}
	}
	switch reason, overridden := r.Annotations[policyReason]; {
	case row.Namespace == r.guard.Namespace:
		row.Decision, row.Reason = Decision(webhook.Exempt), ReasonGuardNamespace
	case slices.Contains(r.guard.Exempt, row.Namespace):
		row.Decision, row.Reason = Decision(webhook.Exempt), ReasonExemptNamespace
	case overridden:
		row.Decision, row.Reason, row.OverrideReason = Decision(webhook.Overridden), string(webhook.ReasonOverride), reason
	case row.Decision == SlippedPast && r.failedOpen():
		row.Reason = ReasonWebhookDown
	case row.Decision == SlippedPast && impersonates(r.Event) && (isKubelet(r.Actor()) || r.guard.isGuard(r.Actor())):
		row.Reason = ReasonImpersonated
	}
	return row
}

// failedOpen says whether the API server went on without an answer of the guard's webhook.
func (r *request) failedOpen() bool {
	for key, value := range r.Annotations {
		if strings.HasPrefix(key, failedOpenPrefix) && value == webhookName {
			return true
		}
	}
	return false
}

// denial says in the message of an answer that the guard refuses
// (k8s.io/apiserver pkg/admission/plugin/webhook/errors/statuserror.go).
const denial = `admission webhook "` + webhookName + `" denied the request`

// refusedByGuard says whether the request has failed because the guard refuses.
func (r *request) refusedByGuard() bool {
	return !r.Succeeded() && strings.Contains(r.ResponseStatus.Message, denial)
}

// unanswered says whether the request has failed because no webhook answered (k8s.io/apiserver pkg/util/webhook/error.go).
func (r *request) unanswered() bool {
	return !r.Succeeded() && strings.Contains(r.ResponseStatus.Message, `failed calling webhook "`+webhookName+`"`)
}
