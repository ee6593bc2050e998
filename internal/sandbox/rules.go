package sandbox

import (
	"encoding/binary"
	"net/netip"
	"slices"

	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/iptables/nft"
)

var littleEndian = binary.NativeEndian.Uint16([]byte{1, 0}) == 1

// dropGroup is the group of nfnetlink_log to which rejected datagrams are reported.
const dropGroup = 5

// when makes a rule of conditions, and of what happens to a packet that meets all of them.
func when(parts ...[]expr.Any) []expr.Any { return slices.Concat(parts...) }

// rules are those of the two chains.
type rules struct{ redirect, reject [][]expr.Any }

// rulesFor returns the rules. The first chain redirects DNS queries to any server, loopback included, and TCP to all other
// hosts. The second one rejects everything that would leave, except datagrams that a packet socket takes. The sandbox has no
// way out in any case; rejecting reports that to the program at once.
func rulesFor(config *Config, s *sockets) rules {
	var r rules
	r.redirect = append(r.redirect,
		when(protocol(unix.IPPROTO_UDP), destinationPort(53, 53), redirect(s.dns)),
		when(protocol(unix.IPPROTO_TCP), destinationPort(53, 53), redirect(s.dns)))
	// Queries of the command to the listener itself are not redirected by other rules, because it is on loopback.
	ports := config.Loopback.List
	if config.Loopback.All {
		ports = []capture.PortRange{{First: 1, Last: 65535}}
	}
	for _, ports := range ports {
		for _, prefix := range loopback {
			r.redirect = append(r.redirect, when(destination(prefix), protocol(unix.IPPROTO_TCP), destinationPort(ports.First, ports.Last), redirect(s.tcp)))
		}
	}
	for _, prefix := range own {
		pass := when(destination(prefix), verdict(expr.VerdictAccept))
		r.redirect, r.reject = append(r.redirect, pass), append(r.reject, pass)
	}
	r.redirect = append(r.redirect, when(protocol(unix.IPPROTO_TCP), redirect(s.tcp)))
	if config.Datagrams {
		for _, prefix := range groups {
			r.reject = append(r.reject, when(destination(prefix), protocol(unix.IPPROTO_UDP), report(), refuse()))
		}
		r.reject = append(r.reject, when(protocol(unix.IPPROTO_UDP), verdict(expr.VerdictAccept))) // to a packet socket
	}
	r.reject = append(r.reject,
		when(protocol(unix.IPPROTO_UDP), report(), refuse()),
		when(protocol(unix.IPPROTO_ICMPV6), verdict(expr.VerdictDrop)), // the kernel's own, such as router solicitations
		when(protocol(unix.IPPROTO_TCP), reset()),
		when(refuse()))
	return r
}

var (
	loopback = []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8"), netip.MustParsePrefix("::1/128")}
	groups   = []netip.Prefix{netip.MustParsePrefix("224.0.0.0/4"), netip.MustParsePrefix("255.255.255.255/32"), netip.MustParsePrefix("ff00::/8")}
	own      = append(slices.Clone(loopback), netip.PrefixFrom(Address4, 32), netip.PrefixFrom(Address6, 128))
)

func protocol(number byte) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{number}},
	}
}

func destinationPort(first, last uint16) []expr.Any {
	return []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
		&expr.Cmp{Op: expr.CmpOpGte, Register: 1, Data: binaryutil.BigEndian.PutUint16(first)},
		&expr.Cmp{Op: expr.CmpOpLte, Register: 1, Data: binaryutil.BigEndian.PutUint16(last)},
	}
}

// destination matches packets to a network, and only those of its family.
func destination(prefix netip.Prefix) []expr.Any {
	family, offset, size := byte(unix.NFPROTO_IPV4), uint32(16), uint32(4)
	if prefix.Addr().Is6() {
		family, offset, size = unix.NFPROTO_IPV6, 24, 16
	}
	mask := make([]byte, size)
	for bit := range prefix.Bits() {
		mask[bit/8] |= 1 << (7 - bit%8)
	}
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{family}},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: size},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: size, Mask: mask, Xor: make([]byte, size)},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: prefix.Masked().Addr().AsSlice()},
	}
}

func redirect(port uint16) []expr.Any {
	return []expr.Any{
		&expr.Immediate{Register: 1, Data: binaryutil.BigEndian.PutUint16(port)},
		&expr.Redir{RegisterProtoMin: 1},
	}
}

func verdict(kind expr.VerdictKind) []expr.Any { return []expr.Any{&expr.Verdict{Kind: kind}} }

// report passes the headers of a packet to the helper at once; by default the kernel gathers packets for a second.
func report() []expr.Any {
	return []expr.Any{&expr.Log{
		Key:   1<<unix.NFTA_LOG_GROUP | 1<<unix.NFTA_LOG_SNAPLEN | 1<<unix.NFTA_LOG_QTHRESHOLD,
		Group: dropGroup, Snaplen: headerBytes, QThreshold: 1,
	}}
}

// refuse answers with ICMP's "administratively prohibited"; connect and send return that as an error.
func refuse() []expr.Any {
	return []expr.Any{&expr.Reject{Type: unix.NFT_REJECT_ICMPX_UNREACH, Code: unix.NFT_REJECT_ICMPX_ADMIN_PROHIBITED}}
}

func reset() []expr.Any { return []expr.Any{&expr.Reject{Type: unix.NFT_REJECT_TCP_RST}} }

// install installs the rules in one transaction.
func (r rules) install() error {
	return nft.Create(
		nft.Base{Name: "redirect", Kind: "nat", Hook: unix.NF_INET_LOCAL_OUT, Priority: -100, Rules: r.redirect},
		nft.Base{Name: "reject", Kind: "filter", Hook: unix.NF_INET_LOCAL_OUT, Rules: r.reject},
	)
}
