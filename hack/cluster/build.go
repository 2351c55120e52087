package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// toolset is a group of binaries built from one Go module of their own, so that each runs with the dependencies its
// authors released it with.
type toolset struct {
	name, version string
	packages      []string
	// module names the Go module of the packages where tools/ has none that requires it: one is written on the spot.
	module  string
	tags    string
	ldflags string
	note    string // what to expect of the build, for the person who waits
}

func toolsets(kubernetes string) []toolset {
	minor := strings.Split(kubernetes, ".")[1]
	stamp := func(pkg string) string {
		return fmt.Sprintf(" -X %[1]s.gitVersion=v%[2]s -X %[1]s.gitMajor=1 -X %[1]s.gitMinor=%[3]s -X %[1]s.gitTreeState=clean", pkg, kubernetes, minor)
	}
	module := "k8s.io/kubernetes"
	if kubernetes == defaultKubernetes {
		module = ""
	}
	return []toolset{
		{
			name: "kubernetes", module: module, version: kubernetes,
			packages: []string{
				"k8s.io/kubernetes/cmd/kube-apiserver",
				"k8s.io/kubernetes/cmd/kube-controller-manager",
				"k8s.io/kubernetes/cmd/kube-scheduler",
				"k8s.io/kubernetes/cmd/kubelet",
				"k8s.io/kubernetes/cmd/kube-proxy",
				"k8s.io/kubernetes/cmd/kubectl",
			},
			// Without the stamp every binary says v0.0.0-master, which Helm and version skew checks refuse.
			ldflags: stamp("k8s.io/component-base/version"),
			note:    "about 8 minutes on 2 cores with a cold build cache, once",
		},
		{name: "etcd", version: etcdVersion, packages: []string{"go.etcd.io/etcd/server/v3"}, note: "about a minute, once"},
		{name: "helm", version: helmVersion, packages: []string{"helm.sh/helm/v4/cmd/helm"}, note: "about a minute, once"},
	}
}

// containerdTools is containerd with what it runs beside it.
func containerdTools(version string) toolset {
	module := "github.com/containerd/containerd"
	if major, _, _ := strings.Cut(version, "."); major != "1" {
		module += "/v" + major
	}
	return toolset{
		name: "containerd", version: version, module: module,
		packages: []string{module + "/cmd/containerd", module + "/cmd/containerd-shim-runc-v2", module + "/cmd/ctr"},
		// The cluster uses overlayfs alone.
		tags: "no_aufs,no_btrfs,no_devmapper,no_zfs",
		note: "about 2 minutes on 2 cores, once",
	}
}

// crictl is what the benchmarks compare the guard with. Nothing else needs it, so it is not in toolsets.
func crictl() toolset {
	return toolset{
		name: "crictl", version: crictlVersion, packages: []string{"sigs.k8s.io/cri-tools/cmd/crictl"},
		ldflags: " -X sigs.k8s.io/cri-tools/pkg/version.Version=" + crictlVersion,
		note:    "about a minute, once",
	}
}

// crio is CRI-O, which one test of the agent runs by itself: no cluster here has it.
func crio() toolset {
	return toolset{
		name: "cri-o", version: crioVersion, module: crioModule, packages: []string{crioModule + "/cmd/crio"},
		// Without cgo, and what that would link.
		tags: "containers_image_ostree_stub,containers_image_openpgp,exclude_graphdriver_btrfs",
		note: "about 4 minutes on 2 cores, once",
	}
}

// buildCRIO builds CRI-O, if it is missing, and puts it into dir, with its helper pinns, which pins namespaces, and the images of the node.
func buildCRIO(ctx context.Context, cfg config, dir string) error {
	if err := installPackages(ctx, slices.Concat(hostTools, crioTools)); err != nil {
		return err
	}
	if err := buildAndLink(ctx, cfg, []toolset{crio()}, dir); err != nil {
		return err
	}
	if err := buildOwn(ctx, cfg); err != nil {
		return err
	}
	source, err := downloadModule(ctx, crioModule, crioVersion)
	if err != nil {
		return err
	}
	sources, err := filepath.Glob(filepath.Join(source.Dir, "pinns/src/*.c"))
	if err != nil {
		return err
	}
	// As its Makefile does.
	out, err := exec.CommandContext(ctx, "gcc", append([]string{"-std=c99", "-Os", "-o", filepath.Join(dir, "pinns")}, sources...)...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("building pinns v%s: %w\n%s", crioVersion, err, lastLines(string(out), 5))
	}
	_, err = writeNodeImages(ctx, cfg, dir)
	return err
}

// binaryName is what a package's binary is called here.
func binaryName(pkg string) string {
	if pkg == "go.etcd.io/etcd/server/v3" {
		return "etcd"
	}
	return filepath.Base(pkg)
}

// buildTools builds what the cache lacks and links everything into .cluster/bin.
func buildTools(ctx context.Context, cfg config) error {
	sets := toolsets(cfg.kubernetes)
	if cfg.containerd != "" {
		sets = append(sets, containerdTools(cfg.containerd))
	}
	if err := buildAndLink(ctx, cfg, sets, cfg.path("bin")); err != nil {
		return err
	}
	return buildOwn(ctx, cfg)
}

// buildAPIServer builds what a conformance run of one Kubernetes version needs and the cache lacks, and links it into dir:
// the API server, its store, and Helm, which renders the chart.
func buildAPIServer(ctx context.Context, cfg config, dir string) error {
	sets := toolsets(cfg.kubernetes)
	for i := range sets {
		if sets[i].name == "kubernetes" {
			sets[i].packages, sets[i].note = []string{"k8s.io/kubernetes/cmd/kube-apiserver"}, "about 3 minutes on 2 cores, once"
		}
	}
	return buildAndLink(ctx, cfg, sets, dir)
}

// buildAndLink builds what the cache lacks of the sets and links their binaries into links.
func buildAndLink(ctx context.Context, cfg config, sets []toolset, links string) error {
	cache, err := cacheDir()
	if err != nil {
		return err
	}
	if err := os.MkdirAll(links, 0o755); err != nil {
		return err
	}
	for _, set := range sets {
		dir := filepath.Join(cache, set.name+"-v"+set.version)
		if err := buildSet(ctx, cfg, set, dir); err != nil {
			return fmt.Errorf("building %s v%s: %w", set.name, set.version, err)
		}
		for _, pkg := range set.packages {
			if err := relink(filepath.Join(dir, binaryName(pkg)), filepath.Join(links, binaryName(pkg))); err != nil {
				return err
			}
		}
	}
	return nil
}

// buildSet builds the missing binaries of a set into dir. A lock keeps two checkouts from building the same thing at
// once; each binary is moved into place only when it is complete, so an interrupted build leaves nothing half done.
func buildSet(ctx context.Context, cfg config, set toolset, dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	unlock, err := lockFile(ctx, filepath.Join(dir, ".lock"))
	if err != nil {
		return err
	}
	defer unlock()

	var missing []string
	for _, pkg := range set.packages {
		if _, err := os.Stat(filepath.Join(dir, binaryName(pkg))); err != nil {
			missing = append(missing, pkg)
		}
	}
	if len(missing) == 0 {
		return nil
	}
	module := filepath.Join(cfg.repo, "hack/cluster/tools", set.name)
	flags := []string{"-mod=readonly"}
	if set.module != "" {
		module, flags = filepath.Join(dir, "module"), []string{"-mod=mod"}
		if err := writeModule(ctx, module, set); err != nil {
			return err
		}
	}
	for i, pkg := range missing {
		say("building %s v%s: %s (%d of %d; %s)", set.name, set.version, binaryName(pkg), i+1, len(missing), set.note)
		out := filepath.Join(dir, binaryName(pkg))
		args := append([]string{"build", "-trimpath", "-tags", set.tags, "-ldflags", "-s -w" + set.ldflags, "-o", out + ".new"}, flags...)
		if err := goCommand(ctx, module, append(args, pkg)...); err != nil {
			return err
		}
		if err := os.Rename(out+".new", out); err != nil {
			return err
		}
	}
	return nil
}

var stagingPattern = regexp.MustCompile(`(?m)^\s*(k8s\.io/[a-z0-9-]+) v0\.0\.0$`)

// writeModule writes a module that builds a set of which tools/ pins another version, or none. k8s.io/kubernetes requires
// its staging modules at v0.0.0, so each needs a replace to the release that goes with it.
func writeModule(ctx context.Context, dir string, set toolset) error {
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	info, err := downloadModule(ctx, set.module, set.version)
	if err != nil {
		return err
	}
	upstream, err := os.ReadFile(info.GoMod)
	if err != nil {
		return err
	}
	var mod bytes.Buffer
	fmt.Fprintf(&mod, "module github.com/eni-guard/eni-guard/hack/cluster/tools/%s\n\ngo 1.26.0\n\nrequire %s v%s\n\n", set.name, set.module, set.version)
	for _, match := range stagingPattern.FindAllSubmatch(upstream, -1) {
		fmt.Fprintf(&mod, "replace %[1]s => %[1]s v0.%[2]s\n", match[1], strings.TrimPrefix(set.version, "1."))
	}
	if err := os.WriteFile(filepath.Join(dir, "go.mod"), mod.Bytes(), 0o644); err != nil {
		return err
	}
	// What the release was built from need not be in the checksum database as well.
	sums, err := os.ReadFile(filepath.Join(info.Dir, "go.sum"))
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, "go.sum"), sums, 0o644)
	}
	if err != nil {
		return err
	}
	get := []string{"get"}
	for _, pkg := range set.packages {
		// Without a version, go get takes the latest release and leaves the replaces behind.
		get = append(get, pkg+"@v"+set.version)
	}
	return goCommand(ctx, dir, get...)
}

// module is where the go tool has put a module, as `go mod download -json` says.
type module struct{ Dir, GoMod, Error string }

// downloadModule gets a module, if it is not there yet.
func downloadModule(ctx context.Context, path, version string) (module, error) {
	download := exec.CommandContext(ctx, "go", "mod", "download", "-json", path+"@v"+version)
	download.Dir = os.TempDir() // no module of its own
	out, err := download.Output()
	var m module
	if jsonErr := json.Unmarshal(out, &m); jsonErr != nil || m.Error != "" || err != nil {
		return m, fmt.Errorf("downloading %s@v%s through the Go module proxy: %w", path, version, errors.Join(err, jsonErr, errors.New(m.Error)))
	}
	return m, nil
}

// buildOwn builds the programs of this module that the cluster runs. The build cache makes a repeat cheap.
func buildOwn(ctx context.Context, cfg config) error {
	module := filepath.Join(cfg.repo, "hack/cluster")
	return goCommand(ctx, module, "build", "-trimpath", "-ldflags", "-s -w", "-o", cfg.path("bin")+"/", "./eni-sim", "./stuckfs", "./pause")
}

// goCommand runs the go tool without cgo in dir. It prints the tool's complaints only when it fails.
func goCommand(ctx context.Context, dir string, args ...string) error {
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOWORK=off")
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	done := make(chan struct{})
	defer close(done)
	go stillWorking(done)
	if err := cmd.Run(); err != nil {
		text := strings.TrimSpace(out.String())
		if strings.Contains(text, "dial tcp") || strings.Contains(text, "no such host") {
			return fmt.Errorf("the Go module proxy cannot be reached (go env GOPROXY names it): %s", lastLines(text, 1))
		}
		return fmt.Errorf("go %s: %w\n%s", args[0], err, lastLines(text, 15))
	}
	return nil
}

// stillWorking prints the time spent so far, twice a minute.
func stillWorking(done <-chan struct{}) {
	start, tick := time.Now(), time.NewTicker(30*time.Second)
	defer tick.Stop()
	for {
		select {
		case <-done:
			return
		case <-tick.C:
			say("  … still building after %s", time.Since(start).Round(time.Second))
		}
	}
}

// relink makes link point at target, also when it pointed elsewhere before.
func relink(target, link string) error {
	if err := os.Remove(link); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return os.Symlink(target, link)
}

// lockFile takes an exclusive lock and says so when it has to wait for it.
func lockFile(ctx context.Context, name string) (unlock func(), err error) {
	f, err := os.OpenFile(name, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	for waiting := false; ; waiting = true {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { _ = f.Close() }, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return nil, errors.Join(fmt.Errorf("locking %s: %w", name, err), f.Close())
		}
		if !waiting {
			say("waiting for another run that holds %s", name)
		}
		select {
		case <-ctx.Done():
			return nil, errors.Join(ctx.Err(), f.Close())
		case <-time.After(200 * time.Millisecond):
		}
	}
}

func lastLines(text string, n int) string {
	lines := strings.Split(strings.TrimRight(text, "\n"), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}
