package mesh

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/wire"
)

func join(parts ...[]byte) (b []byte) {
	for _, part := range parts {
		b = append(b, part...)
	}
	return b
}

func text(number int, value string) []byte   { return wire.AppendString(nil, number, value) }
func number(number int, value uint64) []byte { return wire.AppendVarint(nil, number, value) }

// Parts of a table of routes.
var (
	tableName = text(1, "80")
	anyPath   = nest(text(1, "/"), 1)
	toCluster = nest(text(1, "c"), 2)
)

// table returns a table with one virtual host of these fields; host of one with a route of these fields besides a match and
// an action; match and action of one with a route of these fields in its match or its action.
func table(fields ...[]byte) []byte {
	return join(tableName, nest(join(text(2, "*"), join(fields...)), 2))
}

func route(fields ...[]byte) []byte {
	return table(nest(join(anyPath, toCluster, join(fields...)), 3))
}

func match(fields ...[]byte) []byte {
	return table(nest(join(nest(join(text(1, "/"), join(fields...)), 1), toCluster), 3))
}

func action(fields ...[]byte) []byte {
	return table(nest(join(anyPath, nest(join(text(1, "c"), join(fields...)), 2)), 3))
}

func headerEdit(name, value string, more ...[]byte) []byte {
	return join(nest(join(text(1, name), text(2, value)), 1), join(more...))
}

// filter returns an entry of typed_per_filter_config, as a field of a route.
func filter(key, url string, config []byte) []byte {
	return nest(join(text(1, key), nest(packed(url, config), 2)), 13)
}

func filterConfig(url string, config []byte, more ...[]byte) []byte {
	return join(nest(packed(url, config), 1), join(more...))
}

const (
	rbacPerRoute = "envoy.extensions.filters.http.rbac.v3.RBACPerRoute"
	httpFault    = "envoy.extensions.filters.http.fault.v3.HTTPFault"
	corsPolicy   = "envoy.extensions.filters.http.cors.v3.CorsPolicy"
	filterConf   = "envoy.config.route.v3.FilterConfig"
)

// Findings of security refuse exactly what they concern: the table, a virtual host or a route.
func TestFindingsOfRoutesHaveClassAndPlaceAndRefuseWhatTheyConcern(t *testing.T) {
	const r, a, f = "virtual_hosts.routes", "virtual_hosts.routes.route", "virtual_hosts.routes.typed_per_filter_config"
	for _, test := range []struct {
		name    string
		bytes   []byte
		refused string // table, host, route or nothing
		want    string // class path: problem
	}{
		{"nothing to find", route(), "", ""},
		{"an unknown field of the table", join(route(), number(1000, 1)), "", "traffic : unknown field 1000 of envoy.config.route.v3.RouteConfiguration"},
		{"another choice of hosts", join(route(), text(18, "x")), "table", "security vhost_header: not supported"},
		{"a filter of the whole table", join(route(), nest(join(text(1, "rbac"), nest(packed("x.Y", nil), 2)), 16)), "table",
			"security typed_per_filter_config: the configuration of the filter rbac of type x.Y is not supported"},
		{"hosts that are discovered", join(route(), nest(nil, 9)), "", "traffic vhds: not supported"},
		{"a matcher in place of routes", table(nest(nil, 21)), "host", "security virtual_hosts.matcher: not supported"},
		{"limits of rates", table(nest(nil, 6)), "", "traffic virtual_hosts.rate_limits: not supported"},
		{"statistics", table(nest(nil, 5)), "", "cosmetic virtual_hosts.virtual_clusters: not supported"},
		{"an unknown requirement of TLS", table(number(4, 9)), "host", "security virtual_hosts.require_tls: unknown value 9"},
		{"a host without domains", join(tableName, nest(text(1, "h"), 2)), "", "traffic virtual_hosts: a virtual host without domains"},

		{"a route without a match", table(nest(toCluster, 3)), "route", "security " + r + ": a route without a match"},
		{"a route without an action", table(nest(anyPath, 3)), "route", "traffic " + r + ": a route without an action; its requests are refused"},
		{"an action for gRPC servers", table(nest(join(anyPath, nest(nil, 18)), 3)), "route",
			"traffic " + r + ".non_forwarding_action: not supported; traffic " + r + ": a route without an action; its requests are refused"},
		{"two matches", route(nest(text(2, "/x"), 1)), "route", "security " + r + ".match: more than once"},
		{"a match without a path", table(nest(join(nest(nil, 1), toCluster), 3)), "route", "security " + r + ".match: a match without a path"},
		{"an unknown condition", match(number(99, 1)), "route", "security " + r + ".match: unknown field 99 of envoy.config.route.v3.RouteMatch"},
		{"a condition that is not supported", match(nest(nil, 17)), "route", "security " + r + ".match.cookies: not supported"},
		{"a header matcher without a name", match(nest(nil, 6)), "route", "security " + r + ".match.headers: a header matcher without a name"},
		{"an unknown condition of a header", match(nest(nil, 6), nest(join(text(1, "x"), number(5, 1)), 6)), "route",
			"security " + r + ".match.headers: a header matcher without a name; security " + r + ".match.headers[1]: unknown field 5 of envoy.config.route.v3.HeaderMatcher"},
		{"a regular expression that is not one", match(nest(text(2, "a("), 10)), "route", "security " + r + ".match.safe_regex: not a regular expression: error parsing regexp: missing closing ): `a(`"},
		{"a parameter without a name", match(nest(nil, 7)), "route", "security " + r + ".match.query_parameters: a matcher of a query parameter without a name"},
		{"metadata without a value", match(nest(join(text(1, "f"), nest(text(1, "k"), 2)), 13)), "route", "security " + r + ".match.dynamic_metadata: a metadata matcher without a value"},
		{"metadata without a path", match(nest(join(text(1, "f"), nest(number(4, 1), 3)), 13)), "route", "security " + r + ".match.dynamic_metadata: a metadata matcher without a filter or a path"},
		{"metadata of an unsupported kind", match(nest(join(text(1, "f"), nest(text(1, "k"), 2), nest(nil, 3, 2)), 13)), "route",
			"security " + r + ".match.dynamic_metadata.value.double_match: not supported; security " + r + ".match.dynamic_metadata.value: a matcher without a pattern"},
		{"a list without an element", match(nest(join(text(1, "f"), nest(text(1, "k"), 2), nest(nil, 3, 6)), 13)), "route", "security " + r + ".match.dynamic_metadata.value: a matcher without a pattern"},

		{"an action without a cluster", table(nest(join(anyPath, nest(nil, 2)), 3)), "route", "traffic " + a + ": no cluster; the route is refused"},
		{"a cluster named by a header", table(nest(join(anyPath, nest(text(2, "x"), 2)), 3)), "route", "traffic " + a + ".cluster_header: not supported; the route is refused"},
		{"a plugin after a cluster", action(text(37, "x")), "route", "traffic " + a + ".cluster_specifier_plugin: not supported; the route is refused"},
		{"weights of 0", action(nest(text(1, "c"), 3, 1)), "route", "traffic " + a + ".weighted_clusters: the sum of the weights is 0 or too large; the route is refused"},
		{"weights that are too large", action(nest(join(nest(nest(number(1, 1<<32-1), 2), 1), nest(nest(number(1, 1), 2), 1)), 3)), "route",
			"traffic " + a + ".weighted_clusters: the sum of the weights is 0 or too large; the route is refused"},
		{"weights that are as large as they may be", action(nest(nest(nest(number(1, 1<<32-1), 2), 1), 3)), "", ""},
		{"an unknown denominator", action(nest(number(2, 3), 30, 3, 1)), "route", "security " + a + ".request_mirror_policies.runtime_fraction.default_value.denominator: unknown value 3"},
		{"subsets", action(nest(nil, 4)), "", "traffic " + a + ".metadata_match: not supported"},
		{"a priority", action(number(11, 1)), "", "traffic " + a + ".priority: routing priorities are not supported"},
		{"upgrades", action(nest(nil, 25)), "", "traffic " + a + ".upgrade_configs: not supported"},
		{"an older policy of origins", action(nest(nil, 17)), "route", "security " + a + ".cors: not supported"},
		{"a hash of a filter's state", action(nest(nil, 15, 6)), "", "traffic " + a + ".hash_policy.filter_state: not supported"},
		{"an unknown condition of retries", action(nest(text(1, "5xx,moon"), 9)), "", "traffic " + a + ".retry_policy.retry_on: the condition moon is not supported"},
		{"another predicate", action(nest(packed("x.Y", nil), 9, 5, 3)), "", "traffic " + a + ".retry_policy.retry_host_predicate: predicates of type x.Y are not supported"},
		{"a predicate by name", action(nest(text(1, "n"), 9, 5)), "", "traffic " + a + ".retry_policy.retry_host_predicate: predicates of type  are not supported"},
		{"other priorities", action(nest(packed("x.Y", nil), 9, 4, 3)), "", "traffic " + a + ".retry_policy.retry_priority: priorities of type x.Y are not supported"},
		{"no interval", action(nest(nil, 9, 8)), "", "traffic " + a + ".retry_policy.retry_back_off: no interval; the default is used"},
		{"a rewritten redirect", table(nest(join(anyPath, nest(text(10, "x"), 3)), 3)), "route", "security " + r + ".redirect.path_rewrite: not supported"},
		{"a redirect that ends its field", table(nest(join(anyPath, nest(text(1, "a\r\nb"), 3)), 3)), "route", "security " + r + ".redirect.host_redirect: not the value of a header field"},
		{"a port of a redirect", table(nest(join(anyPath, nest(number(8, 65536), 3)), 3)), "", "traffic " + r + ".redirect: not a port; the port stays"},
		{"a status that is not one", table(nest(join(anyPath, nest(number(1, 100), 7)), 3)), "route", "security " + r + ".direct_response: not the status of a response"},
		{"a body in a file", table(nest(join(anyPath, nest(join(number(1, 200), nest(text(1, "/etc/passwd"), 2)), 7)), 3)), "route", "security " + r + ".direct_response.body.filename: not supported"},

		{"a pseudo-header field", route(nest(headerEdit(":path", "/"), 9)), "route", "security " + r + ".request_headers_to_add: not the name of a header field that can be edited"},
		{"the host", route(text(12, "HOST")), "route", "security " + r + ".request_headers_to_remove: not the name of a header field that can be removed"},
		{"a value that ends its field", route(nest(headerEdit("a", "b\nc"), 10)), "route", "security " + r + ".response_headers_to_add: not the value of a header field"},
		{"two values", route(nest(headerEdit("a", "b"), 9), nest(nest(join(text(1, "a"), text(2, "b"), text(3, "c")), 1), 9)), "route",
			"security " + r + ".request_headers_to_add[1].header: two values of a header field"},
		{"an unknown operator", route(nest(headerEdit("a", "%%%REQ(%)%%MOON%"), 9)), "", "traffic " + r + ".request_headers_to_add: the operator MOON is not supported; it has no value"},
		{"an operator without a name", route(nest(headerEdit("a", "100%"), 9), nest(headerEdit("b", "%(x)%"), 9)), "",
			"traffic " + r + ".request_headers_to_add: a % without an operator; traffic " + r + ".request_headers_to_add[1]: a % without an operator"},
		{"an operator that is not closed", route(nest(headerEdit("a", "%REQ(x%"), 9)), "", "traffic " + r + ".request_headers_to_add: the operator REQ is not closed"},
		{"two forms of appending", route(nest(headerEdit("a", "b", nest(number(1, 1), 2), number(3, 2)), 9)), "", "traffic " + r + ".request_headers_to_add: append and append_action are both set; append is used"},

		{"a policy of one route", route(filter("rbac", rbacPerRoute, nest(nil, 2, 1))), "", ""},
		{"an exception from a policy", route(filter("rbac", rbacPerRoute, nil)), "", ""},
		{"a policy of one route that allows all", route(filter("rbac", rbacPerRoute, nest(nil, 2))), "", ""},
		{"a policy of one route that is not understood", route(filter("rbac", rbacPerRoute, nest(nil, 2, 4))), "route",
			"security " + f + ".rbac.matcher: not supported"},
		{"tokens of one route", route(filter("jwt", routeJWTType, text(2, "name"))), "", ""},
		{"no tokens of one route", route(filter("jwt", routeJWTType, number(1, 1))), "", ""},
		{"nothing about tokens", route(filter("jwt", routeJWTType, nil)), "route",
			"security " + f + ": a configuration of a route without content, which Envoy rejects"},
		{"two changes about tokens", route(filter("jwt", routeJWTType, join(text(2, "name"), number(1, 1)))), "route",
			"security " + f + ".disabled: more than one member of a oneof"},
		{"questions of one route", route(filter("authz", routeExtAuthzType, nest(nil, 2))), "", ""},
		{"another server of one route", route(filter("authz", routeExtAuthzType, nest(nil, 2, 5))), "route",
			"security " + f + ".check_settings.http_service: not supported"},
		{"questions of one route with bodies", route(filter("authz", routeExtAuthzType, nest(nest(number(1, 9), 3), 2))), "", ""},
		{"the same without a size", route(filter("authz", routeExtAuthzType, nest(nest(nil, 3), 2))), "route",
			"security " + f + ".check_settings.with_request_body: not a size between 1 and 16777216 bytes"},
		{"no questions of one route", route(filter("authz", routeExtAuthzType, number(1, 1))), "", ""},
		{"a change of a filter twice", route(filter("jwt", routeJWTType, number(1, 1)), filter("jwt", routeJWTType, number(1, 1))), "route",
			"security " + f + "[1]: two configurations of the filter jwt"},
		{"an unknown filter that may be left out", route(filter("x", filterConf, filterConfig("x.Y", nil, number(2, 1)))), "", ""},
		{"an unknown filter that may not", route(filter("x", filterConf, filterConfig("x.Y", nil))), "route", "security " + r + ".typed_per_filter_config: the configuration of the filter x of type x.Y is not supported"},
		{"a filter that is turned on", route(filter("rbac", filterConf, number(2, 1))), "route", "security " + f + ": the configuration of the filter rbac of type  is not supported"},
		{"a filter that is turned off", route(filter("envoy.filters.http.rbac", filterConf, number(3, 1))), "", ""},
		{"a filter of another name", route(filter("x", httpFault, nil)), "route", "security " + r + ".typed_per_filter_config: the configuration of the filter x of type " + httpFault + " is not supported"},
		{"sessions", route(filter("s", routeSessionType, nest(nil, 2))), "", "traffic " + f + ".stateful_session: not supported"},
		{"no sessions", route(filter("s", routeSessionType, number(1, 1))), "", ""},
		{"compression", route(filter("s", "envoy.extensions.filters.http.compressor.v3.CompressorPerRoute", nil)), "", "traffic " + f + ": the configuration of the filter s is not supported"},
		{"a buffer", route(filter("s", "envoy.extensions.filters.http.buffer.v3.BufferPerRoute", nil)), "", "traffic " + f + ": the configuration of the filter s is not supported"},
		{"a limit of rates", route(filter("s", "envoy.extensions.filters.http.local_ratelimit.v3.LocalRateLimit", nil)), "", "traffic " + f + ": the configuration of the filter s is not supported"},
		{"a limit of a fault's rate by header", route(filter(faultKey, httpFault, nest(nil, 7, 3))), "", "traffic " + r + ".typed_per_filter_config.response_rate_limit.header_limit: not supported"},
		{"a limited number of limited rates", route(filter(faultKey, httpFault, join(nest(number(1, 8), 7, 1), nest(number(1, 1), 6)))), "", "traffic " + r + ".typed_per_filter_config: response_rate_limit with max_active_faults; rates are not limited"},
		{"faults of some clients", route(filter(faultKey, httpFault, text(5, "n"))), "route", "security " + r + ".typed_per_filter_config.downstream_nodes: not supported"},
		{"a status of a fault", route(filter(faultKey, httpFault, nest(number(2, 42), 2))), "", "traffic " + r + ".typed_per_filter_config.abort.http_status: not the status of a response; requests are not aborted"},
		{"an unknown field of a policy of origins", route(filter(corsKey, corsPolicy, number(99, 1))), "route", "security " + r + ".typed_per_filter_config: unknown field 99 of " + corsPolicy},
		{"a span", route(nest(nil, 15)), "", "cosmetic " + r + ".tracing: not supported"},
	} {
		got, findings, err := DecodeRoutes(test.bytes)
		if err != nil {
			t.Errorf("%s: %v", test.name, err)
			continue
		}
		var found []string
		for _, finding := range findings {
			found = append(found, fmt.Sprintf("%v %v", finding.Class, finding))
		}
		host := got.Hosts[0]
		refused := map[string]bool{"table": got.Refused, "host": host.Refused, "route": len(host.Routes) > 0 && host.Routes[0].Refused}
		for what, is := range refused {
			if is != (what == test.refused) {
				t.Errorf("%s: refused %v, want %q", test.name, refused, test.refused)
				break
			}
		}
		if text := strings.Join(found, "; "); text != test.want {
			t.Errorf("%s: findings\n%s\nwant\n%s", test.name, text, test.want)
		}
	}
}

var update = flag.Bool("update", false, "write the golden file")

// The resource has each field that routes have. The tests with generated types made it and compare its value with theirs.
func TestEachFieldOfRoutesIsDecoded(t *testing.T) {
	b, err := os.ReadFile("testdata/routes.pb")
	if err != nil {
		t.Fatal(err)
	}
	routes, findings, err := DecodeRoutes(b)
	if err != nil || len(findings) > 0 {
		t.Fatalf("error %v, findings %v", err, findings)
	}
	got, err := json.MarshalIndent(routes, "", " ")
	if err != nil {
		t.Fatal(err)
	}
	const golden = "testdata/routes.json"
	if *update {
		if err := os.WriteFile(golden, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if want, err := os.ReadFile(golden); err != nil || !bytes.Equal(got, want) {
		t.Errorf("error %v; decoded\n%s", err, got)
	}
}

// The first of several routes that is refused does not refuse the others.
func TestARefusedRouteDoesNotRefuseOthers(t *testing.T) {
	bad := nest(join(anyPath, toCluster, filter("x", "x.Y", nil)), 3)
	good := nest(join(anyPath, toCluster), 3)
	got, _, err := DecodeRoutes(join(tableName, nest(join(text(2, "a"), good, bad, good), 2), nest(join(text(2, "b"), good, bad), 2)))
	if err != nil {
		t.Fatal(err)
	}
	var refused []bool
	for _, host := range got.Hosts {
		refused = append(refused, host.Refused)
		for _, route := range host.Routes {
			refused = append(refused, route.Refused)
		}
	}
	if want := []bool{false, false, true, false, false, false, true}; got.Refused || !reflect.DeepEqual(refused, want) {
		t.Errorf("refused %v, want %v", refused, want)
	}
}

func TestAFaultWithoutAUsableStatusDoesNotAbort(t *testing.T) {
	for _, status := range []uint64{0, 42, 600} {
		got, _, err := DecodeRoutes(route(filter(faultKey, httpFault, nest(number(2, status), 2))))
		if err != nil || got.Hosts[0].Routes[0].Filters.Fault.Abort != nil {
			t.Errorf("%d: error %v, fault %+v", status, err, got.Hosts[0].Routes[0].Filters.Fault)
		}
	}
}

// A finding that is not kept, since there are too many, refuses what it concerns nevertheless.
func TestFindingsThatAreNotKeptStillRefuse(t *testing.T) {
	var parts [][]byte
	for range 2 * maxFindings {
		parts = append(parts, nest(nil, 6))
	}
	got, findings, err := DecodeRoutes(table(append(parts, nest(join(anyPath, toCluster, filter("x", "x.Y", nil)), 3))...))
	if err != nil || len(findings) != maxFindings || got.Hosts[0].Refused || !got.Hosts[0].Routes[0].Refused {
		t.Errorf("error %v, %d findings, host refused %v, route refused %v", err, len(findings), got.Hosts[0].Refused, got.Hosts[0].Routes[0].Refused)
	}
	b := append([]byte{}, name...)
	for range 2 * maxFindings {
		b = append(b, nest(nil, 8)...)
	}
	c, _, err := DecodeCluster(append(b, nest(packed("x.Y", nil), 24, 3)...))
	if err != nil || !c.Transports[0].Refused {
		t.Errorf("error %v, transports %+v", err, c.Transports)
	}
}

func TestDomainsAreCompiled(t *testing.T) {
	got, findings, err := DecodeRoutes(join(tableName, nest(join(text(2, "A.example:80"), text(2, "*.A.example"), text(2, "*-b.example"), text(2, "A.*"), text(2, "*"), text(2, "a*b")), 2)))
	want := []Domain{{DomainExact, "a.example:80"}, {DomainSuffix, ".a.example"}, {DomainSuffix, "-b.example"}, {DomainPrefix, "a."}, {DomainAny, ""}, {DomainExact, "a*b"}}
	if err != nil || len(findings) > 0 || !reflect.DeepEqual(got.Hosts[0].Domains, want) {
		t.Errorf("error %v, findings %v, domains %+v", err, findings, got.Hosts[0].Domains)
	}
}

// Envoy rejects a table in which two hosts have one domain: a request could be for either.
func TestHostsWithTheSameDomainAreRefused(t *testing.T) {
	for _, domain := range []string{"a.example", "*.a.example", "a.*", "*"} {
		host := func(name, domain string) []byte { return nest(join(text(1, name), text(2, domain)), 2) }
		got, findings, err := DecodeRoutes(join(tableName, host("one", domain), host("two", "other"), host("three", strings.ToUpper(domain))))
		want := []Finding{{Class: Security, Problem: "the virtual hosts one and three have the same domain " + domain}}
		if err != nil || !reflect.DeepEqual(findings, want) {
			t.Errorf("error %v, findings %+v, want %+v", err, findings, want)
		}
		if !got.Hosts[0].Refused || got.Hosts[1].Refused || !got.Hosts[2].Refused || got.Refused {
			t.Errorf("%s: refused %v %v %v %v", domain, got.Hosts[0].Refused, got.Hosts[1].Refused, got.Hosts[2].Refused, got.Refused)
		}
	}
}

// A field that is present has another meaning than one that is absent, also if its value is the default.
func TestPresenceOfRouteFields(t *testing.T) {
	first := func(b []byte) Route {
		got, findings, err := DecodeRoutes(b)
		if err != nil || len(findings) > 0 {
			t.Errorf("error %v, findings %v", err, findings)
		}
		return got.Hosts[0].Routes[0]
	}
	fault := func(config ...[]byte) *Fault {
		return first(route(filter(faultKey, httpFault, join(config...)))).Filters.Fault
	}
	cors := func(config ...[]byte) *CORS {
		return first(route(filter(corsKey, corsPolicy, join(config...)))).Filters.CORS
	}
	header := func(fields ...[]byte) HeaderMatcher {
		return first(match(nest(join(text(1, "x"), join(fields...)), 6))).Match.Headers[0]
	}
	query := func(fields ...[]byte) QueryMatcher {
		return first(match(nest(join(text(1, "x"), join(fields...)), 7))).Match.Query[0]
	}
	mirror := func(fields ...[]byte) Fraction {
		return first(action(nest(join(fields...), 30))).Forward.Mirrors[0].Fraction
	}
	edit := func(fields ...[]byte) EditAction {
		return first(route(nest(headerEdit("a", "b", fields...), 9))).Edits.Request.Add[0].Action
	}
	cookie := func(fields ...[]byte) *time.Duration {
		return first(action(nest(join(fields...), 15, 2))).Forward.Hash[0].TTL
	}
	zero := new(time.Duration(0))
	forward := func(fields ...[]byte) *Forward { return first(action(fields...)).Forward }
	for _, test := range []struct {
		name      string
		got, want any
	}{
		{"timeout, absent", forward().Timeout, 15 * time.Second},
		{"timeout, 0", forward(nest(nil, 8)).Timeout, time.Duration(0)},
		{"max_grpc_timeout, absent", forward().MaxGRPCTimeout, (*time.Duration)(nil)},
		{"max_grpc_timeout, 0", forward(nest(nil, 23)).MaxGRPCTimeout, zero},
		{"idle_timeout, absent", forward().IdleTimeout, (*time.Duration)(nil)},
		{"idle_timeout, 0", forward(nest(nil, 24)).IdleTimeout, zero},
		{"max_stream_duration, absent", forward(nest(nil, 36)).MaxStreamLength, (*time.Duration)(nil)},
		{"max_stream_duration, 0", forward(nest(nil, 36, 1)).MaxStreamLength, zero},
		{"grpc_timeout_header_max, absent", forward(nest(nil, 36)).MaxGRPCStream, (*time.Duration)(nil)},
		{"grpc_timeout_header_max, 0", forward(nest(nil, 36, 2)).MaxGRPCStream, zero},
		{"retry_policy, absent", forward().Retry, (*RetryPolicy)(nil)},
		{"retry_policy, empty", *forward(nest(nil, 9)).Retry, RetryPolicy{Retries: 1, HostChoices: 1, BackOff: 25 * time.Millisecond, MaxBackOff: 250 * time.Millisecond}},
		{"num_retries, 0", forward(nest(nil, 9, 2)).Retry.Retries, uint32(0)},
		{"cluster_not_found_response_code, absent", forward().NotFoundCode, 503},
		{"cluster_not_found_response_code, set", forward(number(20, 2)).NotFoundCode, 500},
		{"case_sensitive, absent", first(match()).Match.IgnoreCase, false},
		{"case_sensitive, true", first(match(nest(number(1, 1), 4))).Match.IgnoreCase, false},
		{"case_sensitive, false", first(match(nest(nil, 4))).Match.IgnoreCase, true},
		{"header, no pattern", header(), HeaderMatcher{Name: "x", Present: true}},
		{"header, present", header(number(7, 1)), HeaderMatcher{Name: "x", Present: true}},
		{"header, absent", header(number(7, 0)), HeaderMatcher{Name: "x"}},
		{"header, not present", header(number(7, 1), number(8, 1)), HeaderMatcher{Name: "x", Present: true, Invert: true}},
		{"header, missing is empty", header(text(4, ""), number(14, 1)), HeaderMatcher{Name: "x", Kind: HeaderText, MissingIsEmpty: true}},
		{"query, no pattern", query(), QueryMatcher{Name: "x", Present: true}},
		{"query, absent", query(number(6, 0)), QueryMatcher{Name: "x"}},
		{"query, text", *query(nest(text(2, "p"), 5)).Text, StringMatcher{Kind: MatchPrefix, Text: "p"}},
		{"mirror, no fraction", mirror(), Fraction{100, 100}},
		{"mirror, an empty fraction", mirror(nest(nil, 3)), Fraction{0, 100}},
		{"mirror, a fraction", mirror(nest(join(number(1, 7), number(2, 2)), 3, 1)), Fraction{7, 1_000_000}},
		{"cookie, no TTL", cookie(), (*time.Duration)(nil)},
		{"cookie, a TTL of 0", cookie(nest(nil, 2)), zero},
		{"append_action, absent", edit(), AppendOrAdd},
		{"append_action, overwrite", edit(number(3, 2)), OverwriteOrAdd},
		{"append, false", edit(nest(nil, 2)), OverwriteOrAdd},
		{"append, true", edit(nest(number(1, 1), 2)), AppendOrAdd},
		{"an action replaces another", first(route(nest(number(1, 200), 7))).Forward, (*Forward)(nil)},
		{"fault, absent", first(route()).Filters.Fault, (*Fault)(nil)},
		{"fault, no percentage", *fault(nest(nest(number(1, 1), 3), 1)), Fault{Delay: time.Second, DelayFraction: Fraction{0, 100}, AbortFraction: Fraction{0, 100}, RateFraction: Fraction{0, 100}}},
		{"fault, a rate", *fault(nest(join(nest(number(1, 8), 1), nest(number(1, 7), 2)), 7)), Fault{Rate: 8 << 10, DelayFraction: Fraction{0, 100}, AbortFraction: Fraction{0, 100}, RateFraction: Fraction{7, 100}}},
		{"fault, turned off", *first(route(filter(faultKey, filterConf, number(3, 1)))).Filters.Fault, Fault{Disabled: true}},
		{"fault, wrapped", fault(text(3, "c")).Cluster, first(route(filter(faultKey, filterConf, filterConfig(httpFault, text(3, "c"))))).Filters.Fault.Cluster},
		{"fault, no limit", fault().MaxActive, (*uint32)(nil)},
		{"fault, a limit of 0", fault(nest(nil, 6)).MaxActive, new(uint32(0))},
		{"fault, a gRPC status of 0", *fault(nest(number(5, 0), 2)).Abort, Abort{GRPC: new(uint32(0))}},
		{"cors, absent", first(route()).Filters.CORS, (*CORS)(nil)},
		{"cors, empty", *cors(), CORS{Enabled: Fraction{100, 100}}},
		{"cors, an empty fraction", cors(nest(nil, 7)).Enabled, Fraction{0, 100}},
		{"cors, credentials", cors(nest(nil, 6)).Credentials, new(false)},
		{"cors, forwarding", cors(nest(nil, 10)).ForwardUnmatched, new(false)},
		{"cors, turned off", *first(route(filter(corsKey, filterConf, filterConfig(corsPolicy, nil, number(3, 1))))).Filters.CORS, CORS{Disabled: true}},
	} {
		if !reflect.DeepEqual(test.got, test.want) {
			t.Errorf("%s: %+v, want %+v", test.name, test.got, test.want)
		}
	}
}

func TestSecretsThatCannotBeUsedAreRefused(t *testing.T) {
	chain, key := nest(text(2, "chain"), 1), nest(text(2, "secret key"), 2)
	const c, r = "tls_certificate", "validation_context"
	for _, test := range []struct {
		name   string
		secret []byte
		want   string
	}{
		{"a certificate", nest(join(chain, key), 2), ""},
		{"roots", nest(nest(text(2, "ca"), 1), 4), ""},
		{"empty", nil, "security : neither a certificate nor roots"},
		{"another kind", nest(nil, 5), "security generic_secret: not supported; security : neither a certificate nor roots"},
		{"no key", nest(chain, 2), "security " + c + ": a certificate without its chain or its key"},
		{"no chain", nest(key, 2), "security " + c + ": a certificate without its chain or its key"},
		{"a key in a file", nest(join(chain, nest(text(1, "/k"), 2)), 2), "security " + c + ".private_key.filename: not supported; security " + c + ": a certificate without its chain or its key"},
		{"a key in the environment", nest(join(chain, nest(text(4, "K"), 2)), 2), "security " + c + ".private_key.environment_variable: not supported; security " + c + ": a certificate without its chain or its key"},
		{"a provider of keys", nest(join(chain, key, nest(nil, 6)), 2), "security " + c + ".private_key_provider: not supported"},
		{"a password", nest(join(chain, key, nest(nil, 3)), 2), "security " + c + ".password: not supported"},
		{"two keys", nest(join(chain, key, key), 2), "security " + c + ".private_key[1]: more than once"},
		{"no roots", nest(nil, 4), "security " + r + ": roots without a certificate"},
		{"roots with names", nest(join(nest(text(2, "ca"), 1), nest(text(1, "n"), 9)), 4), "security " + r + ".match_subject_alt_names: not supported"},
		{"roots that verify nothing", nest(join(nest(text(2, "ca"), 1), number(10, 1)), 4), "security " + r + ".trust_chain_verification: not supported"},
		{"an unknown field", join(nest(join(chain, key), 2), number(77, 1)), "security : unknown field 77 of envoy.extensions.transport_sockets.tls.v3.Secret"},
	} {
		secret, findings, err := DecodeSecret(join(text(1, "s"), test.secret))
		var found []string
		for _, finding := range findings {
			found = append(found, fmt.Sprintf("%v %v", finding.Class, finding))
		}
		if text := strings.Join(found, "; "); err != nil || text != test.want || secret.Refused != (test.want != "") {
			t.Errorf("%s: error %v, refused %v, findings\n%s\nwant\n%s", test.name, err, secret.Refused, text, test.want)
		}
	}
}

func TestAPrivateKeyIsNotPrinted(t *testing.T) {
	const key = "-----BEGIN PRIVATE KEY-----"
	secret, findings, err := DecodeSecret(join(text(1, "s"), nest(join(nest(text(2, "chain"), 1), nest(text(2, key), 2), nest(nil, 3)), 2)))
	if err != nil || string(secret.Certificate.Key.PEM()) != key {
		t.Fatalf("error %v, secret %+v", err, secret)
	}
	asJSON, err := json.Marshal(secret)
	if err != nil {
		t.Fatal(err)
	}
	hidden := struct{ inner PrivateKey }{secret.Certificate.Key}
	printed := fmt.Sprintf("%v %+v %#v %s %x %q %v %+v %#v %v %s", secret.Certificate.Key, *secret.Certificate, *secret.Certificate, *secret.Certificate, *secret.Certificate,
		*secret.Certificate, hidden, hidden, hidden, findings, asJSON)
	if strings.Contains(printed, "PRIVATE KEY") || strings.Contains(printed, fmt.Sprintf("%x", key)) || strings.Contains(printed, fmt.Sprint([]byte(key))) {
		t.Error(printed)
	}
	if (PrivateKey{}).PEM() != nil {
		t.Error("a key that is absent has bytes")
	}
}

// A decoded secret does not share memory with the resource: its receiver may use that again.
func TestContentIsCopied(t *testing.T) {
	b := join(text(1, "s"), nest(nest(text(2, "ca"), 1), 4))
	secret, _, err := DecodeSecret(b)
	if err != nil {
		t.Fatal(err)
	}
	clear(b)
	if string(secret.Roots.CA) != "ca" {
		t.Errorf("%q", secret.Roots.CA)
	}
}

func TestNamesAndTrustBundle(t *testing.T) {
	entry := func(host string, fields ...[]byte) []byte {
		return nest(join(text(1, host), nest(join(fields...), 2)), 1)
	}
	names, findings, err := DecodeNames(join(entry("a", text(1, "192.0.2.1"), text(1, "moon"), text(1, "fe80::1%eth0"), number(9, 1)), entry("b"), number(2, 1)))
	var found []string
	for _, finding := range findings {
		found = append(found, finding.String())
	}
	want := []string{"table.ips[1]: not an address", "table.ips[2]: not an address", "table: unknown field 9 of istio.networking.nds.v1.NameTable.NameInfo", ": unknown field 2 of istio.networking.nds.v1.NameTable"}
	if err != nil || !reflect.DeepEqual(found, want) || len(names.Hosts) != 2 || len(names.Hosts["a"].Addresses) != 1 || names.Hosts["b"].Addresses != nil {
		t.Errorf("error %v, names %+v, findings %q", err, names, found)
	}
	roots, findings, err := DecodeTrustBundle(join(text(34, "one"), text(30, "mesh"), number(99, 1), text(34, "two")))
	if err != nil || !reflect.DeepEqual(roots, []string{"one", "two"}) || len(findings) != 1 || findings[0].Class != Cosmetic {
		t.Errorf("error %v, roots %q, findings %v", err, roots, findings)
	}
}

func TestRoutesAndSecretsWithoutANameAreErrors(t *testing.T) {
	if _, _, err := DecodeRoutes(nil); err != errNoName {
		t.Error(err)
	}
	if _, _, err := DecodeSecret(nil); err != errNoName {
		t.Error(err)
	}
	if _, _, err := DecodeNames(text(34, "x")[:2]); err == nil {
		t.Error("a truncated table is not an error")
	}
}
