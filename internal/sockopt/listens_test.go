package sockopt

import (
	"net"
	"net/netip"
	"testing"
)

func TestListens(t *testing.T) {
	listener, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	at := listener.Addr().(*net.TCPAddr).AddrPort()
	closed, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed.Close()
	near, err := net.Dial("tcp4", at.String())
	if err != nil {
		t.Fatal(err)
	}
	defer near.Close()
	for _, c := range []struct {
		name string
		at   netip.AddrPort
		want bool
	}{
		{"a listener", at, true},
		{"a listener at another address", netip.AddrPortFrom(netip.MustParseAddr("127.0.0.2"), at.Port()), false},
		{"a closed port", closed.Addr().(*net.TCPAddr).AddrPort(), false},
		{"a port with a connection only", near.LocalAddr().(*net.TCPAddr).AddrPort(), false},
	} {
		if got := Listens(c.at); got != c.want {
			t.Errorf("%s: Listens(%v) = %v", c.name, c.at, got)
		}
	}
	for network, own := range map[string]string{"tcp4": "127.0.0.1", "tcp6": "::1", "tcp": "127.0.0.1"} { // tcp: both families
		listener, err := net.Listen(network, ":0")
		if err != nil {
			t.Fatal(err)
		}
		defer listener.Close()
		if at := netip.AddrPortFrom(netip.MustParseAddr(own), listener.Addr().(*net.TCPAddr).AddrPort().Port()); !Listens(at) {
			t.Errorf("Listens(%v) = false with a listener at %v", at, listener.Addr())
		}
	}
}
