package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/moby/sys/mountinfo"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const (
	hostStateFile   = runDir + "/host.json"
	cgroupMount     = "/sys/fs/cgroup"
	ipForwardSysctl = "/proc/sys/net/ipv4/ip_forward"
	shimSockets     = "/run/containerd/s"
	// vethPrefix starts the name of every host side of a pod's veth pair, as Terway names it.
	vethPrefix = "cali"
	// netnsPrefix starts the name of every network namespace that containerd makes for CNI.
	netnsPrefix = "cni-"
)

// proxyTables are the nftables tables of kube-proxy in nftables mode.
var proxyTables = [][]string{{"ip", "kube-proxy"}, {"ip6", "kube-proxy"}}

// testTable is the nftables table by which test/e2e/chaos disturbs the network.
var testTable = []string{"inet", "eni-guard-test"}

// sysctls are the kernel settings that up or a kubelet changes (kubelet: setupKernelTunables).
var sysctls = []string{
	ipForwardSysctl,
	"/proc/sys/vm/overcommit_memory", "/proc/sys/vm/panic_on_oom", "/proc/sys/kernel/panic", "/proc/sys/kernel/panic_on_oops",
	"/proc/sys/kernel/keys/root_maxkeys", "/proc/sys/kernel/keys/root_maxbytes",
}

// foreignDirs are directories outside the cluster's own that its daemons make: libcni's cache, containerd's shims and
// plugins, the kubelet's plugins and links to logs.
var foreignDirs = []string{
	"/var/lib/cni", "/run/containerd", "/opt/containerd", "/usr/libexec/kubernetes", "/var/lib/kubelet", "/var/log/containers",
}

// hostState remembers what the machine was like before the cluster, so that down can put it back and touches nothing
// that was there before.
type hostState struct {
	Config struct {
		Repo, Kubernetes, Containerd, GCPeriod string
		PoolSize                               int
	}
	Sysctls      map[string]string // by file
	DirsMade     []string          // those of foreignDirs that did not exist
	NetnsDirMade bool              // /run/netns did not exist
	NetnsMounted bool              // /run/netns was bound on itself by up
	Netns        []string          // named namespaces before
	Links        []string          // network devices before
}

func readHostState() (*hostState, error) {
	content, err := os.ReadFile(hostStateFile)
	if err != nil {
		return nil, err
	}
	var state hostState
	if err := json.Unmarshal(content, &state); err != nil {
		return nil, fmt.Errorf("%s: %w (remove the file after cleaning up by hand)", hostStateFile, err)
	}
	return &state, nil
}

// config returns what the cluster was asked for, as far as it matters to one that runs.
func (s *hostState) config() config {
	return config{repo: s.Config.Repo, kubernetes: s.Config.Kubernetes, containerd: s.Config.Containerd, poolSize: s.Config.PoolSize}
}

// answerTimeout is how long a daemon that runs may give no good answer: on a busy machine etcd waits for the disk, and the others for etcd.
const answerTimeout = 30 * time.Second

// dead names a daemon of the cluster that does not run or does not answer; empty when all do.
func (s *hostState) dead(ctx context.Context) string {
	processes := markedProcesses()
	for _, stage := range stages(s.config()) {
		for _, c := range stage {
			runs := slices.ContainsFunc(processes, func(p process) bool { return p.argv0 == c.path })
			if !runs || waitFor(ctx, answerTimeout, c.name+" to answer", func() error { return c.check(ctx) }) != nil {
				return c.name
			}
		}
	}
	return ""
}

// sameAs says whether the running cluster is the one that is asked for.
func (s *hostState) sameAs(cfg config) error {
	switch {
	case s.Config.Repo != cfg.repo:
		return fmt.Errorf("a cluster of another checkout is running (%s): `make cluster-down`, here or there, removes it", s.Config.Repo)
	case s.Config.Kubernetes != cfg.kubernetes, s.Config.Containerd != cfg.containerd, s.Config.GCPeriod != cfg.gcPeriod.String(), s.Config.PoolSize != cfg.poolSize:
		return fmt.Errorf("a cluster with other settings is running (Kubernetes v%s, containerd %s, GC period %s, pool of %d): run `make cluster-down` first",
			s.Config.Kubernetes, cmp.Or(s.Config.Containerd, "of Debian"), s.Config.GCPeriod, s.Config.PoolSize)
	}
	say("Kubernetes v%s is up already; kubeconfig: %s", cfg.kubernetes, cfg.kubeconfig())
	return nil
}

// prepareHost makes the directories, the bridge, the cgroups and the shared /run/netns that the daemons expect. What
// was there before is written down first.
func prepareHost(cfg config) error {
	state := hostState{}
	state.Config.Repo, state.Config.Kubernetes, state.Config.Containerd = cfg.repo, cfg.kubernetes, cfg.containerd
	state.Config.GCPeriod, state.Config.PoolSize = cfg.gcPeriod.String(), cfg.poolSize

	state.Sysctls = map[string]string{}
	for _, file := range sysctls {
		value, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		state.Sysctls[file] = strings.TrimSpace(string(value))
	}
	for _, dir := range foreignDirs {
		if _, err := os.Stat(dir); errors.Is(err, os.ErrNotExist) {
			state.DirsMade = append(state.DirsMade, dir)
		}
	}
	names, err := os.ReadDir(netnsDir)
	switch {
	case errors.Is(err, os.ErrNotExist):
		state.NetnsDirMade = true
	case err != nil:
		return err
	}
	for _, name := range names {
		state.Netns = append(state.Netns, name.Name())
	}
	mounted, err := mountinfo.Mounted(netnsDir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	state.NetnsMounted = !mounted
	links, err := listLinks()
	if err != nil {
		return err
	}
	for _, link := range links {
		state.Links = append(state.Links, link.Attrs().Name)
	}
	// What a cluster before the last reboot kept is worth nothing: its processes and its state in /run are gone.
	if err := os.RemoveAll(dataDir); err != nil {
		return err
	}
	for _, dir := range []string{runDir, dataDir, dataDir + "/static-pods", netnsDir} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	content, err := json.Marshal(state)
	if err != nil {
		return err
	}
	// Whole or not at all: up and down both refuse to guess.
	if err := errors.Join(os.WriteFile(hostStateFile+".new", content, 0o644), os.Rename(hostStateFile+".new", hostStateFile)); err != nil {
		return err
	}

	if err := shareMount(netnsDir, state.NetnsMounted); err != nil {
		return err
	}
	if err := shareMount(runDir, true); err != nil {
		return err
	}
	if err := os.WriteFile(ipForwardSysctl, []byte("1"), 0o644); err != nil {
		return fmt.Errorf("allowing this machine to forward packets between pods: %w", err)
	}
	if err := makeBridge(); err != nil {
		return err
	}
	return makeCgroups()
}

// listLinks lists the network devices. The kernel says when they changed while it listed them; then it is asked again.
func listLinks() ([]netlink.Link, error) {
	for {
		links, err := netlink.LinkList()
		if err == nil {
			return links, nil
		}
		if !errors.Is(err, netlink.ErrDumpInterrupted) {
			return nil, fmt.Errorf("listing network devices: %w", err)
		}
	}
}

// shareMount makes a directory a shared mount: the kubelet's HostToContainer propagation is refused on any other, and /
// is not one on every machine. bind says that it is no mount of its own yet.
func shareMount(dir string, bind bool) error {
	if bind {
		// With what is mounted in it: the namespaces of others stay where they are.
		if err := unix.Mount(dir, dir, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
			return fmt.Errorf("binding %s on itself: %w", dir, err)
		}
	}
	if err := unix.Mount("", dir, "", unix.MS_SHARED|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("making %s a shared mount: %w", dir, err)
	}
	return nil
}

// makeBridge makes the device that carries the node's address, so that the cluster does not depend on the machine's
// own network.
func makeBridge() error {
	bridge := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: bridgeName}}
	if err := netlink.LinkAdd(bridge); err != nil {
		return fmt.Errorf("adding the bridge %s: %w", bridgeName, err)
	}
	addr, err := netlink.ParseAddr(nodeNet)
	if err != nil {
		return err
	}
	if err := netlink.AddrAdd(bridge, addr); err != nil {
		return fmt.Errorf("adding %s to %s: %w", nodeNet, bridgeName, err)
	}
	if err := netlink.LinkSetUp(bridge); err != nil {
		return err
	}
	// Until kube-proxy knows a service, packets to its address must not leave this machine.
	_, services, err := net.ParseCIDR(serviceNet)
	if err != nil {
		return err
	}
	if err := netlink.RouteAdd(&netlink.Route{LinkIndex: bridge.Attrs().Index, Dst: services, Scope: netlink.SCOPE_LINK}); err != nil {
		return fmt.Errorf("adding a route for %s to %s: %w", serviceNet, bridgeName, err)
	}
	return nil
}

// cgroupHierarchies returns the mount points of all cgroup hierarchies, and whether there is only the one of version 2.
func cgroupHierarchies() (mounts []string, unified bool, err error) {
	infos, err := mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) {
		return m.FSType != "cgroup" && m.FSType != "cgroup2", false
	})
	if err != nil {
		return nil, false, err
	}
	for _, m := range infos {
		mounts = append(mounts, m.Mountpoint)
		unified = unified || m.FSType == "cgroup2" && m.Mountpoint == cgroupMount
	}
	return mounts, unified, nil
}

// makeCgroups makes the group that the kubelet gets as its root in every hierarchy with controllers.
func makeCgroups() error {
	mounts, unified, err := cgroupHierarchies()
	if err != nil {
		return err
	}
	if unified {
		const controllers = "+cpu +cpuset +memory +pids"
		if err := os.WriteFile(cgroupMount+"/cgroup.subtree_control", []byte(controllers), 0o644); err != nil {
			return fmt.Errorf("enabling the cgroup controllers %s: %w", controllers, err)
		}
	}
	for _, mount := range mounts {
		dir := filepath.Join(mount, cgroupName)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return fmt.Errorf("making the cgroup %s: %w", dir, err)
		}
		for _, file := range []string{"cpuset.cpus", "cpuset.mems"} {
			// A cpuset of version 1 starts empty, and no process can enter it before it has both.
			content, err := os.ReadFile(filepath.Join(mount, file))
			if unified || errors.Is(err, os.ErrNotExist) {
				continue
			}
			if err != nil {
				return err
			}
			if err := os.WriteFile(filepath.Join(dir, file), content, 0o644); err != nil {
				return err
			}
		}
	}
	return nil
}
