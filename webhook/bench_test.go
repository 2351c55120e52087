package webhook

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/go-logr/logr"

	"github.com/eni-guard/eni-guard/internal/sandbox"
)

// One review from body to body, without the network and without the agent's part.
func BenchmarkReview(b *testing.B) {
	for name, findings := range map[string][]sandbox.Finding{"released": nil, "bound": stuck()} {
		b.Run(name, func(b *testing.B) {
			handler := newGuard(finds(findings...), nodeA()).Handler(logr.Discard())
			body := reviewBody(b, deleteRequest(b, runningPod(), new(int64(0))))
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
		})
	}
}
