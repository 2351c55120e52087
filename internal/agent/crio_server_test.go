//go:build crio

package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/moby/sys/mountinfo"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"k8s.io/apimachinery/pkg/util/wait"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/eni-guard/eni-guard/internal/sandbox"
)

// crioVariable names a directory, by its absolute path, as `bin/cluster crio DIR` fills it.
const crioVariable = "ENI_GUARD_CRIO"

// What CRI-O has on this machine while the test runs. The names are fixed, so that a run removes what one that was interrupted has left.
const (
	crioName   = "eni-guard-crio-test" // of its network, and of the cgroup above those of the pods, in the place of the kubelet's
	crioDir    = "/var/lib/" + crioName
	crioLog    = crioDir + "/crio.log"
	crioPID    = crioDir + "/crio.pid"
	crioBridge = "eniguardcrio0"
)

// crio is a CRI-O with a directory of its own. As by default it mounts network namespaces at /var/run/netns.
type crio struct {
	binaries string
	process  *exec.Cmd
	runtime  *Runtime
}

const crioConfig = `
[crio]
root = "%[1]s/%[2]s/root"
runroot = "%[1]s/%[2]s/run"
storage_driver = "overlay"
log_dir = "%[1]s/logs"
version_file = "%[1]s/version"
version_file_persist = "%[1]s/version-persist"
clean_shutdown_file = "%[1]s/clean.shutdown"
internal_wipe = false
internal_repair = false
[crio.api]
listen = "%[1]s/crio.sock"
stream_address = "127.0.0.1"
stream_port = "0"
[crio.runtime]
cgroup_manager = "cgroupfs"
conmon_cgroup = "pod"
container_exits_dir = "%[1]s/exits"
container_attach_socket_dir = "%[1]s/attach"
pinns_path = "%[1]s/pinns"
hooks_dir = ["%[1]s/hooks"]
apparmor_profile = "unconfined"
irqbalance_config_restore_file = "disable"
default_runtime = "runc"
[crio.runtime.runtimes.runc]
runtime_path = "%[3]s"
runtime_root = "%[1]s/runc"
monitor_path = "%[4]s"
monitor_cgroup = "pod"
[crio.image]
pause_image = "eni-guard.io/pause:dev"
signature_policy = "%[1]s/policy.json"
[crio.network]
network_dir = "%[1]s/net.d"
plugin_dirs = ["/usr/lib/cni"]
[crio.nri]
enable_nri = false
`

const crioNetwork = `{"cniVersion": "1.0.0", "name": "` + crioName + `", "plugins": [{"type": "bridge", "bridge": "` + crioBridge + `", "ipam": {
  "type": "host-local", "dataDir": "` + crioDir + `/addresses", "ranges": [[{"subnet": "10.114.0.0/24"}], [{"subnet": "fd00:114::/112"}]]}}]}`

// crioPinns notes under which name a pod's namespaces are mounted, and lets the real pinns do it: -d DIRECTORY -f NAME …
const crioPinns = `#!/bin/sh
echo "$4" >>` + crioDir + `/pinned
exec %s/pinns "$@"
`

// newCRIO makes what it needs, with the images of the node in its storage.
func newCRIO(t *testing.T) *crio {
	t.Helper()
	binaries := os.Getenv(crioVariable)
	for _, name := range []string{"crio", "pinns", "pause.tar", "busybox.tar"} {
		if _, err := os.Stat(filepath.Join(binaries, name)); err != nil || !filepath.IsAbs(binaries) {
			t.Fatalf("%s=%q is not the absolute path of a directory with %s: `make test-crio` makes one, and runs this test", crioVariable, binaries, name)
		}
	}
	c := &crio{binaries: binaries}
	c.remove(t)
	if others, _ := filepath.Glob(netnsDir + "/*"); len(others) > 0 {
		t.Fatalf("this test needs a machine without network namespaces of others, which could be anybody's to an agent that asks CRI-O: "+
			"`make cluster-down` and `ip netns delete` take them away: %s", others)
	}
	t.Cleanup(func() { c.remove(t) })
	var err error
	if c.runtime, err = NewRuntime(filepath.Join(crioDir, "crio.sock")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.runtime.Close() })
	for _, dir := range []string{"", "net.d", "hooks", "config"} {
		if err := os.Mkdir(filepath.Join(crioDir, dir), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	policy := filepath.Join(crioDir, "policy.json")
	for file, content := range map[string]string{
		policy: `{"default": [{"type": "insecureAcceptAnything"}]}`, filepath.Join(crioDir, "net.d/test.conflist"): crioNetwork,
		filepath.Join(crioDir, "pinns"): fmt.Sprintf(crioPinns, binaries),
	} {
		if err := os.WriteFile(file, []byte(content), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	_, noContainers := os.Stat("/var/lib/containers") // where skopeo has a cache
	for _, image := range []string{"pause", "busybox"} {
		storage := fmt.Sprintf("containers-storage:[overlay@%[1]s/storage/root+%[1]s/storage/run]eni-guard.io/%s:dev", crioDir, image)
		out, err := exec.CommandContext(t.Context(), "skopeo", "--policy", policy, "copy",
			"oci-archive:"+filepath.Join(binaries, image+".tar"), storage).CombinedOutput()
		if err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
	}
	if noContainers != nil {
		if err := os.RemoveAll("/var/lib/containers"); err != nil {
			t.Error(err)
		}
	}
	return c
}

// start starts it, with what it has stored below a directory, and waits until it answers.
func (c *crio) start(t *testing.T, storage string) {
	t.Helper()
	runc, err := exec.LookPath("runc")
	if err != nil {
		t.Fatal(err)
	}
	conmon, err := exec.LookPath("conmon")
	if err != nil {
		t.Fatal(err)
	}
	config := filepath.Join(crioDir, "crio.conf")
	if err := os.WriteFile(config, fmt.Appendf(nil, crioConfig, crioDir, storage, runc, conmon), 0o600); err != nil {
		t.Fatal(err)
	}
	log, err := os.OpenFile(crioLog, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	process := exec.Command(filepath.Join(c.binaries, "crio"), "--config", config, "--config-dir", filepath.Join(crioDir, "config"))
	process.Stdout, process.Stderr = log, log
	if err := process.Start(); err != nil {
		t.Fatal(err)
	}
	c.process = process
	if err := os.WriteFile(crioPID, []byte(strconv.Itoa(process.Process.Pid)), 0o600); err != nil {
		t.Fatal(err)
	}
	awaitCRIO(t, "CRI-O to answer", func(ctx context.Context) error {
		_, err := c.runtime.version(ctx)
		return err
	})
	c.runtime.forget(nil) // what the one before it has told
}

// kill ends it as a crash does. The monitors of its containers go on.
func (c *crio) kill(t *testing.T) {
	t.Helper()
	if err := c.process.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = c.process.Wait()
}

// awaitCRIO waits for a condition; the log of CRI-O says why it does not come.
func awaitCRIO(t *testing.T, what string, condition func(context.Context) error) {
	t.Helper()
	var last error
	err := wait.PollUntilContextTimeout(t.Context(), 50*time.Millisecond, time.Minute, true, func(ctx context.Context) (bool, error) {
		last = condition(ctx)
		return last == nil, nil
	})
	if err != nil {
		log, _ := os.ReadFile(crioLog)
		t.Fatalf("waiting for %s: %v\n%s", what, errors.Join(err, last), log[max(0, len(log)-4096):])
	}
}

// record is what it tells of the one sandbox of a pod.
func (c *crio) record(t *testing.T, uid string) podSandbox {
	t.Helper()
	records, err := c.runtime.pod(t.Context(), uid)
	if err != nil || len(records.sandboxes) != 1 {
		t.Fatalf("%+v: %v", records, err)
	}
	return records.sandboxes[0]
}

// run starts a pod of one container, with the labels that the kubelet gives, and without a shared PID namespace.
func (c *crio) run(t *testing.T, pod sandbox.Pod) (id, container string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	labels := map[string]string{podUIDLabel: pod.UID, "io.kubernetes.pod.namespace": pod.Namespace, "io.kubernetes.pod.name": pod.Name}
	const busybox = "eni-guard.io/busybox:dev"
	own := &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_CONTAINER}
	config := &runtimeapi.PodSandboxConfig{
		Metadata: &runtimeapi.PodSandboxMetadata{Namespace: pod.Namespace, Name: pod.Name, Uid: pod.UID},
		Labels:   labels, LogDirectory: filepath.Join(crioDir, "logs"),
		Linux: &runtimeapi.LinuxPodSandboxConfig{
			CgroupParent:    "/" + crioName + "/pod" + pod.UID,
			SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{NamespaceOptions: own},
		},
	}
	started, err := c.runtime.client.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: config})
	if err != nil {
		t.Fatal(err)
	}
	created, err := c.runtime.client.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{
		PodSandboxId: started.GetPodSandboxId(), SandboxConfig: config,
		Config: &runtimeapi.ContainerConfig{
			Metadata: &runtimeapi.ContainerMetadata{Name: "app"},
			Image:    &runtimeapi.ImageSpec{Image: busybox, UserSpecifiedImage: busybox},
			Command:  []string{"/bin/sleep", "86400"}, LogPath: "app.log",
			Labels: labels,
			Linux:  &runtimeapi.LinuxContainerConfig{SecurityContext: &runtimeapi.LinuxContainerSecurityContext{NamespaceOptions: own}},
		},
	})
	if err == nil {
		_, err = c.runtime.client.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: created.GetContainerId()})
	}
	if err != nil {
		t.Fatal(err)
	}
	return started.GetPodSandboxId(), created.GetContainerId()
}

// killAll kills processes, unless they have ended.
func killAll(t *testing.T, pids string) {
	t.Helper()
	for text := range strings.FieldsSeq(pids) {
		if pid, err := strconv.Atoi(text); err != nil || pid <= 0 {
			t.Errorf("%q is no process", text)
		} else if err := unix.Kill(pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
			t.Error(err)
		}
	}
}

// groups are the cgroups of its pods, in all hierarchies, those below others first.
func groups() []string {
	var groups []string
	roots, _ := filepath.Glob(filepath.Join(realNode.Cgroup, "*", crioName))
	for _, root := range append(roots, filepath.Join(realNode.Cgroup, crioName)) {
		_ = filepath.WalkDir(root, func(path string, entry fs.DirEntry, err error) error {
			if err == nil && entry.IsDir() {
				groups = append(groups, path)
			}
			return nil
		})
	}
	slices.Reverse(groups)
	return groups
}

// remove leaves nothing behind, of this run or of one that was interrupted.
func (c *crio) remove(t *testing.T) {
	t.Helper()
	if c.process != nil {
		_ = c.process.Process.Kill()
		_ = c.process.Wait()
	}
	if pid, err := os.ReadFile(crioPID); err == nil {
		if name, _ := os.ReadFile("/proc/" + string(pid) + "/comm"); string(name) == "crio\n" {
			killAll(t, string(pid))
		}
	}
	for _, group := range groups() {
		// It is busy until all that is in it has ended.
		err := wait.PollUntilContextTimeout(context.Background(), 10*time.Millisecond, 10*time.Second, true, func(context.Context) (bool, error) {
			pids, _ := os.ReadFile(filepath.Join(group, "cgroup.procs"))
			killAll(t, string(pids))
			err := os.Remove(group)
			return err == nil || errors.Is(err, fs.ErrNotExist), nil
		})
		if err != nil {
			t.Errorf("removing %s: %v", group, err)
		}
	}
	names, _ := os.ReadFile(filepath.Join(crioDir, "pinned"))
	for _, kind := range []string{"netns", "ipcns", "utsns", "userns", "pidns"} {
		for name := range strings.FieldsSeq(string(names)) {
			file := filepath.Join("/run", kind, name)
			_ = unix.Unmount(file, unix.MNT_DETACH)
			_ = os.Remove(file)
		}
		_ = os.Remove(filepath.Join("/run", kind)) // only if it is empty
	}
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(crioDir))
	for _, m := range slices.Backward(mounts) {
		err = errors.Join(err, unix.Unmount(m.Mountpoint, unix.MNT_DETACH))
	}
	if link, missing := netlink.LinkByName(crioBridge); missing == nil {
		err = errors.Join(err, netlink.LinkDel(link))
	}
	// What libcni remembers of networks whose pods were not stopped.
	results, _ := filepath.Glob("/var/lib/cni/results/" + crioName + "-*")
	for _, path := range append(results, crioDir) {
		err = errors.Join(err, os.RemoveAll(path))
	}
	if err != nil {
		t.Error(err)
	}
}
