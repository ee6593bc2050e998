package httpforward

import (
	"sync"
	"time"

	"github.com/pillion-proxy/pillion/internal/flow"
)

// stream is one request and its response. Streams are pooled together with their memory.
type stream struct {
	id       uint32
	settings *Settings // for this request: Note and Fields
	record   flow.Record
	http     flow.Request // record.HTTP
	names    names        // backing memory of the slices in record
	counted  int          // what of the stream is in multiplex.kept

	request, response body

	interim int // interim responses so far

	begun      bool       // the head of the final response was sent downstream
	withheld   bool       // the request was not forwarded: see lane.resetFollows
	tunnel     bool       // a successful response turns the stream into a tunnel
	head       bool       // the response to HEAD has no body
	introduced introduced // what the client has sent of itself
	sentAt     time.Time  // when the request was sent upstream

	reason flow.Reason // the reason with which the record closes
	err    error

	carriedStream

	call *call // of a hub; nil in a multiplex
}

var streamPool = sync.Pool{New: func() any { return new(stream) }}

// takeStream returns a stream with the record of a request that arrived on the connection at opened.
func takeStream(e *Engine, c *Connection, id uint32, opened time.Time) *stream {
	s := streamPool.Get().(*stream)
	connection := c.Record
	s.id, s.settings = id, e.current(c)
	r := &s.record
	r.HTTP = &s.http
	r.Direction, r.Protocol = e.config.Direction, flow.HTTP2
	r.Opened = opened
	r.Connection, s.http.Telemetry = connection, connection.HTTP.Telemetry
	r.Downstream, r.OriginalDestination = connection.Downstream, connection.OriginalDestination
	return s
}

// streams is the table of a connection's open streams. All of them have the same upstream connection, under the same
// numbers.
type streams struct {
	open   map[uint32]*stream
	active int    // number of open streams
	peak   int    // of active, since open was made
	last   uint32 // the highest stream ID opened

	// The last maxReset streams that were reset towards downstream, whose frames may still be in flight.
	reset []uint32
	next  int
}

// maxReset limits how many resets are remembered.
const maxReset = 256

func (t *streams) find(id uint32) *stream { return t.open[id] }

func (t *streams) add(s *stream) {
	if t.open == nil {
		t.open = make(map[uint32]*stream)
	}
	t.open[s.id] = s
	t.active++
	t.peak = max(t.peak, t.active)
}

func (t *streams) remove(s *stream) {
	delete(t.open, s.id)
	if t.active--; t.active == 0 && t.peak > keptEntries {
		t.open, t.peak = nil, 0 // a map does not shrink
	}
}

// noteReset records a reset towards downstream.
func (t *streams) noteReset(id uint32) {
	if len(t.reset) < maxReset {
		t.reset = append(t.reset, id)
		return
	}
	t.reset[t.next] = id
	t.next = (t.next + 1) % maxReset
}

// wasReset reports whether downstream may legitimately still send on a closed stream.
func (m *multiplex) wasReset(id uint32) bool {
	if id > m.lastServed {
		return true
	}
	for _, known := range m.streams.reset {
		if known == id {
			return true
		}
	}
	return false
}

// downWindow is downstream's flow-control credit. It is needed only for replies of our own: forwarded data is within
// the windows because its sender respects them.
type downWindow struct {
	connection int64
	stream     int64 // initial window of a stream
}

// finish closes a stream. Its record closes when all frames queued for downstream are written.
func (m *multiplex) finish(s *stream, reason flow.Reason, err error) {
	s.reason, s.err = reason, err
	s.endLease(reason)
	m.streams.remove(s)
	m.toDown.ended = append(m.toDown.ended, s)
	if m.toDown.idle() {
		m.toDown.closeEnded()
	}
}

// completed closes a stream once both its messages have ended.
func (m *multiplex) completed(s *stream) {
	if s.request.ended && s.response.ended {
		m.resets.earn(1)
		m.finish(s, flow.Completed, nil)
	}
}
