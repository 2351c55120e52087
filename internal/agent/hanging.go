package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sys/unix"

	"github.com/eni-guard/eni-guard/internal/sandbox"
)

const (
	// maxConcurrent bounds how often a probe runs at once.
	maxConcurrent = 16
	// hangTime is after how long a run that has not come back counts as hanging, and no other one waits for it any more.
	hangTime = 15 * time.Second
	// maxHanging bounds the hanging runs of one kind. Each keeps a thread that nothing may ever end, so beyond it none is begun.
	maxHanging = 4
)

// runs are those of one kind that have not come back.
type runs struct {
	mu    sync.Mutex
	going []*probeRun
}

// probeRun is one run of a probe.
type probeRun struct {
	mu    sync.Mutex
	began time.Time
	// threads are those of this process that it uses at the moment, and what for.
	threads map[int]sandbox.ProbeName
}

// begin returns a new run, or an error where too many hang already.
func (r *runs) begin() (*probeRun, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	var hanging []*probeRun
	for _, run := range r.going {
		if run.hangs() {
			hanging = append(hanging, run)
		}
	}
	if len(hanging) >= maxHanging {
		return nil, fmt.Errorf("%d earlier runs of it hang%s", len(hanging), hanging[len(hanging)-1].where())
	}
	run := &probeRun{began: time.Now(), threads: map[int]sandbox.ProbeName{}}
	r.going = append(r.going, run)
	return run, nil
}

// end says that a run has come back.
func (r *runs) end(run *probeRun) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.going = slices.DeleteFunc(r.going, func(going *probeRun) bool { return going == run })
}

// restart makes a run that has come back a new one.
func (r *probeRun) restart() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.began = time.Now()
}

func (r *probeRun) hangs() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return time.Since(r.began) >= hangTime
}

type runKey struct{}

// with is the context of what the run does.
func (r *probeRun) with(ctx context.Context) context.Context {
	return context.WithValue(ctx, runKey{}, r)
}

// onThread keeps the calling goroutine on its thread, and notes for the run of ctx that it is there, so that it can be told where in
// the kernel it hangs, until leave is called.
func onThread(ctx context.Context, probe sandbox.ProbeName) (leave func()) {
	r, ok := ctx.Value(runKey{}).(*probeRun)
	if !ok {
		return func() {}
	}
	runtime.LockOSThread()
	thread := unix.Gettid()
	r.mu.Lock()
	before, nested := r.threads[thread]
	r.threads[thread] = probe
	r.mu.Unlock()
	return func() {
		r.mu.Lock()
		if nested {
			r.threads[thread] = before
		} else {
			delete(r.threads, thread)
		}
		r.mu.Unlock()
		runtime.UnlockOSThread()
	}
}

// kernelWait is what a run waits for in the kernel, and for which of the probes.
type kernelWait struct {
	probe    sandbox.ProbeName
	function string
}

// waits are the kernel functions that the threads of a run sleep in.
func (r *probeRun) waits() []kernelWait {
	r.mu.Lock()
	defer r.mu.Unlock()
	var waits []kernelWait
	for thread, probe := range r.threads {
		content, err := os.ReadFile(fmt.Sprintf("/proc/self/task/%d/wchan", thread))
		// In a futex the goroutine waits for another one, whose thread is the one that hangs.
		if function := string(content); err == nil && function != "0" && !strings.HasPrefix(function, "futex") {
			waits = append(waits, kernelWait{probe, function})
		}
	}
	slices.SortFunc(waits, func(a, b kernelWait) int { return strings.Compare(a.function, b.function) })
	return waits
}

// where says where in the kernel a run is, in words that follow what it has not done; empty when it is not there.
func (r *probeRun) where() string {
	var functions []string
	for _, wait := range r.waits() {
		functions = append(functions, wait.function)
	}
	if len(functions) == 0 {
		return ""
	}
	return ": it waits in the kernel, in " + strings.Join(slices.Compact(functions), " and ")
}

// noAnswer is the error of a run that was given up on.
func (r *probeRun) noAnswer(since time.Time) error {
	return fmt.Errorf("no answer after %s%s", time.Since(since).Round(time.Millisecond), r.where())
}

// errNoTime is of what was not begun.
var errNoTime = errors.New("no time was left")

// slots bound how often a probe runs at once, and how often it hangs.
type slots struct {
	probe sandbox.ProbeName
	free  chan struct{}
	runs  runs
}

func newSlots(probe sandbox.ProbeName) *slots {
	return &slots{probe: probe, free: make(chan struct{}, maxConcurrent)}
}

// run calls probe, and gives up on it, but not on its slot, at the deadline of ctx. What a probe returns beside an
// error is kept: half the evidence is still evidence.
func run[T any](ctx context.Context, slots *slots, probe func(context.Context) (T, error)) (T, error) {
	type result struct {
		value T
		err   error
	}
	var none T
	start := time.Now()
	if ctx.Err() != nil {
		return none, errNoTime
	}
	select {
	case slots.free <- struct{}{}:
	case <-ctx.Done():
		return none, fmt.Errorf("%d other runs of it have not come back", cap(slots.free))
	}
	this, err := slots.runs.begin()
	if err != nil {
		<-slots.free
		return none, err
	}
	done := make(chan result, 1)
	go func() {
		defer func() { slots.runs.end(this); <-slots.free }()
		ctx := this.with(ctx)
		if slots.probe != sandbox.ProbeRuntime { // which waits for the runtime, not in the kernel
			defer onThread(ctx, slots.probe)()
		}
		value, err := probe(ctx)
		done <- result{value, err}
	}()
	select {
	case r := <-done:
		return r.value, r.err
	case <-ctx.Done():
		return none, this.noAnswer(start)
	}
}

var hangingDescription = prometheus.NewDesc("eni_guard_probe_hanging",
	"Runs of a probe that have not come back for 15 seconds, by the kernel function that they wait in.", []string{"probe", "function"}, nil)

// hangingProbes is a metric of an Inspector.
type hangingProbes struct{ *Inspector }

// Describe implements prometheus.Collector.
func (hangingProbes) Describe(descriptions chan<- *prometheus.Desc) {
	descriptions <- hangingDescription
}

// Collect implements prometheus.Collector.
func (h hangingProbes) Collect(metrics chan<- prometheus.Metric) {
	count := map[kernelWait]int{}
	add := func(r *runs, otherwise sandbox.ProbeName) {
		r.mu.Lock()
		defer r.mu.Unlock()
		for _, run := range r.going {
			if !run.hangs() {
				continue
			}
			waits := run.waits()
			if len(waits) == 0 {
				waits = []kernelWait{{probe: otherwise}}
			}
			for _, wait := range slices.Compact(waits) {
				count[wait]++
			}
		}
	}
	for name, slots := range h.slots {
		add(&slots.runs, name)
	}
	for how := range h.views {
		add(&h.views[how].runs, sandbox.ProbeNetns)
	}
	for wait, n := range count {
		metrics <- prometheus.MustNewConstMetric(hangingDescription, prometheus.GaugeValue, float64(n), string(wait.probe), wait.function)
	}
}
