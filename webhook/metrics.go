package webhook

import (
	"context"
	"errors"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	toolscache "k8s.io/client-go/tools/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/eni-guard/eni-guard/internal/sandbox"
)

// The parts of a review whose time is measured; the values of the label "stage".
const (
	stageReview = "review" // the whole
	stageAPI    = "api"    // one question to the API server
	stageAgent  = "agent"  // one question to an agent
)

// The values of the label "result" of questions to agents.
const (
	resultAnswered = "answered"
	resultFailed   = "failed"
)

// metrics are what the webhook counts, beside what is counted where it is found out (phases, held pods). None has a label for a
// pod, and none a label that somebody outside can write.
type metrics struct {
	decisions *prometheus.CounterVec
	durations *prometheus.HistogramVec
	// questions has one series a node that was asked about, and only while the Node object is there: see forget.
	questions *prometheus.CounterVec
}

func newMetrics() metrics {
	return metrics{
		decisions: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "eni_guard_decisions_total",
			Help: "Decisions about requests that take a pod, or its address, away.",
		}, []string{"mode", "decision", "verdict", "path"}),
		durations: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "eni_guard_stage_duration_seconds",
			Help: "How long a whole review took (review), one question to the API server (api), one question to an agent (agent).",
			// From a review that asks nobody to one that the API server has given up, at most 30 s.
			Buckets: []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30},
		}, []string{"stage"}),
		questions: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "eni_guard_agent_questions_total",
			Help: "Questions to the agent of a node, by whether it answered. Nodes that were never asked about, or are gone, have none.",
		}, []string{"node", "result"}),
	}
}

func (m metrics) collectors() []prometheus.Collector {
	return []prometheus.Collector{m.decisions, m.durations, m.questions}
}

// timeReviews measures whole reviews.
func (m metrics) timeReviews(reviews http.Handler) http.Handler {
	return promhttp.InstrumentHandlerDuration(m.durations.MustCurryWith(prometheus.Labels{"stage": stageReview}), reviews)
}

// forget drops what was counted about nodes that are gone, so that a cluster that replaces its nodes does not make the webhook grow.
func (m metrics) forget() toolscache.ResourceEventHandler {
	return toolscache.ResourceEventHandlerFuncs{DeleteFunc: func(object any) {
		if last, is := object.(toolscache.DeletedFinalStateUnknown); is {
			object = last.Obj
		}
		if node, is := object.(*corev1.Node); is {
			m.questions.DeletePartialMatch(prometheus.Labels{"node": node.Name})
		}
	}}
}

// since observes how long a stage took.
func (m metrics) since(stage string, start time.Time) {
	m.durations.WithLabelValues(stage).Observe(time.Since(start).Seconds())
}

// timedReader measures what is read from the API server.
type timedReader struct {
	client.Reader
	metrics
}

// Get implements client.Reader.
func (r timedReader) Get(ctx context.Context, key client.ObjectKey, object client.Object, options ...client.GetOption) error {
	defer r.since(stageAPI, time.Now())
	return r.Reader.Get(ctx, key, object, options...)
}

// timedAccess measures questions about rights.
type timedAccess struct {
	accessReviewer
	metrics
}

func (a timedAccess) mayOverride(ctx context.Context, user authenticationv1.UserInfo, pod *corev1.Pod) (bool, error) {
	defer a.since(stageAPI, time.Now())
	return a.accessReviewer.mayOverride(ctx, user, pod)
}

// countedAgents counts questions by node and answer, and measures those that an agent answers at once.
type countedAgents struct {
	asker
	metrics
}

func (a countedAgents) ask(ctx context.Context, address string, query sandbox.Query) (sandbox.Report, error) {
	defer a.since(stageAgent, time.Now())
	report, err := a.asker.ask(ctx, address, query)
	a.count(ctx, query.Node, err)
	return report, err
}

func (a countedAgents) await(ctx context.Context, address string, query sandbox.Query, wait time.Duration) (sandbox.Report, error) {
	report, err := a.asker.await(ctx, address, query, wait)
	a.count(ctx, query.Node, err)
	return report, err
}

// count leaves out questions whose caller has gone away: they say nothing about the agent. Both counters of a node begin at its
// first question, so that the first failure is an increase.
func (a countedAgents) count(ctx context.Context, node string, err error) {
	answered, failed := a.questions.WithLabelValues(node, resultAnswered), a.questions.WithLabelValues(node, resultFailed)
	switch {
	case err == nil:
		answered.Inc()
	case !errors.Is(ctx.Err(), context.Canceled):
		failed.Inc()
	}
}

// heldPodsCollector tells how many pods are held, and for how long. Only the leader does, which watches them.
type heldPodsCollector struct {
	pods    client.Reader // cached, of pods with HeldLabel
	elected <-chan struct{}
	now     func() time.Time
}

var (
	heldPodsDesc   = prometheus.NewDesc("eni_guard_held_pods", "Pods that are held until their node has let go of them. Told by the leader alone.", nil, nil)
	heldOldestDesc = prometheus.NewDesc("eni_guard_held_oldest_seconds", "For how long the pod is held that is held longest; 0 without one. Told by the leader alone.", nil, nil)
)

// Describe implements prometheus.Collector.
func (c heldPodsCollector) Describe(descriptions chan<- *prometheus.Desc) {
	descriptions <- heldPodsDesc
	descriptions <- heldOldestDesc
}

// Collect implements prometheus.Collector.
func (c heldPodsCollector) Collect(found chan<- prometheus.Metric) {
	select {
	case <-c.elected:
	default:
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	var pods corev1.PodList
	if err := c.pods.List(ctx, &pods, client.MatchingLabels{HeldLabel: "true"}); err != nil {
		found <- prometheus.NewInvalidMetric(heldPodsDesc, err)
		return
	}
	number, oldest := 0, 0.0
	for i := range pods.Items {
		if !held(&pods.Items[i]) {
			continue
		}
		number++
		if since, err := time.Parse(time.RFC3339, pods.Items[i].Annotations[HeldSinceAnnotation]); err == nil {
			oldest = max(oldest, c.now().Sub(since).Seconds())
		}
	}
	found <- prometheus.MustNewConstMetric(heldPodsDesc, prometheus.GaugeValue, float64(number))
	found <- prometheus.MustNewConstMetric(heldOldestDesc, prometheus.GaugeValue, oldest)
}
