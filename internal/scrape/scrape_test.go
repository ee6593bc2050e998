package scrape_test

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/internal/scrape"
)

func TestMain(m *testing.M) { os.Exit(nettest.Main(m)) }

const ownText = "# HELP own_total Own.\n# TYPE own_total counter\nown_total 7\n"

func own(w io.Writer) error {
	_, err := io.WriteString(w, ownText)
	return err
}

// workload serves answer on loopback and returns its target.
func workload(t testing.TB, path string, answer http.HandlerFunc) scrape.Target {
	t.Helper()
	server := httptest.NewServer(answer)
	t.Cleanup(server.Close)
	return scrape.Target{Port: portOf(t, server.URL), Path: path}
}

func portOf(t testing.TB, address string) uint16 {
	t.Helper()
	u, err := url.Parse(address)
	if err != nil {
		t.Fatal(err)
	}
	port, err := strconv.ParseUint(u.Port(), 10, 16)
	if err != nil {
		t.Fatal(err)
	}
	return uint16(port)
}

func serves(contentType, body string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", contentType)
		io.WriteString(w, body)
	}
}

// agent is a handler behind a real server, with its log.
type agent struct {
	*httptest.Server
	log *lines
}

func start(t *testing.T, config scrape.Config) agent {
	t.Helper()
	log := new(lines)
	config.Log = slog.New(slog.NewTextHandler(log, nil))
	if config.Own == nil {
		config.Own = own
	}
	server := httptest.NewServer(scrape.NewHandler(config))
	t.Cleanup(server.Close)
	return agent{server, log}
}

type lines struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// get scrapes with header fields given as name, value. It fails the test unless the status is 200.
func (a agent) get(t testing.TB, fields ...string) (body string, header http.Header) {
	t.Helper()
	response, text := a.do(t, "GET", fields...)
	if response.StatusCode != 200 {
		t.Fatalf("%s: %s", response.Status, text)
	}
	return text, response.Header
}

func (a agent) do(t testing.TB, method string, fields ...string) (*http.Response, string) {
	t.Helper()
	request, err := http.NewRequestWithContext(t.Context(), method, a.URL, nil)
	if err != nil {
		panic(err) // the URL is the server's own
	}
	request.Header.Set("Accept-Encoding", "identity")
	for i := 0; i < len(fields); i += 2 {
		request.Header.Set(fields[i], fields[i+1])
	}
	response, err := a.Client().Do(request)
	if err != nil {
		t.Error(err)
		return new(http.Response), ""
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		t.Error(err)
	}
	return response, string(body)
}

const (
	textType        = "text/plain; version=0.0.4; charset=utf-8"
	openMetricsType = "application/openmetrics-text; version=1.0.0; charset=utf-8"
)

func report(dropped int, ups ...any) string {
	var b strings.Builder
	if len(ups) > 0 {
		b.WriteString("# HELP pillion_scrape_target_up 1 if this scrape of the workload succeeded.\n" +
			"# TYPE pillion_scrape_target_up gauge\n")
	}
	for i := 0; i < len(ups); i += 2 {
		target := ups[i].(scrape.Target)
		fmt.Fprintf(&b, "pillion_scrape_target_up{port=\"%d\",path=\"%s\"} %v\n", target.Port, target.Path, ups[i+1])
	}
	return b.String() + "# HELP pillion_scrape_dropped_series Series of the workload dropped from this scrape because of a conflict with other series.\n" +
		"# TYPE pillion_scrape_dropped_series gauge\npillion_scrape_dropped_series " + strconv.Itoa(dropped) + "\n"
}

func TestPartsOfBothFormatsBecomeOneInEither(t *testing.T) {
	first := workload(t, "/metrics?all=1", func(w http.ResponseWriter, r *http.Request) {
		if r.RequestURI != "/metrics?all=1" {
			t.Errorf("asked for %s", r.RequestURI)
		}
		serves("application/openmetrics-text; version=1.0.0", "# TYPE app counter\napp_total 1 # {trace=\"x\"} 1\n# TYPE own counter\nown_total 8\n# EOF\n")(w, r)
	})
	second := workload(t, "/", serves("text/plain", "# TYPE more gauge\nmore{a=\"b\"} 2\n# TYPE app_total counter\napp_total 9\napp_total{a=\"b\"} 3\n"))
	agent := start(t, scrape.Config{Targets: []scrape.Target{first, second}})

	body, header := agent.get(t)
	want := report(2, first, 1, second, 1) + ownText +
		"# TYPE app_total counter\napp_total 1\napp_total{a=\"b\"} 3\n# TYPE more gauge\nmore{a=\"b\"} 2\n"
	if body != want || header.Get("Content-Type") != textType {
		t.Errorf("%s:\n%s\nwant\n%s", header.Get("Content-Type"), body, want)
	}
	body, header = agent.get(t, "Accept", "application/openmetrics-text;version=1.0.0,text/plain;q=0.5")
	want = report(2, first, 1, second, 1) + strings.NewReplacer("HELP own_total", "HELP own", "TYPE own_total", "TYPE own").Replace(ownText) +
		"# TYPE app counter\napp_total 1 # {trace=\"x\"} 1\napp_total{a=\"b\"} 3\n# TYPE more gauge\nmore{a=\"b\"} 2\n# EOF\n"
	if body != want || header.Get("Content-Type") != openMetricsType {
		t.Errorf("%s:\n%s\nwant\n%s", header.Get("Content-Type"), body, want)
	}
	if agent.log.String() != "" {
		t.Errorf("logged %s", agent.log)
	}
}

func TestWithoutTargetsThereIsTheAgentsOwn(t *testing.T) {
	if body, _ := start(t, scrape.Config{}).get(t); body != report(0)+ownText {
		t.Errorf("answer:\n%s", body)
	}
}

func TestScrapeSucceedsWithoutFailedParts(t *testing.T) {
	zipped := func(size int) []byte {
		var b bytes.Buffer
		zip := gzip.NewWriter(&b)
		zip.Write(bytes.Repeat([]byte("#\n"), size/2))
		zip.Close()
		return b.Bytes()
	}
	good := workload(t, "/metrics", serves("", "good 1\n"))
	for name, c := range map[string]struct {
		answer http.HandlerFunc
		log    string
	}{
		"status":   {func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "no", 500) }, "answers 500 Internal Server Error"},
		"garbage":  {serves("text/plain", "good 1\n\x00\xff\xfe\n"), "line 2: not UTF-8"},
		"a page":   {serves("text/html", "<html>"), "neither text/plain nor application/openmetrics-text"},
		"protobuf": {serves("application/vnd.google.protobuf; proto=io.prometheus.client.MetricFamily", "\x0a\x01a"), "application/vnd.google.protobuf"},
		"cut off":  {serves("application/openmetrics-text", "a 1\n"), "does not end in # EOF"},
		"huge":     {func(w http.ResponseWriter, _ *http.Request) { w.Write(bytes.Repeat([]byte("#\n"), 6<<20)) }, "longer than 5242880 bytes"},
		"huge zipped": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Encoding", "gzip")
			w.Header().Set("Content-Type", "text/plain")
			w.Write(zipped(12 << 20))
		}, "longer than 5242880 bytes"},
		"zip cut off": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Encoding", "gzip")
			w.Header().Set("Content-Type", "text/plain")
			w.Write(zipped(100)[:20])
		}, "unexpected EOF"},
		"coding": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Encoding", "br")
			w.Header().Set("Content-Type", "text/plain")
		}, "was not requested"},
		"elsewhere": {func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "http://203.0.113.7/metrics", http.StatusFound)
		}, "redirected to another host"},
		"https": {func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "https://"+r.Host+"/", http.StatusFound)
		}, "redirected to another host"},
		"in circles":    {func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/", http.StatusFound) }, "redirected more than three times"},
		"hangs at once": {func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }, "context deadline exceeded"},
		"hangs midway": {func(w http.ResponseWriter, r *http.Request) {
			io.WriteString(w, "# x\n")
			w.(http.Flusher).Flush()
			<-r.Context().Done()
		}, "context deadline exceeded"},
		"breaks midway": {func(w http.ResponseWriter, r *http.Request) {
			io.WriteString(w, "# x\n")
			w.(http.Flusher).Flush()
			panic(http.ErrAbortHandler)
		}, "unexpected EOF"},
		"endless header": {func(w http.ResponseWriter, r *http.Request) { w.Header().Set("X", strings.Repeat("x", 100<<10)) }, "exceeded 65536 bytes"},
	} {
		t.Run(name, func(t *testing.T) {
			bad := workload(t, "/metrics", c.answer)
			agent := start(t, scrape.Config{Targets: []scrape.Target{bad, good}})
			timeout := "20"
			if strings.HasPrefix(name, "hangs") {
				timeout = "0.5"
			}
			body, _ := agent.get(t, "X-Prometheus-Scrape-Timeout-Seconds", timeout)
			if want := report(0, bad, 0, good, 1) + ownText + "# TYPE good untyped\ngood 1\n"; body != want {
				t.Errorf("answer:\n%s\nwant\n%s", body, want)
			}
			if log := agent.log.String(); !strings.Contains(log, c.log) || !strings.Contains(log, `level=WARN msg="scraping the workload failed" port=`) {
				t.Errorf("logged %swant %s", agent.log, c.log)
			}
		})
	}
	t.Run("refused", func(t *testing.T) {
		gone := httptest.NewServer(http.NotFoundHandler())
		gone.Close()
		bad := scrape.Target{Port: portOf(t, gone.URL), Path: "/"}
		agent := start(t, scrape.Config{Targets: []scrape.Target{bad}})
		if body, _ := agent.get(t); body != report(0, bad, 0)+ownText || !strings.Contains(agent.log.String(), "connection refused") {
			t.Errorf("answer:\n%s\nlog: %s", body, agent.log)
		}
	})
	t.Run("own", func(t *testing.T) {
		broken := errors.New("broken")
		agent := start(t, scrape.Config{Targets: []scrape.Target{good}, Own: func(w io.Writer) error {
			if broken != nil {
				return broken
			}
			return own(w)
		}})
		body, _ := agent.get(t)
		if body != report(0, good, 1)+"# TYPE good untyped\ngood 1\n" || !strings.Contains(agent.log.String(), `level=ERROR msg="gathering the agent's metrics failed" error=broken`) {
			t.Errorf("answer:\n%s\nlog: %s", body, agent.log)
		}
		broken = nil
		if body, _ = agent.get(t); !strings.Contains(body, ownText) || !strings.Contains(agent.log.String(), `level=INFO msg="gathering the agent's metrics works again"`) {
			t.Errorf("answer:\n%s\nlog: %s", body, agent.log)
		}
	})
}

// The bound of a scrape's memory does not depend on the number of targets.
func TestTargetsShareTheLimitsOfAScrape(t *testing.T) {
	samples := func(n int) string { return strings.Repeat("a 1\n", n) }
	bytes := func(n int) string { return strings.Repeat("#\n", n/2) }
	for _, c := range []struct {
		name    string
		targets int
		most    string
		more    string
		log     string
	}{
		{"samples of one", 1, samples(100_000), samples(100_001), "exceeds the limit of 100000 samples"},
		{"samples of four", 4, samples(25_000), samples(25_001), "exceeds the limit of 25000 samples"},
		{"bytes of four", 4, bytes(10 << 20 / 4), bytes(10<<20/4 + 2), "longer than 2621440 bytes"},
	} {
		t.Run(c.name, func(t *testing.T) {
			var targets []scrape.Target
			var ups []any
			for range c.targets - 1 {
				target := workload(t, "/", serves("", c.most))
				targets, ups = append(targets, target), append(ups, target, 1)
			}
			beyond := workload(t, "/", serves("", c.more))
			agent := start(t, scrape.Config{Targets: append(targets, beyond)})
			body, _ := agent.get(t)
			for _, up := range strings.SplitAfter(report(0, append(ups, beyond, 0)...), "\n") {
				if strings.HasPrefix(up, "pillion_scrape_target_up") && !strings.Contains(body, up) {
					t.Errorf("the answer lacks %s", up)
				}
			}
			if !strings.Contains(agent.log.String(), c.log) {
				t.Errorf("logged %swant %s", agent.log, c.log)
			}
		})
	}
}

func TestChangeIsLoggedOnce(t *testing.T) {
	answers := make(chan int, 1)
	target := workload(t, "/", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(<-answers) })
	agent := start(t, scrape.Config{Targets: []scrape.Target{target}})
	for _, c := range []struct{ code, lines int }{{200, 0}, {404, 1}, {500, 1}, {404, 1}, {200, 2}, {200, 2}, {404, 3}} {
		answers <- c.code
		agent.get(t)
		if n := strings.Count(agent.log.String(), "\n"); n != c.lines {
			t.Fatalf("%d lines after a %d, want %d:\n%s", n, c.code, c.lines, agent.log)
		}
	}
}

func TestScraperThatLeavesIsNotAFailureOfTheWorkload(t *testing.T) {
	asked := make(chan struct{})
	target := workload(t, "/", func(_ http.ResponseWriter, r *http.Request) { close(asked); <-r.Context().Done() })
	var log lines
	handler := scrape.NewHandler(scrape.Config{Own: own, Targets: []scrape.Target{target}, Log: slog.New(slog.NewTextHandler(&log, nil))})
	ctx, cancel := context.WithCancel(t.Context())
	go func() { <-asked; cancel() }()
	answer := httptest.NewRecorder()
	handler.ServeHTTP(answer, httptest.NewRequestWithContext(ctx, "GET", "/", nil))
	if log.String() != "" || answer.Body.Len() > 0 {
		t.Errorf("answered %q, logged %s", answer.Body, &log)
	}
}

func TestWorkloadReceivesUserAgentAndTimeout(t *testing.T) {
	requests := make(chan *http.Request, 1)
	target := workload(t, "/", func(_ http.ResponseWriter, r *http.Request) { requests <- r })
	agent := start(t, scrape.Config{Targets: []scrape.Target{target}})
	for _, c := range []struct {
		timeout  string
		from, to float64
	}{{"", 5, 9.5}, {"10", 5, 9.5}, {"2", 0.5, 1.8}, {"never", 5, 9.5}, {"-1", 5, 9.5}, {"0", 5, 9.5}, {"NaN", 5, 9.5}, {"1e99", 30, 59.5}, {"+Inf", 30, 59.5}} {
		agent.get(t, "User-Agent", "Prometheus/3", "X-Prometheus-Scrape-Timeout-Seconds", c.timeout)
		r := <-requests
		if timeout, err := strconv.ParseFloat(r.Header.Get("X-Prometheus-Scrape-Timeout-Seconds"), 64); err != nil || timeout > c.to || timeout < c.from {
			t.Errorf("timeout %q becomes %v, want %v at most", c.timeout, r.Header, c.to)
		}
		if want := fmt.Sprintf("localhost:%d", target.Port); r.Header.Get("User-Agent") != "Prometheus/3" || r.Host != want || r.Header.Get("Accept-Encoding") != "gzip" {
			t.Errorf("%s received %v", r.Host, r.Header)
		}
		if accept := r.Header.Get("Accept"); !strings.HasPrefix(accept, "text/plain;version=0.0.4,application/openmetrics-text;version=1.0.0;") {
			t.Errorf("accepts %s", accept)
		}
	}
	agent.get(t, "Accept", "application/openmetrics-text")
	if accept := (<-requests).Header.Get("Accept"); !strings.HasPrefix(accept, "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;") {
		t.Errorf("accepts %s", accept)
	}
}

func TestAddressOfTheWorkload(t *testing.T) {
	target := workload(t, "/", func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/" {
			http.Redirect(w, r, "/there", http.StatusFound)
		}
	})
	port := strconv.Itoa(int(target.Port))
	for _, c := range []struct {
		host    string
		refused string
		want    []string
	}{
		{"", "", []string{"127.0.0.1:" + port, "127.0.0.1:" + port}},
		{"", "127.0.0.1:" + port, []string{"127.0.0.1:" + port, "[::1]:" + port, "127.0.0.1:" + port, "[::1]:" + port}},
		{"198.51.100.2", "", []string{"198.51.100.2:" + port, "198.51.100.2:" + port}},
		{"2001:db8::1", "", []string{"[2001:db8::1]:" + port, "[2001:db8::1]:" + port}},
	} {
		var dialled []string
		agent := start(t, scrape.Config{Targets: []scrape.Target{target}, Host: c.host, Dial: func(ctx context.Context, network, addr string) (net.Conn, error) {
			dialled = append(dialled, addr)
			if addr == c.refused {
				return nil, &net.OpError{Op: "dial", Err: os.NewSyscallError("connect", syscall.ECONNREFUSED)}
			}
			return new(net.Dialer).DialContext(ctx, network, "127.0.0.1:"+port)
		}})
		if body, _ := agent.get(t); !strings.Contains(body, "} 1\n") || !slices.Equal(dialled, c.want) {
			t.Errorf("dialled %v, want %v:\n%s", dialled, c.want, body)
		}
	}
}

func TestGzipBothWays(t *testing.T) {
	target := workload(t, "/", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Encoding", "gzip")
		w.Header().Set("Content-Type", "text/plain")
		zip := gzip.NewWriter(w)
		io.WriteString(zip, "zipped 1\n")
		zip.Close()
	})
	agent := start(t, scrape.Config{Targets: []scrape.Target{target}})
	want := report(0, target, 1) + ownText + "# TYPE zipped untyped\nzipped 1\n"
	for accept, zipped := range map[string]bool{"gzip": true, "br, GZIP;q=0.5": true, "gzip;q=0": false, "gzip;q=x": false, "identity": false, "xgzip": false} {
		body, header := agent.get(t, "Accept-Encoding", accept)
		if (header.Get("Content-Encoding") == "gzip") != zipped {
			t.Errorf("%s: Content-Encoding %q", accept, header.Get("Content-Encoding"))
		}
		if zipped {
			zip, err := gzip.NewReader(strings.NewReader(body))
			if err != nil {
				t.Fatal(err)
			}
			plain, err := io.ReadAll(zip)
			if err != nil {
				t.Fatal(err)
			}
			body = string(plain)
		}
		if body != want {
			t.Errorf("%s:\n%s\nwant\n%s", accept, body, want)
		}
	}
}

func TestMethods(t *testing.T) {
	target := workload(t, "/", func(http.ResponseWriter, *http.Request) { t.Error("no need to ask the workload") })
	agent := start(t, scrape.Config{Targets: []scrape.Target{target}})
	if response, body := agent.do(t, "HEAD"); response.StatusCode != 200 || body != "" || response.Header.Get("Content-Type") != textType {
		t.Errorf("HEAD: %s %v %q", response.Status, response.Header, body)
	}
	for _, method := range []string{"POST", "PUT", "DELETE", "OPTIONS"} {
		if response, _ := agent.do(t, method); response.StatusCode != 405 || response.Header.Get("Allow") != "GET, HEAD" {
			t.Errorf("%s: %s %v", method, response.Status, response.Header)
		}
	}
}

func TestConcurrentScrapesAreBounded(t *testing.T) {
	asked, answer := make(chan struct{}), make(chan struct{})
	target := workload(t, "/", func(http.ResponseWriter, *http.Request) { asked <- struct{}{}; <-answer })
	agent := start(t, scrape.Config{Targets: []scrape.Target{target}})
	var scrapes sync.WaitGroup
	for range 2 {
		scrapes.Go(func() {
			if response, _ := agent.do(t, "GET"); response.StatusCode != 200 {
				t.Errorf("answer: %s", response.Status)
			}
		})
		<-asked
	}
	if response, _ := agent.do(t, "GET"); response.StatusCode != 503 {
		t.Errorf("the third: %s", response.Status)
	}
	close(answer)
	scrapes.Wait()
	go func() { <-asked }()
	agent.get(t)
}

func TestParseTargets(t *testing.T) {
	one := func(port uint16, path string) []scrape.Target { return []scrape.Target{{Port: port, Path: path}} }
	for _, c := range []struct {
		value string
		want  []scrape.Target
		err   string
	}{
		{"", nil, ""},
		{`{"scrape":"true","path":"/metrics","port":"8080"}`, one(8080, "/metrics"), ""},
		{`{"scrape":"","path":"","port":""}`, one(80, "/metrics"), ""},
		{`{}`, one(80, "/metrics"), ""},
		{`{"scrape":"yes","port":8080,"path":"stats?x=y","unknown":1}`, one(8080, "/stats?x=y"), ""},
		{`{"scrape":"false","port":"15020"}`, nil, ""},
		{`{"scrape":"true","port":"1","targets":[{"port":"8080"},{"port":9090,"path":"/b"},{"port":"8080","path":"/metrics"}]}`,
			[]scrape.Target{{Port: 8080, Path: "/metrics"}, {Port: 9090, Path: "/b"}}, ""},
		{`{"port":"15020"}`, nil, "port 15020 is the agent's own"},
		{`{"targets":[{"port":8080},{"port":15090}]}`, nil, "port 15090 is the agent's own"},
		{`{"port":"http"}`, nil, `invalid port "http"; use a number from 1 to 65535`},
		{`{"port":0}`, nil, `invalid port "0"`},
		{`{"port":65536}`, nil, `invalid port "65536"`},
		{`{"port":80.5}`, nil, `invalid port "80.5"`},
		{`{"port":true}`, nil, "invalid JSON: json"},
		{`{"scrape":true}`, nil, "invalid JSON: json"},
		{`{"port":`, nil, "invalid JSON: unexpected end"},
		{`{"path":"/%zz"}`, nil, `invalid path "/%zz"`},
		{`{"targets":[` + strings.Repeat(`{},`, 16) + `{}]}`, nil, "17 targets are more than 16"},
	} {
		got, err := scrape.ParseTargets(c.value, 15020, 15090)
		if !slices.Equal(got, c.want) || (err == nil) != (c.err == "") || err != nil && !strings.HasPrefix(err.Error(), c.err) {
			t.Errorf("%s: %v %v, want %v %s", c.value, got, err, c.want, c.err)
		}
	}
}

// The timeouts of the agent's servers are meant for short answers. A workload may take as long as the scraper waits.
func TestSlowWorkloadMayTakeLongerThanTheServersTimeouts(t *testing.T) {
	nettest.UnderLimit(t, 100*time.Millisecond, func(t testing.TB, limit time.Duration) {
		target := workload(t, "/metrics", func(w http.ResponseWriter, r *http.Request) {
			select {
			case <-time.After(3 * limit):
				io.WriteString(w, "slow 1\n")
			case <-r.Context().Done():
			}
		})
		server := httptest.NewUnstartedServer(scrape.NewHandler(scrape.Config{
			Own: own, Targets: []scrape.Target{target}, Log: slog.New(slog.DiscardHandler),
		}))
		server.Config.ReadTimeout, server.Config.WriteTimeout = limit, limit
		server.Start()
		defer server.Close()
		if body, _ := (agent{Server: server}).get(t); !strings.Contains(body, "\nslow 1\n") {
			t.Errorf("body = %q", body)
		}
	})
}
