package ruleset

import (
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/pillion-proxy/pillion/internal/capture"
)

// Parse reads our three tables from any output of iptables-save. A rule that is not exactly one of ours is kept
// verbatim as a foreign rule; other tables and malformed lines are skipped. Rendering the result returns the same text
// except comments, counters and the order of tables. The counters that -c adds are kept with their rules.
func Parse(family Family, text string) Ruleset {
	rs := Ruleset{Family: family}
	var table TableName
	for line := range strings.Lines(text) {
		line = strings.TrimRight(line, "\r\n")
		switch {
		case strings.HasPrefix(line, "*"):
			table = TableName(line[1:])
		case !slices.Contains(TableNames, table):
		case strings.HasPrefix(line, ":"):
			rs.parseChain(table, line[1:])
		case strings.HasPrefix(line, "-A "), strings.HasPrefix(line, "["):
			rs.parseRule(table, line)
		}
	}
	return rs
}

// SplitCounters removes the "[packets:bytes] " that iptables-save -c puts in front of a rule.
func SplitCounters(line string) (Counters, string) {
	var counters Counters
	if inside, ok := strings.CutPrefix(line, "["); ok {
		if numbers, rule, found := strings.Cut(inside, "] "); found {
			packets, bytes, _ := strings.Cut(numbers, ":")
			counters.Packets, _ = strconv.ParseUint(packets, 10, 64)
			counters.Bytes, _ = strconv.ParseUint(bytes, 10, 64)
			return counters, rule
		}
	}
	return counters, line
}

// parseChain reads "NAME POLICY [packets:bytes]".
func (rs *Ruleset) parseChain(table TableName, line string) {
	fields := strings.Fields(line)
	if len(fields) < 2 || rs.Find(Place{table, fields[0]}) != nil {
		return
	}
	c := Chain{Name: fields[0]}
	if fields[1] != noPolicy {
		c.Policy = fields[1]
	}
	rs.AddChain(table, c)
}

func (rs *Ruleset) parseRule(table TableName, line string) {
	counters, line := SplitCounters(line)
	words := SplitWords(line)
	if len(words) < 2 || words[0] != "-A" {
		return
	}
	c := rs.Find(Place{table, words[1]})
	if c == nil {
		return
	}
	rule, ok := understand(words[2:])
	if !ok || rule.Line(c.Name) != line {
		rule = Rule{Foreign: line}
	}
	rule.Counters = counters
	c.Rules = append(c.Rules, rule)
}

// Interpret reads a line that begins with "-A CHAIN", in any spelling and order. ok is false if it has a match or a target
// that no rule of ours has.
func Interpret(line string) (rule Rule, ok bool) {
	words := SplitWords(line)
	return understand(words[min(2, len(words)):])
}

// understand reads the words of a rule after "-A CHAIN". It need not be strict, since the caller renders the result and
// compares.
func understand(words []string) (rule Rule, ok bool) {
	not, module := false, ""
	for len(words) > 0 {
		option := words[0]
		words = words[1:]
		switch option {
		case "!":
			not = true
			continue
		case "--save-mark":
			rule.Target = SaveMark{}
			continue
		case "--restore-mark":
			rule.Target = RestoreMark{}
			continue
		}
		if len(words) == 0 {
			return rule, false
		}
		value := words[0]
		words = words[1:]
		switch option {
		case "-m":
			module = value
		case "-j":
			rule.Target = readTarget(value)
		default:
			if !rule.readOption(module, option, value, not) {
				return rule, false
			}
		}
		not = false
	}
	return rule, rule.Target != nil
}

// readOption reads an option of a match module or a target, or of no module.
func (r *Rule) readOption(module, option, value string, not bool) (ok bool) {
	m := &r.Match
	ok = true
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
		m.Protocol = Protocol(value)
		ok = m.Protocol == TCP || m.Protocol == UDP
	case "--sport":
		m.SrcPorts, ok = readPorts(value)
	case "--dport":
		m.DstPorts, ok = readPorts(value)
		m.NotDstPorts = not
	case "--uid-owner":
		m.Owner, ok = readOwner(UID, value)
	case "--gid-owner":
		m.Owner, ok = readOwner(GID, value)
	case "--mark":
		if module == "connmark" {
			m.ConnMark, ok = readMark(value)
		} else {
			m.Mark, ok = readMark(value)
			m.NotMark = not
		}
	case "--ctstate":
		m.State = State(value)
		ok = m.State == Invalid || m.State == Established
	case "--comment":
		r.ID, ok = strings.CutPrefix(value, CommentPrefix)
	default:
		ok = r.readTargetOption(option, value)
	}
	return ok
}

// readTargetOption reads an option after the name of a target.
func (r *Rule) readTargetOption(option, value string) (ok bool) {
	var number uint64
	var err error
	switch option {
	case "--to-ports":
		ports, isPort := readPorts(value)
		r.Target = Redirect(ports.First)
		return isPort
	case "--set-xmark":
		mark, isMark := readMark(strings.TrimSuffix(value, wholeMark))
		if _, isConn := r.Target.(SetConnMark); isConn {
			r.Target = SetConnMark(mark)
		} else {
			r.Target = SetMark(mark)
		}
		return isMark
	case "--nfmask", "--ctmask": // constant; the comparison checks it
		return true
	case "--zone":
		number, err = strconv.ParseUint(value, 10, 16)
		r.Target = Zone(number)
		return err == nil
	}
	t, isTPROXY := r.Target.(ToSocket)
	switch {
	case !isTPROXY:
		return false
	case option == "--on-port":
		number, err = strconv.ParseUint(value, 10, 16)
		t.To = netip.AddrPortFrom(t.To.Addr(), uint16(number))
	case option == "--on-ip":
		var address netip.Addr
		address, err = netip.ParseAddr(value)
		t.To = netip.AddrPortFrom(address, t.To.Port())
	case option == "--tproxy-mark":
		mark, isMark := readMark(strings.TrimSuffix(value, wholeMark))
		t.Mark, ok = mark, isMark
		r.Target = t
		return ok
	default:
		return false
	}
	r.Target = t
	return err == nil
}

func readMark(text string) (uint32, bool) {
	mark, err := strconv.ParseUint(text, 0, 32)
	return uint32(mark), err == nil
}

func readPrefix(text string) (netip.Prefix, bool) {
	prefix, err := netip.ParsePrefix(text)
	return prefix, err == nil
}

func readPorts(text string) (capture.PortRange, bool) {
	if strings.Trim(text, "0123456789:") != "" { // the kernel prints numbers only
		return capture.PortRange{}, false
	}
	list, err := capture.ParsePortList(text)
	if err != nil || len(list) != 1 {
		return capture.PortRange{}, false
	}
	return list[0], true
}

func readOwner(kind OwnerKind, text string) (Owner, bool) {
	list, err := capture.ParseIDs(text, func(string) (string, error) { return "", strconv.ErrSyntax })
	if err != nil || len(list) != 1 {
		return Owner{}, false
	}
	return Owner{kind, list[0]}, true
}

// readTarget returns the target of that name. Its options follow.
func readTarget(name string) Target {
	if strings.HasPrefix(name, OwnPrefix) {
		return Jump(name)
	}
	return map[string]Target{
		"RETURN": Return{}, "ACCEPT": Accept{}, "DROP": Drop{}, "REDIRECT": Redirect(0), "TPROXY": ToSocket{},
		"MARK": SetMark(0), "CONNMARK": SetConnMark(0), "CT": Zone(0),
	}[name]
}

// SplitWords splits a line of iptables-save at blanks. A quoted word may contain blanks; a backslash in it escapes the
// next byte.
func SplitWords(line string) []string {
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
