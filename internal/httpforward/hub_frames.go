package httpforward

import (
	"slices"
	"time"

	"github.com/pillion-proxy/pillion/internal/http2"
)

// step handles the frame at the beginning of b, and removes it from the buffer. It reports false if more bytes are needed.
func (l *leg) step(b []byte) (bool, error) {
	if !l.greeted && !l.isDown() && !http2.BeginsLikeServer(b) {
		return false, errNotHTTP2
	}
	if len(b) < http2.HeaderLength {
		return false, nil
	}
	h := http2.ParseHeader(b)
	if err := l.checkFrame(h); err != nil {
		return false, err
	}
	whole := http2.HeaderLength + h.Length
	if len(b) < whole {
		return false, nil
	}
	if !l.block.open {
		l.began = time.Time{}
	}
	err := l.frame(h, b[http2.HeaderLength:whole])
	if l.in != nil {
		l.in.Discard(whole)
	}
	return true, err
}

// checkFrame validates a frame header in the current state.
func (l *leg) checkFrame(h http2.Header) error {
	if err := h.Check(http2.MinFrameSize); err != nil {
		return err
	}
	switch {
	case !l.greeted && (h.Type != http2.Settings || h.Has(http2.Ack)):
		return http2.ConnectionError(http2.ProtocolError, "the first frame is not SETTINGS")
	case l.block.open != (h.Type == http2.Continuation), l.block.open && h.Stream != l.block.stream:
		return http2.ConnectionError(http2.ProtocolError, "a header block is interrupted")
	case h.Type == http2.Headers || h.Type == http2.Continuation:
		if len(l.block.fragments)+h.Length > l.limits().MaxHeadBytes+262 { // with padding and priority
			return http2.ConnectionError(http2.EnhanceYourCalm, "header block too large")
		}
	case h.Type == http2.PushPromise: // disabled by our SETTINGS, and never allowed from a client
		return http2.ConnectionError(http2.ProtocolError, "a push")
	}
	return nil
}

// frame handles a whole frame.
func (l *leg) frame(h http2.Header, payload []byte) error {
	switch h.Type {
	case http2.Data:
		return l.data(h, payload)
	case http2.Headers:
		return l.block.headers(h, payload, l)
	case http2.Continuation:
		return l.block.continuation(h, payload, l)
	case http2.Settings:
		return l.settings(h, payload)
	case http2.ResetStream:
		return l.h.resetStream(l, h.Stream, http2.Code(http2.Uint32(payload)))
	case http2.WindowUpdate:
		return l.windowUpdate(h, payload)
	case http2.GoAway:
		l.goAway(http2.Uint31(payload))
	case http2.Ping:
		if !h.Has(http2.Ack) {
			l.out = append(http2.Header{Length: len(payload), Type: http2.Ping, Flags: http2.Ack}.Append(l.out), payload...)
		}
	case http2.PriorityFrame: // obsolete, and hop-by-hop
		if http2.DependsOnItself(h.Stream, payload) {
			return http2.StreamError(h.Stream, http2.ProtocolError, "stream depends on itself")
		}
	}
	return l.idleFrame()
}

// idleFrame counts a frame without effect.
func (l *leg) idleFrame() error {
	if l.idleFrames.spend(l.h.now) {
		return nil
	}
	return errManyIdle
}

// message handles a complete header block. Even a rejected block is decoded, to keep the HPACK table in step with the
// sender's. broken is a stream error found earlier.
func (l *leg) message(stream uint32, end bool, encoded []byte, broken error) error {
	defer l.decoder.Forget()
	fields, whole, err := l.decoder.Decode(encoded)
	if err != nil {
		return err
	}
	l.left -= blockTurn(fields)
	if l.isDown() {
		return l.h.fromDownstream(stream, end, fields, whole, broken)
	}
	if broken != nil {
		return broken
	}
	return l.h.fromUpstream(l, stream, end, fields, whole)
}

// settings takes over a SETTINGS frame, and acknowledges it.
func (l *leg) settings(h http2.Header, payload []byte) error {
	if h.Has(http2.Ack) {
		return l.idleFrame()
	}
	if l.greeted {
		if err := l.idleFrame(); err != nil {
			return err
		}
	}
	table, err := readSettings(payload, func(s http2.Setting) error {
		switch s.ID {
		case http2.InitialWindowSize:
			return l.resize(int64(s.Value))
		case http2.MaxConcurrentStreams:
			l.limit = s.Value
		case http2.EnablePush:
			if !l.isDown() {
				return permitPush(s.Value)
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	if !l.greeted && !l.isDown() && l.limit == firstLimit {
		l.limit = maxStreams
	}
	l.greeted = true
	l.out = appendSettingsAck(l.out)
	if table.present {
		l.encoder.SetTableSize(table.smallest, table.now)
	}
	l.openWaiting()
	return nil
}

// resize changes the windows of all streams by a new initial window (RFC 9113 §6.9.2).
func (l *leg) resize(n int64) error {
	more := n - l.initial
	l.initial = n
	for _, c := range l.streams() {
		p := c.to(l)
		if p.window += more; p.window > http2.MaxWindow {
			return http2.ConnectionError(http2.FlowControlError, "window too large")
		}
		if more > 0 {
			l.h.pass(p)
		}
	}
	return nil
}

// streams returns the open streams of the leg. The result is a copy: they may end meanwhile.
func (l *leg) streams() (open []*call) {
	if !l.isDown() {
		for _, c := range l.calls {
			open = append(open, c)
		}
		if l.http1 != nil && l.http1.call != nil {
			open = append(open, l.http1.call)
		}
		return open
	}
	for _, s := range l.h.streams.open {
		open = append(open, s.call)
	}
	return open
}

// windowUpdate takes credit.
func (l *leg) windowUpdate(h http2.Header, payload []byte) error {
	n := int64(http2.Uint31(payload))
	if n == 0 {
		return http2.StreamError(h.Stream, http2.ProtocolError, "increment of zero")
	}
	if h.Stream == 0 {
		if l.window += n; l.window > http2.MaxWindow {
			return http2.ConnectionError(http2.FlowControlError, "window too large")
		}
		l.unblock()
		return l.idleFrame()
	}
	c, err := l.find(h.Stream)
	if err != nil {
		return err
	}
	if c != nil {
		p := c.to(l)
		if p.window += n; p.window > http2.MaxWindow {
			return http2.StreamError(h.Stream, http2.FlowControlError, "window too large")
		}
		l.h.pass(p)
	}
	return l.idleFrame()
}

// find returns the stream of a frame, nil if the stream is closed. A stream that was never opened is an error.
func (l *leg) find(id uint32) (*call, error) {
	last := l.next
	if l.isDown() {
		if s := l.h.streams.find(id); s != nil {
			return s.call, nil
		}
		last = l.h.streams.last + 1
	} else if c := l.callOf(id); c != nil {
		return c, nil
	}
	if id >= last || id&1 == 0 {
		return nil, http2.ConnectionError(http2.ProtocolError, "frame for an idle stream")
	}
	return nil, nil
}

// data handles a DATA frame. Padding counts towards the windows.
func (l *leg) data(h http2.Header, payload []byte) error {
	var first byte
	if h.Has(http2.Padded) && h.Length > 0 {
		first = payload[0]
	}
	before, behind, err := h.Padding(first)
	if err != nil {
		return err
	}
	if l.credit -= int64(h.Length); l.credit < 0 {
		return http2.ConnectionError(http2.FlowControlError, "more data than the connection's window")
	}
	l.owed += h.Length
	content, end := payload[before:len(payload)-behind], h.Has(http2.EndStream)
	c, err := l.receiver(h.Stream)
	if c == nil {
		if err == nil && len(content) == 0 {
			err = l.idleFrame()
		}
		return err
	}
	p := c.from(l)
	if p.credit -= int64(h.Length); p.credit < 0 {
		return http2.StreamError(h.Stream, http2.FlowControlError, "more data than the stream's window")
	}
	p.owed += before + behind
	if len(content) == 0 && !end {
		l.h.giveBack(p)
		return l.idleFrame()
	}
	if err := l.h.countData(c, p, content, end); err != nil {
		return err
	}
	l.idleFrames.earn(idleBonus + len(content)/idleBonusBytes)
	if l.h.offer(p, content); p.up {
		l.h.collected(c)
	}
	return nil
}

// receiver returns the stream of a DATA frame, nil if its data is to be discarded.
func (l *leg) receiver(id uint32) (*call, error) {
	c, err := l.find(id)
	switch {
	case err != nil:
		return nil, err
	case c == nil && (!l.isDown() || l.h.wasReset(id)):
		return nil, nil // crossed with the end of the stream
	case c == nil, c.from(l).body().ended && !c.replied:
		return nil, http2.StreamError(id, http2.StreamClosed, "data behind the end")
	case c.replied:
		return nil, nil
	case !l.isDown() && !c.begun:
		return nil, http2.StreamError(id, http2.ProtocolError, "data before the head of a response")
	}
	return c, nil
}

// wasReset reports whether downstream may legitimately still send on a closed stream.
func (h *hub) wasReset(id uint32) bool {
	return id > h.lastServed || slices.Contains(h.streams.reset, id)
}

// countData counts data of a message. If it disagrees with the declared length, an error is returned.
func (h *hub) countData(c *call, p *pipe, data []byte, end bool) error {
	body := p.body()
	if !body.take(len(data)) || end && !body.whole() {
		body.got -= int64(len(data))
		return errBodyLength(p.number(p.sender()))
	}
	if c.http.GRPC {
		body.messages.scan(data)
	}
	tape := c.http.Body
	if p.up {
		h.Record.Received.Add(uint64(len(data)))
	} else {
		tape = c.http.ResponseBody
		h.Record.Sent.Add(uint64(len(data)))
	}
	if tape != nil {
		tape.Add(data)
	}
	if body.ended = end; p.up {
		h.awaitEnd(c)
	}
	return nil
}

// goAway ends the streams that an upstream does not serve, and opens no more on it.
func (l *leg) goAway(last uint32) {
	if l.isDown() {
		return // about pushes and errors only
	}
	l.closing = true
	for _, c := range l.streams() {
		if c.upID > last {
			l.h.refused(c)
		}
	}
	l.h.moveWaiting(l)
}
