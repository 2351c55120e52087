package agent

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// recordedCRI answers as containerd does, from what a test put in.
type recordedCRI struct {
	runtimeapi.UnimplementedRuntimeServiceServer
	sandboxes  map[string]*runtimeapi.PodSandboxStatusResponse // by ID
	containers []*runtimeapi.Container
	fails      string // the call that fails
}

func (r *recordedCRI) failure(call string) error {
	if r.fails == call {
		return status.Error(codes.Internal, call+" failed")
	}
	return nil
}

func (r *recordedCRI) ListPodSandbox(_ context.Context, request *runtimeapi.ListPodSandboxRequest) (*runtimeapi.ListPodSandboxResponse, error) {
	if uid := request.GetFilter().GetLabelSelector()["io.kubernetes.pod.uid"]; uid != podUID || request.GetFilter().GetState() != nil {
		return nil, fmt.Errorf("listed with %v", request.GetFilter())
	}
	response := &runtimeapi.ListPodSandboxResponse{Items: []*runtimeapi.PodSandbox{{Id: "removed-since"}}}
	for _, id := range []string{"new", "old"} {
		if r.sandboxes[id] != nil {
			response.Items = append(response.Items, &runtimeapi.PodSandbox{Id: id})
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
	if uid := request.GetFilter().GetLabelSelector()["io.kubernetes.pod.uid"]; uid != podUID {
		return nil, fmt.Errorf("listed with %v", request.GetFilter())
	}
	return &runtimeapi.ListContainersResponse{Containers: r.containers}, r.failure("ListContainers")
}

func serveCRI(t *testing.T, cri *recordedCRI) *Runtime {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "cri.sock")
	listener, err := (&net.ListenConfig{}).Listen(t.Context(), "unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer()
	runtimeapi.RegisterRuntimeServiceServer(server, cri)
	go func() { _ = server.Serve(listener) }()
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
		Info:   map[string]string{"info": fmt.Sprintf(`{"runtimeSpec":{"linux":{"namespaces":[{"type":"network","path":%q}]}}}`, netns)},
	}
}

func twoSandboxes() *recordedCRI {
	return &recordedCRI{
		sandboxes: map[string]*runtimeapi.PodSandboxStatusResponse{
			"new": sandboxStatus(runtimeapi.PodSandboxState_SANDBOX_READY, "/run/netns/cni-2", "10.0.0.2", "fd00::2"),
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
	newSandbox = podSandbox{id: "new", ready: true, netnsPath: "/run/netns/cni-2", ips: []netip.Addr{netip.MustParseAddr("10.0.0.2"), netip.MustParseAddr("fd00::2")}}
	oldSandbox = podSandbox{id: "old", netnsPath: "/run/netns/cni-1"}
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
		{"sandboxes cannot be listed", "ListPodSandbox", nil, nil, "container runtime: ListPodSandbox failed"},
		{"one sandbox cannot be read", "PodSandboxStatus of new", []podSandbox{{id: "new"}, oldSandbox}, containers, "PodSandboxStatus of new failed"},
		{"containers cannot be listed: the sandboxes are still evidence", "ListContainers", []podSandbox{newSandbox, oldSandbox}, nil, "ListContainers failed"},
	} {
		t.Run(test.name, func(t *testing.T) {
			cri := twoSandboxes()
			cri.fails = test.fails
			sandboxes, running, err := serveCRI(t, cri).pod(t.Context(), podUID)
			if !reflect.DeepEqual(sandboxes, test.sandboxes) || !reflect.DeepEqual(running, test.containers) {
				t.Errorf("got %+v and %+v", sandboxes, running)
			}
			if (err == nil) != (test.want == "") || err != nil && !strings.Contains(err.Error(), test.want) {
				t.Errorf("got error %v, want %q", err, test.want)
			}
		})
	}
}

func TestRuntimeThatIsNotThere(t *testing.T) {
	runtime, err := NewRuntime(filepath.Join(t.TempDir(), "missing.sock"))
	if err != nil {
		t.Fatal(err)
	}
	defer runtime.Close()
	if _, _, err := runtime.pod(t.Context(), podUID); err == nil || !strings.HasPrefix(err.Error(), "container runtime: ") || !strings.Contains(err.Error(), "no such file") {
		t.Errorf("got %v", err)
	}
}
