package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/moby/sys/mountinfo"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/eni-guard/eni-guard/internal/sandbox"
)

// netnsDir is where runtimes mount the network namespaces they make. /var/run, which they name, is a link to /run.
const netnsDir = "/run/netns"

// netNamespace is a network namespace of the node, other than the host's own.
type netNamespace struct {
	id    string   // net:[INODE]
	paths []string // where it is mounted
	tasks []task   // what is in it
	// addresses are those on its interfaces, without those that mean no more than this namespace: loopback, link-local.
	addresses []assignment
	// unread says why its addresses could not be read.
	unread error
}

// name is what people are shown of a namespace.
func (n netNamespace) name() string {
	if len(n.paths) > 0 {
		return n.paths[0]
	}
	return n.id
}

// address returns the assignment of an address, if it has it.
func (n netNamespace) address(ip netip.Addr) (assignment, bool) {
	i := slices.IndexFunc(n.addresses, func(a assignment) bool { return a.ip == ip })
	if i < 0 {
		return assignment{}, false
	}
	return n.addresses[i], true
}

// runtimesName matches the names that runtimes give to the network namespaces they make: cni- and a UUID (containerd), or
// a UUID (CRI-O).
var runtimesName = regexp.MustCompile(`^(cni-)?[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$`)

// madeByARuntime says whether a namespace is mounted where runtimes mount theirs, with a name that they give.
func (n netNamespace) madeByARuntime() bool {
	return slices.ContainsFunc(n.paths, func(path string) bool {
		return filepath.Dir(path) == netnsDir && runtimesName.MatchString(filepath.Base(path))
	})
}

// nodeView is every network namespace of the node but the host's own, as the kernel shows them.
type nodeView struct {
	namespaces []netNamespace
	// host is the id of the host's own.
	host string
}

// namespace returns the namespace with an id.
func (v nodeView) namespace(id string) (netNamespace, bool) {
	i := slices.IndexFunc(v.namespaces, func(n netNamespace) bool { return n.id == id })
	if i < 0 {
		return netNamespace{}, false
	}
	return v.namespaces[i], true
}

// mountedAt returns the id of the namespace that is mounted at path; empty when none is.
func (v nodeView) mountedAt(path string) string {
	i := slices.IndexFunc(v.namespaces, func(n netNamespace) bool { return slices.Contains(n.paths, path) })
	if i < 0 {
		return ""
	}
	return v.namespaces[i].id
}

// view finds the network namespaces of the node: those that are mounted somewhere, and those that tasks are in; and reads
// the addresses in them. A namespace that ends meanwhile is left out. A quick look is at those that are mounted in the directory of
// the runtimes.
//
// What nothing but an open file or a socket keeps is not found, nor what is mounted in another mount namespace alone: the kernel has
// no list of these. See Host.paths.
func (h Host) view(ctx context.Context, how depth) (v nodeView, processErr, netnsErr error) {
	if v.host, netnsErr = h.namespace("net"); netnsErr != nil {
		return v, netnsErr, netnsErr // then nothing that is found can be told from the host
	}
	list := h.mountedNamespaces
	if how == quick {
		list = runtimesNamespaces
	}
	mounts, netnsErr := list()
	if netnsErr != nil {
		return v, nil, netnsErr
	}
	delete(mounts, v.host)
	v.namespaces = make([]netNamespace, 0, len(mounts))
	for id, paths := range mounts {
		slices.Sort(paths)
		v.namespaces = append(v.namespaces, netNamespace{id: id, paths: paths})
	}
	// Those that are mounted can be entered while the processes are looked at.
	var entering sync.WaitGroup
	var enterErr error
	entering.Go(func() { enterErr = h.readAddresses(ctx, v.namespaces) })
	var tasks map[string][]task
	if how == thorough {
		tasks, processErr = h.tasks(ctx)
	}
	entering.Wait()
	delete(tasks, v.host)
	var unmounted []netNamespace
	for id, in := range tasks {
		if i := slices.IndexFunc(v.namespaces, func(n netNamespace) bool { return n.id == id }); i >= 0 {
			v.namespaces[i].tasks = in
		} else {
			unmounted = append(unmounted, netNamespace{id: id, tasks: in})
		}
	}
	lost := slices.DeleteFunc(slices.Clone(v.namespaces), func(n netNamespace) bool { return !gone(n.unread) })
	v.namespaces = slices.DeleteFunc(v.namespaces, func(n netNamespace) bool { return gone(n.unread) })
	if how == thorough {
		found, listErr, readErr := h.follow(ctx, slices.Concat(unmounted, lost))
		v.namespaces = append(v.namespaces, found...)
		processErr, enterErr = errors.Join(processErr, listErr), errors.Join(enterErr, readErr)
	}
	slices.SortFunc(v.namespaces, func(a, b netNamespace) int { return strings.Compare(a.name(), b.name()) })
	unread := []error{enterErr}
	for _, n := range v.namespaces {
		if n.unread != nil {
			unread = append(unread, fmt.Errorf("reading the addresses in network namespace %s: %w", n.name(), n.unread))
		}
	}
	return v, processErr, errors.Join(unread...)
}

// follow reads the addresses in namespaces that tasks are in, or that have lost their mount since they were seen, and returns those that
// have not ended.
func (h Host) follow(ctx context.Context, namespaces []netNamespace) (left []netNamespace, processErr, err error) {
	left, processErr, err = h.readOccupied(ctx, slices.Clone(namespaces))
	mounted, mountErr := h.mountedNow(ctx, slices.DeleteFunc(namespaces, func(n netNamespace) bool {
		return slices.ContainsFunc(left, func(l netNamespace) bool { return l.id == n.id })
	}))
	return append(left, mounted...), processErr, errors.Join(err, mountErr)
}

// readOccupied does that with those that tasks are in. That all the tasks that were listed for one have ended says nothing of those that
// they have left in it, children or threads: these are looked for once more.
func (h Host) readOccupied(ctx context.Context, namespaces []netNamespace) (left []netNamespace, processErr, err error) {
	err = h.readAddresses(ctx, namespaces)
	ended := func(n netNamespace) bool { return gone(n.unread) }
	if !slices.ContainsFunc(namespaces, ended) {
		return namespaces, nil, err
	}
	tasks, processErr := h.tasks(ctx)
	var again []netNamespace
	for _, n := range namespaces {
		if in := tasks[n.id]; ended(n) && len(in) > 0 {
			again = append(again, netNamespace{id: n.id, tasks: in})
		}
	}
	err = errors.Join(err, h.readAddresses(ctx, again))
	for i := range again {
		if ended(again[i]) {
			again[i].unread = errors.New("what is in it ends before it can be followed there")
		}
	}
	return append(slices.DeleteFunc(namespaces, ended), again...), processErr, err
}

const coveredNamespace = "something else covers it"

// mountedNow returns those of the namespaces that could not be entered, nor by what was in them, and are mounted all the same: they have just
// been mounted; or something else is mounted over them, so that their path leads elsewhere, or was over all of /run/netns when this container
// was given it. Those have not ended.
func (h Host) mountedNow(ctx context.Context, lost []netNamespace) ([]netNamespace, error) {
	if len(lost) == 0 {
		return nil, nil
	}
	mounts, err := h.mountedNamespaces()
	var found []netNamespace
	for _, n := range lost {
		if paths := mounts[n.id]; len(paths) > 0 {
			found = append(found, netNamespace{id: n.id, paths: paths})
		}
	}
	err = errors.Join(err, h.readAddresses(ctx, found))
	for i := range found {
		if n := &found[i]; gone(n.unread) {
			n.unread = fmt.Errorf("it is mounted at %s, but %s, or did when the agent started", n.paths[0], coveredNamespace)
		}
	}
	return found, err
}

// runtimesNamespaces returns the network namespaces that are mounted in the directory of the runtimes, from net:[INODE] to path.
func runtimesNamespaces() (map[string][]string, error) {
	nsfs, err := identify(unix.AT_FDCWD, "/proc/thread-self/ns/net")
	if err != nil {
		return nil, err
	}
	directory, err := os.Open(netnsDir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer directory.Close()
	names, err := directory.Readdirnames(-1)
	if err != nil {
		return nil, err
	}
	mounted := make(map[string][]string, len(names))
	for _, name := range names {
		file, err := identify(int(directory.Fd()), name)
		if err != nil || file.Dev_major != nsfs.Dev_major || file.Dev_minor != nsfs.Dev_minor {
			continue // gone, or a file on which no namespace is mounted
		}
		id := namespaceID(file)
		mounted[id] = append(mounted[id], filepath.Join(netnsDir, name))
	}
	return mounted, nil
}

// identify returns device and inode of a file as the kernel has them, without asking the file system: a dead one, NFS or FUSE, may be
// mounted over a namespace, and would never answer.
func identify(directory int, path string) (file unix.Statx_t, err error) {
	err = unix.Statx(directory, path, unix.AT_EMPTY_PATH|unix.AT_STATX_DONT_SYNC, unix.STATX_INO, &file)
	return file, err
}

// namespaceID is how the kernel writes the namespace behind a file. That it is one for the network, entering it tells.
func namespaceID(file unix.Statx_t) string { return "net:[" + strconv.FormatUint(file.Ino, 10) + "]" }

// mountedNamespaces returns the network namespaces that are mounted on this node, from net:[INODE] to paths.
//
// The mount table is that of this process. In a container it shows the node's namespaces only if the node's /run/netns
// is mounted there and receives later mounts and unmounts; this is checked, because without it an open namespace would
// look closed. What was covered on the node when the container was given it is in the node's own table alone, that of process 1.
func (h Host) mountedNamespaces() (map[string][]string, error) {
	own, err := os.Readlink(filepath.Join(h.Proc, "thread-self/ns/mnt"))
	if err != nil {
		return nil, err
	}
	host, err := h.namespace("mnt")
	if err != nil {
		return nil, err
	}
	var mounts, hosts []*mountinfo.Info
	if own != host { // before this process's own: what is mounted meanwhile then shows in that
		if hosts, err = h.mounts("1", mountinfo.PrefixFilter(netnsDir)); err != nil {
			return nil, err
		}
	}
	if mounts, err = h.mounts("thread-self", nil); err != nil {
		return nil, err
	}
	if own != host && !slices.ContainsFunc(mounts, receivesNamespaces) {
		return nil, fmt.Errorf("the node's %s %s (mountPropagation: HostToContainer), or has been unmounted there since", netnsDir, notFollowing)
	}
	if h.Proc == "/proc" && os.Getpid() == 1 {
		// Then process 1, which stands for the host above, is this process itself.
		return nil, errors.New("the agent has a PID namespace of its own (hostPID: true is missing)")
	}
	mounted := map[string][]string{}
	for _, m := range slices.Concat(mounts, hosts) {
		if m.FSType == "nsfs" && strings.HasPrefix(m.Root, "net:[") && !slices.Contains(mounted[m.Root], m.Mountpoint) {
			mounted[m.Root] = append(mounted[m.Root], m.Mountpoint)
		}
	}
	return mounted, nil
}

// mounts reads the mount table of a process, as far as filter does not leave it out.
func (h Host) mounts(process string, filter mountinfo.FilterFunc) ([]*mountinfo.Info, error) {
	table, err := os.Open(filepath.Join(h.Proc, process, "mountinfo"))
	if err != nil {
		return nil, fmt.Errorf("mount table: %w", err)
	}
	defer table.Close()
	mounts, err := mountinfo.GetMountsFromReader(table, filter)
	if err != nil {
		return nil, fmt.Errorf("mount table of process %s: %w", process, err)
	}
	return mounts, nil
}

const notFollowing = "is not mounted here with propagation from the host"

// receivesNamespaces says whether m is the node's /run/netns, as a mount that follows the host's: "shared:N" or
// "master:N" in its optional fields (man 5 proc_pid_mountinfo).
func receivesNamespaces(m *mountinfo.Info) bool {
	return m.Mountpoint == netnsDir && (strings.Contains(m.Optional, "shared:") || strings.Contains(m.Optional, "master:"))
}

// cleanNetnsPath is a path of a runtime as the mount table has it.
func cleanNetnsPath(path string) string {
	if path == "" {
		return ""
	}
	return strings.Replace(filepath.Clean(path), "/var/run/", "/run/", 1)
}

// sandboxNamespace returns the id of the network namespace at the path that the runtime names for a sandbox. It is empty when
// there is none any more, or when it is the host's; an error means that this cannot be told.
func (h Host) sandboxNamespace(v nodeView, s podSandbox) (string, error) {
	if s.netnsPath == "" {
		return "", nil // in the host's network namespace
	}
	if id := v.mountedAt(s.netnsPath); id != "" {
		return id, nil
	}
	if below, ok := strings.CutPrefix(s.netnsPath, "/proc/"); ok { // that of a process, as some runtimes name it
		id, err := os.Readlink(filepath.Join(h.Proc, below))
		if gone(err) || id == v.host {
			return "", nil
		}
		if err != nil {
			return "", fmt.Errorf("network namespace %s: %w", s.netnsPath, err)
		}
		return id, nil
	}
	if filepath.Dir(s.netnsPath) != netnsDir {
		return "", fmt.Errorf("network namespace %s of sandbox %s is not below %s, so it cannot be told whether it is open", s.netnsPath, s.shortID(), netnsDir)
	}
	return "", nil
}

// readAddresses goes into one namespace after the other and reads the addresses there. The thread that does it leaves them
// again at the end: one that stayed would keep the namespace, and the pod's address in it, alive for as long as the agent
// runs. (Ending the thread instead is no way out, because Go never ends the main thread.)
func (h Host) readAddresses(ctx context.Context, namespaces []netNamespace) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		back, err := h.visit(ctx, namespaces)
		if back {
			runtime.UnlockOSThread() // otherwise the thread ends with the goroutine, and no other code runs in the namespace
		}
		done <- err
	}()
	return <-done
}

// visit does the work of readAddresses on the calling thread; back says that the thread is where it was.
func (h Host) visit(ctx context.Context, namespaces []netNamespace) (back bool, err error) {
	defer onThread(ctx, sandbox.ProbeNetns)()
	own, err := netns.Get()
	if err != nil {
		return true, err
	}
	defer own.Close()
	buffer := dumps.Get().(*[dumpSize]byte)
	defer dumps.Put(buffer)
	for i := range namespaces {
		if err = ctx.Err(); err != nil {
			break
		}
		n := &namespaces[i]
		n.addresses, n.unread = addressesIn(h.files(*n), n.id, buffer[:])
	}
	if returned := netns.Set(own); returned != nil {
		return false, errors.Join(err, fmt.Errorf("leaving a network namespace: %w", returned))
	}
	return true, err
}

// files lists the ways into a namespace.
func (h Host) files(n netNamespace) []string {
	files := slices.Clone(n.paths)
	for _, t := range n.tasks {
		files = append(files, h.task(t.pid, t.tid, "ns/net"))
	}
	return files
}

// addressesIn takes the calling thread into the namespace with the given id, by the first of files that still leads there,
// and lists the addresses on all interfaces. The thread stays there. gone is true of the error when no file does.
func addressesIn(files []string, id string, buffer []byte) ([]assignment, error) {
	err := fs.ErrNotExist
	for _, file := range files {
		if err = enter(file, id); !gone(err) {
			break
		}
	}
	if err != nil {
		return nil, err
	}
	return complete(func() ([]assignment, error) { return listAddresses(buffer) })
}

// enter takes the calling thread into the network namespace behind a file, if it is the one with the given id: a path may
// have been unmounted or covered, a process ended and its number given to another, since the namespace was seen there. Only then is the
// file opened; what else is there may be a dead mount.
func enter(file, id string) error {
	place, err := unix.Open(file, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return &fs.PathError{Op: "open", Path: file, Err: err}
	}
	defer unix.Close(place)
	found, err := identify(place, "")
	if err != nil {
		return err
	}
	if namespaceID(found) != id {
		return fs.ErrNotExist
	}
	ns, err := netns.GetFromPath("/proc/thread-self/fd/" + strconv.Itoa(place))
	if err != nil {
		return err
	}
	defer ns.Close()
	if err := netns.Set(ns); err != nil {
		return fmt.Errorf("entering: %w", err)
	}
	return nil
}
