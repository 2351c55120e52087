package webhook

import (
	"context"
	"errors"
	"io"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"
)

// heldPod is a pod that the guard holds. Somebody else may have a finalizer on it too.
func heldPod(name string, others ...string) *corev1.Pod {
	deleted := metav1.Now()
	return &corev1.Pod{ObjectMeta: metav1.ObjectMeta{
		Namespace: "shop", Name: name, UID: types.UID("uid-" + name),
		DeletionTimestamp: &deleted, DeletionGracePeriodSeconds: new(int64(0)),
		Finalizers:  append(others, Finalizer),
		Labels:      map[string]string{HeldLabel: "true", "app": "shop"},
		Annotations: map[string]string{HeldSinceAnnotation: "2026-01-02T03:04:05Z", HeldBecauseAnnotation: "pod shop/" + name + " is still alive.", HeldAddressesAnnotation: "10.0.0.7", "note": "mine"},
	}, Spec: corev1.PodSpec{NodeName: "node-1"}}
}

func configuration(name string) *admissionregistrationv1.ValidatingWebhookConfiguration {
	return &admissionregistrationv1.ValidatingWebhookConfiguration{ObjectMeta: metav1.ObjectMeta{Name: name}}
}

// agentsBinding lets agents write conditions of nodes.
func agentsBinding() *rbacv1.ClusterRoleBinding {
	return &rbacv1.ClusterRoleBinding{ObjectMeta: metav1.ObjectMeta{Name: "eni-guard-agent"}}
}

func TestFreeAllHeld(t *testing.T) {
	free := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "free", Finalizers: []string{"example.com/other"}}}
	api := interceptor.NewClient(fake.NewClientBuilder().WithObjects(heldPod("a"), heldPod("b", "example.com/other"), free,
		configuration("eni-guard"), configuration("eni-guard-failing-open"), configuration("others"), agentsBinding()).Build(), interceptor.Funcs{
		// Kubelets write the status of the pods right after they were read.
		List: func(ctx context.Context, c client.WithWatch, list client.ObjectList, options ...client.ListOption) error {
			pods := &corev1.PodList{}
			err := errors.Join(c.List(ctx, list, options...), c.List(ctx, pods))
			for _, pod := range pods.Items {
				pod.Status.Message = "containers have ended"
				err = errors.Join(err, c.Update(ctx, &pod))
			}
			return err
		},
	})
	var out strings.Builder
	if err := freeAllHeld(t.Context(), api, &out, []client.Object{configuration("eni-guard"), configuration("eni-guard-failing-open"), configuration("never-was"), agentsBinding()}, 50*time.Millisecond); err != nil {
		t.Fatal(err)
	}
	want := "freed pod shop/a, which was held since 2026-01-02T03:04:05Z: pod shop/a is still alive.\n" +
		"freed pod shop/b, which was held since 2026-01-02T03:04:05Z: pod shop/b is still alive.\n" +
		"2 held pods were freed, none is left\n"
	if out.String() != want {
		t.Errorf("it prints:\n%s", out.String())
	}
	if err := api.Get(t.Context(), client.ObjectKey{Namespace: "shop", Name: "a"}, &corev1.Pod{}); !apierrors.IsNotFound(err) {
		t.Errorf("pod a is still there: %v", err)
	}
	// What the guard has not put there stays.
	var b corev1.Pod
	if err := api.Get(t.Context(), client.ObjectKey{Namespace: "shop", Name: "b"}, &b); err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(b.Finalizers, []string{"example.com/other"}) || len(b.Labels) != 1 || len(b.Annotations) != 1 {
		t.Errorf("pod b has finalizers %v, labels %v, annotations %v", b.Finalizers, b.Labels, b.Annotations)
	}
	var left admissionregistrationv1.ValidatingWebhookConfigurationList
	if err := api.List(t.Context(), &left); err != nil || len(left.Items) != 1 || left.Items[0].Name != "others" {
		t.Errorf("configurations %v (%v)", left.Items, err)
	}
	if err := api.Get(t.Context(), client.ObjectKeyFromObject(agentsBinding()), agentsBinding()); !apierrors.IsNotFound(err) {
		t.Errorf("agents may still write: %v", err)
	}
}

// Until the configurations are gone, the webhook goes on holding pods.
func TestFreeAllHeldFreesPodsThatWereHeldInBetween(t *testing.T) {
	api := interceptor.NewClient(fake.NewClientBuilder().WithObjects(heldPod("a"), configuration("eni-guard")).Build(), interceptor.Funcs{
		Delete: func(ctx context.Context, c client.WithWatch, object client.Object, options ...client.DeleteOption) error {
			return errors.Join(c.Create(ctx, latecomer()), c.Delete(ctx, object, options...))
		},
	})
	var out strings.Builder
	if err := freeAllHeld(t.Context(), api, &out, []client.Object{configuration("eni-guard")}, 50*time.Millisecond); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(out.String(), "freed pod shop/late") || !strings.HasSuffix(out.String(), "\n2 held pods were freed, none is left\n") {
		t.Errorf("it prints:\n%s", out.String())
	}
}

// A review that was under way may hold a pod a while after the configurations are gone. If that one cannot be freed, it is said
// that the guard is off already.
func TestFreeAllHeldWaitsForLatecomers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		lists, stubborn := 0, false
		api := interceptor.NewClient(fake.NewClientBuilder().WithObjects(configuration("eni-guard")).Build(), interceptor.Funcs{
			List: func(ctx context.Context, c client.WithWatch, list client.ObjectList, options ...client.ListOption) error {
				if lists++; lists == 4 {
					if err := c.Create(ctx, latecomer()); err != nil {
						return err
					}
				}
				return c.List(ctx, list, options...)
			},
			Patch: func(ctx context.Context, c client.WithWatch, object client.Object, patch client.Patch, options ...client.PatchOption) error {
				if stubborn {
					return errors.New("somebody refuses")
				}
				return c.Patch(ctx, object, patch, options...)
			},
		})
		var out strings.Builder
		if err := freeAllHeld(t.Context(), api, &out, []client.Object{configuration("eni-guard")}, time.Second); err != nil || !strings.Contains(out.String(), "freed pod shop/late") {
			t.Errorf("%v; it prints:\n%s", err, out.String())
		}
		if err := api.Delete(t.Context(), heldPod("late")); err != nil {
			t.Fatal(err)
		}
		lists, stubborn = 2, true
		err := freeAllHeld(t.Context(), api, &out, []client.Object{configuration("eni-guard")}, time.Second)
		if err == nil || !strings.HasPrefix(err.Error(), "the guard is switched off: its webhook configurations are deleted. pod shop/late is still held") {
			t.Errorf("got %v", err)
		}
	})
}

// An API server that is slow to tell of the held pods tells of those that there were when it was asked: as long as that takes, nothing is
// quiet.
func TestFreeAllHeldWaitsForLatecomersOfASlowAPIServer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		lists := 0
		api := interceptor.NewClient(fake.NewClientBuilder().WithObjects(configuration("eni-guard")).Build(), interceptor.Funcs{
			List: func(ctx context.Context, c client.WithWatch, list client.ObjectList, options ...client.ListOption) error {
				err := c.List(ctx, list, options...)
				if lists++; lists == 2 {
					<-time.After(2 * time.Second)
					err = errors.Join(err, c.Create(ctx, latecomer()))
				}
				return err
			},
		})
		var out strings.Builder
		if err := freeAllHeld(t.Context(), api, &out, []client.Object{configuration("eni-guard")}, time.Second); err != nil || !strings.Contains(out.String(), "freed pod shop/late") {
			t.Errorf("%v; it prints:\n%s", err, out.String())
		}
	})
}

// latecomer is held, and about to be marked for removal.
func latecomer() *corev1.Pod {
	pod := heldPod("late")
	pod.DeletionTimestamp, pod.DeletionGracePeriodSeconds = nil, nil
	return pod
}

// The guard stays as long as there is a pod that nothing else would free.
func TestFreeAllHeldNamesWhatIsLeft(t *testing.T) {
	api := interceptor.NewClient(fake.NewClientBuilder().WithObjects(heldPod("a"), heldPod("b", "example.com/other"), heldPod("c"), configuration("eni-guard")).Build(), interceptor.Funcs{
		Patch: func(ctx context.Context, c client.WithWatch, object client.Object, patch client.Patch, options ...client.PatchOption) error {
			if object.GetName() != "c" {
				return errors.New("somebody refuses")
			}
			return c.Patch(ctx, object, patch, options...)
		},
	})
	var out strings.Builder
	err := freeAllHeld(t.Context(), api, &out, []client.Object{configuration("eni-guard")}, 50*time.Millisecond)
	if err == nil {
		t.Fatal("no error")
	}
	want := `pod shop/a is still held: changing pod shop/a: somebody refuses; to free it: kubectl annotate pod a -n shop --overwrite eni-guard.io/allow-force-delete='the guard is uninstalled' && kubectl patch pod a -n shop --type=json -p='[{op: test, path: /metadata/finalizers/0, value: eni-guard.io/sandbox-in-use}, {op: remove, path: /metadata/finalizers/0}]'
pod shop/b is still held: changing pod shop/b: somebody refuses; to free it: kubectl annotate pod b -n shop --overwrite eni-guard.io/allow-force-delete='the guard is uninstalled' && kubectl patch pod b -n shop --type=json -p='[{op: test, path: /metadata/finalizers/1, value: eni-guard.io/sandbox-in-use}, {op: remove, path: /metadata/finalizers/1}]'`
	if err.Error() != want {
		t.Errorf("the error is:\n%v", err)
	}
	if !strings.Contains(out.String(), "freed pod shop/c") || strings.Contains(out.String(), "none is left") {
		t.Errorf("it prints:\n%s", out.String())
	}
	if err := api.Get(t.Context(), client.ObjectKey{Name: "eni-guard"}, configuration("")); err != nil {
		t.Errorf("the webhook configuration: %v", err)
	}
}

// Who runs it by hand, and has no kubeconfig, is told how to name one.
func TestFreeHeldWithoutAKubeconfig(t *testing.T) {
	missing := filepath.Join(t.TempDir(), "none")
	t.Setenv("KUBECONFIG", missing)
	t.Setenv("HOME", t.TempDir())
	t.Setenv("KUBERNETES_SERVICE_HOST", "")
	cmd := newFreeHeldCommand()
	cmd.SetArgs([]string{})
	cmd.SetOut(io.Discard)
	cmd.SetErr(io.Discard)
	if err := cmd.ExecuteContext(t.Context()); err == nil || !strings.Contains(err.Error(), "there is no kubeconfig: name one by the environment variable KUBECONFIG") || !strings.Contains(err.Error(), missing) {
		t.Errorf("got %v", err)
	}
}

func TestClearNodes(t *testing.T) {
	named := func(name string) func(*corev1.Node) { return func(n *corev1.Node) { n.Name = name } }
	api := fake.NewClientBuilder().WithObjects(
		nodeA(says("True"), with(otherTaint, ourTaint)),
		nodeA(named("node-b"), says("False")),
		nodeA(named("node-c"), with(ourTaint)),
		nodeA(named("node-d"), with(evictTaint)),
	).Build()
	var out strings.Builder
	if err := clearNodes(t.Context(), api, &out); err != nil {
		t.Fatal(err)
	}
	if want := "3 nodes were cleared of the condition OrphanedSandbox and the taint eni-guard.io/orphaned-sandbox:NoSchedule\n"; out.String() != want {
		t.Errorf("it prints:\n%s", out.String())
	}
	for name, want := range map[string]struct {
		conditions int
		taints     []corev1.Taint
	}{
		"node-a": {1, []corev1.Taint{otherTaint}}, "node-b": {1, nil}, "node-c": {0, nil}, "node-d": {0, []corev1.Taint{evictTaint}},
	} {
		node := &corev1.Node{}
		if err := api.Get(t.Context(), client.ObjectKey{Name: name}, node); err != nil {
			t.Fatal(err)
		}
		if leftovers(node).Type != "" || len(node.Status.Conditions) != want.conditions || len(node.Spec.Taints) != len(want.taints) ||
			len(want.taints) > 0 && node.Spec.Taints[0] != want.taints[0] {
			t.Errorf("%s: conditions %v, taints %v", name, node.Status.Conditions, node.Spec.Taints)
		}
	}
}

// The leader and the kubelets go on meanwhile.
func TestClearNodesThatChangeMeanwhile(t *testing.T) {
	conflicts, deleted := 2, nodeA(says("True"), func(n *corev1.Node) { n.Name = "node-b" })
	api := interceptor.NewClient(fake.NewClientBuilder().WithObjects(nodeA(says("True"), with(ourTaint)), deleted).Build(), interceptor.Funcs{
		Patch: func(ctx context.Context, c client.WithWatch, object client.Object, patch client.Patch, options ...client.PatchOption) error {
			if conflicts--; conflicts >= 0 {
				return apierrors.NewConflict(corev1.Resource("nodes"), object.GetName(), errors.New("changed"))
			}
			return c.Patch(ctx, object, patch, options...)
		},
		SubResourcePatch: func(ctx context.Context, c client.Client, subresource string, object client.Object, patch client.Patch, options ...client.SubResourcePatchOption) error {
			if object.GetName() == deleted.Name {
				return errors.Join(c.Delete(ctx, deleted), apierrors.NewNotFound(corev1.Resource("nodes"), deleted.Name))
			}
			return c.SubResource(subresource).Patch(ctx, object, patch, options...)
		},
	})
	var out strings.Builder
	if err := clearNodes(t.Context(), api, &out); err != nil {
		t.Fatal(err)
	}
	node := &corev1.Node{}
	if err := api.Get(t.Context(), client.ObjectKey{Name: "node-a"}, node); err != nil || tainted(node) || leftovers(node).Type != "" {
		t.Errorf("conditions %v, taints %v (%v)", node.Status.Conditions, node.Spec.Taints, err)
	}
}

func TestClearNodesNamesWhatIsLeft(t *testing.T) {
	api := interceptor.NewClient(fake.NewClientBuilder().WithObjects(nodeA(says("True"), with(ourTaint))).Build(), interceptor.Funcs{
		SubResourcePatch: func(context.Context, client.Client, string, client.Object, client.Patch, ...client.SubResourcePatchOption) error {
			return errors.New("somebody refuses")
		},
	})
	var out strings.Builder
	err := clearNodes(t.Context(), api, &out)
	want := "node node-a is not cleared: somebody refuses; to clear it: kubectl patch node node-a --subresource=status " +
		"-p='{status: {conditions: [{type: OrphanedSandbox, $patch: delete}]}}'; kubectl taint node node-a eni-guard.io/orphaned-sandbox:NoSchedule-"
	if err == nil || err.Error() != want {
		t.Errorf("the error is:\n%v", err)
	}
}
