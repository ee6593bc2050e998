package relay

import (
	"io"
	"math"
	"time"

	"github.com/pillion-proxy/pillion/internal/tcp"
)

// turn bounds the bytes that a half moves before other connections run.
const turn = 256 << 10

// half carries one direction of a relay to its end.
type half struct {
	Mover
	src, dst *side
	pace     *Pace     // nil: the rate is not limited
	next     time.Time // when pace allows more; zero: it does not hold the half back
}

// begin takes bytes that were read before. They pass at once, and those after them wait for them.
func (h *half) begin(read *tcp.Buffer) {
	h.Hold(read)
	if h.pace != nil {
		h.pace.Allowance(time.Now())
		h.pace.Spend(h.Held())
	}
}

// progress is the result of a call of move.
type progress uint8

const (
	nothing  progress = iota
	some              // bytes moved, and one of the sides must be waited for
	longTurn          // bytes moved, and there may be more
)

// finished reports whether src has ended and all its bytes are delivered.
func (h *half) finished() bool { return h.src.drained && h.Held() == 0 }

// move moves bytes until src has no more, dst takes no more, or the turn is over.
func (h *half) move() progress {
	made := nothing
	if h.pace != nil {
		h.next = time.Time{}
	}
	for left := turn; left > 0; made = some {
		if h.dst.err != nil || h.finished() {
			return made
		}
		if h.Held() == 0 {
			if !h.src.Readable() || !h.take() {
				return made
			}
			continue
		}
		if !h.dst.Writable() {
			return made
		}
		n, err := h.Put()
		if err != nil && err != tcp.ErrAgain {
			h.dst.err = err
		}
		if n == 0 {
			return made
		}
		left -= n
	}
	return longTurn
}

// allowed returns how many bytes the rate allows now. If it is zero, next is set.
func (h *half) allowed() int64 {
	n := h.pace.Allowance(time.Now())
	if n == 0 {
		h.next = h.pace.Next()
	}
	return int64(n)
}

// take reports whether bytes were read or src has ended.
func (h *half) take() bool {
	most := int64(math.MaxInt64)
	if h.pace != nil {
		if most = h.allowed(); most == 0 {
			return false
		}
	}
	n, err := h.Take(most)
	if h.pace != nil {
		h.pace.Spend(n)
	}
	switch {
	case err == nil:
		return true
	case err == tcp.ErrAgain:
		return false
	case err != io.EOF:
		h.src.err = err
	case h.src.err == nil && !h.dst.drained:
		// When a write has consumed a dead side's error, reading returns EOF; that is not passed on as a half-close. Neither
		// is the second of two ends, because the close of both sides follows.
		if err := h.dst.CloseWrite(); err != nil {
			h.dst.err = err
		}
	}
	h.src.drained = true
	return true
}
