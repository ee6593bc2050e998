package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"

	"github.com/pillion-proxy/pillion/healthz"
	"github.com/pillion-proxy/pillion/inbound"
	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/httpforward"
	"github.com/pillion-proxy/pillion/internal/listener"
	"github.com/pillion-proxy/pillion/internal/localaddr"
	"github.com/pillion-proxy/pillion/internal/tcp"
	"github.com/pillion-proxy/pillion/internal/upstream"
	"github.com/pillion-proxy/pillion/outbound"
)

// Agent carries a workload's traffic. Make it with New, and Run it once.
type Agent struct {
	config Config
	log    *slog.Logger
	flows  *flow.Table

	poller        *tcp.Poller
	addresses     *localaddr.Set
	stopAddresses context.CancelFunc

	inboundProxy      *inbound.Proxy
	outboundProxy     *outbound.Proxy
	inbound, outbound *listener.Server
	pools             []*upstream.Pool
	health            *http.Server
	healthListeners   []net.Listener
	healthLoops       sync.WaitGroup
	draining          atomic.Bool
}

// New builds the parts and binds all ports, in the network namespace that it is called in. Nothing is served before
// Run. When New fails, everything that it opened is closed.
func New(config Config) (*Agent, error) {
	if err := config.Validate(); err != nil {
		return nil, err
	}
	a := &Agent{config: config, log: config.Log, flows: flow.NewTable(&flowLog{log: config.Log})}
	if err := a.build(); err != nil {
		a.close()
		return nil, err
	}
	return a, nil
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

	a.inboundProxy, err = inbound.New(inbound.Config{
		Poller:           poller,
		OwnPorts:         a.ownPorts(),
		OwnAddresses:     addresses,
		ConnectTimeout:   a.config.ConnectTimeout,
		IdleTimeout:      a.config.IdleTimeout,
		HalfCloseTimeout: a.config.HalfCloseTimeout,
		Flows:            a.flows,
		OpaquePorts:      a.config.OpaquePorts,
		DetectionDelay:   a.config.DetectionDelay,
		DetectionHold:    a.config.DetectionHold,
		ProxyProtocol:    a.config.InboundProxyProtocol,
		HTTP:             a.forwarding(a.config.InboundFields),
	})
	if err != nil {
		return err
	}
	a.outboundProxy, err = outbound.New(outbound.Config{
		Poller:           poller,
		OwnPorts:         a.ownPorts(),
		OwnAddresses:     addresses,
		ConnectTimeout:   a.config.ConnectTimeout,
		IdleTimeout:      a.config.IdleTimeout,
		HalfCloseTimeout: a.config.HalfCloseTimeout,
		Flows:            a.flows,
		OpaquePorts:      a.config.OpaquePorts,
		DetectionDelay:   a.config.DetectionDelay,
		DetectionHold:    a.config.DetectionHold,
		HTTP:             a.forwarding(a.config.OutboundFields),
	})
	if err != nil {
		return err
	}
	limit := listener.NewLimit(a.config.MaxConnections)
	a.inbound = &listener.Server{Name: "inbound", Handler: a.inboundProxy, Limit: limit, Log: a.log}
	a.outbound = &listener.Server{Name: "outbound", Handler: a.outboundProxy, Limit: limit, Log: a.log}
	a.health = healthz.NewServer(healthz.NewHandler(
		healthz.Gate{Name: "drain", Open: a.notDraining},
		healthz.Gate{Name: "outbound", Open: a.outbound.Accepting},
		healthz.Gate{Name: "inbound", Open: a.inbound.Accepting},
		healthz.Gate{Name: "addresses", Open: addresses.Current},
	), a.log)
	return a.bind()
}

// forwarding is how HTTP is forwarded in one direction. The pool is that direction's alone.
func (a *Agent) forwarding(fields httpforward.Fields) httpforward.Config {
	pool := upstream.NewPool(a.config.UpstreamIdleTimeout)
	a.pools = append(a.pools, pool)
	return httpforward.Config{
		Pool:           pool,
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
	return append(spec.OwnPorts(), a.config.ReadinessPort)
}

// bind opens the listeners of both families.
//
// Outbound is bound to loopback alone: nat OUTPUT redirects to 127.0.0.1 and ::1, and open to the network it would be
// an open relay. Inbound must be bound to all addresses: nat PREROUTING redirects to the receiving interface's.
func (a *Agent) bind() error {
	loopback := []netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 1}), netip.IPv6Loopback()}
	all := []netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()}
	var err error
	if a.outbound.Listeners, err = listen(a, "--outbound-port", loopback, a.config.OutboundPort, a.poller.Listen); err != nil {
		return err
	}
	if a.inbound.Listeners, err = listen(a, "--inbound-port", all, a.config.InboundPort, a.poller.Listen); err != nil {
		return err
	}
	a.healthListeners, err = listen(a, "--readiness-port", all, a.config.ReadinessPort, listenHealth)
	return err
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

// listenHealth binds one address for its own family alone.
func listenHealth(address netip.AddrPort) (net.Listener, error) {
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
// returns nil when every connection had its time, and ErrForced when some were cut.
func (a *Agent) Run(drain, force context.Context) error {
	defer a.close()
	a.inbound.Start()
	a.outbound.Start()
	for _, ln := range a.healthListeners {
		a.healthLoops.Add(1)
		go a.serveHealth(ln)
	}
	a.log.Info("carrying traffic", "outbound_port", a.config.OutboundPort, "inbound_port", a.config.InboundPort,
		"readiness_port", a.config.ReadinessPort)

	<-drain.Done()
	err := a.shutdown(force)
	a.healthLoops.Wait()
	return err
}

func (a *Agent) serveHealth(ln net.Listener) {
	defer a.healthLoops.Done()
	if err := a.health.Serve(ln); !errors.Is(err, http.ErrServerClosed) {
		a.log.Error("readiness is not served any more", "address", ln.Addr().String(), "error", err)
	}
}

// notDraining is the gate that shutdown closes first.
func (a *Agent) notDraining() error {
	if a.draining.Load() {
		return errors.New("shutting down")
	}
	return nil
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
	for _, ln := range a.healthListeners {
		ln.Close()
	}
	if a.addresses != nil {
		a.stopAddresses()
		a.addresses.Wait()
	}
	for _, pool := range a.pools {
		pool.Close()
	}
	if a.poller != nil {
		a.poller.Close()
	}
}
