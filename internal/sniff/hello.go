package sniff

import (
	"encoding/binary"

	"github.com/pillion-proxy/pillion/internal/flow"
)

// The ClientHello parser is our own because crypto/tls has no parser that reads a prefix of one without taking part in the
// handshake.

// The TLS constants of a ClientHello (RFC 8446 §4 and §5.1, RFC 6066 §3, RFC 7301 §3.1).
const (
	recordHeader      = 5
	recordHandshake   = 22
	recordVersionHigh = 3
	maxRecord         = 1 << 14
	clientHello       = 1

	extensionServerName = 0
	extensionALPN       = 16
	serverNameHost      = 0
)

// parseHello parses a ClientHello. The protocol is TLS if it is complete and well-formed, Undecided while bytes are missing,
// and Opaque otherwise.
func parseHello(first []byte) (flow.Hello, Protocol) {
	message, protocol := handshake(first)
	if protocol != TLS {
		return flow.Hello{}, protocol
	}
	hello, ok := readHello(message)
	if !ok {
		return flow.Hello{}, Opaque
	}
	return hello, TLS
}

// handshake returns the body of the first handshake message if that is a ClientHello. It joins the records over which the
// message is spread.
func handshake(first []byte) ([]byte, Protocol) {
	var message []byte
	for {
		length, protocol := recordLength(first)
		if protocol != TLS {
			return nil, protocol
		}
		first = first[recordHeader:]
		part := first[:min(length, len(first))]
		if message == nil {
			message = part[:len(part):len(part)] // a message in one record is not copied
		} else {
			message = append(message, part...)
		}
		if len(message) >= 1 {
			size := atLeast(message[1:], 3)
			if message[0] != clientHello || size > Limit {
				return nil, Opaque
			}
			if len(message) >= 4+size {
				return message[4 : 4+size], TLS
			}
		}
		if len(part) < length {
			return nil, Undecided
		}
		first = first[length:]
	}
}

// beginsHello reports whether first is certainly the beginning of a ClientHello.
func beginsHello(first []byte) bool {
	_, protocol := recordLength(first)
	return protocol == TLS && len(first) > recordHeader && first[recordHeader] == clientHello
}

// exceedsHello reports whether first is the beginning of a ClientHello that is larger than what is held.
func exceedsHello(first []byte) bool {
	return beginsHello(first) && (len(first) >= Limit || atLeast(first[recordHeader+1:], 3) > Limit)
}

// recordLength checks the header of the record at the start of first and returns the record's length. A handshake must not
// contain an empty record.
func recordLength(first []byte) (int, Protocol) {
	header := first[:min(len(first), recordHeader)]
	length := atLeast(header[min(len(header), 3):], 2)
	switch {
	case len(header) > 0 && header[0] != recordHandshake, len(header) > 1 && header[1] != recordVersionHigh:
		return 0, Opaque
	case length > maxRecord, length == 0 && len(header) == recordHeader:
		return 0, Opaque
	case len(header) < recordHeader:
		return 0, Undecided
	}
	return length, TLS
}

// atLeast returns the smallest big-endian number of n bytes that begins with b: a lower bound while bytes are missing.
func atLeast(b []byte, n int) (number int) {
	for i := range n {
		number <<= 8
		if i < len(b) {
			number |= int(b[i])
		}
	}
	return number
}

// readHello parses the body of a ClientHello (RFC 8446 §4.1.2) and extracts the server name and the ALPN protocols.
func readHello(message []byte) (hello flow.Hello, ok bool) {
	s := text(message)
	s.skip(2 + 32) // version and random
	s.vector8()    // session
	s.vector16()   // cipher suites
	s.vector8()    // compression methods
	if s.bad() {
		return hello, false
	}
	if len(s) == 0 {
		return hello, true // TLS 1.2 and before may end here
	}
	extensions := s.vector16()
	for len(extensions) > 0 && !s.bad() {
		kind := extensions.number16()
		data := extensions.vector16()
		if extensions.bad() {
			return hello, false
		}
		switch kind {
		case extensionServerName:
			hello.ServerName = serverName(data)
		case extensionALPN:
			hello.ALPN = protocols(data)
		}
	}
	return hello, !s.bad() && len(s) == 0
}

// serverName returns the host name of a server_name extension. Names with bytes that do not occur in host names are
// skipped: they could forge a log line.
func serverName(s text) string {
	for names := s.vector16(); len(names) > 0; {
		kind := names.number8()
		name := names.vector16()
		if names.bad() {
			return ""
		}
		if kind == serverNameHost && printable(name) {
			return string(name)
		}
	}
	return ""
}

func protocols(s text) (list []string) {
	for names := s.vector16(); len(names) > 0; {
		name := names.vector8()
		if names.bad() {
			return list
		}
		if printable(name) {
			list = append(list, string(name))
		}
	}
	return list
}

func printable(name []byte) bool {
	for _, c := range name {
		if c <= ' ' || c >= 0x7f || c == '"' {
			return false
		}
	}
	return len(name) > 0
}

// text is a part of a TLS message that is consumed from the front. Reading past its end makes it bad permanently.
type text []byte

// bad reports whether a read went past the end. A bad text is nil, as opposed to empty.
func (s *text) bad() bool { return *s == nil }

func (s *text) skip(n int) text {
	if n > len(*s) {
		*s = nil
		return nil
	}
	skipped := (*s)[:n]
	*s = (*s)[n:]
	return skipped
}

func (s *text) number8() int {
	if b := s.skip(1); b != nil {
		return int(b[0])
	}
	return 0
}

func (s *text) number16() int {
	if b := s.skip(2); b != nil {
		return int(binary.BigEndian.Uint16(b))
	}
	return 0
}

// vector8 and vector16 read a length of one or two bytes, and then that many bytes.
func (s *text) vector8() text  { return s.skip(s.number8()) }
func (s *text) vector16() text { return s.skip(s.number16()) }
