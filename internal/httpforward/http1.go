package httpforward

import (
	"bytes"
	"errors"
	"io"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pillion-proxy/pillion/internal/budget"
	"github.com/pillion-proxy/pillion/internal/envoy"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/http1"
	"github.com/pillion-proxy/pillion/internal/http2"
	"github.com/pillion-proxy/pillion/internal/relay"
	"github.com/pillion-proxy/pillion/internal/tcp"
	"github.com/pillion-proxy/pillion/internal/upstream"
)

// run forwards one request and its response, closes the record, and returns how the connection continues.
func (x *exchange) run() ending {
	x.record.Opened = time.Now()
	answer, err := x.readHead()
	x.recordPart()
	if err != nil {
		return x.stopped(err)
	} else if answer != nil {
		return x.refuse(*answer, x.failure)
	}
	if x.decision.asks() {
		if end, over := x.carryOut(); over {
			return end
		}
	}
	if x.s.up == nil && !x.holdDial() {
		return x.evicted()
	}
	attempts, err := x.s.connect(x.wanted, x.settings, x.record.Opened, x.dialLimit(), idempotent(x.http.Method))
	x.record.Attempts = uint8(attempts)
	if err == nil {
		x.send()
	} else if end, over := x.noUpstream(err); over {
		return end
	}
	for {
		long := x.request.move()
		x.s.Read = x.request.in // move takes a buffer when it has none
		if x.copying && x.request.taken() {
			x.sendCopies()
		}
		if x.request.retain && !idempotent(x.http.Method) && !x.request.untouched() && !x.keeps() {
			x.request.stopRetaining() // it will not be sent again
		}
		long = x.receive() || long
		if end, over := x.judge(); over {
			return end
		}
		if x.limited {
			if end, over := x.enforce(); over {
				return end
			}
		}
		if x.interims > 0 && x.thinking() && !time.Now().Before(x.deadline()) {
			if end, over := x.timedOut(tcp.ErrDeadline); over { // a server that never rests gets to no deadline below
				return end
			}
		}
		if (long || x.redialled) && !x.s.w.Stopped() {
			x.redialled = false
			x.s.w.Yield(x.s.Down)
			continue
		}
		x.releaseIdleBuffers()
		if !x.hold() {
			return x.evicted()
		}
		switch err := x.s.w.Wait(x.deadline(), x.s.Down, x.s.up); {
		case err == nil:
		case errors.Is(err, tcp.ErrDeadline):
			if end, over := x.timedOut(err); over {
				return end
			}
		default:
			return x.stopped(err)
		}
	}
}

// releaseIdleBuffers releases empty buffers before a wait, because either side may be silent for a long time.
func (x *exchange) releaseIdleBuffers() {
	if in := x.response.in; in != nil && in.Len() == 0 {
		in.Release()
		x.response.in = nil
	}
	switch {
	case x.request.held() == 0:
		x.s.releaseRead()
		x.request.in = nil
	case x.request.ready == 0: // no part of the buffer is in out
		x.request.in.Shrink()
	}
}

// ordinaryHead is the largest buffer that a head fills in one turn.
const ordinaryHead = 64 << 10

// readHead reads the request head and builds the one for upstream. It returns a reply if the request is rejected, and
// an error if downstream is gone.
func (x *exchange) readHead() (*reply, error) {
	s := x.s
	limits := x.settings.limits()
	for {
		done, err := x.requestHead.ParseRequest(s.Read.Bytes(), limits)
		if err != nil {
			return x.malformed(faultOf(err, &x.requestHead, s.Read.Bytes())), nil
		}
		if done {
			break
		}
		_, err = s.Read.Fill(s.Down)
		switch {
		case err == nil:
			continue
		case err == tcp.ErrFull && s.Read.Grow(limits.Head+1): // one byte more, to detect a head that exceeds the limit
			if s.Read.Cap() <= ordinaryHead {
				continue
			}
			if !x.holdHead() {
				return nil, tcp.ErrInterrupted
			}
			s.w.Yield(s.Down)
			continue
		case err != tcp.ErrAgain:
			return nil, err
		}
		if !x.holdHead() {
			return nil, tcp.ErrInterrupted
		}
		deadline, late := x.headDeadline()
		switch err := s.w.Wait(deadline, s.Down, s.up); {
		case errors.Is(err, tcp.ErrDeadline):
			return late, nil
		case err != nil:
			return nil, err
		}
		s.retired() // begins to count the time that a retired connection has
	}
	answer := x.acceptRequest(limits)
	return answer, x.gone
}

// headDeadline returns when a wait for more of the head ends, and the reply after that.
//
//go:noinline
func (x *exchange) headDeadline() (at time.Time, late *reply) {
	sooner := func(from time.Time, limit time.Duration, r *reply) {
		if end := from.Add(limit); limit > 0 && (at.IsZero() || end.Before(at)) {
			at, late = end, r
		}
	}
	s := x.settings
	sooner(x.record.Opened, s.HeadTimeout, &replyHeadTimeout)
	if s.edge != nil {
		sooner(x.record.Opened, s.edge.RequestTimeout, &replyUnfinished)
		sooner(time.Now(), s.IdleTimeout, &replyIdleUnread)
	}
	return at, late
}

// malformed returns the reply to a request that cannot be parsed.
func (x *exchange) malformed(err error) *reply {
	x.failure = err
	var rule http1.Error
	if errors.As(err, &rule) {
		return badRequests[rule]
	}
	return &replyBadRequest
}

// acceptRequest determines the framing of the request, routes it, and builds its head.
func (x *exchange) acceptRequest(limits http1.Limits) *reply {
	b := x.s.Read.Bytes()
	if x.s.Router != nil { // the edge may be another one since the first byte of the head
		x.settings = x.s.engine.current(x.s.Connection)
	}
	if x.settings.edge != nil {
		var rejected *reply
		if b, rejected = x.enter(b); rejected != nil {
			return rejected
		}
	}
	x.recordRequest(b)
	framing, err := x.requestHead.RequestFraming(b)
	if err != nil {
		return x.malformed(faultOf(err, &x.requestHead, b))
	}
	routed := x.route(b)
	if x.request.bad != nil { // of a body that was collected
		x.gone = nil
		return x.malformed(x.request.bad)
	}
	if x.late != nil {
		x.gone = nil
		return x.late
	}
	if x.gone != nil {
		return nil
	}
	b = x.head() // a wait may have moved them
	x.request.src = x.s.Down
	if p := policyOf(&x.decision, x.settings); p != nil {
		x.trace(p, b)
	}
	head := x.request.reserve(x.requestHead.Length + addedFields + x.s.Peers.added())
	if editsRequest(x.decision.Plan) || x.decision.Path != nil || len(x.decision.Edits) > 0 {
		x.request.head = x.appendEditedRequest(head, b)
	} else {
		x.request.head = x.appendRequestHead(head, b)
	}
	if framing.Kind == http1.Chunked {
		x.request.nominated = x.forbidden(b)
		switch edge := x.settings.edge; {
		case len(x.decision.Forbidden) > 0:
			x.request.refuses = x.refusesTrailer
		case edge != nil:
			x.request.refuses = edge.refusesTrailer
		}
	}
	x.s.Read.Discard(x.headLength())
	x.started, x.request.retain = true, true
	x.request.start(x.s.Read, framing, limits)
	if x.request.bad != nil {
		return x.malformed(x.request.bad)
	}
	if !routed {
		x.failure = errNoRoute
		return &replyNoRoute
	}
	return nil
}

// route decides what becomes of the request. It reports false if the router returned neither upstream nor reply; the kept
// connection then serves the next request.
func (x *exchange) route(b []byte) bool {
	if x.s.Router == nil {
		x.wanted = &x.s.Target
		return true
	}
	return x.routeBy(b)
}

// routeBy is route with a Router. It is not inlined, because a decision takes much of a small stack.
//
//go:noinline
func (x *exchange) routeBy(b []byte) bool {
	s := x.s
	x.decision = s.Router.Route(x.view(b))
	d := &x.decision
	if d.waits() {
		if b = x.resolve(); b == nil {
			return false
		}
	}
	d.record(&x.record)
	if d.Peers != nil {
		s.Peers = d.Peers
	}
	if d.Plan != nil {
		x.takePlan(b)
	}
	if d.Path != nil || len(d.Edits) > 0 {
		x.takeChanges()
	}
	if d.RequestRate|d.ResponseRate > 0 {
		x.takeRates()
	}
	if d.noRoute() {
		return d.Reply != nil
	}
	x.wanted = &d.Target
	x.wanted.HTTP2 = d.Translate
	s.turnTo(x.wanted)
	return true
}

// resolve waits for the answers and the body that a decision needs, and decides. It returns the bytes of the request, at their present place,
// or nil if the exchange is over; the reason is in gone.
//
//go:noinline
func (x *exchange) resolve() []byte {
	for x.decision.waits() {
		if wanted := x.decision.Collect; wanted > 0 {
			x.gone = x.collect(wanted)
		} else {
			x.check = x.decision.Check
			if x.gone = x.await(x.check); x.gone != nil {
				x.check.Cancel()
			}
		}
		if x.gone != nil {
			return nil
		}
		r := x.view(x.head())
		r.Check, r.Collected = x.check, x.body
		x.decision = x.s.Router.Route(r)
	}
	x.body = nil // another attempt must not be asked about without it
	return x.head()
}

// refusesTrailer reports whether the edge or the decision forbids a field in the trailers of the request.
func (x *exchange) refusesTrailer(name []byte) bool {
	return x.settings.edge != nil && x.settings.edge.refusesTrailer(name) || x.decision.refusesTrailer(name)
}

// forbidden returns the names that are forbidden in the trailers of the request.
func (x *exchange) forbidden(b []byte) (names []byte) {
	if x.options.Nominates {
		names = x.requestHead.Nominated(b)
	}
	return x.s.Peers.forbidRequest(names)
}

// send connects the request and the response to the upstream connection.
func (x *exchange) send() {
	s := x.s
	x.record.Upstream, x.record.UpstreamLocal = x.wanted.Address, s.up.LocalAddr()
	x.record.Security = s.security(s.up)
	if s.elsewhere {
		s.other.use.Requests++
	}
	x.request.dst, x.request.bulk.Dst = s.up, s.up
	x.response.src, x.response.dst = s.up, s.Down
	x.allSent = time.Time{}
	switch {
	case x.retries > 0: // the service time is that of all attempts
	case s.used:
		x.sentAt = x.record.Opened
	default:
		x.sentAt = time.Now() // after a dial
	}
	if !s.used && !s.target().Balanced && !x.keeps() {
		x.request.stopRetaining() // see mayRepeat
	}
}

// interimCost is how many bytes of a turn a write of interim responses stands for, and interimBatch how many bytes of them
// are collected for one write. An upstream may send them without end.
const (
	interimCost  = 8 << 10
	interimBatch = 8 << 10
)

// receive reads the response and forwards it. It reports whether there is more to do without waiting.
func (x *exchange) receive() (longTurn bool) {
	m := &x.response
	for left := turn; !x.answered; {
		if left <= 0 {
			return true
		}
		if m.out.Len() > 0 && !x.interimFollows() {
			n := m.put()
			if n == 0 {
				return false
			}
			left -= n + interimCost
			continue
		}
		if m.bad != nil || m.srcErr != nil || !x.parseResponse() {
			return false
		}
		left--
	}
	return m.move()
}

// interimFollows reports whether another whole interim response is in the buffer, to be written together with those in out.
func (x *exchange) interimFollows() bool {
	m := &x.response
	if m.held() == 0 || m.out.Len() != len(m.head) || m.out.Len() >= interimBatch { // nothing read, partly written, or enough
		return false
	}
	b := m.in.Bytes()
	return http1.BeginsInterim(b) && bytes.Contains(b, []byte("\r\n\r\n"))
}

// parseResponse reads the head of an interim or final response. It reports false if the head is incomplete.
func (x *exchange) parseResponse() bool {
	m, limits := &x.response, x.settings.ofServers().limits()
	if m.held() > 0 {
		done, err := x.responseHead.ParseResponse(m.in.Bytes(), limits)
		if err == nil && done {
			err = x.acceptResponse(limits)
		}
		if err != nil {
			err = faultOf(err, &x.responseHead, m.in.Bytes())
		}
		if m.bad = err; done || err != nil {
			return err == nil
		}
	}
	// After a failed write, upstream may have sent a response that explains it, or closed.
	if !m.src.Readable() && x.request.dstErr == nil {
		return false
	}
	if m.in == nil {
		m.in = tcp.TakeBuffer()
	}
	_, err := m.in.Fill(m.src)
	if err == tcp.ErrFull {
		m.in.Grow(limits.Head + 1)
		return true
	}
	if m.held() == 0 {
		m.in.Release()
		m.in = nil
	}
	if err == tcp.ErrAgain && x.request.dstErr != nil {
		err = x.request.dstErr
	}
	if err != nil && err != tcp.ErrAgain {
		m.srcErr = err
	}
	return err == nil
}

var (
	errNotAsked       = errors.New("upstream switched protocols unasked")
	errTooManyInterim = errors.New("too many interim responses")
)

// acceptResponse handles a complete response head. A final head determines the framing of the body and whether the
// connection persists.
func (x *exchange) acceptResponse(limits http1.Limits) error {
	m, h := &x.response, &x.responseHead
	b := m.in.Bytes()
	framing, err := h.ResponseFraming(b, x.http.Method)
	if err != nil {
		return err
	}
	if h.Status >= 200 || h.Status == 101 {
		if x.decision.Lease != nil {
			x.noteResponse(b)
		}
		if x.policy != nil && x.retriesResponse() {
			return errRetry
		}
	}
	if !x.copying {
		x.request.stopRetaining()
	}
	switch {
	case h.Status == 101 && !x.upgrade:
		return errNotAsked
	case h.Status/100 == 1 && h.Status != 101:
		return x.interim(b)
	}
	x.upgraded = framing.Kind == http1.Tunnel
	x.http.Status = h.Status
	x.http.Details = envoy.DetailsViaUpstream
	x.http.ServiceTime = time.Since(x.sentAt)
	x.http.ResponseFields = x.copyFields(x.http.ResponseFields, h, b, x.settings.noted(true))
	if x.settings.Note.Heads {
		x.http.ResponseHead = bytes.Clone(b[:h.Length])
	}
	x.http.ResponseBody = x.settings.Note.Bodies.Begin()
	m.tape = x.http.ResponseBody
	x.appendResponseHead(b, framing)
	m.in.Discard(h.Length)
	m.start(m.in, framing, limits) // a tunnel has no body: the bytes after the head are not HTTP
	x.answered = m.bad == nil
	return m.bad
}

// interim forwards a 1xx response. HTTP/1.0 does not have them (RFC 9110 §15.2), so they are dropped there.
func (x *exchange) interim(b []byte) error {
	m, h := &x.response, &x.responseHead
	if x.interims++; x.interims > x.s.engine.config.maxInterim {
		return errTooManyInterim
	}
	if x.requestHead.Minor > 0 {
		h.DropHopByHop(b)
		x.s.Peers.drop(h)
		start := len(m.head) // interim responses that are not yet written; see interimFollows
		m.head = append(h.AppendLines(m.head, b), "\r\n"...)
		m.out.Append(m.head[start:])
	}
	m.in.Discard(h.Length)
	h.Reset()
	return nil
}

// judge decides whether the exchange is over, and how the connection continues.
func (x *exchange) judge() (ending, bool) {
	request, response := &x.request, &x.response
	x.count()
	if x.answered && response.done() {
		return x.answerDone()
	}
	if request.done() {
		x.readAhead()
	}
	if err := x.downstreamGone(); err != nil {
		return x.downstreamLeft(err), true
	}
	switch {
	case request.bad != nil && !x.answered:
		return x.refuse(*x.malformed(request.bad), request.bad), true
	case request.bad != nil:
		return x.close(flow.BadFraming, request.bad, cut), true
	case response.bad == errRetry:
		return x.attemptAgain(flow.Completed)
	case x.answered && response.bad != nil:
		x.http.Details = envoy.ProtocolErrorAfterResponse(ruleOfResponse(response.bad))
		return x.close(flow.BadResponse, response.bad, cut), true
	case response.bad != nil:
		return x.failed(failedReset, badResponse(response.bad), response.bad)
	case response.srcErr == nil:
		return 0, false
	}
	return x.upstreamEnded(response.srcErr)
}

// upstreamEnded decides what the end of upstream before the end of its response means. Most servers treat a half-close as
// the end of the connection, so an orderly end that follows the forwarded half-close is downstream's doing. A reset is not:
// the server has crashed, or the network has lost it.
func (x *exchange) upstreamEnded(err error) (ending, bool) {
	looped := x.s.up.Looped()
	switch {
	case !x.answered && !looped && x.mayRepeat():
		return x.repeat()
	case !looped && err == io.EOF && x.last() && x.request.done():
		return x.downstreamLeft(err), true
	case x.answered:
		return x.truncated(err), true
	}
	var violation *http2.Error
	switch refused, _ := err.(*streamReset); {
	case refused != nil && refused.code == http2.RefusedStream:
		return x.failed(failedRefused, replyUpstreamReset(refused.code), err)
	case refused != nil:
		return x.failed(failedReset, replyUpstreamReset(refused.code), err)
	case errors.As(err, &violation), errors.Is(err, errNotHTTP2):
		return x.failed(failedReset, badResponse(err), err)
	}
	r, err := closedReply(x.s.up, err)
	if x.record.TransportFailure = rejection(err); looped {
		return x.refuse(*r, err), true
	} else if x.record.TransportFailure != "" {
		return x.failed(failedConnect, *r, err)
	}
	return x.failed(failedReset, *r, err)
}

// answerDone ends an exchange whose response is delivered. An unfinished request continues as long as downstream is
// alive and upstream accepts it. While upstream accepts no bytes, downstream is not read, so its failure is taken from
// the poller.
func (x *exchange) answerDone() (ending, bool) {
	request, s := &x.request, x.s
	dead := !request.done() && s.Down.Failed() != nil
	if !request.done() && request.dstErr == nil && request.srcErr == nil && request.bad == nil && !x.closing && !dead {
		return 0, false
	}
	if x.upgraded && request.done() {
		return x.tunnel(), true
	}
	end := next
	switch {
	case dead:
		return x.close(flow.Completed, nil, cut), true
	case !request.done():
		end = linger
	case x.closing || x.last():
		end = shut
	}
	end = x.close(flow.Completed, nil, end)
	if request.done() && !x.upstreamCloses && !x.last() && x.response.held() == 0 {
		s.used, s.lastUse = true, x.record.Opened.Add(x.record.Duration)
	} else {
		s.closeUpstream()
	}
	return end, true
}

// downstreamGone returns why downstream cannot receive the response, nil if it can.
func (x *exchange) downstreamGone() error {
	if err := x.s.Down.Failed(); err != nil {
		return err
	}
	if x.response.dstErr != nil {
		return x.response.dstErr
	}
	return x.request.srcErr
}

// downstreamLeft ends an exchange whose downstream has left, and with it the upstream connection.
func (x *exchange) downstreamLeft(err error) ending {
	x.http.Flags, x.http.Details = envoy.FlagDownstreamConnectionTermination, envoy.DetailsDownstreamLeft
	switch {
	case err == io.EOF:
		return x.close(flow.DownstreamLeft, io.ErrUnexpectedEOF, shut)
	case errors.Is(err, budget.ErrEvicted):
		return x.close(flow.MemoryBudget, err, cut)
	}
	return x.close(flow.DownstreamLeft, err, cut)
}

// readAhead reads what downstream sends before its response is complete: further requests, as far as there is room, or
// its half-close. The half-close is forwarded to upstream only after the last request.
func (x *exchange) readAhead() {
	s := x.s
	for !s.ended && s.Down.Readable() {
		if s.Read == nil {
			s.Read = tcp.TakeBuffer()
			x.request.in = s.Read
		}
		_, err := s.Read.Fill(s.Down)
		if err == io.EOF {
			s.ended = true
		} else if err == tcp.ErrAgain || err == tcp.ErrFull {
			return
		} else if err != nil {
			x.request.srcErr = err
			return
		}
	}
	if x.last() {
		s.up.CloseWrite()
	}
}

// last reports whether downstream has half-closed after this request, with no further bytes.
func (x *exchange) last() bool { return x.s.ended && x.request.held() == x.request.ready }

// truncated ends an exchange whose response stops early. Downstream sees the same kind of end as on a direct
// connection.
func (x *exchange) truncated(err error) ending {
	x.http.Details = envoy.ResetAfterResponse(envoy.ResetByTermination)
	if err == io.EOF {
		return x.close(flow.ResponseIncomplete, io.ErrUnexpectedEOF, shut)
	}
	return x.close(flow.ResponseIncomplete, err, cut)
}

// takeover is how soon a new connection must have ended for its request to be sent again.
const takeover = time.Second

// mayRepeat reports whether a request that got no byte of a response may be sent again: everything sent is retained, it was
// not sent again before, and the method is idempotent or no byte was sent (RFC 9110 §9.2.2).
//
// A reused connection may have been closed before the request arrived. A new connection to a balanced target may have
// reached a server that was about to end, and the network chooses another one next time. A server that had the request
// for longer, or that ends the connection after a half-close, has decided to do so. A new connection to another target
// would reach the same server again.
func (x *exchange) mayRepeat() bool {
	s := x.s
	if x.repeated || s.bound || x.response.held() > 0 || !x.request.retain {
		return false
	}
	if !s.used && (!s.target().Balanced || x.last() || time.Since(x.sentAt) > takeover) {
		return false
	}
	return idempotent(x.http.Method) || x.request.untouched()
}

// idempotent reports whether the method is idempotent by RFC 9110 §9.2.2.
func idempotent(method []byte) bool {
	switch string(method) {
	case "GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE":
		return true
	}
	return false
}

// repeat sends the request again, on a new connection. The dial consumes wake-ups of downstream, so the caller must try
// all connections again before it waits.
func (x *exchange) repeat() (ending, bool) {
	x.s.dropUpstream()
	x.s.engine.config.Pool.Stats.Retried.Add(1)
	x.response.srcErr, x.repeated = nil, true
	attempts, err := x.s.dial(x.wanted, x.settings, x.dialLimit())
	x.countDials(attempts)
	if err != nil {
		return x.noUpstream(err)
	}
	x.request.resend(x.s.up)
	x.send()
	x.redialled = true
	return 0, false
}

// deadline returns when the exchange is given up if no byte moves until then, or a limit of its route passes.
func (x *exchange) deadline() time.Time {
	if !x.limited {
		return x.quietDeadline()
	}
	x.quietEnd = x.quietDeadline()
	return x.sooner(x.quietEnd)
}

// quietDeadline returns when the exchange is given up if no byte moves until then.
func (x *exchange) quietDeadline() time.Time {
	if !x.thinking() {
		limit, _ := x.limit()
		return after(limit)
	}
	if x.allSent.IsZero() {
		x.allSent = time.Now()
	}
	return x.allSent.Add(x.settings.RequestTimeout)
}

// timedOut ends an exchange, or its attempt, at its deadline.
func (x *exchange) timedOut(err error) (ending, bool) {
	if x.limited {
		if end, over := x.enforce(); over || x.redialled {
			return end, over
		}
		if x.quietEnd.IsZero() || time.Now().Before(x.quietEnd) {
			return 0, false // the limit was that of an attempt
		}
	}
	if x.thinking() {
		return x.refuse(replyRequestTimeout, err), true
	}
	_, reason := x.limit()
	if (x.limits.own || x.settings.edge != nil) && reason == flow.IdleTimeout {
		return x.silent(), true
	}
	return x.close(reason, nil, cut), true
}

// thinking reports whether upstream has the whole request, and RequestTimeout limits the time to its response head.
func (x *exchange) thinking() bool {
	return !x.answered && x.settings.RequestTimeout > 0 && x.request.done()
}

// limit returns how long the exchange may be idle (zero or less: no limit), and the reason with which it ends after
// that.
func (x *exchange) limit() (time.Duration, flow.Reason) {
	idle, halfClosed := x.settings.IdleTimeout, x.settings.HalfCloseTimeout
	if x.limits.own {
		idle = x.limits.idle
	}
	if x.s.ended && halfClosed > 0 && (idle <= 0 || halfClosed < idle) {
		return halfClosed, flow.HalfCloseTimeout
	}
	return idle, flow.IdleTimeout
}

// stopped ends an exchange after an error while reading its head or waiting.
func (x *exchange) stopped(err error) ending {
	switch {
	case errors.Is(err, tcp.ErrCanceled):
		return x.close(flow.DrainDeadline, nil, cut)
	case errors.Is(err, tcp.ErrInterrupted):
		return x.evicted()
	case errors.Is(err, tcp.ErrDeadline): // of a body that is collected
		return x.close(flow.IdleTimeout, nil, cut)
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EMFILE), errors.Is(err, unix.ENOMEM):
		return x.close(flow.NoDescriptors, err, cut) // the wait failed, not the connection
	}
	return x.downstreamLeft(err)
}

// noUpstream goes on after a dial that failed: with a reply, or with the next attempt.
func (x *exchange) noUpstream(err error) (ending, bool) {
	if errors.Is(err, tcp.ErrCanceled) {
		return x.close(flow.DrainDeadline, err, cut), true
	}
	if errors.Is(err, tcp.ErrInterrupted) {
		return x.evicted(), true
	}
	x.record.Upstream, x.record.TransportFailure = x.wanted.Address, upstream.TransportFailure(err)
	if end, over := x.dialOverdue(err); over {
		return end, true
	}
	return x.failed(failedConnect, dialReply(err, x.record.Attempts > 1 && x.retries == 0 && x.policy == nil), err)
}

// tunnel relays both ways after an upgrade or CONNECT, until the connection ends. It counts in the connection's record,
// where the bytes are visible while the tunnel is open.
func (x *exchange) tunnel() ending {
	s, config := x.s, x.settings
	down, up := s.Read, x.response.in
	s.Read, x.request.in, x.response.in = nil, nil, nil
	x.http.Upgraded = true
	x.hold() // the relay ends if the exchange has been evicted
	received, sent := &s.Record.Received, &s.Record.Sent
	receivedBefore, sentBefore := received.Load(), sent.Load()
	end, err := relay.Run(s.w, s.Down, s.up, relay.Options{
		IdleTimeout:      config.IdleTimeout,
		HalfCloseTimeout: config.HalfCloseTimeout,
		FromDown:         received,
		FromUp:           sent,
		DownRead:         down,
		UpRead:           up,
		PaceDown:         x.request.pace.relay(),
		PaceUp:           x.response.pace.relay(),
	})
	s.up = nil
	x.record.Received.Add(received.Load() - receivedBefore)
	x.record.Sent.Add(sent.Load() - sentBefore)
	return x.close(flow.Reason(end), err, gone)
}
