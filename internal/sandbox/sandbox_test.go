package sandbox

import (
	"encoding/json"
	"net/netip"
	"reflect"
	"strings"
	"testing"
	"time"
)

func ran(names ...ProbeName) []Probe {
	var probes []Probe
	for _, name := range names {
		probes = append(probes, Probe{Name: name})
	}
	return probes
}

func TestVerdict(t *testing.T) {
	finding := []Finding{{Kind: NetnsOpen, Netns: "/run/netns/cni-1"}}
	for name, test := range map[string]struct {
		report Report
		want   Verdict
	}{
		"nothing at all decides nothing":              {Report{}, Unknown},
		"all probes ran and found nothing":            {Report{Probes: ran(Required...)}, Released},
		"a finding binds":                             {Report{Probes: ran(Required...), Findings: finding}, Bound},
		"a finding binds though every probe failed":   {Report{Findings: finding}, Bound},
		"the runtime is missing":                      {Report{Probes: ran(ProbeCgroups, ProbeProcesses, ProbeNetns)}, Unknown},
		"the cgroups are missing":                     {Report{Probes: ran(ProbeRuntime, ProbeProcesses, ProbeNetns)}, Unknown},
		"the processes are missing":                   {Report{Probes: ran(ProbeRuntime, ProbeCgroups, ProbeNetns)}, Unknown},
		"the namespaces are missing":                  {Report{Probes: ran(ProbeRuntime, ProbeCgroups, ProbeProcesses)}, Unknown},
		"a probe failed":                              {Report{Probes: append(ran(ProbeRuntime, ProbeCgroups, ProbeProcesses), Probe{Name: ProbeNetns, Error: "no"})}, Unknown},
		"a probe of another name is no substitute":    {Report{Probes: append(ran(ProbeRuntime, ProbeCgroups, ProbeProcesses), Probe{Name: "other"})}, Unknown},
		"a probe that a newer agent has does no harm": {Report{Probes: append(ran(Required...), Probe{Name: "other", Error: "no"})}, Released},
	} {
		t.Run(name, func(t *testing.T) {
			if got := test.report.Verdict(); got != test.want {
				t.Errorf("verdict %q, want %q", got, test.want)
			}
		})
	}
}

func TestFailuresNameEveryProbeThatDidNotRun(t *testing.T) {
	report := Report{Probes: []Probe{{Name: ProbeRuntime, Error: "connection refused"}, {Name: ProbeCgroups}, {Name: ProbeProcesses}}}
	want := []string{
		`the probe "runtime" did not run: connection refused`,
		`the probe "netns" is missing from the agent's answer`,
	}
	if got := report.Failures(); !reflect.DeepEqual(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestSortPutsTheUnkillableProcessFirst(t *testing.T) {
	report := Report{Findings: []Finding{
		{Kind: NetnsOpen}, {Kind: IPAssigned}, {Kind: SandboxReady}, {Kind: ContainerRunning},
		{Kind: ProcessAlive, Process: &Process{State: "S"}}, {Kind: ProcessAlive, Process: &Process{State: "D"}},
	}}
	report.Sort()
	var got []string
	for _, f := range report.Findings {
		text := string(f.Kind)
		if f.Process != nil {
			text += f.Process.State
		}
		got = append(got, text)
	}
	want := "ProcessAliveD ContainerRunning ProcessAliveS SandboxReady IPAssigned NetnsOpen"
	if strings.Join(got, " ") != want {
		t.Errorf("order %q, want %q", got, want)
	}
}

func TestFindingInPlainWords(t *testing.T) {
	for want, finding := range map[string]Finding{
		"process 42 (cat) is in state D (uninterruptible sleep) in request_wait_answer": {
			Kind: ProcessAlive, Process: &Process{PID: 42, Command: "cat", State: "D", WaitChannel: "request_wait_answer"}},
		"process 42 (cat) is in state R":      {Kind: ProcessAlive, Process: &Process{PID: 42, Command: "cat", State: "R"}},
		"process 42 (a?b?[2Kc) is in state R": {Kind: ProcessAlive, Process: &Process{PID: 42, Command: "a\nb\x1b[2Kc", State: "R"}},
		"process 42 (nc), in the pod's network namespace but not in its cgroup, is in state S": {
			Kind: ProcessAlive, Process: &Process{PID: 42, Command: "nc", State: "S", Outside: true}},
		"process 42 (nc) is frozen by its cgroup (state D)": {
			Kind: ProcessAlive, Process: &Process{PID: 42, Command: "nc", State: "D", WaitChannel: "hrtimer_nanosleep", Frozen: true}},
		"the other end of the host's device cali1, which leads to 10.0.0.1, is in a network namespace that does not show": {
			Kind: PeerOpen, Interface: "cali1", IP: netip.MustParseAddr("10.0.0.1")},
		"a process is alive":                                                {Kind: ProcessAlive},
		"container web (0123456789abc) is running":                          {Kind: ContainerRunning, ContainerName: "web", Container: "0123456789abcdef"},
		"sandbox 0123456789abc is ready":                                    {Kind: SandboxReady, Sandbox: "0123456789abcdef"},
		"address 10.0.0.1 is on eth0 in network namespace /run/netns/cni-1": {Kind: IPAssigned, IP: netip.MustParseAddr("10.0.0.1"), Interface: "eth0", Netns: "/run/netns/cni-1"},
		"network namespace net:[7] is open":                                 {Kind: NetnsOpen, Netns: "net:[7]"},
		"SomethingNew":                                                      {Kind: "SomethingNew"},
	} {
		if got := finding.String(); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}

func TestQueryValidate(t *testing.T) {
	valid := Query{Node: "n", Namespace: "ns", Name: "p", UID: "8c3f5a52-0d3c-4d0e-9d3e-0123456789ab", IPs: []netip.Addr{netip.MustParseAddr("10.0.0.1")}}
	for _, test := range []struct {
		name   string
		change func(*Query)
		want   string
	}{
		{"valid", func(*Query) {}, ""},
		{"no addresses", func(q *Query) { q.IPs = nil }, ""},
		{"the UID of a static pod", func(q *Query) { q.UID = "0a1b2c3d4e5f60718293a4b5c6d7e8f9" }, ""},
		{"no node", func(q *Query) { q.Node = "" }, `field "node" is empty`},
		{"no UID", func(q *Query) { q.UID = "" }, `field "uid" is empty`},
		{"a UID that climbs", func(q *Query) { q.UID = "../x" }, `field "uid": "../x" is not the UID of a pod`},
		{"a long name", func(q *Query) { q.Name = strings.Repeat("x", 254) }, `field "name" has 254 characters, at most 253 are allowed`},
		{"an empty address", func(q *Query) { q.IPs = []netip.Addr{{}} }, `field "ips" has an empty address`},
		{"too many addresses", func(q *Query) { q.IPs = make([]netip.Addr, 17) }, `field "ips" has 17 addresses, at most 16 are allowed`},
	} {
		t.Run(test.name, func(t *testing.T) {
			query := valid
			test.change(&query)
			got := ""
			if err := query.Validate(); err != nil {
				got = err.Error()
			}
			if got != test.want {
				t.Errorf("got %q, want %q", got, test.want)
			}
		})
	}
}

// The wire format is a contract between versions of webhook and agent: a field renamed here breaks a rolling update.
func TestWireFormat(t *testing.T) {
	report := Report{
		Node: "n", UID: "u",
		Probes: []Probe{{Name: ProbeRuntime}, {Name: ProbeNetns, Error: "e"}},
		Findings: []Finding{
			{Kind: ProcessAlive, Process: &Process{PID: 1, Command: "c", State: "D", WaitChannel: "w", Stack: []string{"f"}, Started: time.Unix(0, 0).UTC(), Frozen: true, Outside: true}},
			{Kind: IPAssigned, Sandbox: "s", Netns: "/run/netns/x", IP: netip.MustParseAddr("fd00::1"), Interface: "eth0"},
		},
		Sandboxes: []Sandbox{{ID: "s", Ready: true, PID: 2, Netns: "/run/netns/x", IPs: []netip.Addr{netip.MustParseAddr("fd00::1")}, Cgroup: "/kubepods"}},
		Conflicts: []Conflict{{IP: netip.MustParseAddr("fd00::1"), Netns: "/run/netns/y", Pod: Pod{Namespace: "a", Name: "b", UID: "v"}}},
		Routes:    []string{"r"},
	}
	const want = `{"node":"n","uid":"u","probes":[{"name":"runtime"},{"name":"netns","error":"e"}],"findings":[` +
		`{"kind":"ProcessAlive","process":{"pid":1,"command":"c","state":"D","waitChannel":"w","stack":["f"],"started":"1970-01-01T00:00:00Z","frozen":true,"outsideCgroup":true}},` +
		`{"kind":"IPAssigned","sandbox":"s","netns":"/run/netns/x","ip":"fd00::1","interface":"eth0"}],` +
		`"sandboxes":[{"id":"s","ready":true,"pid":2,"netns":"/run/netns/x","ips":["fd00::1"],"cgroup":"/kubepods"}],` +
		`"conflicts":[{"ip":"fd00::1","netns":"/run/netns/y","pod":{"namespace":"a","name":"b","uid":"v"}}],"routes":["r"]}`
	got, err := json.Marshal(report)
	if err != nil {
		t.Fatal(err)
	}
	if string(got) != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	var back Report
	if err := json.Unmarshal(got, &back); err != nil || !reflect.DeepEqual(back, report) {
		t.Errorf("read back %+v (%v), want %+v", back, err, report)
	}
}
