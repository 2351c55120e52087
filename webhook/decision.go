package webhook

import "github.com/eni-guard/eni-guard/internal/sandbox"

// Outcome is what happens to a request; the values are those of the audit annotation "decision". The zero value is no
// decision, and is answered as a refusal.
type Outcome string

const (
	// Allowed means: the pod's node was asked, and the pod may go.
	Allowed Outcome = "allowed"
	// Exempt means: nothing was asked, and the request is none of the guard's business.
	Exempt Outcome = "exempt"
	// Denied means: the pod stays.
	Denied Outcome = "denied"
)

// Mode is what the guard does about a removal it does not want; the value is that of the audit annotation "mode".
type Mode string

// ModeDeny refuses the request.
const ModeDeny Mode = "deny"

// Reason is why, in one word, for programs; the values are those of the audit annotation "reason".
type Reason string

// Reasons of exemptions.
const (
	ReasonNotForced    Reason = "NotForced"
	ReasonOwnKubelet   Reason = "OwnKubelet"
	ReasonNotScheduled Reason = "NotScheduled"
	ReasonHostNetwork  Reason = "HostNetwork"
	ReasonMirrorPod    Reason = "MirrorPod"
)

// Reasons of decisions.
const (
	// ReasonReleased means: every probe ran, and nothing of the pod is left on its node.
	ReasonReleased Reason = "SandboxReleased"
	// ReasonBound means: something of the pod is still on its node.
	ReasonBound Reason = "SandboxBound"
	// ReasonNoAnswer means: the agent of the node did not answer, or not as an agent does.
	ReasonNoAnswer Reason = "NoAnswer"
	// ReasonProbeFailed means: the agent answered that it could not look everywhere.
	ReasonProbeFailed Reason = "ProbeFailed"
	// ReasonNodeGone means: there is no Node object any more, so there is nobody to ask and no address to reuse.
	ReasonNodeGone Reason = "NodeGone"
	// ReasonNodeOutOfService means: somebody has vouched, by the out-of-service taint, that the node is shut down.
	ReasonNodeOutOfService Reason = "NodeOutOfService"
	// ReasonContainersTerminated means: nobody answers, but the kubelet has reported every container of the pod terminated.
	ReasonContainersTerminated Reason = "ContainersTerminated"
)

// evidence is everything a decision rests on.
type evidence struct {
	// report is the agent's answer; the zero Report, which is Unknown, where there is none.
	report sandbox.Report
	// failure says, in words, why there is no answer.
	failure string
	// nodeGone and nodeOutOfService are what the API server says of the pod's node.
	nodeGone, nodeOutOfService bool
	// containersTerminated is what the kubelet has reported of the pod.
	containersTerminated bool
}

// decision is the answer to one removal.
type decision struct {
	outcome Outcome
	mode    Mode
	verdict sandbox.Verdict
	reason  Reason
	evidence
}

// decide is the table of decisions: a pure function of what was found. A finding always refuses. Not knowing refuses
// too, except where somebody other than the agent has answered for the pod.
func decide(e evidence) decision {
	d := decision{outcome: Denied, mode: ModeDeny, verdict: e.report.Verdict(), evidence: e}
	switch {
	case d.verdict == sandbox.Released:
		d.outcome, d.reason = Allowed, ReasonReleased
	case d.verdict == sandbox.Bound:
		d.reason = ReasonBound
	case e.nodeGone:
		d.outcome, d.reason = Allowed, ReasonNodeGone
	case e.nodeOutOfService:
		d.outcome, d.reason = Allowed, ReasonNodeOutOfService
	case e.containersTerminated:
		d.outcome, d.reason = Allowed, ReasonContainersTerminated
	case e.failure != "":
		d.reason = ReasonNoAnswer
	default:
		d.reason = ReasonProbeFailed
	}
	return d
}

// exemptDecision is the decision about a removal that no agent is asked about.
func exemptDecision(reason Reason) decision {
	return decision{outcome: Exempt, mode: ModeDeny, verdict: sandbox.NotAsked, reason: reason}
}
