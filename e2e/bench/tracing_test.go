package bench

import (
	"io"
	"net/http"
	"testing"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

// nameUntraced is pillion without tracing.
const nameUntraced = "untraced"

// measureTracing compares the agent with one that does not trace, for a hundredth of the requests and for all. In both cases
// each request gets a context.
func measureTracing(t testing.TB, k *kit, s sizes) []*row {
	few := &row{title: "CPU per HTTP/1.1 request, 1 % in sampled traces", unit: "µs", promises: []promise{{1.03, nameUntraced}}}
	all := &row{title: "CPU per HTTP/1.1 request, all in sampled traces", unit: "µs", promises: []promise{{1.25, nameUntraced}}}
	untraced := k.telemetry[0]
	untraced.name = nameUntraced
	for _, m := range []struct {
		row  *row
		part string
	}{{few, "0.01"}, {all, "1"}} {
		contenders := []contender{k.traced(m.part), untraced}
		turns{"tracing", contenders, s.connectionRounds}.take(t, k, []*row{m.row}, func(t testing.TB, c contender, w *world, p *proxy) {
			cpu := cpuOf(t, p, w.startLoad(t, "http1", s.requests, 32))
			m.row.add(c.name, microseconds(cpu)/float64(s.requests))
		})
	}
	return []*row{few, all}
}

// traced is the agent with a receiver of spans.
func (k *kit) traced(part string) contender {
	const address = "127.0.0.1:4318"
	c := k.telemetry[0]
	c.command = append([]string{"env", "OTEL_EXPORTER_OTLP_ENDPOINT=http://" + address, "OTEL_TRACES_SAMPLER=traceidratio", "OTEL_TRACES_SAMPLER_ARG=" + part},
		c.command...)
	c.before = func(t testing.TB, ns *nettest.Namespace) {
		server := &http.Server{Handler: http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { io.Copy(io.Discard, r.Body) })}
		listener := ns.Listen(t, "tcp", address)
		go server.Serve(listener)
		t.Cleanup(func() { server.Close() })
	}
	return c
}
