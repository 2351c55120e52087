package webhook

import (
	"cmp"
	"encoding/json"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"unicode/utf8"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
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

// What people read is the user interface: every message stands in testdata as it is printed.
func TestMessages(t *testing.T) {
	bound, unknown := evidence{report: allProbes(stuck()...)}, evidence{failure: "the agent of node node-a did not answer within 5s at 192.0.2.7:9807"}
	frozen := sandbox.Finding{Kind: sandbox.ProcessAlive, Process: &sandbox.Process{PID: 4242, Command: "java", State: "D", Frozen: true}}
	conflicting := allProbes(stuck()...)
	conflicting.Conflicts = []sandbox.Conflict{{
		IP: netip.MustParseAddr("10.1.2.3"), Netns: "/run/netns/cni-2", Pod: sandbox.Pod{Namespace: "shop", Name: "payment-0", UID: "11111111-2222-3333-4444-555555555555"},
	}}
	with := func(s situation, change func(*situation)) situation { change(&s); return s }
	// failing is a report of which the first probes have failed.
	failing := func(errs ...string) sandbox.Report {
		report := allProbes()
		for n, err := range errs {
			report.Probes[n].Error = err
		}
		return report
	}
	expired := override{reason: "node lost", flaw: flawUntil, refused: "it has expired: the annotation eni-guard.io/allow-force-delete-until is 2026-11-24T01:00:00Z, and it is 2026-11-24T03:00:00Z"}
	right := override{reason: "node lost", flaw: flawRight, refused: `user alice does not have the right "override" on forcedeletes.eni-guard.io in namespace shop`}
	for name, test := range map[string]struct {
		path      Path
		pod       *corev1.Pod
		situation situation
	}{
		"bound-process-in-state-D":      {PathDelete, runningPod(terminating(new(int64(30)))), denying(bound)},
		"bound-frozen":                  {PathDelete, runningPod(terminating(new(int64(30)))), denying(evidence{report: allProbes(frozen)})},
		"bound-frozen-not-told-to-end":  {PathDelete, runningPod(), denying(evidence{report: allProbes(frozen)})},
		"bound-with-finalizers":         {PathDelete, runningPod(terminating(new(int64(30))), keptBy("example.com/backup", Finalizer, "example.com/volume")), denying(bound)},
		"bound-running":                 {PathDelete, runningPod(), denying(evidence{report: allProbes(stuck()[1:]...)})},
		"bound-running-with-finalizer":  {PathDelete, runningPod(keptBy("example.com/backup")), denying(bound)},
		"bound-called-finished":         {PathDelete, runningPod(phase(corev1.PodFailed)), denying(bound)},
		"bound-finished":                {PathDelete, ended(), denying(evidence{report: allProbes(stuck()[3:]...)})},
		"bound-reading-a-disk":          {PathDelete, runningPod(), denying(bound)},
		"bound-sandbox-only":            {PathDelete, runningPod(), denying(evidence{report: allProbes(stuck()[3:]...)})},
		"bound-namespace-only":          {PathDelete, runningPod(), denying(evidence{report: allProbes(sandbox.Finding{Kind: sandbox.NetnsOpen, Netns: "net:[4026532178]"})})},
		"bound-conflict":                {PathDelete, runningPod(terminating(new(int64(30)))), denying(evidence{report: conflicting})},
		"bound-in-mode-hold":            {PathDelete, runningPod(terminating(new(int64(30)))), with(denying(bound), func(s *situation) { s.mode = ModeHold })},
		"bound-eviction":                {PathEviction, runningPod(), denying(bound)},
		"bound-eviction-of-terminating": {PathEviction, runningPod(terminating(new(int64(30)))), denying(bound)},
		"bound-ignore-label":            {PathIgnoreLabel, runningPod(), denying(bound)},
		"bound-finalizer":               {PathFinalizer, runningPod(terminating(new(int64(0)))), denying(bound)},
		"override-expired":              {PathDelete, runningPod(), with(denying(bound), func(s *situation) { s.override = expired })},
		"override-without-the-right":    {PathDelete, runningPod(), with(denying(unknown), func(s *situation) { s.override = right })},
		"override-without-a-reason": {PathDelete, runningPod(), with(denying(bound), func(s *situation) {
			s.override = override{flaw: flawReason, refused: "the annotation eni-guard.io/allow-force-delete gives no reason"}
		})},
		"released-override-expired":       {PathDelete, runningPod(), with(denying(evidence{report: allProbes()}), func(s *situation) { s.override = expired })},
		"held-override-without-the-right": {PathDelete, runningPod(), with(denying(bound), func(s *situation) { s.mode, s.holdable, s.override = ModeHold, true, right })},
		"audited-override-expired":        {PathDelete, runningPod(), with(denying(unknown), func(s *situation) { s.mode, s.override = ModeAudit, expired })},
		"unknown-running":                 {PathDelete, runningPod(), denying(unknown)},
		"unknown-terminating":             {PathDelete, runningPod(terminating(new(int64(30)))), denying(unknown)},
		"unknown-finished-with-finalizer": {PathDelete, ended(terminating(new(int64(0))), keptBy("example.com/backup")), denying(unknown)},
		"unknown-called-finished":         {PathDelete, runningPod(phase(corev1.PodFailed)), denying(unknown)},
		"unknown-ignore-label":            {PathIgnoreLabel, runningPod(), denying(unknown)},
		"unknown-finalizer":               {PathFinalizer, runningPod(terminating(new(int64(0)))), denying(unknown)},
		"probe-damaged":                   {PathDelete, runningPod(), denying(evidence{report: failing("sandbox 4f5e6d7c8b9a0: its record is damaged")})},
		"probes-failed":                   {PathDelete, runningPod(), denying(evidence{report: failing("no answer after 3s", "no answer after 3s")})},
		"probe-failed":                    {PathDelete, runningPod(), denying(evidence{report: failedProbe()})},
		"held":                            {PathDelete, runningPod(), with(denying(bound), func(s *situation) { s.mode, s.holdable = ModeHold, true })},
		"held-with-finalizer":             {PathDelete, runningPod(keptBy("example.com/backup")), with(denying(bound), func(s *situation) { s.mode, s.holdable = ModeHold, true })},
		"held-unknown":                    {PathEviction, runningPod(), with(denying(unknown), func(s *situation) { s.mode, s.holdable = ModeHold, true })},
		"audited":                         {PathCollection, runningPod(), with(denying(bound), func(s *situation) { s.mode = ModeAudit })},
		"audited-unknown":                 {PathDelete, runningPod(), with(denying(unknown), func(s *situation) { s.mode = ModeAudit })},
		"overridden":                      {PathDelete, runningPod(), with(denying(bound), func(s *situation) { s.override = override{reason: "node lost", authorised: true} })},
	} {
		t.Run(name, func(t *testing.T) {
			compareGolden(t, name, &removal{path: test.path, pod: test.pod, user: authenticationv1.UserInfo{Username: "alice"}}, decide(test.situation))
		})
	}
	failed := decide(denying(bound))
	failed.reason, failed.holdFailure = ReasonHoldFailed, "changing pod shop/web-0: Forbidden"
	t.Run("hold-failed", func(t *testing.T) {
		compareGolden(t, "hold-failed", &removal{path: PathDelete, pod: runningPod(), user: authenticationv1.UserInfo{Username: "alice"}}, failed)
	})
	evicted := &removal{path: PathEviction, pod: &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "web-0"}}, user: authenticationv1.UserInfo{Username: "alice"}}
	t.Run("eviction-of-no-pod", func(t *testing.T) {
		compareGolden(t, "eviction-of-no-pod", evicted, decision{outcome: Denied, verdict: sandbox.NotAsked, reason: ReasonNoSuchPod})
	})
	t.Run("eviction-of-an-unreadable-pod", func(t *testing.T) {
		compareGolden(t, "eviction-of-an-unreadable-pod", evicted, decision{outcome: Denied, verdict: sandbox.Unknown, reason: ReasonPodUnreadable,
			situation: denying(evidence{failure: "the pod could not be read from the API server: connection refused"})})
	})
}

// compareGolden compares all that people and programs are told about a removal with what stands in testdata.
func compareGolden(t *testing.T, name string, r *removal, d decision) {
	t.Helper()
	response := respond(r, d)
	got := "allowed\n"
	if status := response.Result; status != nil {
		got = fmt.Sprintf("%d %s\n%s\n", status.Code, status.Reason, status.Message)
		for _, cause := range status.Details.Causes {
			got += fmt.Sprintf("cause %s: %s\n", cause.Type, cause.Message)
		}
		if lines := strings.Count(status.Message, "\n") + 1; lines > 3 {
			t.Errorf("the message has %d lines, more than 3", lines)
		}
		if told := RefusedVerdict(status.Message); d.verdict != sandbox.NotAsked && told != d.verdict {
			t.Errorf("the message tells the verdict %s, not %s", told, d.verdict)
		}
	}
	for _, warning := range response.Warnings {
		got += "warning: " + warning + "\n"
	}
	if r.pod.UID != "" {
		got += fmt.Sprintf("event %s: %s\n", eventReasons[d.outcome], eventNote(r, d))
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
}

// The README shows a refusal as it is, in shorter lines.
func TestReadmeShowsARefusal(t *testing.T) {
	readme, err := os.ReadFile("../README.md")
	if err != nil {
		t.Fatal(err)
	}
	refused := message(&removal{path: PathDelete, pod: runningPod(terminating(new(int64(30))))}, decide(denying(evidence{report: allProbes(stuck()...)})))
	inOneLine := func(text string) string { return strings.Join(strings.Fields(text), " ") }
	if !strings.Contains(inOneLine(string(readme)), inOneLine(refused)) {
		t.Errorf("README.md does not show this refusal:\n%s", refused)
	}
}

// Every section that a refusal points to is there to be read.
func TestRunbookHasEverySection(t *testing.T) {
	content, err := os.ReadFile("../docs/runbook.md")
	if err != nil {
		t.Fatal(err)
	}
	anchors, first := map[string]bool{}, ""
	for line := range strings.Lines(string(content)) {
		if title, ok := strings.CutPrefix(line, "## "); ok {
			anchor := strings.ReplaceAll(strings.ToLower(strings.TrimSpace(title)), " ", "-")
			anchors[anchor] = true
			first = cmp.Or(first, anchor)
		}
	}
	if first != runbookSections[ReasonBound] {
		t.Errorf("docs/runbook.md begins with #%s, and not with the incident", first)
	}
	for reason, section := range runbookSections {
		if !anchors[section] {
			t.Errorf("docs/runbook.md has no section #%s, which a refusal for %s points to", section, reason)
		}
	}
	// Every refusal that there is, as people read it; and what the API server says of a webhook that it cannot reach.
	files, err := filepath.Glob("testdata/messages/*.txt")
	if err != nil {
		t.Fatal(err)
	}
	refusals := 0
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if !strings.HasPrefix(string(text), "4") || strings.HasPrefix(string(text), "404 ") {
			continue // it went through, or there is no such pod
		}
		refusals++
		_, section, _ := strings.Cut(string(text), "\nMore: "+runbook)
		section, _, _ = strings.Cut(section, "\n")
		if !anchors[section] {
			t.Errorf("%s leads to the section %q of docs/runbook.md, which is not there", file, section)
		}
	}
	if refusals < 20 {
		t.Errorf("only %d refusals were found; or this test cannot find them any more", refusals)
	}
	if _, section, _ := strings.Cut(checkResult{Answer: answerUnreachable}.String(), runbook); !anchors[section] {
		t.Errorf("a webhook that cannot be reached leads to the section %q of docs/runbook.md, which is not there", section)
	}
}

func TestAnnotations(t *testing.T) {
	r := &removal{path: PathDelete, pod: runningPod()}
	got := respond(r, decide(denying(evidence{report: allProbes(stuck()...)}))).AuditAnnotations
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
	collection := respond(r, decide(denying(evidence{report: allProbes()}))).AuditAnnotations
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
	response := respond(r, decide(denying(evidence{report: allProbes(many...)})))
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

// The API server cuts warnings of a collection delete, and takes no Event that is longer; it cuts audit annotations, too.
func TestWordsStayWithinLimits(t *testing.T) {
	long := strings.Repeat("n", 253)
	var many []sandbox.Finding
	for range maxEvidence {
		many = append(many, sandbox.Finding{Kind: sandbox.NetnsOpen, Netns: "/run/netns/" + long})
	}
	pod := runningPod(func(p *corev1.Pod) { p.Name, p.Namespace, p.Spec.NodeName = long, long, long })
	reason := strings.Repeat("节", maxOverrideReason)
	for outcome, s := range map[Outcome]situation{
		Held:       {mode: ModeHold, holdable: true, override: override{flaw: flawRight, refused: reason}},
		Audited:    {mode: ModeAudit, override: override{flaw: flawRight, refused: reason}},
		Overridden: {mode: ModeDeny, override: override{reason: reason, authorised: true}},
	} {
		s.report = allProbes(many...)
		d := decide(s)
		r := &removal{path: PathDelete, pod: pod, user: authenticationv1.UserInfo{Username: long}}
		response := respond(r, d)
		if d.outcome != outcome || len(response.Warnings) != 1 {
			t.Fatalf("%s, warnings %q", d.outcome, response.Warnings)
		}
		for what, c := range map[string]struct {
			text  string
			limit int
		}{
			"warning":  {response.Warnings[0], 256},
			"Event":    {eventNote(r, d), 1024},
			"evidence": {response.AuditAnnotations["evidence"], 2048},
		} {
			// It is cut at the limit, and not far below it: no character is longer than four bytes.
			if n := len(c.text); n > c.limit || n < c.limit-4 || !utf8.ValidString(c.text) || !strings.HasSuffix(c.text, "…") {
				t.Errorf("%s: the %s has %d bytes, at most %d: %s", outcome, what, n, c.limit, c.text)
			}
		}
	}
}

func TestEvidenceSaysWhatIsNotKnown(t *testing.T) {
	got := respond(&removal{path: PathDelete, pod: runningPod()}, decide(denying(evidence{report: failedProbe()}))).AuditAnnotations["evidence"]
	if want := `the probe "runtime" did not run: container runtime: connection refused`; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestAllowedResponsesCarryNoStatus(t *testing.T) {
	for _, d := range []decision{decide(denying(evidence{report: allProbes()})), exemptDecision(ModeDeny, ReasonHostNetwork)} {
		response := respond(&removal{path: PathDelete, pod: runningPod()}, d)
		if !response.Allowed || response.Result != nil || response.AuditAnnotations["decision"] != string(d.outcome) {
			t.Errorf("%s: got %+v", d.outcome, response)
		}
	}
	if respond(&removal{pod: runningPod()}, decision{situation: denying(evidence{failure: "x"})}).Allowed {
		t.Error("the zero decision allows")
	}
}
