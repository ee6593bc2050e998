package httpforward

import (
	"bytes"
	"errors"
	"time"

	"github.com/pillion-proxy/pillion/internal/http1"
	"github.com/pillion-proxy/pillion/internal/tcp"
	"github.com/pillion-proxy/pillion/internal/upstream"
)

// session is one HTTP/1 downstream connection with its upstream. Between two requests it holds no buffer.
type session struct {
	engine *Engine
	w      *tcp.Waiter
	*Connection

	up      *tcp.Conn    // kept between requests; nil if there is no connection
	other   *otherTarget // of up, if elsewhere; the memory is kept
	lastUse time.Time    // of up; zero before its first response
	idleEnd time.Time    // when a downstream without a request is closed; zero: never, or not waiting for one yet

	used     bool // the server may close up at any time: it has served a request or has been idle
	bound    bool // up is authenticated for this downstream (NTLM, Negotiate) and must not serve others
	orphaned bool // the server has closed up, and downstream has stayed open
	ended    bool // downstream has half-closed
	retiring bool // idleEnd is that of a retired connection
	evicted  bool // for want of memory

	connected bool // there was an upstream connection, or an attempt
	elsewhere bool // a router has sent the last request to another target than Connection.Target
}

// otherTarget is a target that a router chose. Sessions without one need no memory for it.
type otherTarget struct {
	upstream.Target
	use upstream.Use // of the connection to it
}

// target returns the target of up, or if there is none, of the last one.
func (s *session) target() *upstream.Target {
	if s.elsewhere {
		return &s.other.Target
	}
	return &s.Target
}

// setTarget sets the target of up. A target that a router chose is kept in memory of its own, because few sessions have
// one.
func (s *session) setTarget(target *upstream.Target) {
	s.connected, s.elsewhere = true, target != &s.Target && *target != s.Target
	if !s.elsewhere {
		return
	}
	if s.other == nil {
		s.other = new(otherTarget)
	}
	s.other.Target = *target
}

// ending is how a connection continues after a request.
type ending uint8

const (
	next   ending = iota // another request
	shut                 // close after flushing
	linger               // close after flushing and discarding input that is still in flight
	gone                 // a tunnel has closed both connections
	cut                  // reset, because the response is incomplete
)

// newSession begins a session in memory of its own. It is not inlined, because its frame must be gone while the connection
// is idle: see Serve.
//
//go:noinline
func newSession(e *Engine, w *tcp.Waiter, c *Connection) *session {
	return &session{engine: e, w: w, Connection: c, up: c.Early, used: c.Early != nil, connected: c.Early != nil}
}

// serveHTTP1 serves the HTTP/1 requests of a connection until it ends.
func (e *Engine) serveHTTP1(w *tcp.Waiter, c *Connection) {
	s := newSession(e, w, c)
	how := next
	for how == next && s.awaitRequest() {
		x := takeExchange(s)
		how = x.run()
		x.release()
	}
	s.end(how)
}

// awaitRequest returns true when the first bytes of a request have arrived, and false when no request will follow.
//
// Upstream may close meanwhile, as servers do after some idle time or some number of requests. A request sent before that
// is served on another upstream connection. Without such a request, outlives decides whether downstream stays open.
func (s *session) awaitRequest() bool {
	s.idleEnd, s.retiring = time.Time{}, false
	for {
		if s.Read != nil && begun(s.Read.Bytes()) {
			return true
		}
		if s.Read != nil && s.Read.Len() == 0 {
			s.releaseRead()
		} else if s.Read != nil {
			s.Read.Shrink() // empty lines; the wait may be long
		}
		if s.ended || s.w.Canceled() {
			return false
		}
		if s.Down.Readable() {
			if s.Read == nil {
				s.Read = tcp.TakeBuffer()
			}
			n, err := s.Read.Fill(s.Down)
			if n > 0 {
				continue
			}
			if s.Read.Len() == 0 {
				s.releaseRead()
			}
			if err != tcp.ErrAgain {
				return false
			}
		}
		if s.up != nil && s.up.Readable() && !s.up.Quiet() {
			s.closeUpstream()
			if s.orphaned = !s.elsewhere; s.orphaned && !s.outlives() {
				return false
			}
		}
		if s.up != nil && !s.bound && s.up.Retired() {
			s.closeUpstream()
		}
		if s.engine.state.Load() == draining {
			return false
		}
		if err := s.w.Wait(s.nextCheck(), s.Down, s.up); err != nil && !s.outlastsWait(err) {
			return false
		}
	}
}

const (
	// listenCheck is how often a downstream connection without an upstream one checks that the workload still listens.
	listenCheck = 5 * time.Second

	// inFlight is how soon after a response the client may have sent its next request without having seen that its
	// connection ends.
	inFlight = 100 * time.Millisecond
)

// nextCheck returns the end of the idle time, or the time at which outlives decides again; zero if there is neither. It is
// not inlined, so that the frame of awaitRequest stays small: see Serve.
//
//go:noinline
func (s *session) nextCheck() time.Time {
	if s.retiring != s.retired() {
		s.retiring, s.idleEnd = !s.retiring, time.Time{}
	}
	if s.idleEnd.IsZero() {
		s.idleEnd = after(s.engine.current(s.Connection).betweenRequests())
		if s.retiring {
			s.idleEnd = time.Now().Add(drainGrace)
		}
	}
	if !s.orphaned || s.retiring {
		return s.idleEnd
	}
	check := time.Now().Add(listenCheck)
	if s.target().Balanced {
		check = s.lastUse.Add(inFlight)
	}
	if !s.idleEnd.IsZero() && s.idleEnd.Before(check) {
		return s.idleEnd
	}
	return check
}

// outlastsWait reports whether downstream stays open after a wait that ended with an error: nextCheck's time had come, and
// outlives decides again. It is not inlined, as nextCheck is not.
//
//go:noinline
func (s *session) outlastsWait(err error) bool {
	return s.orphaned && errors.Is(err, tcp.ErrDeadline) && (s.idleEnd.IsZero() || time.Now().Before(s.idleEnd)) && s.outlives()
}

// outlives reports whether downstream stays open although its upstream connection is gone. The next request gets a new
// one. A connection that is authenticated for this downstream cannot be replaced.
//
// With a balanced target, the two end together, except that a request that may be on its way is still served. A client
// whose connection ends looks up the name again and connects to a server that is there, and the agent must not keep it
// from that.
//
// Inbound, the target is the workload. While that listens, the next connection will serve as well as the last one did. When
// it listens no more, the client turns to another pod only if its connection ends.
//
// It is not inlined, as nextCheck is not.
//
//go:noinline
func (s *session) outlives() bool {
	switch {
	case s.bound:
		return false
	case s.target().Balanced:
		return time.Since(s.lastUse) < inFlight
	}
	return tcp.Listens(s.target().Address)
}

// outlivesReply reports whether downstream stays open after a reply in place of upstream. The reply drops the upstream
// connection. The client of a balanced target has read the end of it with the reply, and opens a new connection.
func (s *session) outlivesReply() bool {
	if s.up == nil && !s.connected || s.elsewhere {
		return true // there was no upstream connection yet, or the next request may have another target
	}
	s.orphaned = !s.target().Balanced && s.outlives()
	return s.orphaned
}

// begun reports whether b holds the beginning of a request, or what cannot become one. Empty lines do not count: old
// clients send one after a body (RFC 9112 §2.2) and may send no other request. They stay in the buffer, so that the parser
// limits them, however they arrive.
func begun(b []byte) bool {
	lines := bytes.TrimSuffix(b, []byte{'\r'})
	for bytes.HasPrefix(lines, []byte("\r\n")) {
		lines = lines[2:]
	}
	return len(lines) > 0 || len(b) > 2*http1.MaxEmptyLines
}

// after returns the time at which a limit that starts now expires; the zero time if there is no limit.
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

// end returns upstream to the pool, and closes or resets downstream.
func (s *session) end(how ending) {
	if s.up != nil {
		s.giveUpstream()
	}
	if how == gone {
		return
	}
	unread := s.Read != nil || how == shut && s.Down.Readable() // input after the last request
	if s.Read != nil {
		s.releaseRead()
	}
	if s.evicted {
		s.engine.Detain(s.w, s.Down)
	}
	switch {
	case how == cut:
		s.Down.Reset()
	case s.evicted:
	case how == linger, how == shut && unread:
		readOut(s.w, s.Down, time.Now().Add(lingerTime))
	}
	s.Down.Close()
}

// giveUpstream returns upstream to the pool under the target it is connected to. A connection that is authenticated for
// this downstream, that has not served a request, or whose target is balanced, is closed instead.
func (s *session) giveUpstream() {
	if s.bound || s.lastUse.IsZero() || s.target().Balanced {
		s.up.Close()
	} else {
		var use upstream.Use
		if s.elsewhere {
			use = s.other.use
		}
		s.engine.config.Pool.GiveUsed(*s.target(), s.up, use)
	}
	s.up = nil
}

// turnTo prepares for a request to target. A connection to another target goes back to the pool, and bound is cleared
// because the next connection is not authenticated. It must run before appendRequestHead reads the request's own
// authentication fields.
func (s *session) turnTo(target *upstream.Target) {
	if s.up != nil && *s.target() != *target {
		s.giveUpstream()
		s.bound = false
	}
}

// closeUpstream closes an upstream connection that cannot be used again.
func (s *session) closeUpstream() {
	s.up.Close()
	s.up = nil
}

// dropUpstream resets upstream, because its state is unknown.
func (s *session) dropUpstream() {
	if s.up != nil {
		s.up.Reset()
		s.up = nil
	}
}

// connect finds an upstream connection to wanted, the decided target: that of the last request, one from the pool, or a new
// one. A pooled connection may be closed by its server at this moment, so it is only used for repeatable requests. A
// non-repeatable request on a stale pooled connection would fail where a direct connection would not. Where a router has
// chosen another target, the alternative is not a direct connection, and a new one to each of the targets would cost a
// handshake for each request; a server that closes at this moment has accepted no byte of the request, which is sent again.
// attempts is the number of dials, or 1 for a connection that was open.
func (s *session) connect(wanted *upstream.Target, settings *Settings, now time.Time, limit time.Duration, repeatable bool) (attempts int, err error) {
	if s.up != nil && (s.up.Readable() || !repeatable || now.Sub(s.lastUse) > upstream.Pause) && !s.up.Quiet() {
		s.closeUpstream()
	}
	if s.up != nil && s.elsewhere && wanted.Over(&s.other.use, now) {
		s.closeUpstream()
	}
	if s.up != nil {
		return 1, nil
	}
	s.orphaned = false
	if !wanted.Balanced && (repeatable || *wanted != s.Target) {
		var use upstream.Use
		if s.up, use = s.engine.config.Pool.TakeUsed(wanted, repeatable); s.up != nil {
			s.used, s.lastUse = true, now
			s.setTarget(wanted)
			s.begin(use)
			return 1, nil
		}
	}
	return s.dial(wanted, settings, limit)
}

// dial opens a new upstream connection within a limit, which is zero if there is none but that of the settings.
//
// It and connect are the deepest calls of most connections, and their frames decide whether a stack grows to 8 KiB: see Engine.Serve.
func (s *session) dial(wanted *upstream.Target, settings *Settings, limit time.Duration) (attempts int, err error) {
	s.setTarget(wanted)
	dialer := s.engine.dialer(s.Connection, settings)
	dialer.Within = limit
	up, attempts, err := dialer.Dial(s.w, *s.target())
	if err != nil {
		return attempts, err
	}
	if wanted.HTTP2 {
		carryOverHTTP2(up, settings.ofServers())
	}
	s.up, s.used, s.lastUse = up, false, time.Time{}
	var use upstream.Use
	if wanted.Security != nil && wanted.Security.Life > 0 {
		use.Opened = time.Now().UnixNano()
	}
	s.begin(use)
	return attempts, nil
}

// begin sets what up has been used for before.
func (s *session) begin(use upstream.Use) {
	if s.elsewhere {
		s.other.use = use
	}
}
