package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/eni-guard/eni-guard/test/e2e/incident"
)

// inspection is what `eni-guard inspect -o json` prints, as far as these tests look at it.
type inspection struct {
	Verdict   string
	Reports   []trace
	Holders   []trace
	Conflict  bool
	Leftovers []trace
	Shared    []struct {
		IP      string
		Holders []trace
	} `json:"sharedAddresses"`
	NotCompared string
	Failures    []string
	NextStep    string
	status      int
}

type trace struct {
	UID      string                     // of reports
	Pod      struct{ Name, UID string } // of traces
	Leftover string
	Findings []struct {
		Kind, Netns, IP string
		Process         process
	}
	Conflicts []struct {
		IP  string
		Pod struct{ Name, UID string }
	}
}

type process struct {
	PID                int
	State, WaitChannel string
	Stack              []string
	OutsideCgroup      bool
}

// process returns the finding about a process; its PID is 0 if there is none.
func (tr trace) process(pid int) process {
	for _, f := range tr.Findings {
		if f.Process.PID == pid {
			return f.Process
		}
	}
	return process{}
}

// has says whether a finding of a kind is among those of a trace, and is about an address, where one is named.
func (tr trace) has(kind, ip string) bool {
	for _, f := range tr.Findings {
		if f.Kind == kind && (ip == "" || f.IP == ip) {
			return true
		}
	}
	return false
}

// inspect runs `eni-guard inspect` where the agent runs, with its rights and no others.
func inspect(t *testing.T, args ...string) inspection {
	t.Helper()
	args = append([]string{"--kubeconfig", cluster.Kubeconfig(), "-n", incident.GuardNamespace, "exec", agentPod(t), "--", "/eni-guard", "inspect", "-o", "json"}, args...)
	return inspected(t, exec.CommandContext(t.Context(), cluster.Binary("kubectl"), args...))
}

// inspectOnTheHost runs it as a plain binary, with the kubelet's way to the API server, as somebody on the node would.
func inspectOnTheHost(t *testing.T, args ...string) inspection {
	t.Helper()
	binary, err := filepath.Abs(filepath.Join(repo, "bin/eni-guard"))
	wentThrough(t, err)
	args = append([]string{"inspect", "-o", "json", "--cri-socket=/run/eni-guard-cluster/containerd.sock", "--node-name=" + incident.Node, "--kubeconfig=" + filepath.Join(repo, ".cluster/pki/kubelet.kubeconfig")}, args...)
	return inspected(t, exec.CommandContext(t.Context(), binary, args...))
}

func inspected(t *testing.T, cmd *exec.Cmd) inspection {
	t.Helper()
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	var found inspection
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		found.status = exit.ExitCode()
	} else if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(out, &found); err != nil {
		t.Fatalf("%v\n%s%s", err, out, stderr.String())
	}
	return found
}

func agentPod(t *testing.T) string {
	t.Helper()
	pods, err := cluster.CoreV1().Pods(incident.GuardNamespace).List(t.Context(), metav1.ListOptions{LabelSelector: "app.kubernetes.io/component=agent"})
	wentThrough(t, err)
	if len(pods.Items) != 1 {
		t.Fatalf("%d agents", len(pods.Items))
	}
	return pods.Items[0].Name
}

// awaitInspection asks until the answer is right, and returns it.
func awaitInspection(t *testing.T, what string, ask func() inspection, right func(inspection) bool) inspection {
	t.Helper()
	var found inspection
	wentThrough(t, incident.Wait(t.Context(), 2*time.Minute, what, func(context.Context) error {
		if found = ask(); !right(found) {
			return fmt.Errorf("got %+v", found)
		}
		return nil
	}))
	return found
}

// A process in state D, in a kernel that waits for a FUSE server: every question about it leads to it, in the agent's
// container as on the host, and so does the stack of the kernel.
func TestInspectFindsAProcessInStateD(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	stuck := stuckFS(t, ns)
	pod := start(t, stuck.StuckPod(ns, "payment-0"))
	process := unkillable(t, pod)
	for _, question := range []string{"--pod=" + ns + "/payment-0", "--uid=" + string(pod.UID), "--ip=" + pod.Status.PodIP} {
		for where, ask := range map[string]func(*testing.T, ...string) inspection{"in the agent's container": inspect, "on the host": inspectOnTheHost} {
			// Other pods come and go, which a look may stumble over, and a stack is read only as long as there is time.
			found := awaitInspection(t, "the process with its stack", func() inspection { return ask(t, question) }, func(found inspection) bool {
				traces := append(found.Reports, found.Holders...)
				if found.status != 1 || found.Verdict != "bound" || len(traces) != 1 {
					t.Fatalf("%s %s: got %+v", question, where, found)
				}
				return len(found.Failures) == 0 && len(traces[0].process(process.PID).Stack) > 0
			})
			traces := append(found.Reports, found.Holders...)
			p := traces[0].process(process.PID)
			if p.State != "D" || p.WaitChannel != "request_wait_answer" || !slices.Contains(p.Stack, "request_wait_answer") || p.OutsideCgroup {
				t.Errorf("%s %s: process %+v", question, where, p)
			}
			if !traces[0].has("IPAssigned", pod.Status.PodIP) || !traces[0].has("NetnsOpen", "") {
				t.Errorf("%s %s: namespace or address is missing in %+v", question, where, traces[0])
			}
		}
	}
	wentThrough(t, stuck.Release())
	wentThrough(t, cluster.AwaitGone(t.Context(), pod))
	// A namespace of another pod in the making could be this one's: without an address, nobody can tell.
	awaitInspection(t, "nothing of the pod to be left", func() inspection { return inspect(t, "--uid="+string(pod.UID)) },
		func(found inspection) bool { return found.status == 0 && found.Verdict == "released" })
	if found := inspect(t, "--ip="+pod.Status.PodIP); found.status != 0 && len(found.Holders) == 1 && found.Holders[0].Pod.UID == string(pod.UID) {
		t.Errorf("afterwards: got %+v", found)
	}
}

// freeze puts a process into a frozen group of its own, so that it is in state D and SIGKILL has no effect on it.
func freeze(t *testing.T, pid int) (thaw func()) {
	t.Helper()
	group := fmt.Sprintf("/sys/fs/cgroup/freezer/eni-guard-cluster/frozen-%d", pid)
	before, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	wentThrough(t, err)
	wentThrough(t, os.MkdirAll(group, 0o755))
	write := func(file, text string) error { return os.WriteFile(filepath.Join(group, file), []byte(text), 0o600) }
	wentThrough(t, errors.Join(write("cgroup.procs", strconv.Itoa(pid)), write("freezer.state", "FROZEN")))
	thawed := false
	thaw = func() {
		if thawed {
			return
		}
		thawed = true
		if err := write("freezer.state", "THAWED"); err != nil {
			t.Error(err)
		}
		// Back where it was, so that the group can be removed.
		for line := range strings.Lines(string(before)) {
			if _, path, found := strings.Cut(strings.TrimSpace(line), ":freezer:"); found {
				_ = os.WriteFile(filepath.Join("/sys/fs/cgroup/freezer", path, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0o600)
			}
		}
		if err := incident.Wait(context.Background(), 2*time.Minute, "the frozen group to be empty", func(context.Context) error { return os.Remove(group) }); err != nil {
			t.Error(err)
		}
	}
	t.Cleanup(thaw)
	return thaw
}

// mainProcess returns the process of the pod's container.
func mainProcess(t *testing.T, pod *corev1.Pod, command string) incident.Process {
	t.Helper()
	processes := incident.Processes(pod)
	i := slices.IndexFunc(processes, func(p incident.Process) bool { return p.Command == command })
	if i < 0 {
		t.Fatalf("no process %s among %+v", command, processes)
	}
	return processes[i]
}

// The sandbox is ready, and a process of the pod cannot be killed, whatever kind of D state it is.
func TestAFrozenProcessIsRefused(t *testing.T) {
	t.Parallel()
	pod := sleeper(t, namespace(t), "web-0", nil)
	process := mainProcess(t, pod, "sleep")
	thaw := freeze(t, process.PID)
	wentThrough(t, plainDelete(t.Context(), cluster, pod))
	wentThrough(t, incident.Wait(t.Context(), 2*time.Minute, "the refusal to name the frozen process", func(context.Context) error {
		err := forceDelete(t, pod)
		if err == nil || !strings.Contains(err.Error(), fmt.Sprintf("process %d (sleep) is frozen by its cgroup (state D)", process.PID)) {
			return fmt.Errorf("got %w", err)
		}
		return nil
	}))
	found := inspect(t, "--pod="+pod.Namespace+"/web-0")
	if found.status != 1 || len(found.Reports) != 1 || !found.Reports[0].has("SandboxReady", "") || !found.Reports[0].has("IPAssigned", pod.Status.PodIP) {
		t.Errorf("got %+v", found)
	}
	thaw()
	wentThrough(t, cluster.AwaitGone(t.Context(), pod))
}

// A process that has moved out of all cgroups of its pod still sits in its namespace.
func TestAProcessOutsideItsPodsCgroup(t *testing.T) {
	t.Parallel()
	pod := sleeper(t, namespace(t), "web-0", nil)
	process := mainProcess(t, pod, "sleep")
	groups, err := filepath.Glob("/sys/fs/cgroup/*/cgroup.procs")
	wentThrough(t, err)
	for _, file := range groups {
		wentThrough(t, os.WriteFile(file, []byte(strconv.Itoa(process.PID)), 0o600))
	}
	if left := incident.Processes(pod); slices.ContainsFunc(left, func(p incident.Process) bool { return p.PID == process.PID }) {
		t.Fatalf("process %d is still in a cgroup of the pod", process.PID)
	}
	t.Cleanup(func() { _ = syscall.Kill(process.PID, syscall.SIGKILL) })
	found := inspect(t, "--uid="+string(pod.UID))
	if found.status != 1 || len(found.Reports) != 1 || !found.Reports[0].process(process.PID).OutsideCgroup {
		t.Errorf("process %d is missing in %+v", process.PID, found)
	}
	refused(t, forceDelete(t, pod), "is still alive on node node-1")
	kept(t, pod)
}

// loseRecord makes the runtime forget the sandbox of a pod and its containers while their processes run: what a damaged store,
// or somebody who has removed the records by hand, leaves behind. The kubelet is away from then on, because it would make a new
// sandbox; it starts again at the end of the test.
func loseRecord(t *testing.T, pod *corev1.Pod) (startKubelet func()) {
	t.Helper()
	ctr := func(args ...string) string {
		t.Helper()
		out, err := exec.CommandContext(t.Context(), "ctr", append([]string{"--address", "/run/eni-guard-cluster/containerd.sock", "-n", "k8s.io"}, args...)...).CombinedOutput()
		if err != nil {
			t.Fatalf("ctr %s: %v: %s", strings.Join(args, " "), err, out)
		}
		return string(out)
	}
	shim := shimOf(t, pod)
	ids := strings.Fields(ctr("containers", "list", "-q", `labels."io.kubernetes.pod.uid"==`+string(pod.UID)))
	if len(ids) != 2 {
		t.Fatalf("pod %s has containers %q in containerd, not a sandbox and one more", pod.Name, ids)
	}
	startKubelet = killDaemon(t, "kubelet")
	startRuntime := killDaemon(t, "containerd")
	// A task that containerd finds when it starts it would end. Without its shim and its directory there is none to find.
	wentThrough(t, shim.Kill(t.Context()))
	for _, id := range ids {
		task := filepath.Join("/run/eni-guard-cluster/containerd/io.containerd.runtime.v2.task/k8s.io", id)
		wentThrough(t, errors.Join(syscall.Unmount(filepath.Join(task, "rootfs"), syscall.MNT_DETACH), os.RemoveAll(task)))
	}
	startRuntime()
	wentThrough(t, incident.AwaitRuntime(t.Context()))
	for _, id := range ids {
		ctr("containers", "delete", id)
	}
	// CRI knows what it has read at its start.
	killDaemon(t, "containerd")()
	wentThrough(t, incident.AwaitRuntime(t.Context()))
	return startKubelet
}

// The runtime has no record of the sandbox any more. What keeps the address is first a process, and then a mount alone.
func TestASandboxWhoseRecordIsGone(t *testing.T) {
	ns := namespace(t)
	pod := sleeper(t, ns, "web-0", nil)
	process := mainProcess(t, pod, "sleep")
	file := namespaceFile(t, process.PID)
	t.Cleanup(func() {
		for _, p := range incident.Processes(pod) {
			_ = syscall.Kill(p.PID, syscall.SIGKILL)
		}
		_ = errors.Join(syscall.Unmount(file, syscall.MNT_DETACH), os.Remove(file)) // unless the test has done so
	})
	startKubelet := loseRecord(t, pod)
	restored(t)

	// containerd 2 keeps a record of the sandbox, of which it knows nothing more.
	damaged := func(found inspection) bool {
		return len(found.Failures) == 1 && strings.Contains(found.Failures[0], "as of a sandbox whose record is damaged")
	}
	found := awaitInspection(t, "the runtime to answer again", func() inspection { return inspectOnTheHost(t, "--uid="+string(pod.UID)) },
		func(found inspection) bool { return len(found.Failures) == 0 || damaged(found) })
	recordIsKept := damaged(found)
	if found.status != 1 || found.Reports[0].has("SandboxReady", "") || found.Reports[0].process(process.PID).PID == 0 {
		t.Errorf("with its processes: got %+v", found)
	}
	refused(t, forceDelete(t, pod), "is still alive on node node-1: process ", "address "+pod.Status.PodIP+" still in use")

	for _, p := range incident.Processes(pod) {
		wentThrough(t, syscall.Kill(p.PID, syscall.SIGKILL))
	}
	wentThrough(t, incident.Wait(t.Context(), 2*time.Minute, "the processes of the pod to end", func(context.Context) error {
		if left := incident.Processes(pod); len(left) > 0 {
			return fmt.Errorf("there are %+v", left)
		}
		return nil
	}))
	found = inspectOnTheHost(t, "--ip="+pod.Status.PodIP)
	if found.status != 1 || len(found.Holders) != 1 || found.Holders[0].Pod.UID != "" || !found.Holders[0].has("NetnsOpen", "") {
		t.Errorf("with the mount alone: got %+v", found)
	}
	refused(t, forceDelete(t, pod), "address "+pod.Status.PodIP+" is on eth0 in network namespace "+file)
	kept(t, pod)
	// Nobody's namespace is a leftover too. With the record, the agent knows by what it has seen before whose it is: a pod's that is there.
	if !recordIsKept {
		awaitCondition(t, corev1.ConditionTrue, pod.Status.PodIP, file)
		awaitNodeEvent(t, incident.Node, "LeftoverFound", file)
	}

	wentThrough(t, errors.Join(syscall.Unmount(file, 0), os.Remove(file)))
	if found := inspectOnTheHost(t, "--ip="+pod.Status.PodIP); found.status != 0 || found.Verdict != "released" {
		t.Errorf("without it: got %+v", found)
	}
	if recordIsKept { // that nothing is left of the pod is not known before the runtime has let go of the record
		refused(t, forceDelete(t, pod), "whose record is damaged")
		kept(t, pod)
	} else {
		wentThrough(t, forceDelete(t, pod))
		wentThrough(t, cluster.Gone(t.Context(), pod))
		awaitCondition(t, corev1.ConditionFalse)
	}
	startKubelet()
	clusterWorks(t, ns, "afterwards")
}

// awaitCondition waits until the node condition of the agent has a status, and words in its message.
func awaitCondition(t *testing.T, status corev1.ConditionStatus, words ...string) corev1.NodeCondition {
	t.Helper()
	var found corev1.NodeCondition
	wentThrough(t, incident.Wait(t.Context(), 2*time.Minute, "the node condition OrphanedSandbox to be "+string(status), func(ctx context.Context) error {
		node, err := cluster.CoreV1().Nodes().Get(ctx, incident.Node, metav1.GetOptions{})
		if err != nil {
			return err
		}
		i := slices.IndexFunc(node.Status.Conditions, func(c corev1.NodeCondition) bool { return c.Type == "OrphanedSandbox" })
		if i < 0 {
			return errors.New("there is none")
		}
		found = node.Status.Conditions[i]
		if found.Status != status || slices.ContainsFunc(words, func(word string) bool { return !strings.Contains(found.Message, word) }) {
			return fmt.Errorf("it is %+v", found)
		}
		return nil
	}))
	return found
}

// agentMetric reads a metric of the agent as it is written, with its labels; empty if there is none.
func agentMetric(t *testing.T, metric string) string {
	t.Helper()
	request, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://10.111.0.1:9809/metrics", nil)
	wentThrough(t, err)
	response, err := http.DefaultClient.Do(request)
	wentThrough(t, err)
	defer response.Body.Close()
	content, err := io.ReadAll(response.Body)
	wentThrough(t, err)
	for line := range strings.Lines(string(content)) {
		if value, found := strings.CutPrefix(line, metric+" "); found {
			return strings.TrimSpace(value)
		}
	}
	return ""
}

// leftover is what a forced removal leaves behind where nothing guards.
type leftover struct {
	stuck *incident.StuckFS
	pod   *corev1.Pod
	// words are in the message of the node's condition, which has been as it is since then.
	words     []string
	condition corev1.NodeCondition
}

// isReported makes a leftover: it is told of without being asked, and new pods are kept away from it.
func (l *leftover) isReported(t *testing.T) {
	ns := l.pod.Namespace
	pod := l.pod
	process := unkillable(t, pod)
	awaitCondition(t, corev1.ConditionFalse)
	wentThrough(t, forceDelete(t, pod))
	wentThrough(t, cluster.Gone(t.Context(), pod))

	l.words = []string{"1 leftover", ns + "/payment-0", string(pod.UID), pod.Status.PodIP, fmt.Sprintf("process %d (dd) is in state D", process.PID)}
	l.condition = awaitCondition(t, corev1.ConditionTrue, l.words...)
	awaitTaint(t, incident.Node, true)
	awaitNodeEvent(t, incident.Node, "LeftoverFound", ns+"/payment-0")
	if got := agentMetric(t, "eni_guard_leftovers"); got != "1" {
		t.Errorf("eni_guard_leftovers is %q", got)
	}
	found := inspect(t, "--all")
	if found.status != 1 || len(found.Leftovers) != 1 || found.Leftovers[0].Pod.UID != string(pod.UID) || found.NotCompared != "" || found.Leftovers[0].process(process.PID).State != "D" {
		t.Errorf("got %+v", found)
	}
	if found := inspectOnTheHost(t, "--all"); found.status != 1 || len(found.Leftovers) != 1 || found.NotCompared != "" {
		t.Errorf("on the host: got %+v", found)
	}
}

// isReportedUntilItGoes takes the runtime away, during which nothing is called gone, and then lets go of the leftover.
func (l *leftover) isReportedUntilItGoes(t *testing.T) {
	startRuntime := killDaemon(t, "containerd")
	wentThrough(t, incident.Wait(t.Context(), 2*time.Minute, "the agent to notice that the runtime is away", func(context.Context) error {
		if up := agentMetric(t, `eni_guard_probe_up{probe="runtime"}`); up != "0" {
			return fmt.Errorf("eni_guard_probe_up is %q", up)
		}
		return nil
	}))
	if now := awaitCondition(t, corev1.ConditionTrue, l.words[:4]...); now.LastTransitionTime != l.condition.LastTransitionTime {
		t.Errorf("the condition has changed from %+v to %+v", l.condition, now)
	}
	startRuntime()

	wentThrough(t, l.stuck.Release())
	awaitCondition(t, corev1.ConditionFalse)
	awaitTaint(t, incident.Node, false)
	awaitNodeEvent(t, incident.Node, "LeftoverGone", l.pod.Namespace+"/payment-0")
	restored(t)
}

// An address that is there twice, on a node on which nothing else is wrong.
func TestAnAddressThatIsThereTwice(t *testing.T) {
	pod := sleeper(t, namespace(t), "web-0", nil)
	other := twin(t, pod.Status.PodIP)
	// When a pod goes, the agent looks at once.
	wentThrough(t, plainDelete(t.Context(), cluster, sleeper(t, pod.Namespace, "web-1", nil)))
	found := awaitInspection(t, "the address to be found twice", func() inspection { return inspect(t, "--all") }, func(found inspection) bool {
		return len(found.Shared) == 1 && found.Shared[0].IP == pod.Status.PodIP && len(found.Shared[0].Holders) == 2
	})
	if found.status != 1 {
		t.Errorf("exit status %d", found.status)
	}
	if found := inspect(t, "--ip="+pod.Status.PodIP); found.status != 1 || len(found.Holders) != 2 || !found.Conflict {
		t.Errorf("got %+v", found)
	}
	awaitNodeEvent(t, incident.Node, "AddressConflict", pod.Status.PodIP)
	// The address is this pod's by its own sandbox, and in a namespace that could be its own too.
	if found := inspect(t, "--uid="+string(pod.UID)); !slices.ContainsFunc(found.Reports, func(r trace) bool { return r.has("IPAssigned", pod.Status.PodIP) }) {
		t.Errorf("got %+v", found)
	}
	other()
	awaitInspection(t, "the address to be found once", func() inspection { return inspect(t, "--ip="+pod.Status.PodIP) }, func(found inspection) bool {
		return len(found.Holders) == 1 && found.Holders[0].Pod.UID == string(pod.UID)
	})

	// Where it is another pod's namespace that has it too, that is no leftover of this one: both are named.
	next := sleeper(t, pod.Namespace, "web-2", nil)
	remove := addedTo(t, next, pod.Status.PodIP)
	conflict := awaitInspection(t, "the other pod to be named", func() inspection { return inspect(t, "--uid="+string(pod.UID)) }, func(found inspection) bool {
		return len(found.Reports) == 1 && len(found.Reports[0].Conflicts) == 1
	}).Reports[0].Conflicts[0]
	if conflict.IP != pod.Status.PodIP || conflict.Pod.Name != next.Name || conflict.Pod.UID != string(next.UID) {
		t.Errorf("got %+v", conflict)
	}
	refused(t, forceDelete(t, pod), "address "+pod.Status.PodIP+" is also in network namespace ", next.Name)
	remove()

	// Networks within pods, such as those of Docker, may have the same addresses.
	const inner = "172.31.99.1"
	addedTo(t, pod, inner)
	addedTo(t, next, inner)
	if found := inspect(t, "--ip="+inner); len(found.Holders) != 2 || found.Conflict {
		t.Errorf("got %+v", found)
	}
	awaitInspection(t, "all addresses to be found once", func() inspection { return inspect(t, "--all") }, func(found inspection) bool {
		return len(found.Shared) == 0 && len(found.Failures) == 0
	})
}

// addedTo gives a pod one more address, within its network namespace, which lasts as long as that, or until remove is called.
func addedTo(t *testing.T, pod *corev1.Pod, address string) (remove func()) {
	t.Helper()
	ns, err := netns.GetFromPath(namespaceFile(t, mainProcess(t, pod, "sleep").PID))
	wentThrough(t, err)
	inside, err := netlink.NewHandleAt(ns)
	wentThrough(t, errors.Join(err, ns.Close()))
	t.Cleanup(inside.Close)
	link, err := inside.LinkByName("lo")
	wentThrough(t, err)
	addr, err := netlink.ParseAddr(address + "/32")
	wentThrough(t, err)
	wentThrough(t, inside.AddrAdd(link, addr))
	return func() { wentThrough(t, inside.AddrDel(link, addr)) }
}

// An agent that starts while something is mounted over all of /run/netns has none of the namespaces below it in its own mount table. It
// does not take them for gone.
func TestANamespaceThatWasCoveredWhenTheAgentStarted(t *testing.T) {
	ns := namespace(t)
	pod, done := sleeper(t, ns, "web-0", nil), finished(t, ns, nil)
	awaitReleased(t, done)
	const address = "10.113.200.77"
	twin(t, address)
	bound := func(found inspection) bool { return found.status == 1 && len(found.Holders) == 1 }
	awaitInspection(t, "the namespace to show", func() inspection { return inspect(t, "--ip="+address) }, bound)

	wentThrough(t, syscall.Mount("eni-guard-e2e", "/run/netns", "tmpfs", 0, ""))
	uncover := sync.OnceFunc(func() {
		if err := syscall.Unmount("/run/netns", 0); err != nil {
			t.Error(err)
		}
		newAgent(t)
		restored(t)
	})
	t.Cleanup(uncover)
	newAgent(t)
	covered := "is mounted at /run/netns/eni-guard-e2e-twin, but something else covers it, or did when the agent started"
	for _, look := range []func(*testing.T, ...string) inspection{inspect, inspectOnTheHost} {
		found := look(t, "--ip="+address)
		if found.status != 2 || found.Verdict != "unknown" || !slices.ContainsFunc(found.Failures, func(f string) bool { return strings.Contains(f, covered) }) || !strings.Contains(found.NextStep, "findmnt") {
			t.Errorf("got %+v", found)
		}
	}
	refused(t, forceDelete(t, pod), "is still alive on node node-1: ")
	kept(t, pod)
	// What lets this one go is what its kubelet has reported, not that nothing was found.
	wentThrough(t, forceDelete(t, done))
	decided(t, done, "deny delete allowed unknown ContainersTerminated")

	uncover()
	if found := inspect(t, "--ip="+address); !bound(found) {
		t.Errorf("afterwards: got %+v", found)
	}
	clusterWorks(t, ns, "afterwards")
}

// newAgent ends the agent's pod, and waits until the next one answers, ready or not.
func newAgent(t *testing.T) {
	t.Helper()
	// Also at the end of the test, when its context has ended.
	if out, err := cluster.Kubectl(context.Background(), "-n", incident.GuardNamespace, "delete", "pod", "-l", "app.kubernetes.io/component=agent"); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	wentThrough(t, incident.Wait(context.Background(), 2*time.Minute, "the next agent to answer", func(ctx context.Context) error {
		conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", "10.111.0.1:9807")
		if err != nil {
			return err
		}
		return conn.Close()
	}))
}

// twin makes a network namespace that has an address, and returns how to remove it.
func twin(t *testing.T, address string) (remove func()) {
	t.Helper()
	name := "eni-guard-e2e-twin"
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // for good: it ends with the goroutine, or is not the main thread
		own, err := netns.Get()
		if err != nil {
			done <- err
			return
		}
		ns, err := netns.NewNamed(name)
		if err == nil {
			var link netlink.Link
			var addr *netlink.Addr
			link, err = netlink.LinkByName("lo")
			if err == nil {
				addr, err = netlink.ParseAddr(address + "/32")
			}
			if err == nil {
				err = netlink.AddrAdd(link, addr)
			}
			err = errors.Join(err, ns.Close())
		}
		done <- errors.Join(err, netns.Set(own), own.Close())
	}()
	removed := false
	remove = func() {
		if !removed {
			removed = true
			if err := netns.DeleteNamed(name); err != nil {
				t.Error(err)
			}
		}
	}
	wentThrough(t, <-done)
	t.Cleanup(remove)
	return remove
}

// The runtime stops and starts again: while it is away what the kernel shows binds, and where that is nothing, it is not known.
func TestARuntimeThatIsDown(t *testing.T) {
	ns := namespace(t)
	bound, free := sleeper(t, ns, "web-0", nil), finished(t, ns, nil)
	awaitReleased(t, free)
	startRuntime := killDaemon(t, "containerd")
	found := []inspection{inspectOnTheHost(t, "--uid="+string(bound.UID)), inspectOnTheHost(t, "--uid="+string(free.UID))}
	if found[0].status != 1 || len(found[0].Failures) != 1 || !found[0].Reports[0].has("ProcessAlive", "") || !found[0].Reports[0].has("IPAssigned", bound.Status.PodIP) {
		t.Errorf("of a running pod: got %+v", found[0])
	}
	if found[1].status != 2 || found[1].Verdict != "unknown" || len(found[1].Failures) != 1 || !strings.Contains(found[1].Failures[0], `the probe "runtime" did not run`) {
		t.Errorf("of a finished pod: got %+v", found[1])
	}
	refused(t, forceDelete(t, bound), "is still alive on node node-1: process ")
	wentThrough(t, incident.Wait(t.Context(), 2*time.Minute, "the agent not to be ready", func(ctx context.Context) error {
		pod, err := cluster.CoreV1().Pods(incident.GuardNamespace).Get(ctx, agentPod(t), metav1.GetOptions{})
		if err == nil && slices.ContainsFunc(pod.Status.Conditions, func(c corev1.PodCondition) bool { return c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue }) {
			err = errors.New("it is")
		}
		return err
	}))
	startRuntime()
	wentThrough(t, incident.AwaitRuntime(t.Context()))
	restored(t)
	awaitInspection(t, "the running pod to be known again", func() inspection { return inspectOnTheHost(t, "--uid="+string(bound.UID)) }, func(found inspection) bool {
		return found.status == 1 && len(found.Failures) == 0 && found.Reports[0].has("SandboxReady", "")
	})
	awaitInspection(t, "the finished pod to be known again", func() inspection { return inspectOnTheHost(t, "--uid="+string(free.UID)) }, func(found inspection) bool {
		return found.status == 0
	})
	refusedAtLast(t, func() error { return forceDelete(t, bound) }, "is still alive on node node-1: container app ")
	kept(t, bound)
}

// Pods of IPv6 alone, and of both families: each address leads to the pod, and is named in the refusal.
func TestAddressesOfEitherFamily(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	for families, want := range map[string]int{"IPv6": 1, "IPv4,IPv6": 2} {
		name := "web-" + strings.ToLower(strings.ReplaceAll(families, ",", "-"))
		pod := sleeper(t, ns, name, incident.IPFamilies(families))
		if len(pod.Status.PodIPs) != want {
			t.Fatalf("the pod has addresses %v", pod.Status.PodIPs)
		}
		var words []string
		for _, ip := range pod.Status.PodIPs {
			words = append(words, ip.IP)
			found := inspect(t, "--ip="+ip.IP)
			if found.status != 1 || len(found.Holders) != 1 || found.Holders[0].Pod.UID != string(pod.UID) || !found.Holders[0].has("IPAssigned", ip.IP) {
				t.Errorf("%s: got %+v", ip.IP, found)
			}
		}
		refused(t, forceDelete(t, pod), words...)
		kept(t, pod)
		wentThrough(t, plainDelete(t.Context(), cluster, pod))
		wentThrough(t, cluster.AwaitGone(t.Context(), pod))
		for _, ip := range words {
			if found := inspect(t, "--ip="+ip); slices.ContainsFunc(found.Holders, func(h trace) bool { return h.Pod.UID == string(pod.UID) }) {
				t.Errorf("%s, afterwards: got %+v", ip, found)
			}
		}
	}
}

// oneStuckPodAmongThem starts a pod on a full node, and lets it get stuck: it is found, and no other one is mistaken for it.
func oneStuckPodAmongThem(t *testing.T) {
	t.Helper()
	ns := namespace(t)
	stuck := stuckFS(t, ns)
	pod := start(t, stuck.StuckPod(ns, "payment-0"))
	process := unkillable(t, pod)
	pods, err := cluster.CoreV1().Pods("").List(t.Context(), metav1.ListOptions{FieldSelector: "spec.nodeName=" + incident.Node})
	wentThrough(t, err)
	if len(pods.Items) < 110 {
		t.Errorf("the node has %d pods, not 110", len(pods.Items))
	}
	awaitInspection(t, "the stuck process to be found by its address", func() inspection { return inspect(t, "--ip="+pod.Status.PodIP) }, func(found inspection) bool {
		return found.status == 1 && len(found.Holders) == 1 && found.Holders[0].process(process.PID).State == "D"
	})
	refusedAtLast(t, func() error { return forceDelete(t, pod) }, fmt.Sprintf("process %d (dd) is in state D", process.PID), "address "+pod.Status.PodIP+" still in use")
	awaitInspection(t, "a look at all of a full node", func() inspection { return inspect(t, "--all") }, func(found inspection) bool {
		if len(found.Leftovers) > 0 {
			t.Fatalf("something is said to be left over: %+v", found)
		}
		return found.status == 0 && len(found.Failures) == 0 && found.NotCompared == ""
	})
	wentThrough(t, stuck.Release())
	wentThrough(t, cluster.AwaitGone(t.Context(), pod))
}

// A node that the API server does not have has no pods there either. Nothing may be called left over for that.
func TestInspectOfANodeOfAnotherName(t *testing.T) {
	t.Parallel()
	pod := sleeper(t, namespace(t), "web-0", nil)
	// A sandbox that takes long to make looks like one that is left over, until it is recorded.
	awaitInspection(t, "nothing to be called left over", func() inspection {
		return inspectOnTheHost(t, "--all", "--node-name=nosuch", "--kubeconfig="+cluster.Kubeconfig())
	}, func(found inspection) bool {
		if !strings.Contains(found.NotCompared, "the API server has no node nosuch") || slices.ContainsFunc(found.Leftovers, func(l trace) bool { return l.Pod.UID == string(pod.UID) }) {
			t.Fatalf("got %+v", found)
		}
		return found.status == 2 && len(found.Leftovers) == 0
	})
}

// Each capability that the chart gives the agent is one that it cannot do without, and it needs no other. A look that lacks one
// says what it could not do, and not that there is nothing.
func TestTheCapabilitiesOfTheAgent(t *testing.T) {
	t.Parallel()
	const gone = "--ip=10.113.99.98"
	for _, c := range []struct {
		capabilities string
		status       int
		missing      []string
	}{
		{"+sys_admin,+sys_ptrace", 0, nil},
		{"+sys_admin", 2, []string{"processes"}},
		{"+sys_ptrace", 2, []string{"netns"}},
	} {
		kept := "-all," + c.capabilities
		// Other pods come and go, which a look may stumble over.
		found := awaitInspection(t, fmt.Sprintf("exit status %d with %s", c.status, c.capabilities), func() inspection {
			return inspected(t, exec.CommandContext(t.Context(), "setpriv", "--bounding-set="+kept, "--inh-caps="+kept,
				filepath.Join(repo, "bin/eni-guard"), "inspect", "-o", "json", gone, "--cri-socket=/run/eni-guard-cluster/containerd.sock"))
		}, func(found inspection) bool {
			if c.status != 0 && found.status == 0 {
				t.Fatalf("with %s: nothing is missing", c.capabilities)
			}
			return found.status == c.status
		})
		for _, probe := range c.missing {
			if !slices.ContainsFunc(found.Failures, func(failure string) bool {
				return strings.Contains(failure, fmt.Sprintf("the probe %q did not run", probe))
			}) {
				t.Errorf("with %s: probe %s is not among the failures %q", c.capabilities, probe, found.Failures)
			}
		}
	}
}

// Somebody who may not look is told so, and not that there is nothing.
func TestInspectWithoutRights(t *testing.T) {
	t.Parallel()
	dir, err := os.MkdirTemp("/var/tmp", "eni-guard-e2e-") // where everybody may go
	wentThrough(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	wentThrough(t, os.Chmod(dir, 0o755))
	// Not written by this process: one that another test starts meanwhile would have it open for a moment, and it could not be run.
	wentThrough(t, exec.CommandContext(t.Context(), "install", "--mode=755", filepath.Join(repo, "bin/eni-guard"), dir).Run())
	cmd := exec.CommandContext(t.Context(), filepath.Join(dir, "eni-guard"), "inspect", "-o", "json", "--ip=10.113.99.99", "--cri-socket=/run/eni-guard-cluster/containerd.sock")
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	found := inspected(t, cmd)
	if found.status != 2 || found.Verdict != "unknown" {
		t.Errorf("got %+v", found)
	}
	for _, probe := range []string{"runtime", "processes", "netns"} {
		if !slices.ContainsFunc(found.Failures, func(failure string) bool {
			return strings.Contains(failure, fmt.Sprintf("the probe %q did not run", probe))
		}) {
			t.Errorf("probe %s is not among the failures %q", probe, found.Failures)
		}
	}
}
