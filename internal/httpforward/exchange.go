package httpforward

import (
	"bytes"
	"strconv"
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

// appendRequestHead builds the head that goes upstream.
func (x *exchange) appendRequestHead(dst, b []byte) []byte {
	h, fields := &x.requestHead, &x.s.engine.config.Fields
	x.options = h.DropHopByHop(b)
	x.s.bound = x.s.bound || boundToConnection(h, b, http1.Authorization) || boundToConnection(h, b, http1.ProxyAuthorization)
	// HTTP/2 is not upgraded to: the request is served as HTTP/1.1 (RFC 9113 §3.1 has abolished it).
	if x.upgrade = x.options.Upgrade && h.Minor > 0 && !names(x.options.UpgradeValue.In(b), "h2c"); x.upgrade {
		keep(h, http1.Upgrade)
	}

	dst = h.AppendLines(dst, b)
	switch {
	case x.upgrade:
		dst = append(dst, "Connection: Upgrade\r\n"...)
	case h.Minor == 0 && x.options.KeepAlive:
		dst = append(dst, "Connection: keep-alive\r\n"...)
	case x.options.Trailers:
		dst = append(dst, "Connection: TE\r\nTE: trailers\r\n"...)
	}
	if fields.RequestID && !h.Has(http1.XRequestID) {
		dst = append(dst, "x-request-id: "...)
		start := len(x.names)
		x.names = appendUUID(x.names)
		x.record.HTTP.ID = x.names[start:]
		dst = append(dst, x.record.HTTP.ID...)
		dst = append(dst, "\r\n"...)
	}
	if fields.ForwardedProto && !h.Has(http1.XForwardedProto) {
		dst = append(dst, "x-forwarded-proto: http\r\n"...)
	}
	if fields.ForwardedFor == ForwardedForAppend ||
		fields.ForwardedFor == ForwardedForSetIfAbsent && !h.Has(http1.XForwardedFor) {
		dst = append(dst, "x-forwarded-for: "...)
		dst = appendAddress(dst, x.s.Downstream.Addr())
		dst = append(dst, "\r\n"...)
	}
	return append(dst, "\r\n"...)
}

// appendResponseHead builds the head that goes downstream, and decides whether the connection goes on after it.
func (x *exchange) appendResponseHead(b []byte, framing http1.Framing) {
	h, s := &x.responseHead, x.s
	options := h.DropHopByHop(b)
	s.bound = s.bound || boundToConnection(h, b, http1.WWWAuthenticate) || boundToConnection(h, b, http1.ProxyAuthenticate)
	x.upstreamCloses = !persists(h.Minor, options) || framing.Kind == http1.UntilClose
	x.closing = x.upstreamCloses || x.downstreamCloses()

	if h.Status == 101 {
		keep(h, http1.Upgrade)
	}
	if s.engine.config.Fields.ServiceTime {
		drop(h, http1.UpstreamServiceTime) // another agent's on the way here; ours includes its time
	}
	dst := h.AppendLines(x.response.head[:0], b)
	switch {
	case h.Status == 101:
		dst = append(dst, "Connection: Upgrade\r\n"...)
	case x.upgraded: // by CONNECT
	case x.closing:
		dst = append(dst, "Connection: close\r\n"...)
	case x.requestHead.Minor == 0 || h.Minor == 0:
		dst = append(dst, "Connection: keep-alive\r\n"...)
	}
	if s.engine.config.Fields.ServiceTime {
		dst = append(dst, "x-envoy-upstream-service-time: "...)
		dst = strconv.AppendInt(dst, x.record.HTTP.ServiceTime.Milliseconds(), 10)
		dst = append(dst, "\r\n"...)
	}
	x.response.head = append(dst, "\r\n"...)
}

// keep and drop decide about all fields of a kind.
func keep(h *http1.Head, k http1.Known) { setDropped(h, k, false) }
func drop(h *http1.Head, k http1.Known) { setDropped(h, k, true) }

func setDropped(h *http1.Head, k http1.Known, dropped bool) {
	for i := range h.Fields {
		if h.Fields[i].Known == k {
			h.Fields[i].Dropped = dropped
		}
	}
}

// downstreamCloses reports whether the connection ends after this request, whatever upstream says.
func (x *exchange) downstreamCloses() bool {
	return !persists(x.requestHead.Minor, x.options) || x.s.engine.state.Load() != serving
}

// persists reports whether a connection goes on after a message (RFC 9112 §9.3).
func persists(minor int, options http1.Options) bool {
	return !options.Close && (minor > 0 || options.KeepAlive)
}

// boundToConnection reports whether a field begins an authentication that belongs to the connection and not to the
// request: NTLM, and Negotiate, which may be NTLM (RFC 4559 §6).
func boundToConnection(h *http1.Head, b []byte, k http1.Known) bool {
	if !h.Has(k) {
		return false
	}
	for i := range h.Fields {
		if h.Fields[i].Known != k {
			continue
		}
		scheme := h.Fields[i].Value.In(b)
		if end := bytes.IndexByte(scheme, ' '); end >= 0 {
			scheme = scheme[:end]
		}
		if bytes.EqualFold(scheme, []byte("NTLM")) || bytes.EqualFold(scheme, []byte("Negotiate")) {
			return true
		}
	}
	return false
}

// names reports whether a comma-separated list has the member, in any case.
func names(list []byte, member string) bool {
	for len(list) > 0 {
		item := list
		if end := bytes.IndexByte(list, ','); end >= 0 {
			item, list = list[:end], list[end+1:]
		} else {
			list = nil
		}
		if bytes.EqualFold(bytes.Trim(item, " \t"), []byte(member)) {
			return true
		}
	}
	return false
}
