package e2e

import (
	"context"
	"io"
	"log"
	"net"
	"net/http"
	"net/netip"
	"sync/atomic"
	"testing"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

// dialogue is a client and a server of package net/http that use one version of HTTP along one way.
type dialogue struct {
	way
	http2       bool
	client      *http.Client
	url         string
	connections *atomic.Int64 // that the server has accepted
}

// everyDialogue runs a subtest for HTTP/1 and h2c, inbound and outbound, with the same handler. Each request's client
// address is checked before the handler is called.
func (s *stage) everyDialogue(t *testing.T, handler http.HandlerFunc, test func(t *testing.T, d *dialogue)) {
	for _, http2 := range []bool{false, true} {
		for _, w := range []way{s.inbound(), s.outbound()} {
			name := "HTTP/1 " + w.name
			if http2 {
				name = "h2c " + w.name
			}
			t.Run(name, func(t *testing.T) {
				d := newDialogue(t, w, http2, handler)
				test(t, d)
				nettest.Eventually(t, "the agent logs the connection", func() bool {
					d.client.CloseIdleConnections() // a stream that was given up may need a moment to be gone
					return len(s.agent.log.lines("original_destination="+d.url[len("http://"):])) > 0
				})
			})
		}
	}
}

// newDialogue starts the server and creates the client. The server is closed when the test ends.
func newDialogue(t *testing.T, w way, http2 bool, handler http.HandlerFunc) *dialogue {
	t.Helper()
	listener := w.to.Listen(t, "tcp", netip.AddrPortFrom(w.address, 0).String())
	d := &dialogue{way: w, http2: http2, url: "http://" + listener.Addr().String(), connections: new(atomic.Int64)}
	d.serve(t, listener, handler)
	d.client = w.client(t, http2)
	return d
}

// client returns a client at the way's beginning that uses one version of HTTP. Its connections are closed when the test
// ends.
func (w way) client(t testing.TB, http2 bool) *http.Client {
	transport := &http.Transport{
		Protocols: new(http.Protocols),
		DialContext: func(_ context.Context, network, address string) (net.Conn, error) {
			return w.from.Dial(network, address, nettest.Patience)
		},
		ExpectContinueTimeout: nettest.Patience,
		DisableCompression:    true,
		MaxIdleConnsPerHost:   100,
	}
	transport.Protocols.SetHTTP1(!http2)
	transport.Protocols.SetUnencryptedHTTP2(http2)
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport, Timeout: nettest.Patience}
}

func (d *dialogue) serve(t *testing.T, listener net.Listener, handler http.HandlerFunc) {
	server := &http.Server{
		Protocols: new(http.Protocols),
		ErrorLog:  log.New(io.Discard, "", 0), // some handlers abort on purpose
		ConnState: func(_ net.Conn, state http.ConnState) {
			if state == http.StateNew {
				d.connections.Add(1)
			}
		},
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if seen, err := netip.ParseAddrPort(r.RemoteAddr); err != nil || seen.Addr() != d.seenAs {
				t.Errorf("the server sees %s, want %v", r.RemoteAddr, d.seenAs)
			}
			if r.ProtoMajor == 2 != d.http2 {
				t.Errorf("the server received a request in %s", r.Proto)
			}
			handler(w, r)
		}),
	}
	server.Protocols.SetHTTP1(!d.http2)
	server.Protocols.SetUnencryptedHTTP2(d.http2)
	done := make(chan struct{})
	go func() {
		server.Serve(listener)
		close(done)
	}()
	t.Cleanup(func() {
		server.Close()
		<-done
	})
}

// request returns a request for path.
func (d *dialogue) request(t testing.TB, method, path string, body io.Reader) *http.Request {
	t.Helper()
	request, err := http.NewRequestWithContext(t.Context(), method, d.url+path, body)
	if err != nil {
		t.Fatal(err)
	}
	return request
}

// do sends the request and returns the response. The caller must read its body.
func (d *dialogue) do(t testing.TB, request *http.Request) *http.Response {
	t.Helper()
	response, err := d.client.Do(request)
	if err != nil {
		t.Fatalf("%s %s: %v", request.Method, request.URL.Path, err)
	}
	t.Cleanup(func() { response.Body.Close() })
	return response
}

// text reads the rest of a response's body and releases its connection.
func text(t testing.TB, response *http.Response) string {
	t.Helper()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatalf("reading the body: %v", err)
	}
	response.Body.Close()
	return string(body)
}
