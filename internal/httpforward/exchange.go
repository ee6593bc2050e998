package httpforward

import (
	"bytes"
	"sync"
	"time"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/http1"
)

// exchange is one request and its response. Exchanges are pooled, with the memory that they need.
type exchange struct {
	s      *session
	record flow.Record
	names  []byte // what the slices in record point into

	requestHead, responseHead http1.Head
	request, response         message

	started        bool // the head of the request is good, and built
	grpc           bool
	options        http1.Options // what the request says of its connection
	upgrade        bool          // the request asks for another protocol, and upstream was told so
	answered       bool          // the head of the final response is built
	upgraded       bool          // and it switches protocols
	closing        bool          // downstream was told that the connection closes, or knows it
	upstreamCloses bool
	sentAt         time.Time
	failure        error // why the request is malformed
}

var exchanges = sync.Pool{New: func() any { return new(exchange) }}

func takeExchange(s *session) *exchange {
	x := exchanges.Get().(*exchange)
	x.s = s
	x.record.Direction = s.engine.config.Direction
	x.record.Protocol = flow.HTTP11
	x.record.Downstream = s.Downstream
	x.record.OriginalDestination = s.OriginalDestination
	return x
}

// release gives the exchange back. What downstream sent after its request stays with the session.
func (x *exchange) release() {
	s := x.s
	x.request.out.Reset()
	if s.Read != nil {
		x.request.sent()
	}
	if s.Read != nil && s.Read.Len() == 0 {
		s.releaseRead()
	}
	if x.response.in != nil {
		x.response.in.Release()
	}
	x.request.release()
	x.response.release()
	x.requestHead.Reset()
	x.responseHead.Reset()
	clear(x.names)
	*x = exchange{
		names:       x.names[:0],
		requestHead: x.requestHead, responseHead: x.responseHead,
		request: x.request, response: x.response,
	}
	exchanges.Put(x)
}

func (e *Engine) limits() http1.Limits {
	return http1.Limits{Head: e.config.MaxHeadBytes, Fields: e.config.MaxHeadFields}
}

// note copies what the record tells of the request.
func (x *exchange) note(b []byte) {
	h, to := &x.requestHead, &x.record.HTTP
	if h.Minor == 0 {
		x.record.Protocol = flow.HTTP10
	}
	host, id := h.Find(http1.Host), h.Find(http1.XRequestID)
	need := int(h.Method.End-h.Method.Start) + int(h.Target.End-h.Target.Start) + uuidLength
	for _, i := range [...]int{host, id} {
		if i >= 0 {
			need += int(h.Fields[i].Value.End - h.Fields[i].Value.Start)
		}
	}
	if cap(x.names) < need {
		x.names = make([]byte, 0, need)
	}
	to.Method = x.copyName(h.Method.In(b))
	to.Path = x.copyName(h.Target.In(b))
	if host >= 0 {
		to.Authority = x.copyName(h.Fields[host].Value.In(b))
	}
	if i := h.Find(http1.ContentType); i >= 0 {
		x.grpc = bytes.HasPrefix(h.Fields[i].Value.In(b), []byte("application/grpc"))
	}
	if id >= 0 {
		to.ID = x.copyName(h.Fields[id].Value.In(b))
	}
}

// copyName appends to names, which has room.
func (x *exchange) copyName(p []byte) []byte {
	start := len(x.names)
	x.names = append(x.names, p...)
	return x.names[start:]
}

// count brings the record's counters up to date, while the exchange is under way.
func (x *exchange) count() {
	x.record.Received.Store(uint64(x.request.body.Bytes()))
	x.record.Sent.Store(uint64(x.response.body.Bytes()))
}

// close ends the exchange and closes its record. Unless the connection goes on in order, upstream is dropped.
func (x *exchange) close(reason flow.Reason, err error, end ending) ending {
	if end == cut || reason != flow.Completed {
		x.s.dropUpstream()
	}
	x.record.Close(x.s.engine.config.Flows, reason, err)
	return end
}
