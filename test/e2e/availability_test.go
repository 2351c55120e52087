package e2e

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/rand"

	"github.com/eni-guard/eni-guard/test/e2e/incident"
)

// Every forced delete of a bound pod is answered by the guard, and by nobody else, whatever is replaced meanwhile: a failed
// call would refuse it too, without a look at the node, and would let it through under the failure policy Ignore.
func TestReplacingReplicasLosesNoCall(t *testing.T) {
	restored(t)
	t.Cleanup(func() { restored(t) })
	pod := sleeper(t, namespace(t), "web-0", nil)
	for _, c := range []struct {
		name    string
		replace func(ctx context.Context) error
	}{
		{"restart", func(ctx context.Context) error {
			_, err := cluster.Kubectl(ctx, "-n", incident.GuardNamespace, "rollout", "restart", "deployment/eni-guard-webhook")
			return err
		}},
		{"upgrade", func(ctx context.Context) error {
			out, err := helm(ctx, "upgrade", "eni-guard", filepath.Join(repo, "charts/eni-guard"), "--reuse-values", "--set-string", "webhook.podAnnotations.e2e=1,agent.podAnnotations.e2e=1", "--wait", "--timeout", "2m")
			if err != nil {
				return fmt.Errorf("%w\n%s", err, out)
			}
			return nil
		}},
		{"rollback", func(ctx context.Context) error {
			out, err := helm(ctx, "rollback", "eni-guard", "--wait", "--timeout", "2m")
			if err != nil {
				return fmt.Errorf("%w\n%s", err, out)
			}
			return nil
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			before, err := cluster.CoreV1().Pods(incident.GuardNamespace).List(t.Context(), metav1.ListOptions{LabelSelector: "app.kubernetes.io/component=webhook"})
			wentThrough(t, err)
			// Upgrade and rollback replace the agent too, and meanwhile the guard cannot tell, and refuses.
			load := startLoad(t, pod.Namespace, pod.Name, c.name != "restart")
			wentThrough(t, c.replace(t.Context()))
			wentThrough(t, incident.Wait(t.Context(), 2*time.Minute, "the replaced replicas to end by themselves", func(ctx context.Context) error {
				now, err := cluster.CoreV1().Pods(incident.GuardNamespace).List(ctx, metav1.ListOptions{LabelSelector: "app.kubernetes.io/component=webhook"})
				if err != nil {
					return err
				}
				for _, pod := range now.Items {
					for _, old := range before.Items {
						if pod.UID == old.UID {
							return fmt.Errorf("pod %s is still there", pod.Name)
						}
					}
				}
				return nil
			}))
			calls, failed := load.end()
			t.Logf("%d forced deletes while every replica was replaced, %d not answered by the guard", calls, len(failed))
			if calls < 50 {
				t.Errorf("%d calls are no load", calls)
			}
			for _, err := range failed {
				t.Errorf("not answered by the guard: %v", err)
			}
		})
	}
}

// Without any webhook nothing but forced removals is blocked: what the cluster and its people do goes on, and what is needed to
// mend the guard.
func TestTheClusterWorksWithoutAnyWebhook(t *testing.T) {
	guarded := namespace(t)
	pod := sleeper(t, guarded, "web-0", nil)
	drained := sleeper(t, guarded, "web-1", func(p *corev1.Pod) { p.Labels = map[string]string{"drained": guarded} })
	withoutWebhook(t)
	if err := forceDelete(t, pod); err == nil || !strings.Contains(err.Error(), "failed calling webhook") {
		t.Fatalf("a forced delete: %v", err)
	}

	for _, ns := range []string{namespace(t), metav1.NamespaceSystem} {
		started := sleeper(t, ns, "web-"+rand.String(5), nil)
		if ns == metav1.NamespaceSystem {
			// What everything else needs to come back waits for nobody, not even if it is removed by force.
			wentThrough(t, cluster.CoreV1().Pods(ns).Delete(t.Context(), started.Name, metav1.DeleteOptions{GracePeriodSeconds: new(int64(0)), DryRun: []string{metav1.DryRunAll}}))
		}
		wentThrough(t, plainDelete(t.Context(), cluster, started))
		wentThrough(t, cluster.AwaitGone(t.Context(), started))
	}
	doomed := namespace(t)
	sleeper(t, doomed, "web-0", nil)
	wentThrough(t, cluster.RemoveNamespace(t.Context(), doomed))
	wentThrough(t, cluster.Namespace(t.Context(), doomed, map[string]string{testLabel: ""}))
	replaceGuardPods(t, "app.kubernetes.io/component=agent")

	uncordon := func() { kubectl(t, guarded, "uncordon", incident.Node) }
	t.Cleanup(func() {
		if out, err := cluster.Kubectl(context.Background(), "uncordon", incident.Node); err != nil {
			t.Errorf("%v: %s", err, out)
		}
	})
	kubectl(t, guarded, "drain", incident.Node, "--ignore-daemonsets", "--force", "--timeout=60s", "--pod-selector=drained="+guarded)
	wentThrough(t, cluster.Gone(t.Context(), drained))
	// The replicas come back with the node, and again when all of them are deleted by force at once.
	kubectl(t, incident.GuardNamespace, "scale", "deployment/eni-guard-webhook", "--replicas=2")
	uncordon()
	restored(t)
	deleteGuardPods(t, webhookPods)
	refused(t, forceDelete(t, pod), "denied the request: pod "+guarded+"/web-0 is still alive on node node-1: ")
	kept(t, pod)
}

// Who prefers to let forced removals through while no webhook answers gets that, and finds in the audit log what slipped past.
func failsOpen(t *testing.T) {
	pod := sleeper(t, namespace(t), "web-0", nil)
	refused(t, forceDelete(t, pod), "denied the request: pod "+pod.Namespace+"/web-0 is still alive on node node-1: ")
	withoutWebhook(t)
	// The API server learns of the changed configuration a moment later.
	wentThrough(t, incident.Wait(t.Context(), 2*time.Minute, "a forced delete to go through", func(context.Context) error { return forceDelete(t, pod) }))
	wentThrough(t, cluster.Gone(t.Context(), pod))
	events, err := cluster.Removals(pod)
	if err != nil || len(events) == 0 {
		t.Fatalf("%d removals in the audit log (%v)", len(events), err)
	}
	last, failedOpen := events[len(events)-1], ""
	for key, value := range last.Annotations {
		if strings.HasPrefix(key, "failed-open.validating.webhook.admission.k8s.io/") {
			failedOpen += value
		}
	}
	if last.ResponseStatus.Code != 200 || failedOpen == "" || last.Annotation("decision") != "" {
		t.Errorf("the audit event has code %d and %v", last.ResponseStatus.Code, last.Annotations)
	}
}

// load is a number of callers that ask the API server for the same, again and again.
type load struct {
	stop    context.CancelFunc
	callers sync.WaitGroup
	mu      sync.Mutex
	calls   int
	failed  []error
}

// Whoever connects again, as the API server does, reaches the replica that has judged the removal so far.
func TestNewConnectionsLeadToOneReplica(t *testing.T) {
	service, err := cluster.CoreV1().Services(incident.GuardNamespace).Get(t.Context(), "eni-guard-webhook", metav1.GetOptions{})
	wentThrough(t, err)
	client := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	replicas := map[string]int{}
	for range 20 {
		response, err := client.Get("http://" + net.JoinHostPort(service.Spec.ClusterIP, "8080") + "/metrics")
		wentThrough(t, err)
		lines := bufio.NewScanner(response.Body)
		for lines.Scan() {
			if started, ok := strings.CutPrefix(lines.Text(), "process_start_time_seconds "); ok {
				replicas[started]++
			}
		}
		wentThrough(t, errors.Join(lines.Err(), response.Body.Close()))
	}
	if len(replicas) != 1 {
		t.Errorf("connections by when the replica was started that they led to: %v", replicas)
	}
}

// startLoad starts callers. Their deletes are dry runs, which the guard judges like others and which leave no trace on the pod.
// Each must be refused after a look at the node, or, with orUnknown, after a try.
func startLoad(t *testing.T, namespace, name string, orUnknown bool) *load {
	options := metav1.DeleteOptions{GracePeriodSeconds: new(int64(0)), DryRun: []string{metav1.DryRunAll}}
	return startCalls(t, 4, func(ctx context.Context) error {
		err := cluster.CoreV1().Pods(namespace).Delete(ctx, name, options)
		switch {
		case err == nil:
			return errors.New("it was let through")
		case strings.Contains(err.Error(), "denied the request: pod "):
		case orUnknown && strings.Contains(err.Error(), "denied the request: cannot tell whether pod "):
		default:
			return err
		}
		return nil
	})
}

// startCalls starts callers that call again and again, until end. An error is what has gone wrong with a call.
func startCalls(t *testing.T, callers int, call func(context.Context) error) *load {
	ctx, cancel := context.WithCancel(t.Context())
	l := &load{stop: cancel}
	t.Cleanup(func() { l.end() })
	for range callers {
		l.callers.Go(func() {
			for ctx.Err() == nil {
				err := call(ctx)
				if ctx.Err() != nil {
					return
				}
				l.mu.Lock()
				l.calls++
				if err != nil {
					l.failed = append(l.failed, err)
				}
				l.mu.Unlock()
			}
		})
	}
	return l
}

// end ends the callers, and returns how many calls they have made, and what the guard did not answer.
func (l *load) end() (calls int, failed []error) {
	l.stop()
	l.callers.Wait()
	return l.calls, l.failed
}
