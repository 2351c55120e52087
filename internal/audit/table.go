package audit

import (
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"unicode/utf8"

	"golang.org/x/term"

	"github.com/eni-guard/eni-guard/internal/auditlog"
	"github.com/eni-guard/eni-guard/internal/review"
	"github.com/eni-guard/eni-guard/webhook"
)

// style is how a text is printed.
type style struct {
	// width is that of the terminal, in characters; 0 where lines may be as long as they are.
	width  int
	colour bool
}

// styleOf fits a terminal; what is no terminal gets everything, and no colour. NO_COLOR is that of https://no-color.org.
func styleOf(out io.Writer) style {
	file, ok := out.(*os.File)
	if !ok || !isTerminal(out) {
		return style{}
	}
	width, _, err := term.GetSize(int(file.Fd()))
	if err != nil {
		width = 80
	}
	return style{width: width, colour: os.Getenv("NO_COLOR") == ""}
}

// column is one of a table.
type column struct {
	head  string
	cells []string
	// least is what it is cut down to before a column is left out; rank says which one is left out first, the highest.
	least, rank int
	// atStart says that what does not fit is cut off at the start.
	atStart bool
	paint   func(string) string
}

// removalColumns are the columns of the table of removals.
var removalColumns = []struct {
	head        string
	least, rank int
	value       func(review.Removal) string
}{
	{"TIME (UTC)", 19, 0, func(r review.Removal) string { return at(r.Time) }},
	{"USER", 14, 1, func(r review.Removal) string { return userWords(r.User, r.ImpersonatedBy) }},
	{"USER AGENT", 20, 12, func(r review.Removal) string { return r.UserAgent }},
	{"SOURCE", 10, 11, func(r review.Removal) string { return strings.Join(r.SourceIPs, ",") }},
	{"POD", 20, 0, func(r review.Removal) string { return r.Namespace + "/" + orUnknown(r.Pod) }},
	{"NODE", 8, 4, func(r review.Removal) string { return orUnknown(r.Node) }},
	{"ADDRESS", 11, 7, func(r review.Removal) string { return orUnknown(strings.Join(r.Addresses, ",")) }},
	{"WAY IN", 12, 6, func(r review.Removal) string { return r.Path }},
	{"MODE", 5, 8, func(r review.Removal) string { return orUnknown(r.Mode) }},
	{"VERDICT", 9, 5, func(r review.Removal) string { return r.Verdict }},
	{"DECISION", 12, 0, func(r review.Removal) string { return string(r.Decision) }},
	{"REASON", 15, 3, func(r review.Removal) string { return r.Reason }},
}

// table prints columns beside each other.
func table(columns []column, s style) string {
	columns = fit(columns, s.width)
	var b strings.Builder
	for row := -1; len(columns) > 0 && row < len(columns[0].cells); row++ {
		var line strings.Builder
		for i, c := range columns {
			text := c.head
			if row >= 0 {
				text = c.cells[row]
			}
			text = shorten(text, c.least, c.atStart)
			padding := strings.Repeat(" ", c.least-utf8.RuneCountInString(text))
			if row >= 0 && c.paint != nil && s.colour {
				text = c.paint(text)
			}
			line.WriteString(text)
			if i < len(columns)-1 {
				line.WriteString(padding + "  ")
			}
		}
		b.WriteString(strings.TrimRight(line.String(), " ") + "\n")
	}
	return b.String()
}

// fit gives every column its width, in least. Columns are left out until the others fit at their least; then the widest are cut down.
func fit(columns []column, width int) []column {
	fitted := slices.Clone(columns)
	total := func() int {
		sum := -2
		for _, c := range fitted {
			sum += c.least + 2
		}
		return sum
	}
	natural := make([]int, len(columns))
	for i, c := range columns {
		natural[i] = utf8.RuneCountInString(c.head)
		for _, cell := range c.cells {
			natural[i] = max(natural[i], utf8.RuneCountInString(cell))
		}
		fitted[i].least = min(c.least, natural[i])
	}
	for width > 0 && total() > width {
		last := slices.IndexFunc(fitted, func(c column) bool {
			return c.rank > 0 && !slices.ContainsFunc(fitted, func(other column) bool { return other.rank > c.rank })
		})
		if last < 0 {
			return fitted
		}
		fitted, natural = slices.Delete(fitted, last, last+1), slices.Delete(natural, last, last+1)
	}
	for {
		narrowest := -1
		for i, c := range fitted {
			if c.least < natural[i] && (narrowest < 0 || natural[i]-c.least < natural[narrowest]-fitted[narrowest].least) {
				narrowest = i
			}
		}
		if narrowest < 0 || width > 0 && total() >= width {
			return fitted
		}
		fitted[narrowest].least++
	}
}

// shorten cuts a text to a width, at its end, or at its start where the end tells more.
func shorten(text string, width int, atStart bool) string {
	letters := []rune(text)
	switch {
	case len(letters) <= width:
		return text
	case atStart:
		return "…" + string(letters[len(letters)-width+1:])
	default:
		return string(letters[:width-1]) + "…"
	}
}

// The colours of a decision.
const (
	red, yellow, green, bold = "\x1b[31m", "\x1b[33m", "\x1b[32m", "\x1b[1m"
	plain                    = "\x1b[0m"
)

func paintDecision(text string) string {
	switch review.Decision(strings.TrimSpace(text)) {
	case review.SlippedPast, review.Decision(webhook.Overridden), review.Decision(webhook.Audited):
		return red + text + plain
	case review.Unanswered, review.Decision(webhook.Denied), review.Decision(webhook.Held):
		return yellow + text + plain
	case review.Decision(webhook.Allowed):
		return green + text + plain
	default:
		return text
	}
}

// text is the report for people.
func (d document) text(s style) string {
	var b strings.Builder
	head := func(format string, args ...any) {
		text := fmt.Sprintf(format, args...)
		if s.colour {
			text = bold + text + plain
		}
		b.WriteString("\n" + text + "\n")
	}
	b.WriteString(logWords(d.Log) + "\n")
	if len(d.Removals) == 0 {
		b.WriteString("\nno forced removals\n")
	} else {
		head("%s by force", removals(len(d.Removals)))
		b.WriteString(d.removalTable(s))
	}
	for _, section := range d.sections() {
		head("%s", section.title)
		for _, line := range section.lines {
			b.WriteString("  " + printable(line) + "\n")
		}
	}
	for _, g := range d.groups() {
		head("%s", g.Title)
		for _, line := range countLines(g.Counts) {
			b.WriteString("  " + printable(line) + "\n")
		}
	}
	for _, problem := range problemWords(d.Log) {
		b.WriteString("\n" + printable(problem))
	}
	return strings.TrimRight(b.String(), "\n") + "\n"
}

func removals(n int) string {
	if n == 1 {
		return "1 removal or try"
	}
	return fmt.Sprintf("%d removals and tries", n)
}

func (d document) removalTable(s style) string {
	var columns []column
	for _, c := range removalColumns {
		col := column{head: c.head, least: c.least, rank: c.rank}
		for _, r := range d.Removals {
			col.cells = append(col.cells, printable(c.value(r)))
		}
		switch c.head {
		case "DECISION":
			col.paint = paintDecision
		case "POD":
			col.atStart = true
		}
		columns = append(columns, col)
	}
	return table(columns, s)
}

// section is a list with a title.
type section struct {
	title string
	lines []string
}

// sections are what a reader should not have to look for in the table.
func (d document) sections() []section {
	var overrides, stayed, slipped, weakened, changed []string
	for _, r := range d.Removals {
		who := fmt.Sprintf("%s %s/%s by %s", at(r.Time), r.Namespace, orUnknown(r.Pod), userWords(r.User, r.ImpersonatedBy))
		switch {
		case r.Decision == review.SlippedPast:
			slipped = append(slipped, who+": "+slippedWords(r.Reason))
		case r.Decision == review.Decision(webhook.Overridden):
			there := "no webhook answered, so nobody looked at the node"
			if r.Evidence != "" {
				there = r.Evidence
			} else if r.Verdict == "released" {
				there = "nothing was left on the node"
			}
			overrides = append(overrides, fmt.Sprintf("%s: %q. On the node: %s", who, r.OverrideReason, there))
		case !r.Gone():
			stayed = append(stayed, fmt.Sprintf("%s, %s: %s", who, r.Decision, stayedWords(r)))
		}
	}
	for _, c := range d.Changes {
		line := fmt.Sprintf("%s %s by %s: %s", at(c.Time), c.Object, userWords(c.User, c.ImpersonatedBy), c.What)
		if c.Weakens {
			weakened = append(weakened, line)
		} else {
			changed = append(changed, line)
		}
	}
	all := []section{
		{"Slipped past the guard", slipped}, {"Overridden", overrides}, {"Refused or held, then", stayed},
		{"Who weakened the guard", weakened}, {"Other changes of the guard", changed},
		{"Not in this log, so not told (docs/audit.md has the audit policy that records it)", untoldWords(d.Untold)},
	}
	kept := all[:0]
	for _, section := range all {
		if len(section.lines) > 0 {
			kept = append(kept, section)
		}
	}
	return kept
}

// groups are the totals that are not empty.
func (d document) groups() []group {
	all := []group{
		{"By decision", d.Totals.Decisions}, {"By user", d.Totals.Users}, {"By namespace", d.Totals.Namespaces}, {"By node", d.Totals.Nodes},
		{"Nodes with several stuck pods", d.Totals.StuckNodes}, {"Workloads with several stuck pods, by the names of the pods", d.Totals.StuckWorkloads},
	}
	return slices.DeleteFunc(all, func(g group) bool { return len(g.Counts) == 0 })
}

func countLines(counts []review.Count) []string {
	var lines []string
	for _, c := range counts {
		lines = append(lines, fmt.Sprintf("%5d  %s", c.Count, orUnknown(c.Name)))
	}
	return lines
}

func logWords(log auditlog.Summary) string {
	text := fmt.Sprintf("%s of %s", count(int(log.Lines), "line"), count(log.Files, "file"))
	if !log.From.IsZero() {
		text += fmt.Sprintf(", %s to %s UTC", at(log.From), at(log.To))
	}
	return text
}

// problemWords are lines about what could not be read.
func problemWords(log auditlog.Summary) []string {
	if log.ProblemCount == 0 {
		return nil
	}
	all := []string{count(int(log.ProblemCount), "problem") + " in the log; what is there is missing above:"}
	for _, p := range log.Problems {
		all = append(all, "  "+p.String())
	}
	if more := log.ProblemCount - int64(len(log.Problems)); more > 0 {
		all = append(all, fmt.Sprintf("  and %d more", more))
	}
	return all
}

// checkText says what a log has of what a review needs.
func checkText(log auditlog.Summary, needs []review.Need, s style) string {
	columns := []column{{head: "RECORDED"}, {head: "AT LEAST"}, {head: "IN THIS LOG"}, {head: "TELLS", rank: 1, least: 10}}
	lacking, unseen := 0, 0
	for _, n := range needs {
		for i, text := range []string{n.What, n.Level, printable(n.Verdict()), n.Why} {
			columns[i].cells = append(columns[i].cells, text)
			if i < 3 {
				columns[i].least = max(columns[i].least, utf8.RuneCountInString(text))
			}
		}
		if n.Lacking > 0 {
			lacking++
		} else if n.Seen == 0 {
			unseen++
		}
	}
	text := logWords(log) + "\n\n" + table(columns, s) + "\n"
	switch {
	case lacking > 0:
		text += "The audit policy lacks something: compare it with the one in docs/audit.md.\n"
	case unseen > 0:
		text += "What was not seen has not happened while this log was recorded, or is not recorded: docs/audit.md has commands that change nothing and leave one of each.\n"
	default:
		text += "The log has what a review needs.\n"
	}
	for _, problem := range problemWords(log) {
		text += problem + "\n"
	}
	return text
}
