package e2e

import (
	"testing"

	"github.com/eni-guard/eni-guard/test/e2e/incident"
)

func story(t *testing.T) *incident.Story {
	return &incident.Story{
		Cluster: cluster,
		Tell:    t.Logf,
		Show:    func(command, output string) { t.Logf("$ %s\n%s", command, output) },
	}
}

// An ACK cluster, Terway in ENI mode: a process in state D, a pod that stays Terminating, a force delete, and five minutes
// later a release that fails with "address already in use".
func TestIncidentWithoutTheGuard(t *testing.T) {
	// No other pod may give an address back in between: it would be handed out first.
	if err := removeNamespaces(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := story(t).WithoutGuard(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// The same pod and the same command, where the guard watches.
func TestIncidentWithTheGuard(t *testing.T) {
	if err := story(t).WithGuard(t.Context()); err != nil {
		t.Fatal(err)
	}
}
