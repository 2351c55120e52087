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

// denying is a situation in mode deny, without anything else.
func denying(e evidence) situation { return situation{mode: ModeDeny, evidence: e} }

var open = sandbox.Finding{Kind: sandbox.NetnsOpen, Netns: "/run/netns/cni-1"}

// What is known decides first: what outweighs what, in the mode that refuses.
func TestDecideByEvidence(t *testing.T) {
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
		{"bound outweighs that the node is gone", evidence{report: allProbes(open), nodeGone: true}, Denied, sandbox.Bound, ReasonBound},
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
			d := decide(denying(test.evidence))
			if d.outcome != test.outcome || d.verdict != test.verdict || d.reason != test.reason || d.mode != ModeDeny {
				t.Errorf("got %s, %s, %s, %s; want %s, %s, %s", d.outcome, d.verdict, d.reason, d.mode, test.outcome, test.verdict, test.reason)
			}
		})
	}
}

// Every row of the table "Decisions" of docs/design.md, for every mode.
func TestDecideByMode(t *testing.T) {
	bound, unknown, released := evidence{report: allProbes(open)}, evidence{failure: "timeout"}, evidence{report: allProbes()}
	gone := evidence{failure: "gone", nodeGone: true}
	authorised, refused := override{reason: "why", authorised: true}, override{reason: "why", refused: "no right"}
	for _, test := range []struct {
		name              string
		evidence          evidence
		holdable          bool
		override          override
		deny, hold, audit Outcome
	}{
		{"released", released, true, override{}, Allowed, Allowed, Allowed},
		{"released, terminating", released, false, override{}, Allowed, Allowed, Allowed},
		{"bound", bound, true, override{}, Denied, Held, Audited},
		{"bound, terminating without the finalizer", bound, false, override{}, Denied, Denied, Audited},
		{"unknown", unknown, true, override{}, Denied, Held, Audited},
		{"unknown, terminating without the finalizer", unknown, false, override{}, Denied, Denied, Audited},
		{"unknown, the node is gone", gone, true, override{}, Allowed, Allowed, Allowed},
		{"bound, overridden", bound, true, authorised, Overridden, Overridden, Overridden},
		{"unknown, overridden", unknown, false, authorised, Overridden, Overridden, Overridden},
		{"released, overridden", released, false, authorised, Overridden, Overridden, Overridden},
		{"bound, an override that does not count", bound, true, refused, Denied, Held, Audited},
		{"bound, terminating, an override that does not count", bound, false, refused, Denied, Denied, Audited},
		{"released, an override that does not count", released, true, refused, Allowed, Allowed, Allowed},
	} {
		for mode, want := range map[Mode]Outcome{ModeDeny: test.deny, ModeHold: test.hold, ModeAudit: test.audit} {
			t.Run(test.name+", "+string(mode), func(t *testing.T) {
				d := decide(situation{mode: mode, evidence: test.evidence, override: test.override, holdable: test.holdable})
				if d.outcome != want || d.mode != mode {
					t.Errorf("got %s in mode %s, want %s", d.outcome, d.mode, want)
				}
				if (d.reason == ReasonOverride) != (want == Overridden) {
					t.Errorf("the reason is %s", d.reason)
				}
			})
		}
	}
}

func TestOnlyARefusalStopsTheRequest(t *testing.T) {
	for outcome, want := range map[Outcome]bool{"": false, Denied: false, Allowed: true, Exempt: true, Held: true, Audited: true, Overridden: true} {
		if outcome.allows() != want {
			t.Errorf("%q allows: %v", outcome, !want)
		}
	}
}

func TestParseMode(t *testing.T) {
	for _, text := range []string{"deny", "hold", "audit", "off"} {
		if mode, err := parseMode(text); err != nil || string(mode) != text {
			t.Errorf("%q: got %q, %v", text, mode, err)
		}
	}
	for _, text := range []string{"", "Deny", "denny", "off ", "true"} {
		if mode, err := parseMode(text); err == nil {
			t.Errorf("%q is the mode %q", text, mode)
		}
	}
}
