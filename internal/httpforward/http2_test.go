package httpforward

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/http2"
	"github.com/pillion-proxy/pillion/internal/nettest"
)

// serveHTTP2 starts a real server of cleartext HTTP/2, and of HTTP/1.
func serveHTTP2(t testing.TB, handler http.HandlerFunc) netip.AddrPort {
	t.Helper()
	return serveHTTP2By(t, nil, handler)
}

func serveHTTP2By(t testing.TB, config *http.HTTP2Config, handler http.HandlerFunc) netip.AddrPort {
	t.Helper()
	listener, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: handler, Protocols: new(http.Protocols), HTTP2: config}
	server.Protocols.SetUnencryptedHTTP2(true)
	server.Protocols.SetHTTP1(true)
	served := make(chan struct{})
	go func() {
		defer close(served)
		server.Serve(listener)
	}()
	t.Cleanup(func() { server.Close(); <-served })
	return listener.Addr().(*net.TCPAddr).AddrPort()
}

// http2Client is a real client of cleartext HTTP/2.
func http2Client(t testing.TB) *http.Client {
	transport := &http.Transport{Protocols: new(http.Protocols), DisableCompression: true}
	transport.Protocols.SetUnencryptedHTTP2(true)
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport, Timeout: 3 * nettest.Patience}
}

func TestHTTP2RequestsAndResponsesPass(t *testing.T) {
	origin := serveHTTP2(t, func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		w.Header().Set("Trailer", "grpc-status")
		for _, name := range []string{"x-request-id", "x-forwarded-for", "x-forwarded-proto", "x-own"} {
			w.Header().Set("saw-"+name, r.Header.Get(name))
		}
		fmt.Fprintf(w, "%s %s %s: %s", r.Method, r.Host, r.URL, body)
		w.Header().Set("grpc-status", "5")
	})
	r := newRig(t, origin, true)
	client := http2Client(t)
	for i := range 3 {
		response, err := client.Post("http://"+r.address+"/a?b=c", "application/grpc", strings.NewReader("hello"))
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(response.Body)
		response.Body.Close()
		if want := "POST " + r.address + " /a?b=c: hello"; err != nil || string(body) != want {
			t.Fatalf("read %q and %v, want %q", body, err, want)
		}
		if response.Header.Get("saw-x-forwarded-for") != "127.0.0.1" || response.Header.Get("saw-x-forwarded-proto") != "http" ||
			response.Header.Get("x-envoy-upstream-service-time") == "" || response.Trailer.Get("grpc-status") != "5" {
			t.Errorf("fields %v, trailers %v", response.Header, response.Trailer)
		}
		got := r.records.await(t, i)
		want := recorded{
			protocol: flow.HTTP2, method: "POST", path: "/a?b=c", authority: r.address, id: response.Header.Get("saw-x-request-id"),
			grpc: "5", status: 200, details: "via_upstream", received: 5, sent: uint64(len(body)), reason: flow.Completed, attempts: 1,
		}
		if got != want || len(got.id) != uuidLength {
			t.Errorf("the record is %+v, want %+v", got, want)
		}
	}
}

// The last hop of several lines is the last line's.
func TestForwardedForInSeveralLinesIsRecordedAsOneList(t *testing.T) {
	for _, two := range []bool{false, true} {
		r := newRig(t, serveHTTP2(t, func(http.ResponseWriter, *http.Request) {}), two)
		client := http2Client(t)
		protocols := client.Transport.(*http.Transport).Protocols
		protocols.SetUnencryptedHTTP2(two)
		protocols.SetHTTP1(!two)
		for i, lines := range [][]string{{"203.0.113.9"}, {"203.0.113.9, 198.51.100.1", "192.0.2.1", "192.0.2.2"}, nil} {
			request, err := http.NewRequest("GET", "http://"+r.address, nil)
			if err != nil {
				t.Fatal(err)
			}
			request.Header["X-Forwarded-For"] = lines
			response, err := client.Do(request)
			if err != nil {
				t.Fatal(err)
			}
			response.Body.Close()
			if got, want := r.records.await(t, i).forwardedFor, strings.Join(lines, ","); got != want {
				t.Errorf("HTTP/2 %v: told %q, want %q", two, got, want)
			}
		}
	}
}

// The bytes of a relay are visible in the table of open connections.
func TestTheBytesOfARelayInPlaceOfHTTP2ShowWhileItIsOpen(t *testing.T) {
	o := newOrigin(t)
	r := newRig(t, o.address, true)
	conn := r.dial(t)
	client := newSpeaker(t, conn)
	send(t, conn, http2.Preface)
	client.sends("SETTINGS")
	server := o.accept()
	const settings = 9 + 2*6 // ours are longer than the client's
	if _, err := io.CopyN(io.Discard, server, int64(len(http2.Preface)+settings)); err != nil {
		t.Fatal(err)
	}
	send(t, server, "not HTTP/2 at all")
	expect(t, conn, "not HTTP/2 at all")
	send(t, conn, "nor is this")
	expect(t, server, "nor is this")
	record := r.last.Load()
	want := uint64(len(http2.Preface) + settings + len("nor is this"))
	nettest.Eventually(t, "the bytes to be counted", func() bool {
		return record.Received.Load() == want && record.Sent.Load() == uint64(len("not HTTP/2 at all"))
	})
	server.Close()
	conn.Close()
	if got := r.records.await(t, 0); got.received != want || got.sent != uint64(len("not HTTP/2 at all")) {
		t.Errorf("the record is %+v, want %d received", got, want)
	}
}

func TestHTTP2StreamsBothWaysAtOnce(t *testing.T) {
	origin := serveHTTP2(t, func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(200)
		flush := http.NewResponseController(w)
		flush.Flush()
		buf := make([]byte, 100)
		for {
			n, err := r.Body.Read(buf)
			if n > 0 {
				w.Write(bytes.ToUpper(buf[:n]))
				flush.Flush()
			}
			if err != nil {
				return
			}
		}
	})
	r := newRig(t, origin, true)
	body, send := io.Pipe()
	response, err := http2Client(t).Post("http://"+r.address+"/", "text/plain", body)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	for i := range 100 {
		fmt.Fprintf(send, "line %d\n", i)
		expect(t, response.Body, fmt.Sprintf("LINE %d\n", i))
	}
	send.Close()
	if rest, err := io.ReadAll(response.Body); len(rest) > 0 || err != nil {
		t.Errorf("read %q and %v, want the end", rest, err)
	}
}

func TestHTTP2CarriesBulkBothWays(t *testing.T) {
	const size = 64 << 20
	origin := serveHTTP2(t, func(w http.ResponseWriter, r *http.Request) {
		hash := sha256.New()
		io.Copy(io.MultiWriter(w, hash), r.Body) // an echo while it comes
		w.Header().Set(http.TrailerPrefix+"hash", fmt.Sprintf("%x", hash.Sum(nil)))
	})
	r := newRig(t, origin, true)
	sent, echoed := sha256.New(), sha256.New()
	source := io.TeeReader(io.LimitReader(rand.NewChaCha8([32]byte{1}), size), sent)
	response, err := http2Client(t).Post("http://"+r.address+"/", "text/plain", source)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	n, err := io.Copy(echoed, response.Body)
	if err != nil || n != size {
		t.Fatalf("read %d bytes and %v", n, err)
	}
	want := fmt.Sprintf("%x", sent.Sum(nil))
	if got := fmt.Sprintf("%x", echoed.Sum(nil)); got != want || response.Trailer.Get("hash") != want {
		t.Errorf("sent %s, upstream got %s, and the client %s", want, response.Trailer.Get("hash"), got)
	}
	if got := r.records.await(t, 0); got.received != size || got.sent != size || got.reason != flow.Completed {
		t.Errorf("the record is %+v", got)
	}
}

func TestAnUnreadHTTP2StreamDoesNotBlockOthers(t *testing.T) {
	origin := serveHTTP2(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/large" {
			io.Copy(w, io.LimitReader(rand.NewChaCha8([32]byte{}), 6<<20)) // more than a stream's window, less than the connection's
			return
		}
		io.WriteString(w, "small")
	})
	r := newRig(t, origin, true)
	client := http2Client(t)
	large, err := client.Get("http://" + r.address + "/large")
	if err != nil {
		t.Fatal(err)
	}
	defer large.Body.Close()
	for range 200 {
		small, err := client.Get("http://" + r.address + "/small")
		if err != nil {
			t.Fatal(err)
		}
		expect(t, small.Body, "small")
		small.Body.Close()
	}
	if n, err := io.Copy(io.Discard, large.Body); n != 6<<20 || err != nil {
		t.Errorf("read %d bytes of the large response, and %v", n, err)
	}
}

func TestManyHTTP2StreamsAtOnce(t *testing.T) {
	origin := serveHTTP2(t, func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		w.Write(append(body, r.URL.Path...))
	})
	r := newRig(t, origin, true)
	client := http2Client(t)
	var clients sync.WaitGroup
	for i := range 32 {
		clients.Go(func() {
			random := rand.New(rand.NewPCG(1, uint64(i)))
			for j := range 20 {
				body := bytes.Repeat([]byte{byte(i)}, random.IntN(100<<10))
				path := fmt.Sprintf("/%d/%d", i, j)
				response, err := client.Post("http://"+r.address+path, "x/y", bytes.NewReader(body))
				if err != nil {
					t.Error(err)
					return
				}
				got, err := io.ReadAll(response.Body)
				response.Body.Close()
				if err != nil || !bytes.Equal(got, append(body, path...)) {
					t.Errorf("%s: read %d bytes and %v", path, len(got), err)
				}
			}
		})
	}
	clients.Wait()
	if n := r.records.count(); n > 640 {
		t.Errorf("%d records of 640 requests", n)
	}
	r.records.await(t, 639)
}

func TestAnHTTP2ClientThatLeavesIsNoticedUpstream(t *testing.T) {
	left := make(chan error, 1)
	origin := serveHTTP2(t, func(w http.ResponseWriter, r *http.Request) {
		http.NewResponseController(w).Flush()
		<-r.Context().Done()
		left <- r.Context().Err()
	})
	r := newRig(t, origin, true)
	response, err := http2Client(t).Get("http://" + r.address + "/")
	if err != nil {
		t.Fatal(err)
	}
	response.Body.Close()
	select {
	case <-left:
	case <-time.After(nettest.Patience):
		t.Fatal("upstream did not notice")
	}
	if got := r.records.await(t, 0); got.reason != flow.DownstreamLeft || got.flags != "DC" || got.status != 200 {
		t.Errorf("the record is %+v", got)
	}
}

func TestARealHTTP2ClientGetsAReplyIfUpstreamCannotBeReached(t *testing.T) {
	for _, c := range []struct {
		balanced bool
		flags    string
		attempts uint8
	}{{false, "UF", 1}, {true, "UF,URX", 3}} {
		t.Run("with "+c.flags, func(t *testing.T) {
			r := newRig(t, nettest.Refusing(t), true)
			r.set(func() { r.balanced = c.balanced })
			askUnreachable(t, r, c.balanced)
			n := 0
			for r.records.await(t, n).method != "POST" { // each came on a connection of its own, whose record may be late
				n++
			}
			if got := r.records.await(t, n); got.reason != flow.UpstreamRefused || got.flags != c.flags || got.grpc != "14" ||
				got.attempts != c.attempts {
				t.Errorf("the record is %+v", got)
			}
		})
	}
}

// askUnreachable sends requests whose upstream refuses connections.
func askUnreachable(t *testing.T, r *rig, retried bool) {
	client := http2Client(t)
	for range 3 { // each time upstream is dialled again
		response, err := client.Get("http://" + r.address + "/")
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(response.Body)
		response.Body.Close()
		want := dialReply(syscall.ECONNREFUSED, retried)
		if response.StatusCode != 503 || err != nil || string(body) != want.body {
			t.Errorf("%s, %q and %v", response.Status, body, err)
		}
	}
	response, err := client.Post("http://"+r.address+"/", "application/grpc+proto", strings.NewReader("hello"))
	if err != nil {
		t.Fatal(err)
	}
	response.Body.Close()
	if response.StatusCode != 200 || response.Header.Get("grpc-status") != "14" || response.Header.Get("grpc-message") == "" {
		t.Errorf("%s, %v", response.Status, response.Header)
	}
}

// An attempt is a dial, or the use of a connection that is open.
func TestARecordCountsAttempts(t *testing.T) {
	for _, http2 := range []bool{false, true} {
		origin := serveLayered(t, false, func(http.ResponseWriter, *http.Request) {})
		r := newRig(t, origin, http2)
		client := layeredClient(t, http2, false)
		for n := range 2 {
			response, err := client.Get("http://" + r.address + "/")
			if err != nil {
				t.Fatal(err)
			}
			response.Body.Close()
			if got := r.records.await(t, n); got.attempts != 1 {
				t.Errorf("HTTP/2 %v: request %d has %d attempts", http2, n, got.attempts)
			}
		}
	}
}

// The input of a client that floods is not read any more. One that only exceeds a size may not have finished, and is to read
// the reason.
func TestOnlyTooManyFramesAreAFlood(t *testing.T) {
	r := newRig(t, newOrigin(t).address, true)
	for text, c := range map[string]struct {
		cause func(*lane) error
		flood bool
	}{
		"header block too large": {func(l *lane) error {
			l.frameLimit = 1 << 20
			return l.check(http2.Header{Type: http2.Headers, Stream: 1, Length: 1 << 20})
		}, false},
		"frame too large": {func(l *lane) error {
			l.frameLimit = 1 << 20
			return l.check(http2.Header{Type: http2.GoAway, Length: 1 << 20})
		}, false},
		"frames that carry nothing": {func(l *lane) (err error) {
			l.idleFrames = bucket{}
			return l.idleFrame()
		}, true},
		"too many CONTINUATION frames": {func(l *lane) (err error) {
			l.block.continuations = maxContinuations
			return l.block.continuation(http2.Header{}, nil, l)
		}, true},
	} {
		m := &multiplex{engine: r.engine, settings: r.engine.settings.Load()}
		m.clock = time.Now()
		m.Record = flow.Open(flow.Inbound, netip.MustParseAddrPort("203.0.113.7:40000"))
		m.toUp.init(m, &m.toDown)
		m.toDown.init(m, &m.toUp)
		m.toUp.settingsSent = true
		err := c.cause(&m.toUp)
		if err == nil || !strings.Contains(err.Error(), text) {
			t.Fatalf("%s: %v", text, err)
		}
		if m.fail(&m.toUp, err); m.flooded != c.flood {
			t.Errorf("%s: flooded = %t", text, m.flooded)
		}
		m.toUp.release()
		m.toDown.release()
	}
}
