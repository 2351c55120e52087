package webhook

import (
	"testing"

	"github.com/eni-guard/eni-guard/internal/sandbox"
)

// allProbes is the answer of an agent that could look everywhere.
func allProbes(findings ...sandbox.Finding) sandbox.Report {
	report := sandbox.Report{Node: "node-a", UID: "0e0d5ce6-6a6c-4c5b-9f6c-111111111111", Findings: findings}
	for _, name := range sandbox.Required {
		report.Probes = append(report.Probes, sandbox.Probe{Name: name})
	}
	return report
}

// failedProbe is the answer of an agent whose runtime is down.
func failedProbe(findings ...sandbox.Finding) sandbox.Report {
	report := allProbes(findings...)
	report.Probes[0].Error = "container runtime: connection refused"
	return report
}

// Every row of the table "Decisions" of docs/design.md for mode deny.
func TestDecide(t *testing.T) {
	open := sandbox.Finding{Kind: sandbox.NetnsOpen, Netns: "/run/netns/cni-1"}
	for _, test := range []struct {
		name     string
		evidence evidence
		outcome  Outcome
		verdict  sandbox.Verdict
		reason   Reason
	}{
		{"released", evidence{report: allProbes()}, Allowed, sandbox.Released, ReasonReleased},
		{"bound", evidence{report: allProbes(open)}, Denied, sandbox.Bound, ReasonBound},
		{"bound, though a probe failed", evidence{report: failedProbe(open)}, Denied, sandbox.Bound, ReasonBound},
		{"bound outweighs what the kubelet reported", evidence{report: allProbes(open), containersTerminated: true}, Denied, sandbox.Bound, ReasonBound},
		{"bound outweighs the out-of-service taint", evidence{report: allProbes(open), nodeOutOfService: true}, Denied, sandbox.Bound, ReasonBound},
		{"no answer", evidence{failure: "timeout"}, Denied, sandbox.Unknown, ReasonNoAnswer},
		{"a probe failed", evidence{report: failedProbe()}, Denied, sandbox.Unknown, ReasonProbeFailed},
		{"nothing known at all", evidence{}, Denied, sandbox.Unknown, ReasonProbeFailed},
		{"the node is gone", evidence{failure: "gone", nodeGone: true}, Allowed, sandbox.Unknown, ReasonNodeGone},
		{"the node is out of service", evidence{failure: "timeout", nodeOutOfService: true}, Allowed, sandbox.Unknown, ReasonNodeOutOfService},
		{"every container has ended", evidence{failure: "timeout", containersTerminated: true}, Allowed, sandbox.Unknown, ReasonContainersTerminated},
		{"a probe failed, but every container has ended", evidence{report: failedProbe(), containersTerminated: true}, Allowed, sandbox.Unknown, ReasonContainersTerminated},
	} {
		t.Run(test.name, func(t *testing.T) {
			d := decide(test.evidence)
			if d.outcome != test.outcome || d.verdict != test.verdict || d.reason != test.reason || d.mode != ModeDeny {
				t.Errorf("got %s, %s, %s, %s; want %s, %s, %s", d.outcome, d.verdict, d.reason, d.mode, test.outcome, test.verdict, test.reason)
			}
		})
	}
}
