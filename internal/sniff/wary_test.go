package sniff

import (
	"bytes"
	"strings"
	"testing"
)

// Behind a policy, a line that some server takes for a request is one, and is waited for. Other protocols stay opaque.
func TestWaryDetectionLetsNoRequestPass(t *testing.T) {
	for _, test := range []struct {
		name          string
		held, decides string // undecided as long as nothing of decides has arrived
		want          Protocol
	}{
		{"a common request", "GET / HTTP/1.1\r", "\n", HTTP1},
		{"a method in lower case", "foo / HTTP/1.1\r", "\n", HTTP1},
		{"a method of other characters", "\r\nG!~ /x HTTP/1.1\r", "\n", HTTP1},
		{"a long method", strings.Repeat("M", maxMethod+1) + "\t/ HTTP/1.1\r", "\n", HTTP1},
		{"another version", "GET / HTTP/", "9.9\r\n", HTTP1},
		{"a version in lower case", "foo / http/1.1", "\n", HTTP1},
		{"a URL without a version", "GET http://cdn.example/\r", "\n", HTTP1},
		{"a line without end", "foo /" + strings.Repeat("a", Limit-6), "a", HTTP1},

		{"a path without a version", "GET /\r", "\n", Opaque},
		{"IRC", "NICK guest\r", "\nUSER guest\r\n", Opaque},
		{"SSH", "SSH-2.0-OpenSSH_9.2p1", " Debian\r\n", Opaque},
		{"RTSP", "DESCRIBE rtsp://a/ RTSP/1.0\r", "\n", Opaque},
		{"Redis", "*1\r", "\n$4\r\nPING\r\n", Opaque},
		{"git", "0032git-upload-pack /project.git", "\x00host=a\x00", Opaque},
		{"LDAP", "0", "\x0c\x02\x01\x01", Opaque},
		{"PostgreSQL", "", "\x00\x00\x00\x08\x04\xd2\x16\x2f", Opaque},
	} {
		all := []byte(test.held + test.decides)
		got := Undecided
		for n := range len(all) + 1 {
			if n > 0 && n < len(test.held) && n%97 != 0 && len(all) > 1000 {
				continue
			}
			verdict := classifyWarily(all[:n])
			if n <= len(test.held) && verdict != Undecided && test.name != "SSH" && test.name != "another version" {
				t.Errorf("%s: %s after %q", test.name, protocolName(verdict), all[max(0, n-40):n])
				break
			}
			if got != Undecided && verdict != got {
				t.Errorf("%s: %s, and later %s", test.name, protocolName(got), protocolName(verdict))
			}
			got = verdict
		}
		if got != test.want {
			t.Errorf("%s: %s, want %s", test.name, protocolName(got), protocolName(test.want))
		}
	}
}

func TestWhatServersOfTLSAcceptBeginsLikeTLS(t *testing.T) {
	first := recordsOf(1000, hello("cdn.example", "h2"))
	with := func(at int, value byte) []byte {
		changed := bytes.Clone(first)
		changed[at] = value
		return changed
	}
	for name, bytes := range map[string][]byte{
		"a handshake": first, "version 0": with(1, 0), "version 4": with(1, 4), "version 15.255": with(1, 15), "an alert": append([]byte{21, 3, 1, 0, 2, 1, 90}, first...),
		"a change of keys": append([]byte{20, 3, 3, 0, 1, 1}, first...), "a broken message": {22, 3, 1, 0, 9, 7},
	} {
		for n := 2; n <= len(bytes); n++ {
			if !BeginsTLS(bytes[:n]) {
				t.Errorf("%s: the first %d bytes do not begin like TLS", name, n)
				break
			}
		}
	}
	for name, bytes := range map[string][]byte{
		"nothing": nil, "a request": []byte("GET / HTTP/1.1"), "version 16": with(1, 16), "a long alert": {21, 3, 1, 0, 3}, "data": {23, 3, 3, 0, 5},
		"another message": {22, 0, 0, 0, 9, 7}, "BitTorrent": []byte("\x13BitTorrent protocol"),
	} {
		if BeginsTLS(bytes) {
			t.Errorf("%s begins like TLS", name)
		}
	}
}
