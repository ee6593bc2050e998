package iptables

import (
	"net/netip"
	"strings"
	"sync"

	"github.com/pillion-proxy/pillion/internal/capture"
)

// withReasons is the ruleset with the reasons of our rules. The kernel keeps a rule's ID, not why it is there.
func (rs Ruleset) withReasons() Ruleset {
	told := Ruleset{Family: rs.Family}
	for _, t := range rs.Tables {
		for _, c := range t.Chains {
			copied := Chain{Name: c.Name, Policy: c.Policy}
			for _, r := range c.Rules {
				r.Why = r.reason()
				copied.Rules = append(copied.Rules, r)
			}
			told.addChain(t.Name, copied)
		}
	}
	return told
}

// reason finds a rule's reason by its ID and target. The end of an ID may name a port, a user or a network, so what is
// not known in full is looked up without its last words.
func (r Rule) reason() string {
	if r.ID == "" {
		return ""
	}
	target, _, _ := strings.Cut(r.Target.render(), " ")
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

// reasons are those of all rules that there can be, by ID and target, and by every beginning of an ID that has one
// reason only. They come from specs that together need every rule.
var reasons = sync.OnceValue(func() map[[2]string]string {
	whole, beginnings := make(map[[2]string]string), make(map[[2]string]string)
	for _, spec := range specimens() {
		for _, family := range Families {
			for _, r := range Rules(spec, family).All() {
				target, _, _ := strings.Cut(r.Target.render(), " ")
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

// specimens are specs that together need every rule that there can be.
func specimens() []capture.Spec {
	id := []capture.IDRange{{}}
	all := capture.Default()
	all.Inbound.All, all.Outbound.All, all.RedirectDNS, all.DropInvalid = true, true, true, true
	all.InboundExcluded, all.OutboundPorts = []capture.PortRange{single(1)}, []capture.PortRange{single(2)}
	all.OutboundPortsExcluded, all.OutboundExcluded = []capture.PortRange{single(3)}, []netip.Prefix{discard(IPv4), discard(IPv6)}
	all.DNSServers = []netip.Addr{capture.InboundSource4, capture.InboundSource6}
	all.InterfacesExcluded, all.VirtualInterfaces, all.OwnerGroupsExcluded = []string{"eth0"}, []string{"vm0"}, id

	listed := all
	listed.Inbound.All, listed.Outbound.All = false, false
	listed.Inbound.List, listed.Outbound.List = all.InboundExcluded, []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8"), factsOf(IPv6).localhost}
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

// discard is a network to which nobody answers: for documentation (RFC 5737), for discarding (RFC 6666).
func discard(family Family) netip.Prefix {
	if family == IPv6 {
		return netip.MustParsePrefix("100::1/128")
	}
	return netip.MustParsePrefix("192.0.2.1/32")
}
