package http1

import (
	"io"
	"math"
	"strings"
	"testing"
)

func TestPayloadIsWhatNeedsNoLook(t *testing.T) {
	for _, c := range []struct {
		name    string
		framing Framing
		scan    string
		n       int
		payload int64
		bytes   int64
		end     error
	}{
		{"no body", Framing{}, "x", 0, 0, 0, nil},
		{"a tunnel", Framing{Kind: Tunnel}, "x", 0, 0, 0, nil},
		{"a size of 0", Framing{Kind: Sized}, "x", 0, 0, 0, nil},
		{"sized", Framing{Kind: Sized, Length: 5}, "", 0, 5, 0, io.ErrUnexpectedEOF},
		{"sized, begun", Framing{Kind: Sized, Length: 5}, "he", 2, 3, 2, io.ErrUnexpectedEOF},
		{"sized, done", Framing{Kind: Sized, Length: 5}, "hello!", 5, 0, 5, nil},
		{"until close", Framing{Kind: UntilClose}, "", 0, math.MaxInt64, 0, nil},
		{"until close, begun", Framing{Kind: UntilClose}, "hello", 5, math.MaxInt64, 5, nil},
		{"chunked", Framing{Kind: Chunked}, "", 0, 0, 0, io.ErrUnexpectedEOF},
		{"in a chunk size", Framing{Kind: Chunked}, "5\r", 0, 0, 0, io.ErrUnexpectedEOF},
		{"before a chunk", Framing{Kind: Chunked}, "5\r\n", 3, 5, 0, io.ErrUnexpectedEOF},
		{"in a chunk", Framing{Kind: Chunked}, "5\r\nhe", 5, 3, 2, io.ErrUnexpectedEOF},
		{"behind a chunk", Framing{Kind: Chunked}, "5\r\nhello", 8, 0, 5, io.ErrUnexpectedEOF},
		{"in the end of a chunk", Framing{Kind: Chunked}, "5\r\nhello\r", 8, 0, 5, io.ErrUnexpectedEOF},
		{"in the last chunk", Framing{Kind: Chunked}, "5\r\nhello\r\n0", 10, 0, 5, io.ErrUnexpectedEOF},
		{"behind the last chunk", Framing{Kind: Chunked}, "5\r\nhello\r\n0\r\n", 13, 0, 5, io.ErrUnexpectedEOF},
		{"in a trailer", Framing{Kind: Chunked}, "0\r\nX: y\r", 3, 0, 0, io.ErrUnexpectedEOF},
		{"behind a trailer", Framing{Kind: Chunked}, "0\r\nX: y\r\n\r", 9, 0, 0, io.ErrUnexpectedEOF},
		{"chunked, done", Framing{Kind: Chunked}, "0\r\n\r\n\r\n", 5, 0, 0, nil},
	} {
		var x Body
		x.Start(c.framing, Limits{})
		n, err := x.Scan([]byte(c.scan))
		if n != c.n || err != nil || x.Payload() != c.payload || x.Bytes() != c.bytes || x.End() != c.end {
			t.Errorf("%s: %d, %v, payload %d, bytes %d, end %v", c.name, n, err, x.Payload(), x.Bytes(), x.End())
		}
		if done := c.end == nil && c.framing.Kind != UntilClose; x.Done() != done {
			t.Errorf("%s: done is %v", c.name, x.Done())
		}
	}
}

// Bytes before an error are forwarded, and the error is permanent.
func TestAFaultStays(t *testing.T) {
	var x Body
	x.Start(Framing{Kind: Chunked}, Limits{})
	const bad = "hello\r\n0x\r\n\r\n"
	n, err := x.Scan([]byte("5\r\n" + bad))
	if n != 10 || err != ErrBadChunkSize {
		t.Errorf("%d, %v", n, err)
	}
	if n, err = x.Scan([]byte(bad[7:])); n != 0 || err != ErrBadChunkSize {
		t.Errorf("again: %d, %v", n, err)
	}
}

// A caller whose buffer is as large as the longest line must not be asked for more.
func TestABufferFullOfOneLineIsTooLong(t *testing.T) {
	for _, c := range []struct {
		before string
		size   int
		want   Error
	}{
		{"", maxChunkLine, ErrChunkLineTooLong},
		{"0\r\n", maxTrailerLine, ErrTrailersTooLarge},
	} {
		var x Body
		x.Start(Framing{Kind: Chunked}, Limits{})
		x.Scan([]byte(c.before))
		line := []byte("0;" + strings.Repeat("x", c.size-2))
		if n, err := x.Scan(line[:c.size-1]); n != 0 || err != nil {
			t.Errorf("%d bytes: %d, %v", c.size-1, n, err)
		}
		if n, err := x.Scan(line); n != 0 || err != c.want {
			t.Errorf("%d bytes: %d, %v", c.size, n, err)
		}
	}
}

func TestTheZeroBodyIsDone(t *testing.T) {
	var x Body
	if n, err := x.Scan([]byte("x")); n != 0 || err != nil || !x.Done() || x.End() != nil {
		t.Errorf("%d, %v, %v, %v", n, err, x.Done(), x.End())
	}
}
