// Package scale measures the webhook on a cluster of 5,000 nodes and 100,000 pods: a real API server with its etcd, the real
// binary, and agents that are simulated in this process, one for each node at an address of its own in 127.0.0.0/8.
package scale

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	admissionv1 "k8s.io/api/admission/v1"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	apiruntime "k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/kubernetes"
	"sigs.k8s.io/controller-runtime/pkg/envtest"

	"github.com/eni-guard/eni-guard/internal/agent"
	"github.com/eni-guard/eni-guard/internal/sandbox"
)

const (
	nodes      = 5000
	pods       = 100_000
	namespaces = 500
	// callers is how many API servers' worth of requests are under way at once.
	callers = 16
	// busy and rest are how long decisions are made, and how long requests at rest are counted.
	busy = 20 * time.Second
	rest = time.Minute
)

// BenchmarkWebhook starts the webhook on the large cluster, asks it about pods on all nodes, and leaves it at rest. Everything it
// reports is measured from outside of the process: by the kernel, by the API server, by the callers.
func BenchmarkWebhook(b *testing.B) {
	server := startAPIServer(b)
	server.fill(b)
	for b.Loop() {
		agents := startAgents(b)
		w := server.startWebhook(b, agents)
		b.ReportMetric(w.ready.Seconds(), "s-to-ready")
		b.ReportMetric(w.resident(b), "MiB-ready")
		<-time.After(rest) // the cache of held pods is filled after the webhook is ready
		requests := w.requests(b)
		<-time.After(rest)
		b.ReportMetric((w.requests(b)-requests)*float64(time.Hour/rest), "requests/h-at-rest")
		b.ReportMetric(w.resident(b), "MiB-at-rest")

		decisions := w.decide(b)
		b.ReportMetric(float64(decisions)/busy.Seconds(), "decisions/s")
		b.ReportMetric(w.resident(b), "MiB-busy")
		b.ReportMetric(w.peak(b), "MiB-peak")
		b.Logf("%d decisions about pods on %d nodes, each by a question to the node's agent", decisions, agents.asked(b))
		w.stop(b)
	}
	b.ReportMetric(0, "ns/op") // one run of it is not the measure
}

// binary is the path of one of the programs that the Makefile builds.
func binary(b *testing.B, variable, name string) string {
	b.Helper()
	path := filepath.Join(os.Getenv(variable), name)
	if _, err := os.Stat(path); err != nil || os.Getenv(variable) == "" {
		b.Fatalf("%s=%q is no directory with %s: `make bench-scale` makes it, and runs this", variable, os.Getenv(variable), name)
	}
	return path
}

type apiServer struct {
	*kubernetes.Clientset
	etcd       string
	kubeconfig []byte
}

func startAPIServer(b *testing.B) *apiServer {
	b.Helper()
	environment := &envtest.Environment{ControlPlaneStartTimeout: time.Minute}
	environment.ControlPlane.Etcd = &envtest.Etcd{Path: binary(b, "ENI_GUARD_APISERVER", "etcd")}
	output := &bytes.Buffer{}
	process := environment.ControlPlane.GetAPIServer()
	process.Path, process.Out, process.Err = binary(b, "ENI_GUARD_APISERVER", "kube-apiserver"), output, output
	config, err := environment.Start()
	if err != nil {
		b.Fatalf("starting the API server: %v\n%s", err, output)
	}
	b.Cleanup(func() {
		if err := environment.Stop(); err != nil {
			b.Errorf("stopping the API server: %v", err)
		}
	})
	config.QPS = -1
	user, err := environment.ControlPlane.AddUser(envtest.User{Name: "eni-guard-webhook", Groups: []string{"system:masters"}}, nil)
	if err != nil {
		b.Fatal(err)
	}
	kubeconfig, err := user.KubeConfig()
	if err != nil {
		b.Fatal(err)
	}
	return &apiServer{kubernetes.NewForConfigOrDie(config), environment.ControlPlane.Etcd.URL.String(), kubeconfig}
}

// address is the one of a node's agent.
func address(node int) string { return fmt.Sprintf("127.1.%d.%d", node/250, node%250+1) }

func nodeName(node int) string { return fmt.Sprintf("cn-hangzhou.%05d", node) }

// podOn is one of the pods of a node, as long as such objects are in real clusters.
func podOn(number int) *corev1.Pod {
	node := number % nodes
	pod := &corev1.Pod{
		TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Pod"},
		ObjectMeta: metav1.ObjectMeta{
			Namespace: fmt.Sprintf("team-%03d", number%namespaces), Name: fmt.Sprintf("web-%06d", number),
			UID: apiUID(number), CreationTimestamp: metav1.Now(),
			Labels: map[string]string{"app": "web", "pod-template-hash": "5d4f8c7b9"},
		},
		Spec: corev1.PodSpec{
			NodeName: nodeName(node), RestartPolicy: corev1.RestartPolicyAlways, TerminationGracePeriodSeconds: new(int64(30)),
			DNSPolicy: corev1.DNSClusterFirst, SchedulerName: "default-scheduler", SecurityContext: &corev1.PodSecurityContext{},
		},
		Status: corev1.PodStatus{Phase: corev1.PodRunning, PodIP: fmt.Sprintf("10.%d.%d.%d", number/65536, number/256%256, number%256)},
	}
	pod.Status.PodIPs = []corev1.PodIP{{IP: pod.Status.PodIP}}
	for _, name := range []string{"app", "sidecar"} {
		pod.Spec.Containers = append(pod.Spec.Containers, corev1.Container{
			Name: name, Image: "registry.example.com/team/" + name + ":1.2.3", Args: []string{"--port=8080", "--verbose"},
			TerminationMessagePath: "/dev/termination-log", TerminationMessagePolicy: corev1.TerminationMessageReadFile, ImagePullPolicy: corev1.PullIfNotPresent,
		})
		pod.Status.ContainerStatuses = append(pod.Status.ContainerStatuses, corev1.ContainerStatus{Name: name, Ready: true,
			Image: "registry.example.com/team/" + name + ":1.2.3", State: corev1.ContainerState{Running: &corev1.ContainerStateRunning{StartedAt: metav1.Now()}}})
	}
	return pod
}

// bigNode is a node with 50 images, which are most of such objects in real clusters.
func bigNode(number int) *corev1.Node {
	node := &corev1.Node{
		TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Node"},
		ObjectMeta: metav1.ObjectMeta{
			Name: nodeName(number), UID: apiUID(1_000_000 + number), CreationTimestamp: metav1.Now(),
			Labels: map[string]string{"kubernetes.io/os": "linux", "kubernetes.io/arch": "amd64", "node.kubernetes.io/instance-type": "ecs.g7.4xlarge", "topology.kubernetes.io/zone": "cn-hangzhou-h"},
		},
		Status: corev1.NodeStatus{Addresses: []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: address(number)}, {Type: corev1.NodeHostName, Address: nodeName(number)}}},
	}
	for _, kind := range []corev1.NodeConditionType{corev1.NodeReady, corev1.NodeMemoryPressure, corev1.NodeDiskPressure, corev1.NodePIDPressure} {
		node.Status.Conditions = append(node.Status.Conditions, corev1.NodeCondition{Type: kind, Status: corev1.ConditionFalse, Reason: "KubeletHasNoPressure", LastHeartbeatTime: metav1.Now(), LastTransitionTime: metav1.Now()})
	}
	for i := range 50 {
		node.Status.Images = append(node.Status.Images, corev1.ContainerImage{
			Names:     []string{fmt.Sprintf("registry.example.com/team/image-%d@sha256:%064d", i, i), fmt.Sprintf("registry.example.com/team/image-%d:1.2.3", i)},
			SizeBytes: 123456789,
		})
	}
	return node
}

// fill writes the objects into etcd as they are: through the API it would take many times as long.
func (s *apiServer) fill(b *testing.B) {
	b.Helper()
	start := time.Now()
	var group sync.WaitGroup
	work := make(chan []put)
	for range runtime.NumCPU() {
		group.Go(func() {
			for puts := range work {
				if err := s.write(puts); err != nil {
					b.Error(err)
				}
			}
		})
	}
	keep := func(key string, objects int, object func(int) any) {
		var puts []put
		for i := range objects {
			value, err := json.Marshal(object(i))
			if err != nil {
				b.Fatal(err)
			}
			puts = append(puts, put{[]byte("/registry/" + key + metaName(object(i))), value})
		}
		for chunk := range slices.Chunk(puts, 100) { // etcd takes 128 in a transaction
			work <- chunk
		}
	}
	keep("namespaces/", namespaces, func(i int) any {
		return &corev1.Namespace{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Namespace"}, ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprintf("team-%03d", i), UID: apiUID(2_000_000 + i)}}
	})
	keep("minions/", nodes, func(i int) any { return bigNode(i) })
	keep("pods/", pods, func(i int) any { return podOn(i) })
	close(work)
	group.Wait()
	// The API server hears of them from etcd, by a watch, a moment later.
	err := wait.PollUntilContextTimeout(b.Context(), time.Second, time.Minute, true, func(ctx context.Context) (bool, error) {
		nodeList, err := s.CoreV1().Nodes().List(ctx, metav1.ListOptions{ResourceVersion: "0"})
		if err != nil {
			return false, err
		}
		podList, err := s.CoreV1().Pods("").List(ctx, metav1.ListOptions{ResourceVersion: "0"})
		return err == nil && len(nodeList.Items) == nodes && len(podList.Items) == pods, err
	})
	if err != nil {
		b.Fatalf("the API server has not got all nodes and pods: %v", err)
	}
	b.Logf("%d nodes, %d pods and %d namespaces after %s", nodes, pods, namespaces, time.Since(start).Round(time.Second))
}

type put struct {
	Key   []byte `json:"key"`
	Value []byte `json:"value"`
}

func metaName(object any) string {
	meta, _ := object.(metav1.Object)
	if meta.GetNamespace() != "" {
		return meta.GetNamespace() + "/" + meta.GetName()
	}
	return meta.GetName()
}

func (s *apiServer) write(puts []put) error {
	var transaction struct {
		Success []map[string]put `json:"success"`
	}
	for _, p := range puts {
		transaction.Success = append(transaction.Success, map[string]put{"requestPut": p})
	}
	body, err := json.Marshal(transaction)
	if err != nil {
		return err
	}
	response, err := http.Post(s.etcd+"/v3/kv/txn", "application/json", bytes.NewReader(body))
	if err != nil {
		return err
	}
	defer response.Body.Close()
	if answer, err := io.ReadAll(response.Body); err != nil || response.StatusCode != http.StatusOK {
		return fmt.Errorf("etcd: %s: %s (%w)", response.Status, answer, err)
	}
	return nil
}

// agents stands for those of all nodes. Each finds a process of every pod it is asked about.
type agents struct {
	port, webhookTLS, clientTLS string
	mu                          sync.Mutex
	nodes                       map[string]bool
}

func (a *agents) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	var query sandbox.Query
	if err := json.NewDecoder(r.Body).Decode(&query); err != nil || r.URL.Path != agent.InspectPath {
		http.Error(w, fmt.Sprint(err), http.StatusBadRequest)
		return
	}
	a.mu.Lock()
	a.nodes[query.Node] = true
	a.mu.Unlock()
	report := sandbox.Report{Node: query.Node, UID: query.UID}
	for _, probe := range sandbox.Required {
		report.Probes = append(report.Probes, sandbox.Probe{Name: probe})
	}
	report.Findings = []sandbox.Finding{{Kind: sandbox.ProcessAlive, Process: &sandbox.Process{PID: 4242, Command: "java", State: "D", WaitChannel: "request_wait_answer"}}}
	_ = json.NewEncoder(w).Encode(report)
}

// asked returns how many nodes have been asked.
func (a *agents) asked(b *testing.B) int {
	b.Helper()
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.nodes) == 0 {
		b.Error("no agent was asked")
	}
	return len(a.nodes)
}

// webhook is the running process.
type webhook struct {
	process *exec.Cmd
	ready   time.Duration
	url     string
	metrics string
}

func (w *webhook) stop(b *testing.B) {
	b.Helper()
	_ = w.process.Process.Kill()
	_ = w.process.Wait()
}

// status reads a figure of /proc/PID/status, in MiB (kernel Documentation/filesystems/proc.rst: kB there are 1024 bytes).
func (w *webhook) status(b *testing.B, key string) float64 {
	b.Helper()
	content, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", w.process.Process.Pid))
	if err != nil {
		b.Fatal(err)
	}
	for line := range strings.Lines(string(content)) {
		if fields := strings.Fields(line); fields[0] == key+":" {
			kib, err := strconv.ParseFloat(fields[1], 64)
			if err != nil {
				b.Fatal(err)
			}
			return kib / 1024
		}
	}
	b.Fatalf("/proc/PID/status has no %s", key)
	return 0
}

func (w *webhook) resident(b *testing.B) float64 { return w.status(b, "VmRSS") }
func (w *webhook) peak(b *testing.B) float64     { return w.status(b, "VmHWM") }

// requests counts those that the webhook has sent to the API server.
func (w *webhook) requests(b *testing.B) float64 {
	b.Helper()
	response, err := http.Get(w.metrics)
	if err != nil {
		b.Fatal(err)
	}
	defer response.Body.Close()
	sum := 0.0
	for lines := bufio.NewScanner(response.Body); lines.Scan(); {
		if name, value, found := strings.Cut(lines.Text(), "} "); found && strings.HasPrefix(name, "rest_client_requests_total{") {
			count, err := strconv.ParseFloat(value, 64)
			if err != nil {
				b.Fatal(err)
			}
			sum += count
		}
	}
	return sum
}

// decide asks the webhook about one pod after the other, as API servers do, and returns how many decisions it has made.
func (w *webhook) decide(b *testing.B) int64 {
	b.Helper()
	client := &http.Client{Transport: insecure(callers)}
	ctx, cancel := context.WithTimeout(b.Context(), busy)
	defer cancel()
	var next, decisions atomic.Int64
	var group sync.WaitGroup
	for range callers {
		group.Go(func() {
			for ctx.Err() == nil {
				pod := podOn(int(next.Add(1)) % pods)
				response, err := w.review(ctx, client, pod)
				if ctx.Err() != nil {
					return
				}
				if err != nil || response.Allowed || !strings.Contains(response.Result.Message, "process 4242 (java) is in state D") {
					b.Errorf("about pod %s: %+v (%v)", pod.Name, response, err)
					return
				}
				decisions.Add(1)
			}
		})
	}
	group.Wait()
	return decisions.Load()
}

func (w *webhook) review(ctx context.Context, client *http.Client, pod *corev1.Pod) (*admissionv1.AdmissionResponse, error) {
	object, err := json.Marshal(pod)
	if err != nil {
		return nil, err
	}
	options, err := json.Marshal(metav1.DeleteOptions{GracePeriodSeconds: new(int64(0))})
	if err != nil {
		return nil, err
	}
	body, err := json.Marshal(admissionv1.AdmissionReview{
		TypeMeta: metav1.TypeMeta{APIVersion: "admission.k8s.io/v1", Kind: "AdmissionReview"},
		Request: &admissionv1.AdmissionRequest{
			UID: pod.UID, Operation: admissionv1.Delete, Resource: metav1.GroupVersionResource{Version: "v1", Resource: "pods"},
			Namespace: pod.Namespace, Name: pod.Name, UserInfo: authenticationv1.UserInfo{Username: "alice"},
			OldObject: apiruntime.RawExtension{Raw: object}, Options: apiruntime.RawExtension{Raw: options},
		},
	})
	if err != nil {
		return nil, err
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, w.url, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	request.Header.Set("Content-Type", "application/json")
	response, err := client.Do(request)
	if err != nil {
		return nil, err
	}
	defer response.Body.Close()
	var review admissionv1.AdmissionReview
	if err := json.NewDecoder(response.Body).Decode(&review); err != nil {
		return nil, err
	}
	return review.Response, nil
}
