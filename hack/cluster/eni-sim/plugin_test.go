package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/containernetworking/cni/pkg/types"
	cni "github.com/containernetworking/cni/pkg/types/100"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

func TestPodsAndHostReachEachOther(t *testing.T) {
	h := newHost(t)
	nsA, nsB := h.namespace(), h.namespace()
	a, b := h.add("web-0", "c1", nsA), h.add("web-1", "c2", nsB)
	if a != "10.112.1.2" || b != "10.112.1.3" {
		t.Fatalf("addresses %s and %s", a, b)
	}
	onHost := h.listen()
	var inA, inB int
	h.in(nsA, func() { inA = h.listen() })
	h.in(nsB, func() { inB = h.listen() })

	h.call(a, inA, hostAddr)
	h.call(b, inB, hostAddr)
	h.in(nsA, func() {
		h.call(hostAddr, onHost, a)
		h.call(b, inB, a)
	})
	h.in(nsB, func() {
		h.call(hostAddr, onHost, b)
		h.call(a, inA, b)
	})

	if !h.check("web-0", "c1", nsA) || h.check("web-0", "c2", nsA) || h.check("web-0", "c1", nsB) || h.check("web-9", "c1", nsA) {
		t.Error("CHECK: want success for the pod's own sandbox and namespace, and for nothing else")
	}
}

func TestPodsAndHostReachEachOtherByIPv6(t *testing.T) {
	h := newHost(t)
	nsA, nsB := h.namespace(), h.namespace()
	h.families = "IPv6"
	a := h.add("web-0", "c1", nsA)
	h.families = "IPv4,IPv6"
	b4 := h.add("web-1", "c2", nsB)
	b := h.pool().Records["shop/web-1"].IPv6.String()
	if a != "fd00:112:1::2" || b4 != "10.112.1.2" || b != "fd00:112:1::3" {
		t.Fatalf("addresses %s, and %s with %s", a, b4, b)
	}
	onHost := h.listen()
	var inA, inB int
	h.in(nsA, func() { inA = h.listen() })
	h.in(nsB, func() { inB = h.listen() })

	h.call(a, inA, hostAddr6)
	h.call(b, inB, hostAddr6)
	h.call(b4, inB, hostAddr)
	h.in(nsA, func() {
		h.call(hostAddr6, onHost, a)
		h.call(b, inB, a)
	})
	h.in(nsB, func() {
		h.call(hostAddr, onHost, b4)
		h.call(a, inA, b)
	})

	if !h.check("web-1", "c2", nsB) {
		t.Error("CHECK failed")
	}
	h.in(nsB, func() {
		eth0, err := netlink.LinkByName(podDevice)
		if err == nil {
			err = netlink.AddrDel(eth0, &netlink.Addr{IPNet: hostNet(netip.MustParseAddr(b))})
		}
		if err != nil {
			t.Fatal(err)
		}
	})
	if h.check("web-1", "c2", nsB) {
		t.Error("CHECK succeeded without the second address")
	}
}

// TestIPv6FromAHostWithout has a node whose devices have no IPv6 address but the kernel's own.
func TestIPv6FromAHostWithout(t *testing.T) {
	h := newHost(t)
	lo, err := netlink.LinkByName("lo")
	if err == nil {
		err = netlink.AddrDel(lo, &netlink.Addr{IPNet: hostNet(netip.MustParseAddr(hostAddr6))})
	}
	if err != nil {
		t.Fatal(err)
	}
	path := h.namespace()
	h.families = "IPv6"
	pod := h.add("web-0", "c1", path)
	var port int
	h.in(path, func() { port = h.listen() })
	h.call(pod, port, gateway6.String())
}

func TestReleasedAddressIsTheNextOne(t *testing.T) {
	h := newHost(t)
	empty := h.namespace()
	before := h.picture(empty)
	nsA, nsB := h.namespace(), h.namespace()
	a := h.add("web-0", "c1", nsA)
	h.add("web-1", "c2", nsB)
	h.del("web-0", "c1", nsA)
	h.del("web-0", "c1", nsA) // again
	if c := h.add("web-2", "c3", nsA); c != a {
		t.Errorf("web-2 has %s, want %s of web-0", c, a)
	}
	h.del("web-2", "c3", nsA)
	h.del("web-1", "c2", nsB)
	h.removeNamespace(nsA)
	h.del("web-1", "c2", nsA) // of a namespace that is gone
	h.del("web-9", "c9", "")  // of a pod that never was

	_, before, _ = strings.Cut(before, "\n")
	if after := h.picture(empty); !strings.HasSuffix(after, before) {
		t.Errorf("left behind:\n%s\nat first:\n%s", after, before)
	}
	if p := h.pool(); len(p.Records) != 0 || len(p.IPv4.Free) != h.poolSize {
		t.Errorf("left behind: %v, %d free", p.Records, len(p.IPv4.Free))
	}
}

func TestDelBeforeAnyAdd(t *testing.T) {
	h := newHost(t)
	h.del("web-0", "c1", "")
	h.del("web-0", "c1", h.namespace())
}

func TestAddressInUse(t *testing.T) {
	const taken = "10.112.1.3"
	holders := map[string]func(h *host) (release func()){
		"by a namespace with a name": func(h *host) func() {
			path := h.namespace()
			h.in(path, func() { h.setLoopback(taken) })
			return func() { h.removeNamespace(path) }
		},
		"by a namespace that only a process keeps": func(h *host) func() {
			// cat waits for the end of its standard input.
			child := exec.Command("cat")
			child.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET}
			stdin, err := child.StdinPipe()
			if err != nil {
				h.t.Fatal(err)
			}
			if err := child.Start(); err != nil {
				h.t.Fatal(err)
			}
			end := func() { stdin.Close(); child.Wait() }
			h.t.Cleanup(end)
			h.in(fmt.Sprintf("/proc/%d/ns/net", child.Process.Pid), func() { h.setLoopback(taken) })
			return end
		},
		"by a namespace that only one thread keeps": func(h *host) func() {
			ready, end := make(chan int), make(chan struct{})
			go func() {
				runtime.LockOSThread() // never undone: the thread ends with the function
				if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
					h.t.Error(err)
				}
				ready <- unix.Gettid()
				<-end
			}()
			link := fmt.Sprintf("/proc/self/task/%d/ns/net", <-ready)
			h.in(link, func() { h.setLoopback(taken) })
			return func() {
				close(end)
				waitFor(h.t, "the end of the thread", func() bool {
					_, err := os.Readlink(link)
					return gone(err)
				})
			}
		},
	}
	for name, hold := range holders {
		t.Run(name, func(t *testing.T) {
			h := newHost(t)
			h.add("web-0", "c1", h.namespace())
			release := hold(h)
			target := h.namespace()
			err := h.addFails("web-1", "c2", target)
			if !errors.Is(err, syscall.EADDRINUSE) || !strings.Contains(err.Error(), "address already in use") || !strings.Contains(err.Error(), taken) {
				t.Errorf("error %v", err)
			}
			h.addFails("web-1", "c3", target) // the next attempt gets the same address
			release()
			if got := h.add("web-1", "c4", target); got != taken {
				t.Errorf("address %s, want %s", got, taken)
			}
		})
	}
}

func TestConflictLeavesOutTheHostAndTheTarget(t *testing.T) {
	const addr = "10.112.1.2"
	h := newHost(t)
	h.setLoopback(addr)
	path := h.namespace()
	h.in(path, func() { h.setLoopback(addr) })
	target, err := openNamespace(path)
	if err != nil {
		t.Fatal(err)
	}
	defer target.Close()
	if err := checkConflict([]netip.Addr{netip.MustParseAddr(addr)}, target); err != nil {
		t.Error(err)
	}
}

// TestIncident is the incident, from the forced deletion on.
func TestIncident(t *testing.T) {
	for _, families := range []string{"IPv4", "IPv6", "IPv4,IPv6"} {
		t.Run(families, func(t *testing.T) {
			h := newHost(t)
			h.families = families
			leaked, next := h.namespace(), h.namespace()
			addr := h.add("web-0", "c1", leaked)
			h.collect() // the API server has no pod any more
			if err := h.addFails("api-0", "c2", next); !errors.Is(err, syscall.EADDRINUSE) {
				t.Errorf("error %v", err)
			}
			h.del("api-0", "c2", next) // the runtime cleans up after itself
			h.addFails("api-0", "c3", next)

			// The stuck process ends at last; the record is not the leaked sandbox's.
			h.del("web-0", "c1", leaked)
			if got := h.add("api-0", "c4", next); got != addr {
				t.Errorf("address %s, want %s", got, addr)
			}
			h.del("web-0", "c1", leaked) // and a late one again
			if !h.check("api-0", "c4", next) {
				t.Error("the new pod lost its address")
			}
		})
	}
}

// TestSecondAddressInUse has a leaked sandbox with an IPv6 address alone, and a new pod with both.
func TestSecondAddressInUse(t *testing.T) {
	h := newHost(t)
	h.families = "IPv6"
	leaked := h.add("web-0", "c1", h.namespace())
	h.collect()
	h.families = "IPv4,IPv6"
	if err := h.addFails("api-0", "c2", h.namespace()); !errors.Is(err, syscall.EADDRINUSE) || !strings.Contains(err.Error(), leaked) {
		t.Errorf("error %v", err)
	}
}

// TestSameNameAgain is a pod of a StatefulSet, force-deleted and made again on its node at once.
func TestSameNameAgain(t *testing.T) {
	for name, collected := range map[string]bool{"before the collector": false, "after the collector": true} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t)
			old, next := h.namespace(), h.namespace()
			addr := h.add("web-0", "c1", old)
			if collected {
				h.collect()
			}
			if err := h.addFails("web-0", "c2", next); !errors.Is(err, syscall.EADDRINUSE) || !strings.Contains(err.Error(), addr) {
				t.Errorf("error %v", err)
			}
			// The failed sandbox's DEL must not take the old one's device, which has the same name.
			before := h.picture(old)
			h.del("web-0", "c2", next)
			if after := h.picture(old); after != before {
				t.Errorf("changed\n%sto\n%s", before, after)
			}
			h.del("web-0", "c1", old)
			if got := h.add("web-0", "c3", next); got != addr {
				t.Errorf("address %s, want %s", got, addr)
			}
		})
	}
}

func TestDelOfAnotherSandboxIsIgnored(t *testing.T) {
	h := newHost(t)
	old, current := h.namespace(), h.namespace()
	h.add("web-0", "c1", old)
	// The sandbox of the first lost its device, so the second gets the address.
	if err := removePodDevice(old); err != nil {
		t.Fatal(err)
	}
	h.add("web-0", "c2", current)
	before := h.picture(current)
	h.del("web-0", "c1", old)
	h.del("web-0", "c1", "")
	if after := h.picture(current); after != before {
		t.Errorf("changed\n%sto\n%s", before, after)
	}
	h.del("web-0", "c2", "") // no way to the namespace: the device goes by the host's end
	if h.check("web-0", "c2", current) || len(h.pool().Records) != 0 {
		t.Error("the sandbox's own DEL did nothing")
	}
}

func TestFailedAddLeavesNothing(t *testing.T) {
	t.Run("pool exhausted", func(t *testing.T) {
		h := newHost(t)
		h.poolSize = 1
		h.add("web-0", "c1", h.namespace())
		if err := h.addFails("web-1", "c2", h.namespace()); !strings.Contains(err.Error(), "the pool of 10.112.1.0/24 is exhausted") {
			t.Errorf("error %v", err)
		}
	})
	t.Run("a device in the way", func(t *testing.T) {
		h := newHost(t)
		path := h.namespace()
		h.in(path, func() {
			if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: podDevice}, PeerName: "other"}); err != nil {
				t.Fatal(err)
			}
		})
		if err := h.addFails("web-0", "c1", path); !errors.Is(err, fs.ErrExist) {
			t.Errorf("error %v", err)
		}
	})
	t.Run("a route in the way", func(t *testing.T) {
		h := newHost(t)
		path := h.namespace()
		h.in(path, func() {
			h.setLoopback("10.112.2.1")
			lo, err := netlink.LinkByName("lo")
			if err == nil {
				err = netlink.RouteAdd(&netlink.Route{LinkIndex: lo.Attrs().Index, Dst: hostNet(gateway), Scope: netlink.SCOPE_LINK})
			}
			if err != nil {
				t.Fatal(err)
			}
		})
		if err := h.addFails("web-0", "c1", path); !errors.Is(err, fs.ErrExist) || !strings.Contains(err.Error(), "the pod's route to the gateway") {
			t.Errorf("error %v", err)
		}
	})
	t.Run("the state cannot be saved", func(t *testing.T) {
		h := newHost(t)
		h.add("web-0", "c1", h.namespace())
		// The state can be read but not saved. The mounts are the test's own.
		if err := unix.Mount(h.stateDir, h.stateDir, "", unix.MS_BIND, ""); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Unmount(h.stateDir, unix.MNT_DETACH) })
		if err := unix.Mount("", h.stateDir, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
			t.Fatal(err)
		}
		if err := h.addFails("web-1", "c2", h.namespace()); !errors.Is(err, unix.EROFS) {
			t.Errorf("error %v", err)
		}
	})
	t.Run("another pool than the state's", func(t *testing.T) {
		h := newHost(t)
		h.add("web-0", "c1", h.namespace())
		h.poolSize = 31
		if err := h.addFails("web-1", "c2", h.namespace()); !strings.Contains(err.Error(), "is of 32 addresses of 10.112.1.0/24 and of fd00:112:1::/112, but the network configuration says 31") {
			t.Errorf("error %v", err)
		}
	})
	t.Run("unknown families", func(t *testing.T) {
		h := newHost(t)
		h.families = "IPv5"
		path := h.namespace()
		if err := h.addFails("web-0", "c1", path); !strings.Contains(err.Error(), `annotation eni-sim/ip-families: "IPv5" is not IPv4, IPv6 or IPv4,IPv6`) {
			t.Errorf("error %v", err)
		}
		h.del("web-0", "c1", path)
	})
	t.Run("no namespace", func(t *testing.T) {
		h := newHost(t)
		plain := filepath.Join(t.TempDir(), "plain")
		if err := os.WriteFile(plain, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		for _, path := range []string{plain, plain + "-not"} {
			if _, err := h.request("web-0", "c1", path).add(); !gone(err) || !strings.Contains(err.Error(), path) {
				t.Errorf("error %v", err)
			}
		}
	})
	t.Run("broken state", func(t *testing.T) {
		h := newHost(t)
		path := h.namespace()
		h.add("web-0", "c1", path)
		file := store{dir: h.stateDir}.file()
		if err := os.WriteFile(file, []byte("{"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := h.addFails("web-1", "c2", h.namespace()); !strings.Contains(err.Error(), file) {
			t.Errorf("error %v", err)
		}
	})
}

func TestLeftoverDeviceIsReplaced(t *testing.T) {
	h := newHost(t)
	path := h.namespace()
	leftover := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: hostDeviceName("shop", "web-0")}, PeerName: "other"}
	if err := netlink.LinkAdd(leftover); err != nil {
		t.Fatal(err)
	}
	h.add("web-0", "c1", path)
	h.add("web-0", "c1", path) // of the same sandbox again: the pair is made anew
	if _, err := netlink.LinkByName("other"); !errors.As(err, new(netlink.LinkNotFoundError)) {
		t.Errorf("the leftover's other end: %v", err)
	}
	if !h.check("web-0", "c1", path) {
		t.Error("CHECK failed")
	}
}

// TestConcurrentAdds calls the plugin as a runtime does, in 20 processes at once.
func TestConcurrentAdds(t *testing.T) {
	h := newHost(t)
	type call struct {
		cmd         *exec.Cmd
		stdout, err bytes.Buffer
	}
	var calls []*call
	for i := range 20 {
		c := &call{cmd: h.plugin("ADD", fmt.Sprintf("web-%d", i), fmt.Sprintf("c%d", i), h.namespace())}
		c.cmd.Stdout, c.cmd.Stderr = &c.stdout, &c.err
		calls = append(calls, c)
	}
	for _, c := range calls {
		if err := c.cmd.Start(); err != nil {
			t.Fatal(err)
		}
	}
	var got []string
	for _, c := range calls {
		if err := c.cmd.Wait(); err != nil {
			t.Errorf("%v: %s%s", err, c.stdout.String(), c.err.String())
			continue
		}
		var result cni.Result
		if err := json.Unmarshal(c.stdout.Bytes(), &result); err != nil {
			t.Fatalf("%v: %s", err, c.stdout.String())
		}
		got = append(got, result.IPs[0].Address.IP.String())
	}
	var want []string
	for i := range 20 {
		want = append(want, fmt.Sprintf("10.112.1.%d", i+2))
	}
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("addresses %v, want %v", got, want)
	}
	if p := h.pool(); len(p.Records) != 20 {
		t.Errorf("%d records, want 20", len(p.Records))
	}
}

// TestProtocol checks what a runtime sees: the versions, a result, an error, and a DEL.
func TestProtocol(t *testing.T) {
	h := newHost(t)
	path := h.namespace()
	call := func(command, name, container string) (string, error) {
		t.Helper()
		out, err := h.plugin(command, name, container, path).Output()
		return string(out), err
	}

	out, err := call("VERSION", "", "")
	if err != nil || !strings.Contains(out, `"1.0.0"]`) {
		t.Errorf("VERSION: %v: %s", err, out)
	}

	out, err = call("ADD", "web-0", "c1")
	if err != nil {
		t.Fatalf("ADD: %v: %s", err, out)
	}
	var result cni.Result
	if err := json.Unmarshal([]byte(out), &result); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if result.CNIVersion != "1.0.0" || len(result.Interfaces) != 2 || len(result.IPs) != 1 || len(result.Routes) != 1 {
		t.Fatalf("result %s", out)
	}
	hostEnd, podEnd, ip := result.Interfaces[0], result.Interfaces[1], result.IPs[0]
	if hostEnd.Name != hostDeviceName("shop", "web-0") || hostEnd.Sandbox != "" || podEnd.Name != podDevice || podEnd.Sandbox != path ||
		ip.Interface == nil || *ip.Interface != 1 || ip.Address.String() != "10.112.1.2/32" || ip.Gateway.String() != "169.254.1.1" {
		t.Errorf("result %s", out)
	}
	link, err := netlink.LinkByName(hostEnd.Name)
	if err != nil || link.Attrs().HardwareAddr.String() != hostEnd.Mac {
		t.Errorf("the host's end: %v, %v, want %s", link, err, hostEnd.Mac)
	}
	want := record{IPv4: netip.MustParseAddr("10.112.1.2"), Container: "c1", PodUID: "uid-of-c1"}
	got := h.pool().Records["shop/web-0"]
	if got.Since.IsZero() {
		t.Error("a record without a time")
	}
	got.Since = want.Since
	if got != want {
		t.Errorf("record %+v, want %+v", got, want)
	}

	if out, err = call("CHECK", "web-0", "c1"); err != nil {
		t.Errorf("CHECK: %v: %s", err, out)
	}
	if out, err = call("DEL", "web-0", "c1"); err != nil || out != "" {
		t.Errorf("DEL: %v: %s", err, out)
	}
	if out, err = call("CHECK", "web-0", "c1"); err == nil {
		t.Errorf("CHECK after DEL: %s", out)
	}

	h.in(h.namespace(), func() { h.setLoopback("10.112.1.2") })
	out, err = call("ADD", "web-1", "c2")
	var cniError types.Error
	if err == nil || json.Unmarshal([]byte(out), &cniError) != nil || !strings.HasSuffix(cniError.Msg, "address already in use") {
		t.Errorf("ADD of an address in use: %v: %s", err, out)
	}
}

// plugin prepares a call of this binary as the plugin. It is to be started by the test's own thread, whose namespaces it
// gets.
func (h *host) plugin(command, name, container, path string) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), "CNI_COMMAND="+command, "CNI_CONTAINERID="+container, "CNI_NETNS="+path,
		"CNI_IFNAME="+podDevice, "CNI_PATH=/opt/cni/bin", "CNI_ARGS="+cniArgs(name, container))
	cmd.Stdin = strings.NewReader(h.config())
	return cmd
}
