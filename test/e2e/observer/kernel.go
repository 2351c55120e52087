// Package observer watches from outside whether a pod's object goes away before its sandbox does: an API watch of the pods
// against the kernel's own view of the node. It shares no code with the guard, and asks it nothing.
package observer

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/moby/sys/mountinfo"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
	"k8s.io/apimachinery/pkg/types"
)

// Sight is what the kernel shows of the node in one look.
type Sight struct {
	// Began and Ended are when the look did. What it has seen was so at some time between the two.
	Began, Ended time.Time
	Processes    []Process
	// Namespaces are the network namespaces that are mounted, without the host's own.
	Namespaces []Namespace
}

// Process is a live process of the host. One that has ended and is not reaped is none, unless a thread of it still runs.
type Process struct {
	ID ProcessID
	// Started is when the process was started, at the latest: the kernel tells it in hundredths of a second.
	Started time.Time
	// Pod is whose cgroup the process is in; empty outside of every pod's.
	Pod types.UID
	// Netns names the network namespace it is in, such as net:[4026532000]; empty if the kernel no longer tells.
	Netns string
}

// ProcessID names a process for good: PIDs alone are reused.
type ProcessID struct {
	PID int
	// Start is when it was started, in ticks of tick since the machine was.
	Start uint64
}

// tick is USER_HZ, the unit of times in /proc, the same on every architecture that Go runs on.
const tick = 10 * time.Millisecond

// Namespace is a network namespace that is mounted.
type Namespace struct {
	// ID is such as net:[4026532000]. The kernel reuses it as soon as the namespace is gone.
	ID string
	// Path is where it is mounted; what a runtime mounts for a sandbox has a random name.
	Path      string
	Addresses []netip.Addr
}

// Look looks at the node. What goes away meanwhile is left out; any other failure is an error, because an observer
// that cannot look sees no violation.
func Look() (Sight, error) {
	sight := Sight{Began: time.Now()}
	host, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		return sight, err
	}
	var up unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &up); err != nil {
		return sight, fmt.Errorf("how long this machine is up: %w", err)
	}
	boot := time.Now().Add(-time.Duration(up.Nano()))
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return sight, err
	}
	for _, dir := range dirs {
		process, alive, err := lookAtProcess(dir)
		if err != nil && !gone(err) {
			return sight, err
		}
		if alive {
			process.Started = boot.Add(time.Duration(process.ID.Start+1) * tick) //nolint:gosec // centuries until it overflows
			sight.Processes = append(sight.Processes, process)
		}
	}
	mounts, err := mountinfo.GetMounts(mountinfo.FSTypeFilter("nsfs"))
	if err != nil {
		return sight, fmt.Errorf("mounted namespaces: %w", err)
	}
	seen := map[string]bool{host: true}
	for _, mount := range mounts {
		if !strings.HasPrefix(mount.Root, "net:[") || seen[mount.Root] {
			continue
		}
		seen[mount.Root] = true
		addresses, err := addressesAt(mount.Mountpoint)
		if err != nil && !gone(err) {
			return sight, fmt.Errorf("network namespace %s: %w", mount.Mountpoint, err)
		}
		sight.Namespaces = append(sight.Namespaces, Namespace{ID: mount.Root, Path: mount.Mountpoint, Addresses: addresses})
	}
	sight.Ended = time.Now()
	return sight, nil
}

var podCgroup = regexp.MustCompile(`/pod([0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12})(/|$|\n)`)

// lookAtProcess reads a process of /proc. In one whose main thread has ended, as after SIGKILL, another thread may
// still be stuck in the kernel: then that one tells.
func lookAtProcess(dir string) (process Process, alive bool, err error) {
	pid, err := strconv.Atoi(filepath.Base(dir))
	if err != nil {
		return process, false, err
	}
	state, start, err := stat(dir)
	if err != nil {
		return process, false, err
	}
	process.ID = ProcessID{PID: pid, Start: start}
	if ended(state) {
		threads, _ := filepath.Glob(dir + "/task/[0-9]*")
		for _, thread := range threads {
			if state, _, err := stat(thread); err == nil && !ended(state) {
				dir, alive = thread, true
			}
		}
		if !alive {
			return process, false, nil
		}
	}
	groups, err := os.ReadFile(dir + "/cgroup")
	if err != nil {
		return process, false, err
	}
	if match := podCgroup.FindSubmatch(groups); match != nil {
		process.Pod = types.UID(match[1])
	}
	process.Netns, err = os.Readlink(dir + "/ns/net")
	if errors.Is(err, fs.ErrPermission) {
		// Process 1 of some machines; no pod's.
		err = nil
	}
	return process, err == nil, err
}

func ended(state string) bool { return state == "Z" || state == "X" }

// stat reads the state of a process or thread, and when it was started: fields 3 and 22 of proc_pid_stat(5).
func stat(dir string) (state string, start uint64, err error) {
	content, err := os.ReadFile(dir + "/stat")
	if err != nil {
		return "", 0, err
	}
	// The name, in brackets, may hold anything.
	fields := strings.Fields(string(content[strings.LastIndexByte(string(content), ')')+1:]))
	if len(fields) < 20 {
		return "", 0, fmt.Errorf("%s/stat is %q", dir, content)
	}
	start, err = strconv.ParseUint(fields[19], 10, 64)
	return fields[0], start, err
}

// addressesAt returns the addresses of all devices of a mounted network namespace.
func addressesAt(path string) ([]netip.Addr, error) {
	// A file system that never answers may be mounted over it: whose file this is, the kernel knows without asking that one.
	var own, file unix.Statx_t
	err := errors.Join(unix.Statx(unix.AT_FDCWD, "/proc/thread-self/ns/net", unix.AT_STATX_DONT_SYNC, unix.STATX_INO, &own),
		unix.Statx(unix.AT_FDCWD, path, unix.AT_STATX_DONT_SYNC, unix.STATX_INO, &file))
	if err != nil {
		return nil, err
	}
	if file.Dev_major != own.Dev_major || file.Dev_minor != own.Dev_minor {
		return nil, fs.ErrNotExist
	}
	handle, err := netns.GetFromPath(path)
	if err != nil {
		return nil, err
	}
	defer handle.Close()
	// Where nothing is mounted any more, the file may still be there.
	var stat unix.Statfs_t
	if err := unix.Fstatfs(int(handle), &stat); err != nil {
		return nil, err
	}
	if stat.Type != unix.NSFS_MAGIC {
		return nil, fs.ErrNotExist
	}
	socket, err := netlink.NewHandleAt(handle, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, err
	}
	defer socket.Close()
	for {
		list, err := socket.AddrList(nil, netlink.FAMILY_ALL)
		if errors.Is(err, netlink.ErrDumpInterrupted) {
			continue
		}
		if err != nil {
			return nil, err
		}
		var addresses []netip.Addr
		for _, entry := range list {
			if address, ok := netip.AddrFromSlice(entry.IP); ok && !address.Unmap().IsLoopback() && !address.IsLinkLocalUnicast() {
				addresses = append(addresses, address.Unmap())
			}
		}
		return addresses, nil
	}
}

func gone(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ESRCH)
}
