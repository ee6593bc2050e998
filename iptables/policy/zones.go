package policy

import (
	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/iptables/ruleset"
)

// Conntrack zones for DNS over UDP. A redirected query of the workload and the agent's own query to the same server can
// have the same addresses and ports. In separate zones they do not collide.
const (
	upstreamZone = ruleset.Zone(1) // queries that go to a server directly, and their answers
	captureZone  = ruleset.Zone(2) // queries that go to the agent, and their answers
)

func (p *policy) zones() {
	if len(p.servers) == 0 {
		return
	}
	queries := ruleset.Match{Protocol: ruleset.UDP, DstPorts: single(ruleset.DNSPort)}
	p.chain(ruleset.Raw, ruleset.ChainPrerouting, ruleset.Rule{
		ID: "zone/arriving/jump", Match: ruleset.Match{Protocol: ruleset.UDP}, Target: ruleset.Jump(ruleset.ChainInbound),
		Why: "our chain selects the conntrack zone of an answer",
	})
	p.chain(ruleset.Raw, ruleset.ChainBuiltOutput, ruleset.Rule{
		ID: "zone/leaving/jump", Match: ruleset.Match{Protocol: ruleset.UDP}, Target: ruleset.Jump(ruleset.ChainOutput),
		Why: "our chain selects the conntrack zone of a query",
	})
	var arriving, leaving, captured, passed []ruleset.Rule
	for _, name := range p.InterfacesExcluded {
		arriving = append(arriving, leftAlone("zone/arriving", ruleset.Match{In: name}))
		leaving = append(leaving, leftAlone("zone/leaving", ruleset.Match{Out: name}))
	}
	leaving = append(leaving, p.linkLocal("zone/leaving/link-local", p.CaptureAllDNS)...)
	for _, r := range p.linkLocal("zone/arriving/link-local", p.CaptureAllDNS) {
		r.Match = ruleset.Match{Src: linkLocal}
		arriving = append(arriving, r)
	}
	for _, server := range p.servers {
		from, to := ruleset.Match{Protocol: ruleset.UDP, SrcPorts: single(ruleset.DNSPort), Src: server}, ruleset.Match{Protocol: ruleset.UDP, DstPorts: single(ruleset.DNSPort), Dst: server}
		arriving = append(arriving, ruleset.Rule{
			ID: "zone/answer" + suffix(server), Match: from, Target: upstreamZone,
			Why: "a server's answer belongs to a query that was not captured: of the agent or of an excluded process",
		})
		captured = append(captured, ruleset.Rule{
			ID: "zone/captured" + suffix(server), Match: to, Target: captureZone,
			Why: "a captured query and the query that the agent forwards are in different zones",
		})
		passed = append(passed, ruleset.Rule{
			ID: "zone/passed" + suffix(server), Match: to, Target: upstreamZone,
			Why: "a query that is not captured is in the zone of its answer",
		})
	}
	for _, owner := range p.owners {
		query, answer := queries, ruleset.Match{Protocol: ruleset.UDP, SrcPorts: single(capture.DNSPort), Owner: owner}
		query.Owner = owner
		leaving = append(leaving,
			ruleset.Rule{ID: "zone/agent-query/" + owner.String(), Match: query, Target: ruleset.Jump(ruleset.ChainDNSPassed),
				Why: "the agent's own queries are not captured"},
			ruleset.Rule{ID: "zone/agent-answer/" + owner.String(), Match: answer, Target: captureZone,
				Why: "the agent's answers belong to the queries that were captured"})
	}
	ask := func(owner ruleset.Owner, target string) ruleset.Rule {
		query := queries
		query.Owner = owner
		return ruleset.Rule{ID: "zone/query/" + owner.String(), Match: query, Target: ruleset.Jump(target), Why: "the group decides whether queries are captured"}
	}
	if p.OwnerGroups.All {
		for _, ids := range p.OwnerGroupsExcluded {
			leaving = append(leaving, ask(ruleset.Owner{Kind: ruleset.GID, IDs: ids}, ruleset.ChainDNSPassed))
		}
		leaving = append(leaving, ruleset.Rule{ID: "zone/query", Match: queries, Target: ruleset.Jump(ruleset.ChainDNSCaptured), Why: "all other queries are captured"})
	} else {
		for _, ids := range p.OwnerGroups.List {
			leaving = append(leaving, ask(ruleset.Owner{Kind: ruleset.GID, IDs: ids}, ruleset.ChainDNSCaptured))
		}
		leaving = append(leaving, ruleset.Rule{ID: "zone/query", Match: queries, Target: ruleset.Jump(ruleset.ChainDNSPassed), Why: "no other query is captured"})
	}
	p.chain(ruleset.Raw, ruleset.ChainInbound, arriving...)
	p.chain(ruleset.Raw, ruleset.ChainOutput, leaving...)
	p.chainIfUsed(ruleset.Raw, ruleset.ChainDNSCaptured, captured...)
	p.chainIfUsed(ruleset.Raw, ruleset.ChainDNSPassed, passed...)
}
