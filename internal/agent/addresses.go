package agent

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// assignment is an address on an interface.
type assignment struct {
	ip     netip.Addr
	device string
}

// dumpSize is what the kernel fills at most of a part of a list (net/netlink/af_netlink.c, netlink_dump).
const dumpSize = 32 << 10

// dumps are buffers of that size: a new one for every question would be much of its garbage.
var dumps = sync.Pool{New: func() any { return new([dumpSize]byte) }}

// dumpTimeout is how long the kernel may take to list the addresses of one namespace.
const dumpTimeout = 5 * time.Second

// listAddresses asks the kernel for the addresses of the namespace that the calling thread is in (man 7 rtnetlink,
// RTM_GETADDR). It does so itself, because this is done in every namespace for every question, and the library that is used
// elsewhere takes five times as long for it.
func listAddresses(buffer []byte) (assigned []assignment, err error) {
	socket, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, err
	}
	defer unix.Close(socket)
	// The kernel answers at once, or something is wrong with it; then this must not hang for ever.
	timeout := unix.NsecToTimeval(int64(dumpTimeout))
	if err := unix.SetsockoptTimeval(socket, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout); err != nil {
		return nil, err
	}
	return listOn(socket, buffer)
}

// listOn does so on a netlink socket.
func listOn(socket int, buffer []byte) (assigned []assignment, err error) {
	request := make([]byte, unix.SizeofNlMsghdr+unix.SizeofIfAddrmsg)
	binary.NativeEndian.PutUint32(request[0:], uint32(len(request))) //nolint:gosec // 24
	binary.NativeEndian.PutUint16(request[4:], unix.RTM_GETADDR)
	binary.NativeEndian.PutUint16(request[6:], unix.NLM_F_REQUEST|unix.NLM_F_DUMP)
	if err := unix.Sendto(socket, request, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return nil, err
	}
	names := map[uint32]string{}
	for {
		n, from, err := unix.Recvfrom(socket, buffer, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return nil, err
		}
		// What is in the namespace may send something too, if it has NET_ADMIN there. The kernel has port 0.
		if sender, ok := from.(*unix.SockaddrNetlink); !ok || sender.Pid != 0 {
			continue
		}
		some, done, err := readDump(buffer[:n], names)
		if err != nil {
			return nil, err
		}
		if assigned = append(assigned, some...); done {
			return assigned, nil
		}
	}
}

// readDump reads one part of the kernel's list of addresses; done says that it is the last one. The error is
// netlink.ErrDumpInterrupted where something has changed since the list was begun.
func readDump(part []byte, names map[uint32]string) (assigned []assignment, done bool, err error) {
	for len(part) > 0 {
		var m message
		if m, part, err = cutMessage(part); err != nil {
			return nil, false, err
		}
		switch {
		case m.flags&unix.NLM_F_DUMP_INTR != 0:
			return nil, false, netlink.ErrDumpInterrupted
		case m.kind == unix.NLMSG_DONE, m.kind == unix.NLMSG_ERROR:
			// Both begin with an error number, which is 0 where there is none.
			if len(m.data) < 4 {
				return nil, false, errCutOff
			}
			if number := int32(binary.NativeEndian.Uint32(m.data)); number < 0 { //nolint:gosec // as the kernel has it
				return nil, false, fmt.Errorf("listing addresses: %w", syscall.Errno(-number))
			}
			return assigned, true, nil
		case m.kind != unix.RTM_NEWADDR:
			continue
		}
		a, err := readAddress(m.data, names)
		if err != nil {
			return nil, false, err
		}
		if !a.ip.IsLoopback() && !a.ip.IsLinkLocalUnicast() {
			assigned = append(assigned, a)
		}
	}
	return assigned, false, nil
}

// message is one of netlink (struct nlmsghdr, and what follows it).
type message struct {
	kind, flags uint16
	data        []byte
}

var errCutOff = errors.New("the kernel's answer is cut off")

// cutMessage takes the first message off a part of a list. Like cutAttribute it leaves no garbage, which syscall.ParseNetlinkMessage
// and syscall.ParseNetlinkRouteAttr would in every namespace for every question.
func cutMessage(part []byte) (m message, rest []byte, err error) {
	if len(part) < unix.SizeofNlMsghdr {
		return m, nil, errCutOff
	}
	length := uint64(binary.NativeEndian.Uint32(part))
	if length < unix.SizeofNlMsghdr || length > uint64(len(part)) {
		return m, nil, errCutOff
	}
	m = message{binary.NativeEndian.Uint16(part[4:]), binary.NativeEndian.Uint16(part[6:]), part[unix.SizeofNlMsghdr:length]}
	return m, afterPadding(part, length), nil
}

// cutAttribute takes the first attribute (struct rtattr) off those of a message.
func cutAttribute(attributes []byte) (kind uint16, value, rest []byte, err error) {
	if len(attributes) < unix.SizeofRtAttr {
		return 0, nil, nil, errCutOff
	}
	length := uint64(binary.NativeEndian.Uint16(attributes))
	if length < unix.SizeofRtAttr || length > uint64(len(attributes)) {
		return 0, nil, nil, errCutOff
	}
	return binary.NativeEndian.Uint16(attributes[2:]), attributes[unix.SizeofRtAttr:length], afterPadding(attributes, length), nil
}

// afterPadding is what follows the first length bytes: messages and attributes begin at multiples of four (NLMSG_ALIGN, RTA_ALIGN).
func afterPadding(all []byte, length uint64) []byte {
	return all[min((length+3)&^3, uint64(len(all))):]
}

var errNoFamily = errors.New("the kernel gave an address of no known family")

// readAddress reads one message about an address (struct ifaddrmsg, and its attributes). names are those of interfaces that are known
// already.
func readAddress(data []byte, names map[uint32]string) (a assignment, err error) {
	if len(data) < unix.SizeofIfAddrmsg {
		return a, errCutOff
	}
	index := binary.NativeEndian.Uint32(data[4:]) // ifa_index
	for attributes := data[unix.SizeofIfAddrmsg:]; len(attributes) > 0; {
		var kind uint16
		var value []byte
		if kind, value, attributes, err = cutAttribute(attributes); err != nil {
			return a, err
		}
		switch kind {
		case unix.IFA_LOCAL, unix.IFA_ADDRESS:
			// Of a point-to-point interface the second one is the peer's.
			if ip, ok := netip.AddrFromSlice(value); ok && (kind == unix.IFA_LOCAL || !a.ip.IsValid()) {
				a.ip = ip.Unmap()
			}
		case unix.IFA_LABEL: // of IPv4 addresses
			names[index] = strings.TrimRight(string(value), "\x00")
		}
	}
	if !a.ip.IsValid() {
		return a, errNoFamily
	}
	if _, known := names[index]; !known && !a.ip.IsLoopback() && !a.ip.IsLinkLocalUnicast() {
		if device, err := net.InterfaceByIndex(int(index)); err == nil { // in the namespace of this thread
			names[index] = device.Name
		}
	}
	a.device = names[index]
	return a, nil
}

// maxDumps is how often a list is begun anew because something has changed meanwhile.
const maxDumps = 20

// complete lists until nothing has changed while it was listed, which the kernel tells (NLM_F_DUMP_INTR): an address that
// is missing from an interrupted list may be there. Where something changes all the time, it gives up.
func complete[T any](list func() ([]T, error)) ([]T, error) {
	for range maxDumps {
		items, err := list()
		if !errors.Is(err, netlink.ErrDumpInterrupted) {
			return items, err
		}
	}
	return nil, fmt.Errorf("the network has changed %d times while the kernel listed it", maxDumps)
}
