package tcp

import (
	"errors"
	"math"
	"sync"
)

// The capacity of a Buffer before Grow or Append.
const (
	BufferSize      = 16 << 10
	LargeBufferSize = 64 << 10 // from TakeLargeBuffer
)

// ErrFull means that a Buffer has no room. Discard bytes, or call Grow.
var ErrFull = errors.New("buffer full")

// Buffer holds bytes that were read from a connection and not yet written to another. Buffers are pooled, so that an idle
// connection does not occupy one. The holder returns it with Release or passes it on, together with that duty.
type Buffer struct {
	bytes      []byte // fixed, a larger slice after Grow or Append, or a smaller one after Shrink
	start, end int
	fixed      []byte     // nil after Shrink
	pool       *sync.Pool // takes the buffer back on Release
}

// buffers and largeBuffers keep released buffers. The garbage collector empties them, so that the memory of a burst is
// returned.
var buffers, largeBuffers sync.Pool

func init() {
	buffers.New = func() any { return &Buffer{fixed: make([]byte, BufferSize), pool: &buffers} }
	largeBuffers.New = func() any { return &Buffer{fixed: make([]byte, LargeBufferSize), pool: &largeBuffers} }
}

// TakeBuffer returns an empty buffer.
func TakeBuffer() *Buffer { return take(&buffers) }

// TakeLargeBuffer returns an empty buffer for bulk data that cannot be spliced because it must be inspected. One read fills
// it where a buffer of the ordinary size needs four.
func TakeLargeBuffer() *Buffer { return take(&largeBuffers) }

func take(pool *sync.Pool) *Buffer {
	b := pool.Get().(*Buffer)
	b.bytes, b.start, b.end = b.fixed, 0, 0
	return b
}

// Release returns the buffer to its pool. The buffer and slices from Bytes must not be used afterwards. Releasing nil does
// nothing.
func (b *Buffer) Release() {
	if b == nil {
		return
	}
	if len(b.bytes) > len(b.fixed) {
		GiveSlab(b.bytes)
	}
	b.bytes = nil
	if b.fixed != nil {
		b.pool.Put(b)
	}
}

// Cap returns how many bytes of memory the buffer occupies.
func (b *Buffer) Cap() int { return len(b.bytes) }

// ShrunkSize is the most that a buffer holds for Shrink to have an effect, and how much it occupies then.
const ShrunkSize = 1 << 10

// Shrink gives back the memory of a buffer that holds only a few bytes, for a wait that may be long. The next Fill takes
// memory again. Slices from Bytes must not be used afterwards.
func (b *Buffer) Shrink() {
	if b.fixed == nil || b.Len() > ShrunkSize {
		return
	}
	few := append([]byte(nil), b.Bytes()...)
	b.pool.Put(&Buffer{fixed: b.fixed, pool: b.pool})
	b.bytes, b.fixed, b.start, b.end = few, nil, 0, len(few)
}

// unshrink undoes Shrink.
func (b *Buffer) unshrink() {
	b.fixed = b.pool.Get().(*Buffer).fixed
	if b.Len() < len(b.fixed) { // it has not grown since
		b.end = copy(b.fixed, b.Bytes())
		b.bytes, b.start = b.fixed, 0
	}
}

// Bytes returns the bytes in the buffer. They are valid until the next call of a method other than Len.
func (b *Buffer) Bytes() []byte { return b.bytes[b.start:b.end] }

// Len returns the number of bytes in the buffer.
func (b *Buffer) Len() int { return b.end - b.start }

// Discard removes the first n bytes.
func (b *Buffer) Discard(n int) {
	if b.start += n; b.start == b.end {
		b.start, b.end = 0, 0
	}
}

// Fill reads once from c and appends the bytes, as many as there is room for. The error is ErrFull or that of Conn.Read.
func (b *Buffer) Fill(c *Conn) (int, error) { return b.FillAtMost(c, math.MaxInt) }

// FillAtMost is like Fill, but reads at most n bytes.
func (b *Buffer) FillAtMost(c *Conn, n int) (int, error) {
	if b.fixed == nil {
		b.unshrink()
	}
	if b.end == len(b.bytes) {
		if b.start == 0 {
			return 0, ErrFull
		}
		b.end = copy(b.bytes, b.bytes[b.start:b.end])
		b.start = 0
	}
	room := b.bytes[b.end:]
	room = room[:min(n, len(room))]
	var err error
	if c.layer == nil && len(room) > 0 {
		n, err = c.readSocket(room) // by Read, but with a call less: see Conn.try
	} else {
		n, err = c.Read(room)
	}
	b.end += n
	return n, err
}

// Grow doubles the capacity, up to limit bytes. It reports whether the capacity has increased.
func (b *Buffer) Grow(limit int) bool {
	size := min(2*len(b.bytes), limit)
	if size <= len(b.bytes) {
		return false
	}
	grown := TakeSlab(size)[:size]
	b.end = copy(grown, b.Bytes())
	if len(b.bytes) > len(b.fixed) {
		GiveSlab(b.bytes)
	}
	b.bytes, b.start = grown, 0
	return true
}

// Slabs are pooled pieces of memory for what is too large for a buffer, in powers of two from smallestSlab. Peers decide
// how many are needed at once: the garbage of many large heads grows faster than the collector works.
const (
	smallestSlab = 32 << 10
	slabClasses  = 4 // up to 256 KiB; what is larger is not pooled
)

var slabs [slabClasses]sync.Pool

// TakeSlab returns an empty slice with room for n bytes.
func TakeSlab(n int) []byte {
	for i := range slabs {
		if size := smallestSlab << i; n <= size {
			if slab, ok := slabs[i].Get().(*[]byte); ok {
				return *slab
			}
			return make([]byte, 0, size)
		}
	}
	return make([]byte, 0, n)
}

// GiveSlab returns a slab to its pool. The slab must not be used afterwards. Other memory is left to the collector.
func GiveSlab(slab []byte) {
	slab = slab[:0]
	for i := range slabs {
		if cap(slab) == smallestSlab<<i {
			slabs[i].Put(&slab)
		}
	}
}

// Append appends p to the bytes in the buffer and grows it as needed, without a limit.
func (b *Buffer) Append(p []byte) {
	if need := b.end + len(p); need > len(b.bytes) {
		if need > smallestSlab<<(slabClasses-1) {
			need = max(need, 2*len(b.bytes))
		}
		grown := TakeSlab(need)
		grown = grown[:cap(grown)]
		copy(grown[b.start:], b.Bytes())
		if len(b.bytes) > len(b.fixed) {
			GiveSlab(b.bytes)
		}
		b.bytes = grown
	}
	b.end += copy(b.bytes[b.end:], p)
}
