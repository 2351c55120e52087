package scale

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/types"

	"github.com/eni-guard/eni-guard/internal/mtls"
)

func apiUID(number int) types.UID {
	return types.UID(fmt.Sprintf("0e0d5ce6-6a6c-4c5b-9f6c-%012d", number))
}

// insecure talks to the webhook without a look at its certificate.
func insecure(connections int) *http.Transport {
	return &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, MaxIdleConnsPerHost: connections}
}

// authority issues certificates for the parts of one run.
type authority struct {
	certificate *x509.Certificate
	key         *ecdsa.PrivateKey
}

func newAuthority(b *testing.B) *authority {
	b.Helper()
	a := &authority{certificate: &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "scale"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageCertSign,
	}}
	var err error
	if a.key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		b.Fatal(err)
	}
	if a.certificate.Raw, err = x509.CreateCertificate(rand.Reader, a.certificate, a.certificate, a.key.Public(), a.key); err != nil {
		b.Fatal(err)
	}
	return a
}

// issue returns a directory with a certificate for a name.
func (a *authority) issue(b *testing.B, name string) string {
	b.Helper()
	dir := b.TempDir()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		b.Fatal(err)
	}
	leaf, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: name}, DNSNames: []string{name},
		NotBefore: a.certificate.NotBefore, NotAfter: a.certificate.NotAfter,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}, a.certificate, key.Public(), a.key)
	if err != nil {
		b.Fatal(err)
	}
	private, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		b.Fatal(err)
	}
	for file, block := range map[string]*pem.Block{
		"tls.crt": {Type: "CERTIFICATE", Bytes: leaf}, "tls.key": {Type: "EC PRIVATE KEY", Bytes: private}, "ca.crt": {Type: "CERTIFICATE", Bytes: a.certificate.Raw},
	} {
		if err := os.WriteFile(filepath.Join(dir, file), pem.EncodeToMemory(block), 0o600); err != nil {
			b.Fatal(err)
		}
	}
	return dir
}

// startAgents answers at one port of every address of 127.0.0.0/8.
func startAgents(b *testing.B) *agents {
	b.Helper()
	authority := newAuthority(b)
	listener, err := net.Listen("tcp4", "0.0.0.0:0")
	if err != nil {
		b.Fatal(err)
	}
	a := &agents{nodes: map[string]bool{}, webhookTLS: authority.issue(b, "localhost"), clientTLS: authority.issue(b, mtls.WebhookName)}
	if _, a.port, err = net.SplitHostPort(listener.Addr().String()); err != nil {
		b.Fatal(err)
	}
	server := &http.Server{
		Handler: a, ReadHeaderTimeout: 10 * time.Second, ErrorLog: log.New(io.Discard, "", 0),
		TLSConfig: mtls.Server(mtls.Dir(authority.issue(b, mtls.AgentName)), mtls.WebhookName),
	}
	go func() { _ = server.ServeTLS(listener, "", "") }()
	b.Cleanup(func() { _ = server.Close() })
	return a
}

// startWebhook starts the binary, and returns when it is ready.
func (s *apiServer) startWebhook(b *testing.B, a *agents) *webhook {
	b.Helper()
	kubeconfig := filepath.Join(b.TempDir(), "kubeconfig")
	if err := os.WriteFile(kubeconfig, s.kubeconfig, 0o600); err != nil {
		b.Fatal(err)
	}
	port, health, metrics := freePort(b), freePort(b), freePort(b)
	log, err := os.Create(filepath.Join(b.TempDir(), "webhook.log"))
	if err != nil {
		b.Fatal(err)
	}
	w := &webhook{url: "https://127.0.0.1:" + port + "/force-delete?timeout=10s", metrics: "http://127.0.0.1:" + metrics + "/metrics"}
	w.process = exec.Command(binary(b, "ENI_GUARD_BIN", "eni-guard"), "webhook", "--port="+port, "--health-address=127.0.0.1:"+health,
		"--metrics-address=127.0.0.1:"+metrics, "--agent-port="+a.port, "--tls-dir="+a.webhookTLS, "--agent-tls-dir="+a.clientTLS,
		"--lease-namespace=default", "--excluded-nodes=type=virtual-kubelet", "--excluded-nodes=kubernetes.io/os=windows")
	w.process.Env = append(os.Environ(), "KUBECONFIG="+kubeconfig)
	w.process.Stdout, w.process.Stderr = log, log
	start := time.Now()
	if err := w.process.Start(); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { w.stop(b) })
	deadline := time.NewTimer(time.Minute)
	defer deadline.Stop()
	for {
		if err := answersOK("http://127.0.0.1:" + health + "/readyz"); err == nil {
			w.ready = time.Since(start)
			return w
		}
		select {
		case <-deadline.C:
			content, _ := os.ReadFile(log.Name())
			b.Fatalf("the webhook is not ready after a minute:\n%s", content)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

func answersOK(url string) error {
	response, err := http.Get(url)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return errors.New(response.Status)
	}
	return nil
}

func freePort(b *testing.B) string {
	b.Helper()
	listener, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	_, port, err := net.SplitHostPort(listener.Addr().String())
	if err := errors.Join(err, listener.Close()); err != nil {
		b.Fatal(err)
	}
	return port
}
