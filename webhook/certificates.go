package webhook

import (
	"crypto/tls"
	"fmt"
	"net/http"
	"os"
	"strings"

	"github.com/go-logr/logr"
	ctrl "sigs.k8s.io/controller-runtime"
	ctrlwebhook "sigs.k8s.io/controller-runtime/pkg/webhook"

	"github.com/eni-guard/eni-guard/internal/mtls"
	"github.com/eni-guard/eni-guard/internal/pki"
)

// namespaceFile is where a pod finds its namespace (kubelet, volume of the service account).
const namespaceFile = "/var/run/secrets/kubernetes.io/serviceaccount/namespace"

// certificates are what the webhook serves the API server with and asks agents with.
type certificates struct {
	serving ctrlwebhook.Options
	// inUse is what serving shows.
	inUse  mtls.Source
	asking mtls.Source
	setUp  func(ctrl.Manager, logr.Logger) error
	ready  func(*http.Request) error
}

// certificates returns those of the guard's own rotation, or those of somebody else's, from files.
func (o options) certificates() (certificates, error) {
	if o.release == "" {
		asking := mtls.Dir(o.agentTLSDir)
		return certificates{
			serving: ctrlwebhook.Options{Port: o.port, CertDir: o.tlsDir},
			inUse:   mtls.Dir(o.tlsDir),
			asking:  asking,
			setUp:   func(ctrl.Manager, logr.Logger) error { return nil },
			ready:   func(*http.Request) error { return asking.Check() },
		}, nil
	}
	namespace := o.leaseNamespace
	if namespace == "" {
		content, err := os.ReadFile(namespaceFile)
		if err != nil {
			return certificates{}, fmt.Errorf("--lease-namespace is not given, and this is no pod: %w", err)
		}
		namespace = strings.TrimSpace(string(content))
	}
	rotator := &pki.Rotator{Release: o.release, Namespace: namespace, Settings: o.validity, Serving: &mtls.Memory{}, Asking: &mtls.Memory{}}
	return certificates{
		serving: ctrlwebhook.Options{Port: o.port, TLSOpts: []func(*tls.Config){func(c *tls.Config) { c.GetCertificate = rotator.Serving.Certificate }}},
		inUse:   rotator.Serving,
		asking:  rotator.Asking,
		setUp:   rotator.SetUp,
		ready: func(*http.Request) error {
			if err := rotator.Serving.Check(); err != nil {
				return fmt.Errorf("to serve the API server: %w", err)
			}
			if err := rotator.Asking.Check(); err != nil {
				return fmt.Errorf("to ask agents: %w", err)
			}
			return nil
		},
	}, nil
}
