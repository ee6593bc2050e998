package e2e

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

// soakTime is how long traffic is mixed. The variable PILLION_SOAK changes it, such as to 10m; make soak sets it.
func soakTime(t *testing.T) time.Duration {
	text := os.Getenv("PILLION_SOAK")
	if text == "" {
		return 3 * time.Second
	}
	d, err := time.ParseDuration(text)
	if err != nil {
		t.Fatalf("PILLION_SOAK: %v", err)
	}
	return d
}

// content returns n bytes that depend on a seed only.
func content(seed uint64, n int64) io.Reader {
	var key [32]byte
	binary.LittleEndian.PutUint64(key[:], seed)
	return io.LimitReader(rand.NewChaCha8(key), n)
}

// sumOf reads all, and returns its length and hash.
func sumOf(r io.Reader) string {
	h := sha256.New()
	n, err := io.Copy(h, r)
	return fmt.Sprintf("%d bytes, sha256 %x, error %v", n, h.Sum(nil), err)
}

// whole returns an error if a stream is not the content of a seed.
func whole(r io.Reader, seed uint64, n int64) error {
	if got, want := sumOf(r), sumOf(content(seed, n)); got != want {
		return fmt.Errorf("%s; sent were %s", got, want)
	}
	return nil
}

// serveContent answers /down with the content that the query names, /up with the digest of the body, and /echo with the body itself.
func serveContent(w http.ResponseWriter, r *http.Request) {
	var seed uint64
	var n int64
	fmt.Sscanf(r.URL.RawQuery, "%d-%d", &seed, &n)
	switch _, verb, _ := bytes.Cut([]byte(r.URL.Path[1:]), []byte("/")); string(verb) {
	case "down":
		io.Copy(w, content(seed, n))
	case "up":
		io.WriteString(w, sumOf(r.Body))
	default:
		http.NewResponseController(w).EnableFullDuplex()
		w.WriteHeader(http.StatusOK)
		io.Copy(w, r.Body)
	}
}

// soak is a client side and a server side of one mesh, and what has been carried between them.
type soak struct {
	*book
	end     chan struct{} // closed when no more is started
	clients sync.WaitGroup
	done    [8]atomic.Int64
	kinds   []string
}

const (
	soakTCP = 9070 // the port of connections that are not HTTP

	oneAgain   = "outbound|9080|v4|reviews.default.svc.cluster.local"
	calls      = "outbound|9080||calls.default.svc.cluster.local"
	sockets    = "outbound|9080||sockets.default.svc.cluster.local"
	opaque     = "outbound|9070|v1|opaque.default.svc.cluster.local"
	opaqueToo  = "outbound|9070|v2|opaque.default.svc.cluster.local"
	soakFirst  = 9101 // of the ports of endpoints
	soakServed = 4    // endpoints of a cluster
)

// newSoak starts the servers of all kinds of traffic, in the pod itself: connections pass its agent twice, as the client's sidecar and
// as the server's, with mutual TLS in between.
func newSoak(t *testing.T) *soak {
	t.Helper()
	nettest.RequireRoot(t)
	inside := func(name string, first int, two bool) subset {
		c := subset{Name: name, Mutual: true, HTTP2: two}
		for i := range soakServed {
			c.Endpoints = append(c.Endpoints, endpoint{Address: netip.AddrPortFrom(nettest.PodIP4, uint16(first+i))})
		}
		return c
	}
	to := func(path, cluster string) rule {
		return rule{Path: path, Weights: map[string]uint32{cluster: 1}, Retries: 3}
	}
	one := to("/one", v1)
	one.Weights[oneAgain] = 1
	clusters := []subset{
		inside(v1, soakFirst, false), inside(v2, soakFirst, true), inside(oneAgain, soakFirst, false), inside(calls, 9111, true),
		inside(sockets, 9121, false), inside(opaque, 9131, false), inside(opaqueToo, 9131, false),
	}
	s := &soak{end: make(chan struct{})}
	s.book = newBookOf(t, nettest.Elsewhere4.String(), []string{"--upstream-idle-timeout", "1s"}, clusters, one, to("/two", v2), to("/grpc.testing", calls), to("/ws", sockets))
	w := s.inbound()
	for i := range soakServed {
		s.serveContents(t, soakFirst+i)
		w.startPeer(t, 9111+i, peer(t, "grpc"), "serve", "ADDRESS")
		w.startPeer(t, 9121+i, peer(t, "websocket"), "serve", "ADDRESS")
		serveEach(t, w.to.Listen(t, "tcp4", netip.AddrPortFrom(w.address, uint16(9131+i)).String()), func(conn net.Conn) { io.Copy(conn, conn) })
	}
	return s
}

func (s *soak) serveContents(t *testing.T, port int) {
	t.Helper()
	server := &http.Server{Handler: http.HandlerFunc(serveContent), Protocols: new(http.Protocols)}
	server.Protocols.SetHTTP1(true)
	server.Protocols.SetUnencryptedHTTP2(true)
	listener, served := s.pod.Listen(t, "tcp4", netip.AddrPortFrom(nettest.PodIP4, uint16(port)).String()), make(chan struct{})
	go func() { defer close(served); server.Serve(listener) }()
	t.Cleanup(func() { server.Close(); <-served })
}

// repeat runs a kind of traffic until the end. Each run must succeed.
func (s *soak) repeat(t *testing.T, kind string, run func(seed uint64, n int64) error) {
	at := len(s.kinds)
	s.kinds = append(s.kinds, kind)
	s.clients.Go(func() {
		for {
			seed := rand.Uint64()
			n := int64(1) << (seed % 21) // 1 byte to 1 MiB
			if err := run(seed, n+int64(seed>>32)%n); err != nil {
				t.Errorf("%s, after %d others: %v", kind, s.done[at].Load(), err)
				return
			}
			s.done[at].Add(1)
			select {
			case <-s.end:
				return
			default:
			}
		}
	})
}

// least returns the smallest number of successes of a kind of traffic. Programs do not count: each of their runs has many exchanges.
func (s *soak) least() int64 {
	n := s.done[0].Load()
	for i := range s.kinds[:len(s.kinds)-2] {
		n = min(n, s.done[i].Load())
	}
	return n
}

// exchangeContent sends a request for serveContent and verifies the response.
func exchangeContent(client *http.Client, path string, seed uint64, n int64) error {
	verb := []string{"down", "up", "echo"}[seed/64%3]
	method, body := "POST", content(seed, n)
	if verb == "down" {
		method, body = "GET", nil
	}
	request, err := http.NewRequest(method, fmt.Sprintf("http://%s%s/%s?%d-%d", at(reviewsPort), path, verb, seed, n), body)
	if err != nil {
		return err
	}
	if seed/256%2 == 0 && body != nil {
		request.ContentLength = n // otherwise in chunks
	}
	response, err := client.Do(request)
	if err != nil {
		return fmt.Errorf("%s of %d bytes: %w", verb, n, err)
	}
	defer response.Body.Close()
	if response.StatusCode != 200 {
		return fmt.Errorf("%s of %d bytes: %s", verb, n, response.Status)
	}
	if verb == "up" {
		got, err := io.ReadAll(response.Body)
		if want := sumOf(content(seed, n)); err != nil || string(got) != want {
			return fmt.Errorf("the server got %s, %v; sent were %s", got, err, want)
		}
		return nil
	}
	if err := whole(response.Body, seed, n); err != nil {
		return fmt.Errorf("%s: %w", verb, err)
	}
	return nil
}

// connection sends content through a connection that is not HTTP, and reads it back.
func (s *soak) connection(seed uint64, n int64) error {
	conn, err := s.pod.Dial("tcp4", at(soakTCP).String(), nettest.Patience)
	if err != nil {
		return err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(nettest.Patience))
	sent := make(chan error, 1)
	go func() {
		_, err := io.Copy(conn, io.MultiReader(bytes.NewReader([]byte{0}), content(seed, n)))
		if err == nil {
			err = conn.(*net.TCPConn).CloseWrite()
		}
		sent <- err
	}()
	first := make([]byte, 1)
	if _, err := io.ReadFull(conn, first); err != nil {
		return err
	}
	if err := whole(conn, seed, n); err != nil {
		return err
	}
	return <-sent
}

// program runs a client of testdata/peers. They verify what they receive.
func (s *soak) program(name string, arguments ...string) error {
	out, err := s.pod.Run(s.pod.Command(workloadUID, workloadUID, name, arguments...))
	if err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	return nil
}

// changeEvery is the time between two pushes.
const changeEvery = 20 * time.Millisecond

// change pushes other endpoints, weights and routes. Of each cluster at least one endpoint stays.
func (s *soak) change(t *testing.T, times int) {
	all := make([][]endpoint, len(s.Clusters))
	for i := range s.Clusters {
		all[i] = s.Clusters[i].Endpoints
	}
	routes := s.Routes
	tick := time.NewTicker(changeEvery)
	defer tick.Stop()
	for serial := uint32(0); serial < uint32(times) && !t.Failed(); serial++ {
		<-tick.C
		i := int(serial) % len(all)
		from := rand.IntN(len(all[i]))
		s.Clusters[i].Endpoints = all[i][from : from+1+rand.IntN(len(all[i])-from)]
		s.Routes = append([]rule{{Path: fmt.Sprint("/unused/", serial%7), Weights: map[string]uint32{v1: 1}}}, routes...)
		s.Routes[1].Weights = map[string]uint32{v1: 1 + serial%5, oneAgain: 1 + serial%3}
		s.TCP.Weights = map[string]uint32{opaque: 1 + serial/5%4, opaqueToo: 1 + serial/25%2}
		s.push(t)
	}
}

// Traffic of all kinds passes two sidecars while routes, weights and endpoints change 50 times a second. Every byte arrives, no
// request fails, and afterwards the agent holds what it held before.
func TestMixedTrafficArrivesWholeWhileRoutesChange(t *testing.T) {
	t.Parallel()
	s := newSoak(t)
	s.TCP = tcpPort{Port: soakTCP, Weights: map[string]uint32{opaque: 1, opaqueToo: 1}}
	s.push(t)
	nettest.Eventually(t, "connections to be routed", func() bool { return s.connection(1, 1) == nil })
	before := s.held(t)
	one, two := s.outbound().client(t, false), s.outbound().client(t, true)
	s.repeat(t, "HTTP/1 to HTTP/1", func(seed uint64, n int64) error { return exchangeContent(one, "/one", seed, n) })
	s.repeat(t, "HTTP/1 to HTTP/2", func(seed uint64, n int64) error { return exchangeContent(one, "/two", seed, n) })
	s.repeat(t, "HTTP/2 to HTTP/1", func(seed uint64, n int64) error { return exchangeContent(two, "/one", seed, n) })
	s.repeat(t, "HTTP/2 to HTTP/2", func(seed uint64, n int64) error { return exchangeContent(two, "/two", seed, n) })
	s.repeat(t, "TCP", s.connection)
	s.repeat(t, "WebSocket", func(uint64, int64) error {
		return s.program(peer(t, "websocket"), "talk", "ws://"+at(reviewsPort).String()+"/ws")
	})
	s.repeat(t, "gRPC", func(uint64, int64) error { return s.program(peer(t, "grpc"), "call", at(reviewsPort).String()) })
	s.change(t, int(soakTime(t)/changeEvery))
	nettest.Eventually(t, "ten exchanges of each kind", func() bool { return s.least() >= 10 || t.Failed() })
	close(s.end)
	s.clients.Wait()
	for i, kind := range s.kinds {
		t.Logf("%s: %d", kind, s.done[i].Load())
	}
	one.CloseIdleConnections()
	two.CloseIdleConnections()
	var after holdings
	if !nettest.Within(nettest.Patience, func() bool { after = s.held(t); return after.within(before) }) {
		t.Errorf("the agent held %+v before and %+v afterwards", before, after)
	}
	if grown := after.resident - before.resident; !raceDetector && grown > 32<<20 {
		t.Errorf("the agent grew by %d KiB", grown>>10)
	}
}

// holdings is what an agent holds.
type holdings struct{ descriptors, goroutines, resident int }

func (s *soak) held(t *testing.T) (h holdings) {
	_, metrics := get(t, s.pod, "http://127.0.0.1:15090/stats/prometheus")
	_, after, _ := strings.Cut(metrics, "\ngo_goroutines ")
	fmt.Sscan(after, &h.goroutines)
	h.descriptors, h.resident = s.agent.descriptors(t), s.agent.resident(t)
	return h
}

// waiting is how many goroutines of connections that have ended may wait for others: 32 for each direction, in internal/listener.
const waiting = 2 * 32

// within reports whether an agent holds no more than before, except for goroutines that wait for connections.
func (h holdings) within(before holdings) bool {
	return h.descriptors <= before.descriptors && h.goroutines <= before.goroutines+waiting
}
