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
	free        int   // processors without a busy goroutine
	first, last *turn // those that queue
}

// turn is the state of a Waiter whose goroutine has yielded.
type turn struct {
	of      *turns
	holds   bool          // a processor; changed by the owner, or by a grant that the owner waits for
	granted chan struct{} // receives when the processor is handed over
	next    *turn         // in the queue; guarded by of.mu
}

// busyWaits is how many waits in succession may end at once for a goroutine that is not busy. Each found an event that had
// arrived since the wait before.
const busyWaits = 8

// Yield lets goroutines with an event run. The owner of c, a connection of w, calls it in place of Wait after it has done as
// much as it may do at once. It returns when the owner may go on. As after Wait, the owner must then try its reads and writes
// again: the next Wait does not end because of an event before Yield returned.
func (w *Waiter) Yield(c *Conn) {
	w.Pause(c)
	w.happened()
}

// Pause is Yield for an owner in the middle of work without reads and writes. The next Wait still ends because of the events.
func (w *Waiter) Pause(c *Conn) {
	c.poller.poll()   // Go's scheduler would not poll before all goroutines wait, or 10 ms have passed
	runtime.Gosched() // to the end of the global queue: the goroutines that poll has woken run first
	if w.turn == nil {
		w.turn = &turn{of: &c.poller.turns, granted: make(chan struct{}, 1)}
	}
	w.turn.pass()
}

// poll dispatches the events that are there. Poller.run may do that at the same time: each event is reported to one of them.
func (p *Poller) poll() {
	var events [64]unix.EpollEvent
	n, _ := epollReady(p.epfd, events[:]) // an interrupted call is made again by the next turn
	for i := range n {
		p.dispatch(&events[i])
	}
}

// pass hands the processor over to the first in the queue, and waits for its turn at the end of it.
func (t *turn) pass() {
	q := t.of
	q.mu.Lock()
	if !t.holds && q.free > 0 {
		q.free--
		t.holds = true
	}
	next := q.first
	if t.holds && next == nil {
		q.mu.Unlock()
		return
	}
	q.push(t)
	if t.holds {
		t.holds = false
		q.grant()
	}
	q.mu.Unlock()
	<-t.granted
}

// rest gives the processor up, because the goroutine is about to wait.
func (t *turn) rest() {
	if !t.holds {
		return
	}
	q := t.of
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.first != nil {
		q.grant()
	} else {
		q.free++
	}
	t.holds = false
}

// grant hands a processor to the first in the queue.
func (q *turns) grant() {
	t := q.first
	if q.first = t.next; q.first == nil {
		q.last = nil
	}
	t.next, t.holds = nil, true
	t.granted <- struct{}{} // has room
}

func (q *turns) push(t *turn) {
	if q.last != nil {
		q.last.next = t
	} else {
		q.first = t
	}
	q.last = t
}
