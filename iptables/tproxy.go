package iptables

import (
	"net/netip"

	"github.com/pillion-proxy/pillion/internal/capture"
)

// arriving is what the mangle table does with what comes in.
func (p *policy) arriving() {
	tproxy := p.CapturesInboundByTPROXY()
	if p.mark == 0 && !p.DropInvalid {
		return
	}
	var rules []Rule
	if p.Mode == capture.TPROXY || !p.Compat { // istio-iptables drops on excluded interfaces, too
		for _, name := range p.InterfacesExcluded {
			rules = append(rules, leftAlone("arriving", Match{In: name}))
		}
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
	}
	if p.mark != 0 {
		rules = append(rules,
			Rule{ID: "arriving/given", Match: Match{Protocol: TCP, Mark: p.mark, ConnMark: capture.LoopMark}, Target: Return{},
				Why: "while our rules move, the same stand in two places, and the others have given the packet to the agent already"},
			Rule{ID: "arriving/original-source/save", Match: Match{Protocol: TCP, Mark: p.mark}, Target: SaveMark{},
				Why: "the workload's answers to an address that the agent borrowed must find the agent, so the connection remembers the mark"})
	}
	if tproxy {
		rules = append(rules,
			Rule{ID: "arriving/original-source", Match: Match{Protocol: TCP, Mark: p.mark}, Target: Return{},
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
	if p.mark == 0 {
		return
	}
	p.chain(Mangle, chainBuiltOutput, Rule{
		ID: "leaving/jump", Match: Match{Protocol: TCP}, Target: Jump(chainOutput), Why: "outgoing TCP is marked by our chain",
	})
	answer := Rule{
		ID: "leaving/answer", Match: Match{Protocol: TCP, ConnMark: p.mark}, Target: RestoreMark{},
		Why: "the workload's answers to an address that the agent borrowed are routed to the agent",
	}
	if !p.CapturesInboundByTPROXY() {
		p.chain(Mangle, chainOutput, answer)
		return
	}
	var rules []Rule
	for _, name := range p.InterfacesExcluded {
		rules = append(rules, leftAlone("leaving", Match{Out: name}))
	}
	rules = append(rules, Rule{
		ID: "leaving/original-source", Match: Match{Out: loopback, Mark: p.mark}, Target: Return{},
		Why: "what the agent sends to the workload from its client's address keeps its mark",
	})
	for _, owner := range p.owners {
		self := Match{Dst: p.localhost, NotDst: true, Out: loopback, Protocol: TCP, Owner: owner}
		if p.CapturesDNS() && !p.Compat { // istio-iptables takes its queries for calls
			self.DstPorts, self.NotDstPorts = single(dnsPort), true
		}
		rules = append(rules, Rule{ID: "leaving/self/" + owner.String(), Match: self, Target: SetMark(capture.LoopMark),
			Why: "by this mark a call of the workload's own service is told from what the workload says to itself"})
	}
	p.chain(Mangle, chainOutput, append(rules, answer)...)
}
