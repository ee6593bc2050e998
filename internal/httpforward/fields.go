package httpforward

import (
	"encoding/hex"
	"math/rand/v2"
	"net/netip"
)

// ForwardedFor is the policy for x-forwarded-for.
type ForwardedFor uint8

// The choices.
const (
	ForwardedForOff         ForwardedFor = iota // leave the field unchanged
	ForwardedForSetIfAbsent                     // add downstream's address if the field is absent
	ForwardedForAppend                          // append downstream's address
)

// Fields selects the fields that are added to messages.
type Fields struct {
	ForwardedFor   ForwardedFor
	ForwardedProto bool // x-forwarded-proto: http, if absent
	RequestID      bool // x-request-id: a version 4 UUID, if absent
	ServiceTime    bool // x-envoy-upstream-service-time on responses, in milliseconds
}

// uuidLength is the length of a UUID's text.
const uuidLength = 36

// appendUUID appends a version 4 UUID (RFC 9562 §5.4). It identifies requests and protects nothing, so a
// non-cryptographic generator seeded by the system is enough.
func appendUUID(dst []byte) []byte {
	high, low := rand.Uint64(), rand.Uint64()
	high = high&^0xf000 | 0x4000
	low = low&^(3<<62) | 2<<62
	var raw [16]byte
	for i := range 8 {
		raw[i] = byte(high >> (56 - 8*i))
		raw[8+i] = byte(low >> (56 - 8*i))
	}
	var text [uuidLength]byte
	hex.Encode(text[0:8], raw[0:4])
	hex.Encode(text[9:13], raw[4:6])
	hex.Encode(text[14:18], raw[6:8])
	hex.Encode(text[19:23], raw[8:10])
	hex.Encode(text[24:36], raw[10:16])
	text[8], text[13], text[18], text[23] = '-', '-', '-', '-'
	return append(dst, text[:]...)
}

// appendAddress appends an address in the form of x-forwarded-for: without port, zone and brackets.
func appendAddress(dst []byte, address netip.Addr) []byte {
	return address.WithZone("").AppendTo(dst)
}
