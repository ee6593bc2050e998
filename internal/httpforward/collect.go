package httpforward

import (
	"errors"
	"io"
	"slices"
	"time"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/http1"
	"github.com/pillion-proxy/pillion/internal/http2"
	"github.com/pillion-proxy/pillion/internal/tcp"
)

// Bodies that a Router needs before it decides. A request over HTTP/1 keeps its body in the buffer of the connection, one of a
// hub in its queue. The Router gets a copy until the request is decided about. All of them count in the budget of the process.

// framingRoom is how much of the framing of chunks is read with a collected body, besides as much as the body itself. A body
// with more of it counts as too long.
const framingRoom = 64 << 10

var continueLine = []byte("HTTP/1.1 100 Continue\r\n\r\n")

// collect reads the body of the request until it has ended or is longer than wanted. An error means that the exchange is over;
// that of a malformed body is left in request.bad.
//
//go:noinline
func (x *exchange) collect(wanted uint32) error {
	s := x.s
	framing, err := x.requestHead.RequestFraming(x.head())
	if err != nil {
		return err // it has been accepted before, so this does not happen
	}
	c := &Collected{Wanted: wanted}
	x.body = c // counted by holdHead
	var body http1.Body
	body.Start(framing, x.settings.limits())
	if !body.Done() && s.Read.Len() == x.headLength() {
		if err := x.tellToContinue(); err != nil {
			return err
		}
	}
	for at := x.headLength(); ; {
		var n int
		n, err = c.take(&body, s.Read.Bytes()[at:])
		if at += n; err != nil {
			x.request.bad = err
			return err
		}
		if c.Whole = body.Done(); c.Whole || len(c.Bytes) > int(wanted) {
			break
		}
		if more, err := x.fillBody(x.headLength() + 2*int(wanted) + framingRoom); err != nil {
			return err
		} else if !more {
			break
		}
	}
	return nil
}

// held returns the part of a collected body that is reported. c may be nil.
func (c *Collected) held() int {
	if c == nil {
		return 0
	}
	return piece(cap(c.Bytes))
}

// take adds the payload at the beginning of b, and returns how many bytes it has handled.
func (c *Collected) take(body *http1.Body, b []byte) (n int, err error) {
	for n < len(b) && !body.Done() && len(c.Bytes) <= int(c.Wanted) {
		took := int(min(body.Payload(), int64(len(b)-n)))
		if took > 0 {
			c.Bytes = append(c.Bytes, b[n:n+took]...)
			body.Skip(int64(took))
		} else if took, _, err = body.Line(b[n:]); took == 0 || err != nil {
			return n, err
		}
		n += took
	}
	return n, nil
}

// fillBody reads more of a body behind its head, for which the buffer may grow to limit. It reports false if there is no room.
func (x *exchange) fillBody(limit int) (more bool, err error) {
	s := x.s
	deadline, late := x.bodyDeadline(after(x.settings.IdleTimeout))
	for {
		_, err := s.Read.Fill(s.Down)
		switch {
		case err == nil:
			return true, nil
		case err == tcp.ErrFull && !s.Read.Grow(limit):
			return false, nil
		case err == tcp.ErrFull:
			if !x.holdHead() {
				return false, tcp.ErrInterrupted
			}
			continue
		case err != tcp.ErrAgain:
			return false, err
		case !x.holdHead():
			return false, tcp.ErrInterrupted
		}
		if err := s.w.Wait(deadline, s.Down, s.up); err != nil {
			if errors.Is(err, tcp.ErrDeadline) {
				x.late = late
			}
			return false, err
		}
	}
}

// bodyDeadline returns when a wait for more of a body ends, and the reply after that; nil: the connection ends. quiet is when
// no byte has moved for too long.
func (x *exchange) bodyDeadline(quiet time.Time) (at time.Time, late *reply) {
	if x.settings.edge == nil {
		return quiet, nil
	}
	if end := x.arriveEnd; !end.IsZero() && (quiet.IsZero() || end.Before(quiet)) {
		return end, &replyUnfinished
	}
	return quiet, &replyIdleUnread
}

// await waits for an answer, for as long as the request may be silent or unfinished. If more of it has arrived than is kept, the
// wait does not count as time in which it had to arrive. An error means that the exchange is over: as in pause, also if downstream
// half-closes. x.late is the reply then; nil: the connection ends.
func (x *exchange) await(c Check) error {
	s := x.s
	asked, end := time.Now(), x.arriveEnd
	c.Notify(s.w.Wake)
	quiet := after(x.settings.IdleTimeout)
	deadline, late := x.bodyDeadline(quiet)
	for !c.Answered() {
		switch {
		case s.Down.Failed() != nil:
			return s.Down.Failed()
		case s.Down.Ended():
			return io.EOF
		case !x.holdHead():
			return tcp.ErrInterrupted
		}
		switch err := s.w.Wait(deadline, s.Down, s.up); {
		case err == nil:
		case !errors.Is(err, tcp.ErrDeadline) || late == nil:
			return err
		default:
			if !x.fill() && !x.complete() {
				x.late = late
				return err
			}
			if late == &replyIdleUnread {
				x.late = &replyIdle
				return err
			}
			x.arriveEnd = time.Time{}
			deadline, late = x.bodyDeadline(quiet)
		}
	}
	if !end.IsZero() && x.fill() {
		x.arriveEnd = end.Add(time.Since(asked))
	}
	return nil
}

// fill reads what waits in the kernel, since a wait for an answer did not read. It reports whether an ordinary buffer has no room
// for all of it.
func (x *exchange) fill() (full bool) {
	s := x.s
	for {
		_, err := s.Read.Fill(s.Down)
		switch {
		case err == nil:
		case err != tcp.ErrFull:
			return false
		case !s.Read.Grow(ordinaryHead):
			return true
		}
	}
}

// complete reports whether the whole request is in the buffer.
func (x *exchange) complete() bool {
	s := x.s
	framing, err := x.requestHead.RequestFraming(x.head())
	if err != nil {
		return false // it has been accepted before, so this does not happen
	}
	var body http1.Body
	body.Start(framing, x.settings.limits())
	for b := s.Read.Bytes()[x.headLength():]; !body.Done(); {
		n := int(min(body.Payload(), int64(len(b))))
		if n > 0 {
			body.Skip(int64(n))
		} else if n, _, err = body.Line(b); n == 0 || err != nil {
			return false
		}
		b = b[n:]
	}
	return true
}

// tellToContinue sends 100 (Continue) to a client that waits for it. Upstream is not asked for another one.
func (x *exchange) tellToContinue() error {
	i := x.requestHead.Find(http1.Expect)
	if i < 0 || x.requestHead.Minor == 0 {
		return nil
	}
	x.requestHead.Fields[i].Dropped = true
	var out tcp.Vector
	out.Append(continueLine)
	for deadline := time.Now().Add(lingerTime); out.Len() > 0; {
		if _, err := x.s.Down.WriteVector(&out); err != nil && err != tcp.ErrAgain {
			return err
		}
		if out.Len() > 0 {
			if err := x.s.w.Wait(deadline, x.s.Down, nil); err != nil {
				return err
			}
		}
	}
	return nil
}

// collect has a call wait for its body, for which its client gets credit.
func (h *hub) collect(c *call, wanted uint32) {
	if c.tunnel {
		c.body = &Collected{Whole: true, Wanted: wanted}
		h.decide(c)
		return
	}
	if more := int64(wanted) + 1 - streamWindow; more > 0 && !c.request.ended {
		p := &c.req
		h.down.out = http2.AppendWindowUpdate(h.down.out, c.id, int(more))
		p.credit += more
		p.repeat += int(more) // so that it is given once
	}
	c.collecting = wanted
	if i := slices.IndexFunc(c.sent.fields, func(f http2.Field) bool { return f.Name == "expect" }); i >= 0 && !c.request.ended {
		c.sent.fields = slices.Delete(c.sent.fields, i, i+1)
		if len(c.req.queue) == 0 {
			h.down.sendFields(c.id, false, []http2.Field{{Name: ":status", Value: "100"}})
		}
	}
	h.collected(c)
}

// collected decides about a call again if its body is collected.
func (h *hub) collected(c *call) {
	wanted, queue := c.collecting, c.req.queue
	switch {
	case wanted == 0:
	case c.request.ended, len(queue) > int(wanted):
		c.collecting = 0
		c.body = &Collected{slices.Clone(queue[:min(len(queue), int(wanted)+1)]), c.request.ended, wanted}
		h.keepCall(c)
		h.decide(c)
	case h.holdsTooMuch():
		c.collecting = 0
		_ = h.answer(c, &replyOverloaded, errHoldsTooMuch)
	}
}

var errUncollected = errors.New("the connection began before requests were asked about with their bodies, and cannot keep them")

// collect gives a request its body if that is empty. Another request is sent again by its client on a connection that can keep
// it; see Decision.Collect.
func (m *multiplex) collect(u *undecided, wanted uint32) error {
	if u.end || u.s.tunnel {
		u.body = &Collected{Whole: true, Wanted: wanted}
		return m.decide(u)
	}
	if m.Target.Borrowed {
		return m.answer(u.s, &replyUncollected, errUncollected)
	}
	m.drainRequested = true
	return m.reject(u.s, http2.RefusedStream, flow.PolicyDenied, errUncollected)
}
