package httpforward

import "encoding/binary"

// isGRPC reports whether the content-type of an HTTP/2 request is gRPC's, alone or with a message encoding such as
// application/grpc+proto. gRPC-Web (application/grpc-web) is a different protocol: its status is in the body. So is gRPC's
// content-type over HTTP/1, where trailers are optional: the result of such a request is the status of HTTP.
func isGRPC[T string | []byte](contentType T) bool {
	const name = "application/grpc"
	if len(contentType) < len(name) || string(contentType[:len(name)]) != name {
		return false
	}
	return len(contentType) == len(name) || contentType[len(name)] == '+' || contentType[len(name)] == ';'
}

// grpcMessages counts the gRPC messages in one direction of a stream. Each message begins with a flags byte and a
// four-byte length (gRPC over HTTP/2, Length-Prefixed-Message). A message is counted once this prefix is complete,
// independent of DATA frame boundaries.
type grpcMessages struct {
	count  uint64
	left   uint32 // bytes left of the current message
	prefix [5]byte
	have   uint8 // bytes of the next prefix that have arrived
}

// scan counts the messages that begin in the next bytes p of the body.
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
