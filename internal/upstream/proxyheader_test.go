package upstream

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

// TestProxyHeader compares with bytes that were written down from the specification, PROXY protocol §2.2: signature,
// version 2 and PROXY, family and stream, length, source, destination, and their ports.
func TestProxyHeader(t *testing.T) {
	const signature = "\r\n\r\n\x00\r\nQUIT\n\x21"
	mapped := strings.Repeat("\x00", 10) + "\xff\xff"
	for _, c := range []struct{ name, downstream, destination, want string }{
		{"IPv4", "198.51.100.1:56324", "203.0.113.7:443",
			signature + "\x11\x00\x0c" + "\xc6\x33\x64\x01" + "\xcb\x00\x71\x07" + "\xdc\x04" + "\x01\xbb"},
		{"IPv6", "[2001:db8::1]:1", "[2001:db8::2]:65535",
			signature + "\x21\x00\x24" + "\x20\x01\x0d\xb8" + strings.Repeat("\x00", 11) + "\x01" +
				"\x20\x01\x0d\xb8" + strings.Repeat("\x00", 11) + "\x02" + "\x00\x01" + "\xff\xff"},
		{"IPv6 of a link, whose zone is nobody else's", "[fe80::1%2]:1", "[fe80::2%2]:2",
			signature + "\x21\x00\x24" + "\xfe\x80" + strings.Repeat("\x00", 13) + "\x01" +
				"\xfe\x80" + strings.Repeat("\x00", 13) + "\x02" + "\x00\x01" + "\x00\x02"},
		{"IPv4 in IPv6's form", "[::ffff:198.51.100.1]:1", "[::ffff:203.0.113.7]:2",
			signature + "\x11\x00\x0c" + "\xc6\x33\x64\x01" + "\xcb\x00\x71\x07" + "\x00\x01" + "\x00\x02"},
		{"one of each", "198.51.100.1:1", "[2001:db8::2]:2",
			signature + "\x21\x00\x24" + mapped + "\xc6\x33\x64\x01" +
				"\x20\x01\x0d\xb8" + strings.Repeat("\x00", 11) + "\x02" + "\x00\x01" + "\x00\x02"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newServer(t)
			near, far := s.connect(t)
			defer near.Close()
			if err := WriteProxyHeader(near, netip.MustParseAddrPort(c.downstream), netip.MustParseAddrPort(c.destination)); err != nil {
				t.Fatal(err)
			}
			nettest.Eventually(t, "the header to be there", func() bool { return !far.Quiet() })
			p := make([]byte, 100)
			if n, err := far.Read(p); err != nil || string(p[:n]) != c.want {
				t.Errorf("% x, %v\nwant % x", p[:n], err, c.want)
			}
		})
	}
}

func TestAProxyHeaderThatCannotBeWrittenIsAnError(t *testing.T) {
	s := newServer(t)
	near, far := s.connect(t)
	defer near.Close()
	far.Reset()
	nettest.Eventually(t, "the reset to be there", func() bool { return !near.Quiet() })
	address := netip.MustParseAddrPort("198.51.100.1:1")
	if err := WriteProxyHeader(near, address, address); err == nil {
		t.Error("a header was written to a dead connection")
	}
}
