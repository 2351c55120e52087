package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

const (
	testSubnet  = "10.112.1.0/24"
	testSubnet6 = "fd00:112:1::/112"
	hostAddr    = "10.112.0.1"
	hostAddr6   = "fd00:112::1"
)

// host is a node of its own for one test: a network namespace that plays the host's, with mounts and forwarding of its
// own. The test runs in it; the plugin sees the namespaces of the real machine as well.
type host struct {
	t        *testing.T
	ns       netns.NsHandle
	stateDir string
	poolSize int
	families string // the annotation of the pods that are added
}

// newHost moves the test's thread, which ends with the test, to the node.
func newHost(t *testing.T) *host {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("this test makes network namespaces: run it as root")
	}
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		t.Fatalf("unshare mounts: %v", err)
	}
	if err := unix.Mount("none", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		t.Fatalf("make mounts private: %v", err)
	}
	ns, err := netns.New()
	if err != nil {
		t.Fatalf("new network namespace: %v", err)
	}
	t.Cleanup(func() { ns.Close() })
	h := &host{t: t, ns: ns, stateDir: filepath.Join(t.TempDir(), "state"), poolSize: 32}
	// The kernel gives a device its link-local address some time after it is up; here a test would see the host change by itself.
	for _, file := range []string{"/proc/sys/net/ipv4/ip_forward", "/proc/sys/net/ipv6/conf/all/forwarding", "/proc/sys/net/ipv6/conf/default/addr_gen_mode"} {
		if err := os.WriteFile(file, []byte("1"), 0); err != nil {
			t.Fatal(err)
		}
	}
	h.setLoopback(hostAddr)
	h.setLoopback(hostAddr6)
	return h
}

var namespaces atomic.Int32

// namespace makes a named namespace, as a runtime does for a pod, and returns its path.
func (h *host) namespace() string {
	h.t.Helper()
	name := fmt.Sprintf("eni-sim-test-%d-%d", os.Getpid(), namespaces.Add(1))
	ns, err := netns.NewNamed(name)
	if err != nil {
		h.t.Fatalf("new network namespace: %v", err)
	}
	ns.Close()
	path := filepath.Join("/run/netns", name)
	h.t.Cleanup(func() { h.removeNamespace(path) })
	h.back()
	return path
}

func (h *host) removeNamespace(path string) {
	h.t.Helper()
	if err := netns.DeleteNamed(filepath.Base(path)); err != nil && !errors.Is(err, os.ErrNotExist) {
		h.t.Error(err)
	}
}

// in calls do in the namespace.
func (h *host) in(path string, do func()) {
	h.t.Helper()
	ns, err := openNamespace(path)
	if err != nil {
		h.t.Fatal(err)
	}
	defer ns.Close()
	if err := netns.Set(ns); err != nil {
		h.t.Fatal(err)
	}
	defer h.back()
	do()
}

func (h *host) back() {
	h.t.Helper()
	if err := netns.Set(h.ns); err != nil {
		h.t.Fatal(err)
	}
}

// setLoopback gives the thread's namespace the address, on lo.
func (h *host) setLoopback(addr string) {
	h.t.Helper()
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		h.t.Fatal(err)
	}
	err = errors.Join(netlink.LinkSetUp(lo), netlink.AddrAdd(lo, &netlink.Addr{IPNet: hostNet(netip.MustParseAddr(addr))}))
	if err != nil {
		h.t.Fatal(err)
	}
}

func (h *host) config() string {
	return fmt.Sprintf(`{"cniVersion":"1.0.0","name":"eni-sim","type":"eni-sim","stateDir":%q,"subnet":%q,"subnet6":%q,"poolSize":%d,`+
		`"runtimeConfig":{"io.kubernetes.cri.pod-annotations":{"eni-sim/ip-families":%q}}}`,
		h.stateDir, testSubnet, testSubnet6, h.poolSize, h.families)
}

func cniArgs(name, container string) string {
	return "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=" + name + ";K8S_POD_UID=uid-of-" + container
}

// request is the call that a runtime makes for pod shop/name.
func (h *host) request(name, container, path string) *request {
	h.t.Helper()
	req, err := parseRequest(&skel.CmdArgs{
		ContainerID: container, Netns: path, IfName: podDevice, Args: cniArgs(name, container), StdinData: []byte(h.config()),
	})
	if err != nil {
		h.t.Fatal(err)
	}
	return req
}

// add is an ADD that must succeed; it returns the first address.
func (h *host) add(name, container, path string) string {
	h.t.Helper()
	result, err := h.request(name, container, path).add()
	if err != nil {
		h.t.Fatalf("ADD %s: %v", name, err)
	}
	return result.IPs[0].Address.IP.String()
}

// addFails is an ADD that must fail and leave everything as it was.
func (h *host) addFails(name, container, path string) error {
	h.t.Helper()
	before := h.picture(path)
	_, err := h.request(name, container, path).add()
	if err == nil {
		h.t.Fatalf("ADD %s succeeded", name)
	}
	if after := h.picture(path); after != before {
		h.t.Errorf("ADD %s failed with %v, but changed\n%sto\n%s", name, err, before, after)
	}
	return err
}

func (h *host) del(name, container, path string) {
	h.t.Helper()
	if err := h.request(name, container, path).del(); err != nil {
		h.t.Fatalf("DEL %s: %v", name, err)
	}
}

// check reports whether CHECK succeeds.
func (h *host) check(name, container, path string) bool {
	h.t.Helper()
	return h.request(name, container, path).check() == nil
}

// collect does a round of the collector, with an API server that has no pods.
func (h *host) collect() {
	h.t.Helper()
	c := collector{store: store{dir: h.stateDir}, pods: newAPI(nil).CoreV1(), node: testNode, log: slog.New(slog.DiscardHandler)}
	if err := c.collect(h.t.Context()); err != nil {
		h.t.Fatal(err)
	}
}

func (h *host) pool() *pool {
	h.t.Helper()
	p, err := store{dir: h.stateDir}.load()
	if err != nil {
		h.t.Fatal(err)
	}
	return p
}

// picture describes the state, and the devices, addresses and routes of the host and of the namespace.
func (h *host) picture(path string) string {
	h.t.Helper()
	var text strings.Builder
	state, err := os.ReadFile(store{dir: h.stateDir}.file())
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		h.t.Fatal(err)
	}
	fmt.Fprintf(&text, "state: %s\n", state)
	describe := func() {
		for _, link := range listed(h.t, netlink.LinkList) {
			addrs := listed(h.t, func() ([]netlink.Addr, error) { return netlink.AddrList(link, netlink.FAMILY_ALL) })
			fmt.Fprintf(&text, "%s: %v\n", link.Attrs().Name, addrs)
		}
		for _, route := range listed(h.t, func() ([]netlink.Route, error) { return netlink.RouteList(nil, netlink.FAMILY_ALL) }) {
			fmt.Fprintf(&text, "route %v dev %d via %v\n", route.Dst, route.LinkIndex, route.Gw)
		}
	}
	describe()
	h.in(path, describe)
	return text.String()
}

// listed is a whole list: the kernel says when something has changed while it was made.
func listed[T any](t *testing.T, list func() ([]T, error)) []T {
	t.Helper()
	for {
		all, err := list()
		if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
			t.Fatal(err)
		}
		if err == nil {
			return all
		}
	}
}

// listen starts a server in the namespace of the thread that answers every connection with the caller's address.
func (h *host) listen() (port int) {
	h.t.Helper()
	listener, err := net.Listen("tcp", ":0")
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { listener.Close() })
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return // closed
			}
			from, _, _ := net.SplitHostPort(conn.RemoteAddr().String())
			from, _, _ = strings.Cut(from, "%") // without the device of a link-local address
			json.NewEncoder(conn).Encode(from)
			conn.Close()
		}
	}()
	return listener.Addr().(*net.TCPAddr).Port
}

// call connects from the namespace of the thread, and expects the server to see the caller's address.
func (h *host) call(addr string, port int, from string) {
	h.t.Helper()
	conn, err := net.DialTimeout("tcp", net.JoinHostPort(addr, fmt.Sprint(port)), patience)
	if err != nil {
		h.t.Fatal(err)
	}
	defer conn.Close()
	var seen string
	if err := json.NewDecoder(conn).Decode(&seen); err != nil {
		h.t.Fatal(err)
	}
	if seen != from {
		h.t.Errorf("%s was called by %s, want %s", addr, seen, from)
	}
}
