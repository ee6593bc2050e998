package httpforward

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/internal/tcp"
	"github.com/pillion-proxy/pillion/internal/tcp/layertest"
	"github.com/pillion-proxy/pillion/internal/upstream"
)

// layers runs a test over both protocols, with a record layer under down, under up, and under both.
func layers(t *testing.T, test func(t *testing.T, http2, down, up bool)) {
	for _, http2 := range []bool{false, true} {
		for name, c := range map[string]struct{ down, up bool }{"down": {true, false}, "up": {false, true}, "both": {true, true}} {
			t.Run(fmt.Sprintf("HTTP/2 %v, %s layered", http2, name), func(t *testing.T) { test(t, http2, c.down, c.up) })
		}
	}
}

// newLayeredRig is a rig whose connections have record layers.
func newLayeredRig(t *testing.T, origin netip.AddrPort, http2, down, up bool) *rig {
	r := newRig(t, origin, http2)
	r.set(func() {
		if r.layered = down; up {
			r.security = &upstream.Security{Handshake: func(_ *tcp.Waiter, c *tcp.Conn, _ time.Time) error {
				layertest.Under(c, nil)
				return nil
			}}
		}
	})
	return r
}

// serveLayered starts a real server behind a record layer, or a bare one.
func serveLayered(t *testing.T, layered bool, handler http.HandlerFunc) netip.AddrPort {
	t.Helper()
	listener, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := listener.Addr().(*net.TCPAddr).AddrPort()
	if layered {
		listener = layertest.Listener{Listener: listener}
	}
	server := &http.Server{Handler: handler, Protocols: new(http.Protocols)}
	server.Protocols.SetUnencryptedHTTP2(true)
	server.Protocols.SetHTTP1(true)
	served := make(chan struct{})
	go func() {
		defer close(served)
		server.Serve(listener)
	}()
	t.Cleanup(func() { server.Close(); <-served })
	return address
}

// layeredClient is a real client behind a record layer, or a bare one. Its records are larger than the engines' buffers.
func layeredClient(t *testing.T, http2, layered bool) *http.Client {
	transport := &http.Transport{Protocols: new(http.Protocols), DisableCompression: true, MaxConnsPerHost: 2}
	transport.Protocols.SetUnencryptedHTTP2(http2)
	transport.Protocols.SetHTTP1(!http2)
	transport.DialContext = func(ctx context.Context, network, address string) (net.Conn, error) {
		conn, err := new(net.Dialer).DialContext(ctx, network, address)
		if err != nil || !layered {
			return conn, err
		}
		return &layertest.Peer{TCPConn: conn.(*net.TCPConn), Record: 50_000}, nil
	}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport, Timeout: 3 * nettest.Patience}
}

func TestRequestsAndResponsesPassUnderARecordLayer(t *testing.T) {
	layers(t, func(t *testing.T, http2, down, up bool) {
		origin := serveLayered(t, up, func(w http.ResponseWriter, r *http.Request) {
			body, err := io.ReadAll(r.Body)
			if err != nil {
				t.Errorf("the server reads %v", err)
			}
			w.Header().Set("Sum", fmt.Sprintf("%x", sha256.Sum256(body)))
			w.Write(body)
		})
		r := newLayeredRig(t, origin, http2, down, up)
		client := layeredClient(t, http2, down)
		var all sync.WaitGroup
		for range 2 {
			all.Go(func() {
				for _, size := range []int{0, 1, 5000, 16 << 10, 40_000, 3 << 20, 10} {
					body := bytes.Repeat([]byte("body"), size/4+1)[:size]
					response, err := client.Post("http://"+r.address+"/", "text/plain", bytes.NewReader(body))
					if err != nil {
						t.Errorf("%d bytes: %v", size, err)
						return
					}
					got, err := io.ReadAll(response.Body)
					response.Body.Close()
					if err != nil || !bytes.Equal(got, body) || response.Header.Get("Sum") != fmt.Sprintf("%x", sha256.Sum256(body)) {
						t.Errorf("%d bytes: %d came back, %v", size, len(got), err)
					}
				}
			})
		}
		all.Wait()
	})
}

// A response that ends with its connection is complete only if the layer's close message has come.
func TestATruncatedResponseIsNotComplete(t *testing.T) {
	for name, complete := range map[string]bool{"close message": true, "FIN alone": false} {
		for _, down := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, down layered %v", name, down), func(t *testing.T) {
				o := newOrigin(t)
				r := newLayeredRig(t, o.address, false, down, true)
				var client net.Conn = r.dial(t)
				if down {
					client = &layertest.Peer{TCPConn: client.(*net.TCPConn)}
				}
				send(t, client, "GET / HTTP/1.1\r\nHost: a\r\n\r\n")
				server := &layertest.Peer{TCPConn: o.accept()}
				head(t, bufio.NewReader(server))
				send(t, server, "HTTP/1.1 200 OK\r\n\r\nall there is")
				if complete {
					server.CloseWrite()
				} else {
					server.Truncate()
				}
				response, err := http.ReadResponse(bufio.NewReader(client), nil)
				var body []byte
				if err == nil {
					body, err = io.ReadAll(response.Body)
				}
				if (err == nil) != complete || complete && string(body) != "all there is" {
					t.Errorf("the client reads %q, %v", body, err)
				}
			})
		}
	}
}

// The last bytes of a response may be unsent when the engine closes. The client reads slowly, and reads all.
func TestAResponseBehindWhichTheConnectionClosesArrivesWhole(t *testing.T) {
	want := strings.Repeat("response ", 1<<20)
	origin := serveLayered(t, false, func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, want) })
	r := newLayeredRig(t, origin, false, true, false)
	client := &layertest.Peer{TCPConn: r.dial(t)}
	send(t, client, "GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
	response, err := http.ReadResponse(bufio.NewReader(client), nil)
	if err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(response.Body)
	if err != nil || string(got) != want {
		t.Errorf("%d of %d bytes arrived, %v", len(got), len(want), err)
	}
	if _, err := client.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("behind the response: %v", err)
	}
}

// A session ticket between two requests does not count as bytes of an unsolicited response.
func TestAnUpstreamConnectionWithATicketServesTheNextRequest(t *testing.T) {
	o := newOrigin(t)
	r := newLayeredRig(t, o.address, false, false, true)
	client := r.dial(t)
	send(t, client, "GET / HTTP/1.1\r\nHost: a\r\n\r\n")
	server := &layertest.Peer{TCPConn: o.accept()}
	in, responses := bufio.NewReader(server), bufio.NewReader(client)
	for range 3 {
		head(t, in)
		send(t, server, ok("x"))
		server.Ticket()
		if response, err := http.ReadResponse(responses, nil); err != nil || response.StatusCode != 200 {
			t.Fatalf("%v, %v", response, err)
		} else if _, err := io.ReadAll(response.Body); err != nil {
			t.Fatal(err)
		}
		send(t, client, "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n")
	}
	head(t, in) // on the same connection
}
