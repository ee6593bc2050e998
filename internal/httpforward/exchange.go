package httpforward

import (
	"bytes"
	"sync"
	"sync/atomic"
	"time"

	"github.com/pillion-proxy/pillion/internal/budget"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/http1"
	"github.com/pillion-proxy/pillion/internal/tracing"
	"github.com/pillion-proxy/pillion/internal/upstream"
)

// exchange is one request and its response. Exchanges are pooled together with their memory.
type exchange struct {
	s        *session
	settings *Settings // for this request
	record   flow.Record
	http     flow.Request     // record.HTTP
	names    names            // backing memory of the slices in record
	held     budget.Account   // what the exchange holds while it waits
	routed   Request          // the router's argument; a field, so that it is not allocated
	fields   headFields       // of routed
	wanted   *upstream.Target // where the request goes: that of the connection, or of decision
	decision Decision         // of the router
	previous Decision         // of the attempt before
	check    Check            // of the last decision that needed an answer; nil: none did
	body     *Collected       // until the request is decided about; nil: its body was not needed
	gone     error            // why downstream is gone, or the exchange over, before the request was decided about
	entered  []byte           // the head of the request as the edge has prepared it; valid with arrived
	kept     []byte           // a copy of the request head, if a retry or an edit of the response may need it, and Decision.Path
	edited   *edited          // of a plan that changes heads; nil: not used yet

	carried

	requestHead, responseHead http1.Head
	request, response         message

	progress
}

// progress is the state of an exchange.
type progress struct {
	arrived        int           // bytes of the request's head, if the edge has written another; 0: it has not
	started        bool          // the request head is valid and the upstream head is built
	options        http1.Options // connection options of the request
	absolute       bool          // the target of the request is in absolute form
	upgrade        bool          // the request asks for another protocol, and the upstream head repeats that
	answered       bool          // the head of the final response is built
	introduced     introduced    // what the client has sent of itself
	upgraded       bool          // the final response switches protocols
	closing        bool          // the response announces the close, or downstream expects it
	upstreamCloses bool
	repeated       bool // the request was sent a second time
	copying        bool // copies of the request are sent when it has arrived
	redialled      bool // since the last round of reads and writes
	interims       int  // interim responses so far
	sentAt         time.Time
	allSent        time.Time // when the last byte of the request was sent; kept only while RequestTimeout applies
	failure        error     // why the request is malformed
	late           *reply    // to a request whose body has not been collected in time; nil: it has
}

var exchanges = sync.Pool{New: func() any { return new(exchange) }}

func takeExchange(s *session) *exchange {
	x := exchanges.Get().(*exchange)
	x.s, x.settings = s, s.engine.current(s.Connection)
	x.held.Open(s.engine.config.Budget, s.w, s.Record.Remote())
	x.record.HTTP = &x.http
	x.record.Direction = s.engine.config.Direction
	x.record.Protocol = flow.HTTP11
	x.record.Connection = s.Record
	x.record.Downstream = s.Record.Downstream
	x.record.OriginalDestination = s.Record.OriginalDestination
	x.http.Telemetry = s.Record.HTTP.Telemetry
	return x
}

// release returns the exchange to the pool. Bytes that downstream sent after its request stay with the session.
func (x *exchange) release() {
	s := x.s
	x.request.out.Reset()
	if s.Read != nil {
		x.request.discardSent()
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
	x.shed()
	x.names.clear()
	x.held.Close()
	tracing.Release(x.http.Trace)
	clear(x.http.Fields)
	clear(x.http.ResponseFields)
	// Reset field by field: a composite literal of an exchange would be built on the stack first and double the stack.
	// It then stays large while the connection is idle.
	fields, responseFields := x.http.Fields[:0], x.http.ResponseFields[:0]
	x.record = flow.Record{}
	x.http = flow.Request{}
	x.http.Fields, x.http.ResponseFields = fields, responseFields
	x.routed = Request{}
	x.fields = headFields{}
	if x.edited != nil {
		x.releaseEdited()
	}
	if x.kept = x.kept[:0]; cap(x.kept) > smallPiece {
		x.kept = nil
	}
	if s.Router != nil {
		x.decision = Decision{} // each on its own: a tuple would be built on the stack first
		x.previous = Decision{}
		x.carried = carried{}
	}
	if cap(x.entered) > smallPiece {
		x.entered = nil
	}
	x.wanted = nil
	x.check, x.body, x.gone = nil, nil, nil
	x.s, x.settings = nil, nil
	x.progress = progress{}
	exchanges.Put(x)
}

// recordRequest copies the recorded parts of the request head.
func (x *exchange) recordRequest(b []byte) {
	h, to := &x.requestHead, &x.http
	x.record.Cluster, x.record.Route, x.record.Security = x.s.Record.Cluster, x.s.Record.Route, x.s.Record.Security
	x.record.Workload.Set(x.s.Record.Workload.Get())
	if x.s.Peers.readsRequests() {
		x.introduced = x.s.meet(&x.record, h, b)
	}
	x.recordLine(b)
	x.recordAuthority(b)
	to.ID = x.copyField(h, b, http1.XRequestID)
	to.UserAgent = x.copyField(h, b, http1.UserAgent)
	to.ForwardedFor = x.copyJoined(h, b, http1.XForwardedFor)
	to.Fields = x.copyFields(to.Fields, h, b, x.settings.noted(false))
	if x.settings.Note.Heads {
		to.Head = bytes.Clone(b[:h.Length])
	}
	to.Body = x.settings.Note.Bodies.Begin()
	x.request.tape = to.Body
}

// recordPart copies what is known of a request whose head was malformed, late or not sent to its end. recordRequest has
// recorded every other one.
func (x *exchange) recordPart() {
	h, s := &x.requestHead, x.s
	if x.http.Method != nil || h.Method.Empty() || s.Read == nil {
		return
	}
	x.recordLine(s.Read.Bytes())
	x.recordAuthority(s.Read.Bytes())
}

// recordAuthority copies the host that the request is for.
func (x *exchange) recordAuthority(b []byte) {
	if authority := x.requestHead.Authority(b); authority != nil {
		x.http.Authority = x.copyName(authority)
	}
}

// recordLine copies the request line.
func (x *exchange) recordLine(b []byte) {
	h, to := &x.requestHead, &x.http
	if h.Minor == 0 {
		x.record.Protocol = flow.HTTP10
	}
	to.Method = x.copyName(h.Method.In(b))
	to.Path = x.copyName(h.Target.In(b))
}

// copyName copies p into names.
func (x *exchange) copyName(p []byte) []byte { return copyValue(&x.names, p) }

// copyField copies the value of the first field of kind k.
func (x *exchange) copyField(h *http1.Head, b []byte, k http1.Known) []byte {
	if i := h.Find(k); i >= 0 {
		return x.copyName(h.Fields[i].Value.In(b))
	}
	return nil
}

// copyJoined copies the values of all fields of kind k as one list (RFC 9110 §5.3).
func (x *exchange) copyJoined(h *http1.Head, b []byte, k http1.Known) []byte {
	first := h.Find(k)
	if first < 0 {
		return nil
	}
	last, size := first, -1
	for i := first; i < len(h.Fields); i++ {
		if f := &h.Fields[i]; f.Known == k && !f.Dropped {
			size += 1 + len(f.Value.In(b))
			last = i
		}
	}
	var list joined
	list.begin(&x.names, size)
	for i := first; i <= last; i++ {
		if f := &h.Fields[i]; f.Known == k && !f.Dropped {
			joinValue(&list, f.Value.In(b))
		}
	}
	return endJoin(&list, h.Fields[last].Value.In(b))
}

// copyFields appends the value of the first field of each name, or nil if there is no such field.
func (x *exchange) copyFields(dst [][]byte, h *http1.Head, b []byte, names []string) [][]byte {
	for _, name := range names {
		value := h.Value(b, name)
		if value != nil {
			value = x.copyName(value)
		}
		dst = append(dst, value)
	}
	return dst
}

// count updates the counters of the record and its connection.
func (x *exchange) count() {
	advance(&x.record.Received, &x.s.Record.Received, x.request.delivered())
	if x.answered {
		advance(&x.record.Sent, &x.s.Record.Sent, x.response.delivered())
	}
}

// advance sets a request's counter, and adds the difference to its connection's counter.
func advance(counter, connection *atomic.Uint64, now uint64) {
	if before := counter.Load(); now != before {
		counter.Store(now)
		connection.Add(now - before)
	}
}

// close closes the record. It resets upstream unless the exchange completed and the connection is not cut.
func (x *exchange) close(reason flow.Reason, err error, end ending) ending {
	x.endLease(reason)
	x.place.leave()
	if len(x.decision.Mirrors) > 0 {
		x.dropMirrors(reason)
	}
	if end == cut || reason != flow.Completed && x.made == nil {
		x.s.dropUpstream()
	}
	x.record.Close(x.s.engine.config.Flows, reason, err)
	return end
}
