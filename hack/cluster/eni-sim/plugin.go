package main

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"slices"
	"time"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	cni "github.com/containernetworking/cni/pkg/types/100"
)

func cmdAdd(args *skel.CmdArgs) error {
	req, err := parseRequest(args)
	if err != nil {
		return err
	}
	result, err := req.add()
	if err != nil {
		return err
	}
	return types.PrintResult(result, req.CNIVersion)
}

func cmdDel(args *skel.CmdArgs) error {
	req, err := parseRequest(args)
	if err != nil {
		return err
	}
	return req.del()
}

func cmdCheck(args *skel.CmdArgs) error {
	req, err := parseRequest(args)
	if err != nil {
		return err
	}
	return req.check()
}

// add gives the pod its addresses and connects its namespace. The state is saved last, so after an error there is nothing to
// undo in it: it is the one before the call. The error wraps EADDRINUSE if a namespace still has one
// of the addresses.
func (r *request) add() (*cni.Result, error) {
	wanted, err := r.families()
	if err != nil {
		return nil, err
	}
	target, err := openNamespace(r.netns)
	if err != nil {
		return nil, err
	}
	defer target.Close()
	s := store{dir: r.StateDir}
	unlock, err := s.lock()
	if err != nil {
		return nil, err
	}
	defer unlock()

	p, err := s.loadFor(r.config)
	if err != nil {
		return nil, err
	}
	given, err := p.take(r.pod, wanted, r.container, r.uid, time.Now().UTC().Truncate(time.Second))
	if err != nil {
		return nil, err
	}
	// Before the devices: a leaked sandbox of the same pod still has one of the same name, which must stay if an
	// address is refused.
	if err := checkConflict(given.addresses(), target); err != nil {
		return nil, err
	}
	host, pod, err := connect(target, r.hostDevice, given.addresses())
	if err != nil {
		return nil, err
	}
	if err := s.save(p); err != nil {
		return nil, errors.Join(err, removeHostDevice(r.hostDevice))
	}

	result := &cni.Result{
		CNIVersion: cni.ImplementedSpecVersion,
		Interfaces: []*cni.Interface{
			{Name: r.hostDevice, Mac: host.Attrs().HardwareAddr.String()},
			{Name: podDevice, Mac: pod.Attrs().HardwareAddr.String(), Sandbox: r.netns},
		},
	}
	for _, addr := range given.addresses() {
		via := gatewayOf(addr).AsSlice()
		everywhere := net.IPNet{IP: make(net.IP, len(via)), Mask: make(net.IPMask, len(via))}
		result.IPs = append(result.IPs, &cni.IPConfig{Interface: cni.Int(1), Address: *hostNet(addr), Gateway: via})
		result.Routes = append(result.Routes, &types.Route{Dst: everywhere, GW: via})
	}
	return result, nil
}

// del takes the device out of the sandbox's own namespace, then releases the addresses, unless the record is another
// sandbox's: that one, and its device on the host, are left alone. Nothing to do is no error.
func (r *request) del() error {
	s := store{dir: r.StateDir}
	unlock, err := s.lock()
	if err != nil {
		return err
	}
	defer unlock()

	if r.netns != "" {
		if err := removePodDevice(r.netns); err != nil {
			return err
		}
	}
	p, err := s.load()
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if held, known := p.Records[r.pod]; !known || held.Container != r.container {
		return nil
	}
	// Without a way to the namespace the device may still be there.
	if err := removeHostDevice(r.hostDevice); err != nil {
		return err
	}
	p.release(r.pod)
	return s.save(p)
}

// check fails unless the sandbox has a record and its addresses are on its device.
func (r *request) check() error {
	p, err := store{dir: r.StateDir}.load()
	if err != nil {
		return err
	}
	held, known := p.Records[r.pod]
	if !known || held.Container != r.container {
		return fmt.Errorf("pod %s has no address for sandbox %s", r.pod, r.container)
	}
	addrs, err := addressesIn(namespace{path: r.netns})
	if err != nil {
		return err
	}
	for _, addr := range held.addresses() {
		if !slices.Contains(addrs, addr) {
			return fmt.Errorf("network namespace %s does not have address %s", r.netns, addr)
		}
	}
	return nil
}
