// Package outbound carries the connections that this workload opens.
//
// A connection arrives because a rule redirected it, and goes on to its original destination. Only a destination that
// is the agent itself is refused, by name.
package outbound

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
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
	OwnPorts         []uint16      // ports of the agent, refused as destinations at OwnAddresses
	OwnAddresses     Addresses     // this workload's addresses
	ConnectTimeout   time.Duration // for the dial; zero or less leaves it to the kernel
	IdleTimeout      time.Duration // ends a connection in which nothing moves; zero or less: never
	HalfCloseTimeout time.Duration // the same once one side has closed; zero or less: never
	Flows            *flow.Table   // has each connection while it is open, and takes the records of what has ended

	OpaquePorts    capture.Ports // destination ports at which nobody looks at the bytes
	DetectionDelay time.Duration // how long downstream may say nothing before the upstream is dialled all the same
	DetectionHold  time.Duration // how long a beginning that could become anything is held

	// Pool and what a stranger may send; New fills in the rest.
	HTTP httpforward.Config
}

// Addresses tells this workload's own addresses from others.
type Addresses interface {
	Contains(netip.Addr) bool
}

// Proxy serves outbound connections. Make it with New.
type Proxy struct {
	config Config
	policy policy
	dialer upstream.Dialer
	http   *httpforward.Engine
}

// New checks the configuration.
func New(config Config) (*Proxy, error) {
	if config.Poller == nil || config.OwnAddresses == nil || config.Flows == nil || len(config.OwnPorts) == 0 {
		return nil, errors.New("outbound: Poller, OwnPorts, OwnAddresses and Flows are required")
	}
	p := &Proxy{
		config: config,
		policy: policy{config.OwnPorts, config.OwnAddresses},
		dialer: upstream.Dialer{Poller: config.Poller, Timeout: config.ConnectTimeout},
	}
	if config.HTTP.Pool != nil { // else the engine says what is missing
		p.dialer.Stats = &config.HTTP.Pool.Stats
	}
	forwarding := config.HTTP
	forwarding.Direction, forwarding.Dialer, forwarding.Flows = flow.Outbound, p.dialer, config.Flows
	forwarding.IdleTimeout, forwarding.HalfCloseTimeout = config.IdleTimeout, config.HalfCloseTimeout
	var err error
	if p.http, err = httpforward.New(forwarding); err != nil {
		return nil, fmt.Errorf("outbound: %w", err)
	}
	return p, nil
}

// ServeConn carries one connection from here to its end, and closes it. The end of ctx cuts it.
func (p *Proxy) ServeConn(ctx context.Context, down *tcp.Conn) {
	record := flow.Open(flow.Outbound, down.RemoteAddr())
	w := tcp.NewWaiter(ctx)
	defer w.Close()

	dst, err := down.OriginalDst()
	if err != nil {
		p.refuse(record, down, flow.NoOriginalDestination, err)
		return
	}
	record.OriginalDestination = dst
	if reason, ok := p.policy.allows(dst); !ok {
		p.refuse(record, down, reason, nil)
		return
	}
	p.config.Flows.List(record)

	// Whoever speaks first decides. When downstream says nothing, the upstream is dialled all the same: it may be the one
	// that speaks first.
	to := upstream.Target{Source: source(), Address: target(dst)}
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

// looksInto reports whether the protocol of a connection to dst is detected.
func (p *Proxy) looksInto(dst netip.AddrPort) bool {
	return !p.config.OpaquePorts.Contains(dst.Port())
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
	return up, "", nil
}

// Announce and Drain tell the HTTP engine; see there.
func (p *Proxy) Announce() { p.http.Announce() }

// Drain lets connections without a request end.
func (p *Proxy) Drain() { p.http.Drain() }

// Refuse resets a connection for which there is no room.
func (p *Proxy) Refuse(down *tcp.Conn) {
	record := flow.Open(flow.Outbound, down.RemoteAddr())
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
