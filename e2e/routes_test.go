package e2e

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

// reviews is the content of the file of the stand-in's flag -services.
type reviews struct {
	Port     uint32
	Host     string
	Clusters []subset
	Routes   []rule
	TCP      tcpPort
}

// tcpPort is a port whose connections are not HTTP, divided among clusters by weight. 0: there is none.
type tcpPort struct {
	Port    uint32
	Weights map[string]uint32
}

type subset struct {
	Name      string
	Endpoints []endpoint
	Outliers  bool
	Closed    bool `json:",omitempty"` // no request is allowed at a time
	Mutual    bool
	HTTP2     bool
}

type endpoint struct {
	Address  netip.AddrPort
	Priority uint32
}

type rule struct {
	User, Path     string            `json:",omitempty"`
	Weights        map[string]uint32 // 0: of a cluster without a configuration
	Retries        uint32
	Timeout, Delay time.Duration `json:",omitempty"`
	Abort          uint32        `json:",omitempty"`
	Mirror         string        `json:",omitempty"`
}

const (
	reviewsPort = 9080
	v1          = "outbound|9080|v1|reviews.default.svc.cluster.local"
	v2          = "outbound|9080|v2|reviews.default.svc.cluster.local"
	v3          = "outbound|9080|v3|reviews.default.svc.cluster.local"
)

// book is a stage with a mesh whose service reviews has subsets, served by the peer.
type book struct {
	*stage
	file string

	mu sync.Mutex
	reviews
}

func newBook(t *testing.T, clusters []subset, routes ...rule) *book {
	t.Helper()
	return newBookOf(t, "reviews", nil, clusters, routes...)
}

// newBookOf is newBook for a service with another host, and with flags of the agent.
func newBookOf(t *testing.T, host string, flags []string, clusters []subset, routes ...rule) *book {
	t.Helper()
	s, i := newMeshStage(t, flags...)
	b := &book{stage: s, file: filepath.Join(t.TempDir(), "services.json"), reviews: reviews{Port: reviewsPort, Host: host, Clusters: clusters, Routes: routes}}
	b.push(t)
	i.start(t, "PERMISSIVE", "-services", b.file)
	awaitReady(t, s.pod, s.agent)
	return b
}

// push makes the present content the configuration.
func (b *book) push(t *testing.T) {
	content, err := json.Marshal(&b.reviews)
	if err == nil {
		err = os.WriteFile(b.file+".new", content, 0o644)
	}
	if err == nil {
		err = os.Rename(b.file+".new", b.file)
	}
	if err != nil {
		t.Error(err)
	}
}

// at is an endpoint of the peer.
func at(port int) netip.AddrPort { return netip.AddrPortFrom(nettest.Elsewhere4, uint16(port)) }

// of is a subset with an endpoint at each port.
func of(name string, ports ...int) subset {
	c := subset{Name: name}
	for _, port := range ports {
		c.Endpoints = append(c.Endpoints, endpoint{Address: at(port)})
	}
	return c
}

// review serves at a port of the peer, and names the port in its responses. The returned function ends that: requests in
// progress are finished, and new connections are refused.
func (b *book) review(t *testing.T, port int, status *atomic.Int32) (stop func()) {
	listener := b.peer.Listen(t, "tcp4", at(port).String())
	server := &http.Server{Protocols: new(http.Protocols), Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		if code := status.Load(); code != 0 {
			w.WriteHeader(int(code))
		}
		fmt.Fprint(w, port)
	})}
	server.Protocols.SetHTTP1(true)
	server.Protocols.SetUnencryptedHTTP2(true)
	served := make(chan struct{})
	go func() {
		defer close(served)
		server.Serve(listener)
	}()
	t.Cleanup(func() { server.Close(); <-served })
	return func() {
		_ = server.Shutdown(context.Background())
		<-served
	}
}

// reader is one connection of the workload to the service.
type reader struct {
	net.Conn
	responses *bufio.Reader
}

func (b *book) reader(t *testing.T) *reader {
	t.Helper()
	conn, err := b.pod.Dial("tcp4", at(reviewsPort).String(), nettest.Patience)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return &reader{conn, bufio.NewReader(conn)}
}

// read sends a request and returns the status and the body.
func (r *reader) read(lines ...string) (int, string, error) {
	r.SetDeadline(time.Now().Add(nettest.Patience))
	if _, err := io.WriteString(r, "GET /reviews/0 HTTP/1.1\r\nHost: reviews:9080\r\n"+strings.Join(append(lines, "", ""), "\r\n")); err != nil {
		return 0, "", err
	}
	response, err := http.ReadResponse(r.responses, nil)
	if err != nil {
		return 0, "", err
	}
	body, err := io.ReadAll(response.Body)
	return response.StatusCode, string(body), err
}

// count makes n requests and counts the ports that answer. All must succeed.
func (r *reader) count(t *testing.T, n int, lines ...string) map[string]int {
	t.Helper()
	counts, err := r.counted(n, lines...)
	if err != nil {
		t.Fatal(err)
	}
	return counts
}

// counted is count for a goroutine that is not the test's.
func (r *reader) counted(n int, lines ...string) (map[string]int, error) {
	counts := map[string]int{}
	for range n {
		status, body, err := r.read(lines...)
		if err != nil || status != 200 {
			return counts, fmt.Errorf("%d %q, %v", status, body, err)
		}
		counts[body]++
	}
	return counts, nil
}

// Of 10,000 requests each version gets its weight, give or take six standard deviations, and each endpoint its part of it.
// Requests with the header of a user have a route of their own.
func TestVersionsGetTheirWeights(t *testing.T) {
	t.Parallel()
	b := newBook(t, []subset{of(v1, 9081, 9082), of(v2, 9083), of(v3, 9084)},
		rule{User: "jason", Weights: map[string]uint32{v2: 1}}, rule{Weights: map[string]uint32{v1: 50, v2: 30, v3: 20}})
	for port := 9081; port <= 9084; port++ {
		b.review(t, port, new(atomic.Int32))
	}
	const n, clients = 10_000, 8 // most of the time of one is spent waiting, on a busy machine
	counts := map[string]int{}
	var counting sync.WaitGroup
	var mu sync.Mutex
	for range clients {
		r := b.reader(t)
		counting.Go(func() {
			got, err := r.counted(n / clients)
			mu.Lock()
			defer mu.Unlock()
			for port, count := range got {
				counts[port] += count
			}
			if err != nil {
				t.Error(err)
			}
		})
	}
	if counting.Wait(); t.Failed() {
		return
	}
	for port, share := range map[string]float64{"9081": 0.25, "9082": 0.25, "9083": 0.3, "9084": 0.2} {
		if d := float64(counts[port]) - n*share; d*d > 36*n*share*(1-share) {
			t.Errorf("%s got %d, want %.0f: %v", port, counts[port], n*share, counts)
		}
	}
	if counts := b.reader(t).count(t, 100, "End-User: jason"); counts["9083"] != 100 {
		t.Errorf("jason's requests reached %v", counts)
	}
}

// An endpoint that fails is ejected, and the endpoints of the next locality take over. When it has recovered it returns.
func TestAnEjectedLocalityFailsOverAndReturns(t *testing.T) {
	t.Parallel()
	near := of(v1, 9081, 9082)
	near.Outliers = true
	near.Endpoints[1].Priority = 1
	b := newBook(t, []subset{near}, rule{Weights: map[string]uint32{v1: 1}, Retries: 2})
	var ill atomic.Int32
	b.review(t, 9081, &ill)
	b.review(t, 9082, new(atomic.Int32))
	r := b.reader(t)
	if counts := r.count(t, 100); counts["9081"] != 100 {
		t.Fatalf("%v before the failure", counts)
	}
	ill.Store(503)
	for range 20 { // a request fails as long as both attempts reach the only endpoint of the nearest locality
		if status, _, err := r.read(); err != nil || status != 200 && status != 503 {
			t.Fatalf("%d, %v", status, err)
		}
	}
	inRow := 0 // the endpoint may return, fail, and be ejected again meanwhile
	nettest.Eventually(t, "20 requests in a row to reach the next locality", func() bool {
		status, body, err := r.read()
		if inRow++; err != nil || status != 200 || body != "9082" {
			inRow = 0
		}
		return inRow == 20
	})
	nettest.Eventually(t, "/clusters to show the ejection", func() bool {
		r.read()
		_, clusters := get(t, b.pod, "http://127.0.0.1:15000/clusters")
		return strings.Contains(clusters, v1+"::203.0.113.7:9081::health_flags::/failed_outlier_check")
	})
	ill.Store(0)
	nettest.Eventually(t, "the ejection to end", func() bool {
		_, body, err := r.read()
		return err == nil && body == "9081"
	})
}

// Endpoints come and go 50 times a second, and their servers stop once they have been removed. One fails for a
// while, is ejected and returns. Clients of HTTP/1 and of HTTP/2, with endpoints of both, never see a failure.
func TestEndpointsComeAndGoUnderLoad(t *testing.T) {
	t.Parallel()
	const changes, steady, sickly = 150, 9081, 9082
	one, two := of(v1, steady, sickly), of(v2, steady, sickly)
	one.Outliers, two.Outliers, two.HTTP2 = true, true, true
	b := newBook(t, []subset{one, two}, rule{Path: "/two", Weights: map[string]uint32{v2: 1}, Retries: 3}, rule{Weights: map[string]uint32{v1: 1}, Retries: 3})
	var ill atomic.Int32
	b.review(t, steady, new(atomic.Int32))
	b.review(t, sickly, &ill)
	var wg sync.WaitGroup
	end := make(chan struct{})
	load := make([]answers, 4)
	for i := range load {
		client, path, a := b.outbound().client(t, i >= 2), []string{"/one", "/two"}[i%2], &load[i]
		for range 1 + i/2 { // streams of one connection of HTTP/2
			wg.Go(func() { a.read(t, client, path, end) })
		}
	}
	type server struct {
		port int
		stop func()
	}
	var running []server
	began, tick := time.Now(), time.NewTicker(time.Second/50)
	defer tick.Stop()
	failed := func(cluster string) bool { // its endpoint sickly, once
		_, clusters := get(t, b.pod, "http://127.0.0.1:15000/clusters")
		_, count, ok := strings.Cut(clusters, cluster+"::"+at(sickly).String()+"::rq_error::")
		return ok && !strings.HasPrefix(count, "0\n")
	}
	for change := range changes {
		<-tick.C
		switch change {
		case 20:
			ill.Store(503)
		case 60:
			nettest.Eventually(t, "requests to the endpoint that fails", func() bool { return failed(v1) && failed(v2) || t.Failed() })
			ill.Store(0)
		}
		if change%2 == 0 || len(running) < 4 {
			port := steady + 100 + change
			running = append(running, server{port, b.review(t, port, new(atomic.Int32))})
			b.setEndpoints(t, port, true)
			continue
		}
		oldest := running[0]
		running = running[1:]
		b.setEndpoints(t, oldest.port, false)
		wg.Go(func() {
			if !nettest.Within(nettest.Patience, func() bool {
				_, clusters := get(t, b.pod, "http://127.0.0.1:15000/clusters")
				return !strings.Contains(clusters, at(oldest.port).String()+"::")
			}) {
				t.Errorf("the agent keeps the endpoint %d", oldest.port)
			}
			oldest.stop() // requests in progress are finished
		})
	}
	t.Logf("%d changes in %v", changes, time.Since(began))
	for i := range load {
		before := load[i].from(sickly)
		nettest.Eventually(t, "the endpoint that failed to return", func() bool { return load[i].from(sickly) > before || t.Failed() })
	}
	close(end)
	wg.Wait()
}

// answers counts responses by the port that served them.
type answers struct {
	mu     sync.Mutex
	counts map[string]int
}

func (a *answers) from(port int) int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.counts[fmt.Sprint(port)]
}

// read sends requests until end is closed. Each must succeed.
func (a *answers) read(t *testing.T, client *http.Client, path string, end <-chan struct{}) {
	for {
		select {
		case <-end:
			return
		default:
		}
		request, err := http.NewRequest("GET", "http://"+at(reviewsPort).String()+path, nil)
		if err != nil {
			t.Error(err)
			return
		}
		request.Host = "reviews:9080"
		response, err := client.Do(request)
		if err != nil {
			t.Errorf("%s: %v", path, err)
			return
		}
		body, err := io.ReadAll(response.Body)
		response.Body.Close()
		if err != nil || response.StatusCode != 200 {
			t.Errorf("%s by %s: %d %q, %v", path, response.Proto, response.StatusCode, body, err)
			return
		}
		a.mu.Lock()
		if a.counts == nil {
			a.counts = map[string]int{}
		}
		a.counts[string(body)]++
		a.mu.Unlock()
	}
}

// setEndpoints adds or removes the endpoint at a port, in each cluster.
func (b *book) setEndpoints(t *testing.T, port int, there bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for i := range b.Clusters {
		endpoints := b.Clusters[i].Endpoints[:0:0]
		for _, e := range b.Clusters[i].Endpoints {
			if e.Address != at(port) {
				endpoints = append(endpoints, e)
			}
		}
		if there {
			endpoints = append(endpoints, endpoint{Address: at(port)})
		}
		b.Clusters[i].Endpoints = endpoints
	}
	b.push(t)
}

// Each way in which a route or its cluster decides about a request is told in the access log: flags, route and cluster.
func TestTheAccessLogTellsWhatBecameOfARequest(t *testing.T) {
	t.Parallel()
	const absent = "outbound|9080|v9|reviews.default.svc.cluster.local"
	closed, empty, gone := of("closed", 9081), of("empty"), of("gone", 9085)
	closed.Closed = true
	to := func(path, cluster string) rule { return rule{Path: path, Weights: map[string]uint32{cluster: 1}} }
	delayed, aborted, late, retried := to("/delayed", v1), to("/aborted", v1), to("/late", v3), to("/retried", v2)
	delayed.Delay, aborted.Abort, late.Timeout, retried.Retries = 20*time.Millisecond, 418, 100*time.Millisecond, 1
	both := to("/both", v1)
	both.Delay, both.Abort = time.Millisecond, 503
	b := newBookOf(t, "reviews", []string{"--access-log-format", "%REQ(:PATH)% %RESPONSE_CODE% %RESPONSE_FLAGS% %ROUTE_NAME% %UPSTREAM_CLUSTER% attempts=%UPSTREAM_REQUEST_ATTEMPT_COUNT%"},
		[]subset{of(v1, 9081), of(v2, 9082), of(v3, 9083), closed, empty, gone},
		delayed, aborted, both, late, retried, to("/closed", "closed"), to("/empty", "empty"), to("/gone", "gone"), rule{Path: "/absent", Weights: map[string]uint32{absent: 0}},
		to("/served", v1))
	b.review(t, 9081, new(atomic.Int32))
	var ill atomic.Int32
	ill.Store(503)
	b.review(t, 9082, &ill)
	b.silent(t, 9083)
	for _, test := range []struct{ path, told string }{
		{"/served", "200 - /served " + v1},
		{"/delayed", "200 DI /delayed " + v1},
		{"/aborted", "418 FI /aborted " + v1},
		{"/both", "503 DI,FI /both " + v1},
		{"/late", "504 UT /late " + v3},
		{"/retried", "503 URX /retried " + v2},
		{"/closed", "503 UO /closed closed"},
		{"/empty", "503 UH /empty empty"},
		{"/gone", "503 UF /gone gone"},
		{"/absent", "503 NC /absent " + absent},
		{"/elsewhere", "404 NR - -"},
	} {
		r := b.reader(t)
		r.SetDeadline(time.Now().Add(nettest.Patience))
		fmt.Fprintf(r, "GET %s HTTP/1.1\r\nHost: reviews:9080\r\n\r\n", test.path)
		response, err := http.ReadResponse(r.responses, nil)
		if err != nil {
			t.Fatalf("%s: %v", test.path, err)
		}
		if !strings.HasPrefix(test.told, fmt.Sprint(response.StatusCode, " ")) {
			t.Errorf("%s: status %d", test.path, response.StatusCode)
		}
		if overloaded := response.Header.Get("x-envoy-overloaded"); (overloaded == "true") != strings.Contains(test.told, " UO ") {
			t.Errorf("%s: x-envoy-overloaded %q", test.path, overloaded)
		}
		r.Close()
		attempts := " attempts=1"
		switch {
		case strings.Contains(test.told, " URX "):
			attempts = " attempts=2"
		case test.path == "/elsewhere", test.path == "/aborted", test.path == "/both", test.path == "/closed", test.path == "/empty", test.path == "/absent":
			attempts = " attempts=0"
		}
		if line := b.agent.access.await(t, test.path+" "+test.told); !strings.HasSuffix(strings.TrimSpace(line), attempts) {
			t.Errorf("the access log has %q, want %q", line, attempts)
		}
	}
	if _, metrics := get(t, b.pod, "http://127.0.0.1:15090/stats/prometheus"); !strings.Contains(metrics, "\nenvoy_cluster_upstream_rq_retry{cluster_name=\"PassthroughCluster\"} 1\n") {
		t.Errorf("the metrics do not have one retry:\n%s", metrics)
	}
}

// silent accepts connections at a port of the peer, and never answers.
func (b *book) silent(t *testing.T, port int) {
	listener := b.peer.Listen(t, "tcp4", at(port).String())
	t.Cleanup(func() { listener.Close() })
}

// A mirror gets a copy of each request, with the body and another host, and the client the response of the route's cluster.
func TestMirrorsGetCopies(t *testing.T) {
	t.Parallel()
	b := newBook(t, []subset{of(v1, 9081), of(v2, 9082)}, rule{Weights: map[string]uint32{v1: 1}, Mirror: v2})
	b.review(t, 9081, new(atomic.Int32))
	copies := make(chan string, 10)
	listener := b.peer.Listen(t, "tcp4", at(9082).String())
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		body, _ := io.ReadAll(q.Body)
		copies <- q.Method + " " + q.URL.Path + " " + q.Host + " " + string(body)
		w.WriteHeader(500)
	})}
	served := make(chan struct{})
	go func() { defer close(served); server.Serve(listener) }()
	t.Cleanup(func() { server.Close(); <-served })
	r := b.reader(t)
	for range 3 {
		r.SetDeadline(time.Now().Add(nettest.Patience))
		io.WriteString(r, "POST /reviews/0 HTTP/1.1\r\nHost: reviews:9080\r\nContent-Length: 4\r\n\r\nbody")
		response, err := http.ReadResponse(r.responses, nil)
		if err != nil || response.StatusCode != 200 {
			t.Fatal(response, err)
		}
		io.Copy(io.Discard, response.Body)
		select {
		case got := <-copies:
			if got != "POST /reviews/0 reviews-shadow:9080 body" {
				t.Errorf("the mirror got %q", got)
			}
		case <-time.After(nettest.Patience):
			t.Fatal("the mirror got no copy")
		}
	}
}
