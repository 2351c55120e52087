package audit

import (
	"context"
	"encoding/json"
	"fmt"
	"io"

	"github.com/eni-guard/eni-guard/internal/auditlog"
	"github.com/eni-guard/eni-guard/internal/exitstatus"
	"github.com/eni-guard/eni-guard/internal/review"
)

// runFollow prints removals as they come, each once, until it is interrupted, and beside them what cannot be read, also as it comes. What
// the log does not tell is told at the end.
func (q question) runFollow(ctx context.Context, reader *auditlog.Reader, source auditlog.Source, out, messages io.Writer) error {
	found := review.NewLive(q.guard)
	style := styleOf(out)
	var failed error
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	reader.Each = func(e *auditlog.Event) {
		for _, r := range found.Add(e) {
			if !q.filter.Removal(r) {
				continue
			}
			if err := q.printOne(out, r, style); err != nil {
				failed = exitstatus.With(exitUnread, fmt.Errorf("printing: %w", err))
				stop()
			}
		}
	}
	// A terminal that cannot be written to says nothing about the log.
	reader.EachProblem = func(p auditlog.Problem) { _, _ = fmt.Fprintln(messages, printable(p.String())) }
	read, err := reader.Read(ctx, []auditlog.Source{source.Follow(ctx)})
	for _, line := range untoldWords(found.Untold) {
		_, _ = fmt.Fprintln(messages, printable(line))
	}
	switch {
	case failed != nil || ctx.Err() != nil:
		return failed
	case err != nil:
		return exitstatus.With(exitUnread, err)
	case read.Unread > 0:
		return exitstatus.With(exitUnread, fmt.Errorf("%s is not followed any more", source.Name))
	default:
		return nil
	}
}

func (q question) printOne(out io.Writer, r review.Removal, s style) error {
	if q.output == "json" {
		return json.NewEncoder(out).Encode(r)
	}
	decision := string(r.Decision)
	if s.colour {
		decision = paintDecision(decision)
	}
	text := fmt.Sprintf("%s/%s on node %s by %s: %s", r.Namespace, orUnknown(r.Pod), orUnknown(r.Node), userWords(r.User, r.ImpersonatedBy), r.Reason)
	switch {
	case r.Decision == review.SlippedPast:
		text += ": " + slippedWords(r.Reason)
	case r.OverrideReason != "":
		text += fmt.Sprintf(": %q", r.OverrideReason)
	case r.Evidence != "":
		text += ": " + r.Evidence
	}
	_, err := fmt.Fprintf(out, "%s %s %s\n", at(r.Time), decision, printable(text))
	return err
}
