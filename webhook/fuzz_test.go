package webhook

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/go-logr/logr"
	admissionv1 "k8s.io/api/admission/v1"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/validation"
)

// modes are all that a namespace may be in.
var modes = []Mode{ModeDeny, ModeHold, ModeAudit, ModeOff}

// answer sends a body to a guard that has a stuck pod in a namespace of a mode, and returns what came back.
func answer(t *testing.T, mode Mode, body string) *httptest.ResponseRecorder {
	t.Helper()
	guard := newGuard(finds(stuck()...), nodeA(), shop(string(mode)), runningPod())
	guard.access = accessFunc(func(user authenticationv1.UserInfo, _ *corev1.Pod) (bool, error) { return user.Username == "root", nil })
	request := httptest.NewRequestWithContext(t.Context(), http.MethodPost, ReviewPath+"?timeout=10s", strings.NewReader(body))
	request.Header.Set("Content-Type", "application/json")
	recorder := httptest.NewRecorder()
	guard.Handler(logr.Discard()).ServeHTTP(recorder, request)
	return recorder
}

// wellFormed fails the test unless the API server can use a response to the request with this UID.
func wellFormed(t *testing.T, recorder *httptest.ResponseRecorder, request *admissionv1.AdmissionRequest) {
	t.Helper()
	var review admissionv1.AdmissionReview
	if err := json.Unmarshal(recorder.Body.Bytes(), &review); err != nil || recorder.Code != http.StatusOK || review.Response == nil {
		t.Fatalf("got %d %q (%v)", recorder.Code, recorder.Body, err)
	}
	r := review.Response
	if r.UID != request.UID || review.Kind != "AdmissionReview" || review.APIVersion != "admission.k8s.io/v1" {
		t.Errorf("got %s of %s for UID %q, not %q", review.Kind, review.APIVersion, r.UID, request.UID)
	}
	if len(r.Patch) > 0 || r.Allowed == (r.Result != nil) || r.Result != nil && (r.Result.Code < 400 || r.Result.Message == "") {
		t.Errorf("got %+v", r)
	}
	for key, value := range r.AuditAnnotations {
		if errs := validation.IsQualifiedName("force-delete.eni-guard.io/" + key); len(errs) > 0 || !utf8.ValidString(value) {
			t.Errorf("annotation %q: %v, %q", key, errs, value)
		}
	}
	for _, warning := range r.Warnings {
		if len(warning) > maxWarning || !utf8.ValidString(warning) {
			t.Errorf("warning %q", warning)
		}
	}
}

// Whatever arrives, nothing panics: what is an AdmissionReview gets a response with its UID, anything else a 4xx.
func FuzzReview(f *testing.F) {
	stored := runningPod()
	marked := runningPod(terminating(new(int64(0))), keptBy(Finalizer))
	for _, request := range []*admissionv1.AdmissionRequest{
		deleteRequest(f, stored, new(int64(0))), deleteRequest(f, stored, nil),
		evictionRequest(f, stored, &metav1.DeleteOptions{GracePeriodSeconds: new(int64(0))}), evictionRequest(f, stored, nil),
		updateRequest(f, stored, runningPod(ignoring), ""), updateRequest(f, marked, runningPod(terminating(new(int64(0)))), "status"),
		updateRequest(f, stored, runningPod(phase(corev1.PodFailed)), "status"),
	} {
		f.Add(reviewBody(f, request))
	}
	for _, body := range []string{
		"", "{", "null", "[]", "7", `"x"`, `{"kind":"AdmissionReview","apiVersion":"admission.k8s.io/v1"}`,
		`{"kind":"AdmissionReview","apiVersion":"admission.k8s.io/v1","request":{"uid":"u"}}`,
		`{"kind":"AdmissionReview","apiVersion":"admission.k8s.io/v1","request":{"uid":"u","operation":"DELETE","resource":{"version":"v1","resource":"pods"},"oldObject":null}}`,
		`{"kind":"AdmissionReview","apiVersion":"admission.k8s.io/v1","request":{"uid":"u","operation":"CREATE","subResource":"eviction","resource":{"version":"v1","resource":"pods"},"object":{"deleteOptions":{"gracePeriodSeconds":0,"dryRun":["All"]}}}}`,
		`{"kind":"AdmissionReview","apiVersion":"admission.k8s.io/v1beta1","request":{"uid":"u"}}`,
	} {
		f.Add(body)
	}
	f.Fuzz(func(t *testing.T, body string) {
		var review admissionv1.AdmissionReview
		err := json.Unmarshal([]byte(body), &review)
		usable := err == nil && review.Kind == "AdmissionReview" && review.APIVersion == "admission.k8s.io/v1" && review.Request != nil && review.Request.UID != ""
		for _, mode := range modes {
			recorder := answer(t, mode, body)
			if usable {
				wellFormed(t, recorder, review.Request)
			} else if recorder.Code < 400 || recorder.Code > 499 {
				t.Errorf("no AdmissionReview, and answered %d", recorder.Code)
			}
		}
	})
}

// An override counts only if there is a reason, the time has not passed, and the user has the right; whatever the
// annotations hold, the answer can be used.
func FuzzOverride(f *testing.F) {
	for _, reason := range []string{"", " ", "node lost", strings.Repeat("x", 500), strings.Repeat("x", 501), "\x1b[31mred\x00\n", "\xff\xfe", "理由"} {
		for _, until := range []string{"", "2026-11-24T03:00:00Z", "2030-01-01T00:00:00Z", "tomorrow", "9999-99-99", "\xff"} {
			f.Add(reason, until, true)
		}
		f.Add(reason, "", false)
	}
	f.Fuzz(func(t *testing.T, reason, until string, right bool) {
		annotations := []string{OverrideAnnotation, reason}
		if until != "" {
			annotations = append(annotations, OverrideUntilAnnotation, until)
		}
		request := deleteRequest(t, runningPod(annotated(annotations...)), new(int64(0)))
		if right {
			request.UserInfo.Username = "root"
		}
		unusable := !right || strings.TrimSpace(reason) == "" || utf8.RuneCountInString(strings.ToValidUTF8(reason, "x")) > maxOverrideReason
		for _, mode := range modes {
			recorder := answer(t, mode, reviewBody(t, request))
			wellFormed(t, recorder, request)
			var review admissionv1.AdmissionReview
			if err := json.Unmarshal(recorder.Body.Bytes(), &review); err != nil {
				t.Fatal(err)
			}
			overridden := review.Response.AuditAnnotations["decision"] == string(Overridden)
			if overridden && unusable || mode == ModeDeny && review.Response.Allowed != overridden {
				t.Errorf("mode %s: allowed %v, overridden %v with reason %q, until %q, right %v", mode, review.Response.Allowed, overridden, reason, until, right)
			}
		}
	})
}

// Pods are as large as etcd takes them, 1.5 MiB, and a review of an update has two.
func TestHugePods(t *testing.T) {
	huge := func(change ...func(*corev1.Pod)) *corev1.Pod {
		return runningPod(append(change, annotated("note", strings.Repeat("x", 1536<<10)))...)
	}
	for name, request := range map[string]*admissionv1.AdmissionRequest{
		"delete": deleteRequest(t, huge(), new(int64(0))),
		"update": updateRequest(t, huge(), huge(ignoring), ""),
	} {
		recorder := answer(t, ModeDeny, reviewBody(t, request))
		wellFormed(t, recorder, request)
		if recorder.Body.Len() > 64<<10 {
			t.Errorf("%s: the answer has %d bytes", name, recorder.Body.Len())
		}
	}
	if recorder := answer(t, ModeDeny, strings.Repeat(" ", maxReviewBytes+1)); recorder.Code != http.StatusRequestEntityTooLarge {
		t.Errorf("got %d for more than any review has", recorder.Code)
	}
}
