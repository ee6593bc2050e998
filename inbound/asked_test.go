package inbound

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/internal/serve/servetest"
)

// configure puts filters into all chains of a mode, and clusters with one endpoint each.
func (m *meshRig) configure(t *testing.T, mode string, filters []mesh.HTTPFilter, network []mesh.NetworkFilter, servers map[string]netip.AddrPort) {
	t.Helper()
	var chains []*mesh.FilterChain
	for _, c := range modes[mode] {
		changed := *c
		if c.HTTP != nil {
			changed.HTTP = &mesh.HTTPManager{Routes: &mesh.Routes{}, NormalizePath: true, MergeSlashes: true, Filters: filters}
		} else {
			changed.Policies = network
		}
		chains = append(chains, &changed)
	}
	edit := snapshotOf(t, chains, !strings.HasPrefix(mode, "DISABLE")).Edit()
	for name, address := range servers {
		edit.SetCluster(name, &mesh.Cluster{
			Name: name, Discovery: mesh.Static, ConnectTimeout: nettest.Patience,
			Breakers: mesh.Breakers{Connections: 1024, Pending: 1024, Requests: 1024, Retries: 3},
			Hosts:    &mesh.Assignment{Localities: []mesh.Locality{{Endpoints: []mesh.Endpoint{{Address: address, Weight: 1}}}}},
		})
	}
	s, _ := edit.Snapshot()
	m.plane.InForce.Store(s)
}

// custom are the filters that istiod makes of a policy with the action CUSTOM for paths that begin with /admin.
func custom(e *mesh.ExtAuthz) []mesh.HTTPFilter {
	e.When = &mesh.MetadataMatcher{
		Filter: "envoy.filters.http.rbac", Path: []string{"istio_ext_authz_shadow_effective_policy_id"},
		Value: mesh.ValueMatcher{Kind: mesh.ValueText, Text: mesh.StringMatcher{Kind: mesh.MatchPrefix, Text: "istio-ext-authz"}},
	}
	e.Enabled = mesh.Fraction{Numerator: 100, Denominator: 100}
	if e.StatusOnError == 0 {
		e.StatusOnError = 403
	}
	return []mesh.HTTPFilter{
		{Name: "envoy.filters.http.rbac", RBAC: &mesh.RBAC{ShadowPrefix: "istio_ext_authz_", Shadow: &mesh.Rules{Action: mesh.Deny, Policies: []mesh.AccessPolicy{
			{Name: "istio-ext-authz-default-ns[shop]-policy[p]-rule[0]", Permission: ofAdmin, Principal: anything},
		}}}},
		{Name: "envoy.filters.http.ext_authz", ExtAuthz: e},
	}
}

// listenLocally serves HTTP on loopback, in both versions without TLS.
func listenLocally(t *testing.T, handler http.HandlerFunc) netip.AddrPort {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var protocols http.Protocols
	protocols.SetHTTP1(true)
	protocols.SetUnencryptedHTTP2(true)
	server := &http.Server{Handler: handler, Protocols: &protocols}
	go server.Serve(l)
	t.Cleanup(func() { server.Close() })
	return l.Addr().(*net.TCPAddr).AddrPort()
}

func names(list ...string) (matchers []mesh.StringMatcher) {
	for _, n := range list {
		matchers = append(matchers, mesh.StringMatcher{Text: n, IgnoreCase: true})
	}
	return matchers
}

// ask sends a request, and returns the response with its body.
func (c *client) ask(t *testing.T, target, fields string) (*http.Response, string) {
	t.Helper()
	io.WriteString(c, "GET "+target+" HTTP/1.1\r\nHost: shop.example\r\n"+fields+"\r\n")
	response, err := http.ReadResponse(c.in, nil)
	if err != nil {
		t.Fatalf("%s: %v", target, err)
	}
	body, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatal(err)
	}
	return response, string(body)
}

// A server decides by HTTP about the requests that a policy with the action CUSTOM matches.
func TestAServerDecidesByHTTP(t *testing.T) {
	m := newMeshRig(t, "STRICT, HTTP")
	var asked atomic.Pointer[http.Request]
	at := listenLocally(t, func(w http.ResponseWriter, r *http.Request) {
		asked.Store(r.Clone(r.Context()))
		w.Header().Set("Seen-Sub", "from the server")
		w.Header().Set("X-Hidden", "x")
		w.Header().Add("Set-Cookie", "a=1")
		w.Header().Add("Set-Cookie", "b=2")
		switch r.Header.Get("Authorization") {
		case "good":
			w.Header().Set("X-Envoy-Auth-Headers-To-Remove", "authorization, host")
		case "error":
			w.WriteHeader(500)
		default:
			w.Header().Set("Location", "/login")
			w.WriteHeader(302)
			io.WriteString(w, "log in")
		}
	})
	m.configure(t, "STRICT, HTTP", custom(&mesh.ExtAuthz{
		Headers: names("x-role"), StatusOnError: 503,
		HTTP: &mesh.HTTPAuthz{
			Service: mesh.HTTPService{Cluster: "checker", Timeout: nettest.Patience}, PathPrefix: "/check", Add: []mesh.NamedValue{{Name: "x-added", Value: "v"}},
			Upstream: names("seen-sub"), Denied: names("set-cookie"), Allowed: names("set-cookie"),
		},
	}), nil, map[string]netip.AddrPort{"checker": at})
	c := m.connect(t, 81)

	response, _ := c.ask(t, "/public", "")
	if got := m.Await(t); response.StatusCode != 200 || asked.Load() != nil || got.Reason != flow.Completed {
		t.Errorf("a request that no policy matches: %d, asked %v", response.StatusCode, asked.Load())
	}

	response, _ = c.ask(t, "/x/../admin?q", "Authorization: good\r\nX-Role: a\r\nx-role: b\r\nX-Other: c\r\nSeen-Sub: forged\r\n")
	m.Await(t)
	r := asked.Load()
	if r.RequestURI != "/check/admin?q" || r.Host != "shop.example" || strings.Join(r.Header["X-Role"], ",") != "a,b" || r.Header.Get("X-Other") != "" || r.Header.Get("X-Added") != "v" {
		t.Errorf("the server was asked %s at %s with %v", r.RequestURI, r.Host, r.Header)
	}
	if response.StatusCode != 200 || response.Header.Get("Seen-Claims") != "from the server, false, false" || response.Header.Get("Seen-Target") != "/admin?q" {
		t.Errorf("an allowed request: %d, the workload saw %v", response.StatusCode, response.Header)
	}
	if cookies := response.Header["Set-Cookie"]; len(cookies) != 2 || response.Header.Get("X-Hidden") != "" {
		t.Errorf("the client sees %v", response.Header)
	}

	response, body := c.ask(t, "/admin", "")
	got := m.Await(t)
	if response.StatusCode != 302 || body != "log in" || response.Header.Get("Location") != "/login" || len(response.Header["Set-Cookie"]) != 2 || response.Header.Get("Seen-Sub") != "" {
		t.Errorf("a denied request: %d, %q, %v", response.StatusCode, body, response.Header)
	}
	if got.Reason != flow.PolicyDenied || got.Details != "ext_authz_denied" || got.Flags != "UAEX" {
		t.Errorf("its record has %v, %s, %s", got.Reason, got.Details, got.Flags)
	}

	response, _ = c.ask(t, "/admin", "Authorization: error\r\n")
	if got := m.Await(t); response.StatusCode != 503 || got.Details != "ext_authz_error" {
		t.Errorf("without an answer: %d, %s", response.StatusCode, got.Details)
	}
	c.Close()
}

// A request that waits for an answer holds back no other one, and its client may leave.
func TestAWaitingRequestHoldsOnlyItself(t *testing.T) {
	m := newMeshRig(t, "STRICT, HTTP")
	release, reached := make(chan struct{}), make(chan struct{}, 2)
	at := listenLocally(t, func(w http.ResponseWriter, r *http.Request) {
		reached <- struct{}{}
		select {
		case <-release:
		case <-r.Context().Done():
		}
	})
	m.configure(t, "STRICT, HTTP", custom(&mesh.ExtAuthz{
		HTTP: &mesh.HTTPAuthz{Service: mesh.HTTPService{Cluster: "checker", Timeout: nettest.Patience}},
	}), nil, map[string]netip.AddrPort{"checker": at})
	waiting, leaving, other := m.connect(t, 81), m.connect(t, 81), m.connect(t, 81)
	io.WriteString(waiting, "GET /admin HTTP/1.1\r\nHost: a\r\n\r\n")
	<-reached
	io.WriteString(leaving, "GET /admin HTTP/1.1\r\nHost: a\r\n\r\n")
	<-reached
	if response, _ := other.ask(t, "/", ""); response.StatusCode != 200 {
		t.Errorf("another request: %d", response.StatusCode)
	}
	m.Await(t)
	leaving.Close()
	if got := m.Await(t); got.Reason != flow.DownstreamLeft {
		t.Errorf("the record of a client that left has %v", got.Reason)
	}
	close(release)
	if response, err := http.ReadResponse(waiting.in, nil); err != nil || response.StatusCode != 200 {
		t.Errorf("the request that waited: %v, %v", response, err)
	}
	m.Await(t)
	waiting.Close()
	other.Close()
}

// Keys are fetched when a token needs them. When they are renewed, tokens of the new key pass, and requests meanwhile do too.
func TestKeysAreFetchedAndRotated(t *testing.T) {
	m := newMeshRig(t, "STRICT, HTTP")
	token := func(kid string) (header string, key jose.JSONWebKey) {
		private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: private, KeyID: kid}}, nil)
		if err != nil {
			t.Fatal(err)
		}
		signed, err := signer.Sign([]byte(`{"iss":"me"}`))
		if err != nil {
			t.Fatal(err)
		}
		text, err := signed.CompactSerialize()
		if err != nil {
			t.Fatal(err)
		}
		return "Authorization: Bearer " + text + "\r\n", jose.JSONWebKey{Key: private.Public(), KeyID: kid}
	}
	old, oldKey := token("old")
	next, nextKey := token("next")
	var keys atomic.Pointer[jose.JSONWebKeySet]
	var fetched atomic.Int32
	at := listenLocally(t, func(w http.ResponseWriter, r *http.Request) {
		fetched.Add(1)
		if r.URL.Path != "/keys" || r.Host != "issuer.example" {
			w.WriteHeader(404)
		}
		json.NewEncoder(w).Encode(keys.Load())
	})
	const cached = 50 * time.Millisecond
	keys.Store(&jose.JSONWebKeySet{Keys: []jose.JSONWebKey{oldKey}})
	m.configure(t, "STRICT, HTTP", []mesh.HTTPFilter{{Name: "jwt", JWT: &mesh.JWT{
		Providers: []mesh.JWTProvider{{Name: "me", Issuer: "me", ClockSkew: time.Minute, Remote: &mesh.RemoteKeys{
			Service: mesh.HTTPService{URI: "http://issuer.example/keys", Cluster: "issuer", Timeout: nettest.Patience}, CacheFor: cached,
		}}},
		Rules: []mesh.JWTRule{{Match: mesh.RouteMatch{Path: "/"}, Requires: mesh.JWTRequirement{Kind: mesh.JWTProvided, Name: "me"}}},
	}}}, nil, map[string]netip.AddrPort{"issuer": at})
	c := m.connect(t, 81)
	status := func(fields string) int {
		response, _ := c.ask(t, "/", fields)
		m.Await(t)
		return response.StatusCode
	}
	if got := status(""); got != 401 || fetched.Load() != 0 {
		t.Errorf("without a token: %d, after %d fetches", got, fetched.Load())
	}
	if got := status(next); got != 401 {
		t.Errorf("with a token of another key: %d", got)
	}
	if got := status(old); got != 200 {
		t.Errorf("with a token: %d, after %d fetches", got, fetched.Load())
	}
	keys.Store(&jose.JSONWebKeySet{Keys: []jose.JSONWebKey{oldKey, nextKey}})
	for deadline := time.Now().Add(nettest.Patience); status(next) != 200; {
		if got := status(old); got != 200 {
			t.Fatalf("with a token of the old key, while the new one is not known yet: %d", got)
		}
		if time.Now().After(deadline) {
			t.Fatalf("with a token of the new key: still refused, after %d fetches", fetched.Load())
		}
	}
	c.Close()
}

// A server that sends no keys, or too many bytes, leaves the door closed.
func TestKeysThatCannotBeFetchedVerifyNothing(t *testing.T) {
	m := newMeshRig(t, "STRICT, HTTP")
	for name, answer := range map[string]string{"no keys": `{"keys":[]}`, "no JSON": "<html>", "too long": `{"keys":[],"x":"` + strings.Repeat("x", 2<<20) + `"}`} {
		at := listenLocally(t, func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, answer) })
		m.configure(t, "STRICT, HTTP", []mesh.HTTPFilter{{Name: "jwt", JWT: &mesh.JWT{
			Providers: []mesh.JWTProvider{{Name: "me", Remote: &mesh.RemoteKeys{
				Service: mesh.HTTPService{URI: "http://issuer.example/" + fmt.Sprint(len(answer)), Cluster: "issuer", Timeout: nettest.Patience}, CacheFor: time.Minute,
			}}},
			Rules: []mesh.JWTRule{{Match: mesh.RouteMatch{Path: "/"}, Requires: mesh.JWTRequirement{Kind: mesh.JWTProvided, Name: "me"}}},
		}}}, nil, map[string]netip.AddrPort{"issuer": at})
		c := m.connect(t, 81)
		const token = "eyJhbGciOiJFUzI1NiJ9.e30.AAAA"
		if response, body := c.ask(t, "/", "Authorization: Bearer "+token+"\r\n"); response.StatusCode != 401 || body != "Jwks remote fetch is failed" {
			t.Errorf("%s: %d, %q", name, response.StatusCode, body)
		}
		m.Await(t)
		c.Close()
	}
}

// A stream that waits for an answer is decided about by it. Others of its connection are served and asked about meanwhile.
func TestStreamsWaitForAnswers(t *testing.T) {
	m := newMeshRig(t, "STRICT, HTTP")
	release, reached := make(chan struct{}), make(chan struct{}, 3)
	at := listenLocally(t, func(w http.ResponseWriter, r *http.Request) {
		reached <- struct{}{}
		select {
		case <-release:
		case <-r.Context().Done():
		}
		if r.Header.Get("Authorization") != "good" {
			w.WriteHeader(401)
		}
	})
	m.configure(t, "STRICT, HTTP", custom(&mesh.ExtAuthz{
		HTTP: &mesh.HTTPAuthz{Service: mesh.HTTPService{Cluster: "checker", Timeout: nettest.Patience}},
	}), nil, map[string]netip.AddrPort{"checker": at})
	c := m.http2(t, 81)
	public := func() {
		t.Helper()
		if response, err := c.Get("http://a/"); err != nil || response.StatusCode != 200 {
			t.Fatalf("%v, %v", response, err)
		}
		m.Await(t)
	}
	public()
	answers := make(chan int)
	for _, credential := range []string{"good", "bad", "good"} {
		go func() {
			request, err := http.NewRequest("POST", "http://a/admin", strings.NewReader("body"))
			if err != nil {
				panic(err)
			}
			request.Header.Set("Authorization", credential)
			response, err := c.Do(request)
			if err != nil {
				answers <- 0
				return
			}
			response.Body.Close()
			answers <- response.StatusCode
		}()
	}
	for range 3 {
		<-reached
	}
	public()
	close(release)
	got := map[int]int{}
	for range 3 {
		got[<-answers]++
		m.Await(t)
	}
	if got[200] != 2 || got[401] != 1 {
		t.Errorf("the answers were %v", got)
	}
	public()
}

// With Rejudge, an open connection of bytes ends at once when a changed policy denies it.
func TestAChangedPolicyEndsConnections(t *testing.T) {
	m := newMeshRigOf(t, "STRICT, TCP", detectionDelay, func(c *Config) { c.Rejudge = true })
	dialled := m.Listen(t, "82")
	conn, err := m.handshake(t, m.Dial(t, m.At(82)), m.client, meshTCP...)
	if err != nil {
		t.Fatal(err)
	}
	io.WriteString(conn, "question")
	workload := servetest.Take(t, dialled)
	servetest.Expect(t, workload, "question")
	m.enforce(t, "STRICT, TCP", rbac(mesh.Deny, anything, ofOthers))
	m.Wake()
	io.WriteString(conn, "more")
	servetest.Expect(t, workload, "more")
	m.enforce(t, "STRICT, TCP", rbac(mesh.Deny, anything, ofClient))
	m.Wake()
	if _, err := conn.Read(make([]byte, 1)); err == nil {
		t.Error("the connection goes on")
	}
	if got := m.Await(t); got.Reason != flow.PolicyDenied || got.Termination != "rbac_access_denied_matched_policy["+policyName+"]" {
		t.Errorf("the record has %v, %v, %s", got.Reason, got.Err, got.Termination)
	}
	workload.Close()
	conn.Close()
}

// With StrictPaths, paths that servers read in different ways are rejected.
func TestStrictPaths(t *testing.T) {
	m := newMeshRigOf(t, "STRICT, HTTP", detectionDelay, func(c *Config) { c.StrictPaths = true })
	m.enforce(t, "STRICT, HTTP")
	c := m.connect(t, 81)
	for target, want := range map[string]int{
		"/a/b?q;%2f": 200, "/a/../b": 200, "/%41": 200, "/a;x=y": 400, "/a%3bx": 400, "/a%2fb": 400, "/a%5Cb": 400, "/%25%32%66": 400, "/a%00": 400, "/a%": 400,
	} {
		if got, _, _ := c.get(t, target); got != want {
			t.Errorf("%s: %d, want %d", target, got, want)
		}
		m.Await(t)
	}
	c.Close()
}
