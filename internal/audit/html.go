package audit

import (
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
type markup struct{ strings.Builder }

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
	fmt.Fprintf(m, format, args...)
}

// raw writes what is HTML already.
func (m *markup) raw(text string) { fmt.Fprint(m, text) }

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
	Dots     []dot
}

// dot is so many removals at nearly the same time.
type dot struct {
	X, R  float64
	Title string
}

type tick struct {
	X    float64
	Text string
}

// timeline places removals, which are in the order of time: a lane for each decision, and one dot for those that would cover each other.
func timeline(removals []review.Removal) ([]lane, []tick) {
	if len(removals) == 0 {
		return nil, nil
	}
	first, last := removals[0].Time, removals[len(removals)-1].Time
	span := max(last.Sub(first), time.Second)
	var lanes []lane
	for _, decision := range review.Decisions {
		l := lane{Decision: decision}
		counts := map[int]int{}
		titles := map[int]string{}
		for _, r := range removals {
			if r.Decision == decision {
				// Dots of 8 pixels.
				place := int(float64(lineWidth-10) * float64(r.Time.Sub(first)) / float64(span) / 8)
				counts[place]++
				if counts[place] <= 5 {
					titles[place] += fmt.Sprintf("%s %s/%s by %s; ", at(r.Time), r.Namespace, r.Pod, r.User)
				}
			}
		}
		for place, n := range counts {
			title := titles[place]
			if n > 5 {
				title += fmt.Sprintf("and %d more", n-5)
			}
			l.Dots = append(l.Dots, dot{X: lineLeft + 6 + float64(place)*8, R: min(4+float64(n-1)/2, 10), Title: title})
		}
		slices.SortFunc(l.Dots, func(a, b dot) int { return int(a.X - b.X) })
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
	return lanes, ticks
}

// html writes one file that needs nothing else: no network, no script.
func (d document) html(out io.Writer) error {
	m := &markup{}
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
`, logWords(d.Log), version.Version)
	if problems := problemWords(d.Log); len(problems) > 0 {
		m.list(`<div class="problems">`, problems, "</div>")
	}
	m.cards(d.Totals.Decisions)
	m.timeline(d.Removals)
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
		m.add("<h2>%s</h2>\n", s.title)
		m.list("", s.lines, "")
	}
	m.raw("<h2>Every removal</h2>\n")
	m.removals(d.Removals)
	m.raw("</body>\n</html>\n")
	_, err := io.WriteString(out, m.String())
	return err
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

func (m *markup) timeline(removals []review.Removal) {
	lanes, ticks := timeline(removals)
	if len(lanes) == 0 {
		return
	}
	axis := len(lanes) * laneHeight
	m.add("<h2>Time line</h2>\n<svg id=\"timeline\" viewBox=\"0 0 %d %d\" role=\"img\" aria-label=\"removals by time and decision\">\n", lineLeft+lineWidth+40, axis+30)
	for _, t := range ticks {
		m.add("<line x1=\"%[1]g\" x2=\"%[1]g\" y1=\"0\" y2=\"%[2]d\" stroke=\"#e3e3e3\"/><text x=\"%[1]g\" y=\"%[3]d\" text-anchor=\"middle\">%[4]s</text>\n", t.X, axis, axis+20, t.Text)
	}
	for i, l := range lanes {
		y := i*laneHeight + laneHeight/2
		m.add("<g class=\"%s\"><text x=\"0\" y=\"%d\" dy=\"4\">%s</text>", l.Decision, y, l.Decision)
		for _, d := range l.Dots {
			m.add("<circle cx=\"%g\" cy=\"%d\" r=\"%g\"><title>%s</title></circle>", d.X, y, d.R, d.Title)
		}
		m.raw("</g>\n")
	}
	m.raw("</svg>\n")
}

func (m *markup) removals(removals []review.Removal) {
	if len(removals) == 0 {
		m.raw("<p>There were none.</p>\n")
		return
	}
	m.raw("<div class=\"scroll\"><table id=\"removals\"><thead><tr>")
	for _, head := range []string{"Time", "User", "From", "Pod", "Node", "Way in", "Mode", "Verdict", "Decision", "Reason, and what was on the node"} {
		m.add("<th>%s</th>", head)
	}
	m.raw("</tr></thead><tbody>\n")
	for _, r := range removals {
		m.add("<tr><td class=\"time\">%s</td><td>%s", at(r.Time), r.User)
		m.optional("<small>by %s</small>", r.ImpersonatedBy)
		m.add("</td><td>%s", strings.Join(r.SourceIPs, ", "))
		m.optional("<small>%s</small>", r.UserAgent)
		m.add("</td><td>%s/%s</td><td>%s<small>%s</small></td>", r.Namespace, orUnknown(r.Pod), orUnknown(r.Node), orUnknown(strings.Join(r.Addresses, ", ")))
		m.add("<td class=\"short\">%s</td><td class=\"short\">%s</td><td class=\"short\">%s</td>", r.Path, orUnknown(r.Mode), r.Verdict)
		m.add("<td><span class=\"tag %s\">%s</span></td><td>%s", r.Decision, r.Decision, r.Reason)
		m.optional("<small>“%s”</small>", r.OverrideReason)
		m.optional("<small>%s</small>", r.Evidence)
		m.optional("<small>then: %s</small>", thenWords(r.Then))
		m.raw("</td></tr>\n")
	}
	m.raw("</tbody></table></div>\n")
}
