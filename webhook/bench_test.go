package webhook

import (
	"context"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/go-logr/logr"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/eni-guard/eni-guard/internal/sandbox"
)

// cacheOfOne is a cache that has one node and one namespace, as cheap to read as the real one.
type cacheOfOne struct{ client.Reader }

func (cacheOfOne) Get(_ context.Context, _ client.ObjectKey, object client.Object, _ ...client.GetOption) error {
	switch object := object.(type) {
	case *corev1.Node:
		*object = *nodeA()
	case *metav1.PartialObjectMetadata:
		object.Name = "shop"
	}
	return nil
}

// discardedEvents takes Events and drops them.
type discardedEvents struct{}

func (discardedEvents) Eventf(runtime.Object, runtime.Object, string, string, string, string, ...any) {
}

// One review from body to body on one core (-cpu 1), without the network and without the agent's part; the aim of
// docs/design.md is over 2,000 a second. A pod of 10 containers, with an answer of 6 findings where it is bound.
func BenchmarkReview(b *testing.B) {
	pod := runningPod(func(p *corev1.Pod) {
		for range 9 {
			p.Spec.Containers = append(p.Spec.Containers, corev1.Container{Name: "sidecar", Image: "registry.example.com/sidecar:1", Args: []string{"--verbose", "--port=8080"}})
		}
	})
	for name, findings := range map[string][]sandbox.Finding{"released": nil, "bound": stuck()} {
		b.Run(name, func(b *testing.B) {
			guard := newGuard(finds(findings...))
			guard.cached, guard.live = cacheOfOne{}, cacheOfOne{}
			guard.events = discardedEvents{}
			handler := guard.Handler(logr.Discard())
			body := reviewBody(b, deleteRequest(b, pod, new(int64(0))))
			b.ReportAllocs()
			for b.Loop() {
				request := httptest.NewRequestWithContext(b.Context(), http.MethodPost, ReviewPath+"?timeout=10s", strings.NewReader(body))
				request.Header.Set("Content-Type", "application/json")
				recorder := httptest.NewRecorder()
				handler.ServeHTTP(recorder, request)
				if recorder.Code != http.StatusOK {
					b.Fatal(recorder.Body)
				}
			}
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "reviews/s")
		})
	}
}
