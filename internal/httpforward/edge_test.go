package httpforward

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2"

	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/internal/upstream"
)

// atEdge is a Router for requests from outside of the mesh. Clients is what it has seen of them.
type atEdge struct {
	to      upstream.Target
	edge    *Edge
	clients chan netip.AddrPort
	seen    chan []string
}

func (a *atEdge) Edge() *Edge { return a.edge }

func (a *atEdge) Route(r *Request) Decision {
	var fields []string
	for i := range r.Fields.Len() {
		name, value := r.Fields.At(i)
		fields = append(fields, strings.ToLower(string(name))+": "+string(value))
	}
	a.clients <- r.Client
	a.seen <- fields
	return Decision{Target: a.to}
}

// newEdge starts an engine whose requests come from outside of the mesh. The server answers with the fields that it receives.
func newEdge(t testing.TB, edge *Edge, two, many bool) (*rig, *atEdge) {
	t.Helper()
	server := serveHTTP2(t, func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		var fields []string
		for name, values := range r.Header {
			fields = append(fields, strings.ToLower(name)+": "+strings.Join(values, "|"))
		}
		for name, values := range r.Trailer {
			fields = append(fields, "trailer "+strings.ToLower(name)+": "+strings.Join(values, "|"))
		}
		slices.Sort(fields)
		w.Header().Set("Saw-Host", r.Host)
		io.WriteString(w, strings.Join(fields, "\n"))
	})
	return newEdgeTo(t, server, edge, two, many)
}

// newEdgeTo is newEdge with another server.
func newEdgeTo(t testing.TB, server netip.AddrPort, edge *Edge, two, many bool) (*rig, *atEdge) {
	t.Helper()
	router := &atEdge{upstream.Target{Address: server}, edge, make(chan netip.AddrPort, 100), make(chan []string, 100)}
	r := newRig(t, server, two)
	r.set(func() { r.router, r.many = router, many })
	return r, router
}

var untrusted = map[string][]string{
	"X-Forwarded-For":                {"203.0.113.7, 203.0.113.8", "203.0.113.9"},
	"X-Forwarded-Proto":              {"https"},
	"X-Forwarded-Port":               {"1"},
	"X-Request-Id":                   {"its-own"},
	"X-Envoy-Original-Path":          {"/public"},
	"X-Envoy-Internal":               {"true"},
	"X-Envoy-External-Address":       {"192.0.2.1"},
	"X-Envoy-Retry-On":               {"5xx"},
	"X-Envoy-Upstream-Rq-Timeout-Ms": {"1"},
	"X-Envoy-Later-Invention":        {"1"},
	"X_envoy_internal":               {"1"},
	"X_Forwarded-For":                {"192.0.2.1"},
	"x_forwarded_client_cert":        {"By=a"},
	"X_request_Id":                   {"another"},
	"X_other":                        {"1"},
	"X-Other":                        {"a", "b"},
}

// A client's own words about itself do not pass, unless a trusted proxy is between. What routers see is what the server sees.
func TestTheEdgeReplacesWhatAClientSaysAboutItself(t *testing.T) {
	for name, c := range map[string]struct {
		edge   *Edge
		fields map[string][]string
		want   []string // of the server; "" stands for an x-request-id of ours
		client string   // with its port, if it is the peer
	}{
		"no fields": {&Edge{ID: true}, nil, []string{
			"x-envoy-external-address: 127.0.0.1", "x-forwarded-for: 127.0.0.1", "x-forwarded-proto: http", "",
		}, "peer"},
		"nobody is trusted": {&Edge{ID: true, Port: true}, untrusted, []string{
			"x-envoy-external-address: 127.0.0.1", "x-forwarded-for: 203.0.113.7, 203.0.113.8,203.0.113.9,127.0.0.1",
			"x-forwarded-port: PORT", "x-forwarded-proto: http", "x-other: a|b", "x_other: 1", "",
		}, "peer"},
		"one proxy is trusted": {&Edge{TrustedHops: 1, Port: true}, untrusted, []string{
			"x-envoy-external-address: 203.0.113.9", "x-forwarded-for: 203.0.113.7, 203.0.113.8,203.0.113.9,127.0.0.1",
			"x-forwarded-port: 1", "x-forwarded-proto: https", "x-other: a|b", "x-request-id: its-own", "x_other: 1",
		}, "203.0.113.9:0"},
		"two proxies are trusted": {&Edge{TrustedHops: 2, ID: true, KeepID: true, KeepFor: true, Underscores: mesh.DropUnderscores}, untrusted, []string{
			"x-envoy-external-address: 203.0.113.8", "x-forwarded-for: 203.0.113.7, 203.0.113.8|203.0.113.9",
			"x-forwarded-port: 1", "x-forwarded-proto: https", "x-other: a|b", "x-request-id: its-own",
		}, "203.0.113.8:0"},
		"more proxies are trusted than there are": {&Edge{TrustedHops: 4}, untrusted, []string{
			"x-envoy-external-address: 127.0.0.1", "x-forwarded-for: 203.0.113.7, 203.0.113.8,203.0.113.9,127.0.0.1",
			"x-forwarded-port: 1", "x-forwarded-proto: https", "x-other: a|b", "x-request-id: its-own", "x_other: 1",
		}, "peer"},
		"an internal client": {&Edge{ID: true, Internal: []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")}}, map[string][]string{
			"X-Envoy-Retry-On": {"5xx"}, "X-Envoy-External-Address": {"192.0.2.1"}, "X-Request-Id": {"its-own"},
		}, []string{
			"x-envoy-internal: true", "x-envoy-retry-on: 5xx", "x-forwarded-for: 127.0.0.1", "x-forwarded-proto: http", "x-request-id: its-own",
		}, "peer"},
		"an internal client that is said to forward": {&Edge{Internal: []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")}}, map[string][]string{
			"X-Envoy-Retry-On": {"5xx"}, "X-Forwarded-For": {"127.0.0.1"},
		}, []string{
			"x-envoy-external-address: 127.0.0.1", "x-forwarded-for: 127.0.0.1,127.0.0.1", "x-forwarded-proto: http",
		}, "peer"},
	} {
		for _, engine := range []struct{ two, many bool }{{false, false}, {true, false}, {true, true}} {
			r, router := newEdge(t, c.edge, engine.two, engine.many)
			body, peer := r.ask(t, engine.two, c.fields)
			client, seen := <-router.clients, <-router.seen
			if want := strings.ReplaceAll(c.client, "peer", peer); client.String() != want {
				t.Errorf("%s, %+v: the client is %v, want %s", name, engine, client, want)
			}
			got, want := own(strings.Split(body, "\n")), slices.Clone(c.want)
			for i := range want {
				want[i] = strings.ReplaceAll(want[i], "PORT", fmt.Sprint(r.last.Load().OriginalDestination.Port()))
			}
			slices.Sort(want)
			if !slices.Equal(got, want) {
				t.Errorf("%s, %+v: the server receives\n%q, want\n%q", name, engine, got, want)
			}
			if got = own(joinFields(seen)); !slices.Equal(got, want) {
				t.Errorf("%s, %+v: the router sees\n%q, want\n%q", name, engine, got, want)
			}
			record := r.records.await(t, 0)
			if id := fieldOf(strings.Split(body, "\n"), requestIDField); record.id != id {
				t.Errorf("%s, %+v: the record has the id %q, the server %q", name, engine, record.id, id)
			}
			if forwarded := strings.ReplaceAll(fieldOf(strings.Split(body, "\n"), forwardedForField), "|", ","); record.forwardedFor != forwarded {
				t.Errorf("%s, %+v: the record has the x-forwarded-for %q, the server %q", name, engine, record.forwardedFor, forwarded)
			}
		}
	}
}

// ask sends a request, and returns the body of its response and the client's address.
func (r *rig) ask(t *testing.T, two bool, fields map[string][]string) (body, peer string) {
	t.Helper()
	client := http2Client(t)
	if !two {
		client = &http.Client{Transport: &http.Transport{}, Timeout: nettest.Patience}
		defer client.CloseIdleConnections()
	}
	request, _ := http.NewRequestWithContext(t.Context(), "GET", "http://"+r.address, nil)
	for name, values := range fields {
		request.Header[name] = values
	}
	response, err := client.Do(request)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	if err != nil || response.StatusCode != 200 {
		t.Fatalf("status %d, %q, %v", response.StatusCode, text, err)
	}
	return string(text), r.last.Load().Downstream.String()
}

// own returns sorted fields without those of Go's clients. An x-request-id that is a UUID is "".
func own(fields []string) (kept []string) {
	for _, f := range fields {
		name, value, _ := strings.Cut(f, ": ")
		switch name {
		case "accept-encoding", "user-agent", "host", "content-length":
			continue
		case requestIDField:
			if len(value) == uuidLength {
				f = ""
			}
		}
		kept = append(kept, f)
	}
	slices.Sort(kept)
	return kept
}

// joinFields joins the values of repeated fields as the server does.
func joinFields(fields []string) (joined []string) {
	for _, f := range fields {
		name, value, _ := strings.Cut(f, ": ")
		if i := slices.IndexFunc(joined, func(j string) bool { return strings.HasPrefix(j, name+": ") }); i >= 0 {
			joined[i] += "|" + value
			continue
		}
		joined = append(joined, f)
	}
	return joined
}

func fieldOf(fields []string, name string) string {
	for _, f := range fields {
		if value, found := strings.CutPrefix(f, name+": "); found {
			return value
		}
	}
	return ""
}

// Fields in other letters, named by Connection, or in trailers do not pass either. The bytes behind the head are kept.
func TestTheEdgeCannotBeEvaded(t *testing.T) {
	o := newOrigin(t)
	r := newRig(t, o.address, false, plain)
	edge := &Edge{}
	router := &atEdge{upstream.Target{Address: o.address}, edge, make(chan netip.AddrPort, 10), make(chan []string, 10)}
	r.set(func() { r.router = router })
	client := r.dial(t)
	const added = "x-forwarded-for: 192.0.2.1,127.0.0.1\r\nx-forwarded-proto: http\r\nx-envoy-external-address: 127.0.0.1\r\n"
	send(t, client, "\r\nPOST http://a/b?c HTTP/1.1\r\nHoSt: a\r\nX-ENVOY-Original-Path:/x\r\nx-FORWARDED-for: 192.0.2.1\r\n"+
		"Connection: x-forwarded-for, x-forwarded-proto\r\nX-A:  b \r\nContent-Length: 4\r\n\r\nbodyGET /2 HTTP/1.1\r\nHost: b\r\n\r\n")
	server := o.accept()
	expect(t, server, "POST http://a/b?c HTTP/1.1\r\nHoSt: a\r\nX-A:  b \r\nContent-Length: 4\r\n"+added+"\r\nbody")
	send(t, server, ok("1"))
	expect(t, client, ok("1"))
	expect(t, server, "GET /2 HTTP/1.1\r\nHost: b\r\n"+strings.Replace(added, "192.0.2.1,", "", 1)+"\r\n")
	send(t, server, ok("2"))
	expect(t, client, ok("2"))
	r.set(func() {
		r.router = &atEdge{router.to, &Edge{Underscores: mesh.DropUnderscores}, make(chan netip.AddrPort, 20), make(chan []string, 20)}
	})
	for _, field := range []string{"x-forwarded-for", "x-forwarded-proto", "x-forwarded-port", "x-forwarded-host", "X-Forwarded-Client-Cert",
		"x-envoy-external-address", "x-envoy-internal", "X-ENVOY-Original-Path", "x-envoy-retry-on", "x-request-id", "x_forwarded_for"} {
		client := r.dial(t)
		send(t, client, "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n"+field+": 1\r\n\r\n")
		if got := head(t, bufio.NewReader(client)); !strings.HasPrefix(got, "HTTP/1.1 400 ") {
			t.Errorf("a trailer %s is answered %q, want 400", field, got)
		}
	}
	r.set(func() { r.router = router })
	client = r.dial(t)
	send(t, client, "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX_Forwarded_For: 1\r\n\r\n")
	if got := head(t, bufio.NewReader(client)); !strings.HasPrefix(got, "HTTP/1.1 400 ") {
		t.Errorf("where underscores are allowed, a trailer X_Forwarded_For is answered %q, want 400", got)
	}
	client = r.dial(t)
	send(t, client, "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nx_other: 1\r\nx-envoy: 2\r\n\r\n")
	expect(t, o.accept(), "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n"+strings.Replace(added, "192.0.2.1,", "", 1)+
		"\r\n0\r\nx_other: 1\r\nx-envoy: 2\r\n\r\n")
}

func TestTrailersOfHTTP2PassTheEdge(t *testing.T) {
	for _, many := range []bool{false, true} {
		r, _ := newEdge(t, &Edge{Underscores: mesh.RejectUnderscores}, true, many)
		request, _ := http.NewRequestWithContext(t.Context(), "POST", "http://"+r.address, io.MultiReader(strings.NewReader("body")))
		request.Trailer = http.Header{"X-Forwarded-For": {"192.0.2.1"}, "X-Envoy-Internal": {"true"}, "X-Request-Id": {"1"}, "X_other": {"2"}, "X-Other": {"kept"}}
		response, err := http2Client(t).Do(request)
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(response.Body)
		response.Body.Close()
		var trailers []string
		for _, line := range strings.Split(string(body), "\n") {
			if name, value, found := strings.Cut(line, ": "); found && value != "" && strings.HasPrefix(name, "trailer ") {
				trailers = append(trailers, line)
			}
		}
		if err != nil || !slices.Equal(trailers, []string{"trailer x-other: kept"}) {
			t.Errorf("many %v: the server receives the trailers %q, %v", many, trailers, err)
		}
	}
}

// A scheme that servers reset would be a way to have them ejected: it is answered at the edge, and reaches none. Clients inside of
// the mesh are free to use it.
func TestTheEdgeRejectsOtherSchemes(t *testing.T) {
	for _, many := range []bool{false, true} {
		for _, c := range []struct {
			edge   *Edge
			scheme string
			want   string
		}{{&Edge{}, "http", "200"}, {&Edge{}, "https", "200"}, {&Edge{}, "file", "400"}, {&Edge{}, "http://x/?", "400"}, {nil, "file", ""}} {
			r, router := newEdge(t, c.edge, true, many)
			client := newSpeaker(t, r.dial(t))
			send(t, client.conn, http2.ClientPreface)
			client.sends("SETTINGS")
			client.sends("HEADERS 1 end :method=GET :scheme=" + c.scheme + " :path=/ :authority=a")
			got := client.next()
			for strings.HasPrefix(got, "SETTINGS") || strings.HasPrefix(got, "WINDOW") {
				got = client.next()
			}
			if c.edge != nil && !strings.Contains(got, " :status="+c.want) {
				t.Errorf("many %v, %+v: %q", many, c, got)
			}
			if routed := len(router.seen) > 0; routed == (c.want == "400") {
				t.Errorf("many %v, %+v: it was routed: %v", many, c, routed)
			}
		}
	}
}

// Limits of the edge hold for requests, and not for the responses to them.
func TestTheEdgeLimitsHeads(t *testing.T) {
	edge := &Edge{MaxHeadBytes: 4 << 10, MaxHeadFields: 20, Underscores: mesh.RejectUnderscores}
	many, long := map[string][]string{}, map[string][]string{"X-Long": {strings.Repeat("a", 5000)}}
	for i := range 20 {
		many[fmt.Sprintf("X-%d", i)] = []string{"1"}
	}
	server := serveHTTP2(t, func(w http.ResponseWriter, _ *http.Request) {
		for name, values := range many {
			w.Header()[name] = values
		}
		w.Header().Set("X-Long", strings.Repeat("b", 5000))
	})
	for _, engine := range []struct{ two, many bool }{{false, false}, {true, false}, {true, true}} {
		router := &atEdge{upstream.Target{Address: server}, edge, make(chan netip.AddrPort, 10), make(chan []string, 10)}
		r := newRig(t, server, engine.two)
		r.set(func() { r.router, r.many = router, engine.many })
		for name, c := range map[string]struct {
			fields map[string][]string
			want   int
		}{
			"small": {nil, 200}, "many fields": {many, 431}, "long": {long, 431}, "underscore": {map[string][]string{"a_b": {"1"}}, 400},
		} {
			if name == "long" && engine.two {
				continue // Go's client keeps to the limit that it was told, and tries again and again
			}
			client := http2Client(t)
			if !engine.two {
				client = &http.Client{Transport: &http.Transport{}, Timeout: nettest.Patience}
			}
			request, _ := http.NewRequestWithContext(t.Context(), "GET", "http://"+r.address, nil)
			for name, values := range c.fields {
				request.Header[name] = values
			}
			response, err := client.Do(request)
			switch {
			case err != nil:
				t.Errorf("%s, %+v: %v", name, engine, err)
			case response.StatusCode != c.want:
				t.Errorf("%s, %+v: status %d, want %d", name, engine, response.StatusCode, c.want)
			}
			if err == nil {
				response.Body.Close()
			}
			client.CloseIdleConnections()
		}
	}
}

// A connection without requests ends by the edge's limit, and one with a request does not.
func TestAnIdleConnectionEndsByTheLimitOfTheEdge(t *testing.T) {
	nettest.UnderLimit(t, 200*time.Millisecond, func(t testing.TB, limit time.Duration) {
		o := newOrigin(t)
		r := newRig(t, o.address, false, plain)
		edge := &Edge{IdleTimeout: limit} // the client sends its request before it
		router := &atEdge{upstream.Target{Address: o.address}, edge, make(chan netip.AddrPort, 10), make(chan []string, 10)}
		r.set(func() { r.router = router })
		client := r.dial(t)
		send(t, client, "GET / HTTP/1.1\r\nHost: a\r\n\r\n")
		server := o.accept()
		head(t, bufio.NewReader(server))
		client.SetReadDeadline(time.Now().Add(limit + limit/2)) // the request outlasts the limit
		if n, err := client.Read(make([]byte, 1)); n != 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatalf("a connection with a request: %d bytes, %v", n, err)
		}
		client.SetReadDeadline(time.Now().Add(nettest.Patience))
		send(t, server, ok("hello"))
		expect(t, client, ok("hello"))
		if n, err := client.Read(make([]byte, 1)); n != 0 || err != io.EOF {
			t.Errorf("an idle connection: %d bytes, %v; want its end", n, err)
		}
	})
}
