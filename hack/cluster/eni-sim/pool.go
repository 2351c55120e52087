package main

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"
)

// pool is the plugin's whole state: which pod has which addresses, and which addresses are free.
//
// It keeps what Terway keeps. A record is found by the pod's namespace and name, never by its UID or its sandbox.
type pool struct {
	Size    int               `json:"poolSize"` // of each block
	IPv4    block             `json:"ipv4"`
	IPv6    block             `json:"ipv6"`
	Records map[string]record `json:"records"` // by namespace/name
}

// block is the addresses of one family.
type block struct {
	Subnet netip.Prefix `json:"subnet"`
	Free   []netip.Addr `json:"free"` // the first one is handed out next
}

// record says who has an address, or one of each family.
type record struct {
	IPv4      netip.Addr `json:"ipv4,omitzero"`
	IPv6      netip.Addr `json:"ipv6,omitzero"`
	Container string     `json:"container"` // id of the sandbox that asked last
	PodUID    string     `json:"podUID,omitempty"`
	Since     time.Time  `json:"since"` // when the name got its addresses
}

// addresses returns the addresses of the record, IPv4 first.
func (r record) addresses() []netip.Addr {
	return slices.DeleteFunc([]netip.Addr{r.IPv4, r.IPv6}, func(addr netip.Addr) bool { return !addr.IsValid() })
}

// usable returns how many addresses of the IPv4 subnet a pool may have: all but the network, the first and the broadcast
// address.
func usable(subnet netip.Prefix) int {
	return 1<<(32-subnet.Bits()) - 3
}

// newPool returns a pool with all addresses free, in order. The size is at most usable(subnet).
func newPool(subnet, subnet6 netip.Prefix, size int) *pool {
	return &pool{Size: size, IPv4: newBlock(subnet, size), IPv6: newBlock(subnet6, size), Records: map[string]record{}}
}

// newBlock returns the first addresses of the subnet after the network address and the one that follows it.
func newBlock(subnet netip.Prefix, size int) block {
	b := block{Subnet: subnet, Free: make([]netip.Addr, 0, size)}
	addr := subnet.Addr().Next()
	for range size {
		addr = addr.Next()
		b.Free = append(b.Free, addr)
	}
	return b
}

// settle sees to it that held is an address if one is wanted, and none if not. It fails when none is free.
func (b *block) settle(held *netip.Addr, wanted bool) error {
	switch {
	case wanted && !held.IsValid():
		if len(b.Free) == 0 {
			return fmt.Errorf("no free address: the pool of %s is exhausted", b.Subnet)
		}
		*held, b.Free = b.Free[0], b.Free[1:]
	case !wanted && held.IsValid():
		b.release(*held)
		*held = netip.Addr{}
	}
	return nil
}

// release frees an address, which becomes the next one to be handed out: Terway too prefers a freed address to a new
// one, and the first is the worst case.
func (b *block) release(addr netip.Addr) {
	b.Free = slices.Insert(b.Free, 0, addr)
}

// take gives the pod an address of each family it wants, and notes its sandbox. A pod of that name that has an address
// already is given the same one (as by Terway's AllocIP), whichever sandbox has it so far; another pod is given the first
// free one. What a pod of that name had and does not want is released. It fails when no address is free, and is then not
// to be saved.
func (p *pool) take(pod string, wanted families, container, uid string, now time.Time) (record, error) {
	r, known := p.Records[pod]
	if !known {
		r.Since = now
	}
	if err := errors.Join(p.IPv4.settle(&r.IPv4, wanted.ipv4), p.IPv6.settle(&r.IPv6, wanted.ipv6)); err != nil {
		return record{}, err
	}
	r.Container, r.PodUID = container, uid
	p.Records[pod] = r
	return r, nil
}

// release frees the pod's addresses. It does nothing for a pod without a record.
func (p *pool) release(pod string) {
	r := p.Records[pod]
	delete(p.Records, pod)
	for _, addr := range r.addresses() {
		if addr.Is4() {
			p.IPv4.release(addr)
		} else {
			p.IPv6.release(addr)
		}
	}
}
