package e2e

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	authorizationv1 "k8s.io/api/authorization/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/eni-guard/eni-guard/test/e2e/incident"
)

const (
	overrideAnnotation = "eni-guard.io/allow-force-delete"
	untilAnnotation    = "eni-guard.io/allow-force-delete-until"

	// internName may do anything to pods; operatorName may override the guard as well. The administrator of the cluster
	// proves nothing here: every check of a right lets the group system:masters pass.
	internName   = "intern@example.com"
	operatorName = "operator@example.com"
)

// The annotation and the right, never one of them alone; here on the pod of the incident.
func TestAnOverrideNeedsTheAnnotationAndTheRight(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	stuck := stuckFS(t, ns)
	pod := start(t, stuck.StuckPod(ns, "web-0"))
	process := unkillable(t, pod)
	before := read(t, pod)
	intern, operator := people(t, ns)

	for _, nobody := range []*caller{intern, operator} {
		refusedAtLast(t, func() error { return byForcedDelete.take(t.Context(), nobody, pod) }, "is in state D", "To override, with the right `override` on `forcedeletes.eni-guard.io`: `kubectl annotate pod web-0 -n "+ns)
		sameMarks(t, before)
	}
	annotate(t, pod, overrideAnnotation, "the node is powered off")
	for _, w := range []way{byForcedDelete, byForcedCollection} {
		refusedAtLast(t, func() error { return w.take(t.Context(), intern, pod) }, "is in state D",
			`The override on it does not count: user `+internName+` does not have the right "override" on forcedeletes.eni-guard.io in namespace `+ns)
		decided(t, pod, "deny "+w.path+" denied bound SandboxBound")
	}
	sameMarks(t, before)

	wentThrough(t, byForcedDelete.take(t.Context(), operator, pod))
	wentThrough(t, cluster.Gone(t.Context(), pod))
	onTheNode(t, pod, process)
	record := decided(t, pod, "deny delete overridden bound Override")
	if record.fields["override-reason"] != "the node is powered off" || !strings.Contains(record.fields["evidence"], "is in state D") && !strings.Contains(record.fields["evidence"], " did not run") || record.Actor() != operatorName {
		t.Errorf("user %s, fields %v", record.Actor(), record.fields)
	}
	operator.warned(t, "overridden: pod "+ns+"/web-0 is still alive on node node-1: ")
	wentThrough(t, incident.Wait(t.Context(), 2*time.Minute, "the Event about the override", func(context.Context) error {
		for _, event := range events(t, ns, pod.UID) {
			if event.Reason == "ForcedRemovalOverridden" {
				if !strings.HasPrefix(event.Note, "user "+operatorName+": pod "+ns+"/web-0 is still alive") || !strings.HasSuffix(event.Note, `Override: "the node is powered off".`) {
					return fmt.Errorf("it says %q", event.Note)
				}
				return nil
			}
		}
		return errors.New("there is none")
	}))
}

// Every way in knows the override.
func TestAnOverrideCountsForEveryWayIn(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	_, operator := people(t, ns)
	for i, w := range []way{byForcedDelete, byPlainDeleteWithoutTime, byForcedCollection, byForcedEviction, byPlainEvictionWithoutTime} {
		pod := sleeper(t, ns, fmt.Sprintf("web-%d", i), w.change)
		refused(t, w.take(t.Context(), operator, pod), "To override")
		annotate(t, pod, overrideAnnotation, "a test")
		wentThrough(t, w.take(t.Context(), operator, pod))
		wentThrough(t, cluster.Gone(t.Context(), pod))
		if fields := decided(t, pod, "deny "+w.path+" overridden bound Override").fields; fields["override-reason"] != "a test" {
			t.Errorf("%s: %v", w.path, fields)
		}
	}
	pod := sleeper(t, ns, "web-labelled", nil)
	annotate(t, pod, overrideAnnotation, "a test")
	label := []byte(`{"metadata":{"labels":{"` + ignoreLabel + `":"true"}}}`)
	_, err := operator.CoreV1().Pods(ns).Patch(t.Context(), pod.Name, types.MergePatchType, label, metav1.PatchOptions{})
	wentThrough(t, err)
	decided(t, pod, "deny ignore-label overridden bound Override")
}

// One annotation must not be a way around the other: what is wrong with it is said, and it does not count.
func TestAnOverrideHasAReasonAndAnEnd(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	_, operator := people(t, ns)
	pod := sleeper(t, ns, "web-0", nil)
	past := time.Now().Add(-time.Minute).UTC().Format(time.RFC3339)
	future := time.Now().Add(time.Hour).UTC().Format(time.RFC3339)
	for _, c := range []struct{ reason, until, refusal string }{
		{"", "", "the annotation eni-guard.io/allow-force-delete gives no reason"},
		{" \n\t", "", "the annotation eni-guard.io/allow-force-delete gives no reason"},
		{strings.Repeat("ä", 501), "", "has 501 characters, at most 500 are allowed"},
		{"a test", past, "it has expired: the annotation eni-guard.io/allow-force-delete-until is " + past},
		{"a test", "tomorrow", `the annotation eni-guard.io/allow-force-delete-until is "tomorrow", not a time such as 2`},
		{"", future, "gives no reason"},
	} {
		override(t, pod, c.reason, c.until)
		refused(t, byForcedDelete.take(t.Context(), operator, pod), "The override on it does not count: ", c.refusal)
		kept(t, pod)
		decided(t, pod, "deny delete denied bound SandboxBound")
	}
	override(t, pod, strings.Repeat("ä", 500), future)
	wentThrough(t, byForcedDelete.take(t.Context(), operator, pod))
	wentThrough(t, cluster.Gone(t.Context(), pod))
	if reason := decided(t, pod, "deny delete overridden bound Override").fields["override-reason"]; reason != strings.Repeat("ä", 500) {
		t.Errorf("the audit log has the reason %q", reason)
	}
}

// In the modes that refuse nothing an override counts too. Who has none that counts is told before what happens instead.
func TestAnOverrideWhereNothingIsRefused(t *testing.T) {
	t.Parallel()
	for mode, instead := range map[string]string{"hold": "held", "audit": "audited"} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			ns := moded(t, mode)
			intern, operator := people(t, ns)
			byIntern, byOperator := sleeper(t, ns, "web-0", nil), sleeper(t, ns, "web-1", nil)
			for _, pod := range []*corev1.Pod{byIntern, byOperator} {
				annotate(t, pod, overrideAnnotation, "a test")
			}
			wentThrough(t, byForcedDelete.take(t.Context(), intern, byIntern))
			decided(t, byIntern, mode+" delete "+instead+" bound SandboxBound")
			const why = `the override does not count: user ` + internName + ` does not have the right "override" on forcedeletes.eni-guard.io`
			intern.warned(t, why)
			if events := removalEvents(t, byIntern); !strings.HasPrefix(events[0].Note, "user "+internName+": "+why) {
				t.Errorf("the Event says %q", events[0].Note)
			}
			wentThrough(t, byForcedDelete.take(t.Context(), operator, byOperator))
			// Nothing is held for a moment.
			wentThrough(t, cluster.Gone(t.Context(), byOperator))
			decided(t, byOperator, mode+" delete overridden bound Override")
			operator.warned(t, "overridden: pod "+ns+"/web-1 is still alive on node node-1: ")
		})
	}
}

// What is held goes by the same override as what is refused.
func TestAnOverrideOfAHeldPod(t *testing.T) {
	t.Parallel()
	ns := moded(t, "hold")
	stuck := stuckFS(t, ns)
	intern, operator := people(t, ns)
	pod, process := heldStuckPod(t, stuck, ns, "web-0")

	// Again, by whoever: it stays held.
	for _, nobody := range []*caller{intern, operator} {
		wentThrough(t, byForcedDelete.take(t.Context(), nobody, pod))
		decided(t, pod, "hold delete held bound SandboxBound")
	}
	annotate(t, pod, overrideAnnotation, "the node is powered off")
	again := callAs(t, internName)
	wentThrough(t, byForcedDelete.take(t.Context(), again, pod))
	again.warned(t, `the override does not count: user `+internName+` does not have the right "override"`)
	record := decided(t, pod, "hold delete held bound SandboxBound")
	if want := `user ` + internName + ` does not have the right "override"`; !strings.Contains(record.fields["evidence"], want) {
		t.Errorf("the evidence does not say %q: %q", want, record.fields["evidence"])
	}
	// Long enough for a finalizer to be taken away, if it were.
	wentThrough(t, cluster.AwaitCollection(t.Context()))
	isHeld(t, pod)

	// The request is answered first, then the finalizer goes; unless the API server takes half a second for the answer.
	if err := byForcedDelete.take(t.Context(), operator, pod); !apierrors.IsNotFound(err) {
		wentThrough(t, err)
	}
	decided(t, pod, "hold delete overridden bound Override")
	wentThrough(t, cluster.AwaitGone(t.Context(), pod))
	onTheNode(t, pod, process)
}

// The emergency in which the guard itself is down is one more reason to have an override, and none to have no rules.
func TestAnOverrideWithoutAnyWebhook(t *testing.T) {
	const down = `failed calling webhook "force-delete.eni-guard.io"`
	ns := namespace(t)
	held := moded(t, "hold")
	stuck := stuckFS(t, ns)
	intern, operator := people(t, ns)
	_, heldOperator := people(t, held)
	stuckPod := start(t, stuck.StuckPod(ns, "stuck"))
	process := unkillable(t, stuckPod)
	heldPod, heldProcess := heldStuckPod(t, stuck, held, "held")
	pod := sleeper(t, ns, "web-0", nil)
	drained := sleeper(t, ns, "web-1", nil)
	labelled := sleeper(t, ns, "web-2", nil)
	withoutWebhook(t)
	// What is overridden here frees addresses that are still in use. A replica of the webhook must not be given one.
	t.Cleanup(func() {
		if err := stuck.Release(); err != nil {
			t.Error(err)
		}
	})

	stays := func(what string, err error) {
		t.Helper()
		if err == nil || !strings.Contains(err.Error(), down) {
			t.Errorf("%s: %v", what, err)
		}
	}
	before := read(t, stuckPod)
	stays("nobody's override, by somebody without the right", byForcedDelete.take(t.Context(), intern, stuckPod))
	stays("nobody's override, by somebody with the right", byForcedDelete.take(t.Context(), operator, stuckPod))
	annotate(t, stuckPod, overrideAnnotation, "the whole rack is powered off")
	stays("an override, by somebody without the right", byForcedDelete.take(t.Context(), intern, stuckPod))
	annotate(t, stuckPod, untilAnnotation, time.Now().Add(time.Hour).UTC().Format(time.RFC3339))
	stays("an override that ends, which the API server cannot tell", byForcedDelete.take(t.Context(), operator, stuckPod))
	annotate(t, stuckPod, untilAnnotation, "")
	for _, reason := range []string{"", " ", strings.Repeat("x", 501)} {
		override(t, stuckPod, reason, "")
		stays("an override with an unusable reason", byForcedDelete.take(t.Context(), operator, stuckPod))
	}
	sameMarks(t, before)

	override(t, stuckPod, "the whole rack is powered off", "")
	wentThrough(t, byForcedDelete.take(t.Context(), operator, stuckPod))
	wentThrough(t, cluster.Gone(t.Context(), stuckPod))
	onTheNode(t, stuckPod, process)
	removals, err := cluster.Removals(stuckPod)
	if err != nil || len(removals) == 0 {
		t.Fatalf("%d removals (%v)", len(removals), err)
	}
	last, failedOpen := removals[len(removals)-1], ""
	for key, value := range last.Annotations {
		if strings.HasPrefix(key, "failed-open.validating.webhook.admission.k8s.io/") {
			failedOpen += value
		}
	}
	if !strings.Contains(failedOpen, "force-delete.eni-guard.io") || last.Annotations["override.eni-guard.io/override-reason"] != "the whole rack is powered off" ||
		last.Actor() != operatorName || last.ResponseStatus.Code != 200 {
		t.Errorf("the audit event says: user %s, code %d, %v", last.Actor(), last.ResponseStatus.Code, last.Annotations)
	}

	// A drain goes on; what is not graceful about an eviction is refused.
	stays("an eviction that is forced", evict(t.Context(), cluster, pod, &forced))
	kept(t, pod)
	wentThrough(t, evict(t.Context(), cluster, drained, nil))
	wentThrough(t, cluster.AwaitGone(t.Context(), drained))

	// The same goes for the address, and for what is held.
	label := []byte(`{"metadata":{"labels":{"` + ignoreLabel + `":"true"}}}`)
	give := func(api *caller) error {
		_, err := api.CoreV1().Pods(ns).Patch(t.Context(), labelled.Name, types.MergePatchType, label, metav1.PatchOptions{})
		return err
	}
	stays("the label that frees the address", give(operator))
	annotate(t, labelled, overrideAnnotation, "a test")
	stays("the label that frees the address, by somebody without the right", give(intern))
	wentThrough(t, give(operator))
	take := func(user string) error {
		// As the runbook has it.
		out, err := cluster.Kubectl(t.Context(), "patch", "pod", heldPod.Name, "-n", held, `-p={"metadata":{"$deleteFromPrimitiveList/finalizers":["`+finalizer+`"]}}`, "--as="+user)
		if err != nil {
			return errors.New(out)
		}
		return nil
	}
	stays("taking the finalizer", take(operatorName))
	annotate(t, heldPod, overrideAnnotation, "the whole rack is powered off")
	stays("taking the finalizer, by somebody without the right", take(internName))
	isHeld(t, heldPod)
	wentThrough(t, byForcedDelete.take(t.Context(), heldOperator, heldPod))
	// Nobody is there to free it.
	isHeld(t, heldPod)
	wentThrough(t, take(operatorName))
	wentThrough(t, cluster.Gone(t.Context(), heldPod))
	onTheNode(t, heldPod, heldProcess)
	// What is only watched is not in the way.
	writePhase(t, pod, corev1.PodFailed)
}

// people returns somebody who may do anything to the pods of a namespace, and somebody who may override the guard as well.
func people(t *testing.T, ns string) (intern, operator *caller) {
	t.Helper()
	subjects := []rbacv1.Subject{{Kind: rbacv1.UserKind, APIGroup: rbacv1.GroupName, Name: internName}, {Kind: rbacv1.UserKind, APIGroup: rbacv1.GroupName, Name: operatorName}}
	_, err := cluster.RbacV1().Roles(ns).Create(t.Context(), &rbacv1.Role{
		ObjectMeta: metav1.ObjectMeta{Name: "pods"},
		Rules:      []rbacv1.PolicyRule{{APIGroups: []string{""}, Resources: []string{"pods", "pods/status", "pods/eviction"}, Verbs: []string{"*"}}},
	}, metav1.CreateOptions{})
	wentThrough(t, err)
	for _, binding := range []rbacv1.RoleBinding{
		{ObjectMeta: metav1.ObjectMeta{Name: "pods"}, RoleRef: rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "Role", Name: "pods"}, Subjects: subjects},
		{ObjectMeta: metav1.ObjectMeta{Name: "override"}, RoleRef: rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: "eni-guard-override"}, Subjects: subjects[1:]},
	} {
		_, err := cluster.RbacV1().RoleBindings(ns).Create(t.Context(), &binding, metav1.CreateOptions{})
		wentThrough(t, err)
	}
	may := func(user string, what authorizationv1.ResourceAttributes) bool {
		what.Namespace = ns
		review, err := cluster.AuthorizationV1().SubjectAccessReviews().Create(t.Context(), &authorizationv1.SubjectAccessReview{
			Spec: authorizationv1.SubjectAccessReviewSpec{User: user, ResourceAttributes: &what},
		}, metav1.CreateOptions{})
		wentThrough(t, err)
		return review.Status.Allowed
	}
	remove, force := authorizationv1.ResourceAttributes{Verb: "delete", Resource: "pods"}, authorizationv1.ResourceAttributes{Verb: "override", Group: "eni-guard.io", Resource: "forcedeletes"}
	wentThrough(t, incident.Wait(t.Context(), 2*time.Minute, "the rights to be in force", func(context.Context) error {
		if !may(internName, remove) || !may(operatorName, remove) || !may(operatorName, force) {
			return errors.New("they are not")
		}
		return nil
	}))
	if may(internName, force) {
		t.Fatal("everybody has the right to override")
	}
	return callAs(t, internName), callAs(t, operatorName)
}

// annotate sets an annotation of a pod; an empty one is taken away, except the override itself.
func annotate(t *testing.T, pod *corev1.Pod, key, value string) {
	t.Helper()
	patch := fmt.Appendf(nil, `{"metadata":{"annotations":{%q:%q}}}`, key, value)
	if value == "" && key != overrideAnnotation {
		patch = fmt.Appendf(nil, `{"metadata":{"annotations":{%q:null}}}`, key)
	}
	_, err := cluster.CoreV1().Pods(pod.Namespace).Patch(t.Context(), pod.Name, types.MergePatchType, patch, metav1.PatchOptions{})
	wentThrough(t, err)
	wentThrough(t, cluster.AwaitCached(t.Context(), pod.Namespace, pod.Name))
}

// override gives a pod an override with a reason, and an end unless that is empty.
func override(t *testing.T, pod *corev1.Pod, reason, until string) {
	t.Helper()
	annotate(t, pod, overrideAnnotation, reason)
	annotate(t, pod, untilAnnotation, until)
}
