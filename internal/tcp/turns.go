package tcp

import (
	"runtime"
	"sync"

	"golang.org/x/sys/unix"
)

// turns bounds how many goroutines that always have work can run before one whose connection has an event. A goroutine
// that yields is busy from then on, until it waits. As many busy goroutines run as there are processors. The others stand in
// a queue here, not in that of Go's scheduler, which a goroutine enters at the end when its event arrives.
type turns struct {
	mu          sync.Mutex
	limit       int   // processors
	held        int   // those with a busy goroutine; above limit after that was lowered, until goroutines queue or wait
	first, last *turn // those that queue
}

// turn is the state of a Waiter whose goroutine has yielded.
type turn struct {
	of      *turns
	waiter  *Waiter
	yields  uint8         // since the number of processors was checked
	holds   bool          // a processor; changed by the owner, or by a grant that the owner waits for
	granted chan struct{} // receives when the processor is handed over
	queued  bool          // guarded by of.mu, as the places in the queue are

	prev, next *turn
}

// busyWaits is how many waits in succession may end at once for a goroutine that is not busy. Each found an event that had
// arrived since the wait before.
const busyWaits = 8

// checkedYields is how many yields of a goroutine pass between two checks of the number of processors. Go's runtime changes
// it when the CPU limit of the container changes.
const checkedYields = 64

// Yield lets goroutines with an event run. The owner of c, a connection of w, calls it in place of Wait after it has done as
// much as it may do at once. It returns when the owner may go on. As after Wait, the owner must then try its reads and writes
// again: the next Wait does not end because of an event before Yield returned.
func (w *Waiter) Yield(c *Conn) {
	w.Pause(c)
	w.happened()
}

// Pause is Yield for an owner in the middle of work without reads and writes. The next Wait still ends because of the events.
//
// Goroutines with events run last, just before it returns: the goroutine that has handed its processor over may have waited or
// ended after its turn, without a poll.
func (w *Waiter) Pause(c *Conn) {
	t := w.turn.Load()
	if t == nil {
		t = newTurn(&c.poller.turns, w)
		w.turn.Store(t)
	}
	if t.yields++; t.yields == checkedYields {
		t.yields = 0
		t.of.resize(runtime.GOMAXPROCS(0))
	}
	t.pass()
	c.poller.poll()   // Go's scheduler would not poll before all goroutines wait, or 10 ms have passed
	runtime.Gosched() // to the end of the global queue: the goroutines that poll has woken run first
}

// EndTurn gives up the processor of a goroutine that has yielded, as Wait does. A goroutine that blocks otherwise calls it
// before, because the others wait for it.
func (w *Waiter) EndTurn() { w.rest() }

func newTurn(q *turns, w *Waiter) *turn {
	return &turn{of: q, waiter: w, granted: make(chan struct{}, 1)}
}

// resize sets the number of processors.
func (q *turns) resize(limit int) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for q.limit = limit; q.held < q.limit && q.first != nil; {
		q.held++
		q.grant()
	}
}

// poll dispatches the events that are there. Poller.run may do that at the same time: each event is reported to one of them.
func (p *Poller) poll() {
	events := polled.Get().(*[64]unix.EpollEvent)
	defer polled.Put(events)
	n, _ := epollReady(p.epfd, events[:]) // an interrupted call is made again by the next turn
	p.dispatch(events[:max(n, 0)])
}

// polled has memory for events. On the stack of a connection's goroutine it would double that stack, which stays while the
// connection is idle.
var polled = sync.Pool{New: func() any { return new([64]unix.EpollEvent) }}

// pass hands the processor over to the first in the queue, and waits for its turn at the end of it. A goroutine whose next
// wait fails does not queue: it is about to end.
func (t *turn) pass() {
	if t.enqueue() {
		<-t.granted
	}
}

// enqueue reports whether the goroutine queues. Otherwise it goes on.
func (t *turn) enqueue() bool {
	q := t.of
	q.mu.Lock()
	defer q.mu.Unlock()
	if t.waiter.Stopped() { // after this check, leave finds the goroutine in the queue
		return false
	}
	if !t.holds && q.held < q.limit {
		q.held++
		t.holds = true
	}
	if t.holds && q.first == nil && q.held <= q.limit {
		return false
	}
	q.push(t)
	if t.holds {
		t.release()
	}
	return true
}

// release hands the processor over to the first in the queue, unless there are fewer processors now. The caller holds of.mu.
func (t *turn) release() {
	q := t.of
	t.holds = false
	if q.first != nil && q.held <= q.limit {
		q.grant()
	} else {
		q.held--
	}
}

// leave ends the place in the queue of a goroutine whose next wait fails. It goes on without a processor.
func (t *turn) leave() {
	t.of.mu.Lock()
	defer t.of.mu.Unlock()
	if t.queued {
		t.of.remove(t)
		t.granted <- struct{}{} // has room
	}
}

// rest gives the processor up, because the goroutine is about to wait.
func (t *turn) rest() {
	if !t.holds {
		return
	}
	t.of.mu.Lock()
	defer t.of.mu.Unlock()
	t.release()
}

// grant hands a processor to the first in the queue.
func (q *turns) grant() {
	t := q.first
	q.remove(t)
	t.holds = true
	t.granted <- struct{}{} // has room
}

func (q *turns) push(t *turn) {
	t.queued, t.prev = true, q.last
	if q.last != nil {
		q.last.next = t
	} else {
		q.first = t
	}
	q.last = t
}

func (q *turns) remove(t *turn) {
	if t.prev != nil {
		t.prev.next = t.next
	} else {
		q.first = t.next
	}
	if t.next != nil {
		t.next.prev = t.prev
	} else {
		q.last = t.prev
	}
	t.queued, t.prev, t.next = false, nil, nil
}
