// Package sniff decides from the first bytes of a connection which protocol it speaks: HTTP/1, HTTP/2, TLS, or something
// that stays opaque.
//
// The bytes are read into a buffer that goes on with the connection; none is lost. Nothing waits long: a downstream that
// says nothing does not keep the upstream from being dialled, and a beginning that could still become anything is held
// for a bounded time. No list of ports is needed, and no timer decides that something is HTTP.
package sniff

import (
	"errors"
	"io"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/tcp"
)

// Sniffer looks at what downstream says first. Its fields are set before the first call; the zero times are those that
// mean what they say, nothing.
type Sniffer struct {
	Down *tcp.Conn
	Hold time.Duration // how long a beginning that is not decided is held, from its first byte

	// Read is what was read from Down, nil when nothing was. It is the caller's once sniffing is over.
	Read *tcp.Buffer

	Hello flow.Hello // of a TLS connection

	began time.Time // when the first byte was there; not asked for what is decided at once
}

// First waits up to delay for downstream to speak, and then until what it says is decided. The protocol is Undecided when
// it said nothing: then it is time to dial the upstream, and to look at both sides. The errors are those of reading from
// Down and of waiting.
func (s *Sniffer) First(w *tcp.Waiter, delay time.Duration) (Protocol, error) {
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
			silence = time.Now().Add(delay)
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

// Both waits until downstream has said something that is decided, or upstream speaks or closes first: then the
// connection is opaque. Nothing is read from up, which was dialled and not read since: the kernel is not asked whether
// something came, as it tells of a reset only once, and that is for the relay to hear. It waits as long as it takes, or
// until nothing has happened for idle when that is more than zero; the error is tcp.ErrDeadline then.
func (s *Sniffer) Both(w *tcp.Waiter, up *tcp.Conn, idle time.Duration) (Protocol, error) {
	for {
		if up.Readable() {
			return Opaque, nil
		}
		protocol, err := s.look()
		if protocol != Undecided || err != nil {
			return protocol, err
		}
		var deadline time.Time
		if s.Read != nil {
			deadline = s.began.Add(s.Hold)
		} else if idle > 0 {
			deadline = time.Now().Add(idle)
		}
		err = w.Wait(deadline, s.Down, up)
		if errors.Is(err, tcp.ErrDeadline) && s.Read != nil {
			return Opaque, nil
		}
		if err != nil {
			return Undecided, err
		}
	}
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
	case errors.Is(err, tcp.ErrDeadline):
		return flow.IdleTimeout
	case errors.Is(err, tcp.ErrCanceled):
		return flow.DrainDeadline
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EMFILE), errors.Is(err, unix.ENOMEM):
		return flow.NoDescriptors // the wait failed, not the connection
	}
	return flow.DownstreamReset
}
