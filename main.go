// Command eni-guard guards Kubernetes pods against forced removal while their sandbox is still alive on the node.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/eni-guard/eni-guard/internal/agent"
	"github.com/eni-guard/eni-guard/internal/version"
	"github.com/eni-guard/eni-guard/webhook"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	root := &cobra.Command{
		Use:           "eni-guard",
		Short:         "Guards pods against forced removal while their sandbox is still alive on the node",
		SilenceUsage:  true,
		SilenceErrors: true,
		Args:          cobra.NoArgs,
		// Exit with 1, so that a container without a command does not look completed.
		RunE: func(cmd *cobra.Command, _ []string) error {
			return errors.Join(cmd.Help(), errors.New("a command is missing"))
		},
	}
	root.AddCommand(webhook.NewCommand(), agent.NewCommand(), version.NewCommand())
	if err := root.ExecuteContext(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "eni-guard: "+err.Error())
		os.Exit(1)
	}
}
