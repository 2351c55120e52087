package audit

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/eni-guard/eni-guard/internal/auditlog"
	"github.com/eni-guard/eni-guard/internal/exitstatus"
	"github.com/eni-guard/eni-guard/internal/review"
)

// runFollow prints removals as they come, each once, until it is interrupted, and then what it could not read or tell.
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
	read, err := reader.Read(ctx, []auditlog.Source{source.Follow(ctx)})
	for _, line := range slices.Concat(problemWords(read), untoldWords(found.Untold)) {
		fmt.Fprintln(messages, printable(line))
	}
	if failed == nil && err != nil && !errors.Is(err, context.Canceled) {
		failed = exitstatus.With(exitUnread, err)
	}
	return failed
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
