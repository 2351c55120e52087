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
	"github.com/spf13/cobra"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/client-go/discovery"
	toolscache "k8s.io/client-go/tools/cache"
	"k8s.io/klog/v2"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"
	ctrlmetrics "sigs.k8s.io/controller-runtime/pkg/metrics"
	metricsserver "sigs.k8s.io/controller-runtime/pkg/metrics/server"
	ctrlwebhook "sigs.k8s.io/controller-runtime/pkg/webhook"

	"github.com/eni-guard/eni-guard/internal/agent"
	"github.com/eni-guard/eni-guard/internal/exitstatus"
	"github.com/eni-guard/eni-guard/internal/logging"
	"github.com/eni-guard/eni-guard/internal/mtls"
	"github.com/eni-guard/eni-guard/internal/pki"
	"github.com/eni-guard/eni-guard/internal/reach"
)

type options struct {
	port           int
	healthAddress  string
	metricsAddress string
	tlsDir         string
	agentTLSDir    string
	release        string
	validity       pki.Settings
	agentPort      int
	agentTimeout   time.Duration
	mode           string
	nodeGone       bool
	excludedNodes  []string
	taintNodes     bool
	leaseNamespace string
	log            logging.Options
}

// NewCommand returns `eni-guard webhook`.
func NewCommand() *cobra.Command {
	o := options{}
	cmd := &cobra.Command{
		Use:   "webhook",
		Short: "Answer the API server's questions about removals of pods",
		Long: `The webhook answers AdmissionReviews about removals of pods: one that takes the object out of the API server at once is
refused, or the object held, until the agent of the pod's node says that nothing of the pod is left there. One of its
replicas, the leader, frees held pods as soon as that is so, and keeps new pods away from nodes with leftovers.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			p, err := o.validate()
			if err != nil {
				return exitstatus.With(exitstatus.Usage, err)
			}
			log, err := o.log.Logger()
			if err != nil {
				return exitstatus.With(exitstatus.Usage, err)
			}
			return o.run(cmd.Context(), log, p)
		},
	}
	cmd.AddCommand(newFreeHeldCommand())
	flags := cmd.Flags()
	flags.IntVar(&o.port, "port", 9443, "port for the API server's requests")
	flags.StringVar(&o.healthAddress, "health-address", ":8081", "where to serve /healthz and /readyz, HOST:PORT")
	flags.StringVar(&o.metricsAddress, "metrics-address", ":8080", "where to serve /metrics, HOST:PORT")
	flags.StringVar(&o.tlsDir, "tls-dir", "/etc/eni-guard/tls", "directory with tls.crt and tls.key to serve the API server with, read again when they change")
	flags.StringVar(&o.agentTLSDir, "agent-tls-dir", "/etc/eni-guard/agent-tls", "directory with tls.crt, tls.key and ca.crt to ask agents with, read again at every handshake")
	flags.StringVar(&o.release, "release", "", "name of the Helm release whose certificates the replicas make and rotate, in the Secrets RELEASE-ca, -webhook-tls, -client-tls and -agent-tls of their namespace; without it, somebody else does, in --tls-dir and --agent-tls-dir")
	flags.DurationVar(&o.validity.Authority, "authority-validity", 3*365*24*time.Hour, "with --release: how long a certificate authority is valid, up to 10 years; it is replaced when a third is left")
	flags.DurationVar(&o.validity.Leaf, "certificate-validity", 90*24*time.Hour, "with --release: how long a certificate is valid, at most a third of --authority-validity; it is replaced when a third is left")
	flags.DurationVar(&o.validity.Overlap, "certificate-overlap", time.Hour, "with --release: how long an old and a new authority are trusted side by side, before and after, 5s to 168h, at most a third of --certificate-validity; longer than a changed Secret takes to arrive in a volume")
	flags.IntVar(&o.agentPort, "agent-port", agent.DefaultPort, "port at which agents answer on their nodes")
	flags.DurationVar(&o.agentTimeout, "agent-timeout", 5*time.Second, "how long an agent may take to answer, 1s to 25s; keep it well below the timeoutSeconds of the webhook configuration")
	flags.StringVar(&o.mode, "mode", string(ModeDeny), "what to do about forced removals of pods that are bound, where the label "+ModeLabel+" of the namespace does not say: deny, hold, audit or off")
	flags.BoolVar(&o.nodeGone, "allow-when-node-is-gone", true, "allow a forced removal where nobody can be asked, because the Node object is gone or has the taint "+corev1.TaintNodeOutOfService)
	flags.StringArrayVar(&o.excludedNodes, "excluded-nodes", nil, "label selector of nodes without an agent, whose pods are not guarded; may be given again")
	flags.BoolVar(&o.taintNodes, "taint-nodes", false, "put the taint "+taintWords+" on nodes while something is left on them of pods that are gone; if false, take away those that were put there before")
	flags.StringVar(&o.leaseNamespace, "lease-namespace", "", "namespace of the lease by which the replicas elect a leader; that of the pod, where it runs in one")
	o.log.AddFlags(flags)
	return cmd
}

// validate checks the flags, and returns what those say that people decide.
func (o options) validate() (policy, error) {
	p := policy{allowWhenNodeIsGone: o.nodeGone}
	var err error
	if p.mode, err = parseMode(o.mode); err != nil {
		return p, fmt.Errorf("--mode: %w", err)
	}
	for _, text := range o.excludedNodes {
		selector, err := labels.Parse(text)
		if err != nil {
			return p, fmt.Errorf("--excluded-nodes %q is not a label selector: %w", text, err)
		}
		if selector.Empty() {
			return p, errors.New("--excluded-nodes is empty, which would select every node")
		}
		p.excludedNodes = append(p.excludedNodes, selector)
	}
	return p, o.validateServing()
}

func (o options) validateServing() error {
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
	return o.validateCertificates()
}

func (o options) validateCertificates() error {
	if o.release != "" {
		if err := o.validity.Check(); err != nil {
			return fmt.Errorf("--authority-validity, --certificate-validity, --certificate-overlap: %w", err)
		}
		return nil
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

func (o options) run(ctx context.Context, log logr.Logger, p policy) error {
	ctrl.SetLogger(log)
	klog.SetLogger(log)
	config, err := ctrl.GetConfig()
	if err != nil {
		return fmt.Errorf("finding the API server: %w", err)
	}
	namespaces := &metav1.PartialObjectMetadata{}
	namespaces.SetGroupVersionKind(corev1.SchemeGroupVersion.WithKind("Namespace"))
	certificates, err := o.certificates()
	if err != nil {
		return err
	}
	manager, err := ctrl.NewManager(config, ctrl.Options{
		WebhookServer:          ctrlwebhook.NewServer(certificates.serving),
		HealthProbeBindAddress: o.healthAddress,
		Metrics:                metricsserver.Options{BindAddress: o.metricsAddress},
		Cache: cache.Options{ByObject: map[client.Object]cache.ByObject{
			&corev1.Node{}: {Transform: trimNodes(p.excludedNodes)},
			&corev1.Pod{}:  {Label: labels.SelectorFromSet(labels.Set{HeldLabel: "true"}), Transform: cache.TransformStripManagedFields()},
			namespaces:     {Transform: trimNamespace},
		}},
		LeaderElection:                true,
		LeaderElectionID:              "eni-guard-webhook",
		LeaderElectionNamespace:       o.leaseNamespace,
		LeaderElectionReleaseOnCancel: true,
		// With drainTime less than the kubelet gives, or the lease is not given back and the next leader waits for its end.
		GracefulShutdownTimeout: new(15 * time.Second),
		// An API server that is away for a moment must not end the leader, which also answers reviews.
		LeaseDuration: new(20 * time.Second), RenewDeadline: new(15 * time.Second), RetryPeriod: new(3 * time.Second),
	})
	if err != nil {
		return fmt.Errorf("setting up: %w", err)
	}
	counts := newMetrics()
	guard := &Guard{
		policy:    p,
		cached:    manager.GetCache(),
		live:      timedReader{manager.GetAPIReader(), counts},
		agents:    countedAgents{newAgents(strconv.Itoa(o.agentPort), o.agentTimeout, certificates.asking), counts},
		access:    timedAccess{subjectAccessReviews{manager.GetClient()}, counts},
		holds:     holder{manager.GetClient()},
		events:    manager.GetEventRecorder("eni-guard"),
		decisions: counts.decisions,
		phases:    newPhaseWatch(),
		now:       time.Now,
	}
	collectors := append(counts.collectors(), guard.phases.reports,
		heldPodsCollector{pods: manager.GetCache(), elected: manager.Elected(), now: time.Now},
		mtls.Expiry{"webhook": certificates.inUse, "webhook-to-agents": certificates.asking})
	for _, collector := range collectors {
		if err := ctrlmetrics.Registry.Register(collector); err != nil {
			return err
		}
	}
	// Asked for here, because the manager starts the server only if somebody does.
	server := manager.GetWebhookServer()
	ending := drain{told: ctx}
	server.Register(ReviewPath, ending.closing(counts.timeReviews(guard.Handler(log))))

	// The first request must not be the one that starts a cache and waits for it.
	for _, object := range []client.Object{&corev1.Node{}, namespaces} {
		informer, err := manager.GetCache().GetInformer(ctx, object)
		if err != nil {
			return fmt.Errorf("watching %T: %w", object, err)
		}
		if _, isNode := object.(*corev1.Node); isNode {
			if _, err := informer.AddEventHandler(counts.forget()); err != nil {
				return err
			}
		}
	}
	holds := &holdController{Guard: guard, pods: manager.GetCache(), log: log}
	modes := &namespaceController{namespaces: manager.GetCache(), events: guard.events, log: log, defaultMode: p.mode}
	taints := &taintController{
		enabled: o.taintNodes, nodes: manager.GetCache(), client: manager.GetClient(), events: guard.events, log: log,
		now: time.Now, changed: map[string]time.Time{},
	}
	err = errors.Join(
		holds.setUp(manager),
		modes.setUp(manager),
		taints.setUp(manager),
		certificates.setUp(manager, log),
		manager.AddHealthzCheck("alive", func(*http.Request) error { return nil }),
		manager.AddReadyzCheck("ending", ending.ready),
		manager.AddReadyzCheck("certificates", certificates.ready),
		manager.AddReadyzCheck("listener", server.StartedChecker()),
		manager.AddReadyzCheck("caches", func(r *http.Request) error {
			if !manager.GetCache().WaitForCacheSync(r.Context()) {
				return errors.New("the caches of nodes and namespaces are not filled yet")
			}
			return nil
		}),
	)
	if err != nil {
		return err
	}
	api, err := discovery.NewDiscoveryClientForConfig(config)
	if err != nil {
		return fmt.Errorf("setting up: %w", err)
	}
	go reach.Watch(ctx, log, []reach.Target{reach.APIServer(api.RESTClient())}, "mode", string(p.mode), "agentPort", o.agentPort)
	return manager.Start(ending.over(log, drainTime))
}

// trimNodes keeps of a Node what a decision and the guard's taint need; the rest, images above all, would be most of the
// webhook's memory. Of the labels it keeps those that the selectors ask for, of the conditions the agent's.
func trimNodes(selectors []labels.Selector) toolscache.TransformFunc {
	wanted := map[string]bool{}
	for _, selector := range selectors {
		requirements, _ := selector.Requirements()
		for _, requirement := range requirements {
			wanted[requirement.Key()] = true
		}
	}
	return func(object any) (any, error) {
		node, ok := object.(*corev1.Node)
		if !ok {
			return object, nil
		}
		trimmed := &corev1.Node{}
		trimmed.Name, trimmed.UID, trimmed.ResourceVersion = node.Name, node.UID, node.ResourceVersion
		for key, value := range node.Labels {
			if wanted[key] {
				metav1.SetMetaDataLabel(&trimmed.ObjectMeta, key, value)
			}
		}
		trimmed.Spec.Taints = node.Spec.Taints
		trimmed.Status.Addresses = node.Status.Addresses
		if condition := leftovers(node); condition.Type != "" {
			trimmed.Status.Conditions = []corev1.NodeCondition{condition}
		}
		return trimmed, nil
	}
}

// trimNamespace keeps of a namespace its mode.
func trimNamespace(object any) (any, error) {
	namespace, ok := object.(*metav1.PartialObjectMetadata)
	if !ok {
		return object, nil
	}
	trimmed := &metav1.PartialObjectMetadata{TypeMeta: namespace.TypeMeta}
	trimmed.Name, trimmed.UID, trimmed.ResourceVersion = namespace.Name, namespace.UID, namespace.ResourceVersion
	if value, ok := namespace.Labels[ModeLabel]; ok {
		trimmed.Labels = map[string]string{ModeLabel: value}
	}
	return trimmed, nil
}
