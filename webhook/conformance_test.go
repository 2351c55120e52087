//go:build conformance

package webhook

import (
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// TestConformance holds the rule (rule.go), the CEL of the chart's configurations, and what removalOf reads, against a
// real API server: it puts pods into every state, sends every kind of request, and compares what becomes of the pod, and
// which calls were made about it, with what the rule says.
func TestConformance(t *testing.T) {
	s := startAPIServer(t)
	t.Logf("API server %s", s.version)
	s.prepare(t)
	s.grantRights(t)
	s.install(t)
	s.waitForAdmission(t)
	t.Run("removals", s.testRemovals)
	t.Run("updates", s.testUpdates)
	t.Run("kubelets", s.testKubelets)
	t.Run("overrides", s.testOverrides)
}

// The namespaces that the tests use. A namespace with a budget has one for the pods of each worker, because the API server
// writes every eviction into the budget, and two at once are in each other's way.
const (
	noBudget       = "without-budget"
	budgetAllows   = "with-budget-that-allows"
	budgetBlocks   = "with-budget-that-blocks"
	callsNamespace = "calls"

	workers     = 8
	workerLabel = "worker"
)

func (s *apiServer) prepare(t *testing.T) {
	t.Helper()
	for _, name := range []string{noBudget, budgetAllows, budgetBlocks, callsNamespace} {
		namespace := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}}
		if _, err := s.CoreV1().Namespaces().Create(t.Context(), namespace, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	for namespace, allowed := range map[string]int32{budgetAllows: 1_000_000, budgetBlocks: 0} {
		for worker := range workers {
			one := intstr.FromInt32(1)
			budgets := s.PolicyV1().PodDisruptionBudgets(namespace)
			budget, err := budgets.Create(t.Context(), &policyv1.PodDisruptionBudget{
				ObjectMeta: metav1.ObjectMeta{Name: "worker-" + strconv.Itoa(worker)},
				Spec: policyv1.PodDisruptionBudgetSpec{
					MinAvailable: &one,
					Selector:     &metav1.LabelSelector{MatchLabels: map[string]string{workerLabel: strconv.Itoa(worker)}},
				},
			}, metav1.CreateOptions{})
			if err != nil {
				t.Fatal(err)
			}
			budget.Status = policyv1.PodDisruptionBudgetStatus{
				ObservedGeneration: budget.Generation, DisruptionsAllowed: allowed,
				CurrentHealthy: allowed + 1, DesiredHealthy: 1, ExpectedPods: allowed + 1,
			}
			if _, err := budgets.UpdateStatus(t.Context(), budget, metav1.UpdateOptions{}); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// waitForAdmission returns when all configurations, the policy and the users' rights are in force.
func (s *apiServer) waitForAdmission(t *testing.T) {
	t.Helper()
	plain, overridden := storedPod(callsNamespace, "probe"), storedPod(callsNamespace, "probe-overridden")
	overridden.Annotations = map[string]string{OverrideAnnotation: "a probe"}
	s.store(t, plain, overridden)
	await(t, "the configurations, the policy and the users' rights to come into force", func() bool {
		for _, pod := range []*corev1.Pod{plain, overridden} {
			r := deletion(PathDelete, 0)(pod)
			r.user, r.query["dryRun"], r.query["gracePeriodSeconds"], r.body = bob.name, metav1.DryRunAll, "0", nil
			// Refused as long as bob has no right to delete.
			_, _ = s.send(t.Context(), r)
		}
		return len(s.calls.of(plain, failClosed)) > 0 && len(s.calls.of(plain, unfiltered)) > 0 &&
			len(s.calls.of(overridden, failOpen)) > 0 && s.overridesInAudit(t)[overridden.Name] != ""
	})
}

var dryRunAll = []string{metav1.DryRunAll}

// storedPod is a running pod, complete as the API server stores it.
func storedPod(namespace, name string, change ...func(*corev1.Pod)) *corev1.Pod {
	pod := runningPod(change...)
	pod.TypeMeta = metav1.TypeMeta{APIVersion: "v1", Kind: "Pod"}
	pod.Namespace, pod.Name, pod.UID = namespace, name, types.UID("uid-of-"+namespace+"-"+name)
	pod.CreationTimestamp = metav1.Now()
	pod.Spec.Containers[0].Image = "app"
	pod.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}}
	if pod.DeletionTimestamp != nil && pod.DeletionGracePeriodSeconds != nil {
		end := metav1.NewTime(time.Now().Add(time.Duration(*pod.DeletionGracePeriodSeconds) * time.Second))
		pod.DeletionTimestamp = &end
	}
	return pod
}

func podPath(pod *corev1.Pod) string {
	return "/api/v1/namespaces/" + pod.Namespace + "/pods/" + pod.Name
}

func evict(pod *corev1.Pod, options metav1.DeleteOptions, query map[string]string) request {
	return request{verb: http.MethodPost, path: podPath(pod) + "/eviction", query: query, body: policyv1.Eviction{
		TypeMeta:   metav1.TypeMeta{APIVersion: "policy/v1", Kind: "Eviction"},
		ObjectMeta: metav1.ObjectMeta{Namespace: pod.Namespace, Name: pod.Name}, DeleteOptions: &options,
	}}
}

// dryRun is where a request asks for dry run.
type dryRun string

const (
	notDry  dryRun = "not dry run"
	inBody  dryRun = "dry run in the body"
	inQuery dryRun = "dry run in the query"
	// besideBody is dry run in the query of a delete that has a body: the API server reads the body alone, so that it is
	// none. (An eviction always has a body, and its query counts.)
	besideBody dryRun = "dry run in the query, beside a body that does not say so"
)

// combination is one request to a pod in one state.
type combination struct {
	path   Path
	dryRun dryRun
	asked  *int64
	pod    *corev1.Pod
}

func (c *combination) String() string {
	p := c.pod
	node := "node " + p.Spec.NodeName
	if p.Spec.NodeName == "" {
		node = "no node"
	}
	finalizers := "no finalizer"
	if len(p.Finalizers) > 0 {
		finalizers = "finalizer"
	}
	return fmt.Sprintf("%s of a pod (own grace %s, %s, %s, %s, %s) asking for grace %s, %s, %s (%s)",
		c.path, seconds(p.Spec.TerminationGracePeriodSeconds), p.Status.Phase, node, stateOf(p), finalizers,
		seconds(c.asked), c.dryRun, p.Namespace, p.Name)
}

func seconds(grace *int64) string {
	if grace == nil {
		return "none"
	}
	return strconv.FormatInt(*grace, 10)
}

// states are those that a pod can be in, each as the change that brings a running pod there.
func states() []func(*corev1.Pod) {
	phases := []corev1.PodPhase{corev1.PodPending, corev1.PodRunning, corev1.PodSucceeded, corev1.PodFailed, corev1.PodUnknown}
	marks := []func(*corev1.Pod){markedNever, terminating(new(int64(30))), terminating(new(int64(0))), terminating(nil)}
	var all []func(*corev1.Pod)
	for _, own := range []int64{0, 1, 30} {
		for _, reached := range phases {
			for _, node := range []string{"", "node-a"} {
				for _, mark := range marks {
					for _, finalizers := range [][]string{nil, {"example.com/kept"}} {
						all = append(all, func(pod *corev1.Pod) {
							pod.Spec.TerminationGracePeriodSeconds, pod.Spec.NodeName = &own, node
							pod.Status.Phase, pod.Finalizers = reached, finalizers
							mark(pod)
						})
					}
				}
			}
		}
	}
	return all
}

func markedNever(*corev1.Pod) {}

// combinations are all there are.
func combinations() []*combination {
	everywhere, ofEvictions := []dryRun{notDry, inBody, inQuery, besideBody}, []dryRun{notDry, inBody, inQuery}
	var all []*combination
	for _, way := range []struct {
		path      Path
		namespace string
		dryRuns   []dryRun
	}{
		{PathDelete, noBudget, everywhere},
		{PathCollection, noBudget, everywhere},
		{PathEviction, noBudget, ofEvictions},
		{PathEviction, budgetAllows, ofEvictions},
		{PathEviction, budgetBlocks, ofEvictions},
	} {
		for _, dry := range way.dryRuns {
			for _, asked := range []*int64{nil, new(int64(-1)), new(int64(0)), new(int64(1)), new(int64(30))} {
				for _, state := range states() {
					pod := storedPod(way.namespace, "pod-"+strconv.Itoa(len(all)), state)
					pod.Labels = map[string]string{workerLabel: strconv.Itoa(len(all) % workers)}
					all = append(all, &combination{path: way.path, dryRun: dry, asked: asked, pod: pod})
				}
			}
		}
	}
	return all
}

// request is what is sent.
func (c *combination) request() request {
	options := metav1.DeleteOptions{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "DeleteOptions"}, GracePeriodSeconds: c.asked}
	query := map[string]string{}
	if c.dryRun == inBody {
		options.DryRun = dryRunAll
	}
	if c.dryRun == inQuery || c.dryRun == besideBody {
		query["dryRun"] = metav1.DryRunAll
	}
	if c.path == PathEviction {
		return evict(c.pod, options, query)
	}
	r := request{verb: http.MethodDelete, path: podPath(c.pod), query: query, body: options}
	if c.path == PathCollection {
		r.path = strings.TrimSuffix(r.path, "/"+c.pod.Name)
		query["fieldSelector"] = "metadata.name=" + c.pod.Name
	}
	if c.dryRun == inQuery {
		r.body = nil
		if c.asked != nil {
			query["gracePeriodSeconds"] = seconds(c.asked)
		}
	}
	return r
}

// isDry says whether the request only asks what would happen.
func (c *combination) isDry() bool { return c.dryRun == inBody || c.dryRun == inQuery }

// refused says whether a disruption budget stands against the eviction: it must be one that blocks, and the pod one that
// counts (canIgnorePDB in kubernetes pkg/registry/core/pod/storage/eviction.go).
func (c *combination) refused() bool {
	return c.path == PathEviction && c.pod.Namespace == budgetBlocks && c.pod.DeletionTimestamp == nil &&
		(c.pod.Status.Phase == corev1.PodRunning || c.pod.Status.Phase == corev1.PodUnknown)
}

// answer is the status code that the request is answered with.
func (c *combination) answer() int {
	switch {
	case c.path != PathEviction:
		return http.StatusOK
	case c.refused():
		return http.StatusTooManyRequests
	case !c.isDry() && stateOf(c.pod) != "not terminating" && effectOn(c.pod, nil) == removesObject && len(c.pod.Finalizers) == 0:
		// Before it deletes the pod, an eviction writes a condition into its status, and that update removes a marked pod
		// already.
		return http.StatusNotFound
	}
	return http.StatusCreated
}

// stateOf says in words how far a pod's deletion is; nil is a pod that is not there.
func stateOf(pod *corev1.Pod) string {
	switch {
	case pod == nil:
		return "gone"
	case pod.DeletionTimestamp == nil:
		return "not terminating"
	case pod.DeletionGracePeriodSeconds == nil:
		return "terminating without a period"
	}
	return "terminating with " + seconds(pod.DeletionGracePeriodSeconds)
}

// predicted is the state of the pod after the request, as the rule has it.
func (c *combination) predicted() string {
	what := effectOn(c.pod, c.asked)
	switch {
	case c.isDry() || c.refused() || what == changesNothing:
		return stateOf(c.pod)
	case what == removesObject && len(c.pod.Finalizers) > 0:
		return "terminating with 0"
	case what == removesObject:
		return "gone"
	}
	grace := c.asked
	if grace == nil {
		grace = c.pod.Spec.TerminationGracePeriodSeconds
	}
	return "terminating with " + strconv.FormatInt(atLeastOne(*grace), 10)
}

// podsOfBudgets are the stored pods of the combinations, by their paths.
func (s *apiServer) podsOfBudgets(t *testing.T) map[string]*corev1.Pod {
	t.Helper()
	return s.pods(t, noBudget, budgetAllows, budgetBlocks)
}

func (s *apiServer) testRemovals(t *testing.T) {
	start := time.Now()
	all := combinations()
	pods := make([]*corev1.Pod, 0, len(all))
	for _, c := range all {
		pods = append(pods, c.pod)
	}
	s.store(t, pods...)
	before := s.podsOfBudgets(t)
	answers := make([]int, len(all))
	failures := make([]error, len(all))
	inParallel(len(all), func(i int) { answers[i], failures[i] = s.send(t.Context(), all[i].request()) })
	after := s.podsOfBudgets(t)
	var found disagreements
	for i, c := range all {
		if got, want := answers[i], c.answer(); got != want {
			found.add("%s: answered with %d, want %d: %v", c, got, want, failures[i])
		}
		was, is := before[podPath(c.pod)], after[podPath(c.pod)]
		if got, want := stateOf(is), c.predicted(); got != want {
			found.add("%s: the pod is %s, the rule says: %s", c, got, want)
		} else if (c.isDry() || c.refused()) && was.ResourceVersion != is.ResourceVersion {
			found.add("%s: the pod has been written to", c)
		}
		s.checkCalls(c, &found)
	}
	found.report(t)
	spent := time.Since(start).Round(time.Millisecond)
	t.Logf("%d combinations against %s in %s: %d disagreements", len(all), s.version, spent, len(found.lines))
}

// inParallel calls do with 0 to n-1, of which every worker has those that leave its number as the remainder.
func inParallel(n int, do func(int)) {
	var wait sync.WaitGroup
	for worker := range workers {
		wait.Go(func() {
			for i := worker; i < n; i += workers {
				do(i)
			}
		})
	}
	wait.Wait()
}

// checkCalls compares the calls that were made about a combination with the rule.
func (s *apiServer) checkCalls(c *combination, found *disagreements) {
	what := effectOn(c.pod, c.asked)
	want := "none"
	switch {
	case c.path == PathEviction && c.asked != nil && *c.asked == 0, c.path != PathEviction && what == removesObject:
		want = failClosed
	case c.path == PathEviction:
		want = failOpen
	}
	if got := s.calls.configurations(c.pod); got != want {
		found.add("%s: calls by %s, the rule says: %s", c, got, want)
	}
	for i, call := range s.calls.of(c.pod, failClosed, failOpen, unfiltered) {
		if call.err != nil {
			found.add("%s: call %d by %s was not understood: %v", c, i, call.configuration, call.err)
			continue
		}
		if call.path != c.path || call.dryRun != c.isDry() {
			found.add("%s: call %d by %s was read as %s, dry run %t", c, i, call.configuration, call.path, call.dryRun)
		}
		if c.path == PathEviction && seconds(call.grace) != seconds(c.asked) {
			found.add("%s: call %d by %s was read as asking for grace %s", c, i, call.configuration, seconds(call.grace))
		}
		if got := call.effect(); c.path != PathEviction && got != what && call.configuration != unfiltered {
			found.add("%s: call %d by %s was read as: %s", c, i, call.configuration, got)
		}
	}
	// Without matchConditions the API server calls about everything that changes something, and the webhook filters by the
	// same rule.
	calls := s.calls.of(c.pod, unfiltered)
	if called := len(calls) > 0; called != (c.path == PathEviction || what != changesNothing) {
		found.add("%s: without matchConditions there are %d calls", c, len(calls))
	}
	if len(calls) > 0 && calls[0].err == nil && c.path != PathEviction && calls[0].effect() != what {
		found.add("%s: without matchConditions the webhook reads: %s, the rule says: %s", c, calls[0].effect(), what)
	}
}

// TestChartWithoutMatchConditions holds what the chart renders for API servers that cannot filter.
func TestChartWithoutMatchConditions(t *testing.T) {
	objects := renderChart(t, "1.29.15")
	if len(objects) != 1 {
		t.Fatalf("%d objects about admission, want one configuration", len(objects))
	}
	configuration, is := objects[0].(*admissionregistrationv1.ValidatingWebhookConfiguration)
	if !is || len(configuration.Webhooks) != 1 {
		t.Fatalf("%T with another number of webhooks than 1", objects[0])
	}
	webhook := configuration.Webhooks[0]
	if len(webhook.MatchConditions) > 0 {
		t.Error("it has matchConditions")
	}
	if *webhook.FailurePolicy != admissionregistrationv1.Ignore {
		t.Errorf("failurePolicy is %s: a webhook that is down would block every delete", *webhook.FailurePolicy)
	}
	for _, rule := range webhook.Rules {
		if !slices.Equal(rule.Resources, []string{"pods"}) && !slices.Equal(rule.Resources, []string{"pods/eviction"}) {
			t.Errorf("it is called about %v", rule.Resources)
		}
		for _, operation := range rule.Operations {
			if operation != admissionregistrationv1.Delete && operation != admissionregistrationv1.Create {
				t.Errorf("it is called at every %s of %v", operation, rule.Resources)
			}
		}
	}
}
