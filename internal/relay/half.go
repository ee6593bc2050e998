package relay

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// bulk is the size of the copy buffer and the line between messages and bulk. A read that fills the buffer has found
	// bulk, and the half goes on by splice; a splice that moves less has seen its end, and the half goes back to
	// copying. A message is cheaper to copy than to send through a pipe.
	bulk = 16 << 10

	// stallTick is how often a half that waits for its destination looks whether its source was reset meanwhile. The
	// wait for one descriptor does not notice what happens to the other.
	stallTick = time.Second
)

// errDestination marks an error of a half's destination. Every other error is of its source.
var errDestination = errors.New("writing")

// errVanished stands for the error of a connection that is dead and whose error somebody has read before: the kernel
// tells it once.
var errVanished = errors.New("connection reset by peer")

// end is one of the two connections.
type end struct {
	conn *net.TCPConn
	raw  syscall.RawConn
}

// reset closes the connection with RST. Doing it again does nothing.
func (e *end) reset() {
	_ = e.conn.SetLinger(0)
	_ = e.conn.Close()
}

// half moves bytes in one direction. All of it belongs to one goroutine but turns and shut.
type half struct {
	relay    *relay
	src, dst *end
	other    *half          // the opposite direction
	moved    *atomic.Uint64 // bytes that dst took; nil: nobody asks
	turns    atomic.Uint64  // grows when bytes move
	shut     atomic.Bool    // dst is half-closed, or just being so

	// A half holds a buffer or a pipe only from the system call that fills it to the one that empties it, and never while
	// it waits for its source.
	buf  *buffer
	pipe *pipe
	n    int   // bytes in buf or pipe
	off  int   // where they begin in buf
	err  error // of the last system call

	splicing bool // the last turn found bulk
	noSplice bool // this kernel cannot splice these sockets
	stalled  bool // the last write found dst full
	armed    bool // dst has a write deadline
}

// run moves bytes until src is at its end, passes that on, and then watches src until the other half is done. Every
// other way to end is an abort of the whole relay, or the other half's to see.
func (h *half) run() {
	err := h.pump()
	h.release()
	if err == io.EOF {
		err = h.finish()
	}
	switch {
	case err == nil:
	case errors.Is(err, errDestination):
		h.destinationFailed(err)
	default:
		h.relay.failed(h.src, err)
	}
}

// pump moves bytes until that fails. It returns io.EOF when src is at its end and dst has taken everything.
func (h *half) pump() error {
	take, put := h.take, h.put // bound once: a method value allocates
	for {
		if err := h.receive(take); err != nil {
			return err
		}
		h.splicing = h.n >= bulk && !h.noSplice
		if err := h.deliver(put); err != nil {
			return err
		}
	}
}

// receive waits until src has something and lets take have it.
func (h *half) receive(take func(fd uintptr) bool) error {
	if err := h.src.raw.Read(take); err != nil {
		return err
	}
	if h.err != nil {
		return os.NewSyscallError("read", h.err)
	}
	if h.n == 0 {
		// A failed write may have taken the error away, and a dead connection then reads like one at its end.
		if err := h.sourceFailure(); err != nil {
			return err
		}
		return io.EOF
	}
	return nil
}

// take moves what src has into a buffer or a pipe. It reports false, and holds nothing, when there is nothing yet.
func (h *half) take(fd uintptr) bool {
	if h.splicing {
		h.pipe = pipes.take() // nil when all are in use: then this turn copies
	}
	if h.pipe != nil {
		h.n, h.err = splice(int(fd), h.pipe.w, pipeSize)
		if h.err == unix.EINVAL || h.err == unix.ENOSYS {
			h.release()
			h.splicing, h.noSplice = false, true
		}
	}
	if h.pipe == nil {
		h.buf, h.off = takeBuffer(), 0
		h.n, h.err = read(int(fd), h.buf[:])
	}
	if h.err != nil {
		h.n = 0
		h.release()
	}
	return h.err != unix.EAGAIN
}

// deliver gives dst everything that was received, and then gives the buffer or pipe back.
func (h *half) deliver(put func(fd uintptr) bool) error {
	for h.n > 0 {
		h.err, h.stalled = nil, false
		err := h.dst.raw.Write(put)
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			if err := h.lookBack(); err != nil {
				return err
			}
		case err != nil:
			return fmt.Errorf("%w: %w", errDestination, err)
		case h.err != nil:
			return fmt.Errorf("%w: %w", errDestination, os.NewSyscallError("write", h.err))
		}
	}
	h.release()
	return nil
}

// put moves what was received to dst. It reports false when dst is full before everything is moved.
func (h *half) put(fd uintptr) bool {
	for h.n > 0 {
		var n int
		if h.pipe != nil {
			n, h.err = splice(h.pipe.r, int(fd), h.n)
		} else {
			n, h.err = write(int(fd), h.buf[h.off:h.off+h.n])
		}
		if h.err == unix.EAGAIN {
			h.stall()
			return false
		}
		if h.err != nil {
			return true
		}
		h.off += n
		h.n -= n
		h.turns.Add(1)
		if h.moved != nil {
			h.moved.Add(uint64(n))
		}
	}
	return true
}

// stall makes the coming wait for dst end after a tick. The deadline is left to expire by itself: a flow that stalls
// and goes on all the time pays for it once a tick, not at each stall.
func (h *half) stall() {
	h.stalled = true
	if !h.armed {
		h.armed = true
		_ = h.dst.conn.SetWriteDeadline(time.Now().Add(stallTick))
	}
}

// lookBack is called when that deadline has passed. It returns an error when src failed during the wait.
func (h *half) lookBack() error {
	if !h.stalled {
		h.armed = false // bytes moved since; the next stall sets it again
		_ = h.dst.conn.SetWriteDeadline(time.Time{})
		return nil
	}
	_ = h.dst.conn.SetWriteDeadline(time.Now().Add(stallTick))
	return h.sourceFailure()
}

// finish tells dst that src is at its end. Then it watches src while the other half works: a peer that closed its half
// and resets the connection later must still be heard.
func (h *half) finish() error {
	h.shut.Store(true)
	if err := h.dst.conn.CloseWrite(); err != nil {
		h.shut.Store(false)
		return fmt.Errorf("%w: %w", errDestination, err)
	}
	if !h.relay.sourceClosed() {
		return nil
	}
	var failure error
	_ = h.src.raw.Read(func(uintptr) bool { // ends by failure, by a deadline when both are done, or by close
		failure = h.sourceFailure()
		return failure != nil
	})
	return failure
}

// sourceFailure tells a source that was reset from one that is open or at its end, without reading from it. It returns
// nil unless the source is dead.
//
// A dead connection has a pending error (POLLERR), or, when a write has taken the error, is closed both ways (POLLHUP)
// although we did not close our half of it.
func (h *half) sourceFailure() error {
	var failure error
	err := h.src.raw.Control(func(fd uintptr) {
		closed := h.other.shut.Load() // before the poll: closing our half must not look like a failure
		events := pollNow(int(fd))
		if events&unix.POLLERR != 0 {
			failure = errVanished
			if code, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ERROR); err == nil && code != 0 {
				failure = os.NewSyscallError("read", syscall.Errno(code))
			}
		} else if events&unix.POLLHUP != 0 && !closed && !h.other.shut.Load() {
			failure = errVanished
		}
	})
	if err != nil {
		return err // closed by an abort
	}
	return failure
}

// destinationFailed ends a half whose destination is dead. What the destination sent before it died is still worth
// delivering, so the end of the relay is left to the other half, which will have read it all when it meets the failure.
// If that half is past its source's end already, nobody else will see it.
func (h *half) destinationFailed(err error) {
	if h.other.shut.Load() {
		h.relay.failed(h.dst, err)
	}
}

// release gives back what the half holds.
func (h *half) release() {
	if h.buf != nil {
		giveBuffer(h.buf)
		h.buf = nil
	}
	if h.pipe != nil {
		pipes.give(h.pipe, h.n == 0)
		h.pipe = nil
	}
}
