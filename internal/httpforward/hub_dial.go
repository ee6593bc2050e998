package httpforward

import (
	"context"
	"errors"
	"sync/atomic"
	"time"

	"github.com/pillion-proxy/pillion/internal/balance"
	"github.com/pillion-proxy/pillion/internal/envoy"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/http1"
	"github.com/pillion-proxy/pillion/internal/http2"
	"github.com/pillion-proxy/pillion/internal/route"
	"github.com/pillion-proxy/pillion/internal/tcp"
	"github.com/pillion-proxy/pillion/internal/upstream"
)

// dialing is a dial in progress. Its goroutine ends when the dial has, or soon after w was interrupted.
type dialing struct {
	leg *leg
	w   *tcp.Waiter

	done     chan struct{} // closed when the fields below are set
	ended    atomic.Bool   // the same
	conn     *tcp.Conn
	attempts int
	err      error
}

// dispatch finds a connection for a call: one to its target with a place, or a new one.
func (h *hub) dispatch(c *call) {
	l := h.place(c)
	if l == nil {
		h.overflow(c)
		return
	}
	c.leg = l
	l.joined++
	l.waiting = append(l.waiting, c)
	h.awaitEnd(c)
	if l.http1 != nil && l.load() > 1 {
		return // reap opens it when its turn has come
	}
	l.openWaiting()
	if c.leg != l || c.upID != 0 || l.http1 != nil {
		return
	}
	if queue, counted := c.lease.(balance.Queue); counted {
		if !queue.Wait() {
			h.detach(c)
			h.overflow(c)
			return
		}
		c.waits = queue
	}
}

// stopWaiting ends the wait of a call for a stream.
func (c *call) stopWaiting() {
	if c.waits != nil {
		c.waits.Go()
		c.waits = nil
	}
}

// overflow answers a request that would wait with as many others as its cluster permits, or that would need more upstream
// connections than place makes.
func (h *hub) overflow(c *call) {
	c.made = &madeOverflow
	_ = h.answer(c, &replyOverflow, nil)
}

var (
	replyOverflow = resetReply(503, flow.UpstreamOverflow, envoy.FlagUpstreamOverflow, envoy.ResetByOverflow, "")
	madeOverflow  = route.Reply{Fields: []route.Field{{Name: "x-envoy-overloaded", Value: "true"}}, Edited: true}
)

// place returns a leg to the target of a call. If the server takes no streams at present on any of its connections, those of
// another connection would wait as well: the call waits for one of them.
//
// At the bound of connections, a call waits for a place on one to its target, and an idle one is closed for a target without any.
// Otherwise each of them carries a call, so that the number of calls bounds them. It is nil if clients have left behind as many dials.
func (h *hub) place(c *call) *leg {
	to, translate := &c.decision.Target, c.translated()
	var best, stalled *leg
	for _, l := range h.ups {
		if l.target != *to || l.closing || l.readErr != nil || (l.http1 != nil) != translate {
			continue
		}
		if l.conn != nil && l.conn.Retired() || l.over(l.joined) {
			continue
		}
		if translate && l.load() == 0 && l.conn != nil {
			if l.conn.Sending() {
				continue // the rest of a request whose response came early
			}
			if l.stale(c) {
				l.http1.broken, l.closing = true, true
				continue
			}
		}
		if translate && l.room() > 0 {
			return l // it has one place, and the others need not be looked at
		}
		if l.limit == 0 {
			stalled = roomier(stalled, l)
		} else {
			best = roomier(best, l)
		}
	}
	calls := h.maxStreams()
	most := maxLegs
	if translate {
		most = calls
	}
	switch {
	case best == nil && stalled != nil:
		return stalled
	case best != nil && (best.room() > 0 || len(h.ups) >= most):
		return best
	case len(h.ups) >= most+calls:
		return nil
	case len(h.ups) >= most:
		h.closeIdle()
	}
	l := h.newLeg(*to)
	if translate && l.speakHTTP1(c) {
		return l
	}
	h.dial(l)
	return l
}

// closeIdle has reap close a connection without a call, if there is one.
func (h *hub) closeIdle() {
	for _, l := range h.ups {
		if l.conn != nil && !l.closing && l.load() == 0 {
			l.closing = true
			return
		}
	}
}

// roomier returns the leg with the most room; best may be nil.
func roomier(best, l *leg) *leg {
	if best == nil || l.room() > best.room() {
		return l
	}
	return best
}

// over reports whether the connection serves no stream behind the next waiting ones: by the limits of its target, or because it
// has no number for it (RFC 9113 §5.1.1). A retired one serves those that wait for it when it is established.
func (l *leg) over(waiting int) bool {
	use := l.use
	use.Requests += uint32(waiting)
	return uint64(l.next)+2*uint64(waiting) > http2.MaxStream || l.target.Over(&use, l.h.now())
}

func (l *leg) load() int { return l.open + l.joined }

// room returns how many streams the connection has a place for; negative: as many calls wait.
func (l *leg) room() int { return l.places() - l.load() }

// places returns how many streams the connection may have at a time.
func (l *leg) places() int { return int(l.target.Streams(min(l.limit, maxStreams))) }

// enter and leave keep the table of the leg's calls. A leg of HTTP/1 has one call at a time.
func (l *leg) enter(c *call) {
	l.open++
	if l.http1 != nil {
		l.http1.call = c
		return
	}
	if l.calls == nil {
		l.calls = make(map[uint32]*call)
	}
	l.calls[c.upID] = c
}

func (l *leg) leave(c *call) {
	l.open--
	delete(l.calls, c.upID)
}

// callOf returns the open call with a number, or nil.
func (l *leg) callOf(id uint32) *call {
	if x := l.http1; x != nil {
		if x.call == nil || x.call.upID != id {
			return nil
		}
		return x.call
	}
	return l.calls[id]
}

func (h *hub) newLeg(to upstream.Target) *leg {
	l := new(leg)
	l.init(h, nil)
	l.target, l.next, l.limit = to, 1, firstLimit
	h.ups = append(h.ups, l)
	return l
}

// dial connects a leg, on a goroutine of its own. The socket is made here, in the network namespace of this goroutine's
// thread.
func (h *hub) dial(l *leg) {
	d := &dialing{leg: l, w: tcp.NewWaiter(context.Background()), done: make(chan struct{})}
	h.dials[d] = struct{}{}
	dialer := h.engine.dialer(&h.Connection, h.settings)
	if l.target.Borrowed {
		d.fail(errBorrowed)
		return
	}
	var err error
	if dialer.Socket, err = dialer.Poller.Socket(l.target.Address); err != nil {
		d.fail(err)
		return
	}
	go d.run(dialer, l.target, h.w)
}

// fail ends a dial that was not begun. A borrowed source serves one upstream connection, that of an inbound relay.
func (d *dialing) fail(err error) {
	d.err, d.attempts = err, 1
	d.w.Close()
	d.ended.Store(true)
	close(d.done)
}

var errBorrowed = errors.New("a hub cannot dial from the address of its client")

func (d *dialing) run(dialer upstream.Dialer, to upstream.Target, owner *tcp.Waiter) {
	d.conn, d.attempts, d.err = dialer.Dial(d.w, to)
	if d.conn != nil {
		d.conn.Rest()
	}
	d.w.Close()
	d.ended.Store(true)
	owner.Interrupt()
	close(d.done)
}

// connected begins with the streams that wait for a connection.
func (h *hub) connected(l *leg, conn *tcp.Conn) {
	l.conn = conn
	l.pending = l.in != nil
	l.idleAt = h.now()
	h.watch(l.idleAt.Add(l.idleLife()))
	if l.use.Opened == 0 {
		l.use.Opened = l.idleAt.UnixNano()
	}
	if life := l.life(); life > 0 {
		h.watch(l.idleAt.Add(life))
	}
	if l.http1 == nil {
		l.greet()
	}
	l.openWaiting()
}

// life returns how long the connection takes new streams; zero: without a limit.
func (l *leg) life() time.Duration {
	if l.target.Security == nil {
		return 0
	}
	return l.target.Security.Life
}

// idleLife returns how long the connection is kept without a stream.
func (l *leg) idleLife() time.Duration {
	if s := l.target.Security; s != nil && s.IdleLife > 0 {
		return min(s.IdleLife, legIdle)
	}
	return legIdle
}

// openWaiting opens the calls that wait for a place on the connection.
func (l *leg) openWaiting() {
	if l.h.closed {
		return
	}
	for len(l.waiting) > 0 && l.takes() {
		c := l.nextWaiting()
		if c.leg == l && c.upID == 0 && !c.closed {
			l.send(c)
		}
		if l.over(0) {
			l.closing = true
			l.h.moveWaiting(l)
		}
	}
}

// nextWaiting removes the first call that waits. A list for one call is kept, since each request needs it.
func (l *leg) nextWaiting() *call {
	c := l.waiting[0]
	l.waiting[0] = nil
	switch {
	case len(l.waiting) > 1:
		l.waiting = l.waiting[1:]
	case cap(l.waiting) == 1:
		l.waiting = l.waiting[:0]
	default:
		l.waiting = nil
	}
	return c
}

// takes reports whether a call can be opened on the connection now. Bytes of HTTP/1 that are read and not handled come before it:
// they may belong to no response, and must not be taken for that of the call. For those that are not read yet, see reap.
func (l *leg) takes() bool {
	return l.conn != nil && !l.closing && l.readErr == nil && l.writeErr == nil && l.open < l.places() && !l.full() && (l.http1 == nil || l.in == nil)
}

// share opens calls that wait for a place on a connection of HTTP/2 on others to the same target. It reports whether it has opened
// any.
func (h *hub) share() (opened bool) {
	if h.closed {
		return false
	}
	for _, from := range h.ups {
		if len(from.waiting) == 0 || from.conn == nil || from.http1 != nil {
			continue
		}
		for _, to := range h.ups {
			for len(from.waiting) > 0 && to.http1 == nil && to.target == from.target && to.takes() && len(to.waiting) == 0 {
				to.take(from)
				opened = true
			}
		}
	}
	return opened
}

// take opens the first call that waits for another leg.
func (l *leg) take(from *leg) {
	c := from.nextWaiting()
	if c.leg != from || c.upID != 0 || c.closed {
		return
	}
	from.joined--
	c.leg = l
	l.joined++
	l.waiting = append(l.waiting, c)
	l.openWaiting()
}

// moveWaiting finds other connections for the calls that wait for one which takes no more.
func (h *hub) moveWaiting(l *leg) {
	if h.closed {
		return
	}
	waiting := l.waiting
	l.waiting = nil
	for _, c := range waiting {
		if c.leg == l && c.upID == 0 && !c.closed {
			h.detach(c)
			h.dispatch(c)
		}
	}
}

// reap takes over dials that have ended, removes connections that are lost or not used any more, and opens calls that wait. It reports
// whether any of this happened: then there may be requests to write, and the hub must not wait.
func (h *hub) reap() (moved bool) {
	for d := range h.dials {
		if !d.ended.Load() {
			continue
		}
		<-d.done
		moved = true
		delete(h.dials, d)
		if d.err != nil {
			h.notConnected(d)
			continue
		}
		h.connected(d.leg, d.conn)
	}
	for i := 0; i < len(h.ups); {
		l, waiting := h.ups[i], len(h.ups[i].waiting)
		switch {
		case waiting == 0 || !l.takes() || l.http1 != nil && l.conn.Sending():
		case l.http1 != nil && !l.conn.Quiet(): // the poller may not have seen yet what the kernel has
			l.http1.broken, l.readErr = true, errUnused // lost finds other connections
		default:
			l.openWaiting()
		}
		if l.readErr == nil && l.writeErr != nil {
			l.readErr = l.writeErr
		}
		if l.conn != nil && !l.closing && l.conn.Retired() {
			l.closing = true
			h.moveWaiting(l)
		}
		moved = moved || len(l.waiting) < waiting
		if l.readErr == nil && l.conn != nil && l.closing && l.load() == 0 {
			l.readErr = errUnused
		}
		if l.readErr == nil {
			i++
			continue
		}
		h.ups = append(h.ups[:i], h.ups[i+1:]...)
		h.lost(l)
		moved = true
	}
	return h.share() || moved
}

// notConnected ends the calls that wait for a connection that could not be made.
func (h *hub) notConnected(d *dialing) {
	l := d.leg
	for i := range h.ups {
		if h.ups[i] == l {
			h.ups = append(h.ups[:i], h.ups[i+1:]...)
			break
		}
	}
	r := dialReply(d.err, d.attempts > 1)
	waiting := l.waiting
	l.waiting = nil
	for _, c := range waiting {
		if c.leg != l || c.closed {
			continue
		}
		h.detach(c)
		c.record.Upstream, c.record.TransportFailure = l.target.Address, upstream.TransportFailure(d.err)
		c.record.Attempts = uint8(min(int(c.record.Attempts)+d.attempts, 255))
		h.failed(c, failedConnect, &r, d.err)
		c.keepFailure(upstream.TransportFailure(d.err))
	}
	l.release()
}

// keepFailure sets the transport failure of a call that was answered because of it.
func (c *call) keepFailure(text string) {
	if c.replied && !c.closed {
		c.record.TransportFailure = text
	}
}

// errUnused is the error of a connection that is given up because it has no stream.
var errUnused = errors.New("the connection is not needed any more")

// lost ends the calls of a connection that has ended.
func (h *hub) lost(l *leg) {
	err := l.readErr
	var r *reply
	var violation *http2.Error
	var malformed http1.Error
	f := failedReset
	switch {
	case errors.As(err, &malformed), errors.Is(err, errNotAsked):
		bad := badResponse(err)
		r = &bad
	case errors.As(err, &violation), errors.Is(err, errNotHTTP2):
		bad := replyBadResponse
		r = &bad
	case l.conn != nil:
		looped := l.conn.Looped()
		r, err = closedReply(l.conn, err)
		if looped && h.Returned != nil { // see exchange.refuse
			h.closeAll(flow.Loop, upstream.ErrLoop)
			h.over = isReset
		}
	default:
		r = &replyUpstreamClosed
	}
	calls := l.streams()
	repeats := l.http1 != nil && l.http1.call != nil && l.repeats(l.http1.call)
	waiting := l.waiting
	l.waiting = nil
	l.close()
	for _, c := range calls {
		if !c.closed {
			h.detach(c)
			if repeats {
				h.sendAgain(c)
				continue
			}
			h.failed(c, f, r, err)
		}
	}
	for _, c := range waiting {
		if c.leg == l && !c.closed {
			h.detach(c)
			h.dispatch(c)
		}
	}
}
