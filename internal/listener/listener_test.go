package listener

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/internal/tcp"
)

func TestMain(m *testing.M) { os.Exit(nettest.Main(m)) }

const patience = nettest.Patience

// echo echoes the bytes of each connection until it ends or is aborted.
type echo struct{ refused chan string }

func (e *echo) ServeConn(ctx context.Context, conn *tcp.Conn) {
	w := tcp.NewWaiter(ctx)
	defer w.Close()
	defer conn.Close()
	buf := make([]byte, 1000)
	for {
		n, err := conn.Read(buf)
		if err == nil {
			_, err = conn.Write(buf[:n])
		}
		if err == tcp.ErrAgain {
			err = w.Wait(time.Time{}, conn, nil)
		}
		if err != nil {
			return
		}
	}
}

func (e *echo) Refuse(conn *tcp.Conn) {
	e.refused <- conn.RemoteAddr().String()
	conn.Close()
}

// logBuffer is a log that can be read while it is written.
type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func start(t *testing.T, limit *Limit) (*Server, *echo, *logBuffer) {
	t.Helper()
	handler, log := &echo{make(chan string, 10)}, &logBuffer{}
	return serving(t, 2, handler, limit, slog.NewTextHandler(log, nil)), handler, log
}

// serving returns a server with a number of listeners that ends with the test.
func serving(t *testing.T, listeners int, handler Handler, limit *Limit, log slog.Handler) *Server {
	t.Helper()
	poller, err := tcp.NewPoller()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { poller.Close() })
	s := &Server{Name: "test", Handler: handler, Limit: limit, Log: slog.New(log)}
	for range listeners {
		ln, err := poller.Listen(netip.MustParseAddrPort("127.0.0.1:0"))
		if err != nil {
			t.Fatal(err)
		}
		s.Listeners = append(s.Listeners, ln)
	}
	s.Start()
	t.Cleanup(func() {
		s.Stop()
		s.Abort()
	})
	return s
}

func dial(t *testing.T, s *Server, i int) net.Conn {
	t.Helper()
	conn, err := net.DialTimeout("tcp4", s.Listeners[i].Addr().String(), patience)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(patience))
	return conn
}

func wantEcho(t *testing.T, conn net.Conn) {
	t.Helper()
	buf := make([]byte, 4)
	if _, err := conn.Write([]byte("ping")); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(conn, buf); err != nil || string(buf) != "ping" {
		t.Fatalf("echo: %q, %v", buf, err)
	}
}

func TestStopServesTheQueueAndRefusesLaterConnections(t *testing.T) {
	s, _, _ := start(t, NewLimit(0))
	open := dial(t, s, 0)
	wantEcho(t, open)
	var waiting []net.Conn
	for range 1000 {
		waiting = append(waiting, dial(t, s, 1)) // established by the kernel, but perhaps not accepted by the loop yet
	}
	s.Stop()
	for _, conn := range append(waiting, open) {
		wantEcho(t, conn)
	}
	if conn, err := net.DialTimeout("tcp4", s.Listeners[0].Addr().String(), patience); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("dialling after Stop: %v, %v; want refused", conn, err)
	}
	if err := s.Accepting(); err == nil {
		t.Error("Accepting returns nil after Stop")
	}
	s.Stop() // no effect
}

func TestWaitEndsWithTheLastConnection(t *testing.T) {
	s, _, _ := start(t, NewLimit(0))
	conn := dial(t, s, 0)
	wantEcho(t, conn)
	s.Stop()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.Wait(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("waiting with a connection open: %v", err)
	}
	if n := s.Active(); n != 1 {
		t.Errorf("%d connections are active, want 1", n)
	}
	conn.Close()
	ctx, cancel = context.WithTimeout(t.Context(), patience)
	defer cancel()
	if err := s.Wait(ctx); err != nil {
		t.Errorf("waiting after the last connection closed: %v", err)
	}
}

func TestAbortCutsConnections(t *testing.T) {
	s, _, _ := start(t, NewLimit(0))
	conn := dial(t, s, 0)
	wantEcho(t, conn)
	s.Stop()
	s.Abort()
	if n, err := conn.Read(make([]byte, 1)); n != 0 || err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("read %d, %v after Abort", n, err)
	}
	if n := s.Active(); n != 0 {
		t.Errorf("%d connections after Abort", n)
	}
}

func TestLimitIsSharedAndReleased(t *testing.T) {
	limit := NewLimit(2)
	a, _, _ := start(t, limit)
	b, handler, _ := start(t, limit)
	first, second := dial(t, a, 0), dial(t, b, 0)
	wantEcho(t, first)
	wantEcho(t, second)
	third := dial(t, b, 1)
	select {
	case refused := <-handler.refused:
		if refused != third.LocalAddr().String() {
			t.Errorf("refused %s, want %v", refused, third.LocalAddr())
		}
	case <-time.After(patience):
		t.Fatal("the third connection was not refused")
	}
	first.Close()
	nettest.Eventually(t, "room for another connection", func() bool { return limit.open.Load() == 1 })
	wantEcho(t, dial(t, b, 0))
}

func TestAcceptBacksOffWithoutDescriptorsAndRecovers(t *testing.T) {
	s, _, log := start(t, NewLimit(0))
	if err := s.Accepting(); err != nil {
		t.Fatalf("not accepting: %v", err)
	}
	conn, release := dialWithTheLastDescriptor(t, s)
	defer release()

	nettest.Eventually(t, "accept to fail", func() bool { return errors.Is(s.Accepting(), syscall.EMFILE) })
	nettest.Eventually(t, "accept to be tried again", func() bool { return s.BackOffs() >= 4 })
	if n := strings.Count(log.String(), "cannot accept"); n != 1 {
		t.Errorf("logged %d times, want once:\n%s", n, log)
	}
	if !strings.Contains(log.String(), "nofile") {
		t.Errorf("no remedy in the log:\n%s", log)
	}
	release()
	wantEcho(t, conn)
	nettest.Eventually(t, "Accepting to return nil", func() bool { return s.Accepting() == nil })
	nettest.Eventually(t, "the recovery to be logged", func() bool { return strings.Contains(log.String(), "accepting again") })
	if n := strings.Count(log.String(), "cannot accept"); n != 1 {
		t.Errorf("logged %d times, want once:\n%s", n, log)
	}
}

func TestStopDoesNotWaitForABackOff(t *testing.T) {
	s, _, _ := start(t, NewLimit(0))
	s.firstBackOff.Store(int64(time.Hour))
	_, release := dialWithTheLastDescriptor(t, s)
	defer release()
	nettest.Eventually(t, "accept to fail", func() bool { return errors.Is(s.Accepting(), syscall.EMFILE) })
	stopped := make(chan struct{})
	go func() { s.Stop(); close(stopped) }()
	select {
	case <-stopped:
	case <-time.After(patience):
		t.Error("Stop waits for the back-off of an hour")
	}
}

// dialWithTheLastDescriptor dials with the last free descriptor, so that accept fails until release.
func dialWithTheLastDescriptor(t *testing.T, s *Server) (conn net.Conn, release func()) {
	t.Helper()
	lowerDescriptorLimit(t)
	var hog []*os.File
	for {
		f, err := os.Open("/dev/null")
		if err != nil {
			break
		}
		hog = append(hog, f)
	}
	hog[len(hog)-1].Close()
	return dial(t, s, 0), sync.OnceFunc(func() {
		for _, f := range hog {
			f.Close()
		}
	})
}

// lowerDescriptorLimit sets the descriptor limit to a few dozen until the test ends.
func lowerDescriptorLimit(t *testing.T) {
	t.Helper()
	var before syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &before); err != nil {
		t.Fatal(err)
	}
	lower := before
	lower.Cur = 64
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &lower); err != nil {
		t.Fatal(fmt.Errorf("lowering the descriptor limit: %w", err))
	}
	t.Cleanup(func() { syscall.Setrlimit(syscall.RLIMIT_NOFILE, &before) })
}

// naming sends the name of the goroutine that serves a connection, and serves it until its client closes it.
type naming chan string

func (n naming) ServeConn(_ context.Context, conn *tcp.Conn) {
	var trace [32]byte
	name, _, _ := strings.Cut(string(trace[:runtime.Stack(trace[:], false)]), " [")
	n <- name
	w := tcp.NewWaiter(context.Background())
	defer w.Close()
	defer conn.Close()
	for {
		if _, err := conn.Read(trace[:]); err != tcp.ErrAgain {
			return
		}
		if w.Wait(time.Time{}, conn, nil) != nil {
			return
		}
	}
}

func (naming) Refuse(conn *tcp.Conn) { conn.Reset() }

// The stack of a goroutine that has served a connection has grown already.
func TestGoroutinesServeSeveralConnections(t *testing.T) {
	names := make(naming)
	s := serving(t, 1, names, NewLimit(0), slog.DiscardHandler)
	served := func() (net.Conn, string) {
		conn := dial(t, s, 0)
		select {
		case name := <-names:
			return conn, name
		case <-time.After(patience):
			t.Fatal("a connection was not served")
		}
		return nil, ""
	}
	known := map[string]bool{}
	nettest.Eventually(t, "a goroutine to serve a second connection", func() bool {
		conn, name := served()
		conn.Close()
		again := known[name]
		known[name] = true
		return again
	})
	var open []net.Conn
	for range 2 * maxWarm {
		conn, _ := served()
		open = append(open, conn)
	}
	for _, conn := range open {
		conn.Close()
	}
	nettest.Eventually(t, "as many goroutines as may wait to wait", func() bool { return s.Active() == 0 && s.warm.Load() == maxWarm })
	s.Stop()
	nettest.Eventually(t, "the goroutines to end", func() bool { return s.warm.Load() == 0 })
}
