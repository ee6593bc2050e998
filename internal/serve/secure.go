package serve

import (
	"errors"
	"time"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/secure"
	"github.com/pillion-proxy/pillion/internal/sniff"
	"github.com/pillion-proxy/pillion/internal/tcp"
	"github.com/pillion-proxy/pillion/internal/upstream"
)

// handshakeTimeout is how long a handshake of TLS may take, unless the configuration limits it. Istio configures 15 s as
// well.
const handshakeTimeout = 15 * time.Second

// Secure ends TLS with downstream if the filter chain that Admit has found says so, and detects the protocol inside it.
// The connection goes on like one without TLS. It does nothing without such a chain, or if TLS is ended already.
func (c *Conn) Secure() bool {
	g := c.governed
	if g == nil || g.chain == nil || g.chain.TLS == nil || g.secured {
		return true
	}
	return c.terminate(g)
}

func (c *Conn) terminate(g *governed) bool {
	var reason flow.Reason
	var err error
	conn := *c // of its own, so that c stays on the stack of connections without TLS
	apart(func() { reason, err = conn.handshakeDown(g) })
	switch {
	case reason == flow.MeshRefused:
		return c.abandon(reason, err)
	case err != nil:
		return c.rejectTLS(reason, err)
	}
	c.sniffer.Delay = c.Settings.DetectionDelay // it may have been that of a client that must begin with TLS
	return c.first() && c.expect(g.chain)
}

// apart calls deep in another goroutine and waits for its end. The stack of a goroutine shrinks late or not at all, and that
// of a connection lives as long as the connection.
func apart(deep func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		deep()
	}()
	<-done
}

// handshakeDown performs the handshake with downstream. It returns the reason with an error.
func (c *Conn) handshakeDown(g *governed) (flow.Reason, error) {
	context, err := c.role.contexts.Server(g.chain.TLS, g.chain.HasMetadata && c.role.peers != nil)
	if err != nil {
		return flow.MeshRefused, err
	}
	timeout := g.chain.HandshakeTimeout
	if timeout <= 0 {
		timeout = handshakeTimeout
	}
	c.Record.TLS = c.sniffer.Hello
	memory := secure.Memory{Budget: c.role.budget, Peer: c.Record.Remote()}
	session, err := secure.Server(c.w, c.Down, c.sniffer.Take(), context, memory, time.Now().Add(timeout))
	if err == nil && g.chain.HTTP != nil {
		g.peers, err = peerFields(g.chain.HTTP, session)
	}
	if err != nil {
		return handshakeReason(err), err
	}
	g.secured, g.names, c.Record.Security = true, session.PeerNames(), securityOf(session)
	if c.role.describesCertificates() {
		c.Record.Security.PeerCertificate, c.Record.Security.OwnCertificate = secure.Describe(session.Chain), secure.Describe(session.Presented())
	}
	c.Record.Security.Exchanges = session.Exchange(c.role.peers, describe(c.Record))
	return "", nil
}

// Confirm judges an outbound connection again by what a client sent that was silent before. The way to the same cluster
// stays. The connection is refused if it needed another TLS than that of the connection that was dialled meanwhile. If it
// is HTTP inside TLS, that connection is given up, because its ALPN stands for other protocols, and the engine dials.
func (c *Conn) Confirm(to *upstream.Target) bool {
	g := c.governed
	if g == nil || g.judged == c.protocol {
		return true
	}
	dialled := g.way
	if !c.Admit() {
		return false
	}
	up := c.sniffer.Up
	switch {
	case up == nil:
		return true
	case g.way.Cluster == dialled.Cluster && g.way.Cluster != nil:
		g.way.TLS, g.way.Endpoint = dialled.TLS, dialled.Endpoint
	case g.way.TLS != dialled.TLS:
		return c.abandon(flow.MeshRefused, errLate)
	}
	if g.way.TLS != nil && c.HTTP() && c.sniffer.UpRead == nil {
		up.Close()
		c.sniffer.Up = nil
		c.Direct(to)
	}
	return true
}

var errLate = errors.New("its first bytes came late, and the connection that was dialled is secured otherwise than they need")

// Direct sets the endpoint and the TLS of the way that Admit has found in the target of an outbound connection.
func (c *Conn) Direct(to *upstream.Target) {
	g := c.governed
	if g == nil {
		return
	}
	if g.way.Endpoint.IsValid() {
		to.Address = g.way.Endpoint // still Balanced: the next connection may go to another one
	}
	if g.way.TLS != nil {
		to.Security = &upstream.Security{Handshake: c.handshake(g.way.TLS, c.inside(), "")}
	}
}

// inside returns what an upstream connection of c carries inside TLS.
func (c *Conn) inside() secure.Inside {
	switch cluster := c.governed.way.Cluster; {
	case c.protocol == sniff.HTTP1:
		return secure.HTTP1
	case c.protocol == sniff.HTTP2:
		return secure.HTTP2
	case c.role.peers != nil && cluster != nil && cluster.HasMetadataPeer:
		return secure.MetadataTCP
	}
	return secure.TCP
}

// describesCertificates reports whether records carry certificates.
func (r *Role) describesCertificates() bool { return r.engine.Settings().Note.Certificates }

// describe returns a function that sets the workload of the other side in a record, if its identity agrees.
func describe(record *flow.Record) func(*flow.Workload) {
	return func(w *flow.Workload) {
		if record.Security.Agrees(w) {
			record.Workload.Set(w)
		}
	}
}

// handshake returns what secures an upstream connection of c. host is that of a request; see secure.Contexts.
func (c *Conn) handshake(t *mesh.UpstreamTLS, inside secure.Inside, host string) func(*tcp.Waiter, *tcp.Conn, time.Time) error {
	role, record := c.role, c.Record // not c, which stays on its goroutine's stack
	return func(w *tcp.Waiter, up *tcp.Conn, deadline time.Time) error {
		context, err := role.contexts.Client(t, inside, host)
		if err != nil {
			return &upstream.HandshakeError{Reason: flow.UpstreamTLS, Err: err}
		}
		if deadline.IsZero() {
			deadline = time.Now().Add(handshakeTimeout)
		}
		var session *secure.Session
		apart(func() { session, err = secure.Client(w, up, context, deadline) })
		if err != nil {
			return &upstream.HandshakeError{Reason: upstreamReason(err), Err: err}
		}
		record.Security = role.security(t, session)
		if role.describesCertificates() {
			record.Security.PeerCertificate = secure.Describe(session.Chain)
			record.Security.OwnCertificate = secure.Describe(role.contexts.Presented(t))
		}
		record.Security.Exchanges = session.Exchange(role.peers, describe(record))
		return nil
	}
}

// securityOf describes a session with a client.
func securityOf(s *secure.Session) *flow.Security {
	return &flow.Security{
		Peer: s.SPIFFE, Own: s.Own(), Mutual: s.Peer != nil, Version: s.VersionName(), Cipher: s.CipherName(),
	}
}

// security describes TLS with an upstream.
func (r *Role) security(t *mesh.UpstreamTLS, session *secure.Session) *flow.Security {
	s := securityOf(session)
	s.Mutual = t.Certificate != ""
	if own := r.mesh.Identity(); own != nil && t.Certificate == secure.OwnCertificate {
		s.Own = own.SPIFFE
	}
	return s
}

func upstreamReason(err error) flow.Reason {
	switch {
	case errors.Is(err, tcp.ErrCanceled):
		return flow.DrainDeadline
	case errors.Is(err, tcp.ErrDeadline):
		return flow.UpstreamTimeout
	case isFailure(err, secure.NoResources):
		return flow.NoDescriptors
	}
	return flow.UpstreamTLS
}

func isFailure(err error, failure secure.Failure) bool {
	var failed *secure.Error
	return errors.As(err, &failed) && failed.Failure == failure
}

// rejectTLS ends a connection whose handshake failed. It closes downstream in order, because a reset could overtake the
// alert that names the cause to the peer.
func (c *Conn) rejectTLS(reason flow.Reason, err error) bool {
	c.sniffer.Abandon(err)
	c.releaseSniffer()
	c.Down.Close()
	c.Record.Close(c.role.flows, reason, err)
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
	case secure.NoMemory:
		return flow.MemoryBudget
	case secure.NoResources:
		return flow.NoDescriptors
	case secure.NoIdentity:
		return flow.TLSNoIdentity
	case secure.Protocol, secure.NotTLS, secure.Alert:
		return flow.TLSFailed
	case secure.Version:
		return flow.TLSVersion
	case secure.NoCertificate:
		return flow.TLSNoCertificate
	case secure.Expired, secure.NotYetValid:
		return flow.TLSExpired
	case secure.UnknownRoot:
		return flow.TLSUnknownRoot
	case secure.NameRefused:
		return flow.TLSNameRefused
	}
	return flow.TLSPeerRefused
}
