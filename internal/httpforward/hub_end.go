package httpforward

import (
	"errors"
	"slices"
	"time"

	"github.com/pillion-proxy/pillion/internal/envoy"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/http2"
)

// handleError handles an error from a frame of l. It reports whether the leg goes on.
func (h *hub) handleError(l *leg, err error) bool {
	var violation *http2.Error
	if !errors.As(err, &violation) || violation.Stream == 0 {
		if l.isDown() {
			h.fail(err)
			return false
		}
		code := http2.ProtocolError
		if violation != nil {
			code = violation.Code
		}
		if l.http1 == nil {
			l.out = http2.AppendGoAway(l.out, 0, code, "")
			l.flush()
		}
		l.readErr = err
		return false
	}
	c, unknown := l.find(violation.Stream)
	switch {
	case unknown != nil:
		c, err = nil, unknown
	case l.isDown():
		err = h.downstreamError(c, violation)
	default:
		err = h.upstreamError(l, c, violation)
	}
	if err != nil {
		return h.handleError(l, err)
	}
	return h.over == running
}

// downstreamError resets a stream on both sides. c is nil for a closed stream.
func (h *hub) downstreamError(c *call, violation *http2.Error) error {
	if c == nil {
		h.resetDownstream(violation.Stream, violation.Code)
		return h.countReset()
	}
	h.cancel(c, http2.Cancel)
	c.http.Flags = envoy.FlagDownstreamProtocolError
	c.http.Details = envoy.WithRule(envoy.DetailsHTTP2Violation, ruleOf(violation))
	return h.reject(c, violation.Code, flow.BadFraming, violation)
}

// upstreamError resets a stream upstream, and answers downstream if that is still possible. c is nil for a closed stream.
func (h *hub) upstreamError(l *leg, c *call, violation *http2.Error) error {
	if c == nil {
		l.reset(violation.Stream, violation.Code)
		return l.idleFrame()
	}
	l.reset(c.upID, violation.Code)
	h.detach(c)
	r := replyBadResponse
	r.details = envoy.ProtocolErrorBeforeResponse(ruleOf(violation))
	if c.begun {
		r.details = envoy.ProtocolErrorAfterResponse(ruleOf(violation))
		h.abandon(c, &r, flow.BadResponse, violation)
		return nil
	}
	h.failed(c, failedReset, &r, violation)
	return nil
}

// fail ends the connection because of an error by downstream, and reports the error to it.
func (h *hub) fail(err error) {
	code, text := goAwayFor(err)
	reason := flow.BadFraming
	if code == http2.EnhanceYourCalm {
		reason, h.flooded = flow.Overload, slices.Contains(floods[:], err)
	}
	h.terminate(code, text, reason, err)
}

// terminate ends the connection on our own decision: it closes all streams, and sends GOAWAY downstream. If downstream is at
// fault and has no open stream whose record could carry the reason, a record is opened for it.
func (h *hub) terminate(code http2.Code, text string, reason flow.Reason, err error) {
	open := h.streams.active > 0
	h.closeAll(reason, err)
	if !open && code != http2.NoError {
		h.engine.recordFault(h.Record, h.requests, reason, err)
	}
	h.sendGoAway(code, text)
	h.over = closesInOrder
}

// sendGoAway announces to downstream the last stream that is served.
func (h *hub) sendGoAway(code http2.Code, text string) {
	h.lastServed = min(h.lastServed, h.streams.last)
	h.down.out = http2.AppendGoAway(h.down.out, h.lastServed, code, text)
}

// closeAll closes the records of all open streams. Several turns may pass.
func (h *hub) closeAll(reason flow.Reason, err error) {
	h.closed = true
	closed := 0
	for _, s := range h.streams.open {
		c := s.call
		s.setFailure(reason, err)
		c.stopAsking()
		h.cancel(c, http2.Cancel)
		c.place.leave()
		h.dropMirrors(c)
		h.streams.remove(s)
		c.closed = true
		h.freeQueue(&c.req)
		h.freeQueue(&c.resp)
		h.closeStream(s, nil)
		if closed++; closed%closeTurn == 0 {
			h.w.Pause(h.Down)
		}
	}
}

// drain ends this connection when that is requested: see multiplex.drain.
func (h *hub) drain() {
	switch {
	case h.drainPhase == notDraining:
		h.drainRequested = h.drainRequested || h.engine.Draining() || h.retired()
		if !h.drainRequested {
			return
		}
		h.down.out = http2.AppendGoAway(h.down.out, http2.MaxStream, http2.NoError, "")
		h.down.flush()
		h.drainPhase, h.finalGoAwayAt = goAwayAnnounced, h.now().Add(drainGrace)
	case h.drainPhase == goAwayAnnounced && !h.now().Before(h.finalGoAwayAt):
		h.timedOut(drainLimit)
	case h.drainPhase == goAwayFinal && h.streams.active == 0 && h.down.idle():
		h.over = closesInOrder
	}
}

// deadline returns when the next wait has to end, and for which limit. A zero time means no deadline.
func (h *hub) deadline() (at time.Time, why limit) {
	sooner := func(limit limit, t time.Time) {
		if why == noLimit || t.Before(at) {
			at, why = t, limit
		}
	}
	if limit, after := quietLimit(h.settings, h.downEnded, h.streams.active > 0); after > 0 {
		if h.lastMove.IsZero() {
			h.lastMove = h.now()
		}
		sooner(limit, h.lastMove.Add(after))
	}
	if h.drainPhase == goAwayAnnounced {
		sooner(drainLimit, h.finalGoAwayAt)
	}
	if !h.checkAt.IsZero() {
		sooner(routeLimit, h.checkAt)
	}
	if h.settings.HeadTimeout > 0 {
		if since := h.down.headSince(); !since.IsZero() {
			sooner(headLimit, since.Add(h.settings.HeadTimeout))
		}
	}
	return at, why
}

// timedOut handles an expired limit.
func (h *hub) timedOut(why limit) {
	switch why {
	case idleLimit:
		if h.settings.edge != nil && h.endSilent() {
			return
		}
		h.terminate(http2.NoError, "idle", flow.IdleTimeout, nil)
	case halfCloseLimit:
		h.terminate(http2.NoError, "half-closed", flow.HalfCloseTimeout, nil)
	case headLimit:
		h.terminate(http2.EnhanceYourCalm, "header block takes too long", flow.HeadTimeout, nil)
	case drainLimit:
		h.sendGoAway(http2.NoError, "")
		h.drainPhase = goAwayFinal
	case routeLimit:
		h.check()
	}
}
