package main

import (
	"crypto/sha1"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// podDevice is the pod's end of the veth pair.
const podDevice = "eth0"

// gateway and gateway6 are the pod's next hops. The pod has a fixed neighbour entry for each, with the hardware address of
// the host's end. No device has the first; the host's end has the second, so that the host has an address of its own to
// call a pod's IPv6 address from.
var (
	gateway  = netip.MustParseAddr("169.254.1.1")
	gateway6 = netip.MustParseAddr("fe80::1")
)

func gatewayOf(addr netip.Addr) netip.Addr {
	if addr.Is6() {
		return gateway6
	}
	return gateway
}

// hostDeviceName returns the name of the host's end, made as by Terway (pkg/link/veth.go).
func hostDeviceName(namespace, name string) string {
	sum := sha1.Sum([]byte(namespace + "." + name))
	return "cali" + hex.EncodeToString(sum[:])[:11]
}

// connect makes a veth pair between the host and the target namespace, with the addresses and the routes that either
// end needs, and returns both ends. A device of the name hostDevice is removed first. After an error nothing new is left.
func connect(target netns.NsHandle, hostDevice string, addrs []netip.Addr) (host, pod netlink.Link, err error) {
	podSocket, err := netlink.NewHandleAt(target, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, nil, fmt.Errorf("network namespace of the pod: %w", err)
	}
	defer podSocket.Close()
	if err := removeHostDevice(hostDevice); err != nil {
		return nil, nil, err
	}
	attributes := netlink.NewLinkAttrs()
	attributes.Name = hostDevice
	pair := &netlink.Veth{LinkAttrs: attributes, PeerName: podDevice, PeerNamespace: netlink.NsFd(target)}
	if err := netlink.LinkAdd(pair); err != nil {
		return nil, nil, fmt.Errorf("create veth pair %s and %s: %w", hostDevice, podDevice, err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, removeHostDevice(hostDevice))
		}
	}()
	if host, err = netlink.LinkByName(hostDevice); err != nil {
		return nil, nil, fmt.Errorf("find %s: %w", hostDevice, err)
	}
	if pod, err = podSocket.LinkByName(podDevice); err != nil {
		return nil, nil, fmt.Errorf("find %s of the pod: %w", podDevice, err)
	}

	steps := []step{
		{"set " + hostDevice + " up", func() error { return netlink.LinkSetUp(host) }},
		{"set " + podDevice + " up", func() error { return podSocket.LinkSetUp(pod) }},
	}
	for _, addr := range addrs {
		steps = append(steps, addressSteps(podSocket, host, pod, addr)...)
	}
	for _, step := range steps {
		if err := step.do(); err != nil {
			return nil, nil, fmt.Errorf("%s: %w", step.what, err)
		}
	}
	return host, pod, nil
}

// step is a change that connect makes, and what it is for.
type step struct {
	what string
	do   func() error
}

// addressSteps give the pod an address, and either end what it needs to reach the other by it.
func addressSteps(podSocket *netlink.Handle, host, pod netlink.Link, addr netip.Addr) []step {
	address, via := hostNet(addr), gatewayOf(addr)
	podIndex, hostIndex := pod.Attrs().Index, host.Attrs().Index
	var steps []step
	flags := 0
	if addr.Is6() {
		// Without a search for duplicates, an address works at once.
		flags = unix.IFA_F_NODAD
		steps = []step{{"set address " + via.String() + " on " + host.Attrs().Name, func() error {
			return netlink.AddrAdd(host, &netlink.Addr{IPNet: hostNet(via), Flags: flags})
		}}}
	}
	return append(steps,
		step{"set address " + address.String() + " on " + podDevice, func() error {
			return podSocket.AddrAdd(pod, &netlink.Addr{IPNet: address, Flags: flags})
		}},
		step{"set the pod's route to the gateway", func() error {
			return podSocket.RouteAdd(&netlink.Route{LinkIndex: podIndex, Dst: hostNet(via), Scope: netlink.SCOPE_LINK})
		}},
		step{"set the pod's default route", func() error {
			return podSocket.RouteAdd(&netlink.Route{LinkIndex: podIndex, Gw: via.AsSlice(), Flags: int(netlink.FLAG_ONLINK)})
		}},
		step{"set the gateway's hardware address", func() error {
			return podSocket.NeighSet(&netlink.Neigh{LinkIndex: podIndex, IP: via.AsSlice(), HardwareAddr: host.Attrs().HardwareAddr, State: netlink.NUD_PERMANENT})
		}},
		step{"set the host's route to " + address.String(), func() error {
			return netlink.RouteReplace(&netlink.Route{LinkIndex: hostIndex, Dst: address, Scope: netlink.SCOPE_LINK})
		}},
	)
}

// removeHostDevice removes the device, and with it the pod's end and the host's route. A missing one is fine.
func removeHostDevice(name string) error {
	link, err := netlink.LinkByName(name)
	if err == nil {
		err = netlink.LinkDel(link)
	}
	return removed(name, err)
}

// removePodDevice removes the pod's end, and with it the host's. A missing one, or a missing namespace, is fine.
func removePodDevice(path string) error {
	handle, err := openNamespace(path)
	if gone(err) {
		return nil
	}
	if err != nil {
		return err
	}
	defer handle.Close()
	socket, err := netlink.NewHandleAt(handle, unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("network namespace %s: %w", path, err)
	}
	defer socket.Close()
	link, err := socket.LinkByName(podDevice)
	if err == nil {
		err = socket.LinkDel(link)
	}
	return removed(podDevice, err)
}

// removed turns the outcome of looking for and deleting a device into an error, unless the device was missing. It may go
// in between, when its namespace ends.
func removed(name string, err error) error {
	if err == nil || errors.As(err, new(netlink.LinkNotFoundError)) || errors.Is(err, unix.ENODEV) {
		return nil
	}
	return fmt.Errorf("remove %s: %w", name, err)
}

func hostNet(addr netip.Addr) *net.IPNet {
	return &net.IPNet{IP: addr.AsSlice(), Mask: net.CIDRMask(addr.BitLen(), addr.BitLen())}
}
