package sniff

import (
	"bytes"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"slices"
	"strings"
	"testing"

	"github.com/pillion-proxy/pillion/internal/flow"
)

// TestHelloOfEveryTLSVersion parses the ClientHello of crypto/tls at once, byte by byte, and split into records.
func TestHelloOfEveryTLSVersion(t *testing.T) {
	long := strings.Repeat(strings.Repeat("a", 60)+".", 4) + "example.com"
	for _, c := range []struct {
		name string
		*tls.Config
	}{
		{"TLS 1.0", &tls.Config{MinVersion: tls.VersionTLS10, MaxVersion: tls.VersionTLS10, ServerName: "example.com"}},
		{"TLS 1.1", &tls.Config{MinVersion: tls.VersionTLS11, MaxVersion: tls.VersionTLS11, ServerName: "example.com", NextProtos: []string{"http/1.1"}}},
		{"TLS 1.2", &tls.Config{MaxVersion: tls.VersionTLS12, ServerName: "a.example.com", NextProtos: []string{"h2", "http/1.1"}}},
		{"TLS 1.3", &tls.Config{ServerName: "b.example.com", NextProtos: []string{"h2"}}},
		{"TLS 1.3 without post-quantum keys", &tls.Config{ServerName: "b.example.com", CurvePreferences: []tls.CurveID{tls.X25519}}},
		{"no server name", &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"istio-peer-exchange", "istio"}}},
		{"nothing", &tls.Config{InsecureSkipVerify: true}},
		{"the longest name", &tls.Config{ServerName: long, NextProtos: []string{strings.Repeat("p", 255)}}},
	} {
		t.Run(c.name, func(t *testing.T) {
			sent := helloOf(c.Config)
			want := flow.Hello{ServerName: c.ServerName, ALPN: c.NextProtos}
			message := sent[5:]
			for _, records := range [][]byte{sent, record(message), recordsOf(100, message), recordsOf(3, message), recordsOf(1, message)} {
				for _, n := range prefixes(len(records) - 1) {
					if got := classify(records[:n]); got != Undecided {
						t.Fatalf("%s after %d of %d bytes", protocolName(got), n, len(records))
					}
				}
				for _, more := range []string{"", "\x14", "anything"} {
					first := append(slices.Clone(records), more...)
					hello, protocol := parseHello(first)
					if classify(first) != TLS || protocol != TLS || !sameHello(hello, want) {
						t.Errorf("%s, %+v; want %+v", protocolName(protocol), hello, want)
					}
				}
			}
		})
	}
}

func TestMalformedHellos(t *testing.T) {
	sound := hello("example.com", "h2")
	with := func(change func(h []byte)) []byte {
		h := slices.Clone(sound)
		change(h)
		return h
	}
	session := 4 + 2 + 32
	suites := session + 1
	extensions := suites + 4 + 2
	for _, c := range []struct {
		name    string
		message []byte
		want    Protocol
		hello   flow.Hello
	}{
		{"sound", sound, TLS, flow.Hello{ServerName: "example.com", ALPN: []string{"h2"}}},
		{"no extensions, as before TLS 1.3", resized(sound[:extensions]), TLS, flow.Hello{}},
		{"a session beyond the end", with(func(h []byte) { h[session] = 255 }), Opaque, flow.Hello{}},
		{"cipher suites beyond the end", with(func(h []byte) { h[suites] = 255 }), Opaque, flow.Hello{}},
		{"extensions beyond the end", with(func(h []byte) { h[extensions+1]++ }), Opaque, flow.Hello{}},
		{"bytes behind the extensions", resized(append(slices.Clone(sound), 0)), Opaque, flow.Hello{}},
		{"half a length of the extensions", resized(sound[:extensions+1]), Opaque, flow.Hello{}},
		{"an extension beyond the others", with(func(h []byte) { h[extensions+2+3]++; h[extensions+2+2] = 1 }), Opaque, flow.Hello{}},
		{"a name to forge a log with", hello("a\" reason=\"closed", "h2\n"), TLS, flow.Hello{}},
		{"a name with a space, an ALPN with a NUL", hello("a b", "h2\x00", "ok"), TLS, flow.Hello{ALPN: []string{"ok"}}},
		{"empty names", hello("", ""), TLS, flow.Hello{}},
	} {
		got, protocol := parseHello(record(c.message))
		if protocol != c.want || !sameHello(got, c.hello) {
			t.Errorf("%s: %s, %+v; want %s, %+v", c.name, protocolName(protocol), got, protocolName(c.want), c.hello)
		}
	}
}

// FuzzHello compares the parser with crypto/tls: a ClientHello that crypto/tls accepts must be accepted with the same names.
func FuzzHello(f *testing.F) {
	f.Add(helloOf(&tls.Config{ServerName: "example.com", NextProtos: []string{"h2", "http/1.1"}}))
	f.Add(helloOf(&tls.Config{ServerName: "example.com", MaxVersion: tls.VersionTLS12}))
	f.Add(recordsOf(40, hello("a.example.com", "h2")))
	f.Add(record(hello("a b", "")))
	f.Add([]byte{22, 3, 1, 0, 4, 1, 0, 0, 0})
	f.Fuzz(func(t *testing.T, first []byte) {
		ours, protocol := parseHello(first)
		theirs := parsedByCryptoTLS(first)
		if theirs == nil || stricterThanCryptoTLS(first) {
			return // only input that both accept must give the same result
		}
		if protocol != TLS {
			t.Fatalf("crypto/tls parsed %+v, the verdict is %s", theirs, protocolName(protocol))
		}
		want := flow.Hello{ALPN: slices.DeleteFunc(theirs.SupportedProtos, func(p string) bool { return !printable([]byte(p)) })}
		if printable([]byte(theirs.ServerName)) {
			want.ServerName = theirs.ServerName
		}
		if !sameHello(ours, want) {
			t.Fatalf("crypto/tls parsed %+v, we parsed %+v", want, ours)
		}
	})
}

// stricterThanCryptoTLS reports whether first contains something that crypto/tls may accept and the parser rejects: an
// empty record, a record whose major version is not 3, a record of a length allowed only for encrypted ones, a message
// above the limit, or records of other types before the message.
func stricterThanCryptoTLS(first []byte) bool {
	var length int
	for length < 4 || len(first) > 0 {
		if len(first) < 5 {
			break
		}
		size := int(binary.BigEndian.Uint16(first[3:]))
		if first[0] != recordHandshake || first[1] != recordVersionHigh || size == 0 || size > maxRecord {
			return true
		}
		length += size
		first = first[min(5+size, len(first)):]
	}
	return length > Limit
}

func sameHello(a, b flow.Hello) bool {
	return a.ServerName == b.ServerName && slices.Equal(a.ALPN, b.ALPN)
}

// errParsed ends the handshake after the ClientHello.
var errParsed = errors.New("ClientHello parsed")

// helloOf returns the first bytes that a client of crypto/tls sends.
func helloOf(config *tls.Config) []byte {
	var sent bytes.Buffer
	_ = tls.Client(stream{Reader: strings.NewReader(""), Writer: &sent}, config).Handshake()
	return sent.Bytes()
}

// parsedByCryptoTLS returns what a server of crypto/tls parses from first, or nil if it rejects it.
func parsedByCryptoTLS(first []byte) (parsed *tls.ClientHelloInfo) {
	config := &tls.Config{MinVersion: tls.VersionTLS10, GetConfigForClient: func(info *tls.ClientHelloInfo) (*tls.Config, error) {
		parsed = info
		return nil, errParsed
	}}
	_ = tls.Server(stream{Reader: bytes.NewReader(first), Writer: io.Discard}, config).Handshake()
	return parsed
}

// stream is a net.Conn made of a reader and a writer.
type stream struct {
	net.Conn
	io.Reader
	io.Writer
}

func (s stream) Read(p []byte) (int, error)  { return s.Reader.Read(p) }
func (s stream) Write(p []byte) (int, error) { return s.Writer.Write(p) }
func (s stream) Close() error                { return nil }

// hello returns a ClientHello message with the two extensions that the parser reads.
func hello(name string, protocols ...string) []byte {
	vector16 := func(b []byte) []byte { return append(binary.BigEndian.AppendUint16(nil, uint16(len(b))), b...) }
	var list []byte
	for _, p := range protocols {
		list = append(append(list, byte(len(p))), p...)
	}
	extensions := append([]byte{0, extensionServerName}, vector16(vector16(append([]byte{serverNameHost}, vector16([]byte(name))...)))...)
	extensions = append(append(extensions, 0, extensionALPN), vector16(vector16(list))...)
	message := append([]byte{clientHello, 0, 0, 0, 3, 3}, make([]byte, 32)...)
	message = append(message, 0, 0, 2, 0x13, 0x01, 1, 0) // no session, one cipher suite, one compression method
	return resized(append(message, vector16(extensions)...))
}

// resized returns a copy of a handshake message whose length field matches its length.
func resized(message []byte) []byte {
	message = slices.Clone(message)
	size := len(message) - 4
	copy(message[1:], []byte{byte(size >> 16), byte(size >> 8), byte(size)})
	return message
}
