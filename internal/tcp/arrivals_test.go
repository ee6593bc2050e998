package tcp

import (
	"context"
	"net/netip"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

// waiterOf returns a waiter in a class.
func waiterOf(class uint8) *Waiter {
	w := NewWaiter(context.Background())
	w.class = class
	return w
}

// woken returns those of the waiters that have got a token, and takes it.
func woken(waiters []*Waiter) (indexes []int) {
	for i, w := range waiters {
		if len(w.token) > 0 {
			<-w.token
			indexes = append(indexes, i)
		}
	}
	return indexes
}

// The peers take turns, however many goroutines each has.
func TestPeersAreWokenInTurns(t *testing.T) {
	var a arrivals
	a.init()
	var all []*Waiter
	for _, class := range []uint8{7, 7, 7, 7, 7, 9, 9, 3} {
		all = append(all, waiterOf(class))
	}
	for _, w := range all {
		a.add(w)
	}
	a.share.Store(2)
	for _, want := range [][]int{{0, 5}, {1, 7}, {2, 6}, {3, 4}, nil} {
		if a.next(); !slices.Equal(woken(all), want) {
			t.Fatalf("not %v are woken", want)
		}
	}
	if a.count.Load() != 0 || !a.order.empty() {
		t.Error("some are left")
	}
}

func TestFewerAreWokenAtOnceWhenTheyTakeLong(t *testing.T) {
	var a arrivals
	a.init()
	for range 20 {
		a.adapt(longShare + 1)
	}
	if n := a.share.Load(); n != 1 {
		t.Errorf("%d are woken at once when they take long, want 1", n)
	}
	if a.adapt((longShare + shortShare) / 2); a.share.Load() != 1 {
		t.Error("a time between the limits changes the number")
	}
	for range 2 * maxShare {
		a.adapt(shortShare - 1)
	}
	if n := a.share.Load(); n != maxShare {
		t.Errorf("%d are woken at once when they take little, want %d", n, maxShare)
	}
}

func TestAQueueKeepsNoMemoryOfWhatLeft(t *testing.T) {
	var q queue[int]
	next := 0
	for i := range 10_000 {
		if q.push(i); i >= 3 {
			if got := q.pop(); got != next {
				t.Fatalf("%d leaves, want %d", got, next)
			}
			next++
		}
	}
	if cap(q.elements) > keptQueue {
		t.Errorf("the queue of 3 elements has room for %d", cap(q.elements))
	}
	for range 2 * keptQueue {
		q.push(0)
	}
	for !q.empty() {
		q.pop()
	}
	if cap(q.elements) != 0 {
		t.Error("the empty queue keeps the memory of many elements")
	}
}

func TestOnePeerHasOneClass(t *testing.T) {
	parse := netip.MustParseAddr
	if peerClass(parse("2001:db8::1")) != peerClass(parse("2001:db8::ffff:2")) {
		t.Error("two addresses of one prefix of 64 bits have two classes")
	}
	if peerClass(parse("203.0.113.7")) != peerClass(parse("::ffff:203.0.113.7")) {
		t.Error("an address has another class when it is mapped")
	}
	classes := map[uint8]bool{}
	for i := range 64 {
		classes[peerClass(netip.AddrFrom4([4]byte{203, 0, 113, byte(i)}))] = true
		classes[peerClass(netip.AddrFrom16([16]byte{0x20, 1, 0xd, 0xb8, 7: byte(i)}))] = true
	}
	if len(classes) < 64 {
		t.Errorf("128 peers have %d classes", len(classes))
	}
}

// Many connections of one peer have events before those of another. Few of the former run before the latter do.
func TestAPeerWithManyEventsDoesNotKeepAnotherWaiting(t *testing.T) {
	const many, few, rounds = 200, 3, 20
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1)) // otherwise the speed of other threads would count
	p := newPoller(t)
	ctx, cancel := context.WithCancel(t.Context())
	var done sync.WaitGroup
	defer done.Wait()
	defer p.WakeAll()
	defer cancel()
	var ran atomic.Int64
	serve := func(class uint8, woken func()) *Conn {
		peer, c := connected(t, p, "127.0.0.1:0")
		t.Cleanup(peer.Close)
		t.Cleanup(c.Close)
		waits := make(chan struct{})
		done.Go(func() {
			w := NewWaiter(ctx)
			w.class = class
			defer w.Close()
			var b [1]byte
			close(waits)
			for w.Wait(time.Time{}, c, nil) == nil {
				if n, _ := c.Read(b[:]); n > 0 {
					woken()
				}
			}
		})
		<-waits
		return peer
	}
	var heavy, light []*Conn
	for range many {
		heavy = append(heavy, serve(1, func() { ran.Add(1) }))
	}
	before := make(chan int64, few)
	for range few {
		light = append(light, serve(2, func() { before <- ran.Load() }))
	}
	p.arrivals.share.Store(1)
	late := 0
	for range rounds {
		ran.Store(0)
		p.arrivals.share.Store(1)
		for _, peer := range slices.Concat(heavy, light) {
			if _, err := peer.Write([]byte("x")); err != nil {
				t.Fatal(err)
			}
		}
		for range few {
			if n := <-before; n > many/4 {
				t.Logf("%d goroutines of a peer with more connections ran before", n)
				late++
			}
		}
		nettest.Eventually(t, "all have run", func() bool { return ran.Load() == many })
	}
	if late > few*rounds/4 { // beside other load, the goroutine of this test loses the processor between two writes now and then
		t.Errorf("another peer waited for many of them in %d of %d cases", late, few*rounds)
	}
}

// A goroutine that begins while others have events takes its turn like those.
func TestANewConnectionTakesItsTurn(t *testing.T) {
	p := new(Poller) // without the goroutine that wakes others
	a := &p.arrivals
	a.init()
	c := newConn(p, -1, netip.MustParseAddrPort("203.0.113.7:1"), 0)
	w := NewWaiter(t.Context())
	w.Begin(c, c.RemoteAddr().Addr()) // returns at once
	first := waiterOf(w.class)
	a.add(first)
	a.share.Store(1)
	nettest.OnceBlocked(t, "tcp.(*Waiter).Begin", func() {
		a.mu.Lock()
		defer a.mu.Unlock()
		if a.next(); len(first.token) == 0 {
			t.Error("the one that had an event before is not woken first")
		}
		a.next()
	})
	NewWaiter(t.Context()).Begin(c, c.RemoteAddr().Addr())
	if w.news.Load() != 0 || a.count.Load() != 0 {
		t.Error("the turn is left as an event")
	}
}
