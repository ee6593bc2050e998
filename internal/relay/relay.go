// Package relay carries bytes both ways between two TCP connections and keeps TCP's own signals true.
//
// What one side does, the other sees: a half-close passes as a half-close, a reset as a reset, and back pressure as a
// closed window. While there is bulk, bytes move by splice(2) and never enter this process. A connection in which
// nothing is in flight holds no pipe and no buffer, only its two descriptors and two parked goroutines.
package relay

import (
	"context"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// End is how a relay ended. The words are those of flow.Reason, so that a room converts one into the other.
type End string

// The ends of a relay.
const (
	Closed           End = "closed"             // both sides closed, and every byte was delivered
	DownReset        End = "downstream_reset"   // down was reset, or vanished
	UpReset          End = "upstream_reset"     // up was reset, or vanished
	IdleTimeout      End = "idle_timeout"       // nothing moved for Options.IdleTimeout
	HalfCloseTimeout End = "half_close_timeout" // one side had closed, and nothing moved for Options.HalfCloseTimeout
	Canceled         End = "drain_deadline"     // the context ended; only the deadline of a drain ends it
)

// Options bound a relay and say where it counts. The zero value relays without any limit and counts nowhere.
type Options struct {
	IdleTimeout      time.Duration  // end when nothing moves for so long; zero or less: never
	HalfCloseTimeout time.Duration  // the same, once one side has closed; zero or less: never
	FromDown         *atomic.Uint64 // bytes that up's socket took; nil: not counted
	FromUp           *atomic.Uint64 // bytes that down's socket took; nil: not counted
}

// Run relays until both sides have closed, one of them is reset, a time-out passes or ctx ends. It owns both
// connections from the call on and has closed them when it returns: with FIN when it returns Closed, else with RST. The
// error says what failed; it is nil for Closed and for the ends that Run itself decided.
//
// Bytes that the caller read from a side beforehand are the caller's to write to the other side before the call.
func Run(ctx context.Context, down, up *net.TCPConn, options Options) (End, error) {
	downRaw, _ := down.SyscallConn() // fails only for a nil connection
	upRaw, _ := up.SyscallConn()
	r := &relay{down: end{down, downRaw}, up: end{up, upRaw}, options: options}
	r.fromDown = half{relay: r, src: &r.down, dst: &r.up, other: &r.fromUp, moved: options.FromDown}
	r.fromUp = half{relay: r, src: &r.up, dst: &r.down, other: &r.fromDown, moved: options.FromUp}
	r.sources.Store(2)

	if ctx.Done() != nil {
		stop := context.AfterFunc(ctx, r.cancel)
		defer stop()
	}
	if options.IdleTimeout > 0 {
		r.watchIdle(IdleTimeout, options.IdleTimeout)
	}

	r.halves.Add(1)
	go r.upstreamHalf()
	r.fromDown.run()
	r.halves.Wait()

	r.stopTimer()
	if r.ended.CompareAndSwap(nil, &ending{how: Closed}) {
		down.Close()
		up.Close()
	} else {
		// Whoever aborted may still be at it, and the connections must be closed when Run returns.
		r.down.reset()
		r.up.reset()
	}
	ended := r.ended.Load()
	return ended.how, ended.cause
}

// relay is the state that the two halves share.
type relay struct {
	down, up         end
	fromDown, fromUp half
	options          Options
	halves           sync.WaitGroup
	sources          atomic.Int32 // sources that have not reached EOF

	ended atomic.Pointer[ending] // nil while the relay runs; whoever sets it first has decided

	timerMu sync.Mutex
	timer   *time.Timer // nil when no time-out is running
	stopped bool
}

type ending struct {
	how   End
	cause error
}

// upstreamHalf is the second goroutine of a relay; the first is Run's caller.
func (r *relay) upstreamHalf() {
	defer r.halves.Done()
	r.fromUp.run()
}

// abort ends the relay with a reset of both connections. Closing them wakes whichever half still waits. Only the first
// call counts.
func (r *relay) abort(how End, cause error) {
	if r.ended.CompareAndSwap(nil, &ending{how, cause}) {
		r.down.reset()
		r.up.reset()
	}
}

func (r *relay) cancel() { r.abort(Canceled, nil) }

// failed ends the relay because side broke.
func (r *relay) failed(side *end, cause error) {
	how := UpReset
	if side == &r.down {
		how = DownReset
	}
	r.abort(how, cause)
}

// sourceClosed is told once by each half, when its source is at EOF and its destination knows. It reports whether the
// other half is still under way.
func (r *relay) sourceClosed() bool {
	if r.sources.Add(-1) == 0 {
		// The other half only watches for a reset now. A past deadline ends that.
		past := time.Unix(1, 0)
		_ = r.down.conn.SetReadDeadline(past)
		_ = r.up.conn.SetReadDeadline(past)
		return false
	}
	if r.options.HalfCloseTimeout > 0 {
		r.watchIdle(HalfCloseTimeout, r.options.HalfCloseTimeout)
	}
	return true
}

// watchIdle ends the relay as how when nothing moves for limit. It looks four times in that time, so the end comes up
// to a quarter late and never early. It takes the place of an earlier watch, unless that one is the stricter.
func (r *relay) watchIdle(how End, limit time.Duration) {
	r.timerMu.Lock()
	defer r.timerMu.Unlock()
	if r.stopped || r.timer != nil && r.options.IdleTimeout <= limit {
		return
	}
	if r.timer != nil {
		r.timer.Stop()
	}
	watch := &idleWatch{relay: r, how: how, step: max(limit/4, time.Millisecond), seen: r.activity()}
	watch.timer = time.AfterFunc(watch.step, watch.look)
	r.timer = watch.timer
}

func (r *relay) stopTimer() {
	r.timerMu.Lock()
	defer r.timerMu.Unlock()
	r.stopped = true
	if r.timer != nil {
		r.timer.Stop()
	}
}

// activity grows whenever bytes move.
func (r *relay) activity() uint64 { return r.fromDown.turns.Load() + r.fromUp.turns.Load() }

type idleWatch struct {
	relay *relay
	timer *time.Timer // guarded by relay.timerMu
	how   End
	step  time.Duration
	seen  uint64
	quiet int // looks in a row that saw nothing move
}

func (w *idleWatch) look() {
	if now := w.relay.activity(); now != w.seen {
		w.seen, w.quiet = now, 0
	} else if w.quiet++; w.quiet == 4 {
		w.relay.abort(w.how, nil)
		return
	}
	w.relay.timerMu.Lock()
	defer w.relay.timerMu.Unlock()
	if !w.relay.stopped && w.relay.timer == w.timer {
		w.timer.Reset(w.step)
	}
}
