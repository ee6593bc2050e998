package httpforward

import (
	"strings"
	"time"

	"github.com/pillion-proxy/pillion/internal/envoy"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/http2"
	"github.com/pillion-proxy/pillion/internal/route"
)

// The 1:1 HTTP/2 engine's part of a decision besides forwarding: replies, edits, limits and leases. It cannot delay a
// request, because streams have to be opened in the order of their numbers, nor send one to another endpoint, send it
// twice or send copies of it: these decisions need an engine whose streams have numbers of their own.

// carriedStream is the state of a stream whose decision is more than a target.
type carriedStream struct {
	forbidden []string // Decision.Forbidden

	plan  *route.Plan
	made  *route.Reply // is sent in place of a response
	lease Lease        // nil: it has ended, or was not given
	grpc  int          // grpc-status in the head of the response; -1: absent

	retries int       // so far
	began   time.Time // of the attempt; zero: with the request

	limits
	totalEnd, tryEnd, streamEnd time.Time

	edits      []route.Edit // of this request's header, besides those of plan
	normalized bool         // the path is the one that the router decided by: see Decision.Path

	asked blockFields // a copy of the request's fields, if an edit of the response may need it
}

// carry takes what the decision for a request asks for.
func (m *multiplex) carry(s *stream, d *Decision) {
	s.lease, s.made, s.plan, s.grpc = d.Lease, d.Reply, d.Plan, -1
	if n := len(d.Mirrors); n > 0 {
		endMirrors(d.Mirrors, flow.Overload)
		m.engine.config.Pool.Stats.CopiesDropped.Add(uint64(n))
	}
	if d.Path != nil {
		m.routed.Path, s.normalized = d.Path, true
	}
	s.edits, s.forbidden = d.Edits, d.Forbidden
	if (d.Path != nil || len(d.Edits) > 0) && s.plan == nil {
		s.plan = noPlan
	}
	if s.plan == nil {
		return
	}
	e := m.takeEdited(s)
	e.request.GRPC = s.http.GRPC
	s.limits = limitsOf(s.plan, &e.request)
	if s.stream > 0 {
		s.streamEnd = s.record.Opened.Add(s.stream)
		m.watch(s.streamEnd)
	}
	if editsResponse(s.plan) {
		s.asked.list = copyFields(m.fields.list)
		m.keep(s)
	}
}

// copyFields returns a copy whose strings have memory of their own.
func copyFields(fields []http2.Field) []http2.Field {
	var text strings.Builder
	for i := range fields {
		text.WriteString(fields[i].Name)
		text.WriteString(fields[i].Value)
	}
	rest, list := text.String(), make([]http2.Field, len(fields))
	cut := func(n int) (part string) {
		part, rest = rest[:n], rest[n:]
		return part
	}
	for i := range fields {
		list[i].Name = cut(len(fields[i].Name))
		list[i].Value = cut(len(fields[i].Value))
	}
	return list
}

// size returns about how much memory the fields take.
func (f *blockFields) size() (n int) {
	for i := range f.list {
		n += fieldSize + len(f.list[i].Name) + len(f.list[i].Value)
	}
	return n
}

// appendBlock appends the fields that are left and those that are added.
func (e *edited) appendBlock(block []byte, encoder *http2.Encoder) []byte {
	if e.fields != nil {
		list := e.fields.(*blockFields).list
		for i := range list {
			if !e.gone[i] {
				block = encoder.AppendField(block, list[i])
			}
		}
	}
	for i := range e.added {
		if a := &e.added[i]; !a.gone {
			block = encoder.AppendLiteral(block, a.name, e.value(a))
		}
	}
	return block
}

// answerMade answers a request as its decision asks, without upstream. The body of a reply is not sent: see answer.
func (m *multiplex) answerMade(s *stream) error {
	made := s.made
	if made.Reset {
		m.resetDownstream(s.id, http2.InternalError)
		m.finish(s, made.Reason, nil)
		return nil
	}
	return m.answer(s, &reply{made.Status, made.Body, made.Reason, made.Flags, made.Details}, nil)
}

// watch makes sure that limits are checked at a time.
func (m *multiplex) watch(at time.Time) {
	if m.checkAt.IsZero() || at.Before(m.checkAt) {
		m.checkAt = at
	}
}

// startLimits starts the limits of a stream that begin with the end of its request.
func (m *multiplex) startLimits(s *stream) {
	if s.total > 0 {
		s.totalEnd = m.now().Add(s.total)
		m.watch(s.totalEnd)
	}
	if s.try > 0 && !s.begun {
		s.tryEnd = m.now().Add(s.try)
		m.watch(s.tryEnd)
	}
}

// enforceLimits ends the streams of which a limit has passed.
func (m *multiplex) enforceLimits() {
	now := m.now()
	if m.checkAt.IsZero() || now.Before(m.checkAt) {
		return
	}
	m.checkAt = time.Time{}
	ended := 0
	for _, s := range m.streams.open {
		if r := s.overdue(now); r != nil {
			m.resetUpstream(s.id, http2.Cancel)
			m.abandon(s, r, flow.RequestTimeout, nil)
			if ended++; ended%closeTurn == 0 {
				m.w.Pause(m.Down)
			}
			continue
		}
		for _, end := range [...]time.Time{s.totalEnd, s.tryEnd, s.streamEnd} {
			if now.Before(end) {
				m.watch(end)
			}
		}
	}
}

// overdue returns the reply to a request of which a limit has passed, or nil.
func (s *stream) overdue(now time.Time) *reply {
	passed := func(end time.Time) bool { return !end.IsZero() && !now.Before(end) }
	switch {
	case passed(s.streamEnd) && !s.request.ended:
		return &replyMaxUnread
	case passed(s.streamEnd):
		return &replyMaxDuration
	case passed(s.totalEnd):
		return &replyRouteTimeout
	case passed(s.tryEnd) && !s.begun:
		return &replyTryTimeout
	}
	return nil
}

// noteResponse keeps the parts of a response that the lease ends with.
func (s *stream) noteResponse(fields []http2.Field) {
	for i := range fields {
		if fields[i].Name == grpcStatusField {
			if code, ok := envoy.ParseGRPCCode(readOnly(fields[i].Value)); ok {
				s.grpc = int(code)
			}
			return
		}
	}
}

// endLease ends the place of the request at its endpoint.
func (s *stream) endLease(reason flow.Reason) {
	lease := s.lease
	if lease == nil {
		return
	}
	s.lease = nil
	began := s.began
	if began.IsZero() {
		began = s.record.Opened
	}
	outcome := Outcome{GRPC: -1, Reason: reason, Connected: !s.sentAt.IsZero(), Duration: time.Since(began)}
	if s.begun {
		outcome.Status, outcome.GRPC = s.http.Status, s.grpc
	}
	lease.End(outcome)
}
