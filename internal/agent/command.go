package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"runtime/debug"
	"time"

	"github.com/go-logr/logr"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/tools/events"

	"github.com/eni-guard/eni-guard/internal/exitstatus"
	"github.com/eni-guard/eni-guard/internal/logging"
	"github.com/eni-guard/eni-guard/internal/mtls"
	"github.com/eni-guard/eni-guard/internal/reach"
	"github.com/eni-guard/eni-guard/internal/sandbox"
)

type options struct {
	node           string
	bindAddress    string
	healthAddress  string
	criSocket      string
	tlsDir         string
	metricsAddress string
	kubeconfig     string
	leftoverGrace  time.Duration
	log            logging.Options
}

// NewCommand returns `eni-guard agent`.
func NewCommand() *cobra.Command {
	o := options{}
	cmd := &cobra.Command{
		Use:   "agent",
		Short: "Answer, on a node, what of a pod is still there",
		Long: `The agent runs on every node, in the host's PID and network namespaces. For a pod UID it tells which sandboxes,
containers, processes and network namespaces of that pod are still on the node. It answers only to callers that present a
certificate for the name ` + mtls.WebhookName + `. Without being asked it looks for what is left of pods that the API server no longer has,
and says so by the node condition ` + sandbox.OrphanedCondition + `, Events and metrics. On the node it reads only.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := o.validate(); err != nil {
				return exitstatus.With(exitstatus.Usage, err)
			}
			log, err := o.log.Logger()
			if err != nil {
				return exitstatus.With(exitstatus.Usage, err)
			}
			return o.run(cmd.Context(), log)
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&o.node, "node-name", os.Getenv("NODE_NAME"), "the name of this node in Kubernetes (or the environment variable NODE_NAME)")
	flags.StringVar(&o.bindAddress, "bind-address", fmt.Sprintf(":%d", DefaultPort), "where to answer the webhook, HOST:PORT")
	flags.StringVar(&o.healthAddress, "health-address", "127.0.0.1:9808", "where to serve /healthz and /readyz without TLS, HOST:PORT")
	flags.StringVar(&o.metricsAddress, "metrics-address", ":9809", "where to serve /metrics without TLS, HOST:PORT")
	flags.StringVar(&o.kubeconfig, "kubeconfig", "", "how to reach the API server; not needed in a pod")
	flags.DurationVar(&o.leftoverGrace, "leftover-grace", time.Minute, "how long something of a pod that is gone must have been there before it is called left over, 1s to 1h")
	flags.StringVar(&o.criSocket, "cri-socket", defaultCRISocket(), criSocketUsage)
	flags.StringVar(&o.tlsDir, "tls-dir", "/etc/eni-guard/tls", "directory with tls.crt, tls.key and ca.crt, read again at every handshake")
	o.log.AddFlags(flags)
	return cmd
}

func (o options) validate() error {
	if o.node == "" {
		return errors.New("--node-name is empty, and so is the environment variable NODE_NAME")
	}
	for _, flag := range []struct{ name, address string }{
		{"--bind-address", o.bindAddress}, {"--health-address", o.healthAddress}, {"--metrics-address", o.metricsAddress},
	} {
		if _, _, err := net.SplitHostPort(flag.address); err != nil {
			return fmt.Errorf("%s: %w", flag.name, err)
		}
	}
	if err := checkCRISocket(o.criSocket); err != nil {
		return err
	}
	if o.leftoverGrace < time.Second || o.leftoverGrace > time.Hour {
		return fmt.Errorf("--leftover-grace %s is not between 1s and 1h", o.leftoverGrace)
	}
	if err := mtls.Dir(o.tlsDir).Check(); err != nil {
		return fmt.Errorf("--tls-dir: %w", err)
	}
	return nil
}

func (o options) run(ctx context.Context, log logr.Logger) error {
	runtime, err := NewRuntime(o.criSocket)
	if err != nil {
		return fmt.Errorf("--cri-socket: %w", err)
	}
	defer runtime.Close()
	inspector := NewInspector(o.node, realNode, runtime)

	answers := &http.Server{
		Handler:           Handler(inspector, log),
		TLSConfig:         mtls.Server(mtls.Dir(o.tlsDir), mtls.WebhookName),
		ErrorLog:          logging.Standard(log),
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       10 * time.Second,
		IdleTimeout:       5 * time.Minute,
	}
	health := &http.Server{Handler: HealthHandler(inspector), ErrorLog: logging.Standard(log), ReadHeaderTimeout: 5 * time.Second}
	registry := prometheus.NewRegistry()
	registry.MustRegister(mtls.Expiry{"agent": mtls.Dir(o.tlsDir)}, hangingProbes{inspector})
	config, from, err := apiConfig(o.kubeconfig)
	if err != nil {
		return fmt.Errorf("finding the API server: %w", err)
	}
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return fmt.Errorf("finding the API server: %s: %w", from, err)
	}
	pods, err := newNodePods(config, o.node)
	if err != nil {
		return fmt.Errorf("finding the API server: %s: %w", from, err)
	}
	sweep := o.sweeping(client, pods, inspector, newSweepMetrics(registry), log)
	measures := http.NewServeMux()
	measures.Handle("GET /metrics", promhttp.HandlerFor(registry, promhttp.HandlerOpts{}))
	metrics := &http.Server{Handler: measures, ErrorLog: logging.Standard(log), ReadHeaderTimeout: 5 * time.Second}
	log.Info("answering", "node", o.node, "address", o.bindAddress, "criSocket", o.criSocket)
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error {
		return serve(ctx, answers, o.bindAddress, func(l net.Listener) error { return answers.ServeTLS(l, "", "") })
	})
	group.Go(func() error { return serve(ctx, health, o.healthAddress, health.Serve) })
	group.Go(func() error { return serve(ctx, metrics, o.metricsAddress, metrics.Serve) })
	group.Go(func() error { return sweep(ctx) })
	debug.SetGCPercent(heapGrowth)
	group.Go(func() error {
		select {
		case <-time.After(startTime):
			if err := releaseStart(); err != nil {
				log.Error(err, "could not give back the memory that the start has needed")
			}
		case <-ctx.Done():
		}
		return nil
	})
	group.Go(func() error {
		targets := []reach.Target{{Name: "runtime", Ask: runtime.version}, reach.APIServer(client.Discovery().RESTClient())}
		reach.Watch(ctx, log, targets, kernelFacts()...)
		return nil
	})
	return group.Wait()
}

// sweeping returns what looks for leftovers until its context ends.
func (o options) sweeping(client kubernetes.Interface, pods *nodePods, inspector *Inspector, metrics sweepMetrics, log logr.Logger) func(context.Context) error {
	broadcaster := events.NewBroadcaster(&events.EventSinkImpl{Interface: client.EventsV1()})
	patchStatus := func(ctx context.Context, patch []byte) (*corev1.Node, error) {
		ctx, cancel := context.WithTimeout(ctx, listTimeout)
		defer cancel()
		return client.CoreV1().Nodes().Patch(ctx, o.node, types.StrategicMergePatchType, patch, metav1.PatchOptions{}, "status")
	}
	s := &sweeper{
		inspector: inspector, pods: pods, grace: o.leftoverGrace, metrics: metrics, log: log, now: time.Now,
		events: broadcaster.NewRecorder(scheme.Scheme, "eni-guard-agent"),
		// A patch that changes nothing is answered with the Node: so the agent needs no right to read nodes.
		read: func(ctx context.Context) (corev1.NodeCondition, error) {
			node, err := patchStatus(ctx, []byte("{}"))
			if err != nil {
				return corev1.NodeCondition{}, err
			}
			return orphanedCondition(node), nil
		},
		write: func(ctx context.Context, condition corev1.NodeCondition) error {
			patch, err := conditionPatch(condition)
			if err != nil {
				return err
			}
			_, err = patchStatus(ctx, patch)
			return err
		},
	}
	return func(ctx context.Context) error {
		defer broadcaster.Shutdown()
		if err := broadcaster.StartRecordingToSinkWithContext(ctx); err != nil {
			return err
		}
		gone := make(chan struct{}, 1)
		// The API server may be away for as long as it likes.
		if err := s.lookUntil(ctx, func() error {
			return pods.watch(ctx, func() {
				select {
				case gone <- struct{}{}:
				default:
				}
			})
		}); err != nil {
			return nil // the agent was told to end
		}
		s.run(ctx, gone)
		return nil
	}
}

// shutdownTimeout is how long running questions may take to finish when the agent is told to end.
const shutdownTimeout = 10 * time.Second

// serve listens on address until ctx ends, and then lets running requests finish.
func serve(ctx context.Context, server *http.Server, address string, accept func(net.Listener) error) error {
	listener, err := (&net.ListenConfig{}).Listen(ctx, "tcp", address)
	if err != nil {
		return err
	}
	stopped := make(chan error, 1)
	stop := context.AfterFunc(ctx, func() {
		drain, cancel := context.WithTimeout(context.WithoutCancel(ctx), shutdownTimeout)
		defer cancel()
		stopped <- server.Shutdown(drain)
	})
	if err := accept(listener); !errors.Is(err, http.ErrServerClosed) {
		stop()
		return err
	}
	return <-stopped
}
