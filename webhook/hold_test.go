package webhook

import (
	"context"
	"encoding/json"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"
)

// Every change names the pod by its UID, so that the API server refuses it for another pod of that name; and what must not
// overwrite a change in between names the version that was read.
func TestChangesAreMadeToTheVeryPod(t *testing.T) {
	var metadata struct {
		UID, ResourceVersion string
		Finalizers           []string
	}
	h := holder{fake.NewClientBuilder().WithInterceptorFuncs(interceptor.Funcs{
		Patch: func(_ context.Context, _ client.WithWatch, object client.Object, patch client.Patch, _ ...client.PatchOption) error {
			body, err := patch.Data(object)
			if err != nil {
				return err
			}
			metadata.UID, metadata.ResourceVersion = "", ""
			return json.Unmarshal(body, &struct{ Metadata any }{&metadata})
		},
	}).Build()}
	pod := runningPod(changed("7"))
	for name, test := range map[string]struct {
		change  func() error
		version string
	}{
		"hold":    {func() error { return h.hold(t.Context(), pod, "because", testTime) }, ""},
		"explain": {func() error { return h.explain(t.Context(), pod, "because") }, ""},
		"label":   {func() error { return h.label(t.Context(), pod) }, ""},
		"free":    {func() error { return h.free(t.Context(), pod) }, "7"},
		"free, whatever has changed": {func() error {
			return h.free(t.Context(), runningPod(func(p *corev1.Pod) { p.ResourceVersion = "" }))
		}, ""},
	} {
		if err := test.change(); err != nil || metadata.UID != string(pod.UID) || metadata.ResourceVersion != test.version {
			t.Errorf("%s: for UID %q, version %q (%v)", name, metadata.UID, metadata.ResourceVersion, err)
		}
	}
}

// A finalizer without what the controller finds the pod by would never be taken away.
func TestAFinalizerOfUnknownOriginIsTakenOver(t *testing.T) {
	pod := runningPod(terminating(new(int64(30))), keptBy(Finalizer))
	guard, stored := holding(t, pod, stuck()...)
	response := reviewed(t, guard, nil, deleteRequest(t, pod, new(int64(0))))
	if now := stored(); !response.Allowed || now.Labels[HeldLabel] != "true" || now.Annotations[HeldSinceAnnotation] == "" {
		t.Errorf("allowed %v, labels %v, annotations %v", response.Allowed, now.Labels, now.Annotations)
	}
}
