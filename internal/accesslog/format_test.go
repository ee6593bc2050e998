package accesslog

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/pillion-proxy/pillion/internal/flow"
)

func TestLinesAreIstios(t *testing.T) {
	for name, f := range map[string]*Format{
		"text": mustParse(t, ParseFormat, ""),
		"json": mustParse(t, ParseJSONFormat, ""),
	} {
		var got strings.Builder
		for _, s := range stories {
			fmt.Fprintf(&got, "# %s\n%s\n", s.name, lineOf(f, s.Record))
		}
		file := filepath.Join("testdata", name+".golden")
		if *update {
			if err := os.WriteFile(file, []byte(got.String()), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if got.String() != string(want) {
			t.Errorf("%s: lines changed; if that is intended, run the test with -update\ngot:\n%s\nwant:\n%s", name, &got, want)
		}
	}
}

// The text that a connection caches must not change the line of a later request.
func TestLinesDoNotDependOnEarlierRequestsOfTheConnection(t *testing.T) {
	changes := []func(*flow.Record){
		func(*flow.Record) {},
		func(*flow.Record) {},
		func(r *flow.Record) { r.Upstream = far },
		func(r *flow.Record) { r.UpstreamLocal = netip.AddrPortFrom(local.Addr(), 9) },
		func(r *flow.Record) { r.OriginalDestination = far },
		func(r *flow.Record) { r.OriginalDestination = netip.AddrPort{} },
		func(r *flow.Record) { r.Downstream = local },
		func(r *flow.Record) { r.HTTP.ForwardedFor = []byte("203.0.113.9") },
		func(r *flow.Record) { r.Reason = flow.Loop },
		func(r *flow.Record) { r.HTTP.Method = nil },
		func(r *flow.Record) { r.SetTLS(flow.Hello{ServerName: "a.example"}) },
		func(r *flow.Record) { r.HTTP.Status, r.HTTP.Path = 404, []byte("/other") },
	}
	for name, f := range map[string]*Format{
		"text":       mustParse(t, ParseFormat, ""),
		"json":       mustParse(t, ParseJSONFormat, ""),
		"first":      mustParse(t, ParseFormat, "%UPSTREAM_HOST% %TRAFFIC_DIRECTION% %REQ(:PATH)% %UPSTREAM_REMOTE_PORT%"),
		"only":       mustParse(t, ParseFormat, "%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%"),
		"none":       mustParse(t, ParseFormat, "%RESPONSE_CODE%"),
		"only words": mustParse(t, ParseFormat, "a request"),
	} {
		for _, direction := range []flow.Direction{flow.Inbound, flow.Outbound} {
			shared := connection(direction, flow.HTTP11, "")
			shared.Requests.Store(2)
			for i := range changes {
				for j := range changes { // every pair
					for _, change := range []int{i, j} {
						alone, together := request(direction, flow.Completed), request(direction, flow.Completed)
						together.Connection = shared
						changes[change](alone)
						changes[change](together)
						if got, want := lineOf(f, together), lineOf(f, alone); got != want {
							t.Errorf("%s, change %d:\n%s\nwant\n%s", name, change, got, want)
						}
					}
				}
			}
		}
	}
	f, r := mustParse(t, ParseFormat, ""), request(flow.Inbound, flow.Completed)
	r.Connection.Requests.Store(1)
	lineOf(f, r)
	if place.Get(r.Connection) != nil {
		t.Error("text is cached for the only request of a connection")
	}
	r.Connection.Requests.Store(2)
	lineOf(f, r)
	if kept := f.steadyOf(r); !strings.HasPrefix(string(kept.text), `" "198.51.100.2:80" inbound|80|| `) || !strings.HasSuffix(string(kept.text), " - default") {
		t.Errorf("cached text: %q", kept.text)
	}
}

func TestOperators(t *testing.T) {
	inbound, outbound := request(flow.Inbound, flow.Completed), request(flow.Outbound, flow.Completed)
	traced := request(flow.Inbound, flow.Completed)
	traced.HTTP.Trace = &flow.Trace{ID: [16]byte{1}, Span: [8]byte{0xab, 0xcd, 0xef}}
	inbound.HTTP.ForwardedFor = []byte("2001:db8::1")
	inbound.HTTP.Fields = [][]byte{[]byte("blue green"), nil, []byte("grün")}
	inbound.HTTP.ResponseFields = [][]byte{[]byte("text/html")}
	inbound.HTTP.GRPCStatus = []byte("16")
	tcp := connection(flow.Outbound, flow.Opaque, flow.UpstreamTimeout)
	tcp.Attempts = 3
	balanced := connection(flow.Outbound, flow.TLS, flow.Closed)
	balanced.SetClient(netip.MustParseAddrPort("203.0.113.9:4660"))
	balanced.SetTLS(flow.Hello{ServerName: "a.example"})
	host, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		format string
		record *flow.Record
		want   string
	}{
		{"100%% %RESPONSE_CODE%", inbound, "100% 200"},
		{"%START_TIME%", inbound, "2026-03-01T11:30:45.053Z"},
		{"%START_TIME(%Y-%m-%dT%H:%M:%S.%3fZ)%", inbound, "2026-03-01T11:30:45.053Z"},
		{"%START_TIME(%s.%6f %f %1f %9f)%", inbound, "1772364645.053999 053999999 0 053999999"},
		{"%START_TIME(%d/%b/%Y:%T %z %% %F %R %a %A %B %j %Z %y %e %I %p)%", inbound, "01/Mar/2026:11:30:45 +0000 % 2026-03-01 11:30 Sun Sunday March 060 UTC 26  1 11 AM"},
		{"%REQ_WITHOUT_QUERY(:PATH)%", inbound, "/a"},
		{"%REQ(:method)% %REQ(Host)% %REQ(:AUTHORITY)%", inbound, "GET www.example:30293 www.example:30293"},
		{`%REQ(X-TENANT)% "%REQ(X-TENANT)%" %REQ(X-TENANT):4% "%REQ(X-TENANT):9%" "%REQ(X-TENANT):10%" "%REQ(X-TENANT):11%"`, inbound,
			`blue\x20green "blue green" blue "blue gree" "blue green" "blue green"`},
		{`%REQ(X-TENANT)% %REQ(X-NONE)% %REQ(X-NONE?X-COLOUR)% "%REQ(X-COLOUR):3%" "%REQ(X-COLOUR):4%"`, inbound, `blue\x20green - gr\xc3\xbcn "gr" "grü"`},
		{"%RESP(CONTENT-TYPE)% %RESP(:STATUS)% %RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)%", inbound, "text/html 200 1"},
		{"%RESP(CONTENT-TYPE)%", outbound, "-"},
		{"%UPSTREAM_REMOTE_ADDRESS% %UPSTREAM_REMOTE_ADDRESS_WITHOUT_PORT% %UPSTREAM_REMOTE_PORT%", outbound, "203.0.113.7:5432 203.0.113.7 5432"},
		{"%UPSTREAM_LOCAL_ADDRESS% %UPSTREAM_LOCAL_ADDRESS_WITHOUT_PORT% %UPSTREAM_LOCAL_PORT%", inbound, "127.0.0.6:40339 127.0.0.6 40339"},
		{"%DOWNSTREAM_LOCAL_ADDRESS% %DOWNSTREAM_LOCAL_ADDRESS_WITHOUT_PORT% %DOWNSTREAM_LOCAL_PORT%", inbound, "198.51.100.2:80 198.51.100.2 80"},
		{"%DOWNSTREAM_REMOTE_ADDRESS% %DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT% %DOWNSTREAM_REMOTE_PORT%", inbound, "[2001:db8::1]:0 2001:db8::1 0"},
		{"%DOWNSTREAM_DIRECT_REMOTE_ADDRESS% %DOWNSTREAM_DIRECT_REMOTE_ADDRESS_WITHOUT_PORT% %DOWNSTREAM_DIRECT_REMOTE_PORT%", inbound, "198.51.100.1:61751 198.51.100.1 61751"},
		{"%DOWNSTREAM_REMOTE_ADDRESS% %DOWNSTREAM_DIRECT_REMOTE_ADDRESS% %REQUESTED_SERVER_NAME%", balanced, "203.0.113.9:4660 198.51.100.2:36520 a.example"},
		{"%UPSTREAM_CLUSTER% %UPSTREAM_CLUSTER_RAW% %UPSTREAM_HOST%", inbound, "inbound|80|| inbound|80|| 198.51.100.2:80"},
		{"%UPSTREAM_REQUEST_ATTEMPT_COUNT%", inbound, "0"},
		{"%UPSTREAM_REQUEST_ATTEMPT_COUNT%", tcp, "3"},
		{"%GRPC_STATUS% %GRPC_STATUS_NUMBER%", inbound, "Unauthenticated 16"},
		{"%GRPC_STATUS% %GRPC_STATUS_NUMBER%", outbound, "- -"},
		{"%HOSTNAME% %TRAFFIC_DIRECTION%", inbound, host + " INBOUND"},
		{"%TRAFFIC_DIRECTION% %PILLION_REASON%", outbound, "OUTBOUND completed"},
		{"%TRAFFIC_DIRECTION% %PILLION_REASON% %RESPONSE_FLAGS%", tcp, "OUTBOUND upstream_timeout UF,URX"},
		{"%PROTOCOL% %ROUTE_NAME% %GRPC_STATUS%", tcp, "- - -"},
		{"%TRACE_ID% %SPAN_ID%", traced, "01000000000000000000000000000000 abcdef0000000000"},
		{"%TRACE_ID% %SPAN_ID%", inbound, "- -"},
		{"a line\n", inbound, "a line"},
		{`a line\n`, inbound, "a line"},
	} {
		if got := lineOf(mustParse(t, ParseFormat, c.format), c.record); got != c.want {
			t.Errorf("%s: %s; want %s", c.format, got, c.want)
		}
	}
}

func TestJSONFormats(t *testing.T) {
	r := request(flow.Inbound, flow.Completed)
	r.HTTP.Fields = [][]byte{[]byte("a\"b\xff\u2028"), nil}
	for _, c := range []struct{ format, want string }{
		{`{"z":"%RESPONSE_CODE%", "a":"%REQ(X)%","none":"%REQ(Y)%"}`, `{"z":200,"a":"a\"b\ufffd\u2028","none":null}`},
		{`{"text":"took %DURATION% ms, \"%REQ(X)%\" and %REQ(Y)%, 5%%"}`, `{"text":"took 1 ms, \"a\"b\ufffd\u2028\" and -, 5%"}`},
		{`{"n":1.50,"yes":true,"no":null,"in":{"a":["%RESPONSE_FLAGS%","x",[]],"é\n":{}}}`, `{"n":1.50,"yes":true,"no":null,"in":{"a":["-","x",[]],"é\n":{}}}`},
		{`{"port":"%DOWNSTREAM_LOCAL_PORT%","g":"%GRPC_STATUS_NUMBER%","t":"%START_TIME(%s)%"}`, `{"port":80,"g":null,"t":"1772364645"}`},
	} {
		if got := lineOf(mustParse(t, ParseJSONFormat, c.format), r); got != c.want || !json.Valid([]byte(got)) {
			t.Errorf("%s: %s; want %s", c.format, got, c.want)
		}
	}
}

func TestErrorsOfInvalidFormats(t *testing.T) {
	for _, c := range []struct {
		parse        func(string) (*Format, error)
		format, want string
	}{
		{ParseFormat, "é %RESPONSE_CODES%", "access log format: unknown operator %RESPONSE_CODES% at column 3; the nearest known one is %RESPONSE_CODE%"},
		{ParseFormat, "%bytes%", "operator % at column 1 has no % at its end"},
		{ParseFormat, "5% of it", "operator % at column 2 has no % at its end; write %% for a percent sign"},
		{ParseFormat, "%PROTOCOL", "operator %PROTOCOL at column 1 has no % at its end"},
		{ParseFormat, "%REQ%", `operator %REQ% at column 1: "" is not a field name`},
		{ParseFormat, "%REQ(A?B?C)%", `"A?B?C" names more than one alternative`},
		{ParseFormat, "%REQ(A B)%", `"a b" is not a field name`},
		{ParseFormat, "%REQ(A", "operator %REQ( at column 1 has no closing parenthesis"},
		{ParseFormat, "%REQ(A):x%", `operator %REQ at column 1: "x" is not a length`},
		{ParseFormat, "%REQ(A):0%", `"0" is not a length`},
		{ParseFormat, "%REQ(:SCHEME)%", `there is no field ":scheme"`},
		{ParseFormat, "%RESP(X-ENVOY-UPSTREAM-SERVICE-TIME?X)%", "x-envoy-upstream-service-time has no alternative"},
		{ParseFormat, "%PROTOCOL(X)%", "operator %PROTOCOL% at column 1: takes no argument"},
		{ParseFormat, "%PROTOCOL:5%", "takes no length"},
		{ParseFormat, "%START_TIME()%", "the time format is empty"},
		{ParseFormat, "%START_TIME(%Q)%", "unknown conversion %Q"},
		{ParseFormat, "%START_TIME(%3)%", "unknown conversion %3"},
		{ParseFormat, "%START_TIME(ü)%", "must be printable ASCII"},
		{ParseFormat, "a\nb", "control character or invalid UTF-8 at column 2"},
		{ParseFormat, "\xff", "control character or invalid UTF-8 at column 1"},
		{ParseFormat, strings.Repeat("%PROTOCOL%", 1000), "the limit is 16384"},
		{ParseJSONFormat, "%PROTOCOL%", "JSON lines need an object"},
		{ParseJSONFormat, `{"a":"%PROTOCOLS%"}`, `access log format: value of "a": unknown operator %PROTOCOLS% at column 1; the nearest known one is %PROTOCOL%`},
		{ParseJSONFormat, `{"a":{"b":["x%PROTOCOL"]}}`, `value of "b": operator %PROTOCOL at column 2 has no`},
		{ParseJSONFormat, `{"a":"b"`, "reading JSON"},
		{ParseJSONFormat, `{"a":"b"} {}`, "text after the JSON object"},
	} {
		f, err := c.parse(c.format)
		if err == nil || !strings.Contains(err.Error(), c.want) || f != nil {
			t.Errorf("%.60s: %v; want %s", c.format, err, c.want)
		}
	}
	var many strings.Builder
	for i := range maxFields + 1 {
		fmt.Fprintf(&many, "%%REQ(X-%d)%%", i)
	}
	if _, err := ParseFormat(many.String()); err == nil || !strings.Contains(err.Error(), "more than 64 different fields") {
		t.Error(err)
	}
}

func TestFieldsOfFormat(t *testing.T) {
	f := mustParse(t, ParseFormat, "%REQ(B?a)% %REQ(A)% %REQ(User-Agent?X-Request-Id)% %RESP(Server)% %RESP(X-Envoy-Upstream-Service-Time)% %REQ(x-forwarded-for)%")
	if want := (flow.Fields{Request: []string{"b", "a"}, Response: []string{"server"}}); !reflect.DeepEqual(f.Fields(), want) {
		t.Errorf("%+v; want %+v", f.Fields(), want)
	}
	for _, f := range []*Format{mustParse(t, ParseFormat, ""), mustParse(t, ParseJSONFormat, "")} {
		if want := (flow.Fields{Request: []string{"x-envoy-original-path"}}); !reflect.DeepEqual(f.Fields(), want) {
			t.Errorf("default: %+v", f.Fields())
		}
	}
}

func TestAddressesInForwardedFor(t *testing.T) {
	for text, want := range map[string]string{
		"192.0.2.1": "192.0.2.1", "0.0.0.0": "0.0.0.0", "255.255.255.255": "255.255.255.255", "2001:DB8::1": "2001:db8::1",
		"::ffff:192.0.2.1": "::ffff:192.0.2.1", "fe80::1%eth0": "", "256.0.0.1": "", "01.2.3.4": "", "1.2.3": "", "1.2.3.4.5": "",
		"1.2.3.": "", ".1.2.3": "", "1..2.3": "", "": "", "unknown": "", "192.0.2.1:80": "", "[::1]": "", "9999999999999.1.1.1": "",
	} {
		got := parseIP([]byte(text))
		if got.IsValid() != (want != "") || want != "" && got.String() != want {
			t.Errorf("%q: %v; want %q", text, got, want)
		}
		if a, err := netip.ParseAddr(text); got.IsValid() && (err != nil || a != got) {
			t.Errorf("%q: %v, and netip has %v, %v", text, got, a, err)
		}
	}
}

// split22 splits a line as a simple reader does, without regard to escapes: at the spaces outside quotation marks.
func split22(line string) []string {
	inside := false
	return strings.FieldsFunc(line, func(r rune) bool {
		if r == '"' {
			inside = !inside
		}
		return !inside && unicode.IsSpace(r)
	})
}

// FuzzLineCannotBeForged varies every value that clients choose.
func FuzzLineCannotBeForged(f *testing.F) {
	text, object := mustParse(f, ParseFormat, ""), mustParse(f, ParseJSONFormat, "")
	custom := mustParse(f, ParseFormat, `%REQ(:PATH)% %REQ(USER-AGENT):7% "%REQ(X-ENVOY-ORIGINAL-PATH)%" %GRPC_STATUS%`)
	for _, s := range stories {
		h := s.HTTP
		f.Add(h.Method, h.Path, h.Authority, h.UserAgent, h.ForwardedFor, h.ID, h.GRPCStatus, s.TLS().ServerName, uint16(1), s.IsRequest())
	}
	f.Add([]byte("\""), []byte(" "), []byte("\\\""), []byte("\u2028\u0085"), []byte("fe80::1%\" \n"), []byte{}, []byte("99999999999999999999"), "\" ", uint16(9000), true)
	f.Fuzz(func(t *testing.T, method, path, authority, agent, forwarded, id, status []byte, name string, times uint16, isRequest bool) {
		r := request(flow.Inbound, flow.Completed)
		many := func(b []byte) []byte { return bytes.Repeat(b, 1+int(times)%(1+40000/(len(b)+1))) }
		r.HTTP.Method, r.HTTP.Path, r.HTTP.Authority, r.HTTP.UserAgent = many(method), many(path), many(authority), many(agent)
		r.HTTP.ForwardedFor, r.HTTP.ID, r.HTTP.GRPCStatus = many(forwarded), many(id), status
		r.HTTP.Fields = [][]byte{path}
		r.SetTLS(flow.Hello{ServerName: name})
		if !isRequest {
			r.Connection = nil
		}
		for _, c := range []struct {
			*Format
			fields int
		}{{text, 22}, {custom, 4}, {object, 0}} {
			got := lineOf(c.Format, r)
			if len(got) >= maxLine {
				t.Errorf("%d bytes", len(got))
			}
			if strings.ContainsFunc(got, func(r rune) bool { return unicode.IsControl(r) || r == 0x2028 || r == 0x2029 }) || !utf8.ValidString(got) {
				t.Errorf("more than one line, or invalid UTF-8: %q", got)
			}
			if c.fields > 0 && len(split22(got)) != c.fields {
				t.Errorf("%d fields, want %d: %s", len(split22(got)), c.fields, got)
			}
			if c.fields == 0 {
				decoded := make(map[string]any)
				if err := json.Unmarshal([]byte(got), &decoded); err != nil || len(decoded) != 24 {
					t.Errorf("%d keys, %v: %s", len(decoded), err, got)
				}
				if s, _ := decoded["authority"].(string); utf8.Valid(r.HTTP.Authority) && len(r.HTTP.Authority) < 1000 && s != string(r.HTTP.Authority) {
					t.Errorf("%q is logged as %q", r.HTTP.Authority, s)
				}
			}
		}
	})
}

func TestLongValuesAreCutAndTheLineKeepsItsShape(t *testing.T) {
	for _, unit := range []string{"a", "\xff", "é", "\"", "\u2028", "🐿"} {
		long := []byte(strings.Repeat(unit, 20000))
		r := request(flow.Inbound, flow.Completed)
		r.HTTP.Method, r.HTTP.Path, r.HTTP.Authority, r.HTTP.UserAgent, r.HTTP.ID = long, long, long, long, long
		r.HTTP.ForwardedFor, r.HTTP.Fields = long, [][]byte{long}
		r.SetTLS(flow.Hello{ServerName: string(long)})
		line := lineOf(mustParse(t, ParseFormat, ""), r)
		fields := split22(line)
		if len(fields) != 22 || len(line) > maxLine || !strings.HasSuffix(line, " default") {
			t.Fatalf("%q: %d fields in %d bytes, ending in %s", unit, len(fields), len(line), line[len(line)-20:])
		}
		for _, i := range []int{11, 12, 13, 14, 20} {
			if !strings.HasSuffix(strings.Trim(fields[i], `"`), "...") {
				t.Errorf("%q: field %d is not cut: %.40s", unit, i+1, fields[i])
			}
		}
		if line = lineOf(mustParse(t, ParseJSONFormat, ""), r); !json.Valid([]byte(line)) || len(line) > maxLine {
			t.Errorf("%q: invalid JSON, or too long: %d bytes", unit, len(line))
		}
	}
	r := request(flow.Inbound, flow.Completed)
	r.HTTP.Path = bytes.Repeat([]byte("/a"), maxValue/2)
	if !strings.Contains(lineOf(mustParse(t, ParseFormat, ""), r), string(r.HTTP.Path)+" HTTP/1.1") {
		t.Error("a value of 8 KiB is cut")
	}
}

// Operators of TLS have values on the side with which the agent speaks TLS.
func TestOperatorsOfTLS(t *testing.T) {
	format := mustParse(t, ParseFormat, "%DOWNSTREAM_PEER_URI_SAN% %DOWNSTREAM_LOCAL_URI_SAN% %DOWNSTREAM_TLS_VERSION% %DOWNSTREAM_TLS_CIPHER%"+
		" | %UPSTREAM_PEER_URI_SAN% %UPSTREAM_LOCAL_URI_SAN% %UPSTREAM_TLS_VERSION% %UPSTREAM_TLS_CIPHER%")
	security := &flow.Security{Peer: "spiffe://a/peer", Own: "spiffe://a/own", Version: "TLSv1.3", Cipher: "TLS_AES_128_GCM_SHA256"}
	const all, none = "spiffe://a/peer spiffe://a/own TLSv1.3 TLS_AES_128_GCM_SHA256", "- - - -"
	for _, c := range []struct {
		direction flow.Direction
		security  *flow.Security
		want      string
	}{
		{flow.Inbound, security, all + " | " + none}, {flow.Outbound, security, none + " | " + all}, {flow.Inbound, nil, none + " | " + none},
		{flow.Inbound, &flow.Security{Version: "TLSv1.2"}, "- - TLSv1.2 - | " + none},
	} {
		for _, r := range []*flow.Record{request(c.direction, flow.Completed), connection(c.direction, flow.Opaque, flow.Closed)} {
			if r.Security = c.security; lineOf(format, r) != c.want {
				t.Errorf("%v, %+v: %s, want %s", c.direction, c.security, lineOf(format, r), c.want)
			}
		}
	}
}

// What Envoy prints of certificates: see its tests of the same operators.
func TestOperatorsOfCertificates(t *testing.T) {
	at := time.Date(2018, 12, 18, 1, 50, 34, 567_000_000, time.UTC)
	peer := &flow.Certificate{
		URIs: "spiffe://a/peer,spiffe://a/other", DNS: "a.example,b.example", IPs: "192.0.2.1", Emails: "a@b.example", Subject: `CN=a b,O="c"`, Issuer: "CN=ca",
		Serial: "b8b5ecc898f2124a", SHA256: "685a2db5", SHA1: "3f1e", PEM: "-----BEGIN%20CERTIFICATE-----%0A", NotBefore: at, NotAfter: at.AddDate(1, 0, 0),
		ChainSerials: "b8b5ecc898f2124a,01", ChainSHA256: "685a2db5,02", ChainSHA1: "3f1e,03",
	}
	own := &flow.Certificate{URIs: "spiffe://a/own", DNS: "own.example", IPs: "2001:db8::1", Emails: "own@b.example", Subject: "CN=own"}
	both := map[string]string{
		"%_PEER_URI_SAN% %_PEER_DNS_SAN% %_PEER_IP_SAN% %_PEER_EMAIL_SAN%":     "spiffe://a/peer,spiffe://a/other a.example,b.example 192.0.2.1 a@b.example",
		"%_LOCAL_URI_SAN% %_LOCAL_DNS_SAN% %_LOCAL_IP_SAN% %_LOCAL_EMAIL_SAN%": "spiffe://a/own own.example 2001:db8::1 own@b.example",
		`"%_PEER_SUBJECT%" %_PEER_ISSUER% %_LOCAL_SUBJECT%`:                    `"CN=a b,O=\x22c\x22" CN=ca CN=own`,
		"%_PEER_CERT%": "-----BEGIN%20CERTIFICATE-----%0A",
		"%_PEER_CERT_V_START% %_PEER_CERT_V_END%":                              "2018-12-18T01:50:34.567Z 2019-12-18T01:50:34.567Z",
		"%_PEER_CERT_V_START(%Y/%m/%dT%H:%M:%S%z)% %_PEER_CERT_V_END(%s.%3f)%": "2018/12/18T01:50:34+0000 1576633834.567",
	}
	downstream := map[string]string{
		"%_PEER_SERIAL% %_PEER_FINGERPRINT_256% %_PEER_FINGERPRINT_1%":                      "b8b5ecc898f2124a 685a2db5 3f1e",
		"%_PEER_CHAIN_SERIALS% %_PEER_CHAIN_FINGERPRINTS_256% %_PEER_CHAIN_FINGERPRINTS_1%": "b8b5ecc898f2124a,01 685a2db5,02 3f1e,03",
	}
	security := &flow.Security{Peer: "spiffe://a/peer", Own: "spiffe://a/own", PeerCertificate: peer, OwnCertificate: own}
	for side, direction := range map[string]flow.Direction{"DOWNSTREAM": flow.Inbound, "UPSTREAM": flow.Outbound} {
		check := func(text, want string) {
			text = strings.NewReplacer("%_", "%"+side+"_").Replace(text)
			format := mustParse(t, ParseFormat, text)
			if !format.Fields().Certificates {
				t.Errorf("%s: records will not carry certificates", text)
			}
			for _, r := range []*flow.Record{request(direction, flow.Completed), connection(direction, flow.Opaque, flow.Closed)} {
				if r.Security = security; lineOf(format, r) != want {
					t.Errorf("%s: %s, want %s", text, lineOf(format, r), want)
				}
				for _, none := range []*flow.Security{nil, {}} {
					if r.Security = none; strings.Trim(lineOf(format, r), `- "`) != "" {
						t.Errorf("%s without certificates: %s", text, lineOf(format, r))
					}
				}
				r.Security, r.Direction = security, 1-r.Direction
				if strings.Trim(lineOf(format, r), `- "`) != "" {
					t.Errorf("%s of the other side: %s", text, lineOf(format, r))
				}
			}
		}
		for text, want := range both {
			check(text, want)
		}
		for text, want := range downstream {
			if side == "DOWNSTREAM" {
				check(text, want)
			} else if _, err := ParseFormat(strings.ReplaceAll(text, "%_", "%UPSTREAM_")); err == nil {
				t.Errorf("%s has operators of upstream that Envoy lacks", text)
			}
		}
	}
	if mustParse(t, ParseFormat, "%DOWNSTREAM_TLS_VERSION% %START_TIME%").Fields().Certificates {
		t.Error("certificates are described that are not printed")
	}
	if _, err := ParseFormat("%DOWNSTREAM_PEER_CERT_V_START(%Q)%"); err == nil {
		t.Error("an unknown conversion is accepted")
	}
	if got := lineOf(mustParse(t, ParseJSONFormat, `{"end":"%DOWNSTREAM_PEER_CERT_V_END%"}`), request(flow.Inbound, flow.Completed)); got != `{"end":null}` {
		t.Error(got)
	}
}

// Sessions are not resumed, so they have no ID.
func TestSessionsOfTLSHaveNoID(t *testing.T) {
	r := request(flow.Inbound, flow.Completed)
	r.Security = &flow.Security{Version: "TLSv1.2"}
	if got := lineOf(mustParse(t, ParseFormat, "%DOWNSTREAM_TLS_SESSION_ID% %UPSTREAM_TLS_SESSION_ID%"), r); got != "- -" {
		t.Error(got)
	}
}

// Why a handshake failed, in one word.
func TestFailedHandshakesAreTold(t *testing.T) {
	format := mustParse(t, ParseFormat, "%DOWNSTREAM_TRANSPORT_FAILURE_REASON% %UPSTREAM_TRANSPORT_FAILURE_REASON%")
	r := connection(flow.Inbound, flow.Opaque, flow.TLSPeerRefused)
	for text, want := range map[string]string{
		"the client has no certificate": "TLS_error:_the_client_has_no_certificate -",
		`a \ "b\x20c" d`:                `TLS_error:_a_\\_\x22b\\x20c\x22_d -`,
	} {
		if r.Err = errors.New(text); lineOf(format, r) != want {
			t.Errorf("%s, want %s", lineOf(format, r), want)
		}
	}
	if got := lineOf(mustParse(t, ParseFormat, `"%DOWNSTREAM_TRANSPORT_FAILURE_REASON%"`), r); strings.Contains(got, " ") {
		t.Error(got)
	}
	for _, reason := range []flow.Reason{flow.Closed, flow.DownstreamReset, flow.MeshRefused} {
		if r.Reason = reason; lineOf(format, r) != "- -" {
			t.Errorf("%s: %s", reason, lineOf(format, r))
		}
	}
}

// Envoy keeps the peers of Istio's metadata exchange in a filter state.
func TestWorkloadsOfPeersAreAFilterState(t *testing.T) {
	text := ""
	for _, name := range []string{"workload", "namespace", "cluster", "service", "revision", "app", "version"} {
		text += "%FILTER_STATE(downstream_peer:FIELD:" + name + ")% %FILTER_STATE(upstream_peer:FIELD:" + name + "):3% "
	}
	format := mustParse(t, ParseFormat, strings.TrimSpace(text))
	w := &flow.Workload{Name: "reviews-v1", Namespace: "shop", Cluster: "east", CanonicalService: "reviews", CanonicalRevision: "v1", App: "rev"}
	for direction, want := range map[flow.Direction]string{
		flow.Inbound: "reviews-v1 - shop - east - reviews - v1 - rev - - -", flow.Outbound: "- rev - sho - eas - rev - v1 - rev - -",
	} {
		r := request(direction, flow.Completed)
		if got := lineOf(format, r); strings.Trim(got, "- ") != "" {
			t.Errorf("%v: unknown peers are %s", direction, got)
		}
		r.Workload.Set(w)
		if got := lineOf(format, r); got != want {
			t.Errorf("%v: %s, want %s", direction, got, want)
		}
	}
	for _, wrong := range []string{"%FILTER_STATE%", "%FILTER_STATE(downstream_peer)%", "%FILTER_STATE(other:FIELD:app)%", "%FILTER_STATE(upstream_peer:FIELD:other)%"} {
		if _, err := ParseFormat(wrong); err == nil || !strings.Contains(err.Error(), "downstream_peer:FIELD:workload") {
			t.Errorf("%s: %v", wrong, err)
		}
	}
}

// Requests inside TLS have the SNI of their connection.
func TestRequestsHaveTheServerNameOfTheirConnection(t *testing.T) {
	format := mustParse(t, ParseFormat, "%REQUESTED_SERVER_NAME% %RESPONSE_CODE%")
	for _, name := range []string{"", "web.example"} {
		r := request(flow.Inbound, flow.Completed)
		r.Connection.SetTLS(flow.Hello{ServerName: name})
		want := cmp.Or(name, "-")
		for range 2 { // the second line has a part of the first
			if got, _, _ := strings.Cut(lineOf(format, r), " "); got != want {
				t.Errorf("%s, want %s", got, want)
			}
		}
	}
}

func TestEachOperatorIsTested(t *testing.T) {
	source, err := os.ReadFile("format_test.go")
	if err != nil {
		t.Fatal(err)
	}
	tested := Default + string(source)
	for _, o := range operators() {
		if _, rest, of := strings.Cut(o.name, "STREAM_"); of && (strings.Contains(tested, "%_"+rest+"%") || strings.Contains(tested, "%_"+rest+"(")) {
			continue
		}
		if !strings.Contains(tested, "%"+o.name+"%") && !strings.Contains(tested, "%"+o.name+"(") {
			t.Errorf("no test has %%%s%%", o.name)
		}
	}
	names := make([]string, len(operators()))
	for i, o := range operators() {
		names[i] = o.name
	}
	if slices.Sort(names); len(slices.Compact(names)) != len(operators()) {
		t.Error("the table has an operator twice")
	}
}

func TestDistance(t *testing.T) {
	for _, c := range []struct {
		a, b string
		want int
	}{{"", "", 0}, {"", "abc", 3}, {"abc", "", 3}, {"abc", "abc", 0}, {"kitten", "sitting", 3}, {"abc", "yabd", 2}, {"ab", "ba", 2}} {
		if got := distance(c.a, c.b); got != c.want {
			t.Errorf("distance(%q, %q) = %d, want %d", c.a, c.b, got, c.want)
		}
	}
}

func TestSecondsChange(t *testing.T) {
	f := mustParse(t, ParseFormat, "%START_TIME%")
	var l line
	for _, offset := range []time.Duration{0, time.Millisecond, time.Second, 0, -time.Hour} {
		r := &flow.Record{Opened: opened.Add(offset)}
		f.build(&l, r, 0)
		if got, want := strings.TrimSpace(string(l.buf)), r.Opened.UTC().Truncate(time.Millisecond).Format("2006-01-02T15:04:05.000Z"); got != want {
			t.Errorf("%s; want %s", got, want)
		}
	}
}

func checkJSON(t *testing.T, line string) {
	t.Helper()
	if !json.Valid([]byte(line)) || strings.Contains(line, "\n") || len(line) > maxLine {
		t.Errorf("not a JSON line: %q", line)
	}
}

// Verdicts of policies that are not enforced stand where Envoy keeps them.
func TestDryRunsAreDynamicMetadata(t *testing.T) {
	const filter = "%DYNAMIC_METADATA(envoy.filters.http.rbac:istio_dry_run_"
	format := mustParse(t, ParseFormat, filter+"allow_shadow_engine_result)% "+filter+"allow_shadow_effective_policy_id)% "+
		filter+"deny_shadow_engine_result)%|"+filter+"deny_shadow_effective_policy_id):6%")
	r := request(flow.Inbound, flow.Completed)
	if got := lineOf(format, r); got != "- - -|-" {
		t.Errorf("without dry runs: %s", got)
	}
	deny := &flow.DryRun{Prefix: "istio_dry_run_deny_", Policy: "ns[a]-policy[b]-rule[0]", Denied: true}
	r.HTTP.DryRun = &flow.DryRun{Prefix: "istio_dry_run_allow_", Next: deny}
	if got := lineOf(format, r); got != "allowed - denied|ns[a]-" {
		t.Errorf("with dry runs: %s", got)
	}
	for _, wrong := range []string{"%DYNAMIC_METADATA%", "%DYNAMIC_METADATA(envoy.filters.http.rbac)%", "%DYNAMIC_METADATA(other:x_shadow_engine_result)%"} {
		if _, err := ParseFormat(wrong); err == nil || !strings.Contains(err.Error(), "istio_dry_run_") {
			t.Errorf("%s: %v", wrong, err)
		}
	}
}
