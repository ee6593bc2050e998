package probe_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/internal/ownport"
	"github.com/pillion-proxy/pillion/internal/probe"
)

func TestMain(m *testing.M) { os.Exit(nettest.Main(m)) }

var loopback = netip.MustParseAddr("127.0.0.1")

func TestProbersThatCannotWorkAreRefusedWithAReason(t *testing.T) {
	const path = "/app-health/app/livez"
	tcp := func(port string) string { return `{"` + path + `": {"tcpSocket": {"port": ` + port + `}}}` }
	get := func(more string) string { return `{"` + path + `": {"httpGet": {"port": 80` + more + `}}}` }
	for _, c := range []struct{ text, want string }{
		{`{`, "must be a JSON object"},
		{`[]`, "must be a JSON object"},
		{tcp("80") + "x", "must be a JSON object"},
		{`{"/app-health/app/healthz": {"tcpSocket": {"port": 80}}}`, `"/app-health/app/healthz": the path must be`},
		{`{"/app-health//livez": {"tcpSocket": {"port": 80}}}`, "the path must be"},
		{`{"/app-health/a/b/livez": {"tcpSocket": {"port": 80}}}`, "the path must be"},
		{`{"/x/app-health/a/livez": {"tcpSocket": {"port": 80}}}`, "the path must be"},
		{`{"": {"tcpSocket": {"port": 80}}}`, "the path must be"},
		{`{"` + path + `": {}}`, path + `": 0 handlers: give exactly one of httpGet, tcpSocket and grpc`},
		{`{"` + path + `": null}`, "0 handlers"},
		{`{"` + path + `": {"exec": {"command": ["true"]}}}`, "0 handlers"},
		{`{"` + path + `": {"tcpSocket": {"port": 80}, "grpc": {"port": 80}}}`, "2 handlers"},
		{`{"` + path + `": {"tcpSocket": {"port": 80}, "timeoutSeconds": -1}}`, "timeoutSeconds -1: must be 0 or more"},
		{`{"` + path + `": {"tcpSocket": {"port": 80}, "timeoutSeconds": "1"}}`, "timeoutSeconds"},
		{`{"` + path + `": {"tcpSocket": {}}}`, path + `": no port`},
		{tcp(`"http"`), path + `": port "http" is a name: give the number`},
		{tcp(`"80"`), `port "80" is a name`},
		{tcp("0"), "port 0: must be a number from 1 to 65535"},
		{tcp("65536"), "port 65536: must be"},
		{tcp("-1"), "port -1: must be"},
		{tcp("80.5"), "port 80.5: must be"},
		{tcp("null"), "port null: must be"},
		{get(`, "scheme": "FTP"`), `scheme "FTP": must be HTTP or HTTPS`},
		{`{"` + path + `": {"grpc": {"port": 80, "service": "` + strings.Repeat("x", 1025) + `"}}}`, "1025 bytes: must be 1024 at most"},
	} {
		_, err := probe.Parse(c.text, probe.Config{Address: loopback})
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%.200s:\n%v\nwant %s", c.text, err, c.want)
		}
	}
	if _, err := probe.Parse(tcp("80"), probe.Config{}); !errors.Is(err, probe.ErrNoAddress) {
		t.Errorf("without an address: %v", err)
	}
	for _, text := range []string{"", "{}", "null"} {
		if _, err := probe.Parse(text, probe.Config{}); err != nil {
			t.Errorf("%q: %v", text, err)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add(`{"/app-health/app/livez": {"tcpSocket": {"port": 80}}}`)
	f.Add(`{"/app-lifecycle/app/prestopz": {"httpGet": {"port": 80, "path": "/%zz?a b", "scheme": "https"}}}`)
	f.Add(`{"/app-health/app/startupz": {"grpc": {"port": 80, "service": null}, "timeoutSeconds": 1}}`)
	f.Fuzz(func(t *testing.T, text string) {
		probers, err := probe.Parse(text, probe.Config{Address: loopback, Dial: noDial})
		if (err == nil) != (probers != nil) {
			t.Errorf("%v and %v", probers, err)
		}
		var recorded map[string]json.RawMessage
		if err != nil || json.Unmarshal([]byte(text), &recorded) != nil {
			return
		}
		for path := range recorded {
			request := httptest.NewRequest("GET", "/", nil)
			request.URL.Path = path
			answer := httptest.NewRecorder()
			probers.ServeHTTP(answer, request)
			if answer.Code != 500 || strings.Count(strings.TrimPrefix(answer.Body.String(), path), "\n") != 1 {
				t.Errorf("%q: %d %q", path, answer.Code, answer.Body)
			}
		}
	})
}

func noDial(_ context.Context, _, address string) (net.Conn, error) {
	return nil, fmt.Errorf("no route to %s", address)
}

// kubelet requests the probes of one container. They are served as by the agent.
type kubelet struct {
	t      testing.TB
	url    string
	client *http.Client
}

// newKubelet serves probers: the JSON of each by the last element of its path.
func newKubelet(t testing.TB, config probe.Config, probers map[string]string) *kubelet {
	t.Helper()
	return newLimitedKubelet(t, config, probers, nettest.Patience)
}

// newLimitedKubelet is newKubelet with the limit of the port's server for other answers.
func newLimitedKubelet(t testing.TB, config probe.Config, probers map[string]string, limit time.Duration) *kubelet {
	t.Helper()
	recorded := make(map[string]json.RawMessage)
	for name, prober := range probers {
		recorded["/app-health/app/"+name] = json.RawMessage(prober)
	}
	text, err := json.Marshal(recorded)
	if err != nil {
		t.Fatal(err)
	}
	if !config.Address.IsValid() {
		config.Address = loopback
	}
	handler, err := probe.Parse(string(text), config)
	if err != nil {
		t.Fatal(err)
	}
	server := httptest.NewUnstartedServer(handler)
	server.Config = ownport.NewServer(handler, slog.New(slog.DiscardHandler))
	server.Config.ReadTimeout, server.Config.WriteTimeout = limit, limit
	server.Start()
	t.Cleanup(func() {
		server.Close()
		handler.Close()
	})
	return &kubelet{t, server.URL + "/app-health/app/", server.Client()}
}

// get requests a probe and returns status and body.
func (a *kubelet) get(name string) (int, string) {
	a.t.Helper()
	status, body, _ := a.do("GET", name, "", nil)
	return status, body
}

func (a *kubelet) do(method, name, host string, header http.Header) (int, string, http.Header) {
	a.t.Helper()
	request, err := http.NewRequest(method, a.url+name, nil)
	if err != nil {
		a.t.Fatal(err)
	}
	request.Host = host
	maps.Copy(request.Header, header)
	response, err := a.client.Do(request)
	if err != nil {
		a.t.Fatal(err)
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		a.t.Fatal(err)
	}
	return response.StatusCode, string(body), response.Header
}

// fails asserts a 500 with one line that has each of want.
func (a *kubelet) fails(name string, want ...string) {
	a.t.Helper()
	status, body := a.get(name)
	for _, part := range append(want, "/app-health/app/"+name) {
		if status != 500 || !strings.Contains(body, part) || strings.Index(body, "\n") != len(body)-1 {
			a.t.Errorf("%s: %d %q, want 500 and a line with %q", name, status, body, part)
		}
	}
}

// workload serves handler and returns its port.
func workload(t testing.TB, handler http.HandlerFunc) string {
	t.Helper()
	server := httptest.NewServer(handler)
	t.Cleanup(server.Close)
	return portOf(server.Listener.Addr())
}

func portOf(address net.Addr) string {
	return fmt.Sprint(address.(*net.TCPAddr).Port)
}

// speaker is a workload that sends text on each connection and then reads to its end.
func speaker(t *testing.T, text string) string {
	t.Helper()
	listener, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var busy sync.WaitGroup
	busy.Go(func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			busy.Go(func() {
				defer conn.Close()
				io.WriteString(conn, text)
				conn.(*net.TCPConn).CloseWrite()
				io.Copy(io.Discard, conn)
			})
		}
	})
	t.Cleanup(func() {
		listener.Close()
		busy.Wait()
	})
	return portOf(listener.Addr())
}

func TestAnUnknownProbeIs400(t *testing.T) {
	a := newKubelet(t, probe.Config{}, nil)
	if status, body := a.get("livez"); status != 400 || body != "app prober config does not exists for /app-health/app/livez\n" {
		t.Errorf("%d %q", status, body)
	}
}

func TestTheWorkloadReceivesTheKubeletsFields(t *testing.T) {
	type heard struct {
		method, host, uri string
		header            http.Header
	}
	requests := make(chan heard, 1)
	var from atomic.Value
	port := workload(t, func(_ http.ResponseWriter, r *http.Request) {
		from.Store(r.RemoteAddr)
		requests <- heard{r.Method, r.Host, r.RequestURI, r.Header}
	})
	a := newKubelet(t, probe.Config{StatusPort: 15020}, map[string]string{
		"livez":  `{"httpGet": {"port": ` + port + `, "path": "/ready?x=1&y=%20#z", "httpHeaders": [{"name": "Not", "value": "again"}]}, "timeoutSeconds": 5}`,
		"readyz": `{"httpGet": {"port": ` + port + `, "path": "no%zz/slash"}, "timeoutSeconds": 5}`,
	})
	kubelet := http.Header{"User-Agent": {"kube-probe/1.34"}, "Accept": {"*/*"}, "Several": {"a", "b"}, "Accept-Encoding": {"identity"}}
	all := maps.Clone(kubelet)
	maps.Copy(all, http.Header{"Connection": {"close, x-hop"}, "X-Hop": {"1"}, "Keep-Alive": {"5"}, "Te": {"trailers"}})
	closing := maps.Clone(kubelet)
	closing["Connection"] = []string{"close"}
	for _, c := range []struct {
		method, name, host string
		header             http.Header
		want               heard
	}{
		{"GET", "livez", "192.0.2.1:15020", kubelet, heard{"GET", "192.0.2.1:" + port, "/ready?x=1&y=%20", closing}},
		{"GET", "livez", "[2001:db8::1]:15020", kubelet, heard{"GET", "[2001:db8::1]:" + port, "/ready?x=1&y=%20", closing}},
		{"GET", "livez", "192.0.2.1:15021", kubelet, heard{"GET", "192.0.2.1:15021", "/ready?x=1&y=%20", closing}},
		{"GET", "livez", "shop.example", all, heard{"GET", "shop.example", "/ready?x=1&y=%20", closing}},
		{"POST", "readyz", "shop.example:15020", kubelet, heard{"GET", "shop.example:" + port, "/no%25zz/slash", closing}},
		{"GET", "readyz", "a", http.Header{"User-Agent": {""}, "Accept-Encoding": {"a"}},
			heard{"GET", "a", "/no%25zz/slash", http.Header{"Connection": {"close"}, "Accept-Encoding": {"a"}}}},
	} {
		if status, body, _ := a.do(c.method, c.name, c.host, c.header); status != 200 {
			t.Fatalf("%s for %s: %d %s", c.name, c.host, status, body)
		}
		if got := <-requests; got.method != c.want.method || got.host != c.want.host || got.uri != c.want.uri ||
			!maps.EqualFunc(got.header, c.want.header, slices.Equal) {
			t.Errorf("%s %s for %s: the workload receives\n%v, want\n%v", c.method, c.name, c.host, got, c.want)
		}
	}
	if address := fmt.Sprint(from.Load()); !strings.HasPrefix(address, "127.0.0.6:") {
		t.Errorf("the probe comes from %s, want a source that the rules let pass", address)
	}
}

func TestTheKubeletReceivesOnlyStatusAndBody(t *testing.T) {
	long := strings.Repeat("x", 20<<10)
	port := workload(t, func(w http.ResponseWriter, r *http.Request) {
		var status int
		fmt.Sscanf(r.URL.Query().Get("status"), "%d", &status)
		w.Header().Set("Content-Type", "text/html")
		w.Header().Set("X-Secret", "1")
		w.Header().Set("Set-Cookie", "a=b")
		w.WriteHeader(status)
		io.WriteString(w, r.URL.Query().Get("body"))
		if r.URL.Query().Has("long") {
			io.WriteString(w, long)
		}
	})
	for _, c := range []struct {
		query  string
		status int
		body   string
	}{
		{"status=200&body=fine", 200, "fine"},
		{"status=204", 204, ""},
		{"status=299&body=odd", 299, "odd"},
		{"status=304", 200, ""},
		{"status=302&body=without+Location", 200, "without Location"},
		{"status=404&body=<script>", 404, "<script>"},
		{"status=503&body=starting", 503, "starting"},
		{"status=999", 999, ""},
		{"status=200&long", 200, long[:10<<10]},
		{"status=500&long", 500, long[:10<<10]},
	} {
		a := newKubelet(t, probe.Config{}, map[string]string{
			"livez": `{"httpGet": {"port": ` + port + `, "path": "/?` + c.query + `"}, "timeoutSeconds": 5}`,
		})
		status, body, header := a.do("GET", "livez", "", nil)
		if status != c.status || body != c.body {
			t.Errorf("%s: %d %.100q", c.query, status, body)
		}
		header.Del("Date")
		header.Del("Content-Length")
		if want := (http.Header{"Content-Type": {"text/plain; charset=utf-8"}, "X-Content-Type-Options": {"nosniff"}}); !maps.EqualFunc(header, want, slices.Equal) {
			t.Errorf("%s: fields %v, want %v", c.query, header, want)
		}
	}
}

func TestAFailedProbeHasAReason(t *testing.T) {
	get := func(port string) string {
		return `{"httpGet": {"port": ` + port + `, "path": "/x"}, "timeoutSeconds": 60}`
	}
	silent, err := net.Listen("tcp4", "127.0.0.1:0") // accepts connections and sends nothing
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { silent.Close() })
	closed, mute := portOf(net.TCPAddrFromAddrPort(nettest.Refusing(t))), portOf(silent.Addr())
	for name, c := range map[string]struct {
		prober string
		want   []string
	}{
		"HTTP refused":       {get(closed), []string{"http://127.0.0.1:" + closed + "/x", "connection refused"}},
		"TCP refused":        {`{"tcpSocket": {"port": ` + closed + `}}`, []string{"tcp://127.0.0.1:" + closed, "connection refused"}},
		"gRPC refused":       {`{"grpc": {"port": ` + closed + `}, "timeoutSeconds": 1}`, []string{"grpc://127.0.0.1:" + closed, "connection refused"}},
		"HTTP in silence":    {strings.Replace(get(mute), ": 60", ": 1", 1), []string{"no answer within 1s"}},
		"gRPC in silence":    {`{"grpc": {"port": ` + mute + `}, "timeoutSeconds": 1}`, []string{"no answer within 1s"}},
		"gRPC without time":  {`{"grpc": {"port": ` + mute + `}}`, []string{"timeoutSeconds is 0", "set it to 1 or more"}},
		"the end":            {get(speaker(t, "")), []string{"EOF"}},
		"no HTTP":            {get(speaker(t, "220 \nmail\r\n\r\n")), []string{"malformed HTTP"}},
		"a status below 100": {get(speaker(t, "HTTP/1.1 099 x\r\nContent-Length: 0\r\n\r\n")), []string{"answers 99", "final status"}},
		"another protocol":   {get(speaker(t, "HTTP/1.1 101 x\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n")), []string{"answers 101"}},
		"half a body":        {get(speaker(t, "HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf")), []string{"reading the body", "EOF"}},
		"half a chunk":       {get(speaker(t, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\nhalf")), []string{"reading the body"}},
		"a head of a MiB":    {get(speaker(t, "HTTP/1.1 200 OK\r\nA: "+strings.Repeat("x", 1<<20)+"\r\n\r\n")), []string{"exceeded"}},
		"a long bad line":    {get(speaker(t, strings.Repeat("x ", 5000)+"\r\n\r\n")), []string{"malformed HTTP"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			a := newKubelet(t, probe.Config{}, map[string]string{"livez": c.prober})
			a.fails("livez", c.want...)
			if _, body := a.get("livez"); len(body) > 700 {
				t.Errorf("a reason of %d bytes", len(body))
			}
		})
	}
}

func TestAProbeMayTakeLongerThanOtherAnswersOfThePort(t *testing.T) {
	nettest.UnderLimit(t, 100*time.Millisecond, func(t testing.TB, others time.Duration) {
		port := workload(t, func(w http.ResponseWriter, r *http.Request) {
			select {
			case <-time.After(3 * others):
				io.WriteString(w, "at last")
			case <-r.Context().Done():
			}
		})
		for _, limit := range []string{"0", "60"} {
			a := newLimitedKubelet(t, probe.Config{}, map[string]string{
				"livez": `{"httpGet": {"port": ` + port + `}, "timeoutSeconds": ` + limit + `}`,
			}, others)
			if status, body := a.get("livez"); status != 200 || body != "at last" {
				t.Errorf("with timeoutSeconds %s: %d %q", limit, status, body)
			}
		}
	})
}

func TestAProbeEndsWithItsClient(t *testing.T) {
	for name, handler := range map[string]string{"HTTP": "httpGet", "TCP": "tcpSocket", "gRPC": "grpc"} {
		t.Run(name, func(t *testing.T) {
			dialled, ended := make(chan struct{}), make(chan struct{})
			a := newKubelet(t, probe.Config{Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
				close(dialled)
				<-ctx.Done() // a workload that does not accept
				close(ended)
				return nil, ctx.Err()
			}}, map[string]string{"livez": `{"` + handler + `": {"port": 80}, "timeoutSeconds": 600}`})
			conn, err := net.Dial("tcp", strings.TrimPrefix(strings.TrimSuffix(a.url, "/app-health/app/"), "http://"))
			if err != nil {
				t.Fatal(err)
			}
			io.WriteString(conn, "GET /app-health/app/livez HTTP/1.1\r\nHost: a\r\n\r\n")
			<-dialled
			conn.Close()
			select {
			case <-ended:
			case <-time.After(nettest.Patience):
				t.Error("the dial continues")
			}
		})
	}
}

// A client that holds as many probes as may run evicts only its own.
func TestConcurrentProbesAreBoundedAndTheKubeletsStay(t *testing.T) {
	const most = 32
	arrived, leave := make(chan struct{}, 2*most), make(chan struct{})
	port := workload(t, func(_ http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/slow" {
			arrived <- struct{}{}
			<-leave
		}
	})
	ours := newKubelet(t, probe.Config{}, map[string]string{
		"livez":  `{"httpGet": {"path": "/slow", "port": ` + port + `}, "timeoutSeconds": 60}`,
		"readyz": `{"httpGet": {"port": ` + port + `}, "timeoutSeconds": 60}`,
	})
	elsewhere := &http.Transport{DialContext: (&net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 2)}}).DialContext}
	t.Cleanup(elsewhere.CloseIdleConnections)
	other := &kubelet{t, ours.url, &http.Client{Transport: elsewhere}}
	var all sync.WaitGroup
	all.Go(func() { // the oldest probe
		if status, body := ours.get("livez"); status != 200 {
			t.Errorf("the kubelet's first probe: %d %q", status, body)
		}
	})
	<-arrived
	var refused atomic.Int32
	for range most { // one above the limit
		all.Go(func() {
			switch status, body := other.get("livez"); {
			case status == 503 && strings.Contains(body, "32 probes are running"):
				refused.Add(1)
			case status != 200:
				t.Errorf("the other client's probe: %d %q", status, body)
			}
		})
		<-arrived // otherwise it could be evicted before it reaches the workload
	}
	nettest.Eventually(t, "the eviction of a probe", func() bool { return refused.Load() == 1 })
	if status, body := ours.get("readyz"); status != 200 {
		t.Errorf("the kubelet's probe while the limit is reached: %d %q", status, body)
	}
	nettest.Eventually(t, "the eviction of another probe", func() bool { return refused.Load() == 2 })
	if status, body := other.get("readyz"); status != 200 { // evicted probes have made room
		t.Errorf("a later probe of the other client: %d %q", status, body)
	}
	close(leave)
	all.Wait()
	if n := refused.Load(); n != 2 {
		t.Errorf("%d probes of the other client were evicted, want 2", n)
	}
}

func TestRedirectsAreFollowedToTheSameHostOnly(t *testing.T) {
	var port string
	port = workload(t, func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/down":
			var n int
			fmt.Sscanf(r.URL.RawQuery, "%d", &n)
			if n > 0 {
				http.Redirect(w, r, fmt.Sprintf("/down?%d", n-1), http.StatusFound)
				return
			}
			io.WriteString(w, "down")
		case "/missing":
			http.Redirect(w, r, "http://127.0.0.1:"+port+"/nowhere", http.StatusMovedPermanently)
		case "/away":
			http.Redirect(w, r, "http://login.example/", http.StatusFound)
		case "/strange":
			w.Header().Set("Location", "http://[::1/")
			w.WriteHeader(http.StatusFound)
		default:
			w.WriteHeader(http.StatusTeapot)
		}
	})
	for path, want := range map[string]int{
		"/down?1": 200, "/down?10": 200, "/down?11": 500, "/missing": 418, "/away": 200, "/strange": 500,
	} {
		a := newKubelet(t, probe.Config{}, map[string]string{
			"livez": `{"httpGet": {"port": ` + port + `, "path": "` + path + `"}, "timeoutSeconds": 5}`,
		})
		status, body, header := a.do("GET", "livez", "", nil)
		if status != want || header.Get("Location") != "" {
			t.Errorf("%s: %d %q, want %d", path, status, body, want)
		}
		if path == "/down?11" && !strings.Contains(body, "stopped after 10 redirects") {
			t.Errorf("%s: %q", path, body)
		}
	}
}

func TestHTTPSIsNotVerifiedAndHTTP2IsOptional(t *testing.T) {
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, r.Proto) }))
	server.EnableHTTP2 = true
	server.StartTLS()
	defer server.Close()
	for _, keepAlive := range []bool{false, true} {
		for _, c := range []struct {
			http2 bool
			want  string
		}{{false, "HTTP/1.1"}, {true, "HTTP/2.0"}} {
			a := newKubelet(t, probe.Config{HTTP2: c.http2, KeepAlive: keepAlive}, map[string]string{
				"livez": `{"httpGet": {"port": ` + portOf(server.Listener.Addr()) + `, "scheme": "HTTPS"}, "timeoutSeconds": 5}`,
			})
			for range 2 {
				if status, body := a.get("livez"); status != 200 || body != c.want {
					t.Errorf("%v: %d %q", c, status, body)
				}
			}
		}
	}
}

func TestConnectionsAreKeptOnlyWithKeepAlive(t *testing.T) {
	for keep, want := range map[bool]int32{false: 3, true: 1} {
		var opened atomic.Int32
		server := httptest.NewUnstartedServer(http.NotFoundHandler())
		server.Config.ConnState = func(_ net.Conn, state http.ConnState) {
			if state == http.StateNew {
				opened.Add(1)
			}
		}
		server.Start()
		a := newKubelet(t, probe.Config{KeepAlive: keep}, map[string]string{
			"livez": `{"httpGet": {"port": ` + portOf(server.Listener.Addr()) + `}, "timeoutSeconds": 5}`,
		})
		for range 3 {
			// The kubelet closes its own connection each time. That must not close the probe's.
			if status, _, _ := a.do("GET", "livez", "", http.Header{"Connection": {"close"}}); status != 404 {
				t.Errorf("status %d", status)
			}
		}
		server.Close()
		if got := opened.Load(); got != want {
			t.Errorf("keep-alive %t: %d connections, want %d", keep, got, want)
		}
	}
}

func TestATCPProbeNeedsOnlyAConnection(t *testing.T) {
	a := newKubelet(t, probe.Config{}, map[string]string{"livez": `{"tcpSocket": {"port": ` + speaker(t, "") + `}}`})
	if status, body := a.get("livez"); status != 200 || body != "" {
		t.Errorf("%d %q", status, body)
	}
}

func TestProbesGoToTheWorkloadsAddress(t *testing.T) {
	for _, c := range []struct {
		address   string
		localhost bool
		want      string
	}{
		{"192.0.2.1", false, "192.0.2.1:80"},
		{"::ffff:192.0.2.1", false, "192.0.2.1:80"},
		{"2001:db8::1", false, "[2001:db8::1]:80"},
		{"192.0.2.1", true, "127.0.0.1:80"},
		{"2001:db8::1", true, "[::1]:80"},
		{"", true, "127.0.0.1:80"},
	} {
		for handler, scheme := range map[string]string{"httpGet": "http", "tcpSocket": "tcp", "grpc": "grpc"} {
			config := probe.Config{Localhost: c.localhost, Dial: noDial}
			if c.address != "" {
				config.Address = netip.MustParseAddr(c.address)
			}
			probers, err := probe.Parse(`{"/app-lifecycle/app/prestopz": {"`+handler+`": {"port": 80}, "timeoutSeconds": 1}}`, config)
			if err != nil {
				t.Fatal(err)
			}
			answer := httptest.NewRecorder()
			probers.ServeHTTP(answer, httptest.NewRequest("GET", "/app-lifecycle/app/prestopz", nil))
			if body := answer.Body.String(); answer.Code != 500 || !strings.Contains(body, scheme+"://"+c.want) || !strings.Contains(body, "no route to "+c.want) {
				t.Errorf("%v: %d %q", c, answer.Code, body)
			}
		}
	}
}

// healthServer is a gRPC server by package net/http; check answers the calls.
func healthServer(t *testing.T, check http.HandlerFunc) string {
	t.Helper()
	server := httptest.NewUnstartedServer(check)
	server.Config.Protocols = new(http.Protocols)
	server.Config.Protocols.SetUnencryptedHTTP2(true)
	server.Start()
	t.Cleanup(server.Close)
	return portOf(server.Listener.Addr())
}

// sends answers with a message and a status.
func sends(message, grpcStatus string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/grpc+proto")
		w.Header().Set("Trailer", "Grpc-Status")
		io.WriteString(w, message)
		w.Header().Set("Grpc-Status", grpcStatus)
	}
}

func TestAGRPCProbeSucceedsOnlyWhenServing(t *testing.T) {
	trailersOnly := func(code, message string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "application/grpc")
			w.Header().Set("Grpc-Status", code)
			w.Header().Set("Grpc-Message", message)
		}
	}
	for name, c := range map[string]struct {
		check http.HandlerFunc
		want  string // empty: 200
	}{
		"serving":              {sends("\x00\x00\x00\x00\x02\x08\x01", "0"), ""},
		"serving, and more":    {sends("\x00\x00\x00\x00\x0b\x12\x02hi\x08\x01\x1d1234", "0"), ""},
		"unknown":              {sends("\x00\x00\x00\x00\x02\x08\x00", "0"), "health status UNKNOWN"},
		"not set":              {sends("\x00\x00\x00\x00\x00", "0"), "health status UNKNOWN"},
		"not serving":          {sends("\x00\x00\x00\x00\x02\x08\x02", "0"), "health status NOT_SERVING"},
		"service unknown":      {sends("\x00\x00\x00\x00\x02\x08\x03", "0"), "health status SERVICE_UNKNOWN"},
		"a new status":         {sends("\x00\x00\x00\x00\x02\x08\x63", "0"), `health status "99"`},
		"failed after serving": {sends("\x00\x00\x00\x00\x02\x08\x01", "13"), "gRPC status INTERNAL"},
		"not found":            {trailersOnly("5", "unknown%20service"), `gRPC status NOT_FOUND: "unknown service"`},
		"no health service":    {trailersOnly("12", "%zz"), `gRPC status UNIMPLEMENTED: "%zz"`},
		"a new code":           {trailersOnly("99", ""), `gRPC status "99"`},
		"no status":            {sends("\x00\x00\x00\x00\x02\x08\x01", ""), `gRPC status ""`},
		"no message":           {sends("", "0"), "not exactly one message"},
		"half a message":       {sends("\x00\x00\x00\x00\x03\x08\x01", "0"), "not exactly one message"},
		"two messages":         {sends("\x00\x00\x00\x00\x02\x08\x01\x00\x00\x00\x00\x00", "0"), "not exactly one message"},
		"compressed":           {sends("\x01\x00\x00\x00\x02\x08\x01", "0"), "compressed"},
		"not protobuf":         {sends("\x00\x00\x00\x00\x02\xff\xff", "0"), "not a HealthCheckResponse"},
		"a page":               {func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "hello") }, "content type"},
		"no such page":         {http.NotFound, "HTTP status 404"},
		"an endless message": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "application/grpc")
			for err := error(nil); err == nil; {
				_, err = w.Write(make([]byte, 1000))
			}
		}, "more than"},
	} {
		t.Run(name, func(t *testing.T) {
			a := newKubelet(t, probe.Config{}, map[string]string{"livez": `{"grpc": {"port": ` + healthServer(t, c.check) + `}, "timeoutSeconds": 5}`})
			if c.want != "" {
				a.fails("livez", c.want)
			} else if status, body := a.get("livez"); status != 200 || body != "" {
				t.Errorf("%d %q", status, body)
			}
		})
	}
	a := newKubelet(t, probe.Config{}, map[string]string{
		"livez":  `{"grpc": {"port": ` + workload(t, http.NotFound) + `}, "timeoutSeconds": 5}`,
		"readyz": `{"grpc": {"port": ` + speaker(t, "220 mail\r\n") + `}, "timeoutSeconds": 5}`,
	})
	a.fails("livez", "does not speak HTTP/2")
	a.fails("readyz", "does not speak HTTP/2")
}

func TestTheGRPCServerReceivesAnOrdinaryCall(t *testing.T) {
	long := strings.Repeat("s", 300)
	for service, want := range map[string]string{
		"":   "\x00\x00\x00\x00\x00",
		"a":  "\x00\x00\x00\x00\x03\x0a\x01a",
		long: "\x00\x00\x00\x01\x2f\x0a\xac\x02" + long,
	} {
		received := make(chan error, 1)
		port := healthServer(t, func(w http.ResponseWriter, r *http.Request) {
			body, err := io.ReadAll(r.Body)
			limit, limitErr := time.ParseDuration(strings.Replace(r.Header.Get("Grpc-Timeout"), "m", "ms", 1))
			switch {
			case err != nil:
			case string(body) != want:
				err = fmt.Errorf("message %q, want %q", body, want)
			case r.Method != "POST" || r.URL.Path != "/grpc.health.v1.Health/Check" || r.ProtoMajor != 2 || !strings.HasPrefix(r.Host, "127.0.0.1:"):
				err = fmt.Errorf("%s %s %s of %s", r.Method, r.URL, r.Proto, r.Host)
			case r.Header.Get("Content-Type") != "application/grpc" || r.Header.Get("Te") != "trailers" || r.UserAgent() != "kube-probe/1.34":
				err = fmt.Errorf("fields %v", r.Header)
			case limitErr != nil || limit <= 0 || limit > 5*time.Second:
				err = fmt.Errorf("time limit %v, %v", limit, limitErr)
			case !strings.HasPrefix(r.RemoteAddr, "127.0.0.6:"):
				err = errors.New("from " + r.RemoteAddr)
			}
			received <- err
			sends("\x00\x00\x00\x00\x02\x08\x01", "0")(w, r)
		})
		a := newKubelet(t, probe.Config{}, map[string]string{"livez": `{"grpc": {"port": ` + port + `, "service": "` + service + `"}, "timeoutSeconds": 5}`})
		if status, body, _ := a.do("GET", "livez", "", http.Header{"User-Agent": {"kube-probe/1.34"}}); status != 200 {
			t.Fatalf("%d %q", status, body)
		}
		if err := <-received; err != nil {
			t.Error(err)
		}
	}
}
