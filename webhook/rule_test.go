package webhook

import (
	"testing"

	corev1 "k8s.io/api/core/v1"
)

func TestEffectOn(t *testing.T) {
	for _, test := range []struct {
		name string
		pod  *corev1.Pod
		ask  *int64
		want effect
	}{
		{"a running pod, no grace period asked for", runningPod(), nil, startsDeletion},
		{"a running pod, 30 asked for", runningPod(), new(int64(30)), startsDeletion},
		{"a running pod, 1 asked for, as by kubectl --now", runningPod(), new(int64(1)), startsDeletion},
		{"a running pod, a negative period counts as 1", runningPod(), new(int64(-1)), startsDeletion},
		{"a running pod, 0 asked for", runningPod(), new(int64(0)), removesObject},
		{"its own period is 0, none asked for", runningPod(ownGrace(new(int64(0)))), nil, removesObject},
		{"its own period is 0, 30 asked for", runningPod(ownGrace(new(int64(0)))), new(int64(30)), startsDeletion},
		{"its own period is negative, none asked for", runningPod(ownGrace(new(int64(-5)))), nil, startsDeletion},
		{"its own period is unset, none asked for", runningPod(ownGrace(nil)), nil, removesObject},
		{"failed, 30 asked for", runningPod(phase(corev1.PodFailed)), new(int64(30)), removesObject},
		{"succeeded, none asked for", runningPod(phase(corev1.PodSucceeded)), nil, removesObject},
		{"of unknown phase, none asked for", runningPod(phase(corev1.PodUnknown)), nil, startsDeletion},
		{"without a node, 30 asked for", runningPod(unscheduled), new(int64(30)), removesObject},
		{"terminating with 30, none asked for", runningPod(terminating(new(int64(30)))), nil, changesNothing},
		{"terminating with 30, 10 asked for", runningPod(terminating(new(int64(30)))), new(int64(10)), startsDeletion},
		{"terminating with 30, a negative period asked for", runningPod(terminating(new(int64(30)))), new(int64(-1)), startsDeletion},
		{"terminating with 30, 0 asked for", runningPod(terminating(new(int64(30)))), new(int64(0)), removesObject},
		{"terminating with 30 and failed, none asked for", runningPod(terminating(new(int64(30))), phase(corev1.PodFailed)), nil, changesNothing},
		{"terminating with 30 and its own period 0, none asked for", runningPod(terminating(new(int64(30))), ownGrace(new(int64(0)))), nil, changesNothing},
		{"terminating with 30, 30 asked for", runningPod(terminating(new(int64(30)))), new(int64(30)), changesNothing},
		{"terminating with 30, more asked for", runningPod(terminating(new(int64(30)))), new(int64(60)), changesNothing},
		{"terminating with 1, a negative period asked for", runningPod(terminating(new(int64(1)))), new(int64(-1)), changesNothing},
		{"marked with 0, none asked for", runningPod(terminating(new(int64(0)))), nil, removesObject},
		{"marked with 0, 30 asked for", runningPod(terminating(new(int64(0)))), new(int64(30)), removesObject},
		{"marked without a period, 30 asked for", runningPod(terminating(nil)), new(int64(30)), removesObject},
	} {
		t.Run(test.name, func(t *testing.T) {
			if got := effectOn(test.pod, test.ask); got != test.want {
				t.Errorf("got %q, want %q", got, test.want)
			}
		})
	}
}
