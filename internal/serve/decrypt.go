package serve

import (
	"errors"
	"net/netip"
	"time"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/secure"
	"github.com/pillion-proxy/pillion/internal/sniff"
	"github.com/pillion-proxy/pillion/internal/tcp"
	"github.com/pillion-proxy/pillion/internal/upstream"
)

// Decryption ends TLS of outbound connections here and begins it again towards their servers. Its methods are called from
// several goroutines.
type Decryption interface {
	// Server returns TLS with the server that a client asks for; nil: the connection is not decrypted.
	Server(to netip.AddrPort, hello flow.Hello) *secure.ClientContext

	// Client returns TLS with the client, in the place of that server. protocol is the one that the server has agreed on.
	Client(to netip.AddrPort, hello flow.Hello, protocol string) *secure.ServerContext

	// Failed reports that one of the two handshakes failed. That with the server must fail in the client's eyes as well, so
	// this connection passes undecrypted then; that with the client has ended the connection.
	Failed(to netip.AddrPort, hello flow.Hello, withClient bool, err error)
}

// Decrypt ends TLS with downstream, if connections are decrypted, and detects the protocol inside it. TLS with the server
// comes first: if the server is not accepted, the connection goes on undecrypted, and the client judges by itself. The
// protocol that the server agrees on is the client's. Call it before Dial and after WatchBoth.
func (c *Conn) Decrypt(to *upstream.Target) bool {
	if c.role.decryption == nil || c.protocol != sniff.TLS || c.Record.Security != nil || c.sniffer.UpRead != nil {
		return true
	}
	return c.decrypt(to)
}

func (c *Conn) decrypt(to *upstream.Target) bool {
	d, hello, address := c.role.decryption, c.sniffer.Hello, to.Address
	context := d.Server(address, hello)
	if context == nil {
		return true
	}
	if early := c.sniffer.Up; early != nil { // it was dialled while the client was silent
		early.Close()
		c.sniffer.Up = nil
	}
	agreed := new(agreement)
	to.Security = &upstream.Security{Handshake: agreed.handshake(c.Record, context)}
	alone := *to
	alone.Balanced = false // a server that is not accepted is asked once
	dialer := c.role.dialer
	dialer.Timeout = c.Settings.ConnectTimeout
	up, attempts, err := dialer.Dial(c.w, alone)
	c.Record.Attempts, c.Record.Upstream = uint8(attempts), address
	var rejected *upstream.HandshakeError
	switch {
	case errors.As(err, &rejected) && !errors.Is(err, tcp.ErrCanceled):
		d.Failed(address, hello, false, err)
		to.Security, c.Record.Security = nil, nil
		return true
	case err != nil:
		c.Record.TransportFailure = upstream.TransportFailure(err)
		return c.abandon(upstream.Reason(err), err)
	}
	c.Record.UpstreamLocal, c.sniffer.Up = up.LocalAddr(), up
	c.Record.SetTLS(hello)
	if err := c.presentTo(d.Client(address, hello, agreed.protocol)); err != nil {
		d.Failed(address, hello, true, err)
		c.Record.Protocol = flow.TLS
		return c.rejectTLS(handshakeReason(err), err)
	}
	return c.firstInside(agreed.protocol)
}

// firstInside detects the protocol inside TLS. What the server and the client have agreed on counts: a client of HTTP that is
// slow, or that sends something else, is served by the HTTP engine, so that its requests are seen and judged.
func (c *Conn) firstInside(agreed string) bool {
	s := c.sniffer
	s.Delay = c.Settings.DetectionDelay
	http := sniff.HTTP1
	switch agreed {
	case "h2":
		http = sniff.HTTP2
	case "http/1.1":
	default:
		return c.first()
	}
	s.Requests, s.Delay, s.Hold = true, maxSilence, handshakeTimeout
	if s.Idle > 0 {
		s.Delay = s.Idle
	}
	if !c.first() {
		return false
	}
	if s.Read != nil {
		c.protocol = http
	}
	if s.Up.Ended() && c.HTTP() { // the server did not wait for the client; the engine dials again
		s.Up.Close()
		s.Up = nil
	}
	return true
}

// presentTo performs the handshake with the client. Its stack is that of another goroutine: see apart.
func (c *Conn) presentTo(context *secure.ServerContext) (err error) {
	w, down, read := c.w, c.Down, c.sniffer.Take()
	memory := secure.Memory{Budget: c.role.budget, Peer: c.Record.Remote()}
	apart(func() { _, err = secure.Server(w, down, read, context, memory, time.Now().Add(handshakeTimeout)) })
	return err
}

// agreement is what the handshake with a server has agreed on.
type agreement struct{ protocol string }

// handshake returns what secures the connections to a server.
func (a *agreement) handshake(record *flow.Record, context *secure.ClientContext) func(*tcp.Waiter, *tcp.Conn, time.Time) error {
	return func(w *tcp.Waiter, up *tcp.Conn, deadline time.Time) error {
		if limit := time.Now().Add(handshakeTimeout); deadline.IsZero() || limit.Before(deadline) {
			deadline = limit
		}
		var session *secure.Session
		var err error
		apart(func() { session, err = secure.Client(w, up, context, deadline) })
		if err != nil {
			return &upstream.HandshakeError{Reason: upstreamReason(err), Err: err}
		}
		a.protocol, record.Security = session.Protocol, securityOf(session)
		return nil
	}
}
