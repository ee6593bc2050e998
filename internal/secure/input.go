package secure

import (
	"bytes"
	"encoding/binary"
	"sync"

	"github.com/pillion-proxy/pillion/internal/tcp"
)

// Sizes of TLS 1.3 (RFC 8446 §5). Those of TLS 1.2 are larger, and only crypto/tls reads its records.
const (
	headerSize    = 5
	tagSize       = 16 // of AES-GCM
	maxPlaintext  = 16 << 10
	maxCiphertext = maxPlaintext + 256
	maxRecord     = headerSize + maxCiphertext
)

// block is memory for raw bytes. Blocks are pooled, so that an idle connection does not occupy one.
type block [17 << 10]byte

var blocks = sync.Pool{New: func() any { return new(block) }}

// input reads raw bytes in large pieces.
type input struct {
	raw   *tcp.Socket
	block *block // of bytes; nil: bytes is empty, or small and on its own
	bytes []byte // that were read and not yet used
}

// smallRest is how many bytes are moved out of a block while a connection waits for the rest of a record.
const smallRest = 1 << 10

// fill reads once. An error is that of the socket.
func (in *input) fill() error {
	if in.block == nil {
		in.block = blocks.Get().(*block)
	}
	have := copy(in.block[:], in.bytes)
	n, err := in.raw.Read(in.block[have:])
	in.bytes = in.block[:have+n]
	if err != nil {
		in.shrink()
	}
	return err
}

// use returns the first n bytes and removes them. They are valid until the next call of fill or rest.
func (in *input) use(n int) []byte {
	used := in.bytes[:n]
	in.bytes = in.bytes[n:]
	return used
}

// rest gives the block back, if there are no bytes.
func (in *input) rest() {
	if in.block != nil && len(in.bytes) == 0 {
		blocks.Put(in.block)
		in.block, in.bytes = nil, nil
	}
}

// shrink gives the block back, if there are only a few bytes.
func (in *input) shrink() {
	if in.block != nil && len(in.bytes) <= smallRest {
		in.bytes = bytes.Clone(in.bytes)
		blocks.Put(in.block)
		in.block = nil
	}
}

// record returns the size of the first record with its header, and whether it is here as a whole. The size is 0 if the
// header is incomplete.
func (in *input) record() (size int, whole bool) {
	if len(in.bytes) < headerSize {
		return 0, false
	}
	size = headerSize + int(binary.BigEndian.Uint16(in.bytes[3:]))
	return size, size <= len(in.bytes)
}
