package admin

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http/httptest"
	"strconv"
	"strings"
	"testing"
)

// Commands that change the agent are logged with their path and the beginning of their query. Other requests are not.
func TestCommandsThatChangeTheAgentAreLogged(t *testing.T) {
	var log bytes.Buffer
	var told commanded
	config := sample(&told)
	config.Log = slog.New(slog.NewTextHandler(&log, nil))
	handler := NewHandler(config)
	for _, target := range []string{"/ready", "/config_dump", "/clusters", "/stats", "/log", "/live/records"} {
		ask(handler, "GET", target)
	}
	ask(handler, "GET", "/quitquitquit")
	ask(handler, "POST", "/quitquitquit", "Origin: http://evil.example")
	if log.Len() != 0 {
		t.Errorf("reading and refused requests are logged: %s", &log)
	}
	ask(handler, "POST", "/healthcheck/fail?"+strings.Repeat("x", 300))
	if got := log.String(); strings.Count(got, "\n") != 1 ||
		!strings.HasSuffix(got, ` msg="admin command" path=/healthcheck/fail query=`+strings.Repeat("x", 100)+"\n") {
		t.Errorf("%q", got)
	}
}

// counted counts the bytes that are read of an endless body.
type counted int

func (c *counted) Read(p []byte) (int, error) {
	*c += counted(len(p))
	return copy(p, bytes.Repeat([]byte("x"), len(p))), nil
}

func TestNoMoreOfABodyIsReadThanItsBound(t *testing.T) {
	handler := NewHandler(sample(new(commanded)))
	read := new(counted)
	request := httptest.NewRequest("POST", "/debug/pprof/goroutine", io.Reader(read))
	request.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	request.Host, request.RemoteAddr = "localhost:15000", "127.0.0.1:4711"
	handler.ServeHTTP(httptest.NewRecorder(), request)
	if *read == 0 || *read > maxBody+64<<10 {
		t.Errorf("%d bytes are read, want at most %d and one buffer", *read, maxBody)
	}
}

// The list names each path with its method and parameters, and no path that is not served.
func TestTheListNamesWhatIsServed(t *testing.T) {
	handler := NewHandler(sample(new(commanded)))
	help := ask(handler, "GET", "/help").Body.String()
	if unknown := ask(handler, "GET", "/reset_counters"); unknown.Code != 404 || !strings.Contains(unknown.Body.String(), help[strings.Index(help, "\n"):]) {
		t.Errorf("an unknown path: %d %s", unknown.Code, unknown.Body)
	}
	listed := 0
	for line := range strings.Lines(help) {
		path, _, found := strings.Cut(strings.TrimPrefix(line, "  "), ": ")
		if !found || !strings.HasPrefix(path, "/") {
			continue
		}
		listed++
		path, post := strings.CutSuffix(path, " (POST)")
		method := "GET"
		if post {
			method = "POST"
		}
		if got := ask(handler, method, path); got.Code == 404 || got.Code == 405 {
			t.Errorf("%s %s is listed and answers %d", method, path, got.Code)
		}
	}
	if listed != len(commands) {
		t.Errorf("%d of %d commands are listed", listed, len(commands))
	}
}

// The numbers are 64-bit and therefore strings, and fit together.
func TestMemoryIsTheRuntimes(t *testing.T) {
	got := ask(NewHandler(sample(new(commanded))), "GET", "/memory").Body.Bytes()
	var fields map[string]string
	if err := json.Unmarshal(got, &fields); err != nil {
		t.Fatalf("%v: %s", err, got)
	}
	value := func(name string) uint64 {
		n, err := strconv.ParseUint(fields[name], 10, 64)
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
		return n
	}
	if a, h, p := value("allocated"), value("heap_size"), value("total_physical_bytes"); a == 0 || a > h || h > p+value("pageheap_unmapped") || value("pageheap_free") > h {
		t.Errorf("%s", got)
	}
}

// The fields of drain, state and node come from the configuration, and uptime from the start.
func TestServerInfoDescribesTheAgent(t *testing.T) {
	config := sample(new(commanded))
	config.Ready = func() (string, bool) { return "DRAINING", false }
	var info struct {
		Version, State string
		Uptime         string `json:"uptime_current_epoch"`
		Options        struct {
			Concurrency int
			DrainTime   string `json:"drain_time"`
			Node        string `json:"service_node"`
		} `json:"command_line_options"`
		Node struct{ ID, Cluster string }
	}
	got := ask(NewHandler(config), "GET", "/server_info").Body.Bytes()
	if err := json.Unmarshal(got, &info); err != nil {
		t.Fatalf("%v: %s", err, got)
	}
	if info.Version != config.Version || info.State != "DRAINING" || info.Options.Concurrency != 2 || info.Options.DrainTime != "20s" ||
		info.Options.Node != config.Node.ID || info.Node.ID != config.Node.ID || info.Node.Cluster != config.Node.Cluster {
		t.Errorf("%s", got)
	}
	var seconds uint64
	if n, err := fmt.Sscanf(info.Uptime, "%ds", &seconds); n != 1 || err != nil || fmt.Sprintf("%ds", seconds) != info.Uptime {
		t.Errorf("uptime %q is not a whole number of seconds", info.Uptime)
	}
}

// Without a ring of log lines there is no log to print; with one it is printed as text.
func TestTheLogIsServedAsText(t *testing.T) {
	got := ask(NewHandler(sample(new(commanded))), "GET", "/log")
	if got.Body.String() != "the last lines\n" || got.Header().Get("Content-Type") != "text/plain; charset=UTF-8" {
		t.Errorf("%v %q", got.Header(), got.Body)
	}
}

// pilot-agent's readiness and dashboards ask for these names.
func TestStatsOfTheControlPlaneHaveEnvoysNames(t *testing.T) {
	for name, want := range map[string]string{
		"envoy_cluster_manager_cds_update_success":       "cluster_manager.cds.update_success",
		"envoy_listener_manager_lds_update_rejected":     "listener_manager.lds.update_rejected",
		"envoy_cluster_manager_active_clusters":          "cluster_manager.active_clusters",
		"envoy_server_initialization_time_ms":            "server.initialization_time_ms",
		"envoy_listener_manager_total_listeners_warming": "listener_manager.total_listeners_warming",
	} {
		if got := dotted(name, nil); got != want {
			t.Errorf("%s is %s, want %s", name, got, want)
		}
	}
}
