// Package policy decides which rules a capture.Spec needs.
//
// Rules is a pure function: the same spec gives the same rules, with the same IDs, on every machine. Each rule has an ID
// that is unique in its ruleset and a reason of one sentence. The kernel keeps the ID as a comment, not the reason;
// WithReasons finds the reason again by ID and target.
package policy

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/iptables/ruleset"
)

// Rules returns the rules for what a valid spec captures in one family, in the order in which the kernel tries them.
// Verdicts are those of istio-iptables, except for its bugs: with several users or groups only the first was checked,
// where here every user and group of the agent is checked before the remaining loopback traffic passes; TPROXY claimed
// every established connection, where here captured ones are marked; the conntrack zones for DNS ignored excluded
// groups and other NAT rules.
func Rules(spec capture.Spec, family ruleset.Family) ruleset.Ruleset {
	return RulesWithMark(spec, family, 0)
}

// RulesWithMark returns Rules and, if spec does not use TPROXY, also the rules that open connections of an earlier
// TPROXY need. mark is the mark of those connections, or 0.
func RulesWithMark(spec capture.Spec, family ruleset.Family, underWay uint32) ruleset.Ruleset {
	p := policy{Spec: spec, Addresses: ruleset.AddressesOf(family), Ruleset: ruleset.Ruleset{Family: family}, mark: underWay}
	if spec.CapturesInboundByTPROXY() {
		p.mark = spec.TPROXYMark
	}
	if family == ruleset.IPv4 {
		p.Localhost = spec.Localhost4
	}
	for _, ids := range spec.ProxyUIDs {
		p.owners = append(p.owners, ruleset.Owner{Kind: ruleset.UID, IDs: ids})
	}
	for _, ids := range spec.ProxyGIDs {
		p.owners = append(p.owners, ruleset.Owner{Kind: ruleset.GID, IDs: ids})
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

// policy is a ruleset under construction.
type policy struct {
	capture.Spec
	ruleset.Addresses
	ruleset.Ruleset
	mark    uint32          // of packets that the agent sends from its client's address; 0 if it does not
	owners  []ruleset.Owner // the agent
	servers []netip.Prefix  // where DNS is captured in this family
}

// dnsServers returns the networks of this family in which DNS is captured. An invalid prefix stands for all addresses.
func (p *policy) dnsServers() []netip.Prefix {
	if p.CaptureAllDNS {
		return []netip.Prefix{{}}
	}
	var servers []netip.Prefix
	for _, server := range p.DNSServers {
		if prefix := netip.PrefixFrom(server, server.BitLen()); p.Family.Owns(prefix) && !linkLocal.Contains(server) {
			servers = append(servers, prefix)
		}
	}
	return servers
}

// chain adds a chain without its unreachable rules. An empty chain is not added.
func (p *policy) chain(table ruleset.TableName, name string, rules ...ruleset.Rule) {
	c := ruleset.Chain{Name: name}
	if !c.Own() {
		c.Policy = ruleset.PolicyAccept
	}
	ended := make(map[ruleset.Match]bool)
	for _, r := range rules {
		if !ended[r.Match] {
			c.Rules = append(c.Rules, r)
			ended[r.Match] = r.Final()
		}
	}
	if len(c.Rules) > 0 {
		p.AddChain(table, c)
	}
}

// inbound builds the nat rules for incoming connections.
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
			rules = append(rules, ruleset.Rule{
				ID: "virtual/" + name + suffix(network), Match: match, Target: ruleset.Jump(ruleset.ChainRedirect),
				Why: "connections of a virtual machine are captured like those of the workload",
			})
		}
		if redirect && !p.Outbound.All {
			rules = append(rules, ruleset.Rule{
				ID: "virtual/others/" + name, Match: ruleset.Match{In: name}, Target: ruleset.Return{}, Why: "connections of a virtual machine are not inbound",
			})
		}
	}
	if redirect {
		for _, name := range p.InterfacesExcluded {
			if !slices.Contains(p.VirtualInterfaces, name) {
				rules = append(rules, leftAlone("inbound", ruleset.Match{In: name}))
			}
		}
		rules = append(rules, p.tunnel())
		rules = append(rules, p.inboundPorts(ruleset.ChainInboundRedirect)...)
	}
	p.chain(ruleset.NAT, ruleset.ChainPrerouting, ruleset.Rule{
		ID: "inbound/jump", Match: ruleset.Match{Protocol: ruleset.TCP}, Target: ruleset.Jump(ruleset.ChainInbound),
		Why: "our chain decides about incoming TCP",
	})
	p.chain(ruleset.NAT, ruleset.ChainInbound, rules...)
}

func (p *policy) tunnel() ruleset.Rule {
	return ruleset.Rule{ID: "inbound/tunnel", Match: toPorts(single(p.TunnelPort)), Target: ruleset.Return{},
		Why: "the tunnel port has its own listener, and redirecting would break tunnels"}
}

// inboundPorts sends connections to captured ports to the chain target.
func (p *policy) inboundPorts(target string) []ruleset.Rule {
	var rules []ruleset.Rule
	if p.CapturesInboundByTPROXY() {
		rules = p.linkLocal("inbound/link-local", true)
	}
	if !p.Inbound.All {
		for _, ports := range p.Inbound.List {
			rules = append(rules, ruleset.Rule{
				ID: "inbound/port/" + ports.String(), Match: toPorts(ports), Target: ruleset.Jump(target), Why: "this port is captured",
			})
		}
		return rules
	}
	for _, ports := range p.InboundExcluded {
		rules = append(rules, ruleset.Rule{
			ID: "inbound/excluded/" + ports.String(), Match: toPorts(ports), Target: ruleset.Return{},
			Why: "this port is excluded; probes and scrapes of the agent itself would break if they were captured",
		})
	}
	return append(rules, ruleset.Rule{
		ID: "inbound/all", Match: ruleset.Match{Protocol: ruleset.TCP}, Target: ruleset.Jump(target), Why: "every other port is captured",
	})
}

// outbound builds the nat rules for packets of local processes.
func (p *policy) outbound() {
	rules, groups := p.outboundAlone(), p.outboundCaptured()
	if p.OwnerGroups.All {
		for _, ids := range p.OwnerGroupsExcluded {
			owner := ruleset.Owner{Kind: ruleset.GID, IDs: ids}
			rules = append(rules, ruleset.Rule{
				ID: "outbound/group-excluded/" + owner.String(), Match: ruleset.Match{Owner: owner}, Target: ruleset.Return{}, Why: "this group is excluded",
			})
		}
		rules = append(rules, groups...)
	}
	for _, ids := range p.OwnerGroups.List {
		owner := ruleset.Owner{Kind: ruleset.GID, IDs: ids}
		rules = append(rules, ruleset.Rule{
			ID: "outbound/group/" + owner.String(), Match: ruleset.Match{Owner: owner}, Target: ruleset.Jump(ruleset.ChainCaptured), Why: "only listed groups are captured, and this is one",
		})
	}
	jump := ruleset.Rule{
		ID: "outbound/jump", Match: ruleset.Match{Protocol: ruleset.TCP}, Target: ruleset.Jump(ruleset.ChainOutput), Why: "our chain decides about outgoing packets",
	}
	if len(p.servers) > 0 {
		jump.Match = ruleset.Match{}
		jump.Before = p.queries()
	}
	p.chain(ruleset.NAT, ruleset.ChainBuiltOutput, jump)
	p.chain(ruleset.NAT, ruleset.ChainOutput, rules...)
	p.chainIfUsed(ruleset.NAT, ruleset.ChainCaptured, groups...)
	p.chainIfUsed(ruleset.NAT, ruleset.ChainRedirect, ruleset.Rule{
		ID: "outbound/redirect", Match: ruleset.Match{Protocol: ruleset.TCP}, Target: ruleset.Redirect(p.OutboundPort),
		Why: "captured outbound connections go to the agent",
	})
	p.chainIfUsed(ruleset.NAT, ruleset.ChainInboundRedirect, ruleset.Rule{
		ID: "inbound/redirect", Match: ruleset.Match{Protocol: ruleset.TCP}, Target: ruleset.Redirect(p.InboundPort),
		Why: "captured inbound connections go to the agent",
	})
}

// chainIfUsed adds a chain if a rule jumps to it.
func (p *policy) chainIfUsed(table ruleset.TableName, name string, rules ...ruleset.Rule) {
	for at, r := range p.All() {
		if at.Table == table && r.Target == ruleset.Jump(name) {
			p.chain(table, name, rules...)
			return
		}
	}
}

// outboundAlone returns the exceptions that precede all other rules, among them the agent's own connections.
func (p *policy) outboundAlone() []ruleset.Rule {
	var rules []ruleset.Rule
	for _, name := range p.InterfacesExcluded {
		rules = append(rules, leftAlone("outbound", ruleset.Match{Out: name}))
	}
	for _, ports := range p.OutboundPortsExcluded {
		rules = append(rules, ruleset.Rule{
			ID: "outbound/port-excluded/" + ports.String(), Match: toPorts(ports), Target: ruleset.Return{},
			Why: "this port is excluded at every address",
		})
	}
	rules = append(rules, ruleset.Rule{
		ID: "outbound/to-workload", Match: ruleset.Match{Out: ruleset.Loopback, Src: p.InboundSource}, Target: ruleset.Return{},
		Why: "connections from the agent to the workload must not return to the agent",
	})
	rules = append(rules, p.self()...)
	for _, owner := range p.owners {
		rules = append(rules, ruleset.Rule{
			ID: "outbound/agent/" + owner.String(), Match: ruleset.Match{Owner: owner}, Target: ruleset.Return{},
			Why: "the agent's own connections are not captured again",
		})
	}
	return rules
}

// self returns the rules for a workload that calls its own service through the agent. In TPROXY mode the mangle table
// has them. istio-iptables redirects users even then, and groups only where its earlier rules let them pass: its rule for
// loopback traffic of other users precedes its rules for groups. It has no exception for the queries of groups.
func (p *policy) self() []ruleset.Rule {
	var queries, calls []ruleset.Rule
	for i, owner := range p.owners {
		user := i < len(p.ProxyUIDs)
		call := ruleset.Match{
			Out: ruleset.Loopback, Dst: p.Localhost, NotDst: true,
			Protocol: ruleset.TCP, DstPorts: single(p.TunnelPort), NotDstPorts: true, Owner: owner,
		}
		if call.Mark = p.mark; p.Mode == capture.TPROXY {
			call.Mark = p.TPROXYMark
		}
		switch {
		case !p.Compat && p.Mode == capture.TPROXY:
			continue
		case !p.Compat, user, p.capturesLoopback():
		case p.CapturesDNS():
			call.DstPorts, call.NotDstPorts = single(ruleset.DNSPort), false
		default:
			continue
		}
		if p.CapturesDNS() && (user || !p.Compat) {
			queries = append(queries, ruleset.Rule{
				ID: "outbound/agent-query/" + owner.String(), Match: ruleset.Match{Out: ruleset.Loopback, Protocol: ruleset.TCP, DstPorts: single(ruleset.DNSPort), Owner: owner}, Target: ruleset.Return{},
				Why: "a query of the agent to a local name server is not a call of the workload's own service",
			})
		}
		call.NotMark = call.Mark != 0 // marked packets come from a client's address
		calls = append(calls, ruleset.Rule{
			ID: "outbound/self/" + owner.String(), Match: call, Target: ruleset.Jump(ruleset.ChainInboundRedirect),
			Why: "a workload that calls its own service passes the agent's inbound side, like any other client",
		})
	}
	return append(queries, calls...)
}

// capturesLoopback reports whether loopback addresses are captured like others.
func (p *policy) capturesLoopback() bool { return slices.ContainsFunc(p.Outbound.List, isLoopback) }

// queries returns a match for each server and protocol of the captured queries.
func (p *policy) queries() []ruleset.Match {
	var queries []ruleset.Match
	for _, server := range p.servers {
		for _, protocol := range []ruleset.Protocol{ruleset.TCP, ruleset.UDP} {
			queries = append(queries, ruleset.Match{Protocol: protocol, DstPorts: single(ruleset.DNSPort), Dst: server})
		}
	}
	return queries
}

// outboundCaptured decides for all other processes.
func (p *policy) outboundCaptured() []ruleset.Rule {
	rules := p.linkLocal("outbound/link-local", true)
	for _, query := range p.queries() {
		rules = append(rules, ruleset.Rule{
			ID: fmt.Sprintf("dns/%s%s", query.Protocol, suffix(query.Dst)), Match: query, Target: ruleset.Redirect(capture.DNSPort),
			Why: "queries go to the agent; it answers or forwards them",
		})
	}
	rules = append(rules, p.loopback()...)
	for _, prefix := range p.OutboundExcluded {
		if p.Family.Owns(prefix) {
			rules = append(rules, ruleset.Rule{
				ID: "outbound/excluded/" + prefix.String(), Match: toNetwork(prefix), Target: ruleset.Return{}, Why: "this network is excluded",
			})
		}
	}
	for _, ports := range p.OutboundPorts {
		rules = append(rules, ruleset.Rule{
			ID: "outbound/port/" + ports.String(), Match: toPorts(ports), Target: ruleset.Jump(ruleset.ChainRedirect),
			Why: "this port is captured at every address that is not excluded",
		})
	}
	for _, network := range p.capturedNetworks() {
		rule := ruleset.Rule{ID: "outbound/all", Match: toNetwork(network), Target: ruleset.Jump(ruleset.ChainRedirect), Why: "every other address is captured"}
		if network.IsValid() {
			rule.ID, rule.Why = "outbound/network"+suffix(network), "this network is captured"
		}
		rules = append(rules, rule)
	}
	return rules
}

// capturedNetworks returns the captured destinations of this family. An invalid prefix stands for all addresses.
func (p *policy) capturedNetworks() []netip.Prefix {
	if p.Outbound.All {
		return []netip.Prefix{{}}
	}
	return slices.DeleteFunc(slices.Clone(p.Outbound.List), func(prefix netip.Prefix) bool { return !p.Family.Owns(prefix) })
}

// loopback returns the exceptions for traffic within the pod.
func (p *policy) loopback() []ruleset.Rule {
	localhost := ruleset.Rule{
		ID: "outbound/localhost", Match: ruleset.Match{Dst: p.Localhost}, Target: ruleset.Return{},
		Why: "localhost is not captured, even if other loopback addresses are",
	}
	if p.capturesLoopback() {
		return []ruleset.Rule{localhost}
	}
	rule := ruleset.Rule{
		ID: "outbound/loopback", Match: ruleset.Match{Out: ruleset.Loopback}, Target: ruleset.Return{},
		Why: "connections between processes of the workload are not captured",
	}
	if p.Compat && p.CapturesDNS() {
		rule.Match = ruleset.Match{Out: ruleset.Loopback, Protocol: ruleset.TCP, DstPorts: single(ruleset.DNSPort), NotDstPorts: true}
		return []ruleset.Rule{rule, localhost}
	}
	return []ruleset.Rule{rule}
}

// linkLocal returns an exception for link-local destinations of IPv6. IPv4 has no such exception.
func (p *policy) linkLocal(id string, wanted bool) []ruleset.Rule {
	if p.Family != ruleset.IPv6 || !wanted {
		return nil
	}
	return []ruleset.Rule{{ID: id, Match: ruleset.Match{Dst: linkLocal}, Target: ruleset.Return{},
		Why: "a link-local address needs its interface, and conntrack does not record that"}}
}

var linkLocal = netip.MustParsePrefix("fe80::/10")

func isLoopback(prefix netip.Prefix) bool { return prefix.Addr().IsLoopback() }

func single(port uint16) capture.PortRange { return capture.PortRange{First: port, Last: port} }

// suffix returns the last part of the ID of a rule for a network, or "" for all networks.
func suffix(network netip.Prefix) string {
	if !network.IsValid() {
		return ""
	}
	return "/" + network.String()
}

// leftAlone returns the rule for an excluded interface.
func leftAlone(where string, interfaces ruleset.Match) ruleset.Rule {
	return ruleset.Rule{
		ID: where + "/interface/" + interfaces.In + interfaces.Out, Match: interfaces, Target: ruleset.Return{}, Why: "this interface is excluded",
	}
}

func toPorts(ports capture.PortRange) ruleset.Match {
	return ruleset.Match{Protocol: ruleset.TCP, DstPorts: ports}
}

// toNetwork returns an empty Match for all addresses and for a mask of 0, since the kernel does not keep such a
// condition.
func toNetwork(prefix netip.Prefix) ruleset.Match {
	if prefix.Bits() <= 0 {
		return ruleset.Match{}
	}
	return ruleset.Match{Dst: prefix.Masked()}
}
