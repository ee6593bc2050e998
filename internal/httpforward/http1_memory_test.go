//go:build !race

package httpforward

import (
	"net"
	"runtime"
	"testing"
)

// heap returns the size of the live heap. Objects in a sync.Pool are freed by the second collection.
func heap() uint64 {
	runtime.GC()
	runtime.GC()
	var stats runtime.MemStats
	runtime.ReadMemStats(&stats)
	return stats.HeapAlloc
}

// A response that has begun and is silent, or that has not begun on a fresh connection, costs no buffer. Events and long
// polls are that for most of their life. Nor does a body whose next part is awaited, or an empty line before a request.
func TestASilentResponseHoldsNoBuffer(t *testing.T) {
	const (
		many  = 100
		limit = 10 << 10 // the test's own two connections are in it
		get   = "GET /events HTTP/1.1\r\nHost: a\r\n\r\n"
		post  = "POST /events HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\nbody"
		slow  = "PUT /slow HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\nx"
		done  = "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
		begun = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n"
	)
	for _, c := range []struct {
		name, request, answer, then string
		balanced                    bool
	}{
		{"begun", get, begun, "", false},
		{"not begun", get, "", "", false},
		{"not begun, of a balanced target", get, "", "", true},
		{"not begun, for a body that will not be sent again", post, "", "", true},
		{"for a body that has not come", slow, "", "", false},
		{"for a chunk whose size has come in part", slow[:len(slow)-len("Content-Length: 100\r\n\r\nx")] + "Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n", "", "1", false},
		{"complete, and followed by an empty line", get, done, "\r\n", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			o := newOrigin(t)
			r := newRig(t, o.address, false, plain)
			r.set(func() { r.balanced = c.balanced })
			request, answer := c.request, c.answer
			var conns []net.Conn
			before := heap()
			for range many {
				client := r.dial(t)
				send(t, client, request)
				up := o.accept()
				expect(t, up, request)
				send(t, up, answer)
				expect(t, client, answer)
				send(t, client, c.then)
				conns = append(conns, client, up)
			}
			within(t, "the responses hold no buffer", func() bool { return int64(heap()-before)/many < limit })
			t.Logf("%d bytes each", int64(heap()-before)/many)
			runtime.KeepAlive(conns)
		})
	}
}
