package webhook

import (
	"encoding/json"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/validation"

	"github.com/eni-guard/eni-guard/internal/sandbox"
)

var update = flag.Bool("update", false, "write the golden files of testdata anew")

// stuck is what an agent finds of the pod of the incident.
func stuck() []sandbox.Finding {
	report := sandbox.Report{Findings: []sandbox.Finding{
		{Kind: sandbox.NetnsOpen, Sandbox: "4f5e6d7c8b9a0123", Netns: "/run/netns/cni-1"},
		{Kind: sandbox.IPAssigned, Sandbox: "4f5e6d7c8b9a0123", Netns: "/run/netns/cni-1", IP: netip.MustParseAddr("10.1.2.3"), Interface: "eth0"},
		{Kind: sandbox.SandboxReady, Sandbox: "4f5e6d7c8b9a0123"},
		{Kind: sandbox.ContainerRunning, Sandbox: "4f5e6d7c8b9a0123", Container: "00112233445566", ContainerName: "app"},
		{Kind: sandbox.ProcessAlive, Process: &sandbox.Process{PID: 90, Command: "pause", State: "S"}},
		{Kind: sandbox.ProcessAlive, Process: &sandbox.Process{PID: 4242, Command: "java", State: "D", WaitChannel: "request_wait_answer"}},
	}}
	report.Sort()
	return report.Findings
}

// What a refused person reads is the user interface: every message stands in testdata as it is printed.
func TestMessages(t *testing.T) {
	for name, test := range map[string]struct {
		pod      *corev1.Pod
		evidence evidence
	}{
		"bound-process-in-state-D": {runningPod(terminating(new(int64(30)))), evidence{report: allProbes(stuck()...)}},
		"bound-running":            {runningPod(), evidence{report: allProbes(stuck()[1:]...)}},
		"bound-finished":           {runningPod(phase(corev1.PodSucceeded)), evidence{report: allProbes(stuck()[3:]...)}},
		"bound-reading-a-disk":     {runningPod(), evidence{report: allProbes(stuck()...)}},
		"bound-sandbox-only":       {runningPod(), evidence{report: allProbes(stuck()[3:]...)}},
		"bound-namespace-only":     {runningPod(), evidence{report: allProbes(sandbox.Finding{Kind: sandbox.NetnsOpen, Netns: "net:[4026532178]"})}},
		"no-answer":                {runningPod(), evidence{failure: "the agent of node node-a did not answer within 5s at 192.0.2.7:9807"}},
		"probe-failed":             {runningPod(), evidence{report: failedProbe()}},
	} {
		t.Run(name, func(t *testing.T) {
			response := respond(&removal{path: PathDelete, pod: test.pod}, decide(test.evidence))
			if response.Allowed {
				t.Fatal("allowed")
			}
			status := response.Result
			got := fmt.Sprintf("%d %s\n%s\n", status.Code, status.Reason, status.Message)
			for _, cause := range status.Details.Causes {
				got += fmt.Sprintf("cause %s: %s\n", cause.Type, cause.Message)
			}
			golden := filepath.Join("testdata", "messages", name+".txt")
			if *update {
				if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if got != string(want) {
				t.Errorf("got\n%s\nwant (%s; go test -update writes it anew)\n%s", got, golden, want)
			}
			if lines := strings.Count(status.Message, "\n") + 1; lines > 3 {
				t.Errorf("the message has %d lines, more than 3", lines)
			}
		})
	}
}

// Every section that a refusal points to is there to be read.
func TestRunbookHasEverySection(t *testing.T) {
	content, err := os.ReadFile("../docs/runbook.md")
	if err != nil {
		t.Fatal(err)
	}
	anchors := map[string]bool{}
	for line := range strings.Lines(string(content)) {
		if title, ok := strings.CutPrefix(line, "## "); ok {
			anchors[strings.ReplaceAll(strings.ToLower(strings.TrimSpace(title)), " ", "-")] = true
		}
	}
	for reason, section := range runbookSections {
		if !anchors[section] {
			t.Errorf("docs/runbook.md has no section #%s, which a refusal for %s points to", section, reason)
		}
	}
	for _, reason := range []Reason{ReasonBound, ReasonNoAnswer, ReasonProbeFailed} {
		if runbookSections[reason] == "" {
			t.Errorf("a refusal for %s points to no section", reason)
		}
	}
}

func TestAnnotations(t *testing.T) {
	r := &removal{path: PathDelete, pod: runningPod()}
	got := respond(r, decide(evidence{report: allProbes(stuck()...)})).AuditAnnotations
	want := map[string]string{
		"decision": "denied", "verdict": "bound", "mode": "deny", "path": "delete", "reason": "SandboxBound",
		"pod": "shop/web-0", "pod-uid": "0e0d5ce6-6a6c-4c5b-9f6c-111111111111", "node": "node-a", "pod-ips": "10.1.2.3,fd00::3",
		"evidence": "process 4242 (java) is in state D (uninterruptible sleep) in request_wait_answer; container app (0011223344556) is running; " +
			"process 90 (pause) is in state S; sandbox 4f5e6d7c8b9a0 is ready; " +
			"address 10.1.2.3 is on eth0 in network namespace /run/netns/cni-1; network namespace /run/netns/cni-1 is open",
	}
	for key, value := range want {
		if got[key] != value {
			t.Errorf("%s: got %q, want %q", key, got[key], value)
		}
	}
	if len(got) != len(want) {
		t.Errorf("got %d annotations, want %d: %v", len(got), len(want), got)
	}

	r.path = PathCollection
	collection := respond(r, decide(evidence{report: allProbes()})).AuditAnnotations
	compact := collection["pod.0e0d5ce6-6a6c-4c5b-9f6c-111111111111"]
	var fields map[string]string
	if err := json.Unmarshal([]byte(compact), &fields); err != nil || len(collection) != 1 {
		t.Fatalf("a collection delete has %v (%v)", collection, err)
	}
	if fields["decision"] != "allowed" || fields["path"] != "collection" || fields["pod"] != "shop/web-0" {
		t.Errorf("got %v", fields)
	}
}

// The API server drops annotations with a key that is not a qualified name, and a pod may have any number of processes.
func TestAnnotationsStayWithinLimits(t *testing.T) {
	var many []sandbox.Finding
	for pid := range 5000 {
		many = append(many, sandbox.Finding{Kind: sandbox.ProcessAlive, Process: &sandbox.Process{PID: pid, Command: "日本語のコマンド", State: "S"}})
	}
	r := &removal{path: PathCollection, pod: runningPod(func(p *corev1.Pod) { p.Name = strings.Repeat("n", 253) })}
	response := respond(r, decide(evidence{report: allProbes(many...)}))
	if causes := response.Result.Details.Causes; len(causes) != maxEvidence+1 || causes[maxEvidence].Message != "4980 more findings" {
		t.Errorf("%d causes, the last one %v", len(causes), causes[len(causes)-1])
	}
	for key, value := range response.AuditAnnotations {
		if errs := validation.IsQualifiedName("force-delete.eni-guard.io/" + key); len(errs) > 0 {
			t.Errorf("key %q: %v", key, errs)
		}
		if len(value) > 4096 {
			t.Errorf("the value of %q has %d bytes", key, len(value))
		}
	}
}

func TestEvidenceSaysWhatIsNotKnown(t *testing.T) {
	got := respond(&removal{path: PathDelete, pod: runningPod()}, decide(evidence{report: failedProbe()})).AuditAnnotations["evidence"]
	if want := `the probe "runtime" did not run: container runtime: connection refused`; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestAllowedResponsesCarryNoStatus(t *testing.T) {
	for _, d := range []decision{decide(evidence{report: allProbes()}), exemptDecision(ReasonHostNetwork)} {
		response := respond(&removal{path: PathDelete, pod: runningPod()}, d)
		if !response.Allowed || response.Result != nil || response.AuditAnnotations["decision"] != string(d.outcome) {
			t.Errorf("%s: got %+v", d.outcome, response)
		}
	}
	if respond(&removal{pod: runningPod()}, decision{evidence: evidence{failure: "x"}}).Allowed {
		t.Error("the zero decision allows")
	}
}
