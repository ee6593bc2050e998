package balance

import (
	"math"
	"net/netip"
	"sort"
	"strconv"

	"github.com/pillion-proxy/pillion/internal/xxh64"
)

// The tables below are the same as Envoy's for the same hosts, so agents and Envoys of one mesh send a request with a hash
// to the same host. The keys are the addresses as "address:port".

// Limits of Envoy's configuration. It rejects sizes beyond them, and those of tables that are not prime.
const (
	maxRing      = 8 << 20
	maxTable     = 5_000_011
	defaultTable = 65537
)

// HashAddress returns the hash of a client's address, which Envoy makes of its text.
func HashAddress(address netip.Addr) uint64 {
	var buffer [48]byte
	return xxh64.Sum(address.Unmap().WithZone("").AppendTo(buffer[:0]), 0)
}

// point is a place of a host on a ring.
type point struct {
	hash uint64
	*member
}

// ringOrder sorts points by their hashes.
type ringOrder []point

func (r ringOrder) Len() int           { return len(r) }
func (r ringOrder) Swap(i, k int)      { r[i], r[k] = r[k], r[i] }
func (r ringOrder) Less(i, k int) bool { return r[i].hash < r[k].hash }

// newRing makes a ring of at least minSize places, such that the host with the lowest weight has a whole number of them.
func newRing(hosts []weighted, minSize, maxSize uint64) []point {
	if len(hosts) == 0 {
		return nil
	}
	lowest := 1.0
	for _, h := range hosts {
		lowest = min(lowest, h.share)
	}
	scale := min(math.Ceil(lowest*float64(minSize))/lowest, float64(min(maxSize, maxRing)))
	ring := make([]point, 0, int(math.Ceil(scale)))
	places, wanted := 0.0, 0.0 // up to the host; weights need not give whole numbers
	var key []byte
	for _, h := range hosts {
		key = append(h.host.Address.AppendTo(key[:0]), '_')
		prefix := len(key)
		wanted += scale * h.share
		for i := uint64(0); places < wanted; i++ {
			key = strconv.AppendUint(key[:prefix], i, 10)
			ring = append(ring, point{xxh64.Sum(key, 0), h.member})
			places++
		}
	}
	sort.Sort(ringOrder(ring))
	return ring
}

// pickRing returns the host at the first place from hash on. A further attempt takes one of the next places.
func pickRing(ring []point, hash, attempt uint64) *member {
	if len(ring) == 0 {
		return nil
	}
	n := sort.Search(len(ring), func(i int) bool { return ring[i].hash >= hash })
	return ring[(uint64(n%len(ring))+attempt)%uint64(len(ring))].member
}

// newMaglev makes a table of Maglev with size places. In each round a host takes the next free place of its own permutation,
// or leaves the round out because of its weight. The order of the hosts is that of their keys.
func newMaglev(hosts []weighted, size uint64) []*member {
	if len(hosts) == 0 {
		return nil
	}
	if size > maxTable || !isPrime(size) {
		size = defaultTable // with a size that is not prime, permutations would not reach all places
	}
	type entry struct {
		weighted
		key                string
		offset, skip, next uint64
		target             float64
	}
	highest := 0.0
	entries := make([]entry, len(hosts))
	for i, h := range hosts {
		key := h.host.Address.String()
		entries[i] = entry{weighted: h, key: key, offset: xxh64.Sum([]byte(key), 0) % size, skip: xxh64.Sum([]byte(key), 1)%(size-1) + 1}
		highest = max(highest, h.share)
	}
	sort.Slice(entries, func(i, j int) bool { return entries[i].key < entries[j].key })
	table := make([]*member, size)
	for round, filled := 1, uint64(0); ; round++ {
		for i := range entries {
			e := &entries[i]
			if float64(round)*e.share < e.target {
				continue
			}
			e.target += highest
			for table[(e.offset+e.skip*e.next)%size] != nil {
				e.next++
			}
			table[(e.offset+e.skip*e.next)%size] = e.member
			e.next++
			if filled++; filled == size {
				return table
			}
		}
	}
}

func isPrime(n uint64) bool {
	for i := uint64(2); i*i <= n; i++ {
		if n%i == 0 {
			return false
		}
	}
	return n > 2 // a table needs at least two steps
}

// pickMaglev returns the host of a hash. A further attempt changes the hash as Envoy does.
func pickMaglev(table []*member, hash, attempt uint64) *member {
	if len(table) == 0 {
		return nil
	}
	if attempt > 0 {
		hash ^= ^uint64(0) - attempt + 1
	}
	return table[hash%uint64(len(table))]
}
