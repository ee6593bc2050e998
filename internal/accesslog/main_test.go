package accesslog

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/envoy"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/nettest"
)

var update = flag.Bool("update", false, "write the golden files")

func TestMain(m *testing.M) {
	if what := os.Getenv(asChild); what != "" {
		if err := child(what); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(nettest.Main(m))
}

var (
	opened = time.Date(2026, 3, 1, 12, 30, 45, 53_999_999, time.FixedZone("", 3600))
	peer   = netip.MustParseAddrPort("198.51.100.1:61751")
	pod    = netip.MustParseAddrPort("198.51.100.2:80")
	bound  = netip.MustParseAddrPort("127.0.0.6:40339")
	far    = netip.MustParseAddrPort("203.0.113.7:5432")
	local  = netip.MustParseAddrPort("198.51.100.2:36520")
)

// connection returns the record of an ended connection.
func connection(direction flow.Direction, protocol flow.Protocol, reason flow.Reason) *flow.Record {
	r := &flow.Record{Direction: direction, Protocol: protocol, Opened: opened, Downstream: peer, OriginalDestination: pod,
		Upstream: pod, UpstreamLocal: bound, Cluster: envoy.InboundCluster(pod.Port()), Reason: reason, Duration: 231*time.Millisecond + 999*time.Microsecond,
		HTTP: new(flow.Request)}
	if direction == flow.Outbound {
		r.Downstream, r.OriginalDestination, r.Upstream, r.UpstreamLocal = local, far, far, netip.AddrPortFrom(local.Addr(), 50123)
		r.Cluster = envoy.PassthroughCluster
	}
	r.Received.Store(839)
	r.Sent.Store(2504306)
	return r
}

// request returns the record of an ended request.
func request(direction flow.Direction, reason flow.Reason) *flow.Record {
	r := connection(direction, flow.HTTP11, reason)
	r.Connection = connection(direction, flow.HTTP11, "")
	if r.Route = envoy.RouteInbound; direction == flow.Outbound {
		r.Route = envoy.RouteOutbound
	}
	r.Received.Store(0)
	r.Sent.Store(615)
	r.Duration = 1500 * time.Microsecond
	r.HTTP = &flow.Request{
		Method: []byte("GET"), Path: []byte("/a?b=c"), Authority: []byte("www.example:30293"), UserAgent: []byte("curl/7.81.0"),
		ID: []byte("6e460fea-9b38-97c5-8f5c-8a5b3e5f3a11"), Fields: [][]byte{nil},
		Status: 200, Details: "via_upstream", ServiceTime: 1200 * time.Microsecond,
	}
	return r
}

func story(r *flow.Record, change func(*flow.Record)) *flow.Record {
	change(r)
	return r
}

// stories are ended requests and connections whose lines must be those of Istio.
var stories = []struct {
	name string
	*flow.Record
}{
	{"inbound GET", story(request(flow.Inbound, flow.Completed), func(r *flow.Record) {
		r.HTTP.ForwardedFor = []byte("203.0.113.9, 172.16.0.1")
	})},
	{"inbound GET, forwarded for IPv6", story(request(flow.Inbound, flow.Completed), func(r *flow.Record) {
		r.HTTP.ForwardedFor = []byte("203.0.113.9,2001:db8::1")
	})},
	{"inbound GET, forwarded for an unknown client", story(request(flow.Inbound, flow.Completed), func(r *flow.Record) {
		r.HTTP.ForwardedFor = []byte("203.0.113.9, unknown")
	})},
	{"inbound GET of a path that a gateway rewrote", story(request(flow.Inbound, flow.Completed), func(r *flow.Record) {
		r.HTTP.Fields = [][]byte{[]byte("/original")}
	})},
	{"outbound GET", request(flow.Outbound, flow.Completed)},
	{"gRPC", story(request(flow.Inbound, flow.Completed), func(r *flow.Record) {
		r.Protocol = flow.HTTP2
		r.HTTP.Method, r.HTTP.Path = []byte("POST"), []byte("/a.Service/Call")
		r.HTTP.GRPC, r.HTTP.GRPCStatus = true, []byte("5")
		r.HTTP.Messages, r.HTTP.ResponseMessages = 1, 1
	})},
	{"TCP closed", connection(flow.Outbound, flow.Opaque, flow.Closed)},
	{"inbound TCP closed", connection(flow.Inbound, flow.Opaque, flow.Closed)},
	{"TLS", story(connection(flow.Outbound, flow.TLS, flow.Closed), func(r *flow.Record) {
		r.SetTLS(flow.Hello{ServerName: "outbound_.80_._.edition.example", ALPN: []string{"h2"}})
	})},
	{"TCP refused", story(connection(flow.Outbound, flow.Opaque, flow.UpstreamRefused), func(r *flow.Record) {
		r.UpstreamLocal, r.TransportFailure = netip.AddrPort{}, "delayed connect error: Connection refused"
	})},
	{"request refused", story(request(flow.Inbound, flow.UpstreamRefused), func(r *flow.Record) {
		r.UpstreamLocal, r.TransportFailure = netip.AddrPort{}, "delayed connect error: Connection refused"
		r.HTTP.Status, r.HTTP.Flags, r.HTTP.ServiceTime = 503, "UF", 0
		r.HTTP.Details = "upstream_reset_before_response_started{remote_connection_failure|delayed_connect_error:_Connection_refused}"
	})},
	{"loop", story(connection(flow.Outbound, flow.Opaque, flow.Loop), func(r *flow.Record) {
		r.OriginalDestination = netip.MustParseAddrPort("198.51.100.2:15001")
		r.Cluster = envoy.BlackHoleCluster
		r.UpstreamLocal = netip.AddrPort{}
		r.Received.Store(0)
		r.Sent.Store(0)
	})},
	{"denied by a policy", story(connection(flow.Inbound, flow.Opaque, flow.PolicyDenied), func(r *flow.Record) {
		r.Upstream, r.UpstreamLocal = netip.AddrPort{}, netip.AddrPort{}
		r.SetDenial("", envoy.DeniedByPolicy("ns[shop]-policy[p]-rule[0]"))
	})},
	{"denied by a server of external authorization", story(connection(flow.Inbound, flow.Opaque, flow.PolicyDenied), func(r *flow.Record) {
		r.Upstream, r.UpstreamLocal = netip.AddrPort{}, netip.AddrPort{}
		r.SetDenial("UAEX", "ext_authz_denied")
	})},
	{"a request denied by a policy", story(request(flow.Inbound, flow.PolicyDenied), func(r *flow.Record) {
		r.HTTP.Status, r.HTTP.ServiceTime, r.HTTP.Details = 403, 0, envoy.DeniedByPolicy("")
	})},
	{"not redirected", story(connection(flow.Inbound, flow.Opaque, flow.NoOriginalDestination), func(r *flow.Record) {
		r.OriginalDestination, r.Upstream, r.UpstreamLocal = netip.AddrPort{}, netip.AddrPort{}, netip.AddrPort{}
		r.Cluster = ""
	})},
	{"downstream left", story(request(flow.Inbound, flow.DownstreamLeft), func(r *flow.Record) {
		r.HTTP.Status, r.HTTP.ServiceTime, r.HTTP.Details = 0, 0, ""
	})},
	{"malformed", story(request(flow.Inbound, flow.BadFraming), func(r *flow.Record) {
		r.Upstream, r.UpstreamLocal = netip.AddrPort{}, netip.AddrPort{}
		r.Cluster, r.Route = "", ""
		r.HTTP = &flow.Request{Status: 400, Flags: "DPE", Details: "http1.codec_error"}
	})},
	{"tunnel", story(request(flow.Outbound, flow.Closed), func(r *flow.Record) {
		r.HTTP.Method, r.HTTP.Path, r.HTTP.Authority = []byte("CONNECT"), []byte("db.example:5432"), []byte("db.example:5432")
		r.HTTP.Upgraded = true
		r.Received.Store(70000)
	})},
	{"forged", story(request(flow.Inbound, flow.Completed), func(r *flow.Record) {
		r.HTTP.Path = []byte("/\" 200 - via\\upstream\r\n[2026-01-01T00:00:00.000Z] \x1b[31m\x00\x7f\xff\xfe")
		r.HTTP.UserAgent = []byte("gr\xc3\xbcn \xe2\x80\xa8 \xc2\x9b \xe2\x80\xae \xf0\x9f\x90\xbf")
		r.SetTLS(flow.Hello{ServerName: "a b\xc3\xbc\"\xff"})
		r.HTTP.ID = []byte("")
	})},
}

func mustParse(t testing.TB, parse func(string) (*Format, error), text string) *Format {
	t.Helper()
	f, err := parse(text)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// lineOf returns the line without its newline.
func lineOf(f *Format, r *flow.Record) string {
	var l line
	f.build(&l, r, r.Duration)
	return string(l.buf[:len(l.buf)-1])
}

// begin opens a log that is closed at the end of the test.
func begin(t testing.TB, c Config) *Log {
	t.Helper()
	if c.Format == nil {
		c.Format = mustParse(t, ParseFormat, "%REQ(:PATH)%")
	}
	l, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { end(l, nettest.Patience) })
	return l
}

func end(l *Log, within time.Duration) error {
	ctx, cancel := context.WithTimeoutCause(context.Background(), within, errors.New("time is up"))
	defer cancel()
	return l.Close(ctx)
}
