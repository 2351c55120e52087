package observer

import (
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/eni-guard/eni-guard/test/e2e/incident"
)

const (
	overrideAnnotation = "eni-guard.io/allow-force-delete"
	untilAnnotation    = "eni-guard.io/allow-force-delete-until"
	// overrideReason is the audit annotation of the policy that records overrides, also while no webhook answers. Beside a refusal it tells
	// that the API server has asked first about a copy of the pod that did not have the override yet.
	overrideReason = "override.eni-guard.io/override-reason"
	// failedOpenPrefix starts the keys that the API server puts on an event when a webhook has not answered and nobody minds
	// (k8s.io/apiserver/pkg/admission/plugin/webhook/validating, ValidatingAuditAnnotationFailedOpenKeyPrefix).
	failedOpenPrefix = "failed-open.validating.webhook.admission.k8s.io/"
	kubelet          = "system:node:" + incident.Node
)

// History is what the API server's audit log says of removals of pods.
type History struct {
	// byPod are the requests about a pod by its name, by NAMESPACE/NAME.
	byPod map[string][]incident.AuditEvent
	// collections are the collection deletes, by namespace.
	collections map[string][]incident.AuditEvent
}

// IsRemoval says whether an event is about a removal of pods.
func IsRemoval(e incident.AuditEvent) bool {
	return e.ObjectRef.Resource == "pods" && (e.Verb == "delete" || e.Verb == "deletecollection" || e.Verb == "create" && e.ObjectRef.Subresource == "eviction")
}

// NewHistory sorts events about removals, as IsRemoval picks them.
func NewHistory(events []incident.AuditEvent) *History {
	h := &History{byPod: map[string][]incident.AuditEvent{}, collections: map[string][]incident.AuditEvent{}}
	for _, e := range events {
		namespace := e.ObjectRef.Namespace
		if e.Verb == "deletecollection" {
			h.collections[namespace] = append(h.collections[namespace], e)
			continue
		}
		h.byPod[namespace+"/"+e.ObjectRef.Name] = append(h.byPod[namespace+"/"+e.ObjectRef.Name], e)
	}
	return h
}

// requests returns the requests about the pod of a removal by its name.
func (h *History) requests(r Removal) []incident.AuditEvent {
	return slices.DeleteFunc(slices.Clone(h.byPod[r.Key()]), func(e incident.AuditEvent) bool {
		uid := e.Annotation("pod-uid")
		if p := e.Options().Preconditions; uid == "" && p != nil && p.UID != nil {
			uid = string(*p.UID)
		}
		return uid != "" && uid != string(r.Pod.UID)
	})
}

// Decision is what the guard has written about a pod into an event.
type Decision struct {
	incident.AuditEvent
	Outcome, Reason string
}

// Decisions returns the guard's decisions about the pod of a removal, in the order in which their requests were answered.
func (h *History) Decisions(r Removal) []Decision {
	var found []Decision
	for _, e := range h.requests(r) {
		if e.Annotation("decision") != "" {
			found = append(found, Decision{e, e.Annotation("decision"), e.Annotation("reason")})
		}
	}
	for _, e := range h.collections[r.Pod.Namespace] {
		var fields map[string]string
		if json.Unmarshal([]byte(e.Annotation("pod."+string(r.Pod.UID))), &fields) == nil {
			found = append(found, Decision{e, fields["decision"], fields["reason"]})
		}
	}
	slices.SortFunc(found, func(a, b Decision) int { return a.StageTimestamp.Compare(b.StageTimestamp.Time) })
	return found
}

// letsGo lists the decisions after which an object may go.
var letsGo = []string{"allowed", "exempt", "held", "audited", "overridden"}

// Record puts together what the log says of how the object of a removal went, and whether the log accounts for that: by a
// delete of the kubelet, a decision of the guard that lets it go, or a webhook that did not answer where nobody minds. guarded says
// that the namespace's mode is deny or hold; overrider is the user with the right to override.
func (h *History) Record(r Removal, guarded bool, overrider string) (record Record, accounted bool) {
	record.Guarded = guarded
	decisions := h.Decisions(r)
	held := slices.ContainsFunc(decisions, func(d Decision) bool { return d.Outcome == "held" })
	for _, e := range h.requests(r) {
		done := e.ResponseStatus.Code < 300 && !e.DryRun()
		// Of a caller that has gone before the answer, a kubelet that was killed say, the log says 504, whether it was done or not.
		mayBeDone := done || e.ResponseStatus.Code == http.StatusGatewayTimeout && e.Actor() == kubelet && !e.DryRun()
		switch grace := e.Options().GracePeriodSeconds; {
		case !mayBeDone:
		case e.Actor() == kubelet:
			// One that is held does not go with that.
			if grace != nil && *grace == 0 && !held {
				record.ByKubelet, accounted = true, true
				record.Received, record.Completed = e.RequestReceivedTimestamp.Time, e.StageTimestamp.Time
			}
		case failedOpen(e) && e.Annotation("decision") == "":
			// A plain eviction takes the object only of a pod that has ended or gives itself no time.
			evicted := e.Verb == "create" && atOnce(r.Pod)
			record.FailedOpen = record.FailedOpen || evicted
			accounted = accounted || evicted || e.Annotations[overrideReason] != ""
		case e.Annotations[overrideReason] != "":
			accounted = true
		}
		record.Override = record.Override || done && e.Actor() == overrider && inForce(r, e.RequestReceivedTimestamp.Time)
	}
	for _, d := range decisions {
		if d.Reason == "NotForced" {
			continue
		}
		// Of a collection, the answer tells nothing about this pod.
		if slices.Contains(letsGo, d.Outcome) {
			accounted = true
			record.Reason = d.Reason
		}
		// A refusal of what was done all the same was not the guard's last word: the API server has asked first about a copy of the pod that
		// was out of date, and the log has the first answer.
		if d.Outcome == "denied" && d.Verb == "delete" && d.ResponseStatus.Code == http.StatusOK && !d.DryRun() {
			accounted = true
		}
		if (d.Outcome == "allowed" || d.Outcome == "exempt") && d.ResponseStatus.Code < 300 {
			record.Received, record.Completed = d.RequestReceivedTimestamp.Time, d.StageTimestamp.Time
		}
	}
	return record, accounted
}

// atOnce says whether a plain eviction takes the pod's object away at once.
func atOnce(pod *corev1.Pod) bool {
	grace := pod.Spec.TerminationGracePeriodSeconds
	return grace != nil && *grace == 0 || pod.Status.Phase == corev1.PodSucceeded || pod.Status.Phase == corev1.PodFailed
}

func failedOpen(e incident.AuditEvent) bool {
	for key := range e.Annotations {
		if strings.HasPrefix(key, failedOpenPrefix) {
			return true
		}
	}
	return false
}

// inForce says whether the override of a pod was in force at a time.
func inForce(r Removal, at time.Time) bool {
	if r.Pod.Annotations[overrideAnnotation] == "" {
		return false
	}
	text, ends := r.Pod.Annotations[untilAnnotation]
	if !ends {
		return true
	}
	end, err := time.Parse(time.RFC3339, text)
	return err == nil && at.Before(end)
}

// Undecided lists the forced requests by name that went through without a decision of the guard on record, and counts
// those that failed without one.
func (h *History) Undecided(asked func(namespace string) bool) (through []string, failed map[string]int) {
	failed = map[string]int{}
	for _, events := range h.byPod {
		for _, e := range events {
			grace := e.Options().GracePeriodSeconds
			forced := grace != nil && *grace == 0
			if !forced || e.Actor() == kubelet || !asked(e.ObjectRef.Namespace) || e.Annotation("decision") != "" {
				continue
			}
			switch code := e.ResponseStatus.Code; {
			case code >= 300:
				failed[fmt.Sprint(code)]++
			case e.Annotations[overrideReason] != "":
				failed["overridden without a webhook"]++
			default:
				through = append(through, fmt.Sprintf("%s %s/%s by %s at %s", e.Verb, e.ObjectRef.Namespace, e.ObjectRef.Name, e.Actor(), e.StageTimestamp.Format(time.RFC3339Nano)))
			}
		}
	}
	return through, failed
}

// Outcomes lists the guard's decisions and their reasons, one for each pod of each request.
func (h *History) Outcomes() []string {
	var all []string
	for _, events := range h.byPod {
		for _, e := range events {
			if outcome := e.Annotation("decision"); outcome != "" {
				all = append(all, outcome+" "+e.Annotation("reason"))
			}
		}
	}
	for _, events := range h.collections {
		for _, e := range events {
			for key, value := range e.Annotations {
				var fields map[string]string
				if strings.HasPrefix(key, "force-delete.eni-guard.io/pod.") && json.Unmarshal([]byte(value), &fields) == nil {
					all = append(all, fields["decision"]+" "+fields["reason"])
				}
			}
		}
	}
	return all
}
