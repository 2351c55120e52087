// Package sandbox is the vocabulary that the webhook and the agent share: what is asked about a pod, what was found on
// its node, and what follows from that. Its types, as JSON, are also what goes over the wire between the two.
package sandbox

import (
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"time"
	"unicode"
)

// Verdict says whether a pod still has anything on its node. The zero value is no verdict and decides nothing.
type Verdict string

const (
	// Released means: every probe ran and found nothing.
	Released Verdict = "released"
	// Bound means: at least one finding.
	Bound Verdict = "bound"
	// Unknown means: nothing was found, but a probe could not run. Never to be read as Released.
	Unknown Verdict = "unknown"
	// NotAsked means: the removal is exempt, and no agent was asked.
	NotAsked Verdict = "not-asked"
)

// Query asks the agent of one node about one pod. The UID decides; namespace and name are for messages, because a pod
// of the same name may have taken its place.
type Query struct {
	Node      string       `json:"node"`
	Namespace string       `json:"namespace"`
	Name      string       `json:"name"`
	UID       string       `json:"uid"`
	IPs       []netip.Addr `json:"ips,omitempty"`
}

// maxIDLength bounds what a query may name; Kubernetes allows no name above 253 characters.
const maxIDLength = 253

// Validate returns an error that names the first field that cannot be asked about.
func (q Query) Validate() error {
	for _, field := range []struct{ name, value string }{
		{"node", q.Node}, {"namespace", q.Namespace}, {"name", q.Name}, {"uid", q.UID},
	} {
		switch {
		case field.value == "":
			return fmt.Errorf("field %q is empty", field.name)
		case len(field.value) > maxIDLength:
			return fmt.Errorf("field %q has %d characters, at most %d are allowed", field.name, len(field.value), maxIDLength)
		}
	}
	if err := ValidateUID(q.UID); err != nil {
		return fmt.Errorf("field \"uid\": %w", err)
	}
	if len(q.IPs) > maxAddresses {
		return fmt.Errorf("field \"ips\" has %d addresses, at most %d are allowed", len(q.IPs), maxAddresses)
	}
	if slices.ContainsFunc(q.IPs, func(ip netip.Addr) bool { return !ip.IsValid() }) {
		return errors.New("field \"ips\" has an empty address")
	}
	return nil
}

// podUID is what the UIDs of pods look like: those of the API server (k8s.io/apimachinery pkg/util/uuid), and those that a kubelet
// gives to static pods (pkg/kubelet/config, applyDefaults: an MD5 sum).
var podUID = regexp.MustCompile(`^([0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}|[0-9a-f]{32})$`)

// ValidateUID returns an error for what is not the whole UID of a pod. No cgroup and no sandbox has a part of one, so that nothing
// would seem to be left.
func ValidateUID(uid string) error {
	if !podUID.MatchString(uid) {
		return fmt.Errorf("%.80q is not the UID of a pod", uid)
	}
	return nil
}

// maxAddresses bounds the addresses of one pod; Kubernetes has one for each IP family.
const maxAddresses = 16

// Kind says what a finding is about.
type Kind string

const (
	// ProcessAlive means: a process, or a thread of one, is not dead that is in the pod's cgroup, or in a network namespace
	// of the pod.
	ProcessAlive Kind = "ProcessAlive"
	// ContainerRunning means: the runtime says a container of the pod runs.
	ContainerRunning Kind = "ContainerRunning"
	// SandboxReady means: the runtime says a sandbox of the pod is ready.
	SandboxReady Kind = "SandboxReady"
	// IPAssigned means: an interface in a network namespace of the pod has one of the pod's addresses.
	IPAssigned Kind = "IPAssigned"
	// NetnsOpen means: a network namespace of the pod exists.
	NetnsOpen Kind = "NetnsOpen"
	// PeerOpen means: a device of the host that leads to one of the pod's addresses has its other end in a network namespace
	// that does not show, because no mount and no process keeps it, but an open file or a socket.
	PeerOpen Kind = "PeerOpen"
)

// Finding is one thing of the pod that is still on the node.
type Finding struct {
	Kind Kind `json:"kind"`
	// Sandbox is the runtime's ID of the sandbox: SandboxReady, ContainerRunning, and where it is known NetnsOpen and
	// IPAssigned.
	Sandbox string `json:"sandbox,omitempty"`
	// Container is the runtime's ID of the container, ContainerName its name in the pod: ContainerRunning.
	Container     string `json:"container,omitempty"`
	ContainerName string `json:"containerName,omitempty"`
	// Process: ProcessAlive.
	Process *Process `json:"process,omitempty"`
	// Netns is the path of the namespace, or net:[INODE] where it has none: NetnsOpen, IPAssigned.
	Netns string `json:"netns,omitempty"`
	// IP and Interface: IPAssigned, and PeerOpen, with the host's device.
	IP        netip.Addr `json:"ip,omitzero"`
	Interface string     `json:"interface,omitempty"`
}

// Process is a live process as /proc shows it. Where a thread of it is in state D, state and wait channel are that
// thread's: the leader of a killed process is a zombie as long as one of its threads cannot die.
type Process struct {
	PID     int    `json:"pid"`
	Command string `json:"command"`
	// State is the letter of /proc/PID/stat: R, S, D, T, t, …
	State string `json:"state"`
	// WaitChannel is the kernel function it sleeps in (/proc/PID/wchan); empty when it does not sleep or when the kernel
	// does not tell.
	WaitChannel string `json:"waitChannel,omitempty"`
	// Stack is the kernel functions that it sleeps in, innermost first (/proc/PID/stack): of a process in state D, where the
	// kernel tells.
	Stack   []string  `json:"stack,omitempty"`
	Started time.Time `json:"started,omitzero"`
	// Frozen says that its cgroup keeps it from running: thawed, it goes on. Most of them are in state D too.
	Frozen bool `json:"frozen,omitempty"`
	// Outside says that it is in none of the pod's cgroups, only in a network namespace of the pod.
	Outside bool `json:"outsideCgroup,omitempty"`
}

// Uninterruptible says whether no signal can end the process.
func (p Process) Uninterruptible() bool { return p.State == "D" }

// ProbeName names one of the agent's ways to look.
type ProbeName string

const (
	// ProbeRuntime asks the container runtime over CRI.
	ProbeRuntime ProbeName = "runtime"
	// ProbeCgroups lists the processes in the pod's cgroups.
	ProbeCgroups ProbeName = "cgroups"
	// ProbeProcesses reads in /proc which processes there are, in which network namespaces, and what they do.
	ProbeProcesses ProbeName = "processes"
	// ProbeNetns looks into every network namespace of the node.
	ProbeNetns ProbeName = "netns"
)

// Required lists the probes that must have run before a pod counts as released.
var Required = []ProbeName{ProbeRuntime, ProbeCgroups, ProbeProcesses, ProbeNetns}

// Probe tells whether one of the agent's probes ran.
type Probe struct {
	Name ProbeName `json:"name"`
	// Error says why the probe could not run, or could not finish; empty when it ran.
	Error string `json:"error,omitempty"`
}

// Report is the evidence about one pod on one node.
type Report struct {
	// Node is the node that was looked at.
	Node string `json:"node"`
	// UID is the pod that was asked about.
	UID      string    `json:"uid"`
	Probes   []Probe   `json:"probes"`
	Findings []Finding `json:"findings,omitempty"`
	// What follows explains, and decides nothing.

	// Sandboxes are the runtime's records of the pod, also of sandboxes that have ended.
	Sandboxes []Sandbox `json:"sandboxes,omitempty"`
	// Conflicts are other pods that have one of the pod's addresses.
	Conflicts []Conflict `json:"conflicts,omitempty"`
	// Routes are the host's routes and rules for the pod's addresses.
	Routes []string `json:"routes,omitempty"`
}

// Pod names a pod. Namespace and name are empty where only the kernel knows of it.
type Pod struct {
	Namespace string `json:"namespace,omitempty"`
	Name      string `json:"name,omitempty"`
	UID       string `json:"uid"`
}

func (p Pod) String() string {
	if p.Name == "" {
		return "with UID " + p.UID
	}
	return p.Namespace + "/" + p.Name + " (UID " + p.UID + ")"
}

// Sandbox is a container runtime's record of a sandbox.
type Sandbox struct {
	ID    string `json:"id"`
	Ready bool   `json:"ready"`
	// PID is that of its own process; 0 where the runtime does not tell, or there is none any more.
	PID int `json:"pid,omitempty"`
	// Netns is the path of its network namespace; empty when that is the host's.
	Netns  string       `json:"netns,omitempty"`
	IPs    []netip.Addr `json:"ips,omitempty"`
	Cgroup string       `json:"cgroup,omitempty"`
}

// Conflict is an address of the pod that another pod has in a network namespace of its own.
type Conflict struct {
	IP    netip.Addr `json:"ip"`
	Netns string     `json:"netns"`
	Pod   Pod        `json:"pod"`
}

func (c Conflict) String() string {
	return fmt.Sprintf("address %s is also in network namespace %s of pod %s", c.IP, c.Netns, c.Pod)
}

// Verdict judges the evidence: any finding binds, whatever else failed; no finding releases only when every required
// probe ran. The zero Report is Unknown.
func (r Report) Verdict() Verdict {
	if len(r.Findings) > 0 {
		return Bound
	}
	for _, name := range Required {
		if !slices.ContainsFunc(r.Probes, func(p Probe) bool { return p.Name == name && p.Error == "" }) {
			return Unknown
		}
	}
	return Released
}

// Failures lists, in words, why the required probes that did not run did not.
func (r Report) Failures() []string {
	var failures []string
	for _, name := range Required {
		i := slices.IndexFunc(r.Probes, func(p Probe) bool { return p.Name == name })
		switch {
		case i < 0:
			failures = append(failures, fmt.Sprintf("the probe %q is missing from the agent's answer", name))
		case r.Probes[i].Error != "":
			failures = append(failures, fmt.Sprintf("the probe %q did not run: %s", name, r.Probes[i].Error))
		}
	}
	return failures
}

// Sort orders findings by what matters most to somebody who has to act: a process that cannot be killed, then what the
// runtime calls running, then any other process (the sandbox's own among them), and the namespace last.
func (r *Report) Sort() {
	slices.SortStableFunc(r.Findings, func(a, b Finding) int { return a.rank() - b.rank() })
}

func (f Finding) rank() int {
	switch {
	case f.Kind == ProcessAlive && f.Process != nil && f.Process.Uninterruptible():
		return 0
	case f.Kind == ContainerRunning:
		return 1
	case f.Kind == ProcessAlive:
		return 2
	case f.Kind == SandboxReady:
		return 3
	case f.Kind == IPAssigned, f.Kind == PeerOpen:
		return 4
	default:
		return 5
	}
}

// String says the finding in plain words. The same evidence gives the same words: no ages, no times.
func (f Finding) String() string {
	switch f.Kind {
	case ProcessAlive:
		if f.Process == nil {
			return "a process is alive"
		}
		return "process " + f.Process.String()
	case ContainerRunning:
		return fmt.Sprintf("container %s (%s) is running", f.ContainerName, ShortID(f.Container))
	case SandboxReady:
		return fmt.Sprintf("sandbox %s is ready", ShortID(f.Sandbox))
	case IPAssigned:
		return fmt.Sprintf("address %s is on %s in network namespace %s", f.IP, f.Interface, f.Netns)
	case NetnsOpen:
		return fmt.Sprintf("network namespace %s is open", f.Netns)
	case PeerOpen:
		return fmt.Sprintf("the other end of the host's device %s, which leads to %s, is in a network namespace that does not show", f.Interface, f.IP)
	default:
		return string(f.Kind)
	}
}

func (p Process) String() string {
	text := fmt.Sprintf("%d (%s)", p.PID, printable(p.Command))
	if p.Outside {
		text += ", in the pod's network namespace but not in its cgroup,"
	}
	switch {
	case p.Frozen:
		return text + fmt.Sprintf(" is frozen by its cgroup (state %s)", p.State) // where it was at that moment does not matter
	case p.Uninterruptible():
		text += " is in state D (uninterruptible sleep)"
	default:
		text += " is in state " + p.State
	}
	if p.WaitChannel != "" {
		text += " in " + p.WaitChannel
	}
	return text
}

// printable replaces what would break a line or steer a terminal: a process chooses its own name.
func printable(text string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return '?'
	}, text)
}

// ShortID shortens a runtime's ID to the 13 characters that crictl prints.
func ShortID(id string) string { return id[:min(len(id), 13)] }
