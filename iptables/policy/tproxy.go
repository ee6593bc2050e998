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
			Why: "packets that conntrack calls INVALID would not be redirected, and the kernel would answer them with a reset",
		})
	}
	if tproxy {
		for _, name := range p.VirtualInterfaces {
			rules = append(rules, ruleset.Rule{
				ID: "arriving/virtual/" + name, Match: ruleset.Match{In: name}, Target: ruleset.Return{},
				Why: "connections of a virtual machine are outbound, and the nat table captures those",
			})
		}
	}
	if p.mark != 0 {
		rules = append(rules,
			ruleset.Rule{ID: "arriving/given", Match: ruleset.Match{Protocol: ruleset.TCP, Mark: p.mark, ConnMark: capture.LoopMark}, Target: ruleset.Return{},
				Why: "while rules move between back ends they exist twice, and the other copy has already passed the packet to the agent"},
			ruleset.Rule{ID: "arriving/original-source/save", Match: ruleset.Match{Protocol: ruleset.TCP, Mark: p.mark}, Target: ruleset.SaveMark{},
				Why: "the connection keeps the mark, so that the workload's answers to a client's address that the agent uses reach the agent"})
	}
	if tproxy {
		rules = append(rules,
			ruleset.Rule{ID: "arriving/original-source", Match: ruleset.Match{Protocol: ruleset.TCP, Mark: p.mark}, Target: ruleset.Return{},
				Why: "packets that the agent sends to the workload from its client's address are not captured again"},
			ruleset.Rule{ID: "arriving/inbound", Match: ruleset.Match{Protocol: ruleset.TCP}, Target: ruleset.Jump(ruleset.ChainInbound),
				Why: "our chain decides about incoming TCP"})
	}
	p.chain(ruleset.Mangle, ruleset.ChainPrerouting, ruleset.Rule{
		ID: "arriving/jump", Match: everything, Target: ruleset.Jump(ruleset.ChainArriving), Why: "our chain decides about incoming packets",
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
			Why: "connections from the agent to the workload must not return to the agent"},
		{ID: "inbound/loopback", Match: ruleset.Match{In: ruleset.Loopback, Mark: capture.LoopMark, NotMark: true}, Target: ruleset.Return{},
			Why: "connections between processes of the workload are not captured"},
	}
	if !p.Compat {
		rules = append(rules, p.tunnel())
	}
	p.chain(ruleset.Mangle, ruleset.ChainInbound, append(rules, p.inboundPorts(ruleset.ChainTPROXY)...)...)
	known := ruleset.Match{State: ruleset.Established, ConnMark: capture.LoopMark}
	rules = []ruleset.Rule{
		{ID: "inbound/known", Match: known, Target: ruleset.Jump(ruleset.ChainDivert),
			Why: "a connection that the agent has stays with it"},
		{ID: "inbound/earlier", Match: ruleset.Match{State: ruleset.Established}, Target: ruleset.Return{},
			Why: "other open connections are not captured: they began before the rules, or in this pod, or are forwarded"},
	}
	if p.Compat {
		rules = append(rules, ruleset.Rule{ID: "inbound/localhost", Match: ruleset.Match{Dst: p.Localhost}, Target: ruleset.Return{},
			Why: "redirected packets are on their way to the agent"})
	}
	p.chainIfUsed(ruleset.Mangle, ruleset.ChainTPROXY, append(rules,
		ruleset.Rule{ID: "inbound/connection", Match: ruleset.Match{Protocol: ruleset.TCP}, Target: ruleset.SetConnMark(capture.LoopMark),
			Why: "the mark records that the agent has the connection"},
		ruleset.Rule{ID: "inbound/tproxy", Match: ruleset.Match{Protocol: ruleset.TCP},
			Target: ruleset.ToSocket{To: netip.AddrPortFrom(p.Anywhere, p.InboundPort), Mark: p.TPROXYMark},
			Why:    "captured inbound connections go to the agent with both addresses unchanged"})...)
	p.chainIfUsed(ruleset.Mangle, ruleset.ChainDivert,
		ruleset.Rule{ID: "inbound/divert/mark", Target: ruleset.SetMark(p.TPROXYMark), Why: "the mark makes routing deliver the packet locally, whatever its destination"},
		ruleset.Rule{ID: "inbound/divert", Target: ruleset.Accept{}, Why: "the kernel finds the socket without further rules"})
}

// leaving builds the mangle rules for packets of local processes: marks for TPROXY.
func (p *policy) leaving() {
	if p.mark == 0 {
		return
	}
	p.chain(ruleset.Mangle, ruleset.ChainBuiltOutput, ruleset.Rule{
		ID: "leaving/jump", Match: ruleset.Match{Protocol: ruleset.TCP}, Target: ruleset.Jump(ruleset.ChainOutput), Why: "our chain marks outgoing TCP",
	})
	answer := ruleset.Rule{
		ID: "leaving/answer", Match: ruleset.Match{Protocol: ruleset.TCP, ConnMark: p.mark}, Target: ruleset.RestoreMark{},
		Why: "the workload's answers to a client's address that the agent uses are routed to the agent",
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
		Why: "packets that the agent sends to the workload from its client's address keep their mark",
	})
	for _, owner := range p.owners {
		self := ruleset.Match{Dst: p.Localhost, NotDst: true, Out: ruleset.Loopback, Protocol: ruleset.TCP, Owner: owner}
		if p.CapturesDNS() && !p.Compat { // istio-iptables takes its queries for calls
			self.DstPorts, self.NotDstPorts = single(ruleset.DNSPort), true
		}
		rules = append(rules, ruleset.Rule{ID: "leaving/self/" + owner.String(), Match: self, Target: ruleset.SetMark(capture.LoopMark),
			Why: "the mark distinguishes a call of the workload's own service from connections between its processes"})
	}
	p.chain(ruleset.Mangle, ruleset.ChainOutput, append(rules, answer)...)
}
