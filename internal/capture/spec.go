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
	IPv6WhenFirst IPv6Choice = "first" // as istio-iptables without --dual-stack: if the first global address is IPv6
	IPv6WhenUsed  IPv6Choice = "used"  // as istio-iptables with --dual-stack: if there is a global IPv6 address
)

// Spec defines what is captured and where it goes. It is plain data: policy derives the rules from it, and the agent
// reads the ports to which it must not forward. The zero Spec is invalid; start from Default.
type Spec struct {
	// Mode is how inbound connections are captured.
	Mode Mode
	// Compat selects the verdicts of istio-iptables where they are debatable. In TPROXY mode the tunnel port is captured,
	// and the agent's users reach their own workload by redirection. With DNS capture, TCP to port 53 over the loopback is
	// treated like any other destination, and the agent's queries there like its other calls, except for users in REDIRECT
	// mode. In REDIRECT mode DropInvalid ignores InterfacesExcluded. Bugs of istio-iptables are fixed in either case.
	Compat bool
	// IPv6 is when there are rules for IPv6.
	IPv6 IPv6Choice

	// OutboundPort is where connections that the workload opens are redirected. Zero is invalid.
	OutboundPort uint16
	// InboundPort is where connections that others open to the workload are redirected. Zero is invalid.
	InboundPort uint16
	// TunnelPort is never captured inbound: its listener accepts whole tunnels. Zero is invalid.
	TunnelPort uint16

	// ProxyUIDs are users whose connections are not captured, so that the agent does not capture its own.
	ProxyUIDs []IDRange
	// ProxyGIDs are groups with the same effect. At least one user or group is required.
	ProxyGIDs []IDRange

	// Inbound are the destination ports captured inbound. The zero value captures nothing.
	Inbound Ports
	// InboundExcluded are not captured if Inbound is all ports. As in istio-iptables, a list of ports ignores them.
	InboundExcluded []PortRange

	// Outbound are the destination networks captured. The zero value captures nothing.
	Outbound Prefixes
	// OutboundExcluded are destination networks that are not captured.
	OutboundExcluded []netip.Prefix
	// OutboundPorts are destination ports captured at every address that is not excluded.
	OutboundPorts []PortRange
	// OutboundPortsExcluded are destination ports that are not captured at any address, including DNS. They precede all
	// other rules.
	OutboundPortsExcluded []PortRange
	// OwnerGroups are the groups whose outbound connections are captured. The zero value captures no group.
	OwnerGroups Groups
	// OwnerGroupsExcluded are not captured if OwnerGroups is all groups. They are ignored otherwise.
	OwnerGroupsExcluded []IDRange
	// Localhost4 are the workload's own IPv4 loopback addresses. IPv6 has only ::1.
	Localhost4 netip.Prefix

	// InterfacesExcluded are not captured in either direction. A trailing + is a wildcard, as in iptables.
	InterfacesExcluded []string
	// VirtualInterfaces lead to virtual machines in the pod: connections that arrive there are outbound. They override
	// InterfacesExcluded.
	VirtualInterfaces []string

	// DropInvalid drops packets that conntrack calls INVALID, before the kernel answers them with a reset.
	DropInvalid bool

	// RedirectDNS captures DNS over UDP and TCP and redirects it to DNSPort: queries to DNSServers, or to any address with
	// CaptureAllDNS. Without either of them it captures nothing.
	RedirectDNS   bool
	CaptureAllDNS bool
	DNSServers    []netip.Addr

	// TPROXYMark is the packet mark that selects TPROXYTable. The only route in that table delivers locally.
	TPROXYMark  uint32
	TPROXYTable uint32
}

// CapturesDNS reports whether DNS is captured in any family. Excluding port 53 disables it.
func (s Spec) CapturesDNS() bool {
	excluded := slices.ContainsFunc(s.OutboundPortsExcluded, func(r PortRange) bool { return r.Contains(53) })
	return s.RedirectDNS && (s.CaptureAllDNS || len(s.DNSServers) > 0) && !excluded
}

// CapturesInboundByTPROXY reports whether marks and policy routing are needed.
func (s Spec) CapturesInboundByTPROXY() bool { return s.Mode == TPROXY && !s.Inbound.None() }

// DefaultProxyID is the agent's default user and group.
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

// OwnPorts returns the ports at which the agent itself listens, sorted. A connection to one of them at one of this
// workload's own addresses is a loop; at another host's address it is ordinary traffic.
func (s Spec) OwnPorts() []uint16 {
	ports := []uint16{AdminPort, s.OutboundPort, s.InboundPort, StatusPort, ReadinessPort, DNSPort, MetricsPort}
	slices.Sort(ports)
	return ports
}

// LoopMark marks the agent's connections to the workload's own service in TPROXY mode, and the connections that the
// agent has. It cannot be TPROXYMark.
const LoopMark = 1338

// MaxOwnerGroups is the maximum length of OwnerGroups.List, as in istio-iptables. Excluded groups have no limit.
const MaxOwnerGroups = 64

// FieldError reports an invalid or unusable value in a configuration. It names the field, because only the caller can
// map a field to the flag, variable or annotation that set it.
type FieldError struct {
	Field string // its path in the configuration, such as "OutboundPort" in a Spec
	Value string // empty when Err has it
	Other string // path of the field that this one conflicts with, if any; Err ends where its name belongs
	Err   error
}

func (e *FieldError) Error() string { return e.Text(func(field string) string { return field }) }

func (e *FieldError) Unwrap() error { return e.Err }

// Text is the error with fields named by name.
func (e *FieldError) Text(name func(field string) string) string {
	text := name(e.Field)
	if e.Value != "" {
		text += " " + e.Value
	}
	text += ": " + e.Err.Error()
	if e.Other != "" {
		text += " " + name(e.Other)
	}
	return text
}

// Validate checks what parsers and types do not. Its errors are FieldErrors with the remedy.
func (s Spec) Validate() error {
	if err := s.validatePorts(); err != nil {
		return err
	}
	for _, ports := range []named[PortRange]{
		{"Inbound", s.Inbound.List}, {"InboundExcluded", s.InboundExcluded},
		{"OutboundPorts", s.OutboundPorts}, {"OutboundPortsExcluded", s.OutboundPortsExcluded},
	} {
		for _, r := range ports.list {
			if r.First == 0 || r.Last < r.First {
				return &FieldError{Field: ports.field, Value: r.String(), Err: errors.New("a port range must begin at 1 or above and must not descend")}
			}
		}
	}
	if err := s.validateIDs(); err != nil {
		return err
	}
	for _, networks := range []named[netip.Prefix]{{"Outbound", s.Outbound.List}, {"OutboundExcluded", s.OutboundExcluded}} {
		if slices.ContainsFunc(networks.list, func(p netip.Prefix) bool { return !p.IsValid() }) {
			return &FieldError{Field: networks.field, Err: errors.New("a network is not set")}
		}
	}
	if _, err := ParseLocalhost4(s.Localhost4.String()); err != nil {
		return &FieldError{Field: "Localhost4", Err: err}
	}
	for _, interfaces := range []named[string]{{"InterfacesExcluded", s.InterfacesExcluded}, {"VirtualInterfaces", s.VirtualInterfaces}} {
		for _, name := range interfaces.list {
			if _, err := ParseInterface(name); err != nil {
				return &FieldError{Field: interfaces.field, Err: err}
			}
		}
	}
	if slices.ContainsFunc(s.DNSServers, func(a netip.Addr) bool { return !a.IsValid() }) {
		return &FieldError{Field: "DNSServers", Err: errors.New("a DNS server is not set")}
	}
	return s.validateMode()
}

// named is a list and its field.
type named[T any] struct {
	field string
	list  []T
}

func (s Spec) validateIDs() error {
	if len(s.ProxyUIDs)+len(s.ProxyGIDs) == 0 {
		return &FieldError{Field: "ProxyUIDs", Other: "ProxyGIDs",
			Err: errors.New("name a user or a group, or the agent's own connections would be captured; a group is named by")}
	}
	for _, ids := range []named[IDRange]{
		{"ProxyUIDs", s.ProxyUIDs}, {"ProxyGIDs", s.ProxyGIDs}, {"OwnerGroups", s.OwnerGroups.List}, {"OwnerGroupsExcluded", s.OwnerGroupsExcluded},
	} {
		for _, r := range ids.list {
			if r.Last == noID || r.Last < r.First {
				return &FieldError{Field: ids.field, Value: r.String(),
					Err: fmt.Errorf("a user or group is a number from 0 to %d, and a range must not descend", uint32(noID-1))}
			}
		}
	}
	if listed := len(s.OwnerGroups.List); listed > MaxOwnerGroups {
		return &FieldError{Field: "OwnerGroups",
			Err: fmt.Errorf("lists %d groups; at most %d are possible; write neighbours as a range such as 2000-2010", listed, MaxOwnerGroups)}
	}
	return nil
}

func (s Spec) validateMode() error {
	switch s.Mode {
	case Redirect:
		return nil
	case TPROXY:
	default:
		return &FieldError{Field: "Mode", Err: fmt.Errorf("%s is not a mode; use %s or %s", Quoted(string(s.Mode)), Redirect, TPROXY)}
	}
	if s.TPROXYMark == 0 || s.TPROXYMark == LoopMark {
		return &FieldError{Field: "TPROXYMark", Value: fmt.Sprint(s.TPROXYMark),
			Err: fmt.Errorf("use a mark other than 0 and %d; the rules use %[1]d themselves", LoopMark)}
	}
	if s.TPROXYTable == 0 || 253 <= s.TPROXYTable && s.TPROXYTable <= 255 {
		return &FieldError{Field: "TPROXYTable", Value: fmt.Sprint(s.TPROXYTable),
			Err: errors.New("use a separate routing table; 0 and 253 to 255 belong to the kernel")}
	}
	return nil
}

// validatePorts refuses two listeners on one port: the second could not bind, and captured traffic would go to the wrong
// one.
func (s Spec) validatePorts() error {
	taken := map[uint16]string{
		AdminPort: "the admin port", StatusPort: "the status port", ReadinessPort: "the readiness port", DNSPort: "the DNS port",
		MetricsPort: "the metrics port",
	}
	for _, p := range []struct {
		port        uint16
		field, name string
	}{{s.OutboundPort, "OutboundPort", "the outbound port"}, {s.InboundPort, "InboundPort", "the inbound port"}, {s.TunnelPort, "TunnelPort", "the tunnel port"}} {
		if p.port == 0 {
			return &FieldError{Field: p.field, Value: "0", Err: errors.New("use a port from 1 to 65535")}
		}
		if other, ok := taken[p.port]; ok {
			return &FieldError{Field: p.field, Value: fmt.Sprint(p.port), Err: fmt.Errorf("this is %s already; use another port", other)}
		}
		taken[p.port] = p.name
	}
	return nil
}
