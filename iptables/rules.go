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
}

func factsOf(family Family) facts {
	if family == IPv6 {
		return facts{netip.MustParsePrefix("::1/128"), netip.PrefixFrom(capture.InboundSource6, 128)}
	}
	return facts{netip.MustParsePrefix("127.0.0.1/32"), netip.PrefixFrom(capture.InboundSource4, 32)}
}

// Rules is the policy: what spec captures in one family, as rules in the order in which they are tried. It follows
// istio-iptables verdict for verdict, but for its "not this user" rules, which kept a second user or a group from ever
// being looked at: here every user and group of the agent has had its say before the rest of the loopback traffic is let
// go. The spec must be valid.
func Rules(spec capture.Spec, family Family) Ruleset {
	rs := Ruleset{Family: family}
	if !spec.Inbound.None() {
		rs.add(chainPrerouting, Rule{
			ID: "inbound/jump", Match: Match{TCP: true}, Target: Jump(chainInbound),
			Why: "incoming TCP is judged by our chain",
		})
	}
	rs.add(chainBuiltOutput, Rule{
		ID: "outbound/jump", Match: Match{TCP: true}, Target: Jump(chainOutput),
		Why: "outgoing TCP is judged by our chain",
	})
	if !spec.Inbound.None() {
		rs.add(chainInbound, inboundRules(spec, family)...)
	}
	rs.add(chainInboundRedirect, Rule{
		ID: "inbound/redirect", Match: Match{TCP: true}, Target: Redirect(spec.InboundPort),
		Why: "captured inbound connections go to the agent",
	})
	output := outboundRules(spec, family)
	rs.add(chainOutput, output...)
	if slices.ContainsFunc(output, func(r Rule) bool { return r.Target == Jump(chainRedirect) }) {
		rs.add(chainRedirect, Rule{
			ID: "outbound/redirect", Match: Match{TCP: true}, Target: Redirect(spec.OutboundPort),
			Why: "captured outbound connections go to the agent",
		})
	}
	return rs
}

func (rs *Ruleset) add(chain string, rules ...Rule) {
	c := Chain{Name: chain, Rules: rules}
	if !c.own() {
		c.Policy = policyAccept
	}
	rs.Chains = append(rs.Chains, c)
}

func inboundRules(spec capture.Spec, family Family) []Rule {
	var rules []Rule
	for _, name := range spec.InterfacesExcluded {
		rules = append(rules, Rule{
			ID: "inbound/interface/" + name, Match: Match{In: name}, Target: Return{},
			Why: "this interface is left alone",
		})
	}
	rules = append(rules, Rule{
		ID: "inbound/tunnel", Match: toPorts(single(spec.TunnelPort)), Target: Return{},
		Why: "tunnels have a listener of their own, which must get them whole",
	})
	if family == IPv6 {
		rules = append(rules, Rule{
			ID: "inbound/link-local", Match: Match{Dst: linkLocal}, Target: Return{},
			Why: "the workload's answer from a link-local address would not find the agent, which dials from the loopback",
		})
	}
	if !spec.Inbound.All {
		for _, ports := range spec.Inbound.List {
			rules = append(rules, Rule{
				ID: "inbound/port/" + ports.String(), Match: toPorts(ports), Target: Jump(chainInboundRedirect),
				Why: "this port is captured",
			})
		}
		return rules
	}
	for _, ports := range spec.InboundExcluded {
		rules = append(rules, Rule{
			ID: "inbound/excluded/" + ports.String(), Match: toPorts(ports), Target: Return{},
			Why: "this port is left alone; probes and scrapes of the agent itself would break if they went through it",
		})
	}
	return append(rules, Rule{
		ID: "inbound/all", Match: Match{TCP: true}, Target: Jump(chainInboundRedirect),
		Why: "every other port is captured",
	})
}

func outboundRules(spec capture.Spec, family Family) []Rule {
	var rules []Rule
	for _, name := range spec.InterfacesExcluded {
		rules = append(rules, Rule{
			ID: "outbound/interface/" + name, Match: Match{Out: name}, Target: Return{},
			Why: "this interface is left alone",
		})
	}
	for _, ports := range spec.OutboundPortsExcluded {
		rules = append(rules, Rule{
			ID: "outbound/port-excluded/" + ports.String(), Match: toPorts(ports), Target: Return{},
			Why: "this port is left alone at every address",
		})
	}
	rules = append(rules, loopbackRules(spec, family)...)
	if family == IPv6 {
		rules = append(rules, Rule{
			ID: "outbound/link-local", Match: Match{Dst: linkLocal}, Target: Return{},
			Why: "a link-local address means nothing without its interface, which connection tracking does not remember",
		})
	}
	for _, prefix := range spec.OutboundExcluded {
		if family.owns(prefix) {
			rules = append(rules, Rule{
				ID: "outbound/excluded/" + prefix.String(), Match: toNetwork(prefix), Target: Return{},
				Why: "this network is left alone",
			})
		}
	}
	for _, ports := range spec.OutboundPorts {
		rules = append(rules, Rule{
			ID: "outbound/port/" + ports.String(), Match: toPorts(ports), Target: Jump(chainRedirect),
			Why: "this port is captured at every address that is not excluded",
		})
	}
	if spec.Outbound.All {
		return append(rules, Rule{
			ID: "outbound/all", Target: Jump(chainRedirect),
			Why: "every other address is captured",
		})
	}
	for _, prefix := range spec.Outbound.List {
		if family.owns(prefix) {
			rules = append(rules, Rule{
				ID: "outbound/network/" + prefix.String(), Match: toNetwork(prefix), Target: Jump(chainRedirect),
				Why: "this network is captured",
			})
		}
	}
	return rules
}

// loopbackRules keep the agent from capturing itself and decide what happens on the loopback interface.
func loopbackRules(spec capture.Spec, family Family) []Rule {
	facts := factsOf(family)
	var owners []Owner
	for _, id := range spec.ProxyUIDs {
		owners = append(owners, Owner{UID, id})
	}
	for _, id := range spec.ProxyGIDs {
		owners = append(owners, Owner{GID, id})
	}
	rules := []Rule{{
		ID: "outbound/to-workload", Match: Match{Out: loopback, Src: facts.inboundSource}, Target: Return{},
		Why: "what the agent forwards to the workload must arrive there and not come back",
	}}
	for _, owner := range owners {
		rules = append(rules, Rule{
			ID: fmt.Sprintf("outbound/self/%s/%d", owner.Kind, owner.ID),
			Match: Match{
				Out: loopback, Dst: facts.localhost, NotDst: true,
				TCP: true, DstPorts: single(spec.TunnelPort), NotDstPorts: true, Owner: owner,
			},
			Target: Jump(chainInboundRedirect),
			Why:    "a workload that calls its own service reaches itself through the agent's inbound side, like any other caller",
		})
	}
	for _, owner := range owners {
		rules = append(rules, Rule{
			ID: fmt.Sprintf("outbound/agent/%s/%d", owner.Kind, owner.ID), Match: Match{Owner: owner}, Target: Return{},
			Why: "the agent's own connections are not captured again",
		})
	}
	if slices.ContainsFunc(spec.Outbound.List, isLoopback) {
		return append(rules, Rule{
			ID: "outbound/localhost", Match: Match{Dst: facts.localhost}, Target: Return{},
			Why: "localhost stays local, even where other loopback addresses are captured",
		})
	}
	return append(rules, Rule{
		ID: "outbound/loopback", Match: Match{Out: loopback}, Target: Return{},
		Why: "processes of the workload talk to each other directly",
	})
}

const loopback = "lo"

var linkLocal = netip.MustParsePrefix("fe80::/10")

func isLoopback(prefix netip.Prefix) bool { return prefix.Addr().IsLoopback() }

func single(port uint16) capture.PortRange { return capture.PortRange{First: port, Last: port} }

func toPorts(ports capture.PortRange) Match { return Match{TCP: true, DstPorts: ports} }

// toNetwork matches everything for a mask of 0: the kernel does not keep such a condition.
func toNetwork(prefix netip.Prefix) Match {
	if prefix.Bits() == 0 {
		return Match{}
	}
	return Match{Dst: prefix.Masked()}
}
