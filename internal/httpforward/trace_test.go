package httpforward

import (
	"fmt"
	"net/http"
	"strings"
	"testing"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/internal/route"
	"github.com/pillion-proxy/pillion/internal/tracing"
	"github.com/pillion-proxy/pillion/internal/upstream"
)

// traced is a Router of a target with edits, so that a request passes the other way through the engines.
type traced struct {
	to     upstream.Target
	edits  []route.Edit
	policy *tracing.Policy
}

func (r *traced) Route(*Request) Decision {
	return Decision{Target: r.to, Edits: r.edits, Tracing: r.policy}
}

const (
	arrived  = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
	contexts = "traceparent tracestate b3 x-b3-traceid x-b3-spanid x-b3-sampled x-request-id"
)

// seenContext sends a request and returns what the server receives of its context.
func seenContext(t *testing.T, engine int, edited bool, policy *tracing.Policy, fields http.Header) map[string][]string {
	t.Helper()
	server := serveHTTP2(t, func(w http.ResponseWriter, r *http.Request) {
		for name := range strings.SplitSeq(contexts, " ") {
			w.Header()["Seen-"+http.CanonicalHeaderKey(name)] = r.Header.Values(name)
		}
	})
	r := newRig(t, server, engine > 1, func(c *Config) {
		c.Fields.RequestID = true
		if !edited {
			c.Tracing = policy
		}
	})
	if edited {
		r.set(func() {
			r.router = &traced{upstream.Target{Address: server}, []route.Edit{{Name: "x-edited", Remove: true}}, policy}
		})
	}
	r.set(func() { r.many = engine == 3 })
	client := http2Client(t)
	if engine == 1 {
		client = &http.Client{Transport: &http.Transport{}, Timeout: nettest.Patience}
		defer client.CloseIdleConnections()
	}
	request, _ := http.NewRequestWithContext(t.Context(), "GET", "http://"+r.address, nil)
	request.Header = fields
	response, err := client.Do(request)
	if err != nil {
		t.Fatal(err)
	}
	response.Body.Close()
	seen := map[string][]string{}
	for name := range strings.SplitSeq(contexts, " ") {
		if values := response.Header.Values("Seen-" + name); len(values) > 0 {
			seen[name] = values
		}
	}
	return seen
}

func eachWay(t *testing.T, test func(t *testing.T, engine int, edited bool)) {
	for engine, name := range map[int]string{1: "HTTP1", 2: "HTTP2", 3: "hub"} {
		for _, edited := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s,edited=%v", name, edited), func(t *testing.T) { test(t, engine, edited) })
		}
	}
}

func TestTheContextOfATraceGoesOnWithTheSpanOfTheRequest(t *testing.T) {
	eachWay(t, func(t *testing.T, engine int, edited bool) {
		policy := &tracing.Policy{Forms: tracing.W3C, Sampler: tracing.Sampler{Threshold: tracing.Ratio(1)}}
		seen := seenContext(t, engine, edited, policy, http.Header{
			"Traceparent": {arrived}, "Tracestate": {"a=1"}, "X-B3-Traceid": {"4bf92f3577b34da6a3ce929d0e0e4736"}, "X-B3-Spanid": {"00f067aa0ba902b7"}})
		parents := seen["traceparent"]
		if len(parents) != 1 || len(parents[0]) != len(arrived) || parents[0][:36] != arrived[:36] || parents[0][36:52] == arrived[36:52] || parents[0][52:] != "-01" {
			t.Fatalf("traceparent %q", parents)
		}
		if seen["tracestate"][0] != "a=1" {
			t.Errorf("tracestate %q", seen["tracestate"])
		}
		if span := seen["x-b3-spanid"]; len(span) != 1 || span[0] != parents[0][36:52] || seen["x-b3-sampled"][0] != "1" {
			t.Errorf("fields of B3: %v", seen)
		}
		if seen["b3"] != nil {
			t.Errorf("b3 %q is added", seen["b3"])
		}
	})
}

func TestARequestWithoutAContextBeginsATrace(t *testing.T) {
	eachWay(t, func(t *testing.T, engine int, edited bool) {
		policy := &tracing.Policy{Forms: tracing.W3C | tracing.B3, RequestIDs: &tracing.RequestIDs{Random: 10000, Overall: 10000}}
		seen := seenContext(t, engine, edited, policy, http.Header{"Traceparent": {"garbage"}, "Tracestate": {"a=1"}})
		if p := seen["traceparent"]; len(p) != 1 || len(p[0]) != len(arrived) || !strings.HasSuffix(p[0], "-01") || seen["b3"][0] != p[0][3:52]+"-1" {
			t.Errorf("%v", seen)
		}
		if seen["tracestate"] != nil {
			t.Errorf("tracestate %q of a traceparent that is not valid", seen["tracestate"])
		}
		if id := seen["x-request-id"]; len(id) != 1 || len(id[0]) != 36 || id[0][14] != '9' {
			t.Errorf("x-request-id %q, want the reason 9", id)
		}
		const own = "11111111-1111-4111-8111-111111111111"
		seen = seenContext(t, engine, edited, policy, http.Header{"X-Request-Id": {own}})
		if id := seen["x-request-id"]; len(id) != 1 || id[0] != own[:14]+"9"+own[15:] {
			t.Errorf("x-request-id %q", id)
		}
	})
}

// Without tracing every byte of a context is as it was.
func TestWithoutTracingContextsPassAsTheyAre(t *testing.T) {
	eachWay(t, func(t *testing.T, engine int, edited bool) {
		seen := seenContext(t, engine, edited, nil, http.Header{"Traceparent": {"garbage"}, "Tracestate": {"a=1"}, "B3": {"0"}})
		if seen["traceparent"][0] != "garbage" || seen["tracestate"][0] != "a=1" || seen["b3"][0] != "0" || len(seen["x-b3-traceid"]) > 0 {
			t.Errorf("%v", seen)
		}
	})
}

// The record has the trace that the server receives, until it is closed.
func TestTheRecordHasTheTrace(t *testing.T) {
	for _, two := range []bool{false, true} {
		var got flow.Trace
		server := serveHTTP2(t, func(w http.ResponseWriter, r *http.Request) { w.Header().Set("seen", r.Header.Get("traceparent")) })
		closed := make(chan struct{}, 1)
		r := newRig(t, server, two, func(c *Config) {
			c.Tracing = &tracing.Policy{Forms: tracing.W3C}
			next := c.Flows
			c.Flows = sinkFunc(func(record *flow.Record) {
				got = *record.HTTP.Trace
				next.Closed(record)
				closed <- struct{}{}
			})
		})
		client := http2Client(t)
		if !two {
			client = &http.Client{Transport: &http.Transport{}, Timeout: nettest.Patience}
			defer client.CloseIdleConnections()
		}
		response, err := client.Get("http://" + r.address)
		if err != nil {
			t.Fatal(err)
		}
		response.Body.Close()
		<-closed
		if want := fmt.Sprintf("00-%x-%x-00", got.ID, got.Span); response.Header.Get("seen") != want {
			t.Errorf("HTTP/2 %v: the server receives %s, the record has %s", two, response.Header.Get("seen"), want)
		}
	}
}

type sinkFunc func(*flow.Record)

func (f sinkFunc) Closed(r *flow.Record) { f(r) }
