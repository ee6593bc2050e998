package relay

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/internal/tcp"
)

func TestMain(m *testing.M) { os.Exit(nettest.Main(m)) }

const patience = nettest.Patience

// rig is a relay between two loopback connections: client is the peer of down, server that of up.
type rig struct {
	client, server *net.TCPConn
	poller         *tcp.Poller
	fromDown       atomic.Uint64
	fromUp         atomic.Uint64
	cancel         context.CancelFunc
	ended          chan struct{}
	end            End
	err            error
}

func newRig(t testing.TB, options Options) *rig {
	t.Helper()
	poller, err := tcp.NewPoller()
	if err != nil {
		t.Fatal(err)
	}
	r := &rig{poller: poller, ended: make(chan struct{})}
	var down, up *tcp.Conn
	r.client, down = pair(t, poller)
	r.server, up = pair(t, poller)
	ctx, cancel := context.WithCancel(context.Background())
	r.cancel = func() { cancel(); poller.WakeAll() }
	options.FromDown, options.FromUp = &r.fromDown, &r.fromUp
	go func() {
		defer close(r.ended)
		w := tcp.NewWaiter(ctx)
		defer w.Close()
		r.end, r.err = Run(w, down, up, options)
	}()
	t.Cleanup(func() {
		r.client.Close()
		r.server.Close()
		r.cancel()
		<-r.ended
		poller.Close()
	})
	for _, conn := range []*net.TCPConn{r.client, r.server} {
		conn.SetDeadline(time.Now().Add(3 * patience))
	}
	return r
}

// pair returns the two ends of a loopback connection: the test's and the relay's.
func pair(t testing.TB, poller *tcp.Poller) (*net.TCPConn, *tcp.Conn) {
	t.Helper()
	listener, err := poller.Listen(netip.MustParseAddrPort("127.0.0.1:0"))
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	conn, err := net.DialTCP("tcp4", nil, net.TCPAddrFromAddrPort(listener.Addr()))
	if err != nil {
		t.Fatal(err)
	}
	accepted, err := listener.Accept()
	if err != nil {
		t.Fatal(err)
	}
	return conn, accepted
}

// wantEnd waits for the relay to end and checks the result.
func (r *rig) wantEnd(t testing.TB, want End) {
	t.Helper()
	select {
	case <-r.ended:
	case <-time.After(patience):
		t.Fatalf("the relay still runs after %v; want %s", patience, want)
	}
	if r.end != want {
		t.Errorf("ended as %s (%v), want %s", r.end, r.err, want)
	}
	if (r.err != nil) != (want == DownReset || want == UpReset) {
		t.Errorf("ended as %s with error %v", r.end, r.err)
	}
}

func reset(conn *net.TCPConn) {
	conn.SetLinger(0)
	conn.Close()
}

func wantReset(t testing.TB, conn *net.TCPConn) {
	t.Helper()
	if n, err := io.Copy(io.Discard, conn); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("read %d bytes and then %v, want a reset", n, err)
	}
}

func wantRead(t testing.TB, conn *net.TCPConn, want string) {
	t.Helper()
	got := make([]byte, len(want))
	if _, err := io.ReadFull(conn, got); err != nil || string(got) != want {
		t.Fatalf("read %q, %v; want %q", got, err, want)
	}
}

func wantEOF(t testing.TB, conn *net.TCPConn) {
	t.Helper()
	if n, err := conn.Read(make([]byte, 1)); err != io.EOF {
		t.Fatalf("read %d bytes, %v; want EOF", n, err)
	}
}

func send(t testing.TB, conn *net.TCPConn, text string) {
	t.Helper()
	if _, err := io.WriteString(conn, text); err != nil {
		t.Fatal(err)
	}
}

// sides runs a test for each side: near is the side that acts, far the other one.
func sides(t *testing.T, options Options, test func(t *testing.T, r *rig, near, far *net.TCPConn, nearReset End)) {
	t.Run("downstream acts", func(t *testing.T) {
		r := newRig(t, options)
		test(t, r, r.client, r.server, DownReset)
	})
	t.Run("upstream acts", func(t *testing.T) {
		r := newRig(t, options)
		test(t, r, r.server, r.client, UpReset)
	})
}

func TestEitherSideMaySendFirstAndHalfCloseFirst(t *testing.T) {
	sides(t, Options{}, func(t *testing.T, r *rig, near, far *net.TCPConn, _ End) {
		send(t, near, "question")
		wantRead(t, far, "question")
		near.CloseWrite()
		wantEOF(t, far)
		send(t, far, "answer after the half-close")
		wantRead(t, near, "answer after the half-close")
		far.CloseWrite()
		wantEOF(t, near)
		r.wantEnd(t, Closed)
	})
}

func TestResetBecomesReset(t *testing.T) {
	sides(t, Options{}, func(t *testing.T, r *rig, near, far *net.TCPConn, want End) {
		send(t, near, "x")
		wantRead(t, far, "x")
		reset(near)
		wantReset(t, far)
		r.wantEnd(t, want)
	})
}

func TestResetIsDetectedAfterTheSameSideHalfClosed(t *testing.T) {
	sides(t, Options{}, func(t *testing.T, r *rig, near, far *net.TCPConn, want End) {
		near.CloseWrite()
		wantEOF(t, far)
		reset(near)
		// The far side only waits, so the reset can be detected only by watching the near side.
		r.wantEnd(t, want)
		if _, err := far.Write([]byte("x")); err == nil {
			_, err = far.Write([]byte("x"))
			if !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.EPIPE) {
				t.Errorf("writing to a reset connection: %v", err)
			}
		}
	})
}

func TestResetIsDetectedAfterTheOtherSideHalfClosed(t *testing.T) {
	sides(t, Options{}, func(t *testing.T, r *rig, near, far *net.TCPConn, want End) {
		far.CloseWrite()
		wantEOF(t, near)
		reset(near)
		wantReset(t, far)
		r.wantEnd(t, want)
	})
}

func TestResetIsDetectedWhileTheOtherSideStalls(t *testing.T) {
	sides(t, Options{}, func(t *testing.T, r *rig, near, far *net.TCPConn, want End) {
		fill(t, near) // far does not read, so the relay waits for far's window
		reset(near)
		r.wantEnd(t, want)
	})
}

func TestBytesSentBeforeAResetArrive(t *testing.T) {
	// A server answers early and closes with the request unread. Its answer must arrive although the relay fails to
	// write the request.
	for range 10 {
		r := newRig(t, Options{})
		fill(t, r.client)
		send(t, r.server, "413 enough")
		r.server.Close() // a close with unread data sends RST
		wantRead(t, r.client, "413 enough")
		wantReset(t, r.client)
		r.wantEnd(t, UpReset)
	}
}

func TestPeerThatClosedIsResetWhenWrittenTo(t *testing.T) {
	sides(t, Options{}, func(t *testing.T, r *rig, near, far *net.TCPConn, want End) {
		near.Close()
		wantEOF(t, far)
		// A closed peer looks half-closed until bytes reach it. Then it resets, and the reset must reach the writer.
		var err error
		for deadline := time.Now().Add(patience); err == nil && time.Now().Before(deadline); {
			_, err = far.Write([]byte("still there?"))
		}
		if !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.EPIPE) {
			t.Errorf("writing to a peer that closed: %v", err)
		}
		r.wantEnd(t, want)
	})
}

// fill writes until all buffers on the path are full: until no byte fits twice in a row, because the relay may pause once.
func fill(t testing.TB, conn *net.TCPConn) {
	t.Helper()
	chunk := make([]byte, 256<<10)
	for stuck := 0; stuck < 2; {
		conn.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
		n, err := conn.Write(chunk)
		if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatal(err)
		}
		if stuck++; n > 0 {
			stuck = 0
		}
	}
	conn.SetWriteDeadline(time.Time{})
}

func TestEveryByteArrivesInOrder(t *testing.T) {
	for _, size := range []int{0, 1, bulk - 1, bulk, bulk + 1, pipeSize, 3*pipeSize + 1, 64 << 20} {
		sides(t, Options{}, func(t *testing.T, r *rig, near, far *net.TCPConn, _ End) {
			want, got := sha256.New(), sha256.New()
			sent := make(chan struct{})
			go func() {
				defer close(sent)
				io.Copy(io.MultiWriter(near, want), io.LimitReader(rand.NewChaCha8([32]byte{1}), int64(size)))
				near.CloseWrite()
			}()
			if n, err := io.Copy(got, far); err != nil || n != int64(size) {
				t.Fatalf("%d bytes arrived, %v; want %d", n, err, size)
			}
			far.Close()
			r.wantEnd(t, Closed)
			<-sent
			if !bytes.Equal(want.Sum(nil), got.Sum(nil)) {
				t.Errorf("%d bytes arrived changed", size)
			}
			if counted := r.fromDown.Load() + r.fromUp.Load(); counted != uint64(size) {
				t.Errorf("counted %d bytes, want %d", counted, size)
			}
		})
	}
}

func TestBothDirectionsAtOnceWithPausesAndSlowReaders(t *testing.T) {
	const size = 8 << 20
	r := newRig(t, Options{})
	hashes := make(chan [2][sha256.Size]byte, 2)
	for _, way := range [][2]*net.TCPConn{{r.client, r.server}, {r.server, r.client}} {
		sent := make(chan [sha256.Size]byte, 1)
		go func() {
			hash := sha256.New()
			random := rand.New(rand.NewPCG(1, uint64(len(hashes))))
			for left := size; left > 0; {
				chunk := make([]byte, min(left, 1+random.IntN(100_000)))
				for i := range chunk {
					chunk[i] = byte(random.Uint32())
				}
				hash.Write(chunk)
				way[0].Write(chunk)
				left -= len(chunk)
			}
			way[0].CloseWrite()
			sent <- [sha256.Size]byte(hash.Sum(nil))
		}()
		go func() {
			hash := sha256.New()
			random := rand.New(rand.NewPCG(2, 3))
			for {
				n, err := io.CopyN(hash, way[1], int64(1+random.IntN(50_000)))
				if n == 0 || err != nil {
					break
				}
			}
			hashes <- [2][sha256.Size]byte{<-sent, [sha256.Size]byte(hash.Sum(nil))}
		}()
	}
	for range 2 {
		if pair := <-hashes; pair[0] != pair[1] {
			t.Error("bytes arrived changed")
		}
	}
	r.wantEnd(t, Closed)
}

func TestCountersMoveWhileTheConnectionIsOpen(t *testing.T) {
	r := newRig(t, Options{})
	send(t, r.client, "four")
	wantRead(t, r.server, "four")
	send(t, r.server, "seventy")
	wantRead(t, r.client, "seventy")
	nettest.Eventually(t, "both counters to move", func() bool { return r.fromDown.Load() == 4 && r.fromUp.Load() == 7 })
}

func TestBulkIsSplicedAndAnIdleConnectionHoldsNoPipe(t *testing.T) {
	awaitNoPipes(t)
	before := openPipes(t)
	r := newRig(t, Options{})
	go func() {
		r.client.Write(make([]byte, 8<<20))
	}()
	if _, err := io.CopyN(io.Discard, r.server, 8<<20); err != nil {
		t.Fatal(err)
	}
	if pipes.count() == 0 {
		t.Error("8 MiB were moved without a pipe")
	}
	nettest.Eventually(t, "the pipe to be closed while the connection is open", func() bool { return pipes.count() == 0 })
	if fds := openPipes(t); fds != before {
		t.Errorf("%d pipe descriptors are open, want %d as before", fds, before)
	}
	send(t, r.client, "and it goes on")
	wantRead(t, r.server, "and it goes on")
}

func TestSmallMessagesUseNoPipe(t *testing.T) {
	awaitNoPipes(t)
	r := newRig(t, Options{})
	message := strings.Repeat("m", 4<<10)
	for range 1000 {
		send(t, r.client, message)
		wantRead(t, r.server, message)
	}
	if n := pipes.count(); n != 0 {
		t.Errorf("%d pipes for small messages", n)
	}
}

func TestWithoutPipesBytesAreCopied(t *testing.T) {
	var held []*pipe
	for p := pipes.take(); p != nil; p = pipes.take() {
		held = append(held, p)
	}
	if len(held) != maxPipes {
		t.Errorf("%d pipes available, want %d", len(held), maxPipes)
	}
	defer func() {
		for _, p := range held {
			pipes.give(p, true)
		}
	}()
	r := newRig(t, Options{})
	want := make([]byte, 2<<20)
	rand.NewChaCha8([32]byte{2}).Read(want)
	go r.client.Write(want)
	got := make([]byte, len(want))
	if _, err := io.ReadFull(r.server, got); err != nil || !bytes.Equal(got, want) {
		t.Errorf("bytes arrived changed, %v", err)
	}
}

// awaitNoPipes waits until the pipes of earlier tests are closed.
func awaitNoPipes(t testing.TB) {
	t.Helper()
	nettest.Eventually(t, "the pipes of earlier tests to be closed", func() bool { return pipes.count() == 0 })
}

func (pool *pipePool) count() int {
	pool.mu.Lock()
	defer pool.mu.Unlock()
	return pool.open
}

func openPipes(t testing.TB) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, entry := range entries {
		if target, _ := os.Readlink("/proc/self/fd/" + entry.Name()); strings.HasPrefix(target, "pipe:") {
			n++
		}
	}
	return n
}

func TestIdleTimeoutEndsAnIdleConnection(t *testing.T) {
	nettest.UnderLimit(t, 250*time.Millisecond, func(t testing.TB, limit time.Duration) {
		r := newRig(t, Options{IdleTimeout: limit})
		last := time.Now()
		for range 6 { // the connection outlives the limit while bytes move
			time.Sleep(limit / 4)
			last = time.Now()
			send(t, r.client, "x")
			wantRead(t, r.server, "x")
		}
		wantReset(t, r.client)
		if idle := time.Since(last); idle < limit {
			t.Errorf("ended after %v idle, want at least %v", idle, limit)
		}
		wantReset(t, r.server)
		r.wantEnd(t, IdleTimeout)
	})
}

func TestHalfCloseTimeoutEndsAnIdleHalfClosedConnection(t *testing.T) {
	for _, downActs := range []bool{true, false} {
		nettest.UnderLimit(t, 250*time.Millisecond, func(t testing.TB, limit time.Duration) {
			r := newRig(t, Options{HalfCloseTimeout: limit})
			near, far := r.client, r.server
			if !downActs {
				near, far = far, near
			}
			near.CloseWrite()
			for range 6 { // bytes that move keep it open
				time.Sleep(limit / 4)
				send(t, far, "x")
				wantRead(t, near, "x")
			}
			wantReset(t, near)
			r.wantEnd(t, HalfCloseTimeout)
		})
	}
}

func TestHalfCloseTimeoutLeavesOpenConnectionsAlone(t *testing.T) {
	r := newRig(t, Options{HalfCloseTimeout: 20 * time.Millisecond})
	time.Sleep(200 * time.Millisecond)
	send(t, r.client, "still open")
	wantRead(t, r.server, "still open")
}

func TestCancelCutsBothSides(t *testing.T) {
	r := newRig(t, Options{})
	r.cancel()
	wantReset(t, r.client)
	wantReset(t, r.server)
	r.wantEnd(t, Canceled)
}

func TestNoSideIsClosedBeforeItsLastByte(t *testing.T) {
	// Many short connections cover the orders in which the two halves can end.
	for i := range 300 {
		r := newRig(t, Options{})
		go func() {
			io.WriteString(r.client, "ping")
			if i%2 == 0 {
				r.client.CloseWrite()
			}
		}()
		go func() {
			io.ReadFull(r.server, make([]byte, 4))
			io.WriteString(r.server, "pong")
			r.server.Close()
		}()
		if got, err := io.ReadAll(r.client); string(got) != "pong" || err != nil {
			t.Fatalf("read %q, %v", got, err)
		}
		r.client.Close()
		r.wantEnd(t, Closed)
	}
}

func TestGraceStartsAtTheReset(t *testing.T) {
	r := newRig(t, Options{IdleTimeout: time.Hour})
	fill(t, r.client)
	time.Sleep(grace + grace/10) // the last byte moves longer ago than the grace
	began := time.Now()
	reset(r.client)
	r.wantEnd(t, DownReset)
	if took := time.Since(began); took < grace {
		t.Errorf("delivery after the reset was tried for %v, want %v", took, grace)
	}
}

// A relay that is to end goes on for a time, also while it is busy, and ends then. Until that it may be allowed again.
func TestARetiredRelayEndsAfterItsTime(t *testing.T) {
	for _, busy := range []bool{false, true} {
		nettest.UnderLimit(t, 50*time.Millisecond, func(t testing.TB, limit time.Duration) {
			var retired atomic.Bool
			r := newRig(t, Options{Retired: retired.Load, Retirement: limit, IdleTimeout: time.Hour})
			send := func(conn *net.TCPConn) error {
				_, err := io.WriteString(conn, "bytes")
				return err
			}
			wantRelayed := func() {
				t.Helper()
				if err := send(r.client); err != nil {
					t.Fatal(err)
				}
				wantRead(t, r.server, "bytes")
			}
			wantRelayed()
			retired.Store(true)
			wantRelayed()
			retired.Store(false)
			wantRelayed()
			retired.Store(true)
			r.poller.WakeAll()
			for busy && send(r.client) == nil && send(r.server) == nil {
				runtime.Gosched()
			}
			r.wantEnd(t, Retired)
		})
	}
}
