package controlplane

import (
	"math/rand/v2"
	"path"
	"slices"
	"testing"
)

// damage returns a copy of b with a random change: another bit, less of its end, a gap, or a byte more.
func damage(random *rand.Rand, b []byte) []byte {
	damaged := slices.Clone(b)
	switch i := random.IntN(len(damaged)); random.IntN(4) {
	case 0:
		damaged[i] ^= 1 << random.IntN(8)
	case 1:
		damaged = damaged[:i]
	case 2:
		damaged = slices.Delete(damaged, i, min(i+1+random.IntN(8), len(damaged)))
	case 3:
		damaged = slices.Insert(damaged, i, byte(random.Uint32()))
	}
	return damaged
}

// allOccur fails unless damaged resources were decoded, had findings, and failed.
func allOccur(t *testing.T, decoded, found, failed int) {
	t.Helper()
	if min(decoded, found, failed) < 50 {
		t.Errorf("%d decoded, %d with findings, %d failed: each should occur", decoded, found, failed)
	}
}

// attempt returns what read returns, and is not ok for a resource that read does not expect.
func attempt[From, To any](read func(From) To, from From) (to To, ok bool) {
	defer func() {
		if recover() != nil {
			ok = false
		}
	}()
	return read(from), true
}

// benchmark decodes the recorded resources in files of one name, by hand and by the generated types.
func benchmark(b *testing.B, base string, byHand func([]byte) error, generated func([]byte)) {
	all, err := pushes()
	if err != nil {
		b.Fatal(err)
	}
	var resources [][]byte
	for name, list := range all {
		if path.Base(name) == base {
			for _, resource := range list {
				resources = append(resources, resource.Value)
			}
		}
	}
	b.Run("by hand", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			for _, resource := range resources {
				if err := byHand(resource); err != nil {
					b.Fatal(err)
				}
			}
		}
	})
	b.Run("generated", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			for _, resource := range resources {
				generated(resource)
			}
		}
	})
}
