package webhook

import (
	"errors"
	"io"
	"net/http"
	"path/filepath"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// What the webhook answers, as the API server hands it on, is read back as what it says.
func TestReadAnswer(t *testing.T) {
	bound, unknown := evidence{report: allProbes(stuck()...)}, evidence{failure: "the agent of node node-a did not answer within 5s at 192.0.2.7:9807"}
	in := func(mode Mode, e evidence) situation { return situation{mode: mode, holdable: true, evidence: e} }
	for name, test := range map[string]struct {
		situation situation
		answer    string
		works     bool
	}{
		"deny, bound":     {in(ModeDeny, bound), answerRefused, true},
		"deny, unknown":   {in(ModeDeny, unknown), answerUnknown, false},
		"deny, released":  {in(ModeDeny, evidence{report: allProbes()}), answerNone, false},
		"hold, bound":     {in(ModeHold, bound), answerWarned, true},
		"hold, unknown":   {in(ModeHold, unknown), answerUnknown, false},
		"audit, bound":    {in(ModeAudit, bound), answerWarned, true},
		"audit, unknown":  {in(ModeAudit, unknown), answerUnknown, false},
		"audit, released": {in(ModeAudit, evidence{report: allProbes()}), answerNone, false},
	} {
		t.Run(name, func(t *testing.T) {
			response := respond(&removal{path: PathDelete, pod: runningPod()}, decide(test.situation))
			var err error
			if !response.Allowed {
				status := *response.Result
				status.Message = `admission webhook "force-delete.eni-guard.io" denied the request: ` + status.Message
				err = &apierrors.StatusError{ErrStatus: status}
			}
			got, err := readAnswer("shop/web-0", err, append([]string{"some other warning"}, response.Warnings...))
			if err != nil || got.Answer != test.answer || got.works() != test.works {
				t.Errorf("%+v (%v), want %q", got, err, test.answer)
			}
			if !strings.Contains(got.String(), "shop/web-0") {
				t.Errorf("it does not name the pod:\n%s", got)
			}
		})
	}
}

// What the guard has no part in is no answer of the guard's.
func TestReadAnswerOfOthers(t *testing.T) {
	for cause, section := range map[string]string{
		"connection refused": "#the-webhook-does-not-answer",
		"tls: failed to verify certificate: x509: certificate signed by unknown authority": "#certificates",
	} {
		unreachable := apierrors.NewInternalError(errors.New(`failed calling webhook "force-delete.eni-guard.io": ` + cause))
		got, err := readAnswer("shop/web-0", unreachable, nil)
		if err != nil || got.Answer != answerUnreachable || got.works() || !strings.HasSuffix(got.String(), section) {
			t.Errorf("%s: %s (%v), want %q that ends with %s", cause, got, err, answerUnreachable, section)
		}
	}
	other := &apierrors.StatusError{ErrStatus: metav1.Status{Code: http.StatusConflict, Message: `admission webhook "other" denied the request: pod is still alive on node node-a`}}
	for err, next := range map[error]string{
		errors.New("connection refused"):                                                  "Does `kubectl get pods` reach it?",
		apierrors.NewNotFound(corev1.Resource("pods"), "web-0"):                           "`kubectl get pods -n shop` lists them",
		apierrors.NewForbidden(corev1.Resource("pods"), "web-0", errors.New("no right")):  "`kubectl auth can-i delete pods -n shop` must say yes",
		apierrors.NewTimeoutError("request did not complete within requested timeout", 0): "The API server does not keep up",
		other: "Something else has refused this",
	} {
		got, told := readAnswer("shop/web-0", err, nil)
		if told == nil || got.works() {
			t.Errorf("%v is read as %+v", err, got)
			continue
		}
		if text := told.Error(); !strings.Contains(text, err.Error()) || !strings.Contains(text, next) || !strings.Contains(text, "shop/web-0") {
			t.Errorf("it is told as: %s", text)
		}
	}
}

// What cannot be asked is told from what was asked in vain.
func TestCheckOfNothing(t *testing.T) {
	t.Setenv("KUBECONFIG", filepath.Join(t.TempDir(), "none"))
	t.Setenv("KUBERNETES_SERVICE_HOST", "")
	for _, test := range []struct {
		args []string
		want string
	}{
		{[]string{}, "name one pod, not 0"}, // for nil, cobra would take the arguments of the test
		{[]string{"web-0", "web-1"}, "name one pod, not 2"},
		{[]string{""}, `"" is not the name of a pod`},
		{[]string{"shop/web-0"}, `"shop/web-0" is not the name of a pod, such as web-0; its namespace is named by -n`},
		{[]string{"pod/web-0"}, `"pod/web-0" is not the name of a pod`},
		{[]string{"web-0"}, "there is no kubeconfig: name one by --kubeconfig"},
	} {
		cmd := NewCheckCommand()
		cmd.SetArgs(test.args)
		cmd.SetOut(io.Discard)
		cmd.SetErr(io.Discard)
		if err := cmd.ExecuteContext(t.Context()); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%q: %v, want %q", test.args, err, test.want)
		}
	}
}
