package webhook

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/util/retry"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/eni-guard/eni-guard/internal/exitstatus"
	"github.com/eni-guard/eni-guard/internal/sandbox"
)

// freeAllTimeout bounds the whole: freeing every held pod, and clearing the nodes.
const freeAllTimeout = 4 * time.Minute

const (
	// longestCall is how long an API server waits for a webhook at most (timeoutSeconds of a webhook configuration).
	longestCall = 30 * time.Second
	// noticedAfter is until when API servers have noticed that a webhook configuration is gone.
	noticedAfter = 2 * time.Second
)

// newFreeHeldCommand returns `eni-guard webhook free-held`, which the chart runs before it is uninstalled.
func newFreeHeldCommand() *cobra.Command {
	var configurations, bindings []string
	call := longestCall
	cmd := &cobra.Command{
		Use:   "free-held",
		Short: "Free every held pod, bound or not, stop the guard, and clear the nodes: for the time after it",
		Long: `Frees every pod that the guard holds, whether its node has let go of it or not: without the guard nothing would ever
free it. Then deletes the webhook configurations that are named, so that no pod is held any more, and the bindings, so
that agents write no more conditions, and frees those pods that were held in between. At last it takes the condition
` + sandbox.OrphanedCondition + ` and the taint ` + taintWords + ` from every node.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if call < time.Second || call > longestCall {
				return exitstatus.With(exitstatus.Usage, fmt.Errorf("--webhook-timeout %s is not %s to %s", call, time.Second, longestCall))
			}
			config, err := ctrl.GetConfig()
			if clientcmd.IsEmptyConfig(err) {
				return fmt.Errorf("there is no kubeconfig: name one by the environment variable KUBECONFIG, which is %q", os.Getenv("KUBECONFIG"))
			}
			if err != nil {
				return fmt.Errorf("finding the API server: %w", err)
			}
			api, err := client.New(config, client.Options{})
			if err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), freeAllTimeout)
			defer cancel()
			var switches []client.Object
			for _, name := range configurations {
				switches = append(switches, &admissionregistrationv1.ValidatingWebhookConfiguration{ObjectMeta: metav1.ObjectMeta{Name: name}})
			}
			for _, name := range bindings {
				switches = append(switches, &rbacv1.ClusterRoleBinding{ObjectMeta: metav1.ObjectMeta{Name: name}})
			}
			if err := freeAllHeld(ctx, api, cmd.OutOrStdout(), switches, call+noticedAfter); err != nil {
				return err
			}
			if err := clearNodes(ctx, api, cmd.OutOrStdout()); err != nil {
				return fmt.Errorf("the guard is switched off, and holds no pod any more. %w", err)
			}
			return nil
		},
	}
	cmd.Flags().StringArrayVar(&configurations, "webhook-configuration", nil, "name of a ValidatingWebhookConfiguration to delete; may be given again")
	cmd.Flags().StringArrayVar(&bindings, "cluster-role-binding", nil, "name of a ClusterRoleBinding to delete, by which agents may write conditions of nodes; may be given again")
	cmd.Flags().DurationVar(&call, "webhook-timeout", longestCall, "how long API servers wait for the webhook, whose calls that are under way may still hold a pod")
	return cmd
}

// freeAllHeld deletes, between the pods that are held already and the latecomers, what the guard works by.
func freeAllHeld(ctx context.Context, api client.Client, out io.Writer, switches []client.Object, quiet time.Duration) error {
	freed, err := freeHeldOnce(ctx, api, out)
	if err != nil {
		return err
	}
	for _, object := range switches {
		if err := api.Delete(ctx, object); client.IgnoreNotFound(err) != nil {
			return fmt.Errorf("deleting %T %s: %w", object, object.GetName(), err)
		}
	}
	if len(switches) > 0 {
		more, err := freeLatecomers(ctx, api, out, quiet)
		if err != nil {
			return fmt.Errorf("the guard is switched off: its webhook configurations are deleted. %w", err)
		}
		freed += more
	}
	fmt.Fprintf(out, "%d held pods were freed, none is left\n", freed)
	return nil
}

// freeLatecomers frees pods that are held by requests that were under way when the webhook configurations were deleted,
// until there have been none for as long as quiet.
func freeLatecomers(ctx context.Context, api client.Client, out io.Writer, quiet time.Duration) (freed int, err error) {
	since := time.Now()
	err = wait.PollUntilContextCancel(ctx, quiet/10, true, func(ctx context.Context) (bool, error) {
		// What a slow look has seen is as old as its beginning.
		looked := time.Now()
		more, err := freeHeldOnce(ctx, api, out)
		if more > 0 {
			since = time.Now()
		}
		freed += more
		return looked.Sub(since) >= quiet, err
	})
	return freed, err
}

// freeHeldOnce frees the pods that are held now. Its error names every one that is left, and how to free it.
func freeHeldOnce(ctx context.Context, api client.Client, out io.Writer) (freed int, err error) {
	pods, err := heldPods(ctx, api)
	if err != nil {
		return 0, fmt.Errorf("looking for held pods: %w", err)
	}
	for _, pod := range pods {
		pod.ResourceVersion = "" // whatever has changed in between
		if failure := client.IgnoreNotFound((holder{api}).free(ctx, &pod)); failure != nil {
			err = errors.Join(err, fmt.Errorf("pod %s/%s is still held: %w; to free it: %s", pod.Namespace, pod.Name, failure, freeingCommand(&pod)))
			continue
		}
		freed++
		fmt.Fprintf(out, "freed pod %s/%s, which was held since %s: %s\n", pod.Namespace, pod.Name,
			pod.Annotations[HeldSinceAnnotation], pod.Annotations[HeldBecauseAnnotation])
	}
	return freed, err
}

// clearNodes takes from every node what the guard has put there. Its error names every one that is left, and how to clear it.
// The leader and the agents still run: but agents have lost the right to write a condition again, and the leader puts no
// taint on a node without one, nor, because the condition goes first, on a node as it was before.
func clearNodes(ctx context.Context, api client.Client, out io.Writer) error {
	var failures error
	cleared := 0
	list := &corev1.NodeList{}
	for {
		if err := api.List(ctx, list, client.Limit(listPage), client.Continue(list.Continue)); err != nil {
			return fmt.Errorf("looking for nodes to clear: %w", err)
		}
		for _, node := range list.Items {
			if leftovers(&node).Type == "" && !tainted(&node) {
				continue
			}
			if err := client.IgnoreNotFound(clearNode(ctx, api, &node)); err != nil {
				failures = errors.Join(failures, fmt.Errorf("node %s is not cleared: %w; to clear it: %s", node.Name, err, clearingCommand(node.Name)))
				continue
			}
			cleared++
		}
		if list.Continue == "" {
			fmt.Fprintf(out, "%d nodes were cleared of the condition %s and the taint %s\n", cleared, sandbox.OrphanedCondition, taintWords)
			return failures
		}
	}
}

// takeCondition is a strategic merge patch: conditions are merged by their type.
const takeCondition = `{"status": {"conditions": [{"type": "` + sandbox.OrphanedCondition + `", "$patch": "delete"}]}}`

func clearNode(ctx context.Context, api client.Client, node *corev1.Node) error {
	if err := api.Status().Patch(ctx, node, client.RawPatch(types.StrategicMergePatchType, []byte(takeCondition))); err != nil {
		return err
	}
	if !tainted(node) {
		return nil
	}
	return retry.RetryOnConflict(retry.DefaultBackoff, func() error {
		if err := api.Get(ctx, client.ObjectKeyFromObject(node), node); err != nil || !tainted(node) {
			return err
		}
		return setTaint(ctx, api, node, false)
	})
}

// clearingCommand is how a person clears a node; in YAML, for the same reason as below.
func clearingCommand(node string) string {
	return fmt.Sprintf("kubectl patch node %[1]s --subresource=status -p='%[2]s'; kubectl taint node %[1]s %[3]s-",
		node, strings.ReplaceAll(takeCondition, `"`, ""), taintWords)
}

// freeingCommand is how a person frees a held pod while the guard is still there, which refuses that without an override.
// It has no double quotes and no line breaks, because Helm writes those of a hook's output with backslashes; kubectl takes
// patches in YAML.
func freeingCommand(pod client.Object) string {
	position := slices.Index(pod.GetFinalizers(), Finalizer)
	return fmt.Sprintf("kubectl annotate pod %[1]s -n %[2]s --overwrite %[3]s='the guard is uninstalled' && "+
		"kubectl patch pod %[1]s -n %[2]s --type=json -p='[{op: test, path: /metadata/finalizers/%[4]d, value: %[5]s}, {op: remove, path: /metadata/finalizers/%[4]d}]'",
		pod.GetName(), pod.GetNamespace(), OverrideAnnotation, position, Finalizer)
}
