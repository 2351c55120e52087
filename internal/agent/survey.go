package agent

import (
	"context"
	"errors"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"sync"

	"github.com/eni-guard/eni-guard/internal/sandbox"
)

// survey is what the probes see of the whole node.
type survey struct {
	records podRecords
	members map[string][]int // processes in the cgroups of pods, by UID
	view    nodeView
	probes  []sandbox.Probe
}

// failures say why probes did not run; without any, there is no more than was seen.
func (s survey) failures() []string { return sandbox.Report{Probes: s.probes}.Failures() }

// runtimeAnswered says whether the runtime's records are complete.
func (s survey) runtimeAnswered() bool {
	return slices.Contains(s.probes, sandbox.Probe{Name: sandbox.ProbeRuntime})
}

// Trace is what the node has of one pod, or, without a pod, a network namespace that is nobody's.
type Trace struct {
	Pod sandbox.Pod `json:"pod,omitzero"`
	// Leftover says why it should not be there; empty if it may.
	Leftover  string            `json:"leftover,omitempty"`
	Findings  []sandbox.Finding `json:"findings"`
	Sandboxes []sandbox.Sandbox `json:"sandboxes,omitempty"`
	// addresses are those in its namespaces, and given those of them that a pod was given.
	addresses, given []netip.Addr
	// key tells the trace from others for as long as it lasts.
	key string
	// static says that it is of a static pod.
	static bool
	// Of a namespace that is nobody's, madeByARuntime says that it is mounted with a name as runtimes give, and unmounted that only processes
	// keep it.
	madeByARuntime, unmounted bool
	// places are its namespaces with an address each: what has the same inode and the same address at the next look is the same namespace.
	places []place
}

// place is an address in a network namespace.
type place struct {
	netns string // net:[INODE]
	ip    netip.Addr
}

// SharedAddress is an address given to a pod that several network namespaces have.
type SharedAddress struct {
	IP      netip.Addr `json:"ip"`
	Holders []Trace    `json:"holders"`
}

// survey looks at the whole node.
func (i *Inspector) survey(ctx context.Context) survey {
	var s survey
	var runtimeErr, cgroupsErr, processErr, netnsErr error
	var probes sync.WaitGroup
	probes.Go(func() {
		s.records, runtimeErr = run(ctx, i.slots[sandbox.ProbeRuntime], i.runtime.all)
	})
	probes.Go(func() {
		s.members, cgroupsErr = run(ctx, i.slots[sandbox.ProbeCgroups], i.host.allMembers)
	})
	probes.Go(func() { s.view, processErr, netnsErr = i.view(ctx, thorough) })
	probes.Wait()
	s.probes = []sandbox.Probe{
		{Name: sandbox.ProbeRuntime, Error: text(runtimeErr)},
		{Name: sandbox.ProbeCgroups, Error: text(cgroupsErr)},
		{Name: sandbox.ProbeProcesses, Error: text(processErr)},
		{Name: sandbox.ProbeNetns, Error: text(netnsErr)},
	}
	return s
}

// podDevice matches the names of devices that CNI plugins make in pods: eth0 is the name that runtimes ask for, and further ones are called so
// by Terway, or net1 by Multus.
var podDevice = regexp.MustCompile(`^(eth|net)[0-9]+$`)

// traces puts together what was seen of each pod that has a network namespace of its own, and of each namespace that is
// nobody's. A pod on the host's network has no address to lose, and is left out.
func (s survey) traces() []Trace {
	byUID := map[string]*Trace{}
	of := func(pod sandbox.Pod) *Trace {
		if byUID[pod.UID] == nil {
			byUID[pod.UID] = &Trace{Pod: pod, key: pod.UID}
		}
		return byUID[pod.UID]
	}
	ips := map[string][]netip.Addr{}   // that the runtime tells, by UID
	owners := map[string]sandbox.Pod{} // by path of the namespace
	sandboxOf := map[string]string{}
	recorded := map[string]bool{} // by UID
	for _, r := range s.records.sandboxes {
		recorded[r.pod.UID] = true
		if r.netnsPath == "" {
			continue
		}
		owners[r.netnsPath], sandboxOf[r.netnsPath] = r.pod, r.id
		ips[r.pod.UID] = append(ips[r.pod.UID], r.ips...)
		t := of(r.pod)
		t.static = t.static || r.static
		t.Sandboxes = append(t.Sandboxes, record(r))
		if r.ready {
			t.Findings = append(t.Findings, sandbox.Finding{Kind: sandbox.SandboxReady, Sandbox: r.id})
		}
		for _, c := range s.records.containers {
			if c.sandboxID == r.id {
				t.Findings = append(t.Findings, sandbox.Finding{Kind: sandbox.ContainerRunning, Sandbox: r.id, Container: c.id, ContainerName: c.name})
			}
		}
	}
	podOf := map[int]string{}
	for uid, pids := range s.members {
		for _, pid := range pids {
			podOf[pid] = uid
		}
	}
	var nobodys []Trace
	cgroupsRead := slices.Contains(s.probes, sandbox.Probe{Name: sandbox.ProbeCgroups})
	for _, n := range s.view.namespaces {
		id := ""
		// That of the cgroup of what is in it, unless the runtime has a sandbox for it. A pod whose sandbox is recorded, which is
		// another one then, may only have come to look.
		var pod sandbox.Pod
		for _, task := range n.tasks {
			if uid := podOf[task.pid]; uid != "" && (pod.UID == "" || recorded[pod.UID] && !recorded[uid]) {
				pod.UID = uid
			}
		}
		for _, path := range n.paths {
			if owner, ok := owners[path]; ok {
				pod, id = owner, sandboxOf[path]
			}
		}
		var t *Trace
		if pod.UID == "" {
			// With its path: the kernel gives the inode of a namespace that has ended to the next one.
			nobodys = append(nobodys, Trace{key: n.id + " " + n.name(), madeByARuntime: n.madeByARuntime(), unmounted: len(n.paths) == 0})
			t = &nobodys[len(nobodys)-1]
		} else {
			t = of(pod)
		}
		t.Findings = append(t.Findings, sandbox.Finding{Kind: sandbox.NetnsOpen, Sandbox: id, Netns: n.name()})
		for _, a := range n.addresses {
			t.addresses = append(t.addresses, a.ip)
			// A pod's other devices, docker0 say, and other namespaces that only its processes are in, are networks of its own, of containers
			// in its containers: often with the same addresses in every pod.
			if (id != "" || n.madeByARuntime()) && podDevice.MatchString(a.device) || slices.Contains(ips[pod.UID], a.ip) {
				t.given = append(t.given, a.ip)
			}
			t.places = append(t.places, place{n.id, a.ip})
			t.Findings = append(t.Findings, sandbox.Finding{Kind: sandbox.IPAssigned, Sandbox: id, Netns: n.name(), IP: a.ip, Interface: a.device})
		}
		for _, task := range n.tasks {
			outside := cgroupsRead && !slices.Contains(s.members[pod.UID], task.pid)
			// Described when it is told: most traces never are.
			t.Findings = append(t.Findings, sandbox.Finding{Kind: sandbox.ProcessAlive, Netns: n.name(), Process: &sandbox.Process{PID: task.pid, Outside: outside && pod.UID != ""}})
		}
	}
	for _, t := range byUID {
		nobodys = append(nobodys, *t)
	}
	slices.SortFunc(nobodys, func(a, b Trace) int { return strings.Compare(a.key, b.key) })
	return nobodys
}

// Why a trace is a leftover.
const (
	leftoverOfGonePod  = "the API server does not have its pod"
	leftoverNoSandbox  = "the runtime has no sandbox for it"
	leftoverOfNobody   = "no sandbox is recorded for this network namespace, unless one is just being made"
	leftoverOfTasks    = "only processes keep this network namespace, which was the pod's"
	leftoverOtherOwner = "no pod has this network namespace, but one has the same address"
)

// leftovers returns those of the traces that should not be there, and says why. known says whether the API server has a pod of
// this UID; it is nil where that cannot be asked, and then only what the runtime has no sandbox for is told. What only the
// runtime could have given to a pod is no leftover where the runtime did not answer.
func leftovers(traces []Trace, runtimeAnswered bool, known func(uid string) bool) []Trace {
	podAddresses := map[netip.Addr]bool{}
	for _, t := range traces {
		for _, ip := range t.addresses {
			podAddresses[ip] = podAddresses[ip] || t.Pod.UID != "" && slices.Contains(t.given, ip)
		}
	}
	var found []Trace
	for _, t := range traces {
		switch {
		case len(t.Findings) == 0 || t.static:
			continue
		case t.Pod.UID != "" && t.unmounted: // recalled
			t.Leftover = leftoverOfTasks
		case t.Pod.UID == "" && !runtimeAnswered:
			continue
		case t.Pod.UID == "" && t.madeByARuntime:
			t.Leftover = leftoverOfNobody
		case t.Pod.UID == "" && slices.ContainsFunc(t.addresses, func(ip netip.Addr) bool { return podAddresses[ip] }):
			t.Leftover = leftoverOtherOwner
		case t.Pod.UID == "":
			continue // of something that is not Kubernetes
		case known != nil && !known(t.Pod.UID):
			t.Leftover = leftoverOfGonePod
		case known == nil && len(t.Sandboxes) == 0 && runtimeAnswered:
			t.Leftover = leftoverNoSandbox
		default:
			continue
		}
		found = append(found, t)
	}
	return found
}

// timesInUse is in how many network namespaces the traces that have an address have it.
func timesInUse(holders []Trace, ip netip.Addr) int {
	n := 0
	for _, t := range holders {
		in := map[string]bool{}
		for _, p := range t.places {
			if p.ip == ip {
				in[p.netns] = true
			}
		}
		n += max(1, len(in)) // one with no place is the host's own, or one that only an open peer tells of
	}
	return n
}

// conflict says whether several network namespaces have an address that was given to a pod, by the traces that have it.
func conflict(holders []Trace, ip netip.Addr) bool {
	return timesInUse(holders, ip) > 1 && slices.ContainsFunc(holders, func(t Trace) bool { return slices.Contains(t.given, ip) })
}

// sharedAddresses returns the addresses that more than one network namespace has, if they were given to a pod.
func sharedAddresses(traces []Trace) []SharedAddress {
	holders := map[netip.Addr][]Trace{}
	for _, t := range traces {
		ips := slices.Clone(t.addresses)
		slices.SortFunc(ips, netip.Addr.Compare)
		for _, ip := range slices.Compact(ips) {
			holders[ip] = append(holders[ip], t)
		}
	}
	var shared []SharedAddress
	for ip, by := range holders {
		if conflict(by, ip) {
			shared = append(shared, SharedAddress{ip, by})
		}
	}
	slices.SortFunc(shared, func(a, b SharedAddress) int { return a.IP.Compare(b.IP) })
	return shared
}

// described returns a trace with what its processes do. A process that has ended is left out, and so is one that has left the
// namespace: it had only come to look.
func (i *Inspector) described(ctx context.Context, s survey, t Trace) (Trace, error) {
	var described sandbox.Report
	var errs []error
	for _, f := range t.Findings {
		if f.Kind != sandbox.ProcessAlive {
			described.Findings = append(described.Findings, f)
			continue
		}
		for _, n := range s.view.namespaces {
			at := slices.IndexFunc(n.tasks, func(t task) bool { return t.pid == f.Process.PID })
			if n.name() != f.Netns || at < 0 {
				continue
			}
			found, err := i.describe(ctx, n.tasks[at:at+1])
			errs = append(errs, err)
			for _, p := range found {
				if p.netns == n.id {
					p.Outside = f.Process.Outside
					f.Process = &p.Process
					described.Findings = append(described.Findings, f)
				}
			}
		}
	}
	described.Sort()
	t.Findings = described.Findings
	return t, errors.Join(errs...)
}
