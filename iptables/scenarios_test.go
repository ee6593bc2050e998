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
	family                                                        Family
	pod, peer, elsewhere, excluded, localhost, own, vm, linkLocal netip.Addr
}

var families = []addresses{
	{IPv4, nettest.PodIP4, nettest.PeerIP4, nettest.Elsewhere4, netip.MustParseAddr("203.0.113.70"),
		netip.MustParseAddr("127.0.0.1"), capture.InboundSource4, netip.MustParseAddr("192.0.2.2"), netip.MustParseAddr("169.254.0.99")},
	{IPv6, nettest.PodIP6, nettest.PeerIP6, nettest.Elsewhere6, netip.MustParseAddr("2001:db8:2::70"),
		netip.MustParseAddr("::1"), capture.InboundSource6, netip.MustParseAddr("2001:db8:3::2"), linkLocalPeer},
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
			story{"workload to a neighbour on another interface", through("eth1", neighbour), untouched},
			story{"workload asks a neighbour", udp(through("eth1", sends(workload, workload, linkLocalPeer, 53))), untouched},
			story{"a neighbour answers", udp(answerFrom(linkLocalPeer, a)), untouched})
	}
	return stories
}

var linkLocalPod, linkLocalPeer = netip.MustParseAddr("fe80::2"), netip.MustParseAddr("fe80::99")

var (
	untouched = Verdict{}
	inbound   = Verdict{Redirected, capture.InboundPort}
	outbound  = Verdict{Redirected, capture.OutboundPort}
	dns       = Verdict{Redirected, capture.DNSPort}
	given     = Verdict{Given, capture.InboundPort}
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
	{"tproxy", specOf(func(s *capture.Spec) {
		s.Mode, s.Inbound.All, s.Outbound.All, s.DropInvalid = capture.TPROXY, true, true, true
		s.InboundExcluded = ports("15021")
		s.InterfacesExcluded, s.VirtualInterfaces = []string{"tun+"}, []string{"vm0"}
	}), func(a addresses) []story {
		return []story{
			{"peer to the workload", arrives(a, 8080), given},
			{"peer to a tunnel", arrives(a, 15008), untouched},
			{"kubelet asks for readiness", arrives(a, 15021), untouched},
			{"more from that peer", established(capture.LoopMark, arrives(a, 8080)), untouched},
			{"the same, when rules in another place have given it to the agent", marked(1337, established(capture.LoopMark, arrives(a, 8080))), untouched},
			{"a peer that came before the rules", established(0, arrives(a, 8080)), untouched},
			{"what belongs to nothing", invalid(arrives(a, 8080)), dropped},
			{"what belongs to nothing, through the excluded interface", through("tun0", invalid(arrives(a, 8080))), untouched},
			{"peer through the excluded interface", through("tun0", arrives(a, 8080)), untouched},
			{"workload through the excluded interface", through("tun0", sends(workload, workload, a.elsewhere, 80)), untouched},
			{"virtual machine to a service", fromVM(a, a.elsewhere, 80), outbound},
			{"virtual machine to the pod", fromVM(a, a.pod, 8080), outbound},
			{"virtual machine to a link-local address, which only IPv6 leaves alone", fromVM(a, a.linkLocal, 8080), onlyIPv4(a, outbound)},
			{"workload to a service", sends(workload, workload, a.elsewhere, 80), outbound},
			{"workload to its own address", toItself(workload, workload, a.pod, 8080), untouched},
			{"agent to a service", sends(0, agent, a.elsewhere, 80), untouched},
			{"agent under another group to a service", sends(agent, 2000, a.elsewhere, 80), untouched},
			{"agent to its own service", toItself(0, agent, a.pod, 8080), given},
			{"agent under another group to its own service", toItself(agent, 2000, a.pod, 8080), given},
			{"agent to a tunnel of this pod", toItself(0, agent, a.pod, 15008), untouched},
			{"agent to localhost", toItself(0, agent, a.localhost, 8080), untouched},
			{"agent delivers to the workload", from(a.own, toItself(0, agent, a.pod, 8080)), untouched},
			{"agent delivers from its client's address", marked(1337, from(a.peer, toItself(0, agent, a.pod, 8080))), untouched},
			{"workload answers that address", established(1337, sends(workload, workload, a.peer, 40000)), untouched},
		}
	}},
	{"tproxy-compat", specOf(func(s *capture.Spec) {
		s.Mode, s.Compat, s.TPROXYMark, s.TPROXYTable = capture.TPROXY, true, 0x7b, 200
		s.Inbound.All, s.Outbound.List = true, networks("203.0.113.0/24,2001:db8:2::/64")
		s.RedirectDNS, s.DNSServers = true, []netip.Addr{nettest.Elsewhere4, nettest.Elsewhere6}
		s.InterfacesExcluded = []string{"vm0"}
	}), func(a addresses) []story {
		return append(dnsStories(a),
			story{"what passes through the pod, both ways", fromVM(a, a.elsewhere, 80), untouched},
			story{"workload through the excluded interface", through("vm0", sends(workload, workload, a.elsewhere, 80)), untouched},
			story{"workload asks through the excluded interface", udp(through("vm0", sends(workload, workload, a.elsewhere, 53))), untouched},
			story{"an answer through the excluded interface", udp(through("vm0", answerFrom(a.elsewhere, a))), untouched},
			story{"peer to the workload", arrives(a, 8080), given},
			story{"peer to a tunnel", arrives(a, 15008), given},
			story{"more from that peer", established(capture.LoopMark, arrives(a, 8080)), untouched},
			story{"the same, when rules in another place have given it to the agent", marked(0x7b, established(capture.LoopMark, arrives(a, 8080))), untouched},
			story{"a peer that came before the rules", established(0, arrives(a, 8080)), untouched},
			story{"workload to a service", sends(workload, workload, a.elsewhere, 80), outbound},
			story{"workload to its own address", toItself(workload, workload, a.pod, 8080), untouched},
			story{"agent to its own service", toItself(0, agent, a.pod, 8080), given},
			story{"agent under another group to its own service", toItself(agent, 2000, a.pod, 8080), inbound},
			story{"agent to localhost", toItself(0, agent, a.localhost, 8080), untouched},
			story{"agent delivers to the workload", from(a.own, toItself(0, agent, a.pod, 8080)), untouched},
			story{"agent delivers from its client's address", marked(0x7b, from(a.peer, toItself(0, agent, a.pod, 8080))), untouched},
			story{"workload answers that address", established(0x7b, sends(workload, workload, a.peer, 40000)), untouched},
			story{"workload to a name server at its own address", toItself(workload, workload, a.pod, 53), untouched},
			story{"workload to a name server at localhost", toItself(workload, workload, a.localhost, 53), untouched},
			story{"agent to a local name server", toItself(0, agent, a.pod, 53), inbound},
			story{"agent under another group to a local name server", toItself(agent, 2000, a.pod, 53), given})
	}},
	{"tproxy-lists", specOf(func(s *capture.Spec) {
		s.Mode, s.Inbound.List = capture.TPROXY, ports("8080,53")
		s.RedirectDNS, s.CaptureAllDNS = true, true
	}), func(a addresses) []story {
		return []story{
			{"peer to the workload", arrives(a, 8080), given},
			{"peer to another port", arrives(a, 8081), untouched},
			{"peer to a tunnel", arrives(a, 15008), untouched},
			{"peer to the workload's name server", arrives(a, 53), given},
			{"more from that peer", established(capture.LoopMark, arrives(a, 8080)), untouched},
			{"the same, when rules in another place have given it to the agent", marked(1337, established(capture.LoopMark, arrives(a, 8080))), untouched},
			{"a peer that came before the rules", established(0, arrives(a, 8080)), untouched},
			{"agent to its own service", toItself(0, agent, a.pod, 8080), given},
			{"agent under another group to its own service", toItself(agent, 2000, a.pod, 8080), given},
			{"agent to another port of its own", toItself(0, agent, a.pod, 8081), untouched},
			{"agent to a local name server", toItself(0, agent, a.pod, 53), untouched},
			{"agent under another group to a local name server", toItself(agent, 2000, a.pod, 53), untouched},
			{"agent asks a server", udp(sends(agent, 2000, a.elsewhere, 53)), untouched},
			{"agent under another user asks a server", udp(sends(2000, agent, a.elsewhere, 53)), untouched},
			{"a server answers", udp(answerFrom(a.elsewhere, a)), untouched},
			{"agent answers", udp(agentAnswers(agent, 2000, a)), untouched},
			{"agent under another user answers", udp(agentAnswers(2000, agent, a)), untouched},
			{"workload asks any server", udp(sends(workload, workload, a.peer, 53)), dns},
			{"workload asks any server by TCP", sends(workload, workload, a.peer, 53), dns},
			{"workload asks a server at localhost", udp(toItself(workload, workload, a.localhost, 53)), dns},
			{"workload to its own address", toItself(workload, workload, a.pod, 8080), untouched},
			{"workload to a service", sends(workload, workload, a.elsewhere, 80), untouched},
			{"agent delivers to the workload", from(a.own, toItself(0, agent, a.pod, 8080)), untouched},
			{"agent delivers from its client's address", marked(1337, from(a.peer, toItself(0, agent, a.pod, 8080))), untouched},
			{"workload answers that address", established(1337, sends(workload, workload, a.peer, 40000)), untouched},
		}
	}},
	{"dns", specOf(func(s *capture.Spec) {
		s.Outbound.All, s.RedirectDNS, s.DropInvalid = true, true, true
		s.DNSServers = []netip.Addr{nettest.Elsewhere4, nettest.Elsewhere6, netip.MustParseAddr("127.0.0.53")}
		s.OwnerGroupsExcluded, s.InterfacesExcluded = ids("2001,3000-3010"), []string{"tun0"}
		s.OutboundPortsExcluded = ports("22")
	}), func(a addresses) []story {
		stories := append(dnsStories(a),
			story{"a group that is left alone asks", udp(sends(workload, 2001, a.elsewhere, 53)), untouched},
			story{"a group that is left alone asks by TCP", sends(workload, 2001, a.elsewhere, 53), untouched},
			story{"a group of the range asks", udp(sends(workload, 3005, a.elsewhere, 53)), untouched},
			story{"a group that is left alone calls", sends(workload, 2001, a.elsewhere, 80), untouched},
			story{"a group of the range calls", sends(workload, 3010, a.elsewhere, 80), untouched},
			story{"a group outside of the range calls", sends(workload, 3011, a.elsewhere, 80), outbound},
			story{"through the excluded interface", udp(through("tun0", sends(workload, workload, a.elsewhere, 53))), untouched},
			story{"an answer through the excluded interface", udp(through("tun0", answerFrom(a.elsewhere, a))), untouched},
			story{"what arrives there", through("tun0", arrives(a, 80)), untouched},
			story{"what belongs to nothing", invalid(arrives(a, 80)), dropped},
			story{"an excluded port", sends(workload, workload, a.elsewhere, 22), untouched},
			story{"agent to its own service", toItself(agent, agent, a.pod, 8080), inbound},
			story{"agent under another user to its own service", toItself(2000, agent, a.pod, 8080), inbound},
			story{"agent to a local name server", toItself(agent, agent, a.pod, 53), untouched},
			story{"agent under another user to a local name server", toItself(2000, agent, a.pod, 53), untouched},
			story{"workload to a local name server by TCP", toItself(workload, workload, a.pod, 53), untouched},
			story{"agent delivers to the workload", from(a.own, toItself(agent, agent, a.pod, 8080)), untouched})
		if a.family == IPv4 {
			local := netip.MustParseAddr("127.0.0.53")
			stories = append(stories,
				story{"workload asks the local server", udp(toItself(workload, workload, local, 53)), dns},
				story{"workload asks the local server by TCP", toItself(workload, workload, local, 53), dns},
				story{"agent asks the local server", udp(toItself(agent, agent, local, 53)), untouched},
				story{"the local server answers from afar", udp(answerFrom(local, a)), untouched})
		}
		return stories
	}},
	{"dns-compat", specOf(func(s *capture.Spec) {
		s.Compat, s.Outbound.All, s.RedirectDNS, s.CaptureAllDNS = true, true, true, true
		s.OwnerGroups = capture.Groups{List: ids("1000,2000-2010")}
	}), func(a addresses) []story {
		return []story{
			{"workload asks any server", udp(sends(workload, workload, a.peer, 53)), dns},
			{"workload asks any server by TCP", sends(workload, workload, a.peer, 53), dns},
			{"workload asks at localhost", udp(toItself(workload, workload, a.localhost, 53)), dns},
			{"another captured group asks", udp(sends(workload, 2005, a.peer, 53)), dns},
			{"a group that is not captured asks", udp(sends(workload, 1999, a.peer, 53)), untouched},
			{"a group that is not captured calls", sends(workload, 1999, a.elsewhere, 80), untouched},
			{"a captured group calls", sends(workload, workload, a.elsewhere, 80), outbound},
			{"another captured group calls", sends(1, 2010, a.elsewhere, 80), outbound},
			{"workload to its own address", toItself(workload, workload, a.pod, 8080), untouched},
			{"workload says something else to localhost", udp(toItself(workload, workload, a.localhost, 8125)), untouched},
			{"workload says something else to a service", udp(sends(workload, workload, a.elsewhere, 8125)), untouched},
			{"agent asks a server", udp(sends(agent, 2000, a.elsewhere, 53)), untouched},
			{"agent under another user asks a server", udp(sends(2000, agent, a.elsewhere, 53)), untouched},
			{"agent asks a local server by TCP", toItself(agent, 2000, a.pod, 53), untouched},
			{"agent under another user, for which istio-iptables forgot to make an exception", toItself(2000, agent, a.pod, 53), inbound},
			{"a server answers", udp(answerFrom(a.elsewhere, a)), untouched},
			{"agent answers", udp(agentAnswers(agent, 2000, a)), untouched},
			{"agent under another user answers", udp(agentAnswers(2000, agent, a)), untouched},
			{"agent to its own service", toItself(agent, 2000, a.pod, 8080), inbound},
			{"agent under another user to its own service", toItself(2000, agent, a.pod, 8080), inbound},
			{"agent delivers to the workload", from(a.own, toItself(agent, agent, a.pod, 8080)), untouched},
		}
	}},
	{"virtual", specOf(func(s *capture.Spec) {
		s.Inbound.All, s.Outbound.List = true, networks("203.0.113.0/24,2001:db8:2::/64")
		s.VirtualInterfaces, s.InterfacesExcluded = []string{"vm0", "tap+"}, []string{"vm0", "tun0"}
		s.Localhost4 = netip.MustParsePrefix("127.0.0.0/8")
	}), func(a addresses) []story {
		return []story{
			{"virtual machine into a captured network", fromVM(a, a.elsewhere, 80), outbound},
			{"virtual machine elsewhere", fromVM(a, a.peer, 80), untouched},
			{"virtual machine to the pod", fromVM(a, a.pod, 8080), untouched},
			{"another one into a captured network", through("tap3", fromVM(a, a.elsewhere, 80)), outbound},
			{"another one to the pod", through("tap3", fromVM(a, a.pod, 8080)), untouched},
			{"peer to the workload", arrives(a, 8080), inbound},
			{"peer to a tunnel", arrives(a, 15008), untouched},
			{"peer through the excluded interface", through("tun0", arrives(a, 8080)), untouched},
			{"workload through the excluded interface", through("tun0", sends(workload, workload, a.elsewhere, 80)), untouched},
			{"workload through the virtual machine's interface", through("vm0", sends(workload, workload, a.elsewhere, 80)), untouched},
			{"workload into a captured network", sends(workload, workload, a.elsewhere, 80), outbound},
			{"workload to its own address", toItself(workload, workload, a.pod, 8080), untouched},
			{"agent to its own service", toItself(agent, 2000, a.pod, 8080), inbound},
			{"agent under another user to its own service", toItself(2000, agent, a.pod, 8080), inbound},
			{"agent to localhost", toItself(agent, agent, a.localhost, 8080), untouched},
			{"agent to a service", sends(agent, 2000, a.elsewhere, 80), untouched},
			{"agent under another user to a service", sends(2000, agent, a.elsewhere, 80), untouched},
			{"agent delivers to the workload", from(a.own, toItself(agent, agent, a.pod, 8080)), untouched},
		}
	}},
	{"nobody", specOf(func(s *capture.Spec) {
		s.Inbound.List, s.Outbound.All, s.OwnerGroups = ports("8080"), true, capture.Groups{}
	}), func(a addresses) []story {
		return []story{
			{"workload to a service", sends(workload, workload, a.elsewhere, 80), untouched},
			{"root to a service", sends(0, 0, a.elsewhere, 80), untouched},
			{"peer to the workload", arrives(a, 8080), inbound},
			{"peer to a tunnel", arrives(a, 15008), untouched},
			{"agent to its own service", toItself(agent, 2000, a.pod, 8080), inbound},
			{"agent under another user to its own service", toItself(2000, agent, a.pod, 8080), inbound},
			{"agent to a service", sends(agent, 2000, a.elsewhere, 80), untouched},
			{"agent under another user to a service", sends(2000, agent, a.elsewhere, 80), untouched},
			{"agent delivers to the workload", from(a.own, toItself(agent, agent, a.pod, 8080)), untouched},
		}
	}},
}

// dnsStories are about the server at a.elsewhere.
func dnsStories(a addresses) []story {
	return []story{
		{"workload asks the server", udp(sends(workload, workload, a.elsewhere, 53)), dns},
		{"workload asks the server by TCP", sends(workload, workload, a.elsewhere, 53), dns},
		{"workload asks another server", udp(sends(workload, workload, a.peer, 53)), untouched},
		{"workload asks the server something else", udp(sends(workload, workload, a.elsewhere, 123)), untouched},
		{"agent asks the server", udp(sends(agent, 2000, a.elsewhere, 53)), untouched},
		{"agent under another user asks the server", udp(sends(2000, agent, a.elsewhere, 53)), untouched},
		{"agent asks the server by TCP", sends(agent, agent, a.elsewhere, 53), untouched},
		{"the server answers", udp(answerFrom(a.elsewhere, a)), untouched},
		{"agent answers", udp(agentAnswers(agent, 2000, a)), untouched},
		{"agent under another user answers", udp(agentAnswers(2000, agent, a)), untouched},
	}
}

func udp(p Packet) Packet {
	p.Protocol = UDP
	return p
}

func marked(mark uint32, p Packet) Packet {
	p.Mark = mark
	return p
}

// established is a later packet of a connection with this mark.
func established(mark uint32, p Packet) Packet {
	p.State, p.ConnMark = Established, mark
	return p
}

func invalid(p Packet) Packet {
	p.State = Invalid
	return p
}

// fromVM is the first packet of a connection that a virtual machine behind vm0 opens.
func fromVM(a addresses, dst netip.Addr, port uint16) Packet {
	return Packet{In: "vm0", Src: a.vm, Dst: netip.AddrPortFrom(dst, port)}
}

// answerFrom is what a name server sends to the pod.
func answerFrom(server netip.Addr, a addresses) Packet {
	return Packet{In: "eth0", Src: server, SrcPort: 53, Dst: netip.AddrPortFrom(a.pod, 40000), State: Established}
}

// agentAnswers is what the agent sends back to who asked it.
func agentAnswers(uid, gid uint32, a addresses) Packet {
	p := established(0, toItself(uid, gid, a.localhost, 40000))
	p.SrcPort = capture.DNSPort
	return p
}

// onlyIPv4 is the verdict in IPv4; IPv6 leaves alone.
func onlyIPv4(a addresses, v Verdict) Verdict {
	if a.family == IPv6 {
		return untouched
	}
	return v
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
