package trace

import (
	"cmp"
	"fmt"
	"strings"

	"github.com/pillion-proxy/pillion/iptables/ruleset"
)

// String describes the packet.
func (p Packet) String() string {
	words := []string{string(cmp.Or(p.Protocol, ruleset.TCP)), "to", p.Dst.String()}
	if p.Src.IsValid() {
		words = append(words, "from", p.Src.String())
	}
	if p.In != "" {
		words = append(words, "coming in on", p.In)
	} else {
		words = append(words, fmt.Sprintf("going out on %s, sent by user %d, group %d", p.Out, p.UID, p.GID))
	}
	if p.Mark != 0 {
		words = append(words, fmt.Sprintf("with mark %#x", p.Mark))
	}
	switch p.State {
	case ruleset.Invalid:
		words = append(words, "in state INVALID")
	case ruleset.Established:
		words = append(words, "of an established connection")
	}
	return strings.Join(words, " ")
}

// InWords returns the verdict and the reason for it.
func (w Walk) InWords(p Packet) string {
	var last, spared ruleset.Rule
	for _, m := range w.Met {
		if m.Unknown() {
			continue
		}
		last = m.Rule
		switch last.Target.(type) {
		case ruleset.Return, ruleset.Accept:
			if m.Table != ruleset.Raw {
				spared = last
			}
		}
	}
	switch w.Verdict.Action {
	case Dropped:
		if _, byRule := last.Target.(ruleset.Drop); byRule {
			return "dropped: " + because(last)
		}
		return "dropped: by the policy of a built-in chain"
	case Given:
		return fmt.Sprintf("captured: goes unchanged to the agent's inbound port %d", w.Verdict.Port)
	case Redirected:
		for _, m := range w.Met { // later rules on the loopback do not change it
			if _, ok := m.Rule.Target.(ruleset.Redirect); ok {
				last = m.Rule
			}
		}
		direction, _, _ := strings.Cut(last.ID, "/")
		switch direction {
		case "inbound", "outbound":
			return fmt.Sprintf("captured: goes to the agent's %s port %d", direction, w.Verdict.Port)
		case "dns":
			return fmt.Sprintf("captured: goes to the agent's DNS port %d", w.Verdict.Port)
		}
		return fmt.Sprintf("redirected to port %d by a rule that is not ours", w.Verdict.Port)
	}
	switch {
	case spared.Target == ruleset.Accept{} && spared.ID == "inbound/divert":
		return "captured: the agent has its connection"
	case spared.Target != nil:
		return "not captured: " + because(spared)
	case p.State == ruleset.Established:
		return "not captured by itself: the first packet of a connection decides about address translation, and the others follow"
	}
	return "not captured: no rule matches"
}

func because(r ruleset.Rule) string {
	switch {
	case r.Why != "":
		return r.Why
	case r.ID != "":
		return "by " + r.ID
	}
	return "by a rule that is not ours"
}
