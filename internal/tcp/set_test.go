package tcp

import (
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

// dialled returns a connection of p to a listener, and the listener's side of it.
func dialled(t testing.TB, p *Poller, listener net.Listener) (c *Conn, other net.Conn) {
	t.Helper()
	w := NewWaiter(t.Context())
	defer w.Close()
	c, err := p.Dial(w, netip.Addr{}, netip.MustParseAddrPort(listener.Addr().String()), time.Time{})
	if err != nil {
		t.Fatal(err)
	}
	other, err = listener.Accept()
	if err != nil {
		t.Fatal(err)
	}
	return c, other
}

// newSetRig returns a poller, and a listener to dial.
func newSetRig(t testing.TB) (*Poller, net.Listener) {
	t.Helper()
	listener, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	p, err := NewPoller()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	return p, listener
}

func (s *Set) size() (n int) {
	for i := range s.shards {
		n += len(s.shards[i].conns)
	}
	return n
}

func TestASetFindsTheOtherEndOfAConnectionUntilItIsClosed(t *testing.T) {
	p, listener := newSetRig(t)
	var set Set
	for name, end := range map[string]func(*Conn){"Close": (*Conn).Close, "Reset": (*Conn).Reset} {
		c, other := dialled(t, p, listener)
		unknown, other2 := dialled(t, p, listener)
		c.Join(&set, nil, nil)
		local, remote := c.LocalAddr(), c.RemoteAddr()
		for _, no := range [][2]netip.AddrPort{{remote, local}, {local, local}, {unknown.LocalAddr(), remote}} {
			if found, _ := set.Returned(no[0], no[1]); found != nil {
				t.Errorf("%s: found a connection %v", name, no)
			}
		}
		if found, proven := set.Returned(local, remote); found != c || proven || c.Looped() {
			t.Errorf("%s: found %p, proven %t; want the connection, and no proof", name, found, proven)
		}
		end(c)
		if found, _ := set.Returned(local, remote); found != nil {
			t.Errorf("%s: a closed connection is still in the set", name)
		}
		unknown.Close()
		other.Close()
		other2.Close()
	}
	if n := set.size(); n != 0 {
		t.Errorf("%d connections are left", n)
	}
}

func TestALoopIsProvenByTheSecondConnectionThatReturns(t *testing.T) {
	p, listener := newSetRig(t)
	var set Set
	first, other := dialled(t, p, listener)
	second, other2 := dialled(t, p, listener)
	defer other.Close()
	defer other2.Close()
	first.Join(&set, nil, nil)
	found, _ := set.Returned(first.LocalAddr(), first.RemoteAddr())
	second.Join(&set, nil, found)
	if found, proven := set.Returned(second.LocalAddr(), second.RemoteAddr()); found != second || !proven {
		t.Errorf("found %p, proven %t; want the second connection, and a proof", found, proven)
	}
	second.Close()
	first.Close()
	if !first.Looped() || !second.Looped() {
		t.Errorf("looped: %t and %t, want both, also after they are closed", first.Looped(), second.Looped())
	}
}

// The other end of a connection that returns has just been accepted.
func TestAConnectionThatHasReceivedOrIsOldHasNotReturned(t *testing.T) {
	p, listener := newSetRig(t)
	w := NewWaiter(t.Context())
	defer w.Close()
	for name, age := range map[string]func(*Conn, net.Conn){
		"has received": func(c *Conn, other net.Conn) {
			other.Write([]byte("x"))
			if err := w.Wait(time.Now().Add(nettest.Patience), c, nil); err != nil || !c.Readable() {
				t.Fatalf("readable %t, %v", c.Readable(), err)
			}
		},
		"is old": func(c *Conn, _ net.Conn) { c.joined -= uint32(returnTime/time.Millisecond) + 1 },
	} {
		var set Set
		c, other := dialled(t, p, listener)
		c.Join(&set, nil, nil)
		if found, _ := set.Returned(c.LocalAddr(), c.RemoteAddr()); found != c {
			t.Errorf("%s: not found before", name)
		}
		age(c, other)
		if found, _ := set.Returned(c.LocalAddr(), c.RemoteAddr()); found != nil {
			t.Errorf("a connection that %s is found", name)
		}
		c.Close()
		other.Close()
	}
}

func TestASetIsUsedConcurrently(t *testing.T) {
	listener, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	p, err := NewPoller()
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	var set Set
	var users sync.WaitGroup
	proof, end := dialled(t, p, listener)
	defer proof.Close()
	defer end.Close()
	for range 50 {
		c, other := dialled(t, p, listener)
		local, remote := c.LocalAddr(), c.RemoteAddr()
		joined := make(chan struct{})
		users.Go(func() {
			c.Join(&set, nil, proof)
			close(joined)
			for !c.Looped() {
				nettest.Eventually(t, "the mark", c.Looped)
			}
			c.Close()
			other.Close()
		})
		users.Go(func() {
			<-joined
			if found, proven := set.Returned(local, remote); found != c || !proven {
				t.Errorf("%v: found %p, proven %t", local, found, proven)
			}
		})
	}
	users.Wait()
}

// A connection joins and leaves a set, and is looked up once: 0.3 µs of the tens of microseconds that it costs.
func BenchmarkSet(b *testing.B) {
	listener, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	defer listener.Close()
	p, err := NewPoller()
	if err != nil {
		b.Fatal(err)
	}
	defer p.Close()
	c, other := dialled(b, p, listener)
	defer other.Close()
	defer c.Close()
	var set Set
	unknown := netip.MustParseAddrPort("198.51.100.7:443")
	b.ReportAllocs()
	for b.Loop() {
		c.Join(&set, nil, nil)
		set.Returned(unknown, unknown)
		c.leave()
	}
}

// All connections have the same remote address.
func TestAGroupIsRetiredWithTheConnectionsThatJoinItLater(t *testing.T) {
	p, listener := newSetRig(t)
	var set Set
	lost, kept := new(Group), new(Group)
	w := NewWaiter(t.Context())
	defer w.Close()
	join := func(g *Group) *Conn {
		c, other := dialled(t, p, listener)
		t.Cleanup(c.Close)
		t.Cleanup(func() { other.Close() })
		c.Join(&set, g, nil)
		return c
	}
	open, others, ungrouped := join(lost), join(kept), join(nil)
	woken := make(chan error)
	go func() { woken <- w.Wait(time.Now().Add(nettest.Patience), open, nil) }()
	nettest.Eventually(t, "the owner waits", func() bool { return open.waiter.Load() == w })
	set.Retire(map[*Group]struct{}{lost: {}})
	if err := <-woken; err != nil {
		t.Errorf("the owner was not woken: %v", err)
	}
	late := join(lost)
	if !open.Retired() || !late.Retired() {
		t.Errorf("retired: the open connection %t, the one that joined later %t; want both", open.Retired(), late.Retired())
	}
	if others.Retired() || ungrouped.Retired() || join(kept).Retired() {
		t.Error("connections of another group are retired")
	}
}

func TestASetCountsConnectionsByAddress(t *testing.T) {
	p, listener := newSetRig(t)
	var set Set
	first, _ := dialled(t, p, listener)
	second, _ := dialled(t, p, listener)
	first.Join(&set, nil, nil)
	second.Join(&set, nil, nil)
	to := first.RemoteAddr()
	counts := map[netip.AddrPort]int{to: 1}
	if set.Count(counts); len(counts) != 1 || counts[to] != 3 {
		t.Errorf("%v, want 3 to %v", counts, to)
	}
	first.Close()
	clear(counts)
	if set.Count(counts); counts[to] != 1 {
		t.Errorf("after a close: %v", counts)
	}
	second.Close()
}
