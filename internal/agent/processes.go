package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/prometheus/procfs"
	"golang.org/x/sys/unix"

	"github.com/eni-guard/eni-guard/internal/sandbox"
)

// podProcess is a live process and the network namespace it is in.
type podProcess struct {
	sandbox.Process
	netns string // "net:[INODE]"; empty when it cannot be told any more
}

// task is a thread, or, with the same two numbers, a whole process by its leader.
type task struct{ pid, tid int }

// leaders are the tasks of whole processes.
func leaders(pids []int) []task {
	tasks := make([]task, len(pids))
	for i, pid := range pids {
		tasks[i] = task{pid, pid}
	}
	return tasks
}

// tasks returns which threads are in which network namespace, for all namespaces of the node; of a process whose threads are
// all in the same, one. Threads, because the leader of a killed process may have ended, and lost its namespace, while
// another thread is stuck in the kernel; and because a thread can enter a namespace alone.
//
// It leaves out the calling process, whose threads go into namespaces to look at them.
func (h Host) tasks(ctx context.Context) (map[string][]task, error) {
	defer onThread(ctx, sandbox.ProbeProcesses)()
	proc, err := os.Open(h.Proc)
	if err != nil {
		return nil, err
	}
	defer proc.Close()
	names, err := proc.Readdirnames(-1)
	if err != nil {
		return nil, err
	}
	found := map[string][]task{}
	first := false
	for _, name := range names {
		pid, err := strconv.Atoi(name)
		if err != nil || pid == os.Getpid() {
			continue
		}
		first = first || pid == 1
		if ctx.Err() != nil {
			return found, ctx.Err()
		}
		if err := namespacesOfProcess(int(proc.Fd()), pid, found); err != nil {
			return found, fmt.Errorf("network namespaces of process %d (this needs the capability SYS_PTRACE): %w", pid, err)
		}
	}
	if !first {
		return found, fmt.Errorf("%s does not show process 1: it hides processes (mount option hidepid), or is not the host's", h.Proc)
	}
	return found, nil
}

// namespacesOfProcess adds a process to the namespaces that its threads are in. It runs for every process of the node, hence
// with as few calls of the kernel as there can be.
func namespacesOfProcess(proc, pid int, found map[string][]task) error {
	base := strconv.Itoa(pid)
	add := func(directory int, path string, t task) error {
		var target [64]byte
		n, err := unix.Readlinkat(directory, path, target[:])
		switch {
		case gone(err):
			return nil
		// Nobody may look at process 1 of some machines. It is in the host's namespaces by definition.
		case errors.Is(err, fs.ErrPermission) && pid == 1:
			return nil
		case err != nil:
			return err
		}
		id := string(target[:n])
		// The threads of one process come one after the other.
		if known := found[id]; len(known) == 0 || known[len(known)-1].pid != pid {
			found[id] = append(known, t)
		}
		return nil
	}
	// The number of links of the directory of threads says how many there are (fs/proc/base.c, proc_task_getattr), more than one
	// in a few processes only.
	var stat unix.Stat_t
	if err := unix.Fstatat(proc, base+"/task", &stat, 0); err != nil {
		if gone(err) {
			return nil
		}
		return err
	}
	if stat.Nlink <= 3 {
		return add(proc, base+"/ns/net", task{pid, pid})
	}
	directory, err := unix.Openat(proc, base+"/task", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if gone(err) {
		return nil
	}
	if err != nil {
		return err
	}
	file := os.NewFile(uintptr(directory), "task")
	defer file.Close()
	threads, err := file.Readdirnames(-1)
	if err != nil && !gone(err) {
		return err
	}
	for _, thread := range threads {
		tid, err := strconv.Atoi(thread)
		if err != nil {
			continue
		}
		if err := add(directory, thread+"/ns/net", task{pid, tid}); err != nil {
			return err
		}
	}
	return nil
}

// describe reads the tasks that are alive. What could be read before an error is returned beside it.
func (h Host) describe(ctx context.Context, tasks []task) ([]podProcess, error) {
	if len(tasks) == 0 {
		return nil, nil
	}
	proc, err := procfs.NewFS(h.Proc)
	if err != nil {
		return nil, err
	}
	kernel, err := proc.Stat()
	if err != nil {
		return nil, fmt.Errorf("reading the boot time: %w", err)
	}
	boot := time.Unix(int64(kernel.BootTime), 0) //nolint:gosec // seconds since 1970
	var found []podProcess
	var unread []error
	for _, t := range tasks {
		if ctx.Err() != nil {
			return found, ctx.Err()
		}
		p, alive, err := h.process(proc, t, boot)
		if err != nil {
			unread = append(unread, err)
		}
		if alive {
			found = append(found, p)
		}
	}
	return found, errors.Join(unread...)
}

// process reads one process, or one thread of it; alive is true also beside an error, when a live thread was seen before. It reads only files
// that the kernel answers without the process's memory lock, which a stuck process may hold for ever: stat, wchan and the
// namespace link, never cmdline or environ.
func (h Host) process(proc procfs.FS, t task, boot time.Time) (p podProcess, alive bool, err error) {
	pid := t.pid
	threads, err := proc.AllThreads(pid)
	if t.tid != pid {
		threads = slices.DeleteFunc(threads, func(thread procfs.Proc) bool { return thread.PID != t.tid })
	}
	if gone(err) || len(threads) == 0 && err == nil {
		return podProcess{}, false, nil
	}
	if err != nil {
		return podProcess{}, false, fmt.Errorf("threads of process %d: %w", pid, err)
	}
	for _, thread := range threads {
		stat, err := thread.Stat()
		if gone(err) {
			continue
		}
		if err != nil {
			return p, alive, fmt.Errorf("state of process %d: %w", pid, err)
		}
		// A zombie, and a thread that is dead already, has let go of its namespaces (kernel/exit.c, do_exit).
		if stat.State == "Z" || stat.State == "X" || stat.State == "x" {
			continue
		}
		if alive && stat.State != "D" {
			continue // one live thread is enough to tell, and one in state D tells most
		}
		alive = true
		p.Process = sandbox.Process{
			PID:         pid,
			Command:     stat.Comm,
			State:       stat.State,
			WaitChannel: h.waitChannel(pid, thread.PID),
			Started:     boot.Add(time.Duration(stat.Starttime) * time.Second / userHZ).UTC(), //nolint:gosec // ticks since boot
		}
		p.Frozen = h.frozen(pid, thread.PID, p.State, p.WaitChannel)
		// The namespace of a leader that is dead already can no longer be read; that of its live thread can.
		if p.netns, err = os.Readlink(h.task(pid, thread.PID, "ns/net")); err != nil && !gone(err) {
			return p, alive, fmt.Errorf("network namespace of process %d: %w", pid, err)
		}
		if stat.State == "D" {
			p.Stack = h.stack(pid, thread.PID)
			break
		}
	}
	return p, alive, nil
}

// userHZ is the unit of starttime in /proc/PID/stat: USER_HZ, 100 on every architecture that Kubernetes runs on.
const userHZ = 100

func (h Host) task(pid, tid int, file string) string {
	return filepath.Join(h.Proc, strconv.Itoa(pid), "task", strconv.Itoa(tid), file)
}

// waitChannel returns the kernel function a thread sleeps in; empty when it does not sleep or the kernel does not tell.
func (h Host) waitChannel(pid, tid int) string {
	content, err := os.ReadFile(h.task(pid, tid, "wchan"))
	if err != nil || string(content) == "0" {
		return ""
	}
	return string(content)
}

// frozen says whether the freezer keeps a thread from running. In version 2 such a thread waits in a place of its own. In version 1 it
// does so only if it ran: one that slept is kept where it was, in state D (kernel/freezer.c, __set_task_frozen), and only the cgroup
// tells. While that still says FREEZING, something in it does not stop for the freezer, and may be what is stuck.
func (h Host) frozen(pid, tid int, state, waitChannel string) bool {
	if waitChannel == "do_freezer_trap" || waitChannel == "__refrigerator" {
		return true
	}
	if state != "D" {
		return false
	}
	for line := range strings.Lines(explanation(h.task(pid, tid, "cgroup"))) {
		// 7:freezer:/kubepods/pod…
		if _, path, found := strings.Cut(strings.TrimSpace(line), ":freezer:"); found {
			return explanation(filepath.Join(h.Cgroup, "freezer", path, "freezer.state")) == "FROZEN\n"
		}
	}
	return false
}

// maxStack bounds the functions that are kept of a stack.
const maxStack = 16

// stack returns the kernel functions a thread sleeps in, innermost first; nil when the kernel does not tell, or not in time.
func (h Host) stack(pid, tid int) []string {
	var functions []string
	for line := range strings.Lines(explanation(h.task(pid, tid, "stack"))) {
		// [<0>] request_wait_answer+0x1a2/0x2b0
		_, function, _ := strings.Cut(strings.TrimSpace(line), " ")
		function, _, _ = strings.Cut(function, "+")
		if function != "" && len(functions) < maxStack {
			functions = append(functions, function)
		}
	}
	return functions
}

// explanationTimeout is how long the kernel may take to give what explains a finding, and is none. For a stack it waits for a lock that an
// execve holds (fs/proc/base.c, lock_trace), for a cgroup for the one of all cgroups; what is stuck holds them for ever.
const explanationTimeout = 50 * time.Millisecond

// explanationSlots bounds how many such reads can hang.
var explanationSlots = make(chan struct{}, 4)

// explanation reads a file; it returns nothing when that cannot be read, or not in time.
func explanation(file string) string {
	select {
	case explanationSlots <- struct{}{}:
	default:
		return ""
	}
	read := make(chan string, 1)
	go func() {
		defer func() { <-explanationSlots }()
		content, _ := os.ReadFile(file)
		read <- string(content)
	}()
	select {
	case content := <-read:
		return content
	case <-time.After(explanationTimeout):
		return ""
	}
}
