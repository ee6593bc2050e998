package e2e

import (
	"bufio"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"testing"
)

// refused is the body of the answer to a request whose upstream refuses the connection, without and with retries. People's
// alerts know it.
const (
	refused = "upstream connect error or disconnect/reset before headers. reset reason: remote connection failure, " +
		"transport failure reason: delayed connect error: Connection refused"
	refusedAgain = "upstream connect error or disconnect/reset before headers. retried and the latest reset reason: remote " +
		"connection failure, transport failure reason: delayed connect error: Connection refused"
)

func TestRequestToRefusingUpstreamIsAnswered503(t *testing.T) {
	t.Parallel()
	s := newStage(t, patientWithClients...)
	s.eachDirection(t, func(t *testing.T, w way) {
		want, flags := refused, "flags=UF"
		if w == s.outbound() {
			want, flags = refusedAgain, "flags=UF,URX"
		}
		for _, http2 := range []bool{false, true} {
			response := w.askRefused(t, http2, "/refused", "text/plain")
			if got := text(t, response); response.StatusCode != 503 || got != want {
				t.Errorf("HTTP/2 %v: status %d, %q", http2, response.StatusCode, got)
			}
		}
		s.requestRecord(t, "path=/refused", "status=503", flags, "reason=upstream_refused", "Connection_refused")
	})
}

// A client that has not sent a byte does not get an HTTP response.
func TestSilentClientOfRefusingUpstreamIsReset(t *testing.T) {
	t.Parallel()
	newStage(t).everyWay(t, func(t *testing.T, w way) {
		if err := tryConnection(w.from, netip.AddrPortFrom(w.address, 9).String()); !isReset(err) && !isRefused(err) {
			t.Errorf("downstream sees %v, want a reset", err)
		}
	})
}

// gRPC clients expect a grpc-status and not an HTTP status.
func TestGRPCCallToRefusingUpstreamIsUnavailable(t *testing.T) {
	t.Parallel()
	newStage(t, patientWithClients...).eachDirection(t, func(t *testing.T, w way) {
		for _, c := range []struct {
			http2       bool
			contentType string
			status      int
			grpc        string
		}{
			{true, "application/grpc", 200, "14"},
			{true, "application/grpc+proto", 200, "14"},
			{true, "application/grpc-web", 503, ""},
			{false, "application/grpc", 503, ""}, // gRPC needs HTTP/2
		} {
			response := w.askRefused(t, c.http2, "/a.B/C", c.contentType)
			text(t, response)
			status := response.Header.Get("Grpc-Status") + response.Trailer.Get("Grpc-Status")
			if response.StatusCode != c.status || status != c.grpc {
				t.Errorf("HTTP/2 %v, %s: status %d, grpc-status %q, want %d and %q", c.http2, c.contentType, response.StatusCode, status, c.status, c.grpc)
			}
		}
	})
}

// patientWithClients are flags with which a client that is delayed before its first byte does not count as silent.
var patientWithClients = []string{"--detection-delay", "60s"}

// askRefused posts to a port without a listener.
func (w way) askRefused(t testing.TB, http2 bool, path, contentType string) *http.Response {
	t.Helper()
	response, err := w.client(t, http2).Post("http://"+netip.AddrPortFrom(w.address, 9).String()+path, contentType, nil)
	if err != nil {
		t.Fatalf("HTTP/2 %v: %v", http2, err)
	}
	t.Cleanup(func() { response.Body.Close() })
	return response
}

// hostile are requests that two parsers could delimit differently, or whose framing is invalid.
var hostile = []struct{ name, request, status string }{
	{"two ways to find the end", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "400"},
	{"two lengths", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\nContent-Length: 5\r\n\r\nbody!", "400"},
	{"a signed length", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: +4\r\n\r\nbody", "400"},
	{"a length beyond all lengths", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9223372036854775808\r\n\r\n", "400"},
	{"an unknown coding", "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", "400"},
	{"chunked twice", "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n", "400"},
	{"chunks in HTTP/1.0", "POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "400"},
	{"a blank in front of the colon", "GET / HTTP/1.1\r\nHost: a\r\nContent-Length : 4\r\n\r\nbody", "400"},
	{"a folded line", "GET / HTTP/1.1\r\nHost: a\r\nX: 1\r\n 2\r\n\r\n", "400"},
	{"a NUL", "GET / HTTP/1.1\r\nHost: a\r\nX: a\x00b\r\n\r\n", "400"},
	{"a LF alone", "GET / HTTP/1.1\r\nHost: a\r\nX: a\nb: c\r\n\r\n", "400"},
	{"a LF alone behind the request line", "GET / HTTP/1.1\nHost: a\r\n\r\n", "400"},
	{"two blanks", "GET  / HTTP/1.1\r\nHost: a\r\n\r\n", "400"},
	{"a blank in the target", "GET /a b HTTP/1.1\r\nHost: a\r\n\r\n", "400"},
	{"a trailer for the connection", "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nConnection: close\r\n\r\n", "400"},
	{"a CR alone", "GET / HTTP/1.1\r\nHost: a\r\nX: a\rb: c\r\n\r\n", "400"},
	{"no host", "GET / HTTP/1.1\r\nX: 1\r\n\r\n", "400"},
	{"two hosts", "GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", "400"},
	{"too large", "GET / HTTP/1.1\r\nHost: a\r\n" + fields(5, 60_000) + "\r\n", "431"},
	{"too many", "GET / HTTP/1.1\r\nHost: a\r\n" + fields(1001, 1) + "\r\n", "431"},
}

func TestMalformedRequestIsRejected(t *testing.T) {
	t.Parallel()
	newStage(t).eachDirection(t, func(t *testing.T, w way) {
		for _, c := range hostile {
			t.Run(c.name, func(t *testing.T) {
				listener := w.to.Listen(t, "tcp", netip.AddrPortFrom(w.address, 0).String())
				received := make(chan string, 1)
				serveEach(t, listener, func(conn net.Conn) {
					first := make([]byte, 100)
					if n, _ := conn.Read(first); n > 0 {
						received <- string(first[:n])
					}
				})
				downstream := w.dial(t, listener.Addr().String())
				go io.WriteString(downstream, c.request)
				r := bufio.NewReader(downstream)
				if status, _ := readAnswer(t, r); status != c.status {
					t.Errorf("status %s, want %s", status, c.status)
				}
				if rest, err := io.ReadAll(r); err != nil && !isReset(err) || len(rest) > 0 {
					t.Errorf("then came %q, %v, want the end", rest, err)
				}
				select {
				case got := <-received:
					t.Errorf("upstream received %q", got)
				default:
				}
			})
		}
	})
}

// A malformed chunk follows a head that was forwarded. Upstream must not take the request for complete.
func TestMalformedChunkEndsBothSides(t *testing.T) {
	t.Parallel()
	newStage(t).eachDirection(t, func(t *testing.T, w way) {
		downstream, upstream := w.ask(t, "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nbody\r\n")
		readMessage(t, upstream, "4\r\nbody\r\n")
		writes(t, downstream, "4 \r\nbo\n0\r\n\r\n")
		if got, _ := io.ReadAll(upstream); strings.Contains(string(got), "0\r\n\r\n") {
			t.Errorf("upstream read %q", got)
		}
		if status, _ := readAnswer(t, bufio.NewReader(downstream)); status != "400" {
			t.Errorf("status %s, want 400", status)
		}
	})
}

// badAnswers are responses that must not reach a client.
var badAnswers = []struct{ name, answer, status, flags string }{
	{"nothing", "", "503", "UC"},
	{"half a head", "HTTP/1.1 200 OK\r\nContent-", "503", "UC"},
	{"another protocol", "ICY 200 OK\r\n\r\n", "502", "UPE"},
	{"two lengths", "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab", "502", "UPE"},
	{"two ways to find the end", "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "502", "UPE"},
	{"a LF alone", "HTTP/1.1 200 OK\r\nX: y\nContent-Length: 1\r\n\r\na", "502", "UPE"},
	{"a 101 without an upgrade request", "HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: Upgrade\r\n\r\n", "502", "UPE"},
}

func TestMalformedResponseIsNotForwarded(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	s.eachDirection(t, func(t *testing.T, w way) {
		for _, c := range badAnswers {
			t.Run(c.name, func(t *testing.T) {
				downstream, upstream := w.ask(t, "POST /bad HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n")
				readMessage(t, upstream, "")
				writes(t, upstream, c.answer)
				upstream.CloseWrite()
				if status, body := readAnswer(t, bufio.NewReader(downstream)); status != c.status {
					t.Errorf("answered %s %q, want %s", status, body, c.status)
				}
				s.requestRecord(t, "path=/bad", "downstream="+downstream.LocalAddr().String(), "status="+c.status, "flags="+c.flags)
			})
		}
	})
}

// A client that closes during a response is detected even while upstream sends nothing.
func TestClientThatLeavesDuringAResponseIsDetected(t *testing.T) {
	t.Parallel()
	newStage(t).eachDirection(t, func(t *testing.T, w way) {
		const begun = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nevent\r\n"
		downstream, upstream := w.ask(t, "GET /events HTTP/1.1\r\nHost: a\r\n\r\n")
		readMessage(t, upstream, "")
		writes(t, upstream, begun)
		readMessage(t, downstream, bodyOf(begun))
		downstream.Close()
		if _, err := upstream.Read(make([]byte, 1)); err != io.EOF && !isReset(err) {
			t.Errorf("upstream sees %v, want the end", err)
		}
	})
}
