package httpforward

import (
	"errors"
	"io"
	"strconv"
	"sync"
	"time"

	"github.com/pillion-proxy/pillion/internal/envoy"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/http1"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/route"
	"github.com/pillion-proxy/pillion/internal/tcp"
)

// The HTTP/1 engine's part of a decision besides forwarding. The functions are not inlined, so that the frames of
// ordinary requests stay small.

// carried is the state of an exchange whose decision is more than a target.
type carried struct {
	policy    *mesh.RetryPolicy // nil: no retry is left, or allowed
	left      uint32            // retries
	retries   int               // so far
	place     retryPlace        // of all of them
	began     time.Time         // of the attempt; zero: with the request
	status    int               // of the attempt's response; 0: it has not arrived
	grpc      int               // grpc-status of its head; -1: absent
	attemptAt int               // offset in the request head of the value of attemptCountField; 0: not there

	limits
	limited                     bool // by limits.any
	totalEnd, tryEnd, streamEnd time.Time
	arriveEnd                   time.Time // until when the whole request must have arrived
	quietEnd                    time.Time // of silence, when the exchange waited last

	made   *route.Reply // is sent in place of a response
	answer headFields   // of the response
}

// takePlan prepares for the plan of the decision. b holds the head of the request.
//
//go:noinline
func (x *exchange) takePlan(b []byte) {
	p, h := x.decision.Plan, &x.requestHead
	seen := x.seen()
	x.limits = limitsOf(p, seen)
	x.limited = x.limited || x.limits.any()
	if x.stream > 0 {
		x.streamEnd = x.record.Opened.Add(x.stream)
	}
	if policy := p.RetryOf(seen); policy != nil && string(x.http.Method) != "CONNECT" {
		x.policy, x.left = policy, policy.Retries
		x.keepRequest()
	}
	if x.policy != nil || editsResponse(p) {
		x.kept = append(x.kept[:0], b[:h.Length]...)
		x.view(x.kept)
		x.edited.describe(&x.routed)
	}
}

// takeChanges prepares for a path or edits of this request only.
//
//go:noinline
func (x *exchange) takeChanges() {
	if x.decision.Path != nil {
		if n := x.requestHead.Length; len(x.kept) > 0 { // the path stays for the next attempt, and for edits of the response
			x.kept = append(x.kept[:n], x.decision.Path...)
			x.view(x.kept)
			x.routed.Path = x.kept[n:]
		} else {
			x.routed.Path = x.decision.Path
		}
		x.takeEdited().describe(&x.routed)
	}
	if x.decision.Plan == nil {
		x.decision.Plan = noPlan
	}
}

// noPlan changes nothing.
var noPlan = &route.Plan{}

// seen returns the request as routes see it.
func (x *exchange) seen() *route.Request {
	r := &x.takeEdited().request
	if i := x.requestHead.Find(http1.ContentType); i >= 0 {
		r.GRPC = isGRPC(x.requestHead.Fields[i].Value.In(x.fields.b))
	}
	return r
}

// keepRequest lets the exchange keep the request's body for a retry or a copy, unless memory is short.
func (x *exchange) keepRequest() {
	if !x.s.engine.config.Budget.Tight() {
		x.request.keepLimit = maxKept
	}
}

// keeps reports whether the request is kept beyond what the safe resend needs.
func (x *exchange) keeps() bool { return x.policy != nil || x.copying }

// carryOut does what the decision asks for before anything is dialled. It reports whether that ends the exchange.
//
//go:noinline
func (x *exchange) carryOut() (ending, bool) {
	if x.decision.Delay > 0 {
		x.http.Delayed = true
		if end, over := x.pause(x.decision.Delay, true); over {
			return end, true
		}
	}
	if x.decision.Reply != nil {
		return x.replyHere(x.decision.Reply), true
	}
	if len(x.decision.Mirrors) > 0 {
		x.copying = true
		x.keepRequest()
	}
	return 0, false
}

// pause waits without an upstream connection. It ends the exchange if downstream fails meanwhile, and with leaves also if
// downstream half-closes: most clients that give up do that, and Envoy takes it for the end as well.
func (x *exchange) pause(d time.Duration, leaves bool) (ending, bool) {
	s := x.s
	if !x.holdDial() {
		return x.evicted(), true
	}
	for until := time.Now().Add(d); ; {
		err := s.Down.Failed()
		if err == nil && leaves && s.Down.Ended() {
			err = io.EOF
		}
		if err != nil {
			return x.downstreamLeft(err), true
		}
		switch err := s.w.Wait(x.sooner(until), s.Down, nil); err {
		case nil:
		case tcp.ErrDeadline:
			if end, over := x.enforce(); over {
				return end, true
			}
			if !time.Now().Before(until) {
				return 0, false
			}
		default:
			return x.stopped(err), true
		}
	}
}

// sooner returns the end of the first limit, or at if that is sooner. A zero time does not limit.
func (x *exchange) sooner(at time.Time) time.Time {
	if !x.limited {
		return at
	}
	try := x.tryEnd
	if x.answered {
		try = time.Time{}
	}
	arrive := x.arriveEnd
	if x.answered || x.request.taken() {
		arrive = time.Time{}
	}
	for _, end := range [...]time.Time{x.totalEnd, try, x.streamEnd, arrive} {
		if !end.IsZero() && (at.IsZero() || end.Before(at)) {
			at = end
		}
	}
	return x.paced(at)
}

// The replies to requests that exceed a limit of their route.
var (
	replyTryTimeout   = reply{504, replyRequestTimeout.body, flow.RequestTimeout, envoy.FlagUpstreamRequestTimeout, envoy.DetailsTryTimeout}
	replyMaxDuration  = reply{504, "downstream duration timeout", flow.RequestTimeout, envoy.FlagUpstreamRequestTimeout, envoy.DetailsMaxDuration}
	replyMaxUnread    = reply{408, replyMaxDuration.body, flow.RequestTimeout, replyMaxDuration.flags, envoy.DetailsMaxDuration}
	replyRouteTimeout = replyRequestTimeout
	replyIdle         = reply{504, "stream timeout", flow.IdleTimeout, envoy.FlagStreamIdleTimeout, envoy.DetailsIdleTimeout}
	replyUnfinished   = reply{408, "request timeout", flow.HeadTimeout, "", envoy.DetailsRequestTimeout}
	replyIdleUnread   = reply{408, replyIdle.body, replyIdle.reason, replyIdle.flags, replyIdle.details}
)

// enforce ends the exchange, or the attempt, if a limit has passed. It starts the limits that begin with the end of the
// request.
//
//go:noinline
func (x *exchange) enforce() (ending, bool) {
	if !x.limited {
		return 0, false
	}
	now := time.Now()
	if x.request.dst != nil {
		x.startTotal(now)
		if x.tryEnd.IsZero() && !x.answered && x.request.taken() && !x.upgrade {
			x.startTry(now)
		}
	}
	passed := func(end time.Time) bool { return !end.IsZero() && !now.Before(end) }
	switch {
	case passed(x.arriveEnd) && !x.answered && !x.request.taken():
		return x.refuse(replyUnfinished, tcp.ErrDeadline), true
	case passed(x.streamEnd) && !x.request.taken():
		return x.overdue(replyMaxUnread), true
	case passed(x.streamEnd):
		return x.overdue(replyMaxDuration), true
	case passed(x.totalEnd):
		return x.overdue(replyRouteTimeout), true
	case passed(x.tryEnd) && !x.answered && x.request.dst != nil:
		return x.failed(failedTimeout, replyTryTimeout, tcp.ErrDeadline)
	}
	return 0, false
}

// startTotal starts the limit of a request that has arrived as a whole, unless it is started.
func (x *exchange) startTotal(now time.Time) {
	if x.total > 0 && x.totalEnd.IsZero() && x.request.taken() && !x.upgrade {
		x.totalEnd = now.Add(x.total)
	}
}

// dialEnd returns when a dial for the request has to end; zero: its limits do not concern it. The time of a request includes its
// wait for a connection, as in Envoy.
func (x *exchange) dialEnd() time.Time {
	if !x.limited {
		return time.Time{}
	}
	x.startTotal(time.Now())
	if end := x.streamEnd; !end.IsZero() && (x.totalEnd.IsZero() || end.Before(x.totalEnd)) {
		return end
	}
	return x.totalEnd
}

// dialLimit returns the time until dialEnd; zero: there is no limit.
func (x *exchange) dialLimit() time.Duration {
	if end := x.dialEnd(); !end.IsZero() {
		return max(time.Until(end), 1)
	}
	return 0
}

// dialOverdue ends the exchange if a dial has failed because dialEnd had come.
func (x *exchange) dialOverdue(err error) (ending, bool) {
	if end := x.dialEnd(); end.IsZero() || time.Now().Before(end) || !errors.Is(err, tcp.ErrDeadline) {
		return 0, false
	}
	return x.enforce()
}

// startTry starts the limit of an attempt.
func (x *exchange) startTry(now time.Time) {
	if x.try > 0 {
		x.tryEnd = now.Add(x.try)
	}
}

// overdue ends an exchange after a limit of its route. A response that has begun is cut off.
func (x *exchange) overdue(r reply) ending {
	if !x.answered {
		return x.refuse(r, tcp.ErrDeadline)
	}
	x.http.Flags, x.http.Details = r.flags, r.details
	return x.close(r.reason, tcp.ErrDeadline, cut)
}

// silent ends an exchange on which no byte has moved for as long as its route allows.
func (x *exchange) silent() ending {
	if x.request.taken() {
		return x.overdue(replyIdle)
	}
	return x.overdue(replyIdleUnread)
}

// editions keeps the memory of edits.
var editions = sync.Pool{New: func() any { return new(edited) }}

// takeEdited returns the edits of the exchange.
func (x *exchange) takeEdited() *edited {
	if x.edited == nil {
		x.edited = editions.Get().(*edited)
		x.edited.record = &x.record
		x.edited.describe(&x.routed)
	}
	return x.edited
}

// releaseEdited returns the memory of edits.
func (x *exchange) releaseEdited() {
	x.edited.clear()
	editions.Put(x.edited)
	x.edited = nil
}

// appendEditedRequest is appendRequestHead for a plan that changes the head. Lines that are not changed keep their bytes and
// their order. A rewritten target is in origin form.
//
//go:noinline
func (x *exchange) appendEditedRequest(dst, b []byte) []byte {
	h, p := &x.requestHead, x.decision.Plan
	x.dropFromRequest(b)
	e := x.takeEdited()
	e.begin(&x.fields)
	for i := range h.Fields {
		e.gone[i] = h.Fields[i].Dropped
	}
	x.addOwn(e)
	e.apply(x.decision.Edits)
	e.apply(p.RequestEdits)
	if ms := x.limits.expected().Milliseconds(); ms > 0 {
		e.remove(expectedTimeoutField)
		e.addNumber(expectedTimeoutField, ms)
	}
	if p.CountAttempts {
		e.remove(attemptCountField)
	}
	for i, gone := range e.gone {
		h.Fields[i].Dropped = gone
	}
	dst = x.appendRewritten(dst, b)
	dst = x.appendConnection(h.AppendFields(dst, b))
	if x.s.Peers.adds() {
		dst = x.s.Peers.appendLine(dst, h, b)
	}
	if x.s.Peers.readsResponses() {
		dst = x.s.Peers.appendLines(dst, introduced{true, true})
	}
	dst = e.appendLines(dst)
	if p.CountAttempts {
		dst = append(dst, attemptCountField+": "...)
		x.attemptAt = len(dst)
		dst = append(strconv.AppendInt(dst, int64(x.retries+1), 10), "\r\n"...)
	}
	return append(dst, "\r\n"...)
}

// addOwn adds the fields that the engine adds to every request, before a plan edits them.
func (x *exchange) addOwn(e *edited) {
	h, fields := &x.requestHead, &x.settings.Fields
	if fields.RequestID && !h.Has(http1.XRequestID) {
		from := len(e.values)
		e.values = append(e.values, x.newID()...)
		e.add("x-request-id", from)
	}
	e.addTrace(x.http.Trace)
	if fields.ForwardedProto && !h.Has(http1.XForwardedProto) {
		e.addText("x-forwarded-proto", "http")
	}
	if fields.ForwardedFor == ForwardedForAppend ||
		fields.ForwardedFor == ForwardedForSetIfAbsent && !h.Has(http1.XForwardedFor) {
		from := len(e.values)
		e.values = appendAddress(e.values, x.s.Record.Downstream.Addr())
		e.add("x-forwarded-for", from)
	}
}

// appendRewritten appends the request line, and Host if it changes.
func (x *exchange) appendRewritten(dst, b []byte) []byte {
	h, p := &x.requestHead, x.decision.Plan
	target := h.Target.In(b)
	if !p.RewritesPath && !p.RewritesHost && x.decision.Path == nil || target[0] != '/' && !x.absolute { // also the targets of CONNECT and OPTIONS *
		return append(append(dst, h.Line.In(b)...), "\r\n"...)
	}
	dst = append(append(dst, h.Method.In(b)...), ' ')
	if p.RewritesPath {
		dst = p.AppendPath(dst, x.routed.Path)
	} else {
		dst = append(dst, x.routed.Path...)
	}
	dst = append(append(dst, b[h.Target.End:h.Line.End]...), "\r\n"...)
	if !p.RewritesHost && !x.absolute {
		return dst
	}
	if i := h.Find(http1.Host); i >= 0 {
		h.Fields[i].Dropped = true
		dst = append(dst, h.Fields[i].Name.In(b)...)
	} else {
		dst = append(dst, "Host"...)
	}
	dst = append(dst, ": "...)
	if p.RewritesHost {
		dst = p.AppendHost(dst, x.routed.Authority)
	} else {
		dst = append(dst, x.routed.Authority...)
	}
	return append(dst, "\r\n"...)
}

// editResponse makes the edits of a response's head, whose fields to be dropped are marked. appendLines then has the added
// ones.
//
//go:noinline
func (x *exchange) editResponse(b []byte) *edited {
	h, p := &x.responseHead, x.decision.Plan
	e := x.takeEdited()
	x.answer = headFields{h, b}
	e.begin(&x.answer)
	e.response = &x.answer
	for i := range h.Fields {
		e.gone[i] = h.Fields[i].Dropped
	}
	if x.s.Peers.names(h.Has(http1.Server)) { // a field that was to be replaced is dropped already
		e.addText("server", x.s.Peers.Server)
	}
	if p.CountInResponses {
		e.remove(attemptCountField)
		e.addNumber(attemptCountField, int64(x.retries+1))
	}
	e.apply(p.ResponseEdits)
	for i, gone := range e.gone {
		h.Fields[i].Dropped = gone
	}
	return e
}

// describe sets what the edits see of the request.
func (e *edited) describe(r *Request) {
	e.request = route.Request{
		Method: r.Method, Path: r.Path, Authority: r.Authority, Scheme: r.Scheme, Fields: r.Fields,
		Downstream: r.Client, Local: r.Connection.OriginalDestination,
	}
}

// appendLines appends the added fields.
func (e *edited) appendLines(dst []byte) []byte {
	for i := range e.added {
		if a := &e.added[i]; !a.gone {
			dst = append(append(dst, a.name...), ": "...)
			dst = append(append(dst, e.value(a)...), "\r\n"...)
		}
	}
	return dst
}

// replyHere answers a request as its decision asks, without upstream. The connection persists if the whole request has
// arrived, and so does the upstream connection of the requests before.
//
//go:noinline
func (x *exchange) replyHere(made *route.Reply) ending {
	if made.Reset {
		return x.close(made.Reason, nil, cut)
	}
	x.made = made
	r := reply{made.Status, made.Body, made.Reason, made.Flags, made.Details}
	if r.bodiless() {
		r.body = ""
	}
	end := linger
	if x.request.body.Done() && !x.downstreamCloses() && !x.last() {
		end = next
	}
	return x.sendReply(r, nil, end)
}

// appendMade appends the fields of a made reply, except those of its framing.
func (x *exchange) appendMade(dst []byte, r *reply) []byte {
	e, made, p := x.takeEdited(), x.made, x.decision.Plan
	e.begin(nil)
	e.response = nil
	e.addText("server", x.s.Peers.server())
	from := len(e.values)
	e.values = time.Now().UTC().AppendFormat(e.values, httpTime)
	e.add("date", from)
	if made.Body != "" && !r.bodiless() {
		e.addText("content-type", "text/plain")
	}
	for i := range made.Fields {
		f := &made.Fields[i]
		if f.Name == "content-type" {
			e.remove(f.Name)
		}
		if editable(f.Name) {
			e.addText(f.Name, f.Value)
			e.sanitize(e.added[len(e.added)-1].from)
		}
	}
	if p != nil && made.Edited {
		if p.CountInResponses {
			e.addNumber(attemptCountField, int64(x.retries+1))
		}
		e.apply(p.ResponseEdits)
	}
	return e.appendLines(dst)
}
