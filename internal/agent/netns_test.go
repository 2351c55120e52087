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

// addAddress gives the loopback device of the calling thread's network namespace an address.
func addAddress(address netip.Addr) error {
	link, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	addr, err := netlink.ParseAddr(address.String() + "/32")
	if err != nil {
		return err
	}
	return errors.Join(netlink.LinkSetUp(link), netlink.AddrAdd(link, addr))
}

// namedNamespace makes a network namespace in /run/netns that has testAddress, as containerd does for a sandbox.
func namedNamespace(t *testing.T, name string) (closeIt func()) {
	t.Helper()
	requireRoot(t)
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // for good: the thread ends with the goroutine
		ns, err := netns.NewNamed(name)
		if err == nil {
			err = errors.Join(addAddress(testAddress), ns.Close())
		}
		done <- err
	}()
	if err := <-done; err != nil {
		t.Fatalf("making network namespace %s: %v", name, err)
	}
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
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		ns, err := netns.GetFromPath(file)
		if err == nil {
			err = errors.Join(netns.Set(ns), addAddress(testAddress), ns.Close())
		}
		done <- err
	}()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	p := podProcess{Process: sandbox.Process{PID: cmd.Process.Pid}, netns: inode, netnsFile: file}
	got, err := realHost.namespaces(t.Context(), nil, []podProcess{p, p}, []netip.Addr{testAddress})
	want := []sandbox.Finding{
		{Kind: sandbox.NetnsOpen, Netns: inode},
		{Kind: sandbox.IPAssigned, Netns: inode, IP: testAddress, Interface: "lo"},
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
	type result struct {
		named map[string]string
		err   error
	}
	done := make(chan result)
	go func() {
		runtime.LockOSThread() // for good: the thread keeps its mount namespace to itself
		if err := errors.Join(unix.Unshare(unix.CLONE_NEWNS), unix.Mount("", "/", "", unix.MS_PRIVATE|unix.MS_REC, "")); err != nil {
			done <- result{err: err}
			return
		}
		var r result
		r.named, r.err = Host{Proc: "/proc"}.namedNamespaces()
		done <- r
	}()
	r := <-done
	if r.err == nil || !strings.Contains(r.err.Error(), "mountPropagation: HostToContainer") {
		t.Errorf("got %v (%v)", r.named, r.err)
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
