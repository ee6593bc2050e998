package controlplane

import (
	"bytes"
	"compress/flate"
	"fmt"
	"io"
	"sync"
)

// Resources are alike, so they are compressed together: those of 1,000 services take 4 % of their size.
const (
	chunkSize = 128 << 10 // bytes of resources that are compressed together
	looseSize = 32 << 10  // bytes that may stay as they are after an update
)

// archive keeps bytes in chunks. New bytes are appended to the open chunk. It is compressed when it is large, so a resource
// that changes costs a copy.
type archive struct {
	open   *chunk
	writer *flate.Writer // nil, or kept until release: it takes 1.2 MB
}

// chunk is the bytes of some resources.
type chunk struct {
	plain  []byte // nil after it was compressed
	packed []byte
	size   int
	live   int // bytes that spans still refer to
}

// span is bytes in a chunk. The zero value is empty.
type span struct {
	in           *chunk
	offset, size uint32
}

// add returns a span of a copy of b.
func (a *archive) add(b []byte) span {
	if a.open != nil && len(a.open.plain)+len(b) > chunkSize {
		a.seal()
	}
	if a.open == nil {
		a.open = &chunk{}
		if a.writer != nil { // one of many in this update
			a.open.plain = make([]byte, 0, chunkSize)
		}
	}
	c := a.open
	s := span{in: c, offset: uint32(len(c.plain)), size: uint32(len(b))}
	c.plain = append(c.plain, b...)
	c.size += len(b)
	c.live += len(b)
	return s
}

// free records that a span is not used any more.
func (s span) free() {
	if s.in != nil {
		s.in.live -= int(s.size)
	}
}

// sparse reports whether most of the span's chunk is not used any more.
func (s span) sparse() bool { return s.in != nil && s.in.plain == nil && 2*s.in.live < s.in.size }

// loose reports whether the open chunk is large enough to be compressed after an update.
func (a *archive) loose() bool { return a.open != nil && len(a.open.plain) >= looseSize }

// seal compresses the open chunk.
func (a *archive) seal() {
	c := a.open
	a.open = nil
	if c == nil || c.live == 0 {
		return
	}
	var packed bytes.Buffer
	if a.writer == nil {
		a.writer, _ = flate.NewWriter(&packed, flate.BestSpeed) // the level is valid
	} else {
		a.writer.Reset(&packed)
	}
	a.writer.Write(c.plain) // a bytes.Buffer does not fail
	a.writer.Close()
	c.packed, c.plain = bytes.Clone(packed.Bytes()), nil
}

// release frees what is needed to compress, and room in the open chunk beyond what an update needs.
func (a *archive) release() {
	a.writer = nil
	if c := a.open; c != nil && cap(c.plain) > 2*looseSize {
		c.plain = bytes.Clone(c.plain)
	}
}

// view is what is needed to read a span, when the archive goes on changing.
type view struct {
	plain        []byte // of the span
	packed       []byte // of its chunk
	offset, size uint32
	unpacked     int // bytes of its chunk
}

func (s span) view() view {
	if s.in == nil {
		return view{}
	}
	if s.in.plain != nil {
		return view{plain: s.in.plain[s.offset : s.offset+s.size : s.offset+s.size]}
	}
	return view{packed: s.in.packed, offset: s.offset, size: s.size, unpacked: s.in.size}
}

// maxUnpacked bounds the chunks that are kept unpacked while resources are shown: 8 MB.
const maxUnpacked = 64

// unpacker reads views. It keeps chunks that it unpacked, because resources in the order of their names may be in any
// chunk. It may be used by several goroutines.
type unpacker struct {
	limit int // chunks; 0 counts as 1
	mu    sync.Mutex
	plain map[*byte][]byte // by the first of the packed bytes
}

// read returns the bytes of a view. The caller may keep them but not change them.
func (u *unpacker) read(v view) ([]byte, error) {
	if v.packed == nil {
		return v.plain, nil
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	plain, ok := u.plain[&v.packed[0]]
	if !ok {
		plain = make([]byte, v.unpacked)
		if _, err := io.ReadFull(flate.NewReader(bytes.NewReader(v.packed)), plain); err != nil {
			return nil, fmt.Errorf("unpacking resources: %w", err)
		}
		if len(u.plain) >= max(u.limit, 1) {
			clear(u.plain)
		}
		if u.plain == nil {
			u.plain = map[*byte][]byte{}
		}
		u.plain[&v.packed[0]] = plain
	}
	return plain[v.offset : v.offset+v.size : v.offset+v.size], nil
}
