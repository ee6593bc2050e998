package inbound

import (
	"bytes"
	"context"
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
