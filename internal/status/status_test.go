package status_test

import (
	"bytes"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/healthz"
	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/internal/ownport"
	"github.com/pillion-proxy/pillion/internal/status"
)

func TestMain(m *testing.M) { os.Exit(nettest.Main(m)) }

// replying answers with a word and the method.
func replying(word string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, word+" "+r.Method) })
}

// port is a status port that counts its orders.
type port struct {
	http.Handler
	quits, drains int
	notReady      atomic.Bool
}

func newPort(change func(*status.Config)) *port {
	p := new(port)
	config := status.Config{
		Ready: healthz.NewHandler(healthz.Gate{Name: "door", Open: func() error {
			if p.notReady.Load() {
				return fmt.Errorf("locked")
			}
			return nil
		}}),
		Probers:   replying("probers"),
		Metrics:   replying("metrics"),
		Quit:      func() { p.quits++ },
		Drain:     func() { p.drains++ },
		Log:       slog.New(slog.DiscardHandler),
		Profiling: true,
	}
	if change != nil {
		change(&config)
	}
	p.Handler = status.NewHandler(config)
	return p
}

// ask sends a request from an address, with fields given as "Name: value".
func (p *port) ask(method, path, from, host string, fields ...string) (int, string) {
	request := httptest.NewRequest(method, path, nil)
	request.RemoteAddr, request.Host = from, host
	for _, field := range fields {
		name, value, _ := strings.Cut(field, ": ")
		request.Header.Set(name, value)
	}
	answer := httptest.NewRecorder()
	p.ServeHTTP(answer, request)
	return answer.Code, answer.Body.String()
}

const (
	here     = "127.0.0.1:40000"
	stranger = "198.51.100.7:40000"
	denied   = "Only requests from localhost are allowed\n"
	missing  = "404 page not found\n"
)

func TestPathsMethodsAndGuards(t *testing.T) {
	for _, c := range []struct {
		method, path, from string
		code               int
		body               string // "…": any
	}{
		{"GET", "/healthz/ready", stranger, 200, ""},
		{"POST", "/healthz/ready", stranger, 200, ""},
		{"HEAD", "/healthz/ready", stranger, 200, ""},
		{"GET", "/healthz/readyfoo", stranger, 404, missing},
		{"GET", "/healthz/live", stranger, 404, missing},
		{"GET", "/stats/prometheus", stranger, 200, "metrics GET"},
		{"POST", "/stats/prometheus?x=1", stranger, 200, "metrics POST"},
		{"GET", "/metrics", stranger, 200, "metrics GET"},
		{"GET", "/metrics/", stranger, 404, missing},
		{"GET", "/app-health/app/livez", stranger, 200, "probers GET"},
		{"POST", "/app-health/app/livez", stranger, 200, "probers POST"},
		{"GET", "/app-health/", stranger, 200, "probers GET"},
		{"GET", "/app-lifecycle/app/prestopz", stranger, 200, "probers GET"},
		{"POST", "/quitquitquit", here, 200, "OK"},
		{"GET", "/quitquitquit", here, 405, "Method Not Allowed\n"},
		{"HEAD", "/quitquitquit", here, 405, "…"},
		{"POST", "/quitquitquit", stranger, 403, denied},
		{"GET", "/quitquitquit", stranger, 403, denied},
		{"POST", "/drain", here, 200, "OK"},
		{"PUT", "/drain", here, 405, "Method Not Allowed\n"},
		{"POST", "/drain", stranger, 403, denied},
		{"POST", "/drain/", here, 404, missing},
		{"GET", "/debug/pprof/", here, 200, "…"},
		{"GET", "/debug/pprof/cmdline", here, 200, "…"},
		{"GET", "/debug/pprof/symbol", here, 200, "…"},
		{"GET", "/debug/pprof/heap", here, 200, "…"},
		{"GET", "/debug/pprof/goroutine?debug=1", here, 200, "…"},
		{"GET", "/debug/pprof/nonsense", here, 404, "…"},
		{"GET", "/debug/pprof/profile?seconds=121", here, 400, "seconds=121: must be 120 at most\n"},
		{"GET", "/debug/pprof/profile?seconds=NaN", here, 400, "seconds=NaN: must be 120 at most\n"},
		{"GET", "/debug/pprof/trace?seconds=1e9", here, 400, "seconds=1e9: must be 120 at most\n"},
		{"GET", "/debug/pprof/heap?seconds=1000", here, 400, "seconds=1000: must be 120 at most\n"},
		{"GET", "/debug/pprof/", stranger, 403, denied},
		{"GET", "/debug/pprof/heap", stranger, 403, denied},
		{"GET", "/debug/pprof/profile", stranger, 403, denied},
		{"GET", "/debug/vars", here, 404, missing},
		{"GET", "/debug/ndsz", here, 404, missing},
		{"GET", "/", here, 404, missing},
		{"GET", "/config_dump", here, 404, missing},
	} {
		p := newPort(nil)
		code, body := p.ask(c.method, c.path, c.from, "localhost:15020")
		if code != c.code || c.body != "…" && body != c.body {
			t.Errorf("%s %s from %s: %d %q, want %d %q", c.method, c.path, c.from, code, body, c.code, c.body)
		}
		wantQuits, wantDrains := 0, 0
		if code == 200 && c.path == "/quitquitquit" {
			wantQuits = 1
		}
		if code == 200 && c.path == "/drain" {
			wantDrains = 1
		}
		if p.quits != wantQuits || p.drains != wantDrains {
			t.Errorf("%s %s from %s: %d quits and %d drains", c.method, c.path, c.from, p.quits, p.drains)
		}
	}
}

func TestNotReadyIs503WithTheReasons(t *testing.T) {
	p := newPort(nil)
	p.notReady.Store(true)
	for _, method := range []string{"GET", "POST"} {
		if code, body := p.ask(method, "/healthz/ready", stranger, "pod:15020"); code != 503 || !strings.Contains(body, "door: locked") {
			t.Errorf("%s: %d %q", method, code, body)
		}
	}
}

func TestMetricsLocalOnlyRefusesTheNetwork(t *testing.T) {
	p := newPort(func(c *status.Config) { c.MetricsLocalOnly = true })
	for _, path := range []string{"/metrics", "/stats/prometheus"} {
		if code, body := p.ask("GET", path, stranger, "pod:15020"); code != 403 || body != denied {
			t.Errorf("%s from outside: %d %q", path, code, body)
		}
		if code, body := p.ask("GET", path, here, "localhost:15020"); code != 200 || body != "metrics GET" {
			t.Errorf("%s from here: %d %q", path, code, body)
		}
	}
}

func TestProfilesAreServedOnlyWithProfiling(t *testing.T) {
	p := newPort(func(c *status.Config) { c.Profiling = false })
	for _, path := range []string{"", "profile", "heap"} {
		if code, _ := p.ask("GET", "/debug/pprof/"+path, here, "localhost:15020"); code != 404 {
			t.Errorf("%q: %d", path, code)
		}
	}
}

func TestOrdersAreAcceptedOnlyFromThisPodAndNotFromPages(t *testing.T) {
	for _, c := range []struct {
		from, host string
		fields     []string
		code       int
	}{
		{"127.0.0.1:1", "localhost:15020", nil, 200},
		{"127.0.0.1:1", "LOCALHOST", nil, 200},
		{"127.0.0.1:1", "127.0.0.1:15020", nil, 200},
		{"127.0.0.1:1", "127.1.2.3", nil, 200},
		{"127.1.2.3:1", "localhost:15020", nil, 200},
		{"[::1]:1", "[::1]:15020", nil, 200},
		{"[::1]:1", "[::1]", nil, 200},
		{"[::ffff:127.0.0.1]:1", "[::ffff:127.0.0.1]:15020", nil, 200},
		{"127.0.0.1:1", "", nil, 200}, // HTTP/1.0
		{"127.0.0.1:1", "localhost:15020", []string{"Origin: http://localhost:15020"}, 200},
		{"127.0.0.1:1", "localhost:15020", []string{"Sec-Fetch-Site: same-origin"}, 200},

		{"198.51.100.7:1", "localhost:15020", nil, 403},
		{"10.0.0.5:1", "127.0.0.1:15020", nil, 403},
		{"128.0.0.1:1", "localhost:15020", nil, 403},
		{"[2001:db8::1]:1", "[::1]:15020", nil, 403},
		{"[::6]:1", "[::1]:15020", nil, 403},
		{"127.0.0.6:1", "localhost:15020", nil, 403}, // a client, carried by inbound
		{"[::ffff:127.0.0.6]:1", "localhost:15020", nil, 403},
		{"[::ffff:198.51.100.7]:1", "localhost:15020", nil, 403},
		{"@", "localhost:15020", nil, 403},
		{"", "localhost:15020", nil, 403},
		{"127.0.0.1:1", "rebound.example:15020", nil, 403},
		{"127.0.0.1:1", "localhost.example:15020", nil, 403},
		{"127.0.0.1:1", "0.0.0.0:15020", nil, 403},
		{"127.0.0.1:1", "[::]:15020", nil, 403},
		{"127.0.0.1:1", "10.0.0.5:15020", nil, 403},
		{"127.0.0.1:1", "rebound.example", []string{"Origin: http://rebound.example"}, 403},
		{"127.0.0.1:1", "localhost:15020", []string{"Origin: http://evil.example"}, 403},
		{"127.0.0.1:1", "localhost:15020", []string{"Origin: http://localhost:3000"}, 403},
		{"127.0.0.1:1", "localhost:15020", []string{"Origin: null"}, 403},
		{"127.0.0.1:1", "localhost:15020", []string{"Sec-Fetch-Site: cross-site"}, 403},
		{"127.0.0.1:1", "localhost:15020", []string{"Sec-Fetch-Site: same-site"}, 403},
	} {
		for _, path := range []string{"/quitquitquit", "/drain"} {
			p := newPort(nil)
			code, body := p.ask("POST", path, c.from, c.host, c.fields...)
			if code != c.code || code == 200 && body != "OK" || code == 403 && body != denied {
				t.Errorf("%s from %s for %q with %q: %d %q, want %d", path, c.from, c.host, c.fields, code, body, c.code)
			}
			if obeyed := p.quits + p.drains; (obeyed == 1) != (c.code == 200) {
				t.Errorf("%s from %s for %q with %q is executed %d times", path, c.from, c.host, c.fields, obeyed)
			}
		}
	}
}

// serve serves p as the agent does, with other limits, and returns its address.
func serve(t testing.TB, p http.Handler, limit time.Duration) string {
	t.Helper()
	listener, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := ownport.NewServer(p, slog.New(slog.DiscardHandler))
	server.ReadTimeout, server.WriteTimeout = limit, limit
	served := make(chan error, 1)
	go func() { served <- server.Serve(ownport.Bound(listener)) }()
	t.Cleanup(func() {
		server.Close()
		<-served
	})
	return listener.Addr().String()
}

func TestTheAnswerIsSentBeforeAnOrderIsExecuted(t *testing.T) {
	asked, answered := make(chan struct{}), make(chan struct{})
	address := serve(t, newPort(func(c *status.Config) {
		c.Quit = func() {
			close(asked)
			<-answered // as if the process had ended
		}
	}), nettest.Patience)
	conn, err := net.Dial("tcp4", address)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(nettest.Patience))
	io.WriteString(conn, "POST /quitquitquit HTTP/1.1\r\nHost: localhost\r\n\r\n")
	var answer []byte
	for b := make([]byte, 1<<10); !bytes.HasSuffix(answer, []byte("\r\n\r\nOK")); {
		n, err := conn.Read(b)
		if err != nil {
			t.Fatalf("after %q: %v", answer, err)
		}
		answer = append(answer, b[:n]...)
	}
	<-asked
	close(answered)
}

func TestAProfileMayTakeLongerThanOtherAnswers(t *testing.T) {
	nettest.UnderLimit(t, 900*time.Millisecond, func(t testing.TB, limit time.Duration) {
		address := serve(t, newPort(nil), limit)
		defer http.DefaultClient.CloseIdleConnections()
		seconds := limit/time.Second + 1
		for _, path := range []string{"profile", "trace"} {
			begin := time.Now()
			response, err := http.Get(fmt.Sprintf("http://%s/debug/pprof/%s?seconds=%d", address, path, seconds))
			if err != nil {
				t.Fatal(err)
			}
			body, err := io.ReadAll(response.Body)
			response.Body.Close()
			if took := time.Since(begin); err != nil || response.StatusCode != 200 || len(body) == 0 || took < limit {
				t.Errorf("%s: %d, %d bytes after %v, %v", path, response.StatusCode, len(body), took, err)
			}
		}
	})
}
