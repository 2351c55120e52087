// Command eni-guard guards Kubernetes pods against forced removal while their sandbox is still alive on the node.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/eni-guard/eni-guard/internal/agent"
	"github.com/eni-guard/eni-guard/internal/audit"
	"github.com/eni-guard/eni-guard/internal/exitstatus"
	"github.com/eni-guard/eni-guard/internal/version"
	"github.com/eni-guard/eni-guard/webhook"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	// Who cannot wait for an orderly end signals again.
	context.AfterFunc(ctx, stop)
	os.Exit(exitStatus(newCommand().ExecuteContext(ctx)))
}

func newCommand() *cobra.Command {
	root := &cobra.Command{
		Use:           "eni-guard",
		Short:         "Guards pods against forced removal while their sandbox is still alive on the node",
		SilenceUsage:  true,
		SilenceErrors: true,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return nil
			}
			meant := ""
			if likely := cmd.SuggestionsFor(args[0]); len(likely) > 0 {
				meant = "; did you mean " + strings.Join(likely, " or ") + "?"
			}
			return fmt.Errorf("there is no command %q%s", args[0], meant)
		},
		SuggestionsMinimumDistance: 2, // in letters
		// With an error, so that a container without a command does not look completed.
		RunE: func(cmd *cobra.Command, _ []string) error {
			return exitstatus.With(exitstatus.Usage, errors.Join(cmd.Help(), errors.New("a command is missing")))
		},
	}
	root.AddCommand(webhook.NewCommand(), agent.NewCommand(), agent.NewInspectCommand(), audit.NewCommand(), webhook.NewCheckCommand(), version.NewCommand())
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		// That a command does not exist is to be told before that its flags do not.
		if args := cmd.Flags().Args(); cmd == root && len(args) > 0 {
			return cmd.Args(cmd, args)
		}
		return exitstatus.With(exitstatus.Usage, err)
	})
	refuseWrongArguments(root)
	return root
}

// refuseWrongArguments lets a command, and all below it, end with exitstatus.Usage where its arguments are wrong.
func refuseWrongArguments(cmd *cobra.Command) {
	check := cmd.Args
	cmd.Args = func(cmd *cobra.Command, args []string) error {
		if err := check(cmd, args); err != nil {
			return exitstatus.With(exitstatus.Usage, err)
		}
		return nil
	}
	for _, below := range cmd.Commands() {
		refuseWrongArguments(below)
	}
}

// exitStatus says what went wrong, if anything, and how to end. A command that has said all by its status says no more.
func exitStatus(err error) int {
	status, told := errors.AsType[exitstatus.Error](err)
	if _, all := err.(exitstatus.Error); err != nil && !all { //nolint:errorlint // one that is wrapped has more to say
		fmt.Fprintln(os.Stderr, "eni-guard: "+err.Error())
	}
	switch {
	case told:
		return int(status)
	case err != nil:
		return 1
	default:
		return 0
	}
}
