package e2e

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/eni-guard/eni-guard/internal/mtls"
	"github.com/eni-guard/eni-guard/test/e2e/incident"
)

// The Secrets that the guard makes.
const (
	authoritySecret = "eni-guard-ca"
	servingSecret   = "eni-guard-webhook-tls"
	askingSecret    = "eni-guard-client-tls"
	agentSecret     = "eni-guard-agent-tls"
)

func guardSecret(ctx context.Context, name string) (*corev1.Secret, error) {
	return cluster.CoreV1().Secrets(incident.GuardNamespace).Get(ctx, name, metav1.GetOptions{})
}

// content returns a key of one of the guard's Secrets.
func content(t *testing.T, name, key string) []byte {
	t.Helper()
	secret, err := guardSecret(t.Context(), name)
	wentThrough(t, err)
	if len(secret.Data[key]) == 0 {
		t.Fatalf("Secret %s has no %s", name, key)
	}
	return secret.Data[key]
}

// The webhook configurations of the guard. The rotator writes one after the other.
var configurations = []string{"eni-guard", "eni-guard-failing-open"}

// bundleOf returns the authorities by which the API server judges the webhook when it calls it for a configuration.
func bundleOf(ctx context.Context, name string) ([]byte, error) {
	configuration, err := cluster.AdmissionregistrationV1().ValidatingWebhookConfigurations().Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return nil, err
	}
	bundle := configuration.Webhooks[0].ClientConfig.CABundle
	if len(bundle) == 0 {
		return nil, fmt.Errorf("configuration %s has no caBundle", name)
	}
	return bundle, nil
}

// trustedBundle returns the authorities of both configurations, and an error as long as they are not the same.
func trustedBundle(ctx context.Context) ([]byte, error) {
	var bundle []byte
	for _, name := range configurations {
		this, err := bundleOf(ctx, name)
		if err != nil {
			return nil, err
		}
		if bundle != nil && !bytes.Equal(bundle, this) {
			return nil, errors.New("the two configurations trust different authorities")
		}
		bundle = this
	}
	return bundle, nil
}

// Replicas keep their connections to agents, and the API server its own to replicas: that alone would hide a certificate which
// nobody trusts. So new connections are made all the time, as a replica and as the API server would make them now.
type handshakes struct {
	stop   context.CancelFunc
	done   sync.WaitGroup
	count  int
	failed []error
}

func startHandshakes(t *testing.T) *handshakes {
	t.Helper()
	replicas, err := cluster.CoreV1().Pods(incident.GuardNamespace).List(t.Context(), metav1.ListOptions{LabelSelector: "app.kubernetes.io/component=webhook"})
	wentThrough(t, err)
	if len(replicas.Items) != 2 {
		t.Fatalf("there are %d replicas, not 2", len(replicas.Items))
	}
	ctx, cancel := context.WithCancel(t.Context())
	h := &handshakes{stop: cancel}
	t.Cleanup(func() { h.end() })
	// What a replica keeps while its Secret is away.
	asking := &mtls.Memory{}
	h.done.Go(func() {
		for ctx.Err() == nil {
			err := askAgent(ctx, asking)
			for _, replica := range replicas.Items {
				err = errors.Join(err, callReplica(ctx, net.JoinHostPort(replica.Status.PodIP, "9443")))
			}
			if ctx.Err() != nil {
				return
			}
			h.count++
			if err != nil {
				h.failed = append(h.failed, fmt.Errorf("%s: %w", time.Now().Format(time.TimeOnly), err))
			}
		}
	})
	return h
}

// askAgent connects to the agent, and reads until the agent has judged the certificate.
func askAgent(ctx context.Context, asking *mtls.Memory) error {
	if secret, err := guardSecret(ctx, askingSecret); err == nil {
		if err := asking.Set(secret.Data); err != nil {
			return err
		}
	}
	conn, err := mtls.Dialer(asking, &net.Dialer{Timeout: 10 * time.Second}, mtls.AgentName)(ctx, "tcp", "10.111.0.1:9807")
	if err != nil {
		return fmt.Errorf("connecting to the agent: %w", err)
	}
	defer conn.Close()
	if _, err := conn.Write([]byte("GET / HTTP/1.1\r\nHost: agent\r\nConnection: close\r\n\r\n")); err != nil {
		return fmt.Errorf("asking the agent: %w", err)
	}
	if _, err := conn.Read(make([]byte, 1)); err != nil {
		return fmt.Errorf("asking the agent: %w", err)
	}
	return nil
}

// callReplica connects to a replica as the API server does for each of the configurations: what one of them says is enough.
func callReplica(ctx context.Context, address string) error {
	for _, name := range configurations {
		bundle, err := bundleOf(ctx, name)
		if err != nil {
			return err
		}
		authorities := x509.NewCertPool()
		authorities.AppendCertsFromPEM(bundle)
		dialer := &tls.Dialer{NetDialer: &net.Dialer{Timeout: 10 * time.Second}, Config: &tls.Config{RootCAs: authorities, ServerName: "eni-guard-webhook.eni-guard.svc"}}
		conn, err := dialer.DialContext(ctx, "tcp", address)
		if err != nil {
			return fmt.Errorf("connecting to the webhook, as configuration %s trusts it: %w", name, err)
		}
		if err := conn.Close(); err != nil {
			return err
		}
	}
	return nil
}

// end stops, and returns how often all were connected to, and what failed.
func (h *handshakes) end() (int, []error) {
	h.stop()
	h.done.Wait()
	return h.count, h.failed
}

// signer returns the authority that signs, in PEM, or nil.
func signer(ctx context.Context) ([]byte, error) {
	secret, err := guardSecret(ctx, authoritySecret)
	if err != nil {
		return nil, err
	}
	return secret.Data["signing.crt"], nil
}

// rotated waits until the authority before signs no more and is trusted by nobody, and returns the one that does instead.
func rotated(t *testing.T, before []byte) []byte {
	t.Helper()
	var now []byte
	wentThrough(t, incident.Wait(t.Context(), 2*time.Minute, "a new authority to be the only one", func(ctx context.Context) error {
		var err error
		if now, err = signer(ctx); err != nil {
			return err
		}
		if len(now) == 0 || bytes.Equal(now, before) {
			return errors.New("the old authority still signs")
		}
		bundle, err := trustedBundle(ctx)
		if err == nil && !bytes.Equal(bundle, now) {
			err = errors.New("the old authority is still trusted")
		}
		for _, name := range []string{servingSecret, askingSecret, agentSecret} {
			secret, getting := guardSecret(ctx, name)
			if getting == nil && !bytes.Equal(secret.Data["ca.crt"], now) {
				getting = fmt.Errorf("Secret %s still trusts the old authority", name)
			}
			err = errors.Join(err, getting)
		}
		return err
	}))
	return now
}

// rotateUnderLoad is for certificates of a minute, of an authority of three: all are replaced, the authority as a whole, and whatever
// is deleted is made anew, while a pod is deleted by force all the time, and the guard's pods run on. long is the authority that
// was there before.
func rotateUnderLoad(t *testing.T, long []byte, pod *corev1.Pod) {
	pods := guardPods(t)
	load, connections := startLoad(t, pod.Namespace, pod.Name, false), startHandshakes(t)

	begin := time.Now()
	short := rotated(t, long)
	t.Logf("the authority was rotated in %s", time.Since(begin).Round(time.Second))

	deleted := map[string][]byte{}
	for _, name := range []string{agentSecret, askingSecret, servingSecret} {
		deleted[name] = content(t, name, "tls.crt")
		wentThrough(t, cluster.CoreV1().Secrets(incident.GuardNamespace).Delete(t.Context(), name, metav1.DeleteOptions{}))
		wentThrough(t, incident.Wait(t.Context(), 2*time.Minute, "Secret "+name+" to be made anew", func(ctx context.Context) error {
			secret, err := guardSecret(ctx, name)
			if err == nil && bytes.Equal(secret.Data["tls.crt"], deleted[name]) {
				return errors.New("it has the old certificate")
			}
			return err
		}))
	}
	if now := content(t, authoritySecret, "signing.crt"); !bytes.Equal(now, short) {
		t.Error("another authority signs by now")
	}
	// Without its key, the authority cannot sign any more, but is still trusted.
	wentThrough(t, cluster.CoreV1().Secrets(incident.GuardNamespace).Delete(t.Context(), authoritySecret, metav1.DeleteOptions{}))
	rotated(t, short)

	calls, failed := load.end()
	count, broken := connections.end()
	t.Logf("%d forced deletes, %d not answered by the guard; %d times five new connections, %d failed; in %s", calls, len(failed), count, len(broken), time.Since(begin).Round(time.Second))
	if calls < 500 || count < 20 {
		t.Error("that is no load")
	}
	for _, err := range append(failed, broken...) {
		t.Errorf("while certificates were rotated: %v", err)
	}
	if now := guardPods(t); now != pods {
		t.Errorf("the guard's pods were %s, are %s", pods, now)
	}
	kept(t, pod)
}

func TestAWipedBundleIsRepaired(t *testing.T) {
	pod := sleeper(t, namespace(t), "web-0", nil)
	for _, name := range configurations {
		_, err := cluster.AdmissionregistrationV1().ValidatingWebhookConfigurations().Patch(t.Context(), name, types.JSONPatchType,
			[]byte(`[{"op": "remove", "path": "/webhooks/0/clientConfig/caBundle"}]`), metav1.PatchOptions{})
		wentThrough(t, err)
	}
	// Not what it was before: another authority may be on its way in or out.
	wentThrough(t, incident.Wait(t.Context(), 2*time.Minute, "the bundle to be repaired", func(ctx context.Context) error {
		bundle, err := trustedBundle(ctx)
		if err != nil {
			return err
		}
		signing, err := signer(ctx)
		if err == nil && (len(signing) == 0 || !bytes.Contains(bundle, signing)) {
			err = errors.New("the authority that signs is not in it")
		}
		return err
	}))
	wentThrough(t, incident.Wait(t.Context(), 2*time.Minute, "the guard to answer", func(ctx context.Context) error {
		return answered(cluster.CoreV1().Pods(pod.Namespace).Delete(ctx, pod.Name, metav1.DeleteOptions{GracePeriodSeconds: new(int64(0)), DryRun: []string{metav1.DryRunAll}}))
	}))
}

// answered returns an error unless err is a refusal by the guard, after a look at the node.
func answered(err error) error {
	switch {
	case err == nil:
		return errors.New("it was let through")
	case !strings.Contains(err.Error(), "denied the request: pod ") || !strings.Contains(err.Error(), "is still alive on node node-1"):
		return err // "cannot tell whether …" is no look at the node
	default:
		return nil
	}
}

// Two replicas that start at once, with nothing there, make one authority. Agents trust it as soon as they have it. What takes all
// away is what the runbook says of an authority whose key is in wrong hands.
func TestTwoReplicasThatStartAtOnceMakeOneAuthority(t *testing.T) {
	steps := stepsRunElsewhere(t, byCertificates)
	pod := sleeper(t, namespace(t), "web-0", nil)
	t.Cleanup(func() {
		if out, err := cluster.Kubectl(context.Background(), "-n", incident.GuardNamespace, "scale", "deployment/eni-guard-webhook", "--replicas=2"); err != nil {
			t.Errorf("%v\n%s", err, out)
		}
		restored(t)
	})
	before := content(t, authoritySecret, "signing.crt")
	watch, err := cluster.CoreV1().Secrets(incident.GuardNamespace).Watch(t.Context(), metav1.ListOptions{FieldSelector: "metadata.name=" + authoritySecret})
	wentThrough(t, err)
	collected := make(chan map[string]bool)
	go func() {
		made := map[string]bool{}
		for event := range watch.ResultChan() {
			if secret, isSecret := event.Object.(*corev1.Secret); isSecret {
				made[string(secret.Data["signing.crt"])] = true
			}
		}
		collected <- made
	}()
	if out, err := shell(t.Context(), pod.Namespace, t.TempDir(), "set -e\n"+strings.Join(steps, "\n")); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	restored(t)
	wentThrough(t, incident.Wait(t.Context(), 2*time.Minute, "the guard to answer", func(ctx context.Context) error {
		return answered(cluster.CoreV1().Pods(pod.Namespace).Delete(ctx, pod.Name, metav1.DeleteOptions{GracePeriodSeconds: new(int64(0)), DryRun: []string{metav1.DryRunAll}}))
	}))
	watch.Stop()
	made := <-collected
	delete(made, string(before))
	if len(made) != 1 {
		t.Errorf("%d authorities were made", len(made))
	}
	block, _ := pem.Decode(content(t, servingSecret, "tls.crt"))
	certificate, err := x509.ParseCertificate(block.Bytes)
	wentThrough(t, err)
	left := time.Until(certificate.NotAfter)
	if left < 89*24*time.Hour || left > 90*24*time.Hour {
		t.Errorf("the certificate is good for %s", left)
	}
}

// The cluster has no cert-manager, so this shows what it would be given, and what is said without it.
func TestCertManagerByOneValue(t *testing.T) {
	t.Parallel()
	chart := filepath.Join(repo, "charts/eni-guard")
	out, err := helm(t.Context(), "upgrade", "eni-guard", chart, "--reuse-values", "--set", "certManager.enabled=true", "--dry-run=server")
	if err == nil || !strings.Contains(out, "certManager.enabled is true, but this cluster has no cert-manager.io/v1/Certificate: install cert-manager first") {
		t.Errorf("Helm says (%v):\n%s", err, out)
	}
	out, err = helm(t.Context(), "template", "eni-guard", chart, "--set", "certManager.enabled=true", "--api-versions", "cert-manager.io/v1/Certificate")
	wentThrough(t, err)
	for part, times := range map[string]int{
		"kind: Issuer\n": 2, "kind: Certificate\n": 4, "cert-manager.io/inject-ca-from: eni-guard/eni-guard-webhook-tls\n": 2,
		"secretName: eni-guard-webhook-tls": 2, "secretName: eni-guard-agent-tls": 2, "secretName: eni-guard-client-tls": 2,
		"dnsNames: [eni-guard-webhook.eni-guard.svc]": 1, "dnsNames: [" + mtls.AgentName + "]": 1, "dnsNames: [" + mtls.WebhookName + "]": 1,
		"--release=": 0, "resources: [secrets]": 0, "caBundle": 0,
	} {
		if got := strings.Count(out, part); got != times {
			t.Errorf("%q is there %d times, not %d", part, got, times)
		}
	}
}

// What does not fit together is refused before anything is installed, by the name of the value.
func TestCertificatesThatCannotBeRotatedAreRefused(t *testing.T) {
	t.Parallel()
	for value, want := range map[string]string{
		"authorityValidity=3y":     "'/certificates/authorityValidity': '3y' does not match pattern",
		"authorityValidity=87601h": "certificates.authorityValidity (87601h) must be at most 10 years",
		"authorityValidity=100h":   "certificates.authorityValidity (100h) must be at least 3 times certificates.validity (2160h)",
		"validity=90m":             "certificates.validity (90m) must be at least 3 times certificates.overlap (1h)",
		"overlap=4s":               "certificates.overlap (4s) must be between 5s and 168h",
	} {
		if out, err := helm(t.Context(), "template", "eni-guard", filepath.Join(repo, "charts/eni-guard"), "--set", "certificates."+value); err == nil || !strings.Contains(out, want) {
			t.Errorf("%s (%v):\n%s", value, err, out)
		}
	}
}
