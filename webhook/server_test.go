package webhook

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/go-logr/logr"
	"github.com/go-logr/logr/funcr"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	admissionv1 "k8s.io/api/admission/v1"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/events"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"

	"github.com/eni-guard/eni-guard/internal/mtls"
	"github.com/eni-guard/eni-guard/internal/mtls/mtlstest"
	"github.com/eni-guard/eni-guard/internal/pki"
	"github.com/eni-guard/eni-guard/internal/sandbox"
)

// agentFunc is an agent of one function.
type agentFunc func(ctx context.Context, address string, query sandbox.Query) (sandbox.Report, error)

func (f agentFunc) ask(ctx context.Context, address string, query sandbox.Query) (sandbox.Report, error) {
	return f(ctx, address, query)
}

func (f agentFunc) await(ctx context.Context, address string, query sandbox.Query, _ time.Duration) (sandbox.Report, error) {
	return f(ctx, address, query)
}

// accessFunc grants the right to override.
type accessFunc func(user authenticationv1.UserInfo, pod *corev1.Pod) (bool, error)

func (f accessFunc) mayOverride(_ context.Context, user authenticationv1.UserInfo, pod *corev1.Pod) (bool, error) {
	return f(user, pod)
}

func nodeA(change ...func(*corev1.Node)) *corev1.Node {
	node := &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: "node-a"},
		Status: corev1.NodeStatus{Addresses: []corev1.NodeAddress{
			{Type: corev1.NodeHostName, Address: "node-a"}, {Type: corev1.NodeInternalIP, Address: "192.0.2.7"},
		}},
	}
	for _, f := range change {
		f(node)
	}
	return node
}

// testTime is now for a guard under test.
var testTime = time.Date(2026, 11, 24, 3, 0, 0, 0, time.UTC)

// newGuard returns a guard of mode deny, for which the API server has these objects. Nobody may override.
func newGuard(agent agentFunc, objects ...client.Object) *Guard {
	api := fake.NewClientBuilder().WithObjects(objects...).Build()
	return &Guard{
		policy: policy{mode: ModeDeny, allowWhenNodeIsGone: true},
		cached: api, live: api,
		agents:    agent,
		access:    accessFunc(func(authenticationv1.UserInfo, *corev1.Pod) (bool, error) { return false, nil }),
		holds:     holder{api},
		events:    events.NewFakeRecorder(100),
		decisions: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "test"}, []string{"mode", "decision", "verdict", "path"}),
		phases:    newPhaseWatch(),
		now:       func() time.Time { return testTime },
	}
}

func finds(findings ...sandbox.Finding) agentFunc {
	return func(context.Context, string, sandbox.Query) (sandbox.Report, error) {
		return allProbes(findings...), nil
	}
}

// post sends body to the guard and returns the HTTP response and what was logged.
func post(t *testing.T, g *Guard, target, contentType, body string) (*httptest.ResponseRecorder, []string) {
	t.Helper()
	var lines []string
	log := funcr.New(func(_, args string) { lines = append(lines, args) }, funcr.Options{})
	request := httptest.NewRequestWithContext(t.Context(), http.MethodPost, target, strings.NewReader(body))
	request.Header.Set("Content-Type", contentType)
	recorder := httptest.NewRecorder()
	g.Handler(log).ServeHTTP(recorder, request)
	return recorder, lines
}

func reviewBody(t testing.TB, request *admissionv1.AdmissionRequest) string {
	t.Helper()
	body, err := json.Marshal(admissionv1.AdmissionReview{
		TypeMeta: metav1.TypeMeta{APIVersion: "admission.k8s.io/v1", Kind: "AdmissionReview"}, Request: request,
	})
	if err != nil {
		t.Fatal(err)
	}
	return string(body)
}

func TestMalformedReviews(t *testing.T) {
	never := newGuard(func(context.Context, string, sandbox.Query) (sandbox.Report, error) {
		t.Error("an agent was asked")
		return sandbox.Report{}, errors.New("unexpected")
	}, nodeA())
	for _, test := range []struct {
		name, contentType, body string
		status                  int
		want                    string
	}{
		{"empty", "application/json", "", 400, "the body is not an AdmissionReview"},
		{"not JSON", "application/json", "<xml/>", 400, "the body is not an AdmissionReview"},
		{"a list", "application/json", "[]", 400, "the body is not an AdmissionReview"},
		{"another kind", "application/json", `{"kind":"Pod","apiVersion":"v1"}`, 400, `the body is "Pod" of "v1"`},
		{"an older version", "application/json", `{"kind":"AdmissionReview","apiVersion":"admission.k8s.io/v1beta1","request":{"uid":"u"}}`, 400, `v1beta1`},
		{"no request", "application/json", `{"kind":"AdmissionReview","apiVersion":"admission.k8s.io/v1"}`, 400, "has no request"},
		{"no UID", "application/json", `{"kind":"AdmissionReview","apiVersion":"admission.k8s.io/v1","request":{}}`, 400, "has no UID"},
		{"another content type", "text/plain", "{}", 415, `content type "text/plain" is not application/json`},
		{"too large", "application/json", `"` + strings.Repeat("x", 8<<20) + `"`, 413, "larger than 8388608 bytes"},
	} {
		t.Run(test.name, func(t *testing.T) {
			response, lines := post(t, never, ReviewPath, test.contentType, test.body)
			if response.Code != test.status || !strings.Contains(response.Body.String(), test.want) {
				t.Errorf("got %d %q, want %d with %q", response.Code, response.Body, test.status, test.want)
			}
			if len(lines) != 1 || !strings.Contains(lines[0], "refused a request that is not an AdmissionReview") {
				t.Errorf("logged %q", lines)
			}
		})
	}
}

func TestMethodMustBePost(t *testing.T) {
	recorder := httptest.NewRecorder()
	newGuard(nil).Handler(logr.Discard()).ServeHTTP(recorder, httptest.NewRequestWithContext(t.Context(), http.MethodGet, ReviewPath, nil))
	if recorder.Code != http.StatusMethodNotAllowed {
		t.Errorf("got %d", recorder.Code)
	}
}

// ended is a pod whose containers the kubelet has reported terminated.
func ended(change ...func(*corev1.Pod)) *corev1.Pod {
	return runningPod(append(change, phase(corev1.PodSucceeded), func(p *corev1.Pod) {
		p.Status.ContainerStatuses = []corev1.ContainerStatus{{State: corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{}}}}
	})...)
}

func TestTheKubeletOfThePodsNodeIsRecognisedByNameAndGroup(t *testing.T) {
	request := deleteRequest(t, runningPod(), new(int64(0)))
	request.UserInfo = authenticationv1.UserInfo{Username: "system:node:node-a", Groups: []string{"system:nodes", "system:authenticated"}}
	response, err := newGuard(finds(stuck()...), nodeA()).review(t.Context(), logr.Discard(), request)
	if err != nil || !response.Allowed || response.AuditAnnotations["reason"] != string(ReasonOwnKubelet) {
		t.Errorf("got %+v (%v)", response, err)
	}
}

func TestEveryDecisionIsCounted(t *testing.T) {
	guard := newGuard(finds(stuck()...), nodeA())
	for range 2 {
		post(t, guard, ReviewPath, "application/json", reviewBody(t, deleteRequest(t, runningPod(), new(int64(0)))))
	}
	if n := testutil.ToFloat64(guard.decisions.WithLabelValues("deny", "denied", "bound", "delete")); n != 2 {
		t.Errorf("counted %v, want 2", n)
	}
}

func TestOptionsNameTheFlagThatIsWrong(t *testing.T) {
	serving, asking := t.TempDir(), t.TempDir()
	authority := mtlstest.NewAuthority(t)
	authority.Issue(t, serving, "webhook", time.Hour)
	authority.Issue(t, asking, mtls.WebhookName, time.Hour)
	valid := options{port: 1, agentPort: 2, healthAddress: ":3", metricsAddress: ":4", tlsDir: serving, agentTLSDir: asking, agentTimeout: time.Second, mode: "deny"}
	if _, err := valid.validate(); err != nil {
		t.Fatal(err)
	}
	for want, change := range map[string]func(*options){
		"--port 0 is not":                func(o *options) { o.port = 0 },
		"--agent-port 65536 is not":      func(o *options) { o.agentPort = 65536 },
		"--health-address: ":             func(o *options) { o.healthAddress = "1.2.3.4" },
		"--metrics-address: ":            func(o *options) { o.metricsAddress = "" },
		"--agent-timeout 26s is not":     func(o *options) { o.agentTimeout = 26 * time.Second },
		"--agent-timeout 999ms is not":   func(o *options) { o.agentTimeout = 999 * time.Millisecond },
		"--tls-dir: ":                    func(o *options) { o.tlsDir = t.TempDir() },
		`--mode: "denny" is not a mode`:  func(o *options) { o.mode = "denny" },
		`--excluded-nodes "a in" is not`: func(o *options) { o.excludedNodes = []string{"a in"} },
		"--excluded-nodes is empty":      func(o *options) { o.excludedNodes = []string{""} },
		"--agent-tls-dir: ":              func(o *options) { o.agentTLSDir = t.TempDir() },
		"--authority-validity, --certificate-validity, --certificate-overlap: the validity of leaves 1m0s is less": func(o *options) {
			o.release, o.validity = "eni-guard", pki.Settings{Authority: time.Hour, Leaf: time.Minute, Overlap: 30 * time.Second}
		},
	} {
		o := valid
		change(&o)
		if _, err := o.validate(); err == nil || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("got %v, want %q", err, want)
		}
	}
}

func TestReviews(t *testing.T) {
	silent := func(context.Context, string, sandbox.Query) (sandbox.Report, error) {
		return sandbox.Report{}, errors.New("did not answer within 5s at 192.0.2.7:9807")
	}
	outOfServiceTaint := func(n *corev1.Node) { n.Spec.Taints = []corev1.Taint{{Key: "node.kubernetes.io/out-of-service"}} }
	for _, test := range []struct {
		name     string
		guard    *Guard
		pod      *corev1.Pod
		grace    *int64
		allowed  bool
		decision string
		reason   Reason
		code     int32
	}{
		{"bound", newGuard(finds(stuck()...), nodeA()), runningPod(), new(int64(0)), false, "denied", ReasonBound, 409},
		{"released", newGuard(finds(), nodeA()), runningPod(), new(int64(0)), true, "allowed", ReasonReleased, 0},
		{"graceful", newGuard(nil, nodeA()), runningPod(), new(int64(30)), true, "exempt", ReasonNotForced, 0},
		{"no answer", newGuard(silent, nodeA()), runningPod(), new(int64(0)), false, "denied", ReasonNoAnswer, 409},
		{"the node is gone", newGuard(nil), runningPod(), new(int64(0)), true, "allowed", ReasonNodeGone, 0},
		{"no answer, out of service", newGuard(silent, nodeA(outOfServiceTaint)), runningPod(), new(int64(0)), true, "allowed", ReasonNodeOutOfService, 0},
		{"out of service, but still bound", newGuard(finds(stuck()...), nodeA(outOfServiceTaint)), runningPod(), new(int64(0)), false, "denied", ReasonBound, 409},
		{"no answer, but the kubelet saw it end", newGuard(silent, nodeA()), ended(), nil, true, "allowed", ReasonContainersTerminated, 0},
		{"no answer, the kubelet saw it end, and is finishing it", newGuard(silent, nodeA()), ended(terminating(new(int64(30)))), new(int64(0)), false, "denied", ReasonNoAnswer, 409},
		{"no answer, the kubelet saw it end, and another replica has let its mark through", newGuard(silent, nodeA()), ended(terminating(new(int64(0)))), nil, true, "allowed", ReasonContainersTerminated, 0},
		{"no answer, the kubelet saw it end, and somebody's finalizer has kept it since it was marked", newGuard(silent, nodeA()), ended(terminating(new(int64(0))), keptBy("example.com/keep")), nil, false, "denied", ReasonNoAnswer, 409},
		{"no answer, marked, but still running", newGuard(silent, nodeA()), runningPod(terminating(new(int64(0)))), new(int64(0)), false, "denied", ReasonNoAnswer, 409},
		{"bound, and another replica has let its mark through", newGuard(finds(stuck()...), nodeA()), ended(terminating(new(int64(0)))), nil, false, "denied", ReasonBound, 409},
		{"no answer, the kubelet saw it end, but it was held because it was bound", newGuard(silent, nodeA()), ended(keptBy(Finalizer)), nil, false, "denied", ReasonNoAnswer, 409},
		{"no answer about a pod that only its phase calls ended", newGuard(silent, nodeA()), runningPod(phase(corev1.PodFailed)), nil, false, "denied", ReasonNoAnswer, 409},
		{"the node has no address", newGuard(nil, nodeA(func(n *corev1.Node) { n.Status.Addresses = nil })), runningPod(), new(int64(0)), false, "denied", ReasonNoAnswer, 409},
	} {
		t.Run(test.name, func(t *testing.T) {
			response, lines := post(t, test.guard, ReviewPath+"?timeout=10s", "application/json; charset=utf-8", reviewBody(t, deleteRequest(t, test.pod, test.grace)))
			var review admissionv1.AdmissionReview
			if err := json.Unmarshal(response.Body.Bytes(), &review); err != nil || response.Code != 200 || review.Response == nil {
				t.Fatalf("got %d %q (%v)", response.Code, response.Body, err)
			}
			r := review.Response
			if review.Kind != "AdmissionReview" || review.APIVersion != "admission.k8s.io/v1" || r.UID != "705ab4f5-6393-11e8-b7cc-42010a800002" {
				t.Errorf("got kind %q, version %q, UID %q", review.Kind, review.APIVersion, r.UID)
			}
			if r.Allowed != test.allowed || r.AuditAnnotations["decision"] != test.decision || r.AuditAnnotations["reason"] != string(test.reason) {
				t.Errorf("got allowed %v, %v", r.Allowed, r.AuditAnnotations)
			}
			if !test.allowed && r.Result.Code != test.code {
				t.Errorf("code %d, want %d", r.Result.Code, test.code)
			}
			if len(lines) != 1 || !strings.Contains(lines[0], `"decision"="`+test.decision+`"`) || !strings.Contains(lines[0], `"pod"="web-0"`) {
				t.Errorf("logged %q", lines)
			}
		})
	}
}

// A cache that lags must not allow anything: it has not seen a new node, or still has a taint that was taken away.
func TestOnlyTheLiveNodeAllows(t *testing.T) {
	silent := func(context.Context, string, sandbox.Query) (sandbox.Report, error) {
		return sandbox.Report{}, errors.New("did not answer")
	}
	tainted := nodeA(func(n *corev1.Node) { n.Spec.Taints = []corev1.Taint{{Key: "node.kubernetes.io/out-of-service"}} })
	empty := fake.NewClientBuilder().Build()
	for _, test := range []struct {
		name         string
		cached, live client.Reader
		want         Reason
	}{
		{"new, not in the cache yet", empty, newGuard(nil, nodeA()).live, ReasonNoAnswer},
		{"gone, still in the cache", newGuard(nil, nodeA()).live, empty, ReasonNodeGone},
		{"the taint is gone, but cached", newGuard(nil, tainted).live, newGuard(nil, nodeA()).live, ReasonNoAnswer},
		{"the API server does not answer", newGuard(nil, tainted).live, failingReader{}, ReasonNoAnswer},
	} {
		t.Run(test.name, func(t *testing.T) {
			guard := newGuard(silent)
			guard.cached, guard.live = test.cached, test.live
			d := guard.judge(t.Context(), &removal{path: PathDelete, pod: runningPod(), grace: new(int64(0))})
			if d.reason != test.want {
				t.Errorf("got %s for %s (%s), want %s", d.outcome, d.reason, d.failure, test.want)
			}
		})
	}
}

// failingReader is an API server that cannot be reached.
type failingReader struct{ client.Reader }

func (failingReader) Get(context.Context, client.ObjectKey, client.Object, ...client.GetOption) error {
	return errors.New("connection refused")
}

// A request that is a sound AdmissionReview, but not one this webhook is made for, is answered with its UID: anything
// else would look to the API server like a webhook that is down.
func TestReviewsOfOtherThings(t *testing.T) {
	request := deleteRequest(t, runningPod(), nil)
	request.OldObject.Raw = nil
	response, lines := post(t, newGuard(nil, nodeA()), ReviewPath, "application/json", reviewBody(t, request))
	var review admissionv1.AdmissionReview
	if err := json.Unmarshal(response.Body.Bytes(), &review); err != nil || response.Code != 200 {
		t.Fatalf("got %d %q (%v)", response.Code, response.Body, err)
	}
	r := review.Response
	if r.UID != request.UID || r.Allowed || r.Result.Code != 400 || !strings.Contains(r.Result.Message, "oldObject is missing") {
		t.Errorf("got %+v", r)
	}
	if len(lines) != 1 {
		t.Errorf("logged %q", lines)
	}
}

func TestTheAgentIsAskedAtTheNodesAddressInTime(t *testing.T) {
	asked := false
	guard := newGuard(func(ctx context.Context, address string, query sandbox.Query) (sandbox.Report, error) {
		asked = true
		deadline, ok := ctx.Deadline()
		if left := time.Until(deadline); !ok || left > 9*time.Second {
			t.Errorf("the deadline is in %s (%v), not a second before the API server's", left, ok)
		}
		if address != "192.0.2.7" || query.Node != "node-a" || query.UID != "0e0d5ce6-6a6c-4c5b-9f6c-111111111111" {
			t.Errorf("asked %s for %+v", address, query)
		}
		return allProbes(), nil
	}, nodeA())
	post(t, guard, ReviewPath+"?timeout=10s", "application/json", reviewBody(t, deleteRequest(t, runningPod(), new(int64(0)))))
	if !asked {
		t.Error("no agent was asked")
	}
}

func TestTrimmedNodesKeepWhatADecisionNeeds(t *testing.T) {
	node := nodeA(func(n *corev1.Node) {
		n.Spec.Taints = []corev1.Taint{{Key: "node.kubernetes.io/out-of-service"}}
		n.Status.Images = []corev1.ContainerImage{{Names: []string{"large"}}}
	})
	kept, err := trimNodes(nil)(node)
	if err != nil {
		t.Fatal(err)
	}
	trimmed := kept.(*corev1.Node)
	address, err := internalAddress(trimmed)
	if err != nil || address != "192.0.2.7" || !outOfService(trimmed) || trimmed.Name != "node-a" || trimmed.Status.Images != nil {
		t.Errorf("got %+v (%v)", trimmed, err)
	}
}
