package relay

import (
	"io"
	"math"

	"github.com/pillion-proxy/pillion/internal/tcp"
)

// turn is how many bytes a half may move before others get theirs.
const turn = 1 << 20

// half carries one direction of a relay to its end.
type half struct {
	Mover
	src, dst *side
}

// progress is what a call of move brought.
type progress uint8

const (
	nothing  progress = iota
	some              // and now one of the sides has to be waited for
	longTurn          // and there may be more
)

// finished reports whether everything that src sent is delivered.
func (h *half) finished() bool { return h.src.drained && h.Held() == 0 }

// move moves bytes until src has none, dst takes none, or the turn is over.
func (h *half) move() progress {
	made := nothing
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

// take reports whether anything happened: bytes came, or src is at its end.
func (h *half) take() bool {
	_, err := h.Take(math.MaxInt64)
	switch {
	case err == nil:
		return true
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
