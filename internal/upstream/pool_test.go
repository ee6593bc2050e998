package upstream

import (
	"errors"
	"io"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/internal/tcp"
)

const longLife = time.Hour

// server accepts connections for pools.
type server struct {
	poller   *tcp.Poller
	listener *tcp.Listener
	w        *tcp.Waiter
}

func newServer(t testing.TB) *server {
	t.Helper()
	poller, err := tcp.NewPoller()
	if err != nil {
		t.Fatal(err)
	}
	listener, err := poller.Listen(netip.MustParseAddrPort("127.0.0.1:0"))
	if err != nil {
		t.Fatal(err)
	}
	s := &server{poller, listener, tcp.NewWaiter(t.Context())}
	t.Cleanup(func() {
		s.w.Close()
		listener.Close()
		poller.Close()
	})
	return s
}

func (s *server) target() Target { return Target{Address: s.listener.Addr()} }

func (s *server) newPool(t testing.TB, idleLife time.Duration) *Pool {
	pool := NewPool(idleLife)
	t.Cleanup(pool.Close)
	return pool
}

// connect returns the two ends of a connection. The caller must close the near one.
func (s *server) connect(t testing.TB) (near, far *tcp.Conn) {
	t.Helper()
	near, err := s.poller.Dial(s.w, netip.Addr{}, s.listener.Addr(), time.Now().Add(nettest.Patience))
	if err != nil {
		t.Fatal(err)
	}
	if far, err = s.listener.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(far.Close)
	return near, far
}

// wantClosed waits until the far end sees that the near one was closed.
func (s *server) wantClosed(t testing.TB, far *tcp.Conn) {
	t.Helper()
	for p := make([]byte, 10); ; {
		_, err := far.Read(p)
		if err == io.EOF || errors.Is(err, unix.ECONNRESET) {
			return
		}
		if err == tcp.ErrAgain {
			err = s.w.Wait(time.Now().Add(nettest.Patience), far, nil)
		}
		if err != nil {
			t.Fatalf("the connection was not closed: %v", err)
		}
	}
}

func TestMostRecentlyUsedConnectionIsTakenFirst(t *testing.T) {
	s := newServer(t)
	pool := s.newPool(t, longLife)
	var given []*tcp.Conn
	for range 3 {
		conn, _ := s.connect(t)
		given = append(given, conn)
		pool.Give(s.target(), conn)
	}
	for i := len(given) - 1; i >= 0; i-- {
		if pool.Idle() != i+1 {
			t.Errorf("Idle = %d, want %d", pool.Idle(), i+1)
		}
		if conn := pool.Take(s.target()); conn != given[i] {
			t.Errorf("take %d returned another connection", i)
		}
		given[i].Close()
	}
	if conn := pool.Take(s.target()); conn != nil || pool.Idle() != 0 {
		t.Errorf("an empty pool returns %v, Idle = %d", conn, pool.Idle())
	}
}

func TestConnectionsAreKeptByTarget(t *testing.T) {
	s := newServer(t)
	pool := s.newPool(t, longLife)
	address := netip.MustParseAddrPort
	targets := []Target{
		{Address: address("203.0.113.1:80")},
		{Address: address("203.0.113.1:81")},
		{Address: address("203.0.113.2:80")},
		{Address: address("[::ffff:203.0.113.1]:80")},
		{Address: address("[fe80::1%1]:80")},
		{Address: address("[fe80::1%2]:80")},
		{Source: netip.MustParseAddr("127.0.0.6"), Address: address("203.0.113.1:80")},
		{Source: netip.MustParseAddr("127.0.0.7"), Address: address("203.0.113.1:80")},
		{Source: netip.MustParseAddr("127.0.0.7"), Borrowed: true, Address: address("203.0.113.1:80")},
	}
	conns := make(map[Target]*tcp.Conn)
	for _, target := range targets {
		if pool.Take(target) != nil {
			t.Errorf("a connection to %v before Give", target)
		}
		conns[target], _ = s.connect(t)
		pool.Give(target, conns[target])
	}
	for _, target := range targets {
		conn := pool.Take(target)
		if conn != conns[target] {
			t.Errorf("Take(%v) returned another connection", target)
		}
		conn.Close()
	}
}

func TestDeadConnectionsAreNotTaken(t *testing.T) {
	for name, end := range map[string]func(far *tcp.Conn){
		"closed":      (*tcp.Conn).Close,
		"half-closed": func(far *tcp.Conn) { far.CloseWrite() },
		"reset":       (*tcp.Conn).Reset,
		"has spoken":  func(far *tcp.Conn) { far.Write([]byte("HTTP/1.1 408 Request Timeout\r\n\r\n")) },
	} {
		for _, waited := range []bool{false, true} {
			s := newServer(t)
			pool := s.newPool(t, longLife)
			good, _ := s.connect(t)
			bad, far := s.connect(t)
			if waited {
				s.w.Wait(time.Now(), bad, nil) // the poller has its events
			}
			pool.Give(s.target(), good)
			pool.Give(s.target(), bad)
			end(far)
			nettest.Eventually(t, "the end to be there", func() bool { return !bad.Quiet() })
			if conn := pool.Take(s.target()); conn != good {
				t.Errorf("%s: the pool did not return the open connection", name)
			}
			if pool.Idle() != 0 {
				t.Errorf("%s: Idle = %d", name, pool.Idle())
			}
			good.Close()
			if name == "half-closed" || name == "has spoken" {
				s.wantClosed(t, far)
			}
		}
	}
}

// Events from before Take must not reach the new owner of a connection.
func TestTakenConnectionIsReadyForUse(t *testing.T) {
	s := newServer(t)
	pool := s.newPool(t, longLife)
	conn, far := s.connect(t)
	for range 3 {
		pool.Give(s.target(), conn)
		if pool.Take(s.target()) != conn {
			t.Fatal("the pool did not return an open connection")
		}
		if _, err := conn.Write([]byte("question")); err != nil {
			t.Fatal(err)
		}
		for _, c := range []struct{ at, reply *tcp.Conn }{{far, far}, {conn, nil}} {
			p, n, err := make([]byte, 10), 0, tcp.ErrAgain
			w := tcp.NewWaiter(t.Context()) // a new one each time, because downstream connections have their own
			for err == tcp.ErrAgain {
				if n, err = c.at.Read(p); err == tcp.ErrAgain {
					if waitErr := w.Wait(time.Now().Add(nettest.Patience), c.at, nil); waitErr != nil {
						t.Fatal(waitErr)
					}
				}
			}
			w.Close()
			if string(p[:n]) != "question" {
				t.Fatalf("read %q, %v", p[:n], err)
			}
			if c.reply != nil {
				c.reply.Write(p[:n])
			}
		}
	}
	conn.Close()
}

func TestBoundsOfAPool(t *testing.T) {
	s := newServer(t)
	pool := s.newPool(t, longLife)
	for target := range maxIdle/maxIdlePerTarget + 1 {
		for range maxIdlePerTarget + 2 {
			conn, far := s.connect(t)
			far.Close() // saves a descriptor; the pool does not check the connection before Take
			pool.Give(Target{Address: netip.AddrPortFrom(netip.MustParseAddr("203.0.113.1"), uint16(target))}, conn)
		}
		if want := min((target+1)*maxIdlePerTarget, maxIdle); pool.Idle() != want {
			t.Errorf("Idle = %d after %d targets, want %d", pool.Idle(), target+1, want)
		}
	}
}

func TestFullOrClosedPoolClosesConnections(t *testing.T) {
	s := newServer(t)
	closed := s.newPool(t, longLife)
	closed.Close()
	for name, pool := range map[string]*Pool{"keeps none": s.newPool(t, 0), "less than none": s.newPool(t, -1), "closed": closed} {
		conn, far := s.connect(t)
		pool.Give(s.target(), conn)
		s.wantClosed(t, far)
		if pool.Idle() != 0 || pool.Take(s.target()) != nil {
			t.Errorf("%s: the pool kept a connection", name)
		}
	}
}

func TestIdleConnectionsAreClosed(t *testing.T) {
	s := newServer(t)
	pool := s.newPool(t, 30*time.Millisecond)
	for range 2 { // the second time after the sweep has ended
		began := time.Now()
		var far [3]*tcp.Conn
		for i := range far {
			var conn *tcp.Conn
			conn, far[i] = s.connect(t)
			pool.Give(s.target(), conn)
		}
		for _, far := range far {
			s.wantClosed(t, far)
		}
		if rested := time.Since(began); rested < 30*time.Millisecond {
			t.Errorf("closed after %v", rested)
		}
		nettest.Eventually(t, "the sweep to end", func() bool {
			pool.mu.Lock()
			defer pool.mu.Unlock()
			return pool.sweep == nil && len(pool.idle) == 0 && pool.count == 0
		})
	}
}

// Between two sweeps the pool may hold connections that were idle for too long.
func TestConnectionsIdleForTooLongAreNotTaken(t *testing.T) {
	s := newServer(t)
	pool := s.newPool(t, longLife)
	conn, far := s.connect(t)
	pool.Give(s.target(), conn)
	pool.idle[s.target()].conns[0].since = time.Now().Add(-longLife)
	if pool.Take(s.target()) != nil {
		t.Error("Take returned the old connection")
	}
	s.wantClosed(t, far)
}

func TestCloseClosesIdleConnections(t *testing.T) {
	s := newServer(t)
	pool := s.newPool(t, longLife)
	var ends []*tcp.Conn
	for i := range 6 {
		conn, far := s.connect(t)
		ends = append(ends, far)
		pool.Give(Target{Address: netip.AddrPortFrom(netip.MustParseAddr("203.0.113.1"), uint16(i%3))}, conn)
	}
	pool.Close()
	pool.Close()
	for _, far := range ends {
		s.wantClosed(t, far)
	}
	if pool.Idle() != 0 {
		t.Errorf("Idle = %d", pool.Idle())
	}
}

// TestConcurrentUseOfAPool has goroutines give and take while connections expire and die. A connection must not have two
// owners, and each must be closed in the end.
func TestConcurrentUseOfAPool(t *testing.T) {
	s := newServer(t)
	pool := s.newPool(t, 2*time.Millisecond)
	var dialled, accepted, reused atomic.Int64
	var ends sync.WaitGroup
	ends.Go(func() {
		for n := 0; ; n++ {
			far, err := s.listener.Accept()
			if err != nil {
				return
			}
			accepted.Add(1)
			ends.Go(func() {
				if n%5 == 0 {
					far.Close() // possibly while it is idle
					return
				}
				w := tcp.NewWaiter(t.Context())
				defer w.Close()
				defer far.Close()
				for p := make([]byte, 10); ; {
					_, err := far.Read(p)
					if err == tcp.ErrAgain {
						err = w.Wait(time.Now().Add(nettest.Patience), far, nil)
					}
					if errors.Is(err, tcp.ErrDeadline) {
						t.Error("a connection was not closed")
					}
					if err != nil {
						return
					}
				}
			})
		}
	})
	var users sync.WaitGroup
	var owned sync.Map
	for range 8 {
		users.Go(func() {
			w := tcp.NewWaiter(t.Context())
			defer w.Close()
			for range 300 {
				conn := pool.Take(s.target())
				if conn == nil {
					var err error
					if conn, _, err = (&Dialer{Poller: s.poller}).Dial(w, s.target()); err != nil {
						t.Error(err)
						return
					}
					dialled.Add(1)
				} else {
					reused.Add(1)
				}
				if _, taken := owned.LoadOrStore(conn, true); taken {
					t.Error("a connection has two owners")
				}
				conn.Write([]byte("x"))
				w.Wait(time.Now().Add(time.Millisecond), conn, nil)
				owned.Delete(conn)
				pool.Give(s.target(), conn)
			}
		})
	}
	users.Wait()
	nettest.Eventually(t, "all to be accepted", func() bool { return accepted.Load() == dialled.Load() })
	s.listener.Close()
	ends.Wait() // the pool closes idle connections
	if reused.Load() == 0 || pool.Idle() != 0 {
		t.Errorf("%d reused, %d idle", reused.Load(), pool.Idle())
	}
}

// A request that can be sent again gets a fresh connection without a look at its socket, unless an event has shown its end.
func TestFreshConnectionsAreTakenByTheirEvents(t *testing.T) {
	s := newServer(t)
	pool := s.newPool(t, longLife)
	for _, event := range []bool{false, true} {
		conn, far := s.connect(t)
		far.Write([]byte("answer"))
		if err := s.w.Wait(time.Now().Add(nettest.Patience), conn, nil); err != nil { // conn is watched from here on
			t.Fatal(err)
		}
		var answer [16]byte
		if n, err := conn.Read(answer[:]); n != len("answer") {
			t.Fatal(n, err)
		}
		if _, err := conn.Read(answer[:]); err != tcp.ErrAgain {
			t.Fatal(err)
		}
		pool.Give(s.target(), conn)
		if event {
			far.Close()
			nettest.Eventually(t, "the poller to see the end", conn.Readable)
		}
		pool.idle[s.target()].conns[0].since = time.Now().Add(time.Hour) // the test may be slow
		target := s.target()
		taken, _ := pool.TakeUsed(&target, true)
		if event == (taken != nil) {
			t.Errorf("closed %v: took %v", event, taken)
		}
		if taken != nil {
			taken.Close()
		}
	}
}
