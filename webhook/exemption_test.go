package webhook

import (
	"testing"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
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
		{"a pod that Terway has ignored since its creation", ignoredPod(0), new(int64(0)), "alice", nil, ReasonIgnoredByTerway},
		{"a pod that Terway was told to ignore later", ignoredPod(time.Minute), new(int64(0)), "alice", nil, ""},
		{"a finished pod", runningPod(phase(corev1.PodSucceeded)), nil, "alice", nil, ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			got, ok := exempt(&removal{path: PathDelete, pod: test.pod, grace: test.grace, user: authenticationv1.UserInfo{Username: test.user, Groups: test.groups}}, surroundings{mode: ModeDeny})
			if got != test.want || ok != (test.want != "") {
				t.Errorf("got %q, %v, want %q", got, ok, test.want)
			}
		})
	}
}

func ignoredPod(later time.Duration) *corev1.Pod {
	return runningPod(func(p *corev1.Pod) {
		p.Labels = map[string]string{IgnoreLabel: "true"}
		p.CreationTimestamp = metav1.NewTime(testTime)
		p.ManagedFields = []metav1.ManagedFieldsEntry{
			{Manager: "kubelet", Time: new(metav1.NewTime(testTime.Add(time.Hour))), FieldsV1: metav1.NewFieldsV1(`{"f:status":{"f:phase":{}}}`)},
			{Manager: "kubectl", Time: new(metav1.NewTime(testTime.Add(later))), FieldsV1: metav1.NewFieldsV1(`{"f:metadata":{"f:labels":{"f:k8s.aliyun.com/ignore-by-terway":{}}}}`)},
		}
	})
}

func TestExemptBySurroundings(t *testing.T) {
	forced := &removal{path: PathDelete, pod: runningPod(), grace: new(int64(0))}
	graceful := &removal{path: PathDelete, pod: runningPod(), grace: new(int64(30))}
	for _, test := range []struct {
		name    string
		removal *removal
		s       surroundings
		want    Reason
	}{
		{"mode off", forced, surroundings{mode: ModeOff}, ReasonModeOff},
		{"mode off, a graceful delete", graceful, surroundings{mode: ModeOff}, ReasonNotForced},
		{"mode audit", forced, surroundings{mode: ModeAudit}, ""},
		{"mode hold", forced, surroundings{mode: ModeHold}, ""},
		{"a node without an agent", forced, surroundings{mode: ModeDeny, excludedNode: true}, ReasonExcludedNode},
	} {
		if got, _ := exempt(test.removal, test.s); got != test.want {
			t.Errorf("%s: got %q, want %q", test.name, got, test.want)
		}
	}
}

// Only a pod that was created with the label never had an address of Terway's; when in doubt, the node is asked.
func TestIgnoredSinceCreation(t *testing.T) {
	for name, test := range map[string]struct {
		pod  *corev1.Pod
		want bool
	}{
		"created with it":                      {ignoredPod(0), true},
		"within the second of the creation":    {ignoredPod(time.Second), true},
		"added later":                          {ignoredPod(2 * time.Second), false},
		"it does not say who has written what": {runningPod(func(p *corev1.Pod) { p.Labels = map[string]string{IgnoreLabel: "true"} }), false},
		"another value":                        {func() *corev1.Pod { p := ignoredPod(0); p.Labels[IgnoreLabel] = "false"; return p }(), false},
		"without it":                           {runningPod(), false},
		"written by somebody without any time": {func() *corev1.Pod { p := ignoredPod(0); p.ManagedFields[1].Time = nil; return p }(), false},
		"created with it, and written once more": {func() *corev1.Pod {
			p := ignoredPod(0)
			p.ManagedFields = append(p.ManagedFields, ignoredPod(time.Hour).ManagedFields[1])
			return p
		}(), false},
	} {
		if got := ignoredSinceCreation(test.pod); got != test.want {
			t.Errorf("%s: got %v", name, got)
		}
	}
}
