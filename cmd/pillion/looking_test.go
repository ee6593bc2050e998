package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pillion-proxy/pillion/internal/configview"
	"github.com/pillion-proxy/pillion/internal/controlplane"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/live"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/nettest"
)

// running serves the state of an agent with traffic to the commands that show it.
type running struct {
	view  *live.View
	table *flow.Table
	gates []live.Gate

	resources func() controlplane.Resources // nil: without a control plane
	snapshot  *mesh.Snapshot

	broken  string // the path that answers 500
	dump    string // the answer of /config_dump; empty: like the others
	address string
	c       *flow.Record
}

func newRunning(t *testing.T) *running {
	r := &running{view: live.New(live.Config{Version: "v1.2.3", Pod: "web-1", Namespace: "shop"})}
	r.table = flow.NewTable(r.view)
	shown := r.view.Handler(live.Sources{Table: r.table, Gates: func() []live.Gate { return r.gates }})
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, request *http.Request) {
		switch path := request.URL.Path; {
		case path == r.broken:
			http.Error(w, "out of order", http.StatusInternalServerError)
		case path == "/config_dump" && r.dump != "":
			io.WriteString(w, r.dump)
		case strings.HasPrefix(path, "/live"):
			shown.ServeHTTP(w, request)
		case path == "/explain":
			configview.ExplainHandler(func() *mesh.Snapshot { return r.snapshot }, nil).ServeHTTP(w, request)
		case strings.HasPrefix(path, "/config/"):
			configview.Handler(r.resources).ServeHTTP(w, request)
		default:
			fmt.Fprintf(w, "the answer of %s\n", request.URL)
		}
	}))
	t.Cleanup(server.Close)
	t.Cleanup(r.view.Close)
	r.address = server.Listener.Addr().String()
	r.c = flow.Open(flow.Outbound, netip.MustParseAddrPort("198.51.100.2:4711"))
	r.c.OriginalDestination = netip.MustParseAddrPort("203.0.113.7:80")
	r.table.List(r.c)
	r.table.Carry(r.c, flow.HTTP11, flow.Hello{})
	return r
}

func (r *running) request(path string, status int, reason flow.Reason) {
	r.requestFor("api.test", path, status, reason)
}

func (r *running) requestFor(host, path string, status int, reason flow.Reason) {
	record := flow.Open(flow.Outbound, r.c.Downstream)
	record.Opened = record.Opened.Add(-20 * time.Millisecond)
	record.Protocol, record.Connection = flow.HTTP11, r.c
	record.HTTP = &flow.Request{Method: []byte("GET"), Path: []byte(path), Authority: []byte(host), Status: status,
		UserAgent: []byte("agent/of-somebody"), ID: []byte("an-id-of-a-request")}
	record.Sent.Store(2048)
	record.Close(r.table, reason, nil)
}

// look runs a command that shows the agent's state.
func (r *running) look(t *testing.T, args ...string) (stdout, stderr string, err error) {
	t.Helper()
	return lookAt(t.Context(), append(args, "--admin", r.address)...)
}

func lookAt(ctx context.Context, args ...string) (stdout, stderr string, err error) {
	var out, complaints bytes.Buffer
	root := newRoot(nil)
	root.SetArgs(args)
	root.SetOut(&out)
	root.SetErr(&complaints)
	err = root.ExecuteContext(ctx)
	return out.String(), complaints.String(), err
}

// tap runs `pillion tap` while during makes traffic.
func (r *running) tap(t *testing.T, during func(), args ...string) (stdout, stderr string, err error) {
	t.Helper()
	var tapping sync.WaitGroup
	tapping.Go(func() { stdout, stderr, err = r.look(t, append([]string{"tap"}, args...)...) })
	nettest.Eventually(t, "the tap follows", func() bool {
		answer, _, err := r.look(t, "status", "-o", "json")
		return err == nil && strings.Contains(answer, `"followers": 1`)
	})
	during()
	tapping.Wait()
	return stdout, stderr, err
}

func TestTapPrintsALineForEachMatchingRecord(t *testing.T) {
	r := newRunning(t)
	traffic := func() {
		r.request("/v1/fine", 200, flow.Completed)
		r.request("/v2/\x1b[2Jbad\r\n", 503, flow.UpstreamRefused)
		r.request("/v2/missing", 404, flow.Completed)
	}
	out, complaints, err := r.tap(t, traffic, "--path", "/v2/", "--direction", "outbound", "-n", "2")
	lines := strings.Split(out, "\n")
	want := []string{
		`^\d\d:\d\d:\d\d\.\d{3} outbound 503 2\dms 2\.0K api\.test GET /v2/�\[2Jbad�� upstream_refused UF$`,
		`^\d\d:\d\d:\d\d\.\d{3} outbound 404 2\dms 2\.0K api\.test GET /v2/missing$`,
	}
	if err != nil || complaints != "" || len(lines) != 3 {
		t.Fatalf("%v %q %q", err, complaints, out)
	}
	for i := range want {
		if !regexp.MustCompile(want[i]).MatchString(lines[i]) {
			t.Errorf("%q, want %s", lines[i], want[i])
		}
	}
	out, _, err = r.tap(t, traffic, "--status", "5xx", "-n", "1", "-o", "json")
	var record live.Record
	if json.Unmarshal([]byte(out), &record) != nil || err != nil || record.Status != 503 || strings.Count(out, "\n") != 1 {
		t.Errorf("%v %q", err, out)
	}
}

func TestATapReportsThatTheAgentClosedTheStream(t *testing.T) {
	r := newRunning(t)
	if _, _, err := r.tap(t, r.view.Close); err == nil || err.Error() != "the agent closed the stream" {
		t.Errorf("%v", err)
	}
}

func TestSkippedRecordsAreCountedOnStandardError(t *testing.T) {
	var out, complaints bytes.Buffer
	body := "\n{\"skipped\":7}\n{\"number\":1,\"reason\":\"closed\",\"protocol\":\"TLS\",\"sni\":\"a.test\",\"destination\":\"192.0.2.1:443\"}\n"
	seen := tapped{out: &out, complaints: &complaints, form: outputText}
	if err := seen.follow(strings.NewReader(body)); err != nil {
		t.Fatal(err)
	}
	if !strings.HasSuffix(out.String(), " - - 0B 192.0.2.1:443 TLS a.test\n") || complaints.String() != "skipped 7 records: too many to show\n" ||
		seen.records != 1 || seen.skipped != 7 {
		t.Errorf("%q %q %+v", &out, &complaints, seen)
	}
}

func TestTopPrintsOneTableWithoutATerminal(t *testing.T) {
	r := newRunning(t)
	if out, _, err := r.look(t, "top"); err != nil || !strings.HasSuffix(out, "no traffic yet\n") {
		t.Errorf("%v %q", err, out)
	}
	for range 9 {
		r.request("/", 200, flow.Completed)
	}
	r.request("/", 500, flow.Completed)
	out, _, err := r.look(t, "top")
	lines := strings.Split(out, "\n")
	if err != nil || len(lines) != 5 || !strings.HasPrefix(lines[0], "pillion v1.2.3, pod shop/web-1, up ") ||
		!strings.HasSuffix(lines[1], "/s, 10 total; 1 errors") {
		t.Fatalf("%v\n%s", err, out)
	}
	if lines[2] != "    DESTINATION  ↓PER S   TOTAL SUCCESS     P50     P95     P99  BYTES" ||
		!regexp.MustCompile(`^out api\.test +[\d.]+      10   90\.0%    2\dms    2\dms    2\dms  20\.0K$`).MatchString(lines[3]) {
		t.Errorf("\n%s", out)
	}
	var destinations []live.Destination
	if out, _, err := r.look(t, "top", "-o", "json"); err != nil || json.Unmarshal([]byte(out), &destinations) != nil || destinations[0].Errors != 1 {
		t.Errorf("%v %s", err, out)
	}
	if _, _, err := r.look(t, "top", "--interval", "1ms"); err == nil || err.Error() != "--interval 1ms: use 100ms or more" {
		t.Errorf("%v", err)
	}
}

// One request is visible long after its rate is 0.
func TestStatusAndTopCountFromTheStart(t *testing.T) {
	r := newRunning(t)
	r.request("/", 500, flow.Completed)
	if out, _, err := r.look(t, "status"); err != nil || !strings.Contains(out, "\nrequests     0 in, 1 out in total; ") ||
		!strings.Contains(out, "\nerrors       1 of 1 that ended; ") || !strings.Contains(out, "; 0 in, 1 out in total; new per second") {
		t.Errorf("%v\n%s", err, out)
	}
	if out, _, err := r.look(t, "top"); err != nil || !strings.Contains(out, "/s, 1 total; 1 errors\n") {
		t.Errorf("%v\n%s", err, out)
	}
}

func TestStatusShowsTheAgent(t *testing.T) {
	r := newRunning(t)
	if out, _, err := r.look(t, "status"); err != nil || !strings.Contains(out, "\nready        yes\n") || !strings.Contains(out, "1 open") {
		t.Errorf("%v\n%s", err, out)
	}
}

func TestWithoutAnAgentTheErrorHasARemedy(t *testing.T) {
	closed := nettest.Refusing(t).String()
	for _, command := range []string{"tap", "top", "status"} {
		_, _, err := lookAt(t.Context(), command, "--admin", closed)
		if err == nil || !strings.Contains(err.Error(), "http://"+closed+"/live") || !strings.Contains(err.Error(), "connection refused") ||
			!strings.Contains(err.Error(), "kubectl port-forward") || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: %v", command, err)
		}
	}
	r := newRunning(t)
	r.broken = "/live"
	if _, _, err := r.look(t, "status"); err == nil || err.Error() != "http://"+r.address+"/live answered 500 Internal Server Error: out of order" {
		t.Errorf("%v", err)
	}
	for args, want := range map[string]string{
		"status --admin 15000":   `invalid argument "15000" for "--admin" flag: not an address: use one with a port, such as 127.0.0.1:15000`,
		"tap --status 6xx":       `invalid argument "6xx" for "--status" flag: not a status: use one such as 404, or a class such as 5xx`,
		"tap --direction upward": `invalid argument "upward" for "--direction" flag: not a direction: use inbound or outbound`,
		"top --output yaml":      `invalid argument "yaml" for "-o, --output" flag: unknown output format "yaml": use text or json`,
	} {
		if _, _, err := lookAt(t.Context(), strings.Fields(args)...); err == nil || err.Error() != want {
			t.Errorf("%s: %v, want %s", args, err, want)
		}
	}
}

// unpack returns the files of a bundle by name, without the .gz of packed ones.
func unpack(t *testing.T, file io.Reader) map[string]string {
	t.Helper()
	unzipped, err := gzip.NewReader(file)
	if err != nil {
		t.Fatal(err)
	}
	parts := make(map[string]string)
	for archive := tar.NewReader(unzipped); ; {
		header, err := archive.Next()
		if errors.Is(err, io.EOF) {
			return parts
		}
		if err != nil {
			t.Fatal(err)
		}
		content, err := io.ReadAll(archive)
		if err != nil {
			t.Fatal(err)
		}
		name, packed := strings.CutSuffix(strings.TrimPrefix(header.Name, "pillion-bundle/"), ".gz")
		if packed {
			unpacker, err := gzip.NewReader(bytes.NewReader(content))
			if err != nil {
				t.Fatal(err)
			}
			if content, err = io.ReadAll(unpacker); err != nil {
				t.Fatal(err)
			}
		}
		parts[name] = string(content)
	}
}

func TestABundleHasEveryPartAndNoSecrets(t *testing.T) {
	t.Setenv("DATABASE_PASSWORD", "hunter2-environment")
	t.Setenv("PILLION_DRAIN_DELAY", "7s")
	r := newRunning(t)
	r.gates = []live.Gate{{Name: "inbound", Open: true}, {Name: "addresses", Why: "not listed yet"}}
	r.request("/login?token=hunter2-query", 200, flow.Completed)
	file := filepath.Join(t.TempDir(), "bundle.tar.gz")
	_, stderr, err := r.look(t, "bundle", "-f", file)
	if err != nil || stderr != "wrote "+file+"\n" {
		t.Fatalf("%v %q", err, stderr)
	}
	in, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	if info, _ := in.Stat(); info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v: others can read it", info.Mode())
	}
	parts := unpack(t, in)
	for name, want := range map[string]string{
		"version.txt":      "pillion devel",
		"live.json":        "not listed yet",
		"records.json":     `"path": "/login"`,
		"gates.txt":        "ready: false\ninbound: open\naddresses: closed: not listed yet\n",
		"log.txt":          "the answer of /log",
		"environment.txt":  "DATABASE_PASSWORD\n",
		"server_info.json": "the answer of /server_info",
		"config_dump.json": "the answer of /config_dump?redact=headers",

		"findings.json.note": "this agent has no control plane",

		"metrics.txt":    "the answer of /stats/prometheus",
		"goroutines.txt": "the answer of /debug/pprof/goroutine?debug=2",
	} {
		if !strings.Contains(parts[name], want) {
			t.Errorf("%s lacks %q:\n%s", name, want, parts[name])
		}
	}
	if parts["rules.txt"] == "" && !strings.Contains(parts["rules.txt.note"], "CAP_NET_ADMIN") {
		t.Errorf("there are neither rules nor the reason: %v", parts)
	}
	if !strings.Contains(parts["environment.txt"], "PILLION_DRAIN_DELAY=7s\n") {
		t.Errorf("the agent's own variables have no values:\n%s", parts["environment.txt"])
	}
	for name, content := range parts {
		for _, secret := range []string{"hunter2", "of-somebody", "an-id-of"} {
			if strings.Contains(content, secret) {
				t.Errorf("%s has %s", name, secret)
			}
		}
	}
	if _, _, err := r.look(t, "bundle", "-f", file); !errors.Is(err, os.ErrExist) || !strings.Contains(err.Error(), "--file") {
		t.Errorf("over another file: %v", err)
	}
}

// The dump of 1,000 services has 14 MB, and more with more endpoints or policies.
func TestABundleHasALargeDump(t *testing.T) {
	r := newRunning(t)
	r.dump = strings.Repeat("a line of a resource\n", 1_000_000)
	out, _, err := r.look(t, "bundle", "-f", "-")
	if parts := unpack(t, strings.NewReader(out)); err != nil || parts["config_dump.json"] != r.dump {
		t.Errorf("error %v, %d bytes of %d", err, len(parts["config_dump.json"]), len(r.dump))
	}
	if len(out) > 1<<20 {
		t.Errorf("the bundle has %d bytes", len(out))
	}
}

func TestAPartOfABundleThatFailsIsNamed(t *testing.T) {
	r := newRunning(t)
	r.broken = "/config_dump"
	out, _, err := r.look(t, "bundle", "-f", "-")
	if err == nil || err.Error() != "the bundle lacks config_dump.json.gz; its .error files have the reasons" {
		t.Errorf("%v", err)
	}
	parts := unpack(t, strings.NewReader(out))
	if _, there := parts["config_dump.json"]; there || !strings.Contains(parts["config_dump.json.gz.error"], "out of order") || parts["metrics.txt"] == "" {
		t.Errorf("%v", parts)
	}
}

// The rules of a bundle are those that "rules show" prints. Without permission to read them, a note describes how to get
// them; it is not a failure.
func TestABundleHasTheRulesOrHowToGetThem(t *testing.T) {
	nettest.RequireRoot(t)
	pod := nettest.New(t, "pod")
	if did := pillion(t, pod, nil, nil, append([]string{"init"}, injectorArguments...)...); did.code != 0 {
		t.Fatal(did)
	}
	shown := pillion(t, pod, nil, nil, "rules", "show")
	uncounted := func(text string) string {
		return regexp.MustCompile(`\(\d+ packets, \d+ bytes\)`).ReplaceAllString(text, "")
	}
	did := pillion(t, pod, nil, nil, "bundle", "-f", "-")
	parts := unpack(t, strings.NewReader(did.stdout))
	if did.code != 1 || uncounted(parts["rules.txt"]) != uncounted(shown.stdout) || !strings.Contains(shown.stdout, "REDIRECT --to-ports 15001") || parts["live.json.error"] == "" {
		t.Errorf("exit %d\n%s\nwant\n%s\n%s", did.code, parts["rules.txt"], shown.stdout, did.stderr)
	}
	plain := pillionAs(t, pod, []string{"setpriv", "--reuid", "1337", "--regid", "1337", "--clear-groups"}, "bundle", "-f", "-")
	note := unpack(t, strings.NewReader(plain.stdout))["rules.txt.note"]
	for _, want := range []string{"CAP_NET_ADMIN is missing", "kubectl debug POD", "--network-namespace /proc/PID/ns/net"} {
		if !strings.Contains(note, want) {
			t.Errorf("the note lacks %q: %s", want, note)
		}
	}
	refused := pillionAs(t, pod, []string{"setpriv", "--reuid", "1337", "--regid", "1337", "--clear-groups"}, "rules", "show")
	if refused.code != 1 || !strings.Contains(refused.stderr, "kubectl debug POD") || strings.Contains(refused.stderr, "capabilities.add") {
		t.Errorf("rules show without capabilities: %+v", refused)
	}
	if strings.Contains(plain.stderr, "rules.txt") {
		t.Errorf("a note counts as a failure: %s", plain.stderr)
	}
}

// The image runs pillion as pilot-agent in the container istio-proxy; the help of bundle names both.
func TestTheHelpOfBundleNamesTheContainerThatInjectionMakes(t *testing.T) {
	help, _, err := lookAt(t.Context(), "bundle", "--help")
	if err != nil || !strings.Contains(help, "kubectl exec POD -c istio-proxy -- pilot-agent bundle -f - > bundle.tar.gz") {
		t.Errorf("%v\n%s", err, help)
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

// screen collects what is written to a terminal.
type screen struct {
	mu   sync.Mutex
	text string
}

// watch collects until the terminal is closed.
func watch(t *testing.T, tty, shown *os.File) *screen {
	t.Helper()
	s := new(screen)
	var reading sync.WaitGroup
	reading.Go(func() {
		part := make([]byte, 4096)
		for {
			n, err := shown.Read(part)
			if err != nil {
				return
			}
			s.mu.Lock()
			s.text += string(part[:n])
			s.mu.Unlock()
		}
	})
	t.Cleanup(reading.Wait)
	t.Cleanup(func() { tty.Close() })
	return s
}

// drawn returns the rows of the last whole picture.
func (s *screen) drawn() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	pictures := strings.Split(s.text, "\x1b[H")
	for _, picture := range slices.Backward(pictures) {
		if rows, whole := strings.CutSuffix(strings.TrimSuffix(picture, "\x1b[?25h\x1b[?1049l"), "\x1b[J"); whole {
			return strings.Split(strings.ReplaceAll(rows, "\x1b[K", ""), "\r\n")
		}
	}
	return nil
}

func (s *screen) all() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.text
}

func resize(t *testing.T, tty *os.File, columns, rows uint16) {
	t.Helper()
	if err := unix.IoctlSetWinsize(int(tty.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: rows, Col: columns}); err != nil {
		t.Fatal(err)
	}
}

// On a terminal top fills the screen and not more, follows its size, sorts by key and ends with q. Afterwards the
// terminal is as before.
func TestTopFitsTheTerminalAndFollowsKeysAndSize(t *testing.T) {
	t.Setenv("NO_COLOR", "1")
	t.Setenv("TERM", "xterm")
	r := newRunning(t)
	for i := range 40 {
		r.requestFor(fmt.Sprintf("host-%02d.test", i), "/", 200+300*(i%2), flow.Completed)
	}
	tty, shown := pseudoTerminal(t)
	resize(t, tty, 80, 24)
	before, err := unix.IoctlGetTermios(int(tty.Fd()), unix.TCGETS)
	if err != nil {
		t.Fatal(err)
	}
	seen := watch(t, tty, shown)
	root := newRoot(nil)
	root.SetArgs([]string{"top", "--interval", "1h", "--sort", "name", "--admin", r.address})
	root.SetIn(tty)
	root.SetOut(tty)
	ended := make(chan error, 1)
	go func() { ended <- root.ExecuteContext(t.Context()) }()
	await := func(what string, rows int, heading string) {
		t.Helper()
		nettest.Eventually(t, what, func() bool {
			drawn := seen.drawn()
			return len(drawn) == rows && strings.HasPrefix(drawn[0], "pillion v1.2.3") && strings.Contains(drawn[2], heading) &&
				strings.HasPrefix(drawn[rows-1], "q quit")
		})
	}
	await("24 rows are filled", 24, "DESTINATION")
	if rows := seen.drawn(); !strings.HasPrefix(rows[3], "out host-00.test") || rows[22] != "and 21 more" {
		t.Errorf("%q", rows)
	}
	shown.WriteString("e")
	await("e sorts by errors", 24, "SUCCESS")
	nettest.Eventually(t, "e sorts by errors", func() bool { return strings.HasPrefix(seen.drawn()[3], "out host-01.test") })
	resize(t, tty, 60, 10)
	if err := unix.Kill(os.Getpid(), unix.SIGWINCH); err != nil {
		t.Fatal(err)
	}
	await("the table follows the terminal's size", 10, "SUCCESS")
	for _, row := range seen.drawn() {
		if len([]rune(row)) > 60 {
			t.Errorf("wider than 60 columns: %q", row)
		}
	}
	shown.WriteString("q")
	if err := <-ended; err != nil {
		t.Error(err)
	}
	if after, err := unix.IoctlGetTermios(int(tty.Fd()), unix.TCGETS); err != nil || *after != *before {
		t.Errorf("%v: the terminal's mode has changed", err)
	}
	nettest.Eventually(t, "the former screen is back", func() bool { return strings.HasSuffix(seen.all(), "\x1b[?25h\x1b[?1049l") })
}

func TestTopOnATerminalIsRedrawnUntilItIsInterrupted(t *testing.T) {
	t.Setenv("NO_COLOR", "")
	t.Setenv("TERM", "xterm")
	r := newRunning(t)
	r.request("/", 500, flow.Completed)
	tty, shown := pseudoTerminal(t)
	resize(t, tty, 80, 24)
	seen := watch(t, tty, shown)
	ctx, interrupt := context.WithCancel(t.Context())
	defer interrupt()
	root := newRoot(nil)
	root.SetArgs([]string{"top", "--interval", "100ms", "--admin", r.address})
	root.SetIn(strings.NewReader(""))
	root.SetOut(tty)
	ended := make(chan error, 1)
	go func() { ended <- root.ExecuteContext(ctx) }()
	nettest.Eventually(t, "three pictures", func() bool { return strings.Count(seen.all(), "\x1b[H") >= 3 })
	interrupt()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	if !strings.Contains(seen.all(), "\x1b[31m   0.0%\x1b[0m") {
		t.Errorf("%q", seen.all())
	}
}

// A tap cuts its lines to the width of the terminal, ends with q and then reports how many records it has shown.
func TestATapFitsTheTerminalAndEndsWithQ(t *testing.T) {
	t.Setenv("NO_COLOR", "1")
	t.Setenv("TERM", "xterm")
	r := newRunning(t)
	tty, shown := pseudoTerminal(t)
	resize(t, tty, 80, 24)
	seen := watch(t, tty, shown)
	root := newRoot(nil)
	root.SetArgs([]string{"tap", "--admin", r.address})
	root.SetIn(tty)
	root.SetOut(tty)
	var complaints bytes.Buffer
	root.SetErr(&complaints)
	ended := make(chan error, 1)
	go func() { ended <- root.ExecuteContext(t.Context()) }()
	nettest.Eventually(t, "the tap follows", func() bool {
		answer, _, err := r.look(t, "status", "-o", "json")
		return err == nil && strings.Contains(answer, `"followers": 1`)
	})
	r.request("/"+strings.Repeat("long/", 40), 503, flow.UpstreamRefused)
	r.request("/second", 200, flow.Completed)
	nettest.Eventually(t, "two lines", func() bool { return strings.Count(seen.all(), "\r\n") == 2 })
	shown.WriteString("q")
	if err := <-ended; err != nil {
		t.Error(err)
	}
	first, _, _ := strings.Cut(seen.all(), "\r\n")
	if len([]rune(first)) != 80 || !strings.HasSuffix(first, "… upstream_refused UF") {
		t.Errorf("%q", first)
	}
	if complaints.String() != "2 records, 1 failed, 0 skipped\n" {
		t.Errorf("%q", &complaints)
	}
}
