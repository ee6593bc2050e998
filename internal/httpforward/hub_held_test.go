package httpforward

import (
	"io"
	"math/rand/v2"
	"net/http"
	"testing"

	"github.com/pillion-proxy/pillion/internal/budget"
	"github.com/pillion-proxy/pillion/internal/nettest"
)

// Streams that are not read hold no more than the connection's share of the budget, and go on when they are read.
func TestStalledStreamsOfAHubHoldLittle(t *testing.T) {
	const streams, size = 100, 256 << 10
	release := make(chan struct{})
	origin := serveHTTP2(t, func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(200)
		http.NewResponseController(w).Flush()
		<-release
		io.Copy(w, io.LimitReader(rand.NewChaCha8([32]byte{}), size))
	})
	r := newHub(t, origin, &planned{decide: func(*Request, *Decision) {}}, func(c *Config) { c.Budget = budget.New(16 << 20) })
	client := http2Client(t)
	client.Transport.(*http.Transport).HTTP2 = &http.HTTP2Config{MaxReceiveBufferPerStream: 64 << 10}
	var bodies []io.ReadCloser
	for range streams {
		response, err := client.Get("http://" + r.address + "/")
		if err != nil {
			t.Fatal(err)
		}
		bodies = append(bodies, response.Body)
	}
	close(release)
	most := 0
	nettest.Eventually(t, "data to wait in the engine", func() bool { most = max(most, int(r.engine.config.Budget.Used())); return most > 1<<20 })
	if used := r.engine.config.Budget.Used(); used > 10<<20 {
		t.Errorf("%d streams hold %d bytes", streams, used)
	}
	for i, body := range bodies {
		if n, err := io.Copy(io.Discard, body); n != size || err != nil {
			t.Fatalf("stream %d: %d bytes and %v", i, n, err)
		}
		body.Close()
	}
	nettest.Eventually(t, "all records", func() bool { return r.records.count() == streams })
}
