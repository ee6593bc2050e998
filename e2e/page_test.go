package e2e

import (
	"errors"
	"fmt"
	"math"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"os/exec"
	"strconv"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/live"
)

// pictures is the directory for screenshots of the page, if set; docs/page.png is one of them.
const pictures = "PILLION_PICTURES"

// A real browser opens the page. testdata/peers/page lists what it must find.
func TestPageInABrowser(t *testing.T) {
	const script = "testdata/peers/page"
	if _, err := os.Stat(script + "/node_modules"); err != nil {
		t.Fatalf("%v: make e2e fetches what the browser is driven with", err)
	}
	chromium, err := exec.LookPath("chromium")
	if err != nil {
		t.Fatalf("%v: make tools-test installs it", err)
	}
	stage := newPageStage()
	defer stage.view.Close()
	page := httptest.NewServer(stage.view.Handler(live.Sources{Table: stage.table, Gates: stage.gates}))
	defer page.Close()
	control := http.NewServeMux()
	control.HandleFunc("/busy", func(http.ResponseWriter, *http.Request) { stage.busy() })
	control.HandleFunc("/request", func(_ http.ResponseWriter, r *http.Request) {
		status, _ := strconv.Atoi(r.FormValue("status"))
		stage.request(stage.inbound, "GET", "shop.example", r.FormValue("path"), status, 3*time.Millisecond)
	})
	control.HandleFunc("/steady", func(http.ResponseWriter, *http.Request) {
		if os.Getenv(pictures) != "" {
			stage.steady(55 * time.Second)
		}
	})
	control.HandleFunc("/shut", func(http.ResponseWriter, *http.Request) { stage.shut.Store(!stage.shut.Load()) })
	control.HandleFunc("/cut", func(http.ResponseWriter, *http.Request) { page.CloseClientConnections() })
	controls := httptest.NewServer(control)
	defer controls.Close()

	kept := os.Getenv(pictures)
	if kept == "" {
		kept = t.TempDir()
	}
	cmd := exec.CommandContext(t.Context(), "node", "page.mjs", chromium, page.URL, controls.URL, kept)
	cmd.Dir = script
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
}

// pageStage creates the records of a shop's pod.
type pageStage struct {
	view                    *live.View
	table                   *flow.Table
	inbound, outbound, grpc *flow.Record
	callers                 []*flow.Record
	made                    int
	shut                    atomic.Bool
}

func newPageStage() *pageStage {
	s := &pageStage{view: live.New(live.Config{Version: "v0.0.0-test", Pod: "web-7c9", Namespace: "shop"})}
	s.table = flow.NewTable(s.view)
	return s
}

func (s *pageStage) gates() []live.Gate {
	gates := []live.Gate{{Name: "inbound", Open: true}, {Name: "outbound", Open: true}, {Name: "addresses", Open: true}}
	if s.shut.Load() {
		gates[2] = live.Gate{Name: "addresses", Why: "not listed yet"}
	}
	return gates
}

// connect opens a connection that stays.
func (s *pageStage) connect(direction flow.Direction, downstream, destination string, protocol flow.Protocol, hello flow.Hello, age time.Duration) *flow.Record {
	c := flow.Open(direction, netip.MustParseAddrPort(downstream))
	c.OriginalDestination = netip.MustParseAddrPort(destination)
	c.Upstream = c.OriginalDestination
	s.table.List(c)
	s.table.Carry(c, protocol, hello)
	c.Opened = c.Opened.Add(-age)
	return c
}

func (s *pageStage) request(c *flow.Record, method, authority, path string, status int, took time.Duration) {
	s.made++
	r := flow.Open(c.Direction, c.Downstream)
	r.Opened = r.Opened.Add(-took)
	r.Protocol, r.Connection, r.OriginalDestination, r.Upstream = c.Protocol, c, c.OriginalDestination, c.Upstream
	r.Received.Store(uint64(len(path)))
	r.Sent.Store(uint64(900 + s.made*137%5000))
	r.HTTP = &flow.Request{Method: []byte(method), Path: []byte(path), Authority: []byte(authority), Status: status, ServiceTime: took,
		ID: fmt.Appendf(nil, "5f0c6c1e-27d4-4f6e-9d0a-%012d", s.made), UserAgent: []byte("Mozilla/5.0")}
	reason := flow.Completed
	if status == 504 {
		reason = flow.RequestTimeout
	}
	r.Close(s.table, reason, nil)
	c.Received.Add(500)
	c.Sent.Add(r.Sent.Load() + 200)
}

func (s *pageStage) busy() {
	var inbound []*flow.Record
	for i := range 5 {
		c := s.connect(flow.Inbound, fmt.Sprintf("10.42.%d.%d:4%d112", i, 17+31*i, i), "10.42.0.9:8080", flow.HTTP11, flow.Hello{}, time.Duration(i*i*97)*time.Second)
		inbound = append(inbound, c)
	}
	s.inbound, s.callers = inbound[0], inbound
	grpc := s.connect(flow.Outbound, "10.42.0.9:51100", "10.96.12.40:9090", flow.HTTP2, flow.Hello{}, 3*time.Hour)
	s.grpc = grpc
	plain := s.connect(flow.Outbound, "10.42.0.9:51102", "10.96.3.3:80", flow.HTTP11, flow.Hello{}, 40*time.Second)
	s.outbound = plain
	database := s.connect(flow.Outbound, "10.42.0.9:51200", "10.96.44.2:5432", flow.Opaque, flow.Hello{}, 26*time.Hour)
	database.Received.Store(48 << 20)
	database.Sent.Store(912 << 20)
	payment := s.connect(flow.Outbound, "10.42.0.9:51300", "203.0.113.80:443", flow.TLS, flow.Hello{ServerName: "api.payments.example"}, 12*time.Second)
	payment.Received.Store(2100)
	payment.Sent.Store(6200)
	for i := range 60 {
		ms := time.Millisecond
		s.request(inbound[i*i%5], "GET", "shop.example", fmt.Sprintf("/products/%d?page=%d", 40+i*13%60, 1+i%3), 200, time.Duration(4+i*7%23)*ms)
		s.request(grpc, "POST", "inventory:9090", "/inventory.v1.Stock/Reserve", 200, time.Duration(1+i%4)*ms)
		if i%3 == 0 {
			s.request(plain, "GET", "prices.internal", fmt.Sprintf("/v2/prices?sku=%d", 1000+i), 200, time.Duration(9+i%9)*ms)
			s.request(inbound[1], "POST", "shop.example", "/cart/items", 201, time.Duration(14+i%9)*ms)
		}
		if i%20 == 7 {
			s.request(inbound[2], "POST", "shop.example", "/checkout", 503, 240*ms)
			s.request(plain, "GET", "prices.internal", "/v2/discounts/winter", 504, 2*time.Second)
		}
		if i%15 == 4 {
			s.request(inbound[3], "GET", "shop.example", "/favicon.ico", 404, 2*ms)
			dead := flow.Open(flow.Outbound, netip.MustParseAddrPort("10.42.0.9:52000"))
			dead.OriginalDestination = netip.MustParseAddrPort("10.96.7.7:6379")
			dead.Upstream, dead.TransportFailure = dead.OriginalDestination, "delayed_connect_error:_Connection_refused"
			dead.Close(s.table, flow.UpstreamRefused, errors.New("connection refused"))
			short := s.connect(flow.Outbound, "10.42.0.9:51301", "203.0.113.80:443", flow.TLS, flow.Hello{ServerName: "api.payments.example"}, 0)
			short.Received.Store(1800)
			short.Sent.Store(5400)
			short.Close(s.table, flow.Closed, nil)
		}
	}
}

// steady makes requests continuously, for realistic screenshots.
func (s *pageStage) steady(long time.Duration) {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for i := range int(long / (20 * time.Millisecond)) {
		<-tick.C
		wave := 3 + 2*math.Sin(float64(i)/110) + math.Sin(float64(i)/37)
		for j := range int(wave) {
			took := time.Duration(3+(i*7+j*5)%19) * time.Millisecond
			caller := s.callers[[...]int{0, 1, 0, 2, 0, 1, 3, 4, 0, 1}[(i+j)%10]]
			s.request(caller, "GET", "shop.example", fmt.Sprintf("/products/%d", 40+(i*13+j)%60), 200, took)
			if j%2 == 0 {
				s.request(s.grpc, "POST", "inventory:9090", "/inventory.v1.Stock/Reserve", 200, took/4)
			}
		}
		if i%5 == 0 {
			s.request(s.outbound, "GET", "prices.internal", fmt.Sprintf("/v2/prices?sku=%d", 1000+i), 200, 9*time.Millisecond)
		}
		if i%int(3+3*wave) == 0 {
			s.connect(flow.Outbound, fmt.Sprintf("10.42.0.9:%d", 20000+i), "203.0.113.80:443", flow.TLS, flow.Hello{ServerName: "api.payments.example"}, 0).Close(s.table, flow.Closed, nil)
			s.connect(flow.Inbound, fmt.Sprintf("10.42.1.48:%d", 20000+i), "10.42.0.9:9000", flow.Opaque, flow.Hello{}, 0).Close(s.table, flow.Closed, nil)
		}
		if i%150 == 40 {
			s.request(s.inbound, "POST", "shop.example", "/checkout", 503, 240*time.Millisecond)
		}
	}
}
