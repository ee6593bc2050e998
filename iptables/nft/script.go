package nft

import (
	"fmt"
	"net/netip"
	"strings"

	"github.com/pillion-proxy/pillion/iptables/ruleset"
)

// Script returns an nft script that replaces our table with these rules, atomically and whatever the table holds. Its
// spelling is that of nft list, except for the values of counters.
func Script(wanted [2]ruleset.Ruleset) string {
	text := fmt.Sprintf("table inet %s\ndelete table inet %s\n", TableName, TableName)
	if len(wantedChains(wanted)) == 0 {
		return text
	}
	return text + listing(wanted)
}

func listing(wanted [2]ruleset.Ruleset) string {
	lines := make(map[string][]string)
	for _, rs := range wanted {
		for at, r := range rs.All() {
			if r.Foreign == "" {
				name := chainName(rs.Family, at)
				lines[name] = append(lines[name], ruleLines(r, rs.Family, at)...)
			}
		}
	}
	var chains []string
	for _, c := range wantedChains(wanted) {
		text := fmt.Sprintf("\tchain %s {\n", c.Name)
		if c.base {
			text += fmt.Sprintf("\t\ttype %s hook %s priority %s; policy accept;\n", c.hook.kind, strings.ToLower(c.place().Chain), c.priority())
		}
		for _, line := range lines[c.Name] {
			text += "\t\t" + line + "\n"
		}
		chains = append(chains, text+"\t}\n")
	}
	return fmt.Sprintf("table inet %s {\n%s}\n", TableName, strings.Join(chains, "\n"))
}

func (c Chain) place() ruleset.Place {
	_, at, _ := placeOf(c.Name)
	return at
}

// priority returns the name of the priority, if nft has one for the hook.
func (c Chain) priority() string {
	switch at := c.place(); {
	case at.Table != ruleset.NAT:
		return string(at.Table)
	case at.Chain == ruleset.ChainPrerouting:
		return "dstnat"
	}
	return fmt.Sprint(c.hook.priority)
}

// ruleLines returns the lines for the rules that encode makes.
func ruleLines(r ruleset.Rule, family ruleset.Family, at ruleset.Place) []string {
	line := func(target string) string {
		words := append(matchWords(r.Match, family, strings.HasPrefix(at.Chain, ruleset.OwnPrefix)), "counter", target)
		return strings.Join(words, " ") + fmt.Sprintf(` comment "%s%s"`, ruleset.CommentPrefix, r.ID)
	}
	lines := []string{line(targetWords(family, at.Table, r.Target))}
	if _, tproxy := r.Target.(ruleset.ToSocket); tproxy {
		lines = append(lines, line("drop"))
	}
	return lines
}

func matchWords(m ruleset.Match, family ruleset.Family, own bool) []string {
	var words []string
	add := func(key string, not bool, value string) {
		if not {
			key += " !="
		}
		words = append(words, key, value)
	}
	header := map[ruleset.Family]string{ruleset.IPv4: "ip", ruleset.IPv6: "ip6"}[family]
	if !own && !m.Src.IsValid() && !m.Dst.IsValid() {
		add("meta nfproto", false, family.String())
	}
	if m.Src.IsValid() {
		add(header+" saddr", false, networkWord(m.Src))
	}
	if m.Dst.IsValid() {
		add(header+" daddr", m.NotDst, networkWord(m.Dst))
	}
	if m.In != "" {
		add("iifname", false, interfaceWord(m.In))
	}
	if m.Out != "" {
		add("oifname", false, interfaceWord(m.Out))
	}
	if m.Protocol != "" && m.SrcPorts.First == 0 && m.DstPorts.First == 0 {
		add("meta l4proto", false, string(m.Protocol))
	}
	if m.SrcPorts.First != 0 {
		add(string(m.Protocol)+" sport", false, rangeWord(m.SrcPorts))
	}
	if m.DstPorts.First != 0 {
		add(string(m.Protocol)+" dport", m.NotDstPorts, rangeWord(m.DstPorts))
	}
	if m.Owner.Kind != ruleset.Anybody {
		add("meta sk"+string(m.Owner.Kind), false, rangeWord(m.Owner.IDs))
	}
	if m.Mark != 0 {
		add("meta mark", m.NotMark, markWord(m.Mark))
	}
	if m.State != "" {
		add("ct state", false, map[ruleset.State]string{ruleset.Invalid: "invalid", ruleset.Established: "established,related"}[m.State])
	}
	if m.ConnMark != 0 {
		add("ct mark", false, markWord(m.ConnMark))
	}
	return words
}

func targetWords(family ruleset.Family, table ruleset.TableName, target ruleset.Target) string {
	switch target := target.(type) {
	case ruleset.Jump:
		return "jump " + chainName(family, ruleset.Place{Table: table, Chain: string(target)})
	case ruleset.Redirect:
		return fmt.Sprintf("redirect to :%d", uint16(target))
	case ruleset.ToSocket:
		return fmt.Sprintf("tproxy %s to :%d meta mark set %s accept", map[ruleset.Family]string{ruleset.IPv4: "ip", ruleset.IPv6: "ip6"}[family], target.To.Port(), markWord(target.Mark))
	case ruleset.SetMark:
		return "meta mark set " + markWord(uint32(target))
	case ruleset.SetConnMark:
		return "ct mark set " + markWord(uint32(target))
	case ruleset.SaveMark:
		return "ct mark set meta mark"
	case ruleset.RestoreMark:
		return "meta mark set ct mark"
	case ruleset.Zone:
		return fmt.Sprintf("ct zone set %d", uint16(target))
	}
	return strings.ToLower(target.Render()) // a verdict
}

func markWord(mark uint32) string { return fmt.Sprintf("0x%08x", mark) }

// rangeWord writes a range with a dash.
func rangeWord(numbers fmt.Stringer) string { return strings.ReplaceAll(numbers.String(), ":", "-") }

func networkWord(prefix netip.Prefix) string {
	if prefix.IsSingleIP() {
		return strings.TrimSuffix(ruleset.Spell(prefix), fmt.Sprintf("/%d", prefix.Bits()))
	}
	return ruleset.Spell(prefix)
}

func interfaceWord(name string) string {
	if stem, wildcard := strings.CutSuffix(name, "+"); wildcard {
		name = stem + "*"
	}
	return `"` + name + `"`
}
