package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
)

// Bounds of the subnets' prefix lengths: an IPv4 /30 is the smallest with an address for a pod, and an IPv6 /112 has more
// than the largest pool.
const (
	minPrefix  = 16
	maxPrefix  = 30
	minPrefix6 = 64
	maxPrefix6 = 112
)

// familiesAnnotation is how a pod says which addresses it gets, in the words of a Service's ipFamilies.
const familiesAnnotation = "eni-sim/ip-families"

// config is the plugin's network configuration.
type config struct {
	types.PluginConf

	// StateDir is an absolute path; the directory is made if it is missing.
	StateDir string `json:"stateDir"`
	// Subnet is an IPv4 network from /16 to /30, without host bits.
	Subnet netip.Prefix `json:"subnet"`
	// Subnet6 is an IPv6 network from /64 to /112, without host bits.
	Subnet6 netip.Prefix `json:"subnet6"`
	// PoolSize is how many addresses of each subnet pods may have: at least 1, at most what the IPv4 subnet has apart from
	// the network, the first and the broadcast address.
	PoolSize int `json:"poolSize"`

	// RuntimeConfig is what the runtime adds for the plugin's capabilities. This one is containerd's own.
	RuntimeConfig struct {
		PodAnnotations map[string]string `json:"io.kubernetes.cri.pod-annotations"`
	} `json:"runtimeConfig"`
}

func (c *config) validate() error {
	switch {
	case c.StateDir == "":
		return errors.New("stateDir is missing")
	case !filepath.IsAbs(c.StateDir):
		return fmt.Errorf("stateDir %q is not an absolute path", c.StateDir)
	case !c.Subnet.IsValid():
		return errors.New("subnet is missing")
	case !c.Subnet.Addr().Is4():
		return fmt.Errorf("subnet %s is not an IPv4 network", c.Subnet)
	case c.Subnet != c.Subnet.Masked():
		return fmt.Errorf("subnet %s has host bits: %s is meant", c.Subnet, c.Subnet.Masked())
	case c.Subnet.Bits() < minPrefix || c.Subnet.Bits() > maxPrefix:
		return fmt.Errorf("subnet %s is not between /%d and /%d", c.Subnet, minPrefix, maxPrefix)
	case !c.Subnet6.IsValid():
		return errors.New("subnet6 is missing")
	case !c.Subnet6.Addr().Is6():
		return fmt.Errorf("subnet6 %s is not an IPv6 network", c.Subnet6)
	case c.Subnet6 != c.Subnet6.Masked():
		return fmt.Errorf("subnet6 %s has host bits: %s is meant", c.Subnet6, c.Subnet6.Masked())
	case c.Subnet6.Bits() < minPrefix6 || c.Subnet6.Bits() > maxPrefix6:
		return fmt.Errorf("subnet6 %s is not between /%d and /%d", c.Subnet6, minPrefix6, maxPrefix6)
	case c.PoolSize < 1 || c.PoolSize > usable(c.Subnet):
		return fmt.Errorf("poolSize %d is not between 1 and the %d of subnet %s", c.PoolSize, usable(c.Subnet), c.Subnet)
	}
	return nil
}

// request is one call of the runtime.
type request struct {
	config
	pod        string // namespace/name
	uid        string // of the pod; empty if the runtime does not tell it
	container  string // id of the sandbox
	netns      string // path; may be empty for a DEL
	hostDevice string
}

// podArgs, with the names of the arguments, are what runtimes for Kubernetes put into CNI_ARGS.
type podArgs struct {
	types.CommonArgs
	K8S_POD_NAMESPACE types.UnmarshallableString
	K8S_POD_NAME      types.UnmarshallableString
	K8S_POD_UID       types.UnmarshallableString
}

func parseRequest(args *skel.CmdArgs) (*request, error) {
	req := request{container: args.ContainerID, netns: args.Netns}
	if err := json.Unmarshal(args.StdinData, &req.config); err != nil {
		return nil, types.NewError(types.ErrDecodingFailure, "network configuration: "+err.Error(), "")
	}
	if err := req.validate(); err != nil {
		return nil, types.NewError(types.ErrInvalidNetworkConfig, "network configuration: "+err.Error(), "")
	}
	pod := podArgs{CommonArgs: types.CommonArgs{IgnoreUnknown: true}}
	if err := types.LoadArgs(args.Args, &pod); err != nil {
		return nil, types.NewError(types.ErrInvalidEnvironmentVariables, "CNI_ARGS: "+err.Error(), "")
	}
	if pod.K8S_POD_NAMESPACE == "" || pod.K8S_POD_NAME == "" {
		return nil, types.NewError(types.ErrInvalidEnvironmentVariables, "CNI_ARGS: K8S_POD_NAMESPACE and K8S_POD_NAME are both needed", "")
	}
	if args.IfName != podDevice {
		return nil, types.NewError(types.ErrInvalidEnvironmentVariables, fmt.Sprintf("CNI_IFNAME: %s is not %s, the one interface of a pod", args.IfName, podDevice), "")
	}
	namespace, name := string(pod.K8S_POD_NAMESPACE), string(pod.K8S_POD_NAME)
	req.pod = namespace + "/" + name
	req.uid = string(pod.K8S_POD_UID)
	req.hostDevice = hostDeviceName(namespace, name)
	return &req, nil
}

// families says which addresses a pod gets.
type families struct{ ipv4, ipv6 bool }

// families reads the pod's annotation; without one a pod gets an IPv4 address alone. Only an ADD asks: whatever the
// annotation says, a DEL must go through.
func (c *config) families() (families, error) {
	switch value := c.RuntimeConfig.PodAnnotations[familiesAnnotation]; value {
	case "", "IPv4":
		return families{ipv4: true}, nil
	case "IPv6":
		return families{ipv6: true}, nil
	case "IPv4,IPv6":
		return families{ipv4: true, ipv6: true}, nil
	default:
		return families{}, fmt.Errorf("annotation %s: %q is not IPv4, IPv6 or IPv4,IPv6", familiesAnnotation, value)
	}
}
