package serve

import (
	"errors"
	"time"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/secure"
	"github.com/pillion-proxy/pillion/internal/tcp"
)

// handshakeTimeout is how long a handshake of TLS may take, unless the configuration limits it. Istio configures 15 s as
// well.
const handshakeTimeout = 15 * time.Second

// Secure ends TLS with downstream if the filter chain that Admit has found says so, and detects the protocol inside it.
// The connection goes on like one without TLS. It does nothing without such a chain, or if TLS is ended already.
func (c *Conn) Secure() bool {
	if c.chain == nil || c.chain.TLS == nil || c.secured {
		return true
	}
	context, err := c.role.contexts.Server(c.chain.TLS)
	if err != nil {
		return c.abandon(flow.MeshRefused, err)
	}
	timeout := c.chain.HandshakeTimeout
	if timeout <= 0 {
		timeout = handshakeTimeout
	}
	c.Record.TLS = c.sniffer.Hello
	session, err := secure.Server(c.w, c.Down, c.sniffer.Take(), context, time.Now().Add(timeout))
	if err != nil {
		return c.rejectTLS(err)
	}
	c.secured, c.Record.Peer = true, session.SPIFFE
	return c.first() && c.expect()
}

// rejectTLS ends a connection whose handshake failed. It closes downstream in order, because a reset could overtake the
// alert that names the cause to the peer.
func (c *Conn) rejectTLS(err error) bool {
	c.sniffer.Abandon(err)
	c.releaseSniffer()
	c.Down.Close()
	c.Record.Close(c.role.flows, handshakeReason(err), err)
	return false
}

// handshakeReason maps an error of a handshake to the reason with which the connection ends.
func handshakeReason(err error) flow.Reason {
	var failed *secure.Error
	switch {
	case errors.Is(err, tcp.ErrCanceled):
		return flow.DrainDeadline
	case !errors.As(err, &failed):
		return flow.TLSFailed
	}
	switch failed.Failure {
	case secure.Deadline:
		return flow.TLSTimeout
	case secure.Ended:
		return flow.DownstreamReset
	case secure.NoIdentity:
		return flow.TLSNoIdentity
	case secure.Protocol, secure.NotTLS, secure.Version, secure.Alert:
		return flow.TLSFailed
	}
	return flow.TLSPeerRefused
}
