package agent

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/eni-guard/eni-guard/internal/sandbox"
)

// twoPods is a node with a pod that lives, and one of which something is left.
func twoPods() survey {
	const path1, path2 = "/run/netns/cni-00000000-0000-0000-0000-000000000001", "/run/netns/cni-00000000-0000-0000-0000-000000000002"
	live := podSandbox{id: "s1", pod: sandbox.Pod{Namespace: "shop", Name: "web-0", UID: podUID}, ready: true, details: details{netnsPath: path1}}
	stuck := podSandbox{id: "s2", pod: sandbox.Pod{Namespace: "shop", Name: "web-0", UID: otherUID}, details: details{netnsPath: path2}}
	return survey{
		records: podRecords{sandboxes: []podSandbox{live, stuck}, containers: []podContainer{{"c1", "app", "s1"}}},
		members: map[string][]int{podUID: {10, 11}, otherUID: {20}},
		view: nodeView{host: "net:[1]", namespaces: []netNamespace{
			{id: "net:[7]", paths: []string{path1}, tasks: leaders([]int{10, 11}), addresses: []assignment{{podAddress, "eth0"}}},
			{id: "net:[8]", paths: []string{path2}, tasks: leaders([]int{20, 21}), addresses: []assignment{{podAddress, "eth0"}, {podIPv6, "eth0"}}},
		}},
		probes: []sandbox.Probe{{Name: sandbox.ProbeRuntime}, {Name: sandbox.ProbeCgroups}, {Name: sandbox.ProbeProcesses}, {Name: sandbox.ProbeNetns}},
	}
}

func TestTraces(t *testing.T) {
	var got []string
	for _, trace := range twoPods().traces() {
		got = append(got, trace.Pod.String())
		for _, f := range trace.Findings {
			text := string(f.Kind)
			if f.Process != nil {
				text += fmt.Sprint(" ", f.Process.PID, " outside ", f.Process.Outside)
			}
			if f.IP.IsValid() {
				text += " " + f.IP.String()
			}
			got = append(got, "  "+text)
		}
	}
	want := []string{
		"shop/web-0 (UID " + otherUID + ")",
		"  NetnsOpen", "  IPAssigned 10.0.0.5", "  IPAssigned fd00::5", "  ProcessAlive 20 outside false", "  ProcessAlive 21 outside true",
		"shop/web-0 (UID " + podUID + ")",
		"  SandboxReady", "  ContainerRunning", "  NetnsOpen", "  IPAssigned 10.0.0.5", "  ProcessAlive 10 outside false", "  ProcessAlive 11 outside false",
	}
	if !slices.Equal(got, want) {
		t.Errorf("got  %q\nwant %q", got, want)
	}
}

// Whether a process is in its pod's cgroups nobody knows who could not read them.
func TestWithoutCgroupsNobodyIsOutside(t *testing.T) {
	s := twoPods()
	s.probes[1].Error, s.members = "not readable", nil
	for _, trace := range s.traces() {
		for _, f := range trace.Findings {
			if f.Process != nil && f.Process.Outside {
				t.Errorf("process %d of pod %s is told to be outside", f.Process.PID, trace.Pod)
			}
		}
	}
	strangers := []podProcess{{Process: sandbox.Process{PID: 44, Command: "nc", State: "S"}, netns: "net:[7]"}}
	for _, err := range []error{nil, errProbe} {
		report := judge(sandbox.Query{UID: podUID}, evidence{cgroupsErr: err}, claims{}, strangers)
		if len(report.Findings) != 1 || report.Findings[0].Process.Outside != (err == nil) {
			t.Errorf("cgroups read: %v: got %v", err, report.Findings)
		}
	}
}

// Each probe has its part in a look at the whole node; one that fails is named, and the others are not lost.
func TestSurvey(t *testing.T) {
	name := fmt.Sprintf("eni-guard-test-survey-%d", os.Getpid())
	namedNamespace(t, name)
	path := filepath.Join(netnsDir, name)
	broken := func(file string) func(h recordedHost) {
		return func(h recordedHost) { h.write(filepath.Dir(h.Proc), file, "garbage") }
	}
	for _, test := range []struct {
		name   string
		change func(h recordedHost)
		err    error // of the runtime
		failed sandbox.ProbeName
	}{
		{"all is well", func(recordedHost) {}, nil, ""},
		{"the runtime is down", func(recordedHost) {}, errProbe, sandbox.ProbeRuntime},
		{"a cgroup cannot be read", func(h recordedHost) { h.write(h.Cgroup, "kubepods/pod"+podUID+"/c1/cgroup.procs", "garbage") }, nil, sandbox.ProbeCgroups},
		{"a process cannot be read", broken("proc/43/ns/net"), nil, sandbox.ProbeProcesses},
		{"the mount table cannot be read", broken("proc/thread-self/mountinfo"), nil, sandbox.ProbeNetns},
	} {
		t.Run(test.name, func(t *testing.T) {
			h := lookable(t, path)
			h.group("kubepods/pod"+podUID+"/c1", pid)
			h.process(43, "java", "S", "x", "net:[7]")
			test.change(h)
			s := newInspector("node-a", h.Host, fakeRuntime(func(context.Context, string) (podRecords, error) {
				return podRecords{sandboxes: []podSandbox{{id: "s1"}}}, test.err
			})).survey(t.Context())
			for _, probe := range s.probes {
				if failed := probe.Error != ""; failed != (probe.Name == test.failed) {
					t.Errorf("probe %s: %q", probe.Name, probe.Error)
				}
			}
			if len(s.probes) != 4 || s.runtimeAnswered() != (test.err == nil) || len(s.records.sandboxes) != 1 {
				t.Errorf("got %+v", s)
			}
			if members := s.members[podUID]; test.failed != sandbox.ProbeCgroups && !slices.Equal(members, []int{pid}) {
				t.Errorf("in the pod's cgroup are %v", members)
			}
			if found := s.view.mountedAt(path) != ""; found != (test.failed != sandbox.ProbeNetns) {
				t.Errorf("the namespace is seen: %v", found)
			}
		})
	}
}

// A namespace is that pod's for whose sandbox it is recorded, whoever is in it; without a record, that of what is in it, if that has not
// come from a pod whose sandbox has a namespace of its own.
func TestWhoseANamespaceIs(t *testing.T) {
	const thirdUID = "22222222-2222-3333-4444-555555555555"
	for _, test := range []struct {
		name   string
		change func(s *survey)
		owner  string
	}{
		{"recorded, with nothing in it", func(s *survey) { s.view.namespaces[1].tasks = nil }, otherUID + " s2"},
		{"recorded, with a process of another pod in it", func(s *survey) { s.view.namespaces[1].tasks = leaders([]int{10}) }, otherUID + " s2"},
		{"not recorded any more", func(s *survey) { s.records.sandboxes = s.records.sandboxes[:1] }, otherUID + " "},
		{"not recorded any more, with a process of a pod that is recorded in it", func(s *survey) {
			s.records.sandboxes = s.records.sandboxes[:1]
			s.view.namespaces[1].tasks = leaders([]int{20, 10})
		}, otherUID + " "},
		{"not recorded any more, with that one first", func(s *survey) {
			s.records.sandboxes = s.records.sandboxes[:1]
			s.view.namespaces[1].tasks = leaders([]int{10, 20})
		}, otherUID + " "},
		{"not recorded any more, with processes of two such pods in it", func(s *survey) {
			s.records.sandboxes, s.members[thirdUID] = s.records.sandboxes[:1], []int{30}
			s.view.namespaces[1].tasks = leaders([]int{20, 30})
		}, otherUID + " "},
		{"not recorded any more, with a process of no pod in it too", func(s *survey) {
			s.records.sandboxes = s.records.sandboxes[:1]
			s.view.namespaces[1].tasks = leaders([]int{10, 99})
		}, podUID + " "},
		{"not recorded any more, with nothing in it", func(s *survey) {
			s.records.sandboxes = s.records.sandboxes[:1]
			s.view.namespaces[1].tasks = nil
		}, " "},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := twoPods()
			test.change(&s)
			path := s.view.namespaces[1].name()
			var got []string
			for _, trace := range s.traces() {
				for _, f := range trace.Findings {
					if f.Kind == sandbox.NetnsOpen && f.Netns == path {
						got = append(got, trace.Pod.UID+" "+f.Sandbox)
					}
				}
			}
			if !slices.Equal(got, []string{test.owner}) {
				t.Errorf("it is %q's, not %q's", got, test.owner)
			}
		})
	}
}

func TestLeftovers(t *testing.T) {
	livePod := func(uid string) bool { return uid == podUID }
	both := func(string) bool { return true }
	mount := func(path string, ips ...netip.Addr) netNamespace {
		n := netNamespace{id: "net:[9]", paths: []string{path}}
		for _, ip := range ips {
			n.addresses = append(n.addresses, assignment{ip, "eth0"})
		}
		return n
	}
	const runtimes = "/run/netns/cni-00000000-0000-0000-0000-000000000009"
	other := netip.MustParseAddr("10.0.0.99")
	for _, test := range []struct {
		name   string
		change func(s *survey)
		known  func(string) bool
		want   []string // who, and why
	}{
		{"the API server has both pods", func(*survey) {}, both, nil},
		{"the API server has one of them", func(*survey) {}, livePod, []string{otherUID + " " + leftoverOfGonePod}},
		{"of the other one only a record is left", func(s *survey) { s.view.namespaces = s.view.namespaces[:1] }, livePod, nil},
		{"the other one is a static pod", func(s *survey) { s.records.sandboxes[1].static = true }, livePod, nil},
		{"the other one is on the host's network", func(s *survey) {
			s.records.sandboxes[1].netnsPath = ""
			s.view.namespaces = s.view.namespaces[:1]
		}, livePod, nil},
		{"the record of the other one is gone, a process is not", func(s *survey) { s.records.sandboxes = s.records.sandboxes[:1] }, livePod,
			[]string{otherUID + " " + leftoverOfGonePod}},
		{"the API server cannot be asked", func(*survey) {}, nil, nil},
		{"the API server cannot be asked, and a record is gone", func(s *survey) { s.records.sandboxes = s.records.sandboxes[:1] }, nil,
			[]string{otherUID + " " + leftoverNoSandbox}},
		{"neither the API server nor the runtime can be asked", func(s *survey) { s.records, s.probes = podRecords{}, s.probes[1:] }, nil, nil},
		{"a namespace that a runtime made, of nobody", func(s *survey) { s.view.namespaces = append(s.view.namespaces, mount(runtimes)) }, both,
			[]string{" " + leftoverOfNobody}},
		{"as CRI-O names it", func(s *survey) {
			s.view.namespaces = append(s.view.namespaces, mount("/run/netns/00000000-0000-0000-0000-000000000009"))
		}, both, []string{" " + leftoverOfNobody}},
		{"the same, but the runtime cannot be asked", func(s *survey) {
			s.view.namespaces, s.probes = append(s.view.namespaces, mount(runtimes)), s.probes[1:]
		}, both, nil},
		{"a namespace of something else, with a pod's address", func(s *survey) { s.view.namespaces = append(s.view.namespaces, mount("/run/netns/x", podAddress)) }, both,
			[]string{" " + leftoverOtherOwner}},
		{"a namespace of something else, with an address that pods have within them", func(s *survey) {
			for n := range 2 {
				s.records.sandboxes[n].ips = []netip.Addr{podAddress}
				s.view.namespaces[n].addresses = append(s.view.namespaces[n].addresses, assignment{other, "docker0"})
			}
			s.view.namespaces = append(s.view.namespaces, mount("/run/netns/x", other))
		}, both, nil},
		{"a namespace of something else", func(s *survey) { s.view.namespaces = append(s.view.namespaces, mount("/run/netns/x", other)) }, both, nil},
		{"the same, and the API server has one of the pods", func(s *survey) { s.view.namespaces = append(s.view.namespaces, mount("/run/netns/x", other)) }, livePod,
			[]string{otherUID + " " + leftoverOfGonePod}},
		{"the API server has a pod whose record is gone", func(s *survey) { s.records.sandboxes = s.records.sandboxes[:1] }, both, nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := twoPods()
			test.change(&s)
			var got []string
			for _, l := range leftovers(s.traces(), s.runtimeAnswered(), test.known) {
				got = append(got, l.Pod.UID+" "+l.Leftover)
			}
			if !slices.Equal(got, test.want) {
				t.Errorf("got %q, want %q", got, test.want)
			}
		})
	}
}

func TestSharedAddresses(t *testing.T) {
	s := twoPods()
	// Networks of something else may well use the same addresses among themselves.
	for _, id := range []string{"net:[20]", "net:[21]"} {
		s.view.namespaces = append(s.view.namespaces, netNamespace{id: id, addresses: []assignment{{netip.MustParseAddr("172.17.0.2"), "eth0"}}})
	}
	got := sharedAddresses(s.traces())
	if len(got) != 1 || got[0].IP != podAddress || len(got[0].Holders) != 2 || got[0].Holders[0].Pod.UID != otherUID || got[0].Holders[1].Pod.UID != podUID {
		t.Errorf("got %+v", got)
	}
}

// Which addresses count as a pod's: those on the devices of its sandbox, and those that the runtime tells; not those of networks within it.
func TestAddressesThatPodsWereGiven(t *testing.T) {
	ip := netip.MustParseAddr("172.17.0.1")
	both := func(device string) func(s *survey) {
		return func(s *survey) {
			for n := range s.view.namespaces[:2] {
				s.view.namespaces[n].addresses = append(s.view.namespaces[n].addresses, assignment{ip, device})
			}
		}
	}
	for _, test := range []struct {
		name   string
		change func(s *survey)
		given  bool
	}{
		{"on a bridge in each", both("docker0"), false},
		{"on a virtual machine's in each", both("k6t-eth0"), false},
		{"on a second device in each", both("eth1"), true},
		{"on one of Multus in each", both("net1"), true},
		{"on loopback in each", both("lo"), false},
		{"the same, and the runtime tells of one", func(s *survey) { both("lo")(s); s.records.sandboxes[0].ips = []netip.Addr{podAddress, ip} }, true},
		{"on eth0 of containers in their containers", func(s *survey) {
			s.view.namespaces = append(s.view.namespaces,
				netNamespace{id: "net:[20]", tasks: leaders([]int{11}), addresses: []assignment{{ip, "eth0"}}},
				netNamespace{id: "net:[21]", tasks: leaders([]int{20}), addresses: []assignment{{ip, "eth0"}}})
		}, false},
		{"on eth0 of namespaces that a runtime made and are nobody's", func(s *survey) {
			for n := range 2 {
				s.view.namespaces = append(s.view.namespaces, netNamespace{
					id: fmt.Sprintf("net:[%d]", 30+n), paths: []string{fmt.Sprintf("/run/netns/cni-00000000-0000-0000-0000-00000000003%d", n)}, addresses: []assignment{{ip, "eth0"}},
				})
			}
		}, true},
	} {
		for _, answered := range []bool{true, false} {
			s := twoPods()
			test.change(&s)
			if !answered && len(s.records.sandboxes[0].ips) > 0 {
				continue
			}
			if !answered {
				s.records, s.probes[0].Error = podRecords{}, "no answer"
			}
			told := map[netip.Addr]int{}
			for _, shared := range sharedAddresses(s.traces()) {
				told[shared.IP] = timesInUse(shared.Holders, shared.IP)
			}
			// The address of both pods is told of whoever answers.
			if told[podAddress] != 2 || (told[ip] == 2) != test.given {
				t.Errorf("%s, the runtime answers: %t: got %v", test.name, answered, told)
			}
			holders := slices.DeleteFunc(s.traces(), func(t Trace) bool { return !slices.Contains(t.addresses, ip) })
			if len(holders) == 0 || conflict(holders, ip) != test.given {
				t.Errorf("%s, the runtime answers: %t: who asks for %s gets %+v", test.name, answered, ip, holders)
			}
		}
	}
}

// A pod whose sandbox was made anew may have the same address in the old namespace and in the new one.
func TestAnAddressTwiceInOnePod(t *testing.T) {
	s := twoPods()
	s.records.sandboxes[1].pod = s.records.sandboxes[0].pod
	s.members[podUID] = []int{10, 11, 20, 21}
	delete(s.members, otherUID)
	got := sharedAddresses(s.traces())
	if len(got) != 1 || got[0].IP != podAddress || len(got[0].Holders) != 1 || timesInUse(got[0].Holders, podAddress) != 2 {
		t.Errorf("got %+v", got)
	}
	if text := (answer{IP: podAddress, Holders: got[0].Holders, Conflict: true}).text(noon); !strings.Contains(text, "in use 2 times, CONFLICT") {
		t.Errorf("it is told as %s", text)
	}
}

// What a trace's processes do is read when it is told: of those that are still there, the most telling first.
func TestDescribed(t *testing.T) {
	h := lookable(t)
	h.process(20, "sh", "S", "x", "net:[8]")
	h.process(21, "dd", "D", "nfs_wait", "net:[8]")
	h.process(22, "crictl", "S", "x", "net:[1]") // it has left
	s := twoPods()
	s.view.namespaces[1].tasks = leaders([]int{20, 21, 22, 23})
	i := newInspector("node-a", h.Host, fakeRuntime(knowsNothing))
	described, err := i.described(t.Context(), s, s.traces()[0])
	var got []string
	for _, f := range described.Findings {
		got = append(got, f.String())
	}
	const path = "/run/netns/cni-00000000-0000-0000-0000-000000000002"
	want := []string{
		"process 21 (dd), in the pod's network namespace but not in its cgroup, is in state D (uninterruptible sleep) in nfs_wait", "process 20 (sh) is in state S in x",
		"address 10.0.0.5 is on eth0 in network namespace " + path, "address fd00::5 is on eth0 in network namespace " + path, "network namespace " + path + " is open",
	}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("got %q, want %q (%v)", got, want, err)
	}
}

// Two namespaces may show under one path, where one covers the other.
func TestTwoNamespacesOfOnePath(t *testing.T) {
	s := twoPods()
	s.view.namespaces[1].paths = s.view.namespaces[0].paths
	i := newInspector("node-a", lookable(t).Host, fakeRuntime(knowsNothing))
	for _, trace := range s.traces() {
		if _, err := i.described(t.Context(), s, trace); err != nil {
			t.Error(err)
		}
	}
}

// The kernel gives the inode of a namespace that has ended to the next one: that is another one. And one of nobody may be that of a
// sandbox in the making, for as long as the runtime may take for that.
func TestNamespacesOfNobodyAreGivenTime(t *testing.T) {
	nobodys := func(path string) []Trace {
		s := survey{view: nodeView{namespaces: []netNamespace{{id: "net:[9]", paths: []string{path}}}}}
		return leftovers(s.traces(), true, func(string) bool { return true })
	}
	const first, second = "/run/netns/cni-00000000-0000-0000-0000-000000000001", "/run/netns/cni-00000000-0000-0000-0000-000000000002"
	s := newRecordedSweeper()
	for _, step := range []struct {
		after time.Duration
		path  string
		due   int
	}{
		{0, first, 0},
		{2 * time.Minute, first, 0},
		{4 * time.Minute, second, 0},
		{6 * time.Minute, second, 0},
		{9 * time.Minute, second, 1},
	} {
		if due, _ := s.due(noon.Add(step.after), nobodys(step.path), true); len(due) != step.due {
			t.Errorf("after %s: %d are due", step.after, len(due))
		}
	}
}
