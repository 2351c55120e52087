package webhook

import (
	"testing"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
)

func TestExempt(t *testing.T) {
	for _, test := range []struct {
		name   string
		pod    *corev1.Pod
		grace  *int64
		user   string
		groups []string
		want   Reason // empty: the node is asked
	}{
		{"a forced delete by a person", runningPod(), new(int64(0)), "alice", nil, ""},
		{"a graceful delete", runningPod(), new(int64(30)), "alice", nil, ReasonNotForced},
		{"the kubelet of the pod's node", runningPod(), new(int64(0)), "system:node:node-a", []string{"system:nodes"}, ReasonOwnKubelet},
		{"the kubelet of another node", runningPod(), new(int64(0)), "system:node:node-b", []string{"system:nodes"}, ""},
		{"somebody of that name outside the group", runningPod(), new(int64(0)), "system:node:node-a", nil, ""},
		{"the pod garbage collector", runningPod(), new(int64(0)), "system:serviceaccount:kube-system:pod-garbage-collector", nil, ""},
		{"a pod that was never scheduled", runningPod(unscheduled), new(int64(0)), "alice", nil, ReasonNotScheduled},
		{"a pod on the host's network", runningPod(func(p *corev1.Pod) { p.Spec.HostNetwork = true }), new(int64(0)), "alice", nil, ReasonHostNetwork},
		{"a mirror pod", runningPod(func(p *corev1.Pod) { p.Annotations = map[string]string{corev1.MirrorPodAnnotationKey: "x"} }), new(int64(0)), "alice", nil, ReasonMirrorPod},
		{"a finished pod", runningPod(phase(corev1.PodSucceeded)), nil, "alice", nil, ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			got, ok := exempt(&removal{path: PathDelete, pod: test.pod, grace: test.grace, user: authenticationv1.UserInfo{Username: test.user, Groups: test.groups}})
			if got != test.want || ok != (test.want != "") {
				t.Errorf("got %q, %v, want %q", got, ok, test.want)
			}
		})
	}
}
