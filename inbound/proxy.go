// Package inbound carries the connections that others open to this workload.
//
// A connection arrives because a rule redirected it. Its original destination must be one of the workload's own
// addresses; the workload is dialled there, from a loopback address that the rules let pass. Everything else is refused
// by name.
package inbound

import (
	"context"
	"errors"
	"net/netip"
	"time"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/relay"
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
	Flows            flow.Sink     // takes each connection's record
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
}

// New checks the configuration.
func New(config Config) (*Proxy, error) {
	if config.Poller == nil || config.OwnAddresses == nil || config.Flows == nil || len(config.OwnPorts) == 0 {
		return nil, errors.New("inbound: Poller, OwnPorts, OwnAddresses and Flows are required")
	}
	return &Proxy{
		config: config,
		policy: policy{config.OwnPorts, config.OwnAddresses},
		dialer: upstream.Dialer{Poller: config.Poller, Timeout: config.ConnectTimeout},
	}, nil
}

// ServeConn carries one connection from here to its end, and closes it. The end of ctx cuts it.
func (p *Proxy) ServeConn(ctx context.Context, down *tcp.Conn) {
	record := flow.Open(flow.Inbound, down.RemoteAddr())
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

	// Detection of the protocol will stand here. Until then everything is opaque, and the upstream is dialled without
	// waiting for downstream to speak, so that it may speak first.
	up, err := p.dialer.Dial(w, source(dst), target(dst))
	if err != nil {
		p.refuse(record, down, upstream.Reason(err), err)
		return
	}
	record.UpstreamLocal = up.LocalAddr()

	end, err := relay.Run(w, down, up, relay.Options{
		IdleTimeout:      p.config.IdleTimeout,
		HalfCloseTimeout: p.config.HalfCloseTimeout,
		FromDown:         &record.Received,
		FromUp:           &record.Sent,
	})
	record.Close(p.config.Flows, flow.Reason(end), err)
}

// Refuse resets a connection for which there is no room.
func (p *Proxy) Refuse(down *tcp.Conn) {
	record := flow.Open(flow.Inbound, down.RemoteAddr())
	p.refuse(record, down, flow.MaxConnections, nil)
}

// refuse ends a connection that goes no further, with a reset: a silent close would look like an empty answer.
func (p *Proxy) refuse(record *flow.Record, down *tcp.Conn, reason flow.Reason, err error) {
	down.Reset()
	record.Close(p.config.Flows, reason, err)
}
