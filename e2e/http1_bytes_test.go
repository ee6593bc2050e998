package e2e

import (
	"bufio"
	"bytes"
	"cmp"
	"fmt"
	"io"
	"net"
	"net/netip"
	"net/textproto"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

// exchange is a request and its response as bytes. Both pass unchanged, except for the fields that the agent adds.
type exchange struct {
	name            string
	request, answer string
	untilClose      bool // the answer ends where upstream closes
}

// exchanges hold no field that is hop-by-hop (RFC 9110 §7.6.1), because those are not passed on.
var exchanges = []exchange{
	{
		name: "order, case, repetition and spelling of fields",
		request: "GET /A%20b/../c?x=1&&y HTTP/1.1\r\nx-last: 0\r\nhOsT: Example.COM:80\r\nX-b: 2\r\nx-A:   spaced \t value\r\n" +
			"X-B: 1\r\naccept:\r\nCookie: a=1\r\ncookie: b=2\r\nX-Bytes: \xc3\xa9\xff\r\nno.space:x\r\nUser-Agent: e2e\r\n\r\n",
		answer: "HTTP/1.1 299 Sonderbar \xf6\r\nserver: Mine/1.0\r\nDATE: yesterday\r\nSet-Cookie: a\r\nset-cookie: b\r\nVia: 1.0 x\r\n" +
			"content-LENGTH: 2\r\nX-Empty:\r\n\r\nok",
	},
	{
		name:    "no reason phrase",
		request: "GET / HTTP/1.1\r\nHost: a\r\n\r\n",
		answer:  "HTTP/1.1 404 \r\nContent-Length: 0\r\n\r\n",
	},
	{
		name:    "unknown methods and statuses",
		request: "M-SEARCH!x * HTTP/1.1\r\nHost: a\r\n\r\n",
		answer:  "HTTP/1.1 999 Odd\r\nContent-Length: 0\r\n\r\n",
	},
	{
		name:    "OPTIONS *",
		request: "OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n",
		answer:  "HTTP/1.1 200 OK\r\nAllow: GET\r\nContent-Length: 0\r\n\r\n",
	},
	{
		name:    "absolute-form",
		request: "GET http://some.example:8080/path?q HTTP/1.1\r\nHost: some.example:8080\r\n\r\n",
		answer:  "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc",
	},
	{
		name:    "sized bodies with every byte",
		request: "PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: 256\r\n\r\n" + everyByte(),
		answer:  "HTTP/1.1 200 OK\r\nContent-Length: 256\r\n\r\n" + everyByte(),
	},
	{
		name:    "a GET with a body",
		request: "GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\nbody",
		answer:  "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
	},
	{
		name: "chunks with extensions and trailers",
		request: "POST / HTTP/1.1\r\nHost: a\r\nTrailer: X-Sum\r\ntransfer-encoding: chunked\r\n\r\n" +
			"4\r\nWiki\r\n5;name=value;quoted=\"a;b\"\r\npedia\r\n00A\r\n0123456789\r\n0;last\r\nX-Sum: abc\r\nx-other: 1\r\n\r\n",
		answer: "HTTP/1.1 200 OK\r\nTransfer-Encoding: Chunked\r\n\r\n1;x\r\na\r\nf\r\n123456789012345\r\n0\r\nX-Sum: def\r\n\r\n",
	},
	{
		name:    "an empty chunked body",
		request: "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
		answer:  "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
	},
	{
		name:    "a Content-Length in a response to HEAD",
		request: "HEAD / HTTP/1.1\r\nHost: a\r\n\r\n",
		answer:  "HTTP/1.1 200 OK\r\nContent-Length: 12345\r\n\r\n",
	},
	{
		name:    "Transfer-Encoding in a response to HEAD",
		request: "HEAD / HTTP/1.1\r\nHost: a\r\n\r\n",
		answer:  "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
	},
	{
		name:    "304 with a length",
		request: "GET / HTTP/1.1\r\nHost: a\r\nIf-None-Match: \"x\"\r\n\r\n",
		answer:  "HTTP/1.1 304 Not Modified\r\nContent-Length: 777\r\nEtag: \"x\"\r\n\r\n",
	},
	{
		name:    "204",
		request: "DELETE / HTTP/1.1\r\nHost: a\r\n\r\n",
		answer:  "HTTP/1.1 204 No Content\r\n\r\n",
	},
	{
		name:    "many fields",
		request: "GET / HTTP/1.1\r\nHost: a\r\n" + fields(900, 20) + "\r\n",
		answer:  "HTTP/1.1 200 OK\r\n" + fields(900, 20) + "Content-Length: 2\r\n\r\nok",
	},
	{
		name:    "large fields",
		request: "GET / HTTP/1.1\r\nHost: a\r\n" + fields(3, 70_000) + "\r\n",
		answer:  "HTTP/1.1 200 OK\r\n" + fields(3, 70_000) + "Content-Length: 2\r\n\r\nok",
	},
	{
		name:    "a long target",
		request: "GET /" + strings.Repeat("long", 15_000) + " HTTP/1.1\r\nHost: a\r\n\r\n",
		answer:  "HTTP/1.1 414 URI Too Long\r\nContent-Length: 0\r\n\r\n",
	},
	{
		name:       "an answer that ends with the connection",
		request:    "GET / HTTP/1.1\r\nHost: a\r\n\r\n",
		answer:     "HTTP/1.1 200 OK\r\nX-Empty:\r\n\r\nuntil the end",
		untilClose: true,
	},
	{
		name:       "HTTP/1.0",
		request:    "GET / HTTP/1.0\r\nAccept: */*\r\n\r\n",
		answer:     "HTTP/1.0 200 OK\r\n\r\nuntil the end",
		untilClose: true,
	},
	{
		name:       "HTTP/1.0 with lengths and a host",
		request:    "POST /x HTTP/1.0\r\nHOST: a\r\nContent-Length: 4\r\n\r\nbody",
		answer:     "HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello",
		untilClose: true,
	},
}

func everyByte() string {
	all := make([]byte, 256)
	for i := range all {
		all[i] = byte(i)
	}
	return string(all)
}

// fields returns n field lines with values of the given size.
func fields(n, size int) string {
	var lines strings.Builder
	for i := range n {
		fmt.Fprintf(&lines, "X-Field-%d: %s\r\n", i, strings.Repeat(string(rune('a'+i%26)), size))
	}
	return lines.String()
}

func TestHTTP1MessagesKeepTheirBytes(t *testing.T) {
	t.Parallel()
	newStage(t).eachDirection(t, func(t *testing.T, w way) {
		for _, x := range exchanges {
			t.Run(x.name, func(t *testing.T) {
				downstream, upstream := w.ask(t, x.request)
				sameMessage(t, "the request", readMessage(t, upstream, bodyOf(x.request)), x.request)
				writes(t, upstream, x.answer)
				sameMessage(t, "the answer", readMessage(t, downstream, bodyOf(x.answer)), x.answer)
				if x.untilClose {
					upstream.CloseWrite()
					if rest, err := io.ReadAll(downstream); err != nil || len(rest) > 0 {
						t.Errorf("behind the answer came %q, %v, want the end", rest, err)
					}
				}
			})
		}
	})
}

// The same exchanges, one after the other on one connection. A body with a wrong end would break the next exchange.
func TestHTTP1MessagesFollowEachOtherOnOneConnection(t *testing.T) {
	t.Parallel()
	newStage(t).eachDirection(t, func(t *testing.T, w way) {
		downstream, upstream := w.connect(t)
		for _, x := range exchanges {
			if x.untilClose {
				continue
			}
			writes(t, downstream, x.request)
			sameMessage(t, x.name+": the request", readMessage(t, upstream, bodyOf(x.request)), x.request)
			writes(t, upstream, x.answer)
			sameMessage(t, x.name+": the answer", readMessage(t, downstream, bodyOf(x.answer)), x.answer)
		}
	})
}

// One byte at a time, in both directions: the boundaries between reads must not matter.
func TestHTTP1MessagesMayArriveByteByByte(t *testing.T) {
	t.Parallel()
	newStage(t).eachDirection(t, func(t *testing.T, w way) {
		for _, x := range exchanges {
			if len(x.request) > 1000 || x.untilClose {
				continue
			}
			downstream, upstream := w.begin(t, func(conn *net.TCPConn) { dribble(conn, x.request) })
			sameMessage(t, x.name+": the request", readMessage(t, upstream, bodyOf(x.request)), x.request)
			go dribble(upstream, x.answer)
			sameMessage(t, x.name+": the answer", readMessage(t, downstream, bodyOf(x.answer)), x.answer)
		}
	})
}

// dribble writes byte by byte. The kernel does not join them, so every byte is a segment.
func dribble(conn *net.TCPConn, text string) {
	conn.SetNoDelay(true)
	for i := range len(text) {
		if _, err := conn.Write([]byte(text[i : i+1])); err != nil {
			return
		}
	}
}

func TestInterimResponsesPrecedeTheFinalOne(t *testing.T) {
	t.Parallel()
	newStage(t).eachDirection(t, func(t *testing.T, w way) {
		downstream, upstream := w.ask(t, "POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\n")
		readMessage(t, upstream, "")
		for _, interim := range []string{
			"HTTP/1.1 102 Processing\r\nX-A: 1\r\n\r\n",
			"HTTP/1.1 100 Continue\r\n\r\n",
			"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\nLink: </b>\r\n\r\n",
		} {
			writes(t, upstream, interim)
			sameMessage(t, "the interim answer", readMessage(t, downstream, ""), interim)
		}
		writes(t, downstream, "body")
		reads(t, upstream, "body")
		final := "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
		writes(t, upstream, final)
		sameMessage(t, "the final answer", readMessage(t, downstream, "ok"), final)
	})
}

// Pipelined requests are answered in order, each once.
func TestPipelinedRequestsAreAnsweredInOrder(t *testing.T) {
	t.Parallel()
	const requests = 50
	newStage(t).eachDirection(t, func(t *testing.T, w way) {
		address := w.serveScript(t, func(conn net.Conn, r *bufio.Reader) error {
			target, err := readRequest(r)
			if err == nil {
				_, err = fmt.Fprintf(conn, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", len(target), target)
			}
			return err
		})
		downstream := w.dial(t, address)
		var all strings.Builder
		for serial := range requests {
			body := strings.Repeat("x", serial)
			fmt.Fprintf(&all, "POST /%d HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%s", serial, len(body), body)
		}
		writes(t, downstream, all.String())
		r := bufio.NewReader(downstream)
		for serial := range requests {
			if status, body := readAnswer(t, r); status != "200" || body != fmt.Sprint("/", serial) {
				t.Fatalf("answer %d is %s %q", serial, status, body)
			}
		}
	})
}

// ask connects along the way, sends text at once, as clients do, and returns both ends like connect.
func (w way) ask(t testing.TB, text string) (downstream, upstream *net.TCPConn) {
	t.Helper()
	return w.begin(t, func(conn *net.TCPConn) { conn.Write([]byte(text)) })
}

// begin is ask for a client that is a function. It runs in its own goroutine, because it may send more than the connection
// buffers.
func (w way) begin(t testing.TB, speak func(*net.TCPConn)) (downstream, upstream *net.TCPConn) {
	t.Helper()
	listener := w.to.Listen(t, "tcp", netip.AddrPortFrom(w.address, 0).String()).(*net.TCPListener)
	downstream = w.dial(t, listener.Addr().String())
	go speak(downstream)
	listener.SetDeadline(time.Now().Add(nettest.Patience))
	upstream, err := listener.AcceptTCP()
	if err != nil {
		t.Fatalf("%s: the connection did not arrive: %v", w.name, err)
	}
	prepare(t, upstream)
	if seen := upstream.RemoteAddr().(*net.TCPAddr).AddrPort(); seen.Addr() != w.seenAs {
		t.Fatalf("%s: upstream sees %v, want %v", w.name, seen, w.seenAs)
	}
	return downstream, upstream
}

// bodyOf returns the part of a message after its head.
func bodyOf(message string) string {
	_, body, _ := strings.Cut(message, "\r\n\r\n")
	return body
}

// readMessage reads a head and as many bytes after it as the body should have. It leaves what follows in the socket:
// the head is read up to a terminator that peek has seen. Its deadline is for each read, so that it bounds silence and
// not the time of a large head.
func readMessage(t testing.TB, conn *net.TCPConn, body string) string {
	t.Helper()
	end := []byte("\r\n\r\n")
	var head []byte
	for !bytes.HasSuffix(head, end) {
		seen := peek(t, conn, head)
		take := len(seen)
		// The terminator may begin in what was taken before.
		before := head[max(0, len(head)-len(end)+1):]
		if at := bytes.Index(append(bytes.Clone(before), seen...), end); at >= 0 {
			take = at + len(end) - len(before)
		}
		head = append(head, seen[:take]...)
		if _, err := io.ReadFull(conn, make([]byte, take)); err != nil {
			t.Fatalf("reading the head, after %q: %v", tail(head), err)
		}
	}
	got := make([]byte, len(body))
	conn.SetReadDeadline(time.Now().Add(nettest.Patience))
	if n, err := io.ReadFull(conn, got); err != nil {
		t.Fatalf("reading the body, after %q: %v", tail(got[:n]), err)
	}
	return string(head) + string(got)
}

// peek waits for bytes and returns them without taking them from the socket (MSG_PEEK). before is for the message of a
// failure.
func peek(t testing.TB, conn *net.TCPConn, before []byte) []byte {
	t.Helper()
	conn.SetReadDeadline(time.Now().Add(nettest.Patience))
	raw, err := conn.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	seen := make([]byte, 64<<10)
	n, failure := 0, error(nil)
	err = raw.Read(func(fd uintptr) bool {
		n, _, failure = syscall.Recvfrom(int(fd), seen, syscall.MSG_PEEK|syscall.MSG_DONTWAIT)
		return failure != syscall.EAGAIN && failure != syscall.EINTR
	})
	if err = cmp.Or(err, failure); err != nil || n == 0 {
		t.Fatalf("reading the head, after %q: %v, %d bytes", tail(before), err, n)
	}
	return seen[:n]
}

func tail(text []byte) []byte { return text[max(0, len(text)-200):] }

// added are the fields that the agent adds to messages that do not have them. Connection speaks of one hop only.
var added = []string{"x-request-id", "x-forwarded-proto", "x-forwarded-for", "x-envoy-upstream-service-time", "connection"}

// sameMessage fails the test unless got is want, apart from fields that the agent adds.
func sameMessage(t testing.TB, what, got, want string) {
	t.Helper()
	head, body, _ := strings.Cut(got, "\r\n\r\n")
	lines := slices.DeleteFunc(strings.Split(head, "\r\n"), func(line string) bool {
		name, _, _ := strings.Cut(line, ":")
		return slices.Contains(added, strings.ToLower(name)) && !strings.Contains(want, line)
	})
	if got := strings.Join(lines, "\r\n") + "\r\n\r\n" + body; got != want {
		at := 0
		for at < min(len(got), len(want)) && got[at] == want[at] {
			at++
		}
		from := max(0, at-40)
		t.Errorf("%s differs at byte %d of %d: got …%.120q, want …%.120q", what, at, len(want), got[from:], want[from:])
	}
}

// serveScript runs an origin at the way's end: answer is called again and again for each connection, until it returns an
// error; then the connection is closed.
func (w way) serveScript(t testing.TB, answer func(conn net.Conn, r *bufio.Reader) error) (address string) {
	t.Helper()
	listener := w.to.Listen(t, "tcp", netip.AddrPortFrom(w.address, 0).String())
	serveEach(t, listener, func(conn net.Conn) {
		for r := bufio.NewReader(conn); ; {
			conn.SetDeadline(time.Now().Add(nettest.Patience)) // for each request: a connection may carry thousands
			if err := answer(conn, r); err != nil {
				return
			}
		}
	})
	return listener.Addr().String()
}

// readHead reads a start line and fields.
func readHead(r *bufio.Reader) (first string, fields textproto.MIMEHeader, err error) {
	text := textproto.NewReader(r)
	first, err = text.ReadLine()
	if err == nil {
		fields, err = text.ReadMIMEHeader()
	}
	if err == nil && len(strings.Fields(first)) < 2 {
		err = fmt.Errorf("the start line is %q", first)
	}
	return first, fields, err
}

// length is the value of Content-Length, 0 without one.
func length(fields textproto.MIMEHeader) int64 {
	n, _ := strconv.ParseInt(fields.Get("Content-Length"), 10, 64)
	return n
}

// readRequest reads a request with its sized body and returns its target.
func readRequest(r *bufio.Reader) (target string, err error) {
	first, fields, err := readHead(r)
	if err != nil {
		return "", err
	}
	_, err = io.CopyN(io.Discard, r, length(fields))
	return strings.Fields(first)[1], err
}

// readAnswer reads a response with a Content-Length.
func readAnswer(t testing.TB, r *bufio.Reader) (status, body string) {
	t.Helper()
	first, fields, err := readHead(r)
	if err != nil {
		t.Fatalf("reading the head of a response: %v", err)
	}
	text := make([]byte, length(fields))
	if _, err := io.ReadFull(r, text); err != nil {
		t.Fatalf("reading the body of a response: %v", err)
	}
	return strings.Fields(first)[1], string(text)
}
