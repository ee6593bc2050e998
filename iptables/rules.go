package iptables

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/pillion-proxy/pillion/internal/capture"
)

// facts of a family that the policy speaks of.
type facts struct {
	localhost     netip.Prefix // loopback traffic that is meant for the workload
	inboundSource netip.Prefix // the agent dials the workload from here
	anywhere      netip.Addr
}

func factsOf(family Family) facts {
	if family == IPv6 {
		return facts{netip.MustParsePrefix("::1/128"), netip.PrefixFrom(capture.InboundSource6, 128), netip.IPv6Unspecified()}
	}
	return facts{netip.MustParsePrefix("127.0.0.1/32"), netip.PrefixFrom(capture.InboundSource4, 32), netip.IPv4Unspecified()}
}

// Rules is the policy: what spec captures in one family, as rules in the order in which they are tried. It follows
// istio-iptables verdict for verdict, but for what that gets plainly wrong. Its "not this user" rules kept a second user
// or a group from ever being looked at: here every user and group of the agent has had its say before the rest of the
// loopback traffic is let go. Its TPROXY took every connection under way for one of the agent's: here they are marked.
// Its zones for DNS took no notice of who is left alone. The spec must be valid.
func Rules(spec capture.Spec, family Family) Ruleset {
	p := policy{Spec: spec, facts: factsOf(family), Ruleset: Ruleset{Family: family}}
	if family == IPv4 {
		p.localhost = spec.Localhost4
	}
	for _, ids := range spec.ProxyUIDs {
		p.owners = append(p.owners, Owner{UID, ids})
	}
	for _, ids := range spec.ProxyGIDs {
		p.owners = append(p.owners, Owner{GID, ids})
	}
	if spec.CapturesDNS() {
		p.servers = p.dnsServers()
	}
	p.zones()
	p.arriving()
	p.leaving()
	p.inbound()
	p.outbound()
	return p.Ruleset
}

// policy is a ruleset in the making.
type policy struct {
	capture.Spec
	facts
	Ruleset
	owners  []Owner        // the agent
	servers []netip.Prefix // where DNS is captured, in this family
}

// dnsServers are the networks of this family in which DNS is captured. One that is not valid stands for all addresses.
func (p *policy) dnsServers() []netip.Prefix {
	if p.CaptureAllDNS {
		return []netip.Prefix{{}}
	}
	var servers []netip.Prefix
	for _, server := range p.DNSServers {
		if prefix := netip.PrefixFrom(server, server.BitLen()); p.Family.owns(prefix) && !linkLocal.Contains(server) {
			servers = append(servers, prefix)
		}
	}
	return servers
}

// chain adds a chain to a table, without rules that could never match, unless there is nothing to put into it.
func (p *policy) chain(table TableName, name string, rules ...Rule) {
	c := Chain{Name: name}
	if !c.own() {
		c.Policy = policyAccept
	}
	for _, r := range rules {
		dead := slices.ContainsFunc(c.Rules, func(earlier Rule) bool { return earlier.final() && earlier.Match == r.Match })
		if !dead {
			c.Rules = append(c.Rules, r)
		}
	}
	if len(c.Rules) > 0 {
		p.addChain(table, c)
	}
}

// final tells whether no packet that matches goes on to the next rule of the chain.
func (r Rule) final() bool {
	switch r.Target.(type) {
	case Return, Accept, Drop, Redirect, ToSocket:
		return true
	}
	return false
}

// The zones of connection tracking for DNS over UDP. What the workload asks the agent and what the agent asks a server
// can have the same addresses and ports once the former is redirected; in zones of their own they cannot meet.
const (
	upstreamZone = Zone(1) // queries that go to a server as they are, and its answers
	captureZone  = Zone(2) // queries that go to the agent, and its answers
)

func (p *policy) zones() {
	if len(p.servers) == 0 {
		return
	}
	queries := Match{Protocol: UDP, DstPorts: single(dnsPort)}
	p.chain(Raw, chainPrerouting, Rule{
		ID: "zone/arriving/jump", Match: Match{Protocol: UDP}, Target: Jump(chainInbound),
		Why: "the zone of an arriving answer is chosen by our chain",
	})
	p.chain(Raw, chainBuiltOutput, Rule{
		ID: "zone/leaving/jump", Match: Match{Protocol: UDP}, Target: Jump(chainOutput),
		Why: "the zone of a query is chosen by our chain",
	})
	var arriving, leaving, captured, passed []Rule
	for _, name := range p.InterfacesExcluded {
		arriving = append(arriving, leftAlone("zone/arriving", Match{In: name}))
		leaving = append(leaving, leftAlone("zone/leaving", Match{Out: name}))
	}
	leaving = append(leaving, p.linkLocal("zone/leaving/link-local", p.CaptureAllDNS)...)
	for _, r := range p.linkLocal("zone/arriving/link-local", p.CaptureAllDNS) {
		r.Match = Match{Src: linkLocal}
		arriving = append(arriving, r)
	}
	for _, server := range p.servers {
		from, to := Match{Protocol: UDP, SrcPorts: single(dnsPort), Src: server}, Match{Protocol: UDP, DstPorts: single(dnsPort), Dst: server}
		arriving = append(arriving, Rule{
			ID: "zone/answer" + suffix(server), Match: from, Target: upstreamZone,
			Why: "a server's answer belongs to a query that was not captured: the agent's, or that of somebody who is left alone",
		})
		captured = append(captured, Rule{
			ID: "zone/captured" + suffix(server), Match: to, Target: captureZone,
			Why: "a captured query is kept apart from the one that the agent sends on",
		})
		passed = append(passed, Rule{
			ID: "zone/passed" + suffix(server), Match: to, Target: upstreamZone,
			Why: "a query that is not captured is in the zone of its answer",
		})
	}
	for _, owner := range p.owners {
		query, answer := queries, Match{Protocol: UDP, SrcPorts: single(capture.DNSPort), Owner: owner}
		query.Owner = owner
		leaving = append(leaving,
			Rule{ID: "zone/agent-query/" + owner.String(), Match: query, Target: Jump(chainDNSPassed),
				Why: "the agent's own queries are not captured"},
			Rule{ID: "zone/agent-answer/" + owner.String(), Match: answer, Target: captureZone,
				Why: "the agent's answers belong to the queries that were captured"})
	}
	ask := func(owner Owner, target string) Rule {
		query := queries
		query.Owner = owner
		return Rule{ID: "zone/query/" + owner.String(), Match: query, Target: Jump(target), Why: "queries are captured, or not, by group"}
	}
	if p.OwnerGroups.All {
		for _, ids := range p.OwnerGroupsExcluded {
			leaving = append(leaving, ask(Owner{GID, ids}, chainDNSPassed))
		}
		leaving = append(leaving, Rule{ID: "zone/query", Match: queries, Target: Jump(chainDNSCaptured), Why: "all other queries are captured"})
	} else {
		for _, ids := range p.OwnerGroups.List {
			leaving = append(leaving, ask(Owner{GID, ids}, chainDNSCaptured))
		}
		leaving = append(leaving, Rule{ID: "zone/query", Match: queries, Target: Jump(chainDNSPassed), Why: "no other query is captured"})
	}
	p.chain(Raw, chainInbound, arriving...)
	p.chain(Raw, chainOutput, leaving...)
	p.chainIfUsed(Raw, chainDNSCaptured, captured...)
	p.chainIfUsed(Raw, chainDNSPassed, passed...)
}

// arriving is what the mangle table does with what comes in.
func (p *policy) arriving() {
	tproxy := p.CapturesInboundByTPROXY()
	if !tproxy && !p.DropInvalid {
		return
	}
	var rules []Rule
	for _, name := range p.InterfacesExcluded {
		rules = append(rules, leftAlone("arriving", Match{In: name}))
	}
	everything := Match{Protocol: TCP}
	if p.DropInvalid {
		everything = Match{}
		rules = append(rules, Rule{
			ID: "arriving/invalid", Match: Match{State: Invalid}, Target: Drop{},
			Why: "what connection tracking cannot place would not be redirected, and the kernel would answer it with a reset",
		})
	}
	if tproxy {
		for _, name := range p.VirtualInterfaces {
			rules = append(rules, Rule{
				ID: "arriving/virtual/" + name, Match: Match{In: name}, Target: Return{},
				Why: "what a virtual machine opens is outbound, which is the nat table's business",
			})
		}
		rules = append(rules,
			Rule{ID: "arriving/original-source/save", Match: Match{Protocol: TCP, Mark: p.TPROXYMark}, Target: SaveMark{},
				Why: "the workload's answers to an address that the agent borrowed must find the agent, so the connection remembers the mark"},
			Rule{ID: "arriving/original-source", Match: Match{Protocol: TCP, Mark: p.TPROXYMark}, Target: Return{},
				Why: "what the agent sends to the workload from its client's address is not captured again"},
			Rule{ID: "arriving/inbound", Match: Match{Protocol: TCP}, Target: Jump(chainInbound),
				Why: "incoming TCP is judged by our chain"})
	}
	p.chain(Mangle, chainPrerouting, Rule{
		ID: "arriving/jump", Match: everything, Target: Jump(chainArriving), Why: "what arrives is judged by our chain",
	})
	p.chain(Mangle, chainArriving, rules...)
	if tproxy {
		p.inboundTPROXY()
	}
}

// inboundTPROXY gives connections to the agent without changing them.
func (p *policy) inboundTPROXY() {
	rules := []Rule{
		{ID: "inbound/to-workload", Match: Match{In: loopback, Src: p.inboundSource}, Target: Return{},
			Why: "what the agent forwards to the workload must arrive there and not come back"},
		{ID: "inbound/loopback", Match: Match{In: loopback, Mark: capture.LoopMark, NotMark: true}, Target: Return{},
			Why: "processes of the workload talk to each other directly"},
	}
	if !p.Compat {
		rules = append(rules, p.tunnel())
	}
	p.chain(Mangle, chainInbound, append(rules, p.inboundPorts(chainTPROXY)...)...)
	known := Match{State: Established, ConnMark: capture.LoopMark}
	rules = []Rule{
		{ID: "inbound/known", Match: known, Target: Jump(chainDivert),
			Why: "a connection that was given to the agent stays with it"},
		{ID: "inbound/earlier", Match: Match{State: Established}, Target: Return{},
			Why: "every other connection under way stays where it is: it began before the rules, or here, or only passes through"},
	}
	if p.Compat {
		rules = append(rules, Rule{ID: "inbound/localhost", Match: Match{Dst: p.localhost}, Target: Return{},
			Why: "what was redirected already is on its way to the agent"})
	}
	p.chainIfUsed(Mangle, chainTPROXY, append(rules,
		Rule{ID: "inbound/connection", Match: Match{Protocol: TCP}, Target: SetConnMark(capture.LoopMark),
			Why: "the connection remembers that it was given to the agent"},
		Rule{ID: "inbound/tproxy", Match: Match{Protocol: TCP},
			Target: ToSocket{netip.AddrPortFrom(p.anywhere, p.InboundPort), p.TPROXYMark},
			Why:    "captured inbound connections go to the agent as they are"})...)
	p.chainIfUsed(Mangle, chainDivert,
		Rule{ID: "inbound/divert/mark", Target: SetMark(p.TPROXYMark), Why: "by this mark the packet is delivered here, whatever its destination"},
		Rule{ID: "inbound/divert", Target: Accept{}, Why: "its socket is found without further rules"})
}

// leaving is what the mangle table does with what local processes send: marks for TPROXY.
func (p *policy) leaving() {
	if !p.CapturesInboundByTPROXY() {
		return
	}
	p.chain(Mangle, chainBuiltOutput, Rule{
		ID: "leaving/jump", Match: Match{Protocol: TCP}, Target: Jump(chainOutput), Why: "outgoing TCP is marked by our chain",
	})
	var rules []Rule
	for _, name := range p.InterfacesExcluded {
		rules = append(rules, leftAlone("leaving", Match{Out: name}))
	}
	rules = append(rules, Rule{
		ID: "leaving/original-source", Match: Match{Out: loopback, Mark: p.TPROXYMark}, Target: Return{},
		Why: "what the agent sends to the workload from its client's address keeps its mark",
	})
	for _, owner := range p.owners {
		self := Match{Dst: p.localhost, NotDst: true, Out: loopback, Protocol: TCP, Owner: owner}
		if p.CapturesDNS() {
			self.DstPorts, self.NotDstPorts = single(dnsPort), true
		}
		rules = append(rules, Rule{ID: "leaving/self/" + owner.String(), Match: self, Target: SetMark(capture.LoopMark),
			Why: "by this mark a call of the workload's own service is told from what the workload says to itself"})
	}
	p.chain(Mangle, chainOutput, append(rules, Rule{
		ID: "leaving/answer", Match: Match{Protocol: TCP, ConnMark: p.TPROXYMark}, Target: RestoreMark{},
		Why: "the workload's answers to an address that the agent borrowed are routed to the agent",
	})...)
}

// inbound is what the nat table does with connections that come in.
func (p *policy) inbound() {
	redirect := p.Mode == capture.Redirect && !p.Inbound.None()
	if !redirect && len(p.VirtualInterfaces) == 0 {
		return
	}
	rules := p.linkLocal("virtual/link-local", len(p.VirtualInterfaces) > 0 && !redirect)
	rules = append(rules, p.linkLocal("inbound/link-local", redirect)...)
	for _, name := range p.VirtualInterfaces {
		for _, network := range p.capturedNetworks() {
			match := toNetwork(network)
			match.In = name
			rules = append(rules, Rule{
				ID: "virtual/" + name + suffix(network), Match: match, Target: Jump(chainRedirect),
				Why: "what a virtual machine opens goes to the agent like what the workload opens",
			})
		}
		if redirect && !p.Outbound.All {
			rules = append(rules, Rule{
				ID: "virtual/others/" + name, Match: Match{In: name}, Target: Return{}, Why: "what a virtual machine opens is not inbound",
			})
		}
	}
	if redirect {
		for _, name := range p.InterfacesExcluded {
			if !slices.Contains(p.VirtualInterfaces, name) {
				rules = append(rules, leftAlone("inbound", Match{In: name}))
			}
		}
		rules = append(rules, p.tunnel())
		rules = append(rules, p.inboundPorts(chainInboundRedirect)...)
	}
	if len(rules) == 0 {
		return
	}
	p.chain(NAT, chainPrerouting, Rule{
		ID: "inbound/jump", Match: Match{Protocol: TCP}, Target: Jump(chainInbound),
		Why: "incoming TCP is judged by our chain",
	})
	p.chain(NAT, chainInbound, rules...)
}

func (p *policy) tunnel() Rule {
	return Rule{ID: "inbound/tunnel", Match: toPorts(single(p.TunnelPort)), Target: Return{},
		Why: "tunnels have a listener of their own, which must get them whole"}
}

// inboundPorts send to the chain what comes to captured ports.
func (p *policy) inboundPorts(target string) []Rule {
	var rules []Rule
	if p.CapturesInboundByTPROXY() {
		rules = p.linkLocal("inbound/link-local", true)
	}
	if !p.Inbound.All {
		for _, ports := range p.Inbound.List {
			rules = append(rules, Rule{
				ID: "inbound/port/" + ports.String(), Match: toPorts(ports), Target: Jump(target), Why: "this port is captured",
			})
		}
		return rules
	}
	for _, ports := range p.InboundExcluded {
		rules = append(rules, Rule{
			ID: "inbound/excluded/" + ports.String(), Match: toPorts(ports), Target: Return{},
			Why: "this port is left alone; probes and scrapes of the agent itself would break if they went through it",
		})
	}
	return append(rules, Rule{
		ID: "inbound/all", Match: Match{Protocol: TCP}, Target: Jump(target), Why: "every other port is captured",
	})
}

// outbound is what the nat table does with what local processes send.
func (p *policy) outbound() {
	rules, groups := p.outboundAlone(), p.outboundCaptured()
	if p.OwnerGroups.All {
		for _, ids := range p.OwnerGroupsExcluded {
			owner := Owner{GID, ids}
			rules = append(rules, Rule{
				ID: "outbound/group-excluded/" + owner.String(), Match: Match{Owner: owner}, Target: Return{}, Why: "this group is left alone",
			})
		}
		rules = append(rules, groups...)
	}
	for _, ids := range p.OwnerGroups.List {
		owner := Owner{GID, ids}
		rules = append(rules, Rule{
			ID: "outbound/group/" + owner.String(), Match: Match{Owner: owner}, Target: Jump(chainCaptured), Why: "this group is captured, and no other that is not named",
		})
	}
	jump := Match{Protocol: TCP}
	if len(p.servers) > 0 {
		jump = Match{}
	}
	p.chain(NAT, chainBuiltOutput, Rule{
		ID: "outbound/jump", Match: jump, Target: Jump(chainOutput), Why: "what goes out is judged by our chain",
	})
	p.chain(NAT, chainOutput, rules...)
	p.chainIfUsed(NAT, chainCaptured, groups...)
	p.chainIfUsed(NAT, chainRedirect, Rule{
		ID: "outbound/redirect", Match: Match{Protocol: TCP}, Target: Redirect(p.OutboundPort),
		Why: "captured outbound connections go to the agent",
	})
	p.chainIfUsed(NAT, chainInboundRedirect, Rule{
		ID: "inbound/redirect", Match: Match{Protocol: TCP}, Target: Redirect(p.InboundPort),
		Why: "captured inbound connections go to the agent",
	})
}

// chainIfUsed adds a chain to which some rule jumps.
func (p *policy) chainIfUsed(table TableName, name string, rules ...Rule) {
	for at, r := range p.All() {
		if at.Table == table && r.Target == Jump(name) {
			p.chain(table, name, rules...)
			return
		}
	}
}

// outboundAlone are the exceptions that come before everything else, the agent's own connections among them.
func (p *policy) outboundAlone() []Rule {
	var rules []Rule
	for _, name := range p.InterfacesExcluded {
		rules = append(rules, leftAlone("outbound", Match{Out: name}))
	}
	for _, ports := range p.OutboundPortsExcluded {
		rules = append(rules, Rule{
			ID: "outbound/port-excluded/" + ports.String(), Match: toPorts(ports), Target: Return{},
			Why: "this port is left alone at every address",
		})
	}
	rules = append(rules, Rule{
		ID: "outbound/to-workload", Match: Match{Out: loopback, Src: p.inboundSource}, Target: Return{},
		Why: "what the agent forwards to the workload must arrive there and not come back",
	})
	rules = append(rules, p.self()...)
	for _, owner := range p.owners {
		rules = append(rules, Rule{
			ID: "outbound/agent/" + owner.String(), Match: Match{Owner: owner}, Target: Return{},
			Why: "the agent's own connections are not captured again",
		})
	}
	return rules
}

// self are the rules for a workload that calls its own service through the agent. In TPROXY mode the mangle table has
// them; istio-iptables redirects users, though not groups, all the same.
func (p *policy) self() []Rule {
	owners := p.owners
	if p.Mode == capture.TPROXY {
		owners = nil
		if p.Compat {
			owners = p.owners[:len(p.ProxyUIDs)]
		}
	}
	var queries, calls []Rule
	for _, owner := range owners {
		queries = append(queries, Rule{
			ID: "outbound/agent-query/" + owner.String(), Match: Match{Out: loopback, Protocol: TCP, DstPorts: single(dnsPort), Owner: owner}, Target: Return{},
			Why: "the agent's own query to a local server of names is not a call of the workload's service",
		})
		call := Match{
			Out: loopback, Dst: p.localhost, NotDst: true,
			Protocol: TCP, DstPorts: single(p.TunnelPort), NotDstPorts: true, Owner: owner,
		}
		if p.Mode == capture.TPROXY {
			call.Mark, call.NotMark = p.TPROXYMark, true // not from its client's address
		}
		calls = append(calls, Rule{
			ID: "outbound/self/" + owner.String(), Match: call, Target: Jump(chainInboundRedirect),
			Why: "a workload that calls its own service reaches itself through the agent's inbound side, like any other caller",
		})
	}
	if !p.CapturesDNS() {
		return calls
	}
	return append(queries, calls...)
}

// outboundCaptured decides about everybody else.
func (p *policy) outboundCaptured() []Rule {
	rules := p.linkLocal("outbound/link-local", true)
	for _, server := range p.servers {
		for _, protocol := range []Protocol{TCP, UDP} {
			rules = append(rules, Rule{
				ID:     fmt.Sprintf("dns/%s%s", protocol, suffix(server)),
				Match:  Match{Protocol: protocol, DstPorts: single(dnsPort), Dst: server},
				Target: Redirect(capture.DNSPort), Why: "queries go to the agent, which answers or asks on",
			})
		}
	}
	rules = append(rules, p.loopback()...)
	for _, prefix := range p.OutboundExcluded {
		if p.Family.owns(prefix) {
			rules = append(rules, Rule{
				ID: "outbound/excluded/" + prefix.String(), Match: toNetwork(prefix), Target: Return{}, Why: "this network is left alone",
			})
		}
	}
	for _, ports := range p.OutboundPorts {
		rules = append(rules, Rule{
			ID: "outbound/port/" + ports.String(), Match: toPorts(ports), Target: Jump(chainRedirect),
			Why: "this port is captured at every address that is not excluded",
		})
	}
	for _, network := range p.capturedNetworks() {
		rule := Rule{ID: "outbound/all", Match: toNetwork(network), Target: Jump(chainRedirect), Why: "every other address is captured"}
		if network.IsValid() {
			rule.ID, rule.Why = "outbound/network"+suffix(network), "this network is captured"
		}
		rules = append(rules, rule)
	}
	return rules
}

// capturedNetworks are the outbound destinations of this family. One that is not valid stands for all addresses.
func (p *policy) capturedNetworks() []netip.Prefix {
	if p.Outbound.All {
		return []netip.Prefix{{}}
	}
	return slices.DeleteFunc(slices.Clone(p.Outbound.List), func(prefix netip.Prefix) bool { return !p.Family.owns(prefix) })
}

// loopback lets go what the workload says to itself.
func (p *policy) loopback() []Rule {
	localhost := Rule{
		ID: "outbound/localhost", Match: Match{Dst: p.localhost}, Target: Return{},
		Why: "localhost stays local, even where other loopback addresses are captured",
	}
	if slices.ContainsFunc(p.Outbound.List, isLoopback) {
		return []Rule{localhost}
	}
	rule := Rule{
		ID: "outbound/loopback", Match: Match{Out: loopback}, Target: Return{},
		Why: "processes of the workload talk to each other directly",
	}
	if p.Compat && p.CapturesDNS() {
		rule.Match = Match{Out: loopback, Protocol: TCP, DstPorts: single(dnsPort), NotDstPorts: true}
		return []Rule{rule, localhost}
	}
	return []Rule{rule}
}

// linkLocal leaves link-local destinations alone in IPv6, where IPv4 has none.
func (p *policy) linkLocal(id string, wanted bool) []Rule {
	if p.Family != IPv6 || !wanted {
		return nil
	}
	return []Rule{{ID: id, Match: Match{Dst: linkLocal}, Target: Return{},
		Why: "a link-local address means nothing without its interface, which connection tracking does not remember"}}
}

const (
	loopback = "lo"
	dnsPort  = 53
)

var linkLocal = netip.MustParsePrefix("fe80::/10")

func isLoopback(prefix netip.Prefix) bool { return prefix.Addr().IsLoopback() }

func single(port uint16) capture.PortRange { return capture.PortRange{First: port, Last: port} }

// String is kind and number, such as uid/1337.
func (o Owner) String() string { return fmt.Sprintf("%s/%s", o.Kind, o.IDs) }

// suffix is the last part of the ID of a rule for a network; a rule for all networks has none.
func suffix(network netip.Prefix) string {
	if !network.IsValid() {
		return ""
	}
	return "/" + network.String()
}

// leftAlone is the rule for an interface that is excluded.
func leftAlone(where string, interfaces Match) Rule {
	return Rule{
		ID: where + "/interface/" + interfaces.In + interfaces.Out, Match: interfaces, Target: Return{}, Why: "this interface is left alone",
	}
}

func toPorts(ports capture.PortRange) Match { return Match{Protocol: TCP, DstPorts: ports} }

// toNetwork matches everything for all addresses and for a mask of 0: the kernel does not keep such a condition.
func toNetwork(prefix netip.Prefix) Match {
	if prefix.Bits() <= 0 {
		return Match{}
	}
	return Match{Dst: prefix.Masked()}
}
