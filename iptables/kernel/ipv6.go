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

// The agent's source address towards an IPv6 workload. IPv4 has 127.0.0.6 by itself, as part of 127.0.0.0/8.
//
// The address is deprecated from the start: the kernel then does not choose it as the source of other connections, bind
// works all the same, and cleanup knows by it that the address is ours and not somebody else's.
func sourceAddress() *netlink.Addr {
	return &netlink.Addr{
		IPNet:     &net.IPNet{IP: capture.InboundSource6.AsSlice(), Mask: net.CIDRMask(128, 128)},
		Flags:     unix.IFA_F_NODAD,
		ValidLft:  math.MaxUint32,
		LinkIndex: LoopbackIndex,
	}
}

// LoopbackIndex is the loopback's in every namespace: it is the first interface to be made.
const LoopbackIndex = 1

func AddSourceAddress() error {
	if err := netlink.AddrAdd(nil, sourceAddress()); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("adding %s to %s: %w", capture.InboundSource6, ruleset.Loopback, err)
	}
	return nil
}

func RemoveSourceAddress() error {
	if err := netlink.AddrDel(nil, sourceAddress()); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
		return fmt.Errorf("removing %s from %s: %w", capture.InboundSource6, ruleset.Loopback, err)
	}
	return nil
}

// IPv6State is the state of IPv6 in a namespace.
type IPv6State struct {
	enabled bool // loopback can have addresses
	Global  bool // the pod has an address that others may reach it at
	Source  bool // capture.InboundSource6 is on the loopback
	Ours    bool // and it was us who put it there
}

// ReadIPv6 reads /proc, whose files show the namespace of the calling thread. There is no file when the kernel has no
// IPv6 or it is switched off at boot.
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

// firstIsIPv6 judges as istio-iptables does, but passes over the address that an earlier run put on the loopback.
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

// Wanted tells whether there shall be rules for IPv6. Addresses are asked for only where they matter.
func (state IPv6State) Wanted(choice capture.IPv6Choice) (bool, error) {
	if !state.enabled || choice == capture.IPv6Wherever {
		return state.enabled, nil
	}
	return firstIsIPv6()
}

// addAddress takes a line of if_inet6: address, interface number, prefix length, scope and flags, all in hexadecimal,
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
