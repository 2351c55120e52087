package e2e

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/eni-guard/eni-guard/internal/mtls"
	"github.com/eni-guard/eni-guard/test/e2e/incident"
)

// withToken returns a client that has a token and nothing else.
func withToken(t *testing.T, token string) kubernetes.Interface {
	t.Helper()
	config, err := clientcmd.BuildConfigFromFlags("", cluster.Kubeconfig())
	wentThrough(t, err)
	config = rest.AnonymousClientConfig(config)
	config.BearerToken = token
	client, err := kubernetes.NewForConfig(config)
	wentThrough(t, err)
	return client
}

// agentToken reads the token that the running agent has.
func agentToken(t *testing.T) string {
	t.Helper()
	pods, err := cluster.CoreV1().Pods(incident.GuardNamespace).List(t.Context(), metav1.ListOptions{LabelSelector: "app.kubernetes.io/component=agent"})
	wentThrough(t, err)
	for _, pod := range pods.Items {
		for _, process := range incident.Processes(&pod) {
			if process.Command != "eni-guard" {
				continue
			}
			var token []byte
			token, err = os.ReadFile(fmt.Sprintf("/proc/%d/root/var/run/secrets/kubernetes.io/serviceaccount/token", process.PID))
			// What another test runs in the agent's container, or the container of an agent that has ended, may be gone by now.
			if err == nil {
				return string(token)
			}
		}
	}
	t.Fatalf("no agent runs whose token can be read (%v)", err)
	return ""
}

// Whoever has taken over a node has the token of its agent. It must be of no use for anything else than what the agent does.
func TestTheTokenOfAnAgentIsGoodForItsOwnNodeOnly(t *testing.T) {
	t.Parallel()
	agent := withToken(t, agentToken(t))
	pod := sleeper(t, namespace(t), "web-0", nil)
	other := ghost(t, nil)
	const (
		ownCondition = `{"status":{"conditions":[{"type":"OrphanedSandbox","status":"False","reason":"Test","message":"the test says so"}]}}`
		byPolicy     = "ValidatingAdmissionPolicy 'agent.eni-guard.io'"
		byRBAC       = "is forbidden: User \"system:serviceaccount:eni-guard:eni-guard-agent\" cannot "
	)
	dryRun := metav1.PatchOptions{DryRun: []string{metav1.DryRunAll}}
	patchStatus := func(api kubernetes.Interface, node, patch string) error {
		_, err := api.CoreV1().Nodes().Patch(t.Context(), node, types.StrategicMergePatchType, []byte(patch), dryRun, "status")
		return err
	}
	wentThrough(t, patchStatus(agent, incident.Node, ownCondition))

	for _, c := range []struct {
		name, by, says string
		try            func() error
	}{
		{"the condition of another node", byPolicy, "an agent may write to its own node only: this token is of node node-1, not of node " + other,
			func() error { return patchStatus(agent, other, ownCondition) }},
		{"another condition of its node", byPolicy, "the condition OrphanedSandbox of its node only",
			func() error {
				return patchStatus(agent, incident.Node, `{"status":{"conditions":[{"type":"Ready","status":"False"}]}}`)
			}},
		{"a condition that others have written, taken away", byPolicy, "the condition OrphanedSandbox of its node only",
			func() error {
				return patchStatus(agent, incident.Node, `{"status":{"conditions":[{"type":"Ready","$patch":"delete"}]}}`)
			}},
		{"the addresses of its node", byPolicy, "the condition OrphanedSandbox of its node only",
			func() error {
				return patchStatus(agent, incident.Node, `{"status":{"addresses":[{"type":"InternalIP","address":"10.0.0.1"}]}}`)
			}},
		{"the capacity of its node", byPolicy, "the condition OrphanedSandbox of its node only",
			func() error {
				return patchStatus(agent, incident.Node, `{"status":{"capacity":{"example.com/gpu":"1"}}}`)
			}},
		{"a label of its node, by way of the status", byPolicy, "the condition OrphanedSandbox of its node only",
			func() error { return patchStatus(agent, incident.Node, `{"metadata":{"labels":{"e2e":"changed"}}}`) }},
		{"an annotation of its node, by way of the status", byPolicy, "the condition OrphanedSandbox of its node only",
			func() error {
				return patchStatus(agent, incident.Node, `{"metadata":{"annotations":{"e2e":"changed"}}}`)
			}},
		{"a taint of its node", byRBAC, "patch", func() error {
			_, err := agent.CoreV1().Nodes().Patch(t.Context(), incident.Node, types.MergePatchType, []byte(`{"spec":{"unschedulable":true}}`), dryRun)
			return err
		}},
		{"deleting a pod", byRBAC, "delete", func() error {
			return agent.CoreV1().Pods(pod.Namespace).Delete(t.Context(), pod.Name, metav1.DeleteOptions{DryRun: dryRun.DryRun})
		}},
		{"evicting a pod", byRBAC, "create", func() error { return evict(t.Context(), agent, pod, &metav1.DeleteOptions{DryRun: dryRun.DryRun}) }},
		{"patching a pod", byRBAC, "patch", func() error {
			_, err := agent.CoreV1().Pods(pod.Namespace).Patch(t.Context(), pod.Name, types.MergePatchType, []byte(`{"metadata":{"labels":{"e2e":"changed"}}}`), dryRun)
			return err
		}},
		{"patching a pod's status", byRBAC, "patch", func() error {
			_, err := agent.CoreV1().Pods(pod.Namespace).Patch(t.Context(), pod.Name, types.MergePatchType, []byte(`{"status":{"phase":"Failed"}}`), dryRun, "status")
			return err
		}},
		{"reading a Secret", byRBAC, "get", func() error {
			_, err := agent.CoreV1().Secrets(incident.GuardNamespace).Get(t.Context(), "eni-guard-client-tls", metav1.GetOptions{})
			return err
		}},
	} {
		if err := c.try(); !apierrors.IsForbidden(err) && !apierrors.IsInvalid(err) || !strings.Contains(err.Error(), c.by) || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v", c.name, err)
		}
	}

	// A token of the same account that is none of a pod's says of no node that it is its own.
	request, err := cluster.CoreV1().ServiceAccounts(incident.GuardNamespace).CreateToken(t.Context(), "eni-guard-agent", &authenticationv1.TokenRequest{}, metav1.CreateOptions{})
	wentThrough(t, err)
	err = patchStatus(withToken(t, request.Status.Token), incident.Node, ownCondition)
	if err == nil || !strings.Contains(err.Error(), "this token is of no node, not of node "+incident.Node) {
		t.Errorf("a token that is none of a pod's: %v", err)
	}
}

// The webhook asks no agent that a stranger's authority vouches for: it would believe what that one says.
func TestAnAgentOfAnotherAuthorityIsNotTrusted(t *testing.T) {
	t.Parallel()
	secret, err := cluster.CoreV1().Secrets(incident.GuardNamespace).Get(t.Context(), "eni-guard-client-tls", metav1.GetOptions{})
	wentThrough(t, err)
	dial := func(authority []byte) error {
		dir := t.TempDir()
		for name, content := range map[string][]byte{"tls.crt": secret.Data["tls.crt"], "tls.key": secret.Data["tls.key"], "ca.crt": authority} {
			wentThrough(t, os.WriteFile(filepath.Join(dir, name), content, 0o600))
		}
		conn, err := mtls.Dialer(mtls.Dir(dir), &net.Dialer{Timeout: 10 * time.Second}, mtls.AgentName)(t.Context(), "tcp", "10.111.0.1:9807")
		if err == nil {
			err = conn.Close()
		}
		return err
	}
	wentThrough(t, dial(secret.Data["ca.crt"]))
	if err := dial(stranger(t)); err == nil || !strings.Contains(err.Error(), "certificate signed by unknown authority") {
		t.Errorf("with another authority: %v", err)
	}
}

// stranger returns the certificate of an authority that nobody knows, PEM.
func stranger(t *testing.T) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	wentThrough(t, err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "stranger"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageCertSign,
	}
	certificate, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	wentThrough(t, err)
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: certificate})
}
