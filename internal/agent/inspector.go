// Package agent is the node side of eni-guard: it tells what of a pod is still on its node.
package agent

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/eni-guard/eni-guard/internal/sandbox"
)

// maxConcurrent bounds how often one probe runs at once. A probe that hangs in the kernel cannot be ended; the bound
// keeps the hanging ones from piling up.
const maxConcurrent = 16

// maxFindings bounds a report. The most telling findings come first, and any one of them decides.
const maxFindings = 1000

// Inspector looks at one node.
type Inspector struct {
	node    string
	host    Host
	runtime podLister
	slots   map[sandbox.ProbeName]chan struct{}
}

// podLister is what the inspector needs of a container runtime.
type podLister interface {
	pod(ctx context.Context, uid string) ([]podSandbox, []podContainer, error)
}

// NewInspector returns an inspector of the node that is called node.
func NewInspector(node string, host Host, runtime *Runtime) *Inspector {
	return newInspector(node, host, runtime)
}

func newInspector(node string, host Host, runtime podLister) *Inspector {
	slots := map[sandbox.ProbeName]chan struct{}{}
	for _, name := range sandbox.Required {
		slots[name] = make(chan struct{}, maxConcurrent)
	}
	return &Inspector{node: node, host: host, runtime: runtime, slots: slots}
}

// Inspect runs all probes for a pod until the deadline of ctx. It always returns a report: a probe that fails, or does
// not come back in time, is reported as not run.
func (i *Inspector) Inspect(ctx context.Context, query sandbox.Query) sandbox.Report {
	report := sandbox.Report{Node: i.node, UID: query.UID}
	var runtimeErr, processErr error
	var known struct {
		sandboxes  []podSandbox
		containers []podContainer
	}
	var processes []podProcess

	// The namespaces are looked at last, by what the others found, and must have time left when one of those hangs.
	first, cancel := firstTwoThirds(ctx)
	defer cancel()
	var both sync.WaitGroup
	both.Go(func() {
		known, runtimeErr = run(first, i.slots[sandbox.ProbeRuntime], func() (result struct {
			sandboxes  []podSandbox
			containers []podContainer
		}, err error) {
			result.sandboxes, result.containers, err = i.runtime.pod(first, query.UID)
			return result, err
		})
	})
	both.Go(func() {
		processes, processErr = run(first, i.slots[sandbox.ProbeProcesses], func() ([]podProcess, error) {
			return i.host.processes(first, query.UID)
		})
	})
	both.Wait()
	namespaces, netnsErr := run(ctx, i.slots[sandbox.ProbeNetns], func() ([]sandbox.Finding, error) {
		return i.host.namespaces(ctx, known.sandboxes, processes, query.IPs)
	})

	report.Probes = []sandbox.Probe{
		{Name: sandbox.ProbeRuntime, Error: text(runtimeErr)},
		{Name: sandbox.ProbeProcesses, Error: text(processErr)},
		{Name: sandbox.ProbeNetns, Error: text(netnsErr)},
	}
	for _, p := range processes {
		report.Findings = append(report.Findings, sandbox.Finding{Kind: sandbox.ProcessAlive, Process: &p.Process})
	}
	for _, c := range known.containers {
		report.Findings = append(report.Findings, sandbox.Finding{
			Kind: sandbox.ContainerRunning, Sandbox: c.sandboxID, Container: c.id, ContainerName: c.name,
		})
	}
	for _, s := range known.sandboxes {
		if s.ready {
			report.Findings = append(report.Findings, sandbox.Finding{Kind: sandbox.SandboxReady, Sandbox: s.id})
		}
	}
	report.Findings = append(report.Findings, namespaces...)
	report.Sort()
	report.Findings = report.Findings[:min(len(report.Findings), maxFindings)]
	return report
}

// run calls probe, and gives up on it, but not on its slot, at the deadline of ctx. What a probe returns beside an
// error is kept: half the evidence is still evidence.
func run[T any](ctx context.Context, slots chan struct{}, probe func() (T, error)) (T, error) {
	type result struct {
		value T
		err   error
	}
	var none T
	start := time.Now()
	if ctx.Err() != nil {
		return none, errors.New("no time was left")
	}
	select {
	case slots <- struct{}{}:
	case <-ctx.Done():
		return none, fmt.Errorf("%d other runs of it have not come back", cap(slots))
	}
	done := make(chan result, 1)
	go func() {
		defer func() { <-slots }()
		value, err := probe()
		done <- result{value, err}
	}()
	select {
	case r := <-done:
		return r.value, r.err
	case <-ctx.Done():
		return none, fmt.Errorf("no answer after %s", time.Since(start).Round(time.Millisecond))
	}
}

// firstTwoThirds returns a context that ends when two thirds of the time of ctx have passed.
func firstTwoThirds(ctx context.Context) (context.Context, context.CancelFunc) {
	deadline, limited := ctx.Deadline()
	if !limited {
		return context.WithCancel(ctx)
	}
	return context.WithDeadline(ctx, deadline.Add(-time.Until(deadline)/3))
}

func text(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}
