package tcp

import (
	"context"
	"errors"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// The ends of a wait that no connection caused.
var (
	ErrDeadline = errors.New("the time is up")
	ErrCanceled = errors.New("canceled")
)

// Waiter is what one goroutine waits with. Make it with NewWaiter, and Close it when its connections are closed.
type Waiter struct {
	ctx   context.Context
	token chan struct{} // holds one token when something happened since the last wait
	round uint32        // of Poller.WakeAll, up to which the owner has been woken
	timer *time.Timer   // made by the first wait with a deadline
}

// NewWaiter makes a waiter whose waits end when ctx has ended. Those that are under way then learn it from
// Poller.WakeAll, which whoever ends ctx calls after it: that a context wakes each of its connections by itself costs
// every connection more than this costs all of them together.
func NewWaiter(ctx context.Context) *Waiter {
	return &Waiter{ctx: ctx, token: make(chan struct{}, 1)}
}

// Close releases the waiter. Nobody may use it after that.
func (w *Waiter) Close() {
	if w.timer != nil {
		w.timer.Stop()
	}
}

// Canceled reports whether the context has ended, for whoever is too busy to wait.
func (w *Waiter) Canceled() bool { return w.ctx.Err() != nil }

func (w *Waiter) wake() {
	select {
	case w.token <- struct{}{}:
	default:
	}
}

// Wait blocks until something may have happened to a connection that this waiter waits for, and then returns nil; the
// caller tries again. It ends with ErrDeadline at the deadline, never with a zero one, and with ErrCanceled when the
// context has ended. A connection that is waited for once is waited for until it is closed, rests, or is waited for by
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
	if w.Canceled() {
		return ErrCanceled
	}
	if missed {
		return nil
	}
	if deadline.IsZero() {
		<-w.token
	} else if !w.waitUntil(deadline) {
		return ErrDeadline
	}
	if w.Canceled() {
		return ErrCanceled
	}
	return nil
}

// adopt makes events of c wake w from now on. It reports whether something may have happened that woke another waiter,
// or nobody: then this wait is over at once.
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
	// The connection is in the table now. A round that began before it was there is seen here, a later one sees it there.
	if round := c.poller.rounds.Load(); round != w.round {
		w.round = round
		missed = true
	}
	return missed, err
}

// waitUntil reports whether something happened. What happened before the deadline counts even when the time is up by now:
// a process that was held up must not take it for silence.
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
