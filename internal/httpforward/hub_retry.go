package httpforward

import (
	"errors"
	"time"

	"github.com/pillion-proxy/pillion/internal/envoy"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/http2"
)

// The attempts of a hub's requests, and their limits.

// repeatable reports whether a request can be sent again: all of it that has come is kept, and downstream got no byte of a
// response.
func (h *hub) repeatable(c *call) bool {
	return c.req.keep && !c.begun && !c.replied && c.interim == 0
}

// permitsRetry takes a place for another attempt. It reports whether one is left, and has a place. The record has what is not.
func (c *call) permitsRetry() bool {
	c.http.Exhausted = c.left == 0
	if c.left == 0 {
		return false
	}
	c.http.Overflowed = !c.place.take(c.lease)
	return !c.http.Overflowed
}

// failed goes on after an attempt that got no response: with the next attempt, or with the reply. The call has left its leg.
func (h *hub) failed(c *call, f failure, r *reply, err error) {
	if !h.tryAgain(c, f, r.reason) {
		h.abandon(c, r, r.reason, err)
	}
}

// tryAgain begins the next attempt after one that got no response, if the policy has one for that.
func (h *hub) tryAgain(c *call, f failure, reason flow.Reason) bool {
	untouched := c.sentAt.IsZero()
	if c.policy == nil || !h.repeatable(c) || !retriesFailure(c.policy, f, untouched) || !c.permitsRetry() {
		return false
	}
	h.retry(c, reason)
	return true
}

// retriesResponse begins another attempt if the policy asks for one after a response, of which end is the whole. Otherwise this is
// the last.
func (h *hub) retriesResponse(c *call, status int, end bool, fields []http2.Field) bool {
	if c.policy == nil || !h.repeatable(c) {
		return false
	}
	h.responded = ofBlock(fields)
	if !retriesResponse(c.policy, status, &h.responded) || !c.permitsRetry() {
		return false
	}
	grpc := grpcStatusOf(&h.responded)
	if end && c.req.done && c.leg.http1 == nil {
		h.detach(c) // the stream is closed
	} else {
		h.cancel(c, http2.Cancel)
	}
	if lease := c.lease; lease != nil {
		c.lease = nil
		lease.End(Outcome{Status: status, GRPC: grpc, Reason: flow.Completed, Connected: true, Duration: time.Since(c.began)})
	}
	h.retry(c, flow.Completed)
	return true
}

// retry begins the pause before the next attempt.
func (h *hub) retry(c *call, reason flow.Reason) {
	c.endLease(reason)
	c.left--
	c.retries++
	c.previous = c.decision
	c.sentAt, c.tryEnd, c.headEnd = time.Time{}, time.Time{}, time.Time{}
	h.engine.config.Pool.Stats.Retried.Add(1)
	h.pause(c, max(backOff(c.policy, c.retries), time.Nanosecond))
}

// pause lets a call wait.
func (h *hub) pause(c *call, d time.Duration) {
	c.resumeAt = h.now().Add(d)
	h.watch(c.resumeAt)
}

// resume goes on after a pause: with a decision that was delayed, or with the next attempt.
func (h *hub) resume(c *call) {
	c.resumeAt = time.Time{}
	if c.retries == 0 {
		h.follow(c)
		return
	}
	h.decide(c)
}

// refused sends a request again whose stream an upstream has refused without processing it: once by the same decision, on
// another connection, and then by the policy.
func (h *hub) refused(c *call) {
	h.detach(c)
	if h.repeatable(c) && c.resends < maxResends {
		h.sendAgain(c)
		return
	}
	r := replyUpstreamReset(http2.RefusedStream)
	h.failed(c, failedRefused, &r, nil)
}

// sendAgain sends a request by the same decision, on another connection.
func (h *hub) sendAgain(c *call) {
	c.resends++
	c.sentAt = time.Time{}
	h.engine.config.Pool.Stats.Retried.Add(1)
	h.dispatch(c)
}

// replyUpstreamReset returns the reply in place of a response whose stream upstream has reset.
func replyUpstreamReset(code http2.Code) reply {
	r := resetReply(503, flow.UpstreamReset, envoy.FlagUpstreamRemoteReset, envoy.ResetByRemote, "")
	if code == http2.RefusedStream {
		r = resetReply(503, flow.UpstreamReset, envoy.FlagUpstreamRemoteReset, envoy.ResetByRemoteRefusingToStream, "")
	}
	return r
}

// cancel resets the stream of a call upstream.
func (h *hub) cancel(c *call, code http2.Code) {
	if l := c.openLeg(); l != nil && !(c.req.done && c.response.ended) {
		l.reset(c.upID, code)
	}
	h.detach(c)
}

// resetStream handles the reset of a stream.
func (h *hub) resetStream(l *leg, id uint32, code http2.Code) error {
	c, err := l.find(id)
	if err != nil {
		return err
	}
	if c == nil {
		return l.idleFrame() // resets crossed
	}
	why := http2.StreamError(id, code, "reset by its peer")
	switch {
	case l.isDown():
		return h.left(c, why)
	case c.response.ended: // the rest of the request is not wanted
		h.detach(c)
		c.req.done = true
		h.freeQueue(&c.req)
		h.completed(c)
	case code == http2.RefusedStream && !c.begun:
		h.refused(c)
	default:
		h.detach(c)
		switch r := replyUpstreamReset(code); {
		case !c.begun && h.tryAgain(c, failedReset, r.reason):
			return nil
		case !c.begun && !(c.http.GRPC && code == http2.Cancel):
			h.abandon(c, &r, r.reason, why)
			return nil
		}
		// A gRPC server cancels a call at its deadline, and the client reads that from the code; a reply would report that the server
		// is not available.
		c.http.Flags, c.http.Details = envoy.FlagUpstreamRemoteReset, resetDetails(c.stream, code)
		h.resetDownstream(c.id, code)
		h.finish(c, flow.UpstreamReset, why)
	}
	return nil
}

// left ends a call that downstream has reset.
func (h *hub) left(c *call, why error) error {
	begun := c.begun || c.replied
	h.cancel(c, http2.Cancel)
	if c.replied && c.resp.done {
		h.finish(c, c.reason, c.err)
		return nil
	}
	c.http.Flags, c.http.Details = envoy.FlagDownstreamConnectionTermination, envoy.DetailsDownstreamLeft
	h.finish(c, flow.DownstreamLeft, why)
	if !begun && !h.resets.spend(h.now) {
		return errManyResets
	}
	return nil
}

// abandon ends a call that will get no more frames from upstream, and that has left its leg.
func (h *hub) abandon(c *call, r *reply, begun flow.Reason, err error) {
	switch {
	case c.response.ended: // what has arrived is still delivered
		c.req.done = true
		h.freeQueue(&c.req)
		h.completed(c)
		return
	case !c.begun:
		c.record.TransportFailure = rejection(err)
		_ = h.answer(c, r, err) // fails only for a rejected request
		return
	}
	c.http.Flags, c.http.Details = r.flags, r.details
	if envoy.IsResetBeforeResponse(r.details) {
		c.http.Details = envoy.ResetAfterResponse(envoy.ResetByTermination)
		if begun == flow.BadResponse {
			c.http.Details = envoy.ResetAfterResponse(envoy.ResetByProtocolError)
		}
	}
	if begun == flow.UpstreamClosed {
		begun = flow.ResponseIncomplete
	}
	h.resetDownstream(c.id, http2.InternalError)
	h.finish(c, begun, err)
}

// start returns the end of a limit that begins now, and watches it; zero without a limit.
func (h *hub) start(d time.Duration) (end time.Time) {
	if d > 0 {
		end = h.now().Add(d)
		h.watch(end)
	}
	return end
}

// awaitEnd starts the limit of a call whose request has arrived. Its wait for a connection counts, as in Envoy.
func (h *hub) awaitEnd(c *call) {
	if c.request.ended && c.leg != nil && c.totalEnd.IsZero() {
		c.totalEnd = h.start(c.total)
	}
}

// awaitHead starts the limits of an attempt whose request is passed on.
func (h *hub) awaitHead(c *call) {
	h.awaitEnd(c)
	if !c.begun {
		c.tryEnd, c.headEnd = h.start(c.try), h.start(h.settings.RequestTimeout)
	}
}

// check ends pauses, streams of which a limit has passed, and connections that are not used.
func (h *hub) check() {
	now := h.now()
	if h.checkAt.IsZero() || now.Before(h.checkAt) {
		return
	}
	h.checkAt = time.Time{}
	n := 0
	for _, s := range h.streams.open {
		if n++; n%closeTurn == 0 {
			h.w.Pause(h.Down)
		}
		h.checkCall(s.call, now)
	}
	for _, l := range h.ups {
		h.checkLeg(l, now)
	}
}

// checkLeg gives up a connection that is not used, or that has been used for long enough. reap closes it.
func (h *hub) checkLeg(l *leg, now time.Time) {
	if l.conn == nil {
		return
	}
	end := time.Time{}
	if life := l.life(); life > 0 && l.use.Opened != 0 {
		end = time.Unix(0, l.use.Opened).Add(life)
	}
	if !l.idleAt.IsZero() && l.load() == 0 {
		if idle := l.idleAt.Add(l.idleLife()); end.IsZero() || idle.Before(end) {
			end = idle
		}
	}
	switch {
	case end.IsZero():
	case now.Before(end):
		h.watch(end)
	default:
		l.closing = true
		h.moveWaiting(l)
	}
}

// checkCall acts on the time of a call.
func (h *hub) checkCall(c *call, now time.Time) {
	if c.closed || c.replied {
		return
	}
	switch r := c.late(now); {
	case r != nil && r.reason == flow.IdleTimeout && c.response.ended: // downstream does not take it
		h.cancel(c, http2.Cancel)
		c.http.Flags, c.http.Details = r.flags, r.details
		h.resetDownstream(c.id, http2.InternalError)
		h.finish(c, r.reason, nil)
	case r != nil && c.response.ended:
		h.cancel(c, http2.Cancel) // the server may wait for the rest of the request
		h.abandon(c, r, r.reason, nil)
	case r == &replyTryTimeout:
		h.cancel(c, http2.Cancel)
		h.failed(c, failedTimeout, r, errTryTimeout)
	case r != nil:
		h.cancel(c, http2.Cancel)
		h.abandon(c, r, r.reason, nil)
	case !c.resumeAt.IsZero() && !now.Before(c.resumeAt):
		h.resume(c)
	}
	h.goOn(c)
	if c.closed || c.replied {
		return
	}
	for _, end := range [...]time.Time{c.totalEnd, c.tryEnd, c.streamEnd, c.headEnd, c.arriveEnd, c.resumeAt, c.quietEnd()} {
		if now.Before(end) {
			h.watch(end)
		}
	}
}

// late returns the reply to a request of which a limit has passed, or nil.
func (c *call) late(now time.Time) *reply {
	passed := func(end time.Time) bool { return !end.IsZero() && !now.Before(end) }
	if r := c.overdue(now); r != nil {
		return r
	}
	switch {
	case passed(c.headEnd) && !c.begun:
		return &replyRequestTimeout
	case passed(c.arriveEnd) && !c.begun && !c.request.ended && !c.stalled():
		return &replyUnfinished
	case !passed(c.quietEnd()):
		return nil
	case c.request.ended || c.stalled():
		return &replyIdle
	}
	return &replyIdleUnread
}

// quiet returns for how long no part of a call need move; zero: there is no limit.
func (c *call) quiet() time.Duration {
	switch {
	case c.limits.own:
		return max(c.limits.idle, 0)
	case c.settings.edge != nil:
		return max(c.settings.IdleTimeout, 0)
	}
	return 0
}

// quietEnd returns when a call has been silent for too long; zero: never.
func (c *call) quietEnd() (end time.Time) {
	if quiet := c.quiet(); quiet > 0 {
		end = c.moved.Add(quiet)
	}
	return end
}

// endSilent ends the calls that have been silent for too long. It reports whether there was a call that is not answered yet:
// then the connection goes on.
func (h *hub) endSilent() (open bool) {
	for _, s := range h.streams.open {
		open = open || !s.call.replied
	}
	h.lastMove = time.Time{}
	h.watch(h.now())
	h.check()
	return open
}

// goOn passes on what the rate of a call has held back.
func (h *hub) goOn(c *call) {
	for _, p := range [...]*pipe{&c.req, &c.resp} {
		if p.pace != nil {
			h.pass(p)
		}
	}
}

var errTryTimeout = errors.New("the time of the attempt has passed")
