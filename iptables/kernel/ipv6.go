package kernel

import (
	"errors"
	"fmt"
	"io/fs"
	"math"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/iptables/ruleset"
)

// sourceAddress is the agent's source address towards an IPv6 workload. IPv4 needs no such address: 127.0.0.6 is in
// 127.0.0.0/8.
//
// The address is deprecated from the start (its preferred lifetime is 0). The kernel then never selects it as a source
// by itself, bind(2) still accepts it, and cleanup recognises the address as ours.
func sourceAddress() *netlink.Addr {
	return &netlink.Addr{
		IPNet:     &net.IPNet{IP: capture.InboundSource6.AsSlice(), Mask: net.CIDRMask(128, 128)},
		Flags:     unix.IFA_F_NODAD,
		ValidLft:  math.MaxUint32,
		LinkIndex: loopbackIndex,
	}
}

// loopbackIndex is the index of the loopback in every namespace: it is the first interface created.
const loopbackIndex = 1

// AddSourceAddress adds the source address to the loopback.
func AddSourceAddress() error {
	if err := netlink.AddrAdd(nil, sourceAddress()); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("adding %s to %s: %w", capture.InboundSource6, ruleset.Loopback, err)
	}
	return nil
}

// RemoveSourceAddress removes the source address from the loopback.
func RemoveSourceAddress() error {
	if err := netlink.AddrDel(nil, sourceAddress()); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
		return fmt.Errorf("removing %s from %s: %w", capture.InboundSource6, ruleset.Loopback, err)
	}
	return nil
}

// IPv6State is the state of IPv6 in a namespace.
type IPv6State struct {
	enabled bool // loopback can have addresses
	Global  bool // the pod has an address at which others can reach it
	Source  bool // capture.InboundSource6 is on the loopback
	Ours    bool // Source was added by us
}

// ReadIPv6 reads /proc/thread-self, so it reports the namespace of the calling thread. The file is missing if the
// kernel has no IPv6 or has it disabled at boot.
func ReadIPv6() (IPv6State, error) {
	var state IPv6State
	addresses, err := os.ReadFile("/proc/thread-self/net/if_inet6")
	if errors.Is(err, fs.ErrNotExist) {
		return state, nil
	}
	if err != nil {
		return state, fmt.Errorf("reading IPv6 addresses: %w", err)
	}
	state.enabled = true
	for _, name := range []string{"all", ruleset.Loopback} {
		disabled, err := os.ReadFile("/proc/sys/net/ipv6/conf/" + name + "/disable_ipv6")
		if err == nil && strings.TrimSpace(string(disabled)) != "0" {
			state.enabled = false
		}
	}
	for line := range strings.Lines(string(addresses)) {
		state.addAddress(strings.Fields(line))
	}
	return state, nil
}

// firstIsIPv6 reports whether the first global address is IPv6, as istio-iptables decides. It skips the address that an
// earlier run has added to the loopback.
func firstIsIPv6() (bool, error) {
	addresses, err := net.InterfaceAddrs()
	if err != nil {
		return false, fmt.Errorf("listing addresses: %w", err)
	}
	for _, a := range addresses {
		prefix, err := netip.ParsePrefix(a.String())
		address := prefix.Addr().Unmap()
		if err == nil && !address.IsLoopback() && !address.IsLinkLocalUnicast() && address != capture.InboundSource6 {
			return address.Is6(), nil
		}
	}
	return false, nil
}

// Wanted reports whether IPv6 gets rules. It lists addresses only if the choice depends on them.
func (state IPv6State) Wanted(choice capture.IPv6Choice) (bool, error) {
	if !state.enabled || choice == capture.IPv6Wherever {
		return state.enabled, nil
	}
	return firstIsIPv6()
}

// addAddress reads a line of if_inet6: address, interface index, prefix length, scope and flags, all in hexadecimal,
// and the interface's name.
func (state *IPv6State) addAddress(fields []string) {
	if len(fields) != 6 {
		return
	}
	const scopeGlobal = "00"
	if fields[5] != ruleset.Loopback {
		state.Global = state.Global || fields[3] == scopeGlobal
		return
	}
	if fields[0] == fmt.Sprintf("%x", capture.InboundSource6.AsSlice()) {
		flags, err := strconv.ParseUint(fields[4], 16, 32)
		state.Source = true
		state.Ours = err == nil && flags&unix.IFA_F_DEPRECATED != 0
	}
}
