package e2e

import (
	"fmt"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

// A link-local address requires an interface, but connection tracking does not record it. The rules do not capture such
// connections, so that they arrive.
func TestLinkLocalAddressesBypassTheAgent(t *testing.T) {
	t.Parallel()
	for _, flavour := range []string{nft, legacy, native} {
		s := newStageIn(t, flavour)
		converseByLinkLocal(t, way{name: "inbound " + flavour, from: s.peer, to: s.pod, address: netip.MustParseAddr("fe80::2")})
		converseByLinkLocal(t, way{name: "outbound " + flavour, from: s.pod, to: s.peer, address: netip.MustParseAddr("fe80::99")})
	}
}

// converseByLinkLocal adds a link-local address at the way's end and exchanges messages with it.
func converseByLinkLocal(t *testing.T, w way) {
	t.Helper()
	w.to.AddAddress(t, "eth0", netip.PrefixFrom(w.address, 64))
	listener := w.to.Listen(t, "tcp6", "[::]:0").(*net.TCPListener)
	port := listener.Addr().(*net.TCPAddr).AddrPort().Port()
	// By index, because package net caches the index of an interface name across namespaces.
	var number int
	w.from.Do(t, func() error {
		eth0, err := netlink.LinkByName("eth0")
		if err == nil {
			number = eth0.Attrs().Index
		}
		return err
	})
	downstream := w.dial(t, fmt.Sprintf("[%v%%%d]:%d", w.address, number, port))
	listener.SetDeadline(time.Now().Add(nettest.Patience))
	upstream, err := listener.AcceptTCP()
	if err != nil {
		t.Fatalf("%s: the connection did not arrive: %v", w.name, err)
	}
	prepare(t, upstream)
	converse(t, downstream, upstream)
}
