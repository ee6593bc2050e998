package bench

import (
	"testing"
	"time"
)

// TestHarnessMeasuresEveryFigure runs every measurement once with small sizes, to check that the benchmark still works. The
// results have no meaning.
func TestHarnessMeasuresEveryFigure(t *testing.T) {
	k := newKit(t, false)
	small := sizes{
		rounds: 1, connectionRounds: 1, latencyRounds: 1, downloads: 1, bulk: 4 << 20, connections: 50, traced: 10, messages: 320,
		requests: 512, paced: 200, handshakes: 50, idle: 50, settle: 10 * time.Millisecond, pushed: 10 * time.Millisecond, starts: 1, inits: 1,
	}
	for _, f := range figures {
		if !chosen(f.name) {
			continue
		}
		t.Run(f.name, func(t *testing.T) {
			for _, r := range f.measure(t, k, small) {
				if len(r.samples[namePillion]) == 0 {
					t.Errorf("%s: no sample for pillion", r.title)
				}
			}
		})
	}
}

func TestVerdictsFollowTheTargets(t *testing.T) {
	samples := map[string][]float64{namePillion: {1, 9, 2}, nameHAProxy: {2, 2, 4}, nameReverseProxy: {4, 9, 8}}
	only := func(name string) map[string][]float64 { return map[string][]float64{name: samples[name]} }
	for _, c := range []struct {
		name     string
		samples  map[string][]float64
		promises []promise
		want     string
	}{
		{"nothing promised", samples, nil, ""},
		{"share kept, in the median round", samples, []promise{{0.5, nameHAProxy}}, "ok"},
		{"share not kept", samples, []promise{{0.49, nameHAProxy}}, "MISSED"},
		{"both shares kept", samples, []promise{{0.5, nameHAProxy}, {0.25, nameReverseProxy}}, "ok"},
		{"only the first share kept", samples, []promise{{0.5, nameHAProxy}, {0.24, nameReverseProxy}}, "MISSED"},
		{"only the second share kept", samples, []promise{{0.49, nameHAProxy}, {0.25, nameReverseProxy}}, "MISSED"},
		{"own value kept, in the median round", samples, []promise{{atMost: 2}}, "ok"},
		{"own value not kept", samples, []promise{{atMost: 1.9}}, "MISSED"},
		{"the other not measured", only(namePillion), []promise{{0.5, nameHAProxy}}, ""},
		{"one of two not measured", only(namePillion), []promise{{atMost: 2}, {0.5, nameHAProxy}}, ""},
		{"a missed one stays missed", only(namePillion), []promise{{atMost: 1.9}, {0.5, nameHAProxy}}, "MISSED"},
		{"pillion not measured", only(nameHAProxy), []promise{{atMost: 2}}, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := row{samples: c.samples, promises: c.promises}
			if got := r.verdict(); got != c.want {
				t.Errorf("verdict %q, want %q", got, c.want)
			}
		})
	}
}
