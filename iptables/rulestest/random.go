package rulestest

import (
	"math/rand/v2"
	"net/netip"
	"strings"

	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/iptables/ruleset"
)

// RandomSpec draws a valid spec from few values, so that they meet often.
func RandomSpec(r *rand.Rand) capture.Spec {
	spec := capture.Default()
	coin := func() bool { return r.IntN(2) == 0 }
	some := func(from ...string) string {
		var chosen []string
		for _, item := range from {
			if r.IntN(3) == 0 {
				chosen = append(chosen, item)
			}
		}
		return strings.Join(chosen, ",")
	}
	if coin() {
		spec.Mode = capture.TPROXY
	}
	spec.Compat, spec.DropInvalid, spec.RedirectDNS, spec.CaptureAllDNS = coin(), coin(), coin(), coin()
	spec.ProxyUIDs, spec.ProxyGIDs = IDs(some("1337", "1340-1345")), IDs(some("1337", "2000"))
	if len(spec.ProxyUIDs)+len(spec.ProxyGIDs) == 0 {
		spec.ProxyUIDs = IDs("1337")
	}
	spec.Inbound.List = Ports(some("80", "53", "8000:8010", "15008"))
	if coin() {
		spec.Inbound = capture.Ports{All: true}
	}
	spec.InboundExcluded = Ports(some("80", "15021", "8005"))
	spec.Outbound.List = Networks(some("203.0.113.0/24", "198.51.100.0/24", "127.0.0.0/8", "2001:db8:1::/64", "2001:db8:2::/64", "::1/128"))
	if coin() {
		spec.Outbound = capture.Prefixes{All: true}
	}
	spec.OutboundExcluded = Networks(some("203.0.113.7/32", "2001:db8:2::7/128", "198.51.100.0/24"))
	spec.OutboundPorts, spec.OutboundPortsExcluded = Ports(some("80", "8000:8010")), Ports(some("8005", "53", "22"))
	if r.IntN(3) == 0 {
		spec.OwnerGroups = capture.Groups{List: IDs(some("1000", "1001-1010", "2000"))}
	}
	spec.OwnerGroupsExcluded = IDs(some("1000", "1005"))
	if coin() {
		spec.Localhost4 = netip.MustParsePrefix("127.0.0.0/8")
	}
	for _, name := range strings.Split(some("eth1", "tun+"), ",") {
		if name != "" {
			spec.InterfacesExcluded = append(spec.InterfacesExcluded, name)
		}
	}
	if r.IntN(3) == 0 {
		spec.VirtualInterfaces = []string{"vm0"}
	}
	for _, a := range Families {
		if coin() {
			spec.DNSServers = append(spec.DNSServers, a.Elsewhere)
		}
	}
	return spec
}

func WithoutReasons(rs ruleset.Ruleset) ruleset.Ruleset {
	bare := ruleset.Ruleset{Family: rs.Family}
	for _, table := range rs.Tables {
		for _, c := range table.Chains {
			copied := ruleset.Chain{Name: c.Name, Policy: c.Policy}
			for _, r := range c.Rules {
				r.Why, r.Before = "", nil
				copied.Rules = append(copied.Rules, r)
			}
			bare.AddChain(table.Name, copied)
		}
	}
	return bare
}
