package e2e

import (
	"context"
	"path/filepath"
	"testing"
)

// upgraded upgrades the release to other values, NAME=VALUE, and waits until only replicas that know them are there.
func upgraded(t *testing.T, values ...string) {
	t.Helper()
	args := []string{"upgrade", "eni-guard", filepath.Join(repo, "charts/eni-guard"), "--reuse-values", "--wait", "--timeout", "2m"}
	for _, value := range values {
		args = append(args, "--set", value)
	}
	// The context of a test has ended when it cleans up.
	if out, err := helm(context.Background(), args...); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	restored(t)
}

// What the guard does with values other than those it is installed with. An upgrade takes long, so one serves several.
func TestOtherValues(t *testing.T) {
	lived := []string{"certificates.authorityValidity=26280h", "certificates.validity=2160h", "certificates.overlap=1h"}
	t.Cleanup(func() { upgraded(t, append(lived, "taintOrphanedNodes=false", "webhook.failurePolicy=Fail")...) })
	// Before the node is tainted, on which nothing is started then.
	ns := moded(t, "off")
	left := &leftover{stuck: stuckFS(t, ns)}
	left.pod = start(t, left.stuck.StuckPod(ns, "payment-0"))
	bound := sleeper(t, namespace(t), "web-0", nil)
	long := content(t, authoritySecret, "signing.crt")

	// The kubelet may need some seconds to give an agent what has changed, so the overlap is 20.
	upgraded(t, "certificates.authorityValidity=180s", "certificates.validity=60s", "certificates.overlap=20s", "taintOrphanedNodes=true")
	leader(t)
	ghost := taintedGhost(t)
	inWebhookLog(t, `"msg":"put the taint on a node"`, ghost)
	t.Run("beside each other", func(t *testing.T) {
		t.Run("certificates rotate under load", func(t *testing.T) {
			t.Parallel()
			rotateUnderLoad(t, long, bound)
		})
		t.Run("a node without an agent is tainted for as long as something is left over there", func(t *testing.T) {
			t.Parallel()
			taintsAGhost(t, ghost)
		})
		t.Run("so is the agent's node", func(t *testing.T) {
			t.Parallel()
			left.isReported(t)
		})
	})
	t.Run("what is left over is reported until it goes", left.isReportedUntilItGoes)
	inWebhookLog(t, `"msg":"took the taint from a node"`, ghost)

	upgraded(t, append(lived, "taintOrphanedNodes=false", "webhook.failurePolicy=Ignore")...)
	awaitTaint(t, ghost, false)
	awaitNodeEvent(t, ghost, "NodeUntainted", "the guard puts no taints on nodes any more")
	t.Run("fails open", failsOpen)
}
