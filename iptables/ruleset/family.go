package ruleset

import (
	"net/netip"

	"github.com/pillion-proxy/pillion/internal/capture"
)

// Discard is a network without hosts: for documentation (RFC 5737), for discarding (RFC 6666).
func Discard(family Family) netip.Prefix {
	if family == IPv6 {
		return netip.MustParsePrefix("100::1/128")
	}
	return netip.MustParsePrefix("192.0.2.1/32")
}

// Addresses are the fixed addresses of a family.
type Addresses struct {
	Localhost     netip.Prefix // loopback traffic for the workload itself
	InboundSource netip.Prefix // source of the agent's connections to the workload
	Anywhere      netip.Addr
}

// AddressesOf returns the fixed addresses of a family.
func AddressesOf(family Family) Addresses {
	if family == IPv6 {
		return Addresses{netip.MustParsePrefix("::1/128"), netip.PrefixFrom(capture.InboundSource6, 128), netip.IPv6Unspecified()}
	}
	return Addresses{netip.MustParsePrefix("127.0.0.1/32"), netip.PrefixFrom(capture.InboundSource4, 32), netip.IPv4Unspecified()}
}

const (
	Loopback = "lo"
	DNSPort  = 53
)

// Family is an address family. Each family has its own rules.
type Family int

// The families, by the version number of their protocol.
const (
	IPv4 Family = 4
	IPv6 Family = 6
)

// Families are both families, in processing order.
var Families = []Family{IPv4, IPv6}

func (f Family) String() string {
	if f == IPv6 {
		return "ipv6"
	}
	return "ipv4"
}

// FamilyOf returns the family of an address.
func FamilyOf(address netip.Addr) Family {
	if address.Is4() {
		return IPv4
	}
	return IPv6
}

// Owns reports whether the prefix is of the family.
func (f Family) Owns(prefix netip.Prefix) bool { return FamilyOf(prefix.Addr()) == f }
