package e2e

import (
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
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/eni-guard/eni-guard/test/e2e/incident"
)

// hostProcess is a process of the host as it was started.
type hostProcess struct {
	pid       int
	path, dir string
	args, env []string
}

// hostProcesses finds processes that belong to the cluster: its daemons and what those started on the host.
func hostProcesses(t *testing.T, wanted func(args []string) bool) []hostProcess {
	t.Helper()
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		t.Fatal(err)
	}
	var found []hostProcess
	for _, dir := range dirs {
		// A process may be gone by now.
		environ, err := os.ReadFile(filepath.Join(dir, "environ"))
		if err != nil {
			continue
		}
		p := hostProcess{env: strings.Split(strings.TrimSuffix(string(environ), "\x00"), "\x00")}
		if !slices.Contains(p.env, "ENI_GUARD_CLUSTER=1") {
			continue
		}
		cmdline, err := os.ReadFile(filepath.Join(dir, "cmdline"))
		p.args = strings.Split(strings.TrimSuffix(string(cmdline), "\x00"), "\x00")
		if err != nil || !wanted(p.args) {
			continue
		}
		p.pid, _ = strconv.Atoi(filepath.Base(dir))
		p.path, err = os.Readlink(filepath.Join(dir, "exe"))
		if err != nil {
			continue
		}
		if p.dir, err = os.Readlink(filepath.Join(dir, "cwd")); err == nil {
			found = append(found, p)
		}
	}
	return found
}

// kill ends a process with SIGKILL, as a crash would, and waits until it runs no longer.
func (p hostProcess) kill(t *testing.T) {
	t.Helper()
	if err := syscall.Kill(p.pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
		t.Fatal(err)
	}
	err := incident.Wait(context.Background(), 30*time.Second, p.args[0]+" to end", func(context.Context) error {
		// One that nobody has reaped is no longer in the way once all its threads have ended: before that one of them may
		// still have its ports open.
		stats, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", p.pid))
		for _, file := range stats {
			stat, err := os.ReadFile(file)
			if end := strings.LastIndex(string(stat), ") "); err == nil && end > 0 && !strings.ContainsAny(string(stat[end+2:end+3]), "ZX") {
				return fmt.Errorf("a thread runs: %s", stat)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// killDaemon crashes a daemon of the cluster by its name, and returns how to start it as it was started before. At the
// end of the test it runs again in any case.
func killDaemon(t *testing.T, name string) (start func()) {
	t.Helper()
	processes := hostProcesses(t, func(args []string) bool { return filepath.Base(args[0]) == name })
	if len(processes) != 1 {
		t.Fatalf("%d processes of the cluster are %s, not 1", len(processes), name)
	}
	daemon := processes[0]
	started := false
	start = func() {
		if started {
			return
		}
		started = true
		if name == "kubelet" {
			awaitRuntime(t) // without one it ends at once
		}
		log, err := os.OpenFile(filepath.Join(repo, ".cluster/logs", name+".log"), os.O_APPEND|os.O_WRONLY, 0)
		if err != nil {
			t.Error(err)
			return
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
			Path: daemon.path, Args: daemon.args, Env: daemon.env, Dir: daemon.dir, Stdout: log, Stderr: log,
			SysProcAttr: &syscall.SysProcAttr{Setsid: true},
		}
		if err := cmd.Start(); err != nil {
			t.Error(err)
			return
		}
		go func() { _ = cmd.Wait() }()
	}
	t.Cleanup(start)
	daemon.kill(t)
	return start
}

// awaitRuntime waits until containerd takes connections.
func awaitRuntime(t *testing.T) {
	t.Helper()
	err := incident.Wait(context.Background(), time.Minute, "containerd to listen", func(ctx context.Context) error {
		conn, err := (&net.Dialer{}).DialContext(ctx, "unix", "/run/eni-guard-cluster/containerd.sock")
		if err != nil {
			return err
		}
		return conn.Close()
	})
	if err != nil {
		t.Error(err)
	}
}

// restart crashes a daemon of the cluster, starts it again, and waits until the cluster works: until it runs a new pod.
func restart(t *testing.T, name, namespace string) {
	t.Helper()
	killDaemon(t, name)()
	clusterWorks(t, namespace, "after-"+name)
}

// clusterWorks waits until the API server is ready, with etcd behind it, and a new pod runs, which needs every other part.
func clusterWorks(t *testing.T, namespace, name string) {
	t.Helper()
	err := incident.Wait(t.Context(), time.Minute, "the API server to be ready", func(ctx context.Context) error {
		return cluster.Discovery().RESTClient().Get().AbsPath("/readyz").Do(ctx).Error()
	})
	if err == nil {
		err = incident.Wait(t.Context(), time.Minute, "a pod to be created", func(ctx context.Context) error {
			_, err := cluster.CoreV1().Pods(namespace).Create(ctx, incident.Pod(namespace, name, []string{"sleep", "86400"}, nil), metav1.CreateOptions{})
			return err
		})
	}
	if err == nil {
		_, err = cluster.AwaitStarted(t.Context(), namespace, name)
	}
	if err == nil {
		err = cluster.CoreV1().Pods(namespace).Delete(t.Context(), name, metav1.DeleteOptions{})
	}
	if err != nil {
		t.Fatal(err)
	}
	restored(t)
}
