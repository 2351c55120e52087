package webhook

import (
	"fmt"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"github.com/eni-guard/eni-guard/internal/sandbox"
)

// runbook is where every refusal is explained; each reason has a section of its own.
const runbook = "https://github.com/eni-guard/eni-guard/blob/main/docs/runbook.md#"

var runbookSections = map[Reason]string{
	ReasonBound:       "the-pod-is-still-on-its-node",
	ReasonNoAnswer:    "the-agent-gives-no-answer",
	ReasonProbeFailed: "the-agent-could-not-look-everywhere",
	ReasonHoldFailed:  "the-pod-could-not-be-held",

	ReasonPodUnreadable: "the-webhook-does-not-answer",
}

// message is what a refused person reads: what is still there, what to do now, how to do it all the same, and where to
// read more. Three lines.
func message(r *removal, d decision) string {
	steps := advice(r, d)
	if d.reason != ReasonPodUnreadable {
		steps = append(steps, overriding(r.pod, d.override))
	}
	return strings.Join([]string{
		finding(r.pod, d),
		strings.Join(steps, " "),
		"More: " + runbook + runbookSections[d.reason],
	}, "\n")
}

// cannotTell starts the finding about a pod of which nothing is known.
const cannotTell = "cannot tell whether pod "

// RefusedVerdict is the verdict that the message of a refusal tells.
func RefusedVerdict(message string) sandbox.Verdict {
	if strings.HasPrefix(message, cannotTell) {
		return sandbox.Unknown
	}
	return sandbox.Bound
}

// finding is what is known of a pod that may not go, in plain words.
func finding(pod *corev1.Pod, d decision) string {
	name := pod.Namespace + "/" + pod.Name
	if d.reason == ReasonPodUnreadable {
		return fmt.Sprintf(cannotTell+"%s is still alive: %s.", name, strings.Join(failures(d), "; "))
	}
	if d.verdict != sandbox.Bound {
		return fmt.Sprintf(cannotTell+"%s is still alive on node %s: %s.", name, pod.Spec.NodeName, strings.Join(failures(d), "; "))
	}
	text := fmt.Sprintf("pod %s is still alive on node %s: %s", name, pod.Spec.NodeName, d.report.Findings[0])
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
	if len(d.report.Conflicts) > 0 {
		text += "; conflict: " + d.report.Conflicts[0].String()
	}
	return text + "."
}

// summary is what is known of any pod.
func summary(pod *corev1.Pod, d decision) string {
	if d.verdict == sandbox.Released || mayGo(d.reason) {
		return fmt.Sprintf("pod %s/%s: %s.", pod.Namespace, pod.Name, goneWords(d, pod.Spec.NodeName))
	}
	return finding(pod, d)
}

// goneWords says why a pod may go.
func goneWords(d decision, node string) string {
	switch d.reason {
	case ReasonNodeGone:
		return "node " + node + " is gone"
	case ReasonNodeOutOfService:
		return "node " + node + " is out of service"
	case ReasonContainersTerminated:
		return "node " + node + " could not be asked, but its kubelet has reported every container terminated"
	default:
		return "nothing of it is left on node " + node
	}
}

// advice is what would happen, and the next step that is safe.
func advice(r *removal, d decision) []string {
	switch d.reason {
	case ReasonHoldFailed:
		return []string{fmt.Sprintf("Its object was to be kept until its node has let go of it, but that failed: %s. Try again.", d.holdFailure)}
	case ReasonPodUnreadable:
		return []string{"An address that may be in use is not given away. Try again."}
	default:
	}
	removing, labelled := "An address that may be in use is not given away.", "which may be in use"
	if d.verdict == sandbox.Bound {
		removing, labelled = "Removing the pod now would free its address while it is in use.", "which is in use"
	}
	var steps []string
	if r.path == PathIgnoreLabel {
		steps = append(steps, fmt.Sprintf("With the label %s=true Terway would free its address, %s. Give the label to pods when they are created.", IgnoreLabel, labelled))
	} else {
		steps = append(append(steps, removing), ending(r, d.report.Findings)...)
	}
	if d.verdict != sandbox.Bound {
		steps = append(steps, lookingAt(r.pod.Spec.NodeName, d.report))
	}
	return steps
}

// lookingAt says what to look at where nobody can tell.
func lookingAt(node string, report sandbox.Report) string {
	silent := func(p sandbox.Probe) bool {
		return p.Name == sandbox.ProbeRuntime && (strings.Contains(p.Error, "no answer") || strings.Contains(p.Error, "connection refused"))
	}
	if len(report.Failures()) == 1 && slices.ContainsFunc(report.Probes, silent) {
		return fmt.Sprintf("The agent of node %s answers, but the container runtime there does not: look at that, which can be started again while pods run; then try again.", node)
	}
	return fmt.Sprintf("Look at the agent: `kubectl get pods -A -l app.kubernetes.io/name=eni-guard,app.kubernetes.io/component=agent "+
		"--field-selector spec.nodeName=%s`; then try again.", node)
}

// ending is how a pod comes to its end that is, or may be, still on its node.
func ending(r *removal, findings []sandbox.Finding) []string {
	pod := r.pod
	var steps []string
	switch {
	case r.path == PathFinalizer:
		steps = append(steps, "The finalizer holds it, and is taken away as soon as its node has let go of it.")
	case pod.DeletionTimestamp != nil:
		steps = append(steps, "It is being deleted already and goes by itself as soon as its node has let go of it"+foreignFinalizers(pod)+".")
	case terminal(pod) && !containersTerminated(pod):
		// Such a pod is not ended by its kubelet, and to the API server every delete of it is a forced one.
		steps = append(steps, "Its phase says that it has finished, but its kubelet has not said so of its containers: somebody else has written the phase, or the kubelet is about to.",
			stopping(findings))
	case terminal(pod):
		// For the API server every delete of such a pod is a forced one, --now too.
		steps = append(steps, fmt.Sprintf("It has finished, and its node is about to let go of it: try again in a moment. If that lasts, the container runtime's log on node %s says why.", pod.Spec.NodeName))
	default:
		steps = append(steps, fmt.Sprintf("Use `kubectl delete pod %s -n %s --now`: the pod then goes as soon as its node has let go of it%s.", pod.Name, pod.Namespace, foreignFinalizers(pod)))
	}
	// Any process is in state D for moments; one that was told to end and still is, is stuck.
	waits := len(findings) > 0 && findings[0].Process != nil && findings[0].Process.Uninterruptible()
	switch {
	case waits && findings[0].Process.Frozen:
		steps = append(steps, "A frozen process does not end before its cgroup is thawed.")
	case waits && pod.DeletionTimestamp != nil:
		steps = append(steps, "No signal ends a process in state D: what it waits for must be mended, or the node rebooted.")
	}
	return steps
}

// foreignFinalizers says what else keeps a pod when it is being deleted; empty when nothing does.
func foreignFinalizers(pod *corev1.Pod) string {
	others := othersFinalizers(pod)
	switch len(others) {
	case 0:
		return ""
	case 1:
		return ", and the finalizer " + others[0] + ", which is not eni-guard's, has been taken from it"
	default:
		return ", and the finalizers " + strings.Join(others, ", ") + ", which are not eni-guard's, have been taken from it"
	}
}

func othersFinalizers(pod *corev1.Pod) []string {
	return slices.DeleteFunc(slices.Clone(pod.Finalizers), func(name string) bool { return name == Finalizer })
}

// overriding says how to remove the pod all the same, or why the override that it has does not count and what to run then.
func overriding(pod *corev1.Pod, o override) string {
	command := fmt.Sprintf("kubectl annotate pod %s -n %s --overwrite %s='WHY'", pod.Name, pod.Namespace, OverrideAnnotation)
	switch o.flaw {
	case flawUntil:
		return fmt.Sprintf("The override on it does not count: %s. Without an end it does: `%s %s-`, then repeat your command.", o.refused, command, OverrideUntilAnnotation)
	case flawReason:
		return fmt.Sprintf("The override on it does not count: %s. With one it does: `%s`, then repeat your command.", o.refused, command)
	case flawRight:
		return fmt.Sprintf("The override on it does not count: %s (`kubectl auth can-i --list -n %s` lists it for those who have it).", o.refused, pod.Namespace)
	default:
		return fmt.Sprintf("To override, with the right `override` on `forcedeletes.eni-guard.io`: `%s`, then repeat your command.", command)
	}
}

// overridesNot says why the override on a pod does not count, where it would have mattered, in words that fit in front of
// what happens instead.
func overridesNot(d decision) string {
	if d.override.refused == "" || d.outcome == Allowed {
		return ""
	}
	return "the override does not count: " + d.override.refused + "; "
}

// warning is what somebody is told whose request goes through although the pod is, or may be, bound.
func warning(r *removal, d decision) string {
	switch d.outcome {
	case Held:
		text := overridesNot(d) + "held until its node has let go of it: " + finding(r.pod, d)
		if others := othersFinalizers(r.pod); len(others) > 0 {
			text += " Also kept by " + strings.Join(others, ", ") + "."
		}
		return text
	case Audited:
		return overridesNot(d) + "eni-guard would refuse this, but only records it: " + finding(r.pod, d)
	case Overridden:
		if d.verdict != sandbox.Released {
			return "overridden: " + summary(r.pod, d)
		}
	case Allowed, Exempt, Denied:
	}
	return ""
}

// stopping is how a sandbox is ended by hand, where it is known.
func stopping(findings []sandbox.Finding) string {
	if id := firstSandbox(findings); id != "" {
		return "To end it, run `crictl stopp " + sandbox.ShortID(id) + "` on its node. Then, or in a moment, try again."
	}
	return "Try again in a moment."
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
