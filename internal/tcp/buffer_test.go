package tcp

import (
	"bytes"
	"io"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

// arrive writes bytes and waits until the other end can read all of them.
func arrive(t *testing.T, from, to *Conn, sent []byte) {
	t.Helper()
	if n, err := from.Write(sent); n != len(sent) || err != nil {
		t.Fatalf("wrote %d of %d bytes, %v", n, len(sent), err)
	}
	nettest.Eventually(t, "the bytes to be there", func() bool { return pending(t, to) >= len(sent) })
}

// numbered returns n bytes whose values depend on their position.
func numbered(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i) ^ byte(i>>8)
	}
	return b
}

func TestBuffer(t *testing.T) {
	far, near := connected(t, newPoller(t), "127.0.0.1:0")
	sent := numbered(3 * BufferSize)
	arrive(t, far, near, sent[:2*BufferSize])
	b := TakeBuffer()
	defer b.Release()
	at := 0 // offset in sent of the first byte in the buffer
	step := func(what string, n int, err error, wantN int, wantErr error, wantLen int) {
		t.Helper()
		if n != wantN || err != wantErr || b.Len() != wantLen || !bytes.Equal(b.Bytes(), sent[at:at+wantLen]) {
			t.Fatalf("%s: %d, %v, Len %d; want %d, %v, Len %d", what, n, err, b.Len(), wantN, wantErr, wantLen)
		}
	}
	if b.Len() != 0 || len(b.Bytes()) != 0 {
		t.Fatal("a new buffer is not empty")
	}
	n, err := b.FillAtMost(near, 5)
	step("five bytes", n, err, 5, nil, 5)
	n, err = b.Fill(near)
	step("all that there is room for", n, err, BufferSize-5, nil, BufferSize)
	n, err = b.Fill(near)
	step("into a full buffer", n, err, 0, ErrFull, BufferSize)
	n, err = b.FillAtMost(near, 1)
	step("one byte into a full buffer", n, err, 0, ErrFull, BufferSize)

	b.Discard(10)
	at += 10
	n, err = b.Fill(near)
	step("into the room of what was discarded", n, err, 10, nil, BufferSize)
	b.Discard(BufferSize)
	at += BufferSize
	step("after all was discarded", 0, nil, 0, nil, 0)
	n, err = b.Fill(near)
	step("what is left", n, err, BufferSize-10, nil, BufferSize-10)
	n, err = b.Fill(near)
	step("when nothing is there", n, err, 0, ErrAgain, BufferSize-10)

	b.Discard(100)
	at += 100
	if b.Grow(BufferSize) || b.Grow(0) {
		t.Error("Grow returned true for a limit that is not above the present size")
	}
	if !b.Grow(BufferSize + 1) {
		t.Error("Grow did not reach the limit")
	}
	step("after it has grown", 0, nil, 0, nil, BufferSize-110)
	arrive(t, far, near, sent[2*BufferSize:])
	n, err = b.Fill(near)
	step("by what it has grown, and more", n, err, 111, nil, BufferSize+1)
	if !b.Grow(1<<20) || b.Len() != BufferSize+1 {
		t.Error("the second Grow failed")
	}
	n, err = b.Fill(near)
	step("after it has doubled", n, err, BufferSize-111, nil, 2*BufferSize-110)
}

func TestReleaseShrinksAGrownBuffer(t *testing.T) {
	b := TakeBuffer()
	b.Grow(1 << 20)
	b.Release()
	for range 3 { // one of them may be the released one
		b := TakeBuffer()
		defer b.Release()
		if len(b.bytes) != BufferSize || b.Len() != 0 {
			t.Errorf("capacity %d, Len %d", len(b.bytes), b.Len())
		}
	}
	var none *Buffer
	none.Release()
}

func TestAShrunkBufferKeepsItsBytes(t *testing.T) {
	far, near := connected(t, newPoller(t), "127.0.0.1:0")
	sent := numbered(2*BufferSize + ShrunkSize)
	for _, large := range []bool{false, true} {
		b, size := TakeBuffer(), BufferSize
		if large {
			b, size = TakeLargeBuffer(), LargeBufferSize
		}
		arrive(t, far, near, sent)
		if n, err := b.FillAtMost(near, ShrunkSize+10); n != ShrunkSize+10 || err != nil {
			t.Fatal(n, err)
		}
		if b.Shrink(); b.Cap() != size {
			t.Errorf("%d bytes are too many, but the buffer shrank to %d", b.Len(), b.Cap())
		}
		b.Discard(10)
		if b.Shrink(); b.Cap() != ShrunkSize || !bytes.Equal(b.Bytes(), sent[10:10+ShrunkSize]) {
			t.Errorf("shrunk to %d bytes of memory with %d bytes", b.Cap(), b.Len())
		}
		b.Shrink()
		if n, err := b.Fill(near); n != min(size-ShrunkSize, 2*BufferSize-10) || err != nil || !bytes.Equal(b.Bytes(), sent[10:][:b.Len()]) {
			t.Errorf("Fill after Shrink: %d, %v, with %d bytes", n, err, b.Len())
		}
		if b.Cap() != size {
			t.Errorf("after Shrink and Fill the buffer has %d bytes of memory, want %d", b.Cap(), size)
		}
		b.Discard(b.Len() - 5)
		rest := bytes.Clone(b.Bytes())
		b.Shrink()
		b.Append(numbered(size))
		if !bytes.Equal(b.Bytes(), append(rest, numbered(size)...)) {
			t.Error("Append after Shrink lost bytes")
		}
		for n := 0; n < 3*BufferSize; { // the rest, and some that arrives
			if got, err := b.Fill(near); err != nil && err != ErrFull && err != ErrAgain {
				t.Fatal(err)
			} else if n += got; err == ErrFull {
				b.Grow(1 << 20)
			} else if err == ErrAgain {
				break
			}
		}
		if !bytes.HasPrefix(b.Bytes(), append(rest, numbered(size)...)) {
			t.Error("Fill after Append lost bytes")
		}
		b.Shrink() // too large
		b.Release()
		b = TakeBuffer()
		b.Shrink()
		b.Release() // without memory
	}
	if b := TakeBuffer(); b.Cap() != BufferSize || b.Len() != 0 {
		t.Errorf("a buffer from the pool has %d bytes of memory and %d bytes", b.Cap(), b.Len())
	} else {
		b.Release()
	}
}

// EOF and errors leave the buffered bytes untouched.
func TestBufferKeepsBytesAtEOF(t *testing.T) {
	far, near := connected(t, newPoller(t), "127.0.0.1:0")
	arrive(t, far, near, []byte("last words"))
	far.CloseWrite()
	b, w := TakeBuffer(), NewWaiter(t.Context())
	defer b.Release()
	defer w.Close()
	for {
		_, err := b.Fill(near)
		if err == io.EOF {
			break
		}
		if err == ErrAgain {
			err = w.Wait(time.Now().Add(patience), near, nil)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if string(b.Bytes()) != "last words" {
		t.Errorf("Bytes at EOF = %q", b.Bytes())
	}
}

func TestEmptyReadIsNotEOF(t *testing.T) {
	far, near := connected(t, newPoller(t), "127.0.0.1:0")
	b := TakeBuffer()
	defer b.Release()
	for _, sent := range []string{"", "x"} {
		arrive(t, far, near, []byte(sent))
		if n, err := near.Read(nil); n != 0 || err != nil {
			t.Errorf("with %q there: Read = %d, %v", sent, n, err)
		}
		if n, err := b.FillAtMost(near, 0); n != 0 || err != nil {
			t.Errorf("with %q there: FillAtMost = %d, %v", sent, n, err)
		}
	}
	if n, err := b.Fill(near); n != 1 || err != nil {
		t.Errorf("Fill = %d, %v", n, err)
	}
}

func TestSlabsHaveRoom(t *testing.T) {
	for _, n := range []int{0, 1, smallestSlab, smallestSlab + 1, 256 << 10, 256<<10 + 1} {
		slab := TakeSlab(n)
		if len(slab) != 0 || cap(slab) < n {
			t.Errorf("a slab for %d bytes has %d of %d bytes", n, len(slab), cap(slab))
		}
		GiveSlab(append(slab, "dirty"...))
		GiveSlab(make([]byte, 0, n)) // not a slab, or one by chance
		if again := TakeSlab(n); len(again) != 0 || cap(again) < n {
			t.Errorf("the next slab for %d bytes has %d of %d bytes", n, len(again), cap(again))
		}
	}
}
