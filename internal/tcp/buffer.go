package tcp

import (
	"errors"
	"slices"
	"sync"
)

// How many bytes a Buffer holds before it is grown.
const (
	BufferSize      = 16 << 10
	LargeBufferSize = 64 << 10 // of one from TakeLargeBuffer
)

// ErrFull says that a buffer has no room: discard something, or let it grow.
var ErrFull = errors.New("the buffer is full")

// Buffer holds bytes that were read from a connection and have not gone on. Buffers are pooled: an idle connection has
// none. Whoever holds one gives it back with Release, or hands it on together with that duty.
type Buffer struct {
	bytes      []byte // fixed, or something larger
	start, end int
	fixed      []byte
	pool       *sync.Pool // where it belongs
}

// buffers and largeBuffers keep them between uses. The garbage collector empties them, so that a burst does not stay in
// memory.
var buffers, largeBuffers sync.Pool

func init() {
	buffers.New = func() any { return &Buffer{fixed: make([]byte, BufferSize), pool: &buffers} }
	largeBuffers.New = func() any { return &Buffer{fixed: make([]byte, LargeBufferSize), pool: &largeBuffers} }
}

// TakeBuffer returns an empty buffer.
func TakeBuffer() *Buffer { return take(&buffers) }

// TakeLargeBuffer returns an empty buffer for bulk that has to be looked at: it takes in one system call what would
// otherwise need four.
func TakeLargeBuffer() *Buffer { return take(&largeBuffers) }

func take(pool *sync.Pool) *Buffer {
	b := pool.Get().(*Buffer)
	b.bytes, b.start, b.end = b.fixed, 0, 0
	return b
}

// Release gives the buffer back. Nobody may use it, or what Bytes returned, after that. Releasing nil does nothing.
func (b *Buffer) Release() {
	if b != nil {
		b.bytes = nil // which frees what a large message needed
		b.pool.Put(b)
	}
}

// Bytes is what the buffer holds. It is valid until the next call of any other method but Len.
func (b *Buffer) Bytes() []byte { return b.bytes[b.start:b.end] }

// Len is the number of bytes that the buffer holds.
func (b *Buffer) Len() int { return b.end - b.start }

// Discard forgets the first n bytes.
func (b *Buffer) Discard(n int) {
	if b.start += n; b.start == b.end {
		b.start, b.end = 0, 0
	}
}

// Fill reads once from c, as much as there is room for, behind what the buffer holds. The errors are those of
// Conn.Read, and ErrFull.
func (b *Buffer) Fill(c *Conn) (int, error) { return b.FillAtMost(c, len(b.bytes)) }

// FillAtMost is Fill for at most n bytes.
func (b *Buffer) FillAtMost(c *Conn, n int) (int, error) {
	if b.end == len(b.bytes) {
		if b.start == 0 {
			return 0, ErrFull
		}
		b.end = copy(b.bytes, b.bytes[b.start:b.end])
		b.start = 0
	}
	room := b.bytes[b.end:]
	n, err := c.Read(room[:min(n, len(room))])
	b.end += n
	return n, err
}

// Grow doubles the room, up to limit bytes. It reports whether there is more room now.
func (b *Buffer) Grow(limit int) bool {
	size := min(2*len(b.bytes), limit)
	if size <= len(b.bytes) {
		return false
	}
	grown := make([]byte, size)
	b.end = copy(grown, b.Bytes())
	b.bytes, b.start = grown, 0
	return true
}

// Append adds p behind what the buffer holds, growing it as needed.
func (b *Buffer) Append(p []byte) {
	b.bytes = slices.Grow(b.bytes[:b.end], len(p))
	b.bytes = b.bytes[:cap(b.bytes)]
	b.end += copy(b.bytes[b.end:], p)
}
