package webhook

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/spf13/cobra"
	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	"k8s.io/apimachinery/pkg/util/wait"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

// freeAllTimeout bounds the whole of freeing every held pod.
const freeAllTimeout = 4 * time.Minute

// quietAfter is how long a request may still hold a pod after the webhook configurations are deleted: as long as the API
// server waits for the webhook, with the chart's values, and until it has noticed.
const quietAfter = 12 * time.Second

// newFreeHeldCommand returns `eni-guard webhook free-held`, which the chart runs before it is uninstalled.
func newFreeHeldCommand() *cobra.Command {
	var configurations []string
	cmd := &cobra.Command{
		Use:   "free-held",
		Short: "Free every held pod, bound or not, and stop the guard: for the time after it",
		Long: `Frees every pod that the guard holds, whether its node has let go of it or not: without the guard nothing would ever
free it. Then deletes the webhook configurations that are named, so that no pod is held any more, and frees those that
were held in between.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			config, err := ctrl.GetConfig()
			if err != nil {
				return fmt.Errorf("finding the API server: %w", err)
			}
			api, err := client.New(config, client.Options{})
			if err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), freeAllTimeout)
			defer cancel()
			return freeAllHeld(ctx, api, cmd.OutOrStdout(), configurations, quietAfter)
		},
	}
	cmd.Flags().StringArrayVar(&configurations, "webhook-configuration", nil, "name of a ValidatingWebhookConfiguration to delete; may be given again")
	return cmd
}

func freeAllHeld(ctx context.Context, api client.Client, out io.Writer, configurations []string, quiet time.Duration) error {
	freed, err := freeHeldOnce(ctx, api, out)
	if err != nil {
		return err
	}
	for _, name := range configurations {
		configuration := &admissionregistrationv1.ValidatingWebhookConfiguration{}
		configuration.Name = name
		if err := api.Delete(ctx, configuration); client.IgnoreNotFound(err) != nil {
			return fmt.Errorf("deleting the webhook configuration %s: %w", name, err)
		}
	}
	if len(configurations) > 0 {
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
		more, err := freeHeldOnce(ctx, api, out)
		if more > 0 {
			since = time.Now()
		}
		freed += more
		return time.Since(since) >= quiet, err
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
		if failure := (holder{api}).free(ctx, &pod); failure != nil {
			err = errors.Join(err, fmt.Errorf("pod %s/%s is still held: %w; to free it: %s", pod.Namespace, pod.Name, failure, freeingCommand(&pod)))
			continue
		}
		freed++
		fmt.Fprintf(out, "freed pod %s/%s, which was held since %s: %s\n", pod.Namespace, pod.Name,
			pod.Annotations[HeldSinceAnnotation], pod.Annotations[HeldBecauseAnnotation])
	}
	return freed, err
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
