package httpforward

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/internal/upstream"
)

// newHub is newRig for HTTP/2 connections whose streams choose their upstream connections.
func newHub(t testing.TB, origin netip.AddrPort, router Router, configure ...func(*Config)) *rig {
	t.Helper()
	r := newRig(t, origin, true, configure...)
	r.set(func() { r.many, r.router = true, router })
	return r
}

// roundRobin sends each request to the next of its targets.
type roundRobin struct {
	targets []netip.AddrPort
	next    atomic.Uint32
}

func (b *roundRobin) Route(*Request) Decision {
	n := int(b.next.Add(1)-1) % len(b.targets)
	return Decision{Target: upstream.Target{Address: b.targets[n]}, Cluster: fmt.Sprint("endpoint ", n), HTTP2: true}
}

func TestEachHTTP2StreamGoesToTheTargetThatTheRouterChose(t *testing.T) {
	var targets []netip.AddrPort
	var conns [3]sync.Map
	for n := range 3 {
		targets = append(targets, serveHTTP2(t, func(w http.ResponseWriter, r *http.Request) {
			conns[n].Store(r.RemoteAddr, true)
			body, _ := io.ReadAll(r.Body)
			w.Header().Set("Trailer", "grpc-status")
			w.Header().Set("saw-x-forwarded-for", r.Header.Get("x-forwarded-for"))
			fmt.Fprintf(w, "%d %s %s: %s", n, r.Method, r.URL, body)
			w.Header().Set("grpc-status", "5")
		}))
	}
	r := newHub(t, targets[0], &roundRobin{targets: targets})
	client := http2Client(t)
	for i := range 9 {
		response, err := client.Post("http://"+r.address+"/a?b=c", "application/grpc", strings.NewReader("hello"))
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(response.Body)
		response.Body.Close()
		if want := fmt.Sprintf("%d POST /a?b=c: hello", i%3); err != nil || string(body) != want {
			t.Fatalf("read %q and %v, want %q", body, err, want)
		}
		if response.Header.Get("saw-x-forwarded-for") != "127.0.0.1" || response.Trailer.Get("grpc-status") != "5" {
			t.Errorf("fields %v, trailers %v", response.Header, response.Trailer)
		}
		got := r.records.await(t, i)
		want := recorded{
			protocol: flow.HTTP2, method: "POST", path: "/a?b=c", authority: r.address, id: got.id, cluster: fmt.Sprint("endpoint ", i%3),
			grpc: "5", status: 200, details: "via_upstream", received: 5, sent: uint64(len(body)), reason: flow.Completed, attempts: 1,
		}
		if got != want || len(got.id) != uuidLength {
			t.Errorf("the record is %+v, want %+v", got, want)
		}
	}
	for n := range conns {
		count := 0
		conns[n].Range(func(any, any) bool { count++; return true })
		if count != 1 {
			t.Errorf("endpoint %d has had %d connections, want 1", n, count)
		}
	}
}

// The bodies of many concurrent streams over several endpoints, in both directions.
func TestBodiesOfAHubArriveUnchanged(t *testing.T) {
	var targets []netip.AddrPort
	for range 3 {
		targets = append(targets, serveHTTP2(t, func(w http.ResponseWriter, r *http.Request) {
			buf := make([]byte, 30_000)
			for {
				n, err := r.Body.Read(buf)
				w.Write(buf[:n])
				if err != nil {
					return
				}
			}
		}))
	}
	r := newHub(t, targets[0], &roundRobin{targets: targets})
	client := http2Client(t)
	var streams sync.WaitGroup
	for i := range 64 {
		streams.Go(func() {
			random := rand.NewChaCha8([32]byte{byte(i)})
			size := int64(1) << (i % 21)
			sent := sha256.New()
			body := io.TeeReader(io.LimitReader(random, size), sent)
			response, err := client.Post("http://"+r.address+"/", "text/plain", body)
			if err != nil {
				t.Error(err)
				return
			}
			defer response.Body.Close()
			got := sha256.New()
			n, err := io.Copy(got, response.Body)
			if err != nil || n != size || !bytes.Equal(got.Sum(nil), sent.Sum(nil)) {
				t.Errorf("stream %d: %d of %d bytes, %v", i, n, size, err)
			}
		})
	}
	streams.Wait()
	for i := range 64 {
		if got := r.records.await(t, i); got.reason != flow.Completed || got.sent != got.received {
			t.Errorf("record %+v", got)
		}
	}
}

// A client that does not read one response is served the others.
func TestAStalledStreamOfAHubHoldsBackNoOther(t *testing.T) {
	origin := serveHTTP2(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/long" {
			io.Copy(w, io.LimitReader(rand.NewChaCha8([32]byte{}), 64<<20))
			return
		}
		fmt.Fprint(w, "short")
	})
	r := newHub(t, origin, &roundRobin{targets: []netip.AddrPort{origin}})
	client := http2Client(t)
	var stalled []io.Closer
	for range 8 {
		response, err := client.Get("http://" + r.address + "/long")
		if err != nil {
			t.Fatal(err)
		}
		stalled = append(stalled, response.Body)
	}
	for range 50 {
		response, err := client.Get("http://" + r.address + "/")
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(response.Body)
		response.Body.Close()
		if err != nil || string(body) != "short" {
			t.Fatalf("read %q and %v", body, err)
		}
	}
	for _, body := range stalled {
		body.Close()
	}
	nettest.Eventually(t, "all records", func() bool { return r.records.count() == 58 })
}
