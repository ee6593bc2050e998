package httpforward

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/netip"
	"net/textproto"
	"strings"
	"sync"
	"testing"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/internal/route"
	"github.com/pillion-proxy/pillion/internal/upstream"
)

// direction is one way of translating: from a client's protocol to a server's.
type direction struct {
	name   string
	client func(testing.TB) *http.Client
	major  int // of the protocol that the server sees
	rig    func(testing.TB, netip.AddrPort, Router, ...func(*Config)) *rig
}

func directions() []direction {
	return []direction{
		{"HTTP/1 to HTTP/2", http1Client, 2, func(t testing.TB, o netip.AddrPort, by Router, configure ...func(*Config)) *rig {
			r := newRig(t, o, false, configure...)
			r.set(func() { r.router = by })
			return r
		}},
		{"HTTP/2 to HTTP/1", http2Client, 1, newHub},
	}
}

func http1Client(t testing.TB) *http.Client {
	transport := &http.Transport{DisableCompression: true, MaxIdleConnsPerHost: 100}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport, Timeout: 3 * nettest.Patience}
}

// translating sends all requests to a server of the other protocol.
func translating(to netip.AddrPort) Router {
	return &planned{decide: func(_ *Request, d *Decision) { d.Target, d.Translate = upstream.Target{Address: to}, true }}
}

// The fields that the engine, a route and the certificate of a peer add are sent in either protocol.
func TestTranslatedRequestsHaveTheFieldsThatAreAdded(t *testing.T) {
	edits := mesh.HeaderEdits{Add: []mesh.HeaderEdit{{Name: "x-added", Value: "by the route", Action: mesh.OverwriteOrAdd}}}
	for _, way := range directions() {
		for _, plan := range []*route.Plan{nil, planOf(t, mesh.Forward{}, mesh.Edits{Request: edits})} {
			origin := serveHTTP2(t, func(w http.ResponseWriter, r *http.Request) {
				id := r.Header.Get("x-request-id")
				fmt.Fprintf(w, "%d %q %q", len(id), r.Header["X-Added"], r.Header["X-Forwarded-Client-Cert"])
			})
			r := way.rig(t, origin, &planned{decide: func(_ *Request, d *Decision) {
				d.Target, d.Translate, d.Plan = upstream.Target{Address: origin}, true, plan
			}})
			r.set(func() { r.peers = &PeerFields{ClientCert: AppendClientCert, Element: "Hash=own"} })
			request, err := http.NewRequest(http.MethodGet, "http://"+r.address+"/", nil)
			if err != nil {
				t.Fatal(err)
			}
			request.Header.Set("x-forwarded-client-cert", "Hash=before")
			response, err := way.client(t).Do(request)
			if err != nil {
				t.Fatal(err)
			}
			got, err := io.ReadAll(response.Body)
			response.Body.Close()
			want := `36 [] ["Hash=before,Hash=own"]`
			if plan != nil {
				want = `36 ["by the route"] ["Hash=before,Hash=own"]`
			}
			if err != nil || string(got) != want {
				t.Errorf("%s: the server saw %s, %v, want %s", way.name, got, err, want)
			}
		}
	}
}

func TestMessagesAreTranslated(t *testing.T) {
	for _, way := range directions() {
		t.Run(way.name, func(t *testing.T) {
			origin := serveHTTP2(t, func(w http.ResponseWriter, r *http.Request) {
				body, _ := io.ReadAll(r.Body)
				w.Header().Set("saw", fmt.Sprintf("%d %s %s %s %q %v", r.ProtoMajor, r.Method, r.Host, r.URL, body, r.Trailer))
				w.Header().Set("saw-te", r.Header.Get("te"))
				w.Header().Set("saw-x-own", r.Header.Get("x-own"))
				w.Header().Set("saw-x-forwarded-for", r.Header.Get("x-forwarded-for"))
				w.Header().Add("set-cookie", "a=1")
				w.Header().Add("set-cookie", "b=2")
				switch r.URL.Path {
				case "/hints":
					w.Header().Set("link", "</a>")
					w.WriteHeader(http.StatusEarlyHints)
				case "/nothing":
					w.WriteHeader(http.StatusNoContent)
					return
				case "/same":
					w.WriteHeader(http.StatusNotModified)
					return
				case "/sized":
					w.Header().Set("content-length", "5")
					io.WriteString(w, "sized")
					return
				case "/empty":
					return
				}
				w.Header().Set("Trailer", "x-end")
				io.WriteString(w, "some ")
				http.NewResponseController(w).Flush()
				io.WriteString(w, "text")
				w.Header().Set("x-end", "of it")
			})
			r := way.rig(t, origin, translating(origin))
			client := way.client(t)
			for i, c := range []struct {
				method, path, body string
				chunked, trailers  bool
				status             int
				want, end          string
				length             int64
			}{
				{method: "GET", path: "/", status: 200, want: "some text", end: "of it", length: -1},
				{method: "GET", path: "/a?b=c%20d", status: 200, want: "some text", end: "of it", length: -1},
				{method: "HEAD", path: "/", status: 200, length: -1},
				{method: "HEAD", path: "/sized", status: 200, length: 5},
				{method: "POST", path: "/sized", body: "sent", status: 200, want: "sized", length: 5},
				{method: "POST", path: "/", body: "sent", chunked: true, status: 200, want: "some text", end: "of it", length: -1},
				{method: "PUT", path: "/", body: "sent", chunked: true, trailers: true, status: 200, want: "some text", end: "of it", length: -1},
				{method: "POST", path: "/empty", status: 200, length: 0},
				{method: "GET", path: "/nothing", status: 204},
				{method: "GET", path: "/same", status: 304},
				{method: "GET", path: "/hints", status: 200, want: "some text", end: "of it", length: -1},
			} {
				var body io.Reader
				if c.body != "" {
					body = strings.NewReader(c.body)
				}
				if c.chunked {
					body = io.MultiReader(body) // hides its length
				}
				request, err := http.NewRequest(c.method, "http://"+r.address+c.path, body)
				if err != nil {
					t.Fatal(err)
				}
				request.Header.Set("X-Own", "Value")
				trailer := "map[]"
				if c.trailers {
					request.Trailer = http.Header{"X-After": {"all"}}
					trailer = "map[X-After:[all]]"
				}
				hints := 0
				request = request.WithContext(httptrace.WithClientTrace(request.Context(), &httptrace.ClientTrace{
					Got1xxResponse: func(code int, h textproto.MIMEHeader) error {
						if hints++; code != 103 || h.Get("link") != "</a>" {
							t.Errorf("%s: interim response %d %v", c.path, code, h)
						}
						return nil
					}}))
				response, err := client.Do(request)
				if err != nil {
					t.Fatalf("%s %s: %v", c.method, c.path, err)
				}
				got, err := io.ReadAll(response.Body)
				response.Body.Close()
				saw := fmt.Sprintf("%d %s %s %s %q %s", way.major, c.method, r.address, c.path, c.body, trailer)
				if err != nil || response.StatusCode != c.status || string(got) != c.want || response.Header.Get("saw") != saw {
					t.Errorf("%s %s: %d %q %v, server saw %s, want %s", c.method, c.path, response.StatusCode, got, err, response.Header.Get("saw"), saw)
				}
				if c.status == 200 && response.ContentLength != c.length {
					t.Errorf("%s %s: length %d, want %d", c.method, c.path, response.ContentLength, c.length)
				}
				if response.Trailer.Get("x-end") != c.end {
					t.Errorf("%s %s: trailers %v", c.method, c.path, response.Trailer)
				}
				if h := response.Header; h.Get("saw-x-own") != "Value" || h.Get("saw-x-forwarded-for") != "127.0.0.1" || len(h["Set-Cookie"]) != 2 {
					t.Errorf("%s %s: fields %v", c.method, c.path, h)
				}
				if want := c.path == "/hints"; (hints == 1) != want {
					t.Errorf("%s: %d interim responses", c.path, hints)
				}
				record := r.records.await(t, i)
				if record.reason != flow.Completed || record.status != c.status || record.received != uint64(len(c.body)) || record.sent < uint64(len(c.want)) {
					t.Errorf("%s %s: record %+v", c.method, c.path, record)
				}
			}
		})
	}
}

// Bodies of any length pass in both directions at the same time, and connections are used again.
func TestTranslatedBodiesArriveUnchanged(t *testing.T) {
	for _, way := range directions() {
		t.Run(way.name, func(t *testing.T) {
			origin := serveHTTP2(t, func(w http.ResponseWriter, r *http.Request) {
				http.NewResponseController(w).EnableFullDuplex()
				buf := make([]byte, 30_000)
				for {
					n, err := r.Body.Read(buf)
					w.Write(buf[:n])
					if err != nil {
						return
					}
				}
			})
			r := way.rig(t, origin, translating(origin))
			client := way.client(t)
			var streams sync.WaitGroup
			for i := range 48 {
				streams.Go(func() {
					random := rand.NewChaCha8([32]byte{byte(i)})
					size := int64(1)<<(i%21) + int64(i%3)
					sent := sha256.New()
					body := io.TeeReader(io.LimitReader(random, size), sent)
					request, _ := http.NewRequest("POST", "http://"+r.address+"/", body)
					if i%2 == 0 {
						request.ContentLength = size
					}
					response, err := client.Do(request)
					if err != nil {
						t.Errorf("stream %d of %d bytes: %v", i, size, err)
						return
					}
					defer response.Body.Close()
					got := sha256.New()
					n, err := io.Copy(got, response.Body)
					if err != nil || n != size || !bytes.Equal(got.Sum(nil), sent.Sum(nil)) {
						t.Errorf("stream %d: %d of %d bytes, %v", i, n, size, err)
					}
				})
			}
			streams.Wait()
			for i := range 48 {
				if got := r.records.await(t, i); got.reason != flow.Completed {
					t.Errorf("record %+v", got)
				}
			}
		})
	}
}

// A connection carries one translated request after the other.
func TestConnectionsOfTranslatedRequestsAreReused(t *testing.T) {
	for _, way := range directions() {
		t.Run(way.name, func(t *testing.T) {
			var conns sync.Map
			origin := serveHTTP2(t, func(w http.ResponseWriter, r *http.Request) {
				conns.Store(r.RemoteAddr, true)
				io.Copy(io.Discard, r.Body)
				fmt.Fprint(w, "ok")
			})
			r := way.rig(t, origin, translating(origin))
			client := way.client(t)
			for i := range 20 {
				response, err := client.Post("http://"+r.address+"/", "text/plain", strings.NewReader("x"))
				if err != nil {
					t.Fatal(err)
				}
				io.Copy(io.Discard, response.Body)
				response.Body.Close()
				r.records.await(t, i)
			}
			count := 0
			conns.Range(func(any, any) bool { count++; return true })
			if count != 1 {
				t.Errorf("20 requests took %d connections", count)
			}
		})
	}
}

// What a request of HTTP/2 becomes is one request of HTTP/1, whatever its fields are.
func TestRequestsOfHTTP2AsHTTP1(t *testing.T) {
	for name, c := range map[string]struct{ sends, want string }{
		"cookies are joined":       {"HEADERS 1 end :method=GET :scheme=http :path=/ :authority=a cookie=x=1 accept=b cookie=y=2", "GET / HTTP/1.1\r\nhost: a\r\naccept: b\r\ncookie: x=1; y=2\r\n\r\n"},
		"host in the place of it":  {"HEADERS 1 end :method=GET :scheme=http :path=/ host=a", "GET / HTTP/1.1\r\nhost: a\r\n\r\n"},
		"trailers are announced":   {"HEADERS 1 end :method=GET :scheme=http :path=/ :authority=a te=trailers", "GET / HTTP/1.1\r\nhost: a\r\nconnection: te\r\nte: trailers\r\n\r\n"},
		"a post without a body":    {"HEADERS 1 end :method=POST :scheme=http :path=/ :authority=a", "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 0\r\n\r\n"},
		"a body without a length":  {"HEADERS 1 :method=POST :scheme=http :path=/ :authority=a", "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n"},
		"a body with a length":     {"HEADERS 1 :method=POST :scheme=http :path=/ :authority=a content-length=3", "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 3\r\n\r\n"},
		"all of the server":        {"HEADERS 1 end :method=OPTIONS :scheme=http :path=* :authority=a", "OPTIONS * HTTP/1.1\r\nhost: a\r\n\r\n"},
		"a tunnel":                 {"HEADERS 1 :method=CONNECT :authority=a:1", "CONNECT a:1 HTTP/1.1\r\nhost: a:1\r\n\r\n"},
		"another host in the path": {"HEADERS 1 end :method=GET :scheme=http :path=http://b/ :authority=a", ""},
		"no path":                  {"HEADERS 1 end :method=GET :scheme=http :path=b :authority=a", ""},
		"a path of options":        {"HEADERS 1 end :method=GET :scheme=http :path=* :authority=a", ""},
	} {
		t.Run(name, func(t *testing.T) {
			o := newOrigin(t)
			r := newHub(t, o.address, translating(o.address), plain)
			client := greetHub(t, r, "")
			client.sends(c.sends)
			if c.want == "" {
				if got := client.next(); !strings.HasPrefix(got, "HEADERS 1 :status=400") {
					t.Fatalf("read %q", got)
				}
				if got := r.records.await(t, 0); got.reason != flow.BadFraming || got.flags != "DPE" {
					t.Errorf("the record is %+v", got)
				}
				return
			}
			server := o.accept()
			if got := head(t, bufio.NewReader(server)); got != c.want {
				t.Errorf("sent %q, want %q", got, c.want)
			}
		})
	}
}

// A response of HTTP/1 ends where its framing says, and the connection serves on only if it is certain what follows.
func TestResponsesOfHTTP1AsHTTP2(t *testing.T) {
	for name, c := range map[string]struct {
		response string
		closes   bool // the server closes behind it
		want     []string
		reason   flow.Reason
		again    bool // the next request comes on the same connection
	}{
		"sized":                    {"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nab", false, []string{"HEADERS 1 :status=200 content-length=2", "DATA 1 end ab"}, flow.Completed, true},
		"chunks and trailers":      {"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2;x=y\r\nab\r\n0\r\nX-End: 1\r\n\r\n", false, []string{"HEADERS 1 :status=200", "DATA 1 ab", "HEADERS 1 end x-end=1"}, flow.Completed, true},
		"until the close":          {"HTTP/1.1 200 OK\r\n\r\nab", true, []string{"HEADERS 1 :status=200", "DATA 1 ab", "DATA 1 end"}, flow.Completed, false},
		"with an announced close":  {"HTTP/1.1 200 OK\r\nConnection: close, x-hop\r\nX-Hop: 1\r\nContent-Length: 0\r\n\r\n", false, []string{"HEADERS 1 end :status=200 content-length=0"}, flow.Completed, false},
		"of HTTP/1.0":              {"HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n", false, []string{"HEADERS 1 end :status=200 content-length=0"}, flow.Completed, false},
		"interim ones":             {"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n", false, []string{"HEADERS 1 :status=100", "HEADERS 1 :status=103 link=a", "HEADERS 1 end :status=204"}, flow.Completed, true},
		"cut off":                  {"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nab", true, []string{"HEADERS 1 :status=200 content-length=3", "DATA 1 ab", "RST 1 INTERNAL_ERROR"}, flow.ResponseIncomplete, false},
		"cut off in a chunk":       {"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nab", true, []string{"HEADERS 1 :status=200", "DATA 1 ab", "RST 1 INTERNAL_ERROR"}, flow.ResponseIncomplete, false},
		"two framings":             {"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\nabc", false, []string{"HEADERS 1 :status=502"}, flow.BadResponse, false},
		"an unasked upgrade":       {"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n", false, []string{"HEADERS 1 :status=502"}, flow.BadResponse, false},
		"a bad chunk":              {"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nx\r\n", false, []string{"HEADERS 1 :status=200", "RST 1 INTERNAL_ERROR"}, flow.BadResponse, false},
		"more than one":            {"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", false, []string{"HEADERS 1 end :status=200 content-length=0"}, flow.Completed, false},
		"a length for 304":         {"HTTP/1.1 304 Not Modified\r\nContent-Length: 9\r\n\r\n", false, []string{"HEADERS 1 end :status=304 content-length=9"}, flow.Completed, true},
		"the connection's trailer": {"HTTP/1.1 200 OK\r\nConnection: x-end\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX-End: 1\r\n\r\n", false, []string{"HEADERS 1 :status=200", "RST 1 INTERNAL_ERROR"}, flow.BadResponse, false},
	} {
		t.Run(name, func(t *testing.T) {
			o := newOrigin(t)
			r := newHub(t, o.address, translating(o.address), plain)
			client := greetHub(t, r, "")
			client.sends("GET 1")
			server := o.accept()
			lines := bufio.NewReader(server)
			head(t, lines)
			send(t, server, c.response)
			if c.closes {
				server.Close()
			}
			for _, want := range c.want {
				if got := client.next(); got != want && !(strings.HasSuffix(want, "502") && strings.HasPrefix(got, want)) {
					t.Fatalf("read %q, want %q", got, want)
				}
			}
			if got := r.records.await(t, 0); got.reason != c.reason {
				t.Errorf("the record is %+v", got)
			}
			if strings.HasSuffix(c.want[0], "502") {
				client.next() // the body
			}
			client.sends("HEADERS 3 end :method=GET :scheme=http :path=/next :authority=a")
			if !c.again {
				server = o.accept()
				lines = bufio.NewReader(server)
			}
			if got := head(t, lines); !strings.HasPrefix(got, "GET /next ") {
				t.Fatalf("the server read %q", got)
			}
			send(t, server, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
			client.reads("HEADERS 3 end :status=200 content-length=0")
		})
	}
}

// A server that closes an idle connection at the moment of use costs no request.
func TestAReusedConnectionThatWasClosedCostsNoRequest(t *testing.T) {
	o := newOrigin(t)
	r := newHub(t, o.address, translating(o.address), plain)
	client := greetHub(t, r, "")
	client.sends("GET 1")
	server := o.accept()
	head(t, bufio.NewReader(server))
	send(t, server, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
	client.reads("HEADERS 1 end :status=200 content-length=0")
	client.sends("GET 3")
	head(t, bufio.NewReader(server))
	server.Close()
	server = o.accept()
	head(t, bufio.NewReader(server))
	send(t, server, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
	client.reads("HEADERS 3 end :status=200 content-length=0")
}

// A client that does not read a response holds back that only, and the server is not read from meanwhile.
func TestAStalledTranslatedResponseHoldsBackNoOther(t *testing.T) {
	var sent sync.Map
	origin := serveHTTP2(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/long" {
			fmt.Fprint(w, "short")
			return
		}
		n, _ := io.Copy(w, io.LimitReader(rand.NewChaCha8([32]byte{}), 256<<20))
		sent.Store(n, true)
	})
	r := newHub(t, origin, translating(origin))
	client := http2Client(t)
	var stalled []io.Closer
	for range 4 {
		response, err := client.Get("http://" + r.address + "/long")
		if err != nil {
			t.Fatal(err)
		}
		stalled = append(stalled, response.Body)
	}
	for range 50 {
		response, err := client.Get("http://" + r.address + "/")
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(response.Body)
		response.Body.Close()
		if err != nil || string(body) != "short" {
			t.Fatalf("read %q and %v", body, err)
		}
	}
	sent.Range(func(n, _ any) bool { t.Errorf("a server has sent %d bytes", n); return true })
	for _, body := range stalled {
		body.Close()
	}
	nettest.Eventually(t, "all records", func() bool { return r.records.count() == 54 })
}

// overOrigin accepts a connection that carries HTTP/1 over HTTP/2.
func acceptOver(t *testing.T, o *origin, settings string) *speaker {
	t.Helper()
	server := newSpeaker(t, o.accept())
	expect(t, server.conn, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
	server.reads("SETTINGS 2=0 4=1048576 6=65536")
	server.reads("WINDOW 0 983041")
	server.sends(strings.TrimSpace("SETTINGS " + settings))
	return server
}

func newOver(t *testing.T) (*origin, *rig, net.Conn, *bufio.Reader) {
	o := newOrigin(t)
	r := newRig(t, o.address, false, plain)
	r.set(func() { r.router = translating(o.address) })
	client := r.dial(t)
	return o, r, client, bufio.NewReader(client)
}

// What a request of HTTP/1 becomes in HTTP/2.
func TestRequestsOfHTTP1AsHTTP2(t *testing.T) {
	for name, c := range map[string]struct{ sends, want string }{
		"a get":             {"GET /a?b HTTP/1.1\r\nHost: A\r\nX-Own: b\r\n\r\n", "HEADERS 1 end :method=GET :scheme=http :path=/a?b :authority=A x-own=b"},
		"an absolute form":  {"GET http://a/b?c HTTP/1.1\r\nHost: a\r\n\r\n", "HEADERS 1 end :method=GET :scheme=http :path=/b?c :authority=a"},
		"without a path":    {"GET http://a?c HTTP/1.1\r\nHost: a\r\n\r\n", "HEADERS 1 end :method=GET :scheme=http :path=/?c :authority=a"},
		"all of the server": {"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n", "HEADERS 1 end :method=OPTIONS :scheme=http :path=* :authority=a"},
		"of HTTP/1.0":       {"GET / HTTP/1.0\r\n\r\n", "HEADERS 1 end :method=GET :scheme=http :path=/"},
		"hop-by-hop fields": {"GET / HTTP/1.1\r\nHost: a\r\nConnection: x-hop, te\r\nX-Hop: 1\r\nTE: trailers, gzip\r\nKeep-Alive: 3\r\n\r\n", "HEADERS 1 end :method=GET :scheme=http :path=/ :authority=a te=trailers"},
		"an empty length":   {"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n", "HEADERS 1 end :method=POST :scheme=http :path=/ :authority=a content-length=0"},
		"a tunnel":          {"CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\n\r\n", "HEADERS 1 :method=CONNECT :authority=a:1"},
		"another protocol":  {"GET / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n", "HEADERS 1 end :method=GET :scheme=http :path=/ :authority=a"},
		"a long head":       {"GET / HTTP/1.1\r\nHost: a\r\nX-Long: " + strings.Repeat("long", 6<<10) + "\r\n\r\n", ""},
	} {
		t.Run(name, func(t *testing.T) {
			o, _, client, _ := newOver(t)
			send(t, client, c.sends)
			server := acceptOver(t, o, "")
			if got := server.next(); got != c.want && c.want != "" || c.want == "" && !strings.HasSuffix(got, strings.Repeat("long", 6<<10)) {
				t.Errorf("sent %q, want %q", got, c.want)
			}
		})
	}
}

// The bytes of a body wait for the windows of the server, and it gets credit back.
func TestABodyOverHTTP2WaitsForWindows(t *testing.T) {
	o, r, client, answers := newOver(t)
	send(t, client, "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n6\r\nabcdef\r\n0\r\nX-End: 1\r\n\r\n")
	server := acceptOver(t, o, "4=2")
	server.reads("HEADERS 1 :method=POST :scheme=http :path=/ :authority=a")
	first := server.next()
	if first == "SETTINGS ack" {
		first = server.next()
	}
	if first != "DATA 1 abcdef" { // before our settings were read
		if first != "DATA 1 ab" {
			t.Fatalf("read %q", first)
		}
		server.sends("WINDOW 1 3")
		server.reads("DATA 1 cde")
		server.sends("WINDOW 1 3")
		server.reads("DATA 1 f")
	}
	server.reads("HEADERS 1 end x-end=1")
	server.sends("HEADERS 1 :status=200 a=b")
	server.sends("DATA 1 xyz")
	server.sends("HEADERS 1 end x-after=2")
	if got := head(t, answers); got != "HTTP/1.1 200 OK\r\na: b\r\ntransfer-encoding: chunked\r\n\r\n" {
		t.Errorf("read %q", got)
	}
	expect(t, answers, "3\r\nxyz\r\n0\r\nx-after: 2\r\n\r\n")
	if got := r.records.await(t, 0); got.reason != flow.Completed || got.received != 6 || got.sent != 3 {
		t.Errorf("the record is %+v", got)
	}
}

// A stream that the server resets, or refuses, and a server that goes away.
func TestTheEndOfAStreamOverHTTP2(t *testing.T) {
	for name, c := range map[string]struct {
		frames []string
		want   string
		reason flow.Reason
	}{
		"reset":                   {[]string{"RST 1 INTERNAL_ERROR"}, "HTTP/1.1 503 ", flow.UpstreamReset},
		"refused":                 {[]string{"RST 1 REFUSED_STREAM"}, "HTTP/1.1 503 ", flow.UpstreamReset},
		"not to be served":        {[]string{"GOAWAY 0 NO_ERROR"}, "HTTP/1.1 503 ", flow.UpstreamReset},
		"served before it":        {[]string{"GOAWAY 1 NO_ERROR", "HEADERS 1 end :status=200"}, "HTTP/1.1 200 OK\r\ncontent-length: 0\r\nConnection: close\r\n\r\n", flow.Completed},
		"pushed":                  {[]string{"HEADERS 2 end :status=200"}, "HTTP/1.1 502 ", flow.BadResponse},
		"without a status":        {[]string{"HEADERS 1 end a=b"}, "HTTP/1.1 502 ", flow.BadResponse},
		"a line in a value":       {[]string{"HEADERS 1 end :status=200 a=b\r\nc:d"}, "HTTP/1.1 502 ", flow.BadResponse},
		"of another protocol":     {[]string{"HEADERS 1 end :status=101"}, "HTTP/1.1 502 ", flow.BadResponse},
		"data before the head":    {[]string{"DATA 1 end abc"}, "HTTP/1.1 502 ", flow.BadResponse},
		"shorter than its length": {[]string{"HEADERS 1 end :status=200 content-length=3"}, "", flow.ResponseIncomplete},
		"a window that is raised": {[]string{"WINDOW 1 2147418112", "SETTINGS 4=65536"}, "HTTP/1.1 502 ", flow.BadResponse},
		"the right to push":       {[]string{"SETTINGS 2=1"}, "HTTP/1.1 502 ", flow.BadResponse},
	} {
		t.Run(name, func(t *testing.T) {
			o, r, client, answers := newOver(t)
			send(t, client, "GET / HTTP/1.1\r\nHost: a\r\n\r\n")
			server := acceptOver(t, o, "")
			server.reads("HEADERS 1 end :method=GET :scheme=http :path=/ :authority=a")
			for _, frame := range c.frames {
				server.sends(frame)
			}
			if c.want != "" {
				if got := head(t, answers); !strings.HasPrefix(got, c.want) {
					t.Errorf("read %q", got)
				}
			}
			if got := r.records.await(t, 0); got.reason != c.reason {
				t.Errorf("the record is %+v", got)
			}
		})
	}
}

func TestAWebsocketOverHTTP2(t *testing.T) {
	o, r, client, answers := newOver(t)
	const handshake = "GET /chat HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
	send(t, client, handshake)
	server := acceptOver(t, o, "8=1")
	got := server.next()
	if got == "SETTINGS ack" {
		got = server.next()
	}
	if got != "HEADERS 1 :method=CONNECT :protocol=websocket :scheme=http :path=/chat :authority=a sec-websocket-version=13" {
		t.Fatalf("read %q", got)
	}
	server.sends("HEADERS 1 :status=200")
	if got := head(t, answers); !strings.HasPrefix(got, "HTTP/1.1 101 Switching Protocols\r\n") || !strings.Contains(got, "\r\nsec-websocket-accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n") {
		t.Fatalf("read %q", got)
	}
	send(t, client, "hello")
	server.reads("DATA 1 hello")
	server.sends("DATA 1 world")
	expect(t, answers, "world")
	server.sends("DATA 1 end")
	if _, err := answers.ReadByte(); err != io.EOF {
		t.Errorf("%v behind the end", err)
	}
	client.Close()
	if got := r.records.await(t, 0); !got.upgraded {
		t.Errorf("the record is %+v", got)
	}
}
