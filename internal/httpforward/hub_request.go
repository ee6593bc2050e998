package httpforward

import (
	"bytes"
	"errors"
	"net/http"
	"slices"
	"time"

	"github.com/pillion-proxy/pillion/internal/envoy"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/http2"
	"github.com/pillion-proxy/pillion/internal/relay"
)

// fromDownstream handles a decoded header block from downstream: a request head or trailers.
func (h *hub) fromDownstream(id uint32, end bool, fields []http2.Field, whole bool, broken error) error {
	if s := h.streams.find(id); s != nil {
		return h.requestTrailers(s.call, end, fields, whole)
	}
	switch {
	case id&1 == 0:
		return http2.ConnectionError(http2.ProtocolError, "a request on a stream of the server's")
	case id <= h.streams.last && h.wasReset(id):
		return h.down.idleFrame()
	case id <= h.streams.last:
		return http2.ConnectionError(http2.StreamClosed, "header block on a closed stream")
	}
	h.streams.last = id
	if id > h.lastServed { // it has no record: the client sends the request on another connection
		h.resetDownstream(id, http2.RefusedStream)
		return h.countReset()
	}
	request, err := http2.ParseRequest(fields)
	if err == nil {
		err = broken
	}
	if err == nil && request.Protocol != "" {
		err = http2.WrongPseudoFields // extended CONNECT was not offered (RFC 8441 §3)
	}
	if request.RepeatedLength && err == nil {
		fields = http2.SingleLength(fields)
	}
	tooMuch := h.holdsTooMuch()
	c, rejected := h.newCall(id, end, &request, fields, err == nil && whole)
	switch {
	case !whole:
		return h.answer(c, &replyHeaderListTooLarge, nil)
	case err != nil:
		return h.malformed(c, err)
	case rejected != nil:
		return h.answer(c, rejected, nil)
	case end && !c.request.whole():
		return h.malformed(c, http2.LengthMismatch)
	case h.streams.active > h.maxStreams():
		c.http.Flags, c.http.Details = envoy.FlagUpstreamOverflow, envoy.DetailsOverload
		return h.reject(c, http2.RefusedStream, flow.Overload, nil)
	case tooMuch:
		return h.reject(c, http2.RefusedStream, flow.MemoryBudget, errHoldsTooMuch)
	}
	h.down.idleFrames.earn(idleBonus)
	h.decide(c)
	return nil
}

// newCall enters a request into the table. The edge prepares a valid one, or rejects it.
func (h *hub) newCall(id uint32, end bool, request *http2.Request, fields []http2.Field, valid bool) (c *call, rejected *reply) {
	s := takeStream(h.engine, &h.Connection, id, h.requests)
	s.request = body{declared: request.ContentLength, ended: end}
	s.response = body{declared: -1}
	s.tunnel, s.head = request.Tunnel(), request.Method == http.MethodHead
	s.grpc = -1
	c = callPool.Get().(*call)
	c.stream, c.h, s.call, c.moved = s, h, c, h.now()
	h.start(c.quiet())
	if edge := s.settings.edge; edge != nil && !end {
		c.arriveEnd = h.start(edge.RequestTimeout)
	}
	c.req = pipe{c: c, up: true, credit: streamWindow, keep: true, queue: c.req.queue}
	c.resp = pipe{c: c, window: h.down.initial, credit: streamWindow, queue: c.resp.queue}
	h.squeeze(s)
	if valid && s.settings.edge != nil {
		fields, rejected = h.enter(s, request, fields)
	}
	c.sent.Request = *request
	c.sent.has = s.recordRequest(request, fields)
	c.sent.fields = append(c.sent.fields[:0], fields...)
	if h.Peers.readsRequests() {
		s.introduced = h.meetFields(&s.record, fields)
	}
	h.keepCall(c)
	h.streams.add(s)
	return c, rejected
}

// decide routes a call, and does what the decision asks for.
func (h *hub) decide(c *call) {
	r := h.view(c.stream, &c.sent.Request, c.sent.fields)
	if c.retries > 0 {
		r.Attempt, r.Previous = c.retries, &c.previous
	}
	if c.sent.path != nil {
		r.Path = c.sent.path
	}
	r.Check, r.Collected = c.check, c.body
	c.decision = h.route(r)
	d := &c.decision
	switch {
	case d.Collect > 0 && c.retries > 0: // the policies have changed
		_ = h.answer(c, &replyUnchecked, errUnchecked)
		return
	case d.Collect > 0:
		h.collect(c, d.Collect)
		return
	case d.Check != nil:
		h.ask(c, d.Check)
		return
	}
	if c.body != nil {
		c.body = nil // another attempt must not be asked about without it
		h.keepCall(c)
	}
	d.record(&c.record)
	c.lease, c.made = d.Lease, d.Reply
	h.takePeers(c)
	c.began = h.now()
	if c.retries == 0 {
		h.takePlan(c)
		c.limitKept()
		if p := policyOf(d, c.settings); p != nil {
			h.trace(c.stream, p, d.operation())
		}
	} else {
		endMirrors(d.Mirrors, flow.Overload) // the first attempt's are sent
		d.Mirrors, d.Delay = c.previous.Mirrors, 0
	}
	if d.Delay > 0 {
		h.pause(c, d.Delay)
		return
	}
	h.follow(c)
}

// takePeers lets the heads that follow have the fields of a call's cluster. Others may have been made since the decision.
func (h *hub) takePeers(c *call) {
	if p := c.decision.Peers; p != nil {
		h.Peers = p
	}
}

// takePlan takes over what a decision has besides its target.
func (h *hub) takePlan(c *call) {
	d := &c.decision
	c.plan, c.edits, c.forbidden = d.Plan, d.Edits, d.Forbidden
	if c.req.trailers != nil { // they have come while the decision waited
		c.req.trailers = c.trailers(c.req.trailers)
	}
	c.req.pace, c.resp.pace = relay.NewPace(d.RequestRate), relay.NewPace(d.ResponseRate)
	if d.Path != nil {
		c.sent.path, c.normalized = bytes.Clone(d.Path), true
		h.routed.Path = c.sent.path
	}
	if (d.Path != nil || len(d.Edits) > 0) && c.plan == nil {
		c.plan = noPlan
	}
	if c.plan == nil {
		return
	}
	e := h.takeEdited(c.stream)
	e.request.GRPC = c.http.GRPC
	c.limits = limitsOf(c.plan, &e.request)
	h.start(c.quiet())
	if c.limits.stream > 0 {
		c.streamEnd = c.record.Opened.Add(c.limits.stream)
		h.watch(c.streamEnd)
	}
	if editsResponse(c.plan) {
		c.asked = ofBlock(c.sent.fields)
	}
	if policy := c.plan.RetryOf(&e.request); policy != nil && !c.tunnel {
		c.policy, c.left = policy, policy.Retries
	}
}

// follow carries out a decision, after its delay.
func (h *hub) follow(c *call) {
	d := &c.decision
	switch {
	case d.Reply != nil && d.Reply.Reset:
		h.resetDownstream(c.id, http2.InternalError)
		h.finish(c, d.Reply.Reason, nil)
	case d.Reply != nil:
		_ = h.answer(c, &reply{d.Reply.Status, d.Reply.Body, d.Reply.Reason, d.Reply.Flags, d.Reply.Details}, nil)
	case d.noRoute():
		_ = h.answer(c, &replyNoRoute, errNoRoute)
	default:
		h.dispatch(c)
	}
}

// send opens a call on its leg.
func (l *leg) send(c *call) {
	h, s := l.h, c.stream
	c.upID = l.next
	l.next += 2
	l.joined--
	c.stopWaiting()
	l.enter(c)
	l.idleAt = time.Time{}
	s.record.Upstream, s.record.UpstreamLocal = l.target.Address, l.conn.LocalAddr()
	s.record.Security = h.security(l.conn)
	s.record.Attempts = uint8(min(int(s.record.Attempts)+1, 255))
	h.takePeers(c)
	h.view(s, &c.sent.Request, c.sent.fields)
	if c.sent.path != nil {
		h.routed.Path = c.sent.path
	}
	if s.plan != nil {
		h.takeEdited(s)
	}
	c.req.repeat += c.req.from
	c.req.window, c.req.from, c.req.done = l.initial, 0, false
	c.resp.credit, c.resp.owed = streamWindow, 0
	l.use.Requests++
	end := c.request.ended && len(c.req.queue) == 0 && c.req.trailers == nil
	s.sentAt = h.now()
	c.moved = s.sentAt
	if l.http1 != nil {
		if !l.sendHTTP1(c, end) {
			return
		}
	} else {
		block, at := l.beginBlock()
		l.endBlock(h.appendRequest(block, l.encoder, s, c.sent.fields, c.sent.has), at, c.upID, end)
	}
	if end {
		c.req.done = true
		h.passed(&c.req)
		return
	}
	h.pass(&c.req)
}

// requestTrailers handles a header block after the head of a request.
func (h *hub) requestTrailers(c *call, end bool, fields []http2.Field, whole bool) error {
	switch {
	case c.replied:
		return h.down.idleFrame()
	case c.request.ended:
		return http2.StreamError(c.id, http2.StreamClosed, "header block behind the end")
	case !whole:
		return http2.StreamError(c.id, http2.ProtocolError, "trailers over the limit")
	}
	if err := c.request.endsWith(c.id, end, fields); err != nil {
		return err
	}
	c.request.ended, c.req.trailers = true, slices.Clone(c.trailers(fields))
	h.awaitEnd(c)
	h.pass(&c.req)
	h.collected(c)
	return nil
}

// fromUpstream handles a decoded header block from upstream.
func (h *hub) fromUpstream(l *leg, id uint32, end bool, fields []http2.Field, whole bool) error {
	c, err := l.find(id)
	switch {
	case err != nil:
		return err
	case c == nil: // crossed with a reset
		return l.idleFrame()
	case c.response.ended:
		return http2.StreamError(id, http2.StreamClosed, "header block behind the end")
	case !whole:
		return http2.StreamError(id, http2.ProtocolError, "header block over the limit")
	case c.begun:
		return h.responseTrailers(c, end, fields)
	}
	response, err := h.engine.parseResponse(id, fields, end, c.interim)
	switch {
	case err != nil:
		return err
	case response.Interim():
		c.interim++
		h.down.sendFields(c.id, false, fields)
		return nil
	}
	if h.retriesResponse(c, response.Status, end, fields) {
		return nil
	}
	if response.RepeatedLength {
		fields = http2.SingleLength(fields)
	}
	return h.forwardResponse(c, end, fields, response)
}

// forwardResponse sends the head of a final response downstream.
func (h *hub) forwardResponse(c *call, end bool, fields []http2.Field, response http2.Response) error {
	if err := c.beginResponse(&response, end); err != nil {
		return http2.MessageError(c.upID, http2.LengthMismatch)
	}
	c.policy, c.headEnd = nil, c.tryEnd
	c.place.leave()
	c.moved = h.now()
	h.squeeze(c.stream)
	h.takePeers(c)
	h.recordResponse(c.stream, response.Status, h.now().Sub(c.sentAt), fields)
	if c.plan != nil {
		h.view(c.stream, &c.sent.Request, c.sent.fields)
		h.takeEdited(c.stream)
	}
	l := &h.down
	block, at := l.beginBlock()
	l.endBlock(h.appendResponse(block, l.encoder, c.stream, fields), at, c.id, end)
	h.keepCall(c)
	if len(c.decision.Mirrors) == 0 {
		c.req.keep = false
		h.drop(&c.req)
	}
	if end {
		c.response.ended, c.resp.done = true, true
		h.passed(&c.resp)
	}
	return nil
}

// responseTrailers takes the trailers of a response.
func (h *hub) responseTrailers(c *call, end bool, fields []http2.Field) error {
	if err := c.response.endsWith(c.upID, end, fields); err != nil {
		return err
	}
	h.squeeze(c.stream)
	for i := range fields {
		if fields[i].Name == grpcStatusField {
			c.recordGRPCStatus(fields[i].Value)
		}
	}
	h.keepCall(c)
	c.response.ended, c.resp.trailers = true, slices.Clone(fields)
	h.pass(&c.resp)
	return nil
}

// malformed resets a malformed request.
func (h *hub) malformed(c *call, err error) error {
	details := envoy.DetailsHTTP2Violation
	if errors.Is(err, http2.ErrField) {
		details = envoy.DetailsHTTP2InvalidField
	}
	var rule http2.Rule
	if errors.As(err, &rule) {
		details = envoy.WithRule(details, rule.Name())
	}
	c.http.Flags, c.http.Details = envoy.FlagDownstreamProtocolError, details
	return h.reject(c, http2.ProtocolError, flow.BadFraming, err)
}

// reject resets a stream because of downstream.
func (h *hub) reject(c *call, code http2.Code, reason flow.Reason, err error) error {
	h.resetDownstream(c.id, code)
	h.finish(c, reason, err)
	return h.countReset()
}

func (h *hub) resetDownstream(id uint32, code http2.Code) {
	h.streams.noteReset(id)
	h.down.reset(id, code)
}

// countReset counts a stream that failed because of downstream.
func (h *hub) countReset() error {
	if h.resets.spend(h.now) {
		return nil
	}
	return errManyBadRequests
}

// answer sends a reply in place of upstream. The stream closes when downstream has taken it.
func (h *hub) answer(c *call, r *reply, err error) error {
	c.stopAsking()
	c.collecting = 0
	text := r.body
	if c.http.GRPC || c.stream.head || r.bodiless() {
		text = ""
	}
	c.replied, c.reason, c.err = true, r.reason, err
	c.policy, c.resp.pace = nil, nil
	c.place.leave() // downstream may not take the reply
	l := &h.down
	block, at := l.beginBlock()
	block = c.appendReply(block, l.encoder, r, h.Peers.server(), h.now(), text != "")
	if c.made != nil {
		h.view(c.stream, &c.sent.Request, c.sent.fields)
		block = h.appendMade(block, l.encoder, c.stream)
	}
	l.endBlock(block, at, c.id, text == "")
	c.response = body{declared: -1, got: int64(len(text)), ended: true}
	h.freeQueue(&c.req)
	h.freeQueue(&c.resp)
	if text == "" {
		c.resp.done = true
		h.completed(c)
	} else {
		h.offer(&c.resp, []byte(text))
	}
	if r.reason == flow.HeadTooLarge {
		return h.countReset()
	}
	return nil
}
