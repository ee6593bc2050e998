package tcp

import (
	"syscall"
	"unsafe"
)

// maxPieces is how many pieces one system call takes. The kernel's own limit is 1024.
const maxPieces = 64

// Vector is a list of pieces of memory that go out in order, many with one system call (writev). The zero value is
// empty.
type Vector struct {
	pieces []syscall.Iovec
	next   int // the first piece that is not written
	bytes  int
}

// Append adds a piece. The caller keeps its memory, as it is, until it is written: a piece that continues the one before
// it in memory makes that one longer, and then there is no pointer to it in the vector.
func (v *Vector) Append(p []byte) {
	if len(p) == 0 {
		return
	}
	v.bytes += len(p)
	base := unsafe.SliceData(p)
	if last := len(v.pieces) - 1; last >= v.next {
		piece := &v.pieces[last]
		if uintptr(unsafe.Pointer(piece.Base))+uintptr(piece.Len) == uintptr(unsafe.Pointer(base)) {
			piece.Len += uint64(len(p))
			return
		}
	}
	v.pieces = append(v.pieces, syscall.Iovec{Base: base, Len: uint64(len(p))})
}

// Len is the number of bytes that are not written yet.
func (v *Vector) Len() int { return v.bytes }

// AppendTo appends what is not written yet to dst.
func (v *Vector) AppendTo(dst []byte) []byte {
	for _, piece := range v.pieces[v.next:] {
		dst = append(dst, unsafe.Slice(piece.Base, piece.Len)...)
	}
	return dst
}

// copyTo copies as much as fits of what is not written yet to dst, and returns that part of dst.
func (v *Vector) copyTo(dst []byte) []byte {
	n := 0
	for _, piece := range v.pieces[v.next:] {
		n += copy(dst[n:], unsafe.Slice(piece.Base, piece.Len))
	}
	return dst[:n]
}

// Reset forgets what is left.
func (v *Vector) Reset() {
	clear(v.pieces) // the memory may go
	v.pieces, v.next, v.bytes = v.pieces[:0], 0, 0
}

// took drops the first n bytes.
func (v *Vector) took(n int) {
	v.bytes -= n
	for n > 0 {
		piece := &v.pieces[v.next]
		if uint64(n) < piece.Len {
			piece.Base = (*byte)(unsafe.Add(unsafe.Pointer(piece.Base), n))
			piece.Len -= uint64(n)
			return
		}
		n -= int(piece.Len)
		v.next++
	}
	if v.bytes == 0 {
		v.Reset()
	}
}

// WriteVector gives what the socket takes of v and takes it off v. The results are those of Write.
func (c *Conn) WriteVector(v *Vector) (int, error) {
	if v.bytes == 0 {
		return 0, nil
	}
	if c.layer != nil {
		return c.layer.writeVector(c, v)
	}
	pieces := v.pieces[v.next:]
	pieces = pieces[:min(len(pieces), maxPieces)]
	n, err := c.try(writable, "write", func() (int, error) {
		if len(pieces) == 1 {
			return write(c.fd, unsafe.Slice(pieces[0].Base, pieces[0].Len))
		}
		return writev(c.fd, pieces)
	})
	if n > 0 {
		c.ready.Or(writable)
		v.took(n)
	}
	return n, err
}
