package relay

import (
	"errors"
	"io"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/pillion-proxy/pillion/internal/tcp"
)

const (
	// bulk is the size of the copy buffer and the line between messages and bulk. A read that fills the buffer has found
	// bulk, and the half goes on by splice; a splice that moves less has seen its end, and the half goes back to
	// copying. A message is cheaper to copy than to send through a pipe.
	bulk = 16 << 10

	// turn is how many bytes a half may move before others get theirs.
	turn = 1 << 20
)

// half moves bytes in one direction.
//
// It holds a buffer or a pipe only from the system call that fills it to the one that empties it: over a wait only when
// dst is full.
type half struct {
	src, dst *side
	moved    *atomic.Uint64 // bytes that dst took; nil: nobody asks

	buf      *buffer
	pipe     *pipe
	n        int  // bytes in buf or pipe
	off      int  // where they begin in buf
	splicing bool // the last turn found bulk
	noSplice bool // this kernel cannot splice sockets
}

// progress is what a call of move brought.
type progress uint8

const (
	nothing  progress = iota
	some              // and now one of the sides has to be waited for
	longTurn          // and there may be more
)

// finished reports whether everything that src sent is delivered.
func (h *half) finished() bool { return h.src.drained && h.n == 0 }

// move moves bytes until src has none, dst takes none, or the turn is over.
func (h *half) move() progress {
	made := nothing
	for left := turn; left > 0; made = some {
		if h.dst.err != nil || h.src.drained && h.n == 0 {
			return made
		}
		if h.n == 0 {
			if !h.src.Readable() || !h.take() {
				return made
			}
			continue
		}
		if !h.dst.Writable() {
			return made
		}
		n := h.put()
		if n == 0 {
			return made
		}
		left -= n
	}
	return longTurn
}

// take fills a buffer or a pipe from src. It reports whether anything happened: bytes came, or src is at its end.
func (h *half) take() bool {
	if h.splicing && h.takePipe() {
		return true
	}
	h.buf, h.off = takeBuffer(), 0
	var err error
	if h.n, err = h.src.Read(h.buf[:]); err == nil {
		h.splicing = h.n >= bulk && !h.noSplice
		return true
	}
	h.release()
	switch {
	case err == tcp.ErrAgain:
		return false
	case err != io.EOF:
		h.src.err = err
	case h.src.err == nil && !h.dst.drained:
		// A dead side reads like one at its end when a write has taken the error: that is not passed on as one. Nor is
		// the second end of two, as the close of both sides follows.
		if err := h.dst.CloseWrite(); err != nil {
			h.dst.err = err
		}
	}
	h.src.drained = true
	return true
}

// takePipe fills a pipe from src. When it reports false, a read has to find out why: there is nothing, or the end, or
// urgent data, or an error, or no pipe to be had.
func (h *half) takePipe() bool {
	if h.pipe = pipes.take(); h.pipe == nil {
		return false
	}
	var err error
	if h.n, err = h.src.SpliceTo(h.pipe.w, pipeSize); err == nil {
		h.splicing = h.n >= bulk
		return true
	}
	h.noSplice = h.noSplice || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS)
	h.release()
	return false
}

// put empties the buffer or pipe into dst and returns how many bytes it took.
func (h *half) put() int {
	var n int
	var err error
	if h.pipe != nil {
		n, err = h.dst.SpliceFrom(h.pipe.r, h.n)
	} else {
		n, err = h.dst.Write(h.buf[h.off : h.off+h.n])
	}
	if err == tcp.ErrAgain {
		return 0
	}
	if err != nil {
		h.dst.err = err
		return 0
	}
	h.off += n
	h.n -= n
	if h.moved != nil {
		h.moved.Add(uint64(n))
	}
	if h.n == 0 {
		h.release()
	}
	return n
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
