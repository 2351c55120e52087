package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/eni-guard/eni-guard/internal/sandbox"
)

const (
	// podUIDLabel is on every sandbox and container that a kubelet makes (k8s.io/kubelet/pkg/types.KubernetesPodUIDLabel).
	podUIDLabel = "io.kubernetes.pod.uid"
	// configSourceAnnotation says where the kubelet has a pod from: "api", or else it is a static pod
	// (pkg/kubelet/types.ConfigSourceAnnotationKey). The kubelet puts a pod's annotations on its sandboxes.
	configSourceAnnotation = "kubernetes.io/config.source"
)

// podSandbox is what the runtime knows about one sandbox of a pod.
type podSandbox struct {
	id    string
	pod   sandbox.Pod
	ready bool
	// static says that the kubelet has the pod from a file, so that the API server has it under another UID, or not at all.
	static bool
	details
}

// details are what does not change in the life of a sandbox.
type details struct {
	// netnsPath is where the namespace is, or was: runtimes keep the path after they closed the namespace. Empty for a
	// sandbox in the host's network namespace.
	netnsPath string
	// ips are the addresses it was given. Runtimes forget them when the sandbox has ended.
	ips    []netip.Addr
	cgroup string
	// pid is that of the sandbox's own process; 0 where there is none, as mostly with CRI-O.
	pid int
}

func (s podSandbox) shortID() string { return sandbox.ShortID(s.id) }

// podContainer is a container of a pod that the runtime calls running.
type podContainer struct {
	id, name, sandboxID string
}

// podRecords is what the runtime knows about a pod.
type podRecords struct {
	sandboxes  []podSandbox
	containers []podContainer
}

// Runtime asks a container runtime over the CRI.
type Runtime struct {
	client runtimeapi.RuntimeServiceClient
	conn   *grpc.ClientConn

	mu sync.Mutex
	// known are the details of sandboxes that have been ready once, so that each is asked about once.
	known map[string]details
}

// NewRuntime returns a client for the CRI socket at path. It connects when it is first used and again whenever the
// runtime was restarted, so a runtime that is down is no error here.
func NewRuntime(path string) (*Runtime, error) {
	conn, err := grpc.NewClient("unix://"+strings.TrimPrefix(path, "unix://"), grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			conn, _, err := dialSocket(ctx, path)
			return conn, err
		}),
		// As the kubelet's (pkg/kubelet/cri/remote, maxMsgSize): a full node's list may have more than gRPC's 4 MiB.
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(16<<20)),
		// A runtime that is back must be asked soon, however long it was away; one that is slow to greet has as long as a question may last.
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 3 * time.Second}, MinConnectTimeout: maxTimeout}))
	if err != nil {
		return nil, fmt.Errorf("CRI socket %s: %w", path, err)
	}
	return &Runtime{client: runtimeapi.NewRuntimeServiceClient(conn), conn: conn, known: map[string]details{}}, nil
}

// dialSocket connects to a CRI socket; listener is the PID of who listens there, mostly the runtime. Whoever has a PID namespace of its own,
// and so cannot see the processes of the node, does not see that one: the kernel then says 0 (man 7 unix, SO_PEERCRED). What such an agent
// does not find proves nothing, so it gets no connection. (Process 1 tells less: every PID namespace has one.)
func dialSocket(ctx context.Context, path string) (conn net.Conn, listener int, err error) {
	conn, err = (&net.Dialer{}).DialContext(ctx, "unix", strings.TrimPrefix(path, "unix://"))
	if err != nil {
		return nil, 0, err
	}
	socket, ok := conn.(*net.UnixConn)
	if !ok {
		return nil, 0, errors.Join(fmt.Errorf("%s is no socket of this machine", path), conn.Close())
	}
	raw, err := socket.SyscallConn()
	if err == nil {
		var peer *unix.Ucred
		var peerErr error
		err = raw.Control(func(fd uintptr) { peer, peerErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
		if err = errors.Join(err, peerErr); err == nil && peer.Pid == 0 {
			err = errors.New("the runtime's process does not show: this does not run in the host's PID namespace (hostPID: true is missing)")
		}
		if err == nil {
			return conn, int(peer.Pid), nil
		}
	}
	return nil, 0, errors.Join(err, conn.Close())
}

// Close ends the connection.
func (r *Runtime) Close() error { return r.conn.Close() }

// pod returns the sandboxes of a pod UID, ready or not, and its running containers; beside an error, those that could be
// read. It never filters by state: a sandbox that is not ready may still have its namespace.
func (r *Runtime) pod(ctx context.Context, uid string) (podRecords, error) {
	return r.records(ctx, map[string]string{podUIDLabel: uid})
}

// all does the same for all pods of the node.
func (r *Runtime) all(ctx context.Context) (podRecords, error) {
	return r.records(ctx, nil)
}

func (r *Runtime) records(ctx context.Context, selector map[string]string) (podRecords, error) {
	var found podRecords
	// Both at once, for the time that it takes: which one is the older does not matter, as anything in either is a finding.
	var containers *runtimeapi.ListContainersResponse
	var containersErr error
	var listing sync.WaitGroup
	listing.Go(func() {
		containers, containersErr = r.client.ListContainers(ctx, &runtimeapi.ListContainersRequest{
			Filter: &runtimeapi.ContainerFilter{LabelSelector: selector},
		})
	})
	list, sandboxesErr := r.client.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{
		Filter: &runtimeapi.PodSandboxFilter{LabelSelector: selector},
	})
	listing.Wait()
	var unread []error
	for _, err := range []error{sandboxesErr, containersErr} {
		if err != nil {
			unread = append(unread, runtimeError(err))
		}
	}
	for _, item := range list.GetItems() {
		s := podSandbox{
			id:    item.GetId(),
			ready: item.GetState() == runtimeapi.PodSandboxState_SANDBOX_READY,
			pod: sandbox.Pod{
				Namespace: item.GetMetadata().GetNamespace(), Name: item.GetMetadata().GetName(), UID: item.GetMetadata().GetUid(),
			},
		}
		source, told := item.GetAnnotations()[configSourceAnnotation]
		s.static = told && source != "api"
		var err error
		s.details, err = r.details(ctx, s)
		if status.Code(err) == codes.NotFound && !r.listed(ctx, s.id) {
			continue // removed since it was listed
		}
		// For its own pod that matters. Among all, one that has ended and whose record is damaged hides nothing: if its namespace is
		// there, it is nobody's.
		damaged := errors.Is(err, errDamaged) || status.Code(err) == codes.NotFound
		if err != nil && (selector != nil || s.ready || !damaged) {
			unread = append(unread, runtimeError(err))
		}
		found.sandboxes = append(found.sandboxes, s)
	}
	if selector == nil && sandboxesErr == nil {
		r.forget(found.sandboxes)
	}
	for _, c := range containers.GetContainers() {
		// CONTAINER_UNKNOWN is what a runtime says that lost its shim: the processes may well live.
		if c.GetState() == runtimeapi.ContainerState_CONTAINER_RUNNING || c.GetState() == runtimeapi.ContainerState_CONTAINER_UNKNOWN {
			found.containers = append(found.containers, podContainer{id: c.GetId(), name: c.GetMetadata().GetName(), sandboxID: c.GetPodSandboxId()})
		}
	}
	return found, errors.Join(unread...)
}

// listed says whether the runtime still has a sandbox, or cannot tell. It may have one whose status it does not find: containerd, when
// somebody has removed the container behind it.
func (r *Runtime) listed(ctx context.Context, id string) bool {
	list, err := r.client.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{Filter: &runtimeapi.PodSandboxFilter{Id: id}})
	return err != nil || len(list.GetItems()) > 0
}

// details reads what does not change of a sandbox, from memory where it was read before.
func (r *Runtime) details(ctx context.Context, s podSandbox) (details, error) {
	r.mu.Lock()
	known, ok := r.known[s.id]
	r.mu.Unlock()
	if ok {
		return known, nil
	}
	response, err := r.client.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: s.id, Verbose: true})
	if err != nil {
		return details{}, err
	}
	d, err := verboseDetails(response.GetInfo()["info"])
	if err != nil {
		return d, fmt.Errorf("sandbox %s: %w", s.shortID(), err)
	}
	network := response.GetStatus().GetNetwork()
	for _, text := range append([]string{network.GetIp()}, additionalIPs(network)...) {
		// A sandbox that is not ready has no address any more; the field is then empty.
		if ip, err := netip.ParseAddr(text); err == nil {
			d.ips = append(d.ips, ip.Unmap())
		}
	}
	// Before it is ready it may have none of this yet, and after that no addresses.
	if response.GetStatus().GetState() == runtimeapi.PodSandboxState_SANDBOX_READY {
		r.mu.Lock()
		r.known[s.id] = d
		r.mu.Unlock()
	}
	return d, nil
}

// forget drops the details of all other sandboxes.
func (r *Runtime) forget(others []podSandbox) {
	r.mu.Lock()
	defer r.mu.Unlock()
	kept := map[string]details{}
	for _, s := range others {
		if d, ok := r.known[s.id]; ok {
			kept[s.id] = d
		}
	}
	r.known = kept
}

func additionalIPs(network *runtimeapi.PodSandboxNetworkStatus) []string {
	var ips []string
	for _, ip := range network.GetAdditionalIps() {
		ips = append(ips, ip.GetIp())
	}
	return ips
}

// errDamaged is of a sandbox of which the runtime knows no more than that it is there. containerd 2 keeps such a record when somebody has
// removed the sandbox's container.
var errDamaged = errors.New("the runtime tells no runtimeSpec of it, as of a sandbox whose record is damaged, so its network namespace is not known")

// verboseDetails reads the verbose status of a sandbox. CRI has no fields for these; containerd
// (internal/cri/types.SandboxInfo) and CRI-O (server/sandbox_status.go, createSandboxInfo) both put the sandbox's process
// and its OCI runtime spec into "info".
func verboseDetails(info string) (details, error) {
	var verbose struct {
		PID         int `json:"pid"`
		RuntimeSpec *struct {
			Linux struct {
				CgroupsPath string
				Namespaces  []struct{ Type, Path string }
			} `json:"linux"`
		} `json:"runtimeSpec"`
	}
	if info == "" {
		return details{}, errDamaged
	}
	if err := json.Unmarshal([]byte(info), &verbose); err != nil {
		return details{}, fmt.Errorf("the runtime's verbose sandbox status is not JSON: %w", err)
	}
	if verbose.RuntimeSpec == nil {
		return details{}, errDamaged
	}
	d := details{pid: verbose.PID, cgroup: verbose.RuntimeSpec.Linux.CgroupsPath}
	for _, ns := range verbose.RuntimeSpec.Linux.Namespaces {
		if ns.Type != "network" {
			continue
		}
		if ns.Path == "" {
			return d, errors.New("the runtime names no path of the sandbox's network namespace")
		}
		d.netnsPath = cleanNetnsPath(ns.Path)
	}
	return d, nil
}

// events returns a channel that tells of events of the runtime until ctx ends; of several in a row, once. Where the runtime has
// no events, or only for one who asks, none comes.
func (r *Runtime) events(ctx context.Context) <-chan struct{} {
	events := make(chan struct{}, 1)
	go func() {
		if !r.broadcasts(ctx) {
			return
		}
		stream, err := r.client.GetContainerEvents(ctx, &runtimeapi.GetEventsRequest{})
		for err == nil {
			if _, err = stream.Recv(); err == nil {
				select {
				case events <- struct{}{}:
				default:
				}
			}
		}
	}()
	return events
}

// version returns the name and the version of the runtime.
func (r *Runtime) version(ctx context.Context) (string, error) {
	version, err := r.client.Version(ctx, &runtimeapi.VersionRequest{})
	if err != nil {
		return "", runtimeError(err)
	}
	return version.GetRuntimeName() + " " + version.GetRuntimeVersion(), nil
}

// broadcasts says whether everybody who asks the runtime for its events gets all of them. In containerd before 2.0 and in
// CRI-O each event goes to one listener only (containerd issue 7318, CRI-O issue 6466), and the kubelet may be one.
func (r *Runtime) broadcasts(ctx context.Context) bool {
	version, err := r.client.Version(ctx, &runtimeapi.VersionRequest{})
	if err != nil || version.GetRuntimeName() != "containerd" {
		return false
	}
	major, _, _ := strings.Cut(strings.TrimPrefix(version.GetRuntimeVersion(), "v"), ".")
	n, err := strconv.Atoi(major)
	return err == nil && n >= 2
}

// noRuntimeAnswer is the error of a runtime that has taken a question and does not answer.
const noRuntimeAnswer = "container runtime: no answer in time"

// runtimeError makes a gRPC error readable: its message, without the code in front.
func runtimeError(err error) error {
	if s, ok := status.FromError(err); ok && err != nil {
		// Of a runtime that says nothing to a new connection, gRPC only tells that it has closed that itself.
		closed := strings.Contains(s.Message(), "error reading server preface") && strings.Contains(s.Message(), net.ErrClosed.Error())
		if s.Code() == codes.DeadlineExceeded || closed {
			return errors.New(noRuntimeAnswer)
		}
		return fmt.Errorf("container runtime: %s", s.Message())
	}
	return err
}
