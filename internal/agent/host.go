package agent

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
)

// Host is where the node's /proc and cgroup hierarchies are seen: the real ones, or recorded ones in a test.
type Host struct {
	Proc   string // "/proc" of the host's PID namespace
	Cgroup string // "/sys/fs/cgroup"
}

// depth says how much is looked at.
type depth int

const (
	// quick looks where something of a pod usually is: what it finds binds, and what it does not find says nothing.
	quick depth = iota
	// thorough looks everywhere.
	thorough
)

// realNode is the host this runs on.
var realNode = Host{Proc: "/proc", Cgroup: "/sys/fs/cgroup"}

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

// gone says whether an error means that a process, a group or a namespace ended while it was read.
func gone(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ESRCH) || errors.Is(err, syscall.ENODEV)
}
