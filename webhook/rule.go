package webhook

import corev1 "k8s.io/api/core/v1"

// effect is what a request does to a pod, if nothing stands against it: neither a disruption budget nor dry run.
type effect string

const (
	// changesNothing means: the pod stays as it is, terminating already and with more or as much time as is asked for.
	changesNothing effect = "changes nothing"
	// startsDeletion means: the pod is told to end, or to end sooner, and its kubelet removes the object afterwards.
	startsDeletion effect = "starts a graceful deletion"
	// removesObject means: the object goes at once, or as soon as its finalizers do, without a word from its kubelet.
	removesObject effect = "removes the object now"
)

// effectOn says what a delete does to a pod. grace is the period asked for in seconds, nil when none is. It is the same for
// DELETE of one pod, of a collection, and for an eviction, which deletes with the options that it carries. It mirrors
// BeforeDelete (k8s.io/apiserver pkg/registry/rest/delete.go) with the pods' CheckGracefulDelete (kubernetes
// pkg/registry/core/pod/strategy.go):
//
//   - A pod that is terminating goes at once when its own grace period is 0 or unset already, whatever is asked for,
//     or when 0 is asked for. Its phase and its node do not matter any more. A shorter period is taken over, and any
//     other changes nothing.
//   - Any other pod goes at once when it has no node, when it is in a terminal phase, or when the grace period asked
//     for is 0; where none is asked for, terminationGracePeriodSeconds counts, and unset means 0.
//
// Negative periods count as 1. The same rule, as CEL, is in the chart's matchConditions; conformance_test.go holds both
// against real API servers.
func effectOn(pod *corev1.Pod, grace *int64) effect {
	if pod.DeletionTimestamp != nil {
		own := pod.DeletionGracePeriodSeconds
		switch {
		case own == nil || *own == 0 || grace != nil && *grace == 0:
			return removesObject
		case grace != nil && atLeastOne(*grace) < *own:
			return startsDeletion
		}
		return changesNothing
	}
	if pod.Spec.NodeName == "" || terminal(pod) {
		return removesObject
	}
	if grace == nil {
		grace = pod.Spec.TerminationGracePeriodSeconds
	}
	if grace == nil || *grace == 0 {
		return removesObject
	}
	return startsDeletion
}

func atLeastOne(grace int64) int64 {
	if grace < 0 {
		return 1
	}
	return grace
}

// terminal says whether the pod has ended for good.
func terminal(pod *corev1.Pod) bool {
	return pod.Status.Phase == corev1.PodFailed || pod.Status.Phase == corev1.PodSucceeded
}
