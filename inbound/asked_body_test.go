package inbound

import (
	"bytes"
	"context"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/internal/wire"
)

// bodySeen returns the body in a CheckRequest, and whether it is bytes.
func bodySeen(request string) (body string, raw bool) {
	var err error
	field := func(b []byte, number int) (found []byte) {
		for m := wire.Read(b, &err); m.Next(); {
			if m.Number == number {
				found = bytes.Clone(m.Bytes())
			}
		}
		return found
	}
	attributes := field(field(field([]byte(request), 1), 4), 2)
	if b := field(attributes, 12); b != nil {
		return string(b), true
	}
	return string(field(attributes, 11)), false
}

// A server that decides by gRPC sees the bodies of inbound requests as text or bytes, over both versions of HTTP. A connection of
// HTTP/2 that began before it is asked cannot keep bodies: the client is sent to another connection.
func TestAServerSeesBodiesByGRPC(t *testing.T) {
	const mode = "STRICT, HTTP"
	m := newMeshRig(t, mode)
	var raw, wrong atomic.Int32
	at := checker(t, func(request string) []byte {
		body, inBytes := bodySeen(request)
		if inBytes {
			raw.Add(1)
		}
		if body == "a \xff body" || !inBytes && body == "a ! body" {
			return checked(codeOK, 0, nil)
		}
		wrong.Add(1)
		return checked(codePermissionDenied, 0, nil)
	})
	m.configure(t, mode, nil, nil, nil)
	var conns []net.Conn
	for range 3 {
		conn, err := m.handshake(t, m.Dial(t, m.At(81)), m.client, "istio-h2", "istio", "h2")
		if err != nil {
			t.Fatal(err)
		}
		conns = append(conns, conn)
	}
	dialled := 0
	var protocols http.Protocols
	protocols.SetUnencryptedHTTP2(true)
	transport := &http.Transport{Protocols: &protocols, DialContext: func(context.Context, string, string) (net.Conn, error) {
		dialled++
		return conns[dialled-1], nil
	}}
	client := &http.Client{Transport: transport, Timeout: nettest.Patience}
	post := func(body string) int {
		t.Helper()
		request, err := http.NewRequest("POST", "http://shop.example/admin", strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		response, err := client.Do(request)
		if err != nil {
			t.Fatal(err)
		}
		response.Body.Close()
		return response.StatusCode
	}
	if status := post("before"); status != 200 || dialled != 1 {
		t.Fatalf("before anything is asked: %d over %d connections", status, dialled)
	}
	m.Await(t)
	for _, inBytes := range []bool{false, true} {
		raw.Store(0)
		m.configure(t, mode, custom(&mesh.ExtAuthz{
			Body: &mesh.AuthzBody{MaxBytes: 10, Raw: inBytes}, GRPC: &mesh.GRPCService{Cluster: "checker", Timeout: nettest.Patience},
		}), nil, map[string]netip.AddrPort{"checker": at})
		if status := post("a \xff body"); status != 200 {
			t.Errorf("bytes %v: an allowed body: %d", inBytes, status)
		}
		reasons := map[flow.Reason]int{m.Await(t).Reason: 1}
		if !inBytes { // of two connections, in any order
			reasons[m.Await(t).Reason]++
		}
		if reasons[flow.Completed] != 1 || dialled != 2 || len(reasons) == 2 != !inBytes || !inBytes && reasons[flow.PolicyDenied] != 1 {
			t.Errorf("bytes %v: %v, with %d connections", inBytes, reasons, dialled)
		}
		for body, want := range map[string]int{"another": 403, "a long body": 413} {
			if status := post(body); status != want {
				t.Errorf("bytes %v, %q: %d, want %d", inBytes, body, status, want)
			}
			if got := m.Await(t); got.Reason != flow.PolicyDenied {
				t.Errorf("bytes %v, %q: %v", inBytes, body, got.Reason)
			}
		}
		c := m.connect(t, 81)
		c.SetDeadline(time.Now().Add(nettest.Patience))
		response, _ := c.ask(t, "/admin", "Content-Length: 8\r\n\r\na \xff body")
		if got := m.Await(t); response.StatusCode != 200 || got.Reason != flow.Completed {
			t.Errorf("bytes %v over HTTP/1: %d, %v", inBytes, response.StatusCode, got.Reason)
		}
		c.Close()
		if n := raw.Load(); (n == 3) != inBytes {
			t.Errorf("bytes %v: of 3 bodies %d came as bytes", inBytes, n)
		}
	}
	if n := wrong.Load(); n != 2 {
		t.Errorf("%d bodies were wrong, want 2", n)
	}
	transport.CloseIdleConnections()
	for _, conn := range conns {
		conn.Close()
	}
}

// A server sees the client's certificate and the server name that it has asked for, and changes the query of a request. A connection
// whose certificate was not kept for servers is not shown as one without a certificate.
func TestAServerSeesCertificatesAndChangesQueries(t *testing.T) {
	const mode = "STRICT, HTTP"
	m := newMeshRig(t, mode)
	var shown atomic.Int32
	at := checker(t, func(request string) []byte {
		if strings.Count(request, "-----BEGIN%20CERTIFICATE-----%0A") == 1 {
			shown.Add(1)
		}
		parameter := wire.AppendString(wire.AppendString(nil, 1, "user"), 2, "a")
		return checked(codeOK, 3, wire.AppendString(wire.AppendBytes(nil, 7, parameter), 8, "forged"))
	})
	m.configure(t, mode, nil, nil, nil)
	old := m.connect(t, 81)
	if response, _ := old.ask(t, "/", ""); response.StatusCode != 200 {
		t.Fatal(response.Status)
	}
	m.Await(t)
	m.configure(t, mode, custom(&mesh.ExtAuthz{
		PeerCert: true, TLSSession: true, StatusOnError: 503, GRPC: &mesh.GRPCService{Cluster: "checker", Timeout: nettest.Patience},
	}), nil, map[string]netip.AddrPort{"checker": at})
	if response, _ := old.ask(t, "/admin", ""); response.StatusCode != 503 || shown.Load() != 0 {
		t.Errorf("over an old connection: %s, a certificate was shown %d times", response.Status, shown.Load())
	}
	m.Await(t)
	old.Close()
	c := m.connect(t, 81)
	for target, want := range map[string]string{"/admin": "/admin?user=a", "/admin/./x?%75ser=b&forged=1&y": "/admin/x?y&user=a"} {
		response, _ := c.ask(t, target, "")
		if got := response.Header.Get("Seen-Target"); response.StatusCode != 200 || got != want {
			t.Errorf("%s: %s, the workload sees %s, want %s", target, response.Status, got, want)
		}
		if got := m.Await(t); got.Reason != flow.Completed {
			t.Errorf("%s: %v", target, got.Reason)
		}
	}
	c.Close()
	over := m.http2(t, 81)
	response, err := over.Get("http://shop.example/admin?forged=1")
	if err != nil {
		t.Fatal(err)
	}
	response.Body.Close()
	if got := response.Header.Get("Seen-Target"); response.StatusCode != 200 || got != "/admin?user=a" {
		t.Errorf("over HTTP/2: %s, the workload sees %s", response.Status, got)
	}
	m.Await(t)
	if n := shown.Load(); n != 3 {
		t.Errorf("a certificate was shown %d times, want 3", n)
	}
}

// The fields in which claims are sent are removed from the trailers of a client's requests over HTTP/2, also where no server is asked.
func TestClaimsAreNotTakenFromTrailers(t *testing.T) {
	const mode = "STRICT, HTTP"
	m := newMeshRig(t, mode)
	m.enforceBehind(t, mode, &mesh.JWT{
		Providers: []mesh.JWTProvider{{Name: "p", Issuer: "me", Keys: []byte(`{"keys":[]}`), ClaimHeaders: []mesh.ClaimHeader{{Header: "X-Group", Claim: "group"}}}},
		Rules:     []mesh.JWTRule{{Match: mesh.RouteMatch{Path: "/"}, Requires: mesh.JWTRequirement{Kind: mesh.JWTAllowMissing}}},
	})
	conns := m.Listen(t, "82")
	served := make(chan struct{})
	go func() {
		defer close(served)
		var protocols http.Protocols
		protocols.SetUnencryptedHTTP2(true)
		ended := make(chan net.Conn)
		server := http.Server{Protocols: &protocols, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			_, _ = io.Copy(io.Discard, r.Body)
			w.Header().Set("Seen", r.Trailer.Get("X-Group")+"|"+r.Trailer.Get("X-Other"))
		})}
		server.ConnState = func(_ net.Conn, state http.ConnState) {
			if state == http.StateClosed {
				close(ended)
			}
		}
		accepted := make(chan net.Conn, 1)
		accepted <- <-conns
		server.Serve(&oneConn{accepted, ended})
	}()
	client := m.http2(t, 82)
	request, err := http.NewRequest("POST", "http://shop.example/", io.MultiReader(strings.NewReader("body")))
	if err != nil {
		t.Fatal(err)
	}
	request.Trailer = http.Header{"X-Group": {"forged"}, "X-Other": {"v"}}
	response, err := client.Do(request)
	if err != nil {
		t.Fatal(err)
	}
	response.Body.Close()
	if got := response.Header.Get("Seen"); response.StatusCode != 200 || got != "|v" {
		t.Errorf("%s, the workload sees %q", response.Status, got)
	}
	m.Await(t)
	client.CloseIdleConnections()
	<-served
}
