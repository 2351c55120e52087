package webhook

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"time"

	"github.com/go-logr/logr"
	admissionv1 "k8s.io/api/admission/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

const (
	// ReviewPath is where the API server sends AdmissionReviews about removals of pods.
	ReviewPath = "/force-delete"

	// maxReviewBytes bounds a review: an object in etcd has 1.5 MiB at most, and a review may hold two.
	maxReviewBytes = 8 << 20
	// responseMargin is how much earlier than the API server gives up the answer must be on its way.
	responseMargin = time.Second
)

// Handler returns the transport: it reads an AdmissionReview, and writes the answer to it with the request's UID. What
// is not an AdmissionReview of admission.k8s.io/v1 is answered with 4xx; one that this webhook was not made for, with
// a refusal of code 400.
func (g *Guard) Handler(log logr.Logger) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		review, status, err := readReview(w, r)
		if err != nil {
			log.Info("refused a request that is not an AdmissionReview", "caller", r.RemoteAddr, "status", status, "reason", err.Error())
			http.Error(w, err.Error(), status)
			return
		}
		ctx, cancel := withDeadline(r)
		defer cancel()
		response, err := g.review(ctx, log, review.Request)
		if err != nil {
			log.Info("refused a review this webhook is not made for", "caller", r.RemoteAddr, "request", review.Request.UID, "reason", err.Error())
			response = &admissionv1.AdmissionResponse{Result: &metav1.Status{
				Status: metav1.StatusFailure, Code: http.StatusBadRequest, Reason: metav1.StatusReasonBadRequest, Message: err.Error(),
			}}
		}
		response.UID = review.Request.UID
		w.Header().Set("Content-Type", "application/json")
		if err := json.NewEncoder(w).Encode(admissionv1.AdmissionReview{TypeMeta: review.TypeMeta, Response: response}); err != nil {
			log.Info("could not send an answer", "caller", r.RemoteAddr, "request", review.Request.UID, "reason", err.Error())
		}
	})
}

// readReview reads the body of a request; status is the HTTP status that goes with an error.
func readReview(w http.ResponseWriter, r *http.Request) (review *admissionv1.AdmissionReview, status int, err error) {
	if r.Method != http.MethodPost {
		return nil, http.StatusMethodNotAllowed, fmt.Errorf("method %s is not POST", r.Method)
	}
	if media, _, err := mime.ParseMediaType(r.Header.Get("Content-Type")); err != nil || media != "application/json" {
		return nil, http.StatusUnsupportedMediaType, fmt.Errorf("content type %q is not application/json", r.Header.Get("Content-Type"))
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxReviewBytes))
	if err != nil {
		var tooLarge *http.MaxBytesError
		if errors.As(err, &tooLarge) {
			return nil, http.StatusRequestEntityTooLarge, fmt.Errorf("the body is larger than %d bytes", tooLarge.Limit)
		}
		return nil, http.StatusBadRequest, fmt.Errorf("the body could not be read: %w", err)
	}
	review = &admissionv1.AdmissionReview{}
	if err := json.Unmarshal(body, review); err != nil {
		return nil, http.StatusBadRequest, fmt.Errorf("the body is not an AdmissionReview: %w", err)
	}
	switch {
	case review.APIVersion != admissionv1.SchemeGroupVersion.String() || review.Kind != "AdmissionReview":
		return nil, http.StatusBadRequest, fmt.Errorf("the body is %q of %q, not AdmissionReview of %q", review.Kind, review.APIVersion, admissionv1.SchemeGroupVersion)
	case review.Request == nil:
		return nil, http.StatusBadRequest, errors.New("the AdmissionReview has no request")
	case review.Request.UID == "":
		return nil, http.StatusBadRequest, errors.New("the request of the AdmissionReview has no UID")
	}
	return review, http.StatusOK, nil
}

// withDeadline ends the work early enough for the answer to reach the API server, which sends the webhook's
// timeoutSeconds as the query parameter "timeout" (k8s.io/apiserver pkg/admission/plugin/webhook/validating,
// callHook).
func withDeadline(r *http.Request) (context.Context, context.CancelFunc) {
	timeout, err := time.ParseDuration(r.URL.Query().Get("timeout"))
	if err != nil || timeout <= 0 {
		return context.WithCancel(r.Context())
	}
	return context.WithTimeout(r.Context(), max(timeout-responseMargin, timeout/2))
}
