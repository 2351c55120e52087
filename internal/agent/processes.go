package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/prometheus/procfs"

	"github.com/eni-guard/eni-guard/internal/sandbox"
)

// Host is where the node's /proc and cgroup hierarchies are seen: the real ones, or recorded ones in a test.
type Host struct {
	Proc   string // "/proc" of the host's PID namespace
	Cgroup string // "/sys/fs/cgroup"
}

// podProcess is a live process of a pod and the network namespace it is in.
type podProcess struct {
	sandbox.Process
	netns     string // "net:[INODE]"; empty when it cannot be told any more
	netnsFile string // the file to enter it by
}

// podCgroup matches the directory of any pod's cgroup: pod<UID> with the cgroupfs driver,
// kubepods-<class>-pod<UID with underscores>.slice with systemd's (kubelet: pkg/kubelet/cm, GetPodContainerNameForDriver).
// Static pods have a hash without dashes as UID. Below a cgroup root of the kubelet's own, systemd's names start with that root's.
var podCgroup = regexp.MustCompile(`^(?:[a-z0-9_.-]+-)?pod([0-9a-f]{8}(?:[-_][0-9a-f]{4}){3}[-_][0-9a-f]{12}|[0-9a-f]{32})(?:\.slice)?$`)

// processes returns the live processes in the cgroups of a pod. With cgroup version 1 a process counts when it is in
// the pod's group of any hierarchy: moving it out of one does not hide it.
func (h Host) processes(ctx context.Context, uid string) ([]podProcess, error) {
	groups, err := h.podCgroups(ctx, uid)
	if err != nil {
		return nil, err
	}
	pids, err := cgroupPIDs(ctx, groups)
	if err != nil {
		return nil, err
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
	for _, pid := range pids {
		if ctx.Err() != nil {
			return found, ctx.Err()
		}
		p, alive, err := h.process(proc, pid, boot)
		if err != nil {
			unread = append(unread, err)
		}
		if alive {
			found = append(found, p)
		}
	}
	return found, errors.Join(unread...)
}

// podCgroups finds the directories of a pod's cgroup in all hierarchies. It does not descend into the groups of pods,
// so its cost grows with the pods of the node, not with their containers or processes.
//
// The cgroups of some pod must be there to see, if only the agent's own: otherwise this is not the host's hierarchy,
// and finding nothing would prove nothing.
func (h Host) podCgroups(ctx context.Context, uid string) ([]string, error) {
	var found []string
	anyPod := false
	err := filepath.WalkDir(h.Cgroup, func(path string, entry fs.DirEntry, err error) error {
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case errors.Is(err, fs.ErrNotExist) && path != h.Cgroup:
			return nil // removed while it was read
		case err != nil:
			return err
		case !entry.IsDir():
			return nil
		}
		match := podCgroup.FindStringSubmatch(entry.Name())
		if match == nil {
			return nil
		}
		anyPod = true
		if strings.ReplaceAll(match[1], "_", "-") == uid {
			found = append(found, path)
		}
		return fs.SkipDir
	})
	if err != nil {
		return nil, fmt.Errorf("looking for the pod's cgroups below %s: %w", h.Cgroup, err)
	}
	if !anyPod {
		return nil, fmt.Errorf("no pod has a cgroup below %s: this is not the node's cgroup hierarchy", h.Cgroup)
	}
	return found, nil
}

// cgroupPIDs reads cgroup.procs of the groups and of everything below them. The kernel leaves zombies out of it, but
// lists the dead leader of a process that has a live thread.
func cgroupPIDs(ctx context.Context, groups []string) ([]int, error) {
	var pids []int
	for _, group := range groups {
		err := filepath.WalkDir(group, func(path string, entry fs.DirEntry, err error) error {
			switch {
			case ctx.Err() != nil:
				return ctx.Err()
			case errors.Is(err, fs.ErrNotExist):
				return nil
			case err != nil:
				return err
			case !entry.IsDir():
				return nil
			}
			content, err := os.ReadFile(filepath.Join(path, "cgroup.procs"))
			if gone(err) {
				return nil
			}
			if err != nil {
				return err
			}
			for field := range strings.FieldsSeq(string(content)) {
				pid, err := strconv.Atoi(field)
				if err != nil {
					return fmt.Errorf("%s/cgroup.procs: %w", path, err)
				}
				if pid == 0 {
					return fmt.Errorf("%s/cgroup.procs has a process of another PID namespace: the agent does not run in the host's", path)
				}
				pids = append(pids, pid)
			}
			return nil
		})
		if err != nil {
			return nil, fmt.Errorf("reading the pod's processes: %w", err)
		}
	}
	slices.Sort(pids)
	return slices.Compact(pids), nil
}

// process reads one process; alive is true also beside an error, when a live thread was seen before. It reads only files that the kernel answers without the process's memory lock, which a
// stuck process may hold for ever: stat, wchan and the namespace link, never cmdline or environ.
func (h Host) process(proc procfs.FS, pid int, boot time.Time) (p podProcess, alive bool, err error) {
	threads, err := proc.AllThreads(pid)
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
		// The namespace of a leader that is dead already can no longer be read; that of its live thread can.
		p.netnsFile = h.task(pid, thread.PID, "ns/net")
		if p.netns, err = os.Readlink(p.netnsFile); err != nil && !gone(err) {
			return p, alive, fmt.Errorf("network namespace of process %d: %w", pid, err)
		}
		if stat.State == "D" {
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

// gone says whether an error means that a process or a group ended while it was read.
func gone(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ESRCH) || errors.Is(err, syscall.ENODEV)
}
