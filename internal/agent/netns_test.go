package agent

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"runtime"
	"strings"
	"syscall"
	"testing"

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

var realHost = Host{Proc: "/proc", Cgroup: "/sys/fs/cgroup"}

func TestNamespaceOfASandbox(t *testing.T) {
	name := fmt.Sprintf("eni-guard-test-%d", os.Getpid())
	closeIt := namedNamespace(t, name)
	// Runtimes name the path below /var/run, mounts are below /run.
	sandboxes := []podSandbox{{id: "s1", netnsPath: "/var/run/netns/" + name, ips: []netip.Addr{netip.MustParseAddr("10.113.0.9")}}}
	open := sandbox.Finding{Kind: sandbox.NetnsOpen, Sandbox: "s1", Netns: "/run/netns/" + name}
	assigned := sandbox.Finding{Kind: sandbox.IPAssigned, Sandbox: "s1", Netns: open.Netns, IP: testAddress, Interface: "lo"}
	for _, test := range []struct {
		name string
		ips  []netip.Addr
		want []sandbox.Finding
	}{
		{"with the pod's address", []netip.Addr{testAddress}, []sandbox.Finding{open, assigned}},
		{"with another address", []netip.Addr{netip.MustParseAddr("10.113.0.6")}, []sandbox.Finding{open}},
		{"of a pod without an address", nil, []sandbox.Finding{open}},
	} {
		t.Run(test.name, func(t *testing.T) {
			got, err := realHost.namespaces(t.Context(), sandboxes, nil, test.ips)
			if err != nil || !reflect.DeepEqual(got, test.want) {
				t.Errorf("got  %v (%v)\nwant %v", got, err, test.want)
			}
		})
	}
	t.Run("closed", func(t *testing.T) {
		closeIt()
		got, err := realHost.namespaces(t.Context(), sandboxes, nil, []netip.Addr{testAddress})
		if err != nil || len(got) > 0 {
			t.Errorf("got %v (%v)", got, err)
		}
	})
	t.Run("closed, with the file left behind", func(t *testing.T) {
		if err := os.MkdirAll(netnsDir, 0o755); err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(netnsDir, name)
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		defer os.Remove(path)
		got, err := realHost.namespaces(t.Context(), sandboxes, nil, []netip.Addr{testAddress})
		if err != nil || len(got) > 0 {
			t.Errorf("got %v (%v)", got, err)
		}
	})
}

func TestNamespaceThatOnlyAProcessHolds(t *testing.T) {
	requireRoot(t)
	ipv6 := netip.MustParseAddr("fd00:113::5")
	cmd := exec.CommandContext(t.Context(), "sleep", "600")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	file := realHost.task(cmd.Process.Pid, cmd.Process.Pid, "ns/net")
	inode, err := os.Readlink(file)
	if err != nil {
		t.Fatal(err)
	}
	away(t, func() error {
		ns, err := netns.GetFromPath(file)
		if err == nil {
			err = errors.Join(netns.Set(ns), addAddress(testAddress), addAddress(ipv6), ns.Close())
		}
		return err
	})
	p := podProcess{Process: sandbox.Process{PID: cmd.Process.Pid}, netns: inode, netnsFile: file}
	got, err := realHost.namespaces(t.Context(), nil, []podProcess{p, p}, []netip.Addr{testAddress, ipv6})
	want := []sandbox.Finding{
		{Kind: sandbox.NetnsOpen, Netns: inode},
		{Kind: sandbox.IPAssigned, Netns: inode, IP: testAddress, Interface: "lo"},
		{Kind: sandbox.IPAssigned, Netns: inode, IP: ipv6, Interface: "lo"},
	}
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("got  %v (%v)\nwant %v", got, err, want)
	}

	// A process that has ended since takes its namespace along: that is no error.
	if err := errors.Join(cmd.Process.Kill(), ignoreExit(cmd.Wait())); err != nil {
		t.Fatal(err)
	}
	if got, err := realHost.namespaces(t.Context(), nil, []podProcess{p}, nil); err != nil || len(got) != 1 {
		t.Errorf("after its end: got %v (%v)", got, err)
	}
}

func ignoreExit(err error) error {
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return nil
	}
	return err
}

// A thread of the agent that stayed in a pod's namespace would keep the address alive, unseen by everybody.
func TestTheThreadThatEntersANamespaceComesBack(t *testing.T) {
	name := fmt.Sprintf("eni-guard-test-back-%d", os.Getpid())
	namedNamespace(t, name)
	runtime.LockOSThread()
	before, err := os.Readlink("/proc/thread-self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	handle, back, err := enterAndOpen(filepath.Join(netnsDir, name))
	if err != nil {
		t.Fatal(err)
	}
	defer handle.Close()
	after, err := os.Readlink("/proc/thread-self/ns/net")
	if err != nil || !back || after != before {
		t.Fatalf("the thread is in %s, came from %s, and is called back: %v (%v)", after, before, back, err)
	}
	runtime.UnlockOSThread()
	addresses, err := handle.AddrList(nil, netlink.FAMILY_V4)
	if err != nil || len(addresses) != 2 || addresses[1].IP.String() != testAddress.String() {
		t.Errorf("the socket is not in the namespace: it lists %v (%v)", addresses, err)
	}
}

// Where the runtime names a path that cannot be looked at, not finding it mounted proves nothing.
func TestNamespacePathsElsewhere(t *testing.T) {
	self := fmt.Sprintf("/proc/%d/ns/net", os.Getpid())
	for _, test := range []struct {
		name, path string
		findings   int
		want       string
	}{
		{"of a process that is gone", "/proc/4194999/ns/net", 0, ""},
		{"of a process in the host's namespace", self, 0, ""},
		{"in another directory", "/var/run/docker/netns/x", 0, "network namespace /run/docker/netns/x of sandbox s1 is not below /run/netns"},
		{"none", "", 0, ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			host, err := realHost.namespace("net")
			if err != nil {
				t.Fatal(err)
			}
			own, err := os.Readlink("/proc/self/ns/net")
			if err != nil || own != host {
				t.Fatalf("this test must run in the host's network namespace (%v)", err)
			}
			got, err := realHost.namespaces(t.Context(), []podSandbox{{id: "s1", netnsPath: test.path}}, nil, nil)
			if len(got) != test.findings || (err == nil) != (test.want == "") || err != nil && !strings.Contains(err.Error(), test.want) {
				t.Errorf("got %v, %v", got, err)
			}
		})
	}
}

// The host's own network namespace is not a pod's, whatever process of the pod is in it.
func TestTheHostsOwnNamespaceIsNoFinding(t *testing.T) {
	host, err := realHost.namespace("net")
	if err != nil {
		t.Fatal(err)
	}
	got, err := realHost.namespaces(t.Context(), nil, []podProcess{{netns: host, netnsFile: "/proc/self/ns/net"}}, nil)
	if err != nil || len(got) > 0 {
		t.Errorf("got %v (%v)", got, err)
	}
}

// In another mount namespace, as in a container, an open namespace would look closed unless the host's mounts arrive.
func TestMountsThatDoNotFollowTheHostProveNothing(t *testing.T) {
	requireRoot(t)
	name := fmt.Sprintf("eni-guard-test-private-%d", os.Getpid())
	namedNamespace(t, name)
	var named map[string]string
	var refusal error
	away(t, func() error {
		err := errors.Join(unix.Unshare(unix.CLONE_NEWNS), unix.Mount("", "/", "", unix.MS_PRIVATE|unix.MS_REC, ""))
		if err == nil {
			named, refusal = realHost.namedNamespaces()
		}
		return err
	})
	if refusal == nil || !strings.Contains(refusal.Error(), "mountPropagation: HostToContainer") {
		t.Errorf("got %v (%v)", named, refusal)
	}
}

func TestReceivesNamespaces(t *testing.T) {
	for _, test := range []struct {
		mount mountinfo.Info
		want  bool
	}{
		{mountinfo.Info{Mountpoint: "/run/netns", Optional: "master:1"}, true},
		{mountinfo.Info{Mountpoint: "/run/netns", Optional: "shared:4 master:1"}, true},
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
