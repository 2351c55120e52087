// Package auditlog reads audit logs of Kubernetes API servers: finds the files, takes them apart into lines, leaves out those
// that cannot matter before they are parsed, and hands over the events of the others. It decides nothing about them.
package auditlog

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"strconv"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
)

// The stages of a request that say how it has ended (k8s.io/apiserver pkg/apis/audit). Events of other stages are left out: they
// tell of the same request before its end.
const (
	StageResponseComplete = "ResponseComplete"
	StagePanic            = "Panic"
)

const (
	groupPrefix  = "audit.k8s.io/"
	knownVersion = "audit.k8s.io/v1"
)

// Event is what matters of an audit event (k8s.io/apiserver pkg/apis/audit/v1).
type Event struct {
	Level, AuditID, Stage, RequestURI, Verb string
	// User is who has sent the request, ImpersonatedUser who it was made as, if that is somebody else.
	User             authenticationv1.UserInfo
	ImpersonatedUser *authenticationv1.UserInfo
	SourceIPs        []string
	UserAgent        string
	ObjectRef        ObjectRef
	ResponseStatus   ResponseStatus
	// RequestObject and ResponseObject are the bodies as JSON; empty where the audit policy does not have them recorded. They are valid while the
	// event is handed over.
	RequestObject, ResponseObject json.RawMessage
	// Received is when the request came in.
	Received    time.Time
	Annotations map[string]string
}

// ObjectRef is what a request is about.
type ObjectRef struct {
	Resource, Namespace, Name, UID, APIGroup, Subresource string
}

// ResponseStatus is how a request has ended.
type ResponseStatus struct {
	Code            int
	Reason, Message string
}

// Succeeded says whether the request was answered with success.
func (e *Event) Succeeded() bool { return e.ResponseStatus.Code >= 200 && e.ResponseStatus.Code < 300 }

// Actor is the user whose rights the request was made with.
func (e *Event) Actor() authenticationv1.UserInfo {
	if e.ImpersonatedUser != nil && e.ImpersonatedUser.Username != "" {
		return *e.ImpersonatedUser
	}
	return e.User
}

// DryRun says whether the request was to change nothing. Options stand in the address; those of a delete in its body, which counts alone where
// there is one (k8s.io/apiserver pkg/endpoints/handlers/delete.go), those of an eviction also in that.
func (e *Event) DryRun() bool {
	var body struct {
		DryRun        []string
		DeleteOptions struct{ DryRun []string }
	}
	deletes := e.Verb == "delete" || e.Verb == "deletecollection"
	if len(e.RequestObject) > 0 && (deletes || e.ObjectRef.Subresource == "eviction") && json.Unmarshal(e.RequestObject, &body) == nil {
		if deletes {
			return len(body.DryRun) > 0
		}
		if len(body.DeleteOptions.DryRun) > 0 {
			return true
		}
	}
	address, err := url.ParseRequestURI(e.RequestURI)
	return err == nil && len(address.Query()["dryRun"]) > 0
}

// line is an event as it stands in a log. Each field that is not a text may also be a text that holds it as JSON: the log
// service of Alibaba Cloud keeps the fields of an event as columns, and columns are texts.
type line struct {
	Kind, APIVersion                        string
	Level, AuditID, Stage, RequestURI, Verb string
	UserAgent                               string
	User                                    nested[authenticationv1.UserInfo]
	ImpersonatedUser                        nested[*authenticationv1.UserInfo]
	SourceIPs                               nested[[]string]
	ObjectRef                               nested[ObjectRef]
	ResponseStatus                          nested[ResponseStatus]
	RequestObject, ResponseObject           nested[raw]
	RequestReceivedTimestamp                nested[time.Time]
	StageTimestamp                          nested[time.Time]
	Annotations                             nested[map[string]string]
	Items                                   []raw
	// Content is the whole line, where a collector of the log service has not taken it apart, and Log that of a container's, as Docker keeps it.
	Content, Log string
}

// raw is JSON that is not taken apart yet. It is not copied, as json.RawMessage is, but a part of the line: of a long one there is not room for two.
type raw []byte

func (r *raw) UnmarshalJSON(data []byte) error {
	*r = data
	return nil
}

// nested is a value that may be wrapped in a text.
type nested[T any] struct{ value T }

func (n *nested[T]) UnmarshalJSON(data []byte) error {
	_, isTime := any(n.value).(time.Time)
	if len(data) > 0 && data[0] == '"' && !isTime {
		var text string
		if err := json.Unmarshal(data, &text); err != nil {
			return err
		}
		if text == "" || text == "null" {
			return nil
		}
		data = []byte(text)
	}
	return json.Unmarshal(data, &n.value)
}

func (l *line) event() *Event {
	received := l.RequestReceivedTimestamp.value
	if received.IsZero() {
		received = l.StageTimestamp.value
	}
	return &Event{
		Level: l.Level, AuditID: l.AuditID, Stage: l.Stage, RequestURI: l.RequestURI, Verb: l.Verb,
		User: l.User.value, ImpersonatedUser: l.ImpersonatedUser.value, SourceIPs: l.SourceIPs.value, UserAgent: l.UserAgent,
		ObjectRef: l.ObjectRef.value, ResponseStatus: l.ResponseStatus.value,
		RequestObject: json.RawMessage(l.RequestObject.value), ResponseObject: json.RawMessage(l.ResponseObject.value),
		Received: received, Annotations: l.Annotations.value,
	}
}

// problem is why a line could not be read, in words that fit behind "line N ".
type problem string

func (p problem) Error() string { return string(p) }

// parse reads a line, which is an event or an EventList, and hands over the event, or the text of each item. An error is a problem.
func parse(text []byte, each func(*Event), item func([]byte) error) error {
	var l line
	if err := json.Unmarshal(text, &l); err != nil {
		var syntax *json.SyntaxError
		if bytes.HasPrefix(text, []byte("{")) && !json.Valid(text) {
			return problem("is cut off or broken: it begins like JSON, and is none")
		}
		if errors.As(err, &syntax) {
			return problem("is no JSON")
		}
		return problem(fmt.Sprintf("is not an audit event: %.200s", err))
	}
	switch {
	case l.Content+l.Log != "" && l.APIVersion == "" && l.Items == nil:
		event, other := unwrap(bytes.TrimSpace([]byte(l.Content + l.Log)))
		if other {
			return nil
		}
		if len(event) == 0 || event[0] != '{' {
			return problem("is not an audit event")
		}
		return parse(event, each, item)
	case l.Kind == "EventList" && l.APIVersion == knownVersion:
		var failed error
		for _, text := range l.Items {
			if err := item(text); failed == nil {
				failed = err
			}
		}
		return failed
	case l.Kind == "Event" && l.APIVersion == knownVersion:
		each(l.event())
		return nil
	case (l.Kind == "Event" || l.Kind == "EventList") && bytes.HasPrefix([]byte(l.APIVersion), []byte(groupPrefix)):
		return problem("has an audit event of version " + strconv.Quote(l.APIVersion) + ", which is not known; " + knownVersion + " is")
	default:
		return problem("is not an audit event")
	}
}
