package agent

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/eni-guard/eni-guard/internal/sandbox"
)

// A namespace that only an open file keeps has no mount and no process to find it by; the host's end of its device shows that
// it is there.
func TestANamespaceThatOnlyAnOpenFileKeeps(t *testing.T) {
	requireRoot(t)
	device := fmt.Sprintf("eg%d", os.Getpid())
	address := netip.MustParseAddr("10.113.7.5")
	network := netlink.NewIPNet(address.AsSlice())
	var file netns.NsHandle
	away(t, func() (err error) {
		file, err = netns.New()
		return err
	})
	t.Cleanup(func() { _ = file.Close() })
	pair := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: device}, PeerName: "eth0", PeerNamespace: netlink.NsFd(file)}
	if err := netlink.LinkAdd(pair); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = netlink.LinkDel(pair) })
	rule := netlink.NewRule()
	rule.Priority, rule.Dst, rule.Table = 512, network, unix.RT_TABLE_MAIN
	from := netlink.NewRule()
	from.Priority, from.Src, from.Table = 2048, network, unix.RT_TABLE_MAIN
	// Of no matter: everything there is, and the neighbour.
	other := netlink.NewRule()
	other.Priority, other.Dst, other.Table = 513, netlink.NewIPNet(address.Next().AsSlice()), unix.RT_TABLE_MAIN
	ipv6 := netip.MustParseAddr("fd00:113:7::5")
	toIPv6 := netlink.NewRule()
	toIPv6.Family, toIPv6.Priority, toIPv6.Dst, toIPv6.Table = unix.AF_INET6, 512, netlink.NewIPNet(ipv6.AsSlice()), unix.RT_TABLE_MAIN
	if err := errors.Join(
		netlink.LinkSetUp(pair),
		netlink.RouteAdd(&netlink.Route{LinkIndex: pair.Attrs().Index, Dst: network, Scope: netlink.SCOPE_LINK, Table: 1003}),
		netlink.RouteAdd(&netlink.Route{LinkIndex: pair.Attrs().Index, Dst: netlink.NewIPNet(ipv6.AsSlice()), Table: 1003}),
		netlink.RouteAdd(&netlink.Route{Dst: network, Table: 1004, Type: unix.RTN_BLACKHOLE}),
	); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = netlink.RouteDel(&netlink.Route{Dst: network, Table: 1004, Type: unix.RTN_BLACKHOLE}) })
	for _, r := range []*netlink.Rule{rule, from, other, toIPv6} {
		if err := netlink.RuleAdd(r); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = netlink.RuleDel(r) })
	}

	found, err := realNode.paths([]netip.Addr{address, ipv6})
	if want := []hostRoute{{ip: address, device: device, table: 1003, peer: true}, {ip: ipv6, device: device, table: 1003, peer: true}}; err != nil || !slices.Equal(found.routes, want) {
		t.Errorf("routes %+v, want %+v (%v)", found.routes, want, err)
	}
	if want := []string{"rule 512 to 10.113.7.5", "rule 2048 from 10.113.7.5", "rule 512 to fd00:113:7::5"}; !slices.Equal(found.rules, want) {
		t.Errorf("rules %q, want %q", found.rules, want)
	}
	query := podQuery
	query.IPs = []netip.Addr{address}
	report := newInspector("node-a", lookable(t).Host, fakeRuntime(knowsNothing)).Inspect(t.Context(), query)
	if want := (sandbox.Finding{Kind: sandbox.PeerOpen, IP: address, Interface: device}); !slices.ContainsFunc(report.Findings, func(f sandbox.Finding) bool { return f == want }) {
		t.Errorf("got %v (%v)", report.Findings, report.Failures())
	}
	// Asked for the address alone, nothing else says who has it.
	a := newInspector("node-a", lookable(t).Host, fakeRuntime(knowsNothing)).holdersOf(t.Context(), address)
	want := []sandbox.Finding{{Kind: sandbox.PeerOpen, IP: address, Interface: device}}
	if a.Verdict != sandbox.Bound || len(a.Holders) != 1 || !slices.Equal(a.Holders[0].Findings, want) || len(a.Failures) > 0 {
		t.Errorf("asked who has %s: got %+v", address, a)
	}
	if want := []string{found.routes[0].String(), "rule 512 to 10.113.7.5", "rule 2048 from 10.113.7.5"}; !slices.Equal(a.Routes, want) {
		t.Errorf("routes %q, want %q", a.Routes, want)
	}
	// Who could not look everywhere does not know that nothing else has it.
	down := fakeRuntime(func(context.Context, string) (podRecords, error) {
		return podRecords{}, errors.New("connection refused")
	})
	if a := newInspector("node-a", lookable(t).Host, down).holdersOf(t.Context(), address); a.Verdict != sandbox.Unknown || len(a.Holders) > 0 || len(a.Failures) != 1 {
		t.Errorf("without the runtime: got %+v", a)
	}

	// Without the file the namespace ends, and with it both ends of the device, and the route.
	if err := file.Close(); err != nil {
		t.Fatal(err)
	}
	await(t, func() error {
		report := newInspector("node-a", lookable(t).Host, fakeRuntime(knowsNothing)).Inspect(t.Context(), query)
		if report.Verdict() != sandbox.Released {
			return fmt.Errorf("%s: %v %v", report.Verdict(), report.Findings, report.Failures())
		}
		return nil
	})
}

// What is not in the host's network namespace would take a pod's routes and addresses for the host's.
func TestOnlyTheHostsRoutesAreRead(t *testing.T) {
	requireRoot(t)
	var paths hostPaths
	var own []assignment
	var refusals [2]error
	away(t, func() error {
		err := unix.Unshare(unix.CLONE_NEWNET)
		if err == nil {
			err = addAddress(testAddress)
		}
		paths, refusals[0] = realNode.paths([]netip.Addr{testAddress})
		own, refusals[1] = realNode.ownAddress(testAddress)
		return err
	})
	for _, refusal := range refusals {
		if refusal == nil || !strings.Contains(refusal.Error(), "hostNetwork: true is missing") {
			t.Errorf("got %v", refusal)
		}
	}
	if len(paths.routes)+len(paths.rules)+len(own) > 0 {
		t.Errorf("got %+v and %+v", paths, own)
	}
	// An agent that is not in it has not run its probe.
	elsewhere := lookable(t)
	if err := os.Remove(filepath.Join(elsewhere.Proc, "1/ns/net")); err != nil {
		t.Fatal(err)
	}
	elsewhere.symlink("1/ns/net", "net:[7]")
	i := newInspector("node-a", elsewhere.Host, fakeRuntime(knowsNothing))
	if report := i.Inspect(t.Context(), podQuery); report.Verdict() != sandbox.Unknown || !strings.Contains(strings.Join(report.Failures(), "; "), "hostNetwork: true is missing") {
		t.Errorf("%s: %q", report.Verdict(), report.Failures())
	}
	if a := i.holdersOf(t.Context(), testAddress); a.Verdict != sandbox.Unknown || len(a.Failures) != 1 || !strings.Contains(a.Failures[0], "hostNetwork: true is missing") {
		t.Errorf("%s: %q", a.Verdict, a.Failures)
	}
}

// An address of the host itself is nobody else's, and is told with its device.
func TestAnAddressOfTheHostItself(t *testing.T) {
	requireRoot(t)
	address := netip.MustParseAddr("10.113.7.6")
	device, err := netlink.LinkByName("lo")
	if err != nil {
		t.Fatal(err)
	}
	assigned := &netlink.Addr{IPNet: netlink.NewIPNet(address.AsSlice())}
	if err := netlink.AddrAdd(device, assigned); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = netlink.AddrDel(device, assigned) })
	a := newInspector("node-a", lookable(t).Host, fakeRuntime(knowsNothing)).holdersOf(t.Context(), address)
	if a.Verdict != sandbox.Bound || len(a.Holders) != 1 || a.Holders[0].Findings[0].Interface != "lo" || !strings.HasSuffix(a.Holders[0].Findings[0].Netns, "the host's own") {
		t.Errorf("%s: %+v (%q)", a.Verdict, a.Holders, a.Failures)
	}
}
