package httpforward

import (
	"encoding/hex"
	"math/rand/v2"
	"net/netip"
)

// ForwardedFor says what happens to x-forwarded-for.
type ForwardedFor uint8

// The choices.
const (
	ForwardedForOff         ForwardedFor = iota // leave it as it is
	ForwardedForSetIfAbsent                     // downstream's address when the request has none
	ForwardedForAppend                          // downstream's address behind what is there
)

// Fields says which fields are added to messages.
type Fields struct {
	ForwardedFor   ForwardedFor
	ForwardedProto bool // x-forwarded-proto: http, when the request has none
	RequestID      bool // x-request-id: a version 4 UUID, when the request has none
	ServiceTime    bool // x-envoy-upstream-service-time on responses, in milliseconds
}

// uuidLength is the length of a UUID's text.
const uuidLength = 36

// appendUUID appends a version 4 UUID (RFC 9562 §5.4). It names requests and guards nothing, so a generator that is not
// cryptographic but seeded by the system is enough.
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

// appendAddress appends an address as x-forwarded-for has it: without port, zone and brackets.
func appendAddress(dst []byte, address netip.Addr) []byte {
	return address.WithZone("").AppendTo(dst)
}
