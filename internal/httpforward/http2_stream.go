package httpforward

import (
	"sync"
	"time"

	"github.com/pillion-proxy/pillion/internal/envoy"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/http2"
)

// stream is one request and its response. Streams are pooled together with their memory.
type stream struct {
	id       uint32
	settings *Settings // for this request: Note and Fields
	record   flow.Record
	names    []byte // backing memory of the slices in record

	request, response body

	begun  bool      // the head of the final response was sent downstream
	tunnel bool      // a successful response turns the stream into a tunnel
	head   bool      // the response to HEAD has no body
	sentAt time.Time // when the request was sent upstream

	reason flow.Reason // the reason with which the record closes
	err    error
}

// body is the state of a message body.
type body struct {
	declared int64 // content-length; -1 if not declared
	got      int64
	ended    bool
	messages grpcMessages // counted for gRPC requests
}

// take counts n bytes, and reports whether they stay within the declared length.
func (b *body) take(n int) bool {
	b.got += int64(n)
	return b.declared < 0 || b.got <= b.declared
}

// whole reports whether a body that ends now has the declared length.
func (b *body) whole() bool { return b.declared < 0 || b.got == b.declared }

var streamPool = sync.Pool{New: func() any { return new(stream) }}

func (m *multiplex) takeStream(id uint32) *stream {
	s := streamPool.Get().(*stream)
	s.id, s.settings = id, m.engine.settings.Load()
	r := &s.record
	r.Direction, r.Protocol = m.engine.config.Direction, flow.HTTP2
	r.Opened = m.requests
	r.Connection = m.Record
	r.Downstream, r.OriginalDestination = m.Record.Downstream, m.Record.OriginalDestination
	return s
}

// close closes the record, and returns the stream to the pool. A response whose last frames could not be written counts
// as not delivered.
func (s *stream) close(m *multiplex, undelivered error) {
	r := &s.record
	if undelivered != nil && s.reason == flow.Completed {
		s.reason, s.err = flow.DownstreamLeft, undelivered
		r.HTTP.Flags, r.HTTP.Details = envoy.FlagDownstreamConnectionTermination, envoy.DetailsDownstreamLeft
	}
	r.Received.Store(uint64(s.request.got))
	r.Sent.Store(uint64(s.response.got))
	r.HTTP.Messages, r.HTTP.ResponseMessages = s.request.messages.count, s.response.messages.count
	r.Close(m.engine.config.Flows, s.reason, s.err)
	clear(r.HTTP.Fields)
	clear(r.HTTP.ResponseFields)
	*s = stream{
		record: flow.Record{HTTP: flow.Request{Fields: r.HTTP.Fields[:0], ResponseFields: r.HTTP.ResponseFields[:0]}},
		names:  s.names[:0],
	}
	streamPool.Put(s)
}

// name copies text into memory of the stream.
func (s *stream) name(text string) []byte {
	start := len(s.names)
	s.names = append(s.names, text...)
	return s.names[start:len(s.names):len(s.names)]
}

// nameJoined copies the values of all fields with the first one's name as one list (RFC 9110 §5.3).
func (s *stream) nameJoined(fields []http2.Field) []byte {
	start := len(s.names)
	s.names = append(s.names, fields[0].Value...)
	for i := 1; i < len(fields); i++ {
		if fields[i].Name == fields[0].Name {
			s.names = append(append(s.names, ','), fields[i].Value...)
		}
	}
	return s.names[start:len(s.names):len(s.names)]
}

// nameFields appends the value of the first field of each name, or nil if there is no such field.
func (s *stream) nameFields(dst [][]byte, fields []http2.Field, names []string) [][]byte {
	for _, name := range names {
		var value []byte
		for i := range fields {
			if fields[i].Name == name {
				value = s.name(fields[i].Value)
				break
			}
		}
		dst = append(dst, value)
	}
	return dst
}

// streams is the table of a connection's open streams. All of them have the same upstream connection, under the same
// numbers.
type streams struct {
	open   map[uint32]*stream
	active int    // number of open streams
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
}

func (t *streams) remove(s *stream) {
	delete(t.open, s.id)
	t.active--
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
