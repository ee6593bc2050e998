// Package inbound carries the connections that clients open to this workload.
//
// A rule redirected each connection here, or TPROXY delivered it unchanged. Its original destination must be one of the
// workload's own addresses. The workload is dialled there, from a loopback address that the rules let pass or from the
// client's own address. All other connections are refused, with a reason.
package inbound

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"time"

	"github.com/pillion-proxy/pillion/internal/balance"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/httpforward"
	"github.com/pillion-proxy/pillion/internal/peers"
	"github.com/pillion-proxy/pillion/internal/serve"
	"github.com/pillion-proxy/pillion/internal/tcp"
	"github.com/pillion-proxy/pillion/internal/tracing"
	"github.com/pillion-proxy/pillion/internal/upstream"
)

// Config is what a Proxy needs. All fields without a stated zero are required.
type Config struct {
	Poller       *tcp.Poller        // for upstream connections
	OwnPorts     []uint16           // ports of the agent, refused as destinations
	OwnAddresses Addresses          // this workload's addresses
	TPROXYMark   uint32             // of packets that are sent from a client's address; zero: listeners are not transparent
	Flows        *flow.Table        // lists open connections and takes their records when they end
	Settings     serve.Settings     // until the first Apply
	HTTP         httpforward.Config // the pool, and the limits on what a peer may send; New sets the other fields
	Mesh         serve.Mesh         // the configuration of a control plane; may be nil
	Wait         time.Duration      // how long connections are held for the first configuration of Mesh
	Lookup       balance.Lookup     // resolves the names of Mesh's clusters whose servers are asked about requests; nil: they have no endpoints
	Log          *slog.Logger       // nil: not logged
	StrictPaths  bool               // requests whose path servers may read in different ways are rejected
	Rejudge      bool               // a connection of bytes ends when a changed policy of Mesh denies it
	Tracing      *tracing.Exporters // of spans, as Mesh configures them; nil: it is not followed
	Recorder     serve.Recorder     // of access logs, likewise
	Peers        *peers.Exchange    // of metadata with other proxies of Mesh; may be nil
}

// Addresses distinguishes this workload's own addresses from others.
type Addresses interface {
	Contains(netip.Addr) bool
}

// Proxy serves inbound connections. Make it with New.
type Proxy struct {
	*serve.Role
	policy   policy
	borrower *upstream.Borrower // nil: listeners are not transparent
}

// New checks the configuration.
func New(config Config) (*Proxy, error) {
	if config.OwnAddresses == nil || len(config.OwnPorts) == 0 {
		return nil, errors.New("inbound: OwnPorts and OwnAddresses are required")
	}
	p := &Proxy{policy: policy{config.OwnPorts, config.OwnAddresses}}
	if config.TPROXYMark != 0 {
		p.borrower = upstream.NewBorrower(config.TPROXYMark)
	}
	var err error
	p.Role, err = serve.NewRole(serve.Config{
		Direction: flow.Inbound,
		Poller:    config.Poller,
		Flows:     config.Flows,
		Borrower:  p.borrower,
		Settings:  config.Settings,
		HTTP:      config.HTTP,
		Mesh:      config.Mesh,
		Wait:      config.Wait,
		Lookup:    config.Lookup,
		Log:       config.Log,
		Strict:    config.StrictPaths,
		Rejudge:   config.Rejudge,
		Peers:     config.Peers,
		Tracing:   config.Tracing,
		Recorder:  config.Recorder,
	})
	if err != nil {
		return nil, fmt.Errorf("inbound: %w", err)
	}
	return p, nil
}

// ServeConn carries one connection to its end, and closes it. When ctx ends, the connection is cut.
func (p *Proxy) ServeConn(ctx context.Context, down *tcp.Conn) {
	c := p.Open(ctx, down)
	defer c.Close()

	dst, transparent, err := p.originalDestination(down)
	if err != nil {
		c.Refuse(flow.NoOriginalDestination, err)
		return
	}
	c.Record.OriginalDestination = dst
	to := target(dst)
	if transparent {
		defer p.borrower.Reserve(down.RemoteAddr(), dst)()
		to = borrow(to, down.RemoteAddr().Addr())
	}
	reason, ok := p.policy.allows(to)
	if ok && c.Loops() {
		reason, ok, err = flow.Loop, false, upstream.ErrLoop
	}
	if c.Record.Cluster = cluster(dst, reason); !ok {
		c.Refuse(reason, err)
		return
	}
	c.List()
	if !c.AwaitConfiguration() {
		return
	}

	// The side that sends first decides the protocol. If downstream is silent, the upstream is dialled anyway, because it
	// may be the side that sends first.
	if !c.ReadFirst(c.Settings.Detects(dst.Port())) || !c.Admit() || !c.Secure() {
		return
	}
	if !c.Authorize() {
		return
	}
	if c.Settings.ProxyProtocol.Contains(dst.Port()) && !c.Opaque() { // detected for the filter chain only
		return
	}
	if !c.HTTP() && !p.dial(c, &to) {
		return
	}
	if !c.WatchBoth() || !c.Admit() || !c.Secure() || !c.WatchBoth() || !c.Admit() || !c.Authorize() {
		return
	}
	c.Carry(&to)
}

// originalDestination returns where a connection was going, and whether TPROXY delivered it unchanged, with both of its
// ends.
//
// A transparent listener also accepts redirected connections: while a pod changes its mode, and permanently with some
// rules of Istio. Their local port is one of the agent's, and connection tracking has the original destination. The local
// end of a connection that TPROXY delivered is its original destination. That may be one of the agent's ports as well;
// connection tracking returns the same address then.
func (p *Proxy) originalDestination(down *tcp.Conn) (dst netip.AddrPort, transparent bool, err error) {
	if p.borrower != nil {
		if local := down.LocalAddr(); local.IsValid() && !slices.Contains(p.policy.ownPorts, local.Port()) {
			return local, true, nil
		}
		if err := down.ClearTransparent(); err != nil {
			return dst, false, err
		}
	}
	dst, err = down.OriginalDst()
	return dst, false, err
}

// dial connects to the workload, and sends a PROXY protocol header where the settings ask for one.
func (p *Proxy) dial(c *serve.Conn, to *upstream.Target) bool {
	return c.Dial(to) && (!c.Settings.ProxyProtocol.Contains(to.Address.Port()) || c.SendProxyHeader())
}
