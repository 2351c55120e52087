package observer

import "time"

// Verdict is what the removal of an object comes to.
type Verdict string

const (
	// Clean means: nothing of the pod was left when its object was gone.
	Clean Verdict = "nothing was left"
	// Violation means: something was left, and nothing allowed that.
	Violation Verdict = "VIOLATION"
	// Control means: something was left, in a namespace where the guard does not stand in the way.
	Control Verdict = "would have been a violation"
	// Overridden means: something was left, and somebody who may has said that it goes all the same.
	Overridden Verdict = "authorised override"
	// RecordLost means: something was left, the API server was killed before it could write down who has removed the object, and the
	// pod had an override that was in force.
	RecordLost Verdict = "override on it, record lost"
	// ByKubelet means: something was left, and the kubelet of the node has said that the sandbox is gone. The guard is not asked.
	ByKubelet Verdict = "the kubelet's own"
	// ByContainers means: something was left of a finished pod, whose kubelet had reported every container terminated, while the
	// agent could not tell.
	ByContainers Verdict = "finished, agent silent"
	// FailedOpen means: something was left, and it was a plain eviction while no webhook answered.
	FailedOpen Verdict = "eviction that failed open"
	// CameUp means: the kubelet started the pod after its object was gone, or after the request that took it away had come.
	CameUp Verdict = "started after it was let go"
	// NotLookedAt means: no look was made after the removal.
	NotLookedAt Verdict = "NOT LOOKED AT"
)

// Record is what the API server's audit log says of how an object went.
type Record struct {
	// Guarded says that the namespace's mode is deny or hold.
	Guarded bool
	// Received and Completed are when the request that took the object away came and was answered; zero if no request is known to
	// have done so alone.
	Received, Completed time.Time
	// ByKubelet says that it was a delete of the node's own kubelet.
	ByKubelet bool
	// Override says that a user with the right has deleted it while its override, with a reason, had not ended.
	Override bool
	// Lost says that the API server was killed when it would have written down who has removed the object.
	Lost bool
	// Reason is the guard's, of what it has let through.
	Reason string
	// FailedOpen says that a plain eviction has gone through without an answer of the webhook.
	FailedOpen bool
}

// Explained says whether something was left for a reason that is no fault of the guard's, so that an address in use may be free.
func (v Verdict) Explained() bool { return v != Clean && v != Violation && v != NotLookedAt && v != "" }

// Judge says what a removal comes to.
func Judge(r Removal, record Record) Verdict {
	letGo, gone := r.SeenAt, r.SeenAt
	if !record.Completed.IsZero() && record.Completed.Before(gone) {
		letGo, gone = record.Received, record.Completed
	}
	switch {
	case !r.Judged:
		return NotLookedAt
	case r.CameUpAfter(letGo):
		return CameUp
	case !r.BoundAt(gone):
		return Clean
	case !record.Guarded:
		return Control
	case record.Override:
		return Overridden
	case record.Lost && inForce(r, r.SeenAt):
		return RecordLost
	case record.ByKubelet:
		return ByKubelet
	case record.Reason == "ContainersTerminated":
		return ByContainers
	case record.FailedOpen:
		return FailedOpen
	default:
		return Violation
	}
}
