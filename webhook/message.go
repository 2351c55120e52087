package webhook

import (
	"fmt"
	"slices"
	"strings"

	"github.com/eni-guard/eni-guard/internal/sandbox"
)

// runbook is where every refusal is explained; each reason has a section of its own.
const runbook = "https://github.com/eni-guard/eni-guard/blob/main/docs/runbook.md#"

var runbookSections = map[Reason]string{
	ReasonBound:       "the-pod-is-still-on-its-node",
	ReasonNoAnswer:    "the-agent-gives-no-answer",
	ReasonProbeFailed: "the-agent-could-not-look-everywhere",
}

// message is what a refused person reads: what is still there, what to do now, and where to read more. Three lines.
func message(r *removal, d decision) string {
	return strings.Join([]string{finding(r, d), advice(r, d), "More: " + runbook + runbookSections[d.reason]}, "\n")
}

// finding is the first line: what is known, in plain words.
func finding(r *removal, d decision) string {
	pod := r.pod.Namespace + "/" + r.pod.Name
	if d.reason != ReasonBound {
		return fmt.Sprintf("cannot tell whether pod %s is still alive on node %s: %s.", pod, r.pod.Spec.NodeName, strings.Join(failures(d), "; "))
	}
	text := fmt.Sprintf("pod %s is still alive on node %s: %s", pod, r.pod.Spec.NodeName, d.report.Findings[0])
	var where []string
	if id := firstSandbox(d.report.Findings); id != "" && d.report.Findings[0].Kind != sandbox.SandboxReady {
		where = append(where, "sandbox "+sandbox.ShortID(id))
	}
	if ips := heldAddresses(d.report.Findings); ips != "" {
		where = append(where, "address "+ips+" still in use")
	}
	if len(where) > 0 {
		text += "; " + strings.Join(where, ", ")
	}
	return text + "."
}

// advice is the second line: the next step that is safe.
func advice(r *removal, d decision) string {
	var steps []string
	if d.reason == ReasonBound {
		steps = append(steps, "Removing the pod now would free its address while it is in use.")
		switch {
		case r.pod.DeletionTimestamp != nil:
			steps = append(steps, "It is being deleted already and goes by itself as soon as its node has let go of it.")
		case terminal(r.pod):
			// For the API server every delete of such a pod is a forced one, --now too.
			steps = append(steps, "It has finished, and its node is about to let go of it: try again in a moment.")
		default:
			steps = append(steps, fmt.Sprintf("Use `kubectl delete pod %s -n %s --now`: the pod then goes as soon as its node has let go of it.", r.pod.Name, r.pod.Namespace))
		}
		// Any process is in state D for moments; one that was told to end and still is, is stuck.
		if p := d.report.Findings[0].Process; p != nil && p.Uninterruptible() && r.pod.DeletionTimestamp != nil {
			steps = append(steps, "No signal ends a process in state D: what it waits for must be mended, or the node rebooted.")
		}
		return strings.Join(steps, " ")
	}
	return fmt.Sprintf("An address that may be in use is not given away. Look at the agent: `kubectl get pods -A -l app.kubernetes.io/name=eni-guard,"+
		"app.kubernetes.io/component=agent --field-selector spec.nodeName=%s`; then try again.", r.pod.Spec.NodeName)
}

func firstSandbox(findings []sandbox.Finding) string {
	for _, f := range findings {
		if f.Sandbox != "" {
			return f.Sandbox
		}
	}
	return ""
}

// heldAddresses lists the addresses that are still on an interface, each once.
func heldAddresses(findings []sandbox.Finding) string {
	var ips []string
	for _, f := range findings {
		if f.Kind == sandbox.IPAssigned && !slices.Contains(ips, f.IP.String()) {
			ips = append(ips, f.IP.String())
		}
	}
	return strings.Join(ips, ", ")
}
