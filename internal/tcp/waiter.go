package tcp

import (
	"context"
	"errors"
	"math"
	"os"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Errors of a wait that ended without an event of a connection.
var (
	ErrDeadline    = errors.New("deadline exceeded")
	ErrCanceled    = errors.New("canceled")
	ErrInterrupted = errors.New("interrupted")
)

// Waiter blocks one goroutine until one of its connections has an event. Make it with NewWaiter, and Close it after its
// connections.
//
// Each connection has one. 48 bytes are a size of the allocator, and the next is 64.
type Waiter struct {
	canceled <-chan struct{}      // closed when the context is cancelled; may be nil
	token    chan struct{}        // holds a token if there is news; see signal
	news     atomic.Uint32        // the bits below
	round    uint16               // low bits of the last call of Poller.WakeAll that the owner has seen
	waits    uint8                // in succession that ended at once; see busyWaits
	class    uint8                // of the peer; see Begin
	turn     atomic.Pointer[turn] // made by the first Yield

	// The timer is made by the first wait with a deadline, and goes on after a wait that was not brief: most waits of a
	// connection have a later deadline than the one before. If it expires too early, the wait continues.
	timer *time.Timer
	armed time.Duration // when it expires, after started; zero: it has expired, or there is none
}

// The bits of Waiter.news.
const (
	event     = 1 << iota // a connection had an event
	expiry                // the timer has expired
	interrupt             // Interrupt was called; stays until a wait reports it
)

// NewWaiter returns a Waiter whose waits fail once ctx is cancelled. Cancelling ctx does not wake waits in progress: the
// caller must call Poller.WakeAll afterwards. One WakeAll is cheaper than one context.AfterFunc for each connection.
func NewWaiter(ctx context.Context) *Waiter {
	return &Waiter{canceled: ctx.Done(), token: make(chan struct{}, 1)}
}

// Close releases the waiter. It must not be used afterwards. Without Close, its memory may be kept until the last deadline.
func (w *Waiter) Close() {
	w.rest()
	if w.timer != nil {
		w.timer.Stop()
	}
}

// Canceled reports whether the context has been cancelled.
func (w *Waiter) Canceled() bool {
	select {
	case <-w.canceled:
		return true
	default:
		return false
	}
}

// Stopped reports whether the next Wait fails at once, because the context has been cancelled or Interrupt was called.
// Loops that do not reach Wait because they always have work call it before Yield, which returns at once then.
func (w *Waiter) Stopped() bool { return w.news.Load()&interrupt != 0 || w.Canceled() }

// Interrupt ends the wait or the yield in progress, or else the next one, with ErrInterrupted from the next wait. It may be
// called from any goroutine.
func (w *Waiter) Interrupt() {
	w.news.Or(interrupt)
	w.wake()
	w.leave()
}

// recheck ends the wait in progress, and the yield if the context has been cancelled.
func (w *Waiter) recheck() {
	w.wake()
	if w.Canceled() {
		w.leave()
	}
}

// leave ends the yield in progress.
func (w *Waiter) leave() {
	if t := w.turn.Load(); t != nil {
		t.leave()
	}
}

// Continue takes back an Interrupt that no wait has reported.
func (w *Waiter) Continue() { w.news.And(^uint32(interrupt)) }

// Wake ends the wait in progress, or else the next one, as an event of a connection does. It may be called from any goroutine,
// and also after Close.
func (w *Waiter) Wake() { w.wake() }

func (w *Waiter) wake()   { w.signal(event) }
func (w *Waiter) expire() { w.signal(expiry) }

// signal wakes the owner with a bit of news. The send does not block: only the first bit puts a token into the channel,
// and the owner clears the bits only after it has taken the token.
func (w *Waiter) signal(bit uint32) {
	if w.news.Or(bit)&(event|expiry) == 0 {
		w.token <- struct{}{}
	}
}

// take clears the bits, after the token was taken. It reports whether there was an event.
func (w *Waiter) take() bool {
	bits := w.news.And(interrupt)
	if bits&expiry != 0 {
		w.armed = 0
	}
	return bits&event != 0
}

// Wait blocks until a connection of this waiter may have had an event, and then returns nil; the caller tries its reads
// and writes again. It returns ErrDeadline at the deadline, unless that is zero, ErrCanceled once the context is
// cancelled, and ErrInterrupted once after an Interrupt.
//
// a and b, if not nil, become connections of this waiter and remain so in later waits, until Close, Rest, or a Wait of
// another waiter.
func (w *Waiter) Wait(deadline time.Time, a, b *Conn) error {
	missed := false
	for _, c := range [...]*Conn{a, b} {
		if c == nil {
			continue
		}
		lost, err := w.adopt(c)
		if err != nil {
			return err
		}
		missed = missed || lost
	}
	if err := w.ended(); err != nil {
		return err
	}
	if missed {
		return nil
	}
	if w.news.Load()&event != 0 {
		w.yieldSometimes(a, b)
	} else {
		w.waits = 0
		w.rest()
	}
	if deadline.IsZero() { // here, not in waitUntil, because most waits have no deadline; see Conn.try for the cost of a call
		for event := false; !event; event = w.take() {
			<-w.token
		}
	} else if !w.waitUntil(deadline) {
		return ErrDeadline
	}
	return w.ended()
}

// rest gives up the processor of a busy goroutine.
func (w *Waiter) rest() {
	if t := w.turn.Load(); t != nil {
		t.rest()
	}
}

// busy reports whether the goroutine has yielded since its last wait.
func (w *Waiter) busy() bool {
	t := w.turn.Load()
	return t != nil && t.holds
}

// yieldSometimes yields instead of a wait that ends at once: always if the goroutine is busy already.
func (w *Waiter) yieldSometimes(a, b *Conn) {
	if w.waits++; w.waits < busyWaits && !w.busy() {
		return
	}
	w.waits = 0
	if a == nil {
		a = b
	}
	if a != nil {
		w.Pause(a)
	}
}

// ended returns why a wait ends without an event, nil if it need not.
func (w *Waiter) ended() error {
	switch {
	case w.Canceled():
		return ErrCanceled
	case w.news.Load()&interrupt != 0 && w.news.And(^uint32(interrupt))&interrupt != 0:
		return ErrInterrupted
	}
	return nil
}

// Adopt makes c a connection of this waiter, as Wait does with its arguments, for an owner of more than two. With missed, an
// event may be past: the owner tries its reads and writes again before it waits.
func (w *Waiter) Adopt(c *Conn) (missed bool, err error) { return w.adopt(c) }

// adopt directs the events of c to w. It reports whether an earlier event may have woken another waiter, or no waiter at
// all: then Wait must return at once.
func (w *Waiter) adopt(c *Conn) (missed bool, err error) {
	switch {
	case c.closed:
		return false, os.NewSyscallError("epoll_ctl", unix.EBADF)
	case !c.watched:
		err = c.poller.watch(c, w)
	case c.waiter.Load() != w:
		c.waiter.Store(w)
		// The poller sets the bits before it looks for the waiter. Room in the send buffer is an event only of a connection
		// that has filled it before.
		missed = c.watchesWrites || c.ready.Load()&(readable|gone|failed|hungUp|urgent) != 0
	}
	if err == nil && c.layer != nil {
		missed = c.layer.flushWaiting(c) || missed
		missed = c.layer.budget != nil && c.layer.report(c) || missed
	}
	if err == nil && !c.watchesWrites && c.ready.Load()&writable == 0 {
		err = c.poller.watchWrites(c)
	}
	// The connection is in the table now, so a later WakeAll finds it there. The counter shows a WakeAll that has passed
	// the table before.
	if round := uint16(c.poller.rounds.Load()); round != w.round {
		w.round = round
		missed = true
	}
	return missed, err
}

// brief is the length of waits after which the timer is stopped. It would expire soon, and that costs more than the stop.
const brief = time.Second

// waitUntil waits for an event, and reports whether there was one before the deadline. An event counts even if the deadline
// has passed since: a process that was descheduled must not mistake its own delay for a silent peer.
func (w *Waiter) waitUntil(deadline time.Time) bool {
	for {
		left := time.Duration(math.MaxInt64)
		if !w.expiresBy(deadline) {
			if left = time.Until(deadline); left <= 0 {
				return w.happened()
			}
			w.arm(deadline, left)
		}
		if <-w.token; !w.take() {
			continue
		}
		if left < brief {
			w.timer.Stop()
			w.armed = 0
		}
		return true
	}
}

// happened takes the news without waiting, and reports whether there was an event. An interrupt stays.
func (w *Waiter) happened() bool {
	if w.news.Load()&(event|expiry) == 0 {
		return false
	}
	<-w.token // is there, or about to be: see signal
	return w.take()
}

// expiresBy reports whether the timer runs and expires at the deadline or earlier. Then the wait needs no clock: if the
// deadline has passed, the timer ends it.
func (w *Waiter) expiresBy(deadline time.Time) bool {
	return w.armed != 0 && w.armed <= deadline.Sub(started)
}

// arm makes the timer expire at the deadline. left is the time until then.
func (w *Waiter) arm(deadline time.Time, left time.Duration) {
	if w.timer == nil {
		w.timer = time.AfterFunc(left, w.expire)
	} else {
		w.timer.Reset(left)
	}
	w.armed = deadline.Sub(started)
}
