package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/rand"

	"github.com/eni-guard/eni-guard/test/e2e/incident"
)

// helm runs Helm on the guard's release and returns what it prints, on both streams.
func helm(ctx context.Context, args ...string) (string, error) {
	args = append([]string{"--kubeconfig", cluster.Kubeconfig(), "--namespace", incident.GuardNamespace}, args...)
	out, err := exec.CommandContext(ctx, cluster.Binary("helm"), args...).CombinedOutput()
	return string(out), err
}

// reinstalled installs the guard again, with the values it had, at the end of a test that uninstalls it.
func reinstalled(t *testing.T) {
	t.Helper()
	values, err := helm(t.Context(), "get", "values", "eni-guard", "--output", "json")
	if err != nil {
		t.Fatalf("%v\n%s", err, values)
	}
	file := filepath.Join(t.TempDir(), "values.json")
	wentThrough(t, os.WriteFile(file, []byte(values), 0o600))
	t.Cleanup(func() {
		ctx := context.Background()
		// A test that failed in between may have left it half installed.
		if out, err := helm(ctx, "status", "eni-guard"); err == nil && !strings.Contains(out, "STATUS: deployed") {
			out, err := helm(ctx, "uninstall", "eni-guard", "--no-hooks", "--wait")
			t.Logf("%s(%v)", out, err)
		}
		out, err := helm(ctx, "upgrade", "--install", "eni-guard", filepath.Join(repo, "charts/eni-guard"), "--values", file, "--wait", "--timeout", "2m")
		if err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		restored(t)
	})
}

// guardObjects names everything in the cluster that belongs to the guard, except its namespace.
func guardObjects(t *testing.T) string {
	t.Helper()
	out := kubectl(t, incident.GuardNamespace, "get", "--ignore-not-found", "--output=name", "--selector=app.kubernetes.io/name=eni-guard",
		"validatingwebhookconfigurations,validatingadmissionpolicies,validatingadmissionpolicybindings,clusterroles,clusterrolebindings,"+
			"roles,rolebindings,serviceaccounts,services,secrets,configmaps,deployments,daemonsets,jobs,pods,poddisruptionbudgets,networkpolicies")
	out += "\n" + kubectl(t, "default", "get", "--ignore-not-found", "--output=name", "--selector=app.kubernetes.io/name=eni-guard", "roles,rolebindings")
	return strings.TrimSpace(out)
}

// Nothing would ever free the pods that the guard holds once it is gone. So it frees them first, or stays.
func TestUninstall(t *testing.T) {
	reinstalled(t)
	upgraded(t, "taintOrphanedNodes=true")
	ns := moded(t, "hold")
	stuck := stuckFS(t, ns)
	first, _ := heldStuckPod(t, stuck, ns, "payment-0")
	second, process := heldStuckPod(t, stuck, ns, "payment-1")
	node := taintedGhost(t)

	t.Run("fails while a pod cannot be freed, and says which", func(t *testing.T) {
		refuseTheGuard(t, ns)
		before := guardObjects(t)
		out, err := helm(t.Context(), "uninstall", "eni-guard", "--timeout", "3m")
		if err == nil {
			t.Errorf("it was uninstalled:\n%s", out)
		}
		for _, pod := range []string{first.Name, second.Name} {
			if !strings.Contains(out, fmt.Sprintf("pod %s/%s is still held: ", ns, pod)) {
				t.Errorf("helm does not say that pod %s is left:\n%s", pod, out)
			}
		}
		isHeld(t, first)
		isHeld(t, second)
		awaitTaint(t, node, true)
		after := guardObjects(t)
		for name := range strings.FieldsSeq(before) {
			if !strings.Contains(after, name) {
				t.Errorf("%s is gone", name)
			}
		}
		pod := sleeper(t, moded(t, "deny"), "web-0", nil)
		refused(t, forceDelete(t, pod), "is still alive on node node-1")

		// What it says to do about it works.
		if _, command, found := strings.Cut(out, "to free it: "); found {
			// Helm writes what a hook prints as one line, with \n where it ends.
			command, _, _ = strings.Cut(command, `\n`)
			shell := exec.CommandContext(t.Context(), "sh", "-c", command)
			shell.Env = append(os.Environ(), "KUBECONFIG="+cluster.Kubeconfig(), "PATH="+filepath.Dir(cluster.Binary("kubectl"))+":"+os.Getenv("PATH"))
			if out, err := shell.CombinedOutput(); err != nil {
				t.Errorf("%s: %v\n%s", command, err, out)
			}
			wentThrough(t, cluster.Gone(t.Context(), first))
		}
	})

	t.Run("frees the pods and leaves nothing", func(t *testing.T) {
		out, err := helm(t.Context(), "uninstall", "eni-guard", "--wait", "--timeout", "3m")
		if err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		for _, part := range []string{
			fmt.Sprintf("freed pod %s/%s, which was held since ", ns, second.Name),
			"is still alive on node node-1", "1 held pods were freed, none is left", "of the condition OrphanedSandbox and the taint eni-guard.io/orphaned-sandbox:NoSchedule",
		} {
			if !strings.Contains(out, part) {
				t.Errorf("helm does not say %q:\n%s", part, out)
			}
		}
		wentThrough(t, cluster.Gone(t.Context(), second))
		onTheNode(t, second, process)
		nothingHeld(t)
		awaitTaint(t, node, false)
		if conditions := kubectl(t, "", "get", "node", node, "-o", "jsonpath={.status.conditions[*].type}"); strings.Contains(conditions, orphanedCondition) {
			t.Errorf("node %s has the conditions %s", node, conditions)
		}
		guardGone(t)
	})

	// From here on the addresses are nobody's. The next test must not be given one that is in use.
	ended(t, stuck, first, second)

	// No other test can have the cluster without the guard.
	t.Run("a release of the previous chart is upgraded and rolled back without a gap", fromThePreviousChart)
}

// Where the Job that Helm begins with does not start, what the runbook says does the same.
func TestUninstallByHand(t *testing.T) {
	steps := stepsRunElsewhere(t, byUninstall)
	reinstalled(t)
	ns := moded(t, "hold")
	stuck := stuckFS(t, ns)
	pod, _ := heldStuckPod(t, stuck, ns, "payment-0")
	if out, err := helm(t.Context(), "upgrade", "eni-guard", filepath.Join(repo, "charts/eni-guard"), "--reuse-values", "--set-string", "image.tag=there-is-none"); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	out, err := helm(t.Context(), "uninstall", "eni-guard", "--timeout", "10s")
	if err == nil || !strings.Contains(out, "resource Job/eni-guard/eni-guard-free-held not ready") {
		t.Errorf("it is told as: %v\n%s", err, out)
	}
	isHeld(t, pod)
	refused(t, forceDelete(t, sleeper(t, moded(t, "deny"), "web-0", nil)), "is still alive on node node-1")

	out, err = shell(t.Context(), ns, t.TempDir(), "set -e\n"+strings.Join(steps, "\n"))
	if err != nil || !strings.Contains(out, "1 held pods were freed, none is left") {
		t.Fatalf("%v\n%s", err, out)
	}
	wentThrough(t, cluster.Gone(t.Context(), pod))
	guardGone(t)
	ended(t, stuck, pod)
}

// ended lets stuck pods go, and waits until their processes have ended.
func ended(t *testing.T, stuck *incident.StuckFS, pods ...*corev1.Pod) {
	t.Helper()
	wentThrough(t, stuck.Release())
	wentThrough(t, incident.Wait(t.Context(), 2*time.Minute, "the processes to end", func(context.Context) error {
		for _, pod := range pods {
			if left := incident.Processes(pod); len(left) > 0 {
				return fmt.Errorf("%+v", left)
			}
		}
		return nil
	}))
}

// guardGone waits until nothing is left in the cluster that belongs to the guard.
func guardGone(t *testing.T) {
	t.Helper()
	wentThrough(t, incident.Wait(t.Context(), 2*time.Minute, "the guard to be gone", func(context.Context) error {
		if left := guardObjects(t); left != "" {
			return errors.New(left)
		}
		return nil
	}))
}

// refuseTheGuard lets nobody but the guard change the pods of a namespace, until the end of the test: the other way round.
func refuseTheGuard(t *testing.T, ns string) {
	t.Helper()
	name := "e2e-refuse-the-guard-" + rand.String(5)
	account := "system:serviceaccount:" + incident.GuardNamespace + ":eni-guard-webhook"
	api := cluster.AdmissionregistrationV1()
	t.Cleanup(func() {
		err := errors.Join(api.ValidatingAdmissionPolicyBindings().Delete(context.Background(), name, metav1.DeleteOptions{}),
			api.ValidatingAdmissionPolicies().Delete(context.Background(), name, metav1.DeleteOptions{}))
		if err != nil {
			t.Error(err)
		}
		try := func(ctx context.Context) error {
			_, err := cluster.Kubectl(ctx, "-n", ns, "annotate", "pods", "--all", "e2e=try", "--as="+account, "--dry-run=server", "--overwrite")
			return err
		}
		if err := incident.Wait(context.Background(), 2*time.Minute, "the policy to be gone", try); err != nil {
			t.Error(err)
		}
	})
	_, err := api.ValidatingAdmissionPolicies().Create(t.Context(), &admissionregistrationv1.ValidatingAdmissionPolicy{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec: admissionregistrationv1.ValidatingAdmissionPolicySpec{
			MatchConstraints: &admissionregistrationv1.MatchResources{
				NamespaceSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"kubernetes.io/metadata.name": ns}},
				ResourceRules: []admissionregistrationv1.NamedRuleWithOperations{{RuleWithOperations: admissionregistrationv1.RuleWithOperations{
					Operations: []admissionregistrationv1.OperationType{admissionregistrationv1.Update},
					Rule:       admissionregistrationv1.Rule{APIGroups: []string{""}, APIVersions: []string{"v1"}, Resources: []string{"pods"}},
				}}},
			},
			Validations: []admissionregistrationv1.Validation{{Expression: "request.userInfo.username != '" + account + "'", Message: "the test refuses"}},
		},
	}, metav1.CreateOptions{})
	wentThrough(t, err)
	_, err = api.ValidatingAdmissionPolicyBindings().Create(t.Context(), &admissionregistrationv1.ValidatingAdmissionPolicyBinding{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec: admissionregistrationv1.ValidatingAdmissionPolicyBindingSpec{
			PolicyName: name, ValidationActions: []admissionregistrationv1.ValidationAction{admissionregistrationv1.Deny},
		},
	}, metav1.CreateOptions{})
	wentThrough(t, err)
	wentThrough(t, incident.Wait(t.Context(), 2*time.Minute, "the policy to be in force", func(ctx context.Context) error {
		out, err := cluster.Kubectl(ctx, "-n", ns, "annotate", "pods", "--all", "e2e=try", "--as="+account, "--dry-run=server", "--overwrite")
		if err == nil || !strings.Contains(out, "the test refuses") {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	}))
}
