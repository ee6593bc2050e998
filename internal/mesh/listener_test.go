package mesh

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/pillion-proxy/pillion/internal/wire"
)

const lName = "l" // of listeners

func field1(name string) []byte { return wire.AppendString(nil, 1, name) }

// tcpFilter is a network filter that forwards to the cluster c; more are fields of its TcpProxy.
func tcpFilter(more ...[]byte) []byte {
	return nest(packed(tcpProxyType, join(wire.AppendString(nil, 2, "c"), join(more...))), 3, 4)
}

// httpManager is a network filter with an HttpConnectionManager; more are its fields between the routes and the router.
func httpManager(more ...[]byte) []byte {
	router := nest(packed(routerType, nil), 5, 4)
	return nest(packed(httpManagerType, join(wire.AppendBytes(nil, 3, wire.AppendString(nil, 2, "r")), join(more...), router)), 3, 4)
}

// chain is a filter chain of a listener.
func chain(fields ...[]byte) []byte { return nest(join(fields...), 3) }

func tlsSocket(fields ...[]byte) []byte {
	certificate := nest(wire.AppendString(nil, 1, "default"), 1, 6)
	return nest(packed(shortType(downstreamTLSType), join(certificate, join(fields...))), 6, 3)
}

func TestFindingsOfListeners(t *testing.T) {
	roots := nest(wire.AppendString(nil, 1, "ROOTCA"), 1, 7)
	yes := nest(wire.AppendVarint(nil, 1, 1))
	log := func(fields []byte) []byte { return nest(fields, 22) }
	filter := func(url string, config []byte) []byte { return nest(packed(url, config), 9, 3) }
	httpFilter := func(name, url string, more ...[]byte) []byte {
		return nest(join(field1(name), nest(packed(url, nil), 4), join(more...)), 5)
	}
	suites := func(names ...string) (b []byte) {
		for _, name := range names {
			b = append(b, text(3, name)...)
		}
		return nest(b, 1, 1)
	}
	const (
		manager    = "filter_chains.filters.typed_config"
		parameters = "filter_chains.transport_socket.typed_config.common_tls_context[1].tls_params"
		validation = "filter_chains.transport_socket.typed_config.common_tls_context[2].combined_validation_context.default_validation_context"
	)
	for _, test := range []struct {
		name    string
		bytes   []byte
		want    string // class path: problem
		refused string // "listener", "chain" or neither
	}{
		{"nothing wrong", chain(tcpFilter()), "", ""},
		{"an unknown field of the listener", wire.AppendVarint(nil, 1000, 1), "security : unknown field 1000 of envoy.config.listener.v3.Listener", "listener"},
		{"a way to choose chains that is not supported", nest(nil, 32), "security filter_chain_matcher: not supported", "listener"},
		{"a field that traffic misses", nest(nil, 13), "traffic socket_options: not supported", ""},
		{"a field that traffic does not need", nest(nil, 39), "cosmetic stats_matcher: not supported", ""},
		{"a listener that is not on a port", nest(nil, 27), "traffic internal_listener: not supported", ""},
		{"a name instead of an address", nest(wire.AppendString(nil, 2, "localhost"), 2, 1), "traffic address: not an IP address", ""},
		{"another listener filter", filter("x.Y", nil), "security listener_filters.typed_config: listener filters of type x.Y are not supported", "listener"},
		{"a listener filter without a configuration", nest(field1("envoy.filters.listener.tls_inspector"), 9), "security listener_filters: a listener filter without a configuration", "listener"},
		{"versions of PROXY that are not accepted", filter(shortType(proxyProtocolType), nest(nil, 4)), "security listener_filters.typed_config.disallowed_versions: not supported", "listener"},
		{"a predicate without a rule", nest(join(nest(packed(shortType(originalDstType), nil), 3), nest(nil, 4)), 9), "security listener_filters.filter_disabled: a predicate without a rule", "listener"},
		{"a rule that matches not any", nest(join(nest(packed(shortType(originalDstType), nil), 3), nest(wire.AppendVarint(nil, 4, 0), 4)), 9), "security listener_filters.filter_disabled: a predicate without a rule", "listener"},

		{"a match that is not supported", chain(nest(wire.AppendString(nil, 4, "x"), 1), tcpFilter()), "security filter_chains.filter_chain_match.address_suffix: not supported", "listener"},
		{"an unknown field of a match", chain(nest(wire.AppendString(nil, 99, "x"), 1), tcpFilter()), "security filter_chains.filter_chain_match: unknown field 99 of envoy.config.listener.v3.FilterChainMatch", "listener"},
		{"a partial wildcard", chain(nest(wire.AppendString(nil, 11, "a*.example.com"), 1), tcpFilter()), "security filter_chains.filter_chain_match.server_names: a wildcard other than a leading *. is not supported", "listener"},
		{"all names by a wildcard", chain(nest(wire.AppendString(nil, 11, "*"), 1), tcpFilter()), "security filter_chains.filter_chain_match.server_names: a wildcard other than a leading *. is not supported", "listener"},
		{"a port that would match all ports", chain(nest(nil, 1, 8), tcpFilter()), "security filter_chains.filter_chain_match.destination_port: not a port", "listener"},
		{"a range that is too long", chain(nest(join(field1("192.0.2.1"), nest(wire.AppendVarint(nil, 1, 33), 2)), 1, 3), tcpFilter()), "security filter_chains.filter_chain_match.prefix_ranges: not a range of addresses", "listener"},
		{"an IPv4 address in the form of IPv6", chain(nest(field1("::ffff:192.0.2.1"), 1, 3), tcpFilter()), "security filter_chains.filter_chain_match.prefix_ranges: not a range of addresses", "listener"},
		{"two chains with the same match", join(chain(tcpFilter()), chain(tcpFilter())), "security : filter chains 0 and 1 have the same match", "listener"},
		{"two chains whose matches have a combination in common", join(
			chain(nest(join(wire.AppendString(nil, 11, "a.test"), wire.AppendString(nil, 11, "B.test")), 1), tcpFilter()),
			chain(nest(join(wire.AppendString(nil, 11, "c.test"), wire.AppendString(nil, 11, "b.test")), 1), tcpFilter()),
		), "security : filter chains 0 and 1 have the same match", "listener"},

		{"a chain without filters", chain(), "security filter_chains: no filter that forwards connections", "chain"},
		{"an unknown field of a chain", chain(tcpFilter(), wire.AppendVarint(nil, 99, 1)), "security filter_chains: unknown field 99 of envoy.config.listener.v3.FilterChain", "chain"},
		{"addresses that clients choose", chain(tcpFilter(), nest(yes, 4)), "security filter_chains.use_proxy_proto: not supported", "chain"},
		{"another network filter", chain(nest(join(field1("f"), nest(packed("x.Y", nil), 4)), 3), tcpFilter()), "security filter_chains.filters: the filter f of type x.Y is not supported", "chain"},
		{"a network filter without a configuration", chain(nest(field1("f"), 3), tcpFilter()), "security filter_chains.filters: the filter f has no configuration", "chain"},
		{"a filter whose configuration comes on its own", chain(nest(join(field1("f"), nest(nil, 5)), 3), tcpFilter()),
			"security filter_chains.filters.config_discovery: not supported; security filter_chains.filters: the filter f has no configuration", "chain"},
		{"a policy in JSON", chain(nest(join(field1("rbac"), nest(packed(udpaStructType, field1(typePrefix+networkRBACType)), 4)), 3), tcpFilter()),
			"security filter_chains.filters: the filter rbac of type " + udpaStructType + " is not supported", "chain"},
		{"metadata exchange in JSON", chain(nest(packed(udpaStructType, field1(typePrefix+metadataExchangeType)), 3, 4), tcpFilter()), "", ""},
		{"a filter after the end", chain(tcpFilter(), nest(packed(networkRBACType, nil), 3, 4)), "security filter_chains.filters[1]: a filter after the one that forwards connections", "chain"},
		{"another transport", chain(tcpFilter(), nest(packed("x.Y", nil), 6, 3)), "security filter_chains.transport_socket.typed_config: transport sockets of type x.Y are not supported", "chain"},
		{"a transport without a configuration", chain(tcpFilter(), nest(field1("tls"), 6)), "security filter_chains.transport_socket: a transport socket without a configuration", "chain"},

		{"TLS that is understood", chain(tcpFilter(), tlsSocket(roots, nest(yes, 2))), "", ""},
		{"TLS without a certificate", chain(tcpFilter(), nest(packed(shortType(downstreamTLSType), nil), 6, 3)), "security filter_chains.transport_socket.typed_config: no certificate to present", "chain"},
		{"clients that are not verified", chain(tcpFilter(), tlsSocket(nest(yes, 2))), "security filter_chains.transport_socket.typed_config: no roots to verify clients with", "chain"},
		{"names that are not verified", chain(tcpFilter(), tlsSocket(nest(field1("x"), 1, 8, 1, 9))), "security filter_chains.transport_socket.typed_config: no roots to verify clients with", "chain"},
		{"a revocation list in a file", chain(tcpFilter(), tlsSocket(roots, nest(text(1, "/crl.pem"), 1, 8, 1, 7))), "", ""},
		{"a revocation list without a source", chain(tcpFilter(), tlsSocket(roots, nest(nil, 1, 8, 1, 7))), "security " + validation + ".crl: a revocation list without a file", "chain"},
		{"a revocation list without a name", chain(tcpFilter(), tlsSocket(roots, nest(text(1, ""), 1, 8, 1, 7))), "security " + validation + ".crl: a revocation list without a file", "chain"},
		{"a revocation list in the listener", chain(tcpFilter(), tlsSocket(roots, nest(text(3, "x"), 1, 8, 1, 7))),
			"security " + validation + ".crl.inline_string: not supported; security " + validation + ".crl: a revocation list without a file", "chain"},
		{"a revocation list in a variable", chain(tcpFilter(), tlsSocket(roots, nest(join(text(1, "/crl.pem"), text(4, "X")), 1, 8, 1, 7))),
			"security " + validation + ".crl.environment_variable: not supported", "chain"},
		{"clients with any certificate", chain(tcpFilter(), tlsSocket(roots, nest(wire.AppendVarint(nil, 10, 1), 1, 8, 1))),
			"security filter_chains.transport_socket.typed_config.common_tls_context[2].combined_validation_context.default_validation_context.trust_chain_verification: not supported", "chain"},
		{"a certificate in the listener", chain(tcpFilter(), tlsSocket(nest(nil, 1, 2))), "security filter_chains.transport_socket.typed_config.common_tls_context[1].tls_certificates: not supported", "chain"},
		{"a server name that is required", chain(tcpFilter(), tlsSocket(nest(yes, 3))), "security filter_chains.transport_socket.typed_config.require_sni: not supported", "chain"},
		{"stapling", chain(tcpFilter(), tlsSocket(wire.AppendVarint(nil, 8, 2))), "security filter_chains.transport_socket.typed_config.ocsp_staple_policy: not supported", "chain"},
		{"names of another type", chain(tcpFilter(), tlsSocket(roots, nest(join(wire.AppendVarint(nil, 1, 5), nest(field1("x"), 2)), 1, 8, 1, 15))),
			"security filter_chains.transport_socket.typed_config.common_tls_context[2].combined_validation_context.default_validation_context.match_typed_subject_alt_names.san_type: unknown value 5; " +
				"security filter_chains.transport_socket.typed_config.common_tls_context[2].combined_validation_context.default_validation_context.match_typed_subject_alt_names: a matcher of names without a type or a pattern", "chain"},
		{"a cipher suite without forward secrecy", chain(tcpFilter(), tlsSocket(suites("AES128-SHA", "ECDHE-RSA-AES128-SHA"))),
			"cosmetic " + parameters + ".cipher_suites: the cipher suite AES128-SHA cannot be chosen", ""},
		{"the suites of istiod's mesh", chain(tcpFilter(), tlsSocket(suites("ECDHE-ECDSA-AES256-GCM-SHA384", "AES256-GCM-SHA384", "AES128-GCM-SHA256"))), "", ""},
		{"cipher suites of which none can be chosen", chain(tcpFilter(), tlsSocket(suites("AES256-GCM-SHA384"))),
			"traffic " + parameters + ": no cipher suite for TLS 1.2 can be chosen, so only TLS 1.3 is served", ""},
		{"the same without TLS 1.3", chain(tcpFilter(), tlsSocket(nest(join(number(2, 3), text(3, "AES256-GCM-SHA384")), 1, 1))), "security " + parameters + ": no cipher suite can be chosen", "chain"},
		{"versions before 1.2", chain(tcpFilter(), tlsSocket(nest(join(number(1, 1), number(2, 3)), 1, 1))), "traffic " + parameters + ".tls_minimum_protocol_version: TLS 1.0 and 1.1 are not served", ""},
		{"a hash of a certificate that is too short", chain(tcpFilter(), tlsSocket(roots, nest(text(2, "00:ff"), 1, 8, 1))), "security " + validation + ".verify_certificate_hash: not a SHA-256 hash", "chain"},
		{"a hash of a key that is not in base64", chain(tcpFilter(), tlsSocket(roots, nest(text(3, "?"), 1, 8, 1))), "security " + validation + ".verify_certificate_spki: not a SHA-256 hash", "chain"},
		{"hashes without roots", chain(tcpFilter(), tlsSocket(nest(text(2, strings.Repeat("00", 32)), 1, 3))), "security filter_chains.transport_socket.typed_config: no roots to verify clients with", "chain"},
		{"session tickets", chain(tcpFilter(), tlsSocket(wire.AppendVarint(nil, 7, 1))), "", ""},

		{"a tunnel", chain(tcpFilter(nest(nil, 12))), "security " + manager + ".tunneling_config: not supported", "chain"},
		{"TCP without a cluster", chain(nest(packed(tcpProxyType, nil), 3, 4)), "security " + manager + ": no cluster to forward to", "chain"},
		{"a cluster without a weight", chain(tcpFilter(nest(field1("c"), 10, 1))), "traffic " + manager + ".weighted_clusters.clusters: a cluster without a name or a weight", ""},
		{"endpoints by a filter's state", chain(tcpFilter(nest(nil, 11, 2))), "traffic " + manager + ".hash_policy.filter_state: not supported", ""},

		{"another access log", log(nest(packed("x.Y", nil), 4)), "traffic access_log.typed_config: access logs of type x.Y are not supported", ""},
		{"a filter of an access log", log(join(nest(nil, 2, 12), nest(packed(shortType(fileLogType), nil), 4))), "cosmetic access_log.filter.metadata_filter: not supported", ""},
		{"formatters", log(nest(packed(shortType(fileLogType), nest(nil, 5, 6)), 4)), "cosmetic access_log.typed_config.log_format.formatters: not supported", ""},

		{"HTTP that is understood", chain(httpManager(httpFilter("rbac", rbacType))), "", ""},
		{"an unknown field of the manager", chain(httpManager(wire.AppendVarint(nil, 999, 1))), "security " + manager + ": unknown field 999 of " + httpManagerType, "chain"},
		{"HTTP/3", chain(httpManager(wire.AppendVarint(nil, 1, 3))), "security " + manager + ".codec_type: unknown value 3", "chain"},
		{"HTTP without routes", chain(nest(packed(httpManagerType, nest(packed(routerType, nil), 5, 4)), 3, 4)), "security " + manager + ": no routes", "chain"},
		{"routes by scope", chain(httpManager(nest(nil, 31))), "security " + manager + ".scoped_routes: not supported", "chain"},
		{"a client's address that is found otherwise", chain(httpManager(nest(nil, 46))), "security " + manager + ".original_ip_detection_extensions: not supported", "chain"},
		{"replies that are replaced", chain(httpManager(nest(nil, 38))), "traffic " + manager + ".local_reply_config: not supported", ""},
		{"a tracer of another type", chain(httpManager(nest(packed("envoy.config.trace.v3.ZipkinConfig", nil), 7, 9, 3))),
			"traffic " + manager + ".tracing.provider.typed_config: tracers of type envoy.config.trace.v3.ZipkinConfig are not supported; use a provider of OpenTelemetry", ""},
		{"a tracer without a cluster", chain(httpManager(nest(packed("envoy.config.trace.v3.OpenTelemetryConfig", nil), 7, 9, 3))),
			"traffic " + manager + ".tracing.provider.typed_config: no cluster to send spans to", ""},
		{"a sampler", chain(httpManager(nest(packed("envoy.config.trace.v3.OpenTelemetryConfig", join(nest(field1("c"), 1, 1), nest(nil, 5))), 7, 9, 3))),
			"traffic " + manager + ".tracing.provider.typed_config.sampler: not supported", ""},
		{"an unknown field of a tracer", chain(httpManager(nest(packed("envoy.config.trace.v3.OpenTelemetryConfig", nest(join(field1("c"), nest(nil, 99)), 1, 1)), 7, 9, 3))),
			"traffic " + manager + ".tracing.provider.typed_config.grpc_service.envoy_grpc: unknown field 99 of envoy.config.core.v3.GrpcService.EnvoyGrpc", ""},
		{"a tag with operators", chain(httpManager(nest(wire.AppendString(nil, 6, "%X%"), 7, 8))), "cosmetic " + manager + ".tracing.custom_tags.value: not supported", ""},
		{"a tag with metadata of a cluster", chain(httpManager(nest(join(field1("zone"), nest(join(nest(nil, 1, 3), nest(join(field1("istio"), nest(field1("region"), 2)), 2)), 5)), 7, 8))),
			"cosmetic " + manager + ".tracing.custom_tags.metadata: the tag zone has its default: metadata other than results of dry runs is not supported", ""},
		{"a tag with a dry run", chain(httpManager(nest(join(field1("p"), nest(join(nest(nil, 1, 1), nest(join(field1("envoy.filters.http.rbac"), nest(field1("a_shadow_engine_result"), 2)), 2)), 5)), 7, 8))), "", ""},
		{"samples of traces without a provider", chain(httpManager(nest(nil, 7, 4))), "", ""},
		{"filters of an upgrade", chain(httpManager(nest(nil, 23, 2))), "security " + manager + ".upgrade_configs.filters: not supported", "chain"},
		{"routes in the manager", chain(httpManager(nest(table(), 4))), "", ""},
		{"routes that are refused in the manager", chain(httpManager(nest(table(nest(join(anyPath, nest(text(10, "x"), 3)), 3)), 4))),
			"security " + manager + ".route_config.virtual_hosts.routes.redirect.path_rewrite: not supported", ""},
		{"two tables of routes", chain(httpManager(nest(table(), 4), nest(table(), 4))), "security " + manager + ".route_config[1]: more than once", "chain"},
		{"other request IDs", chain(httpManager(nest(packed("x.Y", nil), 36, 1))), "traffic " + manager + ".request_id_extension.typed_config: request IDs of type x.Y are not supported", ""},
		{"certificates in JSON", chain(httpManager(nest(wire.AppendVarint(nil, 7, 1), 17))), "security " + manager + ".set_current_client_cert_details.format: not supported", "chain"},
		{"an unknown HTTP filter", chain(httpManager(httpFilter("f", "x.Y"))), "security " + manager + ": the HTTP filter f of type x.Y is not supported", "chain"},
		{"an HTTP policy in JSON", chain(httpManager(nest(join(field1("f"), nest(packed(xdsStructType, field1(typePrefix+rbacType)), 4)), 5))), "security " + manager + ": the HTTP filter f of type " + xdsStructType + " is not supported", "chain"},
		{"an optional HTTP filter", chain(httpManager(httpFilter("f", "x.Y", wire.AppendVarint(nil, 6, 1)))), "cosmetic " + manager + ": the HTTP filter f of type x.Y is not supported; it is optional", ""},
		{"a program after policies", chain(httpManager(httpFilter("rbac", rbacType), httpFilter("f", luaType))), "traffic " + manager + ": the HTTP filter f of type " + luaType + " is not supported", ""},
		{"a program before a policy", chain(httpManager(httpFilter("f", luaType), httpFilter("rbac", rbacType))), "security " + manager + ": the HTTP filter f of type " + luaType + " is not supported", "chain"},
		{"a filter that is turned off", chain(httpManager(httpFilter("f", "x.Y", number(7, 1)))), "cosmetic " + manager + ": the HTTP filter f of type x.Y is not supported; it is turned off", ""},
		{"a filter that neither decides nor prepares, before a policy", chain(httpManager(httpFilter("f", plainFilters[0]), httpFilter("rbac", rbacType))), "traffic " + manager + ": the HTTP filter f of type " + plainFilters[0] + " is not supported", ""},
		{"a configuration that comes on its own", chain(httpManager(nest(join(field1("w"), nest(text(4, wasmType), 5)), 5))), "unenforced " + manager + ": the configuration of the HTTP filter w comes on its own; requests are refused until then", ""},
		{"an optional one", chain(httpManager(nest(join(field1("w"), nest(nil, 5), number(6, 1)), 5))), "cosmetic " + manager + ": the HTTP filter w of type  is not supported; it is optional", ""},
		{"its default", chain(httpManager(nest(join(field1("w"), nest(packed(rbacType, nil), 5, 2)), 5))), "traffic " + manager + ": the configuration of the HTTP filter w comes on its own; its default is used until then", ""},
		{"its default that restricts", chain(httpManager(nest(join(field1("w"), nest(packed(extAuthzType, join(nest(nest(text(1, "c"), 1), 1), text(15, "l"))), 5, 2)), 5))),
			"security " + manager + ".http_filters.config_discovery.default_config.bootstrap_metadata_labels_key: not supported; traffic " + manager + ": the configuration of the HTTP filter w comes on its own; its default is used until then", "chain"},
		{"its default that is not supported", chain(httpManager(nest(join(field1("w"), nest(packed(wasmType, nil), 5, 2)), 5))), "traffic " + manager + ": the HTTP filter w of type " + wasmType + " is not supported", ""},
		{"two configurations", chain(httpManager(nest(join(field1("w"), nest(packed(rbacType, nil), 4), nest(packed(rbacType, nil), 5, 2)), 5))),
			"security " + manager + ".http_filters.config_discovery: more than one member of a oneof; traffic " + manager + ": the configuration of the HTTP filter w comes on its own; its default is used until then", "chain"},
		{"no HTTP filters", chain(nest(packed(httpManagerType, wire.AppendBytes(nil, 3, text(2, "r"))), 3, 4)), "security " + manager + ": no router", "chain"},
		{"a filter after the router", chain(httpManager(httpFilter("router", routerType))), "security " + manager + ": the router is not the last HTTP filter", "chain"},
	} {
		l, findings, err := DecodeListener(append(test.bytes, field1(lName)...))
		var got []string
		for _, finding := range findings {
			got = append(got, fmt.Sprintf("%v %v", finding.Class, finding))
		}
		if text := strings.Join(got, "; "); err != nil || text != test.want {
			t.Errorf("%s: error %v, findings\n%s\nwant\n%s", test.name, err, text, test.want)
		}
		refused := ""
		if l.Refused {
			refused = "listener"
		} else if len(l.Chains) > 0 && l.Chains[0].Refused {
			refused = "chain"
		}
		if refused != test.refused {
			t.Errorf("%s: refused %q, want %q", test.name, refused, test.refused)
		}
	}
}

// A chain is refused also if its findings are beyond those that are kept.
func TestAChainWithFindingsThatAreNotKeptIsRefused(t *testing.T) {
	var b []byte
	for range maxFindings {
		b = append(b, nest(nil, 13)...)
	}
	l, _, err := DecodeListener(join(b, chain(tcpFilter(), nest(nil, 4)), field1(lName)))
	if err != nil || !l.Chains[0].Refused || l.Refused {
		t.Errorf("error %v, chain refused: %v, listener refused: %v", err, l.Chains[0].Refused, l.Refused)
	}
}

func TestListenersHaveABoundOfCombinations(t *testing.T) {
	var match []byte
	for i := range 300 {
		match = append(match, wire.AppendString(nil, 11, fmt.Sprintf("h%d.test", i))...)
		match = append(match, wire.AppendString(nil, 10, fmt.Sprintf("p%d", i))...)
	}
	l, findings, err := DecodeListener(join(chain(nest(match, 1), tcpFilter()), field1(lName)))
	if err != nil || len(findings) != 1 || !l.Refused {
		t.Errorf("error %v, findings %v, refused %v", err, findings, l.Refused)
	}
}

func TestListenersWithoutANameAreErrors(t *testing.T) {
	if _, _, err := DecodeListener(nil); err != errNoName {
		t.Error(err)
	}
}

// named is a filter chain with a name; match has the fields of its match.
func named(name string, match ...[]byte) []byte {
	return chain(nest(join(match...), 1), tcpFilter(), wire.AppendString(nil, 7, name))
}

func cidr(number int, text string) []byte {
	prefix := netip.MustParsePrefix(text)
	return nest(join(field1(prefix.Addr().String()), nest(wire.AppendVarint(nil, 1, uint64(prefix.Bits())), 2)), number)
}

func portIs(port uint64) []byte { return nest(wire.AppendVarint(nil, 1, port), 8) }

func TestTheMostSpecificChainIsChosen(t *testing.T) {
	l, findings, err := DecodeListener(join(
		named("all"),
		named("port 80", portIs(80)),
		named("port 81 tls", portIs(81), text(9, "tls")),
		named("net /24", portIs(82), cidr(3, "192.0.2.0/24")),
		named("net /25", portIs(82), cidr(3, "192.0.2.0/25"), text(9, "tls")),
		named("net v6", portIs(82), cidr(3, "2001:db8::/32")),
		named("any v4", portIs(82), cidr(3, "0.0.0.0/0")),
		named("exact", portIs(83), text(11, "az.b.example.com")),
		named("suffix", portIs(83), text(11, "*.b.example.com")),
		named("longer suffix, plain", portIs(83), text(11, "*.c.b.example.com"), text(9, "raw_buffer")),
		named("short suffix", portIs(83), text(11, "*.com")),
		named("no name", portIs(83)),
		named("h2 or http/1.1", portIs(84), text(10, "h2"), text(10, "http/1.1")),
		named("istio", portIs(84), text(10, "istio"), wire.AppendVarint(nil, 12, 2)),
		named("direct", portIs(85), cidr(13, "198.51.100.0/24")),
		named("local", portIs(86), wire.AppendVarint(nil, 12, 1)),
		named("external", portIs(86), wire.AppendVarint(nil, 12, 2), cidr(6, "203.0.113.0/24"), wire.AppendVarint(nil, 7, 1000)),
		named("external, any port", portIs(86), wire.AppendVarint(nil, 12, 2), cidr(6, "203.0.113.0/24")),
		nest(join(tcpFilter(), wire.AppendString(nil, 7, "default")), 25),
		field1(lName),
	))
	if err != nil || len(findings) > 0 {
		t.Fatal(err, findings)
	}
	const to, from = "192.0.2.1", "203.0.113.7:1000"
	for _, test := range []struct {
		name string
		to   string
		from string
		tls  bool
		sni  string
		alpn string
		want string
	}{
		{"a port without a chain", to + ":1", from, false, "", "", "all"},
		{"a port", to + ":80", from, true, "x", "h2", "port 80"},
		{"a port whose chains do not fit: the chain of any port is not used", to + ":81", from, false, "", "", "default"},
		{"the longer prefix", "192.0.2.1:82", from, true, "", "", "net /25"},
		{"the longer prefix, and then its chain does not fit", "192.0.2.1:82", from, false, "", "", "default"},
		{"the shorter prefix", "192.0.2.129:82", from, false, "", "", "net /24"},
		{"an IPv4 address in the form of IPv6", "[::ffff:192.0.2.129]:82", from, false, "", "", "net /24"},
		{"the shortest prefix", "198.51.100.1:82", from, false, "", "", "any v4"},
		{"IPv6", "[2001:db8::5]:82", from, false, "", "", "net v6"},
		{"another IPv6", "[2001:db9::5]:82", from, false, "", "", "default"},
		{"a name", to + ":83", from, true, "AZ.b.Example.com", "", "exact"},
		{"the suffix", to + ":83", from, true, "x.y.b.example.com", "", "suffix"},
		{"the longest suffix, and then its chain does not fit", to + ":83", from, true, "x.c.b.example.com", "", "default"},
		{"a suffix matches no name that equals it", to + ":83", from, true, "b.example.com", "", "short suffix"},
		{"no name", to + ":83", from, true, "", "", "no name"},
		{"a name with a final dot", to + ":83", from, true, "example.com.", "", "no name"},
		{"a name of dots", to + ":83", from, true, "..", "", "no name"},
		{"the client's first protocol", to + ":84", from, true, "", "x,http/1.1,istio", "h2 or http/1.1"},
		{"the client's first protocol, and then its chain does not fit", to + ":84", to + ":5", true, "", "istio,h2", "default"},
		{"other protocols", to + ":84", from, true, "", "x", "default"},
		{"the peer", to + ":85", from, true, "", "", "direct"},
		{"the loopback interface", to + ":86", "127.0.0.1:1", false, "", "", "local"},
		{"the same address", to + ":86", to + ":1", false, "", "", "local"},
		{"from outside, from the port", to + ":86", from, false, "", "", "external"},
		{"from outside, from another port", to + ":86", "203.0.113.7:1001", false, "", "", "external, any port"},
		{"from another network", to + ":86", "203.0.112.7:1000", false, "", "", "default"},
	} {
		c := ConnInfo{Destination: netip.MustParseAddrPort(test.to), Source: netip.MustParseAddrPort(test.from), DirectSource: netip.MustParseAddr("198.51.100.3"), TLS: test.tls, ServerName: test.sni}
		if test.alpn != "" {
			c.Protocols = strings.Split(test.alpn, ",")
		}
		if got, ok := l.Match(&c); !ok || got.Name != test.want {
			t.Errorf("%s: %q, want %q", test.name, got.Name, test.want)
		}
	}
	c := ConnInfo{Destination: netip.MustParseAddrPort("192.0.2.129:82"), Source: netip.MustParseAddrPort(from), TLS: true, ServerName: "a.b.c.d", Protocols: []string{"h2", "istio"}}
	if n := testing.AllocsPerRun(100, func() { l.Match(&c) }); n > 0 {
		t.Errorf("a match allocates %v times", n)
	}
}

func TestAConnectionWithoutAChainIsClosed(t *testing.T) {
	for name, b := range map[string][]byte{
		"no chain fits":           named("80", portIs(80)),
		"no chains":               nil,
		"the listener is refused": join(named("all"), nest(nil, 32)),
	} {
		l, _, err := DecodeListener(join(b, field1(lName)))
		if err != nil {
			t.Fatal(err)
		}
		if chain, ok := l.Match(&ConnInfo{Destination: netip.MustParseAddrPort("192.0.2.1:81")}); ok || chain != nil {
			t.Errorf("%s: the chain is %v", name, chain)
		}
	}
}

// The resource has each field that listeners have. The tests with generated types made it and compare its value with theirs.
func TestEachFieldOfListenersIsDecoded(t *testing.T) {
	b, err := os.ReadFile("testdata/listener.pb")
	if err != nil {
		t.Fatal(err)
	}
	l, findings, err := DecodeListener(b)
	if err != nil || len(findings) > 0 {
		t.Fatalf("error %v, findings %v", err, findings)
	}
	got, err := json.MarshalIndent(l, "", " ")
	if err != nil {
		t.Fatal(err)
	}
	const golden = "testdata/listener.json"
	if *update {
		if err := os.WriteFile(golden, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if want, err := os.ReadFile(golden); err != nil || !bytes.Equal(got, want) {
		t.Errorf("error %v; decoded\n%s", err, got)
	}
}

func TestPortsOfListenerFilters(t *testing.T) {
	low, high := PortPredicate{Kind: PortRange, Start: 10, End: 20}, PortPredicate{Kind: PortRange, Start: 15, End: 65536}
	for _, test := range []struct {
		name      string
		predicate PortPredicate
		want      []uint16 // of 9, 10, 15, 19, 20, 65535
	}{
		{"any", PortPredicate{Kind: PortAny}, []uint16{9, 10, 15, 19, 20, 65535}},
		{"a range without its end", low, []uint16{10, 15, 19}},
		{"a range to the end", high, []uint16{15, 19, 20, 65535}},
		{"or", PortPredicate{Kind: PortOr, Of: []PortPredicate{low, high}}, []uint16{10, 15, 19, 20, 65535}},
		{"or of nothing", PortPredicate{Kind: PortOr}, nil},
		{"and", PortPredicate{Kind: PortAnd, Of: []PortPredicate{low, high}}, []uint16{15, 19}},
		{"not", PortPredicate{Kind: PortNot, Of: []PortPredicate{low}}, []uint16{9, 20, 65535}},
		{"not understood", PortPredicate{}, nil},
	} {
		filter := ListenerFilter{Disabled: &test.predicate}
		var got []uint16
		for _, port := range []uint16{9, 10, 15, 19, 20, 65535} {
			if !filter.Applies(port) {
				got = append(got, port)
			}
		}
		if !slices.Equal(got, test.want) {
			t.Errorf("%s: disabled for %v, want %v", test.name, got, test.want)
		}
	}
	if filter := (ListenerFilter{}); !filter.Applies(1) {
		t.Error("a filter that is not disabled does not apply")
	}
}

func TestARefusedChainDoesNotRefuseOthers(t *testing.T) {
	bad := chain(nest(portIs(1), 1), tcpFilter(), nest(nil, 4))
	l, _, err := DecodeListener(join(chain(nest(portIs(2), 1), tcpFilter()), bad, named("good", portIs(3)), field1(lName)))
	if err != nil {
		t.Fatal(err)
	}
	var refused []bool
	for _, chain := range l.Chains {
		refused = append(refused, chain.Refused)
	}
	if want := []bool{false, true, false}; l.Refused || !slices.Equal(refused, want) {
		t.Errorf("refused %v, want %v; the listener: %v", refused, want, l.Refused)
	}
}

// A service that is forwarded in a way that is not supported shares its port with others, whose chains stay in force: the
// listener has no finding of security, so it is not rejected.
func TestWaysOfForwardingThatAreNotSupportedCloseTheirChainOnly(t *testing.T) {
	filter := func(kind string) []byte { return nest(packed(networkPrefix+kind, nil), 3, 4) }
	l, findings, err := DecodeListener(join(
		chain(nest(portIs(1), 1), tcpFilter()),
		chain(nest(portIs(2), 1), filter("sni_dynamic_forward_proxy.v3.FilterConfig"), tcpFilter()),
		chain(nest(portIs(3), 1), filter("redis_proxy.v3.RedisProxy")),
		field1(lName)))
	if err != nil || l.Refused || len(l.Chains) != 3 {
		t.Fatalf("error %v, listener %+v", err, l)
	}
	for i, refused := range []bool{false, true, true} {
		if l.Chains[i].Refused != refused {
			t.Errorf("chain %d: refused: %v, want %v", i, l.Chains[i].Refused, refused)
		}
	}
	for _, f := range findings {
		if f.Class != Unenforced {
			t.Errorf("finding %+v", f)
		}
	}
	if len(findings) != 2 {
		t.Errorf("findings %v", findings)
	}
}

// A chain that is the only one has no index if it matches all connections, and is not chosen otherwise.
func TestALoneChainIsForItsConnectionsOnly(t *testing.T) {
	other := netip.MustParsePrefix("203.0.113.0/24")
	c := &ConnInfo{
		Destination: netip.MustParseAddrPort("192.0.2.1:80"), Source: netip.MustParseAddrPort("198.51.100.1:4711"),
		DirectSource: netip.MustParseAddr("198.51.100.1"), ServerName: "a.example", Protocols: []string{"h2"},
	}
	for name, match := range map[string]ChainMatch{
		"port": {Port: 81}, "destination": {Destinations: []netip.Prefix{other}}, "server name": {ServerNames: []string{"b.example"}},
		"transport": {Transport: "tls"}, "protocol": {Protocols: []string{"http/1.1"}}, "direct source": {DirectSources: []netip.Prefix{other}},
		"type of source": {SourceType: LocalSource}, "source": {Sources: []netip.Prefix{other}}, "source port": {SourcePorts: []uint16{1}},
	} {
		l := &Listener{Chains: []*FilterChain{{Match: match}}}
		if err := l.Index(); err != nil {
			t.Fatal(err)
		}
		if chain, ok := l.Match(c); ok {
			t.Errorf("%s: the chain is %+v", name, chain)
		}
	}
	l := &Listener{Chains: []*FilterChain{{}}}
	if err := l.Index(); err != nil || l.index != nil {
		t.Errorf("for all connections: error %v, index %v", err, l.index)
	}
	if chain, ok := l.Match(c); !ok || chain != l.Chains[0] {
		t.Error("the chain for all connections is not chosen")
	}
}
