package tcp

import (
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// maxPieces bounds the pieces of one writev. The kernel's limit is 1024 (UIO_MAXIOV).
const maxPieces = 64

// Vector is a list of pieces of memory to write in order, many of them with one system call (writev). The zero value is
// empty.
type Vector struct {
	pieces []syscall.Iovec
	next   int // index of the first unwritten piece
	bytes  int // unwritten
}

// Append adds a piece. The caller must keep a reference to its memory, and leave it unchanged, until it is written: if the
// piece directly follows the previous one in memory, that one is extended, and the vector has no pointer to the new piece
// that would keep it from the garbage collector.
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

// Len returns the number of unwritten bytes.
func (v *Vector) Len() int { return v.bytes }

// AppendTo appends the unwritten bytes to dst.
func (v *Vector) AppendTo(dst []byte) []byte {
	for _, piece := range v.pieces[v.next:] {
		dst = append(dst, unsafe.Slice(piece.Base, piece.Len)...)
	}
	return dst
}

// copyTo copies as many of the unwritten bytes as fit into dst, and returns the part of dst that it has filled.
func (v *Vector) copyTo(dst []byte) []byte {
	n := 0
	for _, piece := range v.pieces[v.next:] {
		n += copy(dst[n:], unsafe.Slice(piece.Base, piece.Len))
	}
	return dst[:n]
}

// keptPieces is how many pieces an empty vector keeps room for.
const keptPieces = 512

// Reset removes all pieces.
func (v *Vector) Reset() {
	if cap(v.pieces) > keptPieces {
		v.pieces = nil
	}
	clear(v.pieces) // releases the memory
	v.pieces, v.next, v.bytes = v.pieces[:0], 0, 0
}

// took removes the first n bytes after they have been written.
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

// WriteAtMost is like WriteVector, for at most n bytes of the first piece. v is not empty.
func (c *Conn) WriteAtMost(v *Vector, n int) (int, error) {
	piece := v.pieces[v.next]
	n, err := c.Write(unsafe.Slice(piece.Base, min(uint64(n), piece.Len)))
	v.took(n)
	return n, err
}

// WriteVector writes as much of v as the socket takes and removes that from v. The results are those of Write.
func (c *Conn) WriteVector(v *Vector) (int, error) {
	if v.bytes == 0 {
		return 0, nil
	}
	if c.layer != nil {
		return c.layer.writeVector(c, v)
	}
	pieces := v.pieces[v.next:]
	pieces = pieces[:min(len(pieces), maxPieces)]
	c.ready.And(^uint32(writable)) // see Conn.try
	n, errno := uintptr(0), unix.EINTR
	for errno == unix.EINTR {
		if len(pieces) == 1 {
			n, errno = write(c.fd, unsafe.Slice(pieces[0].Base, pieces[0].Len), 0)
		} else {
			n, errno = writev(c.fd, pieces)
		}
	}
	if errno != 0 {
		return 0, callError("write", errno)
	}
	if n > 0 {
		c.ready.Or(writable)
		v.took(int(n))
	}
	return int(n), nil
}
