package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"time"

	"github.com/go-logr/logr"
	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/eni-guard/eni-guard/internal/logging"
	"github.com/eni-guard/eni-guard/internal/mtls"
)

type options struct {
	node          string
	bindAddress   string
	healthAddress string
	criSocket     string
	tlsDir        string
	log           logging.Options
}

// NewCommand returns `eni-guard agent`.
func NewCommand() *cobra.Command {
	o := options{}
	cmd := &cobra.Command{
		Use:   "agent",
		Short: "Answer, on a node, what of a pod is still there",
		Long: `The agent runs on every node, in the host's PID and network namespaces. For a pod UID it tells which sandboxes,
containers, processes and network namespaces of that pod are still on the node. It reads only, and answers only to
callers that present a certificate for the name ` + mtls.WebhookName + `.`,
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
	flags.StringVar(&o.node, "node-name", os.Getenv("NODE_NAME"), "the name of this node in Kubernetes (or the environment variable NODE_NAME)")
	flags.StringVar(&o.bindAddress, "bind-address", fmt.Sprintf(":%d", DefaultPort), "where to answer the webhook, HOST:PORT")
	flags.StringVar(&o.healthAddress, "health-address", "127.0.0.1:9808", "where to serve /healthz and /readyz without TLS, HOST:PORT")
	flags.StringVar(&o.criSocket, "cri-socket", "/run/containerd/containerd.sock", "the container runtime's CRI socket")
	flags.StringVar(&o.tlsDir, "tls-dir", "/etc/eni-guard/tls", "directory with tls.crt, tls.key and ca.crt, read again at every handshake")
	o.log.AddFlags(flags)
	return cmd
}

func (o options) validate() error {
	if o.node == "" {
		return errors.New("--node-name is empty, and so is the environment variable NODE_NAME")
	}
	for _, flag := range []struct{ name, address string }{
		{"--bind-address", o.bindAddress}, {"--health-address", o.healthAddress},
	} {
		if _, _, err := net.SplitHostPort(flag.address); err != nil {
			return fmt.Errorf("%s: %w", flag.name, err)
		}
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
	inspector := NewInspector(o.node, Host{Proc: "/proc", Cgroup: "/sys/fs/cgroup"}, runtime)

	answers := &http.Server{
		Handler:           Handler(inspector, log),
		TLSConfig:         mtls.Dir(o.tlsDir).Server(mtls.WebhookName),
		ErrorLog:          logging.Standard(log),
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       10 * time.Second,
		IdleTimeout:       5 * time.Minute,
	}
	health := &http.Server{Handler: HealthHandler(inspector), ErrorLog: logging.Standard(log), ReadHeaderTimeout: 5 * time.Second}
	log.Info("answering", "node", o.node, "address", o.bindAddress, "criSocket", o.criSocket)
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error {
		return serve(ctx, answers, o.bindAddress, func(l net.Listener) error { return answers.ServeTLS(l, "", "") })
	})
	group.Go(func() error { return serve(ctx, health, o.healthAddress, health.Serve) })
	return group.Wait()
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
