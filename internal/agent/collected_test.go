package agent

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"github.com/eni-guard/eni-guard/internal/sandbox"
)

// noNamespace gives a recorded process a network namespace that nobody can enter: the link leads to a file that has its number and is none.
func (h recordedHost) noNamespace(pid int) (id string) {
	h.t.Helper()
	dir := filepath.Join(h.Proc, fmt.Sprintf("%d/task/%d/ns", pid, pid))
	var stat unix.Stat_t
	err := os.MkdirAll(dir, 0o755)
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, "file"), nil, 0o600)
	}
	if err == nil {
		err = unix.Stat(filepath.Join(dir, "file"), &stat)
	}
	id = fmt.Sprintf("net:[%d]", stat.Ino)
	if err = errors.Join(err, os.Rename(filepath.Join(dir, "file"), filepath.Join(dir, id)), os.Symlink(id, filepath.Join(dir, "net"))); err != nil {
		h.t.Fatal(err)
	}
	return id
}

// Whatever keeps a probe from seeing everything is in the report, and under its name: without it the pod could seem to be released.
// Where one thing fails, what another has found is found all the same.
func TestWhatCouldNotBeSeenIsReported(t *testing.T) {
	const container = "kubepods/pod" + podUID + "/c1"
	at := func(path string) podRecords {
		return podRecords{sandboxes: []podSandbox{{id: "s1", pod: sandbox.Pod{UID: podUID}, details: details{netnsPath: path}}}}
	}
	knows := func(first, second podRecords, err error) records {
		return failingRuntime{lateRuntime{first, second}, err}
	}
	for _, test := range []struct {
		name    string
		record  func(h recordedHost)
		runtime records
		how     depth
		probe   sandbox.ProbeName
		want    string
	}{
		{"a process of the pod", func(h recordedHost) {
			h.group(container, pid)
			h.process(pid, "java", "S", "x", "net:[7]")
			h.write(h.Proc, "42/task/42/stat", "garbage")
		}, fakeRuntime(knowsNothing), quick, sandbox.ProbeProcesses, "state of process 42: "},
		{"the threads of a process of the pod", func(h recordedHost) {
			h.group(container, pid)
			h.write(h.Proc, "42/task", "no directory")
		}, fakeRuntime(knowsNothing), quick, sandbox.ProbeProcesses, "threads of process 42: "},
		{"the boot time", func(h recordedHost) {
			h.group(container, pid)
			h.write(h.Proc, "stat", "btime never\n")
		}, fakeRuntime(knowsNothing), quick, sandbox.ProbeProcesses, "reading the boot time: "},
		{"the list of a cgroup", func(h recordedHost) { h.write(h.Cgroup, container+"/cgroup.procs", "42\nx\n") },
			fakeRuntime(knowsNothing), quick, sandbox.ProbeCgroups, `cgroup.procs: strconv.Atoi: parsing "x"`},
		{"a cgroup that is no file", func(h recordedHost) {
			if err := errors.Join(os.MkdirAll(filepath.Join(h.Cgroup, container, "cgroup.procs/x"), 0o755)); err != nil {
				h.t.Fatal(err)
			}
		}, fakeRuntime(knowsNothing), quick, sandbox.ProbeCgroups, "cgroup.procs: is a directory"},
		{"a process of another PID namespace", func(h recordedHost) { h.group(container, 0) },
			fakeRuntime(knowsNothing), quick, sandbox.ProbeCgroups, "the agent does not run in the host's"},
		{"the namespace of a process of the pod", func(h recordedHost) {
			h.group(container, pid)
			h.process(pid, "java", "S", "x", "")
			h.noNamespace(pid)
		}, fakeRuntime(knowsNothing), quick, sandbox.ProbeNetns, "reading the addresses in network namespace net:["},
		{"the namespace of some process", func(h recordedHost) {
			h.process(pid, "java", "S", "x", "")
			h.symlink("42/ns/net", h.noNamespace(pid))
		}, fakeRuntime(knowsNothing), thorough, sandbox.ProbeNetns, "reading the addresses in network namespace net:["},
		{"where some process is", func(h recordedHost) {
			h.process(pid, "java", "S", "x", "")
			h.write(h.Proc, "42/ns/net", "no link")
		},
			fakeRuntime(knowsNothing), thorough, sandbox.ProbeProcesses, "network namespaces of process 42 (this needs the capability SYS_PTRACE)"},
		{"where a sandbox has its namespace", func(recordedHost) {}, knows(at("/run/docker/netns/x"), podRecords{}, nil), thorough,
			sandbox.ProbeNetns, "/run/docker/netns/x of sandbox s1 is not below /run/netns"},
		{"where a sandbox that came meanwhile has it", func(h recordedHost) { h.group(container) },
			knows(podRecords{}, at("/run/docker/netns/x"), nil), thorough, sandbox.ProbeNetns, "/run/docker/netns/x of sandbox s1 is not below /run/netns"},
		{"whose the namespaces are", func(h recordedHost) { h.group(container) }, knows(podRecords{}, podRecords{}, errors.New("connection refused")),
			thorough, sandbox.ProbeRuntime, "connection refused"},
	} {
		t.Run(test.name, func(t *testing.T) {
			// One that is nobody's, and so may be a sandbox's in the making.
			h := lookable(t, runtimesNamespace(t))
			test.record(h)
			report := newInspector("node-a", h.Host, test.runtime).look(t.Context(), podQuery, test.how)
			for _, p := range report.Probes {
				if (p.Name == test.probe) != strings.Contains(p.Error, test.want) {
					t.Errorf("probe %s: %q", p.Name, p.Error)
				}
			}
			if verdict := report.Verdict(); verdict == sandbox.Released {
				t.Errorf("%s: %+v", verdict, report)
			}
		})
	}
}

// failingRuntime answers about one pod, and not about all.
type failingRuntime struct {
	lateRuntime
	err error
}

func (r failingRuntime) all(ctx context.Context) (podRecords, error) {
	found, _ := r.lateRuntime.all(ctx)
	return found, r.err
}

// A cgroup that can be read once, and not again, hides who has come into it meanwhile.
func TestACgroupThatCannotBeReadAgain(t *testing.T) {
	h := lookable(t)
	h.group("kubepods/pod"+podUID+"/c1", pid)
	h.process(pid, "java", "S", "x", "net:[7]")
	group := filepath.Join(h.Cgroup, "kubepods/pod"+podUID+"/c1")
	i := newInspector("node-a", h.Host, fakeRuntime(knowsNothing))
	e := evidence{}
	var err error
	if e.members, err = h.members(t.Context(), podUID, quick); err != nil {
		t.Fatal(err)
	}
	if e.processes, err = h.describe(t.Context(), leaders(e.members.pids)); err != nil {
		t.Fatal(err)
	}
	h.write(group, "cgroup.procs", "x\n")
	i.lookAgain(t.Context(), &e)
	if e.cgroupsErr == nil || len(e.processes) != 1 {
		t.Errorf("found %+v (%v)", e.processes, e.cgroupsErr)
	}
	// One that has come, and cannot be described.
	h.write(group, "cgroup.procs", "42\n43\n")
	h.write(h.Proc, "43/task", "no directory")
	i.lookAgain(t.Context(), &e)
	if e.processErr == nil || !strings.Contains(e.processErr.Error(), "threads of process 43") || len(e.processes) != 1 {
		t.Errorf("found %+v (%v)", e.processes, e.processErr)
	}
}

// A stranger in the pod's namespace that cannot be described is there all the same, for all that is known.
func TestAStrangerThatCannotBeDescribed(t *testing.T) {
	path := runtimesNamespace(t)
	h := lookable(t, path)
	h.symlink("42/ns/net", look(t, quick).mountedAt(path))
	h.write(h.Proc, "42/task", "no directory")
	i := newInspector("node-a", h.Host, fakeRuntime(func(context.Context, string) (podRecords, error) {
		return podRecords{sandboxes: []podSandbox{{id: "s1", pod: sandbox.Pod{UID: podUID}, details: details{netnsPath: path}}}}, nil
	}))
	names := func(failure string) bool { return strings.Contains(failure, "threads of process 42: ") }
	if report := i.look(t.Context(), podQuery, thorough); !slices.ContainsFunc(report.Failures(), names) {
		t.Errorf("failures %q", report.Failures())
	}
	if a := i.holdersOf(t.Context(), testAddress); !slices.ContainsFunc(a.Failures, names) {
		t.Errorf("asked for the address: failures %q", a.Failures)
	}
}

// Who has no time left says so, in each probe, and takes nothing for seen.
func TestNoTimeLeft(t *testing.T) {
	path := runtimesNamespace(t)
	h := lookable(t, path)
	h.group("kubepods/pod"+podUID+"/c1", pid)
	h.process(pid, "java", "S", "x", "net:[7]")
	h.symlink("42/ns/net", "net:[7]")
	over, cancel := context.WithCancel(t.Context())
	cancel()
	for name, try := range map[string]func() error{
		"the pod's cgroups":  func() error { _, err := h.members(over, podUID, thorough); return err },
		"all cgroups":        func() error { _, err := h.allMembers(over); return err },
		"processes":          func() error { _, err := h.tasks(over); return err },
		"one process":        func() error { _, err := h.describe(over, leaders([]int{pid})); return err },
		"the list of a pod":  func() error { _, err := cgroupPIDs(over, []string{filepath.Join(h.Cgroup, "kubepods")}); return err },
		"addresses":          func() error { return h.readAddresses(over, []netNamespace{{id: "net:[7]", paths: []string{path}}}) },
		"a look at all":      func() error { _, _, err := h.view(over, quick); return err },
		"a thorough look":    func() error { _, _, err := h.view(over, thorough); return err },
		"the processes then": func() error { _, err, _ := h.view(over, thorough); return err },
	} {
		if err := try(); !errors.Is(err, context.Canceled) {
			t.Errorf("%s: %v", name, err)
		}
	}
	query := podQuery
	query.IPs = []netip.Addr{testAddress}
	if report := newInspector("node-a", h.Host, fakeRuntime(knowsNothing)).Inspect(over, query); report.Verdict() != sandbox.Unknown || len(report.Failures()) != len(sandbox.Required) {
		t.Errorf("%s: %q", report.Verdict(), report.Failures())
	} else if told := strings.Join(report.Failures(), "; "); strings.Contains(told, "no answer") {
		t.Errorf("probes that nobody had time to ask are said to give no answer: %s", told)
	}
}

// A runtime that hangs while one looks quickly leaves time to look everywhere: that the other probes have run is known all the same.
func TestAQuickLookLeavesTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var took []time.Duration
		inspector := newInspector("node-a", lookable(t).Host, fakeRuntime(func(ctx context.Context, _ string) (podRecords, error) {
			start := time.Now()
			<-ctx.Done()
			took = append(took, time.Since(start))
			return podRecords{}, ctx.Err()
		}))
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
		defer cancel()
		if report := inspector.Inspect(ctx, podQuery); report.Verdict() != sandbox.Unknown || len(report.Failures()) != 1 || !strings.Contains(report.Failures()[0], `"runtime"`) {
			t.Errorf("%s: %q", report.Verdict(), report.Failures())
		}
		synctest.Wait()
		if len(took) != 2 || took[0] >= took[1] {
			t.Errorf("a quick look, and one everywhere, gave the runtime %v", took)
		}
	})
}
