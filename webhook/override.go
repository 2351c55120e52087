package webhook

import (
	"context"
	"fmt"
	"strings"
	"time"
	"unicode/utf8"

	authenticationv1 "k8s.io/api/authentication/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

const (
	// OverrideAnnotation on a pod asks for its removal although it is bound; its value says why.
	OverrideAnnotation = "eni-guard.io/allow-force-delete"
	// OverrideUntilAnnotation ends the override at a time of RFC 3339.
	OverrideUntilAnnotation = "eni-guard.io/allow-force-delete-until"

	// maxOverrideReason bounds the reason, in characters: it goes into audit log, Event and log.
	maxOverrideReason = 500
)

// override is what the annotations of a pod ask for, and whether it counts. The zero override is none.
type override struct {
	// reason is what its author gave; empty when there is no override, or none with a usable reason.
	reason string
	// flaw is what is wrong with it, if something is.
	flaw flaw
	// refused says, in words that fit behind "The override on it does not count: ", why it does not.
	refused string
	// authorised means: it counts, and who removes the pod has the right to.
	authorised bool
}

// flaw is what an override can lack.
type flaw int

const (
	flawless flaw = iota
	flawReason
	flawUntil
	flawRight
)

// overrideOf reads the annotations of a pod. The override it returns still lacks the authorisation. The chart's CEL has
// the same rule for the time when no webhook answers, without the expiry.
func overrideOf(pod *corev1.Pod, now time.Time) override {
	text, present := pod.Annotations[OverrideAnnotation]
	if !present {
		return override{}
	}
	reason := strings.TrimSpace(text)
	if reason == "" {
		return override{flaw: flawReason, refused: fmt.Sprintf("the annotation %s gives no reason", OverrideAnnotation)}
	}
	if n := utf8.RuneCountInString(text); n > maxOverrideReason {
		return override{flaw: flawReason, refused: fmt.Sprintf("the reason in the annotation %s has %d characters, at most %d are allowed", OverrideAnnotation, n, maxOverrideReason)}
	}
	o := override{reason: reason}
	if text, limited := pod.Annotations[OverrideUntilAnnotation]; limited {
		until, err := time.Parse(time.RFC3339, text)
		switch {
		case err != nil:
			o.flaw, o.refused = flawUntil, fmt.Sprintf("the annotation %s is %.40q, not a time such as %s", OverrideUntilAnnotation, text, now.UTC().Add(time.Hour).Format(time.RFC3339))
		case !now.Before(until):
			o.flaw, o.refused = flawUntil, fmt.Sprintf("it has expired: the annotation %s is %s, and it is %s", OverrideUntilAnnotation, text, now.UTC().Format(time.RFC3339))
		}
	}
	return o
}

// accessReviewer says whether a user may override the guard for a pod. An error means that it could not be told.
type accessReviewer interface {
	mayOverride(ctx context.Context, user authenticationv1.UserInfo, pod *corev1.Pod) (bool, error)
}

// authorise completes an override by asking whether the user who removes the pod, not the author of the annotation, has
// the right to.
func authorise(ctx context.Context, access accessReviewer, o override, user authenticationv1.UserInfo, pod *corev1.Pod) override {
	if o.reason == "" || o.flaw != flawless {
		return o
	}
	allowed, err := access.mayOverride(ctx, user, pod)
	switch {
	case err != nil:
		o.flaw, o.refused = flawRight, fmt.Sprintf("whether %s may override could not be checked: %v", user.Username, err)
	case !allowed:
		o.flaw, o.refused = flawRight, fmt.Sprintf("user %s does not have the right \"override\" on forcedeletes.eni-guard.io in namespace %s", user.Username, pod.Namespace)
	default:
		o.authorised = true
	}
	return o
}

// subjectAccessReviews asks the API server.
type subjectAccessReviews struct{ client client.Client }

func (s subjectAccessReviews) mayOverride(ctx context.Context, user authenticationv1.UserInfo, pod *corev1.Pod) (bool, error) {
	review := &authorizationv1.SubjectAccessReview{Spec: authorizationv1.SubjectAccessReviewSpec{
		User: user.Username, UID: user.UID, Groups: user.Groups,
		ResourceAttributes: &authorizationv1.ResourceAttributes{
			Namespace: pod.Namespace, Verb: "override", Group: "eni-guard.io", Resource: "forcedeletes", Name: pod.Name,
		},
	}}
	if len(user.Extra) > 0 {
		review.Spec.Extra = map[string]authorizationv1.ExtraValue{}
		for key, values := range user.Extra {
			review.Spec.Extra[key] = authorizationv1.ExtraValue(values)
		}
	}
	if err := s.client.Create(ctx, review); err != nil {
		return false, err
	}
	return review.Status.Allowed && !review.Status.Denied, nil
}
