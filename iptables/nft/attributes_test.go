package nft

import (
	"bytes"
	"math/rand/v2"
	"testing"

	"github.com/vishvananda/netlink/nl"
)

// Attributes come from rules of other programs. The reader agrees with that of package nl.
func TestAttributesAreReadLikePackageNL(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	refused, read := 0, 0
	for range 20_000 {
		message := make([]byte, 4*random.IntN(15)) // package nl panics if the last attribute lacks its padding
		for i := range message {
			message[i] = byte(random.IntN(4))
		}
		for at := 0; at+4 <= len(message) && random.IntN(8) > 0; { // mostly lengths that fit
			size := 4 + random.IntN(9)
			message[at], message[at+1] = byte(size), 0
			at += (size + 3) &^ 3
		}
		want, wantErr := nl.ParseRouteAttr(message)
		got, err := readAttributes(message)
		if (err != nil) != (wantErr != nil) || err == nil && len(got) != len(want) {
			t.Fatalf("%x: got %d attributes and %v, want %d and %v", message, len(got), err, len(want), wantErr)
		}
		if err != nil {
			refused++
			continue
		}
		for i, a := range got {
			if a.kind != want[i].Attr.Type&nl.NLA_TYPE_MASK || !bytes.Equal(a.value, want[i].Value) {
				t.Fatalf("%x: attribute %d is %v, want %v", message, i, a, want[i])
			}
			read++
		}
	}
	if refused < 1000 || read < 1000 {
		t.Errorf("%d messages refused and %d attributes read: the draw is poor", refused, read)
	}
}

func TestAnAttributeNeedsNoPaddingAtTheEnd(t *testing.T) {
	got, err := readAttributes([]byte{5, 0, 7, 0, 9})
	if err != nil || len(got) != 1 || got[0].kind != 7 || !bytes.Equal(got[0].value, []byte{9}) {
		t.Errorf("got %v, %v", got, err)
	}
}
