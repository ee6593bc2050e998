// Package inbound carries the connections that others open to this workload.
//
// A connection arrives because a rule redirected it, or by TPROXY gave it to us as it is. Its original destination must be
// one of the workload's own addresses; the workload is dialled there, from a loopback address that the rules let pass, or
// from the client's own. Everything else is refused by name.
package inbound

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/httpforward"
	"github.com/pillion-proxy/pillion/internal/relay"
	"github.com/pillion-proxy/pillion/internal/sniff"
	"github.com/pillion-proxy/pillion/internal/tcp"
	"github.com/pillion-proxy/pillion/internal/upstream"
)

// Config is what a Proxy needs. All fields without a stated zero are required.
type Config struct {
	Poller           *tcp.Poller   // for upstream connections
	OwnPorts         []uint16      // ports of the agent, refused as destinations
	OwnAddresses     Addresses     // this workload's addresses
	ConnectTimeout   time.Duration // for the dial; zero or less leaves it to the kernel
	IdleTimeout      time.Duration // ends a connection in which nothing moves; zero or less: never
	HalfCloseTimeout time.Duration // the same once one side has closed; zero or less: never
	TPROXYMark       uint32        // what is sent from a client's address has it; zero: listeners are not transparent
	Flows            *flow.Table   // has each connection while it is open, and takes the records of what has ended

	OpaquePorts    capture.Ports // destination ports at which nobody looks at the bytes
	DetectionDelay time.Duration // how long downstream may say nothing before the upstream is dialled all the same
	DetectionHold  time.Duration // how long a beginning that could become anything is held
	ProxyProtocol  capture.Ports // destination ports that get a PROXY protocol header; nobody looks at their bytes

	// Pool and what a stranger may send; New fills in the rest.
	HTTP httpforward.Config
}

// Addresses tells this workload's own addresses from others.
type Addresses interface {
	Contains(netip.Addr) bool
}

// Proxy serves inbound connections. Make it with New.
type Proxy struct {
	config Config
	policy policy
	dialer upstream.Dialer
	http   *httpforward.Engine
}

// New checks the configuration.
func New(config Config) (*Proxy, error) {
	if config.Poller == nil || config.OwnAddresses == nil || config.Flows == nil || len(config.OwnPorts) == 0 {
		return nil, errors.New("inbound: Poller, OwnPorts, OwnAddresses and Flows are required")
	}
	p := &Proxy{
		config: config,
		policy: policy{config.OwnPorts, config.OwnAddresses},
		dialer: upstream.Dialer{Poller: config.Poller, Timeout: config.ConnectTimeout},
	}
	if config.TPROXYMark != 0 {
		p.dialer.Borrow = upstream.NewBorrower(config.TPROXYMark)
	}
	if config.HTTP.Pool != nil { // else the engine says what is missing
		p.dialer.Stats = &config.HTTP.Pool.Stats
	}
	forwarding := config.HTTP
	forwarding.Direction, forwarding.Dialer, forwarding.Flows = flow.Inbound, p.dialer, config.Flows
	forwarding.IdleTimeout, forwarding.HalfCloseTimeout = config.IdleTimeout, config.HalfCloseTimeout
	var err error
	if p.http, err = httpforward.New(forwarding); err != nil {
		return nil, fmt.Errorf("inbound: %w", err)
	}
	return p, nil
}

// ServeConn carries one connection from here to its end, and closes it. The end of ctx cuts it.
func (p *Proxy) ServeConn(ctx context.Context, down *tcp.Conn) {
	record := flow.Open(flow.Inbound, down.RemoteAddr())
	w := tcp.NewWaiter(ctx)
	defer w.Close()

	dst, given, err := p.originalDestination(down)
	if err != nil {
		p.refuse(record, down, flow.NoOriginalDestination, err)
		return
	}
	record.OriginalDestination = dst
	to := target(dst)
	if given {
		defer p.dialer.Borrow.Serve(down.RemoteAddr(), dst)()
		to = borrow(to, down.RemoteAddr().Addr())
	}
	if reason, ok := p.policy.allows(to); !ok {
		p.refuse(record, down, reason, nil)
		return
	}
	p.config.Flows.List(record)

	// Whoever speaks first decides. When downstream says nothing, the upstream is dialled all the same: it may be the one
	// that speaks first.
	sniffer := sniff.Sniffer{
		Down:     down,
		Delay:    p.config.DetectionDelay,
		Hold:     p.config.DetectionHold,
		Idle:     p.config.IdleTimeout,
		Draining: p.http.Draining,
	}
	protocol, reason, err := sniffer.Detect(w, p.looksInto(dst), func() (*tcp.Conn, flow.Reason, error) {
		return p.dial(w, record, to)
	})
	if err != nil {
		p.refuse(record, down, reason, err)
		return
	}

	if protocol == sniff.HTTP1 || protocol == sniff.HTTP2 {
		p.config.Flows.Carry(record, protocol.Flow(), flow.Hello{})
		p.http.Serve(w, protocol == sniff.HTTP2, httpforward.Connection{
			Down: down, Read: sniffer.Read, Early: sniffer.Up, EarlyRead: sniffer.UpRead, Record: record, Target: to,
		})
		p.config.Flows.Leave(record) // each request had a record of its own
		return
	}
	p.config.Flows.Carry(record, protocol.Flow(), sniffer.Hello)
	end, err := relay.Run(w, down, sniffer.Up, relay.Options{
		IdleTimeout:      p.config.IdleTimeout,
		HalfCloseTimeout: p.config.HalfCloseTimeout,
		FromDown:         &record.Received,
		FromUp:           &record.Sent,
		DownRead:         sniffer.Read,
		UpRead:           sniffer.UpRead,
	})
	record.Close(p.config.Flows, flow.Reason(end), err)
}

// originalDestination is where a connection was going, and whether it was given to us as it is, with both of its ends.
//
// While a pod changes its mode, and from some rules of Istio for ever, a transparent listener has redirected connections,
// too. Those go to a port of ours, and connection tracking knows more. What is given to us has its original destination
// for an end. One of our ports may be that as well; then connection tracking says the same.
func (p *Proxy) originalDestination(down *tcp.Conn) (dst netip.AddrPort, given bool, err error) {
	if p.dialer.Borrow != nil {
		if local := down.LocalAddr(); local.IsValid() && !slices.Contains(p.config.OwnPorts, local.Port()) {
			return local, true, nil
		}
		if err := down.ClearTransparent(); err != nil {
			return dst, false, err
		}
	}
	dst, err = down.OriginalDst()
	return dst, false, err
}

// looksInto reports whether the protocol of a connection to dst is detected.
func (p *Proxy) looksInto(dst netip.AddrPort) bool {
	return !p.config.OpaquePorts.Contains(dst.Port()) && !p.config.ProxyProtocol.Contains(dst.Port())
}

// dial opens the upstream connection of an opaque connection, or of one that has not spoken yet.
func (p *Proxy) dial(w *tcp.Waiter, record *flow.Record, to upstream.Target) (*tcp.Conn, flow.Reason, error) {
	record.Upstream = to.Address
	up, err := p.dialer.Dial(w, to)
	if err != nil {
		record.TransportFailure = upstream.TransportFailure(err)
		return nil, upstream.Reason(err), err
	}
	record.UpstreamLocal = up.LocalAddr()
	if p.config.ProxyProtocol.Contains(to.Address.Port()) {
		if err := upstream.WriteProxyHeader(up, record.Downstream, record.OriginalDestination); err != nil {
			up.Reset()
			return nil, flow.UpstreamReset, err
		}
	}
	return up, "", nil
}

// Announce and Drain tell the HTTP engine; see there.
func (p *Proxy) Announce() { p.http.Announce() }

// Drain lets connections without a request end.
func (p *Proxy) Drain() { p.http.Drain() }

// Refuse resets a connection for which there is no room.
func (p *Proxy) Refuse(down *tcp.Conn) {
	record := flow.Open(flow.Inbound, down.RemoteAddr())
	p.refuse(record, down, flow.MaxConnections, nil)
}

// refuse ends a connection that goes no further, with a reset: a silent close would look like an empty answer. When
// nobody has asked anything it is closed in order.
func (p *Proxy) refuse(record *flow.Record, down *tcp.Conn, reason flow.Reason, err error) {
	if reason == flow.Drained {
		down.Close()
	} else {
		down.Reset()
	}
	record.Close(p.config.Flows, reason, err)
}
