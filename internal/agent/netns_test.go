package agent

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/moby/sys/mountinfo"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/eni-guard/eni-guard/internal/sandbox"
)

func requireRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("this test makes network namespaces: run it as root")
	}
}

var testAddress = netip.MustParseAddr("10.113.0.5")

// away calls f on a thread that may change its namespaces, and takes the thread back afterwards: it could be the main
// thread, which Go never ends.
func away(t *testing.T, f func() error) {
	t.Helper()
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		var errs []error
		var back []func() error
		for kind, flag := range map[string]int{"net": unix.CLONE_NEWNET, "mnt": unix.CLONE_NEWNS} {
			fd, err := unix.Open("/proc/thread-self/ns/"+kind, unix.O_RDONLY|unix.O_CLOEXEC, 0)
			errs = append(errs, err)
			back = append(back, func() error { return errors.Join(unix.Setns(fd, flag), unix.Close(fd)) })
		}
		// Threads share their working directory, and one that does cannot change its mounts, nor come back.
		err := errors.Join(append(errs, unix.Unshare(unix.CLONE_FS))...)
		if err == nil {
			err = f()
		}
		for _, restore := range back {
			err = errors.Join(err, restore())
		}
		done <- err // locked for good: but for the main thread, it ends here
	}()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

// addAddress gives the loopback device of the calling thread's network namespace an address.
func addAddress(address netip.Addr) error {
	link, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	addr, err := netlink.ParseAddr(fmt.Sprintf("%s/%d", address, address.BitLen()))
	if err != nil {
		return err
	}
	return errors.Join(netlink.LinkSetUp(link), netlink.AddrAdd(link, addr))
}

// namedNamespace makes a network namespace in /run/netns that has testAddress, as containerd does for a sandbox.
func namedNamespace(t *testing.T, name string) (closeIt func()) {
	t.Helper()
	requireRoot(t)
	away(t, func() error {
		ns, err := netns.NewNamed(name)
		if err == nil {
			err = errors.Join(addAddress(testAddress), ns.Close())
		}
		return err
	})
	closed := false
	closeIt = func() {
		if !closed {
			closed = true
			if err := netns.DeleteNamed(name); err != nil {
				t.Error(err)
			}
		}
	}
	t.Cleanup(func() {
		closeIt()
		_ = os.Remove(netnsDir) // only if it is empty
	})
	return closeIt
}

// look is what the probes of processes and namespaces see of the real host.
func look(t *testing.T, how depth) nodeView {
	t.Helper()
	v, processErr, netnsErr := realNode.view(t.Context(), how)
	if err := errors.Join(processErr, netnsErr); err != nil {
		t.Fatal(err)
	}
	return v
}

func TestANamespaceThatOnlyAMountKeeps(t *testing.T) {
	name := fmt.Sprintf("eni-guard-test-%d", os.Getpid())
	closeIt := namedNamespace(t, name)
	path := filepath.Join(netnsDir, name)
	var n netNamespace
	for _, how := range []depth{quick, thorough} {
		v := look(t, how)
		var found bool
		if n, found = v.namespace(v.mountedAt(path)); !found || n.name() != path || len(n.tasks) > 0 {
			t.Fatalf("got %+v", n)
		}
		if a, has := n.address(testAddress); !has || a.device != "lo" {
			t.Errorf("got addresses %v", n.addresses)
		}
	}
	closeIt()
	if id := look(t, thorough).mountedAt(path); id != "" {
		t.Errorf("closed: got %s", id)
	}
	// What was mounted when the mount table was read, and is not when it is entered.
	seen := []netNamespace{n}
	if err := realNode.readAddresses(t.Context(), seen); err != nil || !gone(seen[0].unread) {
		t.Errorf("closed while it was read: got %v, %v", err, seen[0].unread)
	}
	if err := os.MkdirAll(netnsDir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	defer os.Remove(path)
	for _, how := range []depth{quick, thorough} {
		if id := look(t, how).mountedAt(path); id != "" {
			t.Errorf("closed, with the file left behind: got %s", id)
		}
	}
	if err := realNode.readAddresses(t.Context(), seen); err != nil || !gone(seen[0].unread) {
		t.Errorf("closed while it was read, with the file left behind: got %v, %v", err, seen[0].unread)
	}
}

// A namespace over which something else is mounted has not ended: its path leads elsewhere, and so nothing is known of it.
func TestACoveredNamespaceIsNotGone(t *testing.T) {
	lower := fmt.Sprintf("eni-guard-test-lower-%d", os.Getpid())
	upper := fmt.Sprintf("eni-guard-test-upper-%d", os.Getpid())
	namedNamespace(t, lower)
	namedNamespace(t, upper)
	path := filepath.Join(netnsDir, lower)
	id := look(t, thorough).mountedAt(path)
	if err := unix.Mount(filepath.Join(netnsDir, upper), path, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Unmount(path, 0); err != nil {
			t.Error(err)
		}
	}()
	v, _, err := realNode.view(t.Context(), thorough)
	if n, found := v.namespace(id); !found || err == nil || !strings.Contains(err.Error(), "something else covers it") {
		t.Errorf("got %+v (%v)", n, err)
	}
	if above := v.mountedAt(filepath.Join(netnsDir, upper)); above == "" || strings.Contains(err.Error(), upper) {
		t.Errorf("what covers it: got %q (%v)", above, err)
	}
}

// What was covered when the agent's container was given the node's mounts is in the table of process 1 alone, and nowhere to be entered.
func TestANamespaceThatWasCoveredWhenTheAgentStarted(t *testing.T) {
	const path, id = "/run/netns/cni-0f4a8ed8-0f5c-4b3a-9d3e-0123456789ab", "net:[7]"
	h := lookable(t)
	if err := os.Remove(filepath.Join(h.Proc, "1/ns/mnt")); err != nil {
		t.Fatal(err)
	}
	h.symlink("1/ns/mnt", "mnt:[2]") // another one than this process's
	h.write(h.Proc, "thread-self/mountinfo", "36 35 0:5 / /run/netns rw master:1 - tmpfs tmpfs rw\n")
	covered := fmt.Sprintf("37 35 0:4 %s %s rw shared:1 - nsfs nsfs rw\n", id, path)
	h.write(h.Proc, "1/mountinfo", covered+"38 35 0:4 net:[8] /srv/netns/x rw shared:1 - nsfs nsfs rw\n")
	i := newInspector("node-a", h.Host, fakeRuntime(knowsNothing))
	const failure = "reading the addresses in network namespace " + path + ": it is mounted at " + path + ", but something else covers it, or did when the agent started"
	report := i.Inspect(t.Context(), podQuery)
	if report.Verdict() != sandbox.Unknown || !slices.ContainsFunc(report.Failures(), func(f string) bool { return strings.HasSuffix(f, failure) }) {
		t.Errorf("got %+v", report)
	}
	// Unless it has ended meanwhile.
	h.write(h.Proc, "1/mountinfo", "")
	if v, _, err := h.view(t.Context(), thorough); err != nil || len(v.namespaces) > 0 {
		t.Errorf("got %+v (%v)", v, err)
	}
	// Without the table of process 1, none of it can be known.
	if err := os.Remove(filepath.Join(h.Proc, "1/mountinfo")); err != nil {
		t.Fatal(err)
	}
	if _, _, err := h.view(t.Context(), thorough); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("got %v", err)
	}
}

// Between the looks at a namespace, what was in it has ended, and something else is mounted over it, or it has been mounted.
func TestWhatIsInANamespaceEndsMeanwhile(t *testing.T) {
	const path, id = "/run/netns/eni-guard-test-covered", "net:[7]"
	h := lookable(t)
	h.write(h.Proc, "thread-self/mountinfo", fmt.Sprintf("36 35 0:4 %s %s rw shared:1 - nsfs nsfs rw\n", id, path))
	for name, seen := range map[string]netNamespace{
		"mounted, with a process": {id: id, paths: []string{path}, tasks: leaders([]int{999}), unread: fs.ErrNotExist},
		"mounted":                 {id: id, paths: []string{path}, unread: fs.ErrNotExist},
		"with a process":          {id: id, tasks: leaders([]int{999})},
	} {
		left, processErr, err := h.follow(t.Context(), []netNamespace{seen})
		if len(left) != 1 || left[0].unread == nil || !strings.Contains(left[0].unread.Error(), coveredNamespace) || processErr != nil || err != nil {
			t.Errorf("%s: got %+v, %v, %v", name, left, processErr, err)
		}
	}
	mounted := runtimesNamespace(t)
	there := lookable(t, mounted)
	seen, err := there.mountedNamespaces()
	if err != nil {
		t.Fatal(err)
	}
	for id := range seen {
		left, processErr, err := there.follow(t.Context(), []netNamespace{{id: id, tasks: leaders([]int{999})}})
		if len(left) != 1 || left[0].name() != mounted || len(left[0].addresses) != 1 || processErr != nil || err != nil {
			t.Errorf("mounted meanwhile: got %+v, %v, %v", left, processErr, err)
		}
	}
	ended := []netNamespace{{id: "net:[8]", tasks: leaders([]int{999})}}
	if left, processErr, err := h.follow(t.Context(), ended); len(left) > 0 || processErr != nil || err != nil {
		t.Errorf("ended: got %+v, %v, %v", left, processErr, err)
	}
	if err := os.Remove(filepath.Join(h.Proc, "thread-self/mountinfo")); err != nil {
		t.Fatal(err)
	}
	if _, _, err := h.follow(t.Context(), ended); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("when the mounts cannot be read: got %v", err)
	}
}

// deadMount mounts a FUSE file system over a file or a directory whose server never says a word: whoever asks it for anything waits until
// its end, or that of the test.
func deadMount(t *testing.T, file string) (end func()) {
	t.Helper()
	var stat unix.Stat_t
	if err := unix.Stat(file, &stat); err != nil {
		t.Fatal(err)
	}
	server, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	// Without its server, all who wait get an error.
	end = sync.OnceFunc(func() { _ = errors.Join(unix.Unmount(file, unix.MNT_DETACH), unix.Close(server)) })
	t.Cleanup(end)
	if err := unix.Mount("eni-guard-test", file, "fuse", 0, fmt.Sprintf("fd=%d,rootmode=%o,user_id=0,group_id=0", server, stat.Mode&unix.S_IFMT)); err != nil {
		t.Fatal(err)
	}
	return end
}

// A dead mount over a namespace neither hangs the agent, nor lets the namespace look closed.
func TestADeadMountOverANamespace(t *testing.T) {
	name := fmt.Sprintf("eni-guard-test-dead-%d", os.Getpid())
	namedNamespace(t, name)
	path := filepath.Join(netnsDir, name)
	id := look(t, thorough).mountedAt(path)
	deadMount(t, path)
	i := newInspector("node-a", realNode, fakeRuntime(knowsNothing))
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if v, processErr, netnsErr := i.view(ctx, quick); v.mountedAt(path) != "" || processErr != nil || netnsErr != nil {
		t.Errorf("a quick look: got %+v, %v, %v", v, processErr, netnsErr)
	}
	v, processErr, netnsErr := i.view(ctx, thorough)
	if _, found := v.namespace(id); !found || processErr != nil || netnsErr == nil || !strings.Contains(netnsErr.Error(), "mounted at "+path+", but something else covers it") {
		t.Errorf("got %+v, %v, %v", v, processErr, netnsErr)
	}
}

// inNamespace starts a process in a network namespace of its own, with addresses, and returns the namespace's id.
func inNamespace(t *testing.T, cmd *exec.Cmd, addresses ...netip.Addr) string {
	t.Helper()
	requireRoot(t)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	file := realNode.task(cmd.Process.Pid, cmd.Process.Pid, "ns/net")
	id, err := os.Readlink(file)
	if err != nil {
		t.Fatal(err)
	}
	away(t, func() error {
		ns, err := netns.GetFromPath(file)
		if err != nil {
			return err
		}
		err = errors.Join(netns.Set(ns), ns.Close())
		for _, address := range addresses {
			err = errors.Join(err, addAddress(address))
		}
		return err
	})
	return id
}

func TestANamespaceThatOnlyAProcessKeeps(t *testing.T) {
	ipv6 := netip.MustParseAddr("fd00:113::5")
	cmd := exec.CommandContext(t.Context(), "sleep", "600")
	id := inNamespace(t, cmd, testAddress, ipv6)
	n, found := look(t, thorough).namespace(id)
	if !found || n.name() != id || !reflect.DeepEqual(n.tasks, leaders([]int{cmd.Process.Pid})) {
		t.Fatalf("got %+v", n)
	}
	if want := []assignment{{testAddress, "lo"}, {ipv6, "lo"}}; !reflect.DeepEqual(n.addresses, want) {
		t.Errorf("got %v, want %v", n.addresses, want)
	}
	// The kernel names the devices of IPv4 addresses only; and link-local ones mean nothing elsewhere.
	other := exec.CommandContext(t.Context(), "sleep", "600")
	alone := inNamespace(t, other)
	pair := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "eth0"}, PeerName: "peer"}
	away(t, func() error {
		ns, err := netns.GetFromPid(other.Process.Pid)
		if err == nil {
			err = errors.Join(netns.Set(ns), ns.Close(), netlink.LinkAdd(pair))
		}
		for _, address := range []netip.Addr{ipv6, netip.MustParseAddr("fe80::5")} {
			err = errors.Join(err, netlink.AddrAdd(pair, &netlink.Addr{IPNet: netlink.NewIPNet(address.AsSlice())}))
		}
		return err
	})
	if n, _ := look(t, thorough).namespace(alone); !slices.Equal(n.addresses, []assignment{{ipv6, "eth0"}}) {
		t.Errorf("of IPv6 alone: got %v", n.addresses)
	}
	// A process that has ended since takes its namespace along: that is no error, and no namespace.
	if err := errors.Join(cmd.Process.Kill(), ignoreExit(cmd.Wait())); err != nil {
		t.Fatal(err)
	}
	// Nor is one, if its number has been given to another process.
	for name, tasks := range map[string][]task{"after its end": n.tasks, "with its number reused": leaders([]int{os.Getpid()})} {
		seen := []netNamespace{{id: id, tasks: tasks}}
		if err := realNode.readAddresses(t.Context(), seen); err != nil || !gone(seen[0].unread) {
			t.Errorf("%s: got %+v (%v)", name, seen, err)
		}
	}
}

// What was in a namespace when the processes were listed has ended when it is to be followed there, and has left a child in it.
func TestANamespaceThatIsHandedOnMeanwhile(t *testing.T) {
	id := inNamespace(t, exec.CommandContext(t.Context(), "sleep", "600"), testAddress)
	ended := exec.CommandContext(t.Context(), "true")
	if err := ended.Run(); err != nil {
		t.Fatal(err)
	}
	listed := func() []netNamespace { return []netNamespace{{id: id, tasks: leaders([]int{ended.Process.Pid})}} }
	quiet := exec.CommandContext(t.Context(), "sleep", "600")
	beside := netNamespace{id: inNamespace(t, quiet), tasks: leaders([]int{quiet.Process.Pid})}
	left, processErr, err := realNode.readOccupied(t.Context(), append(listed(), beside))
	if len(left) != 2 || left[0].id != beside.id || left[1].id != id || !slices.Equal(left[1].addresses, []assignment{{testAddress, "lo"}}) || left[1].unread != nil || processErr != nil || err != nil {
		t.Errorf("got %+v, %v, %v", left, processErr, err)
	}
	// The next one too, and so on.
	elusive := lookable(t)
	elusive.symlink(fmt.Sprintf("%d/ns/net", pid), id)
	elusive.write(elusive.Proc, fmt.Sprintf("%d/task/comm", pid), "")
	v, processErr, err := elusive.view(t.Context(), thorough)
	if n, found := v.namespace(id); !found || processErr != nil || err == nil || !strings.Contains(err.Error(), id+": what is in it ends before it can be followed there") {
		t.Errorf("got %+v, %v, %v", n, processErr, err)
	}
	if left, processErr, err := lookable(t).readOccupied(t.Context(), listed()); len(left) > 0 || processErr != nil || err != nil {
		t.Errorf("with nothing in it any more: got %+v, %v, %v", left, processErr, err)
	}
}

// A thread can go into a namespace alone. Such a thread, forgotten by a daemon, keeps it and the address in it.
func TestANamespaceThatOnlyAThreadKeeps(t *testing.T) {
	requireRoot(t)
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run", "^TestHelperThread$")
	cmd.Env = append(os.Environ(), helperThread+"=1")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	id, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	id = strings.TrimSpace(id)
	n, found := look(t, thorough).namespace(id)
	if !found || len(n.tasks) != 1 || n.tasks[0].pid != cmd.Process.Pid || n.tasks[0].tid == cmd.Process.Pid {
		t.Fatalf("got %+v", n)
	}
	described, err := realNode.describe(t.Context(), n.tasks)
	if err != nil || len(described) != 1 || described[0].PID != cmd.Process.Pid || described[0].netns != id {
		t.Errorf("described as %+v (%v)", described, err)
	}
}

const helperThread = "ENI_GUARD_HELPER_THREAD"

// TestHelperThread is the process of the test above: it prints where one of its threads is.
func TestHelperThread(*testing.T) {
	if os.Getenv(helperThread) == "" {
		return
	}
	ids := make(chan string)
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			go func() { // the main thread is taken: another one will do
				runtime.LockOSThread()
				ids <- unshareNetns()
				select {}
			}()
			select {}
		}
		ids <- unshareNetns()
		select {}
	}()
	fmt.Println(<-ids)
	_, _ = io.Copy(io.Discard, os.Stdin) // until the test has ended
}

func unshareNetns() string {
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return err.Error()
	}
	id, _ := os.Readlink("/proc/thread-self/ns/net")
	return id
}

func ignoreExit(err error) error {
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return nil
	}
	return err
}

// A thread of the agent that stayed in a pod's namespace would keep the address alive, unseen by everybody.
func TestTheThreadThatEntersNamespacesComesBack(t *testing.T) {
	name := fmt.Sprintf("eni-guard-test-back-%d", os.Getpid())
	namedNamespace(t, name)
	path := filepath.Join(netnsDir, name)
	v := look(t, thorough)
	n, _ := v.namespace(v.mountedAt(path))
	runtime.LockOSThread()
	before, err := os.Readlink("/proc/thread-self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	n.addresses = nil
	namespaces := []netNamespace{n}
	back, err := realNode.visit(t.Context(), namespaces)
	if err != nil {
		t.Fatal(err)
	}
	after, err := os.Readlink("/proc/thread-self/ns/net")
	if err != nil || !back || after != before {
		t.Fatalf("the thread is in %s, came from %s, and is called back: %v (%v)", after, before, back, err)
	}
	runtime.UnlockOSThread()
	if _, has := namespaces[0].address(testAddress); !has {
		t.Errorf("it has not been in the namespace: it lists %v", namespaces[0].addresses)
	}
}

// Where the runtime names a path that cannot be looked at, not finding it mounted proves nothing.
func TestNamespacesOfSandboxes(t *testing.T) {
	v := nodeView{host: "net:[1]", namespaces: []netNamespace{{id: "net:[7]", paths: []string{"/run/netns/cni-1"}}}}
	h := newRecordedHost(t)
	h.symlink("8/ns/net", "net:[8]")
	h.symlink("9/ns/net", "net:[1]")
	for _, test := range []struct {
		name, path, id, want string
	}{
		{"mounted", "/run/netns/cni-1", "net:[7]", ""},
		{"not mounted any more", "/run/netns/cni-2", "", ""},
		{"of a process", "/proc/8/ns/net", "net:[8]", ""},
		{"of a process in the host's namespace", "/proc/9/ns/net", "", ""},
		{"of a process that is gone", "/proc/10/ns/net", "", ""},
		{"in another directory", "/run/docker/netns/x", "", "network namespace /run/docker/netns/x of sandbox s1 is not below /run/netns"},
		{"none", "", "", ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			id, err := h.sandboxNamespace(v, podSandbox{id: "s1", details: details{netnsPath: test.path}})
			if id != test.id || (err == nil) != (test.want == "") || err != nil && !strings.Contains(err.Error(), test.want) {
				t.Errorf("got %q, %v", id, err)
			}
		})
	}
}

// The host's own network namespace is no pod's.
func TestTheHostsOwnNamespaceIsLeftOut(t *testing.T) {
	v := look(t, thorough)
	own, err := os.Readlink("/proc/self/ns/net")
	if err != nil || own != v.host {
		t.Fatalf("this test must run in the host's network namespace (%v)", err)
	}
	// Somebody has mounted it where runtimes have theirs.
	path := filepath.Join(netnsDir, fmt.Sprintf("eni-guard-test-host-%d", os.Getpid()))
	mountNamespace(t, "/proc/self/ns/net", path)
	for _, how := range []depth{quick, thorough} {
		v := look(t, how)
		if n, found := v.namespace(own); found || v.mountedAt(path) != "" {
			t.Errorf("got %+v", n)
		}
	}
}

// mountNamespace mounts a namespace at a path of its own, until the end of the test.
func mountNamespace(t *testing.T, namespace, path string) {
	t.Helper()
	requireRoot(t)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.Remove(path) })
	if err := unix.Mount(namespace, path, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(path, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
}

// What is mounted on a node beside network namespaces is of no matter: runtimes keep other namespaces the same way.
func TestMountedNamespaces(t *testing.T) {
	h := lookable(t)
	h.write(h.Proc, "thread-self/mountinfo", strings.Join([]string{
		"36 35 0:4 net:[7] /run/netns/a rw shared:1 - nsfs nsfs rw",
		"37 35 0:4 net:[7] /run/netns/b rw shared:1 - nsfs nsfs rw",
		"38 36 0:4 net:[7] /run/netns/a rw shared:1 - nsfs nsfs rw", // once more over itself
		"39 35 0:4 net:[8] /run/netns/c rw shared:1 - nsfs nsfs rw",
		"40 35 0:4 ipc:[9] /run/ipcns/d rw shared:1 - nsfs nsfs rw",
		"41 35 0:5 net:[10] /srv/e rw shared:1 - tmpfs tmpfs rw", // a directory of that name
		"42 35 0:5 / /run rw shared:1 - tmpfs tmpfs rw",
	}, "\n")+"\n")
	got, err := h.mountedNamespaces()
	if want := map[string][]string{"net:[7]": {"/run/netns/a", "/run/netns/b"}, "net:[8]": {"/run/netns/c"}}; err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("got %v, want %v (%v)", got, want, err)
	}
}

// Between the reading of the mount table and the entering, a namespace has lost its mount; a process is in it still.
func TestANamespaceThatLosesItsMountMeanwhile(t *testing.T) {
	cmd := exec.CommandContext(t.Context(), "sleep", "600")
	id := inNamespace(t, cmd, testAddress)
	h := lookable(t)
	h.write(h.Proc, "thread-self/mountinfo", fmt.Sprintf("36 35 0:4 %s /run/netns/eni-guard-test-lost rw shared:1 - nsfs nsfs rw\n", id))
	h.symlink(fmt.Sprintf("%d/ns/net", pid), id)
	h.symlink(fmt.Sprintf("%d/task/%d/ns/net", pid, pid), realNode.task(cmd.Process.Pid, cmd.Process.Pid, "ns/net"))
	v, processErr, netnsErr := h.view(t.Context(), thorough)
	n, found := v.namespace(id)
	if !found || !slices.Equal(n.addresses, []assignment{{testAddress, "lo"}}) || len(v.namespaces) != 1 || processErr != nil || netnsErr != nil {
		t.Errorf("got %+v, %v, %v", v, processErr, netnsErr)
	}
}

// In another mount namespace, as in a container, an open namespace would look closed unless the host's mounts arrive.
func TestMountsThatDoNotFollowTheHostProveNothing(t *testing.T) {
	requireRoot(t)
	name := fmt.Sprintf("eni-guard-test-private-%d", os.Getpid())
	namedNamespace(t, name)
	var mounted map[string][]string
	var refusal error
	away(t, func() error {
		err := errors.Join(unix.Unshare(unix.CLONE_NEWNS), unix.Mount("", "/", "", unix.MS_PRIVATE|unix.MS_REC, ""))
		if err == nil {
			mounted, refusal = realNode.mountedNamespaces()
		}
		return err
	})
	if refusal == nil || !strings.Contains(refusal.Error(), "mountPropagation: HostToContainer") {
		t.Errorf("got %v (%v)", mounted, refusal)
	}
	// As in the agent's container.
	away(t, func() error {
		err := errors.Join(
			unix.Unshare(unix.CLONE_NEWNS),
			unix.Mount("", "/", "", unix.MS_PRIVATE|unix.MS_REC, ""),
			unix.Mount(netnsDir, netnsDir, "", unix.MS_BIND|unix.MS_REC, ""),
			unix.Mount("", netnsDir, "", unix.MS_SHARED, ""),
		)
		if err == nil {
			mounted, err = realNode.mountedNamespaces()
		}
		return err
	})
	if paths := slices.Concat(slices.Collect(maps.Values(mounted))...); !slices.Contains(paths, filepath.Join(netnsDir, name)) {
		t.Errorf("with a directory that follows the host's: got %v", mounted)
	}
	// As in the container of an agent that came when something else was mounted over the host's directory.
	away(t, func() error {
		err := errors.Join(unix.Unshare(unix.CLONE_NEWNS), unix.Mount("", "/", "", unix.MS_PRIVATE|unix.MS_REC, ""))
		if err != nil {
			return err
		}
		if err := errors.Join(
			unix.Unmount(filepath.Join(netnsDir, name), 0),
			unix.Mount("tmpfs", netnsDir, "tmpfs", 0, ""),
			unix.Mount("", netnsDir, "", unix.MS_SHARED, ""),
		); err != nil {
			return err
		}
		mounted, err = realNode.mountedNamespaces()
		return err
	})
	if paths := slices.Concat(slices.Collect(maps.Values(mounted))...); !slices.Contains(paths, filepath.Join(netnsDir, name)) {
		t.Errorf("with a directory that was covered on the host: got %v", mounted)
	}
}

func TestReceivesNamespaces(t *testing.T) {
	for _, test := range []struct {
		mount mountinfo.Info
		want  bool
	}{
		{mountinfo.Info{Mountpoint: "/run/netns", Optional: "master:1"}, true},
		{mountinfo.Info{Mountpoint: "/run/netns", Optional: "shared:4 master:1"}, true},
		{mountinfo.Info{Mountpoint: "/run/netns", Optional: "shared:4"}, true},
		{mountinfo.Info{Mountpoint: "/run/netns", Optional: ""}, false},
		{mountinfo.Info{Mountpoint: "/run/netns", Optional: "unbindable"}, false},
		{mountinfo.Info{Mountpoint: "/run/netns/cni-1", Optional: "master:1"}, false},
		{mountinfo.Info{Mountpoint: "/run", Optional: "master:1"}, false},
	} {
		if got := receivesNamespaces(&test.mount); got != test.want {
			t.Errorf("%+v: got %v", test.mount, got)
		}
	}
}

// dumped is one message of the kernel's list of addresses.
func dumped(kind, flags uint16, data ...byte) []byte {
	message := binary.NativeEndian.AppendUint32(nil, uint32(unix.SizeofNlMsghdr+len(data)))
	message = binary.NativeEndian.AppendUint16(message, kind)
	message = binary.NativeEndian.AppendUint16(message, flags)
	message = append(message, make([]byte, 8)...) // sequence number and port
	return append(message, data...)
}

// dumpedAddress is 10.113.0.5 on eth0, as the kernel tells it.
func dumpedAddress(flags uint16) []byte {
	return dumpedOnEth0(flags, attribute(unix.IFA_LOCAL, testAddress.AsSlice()...))
}

// dumpedOnEth0 is an address on eth0 with some attributes.
func dumpedOnEth0(flags uint16, attributes ...[]byte) []byte {
	ifaddrmsg := []byte{unix.AF_INET, 32, 0, 0, 2, 0, 0, 0}
	return dumped(unix.RTM_NEWADDR, flags, slices.Concat(ifaddrmsg, slices.Concat(attributes...), attribute(unix.IFA_LABEL, []byte("eth0\x00\x00\x00\x00")...))...)
}

// attribute is one of a message; the kernel pads its value to four bytes.
func attribute(kind uint16, value ...byte) []byte {
	head := binary.NativeEndian.AppendUint16(nil, uint16(unix.SizeofRtAttr+len(value)))
	return append(binary.NativeEndian.AppendUint16(head, kind), append(value, make([]byte, -len(value)&3)...)...)
}

// What the kernel has not told in full is no answer.
func TestReadDump(t *testing.T) {
	done := dumped(unix.NLMSG_DONE, unix.NLM_F_MULTI, 0, 0, 0, 0)
	one := []assignment{{testAddress, "eth0"}}
	const interrupted = unix.NLM_F_MULTI | unix.NLM_F_DUMP_INTR
	for _, test := range []struct {
		name string
		part []byte
		want []assignment
		done bool
		err  error
	}{
		{"one part of several", dumpedAddress(unix.NLM_F_MULTI), one, false, nil},
		{"the last one", slices.Concat(dumpedAddress(unix.NLM_F_MULTI), done), one, true, nil},
		{"nothing", done, nil, true, nil},
		{"something else", slices.Concat(dumped(unix.RTM_NEWLINK, unix.NLM_F_MULTI, make([]byte, 16)...), done), nil, true, nil},
		{"one of two ends, the other one's first", dumpedOnEth0(unix.NLM_F_MULTI, attribute(unix.IFA_ADDRESS, 10, 113, 0, 6), attribute(unix.IFA_LOCAL, testAddress.AsSlice()...)), one, false, nil},
		{"one of two ends, the other one's last", dumpedOnEth0(unix.NLM_F_MULTI, attribute(unix.IFA_LOCAL, testAddress.AsSlice()...), attribute(unix.IFA_ADDRESS, 10, 113, 0, 6)), one, false, nil},
		{"without a local address", dumpedOnEth0(unix.NLM_F_MULTI, attribute(unix.IFA_ADDRESS, testAddress.AsSlice()...)), one, false, nil},
		{"of no known family", dumpedOnEth0(unix.NLM_F_MULTI, attribute(unix.IFA_LOCAL, 10, 113, 0)), nil, false, errNoFamily},
		{"something has changed", slices.Concat(dumpedAddress(unix.NLM_F_MULTI), dumpedAddress(interrupted), done), nil, false, netlink.ErrDumpInterrupted},
		{"something has changed, as the last message says", slices.Concat(dumpedAddress(unix.NLM_F_MULTI), dumped(unix.NLMSG_DONE, interrupted, 0, 0, 0, 0)), nil, false, netlink.ErrDumpInterrupted},
		{"the kernel refuses", dumped(unix.NLMSG_ERROR, 0, binary.NativeEndian.AppendUint32(nil, ^uint32(unix.EPERM)+1)...), nil, false, unix.EPERM},
		{"cut off", append(dumpedAddress(unix.NLM_F_MULTI), done[:18]...), nil, false, errCutOff},
		{"a message without its end", dumpedAddress(0)[:40], nil, false, errCutOff},
		{"a message shorter than its head", append([]byte{15, 0, 0, 0}, make([]byte, 12)...), nil, false, errCutOff},
		{"less than a head", done[:15], nil, false, errCutOff},
		{"an end without its error number", dumped(unix.NLMSG_DONE, 0, 0, 0, 0), nil, false, errCutOff},
		{"an address without its head", dumped(unix.RTM_NEWADDR, 0, make([]byte, 7)...), nil, false, errCutOff},
		{"less than the head of an attribute", dumped(unix.RTM_NEWADDR, 0, make([]byte, 11)...), nil, false, errCutOff},
		{"an attribute shorter than its head", dumpedOnEth0(0, []byte{3, 0, 2, 0}), nil, false, errCutOff},
		{"an attribute without its end", dumpedOnEth0(0, []byte{0xff, 0, 2, 0}), nil, false, errCutOff},
		{"padding that is missing at the end", dumped(unix.RTM_NEWADDR, 0, append(make([]byte, 8), append(attribute(unix.IFA_LOCAL, testAddress.AsSlice()...), 5, 0, 3, 0, 'x')...)...), []assignment{{testAddress, "x"}}, false, nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			got, done, err := readDump(test.part, map[uint32]string{})
			if !slices.Equal(got, test.want) || done != test.done || !errors.Is(err, test.err) {
				t.Errorf("got %v, %v, %v", got, done, err)
			}
		})
	}
}

// What is in a namespace may send messages as the kernel does, if it is root there. Only the kernel's count.
func TestOnlyTheKernelIsBelieved(t *testing.T) {
	requireRoot(t)
	sockets := [2]int{}
	for i := range sockets {
		socket, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = unix.Close(socket) })
		if err := unix.Bind(socket, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
			t.Fatal(err)
		}
		sockets[i] = socket
	}
	to, err := unix.Getsockname(sockets[0])
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Sendto(sockets[1], dumped(unix.NLMSG_DONE, unix.NLM_F_MULTI, 0, 0, 0, 0), 0, to); err != nil {
		t.Fatal(err)
	}
	addresses, err := net.InterfaceAddrs()
	if err != nil {
		t.Fatal(err)
	}
	if !slices.ContainsFunc(addresses, func(a net.Addr) bool { ip := a.(*net.IPNet).IP; return !ip.IsLoopback() && !ip.IsLinkLocalUnicast() }) {
		t.Fatal("this test needs a machine with an address")
	}
	if assigned, err := listOn(sockets[0], make([]byte, dumpSize)); err != nil || len(assigned) == 0 {
		t.Errorf("got %v (%v)", assigned, err)
	}
}

func TestAnInterruptedListIsRepeated(t *testing.T) {
	for _, test := range []struct {
		name        string
		interrupted int
		lists       int
		want        string
	}{
		{"never", 0, 1, ""},
		{"sometimes", 3, 4, ""},
		{"always", 1 << 30, maxDumps, "the network has changed 20 times while the kernel listed it"},
	} {
		t.Run(test.name, func(t *testing.T) {
			lists := 0
			got, err := complete(func() ([]int, error) {
				if lists++; lists <= test.interrupted {
					return []int{0}, fmt.Errorf("listing: %w", netlink.ErrDumpInterrupted)
				}
				return []int{1, 2}, nil
			})
			if lists != test.lists || text(err) != test.want || (err == nil) != slices.Equal(got, []int{1, 2}) {
				t.Errorf("got %v (%v) after %d lists", got, err, lists)
			}
		})
	}
}
