package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/moby/sys/mountinfo"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// runEnv makes the test binary be the command itself.
const runEnv = "CLUSTER_TEST_RUN"

func TestMain(m *testing.M) {
	if os.Getenv(runEnv) != "" {
		os.Args[0] = "cluster"
		main()
		return
	}
	if os.Geteuid() != 0 {
		fmt.Fprintln(os.Stderr, "these tests start a cluster: run them as root")
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// command returns a run of the command in this checkout.
func command(t *testing.T, args ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe", append(args, "--repo", "../..")...)
	cmd.Env = append(os.Environ(), runEnv+"=1")
	return cmd
}

func mustRun(t *testing.T, args ...string) {
	t.Helper()
	if out, err := command(t, args...).CombinedOutput(); err != nil {
		t.Fatalf("cluster %v: %v\n%s", args, err, out)
	}
}

// machine is everything that down has to put back as it was.
func machine(t *testing.T) map[string][]string {
	t.Helper()
	state := map[string][]string{}
	mounts, err := mountinfo.GetMounts(nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range mounts {
		state["mounts"] = append(state["mounts"], m.Mountpoint+" "+m.FSType+" "+m.Optional)
	}
	links, err := listLinks()
	if err != nil {
		t.Fatal(err)
	}
	for _, link := range links {
		state["devices"] = append(state["devices"], link.Attrs().Name)
	}
	routes, err := netlink.RouteList(nil, netlink.FAMILY_ALL)
	for errors.Is(err, netlink.ErrDumpInterrupted) { // changed while they were listed
		routes, err = netlink.RouteList(nil, netlink.FAMILY_ALL)
	}
	if err != nil {
		t.Fatal(err)
	}
	for _, route := range routes {
		state["routes"] = append(state["routes"], route.String())
	}
	tables, err := exec.CommandContext(t.Context(), "nft", "list", "tables").Output()
	if err != nil {
		t.Fatal(err)
	}
	state["tables"] = strings.Split(string(tables), "\n")
	// The groups at the top of each hierarchy, and whatever below them is a kubelet's or a runtime's. Other programs of the
	// machine make and remove groups of their own below theirs.
	for _, pattern := range []string{"/*", "/*/*", "/*/*/*kube*", "/*/*/*k8s*", "/*/*/*containerd*"} {
		found, _ := filepath.Glob(cgroupMount + pattern)
		state["cgroups"] = append(state["cgroups"], found...)
	}
	for _, pattern := range []string{netnsDir, netnsDir + "/*"} {
		found, _ := filepath.Glob(pattern)
		state["network namespaces"] = append(state["network namespaces"], found...)
	}
	for _, pattern := range append([]string{
		"/run/eni-guard*", "/var/lib/eni-guard*", "/var/lib/cni/results/*", "/var/log/containers/*", "/run/containerd/*/*",
	}, foreignDirs...) {
		found, _ := filepath.Glob(pattern)
		state["files"] = append(state["files"], found...)
	}
	for _, file := range sysctls {
		value, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		state["sysctls"] = append(state["sysctls"], file+"="+strings.TrimSpace(string(value)))
	}
	for _, p := range markedProcesses() {
		state["processes"] = append(state["processes"], p.argv0)
	}
	// Containers carry no mark; those of pods all run something of the cluster's own images, in mounts of their own.
	mounted, err := os.Readlink("/proc/self/ns/mnt")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"pause", "busybox", "sleep", "containerd-shim"} {
		pids, _ := exec.CommandContext(t.Context(), "pgrep", "-x", name).Output()
		for pid := range strings.FieldsSeq(string(pids)) {
			if in, err := os.Readlink("/proc/" + pid + "/ns/mnt"); err == nil && in != mounted || name == "containerd-shim" {
				state["processes"] = append(state["processes"], name)
			}
		}
	}
	for _, list := range state {
		slices.Sort(list)
	}
	return state
}

func expectUnchanged(t *testing.T, before map[string][]string) {
	t.Helper()
	after := machine(t)
	for what := range after {
		for _, item := range after[what] {
			if !slices.Contains(before[what], item) {
				t.Errorf("%s: %q is left behind", what, item)
			}
		}
	}
	for what := range before {
		for _, item := range before[what] {
			if !slices.Contains(after[what], item) {
				t.Errorf("%s: %q is gone", what, item)
			}
		}
	}
}

func kubectl(t *testing.T, args ...string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "../../.cluster/bin/kubectl", append([]string{"--kubeconfig", "../../.cluster/kubeconfig"}, args...)...).CombinedOutput()
	if err != nil {
		t.Fatalf("kubectl %v: %v\n%s", args, err, out)
	}
	return string(out)
}

// startPod starts a pod and returns the host's PID of its one process, which runs sleep for so many seconds.
func startPod(t *testing.T, name, seconds string) int {
	t.Helper()
	kubectl(t, "run", name, "--image="+busyboxImage, "--image-pull-policy=Never", "--restart=Never", "--", "sleep", seconds)
	kubectl(t, "wait", "--for=condition=Ready", "pod/"+name, "--timeout=2m")
	for _, pid := range cgroupProcesses() {
		cmdline, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		if strings.HasSuffix(string(cmdline), "sleep\x00"+seconds+"\x00") {
			return pid
		}
	}
	t.Fatalf("no process of pod %s is in the cluster's cgroups", name)
	return 0
}

// killDaemon ends a daemon of the cluster as a crash would.
func killDaemon(t *testing.T, name string) {
	t.Helper()
	for _, p := range markedProcesses() {
		if filepath.Base(p.argv0) == name {
			if err := unix.Kill(p.pid, unix.SIGKILL); err != nil {
				t.Fatal(err)
			}
			return
		}
	}
	t.Fatalf("%s does not run", name)
}

// One long story, because each step needs the one before: up, up again, a crash of some daemons, up over the remains, a
// pod that nothing can kill, down over the remains, down again.
func TestUpAndDown(t *testing.T) {
	mustRun(t, "down")
	others := foreignNamespace(t, "before")
	before := machine(t)
	mustRun(t, "up")
	others("while the cluster runs")
	if out := kubectl(t, "get", "nodes"); !strings.Contains(out, "Ready") || !strings.Contains(out, "v"+defaultKubernetes) {
		t.Errorf("nodes:\n%s", out)
	}
	startPod(t, "first", "86401")
	out, err := command(t, "up").CombinedOutput()
	if err != nil || !bytes.Contains(out, []byte("is up already")) {
		t.Errorf("a second up: %v\n%s", err, out)
	}
	out, err = command(t, "up", "--pool-size=7").CombinedOutput()
	if err == nil || !bytes.Contains(out, []byte("a cluster with other settings is running")) {
		t.Errorf("an up with other settings: %v\n%s", err, out)
	}

	for _, name := range []string{"containerd", "kubelet", "kube-apiserver"} {
		killDaemon(t, name)
	}
	out, err = command(t, "up").CombinedOutput()
	if err != nil || !bytes.Contains(out, []byte("does not work: starting a new, empty cluster")) {
		t.Fatalf("an up over a half-dead cluster: %v\n%s", err, out)
	}

	pid := startPod(t, "frozen", "86402")
	freeze(t, pid)
	readStuck(t)
	for _, name := range []string{"etcd", "containerd", "kube-proxy"} {
		killDaemon(t, name)
	}
	mustRun(t, "down")
	expectUnchanged(t, before)
	others("afterwards")
	if _, err := os.Stat("../../.cluster/kubeconfig"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the kubeconfig of a cluster that is gone is still there (%v)", err)
	}
	out, err = command(t, "down").CombinedOutput()
	if err != nil || !bytes.Contains(out, []byte("no cluster is running")) {
		t.Errorf("a second down: %v\n%s", err, out)
	}
}

// What somebody else puts into /run/netns while the cluster runs is in the mount that up made there, and that stays.
func TestANamespaceOfSomebodyElse(t *testing.T) {
	mustRun(t, "down")
	if mounted, err := mountinfo.Mounted(netnsDir); mounted || err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("this test needs a machine on which nothing is mounted at %s (%v)", netnsDir, err)
	}
	mustRun(t, "up")
	t.Cleanup(func() { _ = unix.Unmount(netnsDir, unix.MNT_DETACH) })
	others := foreignNamespace(t, "since")
	out, err := command(t, "down").CombinedOutput()
	if err != nil || !bytes.Contains(out, []byte(netnsDir+" stays mounted: somebody else has put eni-guard-test-since there")) {
		t.Errorf("got %v\n%s", err, out)
	}
	others("afterwards")
}

// Where /run is shared, as systemd makes it, what is mounted in /run/netns shows there twice while the cluster is up.
func TestANamespaceOfSomebodyElseWhereRunIsShared(t *testing.T) {
	const elsewhere = "ENI_GUARD_TEST_ELSEWHERE"
	if os.Getenv(elsewhere) == "" { // with mounts of its own
		again := exec.CommandContext(t.Context(), "/proc/self/exe", "-test.run=^"+t.Name()+"$", "-test.v")
		again.Env = append(os.Environ(), elsewhere+"=1")
		again.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS}
		if out, err := again.CombinedOutput(); err != nil || !bytes.Contains(out, []byte("--- PASS: "+t.Name())) {
			t.Errorf("%v\n%s", err, out)
		}
		return
	}
	if err := errors.Join(
		unix.Mount("", "/", "", unix.MS_PRIVATE|unix.MS_REC, ""),
		unix.Mount("tmpfs", "/run", "tmpfs", 0, ""),
		unix.Mount("", "/run", "", unix.MS_SHARED, ""),
	); err != nil {
		t.Fatal(err)
	}
	others := foreignNamespace(t, "before")
	if err := shareMount(netnsDir, true); err != nil {
		t.Fatal(err)
	}
	others("while the cluster runs")
	if err := removeNetns(&hostState{Netns: []string{"eni-guard-test-before"}, NetnsMounted: true}); err != nil {
		t.Fatal(err)
	}
	others("afterwards")
}

// foreignNamespace mounts a network namespace in /run/netns that is not the cluster's, and returns what fails if it is not there any more.
func foreignNamespace(t *testing.T, name string) (expect func(when string)) {
	t.Helper()
	path := filepath.Join(netnsDir, "eni-guard-test-"+name)
	if err := errors.Join(os.MkdirAll(netnsDir, 0o755), os.WriteFile(path, nil, 0o600), unix.Mount("/proc/self/ns/net", path, "", unix.MS_BIND, "")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(unix.Unmount(path, unix.MNT_DETACH), os.Remove(path)); err != nil {
			t.Error(err)
		}
		_ = os.Remove(netnsDir) // only if it is empty
	})
	return func(when string) {
		t.Helper()
		there, err := os.Stat(path)
		own, ownErr := os.Stat("/proc/self/ns/net")
		if err := errors.Join(err, ownErr); err != nil || !os.SameFile(there, own) {
			t.Errorf("%s: the namespace of somebody else is gone (%v)", when, err)
		}
	}
}

// freeze moves a process into a group that is frozen, where no signal ends it. (Only cgroup version 1 has such groups.)
func freeze(t *testing.T, pid int) {
	t.Helper()
	dir := cgroupMount + "/freezer/" + cgroupName + "/test"
	if _, err := os.Stat(filepath.Dir(dir)); err != nil {
		t.Logf("no freezer hierarchy here: %v", err)
		return
	}
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, write := range [][2]string{{"cgroup.procs", fmt.Sprint(pid)}, {"freezer.state", "FROZEN"}} {
		if err := os.WriteFile(filepath.Join(dir, write[0]), []byte(write[1]), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// readStuck starts a process that reads a file of stuckfs, and kills it: it stays, in state D.
func readStuck(t *testing.T) {
	t.Helper()
	dir := dataDir + "/stuckfs/test"
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	server := exec.Command("../../.cluster/bin/stuckfs", dir)
	server.Env = append(os.Environ(), processMark)
	stdout, err := server.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := server.Start(); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(stdout).ReadString('\n'); err != nil || !strings.HasPrefix(line, "ready ") {
		t.Fatalf("stuckfs: %q, %v", line, err)
	}
	reader := exec.Command("dd", "if="+dir+"/data", "of=/dev/null")
	if err := reader.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		// down has ended the file system's server, and with it the read.
		_ = server.Wait()
		_ = reader.Wait()
	})
	err = waitFor(t.Context(), 10*time.Second, "the reader to sleep", func() error {
		wchan, err := os.ReadFile(fmt.Sprintf("/proc/%d/wchan", reader.Process.Pid))
		if err == nil && string(wchan) != "request_wait_answer" {
			err = fmt.Errorf("it is in %q", wchan)
		}
		return err
	})
	if err := errors.Join(err, reader.Process.Kill()); err != nil {
		t.Fatal(err)
	}
}

// A reboot empties /run and keeps /var/lib: a new cluster must not start on the state of the old one.
func TestUpAfterAReboot(t *testing.T) {
	mustRun(t, "down")
	for _, start := range []string{"up", "down"} {
		if err := os.MkdirAll(dataDir+"/etcd/member", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(dataDir+"/eni-sim", []byte("old"), 0o644); err != nil {
			t.Fatal(err)
		}
		mustRun(t, start)
		if content, err := os.ReadFile(dataDir + "/eni-sim"); err == nil {
			t.Errorf("after %s the old state is still there: %q", start, content)
		}
		mustRun(t, "down")
	}
	if _, err := os.Stat(dataDir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%s is still there (%v)", dataDir, err)
	}
}

func TestInterruptedUp(t *testing.T) {
	mustRun(t, "down")
	before := machine(t)
	cmd := command(t, "up")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(stdout)
	for lines.Scan() {
		if strings.Contains(lines.Text(), "starting kubelet") {
			if err := cmd.Process.Signal(syscall.SIGINT); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := cmd.Wait(); err == nil || !strings.HasPrefix(stderr.String(), "cluster: interrupted; what was started still runs") {
		t.Errorf("ended with %v and %q", err, stderr.String())
	}
	mustRun(t, "down")
	expectUnchanged(t, before)
}

// expectFailure runs the command and expects one clear line on standard error.
func expectFailure(t *testing.T, cmd *exec.Cmd, want string) {
	t.Helper()
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	err := cmd.Run()
	first, rest, _ := strings.Cut(stderr.String(), "\n")
	if err == nil || !strings.HasPrefix(first, "cluster: ") || !strings.Contains(first, want) {
		t.Errorf("got %v and %q, want one line with %q", err, stderr.String(), want)
	}
	// What follows the line can only be where to read more.
	if rest != "" && !strings.HasPrefix(rest, "(logs: ") {
		t.Errorf("more than one line: %q", stderr.String())
	}
}

func TestWhatIsMissingIsNamed(t *testing.T) {
	mustRun(t, "down")
	before := machine(t)
	t.Run("a port is taken", func(t *testing.T) {
		l, err := net.Listen("tcp", ":10250")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		expectFailure(t, command(t, "up"), "port 10250, which kubelet needs, is taken")
	})
	t.Run("another kube-proxy works here", func(t *testing.T) {
		if out, err := exec.Command("nft", "add", "table", "ip", "kube-proxy").CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		defer func() {
			if out, err := exec.Command("nft", "delete", "table", "ip", "kube-proxy").CombinedOutput(); err != nil {
				t.Errorf("%v\n%s", err, out)
			}
		}()
		expectFailure(t, command(t, "up"), `nftables table "ip kube-proxy" already`)
	})
	for _, args := range [][]string{{"up"}, {"down"}} {
		t.Run(args[0]+" without root", func(t *testing.T) {
			cmd := command(t, args...)
			cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
			expectFailure(t, cmd, "this needs root")
		})
	}
	t.Run("no containerd, and no apt-get to install it with", func(t *testing.T) {
		cmd := command(t, "up")
		cmd.Env = append(cmd.Env, "PATH=/nonexistent")
		expectFailure(t, cmd, "missing: containerd, ctr, runc, nft; install them with this system's package manager (on Debian: containerd runc nftables)")
	})
	t.Run("no network", func(t *testing.T) {
		cmd := command(t, "build")
		cmd.Env = append(cmd.Env, "XDG_CACHE_HOME="+t.TempDir(), "GOMODCACHE="+t.TempDir(), "GOPROXY=http://127.0.0.1:9", "GOFLAGS=-modcacherw")
		expectFailure(t, cmd, "the Go module proxy cannot be reached")
	})
	t.Run("an image without a cluster", func(t *testing.T) {
		expectFailure(t, command(t, "load", os.Args[0]), "no cluster is running here")
	})
	for _, test := range []struct{ flag, want string }{
		{"--kubernetes-version=latest", `--kubernetes-version "latest" is not a released version, such as 1.36.3`},
		{"--containerd-version=1.6.20", `--containerd-version "1.6.20" is not a released version from 1.7 on, such as 2.4.2`},
		{"--gc-period=1ms", "--gc-period 1ms is below one second"},
		{"--pool-size=0", "--pool-size 0 is not between 1 and 250"},
		{"--pools=1", "unknown flag: --pools"},
	} {
		t.Run(test.flag, func(t *testing.T) { expectFailure(t, command(t, "up", test.flag), test.want) })
	}
	expectUnchanged(t, before)
}
