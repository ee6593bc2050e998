package metrics

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/flow"
)

// closeTraced closes a request of a trace that took some time.
func closeTraced(m *Metrics, opened time.Time, took time.Duration, trace *flow.Trace) {
	connection := flow.Open(flow.Inbound, netip.MustParseAddrPort("198.51.100.1:4000"))
	m.Closed(&flow.Record{
		Direction: flow.Inbound, Protocol: flow.HTTP11, Connection: connection, Opened: opened, Duration: took, Reason: flow.Completed,
		HTTP: &flow.Request{Status: 200, Authority: []byte("web"), Trace: trace},
	})
}

func TestDurationsHaveExemplarsOfSampledTraces(t *testing.T) {
	text := func(m *Metrics, openMetrics bool) string {
		var text strings.Builder
		if err := m.Write(&text, openMetrics); err != nil {
			t.Fatal(err)
		}
		return text.String()
	}
	m, at := New(pod, Options{Version: "v"}), time.Unix(1_700_000_000, 0)
	closeTraced(m, at, 7*time.Millisecond, &flow.Trace{ID: [16]byte{9}})
	if got := text(m, true); strings.Contains(got, " # ") {
		t.Error("a trace that is not sampled is an exemplar")
	}
	closeTraced(m, at, 7*time.Millisecond, &flow.Trace{ID: [16]byte{1}, Span: [8]byte{2}, Sampled: true})
	closeTraced(m, at.Add(exemplarEvery/2), 70*time.Millisecond, &flow.Trace{ID: [16]byte{3}, Sampled: true})
	const first = `le="10.0"} 2 # {trace_id="01000000000000000000000000000000",span_id="0200000000000000"} 7.0 1700000000.007` + "\n"
	if got := text(m, true); strings.Count(got, " # {") != 1 || !strings.Contains(got, first) {
		t.Errorf("no %q", first)
	}
	closeTraced(m, at.Add(2*exemplarEvery), 70*time.Millisecond, &flow.Trace{ID: [16]byte{3}, Sampled: true})
	if got := text(m, true); strings.Count(got, " # {") != 1 || !strings.Contains(got, `le="100.0"} 4 # {trace_id="03`) {
		t.Error("the exemplar is not replaced")
	}
	if strings.Contains(text(m, false), " # {") {
		t.Error("the text format has an exemplar")
	}
}
