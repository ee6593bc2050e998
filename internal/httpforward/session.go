package httpforward

import (
	"bytes"
	"net/netip"
	"time"

	"github.com/pillion-proxy/pillion/internal/tcp"
	"github.com/pillion-proxy/pillion/internal/upstream"
)

// idleCheck is how long an upstream connection must have been idle to be asked, before it is used, whether it was closed.
// A shorter pause leaves that to the poller, and spares a system call of each request of a busy connection.
const idleCheck = 20 * time.Millisecond

// session is one HTTP/1 downstream connection and what is upstream of it. Between two requests it holds no buffer.
type session struct {
	engine *Engine
	w      *tcp.Waiter
	Connection

	up      *tcp.Conn // kept from one request to the next; nil: none
	upLocal netip.AddrPort
	target  upstream.Target // of up
	used    bool            // up may be closed by its server at any time: it has served before, or has lain idle
	lastUse time.Time       // of up; zero: it has served no request
	bound   bool            // up is authenticated for this downstream (NTLM, Negotiate) and must not serve another

	decision Decision // for the current request

	ended bool // downstream has closed its half
}

// ending is what comes after a request.
type ending uint8

const (
	next   ending = iota // another request
	shut                 // close in order
	linger               // close in order, after reading what is still on its way
	gone                 // nothing: it was a tunnel, which has closed both connections
	cut                  // reset: the response is not complete
)

// ServeHTTP1 serves the HTTP/1 requests of a connection until it ends.
func (e *Engine) ServeHTTP1(w *tcp.Waiter, c Connection) {
	c.Router = c.router()
	s := session{engine: e, w: w, Connection: c, up: c.Early, used: c.Early != nil}
	if s.up != nil {
		s.upLocal, s.target = s.up.LocalAddr(), c.Target
	}
	how := next
	for how == next && s.awaitRequest() {
		x := takeExchange(&s)
		how = x.run()
		x.release()
	}
	s.end(how)
}

// awaitRequest returns true when there are bytes of a request, and false when none comes any more.
//
// When upstream closes meanwhile, downstream is closed, too, as it would have seen without us. A request that was sent
// before that is served: it gets another upstream.
func (s *session) awaitRequest() bool {
	for {
		if s.Read != nil && begun(s.Read.Bytes()) {
			return true
		}
		s.releaseRead()
		if s.ended || s.w.Canceled() {
			return false
		}
		if s.Down.Readable() {
			s.Read = tcp.TakeBuffer()
			n, err := s.Read.Fill(s.Down)
			if n > 0 {
				continue
			}
			s.releaseRead()
			if err != tcp.ErrAgain {
				return false
			}
		}
		if s.up != nil && s.up.Readable() && !s.up.Quiet() {
			s.closeUpstream()
			return false
		}
		if s.engine.state.Load() == draining {
			return false
		}
		if s.w.Wait(after(s.engine.config.IdleTimeout), s.Down, s.up) != nil {
			return false
		}
	}
}

// begun reports whether there is something of a request. Empty lines are nothing: old clients send one behind a body
// (RFC 9112 §2.2), and may be done then.
func begun(b []byte) bool { return len(bytes.TrimLeft(b, "\r\n")) > 0 }

// after is the time at which a limit that begins now ends; zero for none.
func after(limit time.Duration) time.Time {
	if limit <= 0 {
		return time.Time{}
	}
	return time.Now().Add(limit)
}

func (s *session) releaseRead() {
	s.Read.Release()
	s.Read = nil
}

// end gives upstream to whoever has the next request for it, and closes downstream, in order unless it is to be cut.
func (s *session) end(how ending) {
	if s.up != nil {
		s.giveUpstream()
	}
	if how == gone {
		return
	}
	unread := s.Read != nil || how == shut && s.Down.Readable() // what downstream sent behind its last request
	if s.Read != nil {
		s.releaseRead()
	}
	switch {
	case how == cut:
		s.Down.Reset()
	case how == linger, how == shut && unread:
		readOut(s.w, s.Down, time.Now().Add(lingerTime))
	}
	s.Down.Close()
}

// giveUpstream gives upstream to the pool, under the target it is connected to. A connection that belongs to this
// downstream, or that has not served a request, is closed.
func (s *session) giveUpstream() {
	if s.bound || s.lastUse.IsZero() {
		s.up.Close()
	} else {
		s.engine.config.Pool.Give(s.target, s.up)
	}
	s.up = nil
}

// route takes the decision for the next request. A connection to another target than the decided one is given back, and
// with it goes the authentication that it may carry: the next connection has none. It must run before the next request's
// own fields are read for such an authentication.
func (s *session) route(decision Decision) {
	if s.up != nil && s.target != decision.Target {
		s.giveUpstream()
		s.bound = false
	}
	s.decision = decision
}

// closeUpstream closes upstream in order: it is of no use to anybody.
func (s *session) closeUpstream() {
	s.up.Close()
	s.up = nil
}

// dropUpstream resets upstream, whose state is not known any more.
func (s *session) dropUpstream() {
	if s.up != nil {
		s.up.Reset()
		s.up = nil
	}
}

// connect finds an upstream connection to the decided target: the one of the last request, one from the pool, or a fresh one. What comes from
// the pool may be closed by its server at this moment, so it is for requests that can be sent again. Others would be lost
// where they would not be without us: their downstream does not know that the connection is an old one.
func (s *session) connect(now time.Time, repeatable bool) error {
	if s.up != nil && (s.up.Readable() || now.Sub(s.lastUse) > idleCheck) && !s.up.Quiet() {
		s.closeUpstream()
	}
	if s.up != nil {
		return nil
	}
	if repeatable {
		s.up = s.engine.config.Pool.Take(s.decision.Target)
	}
	if s.up != nil {
		s.used, s.lastUse = true, now
		s.upLocal, s.target = s.up.LocalAddr(), s.decision.Target
		return nil
	}
	return s.dial()
}

// dial makes a fresh upstream connection.
func (s *session) dial() error {
	up, err := s.engine.config.Dialer.Dial(s.w, s.decision.Target)
	if err != nil {
		return err
	}
	s.up, s.used, s.lastUse, s.upLocal = up, false, time.Time{}, up.LocalAddr()
	s.target = s.decision.Target
	return nil
}
