package webhook

import (
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// The calls of one removal, as a real API server makes them, and what is none of them.
func TestCallsOfOneRemovalGetOneDecision(t *testing.T) {
	first := func() *removal {
		r := &removal{path: PathDelete, pod: &corev1.Pod{}}
		r.user.Username = "jane"
		r.pod.UID, r.pod.ResourceVersion = "u", "1"
		return r
	}
	for _, test := range []struct {
		name    string
		outcome Outcome
		next    func(*removal)
		after   time.Duration
		want    bool
	}{
		{"the marked object", Audited, func(r *removal) { r.pod.DeletionTimestamp, r.pod.ResourceVersion = &metav1.Time{}, "2" }, 0, true},
		{"the object before the mark, from a cache", Audited, func(*removal) {}, 0, true},
		{"an object that has changed in between", Held, func(r *removal) { r.pod.ResourceVersion = "2" }, 0, true},
		{"a released pod that has changed in between", Allowed, func(r *removal) { r.pod.ResourceVersion = "2" }, 0, true},
		{"a released pod that may have come back to life", Allowed, func(r *removal) { r.pod.ResourceVersion = "2" }, conflictWindow, false},
		{"a released pod, marked, late", Allowed, func(r *removal) {
			r.pod.DeletionTimestamp, r.pod.DeletionGracePeriodSeconds, r.pod.ResourceVersion = &metav1.Time{}, new(int64(0)), "2"
		}, conflictWindow, true},
		{"another way in, by the label", Allowed, func(r *removal) { r.path, r.pod.ResourceVersion = PathIgnoreLabel, "2" }, 0, false},
		{"a graceful delete after a forced one", Denied, func(r *removal) {
			r.pod.Spec.NodeName, r.pod.Spec.TerminationGracePeriodSeconds, r.pod.ResourceVersion = "node-a", new(int64(30)), "2"
		}, 0, false},
		{"another end of the override", Audited, func(r *removal) { r.pod.Annotations = map[string]string{OverrideUntilAnnotation: "x"} }, 0, false},
		{"later", Audited, func(*removal) {}, repeatWindow, false},
		{"somebody who tries again after a refusal", Denied, func(*removal) {}, 0, false},
		{"a refusal, about a state that was not the latest", Denied, func(r *removal) { r.pod.ResourceVersion = "2" }, 0, true},
		{"somebody who tries again when the pod has changed", Denied, func(r *removal) { r.pod.ResourceVersion = "2" }, conflictWindow, false},
		{"somebody else", Audited, func(r *removal) { r.user.Username = "joe" }, 0, false},
		{"another way in", Audited, func(r *removal) { r.path = PathCollection }, 0, false},
		{"another pod of the name", Audited, func(r *removal) { r.pod.UID = "v" }, 0, false},
		{"a question", Audited, func(r *removal) { r.dryRun = true }, 0, false},
		{"after an override was put on it", Held, func(r *removal) { r.pod.Annotations = map[string]string{OverrideAnnotation: "x"} }, 0, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			var m recentDecisions
			m.put(first(), decision{outcome: test.outcome}, testTime)
			next := first()
			test.next(next)
			d, got := m.get(next, testTime.Add(test.after))
			if got != test.want || got && d.outcome != test.outcome {
				t.Errorf("the same removal: %v, decision %q", got, d.outcome)
			}
		})
	}
	// It is not known whether the pod was given back its sandbox in between: an UPDATE makes no mark that would tell.
	t.Run("the label that frees the address, given again", func(t *testing.T) {
		var m recentDecisions
		labelled := first()
		labelled.path = PathIgnoreLabel
		m.put(labelled, decision{outcome: Allowed}, testTime)
		if _, got := m.get(labelled, testTime); !got {
			t.Error("the same call once more is judged anew")
		}
		labelled.pod.ResourceVersion = "2"
		if _, got := m.get(labelled, testTime); got {
			t.Error("the decision about another state counts")
		}
	})
	// In its latest state the pod may well be held.
	t.Run("a pod that could not be held", func(t *testing.T) {
		var m recentDecisions
		m.put(first(), decision{outcome: Denied, reason: ReasonHoldFailed}, testTime)
		next := first()
		next.pod.ResourceVersion = "2"
		if _, got := m.get(next, testTime); got {
			t.Error("the failure counts for another state")
		}
	})
	t.Run("a question before it", func(t *testing.T) {
		var m recentDecisions
		asked := first()
		asked.dryRun = true
		m.put(asked, decision{outcome: Audited}, testTime)
		if _, got := m.get(first(), testTime); got {
			t.Error("the answer to a question counts for a removal")
		}
	})
}
