package gateway

import (
	"bufio"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/internal/serve/servetest"
)

// handle starts a server.
func (r *rig) handle(t *testing.T, port uint16, handler http.HandlerFunc) {
	t.Helper()
	server := &http.Server{Handler: handler}
	listener := r.Pod.Listen(t, "tcp4", r.At(port).String())
	served := make(chan struct{})
	go func() {
		defer close(served)
		server.Serve(listener)
	}()
	t.Cleanup(func() { server.Close(); <-served })
}

// edge is a manager for requests from outside of the mesh, whose policies are those of a filter.
func edge(hops uint32, filters ...mesh.HTTPFilter) *mesh.FilterChain {
	h := mesh.DefaultManager()
	h.RouteName, h.UseRemoteAddress, h.TrustedHops, h.NormalizePath, h.MergeSlashes = "http.8080", true, hops, true, true
	h.Filters = filters
	return &mesh.FilterChain{HTTP: h}
}

// deny is a filter that denies what meets both conditions.
func deny(permission, principal mesh.Condition) mesh.HTTPFilter {
	return mesh.HTTPFilter{Name: "rbac", RBAC: &mesh.RBAC{Rules: &mesh.Rules{Action: mesh.Deny, Policies: []mesh.AccessPolicy{{
		Name: "p", Permission: permission, Principal: principal,
	}}}}}
}

var anything = mesh.Condition{Kind: mesh.ConditionTrue}

func underPath(path string) mesh.Condition {
	return mesh.Condition{Kind: mesh.ConditionPath, Text: &mesh.StringMatcher{Kind: mesh.MatchPrefix, Text: path}}
}

func clients(prefix string) mesh.Condition {
	return mesh.Condition{Kind: mesh.ConditionClient, Addresses: netip.MustParsePrefix(prefix)}
}

// ask sends a request for a path, with lines of further fields.
func (c *client) ask(t *testing.T, target, fields string) (int, string) {
	t.Helper()
	c.SetDeadline(time.Now().Add(nettest.Patience))
	servetest.Send(t, c, "GET "+target+" HTTP/1.1\r\nHost: web\r\n"+fields+"\r\n")
	response, err := http.ReadResponse(c.read, nil)
	if err != nil {
		t.Fatal(err)
	}
	body, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatal(err)
	}
	return response.StatusCode, string(body)
}

// Policies see the client's address as far as proxies are trusted, and so do servers and records.
func TestPoliciesOfAGatewaySeeTheClient(t *testing.T) {
	r := newRig(t)
	r.cluster("web", 82)
	r.route(host("web", "web"))
	r.handle(t, 82, func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprint(w, r.Header.Get("X-Envoy-External-Address"), " ", r.Header["X-Forwarded-For"], " ", r.Header.Get("X-Forwarded-Proto"))
	})
	const spoofed = "X-Forwarded-For: 203.0.113.7\r\nX-Forwarded-Proto: https\r\n"
	for name, c := range map[string]struct {
		hops   uint32
		fields string
		denied string // clients that the policy denies
		status int
		client string
	}{
		"a client that names another address":    {0, spoofed, "203.0.113.0/24", 200, ""},
		"the same, where a proxy is trusted":     {1, spoofed, "203.0.113.0/24", 403, "203.0.113.7"},
		"another one, where a proxy is trusted":  {1, spoofed, "192.0.2.0/24", 200, "203.0.113.7"},
		"the peer, where a proxy is trusted":     {1, "", "203.0.113.0/24", 200, ""},
		"behind two proxies, of which one is":    {2, spoofed, "203.0.113.0/24", 200, ""},
		"a client that hides among several":      {1, "X-Forwarded-For: 192.0.2.1, 203.0.113.7\r\n", "203.0.113.0/24", 403, "203.0.113.7"},
		"a client whose field is not an address": {1, "X-Forwarded-For: 203.0.113.7:80\r\n", "203.0.113.0/24", 200, ""},
	} {
		r.listen(edge(c.hops, deny(anything, clients(c.denied))))
		conn := r.client(t)
		status, body := conn.ask(t, "/", c.fields)
		if status != c.status {
			t.Errorf("%s: status %d, want %d", name, status, c.status)
		}
		record := r.Await(t)
		client := c.client
		if client == "" {
			client = conn.LocalAddr().(*net.TCPAddr).IP.String()
		}
		if got := record.Downstream.Addr().String(); got != client {
			t.Errorf("%s: the record has the client %s, want %s", name, got, client)
		}
		if status == 200 && !strings.HasPrefix(body, client+" ") {
			t.Errorf("%s: the server sees %q, want the client %s", name, body, client)
		}
		if want := (record.Reason == flow.PolicyDenied); want != (c.status == 403) {
			t.Errorf("%s: the reason is %v", name, record.Reason)
		}
		conn.Close()
	}
}

// Routes and policies of a gateway go by the normal form of a path, with and without policies.
func TestAGatewayRoutesByNormalPaths(t *testing.T) {
	r := newRig(t)
	r.cluster("web", 82)
	r.cluster("open", 83)
	r.handle(t, 82, func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, "web ", r.RequestURI) })
	r.handle(t, 83, func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, "open ", r.RequestURI) })
	web := host("web", "web")
	open := host("web", "open").Routes[0]
	open.Match.Path = "/open/"
	web.Routes = append([]mesh.Route{open}, web.Routes...)
	r.route(web)
	for _, filters := range [][]mesh.HTTPFilter{nil, {deny(underPath("/closed"), anything)}} {
		r.listen(edge(0, filters...))
		conn := r.client(t)
		for target, want := range map[string]string{
			"/open/a": "open /open/a", "/open/../b": "web /b", "//open//a": "open /open/a", "/x/../open/%61?q=/../": "open /open/a?q=/../",
			"/open/../closed": "web /closed", "/%63losed": "web /closed",
		} {
			status, body := conn.ask(t, target, "")
			if denied := filters != nil && want == "web /closed"; (status == 403) != denied || !denied && body != want {
				t.Errorf("%d filters, %s: %d, %q; want %q", len(filters), target, status, body, want)
			}
			r.Await(t)
		}
		conn.Close()
	}
}

// A tunnel would carry requests that no route has: it is not opened, whatever target CONNECT has.
func TestAGatewayOpensNoTunnel(t *testing.T) {
	r := newRig(t)
	r.cluster("web", 82)
	r.route(host("web", "web"))
	r.handle(t, 82, func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, "web ", r.RequestURI) })
	for _, filters := range [][]mesh.HTTPFilter{nil, {deny(underPath("/closed"), anything)}} {
		r.listen(edge(0, filters...))
		for _, target := range []string{"web:80", "/", "/x", "//", "http://web/", "http://web", "*"} {
			conn := r.client(t)
			conn.SetDeadline(time.Now().Add(nettest.Patience))
			servetest.Send(t, conn, "CONNECT "+target+" HTTP/1.1\r\nHost: web\r\n\r\n")
			response, err := http.ReadResponse(conn.read, nil)
			if err != nil || response.StatusCode/100 != 4 {
				t.Errorf("CONNECT %s: %+v, %v", target, response, err)
			}
			conn.Close()
			r.Await(t)
		}
	}
}

// A protocol that is not configured could carry requests that no route has. An upgrade to h2c is not forwarded at all.
func TestAGatewayForwardsConfiguredUpgradesOnly(t *testing.T) {
	r := newRig(t)
	r.cluster("web", 82)
	r.route(host("web", "web"))
	r.handle(t, 82, func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprint(w, r.Header["Connection"], r.Header["Upgrade"])
	})
	chain := edge(0)
	chain.HTTP.Upgrades = []mesh.Upgrade{{Protocol: "websocket"}, {Protocol: "off", Disabled: true}}
	r.listen(chain)
	for fields, want := range map[string]string{
		"Connection: Upgrade\r\nUpgrade: WebSocket\r\n":                   "200 [Upgrade] [WebSocket]",
		"Connection: keep-alive, upgrade\r\nUpgrade: tls/1.3\r\n":         "403 ",
		"Connection: Upgrade\r\nUpgrade: off\r\n":                         "403 ",
		"Connection: Upgrade\r\nUpgrade: websocket\r\nupgrade: other\r\n": "403 ",
		"Connection: Upgrade\r\nUpgrade: \r\nUpgrade: other\r\n":          "403 ",
		"Connection: Upgrade\r\nUpgrade: \r\n":                            "200 [] []",
		"Connection: Upgrade\r\nUpgrade: websocket, other\r\n":            "403 ",
		"Upgrade: other\r\n": "200 [] []",
		"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n": "200 [] []",
		"Connection: Upgrade\r\nUpgrade: websocket, H2C\r\n":                                  "200 [] []",
	} {
		conn := r.client(t)
		status, body := conn.ask(t, "/", fields)
		if got := fmt.Sprint(status, " ", body); got != want {
			t.Errorf("%q: %s, want %s", fields, got, want)
		}
		conn.Close()
		if record := r.Await(t); status == 403 && record.Details != "upgrade_failed" {
			t.Errorf("%q: %s", fields, record.Details)
		}
	}
}

// A server sees the host by which a request was routed, whatever Host stands beside a target in absolute form.
func TestAServerSeesTheHostThatWasRouted(t *testing.T) {
	r := newRig(t)
	r.cluster("web", 82)
	r.route(host("web", "web"))
	conns := r.Listen(t, "82")
	r.listen(edge(0))
	for target, want := range map[string]string{"http://web/a?b": "/a?b", "http://web": "/", "HTTP://web/": "/", "http://web?q": "/?q"} {
		conn := r.client(t)
		servetest.Send(t, conn, "GET "+target+" HTTP/1.1\r\nHost: private\r\n\r\n")
		server := servetest.Take(t, conns)
		request, err := http.ReadRequest(bufio.NewReader(server))
		if err != nil || request.RequestURI != want || request.Host != "web" {
			t.Errorf("%s: the server sees %+v, %v", target, request, err)
		}
		conn.Close()
		server.Close()
		r.Await(t)
	}
}

// A policy that is pushed later counts for the next request of an open connection.
func TestAPolicyOfAGatewayCountsForOpenConnections(t *testing.T) {
	r := newRig(t)
	r.cluster("web", 82)
	r.route(host("web", "web"))
	r.serve(t, 82)
	r.listen(edge(0))
	conn := r.client(t)
	for _, c := range []struct {
		chain *mesh.FilterChain
		want  int
	}{{edge(0), 200}, {edge(0, deny(underPath("/"), anything)), 403}, {edge(0), 200}} {
		r.listen(c.chain)
		if status, _ := conn.ask(t, "/", ""); status != c.want {
			t.Errorf("status %d, want %d", status, c.want)
		}
		r.Await(t)
	}
	r.Follow(true)
	refused := edge(0)
	refused.Policies = []mesh.NetworkFilter{{Name: "rbac", RBAC: deny(anything, anything).RBAC}}
	r.listen(refused)
	if status, _ := conn.ask(t, "/", ""); status != 403 {
		t.Errorf("with a policy of connections: status %d, want 403", status)
	}
	if record := r.Await(t); record.Explanation != deniedByAll {
		t.Errorf("with a policy of connections the explanation is %q", record.Explanation)
	}
	other := r.client(t)
	servetest.Send(t, other, "GET / HTTP/1.1\r\nHost: web\r\n\r\n")
	other.SetReadDeadline(time.Now().Add(nettest.Patience))
	if n, err := other.Read(make([]byte, 1)); n != 0 || !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("a new connection: %d bytes, %v; want a reset", n, err)
	}
	if record := r.Await(t); record.Reason != flow.PolicyDenied || record.Explanation != deniedByAll || record.Termination != "rbac_access_denied_matched_policy[p]" {
		t.Errorf("a new connection ends by %v", record.Reason)
	}
	conn.Close()
}

// The secret of an issuer, and its key set.
var (
	secret = []byte("a secret of at least 32 bytes, as HS256 needs")
	keys   = `{"keys":[{"kty":"oct","alg":"HS256","k":"` + base64.RawURLEncoding.EncodeToString(secret) + `"}]}`
)

// token returns the header field with a token of the issuer "me".
func token(claims string) string {
	text := base64.RawURLEncoding.EncodeToString([]byte(`{"alg":"HS256"}`)) + "." + base64.RawURLEncoding.EncodeToString([]byte(`{"iss":"me"`+claims+`}`))
	mac := hmac.New(sha256.New, secret)
	mac.Write([]byte(text))
	return "Authorization: Bearer " + text + "." + base64.RawURLEncoding.EncodeToString(mac.Sum(nil)) + "\r\n"
}

// tokens is a filter that verifies the tokens that a request has.
func tokens() mesh.HTTPFilter {
	return mesh.HTTPFilter{Name: "jwt", JWT: &mesh.JWT{
		Providers: []mesh.JWTProvider{{
			Name: "me", Issuer: "me", Keys: []byte(keys), Forward: true, Metadata: "payload", Reroute: true,
			ClaimHeaders: []mesh.ClaimHeader{{Header: "x-group", Claim: "group"}},
		}},
		Rules: []mesh.JWTRule{{Match: mesh.RouteMatch{Path: "/"}, Requires: mesh.JWTRequirement{Kind: mesh.JWTAllowMissing}}},
		Named: []mesh.NamedRequirement{{Name: "needed", JWTRequirement: mesh.JWTRequirement{Kind: mesh.JWTProvided, Name: "me"}}},
	}}
}

// routed is a route to a cluster that changes policies.
func routed(path, cluster string, own ...mesh.RoutePolicy) mesh.Route {
	r := host("web", cluster).Routes[0]
	r.Name, r.Match.Path, r.Filters.Policies = path, path, own
	return r
}

// Routes change the policies for their requests, and may depend on the claims of verified tokens.
func TestRoutesChangePoliciesAndFollowClaims(t *testing.T) {
	r := newRig(t)
	names := []string{"open", "members", "web"}
	for i, name := range names {
		r.cluster(name, uint16(82+i))
		r.handle(t, uint16(82+i), func(w http.ResponseWriter, q *http.Request) { fmt.Fprint(w, name, " ", q.Header.Get("X-Group")) })
	}
	byClaim := routed("/", "members")
	byClaim.Match.Metadata = []mesh.MetadataMatcher{{
		Filter: "envoy.filters.http.jwt_authn", Path: []string{"payload", "group"},
		Value: mesh.ValueMatcher{Kind: mesh.ValueText, Text: mesh.StringMatcher{Text: "members"}},
	}}
	byClaim.Filters.Policies = []mesh.RoutePolicy{{Filter: "rbac", RBAC: &mesh.RBAC{}}}
	refused := routed("/refused", "web")
	refused.Refused = true
	web := host("web", "web")
	web.Routes = []mesh.Route{
		routed("/open", "open", mesh.RoutePolicy{Filter: "rbac", Disabled: true}),
		routed("/token", "open", mesh.RoutePolicy{Filter: "jwt", Requirement: "needed"}, mesh.RoutePolicy{Filter: "rbac", Disabled: true}),
		routed("/unknown", "open", mesh.RoutePolicy{Filter: "jwt", Requirement: "of another filter"}),
		routed("/no-tokens", "open", mesh.RoutePolicy{Filter: "jwt", Disabled: true}, mesh.RoutePolicy{Filter: "rbac", Disabled: true}),
		routed("/strict", "open", mesh.RoutePolicy{Filter: "rbac", RBAC: &mesh.RBAC{Rules: &mesh.Rules{Action: mesh.Allow}}}),
		routed("/confused", "open", mesh.RoutePolicy{Filter: "rbac", Requirement: "needed"}),
		refused, byClaim, routed("/", "web"),
	}
	r.route(web)
	r.listen(edge(0, tokens(), deny(underPath("/"), anything)))
	members := token(`,"group":"members"`)
	c := r.client(t)
	for name, test := range map[string]struct {
		target, fields string
		status         int
		body           string
	}{
		"a policy that is turned off":                 {"/open", "", 200, "open "},
		"the same by another path":                    {"/x/../open", "", 200, "open "},
		"a path that leaves it":                       {"/open/../x", "", 403, ""},
		"a field that only a claim makes":             {"/open", "X-Group: members\r\n", 200, "open "},
		"the same without a filter of tokens":         {"/no-tokens", "X-Group: members\r\n", 200, "open "},
		"a wrong token where none is verified":        {"/no-tokens", token("x"), 200, "open "},
		"a wrong token elsewhere":                     {"/open", token("x"), 401, ""},
		"no token where a route requires one":         {"/token", "", 401, ""},
		"a token where a route requires one":          {"/token", token(""), 200, "open "},
		"a requirement that is not there":             {"/unknown", token(""), 401, ""},
		"a policy that allows nothing":                {"/strict", "", 403, ""},
		"a change for a filter of another type":       {"/confused", token(""), 503, ""},
		"a route that is refused":                     {"/refused", members, 503, ""},
		"no claims":                                   {"/", "", 403, ""},
		"other claims":                                {"/", token(`,"group":"others"`), 403, ""},
		"a field in the place of claims":              {"/", "X-Group: members\r\n", 403, ""},
		"claims that choose a route with its policy":  {"/", members, 200, "members members"},
		"claims of a token that is not verified":      {"/", strings.Replace(members, ".", ".e30", 1), 401, ""},
		"claims do not matter for routes before them": {"/open", members, 200, "open members"},
	} {
		status, body := c.ask(t, test.target, test.fields)
		if status != test.status || status == 200 && body != test.body {
			t.Errorf("%s: %d, %q; want %d, %q", name, status, body, test.status, test.body)
		}
		r.Await(t)
	}
	c.Close()
}

// hold sends a request and the beginning of the next one with it, so that the gateway has read that when it has answered. It
// returns the status of the first one.
func hold(t *testing.T, conn net.Conn, read *bufio.Reader, host string) int {
	t.Helper()
	conn.SetDeadline(time.Now().Add(nettest.Patience))
	begun := "GET / HTTP/1.1\r\nHost: " + host + "\r\n"
	servetest.Send(t, conn, begun+"\r\n"+begun)
	response, err := http.ReadResponse(read, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(io.Discard, response.Body); err != nil {
		t.Fatal(err)
	}
	return response.StatusCode
}

// What a client says of itself is removed from a request that began while its filter chain was refused, and ends after the
// push that mends the chain.
func TestTheEdgeIsThatOfTheEndOfAHead(t *testing.T) {
	r := newRig(t)
	r.cluster("web", 82)
	r.route(host("web", "web"))
	r.handle(t, 82, func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprint(w, r.Header["X-Forwarded-For"], r.Header["X-Envoy-Internal"])
	})
	r.listen(edge(0))
	conn := r.client(t)
	defer conn.Close()
	if status, _ := conn.ask(t, "/", ""); status != 200 {
		t.Fatalf("status %d", status)
	}
	refused := edge(0)
	refused.Refused = true
	r.listen(refused)
	if status := hold(t, conn, conn.read, "web"); status == 200 {
		t.Error("the chain is not refused")
	}
	r.listen(edge(0))
	servetest.Send(t, conn, "X-Forwarded-For: 203.0.113.7\r\nX-Envoy-Internal: true\r\n\r\n")
	response, err := http.ReadResponse(conn.read, nil)
	if err != nil {
		t.Fatal(err)
	}
	body, _ := io.ReadAll(response.Body)
	if want := "[203.0.113.7," + conn.LocalAddr().(*net.TCPAddr).IP.String() + "] []"; string(body) != want {
		t.Errorf("status %d, and the server sees %q, want %q", response.StatusCode, body, want)
	}
}

// A policy that is pushed later ends a connection of bytes that it denies, and no other one.
func TestAPolicyOfAGatewayEndsConnectionsOfBytes(t *testing.T) {
	r := newRig(t)
	r.Follow(true)
	conns := r.Listen(t, "9001")
	r.cluster("tcp", 9001)
	bytes := func(filters ...mesh.NetworkFilter) *mesh.FilterChain {
		return &mesh.FilterChain{TCP: &mesh.TCPProxy{Clusters: []mesh.TCPCluster{{Name: "tcp", Weight: 1}}}, Policies: filters}
	}
	r.listen(bytes())
	conn := r.Dial(t, r.At(port))
	server := servetest.Take(t, conns)
	servetest.Send(t, server, "ready")
	servetest.Expect(t, conn, "ready")
	r.listen(bytes(mesh.NetworkFilter{Name: "rbac", RBAC: deny(anything, clients("203.0.113.0/24")).RBAC}))
	servetest.Send(t, conn, "goes on")
	servetest.Expect(t, server, "goes on")
	r.listen(bytes(mesh.NetworkFilter{Name: "rbac", RBAC: deny(anything, anything).RBAC}))
	servetest.ExpectEnd(t, conn, syscall.ECONNRESET)
	if got := r.Await(t); got.Reason != flow.PolicyDenied || got.Explanation != deniedByAll || got.Termination != "rbac_access_denied_matched_policy[p]" {
		t.Errorf("the record is %+v", got)
	}
}

// The record of a request that a policy of a gateway denies names that policy, and has the reason why each other one does not
// apply while records are followed, over both versions of HTTP.
func TestAGatewayExplainsDeniedRequests(t *testing.T) {
	r := newRig(t)
	r.cluster("web", 82)
	r.route(host("web", "web"))
	r.serve(t, 82)
	deny := deny(underPath("/closed"), anything)
	deny.RBAC.Rules.Policies[0].Name = "closed"
	deny.RBAC.Rules.Policies = append(deny.RBAC.Rules.Policies, mesh.AccessPolicy{Name: "others", Permission: underPath("/other"), Principal: anything})
	allow := mesh.HTTPFilter{Name: "allow", RBAC: &mesh.RBAC{Rules: &mesh.Rules{Action: mesh.Allow, Policies: []mesh.AccessPolicy{
		{Name: "far", Permission: anything, Principal: clients("203.0.113.0/24")},
		{Name: "open", Permission: underPath("/open"), Principal: anything},
	}}}}
	r.listen(edge(0, deny, allow))
	r.Follow(true)
	for _, two := range []bool{false, true} {
		client := r.once(t, two)
		for path, c := range map[string]struct {
			by    string
			lines []string
		}{
			"/open": {},
			"/x/../closed": {"closed", []string{
				`closed: applies, since path "/closed" is with prefix "/closed" and anything`,
				`others: does not apply, since path "/closed" is not with prefix "/other"`,
			}},
			"/": {"none", []string{`far: does not apply, since `, `open: does not apply, since path "/" is not with prefix "/open"`}},
		} {
			request, err := http.NewRequest("GET", "http://web"+path, nil)
			if err != nil {
				t.Fatal(err)
			}
			response, err := client.Do(request)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := io.Copy(io.Discard, response.Body); err != nil {
				t.Fatal(err)
			}
			response.Body.Close()
			got := r.Await(t)
			if c.by == "" {
				if response.StatusCode != 200 || got.Explanation != "" {
					t.Errorf("%s, HTTP/2 %v: %s, the record is %+v", path, two, response.Status, got)
				}
				continue
			}
			lines := strings.Split(got.Explanation, "\n")
			details := "rbac_access_denied_matched_policy[" + c.by + "]"
			if response.StatusCode != 403 || got.Reason != flow.PolicyDenied || got.Details != details || got.Upstream.IsValid() || len(lines) != len(c.lines) {
				t.Errorf("%s, HTTP/2 %v: %s, the record is %+v", path, two, response.Status, got)
				continue
			}
			for i := range lines {
				if !strings.HasPrefix(lines[i], c.lines[i]) {
					t.Errorf("%s, HTTP/2 %v: %q, want %q", path, two, lines[i], c.lines[i])
				}
			}
		}
		client.CloseIdleConnections()
	}
}

const deniedByAll = "p: applies, since anything and anything" // the explanation of a policy that denies everything

// A policy that asks a server about connections, and is pushed later, counts for open connections of HTTP: they were not asked
// about, so they end.
func TestAServerThatIsAskedLaterEndsConnections(t *testing.T) {
	r := newRig(t)
	r.cluster("web", 82)
	r.route(host("web", "web"))
	r.serve(t, 82)
	r.listen(edge(0))
	conn := r.client(t)
	defer conn.Close()
	if status := hold(t, conn, conn.read, "web"); status != 200 {
		t.Fatalf("status %d", status)
	}
	asking := edge(0)
	asking.Policies = []mesh.NetworkFilter{{Name: "ask", ExtAuthz: &mesh.ExtAuthz{GRPC: &mesh.GRPCService{Cluster: "none"}}}}
	r.listen(asking)
	servetest.Send(t, conn, "\r\n")
	response, err := http.ReadResponse(conn.read, nil)
	if err != nil || response.StatusCode != 404 || !response.Close {
		t.Errorf("%+v, %v", response, err)
	}
}
