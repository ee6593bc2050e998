package iptables

import "github.com/pillion-proxy/pillion/internal/capture"

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
