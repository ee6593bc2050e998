package tcp

import (
	"context"
	"errors"
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
type Waiter struct {
	ctx   context.Context
	token chan struct{} // holds a token if an event arrived since the last wait
	round uint32        // last call of Poller.WakeAll that the owner has seen
	timer *time.Timer   // made by the first wait with a deadline

	interrupted atomic.Bool
}

// NewWaiter returns a Waiter whose waits fail once ctx is cancelled. Cancelling ctx does not wake waits in progress: the
// caller must call Poller.WakeAll afterwards. One WakeAll is cheaper than one context.AfterFunc for each connection.
func NewWaiter(ctx context.Context) *Waiter {
	return &Waiter{ctx: ctx, token: make(chan struct{}, 1)}
}

// Close releases the waiter. It must not be used afterwards.
func (w *Waiter) Close() {
	if w.timer != nil {
		w.timer.Stop()
	}
}

// Canceled reports whether the context has been cancelled, for loops that do not reach Wait because they always have work.
func (w *Waiter) Canceled() bool { return w.ctx.Err() != nil }

// Interrupt ends the wait in progress, or else the next one, with ErrInterrupted. It may be called from any goroutine.
func (w *Waiter) Interrupt() {
	w.interrupted.Store(true)
	w.wake()
}

// Continue takes back an Interrupt that no wait has reported.
func (w *Waiter) Continue() { w.interrupted.Store(false) }

func (w *Waiter) wake() {
	select {
	case w.token <- struct{}{}:
	default:
	}
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
	if deadline.IsZero() {
		<-w.token
	} else if !w.waitUntil(deadline) {
		return ErrDeadline
	}
	return w.ended()
}

// ended returns why a wait ends without an event, nil if it need not.
func (w *Waiter) ended() error {
	switch {
	case w.Canceled():
		return ErrCanceled
	case w.interrupted.Load() && w.interrupted.Swap(false):
		return ErrInterrupted
	}
	return nil
}

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
		missed = true
	}
	if err == nil && c.layer != nil {
		missed = c.layer.flushWaiting(c) || missed
	}
	if err == nil && !c.watchesWrites && c.ready.Load()&writable == 0 {
		err = c.poller.watchWrites(c)
	}
	// The connection is in the table now, so a later WakeAll finds it there. The counter shows a WakeAll that has passed
	// the table before.
	if round := c.poller.rounds.Load(); round != w.round {
		w.round = round
		missed = true
	}
	return missed, err
}

// waitUntil reports whether there was an event before the deadline. An event counts even if the deadline has passed since:
// a process that was descheduled must not mistake its own delay for a silent peer.
func (w *Waiter) waitUntil(deadline time.Time) bool {
	left := time.Until(deadline)
	if left <= 0 {
		return w.happened()
	}
	if w.timer == nil {
		w.timer = time.NewTimer(left)
	} else {
		w.timer.Reset(left)
	}
	defer w.timer.Stop()
	select {
	case <-w.token:
		return true
	case <-w.timer.C:
		return w.happened()
	}
}

func (w *Waiter) happened() bool {
	select {
	case <-w.token:
		return true
	default:
		return false
	}
}
