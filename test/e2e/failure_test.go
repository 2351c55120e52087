package e2e

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/eni-guard/eni-guard/test/e2e/incident"
)

// restored waits, at the end of a test that broke the guard, until it works again.
func restored(t *testing.T) {
	t.Helper()
	if err := guardReady(context.Background()); err != nil {
		t.Fatal(err)
	}
}

// pause stops a process of the host by its command line, and returns how to let it go on.
func pause(t *testing.T, part ...string) (resume func()) {
	t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		content, err := os.ReadFile(file)
		args := strings.Split(string(content), "\x00")
		// The directory of a program depends on where the cluster has it from.
		if err != nil || len(args) < len(part) || filepath.Base(args[0]) != filepath.Base(part[0]) || !slices.Equal(args[1:len(part)], part[1:]) {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(file)))
		if err != nil {
			t.Fatal(err)
		}
		if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
			t.Fatal(err)
		}
		resumed := false
		resume = func() {
			if !resumed {
				resumed = true
				if err := syscall.Kill(pid, syscall.SIGCONT); err != nil {
					t.Error(err)
				}
			}
		}
		t.Cleanup(resume)
		return resume
	}
	t.Fatalf("no process %q runs", part)
	return nil
}

func TestAnAgentThatDoesNotAnswerInTime(t *testing.T) {
	pod := sleeper(t, namespace(t), "web-0", nil)
	resume := pause(t, "/eni-guard", "agent")
	err := forceDelete(t, pod)
	resume()
	restored(t)
	refused(t, err, "cannot tell whether pod "+pod.Namespace+"/web-0 is still alive on node node-1: the agent of node node-1 did not answer within ")
	if !regexp.MustCompile(`within [5-9](\.\d)?s at 10\.111\.0\.1:9807`).MatchString(err.Error()) {
		t.Errorf("the refusal does not say how long the agent was waited for: %v", err)
	}
	kept(t, pod)
	expectRecord(t, pod, "denied", "unknown", "NoAnswer")
}

// Cleaning up finished pods must not depend on the agent: what the kubelet has reported of the containers is enough.
func TestAFinishedPodCanBeDeletedWithoutAnAgent(t *testing.T) {
	pods := map[string]*corev1.Pod{}
	for _, mode := range []string{"deny", "hold", "audit"} {
		pods[mode] = finished(t, moded(t, mode), nil)
	}
	resume := pause(t, "/eni-guard", "agent")
	// But it is not enough to free the address before the object goes.
	out, err := cluster.Kubectl(t.Context(), "-n", pods["deny"].Namespace, "label", "pod", pods["deny"].Name, ignoreLabel+"=true")
	if err == nil || !strings.Contains(out, "cannot tell whether pod ") {
		t.Errorf("the label that frees the address: %v\n%s", err, out)
	}
	// At once, because each waits for the agent until the guard gives up on it.
	deletes := errgroup.Group{}
	for _, pod := range pods {
		deletes.Go(func() error { return plainDelete(t.Context(), cluster, pod) })
	}
	err = deletes.Wait()
	resume()
	restored(t)
	wentThrough(t, err)
	for mode, pod := range pods {
		wentThrough(t, cluster.Gone(t.Context(), pod))
		decided(t, pod, mode+" delete allowed unknown ContainersTerminated")
	}
}

func TestAnAgentThatDoesNotRun(t *testing.T) {
	pod := sleeper(t, namespace(t), "web-0", nil)
	restart := withoutAgent(t)
	err := forceDelete(t, pod)
	restart()
	refused(t, err, "the agent of node node-1 does not run: nothing listens at 10.111.0.1:9807")
	kept(t, pod)
	expectRecord(t, pod, "denied", "unknown", "NoAnswer")
}

// withoutAgent ends the agent, and returns how to start it again, which happens at the end of the test at the latest.
func withoutAgent(t *testing.T) (restart func()) {
	t.Helper()
	patch := func(patch string) {
		if out, err := cluster.Kubectl(context.Background(), "-n", incident.GuardNamespace, "patch", "daemonset", "eni-guard-agent", "--type=json", "-p", patch); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	ended := true
	restart = func() {
		if ended {
			ended = false
			patch(`[{"op":"remove","path":"/spec/template/spec/nodeSelector/eni-guard-test"}]`)
			restored(t)
		}
	}
	t.Cleanup(restart)
	patch(`[{"op":"add","path":"/spec/template/spec/nodeSelector/eni-guard-test","value":"nowhere"}]`)
	wentThrough(t, incident.Wait(t.Context(), 2*time.Minute, "the agent to end", func(ctx context.Context) error {
		conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", "10.111.0.1:9807")
		if err == nil {
			return errors.Join(errors.New("it listens"), conn.Close())
		}
		return nil
	}))
	return restart
}

// The kernel has the last word: with the runtime hanging, the pod's processes are found all the same. Who looks at the node is told which
// process hangs.
func TestARuntimeThatDoesNotAnswer(t *testing.T) {
	pod := sleeper(t, namespace(t), "web-0", nil)
	config, err := filepath.Abs(filepath.Join(repo, ".cluster/config/containerd.toml"))
	if err != nil {
		t.Fatal(err)
	}
	resume := pause(t, "containerd", "--config", config)
	err = forceDelete(t, pod)
	var found []inspection
	for _, question := range []string{"--ip=" + pod.Status.PodIP, "--uid=" + string(pod.UID)} {
		found = append(found, inspectOnTheHost(t, question))
	}
	resume()
	restored(t)
	refused(t, err, "is still alive on node node-1: process ")
	for _, answer := range found {
		if answer.status != 1 || len(answer.Failures) == 0 || !strings.Contains(answer.NextStep, "the runtime does not answer") || !strings.Contains(answer.NextStep, " (containerd), which listens at ") {
			t.Errorf("inspect: got %+v", answer)
		}
	}
	kept(t, pod)
	if evidence := recorded(t, pod).Annotation("evidence"); !strings.Contains(evidence, `the probe "runtime" did not run`) {
		t.Errorf("the evidence %q does not say that the runtime did not answer", evidence)
	}
}

// With every replica down, forced removals are refused by the API server itself, and nothing else is blocked.
func TestWithoutAnyWebhook(t *testing.T) {
	var pods []*corev1.Pod
	for _, mode := range []string{"deny", "hold", "audit"} {
		pods = append(pods, sleeper(t, moded(t, mode), "web-0", nil))
	}
	withoutWebhook(t)
	for _, pod := range pods {
		err := forceDelete(t, pod)
		if err == nil || !strings.Contains(err.Error(), `failed calling webhook "force-delete.eni-guard.io"`) {
			t.Errorf("a forced delete: %v", err)
		}
		kept(t, pod)
		if err := plainDelete(t.Context(), cluster, pod); err != nil {
			t.Errorf("a graceful delete: %v", err)
		}
	}
	for _, pod := range pods {
		if err := cluster.AwaitGone(t.Context(), pod); err != nil {
			t.Errorf("the kubelet's delete: %v", err)
		}
	}
}

// withoutWebhook ends every replica of the webhook until the end of the test.
func withoutWebhook(t *testing.T) {
	t.Helper()
	scale := func(ctx context.Context, replicas int32) error {
		return incident.Wait(ctx, 2*time.Minute, fmt.Sprintf("%d replicas of the webhook", replicas), func(ctx context.Context) error {
			d, err := cluster.AppsV1().Deployments(incident.GuardNamespace).Get(ctx, "eni-guard-webhook", metav1.GetOptions{})
			if err != nil {
				return err
			}
			if *d.Spec.Replicas != replicas {
				d.Spec.Replicas = &replicas
				d, err = cluster.AppsV1().Deployments(incident.GuardNamespace).Update(ctx, d, metav1.UpdateOptions{})
				if err != nil {
					return err
				}
			}
			return settled(d, replicas)
		})
	}
	t.Cleanup(func() {
		if err := scale(context.Background(), 2); err != nil {
			t.Fatal(err)
		}
		restored(t)
	})
	err := scale(t.Context(), 0)
	if err == nil {
		// A replica that is told to end still answers over connections it has.
		err = incident.Wait(t.Context(), 2*time.Minute, "the last replica of the webhook to end", func(ctx context.Context) error {
			left, err := endingReplicas(ctx)
			if err == nil && left > 0 {
				err = fmt.Errorf("%d are left", left)
			}
			return err
		})
	}
	if err != nil {
		t.Fatal(err)
	}
}

func settled(d *appsv1.Deployment, replicas int32) error {
	if s := d.Status; s.ObservedGeneration != d.Generation || s.Replicas != replicas || s.ReadyReplicas != replicas {
		return fmt.Errorf("%d of %d are ready", s.ReadyReplicas, s.Replicas)
	}
	return nil
}

// insecure talks to anything; these tests are about what the other side lets in.
var insecure = &http.Client{
	Timeout:   10 * time.Second,
	Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}},
}

func TestAMalformedReviewDoesNoHarm(t *testing.T) {
	address, err := webhookAddress(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	before := guardPods(t)
	for _, body := range []string{"", "{", "[]", `{"kind":"AdmissionReview"}`, strings.Repeat("{", 1<<20)} {
		request, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "https://"+address+"/force-delete", strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		request.Header.Set("Content-Type", "application/json")
		response, err := insecure.Do(request)
		if err != nil {
			t.Fatal(err)
		}
		if err := response.Body.Close(); err != nil || response.StatusCode != http.StatusBadRequest {
			t.Errorf("%.20q: %s (%v)", body, response.Status, err)
		}
	}
	if after := guardPods(t); after != before {
		t.Errorf("the guard's pods were %s, are %s", before, after)
	}
	wentThrough(t, incident.Wait(t.Context(), time.Minute, "the log to tell of 5 malformed reviews", func(ctx context.Context) error {
		logs, err := cluster.Kubectl(ctx, "-n", incident.GuardNamespace, "logs", "-l", webhookPods, "--tail=-1")
		if count := strings.Count(logs, "refused a request that is not an AdmissionReview"); err == nil && count < 5 {
			err = fmt.Errorf("it tells of %d", count)
		}
		return err
	}))
}

func TestAnAgentAnswersNobodyWithoutACertificate(t *testing.T) {
	request, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "https://10.111.0.1:9807/v1/inspect", strings.NewReader("{}"))
	if err != nil {
		t.Fatal(err)
	}
	response, err := insecure.Do(request)
	if err == nil {
		response.Body.Close()
		t.Fatalf("answered %s", response.Status)
	}
	if !strings.Contains(err.Error(), "certificate required") {
		t.Errorf("got %v", err)
	}
}

// guardPods names the guard's pods and how often their containers have started.
func guardPods(t *testing.T) string {
	t.Helper()
	list, err := cluster.CoreV1().Pods(incident.GuardNamespace).List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	var pods []string
	for _, pod := range list.Items {
		for _, status := range pod.Status.ContainerStatuses {
			pods = append(pods, fmt.Sprintf("%s:%d", pod.UID, status.RestartCount))
		}
	}
	return strings.Join(pods, " ")
}
