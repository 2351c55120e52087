package agent

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// hostRoute is a way of the host's network to an address of a pod.
type hostRoute struct {
	ip     netip.Addr
	device string
	table  int
	// peer says that the device is one end of a pair (veth) whose other end is in another network namespace. The two ends of
	// a pair end together (drivers/net/veth.c, veth_dellink), so that namespace exists, whatever keeps it.
	peer bool
}

func (r hostRoute) String() string {
	return fmt.Sprintf("route to %s via %s in table %d", r.ip, r.device, r.table)
}

// hostPaths are the routes and the rules of the host's network for addresses. They may outlive the pod, or be another pod's
// by now, so they explain, and decide nothing; but for hostRoute.peer, where no namespace that shows has the address.
type hostPaths struct {
	routes []hostRoute
	rules  []string
}

// onHostNetwork returns an error if the calling thread is not in the host's network namespace: what it would take for the host's routes
// and addresses would be a pod's.
func (h Host) onHostNetwork() error {
	host, err := h.namespace("net")
	if err != nil {
		return err
	}
	// Of this thread, whatever h shows: it is the one that asks.
	own, err := os.Readlink("/proc/thread-self/ns/net")
	if err != nil {
		return err
	}
	if own != host {
		return errors.New("this does not run in the host's network namespace (hostNetwork: true is missing), and so does not see the host's routes")
	}
	return nil
}

// ownAddress returns those of an address that the host itself has.
func (h Host) ownAddress(ip netip.Addr) ([]assignment, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := h.onHostNetwork(); err != nil {
		return nil, err
	}
	all, err := complete(func() ([]assignment, error) { return listAddresses(make([]byte, dumpSize)) })
	if err != nil {
		return nil, fmt.Errorf("the host's own addresses: %w", err)
	}
	return slices.DeleteFunc(all, func(a assignment) bool { return a.ip != ip }), nil
}

// paths looks for the addresses in the routes and rules of the host's network namespace, and of no other, in all tables. Terway has a
// rule to each address, of priority 512, and one from it, of 2048.
func (h Host) paths(ips []netip.Addr) (hostPaths, error) {
	var found hostPaths
	runtime.LockOSThread() // so that the socket is opened where it was checked
	defer runtime.UnlockOSThread()
	if err := h.onHostNetwork(); err != nil || len(ips) == 0 {
		return found, err
	}
	handle, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return found, err
	}
	defer handle.Close()
	for _, ip := range ips {
		family := unix.AF_INET
		if ip.Is6() {
			family = unix.AF_INET6
		}
		network := &net.IPNet{IP: ip.AsSlice(), Mask: net.CIDRMask(ip.BitLen(), ip.BitLen())}
		routes, err := complete(func() ([]netlink.Route, error) {
			return handle.RouteListFiltered(family, &netlink.Route{Dst: network, Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_DST|netlink.RT_FILTER_TABLE)
		})
		if err != nil {
			return found, fmt.Errorf("the host's routes: %w", err)
		}
		for _, route := range routes {
			if route.Type != unix.RTN_UNICAST || route.LinkIndex == 0 {
				continue
			}
			link, err := handle.LinkByIndex(route.LinkIndex)
			if gone(err) || errors.As(err, new(netlink.LinkNotFoundError)) {
				continue // it went, and the route with it
			}
			if err != nil {
				return found, fmt.Errorf("the host's device %d: %w", route.LinkIndex, err)
			}
			found.routes = append(found.routes, hostRoute{
				ip: ip, device: link.Attrs().Name, table: route.Table, peer: link.Type() == "veth" && link.Attrs().NetNsID >= 0,
			})
		}
		rules, err := complete(func() ([]netlink.Rule, error) { return handle.RuleList(family) })
		if err != nil {
			return found, fmt.Errorf("the host's rules: %w", err)
		}
		for _, rule := range rules {
			for _, of := range []struct {
				word    string
				network *net.IPNet
			}{{"to", rule.Dst}, {"from", rule.Src}} {
				if of.network != nil && of.network.String() == network.String() {
					found.rules = append(found.rules, fmt.Sprintf("rule %d %s %s", rule.Priority, of.word, ip))
				}
			}
		}
	}
	return found, nil
}
