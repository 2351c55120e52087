package webhook

import (
	"sync"
	"time"

	"k8s.io/apimachinery/pkg/types"
)

// repeatWindow is how long a decision stands for further calls of the same removal. They follow each other within
// milliseconds.
const repeatWindow = 2 * time.Second

// recentDecisions remembers what was let through. One removal is several calls: the API server asks before it marks the
// object, before it removes it, and again whenever the object has changed in between. Before it removes the object it may ask
// about the very state that it has asked about before it marked it, because its cache does not have the mark yet. All of them
// get one decision, so that the later ones do not contradict the first, which is the only one that can protect. A refusal ends
// the request, so the next call about the pod is a new removal and is judged anew; so is one after an override has been put on
// the pod, changed or taken away, which the API server never does by itself. The zero value is ready to use.
type recentDecisions struct {
	mu      sync.Mutex
	entries map[removalKey]recentDecision
	sweep   time.Time
}

// removalKey tells removals apart. The request's UID cannot: every call has one of its own.
type removalKey struct {
	pod           types.UID
	path          Path
	user          string
	reason, until string
}

type recentDecision struct {
	decision
	until time.Time
}

func keyOf(r *removal) removalKey {
	return removalKey{r.pod.UID, r.path, r.user.Username, r.pod.Annotations[OverrideAnnotation], r.pod.Annotations[OverrideUntilAnnotation]}
}

// get returns the decision about the removal that this call belongs to, if there was a call before it.
func (m *recentDecisions) get(r *removal, now time.Time) (decision, bool) {
	if r.dryRun {
		return decision{}, false
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	entry, ok := m.entries[keyOf(r)]
	return entry.decision, ok && now.Before(entry.until)
}

// put remembers a decision. An eviction is one call, whatever follows; and what is no removal, or only asks, says nothing about
// the next request.
func (m *recentDecisions) put(r *removal, d decision, now time.Time) {
	if !d.outcome.allows() || d.reason == ReasonNotForced || r.path == PathEviction || r.dryRun {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.entries == nil || now.After(m.sweep) {
		kept := map[removalKey]recentDecision{}
		for key, entry := range m.entries {
			if now.Before(entry.until) {
				kept[key] = entry
			}
		}
		m.entries, m.sweep = kept, now.Add(repeatWindow)
	}
	m.entries[keyOf(r)] = recentDecision{d, now.Add(repeatWindow)}
}
