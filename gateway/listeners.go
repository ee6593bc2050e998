package gateway

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"sort"
	"sync"
	"syscall"
	"time"

	"github.com/pillion-proxy/pillion/internal/listener"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/serve"
	"github.com/pillion-proxy/pillion/internal/tcp"
)

// MaxListeners is how many addresses a gateway binds at most.
const MaxListeners = 1000

// Bounds of the time until an address that could not be bound is tried again.
const (
	minRetry = time.Second
	maxRetry = 15 * time.Second
)

// ListenersConfig is what Listeners need. All fields are required.
type ListenersConfig struct {
	Poller   *tcp.Poller
	Server   *listener.Server // dynamic; it is started before Apply
	Mesh     serve.Mesh
	OwnPorts []uint16 // of the agent, for errors
	Log      *slog.Logger
}

// Listeners keeps the sockets of a gateway at the addresses that its configuration names. A socket stays open as long as its
// address is named: other filter chains, and another name, do not touch it. An address that cannot be bound is reported and
// tried again, and the others are not affected.
type Listeners struct {
	config ListenersConfig
	kick   chan struct{}

	mu     sync.Mutex
	bound  map[netip.AddrPort]*tcp.Listener // nil: this host lacks IPv6
	failed map[netip.AddrPort]Failure
	whole  bool // all addresses of some configuration have been bound
}

// Failure is an address that cannot be bound.
type Failure struct {
	Listener string // its name
	Address  netip.AddrPort
	Since    time.Time
	Err      error
}

// NewListeners returns Listeners without sockets.
func NewListeners(config ListenersConfig) *Listeners {
	return &Listeners{
		config: config, kick: make(chan struct{}, 1),
		bound: map[netip.AddrPort]*tcp.Listener{}, failed: map[netip.AddrPort]Failure{},
	}
}

// Notify has Run look at the configuration in force. It does not block.
func (l *Listeners) Notify() {
	select {
	case l.kick <- struct{}{}:
	default:
	}
}

// Run applies the configuration in force after each Notify, and tries failed addresses again, until ctx ends.
func (l *Listeners) Run(ctx context.Context) {
	pause := minRetry
	for {
		var retry <-chan time.Time
		if l.Apply() {
			pause = minRetry
		} else {
			retry = time.After(pause)
			pause = min(2*pause, maxRetry)
		}
		select {
		case <-ctx.Done():
			return
		case <-retry:
		case <-l.kick:
			pause = minRetry
		}
	}
}

// Apply binds the addresses of the configuration in force, in the network namespace of the calling thread, and closes the
// others. It reports whether all addresses are bound. Calls must not be concurrent.
func (l *Listeners) Apply() bool {
	snapshot := l.config.Mesh.Snapshot()
	if snapshot == nil {
		return true
	}
	want := snapshot.Accepted()
	for _, address := range l.unwanted(want) {
		l.remove(address)
	}
	addresses := slices.Collect(maps.Keys(want))
	sort.Slice(addresses, func(i, j int) bool { return addresses[i].Compare(addresses[j]) < 0 })
	for i, address := range addresses {
		if _, has := l.at(address); !has {
			l.add(address, want[address], i)
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	done := len(l.failed) == 0
	l.whole = l.whole || done
	return done
}

// unwanted returns the bound addresses that are not in want, and forgets such failures.
func (l *Listeners) unwanted(want map[netip.AddrPort]*mesh.Listener) (addresses []netip.AddrPort) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for address := range l.bound {
		if want[address] == nil {
			addresses = append(addresses, address)
		}
	}
	maps.DeleteFunc(l.failed, func(address netip.AddrPort, _ Failure) bool { return want[address] == nil })
	return addresses
}

// at returns the socket at an address, and whether there is one.
func (l *Listeners) at(address netip.AddrPort) (*tcp.Listener, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	socket, has := l.bound[address]
	return socket, has
}

func (l *Listeners) remove(address netip.AddrPort) {
	if socket, _ := l.at(address); socket != nil {
		l.config.Server.Remove(socket)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.bound, address)
	l.config.Log.Info("listener removed", "address", address.String())
}

// add binds the i-th address.
func (l *Listeners) add(address netip.AddrPort, of *mesh.Listener, i int) {
	var socket *tcp.Listener
	err := errTooMany
	if i < MaxListeners {
		socket, err = l.config.Poller.Listen(address)
	}
	if err != nil && address.Addr() == netip.IPv6Unspecified() && tcp.LacksIPv6(err) {
		err = nil
	}
	if socket != nil {
		l.config.Server.Add(socket)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if err == nil {
		l.bound[address] = socket
		delete(l.failed, address)
		l.config.Log.Info("listener added", "listener", of.Name, "address", address.String())
		return
	}
	err = l.explain(address, err)
	if known, has := l.failed[address]; !has || known.Err.Error() != err.Error() {
		l.config.Log.Error("cannot bind a listener, trying again", "listener", of.Name, "address", address.String(), "error", err)
		l.failed[address] = Failure{of.Name, address, time.Now(), err}
	}
}

var errTooMany = fmt.Errorf("the configuration names more than %d addresses", MaxListeners)

// explain adds the remedy to an error of bind.
func (l *Listeners) explain(address netip.AddrPort, err error) error {
	switch {
	case errors.Is(err, syscall.EACCES):
		return fmt.Errorf("%w: add the capability NET_BIND_SERVICE, set the sysctl net.ipv4.ip_unprivileged_port_start to %d or less,"+
			" or use a target port of 1024 or more", err, address.Port())
	case errors.Is(err, syscall.EADDRINUSE) && slices.Contains(l.config.OwnPorts, address.Port()):
		return fmt.Errorf("%w: it is a port of the agent itself; use another", err)
	case errors.Is(err, syscall.EADDRINUSE):
		return fmt.Errorf("%w: another process or listener has this port", err)
	}
	return err
}

// Names yields the names of the listeners that are bound, in order, with their addresses.
func (l *Listeners) Names() iter.Seq2[string, []netip.AddrPort] {
	return func(yield func(string, []netip.AddrPort) bool) {
		snapshot := l.config.Mesh.Snapshot()
		if snapshot == nil {
			return
		}
		for name, of := range snapshot.Listeners() {
			if at := slices.DeleteFunc(slices.Clone(of.Addresses), l.closed); len(at) > 0 && !of.Virtual && !yield(name, at) {
				return
			}
		}
	}
}

// closed reports whether no socket is at an address.
func (l *Listeners) closed(address netip.AddrPort) bool {
	socket, _ := l.at(address)
	return socket == nil
}

// Failures returns the addresses that cannot be bound, in order.
func (l *Listeners) Failures() []Failure {
	l.mu.Lock()
	defer l.mu.Unlock()
	failures := slices.Collect(maps.Values(l.failed))
	sort.Slice(failures, func(i, j int) bool { return failures[i].Address.Compare(failures[j].Address) < 0 })
	return failures
}

// Bound returns nil once all addresses of a configuration have been bound, and the first failure before. A later failure
// affects a part of the traffic only.
func (l *Listeners) Bound() error {
	failures := l.Failures()
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case l.whole:
		return nil
	case len(failures) > 0:
		return fmt.Errorf("listener %s: %w", failures[0].Listener, failures[0].Err)
	}
	return errors.New("no configuration yet")
}
