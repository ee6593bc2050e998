package e2e

import (
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

// Protocols in which the server sends first, also on well-known ports of other protocols: detection does not depend on
// ports.
func TestServerFirstProtocolsWorkOnAnyPort(t *testing.T) {
	t.Parallel()
	newStage(t).everyWay(t, func(t *testing.T, w way) {
		for _, c := range []struct {
			name             string
			greeting, answer string
		}{
			{"MySQL", "\x4a\x00\x00\x00\x0a8.0.36\x00\x08\x00\x00\x00abcdefgh\x00\xff\xff", "\x20\x00\x00\x01\x85\xa6\xff\x01root\x00"},
			{"SMTP", "220 mail.example ESMTP\r\n", "EHLO client.example\r\n"},
			{"POP3", "+OK ready\r\n", "USER somebody\r\n"},
			{"a greeting that looks like an answer of HTTP", "HTTP/1.1 200 OK\r\n\r\n", "GET / HTTP/1.1\r\n\r\n"},
		} {
			for _, port := range []uint16{80, 3306, 8080, 0} {
				listener := w.to.Listen(t, "tcp", netip.AddrPortFrom(w.address, port).String()).(*net.TCPListener)
				downstream, upstream := w.connectTo(t, listener)
				writes(t, upstream, c.greeting)
				reads(t, downstream, c.greeting)
				writes(t, downstream, c.answer)
				reads(t, upstream, c.answer)
				halfClose(t, downstream, upstream)
				listener.Close()
			}
		}
	})
}

// The client sends bytes that could be the beginning of HTTP or TLS, and then waits. The server must receive them soon,
// because the protocol may require its answer.
func TestUndecidedFirstBytesAreForwardedSoon(t *testing.T) {
	t.Parallel()
	newStage(t).eachDirection(t, func(t *testing.T, w way) {
		for _, beginning := range []string{
			"G", "GE", "GET", "GET key", "POST", "\r\n", "PRI", "PRI * HTTP/2.0\r\n\r\n", "HE", "\x16", "\x16\x03\x01", "\x16\x03\x01\x02\x00\x01\x00",
		} {
			t.Run(beginning, func(t *testing.T) {
				t.Parallel()
				downstream, upstream := w.ask(t, beginning)
				reads(t, upstream, beginning) // the client sends no more: only the hold's end can have released it
				writes(t, upstream, "what?")
				reads(t, downstream, "what?")
				halfClose(t, downstream, upstream)
			})
		}
	})
}

// lookAlikes begin or end like HTTP or TLS and are other protocols. They pass byte for byte, in both directions.
var lookAlikes = []struct{ name, question, answer string }{
	{"SIP", "INVITE sip:bob@b.example SIP/2.0\r\nVia: SIP/2.0/TCP a\r\nConnection: close\r\nContent-Length: 0\r\n\r\n",
		"SIP/2.0 200 OK\r\nConnection: close\r\n\r\n"},
	{"SIP OPTIONS", "OPTIONS sip:b.example SIP/2.0\r\nMax-Forwards: 70\r\nKeep-Alive: 1\r\n\r\n", "SIP/2.0 200 OK\r\n\r\n"},
	{"RTSP", "OPTIONS * RTSP/1.0\r\nCSeq: 1\r\nConnection: keep-alive\r\n\r\n", "RTSP/1.0 200 OK\r\nCSeq: 1\r\n\r\n"},
	{"RTSP with a URL", "DESCRIBE rtsp://a.example/b RTSP/1.0\r\nCSeq: 2\r\n\r\n", "RTSP/1.0 200 OK\r\n\r\n"},
	{"ICY", "SOURCE /stream ICE/1.0\r\nice-name: x\r\n\r\n", "ICY 200 OK\r\n\r\n"},
	{"HTTP/0.9", "GET /\r\n", "<html>\r\n"},
	{"an HTTP of the future", "GET / HTTP/3.0\r\nConnection: close\r\n\r\n", "HTTP/3.0 200\r\n\r\n"},
	{"two blanks behind an unknown method", "BREW  / HTTP/1.1\r\nConnection: close\r\n\r\n", "x"},
	{"almost the preface", "PRI * HTTP/2.0\r\n\r\nSX\r\n\r\n", "x"},
	{"Redis inline", "PING\r\n", "+PONG\r\n"},
	{"Redis", "*1\r\n$4\r\nPING\r\n", "+PONG\r\n"},
	{"memcached", "get key\r\n", "END\r\n"},
	{"NATS", "CONNECT {\"verbose\":false}\r\nPING\r\n", "PONG\r\n"},
	{"STOMP", "CONNECT\naccept-version:1.2\nhost:a\n\n\x00", "CONNECTED\nversion:1.2\n\n\x00"},
	{"PostgreSQL", "\x00\x00\x00\x08\x04\xd2\x16\x2f", "N"},
	{"AMQP", "AMQP\x00\x00\x09\x01", "\x01\x00\x00\x00\x00"},
	{"SSH", "SSH-2.0-client\r\n", "SSH-2.0-server\r\n"},
	{"not quite TLS", "\x16\x03\x01\x00\x02hi", "x"},
	{"everything", everyByte(), everyByte()},
}

func TestProtocolsThatResembleHTTPKeepTheirBytes(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	s.eachDirection(t, func(t *testing.T, w way) {
		for _, c := range lookAlikes {
			t.Run(c.name, func(t *testing.T) {
				downstream, upstream := w.ask(t, c.question)
				reads(t, upstream, c.question)
				writes(t, upstream, c.answer)
				reads(t, downstream, c.answer)
				converse(t, downstream, upstream)
				halfClose(t, downstream, upstream)
				s.agent.log.await(t, `msg="connection closed"`, "downstream="+downstream.LocalAddr().String(), "reason=closed")
			})
		}
	})
}

// A client sends bytes that could be the beginning of HTTP or TLS, and closes its half. Both arrive at the server.
func TestUndecidedFirstBytesArriveWithTheHalfClose(t *testing.T) {
	t.Parallel()
	newStage(t).eachDirection(t, func(t *testing.T, w way) {
		for _, beginning := range []string{"", "G", "GET / HT", "PRI * HTTP/2.0\r\n", "\x16\x03", "anything"} {
			downstream, upstream := w.begin(t, func(conn *net.TCPConn) {
				conn.Write([]byte(beginning))
				conn.CloseWrite()
			})
			if got, err := io.ReadAll(upstream); err != nil || string(got) != beginning {
				t.Errorf("upstream read %q and %v, want %q and EOF", got, err, beginning)
			}
			writes(t, upstream, "answer")
			upstream.Close()
			if got, err := io.ReadAll(downstream); err != nil || string(got) != "answer" {
				t.Errorf("after %q: downstream read %q and %v", beginning, got, err)
			}
		}
	})
}

// A connection that is opened ahead of need is neither closed nor classified before its client speaks, also when the
// client is silent for longer than a beginning is held. The probe is a connection opened later: when its beginning is
// released, that time has passed for the others too.
func TestProtocolOfInitiallySilentClientIsDetected(t *testing.T) {
	t.Parallel()
	newStage(t).everyWay(t, func(t *testing.T, w way) {
		t.Parallel()
		type pair struct{ downstream, upstream *net.TCPConn }
		var http, opaque pair
		http.downstream, http.upstream = w.connect(t)
		opaque.downstream, opaque.upstream = w.connect(t)
		_, probe := w.ask(t, "G")
		reads(t, probe, "G")
		x := exchanges[0]
		for range 2 {
			writes(t, http.downstream, x.request)
			sameMessage(t, "the request", readMessage(t, http.upstream, bodyOf(x.request)), x.request)
			writes(t, http.upstream, x.answer)
			sameMessage(t, "the answer", readMessage(t, http.downstream, bodyOf(x.answer)), x.answer)
		}
		converse(t, opaque.downstream, opaque.upstream)
		halfClose(t, opaque.downstream, opaque.upstream)
	})
}

// An HTTP/2 server may send SETTINGS at once. The protocol of a slow client is still detected as HTTP/2.
func TestHTTP2ServerMaySendBeforeItsClient(t *testing.T) {
	t.Parallel()
	const (
		settings = "\x00\x00\x06\x04\x00\x00\x00\x00\x00\x00\x03\x00\x00\x00\x64" // with a limit of 100 streams
		opening  = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"
		request  = "\x00\x00\x06\x01\x05\x00\x00\x00\x01\x82\x86\x84\x41\x01a" // GET http://a/ on stream 1
		answer   = "\x00\x00\x01\x01\x05\x00\x00\x00\x01\x88"                  // 200
	)
	s := newStage(t, "--detection-hold", "10m")
	s.everyWay(t, func(t *testing.T, w way) {
		t.Parallel()
		downstream, upstream := w.connect(t)
		writes(t, upstream, settings)
		s.awaitTaken(t, w, upstream)
		writes(t, downstream, opening+request)
		reads(t, upstream, opening[:len(opening)-9])
		awaitHeaders(t, upstream) // an answer on a stream that is not open would be an error (RFC 9113 §5.1)
		writes(t, upstream, answer)
		s.requestRecord(t, "downstream="+downstream.LocalAddr().String(), "protocol=HTTP/2", "path=/", "status=200", "reason=completed")
	})
}

// awaitHeaders reads frames of HTTP/2 until one opens a stream.
func awaitHeaders(t *testing.T, conn net.Conn) {
	t.Helper()
	for {
		var head [9]byte // length in 3 bytes, type, flags, stream
		if _, err := io.ReadFull(conn, head[:]); err != nil {
			t.Fatalf("reading a frame: %v", err)
		}
		if _, err := io.CopyN(io.Discard, conn, int64(head[0])<<16|int64(head[1])<<8|int64(head[2])); err != nil {
			t.Fatalf("reading a frame: %v", err)
		}
		if head[3] == 1 {
			return
		}
	}
}

// awaitTaken waits until the agent has read all bytes from upstream.
func (s *stage) awaitTaken(t *testing.T, w way, upstream net.Conn) {
	t.Helper()
	own, agents := upstream.LocalAddr().String(), upstream.RemoteAddr().String()
	nettest.Eventually(t, "the agent has read what upstream sent", func() bool {
		sender := strings.Fields(w.to.MustRun(t, "ss", "-Htn", "src", own, "dst", agents))
		receiver := strings.Fields(s.pod.MustRun(t, "ss", "-Htn", "src", agents, "dst", own))
		// The columns are State, Recv-Q and Send-Q.
		return len(sender) > 2 && sender[2] == "0" && len(receiver) > 2 && receiver[1] == "0"
	})
}
