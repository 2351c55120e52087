package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-logr/logr"
	"golang.org/x/sys/unix"

	"github.com/eni-guard/eni-guard/internal/sandbox"
)

// fakeRuntime is a runtime of one function.
type fakeRuntime func(ctx context.Context, uid string) (podRecords, error)

func (f fakeRuntime) pod(ctx context.Context, uid string) (podRecords, error) { return f(ctx, uid) }

func (f fakeRuntime) all(ctx context.Context) (podRecords, error) { return f(ctx, "") }

func (fakeRuntime) events(context.Context) <-chan struct{} { return nil }

func knowsNothing(context.Context, string) (podRecords, error) { return podRecords{}, nil }

// lookable is a recorded host whose own network namespace is that of the machine, so that the probe of namespaces works too:
// it sees those that are mounted at the paths.
func lookable(t *testing.T, paths ...string) recordedHost {
	t.Helper()
	h := newRecordedHost(t)
	link, err := realNode.namespace("net")
	if err != nil {
		t.Fatal(err)
	}
	h.symlink("1/ns/net", link)
	h.symlink("1/ns/mnt", "mnt:[1]")
	h.symlink("thread-self/ns/mnt", "mnt:[1]")
	table := ""
	for _, path := range paths {
		var stat unix.Stat_t
		if err := unix.Stat(path, &stat); err != nil {
			t.Fatal(err)
		}
		table += fmt.Sprintf("36 35 0:4 net:[%d] %s rw shared:1 - nsfs nsfs rw\n", stat.Ino, path)
	}
	h.write(h.Proc, "thread-self/mountinfo", table)
	return h
}

var podQuery = sandbox.Query{Node: "node-a", Namespace: "shop", Name: "web-0", UID: podUID}

func TestInspect(t *testing.T) {
	stuckHost := func(t *testing.T, _ ...string) recordedHost {
		h := lookable(t)
		h.group("kubepods/pod"+podUID+"/c1", 42)
		h.thread(42, "java", "D", "nfs_wait", "")
		return h
	}
	onHostNetwork := func(t *testing.T, _ ...string) recordedHost {
		h := lookable(t)
		host, err := h.namespace("net")
		if err != nil {
			t.Fatal(err)
		}
		h.group("kubepods/pod"+podUID+"/c1", 42)
		h.thread(42, "java", "S", "x", host)
		return h
	}
	failing := func(context.Context, string) (podRecords, error) {
		return podRecords{}, errors.New("connection refused")
	}
	for _, test := range []struct {
		name    string
		host    func(t *testing.T, paths ...string) recordedHost
		runtime fakeRuntime
		verdict sandbox.Verdict
		kinds   string
		failure string
	}{
		{"nothing is left", lookable, knowsNothing, sandbox.Released, "", ""},
		{"the runtime knows a container", lookable, func(_ context.Context, uid string) (podRecords, error) {
			if uid != podUID {
				t.Errorf("asked for %s", uid)
			}
			return podRecords{[]podSandbox{{id: "s1", ready: true}, {id: "s0"}}, []podContainer{{id: "c1", name: "app", sandboxID: "s1"}}}, nil
		}, sandbox.Bound, "ContainerRunning SandboxReady", ""},
		{"a sandbox that is not ready, its namespace closed", lookable, func(context.Context, string) (podRecords, error) {
			return podRecords{sandboxes: []podSandbox{{id: "s1", details: details{netnsPath: "/run/netns/closed"}}}}, nil
		}, sandbox.Released, "", ""},
		{"only the kernel knows a process", stuckHost, knowsNothing, sandbox.Bound, "ProcessAlive", ""},
		{"a process of it is in the host's namespace, which is not the pod's", onHostNetwork, knowsNothing, sandbox.Bound, "ProcessAlive", ""},
		{"the runtime is down", lookable, failing, sandbox.Unknown, "", `the probe "runtime" did not run: connection refused`},
		{"the runtime is down, but a process is there", stuckHost, failing, sandbox.Bound, "ProcessAlive", `the probe "runtime" did not run: connection refused`},
	} {
		t.Run(test.name, func(t *testing.T) {
			report := newInspector("node-a", test.host(t).Host, test.runtime).Inspect(t.Context(), podQuery)
			var kinds []string
			for _, f := range report.Findings {
				kinds = append(kinds, string(f.Kind))
			}
			if report.Verdict() != test.verdict || strings.Join(kinds, " ") != test.kinds || strings.Join(report.Failures(), "; ") != test.failure {
				t.Errorf("got %s, %v, %v", report.Verdict(), kinds, report.Failures())
			}
			if report.Node != "node-a" || report.UID != podUID {
				t.Errorf("the report is about %s on %s", report.UID, report.Node)
			}
		})
	}
}

// What the other probes found is where the namespaces are looked for: at a sandbox's path though the runtime calls the
// sandbox not ready (its CNI DEL has failed, say), and at a process's link though the runtime knows nothing.
func TestInspectLooksIntoTheNamespacesOfWhatWasFound(t *testing.T) {
	name := fmt.Sprintf("eni-guard-test-inspect-%d", os.Getpid())
	namedNamespace(t, name)
	h := lookable(t, filepath.Join(netnsDir, name))
	h.group("kubepods/pod"+podUID+"/c1", pid)
	h.thread(pid, "java", "D", "nfs_wait", "net:[7]")
	query := podQuery
	query.IPs = []netip.Addr{testAddress}
	report := newInspector("node-a", h.Host, fakeRuntime(func(context.Context, string) (podRecords, error) {
		return podRecords{sandboxes: []podSandbox{{id: "s1", details: details{netnsPath: "/run/netns/" + name}}}}, nil
	})).Inspect(t.Context(), query)
	var got []string
	for _, f := range report.Findings {
		got = append(got, strings.Join(strings.Fields(fmt.Sprint(f.Kind, " ", f.Netns, " ", f.Sandbox)), " "))
	}
	want := []string{"ProcessAlive", "IPAssigned /run/netns/" + name + " s1", "NetnsOpen /run/netns/" + name + " s1", "NetnsOpen net:[7]"}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %q, want %q (%v)", got, want, report.Failures())
	}
}

// A probe that hangs for good, as a read of a stuck process can, must cost neither the other probes nor the agent.
func TestAProbeThatHangsIsReportedAndDoesNotPileUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		hang := make(chan struct{})
		t.Cleanup(func() { close(hang) })
		h := lookable(t)
		h.group("kubepods/pod"+podUID+"/c1", 42)
		h.thread(42, "java", "D", "nfs_wait", "")
		running := make(chan struct{}, 10*maxConcurrent)
		inspector := newInspector("node-a", h.Host, fakeRuntime(func(context.Context, string) (podRecords, error) {
			running <- struct{}{}
			<-hang
			return podRecords{}, nil
		}))
		reports := make(chan sandbox.Report)
		const questions = 2 * maxConcurrent
		for range questions {
			go func() {
				ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
				defer cancel()
				reports <- inspector.Inspect(ctx, podQuery)
			}()
		}
		late := 0
		for range questions {
			report := <-reports
			if report.Verdict() != sandbox.Bound || len(report.Probes) != 4 {
				t.Errorf("got %+v", report)
			}
			if failure := fmt.Sprint(report.Failures()); strings.Contains(failure, "other runs of it have not come back") {
				late++
			} else if !strings.Contains(failure, `"runtime" did not run: no answer after `) || strings.Contains(failure, "netns") {
				t.Errorf("failures %s", failure)
			}
		}
		if len(running) != maxConcurrent || late != questions-maxConcurrent {
			t.Errorf("%d probes hang, %d questions found no place; want %d and %d", len(running), late, maxConcurrent, questions-maxConcurrent)
		}
	})
}

func TestAReportIsBounded(t *testing.T) {
	containers := make([]podContainer, 2*maxFindings)
	report := newInspector("node-a", lookable(t).Host, fakeRuntime(func(context.Context, string) (podRecords, error) {
		return podRecords{[]podSandbox{{id: "s1", ready: true}}, containers}, nil
	})).Inspect(t.Context(), podQuery)
	if len(report.Findings) != maxFindings || report.Findings[0].Kind != sandbox.ContainerRunning {
		t.Errorf("%d findings, the first one %s", len(report.Findings), report.Findings[0])
	}
}

func TestHandler(t *testing.T) {
	handler := Handler(newInspector("node-a", lookable(t).Host, fakeRuntime(knowsNothing)), logr.Discard())
	valid, err := json.Marshal(podQuery)
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		name, method, target, body string
		status                     int
		want                       string
	}{
		{"a query", "POST", InspectPath, string(valid), 200, `{"node":"node-a","uid":"` + podUID + `","probes":[{"name":"runtime"},{"name":"cgroups"},{"name":"processes"},{"name":"netns"}]}`},
		{"with a time limit", "POST", InspectPath + "?timeout=2s", string(valid), 200, `"node":"node-a"`},
		{"another method", "GET", InspectPath, "", 405, ""},
		{"another path", "POST", "/v2/inspect", string(valid), 404, ""},
		{"a time limit that is none", "POST", InspectPath + "?timeout=2", string(valid), 400, `timeout \"2\" is not a duration`},
		{"a time limit of nothing", "POST", InspectPath + "?timeout=0s", string(valid), 400, "is not a duration above 0"},
		{"a time limit without end", "POST", InspectPath + "?timeout=1h", string(valid), 400, "up to 30s"},
		{"empty", "POST", InspectPath, "", 400, "the query is not valid JSON"},
		{"not JSON", "POST", InspectPath, "pod=x", 400, "the query is not valid JSON"},
		{"a malformed address", "POST", InspectPath, `{"ips":["10.0.0.256"]}`, 400, "10.0.0.256"},
		{"followed by something", "POST", InspectPath, string(valid) + "x", 400, "followed by something else"},
		{"without a UID", "POST", InspectPath, `{"node":"node-a","namespace":"a","name":"b"}`, 400, `field \"uid\" is empty`},
		{"too large", "POST", InspectPath, `{"node":"` + strings.Repeat("x", 64<<10) + `"}`, 413, "larger than 65536 bytes"},
		{"a pod of another node", "POST", InspectPath, strings.Replace(string(valid), "node-a", "node-b", 1), 421, `is on node \"node-b\", this is the agent of node \"node-a\"`},
	} {
		t.Run(test.name, func(t *testing.T) {
			recorder := httptest.NewRecorder()
			handler.ServeHTTP(recorder, httptest.NewRequestWithContext(t.Context(), test.method, test.target, strings.NewReader(test.body)))
			if recorder.Code != test.status || !strings.Contains(recorder.Body.String(), test.want) {
				t.Errorf("got %d %s, want %d with %s", recorder.Code, recorder.Body, test.status, test.want)
			}
		})
	}
}

func TestReadiness(t *testing.T) {
	for _, test := range []struct {
		name    string
		runtime fakeRuntime
		status  int
		want    string
	}{
		{"every probe can look", knowsNothing, 200, "ok"},
		{"the runtime is down", func(context.Context, string) (podRecords, error) {
			return podRecords{}, errors.New("connection refused")
		}, 503, "connection refused"},
	} {
		t.Run(test.name, func(t *testing.T) {
			handler := HealthHandler(newInspector("node-a", lookable(t).Host, test.runtime))
			for target, status := range map[string]int{"/healthz": http.StatusOK, "/readyz": test.status} {
				recorder := httptest.NewRecorder()
				handler.ServeHTTP(recorder, httptest.NewRequestWithContext(t.Context(), http.MethodGet, target, nil))
				if recorder.Code != status {
					t.Errorf("%s: got %d %s", target, recorder.Code, recorder.Body)
				}
				if target == "/readyz" && !strings.Contains(recorder.Body.String(), test.want) {
					t.Errorf("got %s, want %q", recorder.Body, test.want)
				}
			}
		})
	}
}

// A runtime that goes is noticed at once, however little time has passed since everything was fine: soon after it the kubelet
// listens to nobody's readiness any more.
func TestReadinessEndsAtOnce(t *testing.T) {
	down := false
	handler := HealthHandler(newInspector("node-a", lookable(t).Host, fakeRuntime(func(context.Context, string) (podRecords, error) {
		if down {
			return podRecords{}, errors.New("connection refused")
		}
		return podRecords{}, nil
	})))
	for n, step := range []struct {
		down   bool
		status int
	}{{false, 200}, {false, 200}, {true, 503}, {true, 503}, {false, 200}} {
		down = step.down
		recorder := httptest.NewRecorder()
		handler.ServeHTTP(recorder, httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/readyz", nil))
		if recorder.Code != step.status {
			t.Errorf("step %d: got %d %s", n, recorder.Code, recorder.Body)
		}
	}
}

func TestNetnsPath(t *testing.T) {
	for _, test := range []struct {
		name, info, want, failure string
	}{
		{"a pod's own", `{"pid":1,"runtimeSpec":{"linux":{"namespaces":[{"type":"pid"},{"type":"network","path":"/var/run/netns/cni-1"}]}}}`, "/run/netns/cni-1", ""},
		{"the host's", `{"runtimeSpec":{"linux":{"namespaces":[{"type":"pid"}]}}}`, "", ""},
		{"no spec", `{"pid":0}`, "", "tells no runtimeSpec"},
		{"not verbose", ``, "", "whose record is damaged"},
		{"something else", `pid=1`, "", "is not JSON"},
	} {
		t.Run(test.name, func(t *testing.T) {
			got, err := verboseDetails(test.info)
			if got.netnsPath != test.want || (err == nil) != (test.failure == "") || err != nil && !strings.Contains(err.Error(), test.failure) {
				t.Errorf("got %+v, %v", got, err)
			}
		})
	}
}

func TestOptionsNameTheFlagThatIsWrong(t *testing.T) {
	valid := options{node: "n", bindAddress: ":1", healthAddress: ":2", metricsAddress: ":3", leftoverGrace: time.Minute, criSocket: "/run/c.sock", tlsDir: t.TempDir()}
	var got []string
	for _, change := range []func(*options){
		func(o *options) { o.node = "" },
		func(o *options) { o.bindAddress = "1.2.3.4" },
		func(o *options) { o.healthAddress = "" },
		func(o *options) { o.metricsAddress = "x" },
		func(o *options) { o.leftoverGrace = 0 },
		func(o *options) { o.criSocket = "c.sock" },
		func(*options) {},
	} {
		o := valid
		change(&o)
		name, _, _ := strings.Cut(o.validate().Error(), " ")
		got = append(got, strings.TrimSuffix(name, ":"))
	}
	if want := []string{"--node-name", "--bind-address", "--health-address", "--metrics-address", "--leftover-grace", "--cri-socket", "--tls-dir"}; !reflect.DeepEqual(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

// What only a process of the pod keeps is not mounted anywhere. A quick look finds it by the process, with the address in it.
func TestAQuickLookFollowsTheProcesses(t *testing.T) {
	cmd := exec.CommandContext(t.Context(), "sleep", "600")
	id := inNamespace(t, cmd, testAddress)
	pod := filepath.Join(realNode.oneHierarchy(), "eni-guard-test-quick", "pod"+podUID)
	if err := os.MkdirAll(pod, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		for _, dir := range []string{pod, filepath.Dir(pod)} {
			await(t, func() error { return os.Remove(dir) })
		}
	})
	if err := os.WriteFile(filepath.Join(pod, "cgroup.procs"), []byte(strconv.Itoa(cmd.Process.Pid)), 0o600); err != nil {
		t.Fatal(err)
	}
	query := podQuery
	query.IPs = []netip.Addr{testAddress}
	report := newInspector("node-a", realNode, fakeRuntime(knowsNothing)).look(t.Context(), query, quick)
	want := sandbox.Finding{Kind: sandbox.IPAssigned, Netns: id, IP: testAddress, Interface: "lo"}
	if !slices.ContainsFunc(report.Findings, func(f sandbox.Finding) bool { return f == want }) {
		t.Errorf("got %v (%v), want %v", report.Findings, report.Failures(), want)
	}
}

// Once something could not be looked at, a quick look does not do, however little time has passed since everything was fine.
func TestReadinessForgetsThatAllWasGood(t *testing.T) {
	var runtimeErr error
	h := lookable(t)
	handler := HealthHandler(newInspector("node-a", h.Host, fakeRuntime(func(context.Context, string) (podRecords, error) { return podRecords{}, runtimeErr })))
	ready := func() int {
		recorder := httptest.NewRecorder()
		handler.ServeHTTP(recorder, httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/readyz", nil))
		return recorder.Code
	}
	if got := ready(); got != http.StatusOK {
		t.Fatalf("at first: %d", got)
	}
	// Only a look at everything reads the mount table.
	if err := os.Remove(filepath.Join(h.Proc, "thread-self/mountinfo")); err != nil {
		t.Fatal(err)
	}
	if got := ready(); got != http.StatusOK {
		t.Errorf("%d: soon after all was good, everything was looked at", got)
	}
	runtimeErr = errors.New("connection refused")
	if got := ready(); got != http.StatusServiceUnavailable {
		t.Errorf("without the runtime: %d", got)
	}
	runtimeErr = nil
	if got := ready(); got != http.StatusServiceUnavailable {
		t.Errorf("with the runtime, without a mount table: %d", got)
	}
}

// While the processes of the pod are described, one of them ends, and its number is given to another process; and one comes.
func TestProcessesThatComeAndGoWhileTheyAreDescribed(t *testing.T) {
	h := lookable(t)
	group := "kubepods/pod" + podUID + "/c1"
	h.group(group, pid)
	h.thread(pid, "not the pod's", "S", "", "net:[7]")
	h.process(pid+1, "java", "S", "x", "net:[8]")
	// Reading the wait channel lasts until somebody writes it.
	describing := filepath.Join(h.Proc, fmt.Sprintf("%d/task/%d/wchan", pid, pid))
	if err := errors.Join(os.Remove(describing), unix.Mkfifo(describing, 0o600)); err != nil {
		t.Fatal(err)
	}
	changed := make(chan error)
	go func() {
		file, err := os.OpenFile(describing, os.O_WRONLY, 0)
		h.group(group, pid+1)
		changed <- errors.Join(err, file.Close())
	}()
	report := newInspector("node-a", h.Host, fakeRuntime(knowsNothing)).look(t.Context(), podQuery, quick)
	if err := <-changed; err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, f := range report.Findings {
		got = append(got, f.String())
	}
	if want := []string{"process 43 (java) is in state S in x", "network namespace net:[8] is open"}; !slices.Equal(got, want) {
		t.Errorf("got %q (%v), want %q", got, report.Failures(), want)
	}
}

// A cgroup that is never empty, and of which each process has ended when it is looked at, is no sign that nothing is left.
func TestProcessesThatEndBeforeTheyAreDescribed(t *testing.T) {
	h := lookable(t)
	h.group("kubepods/pod"+podUID+"/c1", pid)
	report := newInspector("node-a", h.Host, fakeRuntime(knowsNothing)).Inspect(t.Context(), podQuery)
	want := `the probe "processes" did not run: the pod's processes end before they can be looked at, and may leave others`
	if failures := report.Failures(); report.Verdict() != sandbox.Unknown || !slices.Equal(failures, []string{want}) {
		t.Errorf("%s: %v %q", report.Verdict(), report.Findings, failures)
	}
}

// A process that is seen in the pod's network namespace, and elsewhere when it is described, had only come to look.
func TestAStrangerThatHasLeftTheNamespace(t *testing.T) {
	name := fmt.Sprintf("eni-guard-test-stranger-%d", os.Getpid())
	namedNamespace(t, name)
	path := filepath.Join(netnsDir, name)
	v := look(t, quick)
	id := v.mountedAt(path)
	for _, test := range []struct {
		name, later string
		reported    bool
	}{
		{"it has stayed", id, true},
		{"it has left", "net:[7]", false},
	} {
		t.Run(test.name, func(t *testing.T) {
			h := lookable(t, path)
			h.symlink(fmt.Sprintf("%d/ns/net", pid), id)  // read when processes are listed
			h.thread(pid, "crictl", "S", "x", test.later) // and this when they are described
			report := newInspector("node-a", h.Host, fakeRuntime(func(context.Context, string) (podRecords, error) {
				return podRecords{sandboxes: []podSandbox{{id: "s1", details: details{netnsPath: path}}}}, nil
			})).look(t.Context(), podQuery, thorough)
			reported := slices.ContainsFunc(report.Findings, func(f sandbox.Finding) bool { return f.Kind == sandbox.ProcessAlive && f.Process.Outside })
			if reported != test.reported || len(report.Failures()) > 0 {
				t.Errorf("got %v (%v)", report.Findings, report.Failures())
			}
		})
	}
}

// An agent that left a file open at each look, also one that fails, could soon open none.
func TestNoFileStaysOpen(t *testing.T) {
	name := fmt.Sprintf("eni-guard-test-files-%d", os.Getpid())
	namedNamespace(t, name)
	path := filepath.Join(netnsDir, name)
	good, broken, hidden := lookable(t, path), lookable(t, path), lookable(t)
	for _, h := range []recordedHost{good, broken} {
		h.group("kubepods/pod"+podUID+"/c1", os.Getpid())
		h.process(os.Getpid(), "java", "D", "x", "net:[7]")
	}
	for _, file := range []string{fmt.Sprintf("%d/task/%d/stat", os.Getpid(), os.Getpid()), "thread-self/mountinfo"} {
		broken.write(broken.Proc, file, "garbage")
	}
	if err := os.RemoveAll(filepath.Join(hidden.Proc, "1")); err != nil {
		t.Fatal(err)
	}
	runtimes := []fakeRuntime{knowsNothing, func(context.Context, string) (podRecords, error) { return podRecords{}, errors.New("down") }}
	query := podQuery
	query.IPs = []netip.Addr{testAddress}
	// The garbage collector would close what was forgotten.
	defer debug.SetGCPercent(debug.SetGCPercent(-1))
	everything := func() {
		for _, h := range []Host{good.Host, broken.Host, hidden.Host, realNode, {Proc: "/does/not/exist", Cgroup: "/does/not/exist"}} {
			for _, runtime := range runtimes {
				i := newInspector("node-a", h, runtime)
				_ = i.Inspect(t.Context(), query)
				_ = i.look(t.Context(), query, thorough)
				_ = awaitRelease(t.Context(), i, query, times{timeout: time.Second, wait: time.Millisecond})
				_ = i.holdersOf(t.Context(), testAddress)
				_ = realNode.readAddresses(t.Context(), []netNamespace{{id: "net:[7]", paths: []string{path}}, {id: "net:[8]", paths: []string{"/does/not/exist"}}})
			}
		}
	}
	open := func() []string {
		var files []string
		entries, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		for _, entry := range entries {
			target, _ := os.Readlink(filepath.Join("/proc/self/fd", entry.Name()))
			files = append(files, target)
		}
		slices.Sort(files)
		return files
	}
	everything() // the Go runtime opens files of its own the first time
	before := open()
	for range 5 {
		everything()
	}
	// A look that was given up on may have some open for a moment longer.
	await(t, func() error {
		if after := open(); len(after) != len(before) {
			return fmt.Errorf("before %q\nafter  %q", before, after)
		}
		return nil
	})
}
