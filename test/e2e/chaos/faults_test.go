package chaos

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/eni-guard/eni-guard/test/e2e/incident"
)

// fault is something that goes wrong. inject makes it, and returns how to mend it; what mends itself has nil.
type fault struct {
	name string
	// part is what it happens to: two faults of one part make no pair.
	part   string
	inject func(ctx context.Context) (mend func(ctx context.Context) error, err error)
	// slow ones take minutes to be over.
	slow bool
}

// network is the nftables table of these faults. `make cluster-down` removes it as well; without it, no queue delays anything.
const network = "eni-guard-test"

func (r *run) faults() []fault {
	daemon := func(name string) fault {
		return fault{name: name + " killed", part: name, inject: func(ctx context.Context) (func(context.Context) error, error) {
			return r.cluster.KillDaemon(ctx, name)
		}}
	}
	killed := func(name, part string, atMost int, args ...string) fault {
		return fault{name: name, part: part, inject: func(context.Context) (func(context.Context) error, error) {
			return nil, signal(syscall.SIGKILL, atMost, args...)
		}}
	}
	stopped := func(name, part string, args ...string) fault {
		return fault{name: name, part: part, inject: func(context.Context) (func(context.Context) error, error) {
			return func(context.Context) error { return signal(syscall.SIGCONT, 1000, args...) }, signal(syscall.SIGSTOP, 1, args...)
		}}
	}
	filtered := func(name, rule string) fault {
		return fault{name: name, part: "network", inject: func(ctx context.Context) (func(context.Context) error, error) {
			return unfilter, filter(ctx, rule)
		}}
	}
	return []fault{
		killed("agent killed", "agent", 1, "/eni-guard", "agent"),
		stopped("agent stopped, until webhooks give up on it", "agent", "/eni-guard", "agent"),
		killed("one replica of the webhook killed", "webhook", 1, "/eni-guard", "webhook"),
		killed("every replica of the webhook killed", "webhook", 1000, "/eni-guard", "webhook"),
		stopped("one replica of the webhook stopped, until the API server gives up on it", "webhook", "/eni-guard", "webhook"),
		filtered("network from webhook to agent cut", "drop"),
		// What is over the limit is sent again after 200 ms, 400 ms and so on.
		filtered("network from webhook to agent loses packets", "limit rate over 4/second burst 2 packets drop"),
		{name: "answers of the agent delayed", part: "network", inject: r.delay},
		daemon("containerd"), daemon("kubelet"), daemon("etcd"), daemon("kube-apiserver"),
		{name: "containerd stopped", part: "containerd", inject: func(context.Context) (func(context.Context) error, error) {
			runtime, err := incident.Daemon("containerd")
			if err != nil {
				return nil, err
			}
			return func(context.Context) error { return syscall.Kill(runtime.PID, syscall.SIGCONT) }, syscall.Kill(runtime.PID, syscall.SIGSTOP)
		}},
		{name: "certificates lost", part: "certificates", inject: r.lose("webhook-tls", "client-tls", "agent-tls"), slow: true},
		{name: "authority lost", part: "certificates", inject: r.lose("ca"), slow: true},
		{name: "certificates lost with their authority", part: "certificates", inject: r.lose("ca", "webhook-tls", "client-tls", "agent-tls"), slow: true},
	}
}

// signal sends a signal to at most so many processes whose command line begins with args, and fails if there is none.
func signal(s syscall.Signal, atMost int, args ...string) error {
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		return err
	}
	sent := 0
	for _, file := range files {
		content, err := os.ReadFile(file)
		if err != nil || !bytes.HasPrefix(content, []byte(strings.Join(args, "\x00")+"\x00")) || sent == atMost {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(file)))
		if err != nil {
			return err
		}
		switch err := syscall.Kill(pid, s); {
		case err == nil:
			sent++
		case !errors.Is(err, syscall.ESRCH):
			return err
		}
	}
	// One that was stopped, and that its kubelet has killed for it, needs no other signal.
	if sent == 0 && s != syscall.SIGCONT {
		return fmt.Errorf("no process %q runs", args)
	}
	return nil
}

// filter has a rule of nftables judge what pods send to the agent.
func filter(ctx context.Context, rule string) error {
	return nft(ctx, fmt.Sprintf(`table inet %s {
	chain input {
		type filter hook input priority 0
		ip saddr 10.111.1.0/24 tcp dport 9807 %s
	}
}`, network, rule))
}

// delay has what the agent sends to replicas of the webhook wait in a queue for each, which lets 2 kB a second through: nothing is lost,
// but a handshake takes more than a second, and what comes after others longer than a webhook waits. A fixed delay, for each packet alone,
// would need netem, which not every kernel has; HTB is in most.
func (r *run) delay(ctx context.Context) (mend func(context.Context) error, err error) {
	webhooks, err := r.cluster.CoreV1().Pods(incident.GuardNamespace).List(ctx, metav1.ListOptions{LabelSelector: "app.kubernetes.io/component=webhook"})
	if err != nil {
		return nil, err
	}
	var queues []netlink.Qdisc
	mend = func(ctx context.Context) error {
		err := unfilter(ctx)
		for _, queue := range queues {
			if link, failed := netlink.LinkByIndex(queue.Attrs().LinkIndex); failed == nil {
				classes, _ := netlink.ClassList(link, netlink.HANDLE_NONE)
				for _, class := range classes {
					statistics := class.Attrs().Statistics
					r.t.Logf("%d packets of the agent were sent on to %s, %d times one had to wait, %d were dropped",
						statistics.Basic.Packets, link.Attrs().Name, statistics.Queue.Overlimits, statistics.Queue.Drops)
				}
			}
			// With a pod goes its device.
			if failed := netlink.QdiscDel(queue); !errors.Is(failed, syscall.ENODEV) && !errors.Is(failed, syscall.ENOENT) {
				err = errors.Join(err, failed)
			}
		}
		return err
	}
	for _, pod := range webhooks.Items {
		ip := net.ParseIP(pod.Status.PodIP)
		if ip == nil {
			continue // it has not started yet
		}
		routes, err := netlink.RouteGet(ip)
		if err != nil {
			return mend, fmt.Errorf("the way to %s: %w", ip, err)
		}
		device, root, slow := routes[0].LinkIndex, netlink.MakeHandle(1, 0), netlink.MakeHandle(1, 1)
		// Of class 0, which is not there, is what waits for nothing.
		queue := netlink.NewHtb(netlink.QdiscAttrs{LinkIndex: device, Handle: root, Parent: netlink.HANDLE_ROOT})
		class := netlink.NewHtbClass(netlink.ClassAttrs{LinkIndex: device, Handle: slow, Parent: root}, netlink.HtbClassAttrs{Rate: 16_000})
		if err := netlink.QdiscAdd(queue); err != nil {
			return mend, fmt.Errorf("a queue for %s: %w", ip, err)
		}
		queues = append(queues, queue)
		if err := netlink.ClassAdd(class); err != nil {
			return mend, fmt.Errorf("a slow class in the queue for %s: %w", ip, err)
		}
	}
	return mend, nft(ctx, fmt.Sprintf(`table inet %s {
	chain output {
		type filter hook output priority 0
		ip daddr 10.111.1.0/24 tcp sport 9807 meta priority set 1:1
	}
}`, network))
}

func unfilter(ctx context.Context) error {
	return nft(ctx, fmt.Sprintf("table inet %s\ndelete table inet %s", network, network))
}

func nft(ctx context.Context, commands string) error {
	cmd := exec.CommandContext(ctx, "nft", "-f", "-")
	cmd.Stdin = strings.NewReader(commands)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("nft: %w: %s", err, out)
	}
	return nil
}

// lose deletes Secrets of the guard, which it must make anew.
func (r *run) lose(secrets ...string) func(ctx context.Context) (func(context.Context) error, error) {
	return func(ctx context.Context) (func(context.Context) error, error) {
		var err error
		for _, secret := range secrets {
			err = errors.Join(err, r.cluster.CoreV1().Secrets(incident.GuardNamespace).Delete(ctx, "eni-guard-"+secret, metav1.DeleteOptions{}))
		}
		return nil, err
	}
}

// validity sets how long certificates are valid.
func (r *run) validity(ctx context.Context, authority, certificate, overlap string) error {
	out, err := exec.CommandContext(ctx, r.cluster.Binary("helm"), "--kubeconfig", r.cluster.Kubeconfig(), "--namespace", incident.GuardNamespace,
		"upgrade", "eni-guard", filepath.Join(repo, "charts/eni-guard"), "--reuse-values", "--wait", "--timeout", "3m",
		"--set", "certificates.authorityValidity="+authority, "--set", "certificates.validity="+certificate, "--set", "certificates.overlap="+overlap).CombinedOutput()
	if err != nil {
		return fmt.Errorf("helm upgrade: %w\n%s", err, out)
	}
	return nil
}

// rotates has certificates expire within a minute and a half, and their authority within three times that, until the run ends. The
// function that it returns says how many certificates and authorities were made meanwhile.
func (r *run) rotates(ctx context.Context) (made func() (certificates, authorities int)) {
	if err := r.validity(ctx, "270s", "90s", "30s"); err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() {
		if err := r.validity(context.Background(), "26280h", "2160h", "1h"); err != nil {
			r.t.Error(err)
		}
	})
	watching, stop := context.WithCancel(ctx)
	seen := map[string]map[string]bool{"tls.crt": {}, "signing.crt": {}}
	var done sync.WaitGroup
	done.Go(func() {
		for watching.Err() == nil {
			// While the API server is away, nothing is made.
			if list, err := r.cluster.CoreV1().Secrets(incident.GuardNamespace).List(watching, metav1.ListOptions{}); err == nil {
				for _, secret := range list.Items {
					for key, values := range seen {
						if value := secret.Data[key]; len(value) > 0 {
							values[string(value)] = true
						}
					}
				}
			}
			pause(watching, time.Second)
		}
	})
	return func() (int, int) {
		stop()
		done.Wait()
		return len(seen["tls.crt"]) - 3, len(seen["signing.crt"]) - 1
	}
}

// breakThings injects one fault after the other, and then pairs of them, until ctx ends. What it has begun it mends, with
// what is left of all.
func (r *run) breakThings(ctx, all context.Context, random *rand.Rand) error {
	faults := r.faults()
	if !r.long() {
		faults = slices.DeleteFunc(faults, func(f fault) bool { return f.slow })
	}
	random.Shuffle(len(faults), func(i, j int) { faults[i], faults[j] = faults[j], faults[i] })
	for _, f := range faults {
		if ctx.Err() != nil {
			break
		}
		if err := r.breakAndMend(all, random, f); err != nil {
			return err
		}
	}
	for ctx.Err() == nil {
		first, second := faults[random.IntN(len(faults))], faults[random.IntN(len(faults))]
		if first.part == second.part || first.slow || second.slow {
			continue
		}
		if err := r.breakAndMend(all, random, first, second); err != nil {
			return err
		}
	}
	return nil
}

// faultLimit bounds how long it may take to make a fault, and to take it back: the longest wait of either is a minute.
const faultLimit = 2 * time.Minute

// within does something that must not take longer than faultLimit, even if it does not look at its context.
func within(ctx context.Context, what string, do func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, faultLimit)
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- do(ctx) }()
	select {
	case err := <-done:
		if err != nil {
			return fmt.Errorf("%s: %w", what, err)
		}
		return nil
	case <-ctx.Done():
		return fmt.Errorf("%s: not done after %s", what, faultLimit)
	}
}

// breakAndMend injects faults at the same time, mends them after some seconds, and waits until the guard works again by itself; that
// it does not, or that a fault could not be made or taken back, is the error: what comes after that would prove nothing.
func (r *run) breakAndMend(ctx context.Context, random *rand.Rand, faults ...fault) error {
	var names []string
	var mends []func(context.Context) error
	begin := time.Now()
	var injecting error
	for _, f := range faults {
		names = append(names, f.name)
		injecting = errors.Join(injecting, within(ctx, "making the fault "+f.name, func(ctx context.Context) error {
			mend, err := f.inject(ctx)
			if mend != nil {
				mends = append(mends, func(all context.Context) error { return within(all, "taking back the fault "+f.name, mend) })
			}
			return err
		}))
	}
	name := strings.Join(names, " + ")
	// Long enough for an agent that is stopped to be given up on (5 s), and for a webhook (10 s).
	pause(ctx, time.Duration(3000+random.IntN(9000))*time.Millisecond)
	var wait sync.WaitGroup
	failed := make([]error, len(mends))
	for i, mend := range mends {
		// At the same time, because the kubelet waits for containerd.
		wait.Go(func() { failed[i] = mend(ctx) })
	}
	wait.Wait()
	if err := errors.Join(append(failed, injecting)...); err != nil {
		return err
	}
	mended := time.Now()
	if err := r.works(ctx); err != nil {
		return fmt.Errorf("after %q: %w", name, err)
	}
	end := time.Now()
	r.mu.Lock()
	r.outages = append(r.outages, outage{name: name, begin: begin, end: end})
	r.mu.Unlock()
	r.t.Logf("%s for %s; the guard worked again %s after that", name, mended.Sub(begin).Round(time.Second), end.Sub(mended).Round(time.Second))
	return nil
}

// outage is a time in which something did not work.
type outage struct {
	name       string
	begin, end time.Time
}

// works waits until the guard is ready, and answers what is true, several times in a row.
func (r *run) works(ctx context.Context) error {
	return incident.Wait(ctx, 4*time.Minute, "the guard to work again by itself", func(ctx context.Context) error {
		webhook, err := r.cluster.AppsV1().Deployments(incident.GuardNamespace).Get(ctx, "eni-guard-webhook", metav1.GetOptions{})
		if err != nil {
			return err
		}
		agent, err := r.cluster.AppsV1().DaemonSets(incident.GuardNamespace).Get(ctx, "eni-guard-agent", metav1.GetOptions{})
		if err != nil {
			return err
		}
		if s := webhook.Status; s.ReadyReplicas != *webhook.Spec.Replicas || agent.Status.NumberReady != 1 {
			return fmt.Errorf("%d replicas of the webhook and %d agents are ready", s.ReadyReplicas, agent.Status.NumberReady)
		}
		for range 3 {
			err := r.intern.CoreV1().Pods(r.canary.Namespace).Delete(ctx, r.canary.Name, metav1.DeleteOptions{GracePeriodSeconds: new(int64(0)), DryRun: []string{metav1.DryRunAll}})
			if err == nil {
				return errors.New("a forced delete of a running pod would go through")
			}
			if !strings.Contains(err.Error(), "denied the request: pod "+r.canary.Namespace+"/canary is still alive on node node-1") {
				return err
			}
		}
		return nil
	})
}

// pause waits for a time, or until ctx ends.
func pause(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}
