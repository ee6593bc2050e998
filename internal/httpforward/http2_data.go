package httpforward

import (
	"slices"
	"time"

	"github.com/pillion-proxy/pillion/internal/envoy"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/http2"
)

// data begins a DATA frame. In the common case, a complete frame without padding, it is forwarded in place.
func (l *lane) data(h http2.Header, b []byte) (bool, error) {
	payload := b[http2.HeaderLength:]
	var first byte
	if h.Has(http2.Padded) && h.Length > 0 {
		if len(payload) == 0 {
			return false, nil
		}
		first = payload[0]
	}
	before, behind, err := h.Padding(first)
	if err != nil {
		return false, err
	}
	l.parsed += http2.HeaderLength + before
	end, size := h.Has(http2.EndStream), h.Length-before-behind
	s, err := l.receiver(h.Stream)
	if s == nil {
		l.owed += h.Length
		l.rest = rest{behind: h.Length - before}
		if err == nil && size == 0 {
			err = l.idleFrame()
		}
		return true, err
	}
	if before > 0 {
		l.returnPadding(h, before+behind)
	}
	switch {
	case size == 0 && !end:
		l.rest = rest{behind: behind}
		return true, l.idleFrame()
	case size == 0:
		l.rest = rest{behind: behind}
		return true, l.sendData(s, nil, true)
	case len(payload) < h.Length || before > 0:
		l.rest = rest{data: size, behind: behind, stream: h.Stream, end: end}
		return true, nil
	}
	l.parsed += size
	if err := l.countData(s, payload[:size], end); err != nil {
		return true, err
	}
	l.out.Append(b[:http2.HeaderLength+size])
	l.endMessage(s, end)
	return true, nil
}

// receiver returns the stream of a DATA frame, nil if its data is to be discarded.
func (l *lane) receiver(id uint32) (*stream, error) {
	s, err := l.find(id)
	switch {
	case err != nil:
		return nil, err
	case s == nil && (!l.fromDown() || l.m.wasReset(id)):
		return nil, nil // crossed with the end of the stream
	case s == nil, l.body(s).ended:
		return nil, http2.StreamError(id, http2.StreamClosed, "data behind the end")
	case !l.fromDown() && !s.begun:
		return nil, http2.StreamError(id, http2.ProtocolError, "data before the head of a response")
	}
	return s, nil
}

// body returns the body that this lane carries.
func (l *lane) body(s *stream) *body {
	if l.fromDown() {
		return &s.request
	}
	return &s.response
}

// returnPadding returns the flow-control credit that padding used. Padding is not forwarded.
func (l *lane) returnPadding(h http2.Header, n int) {
	l.owed += n
	if !h.Has(http2.EndStream) {
		l.giveBack(h.Stream, n)
	}
}

// continueFrame handles the next bytes of a frame whose beginning was parsed. b is not empty.
func (l *lane) continueFrame(b []byte) error {
	r := &l.rest
	if r.data == 0 {
		n := min(len(b), r.behind)
		r.behind -= n
		l.parsed += n
		return nil
	}
	s := l.m.streams.find(r.stream)
	if s == nil { // the stream ended in the middle of the frame
		l.owed += r.data
		*r = rest{behind: r.data + r.behind}
		return nil
	}
	n := min(len(b), r.data)
	r.data -= n
	l.parsed += n
	return l.sendData(s, b[:n], r.data == 0 && r.end)
}

// sendData forwards data as a frame of its own.
func (l *lane) sendData(s *stream, data []byte, end bool) error {
	if err := l.countData(s, data, end); err != nil {
		return err
	}
	h := http2.Header{Length: len(data), Type: http2.Data, Stream: s.id}
	if end {
		h.Flags = http2.EndStream
	}
	l.insert(h.Append(l.scratch))
	l.out.Append(data)
	l.endMessage(s, end)
	return nil
}

// countData counts data about to be forwarded. If it disagrees with the declared length, the data is not forwarded and
// an error is returned.
func (l *lane) countData(s *stream, data []byte, end bool) error {
	body, n := l.body(s), len(data)
	if !body.take(n) || end && !body.whole() {
		body.got -= int64(n)
		l.owed += n
		return errBodyLength(s.id)
	}
	if s.http.GRPC {
		body.messages.scan(data)
	}
	tape := s.http.Body
	if l.fromDown() {
		l.m.Record.Received.Add(uint64(n))
	} else {
		tape = s.http.ResponseBody
		l.m.Record.Sent.Add(uint64(n))
		l.m.window.connection -= int64(n)
	}
	if tape != nil {
		tape.Add(data)
	}
	l.progress(n)
	return nil
}

// endMessage records the end of a message.
func (l *lane) endMessage(s *stream, end bool) {
	if !end {
		return
	}
	l.body(s).ended = true
	if l.fromDown() {
		l.m.awaitHead(s)
	}
	l.m.completed(s)
}

// waiting is a complete request that has been waiting for its response head since the given time.
type waiting struct {
	stream uint32
	since  time.Time
}

// awaitHead starts the RequestTimeout of a stream. Answered requests can accumulate behind an old one: they are removed
// when the list is full.
func (m *multiplex) awaitHead(s *stream) {
	if s.total > 0 || s.try > 0 {
		m.startLimits(s)
	}
	if m.settings.RequestTimeout <= 0 || s.begun {
		return
	}
	if len(m.waiting) == cap(m.waiting) {
		m.waiting = slices.DeleteFunc(m.waiting, func(w waiting) bool {
			s := m.streams.find(w.stream)
			return s == nil || s.begun
		})
		m.waiting = slices.Grow(m.waiting, len(m.waiting)+16) // amortises the removal
	}
	m.waiting = append(m.waiting, waiting{s.id, m.now()})
}

// longestWait returns the request that has waited longest, or nil.
func (m *multiplex) longestWait() (*stream, time.Time) {
	for len(m.waiting) > 0 {
		if s := m.streams.find(m.waiting[0].stream); s != nil && !s.begun {
			return s, m.waiting[0].since
		}
		m.waiting = m.waiting[1:]
	}
	return nil, time.Time{}
}

// maxLookahead is how many frames are searched for the reset of a request.
const maxLookahead = 32

// resetFollows reports whether the reset of a request arrived with it, as the next frame of its stream. Such a request is not
// forwarded: in floods of them (CVE-2023-44487) each is work for the server, whose other clients wait meanwhile.
func (l *lane) resetFollows(stream uint32) bool {
	b := l.in.Bytes()[l.parsed:]
	for range maxLookahead {
		if len(b) < http2.HeaderLength {
			return false
		}
		h := http2.ParseHeader(b)
		whole := http2.HeaderLength + h.Length
		if h.Stream == stream || len(b) < whole {
			return h.Type == http2.ResetStream && h.Check(l.frameLimit) == nil && len(b) >= whole
		}
		b = b[whole:]
	}
	return false
}

// resetStream forwards the reset of a stream.
func (l *lane) resetStream(h http2.Header, b []byte) error {
	s, err := l.find(h.Stream)
	if err != nil {
		return err
	}
	if s == nil {
		return l.idleFrame() // resets crossed
	}
	m := l.m
	if !s.withheld {
		l.out.Append(b)
	}
	code := http2.Code(http2.Uint32(b[http2.HeaderLength:]))
	why := http2.StreamError(h.Stream, code, "reset by its peer")
	r := &s.http
	if !l.fromDown() {
		m.streams.noteReset(h.Stream)
	}
	switch {
	case s.response.ended: // the rest of the request is not wanted, or not sent
		m.finish(s, flow.Completed, nil)
	case !l.fromDown() && m.downEnded: // as in upstreamGone
		r.Flags, r.Details = envoy.FlagDownstreamConnectionTermination, envoy.DetailsDownstreamLeft
		m.finish(s, flow.DownstreamLeft, why)
	case !l.fromDown():
		r.Flags, r.Details = envoy.FlagUpstreamRemoteReset, resetDetails(s, code)
		m.finish(s, flow.UpstreamReset, why)
	default:
		r.Flags, r.Details = envoy.FlagDownstreamConnectionTermination, envoy.DetailsDownstreamLeft
		begun := s.begun
		m.finish(s, flow.DownstreamLeft, why)
		if !begun && !m.resets.spend(m.now) {
			return errManyResets
		}
	}
	return nil
}

func resetDetails(s *stream, code http2.Code) string {
	switch {
	case s.begun:
		return resetAfter
	case code == http2.RefusedStream:
		return refusedBefore
	}
	return resetBefore
}

// The details of streams that upstream resets. They are built once, because upstream chooses how often it resets.
var (
	resetAfter    = envoy.ResetAfterResponse(envoy.ResetByRemote)
	resetBefore   = envoy.ResetBeforeResponse(envoy.ResetByRemote)
	refusedBefore = envoy.ResetBeforeResponse(envoy.ResetByRemoteRefusingToStream)
)
