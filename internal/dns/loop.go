package dns

import (
	"bytes"
	"net"
	"net/netip"
	"os"
	"sync"
)

// ownSockets is the set of UDP sockets to upstreams, by local address, with the query that each sends. If the same query
// comes from such an address, it is our own: the rules do not exempt the agent's user and redirect its queries to it. Each
// would cause another one.
//
// The address alone proves nothing. When a client queries several servers from one socket, conntrack gives all redirected
// flows after the first one a random source port, and that may be the port of one of these sockets.
type ownSockets struct {
	mu     sync.Mutex
	open   map[netip.AddrPort][]byte
	logged sync.Once
}

// add adds a socket until remove is called. It must be called before the socket sends query. The query must not change.
func (o *ownSockets) add(conn net.Conn, query []byte) (remove func()) {
	udp, ok := conn.LocalAddr().(*net.UDPAddr)
	if !ok {
		return func() {}
	}
	local := plain(udp.AddrPort())
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.open == nil {
		o.open = make(map[netip.AddrPort][]byte)
	}
	o.open[local] = query
	return func() {
		o.mu.Lock()
		defer o.mu.Unlock()
		delete(o.open, local)
	}
}

// sent reports whether one of the sockets has the address peer and sends the query raw.
func (o *ownSockets) sent(peer netip.AddrPort, raw []byte) bool {
	peer = plain(peer)
	o.mu.Lock()
	defer o.mu.Unlock()
	query, ok := o.open[peer]
	return ok && bytes.Equal(query, raw)
}

// plain removes the zone and the mapping of IPv4 to IPv6.
func plain(address netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(address.Addr().Unmap().WithZone(""), address.Port())
}

// refuseLoop answers a query of our own with SERVFAIL, and logs the first one.
func (s *Server) refuseLoop(raw []byte) []byte {
	if len(raw) < headerSize || raw[2]&bitQR != 0 {
		s.Stats.Dropped.Add(1)
		return nil
	}
	s.own.logged.Do(func() {
		s.Log.Error("dns: the rules capture the agent's own queries", "uid", os.Geteuid(), "gid", os.Getegid(), "remedy",
			"run the agent as a user or group that the rules exempt (--proxy-uid and --proxy-gid of init, 1337 by default)")
	})
	s.Stats.Loops.Add(1)
	q, _ := parse(raw)
	return s.deliver(&q, reply{raw: failure(&q, rcodeServerFailure)}, "udp", maxPacket, Query{}, s.now())
}
