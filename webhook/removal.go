package webhook

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	admissionv1 "k8s.io/api/admission/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/eni-guard/eni-guard/internal/sandbox"
)

// Path is the way in by which a pod is removed; the values are those of the audit annotation "path".
type Path string

const (
	// PathDelete is DELETE of one pod by name.
	PathDelete Path = "delete"
	// PathCollection is DELETE of many pods: the API server calls once a pod, with an empty name in the request.
	PathCollection Path = "collection"
)

// removal is what one admission call is about.
type removal struct {
	path   Path
	dryRun bool
	user   string
	groups []string
	pod    *corev1.Pod
	// grace is the grace period that the caller asks for, in seconds; nil when none is asked for. For a single DELETE
	// the API server has replaced it by the effective one.
	grace *int64
}

// removalOf reads the facts out of an admission request. It fails on anything but a DELETE of pods that is complete.
func removalOf(request *admissionv1.AdmissionRequest) (*removal, error) {
	if request.Operation != admissionv1.Delete {
		return nil, fmt.Errorf("operation %q is not DELETE", request.Operation)
	}
	if r := request.Resource; r.Group != "" || r.Version != "v1" || r.Resource != "pods" || request.SubResource != "" {
		return nil, fmt.Errorf("resource %q of group %q, version %q, subresource %q is not pods of v1", r.Resource, r.Group, r.Version, request.SubResource)
	}
	if len(request.OldObject.Raw) == 0 {
		return nil, errors.New("oldObject is missing: it must hold the pod")
	}
	r := &removal{
		path:   PathDelete,
		dryRun: request.DryRun != nil && *request.DryRun,
		user:   request.UserInfo.Username,
		groups: request.UserInfo.Groups,
		pod:    &corev1.Pod{},
	}
	if err := json.Unmarshal(request.OldObject.Raw, r.pod); err != nil {
		return nil, fmt.Errorf("oldObject is not a pod: %w", err)
	}
	if r.pod.Name == "" || r.pod.Namespace == "" || r.pod.UID == "" {
		return nil, errors.New("oldObject is a pod without a name, a namespace or a UID")
	}
	if request.Name == "" {
		r.path = PathCollection
	}
	if len(request.Options.Raw) > 0 {
		var options metav1.DeleteOptions
		if err := json.Unmarshal(request.Options.Raw, &options); err != nil {
			return nil, fmt.Errorf("options are not DeleteOptions: %w", err)
		}
		r.grace = options.GracePeriodSeconds
	}
	return r, nil
}

// removesNow says whether a delete takes the object out of the API server at once, instead of leaving that to the
// kubelet. It mirrors BeforeDelete (k8s.io/apiserver pkg/registry/rest/delete.go) with the pods' CheckGracefulDelete
// (kubernetes pkg/registry/core/pod/strategy.go):
//
//   - A pod that is terminating goes at once when its own grace period is 0 or unset already, whatever is asked for,
//     or when 0 is asked for. Its phase and its node do not matter any more.
//   - Any other pod goes at once when it has no node, when it is in a terminal phase, or when the grace period asked
//     for is 0; where none is asked for, terminationGracePeriodSeconds counts, and unset means 0.
//
// Negative periods count as 1. The same rule, as CEL, is in the matchConditions of the chart.
func removesNow(pod *corev1.Pod, grace *int64) bool {
	if pod.DeletionTimestamp != nil {
		own := pod.DeletionGracePeriodSeconds
		return own == nil || *own == 0 || grace != nil && *grace == 0
	}
	if pod.Spec.NodeName == "" || terminal(pod) {
		return true
	}
	if grace == nil {
		grace = pod.Spec.TerminationGracePeriodSeconds
	}
	return grace == nil || *grace == 0
}

// terminal says whether the pod has ended for good.
func terminal(pod *corev1.Pod) bool {
	return pod.Status.Phase == corev1.PodFailed || pod.Status.Phase == corev1.PodSucceeded
}

// query is what an agent is asked about the pod.
func (r *removal) query() sandbox.Query {
	return sandbox.Query{
		Node: r.pod.Spec.NodeName, Namespace: r.pod.Namespace, Name: r.pod.Name, UID: string(r.pod.UID), IPs: podIPs(r.pod),
	}
}

// podIPs returns the addresses in the pod's status, without those that are not addresses.
func podIPs(pod *corev1.Pod) []netip.Addr {
	var ips []netip.Addr
	for _, entry := range append([]corev1.PodIP{{IP: pod.Status.PodIP}}, pod.Status.PodIPs...) {
		if ip, err := netip.ParseAddr(entry.IP); err == nil && !slices.Contains(ips, ip.Unmap()) {
			ips = append(ips, ip.Unmap())
		}
	}
	return ips
}

// containersTerminated says whether the kubelet has reported every container of the pod, of every kind, terminated, and
// will start none again. The phase alone does not say so, because controllers write phases too; the containers alone
// neither, because between two starts of a container it is terminated as well.
func containersTerminated(pod *corev1.Pod) bool {
	if !terminal(pod) && pod.DeletionTimestamp == nil {
		return false
	}
	statuses := slices.Concat(pod.Status.InitContainerStatuses, pod.Status.ContainerStatuses, pod.Status.EphemeralContainerStatuses)
	expected := len(pod.Spec.InitContainers) + len(pod.Spec.Containers) + len(pod.Spec.EphemeralContainers)
	return expected > 0 && len(statuses) == expected &&
		!slices.ContainsFunc(statuses, func(s corev1.ContainerStatus) bool { return s.State.Terminated == nil })
}
