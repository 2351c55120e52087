package webhook

import (
	"context"
	"slices"
	"time"

	"github.com/go-logr/logr"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/client-go/tools/events"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/event"
	"sigs.k8s.io/controller-runtime/pkg/predicate"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/eni-guard/eni-guard/internal/sandbox"
)

// taintPause is the least time between two changes of one node's taint, so that neither a condition that comes and goes
// nor somebody else who takes the taint away each time makes a storm of writes.
const taintPause = 30 * time.Second

// taintController keeps new pods away from nodes with leftovers, or, where enabled is false, takes away the taints that it
// has put there before. It runs in one replica, the leader.
type taintController struct {
	enabled bool
	nodes   client.Reader // cached
	client  client.Client
	events  events.EventRecorder
	log     logr.Logger
	now     func() time.Time
	// changed says when a node's taint was last changed. One node is looked at after the other, so it needs no lock.
	changed map[string]time.Time
}

func (c *taintController) setUp(manager ctrl.Manager) error {
	return ctrl.NewControllerManagedBy(manager).Named("node-taints").For(&corev1.Node{}, builder.WithPredicates(changesTheTaint)).
		Complete(c)
}

// changesTheTaint leaves out what kubelets write all the time.
var changesTheTaint = predicate.Funcs{UpdateFunc: func(e event.UpdateEvent) bool {
	before, isNode := e.ObjectOld.(*corev1.Node)
	after, isNodeToo := e.ObjectNew.(*corev1.Node)
	return isNode && isNodeToo && (leftovers(before).Status != leftovers(after).Status || tainted(before) != tainted(after))
}}

// Reconcile puts the taint on one node, or takes it away.
func (c *taintController) Reconcile(ctx context.Context, request reconcile.Request) (reconcile.Result, error) {
	node := &corev1.Node{}
	if err := c.nodes.Get(ctx, request.NamespacedName, node); err != nil {
		if apierrors.IsNotFound(err) {
			delete(c.changed, request.Name)
		}
		return reconcile.Result{}, client.IgnoreNotFound(err)
	}
	want := wantsTaint(node, c.enabled)
	if want == tainted(node) {
		return reconcile.Result{}, nil
	}
	if pause := taintPause - c.now().Sub(c.changed[node.Name]); pause > 0 {
		return reconcile.Result{RequeueAfter: pause}, nil
	}
	found := leftovers(node)
	err := setTaint(ctx, c.client, node, want)
	if apierrors.IsConflict(err) {
		return reconcile.Result{RequeueAfter: conflictRetry}, nil
	}
	if err != nil {
		return reconcile.Result{}, client.IgnoreNotFound(err)
	}
	c.changed[node.Name] = c.now()
	c.tell(node.Name, want, found)
	return reconcile.Result{}, nil
}

func (c *taintController) tell(node string, put bool, found corev1.NodeCondition) {
	if put {
		c.log.Info("put the taint on a node", "node", node, "taint", taintWords, "reason", found.Reason, "leftovers", found.Message)
		// Not what is left: Events about one node are one series, with the words of the first.
		c.events.Eventf(nodeReference(node), nil, corev1.EventTypeWarning, "NodeTainted", "Taint",
			"taint %s keeps new pods away, because one could be given an address that is still in use here: see the condition %s", taintWords, sandbox.OrphanedCondition)
		return
	}
	why := "nothing is reported to be left over any more"
	if !c.enabled {
		why = "the guard puts no taints on nodes any more"
	}
	c.log.Info("took the taint from a node", "node", node, "taint", taintWords, "because", why)
	c.events.Eventf(nodeReference(node), nil, corev1.EventTypeNormal, "NodeUntainted", "Untaint", "taint %s is taken away: %s", taintWords, why)
}

// wantsTaint says whether a node should have the taint. One whose agent could not look everywhere stays as it is: to put the
// taint there would take a node out of service over a runtime that hangs, and to take it away would need to know that
// nothing is left. A condition that is old, because the agent is away, counts as if it were new: leftovers do not go by
// themselves, and what has happened since, the agent tells when it is back. Without any condition, nothing is known to be
// left over.
func wantsTaint(node *corev1.Node, enabled bool) bool {
	if !enabled {
		return false
	}
	switch leftovers(node).Status {
	case corev1.ConditionTrue:
		return true
	case corev1.ConditionFalse, "":
		return false
	default:
		return tainted(node)
	}
}

// leftovers is what the agent says is left on its node; the zero value if it has said nothing.
func leftovers(node *corev1.Node) corev1.NodeCondition {
	for _, condition := range node.Status.Conditions {
		if condition.Type == sandbox.OrphanedCondition {
			return condition
		}
	}
	return corev1.NodeCondition{}
}

const taintWords = sandbox.OrphanedTaint + ":" + string(corev1.TaintEffectNoSchedule)

// guardTaint recognises the guard's taint. The API server takes each pair of key and effect once; what people put there
// with another effect is theirs.
func guardTaint(taint corev1.Taint) bool {
	return taint.Key == sandbox.OrphanedTaint && taint.Effect == corev1.TaintEffectNoSchedule
}

func tainted(node *corev1.Node) bool { return slices.ContainsFunc(node.Spec.Taints, guardTaint) }

// setTaint puts the taint on a node as it was read, or takes it away. The list of taints is written as a whole, so that a node
// that has changed since is a conflict: somebody else's taint may be among the changes.
func setTaint(ctx context.Context, api client.Client, node *corev1.Node, want bool) error {
	read := client.MergeFromWithOptions(node.DeepCopy(), client.MergeFromWithOptimisticLock{})
	node.Spec.Taints = slices.DeleteFunc(node.Spec.Taints, guardTaint)
	if want {
		node.Spec.Taints = append(node.Spec.Taints, corev1.Taint{Key: sandbox.OrphanedTaint, Effect: corev1.TaintEffectNoSchedule})
	}
	return api.Patch(ctx, node, read)
}
