package bench

import (
	"testing"
	"time"
)

// TestTheHarnessMeasuresEveryFigure measures everything once, with sizes that say nothing about the cost, so that the
// benchmark still runs when somebody wants its figures.
func TestTheHarnessMeasuresEveryFigure(t *testing.T) {
	k := newKit(t, false)
	small := sizes{
		rounds: 1, connectionRounds: 1, bulk: 4 << 20, connections: 50, traced: 10, messages: 320, idle: 50,
		settle: 10 * time.Millisecond, starts: 1, inits: 1,
	}
	for _, f := range figures {
		for _, r := range f.measure(t, k, small) {
			if len(r.samples[namePillion]) == 0 {
				t.Errorf("%s (%s): nothing was measured for pillion", f.name, r.title)
			}
		}
	}
}

func TestVerdictsFollowTheTargets(t *testing.T) {
	measured := map[string][]float64{namePillion: {1, 9, 2}, nameHAProxy: {2, 2, 4}}
	for _, c := range []struct {
		name string
		row  row
		want string
	}{
		{"nothing promised", row{samples: measured}, ""},
		{"share of HAProxy's kept, in the median round", row{samples: measured, ratioAtMost: 0.5}, "ok"},
		{"share of HAProxy's not kept", row{samples: measured, ratioAtMost: 0.49}, "MISSED"},
		{"own value kept, in the median round", row{samples: measured, atMost: 2}, "ok"},
		{"own value not kept", row{samples: measured, atMost: 1.9}, "MISSED"},
		{"HAProxy not measured", row{samples: map[string][]float64{namePillion: {1}}, ratioAtMost: 0.5}, ""},
		{"pillion not measured", row{samples: map[string][]float64{nameHAProxy: {1}}, atMost: 2}, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := c.row.verdict(); got != c.want {
				t.Errorf("verdict %q, want %q", got, c.want)
			}
		})
	}
}
