package relay

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/internal/tcp"
)

// moverRig is a mover between two loopback connections, driven by hand.
type moverRig struct {
	from, to *net.TCPConn // the far ends
	moved    atomic.Uint64
	w        *tcp.Waiter
	Mover
}

func newMoverRig(t testing.TB) *moverRig {
	t.Helper()
	poller, err := tcp.NewPoller()
	if err != nil {
		t.Fatal(err)
	}
	r := &moverRig{w: tcp.NewWaiter(t.Context())}
	r.from, r.Src = pair(t, poller)
	r.to, r.Dst = pair(t, poller)
	r.Moved = &r.moved
	t.Cleanup(func() {
		r.Release()
		r.from.Close()
		r.to.Close()
		r.Src.Close()
		r.Dst.Close()
		r.w.Close()
		poller.Close()
	})
	for _, conn := range []*net.TCPConn{r.from, r.to} {
		conn.SetDeadline(time.Now().Add(3 * patience))
	}
	return r
}

// carry moves left bytes and checks that no call takes more than its limit.
func (r *moverRig) carry(t testing.TB, left int64) {
	t.Helper()
	for left > 0 || r.Held() > 0 {
		var n int
		var err error
		if r.Held() > 0 {
			_, err = r.Put()
		} else if n, err = r.Take(left); int64(n) > left || n != r.Held() {
			t.Fatalf("Take(%d) = %d, Held = %d", left, n, r.Held())
		} else {
			left -= int64(n)
		}
		if err == tcp.ErrAgain {
			err = r.w.Wait(time.Now().Add(patience), r.Src, r.Dst)
		}
		if err != nil {
			t.Fatalf("with %d bytes to go: %v", left, err)
		}
	}
}

// pattern returns n bytes whose values depend on their position.
func pattern(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i) ^ byte(i>>8) ^ byte(i>>16)
	}
	return b
}

// TestTakeStopsAtItsLimit sends bodies of a known size, directly followed by the next message. The mover must not take that.
func TestTakeStopsAtItsLimit(t *testing.T) {
	for _, size := range []int{1, 5, bulk - 1, bulk, bulk + 1, 2 * bulk, pipeSize - 1, pipeSize, pipeSize + 1, 3*pipeSize + 77, 4 << 20} {
		for _, expected := range []bool{false, true} {
			t.Run(fmt.Sprintf("%d bytes, expected %v", size, expected), func(t *testing.T) {
				r := newMoverRig(t)
				body, next := pattern(size), bytes.Repeat([]byte("NEXT"), 50_000)
				go r.from.Write(append(bytes.Clone(body), next...))
				got := make(chan []byte)
				go func() {
					b := make([]byte, size)
					io.ReadFull(r.to, b)
					got <- b
				}()
				if expected {
					r.Expect(int64(size))
				}
				r.carry(t, int64(size))
				if !bytes.Equal(<-got, body) {
					t.Error("the body arrived changed")
				}
				if r.moved.Load() != uint64(size) {
					t.Errorf("counted %d bytes", r.moved.Load())
				}
				if r.buf != nil || r.pipe != nil {
					t.Error("a buffer or pipe is held after the body")
				}
				p := make([]byte, 4)
				for n := 0; n < len(p); {
					m, err := r.Src.Read(p[n:])
					if err == tcp.ErrAgain {
						err = r.w.Wait(time.Now().Add(patience), r.Src, nil)
					}
					if err != nil {
						t.Fatal(err)
					}
					n += m
				}
				if string(p) != "NEXT" {
					t.Errorf("the bytes after the body are %q", p)
				}
				r.from.Close() // ends the writer
			})
		}
	}
}

// Take must return the source's own end, also from splice: a socket error that splice has consumed is lost to a later read.
func TestTakeReturnsTheEndOfTheSource(t *testing.T) {
	for name, c := range map[string]struct {
		end  func(*net.TCPConn)
		want error
	}{
		"half-closed": {func(c *net.TCPConn) { c.CloseWrite() }, io.EOF},
		"closed":      {func(c *net.TCPConn) { c.Close() }, io.EOF},
		"reset":       {reset, syscall.ECONNRESET},
	} {
		for _, before := range []int{0, bulk, pipeSize + bulk} {
			for _, expected := range []int64{0, 1 << 20} {
				t.Run(fmt.Sprintf("%s after %d bytes, %d expected", name, before, expected), func(t *testing.T) {
					r := newMoverRig(t)
					r.Expect(expected)
					go r.from.Write(pattern(before))
					r.carry(t, int64(before))
					r.Expect(expected)
					c.end(r.from)
					err := tcp.ErrAgain
					for deadline := time.Now().Add(patience); err == tcp.ErrAgain && time.Now().Before(deadline); {
						_, err = r.Take(math.MaxInt64) // the result must not depend on whether the poller has seen the event
					}
					if !errors.Is(err, c.want) || r.Held() != 0 || r.buf != nil || r.pipe != nil {
						t.Errorf("Take = %v, Held = %d; want %v", err, r.Held(), c.want)
					}
				})
			}
		}
	}
}

func TestTakeOfZeroBytesHoldsNoBuffer(t *testing.T) {
	r := newMoverRig(t)
	for _, sent := range []string{"", "x"} {
		send(t, r.from, sent)
		nettest.Eventually(t, "the byte to be there", func() bool { return r.Src.Quiet() == (sent == "") })
		for _, expected := range []int64{0, 1 << 20} {
			r.Expect(expected)
			if n, err := r.Take(0); n != 0 || err != nil || r.buf != nil || r.pipe != nil {
				t.Errorf("after %q was sent: Take(0) = %d, %v", sent, n, err)
			}
		}
	}
	r.carry(t, 1)
	wantRead(t, r.to, "x")
}

func TestBufferedBytesAreMovedFirst(t *testing.T) {
	r := newMoverRig(t)
	r.Hold(nil)
	r.Hold(tcp.TakeBuffer())
	if r.Held() != 0 || r.buf != nil {
		t.Error("an empty buffer is held")
	}
	send(t, r.from, "first, second")
	nettest.Eventually(t, "the bytes to be there", func() bool { return !r.Src.Quiet() })
	read := tcp.TakeBuffer()
	if n, err := read.FillAtMost(r.Src, 5); n != 5 || err != nil {
		t.Fatal(n, err)
	}
	r.Hold(read)
	r.Expect(1 << 20) // must not overtake the held bytes
	if r.Held() != 5 {
		t.Errorf("%d bytes are held", r.Held())
	}
	r.carry(t, int64(len(", second")))
	wantRead(t, r.to, "first, second")
}

// A mover keeps its own bytes during a wait, and does not touch a buffer or pipe that it has released.
func TestMoversDoNotShareBuffers(t *testing.T) {
	stuck := newMoverRig(t)
	full := 0
	for { // until the destination is full
		n, err := stuck.Dst.Write(pattern(1 << 20))
		if err == tcp.ErrAgain {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		full += n
	}
	message := bytes.Repeat([]byte("stuck"), 1000)
	stuck.from.Write(message)
	nettest.Eventually(t, "the message to be there", func() bool { return !stuck.Src.Quiet() })
	held, err := stuck.Take(math.MaxInt64)
	if err != nil {
		t.Fatal(err)
	}
	if n, err := stuck.Put(); n != 0 || err != tcp.ErrAgain || stuck.Held() != held {
		t.Fatalf("Put into a full destination = %d, %v; %d of %d bytes are held", n, err, stuck.Held(), held)
	}
	for i := range 20 {
		other := newMoverRig(t)
		text := fmt.Sprintf("other %d", i)
		send(t, other.from, text)
		if i%2 == 0 {
			other.carry(t, int64(len(text)))
			wantRead(t, other.to, text)
			continue
		}
		nettest.Eventually(t, "the text to be there", func() bool { return !other.Src.Quiet() })
		if _, err := other.Take(3); err != nil {
			t.Fatal(err)
		}
		other.Release() // must discard its own bytes only
		other.Release()
		other.carry(t, int64(len(text)-3))
		wantRead(t, other.to, text[3:])
	}
	got := make(chan []byte)
	go func() {
		io.CopyN(io.Discard, stuck.to, int64(full))
		b := make([]byte, len(message))
		io.ReadFull(stuck.to, b)
		got <- b
	}()
	stuck.carry(t, int64(len(message)-held))
	if !bytes.Equal(<-got, message) {
		t.Error("the held bytes arrived changed")
	}
}
