package configview

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/pillion-proxy/pillion/internal/controlplane"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/xds"
)

var update = flag.Bool("update", false, "write the golden files")

// message returns a protobuf message: numbers of fields, each with a text, a message or a number.
func message(fields ...any) (b []byte) {
	for i := 0; i < len(fields); i += 2 {
		number := protowire.Number(fields[i].(int))
		switch v := fields[i+1].(type) {
		case string:
			b = protowire.AppendString(protowire.AppendTag(b, number, protowire.BytesType), v)
		case []byte:
			b = protowire.AppendBytes(protowire.AppendTag(b, number, protowire.BytesType), v)
		case int:
			b = protowire.AppendVarint(protowire.AppendTag(b, number, protowire.VarintType), uint64(v))
		}
	}
	return b
}

var at = time.Date(2026, 2, 3, 4, 5, 6, 0, time.UTC)

func resource(kind xds.Type, name string, b []byte, change func(*controlplane.Resource)) controlplane.Resource {
	r := controlplane.Resource{Type: kind, Name: name, TypeURL: kind.URL(), Updated: at, Version: "0123", Bytes: func() ([]byte, error) { return b, nil }}
	if change != nil {
		change(&r)
	}
	return r
}

// fromFile returns a resource with all fields that internal/mesh decodes.
func fromFile(t *testing.T, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// inboundListener has a chain of HTTP with a policy and inline routes, one with routes of their own, and a default of TCP.
func inboundListener() []byte {
	const filters = "type.googleapis.com/envoy.extensions.filters."
	typed := func(kind string, b []byte) []byte { return message(1, filters+kind, 2, b) }
	rbac := func(kind string, action int) []byte {
		everything := message(3, 1)
		return typed(kind+".rbac.v3.RBAC", message(1, message(1, action, 2, message(1, "ns[shop]-policy[a]-rule[0]", 2, message(1, everything, 2, everything)))))
	}
	router := message(1, "router", 4, typed("http.router.v3.Router", nil))
	manager := func(fields ...any) []byte {
		fields = append(fields, 5, message(1, "rbac", 4, rbac("http", 1)), 5, router)
		return message(3, message(1, "hcm", 4, typed("network.http_connection_manager.v3.HttpConnectionManager", message(fields...))))
	}
	routes := message(1, "inbound|80||", 2, message(1, "web", 2, "*", 3, message(1, message(1, "/"), 2, message(1, "inbound|80||"))))
	inline := append(message(1, message(8, message(1, 80), 9, "raw_buffer", 10, "http/1.1")), manager(4, routes)...)
	own := append(message(1, message(9, "tls", 10, "istio-h2")), manager(3, message(1, message(3, message()), 2, "own"))...)
	byDefault := message(3, message(1, "rbac", 4, rbac("network", 0)),
		3, message(1, "tcp", 4, typed("network.tcp_proxy.v3.TcpProxy", message(1, "x", 2, "InboundPassthroughCluster"))))
	return message(1, "virtualInbound", 2, message(1, message(2, "0.0.0.0", 3, 15006)), 16, 1, 3, inline, 3, own, 25, byDefault)
}

// sample has resources of each type, and each state.
func sample(t *testing.T) controlplane.Resources {
	endpoint := func(ip string, health int, mode string) []byte {
		metadata := message(1, message(1, "envoy.transport_socket_match", 2, message(1, message(1, "tlsMode", 2, message(3, mode)))),
			1, message(1, "istio", 2, message(1, message(1, "workload", 2, message(3, "web-v1;shop;web;v1;cluster-1")))))
		return message(1, message(1, message(1, message(2, ip, 3, 8080))), 2, health, 3, metadata, 4, message(1, 3))
	}
	refusal := &controlplane.Refusal{Reason: "lb_policy: unknown value 77", At: at,
		Bytes:    func() ([]byte, error) { return message(1, "refused", 2, 3), nil },
		Findings: []mesh.Finding{{Class: mesh.Security, Path: "lb_policy", Problem: "unknown value 77"}}}
	const web = "outbound|80||web.shop.svc.cluster.local"
	return slices.Values([]controlplane.Resource{
		resource(xds.Clusters, web, message(1, web, 2, 3, 3, message(2, web), 4, message(1, 10), 6, 1), func(r *controlplane.Resource) {
			r.Refusal, r.Findings = refusal, []mesh.Finding{{Class: mesh.Cosmetic, Path: "a", Problem: "not supported"}}
		}),
		resource(xds.Clusters, "passthrough", message(1, "passthrough", 2, 4, 6, 6), func(r *controlplane.Resource) { r.Warming = true }),
		resource(xds.Clusters, "refused", nil, func(r *controlplane.Resource) { r.Bytes, r.Refusal = nil, refusal }),
		resource(xds.Clusters, "malformed", []byte{0xff}, func(r *controlplane.Resource) {
			r.Bytes, r.Refusal = nil, &controlplane.Refusal{Reason: "malformed", Bytes: r.Bytes}
		}),
		resource(xds.Endpoints, web, message(1, web, 2, message(1, message(1, "here", 2, "zone"), 2, endpoint("198.51.100.8", 2, "disabled"), 5, 1),
			2, message(2, endpoint("198.51.100.7", 1, "istio"))), nil),
		resource(xds.Endpoints, web, message(1, web), func(r *controlplane.Resource) { r.Warming = true }),
		resource(xds.Listeners, "virtualInbound", inboundListener(), func(r *controlplane.Resource) {
			r.Findings = []mesh.Finding{{Class: mesh.Traffic, Path: "freebind", Problem: "not supported"}}
		}),
		resource(xds.Routes, "wide", fromFile(t, "routes.pb"), nil),
		resource(xds.Names, "", message(1, message(1, "web.shop.svc.cluster.local", 2, message(1, "198.51.100.1", 1, "2001:db8::1", 2, "Kubernetes", 3, "web", 4, "shop")),
			1, message(1, "a.example", 2, message(1, "198.51.100.2", 2, "External"))), nil),
	})
}

func TestEachKindIsShown(t *testing.T) {
	for _, kind := range Kinds {
		for _, name := range []string{"", "web.shop.svc.cluster.local"} {
			if name != "" && kind != Clusters && kind != Endpoints && kind != Names {
				continue
			}
			view, err := Show(sample(t), kind, name)
			if err != nil {
				t.Fatal(err)
			}
			for _, l := range view.Listeners { // whether policies are carried out is not a matter of this package
				for i := range l.Chains {
					l.Chains[i].Refused = false
				}
			}
			for i := range view.Policies {
				view.Policies[i].Refused = false
			}
			got, err := json.MarshalIndent(view, "", " ")
			if err != nil {
				t.Fatal(err)
			}
			file := filepath.Join("testdata", string(kind)+strings.ReplaceAll(name, "web.shop.svc.cluster.local", "_named")+".json")
			if *update {
				if err := os.WriteFile(file, append(got, '\n'), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(file)
			if err != nil || !bytes.Equal(append(got, '\n'), want) {
				t.Errorf("%s is not as %s (%v):\n%s", kind, file, err, got)
			}
		}
	}
}

func TestARefusedChainIsShown(t *testing.T) {
	typed := message(1, "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy", 2, message(1, "x", 2, "a"))
	filter := message(1, "tcp", 4, typed)
	l := message(1, "l", 3, message(4, message(1, 1), 3, filter), 25, message(3, filter)) // use_proxy_proto
	view, err := Show(slices.Values([]controlplane.Resource{resource(xds.Listeners, "l", l, nil)}), Listeners, "")
	if err != nil || len(view.Listeners) != 1 || len(view.Listeners[0].Chains) != 2 {
		t.Fatalf("error %v: %+v", err, view)
	}
	if chains := view.Listeners[0].Chains; !chains[0].Refused || chains[1].Refused {
		t.Errorf("chains: %+v", chains)
	}
}

func TestFindingsAreListedByImportance(t *testing.T) {
	var got []string
	for _, f := range FindingsOf(sample(t)) {
		got = append(got, strings.Join([]string{f.Class, f.Type, f.Resource, f.Path, f.Problem}, " "))
	}
	want := []string{
		"security CDS outbound|80||web.shop.svc.cluster.local lb_policy unknown value 77",
		"security CDS refused lb_policy unknown value 77",
		"security CDS malformed  malformed",
		"traffic LDS virtualInbound freebind not supported",
	}
	if !slices.Equal(got, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

func TestAnUnknownNameIsAnError(t *testing.T) {
	for _, kind := range Kinds {
		if _, err := Show(sample(t), kind, "nothing"); !errors.Is(err, ErrNotFound) {
			t.Errorf("%s: %v", kind, err)
		}
	}
	if v, err := Show(slices.Values([]controlplane.Resource(nil)), Clusters, ""); err != nil || v.Len() != 0 {
		t.Errorf("without a name: %v, %v", v, err)
	}
}

// Each object can be asked for by a name that ObjectNames has.
func TestObjectsAreFoundByTheirNames(t *testing.T) {
	for _, kind := range Kinds {
		all, err := Show(sample(t), kind, "")
		if err != nil || all.Len() == 0 {
			t.Fatalf("%s: %v", kind, err)
		}
		found := 0
		for _, name := range all.ObjectNames() {
			some, err := Show(sample(t), kind, name)
			if err != nil {
				t.Errorf("%s: %v", kind, err)
				continue
			}
			found += some.Len()
		}
		if found != all.Len() {
			t.Errorf("%s: %d objects by name, %d in all", kind, found, all.Len())
		}
	}
}

func TestHandler(t *testing.T) {
	handler := Handler(func() controlplane.Resources { return sample(t) })
	for target, want := range map[string]struct {
		code int
		part string
	}{
		"/config/clusters":                 {200, `"kind":"cluster"`},
		"/config/policy":                   {200, `"kind":"policy"`},
		"/config/cluster?name=passthrough": {200, `"discovery":"original destination"`},
		"/config/cluster?name=x":           {404, `no cluster is named "x"`},
		"/config/secret":                   {404, `"secret" is not a kind of object: use cluster, listener, route, endpoint, policy, name`},
		"/config/findings":                 {200, `"problem":"unknown value 77"`},
		"/other":                           {404, ""},
	} {
		got := httptest.NewRecorder()
		handler.ServeHTTP(got, httptest.NewRequest("GET", target, nil))
		if got.Code != want.code || !strings.Contains(got.Body.String(), want.part) {
			t.Errorf("%s: %d %s, want %d with %s", target, got.Code, got.Body, want.code, want.part)
		}
	}
	got := httptest.NewRecorder()
	Handler(nil).ServeHTTP(got, httptest.NewRequest("GET", "/config/cluster", nil))
	if got.Code != 404 || !strings.Contains(got.Body.String(), "no control plane") {
		t.Errorf("without a control plane: %d %s", got.Code, got.Body)
	}
}

func TestChainsAreMatchedInWords(t *testing.T) {
	prefix := netip.MustParsePrefix
	for want, m := range map[string]mesh.ChainMatch{
		"all":                                {},
		"port 15006":                         {Port: 15006},
		"plain HTTP":                         {Transport: "raw_buffer", Protocols: []string{"http/1.1", "h2c"}},
		"plain":                              {Transport: "raw_buffer"},
		"port 80, HTTP over TLS of the mesh": {Port: 80, Transport: "tls", Protocols: []string{"istio-http/1.0", "istio-http/1.1", "istio-h2"}},
		"TCP over TLS of the mesh":           {Transport: "tls", Protocols: []string{"istio-peer-exchange", "istio"}},
		"TLS of the mesh":                    {Transport: "tls", Protocols: []string{"istio", "istio-peer-exchange", "istio-h2"}},
		"TLS with ALPN h2, istio":            {Transport: "tls", Protocols: []string{"h2", "istio"}},
		"SNI a.example or *.b.example, TLS":  {Transport: "tls", ServerNames: []string{"a.example", "*.b.example"}},
		"to 198.51.100.1 or 2001:db8::/32":   {Destinations: []netip.Prefix{prefix("198.51.100.1/32"), prefix("2001:db8::/32")}},
		"from this host":                     {SourceType: mesh.LocalSource},
		"from other hosts, from 203.0.113.0/24, from ports 1 2": {SourceType: mesh.ExternalSource, Sources: []netip.Prefix{prefix("203.0.113.0/24")}, SourcePorts: []uint16{1, 2}},
	} {
		if got := matchWords(&m); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}

func TestRequestsAreMatchedInWords(t *testing.T) {
	exact := func(s string) mesh.StringMatcher { return mesh.StringMatcher{Text: s} }
	for want, m := range map[string]mesh.RouteMatch{
		"/*":              {Path: "/"},
		"/a":              {Kind: mesh.PathExact, Path: "/a"},
		"~/[a-z]":         {Kind: mesh.PathRegex, Path: "/[a-z]"},
		"/a[/*]":          {Kind: mesh.PathSeparatedPrefix, Path: "/a"},
		"/A* in any case": {Path: "/A", IgnoreCase: true},
		"/*, x=1, not y~b|c, with z, no w, n from 1 to 4": {Path: "/", Headers: []mesh.HeaderMatcher{
			{Name: "x", Kind: mesh.HeaderText, Text: exact("1")},
			{Name: "y", Kind: mesh.HeaderText, Text: mesh.StringMatcher{Kind: mesh.MatchRegex, Text: "b|c"}, Invert: true},
			{Name: "z", Present: true}, {Name: "w", Present: true, Invert: true}, {Name: "n", Kind: mesh.HeaderRange, Start: 1, End: 5}}},
		"/*, ?q=a*, ?p, no ?r":        {Path: "/", Query: []mesh.QueryMatcher{{Name: "q", Text: &mesh.StringMatcher{Kind: mesh.MatchPrefix, Text: "a"}}, {Name: "p", Present: true}, {Name: "r"}}},
		"/*, metadata jwt.claims.sub": {Path: "/", Metadata: []mesh.MetadataMatcher{{Filter: "jwt", Path: []string{"claims", "sub"}}}},
	} {
		if got := routeMatch(&m); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}

func TestDestinationsOfRoutesInWords(t *testing.T) {
	for want, r := range map[string]mesh.Route{
		"a": {Forward: &mesh.Forward{Clusters: []mesh.WeightedCluster{{Name: "a", Weight: 1}}}},
		"a (90), b (10); timeout 3s, 2 retries, mirrored to c, prefix becomes /x, host becomes h, by hash": {Forward: &mesh.Forward{
			Clusters: []mesh.WeightedCluster{{Name: "a", Weight: 90}, {Name: "b", Weight: 10}}, Timeout: 3 * time.Second,
			Mirrors: []mesh.Mirror{{Cluster: "c"}}, PrefixRewrite: "/x", HostRewrite: "h", Hash: []mesh.HashPolicy{{}}}},
		"b; 2 retries, delayed by 5s for 50%, answered 503 for 0.1%, CORS, own rbac, without jwt": {
			Forward: &mesh.Forward{Clusters: []mesh.WeightedCluster{{Name: "b", Weight: 1}}},
			Filters: mesh.RouteFilters{CORS: &mesh.CORS{}, Policies: []mesh.RoutePolicy{{Filter: "rbac"}, {Filter: "jwt", Disabled: true}},
				Fault: &mesh.Fault{Delay: 5 * time.Second, DelayFraction: mesh.Fraction{Numerator: 50, Denominator: 100},
					Abort: &mesh.Abort{Status: 503}, AbortFraction: mesh.Fraction{Numerator: 10, Denominator: 10_000}}}},
		"answer 200; answered with gRPC status 14 for 100%": {Respond: &mesh.Response{Status: 200}, Filters: mesh.RouteFilters{
			Fault: &mesh.Fault{Abort: &mesh.Abort{GRPC: new(uint32(14))}, AbortFraction: mesh.Fraction{Numerator: 100, Denominator: 100}}}},
		"redirect 307 https://{host}":           {Redirect: &mesh.Redirect{Scheme: "https", Code: 307}},
		"redirect 301 https://b.example:8443/x": {Redirect: &mesh.Redirect{Scheme: "https", Host: "b.example", Port: 8443, Path: "/x", Code: 301}},
		"answer 503":                            {Respond: &mesh.Response{Status: 503}},
		"nowhere":                               {},
	} {
		got := routeTo(&r)
		if with := routeWith(&r, &mesh.VirtualHost{Retry: &mesh.RetryPolicy{Retries: 2}}); with != "" && strings.Contains(want, ";") {
			got += "; " + with
		}
		if got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}

func TestTransportsInWords(t *testing.T) {
	for want, transports := range map[string][]mesh.Transport{
		"plain":                  nil,
		"mutual TLS in the mesh": {{TLSMode: "istio", TLS: &mesh.UpstreamTLS{Certificate: "default", Roots: "ROOTCA"}}, {}},
		"TLS":                    {{TLS: &mesh.UpstreamTLS{Roots: "ROOTCA"}}},
		"TLS, not verified":      {{TLS: &mesh.UpstreamTLS{}}},
		"refused":                {{TLS: &mesh.UpstreamTLS{Roots: "ROOTCA"}, Refused: true}},
	} {
		if got := upstreamTLS(&mesh.Cluster{Transports: transports}); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
	for want, tls := range map[string]*mesh.DownstreamTLS{
		"none":                                   nil,
		"server only":                            {Certificates: []string{"kubernetes://cert"}},
		"mutual":                                 {Roots: "ROOTCA", RequireClient: true},
		"mutual if the client has a certificate": {Roots: "ROOTCA"},
	} {
		if got := downstreamTLS(tls); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}

func TestOutliersAndDurationsInWords(t *testing.T) {
	for want, o := range map[string]*mesh.Outliers{
		"":                   nil,
		"no host is ejected": {},
		"ejected for 1m after 5 5xx or 2 local errors in a row, at most 10%": {Consecutive5xx: 5, ConsecutiveLocal: 2, Ejection: time.Minute, MaxPercent: 10},
	} {
		if got := outliers(o); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
	for want, d := range map[string]time.Duration{"": 0, "250ms": 250 * time.Millisecond, "1m30s": 90 * time.Second, "2h": 2 * time.Hour, "1h1m": 61 * time.Minute} {
		if got := duration(d); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}

func TestPoliciesInWords(t *testing.T) {
	some := []mesh.AccessPolicy{{Name: "ns[shop]-policy[a]-rule[0]"}, {Name: "b"}}
	for want, r := range map[string]mesh.RBAC{
		"allows all": {},
		"denies all": {Rules: &mesh.Rules{}}, // present, and without a policy that allows something
		"allows only ns[shop]-policy[a]-rule[0], b":                  {Rules: &mesh.Rules{Policies: some}},
		"denies ns[shop]-policy[a]-rule[0], b; dry run: denies all":  {Rules: &mesh.Rules{Action: mesh.Deny, Policies: some}, Shadow: &mesh.Rules{}},
		"allows all; dry run: records ns[shop]-policy[a]-rule[0], b": {Shadow: &mesh.Rules{Action: mesh.Log, Policies: some}},
		"denies all: not understood":                                 {Refused: true},
		"denies all: not understood; dry run: allows all":            {Rules: &mesh.Rules{Refused: true}, Shadow: &mesh.Rules{Action: mesh.Deny}},
	} {
		if got := rbacWords(&r); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
	for want, got := range map[string]string{
		"verifies tokens of https://a.example, b":          jwtWords(&mesh.JWT{Providers: []mesh.JWTProvider{{Name: "a", Issuer: "https://a.example"}, {Name: "b"}}}),
		"asks outbound|9000||authz":                        authzWords(&mesh.ExtAuthz{GRPC: &mesh.GRPCService{Cluster: "outbound|9000||authz"}}),
		"asks a, and allows what it cannot be asked about": authzWords(&mesh.ExtAuthz{HTTP: &mesh.HTTPAuthz{Service: mesh.HTTPService{Cluster: "a"}}, AllowFailure: true}),
		"asks a server that is not understood":             authzWords(&mesh.ExtAuthz{Refused: true}),
	} {
		if got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
	if got := rbacWords(nil) + jwtWords(nil) + authzWords(nil); got != "" {
		t.Errorf("another filter: %q", got)
	}
}
