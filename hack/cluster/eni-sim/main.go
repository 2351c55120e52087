// Command eni-sim is a CNI plugin with Terway's rule for releasing addresses, for the tests and the demo of eni-guard. It
// is no network for a real cluster. See README.md.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/version"
	"github.com/spf13/cobra"
)

func main() {
	if os.Getenv("CNI_COMMAND") != "" { // called by the runtime
		functions := skel.CNIFuncs{Add: cmdAdd, Del: cmdDel, Check: cmdCheck}
		skel.PluginMainFuncs(functions, version.PluginSupports("0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0"), "eni-sim")
		return
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := newCommand().ExecuteContext(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "eni-sim: "+err.Error())
		os.Exit(1)
	}
}

func newCommand() *cobra.Command {
	root := &cobra.Command{
		Use:           "eni-sim",
		Short:         "A CNI plugin with Terway's release rule, for tests",
		Long:          "A CNI plugin with Terway's release rule, for tests. A container runtime calls it with CNI_COMMAND in the environment.",
		SilenceUsage:  true,
		SilenceErrors: true,

		CompletionOptions: cobra.CompletionOptions{DisableDefaultCmd: true},
	}
	root.AddCommand(newGCCommand(), newShowCommand())
	return root
}
