package webhook

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strings"

	admissionv1 "k8s.io/api/admission/v1"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/eni-guard/eni-guard/internal/sandbox"
)

const (
	// maxEvidence and maxEvidenceLength bound what goes into a refusal, the audit log and the log about one pod; a pod
	// may have thousands of processes.
	maxEvidence       = 20
	maxEvidenceLength = 2048
	// maxFailure bounds what is said about one thing that could not be found out.
	maxFailure = 512
	// maxWarning bounds a warning: the API server cuts all of them to 256 characters once they have 4096 together, as those of
	// a collection delete soon have (k8s.io/apiserver pkg/endpoints/filters/warning.go).
	maxWarning = 256
	// maxEventNote is what events.k8s.io/v1 takes, in bytes.
	maxEventNote = 1024
	// causeOverrideRefused is the cause of a refusal in spite of an override.
	causeOverrideRefused metav1.CauseType = "OverrideRefused"
	// collectionKeyPrefix starts the audit annotation of a pod of a collection delete. All pods of one share one audit
	// event, so each needs a key of its own; with a UID the key stays below the 63 characters of a qualified name.
	collectionKeyPrefix = "pod."
)

// eventReasons are the reasons of the Events about a pod.
var eventReasons = map[Outcome]string{
	Allowed:    "ForcedRemovalAllowed",
	Denied:     "ForcedRemovalDenied",
	Held:       "ForcedRemovalHeld",
	Audited:    "ForcedRemovalAudited",
	Overridden: "ForcedRemovalOverridden",
}

// respond builds the response to a decision. Every call of one removal must give the same annotations: they share an
// audit event, and the API server keeps the first value of a key.
func respond(r *removal, d decision) *admissionv1.AdmissionResponse {
	response := &admissionv1.AdmissionResponse{
		Allowed:          d.outcome.allows(),
		AuditAnnotations: annotations(r, d),
	}
	if !response.Allowed {
		response.Result = refusal(r, d)
	}
	if text := warning(r, d); text != "" {
		response.Warnings = []string{clip(text, maxWarning)}
	}
	return response
}

// refusal is a conflict with the state of the pod's node: with everything found as causes, for programs. An eviction of a
// pod that is being deleted is put off instead, as by a disruption budget, so that a drain waits for it; for one that
// nobody has told to end, waiting would never help. Without a time to wait, or client-go would repeat the call by itself.
func refusal(r *removal, d decision) *metav1.Status {
	if d.reason == ReasonNoSuchPod {
		// As the API server itself would answer.
		status := apierrors.NewNotFound(corev1.Resource("pods"), r.pod.Name).Status()
		return &status
	}
	status := &metav1.Status{
		Status:  metav1.StatusFailure,
		Code:    http.StatusConflict,
		Reason:  metav1.StatusReasonConflict,
		Message: message(r, d),
		Details: &metav1.StatusDetails{Name: r.pod.Name, Kind: "pods", UID: r.pod.UID},
	}
	if r.path == PathEviction && r.pod.DeletionTimestamp != nil {
		status.Code, status.Reason = http.StatusTooManyRequests, metav1.StatusReasonTooManyRequests
	}
	listed := d.report.Findings[:min(len(d.report.Findings), maxEvidence)]
	for _, finding := range listed {
		status.Details.Causes = append(status.Details.Causes, metav1.StatusCause{Type: metav1.CauseType(finding.Kind), Message: finding.String()})
	}
	if more := len(d.report.Findings) - len(listed); more > 0 {
		status.Details.Causes = append(status.Details.Causes, metav1.StatusCause{Message: fmt.Sprintf("%d more findings", more)})
	}
	for _, failure := range failures(d) {
		status.Details.Causes = append(status.Details.Causes, metav1.StatusCause{Type: metav1.CauseType(ReasonProbeFailed), Message: failure})
	}
	if d.override.refused != "" {
		status.Details.Causes = append(status.Details.Causes, metav1.StatusCause{Type: causeOverrideRefused, Message: d.override.refused})
	}
	if d.holdFailure != "" {
		status.Details.Causes = append(status.Details.Causes, metav1.StatusCause{Type: metav1.CauseType(ReasonHoldFailed), Message: d.holdFailure})
	}
	return status
}

// failures says why what is not known is not known, each within bounds.
func failures(d decision) []string {
	if d.verdict == sandbox.NotAsked {
		return nil
	}
	all := d.report.Failures()
	if d.failure != "" {
		all = []string{d.failure}
	}
	for i, failure := range all {
		all[i] = clip(failure, maxFailure)
	}
	return all
}

// evidenceWords is what was found, who else has the addresses, what could not be found out, and why an override does not count, within bounds.
func evidenceWords(d decision) string {
	var words []string
	for _, finding := range d.report.Findings[:min(len(d.report.Findings), maxEvidence)] {
		words = append(words, finding.String())
	}
	for _, conflict := range d.report.Conflicts[:min(len(d.report.Conflicts), maxEvidence)] {
		words = append(words, "conflict: "+conflict.String())
	}
	words = append(words, failures(d)...)
	if d.override.refused != "" {
		words = append(words, "the override does not count: "+d.override.refused)
	}
	return clip(strings.Join(words, "; "), maxEvidenceLength)
}

// eventNote is what an Event says: who, and what was found.
func eventNote(r *removal, d decision) string {
	note := fmt.Sprintf("user %s: %s%s", r.user.Username, overridesNot(d), summary(r.pod, d))
	if d.outcome == Overridden {
		note += fmt.Sprintf(" Override: %q.", d.override.reason)
	}
	return clip(note, maxEventNote)
}

// clip cuts a text to so many bytes.
func clip(text string, limit int) string {
	const mark = "…"
	if len(text) <= limit {
		return text
	}
	return strings.ToValidUTF8(text[:limit-len(mark)], "") + mark
}

// userReference names who has asked for a removal as the other party of an Event.
func userReference(user authenticationv1.UserInfo) *corev1.ObjectReference {
	return &corev1.ObjectReference{APIVersion: "rbac.authorization.k8s.io/v1", Kind: "User", Name: user.Username}
}

// reference points an Event at a pod.
func reference(pod *corev1.Pod) *corev1.ObjectReference {
	return &corev1.ObjectReference{APIVersion: "v1", Kind: "Pod", Namespace: pod.Namespace, Name: pod.Name, UID: pod.UID}
}

// nodeReference points an Event at a node. It carries the name as UID, as the kubelet's do: kubectl describe looks for that.
func nodeReference(name string) *corev1.ObjectReference {
	return &corev1.ObjectReference{APIVersion: "v1", Kind: "Node", Name: name, UID: types.UID(name)}
}

// annotations are what the audit log keeps of a decision, by the keys of the contract in docs/design.md.
func annotations(r *removal, d decision) map[string]string {
	fields := map[string]string{
		"decision": string(d.outcome),
		"verdict":  string(d.verdict),
		"mode":     string(d.mode),
		"path":     string(r.path),
		"pod":      r.pod.Namespace + "/" + r.pod.Name,
		"pod-uid":  string(r.pod.UID),
		"node":     r.pod.Spec.NodeName,
		"pod-ips":  addressWords(podIPs(r.pod)),
		"evidence": evidenceWords(d),
		"reason":   string(d.reason),
	}
	if d.override.reason != "" {
		fields["override-reason"] = d.override.reason
	}
	if r.path != PathCollection {
		return fields
	}
	// A map of strings always encodes, and with sorted keys.
	compact, _ := json.Marshal(fields)
	return map[string]string{collectionKeyPrefix + string(r.pod.UID): string(compact)}
}
