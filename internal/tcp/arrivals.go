package tcp

import (
	"hash/maphash"
	"net/netip"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// arrivals holds goroutines whose connections have had an event, if there are many of them. Go's scheduler would run them in
// the order of the events. A peer with many connections could then keep those of others waiting for as long as its own take,
// and the epoll set is not polled meanwhile.
//
// So only a few are woken at once, the peers in turns, and the set is polled before the next ones are. How many adapts to the
// time that they take.
type arrivals struct {
	mu      sync.Mutex
	classes [256]queue[*Waiter] // by peer, in the order of their events
	order   queue[uint8]        // the classes that are not empty
	count   atomic.Int32        // of waiters
	share   atomic.Int32        // how many are woken at once

	kick          chan struct{} // has a token if count has become positive
	stop, stopped chan struct{}
}

// keptQueue is the number of elements for which an empty queue keeps room.
const keptQueue = 64

// queue is a queue whose memory is proportional to the number of its elements.
type queue[T any] struct {
	elements []T
	first    int
}

func (q *queue[T]) push(e T) { q.elements = append(q.elements, e) }

func (q *queue[T]) empty() bool { return len(q.elements) == 0 }

func (q *queue[T]) pop() T {
	var none T
	e := q.elements[q.first]
	q.elements[q.first] = none
	if q.first++; q.first == len(q.elements) {
		q.elements, q.first = q.elements[:0], 0
		if cap(q.elements) > keptQueue {
			q.elements = nil
		}
	} else if q.first > len(q.elements)/2 {
		n := copy(q.elements, q.elements[q.first:])
		clear(q.elements[n:])
		q.elements, q.first = q.elements[:n], 0
	}
	return e
}

const (
	firstShare, maxShare = 16, 16

	// longShare is the time after which fewer goroutines are woken at once, and shortShare the time before which more are.
	// The time also passes while Go's scheduler runs others.
	longShare  = 400 * time.Microsecond
	shortShare = 200 * time.Microsecond
)

// classSeed keeps a peer from choosing an address of the same class as another's.
var classSeed = maphash.MakeSeed()

// peerClass returns the class of a peer. Addresses of one IPv6 prefix of 64 bits are one peer.
func peerClass(peer netip.Addr) uint8 {
	octets := peer.As16()
	if peer.Is6() && !peer.Is4In6() {
		clear(octets[8:])
	}
	return uint8(maphash.Bytes(classSeed, octets[:]))
}

// Begin names the peer of the waiter's connections, for whose goroutines there is one turn while many others have events, and
// waits for the first one. c is the first connection. It is optional, and precedes all other methods.
func (w *Waiter) Begin(c *Conn, peer netip.Addr) {
	w.class = peerClass(peer)
	if a := &c.poller.arrivals; a.count.Load() > 0 {
		w.news.Or(event)
		a.add(w)
		<-w.token
		w.take()
	}
}

func (a *arrivals) init() {
	a.share.Store(firstShare)
	a.kick, a.stop, a.stopped = make(chan struct{}, 1), make(chan struct{}), make(chan struct{})
}

// add puts w, whose news have become an event, at the end of its class. It gets its token later.
func (a *arrivals) add(w *Waiter) {
	a.mu.Lock()
	a.push(w)
	a.mu.Unlock()
	a.wake()
}

// wake makes admit run. It is called after count has become positive.
func (a *arrivals) wake() {
	select {
	case a.kick <- struct{}{}:
	default:
	}
}

func (a *arrivals) push(w *Waiter) {
	class := &a.classes[w.class]
	if class.empty() {
		a.order.push(w.class)
	}
	class.push(w)
	a.count.Add(1)
}

// next wakes as many goroutines as are to be woken at once, one of each class in turn. The caller holds mu.
func (a *arrivals) next() {
	for n := a.share.Load(); n > 0 && !a.order.empty(); n-- {
		i := a.order.pop()
		w := a.classes[i].pop()
		if !a.classes[i].empty() {
			a.order.push(i)
		}
		a.count.Add(-1)
		w.token <- struct{}{} // has room: see signal
	}
}

// dispatch records events, and wakes the goroutines that wait for them: at once, or if there are many, by and by.
func (p *Poller) dispatch(events []unix.EpollEvent) {
	a := &p.arrivals
	if a.count.Load() == 0 && len(events) <= int(a.share.Load()) {
		for i := range events {
			if w := p.record(&events[i]); w != nil {
				w.wake()
			}
		}
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	waited := a.count.Load() > 0
	for i := range events {
		if w := p.record(&events[i]); w != nil && w.news.Or(event)&(event|expiry) == 0 {
			a.push(w)
		}
	}
	if !waited {
		a.next()
	}
	if a.count.Load() > 0 {
		a.wake()
	}
}

// admit wakes the goroutines in arrivals until the poller is closed.
func (p *Poller) admit() {
	a := &p.arrivals
	defer close(a.stopped)
	for {
		select {
		case <-a.kick:
		case <-a.stop:
			return
		}
		for woken := time.Now(); a.count.Load() > 0; woken = time.Now() {
			runtime.Gosched() // to the end of the global queue: those that are woken run before
			a.adapt(time.Since(woken))
			p.poll()
			a.mu.Lock()
			a.next()
			a.mu.Unlock()
		}
	}
}

// adapt changes how many goroutines are woken at once, after the last ones have taken some time.
func (a *arrivals) adapt(took time.Duration) {
	switch share := a.share.Load(); {
	case took > longShare:
		a.share.Store(max(share/2, 1))
	case took < shortShare:
		a.share.Store(min(share+1, maxShare))
	}
}
