package httpforward

import (
	"bytes"

	"github.com/pillion-proxy/pillion/internal/flow"
)

// names is the memory of the values in a record. It keeps of each value, and of all of them, only what sinks can report
// (flow.MaxValue, flow.MaxValues): over HTTP/2 a peer repeats a long field at the cost of one byte.
type names struct {
	chunk []byte // the one in use; only the record refers to earlier ones
	size  int    // of all chunks
	used  int    // bytes of values
	limit int    // of used; zero: flow.MaxValues
}

const (
	namesSize = 512     // of the first chunk, enough for an ordinary request
	keptNames = 4 << 10 // the largest chunk that is kept for the next request
)

// text is what values are copied from.
type text interface{ ~string | ~[]byte }

// cutMark is the value in a record that is full.
var cutMark = []byte(flow.CutMark)

// take returns a slice of length zero with room for n bytes.
func (s *names) take(n int) []byte {
	start := len(s.chunk)
	if s.chunk == nil || cap(s.chunk)-start < n {
		size := max(namesSize, min(2*cap(s.chunk), flow.MaxValues), n)
		s.chunk, start = make([]byte, 0, size), 0
		s.size += size
	}
	s.used += n
	s.chunk = s.chunk[:start+n]
	return s.chunk[start : start : start+n]
}

// full reports whether n further bytes are too many.
func (s *names) full(n int) bool {
	if s.limit > 0 {
		return s.used+n > s.limit
	}
	return s.used+n > flow.MaxValues
}

// clear makes the memory ready for the next record.
func (s *names) clear() {
	chunk := s.chunk
	if cap(chunk) > keptNames {
		chunk = nil
	}
	clear(chunk)
	*s = names{chunk: chunk[:0], size: cap(chunk)}
}

// copyValue copies a value, or the part of it that a record keeps.
func copyValue[T text](s *names, value T) []byte {
	n := min(len(value), flow.MaxValue+1)
	if s.full(n) {
		return cutMark
	}
	return append(s.take(n), value[:n]...)
}

// joined collects the values of several fields as one list (RFC 9110 §5.3). It keeps the beginning of a long list, and its
// last element: in X-Forwarded-For that is the address from which the nearest proxy was reached.
type joined struct {
	list []byte
	left int  // bytes that may still be added
	cut  bool // the list is too long
}

// maxLast is how much of the last element of a long list is kept. The text of an address has at most 45 bytes.
const maxLast = 64

// begin begins a list of n bytes, commas included.
func (l *joined) begin(s *names, n int) {
	const behind = len(flow.CutMark) + len(",") + maxLast
	*l = joined{left: n}
	switch {
	case s.full(min(n, flow.MaxValue)):
		l.cut, l.left, n = true, 0, behind
	case n > flow.MaxValue:
		l.cut, l.left, n = true, flow.MaxValue-behind, flow.MaxValue
	}
	l.list = s.take(n)
}

// joinValue adds the value of a further field.
func joinValue[T text](l *joined, value T) {
	if l.left > 0 && len(l.list) > 0 {
		l.list = append(l.list, ',')
		l.left--
	}
	n := min(len(value), l.left)
	l.list = append(l.list, value[:n]...)
	l.left -= n
}

// endJoin returns the list. last is the value of its last field.
func endJoin[T text](l *joined, last T) []byte {
	if !l.cut {
		return l.list
	}
	tail := []byte(last[max(0, len(last)-2*maxLast):])
	tail = bytes.TrimLeft(tail[bytes.LastIndexByte(tail, ',')+1:], " \t")
	l.list = append(append(l.list, flow.CutMark...), ',')
	return append(l.list, tail[:min(len(tail), maxLast)]...)
}

// whole returns value, of which a record kept part, for a router: it must decide by what is forwarded.
func whole(kept []byte, value string) []byte {
	if string(kept) == value {
		return kept
	}
	return []byte(value)
}
