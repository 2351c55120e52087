package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"github.com/moby/sys/mountinfo"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/eni-guard/eni-guard/internal/sandbox"
)

// netnsDir is where runtimes mount the network namespaces they make. /var/run, which they name, is a link to /run.
const netnsDir = "/run/netns"

// podNetns is a network namespace that may still be a pod's.
type podNetns struct {
	name    string // for people: its path, or net:[INODE]
	open    string // the file to enter it by
	sandbox string // the runtime's ID of its sandbox, where it has one
}

// namespaces returns the findings about the network namespaces of a pod: those of its sandboxes, by path, and those
// its live processes are in. A namespace that is open but cannot be read is a finding all the same.
func (h Host) namespaces(ctx context.Context, sandboxes []podSandbox, processes []podProcess, ips []netip.Addr) ([]sandbox.Finding, error) {
	mounts, err := h.namedNamespaces()
	if err != nil {
		return nil, err
	}
	hostNetns, err := h.namespace("net")
	if err != nil {
		return nil, err
	}
	seen := map[string]bool{hostNetns: true}
	var open []podNetns
	var unseen []error
	for _, s := range sandboxes {
		ips = append(slices.Clip(ips), s.ips...)
		ns, inode, err := h.sandboxNamespace(mounts, s)
		if err != nil {
			unseen = append(unseen, err)
		}
		if inode != "" && !seen[inode] {
			seen[inode] = true
			open = append(open, ns)
		}
	}
	for _, p := range processes {
		if p.netns != "" && !seen[p.netns] {
			seen[p.netns] = true
			open = append(open, podNetns{name: p.netns, open: p.netnsFile})
		}
	}

	var findings []sandbox.Finding
	for _, ns := range open {
		findings = append(findings, sandbox.Finding{Kind: sandbox.NetnsOpen, Sandbox: ns.sandbox, Netns: ns.name})
		if ctx.Err() != nil {
			return findings, ctx.Err()
		}
		assigned, err := assignedAddresses(ns.open)
		if gone(err) {
			continue // it went while it was read; the next question will not find it
		}
		if err != nil {
			unseen = append(unseen, fmt.Errorf("reading the addresses in network namespace %s: %w", ns.name, err))
		}
		for _, a := range assigned {
			if slices.Contains(ips, a.ip) {
				findings = append(findings, sandbox.Finding{
					Kind: sandbox.IPAssigned, Sandbox: ns.sandbox, Netns: ns.name, IP: a.ip, Interface: a.device,
				})
			}
		}
	}
	return findings, errors.Join(unseen...)
}

// sandboxNamespace looks for the namespace of a sandbox at the path that the runtime names. The inode is empty when there
// is none; an error means that this cannot be told.
func (h Host) sandboxNamespace(mounts map[string]string, s podSandbox) (ns podNetns, inode string, err error) {
	if s.netnsPath == "" {
		return podNetns{}, "", nil // in the host's network namespace
	}
	path := strings.Replace(filepath.Clean(s.netnsPath), "/var/run/", "/run/", 1)
	ns = podNetns{name: path, open: path, sandbox: s.id}
	if inode, mounted := mounts[path]; mounted {
		return ns, inode, nil
	}
	if below, ok := strings.CutPrefix(path, "/proc/"); ok { // that of a process, as some runtimes name it
		ns.open = filepath.Join(h.Proc, below)
		inode, err := os.Readlink(ns.open)
		if err != nil && !gone(err) {
			return ns, "", fmt.Errorf("network namespace %s: %w", path, err)
		}
		return ns, inode, nil
	}
	if filepath.Dir(path) != netnsDir {
		return ns, "", fmt.Errorf("network namespace %s of sandbox %s is not below %s, so it cannot be told whether it is open", path, sandbox.ShortID(s.id), netnsDir)
	}
	return ns, "", nil
}

// namedNamespaces returns the network namespaces that are mounted on this node, from path to net:[INODE].
//
// The mount table is that of this process. In a container it shows the node's namespaces only if the node's /run/netns
// is mounted there and receives later mounts and unmounts; this is checked, because without it an open namespace would
// look closed.
func (h Host) namedNamespaces() (map[string]string, error) {
	mounts, err := mountinfo.GetMounts(nil)
	if err != nil {
		return nil, fmt.Errorf("mount table: %w", err)
	}
	own, err := os.Readlink("/proc/thread-self/ns/mnt")
	if err != nil {
		return nil, err
	}
	host, err := h.namespace("mnt")
	if err != nil {
		return nil, err
	}
	if own != host && !slices.ContainsFunc(mounts, receivesNamespaces) {
		return nil, fmt.Errorf("the node's %s is not mounted here with propagation from the host (mountPropagation: HostToContainer)", netnsDir)
	}
	if h.Proc == "/proc" && os.Getpid() == 1 {
		// Then process 1, which stands for the host above, is this process itself.
		return nil, errors.New("the agent has a PID namespace of its own (hostPID: true is missing)")
	}
	named := map[string]string{}
	for _, m := range mounts {
		if m.FSType == "nsfs" && strings.HasPrefix(m.Root, "net:[") {
			named[m.Mountpoint] = m.Root
		}
	}
	return named, nil
}

// receivesNamespaces says whether m is the node's /run/netns, as a mount that follows the host's: "shared:N" or
// "master:N" in its optional fields (man 5 proc_pid_mountinfo).
func receivesNamespaces(m *mountinfo.Info) bool {
	return m.Mountpoint == netnsDir && (strings.Contains(m.Optional, "shared:") || strings.Contains(m.Optional, "master:"))
}

// namespace returns the host's own namespace of a kind, such as "net", as KIND:[INODE]: that of process 1. Some machines
// let nobody look at process 1; there the kernel's own process 2 stands in for it, which never leaves the first
// namespaces.
func (h Host) namespace(kind string) (string, error) {
	link, err := os.Readlink(filepath.Join(h.Proc, "1/ns", kind))
	if errors.Is(err, fs.ErrPermission) {
		if name, _ := os.ReadFile(filepath.Join(h.Proc, "2/comm")); string(name) == "kthreadd\n" {
			link, err = os.Readlink(filepath.Join(h.Proc, "2/ns", kind))
		}
	}
	if err != nil {
		return "", fmt.Errorf("the host's own %s namespace: %w", kind, err)
	}
	return link, nil
}

type assignment struct {
	ip     netip.Addr
	device string
}

// socketIn opens a netlink socket in the network namespace behind a file. A thread enters the namespace for that, and
// leaves it again before anything else: a thread that stayed would keep the namespace, and the pod's address in it, alive
// for as long as the agent runs. (Ending the thread instead is no way out, because Go never ends the main thread.)
func socketIn(path string) (*netlink.Handle, error) {
	type result struct {
		handle *netlink.Handle
		err    error
	}
	done := make(chan result)
	go func() {
		runtime.LockOSThread()
		handle, back, err := enterAndOpen(path)
		if back {
			runtime.UnlockOSThread() // otherwise the thread ends with the goroutine, and no other code runs in the namespace
		}
		done <- result{handle, err}
	}()
	r := <-done
	return r.handle, r.err
}

// enterAndOpen does the work of socketIn on the calling thread; back says that the thread is where it was.
func enterAndOpen(path string) (handle *netlink.Handle, back bool, err error) {
	ns, err := netns.GetFromPath(path)
	if err != nil {
		return nil, true, err
	}
	defer ns.Close()
	own, err := netns.Get()
	if err != nil {
		return nil, true, err
	}
	defer own.Close()
	if err := netns.Set(ns); err != nil {
		return nil, true, fmt.Errorf("entering: %w", err)
	}
	handle, err = netlink.NewHandle(unix.NETLINK_ROUTE)
	if returned := netns.Set(own); returned != nil {
		return handle, false, errors.Join(err, fmt.Errorf("leaving: %w", returned))
	}
	return handle, true, err
}

// assignedAddresses lists the addresses on all interfaces of the network namespace behind a file.
func assignedAddresses(path string) ([]assignment, error) {
	handle, err := socketIn(path)
	if err != nil {
		return nil, err
	}
	defer handle.Close()
	links, err := complete(handle.LinkList)
	if err != nil {
		return nil, fmt.Errorf("listing interfaces: %w", err)
	}
	names := map[int]string{}
	for _, link := range links {
		names[link.Attrs().Index] = link.Attrs().Name
	}
	list, err := complete(func() ([]netlink.Addr, error) { return handle.AddrList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return nil, fmt.Errorf("listing addresses: %w", err)
	}
	var assigned []assignment
	for _, a := range list {
		ip, ok := netip.AddrFromSlice(a.IP)
		if !ok {
			return nil, errors.New("the kernel gave an address of no known family")
		}
		assigned = append(assigned, assignment{ip.Unmap(), names[a.LinkIndex]})
	}
	return assigned, nil
}

// complete lists until nothing has changed while it was listed, which the kernel tells (NLM_F_DUMP_INTR): an address that
// is missing from an interrupted list may be there.
func complete[T any](list func() ([]T, error)) ([]T, error) {
	for {
		items, err := list()
		if !errors.Is(err, netlink.ErrDumpInterrupted) {
			return items, err
		}
	}
}
