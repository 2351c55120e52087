package webhook

import (
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
)

// A field of the node's status that the agent's policy does not compare is one that an agent may change.
func TestTheAgentsPolicyComparesEveryFieldOfTheStatus(t *testing.T) {
	policy, err := os.ReadFile("../charts/eni-guard/templates/agent-policy.yaml")
	if err != nil {
		t.Fatal(err)
	}
	for _, field := range reflect.VisibleFields(reflect.TypeFor[corev1.NodeStatus]()) {
		name, _, _ := strings.Cut(field.Tag.Get("json"), ",")
		if !strings.Contains(string(policy), "object.status.?"+name+" == oldObject.status.?"+name+"\n") &&
			(name != "conditions" || !strings.Contains(string(policy), "== oldObject.status.?conditions.")) {
			t.Errorf("the policy does not compare status.%s", name)
		}
	}
}

// Whoever reviews the guard's rights reads the table; it has each rule of the chart, and no other.
func TestTheDocumentsExplainEveryRight(t *testing.T) {
	templates, err := filepath.Glob("../charts/eni-guard/templates/*.yaml")
	if err != nil || len(templates) == 0 {
		t.Fatalf("%d templates (%v)", len(templates), err)
	}
	rule := regexp.MustCompile(`- \{apiGroups: \[[^]]*\], resources: \[([^]]*)\],(?: resourceNames: \[[^]]*\],)? verbs: \[([^]]*)\]\}`)
	quoted := func(list string) string { return "`" + strings.ReplaceAll(list, ", ", "`, `") + "`" }
	rights := 0
	document, err := os.ReadFile("../docs/security.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, template := range templates {
		content, err := os.ReadFile(template)
		if err != nil {
			t.Fatal(err)
		}
		for _, match := range rule.FindAllStringSubmatch(string(content), -1) {
			rights++
			if row := "| " + quoted(match[1]) + " | " + quoted(match[2]) + " | "; !strings.Contains(string(document), row) {
				t.Errorf("%s: docs/security.md has no row with %s", template, row)
			}
		}
		if lists := strings.Count(string(content), "verbs:"); lists != len(rule.FindAllString(string(content), -1)) {
			t.Errorf("%s: a rule is not written as this test reads it", template)
		}
	}
	_, table, _ := strings.Cut(string(document), "## What the accounts may do")
	table, _, _ = strings.Cut(table, "\n## ")
	if rows := strings.Count(table, "\n| ") - 1; rows != rights {
		t.Errorf("docs/security.md explains %d rights, the chart has %d", rows, rights)
	}
}
