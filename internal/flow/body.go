package flow

import "sync/atomic"

// Bodies bounds the bodies that records carry. It is safe for concurrent use. A nil Bodies records none.
type Bodies struct {
	limit int          // bytes of a body
	room  atomic.Int64 // bytes that all bodies may still take
}

// NewBodies returns Bodies of at most limit bytes each, and total bytes together.
func NewBodies(limit int, total int64) *Bodies {
	b := &Bodies{limit: limit}
	b.room.Store(total)
	return b
}

// Limit returns the largest size of a body.
func (b *Bodies) Limit() int { return b.limit }

// Begin returns an empty body; nil if none are recorded.
func (b *Bodies) Begin() *Body {
	if b == nil {
		return nil
	}
	return &Body{bodies: b}
}

// Body is the beginning of a message's body, as it was carried: with the framing of chunks and with its content-encoding.
// The engine adds to it until the record closes. Then it belongs to the sinks, one of which calls Release.
type Body struct {
	bodies *Bodies
	bytes  []byte
	cut    bool
}

// Bytes returns what was recorded.
func (b *Body) Bytes() []byte { return b.bytes }

// Cut reports whether more was carried than recorded.
func (b *Body) Cut() bool { return b.cut }

// Add records bytes, as far as they are within the bounds.
func (b *Body) Add(p []byte) {
	if b.cut || len(p) == 0 {
		return
	}
	if fits := b.bodies.limit - len(b.bytes); len(p) > fits {
		b.cut, p = true, p[:fits]
	}
	if !b.grow(len(b.bytes) + len(p)) {
		b.cut, p = true, p[:cap(b.bytes)-len(b.bytes)]
	}
	b.bytes = append(b.bytes, p...)
}

// smallestBody is the smallest memory that a body takes.
const smallestBody = 512

// grow makes room for size bytes. It reports false if the bound of all bodies is reached.
func (b *Body) grow(size int) bool {
	if size <= cap(b.bytes) {
		return true
	}
	capacity := min(max(size, 2*cap(b.bytes), smallestBody), max(b.bodies.limit, size))
	taken := int64(capacity - cap(b.bytes))
	if b.bodies.room.Add(-taken) < 0 {
		b.bodies.room.Add(taken)
		return false
	}
	larger := make([]byte, len(b.bytes), capacity)
	copy(larger, b.bytes)
	b.bytes = larger
	return true
}

// Release gives the memory back. A nil Body has none.
func (b *Body) Release() {
	if b != nil {
		b.bodies.room.Add(int64(cap(b.bytes)))
		b.bytes = nil
	}
}
