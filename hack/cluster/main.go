// Command cluster runs a real one-node Kubernetes on this machine, from nothing but Go modules and Debian packages:
// for development, for the demo and for the end-to-end tests of eni-guard.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
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
			Use:   "image ARCHIVE REFERENCE BINARY",
			Short: "Write an OCI archive that holds one static binary as its entry point",
			Args:  cobra.ExactArgs(3),
			RunE: func(_ *cobra.Command, args []string) error {
				return writeImage(args[0], args[1], map[string]string{"/" + filepath.Base(args[2]): args[2]}, nil)
			},
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
