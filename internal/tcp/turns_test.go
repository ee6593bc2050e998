package tcp

import (
	"context"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

// turnsOf returns the states of n goroutines, and a function that awaits how many of them queue.
func turnsOf(q *turns, n int) (all []*turn) {
	for range n {
		all = append(all, newTurn(q, NewWaiter(context.Background())))
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
	q := &turns{limit: 1}
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
	if q.held != 0 || q.first != nil || q.last != nil {
		t.Errorf("in the end %d are held, and the queue is %v to %v", q.held, q.first, q.last)
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
	var passed []int64 // turns between events and a goroutine that waited for them
	for range events {
		before := turns.Load()
		for _, peer := range peers {
			if _, err := peer.Write([]byte("x")); err != nil {
				t.Fatal(err)
			}
		}
		for range peers {
			passed = append(passed, <-woken-before)
		}
	}
	if turns.Load() < events {
		t.Error("the busy goroutines have no turns")
	}
	slices.Sort(passed)
	most := passed[len(passed)*3/4] // beside other load, the goroutine of this test loses the processor between two writes now and then
	if t.Logf("%d turns, at most %d", most, passed[len(passed)-1]); most > 4 {
		t.Errorf("%d turns passed between events and the goroutines that waited for them", most)
	}
}

// A goroutine that ends its turn hands the processor to the next one. Events are noticed between the two, although no goroutine
// yields after its turn.
func TestAnEventComesBeforeTheNextTurn(t *testing.T) {
	const queue, at = 100, 10
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1)) // otherwise the speed of other threads would count
	p := newPoller(t)
	peer, light := connected(t, p, "127.0.0.1:0")
	defer peer.Close()
	defer light.Close()
	heavy, other := connected(t, p, "127.0.0.1:0")
	defer heavy.Close()
	defer other.Close()
	var done sync.WaitGroup
	var turns atomic.Int64
	woken := make(chan int64, 1)
	done.Go(func() {
		w := NewWaiter(t.Context())
		defer w.Close()
		var b [1]byte
		for n := 0; n <= 0; n, _ = light.Read(b[:]) {
			if w.Wait(time.Time{}, light, nil) != nil {
				return
			}
		}
		woken <- turns.Load()
	})
	first := NewWaiter(t.Context())
	defer first.Close()
	first.Pause(heavy) // the others queue
	for range queue {
		done.Go(func() {
			w := NewWaiter(t.Context())
			defer w.Close()
			w.Pause(heavy)
			if turns.Add(1) == at {
				peer.Write([]byte("x"))
			}
			w.EndTurn()
		})
	}
	nettest.Eventually(t, "the others queue", func() bool { return p.turns.queued() == queue })
	first.EndTurn()
	done.Wait()
	if late := <-woken - at; late > 4 { // more than one because the race detector makes the scheduler choose at random
		t.Errorf("%d turns passed between an event and the goroutine that waited for it", late)
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
	for range busyWaits - 1 {
		endsAtOnce()
	}
	if w.busy() {
		t.Errorf("busy after %d waits", busyWaits-1)
	}
	endsAtOnce()
	if !w.busy() {
		t.Errorf("not busy after %d waits", busyWaits)
	}
	endsAtOnce()
	if !w.busy() {
		t.Error("not busy after one more")
	}
	if err := w.Wait(time.Now().Add(time.Millisecond), c, nil); err != ErrDeadline {
		t.Fatal(err)
	}
	if w.busy() {
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
	if w.busy() {
		t.Error("the goroutine that waits has a processor")
	}
	w.wake()
	if err := w.Wait(time.Now(), c, nil); err != nil {
		t.Errorf("an event after the yield: %v", err)
	}
}

// A wait whose deadline has passed finds an event whose token is still on its way.
func TestAnEventAtTheDeadlineIsNotMissed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := NewWaiter(t.Context())
		defer w.Close()
		w.news.Or(event)
		time.AfterFunc(time.Second, func() { w.token <- struct{}{} }) // the rest of signal
		if err := w.Wait(time.Now(), nil, nil); err != nil {
			t.Error(err)
		}
	})
}

// Connections wait far more often than they are busy.
func TestARestWithoutAProcessorTakesNoLock(t *testing.T) {
	q := &turns{limit: 1}
	one := turnsOf(q, 1)[0]
	one.pass()
	one.rest()
	q.mu.Lock()
	defer q.mu.Unlock()
	one.rest() // would deadlock
	if q.held != 0 {
		t.Errorf("%d are held", q.held)
	}
}

// Go's runtime follows the CPU limit of the container.
func TestTheNumberOfBusyGoroutinesFollowsThatOfProcessors(t *testing.T) {
	q := &turns{limit: 1}
	all := turnsOf(q, 4)
	var done sync.WaitGroup
	defer done.Wait()
	granted := make(chan *turn)
	for i, one := range all {
		done.Go(func() {
			one.pass()
			granted <- one
		})
		if i > 0 {
			nettest.Eventually(t, "it queues", func() bool { return q.queued() == i })
		} else if got := <-granted; got != one {
			t.Fatal("another turn is granted")
		}
	}
	q.resize(3)
	for range 2 {
		<-granted
	}
	if q.queued() != 1 || q.held != 3 {
		t.Fatalf("after a rise, %d queue and %d are held", q.queued(), q.held)
	}
	q.resize(1)
	all[0].rest()
	all[1].rest()
	if q.queued() != 1 || q.held != 1 {
		t.Errorf("after a fall, %d queue and %d are held", q.queued(), q.held)
	}
	all[2].rest()
	<-granted
	all[3].rest()
	if q.held != 0 {
		t.Errorf("in the end, %d are held", q.held)
	}
}

// A busy goroutine that is alone queues while more goroutines hold processors than there are.
func TestABusyGoroutineGivesALostProcessorUp(t *testing.T) {
	q := &turns{limit: 2}
	all := turnsOf(q, 2)
	all[0].pass()
	all[1].pass()
	q.resize(1)
	passed := make(chan bool)
	go func() { all[0].pass(); close(passed) }()
	nettest.Eventually(t, "it queues", func() bool { return q.queued() == 1 })
	all[1].rest()
	<-passed
	if q.held != 1 {
		t.Errorf("%d are held", q.held)
	}
}

func TestAYieldChecksTheNumberOfProcessors(t *testing.T) {
	p := newPoller(t)
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(3))
	c, _ := connected(t, p, "127.0.0.1:0")
	w := NewWaiter(t.Context())
	defer w.Close()
	for range checkedYields {
		w.Yield(c)
	}
	if p.turns.limit != 3 {
		t.Errorf("%d goroutines may be busy on 3 processors", p.turns.limit)
	}
}

// A connection that is to end does not wait for the turns of others.
func TestAGoroutineThatIsStoppedLeavesTheQueue(t *testing.T) {
	p := newPoller(t)
	p.turns.limit = 1
	a, b := connected(t, p, "127.0.0.1:0")
	busy := NewWaiter(t.Context())
	defer busy.Close()
	busy.Yield(a) // and never again
	ctx, cancel := context.WithCancel(t.Context())
	for want, stop := range map[error]func(*Waiter){
		ErrInterrupted: func(w *Waiter) { w.Interrupt() },
		ErrCanceled:    func(*Waiter) { cancel(); p.WakeAll() },
	} {
		w := NewWaiter(map[error]context.Context{ErrInterrupted: t.Context(), ErrCanceled: ctx}[want])
		if err := w.Wait(time.Now(), b, nil); err != nil && err != ErrDeadline {
			t.Fatal(err)
		}
		ended := make(chan error)
		go func() {
			w.Yield(b)
			w.Pause(b) // does not queue
			ended <- w.Wait(time.Time{}, b, nil)
		}()
		nettest.Eventually(t, "it queues", func() bool { return p.turns.queued() == 1 })
		stop(w)
		if err := <-ended; err != want {
			t.Errorf("the wait after it ends with %v, want %v", err, want)
		}
		w.Close()
	}
	if p.turns.queued() != 0 || p.turns.held != 1 {
		t.Errorf("%d queue, and %d are held", p.turns.queued(), p.turns.held)
	}
}
