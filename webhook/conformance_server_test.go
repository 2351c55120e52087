//go:build conformance

package webhook

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	admissionv1 "k8s.io/api/admission/v1"
	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/controller-runtime/pkg/envtest"
)

// binariesVariable names a directory with the programs etcd, kube-apiserver and helm.
const binariesVariable = "ENI_GUARD_APISERVER"

// The configurations that the tests install: the two of the chart, and the one that it renders for clusters without
// matchConditions, which shows every call that there is.
const (
	failClosed = "eni-guard"
	failOpen   = "eni-guard-failing-open"
	unfiltered = "eni-guard-unfiltered"
)

// auditPolicy records deletes and changes in the namespace with the overrides, and nothing else.
const auditPolicy = `{
  "apiVersion": "audit.k8s.io/v1", "kind": "Policy", "omitStages": ["RequestReceived"],
  "rules": [{"level": "Metadata", "verbs": ["delete", "update", "patch"], "namespaces": ["` + callsNamespace + `"]}, {"level": "None"}]
}`

// apiServer is a kube-apiserver with its etcd and nothing else: no controller, no kubelet.
type apiServer struct {
	*kubernetes.Clientset
	config   *rest.Config
	version  string
	etcd     string
	auditLog string
	calls    *recorder
}

// binary is the path of one of the programs.
func binary(t *testing.T, name string) string {
	t.Helper()
	dir := os.Getenv(binariesVariable)
	path := filepath.Join(dir, name)
	if _, err := os.Stat(path); err != nil || dir == "" {
		t.Fatalf("%s=%q is no directory with %s: `make test-conformance` makes one, and runs this test", binariesVariable, dir, name)
	}
	return path
}

// startAPIServer starts an API server as it is by default, with RBAC and with an audit log.
func startAPIServer(t *testing.T, change ...func(*envtest.Environment)) *apiServer {
	t.Helper()
	dir := t.TempDir()
	policy := filepath.Join(dir, "audit-policy.json")
	if err := os.WriteFile(policy, []byte(auditPolicy), 0o600); err != nil {
		t.Fatal(err)
	}
	environment := &envtest.Environment{ControlPlaneStartTimeout: time.Minute, ControlPlaneStopTimeout: time.Minute}
	environment.ControlPlane.Etcd = &envtest.Etcd{Path: binary(t, "etcd")}
	output := &bytes.Buffer{}
	process := environment.ControlPlane.GetAPIServer()
	process.Path, process.Out, process.Err = binary(t, "kube-apiserver"), output, output
	s := &apiServer{auditLog: filepath.Join(dir, "audit.log"), calls: &recorder{calls: map[string][]call{}}}
	process.Configure().Set("audit-policy-file", policy).Set("audit-log-path", s.auditLog)
	for _, f := range change {
		f(environment)
	}
	config, err := environment.Start()
	if err != nil {
		t.Fatalf("starting the API server: %v\n%s", err, output)
	}
	t.Cleanup(func() {
		if err := environment.Stop(); err != nil {
			t.Errorf("stopping the API server: %v", err)
		}
	})
	config.QPS = -1
	s.config, s.Clientset = config, kubernetes.NewForConfigOrDie(config)
	s.etcd = environment.ControlPlane.Etcd.URL.String()
	version, err := s.Discovery().ServerVersion()
	if err != nil {
		t.Fatal(err)
	}
	s.version = version.GitVersion
	return s
}

// store writes pods as they are, in states too that no API call leaves behind, with UIDs of their own.
func (s *apiServer) store(t *testing.T, pods ...*corev1.Pod) {
	t.Helper()
	type put struct {
		Key   []byte `json:"key"`
		Value []byte `json:"value"`
	}
	type operation struct {
		Put put `json:"requestPut"`
	}
	// etcd takes 128 operations in a transaction.
	for chunk := range slices.Chunk(pods, 100) {
		var transaction struct {
			Success []operation `json:"success"`
		}
		for _, pod := range chunk {
			value, err := json.Marshal(pod)
			if err != nil {
				t.Fatal(err)
			}
			key := "/registry/pods/" + pod.Namespace + "/" + pod.Name
			transaction.Success = append(transaction.Success, operation{put{[]byte(key), value}})
		}
		body, err := json.Marshal(transaction)
		if err != nil {
			t.Fatal(err)
		}
		response, err := http.Post(s.etcd+"/v3/kv/txn", "application/json", bytes.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		answer, _ := io.ReadAll(response.Body)
		response.Body.Close()
		if response.StatusCode != http.StatusOK {
			t.Fatalf("etcd: %s: %s", response.Status, answer)
		}
	}
}

// pods reads all pods of some namespaces, by their paths.
func (s *apiServer) pods(t *testing.T, namespaces ...string) map[string]*corev1.Pod {
	t.Helper()
	pods := map[string]*corev1.Pod{}
	for _, namespace := range namespaces {
		list, err := s.CoreV1().Pods(namespace).List(t.Context(), metav1.ListOptions{})
		if err != nil {
			t.Fatal(err)
		}
		for i := range list.Items {
			pods[podPath(&list.Items[i])] = &list.Items[i]
		}
	}
	return pods
}

// request is one HTTP request to the API server, by the administrator or in somebody else's name.
type request struct {
	verb, path  string
	query       map[string]string
	contentType string
	body        any
	user        string
	groups      []string
}

// send sends a request once and returns the status code of the answer; 0 means that there was none.
func (s *apiServer) send(ctx context.Context, r request) (int, error) {
	out := s.CoreV1().RESTClient().Verb(r.verb).AbsPath(r.path).MaxRetries(0)
	for key, value := range r.query {
		out = out.Param(key, value)
	}
	if r.user != "" {
		out = out.SetHeader("Impersonate-User", r.user)
	}
	if len(r.groups) > 0 {
		out = out.SetHeader("Impersonate-Group", r.groups...)
	}
	if r.body != nil {
		body, err := json.Marshal(r.body)
		if err != nil {
			return 0, err
		}
		if r.contentType == "" {
			r.contentType = "application/json"
		}
		out = out.Body(body).SetHeader("Content-Type", r.contentType)
	}
	code := 0
	err := out.Do(ctx).StatusCode(&code).Error()
	return code, err
}

// install writes the chart's configurations, with a server of this test in the place of the webhook. It returns when all of
// them are in force.
func (s *apiServer) install(t *testing.T) {
	t.Helper()
	server := httptest.NewTLSServer(s.calls)
	t.Cleanup(server.Close)
	authority := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw})
	older := renderChart(t, "1.29.0")
	for _, object := range older {
		if c, is := object.(*admissionregistrationv1.ValidatingWebhookConfiguration); is {
			c.Name = unfiltered
		}
	}
	for _, object := range slices.Concat(renderChart(t, s.version), older) {
		var err error
		switch o := object.(type) {
		case *admissionregistrationv1.ValidatingWebhookConfiguration:
			url := server.URL + "/" + o.Name
			for i := range o.Webhooks {
				o.Webhooks[i].ClientConfig = admissionregistrationv1.WebhookClientConfig{URL: &url, CABundle: authority}
			}
			_, err = s.AdmissionregistrationV1().ValidatingWebhookConfigurations().Create(t.Context(), o, metav1.CreateOptions{})
		case *admissionregistrationv1.ValidatingAdmissionPolicy:
			_, err = s.AdmissionregistrationV1().ValidatingAdmissionPolicies().Create(t.Context(), o, metav1.CreateOptions{})
		case *admissionregistrationv1.ValidatingAdmissionPolicyBinding:
			_, err = s.AdmissionregistrationV1().ValidatingAdmissionPolicyBindings().Create(t.Context(), o, metav1.CreateOptions{})
		}
		if err != nil {
			t.Fatalf("installing the chart's %T: %v", object, err)
		}
	}
}

// renderChart returns what the chart has about admission for a Kubernetes version.
func renderChart(t *testing.T, kubernetes string) []runtime.Object {
	t.Helper()
	var objects []runtime.Object
	for _, document := range templateChart(t, kubernetes) {
		object, kind, err := scheme.Codecs.UniversalDeserializer().Decode(document, nil, nil)
		if err != nil {
			t.Fatalf("the chart for Kubernetes %s: %v\n%s", kubernetes, err, document)
		}
		if kind.Group == admissionregistrationv1.GroupName {
			objects = append(objects, object)
		}
	}
	return objects
}

// templateChart returns all that the chart makes for a Kubernetes version, one YAML document each.
func templateChart(t *testing.T, kubernetes string, more ...string) [][]byte {
	t.Helper()
	var stderr bytes.Buffer
	cmd := exec.CommandContext(t.Context(), binary(t, "helm"), append([]string{"template", "eni-guard", "../charts/eni-guard",
		"--namespace", "eni-guard", "--kube-version", kubernetes}, more...)...)
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("rendering the chart for Kubernetes %s: %v\n%s", kubernetes, err, stderr.String())
	}
	var found [][]byte
	for documents := yaml.NewYAMLReader(bufio.NewReader(bytes.NewReader(out))); ; {
		document, err := documents.Read()
		if errors.Is(err, io.EOF) {
			return found
		}
		if err != nil {
			t.Fatal(err)
		}
		found = append(found, document)
	}
}

// call is what reached the webhook, and what it made of that.
type call struct {
	configuration string
	*removal
	err error
}

// recorder is a webhook that notes what it is asked, and allows it.
type recorder struct {
	mu    sync.Mutex
	calls map[string][]call
	// judge answers in its place, if it is there, and if it does not return nil.
	judge func(call) *admissionv1.AdmissionResponse
}

// of returns the calls about a pod, of some of the configurations, in their order.
func (r *recorder) of(pod *corev1.Pod, configurations ...string) []call {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(r.calls[pod.Namespace+"/"+pod.Name]), func(c call) bool {
		return !slices.Contains(configurations, c.configuration)
	})
}

// configurations names those by which the filtered calls about a pod came.
func (r *recorder) configurations(pod *corev1.Pod) string {
	var names []string
	for _, c := range r.of(pod, failClosed, failOpen) {
		names = append(names, c.configuration)
	}
	slices.Sort(names)
	if names = slices.Compact(names); len(names) == 0 {
		return "none"
	}
	return strings.Join(names, " and ")
}

func (r *recorder) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	review, status, err := readReview(w, req)
	if err != nil {
		http.Error(w, err.Error(), status)
		return
	}
	asked := review.Request
	c := call{configuration: strings.TrimPrefix(req.URL.Path, "/")}
	c.removal, c.err = removalOf(asked)
	name := asked.Name
	if name == "" && c.err == nil {
		name = c.pod.Name
	}
	r.mu.Lock()
	r.calls[asked.Namespace+"/"+name] = append(r.calls[asked.Namespace+"/"+name], c)
	r.mu.Unlock()
	response := &admissionv1.AdmissionResponse{Allowed: true}
	if r.judge != nil {
		response = cmp.Or(r.judge(c), response)
	}
	response.UID = asked.UID
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(admissionv1.AdmissionReview{TypeMeta: review.TypeMeta, Response: response})
}

// The audit annotations with the decision of the guard's webhook, and with the reason that the policy has found for an override.
const (
	webhookDecision = "force-delete.eni-guard.io/decision"
	policyReason    = "override.eni-guard.io/override-reason"
)

// auditEvent is what is read here of an event of the audit log.
type auditEvent struct {
	ObjectRef      struct{ Name string }
	Annotations    map[string]string
	ResponseStatus struct {
		Code    int
		Message string
	}
}

// audited returns what is in the audit log so far.
func (s *apiServer) audited(t *testing.T) []auditEvent {
	t.Helper()
	log, err := os.ReadFile(s.auditLog)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	var events []auditEvent
	for line := range bytes.Lines(log) {
		if !bytes.HasSuffix(line, []byte("\n")) {
			break // it is still being written
		}
		var event auditEvent
		if err := json.Unmarshal(line, &event); err != nil {
			t.Fatalf("%v in an audit event: %s", err, line)
		}
		events = append(events, event)
	}
	return events
}

// overridesInAudit returns what the policy has written about overrides into the audit log, by the pods' names.
func (s *apiServer) overridesInAudit(t *testing.T) map[string]string {
	t.Helper()
	reasons := map[string]string{}
	for _, event := range s.audited(t) {
		if reason, found := event.Annotations[policyReason]; found {
			reasons[event.ObjectRef.Name] = reason
		}
	}
	return reasons
}

// await waits for what takes the API server a moment.
func await(t *testing.T, what string, condition func() bool) {
	t.Helper()
	err := wait.PollUntilContextTimeout(t.Context(), 50*time.Millisecond, 30*time.Second, true, func(context.Context) (bool, error) {
		return condition(), nil
	})
	if err != nil {
		t.Fatalf("waiting for %s: %v", what, err)
	}
}

// disagreements reports what does not agree, one line each, and not more than anybody reads.
type disagreements struct {
	mu    sync.Mutex
	lines []string
}

func (d *disagreements) add(format string, args ...any) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.lines = append(d.lines, fmt.Sprintf(format, args...))
}

func (d *disagreements) report(t *testing.T) {
	t.Helper()
	slices.Sort(d.lines)
	for i, line := range d.lines {
		if i == 20 {
			t.Errorf("… and %d more", len(d.lines)-i)
			return
		}
		t.Error(line)
	}
}
