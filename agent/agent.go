package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/pillion-proxy/pillion/healthz"
	"github.com/pillion-proxy/pillion/inbound"
	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/internal/dns"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/httpforward"
	"github.com/pillion-proxy/pillion/internal/listener"
	"github.com/pillion-proxy/pillion/internal/localaddr"
	"github.com/pillion-proxy/pillion/internal/serve"
	"github.com/pillion-proxy/pillion/internal/tcp"
	"github.com/pillion-proxy/pillion/internal/upstream"
	"github.com/pillion-proxy/pillion/outbound"
)

// Agent carries a workload's traffic. Make it with New, and Run it once.
type Agent struct {
	config  Config
	log     *slog.Logger
	started time.Time
	telling telling

	poller        *tcp.Poller
	addresses     *localaddr.Set
	stopAddresses context.CancelFunc

	inboundProxy      *inbound.Proxy
	outboundProxy     *outbound.Proxy
	inbound, outbound *listener.Server
	closing           sync.Once         // of the door
	door              *listener.Server  // where inbound was, when it is closed; nil before that
	pools             [2]*upstream.Pool // by direction

	resolver    *dns.Server // nil: DNS is not captured
	probers     *healthz.Probers
	servers     []*server // in the order in which they are closed
	serverLoops sync.WaitGroup

	announcing   sync.Once
	announced    time.Time // set by announcing
	draining     atomic.Bool
	failedByHand atomic.Bool
	leaving      atomic.Bool     // a graceful order to stop listening is under way
	over         context.Context // ends when the agent was told to quit, or has ended
	quitting     context.CancelFunc
	obeying      sync.Mutex     // while an order is begun, or all are ended
	orders       sync.WaitGroup // what is still done about them
}

// New builds the parts and binds all ports, in the network namespace that it is called in. Nothing is served before
// Run. When New fails, everything that it opened is closed.
func New(config Config) (*Agent, error) {
	if err := config.Validate(); err != nil {
		return nil, err
	}
	if err := mayBorrow(config.Mode, os.Geteuid()); err != nil {
		return nil, err
	}
	a := &Agent{config: config, log: config.Log, started: time.Now()}
	a.over, a.quitting = context.WithCancel(context.Background())
	if err := a.build(); err != nil {
		a.close()
		return nil, err
	}
	return a, nil
}

// mayBorrow refuses the user whose connections TPROXY rules, Istio's at least, send to the agent: those to the workload
// from its client's address would come back.
func mayBorrow(mode capture.Mode, user int) error {
	if mode == capture.TPROXY && user == capture.DefaultProxyID {
		return fmt.Errorf("--interception-mode %s: as user %d the agent's connections to the workload would come back to itself;"+
			" run it as user 0 and group %d, with the capability NET_ADMIN, as Istio's injector does", mode, user, capture.DefaultProxyID)
	}
	return nil
}

// tproxyMark is zero in the mode that needs none.
func (a *Agent) tproxyMark() uint32 {
	if a.config.Mode == capture.TPROXY {
		return a.config.TPROXYMark
	}
	return 0
}

// build makes the parts in the order in which they need each other.
func (a *Agent) build() error {
	poller, err := tcp.NewPoller()
	if err != nil {
		return err
	}
	a.poller = poller
	ctx, cancel := context.WithCancel(context.Background())
	a.stopAddresses = cancel
	addresses, err := localaddr.Watch(ctx, a.log)
	if err != nil {
		cancel()
		return err
	}
	a.addresses = addresses
	if err := a.tell(); err != nil {
		return err
	}

	a.inboundProxy, err = inbound.New(inbound.Config{
		Poller:       poller,
		OwnPorts:     a.ownPorts(),
		OwnAddresses: addresses,
		TPROXYMark:   a.tproxyMark(),
		Flows:        a.telling.table,
		Settings:     a.settings(a.config.InboundProxyProtocol),
		HTTP:         a.forwarding(flow.Inbound, a.config.InboundFields),
	})
	if err != nil {
		return err
	}
	a.outboundProxy, err = outbound.New(outbound.Config{
		Poller:       poller,
		OwnPorts:     a.ownPorts(),
		OwnAddresses: addresses,
		Flows:        a.telling.table,
		Settings:     a.settings(capture.Ports{}),
		HTTP:         a.forwarding(flow.Outbound, a.config.OutboundFields),
	})
	if err != nil {
		return err
	}
	limit := listener.NewLimit(a.config.MaxConnections)
	a.inbound = &listener.Server{Name: "inbound", Handler: a.inboundProxy, Limit: limit, Log: a.log}
	a.outbound = &listener.Server{Name: "outbound", Handler: a.outboundProxy, Limit: limit, Log: a.log}
	if err := a.serve(); err != nil {
		return err
	}
	if err := a.bind(); err != nil {
		return err
	}
	if err := a.resolve(); err != nil {
		return err
	}
	a.telling.watch(a)
	return nil
}

// settings is what connections of either direction are carried by.
func (a *Agent) settings(proxyProtocol capture.Ports) serve.Settings {
	return serve.Settings{
		ConnectTimeout:   a.config.ConnectTimeout,
		IdleTimeout:      a.config.IdleTimeout,
		HalfCloseTimeout: a.config.HalfCloseTimeout,
		DetectionDelay:   a.config.DetectionDelay,
		DetectionHold:    a.config.DetectionHold,
		OpaquePorts:      a.config.OpaquePorts,
		ProxyProtocol:    proxyProtocol,
	}
}

// forwarding is how HTTP is forwarded in one direction. The pool is that direction's alone.
func (a *Agent) forwarding(direction flow.Direction, fields httpforward.Fields) httpforward.Config {
	a.pools[direction] = upstream.NewPool(a.config.UpstreamIdleTimeout)
	return httpforward.Config{
		Pool:           a.pools[direction],
		Note:           a.noted(),
		MaxHeadBytes:   a.config.MaxHeadBytes,
		MaxHeadFields:  a.config.MaxHeadFields,
		HeadTimeout:    a.config.RequestHeadTimeout,
		RequestTimeout: a.config.RequestTimeout,
		Fields:         fields,
	}
}

// ownPorts are the ports that no connection may be carried to at this workload's own addresses.
func (a *Agent) ownPorts() []uint16 {
	spec := capture.Spec{OutboundPort: a.config.OutboundPort, InboundPort: a.config.InboundPort}
	ports := spec.OwnPorts()
	for _, port := range []uint16{a.config.ReadinessPort, a.config.StatusPort, a.config.MetricsPort, a.config.AdminPort} {
		if port != 0 && !slices.Contains(ports, port) {
			ports = append(ports, port)
		}
	}
	return ports
}

// bind opens the listeners of both families.
func (a *Agent) bind() error {
	var err error
	if a.outbound.Listeners, err = listen(a, "--outbound-port", loopback, a.config.OutboundPort, a.poller.Listen); err != nil {
		return err
	}
	if a.inbound.Listeners, err = listen(a, "--inbound-port", allAddresses, a.config.InboundPort, a.listenInbound); err != nil {
		return err
	}
	for _, s := range a.servers {
		if s.listeners, err = listen(a, s.flag, s.addresses, s.port, listenHTTP); err != nil {
			return err
		}
	}
	return nil
}

// listenInbound binds one address for what the rules of the mode bring.
func (a *Agent) listenInbound(address netip.AddrPort) (*tcp.Listener, error) {
	if a.config.Mode != capture.TPROXY {
		return a.poller.Listen(address)
	}
	listener, err := a.poller.ListenTransparent(address)
	if errors.Is(err, syscall.EPERM) {
		return nil, fmt.Errorf("--interception-mode %s needs the capability NET_ADMIN: add it to the agent's securityContext,"+
			" or use %s for init and agent: %w", capture.TPROXY, capture.Redirect, err)
	}
	return listener, err
}

// listen binds port at each address, by open. A workload without IPv6 is served without.
func listen[L any](
	a *Agent, flag string, addresses []netip.Addr, port uint16, open func(netip.AddrPort) (L, error),
) ([]L, error) {
	var listeners []L
	for _, address := range addresses {
		ln, err := open(netip.AddrPortFrom(address, port))
		if err != nil && address.Is6() && noIPv6(err) {
			a.log.Info("this workload has no IPv6", "flag", flag, "error", err)
			continue
		}
		if err != nil {
			return listeners, fmt.Errorf("%s %d: %w", flag, port, err)
		}
		listeners = append(listeners, ln)
	}
	return listeners, nil
}

// listenHTTP binds one address for its own family alone.
func listenHTTP(address netip.AddrPort) (net.Listener, error) {
	network := "tcp4"
	if address.Addr().Is6() {
		network = "tcp6"
	}
	listener, err := net.Listen(network, address.String())
	if err != nil {
		return nil, err
	}
	return healthz.Bound(listener), nil
}

// noIPv6 recognises what bind says when IPv6 is switched off, in the kernel or in this namespace.
func noIPv6(err error) bool {
	return errors.Is(err, syscall.EADDRNOTAVAIL) || errors.Is(err, syscall.EAFNOSUPPORT)
}

// Run serves until drain ends, then shuts down as shutdown.go says. When force ends too, it cuts whatever is left. It
// returns nil when every connection had its time, or when the agent was told over its own ports to quit at once, and
// ErrForced when some were cut.
func (a *Agent) Run(drain, force context.Context) error {
	defer a.close()
	a.inbound.Start()
	a.outbound.Start()
	if a.resolver != nil {
		a.resolver.Start()
	}
	for _, s := range a.servers {
		a.start(s)
	}
	if err := unmapStart(); err != nil {
		a.log.Debug("the memory of the start is kept", "error", err)
	}
	a.log.Info("carrying traffic", "outbound_port", a.config.OutboundPort, "inbound_port", a.config.InboundPort,
		"readiness_port", a.config.ReadinessPort)

	select {
	case <-drain.Done():
	case <-a.over.Done():
	}
	force, stop := context.WithCancel(force)
	defer stop()
	defer context.AfterFunc(a.over, stop)()
	err := a.shutdown(force)
	a.serverLoops.Wait()
	if a.over.Err() != nil {
		return nil
	}
	return err
}

// close gives back what New opened. Closing what shutdown closed already does nothing.
func (a *Agent) close() {
	for _, server := range []*listener.Server{a.inbound, a.outbound} {
		if server != nil {
			for _, ln := range server.Listeners {
				ln.Close()
			}
		}
	}
	for _, s := range a.servers {
		for _, ln := range s.listeners {
			ln.Close()
		}
	}
	a.endOrders()
	_ = a.telling.close() // shutdown has told what is wrong with it
	if a.probers != nil {
		a.probers.Close()
	}
	if a.resolver != nil {
		_ = a.resolver.Shutdown(a.over) // which has ended: what shutdown has not let finish is cut
	}
	if a.addresses != nil {
		a.stopAddresses()
		a.addresses.Wait()
	}
	for _, pool := range a.pools {
		if pool != nil {
			pool.Close()
		}
	}
	if a.poller != nil {
		a.poller.Close()
	}
}
