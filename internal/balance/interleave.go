package balance

import (
	"math"
	"math/rand/v2"
	"slices"
	"sync/atomic"

	"github.com/pillion-proxy/pillion/internal/mesh"
)

// pick chooses a host by a policy other than those by hash. random is a random number.
func (s *set) pick(b *mesh.Balancing, random uint64) *member {
	switch {
	case len(s.members) == 0:
		return nil
	case len(s.members) == 1:
		return s.members[0]
	}
	switch b.Policy {
	case mesh.LeastRequest:
		return s.leastRequest(b.Choices, random)
	case mesh.RoundRobin:
		return s.members[s.balance.next()]
	}
	return s.members[scale(uint32(random), len(s.members))] // Random regards no weights, as in Envoy
}

// leastRequest chooses the host with the fewest requests in progress, relative to its weight, of some that are chosen at
// random by weight. The first of equal ones is taken. Envoy does the same for equal weights; for others its scheduler
// takes weight/(active+1) as the weight, which needs a lock for each pick. Idle hosts get requests by weight in both.
func (s *set) leastRequest(choices uint32, random uint64) *member {
	best := s.draw(uint32(random))
	random >>= 32
	for i := uint32(1); i < max(choices, 1); i++ {
		other := s.draw(uint32(random))
		if float64(other.host.active.Load())*best.weight < float64(best.host.active.Load())*other.weight {
			best = other
		}
		random = uint64(rand.Uint32())
	}
	return best
}

// draw returns the member that a random number stands for.
func (s *set) draw(random uint32) *member {
	if s.balance.weights == nil {
		return s.members[scale(random, len(s.members))]
	}
	n, _ := slices.BinarySearch(s.balance.sums, uint64(scale(random, int(s.balance.sums[len(s.members)-1])))+1)
	return s.members[n]
}

// scale maps a random number to one below n.
func scale(random uint32, n int) int { return int(uint64(random) * uint64(n) >> 32) }

// interleaving is a schedule of hosts by weight. It spreads the turns of a host evenly, as a queue by earliest deadline
// does, but has no queue: turn n belongs to host n modulo their number, which takes or leaves it. In as many rounds as the
// highest weight is, each host takes as many turns as its weight is.
type interleaving struct {
	turn    atomic.Uint64
	hosts   uint64
	highest uint64
	weights []uint64 // nil: they are equal
	sums    []uint64 // of the weights up to each host
}

// maxTurns bounds the highest weight in a schedule. Higher ones are scaled.
const maxTurns = 1<<16 - 1

// fill makes the schedule of members. It begins at a random turn, so that many agents do not begin with the same host.
func (s *interleaving) fill(members []*member) {
	s.hosts = uint64(len(members))
	s.turn.Store(uint64(rand.Uint32()))
	if len(members) < 2 {
		return
	}
	low, high := math.Inf(1), 0.0
	for _, m := range members {
		low, high = min(low, m.weight), max(high, m.weight)
	}
	if low == high {
		return
	}
	factor := 1.0
	if high > maxTurns || low != math.Trunc(low) || high != math.Trunc(high) {
		factor = maxTurns / high
	}
	sum := uint64(0)
	for _, m := range members {
		weight := max(1, uint64(math.Round(m.weight*factor)))
		sum += weight
		s.highest = max(s.highest, weight)
		s.weights, s.sums = append(s.weights, weight), append(s.sums, sum)
	}
}

// next returns the host whose turn it is.
func (s *interleaving) next() uint64 {
	for {
		turn := s.turn.Add(1)
		host := turn % s.hosts
		if s.weights == nil {
			return host
		}
		round, weight := turn/s.hosts, s.weights[host]
		if (weight*(round%s.highest)+host*(s.highest/2))%s.highest >= s.highest-weight {
			return host
		}
	}
}
