package main

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// checkConflict fails with an error that wraps EADDRINUSE if a network namespace of the node other than the host's and
// the target has one of the addresses on any device.
//
// This is the answer that the kernel's ipvlan driver gives when Terway sets an address on a pod's device
// (ipvlan_addr_busy, for either family: no two children of one parent may have the same, whatever namespaces they are in). veth devices,
// which this plugin makes for want of ipvlan, have no such rule.
func checkConflict(wanted []netip.Addr, target netns.NsHandle) error {
	targetID, err := namespaceID(target)
	if err != nil {
		return err
	}
	hostID, err := ownNamespaceID()
	if err != nil {
		return err
	}
	namespaces, err := listNamespaces()
	if err != nil {
		return err
	}
	for _, ns := range namespaces {
		if ns.id == targetID || ns.id == hostID {
			continue
		}
		addrs, err := addressesIn(ns)
		if gone(err) {
			continue
		}
		if err != nil {
			return err
		}
		for _, addr := range wanted {
			if slices.Contains(addrs, addr) {
				return fmt.Errorf("set address %s on %s: network namespace %s (%s) has it: %w", addr, podDevice, ns.path, ns.id, unix.EADDRINUSE)
			}
		}
	}
	return nil
}

// addressesIn returns the addresses of all devices in the namespace.
func addressesIn(ns namespace) ([]netip.Addr, error) {
	handle, err := openNamespace(ns.path)
	if err != nil {
		return nil, err
	}
	defer handle.Close()
	socket, err := netlink.NewHandleAt(handle, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("network namespace %s: %w", ns.path, err)
	}
	defer socket.Close()
	for {
		list, err := socket.AddrList(nil, netlink.FAMILY_ALL)
		if errors.Is(err, netlink.ErrDumpInterrupted) { // changed while it was read
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("addresses of network namespace %s: %w", ns.path, err)
		}
		addrs := make([]netip.Addr, 0, len(list))
		for _, entry := range list {
			if addr, ok := netip.AddrFromSlice(entry.IP); ok {
				addrs = append(addrs, addr.Unmap())
			}
		}
		return addrs, nil
	}
}
