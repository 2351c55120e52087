package main

import (
	"errors"
	"strings"
	"testing"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
)

func TestParseRequest(t *testing.T) {
	const (
		good     = `{"cniVersion":"1.0.0","name":"eni-sim","type":"eni-sim","stateDir":"/state","subnet":"10.112.1.0/24","subnet6":"fd00:112:1::/112","poolSize":32}`
		goodArgs = "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0;K8S_POD_UID=u1;K8S_POD_INFRA_CONTAINER_ID=c1;OTHER=x"
	)
	replace := func(old, new string) string { return strings.Replace(good, old, new, 1) }
	tests := []struct {
		name, stdin, args, device string
		code                      uint
		want                      string
	}{
		{name: "not JSON", stdin: "{", code: types.ErrDecodingFailure, want: "network configuration: unexpected end of JSON input"},
		{name: "no stateDir", stdin: replace("/state", ""), code: types.ErrInvalidNetworkConfig, want: "stateDir is missing"},
		{name: "relative stateDir", stdin: replace("/state", "state"), code: types.ErrInvalidNetworkConfig, want: `stateDir "state" is not an absolute path`},
		{name: "no subnet", stdin: replace("10.112.1.0/24", ""), code: types.ErrInvalidNetworkConfig, want: "subnet is missing"},
		{name: "subnet is no network", stdin: replace("10.112.1.0/24", "10.112.1.0"), code: types.ErrDecodingFailure, want: "no '/'"},
		{name: "IPv6", stdin: replace("10.112.1.0/24", "fd00::/64"), code: types.ErrInvalidNetworkConfig, want: "subnet fd00::/64 is not an IPv4 network"},
		{name: "host bits", stdin: replace("10.112.1.0/24", "10.112.1.7/24"), code: types.ErrInvalidNetworkConfig, want: "subnet 10.112.1.7/24 has host bits: 10.112.1.0/24 is meant"},
		{name: "subnet too small", stdin: replace("/24", "/31"), code: types.ErrInvalidNetworkConfig, want: "not between /16 and /30"},
		{name: "subnet too big", stdin: replace("10.112.1.0/24", "10.0.0.0/8"), code: types.ErrInvalidNetworkConfig, want: "not between /16 and /30"},
		{name: "no subnet6", stdin: replace("fd00:112:1::/112", ""), code: types.ErrInvalidNetworkConfig, want: "subnet6 is missing"},
		{name: "IPv4 for IPv6", stdin: replace("fd00:112:1::/112", "10.112.2.0/24"), code: types.ErrInvalidNetworkConfig, want: "subnet6 10.112.2.0/24 is not an IPv6 network"},
		{name: "host bits of IPv6", stdin: replace("1::/112", "1::7/112"), code: types.ErrInvalidNetworkConfig, want: "subnet6 fd00:112:1::7/112 has host bits: fd00:112:1::/112 is meant"},
		{name: "subnet6 too small", stdin: replace("/112", "/113"), code: types.ErrInvalidNetworkConfig, want: "not between /64 and /112"},
		{name: "subnet6 too big", stdin: replace("fd00:112:1::/112", "fd00::/8"), code: types.ErrInvalidNetworkConfig, want: "not between /64 and /112"},
		{name: "empty pool", stdin: replace("32", "0"), code: types.ErrInvalidNetworkConfig, want: "poolSize 0 is not between 1 and the 253 of subnet 10.112.1.0/24"},
		{name: "pool over the subnet", stdin: replace("32", "254"), code: types.ErrInvalidNetworkConfig, want: "poolSize 254 is not between 1 and the 253"},
		{name: "no pod", args: "IgnoreUnknown=1", code: types.ErrInvalidEnvironmentVariables, want: "K8S_POD_NAMESPACE and K8S_POD_NAME are both needed"},
		{name: "broken arguments", args: "K8S_POD_NAME", code: types.ErrInvalidEnvironmentVariables, want: "CNI_ARGS:"},
		{name: "another device", device: "net1", code: types.ErrInvalidEnvironmentVariables, want: "CNI_IFNAME: net1 is not eth0"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			args := &skel.CmdArgs{ContainerID: "c1", IfName: podDevice, Args: goodArgs, StdinData: []byte(good)}
			if test.stdin != "" {
				args.StdinData = []byte(test.stdin)
			}
			if test.args != "" {
				args.Args = test.args
			}
			if test.device != "" {
				args.IfName = test.device
			}
			_, err := parseRequest(args)
			var cniError *types.Error
			if !errors.As(err, &cniError) || cniError.Code != test.code || !strings.Contains(cniError.Msg, test.want) {
				t.Errorf("error %#v, want code %d and %q", err, test.code, test.want)
			}
		})
	}

	req, err := parseRequest(&skel.CmdArgs{ContainerID: "c1", Netns: "/run/netns/x", IfName: podDevice, Args: goodArgs, StdinData: []byte(good)})
	if err != nil {
		t.Fatal(err)
	}
	// The device's name as Terway makes it: printf shop.web-0 | sha1sum.
	if req.pod != "shop/web-0" || req.uid != "u1" || req.container != "c1" || req.netns != "/run/netns/x" || req.hostDevice != "calia4fc3c48bd8" {
		t.Errorf("request %+v", req)
	}
}
