// Package secure is TLS between connections of package tcp and their sockets, by crypto/tls, and the verification of peers.
package secure

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"time"

	"github.com/pillion-proxy/pillion/internal/budget"
	"github.com/pillion-proxy/pillion/internal/tcp"
)

// Session is what a handshake has agreed on.
type Session struct {
	Version, Suite uint16 // numbers of crypto/tls
	Protocol       string // ALPN; empty: none was agreed on
	ServerName     string // that the client asked for

	// Peer is the peer's verified certificate. It is nil if a client was not asked for one or, where that is allowed, had
	// none. SPIFFE is its identity; empty if it has not exactly one URI, with that scheme.
	Peer   *x509.Certificate
	SPIFFE string

	Chain []*x509.Certificate // of the peer, as it was sent; empty without Peer
	Local *x509.Certificate   // that the server presented; nil in a client's session

	raw   *tcp.Socket
	layer tcp.Layer // of the connection
}

// Own returns the SPIFFE ID that a server presented, as SPIFFE is that of its peer.
func (s *Session) Own() string {
	if s.Local == nil {
		return ""
	}
	return spiffeID(s.Local)
}

// Presented returns the certificate that a server presented; nil: none, or this side is the client.
func (s *Session) Presented() []*x509.Certificate {
	if s.Local == nil {
		return nil
	}
	return []*x509.Certificate{s.Local}
}

// PeerNames returns the names in the peer's certificate: its URIs, then its DNS names, then its subject (RFC 2253). It
// returns nil without a certificate.
func (s *Session) PeerNames() []string {
	if s.Peer == nil {
		return nil
	}
	names := make([]string, 0, len(s.Peer.URIs)+len(s.Peer.DNSNames)+1)
	for _, uri := range s.Peer.URIs {
		names = append(names, uri.String())
	}
	names = append(names, s.Peer.DNSNames...)
	return append(names, distinguishedName(s.Peer.RawSubject, &s.Peer.Subject))
}

// Server performs the server's part of a handshake, and leaves TLS between c and its socket. read has bytes of c that were
// read before; it may be nil, and belongs to c from now on. w is the waiter of c's owner, who is blocked until the handshake
// has ended or the deadline has passed; a zero deadline is none. memory accounts for the handshake while it waits. An error
// is an *Error. The caller closes c after it, so that the peer receives the alert, or resets it.
//
// Call it in a goroutine that ends soon: a handshake needs a large stack, and a connection keeps its own while it is open.
func Server(w *tcp.Waiter, c *tcp.Conn, read *tcp.Buffer, context *ServerContext, memory Memory, deadline time.Time) (*Session, error) {
	return handshake(w, c, read, memory, deadline, true, func(s *socket) *tls.Conn { return tls.Server(s, context.config) })
}

// Memory is the budget of the memory that a handshake holds before the peer is authenticated. Budget may be nil: no limit.
type Memory struct {
	Budget *budget.Budget
	Peer   netip.Addr
}

// Limits of a handshake.
const (
	// maxHandshake is how many bytes a peer may send. A chain of certificates has a few KiB; crypto/tls allows 256 KiB.
	maxHandshake = 64 << 10

	// handshakeMemory is what a handshake holds besides what the peer has sent: a stack, and the state of crypto/tls.
	handshakeMemory = 32 << 10
)

// Client performs the client's part, as Server does the server's.
func Client(w *tcp.Waiter, c *tcp.Conn, context *ClientContext, deadline time.Time) (*Session, error) {
	return handshake(w, c, nil, Memory{}, deadline, false, func(s *socket) *tls.Conn {
		config := context.config.Clone()
		config.KeyLogWriter = &s.secrets
		return tls.Client(s, config)
	})
}

// handshake computes for some 0.3 ms. It takes turns with other connections that have work, before it begins, when bytes have
// arrived and before a server signs, so that a flood of handshakes does not delay the requests of others.
//
// It needs a stack of 16 KiB or more. The stack of a goroutine shrinks late or not at all.
func handshake(w *tcp.Waiter, c *tcp.Conn, read *tcp.Buffer, memory Memory, deadline time.Time, server bool, start func(*socket) *tls.Conn) (*Session, error) {
	var held budget.Account
	held.Open(memory.Budget, w, memory.Peer)
	defer held.Close()
	l := &layer{}
	c.SetLayer(read, func(raw *tcp.Socket) tcp.Layer {
		l.socket = socket{input: input{raw: raw}, wait: func() error {
			s := &l.socket
			if !held.Hold(handshakeMemory + 2*s.received + s.size()) { // the buffers of crypto/tls grow twofold
				return budget.ErrEvicted
			}
			err := w.Wait(deadline, c, nil)
			if errors.Is(err, tcp.ErrInterrupted) {
				return budget.ErrEvicted
			}
			w.Pause(c)
			return err
		}, pause: func() { w.Pause(c) }}
		l.conn = start(&l.socket)
		return l
	})
	w.Pause(c)
	defer w.EndTurn()
	err := l.conn.Handshake()
	l.socket.wait, l.socket.pause = nil, nil
	if err != nil {
		l.socket.drop()
		return nil, failureOf(err)
	}
	session := sessionOf(l.conn.ConnectionState())
	session.Local = l.socket.presented
	if err := l.proceed(session, server); err != nil {
		return nil, failureOf(err)
	}
	c.SetBudget(memory.Budget, memory.Peer)
	return session, nil
}

// proceed prepares the layer for data. Where records can be protected here, crypto/tls has ended its part.
func (l *layer) proceed(session *Session, server bool) error {
	s, keys := &l.socket, l.socket.secrets
	session.raw, session.layer = s.raw, l
	s.presented, s.secrets = nil, secrets{}
	suite := suiteOf(session)
	if suite == nil || keys.client == nil || keys.server == nil {
		return nil
	}
	records, err := newRecords(s.input, suite, &keys, server)
	if err == nil {
		s.raw.Replace(records)
		session.layer = records
	}
	return err
}

func sessionOf(state tls.ConnectionState) *Session {
	s := &Session{Version: state.Version, Suite: state.CipherSuite, Protocol: state.NegotiatedProtocol, ServerName: state.ServerName}
	if len(state.PeerCertificates) > 0 {
		s.Peer, s.Chain = state.PeerCertificates[0], state.PeerCertificates
		s.SPIFFE = spiffeID(s.Peer)
	}
	return s
}

// layer is a tcp.Layer by crypto/tls. A read that finds no whole record fails with the socket's ErrAgain. That error is
// temporary in the sense of package net, so crypto/tls keeps what it has and goes on with the next read.
type layer struct {
	conn   *tls.Conn
	socket socket
	filled bool // the last read has filled its slice, so that there may be more of the record
	begun  bool // the peer has sent data
}

func (l *layer) Read(p []byte) (int, error) {
	n, err := l.conn.Read(p)
	l.filled = n == len(p)
	if l.begun = l.begun || n > 0; err != nil && !l.begun {
		if rejected, ok := rejection(err); ok {
			return n, rejected
		}
	}
	return n, err
}

// Held implements tcp.Holder. Crypto/tls keeps the memory of the largest record.
func (l *layer) Held() int { return l.socket.size() + l.socket.largest }

// Drop implements tcp.Holder.
func (l *layer) Drop() { l.socket.drop() }

func (l *layer) Write(p []byte) (int, error) { return l.conn.Write(p) }

func (l *layer) CloseWrite() error { return l.conn.CloseWrite() }

// Buffered relies on the socket: after a read that has returned data, crypto/tls has at most the rest of one record.
func (l *layer) Buffered() bool {
	_, whole := l.socket.record()
	return l.filled || whole
}

// socket is the net.Conn of crypto/tls. It passes on at most the rest of one record at a time. So no byte that follows the
// handshake is in crypto/tls when the handshake has ended.
type socket struct {
	input
	wait  func() error // blocks in a handshake; nil: reads do not block
	pause func()       // lets others run in the middle of a handshake

	presented *x509.Certificate // by a server, during the handshake
	secrets   secrets           // of the handshake
	received  int               // bytes, during the handshake

	header [headerSize]byte // of the record that begins, while have < len(header)
	have   int
	left   int // bytes of the record that begins

	largest int // size of a record so far
}

// Read is called when crypto/tls has no whole record.
func (s *socket) Read(p []byte) (int, error) {
	for s.incomplete() {
		err := s.fill()
		if err == tcp.ErrAgain && s.wait != nil {
			err = s.wait()
		}
		if err == io.EOF && len(s.bytes) > 0 {
			break
		}
		if err != nil {
			return 0, err
		}
	}
	n := s.follow(p)
	if len(s.bytes) == 0 {
		s.rest()
	}
	if s.wait != nil {
		if s.received += n; s.received > maxHandshake {
			return 0, &Error{Failure: Protocol, Detail: fmt.Sprintf("the handshake has more than %d bytes", maxHandshake)}
		}
	}
	return n, nil
}

// incomplete reports whether there is nothing to pass on. In a handshake, records are passed on as a whole: crypto/tls
// allocates room for a record after its header, which would be garbage when the rest does not come. Invalid headers are
// passed on at once, so that crypto/tls rejects them.
func (s *socket) incomplete() bool {
	if s.wait == nil || s.left > 0 || s.have > 0 {
		return len(s.bytes) == 0
	}
	size, whole := s.record()
	return !whole && (size == 0 || s.bytes[1] == majorVersion && size <= headerSize+maxCiphertext12)
}

// follow moves bytes of one header, or of the rest of one record, to p.
func (s *socket) follow(p []byte) (n int) {
	if s.left > 0 {
		n = copy(p, s.bytes[:min(s.left, len(s.bytes))])
		s.left -= n
	} else {
		n = copy(p, s.bytes[:min(headerSize-s.have, len(s.bytes))])
		if s.have += copy(s.header[s.have:], p[:n]); s.have == headerSize {
			s.left, s.have = int(binary.BigEndian.Uint16(s.header[3:])), 0
			s.largest = max(s.largest, s.left)
		}
	}
	s.use(n)
	return n
}

// Write implements net.Conn. It accepts all of p; see tcp.Socket.
func (s *socket) Write(p []byte) (int, error) { return s.raw.Write(p) }

// Close implements net.Conn. The connection is closed by its owner.
func (s *socket) Close() error { return nil }

// LocalAddr implements net.Conn.
func (s *socket) LocalAddr() net.Addr { return nil }

// RemoteAddr implements net.Conn.
func (s *socket) RemoteAddr() net.Addr { return nil }

// SetDeadline implements net.Conn. Reads and writes do not block after the handshake, and that has its own deadline.
func (s *socket) SetDeadline(time.Time) error { return nil }

// SetReadDeadline implements net.Conn.
func (s *socket) SetReadDeadline(time.Time) error { return nil }

// SetWriteDeadline implements net.Conn.
func (s *socket) SetWriteDeadline(time.Time) error { return nil }

var _ tcp.Layer = (*layer)(nil)
