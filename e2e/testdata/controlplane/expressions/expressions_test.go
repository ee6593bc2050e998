// Package expressions compares the evaluation of expressions in access logs and labels of metrics with that of cel-go.
package expressions

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/cel-go/cel"
	"github.com/google/cel-go/common/types"
	"github.com/google/cel-go/common/types/ref"

	ours "github.com/pillion-proxy/pillion/internal/cel"
	"github.com/pillion-proxy/pillion/internal/flow"
)

// attributes are those of a record as Envoy's evaluator sees them: maps by the first name. A missing one has no key.
type attributes map[string]any

// event is a record, and the attributes that the test expects of it.
type event struct {
	record *flow.Record
	attributes
}

// fields are the fields that records have, by their index.
var fields = []string{"x-one", "x-two", "x-empty", "x-bytes", "user-agent"}

func place(h ours.Header) int {
	if h.Response {
		return map[string]int{"content-type": 1}[h.Name] - 1
	}
	for i, name := range fields {
		if name == h.Name {
			return i
		}
	}
	return -1
}

// answered is a request of a client by mutual TLS that the workload answered.
func answered() event {
	r := flow.Open(flow.Inbound, netip.MustParseAddrPort("198.51.100.1:61751"))
	r.Connection = &flow.Record{HTTP: &flow.Request{}}
	r.Connection.SetTLS(flow.Hello{ServerName: "web.shop"})
	r.Protocol, r.OriginalDestination = flow.HTTP11, netip.MustParseAddrPort("198.51.100.2:80")
	r.Upstream, r.UpstreamLocal = r.OriginalDestination, netip.MustParseAddrPort("127.0.0.6:41234")
	r.Cluster, r.Route, r.Attempts = "inbound|80||", "default", 1
	r.Security = &flow.Security{Peer: "spiffe://cluster.local/ns/shop/sa/client", Own: "spiffe://cluster.local/ns/shop/sa/web", Mutual: true, Version: "TLSv1.3"}
	r.Workload.Set(&flow.Workload{Name: "client-v1", Namespace: "shop"})
	r.HTTP = &flow.Request{
		Method: []byte("GET"), Path: []byte("/a/b?q=1"), Authority: []byte("shop.example:80"), ID: []byte("7"), UserAgent: []byte("curl"),
		Fields: [][]byte{[]byte("one"), nil, {}, []byte("a\xff\n"), []byte("curl")}, ResponseFields: [][]byte{[]byte("text/plain")},
		Status: 503, Flags: "UF,URX", Details: "via_upstream", ServiceTime: 3 * time.Millisecond, GRPCStatus: []byte("14"),
	}
	r.Received.Store(10)
	r.Sent.Store(2000)
	r.Duration = 1500 * time.Millisecond
	return event{r, attributes{
		"request": map[string]any{
			"path": "/a/b?q=1", "url_path": "/a/b", "query": "q=1", "host": "shop.example:80", "method": "GET", "id": "7", "useragent": "curl",
			"protocol": "HTTP/1.1", "duration": 1500 * time.Millisecond, "size": int64(10),
			"headers": map[string]any{"x-one": "one", "x-empty": "", "x-bytes": "a\xff\n", "user-agent": "curl"},
		},
		"response": map[string]any{
			"headers": map[string]any{"content-type": "text/plain"}, "size": int64(2000), "code": int64(503), "flags": int64(32 + 32768),
			"code_details": "via_upstream", "grpc_status": int64(14), "backend_latency": 3 * time.Millisecond,
		},
		"connection": map[string]any{
			"mtls": true, "tls_version": "TLSv1.3", "requested_server_name": "web.shop",
			"uri_san_peer_certificate": "spiffe://cluster.local/ns/shop/sa/client", "uri_san_local_certificate": "spiffe://cluster.local/ns/shop/sa/web",
		},
		"source": map[string]any{"address": "198.51.100.1:61751", "port": int64(61751)}, "destination": map[string]any{"address": "198.51.100.2:80", "port": int64(80)},
		"upstream": map[string]any{
			"address": "198.51.100.2:80", "port": int64(80), "local_address": "127.0.0.6:41234", "request_attempt_count": int64(1),
		},
		"xds": map[string]any{"cluster_name": "inbound|80||", "route_name": "default", "listener_direction": int64(1)},
		"filter_state": map[string]any{"downstream_peer": map[string]any{
			"workload": "client-v1", "namespace": "shop", "cluster": "", "service": "", "revision": "", "app": "", "version": "",
		}},
	}}
}

// failed is a connection of bytes, without TLS, whose dial failed.
func failed() event {
	r := flow.Open(flow.Outbound, netip.MustParseAddrPort("198.51.100.1:61751"))
	r.OriginalDestination = netip.MustParseAddrPort("[2001:db8::1]:5432")
	r.TransportFailure = "connect_timeout"
	return event{r, attributes{
		"request":     map[string]any{"duration": time.Duration(0), "size": int64(0), "headers": map[string]any{}},
		"response":    map[string]any{"headers": map[string]any{}, "size": int64(0), "flags": int64(0)},
		"connection":  map[string]any{"mtls": false, "requested_server_name": ""},
		"source":      map[string]any{"address": "198.51.100.1:61751", "port": int64(61751)},
		"destination": map[string]any{"address": "[2001:db8::1]:5432", "port": int64(5432)},
		"upstream":    map[string]any{"transport_failure_reason": "connect_timeout", "request_attempt_count": int64(0)},
		"xds":         map[string]any{"listener_direction": int64(2)}, "filter_state": map[string]any{},
	}}
}

// rejected is a request of HTTP/2 without TLS that had no response.
func rejected() event {
	r := flow.Open(flow.Outbound, netip.MustParseAddrPort("198.51.100.1:61751"))
	r.Connection = &flow.Record{HTTP: &flow.Request{}}
	r.Protocol, r.OriginalDestination = flow.HTTP2, netip.MustParseAddrPort("198.51.100.2:80")
	r.HTTP = &flow.Request{Method: []byte("POST"), Path: []byte("/"), Authority: []byte("b"), Fields: make([][]byte, len(fields))}
	return event{r, attributes{
		"request": map[string]any{
			"path": "/", "url_path": "/", "query": "", "host": "b", "method": "POST", "protocol": "HTTP/2", "duration": time.Duration(0), "size": int64(0),
			"headers": map[string]any{},
		},
		"response":    map[string]any{"headers": map[string]any{}, "size": int64(0), "flags": int64(0)},
		"connection":  map[string]any{"mtls": false, "requested_server_name": ""},
		"source":      map[string]any{"address": "198.51.100.1:61751", "port": int64(61751)},
		"destination": map[string]any{"address": "198.51.100.2:80", "port": int64(80)},
		"upstream":    map[string]any{"request_attempt_count": int64(0)},
		"xds":         map[string]any{"listener_direction": int64(2)}, "filter_state": map[string]any{},
	}}
}

// judge evaluates expressions by cel-go, without a check of types, as Envoy does.
type judge struct {
	env    *cel.Env
	events []event
}

func newJudge(t testing.TB) *judge {
	t.Helper()
	var options []cel.EnvOption
	for name := range answered().attributes {
		options = append(options, cel.Variable(name, cel.DynType))
	}
	env, err := cel.NewEnv(options...)
	if err != nil {
		t.Fatal(err)
	}
	return &judge{env, []event{answered(), failed(), rejected()}}
}

func (j *judge) program(text string) (cel.Program, error) {
	parsed, issues := j.env.Parse(text)
	if issues.Err() != nil {
		return nil, issues.Err()
	}
	return j.env.Program(parsed)
}

// compare evaluates an expression by both, and reports whether ours accepts it, and the kinds of its values: "true", "false",
// "error" and "value". The evaluation of an expression that ours accepts must have the same result for each event. Its
// negation distinguishes false from an error.
func (j *judge) compare(t testing.TB, text string) (accepted bool, kinds []string) {
	t.Helper()
	expression, err := ours.Parse(text)
	if err != nil {
		return false, nil
	}
	program, err := j.program(text)
	if err != nil {
		t.Errorf("%s: accepted, cel-go: %v", text, err)
		return true, nil
	}
	bound := expression.Bind(place)
	var negation *ours.Program
	if n, err := ours.Parse("!(" + text + ")"); err == nil {
		negation = n.Bind(place)
	}
	for i, e := range j.events {
		value, _, err := program.Eval(map[string]any(e.attributes))
		kind := kindOf(value, err)
		got := "false"
		shown, ok := bound.AppendText(nil, e.record)
		switch {
		case bound.Match(e.record):
			got = "true"
		case negation != nil && negation.Match(e.record):
		case ok:
			got = "value"
		default:
			got = "error"
		}
		if negation == nil && got == "value" && kind == "false" {
			got = kind
		}
		if kind == "null" { // it has no text
			kind = "error"
		}
		kinds = append(kinds, kind)
		if got != kind {
			t.Errorf("%s, event %d: %s, cel-go has %s: %v, %v", text, i, got, kind, value, err)
			continue
		}
		if want := textOf(value); kind == "value" && want != "" && string(shown) != want {
			t.Errorf("%s, event %d: %q, cel-go has %q", text, i, shown, want)
		}
	}
	return true, kinds
}

func kindOf(v ref.Val, err error) string {
	switch {
	case err != nil || types.IsError(v):
		return "error"
	case v == types.True:
		return "true"
	case v == types.False:
		return "false"
	case v == types.NullValue:
		return "null"
	}
	return "value"
}

// textOf returns the text of a text or an integer; empty for other values.
func textOf(v ref.Val) string {
	switch v := v.(type) {
	case types.String:
		return string(v)
	case types.Int:
		return fmt.Sprint(int64(v))
	}
	return ""
}

// The expressions of Istio's API and documents, and corners.
var known = []string{
	"response.code >= 400", "response.code >= 400 || xds.cluster_name == 'BlackHoleCluster' || xds.cluster_name == 'PassthroughCluster'",
	"connection.mtls && request.url_path.contains('v1beta3')", "response.code >= 500", "!has(response.code)", "has(response.code) && response.code >= 500",
	"!has(response.code) || response.code >= 400", "request.headers['x-one'] == 'one'", "'x-one' in request.headers && !('x-two' in request.headers)",
	"request.method in ['GET', 'HEAD'] ? response.code < 500 : true", "request.url_path.startsWith('/healthz') == false", "has(request.headers.x) || true",
	"request.host.endsWith('.svc.cluster.local')", "request.path.matches('^/a/[a-z]+')", "response.flags == 0", "source.address.startsWith('198.51.')",
	"request.headers['x-two'] == 'a' || true", "true || request.headers['x-two'] == 'a'", "request.headers['x-two'] == 'a' && false",
	"false && request.headers['x-two']", "!(request.headers['x-two'] == 'a')", "1 || true", "true || 1", "1 && false", "1 && true", "'a' || false",
	"response.code == 503.0", "response.code in [503.0, 'a']", "response.code in [200, request.headers['x-two']]", "'1' == 1", "'1' < 1", "1 < 1.5", "null == null", "null == 0",
	"true < false", "true > false", "-1 < 1", "- 1 < 1", "--1 == 1", "!!true", "!1", "-'a' == 'a'", "1 / 0 == 1", "1 % 0 == 1", "1.0 / 0.0 > 1.0", "0.0 / 0.0 == 0.0 / 0.0",
	"0.0 / 0.0 != 0.0 / 0.0", "0.0/0.0 < 1", "9223372036854775807 + 1 > 0", "-9223372036854775808 < 0", "-9223372036854775807 - 2 < 0", "9223372036854775807 * 2 == 0",
	"9223372036854775807 == 9223372036854775807.0", "9223372036854775807 < 9223372036854775808.0", "0x10 == 16", "-0x10 == -16", "1e3 == 1000", ".5 == 0.5",
	"'\\x41\\u00e9\\101' == 'A\\u00e9A'", "r'\\' == '\\\\'", "'''a''' + \"\"\"b\"\"\" == 'ab'", "'\\`' == '`'", "'\\?' == '?'",
	"size('\\u00e9a') == 2", "'abc'.size() == 3", "size(request.headers['x-bytes']) == 3", "size(1) == 1", "size(request.headers) == 4",
	"string(1) == '1'", "string(1.5) == '1.5'", "string(1e30) == '1e+30'", "string(true) == 'true'", "string(duration('90s')) == '90s'", "string(null) == 'null'",
	"int('7') == 7", "int('+7') == 7", "int('0x7') == 7", "int('7.5') == 7", "int(7.9) == 7", "int(-7.9) == -7", "int(1e30) == 0", "int(true) == 1", "int(duration('1s')) == 1",
	"int(9223372036854775807.0) == 0", "int(-9223372036854775808.0) == 0", "double('1e3') == 1000.0", "double('inf') > 1.0", "double('NaN') == 1.0", "double('0x1p-2') == 0.25",
	"double(true) == 1.0", "double(9223372036854775807) == 9223372036854775807.0", "request.duration > duration('1s')", "duration('1s') == duration('1000ms')",
	"duration('1s') + duration('1s') == duration('2s')", "duration('1s') - duration('2s') < duration('0s')", "duration('1s') == 1", "duration('1s') < 1", "duration('1s') * 2 == duration('2s')",
	"filter_state.downstream_peer.workload == 'client-v1'", "filter_state['downstream_peer'].namespace == 'shop'", "has(filter_state.downstream_peer.app)",
	"has(filter_state.upstream_peer.app)", "!has(filter_state.upstream_peer.app)", "has(filter_state.downstream_peer.nothing)", "[1] == [1]", "[1, 2] == [2, 1]", "[] == []", "size([1]) == 1", "[1] + [2] == [1, 2]",
	"1 in []", "true in [1 == 1]", "null in [null]", "(1 in [1]) in [true]", "'a' in 'abc'", "1 in [[1]]", "true ? 1 : 'a'", "(true ? 1 : 2) == 1", "response.code ? true : false",
	"true ? false : request.headers['x-two']", "request.headers['x-two'] == '' ? true : true", "false ? true : false ? false : true", "true ? false ? true : false : true", "1 == 1 == true", "1 < 2 < 3",
	"1 - 2 - 3 == -4", "2 * 3 % 4 == 2", "7 % -4 == 3", "-7 % 4 == -3", "-7 / 2 == -3", "5.5 % 2.0 == 1.5", "'a' + 1 == 'a1'", "1 + 1.0 == 2.0", "1 + 1 == 2.0", "'b' > 'a'", "'a' + 'b' == 'ab'",
	"request.headers['x-bytes'].matches('a.')", "request.path.matches('b\\\\?')", "1.matches('1')", "'1'.contains(1)", "request.headers.if == 'a'", "request.headers['X-One'] == 'one'",
	"response.headers['content-type'] == 'text/plain'", "has(response.headers.etag)", "has(request.headers)", "request.headers == request.headers", "request == request", "connection.mtls == !false", "! connection.mtls", "-response.code < 0",
	"-duration('1s') < duration('0s')", "while == 1", "true.x", "1 .size()", "'a' .size() == 1", "request . method == 'GET'", "request.method=='GET'?true:false", "has( response . code )", "has((response.code))", "!has(response.code)==true",
}

func TestKnownExpressionsAreEvaluatedAsByCELGo(t *testing.T) {
	j := newJudge(t)
	accepted := 0
	for _, text := range known {
		if ok, _ := j.compare(t, text); ok {
			accepted++
		}
	}
	if accepted < len(known)*3/4 {
		t.Errorf("%d of %d expressions are accepted", accepted, len(known))
	}
}

// TestRandomExpressionsAreEvaluatedAsByCELGo has operands whose types fit, and some that do not.
func TestRandomExpressionsAreEvaluatedAsByCELGo(t *testing.T) {
	j := newJudge(t)
	random := rand.New(rand.NewPCG(1, 1))
	seen := map[string]int{}
	for range 4000 {
		text := author{random}.any(4)
		ok, kinds := j.compare(t, text)
		if !ok {
			seen["refused"]++
		}
		for _, kind := range kinds {
			seen[kind]++
		}
		if t.Failed() {
			break
		}
	}
	for _, kind := range []string{"true", "false", "error", "value"} {
		if seen[kind] < 500 {
			t.Errorf("%d results of kind %s: %v", seen[kind], kind, seen)
		}
	}
	if seen["refused"] > 400 {
		t.Errorf("%d expressions are refused", seen["refused"])
	}
}

// author writes random expressions.
type author struct{ *rand.Rand }

func (a author) one(of ...string) string { return of[a.IntN(len(of))] }

func (a author) any(depth int) string {
	if a.IntN(3) == 0 {
		return a.of(depth, a.IntN(5))
	}
	return a.of(depth, truths)
}

const (
	truths = iota
	texts
	integers
	reals
	durations
)

// of writes an expression of a type, or, rarely, of another one.
func (a author) of(depth, kind int) string {
	if a.IntN(12) == 0 {
		kind = a.IntN(5)
	}
	if depth == 0 {
		return a.leaf(kind)
	}
	if a.IntN(10) == 0 {
		return "(" + a.of(depth-1, truths) + " ? " + a.of(depth-1, kind) + " : " + a.of(depth-1, kind) + ")"
	}
	again := func(kind int) string { return a.of(depth-1, kind) }
	binary := func(kind int, operators ...string) string {
		return "(" + again(kind) + " " + a.one(operators...) + " " + again(kind) + ")"
	}
	call := func(kind int, functions ...string) string { return a.one(functions...) + "(" + again(kind) + ")" }
	switch choice := a.IntN(10); {
	case choice < 2:
		return a.leaf(kind)
	case kind == texts && choice < 6:
		return binary(texts, "+")
	case kind == texts:
		return call(a.IntN(5), "string")
	case kind == integers && choice < 5:
		return binary(integers, "+", "-", "*", "/", "%")
	case kind == integers && choice < 7:
		return "-" + again(integers)
	case kind == integers:
		return call(a.one2(texts, reals), "int", "size")
	case kind == reals && choice < 7:
		return binary(reals, "+", "-", "*", "/")
	case kind == reals:
		return call(a.one2(texts, integers), "double")
	case kind == durations:
		return binary(durations, "+", "-")
	case choice < 4:
		return binary(truths, "&&", "||")
	case choice < 5:
		return "!" + again(truths)
	case choice < 7:
		return binary(a.IntN(5), "==", "!=", "<", "<=", ">", ">=")
	case choice < 8:
		of := a.IntN(5)
		return "(" + again(of) + " in [" + again(of) + ", " + again(of) + "])"
	case choice < 9:
		return "(" + again(texts) + ")." + a.one("contains", "startsWith", "endsWith") + "(" + again(texts) + ")"
	}
	return "(" + again(texts) + ").matches('" + a.one("a", "^/a", "[0-9]+$", "(GET|POST)", ".") + "')"
}

func (a author) one2(b, c int) int {
	if a.IntN(2) == 0 {
		return b
	}
	return c
}

func (a author) leaf(kind int) string {
	switch kind {
	case truths:
		return a.one("true", "false", "connection.mtls", "has(response.code)", "has(request.headers.etag)", "'x-one' in request.headers", "'x-two' in request.headers",
			"has(filter_state.upstream_peer.app)", "has(upstream.address)", "has(request.method)", "null")
	case texts:
		return a.one("''", "'a'", "'GET'", "'\\u00e9'", "'7'", "'1.5'", "request.path", "request.url_path", "request.query", "request.host", "request.method", "request.id", "request.useragent",
			"request.protocol", "request.headers['x-one']", "request.headers['x-two']", "request.headers['x-empty']", "request.headers['x-bytes']", "response.headers['content-type']",
			"response.code_details", "connection.tls_version", "connection.requested_server_name", "connection.uri_san_peer_certificate", "connection.uri_san_local_certificate",
			"source.address", "destination.address", "upstream.address", "upstream.local_address", "upstream.transport_failure_reason", "connection.transport_failure_reason",
			"xds.cluster_name", "xds.route_name", "filter_state.downstream_peer.workload", "filter_state['downstream_peer']['namespace']", "filter_state.upstream_peer.app",
			"upstream.tls_version", "upstream.uri_san_peer_certificate")
	case integers:
		return a.one("0", "1", "-1", "7", "400", "9223372036854775807", "(-9223372036854775807 - 1)", "0x1F", "response.code", "response.size", "response.flags", "response.grpc_status",
			"request.size", "source.port", "destination.port", "upstream.port", "upstream.request_attempt_count", "xds.listener_direction")
	case reals:
		return a.one("0.0", "1.5", "-2.5e3", "1e300", "9223372036854775807.0", ".25")
	}
	return a.one("duration('1s')", "duration('-1.5h')", "duration('250ms')", "request.duration", "response.backend_latency", "duration('2540400h10m10s')")
}

// FuzzExpressionsAsCELGo compares expressions that the fuzzer writes.
func FuzzExpressionsAsCELGo(f *testing.F) {
	for _, text := range known {
		f.Add(text)
	}
	j := newJudge(f)
	f.Fuzz(func(t *testing.T, text string) {
		if len(text) > 200 || strings.Count(text, "(") > 20 { // cel-go's parser is slow
			return
		}
		j.compare(t, text)
	})
}
