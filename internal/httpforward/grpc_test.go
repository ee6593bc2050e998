package httpforward

import "testing"

// Messages are counted alike however the frames cut them.
func TestGRPCMessagesAreCountedInAnyPieces(t *testing.T) {
	body := []byte("\x00\x00\x00\x00\x00" + // an empty message
		"\x01\x00\x00\x00\x03abc" +
		"\x00\x00\x00\x01\x00" + string(make([]byte, 256)) +
		"\x00\x00\x00\x00\x00" +
		"\x00\x00\x00\x00") // a prefix that does not come to its end
	const want = 4
	for size := 1; size <= len(body); size++ {
		var g grpcMessages
		for rest := body; len(rest) > 0; {
			n := min(size, len(rest))
			g.scan(rest[:n])
			rest = rest[n:]
		}
		if g.count != want {
			t.Errorf("in pieces of %d bytes: %d messages, want %d", size, g.count, want)
		}
	}
}

func TestGRPCIsKnownByItsContentType(t *testing.T) {
	for contentType, want := range map[string]bool{
		"application/grpc": true, "application/grpc+proto": true, "application/grpc;charset=utf-8": true,
		"application/grpc-web": false, "application/grpc-web+proto": false, "application/grpcx": false, "application/json": false, "": false,
	} {
		if isGRPC(contentType) != want {
			t.Errorf("%q: %v", contentType, !want)
		}
	}
}
