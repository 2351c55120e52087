package webhook

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/go-logr/logr"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	dto "github.com/prometheus/client_model/go"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	toolscache "k8s.io/client-go/tools/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"

	"github.com/eni-guard/eni-guard/internal/metricdocs"
	"github.com/eni-guard/eni-guard/internal/mtls"
	"github.com/eni-guard/eni-guard/internal/mtls/mtlstest"
	"github.com/eni-guard/eni-guard/internal/sandbox"
)

// elected is what a leader knows.
func elected() <-chan struct{} {
	c := make(chan struct{})
	close(c)
	return c
}

func TestMetricsAreDocumented(t *testing.T) {
	counts := newMetrics()
	counts.decisions.WithLabelValues("deny", "denied", "bound", "delete")
	counts.since(stageReview, time.Now())
	counts.questions.WithLabelValues("node-a", resultAnswered)
	dir := t.TempDir()
	mtlstest.NewAuthority(t).Issue(t, dir, mtls.WebhookName, time.Hour)
	registry := prometheus.NewRegistry()
	registry.MustRegister(append(counts.collectors(), newPhaseWatch().reports, mtls.Expiry{"webhook": mtls.Dir(dir)},
		heldPodsCollector{pods: fake.NewClientBuilder().Build(), elected: elected(), now: time.Now})...)
	if err := metricdocs.Compare("../docs/metrics.md", "The webhook", registry); err != nil {
		t.Error(err)
	}
	if problems, err := testutil.GatherAndLint(registry); err != nil || len(problems) > 0 {
		t.Errorf("%v (%v)", problems, err)
	}
}

func TestQuestionsAreCountedByNode(t *testing.T) {
	counts := newMetrics()
	answer := error(nil)
	agents := countedAgents{agentFunc(func(context.Context, string, sandbox.Query) (sandbox.Report, error) { return allProbes(), answer }), counts}
	left, leave := context.WithCancel(t.Context())
	leave()
	late, cancel := context.WithTimeout(t.Context(), -time.Second)
	defer cancel()
	for _, test := range []struct {
		ctx  context.Context
		node string
		err  error
	}{
		{t.Context(), "node-a", nil}, {t.Context(), "node-a", errors.New("does not run")}, {t.Context(), "node-b", nil},
		{late, "node-b", context.DeadlineExceeded},
		// It is not known whether this agent would have answered.
		{left, "node-b", context.Canceled},
	} {
		answer = test.err
		_, _ = agents.ask(test.ctx, "192.0.2.7", sandbox.Query{Node: test.node})
		_, _ = agents.await(test.ctx, "192.0.2.7", sandbox.Query{Node: test.node}, time.Second)
	}
	expect := func(text string) {
		t.Helper()
		head := "# HELP eni_guard_agent_questions_total Questions to the agent of a node, by whether it answered. Nodes that were never asked about, or are gone, have none.\n" +
			"# TYPE eni_guard_agent_questions_total counter\n"
		if err := testutil.CollectAndCompare(counts.questions, strings.NewReader(head+text)); err != nil {
			t.Error(err)
		}
	}
	b := `eni_guard_agent_questions_total{node="node-b",result="answered"} 2
eni_guard_agent_questions_total{node="node-b",result="failed"} 2
`
	expect(`eni_guard_agent_questions_total{node="node-a",result="answered"} 2
eni_guard_agent_questions_total{node="node-a",result="failed"} 2
` + b)
	counts.forget().OnDelete(&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "node-a"}})
	expect(b)
	counts.forget().OnDelete(toolscache.DeletedFinalStateUnknown{Obj: &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "node-b"}}})
	if n := testutil.CollectAndCount(counts.questions); n != 0 {
		t.Errorf("%d series are left of nodes that are gone", n)
	}
}

// Every part of a review that is waited for is measured, and the whole.
func TestStagesAreMeasured(t *testing.T) {
	counts := newMetrics()
	g := newGuard(finds(stuck()...), nodeA())
	g.live, g.agents, g.access = timedReader{g.live, counts}, countedAgents{g.agents, counts}, timedAccess{g.access, counts}
	pod := runningPod(func(p *corev1.Pod) { p.Annotations = map[string]string{OverrideAnnotation: "node lost"} })
	handler := counts.timeReviews(g.Handler(logr.Discard()))
	request := httptest.NewRequestWithContext(t.Context(), http.MethodPost, ReviewPath, strings.NewReader(reviewBody(t, deleteRequest(t, pod, new(int64(0))))))
	request.Header.Set("Content-Type", "application/json")
	handler.ServeHTTP(httptest.NewRecorder(), request)
	for stage, want := range map[string]uint64{stageReview: 1, stageAgent: 1, stageAPI: 1} {
		if got := observations(t, counts, stage); got != want {
			t.Errorf("stage %s was measured %d times, want %d", stage, got, want)
		}
	}
}

// observations is how often a stage was measured.
func observations(t *testing.T, m metrics, stage string) uint64 {
	t.Helper()
	var read dto.Metric
	if err := m.durations.WithLabelValues(stage).(prometheus.Histogram).Write(&read); err != nil {
		t.Fatal(err)
	}
	return read.GetHistogram().GetSampleCount()
}

func TestHeldPodsAreCountedByTheLeader(t *testing.T) {
	held := func(name string, since time.Time, finalizers ...string) *corev1.Pod {
		return &corev1.Pod{ObjectMeta: metav1.ObjectMeta{
			Namespace: "shop", Name: name, Labels: map[string]string{HeldLabel: "true"}, Finalizers: finalizers,
			Annotations: map[string]string{HeldSinceAnnotation: since.Format(time.RFC3339)},
		}}
	}
	objects := []client.Object{
		held("a", testTime.Add(-time.Hour), Finalizer), held("b", testTime.Add(-time.Minute), Finalizer), held("freed", testTime.Add(-2*time.Hour)),
	}
	for name, test := range map[string]struct {
		elected <-chan struct{}
		objects []client.Object
		want    string
	}{
		"the leader":         {elected(), objects, "eni_guard_held_oldest_seconds 3600\neni_guard_held_pods 2\n"},
		"without a held pod": {elected(), nil, "eni_guard_held_oldest_seconds 0\neni_guard_held_pods 0\n"},
		"another replica":    {make(chan struct{}), objects, ""},
	} {
		t.Run(name, func(t *testing.T) {
			c := heldPodsCollector{fake.NewClientBuilder().WithObjects(test.objects...).Build(), test.elected, func() time.Time { return testTime }}
			registry := prometheus.NewPedanticRegistry()
			registry.MustRegister(c)
			families, err := registry.Gather()
			if err != nil {
				t.Fatal(err)
			}
			got := ""
			for _, family := range families {
				got += family.GetName() + " " + strconv.FormatFloat(family.GetMetric()[0].GetGauge().GetValue(), 'f', -1, 64) + "\n"
			}
			if got != test.want {
				t.Errorf("%q, want %q", got, test.want)
			}
		})
	}
}
