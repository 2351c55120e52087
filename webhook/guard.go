// Package webhook is the admission side of eni-guard. A request goes one way through it: transport (server.go), facts
// (removal.go, rule.go), exemption (exemption.go), the agent's report (guard.go, agents.go), override (override.go),
// decision (decision.go), hold (hold.go), response (response.go, message.go).
package webhook

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/go-logr/logr"
	"github.com/prometheus/client_golang/prometheus"
	admissionv1 "k8s.io/api/admission/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/events"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/eni-guard/eni-guard/internal/sandbox"
)

// asker asks the agent at a node's address; see agents.ask for the contract of its error.
type asker interface {
	ask(ctx context.Context, address string, query sandbox.Query) (sandbox.Report, error)
	// await is ask, but the agent answers only when the pod is released, or after wait.
	await(ctx context.Context, address string, query sandbox.Query, wait time.Duration) (sandbox.Report, error)
}

// policy is what the people who install the guard decide.
type policy struct {
	// mode is that of namespaces without a valid label.
	mode Mode
	// allowWhenNodeIsGone lets a pod go that nobody can be asked about, because the Node object is gone or out of service.
	allowWhenNodeIsGone bool
	// excludedNodes select the nodes that have no agent.
	excludedNodes []labels.Selector
}

// Guard decides about removals of pods.
type Guard struct {
	policy
	// cached reads nodes and namespaces; live reads what may allow a removal, and pods.
	cached, live client.Reader
	agents       asker
	access       accessReviewer
	holds        holder
	events       events.EventRecorder
	decisions    *prometheus.CounterVec
	recent       recentDecisions
	phases       phaseWatch
	now          func() time.Time
}

// review answers one admission request. An error means that the request cannot be judged, because it is not what the
// API server sends about the ways in that the guard watches.
func (g *Guard) review(ctx context.Context, log logr.Logger, request *admissionv1.AdmissionRequest) (*admissionv1.AdmissionResponse, error) {
	r, err := removalOf(request)
	if err != nil {
		return nil, err
	}
	if r.path == PathPhase {
		g.watchPhase(log, r)
		return &admissionv1.AdmissionResponse{Allowed: true}, nil
	}
	d, repeated := g.recent.get(r, g.now())
	if !repeated {
		d = g.judge(ctx, r)
	}
	if d.outcome == Held && r.mustAddFinalizer() && !r.dryRun {
		if err := g.holds.hold(ctx, r.pod, finding(r.pod, d), g.now()); err != nil {
			d.outcome, d.reason, d.holdFailure, repeated = Denied, ReasonHoldFailed, err.Error(), false
		}
	}
	if d.outcome == Overridden && held(r.pod) && !r.dryRun {
		g.holds.freeSoon(log, g.live, r.pod)
	}
	if !repeated {
		g.recent.put(r, d, g.now())
		g.record(log, request.UID, r, d)
	}
	return respond(r, d), nil
}

// record leaves the traces of a decision: a count, a line of the log, an Event.
func (g *Guard) record(log logr.Logger, request types.UID, r *removal, d decision) {
	if !r.dryRun {
		g.decisions.WithLabelValues(string(d.mode), string(d.outcome), string(d.verdict), string(r.path)).Inc()
	}
	log.Info("decision", "request", request, "decision", d.outcome, "reason", d.reason, "verdict", d.verdict, "mode", d.mode,
		"path", r.path, "dryRun", r.dryRun, "user", r.user.Username, "namespace", r.pod.Namespace, "pod", r.pod.Name, "podUID", r.pod.UID,
		"node", r.pod.Spec.NodeName, "podIPs", podIPs(r.pod), "evidence", evidenceWords(d), "override", d.override.reason)
	// Without a UID there is no pod to tell about: ReasonNoSuchPod, ReasonPodUnreadable.
	if d.outcome != Exempt && !r.dryRun && r.pod.UID != "" {
		kind := corev1.EventTypeWarning
		if d.outcome == Allowed {
			kind = corev1.EventTypeNormal
		}
		// Events of one kind about the same two things are put together: with its user, each person's stay apart.
		g.events.Eventf(reference(r.pod), userReference(r.user), kind, eventReasons[d.outcome], string(r.path), "%s", eventNote(r, d))
	}
}

// judge finds out what the decision rests on, and decides.
func (g *Guard) judge(ctx context.Context, r *removal) decision {
	mode := g.mode(ctx, r.pod.Namespace)
	if r.path == PathEviction {
		err := g.live.Get(ctx, client.ObjectKeyFromObject(r.pod), r.pod)
		switch {
		case apierrors.IsNotFound(err):
			// Not left to the API server, which reads the pod by name after this: there may be another one by then.
			return decision{outcome: Denied, verdict: sandbox.NotAsked, reason: ReasonNoSuchPod, situation: situation{mode: mode}}
		case err != nil:
			d := decision{outcome: Denied, verdict: sandbox.Unknown, reason: ReasonPodUnreadable,
				situation: situation{mode: mode, evidence: evidence{failure: fmt.Sprintf("the pod could not be read from the API server: %v", err)}}}
			if r.grace == nil || *r.grace != 0 {
				// Nothing says that this is a removal, so it must not be blocked.
				d.outcome = Exempt
			}
			return d
		}
	}
	if reason, ok := exempt(r, surroundings{mode: mode, excludedNode: g.excluded(ctx, r.pod.Spec.NodeName)}); ok {
		return exemptDecision(mode, reason)
	}
	s := situation{mode: mode, holdable: r.holdable(), evidence: g.evidence(ctx, r.pod, g.agents.ask)}
	s.containersTerminated = r.containersSuffice()
	s.override = authorise(ctx, g.access, overrideOf(r.pod, g.now()), r.user, r.pod)
	return decide(s)
}

// mode is what the label of a namespace says, or the default. What would let removals through does not come from a cache
// that may lag; and where the API server cannot be asked, it may be that the namespace does not want that.
func (g *Guard) mode(ctx context.Context, namespace string) Mode {
	mode, err := g.readMode(ctx, g.cached, namespace)
	if err != nil || mode == ModeAudit || mode == ModeOff {
		mode, err = g.readMode(ctx, g.live, namespace)
	}
	if err != nil {
		return ModeDeny
	}
	return mode
}

// readMode reads the mode of a namespace; the default is that of one that is gone, too.
func (g *Guard) readMode(ctx context.Context, from client.Reader, name string) (Mode, error) {
	namespace := &metav1.PartialObjectMetadata{}
	namespace.SetGroupVersionKind(corev1.SchemeGroupVersion.WithKind("Namespace"))
	if err := from.Get(ctx, types.NamespacedName{Name: name}, namespace); client.IgnoreNotFound(err) != nil {
		return "", err
	}
	// A label of another value is reported by the controller in namespaces.go.
	if mode, err := parseMode(namespace.Labels[ModeLabel]); err == nil {
		return mode, nil
	}
	return g.policy.mode, nil
}

// excluded says whether a node is one of those without an agent.
func (g *Guard) excluded(ctx context.Context, name string) bool {
	if len(g.excludedNodes) == 0 || name == "" {
		return false
	}
	var node corev1.Node
	if err := g.cached.Get(ctx, types.NamespacedName{Name: name}, &node); err != nil {
		return false
	}
	if !selected(g.excludedNodes, &node) {
		return false
	}
	// What lets a pod go does not come from a cache that may lag.
	err := g.live.Get(ctx, types.NamespacedName{Name: name}, &node)
	return err == nil && selected(g.excludedNodes, &node)
}

func selected(selectors []labels.Selector, node *corev1.Node) bool {
	return slices.ContainsFunc(selectors, func(s labels.Selector) bool { return s.Matches(labels.Set(node.Labels)) })
}

// askFunc is one of the ways to ask an agent.
type askFunc func(ctx context.Context, address string, query sandbox.Query) (sandbox.Report, error)

// evidence is what is known about a pod from the agent of its node and from the API server.
func (g *Guard) evidence(ctx context.Context, pod *corev1.Pod, ask askFunc) evidence {
	var e evidence
	var err error
	if e.report, err = g.report(ctx, pod, ask); err != nil {
		e.failure = err.Error()
	}
	if e.report.Verdict() == sandbox.Unknown && g.allowWhenNodeIsGone {
		// Not from the cache: one that lags would call a new node gone, or one back in service out of it. An error here
		// leaves both false, and the removal refused.
		var node corev1.Node
		err := g.live.Get(ctx, types.NamespacedName{Name: pod.Spec.NodeName}, &node)
		e.nodeGone = apierrors.IsNotFound(err)
		e.nodeOutOfService = err == nil && outOfService(&node)
	}
	return e
}

// report asks the agent of the pod's node. The error says, in a sentence, why there is no answer.
func (g *Guard) report(ctx context.Context, pod *corev1.Pod, ask askFunc) (sandbox.Report, error) {
	name := pod.Spec.NodeName
	var node corev1.Node
	if err := g.cached.Get(ctx, types.NamespacedName{Name: name}, &node); err != nil {
		if apierrors.IsNotFound(err) {
			return sandbox.Report{}, fmt.Errorf("node %s is not known", name)
		}
		return sandbox.Report{}, fmt.Errorf("node %s could not be read: %w", name, err)
	}
	address, err := internalAddress(&node)
	if err != nil {
		return sandbox.Report{}, fmt.Errorf("the agent of node %s %w", name, err)
	}
	report, err := ask(ctx, address, query(pod))
	if err != nil {
		return sandbox.Report{}, fmt.Errorf("the agent of node %s %w", name, err)
	}
	return report, nil
}

// outOfService says whether somebody has vouched that the node is shut down
// (https://kubernetes.io/docs/concepts/cluster-administration/node-shutdown/#non-graceful-node-shutdown).
func outOfService(node *corev1.Node) bool {
	for _, taint := range node.Spec.Taints {
		if taint.Key == corev1.TaintNodeOutOfService {
			return true
		}
	}
	return false
}

func internalAddress(node *corev1.Node) (string, error) {
	for _, address := range node.Status.Addresses {
		if address.Type == corev1.NodeInternalIP {
			return address.Address, nil
		}
	}
	return "", errors.New("cannot be reached: the node has no InternalIP")
}
