package webhook

import (
	"fmt"
	"slices"

	"github.com/eni-guard/eni-guard/internal/sandbox"
)

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
	// Held means: the pod may be marked for removal, and its object is kept by Finalizer until its node has let go of it.
	Held Outcome = "held"
	// Audited means: the pod goes, though it should not, because the mode says so.
	Audited Outcome = "audited"
	// Overridden means: the pod goes, though it may be bound, because somebody who has the right to says so.
	Overridden Outcome = "overridden"
)

// allows says whether the API server may go on with the request.
func (o Outcome) allows() bool { return o != Denied && o != "" }

// Mode is what the guard does about a removal it does not want; the values are those of the namespace label ModeLabel and
// of the audit annotation "mode".
type Mode string

const (
	// ModeDeny refuses the request.
	ModeDeny Mode = "deny"
	// ModeHold lets the pod be marked and keeps its object; what cannot be held is refused.
	ModeHold Mode = "hold"
	// ModeAudit lets the request through, and says and records what it would have refused.
	ModeAudit Mode = "audit"
	// ModeOff leaves the pods of the namespace alone.
	ModeOff Mode = "off"
)

// ModeLabel is the label of a namespace that picks the mode for its pods.
const ModeLabel = "eni-guard.io/mode"

// parseMode reads a mode as people write it.
func parseMode(text string) (Mode, error) {
	switch mode := Mode(text); mode {
	case ModeDeny, ModeHold, ModeAudit, ModeOff:
		return mode, nil
	}
	return "", fmt.Errorf("%q is not a mode: use deny, hold, audit or off", text)
}

// Reason is why, in one word, for programs; the values are those of the audit annotation "reason".
type Reason string

// Reasons of exemptions.
const (
	ReasonNotForced       Reason = "NotForced"
	ReasonOwnKubelet      Reason = "OwnKubelet"
	ReasonNotScheduled    Reason = "NotScheduled"
	ReasonHostNetwork     Reason = "HostNetwork"
	ReasonMirrorPod       Reason = "MirrorPod"
	ReasonIgnoredByTerway Reason = "IgnoredByTerway"
	ReasonExcludedNode    Reason = "ExcludedNode"
	ReasonModeOff         Reason = "ModeOff"
	// ReasonPodUnreadable means: the pod of an eviction could not be read. One that asks for grace period 0 is refused.
	ReasonPodUnreadable Reason = "PodUnreadable"
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
	// ReasonOverride means: the pod has an override, and who removes it has the right to one.
	ReasonOverride Reason = "Override"
	// ReasonNoSuchPod means: the pod of an eviction is not there.
	ReasonNoSuchPod Reason = "NoSuchPod"
	// ReasonHoldFailed means: the pod was to be held, and the finalizer could not be added.
	ReasonHoldFailed Reason = "HoldFailed"
)

// evidence is what was found out about a pod.
type evidence struct {
	// report is the agent's answer; the zero Report, which is Unknown, where there is none.
	report sandbox.Report
	// failure says, in words, why there is no answer.
	failure string
	// nodeGone and nodeOutOfService are what the API server says of the pod's node.
	nodeGone, nodeOutOfService bool
	// containersTerminated is what the kubelet has reported of the pod, where that is enough: removal.containersSuffice.
	containersTerminated bool
}

// situation is everything a decision rests on.
type situation struct {
	mode Mode
	evidence
	override override
	// holdable says that Finalizer would keep the pod: it is there, or can still be added.
	holdable bool
}

// decision is the answer to one removal.
type decision struct {
	outcome Outcome
	verdict sandbox.Verdict
	reason  Reason
	// holdFailure says why the finalizer could not be added: ReasonHoldFailed.
	holdFailure string
	situation
}

// decide is the table of decisions: a pure function of what was found. Not knowing counts as much as a finding, except
// where somebody other than the agent has answered for the pod. docs/design.md has the table; keep both the same.
func decide(s situation) decision {
	d := decision{verdict: s.report.Verdict(), situation: s}
	d.reason = d.judge()
	switch {
	case s.override.authorised:
		d.outcome, d.reason = Overridden, ReasonOverride
	case mayGo(d.reason):
		d.outcome = Allowed
	case s.mode == ModeAudit:
		d.outcome = Audited
	case s.mode == ModeHold && s.holdable:
		d.outcome = Held
	default:
		d.outcome = Denied
	}
	return d
}

// judge says what is known about the pod, in one word.
func (d decision) judge() Reason {
	switch {
	case d.verdict == sandbox.Released:
		return ReasonReleased
	case d.verdict == sandbox.Bound:
		return ReasonBound
	case d.nodeGone:
		return ReasonNodeGone
	case d.nodeOutOfService:
		return ReasonNodeOutOfService
	case d.containersTerminated:
		return ReasonContainersTerminated
	case d.failure != "":
		return ReasonNoAnswer
	default:
		return ReasonProbeFailed
	}
}

// mayGo lists the reasons for which a pod goes in every mode.
func mayGo(reason Reason) bool {
	return slices.Contains([]Reason{ReasonReleased, ReasonNodeGone, ReasonNodeOutOfService, ReasonContainersTerminated}, reason)
}

// exemptDecision is the decision about a removal that no agent is asked about.
func exemptDecision(mode Mode, reason Reason) decision {
	return decision{outcome: Exempt, verdict: sandbox.NotAsked, reason: reason, situation: situation{mode: mode}}
}
