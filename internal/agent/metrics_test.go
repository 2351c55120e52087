package agent

import (
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/eni-guard/eni-guard/internal/metricdocs"
	"github.com/eni-guard/eni-guard/internal/mtls"
	"github.com/eni-guard/eni-guard/internal/mtls/mtlstest"
)

func TestMetricsAreDocumented(t *testing.T) {
	dir := t.TempDir()
	mtlstest.NewAuthority(t).Issue(t, dir, mtls.AgentName, time.Hour)
	registry := prometheus.NewRegistry()
	registry.MustRegister(mtls.Expiry{"agent": mtls.Dir(dir)})
	inspector := newInspector("node-a", realNode, nil)
	if _, err := inspector.views[thorough].runs.begin(); err != nil {
		t.Fatal(err)
	}
	inspector.views[thorough].runs.age()
	registry.MustRegister(hangingProbes{inspector})
	newSweepMetrics(registry).probe.WithLabelValues("runtime")
	if err := metricdocs.Compare("../../docs/metrics.md", "The agent", registry); err != nil {
		t.Error(err)
	}
}
