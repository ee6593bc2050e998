// Package localaddr knows the addresses of this network namespace, and keeps them current.
//
// The kernel announces each change by netlink. An announcement is only the reason to list all addresses anew: a lost or
// reordered one can then never leave a wrong set behind.
package localaddr

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"sync/atomic"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Set is the set of addresses at which this workload can be reached.
type Set struct {
	current atomic.Pointer[map[netip.Addr]struct{}]
	stale   atomic.Pointer[error] // why the set does not follow the kernel any more
	done    chan struct{}         // closed when the watcher has ended
}

// Watch lists the addresses of the namespace that it is called in and keeps the list current until ctx ends.
func Watch(ctx context.Context, log *slog.Logger) (*Set, error) {
	// Both sockets keep this namespace, whatever thread uses them. The subscription comes before the first listing, so
	// that no change falls between the two.
	announcements, err := nl.Subscribe(unix.NETLINK_ROUTE, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR)
	if err != nil {
		return nil, fmt.Errorf("subscribing to address changes: %w", err)
	}
	handle, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		announcements.Close()
		return nil, fmt.Errorf("opening netlink to list addresses: %w", err)
	}
	s := &Set{done: make(chan struct{})}
	if err := s.list(handle); err != nil {
		announcements.Close()
		handle.Close()
		return nil, err
	}
	go s.watch(ctx, announcements, handle, log)
	return s, nil
}

// Of returns a set that never changes, for tests and for callers that know better.
func Of(addresses ...netip.Addr) *Set {
	s := &Set{done: make(chan struct{})}
	close(s.done)
	s.store(addresses)
	return s
}

// Contains reports whether address is one of this workload's own. All of 127.0.0.0/8 is: the kernel takes it for local
// although only one address of it is assigned. A zone is ignored, and an IPv4-mapped address counts as IPv4.
func (s *Set) Contains(address netip.Addr) bool {
	address = address.Unmap().WithZone("")
	if address.Is4() && address.IsLoopback() {
		return true
	}
	_, ok := (*s.current.Load())[address]
	return ok
}

// All lists the addresses, in their order. Of 127.0.0.0/8 it has those that are assigned.
func (s *Set) All() []netip.Addr {
	return slices.SortedFunc(maps.Keys(*s.current.Load()), netip.Addr.Compare)
}

// Current returns nil while the set follows the kernel, else why it does not.
func (s *Set) Current() error {
	if stale := s.stale.Load(); stale != nil {
		return *stale
	}
	return nil
}

// Wait returns when the watcher has ended, which it does soon after its context.
func (s *Set) Wait() { <-s.done }

// watch lists anew at each announcement.
func (s *Set) watch(ctx context.Context, announcements *nl.NetlinkSocket, handle *netlink.Handle, log *slog.Logger) {
	defer close(s.done)
	defer handle.Close()
	defer announcements.Close()
	stop := context.AfterFunc(ctx, announcements.Close)
	defer stop()
	for {
		_, _, err := announcements.Receive()
		if ctx.Err() != nil {
			return
		}
		// An error is one more reason to list: announcements were lost (ENOBUFS), or a stranger in the namespace has sent
		// nonsense to our socket. The pause bounds what the latter can cost.
		if err != nil {
			log.Debug("an announcement of address changes was not understood", "error", err)
			pause(ctx, errorPause)
		}
		s.listUntilCurrent(ctx, handle, log)
	}
}

// listUntilCurrent lists until that succeeds or ctx ends.
func (s *Set) listUntilCurrent(ctx context.Context, handle *netlink.Handle, log *slog.Logger) {
	for ctx.Err() == nil {
		err := s.list(handle)
		if err == nil {
			s.stale.Store(nil)
			return
		}
		if s.stale.Swap(&err) == nil {
			log.Error("local addresses may be out of date; trying again until they are listed", "error", err)
		}
		pause(ctx, errorPause)
	}
}

const errorPause = 100 * time.Millisecond

func pause(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

// list takes all addresses from the kernel. The kernel says when a change interrupted it, and then it is done again.
func (s *Set) list(handle *netlink.Handle) error {
	const tries = 10
	var known []netlink.Addr
	var err error
	for range tries {
		if known, err = handle.AddrList(nil, netlink.FAMILY_ALL); !errors.Is(err, netlink.ErrDumpInterrupted) {
			break
		}
	}
	if err != nil {
		return fmt.Errorf("listing local addresses: %w", err)
	}
	addresses := make([]netip.Addr, 0, len(known))
	for _, address := range known {
		if ip, ok := netip.AddrFromSlice(address.IP); ok {
			addresses = append(addresses, ip)
		}
	}
	s.store(addresses)
	return nil
}

func (s *Set) store(addresses []netip.Addr) {
	set := make(map[netip.Addr]struct{}, len(addresses))
	for _, address := range addresses {
		set[address.Unmap()] = struct{}{}
	}
	s.current.Store(&set)
}
