package webhook

import (
	"context"
	"errors"
	"reflect"
	"testing"
	"time"

	"github.com/go-logr/logr/funcr"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/events"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"
	"sigs.k8s.io/controller-runtime/pkg/event"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/eni-guard/eni-guard/internal/sandbox"
)

var (
	ourTaint   = corev1.Taint{Key: "eni-guard.io/orphaned-sandbox", Effect: corev1.TaintEffectNoSchedule}
	evictTaint = corev1.Taint{Key: "eni-guard.io/orphaned-sandbox", Effect: corev1.TaintEffectNoExecute}
	otherTaint = corev1.Taint{Key: "example.com/gpu", Value: "a100", Effect: corev1.TaintEffectNoSchedule}
)

// says is a node about whose leftovers the agent says this.
func says(status corev1.ConditionStatus) func(*corev1.Node) {
	return func(n *corev1.Node) {
		n.Status.Conditions = []corev1.NodeCondition{
			{Type: corev1.NodeReady, Status: corev1.ConditionTrue},
			{Type: "OrphanedSandbox", Status: status, Reason: "Leftovers", Message: "sandbox 0123456789abc of pod shop/web-0 is left"},
		}
	}
}

func with(taints ...corev1.Taint) func(*corev1.Node) {
	return func(n *corev1.Node) { n.Spec.Taints = taints }
}

func TestWantsTaint(t *testing.T) {
	long := func(n *corev1.Node) {
		n.Status.Conditions[1].LastHeartbeatTime = metav1.NewTime(time.Date(2020, 1, 2, 3, 4, 5, 0, time.UTC))
	}
	for name, c := range map[string]struct {
		node *corev1.Node
		// Whether it should have the taint where nodes are tainted; where they are not, none should.
		want bool
	}{
		"something is left":                                {nodeA(says("True")), true},
		"something is left, the taint is there":            {nodeA(says("True"), with(otherTaint, ourTaint)), true},
		"something is left, said long ago":                 {nodeA(says("True"), long), true},
		"nothing is left":                                  {nodeA(says("False")), false},
		"nothing is left, the taint is there":              {nodeA(says("False"), with(ourTaint)), false},
		"nothing is left, said long ago":                   {nodeA(says("False"), long, with(ourTaint)), false},
		"the agent could not look":                         {nodeA(says("Unknown")), false},
		"the agent could not look, the taint is there":     {nodeA(says("Unknown"), with(ourTaint)), true},
		"a status that is none":                            {nodeA(says("true")), false},
		"a status that is none, the taint is there":        {nodeA(says("true"), with(ourTaint)), true},
		"no agent has said anything":                       {nodeA(), false},
		"no agent has said anything, the taint is there":   {nodeA(with(ourTaint)), false},
		"the agent could not look, the key of somebody's":  {nodeA(says("Unknown"), with(evictTaint)), false},
		"another condition is True, that of leftovers not": {nodeA(says("False"), with(otherTaint)), false},
	} {
		if got := wantsTaint(c.node, true); got != c.want {
			t.Errorf("%s: %v, want %v", name, got, c.want)
		}
		if wantsTaint(c.node, false) {
			t.Errorf("%s, switched off: true", name)
		}
	}
}

// taintTest is a controller that taints nodes, and what the API server has.
type taintTest struct {
	*taintController
	api    client.WithWatch
	events *events.FakeRecorder
	lines  []string
}

func newTaintTest(objects ...client.Object) *taintTest {
	c := &taintTest{api: fake.NewClientBuilder().WithObjects(objects...).Build(), events: events.NewFakeRecorder(10)}
	c.taintController = &taintController{
		enabled: true, nodes: c.api, client: c.api, events: c.events,
		log: funcr.New(func(_, args string) { c.lines = append(c.lines, args) }, funcr.Options{}),
		now: func() time.Time { return testTime }, changed: map[string]time.Time{},
	}
	return c
}

func (c *taintTest) reconcile(t *testing.T) (reconcile.Result, error) {
	t.Helper()
	return c.Reconcile(t.Context(), reconcile.Request{NamespacedName: client.ObjectKey{Name: "node-a"}})
}

// expect fails the test unless node-a has these taints, in this order, and there is this Event and one line with it; no Event
// and no line, if it is empty.
func (c *taintTest) expect(t *testing.T, event string, taints ...corev1.Taint) {
	t.Helper()
	node := &corev1.Node{}
	if err := c.api.Get(t.Context(), client.ObjectKey{Name: "node-a"}, node); err != nil {
		t.Fatal(err)
	}
	if len(node.Spec.Taints)+len(taints) > 0 && !reflect.DeepEqual(node.Spec.Taints, taints) {
		t.Errorf("the taints are %v, want %v", node.Spec.Taints, taints)
	}
	got := ""
	if len(c.events.Events) > 0 {
		got = <-c.events.Events
	}
	if got != event || len(c.events.Events) > 0 {
		t.Errorf("Event %q, want %q; %d more", got, event, len(c.events.Events))
	}
	if (len(c.lines) == 1) != (event != "") || len(c.lines) > 1 {
		t.Errorf("the log: %q", c.lines)
	}
	c.lines = nil
}

const (
	nodeTainted = "Warning NodeTainted taint eni-guard.io/orphaned-sandbox:NoSchedule keeps new pods away, because one could be given " +
		"an address that is still in use here: see the condition OrphanedSandbox"
	nodeUntainted  = "Normal NodeUntainted taint eni-guard.io/orphaned-sandbox:NoSchedule is taken away: nothing is reported to be left over any more"
	nodeNotTainted = "Normal NodeUntainted taint eni-guard.io/orphaned-sandbox:NoSchedule is taken away: the guard puts no taints on nodes any more"
)

func TestReconcileANode(t *testing.T) {
	for name, c := range map[string]struct {
		node    *corev1.Node
		enabled bool
		event   string
		taints  []corev1.Taint
	}{
		"something is left":                          {nodeA(says("True")), true, nodeTainted, []corev1.Taint{ourTaint}},
		"something is left, there are others":        {nodeA(says("True"), with(otherTaint, evictTaint)), true, nodeTainted, []corev1.Taint{otherTaint, evictTaint, ourTaint}},
		"something is left, the taint is there":      {nodeA(says("True"), with(ourTaint)), true, "", []corev1.Taint{ourTaint}},
		"nothing is left":                            {nodeA(says("False"), with(ourTaint)), true, nodeUntainted, nil},
		"nothing is left, there are others":          {nodeA(says("False"), with(otherTaint, ourTaint, evictTaint)), true, nodeUntainted, []corev1.Taint{otherTaint, evictTaint}},
		"nothing is left, no taint":                  {nodeA(says("False"), with(otherTaint)), true, "", []corev1.Taint{otherTaint}},
		"the condition is gone":                      {nodeA(with(ourTaint)), true, nodeUntainted, nil},
		"it cannot be told":                          {nodeA(says("Unknown"), with(otherTaint)), true, "", []corev1.Taint{otherTaint}},
		"it cannot be told any more":                 {nodeA(says("Unknown"), with(ourTaint)), true, "", []corev1.Taint{ourTaint}},
		"switched off, something is left":            {nodeA(says("True")), false, "", nil},
		"switched off, the taint is there":           {nodeA(says("True"), with(ourTaint, otherTaint)), false, nodeNotTainted, []corev1.Taint{otherTaint}},
		"switched off, it cannot be told any more":   {nodeA(says("Unknown"), with(ourTaint)), false, nodeNotTainted, nil},
		"switched off, the key of somebody's effect": {nodeA(says("True"), with(evictTaint)), false, "", []corev1.Taint{evictTaint}},
	} {
		t.Run(name, func(t *testing.T) {
			test := newTaintTest(c.node)
			test.enabled = c.enabled
			if result, err := test.reconcile(t); err != nil || !result.IsZero() {
				t.Errorf("again after %s (%v)", result.RequeueAfter, err)
			}
			test.expect(t, c.event, c.taints...)
		})
	}
}

// Whatever it is that comes and goes, the agent's condition or somebody who takes the taint away, it makes no storm.
func TestATaintDoesNotFlap(t *testing.T) {
	now := testTime
	c := newTaintTest(nodeA(says("True")))
	c.now = func() time.Time { return now }
	if _, err := c.reconcile(t); err != nil {
		t.Fatal(err)
	}
	c.expect(t, nodeTainted, ourTaint)
	node := nodeA(says("True"))
	if err := c.api.Get(t.Context(), client.ObjectKeyFromObject(node), node); err != nil {
		t.Fatal(err)
	}
	node.Spec.Taints = nil
	if err := c.api.Update(t.Context(), node); err != nil {
		t.Fatal(err)
	}
	now = now.Add(taintPause / 3)
	if result, err := c.reconcile(t); err != nil || result.RequeueAfter != taintPause*2/3 {
		t.Errorf("again after %s (%v)", result.RequeueAfter, err)
	}
	c.expect(t, "")
	now = now.Add(taintPause * 2 / 3)
	if result, err := c.reconcile(t); err != nil || !result.IsZero() {
		t.Errorf("again after %s (%v)", result.RequeueAfter, err)
	}
	c.expect(t, nodeTainted, ourTaint)
}

// A taint that somebody adds at the same time is not lost.
func TestANodeThatChangesMeanwhileIsLookedAtAgain(t *testing.T) {
	c := newTaintTest(nodeA(says("True")))
	raced := false
	c.client = interceptor.NewClient(c.api, interceptor.Funcs{
		Patch: func(ctx context.Context, api client.WithWatch, object client.Object, patch client.Patch, options ...client.PatchOption) error {
			if !raced {
				raced = true
				node := &corev1.Node{}
				if err := api.Get(ctx, client.ObjectKeyFromObject(object), node); err != nil {
					return err
				}
				node.Spec.Taints = []corev1.Taint{otherTaint}
				if err := api.Update(ctx, node); err != nil {
					return err
				}
			}
			return api.Patch(ctx, object, patch, options...)
		},
	})
	if result, err := c.reconcile(t); err != nil || result.RequeueAfter != conflictRetry {
		t.Errorf("again after %s (%v)", result.RequeueAfter, err)
	}
	c.expect(t, "", otherTaint)
	if result, err := c.reconcile(t); err != nil || !result.IsZero() {
		t.Errorf("again after %s (%v)", result.RequeueAfter, err)
	}
	c.expect(t, nodeTainted, otherTaint, ourTaint)
}

func TestReconcileANodeThatIsGone(t *testing.T) {
	t.Run("before", func(t *testing.T) {
		c := newTaintTest()
		c.changed["node-a"] = testTime
		if result, err := c.reconcile(t); err != nil || !result.IsZero() || len(c.changed) > 0 {
			t.Errorf("again after %s (%v), known %v", result.RequeueAfter, err, c.changed)
		}
	})
	t.Run("meanwhile", func(t *testing.T) {
		node := nodeA(says("True"))
		c := newTaintTest(node)
		c.client = interceptor.NewClient(c.api, interceptor.Funcs{
			Patch: func(ctx context.Context, api client.WithWatch, object client.Object, patch client.Patch, options ...client.PatchOption) error {
				return errors.Join(api.Delete(ctx, node), api.Patch(ctx, object, patch, options...))
			},
		})
		if result, err := c.reconcile(t); err != nil || !result.IsZero() || len(c.lines)+len(c.events.Events) > 0 {
			t.Errorf("again after %s (%v), the log: %q", result.RequeueAfter, err, c.lines)
		}
	})
}

// An error is tried again with a growing pause, and nothing is said to be done.
func TestReconcileANodeThatCannotBeChanged(t *testing.T) {
	c := newTaintTest(nodeA(says("True")))
	refusal := apierrors.NewForbidden(corev1.Resource("nodes"), "node-a", errors.New("no"))
	c.client = interceptor.NewClient(c.api, interceptor.Funcs{
		Patch: func(context.Context, client.WithWatch, client.Object, client.Patch, ...client.PatchOption) error {
			return refusal
		},
	})
	if _, err := c.reconcile(t); !errors.Is(err, refusal) {
		t.Errorf("error %v", err)
	}
	c.expect(t, "")
}

// What the controller is woken by, and what not: kubelets write the status of every node all the time.
func TestChangesTheTaint(t *testing.T) {
	heartbeat := func(n *corev1.Node) {
		n.Status.Conditions[1].LastHeartbeatTime, n.Status.Conditions[1].Message = metav1.NewTime(testTime), "something else is left"
	}
	for name, c := range map[string]struct {
		before, after *corev1.Node
		want          bool
	}{
		"a leftover":            {nodeA(says("False")), nodeA(says("True")), true},
		"the first word of it":  {nodeA(), nodeA(says("True")), true},
		"the taint is taken":    {nodeA(says("True"), with(ourTaint)), nodeA(says("True")), true},
		"another taint":         {nodeA(says("True"), with(ourTaint)), nodeA(says("True"), with(ourTaint, otherTaint)), false},
		"another message":       {nodeA(says("True")), nodeA(says("True"), heartbeat), false},
		"nothing has to change": {nodeA(), nodeA(), false},
	} {
		if got := changesTheTaint.Update(event.UpdateEvent{ObjectOld: c.before, ObjectNew: c.after}); got != c.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}

// The guard's own taint says nothing to the guard about whether the node is lost.
func TestTheTaintIsNoSignOfALostNode(t *testing.T) {
	if outOfService(nodeA(with(ourTaint))) {
		t.Errorf("a node with %s is out of service", sandbox.OrphanedTaint)
	}
}

// What the controller needs is in the cache, and nothing else of the conditions, which every node has a dozen of.
func TestTrimmedNodesKeepTheConditionOfLeftovers(t *testing.T) {
	for name, c := range map[string]struct {
		node *corev1.Node
		want int
	}{
		"an agent that has spoken":     {nodeA(says("True")), 1},
		"an agent that has not so far": {nodeA(func(n *corev1.Node) { n.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady}} }), 0},
	} {
		kept, err := trimNodes(nil)(c.node)
		if err != nil {
			t.Fatal(err)
		}
		trimmed := kept.(*corev1.Node)
		if len(trimmed.Status.Conditions) != c.want || leftovers(trimmed) != leftovers(c.node) {
			t.Errorf("%s: %v", name, trimmed.Status.Conditions)
		}
	}
}
