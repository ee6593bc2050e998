//go:build !race

package relay

import (
	"io"
	"testing"
)

func TestAMessageDoesNotAllocate(t *testing.T) {
	r := newRig(t, Options{})
	message, answer := make([]byte, 512), make([]byte, 512)
	exchange := func() {
		r.client.Write(message)
		io.ReadFull(r.server, answer)
		r.server.Write(answer)
		io.ReadFull(r.client, message)
	}
	exchange()
	if allocs := testing.AllocsPerRun(1000, exchange); allocs >= 0.1 { // the collector may empty the buffer pool
		t.Errorf("%v allocations for a message and its answer, want 0", allocs)
	}
}

func TestAMoverDoesNotAllocate(t *testing.T) {
	for name, size := range map[string]int{"by copying": 512, "by splice": 4 * bulk} {
		t.Run(name, func(t *testing.T) {
			r := newMoverRig(t)
			body, answer := make([]byte, size), make([]byte, size)
			carry := func() {
				r.from.Write(body)
				r.Expect(int64(size))
				r.carry(t, int64(size))
				io.ReadFull(r.to, answer)
			}
			carry()
			if allocs := testing.AllocsPerRun(500, carry); allocs >= 0.1 { // the collector may empty the buffer pool
				t.Errorf("%v allocations for %d bytes, want 0", allocs, size)
			}
		})
	}
}

func BenchmarkMessage(b *testing.B) {
	r := newRig(b, Options{})
	message := make([]byte, 512)
	b.ReportAllocs()
	for b.Loop() {
		r.client.Write(message)
		io.ReadFull(r.server, message)
	}
}
