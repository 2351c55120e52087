//go:build crio

package agent

import (
	"context"
	"fmt"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/eni-guard/eni-guard/internal/sandbox"
)

// TestCRIO asks about pods in all states that they can be in with a real CRI-O, which has no kubelet here. It has no process of its own for a
// sandbox, as for nearly all pods.
func TestCRIO(t *testing.T) {
	requireRoot(t)
	c := newCRIO(t)
	c.start(t, "storage")
	pod := sandbox.Pod{Namespace: "shop", Name: "web-0", UID: podUID}
	id, container := c.run(t, pod)
	if version, err := c.runtime.version(t.Context()); err != nil || !strings.HasPrefix(version, "cri-o 1.") || c.runtime.broadcasts(t.Context()) {
		t.Fatalf("it is %q (%v)", version, err)
	}
	record := c.record(t, podUID)
	if record.id != id || record.pod != pod || !record.ready || record.pid != 0 || len(record.ips) != 2 || filepath.Dir(record.netnsPath) != netnsDir ||
		record.cgroup != "/"+crioName+"/pod"+podUID+"/crio-"+id {
		t.Fatalf("the sandbox is told as %+v", record)
	}
	inspector := NewInspector("node-a", realNode, c.runtime)
	// ask compares the answer to the question of the guard with what must be found, and with what must not.
	ask := func(t *testing.T, query sandbox.Query, verdict sandbox.Verdict, found, missing []string) sandbox.Report {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), defaultTimeout)
		defer cancel()
		report := inspector.Inspect(ctx, query)
		told := inWords(report.Findings)
		lacks := slices.ContainsFunc(found, func(f string) bool { return !slices.Contains(told, f) })
		has := slices.ContainsFunc(missing, func(f string) bool { return slices.Contains(told, f) })
		if report.Verdict() != verdict || lacks || has {
			t.Errorf("%s, with failures %q, found: %q; must have %q, and not %q", report.Verdict(), report.Failures(), told, found, missing)
		}
		return report
	}
	// held asks who has the addresses.
	held := func(t *testing.T, by sandbox.Pod) {
		t.Helper()
		for _, ip := range record.ips {
			ctx, cancel := context.WithTimeout(t.Context(), defaultTimeout)
			a := inspector.holdersOf(ctx, ip)
			cancel()
			if a.Verdict != sandbox.Bound || len(a.Holders) != 1 || a.Holders[0].Pod != by {
				t.Errorf("%s is held by %+v (failures %q)", ip, a.Holders, a.Failures)
			}
		}
	}
	query := sandbox.Query{Node: "node-a", Namespace: pod.Namespace, Name: pod.Name, UID: pod.UID, IPs: record.ips}
	const process = "ProcessAlive sleep"
	ready, running := "SandboxReady "+id, "ContainerRunning "+container
	namespace := []string{"NetnsOpen " + record.netnsPath}
	for _, ip := range record.ips {
		namespace = append(namespace, fmt.Sprintf("IPAssigned %s %s", ip, record.netnsPath))
	}

	t.Run("running", func(t *testing.T) {
		// The monitor, which is set to be in the pod's cgroup, is a process of the pod.
		report := ask(t, query, sandbox.Bound, append([]string{ready, running, process, "ProcessAlive conmon"}, namespace...), nil)
		if len(report.Failures()) > 0 {
			t.Errorf("not looked at: %q", report.Failures())
		}
		held(t, pod)
	})
	t.Run("while CRI-O is down", func(t *testing.T) {
		c.kill(t)
		report := ask(t, query, sandbox.Bound, append([]string{process}, namespace...), []string{ready, running})
		if failures := report.Failures(); len(failures) != 1 || !strings.Contains(failures[0], `"runtime"`) {
			t.Errorf("not looked at: %q", failures)
		}
		held(t, sandbox.Pod{UID: podUID})
	})
	t.Run("after it is started again", func(t *testing.T) {
		c.start(t, "storage")
		if again := c.record(t, podUID); !reflect.DeepEqual(again, record) {
			t.Errorf("the sandbox is told as %+v, not %+v", again, record)
		}
		ask(t, query, sandbox.Bound, append([]string{ready, running, process}, namespace...), nil)
		held(t, pod)
	})
	t.Run("without a process", func(t *testing.T) {
		for _, f := range ask(t, query, sandbox.Bound, []string{process}, nil).Findings {
			if f.Process != nil && f.Process.Command == "sleep" {
				killAll(t, strconv.Itoa(f.Process.PID))
			}
		}
		awaitCRIO(t, "the container to have ended", func(ctx context.Context) error {
			if records, err := c.runtime.pod(ctx, podUID); err != nil || len(records.containers) > 0 {
				return fmt.Errorf("%+v: %w", records, err)
			}
			return nil
		})
		ask(t, query, sandbox.Bound, append([]string{ready}, namespace...), []string{running, process})
		held(t, pod)
	})
	t.Run("stopped", func(t *testing.T) {
		if _, err := c.runtime.client.StopPodSandbox(t.Context(), &runtimeapi.StopPodSandboxRequest{PodSandboxId: id}); err != nil {
			t.Fatal(err)
		}
		c.runtime.forget(nil) // as an agent that has just started
		report := ask(t, query, sandbox.Released, nil, nil)
		if len(report.Sandboxes) != 1 || report.Sandboxes[0].Ready || report.Sandboxes[0].Netns != record.netnsPath {
			t.Errorf("its record is told as %+v", report.Sandboxes)
		}
	})
	t.Run("removed", func(t *testing.T) {
		if _, err := c.runtime.client.RemovePodSandbox(t.Context(), &runtimeapi.RemovePodSandboxRequest{PodSandboxId: id}); err != nil {
			t.Fatal(err)
		}
		if report := ask(t, query, sandbox.Released, nil, nil); len(report.Sandboxes) > 0 {
			t.Errorf("it has a record: %+v", report.Sandboxes)
		}
	})
	t.Run("without its record", func(t *testing.T) {
		c.run(t, sandbox.Pod{Namespace: "shop", Name: "web-1", UID: otherUID})
		path := c.record(t, otherUID).netnsPath
		c.kill(t)
		c.start(t, "empty storage")
		// CRI-O takes the addresses of what it does not know, whoever may still use them, a moment after it has started.
		report := ask(t, sandbox.Query{Node: "node-a", Namespace: "shop", Name: "web-1", UID: otherUID}, sandbox.Bound, []string{process, "NetnsOpen " + path}, nil)
		if len(report.Sandboxes) > 0 {
			t.Errorf("it has a record: %+v", report.Sandboxes)
		}
		ctx, cancel := context.WithTimeout(t.Context(), defaultTimeout)
		defer cancel()
		a := inspector.everything(ctx, func(context.Context) (map[string]bool, string, error) { return nil, "a test", nil })
		if !slices.ContainsFunc(a.Leftovers, func(l Trace) bool { return l.Pod.UID == otherUID }) {
			t.Errorf("it is not left over: %+v", a)
		}
	})
}

// inWords names findings by what is compared of them.
func inWords(findings []sandbox.Finding) []string {
	var words []string
	for _, f := range findings {
		text := string(f.Kind)
		switch f.Kind { //nolint:exhaustive // of others the kind is enough
		case sandbox.ProcessAlive:
			text += " " + f.Process.Command
		case sandbox.SandboxReady:
			text += " " + f.Sandbox
		case sandbox.ContainerRunning:
			text += " " + f.Container
		case sandbox.NetnsOpen:
			text += " " + f.Netns
		case sandbox.IPAssigned:
			text += fmt.Sprintf(" %s %s", f.IP, f.Netns)
		}
		words = append(words, text)
	}
	return words
}
