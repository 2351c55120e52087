package agent

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/eni-guard/eni-guard/internal/sandbox"
)

// recordedCRI answers as containerd does, from what a test put in.
type recordedCRI struct {
	runtimeapi.UnimplementedRuntimeServiceServer
	sandboxes  map[string]*runtimeapi.PodSandboxStatusResponse // by ID
	containers []*runtimeapi.Container
	fails      string // the call that fails
	// hasNoStatus is a sandbox that is listed for as long as one looks, and has no status.
	hasNoStatus string
	source      map[string]string // annotations of the sandboxes
	name        string            // of the runtime
	version     string
	events      chan *runtimeapi.ContainerEventResponse
	listeners   atomic.Int32
}

func (r *recordedCRI) Version(context.Context, *runtimeapi.VersionRequest) (*runtimeapi.VersionResponse, error) {
	return &runtimeapi.VersionResponse{RuntimeName: r.name, RuntimeVersion: r.version}, nil
}

func (r *recordedCRI) GetContainerEvents(_ *runtimeapi.GetEventsRequest, stream grpc.ServerStreamingServer[runtimeapi.ContainerEventResponse]) error {
	r.listeners.Add(1)
	for {
		select {
		case event := <-r.events:
			if err := stream.Send(event); err != nil {
				return err
			}
		case <-stream.Context().Done():
			return nil
		}
	}
}

func (r *recordedCRI) failure(call string) error {
	if r.fails == call {
		return status.Error(codes.Internal, call+" failed")
	}
	return nil
}

func (r *recordedCRI) ListPodSandbox(_ context.Context, request *runtimeapi.ListPodSandboxRequest) (*runtimeapi.ListPodSandboxResponse, error) {
	if id := request.GetFilter().GetId(); id != "" {
		if id == r.hasNoStatus {
			return &runtimeapi.ListPodSandboxResponse{Items: []*runtimeapi.PodSandbox{{Id: id}}}, nil
		}
		return &runtimeapi.ListPodSandboxResponse{}, nil
	}
	if labels := request.GetFilter().GetLabelSelector(); len(labels) > 0 && labels["io.kubernetes.pod.uid"] != podUID || request.GetFilter().GetState() != nil {
		return nil, fmt.Errorf("listed with %v", request.GetFilter())
	}
	response := &runtimeapi.ListPodSandboxResponse{Items: []*runtimeapi.PodSandbox{{Id: "removed-since"}}}
	for _, id := range []string{"new", "old"} {
		if r.sandboxes[id] != nil {
			response.Items = append(response.Items, &runtimeapi.PodSandbox{
				Id: id, State: r.sandboxes[id].GetStatus().GetState(),
				Metadata:    &runtimeapi.PodSandboxMetadata{Namespace: "shop", Name: "web-0", Uid: podUID},
				Annotations: r.source,
			})
		}
	}
	return response, r.failure("ListPodSandbox")
}

func (r *recordedCRI) PodSandboxStatus(_ context.Context, request *runtimeapi.PodSandboxStatusRequest) (*runtimeapi.PodSandboxStatusResponse, error) {
	found := r.sandboxes[request.GetPodSandboxId()]
	if found == nil {
		return nil, status.Error(codes.NotFound, "no such sandbox")
	}
	if !request.GetVerbose() {
		found = &runtimeapi.PodSandboxStatusResponse{Status: found.GetStatus()}
	}
	return found, r.failure("PodSandboxStatus of " + request.GetPodSandboxId())
}

func (r *recordedCRI) ListContainers(_ context.Context, request *runtimeapi.ListContainersRequest) (*runtimeapi.ListContainersResponse, error) {
	if labels := request.GetFilter().GetLabelSelector(); len(labels) > 0 && labels["io.kubernetes.pod.uid"] != podUID {
		return nil, fmt.Errorf("listed with %v", request.GetFilter())
	}
	return &runtimeapi.ListContainersResponse{Containers: r.containers}, r.failure("ListContainers")
}

func serveCRI(t *testing.T, cri *recordedCRI) *Runtime {
	t.Helper()
	return serveCRIAfter(t, cri, 0)
}

// serveCRIAfter is that of a runtime which takes its time before it greets the first who has connected.
func serveCRIAfter(t *testing.T, cri *recordedCRI, pause time.Duration) *Runtime {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "cri.sock")
	listener, err := (&net.ListenConfig{}).Listen(t.Context(), "unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer()
	runtimeapi.RegisterRuntimeServiceServer(server, cri)
	go func() {
		<-time.After(pause)
		_ = server.Serve(listener)
	}()
	t.Cleanup(server.Stop)
	runtime, err := NewRuntime(socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = runtime.Close() })
	return runtime
}

func sandboxStatus(state runtimeapi.PodSandboxState, netns string, ips ...string) *runtimeapi.PodSandboxStatusResponse {
	network := &runtimeapi.PodSandboxNetworkStatus{}
	for i, ip := range ips {
		if i == 0 {
			network.Ip = ip
		} else {
			network.AdditionalIps = append(network.AdditionalIps, &runtimeapi.PodIP{Ip: ip})
		}
	}
	return &runtimeapi.PodSandboxStatusResponse{
		Status: &runtimeapi.PodSandboxStatus{State: state, Network: network},
		Info:   map[string]string{"info": fmt.Sprintf(`{"pid":77,"runtimeSpec":{"linux":{"cgroupsPath":"/kubepods/c","namespaces":[{"type":"network","path":%q}]}}}`, netns)},
	}
}

func twoSandboxes() *recordedCRI {
	return &recordedCRI{
		sandboxes: map[string]*runtimeapi.PodSandboxStatusResponse{
			"new": sandboxStatus(runtimeapi.PodSandboxState_SANDBOX_READY, "/var/run/netns/cni-2", "10.0.0.2", "fd00::2"),
			"old": sandboxStatus(runtimeapi.PodSandboxState_SANDBOX_NOTREADY, "/run/netns/cni-1"),
		},
		containers: []*runtimeapi.Container{
			{Id: "c1", PodSandboxId: "new", Metadata: &runtimeapi.ContainerMetadata{Name: "app"}, State: runtimeapi.ContainerState_CONTAINER_RUNNING},
			{Id: "c2", PodSandboxId: "new", Metadata: &runtimeapi.ContainerMetadata{Name: "lost"}, State: runtimeapi.ContainerState_CONTAINER_UNKNOWN},
			{Id: "c3", PodSandboxId: "new", Metadata: &runtimeapi.ContainerMetadata{Name: "init"}, State: runtimeapi.ContainerState_CONTAINER_EXITED},
		},
	}
}

var (
	podOfRecords = sandbox.Pod{Namespace: "shop", Name: "web-0", UID: podUID}
	newSandbox   = podSandbox{id: "new", pod: podOfRecords, ready: true, details: details{
		netnsPath: "/run/netns/cni-2", ips: []netip.Addr{netip.MustParseAddr("10.0.0.2"), netip.MustParseAddr("fd00::2")}, cgroup: "/kubepods/c", pid: 77,
	}}
	oldSandbox = podSandbox{id: "old", pod: podOfRecords, details: details{netnsPath: "/run/netns/cni-1", cgroup: "/kubepods/c", pid: 77}}
	containers = []podContainer{{"c1", "app", "new"}, {"c2", "lost", "new"}}
)

func TestRuntimePod(t *testing.T) {
	for _, test := range []struct {
		name       string
		fails      string
		sandboxes  []podSandbox
		containers []podContainer
		want       string
	}{
		{"everything answers", "", []podSandbox{newSandbox, oldSandbox}, containers, ""},
		{"sandboxes cannot be listed: the containers are still evidence", "ListPodSandbox", nil, containers, "container runtime: ListPodSandbox failed"},
		{"one sandbox cannot be read", "PodSandboxStatus of new", []podSandbox{{id: "new", pod: podOfRecords, ready: true}, oldSandbox}, containers, "PodSandboxStatus of new failed"},
		{"containers cannot be listed: the sandboxes are still evidence", "ListContainers", []podSandbox{newSandbox, oldSandbox}, nil, "ListContainers failed"},
	} {
		t.Run(test.name, func(t *testing.T) {
			cri := twoSandboxes()
			cri.fails = test.fails
			found, err := serveCRI(t, cri).pod(t.Context(), podUID)
			if !reflect.DeepEqual(found, podRecords{test.sandboxes, test.containers}) {
				t.Errorf("got %+v", found)
			}
			if (err == nil) != (test.want == "") || err != nil && !strings.Contains(err.Error(), test.want) {
				t.Errorf("got error %v, want %q", err, test.want)
			}
		})
	}
}

// Of a static pod the API server has a mirror, under another UID: what it leaves behind cannot be told by that.
func TestStaticPodsAreToldByTheirSource(t *testing.T) {
	for _, test := range []struct {
		source map[string]string
		static bool
	}{
		{nil, false},
		{map[string]string{"kubernetes.io/config.source": "api"}, false},
		{map[string]string{"kubernetes.io/config.source": "file"}, true},
		{map[string]string{"kubernetes.io/config.source": "http"}, true},
	} {
		cri := twoSandboxes()
		cri.source = test.source
		found, err := serveCRI(t, cri).all(t.Context())
		if err != nil || len(found.sandboxes) != 2 || found.sandboxes[0].static != test.static {
			t.Errorf("%v: got %+v (%v)", test.source, found, err)
		}
	}
}

// The events of a runtime that gives each to one listener only are left to the kubelet.
func TestRuntimeEvents(t *testing.T) {
	for _, test := range []struct {
		name, version string
		want          bool
	}{
		{"containerd", "v2.4.2", true},
		{"containerd", "2.0.0", true},
		{"containerd", "v10.0.0", true},
		{"containerd", "1.7.35", false},
		{"containerd", "1.6.20~ds1", false},
		{"containerd", "", false},
		{"cri-o", "1.33.0", false},
	} {
		t.Run(test.name+" "+test.version, func(t *testing.T) {
			cri := &recordedCRI{name: test.name, version: test.version, events: make(chan *runtimeapi.ContainerEventResponse)}
			runtime := serveCRI(t, cri)
			if got, err := runtime.version(t.Context()); err != nil || got != test.name+" "+test.version {
				t.Errorf("version %q (%v)", got, err)
			}
			if got := runtime.broadcasts(t.Context()); got != test.want {
				t.Fatalf("listens: %v", got)
			}
			if !test.want {
				return
			}
			events := runtime.events(t.Context())
			for range 2 {
				cri.events <- &runtimeapi.ContainerEventResponse{}
				<-events
			}
			if n := cri.listeners.Load(); n != 1 {
				t.Errorf("%d listeners", n)
			}
		})
	}
}

// What does not change of a sandbox is asked about once, but only when it is known for good; and not kept longer than the sandbox.
func TestDetailsAreRemembered(t *testing.T) {
	cri := twoSandboxes()
	runtime := serveCRI(t, cri)
	known := func() (ids []string) {
		for id := range runtime.known {
			ids = append(ids, id)
		}
		return ids
	}
	if _, err := runtime.pod(t.Context(), podUID); err != nil || !slices.Equal(known(), []string{"new"}) {
		t.Errorf("remembers %v (%v)", known(), err)
	}
	// The addresses of a sandbox that has ended since are those it had.
	cri.sandboxes["new"] = sandboxStatus(runtimeapi.PodSandboxState_SANDBOX_NOTREADY, "/run/netns/cni-2")
	found, err := runtime.pod(t.Context(), podUID)
	if err != nil || found.sandboxes[0].ready || !reflect.DeepEqual(found.sandboxes[0].ips, newSandbox.ips) {
		t.Errorf("got %+v (%v)", found, err)
	}
	cri.fails = "ListPodSandbox"
	if _, err := runtime.all(t.Context()); err == nil || !slices.Equal(known(), []string{"new"}) {
		t.Errorf("when nobody knows what is there, it still remembers %v (%v)", known(), err)
	}
	runtime.forget([]podSandbox{{id: "new"}, {id: "other"}})
	if !slices.Equal(known(), []string{"new"}) {
		t.Errorf("of what is there, it still remembers %v", known())
	}
	runtime.forget([]podSandbox{{id: "other"}})
	if len(known()) > 0 {
		t.Errorf("still remembers %v", known())
	}
}

// A sandbox that is still listed, though its status is not found, has not been removed.
func TestASandboxWithoutAStatus(t *testing.T) {
	cri := twoSandboxes()
	cri.hasNoStatus = "removed-since"
	found, err := serveCRI(t, cri).pod(t.Context(), podUID)
	if err == nil || !strings.Contains(err.Error(), "no such sandbox") || len(found.sandboxes) != 3 {
		t.Errorf("got %+v (%v)", found, err)
	}
}

// A damaged record of one pod's sandbox leaves that pod unknown, and says nothing about others; unless the runtime calls it ready.
func TestADamagedRecord(t *testing.T) {
	for _, test := range []struct {
		state      runtimeapi.PodSandboxState
		info       map[string]string
		ofPod, all bool // whether that fails
	}{
		{runtimeapi.PodSandboxState_SANDBOX_NOTREADY, map[string]string{"info": `{"pid":0}`}, true, false},
		{runtimeapi.PodSandboxState_SANDBOX_NOTREADY, nil, true, false},
		{runtimeapi.PodSandboxState_SANDBOX_NOTREADY, map[string]string{"info": "garbage"}, true, true},
		{runtimeapi.PodSandboxState_SANDBOX_READY, map[string]string{"info": `{"pid":0}`}, true, true},
	} {
		cri := twoSandboxes()
		cri.sandboxes["old"] = &runtimeapi.PodSandboxStatusResponse{Status: &runtimeapi.PodSandboxStatus{State: test.state}, Info: test.info}
		runtime := serveCRI(t, cri)
		ofPod, err := runtime.pod(t.Context(), podUID)
		if (err != nil) != test.ofPod || len(ofPod.sandboxes) != 2 {
			t.Errorf("%s %v, of the pod: %+v (%v)", test.state, test.info, ofPod, err)
		}
		all, err := runtime.all(t.Context())
		if (err != nil) != test.all || len(all.sandboxes) != 2 {
			t.Errorf("%s %v, of all: %+v (%v)", test.state, test.info, all, err)
		}
	}
}

// A busy node may take seconds until a runtime greets. The question has its own limit.
func TestARuntimeThatIsSlowToGreet(t *testing.T) {
	t.Parallel()
	runtime := serveCRIAfter(t, &recordedCRI{}, 2500*time.Millisecond)
	if records, err := runtime.pod(t.Context(), podUID); err != nil || len(records.sandboxes) > 0 {
		t.Errorf("got %+v, %v", records, err)
	}
}

func TestRuntimeThatIsNotThere(t *testing.T) {
	runtime, err := NewRuntime(filepath.Join(t.TempDir(), "missing.sock"))
	if err != nil {
		t.Fatal(err)
	}
	defer runtime.Close()
	if _, err := runtime.pod(t.Context(), podUID); err == nil || !strings.HasPrefix(err.Error(), "container runtime: ") || !strings.Contains(err.Error(), "no such file") {
		t.Errorf("got %v", err)
	}
	if version, err := runtime.version(t.Context()); err == nil || !strings.HasPrefix(err.Error(), "container runtime: ") {
		t.Errorf("version %q (%v)", version, err)
	}
}

const helperElsewhere = "ENI_GUARD_HELPER_ELSEWHERE"

// TestHelperElsewhere is the process of the test below: it prints whether it could ask the runtime whose socket it is given, and could list
// the namespaces of the node.
func TestHelperElsewhere(t *testing.T) {
	socket := os.Getenv(helperElsewhere)
	if socket == "" {
		return
	}
	runtime, err := NewRuntime(socket)
	if err == nil {
		_, err = runtime.version(t.Context())
	}
	_, namespacesErr := realNode.mountedNamespaces()
	fmt.Printf("%d: %v, %v\n", os.Getpid(), err, namespacesErr)
}

// Who is in a PID namespace of its own sees no process of the node, and must not say that there is none. Whether it is process 1 there does
// not matter.
func TestOnlyInThePIDNamespaceOfTheRuntime(t *testing.T) {
	requireRoot(t)
	socket := filepath.Join(t.TempDir(), "cri.sock")
	listener, err := (&net.ListenConfig{}).Listen(t.Context(), "unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer()
	runtimeapi.RegisterRuntimeServiceServer(server, &recordedCRI{})
	go func() { _ = server.Serve(listener) }()
	t.Cleanup(server.Stop)
	for flags, want := range map[uintptr]string{
		0:                 ": <nil>, <nil>\n",
		unix.CLONE_NEWPID: `does not run in the host's PID namespace (hostPID: true is missing)", the agent has a PID namespace of its own`,
	} {
		cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run", "^TestHelperElsewhere$")
		cmd.Env = append(os.Environ(), helperElsewhere+"="+socket)
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: flags}
		if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), want) {
			t.Errorf("with flags %#x: %v: %s", flags, err, out)
		}
	}
}
