package webhook

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	admissionv1 "k8s.io/api/admission/v1"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/eni-guard/eni-guard/internal/sandbox"
)

const (
	// Finalizer keeps the object of a held pod in the API server.
	Finalizer = "eni-guard.io/sandbox-in-use"
	// IgnoreLabel with the value "true" tells Terway to leave a pod alone; from v1.16.6 it frees the address of a pod
	// that is given it later.
	IgnoreLabel = "k8s.aliyun.com/ignore-by-terway"
)

// Path is the way in by which a pod, or its address, is taken away; the values are those of the audit annotation
// "path".
type Path string

const (
	// PathDelete is DELETE of one pod by name.
	PathDelete Path = "delete"
	// PathCollection is DELETE of many pods: the API server calls once a pod, with an empty name in the request.
	PathCollection Path = "collection"
	// PathEviction is CREATE of pods/eviction. The removal that follows makes no call of its own.
	PathEviction Path = "eviction"
	// PathIgnoreLabel is an UPDATE that adds IgnoreLabel to a pod that was created without it.
	PathIgnoreLabel Path = "ignore-label"
	// PathFinalizer is an UPDATE that takes Finalizer from a pod that is marked for removal: with the last finalizer the
	// API server removes such a pod, and makes no DELETE call.
	PathFinalizer Path = "finalizer"
	// PathPhase is an UPDATE that writes a terminal phase. It is only ever reported on, never refused.
	PathPhase Path = "terminal-phase"
)

// removal is what one admission call is about.
type removal struct {
	path   Path
	dryRun bool
	user   authenticationv1.UserInfo
	// pod is the pod before the request; of an eviction only namespace and name, until it has been read.
	pod *corev1.Pod
	// grace is the grace period that the caller asks for, in seconds; nil when none is asked for. For a single DELETE
	// the API server has replaced it by the effective one.
	grace *int64
}

// removalOf reads the facts out of an admission request. It fails on one that is incomplete, and on one that is none of
// those that the webhook configurations ask for: DELETE of pods, CREATE of pods/eviction, UPDATE of pods or pods/status.
func removalOf(request *admissionv1.AdmissionRequest) (*removal, error) {
	r := &removal{
		dryRun: request.DryRun != nil && *request.DryRun,
		user:   request.UserInfo,
		pod:    &corev1.Pod{},
	}
	if res := request.Resource; res.Group != "" || res.Version != "v1" || res.Resource != "pods" {
		return nil, fmt.Errorf("resource %q of group %q, version %q is not pods of v1", res.Resource, res.Group, res.Version)
	}
	switch on := string(request.Operation) + " pods/" + request.SubResource; on {
	case "DELETE pods/":
		return r, r.readDelete(request)
	case "CREATE pods/eviction":
		return r, r.readEviction(request)
	case "UPDATE pods/", "UPDATE pods/status":
		return r, r.readUpdate(request)
	default:
		return nil, fmt.Errorf("%s is none of DELETE pods, CREATE pods/eviction, UPDATE pods, UPDATE pods/status", on)
	}
}

func (r *removal) readDelete(request *admissionv1.AdmissionRequest) error {
	r.path = PathDelete
	if request.Name == "" {
		r.path = PathCollection
	}
	if len(request.Options.Raw) > 0 {
		var options metav1.DeleteOptions
		if err := json.Unmarshal(request.Options.Raw, &options); err != nil {
			return fmt.Errorf("options are not DeleteOptions: %w", err)
		}
		r.grace = options.GracePeriodSeconds
	}
	return readPod("oldObject", request.OldObject.Raw, r.pod)
}

// readEviction reads an Eviction of policy/v1 or policy/v1beta1, which have the same fields. Its own deleteOptions may ask
// for dry run where the request does not.
func (r *removal) readEviction(request *admissionv1.AdmissionRequest) error {
	r.path = PathEviction
	if len(request.Object.Raw) == 0 {
		return errors.New("object is missing: it must hold the Eviction")
	}
	var eviction policyv1.Eviction
	if err := json.Unmarshal(request.Object.Raw, &eviction); err != nil {
		return fmt.Errorf("object is not an Eviction: %w", err)
	}
	r.pod.Namespace, r.pod.Name = request.Namespace, request.Name
	if r.pod.Name == "" {
		r.pod.Name = eviction.Name
	}
	if r.pod.Namespace == "" || r.pod.Name == "" {
		return errors.New("the Eviction does not name a pod and its namespace")
	}
	if options := eviction.DeleteOptions; options != nil {
		r.grace = options.GracePeriodSeconds
		r.dryRun = r.dryRun || len(options.DryRun) > 0
	}
	return nil
}

func (r *removal) readUpdate(request *admissionv1.AdmissionRequest) error {
	after := &corev1.Pod{}
	if err := errors.Join(readPod("oldObject", request.OldObject.Raw, r.pod), readPod("object", request.Object.Raw, after)); err != nil {
		return err
	}
	switch {
	case !ignored(r.pod) && ignored(after):
		r.path = PathIgnoreLabel
	case slices.Contains(r.pod.Finalizers, Finalizer) && !slices.Contains(after.Finalizers, Finalizer):
		r.path = PathFinalizer
	case !terminal(r.pod) && terminal(after):
		r.path = PathPhase
	default:
		return errors.New("the UPDATE takes nothing from the pod that the guard watches: neither its address, by the label " +
			IgnoreLabel + ", nor the finalizer " + Finalizer + ", nor its phase")
	}
	return nil
}

// readPod reads a pod of an admission request; field is where it stands there.
func readPod(field string, raw []byte, pod *corev1.Pod) error {
	if len(raw) == 0 {
		return fmt.Errorf("%s is missing: it must hold the pod", field)
	}
	if err := json.Unmarshal(raw, pod); err != nil {
		return fmt.Errorf("%s is not a pod: %w", field, err)
	}
	if pod.Name == "" || pod.Namespace == "" || pod.UID == "" {
		return fmt.Errorf("%s is a pod without a name, a namespace or a UID", field)
	}
	return nil
}

// effect is what the request does to the pod.
func (r *removal) effect() effect {
	switch r.path {
	case PathIgnoreLabel:
		// The object stays, and its address goes.
		return removesObject
	case PathFinalizer:
		// Unless the pod is marked with grace period 0, its kubelet still has the last word.
		if own := r.pod.DeletionGracePeriodSeconds; r.pod.DeletionTimestamp != nil && (own == nil || *own == 0) {
			return removesObject
		}
		return changesNothing
	case PathPhase:
		return changesNothing
	default:
		return effectOn(r.pod, r.grace)
	}
}

// holdable says whether Finalizer keeps the pod from what the request does: it is there already, or can still be added.
// The API server takes no new finalizer for an object that is being deleted.
func (r *removal) holdable() bool {
	removes := r.path == PathDelete || r.path == PathCollection || r.path == PathEviction
	return removes && (held(r.pod) || r.pod.DeletionTimestamp == nil)
}

// mustAddFinalizer says whether a held pod must be given the finalizer in this call. What the API server has read of the
// pod is what it goes on with, or it asks again; so a pod that has the finalizer there needs nothing, also in a
// later call of the same removal, and one that has lost it needs it again. An eviction reads the pod later: there the
// finalizer is added, or confirmed, in every call, so that the controller cannot take it away in between.
func (r *removal) mustAddFinalizer() bool {
	// The label is what the controller finds the pod by. A finalizer that came with a template or from a person has none.
	unknown := r.pod.Labels[HeldLabel] != "true" || r.pod.Annotations[HeldSinceAnnotation] == ""
	return !held(r.pod) || unknown || r.path == PathEviction && r.pod.DeletionTimestamp == nil
}

// containersSuffice says whether what the kubelet has reported of the containers is enough where the agent cannot tell. It says
// nothing of the sandbox, so it is enough only to let a finished pod be cleaned up: not to give up one that is held because
// it was bound, nor one that is being deleted, which its kubelet removes by itself when the sandbox is gone, unless this is a later step of
// its removal; and an address is never freed by a label for it.
func (r *removal) containersSuffice() bool {
	return r.path != PathIgnoreLabel && (r.pod.DeletionTimestamp == nil || r.mayBeLaterStep()) && !held(r.pod) && containersTerminated(r.pod)
}

// mayBeLaterStep says whether the pod is marked for removal at once, and nothing keeps its object. Then this may be a later call of the removal
// that has marked it, of which the calls before have reached another replica, which has let it through. A refusal would protect nothing,
// because the next update of any kind removes such an object (k8s.io/apiserver pkg/registry/generic/registry/store.go,
// ShouldDeleteDuringUpdate). An eviction is one call.
func (r *removal) mayBeLaterStep() bool {
	own := r.pod.DeletionGracePeriodSeconds
	return r.path != PathEviction && r.pod.DeletionTimestamp != nil && own != nil && *own == 0 && len(r.pod.Finalizers) == 0
}

// query is what an agent is asked about the pod.
func query(pod *corev1.Pod) sandbox.Query {
	return sandbox.Query{Node: pod.Spec.NodeName, Namespace: pod.Namespace, Name: pod.Name, UID: string(pod.UID), IPs: podIPs(pod)}
}

// podIPs returns the addresses in the pod's status, without those that are not addresses, and those that it had when it was
// held: the kubelet takes addresses out of the status of a pod before they are free.
func podIPs(pod *corev1.Pod) []netip.Addr {
	texts := []string{pod.Status.PodIP}
	for _, entry := range pod.Status.PodIPs {
		texts = append(texts, entry.IP)
	}
	texts = append(texts, strings.Split(pod.Annotations[HeldAddressesAnnotation], ",")...)
	var ips []netip.Addr
	for _, text := range texts {
		if ip, err := netip.ParseAddr(text); err == nil && !slices.Contains(ips, ip.Unmap()) {
			ips = append(ips, ip.Unmap())
		}
	}
	return ips
}

// addressWords joins addresses as annotations have them.
func addressWords(ips []netip.Addr) string {
	texts := make([]string, 0, len(ips))
	for _, ip := range ips {
		texts = append(texts, ip.String())
	}
	return strings.Join(texts, ",")
}

// ignored says whether Terway leaves the pod alone.
func ignored(pod *corev1.Pod) bool { return pod.Labels[IgnoreLabel] == "true" }

// held says whether the pod's object is kept by the guard.
func held(pod *corev1.Pod) bool { return slices.Contains(pod.Finalizers, Finalizer) }

// containersTerminated says whether the pod is finished, and the kubelet has reported every container of it, of every kind,
// terminated. The phase alone does not say so, because controllers write phases too; the containers alone neither, because
// between two starts of a container it is terminated as well.
func containersTerminated(pod *corev1.Pod) bool {
	if !terminal(pod) {
		return false
	}
	statuses := slices.Concat(pod.Status.InitContainerStatuses, pod.Status.ContainerStatuses, pod.Status.EphemeralContainerStatuses)
	expected := len(pod.Spec.InitContainers) + len(pod.Spec.Containers) + len(pod.Spec.EphemeralContainers)
	return expected > 0 && len(statuses) == expected &&
		!slices.ContainsFunc(statuses, func(s corev1.ContainerStatus) bool { return s.State.Terminated == nil })
}
