package secure

import (
	"encoding/binary"
	"sync"

	"github.com/pillion-proxy/pillion/internal/tcp"
)

// Sizes of TLS 1.3 (RFC 8446 §5). Those of TLS 1.2 are larger, and only crypto/tls decodes its records.
const (
	headerSize    = 5
	tagSize       = 16 // of AES-GCM
	maxPlaintext  = 16 << 10
	maxCiphertext = maxPlaintext + 256
	maxRecord     = headerSize + maxCiphertext

	majorVersion    = 3                   // in the header of a record, of all versions
	maxCiphertext12 = maxPlaintext + 2048 // of TLS 1.2 (RFC 5246 §6.2.3)
)

// Memory for raw bytes is pooled, so that an idle connection does not occupy any.
type (
	block [4 * maxRecord]byte // for reading
	piece [maxRecord]byte     // for the beginning of a record while its rest is awaited
)

var (
	blocks = sync.Pool{New: func() any { return new(block) }}
	pieces = sync.Pool{New: func() any { return new(piece) }}
)

// input reads raw bytes in large pieces.
type input struct {
	raw   *tcp.Socket
	bytes []byte // that were read and not yet used; in block or in piece
	block *block // may be nil
	piece *piece // may be nil
	full  bool   // the last read has filled the block: there may be more on the socket
}

// fill reads once. An error is that of the socket.
func (in *input) fill() error {
	if in.block == nil {
		in.block = blocks.Get().(*block)
	}
	have := copy(in.block[:], in.bytes)
	n, err := in.raw.Read(in.block[have:])
	in.bytes = in.block[:have+n]
	in.full = len(in.bytes) == len(in.block)
	if in.piece != nil {
		pieces.Put(in.piece)
		in.piece = nil
	}
	if err != nil {
		in.rest()
	}
	return err
}

// use returns the first n bytes and removes them. They are valid until the next call of fill or rest.
func (in *input) use(n int) []byte {
	used := in.bytes[:n]
	in.bytes = in.bytes[n:]
	return used
}

// rest gives memory back that the bytes do not need, before a wait.
func (in *input) rest() {
	switch {
	case len(in.bytes) == 0:
		in.bytes = nil
		in.release()
	case in.block != nil && !in.full && len(in.bytes) <= maxRecord:
		moved := pieces.Get().(*piece)
		in.bytes = moved[:copy(moved[:], in.bytes)]
		in.release()
		in.piece = moved
	}
}

// size returns the memory for raw bytes.
func (in *input) size() (n int) {
	if in.block != nil {
		n += len(in.block)
	}
	if in.piece != nil {
		n += len(in.piece)
	}
	return n
}

// drop drops the bytes, and gives their memory back.
func (in *input) drop() {
	in.bytes = nil
	in.release()
}

func (in *input) release() {
	if in.block != nil {
		blocks.Put(in.block)
	}
	if in.piece != nil {
		pieces.Put(in.piece)
	}
	in.block, in.piece = nil, nil
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
