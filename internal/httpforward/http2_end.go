package httpforward

import (
	"errors"
	"time"

	"github.com/pillion-proxy/pillion/internal/envoy"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/http2"
)

// breach deals with an error that parsing src of l has brought. It reports whether the connection goes on.
func (m *multiplex) breach(l *lane, err error) bool {
	if err == errNotHTTP2 {
		m.opaque()
		return false
	}
	var breach *http2.Error
	if !errors.As(err, &breach) || breach.Stream == 0 || breach.Stream > m.streams.last {
		m.fail(l, err)
		return false
	}
	s := m.streams.find(breach.Stream)
	if l.fromDown() {
		err = m.breachOfDownstream(s, breach)
	} else {
		err = m.breachOfUpstream(s, breach)
	}
	if err != nil {
		m.fail(l, err)
	}
	return m.over == goesOn
}

// breachOfDownstream resets a stream on both sides. s is nil for a closed one.
func (m *multiplex) breachOfDownstream(s *stream, breach *http2.Error) error {
	if s == nil {
		m.resetDownstream(breach.Stream, breach.Code)
		return m.countReset()
	}
	m.resetUpstream(breach.Stream, http2.Cancel)
	s.record.HTTP.Flags, s.record.HTTP.Details = envoy.FlagDownstreamProtocolError, envoy.DetailsHTTP2Violation
	return m.reject(s, breach.Code, flow.BadFraming, breach)
}

// breachOfUpstream resets a stream upstream, and answers for it downstream if that is still possible. s is nil for a
// closed one: upstream can make us say that without end.
func (m *multiplex) breachOfUpstream(s *stream, breach *http2.Error) error {
	m.resetUpstream(breach.Stream, breach.Code)
	if s == nil {
		return m.toDown.idleFrame()
	}
	m.abandon(s, &replyBadResponse, flow.BadResponse, breach)
	return nil
}

// abandon ends a stream for which nothing more comes from upstream.
func (m *multiplex) abandon(s *stream, r *reply, begun flow.Reason, err error) {
	if !s.begun {
		_ = m.answer(s, r, err) // it is an error for requests alone
		return
	}
	if s.response.ended {
		m.resetDownstream(s.id, http2.NoError)
		m.finish(s, flow.Completed, nil)
		return
	}
	s.record.HTTP.Flags = r.flags
	s.record.HTTP.Details = envoy.ResetAfterResponse(envoy.ResetByTermination)
	if begun == flow.BadResponse {
		s.record.HTTP.Details = envoy.ResetAfterResponse(envoy.ResetByProtocolError)
	}
	m.resetDownstream(s.id, http2.InternalError)
	m.finish(s, begun, err)
}

func (m *multiplex) resetUpstream(id uint32, code http2.Code) {
	m.toUp.insert(http2.AppendResetStream(m.toUp.scratch, id, code))
}

// fail ends the connection for a breach by src of l, which is told.
func (m *multiplex) fail(l *lane, err error) {
	code := http2.ProtocolError
	text := ""
	var breach *http2.Error
	if errors.As(err, &breach) {
		code, text = breach.Code, breach.Text
	}
	if !l.fromDown() {
		m.toUp.insert(http2.AppendGoAway(m.toUp.scratch, 0, code, text))
		m.toUp.flush()
		m.upstreamLost(&replyBadResponse, flow.BadResponse, err)
		return
	}
	reason := flow.BadFraming
	if code == http2.EnhanceYourCalm {
		reason = flow.Overload
	}
	m.leave(code, text, reason, err)
}

// leave ends the connection by our own decision: streams are given up, downstream is told, and upstream is cut. When
// downstream is at fault and has no stream whose record could tell, what would have been a request has one.
func (m *multiplex) leave(code http2.Code, text string, reason flow.Reason, err error) {
	open := m.streams.active > 0
	m.closeAll(reason, err)
	if !open && code != http2.NoError {
		s := m.takeStream(0)
		s.blame(reason, err)
		s.close(m, nil)
	}
	m.sayGoAway(code, text)
	if m.up != nil && open {
		m.up.Reset()
		m.loseUpstream()
	}
	m.over = parts
}

// sayGoAway tells downstream which streams were served. A server speaks of its settings first.
func (m *multiplex) sayGoAway(code http2.Code, text string) {
	m.introduce()
	m.goneAway = min(m.goneAway, m.streams.last)
	m.toDown.insert(http2.AppendGoAway(m.toDown.scratch, m.goneAway, code, text))
}

// introduce sends the first Settings frame in upstream's place, if it has sent none.
func (m *multiplex) introduce() {
	if l := &m.toDown; !l.settled {
		l.say(wishes{})
	}
}

func (m *multiplex) loseUpstream() {
	m.up, m.toUp.dst, m.toDown.src = nil, nil, nil
}

// unreachable makes the connection one on which all requests are told that upstream cannot be reached.
func (m *multiplex) unreachable(err error) {
	r := dialReply(err)
	m.lost, m.lostErr, m.lostAt = &r, err, m.now()
	m.introduce()
}

// upstreamLost ends the connection when upstream has: requests without a response are answered, others are cut off, and
// downstream goes elsewhere with the next ones.
func (m *multiplex) upstreamLost(r *reply, begun flow.Reason, err error) {
	m.up.Close()
	m.loseUpstream()
	m.lost, m.lostErr = r, err
	m.introduce()
	for range m.toUp.unacked {
		m.toDown.insert(appendSettingsAck(m.toDown.scratch))
	}
	m.toUp.unacked = m.toUp.unacked[:0]
	for _, s := range m.streams.open {
		m.abandon(s, r, begun, err)
	}
	if m.goneAway == http2.MaxStream {
		m.sayGoAway(http2.NoError, "")
	}
	m.over = parts
}

// finishLost ends a connection on which requests were told that upstream cannot be reached, so that the next ones come
// on another, for which upstream is dialled again.
func (m *multiplex) finishLost() {
	if m.answered && !m.toUp.block.open {
		m.sayGoAway(http2.NoError, "")
		m.over = parts
	}
}

// goAway passes on that no more streams are served. Those that upstream does not serve are ended.
func (l *lane) goAway(b []byte) error {
	if l.fromDown() {
		l.out.Append(b) // it speaks of pushes, and of errors
		return l.idleFrame()
	}
	m := l.m
	m.goneAway = min(m.goneAway, http2.Uint31(b[http2.HeaderLength:]))
	http2.PutUint32(b[http2.HeaderLength:], m.goneAway) // what downstream was told before may not be exceeded
	l.out.Append(b)
	for id, s := range m.streams.open {
		if id > m.goneAway {
			m.resetDownstream(id, http2.RefusedStream)
			s.record.HTTP.Flags, s.record.HTTP.Details = envoy.FlagUpstreamRemoteReset, resetDetails(s, http2.RefusedStream)
			m.finish(s, flow.UpstreamReset, nil)
		}
	}
	return l.idleFrame()
}

// leaving is how far the end by a drain has come.
type leaving uint8

const (
	stays leaving = iota
	endAnnounced
	endTold
)

// leaveGrace is how long new streams are served after the end was announced: those that were on their way.
const leaveGrace = time.Second

// drain ends the connection when the engine drains: first downstream is asked to send no more requests, then told which
// was the last, and when all are answered the connection ends.
func (m *multiplex) drain() {
	switch {
	case m.leaving == stays:
		if m.engine.state.Load() != draining || !m.toDown.settled {
			return
		}
		if m.goneAway == http2.MaxStream {
			m.toDown.insert(http2.AppendGoAway(m.toDown.scratch, http2.MaxStream, http2.NoError, ""))
			m.toDown.flush()
		}
		m.leaving, m.leaveAt = endAnnounced, m.now().Add(leaveGrace)
	case m.leaving == endAnnounced && !m.now().Before(m.leaveAt):
		m.late(leaveLimit)
	case m.leaving == endTold && m.streams.active == 0 && m.toDown.idle():
		m.over = parts
	}
}

// limit is a limit of time.
type limit uint8

const (
	noLimit limit = iota
	idleLimit
	halfCloseLimit
	leaveLimit
	requestLimit
	headLimit
	lostLimit
)

// lostTime is how long a connection without an upstream waits for a request to answer.
const lostTime = 5 * time.Second

// deadline returns when the coming wait has to end, and why. A zero time is no deadline, and the ordinary case, in which
// nobody asks for the time.
func (m *multiplex) deadline() (at time.Time, why limit) {
	config := &m.engine.config
	sooner := func(limit limit, from time.Time, after time.Duration) {
		if t := from.Add(after); why == noLimit || t.Before(at) {
			at, why = t, limit
		}
	}
	if limit, after := m.quietLimit(); after > 0 {
		if m.lastMove.IsZero() {
			m.lastMove = m.now()
		}
		sooner(limit, m.lastMove, after)
	}
	if m.leaving == endAnnounced {
		sooner(leaveLimit, m.leaveAt, 0)
	}
	if len(m.waiting) > 0 {
		if s, since := m.longestWait(); s != nil {
			sooner(requestLimit, since, config.RequestTimeout)
		}
	}
	if config.HeadTimeout > 0 {
		if since := m.toUp.headSince(); !since.IsZero() {
			sooner(headLimit, since, config.HeadTimeout)
		}
	}
	if m.lost != nil {
		sooner(lostLimit, m.lostAt, lostTime)
	}
	return at, why
}

// quietLimit is how long nothing may move.
func (m *multiplex) quietLimit() (limit, time.Duration) {
	config := &m.engine.config
	if idle, half := config.IdleTimeout, config.HalfCloseTimeout; m.downEnded && half > 0 && (idle <= 0 || half < idle) {
		return halfCloseLimit, half
	}
	return idleLimit, config.IdleTimeout
}

// late does what a limit calls for that has passed.
func (m *multiplex) late(why limit) {
	switch why {
	case idleLimit:
		m.leave(http2.NoError, "idle", flow.IdleTimeout, nil)
	case halfCloseLimit:
		m.leave(http2.NoError, "half-closed", flow.HalfCloseTimeout, nil)
	case headLimit:
		m.leave(http2.EnhanceYourCalm, "header block takes too long", flow.HeadTimeout, nil)
	case lostLimit:
		m.leave(http2.NoError, "", flow.UpstreamUnreachable, nil)
	case leaveLimit:
		if m.goneAway > m.streams.last { // else upstream has said it
			m.sayGoAway(http2.NoError, "")
		}
		m.leaving = endTold
	case requestLimit:
		m.requestsLate()
	}
}

// requestsLate answers the requests that have waited too long for a response.
func (m *multiplex) requestsLate() {
	for {
		s, since := m.longestWait()
		if s == nil || m.now().Sub(since) < m.engine.config.RequestTimeout {
			return
		}
		m.resetUpstream(s.id, http2.Cancel)
		_ = m.answer(s, &replyRequestTimeout, nil) // it is an error for requests alone
	}
}

// closeAll closes the records of all open streams.
func (m *multiplex) closeAll(reason flow.Reason, err error) {
	for _, s := range m.streams.open {
		s.blame(reason, err)
		m.streams.remove(s)
		s.close(m, nil)
	}
}

// blame says why a stream ends with its connection.
func (s *stream) blame(reason flow.Reason, err error) {
	r := &s.record.HTTP
	switch reason {
	case flow.DownstreamLeft:
		r.Flags, r.Details = envoy.FlagDownstreamConnectionTermination, envoy.DetailsDownstreamLeft
	case flow.BadFraming, flow.Overload:
		r.Flags, r.Details = envoy.FlagDownstreamProtocolError, envoy.DetailsHTTP2Violation
	case flow.BadResponse:
		r.Flags, r.Details = envoy.FlagUpstreamProtocolError, replyBadResponse.details
	case flow.HeadTimeout:
		r.Details = replyHeadTimeout.details
	}
	s.reason, s.err = reason, err
}
