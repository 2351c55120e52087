package audit

import (
	"bytes"
	"context"
	"encoding/csv"
	"encoding/json"
	"errors"
	"flag"
	"html"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/eni-guard/eni-guard/internal/auditlog"
	"github.com/eni-guard/eni-guard/internal/exitstatus"
	"github.com/eni-guard/eni-guard/internal/review"
)

// The logs are those of the package review, which says where they come from.
const (
	everyWay  = "../review/testdata/every-way.log.gz"
	scenarios = "../review/testdata/scenarios.log.gz"
)

var update = flag.Bool("update", false, "write the golden files anew")

// run runs the command and returns what it prints and its exit status; -1 is an error without one.
func run(t testing.TB, stdin string, args ...string) (string, int, error) {
	t.Helper()
	out, _, status, err := runApart(t, stdin, args...)
	return out, status, err
}

// runApart is run, and returns also what is told beside.
func runApart(t testing.TB, stdin string, args ...string) (stdout, stderr string, status int, err error) {
	t.Helper()
	cmd := NewCommand()
	cmd.SilenceErrors, cmd.SilenceUsage = true, true
	var out, messages bytes.Buffer
	cmd.SetIn(strings.NewReader(stdin))
	cmd.SetOut(&out)
	cmd.SetErr(&messages)
	// Without any, cobra takes those of the test.
	cmd.SetArgs(append([]string{}, args...))
	err = cmd.ExecuteContext(t.Context())
	exit, told := errors.AsType[exitstatus.Error](err)
	status = int(exit)
	if err != nil && !told {
		status = -1
	}
	return out.String(), messages.String(), status, err
}

// golden compares a text with the file that has it.
func golden(t *testing.T, name, got string) {
	t.Helper()
	file := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil || got != string(want) {
		t.Errorf("%s (%v): go test ./internal/audit -update writes it anew:\n%s", file, err, got)
	}
}

func TestTheReportForPeople(t *testing.T) {
	out, status, err := run(t, "", everyWay)
	if status != 0 {
		t.Fatal(err)
	}
	golden(t, "every-way.txt", out)
}

// printed is what is printed with -o json.
type printed struct {
	Log      auditlog.Summary
	Only     string
	Removals []review.Removal
	Changes  []review.Change
	Untold   review.Untold
	Totals   review.Totals
}

// documentOf is what is printed of a recorded log.
func documentOf(t testing.TB, args ...string) (d printed) {
	t.Helper()
	out, status, err := run(t, "", append(args, "-o", "json")...)
	if status != 0 || json.Unmarshal([]byte(out), &d) != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return d
}

// reviewOf is the review of a recorded log, before it is printed.
func reviewOf(t testing.TB, log string) document {
	t.Helper()
	sources, err := auditlog.Sources([]string{log}, nil)
	if err != nil {
		t.Fatal(err)
	}
	q := question{guard: review.Guard{Namespace: "eni-guard", Release: "eni-guard"}}
	d, err := q.review(t.Context(), &auditlog.Reader{Selection: auditlog.Selection{GuardNamespace: "eni-guard"}}, sources, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	return d
}

func TestTheTableFitsTheTerminal(t *testing.T) {
	d := reviewOf(t, everyWay)
	at := func(width int) string {
		var text strings.Builder
		if err := d.removalTable(&text, style{width: width}); err != nil {
			t.Fatal(err)
		}
		return text.String()
	}
	for _, width := range []int{60, 80, 100, 132, 200, 400} {
		text := at(width)
		for line := range strings.Lines(text) {
			if n := len([]rune(strings.TrimRight(line, "\n"))); n > width {
				t.Errorf("%d of %d columns: %s", n, width, line)
			}
		}
		for _, must := range []string{"TIME (UTC)", "POD", "DECISION", "slipped-past"} {
			if !strings.Contains(text, must) {
				t.Errorf("at a width of %d there is no %s:\n%s", width, must, text)
			}
		}
	}
	golden(t, "every-way-100.txt", at(100))
	var text strings.Builder
	if err := d.text(&text, style{width: 100, colour: true}); err != nil || !strings.Contains(text.String(), "\x1b[31mslipped-past\x1b[0m") {
		t.Errorf("no colour (%v):\n%s", err, text.String())
	}
}

// Only words that are wider than the terminal go beyond it, and on it nothing is left out of the lists.
func TestTheListsFitTheTerminal(t *testing.T) {
	d := reviewOf(t, everyWay)
	d.asked = "namespace " + strings.Repeat("shop or ", 20) + "bank"
	d.log.ProblemCount, d.log.Problems = 1, []auditlog.Problem{{File: "audit.log", Line: 7, What: strings.Repeat("is broken ", 30)}}
	needs := []review.Need{{What: "deletes of pods", Why: "whether they are forced", Level: "RequestResponse", Seen: 3, Lacking: 3, Example: "0896128d-0324-4a4d-94af-b99c5692259a", AtLevel: "Metadata"}}
	for name, print := range map[string]func(style) string{
		"the report": func(s style) string {
			var text strings.Builder
			if err := d.text(&text, s); err != nil {
				t.Fatal(err)
			}
			head, _, _ := strings.Cut(text.String(), "\n\n")
			_, lists, _ := strings.Cut(text.String(), "\nSlipped past")
			return head + "\n" + lists
		},
		"a check": func(s style) string { return checkText(d.log, needs, s) },
	} {
		whole := strings.Fields(print(style{}))
		for _, width := range []int{60, 80, 120} {
			text := print(style{width: width})
			for line := range strings.Lines(text) {
				if n := len([]rune(strings.TrimSuffix(line, "\n"))); n > width && len(strings.Fields(line)) > 1 {
					t.Errorf("%s: %d of %d columns: %s", name, n, width, line)
				}
			}
			if name == "the report" && !slices.Equal(strings.Fields(text), whole) {
				t.Errorf("%s has other words at a width of %d:\n%s", name, width, text)
			}
			if name == "a check" && !strings.Contains(strings.Join(strings.Fields(text), " "), "lacking: 3 of 3, such as 0896128d-0324-4a4d-94af-b99c5692259a, at level Metadata. Tells whether they are forced.") {
				t.Errorf("%s lacks something at a width of %d:\n%s", name, width, text)
			}
		}
	}
	if text := checkText(d.log, needs, style{width: 200}); !strings.Contains(text, "RECORDED") {
		t.Errorf("where it fits it is no table:\n%s", text)
	}
}

// Names, user agents and reasons are what somebody has sent.
func TestNothingInALogReachesTheTerminalAsACommand(t *testing.T) {
	event := `{"kind":"Event","apiVersion":"audit.k8s.io/v1","level":"Request","auditID":"1","stage":"ResponseComplete","requestURI":"/api/v1/namespaces/shop/pods/web-0?gracePeriodSeconds=0",` +
		`"verb":"delete","user":{"username":"=jo\u001b[2J"},"userAgent":"\u001b]0;x\u0007<script>alert(1)</script>\r\n","objectRef":{"resource":"pods","namespace":"shop","name":"web-0"},"responseStatus":{"code":200},` +
		`"requestReceivedTimestamp":"2026-11-25T01:02:03.000004Z","annotations":{"override.eni-guard.io/override-reason":"=1+1\"\u001b[31m<img src=x>"}}` + "\n{\"\x1b[2J\n"
	for _, format := range []string{"table", "json", "html"} {
		out, _, err := run(t, event, "-o", format)
		if err != nil || strings.ContainsAny(out, "\x1b\x07") || !strings.Contains(out, "web-0") {
			t.Errorf("%s: %v: %q", format, err, out)
		}
		if format == "html" && strings.Contains(out, "<script>alert") || format == "html" && strings.Contains(out, "<img") {
			t.Errorf("%s has what a browser would do:\n%s", format, out)
		}
	}
	out, _, _ := run(t, event, "-o", "csv")
	for _, line := range strings.Split(out, "\n")[1:] {
		for cell := range strings.SplitSeq(line, ",") {
			if strings.HasPrefix(strings.Trim(cell, `"`), "=") {
				t.Errorf("a spreadsheet would calculate with %s", cell)
			}
		}
	}
}

// What a file of rows has no place for is told beside it.
func TestCSVTellsWhatItLacks(t *testing.T) {
	_, messages, status, err := runApart(t, "{\"broken\n", "-o", "csv")
	if status != 0 || !strings.Contains(messages, "problems in the log") || !strings.Contains(messages, "line 1 is cut off or broken") {
		t.Errorf("status %d (%v), told: %q", status, err, messages)
	}
}

// A check must not pass on a log that could not be read.
func TestFailOnNeedsTheWholeLog(t *testing.T) {
	whole, err := os.ReadFile(scenarios)
	if err != nil {
		t.Fatal(err)
	}
	cut := filepath.Join(t.TempDir(), "cut.log.gz")
	if err := os.WriteFile(cut, whole[:len(whole)/2], 0o600); err != nil {
		t.Fatal(err)
	}
	if _, status, err := run(t, "", "--fail-on", "exempt", "--until", "2020-01-01", cut); status != exitUnread || !strings.Contains(err.Error(), "1 file could not be read in whole") {
		t.Errorf("status %d (%v)", status, err)
	}
	if _, status, err := run(t, "", "--until", "2020-01-01", cut); status != 0 {
		t.Errorf("without --fail-on: status %d (%v)", status, err)
	}
}

func TestCSVHasEveryRemoval(t *testing.T) {
	out, status, err := run(t, "", "-o", "csv", scenarios)
	rows, parse := csv.NewReader(strings.NewReader(out)).ReadAll()
	d := documentOf(t, scenarios)
	if status != 0 || parse != nil || len(rows) != len(d.Removals)+1 {
		t.Fatalf("%d rows of %d removals, %v, %v", len(rows), len(d.Removals), err, parse)
	}
	for i, r := range d.Removals {
		if row := rows[i+1]; row[6] != r.Pod || row[13] != string(r.Decision) || row[9] != strings.Join(r.Addresses, " ") {
			t.Errorf("row %d is %q", i, row)
		}
	}
}

func TestFilters(t *testing.T) {
	d := documentOf(t, everyWay)
	first, last := d.Removals[0], d.Removals[len(d.Removals)-1]
	for _, c := range []struct {
		args []string
		want func(review.Removal) bool
	}{
		{[]string{"--decision", "slipped-past,overridden"}, func(r review.Removal) bool { return r.Decision == "slipped-past" || r.Decision == "overridden" }},
		{[]string{"--verdict", "bound"}, func(r review.Removal) bool { return r.Verdict == "bound" }},
		{[]string{"--user", "intern@example.com"}, func(r review.Removal) bool { return r.User == "intern@example.com" }},
		{[]string{"--user", "kubernetes-admin"}, func(review.Removal) bool { return true }},
		{[]string{"--namespace", first.Namespace}, func(r review.Removal) bool { return r.Namespace == first.Namespace }},
		{[]string{"--node", "node-1"}, func(r review.Removal) bool { return r.Node == "node-1" }},
		{[]string{"--node", "node-2"}, func(review.Removal) bool { return false }},
		{[]string{"--pod", "web-1"}, func(r review.Removal) bool { return r.Pod == "web-1" }},
		{[]string{"--pod", first.Namespace + "/web-1"}, func(r review.Removal) bool { return r.Namespace == first.Namespace && r.Pod == "web-1" }},
		{[]string{"--pod", first.UID}, func(r review.Removal) bool { return r.UID == first.UID }},
		{[]string{"--since", last.Time.Format(time.RFC3339Nano)}, func(r review.Removal) bool { return !r.Time.Before(last.Time) }},
		{[]string{"--until", last.Time.Format(time.RFC3339Nano)}, func(r review.Removal) bool { return r.Time.Before(last.Time) }},
		{[]string{"--since", first.Time.Format(time.DateOnly), "--until", last.Time.AddDate(0, 0, 1).Format(time.DateOnly)}, func(review.Removal) bool { return true }},
	} {
		got := documentOf(t, append(c.args, everyWay)...)
		want := slices.DeleteFunc(slices.Clone(d.Removals), func(r review.Removal) bool { return !c.want(r) })
		if len(got.Removals) != len(want) || slices.ContainsFunc(got.Removals, func(r review.Removal) bool { return !c.want(r) }) {
			t.Errorf("%v: %d removals, not %d", c.args, len(got.Removals), len(want))
		}
	}
}

// A report that is handed on must say that it is about a part only, or its reader takes it for everything.
func TestTheReportSaysWhatItIsAbout(t *testing.T) {
	filters := []string{"--since", "2026-11-25T10:00:00+08:00", "--until", "2026-11-26", "--namespace", "shop,bank", "--user", "<jo>", "--node", "node-1", "--pod", "web-0", "--decision", "denied", "--verdict", "bound"}
	const only = "; only since 2026-11-25 02:00:00 UTC, until 2026-11-26 00:00:00 UTC, namespace shop or bank, user <jo>, node node-1, pod web-0, decision denied, verdict bound"
	for format, says := range map[string][]string{
		"table": {" UTC" + only + "\n", "\nno forced removals among those asked for\n"},
		"html":  {" UTC" + html.EscapeString(only) + ". Reviewed", "<p>There are no forced removals among those asked for.</p>"},
	} {
		out, status, err := run(t, "", append(filters, "-o", format, everyWay)...)
		for _, want := range says {
			if status != 0 || !strings.Contains(out, want) {
				t.Errorf("%s: status %d (%v), and %q is not in:\n%s", format, status, err, want, out)
			}
		}
		if out, _, _ := run(t, "", "-o", format, everyWay); strings.Contains(out, "; only") {
			t.Errorf("%s: of everything it says that it is a part:\n%s", format, out)
		}
	}
	if d := documentOf(t, append(filters, everyWay)...); "; only "+d.Only != only {
		t.Errorf("JSON says that it is about %q", d.Only)
	}
}

func TestExitStatus(t *testing.T) {
	missing := filepath.Join(t.TempDir(), "missing.log")
	const broken = "{\"kind\":\"Event\"\n"
	metadata := `{"kind":"Event","apiVersion":"audit.k8s.io/v1","level":"Metadata","auditID":"1","stage":"ResponseComplete","requestURI":"/api/v1/namespaces/shop/pods/web-0","verb":"delete",` +
		`"user":{"username":"jo"},"objectRef":{"resource":"pods","namespace":"shop","name":"web-0"},"responseStatus":{"code":200},"requestReceivedTimestamp":"2026-11-25T01:02:03.000004Z"}` + "\n"
	const bound = `{"kind":"Event","apiVersion":"audit.k8s.io/v1","level":"Request","auditID":"rbac","stage":"ResponseComplete","requestURI":"/apis/rbac.authorization.k8s.io/v1/clusterrolebindings?dryRun=All","verb":"create",` +
		`"user":{"username":"jo"},"objectRef":{"resource":"clusterrolebindings","name":"oncall","apiGroup":"rbac.authorization.k8s.io"},"responseStatus":{"code":201},"requestReceivedTimestamp":"2026-11-25T01:02:03.000004Z"}` + "\n"
	for _, c := range []struct {
		name, stdin string
		args        []string
		status      int
		says        string
	}{
		{"reviewed", "", []string{everyWay}, 0, "slipped-past"},
		{"failing on what is there", "", []string{"--fail-on", "slipped-past,overridden", everyWay}, exitFound, "slipped-past"},
		{"failing on what the filter leaves out", "", []string{"--fail-on", "slipped-past", "--decision", "denied", everyWay}, 0, "denied"},
		{"failing on what the log does not tell", metadata, []string{"--fail-on", "slipped-past"}, exitUnread, "1 delete may have slipped past and the log does not tell (--check says what it lacks), so nothing is certain about --fail-on"},
		{"failing on what the log tells at any level", metadata, []string{"--fail-on", "overridden"}, 0, "1 delete of pods"},
		{"failing on what a log that tells everything does not have", bound, []string{"--fail-on", "slipped-past"}, 0, "no forced removals"},
		{"failing on nothing to read", "", []string{"--fail-on", "overridden"}, exitUnread, "there was nothing to read, so nothing is certain about --fail-on"},
		{"nothing to read", "", nil, 0, "no forced removals"},
		{"a missing file", "", []string{everyWay, missing}, exitUnread, missing},
		{"a broken line", broken, nil, 0, "standard input: line 1 is cut off or broken"},
		{"a broken line, strict", broken, []string{"--strict"}, exitUnread, "standard input: line 1 is cut off or broken"},
		{"what cannot be told", metadata, nil, 0, "1 delete of pods: the log has neither a decision nor the pod"},
		{"a log that has everything", "", []string{"--check", everyWay}, 0, "The log has what a review needs."},
		{"a log without roles", regexp.MustCompile(`(?m)^.*"apiGroup":"rbac.authorization.k8s.io".*\n`).ReplaceAllString(recordedLog(t), ""), []string{"--check"}, exitUnread, "not seen"},
		{"a log without whole bindings", bound, []string{"--check", everyWay, "-"}, exitFound, ", such as rbac, at level Request"},
		{"a log that lacks something", metadata, []string{"--check"}, exitFound, "lacking: 1 of 1, such as 1, at level Metadata"},
		{"a log that does not show it", "", []string{"--check"}, exitUnread, "What was not seen"},
		{"check in JSON", "", []string{"--check", "-o", "json", everyWay}, 0, `"level": "RequestResponse"`},
		{"no such flag", "", []string{"--none"}, exitstatus.Usage, "unknown flag"},
		{"no such output", "", []string{"-o", "yaml"}, exitstatus.Usage, `--output "yaml" is none of table, json, csv, html`},
		{"no such decision", "", []string{"--decision", "refused"}, exitstatus.Usage, `--decision "refused" is none of slipped-past, overridden`},
		{"no such decision to fail on", "", []string{"--fail-on", "x"}, exitstatus.Usage, `--fail-on "x" is none of`},
		{"no such verdict", "", []string{"--verdict", "dead"}, exitstatus.Usage, `--verdict "dead" is none of released, bound`},
		{"no time", "", []string{"--since", "yesterday"}, exitstatus.Usage, `--since "yesterday" is neither a time`},
		{"a time that is to come", "", []string{"--until", "-3h"}, exitstatus.Usage, `--until "-3h" is neither a time`},
		{"an end before its start", "", []string{"--since", "2026-11-25", "--until", "2026-11-24"}, exitstatus.Usage, "is not before --until"},
		{"no release", "", []string{"--release", "eni-guard"}, exitstatus.Usage, "is not NAMESPACE/NAME"},
		{"following nothing", "", []string{"--follow"}, exitstatus.Usage, "--follow needs one FILE"},
		{"following two", "", []string{"--follow", everyWay, scenarios}, exitstatus.Usage, "--follow needs one FILE"},
		{"following several", "", []string{"--follow", "../review/testdata/*.log.gz"}, exitstatus.Usage, "--follow needs one FILE, and ../review/testdata/*.log.gz is 3"},
		{"following what is packed", "", []string{"--follow", everyWay}, exitstatus.Usage, "is packed, so nothing is written to it any more"},
		{"a user that is not set", "", []string{"--user", "", everyWay}, exitstatus.Usage, "--user has an empty value"},
		{"one of two that is not set", "", []string{"--namespace", "shop,", everyWay}, exitstatus.Usage, "--namespace has an empty value"},
		{"a time that is not set", "", []string{"--since", "", everyWay}, exitstatus.Usage, "--since has an empty value"},
		{"nothing to fail on", "", []string{"--fail-on=", everyWay}, exitstatus.Usage, "--fail-on has an empty value"},
		{"a file that is not set", "", []string{""}, exitstatus.Usage, "a FILE has an empty name"},
		{"no name of a pod", "", []string{"--pod", "web-0,shop/pods/web-0", everyWay}, exitstatus.Usage, `--pod "shop/pods/web-0" is none of NAME, NAMESPACE/NAME and UID`},
		{"no exempt namespaces", "", []string{"--exempt-namespaces=", everyWay}, 0, "slipped-past"},
		{"following as a page", "", []string{"--follow", "-o", "html", everyWay}, exitstatus.Usage, "--follow has no end"},
		{"a check of a part", "", []string{"--check", "--since", "7d", everyWay}, exitstatus.Usage, "no filter goes with it"},
		{"a check as a page", "", []string{"--check", "-o", "html", everyWay}, exitstatus.Usage, "--check prints a table"},
	} {
		t.Run(c.name, func(t *testing.T) {
			out, status, err := run(t, c.stdin, c.args...)
			if err != nil {
				out += err.Error()
			}
			if status != c.status || !strings.Contains(out, c.says) {
				t.Errorf("status %d, not %d, and %q is not in:\n%s", status, c.status, c.says, out)
			}
		})
	}
}

func TestTimes(t *testing.T) {
	now := time.Date(2026, 11, 25, 12, 0, 0, 0, time.UTC)
	for text, want := range map[string]time.Time{
		"":                          {},
		"2026-11-24":                time.Date(2026, 11, 24, 0, 0, 0, 0, time.UTC),
		"2026-11-24 18:00":          time.Date(2026, 11, 24, 18, 0, 0, 0, time.UTC),
		"2026-11-24T18:00:00+08:00": time.Date(2026, 11, 24, 10, 0, 0, 0, time.UTC),
		"90m":                       now.Add(-90 * time.Minute),
		"7d":                        now.AddDate(0, 0, -7),
	} {
		if got, err := parseTime(text, now); err != nil || !got.Equal(want) {
			t.Errorf("%q: %s, %v", text, got, err)
		}
	}
}

// stuck is a pipe on which nothing comes any more after some text. It tells when it is asked for more.
type stuck struct {
	text         *strings.Reader
	asked, never chan struct{}
}

func (s *stuck) Read(p []byte) (int, error) {
	if s.text.Len() > 0 {
		return s.text.Read(p)
	}
	close(s.asked)
	<-s.never
	return 0, io.EOF
}

// Who does not want to wait any longer gets what was read until then, also where nothing comes any more.
func TestAnInterruptEndsWithTheReportSoFar(t *testing.T) {
	for name, c := range map[string]struct {
		args []string
		says string
	}{
		"a review": {[]string{}, " UTC; interrupted, so not to its end\n\n22 removals and tries by force"},
		"in JSON":  {[]string{"-o", "json"}, ",\n  \"interrupted\": true,\n  \"removals\": ["},
		"a check":  {[]string{"--check"}, "there: all "},
	} {
		t.Run(name, func(t *testing.T) {
			in := &stuck{text: strings.NewReader(recordedLog(t)), asked: make(chan struct{}), never: make(chan struct{})}
			defer close(in.never)
			ctx, interrupt := context.WithCancel(t.Context())
			var out bytes.Buffer
			cmd := NewCommand()
			cmd.SilenceErrors, cmd.SilenceUsage = true, true
			cmd.SetIn(in)
			cmd.SetOut(&out)
			cmd.SetArgs(c.args)
			ended := make(chan error, 1)
			go func() { ended <- cmd.ExecuteContext(ctx) }()
			<-in.asked
			interrupt()
			select {
			case err := <-ended:
				if status, _ := errors.AsType[exitstatus.Error](err); status != exitUnread || !strings.Contains(err.Error(), "interrupted") || !strings.Contains(out.String(), c.says) {
					t.Errorf("%v:\n%s", err, out.String())
				}
			case <-time.After(time.Minute):
				t.Fatal("it goes on")
			}
		})
	}
}

// A pipe gives what it has; there is no file to look at again.
func TestAPipeCannotBeFollowed(t *testing.T) {
	pipe := filepath.Join(t.TempDir(), "pipe")
	if err := syscall.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	writer := make(chan error, 1)
	go func() {
		file, err := os.OpenFile(pipe, os.O_WRONLY, 0)
		if err == nil {
			err = file.Close()
		}
		writer <- err
	}()
	if _, status, err := run(t, "", "--follow", pipe); status != exitstatus.Usage || !strings.Contains(err.Error(), "is a pipe") {
		t.Errorf("status %d, %v", status, err)
	}
	if err := <-writer; err != nil {
		t.Error(err)
	}
}

// awaited is written to by the command, and waited on by the test.
type awaited chan string

func (a awaited) Write(p []byte) (int, error) {
	a <- string(p)
	return len(p), nil
}

// forcedOf is a forced removal that nobody was asked about.
func forcedOf(pod string) string {
	return `{"kind":"Event","apiVersion":"audit.k8s.io/v1","level":"Metadata","auditID":"` + pod + `","stage":"ResponseComplete","requestURI":"/api/v1/namespaces/shop/pods/` + pod + `?gracePeriodSeconds=0",` +
		`"verb":"delete","user":{"username":"jo"},"objectRef":{"resource":"pods","namespace":"shop","name":"` + pod + `"},"responseStatus":{"code":200},"requestReceivedTimestamp":"2026-11-25T01:02:03.000004Z"}` + "\n"
}

// For programs, one removal a line, of those that are asked for.
func TestFollowInJSON(t *testing.T) {
	log := filepath.Join(t.TempDir(), "audit.log")
	if err := os.WriteFile(log, []byte(forcedOf("web-0")+forcedOf("web-1")), 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	out, ended := make(awaited), make(chan error, 1)
	cmd := NewCommand()
	cmd.SilenceErrors, cmd.SilenceUsage = true, true
	cmd.SetOut(out)
	cmd.SetArgs([]string{"--follow", "-o", "json", "--pod", "web-1", log})
	go func() { ended <- cmd.ExecuteContext(ctx) }()
	select {
	case text := <-out:
		var told review.Removal
		if err := json.Unmarshal([]byte(text), &told); err != nil || told.Pod != "web-1" || told.Decision != review.SlippedPast || strings.Count(text, "\n") != 1 {
			t.Errorf("%v: %q", err, text)
		}
	case err := <-ended:
		t.Fatalf("it ended: %v", err)
	case <-time.After(time.Minute):
		t.Fatal("it does not tell")
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// What is written is told as it comes, also when the log is rotated, each once.
func TestFollow(t *testing.T) {
	dir := t.TempDir()
	log := filepath.Join(dir, "audit.log")
	write := func(text string) {
		t.Helper()
		file, err := os.OpenFile(log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := file.WriteString(text); err != nil {
			t.Fatal(err)
		}
		if err := file.Close(); err != nil {
			t.Fatal(err)
		}
	}
	write(forcedOf("web-0"))
	ctx, cancel := context.WithCancel(t.Context())
	out, messages, ended := make(awaited), make(awaited), make(chan error, 1)
	cmd := NewCommand()
	cmd.SilenceErrors, cmd.SilenceUsage = true, true
	cmd.SetOut(out)
	cmd.SetErr(messages)
	cmd.SetArgs([]string{"--follow", log})
	go func() { ended <- cmd.ExecuteContext(ctx) }()
	expect := func(pod string) {
		t.Helper()
		select {
		case text := <-out:
			if !strings.Contains(text, "slipped-past shop/"+pod+" on node ? by jo: NoTrace") || strings.Count(text, "\n") != 1 {
				t.Errorf("it told %q", text)
			}
		case err := <-ended:
			t.Fatalf("it ended: %v", err)
		case <-time.After(time.Minute):
			t.Fatalf("it does not tell of %s", pod)
		}
	}
	expect("web-0")
	half := forcedOf("web-1")
	write(half[:100])
	write(half[100:] + half)
	expect("web-1")
	// Neither a line that cannot be read, nor what its line does not tell.
	write("nonsense\x1b[2J\n" + strings.ReplaceAll(forcedOf("web-9"), "?gracePeriodSeconds=0", ""))
	told := func(want string) {
		t.Helper()
		select {
		case text := <-messages:
			if !strings.Contains(text, want) {
				t.Errorf("it told %q, want %q", text, want)
			}
		case <-time.After(time.Minute):
			t.Fatalf("it does not tell %q", want)
		}
	}
	told(log + ": line 4 is no JSON\n")
	if err := os.Rename(log, log+".1"); err != nil {
		t.Fatal(err)
	}
	write(forcedOf("web-2"))
	expect("web-2")
	if err := os.Truncate(log, 0); err != nil {
		t.Fatal(err)
	}
	write(forcedOf("w-3"))
	expect("w-3")
	cancel()
	told("1 delete of pods: the log has neither a decision nor the pod")
	if err := <-ended; err != nil {
		t.Errorf("interrupted, it ends with %v", err)
	}
}

// Who waits for removals must not be left waiting on a log that is not read any more. A directory in the place of the log is what also root
// cannot read.
func TestFollowingEndsWhereTheLogCannotBeRead(t *testing.T) {
	log := filepath.Join(t.TempDir(), "audit.log")
	if err := os.WriteFile(log, []byte(recordedLog(t)), 0o600); err != nil {
		t.Fatal(err)
	}
	var messages bytes.Buffer
	out, ended := make(awaited), make(chan error, 1)
	cmd := NewCommand()
	cmd.SilenceErrors, cmd.SilenceUsage = true, true
	cmd.SetOut(out)
	cmd.SetErr(&messages)
	cmd.SetArgs([]string{"--follow", "--pod", "host-1", log})
	go func() { ended <- cmd.ExecuteContext(t.Context()) }()
	select {
	case <-out: // its last removal
	case <-time.After(time.Minute):
		t.Fatal("it tells nothing")
	}
	if err := errors.Join(os.Remove(log), os.Mkdir(log, 0o700)); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-ended:
		if status, _ := errors.AsType[exitstatus.Error](err); status != exitUnread || !strings.Contains(err.Error(), log+" is not followed any more") {
			t.Errorf("it ended with %v", err)
		}
		if !strings.Contains(messages.String(), "cannot be read: read "+log+": is a directory") {
			t.Errorf("it told %q", messages.String())
		}
	case <-time.After(time.Minute):
		t.Fatal("it goes on")
	}
}
