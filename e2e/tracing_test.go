package e2e

import (
	"bytes"
	"context"
	"encoding/hex"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

// A request through the agent gets a span, whose trace the server and the access log see. A test of the tracing package reads
// spans as OpenTelemetry does; here only their IDs are looked for.
func TestSpansOfRequestsReachTheReceiver(t *testing.T) {
	t.Parallel()
	for _, of := range []string{"inbound", "outbound"} {
		t.Run(of, func(t *testing.T) {
			s := newInjectedStage(t, []string{"OTEL_EXPORTER_OTLP_ENDPOINT=http://127.0.0.1:4318"}, "--access-log-format", "trace=%TRACE_ID% span=%SPAN_ID%")
			batches := make(chan []byte, 16)
			serveHTTP(t, s.pod.Listen(t, "tcp", "127.0.0.1:4318"), http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
				b, _ := io.ReadAll(r.Body)
				batches <- b
			}))
			w := s.inbound()
			if of == "outbound" {
				w = s.outbound()
			}
			seen := make(chan string, 1)
			address := w.address.String() + ":8080"
			serveHTTP(t, w.to.Listen(t, "tcp", address), http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { seen <- r.Header.Get("Traceparent") }))
			client := &http.Client{Timeout: nettest.Patience, Transport: &http.Transport{
				DisableKeepAlives: true,
				DialContext: func(_ context.Context, network, address string) (net.Conn, error) {
					return w.from.Dial(network, address, nettest.Patience)
				},
			}}
			response, err := client.Get("http://" + address + "/")
			if err != nil {
				t.Fatal(err)
			}
			response.Body.Close()
			parent := strings.Split(<-seen, "-")
			if len(parent) != 4 || parent[3] != "01" {
				t.Fatalf("traceparent %q", parent)
			}
			s.agent.access.await(t, "trace="+parent[1]+" span="+parent[2])
			trace, _ := hex.DecodeString(parent[1])
			span, _ := hex.DecodeString(parent[2])
			var b []byte
			select {
			case b = <-batches:
			case <-time.After(nettest.Patience):
				t.Fatal("no spans came")
			}
			if !bytes.Contains(b, trace) || !bytes.Contains(b, span) || !bytes.Contains(b, []byte("reviews.shop")) {
				t.Errorf("the receiver got %q", b)
			}
			nettest.Eventually(t, "the span is counted", func() bool { return sample(s.scrape(t), "pillion_spans_exported_total") == 1 })
		})
	}
}
