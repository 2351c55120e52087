package main

import (
	"fmt"
	"net/netip"
	"slices"
	"time"
)

// pool is the plugin's whole state: which pod has which address, and which addresses are free.
//
// It keeps what Terway keeps. A record is found by the pod's namespace and name, never by its UID or its sandbox.
type pool struct {
	Subnet  netip.Prefix      `json:"subnet"`
	Size    int               `json:"poolSize"`
	Records map[string]record `json:"records"` // by namespace/name
	Free    []netip.Addr      `json:"free"`    // the first one is handed out next
}

// record says who has an address.
type record struct {
	Address   netip.Addr `json:"address"`
	Container string     `json:"container"` // id of the sandbox that asked last
	PodUID    string     `json:"podUID,omitempty"`
	Since     time.Time  `json:"since"` // when the name got the address
}

// usable returns how many addresses of the subnet a pool may have: all but the network, the first and the broadcast
// address.
func usable(subnet netip.Prefix) int {
	return 1<<(32-subnet.Bits()) - 3
}

// newPool returns a pool with all addresses free, in order. The size is at most usable(subnet).
func newPool(subnet netip.Prefix, size int) *pool {
	p := &pool{Subnet: subnet, Size: size, Records: map[string]record{}, Free: make([]netip.Addr, 0, size)}
	addr := subnet.Addr().Next()
	for range size {
		addr = addr.Next()
		p.Free = append(p.Free, addr)
	}
	return p
}

// take gives the pod an address and notes its sandbox. A pod of that name that has an address already is given the same
// one (as by Terway's AllocIP), whichever sandbox has it so far; another pod is given the first free one. It fails when
// none is free.
func (p *pool) take(pod, container, uid string, now time.Time) (netip.Addr, error) {
	r, known := p.Records[pod]
	if !known {
		if len(p.Free) == 0 {
			return netip.Addr{}, fmt.Errorf("no free address: the pool of %d of %s is exhausted", p.Size, p.Subnet)
		}
		r = record{Address: p.Free[0], Since: now}
		p.Free = p.Free[1:]
	}
	r.Container, r.PodUID = container, uid
	p.Records[pod] = r
	return r.Address, nil
}

// release frees the pod's address, which becomes the next one to be handed out: Terway too prefers a freed address to a
// new one, and the first is the worst case. It does nothing for a pod without a record.
func (p *pool) release(pod string) {
	if r, known := p.Records[pod]; known {
		delete(p.Records, pod)
		p.Free = slices.Insert(p.Free, 0, r.Address)
	}
}
