package flow

import (
	"strings"
	"testing"
)

// A body is recorded up to its limit, in parts of any size.
func TestBodiesAreCutAtTheirLimit(t *testing.T) {
	text := strings.Repeat("0123456789", 300)
	for _, limit := range []int{0, 1, 511, 512, 513, 2000, len(text), len(text) + 1} {
		for _, part := range []int{1, 7, 600, len(text)} {
			bodies := NewBodies(limit, 1<<20)
			b := bodies.Begin()
			for rest := text; rest != ""; {
				n := min(part, len(rest))
				b.Add([]byte(rest[:n]))
				rest = rest[n:]
			}
			if want := text[:min(limit, len(text))]; string(b.Bytes()) != want || b.Cut() != (limit < len(text)) || cap(b.Bytes()) > max(limit, smallestBody) {
				t.Errorf("limit %d, parts of %d: %d bytes in %d, cut: %v", limit, part, len(b.Bytes()), cap(b.Bytes()), b.Cut())
			}
			b.Release()
			if got := bodies.room.Load(); got != 1<<20 {
				t.Errorf("limit %d, parts of %d: after the release there is room for %d bytes", limit, part, got)
			}
		}
	}
}

// All bodies together have a bound. Released bodies make room.
func TestBodiesShareTheirMemory(t *testing.T) {
	bodies := NewBodies(1000, 2500)
	var all []*Body
	total := 0
	for range 4 {
		b := bodies.Begin()
		b.Add(make([]byte, 1000))
		all, total = append(all, b), total+cap(b.Bytes())
	}
	if total > 2500 || all[1].Cut() || !all[3].Cut() || bodies.room.Load() < 0 {
		t.Errorf("the bodies take %d bytes, and there is room for %d", total, bodies.room.Load())
	}
	all[0].Release()
	b := bodies.Begin()
	if b.Add(make([]byte, 1000)); b.Cut() {
		t.Error("a released body leaves no room")
	}
	var none *Bodies
	if none.Begin() != nil {
		t.Error("without Bodies there is a body")
	}
	none.Begin().Release()
}
