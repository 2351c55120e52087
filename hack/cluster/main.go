// Command cluster runs a real one-node Kubernetes on this machine, from nothing but Go modules and Debian packages:
// for development, for the demo and for the end-to-end tests of eni-guard.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/spf13/cobra"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := newCommand().ExecuteContext(ctx); err != nil {
		if ctx.Err() != nil {
			err = errors.New("interrupted; what was started still runs: `make cluster-up` starts over, `make cluster-down` removes it")
		}
		fmt.Fprintln(os.Stderr, "cluster: "+err.Error())
		stop()
		os.Exit(1)
	}
}

func newCommand() *cobra.Command {
	root := &cobra.Command{
		Use:           "cluster",
		Short:         "A real one-node Kubernetes on this machine",
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	cfg := config{}
	root.PersistentFlags().StringVar(&cfg.repo, "repo", ".", "the checkout: its .cluster directory takes the kubeconfig, the audit log and the logs")
	root.PersistentFlags().StringVar(&cfg.kubernetes, "kubernetes-version", defaultKubernetes, "the Kubernetes to build and run")
	root.PersistentFlags().StringVar(&cfg.containerd, "containerd-version", "", "the containerd to build and run; Debian's if not given")
	root.PersistentPreRunE = func(*cobra.Command, []string) error { return cfg.complete() }

	up := &cobra.Command{
		Use:   "up",
		Short: "Install and build what is missing, and start the cluster; one that has died in part is replaced by a new, empty one",
		Args:  cobra.NoArgs,
		RunE:  func(cmd *cobra.Command, _ []string) error { return up(cmd.Context(), cfg) },
	}
	up.Flags().DurationVar(&cfg.gcPeriod, "gc-period", 5*time.Second, "how often eni-sim releases the addresses of pods that the API server no longer has (Terway: 5m)")
	up.Flags().IntVar(&cfg.poolSize, "pool-size", 128, "addresses in the pool of eni-sim, 1 to 250")

	root.AddCommand(up,
		&cobra.Command{
			Use:   "down",
			Short: "Stop the cluster and remove everything it made outside the checkout",
			Args:  cobra.NoArgs,
			RunE:  func(cmd *cobra.Command, _ []string) error { return down(cmd.Context()) },
		},
		&cobra.Command{
			Use:   "build",
			Short: "Install the Debian packages and build the binaries that are missing, and stop there",
			Args:  cobra.NoArgs,
			RunE:  func(cmd *cobra.Command, _ []string) error { return prepare(cmd.Context(), cfg) },
		},
		&cobra.Command{
			Use:   "apiserver DIR",
			Short: "Build what is missing of an API server alone, with etcd and Helm, and link the binaries into a directory",
			Args:  cobra.ExactArgs(1),
			RunE:  func(cmd *cobra.Command, args []string) error { return buildAPIServer(cmd.Context(), cfg, args[0]) },
		},
		&cobra.Command{
			Use:   "packages NAME…",
			Short: "Install the Debian packages whose binaries, which are called like them, are missing",
			Args:  cobra.MinimumNArgs(1),
			RunE: func(cmd *cobra.Command, names []string) error {
				var tools []hostTool
				for _, name := range names {
					tools = append(tools, namesake(name))
				}
				return installPackages(cmd.Context(), tools)
			},
		},
		&cobra.Command{
			Use:   "crictl",
			Short: "Build crictl, if it is missing, and link it into .cluster/bin",
			Args:  cobra.NoArgs,
			RunE: func(cmd *cobra.Command, _ []string) error {
				return buildAndLink(cmd.Context(), cfg, []toolset{crictl()}, cfg.path("bin"))
			},
		},
		&cobra.Command{
			Use:   "crio DIR",
			Short: "Build CRI-O, if it is missing, and put it into a directory, with its helper pinns and the images of the node",
			Args:  cobra.ExactArgs(1),
			RunE:  func(cmd *cobra.Command, args []string) error { return buildCRIO(cmd.Context(), cfg, args[0]) },
		},
		&cobra.Command{
			Use:   "image ARCHIVE REFERENCE ARCH=BINARY...",
			Short: "Write an OCI archive that holds one static binary as its entry point, for one or more processors, and bills of its materials beside it",
			Args:  cobra.MinimumNArgs(3),
			RunE:  func(_ *cobra.Command, args []string) error { return guardImage(args[0], args[1], args[2:]) },
		},
		&cobra.Command{
			Use:   "load ARCHIVE",
			Short: "Import an OCI archive into the node of the running cluster",
			Args:  cobra.ExactArgs(1),
			RunE:  func(cmd *cobra.Command, args []string) error { return load(cmd.Context(), args[0]) },
		},
	)
	return root
}
