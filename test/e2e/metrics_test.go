package e2e

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/eni-guard/eni-guard/test/e2e/incident"
)

// scrape reads what every pod of the guard tells Prometheus, from the addresses where it does.
func scrape(ctx context.Context) (string, error) {
	pods, err := cluster.CoreV1().Pods(incident.GuardNamespace).List(ctx, metav1.ListOptions{LabelSelector: "app.kubernetes.io/component in (webhook, agent)"})
	if err != nil {
		return "", err
	}
	text := ""
	for _, pod := range pods.Items {
		for _, port := range pod.Spec.Containers[0].Ports {
			if port.Name != "metrics" {
				continue
			}
			request, err := http.NewRequestWithContext(ctx, http.MethodGet, fmt.Sprintf("http://%s:%d/metrics", pod.Status.PodIP, port.ContainerPort), nil)
			if err != nil {
				return "", err
			}
			response, err := http.DefaultClient.Do(request)
			if err != nil {
				return "", err
			}
			body, err := io.ReadAll(response.Body)
			response.Body.Close()
			if err != nil {
				return "", err
			}
			text += string(body)
		}
	}
	return text, nil
}

// Every metric of the documents is told by what is installed, and a refusal is in those that are about refusals.
func TestMetricsOfTheInstalledGuard(t *testing.T) {
	pod := sleeper(t, namespace(t), "web-0", nil)
	refused(t, forceDelete(t, pod))
	document, err := os.ReadFile(filepath.Join(repo, "docs/metrics.md"))
	wentThrough(t, err)
	names := regexp.MustCompile("(?m)^\\| `(eni_guard_\\w+)").FindAllStringSubmatch(string(document), -1)
	if len(names) < 10 {
		t.Fatalf("docs/metrics.md has %d metrics", len(names))
	}
	wants := []string{
		`eni_guard_decisions_total{decision="denied",mode="deny",path="delete",verdict="bound"} `,
		`eni_guard_agent_questions_total{node="node-1",result="answered"} `,
		`eni_guard_stage_duration_seconds_bucket{stage="agent",le="10"} `,
		`eni_guard_certificate_expiry_timestamp_seconds{certificate="webhook"} `,
		`eni_guard_certificate_expiry_timestamp_seconds{certificate="webhook-to-agents"} `,
		`eni_guard_certificate_expiry_timestamp_seconds{certificate="agent"} `,
		`eni_guard_probe_up{probe="netns"} 1`,
	}
	for _, name := range names {
		if name[1] == "eni_guard_probe_hanging" {
			continue // it has no series while nothing hangs
		}
		wants = append(wants, "# TYPE "+name[1]+" ")
	}
	// The leader tells of held pods, and an agent of its probes once it has looked at the node.
	wentThrough(t, incident.Wait(t.Context(), 2*time.Minute, "the metrics", func(ctx context.Context) error {
		text, err := scrape(ctx)
		if err != nil {
			return err
		}
		for _, want := range wants {
			if !strings.Contains(text, want) {
				return fmt.Errorf("nobody tells %s", want)
			}
		}
		return nil
	}))
}
