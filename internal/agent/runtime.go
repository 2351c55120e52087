package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/eni-guard/eni-guard/internal/sandbox"
)

// podUIDLabel is on every sandbox and container that a kubelet makes (k8s.io/kubelet/pkg/types.KubernetesPodUIDLabel).
const podUIDLabel = "io.kubernetes.pod.uid"

// podSandbox is what the runtime knows about one sandbox of a pod.
type podSandbox struct {
	id    string
	ready bool
	// netnsPath is where the namespace is, or was: runtimes keep the path after they closed the namespace. Empty for a
	// sandbox in the host's network namespace.
	netnsPath string
	ips       []netip.Addr
}

// podContainer is a container of a pod that the runtime calls running.
type podContainer struct {
	id, name, sandboxID string
}

// Runtime asks a container runtime over the CRI.
type Runtime struct {
	client runtimeapi.RuntimeServiceClient
	conn   *grpc.ClientConn
}

// NewRuntime returns a client for the CRI socket at path. It connects when it is first used and again whenever the
// runtime was restarted, so a runtime that is down is no error here.
func NewRuntime(path string) (*Runtime, error) {
	conn, err := grpc.NewClient("unix://"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, fmt.Errorf("CRI socket %s: %w", path, err)
	}
	return &Runtime{client: runtimeapi.NewRuntimeServiceClient(conn), conn: conn}, nil
}

// Close ends the connection.
func (r *Runtime) Close() error { return r.conn.Close() }

// pod returns the sandboxes of a pod UID, ready or not, and its running containers; beside an error, those that could be
// read. It never filters by state: a sandbox that is not ready may still have its namespace.
func (r *Runtime) pod(ctx context.Context, uid string) ([]podSandbox, []podContainer, error) {
	selector := map[string]string{podUIDLabel: uid}
	list, err := r.client.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{
		Filter: &runtimeapi.PodSandboxFilter{LabelSelector: selector},
	})
	if err != nil {
		return nil, nil, runtimeError(err)
	}
	var sandboxes []podSandbox
	var unread []error
	for _, item := range list.GetItems() {
		s, err := r.sandbox(ctx, item.GetId())
		if status.Code(err) == codes.NotFound {
			continue // removed since it was listed
		}
		if err != nil {
			unread = append(unread, runtimeError(err))
		}
		sandboxes = append(sandboxes, s)
	}
	containers, err := r.client.ListContainers(ctx, &runtimeapi.ListContainersRequest{
		Filter: &runtimeapi.ContainerFilter{LabelSelector: selector},
	})
	if err != nil {
		return sandboxes, nil, errors.Join(append(unread, runtimeError(err))...)
	}
	var running []podContainer
	for _, c := range containers.GetContainers() {
		// CONTAINER_UNKNOWN is what a runtime says that lost its shim: the processes may well live.
		if c.GetState() == runtimeapi.ContainerState_CONTAINER_RUNNING || c.GetState() == runtimeapi.ContainerState_CONTAINER_UNKNOWN {
			running = append(running, podContainer{id: c.GetId(), name: c.GetMetadata().GetName(), sandboxID: c.GetPodSandboxId()})
		}
	}
	return sandboxes, running, errors.Join(unread...)
}

func (r *Runtime) sandbox(ctx context.Context, id string) (podSandbox, error) {
	response, err := r.client.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: id, Verbose: true})
	if err != nil {
		return podSandbox{id: id}, err
	}
	s := podSandbox{id: id, ready: response.GetStatus().GetState() == runtimeapi.PodSandboxState_SANDBOX_READY}
	path, err := netnsPath(response.GetInfo()["info"])
	if err != nil {
		err = fmt.Errorf("sandbox %s: %w", sandbox.ShortID(id), err)
	}
	s.netnsPath = path
	network := response.GetStatus().GetNetwork()
	for _, text := range append([]string{network.GetIp()}, additionalIPs(network)...) {
		// A sandbox that is not ready has no address any more; the field is then empty.
		if ip, err := netip.ParseAddr(text); err == nil {
			s.ips = append(s.ips, ip.Unmap())
		}
	}
	return s, err
}

func additionalIPs(network *runtimeapi.PodSandboxNetworkStatus) []string {
	var ips []string
	for _, ip := range network.GetAdditionalIps() {
		ips = append(ips, ip.GetIp())
	}
	return ips
}

// netnsPath reads the path of the network namespace from the verbose status of a sandbox. CRI has no field for it;
// containerd and CRI-O both put the sandbox's OCI runtime spec into "info".
func netnsPath(info string) (string, error) {
	var verbose struct {
		RuntimeSpec *struct {
			Linux struct {
				Namespaces []struct{ Type, Path string } `json:"namespaces"`
			} `json:"linux"`
		} `json:"runtimeSpec"`
	}
	if err := json.Unmarshal([]byte(info), &verbose); err != nil {
		return "", fmt.Errorf("the runtime's verbose sandbox status is not JSON: %w", err)
	}
	if verbose.RuntimeSpec == nil {
		return "", errors.New("the runtime's verbose sandbox status has no runtimeSpec, so the network namespace is not known")
	}
	for _, ns := range verbose.RuntimeSpec.Linux.Namespaces {
		if ns.Type == "network" {
			return ns.Path, nil
		}
	}
	return "", nil
}

// runtimeError makes a gRPC error readable: its message, without the code in front.
func runtimeError(err error) error {
	if s, ok := status.FromError(err); ok && err != nil {
		return fmt.Errorf("container runtime: %s", s.Message())
	}
	return err
}
