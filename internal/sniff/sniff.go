// Package sniff decides from the first bytes of a connection which protocol it speaks: HTTP/1, HTTP/2, TLS, or something
// that stays opaque.
//
// The bytes are read into a buffer that goes on with the connection; none is lost. Nothing waits long: a downstream that
// says nothing does not keep the upstream from being dialled, and a beginning that could still become anything is held
// for a bounded time. No list of ports is needed, and no timer decides that something is HTTP.
package sniff

import (
	"errors"
	"fmt"
	"io"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/http2"
	"github.com/pillion-proxy/pillion/internal/tcp"
)

// Sniffer looks at what downstream says first. The fields down to Draining are set before the first call.
type Sniffer struct {
	Down     *tcp.Conn
	Delay    time.Duration // how long Down may say nothing before the upstream is dialled; zero: no time
	Hold     time.Duration // how long a beginning that is not decided is held, from its first byte; zero: no time
	Idle     time.Duration // how long both sides may say nothing; zero or less: for ever
	Draining func() bool   // ends the wait for a connection on which nobody has spoken; nil: never

	// Read is what was read from Down, nil when nothing was, and Up the upstream connection, nil as long as none was
	// dialled, with what was read from it in UpRead. They are the caller's once sniffing is over.
	Read   *tcp.Buffer
	Up     *tcp.Conn
	UpRead *tcp.Buffer

	Hello flow.Hello // of a TLS connection

	began time.Time // when the first byte was there; not asked for what is decided at once
}

var errUpstream = errors.New("upstream was lost before anybody had spoken")

// ErrDraining ends the wait for a connection on which nobody has spoken, when the agent drains.
var ErrDraining = errors.New("nobody had spoken when the agent drained")

// Detect decides what the connection speaks, and dials the upstream unless that is HTTP, whose engine finds its own. A
// connection that is not looked into is opaque. When it fails it gives back what it holds, but for Down, and says what
// the failure means for the flow.
func (s *Sniffer) Detect(w *tcp.Waiter, look bool, dial func() (*tcp.Conn, flow.Reason, error)) (Protocol, flow.Reason, error) {
	protocol, err := Opaque, error(nil)
	if look {
		protocol, err = s.First(w)
	}
	reason := flow.Reason("")
	if err == nil && protocol != HTTP1 && protocol != HTTP2 {
		s.Up, reason, err = dial()
	}
	if err == nil && protocol == Undecided {
		protocol, err = s.Both(w)
	}
	if err == nil {
		return protocol, "", nil
	}
	if reason == "" {
		reason = Reason(err)
	}
	s.Read.Release()
	s.UpRead.Release()
	switch {
	case s.Up == nil:
	case err == ErrDraining:
		s.Up.Close()
	default:
		s.Up.Reset()
	}
	return Undecided, reason, err
}

// First waits up to Delay for downstream to speak, and then until what it says is decided. The protocol is Undecided when
// it said nothing: then it is time to dial the upstream, and to look at both sides. The errors are those of reading from
// Down and of waiting.
func (s *Sniffer) First(w *tcp.Waiter) (Protocol, error) {
	var silence time.Time // ends it
	for {
		protocol, err := s.look()
		if protocol != Undecided || err != nil {
			return protocol, err
		}
		deadline := silence
		if s.Read != nil {
			deadline = s.began.Add(s.Hold)
		} else if silence.IsZero() {
			silence = time.Now().Add(s.Delay)
			deadline = silence
		}
		switch err := w.Wait(deadline, s.Down, nil); {
		case err == nil:
		case errors.Is(err, tcp.ErrDeadline) && s.Read == nil:
			return Undecided, nil
		case errors.Is(err, tcp.ErrDeadline):
			return Opaque, nil
		default:
			return Undecided, err
		}
	}
}

// Both waits until downstream has said something that is decided, or Up speaks or closes first: then the connection is
// opaque. The kernel is not asked whether something came from Up, as it tells of a reset only once, and that is for the
// relay to hear. It waits as long as it takes, but for Idle, whose error is tcp.ErrDeadline, and for ErrDraining.
//
// A server of HTTP/2 may speak before a client that is slow. What looks like it is held, as long as an undecided
// beginning is, until the client has said whether it is one: no client of HTTP/2 waits for the server (RFC 9113 §3.4).
func (s *Sniffer) Both(w *tcp.Waiter) (Protocol, error) {
	var greeted time.Time // when Up said what such a server says; zero: it has said nothing
	for {
		switch {
		case !greeted.IsZero() && s.Up.Ended():
			return Opaque, nil // it serves nobody any more, and what it said is to arrive now
		case greeted.IsZero() && s.Up.Readable():
			held, err := s.greeted()
			if err != nil {
				return Undecided, err
			}
			if !held {
				return Opaque, nil
			}
			greeted = time.Now()
		}
		protocol, err := s.look()
		if err == nil && protocol != Undecided && protocol != HTTP2 && !greeted.IsZero() {
			return Opaque, nil // what Up has said is no answer to that
		}
		if protocol != Undecided || err != nil {
			return protocol, err
		}
		var deadline time.Time
		switch {
		case !greeted.IsZero():
			deadline = greeted.Add(s.Hold)
		case s.Read != nil:
			deadline = s.began.Add(s.Hold)
		case s.Draining != nil && s.Draining():
			return Undecided, ErrDraining
		case s.Idle > 0:
			deadline = time.Now().Add(s.Idle)
		}
		err = w.Wait(deadline, s.Down, s.Up)
		if errors.Is(err, tcp.ErrDeadline) && (s.Read != nil || !greeted.IsZero()) {
			return Opaque, nil
		}
		if err != nil {
			return Undecided, err
		}
	}
}

// greeted reads from Up, and reports whether it may be a server of HTTP/2 that has spoken. One that has ended is not read
// from, as far as the poller knows. A reset that it does not know yet is the error: nobody will hear of it again.
func (s *Sniffer) greeted() (bool, error) {
	if s.Up.Ended() {
		return false, nil
	}
	s.UpRead = tcp.TakeBuffer()
	n, err := s.UpRead.Fill(s.Up)
	if n > 0 {
		return http2.BeginsLikeServer(s.UpRead.Bytes()), nil
	}
	s.UpRead.Release()
	s.UpRead = nil
	if err == tcp.ErrAgain || err == io.EOF {
		return false, nil
	}
	return false, fmt.Errorf("%w: %w", errUpstream, err)
}

// look reads what there is and judges it. Without bytes no buffer is held.
func (s *Sniffer) look() (Protocol, error) {
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
			return Opaque, nil // whatever came, no more comes; and a half-close is the relay's to pass on
		case err != nil:
			return Undecided, err
		}
		if protocol := s.judge(); protocol != Undecided {
			return protocol, nil
		}
	}
	return Undecided, nil
}

func (s *Sniffer) judge() Protocol {
	protocol := Classify(s.Read.Bytes())
	if protocol == Undecided && s.began.IsZero() {
		s.began = time.Now()
	}
	if protocol == TLS {
		s.Hello, _ = parseHello(s.Read.Bytes())
	}
	return protocol
}

// Reason names what an error of First or Both means for the flow.
func Reason(err error) flow.Reason {
	switch {
	case errors.Is(err, ErrDraining):
		return flow.Drained
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
