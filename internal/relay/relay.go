// Package relay carries bytes both ways between two TCP connections and preserves TCP's own signals.
//
// Each side sees what the other does: a half-close passes as a half-close, a reset as a reset, and back pressure as a
// closed window. Bulk moves by splice(2) and is not copied to this process. An idle connection holds no pipe and no
// buffer, only its two descriptors and one parked goroutine.
package relay

import (
	"errors"
	"sync/atomic"
	"time"

	"github.com/pillion-proxy/pillion/internal/tcp"
)

// End is how a relay ended. The values are those of flow.Reason, so that a caller can convert one into the other.
type End string

// The ends of a relay.
const (
	Closed           End = "closed"             // both sides closed, and all bytes were delivered
	DownReset        End = "downstream_reset"   // down was reset, or vanished
	UpReset          End = "upstream_reset"     // up was reset, or vanished
	IdleTimeout      End = "idle_timeout"       // nothing moved for Options.IdleTimeout
	MaxDuration      End = "max_duration"       // Options.Until has passed
	HalfCloseTimeout End = "half_close_timeout" // one side had closed, and nothing moved for Options.HalfCloseTimeout
	Canceled         End = "drain_deadline"     // the waiter was canceled; only the deadline of a drain does that
	Unwatched        End = "no_descriptors"     // the kernel's limit of watched descriptors is reached
	Interrupted      End = "memory_budget"      // the waiter was interrupted; only the memory budget does that
	Retired          End = "mesh_refused"       // Options.Retired was true for Options.Retirement
	Denied           End = "policy_denied"      // Options.Denied was true
)

// grace is how long to keep delivering buffered bytes after their sender was reset. Without the relay they would be in
// the receiver's kernel already.
const grace = time.Second

// Options bound a relay and say where it counts. The zero value relays without any limit and counts nowhere.
type Options struct {
	IdleTimeout      time.Duration  // ends a relay in which nothing moves for this long; zero or less: never
	HalfCloseTimeout time.Duration  // the same, once one side has closed; zero or less: never
	Until            time.Time      // ends the relay, whatever moves; zero: never
	FromDown         *atomic.Uint64 // bytes that up's socket took; nil: not counted
	FromUp           *atomic.Uint64 // bytes that down's socket took; nil: not counted

	// Retired reports whether the relay is to end, Retirement after it was first true: peers that speak an unknown protocol
	// cannot be asked to close. It is called in each turn. nil: never.
	Retired    func() bool
	Retirement time.Duration

	Denied func() bool // ends the relay; called in each turn. nil: never

	PaceDown, PaceUp *Pace // limit what moves from down, and from up; nil: not limited

	// Bytes that the caller has read from a side, delivered first; may be nil. Run releases the buffers.
	DownRead, UpRead *tcp.Buffer
}

// Run relays until both sides have closed, one of them is reset, a time-out passes or w is canceled. It owns both
// connections, and has closed them when it returns: with FIN if it returns Closed, otherwise with RST. The error is the
// failure of a connection; it is nil for Closed and for the ends that Run itself decided.
func Run(w *tcp.Waiter, down, up *tcp.Conn, options Options) (End, error) {
	r := relay{down: side{Conn: down}, up: side{Conn: up}, options: options}
	r.fromDown = half{src: &r.down, dst: &r.up, pace: options.PaceDown, Mover: Mover{Src: down, Dst: up, Moved: options.FromDown}}
	r.fromUp = half{src: &r.up, dst: &r.down, pace: options.PaceUp, Mover: Mover{Src: up, Dst: down, Moved: options.FromUp}}
	r.fromDown.begin(options.DownRead)
	r.fromUp.begin(options.UpRead)
	how, err := r.run(w)
	r.fromDown.Release()
	r.fromUp.Release()
	if how == Closed {
		down.Close()
		up.Close()
	} else {
		down.Reset()
		up.Reset()
	}
	return how, err
}

// relay is the state of one Run, all of it its goroutine's.
type relay struct {
	down, up         side
	fromDown, fromUp half
	options          Options
	watched          End       // the limit in force
	lastMove         time.Time // when bytes last moved, or the limit came into force; zero without a limit
	retiredAt        time.Time // when Options.Retired was first true; zero: it is not
}

// side is one of the two connections.
type side struct {
	*tcp.Conn
	drained bool  // read to its end
	err     error // it is dead
}

// run moves what can be moved and waits, in turn.
func (r *relay) run(w *tcp.Waiter) (End, error) {
	for {
		down, up := r.fromDown.move(), r.fromUp.move()
		if how, err := r.over(); how != "" {
			return how, err
		}
		if r.options.Denied != nil && r.options.Denied() {
			return Denied, nil
		}
		retirement, over := r.retirement()
		if over {
			return Retired, nil
		}
		if (down == longTurn || up == longTurn) && !w.Stopped() {
			if until := r.options.Until; !until.IsZero() && !time.Now().Before(until) {
				return MaxDuration, nil
			}
			w.Yield(r.down.Conn)
			continue
		}
		how, deadline := r.deadline(down != nothing || up != nothing)
		if !retirement.IsZero() && (deadline.IsZero() || retirement.Before(deadline)) {
			how, deadline = Retired, retirement
		}
		if next := r.next(); !next.IsZero() && (deadline.IsZero() || next.Before(deadline)) {
			how, deadline = "", next
		}
		switch err := w.Wait(deadline, r.down.Conn, r.up.Conn); {
		case errors.Is(err, tcp.ErrDeadline) && how == "":
		case errors.Is(err, tcp.ErrDeadline):
			return how, r.failure()
		case errors.Is(err, tcp.ErrCanceled):
			return Canceled, nil
		case errors.Is(err, tcp.ErrInterrupted):
			return Interrupted, nil
		case err != nil:
			return Unwatched, err
		}
	}
}

// next returns when a half that its rate holds back moves again; zero: neither is held back.
func (r *relay) next() time.Time {
	next := r.fromDown.next
	if up := r.fromUp.next; next.IsZero() || !up.IsZero() && up.Before(next) {
		next = up
	}
	return next
}

// retirement returns when a relay that is to end ends, and whether that time has come. The time is zero for another relay.
func (r *relay) retirement() (at time.Time, over bool) {
	if r.options.Retired == nil {
		return time.Time{}, false
	}
	if !r.options.Retired() {
		r.retiredAt = time.Time{}
		return time.Time{}, false
	}
	now := time.Now()
	if r.retiredAt.IsZero() {
		r.retiredAt = now
	}
	at = r.retiredAt.Add(r.options.Retirement)
	return at, !now.Before(at)
}

// over returns how the relay ended, or "" while it continues.
//
// A dead side ends it once the bytes that it sent before are delivered, or cannot be. The poller reports dead sides as
// well, because the relay does not read from a side that has closed its half, or while bytes of it are held.
func (r *relay) over() (End, error) {
	finished := true
	for _, h := range [...]*half{&r.fromDown, &r.fromUp} {
		if h.src.err == nil {
			h.src.err = h.src.Failed()
		}
		if h.src.err != nil && (h.finished() || h.dst.err != nil) {
			return r.reset(h.src), h.src.err
		}
		finished = finished && h.finished()
	}
	if finished {
		return Closed, nil
	}
	return "", nil
}

func (r *relay) reset(dead *side) End {
	if dead == &r.down {
		return DownReset
	}
	return UpReset
}

// failure returns the error of the dead side, or nil.
func (r *relay) failure() error {
	if r.down.err != nil {
		return r.down.err
	}
	return r.up.err
}

// deadline returns when the next wait must end, and how the relay ends then. The zero time means no deadline. That is the
// ordinary case, and the clock is not read in it.
func (r *relay) deadline(moved bool) (End, time.Time) {
	how, limit := r.limit()
	if limit <= 0 {
		r.lastMove = time.Time{}
		return MaxDuration, r.options.Until
	}
	if moved || r.lastMove.IsZero() || how != r.watched {
		r.watched, r.lastMove = how, time.Now()
	}
	end := r.lastMove.Add(limit)
	if until := r.options.Until; !until.IsZero() && until.Before(end) {
		return MaxDuration, until
	}
	return how, end
}

// limit returns how long the relay may stay without movement, and how it ends after that.
func (r *relay) limit() (End, time.Duration) {
	idle, halfClosed := r.options.IdleTimeout, r.options.HalfCloseTimeout
	switch {
	case r.down.err != nil:
		return DownReset, grace
	case r.up.err != nil:
		return UpReset, grace
	case (r.down.drained || r.up.drained) && halfClosed > 0 && (idle <= 0 || halfClosed < idle):
		return HalfCloseTimeout, halfClosed
	default:
		return IdleTimeout, idle
	}
}
