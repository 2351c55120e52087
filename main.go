// Command eni-guard guards Kubernetes pods against forced removal while their sandbox is still alive on the node.
package main

import (
	"context"
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
	}
	root.AddCommand(webhook.NewCommand(), agent.NewCommand(), version.NewCommand())
	if err := root.ExecuteContext(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "eni-guard: "+err.Error())
		os.Exit(1)
	}
}
