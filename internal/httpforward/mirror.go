package httpforward

import (
	"context"
	"errors"
	"io"
	"sync/atomic"
	"time"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/http1"
	"github.com/pillion-proxy/pillion/internal/route"
	"github.com/pillion-proxy/pillion/internal/tcp"
	"github.com/pillion-proxy/pillion/internal/upstream"
)

// Copies of requests for mirrors. A copy is sent when the whole request has arrived, by a goroutine of its own, and its
// response is discarded. The request itself neither waits for its copies nor fails with them. Copies over the
// bounds are dropped.

const (
	maxCopies     = 128      // of an engine at a time
	maxCopyBytes  = 16 << 20 // of the requests that they hold
	copyTime      = 15 * time.Second
	maxCopyAnswer = 64 << 20 // bytes of a response that are read; a longer one costs its connection
)

// copies counts the copies that are being sent.
type copies struct {
	active atomic.Int32
	held   atomic.Int64
}

// sharedRequest is a request that copies are made of. It is HTTP/1 as it went to upstream, and never changed.
type sharedRequest struct {
	engine *Engine
	raw    []byte // a slab
	head   int    // length of the head
	users  atomic.Int32
}

// duplicate is one copy.
type duplicate struct {
	of       *sharedRequest
	settings *Settings
	to       Mirror
	limit    time.Duration

	method    []byte // in raw
	began     time.Time
	connected bool
	status    int
	grpc      int
}

// sendCopies sends the copies of a request that has arrived. It does not wait.
//
//go:noinline
func (x *exchange) sendCopies() {
	x.copying = false
	m := &x.request
	if !m.retain || x.upgrade || string(x.http.Method) == "CONNECT" { // it is too long, or does not end
		x.dropMirrors(flow.Overload)
		return
	}
	body := []byte(nil)
	if m.in != nil {
		body = m.in.Bytes()[:m.ready]
	}
	limit := x.limits.total
	if limit <= 0 {
		limit = copyTime
	}
	x.s.engine.mirror(x.decision.Mirrors, x.settings, limit, m.head, m.kept, body)
	x.decision.Mirrors = nil
}

// mirror sends copies of a request: its head, and the two parts of its body.
func (e *Engine) mirror(mirrors []Mirror, settings *Settings, limit time.Duration, head, first, rest []byte) {
	size := len(head) + len(first) + len(rest)
	shared := &sharedRequest{engine: e, head: len(head)}
	shared.users.Store(1) // this function
	for i := range mirrors {
		d := &duplicate{of: shared, settings: settings, to: mirrors[i], limit: limit, began: time.Now(), grpc: -1}
		if i >= MaxMirrors || !e.copies.admit(int64(size), shared.raw == nil) {
			e.config.Pool.Stats.CopiesDropped.Add(1)
			d.end(flow.Overload)
			continue
		}
		if shared.raw == nil {
			shared.raw = append(append(append(tcp.TakeSlab(size), head...), first...), rest...)
		}
		e.config.Pool.Stats.Copied.Add(1)
		shared.users.Add(1)
		go d.run()
	}
	shared.leave()
}

// leave gives up one use of the request. The last one frees it.
func (s *sharedRequest) leave() {
	if s.users.Add(-1) == 0 && s.raw != nil {
		s.engine.copies.held.Add(-int64(len(s.raw)))
		tcp.GiveSlab(s.raw)
		s.raw = nil
	}
}

// admit reports whether one more copy may be sent; first of a request of n bytes.
func (c *copies) admit(n int64, first bool) bool {
	if c.active.Add(1) > maxCopies {
		c.active.Add(-1)
		return false
	}
	if first && c.held.Add(n) > maxCopyBytes {
		c.held.Add(-n)
		c.active.Add(-1)
		return false
	}
	return true
}

// run sends the copy, and reads its response.
func (d *duplicate) run() {
	w := tcp.NewWaiter(context.Background())
	defer w.Close()
	reason := d.send(w)
	d.end(reason)
	e := d.of.engine
	d.of.leave()
	e.copies.active.Add(-1)
}

// end ends the lease of the copy.
func (d *duplicate) end(reason flow.Reason) {
	if d.to.Lease != nil {
		d.to.Lease.End(Outcome{Status: d.status, GRPC: d.grpc, Reason: reason, Connected: d.connected, Duration: time.Since(d.began)})
	}
}

func (d *duplicate) send(w *tcp.Waiter) flow.Reason {
	e := d.of.engine
	deadline := d.began.Add(d.limit)
	var head http1.Head
	if done, err := head.ParseRequest(d.of.raw, d.settings.ofServers().limits()); !done || err != nil {
		return flow.BadFraming // it was forwarded, so this does not happen
	}
	d.method = head.Method.In(d.of.raw)
	d.to.Target.HTTP2 = d.to.HTTP2
	up := e.config.Pool.Take(d.to.Target)
	if up == nil {
		dialer := e.config.Dialer
		dialer.Timeout = d.settings.ConnectTimeout
		var err error
		if up, _, err = dialer.Dial(w, d.to.Target); err != nil {
			return upstream.Reason(err)
		}
		if d.to.HTTP2 {
			carryOverHTTP2(up, d.settings)
		}
	}
	d.connected = true
	var out tcp.Vector
	written := d.appendHead(nil, &head)
	out.Append(written)
	out.Append(d.of.raw[d.of.head:])
	in := tcp.TakeBuffer()
	defer func() { in.Release() }()
	for out.Len() > 0 {
		n, err := up.WriteVector(&out)
		if err == tcp.ErrAgain || err == nil && n == 0 {
			err = awaitRoom(w, up, in, deadline)
		}
		if err == tcp.ErrFull { // the mirror has answered before it has read all; more than is there is not wanted
			_, err = d.discardResponse(w, up, in, d.began)
			if d.status != 0 {
				up.Reset()
				return flow.Completed
			}
		}
		if err != nil {
			up.Reset()
			return copyReason(err)
		}
	}
	reusable, err := d.discardResponse(w, up, in, deadline)
	switch {
	case err != nil:
		up.Reset()
		return copyReason(err)
	case reusable && !d.to.Target.Balanced:
		e.config.Pool.Give(d.to.Target, up)
	default:
		up.Close()
	}
	return flow.Completed
}

// copyReason is why a copy failed after its connection was there.
func copyReason(err error) flow.Reason {
	var rule http1.Error
	switch {
	case errors.Is(err, tcp.ErrDeadline):
		return flow.RequestTimeout
	case errors.As(err, &rule):
		return flow.BadResponse
	}
	return flow.UpstreamClosed
}

// appendHead appends the head of the copy: that of the request, for another host.
func (d *duplicate) appendHead(dst []byte, h *http1.Head) []byte {
	raw := d.of.raw
	i := h.Find(http1.Host)
	if i < 0 {
		return append(dst, raw[:h.Length]...)
	}
	f := &h.Fields[i]
	dst = append(dst, raw[:f.Value.Start]...)
	dst = append(dst, route.MirrorHost(d.to.Policy, f.Value.In(raw))...)
	return append(dst, raw[f.Value.End:h.Length]...)
}

// awaitRoom waits until a server may take more of a request. One of HTTP/2 gives credit for it, which has to be read; a response
// that has begun is kept in in. It returns tcp.ErrFull if in has no more room for it.
func awaitRoom(w *tcp.Waiter, up *tcp.Conn, in *tcp.Buffer, deadline time.Time) error {
	if up.Readable() {
		if _, err := in.Fill(up); err != tcp.ErrAgain {
			return err
		}
	}
	return w.Wait(deadline, up, nil)
}

// discardResponse reads the response of a copy, of which in may have the beginning. It reports whether the connection can carry
// another request.
func (d *duplicate) discardResponse(w *tcp.Waiter, up *tcp.Conn, in *tcp.Buffer, deadline time.Time) (reusable bool, err error) {
	limits := d.settings.ofServers().limits()
	fill := func() error {
		_, err := in.Fill(up)
		switch {
		case !time.Now().Before(deadline): // a server that sends without end lets no wait reach it
			return tcp.ErrDeadline
		case err == tcp.ErrFull && in.Grow(limits.Head+1):
			return nil
		case err == tcp.ErrAgain:
			return w.Wait(deadline, up, nil)
		}
		return err
	}
	var head http1.Head
	for head.Status < 200 {
		head.Reset()
		for {
			done, err := head.ParseResponse(in.Bytes(), limits)
			if err != nil {
				return false, err
			}
			if done {
				break
			}
			if err := fill(); err != nil {
				return false, err
			}
		}
		if head.Status == 101 {
			return false, nil
		}
		if head.Status >= 200 {
			break
		}
		in.Discard(head.Length)
	}
	framing, err := head.ResponseFraming(in.Bytes(), d.method)
	if err != nil {
		return false, err
	}
	d.status, d.grpc = head.Status, grpcStatusOf(&headFields{&head, in.Bytes()})
	keeps := persists(head.Minor, head.DropHopByHop(in.Bytes())) && framing.Kind != http1.UntilClose && framing.Kind != http1.Tunnel
	in.Discard(head.Length)
	var body http1.Body
	for body.Start(framing, limits); !body.Done(); {
		n, err := body.Scan(in.Bytes())
		if in.Discard(n); err != nil {
			return false, err
		}
		if body.Done() || body.Bytes() > maxCopyAnswer {
			break
		}
		if err := fill(); err == io.EOF && body.End() == nil {
			return false, nil
		} else if err != nil {
			return false, err
		}
	}
	return keeps && body.Done() && in.Len() == 0, nil
}

// dropMirrors ends the leases of copies that are not sent.
func (x *exchange) dropMirrors(reason flow.Reason) {
	endMirrors(x.decision.Mirrors, reason)
	x.s.engine.config.Pool.Stats.CopiesDropped.Add(uint64(len(x.decision.Mirrors)))
	x.decision.Mirrors = nil
}

func endMirrors(mirrors []Mirror, reason flow.Reason) {
	for i := range mirrors {
		if lease := mirrors[i].Lease; lease != nil {
			lease.End(Outcome{GRPC: -1, Reason: reason})
		}
	}
}
