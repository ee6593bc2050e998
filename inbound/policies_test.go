package inbound

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/internal/serve/servetest"
)

// Conditions of policies.
var (
	anything = mesh.Condition{Kind: mesh.ConditionTrue}
	ofClient = mesh.Condition{Kind: mesh.ConditionPrincipal, Text: &mesh.StringMatcher{Text: idOfClient}}
	ofOthers = mesh.Condition{Kind: mesh.ConditionPrincipal, Text: &mesh.StringMatcher{Text: idOfServer}}
	ofAdmin  = mesh.Condition{Kind: mesh.ConditionPath, Text: &mesh.StringMatcher{Kind: mesh.MatchPrefix, Text: "/admin"}}
)

// rbac returns a policy with one rule.
func rbac(action mesh.Action, permission, principal mesh.Condition) *mesh.RBAC {
	return &mesh.RBAC{Rules: &mesh.Rules{Action: action, Policies: []mesh.AccessPolicy{{
		Name: policyName, Permission: permission, Principal: principal,
	}}}}
}

const policyName = "ns[shop]-policy[p]-rule[0]"

// enforce puts policies into all chains of a mode, in which they replace those of before.
func (m *meshRig) enforce(t *testing.T, mode string, policies ...*mesh.RBAC) {
	t.Helper()
	m.enforceBehind(t, mode, nil, policies...)
}

// enforceBehind is enforce with a filter of tokens before the policies.
func (m *meshRig) enforceBehind(t *testing.T, mode string, tokens *mesh.JWT, policies ...*mesh.RBAC) {
	t.Helper()
	var chains []*mesh.FilterChain
	for _, c := range modes[mode] {
		changed := *c
		changed.Policies = nil
		if c.HTTP != nil {
			changed.HTTP = &mesh.HTTPManager{
				Routes: &mesh.Routes{}, NormalizePath: true, MergeSlashes: true, EscapedSlashes: m.slashes,
				Upgrades: []mesh.Upgrade{{Protocol: "websocket"}},
			}
		}
		if tokens != nil && c.HTTP != nil {
			changed.HTTP.Filters = []mesh.HTTPFilter{{Name: "jwt", JWT: tokens}}
		}
		for _, p := range policies {
			if c.HTTP != nil {
				changed.HTTP.Filters = append(changed.HTTP.Filters, mesh.HTTPFilter{Name: "rbac", RBAC: p})
			} else {
				changed.Policies = append(changed.Policies, mesh.NetworkFilter{Name: "rbac", RBAC: p})
			}
		}
		chains = append(chains, &changed)
	}
	m.plane.InForce.Store(snapshotOf(t, chains, !strings.HasPrefix(mode, "DISABLE")))
}

// TestPoliciesOfConnections judges clients before the workload is dialled.
func TestPoliciesOfConnections(t *testing.T) {
	for name, c := range map[string]struct {
		policy       *mesh.RBAC
		plain, known bool // which clients pass
		by           string
	}{
		"no policy":                    {nil, true, true, ""},
		"no rules":                     {&mesh.RBAC{}, true, true, ""},
		"all are denied":               {&mesh.RBAC{Rules: &mesh.Rules{}}, false, false, "none"},
		"the client is allowed":        {rbac(mesh.Allow, anything, ofClient), false, true, "none"},
		"another one is allowed":       {rbac(mesh.Allow, anything, ofOthers), false, false, "none"},
		"the client is denied":         {rbac(mesh.Deny, anything, ofClient), true, false, policyName},
		"what is not the client":       {rbac(mesh.Deny, anything, mesh.Condition{Kind: mesh.ConditionNot, Of: []mesh.Condition{ofClient}}), false, true, policyName},
		"a path, which is not known":   {rbac(mesh.Deny, ofAdmin, anything), false, false, policyName},
		"it is only logged":            {rbac(mesh.Log, anything, anything), true, true, ""},
		"the policy is not understood": {&mesh.RBAC{Refused: true}, false, false, "none"},
	} {
		t.Run(name, func(t *testing.T) {
			m := newDelayedMeshRig(t, "PERMISSIVE, TCP", nettest.Patience) // nothing is dialled before the client speaks
			dialled := m.Listen(t, "82")
			if c.policy != nil {
				m.enforce(t, "PERMISSIVE, TCP", c.policy)
			}
			for _, secured := range []bool{false, true} {
				passes := c.plain
				var conn net.Conn = m.Dial(t, m.At(82))
				if secured {
					passes = c.known
					var err error
					if conn, err = m.handshake(t, conn, m.client, meshTCP...); err != nil {
						t.Fatal(err)
					}
				}
				io.WriteString(conn, "question")
				if passes {
					workload := servetest.Take(t, dialled)
					servetest.Expect(t, workload, "question")
					workload.Close()
				}
				_, err := conn.Read(make([]byte, 1))
				conn.Close()
				got := m.Await(t)
				if denied := got.Reason == flow.PolicyDenied; denied == passes || !passes && err == nil {
					t.Errorf("secured %v: passes %v; the record has %v, %v; the client %v", secured, passes, got.Reason, got.Err, err)
				}
				if want := "rbac_access_denied_matched_policy[" + c.by + "]"; got.Termination != want && !passes || got.Termination != "" && passes {
					t.Errorf("secured %v: passes %v; its details are %q, want %q", secured, passes, got.Termination, want)
				}
				select {
				case <-dialled:
					t.Errorf("secured %v: the workload was dialled", secured)
				default:
				}
			}
		})
	}
}

// A client chooses how long its handshake takes, and how long it is silent after it. It is judged by the policies in force
// when it sends, and not by those of before.
func TestAPushBindsAClientInsideTLS(t *testing.T) {
	deny := rbac(mesh.Deny, anything, ofClient)
	for name, push := range map[string]func(*meshRig){
		"a policy":     func(m *meshRig) { m.enforce(t, "STRICT, TCP", deny) },
		"another mode": func(m *meshRig) { m.plane.InForce.Store(snapshotOf(t, modes["DISABLE, TCP"], false)) },
	} {
		for _, silent := range []bool{false, true} {
			m := newMeshRig(t, "STRICT, TCP")
			dialled := m.Listen(t, "82")
			raw := m.Dial(t, m.At(82))
			raw.SetDeadline(time.Now().Add(nettest.Patience))
			conn := tls.Client(raw, &tls.Config{InsecureSkipVerify: true, NextProtos: meshTCP,
				GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
					if !silent {
						push(m)
					}
					return m.client, nil
				},
			})
			if err := conn.Handshake(); err != nil {
				t.Fatal(err)
			}
			if silent {
				workload := servetest.Take(t, dialled)
				push(m)
				io.WriteString(conn, "question")
				if got, _ := io.ReadAll(workload); len(got) > 0 {
					t.Errorf("%s: the workload receives %q", name, got)
				}
			} else {
				io.WriteString(conn, "question")
			}
			raw.CloseWrite()
			if got := m.Await(t); got.Reason != flow.PolicyDenied && got.Reason != flow.MeshRefused {
				t.Errorf("%s, silent %v: %v, %v", name, silent, got.Reason, got.Err)
			}
			if len(dialled) > 0 {
				t.Errorf("%s, silent %v: the workload was dialled", name, silent)
			}
		}
	}
}

// A policy that denies plaintext does not deny a client of the mesh that begins late, and nothing is dialled for it.
func TestAClientThatPoliciesMustKnowIsWaitedFor(t *testing.T) {
	m := newDelayedMeshRig(t, "PERMISSIVE, TCP", 0)
	m.enforce(t, "PERMISSIVE, TCP", rbac(mesh.Allow, anything, ofClient))
	dialled := m.Listen(t, "82")
	raw := m.Dial(t, m.At(82))
	m.AwaitListed(t, 1)
	conn, err := m.handshake(t, raw, m.client, meshTCP...)
	if err != nil {
		t.Fatal(err)
	}
	io.WriteString(conn, "question")
	workload := servetest.Take(t, dialled)
	servetest.Expect(t, workload, "question")
	workload.Close()
	conn.Close()
	m.Await(t)
}

// client is an HTTP/1 client on one connection of the mesh.
type client struct {
	net.Conn
	in *bufio.Reader
}

func (m *meshRig) connect(t *testing.T, port uint16) *client {
	t.Helper()
	conn, err := m.handshake(t, m.Dial(t, m.At(port)), m.client, "istio-http/1.1", "istio", "http/1.1")
	if err != nil {
		t.Fatal(err)
	}
	return &client{conn, bufio.NewReader(conn)}
}

// get sends a request with any target.
func (c *client) get(t *testing.T, target string) (status int, body, seen string) {
	t.Helper()
	io.WriteString(c, "GET "+target+" HTTP/1.1\r\nHost: a\r\n\r\n")
	response, err := http.ReadResponse(c.in, nil)
	if err != nil {
		t.Fatalf("%s: %v", target, err)
	}
	content, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatalf("%s: %v", target, err)
	}
	return response.StatusCode, string(content), response.Header.Get("Seen-Target")
}

// TestPoliciesOfRequests judges each request by its path in the normal form, which the workload gets as well.
func TestPoliciesOfRequests(t *testing.T) {
	m := newMeshRig(t, "STRICT, HTTP")
	m.enforce(t, "STRICT, HTTP", rbac(mesh.Deny, ofAdmin, anything), rbac(mesh.Allow, anything, ofClient))
	c := m.connect(t, 81)
	for _, r := range []struct {
		target  string
		status  int
		seen    string
		details string
	}{
		{"/", 200, "/", ""},
		{"/public?/admin", 200, "/public?/admin", ""},
		{"/admin", 403, "", "rbac_access_denied_matched_policy[ns[shop]-policy[p]-rule[0]]"},
		{"/admin/x?y", 403, "", "rbac_access_denied_matched_policy[ns[shop]-policy[p]-rule[0]]"},
		{"/public/../admin", 403, "", "rbac_access_denied_matched_policy[ns[shop]-policy[p]-rule[0]]"},
		{"//admin", 403, "", "rbac_access_denied_matched_policy[ns[shop]-policy[p]-rule[0]]"},
		{"/%61dmin", 403, "", "rbac_access_denied_matched_policy[ns[shop]-policy[p]-rule[0]]"},
		{`/x\..\admin`, 403, "", "rbac_access_denied_matched_policy[ns[shop]-policy[p]-rule[0]]"},
		{"http://b/x/%2e%2e/admin", 403, "", "rbac_access_denied_matched_policy[ns[shop]-policy[p]-rule[0]]"},
		{"/admin/../public//x?a//b", 200, "/public/x?a//b", ""},
		{"/a%2fb", 200, "/a%2fb", ""},
		{"/%00", 400, "", "path_normalization_failed"},
		{"*", 400, "", "path_normalization_failed"},
		{"/last", 200, "/last", ""},
	} {
		status, body, seen := c.get(t, r.target)
		got := m.Await(t)
		if status != r.status || seen != r.seen {
			t.Errorf("%s: %d, the workload saw %q; want %d, %q", r.target, status, seen, r.status, r.seen)
		}
		if status == 403 && (body != "RBAC: access denied" || got.Reason != flow.PolicyDenied) || r.details != "" && got.Details != r.details {
			t.Errorf("%s: body %q, reason %q, details %q", r.target, body, got.Reason, got.Details)
		}
	}
	c.Close()
}

// TestRequestsAreJudgedByThePoliciesInForce changes the policies while connections are open.
func TestRequestsAreJudgedByThePoliciesInForce(t *testing.T) {
	m := newMeshRig(t, "STRICT, HTTP")
	c := m.connect(t, 81)
	for i, policies := range [][]*mesh.RBAC{
		nil,
		{rbac(mesh.Allow, anything, ofOthers)},
		{rbac(mesh.Allow, anything, ofClient)},
		{rbac(mesh.Allow, anything, ofClient), rbac(mesh.Deny, anything, ofClient)},
		{},
		{{Refused: true}},
	} {
		want := 403
		if i%2 == 0 {
			want = 200
		}
		m.enforce(t, "STRICT, HTTP", policies...)
		if status, _, _ := c.get(t, "/"); status != want {
			t.Errorf("with the policies %d: %d, want %d", i, status, want)
		}
		m.Await(t)
	}
	c.Close()
}

// A shadow policy denies no request.
func TestShadowPoliciesAreNotEnforced(t *testing.T) {
	m := newMeshRig(t, "STRICT, HTTP")
	m.enforce(t, "STRICT, HTTP", &mesh.RBAC{Shadow: &mesh.Rules{}, ShadowPrefix: "istio_dry_run_allow_"})
	c := m.connect(t, 81)
	if status, _, _ := c.get(t, "/"); status != 200 {
		t.Errorf("status %d", status)
	}
	m.Await(t)
	c.Close()
}

// Policies that are not enforced are recorded of connections, whether others deny them or not.
func TestDryRunsOfConnectionsAreRecorded(t *testing.T) {
	m := newMeshRig(t, "STRICT, TCP")
	dialled := m.Listen(t, "82")
	everything := mesh.AccessPolicy{Name: "p", Permission: anything, Principal: anything}
	dry := &mesh.RBAC{Shadow: &mesh.Rules{Action: mesh.Deny, Policies: []mesh.AccessPolicy{everything}}, ShadowPrefix: "istio_dry_run_deny_"}
	asked := &mesh.RBAC{Shadow: &mesh.Rules{Action: mesh.Deny}, ShadowPrefix: "istio_ext_authz_"}
	for denied, policies := range map[bool][]*mesh.RBAC{false: {dry, asked}, true: {asked, dry, rbac(mesh.Deny, anything, ofClient)}} {
		m.enforce(t, "STRICT, TCP", policies...)
		conn, err := m.handshake(t, m.Dial(t, m.At(82)), m.client, meshTCP...)
		if err != nil {
			t.Fatal(err)
		}
		io.WriteString(conn, "question")
		if !denied {
			workload := servetest.Take(t, dialled)
			servetest.Expect(t, workload, "question")
			workload.Close()
		}
		conn.Close()
		got := m.Await(t)
		if got.DryRun != "deny: denied by p" || (got.Reason == flow.PolicyDenied) != denied {
			t.Errorf("denied %v: the record has %q, %v, %v", denied, got.DryRun, got.Reason, got.Err)
		}
	}
}

// TestRequestsBehindProxyHeadersPassNoPolicy: on a port whose workload gets a PROXY header, requests are not looked at.
func TestRequestsBehindProxyHeadersPassNoPolicy(t *testing.T) {
	m := newMeshRig(t, "STRICT, HTTP")
	settings := servetest.Defaults() // the client speaks first, however late it is
	var err error
	if settings.ProxyProtocol, err = capture.ParsePorts("83"); err != nil {
		t.Fatal(err)
	}
	if err := m.Role.Apply(settings); err != nil {
		t.Fatal(err)
	}
	dialled := m.Listen(t, "83")
	m.enforce(t, "STRICT, HTTP", rbac(mesh.Deny, ofAdmin, anything))
	c := m.connect(t, 83)
	io.WriteString(c, "GET / HTTP/1.1\r\nHost: a\r\n\r\n")
	if _, err := c.Read(make([]byte, 1)); err == nil {
		t.Error("the client got a response")
	}
	if got := m.Await(t); got.Reason != flow.MeshRefused || !strings.Contains(got.Err.Error(), "PROXY header") {
		t.Errorf("the record has %v, %v", got.Reason, got.Err)
	}
	select {
	case <-dialled:
		t.Error("the workload was dialled")
	default:
	}
	c.Close()
}

// A client that was silent until the workload was dialled is judged again by the identity that it shows then.
func TestALateClientIsJudgedByItsIdentity(t *testing.T) {
	m := newMeshRig(t, "PERMISSIVE, TCP")
	m.enforce(t, "PERMISSIVE, TCP", rbac(mesh.Deny, anything, ofClient))
	dialled := m.Listen(t, "82")
	raw := m.Dial(t, m.At(82))
	workload := servetest.Take(t, dialled)
	conn, err := m.handshake(t, raw, m.client, meshTCP...)
	if err != nil {
		t.Fatal(err)
	}
	io.WriteString(conn, "question")
	if n, _ := workload.Read(make([]byte, 8)); n > 0 {
		t.Error("the workload got data")
	}
	if got := m.Await(t); got.Reason != flow.PolicyDenied {
		t.Errorf("the record has %v, %v", got.Reason, got.Err)
	}
	workload.Close()
	conn.Close()
}

// TestTokens: a token is verified before policies look at its claims, and a client cannot send what claims become.
func TestTokens(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	keys, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: key.Public(), KeyID: "k"}}})
	if err != nil {
		t.Fatal(err)
	}
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: key}, nil)
	if err != nil {
		t.Fatal(err)
	}
	bearer := func(claims string) string {
		signed, err := signer.Sign([]byte(claims))
		if err != nil {
			t.Fatal(err)
		}
		token, err := signed.CompactSerialize()
		if err != nil {
			t.Fatal(err)
		}
		return "Authorization: Bearer " + token + "\r\n"
	}
	m := newMeshRig(t, "STRICT, HTTP")
	m.enforceBehind(t, "STRICT, HTTP", &mesh.JWT{
		Providers: []mesh.JWTProvider{{
			Name: "me", Issuer: "me", Keys: keys, ClockSkew: time.Minute, Metadata: "payload", PayloadHeader: "x-payload",
			ClaimHeaders: []mesh.ClaimHeader{{Header: "Seen-Sub", Claim: "sub"}},
		}},
		Rules: []mesh.JWTRule{{Match: mesh.RouteMatch{Path: "/"}, Requires: mesh.JWTRequirement{Kind: mesh.JWTAny, Of: []mesh.JWTRequirement{
			{Kind: mesh.JWTProvided, Name: "me"}, {Kind: mesh.JWTAllowMissing},
		}}}},
	}, rbac(mesh.Allow, anything, mesh.Condition{Kind: mesh.ConditionMetadata, Metadata: &mesh.MetadataMatcher{
		Filter: "envoy.filters.http.jwt_authn", Path: []string{"payload", "sub"},
		Value: mesh.ValueMatcher{Kind: mesh.ValueText, Text: mesh.StringMatcher{Text: "you"}},
	}}))
	c := m.connect(t, 81)
	for _, r := range []struct {
		fields string
		status int
		seen   string // the claim, and whether there is a token, a payload
	}{
		{bearer(`{"iss":"me","sub":"you"}`), 200, "you, false, true"},
		{bearer(`{"iss":"me","sub":"you"}`) + "Seen-Sub: forged\r\nX-Payload: forged\r\n", 200, "you, false, true"},
		{bearer(`{"iss":"me","sub":"other"}`), 403, ""},
		{bearer(`{"iss":"other","sub":"you"}`), 401, ""},
		{"Authorization: Bearer a.b.c\r\n", 401, ""},
		{"", 403, ""},
		{"Seen-Sub: you\r\n", 403, ""},
		{bearer(`{"iss":"me","sub":"you"}`), 200, "you, false, true"},
	} {
		io.WriteString(c, "GET / HTTP/1.1\r\nHost: a\r\n"+r.fields+"\r\n")
		response, err := http.ReadResponse(c.in, nil)
		if err != nil {
			t.Fatalf("%s: %v", r.fields, err)
		}
		io.Copy(io.Discard, response.Body)
		if got := m.Await(t); response.StatusCode != r.status || response.Header.Get("Seen-Claims") != r.seen || (got.Reason == flow.PolicyDenied) != (r.status != 200) {
			t.Errorf("%s: %d, the workload saw %q; want %d, %q; the record has %v", r.fields, response.StatusCode, response.Header.Get("Seen-Claims"), r.status, r.seen, got.Reason)
		}
	}
	c.Close()
}

// http2 returns a client that speaks HTTP/2 on one connection of the mesh.
func (m *meshRig) http2(t *testing.T, port uint16) *http.Client {
	t.Helper()
	conn, err := m.handshake(t, m.Dial(t, m.At(port)), m.client, "istio-h2", "istio", "h2")
	if err != nil {
		t.Fatal(err)
	}
	var protocols http.Protocols
	protocols.SetUnencryptedHTTP2(true)
	transport := &http.Transport{Protocols: &protocols, DialContext: func(context.Context, string, string) (net.Conn, error) { return conn, nil }}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport}
}

// TestPoliciesOfRequestsOverHTTP2 judges each stream as requests of HTTP/1 are judged.
func TestPoliciesOfRequestsOverHTTP2(t *testing.T) {
	m := newMeshRig(t, "STRICT, HTTP")
	m.enforce(t, "STRICT, HTTP", rbac(mesh.Deny, ofAdmin, anything), rbac(mesh.Allow, anything, ofClient))
	c := m.http2(t, 81)
	for _, r := range []struct {
		path, raw string
		status    int
		seen      string
	}{
		{"/", "", 200, "/"},
		{"/admin", "", 403, ""},
		{"/public/../admin", "", 403, ""},
		{"//admin", "", 403, ""},
		{"/admin", "/%61dmin", 403, ""},
		{"/admin/../public//x", "", 200, "/public/x"},
		{"/\x00", "/%00", 400, ""},
		{"/last", "", 200, "/last"},
	} {
		request := &http.Request{Method: "GET", URL: &url.URL{Scheme: "http", Host: "a", Path: r.path, RawPath: r.raw}, Header: http.Header{}}
		response, err := c.Do(request)
		if err != nil {
			t.Fatalf("%s: %v", r.path, err)
		}
		io.Copy(io.Discard, response.Body)
		response.Body.Close()
		got := m.Await(t)
		if seen := response.Header.Get("Seen-Target"); response.StatusCode != r.status || seen != r.seen || (got.Reason == flow.PolicyDenied) != (r.status == 403) {
			t.Errorf("%s: %d, the workload saw %q; want %d, %q; the record has %v", r.path, response.StatusCode, seen, r.status, r.seen, got.Reason)
		}
	}
	m.enforce(t, "STRICT, HTTP", rbac(mesh.Allow, anything, ofOthers))
	response, err := c.Get("http://a/")
	if err != nil || response.StatusCode != 403 {
		t.Errorf("after the policies changed: %v, %v", response, err)
	}
	m.Await(t)
}

// claimsOfMe requires no token, and has a claim sent in a field.
var claimsOfMe = &mesh.JWT{Providers: []mesh.JWTProvider{{
	Name: "me", Issuer: "me", ClaimHeaders: []mesh.ClaimHeader{{Header: "Seen-Sub", Claim: "sub"}},
}}}

// A client's own copies of the fields that claims become are removed from streams, too.
func TestForgedClaimsOverHTTP2(t *testing.T) {
	m := newMeshRig(t, "STRICT, HTTP")
	m.enforceBehind(t, "STRICT, HTTP", claimsOfMe)
	request, err := http.NewRequest("GET", "http://a/", nil)
	if err != nil {
		t.Fatal(err)
	}
	request.Header.Set("Seen-Sub", "forged")
	response, err := m.http2(t, 81).Do(request)
	if err != nil || response.StatusCode != 200 || response.Header.Get("Seen-Target") != "/" || response.Header.Get("Seen-Claims") != "" {
		t.Errorf("%+v, %v", response, err)
	}
	m.Await(t)
}

// A policy that looks at the field of a claim does not see a client's own copy of it, nor a token that is removed.
func TestPoliciesDoNotSeeForgedClaims(t *testing.T) {
	m := newMeshRig(t, "STRICT, HTTP")
	field := func(name, value string) mesh.Condition {
		return mesh.Condition{Kind: mesh.ConditionHeader, Header: &mesh.HeaderMatcher{Name: name, Kind: mesh.HeaderText, Text: mesh.StringMatcher{Text: value}}}
	}
	m.enforceBehind(t, "STRICT, HTTP", claimsOfMe, rbac(mesh.Allow, field("seen-sub", "admin"), anything))
	c := m.connect(t, 81)
	io.WriteString(c, "GET / HTTP/1.1\r\nHost: a\r\nSeen-Sub: admin\r\n\r\n")
	response, err := http.ReadResponse(c.in, nil)
	if err != nil || response.StatusCode != 403 {
		t.Errorf("%+v, %v", response, err)
	}
	m.Await(t)
	c.Close()
}

// CONNECT over HTTP/2 has no path, and is judged all the same.
func TestConnectOverHTTP2IsJudged(t *testing.T) {
	m := newMeshRig(t, "STRICT, HTTP")
	m.enforce(t, "STRICT, HTTP", rbac(mesh.Deny, anything, ofClient))
	request := &http.Request{Method: "CONNECT", URL: &url.URL{Scheme: "http", Host: "a:80"}, Host: "a:80", Header: http.Header{}}
	response, err := m.http2(t, 81).Do(request)
	if err != nil || response.StatusCode != 403 {
		t.Errorf("%+v, %v", response, err)
	}
	m.Await(t)
}

// A target in absolute form reaches the workload as it was judged: a server could go by Host otherwise.
func TestAbsoluteTargetsAreSentAsJudged(t *testing.T) {
	m := newMeshRig(t, "STRICT, HTTP")
	host := mesh.Condition{Kind: mesh.ConditionHeader, Header: &mesh.HeaderMatcher{
		Name: ":authority", Kind: mesh.HeaderText, Text: mesh.StringMatcher{Text: "public"},
	}}
	m.enforce(t, "STRICT, HTTP", rbac(mesh.Allow, host, anything))
	c := m.connect(t, 81)
	io.WriteString(c, "GET http://public/x HTTP/1.1\r\nHost: private\r\n\r\n")
	response, err := http.ReadResponse(c.in, nil)
	if err != nil || response.StatusCode != 200 || response.Header.Get("Seen-Target") != "/x" {
		t.Errorf("%+v, %v", response, err)
	}
	m.Await(t)
	c.Close()
}

// A server that answers CONNECT like any request would get the requests behind it from a tunnel, where policies do not see
// them.
func TestNoRequestPassesInsideATunnel(t *testing.T) {
	m := newMeshRig(t, "STRICT, HTTP")
	m.enforce(t, "STRICT, HTTP", rbac(mesh.Deny, ofAdmin, anything))
	for _, target := range []string{"a:80", "/", "/x", "http://a/", "*"} {
		c := m.connect(t, 81)
		c.get(t, "/")
		m.Await(t)
		io.WriteString(c, "CONNECT "+target+" HTTP/1.1\r\nHost: a:80\r\n\r\n")
		response, err := http.ReadResponse(c.in, nil)
		if err != nil || response.StatusCode/100 == 2 {
			t.Errorf("%s: %+v, %v", target, response, err)
			io.WriteString(c, "GET /admin HTTP/1.1\r\nHost: a\r\n\r\n")
			inside, err := http.ReadResponse(c.in, nil)
			t.Errorf("inside the tunnel: %+v, %v", inside, err)
		}
		c.Close()
		m.Await(t)
	}
}

// A protocol that is not configured may carry requests as well, such as TLS does. Where no policy judges requests, each passes.
func TestPoliciesPermitConfiguredUpgradesOnly(t *testing.T) {
	m := newMeshRig(t, "STRICT, HTTP")
	for _, c := range []struct {
		policies []*mesh.RBAC
		protocol string
		status   int
	}{
		{nil, "tls/1.3", 200},
		{[]*mesh.RBAC{rbac(mesh.Deny, ofAdmin, anything)}, "tls/1.3", 403},
		{[]*mesh.RBAC{rbac(mesh.Deny, ofAdmin, anything)}, "websocket", 200},
	} {
		m.enforce(t, "STRICT, HTTP", c.policies...)
		conn := m.connect(t, 81)
		io.WriteString(conn, "GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: "+c.protocol+"\r\n\r\n")
		response, err := http.ReadResponse(conn.in, nil)
		if err != nil || response.StatusCode != c.status {
			t.Errorf("%d policies, %s: %+v, %v", len(c.policies), c.protocol, response, err)
		}
		conn.Close()
		m.Await(t)
	}
}

// Filters apply in the order in which they come. The first that refuses a request answers it, and the later ones do not see it.
func TestFiltersApplyInTheirOrder(t *testing.T) {
	const mode = "STRICT, HTTP"
	m := newMeshRig(t, mode)
	var asked atomic.Int32
	var claim atomic.Value
	at := listenLocally(t, func(w http.ResponseWriter, r *http.Request) {
		asked.Add(1)
		claim.Store(r.Header.Get("X-Claim"))
		if r.URL.Path == "/admin/asked" {
			w.WriteHeader(http.StatusTeapot)
		}
	})
	ask := custom(&mesh.ExtAuthz{
		Headers: names("x-claim"), HTTP: &mesh.HTTPAuthz{Service: mesh.HTTPService{Cluster: "checker", Timeout: nettest.Patience}},
	})
	secret := []byte("a secret of at least 32 bytes, as HS256 needs")
	keys, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: secret}}})
	if err != nil {
		t.Fatal(err)
	}
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.HS256, Key: secret}, nil)
	if err != nil {
		t.Fatal(err)
	}
	signed, err := signer.Sign([]byte(`{"iss":"me","sub":"you"}`))
	if err != nil {
		t.Fatal(err)
	}
	good, err := signed.CompactSerialize()
	if err != nil {
		t.Fatal(err)
	}
	tokens := mesh.HTTPFilter{Name: "jwt", JWT: &mesh.JWT{
		Providers: []mesh.JWTProvider{{Name: "me", Issuer: "me", Keys: keys, ClaimHeaders: []mesh.ClaimHeader{{Header: "x-claim", Claim: "sub"}}}},
		Rules:     []mesh.JWTRule{{Match: mesh.RouteMatch{Path: "/"}, Requires: mesh.JWTRequirement{Kind: mesh.JWTProvided, Name: "me"}}},
	}}
	path := func(text string) mesh.Condition {
		return mesh.Condition{Kind: mesh.ConditionPath, Text: &mesh.StringMatcher{Text: text}}
	}
	policy := func(name string, action mesh.Action, c mesh.Condition) mesh.HTTPFilter {
		r := rbac(action, c, anything)
		r.Rules.Policies[0].Name = name
		return mesh.HTTPFilter{Name: name, RBAC: r}
	}
	deny, allow := policy("deny", mesh.Deny, path("/admin/denied")), policy("allow", mesh.Allow, path("/admin/allowed"))
	const denied, none = "rbac_access_denied_matched_policy[deny]", "rbac_access_denied_matched_policy[none]"
	for _, c := range []struct {
		order   []mesh.HTTPFilter
		path    string
		token   string
		status  int
		details string
		asked   bool
		claim   string // that the server of external authorization sees
	}{
		{append(ask, tokens, deny, allow), "/admin/asked", "bad", 418, "ext_authz_denied", true, ""},
		{append(ask, tokens, deny, allow), "/admin/denied", "a.b.c", 401, "", true, ""},
		{append(ask, tokens, deny, allow), "/admin/denied", good, 403, denied, true, ""},
		{append(ask, tokens, deny, allow), "/admin/other", good, 403, none, true, ""},
		{append(ask, tokens, deny, allow), "/admin/allowed", good, 200, "via_upstream", true, ""},
		{append([]mesh.HTTPFilter{tokens, deny, allow}, ask...), "/admin/asked", "a.b.c", 401, "", false, ""},
		{append([]mesh.HTTPFilter{tokens, deny, allow}, ask...), "/admin/denied", good, 403, denied, false, ""},
		{append([]mesh.HTTPFilter{tokens, deny, allow}, ask...), "/admin/asked", good, 403, none, false, ""},
		{append([]mesh.HTTPFilter{tokens, deny}, ask...), "/admin/asked", good, 418, "ext_authz_denied", true, "you"},
		{append([]mesh.HTTPFilter{allow, deny}, tokens), "/admin/denied", "a.b.c", 403, none, false, ""},
	} {
		m.configure(t, mode, slices.Clone(c.order), nil, map[string]netip.AddrPort{"checker": at})
		for _, http2 := range []bool{false, true} {
			asked.Store(0)
			claim.Store("")
			client := m.over(t, 81, http2)
			request, err := http.NewRequest("GET", "http://shop.example"+c.path, nil)
			if err != nil {
				t.Fatal(err)
			}
			request.Header.Set("Authorization", "Bearer "+c.token)
			request.Header.Set("X-Claim", "")
			response, err := client.Do(request)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := io.Copy(io.Discard, response.Body); err != nil {
				t.Error(err)
			}
			response.Body.Close()
			client.CloseIdleConnections()
			got := m.Await(t)
			if response.StatusCode != c.status || c.details != "" && got.Details != c.details || (asked.Load() == 1) != c.asked || claim.Load() != c.claim {
				t.Errorf("%d filters, %s, HTTP/2 %v: %d, %s, asked %d times with %q; want %+v", len(c.order), c.path, http2, response.StatusCode, got.Details, asked.Load(), claim.Load(), c)
			}
		}
	}
}

// A call of gRPC that is refused has the status of gRPC that stands for that of HTTP, and its record has both.
func TestARefusedCallOfGRPCHasItsStatus(t *testing.T) {
	const mode = "STRICT, HTTP"
	m := newMeshRig(t, mode)
	tokens := mesh.HTTPFilter{Name: "jwt", JWT: &mesh.JWT{
		Providers: []mesh.JWTProvider{{Name: "me", Issuer: "me", Keys: []byte(`{"keys":[]}`)}},
		Rules:     []mesh.JWTRule{{Match: mesh.RouteMatch{Path: "/"}, Requires: mesh.JWTRequirement{Kind: mesh.JWTProvided, Name: "me"}}},
	}}
	deny := mesh.HTTPFilter{Name: "rbac", RBAC: rbac(mesh.Deny, ofAdmin, anything)}
	for name, c := range map[string]struct {
		filters         []mesh.HTTPFilter
		status, message string
	}{
		"by a policy":                      {[]mesh.HTTPFilter{deny}, "7", "RBAC: access denied"},
		"without a token":                  {[]mesh.HTTPFilter{tokens}, "16", "Jwt is missing"},
		"by a server that cannot be asked": {custom(&mesh.ExtAuthz{GRPC: &mesh.GRPCService{Cluster: "none"}}), "7", ""},
		"by one that is not supported":     {[]mesh.HTTPFilter{{Name: "x", ExtAuthz: &mesh.ExtAuthz{Refused: true}}}, "14", ""},
	} {
		m.configure(t, mode, c.filters, nil, nil)
		client := m.http2(t, 81)
		response, err := client.Post("http://shop.example/admin", "application/grpc", strings.NewReader("\x00\x00\x00\x00\x00"))
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(response.Body)
		response.Body.Close()
		client.CloseIdleConnections()
		if h := response.Header; response.StatusCode != 200 || h.Get("Grpc-Status") != c.status || h.Get("Grpc-Message") != c.message || len(body) > 0 || err != nil {
			t.Errorf("%s: %s with %v, %q, %v", name, response.Status, h, body, err)
		}
		if got := m.Await(t); got.Reason == flow.Completed || got.Upstream.IsValid() {
			t.Errorf("%s: the record is %+v", name, got)
		}
	}
}
