package tcp

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

func TestMain(m *testing.M) { os.Exit(nettest.Main(m)) }

const patience = nettest.Patience

func newPoller(t testing.TB) *Poller {
	t.Helper()
	poller, err := NewPoller()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { poller.Close() })
	return poller
}

func listenIn(t testing.TB, ns *nettest.Namespace, poller *Poller, address string) *Listener {
	t.Helper()
	var listener *Listener
	ns.Do(t, func() (err error) {
		listener, err = poller.Listen(netip.MustParseAddrPort(address))
		return err
	})
	t.Cleanup(func() { listener.Close() })
	return listener
}

// connected returns the two ends of a connection, both watched by poller.
func connected(t testing.TB, poller *Poller, address string) (dialled, accepted *Conn) {
	t.Helper()
	listener, err := poller.Listen(netip.MustParseAddrPort(address))
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	waiter := NewWaiter(t.Context())
	defer waiter.Close()
	if dialled, err = poller.Dial(waiter, netip.Addr{}, listener.Addr(), time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	if accepted, err = listener.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(dialled.Close)
	t.Cleanup(accepted.Close)
	return dialled, accepted
}

func TestDialReportsBothAddresses(t *testing.T) {
	for _, c := range []struct {
		listen string
		source netip.Addr
		want   netip.Addr
	}{
		{"127.0.0.1:0", netip.Addr{}, netip.MustParseAddr("127.0.0.1")},
		{"127.0.0.1:0", netip.MustParseAddr("127.0.0.6"), netip.MustParseAddr("127.0.0.6")},
		{"[::1]:0", netip.Addr{}, netip.MustParseAddr("::1")},
	} {
		poller := newPoller(t)
		listener, err := poller.Listen(netip.MustParseAddrPort(c.listen))
		if err != nil {
			t.Fatal(err)
		}
		defer listener.Close()
		waiter := NewWaiter(t.Context())
		defer waiter.Close()
		dialled, err := poller.Dial(waiter, c.source, listener.Addr(), time.Now().Add(patience))
		if err != nil {
			t.Fatal(err)
		}
		defer dialled.Close()
		accepted, err := listener.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer accepted.Close()
		if dialled.RemoteAddr() != listener.Addr() || accepted.RemoteAddr() != dialled.LocalAddr() || accepted.RemoteAddr().Addr() != c.want {
			t.Errorf("listener %v, source %v: dialled %v → %v, accepted from %v", listener.Addr(), c.source,
				dialled.LocalAddr(), dialled.RemoteAddr(), accepted.RemoteAddr())
		}
	}
}

func TestDialErrors(t *testing.T) {
	poller, waiter := newPoller(t), NewWaiter(t.Context())
	defer waiter.Close()
	for _, c := range []struct {
		name   string
		source netip.Addr
		remote string
		want   error
	}{
		{"nothing listens", netip.Addr{}, "127.0.0.1:1", unix.ECONNREFUSED},
		{"nothing listens, IPv6", netip.Addr{}, "[::1]:1", unix.ECONNREFUSED},
		{"a source that is not ours", netip.MustParseAddr("203.0.113.9"), "127.0.0.1:1", unix.EADDRNOTAVAIL},
		{"no interface given", netip.Addr{}, "[fe80::9]:1", unix.EINVAL},
	} {
		conn, err := poller.Dial(waiter, c.source, netip.MustParseAddrPort(c.remote), time.Now().Add(patience))
		if !errors.Is(err, c.want) {
			t.Errorf("%s: %v, %v; want %v", c.name, conn, err, c.want)
		}
	}
}

func TestAConnectionNeverBlocks(t *testing.T) {
	dialled, accepted := connected(t, newPoller(t), "127.0.0.1:0")
	if n, err := accepted.Read(make([]byte, 10)); n != 0 || err != ErrAgain {
		t.Errorf("reading from a silent peer: %d, %v", n, err)
	}
	var err error
	for total := 0; err == nil; {
		var n int
		if n, err = dialled.Write(make([]byte, 1<<20)); total > 1<<30 {
			t.Fatal("the peer does not read, and no write returns ErrAgain")
		}
		total += n
	}
	if err != ErrAgain {
		t.Errorf("writing to a peer that does not read: %v", err)
	}
}

func TestEndsOfAConnection(t *testing.T) {
	waiter := NewWaiter(t.Context())
	defer waiter.Close()
	wait := func(t *testing.T, conn *Conn, what string, done func() bool) {
		t.Helper()
		for deadline := time.Now().Add(patience); !done(); {
			if err := waiter.Wait(deadline, conn, nil); err != nil {
				t.Fatalf("waiting for %s: %v", what, err)
			}
		}
	}
	t.Run("orderly", func(t *testing.T) {
		dialled, accepted := connected(t, newPoller(t), "127.0.0.1:0")
		dialled.CloseWrite()
		wait(t, accepted, "the half-close", accepted.Readable)
		if n, err := accepted.Read(make([]byte, 1)); n != 0 || err != io.EOF {
			t.Errorf("read %d, %v; want EOF", n, err)
		}
		if err := accepted.Failed(); err != nil {
			t.Errorf("Failed = %v on a half-closed connection", err)
		}
		accepted.CloseWrite()
		wait(t, dialled, "the end", func() bool { return dialled.ready.Load()&hungUp != 0 })
		if err := dialled.Failed(); err != nil {
			t.Errorf("Failed = %v on a connection that was closed both ways", err)
		}
	})
	t.Run("reset", func(t *testing.T) {
		dialled, accepted := connected(t, newPoller(t), "127.0.0.1:0")
		dialled.Reset()
		wait(t, accepted, "the reset", func() bool { return accepted.Failed() != nil })
		if err := accepted.Failed(); !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("Failed = %v after the socket error was consumed", err)
		}
	})
	t.Run("reset after a half-close", func(t *testing.T) {
		dialled, accepted := connected(t, newPoller(t), "127.0.0.1:0")
		dialled.CloseWrite()
		wait(t, accepted, "the half-close", accepted.Readable)
		dialled.Reset()
		wait(t, accepted, "the reset", func() bool { return accepted.Failed() != nil })
	})
	t.Run("reset whose error a write has consumed", func(t *testing.T) {
		dialled, accepted := connected(t, newPoller(t), "127.0.0.1:0")
		if err := waiter.Wait(time.Now().Add(time.Millisecond), accepted, nil); err != nil && err != ErrDeadline {
			t.Fatal(err)
		}
		dialled.Reset()
		var err error
		for err == nil {
			_, err = accepted.Write([]byte("x"))
		}
		wait(t, accepted, "the reset", func() bool { return accepted.Failed() != nil })
	})
}

func TestCloseTwiceLeavesOthersAlone(t *testing.T) {
	poller := newPoller(t)
	first, second := connected(t, poller, "127.0.0.1:0")
	first.Close()
	file, err := os.Open("/dev/null") // probably reuses first's descriptor
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	first.Close()
	first.Reset()
	if _, err := file.Stat(); err != nil {
		t.Errorf("closing a connection again closed another descriptor: %v", err)
	}
	second.Close()
}

func TestWaitEndsAtTheDeadlineAndWithTheContext(t *testing.T) {
	poller := newPoller(t)
	_, silent := connected(t, poller, "127.0.0.1:0")
	ctx, cancel := context.WithCancel(t.Context())
	w := NewWaiter(ctx)
	defer w.Close()
	for range 3 { // initial events of the connection may end the first waits
		w.Wait(time.Now().Add(10*time.Millisecond), silent, nil)
	}
	began := time.Now()
	if err := w.Wait(began.Add(20*time.Millisecond), silent, nil); err != ErrDeadline || time.Since(began) < 20*time.Millisecond {
		t.Errorf("Wait = %v after %v", err, time.Since(began))
	}
	if err := w.Wait(time.Now().Add(-time.Second), silent, nil); err != ErrDeadline {
		t.Errorf("Wait with a past deadline = %v", err)
	}
	nettest.OnceBlocked(t, "tcp.(*Waiter).Wait", func() { cancel(); poller.WakeAll() })
	if err := w.Wait(time.Time{}, silent, nil); err != ErrCanceled {
		t.Errorf("Wait = %v after the context was cancelled", err)
	}
	if err := w.Wait(time.Time{}, silent, nil); err != ErrCanceled {
		t.Errorf("second Wait = %v after the context was cancelled", err)
	}
}

func TestAnInterruptEndsOneWait(t *testing.T) {
	poller := newPoller(t)
	_, silent := connected(t, poller, "127.0.0.1:0")
	w := NewWaiter(t.Context())
	defer w.Close()
	for range 3 { // initial events of the connection may end the first waits
		w.Wait(time.Now().Add(10*time.Millisecond), silent, nil)
	}
	nettest.OnceBlocked(t, "tcp.(*Waiter).Wait", w.Interrupt)
	if err := w.Wait(time.Time{}, silent, nil); err != ErrInterrupted {
		t.Errorf("the wait in progress: %v", err)
	}
	for name, c := range map[string]struct {
		before func()
		want   error
	}{
		"the interrupt was reported": {func() {}, ErrDeadline},
		"interrupted before":         {w.Interrupt, ErrInterrupted},
		"taken back":                 {func() { w.Interrupt(); w.Continue() }, nil}, // an event without a cause
	} {
		w.Wait(time.Now(), silent, nil)
		c.before()
		if err := w.Wait(time.Now().Add(10*time.Millisecond), silent, nil); err != c.want {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
}

func TestAWaitSeesEitherConnection(t *testing.T) {
	poller := newPoller(t)
	farA, a := connected(t, poller, "127.0.0.1:0")
	farB, b := connected(t, poller, "127.0.0.1:0")
	w := NewWaiter(t.Context())
	defer w.Close()
	buf := make([]byte, 10)
	for _, c := range []struct{ far, near *Conn }{{farA, a}, {farB, b}, {farA, a}} {
		written := make(chan struct{})
		nettest.OnceBlocked(t, "tcp.(*Waiter).Wait", func() { c.far.Write([]byte("x")); close(written) })
		for {
			n, err := c.near.Read(buf)
			if err == nil && n == 1 {
				break
			}
			if err != ErrAgain {
				t.Fatalf("read %d, %v", n, err)
			}
			if err := w.Wait(time.Now().Add(patience), a, b); err != nil {
				t.Fatal(err)
			}
		}
		<-written // from here on far belongs to this goroutine
	}
}

// TestNoEventIsLost echoes random bytes over many connections of one poller at once. A lost event makes a wait hang.
func TestNoEventIsLost(t *testing.T) {
	poller := newPoller(t)
	listener, err := poller.Listen(netip.MustParseAddrPort("127.0.0.1:0"))
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	const conns, size = 50, 200_000
	var servers, clients sync.WaitGroup
	for i := range conns {
		clients.Add(1)
		go func() {
			defer clients.Done()
			conn, err := net.DialTimeout("tcp4", listener.Addr().String(), patience)
			if err != nil {
				t.Error(err)
				return
			}
			defer conn.Close()
			conn.SetDeadline(time.Now().Add(3 * patience))
			want := make([]byte, size)
			rand.NewChaCha8([32]byte{byte(i)}).Read(want)
			go func() {
				random := rand.New(rand.NewPCG(uint64(i), 1))
				for rest := want; len(rest) > 0; {
					n := min(len(rest), 1+random.IntN(5000))
					conn.Write(rest[:n])
					rest = rest[n:]
				}
				conn.(*net.TCPConn).CloseWrite()
			}()
			if got, err := io.ReadAll(conn); err != nil || !bytes.Equal(got, want) {
				t.Errorf("connection %d: %d bytes were echoed, %v", i, len(got), err)
			}
		}()
	}
	for range conns {
		conn, err := listener.Accept()
		if err != nil {
			t.Fatal(err)
		}
		servers.Add(1)
		go func() {
			defer servers.Done()
			defer conn.Close()
			if err := echo(t.Context(), conn); err != io.EOF {
				t.Errorf("echo: %v", err)
			}
		}()
	}
	clients.Wait()
	servers.Wait()
}

func echo(ctx context.Context, conn *Conn) error {
	w := NewWaiter(ctx)
	defer w.Close()
	buf := make([]byte, 3000)
	for {
		n, err := conn.Read(buf)
		for rest := buf[:n]; err == nil && len(rest) > 0; {
			if n, err = conn.Write(rest); err == ErrAgain {
				n, err = 0, w.Wait(time.Now().Add(patience), conn, nil)
			}
			rest = rest[n:]
		}
		if err == ErrAgain {
			err = w.Wait(time.Now().Add(patience), conn, nil)
		}
		if err != nil {
			return err
		}
	}
}

func TestAcceptEndsWithDeadlineAndClose(t *testing.T) {
	listener, err := newPoller(t).Listen(netip.MustParseAddrPort("127.0.0.1:0"))
	if err != nil {
		t.Fatal(err)
	}
	nettest.OnceBlocked(t, "tcp.(*Listener).Accept", func() { listener.SetDeadline(time.Now()) })
	if _, err := listener.Accept(); err != os.ErrDeadlineExceeded {
		t.Errorf("Accept after the deadline: %v", err)
	}
	listener.SetDeadline(time.Time{})
	nettest.OnceBlocked(t, "tcp.(*Listener).Accept", func() { listener.Close() })
	if _, err := listener.Accept(); err != os.ErrClosed {
		t.Errorf("Accept after Close: %v", err)
	}
}

// A process that was descheduled may find both an event and a deadline in the past. The event must win.
func TestAnEventBeforeTheDeadlineCounts(t *testing.T) {
	far, near := connected(t, newPoller(t), "127.0.0.1:0")
	w := NewWaiter(t.Context())
	defer w.Close()
	for w.Wait(time.Now().Add(10*time.Millisecond), near, nil) != ErrDeadline { // initial events of the connection
	}
	near.Read(make([]byte, 1))
	if _, err := far.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	nettest.Eventually(t, "the event to be there", func() bool { return near.Readable() && len(w.token) > 0 })
	if err := w.Wait(time.Now().Add(-time.Second), near, nil); err != nil {
		t.Errorf("Wait = %v with a pending event", err)
	}
}

// If the runtime did not watch the epoll descriptor, every wait would hang.
func TestAnUnwatchablePollerIsAnError(t *testing.T) {
	file, err := os.Create(filepath.Join(t.TempDir(), "file")) // the runtime cannot watch regular files
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	fd, err := unix.Dup(int(file.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	if poller, err := pollerOf(fd); !errors.Is(err, os.ErrNoDeadline) {
		t.Errorf("pollerOf = %v, %v", poller, err)
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err != unix.EBADF {
		t.Errorf("the descriptor was not closed: %v", err)
	}
}

// The kernel reuses a closed descriptor for the next connection. Calls on the closed connection must not reach that one.
func TestAClosedConnectionDoesNotTouchItsDescriptor(t *testing.T) {
	poller := newPoller(t)
	_, old := connected(t, poller, "127.0.0.1:0")
	w := NewWaiter(t.Context())
	defer w.Close()
	old.Close()
	if _, err := old.Read(make([]byte, 1)); !errors.Is(err, unix.EBADF) {
		t.Errorf("Read: %v", err)
	}
	if _, err := old.Write([]byte("x")); !errors.Is(err, unix.EBADF) {
		t.Errorf("Write: %v", err)
	}
	if err := old.CloseWrite(); !errors.Is(err, unix.EBADF) {
		t.Errorf("CloseWrite: %v", err)
	}
	if err := w.Wait(time.Now().Add(patience), old, nil); !errors.Is(err, unix.EBADF) {
		t.Errorf("Wait: %v", err)
	}
	old.Reset()
}
