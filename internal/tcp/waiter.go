package tcp

import (
	"context"
	"errors"
	"sync/atomic"
	"time"
)

// The ends of a wait that no connection caused.
var (
	ErrDeadline = errors.New("the time is up")
	ErrCanceled = errors.New("canceled")
)

// Waiter is what one goroutine waits with. Make it with NewWaiter, and Close it when its connections are closed.
type Waiter struct {
	token    chan struct{} // holds one token when something happened since the last wait
	canceled atomic.Bool
	stop     func() bool
	timer    *time.Timer // made by the first wait with a deadline
}

// NewWaiter makes a waiter whose waits end when ctx does.
func NewWaiter(ctx context.Context) *Waiter {
	w := &Waiter{token: make(chan struct{}, 1)}
	w.stop = context.AfterFunc(ctx, w.cancel)
	return w
}

// Close releases the waiter. A deadline may still fire after it, for nobody.
func (w *Waiter) Close() {
	w.stop()
	if w.timer != nil {
		w.timer.Stop()
	}
}

func (w *Waiter) cancel() {
	w.canceled.Store(true)
	w.wake()
}

// Canceled reports whether the context has ended, for whoever is too busy to wait.
func (w *Waiter) Canceled() bool { return w.canceled.Load() }

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
	handedOn := false
	for _, c := range [...]*Conn{a, b} {
		if c == nil || c.waiter.Load() == w {
			continue
		}
		if c.watched {
			// What happened until now woke another waiter, or nobody.
			c.waiter.Store(w)
			handedOn = true
		} else if err := c.poller.watch(c, w); err != nil {
			return err
		}
	}
	if w.canceled.Load() {
		return ErrCanceled
	}
	if handedOn {
		return nil
	}
	if deadline.IsZero() {
		<-w.token
	} else if !w.waitUntil(deadline) {
		return ErrDeadline
	}
	if w.canceled.Load() {
		return ErrCanceled
	}
	return nil
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
