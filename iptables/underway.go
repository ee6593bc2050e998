package iptables

import (
	"fmt"

	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/iptables/kernel"
)

// borrowing returns the mark by which the installed rules recognise what the agent sends from its clients' addresses,
// or 0, and whether TPROXY still captures new connections.
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

// underWay returns the mark of open connections that TPROXY has captured, or 0 if there are no such connections.
// Without its rules and routes, the workload's answers would bypass the agent, go to the client and be reset.
func (p *Plan) underWay(s survey) uint32 {
	mark, _ := s.borrowing()
	if mark == 0 {
		return 0
	}
	connections, err := kernel.CountTCP(mark, capture.LoopMark)
	switch {
	case err != nil:
		p.Warnings = append(p.Warnings, fmt.Sprintf("TPROXY rules and routes stay until cleanup: cannot count open connections: %v", err))
	case connections == 0:
		return 0
	default:
		p.Warnings = append(p.Warnings, fmt.Sprintf(
			"TPROXY rules and routes stay for open connections (%d tracked); init removes them when those have ended, cleanup at once", connections))
	}
	return mark
}

// leftUnderWay returns the mark for which an earlier init kept the rules of open connections, or 0.
func (p *Plan) leftUnderWay(s survey) uint32 {
	mark, goesOn := s.borrowing()
	if goesOn {
		return 0
	}
	return mark
}
