//go:build !race

package accesslog

import (
	"path/filepath"
	"testing"

	"github.com/pillion-proxy/pillion/internal/flow"
)

// Neither the line of a request nor that of a connection allocates memory on its way from the filter to the queue.
func TestLineDoesNotAllocate(t *testing.T) {
	filter, err := ParseFilter("errors;sample=100%")
	if err != nil {
		t.Fatal(err)
	}
	r := request(flow.Inbound, flow.Completed)
	r.HTTP.ForwardedFor = []byte("203.0.113.9, 172.16.0.1")
	refused := stories[9]
	if refused.name != "TCP refused" {
		t.Fatal(refused.name)
	}
	for name, f := range map[string]*Format{"text": mustParse(t, ParseFormat, ""), "json": mustParse(t, ParseJSONFormat, "")} {
		l := begin(t, Config{Path: filepath.Join(t.TempDir(), "log"), Format: f, Filter: filter, TCPStart: true})
		if allocs := testing.AllocsPerRun(5000, func() { // the queue is written several times meanwhile
			l.Closed(r)
			l.Closed(refused.Record)
			l.Opened(refused.Record)
		}); allocs >= 0.1 { // the collector may empty the pool
			t.Errorf("%s: %v allocations", name, allocs)
		}
	}
}

func BenchmarkLine(b *testing.B) {
	r := request(flow.Inbound, flow.Completed)
	r.HTTP.ForwardedFor = []byte("203.0.113.9, 172.16.0.1")
	for name, parse := range map[string]func(string) (*Format, error){"text": ParseFormat, "json": ParseJSONFormat} {
		f := mustParse(b, parse, "")
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			var l line
			for b.Loop() {
				f.build(&l, r, r.Duration)
			}
		})
		b.Run(name+"/Closed", func(b *testing.B) {
			b.ReportAllocs()
			l := begin(b, Config{Path: "/dev/null", Format: f})
			for b.Loop() {
				l.Closed(r)
			}
		})
	}
}
