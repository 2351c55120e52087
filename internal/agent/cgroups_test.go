package agent

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/eni-guard/eni-guard/internal/sandbox"
)

// await tries until a condition holds.
func await(t *testing.T, condition func() error) {
	t.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(time.Minute); ; <-tick.C {
		err := condition()
		if err == nil {
			return
		}
		if time.Now().After(end) {
			t.Fatal(err)
		}
	}
}

// In real hierarchies: a process in the pod's group of one version 1 hierarchy only, and one in a threaded group of version 2,
// whose own list the kernel refuses to show.
func TestMembersOfRealCgroups(t *testing.T) {
	requireRoot(t)
	unified := "/sys/fs/cgroup"
	if _, err := os.Stat(unified + "/cgroup.controllers"); err != nil {
		unified = "/sys/fs/cgroup/unified"
	}
	pod := filepath.Join(unified, "eni-guard-test", "pod"+podUID)
	threaded := filepath.Join(pod, "container", "threaded")
	if err := os.MkdirAll(threaded, 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "sleep", "600")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		for _, dir := range []string{threaded, filepath.Dir(threaded), pod, filepath.Dir(pod)} {
			await(t, func() error { return os.Remove(dir) })
		}
	})
	pid := []byte(strconv.Itoa(cmd.Process.Pid))
	if err := errors.Join(
		os.WriteFile(filepath.Join(threaded, "cgroup.type"), []byte("threaded"), 0o600),
		os.WriteFile(filepath.Join(pod, "container", "cgroup.procs"), pid, 0o600),
		os.WriteFile(filepath.Join(threaded, "cgroup.threads"), pid, 0o600),
	); err != nil {
		t.Fatal(err)
	}
	if _, err := os.ReadFile(filepath.Join(threaded, "cgroup.procs")); err == nil {
		t.Fatal("the kernel shows the processes of a threaded group: this test proves nothing")
	}
	found, err := realNode.members(t.Context(), podUID, thorough)
	if err != nil || !found.exist || !slices.Equal(found.pids, []int{cmd.Process.Pid}) {
		t.Errorf("got %+v (%v), want process %s", found, err, pid)
	}
	all, err := realNode.allMembers(t.Context())
	if err != nil || !slices.Equal(all[podUID], []int{cmd.Process.Pid}) {
		t.Errorf("among those of all pods: got %v (%v)", all[podUID], err)
	}
}

func TestTheCgroupsOfSystemdsUnitsAreLeftOut(t *testing.T) {
	h := newRecordedHost(t)
	h.group("system.slice/x.service/kubepods/pod"+podUID+"/c1", pid)
	h.group("system.slice/kubepods/pod"+podUID+"/c2", pid+1)
	if found, err := h.members(t.Context(), podUID, thorough); err != nil || !slices.Equal(found.pids, []int{pid + 1}) {
		t.Errorf("got %+v (%v)", found, err)
	}
}

// A pod that is starting or ending has a cgroup without processes.
func TestAnEmptyCgroup(t *testing.T) {
	h := newRecordedHost(t)
	if found, err := h.members(t.Context(), podUID, thorough); err != nil || found.exist {
		t.Errorf("none: got %+v (%v)", found, err)
	}
	h.group("kubepods/pod" + podUID)
	if found, err := h.members(t.Context(), podUID, thorough); err != nil || !found.exist || len(found.pids) > 0 {
		t.Errorf("an empty one: got %+v (%v)", found, err)
	}
}

// The number of a process that has ended is given to another one: what was read of it is not the pod's.
func TestANumberThatWasGivenToAnotherProcess(t *testing.T) {
	h := lookable(t)
	h.group("kubepods/pod"+podUID+"/c1", pid)
	h.thread(pid, "java", "S", "x", "net:[7]")
	i := newInspector("node-a", h.Host, fakeRuntime(knowsNothing))
	groups := []string{filepath.Join(h.Cgroup, "kubepods/pod"+podUID)}
	e := evidence{members: podMembers{exist: true, groups: groups, pids: []int{pid, pid + 1}}, processes: []podProcess{{}, {}}}
	e.processes[0].PID, e.processes[1].PID = pid, pid+1
	i.lookAgain(t.Context(), &e)
	if len(e.processes) != 1 || e.processes[0].PID != pid {
		t.Errorf("got %+v", e.processes)
	}
	// And one that came after the first look is described.
	e = evidence{members: podMembers{exist: true, groups: groups, pids: []int{pid + 1}}, processes: []podProcess{{}}}
	i.lookAgain(t.Context(), &e)
	if len(e.processes) != 1 || e.processes[0].PID != pid || e.processes[0].State != "S" {
		t.Errorf("got %+v", e.processes)
	}
}

func TestHiddenProcessesProveNothing(t *testing.T) {
	h := newRecordedHost(t)
	if _, err := h.tasks(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(filepath.Join(h.Proc, "1")); err != nil {
		t.Fatal(err)
	}
	if _, err := h.tasks(t.Context()); err == nil {
		t.Error("no error without process 1")
	}
}

// Trees of version 2, as systemd, kubelets and runtimes make them. A quick look sees the same of them.
func TestMembersOfVersion2(t *testing.T) {
	slice := "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod" + strings.ReplaceAll(podUID, "-", "_") + ".slice"
	for _, test := range []struct {
		name   string
		groups map[string][]int
		want   []int
		exist  bool
	}{
		{"containerd with systemd", map[string][]int{
			slice + "/cri-containerd-aa.scope": {50}, slice + "/cri-containerd-bb.scope": {51, 52}, "system.slice/containerd.service": {60},
		}, []int{50, 51, 52}, true},
		{"CRI-O with its monitor beside the container", map[string][]int{
			slice + "/crio-aa.scope": {50}, slice + "/crio-conmon-aa.scope": {51},
		}, []int{50, 51}, true},
		{"cgroupfs", map[string][]int{"kubepods/pod" + podUID + "/aa": {50}}, []int{50}, true},
		{"below the cgroup root of a kubelet in a container", map[string][]int{
			"kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod" + strings.ReplaceAll(podUID, "-", "_") + ".slice/cri-containerd-aa.scope": {50},
		}, []int{50}, true},
		{"a container with systemd in it", map[string][]int{
			slice + "/cri-containerd-aa.scope/init.scope": {50}, slice + "/cri-containerd-aa.scope/system.slice/nginx.service": {51, 52},
		}, []int{50, 51, 52}, true},
		{"only the groups are left", map[string][]int{slice + "/cri-containerd-aa.scope": nil}, nil, true},
		{"of another pod", map[string][]int{"kubepods.slice/kubepods-pod" + strings.ReplaceAll(otherUID, "-", "_") + ".slice/cri-containerd-aa.scope": {50}}, nil, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			h := newRecordedHost(t)
			h.write(h.Cgroup, "cgroup.controllers", "cpuset cpu io memory hugetlb pids rdma misc\n")
			for group, pids := range test.groups {
				h.group(group, pids...)
			}
			for _, how := range []depth{quick, thorough} {
				if got, err := h.members(t.Context(), podUID, how); err != nil || got.exist != test.exist || !slices.Equal(got.pids, test.want) {
					t.Errorf("depth %d: got %+v (%v), want %v", how, got, err, test.want)
				}
			}
			if all, err := h.allMembers(t.Context()); err != nil || !slices.Equal(all[podUID], test.want) {
				t.Errorf("among those of all pods: got %v (%v), want %v", all[podUID], err, test.want)
			}
		})
	}
}

// A frozen process is alive. The freezer of version 1 keeps it in state D, that of version 2 in state S.
func TestFrozenProcesses(t *testing.T) {
	for _, test := range []struct{ name, group, state, wchan string }{
		{"version 1", "freezer/kubepods/pod" + podUID + "/aa", "D", "__refrigerator"},
		{"version 2", "kubepods.slice/kubepods-pod" + strings.ReplaceAll(podUID, "-", "_") + ".slice/cri-containerd-aa.scope", "S", "do_freezer_trap"},
	} {
		t.Run(test.name, func(t *testing.T) {
			h := lookable(t)
			h.group(test.group, pid)
			h.thread(pid, "java", test.state, test.wchan, "net:[7]")
			report := newInspector("node-a", h.Host, fakeRuntime(knowsNothing)).Inspect(t.Context(), podQuery)
			if report.Verdict() != sandbox.Bound || report.Findings[0].Process == nil {
				t.Fatalf("got %+v", report)
			}
			if p := report.Findings[0].Process; p.State != test.state || p.WaitChannel != test.wchan {
				t.Errorf("got %+v", p)
			}
		})
	}
}
