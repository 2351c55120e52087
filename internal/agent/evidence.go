package agent

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/eni-guard/eni-guard/internal/sandbox"
)

// evidence is what the probes have seen that tells something about one pod. Each part stands beside the error that kept it
// from being complete.
type evidence struct {
	records    podRecords
	runtimeErr error
	members    podMembers
	cgroupsErr error
	// processes are the members that are alive.
	processes  []podProcess
	processErr error
	view       nodeView
	netnsErr   error
	paths      hostPaths
	how        depth
	// others are the sandboxes of all pods, where a namespace had to be given to its pod by the runtime.
	others []podSandbox
}

// claim is a network namespace that matters to a pod.
type claim struct {
	netNamespace
	// sandbox is the runtime's ID of the pod's sandbox that it belongs to; empty when it does not come from one.
	sandbox string
	// holds are the addresses of the pod that are in it.
	holds []assignment
}

// claims are the namespaces of the node, as far as they matter to a pod.
type claims struct {
	// own are the pod's: those of its sandboxes, those that its processes are in, and those that have an address of it and are
	// no other pod's.
	own []claim
	// taken are other pods' that have an address of it.
	taken []claim
	// unclaimed names one that is made by a runtime, and no sandbox is recorded for it. A sandbox in the making has one; there may be a process
	// in it already, that of a CNI plugin.
	unclaimed string
}

// addresses are those that the pod has, by the question and by the runtime.
func (e evidence) addresses(query sandbox.Query) []netip.Addr {
	ips := slices.Clone(query.IPs)
	for _, s := range e.records.sandboxes {
		ips = append(ips, s.ips...)
	}
	for i := range ips {
		ips[i] = ips[i].Unmap()
	}
	slices.SortFunc(ips, netip.Addr.Compare)
	return slices.Compact(ips)
}

// owner returns the pod whose sandbox is recorded for a namespace. That a process of a pod is in it says nothing: somebody may
// have entered it to look.
func (e evidence) owner(n netNamespace) (sandbox.Pod, bool) {
	for _, s := range slices.Concat(e.records.sandboxes, e.others) {
		if s.netnsPath != "" && slices.Contains(n.paths, s.netnsPath) {
			return s.pod, true
		}
	}
	return sandbox.Pod{}, false
}

// takeOthers takes over the sandboxes of all pods. Those of the pod itself that were recorded after it was asked for are its own,
// and returned.
func (e *evidence) takeOthers(uid string, all podRecords) []podSandbox {
	var late []podSandbox
	for _, s := range all.sandboxes {
		switch {
		case s.pod.UID != uid:
			e.others = append(e.others, s)
		case !slices.ContainsFunc(e.records.sandboxes, func(known podSandbox) bool { return known.id == s.id }):
			late = append(late, s)
		}
	}
	e.records.sandboxes = append(e.records.sandboxes, late...)
	for _, c := range all.containers {
		if slices.ContainsFunc(late, func(s podSandbox) bool { return s.id == c.sandboxID }) {
			e.records.containers = append(e.records.containers, c)
		}
	}
	return late
}

// ownersMatter says whether the sandboxes of all pods must be known to tell whose a namespace is: one that has an address of the
// pod and is not its own by its sandbox; or, where nothing else of the pod was found, one that a sandbox of it in the making may
// have.
func (e evidence) ownersMatter(query sandbox.Query, sandboxes map[string]podSandbox) bool {
	ips := e.addresses(query)
	nothing := len(sandboxes) == 0 && len(e.processes) == 0 && len(e.records.containers) == 0
	return slices.ContainsFunc(e.view.namespaces, func(n netNamespace) bool {
		if _, recorded := sandboxes[n.id]; recorded {
			return false
		}
		return slices.ContainsFunc(ips, func(ip netip.Addr) bool { _, has := n.address(ip); return has }) ||
			nothing && e.members.exist && n.madeByARuntime()
	})
}

// claims finds out which namespaces matter to the pod that the question is about. The sandboxes are those of it, by id of
// their namespace.
func (e evidence) claims(query sandbox.Query, sandboxes map[string]podSandbox) claims {
	ips := e.addresses(query)
	var c claims
	for _, n := range e.view.namespaces {
		found := claim{netNamespace: n}
		for _, ip := range ips {
			if a, ok := n.address(ip); ok {
				found.holds = append(found.holds, a)
			}
		}
		if len(ips) == 0 {
			found.holds = n.addresses // nobody has said which are the pod's: all that are in a namespace of its own
		}
		s, recorded := sandboxes[n.id]
		inIt := slices.ContainsFunc(e.processes, func(p podProcess) bool { return p.netns == n.id })
		_, owned := e.owner(n)
		switch {
		case recorded || inIt || len(ips) > 0 && len(found.holds) > 0 && !owned:
			found.sandbox = s.id
			c.own = append(c.own, found)
		case len(ips) > 0 && len(found.holds) > 0:
			c.taken = append(c.taken, found)
		case !owned && n.madeByARuntime():
			c.unclaimed = cmp.Or(c.unclaimed, n.name())
		}
	}
	// What came into being after the namespaces were looked at is there all the same.
	add := func(id string, found claim) {
		if !slices.ContainsFunc(c.own, func(n claim) bool { return n.id == id }) {
			found.id = id
			c.own = append(c.own, found)
		}
	}
	for id, s := range sandboxes {
		add(id, claim{sandbox: s.id})
	}
	for _, p := range e.processes {
		if p.netns != "" && e.view.host != "" && p.netns != e.view.host {
			add(p.netns, claim{})
		}
	}
	return c
}

// strangers are what is in the pod's namespaces, but in none of its cgroups, by id of the namespace.
func (e evidence) strangers(c claims) map[string][]task {
	found := map[string][]task{}
	for _, n := range c.own {
		for _, t := range n.tasks {
			if !slices.Contains(e.members.pids, t.pid) {
				found[n.id] = append(found[n.id], t)
			}
		}
	}
	return found
}

// judge says what the evidence shows of a pod: a pure function. Any finding binds, whatever else failed; and no finding
// releases only when every probe ran (sandbox.Report.Verdict). strangers are those of evidence.strangers that are alive
// and still there.
func judge(query sandbox.Query, e evidence, c claims, strangers []podProcess) sandbox.Report {
	report := sandbox.Report{UID: query.UID}
	for _, p := range e.processes {
		report.Findings = append(report.Findings, sandbox.Finding{Kind: sandbox.ProcessAlive, Process: &p.Process})
	}
	for _, p := range strangers {
		p.Outside = e.cgroupsErr == nil // only who has read the cgroups knows
		report.Findings = append(report.Findings, sandbox.Finding{Kind: sandbox.ProcessAlive, Process: &p.Process, Netns: p.netns})
	}
	for _, found := range e.records.containers {
		report.Findings = append(report.Findings, sandbox.Finding{
			Kind: sandbox.ContainerRunning, Sandbox: found.sandboxID, Container: found.id, ContainerName: found.name,
		})
	}
	for _, s := range e.records.sandboxes {
		if s.ready {
			report.Findings = append(report.Findings, sandbox.Finding{Kind: sandbox.SandboxReady, Sandbox: s.id})
		}
		report.Sandboxes = append(report.Sandboxes, record(s))
	}
	for _, n := range c.own {
		report.Findings = append(report.Findings, sandbox.Finding{Kind: sandbox.NetnsOpen, Sandbox: n.sandbox, Netns: n.name()})
		for _, a := range n.holds {
			report.Findings = append(report.Findings, sandbox.Finding{
				Kind: sandbox.IPAssigned, Sandbox: n.sandbox, Netns: n.name(), IP: a.ip, Interface: a.device,
			})
		}
	}
	for _, n := range c.taken {
		for _, a := range n.holds {
			owner, _ := e.owner(n.netNamespace)
			report.Conflicts = append(report.Conflicts, sandbox.Conflict{IP: a.ip, Netns: n.name(), Pod: owner})
		}
	}
	for _, r := range e.paths.routes {
		report.Routes = append(report.Routes, r.String())
		// A quick look does not see every namespace.
		shows := e.how == quick || slices.ContainsFunc(e.view.namespaces, func(n netNamespace) bool { _, has := n.address(r.ip); return has })
		if r.peer && !shows && e.netnsErr == nil {
			report.Findings = append(report.Findings, sandbox.Finding{Kind: sandbox.PeerOpen, IP: r.ip, Interface: r.device})
		}
	}
	report.Routes = append(report.Routes, e.paths.rules...)

	netnsErr := e.netnsErr
	if netnsErr == nil && e.runtimeErr == nil && len(report.Findings) == 0 && e.members.exist && c.unclaimed != "" {
		netnsErr = fmt.Errorf("network namespace %s is nobody's, and the pod has a cgroup: a sandbox of it may be in the making", c.unclaimed)
	}
	report.Probes = []sandbox.Probe{
		{Name: sandbox.ProbeRuntime, Error: text(e.runtimeErr)},
		{Name: sandbox.ProbeCgroups, Error: text(e.cgroupsErr)},
		{Name: sandbox.ProbeProcesses, Error: text(e.processErr)},
		{Name: sandbox.ProbeNetns, Error: text(netnsErr)},
	}
	report.Sort()
	report.Findings = report.Findings[:min(len(report.Findings), maxFindings)]
	return report
}

// record is what people and programs are shown of a sandbox.
func record(s podSandbox) sandbox.Sandbox {
	shown := sandbox.Sandbox{ID: s.id, Ready: s.ready, Netns: s.netnsPath, IPs: s.ips, Cgroup: s.cgroup}
	if s.ready {
		shown.PID = s.pid // a process of an ended sandbox is another one by now
	}
	return shown
}

// text is an error on one line; what several looks have run into is told once.
func text(err error) string {
	if err == nil {
		return ""
	}
	var told []string
	for line := range strings.SplitSeq(err.Error(), "\n") {
		if !slices.Contains(told, line) {
			told = append(told, line)
		}
	}
	return strings.Join(told, "; ")
}
