package policy

import (
	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/iptables/ruleset"
)

// captureZone is the conntrack zone of captured DNS queries over UDP and of the agent's answers to them. A captured
// query and a query of the agent can have the same addresses and ports, and conntrack would take the second for a
// packet of the first.
//
// Queries that are not captured stay in the default zone. Their answers need no rule then, wherever they come from: another
// NAT rule may have sent the query to another address or port, as the rules of Docker's resolver do with queries to
// 127.0.0.11:53.
const captureZone = ruleset.Zone(2)

func (p *policy) zones() {
	if len(p.servers) == 0 {
		return
	}
	queries := ruleset.Match{Protocol: ruleset.UDP, DstPorts: single(ruleset.DNSPort)}
	p.chain(ruleset.Raw, ruleset.ChainBuiltOutput, ruleset.Rule{
		ID: "zone/leaving/jump", Match: ruleset.Match{Protocol: ruleset.UDP}, Target: ruleset.Jump(ruleset.ChainOutput),
		Why: "our chain selects the conntrack zone of a query",
	})
	var leaving, captured []ruleset.Rule
	for _, name := range p.InterfacesExcluded {
		leaving = append(leaving, leftAlone("zone/leaving", ruleset.Match{Out: name}))
	}
	leaving = append(leaving, p.linkLocal("zone/leaving/link-local", p.CaptureAllDNS)...)
	for _, owner := range p.owners {
		query, answer := queries, ruleset.Match{Protocol: ruleset.UDP, SrcPorts: single(capture.DNSPort), Owner: owner}
		query.Owner = owner
		leaving = append(leaving,
			ruleset.Rule{ID: "zone/agent-query/" + owner.String(), Match: query, Target: ruleset.Return{},
				Why: "the agent's own queries are not captured"},
			ruleset.Rule{ID: "zone/agent-answer/" + owner.String(), Match: answer, Target: captureZone,
				Why: "the agent's answers belong to the queries that were captured"})
	}
	ask := func(owner ruleset.Owner, target ruleset.Target) ruleset.Rule {
		query := queries
		query.Owner = owner
		return ruleset.Rule{ID: "zone/query/" + owner.String(), Match: query, Target: target, Why: "the group decides whether queries are captured"}
	}
	if p.OwnerGroups.All {
		for _, ids := range p.OwnerGroupsExcluded {
			leaving = append(leaving, ask(ruleset.Owner{Kind: ruleset.GID, IDs: ids}, ruleset.Return{}))
		}
		leaving = append(leaving, ruleset.Rule{ID: "zone/query", Match: queries, Target: ruleset.Jump(ruleset.ChainDNSCaptured), Why: "all other queries are captured"})
	}
	for _, ids := range p.OwnerGroups.List {
		leaving = append(leaving, ask(ruleset.Owner{Kind: ruleset.GID, IDs: ids}, ruleset.Jump(ruleset.ChainDNSCaptured)))
	}
	for _, server := range p.servers {
		captured = append(captured, ruleset.Rule{
			ID: "zone/captured" + suffix(server), Match: ruleset.Match{Protocol: ruleset.UDP, DstPorts: single(ruleset.DNSPort), Dst: server}, Target: captureZone,
			Why: "a captured query and the query that the agent forwards are in different zones",
		})
	}
	p.chain(ruleset.Raw, ruleset.ChainOutput, leaving...)
	p.chainIfUsed(ruleset.Raw, ruleset.ChainDNSCaptured, captured...)
}
