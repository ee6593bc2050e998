package live

import (
	"fmt"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/nettest"
)

func TestMain(m *testing.M) { os.Exit(nettest.Main(m)) }

var (
	client  = netip.MustParseAddrPort("198.51.100.2:4711")
	service = netip.MustParseAddrPort("203.0.113.7:80")
)

// open returns a connection that is carried.
func open(table *flow.Table, direction flow.Direction, protocol flow.Protocol) *flow.Record {
	c := flow.Open(direction, client)
	c.OriginalDestination, c.Upstream = service, service
	table.List(c)
	table.Carry(c, protocol, flow.Hello{})
	return c
}

// request returns a request with a complete response, as change modifies it.
func request(c *flow.Record, change func(*flow.Record)) *flow.Record {
	r := flow.Open(c.Direction, c.Downstream)
	r.Protocol, r.Connection, r.OriginalDestination, r.Upstream = c.Protocol, c, c.OriginalDestination, c.Upstream
	r.HTTP = &flow.Request{Method: []byte("GET"), Path: []byte("/a"), Authority: []byte("example.test"), Status: 200,
		ID: []byte("3f7b6f0e-0000-4000-8000-000000000000"), UserAgent: []byte("curl/7.88.1")}
	if change != nil {
		change(r)
	}
	return r
}

// ended closes a request as completed.
func ended(table *flow.Table, c *flow.Record, change func(*flow.Record)) {
	request(c, change).Close(table, flow.Completed, nil)
}

func BenchmarkClosed(b *testing.B) {
	for _, direction := range []flow.Direction{flow.Outbound, flow.Inbound} {
		b.Run(direction.String(), func(b *testing.B) {
			v := New(Config{})
			r := request(open(flow.NewTable(v), direction, flow.HTTP11), nil)
			r.Reason, r.Duration = flow.Completed, time.Millisecond
			b.ReportAllocs()
			for b.Loop() {
				v.Closed(r)
			}
		})
	}
}

func TestAClosedRecordDoesNotAllocate(t *testing.T) {
	v := New(Config{})
	table := flow.NewTable(v)
	c := open(table, flow.Inbound, flow.HTTP11)
	a := request(c, nil)
	b := request(c, func(r *flow.Record) { r.HTTP.Authority, r.HTTP.Status = []byte("Other.TEST:8080"), 503 })
	a.Reason, b.Reason = flow.Completed, flow.UpstreamRefused
	v.Closed(a)
	v.Closed(b)
	if n := testing.AllocsPerRun(1000, func() { v.Closed(a); v.Closed(b) }); n != 0 {
		t.Errorf("two requests allocate %v times", n)
	}
	opaque := open(table, flow.Outbound, flow.Opaque)
	opaque.Reason = flow.Closed
	if n := testing.AllocsPerRun(1000, func() { v.Closed(opaque) }); n != 0 {
		t.Errorf("a connection allocates %v times", n)
	}
}

// look returns a snapshot a little later, so that the seconds with traffic are whole ones.
func look(v *View, table *flow.Table) *Snapshot {
	v.started = v.started.Add(-5 * time.Second)
	return v.snapshot(&Sources{Table: table})
}

func find(t *testing.T, list []Destination, name string) Destination {
	t.Helper()
	for _, d := range list {
		if d.Name == name {
			return d
		}
	}
	t.Fatalf("no %q in %+v", name, list)
	return Destination{}
}

func TestRequestsAreCountedByHost(t *testing.T) {
	v := New(Config{Version: "v1"})
	table := flow.NewTable(v)
	c := open(table, flow.Outbound, flow.HTTP11)
	for range 3 {
		ended(table, c, func(r *flow.Record) { r.Received.Store(10); r.Sent.Store(90) })
	}
	ended(table, c, func(r *flow.Record) { r.HTTP.Authority = []byte("EXAMPLE.test") })
	ended(table, c, func(r *flow.Record) { r.HTTP.Authority = []byte("other.test:8080"); r.HTTP.Status = 503 })
	ended(table, c, func(r *flow.Record) { r.HTTP.Authority = []byte("<b>no host</b>") })
	ended(table, c, func(r *flow.Record) { r.HTTP.Authority = nil })
	s := look(v, table)
	if d := find(t, s.Destinations, "example.test"); d.Requests != 4 || d.Connections != 1 || d.Errors != 0 || d.Bytes != 300 || d.Direction != "outbound" {
		t.Errorf("example.test: %+v", d)
	}
	if d := find(t, s.Destinations, "other.test:8080"); d.Requests != 1 || d.Connections != 0 || d.Errors != 1 {
		t.Errorf("other.test:8080: %+v", d)
	}
	if d := find(t, s.Destinations, "203.0.113.7:80"); d.Requests != 2 {
		t.Errorf("without a host: %+v", d)
	}
	if len(s.Destinations) != 3 || s.Outbound.Requests != 7 || s.Outbound.Connections != 1 || s.Inbound.Flows != 0 || s.Version != "v1" {
		t.Errorf("%+v", s)
	}
	if s.Outbound.RequestsPerSecond != 1.4 { // seven in five seconds
		t.Errorf("%v requests per second, want 1.4", s.Outbound.RequestsPerSecond)
	}
	ended(table, c, func(r *flow.Record) { r.HTTP.GRPC, r.HTTP.GRPCStatus = true, []byte("5") })  // not found: the caller's
	ended(table, c, func(r *flow.Record) { r.HTTP.GRPC, r.HTTP.GRPCStatus = true, []byte("14") }) // unavailable
	if s := look(v, table); len(s.Reasons) != 2 || s.Reasons[1].Reason != "grpc_status" && s.Reasons[0].Reason != "grpc_status" {
		t.Errorf("reasons %+v", s.Reasons)
	}
	if len(s.Reasons) != 1 || s.Reasons[0].Reason != "status_5xx" || s.Reasons[0].Count != 1 || s.Reasons[0].Recent != 1 {
		t.Errorf("reasons %+v", s.Reasons)
	}
}

func TestEachConnectionIsCountedOnce(t *testing.T) {
	v := New(Config{})
	table := flow.NewTable(v)
	opaque := open(table, flow.Inbound, flow.Opaque)
	opaque.Received.Store(5)
	opaque.Close(table, flow.Closed, nil)
	refused := flow.Open(flow.Inbound, client) // never listed, never carried
	refused.Close(table, flow.NoOriginalDestination, nil)
	open(table, flow.Inbound, flow.HTTP2) // no request yet
	orphan := flow.Open(flow.Inbound, client)
	ended(table, orphan, nil) // a request on a connection that was never opened
	ended(table, orphan, nil)
	s := look(v, table)
	if s.Inbound.Connections != 4 || s.Inbound.Flows != 4 || s.Inbound.Requests != 2 || s.Inbound.Errors != 1 || s.Open != 1 {
		t.Errorf("inbound %+v, %d open", s.Inbound, s.Open)
	}
	if d := find(t, s.Destinations, unknownName); d.Connections != 1 || d.Errors != 1 {
		t.Errorf("unknown: %+v", d)
	}
	if p := find(t, s.Peers, "198.51.100.2"); p.Connections != 4 || p.Requests != 2 {
		t.Errorf("peer: %+v", p)
	}
}

func TestHostsOverTheBoundShareOneTally(t *testing.T) {
	v := New(Config{})
	table := flow.NewTable(v)
	c := open(table, flow.Inbound, flow.HTTP11)
	for i := range maxDestinations + 50 {
		ended(table, c, func(r *flow.Record) { r.HTTP.Authority = fmt.Appendf(nil, "h%d.test", i) })
	}
	ended(table, open(table, flow.Outbound, flow.HTTP11), nil) // its direction has a bound of its own
	s := look(v, table)
	if d := find(t, s.Destinations, otherName); d.Requests != 50 {
		t.Errorf("other: %+v", d)
	}
	if d := find(t, s.Destinations, "example.test"); d.Direction != "outbound" || len(s.Destinations) != maxDestinations+2 {
		t.Errorf("%d destinations, outbound %+v", len(s.Destinations), d)
	}
}

func TestHostsCannotTakeTheNamesOfSharedTallies(t *testing.T) {
	v := New(Config{})
	table := flow.NewTable(v)
	orphan := flow.Open(flow.Inbound, client) // its destination is unknown
	ended(table, orphan, func(r *flow.Record) { r.HTTP.Authority = nil })
	c := open(table, flow.Inbound, flow.HTTP11)
	hosts := []string{"other", "unknown", "(other)", "(unknown)"} // the last two are not host names and count by their address
	for _, host := range hosts {
		ended(table, orphan, func(r *flow.Record) { r.HTTP.Authority = []byte(host) })
	}
	for i := range maxDestinations {
		ended(table, c, func(r *flow.Record) { r.HTTP.Authority = fmt.Appendf(nil, "h%d.test", i) })
	}
	s := look(v, table)
	for name, requests := range map[string]uint64{"other": 1, "unknown": 1, otherName: 3, unknownName: 3} {
		if d := find(t, s.Destinations, name); d.Requests != requests {
			t.Errorf("%s has %d requests, want %d", name, d.Requests, requests)
		}
	}
}

func TestLatenciesAreExactToABucket(t *testing.T) {
	for d := time.Microsecond; d < time.Hour; d = d*17/16 + 1 {
		if b := bucket(d); d > 20*time.Microsecond && (middle(b) > d*107/100 || middle(b) < d*93/100) {
			t.Errorf("%v is in bucket %d, whose middle is %v", d, b, middle(b))
		}
	}
	for b := range buckets {
		if bucket(middle(b)) != b {
			t.Errorf("the middle of bucket %d is in bucket %d", b, bucket(middle(b)))
		}
	}
	if bucket(-1) != 0 || bucket(1<<62) != buckets-1 || bucket(0) != 0 {
		t.Error("a value out of range is not in the first or last bucket")
	}
	v := New(Config{})
	table := flow.NewTable(v)
	c := open(table, flow.Outbound, flow.HTTP11)
	for i := range 100 {
		r := request(c, nil)
		r.Opened = r.Opened.Add(-time.Duration(i+1) * time.Millisecond)
		r.Close(table, flow.Completed, nil)
	}
	s := look(v, table)
	for _, p := range []struct{ got, want float64 }{{s.Outbound.P50MS, 50}, {s.Outbound.P95MS, 95}, {s.Outbound.P99MS, 99}} {
		if p.got < p.want*0.9 || p.got > p.want*1.1 {
			t.Errorf("%+v", p)
		}
	}
}

func TestOldSecondsAndHalfMinutesDoNotCount(t *testing.T) {
	v := New(Config{})
	table := flow.NewTable(v)
	c := open(table, flow.Outbound, flow.HTTP11)
	ended(table, c, func(r *flow.Record) { r.HTTP.Status = 500 })
	v.started = v.started.Add(-2 * time.Minute)
	s := v.snapshot(&Sources{Table: table})
	if o := s.Outbound; o.Requests != 1 || o.RequestsPerSecond != 0 || o.P50MS != 0 || s.Reasons[0].Count != 1 || s.Reasons[0].Recent != 0 {
		t.Errorf("%+v %+v", o, s.Reasons)
	}
	for i, n := range s.Outbound.RequestsBySecond {
		if n != 0 {
			t.Errorf("second %d has %d", i, n)
		}
	}
	ended(table, c, nil) // whichever slot this uses, old counts are gone
	if s := look(v, table); s.Outbound.RequestsPerSecond != 0.1 {
		t.Errorf("%v per second", s.Outbound.RequestsPerSecond)
	}
}

func TestEachReasonIsCountedUnderItsName(t *testing.T) {
	for _, e := range flow.Explanations {
		v := New(Config{})
		table := flow.NewTable(v)
		flow.Open(flow.Outbound, netip.MustParseAddrPort("198.51.100.2:4711")).Close(table, e.Reason, nil)
		got := look(v, table).Reasons
		if e.Reason == flow.Completed || e.Reason == flow.Closed || e.Reason == flow.Drained {
			if len(got) != 0 {
				t.Errorf("%s counts as a failure: %+v", e.Reason, got)
			}
			continue
		}
		if len(got) != 1 || got[0].Reason != string(e.Reason) || got[0].Count != 1 || got[0].Recent != 1 {
			t.Errorf("%s is shown as %+v", e.Reason, got)
		}
	}
}
