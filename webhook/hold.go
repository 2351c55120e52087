package webhook

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	"github.com/go-logr/logr"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

const (
	// HeldLabel is on every held pod, with the value "true", so that the controller can watch those alone.
	HeldLabel = "eni-guard.io/held"
	// HeldSinceAnnotation is when the pod was first held, in RFC 3339.
	HeldSinceAnnotation = "eni-guard.io/held-since"
	// HeldAddressesAnnotation lists the addresses that the pod had then, with commas between them.
	HeldAddressesAnnotation = "eni-guard.io/held-addresses"
	// HeldBecauseAnnotation is what was last found of the pod on its node, for people.
	HeldBecauseAnnotation = "eni-guard.io/held-because"

	// freeDelay lets the API server end the request that an override allows before the pod goes: a DELETE of an object that
	// has just gone would be answered with an error.
	freeDelay = 500 * time.Millisecond
	// freeTimeout bounds one call to the API server that is not part of a review.
	freeTimeout = 10 * time.Second
)

// holder keeps and frees the objects of pods.
type holder struct{ client client.Client }

// hold adds Finalizer to a pod, from within the admission call: the API server then finds the object changed, reads it
// again, and marks it without removing it. It fails for a pod that is being deleted by now, or is another one.
func (h holder) hold(ctx context.Context, pod *corev1.Pod, because string, now time.Time) error {
	return h.patch(ctx, pod, map[string]any{
		"uid":        pod.UID,
		"finalizers": []string{Finalizer},
		"labels":     map[string]any{HeldLabel: "true"},
		"annotations": map[string]any{
			HeldSinceAnnotation: now.UTC().Format(time.RFC3339), HeldBecauseAnnotation: because, HeldAddressesAnnotation: addressWords(podIPs(pod)),
		},
	})
}

// explain brings up to date why a pod is held.
func (h holder) explain(ctx context.Context, pod *corev1.Pod, because string) error {
	return h.patch(ctx, pod, map[string]any{"uid": pod.UID, "annotations": map[string]any{HeldBecauseAnnotation: because}})
}

// label makes a held pod visible to the controller.
func (h holder) label(ctx context.Context, pod client.Object) error {
	return h.patch(ctx, pod, map[string]any{"uid": pod.GetUID(), "labels": map[string]any{HeldLabel: "true"}})
}

// free takes Finalizer, and what goes with it, from a pod as it was read. A pod that is marked for removal, and has no other
// finalizer, is gone with it. That the pod is gone already is an error of its own (apierrors.IsNotFound), and so is that it has changed
// since it was read (apierrors.IsConflict).
func (h holder) free(ctx context.Context, pod client.Object) error {
	metadata := map[string]any{
		"uid":                                 pod.GetUID(),
		"$deleteFromPrimitiveList/finalizers": []string{Finalizer},
		"labels":                              map[string]any{HeldLabel: nil},
		"annotations":                         map[string]any{HeldSinceAnnotation: nil, HeldBecauseAnnotation: nil, HeldAddressesAnnotation: nil},
	}
	if version := pod.GetResourceVersion(); version != "" {
		metadata["resourceVersion"] = version
	}
	return h.patch(ctx, pod, metadata)
}

// freeSoon frees a pod after the request that is being answered, if the pod that live has carries the same override. So whoever can
// reach the webhook's port, but not change the pod, frees nothing by a review of his own. Should it fail, the pod stays held, and the
// removal can be asked for again.
func (h holder) freeSoon(log logr.Logger, live client.Reader, pod *corev1.Pod) {
	time.AfterFunc(freeDelay, func() {
		ctx, cancel := context.WithTimeout(context.Background(), freeTimeout)
		defer cancel()
		log = log.WithValues("namespace", pod.Namespace, "pod", pod.Name, "podUID", pod.UID)
		switch err := h.freeOverridden(ctx, live, pod); {
		case apierrors.IsNotFound(err): // it is gone already
		case err != nil:
			log.Error(err, "could not free an overridden pod; delete it again, if it is still there")
		default:
			log.Info("freed a held pod", "reason", ReasonOverride)
		}
	})
}

func (h holder) freeOverridden(ctx context.Context, live client.Reader, pod *corev1.Pod) error {
	now := &metav1.PartialObjectMetadata{}
	now.SetGroupVersionKind(corev1.SchemeGroupVersion.WithKind("Pod"))
	if err := live.Get(ctx, client.ObjectKeyFromObject(pod), now); err != nil {
		return err
	}
	for _, key := range []string{OverrideAnnotation, OverrideUntilAnnotation} {
		if now.Annotations[key] != pod.Annotations[key] {
			return fmt.Errorf("its annotation %s is %q, and not %q as in the review", key, now.Annotations[key], pod.Annotations[key])
		}
	}
	anyVersion := &corev1.Pod{}
	anyVersion.Namespace, anyVersion.Name, anyVersion.UID = pod.Namespace, pod.Name, pod.UID
	return h.free(ctx, anyVersion)
}

func (h holder) patch(ctx context.Context, pod client.Object, metadata map[string]any) error {
	body, err := json.Marshal(map[string]any{"metadata": metadata})
	if err != nil {
		return err
	}
	target := &corev1.Pod{}
	target.Namespace, target.Name = pod.GetNamespace(), pod.GetName()
	if err := h.client.Patch(ctx, target, client.RawPatch(types.StrategicMergePatchType, body)); err != nil {
		return fmt.Errorf("changing pod %s/%s: %w", target.Namespace, target.Name, err)
	}
	return nil
}
