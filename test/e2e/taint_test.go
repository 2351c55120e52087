package e2e

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/eni-guard/eni-guard/test/e2e/incident"
)

// What the guard puts on nodes (internal/sandbox).
const (
	orphanedCondition = "OrphanedSandbox"
	orphanedTaint     = "eni-guard.io/orphaned-sandbox"
)

// othersTaint is not the guard's.
const othersTaint = "example.com/mine"

// taintsAGhost says of a node that has no agent that something is left over there, and that it is not.
func taintsAGhost(t *testing.T, node string) {
	awaitNodeEvent(t, node, "NodeTainted", "keeps new pods away, because one could be given an address that is still in use here: see the condition OrphanedSandbox")
	setOrphaned(t, node, corev1.ConditionFalse)
	awaitTaint(t, node, false)
	awaitNodeEvent(t, node, "NodeUntainted", "nothing is reported to be left over any more")
	setOrphaned(t, node, corev1.ConditionTrue)
	awaitTaint(t, node, true)
}

// taintedGhost makes a node without an agent that the guard has tainted, beside somebody else.
func taintedGhost(t *testing.T) string {
	t.Helper()
	node := ghost(t, nil)
	kubectl(t, "", "taint", "node", node, othersTaint+"=kept:NoSchedule")
	setOrphaned(t, node, corev1.ConditionTrue)
	awaitTaint(t, node, true)
	return node
}

// setOrphaned says of a node what an agent would.
func setOrphaned(t *testing.T, node string, status corev1.ConditionStatus) {
	t.Helper()
	now := time.Now().UTC().Format(time.RFC3339)
	patch := fmt.Sprintf(`{"status":{"conditions":[{"type":%q,"status":%q,"reason":"Test","message":"the test says so","lastHeartbeatTime":%[3]q,"lastTransitionTime":%[3]q}]}}`,
		orphanedCondition, status, now)
	if _, err := cluster.CoreV1().Nodes().Patch(t.Context(), node, types.StrategicMergePatchType, []byte(patch), metav1.PatchOptions{}, "status"); err != nil {
		t.Fatal(err)
	}
}

// awaitTaint waits until a node has the guard's taint, or has not, and checks that it still has the other one.
func awaitTaint(t *testing.T, name string, wanted bool) {
	t.Helper()
	wentThrough(t, incident.Wait(t.Context(), 2*time.Minute, fmt.Sprintf("node %s to be tainted: %v", name, wanted), func(ctx context.Context) error {
		node, err := cluster.CoreV1().Nodes().Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		has := func(key string) bool {
			return slices.ContainsFunc(node.Spec.Taints, func(taint corev1.Taint) bool {
				return taint.Key == key && taint.Effect == corev1.TaintEffectNoSchedule
			})
		}
		if name != incident.Node && !has(othersTaint) { // where the tests' pods run, there is none
			t.Fatalf("somebody else's taint is lost: %v", node.Spec.Taints)
		}
		if has(orphanedTaint) != wanted {
			return fmt.Errorf("its taints are %v", node.Spec.Taints)
		}
		return nil
	}))
}

// awaitNodeEvent waits for an Event on a node that `kubectl describe node` shows.
func awaitNodeEvent(t *testing.T, node, reason, words string) {
	t.Helper()
	wentThrough(t, incident.Wait(t.Context(), 2*time.Minute, "an Event "+reason+" on node "+node, func(context.Context) error {
		for _, event := range events(t, "default", types.UID(node)) {
			if event.Reason == reason && strings.Contains(event.Note, words) {
				return nil
			}
		}
		return errors.New("there is none")
	}))
}
