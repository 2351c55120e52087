package audit

import (
	"bufio"
	"fmt"
	"io"
	"iter"
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
	head string
	// least is what it is cut down to before a column is left out; rank says which one is left out first, the highest.
	least, rank int
	// atStart says that what does not fit is cut off at the start.
	atStart bool
	paint   func(string) string
	// cell is which one of a row it shows, and natural what the widest takes.
	cell, natural int
}

// rows are those of a table, a text for each column, as often as they are asked for.
type rows = iter.Seq2[[]string, error]

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
	{"OUTCOME", 7, 9, func(r review.Removal) string { return string(r.Outcome) }},
	{"REASON", 15, 3, func(r review.Removal) string { return r.Reason }},
}

// writeTable prints columns beside each other. It goes through the rows twice: no table is too long for memory.
func writeTable(out io.Writer, columns []column, rows rows, s style) error {
	for i := range columns {
		columns[i].cell, columns[i].natural = i, utf8.RuneCountInString(columns[i].head)
	}
	for row, err := range rows {
		if err != nil {
			return err
		}
		for i := range columns {
			columns[i].natural = max(columns[i].natural, utf8.RuneCountInString(row[i]))
		}
	}
	columns = fit(columns, s.width)
	heads := make([]string, len(columns))
	for i, c := range columns {
		heads[i] = shorten(c.head, c.least, c.atStart)
	}
	if err := writeRow(out, columns, heads, false); err != nil {
		return err
	}
	cells := make([]string, len(columns))
	for row, err := range rows {
		if err != nil {
			return err
		}
		for i, c := range columns {
			cells[i] = shorten(row[c.cell], c.least, c.atStart)
		}
		if err := writeRow(out, columns, cells, s.colour); err != nil {
			return err
		}
	}
	return nil
}

// writeRow prints one line of a table, painted or not.
func writeRow(out io.Writer, columns []column, cells []string, painted bool) error {
	var line strings.Builder
	for i, c := range columns {
		padding := strings.Repeat(" ", c.least-utf8.RuneCountInString(cells[i]))
		if text := cells[i]; c.paint != nil && painted {
			line.WriteString(c.paint(text))
		} else {
			line.WriteString(text)
		}
		if i < len(columns)-1 {
			line.WriteString(padding + "  ")
		}
	}
	_, err := io.WriteString(out, strings.TrimRight(line.String(), " ")+"\n")
	return err
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
	for i, c := range columns {
		fitted[i].least = min(c.least, c.natural)
	}
	for width > 0 && total() > width {
		last := slices.IndexFunc(fitted, func(c column) bool {
			return c.rank > 0 && !slices.ContainsFunc(fitted, func(other column) bool { return other.rank > c.rank })
		})
		if last < 0 {
			return fitted
		}
		fitted = slices.Delete(fitted, last, last+1)
	}
	for {
		narrowest := -1
		for i, c := range fitted {
			if c.least < c.natural && (narrowest < 0 || c.natural-c.least < fitted[narrowest].natural-fitted[narrowest].least) {
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

// folded breaks a text between words where the terminal ends, and indents what goes on. A word that is wider stays whole, to be copied.
func (s style) folded(text, indent string) string {
	if s.width == 0 {
		return text
	}
	words := strings.Split(text, " ")
	broken, column := words[0], utf8.RuneCountInString(words[0])
	for _, word := range words[1:] {
		between := " "
		if column+1+utf8.RuneCountInString(word) > s.width {
			between, column = "\n"+indent, len(indent)-1
		}
		broken += between + word
		column += 1 + utf8.RuneCountInString(word)
	}
	return broken
}

// text is the report for people.
func (d document) text(to io.Writer, s style) error {
	out := bufio.NewWriter(to)
	head := func(format string, args ...any) {
		text := s.folded(fmt.Sprintf(format, args...), "")
		if s.colour {
			text = bold + text + plain
		}
		// It keeps the first error until it is flushed; so do those below.
		_, _ = out.WriteString("\n" + text + "\n")
	}
	line := func(text string) { _, _ = out.WriteString(s.folded("  "+printable(text), "    ") + "\n") }
	_, _ = out.WriteString(s.folded(printable(d.logWords()), "  ") + "\n")
	if d.Count == 0 {
		_, _ = out.WriteString("\n" + d.noneWords() + "\n")
	} else {
		head("%s by force", removals(d.Count))
		if err := d.removalTable(out, s); err != nil {
			return err
		}
	}
	for _, section := range d.sections() {
		begun := false
		for text, err := range section.lines {
			if err != nil {
				return err
			}
			if !begun {
				head("%s", section.title)
				begun = true
			}
			line(text)
		}
	}
	for _, g := range d.groups() {
		head("%s", g.Title)
		for _, text := range countLines(g.Counts) {
			line(text)
		}
	}
	for i, problem := range problemWords(d.log) {
		if i == 0 {
			_, _ = out.WriteString("\n")
		}
		_, _ = out.WriteString(s.folded(printable(problem), "    ") + "\n")
	}
	return out.Flush()
}

func removals(n int64) string {
	if n == 1 {
		return "1 removal or try"
	}
	return fmt.Sprintf("%d removals and tries", n)
}

func (d document) removalTable(out io.Writer, s style) error {
	var columns []column
	for _, c := range removalColumns {
		col := column{head: c.head, least: c.least, rank: c.rank}
		switch c.head {
		case "DECISION":
			col.paint = paintDecision
		case "POD":
			col.atStart = true
		}
		columns = append(columns, col)
	}
	return writeTable(out, columns, func(yield func([]string, error) bool) {
		cells := make([]string, len(removalColumns))
		for r, err := range d.Removals() {
			for i, c := range removalColumns {
				cells[i] = printable(c.value(r))
			}
			if !yield(cells, err) {
				return
			}
		}
	}, s)
}

// section is a list with a title; it may be empty.
type section struct {
	title string
	lines iter.Seq2[string, error]
}

// sections are what a reader should not have to look for in the table.
func (d document) sections() []section {
	about := func(tell func(review.Removal) (string, bool)) iter.Seq2[string, error] {
		return func(yield func(string, error) bool) {
			for r, err := range d.Removals() {
				if words, tells := tell(r); (tells || err != nil) &&
					!yield(fmt.Sprintf("%s %s/%s by %s%s", at(r.Time), r.Namespace, orUnknown(r.Pod), userWords(r.User, r.ImpersonatedBy), words), err) {
					return
				}
			}
		}
	}
	changes := func(weakening bool) iter.Seq2[string, error] {
		return func(yield func(string, error) bool) {
			for c, err := range d.Changes() {
				if (c.Weakens == weakening || err != nil) && !yield(fmt.Sprintf("%s %s by %s: %s", at(c.Time), c.Object, userWords(c.User, c.ImpersonatedBy), c.What), err) {
					return
				}
			}
		}
	}
	return []section{
		{"Slipped past the guard", about(func(r review.Removal) (string, bool) {
			return ": " + slippedWords(r.Reason) + outcomeWords(r), r.Decision == review.SlippedPast
		})},
		{"Overridden", about(func(r review.Removal) (string, bool) {
			return fmt.Sprintf(": %q. On the node: %s", r.OverrideReason, thereWords(r)) + outcomeWords(r), r.Decision == review.Decision(webhook.Overridden)
		})},
		{"Refused, held or failed, then", about(func(r review.Removal) (string, bool) {
			return fmt.Sprintf(", %s: %s", stayedAs(r), stayedWords(r)), !r.Gone()
		})},
		{"Who weakened the guard", changes(true)}, {"Other changes of the guard", changes(false)},
		{"Not in this log, so not told (docs/audit.md has the audit policy that records it)", func(yield func(string, error) bool) {
			for _, words := range untoldWords(d.Untold) {
				if !yield(words, nil) {
					return
				}
			}
		}},
	}
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
	all := []string{count(int(log.ProblemCount), "problem") + " in the log; what is there is missing here:"}
	for _, p := range log.Problems {
		all = append(all, "  "+p.String())
	}
	if more := log.ProblemCount - int64(len(log.Problems)); more > 0 {
		all = append(all, fmt.Sprintf("  and %d more", more))
	}
	return all
}

// checkText says what a log has of what a review needs. Where the table does not fit the terminal, it is a list: no part of it can be left out.
func checkText(log auditlog.Summary, needs []review.Need, s style) string {
	columns := []column{{head: "RECORDED"}, {head: "AT LEAST"}, {head: "IN THIS LOG"}, {head: "TELLS"}}
	lacking, unseen := 0, 0
	var cells [][]string
	var list strings.Builder
	for _, n := range needs {
		row := []string{n.What, n.Level, printable(n.Verdict()), n.Why}
		cells = append(cells, row)
		list.WriteString(s.folded(fmt.Sprintf("%s, at least %s: %s. Tells %s.", row[0], row[1], row[2], row[3]), "  ") + "\n")
		if n.Lacking > 0 {
			lacking++
		} else if n.Seen == 0 {
			unseen++
		}
	}
	var table strings.Builder
	// Nothing here can fail.
	_ = writeTable(&table, columns, func(yield func([]string, error) bool) {
		for _, row := range cells {
			if !yield(row, nil) {
				return
			}
		}
	}, style{})
	shown := table.String()
	for line := range strings.Lines(shown) {
		if s.width > 0 && utf8.RuneCountInString(strings.TrimSuffix(line, "\n")) > s.width {
			shown = list.String()
			break
		}
	}
	result := "The log has what a review needs."
	switch {
	case lacking > 0:
		result = "The audit policy lacks something: compare it with the one in docs/audit.md."
	case unseen > 0:
		result = "What was not seen has not happened while this log was recorded, or is not recorded: docs/audit.md has commands that change nothing and leave one of each."
	}
	text := s.folded(logWords(log), "  ") + "\n\n" + shown + "\n" + s.folded(result, "") + "\n"
	for _, problem := range problemWords(log) {
		text += s.folded(printable(problem), "    ") + "\n"
	}
	return text
}
