// Package xxh64 is the hash XXH64 (github.com/Cyan4973/xxHash, doc/xxhash_spec.md). Envoy balances load by it.
package xxh64

import (
	"encoding/binary"
	"math/bits"
)

// The primes of XXH64.
const (
	prime1 uint64 = 11400714785074694791
	prime2 uint64 = 14029467366897019727
	prime3 uint64 = 1609587929392839161
	prime4 uint64 = 9650029242287828579
	prime5 uint64 = 2870177450012600261
)

// Sum returns the hash of b.
func Sum(b []byte, seed uint64) uint64 {
	n := uint64(len(b))
	h := seed + prime5
	if n >= 32 {
		h, b = stripes(b, seed)
	}
	h += n
	for ; len(b) >= 8; b = b[8:] {
		h ^= round(0, binary.LittleEndian.Uint64(b))
		h = bits.RotateLeft64(h, 27)*prime1 + prime4
	}
	if len(b) >= 4 {
		h ^= uint64(binary.LittleEndian.Uint32(b)) * prime1
		h = bits.RotateLeft64(h, 23)*prime2 + prime3
		b = b[4:]
	}
	for _, c := range b {
		h ^= uint64(c) * prime5
		h = bits.RotateLeft64(h, 11) * prime1
	}
	h = (h ^ h>>33) * prime2
	h = (h ^ h>>29) * prime3
	return h ^ h>>32
}

// stripes hashes the stripes of 32 bytes that b has, and returns the rest.
func stripes(b []byte, seed uint64) (h uint64, rest []byte) {
	p1, p2 := prime1, prime2 // variables: the sum and the difference overflow
	v := [4]uint64{seed + p1 + p2, seed + p2, seed, seed - p1}
	for ; len(b) >= 32; b = b[32:] {
		for i := range v {
			v[i] = round(v[i], binary.LittleEndian.Uint64(b[8*i:]))
		}
	}
	h = bits.RotateLeft64(v[0], 1) + bits.RotateLeft64(v[1], 7) + bits.RotateLeft64(v[2], 12) + bits.RotateLeft64(v[3], 18)
	for i := range v {
		h = (h^round(0, v[i]))*prime1 + prime4
	}
	return h, b
}

func round(v, input uint64) uint64 {
	return bits.RotateLeft64(v+input*prime2, 31) * prime1
}
