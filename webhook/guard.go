// Package webhook is the admission side of eni-guard. A request goes one way through it: transport (server.go), facts
// (removal.go), exemption (exemption.go), the agent's report (guard.go, agents.go), decision (decision.go), response
// (response.go, message.go).
package webhook

import (
	"context"
	"errors"
	"fmt"

	"github.com/go-logr/logr"
	"github.com/prometheus/client_golang/prometheus"
	admissionv1 "k8s.io/api/admission/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/eni-guard/eni-guard/internal/sandbox"
)

// asker asks the agent at a node's address; see agents.ask for the contract of its error.
type asker interface {
	ask(ctx context.Context, address string, query sandbox.Query) (sandbox.Report, error)
}

// Guard decides about removals of pods.
type Guard struct {
	// nodes reads Node objects: cached for the address of a node, live for what may allow a removal.
	nodes, liveNodes client.Reader
	agents           asker
	decisions        *prometheus.CounterVec
}

// review answers one admission request. An error means that the request cannot be judged, because it is not what the
// API server sends for a DELETE of pods.
func (g *Guard) review(ctx context.Context, log logr.Logger, request *admissionv1.AdmissionRequest) (*admissionv1.AdmissionResponse, error) {
	r, err := removalOf(request)
	if err != nil {
		return nil, err
	}
	d := g.decide(ctx, r)
	g.decisions.WithLabelValues(string(d.mode), string(d.outcome), string(d.verdict), string(r.path)).Inc()
	log.Info("decision", "request", request.UID, "decision", d.outcome, "reason", d.reason, "verdict", d.verdict, "mode", d.mode,
		"path", r.path, "dryRun", r.dryRun, "user", r.user.Username, "namespace", r.pod.Namespace, "pod", r.pod.Name, "podUID", r.pod.UID,
		"node", r.pod.Spec.NodeName, "podIPs", podIPs(r.pod), "evidence", evidenceWords(d))
	return respond(r, d), nil
}

func (g *Guard) decide(ctx context.Context, r *removal) decision {
	if reason, ok := exempt(r); ok {
		return exemptDecision(reason)
	}
	e := evidence{containersTerminated: containersTerminated(r.pod)}
	var err error
	if e.report, err = g.report(ctx, r); err != nil {
		e.failure = err.Error()
	}
	if e.report.Verdict() == sandbox.Unknown {
		// Not from the cache: one that lags would call a new node gone, or one back in service out of it. An error here
		// leaves both false, and the removal refused.
		var node corev1.Node
		err := g.liveNodes.Get(ctx, types.NamespacedName{Name: r.pod.Spec.NodeName}, &node)
		e.nodeGone = apierrors.IsNotFound(err)
		e.nodeOutOfService = err == nil && outOfService(&node)
	}
	return decide(e)
}

// report asks the agent of the pod's node. The error says, in a sentence, why there is no answer.
func (g *Guard) report(ctx context.Context, r *removal) (sandbox.Report, error) {
	name := r.pod.Spec.NodeName
	var node corev1.Node
	if err := g.nodes.Get(ctx, types.NamespacedName{Name: name}, &node); err != nil {
		if apierrors.IsNotFound(err) {
			return sandbox.Report{}, fmt.Errorf("node %s is not known", name)
		}
		return sandbox.Report{}, fmt.Errorf("node %s could not be read: %w", name, err)
	}
	address, err := internalAddress(&node)
	if err != nil {
		return sandbox.Report{}, fmt.Errorf("the agent of node %s %w", name, err)
	}
	report, err := g.agents.ask(ctx, address, query(r.pod))
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
