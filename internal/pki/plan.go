package pki

import (
	"bytes"
	"crypto/x509"
	"fmt"
	"maps"
	"slices"
	"time"
)

// Settings say for how long certificates are valid.
type Settings struct {
	// Authority and Leaf are the validity of new certificates. Each is replaced when a third of it is left.
	Authority, Leaf time.Duration
	// Overlap is how long a new authority must have been known everywhere before leaves are signed by it, and how long all
	// leaves must have been replaced before the old authority is dropped. It must be longer than a changed Secret takes to
	// arrive in a mounted volume: the kubelet's syncFrequency, half as much again by its jitter, and the TTL of its cache
	// (kubelet pkg/kubelet, workqueue jitter and GetSecretTTLFromNodeFunc); 2 minutes and a half with the defaults.
	Overlap time.Duration
}

// Check returns an error that names what does not fit together. What is left of an authority when it is replaced must be
// enough for both overlaps, and for the life of a leaf that was signed by it.
func (s Settings) Check() error {
	const year = 365 * 24 * time.Hour
	switch {
	case s.Overlap < 5*time.Second || s.Overlap > 7*24*time.Hour:
		return fmt.Errorf("the overlap %s is not between 5s and 168h", s.Overlap)
	case s.Leaf < 3*s.Overlap:
		return fmt.Errorf("the validity of leaves %s is less than 3 times the overlap %s", s.Leaf, s.Overlap)
	case s.Authority < 3*s.Leaf:
		return fmt.Errorf("the validity of the authority %s is less than 3 times that of leaves %s", s.Authority, s.Leaf)
	case s.Authority > 10*year:
		return fmt.Errorf("the validity of the authority %s is more than 10 years", s.Authority)
	}
	return nil
}

// renewal is when a certificate that was made with this validity is replaced.
func renewal(certificate *x509.Certificate, validity time.Duration) time.Time {
	return certificate.NotAfter.Add(-validity / 3)
}

// due says whether to replace a certificate now. One with much longer left than a new one would have was made when the
// settings were others.
func due(certificate *x509.Certificate, validity time.Duration, now time.Time) bool {
	return !now.Before(renewal(certificate, validity)) || certificate.NotAfter.Sub(now) > validity*4/3
}

// authorities are who signs and who is trusted. They go through three states, each until it has settled: a new authority
// is introduced (next is set), leaves are signed by it (trusted has more than signing), the old one is dropped.
type authorities struct {
	// signing signs leaves; nil if its key is lost. next is trusted, and will sign.
	signing, next *pair
	// trusted has the certificates of both, and those that have signed before.
	trusted []*x509.Certificate
	// settled is when all Secrets and configurations were first seen to have what this state asks for; zero before.
	settled time.Time
}

// underway says whether there is more than the one authority that signs.
func (a *authorities) underway() bool { return a.next != nil || len(a.trusted) > 1 }

// ripe is when a state that has settled has lasted long enough. Where the settings were changed, the old authority may end
// before the overlap does: then the new one takes half of the time that is left.
func (a *authorities) ripe(s Settings) time.Time {
	wait := s.Overlap
	if a.next != nil && a.signing != nil {
		wait = min(wait, max(0, a.signing.certificate.NotAfter.Sub(a.settled)/2))
	}
	return a.settled.Add(wait)
}

// leaf is a certificate for a name, with the list of authorities that is stored beside it.
type leaf struct {
	*pair
	trusted []byte
}

// state is what is in the cluster.
type state struct {
	// authorities is nil where their Secret is missing or cannot be read.
	authorities *authorities
	// leaves have each name that there must be; nil where its Secret is missing or cannot be read.
	leaves map[string]*leaf
	// bundles are the lists of authorities in the webhook configurations that exist, by their names.
	bundles map[string][]byte
}

// change is what is done with the authorities.
type change string

const (
	keep change = ""
	// found makes an authority that signs at once: there is no leaf whose replacement could come too early.
	found change = "found"
	// introduce makes an authority that is trusted first.
	introduce change = "introduce"
	// promote lets the next authority sign.
	promote change = "promote"
	// drop ends the trust in those that have signed before.
	drop change = "drop"
	// settle and unsettle begin to wait, and again.
	settle   change = "settle"
	unsettle change = "unsettle"
)

// step is what to do next. With a change, nothing else is done, and then one looks again.
type step struct {
	change change
	// because says, for people, why.
	because string
	// bundles are the configurations to write the trusted authorities to, leaves the names to sign anew, spread those
	// that only lack the list of authorities. Configurations come first, so that a webhook is trusted before it serves.
	bundles, leaves, spread []string
	// again is when there will be something to do, if nothing is before.
	again time.Time
}

// plan decides what to do next. It only looks at what is there and what time it is: whoever was stopped in between, or has
// slept over a renewal, goes on from there.
func plan(s Settings, found state, now time.Time) (step, error) {
	a := found.authorities
	if a == nil {
		a = &authorities{}
	}
	trusted, err := encodeAll(a.trusted)
	if err != nil {
		return step{}, err
	}
	signing, next := a.signing.canSign(now), a.next.canSign(now)
	settled := !a.settled.IsZero() && !a.settled.After(now) && !now.Before(a.ripe(s))
	if change, because := changeOf(s, found, a, now, signing, next, settled); change != keep {
		return step{change: change, because: because}, nil
	}

	will := step{again: now.Add(s.Authority)}
	earliest := func(at time.Time) {
		if at.Before(will.again) {
			will.again = at
		}
	}
	outOfDate := false
	for name, l := range found.leaves {
		switch {
		case l == nil || !vouches(a.trusted, l.certificate, name, now),
			signing && (!signedBy(l.certificate, a.signing) || due(l.certificate, s.Leaf, now)):
			will.leaves = append(will.leaves, name)
		case !bytes.Equal(l.trusted, trusted):
			will.spread = append(will.spread, name)
		case signing:
			earliest(renewal(l.certificate, s.Leaf))
		default:
			earliest(l.certificate.NotAfter)
		}
		outOfDate = outOfDate || l != nil && !bytes.Equal(l.trusted, trusted)
	}
	for name, bundle := range found.bundles {
		if !bytes.Equal(bundle, trusted) {
			will.bundles = append(will.bundles, name)
		}
	}
	slices.Sort(will.leaves)
	slices.Sort(will.spread)
	slices.Sort(will.bundles)
	switch {
	case outOfDate && !a.settled.IsZero():
		return step{change: unsettle, because: "a list of authorities was changed by somebody else"}, nil
	case len(will.leaves)+len(will.spread)+len(will.bundles) > 0:
		will.again = now
	case a.underway() && (a.settled.IsZero() || a.settled.After(now)):
		return step{change: settle, because: "every part has been given what it needs, and must have time to read it"}, nil
	case a.underway():
		earliest(a.ripe(s))
	default:
		earliest(renewal(a.signing.certificate, s.Authority))
	}
	return will, nil
}

// changeOf decides what to do with the authorities; signing and next say whether these can sign, settled whether the state
// they are in has lasted long enough.
func changeOf(s Settings, there state, a *authorities, now time.Time, signing, next, settled bool) (change, string) {
	inUse := false // a leaf that is valid, and not by the next authority
	for name, l := range there.leaves {
		inUse = inUse || l != nil && vouches(trustedAnywhere(there), l.certificate, name, now) && !signedBy(l.certificate, a.next)
	}
	switch {
	case !signing && !next && inUse:
		return introduce, "there is no authority that can sign, and certificates of another one are in use"
	case !signing && !next:
		return found, "there is no authority that can sign, and no certificate that is valid"
	case next && settled:
		return promote, fmt.Sprintf("the new authority has been trusted everywhere since %s", a.settled.Format(time.RFC3339))
	case next && !signing && !inUse:
		return promote, "the old authority cannot sign, and none of its certificates is valid"
	case signing && !a.underway() && due(a.signing.certificate, s.Authority, now):
		return introduce, fmt.Sprintf("the authority expires at %s, and a new one is valid for %s", a.signing.certificate.NotAfter.Format(time.RFC3339), s.Authority)
	case signing && a.next == nil && len(a.trusted) > 1 && settled:
		return drop, fmt.Sprintf("no certificate has been of the old authority since %s", a.settled.Format(time.RFC3339))
	default:
		return keep, ""
	}
}

// trustedAnywhere returns the authorities that are trusted, and those that are stored beside leaves. Not those of webhook
// configurations: whoever may change these must not be trusted by agents for it.
func trustedAnywhere(there state) []*x509.Certificate {
	var all []*x509.Certificate
	if there.authorities != nil {
		all = there.authorities.trusted
	}
	for _, name := range slices.Sorted(maps.Keys(there.leaves)) {
		if l := there.leaves[name]; l != nil {
			all = union(all, decodeAll(l.trusted)...)
		}
	}
	return all
}

// after returns the authorities after a change.
func after(s Settings, there state, what change, now time.Time) (*authorities, error) {
	a := there.authorities
	if a == nil {
		a = &authorities{}
	}
	switch what {
	case found, introduce:
		fresh, err := newAuthority(now, s.Authority)
		if err != nil {
			return nil, err
		}
		made := &authorities{signing: a.signing, next: fresh}
		if what == found {
			made = &authorities{signing: fresh}
		}
		// Whoever holds a certificate of an old authority in memory is trusted for a while.
		made.trusted = []*x509.Certificate{fresh.certificate}
		for _, old := range trustedAnywhere(there) {
			if old.IsCA && !now.After(old.NotAfter) {
				made.trusted = union(made.trusted, old)
			}
		}
		return made, nil
	case promote:
		return &authorities{signing: a.next, trusted: a.trusted}, nil
	case drop:
		return &authorities{signing: a.signing, trusted: []*x509.Certificate{a.signing.certificate}}, nil
	case settle:
		return &authorities{signing: a.signing, next: a.next, trusted: a.trusted, settled: now}, nil
	case unsettle:
		return &authorities{signing: a.signing, next: a.next, trusted: a.trusted}, nil
	case keep:
	}
	return a, nil
}
