package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/procfs"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/uuid"

	"github.com/eni-guard/eni-guard/internal/agent"
	"github.com/eni-guard/eni-guard/internal/mtls"
	"github.com/eni-guard/eni-guard/internal/sandbox"
	"github.com/eni-guard/eni-guard/test/e2e/incident"
)

// One question to the agent, as the webhook asks it, beside the search of the incident for the same address with crictl, on the
// same node.
func BenchmarkQuestion(b *testing.B) {
	ask := askingAgent(b)
	onFullerNodes(b, func(b *testing.B, pod *corev1.Pod) {
		median := medianAnswer(b, ask, pod, sandbox.Bound)
		searched := search(b, pod)
		b.ReportMetric(searched.Seconds()*1000, "ms-crictl")
		b.ReportMetric(searched.Seconds()/median.Seconds(), "times-faster")
	})
}

// The same about a pod of which nothing is left: before the agent says so, it has looked at everything.
func BenchmarkQuestionAboutAReleasedPod(b *testing.B) {
	ask := askingAgent(b)
	onFullerNodes(b, func(b *testing.B, pod *corev1.Pod) {
		released := pod.DeepCopy()
		released.Name, released.UID, released.Status.PodIP = "gone", uuid.NewUUID(), "10.113.0.1"
		medianAnswer(b, ask, released, sandbox.Released)
	})
}

// onFullerNodes measures something about one of the node's pods: with more and more sandboxes, and then with more and more processes.
func onFullerNodes(b *testing.B, measure func(b *testing.B, pod *corev1.Pod)) {
	b.Helper()
	ns := benchNamespace(b, nil)
	var pods []*corev1.Pod
	for _, sandboxes := range []int{10, 60, 110} {
		pods = append(pods, startMany(b, ns, len(pods), sandboxes-len(pods))...)
		b.Run(fmt.Sprintf("sandboxes=%d", sandboxes), func(b *testing.B) {
			awaitRest(b)
			measure(b, pods[sandboxes/2])
		})
	}
	for _, pod := range pods[60:] {
		if err := plainDelete(b.Context(), cluster, pod); err != nil {
			b.Fatal(err)
		}
	}
	for _, pod := range pods[60:] {
		if err := cluster.AwaitGone(b.Context(), pod); err != nil {
			b.Fatal(err)
		}
	}
	for _, processes := range []int{100, 2000, 10000} {
		end := crowd(b, processes)
		b.Run(fmt.Sprintf("sandboxes=60/more-processes=%d", processes), func(b *testing.B) {
			awaitRest(b)
			measure(b, pods[30])
		})
		end()
	}
}

// awaitRest waits until the machine has little else to do: the kubelet is busy for a while with pods that have just started or ended.
func awaitRest(b *testing.B) {
	b.Helper()
	proc, err := procfs.NewDefaultFS()
	if err != nil {
		b.Fatal(err)
	}
	idle := func() (seconds float64) {
		stat, err := proc.Stat()
		if err != nil {
			b.Fatal(err)
		}
		return stat.CPUTotal.Idle + stat.CPUTotal.Iowait
	}
	const part = 0.8
	err = incident.Wait(b.Context(), 5*time.Minute, "the machine to be quiet", func(ctx context.Context) error {
		before, start := idle(), time.Now()
		select {
		case <-time.After(2 * time.Second): // over which it is looked at
		case <-ctx.Done():
			return ctx.Err()
		}
		if got := (idle() - before) / time.Since(start).Seconds() / float64(runtime.NumCPU()); got < part {
			return fmt.Errorf("its processors were idle for %.0f %% of two seconds only", 100*got)
		}
		return nil
	})
	if err != nil {
		b.Fatal(err)
	}
}

// medianAnswer reports the median of b.N questions about a pod, each of which must be answered with the verdict, and no probe failing.
func medianAnswer(b *testing.B, ask func(*corev1.Pod) (sandbox.Report, error), pod *corev1.Pod, verdict sandbox.Verdict) time.Duration {
	b.Helper()
	var took []time.Duration
	for b.Loop() {
		start := time.Now()
		report, err := ask(pod)
		took = append(took, time.Since(start))
		if err != nil || report.Verdict() != verdict || len(report.Failures()) > 0 {
			b.Fatal(report, err)
		}
	}
	slices.Sort(took)
	median := took[len(took)/2]
	b.ReportMetric(median.Seconds()*1000, "ms-median")
	b.ReportMetric(0, "ns/op")
	return median
}

// search looks for the address of a pod as in the incident, and returns how long that takes.
func search(b *testing.B, pod *corev1.Pod) time.Duration {
	b.Helper()
	start := time.Now()
	crictl := exec.CommandContext(b.Context(), "bash", "-c", `crictl pods | awk '{print $1}' | xargs -n1 -I {} bash -c 'echo {}; crictl inspectp {} | grep -i ip'`)
	crictl.Env = append(os.Environ(), "CONTAINER_RUNTIME_ENDPOINT=unix:///run/eni-guard-cluster/containerd.sock", "PATH="+filepath.Dir(cluster.Binary("crictl"))+":"+os.Getenv("PATH"))
	out, err := crictl.Output() // the head of the table is asked for too, as in the incident, so it fails at the end
	searched := time.Since(start)
	if !strings.Contains(string(out), pod.Status.PodIP) {
		b.Fatalf("the search did not find %s: %v\n%s", pod.Status.PodIP, err, out)
	}
	return searched
}

// askingAgent returns how to ask the agent over one connection that is kept, with the webhook's certificate.
func askingAgent(b *testing.B) func(*corev1.Pod) (sandbox.Report, error) {
	b.Helper()
	secret, err := cluster.CoreV1().Secrets(incident.GuardNamespace).Get(b.Context(), "eni-guard-client-tls", metav1.GetOptions{})
	if err != nil {
		b.Fatal(err)
	}
	dir := b.TempDir()
	for name, content := range secret.Data {
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
			b.Fatal(err)
		}
	}
	client := &http.Client{Transport: &http.Transport{DialTLSContext: mtls.Dialer(mtls.Dir(dir), &net.Dialer{}, mtls.AgentName)}}
	return func(pod *corev1.Pod) (report sandbox.Report, err error) {
		query, err := json.Marshal(sandbox.Query{
			Node: incident.Node, Namespace: pod.Namespace, Name: pod.Name, UID: string(pod.UID), IPs: []netip.Addr{netip.MustParseAddr(pod.Status.PodIP)},
		})
		if err != nil {
			return report, err
		}
		request, err := http.NewRequestWithContext(context.Background(), http.MethodPost, "https://10.111.0.1:9807"+agent.InspectPath, bytes.NewReader(query))
		if err != nil {
			return report, err
		}
		response, err := client.Do(request)
		if err != nil {
			return report, err
		}
		defer response.Body.Close()
		content, err := io.ReadAll(response.Body)
		if err != nil {
			return report, err
		}
		return report, json.Unmarshal(content, &report)
	}
}

// startMany starts n pods, named from first on.
func startMany(tb testing.TB, ns string, first, n int) []*corev1.Pod {
	tb.Helper()
	pods := make([]*corev1.Pod, n)
	var all sync.WaitGroup
	for i := range pods {
		all.Go(func() {
			pod, err := cluster.Start(tb.Context(), incident.Pod(ns, fmt.Sprintf("web-%03d", first+i), []string{"sleep", "86400"}, nil))
			if err != nil {
				tb.Error(err)
			}
			pods[i] = pod
		})
	}
	all.Wait()
	if tb.Failed() {
		tb.FailNow()
	}
	return pods
}

// crowd starts processes on the host, and returns how to end them.
func crowd(b *testing.B, n int) (end func()) {
	b.Helper()
	var all []*exec.Cmd
	end = func() {
		for _, cmd := range all {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		}
		all = nil
	}
	b.Cleanup(end)
	for range n {
		cmd := exec.CommandContext(b.Context(), "/bin/busybox", "sleep", "86400")
		if err := cmd.Start(); err != nil {
			b.Fatal(err)
		}
		all = append(all, cmd)
	}
	return end
}

// What the agent needs while nobody asks it anything: it looks for leftovers twice a minute, and answers its readiness probe. On
// a node with 60 sandboxes.
func BenchmarkAgentAtRest(b *testing.B) {
	startMany(b, benchNamespace(b, nil), 0, 60)
	// The agent looks each time that a pod goes, as those of the benchmark before do for a while.
	if err := incident.Wait(b.Context(), 5*time.Minute, "the pods of other benchmarks to be gone", func(ctx context.Context) error {
		pods, err := cluster.CoreV1().Pods("").List(ctx, metav1.ListOptions{})
		if err != nil {
			return err
		}
		if i := slices.IndexFunc(pods.Items, func(p corev1.Pod) bool { return p.DeletionTimestamp != nil }); i >= 0 {
			return fmt.Errorf("%s/%s is still there", pods.Items[i].Namespace, pods.Items[i].Name)
		}
		return nil
	}); err != nil {
		b.Fatal(err)
	}
	agents := hostAgents(b)
	if len(agents) != 1 {
		b.Fatalf("%d agents run", len(agents))
	}
	const rest = 2 * time.Minute
	before := cpuTime(b, agents[0])
	select {
	case <-time.After(rest): // this is what is measured
	case <-b.Context().Done():
	}
	used := cpuTime(b, agents[0]) - before
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", agents[0]))
	if err != nil {
		b.Fatal(err)
	}
	for line := range strings.Lines(string(status)) {
		if value, found := strings.CutPrefix(line, "VmRSS:"); found {
			kilobytes, err := strconv.ParseFloat(strings.Fields(value)[0], 64)
			if err != nil {
				b.Fatal(err)
			}
			b.ReportMetric(kilobytes/1024, "MiB-resident")
		}
	}
	b.ReportMetric(100*used.Seconds()/rest.Seconds(), "%-of-a-core")
	b.ReportMetric(0, "ns/op")
}

// hostAgents are the PIDs of the agents that run.
func hostAgents(tb testing.TB) []int {
	tb.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		tb.Fatal(err)
	}
	var pids []int
	for _, file := range files {
		content, err := os.ReadFile(file)
		if err == nil && bytes.HasPrefix(content, []byte("/eni-guard\x00agent\x00")) {
			pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(file)))
			pids = append(pids, pid)
		}
	}
	return pids
}

// cpuTime is what a process has used, in user and kernel mode.
func cpuTime(tb testing.TB, pid int) time.Duration {
	tb.Helper()
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		tb.Fatal(err)
	}
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	user, err := strconv.Atoi(fields[11])
	if err != nil {
		tb.Fatal(err)
	}
	system, err := strconv.Atoi(fields[12])
	if err != nil {
		tb.Fatal(err)
	}
	return time.Duration(user+system) * 10 * time.Millisecond
}
