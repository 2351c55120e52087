package webhook

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"
)

func annotated(pairs ...string) func(*corev1.Pod) {
	return func(pod *corev1.Pod) {
		if pod.Annotations == nil {
			pod.Annotations = map[string]string{}
		}
		for i := 0; i < len(pairs); i += 2 {
			pod.Annotations[pairs[i]] = pairs[i+1]
		}
	}
}

func TestOverrideOf(t *testing.T) {
	for _, test := range []struct {
		name        string
		annotations []string
		reason      string
		refused     string // a part of it; empty: it counts, if its user has the right
	}{
		{"none", nil, "", ""},
		{"a reason", []string{OverrideAnnotation, " node lost, ticket 7 "}, "node lost, ticket 7", ""},
		{"no reason", []string{OverrideAnnotation, ""}, "", "gives no reason"},
		{"a reason of spaces", []string{OverrideAnnotation, " \t\n"}, "", "gives no reason"},
		{"the longest reason", []string{OverrideAnnotation, strings.Repeat("理", 500)}, strings.Repeat("理", 500), ""},
		{"a longer reason", []string{OverrideAnnotation, strings.Repeat("x", 501)}, "", "has 501 characters, at most 500"},
		{"still in time", []string{OverrideAnnotation, "x", OverrideUntilAnnotation, "2026-11-24T03:00:01Z"}, "x", ""},
		{"in time, in another zone", []string{OverrideAnnotation, "x", OverrideUntilAnnotation, "2026-11-24T11:30:00+08:00"}, "x", ""},
		{"at the very end", []string{OverrideAnnotation, "x", OverrideUntilAnnotation, "2026-11-24T03:00:00Z"}, "x", "it has expired: the annotation " + OverrideUntilAnnotation + " is 2026-11-24T03:00:00Z, and it is 2026-11-24T03:00:00Z"},
		{"expired", []string{OverrideAnnotation, "x", OverrideUntilAnnotation, "2020-01-01T00:00:00Z"}, "x", "it has expired"},
		{"a time that is none", []string{OverrideAnnotation, "x", OverrideUntilAnnotation, "tomorrow"}, "x", `is "tomorrow", not a time such as 2026-11-24T04:00:00Z`},
		{"an empty time", []string{OverrideAnnotation, "x", OverrideUntilAnnotation, ""}, "x", `is "", not a time`},
		{"a time without a reason", []string{OverrideUntilAnnotation, "2030-01-01T00:00:00Z"}, "", ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			o := overrideOf(runningPod(annotated(test.annotations...)), testTime)
			if o.reason != test.reason || (o.refused == "") != (test.refused == "") || !strings.Contains(o.refused, test.refused) || o.authorised {
				t.Errorf("got %+v", o)
			}
		})
	}
}

// The annotation alone is worth nothing, and neither is the right alone: who removes the pod must have both.
func TestAuthorise(t *testing.T) {
	asked := 0
	access := accessFunc(func(user authenticationv1.UserInfo, pod *corev1.Pod) (bool, error) {
		asked++
		if user.Username == "carol" {
			return false, errors.New("connection refused")
		}
		// By a group, as rights mostly are.
		return user.Username == "alice" && user.UID == "42" && len(user.Groups) == 1 && len(user.Extra) == 1 && pod.Name == "web-0", nil
	})
	for _, test := range []struct {
		name, user string
		override   override
		authorised bool
		refused    string
		asked      int
	}{
		{"annotation and right", "alice", override{reason: "x"}, true, "", 1},
		{"annotation alone", "bob", override{reason: "x"}, false, `user bob does not have the right "override" on forcedeletes.eni-guard.io in namespace shop`, 1},
		{"right alone", "alice", override{}, false, "", 0},
		{"the right, but it has expired", "alice", override{reason: "x", flaw: flawUntil, refused: "it has expired"}, false, "it has expired", 0},
		{"the API server does not say", "carol", override{reason: "x"}, false, "whether carol may override could not be checked: connection refused", 1},
	} {
		t.Run(test.name, func(t *testing.T) {
			asked = 0
			got := authorise(t.Context(), access, test.override, authenticationv1.UserInfo{
				Username: test.user, UID: "42", Groups: []string{"ops"}, Extra: map[string]authenticationv1.ExtraValue{"scopes": {"a"}},
			}, runningPod())
			if got.authorised != test.authorised || got.refused != test.refused || asked != test.asked {
				t.Errorf("got %+v after %d questions", got, asked)
			}
		})
	}
}

// The API server is asked about the very user of the request, with everything that an authoriser may look at.
func TestSubjectAccessReviews(t *testing.T) {
	var asked authorizationv1.SubjectAccessReviewSpec
	status := authorizationv1.SubjectAccessReviewStatus{Allowed: true}
	api := fake.NewClientBuilder().WithInterceptorFuncs(interceptor.Funcs{
		Create: func(_ context.Context, _ client.WithWatch, object client.Object, _ ...client.CreateOption) error {
			review := object.(*authorizationv1.SubjectAccessReview)
			asked, review.Status = review.Spec, status
			return nil
		},
	}).Build()
	user := authenticationv1.UserInfo{Username: "alice", UID: "42", Groups: []string{"ops"}, Extra: map[string]authenticationv1.ExtraValue{"scopes": {"a", "b"}}}
	allowed, err := subjectAccessReviews{api}.mayOverride(t.Context(), user, runningPod())
	if err != nil || !allowed {
		t.Fatalf("got %v, %v", allowed, err)
	}
	want := authorizationv1.ResourceAttributes{Namespace: "shop", Verb: "override", Group: "eni-guard.io", Resource: "forcedeletes", Name: "web-0"}
	if *asked.ResourceAttributes != want || asked.User != "alice" || asked.UID != "42" || asked.Groups[0] != "ops" || len(asked.Extra["scopes"]) != 2 {
		t.Errorf("asked about %+v", asked)
	}
	status.Denied = true
	if allowed, err = (subjectAccessReviews{api}).mayOverride(t.Context(), user, runningPod()); err != nil || allowed {
		t.Errorf("one authoriser denies: got %v, %v", allowed, err)
	}
}

// An expiry is read against the clock at every request.
func TestAnOverrideEnds(t *testing.T) {
	guard := newGuard(finds(stuck()...), nodeA())
	guard.access = accessFunc(func(authenticationv1.UserInfo, *corev1.Pod) (bool, error) { return true, nil })
	pod := runningPod(annotated(OverrideAnnotation, "x", OverrideUntilAnnotation, testTime.Add(time.Minute).Format(time.RFC3339)))
	now := testTime
	guard.now = func() time.Time { return now }
	if d := guard.judge(t.Context(), &removal{path: PathDelete, pod: pod, grace: new(int64(0))}); d.outcome != Overridden {
		t.Errorf("before its end: %s, %+v", d.outcome, d.override)
	}
	now = now.Add(2 * time.Minute)
	if d := guard.judge(t.Context(), &removal{path: PathDelete, pod: pod, grace: new(int64(0))}); d.outcome != Denied {
		t.Errorf("after its end: %s, %+v", d.outcome, d.override)
	}
}
