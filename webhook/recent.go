package webhook

import (
	"fmt"
	"sync"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
)

const (
	// repeatWindow is how long a decision stands for further calls of the same removal. They follow each other within
	// milliseconds.
	repeatWindow = 2 * time.Second
	// conflictWindow is the same for a call about another state of the pod, after a refusal or where the pod was released. It is
	// shorter, because by then somebody may try again, or the pod may have come back to life.
	conflictWindow = 500 * time.Millisecond
)

// recentDecisions remembers what was decided. One removal is several calls: the API server asks before it marks the
// object, before it removes it, and again whenever the object has changed in between. Before it removes the object it may ask
// about the very state that it has asked about before it marked it, because its cache does not have the mark yet. All of them
// get one decision, so that the later ones do not contradict the first, which is the only one that can protect. A refusal ends
// the request, unless the API server finds that what it has asked about is not the latest state: then it asks once more, about
// another one. A call after an override has been put on the pod, changed or taken away is a new removal, because the API server
// never does that by itself. The zero value is ready to use.
type recentDecisions struct {
	mu      sync.Mutex
	entries map[removalKey]recentDecision
	sweep   time.Time
}

// removalKey tells removals apart. The request's UID cannot: every call has one of its own.
type removalKey struct {
	pod   types.UID
	path  Path
	facts string
}

type recentDecision struct {
	decision
	resourceVersion string
	at              time.Time
}

// keyOf puts into the key all that a decision takes from the request and that stays the same in all calls of one removal. Whoever
// reaches the webhook's port may send reviews of their own, because API servers show no certificate: what was decided about an
// invented node of the pod, or for invented groups of the user, must not stand for the real ones.
func keyOf(r *removal) removalKey {
	_, mirror := r.pod.Annotations[corev1.MirrorPodAnnotationKey]
	facts := struct {
		user                                     authenticationv1.UserInfo
		namespace, name, node, addresses         string
		reason, until                            string
		hostNetwork, mirror, ignored, terminated bool
	}{
		r.user, r.pod.Namespace, r.pod.Name, r.pod.Spec.NodeName, addressWords(podIPs(r.pod)),
		r.pod.Annotations[OverrideAnnotation], r.pod.Annotations[OverrideUntilAnnotation],
		r.pod.Spec.HostNetwork, mirror, ignoredSinceCreation(r.pod), containersTerminated(r.pod),
	}
	return removalKey{r.pod.UID, r.path, fmt.Sprintf("%#v", facts)}
}

// get returns the decision about the removal that this call belongs to, if there was a call before it.
func (m *recentDecisions) get(r *removal, now time.Time) (decision, bool) {
	if r.dryRun || r.path == PathEviction || r.effect() != removesObject {
		return decision{}, false
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	entry, ok := m.entries[keyOf(r)]
	ok = ok && now.Before(entry.at.Add(repeatWindow))
	same, marked := r.pod.ResourceVersion == entry.resourceVersion, r.pod.DeletionTimestamp != nil && effectOn(r.pod, nil) == removesObject
	switch {
	// Not in the key, because the API server's own mark changes it.
	case entry.reason == ReasonContainersTerminated && (held(r.pod) || gracefullyDeleted(r.pod)):
		ok = false
	case entry.outcome == Allowed:
		ok = ok && (same || marked || now.Before(entry.at.Add(conflictWindow)) && r.path != PathIgnoreLabel)
	case entry.outcome == Denied:
		ok = ok && !same && now.Before(entry.at.Add(conflictWindow))
	}
	return entry.decision, ok
}

// gracefullyDeleted says whether a pod is being deleted and its kubelet has the last word.
func gracefullyDeleted(pod *corev1.Pod) bool {
	own := pod.DeletionGracePeriodSeconds
	return pod.DeletionTimestamp != nil && own != nil && *own > 0
}

// put remembers a decision. An eviction is one call, whatever follows; what is no removal, or only asks, says nothing about the
// next request; and that a pod could not be held may be otherwise in its latest state.
func (m *recentDecisions) put(r *removal, d decision, now time.Time) {
	if r.dryRun || r.path == PathEviction || r.effect() != removesObject || d.reason == ReasonHoldFailed {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.entries == nil || now.After(m.sweep) {
		kept := map[removalKey]recentDecision{}
		for key, entry := range m.entries {
			if now.Before(entry.at.Add(repeatWindow)) {
				kept[key] = entry
			}
		}
		m.entries, m.sweep = kept, now.Add(repeatWindow)
	}
	m.entries[keyOf(r)] = recentDecision{d, r.pod.ResourceVersion, now}
}
