package http1

import "testing"

var (
	wrkRequest = []byte("GET /index.html HTTP/1.1\r\nHost: 127.0.0.1:8080\r\nUser-Agent: wrk/4.2\r\nAccept: */*\r\nConnection: keep-alive\r\n\r\n")
	webRequest = []byte("POST /api/v1/orders?limit=20 HTTP/1.1\r\nHost: orders.shop.svc.cluster.local:8080\r\nUser-Agent: Go-http-client/1.1\r\n" +
		"Content-Length: 62\r\nContent-Type: application/json\r\nX-Request-Id: 1d1a8f8a-9c0b-9f3d-8d4c-2b6f1a4f2a11\r\n" +
		"Traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01\r\nAccept-Encoding: gzip\r\n\r\n")
	webResponse = []byte("HTTP/1.1 200 OK\r\nDate: Mon, 27 Jul 2026 12:28:53 GMT\r\nServer: Apache/2.4.62 (Debian)\r\n" +
		"Last-Modified: Wed, 22 Jul 2026 19:15:56 GMT\r\nContent-Length: 62\r\nContent-Type: text/html\r\nConnection: keep-alive\r\n\r\n")
)

func request(tb testing.TB, h *Head, dst, b []byte) []byte {
	h.Reset()
	if done, err := h.ParseRequest(b, Limits{}); !done || err != nil {
		tb.Fatal(done, err)
	}
	if _, err := h.RequestFraming(b); err != nil {
		tb.Fatal(err)
	}
	h.DropHopByHop(b)
	return h.AppendLines(dst[:0], b)
}

func response(tb testing.TB, h *Head, dst, b []byte) []byte {
	h.Reset()
	if done, err := h.ParseResponse(b, Limits{}); !done || err != nil {
		tb.Fatal(done, err)
	}
	if _, err := h.ResponseFraming(b, wrkRequest[:3]); err != nil {
		tb.Fatal(err)
	}
	h.DropHopByHop(b)
	return h.AppendLines(dst[:0], b)
}

func BenchmarkHead(b *testing.B) {
	for _, bench := range []struct {
		name  string
		take  func(testing.TB, *Head, []byte, []byte) []byte
		bytes []byte
	}{
		{"request of wrk", request, wrkRequest},
		{"request with 8 fields", request, webRequest},
		{"response with 6 fields", response, webResponse},
	} {
		b.Run(bench.name, func(b *testing.B) {
			var h Head
			dst := make([]byte, 0, 4096)
			b.SetBytes(int64(len(bench.bytes)))
			b.ReportAllocs()
			for b.Loop() {
				dst = bench.take(b, &h, dst, bench.bytes)
			}
		})
	}
}
