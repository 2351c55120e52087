package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// podMembers is what the cgroups of a pod show.
type podMembers struct {
	// exist says that the pod has a cgroup. The kubelet makes it before the first sandbox, and removes it when the pod has
	// ended (pkg/kubelet: SyncPod, SyncTerminatedPod).
	exist bool
	// groups are its directories, and pids the processes in any of them.
	groups []string
	pids   []int
}

// members lists the processes in the cgroups of a pod. With cgroup version 1 a process counts when it is in the pod's group
// of any hierarchy: moving it out of one does not hide it. A quick look is into one hierarchy only.
func (h Host) members(ctx context.Context, uid string, how depth) (podMembers, error) {
	root := h.Cgroup
	if how == quick {
		root = h.oneHierarchy()
	}
	groups, err := h.podCgroups(ctx, root, func(of string) bool { return of == uid })
	if err != nil {
		return podMembers{}, err
	}
	pids, err := cgroupPIDs(ctx, groups[uid])
	return podMembers{exist: len(groups) > 0, groups: groups[uid], pids: pids}, err
}

// oneHierarchy returns the root of a hierarchy that the kubelet uses.
func (h Host) oneHierarchy() string {
	if _, err := os.Stat(filepath.Join(h.Cgroup, "cgroup.controllers")); err == nil {
		return h.Cgroup // version 2 has one only
	}
	for _, controller := range []string{"pids", "memory", "cpu"} {
		root := filepath.Join(h.Cgroup, controller)
		if info, err := os.Stat(root); err == nil && info.IsDir() {
			return root
		}
	}
	return h.Cgroup
}

// allMembers lists the processes in the cgroups of all pods, by UID.
func (h Host) allMembers(ctx context.Context) (map[string][]int, error) {
	groups, err := h.podCgroups(ctx, h.Cgroup, func(string) bool { return true })
	if err != nil {
		return nil, err
	}
	members := map[string][]int{}
	for uid, paths := range groups {
		if members[uid], err = cgroupPIDs(ctx, paths); err != nil {
			return members, err
		}
	}
	return members, nil
}

// podCgroups finds the directories of the cgroups of pods below root. It does not descend into the groups of pods, nor
// into systemd's units, below which no kubelet keeps its pods; so its cost grows with the pods of the node, not with their
// containers, nor with the daemons of the host.
//
// The cgroups of some pod must be there to see, if only the agent's own: otherwise this is not the host's hierarchy,
// and finding nothing would prove nothing.
func (h Host) podCgroups(ctx context.Context, root string, wanted func(uid string) bool) (map[string][]string, error) {
	found := map[string][]string{}
	anyPod := false
	err := filepath.WalkDir(root, func(path string, entry fs.DirEntry, err error) error {
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case errors.Is(err, fs.ErrNotExist) && path != root:
			return nil // removed while it was read
		case err != nil:
			return err
		case !entry.IsDir():
			return nil
		case unit(entry.Name()):
			return fs.SkipDir
		}
		of, ok := podOfCgroup(entry.Name())
		if !ok && leaf(entry) {
			return fs.SkipDir
		}
		if !ok {
			return nil
		}
		anyPod = true
		if wanted(of) {
			found[of] = append(found[of], path)
		}
		return fs.SkipDir
	})
	if err != nil {
		return nil, fmt.Errorf("looking for the cgroups of pods below %s: %w", root, err)
	}
	if !anyPod {
		return nil, fmt.Errorf("no pod has a cgroup below %s: this is not the node's cgroup hierarchy", root)
	}
	return found, nil
}

// leaf says whether a cgroup has none below it: the directory then has two links (fs/kernfs/inode.c, kernfs_refresh_inode). To read the
// directory instead would be to read the names of dozens of files, in each hierarchy of version 1.
func leaf(entry fs.DirEntry) bool {
	info, err := entry.Info()
	if err != nil {
		return false
	}
	stat, ok := info.Sys().(*syscall.Stat_t)
	return ok && stat.Nlink == 2
}

// unit says whether a cgroup is that of a systemd unit of one of the kinds that hold no slices.
func unit(name string) bool {
	return slices.Contains([]string{".service", ".mount", ".socket", ".swap"}, filepath.Ext(name))
}

// podOfCgroup returns the UID of the pod whose cgroup a directory is: pod<UID> with the cgroupfs driver,
// kubepods-<class>-pod<UID with underscores>.slice with systemd's (kubelet: pkg/kubelet/cm, GetPodContainerNameForDriver).
// Static pods have a hash without dashes as UID. Below a cgroup root of the kubelet's own, systemd's names start with that
// root's.
func podOfCgroup(name string) (uid string, ok bool) {
	i := strings.LastIndex(name, "pod") // no UID has these letters
	if i < 0 || i > 0 && name[i-1] != '-' {
		return "", false
	}
	uid = name[i+len("pod"):]
	uid = strings.TrimSuffix(uid, ".slice")
	switch len(uid) {
	case 32:
		return uid, strings.Trim(uid, "0123456789abcdef") == ""
	case 36:
		if strings.Trim(uid, "0123456789abcdef-_") != "" {
			return "", false
		}
		return strings.ReplaceAll(uid, "_", "-"), true
	}
	return "", false
}

// cgroupPIDs reads cgroup.procs of the groups and of everything below them. The kernel leaves zombies out of it, but
// lists the dead leader of a process that has a live thread.
func cgroupPIDs(ctx context.Context, groups []string) ([]int, error) {
	var pids []int
	for _, group := range groups {
		err := filepath.WalkDir(group, func(path string, entry fs.DirEntry, err error) error {
			switch {
			case ctx.Err() != nil:
				return ctx.Err()
			case errors.Is(err, fs.ErrNotExist):
				return nil
			case err != nil:
				return err
			case !entry.IsDir():
				return nil
			}
			content, err := os.ReadFile(filepath.Join(path, "cgroup.procs"))
			// A threaded group has no list of its own: its processes are in that of the group above (kernel/cgroup/cgroup.c,
			// __cgroup_procs_start).
			if gone(err) || errors.Is(err, unix.EOPNOTSUPP) {
				return nil
			}
			if err != nil {
				return err
			}
			for field := range strings.FieldsSeq(string(content)) {
				pid, err := strconv.Atoi(field)
				if err != nil {
					return fmt.Errorf("%s/cgroup.procs: %w", path, err)
				}
				if pid == 0 {
					return fmt.Errorf("%s/cgroup.procs has a process of another PID namespace: the agent does not run in the host's", path)
				}
				pids = append(pids, pid)
			}
			if leaf(entry) {
				return fs.SkipDir
			}
			return nil
		})
		if err != nil {
			return nil, fmt.Errorf("reading the pod's processes: %w", err)
		}
	}
	slices.Sort(pids)
	return slices.Compact(pids), nil
}
