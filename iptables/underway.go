package iptables

import (
	"fmt"

	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/iptables/kernel"
)

// borrowing tells by which mark our rules that are there know what the agent sends from its clients' addresses, 0 if they
// do not, and whether TPROXY still gives it connections.
func (s survey) borrowing() (mark uint32, goesOn bool) {
	for _, t := range s.stores {
		for _, r := range t.rules.All() {
			switch r.ID {
			case "leaving/answer":
				mark = r.Match.ConnMark
			case "inbound/tproxy":
				goesOn = true
			}
		}
	}
	return mark, goesOn
}

// underWay is the mark that connections under way need, which came by TPROXY: without it the workload's answers would go
// to the client past the agent, and be reset. It is 0 when there are none.
func (p *Plan) underWay(s survey) uint32 {
	mark, _ := s.borrowing()
	if mark == 0 {
		return 0
	}
	connections, err := kernel.CountTCP(mark, capture.LoopMark)
	switch {
	case err != nil:
		p.Warnings = append(p.Warnings, fmt.Sprintf("what TPROXY needs stays until cleanup: whether its connections have ended cannot be found out: %v", err))
	case connections == 0:
		return 0
	default:
		p.Warnings = append(p.Warnings, fmt.Sprintf(
			"what TPROXY needs stays for its connections under way (%d tracked); init takes it away when they have ended, cleanup at once", connections))
	}
	return mark
}

// leftUnderWay is the mark for which an earlier init has left what connections under way needed.
func (p *Plan) leftUnderWay(s survey) uint32 {
	mark, goesOn := s.borrowing()
	if goesOn {
		return 0
	}
	return mark
}
