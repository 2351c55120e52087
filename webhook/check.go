package webhook

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"

	"github.com/spf13/cobra"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/eni-guard/eni-guard/internal/exitstatus"
)

// webhookName is what the chart calls the webhook in its configurations.
const webhookName = "force-delete.eni-guard.io"

// The outcomes of a check; the values are those of the JSON field "answer".
const (
	answerRefused     = "refused"
	answerWarned      = "warned"
	answerUnknown     = "unknown"
	answerUnreachable = "unreachable"
	answerNone        = "none"
)

// checkResult is what a check has found out.
type checkResult struct {
	// Pod is NAMESPACE/NAME.
	Pod string `json:"pod"`
	// Answer is one of the answers above.
	Answer string `json:"answer"`
	// Said is what the person would have read who deletes the pod by force.
	Said string `json:"said,omitempty"`
}

// works says whether the guard has named what is on the node of the pod.
func (r checkResult) works() bool { return r.Answer == answerRefused || r.Answer == answerWarned }

// String says what was found out, and what to do about it.
func (r checkResult) String() string {
	switch r.Answer {
	case answerRefused:
		return "eni-guard works: it refuses to remove pod " + r.Pod + " by force.\n" + r.Said
	case answerWarned:
		return "eni-guard works: it would let pod " + r.Pod + " be removed by force, as the mode of the namespace or an override on the pod says, " +
			"and knows that it is alive.\n" + r.Said
	case answerUnknown:
		return "eni-guard could not find out what of pod " + r.Pod + " is on its node.\n" + r.Said
	case answerUnreachable:
		section := "the-webhook-does-not-answer"
		if strings.Contains(r.Said, "x509: ") {
			section = "certificates"
		}
		return "the API server cannot reach the webhook of eni-guard: " + r.Said +
			"\nLook at its pods: `kubectl get pods -A -l app.kubernetes.io/name=eni-guard`. More: " + runbook + section
	default:
		return "eni-guard does not guard pod " + r.Pod + ": nothing would keep it from being removed by force. That is so where the pod is not on a node, has " +
			"ended, is on the host's network, on one of excludedNodes, or on a node that is gone or has the taint " + corev1.TaintNodeOutOfService +
			"; where its namespace is the guard's own, one of exemptNamespaces, or has the label " +
			ModeLabel + "=off; and where the guard is not installed, or lets through what it cannot look at (webhook.failurePolicy is Ignore). " +
			"Choose a pod for which none of this is so."
	}
}

// NewCheckCommand returns `eni-guard check`.
func NewCheckCommand() *cobra.Command {
	var kubeconfig, namespace, output string
	cmd := &cobra.Command{
		Use:   "check POD",
		Short: "See that the guard works: ask to remove a running pod by force, as a dry run",
		Long: `Asks the API server to remove a pod by force as a dry run, which changes nothing, and reads the answer: the guard must
name what of the pod is on its node. Ends with 0 if it does, with 1 if not, and says why. It needs the right to delete that pod.`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 1 {
				return fmt.Errorf("name one pod, not %d: eni-guard check POD -n NAMESPACE", len(args))
			}
			if problems := validation.IsDNS1123Subdomain(args[0]); len(problems) > 0 {
				return fmt.Errorf("%q is not the name of a pod, such as web-0; its namespace is named by -n", args[0])
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if !slices.Contains([]string{"text", "json"}, output) {
				return exitstatus.With(exitstatus.Usage, fmt.Errorf("--output %q is not text or json", output))
			}
			rules := clientcmd.NewDefaultClientConfigLoadingRules()
			rules.ExplicitPath = kubeconfig
			overrides := &clientcmd.ConfigOverrides{}
			overrides.Context.Namespace = namespace
			loader := clientcmd.NewNonInteractiveDeferredLoadingClientConfig(rules, overrides)
			config, err := loader.ClientConfig()
			if clientcmd.IsEmptyConfig(err) {
				return errors.New("there is no kubeconfig: name one by --kubeconfig, or by the environment variable KUBECONFIG")
			}
			if err != nil {
				return fmt.Errorf("--kubeconfig: finding the API server: %w", err)
			}
			if namespace, _, err = loader.Namespace(); err != nil {
				return fmt.Errorf("--namespace: %w", err)
			}
			result, err := check(cmd.Context(), config, namespace, args[0])
			if err != nil {
				return err
			}
			if output == "json" {
				if err := json.NewEncoder(cmd.OutOrStdout()).Encode(result); err != nil {
					return err
				}
				if !result.works() {
					return errors.New("the guard does not work for pod " + result.Pod)
				}
				return nil
			}
			if !result.works() {
				return errors.New(result.String())
			}
			fmt.Fprintln(cmd.OutOrStdout(), result)
			return nil
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&kubeconfig, "kubeconfig", "", "how to reach the API server; not needed in a pod, or where kubectl does not need it")
	flags.StringVarP(&namespace, "namespace", "n", os.Getenv("POD_NAMESPACE"), "the pod's namespace; that of the kubeconfig if empty (or the environment variable POD_NAMESPACE)")
	flags.StringVarP(&output, "output", "o", "text", "how to print the answer: text or json")
	return cmd
}

// check asks to remove a pod by force, as a dry run. An error means that the API server has not asked the guard.
func check(ctx context.Context, config *rest.Config, namespace, name string) (checkResult, error) {
	said := &warnings{}
	config.WarningHandler = said
	api, err := kubernetes.NewForConfig(config)
	if err != nil {
		return checkResult{}, err
	}
	err = api.CoreV1().Pods(namespace).Delete(ctx, name, metav1.DeleteOptions{GracePeriodSeconds: new(int64(0)), DryRun: []string{metav1.DryRunAll}})
	return readAnswer(namespace+"/"+name, err, said.texts)
}

// readAnswer tells from the answer to a dry run what it says about the guard.
func readAnswer(pod string, err error, warnings []string) (checkResult, error) {
	result := checkResult{Pod: pod, Answer: answerNone}
	if err != nil {
		var status apierrors.APIStatus
		if !errors.As(err, &status) {
			return result, fmt.Errorf("the API server was not reached, to ask about pod %s: %w\nDoes `kubectl get pods` reach it? If so, name its kubeconfig: --kubeconfig", pod, err)
		}
		result.Said = status.Status().Message
		switch denied := fmt.Sprintf("admission webhook %q denied the request: ", webhookName); {
		// k8s.io/apiserver pkg/admission/plugin/webhook/errors, ToStatusErr.
		case strings.HasPrefix(result.Said, denied):
			result.Said = strings.TrimPrefix(result.Said, denied)
			result.Answer = verdictOf(result.Said, answerRefused)
		// k8s.io/apiserver pkg/admission/plugin/webhook, ErrCallingWebhook.
		case strings.Contains(result.Said, fmt.Sprintf("failed calling webhook %q", webhookName)):
			result.Answer = answerUnreachable
		default:
			return result, fmt.Errorf("the API server did not ask eni-guard about pod %s: %w\n%s", pod, err, stepAfter(pod, err))
		}
		return result, nil
	}
	for _, text := range warnings {
		if answer := verdictOf(text, answerWarned); answer != answerNone {
			result.Answer, result.Said = answer, text
		}
	}
	return result, nil
}

// stepAfter says what to do about an answer in which the guard has had no part.
func stepAfter(pod string, err error) string {
	namespace, _, _ := strings.Cut(pod, "/")
	switch {
	case apierrors.IsNotFound(err):
		return "Name a pod that runs: `kubectl get pods -n " + namespace + "` lists them"
	case apierrors.IsForbidden(err), apierrors.IsUnauthorized(err):
		return "A dry run needs the right to the thing itself: `kubectl auth can-i delete pods -n " + namespace + "` must say yes. Nothing is deleted"
	case apierrors.IsTimeout(err), apierrors.IsServerTimeout(err), apierrors.IsServiceUnavailable(err), apierrors.IsTooManyRequests(err):
		return "The API server does not keep up, or lacks its etcd: try again, and if that lasts, look at `kubectl get --raw='/readyz?verbose'`"
	default:
		return "Something else has refused this before eni-guard was asked: mend that, or choose another pod"
	}
}

// verdictOf reads what finding has written.
func verdictOf(text, bound string) string {
	switch {
	case strings.Contains(text, cannotTell):
		return answerUnknown
	case strings.Contains(text, " is still alive on node "):
		return bound
	default:
		return answerNone
	}
}

// warnings keeps what the API server sends beside an answer.
type warnings struct {
	mu    sync.Mutex
	texts []string
}

// HandleWarningHeader implements rest.WarningHandler.
func (w *warnings) HandleWarningHeader(_ int, _, text string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.texts = append(w.texts, text)
}
