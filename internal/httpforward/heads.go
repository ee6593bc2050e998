package httpforward

import (
	"bytes"
	"strconv"

	"github.com/pillion-proxy/pillion/internal/http1"
)

// addedFields is more than the fields that are added take.
const addedFields = 512

// appendRequestHead appends the request head for upstream.
func (x *exchange) appendRequestHead(dst, b []byte) []byte {
	h, fields := &x.requestHead, &x.settings.Fields
	x.dropFromRequest(b)
	dst = x.appendConnection(h.AppendLines(dst, b))
	if fields.RequestID && !h.Has(http1.XRequestID) {
		dst = append(append(append(dst, "x-request-id: "...), x.newID()...), "\r\n"...)
	}
	if x.http.Trace != nil {
		dst = appendTraceLines(dst, x.http.Trace)
	}
	if x.s.Peers.adds() {
		dst = x.s.Peers.appendLine(dst, h, b)
	}
	if x.s.Peers.readsResponses() {
		dst = x.s.Peers.appendLines(dst, introduced{true, true})
	}
	if fields.ForwardedProto && !h.Has(http1.XForwardedProto) {
		dst = append(dst, "x-forwarded-proto: http\r\n"...)
	}
	if fields.ForwardedFor == ForwardedForAppend ||
		fields.ForwardedFor == ForwardedForSetIfAbsent && !h.Has(http1.XForwardedFor) {
		dst = append(dst, "x-forwarded-for: "...)
		dst = appendAddress(dst, x.s.Record.Downstream.Addr())
		dst = append(dst, "\r\n"...)
	}
	return append(dst, "\r\n"...)
}

// dropFromRequest marks the fields that are not forwarded.
func (x *exchange) dropFromRequest(b []byte) {
	h := &x.requestHead
	x.options = h.DropHopByHop(b)
	x.s.bound = x.s.bound || boundToConnection(h, b, http1.Authorization) || boundToConnection(h, b, http1.ProxyAuthorization)
	// An upgrade to h2c is not forwarded: the request is served as HTTP/1.1 (RFC 9113 §3.1 deprecates the upgrade).
	if x.upgrade = x.options.Upgrade && h.Minor > 0 && !lists(h, b, http1.Upgrade, "h2c"); x.upgrade {
		keep(h, http1.Upgrade)
	}
	x.s.Peers.dropRequest(h)
	if x.http.Trace != nil {
		dropTraceLines(h, b, x.http.Trace)
	}
}

// appendConnection appends the fields that concern the upstream connection.
func (x *exchange) appendConnection(dst []byte) []byte {
	switch {
	case x.upgrade:
		dst = append(dst, "Connection: Upgrade\r\n"...)
	case x.requestHead.Minor == 0 && x.options.KeepAlive:
		dst = append(dst, "Connection: keep-alive\r\n"...)
	case x.options.Trailers:
		dst = append(dst, "Connection: TE\r\nTE: trailers\r\n"...)
	}
	return dst
}

// forbiddenInResponse returns the names that are forbidden in the trailers of the response.
func (x *exchange) forbiddenInResponse(options http1.Options, b []byte) (names []byte) {
	if options.Nominates {
		names = x.responseHead.Nominated(b)
	}
	return x.s.Peers.forbid(names)
}

// appendResponseHead builds the response head for downstream, and decides whether the connection persists.
func (x *exchange) appendResponseHead(b []byte, framing http1.Framing) {
	h, s := &x.responseHead, x.s
	options := h.DropHopByHop(b)
	s.bound = s.bound || boundToConnection(h, b, http1.WWWAuthenticate) || boundToConnection(h, b, http1.ProxyAuthenticate)
	x.upstreamCloses = !persists(h.Minor, options) || framing.Kind == http1.UntilClose
	x.closing = x.upstreamCloses || x.downstreamCloses()
	if framing.Kind == http1.Chunked {
		x.response.nominated = x.forbiddenInResponse(options, b)
	}

	if h.Status == 101 {
		keep(h, http1.Upgrade)
	}
	if x.settings.Fields.ServiceTime {
		drop(h, http1.UpstreamServiceTime) // an agent between here and the server set it; our time includes that agent's
	}
	if s.Peers.readsResponses() {
		s.meet(&x.record, h, b)
	}
	s.Peers.drop(h)
	named := s.Peers.names(h.Has(http1.Server))
	if named {
		drop(h, http1.Server)
	}
	var e *edited
	if editsResponse(x.decision.Plan) {
		e = x.editResponse(b)
	}
	echoes := x.settings.edge.repliesToID()
	if echoes {
		drop(h, http1.XRequestID)
	}
	dst := h.AppendLines(x.response.reserve(h.Length+addedFields+s.Peers.described(x.introduced)+len(x.http.ID)), b)
	if e != nil {
		dst = e.appendLines(dst)
	} else if named {
		dst = append(append(append(dst, "server: "...), s.Peers.Server...), "\r\n"...)
	}
	switch {
	case h.Status == 101:
		dst = append(dst, "Connection: Upgrade\r\n"...)
	case x.upgraded: // by CONNECT
	case x.closing:
		dst = append(dst, "Connection: close\r\n"...)
	case x.requestHead.Minor == 0 || h.Minor == 0:
		dst = append(dst, "Connection: keep-alive\r\n"...)
	}
	if x.settings.Fields.ServiceTime {
		dst = append(dst, "x-envoy-upstream-service-time: "...)
		dst = strconv.AppendInt(dst, x.http.ServiceTime.Milliseconds(), 10)
		dst = append(dst, "\r\n"...)
	}
	if echoes {
		dst = x.appendID(dst)
	}
	dst = s.Peers.appendLines(dst, x.introduced)
	x.response.head = append(dst, "\r\n"...)
}

// appendID appends the ID of the request to a response.
func (x *exchange) appendID(dst []byte) []byte {
	if len(x.http.ID) == 0 {
		return dst
	}
	return append(append(append(dst, requestIDField+": "...), x.http.ID...), "\r\n"...)
}

// keep and drop mark all fields of a kind.
func keep(h *http1.Head, k http1.Known) { setDropped(h, k, false) }
func drop(h *http1.Head, k http1.Known) { setDropped(h, k, true) }

func setDropped(h *http1.Head, k http1.Known, dropped bool) {
	for i := range h.Fields {
		if h.Fields[i].Known == k {
			h.Fields[i].Dropped = dropped
		}
	}
}

// downstreamCloses reports whether the connection ends after this request regardless of the response.
func (x *exchange) downstreamCloses() bool {
	return !persists(x.requestHead.Minor, x.options) || x.s.engine.state.Load() != serving || x.s.retired()
}

// persists reports whether a connection persists after a message (RFC 9112 §9.3).
func persists(minor int, options http1.Options) bool {
	return !options.Close && (minor > 0 || options.KeepAlive)
}

// boundToConnection reports whether a field begins an authentication of the connection rather than of the request:
// NTLM, or Negotiate (it may carry NTLM, RFC 4559 §6).
func boundToConnection(h *http1.Head, b []byte, k http1.Known) bool {
	if !h.Has(k) {
		return false
	}
	for i := range h.Fields {
		if h.Fields[i].Known != k {
			continue
		}
		if namesScheme(h.Fields[i].Value.In(b)) {
			return true
		}
	}
	return false
}

// namesScheme reports whether NTLM or Negotiate is among the words of credentials or of a list of challenges. A word
// ends at every byte that is not a letter, because recipients differ in what they accept as white space. If a word is
// mistaken for a scheme, the only effect is that a connection is not shared.
func namesScheme(value []byte) bool {
	for len(value) > 0 {
		n := 0
		for n < len(value) && 'a' <= value[n]|0x20 && value[n]|0x20 <= 'z' {
			n++
		}
		if word := value[:n]; bytes.EqualFold(word, []byte("NTLM")) || bytes.EqualFold(word, []byte("Negotiate")) {
			return true
		}
		value = value[min(n+1, len(value)):]
	}
	return false
}

// upgradeOf returns the protocol that a request asks for, or nil if it is forwarded without that. In place of several fields it
// returns what is no protocol.
func upgradeOf(h *http1.Head, b []byte) (protocol []byte) {
	if !h.Has(http1.Upgrade) || h.Minor == 0 || !lists(h, b, http1.Connection, "upgrade") || lists(h, b, http1.Upgrade, "h2c") {
		return nil
	}
	for i := range h.Fields {
		switch f := &h.Fields[i]; {
		case f.Known != http1.Upgrade:
		case protocol != nil:
			return []byte{','}
		default:
			protocol = f.Value.In(b)
		}
	}
	return protocol
}

// lists reports whether a field of kind k, dropped or not, lists the word.
func lists(h *http1.Head, b []byte, k http1.Known, word string) bool {
	for i := range h.Fields {
		if h.Fields[i].Known == k && http1.Lists(h.Fields[i].Value.In(b), word) {
			return true
		}
	}
	return false
}
