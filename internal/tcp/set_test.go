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

func TestASetFindsTheOtherEndOfAConnectionUntilItIsClosed(t *testing.T) {
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
	for name, end := range map[string]func(*Conn){"Close": (*Conn).Close, "Reset": (*Conn).Reset} {
		c, other := dialled(t, p, listener)
		unknown, other2 := dialled(t, p, listener)
		c.Join(&set)
		local, remote := c.LocalAddr(), c.RemoteAddr()
		for _, no := range [][2]netip.AddrPort{{remote, local}, {local, local}, {unknown.LocalAddr(), remote}} {
			if set.MarkLooped(no[0], no[1]) {
				t.Errorf("%s: found a connection %v", name, no)
			}
		}
		if c.Looped() || !set.MarkLooped(local, remote) || !c.Looped() || unknown.Looped() {
			t.Errorf("%s: only the connection in the set must be found and marked", name)
		}
		if end(c); !c.Looped() || set.MarkLooped(local, remote) {
			t.Errorf("%s: a closed connection must keep its mark and leave the set", name)
		}
		unknown.Close()
		other.Close()
		other2.Close()
	}
	for i := range set.shards {
		if n := len(set.shards[i].conns); n != 0 {
			t.Errorf("shard %d has %d connections", i, n)
		}
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
	for range 50 {
		c, other := dialled(t, p, listener)
		local, remote := c.LocalAddr(), c.RemoteAddr()
		joined := make(chan struct{})
		users.Go(func() {
			c.Join(&set)
			close(joined)
			for !c.Looped() {
				nettest.Eventually(t, "the mark", c.Looped)
			}
			c.Close()
			other.Close()
		})
		users.Go(func() {
			<-joined
			if !set.MarkLooped(local, remote) {
				t.Errorf("%v is not found", local)
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
		c.Join(&set)
		set.MarkLooped(unknown, unknown)
		c.leave()
	}
}
