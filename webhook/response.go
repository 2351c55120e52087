package webhook

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strings"

	admissionv1 "k8s.io/api/admission/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/eni-guard/eni-guard/internal/sandbox"
)

const (
	// maxEvidence and maxEvidenceLength bound what goes into a refusal, the audit log and the log about one pod; a pod
	// may have thousands of processes.
	maxEvidence       = 20
	maxEvidenceLength = 2048
	// collectionKeyPrefix starts the audit annotation of a pod of a collection delete. All pods of one share one audit
	// event, so each needs a key of its own; with a UID the key stays below the 63 characters of a qualified name.
	collectionKeyPrefix = "pod."
)

// respond builds the response to a decision. Every call of one removal must give the same annotations: they share an
// audit event, and the API server keeps the first value of a key.
func respond(r *removal, d decision) *admissionv1.AdmissionResponse {
	response := &admissionv1.AdmissionResponse{
		Allowed:          d.outcome == Allowed || d.outcome == Exempt,
		AuditAnnotations: annotations(r, d),
	}
	if !response.Allowed {
		response.Result = refusal(r, d)
	}
	return response
}

// refusal is a conflict with the state of the pod's node: with everything found as causes, for programs.
func refusal(r *removal, d decision) *metav1.Status {
	status := &metav1.Status{
		Status:  metav1.StatusFailure,
		Code:    http.StatusConflict,
		Reason:  metav1.StatusReasonConflict,
		Message: message(r, d),
		Details: &metav1.StatusDetails{Name: r.pod.Name, Kind: "pods", UID: r.pod.UID},
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
	return status
}

// failures says why what is not known is not known.
func failures(d decision) []string {
	if d.verdict == sandbox.NotAsked {
		return nil
	}
	if d.failure != "" {
		return []string{d.failure}
	}
	return d.report.Failures()
}

// evidenceWords is what was found, and what could not be found out, within bounds.
func evidenceWords(d decision) string {
	var words []string
	for _, finding := range d.report.Findings[:min(len(d.report.Findings), maxEvidence)] {
		words = append(words, finding.String())
	}
	words = append(words, failures(d)...)
	text := strings.Join(words, "; ")
	if len(text) > maxEvidenceLength {
		text = strings.ToValidUTF8(text[:maxEvidenceLength], "") + "…"
	}
	return text
}

// annotations are what the audit log keeps of a decision, by the keys of the contract in docs/design.md.
func annotations(r *removal, d decision) map[string]string {
	var ips []string
	for _, ip := range podIPs(r.pod) {
		ips = append(ips, ip.String())
	}
	fields := map[string]string{
		"decision": string(d.outcome),
		"verdict":  string(d.verdict),
		"mode":     string(d.mode),
		"path":     string(r.path),
		"pod":      r.pod.Namespace + "/" + r.pod.Name,
		"pod-uid":  string(r.pod.UID),
		"node":     r.pod.Spec.NodeName,
		"pod-ips":  strings.Join(ips, ","),
		"evidence": evidenceWords(d),
		"reason":   string(d.reason),
	}
	if r.path != PathCollection {
		return fields
	}
	// A map of strings always encodes, and with sorted keys.
	compact, _ := json.Marshal(fields)
	return map[string]string{collectionKeyPrefix + string(r.pod.UID): string(compact)}
}
