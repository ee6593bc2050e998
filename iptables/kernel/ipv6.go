package kernel

import (
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/iptables/ruleset"
	"github.com/vishvananda/netlink/nl"
)

// changeSourceAddress adds or removes the agent's source address towards an IPv6 workload. IPv4 needs no such address:
// 127.0.0.6 is in 127.0.0.0/8.
//
// The address is deprecated from the start (its preferred lifetime is 0). The kernel then never selects it as a source
// by itself, bind(2) still accepts it, and cleanup recognises the address as ours.
func changeSourceAddress(message, flags int) error {
	lifetimes := nl.IfaCacheInfo{IfaCacheinfo: unix.IfaCacheinfo{Valid: math.MaxUint32}}
	return addressChange(message, flags, loopbackIndex, capture.InboundSource6, nl.NewRtAttr(unix.IFA_CACHEINFO, lifetimes.Serialize()))
}

// loopbackIndex is the index of the loopback in every namespace: it is the first interface created.
const loopbackIndex = 1

// AddSourceAddress adds the source address to the loopback.
func AddSourceAddress() error {
	if err := changeSourceAddress(unix.RTM_NEWADDR, unix.NLM_F_CREATE|unix.NLM_F_EXCL); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("adding %s to %s: %w", capture.InboundSource6, ruleset.Loopback, err)
	}
	return nil
}

// RemoveSourceAddress removes the source address from the loopback.
func RemoveSourceAddress() error {
	if err := changeSourceAddress(unix.RTM_DELADDR, 0); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
		return fmt.Errorf("removing %s from %s: %w", capture.InboundSource6, ruleset.Loopback, err)
	}
	return nil
}

// IPv6State is the state of IPv6 in a namespace. The kernel judges each interface for itself: net.ipv6.conf.all.disable_ipv6
// only shows what was last written to all interfaces at once.
type IPv6State struct {
	loopback bool   // lo can have addresses
	global   string // a global address of another interface and that interface, such as "2001:db8::2 on eth0"
	link     string // another interface with IPv6
	Source   bool   // capture.InboundSource6 is on the loopback
	Ours     bool   // Source was added by us
}

// Global reports whether the pod has an address at which others can reach it.
func (state IPv6State) Global() bool { return state.global != "" }

// ReadIPv6 reads /proc/thread-self and /proc/sys/net, so it reports the namespace of the calling thread. The files are
// missing if the kernel has no IPv6 or has it disabled at boot. Disabling IPv6 on an interface removes its addresses.
func ReadIPv6() (IPv6State, error) {
	var state IPv6State
	addresses, err := os.ReadFile("/proc/thread-self/net/if_inet6")
	if errors.Is(err, fs.ErrNotExist) {
		return state, nil
	}
	if err != nil {
		return state, fmt.Errorf("reading IPv6 addresses: %w", err)
	}
	disabled, err := os.ReadFile("/proc/sys/" + strings.ReplaceAll(disableLoopback, ".", "/"))
	state.loopback = err != nil || strings.TrimSpace(string(disabled)) == "0"
	for line := range strings.Lines(string(addresses)) {
		state.addAddress(strings.Fields(line))
	}
	return state, nil
}

// disableLoopback is the sysctl that disables IPv6 on the loopback.
const disableLoopback = "net.ipv6.conf." + ruleset.Loopback + ".disable_ipv6"

// Wanted reports whether IPv6 gets rules. It lists addresses only if the choice depends on them. IPv6 cannot be
// captured without IPv6 on the loopback, because redirected packets go to ::1. That is an error if an interface has a global
// address: its traffic would bypass the agent.
func (state IPv6State) Wanted(choice capture.IPv6Choice) (bool, error) {
	if choice != capture.IPv6Wherever {
		if used, err := inUse(choice); err != nil || !used {
			return false, err
		}
	}
	if !state.loopback && state.Global() {
		return false, fmt.Errorf("IPv6 cannot be captured: it is disabled on %s (%s) but not elsewhere (%s): set %[2]s=0, or disable IPv6 on every interface",
			ruleset.Loopback, disableLoopback, state.global)
	}
	return state.loopback, nil
}

// Warning returns why IPv6 may bypass the agent later, or "".
func (state IPv6State) Warning() string {
	if state.loopback || state.link == "" {
		return ""
	}
	return fmt.Sprintf("IPv6 is not captured: it is disabled on %s (%s) but not on %s, which has no global address now", ruleset.Loopback, disableLoopback, state.link)
}

// inUse reports whether the namespace has IPv6 as istio-iptables decides: by its addresses except loopback and link-local
// ones. The address that an earlier run has added to the loopback does not count.
func inUse(choice capture.IPv6Choice) (bool, error) {
	addresses, err := net.InterfaceAddrs()
	if err != nil {
		return false, fmt.Errorf("listing addresses: %w", err)
	}
	for _, a := range addresses {
		prefix, err := netip.ParsePrefix(a.String())
		address := prefix.Addr().Unmap()
		if err != nil || address.IsLoopback() || address.IsLinkLocalUnicast() || address == capture.InboundSource6 {
			continue
		}
		if address.Is6() || choice == capture.IPv6WhenFirst {
			return address.Is6(), nil
		}
	}
	return false, nil
}

// addAddress reads a line of if_inet6: address, interface index, prefix length, scope and flags, all in hexadecimal,
// and the interface's name.
func (state *IPv6State) addAddress(fields []string) {
	if len(fields) != 6 {
		return
	}
	const scopeGlobal = "00"
	if fields[5] != ruleset.Loopback {
		state.link = fields[5]
		address, err := hex.DecodeString(fields[0])
		if ip, ok := netip.AddrFromSlice(address); ok && err == nil && fields[3] == scopeGlobal {
			state.global = fmt.Sprintf("%s on %s", ip, fields[5])
		}
		return
	}
	if fields[0] == fmt.Sprintf("%x", capture.InboundSource6.AsSlice()) {
		flags, err := strconv.ParseUint(fields[4], 16, 32)
		state.Source = true
		state.Ours = err == nil && flags&unix.IFA_F_DEPRECATED != 0
	}
}
