package agent

import (
	"errors"
	"net/netip"
	"reflect"
	"testing"

	"github.com/eni-guard/eni-guard/internal/sandbox"
)

var (
	podAddress = netip.MustParseAddr("10.0.0.5")
	podIPv6    = netip.MustParseAddr("fd00::5")
	errProbe   = errors.New("no")
)

// What the probes may have seen, and what follows from it for one pod.
func TestJudge(t *testing.T) {
	alive := podProcess{Process: sandbox.Process{PID: 42, Command: "java", State: "S"}, netns: "net:[7]"}
	inHost := podProcess{Process: sandbox.Process{PID: 43, Command: "agent", State: "S"}, netns: "net:[1]"}
	mine := podSandbox{id: "s1", pod: sandbox.Pod{Namespace: "shop", Name: "web-0", UID: podUID}, details: details{netnsPath: "/run/netns/cni-1", ips: []netip.Addr{podAddress}}}
	ready := mine
	ready.ready = true
	// The next pod of a StatefulSet: the same name, the same address, another UID.
	const cni8 = "/run/netns/cni-00000000-0000-0000-0000-000000000008"
	next := podSandbox{id: "s2", pod: sandbox.Pod{Namespace: "shop", Name: "web-0", UID: otherUID}, ready: true, details: details{netnsPath: "/run/netns/cni-2"}}
	at := func(id, path string, ips ...netip.Addr) netNamespace {
		n := netNamespace{id: id}
		if path != "" {
			n.paths = []string{path}
		}
		for _, ip := range ips {
			n.addresses = append(n.addresses, assignment{ip, "eth0"})
		}
		return n
	}
	with := func(n netNamespace, pids ...int) netNamespace {
		n.tasks = leaders(pids)
		return n
	}
	view := func(namespaces ...netNamespace) nodeView { return nodeView{host: "net:[1]", namespaces: namespaces} }
	const (
		open7     = "network namespace net:[7] is open"
		open1     = "network namespace /run/netns/cni-1 is open"
		assigned1 = "address 10.0.0.5 is on eth0 in network namespace /run/netns/cni-1"
		conflict2 = "address 10.0.0.5 is also in network namespace /run/netns/cni-2 of pod shop/web-0 (UID " + otherUID + ")"
		making    = `the probe "netns" did not run: network namespace /run/netns/cni-00000000-0000-0000-0000-000000000009 is nobody's, and the pod has a cgroup: a sandbox of it may be in the making`
	)
	for _, test := range []struct {
		name      string
		e         evidence
		at        string // the namespace of the pod's sandbox
		strangers []podProcess
		verdict   sandbox.Verdict
		findings  []string
		failures  []string
		conflicts []string
	}{
		{name: "nothing is left", e: evidence{view: view()}, verdict: sandbox.Released},
		{name: "the runtime did not answer", e: evidence{view: view(), runtimeErr: errProbe}, verdict: sandbox.Unknown,
			failures: []string{`the probe "runtime" did not run: no`}},
		{name: "the cgroups could not be read", e: evidence{view: view(), cgroupsErr: errProbe}, verdict: sandbox.Unknown,
			failures: []string{`the probe "cgroups" did not run: no`}},
		{name: "the processes could not be read", e: evidence{view: view(), processErr: errProbe}, verdict: sandbox.Unknown,
			failures: []string{`the probe "processes" did not run: no`}},
		{name: "the namespaces could not be read", e: evidence{view: view(), netnsErr: errProbe}, verdict: sandbox.Unknown,
			failures: []string{`the probe "netns" did not run: no`}},
		{name: "a finding decides, though nothing else could be read",
			e:       evidence{processes: []podProcess{alive}, runtimeErr: errProbe, cgroupsErr: errProbe, netnsErr: errProbe},
			verdict: sandbox.Bound, findings: []string{"process 42 (java) is in state S"},
			failures: []string{`the probe "runtime" did not run: no`, `the probe "cgroups" did not run: no`, `the probe "netns" did not run: no`}},

		{name: "a sandbox that is not ready, its namespace closed", e: evidence{view: view(), records: podRecords{sandboxes: []podSandbox{mine}}}, verdict: sandbox.Released},
		{name: "a sandbox that is ready", e: evidence{view: view(), records: podRecords{sandboxes: []podSandbox{ready}}}, verdict: sandbox.Bound,
			findings: []string{"sandbox s1 is ready"}},
		{name: "a sandbox being torn down: not ready, its namespace open",
			e: evidence{view: view(at("net:[7]", "/run/netns/cni-1")), records: podRecords{sandboxes: []podSandbox{mine}}}, at: "net:[7]",
			verdict: sandbox.Bound, findings: []string{open1}},
		{name: "its namespace came after the namespaces were looked at",
			e: evidence{view: view(), records: podRecords{sandboxes: []podSandbox{mine}}}, at: "net:[7]",
			verdict: sandbox.Bound, findings: []string{open7}},
		{name: "a sandbox in the making: a namespace of nobody, and a cgroup",
			e:       evidence{view: view(at("net:[9]", "/run/netns/cni-00000000-0000-0000-0000-000000000009")), members: podMembers{exist: true}},
			verdict: sandbox.Unknown, failures: []string{making}},
		{name: "a sandbox in the making, with a CNI plugin in its namespace",
			e:       evidence{view: view(with(at("net:[9]", "/run/netns/cni-00000000-0000-0000-0000-000000000009"), 50)), members: podMembers{exist: true}},
			verdict: sandbox.Unknown, failures: []string{making}},
		{name: "the runtime does not answer: whose a namespace is, is not known",
			e:       evidence{view: view(at("net:[9]", "/run/netns/cni-00000000-0000-0000-0000-000000000009")), members: podMembers{exist: true}, runtimeErr: errProbe},
			verdict: sandbox.Unknown, failures: []string{`the probe "runtime" did not run: no`}},
		{name: "another sandbox in the making, after one that has ended",
			e:       evidence{view: view(at("net:[9]", "/run/netns/cni-00000000-0000-0000-0000-000000000009")), members: podMembers{exist: true}, records: podRecords{sandboxes: []podSandbox{mine}}},
			verdict: sandbox.Unknown, failures: []string{making}},
		{name: "a namespace of nobody, and no cgroup of the pod", e: evidence{view: view(at("net:[9]", "/run/netns/cni-00000000-0000-0000-0000-000000000009"))}, verdict: sandbox.Released},
		{name: "a cgroup of the pod, and only namespaces that are somebody's",
			e: evidence{view: view(at("net:[8]", cni8), with(at("net:[9]", "/run/netns/x"), 50)), members: podMembers{exist: true},
				others: []podSandbox{{id: "s3", details: details{netnsPath: cni8}}}},
			verdict: sandbox.Released},
		{name: "a cgroup of the pod, and a namespace elsewhere that no runtime makes",
			e: evidence{view: view(at("net:[9]", "/run/other/cni-00000000-0000-0000-0000-000000000009")), members: podMembers{exist: true}}, verdict: sandbox.Released},
		{name: "a sandbox in the making, and something that is known of the pod",
			e:       evidence{view: view(at("net:[9]", "/run/netns/cni-00000000-0000-0000-0000-000000000009")), members: podMembers{exist: true}, records: podRecords{sandboxes: []podSandbox{ready}}},
			verdict: sandbox.Bound, findings: []string{"sandbox s1 is ready"}},
		{name: "an address that only the runtime knows, in a namespace that is nobody's",
			e:       evidence{view: view(at("net:[7]", "/run/netns/x", podAddress)), records: podRecords{sandboxes: []podSandbox{mine}}},
			verdict: sandbox.Bound, findings: []string{"address 10.0.0.5 is on eth0 in network namespace /run/netns/x", "network namespace /run/netns/x is open"}},

		{name: "a process in the host's namespace", e: evidence{view: view(), processes: []podProcess{inHost}}, verdict: sandbox.Bound,
			findings: []string{"process 43 (agent) is in state S"}},
		{name: "a process alone keeps its namespace",
			e:        evidence{view: view(with(at("net:[7]", "", podAddress), 42)), processes: []podProcess{alive}},
			verdict:  sandbox.Bound,
			findings: []string{"process 42 (java) is in state S", "address 10.0.0.5 is on eth0 in network namespace net:[7]", open7}},
		{name: "the record is gone, a process outside the cgroup keeps the address",
			e: evidence{view: view(with(at("net:[7]", "", podAddress), 44)), members: podMembers{}}, strangers: []podProcess{{Process: sandbox.Process{PID: 44, Command: "nc", State: "S"}}},
			verdict: sandbox.Released}, // without the question's address nothing leads there; with it, see below

		{name: "another pod's sandbox and its processes are none of this pod's",
			e:       evidence{view: view(with(at("net:[8]", "/run/netns/cni-2", netip.MustParseAddr("10.0.0.6")), 50)), others: []podSandbox{next}},
			verdict: sandbox.Released},
	} {
		t.Run(test.name, func(t *testing.T) {
			test.e.how = thorough
			check(t, sandbox.Query{UID: podUID}, test.e, test.at, test.strangers, test.verdict, test.findings, test.failures, test.conflicts)
		})
	}

	asked := sandbox.Query{UID: podUID, IPs: []netip.Addr{netip.AddrFrom16(podAddress.As16()), podIPv6}} // the first one in IPv6's clothes
	for _, test := range []struct {
		name      string
		e         evidence
		at        string
		strangers []podProcess
		verdict   sandbox.Verdict
		findings  []string
		failures  []string
		conflicts []string
	}{
		{name: "the record is gone, a mount keeps the address",
			e: evidence{view: view(at("net:[7]", "/run/netns/cni-1", podAddress))}, verdict: sandbox.Bound, findings: []string{assigned1, open1}},
		{name: "its IPv6 address alone",
			e: evidence{view: view(at("net:[7]", "/run/netns/cni-1", podIPv6))}, verdict: sandbox.Bound,
			findings: []string{"address fd00::5 is on eth0 in network namespace /run/netns/cni-1", open1}},
		{name: "the record is gone, a process outside the cgroup keeps the address",
			e:         evidence{view: view(with(at("net:[7]", "", podAddress), 44))},
			strangers: []podProcess{{Process: sandbox.Process{PID: 44, Command: "nc", State: "S"}}},
			verdict:   sandbox.Bound,
			findings: []string{"process 44 (nc), in the pod's network namespace but not in its cgroup, is in state S",
				"address 10.0.0.5 is on eth0 in network namespace net:[7]", open7}},
		{name: "a process of another pod looks into the namespace: that gives it to nobody",
			e:       evidence{view: view(with(at("net:[7]", "/run/netns/cni-1", podAddress), 50)), others: []podSandbox{next}},
			verdict: sandbox.Bound, findings: []string{assigned1, open1}},
		{name: "the runtime does not answer: a namespace with the address is this pod's",
			e:       evidence{view: view(with(at("net:[8]", "/run/netns/cni-1", podAddress), 50)), runtimeErr: errProbe},
			verdict: sandbox.Bound, findings: []string{assigned1, open1}, failures: []string{`the probe "runtime" did not run: no`}},
		{name: "the next pod of the name has the address, and nothing of this one is left",
			e:       evidence{view: view(with(at("net:[8]", "/run/netns/cni-2", podAddress), 50)), others: []podSandbox{next}},
			verdict: sandbox.Released, conflicts: []string{conflict2}},
		{name: "both have the address",
			e: evidence{view: view(at("net:[7]", "/run/netns/cni-1", podAddress), with(at("net:[8]", "/run/netns/cni-2", podAddress), 50)),
				records: podRecords{sandboxes: []podSandbox{mine}}, others: []podSandbox{mine, next}}, at: "net:[7]",
			verdict: sandbox.Bound, findings: []string{assigned1, open1}, conflicts: []string{conflict2}},
		{name: "a device of the host leads to a namespace that does not show",
			e:        evidence{view: view(), paths: hostPaths{routes: []hostRoute{{ip: podAddress, device: "cali1", table: 254, peer: true}}}},
			verdict:  sandbox.Bound,
			findings: []string{"the other end of the host's device cali1, which leads to 10.0.0.5, is in a network namespace that does not show"}},
		{name: "a device of the host leads somewhere, and not every namespace could be looked into",
			e:       evidence{view: view(), netnsErr: errProbe, paths: hostPaths{routes: []hostRoute{{ip: podAddress, device: "cali1", table: 254, peer: true}}}},
			verdict: sandbox.Unknown, failures: []string{`the probe "netns" did not run: no`}},
		{name: "a device of the host leads to the namespace of the pod that has the address now",
			e: evidence{view: view(with(at("net:[8]", "/run/netns/cni-2", podAddress), 50)), others: []podSandbox{next},
				paths: hostPaths{routes: []hostRoute{{ip: podAddress, device: "cali1", table: 254, peer: true}}}},
			verdict: sandbox.Released, conflicts: []string{conflict2}},
		{name: "a route and a rule are left on the host, and nothing else",
			e:       evidence{view: view(), paths: hostPaths{routes: []hostRoute{{ip: podAddress, device: "eth1", table: 1003}}, rules: []string{"rule 2048 from 10.0.0.5"}}},
			verdict: sandbox.Released},
	} {
		t.Run(test.name, func(t *testing.T) {
			test.e.how = thorough
			check(t, asked, test.e, test.at, test.strangers, test.verdict, test.findings, test.failures, test.conflicts)
		})
	}
}

// What explains is told beside what decides.
func TestJudgeTellsWhatExplains(t *testing.T) {
	ended := podSandbox{id: "s1", details: details{netnsPath: "/run/netns/cni-1", cgroup: "/kubepods/c", pid: 77}}
	ready := ended
	ready.id, ready.ready, ready.ips = "s2", true, []netip.Addr{podAddress}
	report := judge(sandbox.Query{UID: podUID}, evidence{
		how: thorough, records: podRecords{sandboxes: []podSandbox{ended, ready}},
		paths: hostPaths{routes: []hostRoute{{ip: podAddress, device: "cali1", table: 254}}, rules: []string{"rule 2048 from 10.0.0.5"}},
	}, claims{}, nil)
	if want := []string{"route to 10.0.0.5 via cali1 in table 254", "rule 2048 from 10.0.0.5"}; !reflect.DeepEqual(report.Routes, want) {
		t.Errorf("routes %q, want %q", report.Routes, want)
	}
	want := []sandbox.Sandbox{
		{ID: "s1", Netns: "/run/netns/cni-1", Cgroup: "/kubepods/c"}, // its process has ended, and the number may be another one's
		{ID: "s2", Ready: true, PID: 77, Netns: "/run/netns/cni-1", IPs: []netip.Addr{podAddress}, Cgroup: "/kubepods/c"},
	}
	if !reflect.DeepEqual(report.Sandboxes, want) {
		t.Errorf("sandboxes %+v, want %+v", report.Sandboxes, want)
	}
}

// Of all sandboxes of the node, those of the pod that are new are its own, with their containers, and the others are somebody else's.
func TestTakeOthers(t *testing.T) {
	known, late := podSandbox{id: "s1", pod: sandbox.Pod{UID: podUID}}, podSandbox{id: "s2", pod: sandbox.Pod{UID: podUID}}
	others := podSandbox{id: "s3", pod: sandbox.Pod{UID: otherUID}}
	e := evidence{records: podRecords{sandboxes: []podSandbox{known}, containers: []podContainer{{id: "c1", sandboxID: "s1"}}}}
	got := e.takeOthers(podUID, podRecords{
		sandboxes:  []podSandbox{known, late, others},
		containers: []podContainer{{id: "c1", sandboxID: "s1"}, {id: "c2", sandboxID: "s2"}, {id: "c3", sandboxID: "s3"}},
	})
	want := evidence{
		records: podRecords{sandboxes: []podSandbox{known, late}, containers: []podContainer{{id: "c1", sandboxID: "s1"}, {id: "c2", sandboxID: "s2"}}},
		others:  []podSandbox{others},
	}
	if !reflect.DeepEqual(got, []podSandbox{late}) || !reflect.DeepEqual(e, want) {
		t.Errorf("got %+v, and %+v", got, e)
	}
}

// A quick look does not see the namespaces that only processes keep: a device of the host may lead to one of those.
func TestAQuickLookMissesNoNamespace(t *testing.T) {
	e := evidence{how: quick, paths: hostPaths{routes: []hostRoute{{ip: podAddress, device: "cali1", table: 254, peer: true}}}}
	check(t, sandbox.Query{UID: podUID, IPs: []netip.Addr{podAddress}}, e, "", nil, sandbox.Released, nil, nil, nil)
}

func check(t *testing.T, query sandbox.Query, e evidence, at string, strangers []podProcess, verdict sandbox.Verdict, findings, failures, conflicts []string) {
	t.Helper()
	sandboxes := map[string]podSandbox{}
	if at != "" {
		sandboxes[at] = e.records.sandboxes[0]
	}
	c := e.claims(query, sandboxes)
	if len(e.strangers(c)) == 0 {
		strangers = nil
	}
	report := judge(query, e, c, strangers)
	if report.Verdict() != verdict {
		t.Errorf("verdict %s, want %s", report.Verdict(), verdict)
	}
	var got, gotConflicts []string
	for _, f := range report.Findings {
		got = append(got, f.String())
	}
	for _, c := range report.Conflicts {
		gotConflicts = append(gotConflicts, c.String())
	}
	for _, list := range []struct {
		of        string
		got, want []string
	}{{"findings", got, findings}, {"failures", report.Failures(), failures}, {"conflicts", gotConflicts, conflicts}} {
		if !reflect.DeepEqual(list.got, list.want) {
			t.Errorf("%s %q, want %q", list.of, list.got, list.want)
		}
	}
}

// The runtime is asked for all sandboxes only where that can change what follows.
func TestOwnersMatter(t *testing.T) {
	mount := netNamespace{id: "net:[7]", paths: []string{"/run/netns/cni-00000000-0000-0000-0000-000000000001"}, addresses: []assignment{{podAddress, "eth0"}}}
	someones := netNamespace{id: "net:[8]", paths: []string{"/run/netns/x"}}
	query := sandbox.Query{UID: podUID, IPs: []netip.Addr{podAddress}}
	for _, test := range []struct {
		name      string
		query     sandbox.Query
		e         evidence
		sandboxes map[string]podSandbox
		want      bool
	}{
		{"no namespace", query, evidence{}, nil, false},
		{"one with the address that seems nobody's", query, evidence{view: nodeView{namespaces: []netNamespace{mount}}}, nil, true},
		{"one with the address that is the pod's by its sandbox", query, evidence{view: nodeView{namespaces: []netNamespace{mount}}}, map[string]podSandbox{"net:[7]": {}}, false},
		{"one without the address", sandbox.Query{UID: podUID}, evidence{view: nodeView{namespaces: []netNamespace{mount}}}, nil, false},
		{"one that a sandbox in the making could have", sandbox.Query{UID: podUID}, evidence{view: nodeView{namespaces: []netNamespace{mount}}, members: podMembers{exist: true}}, nil, true},
		{"one that none could have", sandbox.Query{UID: podUID}, evidence{view: nodeView{namespaces: []netNamespace{someones}}, members: podMembers{exist: true}}, nil, false},
		{"one that a sandbox in the making could have, of a pod that is found anyway", sandbox.Query{UID: podUID},
			evidence{view: nodeView{namespaces: []netNamespace{mount}}, members: podMembers{exist: true}, processes: []podProcess{{}}}, nil, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			if got := test.e.ownersMatter(test.query, test.sandboxes); got != test.want {
				t.Errorf("got %v", got)
			}
		})
	}
}
