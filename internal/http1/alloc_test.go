//go:build !race

package http1

import (
	"strings"
	"testing"
)

var (
	wrkRequest = []byte("GET /index.html HTTP/1.1\r\nHost: 127.0.0.1:8080\r\nUser-Agent: wrk/4.2\r\nAccept: */*\r\n" +
		"Connection: keep-alive\r\n\r\n")
	webRequest = []byte("POST /api/v1/orders?limit=20 HTTP/1.1\r\nHost: orders.shop.svc.cluster.local:8080\r\n" +
		"User-Agent: Go-http-client/1.1\r\nContent-Length: 62\r\nContent-Type: application/json\r\n" +
		"X-Request-Id: 1d1a8f8a-9c0b-9f3d-8d4c-2b6f1a4f2a11\r\n" +
		"Traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01\r\nAccept-Encoding: gzip\r\n\r\n")
	webChunks = []byte("1000\r\n" + strings.Repeat("x", 4096) + "\r\n" +
		"20;a=b\r\n" + strings.Repeat("x", 32) + "\r\n0\r\nX: y\r\n\r\n")
	webResponse = []byte("HTTP/1.1 200 OK\r\nDate: Mon, 27 Jul 2026 12:28:53 GMT\r\nServer: Apache/2.4.62 (Debian)\r\n" +
		"Last-Modified: Wed, 22 Jul 2026 19:15:56 GMT\r\nContent-Length: 62\r\nContent-Type: text/html\r\n" +
		"Connection: keep-alive\r\n\r\n")
)

// request and response do with a head all that is done with one on its way.
func request(tb testing.TB, h *Head, dst, b []byte) []byte {
	h.Reset()
	done, err := h.ParseRequest(b, Limits{})
	if err == nil {
		_, err = h.RequestFraming(b)
	}
	if !done || err != nil {
		tb.Fatal(done, err)
	}
	h.DropHopByHop(b)
	return h.AppendLines(dst[:0], b)
}

func response(tb testing.TB, h *Head, dst, b []byte) []byte {
	h.Reset()
	done, err := h.ParseResponse(b, Limits{})
	if err == nil {
		_, err = h.ResponseFraming(b, wrkRequest[:3])
	}
	if !done || err != nil {
		tb.Fatal(done, err)
	}
	h.DropHopByHop(b)
	return h.AppendLines(dst[:0], b)
}

func body(tb testing.TB, b []byte) {
	var x Body
	x.Start(Framing{Kind: Chunked}, Limits{})
	if n, err := x.Scan(b); n != len(b) || err != nil {
		tb.Fatal(n, err)
	}
}

func TestAMessageAllocatesNothing(t *testing.T) {
	var h Head
	dst := make([]byte, 0, 4096)
	malformed := []byte("GET / HTTP/1.1\r\nHost: a\r\nX : y\r\n\r\n")
	if allocs := testing.AllocsPerRun(100, func() {
		dst = request(t, &h, dst, webRequest)
		dst = response(t, &h, dst, webResponse)
		body(t, webChunks)
		h.Reset()
		if _, err := h.ParseRequest(malformed, Limits{}); err != ErrSpaceBeforeColon {
			t.Fatal(err)
		}
	}); allocs != 0 {
		t.Errorf("%v allocations for a request, its answer, a chunked body and an error", allocs)
	}
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

func BenchmarkChunks(b *testing.B) {
	b.SetBytes(int64(len(webChunks)))
	b.ReportAllocs()
	for b.Loop() {
		body(b, webChunks)
	}
}
