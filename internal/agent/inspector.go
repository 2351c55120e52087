// Package agent is the node side of eni-guard: it tells what of a pod is still on its node.
//
// Four probes look: the runtime (runtime.go), the pod's cgroups (cgroups.go), the processes of the node (processes.go), and
// the network namespaces of the node (netns.go) with the host's ways to their addresses (routes.go). What they have seen is
// put together by pure functions (evidence.go).
package agent

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/eni-guard/eni-guard/internal/sandbox"
)

const (
	// viewTimeout is how long one look at all namespaces may take.
	viewTimeout = 10 * time.Second
	// maxFindings bounds a report. The most telling findings come first, and any one of them decides.
	maxFindings = 1000
)

// Inspector looks at one node.
type Inspector struct {
	node    string
	host    Host
	runtime records
	slots   map[sandbox.ProbeName]*slots
	views   [2]shared[viewed] // by depth
}

// records is what the inspector needs of a container runtime.
type records interface {
	pod(ctx context.Context, uid string) (podRecords, error)
	all(ctx context.Context) (podRecords, error)
	events(ctx context.Context) <-chan struct{}
}

// NewInspector returns an inspector of the node that is called node.
func NewInspector(node string, host Host, runtime *Runtime) *Inspector {
	return newInspector(node, host, runtime)
}

func newInspector(node string, host Host, runtime records) *Inspector {
	i := &Inspector{node: node, host: host, runtime: runtime, slots: map[sandbox.ProbeName]*slots{}}
	for _, name := range sandbox.Required {
		i.slots[name] = newSlots(name)
	}
	return i
}

// Inspect looks for a pod until the deadline of ctx: where it usually is, and, if it is not found there, everywhere. It always
// returns a report: a probe that fails, or does not come back in time, is reported as not run.
func (i *Inspector) Inspect(ctx context.Context, query sandbox.Query) sandbox.Report {
	first, cancel := part(ctx, 1, 3)
	defer cancel()
	if report := i.look(first, query, quick); report.Verdict() == sandbox.Bound {
		return report
	}
	return i.look(ctx, query, thorough)
}

// look runs all probes.
func (i *Inspector) look(ctx context.Context, query sandbox.Query, how depth) sandbox.Report {
	e := evidence{how: how}
	// What is asked last, by what the others found, must have time left when one of those hangs.
	first, cancel := part(ctx, 2, 3)
	defer cancel()
	var probes sync.WaitGroup
	var pathsErr error
	probes.Go(func() {
		e.records, e.runtimeErr = run(first, i.slots[sandbox.ProbeRuntime], func(ctx context.Context) (podRecords, error) {
			return i.runtime.pod(ctx, query.UID)
		})
		e.paths, pathsErr = run(ctx, i.slots[sandbox.ProbeNetns], func(context.Context) (hostPaths, error) { return i.host.paths(e.addresses(query)) })
	})
	probes.Go(func() {
		e.members, e.cgroupsErr = run(first, i.slots[sandbox.ProbeCgroups], func(ctx context.Context) (podMembers, error) {
			return i.host.members(ctx, query.UID, how)
		})
		e.processes, e.processErr = i.describe(ctx, leaders(e.members.pids))
		i.lookAgain(ctx, &e)
	})
	var processErr, netnsErr error
	probes.Go(func() { e.view, processErr, netnsErr = i.view(first, how) })
	probes.Wait()
	e.processErr = errors.Join(processErr, e.processErr)
	e.netnsErr = errors.Join(netnsErr, pathsErr)

	var err error
	e.view.namespaces, err = i.withProcesses(ctx, e)
	e.netnsErr = errors.Join(e.netnsErr, err)
	sandboxes := map[string]podSandbox{}
	for _, s := range e.records.sandboxes {
		id, err := i.host.sandboxNamespace(e.view, s)
		e.netnsErr = errors.Join(e.netnsErr, err)
		if id != "" {
			sandboxes[id] = s
		}
	}
	// Most nodes have none: each namespace is recorded for the sandbox of its pod.
	if e.runtimeErr == nil && e.ownersMatter(query, sandboxes) {
		var all podRecords
		all, err = run(ctx, i.slots[sandbox.ProbeRuntime], i.runtime.all)
		for _, s := range e.takeOthers(query.UID, all) {
			id, err := i.host.sandboxNamespace(e.view, s)
			e.netnsErr = errors.Join(e.netnsErr, err)
			if id != "" {
				sandboxes[id] = s
			}
		}
		e.runtimeErr = err
	}
	c := e.claims(query, sandboxes)
	var strangers []podProcess
	for id, tasks := range e.strangers(c) {
		found, err := i.describe(ctx, tasks)
		e.processErr = errors.Join(e.processErr, err)
		for _, p := range found {
			if p.netns == id { // whoever has only come to look has left by now
				strangers = append(strangers, p)
			}
		}
	}
	report := judge(query, e, c, strangers)
	report.Node = i.node
	return report
}

// viewed is what one look at all namespaces has given, and what kept it from being complete: in listing the processes, and
// in looking into the namespaces.
type viewed struct {
	nodeView
	processErr, netnsErr error
}

// view looks at all network namespaces of the node. Questions at the same time share a look.
func (i *Inspector) view(ctx context.Context, how depth) (v nodeView, processErr, netnsErr error) {
	seen, err := i.views[how].do(ctx, func(ctx context.Context) (seen viewed) {
		ctx, cancel := context.WithTimeout(ctx, viewTimeout)
		defer cancel()
		defer onThread(ctx, sandbox.ProbeNetns)()
		seen.nodeView, seen.processErr, seen.netnsErr = i.host.view(ctx, how)
		return seen
	})
	if err != nil {
		return nodeView{}, err, err
	}
	return seen.nodeView, seen.processErr, seen.netnsErr
}

// withProcesses returns the namespaces of the view, and those that the pod's processes are in and that it does not have: which a
// quick look leaves out, or which came after it.
func (i *Inspector) withProcesses(ctx context.Context, e evidence) ([]netNamespace, error) {
	var missing []netNamespace
	for _, p := range e.processes {
		_, seen := e.view.namespace(p.netns)
		added := slices.ContainsFunc(missing, func(n netNamespace) bool { return n.id == p.netns })
		if p.netns != "" && e.view.host != "" && p.netns != e.view.host && !seen && !added {
			missing = append(missing, netNamespace{id: p.netns, tasks: leaders([]int{p.PID})})
		}
	}
	if len(missing) == 0 {
		return e.view.namespaces, nil
	}
	read, err := run(ctx, i.slots[sandbox.ProbeNetns], func(ctx context.Context) ([]netNamespace, error) {
		return missing, i.host.readAddresses(ctx, missing)
	})
	// One that has ended meanwhile is there for judge by its process.
	read = slices.DeleteFunc(read, func(n netNamespace) bool { return gone(n.unread) })
	for _, n := range read {
		if n.unread != nil {
			err = errors.Join(err, fmt.Errorf("reading the addresses in network namespace %s: %w", n.name(), n.unread))
		}
	}
	return slices.Concat(e.view.namespaces, read), err
}

func (i *Inspector) describe(ctx context.Context, tasks []task) ([]podProcess, error) {
	return run(ctx, i.slots[sandbox.ProbeProcesses], func(ctx context.Context) ([]podProcess, error) { return i.host.describe(ctx, tasks) })
}

// lookAgain reads the pod's cgroups once more after its processes. What is no longer there has ended in between, and what
// was described may be another process that was given its number (one that has only moved is found by its network namespace);
// what has come is described too.
func (i *Inspector) lookAgain(ctx context.Context, e *evidence) {
	if len(e.members.pids) == 0 {
		return
	}
	now, err := run(ctx, i.slots[sandbox.ProbeCgroups], func(ctx context.Context) ([]int, error) { return cgroupPIDs(ctx, e.members.groups) })
	if err != nil {
		e.cgroupsErr = errors.Join(e.cgroupsErr, err)
		return
	}
	e.processes = slices.DeleteFunc(e.processes, func(p podProcess) bool { return !slices.Contains(now, p.PID) })
	come := slices.DeleteFunc(slices.Clone(now), func(pid int) bool { return slices.Contains(e.members.pids, pid) })
	described, err := i.describe(ctx, leaders(come))
	e.processes = append(e.processes, described...)
	e.processErr = errors.Join(e.processErr, err)
	e.members.pids = now
	if len(now) > 0 && len(e.processes) == 0 && e.processErr == nil {
		e.processErr = errors.New("the pod's processes end before they can be looked at, and may leave others")
	}
}

// part returns a context that ends when a part of the time of ctx has passed.
func part(ctx context.Context, some, of time.Duration) (context.Context, context.CancelFunc) {
	deadline, limited := ctx.Deadline()
	if !limited {
		return context.WithCancel(ctx)
	}
	return context.WithDeadline(ctx, deadline.Add(-time.Until(deadline)*(of-some)/of))
}
