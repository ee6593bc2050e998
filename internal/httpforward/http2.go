package httpforward

import (
	"errors"
	"io"
	"net/netip"
	"time"

	"github.com/pillion-proxy/pillion/internal/budget"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/http2"
	"github.com/pillion-proxy/pillion/internal/relay"
	"github.com/pillion-proxy/pillion/internal/tcp"
	"github.com/pillion-proxy/pillion/internal/upstream"
)

// multiplex is one HTTP/2 downstream connection and the upstream connection that carries its streams under the same
// numbers.
//
// Most frames are therefore forwarded unchanged: flow control, pings and settings work end to end, and a slow reader
// only delays its own streams. Only header blocks are re-encoded, because each connection has its own HPACK tables.
// Only whole frames are written (a partial DATA frame is split), so our own frames can be inserted anywhere.
type multiplex struct {
	engine   *Engine
	settings *Settings // for this connection
	w        *tcp.Waiter
	heads

	up      *tcp.Conn // nil after it was closed
	upLocal netip.AddrPort

	toUp, toDown lane
	streams      streams
	window       downWindow

	times
	lostUpstream
	drainState

	checkAt time.Time // when limits of routes are checked next; zero: there are none

	suspended *undecided // a request that waits for an answer; may be nil

	attempts uint8  // of the dial, until the first request is recorded with them
	resets   bucket // for streams that downstream resets or that break the protocol

	downEnded bool      // downstream has half-closed
	detained  bool      // it was evicted
	flooded   bool      // downstream has exceeded a bound on the number of frames: see floods
	waiting   []waiting // requests waiting for a response head, oldest first; only with a RequestTimeout

	holding
	over outcome
}

// holding is what a connection holds; see http2_held.go.
type holding struct {
	account   budget.Account
	steps     int // of heldStep, reported for kept
	kept      int // by streams
	keptLimit int
}

// times are the points in time that a multiplex keeps.
type times struct {
	opened   time.Time
	requests time.Time // when the requests read last arrived
	clock    time.Time // cached time of this round; zero: read the clock
	lastMove time.Time // when bytes moved last, or the watch began; kept only while an idle limit applies
}

// lostUpstream describes an upstream that is gone.
type lostUpstream struct {
	lost     *reply // the reply to requests; nil while upstream is there
	lostErr  error
	lostAt   time.Time
	answered bool // a request got that reply
}

// drainState is the state of the connection's own end: which streams are still served.
type drainState struct {
	drainRequested bool   // this connection is to end; the engine's drain requests it of every connection
	lastServed     uint32 // last stream ID announced in GOAWAY; http2.MaxStream before the first one
	drainPhase     drainPhase
	finalGoAwayAt  time.Time
}

// outcome is how a multiplex ends.
type outcome uint8

const (
	running       outcome = iota
	closesInOrder         // close after flushing
	isReset               // reset both sides
	isClosed              // both sides are already closed
)

// serveHTTP2 serves the HTTP/2 requests of a connection until it ends. c.Read begins with the client's preface.
func (e *Engine) serveHTTP2(w *tcp.Waiter, c *Connection) {
	m := &multiplex{engine: e, settings: e.current(c), w: w, heads: heads{Connection: *c}, up: c.Early}
	m.account.Open(e.config.Budget, w, c.Record.Remote())
	m.keptLimit = e.keptLimit()
	m.opened, m.lastServed = time.Now(), http2.MaxStream
	m.requests = m.opened
	m.resets = newResetBucket(m.requests)
	m.window = downWindow{connection: http2.FirstWindow, stream: http2.FirstWindow}
	m.toUp.init(m, &m.toDown)
	m.toDown.init(m, &m.toUp)
	m.toUp.src, m.toDown.dst = c.Down, c.Down
	m.toUp.in, m.toDown.in = c.Read, c.EarlyRead
	m.connect()
	m.begin()
	m.run()
	m.end()
}

// connect opens the upstream connection, unless it was opened early.
func (m *multiplex) connect() {
	if m.up == nil {
		dialer := m.engine.dialer(&m.Connection, m.settings)
		up, attempts, err := dialer.Dial(m.w, m.Target)
		m.attempts = uint8(attempts)
		if errors.Is(err, tcp.ErrCanceled) {
			m.over = isReset
			return
		}
		if err != nil {
			m.unreachable(err)
			return
		}
		m.up = up
	}
	m.upLocal, m.Record.Security = m.up.LocalAddr(), m.security(m.up)
	m.toUp.dst, m.toDown.src = m.up, m.up
}

// begin forwards the preface, and parses the frames read after it.
func (m *multiplex) begin() {
	l := &m.toUp
	if m.over != running {
		return
	}
	if b := l.in.Bytes(); len(b) < len(http2.Preface) || string(b[:len(http2.Preface)]) != http2.Preface {
		m.fail(l, http2.ConnectionError(http2.ProtocolError, "no preface"))
		return
	}
	l.out.Append(l.in.Bytes()[:len(http2.Preface)])
	l.parsed = len(http2.Preface)
	l.parse()
	if m.toDown.in != nil && m.over == running {
		m.toDown.parse()
	}
	m.clock = time.Time{}
}

// run alternates between forwarding frames and waiting. It reads upstream first, so that no more requests are read once
// upstream has ended.
func (m *multiplex) run() {
	for m.over == running {
		m.awaitResets()
		down, up := m.toDown.pump(), m.toUp.pump()
		m.judge()
		yields := m.toUp.turnOver() || m.toDown.turnOver()
		switch {
		case m.over != running:
			return
		case (yields || !up && !down) && !m.hold():
			m.evicted()
			return
		case (up || down) && !m.w.Stopped(): // otherwise Wait reports why
			m.clock, m.lastMove = time.Time{}, time.Time{}
			if len(m.waiting) > 0 { // a connection that never rests gets to no deadline below
				m.requestsTimedOut()
			}
			if !m.checkAt.IsZero() {
				m.enforceLimits()
			}
			if yields {
				m.w.Yield(m.Down)
				m.newTurn()
			}
			continue
		}
		m.newTurn()
		deadline, limit := m.deadline()
		err := m.w.Wait(deadline, m.Down, m.up)
		m.clock = time.Time{}
		switch {
		case err == nil:
		case errors.Is(err, tcp.ErrDeadline):
			m.timedOut(limit)
		case errors.Is(err, tcp.ErrCanceled):
			m.closeAll(flow.DrainDeadline, nil)
			m.over = isReset
		case errors.Is(err, tcp.ErrInterrupted):
			m.evicted()
		default:
			m.closeAll(flow.NoDescriptors, err)
			m.over = isReset
		}
	}
}

// awaitResets pauses before requests are read from a downstream that has reset many without completing as many, so that the
// resets of the next ones arrive with them: see lane.resetFollows.
func (m *multiplex) awaitResets() {
	if m.resets.left > resetBurst-manyResets || !m.toUp.mayRead() {
		return
	}
	end := time.Now().Add(m.engine.config.resetPause)
	err := m.w.Wait(end, nil, nil)
	for err == nil {
		err = m.w.Wait(end, nil, nil)
	}
	if errors.Is(err, tcp.ErrInterrupted) {
		m.w.Interrupt() // the next wait reports it
	}
	m.clock = time.Time{}
}

// newTurn begins a turn of both lanes.
func (m *multiplex) newTurn() { m.toUp.left, m.toDown.left = laneTurn, laneTurn }

// now returns the time, read once per round.
func (m *multiplex) now() time.Time {
	if m.clock.IsZero() {
		m.clock = time.Now()
	}
	return m.clock
}

// judge acts on the state of the two connections.
func (m *multiplex) judge() {
	if m.over != running {
		return
	}
	if m.toDown.dstErr == nil {
		m.toDown.dstErr = m.Down.Failed()
	}
	switch {
	case m.toDown.dstErr != nil:
		m.downstreamGone(m.toDown.dstErr)
	case m.toUp.srcErr != nil && m.toUp.srcErr != io.EOF:
		m.downstreamGone(m.toUp.srcErr)
	case m.toUp.srcErr == io.EOF && !m.downEnded && m.toUp.out.Len() == 0:
		m.downstreamEnded()
	case m.lost != nil:
		m.finishLost()
	case m.downEnded && m.streams.active == 0 && m.toDown.idle():
		m.over = closesInOrder
	case m.toDown.srcErr != nil && m.toDown.idle():
		m.upstreamGone(m.toDown.srcErr)
	default:
		m.drain()
	}
}

// downstreamGone ends both connections at once, because no response can be delivered.
func (m *multiplex) downstreamGone(err error) {
	m.toDown.dstErr = err
	if m.up != nil && m.streams.active == 0 {
		m.up.Close()
		m.detachUpstream()
	}
	m.closeAll(goneReason(err), err)
	m.over = isReset
}

// downstreamEnded forwards downstream's half-close. Responses may still arrive. Frames of our own for upstream are
// dropped from here on, so that failing to write them does not count as a failure of upstream.
func (m *multiplex) downstreamEnded() {
	m.downEnded = true
	if m.up == nil || m.streams.active == 0 {
		m.over = closesInOrder
		return
	}
	_ = m.up.CloseWrite() // fails if upstream is gone; judge notices that
	m.toUp.dst = nil
}

// upstreamGone ends the connection after upstream has closed or failed.
func (m *multiplex) upstreamGone(err error) {
	if m.downEnded && m.streams.active == 0 {
		m.over = closesInOrder
		return
	}
	looped := m.up.Looped()
	switch {
	case looped && m.Returned != nil: // see exchange.refuse
		m.closeAll(flow.Loop, upstream.ErrLoop)
		m.over = isReset
		return
	case !looped && m.downEnded && err == io.EOF: // most servers treat the half-close as the end of the connection
		m.closeAll(flow.DownstreamLeft, nil)
		m.over = closesInOrder
		return
	}
	r, err := closedReply(m.up, err)
	m.upstreamLost(r, flow.ResponseIncomplete, err)
}

// end closes both connections, and releases all memory.
func (m *multiplex) end() {
	m.giveUp()
	if m.over == closesInOrder {
		m.closeInOrder()
	}
	if !m.toDown.idle() && m.toDown.dstErr == nil {
		m.toDown.dstErr = errUndelivered
	}
	m.toDown.closeEnded()
	switch {
	case m.over == isClosed:
	case m.over == isReset:
		m.Down.Reset()
		if m.up != nil {
			m.up.Reset()
		}
	default:
		m.Down.Close()
		if m.up != nil {
			m.up.Close()
		}
	}
	m.toUp.release()
	m.toDown.release()
	m.account.Close()
}

// closeInOrder flushes the output, shuts down our half, and waits until downstream closes. Its input is discarded, unless
// the connection ends because there was too much of it.
func (m *multiplex) closeInOrder() {
	m.toUp.release()
	deadline := time.Now().Add(lingerTime)
	for !m.toDown.flush() {
		if m.toDown.dstErr != nil || m.w.Wait(deadline, m.Down, nil) != nil {
			return
		}
	}
	m.toDown.release()
	m.account.Hold(0)
	switch {
	case m.downEnded:
	case m.detained:
		m.engine.Detain(m.w, m.Down)
	case m.flooded:
		awaitEnd(m.w, m.Down, deadline)
	default:
		readOut(m.w, m.Down, deadline)
	}
}

// relayOpaque continues as a relay if upstream does not speak HTTP/2: its bytes reach downstream unchanged, as on a
// direct connection. The requests forwarded so far have failed.
func (m *multiplex) relayOpaque() {
	m.over = isClosed
	m.closeAll(flow.BadResponse, errNotHTTP2)
	m.account.Close() // a relay holds little
	down := tcp.TakeBuffer()
	down.Append(m.toUp.out.AppendTo(nil))
	if in := m.toUp.in; in != nil {
		down.Append(in.Bytes()[m.toUp.parsed:])
	}
	up := m.toDown.in
	m.toDown.in = nil
	config := &m.engine.config
	record := flow.Open(config.Direction, m.Record.Downstream)
	record.Opened = m.opened
	record.OriginalDestination = m.Record.OriginalDestination
	record.Upstream, record.UpstreamLocal = m.Target.Address, m.upLocal
	record.Cluster, record.Security, record.HTTP = m.Record.Cluster, m.Record.Security, m.Record.HTTP
	record.Continue(m.Record)                            // sinks have counted the connection
	received, sent := &m.Record.Received, &m.Record.Sent // the counters of the open connection in the table
	received.Store(m.toUp.written)
	end, err := relay.Run(m.w, m.Down, m.up, relay.Options{
		IdleTimeout:      m.settings.IdleTimeout,
		HalfCloseTimeout: m.settings.HalfCloseTimeout,
		FromDown:         received,
		FromUp:           sent,
		DownRead:         down,
		UpRead:           up,
	})
	record.Received.Store(received.Load())
	record.Sent.Store(sent.Load())
	record.Close(config.Flows, flow.Reason(end), err)
}

// floods are the errors of peers that send too many frames. A peer with another error may be well-behaved.
var floods = [...]error{errManyIdle, errManySettings, errManyContinuations, errManyResets, errManyBadRequests}

var (
	errManyIdle          = http2.ConnectionError(http2.EnhanceYourCalm, "flood of frames that carry nothing")
	errManySettings      = http2.ConnectionError(http2.EnhanceYourCalm, "too many SETTINGS frames")
	errManyContinuations = http2.ConnectionError(http2.EnhanceYourCalm, "too many CONTINUATION frames")
	errManyResets        = http2.ConnectionError(http2.EnhanceYourCalm, "streams are reset too fast")
	errManyBadRequests   = http2.ConnectionError(http2.EnhanceYourCalm, "too many bad requests")

	errNotHTTP2    = errors.New("upstream does not speak HTTP/2")
	errUndelivered = errors.New("the connection ended before the response was written")
)
