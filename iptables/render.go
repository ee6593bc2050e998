package iptables

import (
	"fmt"
	"net/netip"
	"strings"
)

const (
	commentPrefix = "pillion:"
	policyAccept  = "ACCEPT"
	policyDrop    = "DROP"
	noPolicy      = "-" // how iptables-save spells the policy of a chain that somebody made
)

// String is the ruleset as iptables-save prints it, without its comments and counters.
func (rs Ruleset) String() string {
	var text strings.Builder
	for _, t := range rs.Tables {
		fmt.Fprintf(&text, "*%s\n", t.Name)
		for _, c := range t.Chains {
			policy := c.Policy
			if policy == "" {
				policy = noPolicy
			}
			fmt.Fprintf(&text, ":%s %s [0:0]\n", c.Name, policy)
		}
		for _, c := range t.Chains {
			for _, line := range c.lines() {
				text.WriteString(line + "\n")
			}
		}
		text.WriteString("COMMIT\n")
	}
	return text.String()
}

func (c Chain) lines() []string {
	lines := make([]string, len(c.Rules))
	for i, r := range c.Rules {
		lines[i] = r.line(c.Name)
	}
	return lines
}

// line is the rule in the kernel's own spelling and order, for which nft and legacy agree: addresses, interfaces,
// protocol, then the match modules in the order in which they were written, then the target. Comments are quoted
// because they hold a colon.
func (r Rule) line(chain string) string {
	if r.Foreign != "" {
		return r.Foreign
	}
	words := append([]string{"-A", chain}, r.Match.words()...)
	if r.ID != "" {
		words = append(words, "-m", "comment", "--comment", `"`+commentPrefix+r.ID+`"`)
	}
	return strings.Join(append(words, "-j", r.Target.render()), " ")
}

func (m Match) words() []string {
	var words []string
	add := func(not bool, more ...string) {
		if not {
			words = append(words, "!")
		}
		words = append(words, more...)
	}
	if m.Src.IsValid() {
		add(false, "-s", spell(m.Src))
	}
	if m.Dst.IsValid() {
		add(m.NotDst, "-d", spell(m.Dst))
	}
	if m.In != "" {
		add(false, "-i", m.In)
	}
	if m.Out != "" {
		add(false, "-o", m.Out)
	}
	if m.Protocol != "" {
		add(false, "-p", string(m.Protocol))
	}
	if m.SrcPorts.First != 0 || m.DstPorts.First != 0 {
		add(false, "-m", string(m.Protocol))
	}
	if m.SrcPorts.First != 0 {
		add(false, "--sport", m.SrcPorts.String())
	}
	if m.DstPorts.First != 0 {
		add(m.NotDstPorts, "--dport", m.DstPorts.String())
	}
	if m.Owner.Kind != Anybody {
		add(false, "-m", "owner", fmt.Sprintf("--%s-owner", m.Owner.Kind), m.Owner.IDs.String())
	}
	if m.Mark != 0 {
		add(false, "-m", "mark")
		add(m.NotMark, "--mark", fmt.Sprintf("%#x", m.Mark))
	}
	if m.State != "" {
		add(false, "-m", "conntrack", "--ctstate", string(m.State))
	}
	if m.ConnMark != 0 {
		add(false, "-m", "connmark", "--mark", fmt.Sprintf("%#x", m.ConnMark))
	}
	return words
}

func (Return) render() string     { return "RETURN" }
func (Accept) render() string     { return "ACCEPT" }
func (Drop) render() string       { return "DROP" }
func (t Jump) render() string     { return string(t) }
func (t Redirect) render() string { return fmt.Sprintf("REDIRECT --to-ports %d", uint16(t)) }
func (t ToSocket) render() string {
	return fmt.Sprintf("TPROXY --on-port %d --on-ip %s --tproxy-mark %#x%s", t.To.Port(), t.To.Addr(), t.Mark, wholeMark)
}
func (t SetMark) render() string { return fmt.Sprintf("MARK --set-xmark %#x%s", uint32(t), wholeMark) }
func (t SetConnMark) render() string {
	return fmt.Sprintf("CONNMARK --set-xmark %#x%s", uint32(t), wholeMark)
}
func (SaveMark) render() string    { return "CONNMARK --save-mark" + bothMarks }
func (RestoreMark) render() string { return "CONNMARK --restore-mark" + bothMarks }
func (t Zone) render() string      { return fmt.Sprintf("CT --zone %d", uint16(t)) }

// The masks with which the kernel shows that all bits of a mark count.
const (
	wholeMark = "/0xffffffff"
	bothMarks = " --nfmask 0xffffffff --ctmask 0xffffffff"
)

// spell writes a prefix as inet_ntop(3) does. It differs from Go only in the long-dead IPv4-compatible addresses, such
// as ::192.0.2.1, whose last half it writes in the IPv4 way.
func spell(prefix netip.Prefix) string {
	bytes := prefix.Addr().As16()
	compatible := netip.PrefixFrom(netip.IPv6Unspecified(), 96).Contains(prefix.Addr())
	if compatible && (bytes[12] != 0 || bytes[13] != 0) {
		return fmt.Sprintf("::%d.%d.%d.%d/%d", bytes[12], bytes[13], bytes[14], bytes[15], prefix.Bits())
	}
	return prefix.String()
}
