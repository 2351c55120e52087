package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/eni-guard/eni-guard/test/e2e/incident"
)

// testNamespace is where `helm test` runs its pod.
const testNamespace = "eni-guard-test"

func TestHelmTest(t *testing.T) {
	t.Run("reads the verdict about a pod that runs", func(t *testing.T) {
		out, err := helm(t.Context(), "test", "eni-guard", "--timeout", "2m")
		if err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		for _, part := range []string{
			"eni-guard works: it refuses to remove pod eni-guard-test/eni-guard-test by force.",
			"pod eni-guard-test/eni-guard-test is still alive on node node-1: ",
		} {
			if !strings.Contains(out, part) {
				t.Errorf("it does not say %q:\n%s", part, out)
			}
		}
		wentThrough(t, incident.Wait(t.Context(), 2*time.Minute, "the namespace of the test to be gone", func(ctx context.Context) error {
			_, err := cluster.CoreV1().Namespaces().Get(ctx, testNamespace, metav1.GetOptions{})
			if apierrors.IsNotFound(err) {
				return nil
			}
			return errors.Join(errors.New("it is still there"), err)
		}))
	})
	t.Run("fails where nothing guards", func(t *testing.T) {
		withoutConfigurations(t)
		out, err := helm(t.Context(), "test", "eni-guard", "--timeout", "2m")
		if err == nil || !strings.Contains(out, "eni-guard does not guard pod eni-guard-test/eni-guard-test") {
			t.Errorf("%v\n%s", err, out)
		}
	})
}

// withoutConfigurations takes the API server's way to the webhook away, until the end of the test.
func withoutConfigurations(t *testing.T) {
	t.Helper()
	pod := sleeper(t, namespace(t), "web-0", nil)
	asked := func(works bool) func(context.Context) error {
		return func(ctx context.Context) error {
			if out, err := check(ctx, pod.Namespace, pod.Name); (err == nil) != works {
				return fmt.Errorf("%w: %s", err, out)
			}
			return nil
		}
	}
	t.Cleanup(func() {
		if err := incident.Wait(context.Background(), 2*time.Minute, "the guard to be back", asked(true)); err != nil {
			t.Error(err)
		}
	})
	api := cluster.AdmissionregistrationV1().ValidatingWebhookConfigurations()
	for _, name := range []string{"eni-guard", "eni-guard-failing-open"} {
		configuration, err := api.Get(t.Context(), name, metav1.GetOptions{})
		wentThrough(t, err)
		wentThrough(t, api.Delete(t.Context(), name, metav1.DeleteOptions{}))
		t.Cleanup(func() {
			if err := putBack(context.Background(), configuration); err != nil {
				t.Error(err)
			}
		})
	}
	wentThrough(t, incident.Wait(t.Context(), 2*time.Minute, "the API server to ask nobody any more", asked(false)))
}

// putBack makes a webhook configuration anew, as Helm and the guard do it: the fields are Helm's, which could not upgrade what
// belongs to somebody else, and the list of authorities is the guard's.
func putBack(ctx context.Context, original *admissionregistrationv1.ValidatingWebhookConfiguration) error {
	api := cluster.AdmissionregistrationV1().ValidatingWebhookConfigurations()
	again := &admissionregistrationv1.ValidatingWebhookConfiguration{
		TypeMeta:   metav1.TypeMeta{APIVersion: "admissionregistration.k8s.io/v1", Kind: "ValidatingWebhookConfiguration"},
		ObjectMeta: metav1.ObjectMeta{Name: original.Name, Labels: original.Labels, Annotations: original.Annotations},
		Webhooks:   original.DeepCopy().Webhooks,
	}
	bundle := again.Webhooks[0].ClientConfig.CABundle
	again.Webhooks[0].ClientConfig.CABundle = nil
	body, err := json.Marshal(again)
	if err != nil {
		return err
	}
	if _, err := api.Patch(ctx, again.Name, types.ApplyPatchType, body, metav1.PatchOptions{FieldManager: "helm", Force: new(true)}); err != nil {
		return err
	}
	body, err = json.Marshal([]map[string]any{{"op": "add", "path": "/webhooks/0/clientConfig/caBundle", "value": bundle}})
	if err != nil {
		return err
	}
	_, err = api.Patch(ctx, again.Name, types.JSONPatchType, body, metav1.PatchOptions{FieldManager: "eni-guard"})
	return err
}

// check runs `eni-guard check` about a pod, as the administrator.
func check(ctx context.Context, namespace, name string) (string, error) {
	out, err := exec.CommandContext(ctx, filepath.Join(repo, "bin/eni-guard"), "check", name, "-n", namespace, "--kubeconfig", cluster.Kubeconfig()).CombinedOutput()
	return string(out), err
}

func TestCheckByAPerson(t *testing.T) {
	for mode, want := range map[string]string{
		"deny": "eni-guard works: it refuses", "hold": "eni-guard works: it would let", "audit": "eni-guard works: it would let", "off": "eni-guard does not guard pod",
	} {
		pod := sleeper(t, moded(t, mode), "web-0", nil)
		out, err := check(t.Context(), pod.Namespace, pod.Name)
		if works := mode != "off"; (err == nil) != works || !strings.Contains(out, want) || !strings.Contains(out, pod.Namespace+"/web-0") {
			t.Errorf("in mode %s: %v\n%s", mode, err, out)
		}
		kept(t, pod)
	}
	ns := namespace(t)
	if out, err := check(t.Context(), ns, "nobody"); err == nil || !strings.Contains(out, `pods "nobody" not found`) {
		t.Errorf("about no pod: %v\n%s", err, out)
	}
}
