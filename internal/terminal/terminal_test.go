package terminal_test

import (
	"bytes"
	"fmt"
	"os"
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
		if got := terminal.Record(&r, true, true); got != want {
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
	if got := terminal.Record(&r, false, false); got != want {
		t.Errorf("got  %q\nwant %q", got, want)
	}
}

func TestStatusIsOneScreen(t *testing.T) {
	s := &live.Snapshot{
		Version: "v1.2.3", UptimeSeconds: 3723.4, Open: 12,
		Gates:    []live.Gate{{Name: "inbound", Open: true}, {Name: "addresses", Why: "not listed yet"}},
		Inbound:  live.Totals{Counts: live.Counts{RequestsPerSecond: 120.4, FlowsPerSecond: 120.4, P50MS: 2.2, P99MS: 31, ConnectionsPerSecond: 0.3}},
		Outbound: live.Totals{Counts: live.Counts{RequestsPerSecond: 8, FlowsPerSecond: 8, ErrorsPerSecond: 2, Errors: 41}},
		Reasons:  []live.Reason{{Reason: "upstream_refused", Text: "Nothing listens there.", Count: 40}, {Reason: "status_5xx", Text: "Upstream failed.", Count: 1}},
	}
	const want = `pillion      v1.2.3, up 1h2m3s
ready        no
             addresses: not listed yet
connections  12 open, new per second: 0.3 in, 0 out
requests     per second: 120 in, 8.0 out
latency      in 2.2ms p50, 31ms p99; out - p50, - p99
errors       1.6% of what ends, 2.0 per second; 41 since the start
                 40 upstream_refused: Nothing listens there.
                  1 status_5xx: Upstream failed.
`
	if got := terminal.Status(s, false); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

func TestTopIsATableWithARowForEachDestination(t *testing.T) {
	s := &live.Snapshot{Version: "v1.2.3", UptimeSeconds: 61, Open: 3}
	const head = "pillion v1.2.3, up 1m1s: in 0/s, out 0/s, 3 open\n"
	if got := terminal.Top(s, false, 0); got != head+"no traffic yet\n" {
		t.Errorf("without traffic:\n%s", got)
	}
	s.Destinations = []live.Destination{
		{Direction: "outbound", Name: "api.test"},
		{Direction: "inbound", Name: strings.Repeat("ü", 60)},
	}
	for i, c := range []live.Counts{
		{FlowsPerSecond: 12.34, Flows: 2000, Errors: 1, P50MS: 0.5, P95MS: 12, P99MS: 1200, Bytes: 20 << 10},
		{FlowsPerSecond: 200, Flows: 10, Bytes: 7},
	} {
		s.Destinations[i].Counts = c
	}
	got := terminal.Top(s, false, 0)
	want := head +
		"         DESTINATION                                         PER S  SUCCESS      P50      P95      P99   BYTES\n" +
		"outbound api.test                                             12.3    99.9%   0.50ms     12ms     1.2s   20.0K\n" +
		"inbound  " + strings.Repeat("ü", 47) + "…      200   100.0%        -        -        -      7B\n"
	if got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	lines := strings.Split(got, "\n")
	for _, line := range lines[2:4] {
		if utf8.RuneCountInString(line) != utf8.RuneCountInString(lines[1]) {
			t.Errorf("a row is not as wide as the head:\n%s", got)
		}
	}
	if coloured := terminal.Top(s, true, 0); !strings.Contains(coloured, "\x1b[31m   99.9%\x1b[0m") || !strings.Contains(coloured, " \x20100.0% ") {
		t.Errorf("%q", coloured)
	}
	s.Destinations = make([]live.Destination, 30)
	if got := terminal.Top(s, false, 20); !strings.HasSuffix(got, "\nand 10 more\n") || strings.Count(got, "\n") != 23 {
		t.Errorf("30 destinations in 20 rows:\n%s", got)
	}
}

func TestColourIsForTerminalsUnlessNoColorIsSet(t *testing.T) {
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer master.Close()
	if err := unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	number, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	tty, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", number), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer tty.Close()
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
