package audit

import (
	"bufio"
	"cmp"
	_ "embed"
	"fmt"
	"html"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/eni-guard/eni-guard/internal/review"
	"github.com/eni-guard/eni-guard/internal/version"
)

//go:embed report.css
var reportCSS string

// markup is HTML that is being written. Not by html/template: with it the linker keeps every method of the Kubernetes API in the binary, a third
// of it, as with gRPC's tracing.
type markup struct{ *bufio.Writer }

// add writes a format, with every text in its arguments printable and escaped: it fits between tags, and into values of attributes in double quotes.
func (m *markup) add(format string, args ...any) {
	for i, arg := range args {
		switch text := arg.(type) {
		case string:
			args[i] = html.EscapeString(printable(text))
		case review.Decision:
			args[i] = html.EscapeString(printable(string(text)))
		}
	}
	// It keeps the first error until it is flushed.
	_, _ = fmt.Fprintf(m, format, args...)
}

// raw writes what is HTML already.
func (m *markup) raw(text string) { _, _ = m.WriteString(text) }

// optional writes a format about a text, if there is one.
func (m *markup) optional(format, text string) {
	if text != "" {
		m.add(format, text)
	}
}

// group is a table of totals.
type group struct {
	Title  string
	Counts []review.Count
}

// The size of the time line, in pixels of its own coordinates.
const (
	lineWidth, laneHeight = 1000, 26
	lineLeft              = 120
)

// lane is a decision on the time line.
type lane struct {
	Decision review.Decision
	Dots     []*dot
}

// dot is so many removals at nearly the same time.
type dot struct {
	X     float64
	count int
	title strings.Builder
}

// namedInDot is how many removals the title of a dot names.
const namedInDot = 5

func (d *dot) add(r review.Removal) {
	if d.count++; d.count <= namedInDot {
		fmt.Fprintf(&d.title, "%s %s/%s by %s; ", at(r.Time), r.Namespace, orUnknown(r.Pod), r.User)
	}
}

// R is how large it is.
func (d *dot) R() float64 { return min(4+float64(d.count-1)/2, 10) }

// Title says what it stands for.
func (d *dot) Title() string {
	if d.count > namedInDot {
		return fmt.Sprintf("%sand %d more", d.title.String(), d.count-namedInDot)
	}
	return strings.TrimSuffix(d.title.String(), "; ")
}

type tick struct {
	X    float64
	Text string
}

// timeline places removals: a lane for each decision, and one dot for those that would cover each other. It keeps no removal.
func (d document) timeline() ([]lane, []tick, error) {
	first, span := d.First, max(d.Last.Sub(d.First), time.Second)
	dots := map[review.Decision]map[int]*dot{}
	for r, err := range d.Removals() {
		if err != nil {
			return nil, nil, err
		}
		// Dots of 8 pixels.
		place := int(float64(lineWidth-10) * float64(r.Time.Sub(first)) / float64(span) / 8)
		if dots[r.Decision] == nil {
			dots[r.Decision] = map[int]*dot{}
		}
		at := dots[r.Decision][place]
		if at == nil {
			at = &dot{X: lineLeft + 6 + float64(place)*8}
			dots[r.Decision][place] = at
		}
		at.add(r)
	}
	var lanes []lane
	for _, decision := range review.Decisions {
		l := lane{Decision: decision}
		for _, at := range dots[decision] {
			l.Dots = append(l.Dots, at)
		}
		slices.SortFunc(l.Dots, func(a, b *dot) int { return cmp.Compare(a.X, b.X) })
		if len(l.Dots) > 0 {
			lanes = append(lanes, l)
		}
	}
	var ticks []tick
	layout := "15:04:05"
	if span > 24*time.Hour {
		layout = "01-02 15:04"
	}
	for i := range 6 {
		at := first.Add(span * time.Duration(i) / 5)
		ticks = append(ticks, tick{X: lineLeft + 6 + float64(lineWidth-10)*float64(i)/5, Text: at.UTC().Format(layout)})
	}
	return lanes, ticks, nil
}

// html writes one file that needs nothing else: no network, no script.
func (d document) html(out io.Writer) error {
	m := &markup{bufio.NewWriter(out)}
	m.add(`<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>Forced removals of pods</title>
<style>
`)
	m.raw(reportCSS)
	m.add(`</style>
</head>
<body>
<h1>Forced removals of pods</h1>
<p class="about">%s. Reviewed with eni-guard %s. Times are in UTC.</p>
`, d.logWords(), version.Version)
	if problems := problemWords(d.log); len(problems) > 0 {
		m.list(`<div class="problems">`, problems, "</div>")
	}
	m.cards(d.Totals.Decisions)
	if err := d.writeTimeline(m); err != nil {
		return err
	}
	m.raw("<h2>Totals</h2>\n<div class=\"totals\">\n")
	for _, g := range d.groups() {
		m.add("<table><thead><tr><th>%s</th><th></th></tr></thead><tbody>", g.Title)
		for _, c := range g.Counts {
			m.add("<tr><td>%s</td><td>%d</td></tr>", orUnknown(c.Name), c.Count)
		}
		m.raw("</tbody></table>\n")
	}
	m.raw("</div>\n")
	for _, s := range d.sections() {
		begun := false
		for line, err := range s.lines {
			if err != nil {
				return err
			}
			if !begun {
				m.add("<h2>%s</h2>\n<ul>", s.title)
				begun = true
			}
			m.add("<li>%s</li>\n", line)
		}
		if begun {
			m.raw("</ul>\n")
		}
	}
	m.raw("<h2>Every removal</h2>\n")
	if err := d.writeRemovals(m); err != nil {
		return err
	}
	m.raw("</body>\n</html>\n")
	return m.Flush()
}

func (m *markup) list(before string, lines []string, after string) {
	m.raw(before + "<ul>")
	for _, line := range lines {
		m.add("<li>%s</li>", line)
	}
	m.raw("</ul>" + after + "\n")
}

// cards has a number for every decision there is, also for those that nobody has made.
func (m *markup) cards(counts []review.Count) {
	m.raw("<div class=\"cards\">\n")
	for _, decision := range review.Decisions {
		n, none := 0, " none"
		for _, c := range counts {
			if c.Name == string(decision) {
				n, none = c.Count, ""
			}
		}
		m.add("<div class=\"card %s%s\"><b>%d</b>%s</div>\n", decision, none, n, decision)
	}
	m.raw("</div>\n")
}

func (d document) writeTimeline(m *markup) error {
	lanes, ticks, err := d.timeline()
	if len(lanes) == 0 || err != nil {
		return err
	}
	axis := len(lanes) * laneHeight
	m.add("<h2>Time line</h2>\n<div class=\"line\"><svg id=\"timeline\" viewBox=\"0 0 %d %d\" role=\"img\" aria-label=\"removals by time and decision\">\n", lineLeft+lineWidth+40, axis+30)
	for _, t := range ticks {
		m.add("<line x1=\"%[1]g\" x2=\"%[1]g\" y1=\"0\" y2=\"%[2]d\" stroke=\"#e3e3e3\"/><text x=\"%[1]g\" y=\"%[3]d\" text-anchor=\"middle\">%[4]s</text>\n", t.X, axis, axis+20, t.Text)
	}
	for i, l := range lanes {
		y := i*laneHeight + laneHeight/2
		m.add("<g class=\"%s\"><text x=\"0\" y=\"%d\" dy=\"4\">%s</text>", l.Decision, y, l.Decision)
		for _, d := range l.Dots {
			m.add("<circle cx=\"%g\" cy=\"%d\" r=\"%g\"><title>%s</title></circle>", d.X, y, d.R(), d.Title())
		}
		m.raw("</g>\n")
	}
	m.raw("</svg></div>\n")
	return nil
}

// removalHeads are the columns of the table of removals. On a narrow screen each stands before its cell.
var removalHeads = []string{"Time", "User", "From", "Pod", "Node", "Way in", "Mode", "Verdict", "Decision", "Reason, and what was on the node"}

func (d document) writeRemovals(m *markup) error {
	if d.Count == 0 {
		m.add("<p>There are %s.</p>\n", d.noneWords())
		return nil
	}
	m.raw("<div class=\"scroll\"><table id=\"removals\"><thead><tr>")
	for _, head := range removalHeads {
		m.add("<th>%s</th>", head)
	}
	m.raw("</tr></thead><tbody>\n")
	for r, err := range d.Removals() {
		if err != nil {
			return err
		}
		m.raw("<tr>")
		cell := 0
		// next begins the next cell, with its main text.
		next := func(class, text string) {
			if cell > 0 {
				m.raw("</td>")
			}
			m.add("<td class=\"%s\" data-head=\"%s\">%s", class, removalHeads[cell], text)
			cell++
		}
		next("time", at(r.Time))
		next("", r.User)
		m.optional("<small>by %s</small>", r.ImpersonatedBy)
		next("", strings.Join(r.SourceIPs, ", "))
		m.optional("<small>%s</small>", r.UserAgent)
		next("", r.Namespace+"/"+orUnknown(r.Pod))
		next("", orUnknown(r.Node))
		m.add("<small>%s</small>", orUnknown(strings.Join(r.Addresses, ", ")))
		next("short", r.Path)
		next("short", orUnknown(r.Mode))
		next("short", r.Verdict)
		next("", "")
		m.add("<span class=\"tag %s\">%s</span><small>%s</small>", r.Decision, r.Decision, string(r.Outcome))
		next("", r.Reason)
		m.optional("<small>“%s”</small>", r.OverrideReason)
		m.optional("<small>%s</small>", r.Evidence)
		m.optional("<small>then: %s</small>", thenWords(r.Then))
		m.raw("</td></tr>\n")
	}
	m.raw("</tbody></table></div>\n")
	return nil
}
