// Package rulestest holds what the tests of several rule packages share: scenarios with their packets and verdicts,
// manipulations of installed rules, namespaces with listeners, and golden files.
package rulestest

import (
	"errors"
	"net/netip"
	"testing"

	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/iptables/ruleset"
	"github.com/pillion-proxy/pillion/iptables/trace"
)

var TPROXYAll = SpecOf(func(s *capture.Spec) { s.Mode, s.Inbound.All, s.Outbound.All = capture.TPROXY, true, true })

// Addresses are those of one family, for stories that apply to both.
type Addresses struct {
	Family                                                        ruleset.Family
	Pod, Peer, Elsewhere, Excluded, Localhost, Own, vm, linkLocal netip.Addr
}

var Families = []Addresses{
	{ruleset.IPv4, nettest.PodIP4, nettest.PeerIP4, nettest.Elsewhere4, netip.MustParseAddr("203.0.113.70"),
		netip.MustParseAddr("127.0.0.1"), capture.InboundSource4, netip.MustParseAddr("192.0.2.2"), netip.MustParseAddr("169.254.0.99")},
	{ruleset.IPv6, nettest.PodIP6, nettest.PeerIP6, nettest.Elsewhere6, netip.MustParseAddr("2001:db8:2::70"),
		netip.MustParseAddr("::1"), capture.InboundSource6, netip.MustParseAddr("2001:db8:3::2"), linkLocalPeer},
}

// Story is a packet and the expected verdict. Stories are judged twice: by the tracer, and by the kernel with real
// connections.
type Story struct {
	Name   string
	Packet trace.Packet
	Want   trace.Verdict
}

// Scenario is a spec, named by the command line that asks for it, and stories that together meet each of its rules.
type Scenario struct {
	Name    string
	Spec    capture.Spec
	Stories func(Addresses) []Story
}

// AllStories returns the scenario's own stories and those that all scenarios share.
func (sc Scenario) AllStories(a Addresses) []Story {
	stories := sc.Stories(a)
	if a.Family == ruleset.IPv6 {
		neighbour := Sends(Workload, Workload, linkLocalPeer.WithZone("eth0"), 8081)
		fromNeighbour := Arrives(a, 8081)
		fromNeighbour.Dst = netip.AddrPortFrom(linkLocalPod.WithZone("eth0"), 8081)
		stories = append(stories,
			Story{"a neighbour to the pod's link-local address", fromNeighbour, Untouched},
			Story{"a neighbour on another interface to it", through("eth1", fromNeighbour), Untouched},
			Story{"workload to a neighbour's link-local address", neighbour, Untouched},
			Story{"workload to a neighbour on another interface", through("eth1", neighbour), Untouched},
			Story{"workload asks a neighbour", UDP(through("eth1", Sends(Workload, Workload, linkLocalPeer, 53))), Untouched},
			Story{"a neighbour answers", UDP(answerFrom(linkLocalPeer, a)), Untouched})
	}
	return stories
}

var linkLocalPod, linkLocalPeer = netip.MustParseAddr("fe80::2"), netip.MustParseAddr("fe80::99")

var (
	Untouched = trace.Verdict{}
	Inbound   = trace.Verdict{Action: trace.Redirected, Port: capture.InboundPort}
	Outbound  = trace.Verdict{Action: trace.Redirected, Port: capture.OutboundPort}
	Dns       = trace.Verdict{Action: trace.Redirected, Port: capture.DNSPort}
	Given     = trace.Verdict{Action: trace.Given, Port: capture.InboundPort}
	Docker    = trace.Verdict{Action: "answered by Docker's resolver"}
	dropped   = trace.Verdict{Action: trace.Dropped}
)

// Sends is the first packet that a process of this user and group sends over Ethernet.
func Sends(uid, gid uint32, dst netip.Addr, port uint16) trace.Packet {
	return trace.Packet{Out: "eth0", UID: uid, GID: gid, Dst: netip.AddrPortFrom(dst, port)}
}

// ToItself is one that stays in the pod.
func ToItself(uid, gid uint32, dst netip.Addr, port uint16) trace.Packet {
	p := Sends(uid, gid, dst, port)
	p.Out = ruleset.Loopback
	return p
}

// From is p sent from an address that the process chose.
func From(src netip.Addr, p trace.Packet) trace.Packet {
	p.Src = src
	return p
}

// Arrives is the first packet of a connection that the peer opens to the pod.
func Arrives(a Addresses, port uint16) trace.Packet {
	return trace.Packet{In: "eth0", Src: a.Peer, Dst: netip.AddrPortFrom(a.Pod, port)}
}

// through is p on another interface than eth0.
func through(name string, p trace.Packet) trace.Packet {
	if p.In != "" {
		p.In = name
	} else {
		p.Out = name
	}
	return p
}

const Workload, Agent = 1000, 1337

var Scenarios = []Scenario{
	{"injector", SpecOf(func(s *capture.Spec) {
		s.Inbound.All, s.Outbound.All = true, true
		s.InboundExcluded = Ports("15090,15021,15020")
	}), func(a Addresses) []Story {
		return []Story{
			{"workload to a service", Sends(Workload, Workload, a.Elsewhere, 5432), Outbound},
			{"workload to its peer", Sends(Workload, Workload, a.Peer, 80), Outbound},
			{"root to a service", Sends(0, 0, a.Elsewhere, 443), Outbound},
			{"agent to a service", Sends(Agent, Agent, a.Elsewhere, 5432), Untouched},
			{"agent under another user to a service", Sends(2000, Agent, a.Elsewhere, 5432), Untouched},
			{"agent under another group to a service", Sends(Agent, 2000, a.Elsewhere, 5432), Untouched},
			{"workload to localhost", ToItself(Workload, Workload, a.Localhost, 8080), Untouched},
			{"workload to its own address", ToItself(Workload, Workload, a.Pod, 8080), Untouched},
			{"agent to the workload's address: its own service", ToItself(Agent, Agent, a.Pod, 8080), Inbound},
			{"agent under another user to its own service", ToItself(2000, Agent, a.Pod, 8080), Inbound},
			{"agent to a tunnel of this pod", ToItself(Agent, Agent, a.Pod, 15008), Untouched},
			{"agent to localhost", ToItself(Agent, Agent, a.Localhost, 8080), Untouched},
			{"agent delivers to the workload", From(a.Own, ToItself(Agent, Agent, a.Pod, 8080)), Untouched},
			{"peer to the workload", Arrives(a, 8080), Inbound},
			{"peer to ssh", Arrives(a, 22), Inbound},
			{"peer to a tunnel", Arrives(a, 15008), Untouched},
			{"peer scrapes the agent", Arrives(a, 15090), Untouched},
			{"kubelet asks for readiness", Arrives(a, 15021), Untouched},
			{"peer asks for the status", Arrives(a, 15020), Untouched},
		}
	}},
	{"lists", SpecOf(func(s *capture.Spec) {
		s.ProxyUIDs, s.ProxyGIDs = IDs("1337,1338"), IDs("1337,2000")
		s.Inbound.List = Ports("8080,9000:9010")
		s.InboundExcluded = Ports("8080")
		s.Outbound.List = Networks("203.0.113.7/25,2001:db8:2::/64")
		s.OutboundExcluded = Networks("203.0.113.64/26,2001:db8:2::70/128")
		s.OutboundPorts = Ports("5432")
		s.OutboundPortsExcluded = Ports("22,7000:7001")
	}), func(a Addresses) []Story {
		return []Story{
			{"workload into a captured network", Sends(Workload, Workload, a.Elsewhere, 80), Outbound},
			{"workload into an excluded network", Sends(Workload, Workload, a.Excluded, 80), Untouched},
			{"a captured port does not win over an excluded network", Sends(Workload, Workload, a.Excluded, 5432), Untouched},
			{"workload outside of captured networks", Sends(Workload, Workload, a.Peer, 80), Untouched},
			{"a captured port outside of captured networks", Sends(Workload, Workload, a.Peer, 5432), Outbound},
			{"an excluded port in a captured network", Sends(Workload, Workload, a.Elsewhere, 22), Untouched},
			{"an excluded range in a captured network", Sends(Workload, Workload, a.Elsewhere, 7001), Untouched},
			{"an excluded port of its own service", ToItself(Agent, Agent, a.Pod, 22), Untouched},
			{"first user", Sends(1337, 1, a.Elsewhere, 80), Untouched},
			{"second user", Sends(1338, 1, a.Elsewhere, 80), Untouched},
			{"first group", Sends(1, 1337, a.Elsewhere, 80), Untouched},
			{"second group", Sends(1, 2000, a.Elsewhere, 80), Untouched},
			{"first user to its own service", ToItself(1337, 1, a.Pod, 8080), Inbound},
			{"second user to its own service", ToItself(1338, 1, a.Pod, 8080), Inbound},
			{"first group to its own service", ToItself(1, 1337, a.Pod, 8080), Inbound},
			{"second group to its own service", ToItself(1, 2000, a.Pod, 8080), Inbound},
			{"workload to its own address", ToItself(Workload, Workload, a.Pod, 8080), Untouched},
			{"agent delivers to the workload", From(a.Own, ToItself(1338, 1, a.Pod, 8080)), Untouched},
			{"peer to a captured port", Arrives(a, 8080), Inbound},
			{"peer to the middle of a captured range", Arrives(a, 9005), Inbound},
			{"peer to the end of a captured range", Arrives(a, 9010), Inbound},
			{"peer behind a captured range", Arrives(a, 9011), Untouched},
			{"peer to a tunnel", Arrives(a, 15008), Untouched},
		}
	}},
	{"outbound-only", SpecOf(func(s *capture.Spec) { s.Outbound.All = true }), func(a Addresses) []Story {
		return []Story{
			{"peer to the workload", Arrives(a, 8080), Untouched},
			{"agent to its own service", ToItself(Agent, Agent, a.Pod, 8080), Inbound},
			{"agent under another user to its own service", ToItself(2000, Agent, a.Pod, 8080), Inbound},
			{"agent to a service", Sends(Agent, Agent, a.Elsewhere, 80), Untouched},
			{"agent under another user to a service", Sends(2000, Agent, a.Elsewhere, 80), Untouched},
			{"agent delivers to the workload", From(a.Own, ToItself(Agent, Agent, a.Pod, 8080)), Untouched},
			{"workload to its own address", ToItself(Workload, Workload, a.Pod, 8080), Untouched},
			{"workload to a service", Sends(Workload, Workload, a.Elsewhere, 80), Outbound},
		}
	}},
	{"loopback-network", SpecOf(func(s *capture.Spec) {
		s.Outbound.List = Networks("127.0.0.0/8,2001:db8::/32")
	}), func(a Addresses) []Story {
		stories := []Story{
			{"workload to localhost", ToItself(Workload, Workload, a.Localhost, 8080), Untouched},
			{"agent to localhost", ToItself(Agent, Agent, a.Localhost, 8080), Untouched},
			{"agent to its own service", ToItself(Agent, Agent, a.Pod, 8080), Inbound},
			{"agent under another user to its own service", ToItself(2000, Agent, a.Pod, 8080), Inbound},
			{"agent to a service", Sends(Agent, Agent, a.Elsewhere, 80), Untouched},
			{"agent under another user to a service", Sends(2000, Agent, a.Elsewhere, 80), Untouched},
			{"agent delivers to the workload", From(a.Own, ToItself(Agent, Agent, a.Pod, 8080)), Untouched},
		}
		if a.Family == ruleset.IPv6 {
			return append(stories,
				Story{"workload to its own address, which is in a captured network", ToItself(Workload, Workload, a.Pod, 8080), Outbound})
		}
		other := netip.MustParseAddr("127.0.0.2")
		return append(stories,
			Story{"workload to another loopback address", ToItself(Workload, Workload, other, 8080), Outbound},
			Story{"agent to another loopback address", ToItself(Agent, Agent, other, 8080), Inbound},
			Story{"workload to its own address", ToItself(Workload, Workload, a.Pod, 8080), Untouched})
	}},
	{"interfaces", SpecOf(func(s *capture.Spec) {
		s.Inbound.All, s.Outbound.All = true, true
		s.InterfacesExcluded = []string{"eth0", "tun+"}
	}), func(a Addresses) []Story {
		return []Story{
			{"workload through the excluded interface", Sends(Workload, Workload, a.Elsewhere, 80), Untouched},
			{"workload through a wildcard", through("tun7", Sends(Workload, Workload, a.Elsewhere, 80)), Untouched},
			{"workload through another interface", through("eth1", Sends(Workload, Workload, a.Elsewhere, 80)), Outbound},
			{"workload to its own address", ToItself(Workload, Workload, a.Pod, 8080), Untouched},
			{"peer through the excluded interface", Arrives(a, 8080), Untouched},
			{"peer through a wildcard", through("tun7", Arrives(a, 8080)), Untouched},
			{"peer through another interface", through("eth1", Arrives(a, 8080)), Inbound},
			{"peer to a tunnel through another interface", through("eth1", Arrives(a, 15008)), Untouched},
			{"agent to its own service", ToItself(Agent, Agent, a.Pod, 8080), Inbound},
			{"agent under another user to its own service", ToItself(2000, Agent, a.Pod, 8080), Inbound},
			{"agent through another interface", through("eth1", Sends(Agent, Agent, a.Elsewhere, 80)), Untouched},
			{"agent under another user, too", through("eth1", Sends(2000, Agent, a.Elsewhere, 80)), Untouched},
			{"agent delivers to the workload", From(a.Own, ToItself(Agent, Agent, a.Pod, 8080)), Untouched},
		}
	}},
	{"tproxy", SpecOf(func(s *capture.Spec) {
		s.Mode, s.Inbound.All, s.Outbound.All, s.DropInvalid = capture.TPROXY, true, true, true
		s.InboundExcluded = Ports("15021")
		s.InterfacesExcluded, s.VirtualInterfaces = []string{"tun+"}, []string{"vm0"}
	}), func(a Addresses) []Story {
		return []Story{
			{"peer to the workload", Arrives(a, 8080), Given},
			{"peer to a tunnel", Arrives(a, 15008), Untouched},
			{"kubelet asks for readiness", Arrives(a, 15021), Untouched},
			{"more from that peer", Established(capture.LoopMark, Arrives(a, 8080)), Untouched},
			{"the same, when rules in another place have given it to the agent", Marked(1337, Established(capture.LoopMark, Arrives(a, 8080))), Untouched},
			{"a peer that came before the rules", Established(0, Arrives(a, 8080)), Untouched},
			{"what belongs to nothing", Invalid(Arrives(a, 8080)), dropped},
			{"what belongs to nothing, through the excluded interface", through("tun0", Invalid(Arrives(a, 8080))), Untouched},
			{"peer through the excluded interface", through("tun0", Arrives(a, 8080)), Untouched},
			{"workload through the excluded interface", through("tun0", Sends(Workload, Workload, a.Elsewhere, 80)), Untouched},
			{"virtual machine to a service", fromVM(a, a.Elsewhere, 80), Outbound},
			{"virtual machine to the pod", fromVM(a, a.Pod, 8080), Outbound},
			{"virtual machine to a link-local address, which only IPv6 leaves alone", fromVM(a, a.linkLocal, 8080), onlyIPv4(a, Outbound)},
			{"workload to a service", Sends(Workload, Workload, a.Elsewhere, 80), Outbound},
			{"workload to its own address", ToItself(Workload, Workload, a.Pod, 8080), Untouched},
			{"agent to a service", Sends(0, Agent, a.Elsewhere, 80), Untouched},
			{"agent under another group to a service", Sends(Agent, 2000, a.Elsewhere, 80), Untouched},
			{"agent to its own service", ToItself(0, Agent, a.Pod, 8080), Given},
			{"agent under another group to its own service", ToItself(Agent, 2000, a.Pod, 8080), Given},
			{"agent to a tunnel of this pod", ToItself(0, Agent, a.Pod, 15008), Untouched},
			{"agent to localhost", ToItself(0, Agent, a.Localhost, 8080), Untouched},
			{"agent delivers to the workload", From(a.Own, ToItself(0, Agent, a.Pod, 8080)), Untouched},
			{"agent delivers from its client's address", Marked(1337, From(a.Peer, ToItself(0, Agent, a.Pod, 8080))), Untouched},
			{"workload answers that address", Established(1337, Sends(Workload, Workload, a.Peer, 40000)), Untouched},
		}
	}},
	{"tproxy-compat", SpecOf(func(s *capture.Spec) {
		s.Mode, s.Compat, s.TPROXYMark, s.TPROXYTable = capture.TPROXY, true, 0x7b, 200
		s.Inbound.All, s.Outbound.List = true, Networks("203.0.113.0/24,2001:db8:2::/64")
		s.RedirectDNS, s.DNSServers = true, []netip.Addr{nettest.Elsewhere4, nettest.Elsewhere6}
		s.InterfacesExcluded = []string{"vm0"}
	}), func(a Addresses) []Story {
		return append(dnsStories(a),
			Story{"what passes through the pod, both ways", fromVM(a, a.Elsewhere, 80), Untouched},
			Story{"workload through the excluded interface", through("vm0", Sends(Workload, Workload, a.Elsewhere, 80)), Untouched},
			Story{"workload asks through the excluded interface", UDP(through("vm0", Sends(Workload, Workload, a.Elsewhere, 53))), Untouched},
			Story{"an answer through the excluded interface", UDP(through("vm0", answerFrom(a.Elsewhere, a))), Untouched},
			Story{"peer to the workload", Arrives(a, 8080), Given},
			Story{"peer to a tunnel", Arrives(a, 15008), Given},
			Story{"more from that peer", Established(capture.LoopMark, Arrives(a, 8080)), Untouched},
			Story{"the same, when rules in another place have given it to the agent", Marked(0x7b, Established(capture.LoopMark, Arrives(a, 8080))), Untouched},
			Story{"a peer that came before the rules", Established(0, Arrives(a, 8080)), Untouched},
			Story{"workload to a service", Sends(Workload, Workload, a.Elsewhere, 80), Outbound},
			Story{"workload to its own address", ToItself(Workload, Workload, a.Pod, 8080), Untouched},
			Story{"agent to its own service", ToItself(0, Agent, a.Pod, 8080), Given},
			Story{"agent under another group to its own service", ToItself(Agent, 2000, a.Pod, 8080), Inbound},
			Story{"agent to localhost", ToItself(0, Agent, a.Localhost, 8080), Untouched},
			Story{"agent delivers to the workload", From(a.Own, ToItself(0, Agent, a.Pod, 8080)), Untouched},
			Story{"agent delivers from its client's address", Marked(0x7b, From(a.Peer, ToItself(0, Agent, a.Pod, 8080))), Untouched},
			Story{"workload answers that address", Established(0x7b, Sends(Workload, Workload, a.Peer, 40000)), Untouched},
			Story{"workload to a name server at its own address", ToItself(Workload, Workload, a.Pod, 53), Untouched},
			Story{"workload to a name server at localhost", ToItself(Workload, Workload, a.Localhost, 53), Untouched},
			Story{"agent to a local name server", ToItself(0, Agent, a.Pod, 53), Inbound},
			Story{"agent under another group to a local name server", ToItself(Agent, 2000, a.Pod, 53), Given})
	}},
	{"tproxy-lists", SpecOf(func(s *capture.Spec) {
		s.Mode, s.Inbound.List = capture.TPROXY, Ports("8080,53")
		s.RedirectDNS, s.CaptureAllDNS = true, true
	}), func(a Addresses) []Story {
		return []Story{
			{"peer to the workload", Arrives(a, 8080), Given},
			{"peer to another port", Arrives(a, 8081), Untouched},
			{"peer to a tunnel", Arrives(a, 15008), Untouched},
			{"peer to the workload's name server", Arrives(a, 53), Given},
			{"more from that peer", Established(capture.LoopMark, Arrives(a, 8080)), Untouched},
			{"the same, when rules in another place have given it to the agent", Marked(1337, Established(capture.LoopMark, Arrives(a, 8080))), Untouched},
			{"a peer that came before the rules", Established(0, Arrives(a, 8080)), Untouched},
			{"agent to its own service", ToItself(0, Agent, a.Pod, 8080), Given},
			{"agent under another group to its own service", ToItself(Agent, 2000, a.Pod, 8080), Given},
			{"agent to another port of its own", ToItself(0, Agent, a.Pod, 8081), Untouched},
			{"agent to a local name server", ToItself(0, Agent, a.Pod, 53), Untouched},
			{"agent under another group to a local name server", ToItself(Agent, 2000, a.Pod, 53), Untouched},
			{"agent asks a server", UDP(Sends(Agent, 2000, a.Elsewhere, 53)), Untouched},
			{"agent under another user asks a server", UDP(Sends(2000, Agent, a.Elsewhere, 53)), Untouched},
			{"a server answers", UDP(answerFrom(a.Elsewhere, a)), Untouched},
			{"agent answers", UDP(agentAnswers(Agent, 2000, a)), Untouched},
			{"agent under another user answers", UDP(agentAnswers(2000, Agent, a)), Untouched},
			{"workload asks any server", UDP(Sends(Workload, Workload, a.Peer, 53)), Dns},
			{"workload asks any server by TCP", Sends(Workload, Workload, a.Peer, 53), Dns},
			{"workload asks a server at localhost", UDP(ToItself(Workload, Workload, a.Localhost, 53)), Dns},
			{"workload to its own address", ToItself(Workload, Workload, a.Pod, 8080), Untouched},
			{"workload to a service", Sends(Workload, Workload, a.Elsewhere, 80), Untouched},
			{"agent delivers to the workload", From(a.Own, ToItself(0, Agent, a.Pod, 8080)), Untouched},
			{"agent delivers from its client's address", Marked(1337, From(a.Peer, ToItself(0, Agent, a.Pod, 8080))), Untouched},
			{"workload answers that address", Established(1337, Sends(Workload, Workload, a.Peer, 40000)), Untouched},
		}
	}},
	{"dns", SpecOf(func(s *capture.Spec) {
		s.Outbound.All, s.RedirectDNS, s.DropInvalid = true, true, true
		s.DNSServers = []netip.Addr{nettest.Elsewhere4, nettest.Elsewhere6, netip.MustParseAddr("127.0.0.53")}
		s.OwnerGroupsExcluded, s.InterfacesExcluded = IDs("2001,3000-3010"), []string{"tun0"}
		s.OutboundPortsExcluded = Ports("22")
	}), func(a Addresses) []Story {
		stories := append(dnsStories(a),
			Story{"a group that is left alone asks", UDP(Sends(Workload, 2001, a.Elsewhere, 53)), Untouched},
			Story{"a group that is left alone asks by TCP", Sends(Workload, 2001, a.Elsewhere, 53), Untouched},
			Story{"a group of the range asks", UDP(Sends(Workload, 3005, a.Elsewhere, 53)), Untouched},
			Story{"a group that is left alone calls", Sends(Workload, 2001, a.Elsewhere, 80), Untouched},
			Story{"a group of the range calls", Sends(Workload, 3010, a.Elsewhere, 80), Untouched},
			Story{"a group outside of the range calls", Sends(Workload, 3011, a.Elsewhere, 80), Outbound},
			Story{"through the excluded interface", UDP(through("tun0", Sends(Workload, Workload, a.Elsewhere, 53))), Untouched},
			Story{"an answer through the excluded interface", UDP(through("tun0", answerFrom(a.Elsewhere, a))), Untouched},
			Story{"what arrives there", through("tun0", Arrives(a, 80)), Untouched},
			Story{"what belongs to nothing", Invalid(Arrives(a, 80)), dropped},
			Story{"an excluded port", Sends(Workload, Workload, a.Elsewhere, 22), Untouched},
			Story{"agent to its own service", ToItself(Agent, Agent, a.Pod, 8080), Inbound},
			Story{"agent under another user to its own service", ToItself(2000, Agent, a.Pod, 8080), Inbound},
			Story{"agent to a local name server", ToItself(Agent, Agent, a.Pod, 53), Untouched},
			Story{"agent under another user to a local name server", ToItself(2000, Agent, a.Pod, 53), Untouched},
			Story{"workload to a local name server by TCP", ToItself(Workload, Workload, a.Pod, 53), Untouched},
			Story{"agent delivers to the workload", From(a.Own, ToItself(Agent, Agent, a.Pod, 8080)), Untouched})
		if a.Family == ruleset.IPv4 {
			local := netip.MustParseAddr("127.0.0.53")
			stories = append(stories,
				Story{"workload asks the local server", UDP(ToItself(Workload, Workload, local, 53)), Dns},
				Story{"workload asks the local server by TCP", ToItself(Workload, Workload, local, 53), Dns},
				Story{"agent asks the local server", UDP(ToItself(Agent, Agent, local, 53)), Untouched},
				Story{"the local server answers from afar", UDP(answerFrom(local, a)), Untouched})
		}
		return stories
	}},
	{"dns-compat", SpecOf(func(s *capture.Spec) {
		s.Compat, s.Outbound.All, s.RedirectDNS, s.CaptureAllDNS = true, true, true, true
		s.OwnerGroups = capture.Groups{List: IDs("1000,2000-2010")}
	}), func(a Addresses) []Story {
		return []Story{
			{"workload asks any server", UDP(Sends(Workload, Workload, a.Peer, 53)), Dns},
			{"workload asks any server by TCP", Sends(Workload, Workload, a.Peer, 53), Dns},
			{"workload asks at localhost", UDP(ToItself(Workload, Workload, a.Localhost, 53)), Dns},
			{"another captured group asks", UDP(Sends(Workload, 2005, a.Peer, 53)), Dns},
			{"a group that is not captured asks", UDP(Sends(Workload, 1999, a.Peer, 53)), Untouched},
			{"a group that is not captured calls", Sends(Workload, 1999, a.Elsewhere, 80), Untouched},
			{"a captured group calls", Sends(Workload, Workload, a.Elsewhere, 80), Outbound},
			{"another captured group calls", Sends(1, 2010, a.Elsewhere, 80), Outbound},
			{"workload to its own address", ToItself(Workload, Workload, a.Pod, 8080), Untouched},
			{"workload says something else to localhost", UDP(ToItself(Workload, Workload, a.Localhost, 8125)), Untouched},
			{"workload says something else to a service", UDP(Sends(Workload, Workload, a.Elsewhere, 8125)), Untouched},
			{"agent asks a server", UDP(Sends(Agent, 2000, a.Elsewhere, 53)), Untouched},
			{"agent under another user asks a server", UDP(Sends(2000, Agent, a.Elsewhere, 53)), Untouched},
			{"agent asks a local server by TCP", ToItself(Agent, 2000, a.Pod, 53), Untouched},
			{"agent under another user, for which istio-iptables forgot to make an exception", ToItself(2000, Agent, a.Pod, 53), Inbound},
			{"a server answers", UDP(answerFrom(a.Elsewhere, a)), Untouched},
			{"agent answers", UDP(agentAnswers(Agent, 2000, a)), Untouched},
			{"agent under another user answers", UDP(agentAnswers(2000, Agent, a)), Untouched},
			{"agent to its own service", ToItself(Agent, 2000, a.Pod, 8080), Inbound},
			{"agent under another user to its own service", ToItself(2000, Agent, a.Pod, 8080), Untouched},
			{"agent delivers to the workload", From(a.Own, ToItself(Agent, Agent, a.Pod, 8080)), Untouched},
		}
	}},
	{"virtual", SpecOf(func(s *capture.Spec) {
		s.Inbound.All, s.Outbound.List = true, Networks("203.0.113.0/24,2001:db8:2::/64")
		s.VirtualInterfaces, s.InterfacesExcluded = []string{"vm0", "tap+"}, []string{"vm0", "tun0"}
		s.Localhost4 = netip.MustParsePrefix("127.0.0.0/8")
	}), func(a Addresses) []Story {
		return []Story{
			{"virtual machine into a captured network", fromVM(a, a.Elsewhere, 80), Outbound},
			{"virtual machine elsewhere", fromVM(a, a.Peer, 80), Untouched},
			{"virtual machine to the pod", fromVM(a, a.Pod, 8080), Untouched},
			{"another one into a captured network", through("tap3", fromVM(a, a.Elsewhere, 80)), Outbound},
			{"another one to the pod", through("tap3", fromVM(a, a.Pod, 8080)), Untouched},
			{"peer to the workload", Arrives(a, 8080), Inbound},
			{"peer to a tunnel", Arrives(a, 15008), Untouched},
			{"peer through the excluded interface", through("tun0", Arrives(a, 8080)), Untouched},
			{"workload through the excluded interface", through("tun0", Sends(Workload, Workload, a.Elsewhere, 80)), Untouched},
			{"workload through the virtual machine's interface", through("vm0", Sends(Workload, Workload, a.Elsewhere, 80)), Untouched},
			{"workload into a captured network", Sends(Workload, Workload, a.Elsewhere, 80), Outbound},
			{"workload to its own address", ToItself(Workload, Workload, a.Pod, 8080), Untouched},
			{"agent to its own service", ToItself(Agent, 2000, a.Pod, 8080), Inbound},
			{"agent under another user to its own service", ToItself(2000, Agent, a.Pod, 8080), Inbound},
			{"agent to localhost", ToItself(Agent, Agent, a.Localhost, 8080), Untouched},
			{"agent to a service", Sends(Agent, 2000, a.Elsewhere, 80), Untouched},
			{"agent under another user to a service", Sends(2000, Agent, a.Elsewhere, 80), Untouched},
			{"agent delivers to the workload", From(a.Own, ToItself(Agent, Agent, a.Pod, 8080)), Untouched},
		}
	}},
	{"nobody", SpecOf(func(s *capture.Spec) {
		s.Inbound.List, s.Outbound.All, s.OwnerGroups = Ports("8080"), true, capture.Groups{}
	}), func(a Addresses) []Story {
		return []Story{
			{"workload to a service", Sends(Workload, Workload, a.Elsewhere, 80), Untouched},
			{"root to a service", Sends(0, 0, a.Elsewhere, 80), Untouched},
			{"peer to the workload", Arrives(a, 8080), Inbound},
			{"peer to a tunnel", Arrives(a, 15008), Untouched},
			{"agent to its own service", ToItself(Agent, 2000, a.Pod, 8080), Inbound},
			{"agent under another user to its own service", ToItself(2000, Agent, a.Pod, 8080), Inbound},
			{"agent to a service", Sends(Agent, 2000, a.Elsewhere, 80), Untouched},
			{"agent under another user to a service", Sends(2000, Agent, a.Elsewhere, 80), Untouched},
			{"agent delivers to the workload", From(a.Own, ToItself(Agent, Agent, a.Pod, 8080)), Untouched},
		}
	}},
}

// dnsStories are about the server at a.elsewhere.
func dnsStories(a Addresses) []Story {
	return []Story{
		{"workload asks the server", UDP(Sends(Workload, Workload, a.Elsewhere, 53)), Dns},
		{"workload asks the server by TCP", Sends(Workload, Workload, a.Elsewhere, 53), Dns},
		{"workload asks another server", UDP(Sends(Workload, Workload, a.Peer, 53)), Untouched},
		{"workload asks the server something else", UDP(Sends(Workload, Workload, a.Elsewhere, 123)), Untouched},
		{"agent asks the server", UDP(Sends(Agent, 2000, a.Elsewhere, 53)), Untouched},
		{"agent under another user asks the server", UDP(Sends(2000, Agent, a.Elsewhere, 53)), Untouched},
		{"agent asks the server by TCP", Sends(Agent, Agent, a.Elsewhere, 53), Untouched},
		{"the server answers", UDP(answerFrom(a.Elsewhere, a)), Untouched},
		{"agent answers", UDP(agentAnswers(Agent, 2000, a)), Untouched},
		{"agent under another user answers", UDP(agentAnswers(2000, Agent, a)), Untouched},
	}
}

func UDP(p trace.Packet) trace.Packet {
	p.Protocol = ruleset.UDP
	return p
}

func Marked(mark uint32, p trace.Packet) trace.Packet {
	p.Mark = mark
	return p
}

// Established is a later packet of a connection with this mark.
func Established(mark uint32, p trace.Packet) trace.Packet {
	p.State, p.ConnMark = ruleset.Established, mark
	return p
}

func Invalid(p trace.Packet) trace.Packet {
	p.State = ruleset.Invalid
	return p
}

// fromVM is the first packet of a connection that a virtual machine behind vm0 opens.
func fromVM(a Addresses, dst netip.Addr, port uint16) trace.Packet {
	return trace.Packet{In: "vm0", Src: a.vm, Dst: netip.AddrPortFrom(dst, port)}
}

// answerFrom is what a name server sends to the pod.
func answerFrom(server netip.Addr, a Addresses) trace.Packet {
	return trace.Packet{In: "eth0", Src: server, SrcPort: 53, Dst: netip.AddrPortFrom(a.Pod, 40000), State: ruleset.Established}
}

// agentAnswers is what the agent sends back to who asked it.
func agentAnswers(uid, gid uint32, a Addresses) trace.Packet {
	p := Established(0, ToItself(uid, gid, a.Localhost, 40000))
	p.SrcPort = capture.DNSPort
	return p
}

// onlyIPv4 is the verdict in IPv4; IPv6 leaves alone.
func onlyIPv4(a Addresses, v trace.Verdict) trace.Verdict {
	if a.Family == ruleset.IPv6 {
		return Untouched
	}
	return v
}

func SpecOf(change func(*capture.Spec)) capture.Spec {
	spec := capture.Default()
	change(&spec)
	return spec
}

func Ports(text string) []capture.PortRange {
	list, err := capture.ParsePortList(text)
	if err != nil {
		panic(err)
	}
	return list
}

func IDs(text string) []capture.IDRange {
	list, err := capture.ParseIDs(text, func(string) (string, error) { return "", errors.New("no names") })
	if err != nil {
		panic(err)
	}
	return list
}

func Networks(text string) []netip.Prefix {
	list, err := capture.ParsePrefixList(text)
	if err != nil {
		panic(err)
	}
	return list
}

// ForEach runs test for every scenario in both families.
func ForEach(t *testing.T, test func(*testing.T, Scenario, Addresses)) {
	for _, sc := range Scenarios {
		for _, a := range Families {
			t.Run(sc.Name+"/"+a.Family.String(), func(t *testing.T) { test(t, sc, a) })
		}
	}
}
