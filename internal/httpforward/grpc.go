package httpforward

import "encoding/binary"

// isGRPC reports whether a content-type is gRPC's, alone or with the encoding of its messages, such as
// application/grpc+proto. gRPC-Web, which is application/grpc-web, is another protocol: its status is in its body.
func isGRPC[T string | []byte](contentType T) bool {
	const name = "application/grpc"
	if len(contentType) < len(name) || string(contentType[:len(name)]) != name {
		return false
	}
	return len(contentType) == len(name) || contentType[len(name)] == '+' || contentType[len(name)] == ';'
}

// grpcMessages counts the messages of gRPC in one direction of a stream. Each begins with a byte of flags and its length
// in four (gRPC over HTTP/2, Length-Prefixed-Message). It counts when that is there, and goes on wherever a frame ends.
type grpcMessages struct {
	count  uint64
	left   uint32 // of the message that is under way
	prefix [5]byte
	have   uint8 // bytes of the next prefix
}

// scan looks at the next bytes of the body.
func (g *grpcMessages) scan(p []byte) {
	for len(p) > 0 {
		if g.left > 0 {
			n := min(uint32(len(p)), g.left)
			g.left -= n
			p = p[n:]
			continue
		}
		n := copy(g.prefix[g.have:], p)
		p = p[n:]
		if g.have += uint8(n); int(g.have) == len(g.prefix) {
			g.have = 0
			g.count++
			g.left = binary.BigEndian.Uint32(g.prefix[1:])
		}
	}
}
