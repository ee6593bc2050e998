package serve

import (
	"errors"
	"maps"
	"strings"
	"time"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/identity"
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
	apart(func() { reason, err = c.handshakeDown(g) })
	switch {
	case reason == flow.MeshRefused:
		return c.abandon(reason, err)
	case err != nil:
		return c.rejectTLS(reason, err)
	}
	c.sniffer.Delay = c.Settings.DetectionDelay // it may have been that of a client that must begin with TLS
	if c.role.gateway && g.chain.HTTP != nil {
		c.awaitRequest()
		c.holdHead()
	}
	return c.first() && c.expect(g.chain)
}

// apart calls deep in another goroutine and waits for its end. The stack of a goroutine shrinks late or not at all, and that
// of a connection lives as long as the connection.
func apart(deep func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		deepen(0)
		deep()
	}()
	<-done
}

// deepen grows the stack of its goroutine to 16 KiB in one step. A handshake would grow it in three, and copy more frames each time:
// 4 % of its CPU.
//
//go:noinline
func deepen(i int) byte {
	var room [9 << 10]byte
	return room[i]
}

// handshakeDown performs the handshake with downstream. It returns the reason with an error.
func (c *Conn) handshakeDown(g *governed) (flow.Reason, error) {
	context, err := c.role.contexts.Server(g.chain.TLS, g.chain.HasMetadata && c.role.peers != nil && !c.role.gateway)
	if err != nil {
		return flow.MeshRefused, err
	}
	timeout := g.chain.HandshakeTimeout
	if timeout <= 0 {
		timeout = handshakeTimeout
	}
	c.Record.SetTLS(c.sniffer.Hello)
	memory := secure.Memory{Budget: c.role.budget, Peer: c.Record.Remote()}
	session, err := secure.Server(c.w, c.Down, c.sniffer.Take(), context, memory, time.Now().Add(timeout))
	if err == nil && c.role.gateway && !strings.EqualFold(session.ServerName, c.Record.TLS().ServerName) {
		err = errOtherName
	}
	if err == nil && g.chain.HTTP != nil && session.Peer != nil {
		g.shown = g.chain.HTTP
		g.peers, err = peerFields(g.shown, session)
	}
	if err != nil {
		return handshakeReason(err), err
	}
	s := securityOf(session)
	if c.role.describesCertificates() || showsCertificates(g.snapshot, g.chain) {
		s.PeerCertificate, s.OwnCertificate = secure.Describe(session.Chain), secure.Describe(session.Presented())
	}
	if g.secured, g.ended, g.names = true, g.chain.TLS, session.PeerNames(); c.role.gateway {
		c.Record.Client = s
		return "", nil
	}
	s.Exchanges = session.Exchange(c.role.peers, describe(c.Record))
	c.Record.Security = s
	return "", nil
}

// errOtherName closes a connection whose filter chain may be that of another server: it was chosen without the server name that
// the client asks for, because its ClientHello came late, is too large, or names no host.
var errOtherName = errors.New("its filter chain was not chosen by the server name in its handshake")

func inside(protocol sniff.Protocol) secure.Inside {
	switch protocol {
	case sniff.HTTP1:
		return secure.HTTP1
	case sniff.HTTP2:
		return secure.HTTP2
	}
	return secure.TCP
}

// secured identifies upstream connections that are secured in the same way.
type secured struct {
	by     *mesh.UpstreamTLS
	inside secure.Inside
	roots  any                // *identity.Roots or *mesh.Secret: connections that were verified by others are not used for new requests
	plain  *upstream.Security // with their options
	host   string             // of requests, if it decides which server is expected
}

// maxSecurities bounds the values that are kept for a role. Without them, connections are not reused.
const maxSecurities = 1024

// security returns what secures and limits connections. The same value is returned for connections that are
// interchangeable. plain is that of the same ones without TLS.
func (r *Role) security(t *mesh.UpstreamTLS, inside secure.Inside, s *mesh.Snapshot, plain *upstream.Security, host string) *upstream.Security {
	if t == nil {
		return plain
	}
	key := secured{by: t, inside: inside, roots: r.verifiedBy(t, s), plain: plain, host: host}
	if known := (*r.securities.Load())[key]; known != nil {
		return known
	}
	r.securing.Lock()
	defer r.securing.Unlock()
	before := *r.securities.Load()
	if known := before[key]; known != nil {
		return known
	}
	next := make(map[secured]*upstream.Security, len(before)+1)
	if len(before) < maxSecurities {
		maps.Copy(next, before)
	}
	made := &upstream.Security{Options: plain.Options, Handshake: r.handshake(t, inside, host)}
	next[key] = made
	r.securities.Store(&next)
	return made
}

// verifiedBy identifies what servers are verified with now: roots, with revocation lists in a file.
func (r *Role) verifiedBy(t *mesh.UpstreamTLS, s *mesh.Snapshot) any {
	roots := r.roots(t, s)
	if t.CRL.Path == "" {
		return roots
	}
	return [...]any{roots, r.contexts.FileRevocations(t.CRL.Path)}
}

// roots identifies what servers are verified with now; nil: it has not come, or they are not verified.
func (r *Role) roots(t *mesh.UpstreamTLS, s *mesh.Snapshot) any {
	if own := r.mesh.Identity(); t.Roots == secure.OwnRoots && own != nil {
		return r.trust(own)
	}
	if identity.IsFileSecret(t.Roots) {
		return r.contexts.FileRoots(t.Roots)
	}
	if secret := s.Secret(t.Roots); secret != nil {
		return secret
	}
	return nil
}

// describesCertificates reports whether records carry certificates.
func (r *Role) describesCertificates() bool {
	settings := r.engine.Settings()
	return settings.NotesCertificates()
}

// describe returns a function that sets the workload of the other side in a record, if its identity agrees.
func describe(record *flow.Record) func(*flow.Workload) {
	return func(w *flow.Workload) {
		if record.Security.Agrees(w) {
			record.Workload.Set(w)
		}
	}
}

// exchangeable is the label of a connection on which metadata may be exchanged. It is not pooled.
type exchangeable struct {
	*flow.Security
	session *secure.Session
}

// handshake returns what secures an upstream connection. The connection's label describes the result: a *flow.Security, or
// for MetadataTCP an exchangeable.
func (r *Role) handshake(t *mesh.UpstreamTLS, inside secure.Inside, host string) func(*tcp.Waiter, *tcp.Conn, time.Time) error {
	return func(w *tcp.Waiter, up *tcp.Conn, deadline time.Time) error {
		context, err := r.contexts.Client(t, inside, host)
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
		s := r.securityOf(t, session)
		if inside == secure.MetadataTCP {
			up.SetLabel(&exchangeable{s, session})
		} else {
			up.SetLabel(s)
		}
		return nil
	}
}

// note records the TLS of the upstream connection, and begins the exchange of metadata on it.
func (c *Conn) note(up *tcp.Conn) {
	switch label := up.Label().(type) {
	case *flow.Security:
		c.Record.Security = label
	case *exchangeable:
		c.Record.Security = label.Security
		label.Exchanges = label.session.Exchange(c.role.peers, describe(c.Record))
		up.SetLabel(label.Security)
	}
}

// securityOf describes a session with a client.
func securityOf(s *secure.Session) *flow.Security {
	return &flow.Security{
		Peer: s.SPIFFE, Own: s.Own(), Mutual: s.Peer != nil, Version: s.VersionName(), Cipher: s.CipherName(),
	}
}

// securityOf describes TLS with an upstream.
func (r *Role) securityOf(t *mesh.UpstreamTLS, session *secure.Session) *flow.Security {
	s := securityOf(session)
	s.Mutual = t.Certificate != ""
	if own := r.mesh.Identity(); own != nil && t.Certificate == secure.OwnCertificate {
		s.Own = own.SPIFFE
	}
	if r.describesCertificates() {
		s.PeerCertificate = secure.Describe(session.Chain)
		s.OwnCertificate = secure.Describe(r.contexts.Presented(t))
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
	c.Record.Close(c.role.flows, reason, err)
	if reason == flow.MemoryBudget {
		c.role.engine.Detain(c.w, c.Down)
	}
	c.Down.Close()
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
