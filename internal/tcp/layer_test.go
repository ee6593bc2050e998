package tcp_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"slices"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/internal/tcp"
	"github.com/pillion-proxy/pillion/internal/tcp/layertest"
)

type layerRig struct {
	peer *layertest.Peer
	conn *tcp.Conn
	w    *tcp.Waiter
}

func newLayerRig(t *testing.T) *layerRig {
	t.Helper()
	poller, err := tcp.NewPoller()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { poller.Close() })
	r := &layerRig{w: tcp.NewWaiter(t.Context())}
	t.Cleanup(r.w.Close)
	r.peer, r.conn = layertest.Accept(t, poller)
	return r
}

// read reads once, after a wait if necessary.
func (r *layerRig) read(t *testing.T, p []byte) (int, error) {
	t.Helper()
	for {
		n, err := r.conn.Read(p)
		if err != tcp.ErrAgain {
			return n, err
		}
		r.wait(t)
	}
}

// wait waits for an event.
func (r *layerRig) wait(t *testing.T) {
	t.Helper()
	if err := r.w.Wait(time.Now().Add(nettest.Patience), r.conn, nil); err != nil {
		kernel, recorded := tcp.State(r.conn)
		t.Fatalf("%v; events of the socket: %#x, recorded: %#x; %d bytes are unsent", err, kernel, recorded, tcp.Unsent(r.conn))
	}
}

// readAll reads to the end.
func (r *layerRig) readAll(t *testing.T, size int) ([]byte, error) {
	t.Helper()
	var all []byte
	for p := make([]byte, size); ; {
		n, err := r.read(t, p)
		all = append(all, p[:n]...)
		if err != nil {
			return all, err
		}
	}
}

// arrive waits until the raw bytes have arrived. It does not read them.
func (r *layerRig) arrive(t *testing.T) {
	t.Helper()
	for r.w.Wait(time.Now().Add(nettest.Patience), r.conn, nil) == nil && !r.conn.Readable() {
	}
}

func random(n int) []byte {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{1}).Read(b)
	return b
}

// fill writes until the socket is full, and returns the bytes that were accepted.
func (r *layerRig) fill(t *testing.T, p []byte) []byte {
	t.Helper()
	taken := 0
	for {
		n, err := r.conn.Write(p[taken:])
		taken += n
		if err == tcp.ErrAgain {
			return p[:taken]
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

func TestRecordsThatArriveInPiecesAreDecoded(t *testing.T) {
	for _, size := range []int{1, 7, 999, 1 << 20} { // of the read buffer: smaller and larger than a record
		for _, piece := range []int{0, 1, 2, 777} {
			r := newLayerRig(t)
			r.peer.Piece = piece
			want := random(5000)
			go func() { r.peer.Write(want); r.peer.CloseWrite() }()
			if got, err := r.readAll(t, size); err != io.EOF || !bytes.Equal(got, want) {
				t.Errorf("by %d in pieces of %d: %d bytes, %v", size, piece, len(got), err)
			}
		}
	}
}

// A short read returns one record while the layer holds others. The socket has no event for those.
func TestALayeredConnectionStaysReadableAfterAShortRead(t *testing.T) {
	r := newLayerRig(t)
	r.peer.Write(random(2000)) // two records
	p := make([]byte, 1500)
	if n, err := r.read(t, p); n != 1000 || err != nil || !r.conn.Readable() {
		t.Fatalf("read %d bytes, %v; readable: %v", n, err, r.conn.Readable())
	}
	if n, err := r.conn.Read(p[:400]); n != 400 || err != nil || !r.conn.Readable() {
		t.Fatalf("read %d bytes, %v; readable: %v", n, err, r.conn.Readable())
	}
	if n, err := r.conn.Read(p); n != 600 || err != nil || r.conn.Readable() {
		t.Fatalf("read %d bytes, %v; readable: %v", n, err, r.conn.Readable())
	}
}

func TestATicketIsNotData(t *testing.T) {
	r := newLayerRig(t)
	r.peer.Ticket()
	r.arrive(t)
	if n, err := r.conn.Read(make([]byte, 10)); n != 0 || err != tcp.ErrAgain {
		t.Errorf("read %d bytes, %v", n, err)
	}
}

func TestALayeredConnectionIsQuietUntilDataOrTheCloseMessage(t *testing.T) {
	for _, c := range []struct {
		name  string
		send  func(*layertest.Peer) error
		quiet bool
		then  string
		err   error
	}{
		{"nothing", func(*layertest.Peer) error { return nil }, true, "", tcp.ErrAgain},
		{"a ticket", (*layertest.Peer).Ticket, true, "", tcp.ErrAgain},
		{"data", func(p *layertest.Peer) error { _, err := p.Write([]byte("data")); return err }, false, "data", tcp.ErrAgain},
		{"a ticket and data", func(p *layertest.Peer) error { p.Ticket(); _, err := p.Write([]byte("data")); return err }, false, "data", tcp.ErrAgain},
		{"the close message", (*layertest.Peer).CloseMessage, false, "", io.EOF},
		{"a ticket and the close message", func(p *layertest.Peer) error { p.Ticket(); return p.CloseMessage() }, false, "", io.EOF},
		{"truncation", (*layertest.Peer).Truncate, false, "", io.ErrUnexpectedEOF},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newLayerRig(t)
			if err := c.send(r.peer); err != nil {
				t.Fatal(err)
			}
			if c.name != "nothing" {
				for r.w.Wait(time.Now().Add(nettest.Patience), r.conn, nil) == nil && r.conn.Quiet() && !c.quiet {
				}
			}
			for range 2 { // Quiet must not change the state
				if got := r.conn.Quiet(); got != c.quiet {
					t.Errorf("quiet: %v", got)
				}
			}
			if !c.quiet && !r.conn.Readable() {
				t.Error("not quiet, but not readable either")
			}
			var got []byte
			p := make([]byte, 10)
			for {
				n, err := r.conn.Read(p)
				got = append(got, p[:n]...)
				if err != nil {
					if err != c.err || string(got) != c.then {
						t.Errorf("then read %q, %v; want %q, %v", got, err, c.then, c.err)
					}
					return
				}
			}
		})
	}
}

// An attacker on the path can send FIN. So FIN without a close message is an error and not EOF.
func TestFINWithoutTheCloseMessageIsTruncation(t *testing.T) {
	for name, end := range map[string]struct {
		do   func(*layertest.Peer)
		want error
	}{
		"close message and FIN": {func(p *layertest.Peer) { p.CloseWrite() }, io.EOF},
		"close message":         {func(p *layertest.Peer) { p.CloseMessage() }, io.EOF},
		"FIN":                   {func(p *layertest.Peer) { p.Truncate() }, io.ErrUnexpectedEOF},
		"FIN in a record": {func(p *layertest.Peer) {
			p.TCPConn.Write(layertest.Encode([]byte("cut"))[:4])
			p.Truncate()
		}, io.ErrUnexpectedEOF},
	} {
		t.Run(name, func(t *testing.T) {
			r := newLayerRig(t)
			r.peer.Write([]byte("last words"))
			end.do(r.peer)
			got, err := r.readAll(t, 100)
			if string(got) != "last words" || err != end.want {
				t.Errorf("read %q, %v; want %v", got, err, end.want)
			}
			if n, err := r.conn.Read(make([]byte, 10)); n != 0 || err != end.want || !r.conn.Readable() {
				t.Errorf("again: %d, %v; readable: %v", n, err, r.conn.Readable())
			}
		})
	}
}

// The owner of a connection cannot see its unsent bytes, so every Wait must send them.
func TestWaitSendsWhatIsUnsent(t *testing.T) {
	r := newLayerRig(t)
	sent := r.fill(t, random(64<<20))
	if n, err := r.conn.Write([]byte("x")); n != 0 || err != tcp.ErrAgain {
		t.Fatalf("a full connection takes %d bytes, %v", n, err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		got := make([]byte, len(sent))
		if n, err := io.ReadFull(r.peer, got); err != nil || !bytes.Equal(got, sent) {
			t.Errorf("%d of %d bytes arrived, %v", n, len(sent), err)
		}
		r.peer.Write([]byte("all is here"))
	}()
	if n, err := r.read(t, make([]byte, 100)); n != 11 || err != nil { // read calls Wait
		t.Errorf("read %d bytes, %v", n, err)
	}
	<-done
}

// A write that was refused can go on when Wait has sent the unsent bytes. No event shows that: the socket is not watched for
// writes before the first Wait with a full one, and it has room by then.
func TestAWriteGoesOnAfterWaitHasSentTheRest(t *testing.T) {
	r := newLayerRig(t)
	r.peer.Write([]byte("a"))
	r.wait(t) // watches the socket
	if n, err := r.read(t, make([]byte, 10)); n != 1 || err != nil {
		t.Fatalf("read %d bytes, %v", n, err)
	}
	sent := r.fill(t, random(64<<20))
	done := make(chan struct{})
	go func() {
		defer close(done)
		if n, err := io.ReadFull(r.peer, make([]byte, len(sent)+1)); err != nil {
			t.Errorf("%d of %d bytes arrived, %v", n, len(sent)+1, err)
		}
	}()
	nettest.Eventually(t, "the socket has room", func() bool {
		kernel, _ := tcp.State(r.conn)
		return kernel&unix.EPOLLOUT != 0
	})
	for n := 0; n == 0; {
		r.wait(t)
		var err error
		if n, err = r.conn.Write([]byte("x")); err != nil && err != tcp.ErrAgain {
			t.Fatal(err)
		}
	}
	<-done
}

// A later write must finish the partly sent record before its own bytes.
func TestAPartlySentRecordIsFinishedFirst(t *testing.T) {
	r := newLayerRig(t)
	want := random(8 << 20)
	got := make(chan []byte, 1)
	go func() {
		all, err := io.ReadAll(r.peer)
		if err != nil {
			t.Errorf("the peer reads %v", err)
		}
		got <- all
	}()
	random := rand.New(rand.NewPCG(1, 2))
	for rest := want; len(rest) > 0; {
		n, err := r.conn.Write(rest[:min(len(rest), 1+random.IntN(100_000))])
		rest = rest[n:]
		if err == tcp.ErrAgain && random.IntN(2) == 0 { // otherwise retry without a wait
			err = r.w.Wait(time.Now().Add(nettest.Patience), r.conn, nil)
		}
		if err != nil && err != tcp.ErrAgain {
			t.Fatal(err)
		}
	}
	r.conn.Close()
	if all := <-got; !bytes.Equal(all, want) {
		t.Errorf("%d of %d bytes arrived, or they were changed", len(all), len(want))
	}
}

// A half-close sends the unsent bytes, then the close message, then FIN.
func TestAHalfCloseFollowsUnsentBytes(t *testing.T) {
	r := newLayerRig(t)
	if r.conn.Sending() {
		t.Error("sends before anything was written")
	}
	sent := r.fill(t, random(64<<20))
	if !r.conn.Sending() {
		t.Error("the unsent bytes are not being sent")
	}
	for range 2 {
		if err := r.conn.CloseWrite(); err != nil {
			t.Fatal(err)
		}
	}
	if n, err := r.conn.Write([]byte("x")); n != 0 || err == nil {
		t.Errorf("a closed half takes %d bytes, %v", n, err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		got, err := io.ReadAll(r.peer)
		if err != nil || !bytes.Equal(got, sent) {
			t.Errorf("%d of %d bytes arrived, %v", len(got), len(sent), err)
		}
		if n, err := r.peer.TCPConn.Read(make([]byte, 1)); n != 0 || err != io.EOF {
			t.Errorf("after the close message: %d, %v", n, err)
		}
		r.peer.Write([]byte("still open"))
	}()
	if n, err := r.read(t, make([]byte, 100)); n != 10 || err != nil {
		t.Errorf("the other half: %d, %v", n, err)
	}
	<-done
	if r.conn.Sending() {
		t.Error("sends after all has arrived")
	}
	if n, err := r.conn.Write([]byte("x")); n != 0 || !errors.Is(err, syscall.EPIPE) {
		t.Errorf("a closed half takes %d bytes, %v", n, err)
	}
}

// Close returns at once and must not lose bytes that the socket has not accepted yet.
func TestCloseSendsUnsentBytesAndTheCloseMessage(t *testing.T) {
	for name, watched := range map[string]bool{"that was waited for": true, "that was never waited for": false} {
		t.Run("a connection "+name, func(t *testing.T) {
			r := newLayerRig(t)
			if watched {
				r.w.Wait(time.Now(), r.conn, nil)
			}
			sent := r.fill(t, random(64<<20))
			r.conn.Close()
			r.conn.Close()
			if _, err := r.conn.Write([]byte("x")); !errors.Is(err, syscall.EBADF) {
				t.Errorf("a closed connection: %v", err)
			}
			got, err := io.ReadAll(r.peer)
			if err != nil || !bytes.Equal(got, sent) {
				t.Errorf("%d of %d bytes arrived, %v", len(got), len(sent), err)
			}
		})
	}
}

// A truncated stream must not look complete.
func TestAResetSendsNoCloseMessage(t *testing.T) {
	r := newLayerRig(t)
	r.conn.Write([]byte("half"))
	r.conn.Reset()
	if _, err := io.ReadAll(r.peer); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the peer reads %v", err)
	}
}

func TestPollerCloseResetsSendingConnections(t *testing.T) {
	poller, err := tcp.NewPoller()
	if err != nil {
		t.Fatal(err)
	}
	peer, conn := layertest.Accept(t, poller)
	r, w := &layerRig{peer: peer, conn: conn}, tcp.NewWaiter(t.Context())
	defer w.Close()
	for len(r.fill(t, random(64<<20))) > 0 { // the kernels may find room after it
		w.Wait(time.Now().Add(20*time.Millisecond), conn, nil)
	}
	conn.Close()
	poller.Close()
	if _, err := io.ReadAll(peer); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the peer reads %v", err)
	}
}

// Detection reads the first raw bytes before it can set the layer.
func TestBytesReadBeforeTheLayerAreDecodedFirst(t *testing.T) {
	poller, err := tcp.NewPoller()
	if err != nil {
		t.Fatal(err)
	}
	defer poller.Close()
	w := tcp.NewWaiter(t.Context())
	defer w.Close()
	peer, conn := layertest.Accept(t, poller)
	peer.Write([]byte("first"))
	peer.Write([]byte("second"))
	read := tcp.TakeBuffer()
	conn.SetLayer(nil, func(s *tcp.Socket) tcp.Layer { return rawLayer{s} })
	for read.Len() < len(layertest.Encode([]byte("first")))+len(layertest.Encode([]byte("second"))) {
		_, err := read.Fill(conn)
		if err == tcp.ErrAgain {
			err = w.Wait(time.Now().Add(nettest.Patience), conn, nil)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	layertest.Under(conn, read)
	if !conn.Readable() {
		t.Error("not readable with input in the layer")
	}
	peer.CloseWrite()
	got, err := (&layerRig{conn: conn, w: w}).readAll(t, 4)
	if string(got) != "firstsecond" || err != io.EOF {
		t.Errorf("read %q, %v", got, err)
	}
}

// rawLayer passes bytes through without records.
type rawLayer struct{ *tcp.Socket }

func (rawLayer) CloseWrite() error { return nil }
func (rawLayer) Buffered() bool    { return false }

func TestPiecesShareARecord(t *testing.T) {
	r := newLayerRig(t)
	var v tcp.Vector
	memory := random(100)
	var want []byte
	for i := 0; i < 100; i += 10 {
		v.Append(memory[i : i+5])
		want = append(want, memory[i:i+5]...)
	}
	if n, err := r.conn.WriteVector(&v); n != 50 || err != nil || v.Len() != 0 {
		t.Fatalf("WriteVector = %d, %v; %d bytes are left", n, err, v.Len())
	}
	got := make([]byte, 50)
	if _, err := io.ReadFull(r.peer, got); err != nil || !bytes.Equal(got, want) || r.peer.Records() != 1 {
		t.Errorf("%v, in %d records", err, r.peer.Records())
	}
}

func TestWriteVectorRemovesTheEncodedBytes(t *testing.T) {
	r := newLayerRig(t)
	want := random(1 << 20)
	var v tcp.Vector
	v.Append(want[:700_000])
	v.Append(bytes.Clone(want[700_000:]))
	done := make(chan struct{})
	go func() {
		defer close(done)
		got := make([]byte, len(want))
		if n, err := io.ReadFull(r.peer, got); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%d bytes, %v", n, err)
		}
	}()
	for v.Len() > 0 {
		_, err := r.conn.WriteVector(&v)
		if err == tcp.ErrAgain {
			err = r.w.Wait(time.Now().Add(nettest.Patience), r.conn, nil)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	r.conn.Close()
	<-done
}

// Splicing would bypass the layer and send unencoded bytes.
func TestALayeredConnectionIsNotSpliced(t *testing.T) {
	r := newLayerRig(t)
	if r.conn.Bare() {
		t.Error("Bare returns true with a layer")
	}
	if n, err := r.conn.SpliceTo(-1, 10); n != 0 || !errors.Is(err, syscall.EINVAL) {
		t.Errorf("SpliceTo = %d, %v", n, err)
	}
	if n, err := r.conn.SpliceFrom(-1, 10); n != 0 || !errors.Is(err, syscall.EINVAL) {
		t.Errorf("SpliceFrom = %d, %v", n, err)
	}
}

// A flush in Wait may consume the socket's error. Failed and Write must report it nevertheless.
func TestAFailureOfAFlushIsReported(t *testing.T) {
	r := newLayerRig(t)
	r.fill(t, random(64<<20))
	r.peer.SetLinger(0)
	r.peer.TCPConn.Close()
	for r.conn.Failed() == nil {
		if err := r.w.Wait(time.Now().Add(nettest.Patience), r.conn, nil); err != nil {
			t.Fatal(err)
		}
	}
	if n, err := r.conn.Write([]byte("x")); n != 0 || err == nil || err == tcp.ErrAgain {
		t.Errorf("Write = %d, %v", n, err)
	}
}

// A layer answers some records while it reads. A peer that sends such records and does not read the answers must not fill
// our memory, and once it reads, everything goes on.
func TestAPeerThatDoesNotReadAnswersIsNotReadFrom(t *testing.T) {
	r := newLayerRig(t)
	// All questions wait in the socket before the first is read. If the peer asks while its receive buffer overflows with
	// answers, the kernel's timers for closed windows decide when the next question arrives, which may be later than patience.
	if err := tcp.SetSendBuffer(r.conn, 4096); err != nil {
		t.Fatal(err)
	}
	if err := r.peer.Ask(10_000, 100); err != nil { // 50 KB of questions, 1 MB of answers
		t.Fatal(err)
	}
	if _, err := r.peer.Write([]byte("done")); err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 100)
	for tcp.Unsent(r.conn) <= tcp.MaxUnsent {
		if _, err := r.conn.Read(p); err != tcp.ErrAgain {
			t.Fatalf("Read returned %v", err)
		}
		if tcp.Unsent(r.conn) <= tcp.MaxUnsent {
			r.wait(t)
		}
	}
	const slack = 4096 / 5 * 103 // the answers to the questions of one read
	for range 1000 {
		if n, err := r.conn.Read(p); n != 0 || err != tcp.ErrAgain {
			t.Fatalf("read %d bytes, %v", n, err)
		}
		if got := tcp.Unsent(r.conn); got > tcp.MaxUnsent+slack {
			t.Fatalf("%d bytes are unsent", got)
		}
	}
	go io.Copy(io.Discard, r.peer) // until the connection is closed
	if n, err := r.read(t, p); string(p[:n]) != "done" || err != nil {
		t.Errorf("then read %q, %v", p[:n], err)
	}
}

// newStalledRig returns a connection whose reading is stalled by unsent answers. Bytes that were read before the layer was
// set cause no event when it can go on.
func newStalledRig(t *testing.T) *layerRig {
	t.Helper()
	r := newLayerRig(t)
	p := make([]byte, 100)
	// The first read finds the socket empty, so that only the layer makes the connection readable.
	if n, err := r.conn.Read(p); n != 0 || err != tcp.ErrAgain {
		t.Fatalf("read %d bytes, %v", n, err)
	}
	read := tcp.TakeBuffer()
	read.Append(layertest.Questions(3000, 5000)) // 15 MB of answers
	read.Append(layertest.Encode([]byte("done")))
	layertest.Under(r.conn, read)
	if n, err := r.conn.Read(p); n != 0 || err != tcp.ErrAgain {
		t.Fatalf("read %d bytes, %v", n, err)
	}
	if tcp.Unsent(r.conn) <= tcp.MaxUnsent || r.conn.Readable() {
		t.Fatalf("%d bytes are unsent, readable: %v", tcp.Unsent(r.conn), r.conn.Readable())
	}
	return r
}

// A connection that sends unsent bytes after Close has given its descriptor to another owner.
func TestALayeredConnectionLeavesTheSetWhenItIsClosed(t *testing.T) {
	r := newStalledRig(t)
	var set tcp.Set
	r.conn.Join(&set, nil, nil)
	local, remote := r.conn.LocalAddr(), r.conn.RemoteAddr()
	r.conn.Close()
	if found, _ := set.Returned(local, remote); found != nil || tcp.Size(&set) != 0 {
		t.Errorf("found %p of %d connections", found, tcp.Size(&set))
	}
}

func TestAStalledReadGoesOnAfterAWait(t *testing.T) {
	r := newStalledRig(t)
	go io.Copy(io.Discard, r.peer)
	for !r.conn.Readable() {
		if err := r.w.Wait(time.Now().Add(nettest.Patience), r.conn, nil); err != nil {
			t.Fatal(err)
		}
	}
	p := make([]byte, 100)
	if n, err := r.read(t, p); string(p[:n]) != "done" || err != nil {
		t.Errorf("read %q, %v", p[:n], err)
	}
}

// A write has sent what was unsent, and the owner waits without having read.
func TestAStalledReadGoesOnAfterAWrite(t *testing.T) {
	r := newStalledRig(t)
	go io.Copy(io.Discard, r.peer)
	nettest.Eventually(t, "a write", func() bool {
		n, _ := r.conn.Write([]byte("x"))
		return n == 1
	})
	if err := r.w.Wait(time.Now(), r.conn, nil); err != nil || !r.conn.Readable() {
		t.Errorf("Wait returned %v; readable: %v", err, r.conn.Readable())
	}
}

func TestSettleWaitsForUnsentBytes(t *testing.T) {
	poller, err := tcp.NewPoller()
	if err != nil {
		t.Fatal(err)
	}
	defer poller.Close()
	peer, conn := layertest.Accept(t, poller)
	r := &layerRig{peer: peer, conn: conn}
	sent := r.fill(t, random(64<<20))
	var open atomic.Int64
	conn.Track(&open)
	conn.Close()
	over, cancel := context.WithCancel(t.Context())
	cancel()
	if left := poller.Settle(over); left != 1 || open.Load() != 1 {
		t.Errorf("%d connections are left, and %d are counted as open; want 1", left, open.Load())
	}
	got := make(chan []byte, 1)
	go func() {
		all, err := io.ReadAll(peer)
		if err != nil {
			t.Errorf("the peer reads %v", err)
		}
		got <- all
	}()
	if left := poller.Settle(t.Context()); left != 0 || open.Load() != 0 {
		t.Errorf("%d connections are left, and %d are counted as open", left, open.Load())
	}
	if all := <-got; !bytes.Equal(all, sent) {
		t.Errorf("%d of %d bytes arrived", len(all), len(sent))
	}
}

// The close message and FIN share a segment, and a peer that has closed answers one reset. The kernel sends the message alone only if
// 200 ms pass before the FIN.
func TestTheCloseMessageSharesASegmentWithFIN(t *testing.T) {
	segments := func(t *testing.T, r *layerRig) (n uint32) {
		raw, err := r.peer.SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		raw.Control(func(fd uintptr) {
			info, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO)
			if err != nil {
				t.Fatal(err)
			}
			n = info.Segs_in
		})
		return n
	}
	var got []uint32
	for range 5 {
		r := newLayerRig(t)
		before := segments(t, r)
		r.conn.Close()
		if rest, err := io.ReadAll(r.peer); len(rest) > 0 || err != nil {
			t.Fatalf("%q, %v", rest, err)
		}
		if n, err := r.peer.TCPConn.Read(make([]byte, 1)); n != 0 || err != io.EOF {
			t.Fatalf("after the close message: %d, %v", n, err)
		}
		got = append(got, segments(t, r)-before)
	}
	if !slices.Contains(got, 1) {
		t.Errorf("the ends of connections have %d segments", got)
	}
}
