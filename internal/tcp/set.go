package tcp

import (
	"encoding/binary"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Set is a set of open connections. It is indexed by both of their ends, to find the other end of a connection within this
// process. The zero value is an empty set.
//
// The index is by hash, so that the set occupies some 30 bytes for each connection.
type Set struct {
	shards [16]setShard
}

type setShard struct {
	mu    sync.Mutex
	conns map[uint64]joined
}

// joined is a connection of a set, with its group.
type joined struct {
	*Conn
	group *Group // may be nil
}

// Group is connections that are retired together: those that are open then, and those that join a set later.
type Group struct {
	retired atomic.Bool
}

// ends are both ends of a connection.
type ends struct{ local, remote netip.AddrPort }

// ends returns those of c. The local one is invalid if the system call fails.
func (c *Conn) ends() ends { return ends{c.LocalAddr(), c.RemoteAddr()} }

// place returns the shard and the key of a connection.
func (s *Set) place(e ends) (*setShard, uint64) {
	key := e.hash()
	return &s.shards[key%uint64(len(s.shards))], key
}

// hash need not resist attacks: with equal hashes, one of two connections is not found.
func (e ends) hash() uint64 {
	local, remote := e.local.Addr().As16(), e.remote.Addr().As16()
	h := uint64(e.local.Port())<<16 | uint64(e.remote.Port())
	for _, half := range [...][]byte{local[:8], local[8:], remote[:8], remote[8:]} {
		h = (h ^ binary.NativeEndian.Uint64(half)) * 0x9e3779b97f4a7c15 // 2⁶⁴ divided by the golden ratio
		h ^= h >> 32
	}
	return h
}

// returnTime bounds the time between the dial of a connection and the accept of its other end, if that is in this process.
// It is milliseconds normally; an accept loop without descriptors pauses for up to a second.
const returnTime = 5 * time.Second

// Join adds the connection to s until it is closed, as one of a group; nil: of none. returned is the result of Returned for the
// downstream connection on whose behalf this one was dialled; nil in general.
func (c *Conn) Join(s *Set, g *Group, returned *Conn) {
	c.set, c.returned, c.joined = s, returned, uptime()
	shard, key := s.place(c.ends())
	shard.mu.Lock()
	defer shard.mu.Unlock()
	if shard.conns == nil {
		shard.conns = make(map[uint64]joined)
	}
	shard.conns[key] = joined{c, g}
	if g != nil && g.retired.Load() {
		c.ready.Or(retired)
	}
}

// uptime returns milliseconds since the process started, modulo 49 days.
func uptime() uint32 { return uint32(time.Since(started) / time.Millisecond) }

var started = time.Now()

// leave removes the connection from its set. The descriptor must still be open: as long as it is, no other connection has
// the same ends.
func (c *Conn) leave() {
	shard, key := c.set.place(c.ends())
	shard.mu.Lock()
	defer shard.mu.Unlock()
	delete(shard.conns, key)
	c.set, c.returned = nil, nil
}

// Count adds the number of connections to each remote address.
func (s *Set) Count(to map[netip.AddrPort]int) {
	for i := range s.shards {
		shard := &s.shards[i]
		shard.mu.Lock()
		for _, c := range shard.conns {
			to[c.RemoteAddr()]++
		}
		shard.mu.Unlock()
	}
}

// Retire marks the connections of these groups, and wakes their owners, which close them when they are idle. Connections of
// the groups that join later, such as those that are being dialled, are marked as they join.
func (s *Set) Retire(groups map[*Group]struct{}) {
	for g := range groups {
		g.retired.Store(true) // before the shards are visited, so that no connection is missed that joins meanwhile
	}
	for i := range s.shards {
		shard := &s.shards[i]
		shard.mu.Lock()
		for _, c := range shard.conns {
			if _, ok := groups[c.group]; !ok {
				continue
			}
			c.ready.Or(retired)
			if w := c.waiter.Load(); w != nil {
				w.Wake()
			}
		}
		shard.mu.Unlock()
	}
}

// Retired reports whether the connection must not begin another request.
func (c *Conn) Retired() bool { return c.ready.Load()&retired != 0 }

// Returned looks for the connection of s whose other end a fresh downstream connection seems to be. The arguments are the
// downstream connection's peer and its original destination. The connection has these ends, is at most returnTime old,
// and has not received a byte. The result is nil if there is no such connection.
//
// The match may be a coincidence. When a client uses one source port for two destinations, conntrack gives the second
// redirected connection a random source port, and that may be the port of one of our own connections to the same
// destination. Therefore a match is a proof only if the connection was itself dialled on behalf of a downstream connection
// that matched. With proven, both are marked: see Looped.
func (s *Set) Returned(peer, dst netip.AddrPort) (c *Conn, proven bool) {
	shard, key := s.place(ends{peer, dst})
	shard.mu.Lock()
	defer shard.mu.Unlock()
	c = shard.conns[key].Conn
	if c == nil || c.ends() != (ends{peer, dst}) || !c.mayReturn() {
		return nil, false
	}
	if c.returned == nil {
		return c, false
	}
	c.ready.Or(looped)
	c.returned.ready.Or(looped)
	return c, true
}

// mayReturn reports whether the other end of the connection may be one that was just accepted, and therefore has not sent
// anything. The lock of the set must be held: it keeps the descriptor open.
func (c *Conn) mayReturn() bool {
	if time.Duration(uptime()-c.joined)*time.Millisecond > returnTime {
		return false
	}
	info, err := unix.GetsockoptTCPInfo(c.fd, unix.IPPROTO_TCP, unix.TCP_INFO)
	return err == nil && info.Bytes_received == 0 // 0 before Linux 4.1
}

// Looped reports whether the other end of the connection is in this process, as far as Returned has proven it. It may be
// called after Close.
func (c *Conn) Looped() bool { return c.ready.Load()&looped != 0 }
