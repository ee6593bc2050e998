package httpforward

import (
	"errors"
	"io"
	"math"
	"net/http"
	"strconv"
	"strings"

	"github.com/pillion-proxy/pillion/internal/http1"
	"github.com/pillion-proxy/pillion/internal/http2"
	"github.com/pillion-proxy/pillion/internal/tcp"
	"github.com/pillion-proxy/pillion/internal/upstream"
)

// Legs of a hub to upstreams that speak HTTP/1. Such a leg carries one call at a time, numbered as on a leg
// of HTTP/2. A leg without a call may go to the engine's pool, and comes from there.

// legHTTP1 is the state of such a leg.
type legHTTP1 struct {
	call *call // in progress; nil while the leg is idle

	sends     http1.FramingKind // framing of the request: Sized also without a body, Tunnel after CONNECT
	before    uint64            // leg.written plus the output that was waiting when the request began
	halfClose bool              // our half is closed once the output is sent

	head     http1.Head
	body     http1.Body
	options  http1.Options // of the final response
	answered bool          // the head of the final response has arrived
	untilEnd bool          // its body ends with the connection
	complete bool          // the whole response has arrived
	trailers []http2.Field

	ended  error // of reading; handled when what was read before is
	reused bool  // the server may close the connection at any time, because it has served a request
	broken bool  // the connection is in an unknown state
}

// translated reports whether a call's request is sent as HTTP/1.
func (c *call) translated() bool { return c.decision.Translate }

// speakHTTP1 makes a fresh leg one of HTTP/1, and connects it if the pool has a connection.
func (l *leg) speakHTTP1(c *call) (connected bool) {
	l.http1 = new(legHTTP1)
	l.limit, l.greeted = 1, true
	l.window, l.initial = math.MaxInt64/2, math.MaxInt64/2
	l.encoder, l.decoder = http2.NewCollector(), nil // see sendHTTP1
	if l.target.Balanced {
		return false
	}
	conn, use := l.h.engine.config.Pool.TakeUsed(&l.target, idempotent(readOnly(c.sent.Method)))
	if conn == nil {
		return false
	}
	l.http1.reused, l.use = true, use
	l.h.connected(l, conn)
	return true
}

// stale reports whether the server has closed a connection without an open call, or has sent bytes that belong to no response. As in
// session.connect, the kernel is asked if the method forbids to send the request again, or after some time.
func (l *leg) stale(c *call) bool {
	asks := l.conn.Readable() || !idempotent(readOnly(c.sent.Method)) || l.h.now().Sub(l.idleAt) > upstream.Pause
	return asks && !l.conn.Quiet()
}

// sendHTTP1 sends the head of a request. end is whether it has no body. It reports false if the request cannot be expressed in
// HTTP/1, and was answered.
//
// The head is made by the code that makes header blocks, so that it has the same edits and added fields.
func (l *leg) sendHTTP1(c *call, end bool) bool {
	h, x := l.h, l.http1
	x.call = c
	request, fields, err := c.sent.Request, c.sent.fields, error(nil)
	if h.changes(c.stream, fields, c.sent.has) {
		h.appendRequest(nil, l.encoder, c.stream, fields, c.sent.has)
		fields = l.encoder.Collected()
		defer l.encoder.Forget()
		request, err = http2.ParseRequest(fields)
	}
	if err == nil && !expressible(&request) {
		err = errNoTarget
	}
	if err != nil {
		x.broken = true
		h.detach(c)
		_ = h.answer(c, &replyBadRequest, err)
		return false
	}
	x.before = l.written + uint64(len(l.out)-l.sent)
	x.sends = framingOf(c, end)
	l.out = appendHeadHTTP1(l.out, &request, fields)
	switch x.sends {
	case http1.Chunked:
		l.out = append(l.out, "transfer-encoding: chunked\r\n"...)
	case http1.Sized:
		n := max(c.request.declared, int64(len(c.req.queue)))
		if n > 0 || c.request.declared == 0 || expectsBody(request.Method) {
			l.out = append(strconv.AppendInt(append(l.out, "content-length: "...), n, 10), "\r\n"...)
		}
	}
	l.out = append(l.out, "\r\n"...)
	return true
}

var errNoTarget = errors.New("the request has no target that HTTP/1 can express")

// expressible reports whether the path of a request is a target of HTTP/1. In another form it could name another host than the
// request's authority.
func expressible(r *http2.Request) bool {
	return r.Tunnel() || r.Path[0] == '/' || r.Path == "*" && r.Method == http.MethodOptions
}

// framingOf returns how the body of a request is sent.
func framingOf(c *call, end bool) http1.FramingKind {
	switch {
	case c.tunnel:
		return http1.Tunnel
	case end, c.request.declared >= 0, c.request.ended && c.req.trailers == nil: // the whole body is there
		return http1.Sized
	}
	return http1.Chunked
}

// expectsBody reports whether a request without a body declares its length of zero (RFC 9110 §8.6).
func expectsBody(method string) bool {
	return method == http.MethodPost || method == http.MethodPut || method == http.MethodPatch
}

// appendHeadHTTP1 appends the request line and the fields of a valid request, except those of its framing. Several cookie
// fields become one (RFC 9113 §8.2.3).
func appendHeadHTTP1(dst []byte, r *http2.Request, fields []http2.Field) []byte {
	target, host := r.Path, r.Authority
	if r.Tunnel() {
		target = r.Authority
	}
	cookies := 0
	for i := range fields {
		switch f := &fields[i]; {
		case f.Name == "host" && host == "":
			host = f.Value
		case f.Name == "cookie":
			cookies++
		}
	}
	dst = append(append(append(append(dst, r.Method...), ' '), target...), " HTTP/1.1\r\nhost: "...)
	dst = append(append(dst, host...), "\r\n"...)
	for i := range fields {
		f := &fields[i]
		if f.IsPseudo() {
			continue
		}
		switch f.Name {
		case "host", "content-length", "http2-settings":
			continue
		case "te":
			dst = append(dst, "connection: te\r\n"...)
		case "cookie":
			if cookies > 1 {
				continue
			}
		}
		dst = appendLine(dst, f.Name, f.Value)
	}
	if cookies > 1 {
		dst = appendCookies(dst, fields)
	}
	return dst
}

func appendLine(dst []byte, name, value string) []byte {
	return append(append(append(append(dst, name...), ": "...), value...), "\r\n"...)
}

func appendCookies(dst []byte, fields []http2.Field) []byte {
	separator := "cookie: "
	for i := range fields {
		if fields[i].Name == "cookie" {
			dst = append(append(dst, separator...), fields[i].Value...)
			separator = "; "
		}
	}
	return append(dst, "\r\n"...)
}

// sendBody sends a part of a request's body.
func (l *leg) sendBody(data []byte, end bool) {
	l.reserve(len(data) + 32)
	chunked := l.http1.sends == http1.Chunked
	if chunked && len(data) > 0 {
		l.out = append(strconv.AppendInt(l.out, int64(len(data)), 16), "\r\n"...)
	}
	l.out = append(l.out, data...)
	if chunked && len(data) > 0 {
		l.out = append(l.out, "\r\n"...)
	}
	switch {
	case end && chunked:
		l.out = append(l.out, "0\r\n\r\n"...)
	case end && l.http1.sends == http1.Tunnel:
		l.http1.halfClose = true
	}
}

// sendTrailers ends a request. Trailers need chunks; others cannot be sent (RFC 9110 §6.5.1 lets a recipient drop them).
func (l *leg) sendTrailers(fields []http2.Field) {
	if l.http1.sends != http1.Chunked {
		l.sendBody(nil, true)
		return
	}
	l.out = append(l.out, "0\r\n"...)
	for i := range fields {
		if !l.h.Peers.drops(fields[i].Name) {
			l.out = appendLine(l.out, fields[i].Name, fields[i].Value)
		}
	}
	l.out = append(l.out, "\r\n"...)
}

// mayRead reports whether more may be read: the call has room for it.
func (x *legHTTP1) mayRead() bool { return x.ended == nil && (!x.answered || x.room() > 0) }

// room returns how much of the response may wait in the call.
func (x *legHTTP1) room() int {
	if x.call == nil {
		return streamWindow
	}
	window := streamWindow
	if h := x.call.h; h.buffered > h.keptLimit/4 { // the rest waits in the kernel
		window = tcp.BufferSize
	}
	return window - (len(x.call.resp.queue) - x.call.resp.from)
}

// stepHTTP1 handles the next part of a response at the beginning of b, and removes it from the buffer. It reports false if more
// bytes or more room are needed.
func (l *leg) stepHTTP1(b []byte) (bool, error) {
	x := l.http1
	var n int
	var err error
	switch {
	case len(b) == 0:
	case x.call == nil || x.complete:
		l.readErr, x.broken = errUnasked, true
	case !x.answered:
		n, err = l.responseHead(b)
	case x.body.Payload() > 0:
		n, err = l.payload(b)
	default:
		n, err = l.framingLine(b)
	}
	if l.in != nil {
		l.in.Discard(n)
	}
	var malformed http1.Error
	if errors.As(err, &malformed) || errors.Is(err, errNotAsked) {
		l.readErr, x.broken = err, true
		return false, nil
	}
	return n > 0, err
}

var errUnasked = errors.New("upstream sent bytes that belong to no response")

// responseHead handles the head of a response.
func (l *leg) responseHead(b []byte) (int, error) {
	x := l.http1
	done, err := x.head.ParseResponse(b, l.limits().limits())
	if !done || err != nil {
		return 0, err
	}
	c, n := x.call, x.head.Length
	framing, err := x.head.ResponseFraming(b, readOnly(c.sent.Method))
	if err != nil {
		return 0, err
	}
	if x.head.Status == http.StatusSwitchingProtocols {
		return 0, errNotAsked
	}
	options := x.head.DropHopByHop(b)
	fields := l.h.translated.fields(&x.head, b)
	l.left -= blockCost + len(fields)*fieldCost
	if x.head.Status < 200 {
		x.head.Reset()
		return n, l.h.fromUpstream(l, c.upID, false, fields, true)
	}
	x.answered, x.options = true, options
	x.untilEnd = framing.Kind == http1.UntilClose || framing.Kind == http1.Tunnel
	if framing.Kind == http1.Tunnel {
		framing.Kind = http1.UntilClose
	}
	x.body.Start(framing, l.limits().limits())
	if options.Nominates {
		x.body.Forbid(x.head.Nominated(b))
	}
	x.complete = x.body.Done()
	err = l.h.fromUpstream(l, c.upID, x.complete, fields, true)
	if x.complete && err == nil {
		l.responseOver(c)
	}
	return n, err
}

// translation makes the fields of responses those of HTTP/2. Fields repeat from one response to the next, so it keeps their texts.
type translation struct {
	list          []http2.Field
	names, values repeats
	scratch       []byte
}

// fields returns the fields of a response. They are valid until the next call.
func (t *translation) fields(h *http1.Head, b []byte) []http2.Field {
	t.scratch = strconv.AppendInt(t.scratch[:0], int64(h.Status), 10)
	list := append(t.list[:0], http2.Field{Name: ":status", Value: t.values.at(0, t.scratch)})
	for i := range h.Fields {
		if f := &h.Fields[i]; !f.Dropped && f.Known != http1.TransferEncoding {
			t.scratch = appendLower(t.scratch[:0], f.Name.In(b))
			list = append(list, http2.Field{Name: t.names.at(i+1, t.scratch), Value: t.values.at(i+1, f.Value.In(b))})
		}
	}
	if t.list = list; cap(list) > keptFields {
		t.list = nil
	}
	return list
}

// appendLower appends text in lower case.
func appendLower(dst, text []byte) []byte {
	for _, c := range text {
		if 'A' <= c && c <= 'Z' {
			c += 'a' - 'A'
		}
		dst = append(dst, c)
	}
	return dst
}

// repeats makes strings of the texts of a message. A text that equals the one at its place in the message before is that string.
type repeats []string

const (
	keptTexts   = 32
	longestText = 128 // that is kept
)

// at returns text, which is the i-th of its message.
func (r *repeats) at(i int, text []byte) string {
	if i < len(*r) && (*r)[i] == string(text) {
		return (*r)[i]
	}
	made := string(text)
	if i < keptTexts && len(text) <= longestText {
		for len(*r) <= i {
			*r = append(*r, "")
		}
		(*r)[i] = made
	}
	return made
}

// payload handles payload of a response's body.
func (l *leg) payload(b []byte) (int, error) {
	x, c := l.http1, l.http1.call
	n := int(min(int64(len(b)), x.body.Payload(), int64(max(x.room(), 0))))
	if n == 0 {
		return 0, nil
	}
	x.body.Skip(int64(n))
	return n, l.deliver(c, b[:n])
}

// deliver passes a part of the body on. The last one ends the response, unless trailers may follow.
func (l *leg) deliver(c *call, data []byte) error {
	x := l.http1
	x.complete = x.body.Done()
	if err := l.h.countData(c, &c.resp, data, x.complete); err != nil {
		return err
	}
	l.h.offer(&c.resp, data)
	if x.complete {
		l.responseOver(c)
	}
	return nil
}

// framingLine handles a line of chunk framing.
func (l *leg) framingLine(b []byte) (int, error) {
	x, c := l.http1, l.http1.call
	n, line, err := x.body.Line(b)
	if err != nil || n == 0 {
		return 0, err
	}
	if line != nil {
		name, value, _ := strings.Cut(string(line), ":")
		x.trailers = append(x.trailers, http2.Field{Name: strings.ToLower(name), Value: strings.Trim(value, " \t")})
	}
	if !x.body.Done() {
		return n, nil
	}
	x.complete = true
	if trailers := x.trailers; trailers != nil {
		x.trailers = nil
		if err = l.h.fromUpstream(l, c.upID, true, trailers, true); err == nil {
			l.responseOver(c)
		}
		return n, err
	}
	return n, l.deliver(c, nil)
}

// responseOver notes that the whole response has arrived. A connection that ends with it takes no more of the request.
func (l *leg) responseOver(c *call) {
	x := l.http1
	if x.call != c || c.closed {
		return // it is over, or is attempted again
	}
	switch {
	case c.req.done:
		l.h.detach(c) // others need not wait until downstream has read the response
		l.h.completed(c)
	case !persists(x.head.Minor, x.options):
		l.h.detach(c)
		c.req.done = true
		l.h.freeQueue(&c.req)
		l.h.completed(c)
	}
}

// settleEnd acts on the end of the connection when all that was read before is handled.
func (l *leg) settleEnd() {
	x := l.http1
	if x.ended == nil || l.readErr != nil || l.pending {
		return
	}
	if c := x.call; c != nil && x.answered && !x.complete {
		if l.in != nil && x.body.Payload() > 0 {
			return // the rest waits for room
		}
		if x.ended == io.EOF && l.in == nil && x.body.End() == nil {
			x.complete, x.broken = true, true
			if err := l.h.countData(c, &c.resp, nil, true); err == nil {
				l.h.offer(&c.resp, nil)
				l.responseOver(c)
			}
		}
	}
	l.readErr = x.ended
}

// freeHTTP1 ends the leg's part in a call. The connection stays open if it can carry another one.
func (l *leg) freeHTTP1(c *call) {
	x := l.http1
	reusable := x.complete && c.req.done && !x.untilEnd && x.sends != http1.Tunnel && persists(x.head.Minor, x.options)
	x.call = nil
	if !reusable || x.broken || l.readErr != nil {
		x.broken, l.closing = true, true
		l.h.moveWaiting(l)
		return
	}
	x.head.Reset()
	x.answered, x.complete, x.reused, x.trailers = false, false, true, nil
}

// spare reports whether the connection can carry a request of another hub or session.
func (l *leg) spare() bool {
	x := l.http1
	return x != nil && !x.broken && x.reused && x.call == nil && x.ended == nil && (l.readErr == nil || l.readErr == errUnused) &&
		l.writeErr == nil && l.in == nil && l.idle() && !l.target.Balanced
}

// repeats reports whether the request in progress may be sent again: the server may have closed a reused connection before it
// arrived. See exchange.mayRepeat.
func (l *leg) repeats(c *call) bool {
	x := l.http1
	return x.call == c && x.reused && !x.answered && l.in == nil && l.h.repeatable(c) && c.resends < maxResends &&
		(idempotent(readOnly(c.sent.Method)) || l.written <= x.before)
}
