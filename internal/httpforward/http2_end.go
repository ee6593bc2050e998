package httpforward

import (
	"errors"
	"slices"
	"time"

	"github.com/pillion-proxy/pillion/internal/envoy"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/http2"
)

// handleError handles an error from parsing l's source. It reports whether the connection continues.
func (m *multiplex) handleError(l *lane, err error) bool {
	if err == errNotHTTP2 && !m.onlyHTTP() {
		m.relayOpaque()
		return false
	}
	var violation *http2.Error
	if !errors.As(err, &violation) || violation.Stream == 0 || violation.Stream > m.streams.last {
		m.fail(l, err)
		return false
	}
	s := m.streams.find(violation.Stream)
	if l.fromDown() {
		err = m.downstreamError(s, violation)
	} else {
		err = m.upstreamError(s, violation)
	}
	if err != nil {
		m.fail(l, err)
	}
	return m.over == running
}

// downstreamError resets a stream on both sides. s is nil for a closed stream.
func (m *multiplex) downstreamError(s *stream, violation *http2.Error) error {
	if s == nil {
		m.resetDownstream(violation.Stream, violation.Code)
		return m.countReset()
	}
	m.resetUpstream(violation.Stream, http2.Cancel)
	s.http.Flags = envoy.FlagDownstreamProtocolError
	s.http.Details = envoy.WithRule(envoy.DetailsHTTP2Violation, ruleOf(violation))
	return m.reject(s, violation.Code, flow.BadFraming, violation)
}

// upstreamError resets a stream upstream, and answers downstream if that is still possible. s is nil for a closed
// stream; that case counts as a frame without effect, because upstream can provoke it without limit.
func (m *multiplex) upstreamError(s *stream, violation *http2.Error) error {
	m.resetUpstream(violation.Stream, violation.Code)
	if s == nil {
		return m.toDown.idleFrame()
	}
	r := replyBadResponse
	r.details = envoy.ProtocolErrorBeforeResponse(ruleOf(violation))
	if s.begun {
		r.details = envoy.ProtocolErrorAfterResponse(ruleOf(violation))
	}
	m.abandon(s, &r, flow.BadResponse, violation)
	return nil
}

// ruleOf returns what details say about a violation: the rule's name, or the description without a rule.
func ruleOf(violation *http2.Error) string {
	if violation.Rule != 0 {
		return violation.Rule.Name()
	}
	return violation.Text
}

// abandon ends a stream that will get no more frames from upstream.
func (m *multiplex) abandon(s *stream, r *reply, begun flow.Reason, err error) {
	if !s.begun {
		s.record.TransportFailure = rejection(err)
		_ = m.answer(s, r, err) // fails only for a rejected request
		return
	}
	if s.response.ended {
		m.resetDownstream(s.id, http2.NoError)
		m.finish(s, flow.Completed, nil)
		return
	}
	s.http.Flags, s.http.Details = r.flags, r.details
	if envoy.IsResetBeforeResponse(r.details) {
		s.http.Details = envoy.ResetAfterResponse(envoy.ResetByTermination)
		if begun == flow.BadResponse {
			s.http.Details = envoy.ResetAfterResponse(envoy.ResetByProtocolError)
		}
	}
	m.resetDownstream(s.id, http2.InternalError)
	m.finish(s, begun, err)
}

func (m *multiplex) resetUpstream(id uint32, code http2.Code) {
	m.toUp.insert(http2.AppendResetStream(m.toUp.scratch, id, code))
}

// goAwayFor returns the code and the debug data of the GOAWAY frame that reports an error to the peer that made it.
func goAwayFor(err error) (http2.Code, string) {
	var violation *http2.Error
	if errors.As(err, &violation) {
		return violation.Code, violation.Text
	}
	return http2.ProtocolError, ""
}

// recordFault reports an error of downstream that belongs to no stream. requests is when the last requests arrived.
func (e *Engine) recordFault(connection *flow.Record, requests time.Time, reason flow.Reason, err error) {
	s := takeStream(e, &Connection{Record: connection}, 0, requests)
	s.setFailure(reason, err)
	s.close(e.config.Flows, nil)
}

// fail ends the connection because of an error by src of l, and reports the error to it.
func (m *multiplex) fail(l *lane, err error) {
	code, text := goAwayFor(err)
	if !l.fromDown() {
		m.toUp.insert(http2.AppendGoAway(m.toUp.scratch, 0, code, text))
		m.toUp.flush()
		m.upstreamLost(&replyBadResponse, flow.BadResponse, err)
		return
	}
	reason := flow.BadFraming
	if code == http2.EnhanceYourCalm {
		reason, m.flooded = flow.Overload, slices.Contains(floods[:], err)
	}
	m.terminate(code, text, reason, err)
}

// terminate ends the connection on our own decision: it closes all streams, sends GOAWAY downstream, and resets
// upstream. If downstream is at fault and has no open stream whose record could carry the reason, a record is opened
// for it.
func (m *multiplex) terminate(code http2.Code, text string, reason flow.Reason, err error) {
	open := m.streams.active > 0
	m.closeAll(reason, err)
	if !open && code != http2.NoError {
		m.engine.recordFault(m.Record, m.requests, reason, err)
	}
	m.sendGoAway(code, text)
	if m.up != nil && open {
		m.up.Reset()
		m.detachUpstream()
	}
	m.over = closesInOrder
}

// sendGoAway announces to downstream the last stream that is served. A server's SETTINGS come first.
func (m *multiplex) sendGoAway(code http2.Code, text string) {
	m.ensureSettings()
	m.lastServed = min(m.lastServed, m.streams.last)
	m.toDown.insert(http2.AppendGoAway(m.toDown.scratch, m.lastServed, code, text))
}

// ensureSettings sends the first SETTINGS frame in place of upstream, unless upstream has sent its own.
func (m *multiplex) ensureSettings() {
	if l := &m.toDown; !l.settingsSent {
		l.sendSettings(settingsFrame{})
	}
}

func (m *multiplex) detachUpstream() {
	m.up, m.toUp.dst, m.toDown.src = nil, nil, nil
}

// unreachable records a failed dial: all requests get the reply for err.
func (m *multiplex) unreachable(err error) {
	r := dialReply(err, m.attempts > 1)
	m.lost, m.lostErr, m.lostAt = &r, err, m.now()
	m.ensureSettings()
}

// upstreamLost ends the connection after upstream has ended: requests without a response are answered, others are
// reset, and GOAWAY makes downstream reconnect.
func (m *multiplex) upstreamLost(r *reply, begun flow.Reason, err error) {
	m.up.Close()
	m.detachUpstream()
	m.lost, m.lostErr, m.lostAt = r, err, m.now()
	m.ensureSettings()
	for range m.toUp.unacked {
		m.toDown.insert(appendSettingsAck(m.toDown.scratch))
	}
	m.toUp.unacked = m.toUp.unacked[:0]
	if len(m.streams.open) == 0 && rejection(err) != "" {
		m.toDown.srcErr = nil // as after a failed dial: the first request is read and answered
		return
	}
	abandoned := 0
	for _, s := range m.streams.open {
		m.abandon(s, r, begun, err)
		if abandoned++; abandoned%closeTurn == 0 {
			m.w.Pause(m.Down)
		}
	}
	if m.lastServed == http2.MaxStream {
		m.sendGoAway(http2.NoError, "")
	}
	m.over = closesInOrder
}

// finishLost ends a connection without upstream once a request was answered, so that downstream reconnects and upstream
// is dialled again.
func (m *multiplex) finishLost() {
	if m.answered && !m.toUp.block.open {
		m.sendGoAway(http2.NoError, "")
		m.over = closesInOrder
	}
}

// goAway forwards GOAWAY. It ends the streams that upstream does not serve.
func (l *lane) goAway(b []byte) error {
	if l.fromDown() {
		l.out.Append(b) // about pushes and errors only
		return l.idleFrame()
	}
	m := l.m
	m.lastServed = min(m.lastServed, http2.Uint31(b[http2.HeaderLength:]))
	http2.PutUint32(b[http2.HeaderLength:], m.lastServed) // the announced stream ID must not increase
	l.out.Append(b)
	for id, s := range m.streams.open {
		if id > m.lastServed {
			m.resetDownstream(id, http2.RefusedStream)
			s.http.Flags, s.http.Details = envoy.FlagUpstreamRemoteReset, resetDetails(s, http2.RefusedStream)
			m.finish(s, flow.UpstreamReset, nil)
		}
	}
	return l.idleFrame()
}

// drainPhase is the progress of a drain.
type drainPhase uint8

const (
	notDraining drainPhase = iota
	goAwayAnnounced
	goAwayFinal
)

// drainGrace is how long new streams are still served after the first GOAWAY, because they may be in flight.
const drainGrace = time.Second

// drain ends this connection when that is requested: a first GOAWAY asks downstream to open no more streams, a second
// one announces the last stream that is served, and the connection closes when all streams have ended (RFC 9113 §6.8).
func (m *multiplex) drain() {
	switch {
	case m.drainPhase == notDraining:
		m.drainRequested = m.drainRequested || m.engine.Draining() || m.retired() || m.up != nil && m.up.Retired()
		if !m.drainRequested || !m.toDown.settingsSent {
			return
		}
		if m.lastServed == http2.MaxStream {
			m.toDown.insert(http2.AppendGoAway(m.toDown.scratch, http2.MaxStream, http2.NoError, ""))
			m.toDown.flush()
		}
		m.drainPhase, m.finalGoAwayAt = goAwayAnnounced, m.now().Add(drainGrace)
	case m.drainPhase == goAwayAnnounced && !m.now().Before(m.finalGoAwayAt):
		m.timedOut(drainLimit)
	case m.drainPhase == goAwayFinal && m.streams.active == 0 && m.toDown.idle():
		m.over = closesInOrder
	}
}

// limit is a kind of timeout.
type limit uint8

const (
	noLimit limit = iota
	idleLimit
	halfCloseLimit
	drainLimit
	requestLimit
	routeLimit
	headLimit
	lostLimit
)

// lostTime is how long a connection without upstream waits for a request to answer.
const lostTime = 5 * time.Second

// deadline returns when the next wait has to end, and for which limit. A zero time means no deadline. In that common
// case the clock is not read.
func (m *multiplex) deadline() (at time.Time, why limit) {
	config := m.settings
	sooner := func(limit limit, from time.Time, after time.Duration) {
		if t := from.Add(after); why == noLimit || t.Before(at) {
			at, why = t, limit
		}
	}
	if limit, after := quietLimit(config, m.downEnded, m.streams.active > 0); after > 0 {
		if m.lastMove.IsZero() {
			m.lastMove = m.now()
		}
		sooner(limit, m.lastMove, after)
	}
	if m.drainPhase == goAwayAnnounced {
		sooner(drainLimit, m.finalGoAwayAt, 0)
	}
	if len(m.waiting) > 0 {
		if s, since := m.longestWait(); s != nil {
			sooner(requestLimit, since, config.RequestTimeout)
		}
	}
	if !m.checkAt.IsZero() {
		sooner(routeLimit, m.checkAt, 0)
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

// quietLimit returns how long a connection may be idle. halfClosed is whether downstream has half-closed, and
// busy whether there are requests.
func quietLimit(config *Settings, halfClosed, busy bool) (limit, time.Duration) {
	idle, half := config.IdleTimeout, config.HalfCloseTimeout
	if !busy {
		idle = config.betweenRequests()
	}
	if halfClosed && half > 0 && (idle <= 0 || half < idle) {
		return halfCloseLimit, half
	}
	return idleLimit, idle
}

// timedOut handles an expired limit.
func (m *multiplex) timedOut(why limit) {
	switch why {
	case idleLimit:
		m.terminate(http2.NoError, "idle", flow.IdleTimeout, nil)
	case halfCloseLimit:
		m.terminate(http2.NoError, "half-closed", flow.HalfCloseTimeout, nil)
	case headLimit:
		m.terminate(http2.EnhanceYourCalm, "header block takes too long", flow.HeadTimeout, nil)
	case lostLimit:
		m.terminate(http2.NoError, "", flow.UpstreamUnreachable, nil)
	case drainLimit:
		if m.lastServed > m.streams.last { // otherwise upstream's GOAWAY was forwarded
			m.sendGoAway(http2.NoError, "")
		}
		m.drainPhase = goAwayFinal
	case requestLimit:
		m.requestsTimedOut()
	case routeLimit:
		m.enforceLimits()
	}
}

// requestsTimedOut answers the requests whose RequestTimeout has passed.
func (m *multiplex) requestsTimedOut() {
	for {
		s, since := m.longestWait()
		if s == nil || m.now().Sub(since) < m.settings.RequestTimeout {
			return
		}
		m.resetUpstream(s.id, http2.Cancel)
		_ = m.answer(s, &replyRequestTimeout, nil) // fails only for a rejected request
	}
}

// closeTurn is how many streams are closed in one turn. The sinks of a record take some microseconds.
const closeTurn = 16

// closeAll closes the records of all open streams. Several turns may pass.
func (m *multiplex) closeAll(reason flow.Reason, err error) {
	closed := 0
	for _, s := range m.streams.open {
		s.setFailure(reason, err)
		m.streams.remove(s)
		m.closeStream(s, nil)
		if closed++; closed%closeTurn == 0 {
			m.w.Pause(m.Down)
		}
	}
}
