// Package sniff decides from the first bytes of a connection which protocol it speaks: HTTP/1, HTTP/2, TLS, or something
// that stays opaque.
//
// The bytes are read into a buffer that travels with the connection, so no byte is lost. No wait is long: a silent
// downstream does not keep the upstream from being dialled, and first bytes that do not decide are held for a bounded
// time; see Late for what follows. Detection needs no list of ports.
//
// Detection has three steps, and the caller may put others between them. First reads downstream's first bytes. Then the
// caller dials the upstream, unless the protocol is HTTP. Both watches both sides if downstream was silent.
package sniff

import (
	"errors"
	"fmt"
	"io"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pillion-proxy/pillion/internal/budget"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/http2"
	"github.com/pillion-proxy/pillion/internal/tcp"
)

// Sniffer detects the protocol of one connection. The caller sets the fields down to Peer before the first call, and
// Up before Both.
type Sniffer struct {
	Down     *tcp.Conn
	Delay    time.Duration // how long First waits for a silent Down; zero: not at all
	Hold     time.Duration // how long to hold bytes that do not decide, from the first one; zero: not at all
	Idle     time.Duration // how long Both waits while both sides are silent; zero or less: forever
	Draining func() bool   // ends Both while both sides are silent; nil: never
	Requests bool          // Down must speak first: Draining ends First as well while Down is silent
	Wary     bool          // what a lenient server may take for a request is HTTP1, not opaque

	// HelloHold is set if the caller may end TLS with Down: how long to hold the beginning of a ClientHello, from its first
	// byte. A ClientHello then decides whatever Up has sent. One that is not whole in time, or too large, is an error: taken
	// for opaque, it would pass without TLS.
	HelloHold time.Duration

	// The memory budget for bytes that are held, and the peer they are attributed to: flow.Record.Remote. nil: no limit.
	Budget *budget.Budget
	Peer   netip.Addr

	// The upstream connection; nil before the dial.
	Up *tcp.Conn

	// The bytes read from Down and from Up; may be nil. The caller owns the buffers after detection.
	Read, UpRead *tcp.Buffer

	Hello flow.Hello // of a TLS connection
	Empty bool       // Down has ended before its first byte

	began   time.Time // when Down's first, undecided bytes arrived; zero: they decided, or have not arrived
	greeted time.Time // when Up sent what an HTTP/2 server may send first; zero: it has not
}

var errUpstream = errors.New("upstream was lost before either side had sent anything")

// Errors of a ClientHello that the caller might have answered.
var (
	ErrHelloTimeout = errors.New("the ClientHello did not end in time")
	ErrHelloSize    = errors.New("the ClientHello has more than 16 KiB")
)

// ErrDraining is Both's error when the agent drains while both sides are silent.
var ErrDraining = errors.New("neither side had sent anything when the agent drained")

// First waits up to Delay for downstream's first bytes, and then until they decide. The protocol is Undecided if
// downstream was silent: the caller dials the upstream then and calls Both. The errors are those of reading from Down and
// of waiting.
func (s *Sniffer) First(w *tcp.Waiter) (Protocol, error) {
	var held account
	defer held.close()
	var silence time.Time // when it has lasted too long
	for {
		protocol, err := s.look()
		if protocol != Undecided || err != nil {
			return s.answers(protocol), err
		}
		deadline := silence
		if s.Read == nil && s.Requests && s.Draining != nil && s.Draining() {
			return Undecided, ErrDraining
		}
		if s.Read != nil {
			deadline = s.heldUntil()
		} else if silence.IsZero() {
			silence = time.Now().Add(s.Delay)
			deadline = silence
		}
		if !held.hold(s, w) {
			return Undecided, budget.ErrEvicted
		}
		switch err := w.Wait(deadline, s.Down, nil); {
		case err == nil:
		case errors.Is(err, tcp.ErrDeadline) && s.Read == nil:
			return Undecided, nil
		case errors.Is(err, tcp.ErrDeadline):
			protocol, err := s.late()
			return s.answers(protocol), err
		case errors.Is(err, tcp.ErrInterrupted):
			return Undecided, budget.ErrEvicted
		default:
			return Undecided, err
		}
	}
}

// Both waits until downstream's bytes decide, or until Up sends something or closes first: the connection is opaque then.
// It waits as long as that takes, limited by Idle (the error is tcp.ErrDeadline) and by Draining (ErrDraining). It does
// not read from Up to find out whether it has closed: the kernel reports a reset only once, and the relay must see it.
//
// An HTTP/2 server may send its settings before a slow client sends anything. They are held, as long as undecided bytes
// are, until the client's bytes show whether it speaks HTTP/2: an HTTP/2 client never waits for the server (RFC 9113
// §3.4).
//
// With HelloHold, downstream's ClientHello decides even if Up has sent something, because the server is spoken to inside
// the TLS.
func (s *Sniffer) Both(w *tcp.Waiter) (Protocol, error) {
	var held account
	defer held.close()
	for {
		protocol, err := s.look()
		if err != nil || protocol == TLS && s.HelloHold > 0 {
			return protocol, err
		}
		hello := protocol == Undecided && s.inHello()
		switch {
		case hello:
		case !s.greeted.IsZero() && s.Up.Ended():
			return Opaque, nil // it will serve no request, and the client is to receive its greeting now
		case s.greeted.IsZero() && s.Up.Readable():
			spoke, err := s.greet()
			if err != nil {
				return Undecided, err
			}
			if spoke && s.greeted.IsZero() {
				return Opaque, nil
			}
		}
		if protocol != Undecided {
			return s.answers(protocol), nil
		}
		var deadline time.Time
		up := s.Up
		switch {
		case hello:
			deadline, up = s.heldUntil(), nil
		case !s.greeted.IsZero():
			deadline = s.greeted.Add(s.Hold)
		case s.Read != nil:
			deadline = s.heldUntil()
		case s.Draining != nil && s.Draining():
			return Undecided, ErrDraining
		case s.Idle > 0:
			deadline = time.Now().Add(s.Idle)
		}
		if !held.hold(s, w) {
			return Undecided, budget.ErrEvicted
		}
		err = w.Wait(deadline, s.Down, up)
		switch {
		case errors.Is(err, tcp.ErrInterrupted):
			return Undecided, budget.ErrEvicted
		case !errors.Is(err, tcp.ErrDeadline):
		case !s.greeted.IsZero():
			return Opaque, nil
		case s.Read != nil:
			return s.late()
		}
		if err != nil {
			return Undecided, err
		}
	}
}

// late returns the verdict when no more bytes of Down are waited for.
func (s *Sniffer) late() (Protocol, error) {
	if s.HelloHold > 0 && beginsHello(s.Read.Bytes()) {
		return Undecided, ErrHelloTimeout
	}
	return Late(s.Read.Bytes()), nil
}

// answers returns the verdict, given what Up has sent. A greeting of HTTP/2 is not a response to a request of another
// protocol.
func (s *Sniffer) answers(protocol Protocol) Protocol {
	switch {
	case s.greeted.IsZero(), protocol == Undecided, protocol == HTTP2, protocol == TLS && s.HelloHold > 0:
		return protocol
	}
	return Opaque
}

// inHello reports whether undecided bytes of downstream are the beginning of a ClientHello that the caller may answer.
func (s *Sniffer) inHello() bool {
	return s.HelloHold > 0 && s.Read != nil && s.Read.Bytes()[0] == recordHandshake
}

// heldUntil returns until when the undecided bytes of downstream are held.
func (s *Sniffer) heldUntil() time.Time {
	if s.inHello() {
		return s.began.Add(max(s.HelloHold, s.Hold))
	}
	return s.began.Add(s.Hold)
}

// account counts the memory of bytes that are held during a wait. It is made by the first wait with many bytes.
type account struct{ *budget.Account }

// hold reports the memory. It returns false if the connection must end.
func (a *account) hold(s *Sniffer, w *tcp.Waiter) bool {
	n := 0
	for _, b := range [...]*tcp.Buffer{s.Read, s.UpRead} {
		if b != nil {
			b.Shrink()
			n += b.Cap()
		}
	}
	if a.Account == nil {
		if n <= 2*tcp.ShrunkSize {
			return true
		}
		a.Account = new(budget.Account)
		a.Open(s.Budget, w, s.Peer)
	}
	return a.Hold(n)
}

// close ends the account: the bytes are about to be forwarded or dropped.
func (a *account) close() {
	if a.Account != nil {
		a.Close()
	}
}

// greet reads from Up. It reports whether Up has sent something or ended, and sets greeted if the bytes may be an HTTP/2
// server's first ones. Records without data, under a tcp.Layer, are neither. greet does not read from a connection that
// the poller reports as ended. A reset that the poller has not reported yet is returned as an error: the kernel will not
// report it again.
func (s *Sniffer) greet() (spoke bool, err error) {
	if s.Up.Ended() {
		return true, nil
	}
	s.UpRead = tcp.TakeBuffer()
	n, err := s.UpRead.Fill(s.Up)
	if n > 0 {
		if http2.BeginsLikeServer(s.UpRead.Bytes()) {
			s.greeted = time.Now()
		}
		return true, nil
	}
	s.UpRead.Release()
	s.UpRead = nil
	switch err {
	case tcp.ErrAgain:
		return false, nil
	case io.EOF:
		return true, nil
	}
	return false, fmt.Errorf("%w: %w", errUpstream, err)
}

// Vague reports whether the first bytes of an opaque connection may still become a request.
func (s *Sniffer) Vague() bool { return s.Read != nil && s.classify() == Undecided }

func (s *Sniffer) classify() Protocol {
	if s.Wary {
		return classifyWarily(s.Read.Bytes())
	}
	return classify(s.Read.Bytes())
}

// Take returns what was read from Down, and prepares the Sniffer for another detection on the same connection, inside the
// TLS that these bytes begin. TLS inside it is not ended.
func (s *Sniffer) Take() *tcp.Buffer {
	read := s.Read
	s.Read, s.Hello, s.began, s.HelloHold = nil, flow.Hello{}, time.Time{}, 0
	if !s.greeted.IsZero() {
		s.greeted = time.Now() // the client could not begin during the handshake
	}
	return read
}

// Abandon releases everything that a failed detection holds, except Down: the caller ends it. When the agent drains, Up is
// closed in order; otherwise it is reset.
func (s *Sniffer) Abandon(err error) {
	s.Read.Release()
	s.UpRead.Release()
	switch {
	case s.Up == nil:
	case errors.Is(err, ErrDraining):
		s.Up.Close()
	default:
		s.Up.Reset()
	}
	s.Read, s.UpRead, s.Up = nil, nil, nil
}

// look reads from Down what is there, and classifies it. It holds a buffer only if bytes were read.
func (s *Sniffer) look() (Protocol, error) {
	if s.Read != nil { // bytes that a step before has read
		if protocol, err := s.decide(); protocol != Undecided || err != nil {
			return protocol, err
		}
	}
	for s.Down.Readable() {
		if s.Read == nil {
			s.Read = tcp.TakeBuffer()
		}
		_, err := s.Read.Fill(s.Down)
		if s.Read.Len() == 0 {
			s.Read.Release()
			s.Read = nil
		}
		switch {
		case err == tcp.ErrAgain:
			return Undecided, nil
		case err == io.EOF:
			s.Empty = s.Read == nil
			return Opaque, nil // no more bytes can decide; the relay passes the half-close on
		case err != nil:
			return Undecided, err
		}
		if protocol, err := s.decide(); protocol != Undecided || err != nil {
			return protocol, err
		}
	}
	return Undecided, nil
}

// decide is judge with the error of a ClientHello that is too large.
func (s *Sniffer) decide() (Protocol, error) {
	protocol := s.judge()
	if protocol == Opaque && s.HelloHold > 0 && exceedsHello(s.Read.Bytes()) {
		return Undecided, ErrHelloSize
	}
	return protocol, nil
}

// judge classifies what was read. It reads the clock only if the bytes do not decide.
func (s *Sniffer) judge() Protocol {
	protocol := s.classify()
	if protocol == Undecided && s.began.IsZero() {
		s.began = time.Now()
	}
	if protocol == TLS {
		s.Hello, _ = parseHello(s.Read.Bytes())
	}
	return protocol
}

// Reason maps an error of First or Both to the reason with which the connection ends.
func Reason(err error) flow.Reason {
	switch {
	case errors.Is(err, ErrDraining):
		return flow.Drained
	case errors.Is(err, ErrHelloTimeout):
		return flow.TLSTimeout
	case errors.Is(err, ErrHelloSize):
		return flow.TLSFailed
	case errors.Is(err, budget.ErrEvicted):
		return flow.MemoryBudget
	case errors.Is(err, tcp.ErrDeadline):
		return flow.IdleTimeout
	case errors.Is(err, tcp.ErrCanceled):
		return flow.DrainDeadline
	case errors.Is(err, errUpstream):
		return flow.UpstreamReset
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EMFILE), errors.Is(err, unix.ENOMEM):
		return flow.NoDescriptors // the wait failed, not the connection
	}
	return flow.DownstreamReset
}
