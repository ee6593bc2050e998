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
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/live"
	"github.com/pillion-proxy/pillion/internal/nettest"
)

// running stands for an agent with traffic, as the commands that look see it.
type running struct {
	view    *live.View
	table   *flow.Table
	gates   []live.Gate
	broken  string // a path that fails
	address string
	c       *flow.Record
}

func newRunning(t *testing.T) *running {
	r := &running{view: live.New(live.Config{Version: "v1.2.3"})}
	r.table = flow.NewTable(r.view)
	shown := r.view.Handler(live.Sources{Table: r.table, Gates: func() []live.Gate { return r.gates }})
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, request *http.Request) {
		switch path := request.URL.Path; {
		case path == r.broken:
			http.Error(w, "out of order", http.StatusInternalServerError)
		case strings.HasPrefix(path, "/live"):
			shown.ServeHTTP(w, request)
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
	record := flow.Open(flow.Outbound, r.c.Downstream)
	record.Opened = record.Opened.Add(-20 * time.Millisecond)
	record.Protocol, record.Connection = flow.HTTP11, r.c
	record.HTTP = flow.Request{Method: []byte("GET"), Path: []byte(path), Authority: []byte("api.test"), Status: status,
		UserAgent: []byte("agent/of-somebody"), ID: []byte("an-id-of-a-request")}
	record.Sent.Store(2048)
	record.Close(r.table, reason, nil)
}

// look runs a command that looks at the agent.
func (r *running) look(t *testing.T, args ...string) (stdout, stderr string, err error) {
	t.Helper()
	return lookAt(t.Context(), append(args, "--admin", r.address)...)
}

func lookAt(ctx context.Context, args ...string) (stdout, stderr string, err error) {
	var out, complaints bytes.Buffer
	root := newRoot()
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

func TestTapPrintsALineForEachRecordThatFits(t *testing.T) {
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

func TestATapOfAnAgentThatEndsSaysSo(t *testing.T) {
	r := newRunning(t)
	if _, _, err := r.tap(t, r.view.Close); err == nil || err.Error() != "the agent has ended" {
		t.Errorf("%v", err)
	}
}

func TestSkippedRecordsAreToldApartFromThoseThatAreShown(t *testing.T) {
	var out, complaints bytes.Buffer
	body := "\n{\"skipped\":7}\n{\"number\":1,\"reason\":\"closed\",\"protocol\":\"TLS\",\"sni\":\"a.test\",\"destination\":\"192.0.2.1:443\"}\n"
	if err := followTap(strings.NewReader(body), &out, &complaints, outputText); err != nil {
		t.Fatal(err)
	}
	if !strings.HasSuffix(out.String(), " - - 0B 192.0.2.1:443 TLS a.test\n") || complaints.String() != "skipped 7: more ended than could be shown\n" {
		t.Errorf("%q %q", &out, &complaints)
	}
}

func TestTopPrintsOneTableWhereThereIsNoTerminal(t *testing.T) {
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
	if err != nil || len(lines) != 4 || !strings.HasPrefix(lines[0], "pillion v1.2.3, up ") {
		t.Fatalf("%v\n%s", err, out)
	}
	if lines[1] != "         DESTINATION    PER S  SUCCESS      P50      P95      P99   BYTES" ||
		!regexp.MustCompile(`^outbound api\.test    +[\d.]+    90\.0%     2\dms     2\dms     2\dms   20\.0K$`).MatchString(lines[2]) {
		t.Errorf("\n%s", out)
	}
	var destinations []live.Destination
	if out, _, err := r.look(t, "top", "-o", "json"); err != nil || json.Unmarshal([]byte(out), &destinations) != nil || destinations[0].Errors != 1 {
		t.Errorf("%v %s", err, out)
	}
	if _, _, err := r.look(t, "top", "--interval", "1ms"); err == nil || err.Error() != "--interval 1ms: too short to read; use 100ms or more" {
		t.Errorf("%v", err)
	}
}

func TestStatusAsksTheAgent(t *testing.T) {
	r := newRunning(t)
	if out, _, err := r.look(t, "status"); err != nil || !strings.Contains(out, "\nready        yes\n") || !strings.Contains(out, "1 open") {
		t.Errorf("%v\n%s", err, out)
	}
}

func TestWhenNothingAnswersTheErrorSaysWhatToDo(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	nobody := listener.Addr().String()
	listener.Close()
	for _, command := range []string{"tap", "top", "status"} {
		_, _, err := lookAt(t.Context(), command, "--admin", nobody)
		if err == nil || !strings.Contains(err.Error(), "http://"+nobody+"/live") || !strings.Contains(err.Error(), "connection refused") ||
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

// unpack reads a bundle.
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
		parts[strings.TrimPrefix(header.Name, "pillion-bundle/")] = string(content)
	}
}

func TestABundleHasEverythingAndNothingSecret(t *testing.T) {
	t.Setenv("DATABASE_PASSWORD", "hunter2-environment")
	t.Setenv("PILLION_DRAIN_DELAY", "7s")
	r := newRunning(t)
	r.gates = []live.Gate{{Name: "addresses", Why: "not listed yet"}}
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
		"gates.json":       "the answer of /init_dump",
		"environment.txt":  "DATABASE_PASSWORD\n",
		"server_info.json": "the answer of /server_info",
		"config_dump.json": "the answer of /config_dump",
		"metrics.txt":      "the answer of /stats/prometheus",
		"goroutines.txt":   "the answer of /debug/pprof/goroutine?debug=2",
	} {
		if !strings.Contains(parts[name], want) {
			t.Errorf("%s lacks %q:\n%s", name, want, parts[name])
		}
	}
	if parts["rules.txt"] == "" && !strings.Contains(parts["rules.txt.note"], "CAP_NET_ADMIN") {
		t.Errorf("neither rules nor why: %v", parts)
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

func TestAPartOfABundleThatFailsIsNamed(t *testing.T) {
	r := newRunning(t)
	r.broken = "/config_dump"
	out, _, err := r.look(t, "bundle", "-f", "-")
	if err == nil || err.Error() != "the bundle lacks config_dump.json; the .error files in it say why" {
		t.Errorf("%v", err)
	}
	parts := unpack(t, strings.NewReader(out))
	if _, there := parts["config_dump.json"]; there || !strings.Contains(parts["config_dump.json.error"], "out of order") || parts["metrics.txt"] == "" {
		t.Errorf("%v", parts)
	}
}

// The rules of a bundle are those that are there, with the words that init gave them.
func TestABundleTellsTheRules(t *testing.T) {
	nettest.RequireRoot(t)
	pod := nettest.New(t, "pod")
	if did := pillion(t, pod, nil, nil, append([]string{"init"}, injectorArguments...)...); did.code != 0 {
		t.Fatal(did)
	}
	did := pillion(t, pod, nil, nil, "bundle", "-f", "-")
	parts := unpack(t, strings.NewReader(did.stdout))
	if did.code != 1 || !strings.Contains(parts["rules.txt"], "REDIRECT --to-ports 15001") || parts["live.json.error"] == "" {
		t.Errorf("exit %d\n%s\n%s", did.code, parts["rules.txt"], did.stderr)
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

func TestTopOnATerminalIsMadeAnewUntilItIsInterrupted(t *testing.T) {
	t.Setenv("NO_COLOR", "")
	t.Setenv("TERM", "xterm")
	r := newRunning(t)
	r.request("/", 500, flow.Completed)
	tty, shown := pseudoTerminal(t)
	ctx, interrupt := context.WithCancel(t.Context())
	defer interrupt()
	root := newRoot()
	root.SetArgs([]string{"top", "--interval", "100ms", "--admin", r.address})
	root.SetOut(tty)
	ended := make(chan error, 1)
	go func() { ended <- root.ExecuteContext(ctx) }()
	var text string
	for strings.Count(text, "\x1b[H\x1b[J") < 3 {
		part := make([]byte, 4096)
		n, err := shown.Read(part)
		if err != nil {
			t.Fatal(err)
		}
		text += string(part[:n])
	}
	interrupt()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	if !strings.Contains(text, "\x1b[31m    0.0%\x1b[0m") {
		t.Errorf("%q", text)
	}
}
