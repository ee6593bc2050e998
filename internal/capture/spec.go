package capture

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
)

// Mode is how inbound connections reach the agent.
type Mode string

// The modes, as istio-iptables spells them. Outbound connections are redirected in both.
const (
	Redirect Mode = "REDIRECT" // by network address translation
	TPROXY   Mode = "TPROXY"   // by giving the packet to the agent's socket as it is; both addresses stay
)

// IPv6Choice is when a namespace gets rules for IPv6.
type IPv6Choice string

// The choices.
const (
	IPv6Wherever  IPv6Choice = ""      // wherever the namespace has IPv6
	IPv6WhenFirst IPv6Choice = "first" // as istio-iptables without --dual-stack: when the first global address is of IPv6
)

// Spec says what is captured and where it goes. It is plain data: the rules are made from it, and the agent finds in it
// the ports that it must not forward to. The zero Spec is not valid; Default is.
type Spec struct {
	// Mode is how inbound connections are captured.
	Mode Mode
	// Compat asks for the verdicts of istio-iptables also where they are debatable: in TPROXY mode the tunnel port is
	// captured, and the agent's users reach their own workload by redirection; with DNS capture TCP to port 53 over the
	// loopback is judged like any other destination, and such queries of the agent like its other calls, but for users in
	// REDIRECT mode; and DropInvalid takes no notice of InterfacesExcluded in REDIRECT mode. What it gets plainly wrong is
	// right either way.
	Compat bool
	// IPv6 says when there are rules for IPv6.
	IPv6 IPv6Choice

	// OutboundPort is where connections that the workload opens are redirected. Zero is invalid.
	OutboundPort uint16
	// InboundPort is where connections that others open to the workload are redirected. Zero is invalid.
	InboundPort uint16
	// TunnelPort is never captured inbound: its listener takes whole tunnels. Zero is invalid.
	TunnelPort uint16

	// ProxyUIDs are the users whose connections are left alone, so that the agent does not capture itself.
	ProxyUIDs []IDRange
	// ProxyGIDs are groups left alone in the same way. At least one user or group is needed.
	ProxyGIDs []IDRange

	// Inbound are the destination ports captured inbound. The zero value captures nothing.
	Inbound Ports
	// InboundExcluded are left alone when Inbound is all ports. A list of ports needs no exception from itself, so it is
	// not consulted then, as in istio-iptables.
	InboundExcluded []PortRange

	// Outbound are the destination networks captured. The zero value captures nothing.
	Outbound Prefixes
	// OutboundExcluded are destination networks left alone.
	OutboundExcluded []netip.Prefix
	// OutboundPorts are destination ports captured at every address that is not excluded.
	OutboundPorts []PortRange
	// OutboundPortsExcluded are destination ports left alone whatever the address, DNS included. They come before
	// everything else.
	OutboundPortsExcluded []PortRange
	// OwnerGroups are the groups whose outbound connections are captured. The zero value captures nobody's.
	OwnerGroups Groups
	// OwnerGroupsExcluded are left alone when OwnerGroups is all of them, and not consulted otherwise.
	OwnerGroupsExcluded []IDRange
	// Localhost4 are the IPv4 loopback addresses at which the workload means itself. IPv6 has but one, ::1.
	Localhost4 netip.Prefix

	// InterfacesExcluded are left alone in both directions. A name that ends in + stands for every interface whose name
	// begins so, as in iptables.
	InterfacesExcluded []string
	// VirtualInterfaces lead to virtual machines inside the pod: what arrives on them is outbound. They win over
	// InterfacesExcluded.
	VirtualInterfaces []string

	// DropInvalid drops what connection tracking cannot make sense of, before the kernel answers it with a reset.
	DropInvalid bool

	// RedirectDNS captures DNS over UDP and TCP to DNSPort: what is sent to DNSServers, or to any address with
	// CaptureAllDNS. Without either it captures nothing.
	RedirectDNS   bool
	CaptureAllDNS bool
	DNSServers    []netip.Addr

	// TPROXYMark is the packet mark that leads to TPROXYTable, whose only route delivers locally.
	TPROXYMark  uint32
	TPROXYTable uint32
}

// CapturesDNS tells whether there is DNS capture in any family. Excluding port 53 switches it off.
func (s Spec) CapturesDNS() bool {
	excluded := slices.ContainsFunc(s.OutboundPortsExcluded, func(r PortRange) bool { return r.Contains(53) })
	return s.RedirectDNS && (s.CaptureAllDNS || len(s.DNSServers) > 0) && !excluded
}

// CapturesInboundByTPROXY tells whether marks and policy routing are needed.
func (s Spec) CapturesInboundByTPROXY() bool { return s.Mode == TPROXY && !s.Inbound.None() }

// DefaultProxyID is the user and the group of the agent when nobody says otherwise.
const DefaultProxyID = 1337

// Default is what istio-iptables captures without arguments: nothing, in either direction, with the usual ports.
func Default() Spec {
	return Spec{
		Mode:         Redirect,
		OutboundPort: OutboundPort,
		InboundPort:  InboundPort,
		TunnelPort:   TunnelPort,
		ProxyUIDs:    []IDRange{{DefaultProxyID, DefaultProxyID}},
		ProxyGIDs:    []IDRange{{DefaultProxyID, DefaultProxyID}},
		OwnerGroups:  Groups{All: true},
		Localhost4:   netip.MustParsePrefix("127.0.0.1/32"),
		TPROXYMark:   1337,
		TPROXYTable:  133,
	}
}

// OwnPorts are the ports at which the agent itself listens, sorted. A connection to one of them at one of this
// workload's own addresses is a loop; at another host's address it is ordinary traffic.
func (s Spec) OwnPorts() []uint16 {
	ports := []uint16{AdminPort, s.OutboundPort, s.InboundPort, StatusPort, ReadinessPort, DNSPort, MetricsPort}
	slices.Sort(ports)
	return ports
}

// LoopMark marks what the agent sends to the workload's own service in TPROXY mode, and the connections that were given
// to the agent. It cannot be TPROXYMark.
const LoopMark = 1338

// MaxOwnerGroups is how many groups OwnerGroups may list, as in istio-iptables, which has no limit for those left alone.
const MaxOwnerGroups = 64

// Validate finds what the parsers and types cannot rule out. Its errors name the flag, the value and the remedy.
func (s Spec) Validate() error {
	if err := s.validatePorts(); err != nil {
		return err
	}
	for _, ports := range []named[PortRange]{
		{"-b", s.Inbound.List}, {"-d", s.InboundExcluded}, {"-q", s.OutboundPorts}, {"-o", s.OutboundPortsExcluded},
	} {
		for _, r := range ports.list {
			if r.First == 0 || r.Last < r.First {
				return fmt.Errorf("%s %s: a range goes from a port that is not 0 upwards", ports.flag, r)
			}
		}
	}
	if err := s.validateIDs(); err != nil {
		return err
	}
	for _, networks := range []named[netip.Prefix]{{"-i", s.Outbound.List}, {"-x", s.OutboundExcluded}} {
		if slices.ContainsFunc(networks.list, func(p netip.Prefix) bool { return !p.IsValid() }) {
			return fmt.Errorf("%s: a network is not set", networks.flag)
		}
	}
	if _, err := ParseLocalhost4(s.Localhost4.String()); err != nil {
		return fmt.Errorf("%s: %w", localhostVariable, err)
	}
	for _, interfaces := range []named[string]{{"-c", s.InterfacesExcluded}, {"-k", s.VirtualInterfaces}} {
		for _, name := range interfaces.list {
			if _, err := ParseInterface(name); err != nil {
				return fmt.Errorf("%s: %w", interfaces.flag, err)
			}
		}
	}
	if slices.ContainsFunc(s.DNSServers, func(a netip.Addr) bool { return !a.IsValid() }) {
		return errors.New("a DNS server is not set")
	}
	return s.validateMode()
}

// named is a list and the flag or variable that it comes from.
type named[T any] struct {
	flag string
	list []T
}

// The variables of istio-iptables that have no flag.
const (
	groupsVariable         = "ISTIO_OUTBOUND_OWNER_GROUPS"
	groupsExcludedVariable = "ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE"
	localhostVariable      = "ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR"
)

func (s Spec) validateIDs() error {
	if len(s.ProxyUIDs)+len(s.ProxyGIDs) == 0 {
		return errors.New("-u and -g name no user and no group: the agent's own connections would be captured; name one")
	}
	for _, ids := range []named[IDRange]{
		{"-u", s.ProxyUIDs}, {"-g", s.ProxyGIDs}, {groupsVariable, s.OwnerGroups.List}, {groupsExcludedVariable, s.OwnerGroupsExcluded},
	} {
		for _, r := range ids.list {
			if r.Last == noID || r.Last < r.First {
				return fmt.Errorf("%s %s: a user or group is a number from 0 to %d, a range goes upwards", ids.flag, r, uint32(noID-1))
			}
		}
	}
	if listed := len(s.OwnerGroups.List); listed > MaxOwnerGroups {
		return fmt.Errorf("%s lists %d groups: at most %d are possible; write neighbours as a range such as 2000-2010",
			groupsVariable, listed, MaxOwnerGroups)
	}
	return nil
}

func (s Spec) validateMode() error {
	switch s.Mode {
	case Redirect:
		return nil
	case TPROXY:
	default:
		return fmt.Errorf("-m %q is not a mode: use %s or %s", s.Mode, Redirect, TPROXY)
	}
	if s.TPROXYMark == 0 || s.TPROXYMark == LoopMark {
		return fmt.Errorf("-t %d: use a mark that is neither 0 nor %d, which the rules need themselves", s.TPROXYMark, LoopMark)
	}
	if s.TPROXYTable == 0 || 253 <= s.TPROXYTable && s.TPROXYTable <= 255 {
		return fmt.Errorf("-r %d: use a routing table of its own; 0 and 253 to 255 are the kernel's", s.TPROXYTable)
	}
	return nil
}

// validatePorts refuses two listeners on one port: the second could not bind, and captured traffic would end in the
// wrong one.
func (s Spec) validatePorts() error {
	taken := map[uint16]string{
		AdminPort: "admin", StatusPort: "status", ReadinessPort: "readiness", DNSPort: "DNS", MetricsPort: "metrics",
	}
	for _, p := range []struct {
		port       uint16
		name, flag string
	}{{s.OutboundPort, "outbound", "-p"}, {s.InboundPort, "inbound", "-z"}, {s.TunnelPort, "tunnel", "-e"}} {
		if p.port == 0 {
			return fmt.Errorf("%s 0: the %s port is one from 1 to 65535", p.flag, p.name)
		}
		if other, ok := taken[p.port]; ok {
			return fmt.Errorf("%s %d: the %s port and the %s port are the same; use different ones", p.flag, p.port, other, p.name)
		}
		taken[p.port] = p.name
	}
	return nil
}
