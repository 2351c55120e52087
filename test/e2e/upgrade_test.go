package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/eni-guard/eni-guard/test/e2e/incident"
)

// fromThePreviousChart installs the previous chart where nothing is installed, upgrades it, and rolls back, while pods are deleted
// by force and gracefully all the time. The image is today's in all three: what is tested is the chart.
func fromThePreviousChart(t *testing.T) {
	defer func() {
		// Without hooks, because what they free has been freed below, or the test has failed.
		if out, err := helm(context.Background(), "uninstall", "eni-guard", "--no-hooks", "--wait", "--timeout", "2m"); err != nil {
			t.Errorf("%v\n%s", err, out)
		}
	}()
	mustHelm(t, "install", "eni-guard", "testdata/previous-chart.tgz", "--timeout", "2m",
		"--set-string", "image.tag="+imageTag(t), "--set", "agent.criSocket=/run/eni-guard-cluster/containerd.sock")
	letAgentsRead(t)
	restored(t)
	bound := sleeper(t, moded(t, "deny"), "web-0", nil)
	refused(t, forceDelete(t, bound), "is still alive on node node-1")
	holding := moded(t, "hold")
	stuck := stuckFS(t, holding)
	first, _ := heldStuckPod(t, stuck, holding, "payment-0")

	t.Run("upgrade", func(t *testing.T) {
		forced, graceful := startDeletes(t, bound, func(err error) error {
			// Agents are replaced too, and meanwhile the guard cannot tell.
			if strings.Contains(fmt.Sprint(err), "denied the request: cannot tell whether pod ") {
				return nil
			}
			return answered(err)
		}), startGracefulDeletes(t, bound.Namespace)
		mustHelm(t, "upgrade", "eni-guard", filepath.Join(repo, "charts/eni-guard"), "--reset-then-reuse-values", "--wait", "--timeout", "2m")
		takenOver(t)
		theGuardIsBack(t, bound)
		nothingWrong(t, forced, graceful)
	})

	t.Run("rollback", func(t *testing.T) {
		// Old certificates and the authority that they are judged by come back at different moments: so who refuses does not matter.
		forced, graceful := startDeletes(t, bound, func(err error) error {
			if text := fmt.Sprint(err); strings.Contains(text, "denied the request: ") || strings.Contains(text, `failed calling webhook "force-delete.eni-guard.io"`) {
				return nil
			}
			return answered(err)
		}), startGracefulDeletes(t, bound.Namespace)
		mustHelm(t, "rollback", "eni-guard", "--force-conflicts", "--timeout", "2m")
		letAgentsRead(t)
		theGuardIsBack(t, bound)
		nothingWrong(t, forced, graceful)
	})

	kept(t, bound)
	stillHeld(t, first)
	// The one that was held before the upgrade goes when its node lets go of it.
	wentThrough(t, stuck.Release())
	wentThrough(t, cluster.AwaitGone(t.Context(), first))
	nothingHeld(t)
}

// imageTag is the tag of the image that `make install` has loaded into the cluster.
func imageTag(t *testing.T) string {
	t.Helper()
	tag, err := os.ReadFile(filepath.Join(repo, "dist/eni-guard.tag"))
	wentThrough(t, err)
	return strings.TrimSpace(string(tag))
}

func mustHelm(t *testing.T, args ...string) {
	t.Helper()
	if out, err := helm(t.Context(), args...); err != nil {
		t.Fatalf("helm %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

// letAgentsRead gives agents of the previous chart a token. Those of its own image did not talk to the API server; today's do not
// start without one. They get no right by it.
func letAgentsRead(t *testing.T) {
	t.Helper()
	kubectl(t, incident.GuardNamespace, "patch", "daemonset", "eni-guard-agent", "-p", `{"spec":{"template":{"spec":{"automountServiceAccountToken":true}}}}`)
}

// takenOver waits until the webhook has made an authority of its own beside that of the chart, and everybody is to trust both.
func takenOver(t *testing.T) {
	t.Helper()
	wentThrough(t, incident.Wait(t.Context(), 2*time.Minute, "the webhook to take over the certificates", func(ctx context.Context) error {
		authority, err := guardSecret(ctx, authoritySecret)
		if err != nil {
			return err
		}
		next := authority.Data["next.crt"]
		bundle, err := trustedBundle(ctx)
		if err == nil && (len(next) == 0 || !bytes.Contains(bundle, next) || bytes.Equal(bundle, next)) {
			err = errors.New("the API server is not to trust both authorities")
		}
		for _, name := range []string{servingSecret, askingSecret, agentSecret} {
			secret, getting := guardSecret(ctx, name)
			if getting == nil && !bytes.Equal(secret.Data["ca.crt"], bundle) {
				getting = fmt.Errorf("Secret %s does not have both authorities", name)
			}
			err = errors.Join(err, getting)
		}
		return err
	}))
}

// theGuardIsBack waits until all of the guard has been replaced, and looks at the node again.
func theGuardIsBack(t *testing.T, bound *corev1.Pod) {
	t.Helper()
	kubectl(t, incident.GuardNamespace, "rollout", "status", "deployment/eni-guard-webhook", "--timeout=2m")
	kubectl(t, incident.GuardNamespace, "rollout", "status", "daemonset/eni-guard-agent", "--timeout=2m")
	restored(t)
	inARow := 0
	wentThrough(t, incident.Wait(t.Context(), 4*time.Minute, "the guard to look at the node again", func(ctx context.Context) error {
		err := answered(cluster.CoreV1().Pods(bound.Namespace).Delete(ctx, bound.Name, metav1.DeleteOptions{GracePeriodSeconds: new(int64(0)), DryRun: []string{metav1.DryRunAll}}))
		if inARow++; err != nil {
			inARow = 0
		}
		// Both replicas, over connections of before and of now.
		if err == nil && inARow < 20 {
			err = fmt.Errorf("it has done so %d times in a row", inARow)
		}
		return err
	}))
}

// startDeletes deletes a bound pod by force, again and again, in earnest. wrong says what is wrong with an answer.
func startDeletes(t *testing.T, bound *corev1.Pod, wrong func(error) error) *load {
	return startCalls(t, 4, func(ctx context.Context) error {
		return wrong(cluster.CoreV1().Pods(bound.Namespace).Delete(ctx, bound.Name, forced))
	})
}

// startGracefulDeletes starts pods, deletes them, and waits until they are gone: nothing of the guard may be in the way of that.
func startGracefulDeletes(t *testing.T, ns string) *load {
	return startCalls(t, 2, func(ctx context.Context) error {
		pod := incident.Pod(ns, "", []string{"sleep", "86400"}, func(p *corev1.Pod) { p.GenerateName = "gone-" })
		started, err := cluster.Start(ctx, pod)
		if err != nil {
			return err
		}
		if err := plainDelete(ctx, cluster, started); err != nil {
			return err
		}
		return cluster.AwaitGone(ctx, started)
	})
}

// nothingWrong ends both, and fails the test if a forced delete was answered wrongly, or a graceful one did not go through.
func nothingWrong(t *testing.T, forced, graceful *load) {
	t.Helper()
	refusals, wrong := forced.end()
	deletes, failed := graceful.end()
	t.Logf("%d forced deletes, %d answered wrongly; %d graceful ones, %d failed", refusals, len(wrong), deletes, len(failed))
	if refusals < 50 || deletes < 2 {
		t.Error("that is no load")
	}
	for _, err := range append(wrong, failed...) {
		t.Error(err)
	}
}
