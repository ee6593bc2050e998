package balance

import (
	"fmt"
	"math"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/xxh64"
)

// local returns endpoints at 127.0.0.1 with ports from 90 on, as the tests of Envoy have.
func local(weights ...uint32) *mesh.Assignment {
	a := endpoints(weights...)
	for i := range a.Localities[0].Endpoints {
		a.Localities[0].Endpoints[i].Address = netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), uint16(90+i))
	}
	return a
}

// The ring is the one that Envoy's test of its ring hash balancer lists (RingHashLoadBalancerTest.Basic).
func TestARingIsEnvoys(t *testing.T) {
	_, c, _ := newTest(t, clusterOf(mesh.RingHash, func(c *mesh.Cluster) { c.Balancing.MinRing = 12 }), local(1, 1, 1, 1, 1, 1))
	pick(t, c, &Request{})
	var got []string
	for _, p := range c.view.Load().levels[0].hash.ring {
		got = append(got, fmt.Sprintf("%d:%d", p.host.Address.Port(), p.hash))
	}
	want := []string{
		"94:833437586790550860", "92:928266305478181108", "90:1033482794131418490", "95:3551244743356806947",
		"93:3851675632748031481", "91:5583722120771150861", "91:6311230543546372928", "93:7700377290971790572",
		"95:13144177310400110813", "92:13444792449719432967", "94:15516499411664133160", "90:16117243373044804889",
	}
	if strings.Join(got, " ") != strings.Join(want, " ") {
		t.Errorf("the ring is\n%v, want\n%v", got, want)
	}
	for hash, port := range map[uint64]uint16{
		0: 94, math.MaxUint64: 94, 3551244743356806947: 95, 3551244743356806948: 93, 16117243373044804880: 90,
	} {
		choice := pick(t, c, &Request{Hash: hash, Hashed: true})
		if choice.Address.Port() != port {
			t.Errorf("the hash %d goes to %v, want port %d", hash, choice.Address, port)
		}
		choice.Lease.End(ok)
	}
}

// The tables are those of Envoy's test of its Maglev balancer (MaglevLoadBalancerTest).
func TestAMaglevTableIsEnvoys(t *testing.T) {
	for name, c := range map[string]struct {
		size      uint64
		hosts     *mesh.Assignment
		byWeights []uint32 // of localities with one host each
		want      string
	}{
		"Basic":                   {7, local(1, 1, 1, 1, 1, 1), nil, "2401503"},
		"Weighted":                {17, local(1, 2), nil, "10010110111110101"},
		"LocalityWeighted, same":  {17, local(1, 2), []uint32{1, 1}, "10010110010100101"},
		"LocalityWeighted, other": {17, local(1, 2, 3), []uint32{8, 2, 0}, "10000010010100000"},
	} {
		t.Run(name, func(t *testing.T) {
			if c.byWeights != nil {
				all := c.hosts.Localities[0].Endpoints
				c.hosts.Localities = nil
				for i, weight := range c.byWeights {
					c.hosts.Localities = append(c.hosts.Localities, mesh.Locality{Weight: weight, Endpoints: all[i : i+1]})
				}
			}
			_, cluster, _ := newTest(t, clusterOf(mesh.Maglev, func(m *mesh.Cluster) {
				m.Balancing.Table, m.Balancing.LocalityWeighted = c.size, c.byWeights != nil
			}), c.hosts)
			for i := range 3 * c.size {
				choice := pick(t, cluster, &Request{Hash: i, Hashed: true})
				if got, want := choice.Address.Port()-90, uint16(c.want[i%c.size]-'0'); got != want {
					t.Errorf("the hash %d goes to host %d, want %d", i, got, want)
				}
				choice.Lease.End(ok)
			}
		})
	}
}

// Envoy's test with 1,024 hosts in two localities (LocalityWeightedLopsided), and a size that Envoy would reject.
func TestAMaglevTableWithLopsidedWeights(t *testing.T) {
	for _, size := range []uint64{65537, 65536, 1, 0} {
		a := &mesh.Assignment{Localities: []mesh.Locality{{Weight: 127}, {Weight: 1}}}
		for i := range 1024 {
			l := &a.Localities[min(i, 1)]
			l.Endpoints = append(l.Endpoints, mesh.Endpoint{Address: address(i), Weight: 1})
		}
		_, c, _ := newTest(t, clusterOf(mesh.Maglev, func(c *mesh.Cluster) { c.Balancing.LocalityWeighted, c.Balancing.Table = true, size }), a)
		counts := map[netip.AddrPort]int{}
		pick(t, c, &Request{})
		for _, m := range c.view.Load().levels[0].hash.table {
			counts[m.host.Address]++
		}
		if len(counts) != 1024 || counts[address(0)] != 65537-1023 {
			t.Errorf("size %d: %d hosts; the heavy one has %d places", size, len(counts), counts[address(0)])
		}
	}
}

// The order of the hosts in the assignment has no effect.
func TestHashesDoNotDependOnTheOrderOfHosts(t *testing.T) {
	for _, policy := range []mesh.Policy{mesh.RingHash, mesh.Maglev} {
		reversed := equal(9)
		slices.Reverse(reversed.Localities[0].Endpoints)
		_, c, _ := newTest(t, clusterOf(policy), equal(9))
		_, r, _ := newTest(t, clusterOf(policy), reversed)
		for i := range uint64(500) {
			request := &Request{Hash: i * 0x9E3779B185EBCA87, Hashed: true}
			if a, b := pick(t, c, request).Address, pick(t, r, request).Address; a != b {
				t.Fatalf("policy %d: hash %d goes to %v or %v", policy, request.Hash, a, b)
			}
		}
	}
}

// A request with a hash goes to the same host, whichever hosts come and go, unless its own goes; only few move.
func TestHashesStayWhenHostsComeAndGo(t *testing.T) {
	const hashes = 4000
	for _, policy := range []mesh.Policy{mesh.RingHash, mesh.Maglev} {
		config := clusterOf(policy)
		b, c, s := newTest(t, config, equal(10))
		place := func(i int) netip.AddrPort {
			choice := pick(t, c, &Request{Hash: xxh64.Sum(fmt.Append(nil, i), 0), Hashed: true})
			choice.Lease.End(ok)
			return choice.Address
		}
		before := make([]netip.AddrPort, hashes)
		for i := range before {
			before[i] = place(i)
		}
		fewer := equal(10)
		fewer.Localities[0].Endpoints = fewer.Localities[0].Endpoints[1:]
		s.set(config, fewer)
		b.Cluster(s.Snapshot, config)
		moved, lost := 0, 0
		for i := range before {
			now := place(i)
			switch {
			case now == address(0):
				t.Fatalf("policy %d: the removed host is chosen", policy)
			case before[i] == address(0):
				lost++
			case now != before[i]:
				moved++
			}
		}
		if moved > hashes/8 { // a host has more places on a ring with fewer hosts, so some move
			t.Errorf("policy %d: %d of %d hashes moved without need", policy, moved, hashes)
		}
		if lost < hashes/20 || lost > hashes/5 {
			t.Errorf("policy %d: the removed host had %d of %d hashes", policy, lost, hashes)
		}
	}
}

// Without a hash, hosts are chosen at random; the hosts to avoid are avoided as long as there are others.
func TestConsistentHashingWithoutAHash(t *testing.T) {
	for _, policy := range []mesh.Policy{mesh.RingHash, mesh.Maglev} {
		_, c, _ := newTest(t, clusterOf(policy), equal(4))
		for host, n := range spread(t, c, 20000, &Request{}) {
			if n < 3000 || n > 7000 {
				t.Errorf("policy %d: %v got %d of 20000", policy, host, n)
			}
		}
		first := pick(t, c, &Request{Hash: 7, Hashed: true})
		if other := pick(t, c, &Request{Hash: 7, Hashed: true, Avoid: []netip.AddrPort{first.Address}, Repicks: 5}); policy == mesh.Maglev && other.Address == first.Address {
			t.Errorf("policy %d: the host to avoid was chosen again", policy)
		}
	}
}
