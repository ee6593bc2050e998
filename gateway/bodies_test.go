package gateway

import (
	"context"
	"fmt"
	"hash/crc32"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/nettest"
)

// once returns a client whose only connection is open already.
func (r *rig) once(t *testing.T, http2 bool) *http.Client {
	t.Helper()
	conn := r.Dial(t, r.At(port))
	var protocols http.Protocols
	protocols.SetHTTP1(!http2)
	protocols.SetUnencryptedHTTP2(http2)
	transport := &http.Transport{
		Protocols: &protocols, ExpectContinueTimeout: nettest.Patience,
		DialContext: func(context.Context, string, string) (net.Conn, error) { return conn, nil },
	}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport, Timeout: nettest.Patience}
}

// check starts a server that decides about requests. It listens on loopback: the agent's own connections are not those of the
// pod's namespace.
func (r *rig) check(t *testing.T, handler http.HandlerFunc) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server, served := &http.Server{Handler: handler}, make(chan struct{})
	go func() {
		defer close(served)
		server.Serve(l)
	}()
	t.Cleanup(func() { server.Close(); <-served })
	r.push(func(e *mesh.Edit) {
		e.SetCluster("checker", &mesh.Cluster{
			Name: "checker", Discovery: mesh.Static, Breakers: unlimited, ConnectTimeout: nettest.Patience,
			Hosts: &mesh.Assignment{Localities: []mesh.Locality{{Endpoints: []mesh.Endpoint{{Address: l.Addr().(*net.TCPAddr).AddrPort(), Weight: 1}}}}},
		})
	})
}

// digest describes a body.
func digest(b []byte) string { return fmt.Sprintf("%d bytes, %x", len(b), crc32.ChecksumIEEE(b)) }

// asking is a filter that asks a server by HTTP, with the bodies of requests.
func asking(body *mesh.AuthzBody) mesh.HTTPFilter {
	return mesh.HTTPFilter{Name: "authz", ExtAuthz: &mesh.ExtAuthz{
		Enabled: mesh.Fraction{Numerator: 1, Denominator: 1}, StatusOnError: 403, Body: body,
		HTTP: &mesh.HTTPAuthz{Service: mesh.HTTPService{Cluster: "checker", Timeout: nettest.Patience}},
	}}
}

// A server of external authorization sees the bodies of requests, as far as it is configured. The server behind the gateway gets
// the same bytes as without it.
func TestAServerSeesBodies(t *testing.T) {
	r := newRig(t)
	r.cluster("web", 82)
	seen := make(chan string, 1)
	r.check(t, func(w http.ResponseWriter, q *http.Request) {
		body, err := io.ReadAll(q.Body)
		if err != nil {
			t.Error(err)
		}
		seen <- strings.TrimSpace(digest(body) + " " + q.Header.Get("X-Envoy-Auth-Partial-Body"))
		if strings.Contains(string(body), "evil") {
			w.WriteHeader(http.StatusUnauthorized)
		}
	})
	r.handle(t, 82, func(w http.ResponseWriter, q *http.Request) {
		body, err := io.ReadAll(q.Body)
		fmt.Fprint(w, digest(body), " ", err)
		if q.Header.Get("Expect") != "" && q.ContentLength != 0 {
			t.Error("the server behind the gateway is asked for 100 again")
		}
	})
	r.route(host("web", "web"))
	const most, long = 1000, 200_000 // longer than the window of a stream and an ordinary buffer
	for _, max := range []int{most, long} {
		for _, partial := range []bool{false, true} {
			r.listen(edge(0, asking(&mesh.AuthzBody{MaxBytes: uint32(max), AllowPartial: partial})))
			for _, body := range []string{"", "short", "evil", strings.Repeat("a", max), strings.Repeat("b", max) + "evil", strings.Repeat("c", max*3/2)} {
				for _, sent := range []string{"with its length", "in chunks", "over HTTP/2", "over HTTP/2 with its length", "after 100", "after 100 over HTTP/2"} {
					name := fmt.Sprintf("%d bytes %s, of which the server sees %d or less, partial %v", len(body), sent, max, partial)
					status, got := r.post(t, sent, body)
					want, shown := 200, body[:min(len(body), max)]
					asked := strings.TrimSpace(digest([]byte(shown)) + " " + map[bool]string{true: "true", false: "false"}[len(shown) < len(body)])
					switch {
					case len(body) > max && !partial:
						want, asked = http.StatusRequestEntityTooLarge, ""
					case strings.Contains(shown, "evil"):
						want = http.StatusUnauthorized
					case body == "":
						asked = digest(nil)
					}
					if status != want || want == 200 && got != digest([]byte(body))+" <nil>" {
						t.Errorf("%s: %d, %q; want %d", name, status, got, want)
					}
					if asked != "" {
						if server := <-seen; server != asked {
							t.Errorf("%s: the server sees %s, want %s", name, server, asked)
						}
					}
					if record := r.Await(t); (record.Reason == flow.PolicyDenied) != (want != 200) {
						t.Errorf("%s: the record has the reason %v", name, record.Reason)
					}
				}
			}
		}
	}
	if len(seen) > 0 {
		t.Error("a server was asked once more")
	}
}

// post sends a request with a body.
func (r *rig) post(t *testing.T, sent, body string) (status int, answer string) {
	t.Helper()
	var content io.Reader = strings.NewReader(body)
	if sent == "in chunks" || sent == "over HTTP/2" {
		content = io.MultiReader(content) // of a length that is not known
	}
	request, err := http.NewRequest("POST", "http://web/", content)
	if err != nil {
		t.Fatal(err)
	}
	if strings.HasPrefix(sent, "after 100") {
		request.Header.Set("Expect", "100-continue")
	}
	response, err := r.once(t, strings.Contains(sent, "HTTP/2")).Do(request)
	if err != nil {
		t.Fatalf("%d bytes %s: %v", len(body), sent, err)
	}
	defer response.Body.Close()
	b, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatalf("%d bytes %s: %v", len(body), sent, err)
	}
	return response.StatusCode, string(b)
}

// Of two servers, each sees as much of a body as its own filter has it see, whichever is asked first.
func TestEachServerSeesItsPartOfABody(t *testing.T) {
	r := newRig(t)
	r.cluster("web", 82)
	r.handle(t, 82, func(w http.ResponseWriter, q *http.Request) { io.Copy(w, q.Body) })
	seen := make(chan string, 2)
	r.check(t, func(_ http.ResponseWriter, q *http.Request) {
		body, _ := io.ReadAll(q.Body)
		seen <- string(body) + " " + q.Header.Get("X-Envoy-Auth-Partial-Body")
	})
	r.route(host("web", "web"))
	little, more := asking(&mesh.AuthzBody{MaxBytes: 2, AllowPartial: true}), asking(&mesh.AuthzBody{MaxBytes: 10})
	for first, filters := range map[string][]mesh.HTTPFilter{"he true": {little, more}, "hello false": {more, little}} {
		r.listen(edge(0, filters...))
		for _, sent := range []string{"in chunks", "with its length", "over HTTP/2"} {
			status, body := r.post(t, sent, "hello")
			got := []string{<-seen, <-seen}
			if status != 200 || body != "hello" || got[0] != first || got[0] == got[1] || !slices.Contains(got, "he true") || !slices.Contains(got, "hello false") {
				t.Errorf("%s, %q first: %d, %q, the servers see %q", sent, first, status, body, got)
			}
			r.Await(t)
		}
	}
}

// A body that is malformed, that is cut, or whose framing is longer than the body may be, is not shown to a server.
func TestBodiesThatCannotBeCollected(t *testing.T) {
	r := newRig(t)
	r.cluster("web", 82)
	r.handle(t, 82, func(http.ResponseWriter, *http.Request) {})
	r.check(t, func(_ http.ResponseWriter, q *http.Request) { t.Errorf("the server is asked about %s", q.URL) })
	r.route(host("web", "web"))
	r.listen(edge(0, asking(&mesh.AuthzBody{MaxBytes: 1000})))
	for name, test := range map[string]struct {
		body   string
		status int
		reason flow.Reason
	}{
		"a chunk without a size":                 {"zz\r\n", 400, flow.BadFraming},
		"chunks with long extensions":            {strings.Repeat("1;"+strings.Repeat("e", 4000)+"\r\na\r\n", 30), 413, flow.PolicyDenied},
		"trailers that belong to the connection": {"1\r\na\r\n0\r\nTransfer-Encoding: chunked\r\n\r\n", 400, flow.BadFraming},
		"a body that is cut":                     {"5\r\na", 0, flow.DownstreamLeft},
	} {
		c := r.client(t)
		c.SetDeadline(time.Now().Add(nettest.Patience))
		io.WriteString(c, "POST / HTTP/1.1\r\nHost: web\r\nTransfer-Encoding: chunked\r\n\r\n"+test.body)
		if test.status == 0 {
			c.Close()
		} else if response, err := http.ReadResponse(c.read, nil); err != nil || response.StatusCode != test.status {
			t.Errorf("%s: %v, %v; want %d", name, response, err, test.status)
		}
		if got := r.Await(t); got.Reason != test.reason {
			t.Errorf("%s: the reason is %v, want %v", name, got.Reason, test.reason)
		}
		c.Close()
	}
}

// Routes change what a server sees of the bodies of their requests.
func TestRoutesChangeWhatAServerSeesOfBodies(t *testing.T) {
	r := newRig(t)
	r.cluster("web", 82)
	r.handle(t, 82, func(_ http.ResponseWriter, q *http.Request) { io.Copy(io.Discard, q.Body) })
	r.check(t, func(w http.ResponseWriter, q *http.Request) {
		body, _ := io.ReadAll(q.Body)
		w.Header().Set("X-Seen", digest(body))
		w.WriteHeader(403)
	})
	web := host("web", "web")
	check := func(path string, s mesh.CheckSettings) mesh.Route {
		return routed(path, "web", mesh.RoutePolicy{Filter: "authz", Check: &s})
	}
	web.Routes = []mesh.Route{
		check("/none", mesh.CheckSettings{NoBody: true}), check("/little", mesh.CheckSettings{Body: &mesh.AuthzBody{MaxBytes: 2, AllowPartial: true}}),
		routed("/off", "web", mesh.RoutePolicy{Filter: "authz", Disabled: true}), routed("/", "web"),
	}
	r.route(web)
	filter := asking(&mesh.AuthzBody{MaxBytes: 3})
	for _, disabled := range []bool{false, true} {
		filter.Disabled = disabled // routes enable it
		r.listen(edge(0, filter))
		for path, want := range map[string]string{"/none": digest(nil), "/little": digest([]byte("ab")), "/off": "", "/": digest([]byte("abc"))} {
			if disabled && path == "/" {
				want = ""
			}
			for _, http2 := range []bool{false, true} {
				response, err := r.once(t, http2).Post("http://web"+path, "text/plain", strings.NewReader("abc"))
				if err != nil {
					t.Fatal(err)
				}
				response.Body.Close()
				if got := response.Header.Get("X-Seen"); got != want {
					t.Errorf("%s, HTTP/2 %v, filter disabled %v: the server sees %q, want %q", path, http2, disabled, got, want)
				}
				r.Await(t)
			}
		}
	}
}

// A client cannot send the fields that claims are sent in, nor those that a server of external authorization sets, in trailers: over
// HTTP/1 such a request is malformed, over HTTP/2 they are removed. Other trailers pass.
func TestClaimsAreNotTakenFromTrailers(t *testing.T) {
	r := newRig(t)
	r.cluster("web", 82)
	r.handle(t, 82, func(w http.ResponseWriter, q *http.Request) {
		if _, err := io.Copy(io.Discard, q.Body); err != nil {
			return
		}
		fmt.Fprint(w, q.Trailer.Get("X-Group"), "|", q.Trailer.Get("X-User"), "|", q.Trailer.Get("X-Other"))
	})
	r.check(t, func(w http.ResponseWriter, _ *http.Request) { w.Header().Set("X-User", "a") })
	r.route(host("web", "web"))
	authz := asking(nil)
	authz.ExtAuthz.HTTP.Upstream = []mesh.StringMatcher{{Text: "x-user", IgnoreCase: true}}
	for _, body := range []*mesh.AuthzBody{nil, {MaxBytes: 100}} {
		authz.ExtAuthz.Body = body
		r.listen(edge(0, tokens(), authz))
		for name, want := range map[string]struct {
			status int
			body   string
		}{"X-Other": {200, "||v"}, "X-Group": {400, "||"}, "x-user": {400, "||"}} {
			for _, http2 := range []bool{false, true} {
				request, err := http.NewRequest("POST", "http://web/", io.MultiReader(strings.NewReader("body")))
				if err != nil {
					t.Fatal(err)
				}
				request.Trailer = http.Header{name: {"v"}}
				response, err := r.once(t, http2).Do(request)
				if err != nil {
					t.Fatalf("%s, HTTP/2 %v: %v", name, http2, err)
				}
				got, err := io.ReadAll(response.Body)
				response.Body.Close()
				if http2 {
					want.status = 200
				}
				if response.StatusCode != want.status || want.status == 200 && (string(got) != want.body || err != nil) {
					t.Errorf("%s, HTTP/2 %v: %d, %q, %v; want %d, %q", name, http2, response.StatusCode, got, err, want.status, want.body)
				}
				r.Await(t)
			}
		}
	}
}

// A server's answer changes the fields of a request. The route is chosen by them only if the filter asks for that
// (clear_route_cache).
func TestAnAnswerMayChangeTheRoute(t *testing.T) {
	r := newRig(t)
	r.cluster("web", 82)
	r.cluster("members", 83)
	r.serve(t, 82)
	r.serve(t, 83)
	r.check(t, func(w http.ResponseWriter, _ *http.Request) { w.Header().Set("X-Group", "members") })
	members := routed("/", "members")
	members.Match.Headers = []mesh.HeaderMatcher{{Name: "x-group", Kind: mesh.HeaderText, Text: mesh.StringMatcher{Text: "members"}}}
	web := host("web", "web")
	web.Routes = append([]mesh.Route{members}, web.Routes...)
	r.route(web)
	for reroute, want := range map[bool]string{false: "82", true: "83"} {
		filter := asking(nil)
		filter.ExtAuthz.Reroute, filter.ExtAuthz.HTTP.Upstream = reroute, []mesh.StringMatcher{{Text: "x-group"}}
		r.listen(edge(0, filter))
		for _, two := range []bool{false, true} {
			client := r.once(t, two)
			response, err := client.Get("http://web/")
			if err != nil {
				t.Fatal(err)
			}
			body, err := io.ReadAll(response.Body)
			response.Body.Close()
			if got := r.Await(t); err != nil || string(body) != want || got.Cluster != map[string]string{"82": "web", "83": "members"}[want] {
				t.Errorf("clear_route_cache %v, HTTP/2 %v: %q, %v; the record is %+v", reroute, two, body, err, got)
			}
			client.CloseIdleConnections()
		}
	}
}
