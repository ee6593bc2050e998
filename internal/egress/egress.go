// Package egress decides which destinations a workload may reach, by rules for names and networks.
//
// A name that a client sends, such as a server name in TLS or an authority in HTTP, is only a claim. So a rule for a host
// allows a connection if its address is one of the addresses of that host as well. Addresses are those that the resolver has
// answered to the workload, or that a Resolver of the caller finds: a client cannot choose them. Rules that deny have
// precedence over rules that allow.
package egress

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// Rules are what is allowed and denied.
type Rules struct {
	Allow, Deny []Rule
	DenyOthers  bool // destinations that no rule is for are denied; otherwise they are allowed
}

// Resolver finds the addresses of names. It must not send its queries through the workload.
type Resolver interface {
	LookupNetIP(ctx context.Context, network, host string) ([]netip.Addr, error)
}

// Policy judges destinations. Make it with New. It is safe for concurrent use.
type Policy struct {
	resolver Resolver
	now      func() time.Time
	rules    atomic.Pointer[Rules]

	mu    sync.Mutex
	known map[string]*addresses // by name
}

// addresses are those of one name.
type addresses struct {
	until map[netip.Addr]time.Time
	asked time.Time // of the last lookup; zero: never
}

const (
	lookupTime = 5 * time.Second // as resolvers of C libraries wait for an answer
	// keepTime is how long an address of a name counts after it was last seen. Clients use addresses longer than the
	// lifetime of an answer.
	keepTime = 10 * time.Minute
	// lookAgain is the time between lookups of a name that lacks a connection's address.
	lookAgain = time.Second

	maxNames     = 10_000
	maxAddresses = 256 // of a name
)

// New returns a policy with rules.
func New(rules Rules, resolver Resolver) *Policy {
	p := &Policy{resolver: resolver, now: time.Now, known: make(map[string]*addresses)}
	p.Apply(rules)
	return p
}

// Apply replaces the rules, for connections and requests that are judged from now on.
func (p *Policy) Apply(rules Rules) { p.rules.Store(&rules) }

// Version is equal for judgements by the same rules.
func (p *Policy) Version() any { return p.rules.Load() }

// Connection judges a connection to a destination by the name that its client claims; "" if it claims none. It returns ""
// if the connection is allowed, and otherwise the reason. It may look a name up, for at most 5 s.
func (p *Policy) Connection(to netip.AddrPort, name string) (denied string) {
	return p.judge(p.rules.Load(), netip.AddrPortFrom(to.Addr().Unmap(), to.Port()), hostOf(name), false)
}

// Request judges a request by its authority. The request asks a proxy to connect or to send it elsewhere if proxied is set:
// then both the proxy and the authority must be allowed.
func (p *Policy) Request(to netip.AddrPort, authority string, proxied bool) (denied string) {
	return p.judge(p.rules.Load(), netip.AddrPortFrom(to.Addr().Unmap(), to.Port()), hostOf(authority), proxied)
}

// hostOf returns a name or an authority without a port, as rules have it.
func hostOf(authority string) string {
	if _, err := netip.ParseAddr(authority); err == nil {
		return authority
	}
	host, _, _ := cutPort(authority)
	return normal(strings.TrimSuffix(strings.TrimPrefix(host, "["), "]"))
}

func (p *Policy) judge(rules *Rules, to netip.AddrPort, name string, proxied bool) string {
	if literal, err := netip.ParseAddr(name); err == nil && !proxied && literal.Unmap() == to.Addr() {
		name = "" // it claims what is known
	}
	if rule := p.denies(rules, to, name, proxied); rule != nil {
		return fmt.Sprintf("%s is denied by the rule %q", describe(to, name), rule)
	}
	if proxied {
		return p.judgeProxied(rules, to, name)
	}
	if !rules.DenyOthers || slices.ContainsFunc(rules.Allow, func(r Rule) bool { return r.hasPort(to.Port()) && r.matchesAddress(to.Addr()) }) {
		return ""
	}
	if name == "" {
		if p.allowsAddress(rules, to) {
			return ""
		}
		return describe(to, name) + " is not allowed by a rule"
	}
	if !slices.ContainsFunc(rules.Allow, func(r Rule) bool { return r.hasPort(to.Port()) && r.matchesName(name) }) {
		return describe(to, name) + " is not allowed by a rule"
	}
	if !p.has(name, to.Addr(), true) {
		return fmt.Sprintf("%s is not an address of %s", to.Addr(), shown(name))
	}
	return ""
}

// judgeProxied judges a request for another host that a proxy at an address is to serve.
func (p *Policy) judgeProxied(rules *Rules, to netip.AddrPort, name string) string {
	if !rules.DenyOthers {
		return ""
	}
	literal, _ := netip.ParseAddr(name)
	if !slices.ContainsFunc(rules.Allow, func(r Rule) bool {
		return r.matchesName(name) || literal.IsValid() && r.matchesAddress(literal.Unmap())
	}) {
		return shown(name) + " by way of the proxy " + to.String() + " is not allowed by a rule"
	}
	if !p.allowsAddress(rules, to) {
		return "the proxy " + to.String() + " is not allowed by a rule"
	}
	return ""
}

// denies returns the rule that denies a destination. A connection without a name, or with one that does not have the
// connection's address, is denied if a denied host has the address.
func (p *Policy) denies(rules *Rules, to netip.AddrPort, name string, proxied bool) *Rule {
	literal, _ := netip.ParseAddr(name)
	hosts := false
	for i := range rules.Deny {
		r := &rules.Deny[i]
		hosts = hosts || r.ofHost()
		if !r.hasPort(to.Port()) && !proxied {
			continue
		}
		if r.matchesAddress(to.Addr()) || name != "" && r.matchesName(name) || literal.IsValid() && r.matchesAddress(literal.Unmap()) {
			return r
		}
	}
	if !hosts || proxied || name != "" && p.has(name, to.Addr(), true) {
		return nil
	}
	return p.byAddress(rules.Deny, to)
}

// allowsAddress reports whether a destination is allowed whatever name is claimed.
func (p *Policy) allowsAddress(rules *Rules, to netip.AddrPort) bool {
	return slices.ContainsFunc(rules.Allow, func(r Rule) bool { return r.hasPort(to.Port()) && r.matchesAddress(to.Addr()) }) ||
		p.byAddress(rules.Allow, to) != nil
}

// byAddress returns a rule for a host that has the address.
func (p *Policy) byAddress(rules []Rule, to netip.AddrPort) *Rule {
	for i := range rules {
		r := &rules[i]
		if !r.ofHost() || !r.hasPort(to.Port()) {
			continue
		}
		switch {
		case r.wild && r.host == "", r.exact() && p.has(r.host, to.Addr(), true), r.wild && p.hasBelow(r, to.Addr()):
			return r
		}
	}
	return nil
}

// Unnamed reports whether a destination would be allowed to a connection without a name.
func (p *Policy) Unnamed(to netip.AddrPort) bool { return p.Connection(to, "") == "" }

// Query judges a query for a name. Names whose connections would be denied are not resolved.
func (p *Policy) Query(name string) (denied bool) {
	rules := p.rules.Load()
	name = normal(name)
	matches := func(r Rule) bool { return r.matchesName(name) }
	if slices.ContainsFunc(rules.Deny, func(r Rule) bool { return r.port == 0 && r.matchesName(name) }) {
		return true
	}
	return rules.DenyOthers && !slices.ContainsFunc(rules.Allow, matches)
}

// Learn records the addresses that the workload's query for a name was answered with. Names that no rule is for are left
// out.
func (p *Policy) Learn(name string, list []netip.Addr) {
	rules := p.rules.Load()
	name = normal(name)
	matches := func(r Rule) bool { return r.matchesName(name) }
	if slices.ContainsFunc(rules.Allow, matches) || slices.ContainsFunc(rules.Deny, matches) {
		p.learn(name, list, false)
	}
}

func (p *Policy) learn(name string, list []netip.Addr, asked bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	a := p.known[name]
	if a == nil {
		if len(p.known) >= maxNames {
			for oldest := range p.known { // any
				delete(p.known, oldest)
				break
			}
		}
		a = &addresses{until: make(map[netip.Addr]time.Time)}
		p.known[name] = a
	}
	now := p.now()
	if asked {
		a.asked = now
	}
	for address, until := range a.until {
		if !now.Before(until) {
			delete(a.until, address)
		}
	}
	for _, address := range list {
		if address = address.Unmap(); len(a.until) < maxAddresses {
			a.until[address] = now.Add(keepTime)
		}
	}
}

// has reports whether a name has an address. With look, a name that lacks it is looked up.
func (p *Policy) has(name string, address netip.Addr, look bool) bool {
	p.mu.Lock()
	a := p.known[name]
	found := a != nil && p.now().Before(a.until[address])
	recent := a != nil && p.now().Sub(a.asked) < lookAgain
	p.mu.Unlock()
	if found || recent || !look || validHost(name) != nil {
		return found
	}
	ctx, cancel := context.WithTimeout(context.Background(), lookupTime)
	defer cancel()
	list, _ := p.resolver.LookupNetIP(ctx, "ip", name+".") // a name that does not exist has no addresses
	p.learn(name, list, true)
	return p.has(name, address, false)
}

// hasBelow reports whether a known name below a wildcard has an address.
func (p *Policy) hasBelow(r *Rule, address netip.Addr) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := p.now()
	for name, a := range p.known {
		if r.matchesName(name) && now.Before(a.until[address]) {
			return true
		}
	}
	return false
}

func describe(to netip.AddrPort, name string) string {
	if name == "" {
		return to.String()
	}
	return fmt.Sprintf("%s at %s", shown(name), to)
}

// shown is a name from a client in a message.
func shown(name string) string {
	const longest = 100
	if validHost(name) == nil && len(name) <= longest {
		return name
	}
	return fmt.Sprintf("%.100q", name)
}
