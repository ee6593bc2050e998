package mesh

import (
	"encoding/binary"
	"fmt"
	"math"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/pillion-proxy/pillion/internal/wire"
)

// nest returns a message in which fields lead to inner: nest(inner, 10, 1) is a field 10 whose field 1 is inner.
func nest(inner []byte, numbers ...int) []byte {
	for i := len(numbers) - 1; i >= 0; i-- {
		inner = wire.AppendBytes(nil, numbers[i], inner)
	}
	return inner
}

// packed returns a google.protobuf.Any.
func packed(url string, value []byte) []byte {
	return wire.AppendBytes(wire.AppendString(nil, 1, typePrefix+url), 2, value)
}

var name = wire.AppendString(nil, 1, "outbound|80||web")

func TestABudgetOfRetriesHasDefaults(t *testing.T) {
	for _, test := range []struct {
		fields []byte
		want   RetryBudget
	}{
		{nil, RetryBudget{Percent: 20, AtLeast: 3}},
		{nest(wire.AppendVarint(nil, 1, 7), 2), RetryBudget{Percent: 20, AtLeast: 7}},
		{nest(binary.LittleEndian.AppendUint64([]byte{1<<3 | 1}, math.Float64bits(2.5)), 1), RetryBudget{Percent: 2.5, AtLeast: 3}},
	} {
		c, findings, err := DecodeCluster(append(nest(test.fields, 10, 1, 8), name...))
		if err != nil || len(findings) > 0 || c.Breakers.RetryBudget == nil || *c.Breakers.RetryBudget != test.want {
			t.Errorf("%x: %+v, findings %v, error %v", test.fields, c.Breakers.RetryBudget, findings, err)
		}
	}
}

func TestFindingsHaveClassAndPlace(t *testing.T) {
	thresholds := func(fields []byte) []byte {
		return nest(append(nest(wire.AppendVarint(nil, 1, 0), 1), nest(fields, 1)...), 10)
	}
	tls := func(fields []byte) []byte {
		return nest(packed("envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext", fields), 24, 3)
	}
	for _, test := range []struct {
		name  string
		bytes []byte
		want  string // class path: problem
	}{
		{"an unknown field of the resource", wire.AppendVarint(nil, 1000, 1), "traffic : unknown field 1000 of envoy.config.cluster.v3.Cluster"},
		{"a field that is not supported", nest(nil, 22), "traffic lb_subset_config: not supported"},
		{"a field that has no effect here", nest(nil, 50), "cosmetic preconnect_policy: not supported"},
		{"a field that would decide what is verified", nest(nil, 46), "security upstream_http_protocol_options: not supported"},
		{"deeper, in the second occurrence", thresholds(nest(nil, 7)), "traffic circuit_breakers.thresholds[1].max_connection_pools: not supported"},
		{"an unknown field of a message of security", tls(wire.AppendVarint(nil, 99, 1)),
			"security transport_socket.typed_config: unknown field 99 of envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext"},
		{"within an Any", tls(nest(nil, 1, 3, 8)), "security transport_socket.typed_config.common_tls_context.validation_context.allow_expired_certificate: not supported"},
		{"another transport", nest(packed("x.Y", nil), 24, 3), "security transport_socket.typed_config: transport sockets of type x.Y are not supported"},
		{"another key of a match", nest(wire.AppendString(nest(wire.AppendString(nil, 3, "v"), 2), 1, "foo"), 43, 2, 1), "security transport_socket_matches.match: matches by foo are not supported"},
		{"an unknown enumerator", wire.AppendVarint(nil, 2, 77), "security type: unknown value 77"},
		{"an unknown policy", wire.AppendVarint(nil, 6, 4), "traffic lb_policy: unknown policy; round robin is used"},
		{"a second resource in a list", append(nest(nil, 8), nest(nil, 8)...), "traffic health_checks: not supported; traffic health_checks[1]: not supported"},
		{"a host that is not a TCP socket", nest(nest(nil, 1), 33, 2, 2, 1, 1, 3), "traffic load_assignment.endpoints.lb_endpoints.endpoint.address.envoy_internal_address: not supported"},
		{"a number that is not a port", nest(append(wire.AppendString(nil, 2, "192.0.2.1"), wire.AppendVarint(nil, 3, 65536)...), 33, 2, 2, 1, 1, 1),
			"traffic load_assignment.endpoints.lb_endpoints.endpoint.address.socket_address.port_value: not a port"},
	} {
		_, findings, err := DecodeCluster(append(append([]byte{}, test.bytes...), name...))
		var got []string
		for _, finding := range findings {
			got = append(got, fmt.Sprintf("%v %v", finding.Class, finding))
		}
		if text := strings.Join(got, "; "); err != nil || text != test.want {
			t.Errorf("%s: error %v, findings\n%s\nwant\n%s", test.name, err, text, test.want)
		}
	}
}

func TestATransportThatIsNotUnderstoodIsRefused(t *testing.T) {
	for want, socket := range map[bool][]byte{
		true:  packed("envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext", nest(nil, 1, 13)),
		false: packed("envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext", wire.AppendString(nil, 2, "sni")),
	} {
		c, _, err := DecodeCluster(append(nest(socket, 24, 3), name...))
		if err != nil || len(c.Transports) != 1 || c.Transports[0].Refused != want {
			t.Errorf("error %v, transports %+v, want refused: %v", err, c.Transports, want)
		}
	}
}

func TestAPanicThresholdThatIsPresentAndEmptyIsZero(t *testing.T) {
	for want, b := range map[float64][]byte{50: nil, 0: nest(nil, 27, 1)} {
		if c, _, err := DecodeCluster(append(b, name...)); err != nil || c.Balancing.PanicBelow != want {
			t.Errorf("error %v, threshold %v, want %v", err, c.Balancing.PanicBelow, want)
		}
	}
}

func TestFindingsAreBounded(t *testing.T) {
	b := append([]byte{}, name...)
	for range 10 * maxFindings {
		b = append(b, nest(nil, 8)...)
	}
	_, findings, err := DecodeCluster(append(b, nest(nil, 59)...))
	if err != nil || len(findings) != maxFindings || findings[maxFindings-1].Class != Security {
		t.Errorf("error %v, %d findings, the last %v", err, len(findings), findings[len(findings)-1])
	}
}

func TestResourcesWithoutANameAreErrors(t *testing.T) {
	if _, _, err := DecodeCluster(nil); err != errNoName {
		t.Error(err)
	}
	if _, _, err := DecodeAssignment(nil); err != errNoName {
		t.Error(err)
	}
}

func TestTheTextOfAFindingIsBounded(t *testing.T) {
	long := strings.Repeat("ü", 1<<20)
	_, findings, err := DecodeCluster(append(nest(packed(long, nil), 24, 3), name...))
	if err != nil || len(findings) != 1 || len(findings[0].Problem) > maxProblem+3 || !utf8.ValidString(findings[0].Problem) {
		t.Errorf("error %v, %d findings, the first of %d bytes", err, len(findings), len(findings[0].Problem))
	}
}

// A cluster may be of use although one of its transports is refused. Other findings of security concern all connections.
func TestFindingsOfSecurityRefuseAClusterOrATransport(t *testing.T) {
	match := func(key string) []byte {
		return nest(wire.AppendString(nest(wire.AppendString(nil, 3, "v"), 2), 1, key), 43, 2, 1)
	}
	for _, test := range []struct {
		name               string
		bytes              []byte
		cluster, transport bool // is refused
	}{
		{"understood", match("tlsMode"), false, false},
		{"a transport", nest(packed("x.Y", nil), 24, 3), false, true},
		{"names that are not verified", nest(packed("envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext", nest(field1("x"), 1, 8, 1, 9)), 24, 3), false, true},
		{"a match of a transport", match("other"), false, true},
		{"a choice of what is verified", append(match("tlsMode"), nest(nil, 46)...), true, false},
		{"another way to match transports", append(match("tlsMode"), nest(nil, 59)...), true, false},
	} {
		c, _, err := DecodeCluster(append(slices.Clone(test.bytes), name...))
		if err != nil || c.Refused != test.cluster || len(c.Transports) != 1 || c.Transports[0].Refused != test.transport {
			t.Errorf("%s: error %v, cluster %+v", test.name, err, c)
		}
	}
}

// The host of a request decides what is expected of an endpoint, if the cluster's options say so, whichever comes first. There
// must be roots to verify it with.
func TestOptionsOfHTTPSetWhatIsExpectedOfAnEndpoint(t *testing.T) {
	both := append(wire.AppendVarint(nil, 1, 1), wire.AppendVarint(nil, 2, 1)...)
	options := func(fields []byte) []byte {
		return nest(append(wire.AppendString(nil, 1, protocolOptionsKey), nest(packed(protocolOptionsKey, nest(fields, 2)), 2)...), 36)
	}
	socket := func(fields []byte) []byte {
		return nest(packed("envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext", fields), 24, 3)
	}
	verified := socket(nest(wire.AppendString(nil, 1, "ROOTCA"), 1, 7))
	for name, c := range map[string]struct {
		fields  []byte
		host    bool
		refused bool
	}{
		"options first": {append(options(both), verified...), true, false},
		"options last":  {append(append([]byte{}, verified...), options(both)...), true, false},
		"without them":  {verified, false, false},
		"without roots": {append(socket(nil), options(both)...), true, true},
		"another field": {append(options(wire.AppendString(nil, 3, "x-host")), verified...), false, true},
	} {
		cluster, findings, err := DecodeCluster(append(c.fields, wire.AppendString(nil, 1, "web")...))
		if err != nil || len(cluster.Transports) != 1 {
			t.Fatalf("%s: %v", name, err)
		}
		tls := cluster.Transports[0].TLS
		if tls.HostSNI != c.host || tls.HostName != c.host || cluster.Refused != c.refused {
			t.Errorf("%s: %+v, refused %v, %v", name, tls, cluster.Refused, findings)
		}
	}
}
