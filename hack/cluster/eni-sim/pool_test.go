package main

import (
	"maps"
	"net/netip"
	"slices"
	"testing"
	"time"
)

func TestPool(t *testing.T) {
	// A step takes an address for a pod, or releases the pod's.
	type step struct {
		take, release string
		want          string // the address taken; empty: an error
	}
	tests := []struct {
		name    string
		subnet  string
		size    int
		steps   []step
		records map[string]string
		free    []string
	}{
		{
			name:   "in order, from the second address",
			subnet: "10.112.1.0/24", size: 3,
			steps:   []step{{take: "a/1", want: "10.112.1.2"}, {take: "a/2", want: "10.112.1.3"}},
			records: map[string]string{"a/1": "10.112.1.2", "a/2": "10.112.1.3"},
			free:    []string{"10.112.1.4"},
		},
		{
			name:   "a released address is the next one",
			subnet: "10.112.1.0/24", size: 4,
			steps: []step{
				{take: "a/1", want: "10.112.1.2"}, {take: "a/2", want: "10.112.1.3"},
				{release: "a/1"}, {take: "a/3", want: "10.112.1.2"},
			},
			records: map[string]string{"a/2": "10.112.1.3", "a/3": "10.112.1.2"},
			free:    []string{"10.112.1.4", "10.112.1.5"},
		},
		{
			name:   "the one released last is the first",
			subnet: "10.112.1.0/24", size: 3,
			steps: []step{
				{take: "a/1", want: "10.112.1.2"}, {take: "a/2", want: "10.112.1.3"},
				{release: "a/1"}, {release: "a/2"},
			},
			free: []string{"10.112.1.3", "10.112.1.2", "10.112.1.4"},
		},
		{
			name:   "the same name gets the same address",
			subnet: "10.112.1.0/24", size: 2,
			steps:   []step{{take: "a/1", want: "10.112.1.2"}, {take: "a/1", want: "10.112.1.2"}},
			records: map[string]string{"a/1": "10.112.1.2"},
			free:    []string{"10.112.1.3"},
		},
		{
			name:   "the namespace is part of the name",
			subnet: "10.112.1.0/24", size: 2,
			steps:   []step{{take: "a/1", want: "10.112.1.2"}, {take: "b/1", want: "10.112.1.3"}},
			records: map[string]string{"a/1": "10.112.1.2", "b/1": "10.112.1.3"},
		},
		{
			name:   "exhausted, but not for one that has an address",
			subnet: "10.112.1.0/30", size: 1,
			steps:   []step{{take: "a/1", want: "10.112.1.2"}, {take: "a/2"}, {take: "a/1", want: "10.112.1.2"}},
			records: map[string]string{"a/1": "10.112.1.2"},
		},
		{
			name:   "a release of an unknown pod, and a second one, do nothing",
			subnet: "10.112.1.0/24", size: 2,
			steps: []step{{release: "a/0"}, {take: "a/1", want: "10.112.1.2"}, {release: "a/1"}, {release: "a/1"}},
			free:  []string{"10.112.1.2", "10.112.1.3"},
		},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			p := newPool(netip.MustParsePrefix(test.subnet), netip.MustParsePrefix(testSubnet6), test.size)
			for i, s := range test.steps {
				if s.release != "" {
					p.release(s.release)
					continue
				}
				r, err := p.take(s.take, families{ipv4: true}, "c", "u", time.Time{})
				if (err != nil) != (s.want == "") || err == nil && r.IPv4.String() != s.want {
					t.Errorf("step %d: %v, %v, want %q", i, r.IPv4, err, s.want)
				}
			}
			records := map[string]string{}
			for pod, r := range p.Records {
				records[pod] = r.IPv4.String()
			}
			if !maps.Equal(records, test.records) {
				t.Errorf("records %v, want %v", records, test.records)
			}
			var free []string
			for _, addr := range p.IPv4.Free {
				free = append(free, addr.String())
			}
			if !slices.Equal(free, test.free) {
				t.Errorf("free %v, want %v", free, test.free)
			}
		})
	}
}

func TestTakeNotesTheSandboxThatAskedLast(t *testing.T) {
	p := newPool(netip.MustParsePrefix(testSubnet), netip.MustParsePrefix(testSubnet6), 2)
	first, second := time.Unix(100, 0), time.Unix(200, 0)
	for _, call := range []struct {
		container, uid string
		now            time.Time
	}{{"c1", "u1", first}, {"c2", "u2", second}} {
		if _, err := p.take("a/1", families{ipv4: true}, call.container, call.uid, call.now); err != nil {
			t.Fatal(err)
		}
	}
	want := record{IPv4: netip.MustParseAddr("10.112.1.2"), Container: "c2", PodUID: "u2", Since: first}
	if got := p.Records["a/1"]; got != want {
		t.Errorf("record %+v, want %+v", got, want)
	}
}

func TestTakeByFamily(t *testing.T) {
	only4, only6, both := families{ipv4: true}, families{ipv6: true}, families{ipv4: true, ipv6: true}
	p := newPool(netip.MustParsePrefix(testSubnet), netip.MustParsePrefix(testSubnet6), 2)
	for i, step := range []struct {
		pod    string
		wanted families
		want   string // the addresses; empty: an error
	}{
		{"a/1", only6, "fd00:112:1::2"},
		{"a/2", both, "10.112.1.2,fd00:112:1::3"},
		{"a/2", both, "10.112.1.2,fd00:112:1::3"},
		{"a/3", only6, ""}, // exhausted
		{"a/3", only4, "10.112.1.3"},
		{"a/2", only6, "fd00:112:1::3"}, // a new pod of that name wants less
		{"a/1", both, "10.112.1.2,fd00:112:1::2"},
	} {
		r, err := p.take(step.pod, step.wanted, "c", "u", time.Time{})
		if (err != nil) != (step.want == "") || joined(r.addresses()) != step.want {
			t.Errorf("step %d: %v, %v, want %q", i, r.addresses(), err, step.want)
		}
	}
	p.release("a/2")
	p.release("a/1")
	if got := joined(p.IPv4.Free) + " " + joined(p.IPv6.Free); got != "10.112.1.2 fd00:112:1::2,fd00:112:1::3" {
		t.Errorf("free %s", got)
	}
}

func TestNewPoolFillsTheSubnet(t *testing.T) {
	for subnet, last := range map[string]string{"10.112.0.0/16": "10.112.255.254", "10.112.0.0/23": "10.112.1.254", "10.112.1.0/30": "10.112.1.2"} {
		prefix := netip.MustParsePrefix(subnet)
		p := newPool(prefix, netip.MustParsePrefix(testSubnet6), usable(prefix))
		if got := p.IPv4.Free[len(p.IPv4.Free)-1].String(); got != last {
			t.Errorf("%s: last address %s, want %s", subnet, got, last)
		}
	}
}
