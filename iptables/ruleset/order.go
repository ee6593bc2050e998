package ruleset

import (
	"slices"
	"strings"
)

// Ahead returns the first rule of a chain that precedes the wanted jump to our chain, may decide about one of its Before
// packets, and is not ours. Without the jump in the chain, every foreign rule precedes it.
func (c Chain) Ahead(jump Rule) (Rule, bool) {
	for _, r := range c.Rules {
		if r.JumpsToOwn() {
			if r.Line(c.Name) == jump.Line(c.Name) {
				break
			}
			continue
		}
		line := r.Line(c.Name)
		if !r.Continues(c.Name) && slices.ContainsFunc(jump.Before, func(m Match) bool { return mayMatch(line, m) }) {
			return r, true
		}
	}
	return Rule{}, false
}

// Continues reports whether a matching packet is always tried against the next rule: the rule has no target,
// or one such as MARK or LOG.
func (r Rule) Continues(chain string) bool {
	target := r.target(chain)
	return target == "" || slices.Contains(continuing, target)
}

// target returns the word after -j or -g.
func (r Rule) target(chain string) string {
	words := SplitWords(r.Line(chain))
	at := slices.IndexFunc(words, func(word string) bool { return word == "-j" || word == "-g" })
	if at < 0 || at == len(words)-1 {
		return ""
	}
	return words[at+1]
}

// TargetName returns the name of the rule's target, or "" if it has no target.
func (r Rule) TargetName() string { return r.target("") }

// continuing are the targets of iptables after which the next rule is tried.
var continuing = []string{
	"MARK", "CONNMARK", "CT", "NOTRACK", "LOG", "NFLOG", "ULOG", "TRACE", "CLASSIFY", "DSCP", "TOS", "TTL", "HL", "ECN",
	"SECMARK", "CONNSECMARK", "SET", "TEE", "AUDIT", "CHECKSUM", "TCPMSS", "TCPOPTSTRIP", "IDLETIMER", "LED", "RATEEST",
}

// mayMatch reports whether a packet can match both m and a rule of iptables. It considers protocol, destination address and
// destination port, and takes every other match for fulfilled.
func mayMatch(line string, m Match) bool {
	words := SplitWords(line)
	not := false
	for i, word := range words[:max(len(words)-1, 0)] {
		value := words[i+1]
		switch word {
		case "!":
			not = true
			continue
		case "-p":
			if (value == string(m.Protocol)) == not && value != "all" {
				return false
			}
		case "-d":
			if prefix, ok := readPrefix(value); ok && m.Dst.IsValid() && prefix.Overlaps(m.Dst) == not {
				return false
			}
		case "--dport":
			if ports, ok := readPorts(value); ok && ports.Contains(m.DstPorts.First) == not {
				return false
			}
		}
		not = false
	}
	return strings.HasPrefix(line, "-A ")
}
