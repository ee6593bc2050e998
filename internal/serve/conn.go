package serve

import (
	"errors"
	"sync"
	"time"

	"github.com/pillion-proxy/pillion/internal/budget"
	"github.com/pillion-proxy/pillion/internal/envoy"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/httpforward"
	"github.com/pillion-proxy/pillion/internal/relay"
	"github.com/pillion-proxy/pillion/internal/sniff"
	"github.com/pillion-proxy/pillion/internal/tcp"
	"github.com/pillion-proxy/pillion/internal/upstream"
)

// Conn is one connection on its walk. It belongs to the goroutine that opened it.
//
// A step that returns false has ended the connection: it is closed or reset, everything read from it is released, and its
// record is closed with the reason. The walk returns then.
type Conn struct {
	Down     *tcp.Conn
	Record   *flow.Record
	Settings *Settings // the role's when the connection was opened

	role     *Role
	w        *tcp.Waiter
	protocol sniff.Protocol
	sniffer  *sniff.Sniffer // from ReadFirst until the connection is carried; of sniffers
	returned *tcp.Conn      // set by Loops; see upstream.Stats.Returned
	rate     uint64         // limit in bytes for each second, set by Fault; zero: not limited
	governed *governed      // set by AwaitConfiguration; nil without a control plane
}

// Close releases what the walk holds once the connection has ended.
func (c *Conn) Close() {
	if c.governed != nil {
		c.endLease()
	}
	c.w.Close()
}

// Refuse ends a connection that goes no further. It sends a reset, because an orderly close would look like an empty
// response. The exceptions are a drain before either side sent anything, and a client that has left: closing is in order then.
func (c *Conn) Refuse(reason flow.Reason, err error) {
	c.Record.Close(c.role.flows, reason, err)
	switch reason {
	case flow.Drained, flow.Closed:
		c.Down.Close()
		return
	case flow.MemoryBudget:
		c.role.engine.Detain(c.w, c.Down)
	}
	c.Down.Reset()
}

// Loops reports whether the rules have certainly sent one of the role's own upstream connections back to the agent as this
// connection. The record must name the original destination by then.
func (c *Conn) Loops() (loop bool) {
	c.returned, loop = c.role.dialer.Stats.Returned(c.Record.Downstream, c.Record.OriginalDestination)
	return loop
}

// List makes the connection visible in the table of open connections. Its record must name the original destination by
// then.
func (c *Conn) List() { c.role.flows.List(c.Record) }

// ReadFirst reads first bytes until they decide the protocol, or until downstream has been silent for the detection
// delay. Without detection, the connection is opaque and is not read. With a control plane, inbound connections are
// detected in any case, and a client that must begin with TLS may be silent for as long as a handshake may take. An
// outbound connection to a listener for HTTP is detected in any case as well, and may be idle before its first request.
func (c *Conn) ReadFirst(detect bool) bool {
	s := c.sniffer
	if s == nil { // else it has what was read with a PROXY header
		s = sniffers.Get().(*sniff.Sniffer)
	}
	s.Down, s.Peer = c.Down, c.Record.Remote()
	c.sniffer = s
	s.Delay, s.Hold, s.Idle = c.Settings.DetectionDelay, c.Settings.DetectionHold, c.Settings.IdleTimeout
	switch {
	case c.governed == nil:
	case c.role.direction == flow.Inbound:
		detect = true // the filter chain depends on it
		if c.governed.snapshot.InboundInspectsTLS(c.Record.OriginalDestination.Port()) {
			s.HelloHold = handshakeTimeout
		}
		if c.mustSpeak() {
			s.Delay = handshakeTimeout
		}
	case c.role.gateway:
		detect = c.awaitClient()
	case c.mustSpeak():
		detect = true
		c.awaitRequest()
	}
	if s.Wary = c.role.egress != nil; s.Wary {
		s.Hold = max(s.Hold, nameTimeout)
		if c.mustName() {
			s.Delay = nameTimeout
		}
	}
	if s.Draining, s.Budget = c.role.draining, c.role.budget; c.role.gateway {
		s.Draining = c.leaving
	}
	if !detect {
		c.protocol = sniff.Opaque
		return true
	}
	return c.first()
}

// maxSilence is how long a client of an HTTP listener may be silent without an idle timeout.
const maxSilence = time.Hour

// awaitRequest makes detection wait for the first request of a connection that may be idle before it.
func (c *Conn) awaitRequest() {
	s := c.sniffer
	if s.Requests, s.Delay = true, maxSilence; s.Idle > 0 {
		s.Delay = s.Idle
	}
}

// awaitClient makes detection wait for what the client of a gateway must send first. It reports whether the filter chain
// depends on that.
func (c *Conn) awaitClient() bool {
	s, info, snapshot := c.sniffer, c.info(), c.governed.snapshot
	chain, _ := snapshot.Gateway(&info) // without TLS
	ended := chain != nil && chain.TLS != nil
	if ended || snapshot.GatewayInspectsTLS(info.Destination) {
		s.Requests, s.HelloHold, s.Delay = true, handshakeTimeout, handshakeTimeout
	}
	switch {
	case chain != nil && chain.HTTP != nil && !ended:
		c.awaitRequest()
		c.holdHead()
	case s.HelloHold == 0:
		return false
	}
	return true
}

// leaving reports whether a gateway's connection is to end that waits for its first bytes: the agent drains, or its listener is
// removed.
func (c *Conn) leaving() bool {
	return c.role.engine.Draining() || !c.role.mesh.Snapshot().Accepts(c.Record.OriginalDestination)
}

// holdHead makes detection hold the beginning of a request as long as its head may take. A gateway's clients may be slow.
func (c *Conn) holdHead() {
	if timeout := c.role.engine.Settings().HeadTimeout; timeout > 0 {
		c.sniffer.Hold = timeout
	}
}

// first detects the protocol by downstream's first bytes.
func (c *Conn) first() bool {
	var err error
	if c.protocol, err = c.sniffer.First(c.w); err != nil {
		return c.abandon(sniff.Reason(err), err)
	}
	return true
}

// sniffers holds zero Sniffers.
var sniffers = sync.Pool{New: func() any { return new(sniff.Sniffer) }}

// releaseSniffer returns the sniffer to the pool, after its results were taken over.
func (c *Conn) releaseSniffer() {
	*c.sniffer = sniff.Sniffer{}
	sniffers.Put(c.sniffer)
	c.sniffer = nil
}

// HTTP reports whether the protocol is HTTP. The HTTP engine finds an upstream for each request, so such a connection
// needs no Dial.
func (c *Conn) HTTP() bool { return c.protocol == sniff.HTTP1 || c.protocol == sniff.HTTP2 }

// Opaque makes the protocol that was detected opaque, so that the connection is carried as bytes. It is refused if its
// requests are subject to policies, which could not be applied to them.
func (c *Conn) Opaque() bool {
	if !c.HTTP() {
		return true
	}
	c.protocol = sniff.Opaque
	if g := c.governed; g != nil {
		if g.chain != nil && g.snapshot.RestrictsRequests(g.chain) {
			return c.abandon(flow.MeshRefused, errUnseenRequests)
		}
		g.judged, g.chain = c.protocol, nil
	}
	return true
}

var errUnseenRequests = errors.New("authorization policies apply to its requests, which are not looked at on a port with a PROXY header")

// Dial opens the upstream connection of an opaque connection, or of one whose protocol is undecided because downstream
// has been silent. It does nothing if there is one already.
func (c *Conn) Dial(to *upstream.Target) bool {
	if c.sniffer.Up != nil {
		return true
	}
	c.Record.Upstream = to.Address
	dialer := c.role.dialer
	dialer.Timeout, dialer.Returned = c.Settings.ConnectTimeout, c.returned
	up, attempts, err := dialer.Dial(c.w, *to)
	c.Record.Attempts = uint8(attempts)
	if err != nil {
		c.Record.TransportFailure = upstream.TransportFailure(err)
		return c.abandon(upstream.Reason(err), err)
	}
	c.Record.UpstreamLocal = up.LocalAddr()
	c.note(up)
	c.sniffer.Up = up
	return true
}

// SendProxyHeader sends a PROXY protocol header on the fresh upstream connection.
func (c *Conn) SendProxyHeader() bool {
	if err := upstream.WriteProxyHeader(c.sniffer.Up, c.Record.Downstream, c.Record.OriginalDestination); err != nil {
		return c.abandon(flow.UpstreamReset, err)
	}
	return true
}

// WatchBoth decides the protocol of a connection whose downstream was silent: whichever side sends first decides. It does
// nothing when the protocol is decided.
func (c *Conn) WatchBoth() bool {
	if c.protocol != sniff.Undecided {
		return true
	}
	var err error
	if c.protocol, err = c.sniffer.Both(c.w); err != nil {
		return c.abandon(sniff.Reason(err), err)
	}
	return true
}

// abandon ends a connection whose detection or dial failed.
func (c *Conn) abandon(reason flow.Reason, err error) bool {
	if c.sniffer.Up != nil && c.sniffer.Up.Looped() {
		reason, err = flow.Loop, upstream.ErrLoop
	}
	if c.protocol == sniff.TLS {
		c.Record.Protocol = flow.TLS
		c.Record.SetTLS(c.hello())
	}
	c.sniffer.Abandon(err)
	c.releaseSniffer()
	c.Refuse(reason, err)
	return false
}

// hello returns what the client of TLS has asked for: of the TLS that has ended here, otherwise of the one that passes.
func (c *Conn) hello() flow.Hello {
	if c.governed != nil && c.governed.secured || c.role.decryption != nil && c.Record.Security != nil {
		return c.Record.TLS()
	}
	return c.sniffer.Hello
}

// Carry carries the connection to its end: HTTP by the engine, everything else by the relay.
func (c *Conn) Carry(to *upstream.Target) {
	if c.HTTP() {
		c.forward(to)
	} else {
		c.relay()
	}
}

// forward has the engine serve the connection's requests. Each has a record of its own, so the connection's is not
// reported.
func (c *Conn) forward(to *upstream.Target) {
	if c.Record.Route == "" {
		c.Record.Route = routes[c.role.direction]
	}
	c.role.flows.Carry(c.Record, c.protocol.Flow(), c.Record.TLS())
	c.role.engine.Serve(c.w, c.protocol == sniff.HTTP2, c.connection(to))
	c.role.flows.Leave(c.Record)
}

// connection returns what the engine takes over. It is not inlined, so that the frame of forward stays small while the
// connection is idle: see httpforward.Engine.Serve.
//
//go:noinline
func (c *Conn) connection(to *upstream.Target) *httpforward.Connection {
	s := c.sniffer
	defer c.releaseSniffer()
	return &httpforward.Connection{
		Down:      c.Down,
		Read:      s.Read,
		Early:     s.Up,
		EarlyRead: s.UpRead,
		Record:    c.Record,
		Target:    *to,
		Returned:  c.returned,
		Peers:     c.peers(),
		Router:    c.router(to),
		Many:      c.many(to),
	}
}

// many reports whether the streams of an HTTP/2 connection are carried one by one: they may have different upstreams, or some
// wait for a limit or for the answer to a question about them while others go on. A client's own address serves one connection
// to the workload.
func (c *Conn) many(to *upstream.Target) bool {
	g := c.governed
	switch {
	case c.role.faults.Limits():
		return true
	case g == nil:
		return false
	case c.role.direction == flow.Outbound:
		return g.routing != nil
	}
	return !to.Borrowed && g.chain != nil && g.chain.HTTP != nil && asks(g.snapshot, g.chain.HTTP)
}

// routes are the names of the one route that each direction has.
var routes = [...]string{flow.Inbound: envoy.RouteInbound, flow.Outbound: envoy.RouteOutbound}

func (c *Conn) relay() {
	up, options := c.sniffer.Up, relay.Options{
		IdleTimeout:      c.Settings.IdleTimeout,
		HalfCloseTimeout: c.Settings.HalfCloseTimeout,
		FromDown:         &c.Record.Received,
		FromUp:           &c.Record.Sent,
		DownRead:         c.sniffer.Read,
		UpRead:           c.sniffer.UpRead,
		PaceDown:         relay.NewPace(c.rate),
		PaceUp:           relay.NewPace(c.rate),
	}
	c.limits(&options)
	var explain func(*shadows) (details string) // with options.Denied
	if c.governed != nil && c.role.direction == flow.Inbound {
		judge := c.rejudge()
		options.Retired, options.Retirement = judge.denied, opaqueRetirement
		if c.role.rejudges {
			options.Denied, explain = judge.deniedByPolicy, judge.explain
		}
	}
	if c.role.gateway {
		accepted := c.accepted()
		options.Retired, options.Retirement = accepted.gone, opaqueRetirement
		if c.role.rejudges {
			options.Denied, explain = accepted.deniedByPolicy, accepted.explain
		}
	}
	c.role.flows.Carry(c.Record, c.protocol.Flow(), c.hello())
	c.releaseSniffer()
	end, err := relay.Run(c.w, c.Down, up, options)
	reason := flow.Reason(end)
	if reason == flow.UpstreamReset && up.Looped() {
		reason, err = flow.Loop, upstream.ErrLoop
	}
	switch {
	case reason == flow.MeshRefused:
		err = errRetired
	case reason == flow.PolicyDenied:
		err = errDeniedLater
		c.explainDenial(explain)
	case errors.Is(err, budget.ErrEvicted):
		reason = flow.MemoryBudget
	}
	if reason == flow.UpstreamReset && errors.Is(err, tcp.ErrHandshake) {
		reason, err = flow.UpstreamTLS, &upstream.HandshakeError{Reason: flow.UpstreamTLS, Err: err}
		c.Record.TransportFailure = upstream.TransportFailure(err)
	}
	c.Record.Close(c.role.flows, reason, err)
}
