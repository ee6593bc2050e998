package mesh

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sort"
	"strings"

	"github.com/pillion-proxy/pillion/internal/wire"
)

// ChainMatch is which connections a FilterChain is for. An empty list and a zero value match all.
type ChainMatch struct {
	Port          uint16 // of the destination
	Destinations  []netip.Prefix
	ServerNames   []string // in lower case; "*.example.com" stands for all names below example.com
	Transport     string   // "tls" or "raw_buffer"
	Protocols     []string // of ALPN, or as http_inspector detects them
	DirectSources []netip.Prefix
	SourceType    SourceType
	Sources       []netip.Prefix
	SourcePorts   []uint16
}

// SourceType is where a connection comes from.
type SourceType uint8

// The types, with Envoy's numbers.
const (
	AnySource      SourceType = iota
	LocalSource               // from the destination's address or the loopback interface
	ExternalSource            // not LocalSource
)

var chainMatchFields = message{"envoy.config.listener.v3.FilterChainMatch", Security, []field{
	3:  {"prefix_ranges", decoded},
	4:  {"address_suffix", security},
	5:  {"suffix_len", security},
	6:  {"source_prefix_ranges", decoded},
	7:  {"source_ports", decoded},
	8:  {"destination_port", once},
	9:  {"transport_protocol", decoded},
	10: {"application_protocols", decoded},
	11: {"server_names", decoded},
	12: {"source_type", decoded},
	13: {"direct_source_prefix_ranges", decoded},
}}

func (d *decoder) chainMatch(m wire.Message, match *ChainMatch) {
	for d.next(&m, &chainMatchFields) {
		switch m.Number {
		case 3:
			d.cidrRange(m.Message(), &match.Destinations)
		case 6:
			d.cidrRange(m.Message(), &match.Sources)
		case 7:
			for port := range m.Varints() {
				match.SourcePorts = append(match.SourcePorts, d.port(uint32(port)))
			}
		case 8:
			match.Port = d.port(d.uint32Value(m.Message()))
		case 9:
			match.Transport = m.String()
		case 10:
			match.Protocols = append(match.Protocols, m.String())
		case 11:
			name := lower(m.String())
			if strings.Contains(strings.TrimPrefix(name, "*."), "*") {
				d.report(Security, "a wildcard other than a leading *. is not supported")
			}
			match.ServerNames = append(match.ServerNames, name)
		case 12:
			match.SourceType = SourceType(d.enum(&m, uint64(ExternalSource)))
		case 13:
			d.cidrRange(m.Message(), &match.DirectSources)
		}
	}
}

// port returns a port to match. 0 would match all ports, so it is reported, as is a number that is not a port.
func (d *decoder) port(number uint32) uint16 {
	if number == 0 || number > 65535 {
		d.report(Security, "not a port")
		return 0
	}
	return uint16(number)
}

var cidrFields = message{"envoy.config.core.v3.CidrRange", Security, []field{1: {"address_prefix", decoded}, 2: {"prefix_len", once}}}

// cidrRange adds a range of addresses to ranges.
func (d *decoder) cidrRange(m wire.Message, ranges *[]netip.Prefix) {
	var text string
	var bits uint32
	for d.next(&m, &cidrFields) {
		switch m.Number {
		case 1:
			text = m.String()
		case 2:
			bits = d.uint32Value(m.Message())
		}
	}
	address, err := netip.ParseAddr(text)
	if err != nil || address.Zone() != "" || address.Is4In6() || bits > uint32(address.BitLen()) {
		d.report(Security, "not a range of addresses")
		return
	}
	*ranges = append(*ranges, netip.PrefixFrom(address, int(bits)).Masked())
}

// lower returns s with ASCII letters in lower case. It does not allocate if that is s.
func lower(s string) string {
	for i := range len(s) {
		if 'A' <= s[i] && s[i] <= 'Z' {
			b := []byte(s)
			for j, c := range b {
				if 'A' <= c && c <= 'Z' {
					b[j] = c + 'a' - 'A'
				}
			}
			return string(b)
		}
	}
	return s
}

// ConnInfo is what a filter chain is chosen by.
type ConnInfo struct {
	Destination  netip.AddrPort // original
	Source       netip.AddrPort // the client, also behind a proxy that sent a PROXY header
	DirectSource netip.Addr     // the peer of the TCP connection

	TLS        bool     // the connection was inspected and begins with a ClientHello
	ServerName string   // in the ClientHello
	Protocols  []string // that the ClientHello offers, in its order; or what http_inspector detected: "http/1.0", "http/1.1", "h2c"
}

const (
	tlsTransport   = "tls"
	plainTransport = "raw_buffer"
)

// Index prepares Match after Chains were set. The listeners of a Compiler are ready. An error means that two chains have the
// same match.
func (l *Listener) Index() error {
	l.index = nil
	if len(l.Chains) == 0 || l.alone() != nil {
		return nil
	}
	l.index = &chainIndex{}
	return l.index.build(l.Chains)
}

// alone returns the only chain, if it matches all connections. Such a listener has no index.
func (l *Listener) alone() *FilterChain {
	if len(l.Chains) == 1 && l.Chains[0].Match.all() {
		return l.Chains[0]
	}
	return nil
}

// all reports whether m matches all connections.
func (m *ChainMatch) all() bool {
	return m.Port == 0 && m.Transport == "" && m.SourceType == AnySource && len(m.Destinations)+len(m.ServerNames)+
		len(m.Protocols)+len(m.DirectSources)+len(m.Sources)+len(m.SourcePorts) == 0
}

// Match returns the filter chain of a connection. Without a chain it returns false, and the connection must be closed. The
// chain may be Refused.
//
// The criteria are compared in the order of rule's fields. Each step keeps the chains with the most specific value that
// fits the connection. It does not go back to a less specific value if a later step finds no chain.
func (l *Listener) Match(c *ConnInfo) (*FilterChain, bool) {
	if l.Refused {
		return nil, false
	}
	if chain := l.alone(); chain != nil {
		return chain, true
	}
	if l.index != nil {
		if chain := l.index.match(c); chain != nil {
			return chain, true
		}
	}
	return l.Default, l.Default != nil
}

// rule is one combination of values for which a chain is chosen. A zero value matches all.
type rule struct {
	port         uint16
	destination  netip.Prefix
	serverName   string // "example.com", or ".example.com" for all names below it
	transport    string
	protocol     string
	directSource netip.Prefix
	sourceType   SourceType
	source       netip.Prefix
	sourcePort   uint16

	chain int // index in Listener.Chains
}

func (r *rule) compare(s *rule) int {
	return cmp.Or(
		cmp.Compare(r.port, s.port),
		comparePrefixes(r.destination, s.destination),
		cmp.Compare(r.serverName, s.serverName),
		cmp.Compare(r.transport, s.transport),
		cmp.Compare(r.protocol, s.protocol),
		comparePrefixes(r.directSource, s.directSource),
		cmp.Compare(r.sourceType, s.sourceType),
		comparePrefixes(r.source, s.source),
		cmp.Compare(r.sourcePort, s.sourcePort),
	)
}

func comparePrefixes(p, q netip.Prefix) int {
	return cmp.Or(p.Addr().Compare(q.Addr()), cmp.Compare(p.Bits(), q.Bits()))
}

// chainIndex has the sorted rules of all chains. Each step of a match is a binary search in the rules that the step before
// kept.
type chainIndex struct {
	chains []*FilterChain
	rules  []rule
	bits   [3]prefixLengths // in use by destination, directSource and source
}

// prefixLengths is a set of prefix lengths.
type prefixLengths [129/64 + 1]uint64

func (p *prefixLengths) add(bits int)      { p[bits/64] |= 1 << (bits % 64) }
func (p *prefixLengths) has(bits int) bool { return p[bits/64]&(1<<(bits%64)) != 0 }

// maxRules bounds the rules of a listener: they are all combinations of the values in a match.
const maxRules = 1 << 16

var errTooManyRules = errors.New("more combinations of values in matches than are supported")

// orAny returns values, or one zero value if the list is empty.
func orAny[T any](values []T) []T {
	if len(values) == 0 {
		return make([]T, 1)
	}
	return values
}

// build makes the index. Chains with the same match are an error, as they are for Envoy.
func (x *chainIndex) build(chains []*FilterChain) error {
	x.chains = chains
	for i, chain := range chains {
		m := &chain.Match
		size := len(x.rules)
		factors := [...]int{len(m.Destinations), len(m.ServerNames), len(m.Protocols), len(m.DirectSources), len(m.Sources), len(m.SourcePorts)}
		combinations := 1
		for _, factor := range factors {
			if combinations *= max(factor, 1); size+combinations > maxRules {
				x.rules = nil
				return errTooManyRules
			}
		}
		x.rules = slices.Grow(x.rules, combinations)
		for _, destination := range orAny(m.Destinations) {
			x.bits[0].add(max(destination.Bits(), 0))
			for _, name := range orAny(m.ServerNames) {
				name = strings.TrimPrefix(name, "*")
				for _, protocol := range orAny(m.Protocols) {
					for _, direct := range orAny(m.DirectSources) {
						x.bits[1].add(max(direct.Bits(), 0))
						for _, source := range orAny(m.Sources) {
							x.bits[2].add(max(source.Bits(), 0))
							for _, port := range orAny(m.SourcePorts) {
								x.rules = append(x.rules, rule{m.Port, destination, name, m.Transport, protocol, direct, m.SourceType, source, port, i})
							}
						}
					}
				}
			}
		}
	}
	sort.SliceStable(x.rules, func(i, j int) bool { return x.rules[i].compare(&x.rules[j]) < 0 })
	for i := 1; i < len(x.rules); i++ {
		if r, s := &x.rules[i-1], &x.rules[i]; r.compare(s) == 0 {
			return fmt.Errorf("filter chains %d and %d have the same match", r.chain, s.chain)
		}
	}
	return nil
}

// narrow returns the rules for which compare is 0. The rules are in its order.
func narrow(rules []rule, compare func(r *rule) int) []rule {
	start := sort.Search(len(rules), func(i int) bool { return compare(&rules[i]) >= 0 })
	end := start + sort.Search(len(rules)-start, func(i int) bool { return compare(&rules[start+i]) > 0 })
	return rules[start:end]
}

func (x *chainIndex) match(c *ConnInfo) *FilterChain {
	rules := x.rules
	if len(rules) == 0 {
		return nil
	}
	port := c.Destination.Port()
	byPort := func(r *rule) int { return cmp.Compare(r.port, port) }
	found := narrow(rules, byPort)
	if len(found) == 0 {
		port = 0
		found = narrow(rules, byPort)
	}
	rules = x.byPrefix(found, c.Destination.Addr(), 0)
	rules = byServerName(rules, lower(c.ServerName))

	transport := plainTransport
	if c.TLS {
		transport = tlsTransport
	}
	byTransport := func(r *rule) int { return cmp.Compare(r.transport, transport) }
	if found = narrow(rules, byTransport); len(found) == 0 {
		transport = ""
		found = narrow(rules, byTransport)
	}
	rules = byProtocol(found, c.Protocols)
	rules = x.byPrefix(rules, c.DirectSource, 1)
	rules = bySourceType(rules, c)
	rules = x.byPrefix(rules, c.Source.Addr(), 2)

	port = c.Source.Port()
	bySourcePort := func(r *rule) int { return cmp.Compare(r.sourcePort, port) }
	if found = narrow(rules, bySourcePort); len(found) == 0 {
		port = 0
		found = narrow(rules, bySourcePort)
	}
	if len(found) == 0 {
		return nil
	}
	return x.chains[found[0].chain]
}

// byPrefix returns the rules with the longest prefix that contains address. which is the criterion, as in chainIndex.bits.
func (x *chainIndex) byPrefix(rules []rule, address netip.Addr, which int) []rule {
	if len(rules) == 0 {
		return nil
	}
	var prefix netip.Prefix
	by := func(r *rule) int {
		switch which {
		case 0:
			return comparePrefixes(r.destination, prefix)
		case 1:
			return comparePrefixes(r.directSource, prefix)
		}
		return comparePrefixes(r.source, prefix)
	}
	address = address.Unmap().WithZone("")
	for bits := address.BitLen(); bits >= 0; bits-- {
		if !x.bits[which].has(bits) {
			continue
		}
		prefix, _ = address.Prefix(bits)
		if found := narrow(rules, by); len(found) > 0 {
			return found
		}
	}
	prefix = netip.Prefix{}
	return narrow(rules, by)
}

// byServerName returns the rules with the name, or the longest that contains it, or without a name.
func byServerName(rules []rule, name string) []rule {
	if len(rules) == 0 {
		return nil
	}
	by := func(r *rule) int { return cmp.Compare(r.serverName, name) }
	if found := narrow(rules, by); len(found) > 0 {
		return found
	}
	for len(name) > 1 {
		dot := strings.IndexByte(name[1:], '.')
		if dot < 0 {
			break
		}
		name = name[1+dot:]
		if found := narrow(rules, by); len(found) > 0 && name != "." {
			return found
		}
	}
	name = ""
	return narrow(rules, by)
}

// byProtocol returns the rules with the first of the protocols that any rule has, or without a protocol.
func byProtocol(rules []rule, protocols []string) []rule {
	var protocol string
	by := func(r *rule) int { return cmp.Compare(r.protocol, protocol) }
	for _, protocol = range protocols {
		if found := narrow(rules, by); len(found) > 0 {
			return found
		}
	}
	protocol = ""
	return narrow(rules, by)
}

func bySourceType(rules []rule, c *ConnInfo) []rule {
	kind := ExternalSource
	if source := c.Source.Addr().Unmap(); source.IsLoopback() || source == c.Destination.Addr().Unmap() {
		kind = LocalSource
	}
	by := func(r *rule) int { return cmp.Compare(r.sourceType, kind) }
	if found := narrow(rules, by); len(found) > 0 {
		return found
	}
	kind = AnySource
	return narrow(rules, by)
}
