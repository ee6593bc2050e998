package http2

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"

	peer "golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

var someFields = []Field{
	{Name: ":method", Value: "GET"}, {Name: "a", Value: "b"}, {Name: "secret", Value: "c", Sensitive: true},
	{Name: "a", Value: "b"}, {Name: "long", Value: strings.Repeat("x", 300)}, {Name: "empty"},
}

func TestBlocksRoundTrip(t *testing.T) {
	encoder, decoder := NewEncoder(), NewDecoder(1<<20, 100)
	for range 3 {
		var block []byte
		for _, f := range someFields {
			block = encoder.AppendField(block, f)
		}
		fields, whole, err := decoder.Decode(block)
		if err != nil || !whole || !slices.Equal(fields, someFields) {
			t.Fatalf("%v come back as %v, %t and %v", someFields, fields, whole, err)
		}
	}
}

func TestLiteralsStandInNoTable(t *testing.T) {
	encoder, decoder := NewEncoder(), NewDecoder(1<<20, 100)
	for _, n := range []int{0, 1, 126, 127, 128, 254, 255, 1000, 20000} {
		value := strings.Repeat("v", n)
		block := encoder.AppendField(nil, Field{Name: "a", Value: "b"})
		block = encoder.AppendLiteral(block, "id", []byte(value))
		block = encoder.AppendField(block, Field{Name: "a", Value: "b"})
		fields, _, err := decoder.Decode(block)
		if err != nil || len(fields) != 3 || fields[1].Name != "id" || fields[1].Value != value || fields[2].Value != "b" {
			t.Errorf("of %d bytes: %d fields and %v", n, len(fields), err)
		}
	}
}

func TestABlockOverTheLimitKeepsTheTableInStep(t *testing.T) {
	for _, c := range []struct{ bytes, fields int }{{200, 100}, {1 << 20, 3}} {
		encoder, decoder := NewEncoder(), NewDecoder(c.bytes, c.fields)
		var block []byte
		for i := range 20 {
			block = encoder.AppendField(block, Field{Name: "name", Value: fmt.Sprint(i)})
		}
		if fields, whole, err := decoder.Decode(block); err != nil || whole || len(fields) > 5 {
			t.Errorf("%d fields of a block over the limit, whole: %t, %v", len(fields), whole, err)
		}
		block = encoder.AppendField(nil, Field{Name: "name", Value: "19"})
		if fields, whole, err := decoder.Decode(block); err != nil || !whole || fields[0].Value != "19" {
			t.Errorf("the next block brings %v, %t and %v", fields, whole, err)
		}
	}
}

func TestBrokenBlocksAreErrorsOfTheConnection(t *testing.T) {
	for _, block := range []string{"\x80", "\xff\xff\xff\xff\xff\xff\xff\xff\xff\x7f", "\x41", "\x00\x01", "\xc0", "\x3f\xe1\xff\x03", "\x00\x81\x00\x01a"} {
		_, _, err := NewDecoder(100, 10).Decode([]byte(block))
		var breach *Error
		if !errors.As(err, &breach) || breach.Code != CompressionError || breach.Stream != 0 {
			t.Errorf("%x: %v", block, err)
		}
	}
}

// The sender's table stays within the allowed size, and the encoder signals changes of its own.
func TestTableSizes(t *testing.T) {
	encoder, decoder := NewEncoder(), NewDecoder(1<<20, 100)
	for _, c := range []struct{ smallest, now uint32 }{{0, 0}, {0, 4096}, {100, 200}, {1 << 20, 1 << 20}, {0, 1 << 20}} {
		encoder.SetTableSize(c.smallest, c.now)
		decoder.SetTableSize(c.now)
		for range 2 {
			var block []byte
			for _, f := range someFields {
				block = encoder.AppendField(block, f)
			}
			if fields, _, err := decoder.Decode(block); err != nil || !slices.Equal(fields, someFields) {
				t.Errorf("with a table of %d: %v, %v", c.now, fields, err)
			}
		}
	}
}

func TestLargeBlocksAreSplit(t *testing.T) {
	for _, n := range []int{0, 1, MinFrameSize - 1, MinFrameSize, MinFrameSize + 1, 2 * MinFrameSize, 5*MinFrameSize + 7} {
		for _, end := range []bool{false, true} {
			block := bytes.Repeat([]byte("block"), n/5+1)[:n]
			dst := append([]byte("before"), make([]byte, HeaderLength)...)
			dst = AppendHeaders(append(dst, block...), len("before"), 3, end)
			framer := peer.NewFramer(io.Discard, bytes.NewReader(dst[len("before"):]))
			var got []byte
			for done := false; !done; {
				frame, err := framer.ReadFrame()
				if err != nil {
					t.Fatalf("a block of %d bytes: %v", n, err)
				}
				switch f := frame.(type) {
				case *peer.HeadersFrame:
					got, done = append(got, f.HeaderBlockFragment()...), f.HeadersEnded()
					if f.StreamEnded() != end || f.StreamID != 3 {
						t.Errorf("a block of %d bytes begins with %v", n, f)
					}
				case *peer.ContinuationFrame:
					got, done = append(got, f.HeaderBlockFragment()...), f.HeadersEnded()
				}
			}
			if !bytes.Equal(got, block) {
				t.Errorf("a block of %d bytes comes back as %d", n, len(got))
			}
		}
	}
}

func TestTwoChangesOfATableMayBeginABlock(t *testing.T) {
	var b bytes.Buffer
	encoder, decoder := hpack.NewEncoder(&b), NewDecoder(1<<20, 100)
	for _, sizes := range [][]uint32{nil, {100, 4096}, {50, 200}, {200}} {
		b.Reset()
		for _, n := range sizes {
			encoder.SetMaxDynamicTableSize(n)
		}
		for _, f := range someFields {
			encoder.WriteField(f)
		}
		if fields, _, err := decoder.Decode(b.Bytes()); err != nil || !slices.Equal(fields, someFields) {
			t.Errorf("after changes to %v: %v and %v", sizes, fields, err)
		}
	}
}

// FuzzBlocks decodes arbitrary bytes, and encodes the result again.
func FuzzBlocks(f *testing.F) {
	encoder := NewEncoder()
	var block []byte
	for _, field := range someFields {
		block = encoder.AppendField(block, field)
	}
	f.Add(block)
	f.Add([]byte("\x82\x86\x84\x41\x01a"))
	f.Fuzz(func(t *testing.T, block []byte) {
		fields, _, err := NewDecoder(4096, 50).Decode(block)
		if err != nil {
			return
		}
		fields = slices.Clone(fields)
		encoder := NewEncoder()
		var again []byte
		for _, field := range fields {
			again = encoder.AppendField(again, field)
		}
		if got, whole, err := NewDecoder(4096, 50).Decode(again); err != nil || !whole || !slices.Equal(got, fields) {
			t.Errorf("%v come back as %v, %t and %v", fields, got, whole, err)
		}
		ParseRequest(fields)
		ParseResponse(fields)
	})
}

// An encoder signals a table that shrank and grew again in two updates. The first one empties the table.
func TestAnEncoderSignalsEachChangeOfItsTable(t *testing.T) {
	for _, c := range []struct {
		smallest, now uint32
		want          string
	}{
		{100, 200, "\x20\x3f\xa9\x01"},
		{0, 4096, "\x20\x3f\xe1\x1f"},
		{100, 100, "\x3f\x45"},
		{0, 0, "\x20"},
		{4096, 1 << 20, ""},
	} {
		encoder := NewEncoder()
		encoder.SetTableSize(c.smallest, c.now)
		block := encoder.AppendField(nil, Field{Name: ":method", Value: "GET"}) // indexed: one byte, 0x82
		if got := strings.TrimSuffix(string(block), "\x82"); got != c.want {
			t.Errorf("%d, then %d: the block begins with %x, want %x", c.smallest, c.now, got, c.want)
		}
	}
}
