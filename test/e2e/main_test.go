// Package e2e tests the installed guard on the real cluster of hack/cluster, from outside: what the API server does, what
// the kernel shows, what the audit log says.
package e2e

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/rand"

	"github.com/eni-guard/eni-guard/test/e2e/incident"
)

const repo = "../.."

var cluster *incident.Cluster

func TestMain(m *testing.M) {
	os.Exit(run(m))
}

func run(m *testing.M) int {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	var err error
	if cluster, err = incident.Open(ctx, repo); err == nil {
		err = errors.Join(guardReady(ctx), removeNamespaces(ctx))
	}
	code := 1
	if err == nil {
		code = m.Run()
		err = removeNamespaces(context.Background())
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "end-to-end tests: "+err.Error())
		return 1
	}
	return code
}

// endingReplicas counts the replicas of the webhook that have been told to end and still answer, and hurries them: how they end
// is the matter of one test, not of each that replaces them.
func endingReplicas(ctx context.Context) (int, error) {
	pods, err := cluster.CoreV1().Pods(incident.GuardNamespace).List(ctx, metav1.ListOptions{LabelSelector: "app.kubernetes.io/component=webhook"})
	if err != nil {
		return 0, err
	}
	count := 0
	for _, pod := range pods.Items {
		if pod.DeletionTimestamp == nil {
			continue
		}
		count++
		if *pod.DeletionGracePeriodSeconds > 1 {
			deleted := cluster.CoreV1().Pods(pod.Namespace).Delete(ctx, pod.Name, metav1.DeleteOptions{GracePeriodSeconds: new(int64(1))})
			if !apierrors.IsNotFound(deleted) {
				err = errors.Join(err, deleted)
			}
		}
	}
	return count, err
}

// guardReady waits until every replica of the webhook and the agent is ready, and no other.
func guardReady(ctx context.Context) error {
	return incident.Wait(ctx, 2*time.Minute, "the guard to be ready (`make install` installs it)", func(ctx context.Context) error {
		webhook, err := cluster.AppsV1().Deployments(incident.GuardNamespace).Get(ctx, "eni-guard-webhook", metav1.GetOptions{})
		if err != nil {
			return err
		}
		agent, err := cluster.AppsV1().DaemonSets(incident.GuardNamespace).Get(ctx, "eni-guard-agent", metav1.GetOptions{})
		if err != nil {
			return err
		}
		if s := webhook.Status; s.ObservedGeneration != webhook.Generation || s.ReadyReplicas != *webhook.Spec.Replicas || s.Replicas != *webhook.Spec.Replicas {
			return fmt.Errorf("webhook: %d of %d replicas are ready", s.ReadyReplicas, *webhook.Spec.Replicas)
		}
		if s := agent.Status; s.ObservedGeneration != agent.Generation || s.NumberReady != 1 || s.DesiredNumberScheduled != 1 {
			return fmt.Errorf("agent: %d of 1 is ready", s.NumberReady)
		}
		left, err := endingReplicas(ctx)
		if err != nil {
			return err
		}
		if left > 0 {
			return fmt.Errorf("webhook: %d replicas that have been told to end still answer", left)
		}
		// kube-proxy learns of ready replicas a moment later.
		address, err := webhookAddress(ctx)
		if err != nil {
			return err
		}
		conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", address)
		if err != nil {
			return err
		}
		return conn.Close()
	})
}

// webhookAddress is where the API server calls the webhook.
func webhookAddress(ctx context.Context) (string, error) {
	service, err := cluster.CoreV1().Services(incident.GuardNamespace).Get(ctx, "eni-guard-webhook", metav1.GetOptions{})
	if err != nil {
		return "", err
	}
	return net.JoinHostPort(service.Spec.ClusterIP, "443"), nil
}

// testLabel is on the namespaces of these tests.
const testLabel = "eni-guard-e2e"

// namespace makes a namespace for one test, of a name that the audit log has not seen before. It is removed afterwards,
// by itself, while the next test runs.
func namespace(t *testing.T) string {
	t.Helper()
	name := fmt.Sprintf("e2e-%.40s-%s", strings.ToLower(strings.NewReplacer("_", "-", "/", "-").Replace(t.Name())), rand.String(5))
	if err := cluster.Namespace(t.Context(), name, map[string]string{testLabel: ""}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := cluster.CoreV1().Namespaces().Delete(context.Background(), name, metav1.DeleteOptions{}); err != nil {
			t.Error(err)
		}
	})
	return name
}

// removeNamespaces removes what tests that were interrupted, or have just ended, left behind.
func removeNamespaces(ctx context.Context) error {
	list, err := cluster.CoreV1().Namespaces().List(ctx, metav1.ListOptions{LabelSelector: testLabel})
	if err != nil {
		return err
	}
	for _, ns := range list.Items {
		err = errors.Join(err, giveTime(ctx, ns.Name), cluster.RemoveNamespace(ctx, ns.Name))
	}
	return err
}

// giveTime deletes the pods of a namespace that give themselves no time to end. The namespace controller's delete of such
// a pod is a forced one, and refused for as long as the pod runs.
func giveTime(ctx context.Context, namespace string) error {
	pods, err := cluster.CoreV1().Pods(namespace).List(ctx, metav1.ListOptions{})
	if err != nil {
		return err
	}
	for _, pod := range pods.Items {
		if grace := pod.Spec.TerminationGracePeriodSeconds; grace != nil && *grace == 0 && pod.DeletionTimestamp == nil {
			deleted := cluster.CoreV1().Pods(namespace).Delete(ctx, pod.Name, metav1.DeleteOptions{GracePeriodSeconds: new(int64(1))})
			if !apierrors.IsNotFound(deleted) {
				err = errors.Join(err, deleted)
			}
		}
	}
	return err
}

// sleeper starts a pod that runs until it is deleted.
func sleeper(t *testing.T, namespace, name string, change func(*corev1.Pod)) *corev1.Pod {
	t.Helper()
	return start(t, incident.Pod(namespace, name, []string{"sleep", "86400"}, change))
}

func start(t *testing.T, pod *corev1.Pod) *corev1.Pod {
	t.Helper()
	started, err := cluster.Start(t.Context(), pod)
	if err != nil {
		t.Fatal(err)
	}
	return started
}

// forced asks for removal at once.
var forced = metav1.DeleteOptions{GracePeriodSeconds: new(int64(0))}

// forceDelete deletes a pod by force, as `kubectl delete --grace-period=0 --force` does.
func forceDelete(t *testing.T, pod *corev1.Pod) error {
	t.Helper()
	return byForcedDelete.take(t.Context(), cluster, pod)
}

// refused fails the test unless err is the guard's refusal with every one of parts in its message.
func refused(t *testing.T, err error, parts ...string) {
	t.Helper()
	status := apierrors.APIStatus(nil)
	if !errors.As(err, &status) {
		t.Fatalf("not refused: %v", err)
	}
	got := status.Status()
	if got.Code != 409 || got.Reason != metav1.StatusReasonConflict {
		t.Errorf("refused with %d %s", got.Code, got.Reason)
	}
	for _, part := range append(parts, `admission webhook "force-delete.eni-guard.io" denied the request: `) {
		if !strings.Contains(got.Message, part) {
			t.Errorf("the refusal does not say %q:\n%s", part, got.Message)
		}
	}
}

// refusedAtLast asks until the guard's refusal, of whatever code, has every one of parts in its message, and fails the test at once if it is
// not refused. On a busy node a probe may not be done in time: what others have found is enough to refuse.
func refusedAtLast(t *testing.T, ask func() error, parts ...string) {
	t.Helper()
	wentThrough(t, incident.Wait(t.Context(), 2*time.Minute, "the whole evidence", func(context.Context) error {
		err := ask()
		if err == nil || !strings.Contains(err.Error(), `admission webhook "force-delete.eni-guard.io" denied the request: `) {
			t.Fatalf("not refused: %v", err)
		}
		for _, part := range parts {
			if !strings.Contains(err.Error(), part) {
				return fmt.Errorf("the refusal does not say %q: %w", part, err)
			}
		}
		return nil
	}))
}

// kept fails the test unless the pod is in the API server as it was, not even marked for removal.
func kept(t *testing.T, pod *corev1.Pod) {
	t.Helper()
	now, err := cluster.CoreV1().Pods(pod.Namespace).Get(t.Context(), pod.Name, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if now.UID != pod.UID || now.DeletionTimestamp != nil {
		t.Errorf("the pod is not as it was: UID %s, deletion %v", now.UID, now.DeletionTimestamp)
	}
}

// recorded returns the guard's one record of a decision about a pod in the audit log.
func recorded(t *testing.T, pod *corev1.Pod) incident.AuditEvent {
	t.Helper()
	events, err := cluster.Removals(pod)
	if err != nil {
		t.Fatal(err)
	}
	var decided []incident.AuditEvent
	for _, event := range events {
		if event.Annotation("decision") != "" {
			decided = append(decided, event)
		}
	}
	if len(decided) != 1 {
		t.Fatalf("the audit log holds %d decisions about pod %s, not 1", len(decided), pod.Name)
	}
	return decided[0]
}

// expectRecord fails the test unless the audit log has exactly this decision about a pod.
func expectRecord(t *testing.T, pod *corev1.Pod, decision, verdict, reason string) {
	t.Helper()
	event := recorded(t, pod)
	got := []string{event.Annotation("decision"), event.Annotation("verdict"), event.Annotation("reason"), event.Annotation("pod-uid")}
	want := []string{decision, verdict, reason, string(pod.UID)}
	if strings.Join(got, " ") != strings.Join(want, " ") {
		t.Errorf("the audit log says %q, not %q", got, want)
	}
}
