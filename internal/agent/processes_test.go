package agent

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/eni-guard/eni-guard/internal/sandbox"
)

const (
	podUID   = "8c3f5a52-0d3c-4d0e-9d3e-0123456789ab"
	otherUID = "11111111-2222-3333-4444-555555555555"
)

// recordedHost is a node's /proc and cgroup tree in a temporary directory.
type recordedHost struct {
	Host
	t testing.TB
}

func newRecordedHost(t testing.TB) recordedHost {
	t.Helper()
	h := recordedHost{Host{Proc: filepath.Join(t.TempDir(), "proc"), Cgroup: filepath.Join(t.TempDir(), "cgroup")}, t}
	h.write(h.Proc, "stat", "cpu  0 0 0 0 0 0 0 0 0 0\nbtime 1700000000\n")
	h.write(h.Proc, "1/comm", "init\n")
	// The agent's own pod: every node has one.
	h.group("kubepods/besteffort/pod" + otherUID + "/agent")
	return h
}

func (h recordedHost) write(dir, file, content string) {
	h.t.Helper()
	path := filepath.Join(dir, file)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		h.t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		h.t.Fatal(err)
	}
}

// group makes a cgroup with processes; the kernel gives every group above it a cgroup.procs too.
func (h recordedHost) group(path string, pids ...int) {
	h.t.Helper()
	for dir := path; dir != "."; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(h.Cgroup, dir, "cgroup.procs")); err != nil {
			h.write(h.Cgroup, filepath.Join(dir, "cgroup.procs"), "")
		}
	}
	h.write(h.Cgroup, filepath.Join(path, "cgroup.procs"), strings.Trim(strings.ReplaceAll(fmt.Sprintln(pids), " ", "\n"), "[]\n")+"\n")
}

// pid is the one process that is recorded.
const pid = 42

// thread records a thread of it that sleeps in wchan; its network namespace is netns, or cannot be told when that is empty.
func (h recordedHost) thread(tid int, command, state, wchan, netns string) {
	h.t.Helper()
	h.threadOf(pid, tid, command, state, wchan, netns)
}

// process records another process, of one thread.
func (h recordedHost) process(pid int, command, state, wchan, netns string) {
	h.t.Helper()
	h.threadOf(pid, pid, command, state, wchan, netns)
}

func (h recordedHost) threadOf(pid, tid int, command, state, wchan, netns string) {
	h.t.Helper()
	dir := fmt.Sprintf("%d/task/%d", pid, tid)
	stat := fmt.Sprintf("%d (%s) %s 1 1 1 0 -1 0 0 0 0 0 0 0 0 0 20 0 1 0 250 0 0 18446744073709551615 0 0 0 0 0 0 0 0 0 0 0 0 17 0 0 0 0 0 0 0 0 0 0 0 0 0 0\n", tid, command, state)
	h.write(h.Proc, dir+"/stat", stat)
	h.write(h.Proc, dir+"/wchan", wchan)
	if netns != "" {
		h.symlink(dir+"/ns/net", netns)
	}
}

// symlink records a link of /proc.
func (h recordedHost) symlink(file, target string) {
	h.t.Helper()
	path := filepath.Join(h.Proc, file)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		h.t.Fatal(err)
	}
	if err := os.Symlink(target, path); err != nil {
		h.t.Fatal(err)
	}
}

// processes is what the probes of cgroups and processes find together.
func (h recordedHost) processes(ctx context.Context) ([]podProcess, error) {
	members, err := h.members(ctx, podUID, thorough)
	if err != nil {
		return nil, err
	}
	return h.describe(ctx, leaders(members.pids))
}

// started is what starttime 250 in USER_HZ means after the recorded boot time.
var started = time.Unix(1700000002, 500_000_000).UTC()

func TestProcesses(t *testing.T) {
	for _, test := range []struct {
		name   string
		record func(h recordedHost)
		want   []sandbox.Process
	}{
		{"no cgroup of the pod", func(recordedHost) {}, nil},
		{"an empty cgroup of the pod", func(h recordedHost) { h.group("kubepods/pod" + podUID + "/c1") }, nil},
		{"cgroup v1: in one hierarchy only", func(h recordedHost) {
			h.group("memory/kubepods/burstable/pod"+podUID+"/c1", 42)
			h.group("freezer/kubepods/burstable/pod" + podUID + "/c1")
			h.thread(42, "java", "S", "futex_wait_queue", "net:[7]")
		}, []sandbox.Process{{PID: 42, Command: "java", State: "S", WaitChannel: "futex_wait_queue", Started: started}}},
		{"cgroup v1: in several hierarchies, told once", func(h recordedHost) {
			h.group("memory/kubepods/pod"+podUID+"/c1", 42)
			h.group("pids/kubepods/pod"+podUID+"/c1", 42)
			h.thread(42, "java", "R", "0", "net:[7]")
		}, []sandbox.Process{{PID: 42, Command: "java", State: "R", Started: started}}},
		{"cgroup v2 with systemd's names", func(h recordedHost) {
			h.group("kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod"+strings.ReplaceAll(podUID, "-", "_")+".slice/cri-containerd-c1.scope", 42)
			h.thread(42, "java", "S", "x", "net:[7]")
		}, []sandbox.Process{{PID: 42, Command: "java", State: "S", WaitChannel: "x", Started: started}}},
		{"below a kubelet's own cgroup root", func(h recordedHost) {
			h.group("kubelet/kubepods/pod"+podUID, 42)
			h.thread(42, "java", "S", "x", "net:[7]")
		}, []sandbox.Process{{PID: 42, Command: "java", State: "S", WaitChannel: "x", Started: started}}},
		{"of another pod", func(h recordedHost) {
			h.group("kubepods/pod"+otherUID+"/c1", 42)
			h.thread(42, "java", "S", "x", "net:[7]")
		}, nil},
		{"a thread in state D tells more than the leader", func(h recordedHost) {
			h.group("kubepods/pod"+podUID+"/c1", 42)
			h.thread(42, "java", "S", "futex_wait_queue", "net:[7]")
			h.thread(43, "worker", "D", "request_wait_answer", "net:[7]")
			h.thread(44, "other", "S", "x", "net:[7]")
		}, []sandbox.Process{{PID: 42, Command: "worker", State: "D", WaitChannel: "request_wait_answer", Started: started}}},
		{"a dead leader with a thread that cannot die", func(h recordedHost) {
			h.group("kubepods/pod"+podUID+"/c1", 42)
			h.thread(42, "java", "Z", "0", "")
			h.thread(43, "java", "D", "nfs_wait", "net:[7]")
		}, []sandbox.Process{{PID: 42, Command: "java", State: "D", WaitChannel: "nfs_wait", Started: started}}},
		{"zombies and dead threads have let go", func(h recordedHost) {
			h.group("kubepods/pod"+podUID+"/c1", 42)
			h.thread(42, "java", "Z", "0", "")
			h.thread(43, "java", "X", "0", "")
			h.thread(44, "java", "x", "0", "")
		}, nil},
		{"in state D, with what the kernel says of the way there", func(h recordedHost) {
			h.group("kubepods/pod"+podUID+"/c1", 42)
			h.thread(42, "java", "D", "nfs_wait", "net:[7]")
			h.write(h.Proc, "42/task/42/stack", "[<0>] nfs_wait+0x1a2/0x2b0\n"+strings.Repeat("[<0>] vfs_read+0x12/0x40\n", 2*maxStack))
		}, []sandbox.Process{{PID: 42, Command: "java", State: "D", WaitChannel: "nfs_wait", Started: started, Stack: append([]string{"nfs_wait"}, slices.Repeat([]string{"vfs_read"}, maxStack-1)...)}}},
		{"frozen by its cgroup, version 2", func(h recordedHost) {
			h.group("kubepods/pod"+podUID+"/c1", 42)
			h.thread(42, "java", "S", "do_freezer_trap", "net:[7]")
		}, []sandbox.Process{{PID: 42, Command: "java", State: "S", WaitChannel: "do_freezer_trap", Started: started, Frozen: true}}},
		{"frozen while it ran, version 1", func(h recordedHost) {
			h.group("kubepods/pod"+podUID+"/c1", 42)
			h.thread(42, "java", "D", "__refrigerator", "net:[7]")
		}, []sandbox.Process{{PID: 42, Command: "java", State: "D", WaitChannel: "__refrigerator", Started: started, Frozen: true}}},
		{"not what its group is frozen for", func(h recordedHost) {
			h.group("kubepods/pod"+podUID+"/c1", 42)
			h.thread(42, "java", "D", "nfs_wait", "net:[7]")
			h.write(h.Proc, "42/task/42/cgroup", "3:freezer:/kubepods/c1\n")
			h.write(h.Cgroup, "freezer/kubepods/c1/freezer.state", "FREEZING\n")
		}, []sandbox.Process{{PID: 42, Command: "java", State: "D", WaitChannel: "nfs_wait", Started: started}}},
		{"gone between the cgroup and /proc", func(h recordedHost) { h.group("kubepods/pod"+podUID+"/c1", 42) }, nil},
		{"a command with brackets and blanks", func(h recordedHost) {
			h.group("kubepods/pod"+podUID+"/c1", 42)
			h.thread(42, "a) R (b", "D", "x", "net:[7]")
		}, []sandbox.Process{{PID: 42, Command: "a) R (b", State: "D", WaitChannel: "x", Started: started}}},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { // the kernel has little time to explain
				h := newRecordedHost(t)
				test.record(h)
				found, err := h.processes(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				var got []sandbox.Process
				for _, p := range found {
					got = append(got, p.Process)
					if p.netns != "net:[7]" {
						t.Errorf("network namespace %q", p.netns)
					}
				}
				if !reflect.DeepEqual(got, test.want) {
					t.Errorf("got  %+v\nwant %+v", got, test.want)
				}
			})
		})
	}
}

// Finding nothing counts only where there is something to see.
func TestProcessesOfWhatIsNotTheHost(t *testing.T) {
	for _, test := range []struct {
		name   string
		record func(h recordedHost)
		want   string
	}{
		{"no cgroup of any pod", func(h recordedHost) {
			if err := os.RemoveAll(filepath.Join(h.Cgroup, "kubepods")); err != nil {
				t.Fatal(err)
			}
			h.group("user.slice/session-1.scope", 42)
		}, "this is not the node's cgroup hierarchy"},
		{"no cgroups at all", func(h recordedHost) {
			if err := os.RemoveAll(h.Cgroup); err != nil {
				t.Fatal(err)
			}
		}, "no such file"},
		{"another PID namespace", func(h recordedHost) { h.group("kubepods/pod"+podUID+"/c1", 0) }, "another PID namespace"},
	} {
		t.Run(test.name, func(t *testing.T) {
			h := newRecordedHost(t)
			test.record(h)
			if _, err := h.processes(t.Context()); err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("got %v, want an error with %q", err, test.want)
			}
		})
	}
}

// What was seen before something could not be read is evidence all the same.
func TestProcessesBesideOneThatCannotBeRead(t *testing.T) {
	h := newRecordedHost(t)
	h.group("kubepods/pod"+podUID+"/c1", pid, pid+1)
	h.thread(pid, "java", "D", "nfs_wait", "net:[7]")
	h.write(h.Proc, fmt.Sprintf("%d/task/%d/stat", pid+1, pid+1), "garbage")
	found, err := h.processes(t.Context())
	if err == nil || !strings.Contains(err.Error(), fmt.Sprintf("process %d", pid+1)) {
		t.Errorf("got error %v", err)
	}
	if len(found) != 1 || found[0].PID != pid || found[0].State != "D" {
		t.Errorf("got %+v", found)
	}
}

// Who ends while the processes are listed is in no namespace, and who looks into them belongs to none.
func TestTasks(t *testing.T) {
	h := lookable(t)
	h.write(h.Proc, "42/task/comm", "")
	h.process(43, "java", "S", "x", "net:[7]")
	h.symlink("43/ns/net", "net:[7]")
	h.symlink(fmt.Sprintf("%d/ns/net", os.Getpid()), "net:[7]")
	h.write(h.Proc, fmt.Sprintf("%d/task/comm", os.Getpid()), "")
	h.write(h.Proc, "1/task/comm", "")
	got, err := h.tasks(t.Context())
	if want := []task{{43, 43}}; err != nil || !slices.Equal(got["net:[7]"], want) || len(got) != 2 {
		t.Errorf("got %v (%v)", got, err)
	}
}

func TestPodCgroupNames(t *testing.T) {
	static := "0a1b2c3d4e5f60718293a4b5c6d7e8f9"
	for name, uid := range map[string]string{
		"pod" + podUID:                     podUID,
		"pod" + static:                     static,
		"kubepods-pod" + static + ".slice": static,
		"kubepods-burstable-pod" + strings.ReplaceAll(podUID, "-", "_") + ".slice": podUID,
		"kubelet-kubepods-pod" + strings.ReplaceAll(podUID, "-", "_") + ".slice":   podUID,
		"kubepods":            "",
		"pods":                "",
		"podman":              "",
		"xpod" + podUID:       "",
		"besteffort":          "",
		"machine-pod1.slice":  "",
		"pod" + podUID + "-x": "",
	} {
		got, ok := podOfCgroup(name)
		if ok != (uid != "") || ok && got != uid {
			t.Errorf("%s: got %q, %v, want %q", name, got, ok, uid)
		}
	}
}

// A process that slept when its group was frozen sleeps where it did, in state D by now.
func TestAFrozenProcess(t *testing.T) {
	requireRoot(t)
	root, freeze, thaw := filepath.Join(realNode.Cgroup, "freezer"), [2]string{"freezer.state", "FROZEN"}, [2]string{"freezer.state", "THAWED"}
	if _, err := os.Stat(root); err != nil { // version 2
		root, freeze, thaw = realNode.Cgroup, [2]string{"cgroup.freeze", "1"}, [2]string{"cgroup.freeze", "0"}
	}
	group := filepath.Join(root, "eni-guard-test-frozen")
	if err := os.MkdirAll(group, 0o755); err != nil {
		t.Fatal(err)
	}
	write := func(file [2]string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(group, file[0]), []byte(file[1]), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.CommandContext(t.Context(), "sleep", "600")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		write(thaw)
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		await(t, func() error { return os.Remove(group) })
	})
	write([2]string{"cgroup.procs", strconv.Itoa(cmd.Process.Pid)})
	expect := func(frozen bool) {
		t.Helper()
		await(t, func() error {
			found, err := realNode.describe(t.Context(), leaders([]int{cmd.Process.Pid}))
			if err != nil || len(found) != 1 || found[0].Frozen != frozen {
				return fmt.Errorf("got %+v (%w), want frozen: %v", found, err, frozen)
			}
			return nil
		})
	}
	expect(false)
	write(freeze)
	expect(true)
	write(thaw)
	expect(false)
}
