package webhook

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/go-logr/logr"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/cobra"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/klog/v2"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/metrics"
	metricsserver "sigs.k8s.io/controller-runtime/pkg/metrics/server"
	ctrlwebhook "sigs.k8s.io/controller-runtime/pkg/webhook"

	"github.com/eni-guard/eni-guard/internal/agent"
	"github.com/eni-guard/eni-guard/internal/logging"
	"github.com/eni-guard/eni-guard/internal/mtls"
)

type options struct {
	port           int
	healthAddress  string
	metricsAddress string
	tlsDir         string
	agentTLSDir    string
	agentPort      int
	agentTimeout   time.Duration
	log            logging.Options
}

// NewCommand returns `eni-guard webhook`.
func NewCommand() *cobra.Command {
	o := options{}
	cmd := &cobra.Command{
		Use:   "webhook",
		Short: "Answer the API server's questions about removals of pods",
		Long: `The webhook answers AdmissionReviews about DELETE of pods: a removal that takes the object out of the API server at
once is refused until the agent of the pod's node says that nothing of the pod is left there.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := o.validate(); err != nil {
				return err
			}
			log, err := o.log.Logger()
			if err != nil {
				return err
			}
			return o.run(cmd.Context(), log)
		},
	}
	flags := cmd.Flags()
	flags.IntVar(&o.port, "port", 9443, "port for the API server's requests")
	flags.StringVar(&o.healthAddress, "health-address", ":8081", "where to serve /healthz and /readyz, HOST:PORT")
	flags.StringVar(&o.metricsAddress, "metrics-address", ":8080", "where to serve /metrics, HOST:PORT")
	flags.StringVar(&o.tlsDir, "tls-dir", "/etc/eni-guard/tls", "directory with tls.crt and tls.key to serve the API server with, read again when they change")
	flags.StringVar(&o.agentTLSDir, "agent-tls-dir", "/etc/eni-guard/agent-tls", "directory with tls.crt, tls.key and ca.crt to ask agents with, read again at every handshake")
	flags.IntVar(&o.agentPort, "agent-port", agent.DefaultPort, "port at which agents answer on their nodes")
	flags.DurationVar(&o.agentTimeout, "agent-timeout", 5*time.Second, "how long an agent may take to answer, 1s to 25s; keep it well below the timeoutSeconds of the webhook configuration")
	o.log.AddFlags(flags)
	return cmd
}

func (o options) validate() error {
	for _, flag := range []struct {
		name string
		port int
	}{{"--port", o.port}, {"--agent-port", o.agentPort}} {
		if flag.port < 1 || flag.port > 65535 {
			return fmt.Errorf("%s %d is not a port between 1 and 65535", flag.name, flag.port)
		}
	}
	for _, flag := range []struct{ name, address string }{
		{"--health-address", o.healthAddress}, {"--metrics-address", o.metricsAddress},
	} {
		if _, _, err := net.SplitHostPort(flag.address); err != nil {
			return fmt.Errorf("%s: %w", flag.name, err)
		}
	}
	if o.agentTimeout < time.Second || o.agentTimeout > 25*time.Second {
		return fmt.Errorf("--agent-timeout %s is not between 1s and 25s", o.agentTimeout)
	}
	for _, name := range []string{"tls.crt", "tls.key"} {
		if _, err := os.Stat(filepath.Join(o.tlsDir, name)); err != nil {
			return fmt.Errorf("--tls-dir: %w", err)
		}
	}
	if err := mtls.Dir(o.agentTLSDir).Check(); err != nil {
		return fmt.Errorf("--agent-tls-dir: %w", err)
	}
	return nil
}

func (o options) run(ctx context.Context, log logr.Logger) error {
	ctrl.SetLogger(log)
	klog.SetLogger(log)
	config, err := ctrl.GetConfig()
	if err != nil {
		return fmt.Errorf("finding the API server: %w", err)
	}
	manager, err := ctrl.NewManager(config, ctrl.Options{
		WebhookServer:          ctrlwebhook.NewServer(ctrlwebhook.Options{Port: o.port, CertDir: o.tlsDir}),
		HealthProbeBindAddress: o.healthAddress,
		Metrics:                metricsserver.Options{BindAddress: o.metricsAddress},
		Cache:                  cache.Options{ByObject: map[client.Object]cache.ByObject{&corev1.Node{}: {Transform: trimNode}}},
	})
	if err != nil {
		return fmt.Errorf("setting up: %w", err)
	}
	decisions := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "eni_guard_decisions_total",
		Help: "Answers to admission requests about removals of pods. One forced delete leads to more than one request.",
	}, []string{"mode", "decision", "verdict", "path"})
	if err := metrics.Registry.Register(decisions); err != nil {
		return err
	}
	guard := &Guard{
		nodes:     manager.GetCache(),
		liveNodes: manager.GetAPIReader(),
		agents:    newAgents(strconv.Itoa(o.agentPort), o.agentTimeout, mtls.Dir(o.agentTLSDir)),
		decisions: decisions,
	}
	// Asked for here, because the manager starts the server only if somebody does.
	server := manager.GetWebhookServer()
	server.Register(ReviewPath, guard.Handler(log))

	// The first request must not be the one that starts the cache of nodes and waits for it.
	if _, err := manager.GetCache().GetInformer(ctx, &corev1.Node{}); err != nil {
		return fmt.Errorf("watching nodes: %w", err)
	}
	err = errors.Join(
		manager.AddHealthzCheck("alive", func(*http.Request) error { return nil }),
		manager.AddReadyzCheck("listener", server.StartedChecker()),
		manager.AddReadyzCheck("nodes", func(r *http.Request) error {
			if !manager.GetCache().WaitForCacheSync(r.Context()) {
				return errors.New("the cache of nodes is not filled yet")
			}
			return nil
		}),
	)
	if err != nil {
		return err
	}
	return manager.Start(ctx)
}

// trimNode keeps of a Node what a decision needs; the rest, images above all, would be most of the webhook's memory.
func trimNode(object any) (any, error) {
	node, ok := object.(*corev1.Node)
	if !ok {
		return object, nil
	}
	trimmed := &corev1.Node{}
	trimmed.Name, trimmed.UID, trimmed.ResourceVersion = node.Name, node.UID, node.ResourceVersion
	trimmed.Spec.Taints = node.Spec.Taints
	trimmed.Status.Addresses = node.Status.Addresses
	return trimmed, nil
}
