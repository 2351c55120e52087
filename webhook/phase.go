package webhook

import (
	"context"
	"time"

	"github.com/go-logr/logr"
	"github.com/prometheus/client_golang/prometheus"
	corev1 "k8s.io/api/core/v1"

	"github.com/eni-guard/eni-guard/internal/sandbox"
)

const (
	// maxPhaseQuestions bounds how many terminal phases are looked into at once.
	maxPhaseQuestions = 64
	// phaseTimeout bounds how long looking into one may take.
	phaseTimeout = 30 * time.Second
)

// phaseWatch reports terminal phases that somebody other than a kubelet writes while the pod is bound: some versions of
// Terway free the address of a pod by its phase alone. It is no removal, so it is not refused, and nobody waits for it.
type phaseWatch struct {
	places  chan struct{}
	reports prometheus.Counter
}

func newPhaseWatch() phaseWatch {
	return phaseWatch{
		places: make(chan struct{}, maxPhaseQuestions),
		reports: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "eni_guard_terminal_phase_while_bound_total",
			Help: "Pods that were given a terminal phase by somebody other than their kubelet while they were still alive on their node.",
		}),
	}
}

// watchPhase looks, after the request, whether the pod is bound, and reports it if so.
func (g *Guard) watchPhase(log logr.Logger, r *removal) {
	log = log.WithValues("user", r.user.Username, "namespace", r.pod.Namespace, "pod", r.pod.Name, "podUID", r.pod.UID, "node", r.pod.Spec.NodeName)
	if r.dryRun || r.pod.Spec.NodeName == "" || r.pod.Spec.HostNetwork || ignoredSinceCreation(r.pod) {
		return
	}
	select {
	case g.phases.places <- struct{}{}:
	default:
		log.Info("too many terminal phases at once: one was not looked into", "limit", maxPhaseQuestions)
		return
	}
	go func() {
		defer func() { <-g.phases.places }()
		ctx, cancel := context.WithTimeout(context.Background(), phaseTimeout)
		defer cancel()
		if mode := g.mode(ctx, r.pod.Namespace); mode == ModeOff || g.excluded(ctx, r.pod.Spec.NodeName) {
			return
		}
		report, err := g.report(ctx, r.pod, g.agents.ask)
		if err != nil || report.Verdict() != sandbox.Bound {
			return
		}
		d := decision{verdict: sandbox.Bound, reason: ReasonBound, situation: situation{evidence: evidence{report: report}}}
		g.phases.reports.Inc()
		log.Info("terminal phase while bound", "evidence", evidenceWords(d))
		note := clip("user "+r.user.Username+" has written a terminal phase, but "+finding(r.pod, d), maxEventNote)
		// Events about the same thing are put together, so that of the node names the pod: a second pod is another thing.
		g.events.Eventf(reference(r.pod), nil, corev1.EventTypeWarning, "TerminalPhaseWhileBound", "WritePhase", "%s", note)
		g.events.Eventf(nodeReference(r.pod.Spec.NodeName), reference(r.pod), corev1.EventTypeWarning, "TerminalPhaseWhileBound", "WritePhase", "%s", note)
	}()
}
