package incident

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// HostProcess is a process of the host that belongs to the cluster, as it was started: a daemon, or what one has started.
type HostProcess struct {
	PID, Parent int
	Path, Dir   string
	Args, Env   []string
}

// HostProcesses finds the cluster's processes on the host whose command line is wanted.
func HostProcesses(wanted func(args []string) bool) ([]HostProcess, error) {
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return nil, err
	}
	var found []HostProcess
	for _, dir := range dirs {
		// A process may be gone by now.
		environ, err := os.ReadFile(filepath.Join(dir, "environ"))
		if err != nil {
			continue
		}
		p := HostProcess{Env: strings.Split(strings.TrimSuffix(string(environ), "\x00"), "\x00")}
		if !slices.Contains(p.Env, clusterMark) {
			continue
		}
		cmdline, err := os.ReadFile(filepath.Join(dir, "cmdline"))
		p.Args = strings.Split(strings.TrimSuffix(string(cmdline), "\x00"), "\x00")
		if err != nil || !wanted(p.Args) {
			continue
		}
		stat, err := os.ReadFile(filepath.Join(dir, "stat"))
		if err != nil {
			continue
		}
		p.PID, _ = strconv.Atoi(filepath.Base(dir))
		if _, err := fmt.Sscanf(string(stat[bytes.LastIndexByte(stat, ')')+1:]), " %c %d", new(rune), &p.Parent); err != nil {
			return nil, fmt.Errorf("%s/stat: %w: %s", dir, err, stat)
		}
		p.Path, err = os.Readlink(filepath.Join(dir, "exe"))
		if err != nil {
			continue
		}
		if p.Dir, err = os.Readlink(filepath.Join(dir, "cwd")); err == nil {
			found = append(found, p)
		}
	}
	return found, nil
}

// Kill ends a process with SIGKILL, as a crash would, and waits until it runs no longer.
func (p HostProcess) Kill(ctx context.Context) error {
	if err := syscall.Kill(p.PID, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
		return err
	}
	return Wait(ctx, 2*time.Minute, p.Args[0]+" to end", func(context.Context) error {
		// One that nobody has reaped is no longer in the way once all its threads have ended: before that one of them may
		// still have its ports open.
		stats, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", p.PID))
		for _, file := range stats {
			stat, err := os.ReadFile(file)
			if end := strings.LastIndex(string(stat), ") "); err == nil && end > 0 && !strings.ContainsAny(string(stat[end+2:end+3]), "ZX") {
				return fmt.Errorf("a thread runs: %s", stat)
			}
		}
		return nil
	})
}

// Daemon finds a daemon of the cluster by its name.
func Daemon(name string) (HostProcess, error) {
	processes, err := HostProcesses(func(args []string) bool { return filepath.Base(args[0]) == name })
	// A child that is about to execute something else looks like its parent.
	all := slices.Clone(processes)
	processes = slices.DeleteFunc(processes, func(p HostProcess) bool {
		return slices.ContainsFunc(all, func(other HostProcess) bool { return other.PID == p.Parent })
	})
	if err == nil && len(processes) != 1 {
		err = fmt.Errorf("%d processes of the cluster are %s, not 1", len(processes), name)
	}
	if err != nil {
		return HostProcess{}, err
	}
	return processes[0], nil
}

// KillDaemon crashes a daemon of the cluster by its name, and returns how to start it as it was started before.
func (c *Cluster) KillDaemon(ctx context.Context, name string) (start func(ctx context.Context) error, err error) {
	daemon, err := Daemon(name)
	if err != nil {
		return nil, err
	}
	started := false
	start = func(ctx context.Context) error {
		if started {
			return nil
		}
		started = true
		if name == "kubelet" {
			// Without a runtime it ends at once.
			if err := AwaitRuntime(ctx); err != nil {
				return err
			}
		}
		return c.startDaemon(name, daemon)
	}
	return start, daemon.Kill(ctx)
}

func (c *Cluster) startDaemon(name string, daemon HostProcess) error {
	log, err := os.OpenFile(filepath.Join(c.dir, "logs", name+".log"), os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer log.Close()
	// It outlives the tests, and must not keep what they have inherited, such as the lock of whoever runs them.
	inherited, _ := filepath.Glob("/proc/self/fd/*")
	for _, file := range inherited {
		if fd, err := strconv.Atoi(filepath.Base(file)); err == nil && fd > 2 {
			syscall.CloseOnExec(fd)
		}
	}
	cmd := exec.Cmd{
		Path: daemon.Path, Args: daemon.Args, Env: daemon.Env, Dir: daemon.Dir, Stdout: log, Stderr: log,
		SysProcAttr: &syscall.SysProcAttr{Setsid: true},
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	go func() { _ = cmd.Wait() }()
	return nil
}

// AwaitRuntime waits until containerd takes connections.
func AwaitRuntime(ctx context.Context) error {
	return Wait(ctx, 2*time.Minute, "containerd to listen", func(ctx context.Context) error {
		conn, err := (&net.Dialer{}).DialContext(ctx, "unix", "/run/eni-guard-cluster/containerd.sock")
		if err != nil {
			return err
		}
		return conn.Close()
	})
}
