package agent

import (
	"fmt"
	"strings"
	"time"

	"github.com/eni-guard/eni-guard/internal/sandbox"
)

// text is the answer for people: a block for each thing, its head with the verdict, below it the findings, the most telling
// one first.
func (a answer) text(now time.Time) string {
	var b strings.Builder
	for _, report := range a.Reports {
		fmt.Fprintf(&b, "pod %s on node %s: %s\n", a.Pods[report.UID], a.Node, report.Verdict())
		if report.Verdict() == sandbox.Released {
			writeProbes(&b, report.Probes)
		}
		writeFindings(&b, report.Findings, now)
		writeSandboxes(&b, report.Sandboxes)
		for _, c := range report.Conflicts {
			fmt.Fprintf(&b, "  conflict: %s\n", c)
		}
		writeRoutes(&b, report.Routes)
		b.WriteByte('\n')
	}
	if a.Named != "" && len(a.Reports) == 0 {
		fmt.Fprintf(&b, "pod %s on node %s: %s\n\n", a.Named, a.Node, a.Verdict)
	}
	if a.IP.IsValid() {
		switch n := timesInUse(a.Holders, a.IP); n {
		case 0:
			fmt.Fprintf(&b, "address %s on node %s: %s\n", a.IP, a.Node, a.Verdict)
		case 1:
			fmt.Fprintf(&b, "address %s on node %s: in use\n", a.IP, a.Node)
		default:
			meaning := "but given to no pod that is known: networks of their own, in pods or elsewhere, may well use the same"
			if a.Conflict {
				meaning = "CONFLICT"
			}
			fmt.Fprintf(&b, "address %s on node %s: in use %d times, %s\n", a.IP, a.Node, n, meaning)
		}
		if a.Verdict == sandbox.Released {
			writeProbes(&b, a.Probes)
		}
		writeTraces(&b, a.Holders, now)
		writeRoutes(&b, a.Routes)
		b.WriteByte('\n')
	}
	if a.All {
		if a.Verdict == sandbox.Unknown {
			fmt.Fprintf(&b, "node %s: unknown\n\n", a.Node)
		} else {
			fmt.Fprintf(&b, "node %s: %s, %s\n\n", a.Node, count(len(a.Leftovers), "leftover"), count(len(a.Shared), "address that is there twice", "addresses that are there twice"))
		}
		for _, t := range a.Leftovers {
			writeTrace(&b, "", t, now)
			b.WriteByte('\n')
		}
		for _, s := range a.Shared {
			fmt.Fprintf(&b, "address %s: in use %d times, CONFLICT\n", s.IP, timesInUse(s.Holders, s.IP))
			writeTraces(&b, s.Holders, now)
			b.WriteByte('\n')
		}
	}
	switch {
	case a.NotCompared != "" && a.ComparedBy != "":
		fmt.Fprintf(&b, "not compared with the pods of the API server, asked by %s: %s\n", a.ComparedBy, a.NotCompared)
	case a.NotCompared != "":
		fmt.Fprintf(&b, "not compared with the pods of the API server: %s\n", a.NotCompared)
	case a.ComparedBy != "":
		fmt.Fprintf(&b, "compared with the pods of the API server, asked by %s\n", a.ComparedBy)
	}
	for _, failure := range a.Failures {
		fmt.Fprintf(&b, "not everything was looked at: %s\n", failure)
	}
	if a.NextStep != "" {
		fmt.Fprintf(&b, "what to do: %s\n", a.NextStep)
	}
	return strings.TrimRight(b.String(), "\n") + "\n"
}

// writeProbes says who has looked and found nothing.
func writeProbes(b *strings.Builder, probes []sandbox.Probe) {
	var names []string
	for _, p := range probes {
		names = append(names, string(p.Name))
	}
	fmt.Fprintf(b, "  nothing was found by the probes %s\n", strings.Join(names, ", "))
}

func count(n int, one string, many ...string) string {
	switch {
	case n == 1:
		return "1 " + one
	case len(many) > 0:
		return fmt.Sprintf("%d %s", n, many[0])
	default:
		return fmt.Sprintf("%d %ss", n, one)
	}
}

func writeTraces(b *strings.Builder, traces []Trace, now time.Time) {
	for _, t := range traces {
		writeTrace(b, "  ", t, now)
	}
}

func writeTrace(b *strings.Builder, indent string, t Trace, now time.Time) {
	head := "no pod that is known"
	if t.Pod.UID != "" {
		head = "pod " + t.Pod.String()
	}
	if t.Leftover != "" {
		head += ": leftover, because " + t.Leftover
	}
	fmt.Fprintf(b, "%s%s\n", indent, head)
	var inner strings.Builder
	writeFindings(&inner, t.Findings, now)
	writeSandboxes(&inner, t.Sandboxes)
	for line := range strings.Lines(inner.String()) {
		b.WriteString(indent + line)
	}
}

func writeFindings(b *strings.Builder, findings []sandbox.Finding, now time.Time) {
	for _, f := range findings {
		fmt.Fprintf(b, "  %s", f)
		if f.Process != nil && !f.Process.Started.IsZero() {
			fmt.Fprintf(b, ", started %s ago", now.Sub(f.Process.Started).Round(time.Second))
		}
		b.WriteByte('\n')
		if f.Process != nil && len(f.Process.Stack) > 0 {
			fmt.Fprintf(b, "    kernel stack: %s\n", strings.Join(f.Process.Stack, " < "))
		}
	}
}

func writeSandboxes(b *strings.Builder, sandboxes []sandbox.Sandbox) {
	for _, s := range sandboxes {
		state := "has ended"
		if s.Ready {
			state = "ready"
		}
		fmt.Fprintf(b, "  record of sandbox %s: %s", sandbox.ShortID(s.ID), state)
		for _, detail := range []struct{ name, value string }{
			{"network namespace", s.Netns}, {"cgroup", s.Cgroup}, {"process", number(s.PID)},
		} {
			if detail.value != "" {
				fmt.Fprintf(b, ", %s %s", detail.name, detail.value)
			}
		}
		for _, ip := range s.IPs {
			fmt.Fprintf(b, ", address %s", ip)
		}
		b.WriteByte('\n')
	}
}

// number is a number that may be missing.
func number(n int) string {
	if n == 0 {
		return ""
	}
	return fmt.Sprint(n)
}

func writeRoutes(b *strings.Builder, routes []string) {
	for _, route := range routes {
		fmt.Fprintf(b, "  on the host: %s\n", route)
	}
}
