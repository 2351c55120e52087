package agent

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"
)

// metadataOf is a pod as the API server gives it to somebody who asks for metadata alone.
func metadataOf(uid string, annotations map[string]string) metav1.PartialObjectMetadata {
	return metav1.PartialObjectMetadata{
		TypeMeta: metav1.TypeMeta{APIVersion: "meta.k8s.io/v1", Kind: "PartialObjectMetadata"},
		ObjectMeta: metav1.ObjectMeta{
			Namespace: "shop", Name: "pod-" + uid, UID: types.UID(uid), ResourceVersion: "1", Annotations: annotations,
			Labels: map[string]string{"a": "b"}, ManagedFields: []metav1.ManagedFieldsEntry{{Manager: "kubelet"}},
		},
	}
}

// Pods are known by the UID that the node has them by, from the cache and live, and by metadata alone.
func TestPodsOfTheNode(t *testing.T) {
	removed := make(chan struct{})
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		switch {
		case r.URL.Path == "/api/v1/nodes/node-a":
			writeJSON(w, http.StatusOK, metadataOf("n", nil))
		case r.URL.Path == "/api/v1/nodes/gone":
			writeJSON(w, http.StatusNotFound, metav1.Status{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Status"}, Status: metav1.StatusFailure, Reason: metav1.StatusReasonNotFound, Code: http.StatusNotFound})
		case r.URL.Path != "/api/v1/pods" || r.URL.Query().Get("fieldSelector") != "spec.nodeName=node-a" || !strings.Contains(r.Header.Get("Accept"), "as=PartialObjectMetadata"):
			writeJSON(w, http.StatusForbidden, metav1.Status{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Status"}, Status: metav1.StatusFailure, Reason: metav1.StatusReasonForbidden, Code: http.StatusForbidden})
		case r.URL.Query().Get("sendInitialEvents") != "": // which not every API server knows
			writeJSON(w, http.StatusUnprocessableEntity, metav1.Status{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Status"}, Status: metav1.StatusFailure, Reason: metav1.StatusReasonInvalid, Code: http.StatusUnprocessableEntity})
		case r.URL.Query().Get("watch") != "":
			pod := metadataOf("short", nil)
			for _, kind := range []string{"ADDED", "DELETED"} {
				_ = json.NewEncoder(w).Encode(map[string]any{"type": kind, "object": pod})
			}
			w.(http.Flusher).Flush()
			<-r.Context().Done()
		default:
			writeJSON(w, http.StatusOK, metav1.PartialObjectMetadataList{
				TypeMeta: metav1.TypeMeta{APIVersion: "meta.k8s.io/v1", Kind: "PartialObjectMetadataList"}, ListMeta: metav1.ListMeta{ResourceVersion: "1"},
				Items: []metav1.PartialObjectMetadata{
					metadataOf(podUID, map[string]string{"big": strings.Repeat("x", 1000)}),
					metadataOf("mirror", map[string]string{corev1.MirrorPodAnnotationKey: "0a1b2c3d4e5f60718293a4b5c6d7e8f9"}),
				},
			})
		}
	}))
	t.Cleanup(func() { server.CloseClientConnections(); server.Close() })
	pods, err := newNodePods(&rest.Config{Host: server.URL}, "node-a")
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	if err := pods.watch(ctx, func() { close(removed) }); err != nil {
		t.Fatal(err)
	}
	<-removed // the watch has told of a pod that has gone
	stop()
	want := map[string]bool{podUID: true, "0a1b2c3d4e5f60718293a4b5c6d7e8f9": true, "mirror": false, "short": false, otherUID: false}
	live, err := pods.live(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for uid, known := range want {
		if pods.known(uid) != known || live[uid] != known {
			t.Errorf("%s: from the cache %v, live %v, want %v", uid, pods.known(uid), live[uid], known)
		}
	}
	for _, object := range pods.informer.GetStore().List() {
		if pod := object.(*metav1.PartialObjectMetadata); len(pod.Labels) > 0 || len(pod.ManagedFields) > 0 || pod.Annotations["big"] != "" {
			t.Errorf("the cache keeps %+v", pod)
		}
	}
	if err := pods.nodeExists(t.Context()); err != nil {
		t.Error(err)
	}
	for node, want := range map[string]string{"gone": "the API server has no node gone", "refused": "whether it has the node could not be read"} {
		pods.node = node
		if err := pods.nodeExists(t.Context()); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("node %s: %v", node, err)
		}
		if known, err := pods.live(t.Context()); err == nil || len(known) > 0 || !strings.Contains(err.Error(), fmt.Sprintf("listing the pods of node %s: ", node)) {
			t.Errorf("node %s: %v (%v)", node, known, err)
		}
	}
}
