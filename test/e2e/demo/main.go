// Command demo tells the incident on the running cluster: without the guard it happens, with the guard it does not. It
// exits with 0 only if every step was observed.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
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
	began := time.Now()
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
	fmt.Printf("\n=== What the API server's audit log tells of it ===\n\n")
	if err := review(ctx, cluster, began); err != nil {
		return err
	}
	fmt.Println("\n=== Everything was observed as told ===")
	fmt.Printf("\nThe cluster still runs: try it yourself with KUBECONFIG=%s; `make cluster-down` removes it.\n", cluster.Kubeconfig())
	return nil
}

// review shows what `eni-guard audit` makes of the log, and fails unless it has the removal that slipped past and the one that was refused.
func review(ctx context.Context, cluster *incident.Cluster, since time.Time) error {
	args := []string{"audit", "--since", since.UTC().Format(time.RFC3339), "--namespace", "without-guard,with-guard", cluster.AuditLog()}
	told, err := exec.CommandContext(ctx, "bin/eni-guard", append(args, "-o", "json")...).Output()
	if err != nil {
		return fmt.Errorf("the review of the audit log: %w", err)
	}
	var found struct {
		Removals []struct{ Namespace, Pod, Decision string }
	}
	if err := json.Unmarshal(told, &found); err != nil {
		return fmt.Errorf("the review of the audit log: %w", err)
	}
	for _, want := range []string{"without-guard/payment-0 slipped-past", "with-guard/payment-0 denied", "with-guard/migration allowed"} {
		n := 0
		for _, r := range found.Removals {
			if r.Namespace+"/"+r.Pod+" "+r.Decision == want {
				n++
			}
		}
		if n != 1 {
			return fmt.Errorf("the review of the audit log has %q %d times, not once", want, n)
		}
	}
	// As it looks on this terminal.
	cmd := exec.CommandContext(ctx, "bin/eni-guard", args...)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	return cmd.Run()
}
