package policy

import (
	"net/netip"
	"strings"
	"sync"

	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/iptables/ruleset"
)

// WithReasons returns the ruleset with the reasons of our rules. The kernel keeps the ID of a rule, but not its reason.
func WithReasons(rs ruleset.Ruleset) ruleset.Ruleset {
	told := ruleset.Ruleset{Family: rs.Family}
	for _, t := range rs.Tables {
		for _, c := range t.Chains {
			copied := ruleset.Chain{Name: c.Name, Policy: c.Policy}
			for _, r := range c.Rules {
				r.Why = reasonOf(r)
				copied.Rules = append(copied.Rules, r)
			}
			told.AddChain(t.Name, copied)
		}
	}
	return told
}

// reasonOf finds a rule's reason by its ID and target. An ID may end in a port, user or network, so an unknown ID is
// looked up again without its last parts.
func reasonOf(r ruleset.Rule) string {
	if r.ID == "" {
		return ""
	}
	target, _, _ := strings.Cut(r.Target.Render(), " ")
	for id := r.ID; ; {
		if why := reasons()[[2]string{id, target}]; why != "" {
			return why
		}
		cut := strings.LastIndexByte(id, '/')
		if cut < 0 {
			return ""
		}
		id = id[:cut]
	}
}

// reasons are those of all possible rules, by ID and target, and by every prefix of an ID that has only one reason.
// They come from specimens, so no second table of reasons exists. Built on first use: init does not need them.
var reasons = sync.OnceValue(func() map[[2]string]string {
	whole, beginnings := make(map[[2]string]string), make(map[[2]string]string)
	for _, spec := range specimens() {
		for _, family := range ruleset.Families {
			for _, r := range Rules(spec, family).All() {
				target, _, _ := strings.Cut(r.Target.Render(), " ")
				whole[[2]string{r.ID, target}] = r.Why
				for i, letter := range r.ID {
					at := [2]string{r.ID[:i], target}
					if known, ok := beginnings[at]; letter == '/' && ok && known != r.Why {
						beginnings[at] = ""
					} else if letter == '/' {
						beginnings[at] = r.Why
					}
				}
			}
		}
	}
	for at, why := range whole {
		beginnings[at] = why
	}
	return beginnings
})

// specimens returns specs that together need every possible rule.
func specimens() []capture.Spec {
	id := []capture.IDRange{{}}
	all := capture.Default()
	all.Inbound.All, all.Outbound.All, all.RedirectDNS, all.DropInvalid = true, true, true, true
	all.InboundExcluded, all.OutboundPorts = []capture.PortRange{single(1)}, []capture.PortRange{single(2)}
	all.OutboundPortsExcluded, all.OutboundExcluded = []capture.PortRange{single(3)}, []netip.Prefix{ruleset.Discard(ruleset.IPv4), ruleset.Discard(ruleset.IPv6)}
	all.DNSServers = []netip.Addr{capture.InboundSource4, capture.InboundSource6}
	all.InterfacesExcluded, all.VirtualInterfaces, all.OwnerGroupsExcluded = []string{"eth0"}, []string{"vm0"}, id

	listed := all
	listed.Inbound.All, listed.Outbound.All = false, false
	listed.Inbound.List, listed.Outbound.List = all.InboundExcluded, []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8"), ruleset.AddressesOf(ruleset.IPv6).Localhost}
	listed.CaptureAllDNS, listed.OwnerGroups = true, capture.Groups{List: id}

	var specs []capture.Spec
	for _, spec := range []capture.Spec{all, listed} {
		for _, spec.Mode = range []capture.Mode{capture.Redirect, capture.TPROXY} {
			for _, spec.Compat = range []bool{false, true} {
				specs = append(specs, spec)
			}
		}
	}
	return specs
}
