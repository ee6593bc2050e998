package tcp

import (
	"encoding/binary"
	"net/netip"
	"sync"
)

// Set is a set of open connections. It is indexed by both of their ends, to find the other end of a connection within this
// process. The zero value is an empty set.
//
// The index is by hash, so that the set occupies some 20 bytes for each connection.
type Set struct {
	shards [16]setShard
}

type setShard struct {
	mu    sync.Mutex
	conns map[uint64]*Conn
}

// ends are both ends of a connection.
type ends struct{ local, remote netip.AddrPort }

// ends returns those of c. The local one is invalid if the system call fails.
func (c *Conn) ends() ends { return ends{c.LocalAddr(), c.remote} }

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

// Join adds the connection to s until its descriptor is closed. With a Layer, that may be after Close returns.
func (c *Conn) Join(s *Set) {
	c.set = s
	shard, key := s.place(c.ends())
	shard.mu.Lock()
	defer shard.mu.Unlock()
	if shard.conns == nil {
		shard.conns = make(map[uint64]*Conn)
	}
	shard.conns[key] = c
}

// leave removes the connection from its set. The descriptor must still be open: as long as it is, no other connection has
// the same ends.
func (c *Conn) leave() {
	shard, key := c.set.place(c.ends())
	shard.mu.Lock()
	defer shard.mu.Unlock()
	delete(shard.conns, key)
}

// MarkLooped finds the connection with these ends and marks it: see Looped. It returns false if the set does not contain it.
func (s *Set) MarkLooped(local, remote netip.AddrPort) bool {
	shard, key := s.place(ends{local, remote})
	shard.mu.Lock()
	defer shard.mu.Unlock()
	c := shard.conns[key]
	if c == nil || c.ends() != (ends{local, remote}) {
		return false
	}
	c.ready.Or(looped)
	return true
}

// Looped reports whether the other end of the connection is in this process, as far as MarkLooped has found it. It may be
// called after Close.
func (c *Conn) Looped() bool { return c.ready.Load()&looped != 0 }
