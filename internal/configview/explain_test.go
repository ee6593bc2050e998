package configview

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/json"
	"io"
	"log/slog"
	"net/http/httptest"
	"net/netip"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/go-jose/go-jose/v4"

	"github.com/pillion-proxy/pillion/internal/controlplane"
	"github.com/pillion-proxy/pillion/internal/controlplane/pushtest"
	"github.com/pillion-proxy/pillion/internal/mesh"
)

// recorded returns the snapshot of the first push to a sidecar.
func recorded(t *testing.T) *mesh.Snapshot {
	t.Helper()
	s, err := controlplane.NewStore(controlplane.StoreConfig{Log: slog.New(slog.NewTextHandler(io.Discard, nil))})
	if err != nil {
		t.Fatal(err)
	}
	for _, u := range pushtest.Sidecar() {
		s.Update(u)
	}
	for _, l := range s.Snapshot().Listeners() { // whether policies are carried out is not a matter of this package
		for _, chain := range l.Chains {
			chain.Refused = false
			if chain.HTTP != nil {
				for i := range chain.HTTP.Filters {
					chain.HTTP.Filters[i].Refused = false
				}
			}
		}
	}
	return s.Snapshot()
}

// questions are requests of each kind, by names.
var questions = []struct {
	name string
	Question
}{
	{"a matching route", Question{Method: "GET", URL: "http://reviews:9080/api/x", Fields: []Field{{"End-User", "jason"}, {"x-canary", "v2"}}}},
	{"weights, and routes that came close", Question{URL: "http://reviews.default.svc.cluster.local:9080/api/x?test=2", Fields: []Field{{"end-user", "other"}}}},
	{"a redirect", Question{Method: "POST", URL: "http://10.96.0.10:9090/old?q=1"}},
	{"a direct response", Question{URL: "http://reviews:9080/teapot"}},
	{"another host", Question{URL: "http://example.org:9080"}},
	{"a port without a listener", Question{URL: "http://198.51.100.7:4711/"}},
	{"a service of TCP", Question{URL: "http://db.default:5432/", Destination: netip.MustParseAddrPort("10.96.0.20:5432")}},
	{"TLS of the workload", Question{URL: "https://a.wild.example.test/"}},
	{"inbound, in the mesh", Question{Inbound: true, URL: "http://198.51.100.9:8080/info", Peer: "spiffe://cluster.local/ns/shop/sa/web"}},
	{"another host field", Question{URL: "http://10.96.0.10:9080/api/x", Fields: []Field{{"Host", "reviews"}, {"end-user", "jason"}, {"x-canary", "v2"}}}},
	{"inbound, from an address", Question{Inbound: true, Method: "get", URL: "http://198.51.100.9:8080/info", Source: netip.MustParseAddr("203.0.113.5")}},
	{"inbound, plain", Question{Inbound: true, URL: "http://198.51.100.9:8080/x"}},
	{"inbound, another port", Question{Inbound: true, URL: "http://198.51.100.9:4711/x"}},
}

func TestRequestsAreExplained(t *testing.T) {
	snapshot := recorded(t)
	var got bytes.Buffer
	for _, q := range questions {
		e, err := Explain(snapshot, &q.Question, nil)
		if err != nil {
			t.Fatal(err)
		}
		text, _ := json.MarshalIndent(e, "", " ")
		got.WriteString("# " + q.name + "\n" + string(text) + "\n")
	}
	const golden = "testdata/explain.txt"
	if *update {
		if err := os.WriteFile(golden, got.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if want, err := os.ReadFile(golden); err != nil || got.String() != string(want) {
		t.Errorf("%v; got\n%s", err, got.String())
	}
}

func TestQuestionsAreServed(t *testing.T) {
	snapshot := recorded(t)
	used := func(cluster string) ([]Endpoint, bool) {
		return []Endpoint{{Cluster: cluster, Health: Ejected}}, strings.Contains(cluster, "|v2|")
	}
	h := ExplainHandler(func() *mesh.Snapshot { return snapshot }, used)
	for _, q := range questions {
		parsed, err := parseQuestion(q.Values())
		if err != nil || !reflect.DeepEqual(*parsed, q.Question) {
			t.Errorf("%s: %+v, %v", q.name, parsed, err)
		}
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequest("GET", "/explain?"+q.Values().Encode(), nil))
		var e Explanation
		if err := json.Unmarshal(w.Body.Bytes(), &e); w.Code != 200 || err != nil || e.Result == "" {
			t.Errorf("%s: %d, %v: %s", q.name, w.Code, err, w.Body)
		}
		for _, c := range e.Clusters {
			for _, host := range c.Hosts {
				if inUse := strings.Contains(c.Name, "|v2|"); inUse != (host.Health == Ejected) {
					t.Errorf("%s: %+v", q.name, host)
				}
			}
		}
	}
	for query, want := range map[string]string{
		"":                                    "is not a URL with a host",
		"url=reviews:9080/":                   "is not a URL with a host",
		"url=ftp://reviews/":                  "is not a URL with a host",
		"url=http://%25zz/":                   "invalid",
		"url=http://a:99999/":                 "is not a port",
		"url=http://a/&from=below":            "is not a direction",
		"url=http://a/&destination=here":      `destination: "here" is not an address with a port, such as `,
		"url=http://a/&header=end-user+jason": "is not a header field",
		"url=http://a/&source=here":           `source: "here" is not an address, such as `,
	} {
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequest("GET", "/explain?"+query, nil))
		if w.Code != 400 || !strings.Contains(w.Body.String(), want) {
			t.Errorf("%s: %d %s", query, w.Code, w.Body)
		}
	}
	for snapshot, want := range map[bool]int{true: 400, false: 404} {
		h := ExplainHandler(nil, nil)
		if snapshot {
			h = ExplainHandler(func() *mesh.Snapshot { return nil }, nil)
		}
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequest("GET", "/explain?url=http://a/", nil))
		if w.Code != want {
			t.Errorf("without a snapshot: %d %s", w.Code, w.Body)
		}
	}
}

// The claims of a token in the question are seen by the policy behind it.
func TestTokensOfAQuestionAreVerified(t *testing.T) {
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	keys, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: private.Public()}}})
	if err != nil {
		t.Fatal(err)
	}
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.EdDSA, Key: private}, nil)
	if err != nil {
		t.Fatal(err)
	}
	bearer := func(claims string) []Field {
		signed, err := signer.Sign([]byte(claims))
		if err != nil {
			t.Fatal(err)
		}
		token, _ := signed.CompactSerialize()
		return []Field{{"Authorization", "Bearer " + token}}
	}
	tokens := &mesh.JWT{
		Providers: []mesh.JWTProvider{{Name: "p", Issuer: "me", Keys: keys, Metadata: "payload"}},
		Rules:     []mesh.JWTRule{{Match: mesh.RouteMatch{Path: "/"}, Requires: mesh.JWTRequirement{Kind: mesh.JWTProvided, Name: "p"}}},
	}
	group := mesh.MetadataMatcher{Filter: "envoy.filters.http.jwt_authn", Path: []string{"payload", "sub"}, Value: mesh.ValueMatcher{Kind: mesh.ValueText, Text: mesh.StringMatcher{Text: "jason"}}}
	anyone := mesh.Condition{Kind: mesh.ConditionTrue}
	rules := &mesh.RBAC{Rules: &mesh.Rules{Policies: []mesh.AccessPolicy{{Name: "jason", Permission: anyone, Principal: mesh.Condition{Kind: mesh.ConditionMetadata, Metadata: &group}}}}}
	respond := mesh.Route{Match: mesh.RouteMatch{Path: "/"}, Respond: &mesh.Response{Status: 204}}
	l := &mesh.Listener{Name: "virtualInbound", Direction: mesh.Inbound, Chains: []*mesh.FilterChain{{HTTP: &mesh.HTTPManager{
		Filters: []mesh.HTTPFilter{{Name: "jwt", JWT: tokens}, {Name: "rbac", RBAC: rules}},
		Routes:  &mesh.Routes{Hosts: []mesh.VirtualHost{{Domains: []mesh.Domain{{Kind: mesh.DomainAny}}, Routes: []mesh.Route{respond}}}},
	}}}}
	edit := (*mesh.Snapshot)(nil).Edit()
	edit.SetListener(l.Name, l)
	snapshot, _ := edit.Snapshot()
	for _, test := range []struct {
		fields   []Field
		verdicts []string
		result   string
	}{
		{nil, []string{"denied"}, "refused: jwt denies the request"},
		{bearer(`{"iss":"other"}`), []string{"denied"}, "refused: jwt denies the request"},
		{bearer(`{"iss":"me","sub":"other"}`), []string{"allowed", "denied"}, "refused: rbac denies the request"},
		{bearer(`{"iss":"me","sub":"jason"}`), []string{"allowed", "allowed"}, "answered 204"},
	} {
		e, err := Explain(snapshot, &Question{Inbound: true, URL: "http://198.51.100.9/", Fields: test.fields}, nil)
		if err != nil {
			t.Fatal(err)
		}
		var verdicts []string
		for _, v := range e.Verdicts {
			verdicts = append(verdicts, v.Verdict)
		}
		if !slices.Equal(verdicts, test.verdicts) || e.Result != test.result {
			t.Errorf("%q: %q, %+v", test.fields, e.Result, e.Verdicts)
		}
	}
}
