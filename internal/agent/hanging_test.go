package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sys/unix"

	"github.com/eni-guard/eni-guard/internal/sandbox"
)

// hangAt makes a file of which the kernel does not give an end to whoever opens it, as long as nobody writes to it: until the end of
// the test, or until release is called, which removes it.
func hangAt(t *testing.T, file string) (release func()) {
	t.Helper()
	if err := errors.Join(os.RemoveAll(file), unix.Mkfifo(file, 0o600)); err != nil {
		t.Fatal(err)
	}
	held, err := os.OpenFile(file, unix.O_PATH, 0)
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	var releasing sync.WaitGroup
	release = sync.OnceFunc(func() {
		_ = os.Remove(file)
		// Whoever waits gets an empty file. Who found it before it was removed may begin to wait only after the first that were let go, so
		// this does not end before the test.
		releasing.Go(func() {
			tick := time.NewTicker(10 * time.Millisecond)
			defer tick.Stop()
			for {
				if fd, err := unix.Open(fmt.Sprintf("/proc/self/fd/%d", held.Fd()), unix.O_WRONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0); err == nil {
					_ = unix.Close(fd)
				}
				select {
				case <-ended:
					return
				case <-tick.C:
				}
			}
		})
	})
	t.Cleanup(func() {
		release()
		close(ended)
		releasing.Wait()
		_ = held.Close()
	})
	return release
}

// age makes every run that has not come back as old as one that hangs.
func (r *runs) age() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, run := range r.going {
		run.mu.Lock()
		run.began = run.began.Add(-hangTime)
		run.mu.Unlock()
	}
}

func (r *runs) count() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.going)
}

// hanging reads the metric, by probe.
func hanging(t *testing.T, registry *prometheus.Registry) map[sandbox.ProbeName]int {
	t.Helper()
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	count := map[sandbox.ProbeName]int{}
	for _, family := range families {
		if family.GetName() != "eni_guard_probe_hanging" {
			continue
		}
		for _, metric := range family.GetMetric() {
			labels := map[string]string{}
			for _, label := range metric.GetLabel() {
				labels[label.GetName()] = label.GetValue()
			}
			if !kernelFunction.MatchString(labels["function"]) {
				t.Errorf("probe %s hangs in %q", labels["probe"], labels["function"])
			}
			count[sandbox.ProbeName(labels["probe"])] += int(metric.GetGauge().GetValue())
		}
	}
	return count
}

var (
	kernelFunction   = regexp.MustCompile(`^[a-z_][a-z0-9_.]+$`)
	waitsInTheKernel = regexp.MustCompile(`: it waits in the kernel, in [a-z_][a-z0-9_.]+$`)
)

// The kernel keeps a look at all namespaces, or one at a pod's cgroups. Its probe is named, with the function of the kernel; it is tried
// again, but not for ever; and when the kernel lets go, all is well again.
func TestAProbeThatHangsInTheKernelIsNamed(t *testing.T) {
	for _, test := range []struct {
		name  string
		file  func(h recordedHost) string
		probe sandbox.ProbeName
		runs  func(i *Inspector) *runs
	}{
		{
			"the mount table", func(h recordedHost) string { return filepath.Join(h.Proc, "thread-self/mountinfo") },
			sandbox.ProbeNetns, func(i *Inspector) *runs { return &i.views[thorough].runs },
		},
		{
			"a cgroup", func(h recordedHost) string { return filepath.Join(h.Cgroup, "kubepods/pod"+noPod, "cgroup.procs") },
			sandbox.ProbeCgroups, func(i *Inspector) *runs { return &i.slots[sandbox.ProbeCgroups].runs },
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			h := lookable(t)
			h.group("kubepods/pod" + noPod)
			inspector := newInspector("node-a", h.Host, fakeRuntime(knowsNothing))
			handler := HealthHandler(inspector)
			registry := prometheus.NewRegistry()
			registry.MustRegister(hangingProbes{inspector})
			ready := func() (int, sandbox.Report) {
				ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
				defer cancel()
				recorder := httptest.NewRecorder()
				handler.ServeHTTP(recorder, httptest.NewRequestWithContext(ctx, http.MethodGet, "/readyz", nil))
				var report sandbox.Report
				if recorder.Code != http.StatusOK {
					if err := json.Unmarshal(recorder.Body.Bytes(), &report); err != nil {
						t.Fatalf("%s: %v", recorder.Body, err)
					}
				}
				return recorder.Code, report
			}
			file := test.file(h)
			content, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			release := hangAt(t, file)
			for n := 1; n <= maxHanging+1; n++ {
				words := "no answer after "
				if n > maxHanging {
					words = "4 earlier runs of it hang: "
				}
				code, report := ready()
				i := slices.IndexFunc(report.Probes, func(p sandbox.Probe) bool { return p.Name == test.probe })
				if code != http.StatusServiceUnavailable || i < 0 || !strings.HasPrefix(report.Probes[i].Error, words) || !waitsInTheKernel.MatchString(report.Probes[i].Error) {
					t.Errorf("at look %d: %d %+v", n, code, report.Probes)
				}
				if n == 1 {
					if got := hanging(t, registry); len(got) > 0 {
						t.Errorf("within a moment, %v hang", got)
					}
				}
				test.runs(inspector).age()
				if got := hanging(t, registry)[test.probe]; got != min(n, maxHanging) {
					t.Errorf("after look %d, %d runs hang", n, got)
				}
			}
			release()
			if err := os.WriteFile(file, content, 0o600); err != nil {
				t.Fatal(err)
			}
			await(t, func() error {
				if code, report := ready(); code != http.StatusOK {
					return fmt.Errorf("%d %+v", code, report)
				}
				if left := test.runs(inspector).count(); left > 0 {
					return fmt.Errorf("%d runs have not come back", left)
				}
				return nil
			})
			if got := hanging(t, registry); len(got) > 0 {
				t.Errorf("at the end, %v hang", got)
			}
		})
	}
}

// What explains a process is read for a moment only: the process is told without, and while several such reads hang none is begun.
func TestAStackThatHangs(t *testing.T) {
	h := newRecordedHost(t)
	h.group("kubepods/pod"+podUID+"/c1", 42)
	h.thread(42, "java", "D", "nfs_wait", "net:[7]")
	release := hangAt(t, filepath.Join(h.Proc, "42/task/42/stack"))
	for range 2 * cap(explanationSlots) {
		told := make(chan error, 1)
		go func() {
			found, err := h.processes(t.Context())
			if err == nil && (len(found) != 1 || found[0].State != "D" || len(found[0].Stack) > 0) {
				err = fmt.Errorf("found %+v", found)
			}
			told <- err
		}()
		select {
		case err := <-told:
			if err != nil {
				t.Error(err)
			}
		case <-time.After(time.Minute):
			t.Fatal("a process is not told of while its stack cannot be read")
		}
	}
	if n := len(explanationSlots); n != cap(explanationSlots) {
		t.Errorf("%d reads hang", n)
	}
	release()
	await(t, func() error {
		if n := len(explanationSlots); n > 0 {
			return fmt.Errorf("%d reads hang", n)
		}
		return nil
	})
}

// A run uses several threads, for more than one probe, and it is the one in the kernel that tells which.
func TestTheThreadsOfARun(t *testing.T) {
	proc := filepath.Join(t.TempDir(), "proc")
	release := hangAt(t, proc)
	r := &probeRun{threads: map[int]sandbox.ProbeName{}}
	ctx := r.with(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer onThread(ctx, sandbox.ProbeNetns)()
		inner := make(chan struct{})
		go func() {
			defer close(inner)
			defer onThread(ctx, sandbox.ProbeNetns)()
			_, _ = Host{Proc: proc}.tasks(ctx)
		}()
		<-inner
	}()
	await(t, func() error {
		if waits := r.waits(); len(waits) != 1 || waits[0].probe != sandbox.ProbeProcesses || !kernelFunction.MatchString(waits[0].function) {
			return fmt.Errorf("it waits in %+v", waits)
		}
		return nil
	})
	release()
	<-done
	if len(r.threads) > 0 {
		t.Errorf("it is called on threads %v at its end", r.threads)
	}
}

// The thread that goes into namespaces is one of its own.
func TestWhereALookIntoANamespaceHangs(t *testing.T) {
	requireRoot(t)
	dir := t.TempDir()
	end := deadMount(t, dir)
	r := &probeRun{threads: map[int]sandbox.ProbeName{}}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = realNode.readAddresses(r.with(t.Context()), []netNamespace{{id: "net:[7]", paths: []string{filepath.Join(dir, "x")}}})
	}()
	await(t, func() error {
		if waits := r.waits(); len(waits) != 1 || waits[0].probe != sandbox.ProbeNetns || !kernelFunction.MatchString(waits[0].function) {
			return fmt.Errorf("it waits in %+v", waits)
		}
		return nil
	})
	end()
	<-done
	if len(r.threads) > 0 {
		t.Errorf("it is called on threads %v at its end", r.threads)
	}
}

// A run that hangs keeps nobody from looking after a while, and four of them keep everybody.
func TestALookThatHangsIsBegunAnew(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var s shared[int]
		hang, works := make(chan struct{}), false
		runs := 0
		ask := func() (int, error) {
			ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
			defer cancel()
			return s.do(ctx, func(context.Context) int {
				runs++
				if n := runs; works {
					return n
				}
				<-hang
				return -1
			})
		}
		for n := 1; n <= maxHanging; n++ {
			for range 3 { // the ones after the first come while it does not count as hanging yet
				if _, err := ask(); err == nil || !strings.HasPrefix(err.Error(), "no answer after 5s") {
					t.Errorf("run %d: %v", n, err)
				}
			}
			if runs != n {
				t.Errorf("%d runs, not %d", runs, n)
			}
		}
		works = true
		if _, err := ask(); err == nil || err.Error() != "4 earlier runs of it hang" {
			t.Errorf("when %d hang: %v", runs, err)
		}
		hang <- struct{}{}
		synctest.Wait()
		if n, err := ask(); err != nil || n != maxHanging+1 {
			t.Errorf("when one has come back: run %d (%v)", n, err)
		}
		close(hang)
		synctest.Wait()
		if n := s.runs.count(); n != 0 {
			t.Errorf("%d runs are left", n)
		}
	})
}

// Where somebody always waits, one run follows the other, however long that goes on: none of them hangs.
func TestLooksThatFollowEachOtherDoNotHang(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var s shared[int]
		var at, most atomic.Int32
		var asking sync.WaitGroup
		for range 3 * hangTime / time.Second {
			asking.Go(func() {
				if _, err := s.do(t.Context(), func(context.Context) int {
					most.Store(max(most.Load(), at.Add(1)))
					<-time.After(4 * time.Second)
					at.Add(-1)
					return 0
				}); err != nil {
					t.Error(err)
				}
			})
			<-time.After(time.Second)
		}
		asking.Wait()
		if most.Load() != 1 {
			t.Errorf("%d ran at once", most.Load())
		}
	})
}
