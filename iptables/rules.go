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
func Rules(spec capture.Spec, family Family) Ruleset { return rulesWith(spec, family, 0) }

// rulesWith are Rules, and where TPROXY is not wanted what its connections under way need, by their mark. 0 is for none.
func rulesWith(spec capture.Spec, family Family, underWay uint32) Ruleset {
	p := policy{Spec: spec, facts: factsOf(family), Ruleset: Ruleset{Family: family}, mark: underWay}
	if spec.CapturesInboundByTPROXY() {
		p.mark = spec.TPROXYMark
	}
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
	mark    uint32         // of what the agent sends to the workload from its client's address; 0 when it does not
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
	ended := make(map[Match]bool)
	for _, r := range rules {
		if !ended[r.Match] {
			c.Rules = append(c.Rules, r)
			ended[r.Match] = r.final()
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

// inbound is what the nat table does with connections that come in.
func (p *policy) inbound() {
	redirect := p.Mode == capture.Redirect && !p.Inbound.None()
	virtual := len(p.VirtualInterfaces) > 0 && len(p.capturedNetworks()) > 0
	if !redirect && !virtual {
		return
	}
	rules := p.linkLocal("virtual/link-local", virtual && !redirect)
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
// them; istio-iptables redirects users all the same, and those groups to which its rules ever come. It has no exception
// for queries of groups.
func (p *policy) self() []Rule {
	var queries, calls []Rule
	for i, owner := range p.owners {
		user := i < len(p.ProxyUIDs)
		call := Match{
			Out: loopback, Dst: p.localhost, NotDst: true,
			Protocol: TCP, DstPorts: single(p.TunnelPort), NotDstPorts: true, Owner: owner,
		}
		if call.Mark = p.mark; p.Mode == capture.TPROXY {
			call.Mark = p.TPROXYMark
			switch {
			case !p.Compat:
				continue
			case user, p.capturesLoopback():
			case p.CapturesDNS():
				call.DstPorts, call.NotDstPorts = single(dnsPort), false
			default:
				continue
			}
		}
		if p.CapturesDNS() && (user || !p.Compat) {
			queries = append(queries, Rule{
				ID: "outbound/agent-query/" + owner.String(), Match: Match{Out: loopback, Protocol: TCP, DstPorts: single(dnsPort), Owner: owner}, Target: Return{},
				Why: "the agent's own query to a local server of names is not a call of the workload's service",
			})
		}
		call.NotMark = call.Mark != 0 // what has it comes from its client's address
		calls = append(calls, Rule{
			ID: "outbound/self/" + owner.String(), Match: call, Target: Jump(chainInboundRedirect),
			Why: "a workload that calls its own service reaches itself through the agent's inbound side, like any other caller",
		})
	}
	return append(queries, calls...)
}

// capturesLoopback tells whether loopback addresses are judged like any other.
func (p *policy) capturesLoopback() bool { return slices.ContainsFunc(p.Outbound.List, isLoopback) }

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
	if p.capturesLoopback() {
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
