package incident

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
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
	// RequestObject is the body: the DeleteOptions of a delete, the Eviction, the patch of a patch.
	RequestObject                            json.RawMessage
	RequestReceivedTimestamp, StageTimestamp metav1.MicroTime
	ResponseStatus                           struct {
		Code int
	}
	Annotations map[string]string
}

// Annotation returns one of the guard's annotations.
func (e AuditEvent) Annotation(key string) string { return e.Annotations[annotationPrefix+key] }

// DryRun says whether a delete only asked.
func (e AuditEvent) DryRun() bool { return len(e.Options().DryRun) > 0 }

// Options are those of a delete, or of an eviction; empty where there are none.
func (e AuditEvent) Options() metav1.DeleteOptions {
	var body struct {
		metav1.DeleteOptions
		Eviction *metav1.DeleteOptions `json:"deleteOptions"`
	}
	if json.Unmarshal(e.RequestObject, &body) != nil {
		return metav1.DeleteOptions{}
	}
	if body.Eviction != nil {
		return *body.Eviction
	}
	return body.DeleteOptions
}

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

// AuditEvents returns the events of the audit log that are wanted, also from the files that a log of more than 100 MB was moved to
// (audit-TIME.log, by the API server). What has been read once is remembered: tests ask many times about a log that only grows.
func (c *Cluster) AuditEvents(wanted func(AuditEvent) bool) ([]AuditEvent, error) {
	all, err := c.audit.readOn(c.AuditLog())
	if err != nil {
		return nil, err
	}
	var events []AuditEvent
	for _, event := range all {
		if wanted(event) {
			events = append(events, event)
		}
	}
	return events, nil
}

// auditLog is what has been read of the audit log so far.
type auditLog struct {
	mu     sync.Mutex
	file   os.FileInfo
	offset int64 // in file
	events []AuditEvent
}

// readOn reads what has been written since the last time, and returns all events.
func (a *auditLog) readOn(path string) ([]AuditEvent, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil {
		return nil, err
	}
	if a.file == nil || !os.SameFile(a.file, info) || info.Size() < a.offset {
		moved, err := filepath.Glob(strings.TrimSuffix(path, ".log") + "-*.log")
		if err != nil {
			return nil, err
		}
		a.file, a.offset, a.events = info, 0, nil
		for _, path := range moved {
			if err := a.readFile(path); err != nil {
				return nil, err
			}
		}
	}
	if _, err := file.Seek(a.offset, io.SeekStart); err != nil {
		return nil, err
	}
	read, err := a.read(file)
	a.offset += read
	return a.events, err
}

func (a *auditLog) readFile(path string) error {
	file, err := os.Open(path)
	if err != nil {
		return err
	}
	defer file.Close()
	_, err = a.read(file)
	return err
}

// read appends the events of whole lines, and returns how long these are; the last line may still be written.
func (a *auditLog) read(log io.Reader) (int64, error) {
	read := int64(0)
	for lines := bufio.NewReader(log); ; {
		line, err := lines.ReadBytes('\n')
		if errors.Is(err, io.EOF) {
			return read, nil
		}
		if err != nil {
			return read, err
		}
		read += int64(len(line))
		var event AuditEvent
		if err := json.Unmarshal(line, &event); err != nil {
			return read, fmt.Errorf("audit log: %w", err)
		}
		a.events = append(a.events, event)
	}
}

// Refusal checks that the audit log holds exactly one refusal of the pod's removal, other than of dry runs, with what the contract says must be
// in it, and returns its annotations, a line each.
func (c *Cluster) Refusal(pod *corev1.Pod) (string, error) {
	events, err := c.Removals(pod)
	if err != nil {
		return "", err
	}
	events = slices.DeleteFunc(events, func(e AuditEvent) bool { return e.DryRun() || e.Annotation("decision") != "denied" })
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
