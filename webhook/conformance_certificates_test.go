//go:build conformance

package webhook

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/go-logr/logr"
	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/wait"
	applycorev1 "k8s.io/client-go/applyconfigurations/core/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/config"
	metricsserver "sigs.k8s.io/controller-runtime/pkg/metrics/server"

	"github.com/eni-guard/eni-guard/internal/mtls"
	"github.com/eni-guard/eni-guard/internal/pki"
)

const guardNamespace = "eni-guard"

// Two replicas start at the same moment with nothing there, both take themselves for the leader, and have the rights that the
// chart gives: they make one authority, which everybody trusts, and mend what is lost or wiped.
func TestConformanceCertificates(t *testing.T) {
	s := startAPIServer(t)
	t.Logf("API server %s", s.version)
	s.giveRights(t)
	watch, err := s.CoreV1().Secrets(guardNamespace).Watch(t.Context(), metav1.ListOptions{FieldSelector: "metadata.name=eni-guard-ca"})
	if err != nil {
		t.Fatal(err)
	}
	collected, first := make(chan map[string]bool), make(chan struct{})
	go func() {
		made := map[string]bool{}
		for event := range watch.ResultChan() {
			if secret, isSecret := event.Object.(*corev1.Secret); isSecret {
				if len(made) == 0 {
					close(first)
				}
				made[string(secret.Data["signing.crt"])] = true
			}
		}
		collected <- made
	}()
	replicas := []*pki.Rotator{s.startReplica(t), s.startReplica(t)}
	s.await(t, "certificates for everybody", func(ctx context.Context) error {
		return errors.Join(replicas[0].Serving.Check(), replicas[0].Asking.Check(), replicas[1].Serving.Check(), replicas[1].Asking.Check(), s.everybodyTrusts(ctx))
	})
	select {
	case <-first:
	case made := <-collected:
		t.Fatalf("the watch has ended after %d authorities", len(made))
	}
	watch.Stop()
	if made := <-collected; len(made) != 1 {
		t.Errorf("%d authorities were made", len(made))
	}

	for _, name := range []string{"eni-guard", "eni-guard-failing-open"} {
		_, err := s.AdmissionregistrationV1().ValidatingWebhookConfigurations().Patch(t.Context(), name, types.JSONPatchType,
			[]byte(`[{"op": "remove", "path": "/webhooks/0/clientConfig/caBundle"}]`), metav1.PatchOptions{})
		if err != nil {
			t.Fatal(err)
		}
	}
	s.await(t, "the wiped bundles", s.everybodyTrusts)
	for _, name := range []string{"eni-guard-agent-tls", "eni-guard-webhook-tls", "eni-guard-client-tls", "eni-guard-ca"} {
		if err := s.CoreV1().Secrets(guardNamespace).Delete(t.Context(), name, metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
		s.await(t, "Secret "+name+" that was deleted", func(ctx context.Context) error {
			_, err := s.CoreV1().Secrets(guardNamespace).Get(ctx, name, metav1.GetOptions{})
			return errors.Join(err, s.everybodyTrusts(ctx))
		})
	}

	t.Run("and no other Secret", func(t *testing.T) {
		account := kubernetes.NewForConfigOrDie(s.asTheWebhook())
		for what, try := range map[string]func(namespace, name string) error{
			"get": func(namespace, name string) error {
				_, err := account.CoreV1().Secrets(namespace).Get(t.Context(), name, metav1.GetOptions{})
				return err
			},
			"apply": func(namespace, name string) error {
				_, err := account.CoreV1().Secrets(namespace).Apply(t.Context(), applycorev1.Secret(name, namespace), metav1.ApplyOptions{FieldManager: "test"})
				return err
			},
			"create": func(namespace, name string) error {
				_, err := account.CoreV1().Secrets(namespace).Create(t.Context(), &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{})
				return err
			},
			"delete": func(namespace, name string) error {
				return account.CoreV1().Secrets(namespace).Delete(t.Context(), name, metav1.DeleteOptions{})
			},
			"list": func(namespace, _ string) error {
				_, err := account.CoreV1().Secrets(namespace).List(t.Context(), metav1.ListOptions{})
				return err
			},
		} {
			for namespace, name := range map[string]string{guardNamespace: "other", "default": "eni-guard-ca"} {
				if err := try(namespace, name); !apierrors.IsForbidden(err) {
					t.Errorf("%s %s/%s: %v", what, namespace, name, err)
				}
			}
		}
		_, err := account.AdmissionregistrationV1().ValidatingWebhookConfigurations().Patch(t.Context(), "other", types.MergePatchType, []byte("{}"), metav1.PatchOptions{})
		if !apierrors.IsForbidden(err) {
			t.Errorf("patch another webhook configuration: %v", err)
		}
	})
}

// giveRights makes what the chart has that the rotation needs: namespace, account, rights, webhook configurations.
func (s *apiServer) giveRights(t *testing.T) {
	t.Helper()
	ctx := t.Context()
	_, err := s.CoreV1().Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: guardNamespace}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for _, document := range templateChart(t, s.version) {
		object, _, err := scheme.Codecs.UniversalDeserializer().Decode(document, nil, nil)
		if err != nil {
			t.Fatalf("%v\n%s", err, document)
		}
		if in, _ := meta.Accessor(object); in == nil || in.GetNamespace() != "" && in.GetNamespace() != guardNamespace {
			continue
		}
		switch o := object.(type) {
		case *corev1.ServiceAccount:
			_, err = s.CoreV1().ServiceAccounts(o.Namespace).Create(ctx, o, metav1.CreateOptions{})
		case *rbacv1.Role:
			_, err = s.RbacV1().Roles(o.Namespace).Create(ctx, o, metav1.CreateOptions{})
		case *rbacv1.RoleBinding:
			_, err = s.RbacV1().RoleBindings(o.Namespace).Create(ctx, o, metav1.CreateOptions{})
		case *rbacv1.ClusterRole:
			_, err = s.RbacV1().ClusterRoles().Create(ctx, o, metav1.CreateOptions{})
		case *rbacv1.ClusterRoleBinding:
			_, err = s.RbacV1().ClusterRoleBindings().Create(ctx, o, metav1.CreateOptions{})
		case *admissionregistrationv1.ValidatingWebhookConfiguration:
			_, err = s.AdmissionregistrationV1().ValidatingWebhookConfigurations().Create(ctx, o, metav1.CreateOptions{})
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// asTheWebhook is how the account of the webhook reaches the API server.
func (s *apiServer) asTheWebhook() *rest.Config {
	account := rest.CopyConfig(s.config)
	account.Impersonate = rest.ImpersonationConfig{
		UserName: "system:serviceaccount:" + guardNamespace + ":eni-guard-webhook",
		Groups:   []string{"system:serviceaccounts", "system:serviceaccounts:" + guardNamespace, "system:authenticated"},
	}
	return account
}

func (s *apiServer) startReplica(t *testing.T) *pki.Rotator {
	t.Helper()
	manager, err := ctrl.NewManager(s.asTheWebhook(), ctrl.Options{
		Metrics: metricsserver.Options{BindAddress: "0"}, Controller: config.Controller{SkipNameValidation: new(true)},
	})
	if err != nil {
		t.Fatal(err)
	}
	rotator := &pki.Rotator{
		Release: "eni-guard", Namespace: guardNamespace, Serving: &mtls.Memory{}, Asking: &mtls.Memory{},
		Settings: pki.Settings{Authority: 1000 * time.Hour, Leaf: 100 * time.Hour, Overlap: time.Hour},
	}
	if err := rotator.SetUp(manager, logr.Discard()); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	ctx, cancel := context.WithCancel(context.Background())
	go func() { ended <- manager.Start(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	return rotator
}

// everybodyTrusts returns an error unless both configurations and all certificates have the same authorities beside them, all
// that the authorities' own Secret lists.
func (s *apiServer) everybodyTrusts(ctx context.Context) error {
	authority, err := s.CoreV1().Secrets(guardNamespace).Get(ctx, "eni-guard-ca", metav1.GetOptions{})
	if err != nil {
		return err
	}
	trusted := authority.Data["trusted.crt"]
	for _, name := range []string{"eni-guard-agent-tls", "eni-guard-webhook-tls", "eni-guard-client-tls"} {
		secret, err := s.CoreV1().Secrets(guardNamespace).Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		if !bytes.Equal(secret.Data["ca.crt"], trusted) {
			return fmt.Errorf("%s has %d authorities of %d", name, strings.Count(string(secret.Data["ca.crt"]), "BEGIN"), strings.Count(string(trusted), "BEGIN"))
		}
		if err := (&mtls.Memory{}).Set(secret.Data); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	for _, name := range []string{"eni-guard", "eni-guard-failing-open"} {
		configuration, err := s.AdmissionregistrationV1().ValidatingWebhookConfigurations().Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		if !bytes.Equal(configuration.Webhooks[0].ClientConfig.CABundle, trusted) {
			return fmt.Errorf("configuration %s has another caBundle", name)
		}
	}
	return nil
}

func (s *apiServer) await(t *testing.T, what string, condition func(context.Context) error) {
	t.Helper()
	last := errors.New("nothing was tried")
	err := wait.PollUntilContextTimeout(t.Context(), 50*time.Millisecond, time.Minute, true, func(ctx context.Context) (bool, error) {
		last = condition(ctx)
		return last == nil, nil
	})
	if err != nil {
		t.Fatalf("waited for %s: %v", what, last)
	}
}
