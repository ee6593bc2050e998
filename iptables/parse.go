package iptables

import (
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/pillion-proxy/pillion/internal/capture"
)

// Parse reads the nat table from what iptables-save printed. It takes anybody's output: a rule that is not one of ours
// to the letter is kept verbatim as a foreign one, tables other than nat and lines that make no sense are skipped.
// Rendering what Parse returned gives the same text back, but for comments and counters.
func Parse(family Family, text string) Ruleset {
	rs := Ruleset{Family: family}
	inNat := true
	for line := range strings.Lines(text) {
		line = withoutCounters(strings.TrimRight(line, "\r\n"))
		switch {
		case strings.HasPrefix(line, "*"):
			inNat = line == "*nat"
		case !inNat:
		case strings.HasPrefix(line, ":"):
			rs.parseChain(line[1:])
		case strings.HasPrefix(line, "-A "):
			rs.parseRule(line)
		}
	}
	return rs
}

// withoutCounters takes away the "[packets:bytes] " that iptables-save -c puts in front of a rule.
func withoutCounters(line string) string {
	if strings.HasPrefix(line, "[") {
		if _, rule, found := strings.Cut(line, "] "); found {
			return rule
		}
	}
	return line
}

// parseChain reads "NAME POLICY [packets:bytes]".
func (rs *Ruleset) parseChain(line string) {
	fields := strings.Fields(line)
	if len(fields) < 2 || rs.find(fields[0]) != nil {
		return
	}
	c := Chain{Name: fields[0]}
	if fields[1] != noPolicy {
		c.Policy = fields[1]
	}
	rs.Chains = append(rs.Chains, c)
}

func (rs *Ruleset) parseRule(line string) {
	words := splitWords(line)
	if len(words) < 2 {
		return
	}
	c := rs.find(words[1])
	if c == nil {
		return
	}
	rule, ok := understand(words[2:])
	if !ok || rule.line(c.Name) != line {
		rule = Rule{Foreign: line}
	}
	c.Rules = append(c.Rules, rule)
}

func (rs *Ruleset) find(chain string) *Chain {
	i := slices.IndexFunc(rs.Chains, func(c Chain) bool { return c.Name == chain })
	if i < 0 {
		return nil
	}
	return &rs.Chains[i]
}

// understand reads the words of a rule behind "-A CHAIN". It need not be strict: the caller compares the rendered rule
// with what was read.
func understand(words []string) (rule Rule, ok bool) {
	m := &rule.Match
	not := false
	for len(words) > 0 {
		if words[0] == "!" {
			not, words = true, words[1:]
			continue
		}
		if len(words) < 2 {
			return rule, false
		}
		option, value := words[0], words[1]
		words = words[2:]
		ok := true
		switch option {
		case "-s":
			m.Src, ok = readPrefix(value)
		case "-d":
			m.Dst, ok = readPrefix(value)
			m.NotDst = not
		case "-i":
			m.In = value
		case "-o":
			m.Out = value
		case "-p":
			m.TCP = value == "tcp"
		case "-m":
		case "--dport":
			m.DstPorts, ok = readPorts(value)
			m.NotDstPorts = not
		case "--uid-owner":
			m.Owner, ok = readOwner(UID, value)
		case "--gid-owner":
			m.Owner, ok = readOwner(GID, value)
		case "--comment":
			rule.ID, ok = strings.CutPrefix(value, commentPrefix)
		case "-j":
			rule.Target = readTarget(value)
			ok = rule.Target != nil
		case "--to-ports":
			ports, isPort := readPorts(value)
			rule.Target, ok = Redirect(ports.First), isPort
		default:
			ok = false
		}
		if !ok {
			return rule, false
		}
		not = false
	}
	return rule, rule.Target != nil
}

func readPrefix(text string) (netip.Prefix, bool) {
	prefix, err := netip.ParsePrefix(text)
	return prefix, err == nil
}

func readPorts(text string) (capture.PortRange, bool) {
	list, err := capture.ParsePortList(text)
	if err != nil || len(list) != 1 {
		return capture.PortRange{}, false
	}
	return list[0], true
}

func readOwner(kind OwnerKind, text string) (Owner, bool) {
	id, err := strconv.ParseUint(text, 10, 32)
	return Owner{kind, uint32(id)}, err == nil
}

// readTarget knows the targets that our rules have; where REDIRECT goes stands in the option behind it.
func readTarget(name string) Target {
	switch {
	case name == "RETURN":
		return Return{}
	case name == "REDIRECT":
		return Redirect(0)
	case strings.HasPrefix(name, ownPrefix):
		return Jump(name)
	}
	return nil
}

// splitWords splits a line of iptables-save at blanks. A quoted word may hold blanks, and a backslash takes the next
// letter as it is.
func splitWords(line string) []string {
	var words []string
	var word strings.Builder
	quoted, escaped, open := false, false, false
	for _, letter := range []byte(line) {
		switch {
		case escaped:
			word.WriteByte(letter)
			escaped = false
		case letter == '\\' && quoted:
			escaped = true
		case letter == '"':
			quoted, open = !quoted, true
		case letter == ' ' && !quoted:
			if open {
				words = append(words, word.String())
			}
			word.Reset()
			open = false
		default:
			word.WriteByte(letter)
			open = true
		}
	}
	if open {
		words = append(words, word.String())
	}
	return words
}
