package pki

import (
	"crypto/x509"
	"reflect"
	"strings"
	"testing"
	"time"
)

const day = 24 * time.Hour

var (
	start    = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	settings = Settings{Authority: 1000 * day, Leaf: 90 * day, Overlap: time.Hour}
)

func authority(t *testing.T, made time.Time) *pair {
	t.Helper()
	a, err := newAuthority(made, settings.Authority)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// given describes a state; names are those of leaves.
type given struct {
	authorities *authorities
	signer      *pair
	made        time.Time // of the leaves
	missing     []string
	stale       []string // leaves and configurations with an old list of authorities
}

func (g given) state(t *testing.T) state {
	t.Helper()
	var trusted []*x509.Certificate
	if g.authorities != nil {
		trusted = g.authorities.trusted
	} else if g.signer != nil {
		trusted = []*x509.Certificate{g.signer.certificate}
	}
	list, err := encodeAll(trusted)
	if err != nil {
		t.Fatal(err)
	}
	s := state{authorities: g.authorities, leaves: map[string]*leaf{"agent": nil, "client": nil}, bundles: map[string][]byte{"closed": list, "open": list}}
	for name := range s.leaves {
		made, err := newLeaf(g.signer, name, g.made, settings.Leaf)
		if err != nil {
			t.Fatal(err)
		}
		s.leaves[name] = &leaf{made, list}
	}
	for _, name := range g.missing {
		s.leaves[name] = nil
	}
	for _, name := range g.stale {
		if s.leaves[name] != nil {
			s.leaves[name].trusted = nil
		} else {
			s.bundles[name] = nil
		}
	}
	return s
}

func TestPlan(t *testing.T) {
	old, fresh := authority(t, start), authority(t, start)
	trusting := func(pairs ...*pair) (list []*x509.Certificate) {
		for _, p := range pairs {
			list = append(list, p.certificate)
		}
		return list
	}
	one := &authorities{signing: old, trusted: trusting(old)}
	introduced := func(settled time.Time) *authorities {
		return &authorities{signing: old, next: fresh, trusted: trusting(fresh, old), settled: settled}
	}
	promoted := func(settled time.Time) *authorities {
		return &authorities{signing: fresh, trusted: trusting(fresh, old), settled: settled}
	}
	lost := func(settled time.Time) *authorities {
		return &authorities{next: fresh, trusted: trusting(fresh, old), settled: settled}
	}
	both := []string{"agent", "client"}
	leafDue, authorityDue := start.Add(60*day), old.certificate.NotAfter.Add(-settings.Authority/3)
	for _, c := range []struct {
		name  string
		given given
		at    time.Time
		want  step
	}{
		{"nothing is there", given{signer: old, missing: both}, start, step{change: found}},
		{"the authority is lost, its leaves are in use", given{signer: old, made: start}, start, step{change: introduce}},
		{"the authority is lost, one of its leaves is in use", given{signer: old, made: start, missing: []string{"agent"}}, start, step{change: introduce}},
		{"the authority is lost, its leaves have expired", given{signer: old, made: start}, start.Add(91 * day), step{change: found}},
		{"all is well", given{one, old, start, nil, nil}, start, step{again: leafDue}},
		{"a moment before the leaves are due", given{one, old, start, nil, nil}, leafDue.Add(-time.Second), step{again: leafDue}},
		{"the leaves are due", given{one, old, start, nil, nil}, leafDue, step{leaves: both, again: leafDue}},
		{"the leaves have expired", given{one, old, start, nil, nil}, start.Add(100 * day), step{leaves: both, again: start.Add(100 * day)}},
		{"a leaf is missing", given{one, old, start, []string{"agent"}, nil}, start, step{leaves: []string{"agent"}, again: start}},
		{"the leaves are of nobody who is trusted", given{one, fresh, start, nil, nil}, start, step{leaves: both, again: start}},
		{"the leaves are of the future", given{one, old, start.Add(900 * day), nil, nil}, start, step{leaves: both, again: start}},
		{"a bundle was wiped", given{one, old, start, nil, []string{"closed"}}, start, step{bundles: []string{"closed"}, again: start}},
		{"a leaf lacks an authority", given{one, old, start, nil, []string{"client"}}, start, step{spread: []string{"client"}, again: start}},
		{"the authority is due", given{one, old, authorityDue, nil, nil}, authorityDue, step{change: introduce}},
		{"the authority has expired", given{one, old, old.certificate.NotAfter, nil, nil}, old.certificate.NotAfter.Add(time.Second), step{change: found}},
		{"a new authority is not known yet", given{introduced(time.Time{}), old, start, nil, []string{"agent", "open"}}, start,
			step{spread: []string{"agent"}, bundles: []string{"open"}, again: start}},
		{"a new authority is known", given{introduced(time.Time{}), old, start, nil, nil}, start, step{change: settle}},
		{"a new authority is known for a while", given{introduced(start), old, start, nil, nil}, start.Add(59 * time.Minute), step{again: start.Add(time.Hour)}},
		{"a new authority is known for long", given{introduced(start), old, start, nil, nil}, start.Add(time.Hour), step{change: promote}},
		{"the old authority ends before the overlap", given{introduced(old.certificate.NotAfter.Add(-30 * time.Minute)), old, old.certificate.NotAfter.Add(-day), nil, nil},
			old.certificate.NotAfter.Add(-15 * time.Minute), step{change: promote}},
		{"the old authority ends before the overlap, and not soon", given{introduced(old.certificate.NotAfter.Add(-30 * time.Minute)), old, old.certificate.NotAfter.Add(-day), nil, nil},
			old.certificate.NotAfter.Add(-16 * time.Minute), step{again: old.certificate.NotAfter.Add(-15 * time.Minute)}},
		{"it is forgotten in between", given{introduced(start), old, start, nil, []string{"agent"}}, start.Add(time.Minute), step{change: unsettle}},
		{"a leaf is due in between", given{introduced(leafDue), old, start, nil, nil}, leafDue, step{leaves: both, again: leafDue}},
		{"the clock was put back", given{introduced(start.Add(day)), old, start, nil, nil}, start, step{change: settle}},
		{"a new authority has slept over the end of the old one", given{introduced(start), old, start, nil, nil}, old.certificate.NotAfter.Add(-time.Hour), step{change: promote}},
		{"a new authority signs", given{promoted(time.Time{}), old, start, nil, nil}, start, step{leaves: both, again: start}},
		{"its leaves are written", given{promoted(time.Time{}), fresh, start, nil, nil}, start, step{change: settle}},
		{"its leaves are in use for long", given{promoted(start), fresh, start, nil, nil}, start.Add(time.Hour), step{change: drop}},
		{"the key is lost, and the next one is known for a while", given{lost(start), old, start, nil, nil}, start.Add(time.Minute), step{again: start.Add(time.Hour)}},
		{"the key is lost, and a leaf is missing", given{lost(start), old, start, []string{"agent"}, nil}, start, step{leaves: []string{"agent"}, again: start}},
		{"the key is lost, and a leaf is due", given{lost(leafDue), old, start, nil, nil}, leafDue, step{again: leafDue.Add(time.Hour)}},
		{"the key is lost, and so are all leaves", given{lost(time.Time{}), old, start, both, nil}, start, step{change: promote}},
		{"the key is lost, and the next one is known for long", given{lost(start), old, start, nil, nil}, start.Add(time.Hour), step{change: promote}},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := plan(settings, c.given.state(t), c.at)
			if err != nil {
				t.Fatal(err)
			}
			if (got.because == "") != (got.change == keep) {
				t.Errorf("%q because %q", got.change, got.because)
			}
			got.because = ""
			if !reflect.DeepEqual(got, c.want) {
				t.Errorf("got  %+v\nwant %+v", got, c.want)
			}
		})
	}
}

// A certificate is replaced when a third of its life is left, and when it was made while the settings let it live for much longer.
func TestDue(t *testing.T) {
	for _, c := range []struct {
		made, validity time.Duration // of the certificate, and that of new ones
		want           bool
	}{
		{90 * day, 90 * day, false},
		{30 * day, 90 * day, true},
		{30*day + time.Second, 90 * day, false},
		{120 * day, 90 * day, false},
		{120*day + time.Second, 90 * day, true},
	} {
		leaf, err := newLeaf(authority(t, start), "agent", start, c.made)
		if err != nil {
			t.Fatal(err)
		}
		if got := due(leaf.certificate, c.validity, start); got != c.want {
			t.Errorf("made for %s, where new ones are made for %s: due %t", c.made, c.validity, got)
		}
	}
}

func TestSettingsMustFitTogether(t *testing.T) {
	for want, s := range map[string]Settings{
		"":                             settings,
		"overlap 4s is not":            {Authority: time.Hour, Leaf: time.Minute, Overlap: 4 * time.Second},
		"overlap 169h0m0s is not":      {Authority: 1000 * day, Leaf: 90 * day, Overlap: 169 * time.Hour},
		"leaves 29s is less than 3":    {Authority: time.Hour, Leaf: 29 * time.Second, Overlap: 10 * time.Second},
		"authority 89s is less than 3": {Authority: 89 * time.Second, Leaf: 30 * time.Second, Overlap: 10 * time.Second},
		"is more than 10 years":        {Authority: 3651 * day, Leaf: 90 * day, Overlap: time.Hour},
	} {
		err := s.Check()
		if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), strings.Replace(want, "89s", "1m29s", 1)) {
			t.Errorf("%+v: %v, want %q", s, err, want)
		}
	}
}
