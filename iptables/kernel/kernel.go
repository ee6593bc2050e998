// Package kernel reads and changes what the rules depend on besides tables: capabilities, the IPv6 source address on the
// loopback, policy routing, and the connections that conntrack holds.
//
// Every function works in the network namespace of the calling thread, which the caller must have locked. Reads change
// nothing; each change reports success if the wanted state is there already.
package kernel

import (
	"errors"

	"github.com/vishvananda/netlink/nl"
)

// ErrNoKernelSupport means that the kernel lacks what a table needs, as opposed to a rule that is wrong.
var ErrNoKernelSupport = errors.New("the kernel does not support it: load the modules nf_tables, nft_chain_nat and nft_compat on the node, or for the legacy flavour iptable_nat and ip6table_nat")

// Whole asks the kernel for a list until no change by somebody else has interrupted it, but not for ever.
func Whole[T any](list func() (T, error)) (listed T, err error) {
	const tries = 100
	for range tries {
		if listed, err = list(); !errors.Is(err, nl.ErrDumpInterrupted) {
			break
		}
	}
	return listed, err
}
