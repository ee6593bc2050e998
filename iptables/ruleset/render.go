package ruleset

import (
	"fmt"
	"net/netip"
	"strings"
)

const (
	CommentPrefix = "pillion:"
	PolicyAccept  = "ACCEPT"
	PolicyDrop    = "DROP"
	noPolicy      = "-" // how iptables-save prints the policy of a user-defined chain
)

// String returns the ruleset as iptables-save prints it, without comments and counters.
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
			for _, line := range c.Lines() {
				text.WriteString(line + "\n")
			}
		}
		text.WriteString("COMMIT\n")
	}
	return text.String()
}

func (c Chain) Lines() []string {
	lines := make([]string, len(c.Rules))
	for i, r := range c.Rules {
		lines[i] = r.Line(c.Name)
	}
	return lines
}

// Line returns the rule in the kernel's own spelling and order (nft and legacy agree on it): addresses, interfaces,
// protocol, the match modules in the order in which they were written, and the target. Comments are quoted because they
// contain a colon.
func (r Rule) Line(chain string) string {
	if r.Foreign != "" {
		return r.Foreign
	}
	words := append([]string{"-A", chain}, r.Match.words()...)
	if r.ID != "" {
		words = append(words, "-m", "comment", "--comment", `"`+CommentPrefix+r.ID+`"`)
	}
	return strings.Join(append(words, "-j", r.Target.Render()), " ")
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
		add(false, "-s", Spell(m.Src))
	}
	if m.Dst.IsValid() {
		add(m.NotDst, "-d", Spell(m.Dst))
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

func (Return) Render() string { return "RETURN" }

func (Accept) Render() string { return "ACCEPT" }

func (Drop) Render() string { return "DROP" }

func (t Jump) Render() string { return string(t) }

func (t Redirect) Render() string { return fmt.Sprintf("REDIRECT --to-ports %d", uint16(t)) }

func (t ToSocket) Render() string {
	return fmt.Sprintf("TPROXY --on-port %d --on-ip %s --tproxy-mark %#x%s", t.To.Port(), t.To.Addr(), t.Mark, wholeMark)
}

func (t SetMark) Render() string { return fmt.Sprintf("MARK --set-xmark %#x%s", uint32(t), wholeMark) }

func (t SetConnMark) Render() string {
	return fmt.Sprintf("CONNMARK --set-xmark %#x%s", uint32(t), wholeMark)
}

func (SaveMark) Render() string { return "CONNMARK --save-mark" + bothMarks }

func (RestoreMark) Render() string { return "CONNMARK --restore-mark" + bothMarks }

func (t Zone) Render() string { return fmt.Sprintf("CT --zone %d", uint16(t)) }

// The masks that the kernel prints if all bits of a mark count.
const (
	wholeMark = "/0xffffffff"
	bothMarks = " --nfmask 0xffffffff --ctmask 0xffffffff"
)

// Spell writes a prefix like inet_ntop(3). Go differs only for the obsolete IPv4-compatible addresses such as
// ::192.0.2.1, whose last half inet_ntop writes as IPv4.
func Spell(prefix netip.Prefix) string {
	bytes := prefix.Addr().As16()
	compatible := netip.PrefixFrom(netip.IPv6Unspecified(), 96).Contains(prefix.Addr())
	if compatible && (bytes[12] != 0 || bytes[13] != 0) {
		return fmt.Sprintf("::%d.%d.%d.%d/%d", bytes[12], bytes[13], bytes[14], bytes[15], prefix.Bits())
	}
	return prefix.String()
}
