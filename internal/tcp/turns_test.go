package tcp

import (
	"context"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

// turnsOf returns the states of n goroutines, and a function that awaits how many of them queue.
func turnsOf(q *turns, n int) (all []*turn) {
	for range n {
		all = append(all, &turn{of: q, granted: make(chan struct{}, 1)})
	}
	return all
}

// queued returns the number of goroutines in the queue.
func (q *turns) queued() (n int) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for t := q.first; t != nil; t = t.next {
		n++
	}
	return n
}

func TestBusyGoroutinesTakeTurnsInOrder(t *testing.T) {
	const many, rounds = 5, 4
	q := &turns{free: 1}
	all := turnsOf(q, many)
	var order []int // the race detector reports two goroutines that run at once
	var done sync.WaitGroup
	all[0].pass() // takes the processor
	run := func(i int) {
		for round := range rounds {
			if i > 0 || round > 0 {
				all[i].pass()
			}
			order = append(order, i)
		}
		all[i].rest()
	}
	for i := 1; i < many; i++ {
		done.Go(func() { run(i) })
		nettest.Eventually(t, "it queues", func() bool { return q.queued() == i })
	}
	done.Go(func() { run(0) })
	done.Wait()
	var want []int
	for range rounds {
		want = append(want, 0, 1, 2, 3, 4)
	}
	if !slices.Equal(order, want) {
		t.Errorf("the order is %v", order)
	}
	if q.free != 1 || q.first != nil || q.last != nil {
		t.Errorf("in the end %d are free, and the queue is %v to %v", q.free, q.first, q.last)
	}
}

// However many goroutines never wait, few turns of them pass before events wake those that wait for them: the turn that is in
// progress, and another one or two on the way, because the race detector makes the scheduler choose at random.
func TestAnEventComesBeforeTheTurnsOfBusyGoroutines(t *testing.T) {
	const busy, light, events = 50, 8, 200
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1)) // otherwise the speed of other threads would count
	p := newPoller(t)
	ctx, cancel := context.WithCancel(t.Context())
	var done sync.WaitGroup
	defer done.Wait()
	defer cancel()
	var turns atomic.Int64
	for range busy {
		c, other := connected(t, p, "127.0.0.1:0")
		t.Cleanup(c.Close)
		t.Cleanup(other.Close)
		done.Go(func() {
			w := NewWaiter(ctx)
			defer w.Close()
			for !w.Canceled() {
				turns.Add(1)
				w.Yield(c)
			}
		})
	}
	var peers []*Conn
	woken := make(chan int64)
	for range light {
		peer, c := connected(t, p, "127.0.0.1:0")
		t.Cleanup(peer.Close)
		t.Cleanup(c.Close)
		peers = append(peers, peer)
		done.Go(func() {
			w := NewWaiter(ctx)
			defer w.Close()
			var b [1]byte
			for {
				if n, _ := c.Read(b[:]); n > 0 {
					woken <- turns.Load()
				}
				if w.Wait(time.Time{}, c, nil) != nil {
					return
				}
			}
		})
	}
	defer p.WakeAll()
	defer cancel()
	nettest.Eventually(t, "the busy goroutines queue", func() bool { return p.turns.queued() == busy-1 })
	worst := int64(0)
	for range events {
		before := turns.Load()
		for _, peer := range peers {
			if _, err := peer.Write([]byte("x")); err != nil {
				t.Fatal(err)
			}
		}
		for range peers {
			worst = max(worst, <-woken-before)
		}
	}
	if turns.Load() < events {
		t.Error("the busy goroutines have no turns")
	}
	if t.Logf("at most %d turns", worst); worst > 4 {
		t.Errorf("%d turns passed between events and the goroutines that waited for them", worst)
	}
}

// A goroutine that finds an event each time it is about to wait is as busy as one that yields.
func TestWaitsThatEndAtOnceYield(t *testing.T) {
	p := newPoller(t)
	c, other := connected(t, p, "127.0.0.1:0")
	defer c.Close()
	defer other.Close()
	w := NewWaiter(t.Context())
	defer w.Close()
	endsAtOnce := func() {
		t.Helper()
		w.wake()
		if err := w.Wait(time.Time{}, c, nil); err != nil {
			t.Fatal(err)
		}
	}
	isBusy := func() bool { return w.turn != nil && w.turn.holds }
	for range busyWaits - 1 {
		endsAtOnce()
	}
	if isBusy() {
		t.Errorf("busy after %d waits", busyWaits-1)
	}
	endsAtOnce()
	if !isBusy() {
		t.Errorf("not busy after %d waits", busyWaits)
	}
	endsAtOnce()
	if !isBusy() {
		t.Error("not busy after one more")
	}
	if err := w.Wait(time.Now().Add(time.Millisecond), c, nil); err != ErrDeadline {
		t.Fatal(err)
	}
	if isBusy() {
		t.Error("busy after a wait without an event")
	}
}

// The owner reads and writes after Yield, so the events before are no reason for the next wait to end. The owner pauses in
// the middle of other work, so they are.
func TestAYieldTakesTheEventsBeforeIt(t *testing.T) {
	p := newPoller(t)
	c, _ := connected(t, p, "127.0.0.1:0")
	w := NewWaiter(t.Context())
	defer w.Close()
	if err := w.Wait(time.Now(), c, nil); err != nil && err != ErrDeadline {
		t.Fatal(err)
	}
	w.wake()
	w.Pause(c)
	if err := w.Wait(time.Now(), c, nil); err != nil {
		t.Errorf("after a pause: %v", err)
	}
	w.Interrupt()
	w.Yield(c)
	if err := w.Wait(time.Now(), c, nil); err != ErrInterrupted {
		t.Errorf("interrupted before a yield: %v", err)
	}
	w.wake()
	w.Yield(c)
	if err := w.Wait(time.Now(), c, nil); err != ErrDeadline {
		t.Errorf("after a yield: %v, want no event", err)
	}
	if w.turn.holds {
		t.Error("the goroutine that waits has a processor")
	}
	w.wake()
	if err := w.Wait(time.Now(), c, nil); err != nil {
		t.Errorf("an event after the yield: %v", err)
	}
}

// A wait whose deadline has passed finds an event whose token is still on its way.
func TestAnEventAtTheDeadlineIsNotMissed(t *testing.T) {
	w := NewWaiter(t.Context())
	defer w.Close()
	w.news.Or(event)
	time.AfterFunc(time.Millisecond, func() { w.token <- struct{}{} }) // the rest of signal
	if err := w.Wait(time.Now(), nil, nil); err != nil {
		t.Error(err)
	}
}

// Connections wait far more often than they are busy.
func TestARestWithoutAProcessorTakesNoLock(t *testing.T) {
	q := &turns{free: 1}
	one := turnsOf(q, 1)[0]
	one.pass()
	one.rest()
	q.mu.Lock()
	defer q.mu.Unlock()
	one.rest() // would deadlock
	if q.free != 1 {
		t.Errorf("%d are free", q.free)
	}
}
