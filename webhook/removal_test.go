package webhook

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	admissionv1 "k8s.io/api/admission/v1"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
)

// runningPod is a pod as most are: scheduled, running, with an address.
func runningPod(change ...func(*corev1.Pod)) *corev1.Pod {
	grace := int64(30)
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "web-0", UID: "0e0d5ce6-6a6c-4c5b-9f6c-111111111111"},
		Spec: corev1.PodSpec{
			NodeName: "node-a", TerminationGracePeriodSeconds: &grace, Containers: []corev1.Container{{Name: "app"}},
		},
		Status: corev1.PodStatus{Phase: corev1.PodRunning, PodIP: "10.1.2.3", PodIPs: []corev1.PodIP{{IP: "10.1.2.3"}, {IP: "fd00::3"}}},
	}
	for _, f := range change {
		f(pod)
	}
	return pod
}

func terminating(grace *int64) func(*corev1.Pod) {
	return func(pod *corev1.Pod) {
		now := metav1.NewTime(time.Unix(1700000000, 0))
		pod.DeletionTimestamp, pod.DeletionGracePeriodSeconds = &now, grace
	}
}

func phase(phase corev1.PodPhase) func(*corev1.Pod) {
	return func(pod *corev1.Pod) { pod.Status.Phase = phase }
}

func ownGrace(grace *int64) func(*corev1.Pod) {
	return func(pod *corev1.Pod) { pod.Spec.TerminationGracePeriodSeconds = grace }
}

func unscheduled(pod *corev1.Pod) { pod.Spec.NodeName = "" }

// deleteRequest is what the API server sends for DELETE of a pod.
func deleteRequest(t testing.TB, pod *corev1.Pod, grace *int64) *admissionv1.AdmissionRequest {
	t.Helper()
	object, err := json.Marshal(pod)
	if err != nil {
		t.Fatal(err)
	}
	options, err := json.Marshal(metav1.DeleteOptions{GracePeriodSeconds: grace})
	if err != nil {
		t.Fatal(err)
	}
	return &admissionv1.AdmissionRequest{
		UID:       "705ab4f5-6393-11e8-b7cc-42010a800002",
		Operation: admissionv1.Delete,
		Resource:  metav1.GroupVersionResource{Version: "v1", Resource: "pods"},
		Namespace: pod.Namespace,
		Name:      pod.Name,
		UserInfo:  authenticationv1.UserInfo{Username: "alice", Groups: []string{"system:authenticated"}},
		OldObject: runtime.RawExtension{Raw: object},
		Options:   runtime.RawExtension{Raw: options},
	}
}

func TestRemovalOf(t *testing.T) {
	request := deleteRequest(t, runningPod(), new(int64(0)))
	request.DryRun = new(true)
	r, err := removalOf(request)
	if err != nil {
		t.Fatal(err)
	}
	if r.path != PathDelete || !r.dryRun || r.user.Username != "alice" || r.pod.Name != "web-0" || r.grace == nil || *r.grace != 0 {
		t.Errorf("got %+v", r)
	}
	if got := fmt.Sprint(query(r.pod)); got != "{node-a shop web-0 0e0d5ce6-6a6c-4c5b-9f6c-111111111111 [10.1.2.3 fd00::3]}" {
		t.Errorf("query %s", got)
	}
	request.Name = ""
	if r, err = removalOf(request); err != nil || r.path != PathCollection || r.pod.Name != "web-0" {
		t.Errorf("a collection delete: got %+v, %v", r, err)
	}
}

func TestRemovalOfIncompleteRequests(t *testing.T) {
	for _, test := range []struct {
		name   string
		change func(*admissionv1.AdmissionRequest)
		want   string
	}{
		{"another operation", func(r *admissionv1.AdmissionRequest) { r.Operation = admissionv1.Create }, "CREATE pods/ is none of DELETE pods"},
		{"another resource", func(r *admissionv1.AdmissionRequest) { r.Resource.Resource = "nodes" }, `resource "nodes"`},
		{"a subresource", func(r *admissionv1.AdmissionRequest) { r.SubResource = "eviction" }, "DELETE pods/eviction is none of"},
		{"no old object", func(r *admissionv1.AdmissionRequest) { r.OldObject.Raw = nil }, "oldObject is missing"},
		{"an old object that is no JSON", func(r *admissionv1.AdmissionRequest) { r.OldObject.Raw = []byte("{") }, "oldObject is not a pod"},
		{"an old object of another shape", func(r *admissionv1.AdmissionRequest) { r.OldObject.Raw = []byte(`{"spec":7}`) }, "oldObject is not a pod"},
		{"an old object without identity", func(r *admissionv1.AdmissionRequest) { r.OldObject.Raw = []byte(`{}`) }, "without a name, a namespace or a UID"},
		{"options of another shape", func(r *admissionv1.AdmissionRequest) { r.Options.Raw = []byte(`{"gracePeriodSeconds":"x"}`) }, "options are not DeleteOptions"},
	} {
		t.Run(test.name, func(t *testing.T) {
			request := deleteRequest(t, runningPod(), nil)
			test.change(request)
			if _, err := removalOf(request); err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("got error %v, want one with %q", err, test.want)
			}
		})
	}
}

func TestContainersSuffice(t *testing.T) {
	marked, graceful := terminating(new(int64(0))), terminating(new(int64(30)))
	for _, test := range []struct {
		name string
		path Path
		pod  *corev1.Pod
		want bool
	}{
		{"finished", PathDelete, ended(), true},
		{"running", PathDelete, runningPod(), false},
		{"evicted", PathEviction, ended(), true},
		{"label", PathIgnoreLabel, ended(), false},
		{"held", PathDelete, ended(keptBy(Finalizer)), false},
		{"being deleted", PathDelete, ended(graceful), false},
		{"a later step", PathDelete, ended(marked), true},
		{"a later step, of a collection", PathCollection, ended(marked), true},
		{"an eviction has no later step", PathEviction, ended(marked), false},
		{"no later step comes where somebody's finalizer keeps it", PathDelete, ended(marked, keptBy("example.com/keep")), false},
		{"nor where the guard's does", PathFinalizer, ended(marked, keptBy(Finalizer)), false},
	} {
		r := &removal{path: test.path, pod: test.pod}
		if got := r.containersSuffice(); got != test.want {
			t.Errorf("%s: got %v, want %v", test.name, got, test.want)
		}
	}
}

func TestContainersTerminated(t *testing.T) {
	ended := corev1.ContainerStatus{State: corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{}}}
	running := corev1.ContainerStatus{State: corev1.ContainerState{Running: &corev1.ContainerStateRunning{}}}
	for _, test := range []struct {
		name     string
		statuses []corev1.ContainerStatus
		init     []corev1.ContainerStatus
		phase    corev1.PodPhase
		want     bool
	}{
		{"all ended", []corev1.ContainerStatus{ended, ended}, []corev1.ContainerStatus{ended}, corev1.PodSucceeded, true},
		{"one runs", []corev1.ContainerStatus{ended, running}, []corev1.ContainerStatus{ended}, corev1.PodFailed, false},
		{"one is not reported", []corev1.ContainerStatus{ended}, []corev1.ContainerStatus{ended}, corev1.PodFailed, false},
		{"one is reported without a state", []corev1.ContainerStatus{ended, {}}, []corev1.ContainerStatus{ended}, corev1.PodFailed, false},
		{"an init container that stays, as a sidecar, runs", []corev1.ContainerStatus{ended, ended}, []corev1.ContainerStatus{running}, corev1.PodFailed, false},
		{"the phase alone says nothing", nil, nil, corev1.PodFailed, false},
		{"between two starts of its containers", []corev1.ContainerStatus{ended, ended}, []corev1.ContainerStatus{ended}, corev1.PodRunning, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			pod := runningPod(phase(test.phase))
			pod.Spec.Containers = make([]corev1.Container, 2)
			pod.Spec.InitContainers = make([]corev1.Container, 1)
			pod.Status.ContainerStatuses, pod.Status.InitContainerStatuses = test.statuses, test.init
			if got := containersTerminated(pod); got != test.want {
				t.Errorf("got %v, want %v", got, test.want)
			}
		})
	}
	last := runningPod(terminating(new(int64(30))))
	last.Status.ContainerStatuses = []corev1.ContainerStatus{ended}
	if containersTerminated(last) {
		t.Error("a pod that is being deleted, and has not finished, counts as terminated: its sandbox may be stuck")
	}
	debugged := runningPod(phase(corev1.PodFailed), func(p *corev1.Pod) { p.Spec.EphemeralContainers = make([]corev1.EphemeralContainer, 1) })
	debugged.Status.ContainerStatuses = []corev1.ContainerStatus{ended}
	debugged.Status.EphemeralContainerStatuses = []corev1.ContainerStatus{running}
	if containersTerminated(debugged) {
		t.Error("a pod with a running ephemeral container counts as terminated")
	}
	if containersTerminated(&corev1.Pod{Status: corev1.PodStatus{Phase: corev1.PodFailed}}) {
		t.Error("a pod without containers counts as terminated")
	}
}
