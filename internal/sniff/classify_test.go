package sniff

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"strings"
	"testing"
)

// beginnings are the first bytes of connections. A connection is undecided while it has sent no more than held. The first
// byte of decides determines the verdict.
var beginnings = []struct {
	name          string
	held, decides string
	want          Protocol
}{
	// HTTP/1. The end of the request line decides.
	{"GET", "GET / HTTP/1.1\r", "\nHost: a\r\n\r\n", HTTP1},
	{"HTTP/1.0", "GET / HTTP/1.0\r", "\n\r\n", HTTP1},
	{"a minor version to come", "GET / HTTP/1.9\r", "\n", HTTP1},
	{"LF alone", "GET / HTTP/1.1", "\nHost: a\n\n", HTTP1},
	{"POST", "POST /submit?a=b HTTP/1.1\r", "\nContent-Length: 1\r\n\r\nx", HTTP1},
	{"PUT, which begins like the preface", "PUT / HTTP/1.1\r", "\n", HTTP1},
	{"PROPFIND, which begins like the preface", "PROPFIND /dav HTTP/1.1\r", "\n", HTTP1},
	{"OPTIONS of the server", "OPTIONS * HTTP/1.1\r", "\n", HTTP1},
	{"CONNECT", "CONNECT example.com:443 HTTP/1.1\r", "\n", HTTP1},
	{"absolute target", "GET http://example.com/ HTTP/1.1\r", "\n", HTTP1},
	{"bytes beyond ASCII in the target", "GET /\xc3\xa4\xff HTTP/1.1\r", "\n", HTTP1},
	{"an unregistered method", "X-Y_9 /a HTTP/1.1\r", "\n", HTTP1},
	{"the longest method", strings.Repeat("M", maxMethod) + " / HTTP/1.1\r", "\n", HTTP1},
	{"PRI of version 1", "PRI * HTTP/1.1\r", "\n\r\n", HTTP1},
	{"WebSocket", "GET /chat HTTP/1.1\r", "\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n", HTTP1},
	{"h2c upgrade", "GET / HTTP/1.1\r", "\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\n", HTTP1},
	{"SOAP over HTTP", "M-POST /soap HTTP/1.1\r", "\n", HTTP1},
	{"SSDP, over TCP", "M-SEARCH * HTTP/1.1\r", "\nHOST: 239.255.255.250:1900\r\n", HTTP1},
	{"the longest request line", "GET /" + strings.Repeat("a", Limit-len("GET / HTTP/1.1\r\n")) + " HTTP/1.1\r", "\n", HTTP1},

	// HTTP/2. The end of the preface decides.
	{"HTTP/2", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r", "\n\x00\x00\x00\x04\x00\x00\x00\x00\x00", HTTP2},
	{"HTTP/2 without the second half of its preface", "PRI * HTTP/2.0\r\n\r\n", "\x00\x00\x00\x04", Opaque},
	{"HTTP/2 with one wrong letter", "PRI * HTTP/2.0\r\n\r\nS", "N\r\n\r\n", Opaque},
	{"HTTP/2 with LF alone", "PRI * HTTP/2.0", "\n\nSM\n\n", Opaque},
	{"HTTP/2.1", "PRI * HTTP/2.", "1\r\n\r\nSM\r\n\r\n", Opaque},
	{"a request of version 2.0, which Node serves", "GET / HTTP/2.0\r", "\n\r\n", HTTP1},
	{"a request of version 3", "GET / HTTP/3\r", "\n", Opaque},
	{"PRI of something else", "PRI / HTTP/", "2.0\r\n\r\nSM\r\n\r\n", Opaque},
	{"PRI in lower case", "p", "ri * HTTP/2.0\r\n\r\nSM\r\n\r\n", Opaque},

	// Similar to HTTP/1.
	{"HTTP/0.9", "GET /\r", "\n", Opaque},
	{"HTTP/0.9 in words, which Node serves", "GET / HTTP/0.9\r", "\n", HTTP1},
	{"a version of two digits, which nginx serves", "GET / HTTP/1.11\r", "\n", HTTP1},
	{"a version without its minor", "GET / HTTP/1.\r", "\n", HTTP1},
	{"a version in lower case", "GET / http/1.1\r", "\n", HTTP1},
	{"a space after the version, which nginx serves", "GET / HTTP/1.1 \r", "\n", HTTP1},
	{"two CR", "GET / HTTP/1.1\r", "\r\n", HTTP1},
	{"a CR in the middle", "GET / HTTP/1.1\r", "Host: a\r\n", HTTP1},
	{"two spaces before the target, which nginx serves", "GET  / HTTP/1.1\r", "\n", HTTP1},
	{"two spaces after the target, which nginx serves", "GET /  HTTP/1.1\r", "\n", HTTP1},
	{"a space in the target", "GET /a b HTTP/1.1\r", "\n", HTTP1},
	{"tabs, which Python serves", "GET\t/\tHTTP/1.1\r", "\n", HTTP1},
	{"a tab in the target", "GET /\t HTTP/1.1\r", "\n", HTTP1},
	{"a NUL in the target", "GET /", "\x00 HTTP/1.1\r\n", HTTP1},
	{"a NUL in place of the target", "GET ", "\x00 HTTP/1.1\r\n", Opaque},
	{"a DEL in the target", "GET /", "\x7f HTTP/1.1\r\n", HTTP1},
	{"a method in lower case, as browsers send patch", "patch / HTTP/1.1\r", "\n", HTTP1},
	{"a method in both cases", "Get / HTTP/1.1\r", "\n", HTTP1},
	{"a method that is too long", strings.Repeat("M", maxMethod), "M / HTTP/1.1\r\n", Opaque},
	{"an empty line first", "\r\nGET / HTTP/1.1\r", "\n", HTTP1},
	{"empty lines first", strings.Repeat("\r\n", 20) + "POST / HTTP/1.1\r", "\n", HTTP1},
	{"an empty line and an unregistered method", "\r\nBREW / HTTP/1.1\r", "\n", HTTP1},
	{"an empty line of LF first", "\nGET / HTTP/1.1\r", "\n", HTTP1},
	{"an empty line and something else", "\r\n", "+OK\r\n", Opaque},
	{"a space first, which Python serves", " GET / HTTP/1.1\r", "\n", HTTP1},
	{"a response", "HTTP", "/1.1 200 OK\r\n", Opaque},
	{"a method and no more", "GET", "\r\n", Opaque},
	{"a method and a space", "GET \r", "\n", Opaque},
	{"two words", "GET HTTP/1.1\r", "\n", HTTP1},
	{"an unregistered method and two spaces", "BREW ", " / HTTP/1.1\r\n", Opaque},
	{"an unregistered method and a space in the target", "BREW /a ", "b HTTP/1.1\r\n", Opaque},
	{"a word in lower case", "g", "o / HTTP/1.1\r\n", Opaque},
	{"a longer word than a common method", "get", "s / HTTP/1.1\r\n", Opaque},

	// Text protocols.
	{"SIP", "INVITE sip:bob@example.com ", "SIP/2.0\r\n", Opaque},
	{"SIP OPTIONS", "OPTIONS sip:carol@example.com SIP/2.0\r", "\n", Opaque},
	{"RTSP", "DESCRIBE rtsp://example.com/fizzle ", "RTSP/1.0\r\n", Opaque},
	{"ICY", "SOURCE /mount ", "ICE/1.0\r\n", Opaque},
	{"ICY, an old source's password", "h", "ackme\r\nicy-name: a\r\n", Opaque},
	{"SMTP", "EHLO example.com", "\r\n", Opaque},
	{"FTP", "USER anonymous", "\r\n", Opaque},
	{"FTP without an argument", "AUTH TLS", "\r\n", Opaque},
	{"POP3", "CAPA", "\r\n", Opaque},
	{"IMAP", "A001 LOGIN ", "smith sesame\r\n", Opaque},
	{"IRC", "NICK wiz", "\r\n", Opaque},
	{"Redis, RESP", "", "*1\r\n$4\r\nPING\r\n", Opaque},
	{"Redis, inline", "PING", "\r\n", Opaque},
	{"Redis, inline with arguments", "SET key ", "value\r\n", Opaque},
	{"Redis, inline in lower case", "get key\r", "\n", Opaque},
	{"memcached", "get key\r", "\n", Opaque},
	{"memcached, set", "", "set key 0 0 1\r\nx\r\n", Opaque},
	{"beanstalkd", "put 0 0 60 5\r", "\nhello\r\n", Opaque},
	{"ZooKeeper", "", "ruok", Opaque},
	{"JDWP", "JDWP-H", "andshake", Opaque},
	{"memcached, binary", "", "\x80\x00\x00\x03\x00\x00\x00\x00", Opaque},
	{"NATS", "CONNECT ", "", Undecided},
	{"NATS, whole", "CONNECT {\"verbose\":false}\r", "\nPING\r\n", Opaque},
	{"NATS, a subscription", "SUB foo ", "1\r\n", Opaque},
	{"NATS, a message", "PUB foo ", "5\r\nhello\r\n", Opaque},
	{"STOMP", "CONNECT", "\naccept-version:1.2\n\n\x00", Opaque},
	{"SSH", "SSH-2", ".0-OpenSSH_9.6\r\n", Opaque},
	{"XMPP", "", "<?xml version='1.0'?>", Opaque},
	{"Git", "0032", "git-upload-pack /project.git\x00host=example.com\x00", Opaque},
	{"finger", "", "bob\r\n", Opaque},
	{"a number", "12345", "\n", Opaque},
	{"PROXY, version 1", "PROXY TCP4 ", "192.0.2.1 192.0.2.2 1 2\r\n", Opaque},
	{"JSON", "", "{\"id\":1}", Opaque},

	// Binary protocols.
	{"PostgreSQL, startup", "", "\x00\x00\x00\x08\x00\x03\x00\x00", Opaque},
	{"PostgreSQL, TLS request", "", "\x00\x00\x00\x08\x04\xd2\x16\x2f", Opaque},
	{"MySQL, login", "\x20", "\x00\x00\x01\x85\xa6\xff\x01", Opaque},
	{"MQTT", "", "\x10\x0c\x00\x04MQTT\x04\x02", Opaque},
	{"Kafka", "", "\x00\x00\x00\x14\x00\x12\x00\x03", Opaque},
	{"AMQP 0-9-1", "AMQP", "\x00\x00\x09\x01", Opaque},
	{"AMQP 1.0", "AMQP", "\x00\x01\x00\x00", Opaque},
	{"BitTorrent", "", "\x13BitTorrent protocol", Opaque},
	{"MongoDB", "", "\x3a\x00\x00\x00\x01\x00\x00\x00", Opaque},
	{"Cassandra", "", "\x04\x00\x00\x01\x05\x00\x00\x00\x00", Opaque},
	{"DNS", "", "\x00\x1d\x12\x34\x01\x00", Opaque},
	{"LDAP", "0", "\x0c\x02\x01\x01\x60\x07", Opaque},
	{"SMB", "", "\x00\x00\x00\x85\xffSMB", Opaque},
	{"RDP", "", "\x03\x00\x00\x13\x0e\xe0", Opaque},
	{"SOCKS 5", "", "\x05\x01\x00", Opaque},
	{"PROXY, version 2", "\r\n\r\n", "\x00\r\nQUIT\n", Opaque},
	{"zeros", "", "\x00\x00\x00\x00", Opaque},
	{"ones", "", "\xff\xff\xff\xff", Opaque},

	// Similar to TLS.
	{"SSL 2", "", "\x80\x2e\x01\x00\x02", Opaque},
	{"a record of SSL 2's version", "\x16", "\x02\x00\x00\x10", Opaque},
	{"a record of version 4", "\x16", "\x04\x00\x00\x10", Opaque},
	{"an empty record", "\x16\x03\x01\x00", "\x00\x16\x03\x01", Opaque},
	{"a record that is too long", "\x16\x03\x01\x40", "\x01", Opaque},
	{"a record that is far too long", "\x16\x03\x01", "\x41\x00", Opaque},
	{"a ServerHello", "\x16\x03\x03\x00\x10", "\x02\x00\x00\x0c", Opaque},
	{"an alert", "", "\x15\x03\x01\x00\x02\x01\x00", Opaque},
	{"application data", "", "\x17\x03\x03\x00\x10", Opaque},
	{"an alert within a hello", "\x16\x03\x01\x00\x01\x01", "\x15\x03\x01", Opaque},
	{"a hello that is too large", "\x16\x03\x01\x40\x00\x01", "\x01\x00\x00", Opaque},
	{"an empty hello", "\x16\x03\x01\x00\x04\x01\x00\x00", "\x00", Opaque},
	{"a hello of zeros", "\x16\x03\x01\x00\x08\x01\x00\x00\x04\x00\x00\x00", "\x00", Opaque},
}

func TestClassify(t *testing.T) {
	for _, c := range beginnings {
		first := []byte(c.held + c.decides)
		for _, n := range prefixes(len(first)) {
			want := Undecided
			if n > len(c.held) {
				want = c.want
			}
			if got := classify(first[:n]); got != want {
				t.Errorf("%s: %v after %q, want %v", c.name, protocolName(got), last(first[:n]), protocolName(want))
				break
			}
		}
	}
}

// Undecided input becomes opaque at the limit.
func TestClassifyDecidesAtTheLimit(t *testing.T) {
	hello := append([]byte{22, 3, 1, 0x40, 0, 1, 0, 0x3f, 0xfc}, make([]byte, Limit)...)
	records := bytes.Repeat([]byte{22, 3, 1, 0, 1, 0}, Limit)
	for i, b := range []byte{1, 0, 0x3f, 0xff} {
		records[6*i+5] = b
	}
	for name, first := range map[string][]byte{
		"a target without end":    []byte("GET " + strings.Repeat("a", 2*Limit)),
		"an unregistered method":  []byte("BREW /" + strings.Repeat("a", Limit) + " HTTP/1.1\r\n"),
		"a hello in one record":   hello,
		"a hello in many records": records,
		"empty lines":             bytes.Repeat([]byte("\r\n"), Limit),
	} {
		for _, n := range []int{Limit - 1, Limit, Limit + 1, len(first)} {
			want := Opaque
			if n < Limit {
				want = Undecided
			}
			if got := classify(first[:n]); got != want {
				t.Errorf("%s: %v after %d bytes, want %v", name, protocolName(got), n, protocolName(want))
			}
		}
	}
}

// A request that pauses in its first line, or whose line is longer than what is inspected, is one all the same. The
// evidence is a common method and the beginning of a path or of a URL.
func TestTheBeginningOfARequestIsOneWhenNoMoreIsWaitedFor(t *testing.T) {
	for first, want := range map[string]Protocol{
		"GET /": HTTP1, "GET /a b": HTTP1, "GET / HTTP/1.1\r": HTTP1, "post /x HT": HTTP1, "\r\nGET  /": HTTP1, "GET\t/": HTTP1,
		"GET http://a": HTTP1, "GET HTTPS://a": HTTP1, "DELETE /" + strings.Repeat("a", 2*Limit): HTTP1,
		"": Opaque, "\r\n": Opaque, "G": Opaque, "GET": Opaque, "GET ": Opaque, "GET key": Opaque, "GET http:/": Opaque, "OPTIONS *": Opaque,
		"CONNECT a:443": Opaque, "OPTIONS sip:": Opaque, "BREW /": Opaque, "PRI * HTTP/2.0\r\n": Opaque, "\x16\x03\x01": Opaque,
	} {
		if got := Late([]byte(first)); got != want {
			t.Errorf("%.40q: %v, want %v", first, protocolName(got), protocolName(want))
		}
		if len(first) >= Limit && classify([]byte(first)) != want {
			t.Errorf("%.40q is not decided at the limit", first)
		}
	}
}

func TestClassifyDoesNotAllocateForHTTP(t *testing.T) {
	for _, first := range [][]byte{[]byte("GET /index.html HTTP/1.1\r\nHost: a\r\n\r\n"), []byte("GET /ind"), []byte("\r\nget  /a b  http/1.1 \r\n"), []byte(preface), []byte("\x00\x00")} {
		if allocs := testing.AllocsPerRun(100, func() { classify(first) }); allocs != 0 {
			t.Errorf("%q: %v allocations", first, allocs)
		}
	}
}

func BenchmarkClassify(b *testing.B) {
	for _, c := range []struct {
		name  string
		first []byte
	}{
		{"HTTP1", []byte("GET /index.html?a=b&c=d HTTP/1.1\r\nHost: example.com\r\nUser-Agent: a\r\n\r\n")},
		{"HTTP2", []byte(preface)},
		{"TLS", record(hello("example.com", "h2", "http/1.1"))},
		{"opaque", []byte("\x00\x00\x00\x08\x04\xd2\x16\x2f")},
	} {
		b.Run(c.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				classify(c.first)
			}
		})
	}
}

// prefixes returns the lengths of the prefixes of n bytes to test, up to n itself. Above 600 it includes only a sample, and
// all lengths near n.
func prefixes(n int) (lengths []int) {
	for length := 0; length <= n; length++ {
		if length < 600 || length > n-100 || length%97 == 0 {
			lengths = append(lengths, length)
		}
	}
	return lengths
}

// record splits a handshake message into records of at most 16 KiB.
func record(message []byte) (records []byte) { return recordsOf(maxRecord, message) }

// recordsOf splits a handshake message into records of size bytes.
func recordsOf(size int, message []byte) (records []byte) {
	for len(message) > 0 {
		part := message[:min(size, len(message))]
		records = append(records, recordHandshake, 3, 1)
		records = binary.BigEndian.AppendUint16(records, uint16(len(part)))
		records = append(records, part...)
		message = message[len(part):]
	}
	return records
}

func protocolName(p Protocol) string {
	if names := []string{"undecided", "HTTP/1", "HTTP/2", "TLS", "opaque"}; int(p) < len(names) {
		return names[p]
	}
	return fmt.Sprintf("protocol %d", p)
}

// last shortens long input for failure messages.
func last(b []byte) []byte {
	if len(b) > 60 {
		return b[len(b)-60:]
	}
	return b
}
