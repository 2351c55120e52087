package agent

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"

	"github.com/eni-guard/eni-guard/internal/exitstatus"
	"github.com/eni-guard/eni-guard/internal/sandbox"
)

var update = flag.Bool("update", false, "write the golden files anew")

// What people read, word by word.
func TestInspectInPlainWords(t *testing.T) {
	now := time.Date(2026, 11, 24, 22, 0, 0, 0, time.UTC)
	stuck := sandbox.Finding{Kind: sandbox.ProcessAlive, Netns: "/run/netns/cni-1", Process: &sandbox.Process{
		PID: 4242, Command: "dd", State: "D", WaitChannel: "request_wait_answer", Stack: []string{"request_wait_answer", "fuse_simple_request", "fuse_file_read_iter"},
		Started: now.Add(-time.Hour),
	}}
	assigned := sandbox.Finding{Kind: sandbox.IPAssigned, Netns: "/run/netns/cni-1", IP: podAddress, Interface: "eth0"}
	open := sandbox.Finding{Kind: sandbox.NetnsOpen, Netns: "/run/netns/cni-1"}
	pod := sandbox.Pod{Namespace: "shop", Name: "web-0", UID: podUID}
	record := sandbox.Sandbox{ID: "0123456789abcdef", Ready: true, PID: 4200, Netns: "/run/netns/cni-1", IPs: []netip.Addr{podAddress}, Cgroup: "/kubepods/pod" + podUID + "/0123"}
	left := Trace{Pod: pod, Leftover: leftoverOfGonePod, Findings: []sandbox.Finding{stuck, assigned, open}}
	holder := left
	holder.Leftover = "" // who has an address is not compared with the API server's pods
	next := Trace{
		Pod:       sandbox.Pod{Namespace: "shop", Name: "web-0", UID: otherUID},
		Findings:  []sandbox.Finding{{Kind: sandbox.SandboxReady, Sandbox: "fedcba"}, {Kind: sandbox.IPAssigned, Netns: "/run/netns/cni-2", IP: podAddress, Interface: "eth0"}},
		Sandboxes: []sandbox.Sandbox{{ID: "fedcba", Ready: true, Netns: "/run/netns/cni-2", IPs: []netip.Addr{podAddress}}},
	}
	for name, a := range map[string]answer{
		"pod-bound": {
			Node: "node-1", Pods: map[string]sandbox.Pod{podUID: pod},
			Reports: []sandbox.Report{{
				UID: podUID, Findings: []sandbox.Finding{stuck, {Kind: sandbox.SandboxReady, Sandbox: record.ID}, assigned, open}, Sandboxes: []sandbox.Sandbox{record},
				Conflicts: []sandbox.Conflict{{IP: podAddress, Netns: "/run/netns/cni-2", Pod: next.Pod}},
				Routes:    []string{"route to 10.0.0.5 via cali1 in table 254"},
			}},
		},
		"pod-released": {
			Node: "node-1", Pods: map[string]sandbox.Pod{podUID: {UID: podUID}}, Verdict: sandbox.Released,
			Reports: []sandbox.Report{{UID: podUID, Probes: []sandbox.Probe{{Name: sandbox.ProbeRuntime}, {Name: sandbox.ProbeCgroups}, {Name: sandbox.ProbeProcesses}, {Name: sandbox.ProbeNetns}}}},
		},
		"pod-unknown": {
			Node: "node-1", Pods: map[string]sandbox.Pod{podUID: {UID: podUID}}, Reports: []sandbox.Report{{UID: podUID}},
			Failures: []string{`the probe "runtime" did not run: connection refused`},
		},
		"address-free":     {Node: "node-1", Verdict: sandbox.Released, IP: podAddress, Probes: []sandbox.Probe{{Name: sandbox.ProbeRuntime}, {Name: sandbox.ProbeNetns}}},
		"address-in-use":   {Node: "node-1", Verdict: sandbox.Bound, IP: podAddress, Holders: []Trace{holder}, Routes: []string{"rule 512 to 10.0.0.5"}},
		"address-conflict": {Node: "node-1", Verdict: sandbox.Bound, IP: podAddress, Holders: []Trace{holder, next}, Conflict: true},
		"address-in-pods":  {Node: "node-1", Verdict: sandbox.Bound, IP: podAddress, Holders: []Trace{holder, next}},
		"all":              {Node: "node-1", All: true, Leftovers: []Trace{left}, Shared: []SharedAddress{{podAddress, []Trace{left, next}}}},
		"all-nothing":      {Node: "node-1", All: true, ComparedBy: "kubeconfig /etc/kubernetes/kubelet.conf"},
		"all-not-compared": {
			Node: "node-1", Verdict: sandbox.Unknown, All: true, ComparedBy: "kubeconfig /etc/kubernetes/kubelet.conf", NotCompared: "connection refused",
			Failures: []string{`the probe "runtime" did not run: connection refused`}, NextStep: "there is no /run/x.sock; name the socket",
		},
	} {
		t.Run(name, func(t *testing.T) {
			got := a.text(now)
			file := filepath.Join("testdata", "inspect", name+".txt")
			if *update {
				if err := os.WriteFile(file, []byte(got), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if got != string(want) {
				t.Errorf("got:\n%s\nwant:\n%s(go test ./internal/agent -run InspectInPlainWords -update writes it)", got, want)
			}
		})
	}
}

func TestInspectNamesWhatIsWrong(t *testing.T) {
	for args, want := range map[string]string{
		"":                      "name one of --pod, --uid, --ip and --all",
		"--pod=":                "--pod is empty",
		"--uid=":                "--uid is empty",
		"--ip=":                 "--ip is empty",
		"--all --ip=":           "--ip is empty",
		"--all --ip=10.0.0.1":   "name one of --pod, --uid, --ip and --all",
		"--pod=web-0":           `--pod "web-0" is not NAMESPACE/NAME`,
		"--pod=a/b/c":           `--pod "a/b/c" is not NAMESPACE/NAME`,
		"--uid=../x":            `--uid "../x" is not the UID of a pod, in full`,
		"--uid=8c3f5a52":        `--uid "8c3f5a52" is not the UID of a pod, in full`,
		"--uid=web-0":           `--uid "web-0" is not the UID of a pod, in full`,
		"--all --cri-socket=x":  `--cri-socket "x" is not the absolute path of a socket`,
		"--all --cri-socket=":   `--cri-socket "" is not the absolute path of a socket`,
		"--ip=10.0.0.256":       `--ip "10.0.0.256" is not an address`,
		"--ip=fd00::5/64":       `--ip "fd00::5/64" is not an address; did you mean --ip fd00::5?`,
		"--ip=shop/web-0":       `--ip "shop/web-0" is not an address; did you mean --pod shop/web-0?`,
		"--ip=" + podUID:        `is not an address; did you mean --uid ` + podUID + `?`,
		"--ip=fe80::1%eth0":     `--ip "fe80::1%eth0" has a zone: addresses are looked for on all interfaces, so name it without "%eth0"`,
		"--ip=fd00::5%eth0":     `has a zone`,
		"--ip=fe80::1":          "--ip fe80::1 is no address that one pod alone can have",
		"--ip=127.0.0.1":        "--ip 127.0.0.1 is no address that one pod alone can have",
		"--ip=::ffff:127.0.0.1": "is no address that one pod alone can have",
		"--ip=0.0.0.0":          "is no address that one pod alone can have",
		"--pod=10.0.0.5":        `--pod "10.0.0.5" is not NAMESPACE/NAME; did you mean --ip 10.0.0.5?`,
		"--pod=" + podUID:       `is not NAMESPACE/NAME; did you mean --uid ` + podUID + `?`,
		"--uid=10.0.0.5":        `did you mean --ip 10.0.0.5?`,
		"--uid=shop/web-0":      `did you mean --pod shop/web-0?`,
		"10.0.0.5":              `"10.0.0.5" is no flag; did you mean --ip 10.0.0.5?`,
		"--all -o yaml":         `--output "yaml" is neither text nor json`,
		"--all --node-name=":    "--node-name is empty",
		"--all --timeout=0s":    "--timeout 0s is not above 0",
		"--all --timeout=1h":    "--timeout 1h0m0s is not above 0 and up to 30s",
		"--all --no-such-flag":  "unknown flag: --no-such-flag",
		"--all web-0":           `"web-0" is no flag`,

		"--ip=10.0.0.1 --ip=10.0.0.2":          `invalid argument "10.0.0.2" for "--ip" flag: it is given twice, after "10.0.0.1"`,
		"--uid=" + podUID + " --uid=" + podUID: "it is given twice",
		"--pod=a/b --pod=a/c":                  "it is given twice",
		"--ip=10.0.0.5/33":                     `is not an address; did you mean --ip 10.0.0.5?`,
		"--pod=Shop/web-0":                     `--pod "Shop/web-0" is not NAMESPACE/NAME`,
		"--pod=shop/Web_0":                     `--pod "shop/Web_0" is not NAMESPACE/NAME`,

		// As other commands print them.
		"10.0.0.5:8080":                    `"10.0.0.5:8080" is no flag; did you mean --ip 10.0.0.5?`,
		"--ip=[fd00::5]:80":                `is not an address; did you mean --ip fd00::5?`,
		"pod/web-0":                        `"pod/web-0" is no flag; did you mean --pod NAMESPACE/web-0?`,
		"--uid=" + strings.ToUpper(podUID): `did you mean --uid ` + podUID + `?`,
		"--uid=kubepods-pod" + strings.ReplaceAll(podUID, "-", "_") + ".slice": `did you mean --uid ` + podUID + `?`,
		"--uid=/kubepods/burstable/pod" + podUID:                               `did you mean --uid ` + podUID + `?`,
	} {
		t.Run(args, func(t *testing.T) {
			cmd := NewInspectCommand()
			cmd.SetArgs(strings.Fields(args))
			cmd.SilenceErrors, cmd.SilenceUsage = true, true
			err := cmd.ExecuteContext(t.Context())
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("got %v, want %q", err, want)
			}
			if status, told := errors.AsType[exitstatus.Error](err); !told || status != exitstatus.Usage {
				t.Errorf("exit status %d", status)
			}
		})
	}
}

// What is not known is never called free.
func TestInspectWithoutARuntime(t *testing.T) {
	for args, want := range map[string]string{
		"--uid=" + podUID:                "pod with UID " + podUID + " on node node-a: unknown",
		"--pod=shop/web-0":               "pod shop/web-0 on node node-a: unknown",
		"--pod=shop/web-0 -o json":       `"named": "shop/web-0"`,
		"--pod=shop/web-0 -o text":       "there may be other pods of this name; --uid, --ip and --all look without it",
		"--ip=10.113.99.99":              "address 10.113.99.99 on node node-a: unknown",
		"--all -o json":                  `"verdict": "unknown"`,
		"--uid=" + otherUID + " -o json": `"verdict": "unknown"`,
	} {
		t.Run(args, func(t *testing.T) {
			cmd := NewInspectCommand()
			cmd.SetArgs(append(strings.Fields(args), "--cri-socket="+filepath.Join(t.TempDir(), "none"), "--node-name=node-a", "--kubeconfig=/does/not/exist"))
			cmd.SilenceErrors, cmd.SilenceUsage = true, true
			var out bytes.Buffer
			cmd.SetOut(&out)
			err := cmd.ExecuteContext(t.Context())
			if status, told := errors.AsType[exitstatus.Error](err); !told || status != exitUnknown {
				t.Errorf("got %v", err)
			}
			if !strings.Contains(out.String(), want) || !strings.Contains(out.String(), `runtime`) || !strings.Contains(out.String(), "--cri-socket") {
				t.Errorf("printed %s, want %q", out.String(), want)
			}
		})
	}
}

// Who reads nothing must not be told by the exit status that something is left, or that nothing is.
func TestInspectCannotPrint(t *testing.T) {
	full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = full.Close() })
	for _, format := range []string{"text", "json"} {
		t.Run(format, func(t *testing.T) {
			cmd := NewInspectCommand()
			cmd.SetArgs([]string{"--ip=10.113.99.99", "--cri-socket=/does/not/exist", "-o", format})
			cmd.SilenceErrors, cmd.SilenceUsage = true, true
			cmd.SetOut(full)
			err := cmd.ExecuteContext(t.Context())
			if status, told := errors.AsType[exitstatus.Error](err); !told || status != exitUnknown || !errors.Is(err, unix.ENOSPC) {
				t.Errorf("exit status %d: %v", status, err)
			}
		})
	}
}

// What cannot be looked at is told on one line each, and once, however many looks it was in the way of.
func TestInspectTellsAFailureOnce(t *testing.T) {
	runtime := fakeRuntime(func(context.Context, string) (podRecords, error) { return podRecords{}, nil })
	i := newInspector("node-a", newRecordedHost(t).Host, runtime) // whose /proc does not show the host's namespaces
	for question, a := range map[string]answer{
		"--uid": i.reports(t.Context(), []sandbox.Pod{{UID: podUID}}),
		"--ip":  i.holdersOf(t.Context(), podAddress),
	} {
		t.Run(question, func(t *testing.T) {
			if len(a.Failures) == 0 {
				t.Error("nothing has failed")
			}
			for n, failure := range a.Failures {
				again := slices.ContainsFunc(a.Failures[n+1:], func(other string) bool {
					return !strings.HasPrefix(other, "the probe") && strings.Contains(failure, other)
				})
				if again || strings.Contains(failure, "\n") {
					t.Errorf("%q of %q", failure, a.Failures)
				}
			}
		})
	}
	if got := text(errors.Join(errors.New("a"), errors.New("b"), errors.New("a"))); got != "a; b" {
		t.Errorf("got %q", got)
	}
}

// A name leads to what the runtime knows by it, of every UID; where it knows none, nothing follows.
func TestInspectByName(t *testing.T) {
	web := sandbox.Pod{Namespace: "shop", Name: "web-0", UID: podUID}
	before := sandbox.Pod{Namespace: "shop", Name: "web-0", UID: otherUID}
	i := newInspector("node-a", lookable(t).Host, fakeRuntime(func(_ context.Context, uid string) (podRecords, error) {
		all := []podSandbox{{id: "s1", pod: web, ready: true}, {id: "s2", pod: before}, {id: "s3", pod: sandbox.Pod{Namespace: "shop", Name: "db-0", UID: "x"}, ready: true}}
		var of []podSandbox
		for _, s := range all {
			if uid == "" || s.pod.UID == uid {
				of = append(of, s)
			}
		}
		return podRecords{sandboxes: of}, nil
	}))
	a := i.byName(t.Context(), sandbox.Pod{Namespace: "shop", Name: "web-0"})
	if a.Verdict != sandbox.Bound || len(a.Reports) != 2 || a.Reports[0].Verdict() != sandbox.Bound || a.Reports[1].Verdict() != sandbox.Released {
		t.Errorf("got %+v", a)
	}
	a = i.byName(t.Context(), sandbox.Pod{Namespace: "shop", Name: "web-1"})
	if a.Verdict != sandbox.Unknown || len(a.Failures) != 1 || a.Named != "shop/web-1" {
		t.Errorf("of an unknown name: got %+v", a)
	}
}

// Everything that is left: what the last two looks of it have in common, and compared with what the API server has, if that can be asked.
func TestEverything(t *testing.T) {
	web := podSandbox{id: "s1", ready: true, pod: sandbox.Pod{Namespace: "shop", Name: "web-0", UID: podUID}, details: details{netnsPath: "/run/netns/closed"}}
	next := web
	next.pod.UID = otherUID
	has := func(uids ...string) func(context.Context) (map[string]bool, string, error) {
		return func(context.Context) (map[string]bool, string, error) {
			known := map[string]bool{}
			for _, uid := range uids {
				known[uid] = true
			}
			return known, "kubeconfig x", nil
		}
	}
	// only answers some times.
	only := func(times int, pods func(context.Context) (map[string]bool, string, error)) func(context.Context) (map[string]bool, string, error) {
		return func(ctx context.Context) (map[string]bool, string, error) {
			if times--; times < 0 {
				return nil, "", errors.New("connection refused")
			}
			return pods(ctx)
		}
	}
	// hanging hangs where pods fails.
	hanging := func(pods func(context.Context) (map[string]bool, string, error)) func(context.Context) (map[string]bool, string, error) {
		return func(ctx context.Context) (map[string]bool, string, error) {
			known, from, err := pods(ctx)
			if err != nil {
				<-ctx.Done()
				err = ctx.Err()
			}
			return known, from, err
		}
	}
	third := web
	third.pod.UID = "0e0d5ce6-6a6c-4c5b-9f6c-333333333333"
	noAnswer := []podSandbox{{id: "no answer"}}
	for _, test := range []struct {
		name      string
		looks     [][]podSandbox // what the runtime has at one look after the other
		pods      func(context.Context) (map[string]bool, string, error)
		leftovers int
		compared  bool
		verdict   sandbox.Verdict
		elsewhere bool // another node, or cluster, may have been asked about
		failure   string
	}{
		{"nothing is there", [][]podSandbox{nil}, has(), 0, true, sandbox.Released, false, ""},
		{"a pod that the API server has", [][]podSandbox{{web}}, has(podUID), 0, true, sandbox.Released, false, ""},
		{"one that it does not have", [][]podSandbox{{web}, {web}}, has(), 1, true, sandbox.Bound, true, ""},
		{"the same beside one that it has", [][]podSandbox{{web, next}, {web, next}}, has(otherUID), 1, true, sandbox.Bound, false, ""},
		{"one that has gone a second later", [][]podSandbox{{web}, nil}, has(), 0, true, sandbox.Released, false, ""},
		{"another one a second later, which stays", [][]podSandbox{{web}, {next}, {next}}, has(), 1, true, sandbox.Bound, true, ""},
		{"another one a second later, which goes", [][]podSandbox{{web}, {next}, nil}, has(), 0, true, sandbox.Released, false, ""},
		{"another one beside it a second later", [][]podSandbox{{web}, {web, next}, {web}}, has(), 1, true, sandbox.Bound, true, ""},
		{"always another one", [][]podSandbox{{web}, {next}, {web}, {next}}, has(), 0, true, sandbox.Unknown, false, stillChanging},
		{"always another one, beside one that stays", [][]podSandbox{{web}, {web, next}, {web, third}, {web, next}}, has(), 1, true, sandbox.Bound, true, stillChanging},
		{"another one beside it, and then the runtime does not answer", [][]podSandbox{{web}, {web, next}, noAnswer}, has(), 1, true, sandbox.Bound, true, "of what was seen, 1 is not confirmed: a further look failed; the probe \"runtime\" did not run: it does not answer"},
		{"another one beside it, and then the API server does not answer", [][]podSandbox{{web}, {web, next}, {web}}, only(2, has()), 1, true, sandbox.Bound, true, "of what was seen, 1 is not confirmed: a further look failed; the pods of the API server: connection refused"},
		{"another one beside it, and then the API server hangs", [][]podSandbox{{web}, {web, next}, {web}}, hanging(only(2, has())), 1, true, sandbox.Bound, true, "of what was seen, 1 is not confirmed: a further look failed; the pods of the API server: context deadline exceeded"},
		{"the API server hangs", [][]podSandbox{{web}}, hanging(only(0, has())), 0, false, sandbox.Unknown, false, ""},
		{"the API server cannot be asked", [][]podSandbox{{web}}, func(context.Context) (map[string]bool, string, error) {
			return nil, "", errors.New("connection refused")
		}, 0, false, sandbox.Unknown, false, ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var at []time.Time
				i := newInspector("node-a", lookable(t).Host, fakeRuntime(func(context.Context, string) (podRecords, error) {
					at = append(at, time.Now())
					if len(at) > len(test.looks) {
						return podRecords{}, errors.New("nobody should look again")
					}
					now := test.looks[len(at)-1]
					if len(now) > 0 && now[0].id == noAnswer[0].id {
						return podRecords{}, errors.New("it does not answer")
					}
					return podRecords{sandboxes: now}, nil
				}))
				ctx, cancel := context.WithTimeout(t.Context(), defaultTimeout)
				defer cancel()
				a := i.everything(ctx, test.pods)
				if a.Verdict != test.verdict || len(a.Leftovers) != test.leftovers || (a.NotCompared == "") != test.compared || (a.ComparedBy != "") != test.compared {
					t.Errorf("got %+v", a)
				}
				if got := strings.Join(a.Failures, "; "); got != test.failure {
					t.Errorf("failures: %q", got)
				}
				if ctx.Err() != nil {
					t.Error("no time is left to describe what was found")
				}
				if strings.Contains(a.NextStep, "make sure that this is node node-a (--node-name)") != test.elsewhere {
					t.Errorf("next step: %q", a.NextStep)
				}
				if len(at) != len(test.looks) || len(at) > 1 && at[len(at)-1].Sub(at[0]) < time.Duration(len(at)-1)*confirmAfter {
					t.Errorf("looks at %v", at)
				}
			})
		})
	}
}

// Who gives too little time for a second look is told so, and not that something has failed.
func TestEverythingInTooLittleTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		left := podSandbox{id: "s1", ready: true, pod: sandbox.Pod{Namespace: "shop", Name: "web-0", UID: podUID}, details: details{netnsPath: "/run/netns/closed"}}
		i := newInspector("node-a", lookable(t).Host, fakeRuntime(func(context.Context, string) (podRecords, error) {
			return podRecords{sandboxes: []podSandbox{left}}, nil
		}))
		ctx, cancel := context.WithTimeout(t.Context(), confirmAfter)
		defer cancel()
		a := i.everything(ctx, func(context.Context) (map[string]bool, string, error) { return nil, "kubeconfig x", nil })
		want := []string{"of what was seen, 1 is not confirmed: there was no time for a second look, a second later: give it more with --timeout"}
		if a.Verdict != sandbox.Unknown || !slices.Equal(a.Failures, want) || a.NotCompared != "" {
			t.Errorf("got %+v", a)
		}
	})
}

// An address that two namespaces have is told with both, if they have it a second later too.
func TestEverythingThatIsThereTwice(t *testing.T) {
	pods, twins := fmt.Sprintf("eni-guard-test-pods-%d", os.Getpid()), fmt.Sprintf("eni-guard-test-twins-%d", os.Getpid())
	namedNamespace(t, pods)
	namedNamespace(t, twins)
	pods, twins = filepath.Join(netnsDir, pods), filepath.Join(netnsDir, twins)
	pod, twin := sandbox.Pod{Namespace: "shop", Name: "web-0", UID: podUID}, sandbox.Pod{Namespace: "shop", Name: "web-1", UID: otherUID}
	for _, test := range []struct {
		name    string
		looks   [2][]string // the namespaces that are there
		known   bool        // the API server has the pod
		holders int
		verdict sandbox.Verdict
	}{
		{"both times", [2][]string{{pods, twins}, {pods, twins}}, true, 2, sandbox.Bound},
		{"not a second later", [2][]string{{pods, twins}, {pods}}, true, 0, sandbox.Released},
		{"only a second later, and on", [2][]string{{pods}, {pods, twins}}, false, 2, sandbox.Bound}, // what else is left lets it look again
	} {
		t.Run(test.name, func(t *testing.T) {
			h := lookable(t, test.looks[0]...)
			i := newInspector("node-a", h.Host, fakeRuntime(func(context.Context, string) (podRecords, error) {
				return podRecords{sandboxes: []podSandbox{{id: "s1", pod: pod, details: details{netnsPath: pods, ips: []netip.Addr{testAddress}}}, {id: "s2", pod: twin, details: details{netnsPath: twins}}}}, nil
			}))
			ctx, cancel := context.WithTimeout(t.Context(), maxTimeout)
			defer cancel()
			a := i.everything(ctx, func(context.Context) (map[string]bool, string, error) { // once a look, at its end
				later, err := os.ReadFile(filepath.Join(lookable(t, test.looks[1]...).Proc, "thread-self/mountinfo"))
				if err != nil {
					t.Fatal(err)
				}
				h.write(h.Proc, "thread-self/mountinfo", string(later))
				return map[string]bool{podUID: test.known, otherUID: true}, "kubeconfig x", nil
			})
			holders := 0
			for _, shared := range a.Shared {
				for _, holder := range shared.Holders {
					if shared.IP == testAddress && len(holder.Findings) == 2 {
						holders++
					}
				}
			}
			if holders != test.holders || a.Verdict != test.verdict {
				t.Errorf("got %+v", a)
			}
		})
	}
}

// What client-go says of it nobody can act on.
func TestInspectAllWithoutAKubeconfig(t *testing.T) {
	t.Setenv("KUBECONFIG", "")
	t.Setenv("HOME", t.TempDir())
	empty := filepath.Join(t.TempDir(), "empty")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct{ kubeconfig, env, want string }{
		{"", "", "there is no kubeconfig: name one by --kubeconfig, such as /"},
		{"", "/does/not/exist", "there is no kubeconfig (the environment variable KUBECONFIG names /does/not/exist, which is not there): name one by --kubeconfig, such as /"},
		{"/does/not/exist", "", "--kubeconfig: stat /does/not/exist: no such file"},
		{empty, "", "kubeconfig " + empty + ": it names no API server"},
		{"", empty, "kubeconfig " + empty + ": it names no API server"},
	} {
		t.Setenv("KUBECONFIG", test.env)
		config, from, err := apiConfig(test.kubeconfig)
		if err == nil || from != "" || !strings.HasPrefix(err.Error(), test.want) || strings.Contains(err.Error(), "KUBERNETES_MASTER") {
			t.Errorf("%q: got %v, %v, want %q", test.kubeconfig, config, err, test.want)
		}
	}
	named := filepath.Join(t.TempDir(), "kubelet.conf")
	if err := clientcmd.WriteToFile(clientcmdapi.Config{
		Clusters: map[string]*clientcmdapi.Cluster{"c": {Server: "https://10.0.0.1:6443"}},
		Contexts: map[string]*clientcmdapi.Context{"c": {Cluster: "c"}}, CurrentContext: "c",
	}, named); err != nil {
		t.Fatal(err)
	}
	if config, from, err := apiConfig(named); err != nil || config.Host != "https://10.0.0.1:6443" || from != "kubeconfig "+named {
		t.Errorf("got %v from %q (%v)", config, from, err)
	}
}

// Where the runtime cannot be asked, the answer says what to do about it.
func TestTheNextStepWithoutARuntime(t *testing.T) {
	nobody := filepath.Join(t.TempDir(), "refused.sock")
	listener, err := net.Listen("unix", nobody)
	if err != nil {
		t.Fatal(err)
	}
	listener.(*net.UnixListener).SetUnlinkOnClose(false)
	conn, pid, err := dialSocket(t.Context(), "unix://"+nobody)
	if err != nil || pid != os.Getpid() {
		t.Fatalf("process %d listens: %v", pid, err)
	}
	_ = conn.Close()
	dial := func(socket string) error {
		_, _, err := dialSocket(t.Context(), socket)
		return err
	}
	if err := listener.Close(); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		socket string
		err    error
		others []string
		want   string
	}{
		{"/run/x.sock", dial("/run/x.sock"), nil, "there is no /run/x.sock; name the socket of the container runtime by --cri-socket, or start the runtime"},
		{"/run/x.sock", dial("/run/x.sock"), []string{"/run/crio/crio.sock"}, "there is no /run/x.sock; name the socket of the container runtime by --cri-socket: this host has /run/crio/crio.sock"},
		{nobody, dial(nobody), []string{nobody, "/run/crio/crio.sock"}, "no container runtime listens at " + nobody + "; start it, or name the socket of the container runtime by --cri-socket: this host has /run/crio/crio.sock"},
		{nobody, dial(nobody), nil, "no container runtime listens at " + nobody + "; start it, or name the socket of the container runtime by --cri-socket"},
		{"/run/x.sock", &net.OpError{Op: "dial", Err: os.NewSyscallError("connect", unix.EAGAIN)}, nil, silentRuntime},
		{"/run/x.sock", &net.OpError{Op: "dial", Err: os.NewSyscallError("connect", unix.EACCES)}, nil, "run it as root: /run/x.sock belongs to root"},
		{"/run/x.sock", context.DeadlineExceeded, nil, silentRuntime},
		{"/run/x.sock", nil, nil, ""},
	} {
		if got := afterDialing(test.socket, test.err, test.others); got != test.want {
			t.Errorf("%v: got %q, want %q", test.err, got, test.want)
		}
	}
}

// A runtime that takes questions and answers none is named with its process, whatever was asked.
func TestTheNextStepWithARuntimeThatHangs(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "silent.sock")
	listener, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = listener.Close() })
	command, err := os.ReadFile("/proc/self/comm")
	if err != nil {
		t.Fatal(err)
	}
	want := fmt.Sprintf("what to do: %s, and at what process %d (%s), which listens at %s, waits for", silentRuntime, os.Getpid(), strings.TrimSpace(string(command)), socket)
	for _, question := range []string{"--uid=" + podUID, "--pod=shop/web-0", "--ip=10.113.99.99", "--all"} {
		t.Run(question, func(t *testing.T) {
			t.Parallel()
			cmd := NewInspectCommand()
			cmd.SetArgs([]string{question, "--cri-socket=" + socket, "--node-name=node-a", "--kubeconfig=/does/not/exist", "--timeout=2s"})
			cmd.SilenceErrors, cmd.SilenceUsage = true, true
			var out bytes.Buffer
			cmd.SetOut(&out)
			err := cmd.ExecuteContext(t.Context())
			if status, told := errors.AsType[exitstatus.Error](err); !told || status != exitUnknown {
				t.Errorf("got %v", err)
			}
			if !strings.Contains(out.String(), want) {
				t.Errorf("printed %s, want %q", out.String(), want)
			}
		})
	}
	over, cancel := context.WithCancel(t.Context())
	cancel()
	if got := nextStep(over, socket, []string{noRuntimeAnswer}); !strings.Contains(got, silentRuntime+", and at what process") {
		t.Errorf("when the time is over: %q", got)
	}
	if got := nextStep(t.Context(), socket, []string{`the probe "netns" did not run: no answer after 1s`}); got != "" {
		t.Errorf("the runtime is blamed for another probe: %s", got)
	}
	if got := nextStep(t.Context(), socket, []string{"network namespace /run/netns/x: it is mounted at /run/netns/x, but " + coveredNamespace}); got != afterUncovering {
		t.Errorf("of a namespace that is covered: %q", got)
	}
	if got := nextStep(t.Context(), socket, []string{"the node's /run/netns " + notFollowing}); got != afterUnmounting {
		t.Errorf("of a directory that was unmounted: %q", got)
	}
}
