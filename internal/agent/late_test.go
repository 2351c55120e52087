package agent

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/eni-guard/eni-guard/internal/sandbox"
)

// runtimesNamespace makes a network namespace with a name as runtimes give them, and returns its path.
func runtimesNamespace(t *testing.T) string {
	t.Helper()
	name := "cni-00000000-0000-0000-0000-" + fmt.Sprintf("%012d", os.Getpid())
	namedNamespace(t, name)
	return filepath.Join(netnsDir, name)
}

// lateRuntime has more for the second question than for the first.
type lateRuntime struct{ first, second podRecords }

func (r lateRuntime) pod(context.Context, string) (podRecords, error) { return r.first, nil }
func (r lateRuntime) all(context.Context) (podRecords, error)         { return r.second, nil }
func (lateRuntime) events(context.Context) <-chan struct{}            { return nil }

// A sandbox that is recorded while the agent looks is the pod's own, not somebody else's who has its address.
func TestASandboxThatIsRecordedMeanwhile(t *testing.T) {
	path := runtimesNamespace(t)
	for _, ips := range [][]netip.Addr{nil, {testAddress}} {
		h := lookable(t, path)
		h.group("kubepods/pod" + podUID)
		query := podQuery
		query.IPs = ips
		second := podRecords{
			sandboxes:  []podSandbox{{id: "s1", ready: true, pod: sandbox.Pod{Namespace: "shop", Name: "web-0", UID: podUID}, details: details{netnsPath: path}}},
			containers: []podContainer{{id: "c1", sandboxID: "s1", name: "app"}, {id: "c2", sandboxID: "s2", name: "other"}},
		}
		report := newInspector("node-a", h.Host, lateRuntime{second: second}).Inspect(t.Context(), query)
		kinds := map[sandbox.Kind]int{}
		for _, f := range report.Findings {
			kinds[f.Kind]++
		}
		if kinds[sandbox.SandboxReady] != 1 || kinds[sandbox.ContainerRunning] != 1 || kinds[sandbox.NetnsOpen] != 1 || len(report.Conflicts) > 0 {
			t.Errorf("with %v: %s, findings %v, conflicts %v", ips, report.Verdict(), report.Findings, report.Conflicts)
		}
	}
}

// A leftover of which less is left, because its record was removed, is the same one: condition and taint must not go in between.
func TestALeftoverWhoseRecordIsRemoved(t *testing.T) {
	path := runtimesNamespace(t)
	s := newRecordedSweeper()
	left := []podSandbox{{id: "s1", ready: true, pod: sandbox.Pod{Namespace: "shop", Name: "web-0", UID: podUID}, details: details{netnsPath: path}}}
	h := lookable(t, path)
	h.group("kubepods/pod" + otherUID)
	s.inspector = newInspector("node-a", h.Host, fakeRuntime(func(context.Context, string) (podRecords, error) { return podRecords{sandboxes: left}, nil }))
	s.pods = &podsOfTheAPIServer{}
	for _, step := range []struct {
		after  time.Duration
		change func()
		status corev1.ConditionStatus
	}{
		{0, nil, corev1.ConditionFalse},
		{61 * time.Second, nil, corev1.ConditionTrue},
		{90 * time.Second, func() { left = nil }, corev1.ConditionTrue},
		{150 * time.Second, nil, corev1.ConditionTrue},
	} {
		if step.change != nil {
			step.change()
		}
		s.now = func() time.Time { return noon.Add(step.after) }
		s.sweep(t.Context())
		if len(s.conditions) == 0 {
			if step.status == corev1.ConditionTrue {
				t.Errorf("after %s: no condition was written", step.after)
			}
			continue
		}
		last := s.conditions[len(s.conditions)-1]
		if last.Status != step.status || step.status == corev1.ConditionTrue && !strings.Contains(last.Message, "shop/web-0") {
			t.Errorf("after %s: %s %s", step.after, last.Status, last.Message)
		}
	}
}

// A process of a pod that lives may have entered a leftover's namespace to look.
func TestAnIntruderHidesNoLeftover(t *testing.T) {
	s := twoPods()
	s.records.sandboxes = s.records.sandboxes[:1] // the record of otherUID is gone
	s.view.namespaces[0].tasks = leaders([]int{10})
	s.view.namespaces[1].tasks = leaders([]int{11, 20, 21})
	if got := leftovers(s.traces(), true, func(uid string) bool { return uid == podUID }); len(got) != 1 || got[0].Pod.UID != otherUID {
		t.Errorf("got %+v", got)
	}
}

// A namespace that is nobody's may be what is left of the pod that was asked about.
func TestInspectOfAPodWhoseNamespaceIsNobodys(t *testing.T) {
	path := runtimesNamespace(t)
	h := lookable(t, path)
	h.group("kubepods/pod" + otherUID)
	a := newInspector("node-a", h.Host, fakeRuntime(knowsNothing)).reports(t.Context(), []sandbox.Pod{{UID: podUID}})
	if a.Verdict != sandbox.Unknown || len(a.Failures) != 1 || !strings.Contains(a.Failures[0], path+" is nobody's") {
		t.Errorf("%s: %q", a.Verdict, a.Failures)
	}
	// What no runtime has made is none.
	name := fmt.Sprintf("eni-guard-test-somebodys-%d", os.Getpid())
	namedNamespace(t, name)
	h = lookable(t, filepath.Join(netnsDir, name))
	if a := newInspector("node-a", h.Host, fakeRuntime(knowsNothing)).reports(t.Context(), []sandbox.Pod{{UID: podUID}}); a.Verdict != sandbox.Released || len(a.Failures) > 0 {
		t.Errorf("%s: %q", a.Verdict, a.Failures)
	}
	// One that a process alone keeps has lost its mount, and the process has left the pod's cgroup. Without an address it is of no matter.
	for _, test := range []struct {
		addresses []netip.Addr
		want      sandbox.Verdict
	}{{[]netip.Addr{testAddress}, sandbox.Unknown}, {nil, sandbox.Released}} {
		cmd := exec.CommandContext(t.Context(), "sleep", "600")
		id := inNamespace(t, cmd, test.addresses...)
		h := lookable(t)
		h.group("kubepods/pod" + otherUID)
		h.inNamespaceOf(cmd.Process.Pid)
		a := newInspector("node-a", h.Host, fakeRuntime(knowsNothing)).reports(t.Context(), []sandbox.Pod{{UID: podUID}})
		if a.Verdict != test.want || a.Reports[0].Verdict() != test.want || test.want == sandbox.Unknown && (len(a.Failures) != 1 || !strings.Contains(a.Failures[0], id+" is nobody's")) {
			t.Errorf("with addresses %v: %s: %q", test.addresses, a.Verdict, a.Failures)
		}
	}
}

// Who has found nothing of a pod, and then cannot look for what is nobody's, does not know that nothing is left.
func TestInspectOfAPodWhoseSecondLookFails(t *testing.T) {
	h := lookable(t)
	h.group("kubepods/pod" + otherUID)
	i := newInspector("node-a", h.Host, fakeRuntime(func(_ context.Context, uid string) (podRecords, error) {
		if uid == "" { // all pods
			return podRecords{}, errors.New("down")
		}
		return podRecords{}, nil
	}))
	a := i.reports(t.Context(), []sandbox.Pod{{UID: podUID}})
	if a.Verdict != sandbox.Unknown || a.Reports[0].Verdict() != sandbox.Unknown || len(a.Failures) != 1 || !strings.Contains(a.Failures[0], "down") {
		t.Errorf("%s: %q", a.Verdict, a.Failures)
	}
}

// inNamespaceOf records that the process is in the network namespace of a real one.
func (h recordedHost) inNamespaceOf(real int) {
	h.t.Helper()
	id, err := os.Readlink(realNode.task(real, real, "ns/net"))
	if err != nil {
		h.t.Fatal(err)
	}
	h.symlink(fmt.Sprintf("%d/ns/net", pid), id)
	h.symlink(fmt.Sprintf("%d/task/%d/ns/net", pid, pid), realNode.task(real, real, "ns/net"))
}

// First the record of a leftover goes, and then its mount. The process that keeps it is in no cgroup of the pod: only what was seen before tells
// whose it is.
func TestALeftoverOfWhichLessAndLessIsLeft(t *testing.T) {
	path := runtimesNamespace(t)
	cmd := exec.CommandContext(t.Context(), "nsenter", "--net="+path, "sleep", "600")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	host, err := realNode.namespace("net")
	if err != nil {
		t.Fatal(err)
	}
	await(t, func() error {
		id, err := os.Readlink(realNode.task(cmd.Process.Pid, cmd.Process.Pid, "ns/net"))
		if err == nil && id == host {
			err = errors.New("the process has not entered the namespace")
		}
		return err
	})
	h := lookable(t, path)
	h.group("kubepods/pod" + otherUID)
	h.inNamespaceOf(cmd.Process.Pid)
	pod := sandbox.Pod{Namespace: "shop", Name: "web-0", UID: podUID}
	there, down := []podSandbox{{id: "s1", ready: true, pod: pod, details: details{netnsPath: path}}}, error(nil)
	s := newRecordedSweeper()
	s.inspector = newInspector("node-a", h.Host, fakeRuntime(func(context.Context, string) (podRecords, error) { return podRecords{sandboxes: there}, down }))
	s.pods = &podsOfTheAPIServer{}
	since := noon
	for _, step := range []struct {
		name  string
		after time.Duration
		less  func()
	}{
		{"everything", 0, func() {}},
		{"everything, after the grace time", s.grace, func() {}},
		{"no record", s.grace + 30*time.Second, func() { there = nil }},
		{"no runtime", s.grace + 40*time.Second, func() { down = errors.New("down") }},
		{"the runtime again", s.grace + 50*time.Second, func() { down = nil }},
		{"no mount", s.grace + time.Minute, func() { h.write(h.Proc, "thread-self/mountinfo", "") }},
		{"no mount, and no runtime", s.grace + 70*time.Second, func() { down = errors.New("down") }},
		{"no mount, and the runtime again", s.grace + 80*time.Second, func() { down = nil }},
		{"no mount, and the mounts cannot be read", s.grace + 90*time.Second, func() { _ = os.Remove(filepath.Join(h.Proc, "thread-self/mountinfo")) }},
		{"no mount, and they can again", s.grace + 100*time.Second, func() { h.write(h.Proc, "thread-self/mountinfo", "") }},
		{"no mount, later", time.Hour, func() {}},
	} {
		step.less()
		s.now = func() time.Time { return noon.Add(step.after) }
		s.sweep(t.Context())
		if step.after == 0 {
			continue
		}
		last := s.conditions[len(s.conditions)-1]
		if last.Status != corev1.ConditionTrue || !strings.Contains(last.Message, "shop/web-0") || !strings.Contains(last.Message, "since "+since.Format(time.RFC3339)) {
			t.Errorf("%s: %s %s", step.name, last.Status, last.Message)
		}
	}
	if got := s.told(); !slices.Equal(got, []string{"Warning LeftoverFound"}) {
		t.Errorf("Events %q", got)
	}
	// When the process ends, nothing is left.
	if err := os.RemoveAll(filepath.Join(h.Proc, strconv.Itoa(pid))); err != nil {
		t.Fatal(err)
	}
	s.sweep(t.Context())
	if last := s.conditions[len(s.conditions)-1]; last.Status != corev1.ConditionFalse {
		t.Errorf("nothing: %s %s", last.Status, last.Message)
	}
}

// Of a leftover that is found by the cgroup of a process, without any record, an Event tells once.
func TestALeftoverWithoutANameIsToldOfOnce(t *testing.T) {
	cmd := exec.CommandContext(t.Context(), "sleep", "600")
	inNamespace(t, cmd, testAddress)
	h := lookable(t)
	h.group("kubepods/pod"+podUID, pid)
	h.thread(pid, "sleep", "S", "x", "")
	h.inNamespaceOf(cmd.Process.Pid)
	s := newRecordedSweeper()
	s.inspector = newInspector("node-a", h.Host, fakeRuntime(knowsNothing))
	pods := &podsOfTheAPIServer{}
	s.pods = pods
	for n := range 5 {
		s.now = func() time.Time { return noon.Add(time.Duration(n) * time.Minute) }
		s.sweep(t.Context())
	}
	if got := s.told(); !slices.Equal(got, []string{"Warning LeftoverFound"}) {
		t.Errorf("Events %q", got)
	}
	// Nor is it gone because the API server cannot be asked.
	pods.away = errors.New("away")
	s.sweep(t.Context())
	if last := s.conditions[len(s.conditions)-1]; last.Status != corev1.ConditionTrue || !strings.Contains(last.Message, podUID) {
		t.Errorf("%s %s", last.Status, last.Message)
	}
}

// What the agent before this one has told of stands while it may still be there: a namespace of nobody has no UID to go by.
func TestWhatTheAgentBeforeHasToldStands(t *testing.T) {
	path := runtimesNamespace(t)
	s := newRecordedSweeper()
	left := []podSandbox{{id: "s1", ready: true, pod: sandbox.Pod{Namespace: "shop", Name: "web-0", UID: podUID}, details: details{netnsPath: "/run/netns/closed"}}}
	h := lookable(t, path)
	h.group("kubepods/pod" + otherUID)
	s.inspector = newInspector("node-a", h.Host, fakeRuntime(func(context.Context, string) (podRecords, error) { return podRecords{sandboxes: left}, nil }))
	s.pods = &podsOfTheAPIServer{}
	nobodys := Trace{key: "x", Leftover: leftoverOfNobody, Findings: []sandbox.Finding{{Kind: sandbox.NetnsOpen, Netns: path}}}
	s.takeOver(leftoverCondition(noon.Add(-time.Hour), []leftover{{trace(podUID), noon.Add(-time.Hour)}, {nobodys, noon.Add(-time.Hour)}}), noon)
	for _, after := range []time.Duration{0, 30 * time.Second, time.Minute, 6 * time.Minute} {
		if after == 30*time.Second {
			left = nil
		}
		s.now = func() time.Time { return noon.Add(after) }
		s.sweep(t.Context())
		if last := s.conditions[len(s.conditions)-1]; last.Status != corev1.ConditionTrue {
			t.Errorf("after %s: %s %s", after, last.Status, last.Message)
		}
	}
}

// A look that was not complete forgets no address that is there twice.
func TestAnIncompleteLookForgetsNoConflict(t *testing.T) {
	s := newRecordedSweeper()
	shared := []SharedAddress{{podAddress, []Trace{trace("a"), trace("b")}}}
	due := []leftover{{trace("a"), noon.Add(-time.Minute)}}
	s.report(t.Context(), noon, due, shared, nil)
	s.report(t.Context(), noon.Add(30*time.Second), due, nil, []string{"the probe netns did not run"})
	if len(s.shared) != 1 {
		t.Errorf("after an incomplete look %q are shared", s.shared)
	}
	s.report(t.Context(), noon.Add(time.Minute), due, nil, nil)
	if len(s.shared) != 0 {
		t.Errorf("after a complete look %q are shared", s.shared)
	}
}

// A pod that lives may have left the namespace of an earlier sandbox behind: that is a leftover, though the pod is none.
func TestTheOldNamespaceOfALivingPod(t *testing.T) {
	path := runtimesNamespace(t)
	s := newRecordedSweeper()
	pod := sandbox.Pod{Namespace: "shop", Name: "web-0", UID: podUID}
	there := []podSandbox{{id: "s1", ready: true, pod: pod, details: details{netnsPath: path}}}
	h := lookable(t, path)
	h.group("kubepods/pod" + otherUID)
	s.inspector = newInspector("node-a", h.Host, fakeRuntime(func(context.Context, string) (podRecords, error) { return podRecords{sandboxes: there}, nil }))
	s.pods = &podsOfTheAPIServer{cached: map[string]bool{podUID: true}, asked: map[string]bool{podUID: true}}
	for _, after := range []time.Duration{0, 30 * time.Second, 6 * time.Minute} {
		if after == 30*time.Second {
			there = []podSandbox{{id: "s2", ready: true, pod: pod, details: details{netnsPath: "/run/netns/closed"}}}
		}
		s.now = func() time.Time { return noon.Add(after) }
		s.sweep(t.Context())
	}
	if last := s.conditions[len(s.conditions)-1]; last.Status != corev1.ConditionTrue || !strings.Contains(last.Message, path) {
		t.Errorf("%s %s", last.Status, last.Message)
	}
}

// The Node object may have been made anew, and would have neither condition nor taint.
func TestAConditionThatIsTrueIsWrittenAgainSoon(t *testing.T) {
	s := newRecordedSweeper()
	due := []leftover{{trace("a"), noon.Add(-time.Minute)}}
	for n, after := range []time.Duration{0, leftoverEvery - time.Second, leftoverEvery} {
		s.report(t.Context(), noon.Add(after), due, nil, nil)
		if want := 1 + n/2; len(s.conditions) != want {
			t.Errorf("after %s: written %d times, not %d", after, len(s.conditions), want)
		}
	}
}

// A runtime that hangs is the one thing to tell of a pod that is asked for by name, which nobody else knows.
func TestInspectOfAPodByNameWhileTheRuntimeHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		i := newInspector("node-a", lookable(t).Host, fakeRuntime(func(ctx context.Context, _ string) (podRecords, error) {
			<-ctx.Done()
			return podRecords{}, ctx.Err()
		}))
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		a := i.byName(ctx, sandbox.Pod{Namespace: "shop", Name: "web-0"})
		if ctx.Err() != nil || a.Verdict != sandbox.Unknown || len(a.Failures) != 1 || !strings.Contains(a.Failures[0], "could not be listed") {
			t.Errorf("%s, failures %q (%v)", a.Verdict, a.Failures, ctx.Err())
		}
	})
}

// A runtime that hangs leaves time to read what else was found.
func TestInspectOfAnAddressWhileTheRuntimeHangs(t *testing.T) {
	path := runtimesNamespace(t)
	synctest.Test(t, func(t *testing.T) {
		i := newInspector("node-a", lookable(t, path).Host, fakeRuntime(func(ctx context.Context, _ string) (podRecords, error) {
			<-ctx.Done()
			return podRecords{}, ctx.Err()
		}))
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		defer cancel()
		a := i.holdersOf(ctx, testAddress)
		if ctx.Err() != nil || a.Verdict != sandbox.Bound || len(a.Holders) != 1 {
			t.Errorf("%s %+v, failures %q (%v)", a.Verdict, a.Holders, a.Failures, ctx.Err())
		}
	})
}
