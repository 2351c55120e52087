package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/moby/sys/mountinfo"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const (
	killTimeout = 30 * time.Second
	reapTimeout = 10 * time.Second
)

// down removes everything the cluster made outside the checkout: processes, mounts, network namespaces, devices,
// nftables tables, cgroups and directories. It goes by what is there, not by what up remembers, so that it works after
// a crash of any part, and works again after it was interrupted itself.
func down(ctx context.Context) error {
	if err := requireRoot(); err != nil {
		return err
	}
	state, err := readHostState()
	if errors.Is(err, os.ErrNotExist) {
		if len(markedProcesses()) == 0 && len(clusterCgroups()) == 0 {
			say("no cluster is running")
			return os.RemoveAll(dataDir) // of one before the last reboot
		}
		state = &hostState{}
	} else if err != nil {
		return err
	}
	say("stopping the cluster")
	// Each step is tried even when one before it failed: what can go, goes. The state file goes last, only after all
	// of them worked, so that down can be repeated.
	err = errors.Join(
		killAll(ctx),
		removeMounts(),
		removeNetns(state),
		removeLinks(state),
		removeTables(ctx),
		removeCgroups(ctx),
		restoreSysctls(state),
	)
	if err != nil {
		return fmt.Errorf("not everything could be removed (run `make cluster-down` again): %w", err)
	}
	for _, name := range []string{"kubeconfig", "pki", "config", "images"} {
		if state.Config.Repo != "" {
			err = errors.Join(err, os.RemoveAll(filepath.Join(state.Config.Repo, ".cluster", name)))
		}
	}
	if err := errors.Join(err, removeForeignFiles(state), os.RemoveAll(dataDir), os.RemoveAll(runDir)); err != nil {
		return err
	}
	say("the cluster is gone; logs and audit log stay in .cluster")
	return nil
}

// process is a process of the host that up started, directly or not.
type process struct {
	pid   int
	argv0 string
}

// markedProcesses finds the daemons by the mark in their environment.
func markedProcesses() []process {
	var found []process
	files, _ := filepath.Glob("/proc/[0-9]*/environ")
	for _, file := range files {
		environ, err := os.ReadFile(file)
		if err != nil || !slices.Contains(strings.Split(string(environ), "\x00"), processMark) {
			continue // not ours, or gone meanwhile
		}
		dir := filepath.Dir(file)
		pid, err := strconv.Atoi(filepath.Base(dir))
		if err != nil || pid == os.Getpid() {
			continue
		}
		cmdline, _ := os.ReadFile(filepath.Join(dir, "cmdline"))
		argv0, _, _ := bytes.Cut(cmdline, []byte{0})
		found = append(found, process{pid, string(argv0)})
	}
	return found
}

// thawAll lets every frozen group of the cluster go on, also one that somebody has made within a pod's.
func thawAll() error {
	groups, _ := filepath.Glob(cgroupMount + "/freezer/" + cgroupName + "*")
	var errs []error
	var files []string
	for _, group := range groups {
		errs = append(errs, filepath.WalkDir(group, func(path string, entry fs.DirEntry, err error) error {
			if err == nil && entry.Name() == "freezer.state" {
				files = append(files, path)
			}
			return err
		}))
	}
	for _, file := range files {
		errs = append(errs, os.WriteFile(file, []byte("THAWED"), 0o644))
	}
	for n, err := range errs {
		if errors.Is(err, fs.ErrNotExist) {
			errs[n] = nil // the group has just gone
		}
	}
	return errors.Join(errs...)
}

// killAll ends the daemons first, so that nothing is started again, and then every process of the pods. A process that
// hangs in a FUSE file system of the tests is let go by the end of that file system's server, one in a frozen group by
// thawing the group.
func killAll(ctx context.Context) error {
	if err := thawAll(); err != nil {
		return err
	}
	killed := map[int]bool{}
	err := waitFor(ctx, killTimeout, "the cluster's processes to end", func() error {
		var remaining []int
		for _, p := range markedProcesses() {
			remaining = append(remaining, p.pid)
		}
		if len(remaining) == 0 {
			remaining = cgroupProcesses()
		}
		for _, pid := range remaining {
			killed[pid] = true
			if err := unix.Kill(pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
				return err
			}
		}
		if len(remaining) > 0 {
			return fmt.Errorf("still there: %v", remaining)
		}
		return nil
	})
	if err != nil {
		return err
	}
	// Dead is not gone before process 1 has reaped it. That is not in our hands, so it is waited for but not insisted on.
	_ = waitFor(ctx, reapTimeout, "dead processes to be reaped", func() error {
		for pid := range killed {
			if _, err := os.Stat(fmt.Sprintf("/proc/%d", pid)); err == nil {
				return fmt.Errorf("process %d is a zombie", pid)
			}
		}
		return nil
	})
	return nil
}

// clusterCgroups returns the directories of the cluster's groups in all hierarchies, children before parents. Groups
// that tests make beside it carry its name as a prefix.
func clusterCgroups() []string {
	mounts, _, err := cgroupHierarchies()
	if err != nil {
		return nil
	}
	var dirs []string
	for _, mount := range mounts {
		roots, _ := filepath.Glob(filepath.Join(mount, cgroupName+"*"))
		for _, root := range roots {
			_ = filepath.WalkDir(root, func(path string, entry fs.DirEntry, err error) error {
				if err == nil && entry.IsDir() {
					dirs = append(dirs, path)
				}
				return nil
			})
		}
	}
	slices.Reverse(dirs)
	return dirs
}

func cgroupProcesses() []int {
	var pids []int
	for _, dir := range clusterCgroups() {
		content, _ := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
		for field := range strings.FieldsSeq(string(content)) {
			if pid, err := strconv.Atoi(field); err == nil && pid > 0 && !slices.Contains(pids, pid) {
				pids = append(pids, pid)
			}
		}
	}
	return pids
}

func removeCgroups(ctx context.Context) error {
	return waitFor(ctx, killTimeout, "the cluster's cgroups to become empty", func() error {
		var errs []error
		for _, dir := range clusterCgroups() {
			if err := unix.Rmdir(dir); err != nil && !errors.Is(err, unix.ENOENT) {
				errs = append(errs, fmt.Errorf("removing the cgroup %s: %w", dir, err))
			}
		}
		return errors.Join(errs...)
	})
}

// removeMounts detaches every mount below the cluster's directories, the last one first.
func removeMounts() error {
	mounts, err := mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) {
		ours := m.Mountpoint == runDir || m.Mountpoint == dataDir ||
			strings.HasPrefix(m.Mountpoint, runDir+"/") || strings.HasPrefix(m.Mountpoint, dataDir+"/")
		return !ours, false
	})
	if err != nil {
		return err
	}
	slices.Reverse(mounts)
	var errs []error
	for _, m := range mounts {
		if err := unix.Unmount(m.Mountpoint, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) {
			errs = append(errs, fmt.Errorf("unmounting %s: %w", m.Mountpoint, err))
		}
	}
	return errors.Join(errs...)
}

// removeNetns removes the network namespaces that containerd made for pods, and /run/netns itself where up made it and
// nobody else has put a namespace there since.
func removeNetns(state *hostState) error {
	names, err := os.ReadDir(netnsDir)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var since []string // of others, who have put them into the mount that up made
	var errs []error
	for _, entry := range names {
		name := entry.Name()
		if slices.Contains(state.Netns, name) {
			continue
		}
		if !strings.HasPrefix(name, netnsPrefix) {
			since = append(since, name)
			continue
		}
		path := filepath.Join(netnsDir, name)
		if err := unix.Unmount(path, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) {
			errs = append(errs, fmt.Errorf("unmounting %s: %w", path, err))
		}
		if err := os.Remove(path); err != nil {
			errs = append(errs, err)
		}
	}
	if len(errs) > 0 {
		return errors.Join(errs...)
	}
	if len(since) > 0 {
		say("%s stays mounted: somebody else has put %s there", netnsDir, strings.Join(since, ", "))
		return nil
	}
	if state.NetnsMounted {
		// Where /run is shared, as systemd makes it, what is mounted in /run/netns is there twice, and would go from both places.
		if err := unix.Mount("", netnsDir, "", unix.MS_SLAVE|unix.MS_REC, ""); err != nil && !errors.Is(err, unix.EINVAL) {
			return fmt.Errorf("parting %s from what is below it: %w", netnsDir, err)
		}
		if err := unix.Unmount(netnsDir, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) {
			return fmt.Errorf("unmounting %s: %w", netnsDir, err)
		}
	}
	if state.NetnsDirMade {
		return os.Remove(netnsDir)
	}
	return nil
}

// removeLinks removes the bridge and the host sides of the pods' veth pairs.
func removeLinks(state *hostState) error {
	links, err := listLinks()
	if err != nil {
		return err
	}
	var errs []error
	for _, link := range links {
		name := link.Attrs().Name
		if slices.Contains(state.Links, name) || name != bridgeName && !strings.HasPrefix(name, vethPrefix) {
			continue
		}
		// A veth pair goes by itself with its namespace, so it may be gone by now.
		var gone netlink.LinkNotFoundError
		if err := netlink.LinkDel(link); err != nil && !errors.As(err, &gone) && !errors.Is(err, unix.ENODEV) {
			errs = append(errs, fmt.Errorf("removing the device %s: %w", name, err))
		}
	}
	return errors.Join(errs...)
}

func removeTables(ctx context.Context) error {
	var errs []error
	for _, table := range append([][]string{testTable}, proxyTables...) {
		if exec.CommandContext(ctx, "nft", append([]string{"list", "table"}, table...)...).Run() != nil {
			// Whoever interrupts this has not been told that there is no such table.
			errs = append(errs, context.Cause(ctx))
			continue
		}
		if out, err := exec.CommandContext(ctx, "nft", append([]string{"delete", "table"}, table...)...).CombinedOutput(); err != nil {
			errs = append(errs, fmt.Errorf("removing the nftables table %s: %w: %s", strings.Join(table, " "), err, lastLines(string(out), 1)))
		}
	}
	return errors.Join(errs...)
}

func restoreSysctls(state *hostState) error {
	var errs []error
	for file, value := range state.Sysctls {
		errs = append(errs, os.WriteFile(file, []byte(value), 0o644))
	}
	return errors.Join(errs...)
}

// removeForeignFiles removes what the daemons left outside the cluster's own directories: whole directories where there
// were none before, and what can be told apart in the others.
func removeForeignFiles(state *hostState) error {
	var errs []error
	for _, dir := range state.DirsMade {
		errs = append(errs, os.RemoveAll(dir))
	}
	results, _ := filepath.Glob("/var/lib/cni/results/eni-sim-*")
	for _, file := range results {
		id, _, _ := strings.Cut(strings.TrimPrefix(filepath.Base(file), "eni-sim-"), "-")
		loopback, _ := filepath.Glob("/var/lib/cni/results/cni-loopback-" + id + "-*")
		for _, file := range append(loopback, file) {
			errs = append(errs, os.Remove(file))
		}
	}
	links, _ := filepath.Glob("/var/log/containers/*")
	for _, link := range links {
		if target, err := os.Readlink(link); err == nil && strings.HasPrefix(target, dataDir+"/") {
			errs = append(errs, os.Remove(link))
		}
	}
	// A shim that was killed leaves its socket, and nothing in that tells whose it was. Nobody listens on a dead one.
	sockets, _ := filepath.Glob(shimSockets + "/*")
	for _, socket := range sockets {
		conn, err := (&net.Dialer{Timeout: time.Second}).Dial("unix", socket)
		if err == nil {
			errs = append(errs, conn.Close())
		} else if errors.Is(err, unix.ECONNREFUSED) {
			errs = append(errs, os.Remove(socket))
		}
	}
	return errors.Join(errs...)
}
