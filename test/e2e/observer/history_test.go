package observer

import (
	"encoding/json"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/eni-guard/eni-guard/test/e2e/incident"
)

const operator = "operator@example.com"

// event reads an audit event as the log has it, about the pod of these tests, and answered after a second.
func event(t *testing.T, seconds int, text string) incident.AuditEvent {
	t.Helper()
	e := incident.AuditEvent{}
	e.ObjectRef.Resource, e.ObjectRef.Namespace, e.ObjectRef.Name = "pods", "shop", "web-0"
	e.RequestReceivedTimestamp.Time, e.StageTimestamp.Time = at(seconds), at(seconds+1)
	if err := json.Unmarshal([]byte(text), &e); err != nil {
		t.Fatal(err)
	}
	if !IsRemoval(e) {
		t.Fatalf("no removal: %s", text)
	}
	return e
}

const (
	own        = `"force-delete.eni-guard.io/pod-uid":"` + string(webUID) + `"`
	failOpen   = `"failed-open.validating.webhook.admission.k8s.io/round_0_index_0":"force-delete.eni-guard.io"`
	atOnceBody = `"requestObject":{"gracePeriodSeconds":0}`
)

func TestWhatTheAuditLogSaysOfARemoval(t *testing.T) {
	decided := func(decision, reason string) string {
		return `{"verb":"delete","responseStatus":{"code":200},` + atOnceBody + `,"annotations":{` + own +
			`,"force-delete.eni-guard.io/decision":"` + decision + `","force-delete.eni-guard.io/reason":"` + reason + `"}}`
	}
	byKubelet := `{"verb":"delete","user":{"username":"system:node:node-1"},"responseStatus":{"code":200},"requestObject":{"gracePeriodSeconds":0,"preconditions":{"uid":"` + string(webUID) + `"}}}`
	ofAnother := `{"verb":"delete","user":{"username":"system:node:node-1"},"responseStatus":{"code":200},"requestObject":{"gracePeriodSeconds":0,"preconditions":{"uid":"` + string(otherUID) + `"}}}`
	evicted := `{"verb":"create","objectRef":{"subresource":"eviction"},"responseStatus":{"code":201},"annotations":{` + failOpen + `}}`
	byOperator := `{"verb":"delete","impersonatedUser":{"username":"` + operator + `"},"responseStatus":{"code":200},` + atOnceBody + `,"annotations":{` + own + `,"force-delete.eni-guard.io/decision":"overridden","force-delete.eni-guard.io/reason":"Override"}}`
	askedAgain := strings.Replace(strings.Replace(byOperator, `"overridden"`, `"denied"`, 1), `"Override"}}`, `"SandboxBound","override.eni-guard.io/override-reason":"a test"}}`, 1)
	gracefully := `{"verb":"create","objectRef":{"subresource":"eviction"},"responseStatus":{"code":201},"annotations":{` + own + `,"force-delete.eni-guard.io/decision":"exempt","force-delete.eni-guard.io/reason":"NotForced"}}`
	collection := `{"verb":"deletecollection","objectRef":{"name":""},"responseStatus":{"code":409},"annotations":{"force-delete.eni-guard.io/pod.` + string(webUID) + `":"{\"decision\":\"held\",\"reason\":\"SandboxBound\"}"}}`
	until := func(seconds int) map[string]string {
		return map[string]string{overrideAnnotation: "a test", untilAnnotation: at(seconds).Format(time.RFC3339)}
	}
	for name, c := range map[string]struct {
		events      []string // each a second after the one before
		annotations map[string]string
		hasty       bool
		want        Record
		accounted   bool
	}{
		"nothing":                               {nil, nil, false, Record{}, false},
		"allowed":                               {[]string{decided("allowed", "SandboxReleased")}, nil, false, Record{Reason: "SandboxReleased", Received: at(0), Completed: at(1)}, true},
		"refused":                               {[]string{strings.Replace(decided("denied", "SandboxBound"), "200", "409", 1)}, nil, false, Record{}, false},
		"refused, of an outdated copy":          {[]string{decided("denied", "SandboxBound")}, nil, false, Record{}, true},
		"refused, an eviction":                  {[]string{strings.Replace(decided("denied", "SandboxBound"), `"verb":"delete"`, `"verb":"create","objectRef":{"subresource":"eviction"}`, 1)}, nil, false, Record{}, false},
		"refused in dry run":                    {[]string{strings.Replace(decided("denied", "SandboxBound"), `"gracePeriodSeconds":0`, `"gracePeriodSeconds":0,"dryRun":["All"]`, 1)}, nil, false, Record{}, false},
		"refused with its namespace":            {[]string{strings.Replace(strings.Replace(collection, "held", "denied", 1), "409", "200", 1)}, nil, false, Record{}, false},
		"the kubelet":                           {[]string{byKubelet}, nil, false, Record{ByKubelet: true, Received: at(0), Completed: at(1)}, true},
		"the kubelet, which has been killed":    {[]string{strings.Replace(byKubelet, "200", "504", 1)}, nil, false, Record{ByKubelet: true, Received: at(0), Completed: at(1)}, true},
		"the kubelet, refused":                  {[]string{strings.Replace(byKubelet, "200", "409", 1)}, nil, false, Record{}, false},
		"somebody else, of whom it says that":   {[]string{strings.Replace(decided("denied", "SandboxBound"), "200", "504", 1)}, nil, false, Record{}, false},
		"the kubelet, of another pod":           {[]string{ofAnother}, nil, false, Record{}, false},
		"evicted gracefully before the kubelet": {[]string{gracefully, byKubelet}, nil, false, Record{ByKubelet: true, Received: at(1), Completed: at(2)}, true},
		"evicted gracefully alone":              {[]string{gracefully}, nil, false, Record{}, false},
		"held, then the kubelet":                {[]string{decided("held", "SandboxBound"), byKubelet}, nil, false, Record{Reason: "SandboxBound"}, true},
		"held with its namespace":               {[]string{collection}, nil, false, Record{Reason: "SandboxBound"}, true},
		"failed open, a pod without time":       {[]string{evicted}, nil, true, Record{FailedOpen: true}, true},
		"failed open, a pod with time":          {[]string{evicted}, nil, false, Record{}, false},
		"an override":                           {[]string{byOperator}, map[string]string{overrideAnnotation: "a test"}, false, Record{Override: true, Reason: "Override"}, true},
		"one that the copy the API server asked about first did not have": {[]string{askedAgain}, map[string]string{overrideAnnotation: "a test"}, false, Record{Override: true}, true},
		"one without an annotation":                                       {[]string{byOperator}, nil, false, Record{Reason: "Override"}, true},
		"one that ends later":                                             {[]string{byOperator}, until(1), false, Record{Override: true, Reason: "Override"}, true},
		"one that has ended":                                              {[]string{byOperator}, until(0), false, Record{Reason: "Override"}, true},
	} {
		t.Run(name, func(t *testing.T) {
			var events []incident.AuditEvent
			for i, text := range c.events {
				events = append(events, event(t, i, text))
			}
			r := Removal{Pod: pod(webUID, "web-0", webIP)}
			r.Pod.Annotations = c.annotations
			if c.hasty {
				r.Pod.Spec = corev1.PodSpec{TerminationGracePeriodSeconds: new(int64(0))}
			}
			got, accounted := NewHistory(events).Record(r, false, operator)
			if got != c.want || accounted != c.accounted {
				t.Errorf("got %+v, accounted %t, want %+v, %t", got, accounted, c.want, c.accounted)
			}
		})
	}
}

func TestForcedRequestsWithoutADecision(t *testing.T) {
	events := []incident.AuditEvent{
		event(t, 0, `{"verb":"delete","responseStatus":{"code":200},`+atOnceBody+`}`),
		event(t, 1, `{"verb":"create","objectRef":{"subresource":"eviction"},"responseStatus":{"code":201},"requestObject":{"deleteOptions":{"gracePeriodSeconds":0}}}`),
		event(t, 2, `{"verb":"delete","responseStatus":{"code":500},`+atOnceBody+`}`),
		event(t, 3, `{"verb":"delete","responseStatus":{"code":200},`+atOnceBody+`,"annotations":{"override.eni-guard.io/override-reason":"a test"}}`),
		event(t, 4, `{"verb":"delete","responseStatus":{"code":200},"requestObject":{"gracePeriodSeconds":1}}`),
		event(t, 5, `{"verb":"delete","user":{"username":"system:node:node-1"},"responseStatus":{"code":200},`+atOnceBody+`}`),
		event(t, 6, `{"verb":"delete","responseStatus":{"code":200},`+atOnceBody+`,"annotations":{"force-delete.eni-guard.io/decision":"allowed"}}`),
		event(t, 7, `{"verb":"delete","objectRef":{"namespace":"off"},"responseStatus":{"code":200},`+atOnceBody+`}`),
	}
	through, failed := NewHistory(events).Undecided(func(namespace string) bool { return namespace != "off" })
	if len(through) != 2 || failed["500"] != 1 || failed["overridden without a webhook"] != 1 || len(failed) != 2 {
		t.Errorf("through %q, failed %v", through, failed)
	}
}
