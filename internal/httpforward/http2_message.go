package httpforward

import (
	"errors"
	"net/http"

	"github.com/pillion-proxy/pillion/internal/envoy"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/http2"
	"github.com/pillion-proxy/pillion/internal/upstream"
)

// fromDownstream handles a decoded header block from downstream: a request head or trailers.
func (m *multiplex) fromDownstream(id uint32, end bool, fields []http2.Field, whole bool, broken error) error {
	if s := m.streams.find(id); s != nil {
		return m.requestTrailers(s, end, fields, whole)
	}
	switch {
	case id&1 == 0:
		return http2.ConnectionError(http2.ProtocolError, "a request on a stream of the server's")
	case id <= m.streams.last && m.wasReset(id):
		return m.toUp.idleFrame()
	case id <= m.streams.last:
		return http2.ConnectionError(http2.StreamClosed, "header block on a closed stream")
	}
	m.streams.last = id
	if id > m.lastServed {
		return m.refuse(id)
	}
	request, err := http2.ParseRequest(fields)
	if err == nil {
		err = broken
	}
	s := takeStream(m.engine, &m.Connection, id, m.requests)
	s.request = body{declared: request.ContentLength, ended: end}
	s.response = body{declared: -1}
	s.tunnel, s.head = request.Tunnel(), request.Method == http.MethodHead
	tooMuch := m.holdsTooMuch()
	m.squeeze(s)
	var rejected *reply
	if err == nil && whole && s.settings.edge != nil {
		fields, rejected = m.enter(s, &request, fields)
	}
	seen := s.recordRequest(&request, fields)
	if m.Peers.readsRequests() {
		s.introduced = m.meetFields(&s.record, fields)
	}
	m.keep(s)
	m.streams.add(s)
	switch {
	case !whole:
		return m.answer(s, &replyHeaderListTooLarge, nil)
	case err != nil:
		return m.malformed(s, err)
	case rejected != nil:
		return m.answer(s, rejected, nil)
	case end && !s.request.whole():
		return m.malformed(s, http2.LengthMismatch)
	case m.lost != nil:
		m.answered = true
		s.record.Upstream, s.record.UpstreamLocal, s.record.Security = m.Target.Address, m.upLocal, m.Record.Security
		if !m.upLocal.IsValid() {
			s.record.Attempts, s.record.TransportFailure = m.attempts, upstream.TransportFailure(m.lostErr)
		} else {
			s.record.TransportFailure = rejection(m.lostErr)
		}
		return m.answer(s, m.lost, m.lostErr)
	case m.streams.active > maxStreams:
		return m.tooMany(s)
	case tooMuch:
		return m.outOfMemory(s)
	case m.toUp.resetFollows(id):
		s.withheld = true
		return nil
	}
	return m.decide(&undecided{s: s, id: id, end: end, request: request, fields: fields, seen: seen})
}

// decide decides about a request, and does what the decision asks for.
func (m *multiplex) decide(u *undecided) error {
	s, fields := u.s, u.fields
	r := m.view(s, &u.request, fields)
	r.Check, r.Collected = u.check, u.body
	decision := m.route(r)
	if decision.Collect > 0 {
		return m.collect(u, decision.Collect)
	}
	if decision.Check != nil {
		m.suspend(u, decision.Check)
		return nil
	}
	decision.record(&s.record)
	if m.Router != nil {
		m.carry(s, &decision)
	}
	if p := policyOf(&decision, s.settings); p != nil {
		m.trace(s, p, decision.operation())
	}
	switch {
	case decision.Reply != nil:
		return m.answerMade(s)
	case decision.noRoute():
		return m.answer(s, &replyNoRoute, errNoRoute)
	case decision.Target != m.Target:
		return m.answer(s, &replyMisdirected, errMisdirected)
	}
	if u.request.RepeatedLength {
		fields = http2.SingleLength(fields)
	}
	m.forwardRequest(s, u.end, fields, u.seen)
	return nil
}

// forwardRequest sends a request upstream, with the added fields.
func (m *multiplex) forwardRequest(s *stream, end bool, fields []http2.Field, has seen) {
	l := &m.toUp
	s.record.Upstream, s.record.UpstreamLocal, s.record.Security = m.Target.Address, m.upLocal, m.Record.Security
	s.record.Attempts, m.attempts = max(m.attempts, 1), 1
	l.endBlock(m.appendRequest(l.beginBlock(), l.encoder, s, fields, has), s.id, end)
	s.edits, s.sentAt = nil, m.now()
	if end {
		m.awaitHead(s)
	}
}

// beginBlock returns scratch with room for a frame header. The caller appends a header block and passes it to endBlock;
// the lane must not be used in between.
func (l *lane) beginBlock() []byte {
	var room [http2.HeaderLength]byte
	return append(l.scratch, room[:]...)
}

func (l *lane) endBlock(block []byte, stream uint32, end bool) {
	l.progress(0)
	l.insert(http2.AppendHeaders(block, len(l.scratch), stream, end))
}

// forwardBlock re-encodes fields and sends them.
func (l *lane) forwardBlock(s *stream, end bool, fields []http2.Field) {
	l.endBlock(l.m.appendFields(l.beginBlock(), l.encoder, fields), s.id, end)
}

// requestTrailers handles a header block after the head of a request.
func (m *multiplex) requestTrailers(s *stream, end bool, fields []http2.Field, whole bool) error {
	switch {
	case s.request.ended:
		return http2.StreamError(s.id, http2.StreamClosed, "header block behind the end")
	case !whole:
		return http2.StreamError(s.id, http2.ProtocolError, "trailers over the limit")
	}
	if err := s.request.endsWith(s.id, end, fields); err != nil {
		return err
	}
	m.toUp.forwardBlock(s, true, s.trailers(fields))
	m.toUp.endMessage(s, true)
	return nil
}

// parseResponse validates the head of a response on a stream. An interim one must not end the stream, and seen counts those
// before it. An error is that of the stream.
func (e *Engine) parseResponse(id uint32, fields []http2.Field, end bool, seen int) (http2.Response, error) {
	response, err := http2.ParseResponse(fields)
	switch {
	case err != nil:
		return response, http2.MessageError(id, err)
	case response.Interim() && end:
		return response, http2.StreamError(id, http2.ProtocolError, "interim response that is the last")
	case response.Interim() && seen == e.config.maxInterim:
		return response, http2.MessageError(id, http2.TooManyInterim)
	}
	return response, nil
}

// fromUpstream handles a decoded header block from upstream.
func (m *multiplex) fromUpstream(id uint32, end bool, fields []http2.Field, whole bool) error {
	s, err := m.toDown.find(id)
	switch {
	case err != nil:
		return err
	case s == nil: // crossed with a reset
		return m.toDown.idleFrame()
	case s.response.ended:
		return http2.StreamError(id, http2.StreamClosed, "header block behind the end")
	case !whole:
		return http2.StreamError(id, http2.ProtocolError, "header block over the limit")
	case s.begun:
		return m.responseTrailers(s, end, fields)
	}
	response, err := m.engine.parseResponse(id, fields, end, s.interim)
	switch {
	case err != nil:
		return err
	case response.Interim():
		s.interim++
		m.toDown.forwardBlock(s, false, fields)
		return nil
	}
	if response.RepeatedLength {
		fields = http2.SingleLength(fields)
	}
	return m.forwardResponse(s, end, fields, response)
}

// forwardResponse sends the head of a final response downstream.
func (m *multiplex) forwardResponse(s *stream, end bool, fields []http2.Field, response http2.Response) error {
	if err := s.beginResponse(&response, end); err != nil {
		return err
	}
	m.squeeze(s)
	m.recordResponse(s, response.Status, m.now().Sub(s.sentAt), fields)
	l := &m.toDown
	block := m.appendResponse(l.beginBlock(), l.encoder, s, fields)
	m.keep(s)
	l.endBlock(block, s.id, end)
	l.endMessage(s, end)
	return nil
}

// responseTrailers forwards the trailers of a response.
func (m *multiplex) responseTrailers(s *stream, end bool, fields []http2.Field) error {
	if err := s.response.endsWith(s.id, end, fields); err != nil {
		return err
	}
	m.squeeze(s)
	for i := range fields {
		if fields[i].Name == "grpc-status" {
			s.recordGRPCStatus(fields[i].Value)
		}
	}
	m.keep(s)
	m.toDown.forwardBlock(s, true, fields)
	m.toDown.endMessage(s, true)
	return nil
}

// malformed resets a malformed request.
func (m *multiplex) malformed(s *stream, err error) error {
	details := envoy.DetailsHTTP2Violation
	if errors.Is(err, http2.ErrField) {
		details = envoy.DetailsHTTP2InvalidField
	}
	var rule http2.Rule
	if errors.As(err, &rule) {
		details = envoy.WithRule(details, rule.Name())
	}
	s.http.Flags, s.http.Details = envoy.FlagDownstreamProtocolError, details
	return m.reject(s, http2.ProtocolError, flow.BadFraming, err)
}

// tooMany resets a stream that exceeds the announced limit. The client may send the request again.
func (m *multiplex) tooMany(s *stream) error {
	s.http.Flags, s.http.Details = envoy.FlagUpstreamOverflow, envoy.DetailsOverload
	return m.reject(s, http2.RefusedStream, flow.Overload, nil)
}

// reject resets a stream that was not forwarded to upstream.
func (m *multiplex) reject(s *stream, code http2.Code, reason flow.Reason, err error) error {
	id := s.id
	m.resetDownstream(id, code)
	m.finish(s, reason, err)
	return m.countReset()
}

// refuse resets a stream above the last one that is served. It has no record: the client sends the request on another
// connection, and it is recorded there.
func (m *multiplex) refuse(id uint32) error {
	m.resetDownstream(id, http2.RefusedStream)
	return m.countReset()
}

func (m *multiplex) resetDownstream(id uint32, code http2.Code) {
	m.streams.noteReset(id)
	m.toDown.insert(http2.AppendResetStream(m.toDown.scratch, id, code))
}

// countReset counts a stream that failed because of downstream.
func (m *multiplex) countReset() error {
	if m.resets.spend(m.now) {
		return nil
	}
	return errManyBadRequests
}

// answer sends a reply in place of upstream, and closes the stream. gRPC clients ignore the HTTP status, so they get
// the status in trailers without a body. While upstream is connected the reply has no body either: upstream accounts
// for downstream's flow-control windows.
func (m *multiplex) answer(s *stream, r *reply, err error) error {
	l := &m.toDown
	text := r.body
	size := int64(len(text))
	if s.http.GRPC || s.head || m.lost == nil || m.window.stream < size || m.window.connection < size {
		text = ""
	}
	block := s.appendReply(l.beginBlock(), l.encoder, r, m.Peers.server(), m.now(), text != "")
	if s.made != nil {
		block = m.appendMade(block, l.encoder, s)
	}
	l.endBlock(block, s.id, text == "")
	if text != "" {
		m.window.connection -= size
		s.response.got = size
		l.insert(append(http2.Header{Length: len(text), Type: http2.Data, Flags: http2.EndStream, Stream: s.id}.Append(l.scratch), text...))
	}
	if !s.request.ended {
		m.resetDownstream(s.id, http2.NoError) // stop the rest of the request (RFC 9113 §8.1)
	}
	m.finish(s, r.reason, err)
	if r.reason == flow.HeadTooLarge {
		return m.countReset()
	}
	return nil
}
