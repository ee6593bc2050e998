// Package localaddr maintains the set of addresses of this network namespace.
//
// The kernel announces each change by netlink. An announcement only triggers a new listing of all addresses, so that lost
// or reordered announcements cannot leave a wrong set.
package localaddr

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"sort"
	"sync/atomic"
	"time"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Set is the set of addresses at which this workload can be reached.
type Set struct {
	current atomic.Pointer[map[netip.Addr]struct{}]
	stale   atomic.Pointer[error] // why the set may be out of date; nil while it is current
	done    chan struct{}         // closed when the watcher has ended
}

// Watch lists the addresses of the calling thread's network namespace and keeps the set current until ctx is done.
func Watch(ctx context.Context, log *slog.Logger) (*Set, error) {
	// A socket stays in the namespace in which it was opened, whichever thread uses it. The subscription precedes the
	// first listing, so that changes between the two are announced.
	announcements, err := nl.Subscribe(unix.NETLINK_ROUTE, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR)
	if err != nil {
		return nil, fmt.Errorf("subscribing to address changes: %w", err)
	}
	socket, err := nl.Subscribe(unix.NETLINK_ROUTE)
	if err != nil {
		announcements.Close()
		return nil, fmt.Errorf("opening netlink to list addresses: %w", err)
	}
	handle := &nl.SocketHandle{Socket: socket}
	s := &Set{done: make(chan struct{})}
	if err := s.list(handle); err != nil {
		announcements.Close()
		handle.Close()
		return nil, err
	}
	go s.watch(ctx, announcements, handle, log)
	return s, nil
}

// Of returns a constant set, for tests and for callers with addresses from another source.
func Of(addresses ...netip.Addr) *Set {
	s := &Set{done: make(chan struct{})}
	close(s.done)
	s.store(addresses)
	return s
}

// Contains reports whether address is one of this workload's own. All of 127.0.0.0/8 is: the kernel treats it as local
// although only one address of it is assigned. Zones are ignored, and an IPv4-mapped address counts as IPv4.
func (s *Set) Contains(address netip.Addr) bool {
	address = address.Unmap().WithZone("")
	if address.Is4() && address.IsLoopback() {
		return true
	}
	_, ok := (*s.current.Load())[address]
	return ok
}

// All returns the addresses, sorted. Of 127.0.0.0/8 it includes only those that are assigned.
func (s *Set) All() []netip.Addr {
	all := slices.Collect(maps.Keys(*s.current.Load()))
	sort.Slice(all, func(i, j int) bool { return all[i].Less(all[j]) })
	return all
}

// Current returns nil while the set is current, and otherwise the error of the failed listing.
func (s *Set) Current() error {
	if stale := s.stale.Load(); stale != nil {
		return *stale
	}
	return nil
}

// Wait returns when the watcher has ended. It ends soon after its context.
func (s *Set) Wait() { <-s.done }

// watch lists the addresses again after each announcement.
func (s *Set) watch(ctx context.Context, announcements *nl.NetlinkSocket, handle *nl.SocketHandle, log *slog.Logger) {
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
		// An error is a reason to list as well: announcements were lost (ENOBUFS), or another process in the namespace has
		// sent garbage to our socket. The pause bounds the CPU time that such a process can cause.
		if err != nil {
			log.Debug("cannot parse a netlink address notification", "error", err)
			pause(ctx, errorPause)
		}
		s.listUntilCurrent(ctx, handle, log)
	}
}

// listUntilCurrent retries list until it succeeds or ctx is done.
func (s *Set) listUntilCurrent(ctx context.Context, handle *nl.SocketHandle, log *slog.Logger) {
	for ctx.Err() == nil {
		err := s.list(handle)
		if err == nil {
			s.stale.Store(nil)
			return
		}
		if s.stale.Swap(&err) == nil {
			log.Error("cannot list local addresses, set may be out of date; retrying", "error", err)
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

// list reads all addresses from the kernel. It retries a dump that was interrupted by a change (NLM_F_DUMP_INTR).
func (s *Set) list(handle *nl.SocketHandle) error {
	const tries = 10
	var messages [][]byte
	var err error
	for range tries {
		request := nl.NewNetlinkRequest(unix.RTM_GETADDR, unix.NLM_F_DUMP)
		request.Sockets = map[int]*nl.SocketHandle{unix.NETLINK_ROUTE: handle}
		request.AddData(nl.NewIfAddrmsg(unix.AF_UNSPEC))
		if messages, err = request.Execute(unix.NETLINK_ROUTE, unix.RTM_NEWADDR); !errors.Is(err, nl.ErrDumpInterrupted) {
			break
		}
	}
	if err != nil {
		return fmt.Errorf("listing local addresses: %w", err)
	}
	addresses := make([]netip.Addr, 0, len(messages))
	for _, m := range messages {
		if address, ok := addressIn(m); ok {
			addresses = append(addresses, address)
		}
	}
	s.store(addresses)
	return nil
}

// addressIn returns the address in a message. IFA_ADDRESS is that of the peer on a link between two, and then IFA_LOCAL is
// the own one.
func addressIn(message []byte) (address netip.Addr, ok bool) {
	if len(message) < unix.SizeofIfAddrmsg {
		return address, false
	}
	attributes, err := nl.ParseRouteAttrAsMap(message[unix.SizeofIfAddrmsg:])
	if err != nil {
		return address, false
	}
	if local, ok := attributes[unix.IFA_LOCAL]; ok {
		return netip.AddrFromSlice(local.Value)
	}
	return netip.AddrFromSlice(attributes[unix.IFA_ADDRESS].Value)
}

func (s *Set) store(addresses []netip.Addr) {
	set := make(map[netip.Addr]struct{}, len(addresses))
	for _, address := range addresses {
		set[address.Unmap()] = struct{}{}
	}
	s.current.Store(&set)
}
