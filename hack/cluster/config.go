package main

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"
)

const (
	defaultKubernetes = "1.36.3"
	etcdVersion       = "3.6.8"
	helmVersion       = "4.3.1"
	crictlVersion     = "1.37.0"
	crioVersion       = "1.34.0"
	crioModule        = "github.com/cri-o/cri-o"

	// One cluster a machine: its names outside the checkout are fixed, so that any checkout can remove them.
	runDir     = "/run/eni-guard-cluster"
	dataDir    = "/var/lib/eni-guard-cluster"
	netnsDir   = "/run/netns"
	cgroupName = "eni-guard-cluster"
	bridgeName = "eniguard0"

	nodeName    = "node-1"
	nodeIP      = "10.111.0.1"
	nodeNet     = "10.111.0.1/24"
	podNet      = "10.111.1.0/24"
	podNet6     = "fd00:111:1::/112"
	serviceNet  = "10.96.0.0/16"
	apiService  = "10.96.0.1"
	runtimeSock = runDir + "/containerd.sock"

	pauseImage   = "eni-guard.io/pause:dev"
	busyboxImage = "eni-guard.io/busybox:dev"

	// processMark is in the environment of every daemon that up starts, and of what those start on the host
	// (containerd's shims): the one thing that finds them all again after a crash.
	processMark = "ENI_GUARD_CLUSTER=1"
)

// config is what a run of the command was asked for.
type config struct {
	repo       string // the checkout, absolute
	kubernetes string // version without the v
	containerd string // version without the v; Debian's if empty
	gcPeriod   time.Duration
	poolSize   int
}

var (
	versionPattern    = regexp.MustCompile(`^1\.[0-9]+\.[0-9]+$`)
	containerdPattern = regexp.MustCompile(`^(1\.7|2\.[0-9]+)\.[0-9]+$`)
)

func (c *config) complete() error {
	repo, err := filepath.Abs(c.repo)
	if err != nil {
		return err
	}
	c.repo = repo
	c.kubernetes = strings.TrimPrefix(c.kubernetes, "v")
	if !versionPattern.MatchString(c.kubernetes) {
		return fmt.Errorf("--kubernetes-version %q is not a released version, such as %s", c.kubernetes, defaultKubernetes)
	}
	c.containerd = strings.TrimPrefix(c.containerd, "v")
	if c.containerd != "" && !containerdPattern.MatchString(c.containerd) {
		return fmt.Errorf("--containerd-version %q is not a released version from 1.7 on, such as 2.4.2", c.containerd)
	}
	return nil
}

func (c *config) validateUp() error {
	if c.gcPeriod < time.Second {
		return fmt.Errorf("--gc-period %s is below one second", c.gcPeriod)
	}
	if c.poolSize < 1 || c.poolSize > 250 {
		return fmt.Errorf("--pool-size %d is not between 1 and 250", c.poolSize)
	}
	return nil
}

// Directories of the checkout.
func (c *config) clusterDir() string        { return filepath.Join(c.repo, ".cluster") }
func (c *config) path(name string) string   { return filepath.Join(c.clusterDir(), name) }
func (c *config) binary(tool string) string { return filepath.Join(c.clusterDir(), "bin", tool) }
func (c *config) kubeconfig() string        { return c.path("kubeconfig") }

// containerdBinary is a program of containerd: the one that was built, or Debian's, by its name.
func (c *config) containerdBinary(tool string) string {
	if c.containerd == "" {
		return tool
	}
	return c.binary(tool)
}

// cacheDir holds built binaries, keyed by version and shared by all checkouts.
func cacheDir() (string, error) {
	base, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("no cache directory for the built binaries: %w", err)
	}
	return filepath.Join(base, "eni-guard"), nil
}
