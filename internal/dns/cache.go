package dns

import (
	"bytes"
	"container/list"
	"encoding/binary"
	"sync"
	"time"
)

const (
	// Limits of an answer's lifetime in the cache: addresses of names in a cluster change.
	maxPositive = 300 * time.Second
	maxNegative = 30 * time.Second

	bytesPerEntry = 1 << 10 // on average; bounds the whole cache
	maxCached     = 8 << 10 // bytes of one answer
	entryCost     = 200     // bytes of an entry besides its key and answer
)

// cache stores answers and evicts the least recently used ones. A nil cache is always empty.
type cache struct {
	maxEntries int
	stats      *Stats

	mu      sync.Mutex
	entries map[string]*list.Element // of *entry
	used    list.List                // the most recently used first
	bytes   int
}

type entry struct {
	key           string
	raw           []byte // never modified
	stored, until time.Time
}

func (e *entry) size() int { return len(e.key) + len(e.raw) + entryCost }

func newCache(maxEntries int, stats *Stats) *cache {
	return &cache{maxEntries: maxEntries, stats: stats, entries: make(map[string]*list.Element)}
}

// get returns a copy of the answer to q, with q's question and with the remaining TTLs, or nil if it is not cached.
func (c *cache) get(q *query, now time.Time) []byte {
	if c == nil || q.cacheKey == "" {
		return nil
	}
	e := c.find(q.cacheKey, now)
	if e == nil {
		return nil
	}
	m, err := parse(bytes.Clone(e.raw))
	if err != nil {
		return nil
	}
	copy(m.question, q.question) // the same name, in this downstream's spelling
	age := uint32(now.Sub(e.stored) / time.Second)
	for r := range m.records() {
		if r.kind != typeOPT {
			ttl := m.ttl(r)
			binary.BigEndian.PutUint32(ttl, binary.BigEndian.Uint32(ttl)-age) // until is not later than any TTL
		}
	}
	return m.raw
}

func (c *cache) find(key string, now time.Time) *entry {
	c.mu.Lock()
	defer c.mu.Unlock()
	element := c.entries[key]
	if element == nil {
		return nil
	}
	e := element.Value.(*entry)
	if !now.Before(e.until) {
		c.remove(element)
		return nil
	}
	c.used.MoveToFront(element)
	return e
}

// put stores raw, the answer to q, if it may be cached.
func (c *cache) put(q *query, raw []byte, now time.Time) {
	if c == nil || q.cacheKey == "" || len(raw) > maxCached {
		return
	}
	m, err := parse(raw)
	// An answer whose question differs in case (0x20) is not cached.
	if err != nil || !bytes.Equal(m.question, q.question) {
		return
	}
	lifetime := m.lifetime()
	if lifetime <= 0 {
		return
	}
	e := &entry{key: q.cacheKey, raw: bytes.Clone(raw), stored: now, until: now.Add(lifetime)}
	c.mu.Lock()
	defer c.mu.Unlock()
	if old := c.entries[e.key]; old != nil {
		c.remove(old)
	}
	c.entries[e.key] = c.used.PushFront(e)
	c.bytes += e.size()
	for len(c.entries) > c.maxEntries || c.bytes > c.maxEntries*bytesPerEntry {
		c.remove(c.used.Back())
	}
	c.count()
}

func (c *cache) remove(element *list.Element) {
	e := c.used.Remove(element).(*entry)
	delete(c.entries, e.key)
	c.bytes -= e.size()
	c.count()
}

func (c *cache) count() {
	c.stats.CacheEntries.Store(int64(len(c.entries)))
	c.stats.CacheBytes.Store(int64(c.bytes))
}

// lifetime is how long an answer may be cached: the least TTL of its records. For a negative answer the last field of the
// SOA is a limit as well, and without a SOA it is not cached (RFC 2308 §5). Errors and truncated answers are not cached.
func (m *message) lifetime() time.Duration {
	if m.truncated() || m.rcode() != rcodeSuccess && m.rcode() != rcodeNameError || m.edns() && m.ttl(m.opt)[0] != 0 {
		return 0
	}
	const day = 24 * 60 * 60
	seconds, minimum := uint32(day), uint32(0)
	found, soa := false, false
	for r := range m.records() {
		if r.kind == typeOPT {
			continue
		}
		ttl := binary.BigEndian.Uint32(m.ttl(r))
		if ttl >= 1<<31 { // RFC 2181 §8
			ttl = 0
		}
		seconds = min(seconds, ttl)
		switch data := m.data(r); {
		case r.section == answerSection && (r.kind == m.kind() || m.kind() == typeANY):
			found = true
		case r.section == authoritySection && r.kind == typeSOA && len(data) >= 22:
			soa, minimum = true, binary.BigEndian.Uint32(data[len(data)-4:])
		}
	}
	switch {
	case found && m.rcode() == rcodeSuccess:
		return min(time.Duration(seconds)*time.Second, maxPositive)
	case soa:
		return min(time.Duration(min(seconds, minimum))*time.Second, maxNegative)
	}
	return 0
}
