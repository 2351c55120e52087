package incident

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
)

// annotationPrefix starts the key of every annotation that the guard adds to an audit event.
const annotationPrefix = "force-delete.eni-guard.io/"

// AuditEvent is what the tests read of an audit event.
type AuditEvent struct {
	Verb string
	// ImpersonatedUser is who counts, where User acts as somebody else.
	User, ImpersonatedUser struct {
		Username string
	}
	ObjectRef struct {
		Resource, Subresource, Namespace, Name string
	}
	// RequestObject is the DeleteOptions of a delete.
	RequestObject struct {
		DryRun []string
	}
	ResponseStatus struct {
		Code int
	}
	Annotations map[string]string
}

// Annotation returns one of the guard's annotations.
func (e AuditEvent) Annotation(key string) string { return e.Annotations[annotationPrefix+key] }

// Actor is the user whose rights the request was made with.
func (e AuditEvent) Actor() string {
	if e.ImpersonatedUser.Username != "" {
		return e.ImpersonatedUser.Username
	}
	return e.User.Username
}

// Removals reads the events of the audit log about removals of a pod by name. Those with an annotation of the guard tell
// which pod of that name they are about; those of another are left out.
func (c *Cluster) Removals(pod *corev1.Pod) ([]AuditEvent, error) {
	return c.AuditEvents(func(e AuditEvent) bool {
		uid := e.Annotation("pod-uid")
		return e.Verb == "delete" && e.ObjectRef.Namespace == pod.Namespace && e.ObjectRef.Name == pod.Name && (uid == "" || uid == string(pod.UID))
	})
}

// AuditEvents reads the events of the audit log that are wanted.
func (c *Cluster) AuditEvents(wanted func(AuditEvent) bool) ([]AuditEvent, error) {
	log, err := os.Open(c.AuditLog())
	if err != nil {
		return nil, err
	}
	defer log.Close()
	var events []AuditEvent
	lines := bufio.NewReader(log)
	for {
		line, err := lines.ReadBytes('\n')
		if errors.Is(err, io.EOF) {
			return events, nil // the last line may still be written
		}
		if err != nil {
			return nil, err
		}
		var event AuditEvent
		if err := json.Unmarshal(line, &event); err != nil {
			return nil, fmt.Errorf("audit log: %w", err)
		}
		if wanted(event) {
			events = append(events, event)
		}
	}
}

// Refusal checks that the audit log holds exactly one refusal of the pod's removal, with what the contract says must be
// in it, and returns its annotations, a line each.
func (c *Cluster) Refusal(pod *corev1.Pod) (string, error) {
	events, err := c.Removals(pod)
	if err != nil {
		return "", err
	}
	events = slices.DeleteFunc(events, func(e AuditEvent) bool { return e.Annotation("decision") != "denied" })
	if len(events) != 1 {
		return "", fmt.Errorf("the audit log holds %d refusals of pod %s, not 1", len(events), pod.Name)
	}
	event := events[0]
	for key, want := range map[string]string{
		"verdict": "bound", "mode": "deny", "path": "delete", "reason": "SandboxBound",
		"pod": pod.Namespace + "/" + pod.Name, "pod-uid": string(pod.UID), "node": pod.Spec.NodeName, "pod-ips": pod.Status.PodIP,
	} {
		if got := event.Annotation(key); got != want {
			err = errors.Join(err, fmt.Errorf("the audit annotation %q is %q, not %q", key, got, want))
		}
	}
	if event.ResponseStatus.Code != 409 {
		err = errors.Join(err, fmt.Errorf("the audit event has code %d, not 409", event.ResponseStatus.Code))
	}
	if evidence := event.Annotation("evidence"); !strings.Contains(evidence, "state D") || !strings.Contains(evidence, pod.Status.PodIP) {
		err = errors.Join(err, fmt.Errorf("the audit annotation \"evidence\" is %q", evidence))
	}
	var lines []string
	for key, value := range event.Annotations {
		if name, ours := strings.CutPrefix(key, annotationPrefix); ours {
			lines = append(lines, fmt.Sprintf("%-8s  %s", name, value))
		}
	}
	slices.Sort(lines)
	return strings.Join(lines, "\n"), err
}
