// Command demo tells the incident on the running cluster: without the guard it happens, with the guard it does not. It
// exits with 0 only if every step was observed.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/eni-guard/eni-guard/test/e2e/incident"
)

// timeLimit bounds the whole demo; it takes two to three minutes.
const timeLimit = 15 * time.Minute

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, timeLimit)
	defer cancel()
	if err := run(ctx); err != nil {
		if errors.Is(context.Cause(ctx), context.Canceled) {
			err = errors.New("interrupted; the cluster still runs: `make demo` starts the story over, `make cluster-down` removes the cluster")
		}
		fmt.Fprintln(os.Stderr, "\ndemo: "+err.Error())
		os.Exit(1)
	}
}

func run(ctx context.Context) error {
	cluster, err := incident.Open(ctx, ".")
	if err != nil {
		return err
	}
	story := &incident.Story{
		Cluster: cluster,
		Tell:    func(format string, args ...any) { fmt.Printf("\n"+format+"\n", args...) },
		Show: func(command, output string) {
			fmt.Println()
			if command != "" {
				fmt.Println("    $ " + command)
			}
			fmt.Println("    " + strings.ReplaceAll(output, "\n", "\n    "))
		},
	}
	for _, part := range []struct {
		title string
		tell  func(context.Context) error
	}{
		{"The incident, without the guard", story.WithoutGuard},
		{"The same, with the guard", story.WithGuard},
	} {
		fmt.Printf("\n=== %s ===\n", part.title)
		if err := part.tell(ctx); err != nil {
			return fmt.Errorf("%s: not as told: %w", strings.ToLower(part.title), err)
		}
	}
	fmt.Println("\n=== Everything was observed as told ===")
	fmt.Printf("\nThe cluster still runs: try it yourself with KUBECONFIG=%s; `make cluster-down` removes it.\n", cluster.Kubeconfig())
	return nil
}
