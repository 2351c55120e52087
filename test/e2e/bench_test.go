package e2e

import (
	"context"
	"fmt"
	"maps"
	"sync"
	"testing"
	"time"

	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/rand"

	"github.com/eni-guard/eni-guard/test/e2e/incident"
)

// What the guard adds to a forced delete that goes through: the same delete of the same kind of pod, finished and
// released, with the guard and in a namespace that it leaves alone, in turns.
func BenchmarkForcedDeleteThatGoesThrough(b *testing.B) {
	guarded, alone := benchNamespace(b, nil), benchNamespace(b, nil)
	running, err := cluster.Start(b.Context(), incident.Pod(alone, "web-0", []string{"sleep", "86400"}, nil))
	if err != nil {
		b.Fatal(err)
	}
	pods := map[string][]*corev1.Pod{}
	var all sync.WaitGroup
	for _, ns := range []string{guarded, alone} {
		for i := range b.N {
			pod, err := cluster.CoreV1().Pods(ns).Create(b.Context(), incident.Pod(ns, fmt.Sprintf("job-%d", i), []string{"true"}, func(p *corev1.Pod) {
				p.Spec.RestartPolicy = corev1.RestartPolicyNever
			}), metav1.CreateOptions{})
			if err != nil {
				b.Fatal(err)
			}
			pods[ns] = append(pods[ns], pod)
			all.Go(func() {
				// Before it has started, nothing of it is on the node either.
				err := cluster.AwaitFinished(b.Context(), pod)
				if err == nil {
					err = incident.Wait(b.Context(), 2*time.Minute, "pod "+pod.Name+" to be released", func(ctx context.Context) error {
						return forceDeletePod(ctx, pod, metav1.DryRunAll)
					})
				}
				if err != nil {
					b.Error(err)
				}
			})
		}
	}
	all.Wait()
	off := []byte(`{"metadata":{"labels":{"eni-guard.io/mode":"off"}}}`)
	if _, err := cluster.CoreV1().Namespaces().Patch(b.Context(), alone, types.MergePatchType, off, metav1.PatchOptions{}); err != nil {
		b.Fatal(err)
	}
	if err := incident.Wait(b.Context(), 2*time.Minute, "the guard to leave the namespace alone", func(ctx context.Context) error {
		return forceDeletePod(ctx, running, metav1.DryRunAll)
	}); err != nil {
		b.Fatal(err)
	}
	compare(b, "with-guard", "without", func(i int) error { return forceDeletePod(b.Context(), pods[guarded][i]) },
		func(i int) error { return forceDeletePod(b.Context(), pods[alone][i]) })
}

// What a refusal costs, beside that of a policy that refuses every forced delete without looking: the least that any guard
// can cost.
func BenchmarkRefusedForcedDelete(b *testing.B) {
	guarded, blunt := benchNamespace(b, nil), benchNamespace(b, map[string]string{"eni-guard.io/mode": "off", "blunt": ""})
	policy := bluntPolicy()
	if _, err := cluster.AdmissionregistrationV1().ValidatingAdmissionPolicies().Create(b.Context(), policy, metav1.CreateOptions{}); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		_ = cluster.AdmissionregistrationV1().ValidatingAdmissionPolicies().Delete(context.Background(), policy.Name, metav1.DeleteOptions{})
	})
	binding := &admissionregistrationv1.ValidatingAdmissionPolicyBinding{ObjectMeta: metav1.ObjectMeta{Name: policy.Name}}
	binding.Spec.PolicyName, binding.Spec.ValidationActions = policy.Name, []admissionregistrationv1.ValidationAction{admissionregistrationv1.Deny}
	if _, err := cluster.AdmissionregistrationV1().ValidatingAdmissionPolicyBindings().Create(b.Context(), binding, metav1.CreateOptions{}); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		_ = cluster.AdmissionregistrationV1().ValidatingAdmissionPolicyBindings().Delete(context.Background(), binding.Name, metav1.DeleteOptions{})
	})

	pods := map[string]*corev1.Pod{}
	for _, ns := range []string{guarded, blunt} {
		pod, err := cluster.Start(b.Context(), incident.Pod(ns, "web-0", []string{"sleep", "86400"}, nil))
		if err != nil {
			b.Fatal(err)
		}
		pods[ns] = pod
	}
	refuse := func(ns string, options metav1.DeleteOptions) error {
		if err := cluster.CoreV1().Pods(ns).Delete(b.Context(), pods[ns].Name, options); err == nil {
			return fmt.Errorf("a forced delete in %s was not refused", ns)
		}
		return nil
	}
	// A policy is in force some time after it was made.
	dry := forced
	dry.DryRun = []string{metav1.DryRunAll}
	if err := incident.Wait(b.Context(), 2*time.Minute, "the policy to be in force", func(context.Context) error { return refuse(blunt, dry) }); err != nil {
		b.Fatal(err)
	}
	compare(b, "with-guard", "by-policy", func(int) error { return refuse(guarded, forced) }, func(int) error { return refuse(blunt, forced) })
}

// compare times two things in turns, b.N times each, and reports both and their ratio.
func compare(b *testing.B, one, other string, first, second func(i int) error) {
	b.Helper()
	var took [2]time.Duration
	b.ResetTimer()
	for i := range b.N {
		for j := range took {
			// Neither is always the first.
			which := (i + j) % 2
			start := time.Now()
			if err := []func(int) error{first, second}[which](i); err != nil {
				b.Fatal(err)
			}
			took[which] += time.Since(start)
		}
	}
	b.StopTimer()
	b.ReportMetric(took[0].Seconds()*1000/float64(b.N), "ms-"+one)
	b.ReportMetric(took[1].Seconds()*1000/float64(b.N), "ms-"+other)
	b.ReportMetric(took[0].Seconds()/took[1].Seconds(), "times-as-long")
	// The time of both together says nothing.
	b.ReportMetric(0, "ns/op")
}

func forceDeletePod(ctx context.Context, pod *corev1.Pod, dryRun ...string) error {
	return cluster.CoreV1().Pods(pod.Namespace).Delete(ctx, pod.Name, metav1.DeleteOptions{GracePeriodSeconds: forced.GracePeriodSeconds, DryRun: dryRun})
}

// benchNamespace makes a namespace for one benchmark.
func benchNamespace(b *testing.B, labels map[string]string) string {
	b.Helper()
	name := "e2e-bench-" + rand.String(8)
	all := map[string]string{testLabel: ""}
	maps.Copy(all, labels)
	if err := cluster.Namespace(b.Context(), name, all); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		if err := cluster.CoreV1().Namespaces().Delete(context.Background(), name, metav1.DeleteOptions{}); err != nil {
			b.Error(err)
		}
	})
	return name
}

// bluntPolicy refuses every delete with grace period 0 in namespaces with the label "blunt".
func bluntPolicy() *admissionregistrationv1.ValidatingAdmissionPolicy {
	policy := &admissionregistrationv1.ValidatingAdmissionPolicy{ObjectMeta: metav1.ObjectMeta{Name: "blunt.e2e.eni-guard.io"}}
	policy.Spec = admissionregistrationv1.ValidatingAdmissionPolicySpec{
		MatchConstraints: &admissionregistrationv1.MatchResources{
			NamespaceSelector: &metav1.LabelSelector{MatchExpressions: []metav1.LabelSelectorRequirement{{Key: "blunt", Operator: metav1.LabelSelectorOpExists}}},
			ResourceRules: []admissionregistrationv1.NamedRuleWithOperations{{RuleWithOperations: admissionregistrationv1.RuleWithOperations{
				Operations: []admissionregistrationv1.OperationType{admissionregistrationv1.Delete},
				Rule:       admissionregistrationv1.Rule{APIGroups: []string{""}, APIVersions: []string{"v1"}, Resources: []string{"pods"}},
			}}},
		},
		Validations: []admissionregistrationv1.Validation{{
			Expression: "!(has(request.options.gracePeriodSeconds) && request.options.gracePeriodSeconds == 0)", Message: "no forced deletes here",
		}},
	}
	return policy
}
