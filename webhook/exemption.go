package webhook

import (
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
)

// surroundings are the facts about a removal that its request does not hold.
type surroundings struct {
	mode Mode
	// excludedNode says that the pod's node is one of those without an agent.
	excludedNode bool
}

// exemption is a reason for which no agent is asked and the request is allowed.
type exemption struct {
	reason  Reason
	applies func(*removal, surroundings) bool
}

// exemptions in the order they are tried; the first that applies is the reason that is reported.
//
// Whom it would hurt if one were missing: the kubelet could never finish a pod; a node's static pods, the scheduler's
// pending ones and those of virtual nodes could not be cleaned up. (The guard's own namespace, and those with mode off,
// never reach the webhook: namespaceSelector in the chart.)
var exemptions = []exemption{
	{ReasonNotForced, func(r *removal, _ surroundings) bool { return r.effect() != removesObject }},
	// Sent only after every container has stopped and StopPodSandbox has succeeded (kubelet: SyncTerminatingPod).
	{ReasonOwnKubelet, func(r *removal, _ surroundings) bool {
		return r.user.Username == "system:node:"+r.pod.Spec.NodeName && slices.Contains(r.user.Groups, "system:nodes")
	}},
	{ReasonModeOff, func(_ *removal, s surroundings) bool { return s.mode == ModeOff }},
	{ReasonNotScheduled, func(r *removal, _ surroundings) bool { return r.pod.Spec.NodeName == "" }},
	{ReasonHostNetwork, func(r *removal, _ surroundings) bool { return r.pod.Spec.HostNetwork }},
	// The object only mirrors a static pod of the node: it comes back by itself.
	{ReasonMirrorPod, func(r *removal, _ surroundings) bool {
		_, mirror := r.pod.Annotations[corev1.MirrorPodAnnotationKey]
		return mirror
	}},
	// Such a pod never had an address of Terway's.
	{ReasonIgnoredByTerway, func(r *removal, _ surroundings) bool { return ignoredSinceCreation(r.pod) }},
	{ReasonExcludedNode, func(_ *removal, s surroundings) bool { return s.excludedNode }},
}

// exempt returns the reason why nothing has to be asked about a removal.
func exempt(r *removal, s surroundings) (Reason, bool) {
	for _, e := range exemptions {
		if e.applies(r, s) {
			return e.reason, true
		}
	}
	return "", false
}

// ignoredSinceCreation says whether the pod was created with IgnoreLabel. Adding the label later frees an address that
// the pod has, so the label alone says nothing: the owner of the field must not have written after the creation
// (metadata.managedFields; times are whole seconds). A pod that does not tell counts as one that was given it later.
func ignoredSinceCreation(pod *corev1.Pod) bool {
	if !ignored(pod) {
		return false
	}
	found := false
	for _, entry := range pod.ManagedFields {
		if entry.FieldsV1 == nil || !strings.Contains(entry.FieldsV1.GetRawString(), `"f:`+IgnoreLabel+`"`) {
			continue
		}
		if entry.Time == nil || entry.Time.After(pod.CreationTimestamp.Add(time.Second)) {
			return false
		}
		found = true
	}
	return found
}
