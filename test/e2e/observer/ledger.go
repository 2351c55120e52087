package observer

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
)

// Ledger puts together what the API server says of pods and what the kernel shows of them. It may be used from several
// goroutines.
//
// A sandbox that has ended does not come back, so whatever of a pod is seen in a look that began after its object was gone
// was there when the object went: no lag of the watch or of the look yields a false alarm. What the lag can hide is a
// sandbox that ended between the removal and the next look, so looks are made all the time, and one at once when an object goes; and
// who makes sandboxes that get stuck lets none of them go before Judged.
type Ledger struct {
	mu       sync.Mutex
	pods     map[types.UID]*entry
	shared   map[string]Shared
	last     map[string]bool // keys of shared seen in the last look
	lookedAt time.Time
}

// entry is what is known of one pod.
type entry struct {
	pod       *corev1.Pod
	addresses map[netip.Addr]bool
	// processes are those that were seen in the pod's cgroup or, outside of every pod's, in its namespace; by that namespace.
	processes map[ProcessID]string
	// namespaces are the IDs of namespaces that are known to be the pod's, by where they are mounted.
	namespaces map[string]string

	goneAt    time.Time // zero while the object is there
	late      bool
	startedAt time.Time
	lastBound time.Time
	evidence  string
}

// Removal is a pod whose object is gone.
type Removal struct {
	// Pod is the object as it was last seen.
	Pod *corev1.Pod
	// SeenAt is when the observer has heard of it: the object was gone by then.
	SeenAt time.Time
	// Late says that it was not heard of when it happened, but found in a list after the watch was interrupted.
	Late bool
	// StartedAt is when the first process of the pod was started, and LastBound when the last look began that showed something of it;
	// zero if none did.
	StartedAt, LastBound time.Time
	// Evidence is what that look has shown.
	Evidence string
	// Judged says that a look has begun after SeenAt.
	Judged bool
}

// Key is NAMESPACE/NAME of the pod.
func (r Removal) Key() string { return r.Pod.Namespace + "/" + r.Pod.Name }

// BoundAt says whether the pod was certainly bound at a time by which its object was gone: a sandbox that has ended does not
// come back.
func (r Removal) BoundAt(gone time.Time) bool {
	return !r.LastBound.IsZero() && !r.LastBound.Before(gone)
}

// CameUpAfter says that the sandbox was started only after a time: its kubelet had not yet heard that the object goes.
func (r Removal) CameUpAfter(at time.Time) bool {
	return !r.StartedAt.IsZero() && r.StartedAt.After(at)
}

// Shared is an address that is in use by one pod while it is another's, or nobody's, in the records of those who hand out
// addresses, or while another pod's namespace has it too.
type Shared struct {
	Address netip.Addr
	// User is the pod that is bound.
	User *corev1.Pod
	// Other is whose it is as well, NAMESPACE/NAME; empty if the address counts as free.
	Other string
}

// NewLedger returns an empty ledger.
func NewLedger() *Ledger {
	return &Ledger{pods: map[types.UID]*entry{}, shared: map[string]Shared{}}
}

// Seen records the object of a pod.
func (l *Ledger) Seen(pod *corev1.Pod) {
	l.mu.Lock()
	defer l.mu.Unlock()
	e := l.pods[pod.UID]
	if e == nil {
		e = &entry{addresses: map[netip.Addr]bool{}, processes: map[ProcessID]string{}, namespaces: map[string]string{}}
		l.pods[pod.UID] = e
	}
	e.pod = pod
	for _, ip := range pod.Status.PodIPs {
		if address, err := netip.ParseAddr(ip.IP); err == nil {
			e.addresses[address] = true
		}
	}
}

// Expect records a pod that the caller has made, unless it is known: one that comes and goes while the watch is interrupted would
// not be missed otherwise.
func (l *Ledger) Expect(pod *corev1.Pod) {
	l.mu.Lock()
	_, known := l.pods[pod.UID]
	l.mu.Unlock()
	if !known {
		l.Seen(pod)
	}
}

// Gone records that an object was gone at a time, and whether that was found late.
func (l *Ledger) Gone(uid types.UID, at time.Time, late bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if e := l.pods[uid]; e != nil && e.goneAt.IsZero() {
		e.goneAt, e.late = at, late
	}
}

// Present lists the pods whose objects are there, as far as is known.
func (l *Ledger) Present() []types.UID {
	l.mu.Lock()
	defer l.mu.Unlock()
	var uids []types.UID
	for uid, e := range l.pods {
		if e.goneAt.IsZero() {
			uids = append(uids, uid)
		}
	}
	return uids
}

// Judged says whether a pod's object is gone and a look has been made since.
func (l *Ledger) Judged(uid types.UID) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	e := l.pods[uid]
	return e != nil && !e.goneAt.IsZero() && l.lookedAt.After(e.goneAt)
}

// Looked records what a look has shown. owners are the records of addresses, read before the look and after it: by
// address, NAMESPACE/NAME. They may be nil.
func (l *Ledger) Looked(sight Sight, before, after map[netip.Addr]string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lookedAt = sight.Began
	l.learn(sight)
	for uid, e := range l.pods {
		if evidence := e.bound(uid, sight); evidence != "" {
			e.lastBound, e.evidence = sight.Began, evidence
		}
	}
	l.compare(sight, before, after)
}

// learn finds out which processes and namespaces are whose. A process in a pod's cgroup leads to its namespace, and that one to
// processes that are in nobody's cgroup.
func (l *Ledger) learn(sight Sight) {
	owners := map[string]*entry{} // by the ID of a namespace
	for _, p := range sight.Processes {
		if e := l.pods[p.Pod]; e != nil {
			e.processes[p.ID] = p.Netns
			if e.startedAt.IsZero() || p.Started.Before(e.startedAt) {
				e.startedAt = p.Started
			}
			// Of the host's own namespace, none is mounted.
			if p.Netns != "" {
				owners[p.Netns] = e
			}
		}
	}
	mountedAt := map[string]Namespace{}
	for _, ns := range sight.Namespaces {
		mountedAt[ns.Path] = ns
		if e := owners[ns.ID]; e != nil && e.namespaces[ns.Path] == "" {
			e.namespaces[ns.Path] = ns.ID
		}
	}
	for _, e := range l.pods {
		for path, id := range e.namespaces {
			if ns, there := mountedAt[path]; there && ns.ID == id {
				owners[id] = e
			}
		}
	}
	for _, p := range sight.Processes {
		if e := owners[p.Netns]; e != nil && p.Pod == "" && p.Netns != "" && e.isMounted(p.Netns) {
			e.processes[p.ID] = p.Netns
		}
	}
}

// isMounted says whether a namespace by this ID was seen mounted for the pod.
func (e *entry) isMounted(id string) bool {
	for _, known := range e.namespaces {
		if known == id {
			return true
		}
	}
	return false
}

// bound says what a look shows of the pod; empty if nothing.
func (e *entry) bound(uid types.UID, sight Sight) string {
	for _, p := range sight.Processes {
		known, ours := e.processes[p.ID]
		switch {
		case p.Pod == uid:
			return fmt.Sprintf("process %d is in its cgroup", p.ID.PID)
		case ours && p.Pod == "" && known == p.Netns && e.isMounted(known):
			return fmt.Sprintf("process %d, outside of its cgroup, is in its network namespace", p.ID.PID)
		}
	}
	for _, ns := range sight.Namespaces {
		if e.namespaces[ns.Path] == ns.ID {
			for _, address := range ns.Addresses {
				if e.addresses[address] {
					return fmt.Sprintf("%s has %s", ns.Path, address)
				}
			}
		}
	}
	return ""
}

// compare looks for addresses that are two pods'. A pod's addresses are those that its kubelet has reported, so its CNI plugin has
// written the record of them by then. One look can be deceived by an address that moves while it lasts, or by records that were
// read before the report came, so two in a row must have shown the same.
func (l *Ledger) compare(sight Sight, before, after map[netip.Addr]string) {
	now := map[string]bool{}
	found := func(s Shared) {
		key := fmt.Sprint(s.Address, " ", s.User.UID, " ", s.Other)
		now[key] = true
		if l.last[key] {
			l.shared[key] = s
		}
	}
	users := map[netip.Addr][]*entry{}
	for _, ns := range sight.Namespaces {
		for _, e := range l.pods {
			if e.namespaces[ns.Path] != ns.ID {
				continue
			}
			for _, address := range ns.Addresses {
				if !e.addresses[address] {
					continue
				}
				users[address] = append(users[address], e)
				own := e.pod.Namespace + "/" + e.pod.Name
				if before != nil && after != nil && before[address] != own && after[address] != own {
					found(Shared{Address: address, User: e.pod, Other: after[address]})
				}
			}
		}
	}
	for address, entries := range users {
		for _, e := range entries {
			for _, other := range entries {
				if other != e {
					found(Shared{Address: address, User: e.pod, Other: other.pod.Namespace + "/" + other.pod.Name})
				}
			}
		}
	}
	l.last = now
}

// Removals lists the pods whose objects are gone, in the order in which they went.
func (l *Ledger) Removals() []Removal {
	l.mu.Lock()
	defer l.mu.Unlock()
	var removals []Removal
	for _, e := range l.pods {
		if !e.goneAt.IsZero() {
			removals = append(removals, Removal{
				Pod: e.pod, SeenAt: e.goneAt, Late: e.late, StartedAt: e.startedAt, LastBound: e.lastBound, Evidence: e.evidence, Judged: l.lookedAt.After(e.goneAt),
			})
		}
	}
	slices.SortFunc(removals, func(a, b Removal) int { return cmp.Or(a.SeenAt.Compare(b.SeenAt), cmp.Compare(a.Pod.UID, b.Pod.UID)) })
	return removals
}

// SharedAddresses lists what was found of addresses in use that were somebody else's, or nobody's, as well.
func (l *Ledger) SharedAddresses() []Shared {
	l.mu.Lock()
	defer l.mu.Unlock()
	var all []Shared
	for _, s := range l.shared {
		all = append(all, s)
	}
	slices.SortFunc(all, func(a, b Shared) int {
		return cmp.Or(a.Address.Compare(b.Address), cmp.Compare(a.User.UID, b.User.UID), cmp.Compare(a.Other, b.Other))
	})
	return all
}
