package inbound

import (
	"context"
	"encoding/binary"
	"fmt"
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
	"github.com/pillion-proxy/pillion/internal/serve/servetest"
	"github.com/pillion-proxy/pillion/internal/wire"
)

// answering is a server of external authorization, by HTTP and by gRPC.
type answering struct {
	change func(*mesh.Cluster) // of its cluster; may be nil

	cluster    string           // in the filter; empty: the server's
	raw        func(net.Conn)   // serves connections; nil: http and grpc do
	http, grpc http.HandlerFunc // nil: not served
	silent     bool             // the question ends by its time limit
	denies     int              // the status of its denial; 0: its answer does not count
}

// respond is a server of HTTP that answers with a status and a body.
func respond(status int, body string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(status)
		io.WriteString(w, body)
	}
}

// frame is a message of gRPC.
func frame(message string) string {
	return string(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(message)))) + message
}

// call is a server of gRPC that answers with frames and a status; an empty status: none.
func call(frames, status string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/grpc")
		io.WriteString(w, frames)
		if status != "" {
			w.Header().Set(http.TrailerPrefix+"Grpc-Status", status)
		}
	}
}

// then is a server that sends the beginning of an answer before it does something else.
func then(begin string, next func(*http.Request)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/grpc")
		io.WriteString(w, begin)
		http.NewResponseController(w).Flush()
		next(r)
	}
}

// once sends an answer of bytes to the first question.
func once(answer string) func(net.Conn) {
	return func(conn net.Conn) {
		io.ReadAtLeast(conn, make([]byte, 4096), 1)
		io.WriteString(conn, answer)
		io.Copy(io.Discard, conn) // until the agent closes
		conn.Close()
	}
}

var (
	allowing = frame(string(checked(codeOK, 0, nil)))
	abort    = func(*http.Request) { panic(http.ErrAbortHandler) }
	stall    = func(r *http.Request) { <-r.Context().Done() }
)

// servers answer in all the ways that are not a permission.
var servers = map[string]answering{
	"there is no such cluster":       {cluster: "none"},
	"the cluster is not supported":   {change: func(c *mesh.Cluster) { c.Refused = true }},
	"the cluster has no endpoint":    {change: func(c *mesh.Cluster) { c.Hosts = &mesh.Assignment{} }},
	"the cluster has no healthy one": {change: func(c *mesh.Cluster) { c.Hosts.Localities[0].Endpoints[0].Health = mesh.Unhealthy }},
	"the cluster's limit is reached": {change: func(c *mesh.Cluster) { c.Breakers = mesh.Breakers{} }},
	"nothing listens": {change: func(c *mesh.Cluster) {
		c.Hosts.Localities[0].Endpoints[0].Address = netip.MustParseAddrPort("127.0.0.1:1")
	}},
	"it closes":                  {raw: func(conn net.Conn) { conn.Close() }},
	"it closes when it is asked": {raw: func(conn net.Conn) { io.ReadAtLeast(conn, make([]byte, 4096), 1); conn.Close() }},
	"it resets": {raw: func(conn net.Conn) {
		io.ReadAtLeast(conn, make([]byte, 4096), 1)
		conn.(*net.TCPConn).SetLinger(0)
		conn.Close()
	}},
	"it speaks another protocol":         {raw: once("220 mail.example ESMTP\r\n")},
	"it is silent":                       {raw: once(""), silent: true},
	"it answers nothing to the question": {http: then("", stall), grpc: then("", stall), silent: true},
	"its answer is cut":                  {http: then("all", abort), grpc: then(allowing[:6], abort)},
	"its answer is cut behind a message": {grpc: then(allowing, abort)},
	"its answer stalls":                  {http: then("all", stall), grpc: then(allowing[:6], stall), silent: true},
	"its answer does not end":            {grpc: then(allowing, stall), silent: true},
	"its answer is too long":             {http: respond(200, strings.Repeat("x", 300<<10)), grpc: call(frame(strings.Repeat("x", 300<<10)), "0")},
	"its head is too long": {
		http: func(w http.ResponseWriter, _ *http.Request) { w.Header().Set("X", strings.Repeat("x", 200<<10)) },
		grpc: func(w http.ResponseWriter, _ *http.Request) { w.Header().Set("X", strings.Repeat("x", 200<<10)) },
	},
	"it answers 500":                 {http: respond(500, "error"), grpc: respond(500, "error")},
	"it answers 503":                 {http: respond(503, ""), grpc: respond(503, "")},
	"it answers 999":                 {http: respond(999, "")},
	"it answers 101":                 {raw: once("HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n")},
	"it answers 101 without Upgrade": {raw: once("HTTP/1.1 101 Switching Protocols\r\n\r\n")},
	"it answers 100 only":            {raw: once("HTTP/1.1 100 Continue\r\n\r\n"), silent: true},
	"its framing is wrong":           {raw: once("HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n")},
	"it has two lengths":             {raw: once("HTTP/1.1 200 OK\r\nContent-Length: 0\r\nContent-Length: 1\r\n\r\nx")},
	"its status is not a number":     {raw: once("HTTP/1.1 2OO OK\r\nContent-Length: 0\r\n\r\n"), grpc: call(allowing, "O")},
	"it removes what frames the request": {http: func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("X-Envoy-Auth-Headers-To-Remove", "content-length")
	}},
	"it is no server of gRPC":             {grpc: respond(200, "<html>")},
	"it does not have the service":        {grpc: respond(404, "")},
	"its call is unimplemented":           {grpc: call("", "12")},
	"its call fails":                      {grpc: call("", "14")},
	"its call fails behind the message":   {grpc: call(allowing, "13")},
	"its call is not permitted":           {grpc: call("", "7")},
	"its call has an unknown status":      {grpc: call(allowing, "99")},
	"its call has no status":              {grpc: call(allowing, "")},
	"its call has no message":             {grpc: call("", "0")},
	"its call has two messages":           {grpc: call(allowing+allowing, "0")},
	"its message is compressed":           {grpc: call("\x01"+allowing[1:], "0")},
	"its message is cut":                  {grpc: call(allowing[:6], "0")},
	"its message is malformed":            {grpc: call(frame("\x0a\xff\xff"), "0")},
	"its message is of another type":      {grpc: call(frame(string(wire.AppendVarint(nil, 1, 0))), "0")},
	"it changes what must not be changed": {grpc: call(frame(string(checked(codeOK, 3, wire.AppendBytes(nil, 2, setting(":path", "/"))))), "0")},

	"it denies":                             {http: respond(403, "no"), grpc: call(frame(string(checked(codePermissionDenied, 0, nil))), "0"), denies: 403},
	"it denies by 204":                      {http: respond(204, ""), denies: 204},
	"it denies by 401":                      {http: respond(401, ""), denies: 401},
	"it redirects":                          {http: respond(302, ""), denies: 302},
	"it denies by a status that is unknown": {grpc: call(frame(string(checked(99, 0, nil))), "0"), denies: 403},
	"it denies by a status of no request": {
		grpc: call(frame(string(checked(codePermissionDenied, 2, wire.AppendBytes(nil, 1, wire.AppendVarint(nil, 1, 101))))), "0"), denies: 403,
	},
}

// start starts the server and returns its cluster.
func (a *answering) start(t *testing.T, grpc bool) *mesh.Cluster {
	t.Helper()
	c := &mesh.Cluster{
		Name: "checker", Discovery: mesh.Static, ConnectTimeout: nettest.Patience,
		Breakers: mesh.Breakers{Connections: 1024, Pending: 1024, Requests: 1024, Retries: 3},
	}
	handler := a.http
	if grpc {
		handler = a.grpc
	}
	var address netip.AddrPort
	switch {
	case handler != nil:
		address = listenLocally(t, handler)
	default:
		address = acceptLocally(t, a.raw)
	}
	c.Hosts = &mesh.Assignment{Localities: []mesh.Locality{{Endpoints: []mesh.Endpoint{{Address: address, Weight: 1}}}}}
	if a.change != nil {
		a.change(c)
	}
	return c
}

// acceptLocally serves connections on loopback. A nil serve closes them: they are not expected.
func acceptLocally(t *testing.T, serve func(net.Conn)) netip.AddrPort {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	accepting := make(chan struct{})
	var conns []net.Conn // until accepting is closed
	t.Cleanup(func() {
		l.Close()
		<-accepting
		for _, conn := range conns {
			conn.Close()
		}
	})
	go func() {
		defer close(accepting)
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			if serve == nil {
				conn.Close()
				continue
			}
			conns = append(conns, conn)
			go serve(conn)
		}
	}()
	return l.Addr().(*net.TCPAddr).AddrPort()
}

// serves reports whether the server is one of a protocol.
func (a *answering) serves(grpc bool) bool {
	switch {
	case grpc && a.grpc != nil, !grpc && a.http != nil, a.change != nil, a.cluster != "":
		return true
	case a.raw == nil || a.http != nil:
		return false
	}
	return !grpc || a.grpc == nil
}

// workload serves HTTP on a port of the pod, and counts the requests.
func (m *meshRig) workload(t *testing.T, port string) *atomic.Int32 {
	t.Helper()
	n := new(atomic.Int32)
	conns := m.Listen(t, port)
	accepted, ended := make(chan net.Conn), make(chan net.Conn)
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		n.Add(1)
		body, _ := io.ReadAll(r.Body)
		fmt.Fprintf(w, "%s %s %s", r.URL.Path, body, r.Header.Get("X-Envoy-Auth-Failure-Mode-Allowed"))
	})}
	server.Protocols = new(http.Protocols)
	server.Protocols.SetHTTP1(true)
	server.Protocols.SetUnencryptedHTTP2(true)
	served := make(chan struct{})
	go func() {
		for {
			select {
			case conn := <-conns:
				accepted <- conn
			case <-ended:
				return
			}
		}
	}()
	go func() {
		defer close(served)
		server.Serve(&oneConn{accepted, ended})
	}()
	t.Cleanup(func() { close(ended); server.Close(); <-served })
	return n
}

// over returns a client on one connection of the mesh.
func (m *meshRig) over(t *testing.T, port uint16, http2 bool) *http.Client {
	t.Helper()
	if http2 {
		return m.http2(t, port)
	}
	conn, err := m.handshake(t, m.Dial(t, m.At(port)), m.client, "istio-http/1.1", "istio", "http/1.1")
	if err != nil {
		t.Fatal(err)
	}
	transport := &http.Transport{DialContext: func(context.Context, string, string) (net.Conn, error) { return conn, nil }}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
}

// What becomes of requests whose server of external authorization does not allow them: as it says, or if it says nothing that
// counts, as the filter is configured to fail. The workload never sees a request that is not allowed.
func TestEveryFailureOfAServerThatIsAskedAboutRequests(t *testing.T) {
	const mode = "STRICT, HTTP"
	m := newMeshRig(t, mode)
	seen := m.workload(t, "82")
	for name, server := range servers {
		for _, grpc := range []bool{false, true} {
			if !server.serves(grpc) {
				continue
			}
			cluster := server.start(t, grpc)
			for i, c := range []struct {
				open, mark bool
				status     int // on error
				body       *mesh.AuthzBody
			}{{false, false, 403, nil}, {false, true, 503, &mesh.AuthzBody{MaxBytes: 10}}, {true, false, 403, &mesh.AuthzBody{MaxBytes: 10}}, {true, true, 403, nil}} {
				http2 := (i+len(name))%2 == 0 != grpc // each server meets both
				about := fmt.Sprintf("%s, gRPC %v, over HTTP/2 %v, %+v", name, grpc, http2, c)
				e := &mesh.ExtAuthz{AllowFailure: c.open, MarkFailure: c.mark, StatusOnError: c.status, Body: c.body}
				asked, limit := "checker", nettest.Patience
				if server.cluster != "" {
					asked = server.cluster
				}
				if server.silent {
					limit = 20 * time.Millisecond
				}
				if grpc {
					e.GRPC = &mesh.GRPCService{Cluster: asked, Timeout: limit}
				} else {
					e.HTTP = &mesh.HTTPAuthz{Service: mesh.HTTPService{Cluster: asked, Timeout: limit}}
				}
				m.configure(t, mode, custom(e), nil, nil)
				edit := m.plane.InForce.Load().Edit()
				edit.SetCluster("checker", cluster)
				s, _ := edit.Snapshot()
				m.plane.InForce.Store(s)

				client, before := m.over(t, 82, http2), seen.Load()
				response, err := client.Post("http://shop.example/admin", "text/plain", strings.NewReader("body"))
				if err != nil {
					t.Errorf("%s: %v", about, err)
					m.Await(t)
					continue
				}
				body, err := io.ReadAll(response.Body)
				response.Body.Close()
				client.CloseIdleConnections()
				if err != nil {
					t.Errorf("%s: %v", about, err)
				}
				got := m.Await(t)
				status, details := c.status, "ext_authz_error"
				switch {
				case server.denies != 0:
					status, details = server.denies, "ext_authz_denied"
				case c.open:
					marked := ""
					if c.mark {
						marked = "true"
					}
					if want := "/admin body " + marked; response.StatusCode != 200 || string(body) != want || seen.Load() != before+1 {
						t.Errorf("%s: %d, %q; want that the workload answers %q", about, response.StatusCode, body, want)
					}
					if got.Reason != flow.Completed || got.Flags != "" || got.Details != "via_upstream" {
						t.Errorf("%s: the record has %v, %s, %s", about, got.Reason, got.Flags, got.Details)
					}
					continue
				}
				if response.StatusCode != status || server.denies == 0 && len(body) > 0 {
					t.Errorf("%s: %d, %q; want %d", about, response.StatusCode, body, status)
				}
				if got.Reason != flow.PolicyDenied || got.Flags != "UAEX" || got.Details != details || got.Upstream.IsValid() {
					t.Errorf("%s: the record has %v, %s, %s, upstream %v; want %s", about, got.Reason, got.Flags, got.Details, got.Upstream, details)
				}
				if seen.Load() != before {
					t.Errorf("%s: the workload sees the request", about)
				}
			}
		}
	}
}

// A body of which the server may not see all is refused however the filter is configured to fail. It is shown in part only where
// that is allowed.
func TestABodyBeyondTheLimitIsNeverAFailure(t *testing.T) {
	const mode, limit = "STRICT, HTTP", 10
	m := newMeshRig(t, mode)
	seen := m.workload(t, "82")
	var asked atomic.Int32
	answers := map[bool]netip.AddrPort{
		false: listenLocally(t, func(w http.ResponseWriter, r *http.Request) {
			asked.Add(1)
			if body, _ := io.ReadAll(r.Body); string(body) != strings.Repeat("b", limit) || r.Header.Get("X-Envoy-Auth-Partial-Body") != "true" {
				w.WriteHeader(418)
			}
		}),
		true: checker(t, func(request string) []byte {
			asked.Add(1)
			if body, _ := bodySeen(request); body != strings.Repeat("b", limit) || !strings.Contains(request, "x-envoy-auth-partial-body\x12\x04true") {
				return checked(codePermissionDenied, 0, nil)
			}
			return checked(codeOK, 0, nil)
		}),
	}
	for i := range 16 {
		grpc, http2, partial, open := i&1 > 0, i&2 > 0, i&4 > 0, i&8 > 0
		about := fmt.Sprintf("gRPC %v, over HTTP/2 %v, in part %v, fails open %v", grpc, http2, partial, open)
		e := &mesh.ExtAuthz{AllowFailure: open, StatusOnError: 503, Body: &mesh.AuthzBody{MaxBytes: limit, AllowPartial: partial}}
		if grpc {
			e.GRPC = &mesh.GRPCService{Cluster: "checker", Timeout: nettest.Patience}
		} else {
			e.HTTP = &mesh.HTTPAuthz{Service: mesh.HTTPService{Cluster: "checker", Timeout: nettest.Patience}}
		}
		m.configure(t, mode, custom(e), nil, map[string]netip.AddrPort{"checker": answers[grpc]})
		for _, known := range []bool{false, true} {
			var sent io.Reader = strings.NewReader(strings.Repeat("b", limit+1))
			if !known {
				sent = io.MultiReader(sent)
			}
			client, before := m.over(t, 82, http2), seen.Load()
			asked.Store(0)
			response, err := client.Post("http://shop.example/admin", "text/plain", sent)
			if err != nil {
				t.Errorf("%s: %v", about, err)
				m.Await(t)
				continue
			}
			if _, err := io.Copy(io.Discard, response.Body); err != nil {
				t.Errorf("%s: %v", about, err)
			}
			response.Body.Close()
			client.CloseIdleConnections()
			got := m.Await(t)
			if partial {
				if response.StatusCode != 200 || asked.Load() != 1 || seen.Load() != before+1 || got.Reason != flow.Completed {
					t.Errorf("%s, length known %v: %d, asked %d times, %v", about, known, response.StatusCode, asked.Load(), got.Reason)
				}
				continue
			}
			if response.StatusCode != 413 || asked.Load() != 0 || seen.Load() != before || got.Reason != flow.PolicyDenied || got.Details != "request_payload_too_large" {
				t.Errorf("%s, length known %v: %d, asked %d times, %v, %s", about, known, response.StatusCode, asked.Load(), got.Reason, got.Details)
			}
		}
	}
}

// What becomes of connections whose server of external authorization does not allow them. The workload is never dialled for them.
func TestEveryFailureOfAServerThatIsAskedAboutConnections(t *testing.T) {
	const mode = "STRICT, TCP"
	m := newMeshRig(t, mode)
	dialled := m.Listen(t, "82")
	for name, server := range servers {
		for _, grpc := range []bool{false, true} {
			if !server.serves(grpc) || !grpc && server.silent {
				continue
			}
			cluster := server.start(t, grpc)
			for _, open := range []bool{false, true} {
				about := fmt.Sprintf("%s, gRPC %v, fails open %v", name, grpc, open)
				e := &mesh.ExtAuthz{AllowFailure: open, Enabled: mesh.Fraction{Numerator: 100, Denominator: 100}}
				asked, limit := "checker", nettest.Patience
				if server.cluster != "" {
					asked = server.cluster
				}
				if server.silent {
					limit = 20 * time.Millisecond
				}
				denied := server.denies != 0
				if grpc {
					e.GRPC = &mesh.GRPCService{Cluster: asked, Timeout: limit}
				} else { // which has no form for connections
					e.HTTP, denied = &mesh.HTTPAuthz{Service: mesh.HTTPService{Cluster: asked, Timeout: limit}}, false
				}
				m.configure(t, mode, nil, []mesh.NetworkFilter{{Name: "envoy.filters.network.ext_authz", ExtAuthz: e}}, nil)
				edit := m.plane.InForce.Load().Edit()
				edit.SetCluster("checker", cluster)
				s, _ := edit.Snapshot()
				m.plane.InForce.Store(s)

				conn, err := m.handshake(t, m.Dial(t, m.At(82)), m.client, meshTCP...)
				if err != nil {
					t.Fatalf("%s: %v", about, err)
				}
				io.WriteString(conn, "question")
				passes := open && !denied
				if passes {
					workload := servetest.Take(t, dialled)
					servetest.Expect(t, workload, "question")
					workload.Close()
				} else if _, err := conn.Read(make([]byte, 1)); err == nil || err == io.EOF {
					t.Errorf("%s: the client gets %v, want a reset", about, err)
				}
				conn.Close()
				got := m.Await(t)
				flags, details := "UAEX", "ext_authz_error"
				switch {
				case passes:
					flags, details = got.Flags, ""
				case denied:
					details = "ext_authz_denied"
				}
				if (got.Reason == flow.PolicyDenied) == passes || got.Flags != flags || got.Details != details || got.Upstream.IsValid() != passes {
					t.Errorf("%s: the record has %v, %s, %s, upstream %v, %v", about, got.Reason, got.Flags, got.Details, got.Upstream, got.Err)
				}
				if len(dialled) > 0 {
					t.Fatalf("%s: the workload was dialled", about)
				}
			}
		}
	}
}
