package httpforward

import (
	"errors"

	"github.com/pillion-proxy/pillion/internal/budget"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/http2"
	"github.com/pillion-proxy/pillion/internal/tcp"
)

// The memory of an HTTP/2 connection. Its streams may hold a share of the process's budget (defaultKept bytes without a
// budget). Beyond that, new streams are refused, and records keep a mark in place of further values. Before a wait, all
// memory of the connection is reported to the budget, except for the memory that every connection needs.

const (
	streamSize   = 1280 // about the size of a stream, with its places in tables
	defaultKept  = 8 << 20
	keptShare    = 4        // 1/keptShare of the budget is for the streams of one connection
	fewNames     = 1 << 10  // what records keep of a stream once its connection holds too much
	ordinaryHeld = 32 << 10 // of streams, not reported
	heldStep     = 64 << 10 // what streams hold is reported in such steps, because it changes all the time

	tableFactor = 4   // memory of a header table, relative to its size by RFC 7541 §4.1
	keptEntries = 256 // of tables of streams: larger ones are freed with the last stream
)

// goneReason returns why requests end with their downstream.
func goneReason(err error) flow.Reason {
	if errors.Is(err, budget.ErrEvicted) {
		return flow.MemoryBudget
	}
	return flow.DownstreamLeft
}

// keptLimit returns how much the streams of one connection may hold.
func (e *Engine) keptLimit() int {
	if e.config.Budget == nil {
		return defaultKept
	}
	return e.config.Budget.Limit() / keptShare
}

// keep counts what a stream holds.
func (m *multiplex) keep(s *stream) {
	n := streamSize + s.names.size + s.asked.size()
	m.kept += n - s.counted
	s.counted = n
}

// holdsTooMuch reports whether the streams of the connection have reached their limit.
func (m *multiplex) holdsTooMuch() bool { return m.kept > m.keptLimit }

// squeeze lets the record of s keep little more if the connection holds too much.
func (m *multiplex) squeeze(s *stream) {
	if m.holdsTooMuch() {
		s.names.limit = s.names.used + fewNames
	}
}

// closeStream closes the record of a stream that has left the table.
func (m *multiplex) closeStream(s *stream, undelivered error) {
	m.kept -= s.counted
	s.close(m.engine.config.Flows, undelivered)
}

// outOfMemory refuses a stream because the connection holds too much. The client may send the request again.
func (m *multiplex) outOfMemory(s *stream) error {
	return m.reject(s, http2.RefusedStream, flow.MemoryBudget, errHoldsTooMuch)
}

var errHoldsTooMuch = http2.ConnectionError(http2.EnhanceYourCalm, "the streams of the connection hold too much memory")

// hold reports what the connection holds. It returns false if the connection must end.
func (m *multiplex) hold() bool {
	steps := 0
	if m.kept > ordinaryHeld {
		steps = (m.kept + heldStep - 1) / heldStep
	}
	if steps > m.steps || steps <= m.steps/2 {
		m.steps = steps
	}
	return m.account.Hold(m.steps*heldStep + m.toUp.held() + m.toDown.held())
}

// held returns how much memory the lane holds, except for one buffer of the ordinary size while its output waits.
func (l *lane) held() int {
	n := piece(cap(l.scratch)) + piece(cap(l.block.fragments)) + piece(l.tableHeld)
	for _, b := range l.outgrown {
		n += cap(b)
	}
	switch {
	case l.in == nil:
	case l.idle():
		l.in.Shrink() // it waits for the rest of a frame, perhaps for long
		n += piece(l.in.Cap())
	default:
		n += max(l.in.Cap()-tcp.BufferSize, 0) // it may have been shrunk when the lane was idle
	}
	return n
}

// evicted ends the connection because the process has no memory for it.
func (m *multiplex) evicted() {
	m.w.Continue()
	m.detained = true
	m.terminate(http2.EnhanceYourCalm, "out of memory", flow.MemoryBudget, budget.ErrEvicted)
	m.toUp.release()
	m.toDown.block.free() // its output is still to be sent
	m.account.Hold(0)
	if !m.toDown.flush() { // downstream does not read
		m.over = isReset
	}
}
