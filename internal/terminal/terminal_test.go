package terminal_test

import (
	"bytes"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	"github.com/pillion-proxy/pillion/internal/live"
	"github.com/pillion-proxy/pillion/internal/terminal"
)

func TestRecordsInColumnsAndColour(t *testing.T) {
	at := time.Date(2026, 1, 2, 3, 4, 5, 6e6, time.Local)
	for want, r := range map[string]live.Record{
		"\x1b[2m03:04:05.006\x1b[0m outbound \x1b[32m200\x1b[0m   1.5ms     9B api.test                     GET /a": {
			Time: at, Direction: "outbound", Request: true, Method: "GET", Path: "/a", Authority: "api.test", Status: 200, DurationMS: 1.5, Sent: 9},
		"\x1b[2m03:04:05.006\x1b[0m inbound  \x1b[31m-  \x1b[0m    2.0s     0B a-host-with-a-name-that-is-… opaque \x1b[31mupstream_reset UC\x1b[0m": {
			Time: at, Direction: "inbound", Protocol: "opaque", Destination: "a-host-with-a-name-that-is-long", DurationMS: 2000, Failed: true,
			Reason: "upstream_reset", Flags: "UC"},
	} {
		if got := terminal.Record(&r, true, true, 0); got != want {
			t.Errorf("got  %q\nwant %q", got, want)
		}
	}
	if bool(terminal.NewPainter(&bytes.Buffer{})) || terminal.IsTerminal(&bytes.Buffer{}) {
		t.Error("a buffer counts as a terminal")
	}
	null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	if terminal.IsTerminal(null) {
		t.Error(os.DevNull + " counts as a terminal")
	}
}

func TestRecordsWithoutColumns(t *testing.T) {
	r := live.Record{Time: time.Date(2026, 1, 2, 3, 4, 5, 6e6, time.Local), Direction: "inbound", Request: true,
		Method: "GET", Path: "/\x1b[2J", Authority: "api.test", Status: 404, DurationMS: 12, Received: 100, Sent: 2000}
	const want = "03:04:05.006 inbound 404 12ms 2.1K api.test GET /\uFFFD[2J"
	if got := terminal.Record(&r, false, false, 0); got != want {
		t.Errorf("got  %q\nwant %q", got, want)
	}
}

// The explanation of a denial is indented, and cannot control the terminal.
func TestPoliciesAreIndented(t *testing.T) {
	for policies, want := range map[string]string{"": "", "a": "\n    a", "a \x1b[2J\nb": "\n    a \uFFFD[2J\n    b"} {
		if got := terminal.Policies(&live.Record{Policies: policies}); got != want {
			t.Errorf("%q: %q, want %q", policies, got, want)
		}
	}
}

// Numbers take at most seven columns, with three significant digits where there is room.
func TestNumbersAreShort(t *testing.T) {
	for bytes, want := range map[uint64]string{0: "0B", 999: "999B", 1000: "1.0K", 100 << 10: "100K", 1023 << 10: "1.0M", 5 << 40: "5.0T"} {
		r := live.Record{Sent: bytes, DurationMS: 1}
		if got := strings.Fields(terminal.Record(&r, false, false, 0)); got[3] != want {
			t.Errorf("%d bytes: %q, want %q", bytes, got, want)
		}
	}
	for ms, want := range map[float64]string{0: "-", 0.069: "0.07ms", 1: "1.0ms", 10: "10ms", 999.4: "999ms", 1000: "1.0s", 60e3: "60.0s"} {
		r := live.Record{DurationMS: ms}
		if got := strings.Fields(terminal.Record(&r, false, false, 0)); got[2] != want {
			t.Errorf("%v ms: %q, want %q", ms, got, want)
		}
	}
}

func TestStatusIsOneScreen(t *testing.T) {
	s := &live.Snapshot{
		Version: "v1.2.3", Pod: "web-1", Namespace: "shop", UptimeSeconds: 3723.4, Open: 12,
		Gates:    []live.Gate{{Name: "inbound", Open: true}, {Name: "addresses", Why: "not listed yet"}},
		Inbound:  live.Totals{Counts: live.Counts{Requests: 4711, Connections: 31, Flows: 4712, RequestsPerSecond: 120.4, FlowsPerSecond: 120.4, P50MS: 2.2, P99MS: 31, ConnectionsPerSecond: 0.3}},
		Outbound: live.Totals{Counts: live.Counts{Requests: 90, Connections: 4, Flows: 90, RequestsPerSecond: 8, FlowsPerSecond: 8, ErrorsPerSecond: 2, Errors: 41}},
		Reasons:  []live.Reason{{Reason: "upstream_refused", Text: "Nothing listens there.", Count: 40}, {Reason: "status_5xx", Text: "Upstream failed.", Count: 1}},
	}
	const want = `pillion      v1.2.3, pod shop/web-1, up 1h2m3s
ready        no
             addresses: not listed yet
connections  12 open; 31 in, 4 out in total; new per second: 0.3 in, 0 out
requests     4711 in, 90 out in total; per second: 120 in, 8.0 out
latency      in 2.2ms p50, 31ms p99; out - p50, - p99
errors       41 of 4802 that ended; now 1.6%, 2.0 per second
                 40 upstream_refused: Nothing listens there.
                  1 status_5xx: Upstream failed.
`
	if got := terminal.Status(s, false); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

func TestStatusShowsTheControlPlane(t *testing.T) {
	s := &live.Snapshot{Version: "v1", Ready: true, ControlPlane: &live.ControlPlane{
		Address: "istiod.istio-system.svc:15012", Server: "istiod-1 1.32.0", Connected: true, SinceSeconds: 3723, Configured: true, PushAgeSeconds: 12,
		Types: []live.PushType{
			{Type: "CDS", Resources: 40, Version: "2026/7"}, {Type: "EDS", Resources: 30, Version: "2026/6"},
			{Type: "LDS", Resources: 21, Version: "2026/7", Rejected: 1, Error: "virtualInbound: \x1b[2J"}, {Type: "NDS", Resources: 1},
		},
		SecurityFindings: 1, Unenforced: 4, TrafficFindings: 2, CosmeticFindings: 3, Unbound: []string{"0.0.0.0_80: permission denied"},
		Identity: &live.Identity{Source: "CA", SPIFFE: "spiffe://cluster.local/ns/shop/sa/web", ExpiresSeconds: 7200, Renewals: 2, Failures: 1, Why: "no route", Problems: []string{"revocation lists: a", "b"}},
	}}
	plane := func() string {
		_, rest, _ := strings.Cut(terminal.Status(s, false), "yes\n")
		text, _, _ := strings.Cut(rest, "connections ")
		return text
	}
	const connected = `istiod       istiod.istio-system.svc:15012 (istiod-1 1.32.0), connected for 1h2m3s
             40 CDS, 30 EDS, 21 LDS, 1 NDS; the last push was 12s ago
             version 2026/7 of CDS, LDS; version 2026/6 of EDS
             LDS rejected: virtualInbound: �[2J
findings     1 security, 4 unenforced, 2 traffic, 3 cosmetic
             not accepting: 0.0.0.0_80: permission denied
identity     spiffe://cluster.local/ns/shop/sa/web, expires in 2h0m0s, 2 received from the CA
             not renewed: no route
             revocation lists: a
             b
`
	if got := plane(); got != strings.ReplaceAll(connected, `�`, "\uFFFD") {
		t.Errorf("got\n%s\nwant\n%s", got, connected)
	}
	s.ControlPlane = &live.ControlPlane{Address: "istiod:15012", SinceSeconds: 5, Why: "connection refused", Identity: &live.Identity{Source: "CA", Why: "no token"}}
	const lost = "istiod       istiod:15012, not connected for 5s: connection refused\nidentity     none yet from the CA: no token\n"
	if got := plane(); got != lost {
		t.Errorf("got\n%s\nwant\n%s", got, lost)
	}
	s.ControlPlane = &live.ControlPlane{Address: "istiod:15012", Identity: &live.Identity{Source: "CA", SPIFFE: "spiffe://a/b", ExpiresSeconds: -60}}
	if got, want := plane(), "istiod       istiod:15012, connecting\nidentity     spiffe://a/b, expired 1m0s ago\n"; got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

// busy is the state of an agent with a number of destinations.
func busy(destinations int) *live.Snapshot {
	s := &live.Snapshot{Version: "v1.2.3", UptimeSeconds: 61, Open: 3}
	s.Inbound.Counts = live.Counts{FlowsPerSecond: 0.5, Flows: 10}
	s.Outbound.Counts = live.Counts{FlowsPerSecond: 212, Flows: 2_345_678, Errors: 7}
	for i := range destinations {
		d := live.Destination{Direction: "outbound", Name: fmt.Sprintf("service-%02d.namespace-with-a-name.svc.cluster.local:8080", i)}
		d.Counts = live.Counts{FlowsPerSecond: float64(100 - i), Flows: uint64(i), Errors: uint64(i % 7), P50MS: 0.5, P95MS: 12, P99MS: float64(i % 5), Bytes: uint64(i * i % 11 << 10)}
		s.Destinations = append(s.Destinations, d)
	}
	return s
}

func TestTopIsATableWithARowForEachDestination(t *testing.T) {
	s := &live.Snapshot{Version: "v1.2.3", Pod: "web", UptimeSeconds: 61, Open: 3}
	if got := terminal.Top(s, false, terminal.Fit{}); got != "pillion v1.2.3, pod web, up 1m1s, 3 open\nin 0/s, 0 total; out 0/s, 0 total; 0 errors\nno traffic yet\n" {
		t.Errorf("without traffic:\n%s", got)
	}
	s.Destinations = []live.Destination{
		{Direction: "outbound", Name: "api.test", Counts: live.Counts{FlowsPerSecond: 12.34, Flows: 2000, Errors: 1, P50MS: 0.5, P95MS: 12, P99MS: 1200, Bytes: 20 << 10}},
		{Direction: "inbound", Name: strings.Repeat("ü", 60), Counts: live.Counts{FlowsPerSecond: 200, Flows: 1_234_567, Bytes: 7}},
	}
	got := terminal.Top(s, false, terminal.Fit{Sorted: terminal.ByBytes})
	want := "" +
		"    DESTINATION                                        PER S   TOTAL SUCCESS     P50     P95     P99 ↓BYTES\n" +
		"out api.test                                            12.3    2000   99.9%  0.50ms    12ms    1.2s  20.0K\n" +
		"in  " + strings.Repeat("ü", 47) + "…     200   1.23M  100.0%       -       -       -     7B\n"
	if _, table, _ := strings.Cut(got, "errors\n"); table != want {
		t.Errorf("got\n%s\nwant\n%s", table, want)
	}
	if coloured := terminal.Top(s, true, terminal.Fit{}); !strings.Contains(coloured, "\x1b[31m  99.9%\x1b[0m") || !strings.Contains(coloured, " \x20100.0% ") {
		t.Errorf("%q", coloured)
	}
}

// At every size, the table has no more rows and columns than the terminal. At 80×24 it has the totals, the heading, the
// busiest destinations and the keys.
func TestTopFitsTheTerminal(t *testing.T) {
	s := busy(60)
	for _, size := range [][2]int{{80, 24}, {40, 10}, {132, 50}, {20, 6}, {200, 100}, {1, 1}} {
		columns, rows := size[0], size[1]
		got := terminal.Top(s, false, terminal.Fit{Columns: columns, Rows: rows, Sorted: terminal.ByRate, Keys: true})
		lines := strings.Split(strings.TrimSuffix(got, "\n"), "\n")
		if len(lines) > rows {
			t.Errorf("%d×%d: %d lines", columns, rows, len(lines))
		}
		for _, line := range lines {
			if utf8.RuneCountInString(line) > columns {
				t.Errorf("%d×%d: %d columns: %q", columns, rows, utf8.RuneCountInString(line), line)
			}
		}
	}
	got := terminal.Top(s, false, terminal.Fit{Columns: 80, Rows: 24, Sorted: terminal.ByRate, Keys: true})
	lines := strings.Split(strings.TrimSuffix(got, "\n"), "\n")
	if len(lines) != 24 || !strings.HasPrefix(lines[0], "pillion v1.2.3") || lines[1] != "in 0.5/s, 10 total; out 212/s, 2.35M total; 7 errors" ||
		!strings.Contains(lines[2], "PER S   TOTAL SUCCESS     P50     P95     P99  BYTES") || !strings.HasPrefix(lines[3], "out service-00.") ||
		!strings.HasPrefix(lines[21], "out service-18.") || lines[22] != "and 41 more" || !strings.HasPrefix(lines[23], "q quit; sort by  r rate  t total") {
		t.Errorf("at 80×24:\n%s", got)
	}
	if narrow := terminal.Top(s, false, terminal.Fit{Columns: 52, Rows: 24}); !strings.Contains(narrow, "  PER S   TOTAL SUCCESS     P99\n") {
		t.Errorf("at 52 columns:\n%s", narrow)
	}
	s = busy(20)
	if got := terminal.Top(s, false, terminal.Fit{Columns: 80, Rows: 24, Keys: true}); strings.Contains(got, "more") || strings.Count(got, "out service") != 20 {
		t.Errorf("20 destinations fit into 24 rows:\n%s", got)
	}
}

func TestDestinationsAreSortedByEachOrder(t *testing.T) {
	list := []live.Destination{
		{Name: "b", Counts: live.Counts{FlowsPerSecond: 1, Flows: 1, Errors: 2, P99MS: 1, Bytes: 5}},
		{Name: "c", Counts: live.Counts{FlowsPerSecond: 3, Flows: 2, Errors: 1, P99MS: 1, Bytes: 5}},
		{Name: "a", Counts: live.Counts{FlowsPerSecond: 2, Flows: 3, Errors: 0, P99MS: 2, Bytes: 7}},
	}
	for order, want := range map[terminal.Order]string{
		terminal.ByRate: "cab", terminal.ByTotal: "acb", terminal.ByErrors: "bca", terminal.ByP99: "abc", terminal.ByBytes: "abc", terminal.ByName: "abc",
	} {
		sorted, got := slices.Clone(list), ""
		terminal.Sort(sorted, order)
		for _, d := range sorted {
			got += d.Name
		}
		if got != want {
			t.Errorf("by %s: %s, want %s", order, got, want)
		}
		if by, ok := terminal.OrderOf(order[0]); !ok || by != order {
			t.Errorf("the key %c is %s", order[0], by)
		}
	}
	if order, ok := terminal.OrderOf('x'); ok {
		t.Errorf("the key x is %s", order)
	}
}

// A line never wraps, and a failure's reason is whole while there is room for it.
func TestRecordsFitTheTerminal(t *testing.T) {
	r := live.Record{Time: time.Date(2026, 1, 2, 3, 4, 5, 6e6, time.Local), Direction: "outbound", Request: true, Method: "GET",
		Path: "/" + strings.Repeat("path/", 40), Authority: "a-host-with-a-name-that-is-long.example", Status: 503, DurationMS: 12, Failed: true,
		Reason: "upstream_refused", Flags: "UF"}
	const want = "03:04:05 out 503    12ms a-host-with-a-name-… GET /path/pat… upstream_refused UF"
	if got := terminal.Record(&r, false, true, 80); got != want || utf8.RuneCountInString(got) != 80 {
		t.Errorf("got  %q\nwant %q", got, want)
	}
	for _, columns := range []int{1, 10, 40, 109, 110, 200} {
		if got := terminal.Record(&r, false, true, columns); utf8.RuneCountInString(got) > columns {
			t.Errorf("%d columns: %q", columns, got)
		}
	}
	decomposed := strings.Repeat("e\u0300", 60) // the second of each pair has no column of its own
	r.Path, r.Failed, r.Status = "/"+decomposed, false, 200
	if got := terminal.Record(&r, false, true, 80); !strings.HasSuffix(got, " GET /"+decomposed[:28*3]+"…") {
		t.Errorf("a combining character takes a column: %q", got)
	}
	r.Path, r.Failed, r.Status = "/"+strings.Repeat("漢", 60), false, 200
	if got := terminal.Record(&r, false, true, 80); !strings.HasSuffix(got, " GET /"+strings.Repeat("漢", 14)+"…") {
		t.Errorf("a wide character counts as two columns: %q", got)
	}
}

// pseudoTerminal is a pair of files: tty is a terminal, and shown reads what is written to it.
func pseudoTerminal(t *testing.T) (tty, shown *os.File) {
	t.Helper()
	shown, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { shown.Close() })
	if err := unix.IoctlSetPointerInt(int(shown.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	number, err := unix.IoctlGetInt(int(shown.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	tty, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", number), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tty.Close() })
	return tty, shown
}

func TestTheSizeOfATerminalIsRead(t *testing.T) {
	t.Setenv("TERM", "xterm")
	tty, _ := pseudoTerminal(t)
	if err := unix.IoctlSetWinsize(int(tty.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: 24, Col: 80}); err != nil {
		t.Fatal(err)
	}
	if columns, rows := terminal.Size(tty); columns != 80 || rows != 24 {
		t.Errorf("%d×%d", columns, rows)
	}
	if columns, rows := terminal.Size(&bytes.Buffer{}); columns != 0 || rows != 0 {
		t.Errorf("a buffer is %d×%d", columns, rows)
	}
}

func TestAKeyboardDeliversKeysAndRestoresTheMode(t *testing.T) {
	tty, shown := pseudoTerminal(t)
	mode := func() unix.Termios {
		mode, err := unix.IoctlGetTermios(int(tty.Fd()), unix.TCGETS)
		if err != nil {
			t.Fatal(err)
		}
		return *mode
	}
	before := mode()
	keyboard, err := terminal.OpenKeyboard(tty)
	if err != nil || keyboard == nil {
		t.Fatal(keyboard, err)
	}
	if mode().Lflag&(unix.ICANON|unix.ECHO) != 0 || mode().Lflag&unix.ISIG == 0 {
		t.Error("keys wait for Enter, are echoed, or Ctrl-C has no effect")
	}
	shown.WriteString("r")
	if key := <-keyboard.Pressed(); key != 'r' {
		t.Errorf("%q", key)
	}
	shown.WriteString("qq") // Close does not wait for a reader of keys
	if err := keyboard.Close(); err != nil || mode() != before {
		t.Errorf("%v: the mode is another than before", err)
	}
	if keyboard, err := terminal.OpenKeyboard(&bytes.Buffer{}); keyboard != nil || err != nil || keyboard.Pressed() != nil || keyboard.Close() != nil {
		t.Errorf("a buffer is a keyboard: %v %v", keyboard, err)
	}
}

func TestAScreenReplacesItsTextAndRestoresTheTerminal(t *testing.T) {
	var out bytes.Buffer
	screen, err := terminal.OpenScreen(&out)
	if err != nil {
		t.Fatal(err)
	}
	screen.Draw("one\ntwo\n")
	screen.Close()
	if want := "\x1b[?1049h\x1b[?25l" + "\x1b[Hone\x1b[K\ntwo\x1b[K\x1b[J" + "\x1b[?25h\x1b[?1049l"; out.String() != want {
		t.Errorf("got  %q\nwant %q", &out, want)
	}
}

func TestColourIsForTerminalsUnlessNoColorIsSet(t *testing.T) {
	tty, _ := pseudoTerminal(t)
	for _, c := range []struct {
		noColor, term string
		want          bool
	}{{"", "xterm", true}, {"1", "xterm", false}, {"", "dumb", false}} {
		t.Setenv("NO_COLOR", c.noColor)
		t.Setenv("TERM", c.term)
		if got := bool(terminal.NewPainter(tty)); got != c.want {
			t.Errorf("NO_COLOR=%s TERM=%s: colour %v, want %v", c.noColor, c.term, got, c.want)
		}
	}
}

func TestABriefLineHasTheReasonOfAFailure(t *testing.T) {
	for _, c := range []struct {
		record live.Record
		want   string
	}{
		{live.Record{Request: true, Method: "GET", Authority: "web.example", Path: "/", Status: 500, Failed: true, Reason: "completed"}, "500 GET web.example/ 0B -"},
		{live.Record{Request: true, Method: "GET", Authority: "web.example", Path: "/", Status: 503, Failed: true, Reason: "upstream_refused", Failure: "connection refused"},
			"503 GET web.example/ 0B - upstream_refused connection refused"},
		{live.Record{Request: true, Method: "CONNECT", Authority: "web.example:443", Path: "web.example:443", Status: 200}, "200 CONNECT web.example:443 0B -"},
		{live.Record{Request: true, Method: "GET", Authority: "web.example", Path: "http://web.example/a", Status: 200}, "200 GET http://web.example/a 0B -"},
		{live.Record{Protocol: "TLS", SNI: "web.example", Destination: "203.0.113.1:443"}, "-   TLS web.example 203.0.113.1:443 0B -"},
	} {
		if got := terminal.Brief(&c.record, terminal.Painter(false), 0); got != c.want {
			t.Errorf("the line is %q, want %q", got, c.want)
		}
	}
	long := live.Record{Request: true, Method: "GET", Authority: "a.long.web.example:8080", Path: "/with/a/path", Failed: true, Reason: "upstream_refused",
		Failure: "connection refused by the server"}
	for columns, want := range map[int]string{
		60:  "-   GET a.long.web.example:8080… 0B - upstream_refused connection refused by the server",
		100: "-   GET a.long.web.example:8080/with/a/path 0B - upstream_refused connection refused by the server",
	} {
		if got := terminal.Brief(&long, terminal.Painter(false), columns); got != want {
			t.Errorf("in %d columns the line is %q, want %q", columns, got, want)
		}
	}
}
