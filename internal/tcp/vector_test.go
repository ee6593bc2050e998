package tcp

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"
)

// sendVector writes all of v, reads it at the other end, and compares it with want.
func sendVector(t *testing.T, from, to *Conn, v *Vector, want []byte) {
	t.Helper()
	w := NewWaiter(t.Context())
	defer w.Close()
	var got []byte
	p := make([]byte, 10_000)
	for len(got) < len(want) {
		left := v.Len()
		n, err := from.WriteVector(v)
		if err != nil && err != ErrAgain {
			t.Fatal(err)
		}
		if v.Len() != left-n {
			t.Fatalf("Len was %d, WriteVector = %d, Len is %d", left, n, v.Len())
		}
		m, err := to.Read(p)
		if err != nil && err != ErrAgain {
			t.Fatal(err)
		}
		got = append(got, p[:m]...)
		if n == 0 && m == 0 {
			if err := w.Wait(time.Now().Add(patience), from, to); err != nil {
				t.Fatalf("after %d of %d bytes: %v", len(got), len(want), err)
			}
		}
	}
	if !bytes.Equal(got, want) || v.Len() != 0 {
		t.Errorf("%d bytes arrived, %d are left, the arrived bytes are correct: %v", len(got), v.Len(), bytes.Equal(got, want))
	}
}

func TestVectorIsWrittenInOrder(t *testing.T) {
	dialled, accepted := connected(t, newPoller(t), "127.0.0.1:0")
	for _, c := range []struct{ count, size int }{
		{0, 0}, {1, 1}, {2, 5}, {maxPieces - 1, 3}, {maxPieces, 3}, {maxPieces + 1, 3}, {5 * maxPieces, 7}, {2000, 1}, {100, 100_000}, {3, 4 << 20},
	} {
		t.Run(fmt.Sprintf("%d pieces of %d", c.count, c.size), func(t *testing.T) {
			var v Vector
			var want []byte
			memory := numbered(c.count*(c.size+1) + 1)
			for i := range c.count {
				piece := memory[i*(c.size+1):][:c.size] // with a gap of one byte between pieces
				v.Append(piece)
				v.Append(nil)
				want = append(want, piece...)
			}
			if v.Len() != len(want) {
				t.Fatalf("Len = %d, want %d", v.Len(), len(want))
			}
			sendVector(t, dialled, accepted, &v, want)
		})
	}
}

// Pieces are appended while others wait for a full socket, and some of them extend the last one.
func TestVectorGrowsWhileItIsWritten(t *testing.T) {
	dialled, accepted := connected(t, newPoller(t), "127.0.0.1:0")
	random := rand.New(rand.NewPCG(1, 2))
	memory := numbered(8 << 20)
	var v Vector
	var want []byte
	for rest := memory; len(rest) > 0; {
		n := min(len(rest), 1+random.IntN(1<<random.IntN(18)))
		skipped := min(n, random.IntN(3)) // 0: the piece extends the previous one
		v.Append(rest[skipped:n])
		want = append(want, rest[skipped:n]...)
		rest = rest[n:]
		if random.IntN(4) == 0 {
			if _, err := dialled.WriteVector(&v); err != nil && err != ErrAgain {
				t.Fatal(err)
			}
		}
	}
	sendVector(t, dialled, accepted, &v, want)
}

func TestAdjacentPiecesAreJoined(t *testing.T) {
	memory := numbered(100)
	var v Vector
	for i := range 10 {
		v.Append(memory[10*i : 10*i+10])
	}
	if len(v.pieces) != 1 || v.Len() != 100 {
		t.Errorf("%d pieces of %d bytes", len(v.pieces), v.Len())
	}
	v.Append(memory[:10])
	v.Append(memory[20:30])
	if len(v.pieces) != 3 {
		t.Errorf("%d pieces; pieces with a gap must not be joined", len(v.pieces))
	}
}

// A vector that was written completely, or reset, is empty and holds no references to memory.
func TestAVectorIsReusable(t *testing.T) {
	dialled, accepted := connected(t, newPoller(t), "127.0.0.1:0")
	var v Vector
	memory := numbered(20)
	for range 3 {
		v.Append(memory[:5])
		v.Append(memory[10:15])
		v.Reset()
		if v.Len() != 0 {
			t.Errorf("%d bytes are left after Reset", v.Len())
		}
		v.Append(memory[5:10]) // adjacent to a removed piece
		v.Append(memory[15:])
		sendVector(t, dialled, accepted, &v, append(bytes.Clone(memory[5:10]), memory[15:]...))
		for _, piece := range v.pieces[:cap(v.pieces)] {
			if piece.Base != nil {
				t.Error("a reference to written memory is left")
			}
		}
	}
	if n, err := dialled.WriteVector(&v); n != 0 || err != nil {
		t.Errorf("writing an empty vector: %d, %v", n, err)
	}
}

// Pieces of two allocations that happen to be adjacent are joined as well: the kernel reads memory, not allocations.
func TestPiecesOfNeighbouringAllocations(t *testing.T) {
	dialled, accepted := connected(t, newPoller(t), "127.0.0.1:0")
	for range 100 {
		var all [64][]byte
		var v Vector
		var want []byte
		for i := range all {
			all[i] = make([]byte, 1024) // 1024 is a size class, so there is no padding
			all[i][0] = byte(i)
			v.Append(all[i])
			want = append(want, all[i]...)
		}
		v.took(1500)
		sendVector(t, dialled, accepted, &v, want[1500:])
	}
}

func TestAVectorDoesNotAllocate(t *testing.T) {
	dialled, accepted := connected(t, newPoller(t), "127.0.0.1:0")
	memory, p := numbered(100), make([]byte, 1000)
	var v Vector
	write := func() {
		v.Append(memory[:10])
		v.Append(memory[20:30])
		v.Append(memory[40:50])
		dialled.WriteVector(&v)
		accepted.Read(p)
	}
	write()
	if allocs := testing.AllocsPerRun(1000, write); allocs != 0 {
		t.Errorf("%v allocations", allocs)
	}
}
