package egress

import (
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"github.com/pillion-proxy/pillion/internal/capture"
)

// Rule selects destinations: a host by its name, or a network.
type Rule struct {
	host   string       // in lower case; below it if wild; "" with wild: every host
	wild   bool         // all names below host, but not host itself
	prefix netip.Prefix // valid: a network, and host is empty
	port   uint16       // 0: every port
}

// ParseRule parses HOST, ADDRESS or NETWORK, with an optional port: example.com, *.example.com:443, *, 203.0.113.0/24,
// 203.0.113.7:5432, 2001:db8::/32, [2001:db8::7]:443. IPv6 with a port needs brackets.
func ParseRule(text string) (Rule, error) {
	r, err := parseRule(strings.TrimSpace(text))
	if err != nil {
		return Rule{}, fmt.Errorf("%s: %w", capture.Quoted(text), err)
	}
	return r, nil
}

func parseRule(text string) (r Rule, err error) {
	if prefix, err := parseNetwork(text); err == nil {
		return Rule{prefix: prefix}, nil
	}
	if strings.Contains(text, "://") {
		return Rule{}, errors.New("a URL; write its host, such as example.com or example.com:443")
	}
	host, port, found := cutPort(text)
	if found {
		if r.port, err = capture.ParsePort(port); err != nil {
			return Rule{}, err
		}
	}
	if r.prefix, err = parseNetwork(strings.TrimSuffix(strings.TrimPrefix(host, "["), "]")); err == nil {
		return r, nil
	}
	r.prefix = netip.Prefix{}
	if host == "*" {
		r.wild = true
		return r, nil
	}
	r.host, r.wild = strings.CutPrefix(host, "*.")
	r.host = normal(r.host)
	return r, validHost(r.host)
}

// cutPort cuts ":PORT" off. An IPv6 address without brackets has none.
func cutPort(text string) (host, port string, found bool) {
	i := strings.LastIndexByte(text, ':')
	if i < 0 || strings.HasPrefix(text, "[") && !strings.HasSuffix(text[:i], "]") || !strings.HasPrefix(text, "[") && strings.Count(text, ":") > 1 {
		return text, "", false
	}
	return text[:i], text[i+1:], true
}

// parseNetwork parses an address or a network. Bits behind the length of a network must be zero, because a rule that means
// one address would otherwise select a whole network.
func parseNetwork(text string) (netip.Prefix, error) {
	if address, err := netip.ParseAddr(text); err == nil && address.Zone() == "" {
		address = address.Unmap()
		return netip.PrefixFrom(address, address.BitLen()), nil
	}
	prefix, err := netip.ParsePrefix(text)
	if err != nil {
		return prefix, err
	}
	if prefix != prefix.Masked() {
		return prefix, errors.New("bits are set behind the length of the network")
	}
	return prefix, nil
}

var errHost = errors.New("neither a host, such as example.com or *.example.com, nor an address or a network, such as 203.0.113.0/24; " +
	"a port may follow, as in example.com:443")

// validHost accepts the letters of host names in ASCII, and underscores.
func validHost(host string) error {
	if host == "" || len(host) > 253 || strings.Trim(host, "abcdefghijklmnopqrstuvwxyz0123456789-._") != "" {
		return errHost
	}
	for label := range strings.SplitSeq(host, ".") {
		if label == "" || len(label) > 63 {
			return errHost
		}
	}
	last := host[strings.LastIndexByte(host, '.')+1:]
	if strings.Trim(last, "0123456789") == "" { // such as 203.0.113 or 10.0.0.300
		return errHost
	}
	return nil
}

// normal is a name as rules and answers have it.
func normal(name string) string { return strings.ToLower(strings.TrimSuffix(name, ".")) }

// String returns the rule as ParseRule reads it.
func (r Rule) String() string {
	text := r.host
	switch {
	case r.prefix.IsValid() && r.prefix.IsSingleIP():
		text = r.prefix.Addr().String()
	case r.prefix.IsValid():
		text = r.prefix.String()
	case r.wild:
		text = strings.TrimSuffix("*."+r.host, ".")
	}
	if r.port == 0 {
		return text
	}
	if r.prefix.IsValid() && r.prefix.Addr().Is6() {
		text = "[" + text + "]"
	}
	return fmt.Sprintf("%s:%d", text, r.port)
}

func (r *Rule) ofHost() bool { return !r.prefix.IsValid() }

// exact reports whether the rule is for one host, whose addresses can be looked up.
func (r *Rule) exact() bool { return r.ofHost() && !r.wild }

func (r *Rule) hasPort(port uint16) bool { return r.port == 0 || r.port == port }

// matchesName reports whether a rule of a host is for a name, which is normal.
func (r *Rule) matchesName(name string) bool {
	switch {
	case !r.ofHost():
		return false
	case !r.wild:
		return name == r.host
	case r.host == "":
		return true
	}
	below, found := strings.CutSuffix(name, r.host)
	return found && len(below) > 1 && below[len(below)-1] == '.'
}

func (r *Rule) matchesAddress(address netip.Addr) bool {
	return r.prefix.IsValid() && r.prefix.Contains(address)
}

// Selects reports whether the rule is for a host or an address, as in an authority. A rule with a port is for that port only,
// if the authority has one.
func (r *Rule) Selects(authority string) bool {
	host := hostOf(authority)
	if _, port, found := cutPort(authority); found && r.port != 0 && port != strconv.Itoa(int(r.port)) {
		return false
	}
	address, err := netip.ParseAddr(host)
	return r.matchesName(host) || err == nil && r.matchesAddress(address.Unmap())
}
