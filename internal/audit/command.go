// Package audit is the command `eni-guard audit`: it reads audit logs, has them reviewed, and prints what was found.
package audit

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/term"

	"github.com/eni-guard/eni-guard/internal/auditlog"
	"github.com/eni-guard/eni-guard/internal/exitstatus"
	"github.com/eni-guard/eni-guard/internal/review"
)

// The exit statuses of `eni-guard audit`, beside 0 and exitstatus.Usage.
const (
	// exitFound means: there are removals of a decision that --fail-on names, or --check has found something lacking.
	exitFound = 1
	// exitUnread means: a log could not be read, or what was to be checked was not seen.
	exitUnread = 2
)

// mostHeap is above which the garbage collector takes the time it needs, in bytes.
const mostHeap = 32 << 20

var errInterrupted = errors.New("interrupted: the report is about what was read until then")

type options struct {
	since, until                                        string
	namespaces, users, nodes, pods, decisions, verdicts []string
	output                                              string
	failOn                                              []string
	strict, follow, check                               bool
	release                                             string
	exempt                                              []string
}

// NewCommand returns `eni-guard audit`.
func NewCommand() *cobra.Command {
	o := options{}
	cmd := &cobra.Command{
		Use:   "audit [FILE…]",
		Short: "Tell from audit logs who removed which pods by force, what was on the node, and what slipped past",
		Long: `Reads audit logs of Kubernetes API servers, as the log backend writes them, as the webhook backend sends them, or as the log service
of Alibaba Cloud exports them; packed with gzip or zstd or not. A FILE may be a pattern in quotes, or - for standard input, which
is also what is read without any FILE.

Exit status: 0 reviewed; 1 a decision of --fail-on is there, or --check found something lacking; 2 a log could not be read, has a line
that could not be read with --strict, does not show what --check looks for or tell what --fail-on asks for, or reading it was interrupted: once ends with the report so far, twice at once; 64 wrong usage.`,
		Example: `  # who removed what by force in the last week?
  eni-guard audit --since 7d '/var/log/kubernetes/audit*.log*'
  # for a colleague, as one file that needs nothing else
  eni-guard audit -o html audit.log >review.html
  # in a pipeline: fail if anything slipped past or was overridden
  eni-guard audit --fail-on slipped-past,overridden audit.log
  # does the log have everything that the review needs?
  eni-guard audit --check audit.log`,
		Args: cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, files []string) error {
			if err := nothingAskedFor(cmd.Flags()); err != nil {
				return exitstatus.With(exitstatus.Usage, err)
			}
			q, err := o.validate(files, time.Now())
			if err != nil {
				return exitstatus.With(exitstatus.Usage, err)
			}
			return q.run(cmd.Context(), cmd.InOrStdin(), cmd.OutOrStdout(), cmd.ErrOrStderr())
		},
	}
	cmd.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return exitstatus.With(exitstatus.Usage, err) })
	flags := cmd.Flags()
	flags.StringVar(&o.since, "since", "", "only from this time on: 2026-11-24, 2026-11-24T18:00:00Z, or 90m, 24h, 7d ago")
	flags.StringVar(&o.until, "until", "", "only before this time, written in the same ways")
	flags.StringSliceVarP(&o.namespaces, "namespace", "n", nil, "only pods of these namespaces")
	flags.StringSliceVar(&o.users, "user", nil, "only what these users did, also as somebody else")
	flags.StringSliceVar(&o.nodes, "node", nil, "only pods of these nodes")
	flags.StringSliceVar(&o.pods, "pod", nil, "only these pods: NAME, NAMESPACE/NAME or UID")
	flags.StringSliceVar(&o.decisions, "decision", nil, "only these decisions: "+decisionWords())
	flags.StringSliceVar(&o.verdicts, "verdict", nil, "only these verdicts: "+strings.Join(verdicts, ", "))
	flags.StringVarP(&o.output, "output", "o", "table", "table, json, csv, or html")
	flags.StringSliceVar(&o.failOn, "fail-on", nil, "end with status 1 if there is a removal of one of these decisions")
	flags.BoolVar(&o.strict, "strict", false, "end at the first line that cannot be read")
	flags.BoolVarP(&o.follow, "follow", "f", false, "go on with what is written to the one FILE, and print removals as they come, until interrupted")
	flags.BoolVar(&o.check, "check", false, "only tell whether the log has what a review needs")
	flags.StringVar(&o.release, "release", "eni-guard/eni-guard", "NAMESPACE/NAME of the guard's Helm release")
	flags.StringSliceVar(&o.exempt, "exempt-namespaces", []string{"kube-system"}, "namespaces that are never guarded, the chart's exemptNamespaces; none if empty")
	return cmd
}

// nothingAskedFor refuses a flag without a value, or with an empty one in its list, as a variable of a script leaves it that is not set: it would
// ask for everything.
func nothingAskedFor(flags *pflag.FlagSet) error {
	var failed error
	flags.Visit(func(flag *pflag.Flag) {
		list, isList := flag.Value.(pflag.SliceValue)
		empty := flag.Value.String() == ""
		if isList {
			empty = len(list.GetSlice()) == 0 || slices.Contains(list.GetSlice(), "")
		}
		// No exempt namespace at all makes sense.
		if empty && failed == nil && (flag.Name != "exempt-namespaces" || len(list.GetSlice()) > 0) {
			failed = fmt.Errorf("--%s has an empty value; give it one, or leave it out", flag.Name)
		}
	})
	return failed
}

var (
	verdicts = []string{"released", "bound", "unknown", "not-asked"}
	outputs  = []string{"table", "json", "csv", "html"}
)

func decisionWords() string {
	var words []string
	for _, d := range review.Decisions {
		words = append(words, string(d))
	}
	return strings.Join(words, ", ")
}

// question is what a person wants to know, read.
type question struct {
	options
	files  []string
	filter review.Filter
	fail   []review.Decision
	guard  review.Guard
}

func (o options) validate(files []string, now time.Time) (question, error) {
	q := question{options: o, files: files}
	if !slices.Contains(outputs, o.output) {
		return q, fmt.Errorf("--output %q is none of %s", o.output, strings.Join(outputs, ", "))
	}
	var err error
	if q.filter.Since, err = parseTime(o.since, now); err != nil {
		return q, fmt.Errorf("--since %w", err)
	}
	if q.filter.Until, err = parseTime(o.until, now); err != nil {
		return q, fmt.Errorf("--until %w", err)
	}
	if s, u := q.filter.Since, q.filter.Until; !s.IsZero() && !u.IsZero() && !s.Before(u) {
		return q, fmt.Errorf("--since %s is not before --until %s", o.since, o.until)
	}
	if q.filter.Decisions, err = decisions("decision", o.decisions); err != nil {
		return q, err
	}
	if q.fail, err = decisions("fail-on", o.failOn); err != nil {
		return q, err
	}
	for _, verdict := range o.verdicts {
		if !slices.Contains(verdicts, verdict) {
			return q, fmt.Errorf("--verdict %q is none of %s", verdict, strings.Join(verdicts, ", "))
		}
	}
	q.filter.Namespaces, q.filter.Users, q.filter.Nodes, q.filter.Pods, q.filter.Verdicts = o.namespaces, o.users, o.nodes, o.pods, o.verdicts
	if at := slices.IndexFunc(o.pods, func(pod string) bool { return strings.Count(pod, "/") > 1 }); at >= 0 {
		return q, fmt.Errorf("--pod %q is none of NAME, NAMESPACE/NAME and UID", o.pods[at])
	}
	namespace, release, found := strings.Cut(o.release, "/")
	if !found || namespace == "" || release == "" || strings.Contains(release, "/") {
		return q, fmt.Errorf("--release %q is not NAMESPACE/NAME", o.release)
	}
	q.guard = review.Guard{Namespace: namespace, Release: release, Exempt: o.exempt}
	switch {
	case slices.Contains(files, ""):
		return q, errors.New("a FILE has an empty name; name it, or leave it out to read standard input")
	case o.follow && (len(files) != 1 || files[0] == auditlog.Stdin):
		return q, errors.New("--follow needs one FILE, the log that is written to")
	case o.follow && (o.check || len(o.failOn) > 0 || o.output != "table" && o.output != "json"):
		return q, errors.New("--follow has no end, so --check, --fail-on, -o csv and -o html do not go with it")
	case o.check && q.askedWords() != "":
		return q, errors.New("--check looks at the whole log, so no filter goes with it")
	case o.check && (o.output == "csv" || o.output == "html" || len(o.failOn) > 0):
		return q, errors.New("--check prints a table or, with -o json, JSON, and does not go with --fail-on")
	}
	return q, nil
}

func decisions(flag string, words []string) ([]review.Decision, error) {
	var all []review.Decision
	for _, word := range words {
		if !slices.Contains(review.Decisions, review.Decision(word)) {
			return nil, fmt.Errorf("--%s %q is none of %s", flag, word, decisionWords())
		}
		all = append(all, review.Decision(word))
	}
	return all, nil
}

func (q question) run(ctx context.Context, in io.Reader, out, messages io.Writer) error {
	// What is read is bounded; what the collector leaves lying about is, too.
	defer debug.SetMemoryLimit(debug.SetMemoryLimit(mostHeap))
	if len(q.files) == 0 && isTerminal(in) {
		return exitstatus.With(exitstatus.Usage, errors.New("name a FILE, or pipe a log in"))
	}
	sources, err := auditlog.Sources(q.files, in)
	if err != nil {
		return exitstatus.With(exitUnread, err)
	}
	reader := &auditlog.Reader{Selection: auditlog.Selection{GuardNamespace: q.guard.Namespace, All: q.check}, Strict: q.strict}
	switch {
	case q.check:
		return q.runCheck(ctx, reader, sources, out, messages)
	case q.follow && len(sources) != 1:
		return exitstatus.With(exitstatus.Usage, fmt.Errorf("--follow needs one FILE, and %s is %d", q.files[0], len(sources)))
	case q.follow:
		if err := sources[0].Followable(); err != nil {
			return exitstatus.With(exitstatus.Usage, fmt.Errorf("--follow: %w", err))
		}
		return q.runFollow(ctx, reader, sources[0], out, messages)
	}
	d, err := q.review(ctx, reader, sources, messages)
	if err != nil {
		return exitstatus.With(exitUnread, err)
	}
	defer d.Close()
	if err := d.print(out, q.output); err != nil {
		return exitstatus.With(exitUnread, fmt.Errorf("printing: %w", err))
	}
	if q.output == "csv" { // which has no place for it
		for _, line := range slices.Concat(problemWords(d.log), untoldWords(d.Untold)) {
			fmt.Fprintln(messages, line)
		}
	}
	if d.interrupted {
		return exitstatus.With(exitUnread, errInterrupted)
	}
	if slices.ContainsFunc(d.Totals.Decisions, func(c review.Count) bool { return slices.Contains(q.fail, review.Decision(c.Name)) }) {
		return exitstatus.Error(exitFound)
	}
	if why := d.uncertain(q.fail); why != "" {
		return exitstatus.With(exitUnread, fmt.Errorf("%s, so nothing is certain about --fail-on", why))
	}
	return nil
}

// uncertain says why a log without what somebody asks for may have it all the same; nothing if it has not. Who asks must not take a log that
// could not be read, or does not tell, for one that has nothing.
func (d document) uncertain(fail []review.Decision) string {
	// What the guard has decided is in the log at any level. (Of evictions without a decision no policy records what would tell.)
	untold := d.Untold.Deletes + d.Untold.Collections
	switch {
	case len(fail) == 0:
		return ""
	case d.log.Unread > 0:
		return count(d.log.Unread, "file") + " could not be read in whole"
	case d.log.Lines == 0:
		return "there was nothing to read"
	case slices.Contains(fail, review.SlippedPast) && untold > 0:
		return count(int(untold), "delete") + " may have slipped past and the log does not tell (--check says what it lacks)"
	default:
		return ""
	}
}

// review reads the sources and puts the report together.
func (q question) review(ctx context.Context, reader *auditlog.Reader, sources []auditlog.Source, messages io.Writer) (d document, err error) {
	found := review.New(q.guard)
	defer func() { err = errors.Join(err, found.Close()) }()
	interrupted := ctx
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	reader.Each = func(e *auditlog.Event) {
		if err := found.Add(e); err != nil {
			stop(fmt.Errorf("keeping what was read: %w", err))
		}
	}
	d.log, err = readShown(ctx, reader, sources, messages)
	if d.interrupted = errors.Is(err, context.Canceled) && interrupted.Err() != nil; d.interrupted {
		err = nil
	}
	if err != nil {
		return d, cmp.Or(context.Cause(ctx), err)
	}
	d.asked = q.askedWords()
	d.Report, err = found.Report(q.filter)
	return d, err
}

// document is everything that is printed.
type document struct {
	log auditlog.Summary
	*review.Report

	// interrupted says that somebody did not want to wait for the end.
	interrupted bool
	// asked says what the report is about, where that is not everything.
	asked string
}

func (d document) print(out io.Writer, format string) error {
	switch format {
	case "json":
		return d.json(out)
	case "csv":
		return d.csv(out)
	case "html":
		return d.html(out)
	default:
		return d.text(out, styleOf(out))
	}
}

// json writes one object, a removal and a change at a time.
func (d document) json(to io.Writer) error {
	out := bufio.NewWriter(to)
	var failed error
	value := func(indent string, value any) {
		text, err := json.MarshalIndent(value, indent, "  ")
		failed = errors.Join(failed, err)
		// It keeps the first error until it is flushed.
		_, _ = out.Write(text)
	}
	_, _ = out.WriteString("{\n  \"log\": ")
	value("  ", d.log)
	if d.asked != "" {
		_, _ = out.WriteString(",\n  \"only\": ")
		value("", d.asked)
	}
	if d.interrupted {
		_, _ = out.WriteString(",\n  \"interrupted\": true")
	}
	_, _ = out.WriteString(",\n  \"removals\": [")
	writeItems(out, d.Removals(), value, &failed)
	_, _ = out.WriteString("],\n  \"changes\": [")
	writeItems(out, d.Changes(), value, &failed)
	_, _ = out.WriteString("],\n  \"untold\": ")
	value("  ", d.Untold)
	_, _ = out.WriteString(",\n  \"totals\": ")
	value("  ", d.Totals)
	_, _ = out.WriteString("\n}\n")
	return errors.Join(failed, out.Flush())
}

func writeItems[T any](out *bufio.Writer, items iter.Seq2[T, error], value func(string, any), failed *error) {
	between := "\n    "
	for item, err := range items {
		if err != nil {
			*failed = errors.Join(*failed, err)
			return
		}
		_, _ = out.WriteString(between)
		value("    ", item)
		between = ",\n    "
	}
	if between != "\n    " {
		_, _ = out.WriteString("\n  ")
	}
}

func writeJSON(out io.Writer, value any) error {
	encoder := json.NewEncoder(out)
	encoder.SetIndent("", "  ")
	return encoder.Encode(value)
}

// runCheck tells whether the log has what a review needs.
func (q question) runCheck(ctx context.Context, reader *auditlog.Reader, sources []auditlog.Source, out, messages io.Writer) error {
	check := review.NewCheck(q.guard)
	reader.Each = check.Add
	read, err := readShown(ctx, reader, sources, messages)
	interrupted := errors.Is(err, context.Canceled)
	if err != nil && !interrupted {
		return exitstatus.With(exitUnread, err)
	}
	needs := check.Needs()
	if q.output == "json" {
		err = writeJSON(out, struct {
			Log   auditlog.Summary `json:"log"`
			Needs []review.Need    `json:"needs"`
		}{read, needs})
	} else {
		_, err = io.WriteString(out, checkText(read, needs, styleOf(out)))
	}
	switch {
	case err != nil:
		return exitstatus.With(exitUnread, err)
	case interrupted:
		return exitstatus.With(exitUnread, errInterrupted)
	case slices.ContainsFunc(needs, func(n review.Need) bool { return n.Lacking > 0 }):
		return exitstatus.Error(exitFound)
	case slices.ContainsFunc(needs, func(n review.Need) bool { return n.Seen == 0 }):
		return exitstatus.Error(exitUnread)
	default:
		return nil
	}
}

func isTerminal(stream any) bool {
	file, ok := stream.(*os.File)
	return ok && term.IsTerminal(int(file.Fd()))
}
