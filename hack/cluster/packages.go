package main

import (
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
)

// hostTool is something the cluster takes from the distribution.
type hostTool struct {
	binary, debian string
}

var hostTools = []hostTool{
	{"containerd", "containerd"},
	{"ctr", "containerd"},
	{"runc", "runc"},
	{"nft", "nftables"},
	{loopbackPlugin, "containernetworking-plugins"},
	// The image of test workloads: one static binary with a shell, a web server and the usual tools.
	{busyboxBinary, "busybox-static"},
}

// crioTools are what CRI-O takes from the distribution beside hostTools, and what a program in C is built with.
var crioTools = []hostTool{
	{"conmon", "conmon"},
	{"skopeo", "skopeo"}, // puts images into its storage
	{"gcc", "gcc"},
	{"gencat", "libc6-dev"}, // of a package that comes with it
}

const (
	loopbackPlugin = "/usr/lib/cni/loopback"
	busyboxBinary  = "/bin/busybox"
)

// namesake is a Debian package whose binary is called like it.
func namesake(name string) hostTool { return hostTool{binary: name, debian: name} }

// installPackages installs the Debian packages of those tools that are missing; elsewhere than on Debian it says what is missing.
func installPackages(ctx context.Context, tools []hostTool) error {
	var binaries, packages []string
	for _, tool := range tools {
		if _, err := exec.LookPath(tool.binary); err == nil && (tool.binary != busyboxBinary || isStatic(tool.binary)) {
			continue
		}
		binaries = append(binaries, tool.binary)
		if !slices.Contains(packages, tool.debian) {
			packages = append(packages, tool.debian)
		}
	}
	if len(packages) == 0 {
		return nil
	}
	apt, err := exec.LookPath("apt-get")
	if err != nil {
		return fmt.Errorf("missing: %s; install them with this system's package manager (on Debian: %s)",
			strings.Join(binaries, ", "), strings.Join(packages, " "))
	}
	say("installing Debian packages: %s", strings.Join(packages, " "))
	for _, args := range [][]string{{"update", "-q"}, append([]string{"install", "-y", "-q", "--no-install-recommends"}, packages...)} {
		cmd := exec.CommandContext(ctx, apt, args...)
		cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive")
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("apt-get %s: %w (are Debian's package archives reachable?)\n%s", args[0], err, lastLines(string(out), 5))
		}
	}
	for _, tool := range tools {
		if _, err := exec.LookPath(tool.binary); err != nil {
			return fmt.Errorf("%s is still missing after installing the Debian package %s", tool.binary, tool.debian)
		}
	}
	return nil
}

// isStatic says whether a binary runs without a dynamic loader, as in an image that holds nothing else.
func isStatic(name string) bool {
	f, err := elf.Open(name)
	if err != nil {
		return false
	}
	defer f.Close()
	return !slices.ContainsFunc(f.Progs, func(p *elf.Prog) bool { return p.Type == elf.PT_INTERP })
}

func requireRoot() error {
	if os.Geteuid() != 0 {
		return errors.New("this needs root: it starts containerd and a kubelet and makes network namespaces (run it with sudo)")
	}
	return nil
}
