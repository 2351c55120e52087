package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/moby/sys/mountinfo"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// namespace is a network namespace and a way to it.
type namespace struct {
	id   string // such as net:[4026532000], from the inode
	path string
}

// listNamespaces returns the network namespaces of the node, each once: those with a name (bind-mounted anywhere this
// process can see), then those that only a thread keeps. Threads, because the main thread of a killed process may have
// ended, and lost its namespace, while another one is still stuck in the kernel.
//
// A namespace that nothing but an open file or a device keeps is not found: the kernel has no list of these.
func listNamespaces() ([]namespace, error) {
	mounts, err := mountinfo.GetMounts(mountinfo.FSTypeFilter("nsfs"))
	if err != nil {
		return nil, fmt.Errorf("list mounts: %w", err)
	}
	var found []namespace
	seen := map[string]bool{}
	add := func(id, path string) {
		if !seen[id] {
			seen[id] = true
			found = append(found, namespace{id: id, path: path})
		}
	}
	for _, mount := range mounts {
		if strings.HasPrefix(mount.Root, "net:[") { // and not of another kind
			add(mount.Root, mount.Mountpoint)
		}
	}
	links, err := filepath.Glob("/proc/[0-9]*/task/[0-9]*/ns/net")
	if err != nil {
		return nil, fmt.Errorf("list threads: %w", err)
	}
	for _, link := range links {
		id, err := os.Readlink(link)
		// What root may not look at is the init process of some sandboxed machines, and no pod's.
		if gone(err) || errors.Is(err, fs.ErrPermission) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("list threads: %w", err)
		}
		add(id, link)
	}
	return found, nil
}

// openNamespace opens a network namespace by path. If there is none (any more), gone is true of the error.
func openNamespace(path string) (netns.NsHandle, error) {
	handle, err := netns.GetFromPath(path)
	if err != nil {
		return netns.None(), fmt.Errorf("network namespace %s: %w", path, err)
	}
	// The file that a namespace was mounted on may still be there without it.
	var stat unix.Statfs_t
	err = unix.Fstatfs(int(handle), &stat)
	if err == nil && stat.Type != unix.NSFS_MAGIC {
		err = fmt.Errorf("not mounted: %w", fs.ErrNotExist)
	}
	if err != nil {
		return netns.None(), errors.Join(fmt.Errorf("network namespace %s: %w", path, err), handle.Close())
	}
	return handle, nil
}

func gone(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH)
}

// namespaceID returns the id of an open namespace.
func namespaceID(handle netns.NsHandle) (string, error) {
	var stat unix.Stat_t
	if err := unix.Fstat(int(handle), &stat); err != nil {
		return "", fmt.Errorf("network namespace: %w", err)
	}
	return fmt.Sprintf("net:[%d]", stat.Ino), nil
}

// ownNamespaceID returns the id of the namespace of the calling thread, which is the host's.
func ownNamespaceID() (string, error) {
	return os.Readlink("/proc/thread-self/ns/net")
}
