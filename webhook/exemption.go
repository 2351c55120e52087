package webhook

import (
	"slices"

	corev1 "k8s.io/api/core/v1"
)

// exemption is a reason for which no agent is asked and the request is allowed.
type exemption struct {
	reason  Reason
	applies func(*removal) bool
}

// exemptions in the order they are tried; the first that applies is the reason that is reported.
//
// Whom it would hurt if one were missing: the kubelet could never finish a pod; a node's static pods and the scheduler's
// pending ones could not be cleaned up. (The guard's own namespace, and those with mode off, never reach the webhook:
// namespaceSelector in the chart.)
var exemptions = []exemption{
	{ReasonNotForced, func(r *removal) bool { return r.effect() != removesObject }},
	// Sent only after every container has stopped and StopPodSandbox has succeeded (kubelet: SyncTerminatingPod).
	{ReasonOwnKubelet, func(r *removal) bool {
		return r.user.Username == "system:node:"+r.pod.Spec.NodeName && slices.Contains(r.user.Groups, "system:nodes")
	}},
	{ReasonNotScheduled, func(r *removal) bool { return r.pod.Spec.NodeName == "" }},
	{ReasonHostNetwork, func(r *removal) bool { return r.pod.Spec.HostNetwork }},
	// The object only mirrors a static pod of the node: it comes back by itself.
	{ReasonMirrorPod, func(r *removal) bool { _, mirror := r.pod.Annotations[corev1.MirrorPodAnnotationKey]; return mirror }},
}

// exempt returns the reason why nothing has to be asked about a removal.
func exempt(r *removal) (Reason, bool) {
	for _, e := range exemptions {
		if e.applies(r) {
			return e.reason, true
		}
	}
	return "", false
}
