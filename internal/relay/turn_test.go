package relay

import (
	"io"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pillion-proxy/pillion/internal/tcp"
)

// halfRig is one direction of a relay. The test keeps its source filled.
func halfRig(t *testing.T) (h *half, source, sink *net.TCPConn, w *tcp.Waiter) {
	t.Helper()
	poller, err := tcp.NewPoller()
	if err != nil {
		t.Fatal(err)
	}
	source, src := pair(t, poller)
	sink, dst := pair(t, poller)
	w = tcp.NewWaiter(t.Context())
	t.Cleanup(func() {
		h.Release()
		for _, c := range []io.Closer{source, sink} {
			c.Close()
		}
		src.Close()
		dst.Close()
		w.Close()
		poller.Close()
	})
	return &half{src: &side{Conn: src}, dst: &side{Conn: dst}, Mover: Mover{Src: src, Dst: dst}}, source, sink, w
}

// A source and a sink that keep up with the relay could occupy its goroutine forever. The other direction and the timeouts
// of the connection would starve.
func TestATurnEndsWhileThereIsMore(t *testing.T) {
	h, source, sink, w := halfRig(t)
	var stop atomic.Bool
	done := make(chan struct{}, 2)
	go func() {
		defer func() { done <- struct{}{} }()
		for p := make([]byte, 1<<20); !stop.Load(); {
			if _, err := source.Write(p); err != nil {
				return
			}
		}
		source.Close()
	}()
	go func() {
		defer func() { done <- struct{}{} }()
		io.Copy(io.Discard, sink)
	}()
	var moved atomic.Uint64
	h.Moved = &moved
	for ended := false; !ended; {
		before := moved.Load()
		ended = h.move() == longTurn
		if n := moved.Load() - before; n > turn+pipeSize {
			t.Errorf("one turn moved %d bytes, want at most %d", n, turn)
		}
		if !ended {
			if err := w.Wait(time.Now().Add(patience), h.src.Conn, h.dst.Conn); err != nil {
				t.Fatal(err)
			}
		}
	}
	stop.Store(true)
	sink.SetLinger(0)
	sink.Close()
	source.Close()
	<-done
	<-done
}

// With a dead destination the relay must not read the source: the bytes would be lost, and the kernel reports the
// destination's error only once.
func TestADeadDestinationStopsTheSource(t *testing.T) {
	h, source, _, w := halfRig(t)
	send(t, source, "ten bytes!")
	for !h.src.Readable() {
		if err := w.Wait(time.Now().Add(patience), h.src.Conn, nil); err != nil {
			t.Fatal(err)
		}
	}
	h.dst.err = unix.ECONNRESET
	if got := h.move(); got != nothing || h.Held() != 0 {
		t.Errorf("move = %v, Held = %d", got, h.Held())
	}
	if n, err := h.src.Read(make([]byte, 100)); n != 10 || err != nil {
		t.Errorf("%d bytes are left in the source, %v", n, err)
	}
}
