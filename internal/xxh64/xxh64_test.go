package xxh64

import "testing"

// Vectors of Envoy's test/common/common/hash_test.cc, of the algorithm's author, and of libraries that agree with it.
func TestHashesOfTexts(t *testing.T) {
	for _, c := range []struct {
		text       string
		seed, want uint64
	}{
		{"foo", 0, 3728699739546630719},
		{"bar", 0, 5234164152756840025},
		{"bar", 3728699739546630719, 17745830980996999794}, // Envoy's hash of the two texts
		{"foo\nbar", 0, 8917841378505826757},
		{"lyft", 0, 4400747396090729504},
		{"", 0, 0xEF46DB3751D8E999},
		{"", 1, 0xD5AFBA1336A3BE4B},
		{"a", 0, 0xD24EC4F1A98C6E5B},
		{"abc", 0, 0x44BC2CF5AD770999},
		{"Nobody inspects the spammish repetition", 0, 0xFBCEA83C8A378BF1},
	} {
		if got := Sum([]byte(c.text), c.seed); got != c.want {
			t.Errorf("%q with seed %d: %x, want %x", c.text, c.seed, got, c.want)
		}
	}
}

// The vectors of xxHash's own sanity check.
func TestHashesOfLengths(t *testing.T) {
	buffer, state := make([]byte, 222), uint64(2654435761)
	for i := range buffer {
		buffer[i] = byte(state >> 56)
		state *= 11400714785074694797
	}
	for _, c := range []struct {
		length     int
		seed, want uint64
	}{{1, 0, 0xE934A84ADB052768}, {4, 0, 0x9136A0DCA57457EE}, {14, 0, 0x8282DCC4994E35C8}, {222, 0, 0xB641AE8CB691C174}, {222, 2654435761, 0x20CB8AB7AE10C14A}} {
		if got := Sum(buffer[:c.length], c.seed); got != c.want {
			t.Errorf("%d bytes with seed %d: %x, want %x", c.length, c.seed, got, c.want)
		}
	}
}
