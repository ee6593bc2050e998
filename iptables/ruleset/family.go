package ruleset

import (
	"net/netip"

	"github.com/pillion-proxy/pillion/internal/capture"
)

// Discard is a network to which nobody answers: for documentation (RFC 5737), for discarding (RFC 6666).
func Discard(family Family) netip.Prefix {
	if family == IPv6 {
		return netip.MustParsePrefix("100::1/128")
	}
	return netip.MustParsePrefix("192.0.2.1/32")
}

// Addresses are the fixed addresses of a family.
type Addresses struct {
	Localhost     netip.Prefix // loopback traffic that is meant for the workload
	InboundSource netip.Prefix // the agent dials the workload from here
	Anywhere      netip.Addr
}

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

// Family is an address family. The two have rules of their own.
type Family int

// The families, by the version number of their protocol.
const (
	IPv4 Family = 4
	IPv6 Family = 6
)

// Families are both, in the order in which they are worked on.
var Families = []Family{IPv4, IPv6}

func (f Family) String() string {
	if f == IPv6 {
		return "ipv6"
	}
	return "ipv4"
}

// FamilyOf is the family of an address.
func FamilyOf(address netip.Addr) Family {
	if address.Is4() {
		return IPv4
	}
	return IPv6
}

// Owns tells whether addresses of the prefix belong to the family.
func (f Family) Owns(prefix netip.Prefix) bool { return FamilyOf(prefix.Addr()) == f }
