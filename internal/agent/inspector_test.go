package agent

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/go-logr/logr"

	"github.com/eni-guard/eni-guard/internal/sandbox"
)

// fakeRuntime is a runtime of one function.
type fakeRuntime func(ctx context.Context, uid string) ([]podSandbox, []podContainer, error)

func (f fakeRuntime) pod(ctx context.Context, uid string) ([]podSandbox, []podContainer, error) {
	return f(ctx, uid)
}

func knowsNothing(context.Context, string) ([]podSandbox, []podContainer, error) {
	return nil, nil, nil
}

// lookable is a recorded host whose own namespaces are those of the machine, so that the probe of namespaces works too.
func lookable(t *testing.T) recordedHost {
	t.Helper()
	h := newRecordedHost(t)
	for _, kind := range []string{"net", "mnt"} {
		link, err := realHost.namespace(kind)
		if err != nil {
			t.Fatal(err)
		}
		h.symlink("1/ns/"+kind, link)
	}
	return h
}

var podQuery = sandbox.Query{Node: "node-a", Namespace: "shop", Name: "web-0", UID: podUID}

func TestInspect(t *testing.T) {
	stuckHost := func(t *testing.T) recordedHost {
		h := lookable(t)
		h.group("kubepods/pod"+podUID+"/c1", 42)
		h.thread(42, "java", "D", "nfs_wait", "")
		return h
	}
	failing := func(context.Context, string) ([]podSandbox, []podContainer, error) {
		return nil, nil, errors.New("connection refused")
	}
	for _, test := range []struct {
		name    string
		host    func(t *testing.T) recordedHost
		runtime fakeRuntime
		verdict sandbox.Verdict
		kinds   string
		failure string
	}{
		{"nothing is left", lookable, knowsNothing, sandbox.Released, "", ""},
		{"the runtime knows a container", lookable, func(_ context.Context, uid string) ([]podSandbox, []podContainer, error) {
			if uid != podUID {
				t.Errorf("asked for %s", uid)
			}
			return []podSandbox{{id: "s1", ready: true}, {id: "s0"}}, []podContainer{{id: "c1", name: "app", sandboxID: "s1"}}, nil
		}, sandbox.Bound, "ContainerRunning SandboxReady", ""},
		{"a sandbox that is not ready, its namespace closed", lookable, func(context.Context, string) ([]podSandbox, []podContainer, error) {
			return []podSandbox{{id: "s1", netnsPath: "/run/netns/closed"}}, nil, nil
		}, sandbox.Released, "", ""},
		{"only the kernel knows a process", stuckHost, knowsNothing, sandbox.Bound, "ProcessAlive", ""},
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
	h := lookable(t)
	h.group("kubepods/pod"+podUID+"/c1", pid)
	h.thread(pid, "java", "D", "nfs_wait", "net:[7]")
	query := podQuery
	query.IPs = []netip.Addr{testAddress}
	report := newInspector("node-a", h.Host, fakeRuntime(func(context.Context, string) ([]podSandbox, []podContainer, error) {
		return []podSandbox{{id: "s1", netnsPath: "/run/netns/" + name}}, nil, nil
	})).Inspect(t.Context(), query)
	var got []string
	for _, f := range report.Findings {
		got = append(got, strings.TrimSpace(string(f.Kind)+" "+f.Netns))
	}
	want := []string{"ProcessAlive", "IPAssigned /run/netns/" + name, "NetnsOpen /run/netns/" + name, "NetnsOpen net:[7]"}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %q, want %q (%v)", got, want, report.Failures())
	}
}

// A probe that hangs for good, as a read of a stuck process can, must cost neither the other probes nor the agent.
func TestAProbeThatHangsIsReportedAndDoesNotPileUp(t *testing.T) {
	hang := make(chan struct{})
	t.Cleanup(func() { close(hang) })
	h := lookable(t)
	h.group("kubepods/pod"+podUID+"/c1", 42)
	h.thread(42, "java", "D", "nfs_wait", "")
	running := make(chan struct{}, 10*maxConcurrent)
	inspector := newInspector("node-a", h.Host, fakeRuntime(func(context.Context, string) ([]podSandbox, []podContainer, error) {
		running <- struct{}{}
		<-hang
		return nil, nil, nil
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
		if report.Verdict() != sandbox.Bound || len(report.Probes) != 3 {
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
}

func TestAReportIsBounded(t *testing.T) {
	containers := make([]podContainer, 2*maxFindings)
	report := newInspector("node-a", lookable(t).Host, fakeRuntime(func(context.Context, string) ([]podSandbox, []podContainer, error) {
		return []podSandbox{{id: "s1", ready: true}}, containers, nil
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
		{"a query", "POST", InspectPath, string(valid), 200, `{"node":"node-a","uid":"` + podUID + `","probes":[{"name":"runtime"},{"name":"processes"},{"name":"netns"}]}`},
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
		{"the runtime is down", func(context.Context, string) ([]podSandbox, []podContainer, error) {
			return nil, nil, errors.New("connection refused")
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

func TestNetnsPath(t *testing.T) {
	for _, test := range []struct {
		name, info, want, failure string
	}{
		{"a pod's own", `{"pid":1,"runtimeSpec":{"linux":{"namespaces":[{"type":"pid"},{"type":"network","path":"/var/run/netns/cni-1"}]}}}`, "/var/run/netns/cni-1", ""},
		{"the host's", `{"runtimeSpec":{"linux":{"namespaces":[{"type":"pid"}]}}}`, "", ""},
		{"no spec", `{"pid":0}`, "", "has no runtimeSpec"},
		{"not verbose", ``, "", "is not JSON"},
	} {
		t.Run(test.name, func(t *testing.T) {
			got, err := netnsPath(test.info)
			if got != test.want || (err == nil) != (test.failure == "") || err != nil && !strings.Contains(err.Error(), test.failure) {
				t.Errorf("got %q, %v", got, err)
			}
		})
	}
}

func TestOptionsNameTheFlagThatIsWrong(t *testing.T) {
	valid := options{node: "n", bindAddress: ":1", healthAddress: ":2", tlsDir: t.TempDir()}
	var got []string
	for _, change := range []func(*options){
		func(o *options) { o.node = "" },
		func(o *options) { o.bindAddress = "1.2.3.4" },
		func(o *options) { o.healthAddress = "" },
		func(*options) {},
	} {
		o := valid
		change(&o)
		name, _, _ := strings.Cut(o.validate().Error(), " ")
		got = append(got, strings.TrimSuffix(name, ":"))
	}
	if want := []string{"--node-name", "--bind-address", "--health-address", "--tls-dir"}; !reflect.DeepEqual(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

// Whoever waits for the release gets one answer: as soon as nothing is left, or what is left when the time has passed.
func TestWaitingForTheRelease(t *testing.T) {
	ask := func(ctx context.Context, looks int, parameters string) (sandbox.Report, int) {
		n := 0
		inspector := newInspector("node-a", lookable(t).Host, fakeRuntime(func(context.Context, string) ([]podSandbox, []podContainer, error) {
			if n++; n <= looks {
				return []podSandbox{{id: "abc", ready: true}}, nil, nil
			}
			return nil, nil, nil
		}))
		body, err := json.Marshal(podQuery)
		if err != nil {
			t.Fatal(err)
		}
		recorder := httptest.NewRecorder()
		Handler(inspector, logr.Discard()).ServeHTTP(recorder, httptest.NewRequestWithContext(ctx, http.MethodPost, InspectPath+"?"+parameters, bytes.NewReader(body)))
		var report sandbox.Report
		if err := json.Unmarshal(recorder.Body.Bytes(), &report); err != nil {
			t.Fatalf("%d %s: %v", recorder.Code, recorder.Body, err)
		}
		return report, n
	}
	if report, looks := ask(t.Context(), 2, "wait=30s"); report.Verdict() != sandbox.Released || looks != 3 {
		t.Errorf("released while waiting: %s after %d looks", report.Verdict(), looks)
	}
	if report, looks := ask(t.Context(), 1000, "wait=150ms"); report.Verdict() != sandbox.Bound || looks < 2 {
		t.Errorf("still bound at the end: %s after %d looks", report.Verdict(), looks)
	}
	if report, looks := ask(t.Context(), 1000, ""); report.Verdict() != sandbox.Bound || looks != 1 {
		t.Errorf("without waiting: %s after %d looks", report.Verdict(), looks)
	}
	gone, leave := context.WithCancel(t.Context())
	leave()
	if _, looks := ask(gone, 1000, "wait=30s"); looks > 1 {
		t.Errorf("%d looks for a caller who has gone", looks)
	}
}
