package httpforward

import (
	"crypto/sha256"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/nettest"
)

// bytesOf is a body that is its seed's alone.
func bytesOf(seed uint64, size int64) io.Reader {
	return io.LimitReader(rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), byte(size), byte(size >> 8)}), size)
}

func hashOf(r io.Reader) string {
	hash := sha256.New()
	n, err := io.Copy(hash, r)
	return fmt.Sprintf("%d bytes, %v, %x", n, err, hash.Sum(nil)[:8])
}

// newServer is net/http's server behind the engine. It returns the request's body, or a body of the size and framing
// given by the path.
func newServer(t testing.TB) netip.AddrPort {
	t.Helper()
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/hash" {
			fmt.Fprint(w, hashOf(r.Body))
			return
		}
		var seed uint64
		var size int64
		if _, err := fmt.Sscanf(r.URL.RawQuery, "%d-%d", &seed, &size); err != nil {
			http.Error(w, err.Error(), 400)
			return
		}
		if r.URL.Path == "/sized" {
			w.Header().Set("Content-Length", fmt.Sprint(size))
		}
		io.Copy(w, bytesOf(seed, size))
	}))
	t.Cleanup(server.Close)
	return netip.MustParseAddrPort(strings.TrimPrefix(server.URL, "http://"))
}

func newClient(t testing.TB) *http.Client {
	transport := &http.Transport{DisableCompression: true, MaxIdleConnsPerHost: 10}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport, Timeout: 3 * nettest.Patience}
}

// unsized hides a body's length, so that net/http sends it in chunks.
type unsized struct{ io.Reader }

func TestBodiesOfAnySizeArriveWhole(t *testing.T) {
	t.Parallel()
	r := newRig(t, newServer(t), false)
	client := newClient(t)
	for _, size := range []int64{0, 1, 1000, 16<<10 - 1, 16 << 10, 16<<10 + 1, 100_000, 1 << 20, 24<<20 + 7} {
		for _, path := range []string{"/sized", "/chunked"} {
			response, err := client.Get(fmt.Sprintf("http://%s%s?7-%d", r.address, path, size))
			if err != nil {
				t.Fatal(err)
			}
			if got, want := hashOf(response.Body), hashOf(bytesOf(7, size)); got != want {
				t.Errorf("%s, download of %d: %s, want %s", path, size, got, want)
			}
			response.Body.Close()

			request, _ := http.NewRequest("PUT", "http://"+r.address+"/hash", unsized{bytesOf(8, size)})
			if path == "/sized" {
				request.ContentLength = size
			}
			response, err = client.Do(request)
			if err != nil {
				t.Fatal(err)
			}
			got, _ := io.ReadAll(response.Body)
			response.Body.Close()
			if want := hashOf(bytesOf(8, size)); string(got) != want {
				t.Errorf("%s, upload of %d: %s, want %s", path, size, got, want)
			}
		}
	}
}

// Many clients at once, on short-lived connections, with bodies of all sizes, each receive their own response.
func TestManyClientsAtOnce(t *testing.T) {
	t.Parallel()
	r := newRig(t, newServer(t), false)
	var clients sync.WaitGroup
	for worker := range uint64(16) {
		clients.Go(func() {
			client := newClient(t)
			random := rand.New(rand.NewPCG(worker, 1))
			for i := range uint64(60) {
				size := int64(random.IntN(1 << random.IntN(18)))
				seed := worker<<8 | i
				request, _ := http.NewRequest("GET", fmt.Sprintf("http://%s/sized?%d-%d", r.address, seed, size), nil)
				if random.IntN(2) == 0 {
					request, _ = http.NewRequest("POST", "http://"+r.address+"/hash", unsized{bytesOf(seed, size)})
				}
				request.Close = random.IntN(5) == 0
				response, err := client.Do(request)
				if err != nil {
					t.Error(err)
					return
				}
				got := hashOf(response.Body)
				if request.Method == "GET" && got != hashOf(bytesOf(seed, size)) {
					t.Errorf("%s: %s", request.URL, got)
				} else if request.Method == "POST" && got != hashOf(strings.NewReader(hashOf(bytesOf(seed, size)))) {
					t.Errorf("the body %d-%d did not arrive", seed, size)
				}
				response.Body.Close()
			}
		})
	}
	clients.Wait()
}

// No idempotent request fails because a server closes idle connections at random.
func TestNoIdempotentRequestIsLostToKeepAlive(t *testing.T) {
	t.Parallel()
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, "ok") }))
	server.Config.IdleTimeout = time.Millisecond
	server.Start()
	t.Cleanup(server.Close)
	r := newRig(t, netip.MustParseAddrPort(strings.TrimPrefix(server.URL, "http://")), false)
	var clients sync.WaitGroup
	for worker := range uint64(8) {
		clients.Go(func() {
			transport := &http.Transport{MaxIdleConnsPerHost: 1}
			defer transport.CloseIdleConnections()
			random := rand.New(rand.NewPCG(worker, 2))
			for range 200 {
				// A request with a fresh body each time, so that net/http's own second try cannot help.
				request, _ := http.NewRequest("PUT", "http://"+r.address, unsized{strings.NewReader("once")})
				request.ContentLength = 4
				request.Close = random.IntN(2) == 0
				response, err := transport.RoundTrip(request)
				if err != nil {
					continue // the engine closed with the server, as it would have been without it; but see the records
				}
				if response.StatusCode != 200 {
					t.Errorf("status %d", response.StatusCode)
				}
				io.Copy(io.Discard, response.Body)
				response.Body.Close()
			}
		})
	}
	clients.Wait()
	r.records.mu.Lock()
	defer r.records.mu.Unlock()
	for _, record := range r.records.closed {
		if record.reason != flow.Completed && record.reason != flow.DownstreamLeft {
			t.Errorf("a request ended as %s with %d: %v", record.reason, record.status, record.err)
		}
	}
}
