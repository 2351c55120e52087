package agent

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/go-logr/logr"
	"golang.org/x/sys/unix"

	"github.com/eni-guard/eni-guard/internal/sandbox"
)

// Whoever waits for the release gets one answer: as soon as nothing is left, or what is left when the time has passed.
func TestWaitingForTheRelease(t *testing.T) {
	// A pod of which the runtime tells so many times that it is there. A question that does not find it quickly asks again.
	ask := func(ctx context.Context, looks int, parameters string) (sandbox.Report, int) {
		n := 0
		inspector := newInspector("node-a", lookable(t).Host, fakeRuntime(func(context.Context, string) (podRecords, error) {
			if n++; n <= looks {
				return podRecords{sandboxes: []podSandbox{{id: "abc", ready: true}}}, nil
			}
			return podRecords{}, nil
		}))
		body, err := json.Marshal(podQuery)
		if err != nil {
			t.Fatal(err)
		}
		recorder := httptest.NewRecorder()
		// One look may take long where the machine has much to do.
		Handler(inspector, logr.Discard()).ServeHTTP(recorder, httptest.NewRequestWithContext(ctx, http.MethodPost, InspectPath+"?timeout=30s&"+parameters, bytes.NewReader(body)))
		var report sandbox.Report
		if err := json.Unmarshal(recorder.Body.Bytes(), &report); err != nil {
			t.Fatalf("%d %s: %v", recorder.Code, recorder.Body, err)
		}
		return report, n
	}
	if report, looks := ask(t.Context(), 2, "wait=30s"); report.Verdict() != sandbox.Released || looks != 4 {
		t.Errorf("released while waiting: %s after %d looks", report.Verdict(), looks)
	}
	if report, looks := ask(t.Context(), 0, "wait=30s"); report.Verdict() != sandbox.Released || looks != 2 {
		t.Errorf("released already: %s after %d looks", report.Verdict(), looks)
	}
	if report, looks := ask(t.Context(), 1000, "wait=3s"); report.Verdict() != sandbox.Bound || looks < 2 {
		t.Errorf("still bound at the end: %s after %d looks", report.Verdict(), looks)
	}
	if report, looks := ask(t.Context(), 1000, ""); report.Verdict() != sandbox.Bound || looks != 1 {
		t.Errorf("without waiting: %s after %d looks", report.Verdict(), looks)
	}
	gone, leave := context.WithCancel(t.Context())
	leave()
	if _, looks := ask(gone, 1000, "wait=30s"); looks > 1 {
		t.Errorf("%d looks for a caller who has gone", looks)
	}
}

// A look that has begun before the end of the time is not cut short by it: what it could not ask any more would be unknown.
func TestTheLastLookWhileWaiting(t *testing.T) {
	looks := 0
	i := newInspector("node-a", lookable(t).Host, fakeRuntime(func(ctx context.Context, _ string) (podRecords, error) {
		if looks++; looks > 1 {
			select {
			case <-time.After(500 * time.Millisecond):
			case <-ctx.Done():
				return podRecords{}, ctx.Err()
			}
		}
		return podRecords{sandboxes: []podSandbox{{id: "abc", ready: true}}}, nil
	}))
	report := awaitRelease(t.Context(), i, podQuery, times{timeout: 30 * time.Second, wait: 2*lookAgainAfter + 100*time.Millisecond})
	if report.Verdict() != sandbox.Bound || len(report.Failures()) > 0 {
		t.Errorf("%s after %d looks: %q", report.Verdict(), looks, report.Failures())
	}
}

// eventfulRuntime is a runtime with events.
type eventfulRuntime struct {
	fakeRuntime
	come chan struct{}
}

func (r eventfulRuntime) events(context.Context) <-chan struct{} { return r.come }

// While somebody waits, the kernel is asked for the end of the processes that were found, and the runtime for its events.
func TestWhatWakesWhoWaits(t *testing.T) {
	pid := os.Getpid() // os/exec has a pidfd of each child
	h := lookable(t)
	h.group("kubepods/pod"+podUID+"/c1", pid)
	h.process(pid, "java", "S", "x", "net:[7]")
	runtime := eventfulRuntime{knowsNothing, make(chan struct{})}
	ctx, leave := context.WithTimeout(t.Context(), time.Minute)
	left := make(chan struct{})
	go func() {
		defer close(left)
		awaitRelease(ctx, newInspector("node-a", h.Host, runtime), podQuery, times{timeout: 30 * time.Second, wait: time.Hour})
	}()
	await(t, func() error {
		open, err := filepath.Glob("/proc/self/fdinfo/*")
		if err != nil {
			return err
		}
		for _, file := range open {
			if content, err := os.ReadFile(file); err == nil && strings.Contains(string(content), fmt.Sprintf("\nPid:\t%d\n", pid)) {
				return nil
			}
		}
		return fmt.Errorf("no pidfd of process %d is open", pid)
	})
	select {
	case runtime.come <- struct{}{}:
	case <-ctx.Done():
		t.Error("nobody takes the runtime's event")
	}
	leave()
	<-left
}

// A watch ends when something happens, long before its limit, which is far longer than this test may take.
func TestWatch(t *testing.T) {
	requireRoot(t)
	const never = time.Hour
	child := func() *exec.Cmd {
		cmd := exec.CommandContext(t.Context(), "sleep", "3600")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
		return cmd
	}
	end := func(cmd *exec.Cmd) {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}
	for _, test := range []struct {
		name    string
		happens func(process *exec.Cmd, events chan<- struct{}, leave func())
	}{
		{"a process ends", func(process *exec.Cmd, _ chan<- struct{}, _ func()) { end(process) }},
		{"a mount comes", func(*exec.Cmd, chan<- struct{}, func()) {
			dir := t.TempDir()
			if err := unix.Mount("eni-guard-test", dir, "tmpfs", 0, ""); err != nil {
				t.Error(err)
			}
			if err := unix.Unmount(dir, 0); err != nil {
				t.Error(err)
			}
		}},
		{"an event of the runtime", func(_ *exec.Cmd, events chan<- struct{}, _ func()) { events <- struct{}{} }},
		{"the caller leaves", func(_ *exec.Cmd, _ chan<- struct{}, leave func()) { leave() }},
	} {
		t.Run(test.name, func(t *testing.T) {
			ctx, leave := context.WithCancel(t.Context())
			events := make(chan struct{})
			w := newWatch(ctx, events)
			defer leave()
			defer w.close()
			cmd := child()
			changed := make(chan bool)
			go func() { changed <- w.await([]int{cmd.Process.Pid}, never) }()
			test.happens(cmd, events, leave)
			if !<-changed {
				t.Error("no change")
			}
		})
	}
	t.Run("a process has ended already", func(t *testing.T) {
		w := newWatch(t.Context(), nil)
		defer w.close()
		cmd := child()
		end(cmd)
		if !w.await([]int{cmd.Process.Pid}, never) {
			t.Error("no change")
		}
	})
	t.Run("nothing happens", func(t *testing.T) {
		w := newWatch(t.Context(), nil)
		defer w.close()
		w.mounts = -1 // other programs of this machine mount too
		if w.await([]int{child().Process.Pid}, 50*time.Millisecond) {
			t.Error("a change")
		}
	})
}

// The end of what was found is waited for, but of no more processes than can be watched.
func TestProcessesThatAreWaitedFor(t *testing.T) {
	report := sandbox.Report{Findings: []sandbox.Finding{{Kind: sandbox.SandboxReady}}}
	var want []int
	for pid := 1; pid <= 2*maxWatched; pid++ {
		report.Findings = append(report.Findings, sandbox.Finding{Kind: sandbox.ProcessAlive, Process: &sandbox.Process{PID: pid}})
		if pid <= maxWatched {
			want = append(want, pid)
		}
	}
	if got := processes(report); !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

// The pauses grow to a bound, and begin anew after a change.
func TestPauses(t *testing.T) {
	pause := lookAgainAfter
	var pauses []time.Duration
	for n := range 10 {
		pause = nextPause(pause, n == 7)
		pauses = append(pauses, pause/time.Millisecond)
	}
	if want := []time.Duration{200, 400, 800, 1600, 2000, 2000, 2000, 100, 200, 400}; !slices.Equal(pauses, want) {
		t.Errorf("got %d ms, want %d", pauses, want)
	}
}

// Where something changes all the time, such as a process that is found and has ended, there is a pause all the same.
func TestChangesAllTheTime(t *testing.T) {
	requireRoot(t)
	cmd := exec.CommandContext(t.Context(), "true")
	if err := cmd.Run(); err != nil {
		t.Fatal(err)
	}
	w := newWatch(t.Context(), nil)
	defer w.close()
	start := time.Now()
	for range 5 {
		if !w.await([]int{cmd.Process.Pid}, time.Hour) {
			t.Error("no change")
		}
	}
	if took := time.Since(start); took < 4*lookAgainAfter {
		t.Errorf("5 pauses have taken %s", took)
	}
	// What the kernel cannot tell takes its time too.
	files := make([]unix.PollFd, 1<<24)
	start = time.Now()
	if ready(files, lookAgainAfter) || time.Since(start) < lookAgainAfter {
		t.Errorf("waiting for what cannot be waited for has taken %s", time.Since(start))
	}
}
