package main

import (
	"encoding/json"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/rulefmt"
	"github.com/prometheus/prometheus/promql/parser"
	"github.com/prometheus/prometheus/promql/promqltest"
)

// foreign are the metrics of others that alerts and dashboard use.
var foreign = []string{
	"up", "process_resident_memory_bytes",
	// k8s.io/apiserver pkg/admission/metrics.
	"apiserver_admission_webhook_rejection_count", "apiserver_admission_webhook_fail_open_count",
}

func read(t *testing.T, path ...string) string {
	t.Helper()
	content, err := os.ReadFile(filepath.Join(append([]string{repo}, path...)...))
	if err != nil {
		t.Fatal(err)
	}
	return string(content)
}

// alerts returns the rules of the chart, as Prometheus reads them.
func alerts(t *testing.T) []rulefmt.Rule {
	t.Helper()
	groups, errs := rulefmt.Parse([]byte(read(t, chartDir, "files/alerts.yaml")), false, model.UTF8Validation, parser.NewParser(parser.Options{}), slog.New(slog.DiscardHandler))
	if len(errs) > 0 {
		t.Fatal(errs)
	}
	var rules []rulefmt.Rule
	for _, group := range groups.Groups {
		rules = append(rules, group.Rules...)
	}
	if len(rules) == 0 {
		t.Fatal("there are no alerts")
	}
	return rules
}

// documented are the metrics that docs/metrics.md has, which unit tests compare with the programs, with their labels.
func documented(t *testing.T) map[string][]string {
	t.Helper()
	found := map[string][]string{}
	for _, row := range regexp.MustCompile("(?m)^\\| `(eni_guard_\\w+)(?:\\{(.*)\\})?` \\| (\\w+) \\|").FindAllStringSubmatch(read(t, "docs/metrics.md"), -1) {
		known := append(strings.Split(row[2], ","), "job", "node", "instance")
		if row[3] == "histogram" {
			found[row[1]+"_bucket"] = append(known, "le")
			continue
		}
		found[row[1]] = known
	}
	return found
}

// uses fails the test where an expression has a metric or a label that nothing has.
func uses(t *testing.T, where, expression string) {
	t.Helper()
	// Grafana's own variable is no PromQL.
	parsed, err := parser.NewParser(parser.Options{}).ParseExpr(strings.ReplaceAll(expression, "$__rate_interval", "5m"))
	if err != nil {
		t.Errorf("%s: %v", where, err)
		return
	}
	known := documented(t)
	for _, selectors := range parser.ExtractSelectors(parsed) {
		name, chosen := "", []string(nil)
		for _, matcher := range selectors {
			if matcher.Name == model.MetricNameLabel {
				name = matcher.Value
			} else {
				chosen = append(chosen, matcher.Name)
			}
		}
		has, ours := known[name]
		if !ours && !slices.Contains(foreign, name) {
			t.Errorf("%s uses %s, which docs/metrics.md does not have", where, name)
		}
		for _, label := range chosen {
			if ours && !slices.Contains(has, label) {
				t.Errorf("%s uses the label %s, which %s has not", where, label, name)
			}
		}
	}
}

// Each alert is about metrics that are there, and leads to a section of the runbook that is about it.
func TestAlertsLeadToTheRunbook(t *testing.T) {
	runbook := read(t, "docs/runbook.md")
	_, sections, _ := strings.Cut(runbook, "\n## Alerts\n")
	for _, rule := range alerts(t) {
		uses(t, rule.Alert, rule.Expr)
		if !strings.Contains(sections, "\n### "+rule.Alert+"\n") {
			t.Errorf("docs/runbook.md has no section %s", rule.Alert)
		}
		if want := "https://github.com/eni-guard/eni-guard/blob/main/docs/runbook.md#" + strings.ToLower(rule.Alert); rule.Annotations["runbook_url"] != want {
			t.Errorf("%s leads to %s, not to %s", rule.Alert, rule.Annotations["runbook_url"], want)
		}
		if !slices.Contains([]string{"critical", "warning"}, rule.Labels["severity"]) || rule.Annotations["summary"] == "" || rule.Annotations["description"] == "" {
			t.Errorf("%s does not say how bad it is, or what it is: %v %v", rule.Alert, rule.Labels, rule.Annotations)
		}
		sections = strings.Replace(sections, "\n### "+rule.Alert+"\n", "\n", 1)
	}
	if left := regexp.MustCompile(`\n### .*`).FindAllString(sections, -1); len(left) > 0 {
		t.Errorf("docs/runbook.md has sections about alerts that are none: %q", left)
	}
}

func TestDashboardShowsWhatIsThere(t *testing.T) {
	var dashboard struct {
		Panels []struct {
			ID      int
			Title   string
			Targets []struct{ Expr string }
		}
	}
	if err := json.Unmarshal([]byte(read(t, chartDir, "files/dashboard.json")), &dashboard); err != nil {
		t.Fatal(err)
	}
	shown, text := map[int]bool{}, ""
	for _, panel := range dashboard.Panels {
		if shown[panel.ID] || panel.Title == "" || len(panel.Targets) == 0 {
			t.Errorf("panel %d %q is one too many, or empty", panel.ID, panel.Title)
		}
		shown[panel.ID] = true
		for _, target := range panel.Targets {
			uses(t, "panel "+panel.Title, target.Expr)
			text += target.Expr + "\n"
		}
	}
	for metric := range documented(t) {
		if !strings.Contains(text, metric) {
			t.Errorf("the dashboard does not show %s", metric)
		}
	}
}

// Each alert speaks up about what it is for, and about nothing else. The series are read an hour after they begin.
func TestAlertsFire(t *testing.T) {
	const webhook, review = `up{job="eni-guard-webhook",instance="a"} `, `eni_guard_stage_duration_seconds_bucket{stage="review",le=`
	cases := map[string]struct{ fires, silent string }{
		"EniGuardWebhookDown": {webhook + "0x60\n", webhook + "1x60\n" + `up{job="eni-guard-webhook",instance="b"} 0x60`},
		"EniGuardNoLeader":    {webhook + "1x60", webhook + "1x60\n" + `eni_guard_held_pods{instance="a"} 0x60`},
		"EniGuardCallsFail": {
			`apiserver_admission_webhook_rejection_count{name="force-delete.eni-guard.io",error_type="calling_webhook_error"} 0x57 1 2 3`,
			`apiserver_admission_webhook_rejection_count{name="force-delete.eni-guard.io",error_type="calling_webhook_error"} 7x60
			 apiserver_admission_webhook_rejection_count{name="force-delete.eni-guard.io",error_type="no_error"} 0+1x60`,
		},
		"EniGuardFailsOpen": {
			`apiserver_admission_webhook_fail_open_count{name="force-delete.eni-guard.io"} _x57 1 1 1`,
			`apiserver_admission_webhook_fail_open_count{name="force-delete.eni-guard.io"} 3x60
			 apiserver_admission_webhook_fail_open_count{name="other"} 0+1x60`,
		},
		"EniGuardSlow": {review + `"5"} 0+1x60` + "\n" + review + `"10"} 0+2x60` + "\n" + review + `"+Inf"} 0+2x60`,
			review + `"5"} 0+2x60` + "\n" + review + `"10"} 0+2x60` + "\n" + review + `"+Inf"} 0+2x60`},
		"EniGuardAgentDown":          {`up{job="eni-guard-agent",node="a"} 0x60`, `up{job="eni-guard-agent",node="a"} 1x60`},
		"EniGuardAgentDoesNotAnswer": {`eni_guard_agent_questions_total{node="a",result="failed"} 0+1x60`, `eni_guard_agent_questions_total{node="a",result="answered"} 0+1x60`},
		"EniGuardProbeFails":         {`eni_guard_probe_up{node="a",probe="netns"} 0x60`, `eni_guard_probe_up{node="a",probe="netns"} 1x60`},
		"EniGuardProbeHangs":         {`eni_guard_probe_hanging{node="a",probe="netns",function="rtnl_lock"} 1x60`, `eni_guard_probe_hanging{node="a",probe="netns",function="rtnl_lock"} 1x50 stale`},
		"EniGuardPodHeldLong":        {`eni_guard_held_oldest_seconds{instance="a"} 60+60x60`, `eni_guard_held_oldest_seconds{instance="a"} 0x60`},
		"EniGuardLeftovers":          {`eni_guard_leftovers{node="a"} 1x60`, `eni_guard_leftovers{node="a"} 0x60`},
		"EniGuardAddressShared":      {`eni_guard_shared_addresses{node="a"} 1x60`, `eni_guard_shared_addresses{node="a"} 0x60`},
		"EniGuardTerminalPhase":      {`eni_guard_terminal_phase_while_bound_total 0x57 1 1 1`, `eni_guard_terminal_phase_while_bound_total 5x60`},
		"EniGuardCertificateEnds": {`eni_guard_certificate_expiry_timestamp_seconds{certificate="agent"} 200000x60`,
			`eni_guard_certificate_expiry_timestamp_seconds{certificate="agent"} 2592000x60`},
	}
	engine := promqltest.NewTestEngine(t, false, time.Minute*5, 100000)
	for _, rule := range alerts(t) {
		test, known := cases[rule.Alert]
		if !known {
			t.Errorf("%s is not tested", rule.Alert)
			continue
		}
		delete(cases, rule.Alert)
		for series, want := range map[string]bool{test.fires: true, test.silent: false} {
			storage := promqltest.LoadedStorage(t, "load 1m\n  "+strings.ReplaceAll(series, "\n", "\n  "))
			query, err := engine.NewInstantQuery(t.Context(), storage, nil, rule.Expr, time.Unix(0, 0).Add(time.Hour))
			if err != nil {
				t.Fatal(err)
			}
			result := query.Exec(t.Context())
			vector, err := result.Vector()
			if err != nil {
				t.Fatalf("%s: %v", rule.Alert, err)
			}
			if fires := len(vector) > 0; fires != want {
				t.Errorf("%s fires: %v, with\n%s", rule.Alert, fires, series)
			}
		}
	}
	for name := range cases {
		t.Errorf("there is no alert %s", name)
	}
}
