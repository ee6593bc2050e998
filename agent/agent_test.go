package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pillion-proxy/pillion/internal/admin"
	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/nettest"
)

func TestMain(m *testing.M) { os.Exit(nettest.Main(m)) }

const patience = nettest.Patience

func TestValidateNamesTheField(t *testing.T) {
	valid := Default()
	valid.Log = slog.New(slog.DiscardHandler)
	if err := valid.Validate(); err != nil {
		t.Errorf("the default is not valid: %v", err)
	}
	for want, change := range map[string]func(*Config){
		"Ports.Outbound":               func(c *Config) { c.Ports.Outbound = 0 },
		"Ports.Inbound":                func(c *Config) { c.Ports.Inbound = c.Ports.Outbound },
		"Ports.Readiness":              func(c *Config) { c.Ports.Readiness = c.Ports.Inbound },
		"Connections.ConnectTimeout":   func(c *Config) { c.Connections.ConnectTimeout = -1 },
		"Connections.IdleTimeout":      func(c *Config) { c.Connections.IdleTimeout = -1 },
		"Connections.HalfCloseTimeout": func(c *Config) { c.Connections.HalfCloseTimeout = -1 },
		"Drain.Delay":                  func(c *Config) { c.Drain.Delay = c.Drain.Timeout + 1 },
		"Drain.Timeout":                func(c *Config) { c.Drain.Timeout = -1 },
		"Connections.Max":              func(c *Config) { c.Connections.Max = -1 },
		"AccessLog.Interval":           func(c *Config) { c.AccessLog.Interval = time.Nanosecond },
		"Interception.Mode":            func(c *Config) { c.Interception.Mode = "tproxy" },
		"Interception.TPROXYMark":      func(c *Config) { c.Interception.Mode, c.Interception.TPROXYMark = capture.TPROXY, capture.LoopMark },
		"Config.Log":                   func(c *Config) { c.Log = nil },
	} {
		config := valid
		change(&config)
		if err := config.Validate(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("want an error that names %s, got %v", want, err)
		}
		if _, err := New(config); err == nil {
			t.Errorf("New accepts an invalid configuration (%s)", want)
		}
	}
}

// syncBuffer is a log that can be read while it is written.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

func testConfig() (Config, *syncBuffer) {
	log := &syncBuffer{}
	config := Default()
	config.Drain.Delay = 0
	config.Log = slog.New(slog.NewTextHandler(log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	return config, log
}

// newIn makes an agent inside a namespace.
func newIn(t *testing.T, ns *nettest.Namespace, config Config) (*Agent, error) {
	t.Helper()
	var a *Agent
	return a, ns.Try(func() (err error) {
		a, err = New(config)
		return err
	})
}

func TestAPortInUseIsNamedAndAllIsClosed(t *testing.T) {
	nettest.RequireRoot(t)
	for _, c := range []struct{ field, address string }{
		{"Ports.Outbound", "127.0.0.1:15001"}, {"Ports.Outbound", "[::1]:15001"},
		{"Ports.Inbound", "0.0.0.0:15006"}, {"Ports.Inbound", "[::]:15006"}, {"Ports.Readiness", "0.0.0.0:15021"},
		{"Ports.Admin", "[::1]:15000"}, {"Ports.Metrics", "[::]:15090"}, {"Ports.Status", "0.0.0.0:15020"},
	} {
		ns := nettest.New(t, "taken")
		ns.Listen(t, "tcp", c.address)
		config, _ := testConfig()
		_, err := newIn(t, ns, config)
		if err == nil || !strings.Contains(err.Error(), c.field) || !strings.Contains(err.Error(), "in use") {
			t.Errorf("with %s taken: %v; want an error that names %s", c.address, err, c.field)
		}
		// The ports that New opened before must be free again; otherwise the error would name an earlier field.
		if _, again := newIn(t, ns, config); again == nil || again.Error() != err.Error() {
			t.Errorf("a second try: %v, the first: %v", again, err)
		}
	}
}

func TestANamespaceWithoutIPv6IsServedOverIPv4(t *testing.T) {
	nettest.RequireRoot(t)
	ns := nettest.New(t, "v4")
	ns.Do(t, func() error { return os.WriteFile("/proc/sys/net/ipv6/conf/all/disable_ipv6", []byte("1"), 0) })
	config, log := testConfig()
	a, err := newIn(t, ns, config)
	if err != nil {
		t.Fatal(err)
	}
	run(t, ns, a)
	if !strings.Contains(log.String(), "no IPv6") {
		t.Errorf("the log does not mention IPv6:\n%s", log)
	}
	// The sysctl removes the addresses, but :: can still be bound.
	want := []string{"virtualOutbound::127.0.0.1:15001", "virtualInbound::0.0.0.0:15006", "virtualInbound::[::]:15006",
		"readiness::0.0.0.0:15021", "readiness::[::]:15021", "status::0.0.0.0:15020", "status::[::]:15020",
		"metrics::0.0.0.0:15090", "metrics::[::]:15090"}
	if listeners := strings.Fields(get(t, ns, "127.0.0.1:15000", "/listeners")); !slices.Equal(listeners, want) {
		t.Errorf("listeners %v, want %v", listeners, want)
	}
}

func TestBoundAddressesAreListed(t *testing.T) {
	nettest.RequireRoot(t)
	ns := nettest.New(t, "shown")
	config, _ := testConfig()
	config.Ports.Status = 0
	a, err := newIn(t, ns, config)
	if err != nil {
		t.Fatal(err)
	}
	run(t, ns, a)
	want := []string{"virtualOutbound::127.0.0.1:15001", "virtualOutbound::[::1]:15001", "virtualInbound::0.0.0.0:15006",
		"virtualInbound::[::]:15006", "readiness::0.0.0.0:15021", "readiness::[::]:15021", "metrics::0.0.0.0:15090", "metrics::[::]:15090"}
	if listeners := strings.Fields(get(t, ns, "[::1]:15000", "/listeners")); !slices.Equal(listeners, want) {
		t.Errorf("listeners %v, want %v", listeners, want)
	}
}

func TestOptionalPortsSetToZeroAreNotServed(t *testing.T) {
	nettest.RequireRoot(t)
	optional := []struct {
		port uint16
		off  func(*Ports)
	}{
		{15020, func(p *Ports) { p.Status = 0 }}, {15090, func(p *Ports) { p.Metrics = 0 }}, {15000, func(p *Ports) { p.Admin = 0 }},
	}
	for off := range 1 << len(optional) {
		ns := nettest.New(t, "optional")
		config, log := testConfig()
		config.AccessLog.Path = "off"
		for i, o := range optional {
			if off>>i&1 != 0 {
				o.off(&config.Ports)
			}
		}
		a, err := newIn(t, ns, config)
		if err != nil {
			t.Fatalf("%+v: %v", config.Ports, err)
		}
		stop := run(t, ns, a)
		for i, o := range optional {
			conn, err := ns.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", o.port), patience)
			if err == nil {
				conn.Close()
			}
			if isOff := off>>i&1 != 0; isOff != errors.Is(err, syscall.ECONNREFUSED) {
				t.Errorf("%+v: dialling %d: %v", config.Ports, o.port, err)
			}
		}
		// A record passes the sinks that are left: this connection is refused, as no rule redirected it.
		if conn, err := ns.Dial("tcp", "127.0.0.1:15001", patience); err == nil {
			conn.Close()
		}
		nettest.Eventually(t, "the refusal in the log", func() bool { return strings.Contains(log.String(), "no_original_destination") })
		a.ReopenLogs()
		if err := stop(); err != nil {
			t.Errorf("%+v: Run: %v", config.Ports, err)
		}
	}
}

// get returns the body of the response of the agent in the namespace.
func get(t *testing.T, ns *nettest.Namespace, address, path string) string {
	t.Helper()
	conn, err := ns.Dial("tcp", address, patience)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(patience))
	fmt.Fprintf(conn, "GET %s HTTP/1.0\r\nHost: localhost\r\n\r\n", path)
	answer, err := io.ReadAll(conn)
	if err != nil {
		t.Fatal(err)
	}
	_, body, _ := strings.Cut(string(answer), "\r\n\r\n")
	return body
}

// run starts the agent and waits until it is ready. The returned function drains it and returns the result of Run.
func run(t *testing.T, ns *nettest.Namespace, a *Agent) (stop func() error) {
	t.Helper()
	drain, startDrain := context.WithCancel(context.Background())
	result := make(chan error, 1)
	go func() { result <- a.Run(drain, context.Background()) }()
	stop = sync.OnceValue(func() error {
		startDrain()
		return <-result
	})
	t.Cleanup(func() { stop() })
	if code, body := ready(t, ns); code != http.StatusOK {
		t.Fatalf("not ready: %d %s", code, body)
	}
	return stop
}

// ready returns the status and body of the agent's readiness.
func ready(t *testing.T, ns *nettest.Namespace) (int, string) {
	t.Helper()
	conn, err := ns.Dial("tcp", "127.0.0.1:15021", patience)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(patience))
	io.WriteString(conn, "GET /healthz/ready HTTP/1.0\r\n\r\n")
	answer, err := io.ReadAll(conn)
	if err != nil {
		t.Fatal(err)
	}
	head, body, _ := strings.Cut(string(answer), "\r\n\r\n")
	switch {
	case strings.Contains(head, " 200 "):
		return 200, body
	case strings.Contains(head, " 503 "):
		return 503, body
	}
	t.Fatalf("answer: %q", answer)
	return 0, ""
}

func TestDirectConnectionsAreRefusedWithAReason(t *testing.T) {
	nettest.RequireRoot(t)
	ns := nettest.New(t, "direct") // no rules, so no connection tracking
	config, log := testConfig()
	a, err := newIn(t, ns, config)
	if err != nil {
		t.Fatal(err)
	}
	stop := run(t, ns, a)
	for _, address := range []string{"127.0.0.1:15001", "127.0.0.1:15006", "[::1]:15001", "[::1]:15006"} {
		conn, err := ns.Dial("tcp", address, patience)
		if errors.Is(err, syscall.ECONNRESET) {
			continue // the reset came before the dial returned
		}
		if err != nil {
			t.Fatal(err)
		}
		conn.SetDeadline(time.Now().Add(patience))
		if n, err := conn.Read(make([]byte, 1)); n != 0 || err == nil || errors.Is(err, io.EOF) || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%s: read %d, %v; want a reset", address, n, err)
		}
		conn.Close()
	}
	if err := stop(); err != nil {
		t.Errorf("Run: %v", err)
	}
	if !strings.Contains(log.String(), "reason=no_original_destination") {
		t.Errorf("the reason is not in the log:\n%s", log)
	}
}

func TestTheDrainGateClosesFirst(t *testing.T) {
	nettest.RequireRoot(t)
	ns := nettest.New(t, "drain")
	config, _ := testConfig()
	config.Drain.Delay = config.Drain.Timeout // ended by force
	a, err := newIn(t, ns, config)
	if err != nil {
		t.Fatal(err)
	}
	drain, startDrain := context.WithCancel(context.Background())
	force, startForce := context.WithCancel(context.Background())
	result := make(chan error, 1)
	go func() { result <- a.Run(drain, force) }()
	if code, body := ready(t, ns); code != 200 {
		t.Errorf("before: %d %s", code, body)
	}
	startDrain()
	nettest.Eventually(t, "the drain to begin", a.draining.Load)
	if code, body := ready(t, ns); code != 503 || body != "not ready\ndrain: shutting down\n" {
		t.Errorf("during the drain: %d %q", code, body)
	}
	startForce()
	if err := <-result; err != nil {
		t.Errorf("Run: %v, without connections to cut", err)
	}
}

func TestRefusalsAreLoggedOnceASecondForEachReason(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out bytes.Buffer
		log := &flowLog{log: slog.New(slog.NewTextHandler(&out, nil)), level: slog.LevelInfo}
		refuse := func(reason flow.Reason) {
			flow.Open(flow.Inbound, netip.MustParseAddrPort("198.51.100.1:4711")).Close(log, reason, nil)
		}
		for range 1000 {
			refuse(flow.Loop)
		}
		refuse(flow.ForeignAddress)
		flow.Open(flow.Inbound, netip.AddrPort{}).Close(log, flow.Closed, nil) // debug only
		if n := strings.Count(out.String(), "\n"); n != 2 {
			t.Errorf("%d lines, want one for each of two reasons:\n%s", n, &out)
		}
		time.Sleep(refusalPeriod)
		refuse(flow.Loop)
		if !strings.Contains(out.String(), "not_logged_before=999") {
			t.Errorf("the refusals that were not logged are not counted:\n%s", &out)
		}
	})
}

// The last scrape covers the whole drain. It arrives when the access log is being closed or closed already.
func TestThePortsAnswerWhileAndAfterTheAccessLogIsClosed(t *testing.T) {
	nettest.RequireRoot(t)
	config, _ := testConfig()
	config.AccessLog.Path = t.TempDir() + "/access.log"
	a, err := newIn(t, nettest.New(t, "late"), config)
	if err != nil {
		t.Fatal(err)
	}
	defer a.close()
	closed := make(chan error, 1)
	go func() { closed <- a.telling.close() }()
	for last := false; !last; {
		select {
		case err := <-closed:
			if last = true; err != nil {
				t.Error(err)
			}
		default:
		}
		if err := a.writeMetrics(io.Discard); err != nil {
			t.Error(err)
		}
		a.ReopenLogs()
	}
}

func TestInvalidValuesOfTheInjectorAreNamedAndAllIsClosed(t *testing.T) {
	for want, change := range map[string]func(*Config){
		"Workload.Probers": func(c *Config) { c.Workload.Probers = "{" },
		"Workload.Pod.IP":  func(c *Config) { c.Workload.Probers = `{"/app-health/a/livez":{"tcpSocket":{"port":1}}}` },
		"Workload.ScrapeTargets: port 15021 is the agent's own": func(c *Config) { c.Workload.ScrapeTargets = `{"scrape":"true","port":"15021"}` },
		"AccessLog.Path": func(c *Config) { c.AccessLog.Path = t.TempDir() },
	} {
		config, _ := testConfig()
		change(&config)
		if _, err := New(config); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("want an error that names %s, got %v", want, err)
		}
	}
}

func TestAnOrderToQuitEndsARunAtOnceAlsoInADrain(t *testing.T) {
	nettest.RequireRoot(t)
	for _, draining := range []bool{false, true} {
		config, _ := testConfig()
		config.Drain.Delay, config.Drain.Timeout = time.Hour, time.Hour
		a, err := newIn(t, nettest.New(t, "quit"), config)
		if err != nil {
			t.Fatal(err)
		}
		drain, startDrain := context.WithCancel(t.Context())
		result := make(chan error, 1)
		go func() { result <- a.Run(drain, context.Background()) }()
		if draining {
			startDrain()
			nettest.Eventually(t, "the drain to begin", a.draining.Load)
		}
		var orders sync.WaitGroup
		for range 3 { // the order may come more than once
			orders.Go(a.quit)
		}
		a.drainListeners(admin.DrainOrder{Graceful: true})
		if err := <-result; err != nil {
			t.Errorf("draining %v: Run returns %v", draining, err)
		}
		orders.Wait()
		startDrain()
	}
}

func TestTheStateIsDrainingAfterHealthcheckFail(t *testing.T) {
	a := new(Agent)
	a.failedByHand.Store(true)
	if state, ok := a.state(); state != "DRAINING" || ok {
		t.Errorf("%s, %v; want Envoy's DRAINING, false", state, ok)
	}
}
