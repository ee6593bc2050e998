package policy

import (
	"net/netip"

	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/iptables/ruleset"
)

// arriving builds the mangle rules for incoming packets.
func (p *policy) arriving() {
	tproxy := p.CapturesInboundByTPROXY()
	if p.mark == 0 && !p.DropInvalid {
		return
	}
	var rules []ruleset.Rule
	if p.Mode == capture.TPROXY || !p.Compat { // istio-iptables drops on excluded interfaces, too
		for _, name := range p.InterfacesExcluded {
			rules = append(rules, leftAlone("arriving", ruleset.Match{In: name}))
		}
	}
	everything := ruleset.Match{Protocol: ruleset.TCP}
	if p.DropInvalid {
		everything = ruleset.Match{}
		rules = append(rules, ruleset.Rule{
			ID: "arriving/invalid", Match: ruleset.Match{State: ruleset.Invalid}, Target: ruleset.Drop{},
			Why: "what connection tracking cannot place would not be redirected, and the kernel would answer it with a reset",
		})
	}
	if tproxy {
		for _, name := range p.VirtualInterfaces {
			rules = append(rules, ruleset.Rule{
				ID: "arriving/virtual/" + name, Match: ruleset.Match{In: name}, Target: ruleset.Return{},
				Why: "what a virtual machine opens is outbound, which is the nat table's business",
			})
		}
	}
	if p.mark != 0 {
		rules = append(rules,
			ruleset.Rule{ID: "arriving/given", Match: ruleset.Match{Protocol: ruleset.TCP, Mark: p.mark, ConnMark: capture.LoopMark}, Target: ruleset.Return{},
				Why: "while our rules move, the same stand in two places, and the others have given the packet to the agent already"},
			ruleset.Rule{ID: "arriving/original-source/save", Match: ruleset.Match{Protocol: ruleset.TCP, Mark: p.mark}, Target: ruleset.SaveMark{},
				Why: "the workload's answers to an address that the agent borrowed must find the agent, so the connection remembers the mark"})
	}
	if tproxy {
		rules = append(rules,
			ruleset.Rule{ID: "arriving/original-source", Match: ruleset.Match{Protocol: ruleset.TCP, Mark: p.mark}, Target: ruleset.Return{},
				Why: "what the agent sends to the workload from its client's address is not captured again"},
			ruleset.Rule{ID: "arriving/inbound", Match: ruleset.Match{Protocol: ruleset.TCP}, Target: ruleset.Jump(ruleset.ChainInbound),
				Why: "incoming TCP is judged by our chain"})
	}
	p.chain(ruleset.Mangle, ruleset.ChainPrerouting, ruleset.Rule{
		ID: "arriving/jump", Match: everything, Target: ruleset.Jump(ruleset.ChainArriving), Why: "what arrives is judged by our chain",
	})
	p.chain(ruleset.Mangle, ruleset.ChainArriving, rules...)
	if tproxy {
		p.inboundTPROXY()
	}
}

// inboundTPROXY passes connections to the agent with both addresses unchanged.
func (p *policy) inboundTPROXY() {
	rules := []ruleset.Rule{
		{ID: "inbound/to-workload", Match: ruleset.Match{In: ruleset.Loopback, Src: p.InboundSource}, Target: ruleset.Return{},
			Why: "what the agent forwards to the workload must arrive there and not come back"},
		{ID: "inbound/loopback", Match: ruleset.Match{In: ruleset.Loopback, Mark: capture.LoopMark, NotMark: true}, Target: ruleset.Return{},
			Why: "processes of the workload talk to each other directly"},
	}
	if !p.Compat {
		rules = append(rules, p.tunnel())
	}
	p.chain(ruleset.Mangle, ruleset.ChainInbound, append(rules, p.inboundPorts(ruleset.ChainTPROXY)...)...)
	known := ruleset.Match{State: ruleset.Established, ConnMark: capture.LoopMark}
	rules = []ruleset.Rule{
		{ID: "inbound/known", Match: known, Target: ruleset.Jump(ruleset.ChainDivert),
			Why: "a connection that was given to the agent stays with it"},
		{ID: "inbound/earlier", Match: ruleset.Match{State: ruleset.Established}, Target: ruleset.Return{},
			Why: "every other connection under way stays where it is: it began before the rules, or here, or only passes through"},
	}
	if p.Compat {
		rules = append(rules, ruleset.Rule{ID: "inbound/localhost", Match: ruleset.Match{Dst: p.Localhost}, Target: ruleset.Return{},
			Why: "what was redirected already is on its way to the agent"})
	}
	p.chainIfUsed(ruleset.Mangle, ruleset.ChainTPROXY, append(rules,
		ruleset.Rule{ID: "inbound/connection", Match: ruleset.Match{Protocol: ruleset.TCP}, Target: ruleset.SetConnMark(capture.LoopMark),
			Why: "the connection remembers that it was given to the agent"},
		ruleset.Rule{ID: "inbound/tproxy", Match: ruleset.Match{Protocol: ruleset.TCP},
			Target: ruleset.ToSocket{To: netip.AddrPortFrom(p.Anywhere, p.InboundPort), Mark: p.TPROXYMark},
			Why:    "captured inbound connections go to the agent as they are"})...)
	p.chainIfUsed(ruleset.Mangle, ruleset.ChainDivert,
		ruleset.Rule{ID: "inbound/divert/mark", Target: ruleset.SetMark(p.TPROXYMark), Why: "by this mark the packet is delivered here, whatever its destination"},
		ruleset.Rule{ID: "inbound/divert", Target: ruleset.Accept{}, Why: "its socket is found without further rules"})
}

// leaving builds the mangle rules for packets of local processes: marks for TPROXY.
func (p *policy) leaving() {
	if p.mark == 0 {
		return
	}
	p.chain(ruleset.Mangle, ruleset.ChainBuiltOutput, ruleset.Rule{
		ID: "leaving/jump", Match: ruleset.Match{Protocol: ruleset.TCP}, Target: ruleset.Jump(ruleset.ChainOutput), Why: "outgoing TCP is marked by our chain",
	})
	answer := ruleset.Rule{
		ID: "leaving/answer", Match: ruleset.Match{Protocol: ruleset.TCP, ConnMark: p.mark}, Target: ruleset.RestoreMark{},
		Why: "the workload's answers to an address that the agent borrowed are routed to the agent",
	}
	if !p.CapturesInboundByTPROXY() {
		p.chain(ruleset.Mangle, ruleset.ChainOutput, answer)
		return
	}
	var rules []ruleset.Rule
	for _, name := range p.InterfacesExcluded {
		rules = append(rules, leftAlone("leaving", ruleset.Match{Out: name}))
	}
	rules = append(rules, ruleset.Rule{
		ID: "leaving/original-source", Match: ruleset.Match{Out: ruleset.Loopback, Mark: p.mark}, Target: ruleset.Return{},
		Why: "what the agent sends to the workload from its client's address keeps its mark",
	})
	for _, owner := range p.owners {
		self := ruleset.Match{Dst: p.Localhost, NotDst: true, Out: ruleset.Loopback, Protocol: ruleset.TCP, Owner: owner}
		if p.CapturesDNS() && !p.Compat { // istio-iptables takes its queries for calls
			self.DstPorts, self.NotDstPorts = single(ruleset.DNSPort), true
		}
		rules = append(rules, ruleset.Rule{ID: "leaving/self/" + owner.String(), Match: self, Target: ruleset.SetMark(capture.LoopMark),
			Why: "by this mark a call of the workload's own service is told from what the workload says to itself"})
	}
	p.chain(ruleset.Mangle, ruleset.ChainOutput, append(rules, answer)...)
}
