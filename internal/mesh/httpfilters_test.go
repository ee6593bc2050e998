package mesh

import (
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
)

// decodeExtension decodes a filter whose configuration is a resource. Findings are "class path: problem", with paths in the
// configuration. That a policy is not carried out is left out.
func decodeExtension(t *testing.T, url string, config ...[]byte) (*HTTPFilter, string) {
	t.Helper()
	f, findings, err := DecodeExtension(join(text(1, "e"), nest(packed(url, join(config...)), 2)))
	if err != nil || f.Name != "e" || f.Type != url {
		t.Fatalf("error %v, filter %+v", err, f)
	}
	var got []string
	for _, f := range findings {
		if !strings.Contains(f.Problem, "carried out") {
			got = append(got, fmt.Sprintf("%v %s: %s", f.Class, strings.TrimPrefix(strings.TrimPrefix(f.Path, "typed_config"), "."), f.Problem))
		}
	}
	return f, strings.Join(got, "; ")
}

// Each type of filter is supported, without influence, or a finding.
func TestEachTypeOfFilterIsSupportedOrAFinding(t *testing.T) {
	const unknown, compressor, buffer = " is not supported", httpPrefix + "compressor.v3.Compressor", httpPrefix + "buffer.v3.Buffer"
	for _, test := range []struct {
		url     string
		config  []byte
		want    string
		refused bool
	}{
		{routerType, nil, "", false},
		{routerType, nest(nil, 8), "security upstream_http_filters: not supported", true},
		{httpCORSType, nil, "", false},
		{httpCORSType, nest(nil, 1), "security : unknown field 1 of " + httpCORSType, true},
		{httpFaultType, nil, "", false},
		{httpFaultType, nest(nil, 7, 3), "traffic response_rate_limit.header_limit: not supported", false},
		{grpcStatsType, number(1, 1), "", false},
		{grpcWebType, nil, "traffic : gRPC-Web is not translated to gRPC", false},
		{sessionType, nil, "", false},
		{sessionType, nest(nil, 1), "traffic session_state: not supported", false},
		{alpnType, nil, "", false},
		{alpnType, nest(number(1, 3), 1), "security alpn_override.upstream_protocol: unknown value 3", true},
		{statsType, number(1, 1), "", false},
		{statsType, join(nest(join(text(2, "requests_total"), text(3, "destination_port")), 8), nest(number(5, 1), 8)),
			"", false},
		{statsType, nest(join(text(2, "istio_tcp_sent_bytes_total"), nest(join(text(1, "port"), text(2, "destination.port")), 1)), 8),
			"cosmetic metrics: the tags of tcp_sent_bytes_total are added to requests only, not to connections", false},
		{statsType, nest(join(text(2, "requests_total"), nest(join(text(1, "a"), text(2, "node.id")), 1)), 8),
			"cosmetic metrics.dimensions: the tag a has no value: the expression node.id is not understood: column 1: the attribute node.id is not supported", false},
		{statsType, nest(join(text(2, "request_messages_total"), text(3, "reporter")), 8), "cosmetic metrics: the tags of request_messages_total are not changed", false},
		{peerMetadataType, nil, "", false},
		{rbacType, nest(nil, 1), "", false},
		{extAuthzType, nest(nest(text(1, "c"), 1), 1), "", false},
		{extAuthzType, join(nest(nest(text(1, "c"), 1), 1), nest(number(1, 9), 5)), "", false},
		{extAuthzType, join(nest(nest(text(1, "c"), 1), 1), nest(nil, 5)), "security with_request_body: not a size between 1 and 16777216 bytes", true},
		{extAuthzType, join(nest(nest(text(1, "c"), 1), 1), nest(number(1, 1<<30), 5)), "security with_request_body: not a size between 1 and 16777216 bytes", true},
		{extAuthzType, join(nest(nest(text(1, "c"), 1), 1), number(10, 1), number(18, 1), number(24, 1), nest(nil, 27)), "", false},
		{rbacType, nil, "", false},
		{jwtType, nil, "", false},
		{wasmType, nil, "traffic : the HTTP filter e of type " + wasmType + unknown, false},
		{luaType, nil, "traffic : the HTTP filter e of type " + luaType + unknown, false},
		{compressor, nil, "traffic : the HTTP filter e of type " + compressor + unknown, false},
		{buffer, nil, "traffic : the HTTP filter e of type " + buffer + unknown, false},
		{"x.Y", nil, "security : the HTTP filter e of type x.Y" + unknown, true},
	} {
		f, findings := decodeExtension(t, test.url, test.config)
		if findings != test.want || f.Refused != test.refused {
			t.Errorf("%s: refused %v, findings %s\nwant %v %s", test.url, f.Refused, findings, test.refused, test.want)
		}
	}
	for url := range knownFilters {
		if f, findings := decodeExtension(t, url); strings.Contains(findings, unknown) {
			t.Errorf("%s: %+v, findings %s", url, f, findings)
		}
	}
}

func TestExtensionsWithoutANameAreErrors(t *testing.T) {
	if _, _, err := DecodeExtension(nest(packed(routerType, nil), 2)); err != errNoName {
		t.Error(err)
	}
	if _, findings, err := DecodeExtension(text(1, "e")); err != nil || len(findings) != 1 || findings[0].Class != Security {
		t.Errorf("without a configuration: error %v, findings %v", err, findings)
	}
}

// Every policy that can restrict anything is refused, unless the table has it as carried out.
func TestPoliciesThatAreNotCarriedOutAreRefused(t *testing.T) {
	policies := map[string][]byte{
		rbacType:     nest(nil, 1),
		jwtType:      nest(nest(text(1, "/"), 1), 2),
		extAuthzType: nest(nest(text(1, "c"), 1), 1),
	}
	for url, config := range policies {
		for _, carried := range []bool{false, true} {
			before := carriedOut[url]
			carriedOut[url] = carried
			f, findings, err := DecodeExtension(join(text(1, "e"), nest(packed(url, config), 2)))
			carriedOut[url] = before
			if err != nil || f.Refused == carried || (len(findings) == 0) != carried {
				t.Errorf("%s: error %v, refused %v, findings %v; carried out: %v", url, err, f.Refused, findings, carried)
			}
		}
	}
	for _, url := range policyFilters {
		if _, listed := carriedOut[url]; !listed || policies[url] == nil {
			t.Errorf("%s is not tested, or the table does not have it", url)
		}
	}
	f, findings, err := DecodeExtension(join(text(1, "e"), nest(packed(extAuthzType, join(nest(nest(text(1, "c"), 1), 1), number(32, 1))), 2)))
	if err != nil || len(findings) > 0 || f.Refused {
		t.Errorf("shadow mode: error %v, refused %v, findings %v", err, f.Refused, findings)
	}
}

// Parts of tokens' verification.
var (
	keys      = nest(text(3, "{}"), 4)
	provider  = nest(join(text(1, "p"), nest(keys, 2)), 1) // of a JWT
	mayBeGone = nest(nil, 6)                               // a requirement
)

func jwtRule(requirement []byte) []byte { return nest(join(anyPath, nest(requirement, 2)), 2) }

// A request is refused by the whole filter if a part of it is not understood.
func TestFindingsOfTokens(t *testing.T) {
	rule := func(requirement []byte) []byte { return join(provider, jwtRule(requirement)) }
	of := func(fields ...[]byte) []byte {
		return nest(join(text(1, "p"), nest(join(keys, join(fields...)), 2)), 1)
	}
	where := "rules.requires"
	for _, test := range []struct {
		name     string
		config   []byte
		findings string
	}{
		{"a provider", rule(text(1, "p")), ""},
		{"a provider or no token", rule(nest(join(nest(text(1, "p"), 1), nest(mayBeGone, 1)), 3)), ""},
		{"a path without a requirement", join(provider, nest(anyPath, 2)), ""},
		{"a requirement with a name", join(nest(join(text(1, "n"), nest(mayBeGone, 2)), 5), nest(join(anyPath, text(3, "n")), 2)), ""},
		{"remote keys", nest(join(text(1, "p"), nest(nest(text(2, "c"), 3, 1), 2)), 1), ""},
		{"a retry", nest(join(text(1, "p"), nest(nest(join(nest(text(2, "c"), 1), nest(nil, 4)), 3), 2)), 1), ""},
		{"a retry without an interval", nest(join(text(1, "p"), nest(nest(join(nest(text(2, "c"), 1), nest(nest(nil, 1), 4)), 3), 2)), 1),
			"traffic providers.value.remote_jwks.retry_policy.retry_back_off: no interval; the default is used"},
		{"a retry at another priority", nest(join(text(1, "p"), nest(nest(join(nest(text(2, "c"), 1), nest(nest(nil, 4), 4)), 3), 2)), 1),
			"traffic providers.value.remote_jwks.retry_policy.retry_priority: not supported"},

		{"another provider", rule(text(1, "q")), "security : there is no q to refer to"},
		{"another name", nest(join(anyPath, text(3, "n")), 2), "security : there is no n to refer to"},
		{"a provider within a requirement", rule(nest(nest(text(1, "q"), 1), 3)), "security : there is no q to refer to"},
		{"two providers", join(provider, provider), "security : two providers with the name p"},
		{"two requirements with a name", join(nest(join(text(1, "n"), nest(mayBeGone, 2)), 5), nest(join(text(1, "n"), nest(mayBeGone, 2)), 5)), "security : two requirements with the name n"},
		{"a provider without keys", nest(text(1, "p"), 1), "security providers: a provider without keys"},
		{"two sets of keys", of(nest(nest(text(2, "c"), 1), 3)), "security providers.value.remote_jwks: more than one member of a oneof"},
		{"keys in a file", nest(join(text(1, "p"), nest(nest(text(1, "/f"), 4), 2)), 1), "security providers.value.local_jwks.filename: not supported"},
		{"remote keys without a cluster", nest(join(text(1, "p"), nest(nest(nil, 3), 2)), 1), "security providers.value.remote_jwks: keys without a cluster to fetch them from"},
		{"subjects", of(nest(nil, 19)), "security providers.value.subjects: not supported"},
		{"an expiry", of(number(20, 1)), "security providers.value.require_expiration: not supported"},
		{"an unknown field", of(number(99, 1)), "security providers.value: unknown field 99 of " + jwtProviderFields.name},
		{"a payload in a pseudo-header field", of(text(8, ":path")), "security providers.value.forward_payload_header: not the name of a header field that can be set"},
		{"a claim in the host", of(nest(join(text(1, "Host"), text(2, "c")), 15)), "security providers.value.claim_to_headers: not the name of a header field that can be set"},
		{"a claim by its path", of(nest(join(text(1, "a"), nest(nil, 3)), 15)), "security providers.value.claim_to_headers.claim_path: not supported"},
		{"a token without a header", of(nest(nil, 6)), "security providers.value.from_headers: not the name of a header field that can be set"},
		{"state of filters", nest(nil, 3), "security filter_state_rules: not supported"},
		{"an unknown field of the filter", nest(nil, 99), "security : unknown field 99 of " + jwtType},
		{"no match", nest(nest(mayBeGone, 2), 2), "security rules: a rule without a match"},
		{"a match that is not supported", nest(join(nest(join(text(1, "/"), nest(nil, 8)), 1), nest(mayBeGone, 2)), 2), "security rules.match.grpc: not supported"},
		{"nothing required", rule(nil), "security " + where + ": an empty requirement"},
		{"an unknown requirement", rule(nest(nil, 99)), "security " + where + ": unknown field 99 of " + requirementFields.name},
		{"no validation", rule(nest(nil, 7)), "security " + where + ".extract_only_without_validation: not supported"},
		{"two requirements", rule(join(text(1, "p"), mayBeGone)), "security " + where + ".allow_missing: more than one member of a oneof"},
		{"none of them", rule(nest(nil, 4)), "security " + where + ".requires_all: an empty list of requirements"},
	} {
		f, findings := decodeExtension(t, jwtType, test.config)
		if findings != test.findings || f.JWT.Refused != strings.HasPrefix(findings, "security") || f.JWT.Refused != f.Refused {
			t.Errorf("%s: refused %v, findings %s\nwant %s", test.name, f.JWT.Refused, findings, test.findings)
		}
	}
}

// A field that is absent has Envoy's default.
func TestDefaultsOfTokens(t *testing.T) {
	f, findings := decodeExtension(t, jwtType, nest(join(text(1, "p"), nest(nest(nest(text(2, "c"), 1), 3), 2)), 1))
	want := &JWT{Providers: []JWTProvider{{Name: "p", ClockSkew: time.Minute, Remote: &RemoteKeys{Service: HTTPService{Cluster: "c"}, CacheFor: 10 * time.Minute, Pause: time.Second}}}}
	if findings != "" || !reflect.DeepEqual(f.JWT, want) || f.JWT.Restricts() || f.Refused {
		t.Errorf("findings %s, %+v", findings, f.JWT)
	}
}

// The policy of retries, and the pause after a fetch that failed.
func TestRetriesOfFetchesOfKeys(t *testing.T) {
	seconds := func(n uint64, path ...int) []byte { return nest(number(1, n), path...) }
	for name, c := range map[string]struct {
		fields []byte
		want   RemoteKeys
	}{
		"no policy":        {nil, RemoteKeys{Pause: time.Second}},
		"an empty policy":  {nest(nil, 4), RemoteKeys{Pause: time.Second, Retries: 1, BackOff: time.Second, MaxBackOff: 10 * time.Second}},
		"no retries":       {nest(nest(nil, 2), 4), RemoteKeys{Pause: time.Second, BackOff: time.Second, MaxBackOff: 10 * time.Second}},
		"a number":         {nest(nest(number(1, 3), 2), 4), RemoteKeys{Pause: time.Second, Retries: 3, BackOff: time.Second, MaxBackOff: 10 * time.Second}},
		"an interval":      {nest(nest(seconds(2, 1), 1), 4), RemoteKeys{Pause: time.Second, Retries: 1, BackOff: 2 * time.Second, MaxBackOff: 20 * time.Second}},
		"two intervals":    {nest(nest(join(seconds(2, 1), seconds(3, 2)), 1), 4), RemoteKeys{Pause: time.Second, Retries: 1, BackOff: 2 * time.Second, MaxBackOff: 3 * time.Second}},
		"a pause":          {nest(seconds(7, 2), 3), RemoteKeys{Pause: 7 * time.Second, Early: true}},
		"an early fetch":   {nest(nil, 3), RemoteKeys{Pause: time.Second, Early: true}},
		"a listener waits": {nest(number(1, 1), 3), RemoteKeys{Pause: time.Second, Early: true}},
	} {
		f, findings := decodeExtension(t, jwtType, nest(join(text(1, "p"), nest(nest(join(nest(text(2, "c"), 1), c.fields), 3), 2)), 1))
		c.want.Service.Cluster, c.want.CacheFor = "c", 10*time.Minute
		if got := *f.JWT.Providers[0].Remote; findings != "" || got != c.want {
			t.Errorf("%s: findings %q, %+v\nwant %+v", name, findings, got, c.want)
		}
	}
}

func TestFindingsOfExternalAuthorization(t *testing.T) {
	server := nest(nest(text(1, "c"), 1), 1)
	web := func(fields ...[]byte) []byte { return nest(join(nest(text(2, "c"), 1), join(fields...)), 3) }
	for _, test := range []struct {
		name     string
		config   []byte
		findings string
	}{
		{"gRPC", server, ""},
		{"HTTP", web(), ""},
		{"no server", nil, "security : no server to ask"},
		{"a server without a cluster", nest(nil, 3), "security : no server to ask"},
		{"two servers", join(server, web()), "security http_service: more than one member of a oneof"},
		{"Google's gRPC", nest(nest(nil, 2), 1), "security grpc_service.google_grpc: not supported; security : no server to ask"},
		{"the old API", join(server, number(12, 1)), "security transport_api_version: version 2 is not supported"},
		{"metadata", join(server, text(8, "x")), "security metadata_context_namespaces: not supported"},
		{"an unknown field", join(server, number(99, 1)), "security : unknown field 99 of " + extAuthzType},
		{"a status", join(server, nest(number(1, 99), 7)), "security status_on_error: not the status of a response"},
		{"two lists of headers", join(nest(nil, 17), web(nest(nest(nil, 1), 7))), "security http_service.authorization_request.allowed_headers: two lists of headers that are sent"},
		{"two lists of headers in the other order", join(web(nest(nest(nil, 1), 7)), nest(nil, 17)), "security allowed_headers: two lists of headers that are sent"},
		{"another path", web(text(10, "/")), "security http_service.path_override: not supported"},
		{"a header that ends its field", web(nest(nest(join(text(1, "a"), text(2, "b\n")), 2), 7)), "security http_service.authorization_request.headers_to_add: not a header field that can be sent"},
		{"a retry", join(nest(join(nest(text(1, "c"), 1), nest(nil, 6)), 1)), "traffic grpc_service.retry_policy: not supported"},
	} {
		f, findings := decodeExtension(t, extAuthzType, test.config)
		if findings != test.findings || f.ExtAuthz.Refused != strings.HasPrefix(findings, "security") {
			t.Errorf("%s: refused %v, findings %s\nwant %s", test.name, f.ExtAuthz.Refused, findings, test.findings)
		}
	}
}

// A list of headers that is empty is not an absent one, and neither are others of the defaults.
func TestPresenceInExternalAuthorization(t *testing.T) {
	server := nest(nest(text(1, "c"), 1), 1)
	absent, _ := decodeExtension(t, extAuthzType, server)
	empty, _ := decodeExtension(t, extAuthzType, join(nest(join(nest(text(1, "c"), 1), nest(nil, 3)), 1), nest(nil, 17), nest(nil, 9), nest(nil, 5)))
	for _, test := range []struct {
		name      string
		got, want any
	}{
		{"headers, absent", absent.ExtAuthz.Headers == nil, true},
		{"headers, empty", empty.ExtAuthz.Headers == nil, false},
		{"fraction, absent", absent.ExtAuthz.Enabled, Fraction{100, 100}},
		{"fraction, empty", empty.ExtAuthz.Enabled, Fraction{0, 100}},
		{"timeout, absent", absent.ExtAuthz.GRPC.Timeout, 200 * time.Millisecond},
		{"timeout, 0", empty.ExtAuthz.GRPC.Timeout, time.Duration(0)},
		{"body, absent", absent.ExtAuthz.Body, (*AuthzBody)(nil)},
		{"body, empty", empty.ExtAuthz.Body, &AuthzBody{}},
		{"status, absent", absent.ExtAuthz.StatusOnError, 403},
	} {
		if !reflect.DeepEqual(test.got, test.want) {
			t.Errorf("%s: %+v, want %+v", test.name, test.got, test.want)
		}
	}
}

// FuzzExtension decodes the configurations of HTTP filters of each type.
func FuzzExtension(f *testing.F) {
	types := []string{rbacType, jwtType, extAuthzType, httpFaultType, alpnType, routerType, sessionType}
	f.Add(uint8(0), nest(accessPolicy("p", anyRule, anyRule), 1))
	f.Add(uint8(1), join(provider, jwtRule(nest(join(nest(text(1, "p"), 1), nest(mayBeGone, 1)), 3))))
	f.Add(uint8(2), join(nest(nest(text(1, "c"), 1), 1), nest(join(text(1, "f"), nest(text(1, "k"), 2), nest(number(5, 1), 3)), 14)))
	f.Fuzz(func(t *testing.T, kind uint8, config []byte) {
		e, findings, err := DecodeExtension(join(text(1, "e"), nest(packed(types[int(kind)%len(types)], config), 2)))
		if err != nil {
			return
		}
		restricts := e.RBAC != nil && e.RBAC.Refused || e.JWT != nil && e.JWT.Refused || e.ExtAuthz != nil && (e.ExtAuthz.Refused || e.ExtAuthz.Restricts() && e.ExtAuthz.Body != nil)
		if restricts && !e.Refused || e.Refused && len(findings) == 0 {
			t.Errorf("restricts %v, refused %v, findings %v", restricts, e.Refused, findings)
		}
	})
}

// Without such a resource all requests are refused, so a listener waits for it.
func TestFiltersNeedTheirConfigurationWithoutADefault(t *testing.T) {
	l := &Listener{Default: &FilterChain{HTTP: &HTTPManager{Filters: []HTTPFilter{
		{Name: "needed", OnItsOwn: true}, {Name: "optional", OnItsOwn: true, Optional: true}, {Name: "with a default", OnItsOwn: true, Type: rbacType},
		{Name: "router", Type: routerType}, {Name: "without a configuration"},
	}}}, Chains: []*FilterChain{{TCP: &TCPProxy{}}}}
	if got := slices.Collect(l.NeededExtensions()); !slices.Equal(got, []string{"needed"}) {
		t.Errorf("needed are %q", got)
	}
}
