package httpforward

import (
	"errors"
	"io"
	"net/netip"
	"runtime"
	"time"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/http2"
	"github.com/pillion-proxy/pillion/internal/relay"
	"github.com/pillion-proxy/pillion/internal/tcp"
)

// multiplex is one HTTP/2 downstream connection and the upstream one that carries its streams under the same numbers.
//
// So nearly all frames go on as they are: flow control, pings and settings have their effect from end to end, and a slow
// reader holds back nobody but itself. Header blocks alone are decoded and encoded anew, as each connection has its own
// tables. What goes out on either lane is always whole frames: a DATA frame of which a part is here goes on as a smaller
// one. So a frame of our own may be put in anywhere.
type multiplex struct {
	engine *Engine
	w      *tcp.Waiter
	Connection

	up      *tcp.Conn // nil once it is lost
	upLocal netip.AddrPort

	toUp, toDown lane
	streams      streams
	window       downWindow

	opened   time.Time
	requests time.Time // when the requests that are read now were there
	clock    time.Time // the same moment or a little later; zero: not asked

	routed Request // what the router sees; here so that it is not allocated

	resets budget // of streams that came to nothing by downstream's doing

	lost     *reply // upstream is gone, and this is the answer to requests; nil: it is there
	lostErr  error
	answered bool // a request was given that answer

	goneAway uint32 // the last stream that downstream was told is served; http2.MaxStream: no end was told
	leaving  leaving
	leaveAt  time.Time // when the last stream is told

	downEnded bool      // downstream has closed its half
	lastMove  time.Time // when something moved last, or the watch began; kept only while there is a limit
	lostAt    time.Time
	waiting   []waiting // requests that wait for the head of a response, oldest first; only if that is limited

	from string // downstream's address, as x-forwarded-for has it; empty: not asked yet

	over parting
}

// parting is how a multiplex ends.
type parting uint8

const (
	goesOn parting = iota
	parts          // in order: what is written arrives
	isCut          // by a reset of both sides
	isGone         // all is closed by now
)

// ServeHTTP2 serves the HTTP/2 requests of a connection until it ends. c.Read begins with the client's preface.
func (e *Engine) ServeHTTP2(w *tcp.Waiter, c Connection) {
	c.Router = c.router()
	m := &multiplex{
		engine: e, w: w, Connection: c, up: c.Early,
		goneAway: http2.MaxStream,
		opened:   time.Now(),
	}
	m.requests = m.opened
	m.resets = newBudget(resetBurst, resetRate, resetBurst, m.requests)
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

// connect finds the upstream connection.
func (m *multiplex) connect() {
	if m.up == nil {
		up, err := m.engine.config.Dialer.Dial(m.w, m.Target)
		if errors.Is(err, tcp.ErrCanceled) {
			m.over = isCut
			return
		}
		if err != nil {
			m.unreachable(err)
			return
		}
		m.up = up
	}
	m.upLocal = m.up.LocalAddr()
	m.toUp.dst, m.toDown.src = m.up, m.up
}

// begin passes the preface on, and deals with what was read behind it.
func (m *multiplex) begin() {
	l := &m.toUp
	if m.over != goesOn {
		return
	}
	if b := l.in.Bytes(); len(b) < len(http2.Preface) || string(b[:len(http2.Preface)]) != http2.Preface {
		m.fail(l, http2.ConnectionError(http2.ProtocolError, "no preface"))
		return
	}
	l.out.Append(l.in.Bytes()[:len(http2.Preface)])
	l.parsed = len(http2.Preface)
	l.parse()
	if m.toDown.in != nil && m.over == goesOn {
		m.toDown.parse()
	}
	m.clock = time.Time{}
}

// run moves frames and waits, in turn. Upstream is heard first: if it has ended, no more requests are read for it.
func (m *multiplex) run() {
	for m.over == goesOn {
		down, up := m.toDown.pump(), m.toUp.pump()
		m.judge()
		if up || down {
			m.clock, m.lastMove = time.Time{}, time.Time{}
			if m.toUp.long || m.toDown.long {
				runtime.Gosched() // others wait
			}
			continue
		}
		if m.over != goesOn {
			return
		}
		deadline, limit := m.deadline()
		err := m.w.Wait(deadline, m.Down, m.up)
		m.clock = time.Time{}
		switch {
		case err == nil:
		case errors.Is(err, tcp.ErrDeadline):
			m.late(limit)
		case errors.Is(err, tcp.ErrCanceled):
			m.closeAll(flow.DrainDeadline, nil)
			m.over = isCut
		default:
			m.closeAll(flow.NoDescriptors, err)
			m.over = isCut
		}
	}
}

// now is the time, asked once for what is done in one go.
func (m *multiplex) now() time.Time {
	if m.clock.IsZero() {
		m.clock = time.Now()
	}
	return m.clock
}

// judge looks at what has become of the two connections.
func (m *multiplex) judge() {
	if m.over != goesOn {
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
		m.over = parts
	case m.toDown.srcErr != nil && m.toDown.idle():
		m.upstreamGone(m.toDown.srcErr)
	default:
		m.drain()
	}
}

// downstreamGone ends everything: nobody waits for an answer any more. Upstream learns it at once.
func (m *multiplex) downstreamGone(err error) {
	m.toDown.dstErr = err
	if m.up != nil && m.streams.active == 0 {
		m.up.Close()
		m.loseUpstream()
	}
	m.closeAll(flow.DownstreamLeft, err)
	m.over = isCut
}

// downstreamEnded passes the end of downstream's half on. Responses may still come. What we ourselves have to tell
// upstream from here on is dropped: that it cannot be written is no failure of upstream's.
func (m *multiplex) downstreamEnded() {
	m.downEnded = true
	if m.up == nil || m.streams.active == 0 {
		m.over = parts
		return
	}
	_ = m.up.CloseWrite() // fails if upstream is gone, which is noticed elsewhere
	m.toUp.dst = nil
}

// upstreamGone ends the connection from the far side.
func (m *multiplex) upstreamGone(err error) {
	if m.downEnded && m.streams.active == 0 {
		m.over = parts
		return
	}
	if m.downEnded { // upstream takes that for the end of everything, as most do
		m.closeAll(flow.DownstreamLeft, nil)
		m.over = parts
		return
	}
	m.upstreamLost(&replyUpstreamClosed, flow.ResponseIncomplete, err)
}

// end closes both connections, and gives everything back.
func (m *multiplex) end() {
	if m.over == parts {
		m.part()
	}
	if !m.toDown.idle() && m.toDown.dstErr == nil {
		m.toDown.dstErr = errUndelivered
	}
	m.toDown.settle()
	switch {
	case m.over == isGone:
	case m.over == isCut:
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
}

// part delivers what is written, says that nothing more comes, and reads until downstream closes as well.
func (m *multiplex) part() {
	deadline := time.Now().Add(lingerTime)
	for !m.toDown.flush() {
		if m.toDown.dstErr != nil || m.w.Wait(deadline, m.Down, nil) != nil {
			return
		}
	}
	if !m.downEnded {
		readOut(m.w, m.Down, deadline)
	}
}

// opaque goes on as a relay, when upstream does not speak HTTP/2: what it says reaches downstream byte for byte, as it
// would without us. Requests that were seen have come to nothing.
func (m *multiplex) opaque() {
	m.over = isGone
	m.closeAll(flow.BadResponse, errNotHTTP2)
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
	record.Cluster, record.Peer = m.Record.Cluster, m.Record.Peer
	record.Continue(m.Record)                            // sinks have counted the connection
	received, sent := &m.Record.Received, &m.Record.Sent // the counters of the open connection in the table
	received.Store(m.toUp.written)
	end, err := relay.Run(m.w, m.Down, m.up, relay.Options{
		IdleTimeout:      config.IdleTimeout,
		HalfCloseTimeout: config.HalfCloseTimeout,
		FromDown:         received,
		FromUp:           sent,
		DownRead:         down,
		UpRead:           up,
	})
	record.Received.Store(received.Load())
	record.Sent.Store(sent.Load())
	record.Close(config.Flows, flow.Reason(end), err)
}

var (
	errNotHTTP2    = errors.New("upstream does not speak HTTP/2")
	errUndelivered = errors.New("the connection ended before the response was written")
)
