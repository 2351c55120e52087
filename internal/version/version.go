// Package version knows what was built.
package version

import (
	"fmt"
	"runtime"

	"github.com/spf13/cobra"
)

// Version is set by the linker (-X), from the version of the chart.
var Version = "unreleased"

// NewCommand returns `eni-guard version`.
func NewCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the version",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, err := fmt.Fprintf(cmd.OutOrStdout(), "eni-guard %s %s/%s %s\n", Version, runtime.GOOS, runtime.GOARCH, runtime.Version())
			return err
		},
	}
}
