package agent

import (
	"context"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/internal/dns"
	"github.com/pillion-proxy/pillion/internal/export"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/istiod"
	"github.com/pillion-proxy/pillion/internal/live"
	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/internal/tracing"
)

// newTelling makes the sinks of the default agent, with an access log in a file.
func newTelling(t testing.TB) *telling {
	t.Helper()
	config, _ := testConfig()
	config.Log = slog.New(slog.DiscardHandler)
	config.AccessLog.Path, config.AccessLog.Interval = t.TempDir()+"/access.log", time.Nanosecond
	a := &Agent{config: config, log: config.Log}
	if err := a.tell(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := a.telling.close(); err != nil {
			t.Error(err)
		}
	})
	return &a.telling
}

// beginCarried lists a connection in the table.
func beginCarried(table *flow.Table, direction flow.Direction, protocol flow.Protocol) *flow.Record {
	c := flow.Open(direction, netip.MustParseAddrPort("198.51.100.2:4711"))
	c.OriginalDestination = netip.MustParseAddrPort("192.0.2.7:8080")
	table.List(c)
	table.Carry(c, protocol, flow.Hello{})
	return c
}

var (
	method, path, authority = []byte("GET"), []byte("/catalogue/items?page=2"), []byte("catalogue.shop.svc:8080")
	requestID               = []byte("3f7b6f0e-0000-4000-8000-000000000000")
	agentName               = []byte("curl/7.88.1")
)

// request makes r a completed request, in memory that is reused, as the engines do.
func request(r *flow.Record, c *flow.Record) {
	h := r.HTTP
	if h == nil {
		h = new(flow.Request)
	}
	*h = flow.Request{Method: method, Path: path, Authority: authority, ID: requestID, UserAgent: agentName,
		Status: 200, Details: "via_upstream", ServiceTime: 1_000_000}
	*r = flow.Record{
		Direction: c.Direction, Protocol: c.Protocol, Opened: c.Opened, Connection: c,
		Downstream: c.Downstream, OriginalDestination: c.OriginalDestination,
		Upstream: c.OriginalDestination, UpstreamLocal: netip.AddrPortFrom(c.OriginalDestination.Addr(), 40001), HTTP: h,
	}
	r.Sent.Store(615)
}

// The budget of all sinks is a microsecond for each request.
func BenchmarkARequestIsReported(b *testing.B) {
	t := newTelling(b)
	c := beginCarried(t.table, flow.Inbound, flow.HTTP11)
	defer t.table.Leave(c)
	r := new(flow.Record)
	b.ReportAllocs()
	for b.Loop() {
		request(r, c)
		r.Close(t.table, flow.Completed, nil)
	}
}

// A line is late by a few percent of the interval at most, and a long interval causes few scans.
func TestScansAreAsFrequentAsTheIntervalRequires(t *testing.T) {
	for interval := minInterval; interval < 1000*time.Hour; interval = interval*3/2 + 1 {
		every := lookEvery(interval)
		if every > max(interval/20, minInterval) || every < interval/50 || every < minInterval {
			t.Errorf("with an interval of %v, a scan every %v", interval, every)
		}
	}
}

// For the race detector: connections open and close while all views are read.
func TestViewsAreReadWhileTrafficFlows(t *testing.T) {
	sinks := newTelling(t)
	looking := sinks.live.Handler(live.Sources{Table: sinks.table})
	ctx, stop := context.WithCancel(t.Context())
	var looks, traffic sync.WaitGroup
	repeat := func(look func()) {
		looks.Go(func() {
			for ctx.Err() == nil {
				look()
			}
		})
	}
	ask := func(path string) {
		looking.ServeHTTP(httptest.NewRecorder(), httptest.NewRequestWithContext(ctx, http.MethodGet, "http://localhost"+path, nil))
	}
	repeat(func() { _ = sinks.metrics.Write(io.Discard, false) })
	repeat(func() { ask("/live") })
	repeat(func() { ask("/live/records") })
	repeat(func() { ask("/live/tap?n=3") })
	repeat(func() { sinks.access.Reopen() })
	repeat(func() { sinks.access.Progress(sinks.table) })
	for i := range 4 {
		traffic.Go(func() {
			r := new(flow.Record)
			for range 300 {
				c := beginCarried(sinks.table, flow.Direction(i%2), flow.HTTP2)
				for range 3 {
					request(r, c)
					r.Close(sinks.table, flow.Completed, nil)
				}
				sinks.table.Leave(c)
				c = beginCarried(sinks.table, flow.Direction(i%2), flow.Opaque)
				c.Received.Add(100)
				c.Close(sinks.table, flow.Closed, nil)
			}
		})
	}
	traffic.Wait()
	stop()
	looks.Wait()
	if open := sinks.table.Open(); open != 0 {
		t.Errorf("%d connections are still listed", open)
	}
	// How many lines the queue accepts depends on the machine, but each is counted as written or dropped. Progress adds lines.
	_ = sinks.access.Close(t.Context())
	if lines := sinks.access.Written() + sinks.access.Dropped(); lines < 4*300*4 {
		t.Errorf("%d lines were written or counted as dropped, want at least %d", lines, 4*300*4)
	}
}

func TestEnginesCopyOnlyTheFieldsThatTheAccessLogPrints(t *testing.T) {
	config, _ := testConfig()
	config.AccessLog.Format, config.AccessLog.Path = "%REQ(X-ONE)% %RESP(X-TWO)%\n", t.TempDir()+"/access.log"
	fields := func() flow.Fields {
		a := &Agent{config: config, log: config.Log}
		if err := a.tell(); err != nil {
			t.Fatal(err)
		}
		defer a.telling.close()
		return a.telling.noted.Load()
	}
	if got := fields(); !slices.Equal(got.Request, []string{"x-one"}) || !slices.Equal(got.Response, []string{"x-two"}) {
		t.Errorf("fields %+v, want those of the format", got)
	}
	config.AccessLog.Path = "off"
	if got := fields(); len(got.Request)+len(got.Response) != 0 {
		t.Errorf("fields %+v without an access log, want no fields", got)
	}
}

// With a control plane its logs are followed, unless a flag asks for the agent's own log.
func TestFlagsDecideWhetherTheControlPlanesAccessLogsAreFollowed(t *testing.T) {
	path := t.TempDir() + "/access.log"
	for name, c := range map[string]struct {
		change  func(*AccessLog)
		plane   bool
		own     bool
		planned bool
	}{
		"no control plane":         {func(c *AccessLog) { c.Path = path }, false, true, false},
		"off":                      {func(c *AccessLog) { c.Path = "off" }, false, false, false},
		"control plane":            {func(*AccessLog) {}, true, false, true},
		"control plane, off":       {func(c *AccessLog) { c.Path = "off" }, true, false, false},
		"control plane and path":   {func(c *AccessLog) { c.Path = path }, true, true, false},
		"control plane and filter": {func(c *AccessLog) { c.Filter = "errors" }, true, true, false},
		"control plane and format": {func(c *AccessLog) { c.Format = "%PROTOCOL%" }, true, true, false},
	} {
		config, _ := testConfig()
		config.AccessLog = AccessLog{Encoding: "text"}
		c.change(&config.AccessLog)
		if c.plane {
			config.ControlPlane.Pod = &istiod.Pod{}
		}
		a := &Agent{config: config, log: config.Log}
		if err := a.tell(); err != nil {
			t.Fatal(err)
		}
		if own, planned := a.telling.access != nil, a.telling.planned != nil; own != c.own || planned != c.planned {
			t.Errorf("%s: a log of its own %v, those of the control plane %v", name, own, planned)
		}
		a.telling.close()
	}
}

func TestOpenConnectionsGetALineInEachInterval(t *testing.T) {
	config, _ := testConfig()
	config.AccessLog.Path, config.AccessLog.Interval = filepath.Join(t.TempDir(), "access.log"), minInterval
	a := &Agent{config: config, log: config.Log}
	if err := a.tell(); err != nil {
		t.Fatal(err)
	}
	a.telling.watch(a)
	c := beginCarried(a.telling.table, flow.Outbound, flow.Opaque)
	nettest.Eventually(t, "two lines about an open connection", func() bool { return a.telling.access.Written() >= 2 })
	c.Close(a.telling.table, flow.Closed, nil)
	if err := a.telling.close(); err != nil {
		t.Error(err)
	}
	if err := a.telling.close(); err != nil {
		t.Errorf("a second close: %v", err)
	}
}

func TestDebugLinesOfRequestsAndQueries(t *testing.T) {
	config, log := testConfig()
	a := &Agent{config: config, log: config.Log}
	sink := &flowLog{log: config.Log, level: slog.LevelDebug}
	c := flow.Open(flow.Inbound, netip.MustParseAddrPort("198.51.100.2:4711"))
	r := new(flow.Record)
	request(r, c)
	r.HTTP.GRPC, r.HTTP.GRPCStatus = true, []byte("14")
	r.Close(flow.NewTable(sink), flow.Completed, nil)
	a.resolved(dns.Query{Name: "example.", Type: "A", Rcode: "NXDOMAIN", Transport: "udp", Duration: 1500 * time.Microsecond, Cached: true})
	for _, want := range []string{
		"msg=request direction=inbound", "method=GET", "path=\"/catalogue/items?page=2\"", "status=200", "grpc_status=14",
		"msg=query name=example. type=A rcode=NXDOMAIN transport=udp upstream=- duration=1.5ms mesh=false cached=true joined=false truncated=false",
	} {
		if !strings.Contains(log.String(), want) {
			t.Errorf("the log does not have %q:\n%s", want, log)
		}
	}
	config.Log = slog.New(slog.NewTextHandler(log, nil)) // from info upwards
	before := log.String()
	a = &Agent{config: config, log: config.Log}
	a.resolved(dns.Query{Name: "example."})
	if log.String() != before {
		t.Errorf("a query is logged above debug level:\n%s", log)
	}
}

func TestPortRangesAreShownAsPairs(t *testing.T) {
	for _, c := range []struct {
		ports capture.Ports
		want  [][2]uint16
	}{
		{capture.Ports{}, nil},
		{capture.Ports{All: true}, [][2]uint16{{1, 65535}}},
		{capture.Ports{List: []capture.PortRange{{First: 80, Last: 80}, {First: 5000, Last: 5010}}}, [][2]uint16{{80, 80}, {5000, 5010}}},
	} {
		if got := ranges(c.ports); !slices.Equal(got, c.want) {
			t.Errorf("%+v: %v, want %v", c.ports, got, c.want)
		}
	}
}

// lateReceiver is a receiver of spans that answers when a file is closed.
type lateReceiver string

func (l lateReceiver) Close(context.Context) {}

func (l lateReceiver) Send(ctx context.Context, _ []byte) ([]byte, error) {
	nettest.Within(nettest.Patience, func() bool {
		open := false
		descriptors, _ := os.ReadDir("/proc/self/fd")
		for _, d := range descriptors {
			target, _ := os.Readlink("/proc/self/fd/" + d.Name())
			open = open || target == string(l)
		}
		return !open || ctx.Err() != nil
	})
	return nil, ctx.Err()
}

// A receiver of spans that hangs takes no time from the access log at the end.
func TestSpansAndTheAccessLogAreFlushedAtTheSameTime(t *testing.T) {
	path := t.TempDir() + "/access.log"
	log, err := AccessLog{Path: path, Encoding: textEncoding}.open(Config{Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	tell := &telling{access: log}
	e := export.New(export.Config{Sender: lateReceiver(path), Counts: &tell.spans.counts, Log: slog.New(slog.DiscardHandler),
		Field: export.OTLPItem, Delay: time.Hour, CloseTime: nettest.Patience})
	e.Add([]byte{})
	tell.spans.policy = &tracing.Policy{Exporter: e}
	ctx, cancel := context.WithTimeout(t.Context(), nettest.Patience)
	defer cancel()
	if err := tell.flush(ctx); err != nil {
		t.Error(err)
	}
	if exported, _, _ := tell.spans.counted(); exported != 1 {
		t.Error("the access log is open until the receiver of spans has answered")
	}
}
