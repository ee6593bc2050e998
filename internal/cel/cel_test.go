package cel

import (
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/nettest"
)

func TestMain(m *testing.M) { os.Exit(nettest.Main(m)) }

// request is a request of a client by mutual TLS.
func request() *flow.Record {
	r := flow.Open(flow.Inbound, netip.MustParseAddrPort("198.51.100.1:61751"))
	r.Connection = &flow.Record{HTTP: &flow.Request{}}
	r.Connection.SetTLS(flow.Hello{ServerName: "web.shop"})
	r.Protocol, r.OriginalDestination = flow.HTTP11, netip.MustParseAddrPort("198.51.100.2:80")
	r.Upstream, r.Cluster, r.Route, r.Attempts = r.OriginalDestination, "inbound|80||", "default", 1
	r.Security = &flow.Security{Peer: "spiffe://cluster.local/ns/shop/sa/client", Own: "spiffe://cluster.local/ns/shop/sa/web", Mutual: true, Version: "TLSv1.3"}
	r.Workload.Set(&flow.Workload{Name: "client-v1", Namespace: "shop"})
	r.HTTP = &flow.Request{
		Method: []byte("GET"), Path: []byte("/a/b?q=1"), Authority: []byte("shop.example:80"), ID: []byte("id"), UserAgent: []byte("curl"),
		Fields: [][]byte{[]byte("one"), nil, []byte("")}, ResponseFields: [][]byte{[]byte("text/plain")},
		Status: 503, Flags: "UF,URX", Details: "via_upstream", ServiceTime: 3 * time.Millisecond,
	}
	r.Received.Store(10)
	r.Sent.Store(2000)
	r.Duration = 1500 * time.Millisecond
	return r
}

// connection is one of bytes, without TLS, that could not be carried on.
func connection() *flow.Record {
	r := flow.Open(flow.Outbound, netip.MustParseAddrPort("198.51.100.1:61751"))
	r.OriginalDestination = netip.MustParseAddrPort("[2001:db8::1]:5432")
	r.TransportFailure = "connect_timeout"
	r.SetDenial("", "rbac_access_denied_matched_policy[p]")
	return r
}

// place is where the records of these tests have header fields.
func place(h Header) int {
	if h.Response {
		return map[string]int{"content-type": 0}[h.Name]
	}
	if i, ok := map[string]int{"x-one": 0, "x-two": 1, "x-empty": 2}[h.Name]; ok {
		return i
	}
	return -1
}

func TestExpressionsSelectRecords(t *testing.T) {
	for text, want := range map[string][2]bool{ // of the request, of the connection
		"response.code >= 400": {true, false},
		"response.code>=400&&response.code<500 || response.code == 503": {true, false},
		"!has(response.code) || response.code >= 504":                   {false, true},
		"has(response.code) && response.code >= 500":                    {true, false},
		"connection.mtls":             {true, false},
		"!connection.mtls":            {false, true},
		"request.url_path == '/a/b'":  {true, false},
		"request.path.contains('?q')": {true, false},
		`request.url_path.startsWith("/a") && request.host.endsWith(":80")`: {true, false},
		"request.path.matches('^/[a-z]/b')":                                 {true, false},
		"request.path.matches('^b')":                                        {false, false},
		"request.query == 'q=1'":                                            {true, false},
		"request.method in ['GET', 'HEAD']":                                 {true, false},
		"request.headers['x-one'] == 'one'":                                 {true, false},
		"request.headers['x-two'] == ''":                                    {false, false}, // missing: an error
		"'x-one' in request.headers":                                        {true, false},
		"'x-two' in request.headers":                                        {false, false},
		"!('x-two' in request.headers)":                                     {true, true},
		"'X-One' in request.headers":                                        {false, false}, // keys are in lower case
		"request.headers['x-empty'] == ''":                                  {true, false},
		"has(request.headers.cookie)":                                       {false, false},
		"response.headers['content-type'].startsWith('text/')":              {true, false},
		"response.flags != 0":                                               {true, false},
		"response.flags == 32 + 32768":                                      {true, false},
		"response.code_details == 'via_upstream'":                           {true, false},
		"response.size > 1000 && request.size == 10":                        {true, false},
		"response.grpc_status == 14":                                        {true, false},
		"response.backend_latency < duration('5ms')":                        {true, false},
		"request.duration > duration('1s')":                                 {true, false},
		"request.protocol == 'HTTP/1.1' && request.id == 'id' && request.useragent == 'curl'": {true, false},
		"source.address == '198.51.100.1:61751' && source.port == 61751":                      {true, true},
		"destination.port in [80, 5432]":                                                      {true, true},
		"destination.address.startsWith('[2001:db8:')":                                        {false, true},
		"upstream.address == '198.51.100.2:80' && upstream.request_attempt_count == 1":        {true, false},
		"has(upstream.port)": {true, false},
		"upstream.transport_failure_reason == 'connect_timeout'":                                                      {false, true},
		"connection.uri_san_peer_certificate.contains('/ns/shop/')":                                                   {true, false},
		"connection.requested_server_name == 'web.shop' && connection.tls_version == 'TLSv1.3'":                       {true, false},
		"xds.cluster_name == 'inbound|80||' && xds.route_name == 'default'":                                           {true, false},
		"xds.listener_direction == 2":                                                                                 {false, true},
		"filter_state.downstream_peer.workload == 'client-v1' && filter_state['downstream_peer'].namespace == 'shop'": {true, false},
		"has(filter_state.upstream_peer.app)":                                                                         {false, false},
		"response.code >= 400 ? connection.mtls : true":                                                               {true, false},
		"true": {true, true},
		"connection.termination_details.endsWith('[p]')": {false, true},
		"response.code":                    {false, false}, // no truth value
		"'a' < 1":                          {false, false},
		"size(request.method) == 3":        {true, false},
		"string(destination.port) == '80'": {true, false},
	} {
		e, err := Parse(text)
		if err != nil {
			t.Errorf("%s: %v", text, err)
			continue
		}
		p := e.Bind(place)
		if got := [2]bool{p.Match(request()), p.Match(connection())}; got != want {
			t.Errorf("%s: %v, want %v", text, got, want)
		}
	}
}

// A gateway's records are outbound, and have TLS with the client beside that with the server.
func TestAGatewayHasTLSOnBothSides(t *testing.T) {
	client, server := &flow.Security{Peer: "spiffe://client", Mutual: true, Version: "TLSv1.3"}, &flow.Security{Peer: "spiffe://server", Version: "TLSv1.2"}
	opaque := connection()
	opaque.Client, opaque.Security = client, server
	exchange := request()
	exchange.Direction, exchange.Connection.Direction, exchange.Security, exchange.Connection.Client = flow.Outbound, flow.Outbound, server, client
	for _, text := range []string{
		"connection.mtls", "connection.tls_version == 'TLSv1.3'", "connection.uri_san_peer_certificate == 'spiffe://client'",
		"upstream.tls_version == 'TLSv1.2'", "upstream.uri_san_peer_certificate == 'spiffe://server'",
	} {
		e, err := Parse(text)
		if err != nil {
			t.Errorf("%s: %v", text, err)
			continue
		}
		if p := e.Bind(place); !p.Match(exchange) || !p.Match(opaque) {
			t.Errorf("%s: %v for a request and %v for a connection, want both", text, p.Match(exchange), p.Match(opaque))
		}
	}
}

func TestWhatIsNotUnderstoodIsAnError(t *testing.T) {
	for text, problem := range map[string]string{
		"":                                          "column 1: the expression is incomplete",
		"response.code >=":                          "column 17: the expression is incomplete",
		"response.code >= 400 400":                  "column 22: unexpected 400",
		"response.code & 1":                         "column 15: unexpected '&'",
		"response.codes == 1":                       "column 1: the attribute response.codes is not supported",
		"true && request.time == 1":                 "column 9: the attribute request.time is not supported",
		"metadata.filter_metadata['a'] == 1":        "the attribute metadata.filter_metadata.a is not supported",
		"request == 1":                              "the attribute request is not supported",
		"request.headers[request.method] == 'a'":    "selected by constants only",
		"request.method in request.headers":         `"in" is supported for`,
		"has(request.headers['a'])":                 "has takes the selection",
		"has(1)":                                    "has takes the selection",
		"[1].exists(x, x == 1)":                     "the method exists is not supported",
		"uuid() == ''":                              "the function uuid is not supported",
		"request.method.lowerAscii() == ''":         "the method lowerAscii is not supported",
		"request.method.matches(request.path)":      "constant regular expression",
		"request.method.matches('(')":               "constant regular expression",
		"duration(request.method) > duration('1s')": "duration takes a constant",
		"1u == 1":                                   "unsigned numbers",
		"b'a' == 'a'":                               "strings with the prefix b",
		"'a":                                        "column 1: the string has no end",
		`'\q'`:                                      "column 2: unknown escape sequence",
		"99999999999999999999 == 1":                 "too large",
		strings.Repeat("(", 100):                    "nested too deeply",
		`r'\''`:                                     "column 5: the string has no end",
		"'\r'":                                      "column 1: the string has no end",
		"-!true":                                    "column 2: unexpected !",
		"[1] == [1]":                                `column 1: lists are supported behind "in" only`,
		"1 in [[1]]":                                `column 7: lists are supported behind "in" only`,
		"has(request.headers)":                      "column 5: headers are supported",
		"size(response.headers) == 1":               "column 6: headers are supported",
		"1" + strings.Repeat("+1", 200) + " == 1":   "too long",
		strings.Repeat(" ", 5000):                   "longer than",
		"{'a': 1} == 1":                             "unexpected",
		"'\x87'":                                    "not UTF-8",
		"true // comment":                           "comments",
		"'a'.size == 1":                             "only attributes have fields",
		"(request).method == 'GET'":                 "the attribute request is not supported",
	} {
		if _, err := Parse(text); err == nil || !strings.Contains(err.Error(), problem) {
			t.Errorf("%.40s: %v, want %s", text, err, problem)
		}
	}
}

func TestValuesOfExpressions(t *testing.T) {
	for text, want := range map[string]string{
		"request.host": "shop.example:80", "response.code": "503", "connection.mtls": "true", "string(destination.port) + '/' + request.method": "80/GET",
		"request.headers['x-one']": "one", "1.5": "1.5", "duration('1500ms')": "1.5s", "request.headers['x-two']": "", "1/0": "",
	} {
		e, err := Parse(text)
		if err != nil {
			t.Fatal(err)
		}
		got, ok := e.Bind(place).AppendText(nil, request())
		if string(got) != want || ok != (want != "") {
			t.Errorf("%s: %q, %v, want %q", text, got, ok, want)
		}
	}
}

func TestTheFieldsOfAnExpressionAreKnown(t *testing.T) {
	e, err := Parse("request.headers['x-one'] == 'a' || 'x-one' in request.headers || response.headers.etag == request.headers.range")
	if err != nil {
		t.Fatal(err)
	}
	if got := e.Headers(); len(got) != 3 || got[0] != (Header{"x-one", false}) || got[1] != (Header{"etag", true}) || got[2] != (Header{"range", false}) {
		t.Errorf("the fields are %v", got)
	}
}

// FuzzExpressions checks that no text makes the parser or the evaluation fail.
func FuzzExpressions(f *testing.F) {
	for _, text := range []string{
		"response.code >= 400", "!has(response.code) || 'x-one' in request.headers && (1.5e3 != -2 ? true : r'a\\' in [\"\\x41\\u00e9\\101\", '''b'''])",
		"-9223372036854775807 - 2 < 9223372036854775807 % -1", "request.path.matches('[') || size(request.host + 'a') > int('7') * 3",
		"filter_state['downstream_peer'].app == string(1) + string(duration('1s'))",
	} {
		f.Add(text)
	}
	records := []*flow.Record{request(), connection()}
	f.Fuzz(func(t *testing.T, text string) {
		e, err := Parse(text)
		if err != nil {
			return
		}
		p := e.Bind(place)
		for _, r := range records {
			first := p.Match(r)
			text, ok := p.AppendText(nil, r)
			if again := p.Match(r); again != first || first && (!ok || string(text) != "true") {
				t.Errorf("%s: %v, then %v, with the text %q", e, first, again, text)
			}
		}
	})
}
