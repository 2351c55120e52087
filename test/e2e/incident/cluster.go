// Package incident replays the incident this project exists for on the cluster of hack/cluster. The demo tells it to a
// person, the end-to-end tests hold it against what must be observed; both run this code.
package incident

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"
)

const (
	// DataDir is where the cluster of hack/cluster keeps its state; `make cluster-down` removes what is below.
	DataDir = "/var/lib/eni-guard-cluster"
	// BusyboxImage is the image of workloads that the cluster's node has.
	BusyboxImage = "eni-guard.io/busybox:dev"
	// Node is the cluster's one node.
	Node = "node-1"
	// GuardNamespace is where `make install` puts the guard.
	GuardNamespace = "eni-guard"

	clusterMark = "ENI_GUARD_CLUSTER=1"
)

// Cluster is the running cluster of a checkout.
type Cluster struct {
	kubernetes.Interface
	dir   string // .cluster
	audit auditLog
}

// Open returns the cluster of the checkout at repo. It fails, saying what to run, when there is none, or when the
// caller may not look at the node.
func Open(ctx context.Context, repo string) (*Cluster, error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("this needs root, as the cluster does: it looks at the node from outside")
	}
	dir, err := filepath.Abs(filepath.Join(repo, ".cluster"))
	if err != nil {
		return nil, err
	}
	config, err := clientcmd.BuildConfigFromFlags("", filepath.Join(dir, "kubeconfig"))
	if err != nil {
		return nil, fmt.Errorf("no cluster is running for this checkout; run `make cluster-up install` first: %w", err)
	}
	config.QPS, config.Burst = 100, 200
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return nil, err
	}
	if _, err := client.CoreV1().Nodes().Get(ctx, Node, metav1.GetOptions{}); err != nil {
		return nil, fmt.Errorf("the cluster of this checkout does not answer; run `make cluster-up install`: %w", err)
	}
	return &Cluster{Interface: client, dir: dir}, nil
}

// Binary is the path of one of the cluster's programs.
func (c *Cluster) Binary(name string) string { return filepath.Join(c.dir, "bin", name) }

// Kubeconfig is the path of the administrator's kubeconfig.
func (c *Cluster) Kubeconfig() string { return filepath.Join(c.dir, "kubeconfig") }

// AuditLog is the path of the API server's audit log.
func (c *Cluster) AuditLog() string { return filepath.Join(c.dir, "audit.log") }

// Kubectl runs kubectl and returns what it prints, on both streams.
func (c *Cluster) Kubectl(ctx context.Context, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, c.Binary("kubectl"), append([]string{"--kubeconfig", c.Kubeconfig()}, args...)...)
	out, err := cmd.CombinedOutput()
	return strings.TrimRight(string(out), "\n"), err
}

// Wait tries a condition every 100 ms until it holds. A condition says why it does not hold yet; the last reason is in
// the error when the time is up.
func Wait(ctx context.Context, timeout time.Duration, what string, condition func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	var reason error
	for {
		err := condition(ctx)
		if err == nil {
			return nil
		}
		// What fails because the time is up tells less than what failed before.
		if reason == nil || ctx.Err() == nil && !strings.Contains(err.Error(), "context deadline") {
			reason = err
		}
		select {
		case <-ctx.Done():
			if errors.Is(ctx.Err(), context.Canceled) {
				return fmt.Errorf("stopped waiting for %s: %w", what, ctx.Err())
			}
			return fmt.Errorf("waited %s for %s: %w", timeout, what, reason)
		case <-tick.C:
		}
	}
}

// Namespace makes a namespace with the service account that pods in it need.
func (c *Cluster) Namespace(ctx context.Context, name string, labels map[string]string) error {
	_, err := c.CoreV1().Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: labels}}, metav1.CreateOptions{})
	if err != nil {
		return err
	}
	return Wait(ctx, 2*time.Minute, "the service account of namespace "+name, func(ctx context.Context) error {
		_, err := c.CoreV1().ServiceAccounts(name).Get(ctx, "default", metav1.GetOptions{})
		return err
	})
}

// RemoveNamespace deletes a namespace, if it is there, and waits until it is gone.
func (c *Cluster) RemoveNamespace(ctx context.Context, name string) error {
	err := c.CoreV1().Namespaces().Delete(ctx, name, metav1.DeleteOptions{})
	if err != nil && !apierrors.IsNotFound(err) {
		return err
	}
	return Wait(ctx, 2*time.Minute, "namespace "+name+" to be gone", func(ctx context.Context) error {
		_, err := c.CoreV1().Namespaces().Get(ctx, name, metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			return nil
		}
		return errors.Join(errors.New("it is still there"), err)
	})
}

// Pod returns a pod of one busybox container that runs command; change adapts it.
func Pod(namespace, name string, command []string, change func(*corev1.Pod)) *corev1.Pod {
	grace := int64(1)
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name},
		Spec: corev1.PodSpec{
			TerminationGracePeriodSeconds: &grace,
			Containers: []corev1.Container{{
				Name: "app", Image: BusyboxImage, ImagePullPolicy: corev1.PullNever, Command: command,
			}},
		},
	}
	if change != nil {
		change(pod)
	}
	return pod
}

// IPFamilies adapts a pod so that eni-sim gives it addresses of these families: IPv6 or IPv4,IPv6. Other pods get an IPv4
// address.
func IPFamilies(families string) func(*corev1.Pod) {
	return func(pod *corev1.Pod) { pod.Annotations = map[string]string{"eni-sim/ip-families": families} }
}

// Start creates a pod and waits until it runs, or has run to its end, and has an address.
func (c *Cluster) Start(ctx context.Context, pod *corev1.Pod) (*corev1.Pod, error) {
	created, err := c.CoreV1().Pods(pod.Namespace).Create(ctx, pod, metav1.CreateOptions{})
	if err != nil {
		return nil, err
	}
	return c.AwaitStarted(ctx, created.Namespace, created.Name)
}

// AwaitStarted waits until a pod has left the phase Pending and has an address, and the API server's cache knows.
func (c *Cluster) AwaitStarted(ctx context.Context, namespace, name string) (*corev1.Pod, error) {
	var pod *corev1.Pod
	err := Wait(ctx, 2*time.Minute, fmt.Sprintf("pod %s/%s to start", namespace, name), func(ctx context.Context) (err error) {
		pod, err = c.CoreV1().Pods(namespace).Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		if pod.Status.Phase == corev1.PodPending || pod.Status.PodIP == "" {
			return fmt.Errorf("phase %s, address %q", pod.Status.Phase, pod.Status.PodIP)
		}
		return c.AwaitCached(ctx, namespace, name)
	})
	return pod, err
}

// AwaitCached waits until the API server's watch cache has a pod as it is now. What removes or changes a pod goes by that cache first: while it
// is out of date, the webhook is asked twice, and the audit log keeps the first answer of the two (k8s.io/apiserver
// pkg/storage/cacher/delegator.go, Delete and GuaranteedUpdate, and pkg/audit/context.go).
func (c *Cluster) AwaitCached(ctx context.Context, namespace, name string) error {
	pods := c.CoreV1().Pods(namespace)
	// Without a version the API server answers from etcd; with one from its cache, once that has it, and after three seconds not at all, which
	// the client repeats.
	now, err := pods.Get(ctx, name, metav1.GetOptions{})
	if err == nil {
		_, err = pods.Get(ctx, name, metav1.GetOptions{ResourceVersion: now.ResourceVersion})
	}
	return err
}

// AwaitFinished waits until a pod is in the phase Succeeded.
func (c *Cluster) AwaitFinished(ctx context.Context, pod *corev1.Pod) error {
	return Wait(ctx, 2*time.Minute, fmt.Sprintf("pod %s/%s to finish", pod.Namespace, pod.Name), func(ctx context.Context) error {
		now, err := c.CoreV1().Pods(pod.Namespace).Get(ctx, pod.Name, metav1.GetOptions{})
		if err == nil && now.Status.Phase != corev1.PodSucceeded {
			err = fmt.Errorf("phase %s", now.Status.Phase)
		}
		return err
	})
}

// AwaitGone waits until the pod with this UID is no longer in the API server.
func (c *Cluster) AwaitGone(ctx context.Context, pod *corev1.Pod) error {
	return Wait(ctx, 2*time.Minute, fmt.Sprintf("pod %s/%s to be gone", pod.Namespace, pod.Name), func(ctx context.Context) error {
		return c.Gone(ctx, pod)
	})
}

// Gone returns nil if the pod with this UID is not in the API server.
func (c *Cluster) Gone(ctx context.Context, pod *corev1.Pod) error {
	now, err := c.CoreV1().Pods(pod.Namespace).Get(ctx, pod.Name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) || err == nil && now.UID != pod.UID {
		return nil
	}
	return errors.Join(errors.New("it is still there"), err)
}

// Process is a process of a pod, seen from the host.
type Process struct {
	PID                       int
	Command, State, WaitingIn string
}

// Processes finds the processes of a pod by the cgroups they are in, without the agent's code.
func Processes(pod *corev1.Pod) []Process {
	var found []Process
	files, _ := filepath.Glob("/proc/[0-9]*/cgroup")
	for _, file := range files {
		groups, err := os.ReadFile(file)
		if err != nil || !bytes.Contains(groups, []byte("/pod"+string(pod.UID)+"/")) {
			continue
		}
		dir := filepath.Dir(file)
		pid, err := strconv.Atoi(filepath.Base(dir))
		if err != nil {
			continue
		}
		status, err := os.ReadFile(filepath.Join(dir, "status"))
		if err != nil {
			continue
		}
		wchan, _ := os.ReadFile(filepath.Join(dir, "wchan"))
		p := Process{PID: pid, WaitingIn: string(wchan)}
		for line := range strings.Lines(string(status)) {
			switch key, value, _ := strings.Cut(line, ":"); key {
			case "Name":
				p.Command = strings.TrimSpace(value)
			case "State":
				p.State = strings.TrimSpace(value)[:1]
			}
		}
		found = append(found, p)
	}
	return found
}

// AwaitStuck waits until a process of the pod sleeps in a read that is never answered, in the given state: S before it is
// killed, D after. (Any process is in state D for moments, such as when its program is read from disk.)
func AwaitStuck(ctx context.Context, pod *corev1.Pod, state string) (Process, error) {
	var process Process
	err := Wait(ctx, 2*time.Minute, fmt.Sprintf("a process of pod %s to be stuck in state %s", pod.Name, state), func(context.Context) error {
		processes := Processes(pod)
		i := slices.IndexFunc(processes, func(p Process) bool { return p.WaitingIn == "request_wait_answer" && p.State == state })
		if i < 0 {
			return fmt.Errorf("it has %+v", processes)
		}
		process = processes[i]
		return nil
	})
	return process, err
}

// HasAddress says whether the network namespace that a process is in has an address, as the kernel's tables of that
// namespace show it.
func HasAddress(pid int, address string) (bool, error) {
	addr, err := netip.ParseAddr(address)
	if err != nil {
		return false, err
	}
	if addr.Is6() {
		table, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/if_inet6", pid))
		return bytes.Contains(table, fmt.Appendf(nil, "%x ", addr.As16())), err
	}
	table, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/fib_trie", pid))
	return bytes.Contains(table, []byte("|-- "+address+"\n")), err
}

// Addresses is what eni-sim, in Terway's place, believes.
type Addresses struct {
	Pods []struct {
		Pod, IPv4, IPv6 string
	}
	IPv4, IPv6 struct {
		Next string // the address that is handed out next
	}
}

// Of returns the address recorded for a pod, which is its status.podIP; empty when there is none. Where the pod has one of
// each family, that is the IPv4 address.
func (a Addresses) Of(namespace, name string) string {
	for _, record := range a.Pods {
		if record.Pod == namespace+"/"+name {
			return cmp.Or(record.IPv4, record.IPv6)
		}
	}
	return ""
}

// Addresses asks eni-sim.
func (c *Cluster) Addresses(ctx context.Context) (Addresses, error) {
	var addresses Addresses
	out, err := exec.CommandContext(ctx, c.Binary("eni-sim"), "show", "--state-dir", filepath.Join(DataDir, "eni-sim"), "-o", "json").Output()
	if err != nil {
		return addresses, fmt.Errorf("eni-sim show: %w", err)
	}
	return addresses, json.Unmarshal(out, &addresses)
}

// AwaitCollection waits until eni-sim's garbage collector has made a whole round that began after now.
func (c *Cluster) AwaitCollection(ctx context.Context) error {
	rounds := func() (int, error) {
		log, err := os.ReadFile(filepath.Join(c.dir, "logs", "eni-sim-gc.log"))
		return bytes.Count(log, []byte(`"msg":"collected"`)), err
	}
	before, err := rounds()
	if err != nil {
		return err
	}
	return Wait(ctx, 2*time.Minute, "two rounds of eni-sim's garbage collector", func(context.Context) error {
		now, err := rounds()
		if err == nil && now < before+2 {
			err = fmt.Errorf("%d so far", now-before)
		}
		return err
	})
}

// StuckFS is a file system whose server never answers a read: whoever reads its file sleeps in the kernel and cannot be
// killed, like a process that has hit a kernel bug.
type StuckFS struct {
	Dir   string
	cmd   *exec.Cmd
	ended chan error
	once  sync.Once
	err   error
}

// StartStuckFS mounts such a file system. Release lets its readers go.
func (c *Cluster) StartStuckFS(ctx context.Context, name string) (*StuckFS, error) {
	dir := filepath.Join(DataDir, "stuckfs", name)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	// Not bound to ctx: it must be ended by Release, which lets the readers go before it unmounts.
	cmd := exec.Command(c.Binary("stuckfs"), dir) //nolint:noctx // see above
	cmd.Env = append(os.Environ(), clusterMark)
	cmd.Stderr = os.Stderr
	// A test that dies takes its file system with it. The kernel sends the signal when the thread that started the
	// child ends, so that thread has to wait for it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	ready, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	s := &StuckFS{Dir: dir, cmd: cmd, ended: make(chan error, 1)}
	started := make(chan error)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			state, err := cmd.Process.Wait()
			if err == nil && !state.Success() {
				err = fmt.Errorf("stuckfs: %s", state)
			}
			s.ended <- err
		}
	}()
	if err := <-started; err != nil {
		return nil, err
	}
	line := make([]byte, 256)
	if n, err := ready.Read(line); err != nil || !strings.HasPrefix(string(line[:n]), "ready ") {
		return nil, fmt.Errorf("stuckfs did not start (it printed %q): %w", line[:n], errors.Join(err, s.Release()))
	}
	return s, ctx.Err()
}

// Release lets every reader go and unmounts. It may be called again.
func (s *StuckFS) Release() error {
	s.once.Do(func() {
		if err := s.cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
			s.err = err
			return
		}
		s.err = <-s.ended
	})
	return s.err
}

// StuckPod is a pod whose only process reads the stuck file. (By read(2): busybox's cat would use sendfile, which goes
// through the page cache, and a process that waits there can be killed.)
func (s *StuckFS) StuckPod(namespace, name string) *corev1.Pod {
	return Pod(namespace, name, []string{"dd", "if=/bug/data", "of=/dev/null"}, func(pod *corev1.Pod) {
		directory := corev1.HostPathDirectory
		pod.Spec.Volumes = []corev1.Volume{{Name: "bug", VolumeSource: corev1.VolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: s.Dir, Type: &directory}}}}
		pod.Spec.Containers[0].VolumeMounts = []corev1.VolumeMount{{Name: "bug", MountPath: "/bug", ReadOnly: true}}
	})
}
