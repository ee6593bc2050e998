package httpforward

import (
	"errors"
	"io"
	"sync/atomic"
	"time"

	"github.com/pillion-proxy/pillion/internal/budget"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/http2"
	"github.com/pillion-proxy/pillion/internal/tcp"
)

// hub is one HTTP/2 downstream connection whose streams are carried by upstream connections of their own choice. Stream
// numbers, windows and settings belong to each connection.
//
// Data that its receiver does not take waits in its stream, at most streamWindow bytes in each direction: the sender gets
// credit back as data is passed on, so a slow receiver holds back only its stream. The credit of the whole connection is
// given back when data arrives. The number of streams bounds what they hold, and the budget of the process does.
//
// One goroutine owns the hub and its connections. Dials have goroutines of their own, because they wait.
type hub struct {
	engine   *Engine
	settings *Settings // for this connection
	w        *tcp.Waiter
	heads

	down    leg
	ups     []*leg
	dials   map[*dialing]struct{} // in progress
	streams streams

	times
	drainState

	translated translation // of responses over HTTP/1

	asking   []*call     // wait for the answer to a question about them; some may have ended
	answered atomic.Bool // there is an answer to one of the questions

	checkAt time.Time // when limits and pauses of streams are checked next; zero: no check is due
	resets  bucket    // for streams that downstream resets or that break the protocol

	downEnded bool // downstream has half-closed
	detained  bool // it was evicted
	flooded   bool // downstream has exceeded a bound on the number of frames: see floods
	closed    bool // closeAll has begun: no call is opened, or moved to another connection
	buffered  int  // bytes of bodies that wait or are kept
	reported  int  // what the streams held at the last report to the account

	holding
	over outcome
}

const (
	streamWindow     = http2.FirstWindow // that peers have on a stream
	connectionWindow = 1 << 20           // that peers have on a connection
	maxLegs          = 64                // upstream connections of a hub, except those that place explains
	firstLimit       = 100               // streams on an upstream connection before it has announced a limit
	fewStreams       = 100
	legSize          = 4 << 10     // about the size of a leg, with its tables
	ordinaryLegs     = 8           // not reported
	maxUnreported    = 1 << 18     // what many responses may add to what streams hold before that is reported
	legIdle          = time.Minute // after that an upstream connection without a stream is closed
)

// maxStreams returns how many streams may be open at once: so many that their windows fit the connection's share of the
// budget, but not fewer than clients expect (RFC 9113 §6.5.2).
func (h *hub) maxStreams() int { return min(max(h.keptLimit/streamWindow, fewStreams), maxStreams) }

// serveHub serves the HTTP/2 requests of a connection until it ends. c.Read begins with the client's preface.
func (e *Engine) serveHub(w *tcp.Waiter, c *Connection) {
	h := &hub{engine: e, settings: e.current(c), w: w, heads: heads{Connection: *c}, dials: make(map[*dialing]struct{})}
	h.account.Open(e.config.Budget, w, c.Record.Remote())
	h.keptLimit = e.keptLimit()
	h.opened, h.lastServed = time.Now(), http2.MaxStream
	h.requests = h.opened
	h.resets = newResetBucket(h.requests)
	h.down.init(h, c.Down)
	h.down.in = c.Read
	if c.Early != nil {
		l := h.newLeg(c.Target)
		l.in = c.EarlyRead
		h.connected(l, c.Early)
	}
	h.begin()
	h.run()
	h.end()
}

// begin sends our settings, and handles the frames behind the preface.
func (h *hub) begin() {
	l := &h.down
	if b := l.in.Bytes(); len(b) < len(http2.Preface) || string(b[:len(http2.Preface)]) != http2.Preface {
		h.fail(http2.ConnectionError(http2.ProtocolError, "no preface"))
		return
	}
	l.in.Discard(len(http2.Preface))
	l.greet()
	l.pending = true
}

// run alternates between moving frames and waiting.
func (h *hub) run() {
	for h.over == running {
		moved, yields := h.pump()
		switch {
		case h.over != running:
			return
		case (yields || !moved) && !h.hold():
			h.evicted()
			return
		case moved && !h.w.Stopped(): // otherwise Wait reports why
			h.clock, h.lastMove = time.Time{}, time.Time{}
			h.check()
			if yields {
				h.w.Yield(h.Down)
				h.newTurn()
			}
			continue
		}
		h.newTurn()
		h.wait()
	}
}

// pump moves what can be moved.
func (h *hub) pump() (moved, yields bool) {
	was := h.down.written
	h.resumeAnswered()
	moved = h.down.pump()
	for _, l := range h.ups {
		if l.rests() {
			continue
		}
		moved = l.pump() || moved
		yields = yields || l.left <= 0
		if h.kept+h.buffered > h.reported+maxUnreported && !h.hold() {
			h.evicted()
			return moved, yields
		}
	}
	yields = yields || h.down.left <= 0
	moved = h.reap() || moved
	h.down.flush()
	h.judge()
	return moved || h.down.written != was, yields
}

func (h *hub) newTurn() {
	h.down.left = laneTurn
	for _, l := range h.ups {
		l.left = laneTurn
	}
}

// wait waits for an event of a connection, or for a deadline.
func (h *hub) wait() {
	for _, l := range h.ups {
		if l.conn == nil {
			continue
		}
		missed, err := h.w.Adopt(l.conn)
		if err != nil {
			l.lose(err)
		}
		if missed || err != nil {
			h.clock = time.Time{}
			return
		}
	}
	deadline, limit := h.deadline()
	err := h.w.Wait(deadline, h.Down, nil)
	h.clock = time.Time{}
	switch {
	case err == nil:
	case errors.Is(err, tcp.ErrDeadline):
		h.timedOut(limit)
	case errors.Is(err, tcp.ErrCanceled):
		h.closeAll(flow.DrainDeadline, nil)
		h.over = isReset
	case errors.Is(err, tcp.ErrInterrupted):
		if h.account.Evicted() {
			h.evicted()
		} // otherwise a dial has ended
	default:
		h.closeAll(flow.NoDescriptors, err)
		h.over = isReset
	}
}

// now returns the time, read once per round.
func (h *hub) now() time.Time {
	if h.clock.IsZero() {
		h.clock = time.Now()
	}
	return h.clock
}

// watch makes sure that limits are checked at a time.
func (h *hub) watch(at time.Time) {
	if h.checkAt.IsZero() || at.Before(h.checkAt) {
		h.checkAt = at
	}
}

// judge acts on the state of the downstream connection.
func (h *hub) judge() {
	if h.over != running {
		return
	}
	l := &h.down
	if l.writeErr == nil {
		l.writeErr = h.Down.Failed()
	}
	switch {
	case l.writeErr != nil:
		h.downstreamGone(l.writeErr)
	case l.readErr != nil && l.readErr != io.EOF:
		h.downstreamGone(l.readErr)
	case l.readErr == io.EOF && h.streams.active == 0 && l.idle():
		h.over = closesInOrder
	case l.readErr == io.EOF:
		h.downEnded = true
	default:
		h.drain()
	}
}

// downstreamGone ends the connection at once, because no response can be delivered.
func (h *hub) downstreamGone(err error) {
	h.down.writeErr = err
	h.closeAll(goneReason(err), err)
	h.over = isReset
}

// end closes all connections, and releases all memory.
func (h *hub) end() {
	h.endDials()
	if h.over == closesInOrder {
		h.closeInOrder()
	}
	l := &h.down
	if !l.idle() && l.writeErr == nil {
		l.writeErr = errUndelivered
	}
	l.closeEnded()
	if h.over == isReset {
		h.Down.Reset()
	} else {
		h.Down.Close()
	}
	for _, up := range h.ups {
		up.close()
	}
	l.release()
	h.account.Close()
}

// endDials ends the dials that are in progress. They wait no longer, so this takes no time.
func (h *hub) endDials() {
	for d := range h.dials {
		d.w.Interrupt()
	}
	for d := range h.dials {
		<-d.done
		if d.conn != nil {
			d.conn.Close()
		}
	}
	if !h.account.Evicted() {
		h.w.Continue() // takes back the interrupts of the dials
	}
}

// closeInOrder flushes the output, shuts down our half, and waits until downstream closes.
func (h *hub) closeInOrder() {
	for _, up := range h.ups {
		up.close()
	}
	h.ups = nil
	deadline := time.Now().Add(lingerTime)
	l := &h.down
	l.freeInput()
	for !l.flush() {
		if l.writeErr != nil {
			return
		}
		if err := h.w.Wait(deadline, h.Down, nil); err != nil && !errors.Is(err, tcp.ErrInterrupted) {
			return
		}
	}
	h.account.Hold(0)
	switch {
	case h.downEnded:
	case h.detained:
		h.engine.Detain(h.w, h.Down)
	case h.flooded:
		awaitEnd(h.w, h.Down, deadline)
	default:
		readOut(h.w, h.Down, deadline)
	}
}

// hold reports what the connection holds. It returns false if the connection must end.
func (h *hub) hold() bool {
	h.reported = h.kept + h.buffered
	kept := h.reported + legSize*max(len(h.ups)-ordinaryLegs, 0)
	steps := 0
	if kept > ordinaryHeld {
		steps = (kept + heldStep - 1) / heldStep
	}
	if steps > h.steps || steps <= h.steps/2 {
		h.steps = steps
	}
	n := h.down.held()
	for _, l := range h.ups {
		n += l.held()
	}
	return h.account.Hold(h.steps*heldStep + n)
}

// evicted ends the connection because the process has no memory for it.
func (h *hub) evicted() {
	h.w.Continue()
	h.detained = true
	h.terminate(http2.EnhanceYourCalm, "out of memory", flow.MemoryBudget, budget.ErrEvicted)
	for _, up := range h.ups {
		up.close()
	}
	h.ups = nil
	h.down.freeInput()
	h.account.Hold(0)
	if !h.down.flush() { // downstream does not read
		h.over = isReset
	}
}
