//go:build conformance

package webhook

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
)

const agentAccount = "system:serviceaccount:eni-guard:eni-guard-agent"

// TestChartBindsAgentsToTheirNode holds the policy for the account of the agents against an API server whose RBAC lets that account do
// everything: whatever is refused, the policy has refused. Somebody may have bound more to the account than the chart does.
func TestChartBindsAgentsToTheirNode(t *testing.T) {
	s := startAPIServer(t)
	s.installAgentPolicy(t)
	// as is an account that may do everything, with a token of a pod on some node.
	as := func(user string, node ...string) kubernetes.Interface {
		config := rest.CopyConfig(s.config)
		config.Impersonate = rest.ImpersonationConfig{UserName: user, Groups: []string{"system:masters"}}
		if len(node) > 0 {
			config.Impersonate.Extra = map[string][]string{"authentication.kubernetes.io/node-name": node}
		}
		return kubernetes.NewForConfigOrDie(config)
	}
	for _, name := range []string{"own", "other"} {
		node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"kept": "yes"}, Finalizers: []string{"example.com/kept"}}}
		created, err := s.CoreV1().Nodes().Create(t.Context(), node, metav1.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
		created.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue}}
		if _, err := s.CoreV1().Nodes().UpdateStatus(t.Context(), created, metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	const (
		condition  = `{"status":{"conditions":[{"type":"OrphanedSandbox","status":"True","reason":"LeftoverFound","message":"%s"}]}}`
		removal    = `{"status":{"conditions":[{"type":"OrphanedSandbox","$patch":"delete"}]}}`
		otherNode  = "an agent may write to its own node only"
		statusOnly = "an agent may write to the status of its node only"
		oneOnly    = "an agent may write the condition OrphanedSandbox of its node only"
	)
	patch := func(api kubernetes.Interface, node, body string, subresources ...string) error {
		_, err := api.CoreV1().Nodes().Patch(t.Context(), node, types.StrategicMergePatchType, []byte(body), metav1.PatchOptions{}, subresources...)
		return err
	}
	own := as(agentAccount, "own")
	// A policy is in force some time after it was made.
	if err := wait.PollUntilContextTimeout(t.Context(), 50*time.Millisecond, time.Minute, true, func(context.Context) (bool, error) {
		return patch(own, "other", fmt.Sprintf(condition, "before")) != nil, nil
	}); err != nil {
		t.Fatalf("the policy does not come into force: %v", err)
	}
	for _, c := range []struct {
		name, refused string // empty: it goes through
		try           func() error
	}{
		{"its condition, for the first time", "", func() error { return patch(own, "own", fmt.Sprintf(condition, "one"), "status") }},
		{"its condition, again", "", func() error { return patch(own, "own", fmt.Sprintf(condition, "two"), "status") }},
		{"a patch that changes nothing", "", func() error { return patch(own, "own", "{}", "status") }},
		{"its condition, taken away", "", func() error { return patch(own, "own", removal, "status") }},
		{"the condition of another node", otherNode, func() error { return patch(own, "other", fmt.Sprintf(condition, "one"), "status") }},
		{"without a node in the token", otherNode, func() error { return patch(as(agentAccount), "own", fmt.Sprintf(condition, "one"), "status") }},
		{"with two nodes in the token", otherNode, func() error {
			return patch(as(agentAccount, "own", "other"), "own", fmt.Sprintf(condition, "one"), "status")
		}},
		{"another condition", oneOnly, func() error {
			return patch(own, "own", `{"status":{"conditions":[{"type":"Ready","status":"False"}]}}`, "status")
		}},
		{"another condition, taken away", oneOnly, func() error {
			return patch(own, "own", `{"status":{"conditions":[{"type":"Ready","$patch":"delete"}]}}`, "status")
		}},
		{"a new condition of another name", oneOnly, func() error {
			return patch(own, "own", `{"status":{"conditions":[{"type":"MemoryPressure","status":"True"}]}}`, "status")
		}},
		{"a finalizer, by way of the status", oneOnly, func() error {
			return patch(own, "own", `{"metadata":{"finalizers":["example.com/added"]}}`, "status")
		}},
		{"a finalizer, taken away by way of the status", oneOnly, func() error {
			return patch(own, "own", `{"metadata":{"$deleteFromPrimitiveList/finalizers":["example.com/kept"]}}`, "status")
		}},
		{"an owner, by way of the status", oneOnly, func() error {
			return patch(own, "own", `{"metadata":{"ownerReferences":[{"apiVersion":"v1","kind":"Node","name":"other","uid":"1"}]}}`, "status")
		}},
		{"a label, by way of the status", oneOnly, func() error { return patch(own, "own", `{"metadata":{"labels":{"added":"yes"}}}`, "status") }},
		{"an annotation, by way of the status", oneOnly, func() error { return patch(own, "own", `{"metadata":{"annotations":{"added":"yes"}}}`, "status") }},
		{"a label", statusOnly, func() error { return patch(own, "own", `{"metadata":{"labels":{"added":"yes"}}}`) }},
		{"a finalizer", statusOnly, func() error { return patch(own, "own", `{"metadata":{"finalizers":["example.com/added"]}}`) }},
		{"an owner", statusOnly, func() error {
			return patch(own, "own", `{"metadata":{"ownerReferences":[{"apiVersion":"v1","kind":"Node","name":"other","uid":"1"}]}}`)
		}},
		{"a taint", statusOnly, func() error { return patch(own, "own", `{"spec":{"unschedulable":true}}`) }},
		{"deleting its node", statusOnly, func() error { return own.CoreV1().Nodes().Delete(t.Context(), "own", metav1.DeleteOptions{}) }},
		{"deleting another node", otherNode, func() error { return own.CoreV1().Nodes().Delete(t.Context(), "other", metav1.DeleteOptions{}) }},
		{"deleting all nodes", otherNode, func() error {
			return own.CoreV1().Nodes().DeleteCollection(t.Context(), metav1.DeleteOptions{}, metav1.ListOptions{})
		}},
		{"making a node", otherNode, func() error {
			_, err := own.CoreV1().Nodes().Create(t.Context(), &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "new"}}, metav1.CreateOptions{})
			return err
		}},
		{"making its own node", statusOnly, func() error {
			_, err := as(agentAccount, "new").CoreV1().Nodes().Create(t.Context(), &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "new"}}, metav1.CreateOptions{})
			return err
		}},
		{"somebody else, all of it", "", func() error {
			return patch(as("somebody"), "own", `{"metadata":{"labels":{"added":"yes"},"finalizers":["example.com/added"]},"spec":{"unschedulable":true}}`)
		}},
		{"somebody else, another condition", "", func() error {
			return patch(as("somebody"), "other", `{"status":{"conditions":[{"type":"Ready","status":"False"}]}}`, "status")
		}},
	} {
		switch err := c.try(); {
		case c.refused == "" && err != nil:
			t.Errorf("Kubernetes %s: %s: %v", s.version, c.name, err)
		case c.refused != "" && (err == nil || !strings.Contains(err.Error(), "ValidatingAdmissionPolicy 'agent.eni-guard.io'") || !strings.Contains(err.Error(), c.refused)):
			t.Errorf("Kubernetes %s: %s: got %v, want %q", s.version, c.name, err, c.refused)
		}
	}
	for _, name := range []string{"own", "other"} {
		if _, err := s.CoreV1().Nodes().Get(t.Context(), name, metav1.GetOptions{}); err != nil {
			t.Errorf("Kubernetes %s: %v", s.version, err)
		}
	}
}

// installAgentPolicy installs the chart's policy for the account of the agents, and what binds it.
func (s *apiServer) installAgentPolicy(t *testing.T) {
	t.Helper()
	installed := 0
	for _, document := range templateChart(t, s.version) {
		var head metav1.PartialObjectMetadata
		if err := yaml.Unmarshal(document, &head); err != nil {
			t.Fatal(err)
		}
		if head.Name != "agent.eni-guard.io" {
			continue
		}
		content, err := yaml.ToJSON(document)
		if err != nil {
			t.Fatal(err)
		}
		switch head.Kind {
		case "ValidatingAdmissionPolicy":
			var policy admissionregistrationv1.ValidatingAdmissionPolicy
			if err = json.Unmarshal(content, &policy); err == nil {
				_, err = s.AdmissionregistrationV1().ValidatingAdmissionPolicies().Create(t.Context(), &policy, metav1.CreateOptions{})
			}
		case "ValidatingAdmissionPolicyBinding":
			var binding admissionregistrationv1.ValidatingAdmissionPolicyBinding
			if err = json.Unmarshal(content, &binding); err == nil {
				_, err = s.AdmissionregistrationV1().ValidatingAdmissionPolicyBindings().Create(t.Context(), &binding, metav1.CreateOptions{})
			}
		}
		if err != nil {
			t.Fatal(err)
		}
		installed++
	}
	if installed != 2 {
		t.Fatalf("the chart has %d objects of the agents' policy for Kubernetes %s, not a policy and a binding", installed, s.version)
	}
}
