// Package kernel reads and changes what the rules depend on besides tables: capabilities, the IPv6 source address on the
// loopback, policy routing, and the connections that conntrack holds.
//
// Every function works in the network namespace of the calling thread; the caller must have locked the thread. Reads
// change nothing. A change succeeds if the wanted state exists already.
package kernel

import (
	"errors"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// ErrNoKernelSupport means that the kernel lacks support for a table, as opposed to a wrong rule.
var ErrNoKernelSupport = errors.New("the kernel lacks support: load the modules nf_tables, nft_chain_nat and nft_compat on the node, or for the legacy flavour iptable_nat and ip6table_nat")

// Whole retries a netlink dump that a concurrent change has interrupted (NLM_F_DUMP_INTR), at most 100 times.
func Whole[T any](list func() (T, error)) (listed T, err error) {
	const tries = 100
	for range tries {
		if listed, err = list(); !errors.Is(err, nl.ErrDumpInterrupted) {
			break
		}
	}
	return listed, err
}

// LinkUp sets a link of the thread's network namespace up. In a new namespace, lo is down as well.
func LinkUp(name string) error {
	message := nl.NewIfInfomsg(unix.AF_UNSPEC)
	message.Flags, message.Change = unix.IFF_UP, unix.IFF_UP
	return change(unix.RTM_NEWLINK, 0, message, nl.NewRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(name)))
}
