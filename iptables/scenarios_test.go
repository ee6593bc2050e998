package iptables

import (
	"errors"
	"net/netip"
	"testing"

	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/internal/nettest"
)

// addresses are a family's, for stories that are the same in both.
type addresses struct {
	family                                         Family
	pod, peer, elsewhere, excluded, localhost, own netip.Addr
}

var families = []addresses{
	{IPv4, nettest.PodIP4, nettest.PeerIP4, nettest.Elsewhere4, netip.MustParseAddr("203.0.113.70"),
		netip.MustParseAddr("127.0.0.1"), capture.InboundSource4},
	{IPv6, nettest.PodIP6, nettest.PeerIP6, nettest.Elsewhere6, netip.MustParseAddr("2001:db8:2::70"),
		netip.MustParseAddr("::1"), capture.InboundSource6},
}

// story is what somebody does and what the rules should make of it. The table is judged twice: by the tracer, and by the
// kernel, which dials for real.
type story struct {
	name   string
	packet Packet
	want   Verdict
}

// scenario is a spec, by the command line that asks for it, and the stories that together meet each of its rules.
type scenario struct {
	name    string
	spec    capture.Spec
	stories func(addresses) []story
}

// allStories are the scenario's own and those that every scenario shares.
func (sc scenario) allStories(a addresses) []story {
	stories := sc.stories(a)
	if a.family == IPv6 {
		neighbour := sends(workload, workload, linkLocalPeer.WithZone("eth0"), 8081)
		fromNeighbour := arrives(a, 8081)
		fromNeighbour.Dst = netip.AddrPortFrom(linkLocalPod.WithZone("eth0"), 8081)
		stories = append(stories,
			story{"a neighbour to the pod's link-local address", fromNeighbour, untouched},
			story{"a neighbour on another interface to it", through("eth1", fromNeighbour), untouched},
			story{"workload to a neighbour's link-local address", neighbour, untouched},
			story{"workload to a neighbour on another interface", through("eth1", neighbour), untouched})
	}
	return stories
}

var linkLocalPod, linkLocalPeer = netip.MustParseAddr("fe80::2"), netip.MustParseAddr("fe80::99")

var (
	untouched = Verdict{}
	inbound   = Verdict{Redirected, capture.InboundPort}
	outbound  = Verdict{Redirected, capture.OutboundPort}
	dns       = Verdict{Redirected, capture.DNSPort}
	given     = Verdict{Intercept, capture.InboundPort}
	dropped   = Verdict{Action: Dropped}
)

// sends is the first packet that a process of this user and group sends over Ethernet.
func sends(uid, gid uint32, dst netip.Addr, port uint16) Packet {
	return Packet{Out: "eth0", UID: uid, GID: gid, Dst: netip.AddrPortFrom(dst, port)}
}

// toItself is one that stays in the pod.
func toItself(uid, gid uint32, dst netip.Addr, port uint16) Packet {
	p := sends(uid, gid, dst, port)
	p.Out = loopback
	return p
}

// from is p sent from an address that the process chose.
func from(src netip.Addr, p Packet) Packet {
	p.Src = src
	return p
}

// arrives is the first packet of a connection that the peer opens to the pod.
func arrives(a addresses, port uint16) Packet {
	return Packet{In: "eth0", Src: a.peer, Dst: netip.AddrPortFrom(a.pod, port)}
}

// through is p on another interface than eth0.
func through(name string, p Packet) Packet {
	if p.In != "" {
		p.In = name
	} else {
		p.Out = name
	}
	return p
}

const workload, agent = 1000, 1337

var scenarios = []scenario{
	{"injector", specOf(func(s *capture.Spec) {
		s.Inbound.All, s.Outbound.All = true, true
		s.InboundExcluded = ports("15090,15021,15020")
	}), func(a addresses) []story {
		return []story{
			{"workload to a service", sends(workload, workload, a.elsewhere, 5432), outbound},
			{"workload to its peer", sends(workload, workload, a.peer, 80), outbound},
			{"root to a service", sends(0, 0, a.elsewhere, 443), outbound},
			{"agent to a service", sends(agent, agent, a.elsewhere, 5432), untouched},
			{"agent under another user to a service", sends(2000, agent, a.elsewhere, 5432), untouched},
			{"agent under another group to a service", sends(agent, 2000, a.elsewhere, 5432), untouched},
			{"workload to localhost", toItself(workload, workload, a.localhost, 8080), untouched},
			{"workload to its own address", toItself(workload, workload, a.pod, 8080), untouched},
			{"agent to the workload's address: its own service", toItself(agent, agent, a.pod, 8080), inbound},
			{"agent under another user to its own service", toItself(2000, agent, a.pod, 8080), inbound},
			{"agent to a tunnel of this pod", toItself(agent, agent, a.pod, 15008), untouched},
			{"agent to localhost", toItself(agent, agent, a.localhost, 8080), untouched},
			{"agent delivers to the workload", from(a.own, toItself(agent, agent, a.pod, 8080)), untouched},
			{"peer to the workload", arrives(a, 8080), inbound},
			{"peer to ssh", arrives(a, 22), inbound},
			{"peer to a tunnel", arrives(a, 15008), untouched},
			{"peer scrapes the agent", arrives(a, 15090), untouched},
			{"kubelet asks for readiness", arrives(a, 15021), untouched},
			{"peer asks for the status", arrives(a, 15020), untouched},
		}
	}},
	{"lists", specOf(func(s *capture.Spec) {
		s.ProxyUIDs, s.ProxyGIDs = ids("1337,1338"), ids("1337,2000")
		s.Inbound.List = ports("8080,9000:9010")
		s.InboundExcluded = ports("8080")
		s.Outbound.List = networks("203.0.113.7/25,2001:db8:2::/64")
		s.OutboundExcluded = networks("203.0.113.64/26,2001:db8:2::70/128")
		s.OutboundPorts = ports("5432")
		s.OutboundPortsExcluded = ports("22,7000:7001")
	}), func(a addresses) []story {
		return []story{
			{"workload into a captured network", sends(workload, workload, a.elsewhere, 80), outbound},
			{"workload into an excluded network", sends(workload, workload, a.excluded, 80), untouched},
			{"a captured port does not win over an excluded network", sends(workload, workload, a.excluded, 5432), untouched},
			{"workload outside of captured networks", sends(workload, workload, a.peer, 80), untouched},
			{"a captured port outside of captured networks", sends(workload, workload, a.peer, 5432), outbound},
			{"an excluded port in a captured network", sends(workload, workload, a.elsewhere, 22), untouched},
			{"an excluded range in a captured network", sends(workload, workload, a.elsewhere, 7001), untouched},
			{"an excluded port of its own service", toItself(agent, agent, a.pod, 22), untouched},
			{"first user", sends(1337, 1, a.elsewhere, 80), untouched},
			{"second user", sends(1338, 1, a.elsewhere, 80), untouched},
			{"first group", sends(1, 1337, a.elsewhere, 80), untouched},
			{"second group", sends(1, 2000, a.elsewhere, 80), untouched},
			{"first user to its own service", toItself(1337, 1, a.pod, 8080), inbound},
			{"second user to its own service", toItself(1338, 1, a.pod, 8080), inbound},
			{"first group to its own service", toItself(1, 1337, a.pod, 8080), inbound},
			{"second group to its own service", toItself(1, 2000, a.pod, 8080), inbound},
			{"workload to its own address", toItself(workload, workload, a.pod, 8080), untouched},
			{"agent delivers to the workload", from(a.own, toItself(1338, 1, a.pod, 8080)), untouched},
			{"peer to a captured port", arrives(a, 8080), inbound},
			{"peer to the middle of a captured range", arrives(a, 9005), inbound},
			{"peer to the end of a captured range", arrives(a, 9010), inbound},
			{"peer behind a captured range", arrives(a, 9011), untouched},
			{"peer to a tunnel", arrives(a, 15008), untouched},
		}
	}},
	{"outbound-only", specOf(func(s *capture.Spec) { s.Outbound.All = true }), func(a addresses) []story {
		return []story{
			{"peer to the workload", arrives(a, 8080), untouched},
			{"agent to its own service", toItself(agent, agent, a.pod, 8080), inbound},
			{"agent under another user to its own service", toItself(2000, agent, a.pod, 8080), inbound},
			{"agent to a service", sends(agent, agent, a.elsewhere, 80), untouched},
			{"agent under another user to a service", sends(2000, agent, a.elsewhere, 80), untouched},
			{"agent delivers to the workload", from(a.own, toItself(agent, agent, a.pod, 8080)), untouched},
			{"workload to its own address", toItself(workload, workload, a.pod, 8080), untouched},
			{"workload to a service", sends(workload, workload, a.elsewhere, 80), outbound},
		}
	}},
	{"loopback-network", specOf(func(s *capture.Spec) {
		s.Outbound.List = networks("127.0.0.0/8,2001:db8::/32")
	}), func(a addresses) []story {
		stories := []story{
			{"workload to localhost", toItself(workload, workload, a.localhost, 8080), untouched},
			{"agent to localhost", toItself(agent, agent, a.localhost, 8080), untouched},
			{"agent to its own service", toItself(agent, agent, a.pod, 8080), inbound},
			{"agent under another user to its own service", toItself(2000, agent, a.pod, 8080), inbound},
			{"agent to a service", sends(agent, agent, a.elsewhere, 80), untouched},
			{"agent under another user to a service", sends(2000, agent, a.elsewhere, 80), untouched},
			{"agent delivers to the workload", from(a.own, toItself(agent, agent, a.pod, 8080)), untouched},
		}
		if a.family == IPv6 {
			return append(stories,
				story{"workload to its own address, which is in a captured network", toItself(workload, workload, a.pod, 8080), outbound})
		}
		other := netip.MustParseAddr("127.0.0.2")
		return append(stories,
			story{"workload to another loopback address", toItself(workload, workload, other, 8080), outbound},
			story{"agent to another loopback address", toItself(agent, agent, other, 8080), inbound},
			story{"workload to its own address", toItself(workload, workload, a.pod, 8080), untouched})
	}},
	{"interfaces", specOf(func(s *capture.Spec) {
		s.Inbound.All, s.Outbound.All = true, true
		s.InterfacesExcluded = []string{"eth0", "tun+"}
	}), func(a addresses) []story {
		return []story{
			{"workload through the excluded interface", sends(workload, workload, a.elsewhere, 80), untouched},
			{"workload through a wildcard", through("tun7", sends(workload, workload, a.elsewhere, 80)), untouched},
			{"workload through another interface", through("eth1", sends(workload, workload, a.elsewhere, 80)), outbound},
			{"workload to its own address", toItself(workload, workload, a.pod, 8080), untouched},
			{"peer through the excluded interface", arrives(a, 8080), untouched},
			{"peer through a wildcard", through("tun7", arrives(a, 8080)), untouched},
			{"peer through another interface", through("eth1", arrives(a, 8080)), inbound},
			{"peer to a tunnel through another interface", through("eth1", arrives(a, 15008)), untouched},
			{"agent to its own service", toItself(agent, agent, a.pod, 8080), inbound},
			{"agent under another user to its own service", toItself(2000, agent, a.pod, 8080), inbound},
			{"agent through another interface", through("eth1", sends(agent, agent, a.elsewhere, 80)), untouched},
			{"agent under another user, too", through("eth1", sends(2000, agent, a.elsewhere, 80)), untouched},
			{"agent delivers to the workload", from(a.own, toItself(agent, agent, a.pod, 8080)), untouched},
		}
	}},
}

func specOf(change func(*capture.Spec)) capture.Spec {
	spec := capture.Default()
	change(&spec)
	return spec
}

func ports(text string) []capture.PortRange {
	list, err := capture.ParsePortList(text)
	if err != nil {
		panic(err)
	}
	return list
}

func ids(text string) []capture.IDRange {
	list, err := capture.ParseIDs(text, func(string) (string, error) { return "", errors.New("no names") })
	if err != nil {
		panic(err)
	}
	return list
}

func networks(text string) []netip.Prefix {
	list, err := capture.ParsePrefixList(text)
	if err != nil {
		panic(err)
	}
	return list
}

// forEach runs test for every scenario in both families.
func forEach(t *testing.T, test func(*testing.T, scenario, addresses)) {
	for _, sc := range scenarios {
		for _, a := range families {
			t.Run(sc.name+"/"+a.family.String(), func(t *testing.T) { test(t, sc, a) })
		}
	}
}
