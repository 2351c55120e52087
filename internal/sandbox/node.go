package sandbox

const (
	// OrphanedCondition is the type of the node condition by which an agent says what is left on its node of pods that the API
	// server no longer has. True: there is something, which the message names; False: the agent has looked everywhere and found
	// nothing; Unknown: it could not look everywhere. Only a node's own agent writes it.
	OrphanedCondition = "OrphanedSandbox"
	// OrphanedTaint is the key of the taint that a node carries while OrphanedCondition is True, if the chart's value
	// taintOrphanedNodes says so. It has no value, and the effect NoSchedule: an address that was released is reused on its own
	// node only, so a node without new pods gives it to nobody. The webhook's leader writes it, no agent does.
	OrphanedTaint = "eni-guard.io/orphaned-sandbox"
)
