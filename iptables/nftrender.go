package iptables

import (
	"fmt"
	"net/netip"
	"strings"
)

// nftScript is what nft would be given to make our table with these rules, atomically, whatever is there. It is spelled as
// nft itself lists a table, but for the numbers of counters.
func nftScript(wanted [2]Ruleset) string {
	text := fmt.Sprintf("table inet %s\ndelete table inet %s\n", nftTable, nftTable)
	if len(nftWantedChains(wanted)) == 0 {
		return text
	}
	return text + nftListing(wanted)
}

func nftListing(wanted [2]Ruleset) string {
	lines := make(map[string][]string)
	for _, rs := range wanted {
		for at, r := range rs.All() {
			if r.Foreign == "" {
				name := nftChainName(rs.Family, at)
				lines[name] = append(lines[name], r.nftLines(rs.Family, at)...)
			}
		}
	}
	var chains []string
	for _, c := range nftWantedChains(wanted) {
		text := fmt.Sprintf("\tchain %s {\n", c.name)
		if c.base {
			text += fmt.Sprintf("\t\ttype %s hook %s priority %s; policy accept;\n", c.hook.kind, strings.ToLower(c.place().Chain), c.priority())
		}
		for _, line := range lines[c.name] {
			text += "\t\t" + line + "\n"
		}
		chains = append(chains, text+"\t}\n")
	}
	return fmt.Sprintf("table inet %s {\n%s}\n", nftTable, strings.Join(chains, "\n"))
}

func (c nftChain) place() Place {
	_, at, _ := nftPlace(c.name)
	return at
}

// priority is the name of a priority, where nft has one for the hook.
func (c nftChain) priority() string {
	switch at := c.place(); {
	case at.Table != NAT:
		return string(at.Table)
	case at.Chain == chainPrerouting:
		return "dstnat"
	}
	return fmt.Sprint(c.hook.priority)
}

// nftLines is the rule as encode makes it.
func (r Rule) nftLines(family Family, at Place) []string {
	line := func(target string) string {
		words := append(r.Match.nftWords(family, strings.HasPrefix(at.Chain, ownPrefix)), "counter", target)
		return strings.Join(words, " ") + fmt.Sprintf(` comment "%s%s"`, commentPrefix, r.ID)
	}
	lines := []string{line(nftTarget(family, at.Table, r.Target))}
	if _, tproxy := r.Target.(ToSocket); tproxy {
		lines = append(lines, line("drop"))
	}
	return lines
}

func (m Match) nftWords(family Family, own bool) []string {
	var words []string
	add := func(key string, not bool, value string) {
		if not {
			key += " !="
		}
		words = append(words, key, value)
	}
	header := map[Family]string{IPv4: "ip", IPv6: "ip6"}[family]
	if !own && !m.Src.IsValid() && !m.Dst.IsValid() {
		add("meta nfproto", false, family.String())
	}
	if m.Src.IsValid() {
		add(header+" saddr", false, nftNetwork(m.Src))
	}
	if m.Dst.IsValid() {
		add(header+" daddr", m.NotDst, nftNetwork(m.Dst))
	}
	if m.In != "" {
		add("iifname", false, nftInterface(m.In))
	}
	if m.Out != "" {
		add("oifname", false, nftInterface(m.Out))
	}
	if m.Protocol != "" && m.SrcPorts.First == 0 && m.DstPorts.First == 0 {
		add("meta l4proto", false, string(m.Protocol))
	}
	if m.SrcPorts.First != 0 {
		add(string(m.Protocol)+" sport", false, nftRange(m.SrcPorts))
	}
	if m.DstPorts.First != 0 {
		add(string(m.Protocol)+" dport", m.NotDstPorts, nftRange(m.DstPorts))
	}
	if m.Owner.Kind != Anybody {
		add("meta sk"+string(m.Owner.Kind), false, nftRange(m.Owner.IDs))
	}
	if m.Mark != 0 {
		add("meta mark", m.NotMark, nftMark(m.Mark))
	}
	if m.State != "" {
		add("ct state", false, map[State]string{Invalid: "invalid", Established: "established,related"}[m.State])
	}
	if m.ConnMark != 0 {
		add("ct mark", false, nftMark(m.ConnMark))
	}
	return words
}

func nftTarget(family Family, table TableName, target Target) string {
	switch target := target.(type) {
	case Jump:
		return "jump " + nftChainName(family, Place{table, string(target)})
	case Redirect:
		return fmt.Sprintf("redirect to :%d", uint16(target))
	case ToSocket:
		return fmt.Sprintf("tproxy %s to :%d meta mark set %s accept", map[Family]string{IPv4: "ip", IPv6: "ip6"}[family], target.To.Port(), nftMark(target.Mark))
	case SetMark:
		return "meta mark set " + nftMark(uint32(target))
	case SetConnMark:
		return "ct mark set " + nftMark(uint32(target))
	case SaveMark:
		return "ct mark set meta mark"
	case RestoreMark:
		return "meta mark set ct mark"
	case Zone:
		return fmt.Sprintf("ct zone set %d", uint16(target))
	}
	return strings.ToLower(target.render()) // verdicts
}

func nftMark(mark uint32) string { return fmt.Sprintf("0x%08x", mark) }

// nftRange spells a range of ports or of users with a dash.
func nftRange(numbers fmt.Stringer) string { return strings.ReplaceAll(numbers.String(), ":", "-") }

func nftNetwork(prefix netip.Prefix) string {
	if prefix.IsSingleIP() {
		return strings.TrimSuffix(spell(prefix), fmt.Sprintf("/%d", prefix.Bits()))
	}
	return spell(prefix)
}

func nftInterface(name string) string {
	if stem, wildcard := strings.CutSuffix(name, "+"); wildcard {
		name = stem + "*"
	}
	return `"` + name + `"`
}
