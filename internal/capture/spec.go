package capture

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
)

// Spec says what is captured and where it goes. It is plain data: the rules are made from it, and the agent finds in it
// the ports that it must not forward to. The zero Spec is not valid; Default is.
type Spec struct {
	// OutboundPort is where connections that the workload opens are redirected. Zero is invalid.
	OutboundPort uint16
	// InboundPort is where connections that others open to the workload are redirected. Zero is invalid.
	InboundPort uint16
	// TunnelPort is never captured inbound: its listener takes whole tunnels. Zero is invalid.
	TunnelPort uint16

	// ProxyUIDs are the users whose connections are left alone, so that the agent does not capture itself.
	ProxyUIDs []uint32
	// ProxyGIDs are groups left alone in the same way. At least one user or group is needed.
	ProxyGIDs []uint32

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
	// OutboundPortsExcluded are destination ports left alone whatever the address. They come before everything else.
	OutboundPortsExcluded []PortRange

	// InterfacesExcluded are left alone in both directions. A name that ends in + stands for every interface whose name
	// begins so, as in iptables.
	InterfacesExcluded []string
}

// DefaultProxyID is the user and the group of the agent when nobody says otherwise.
const DefaultProxyID = 1337

// Default is what istio-iptables captures without arguments: nothing, in either direction, with the usual ports.
func Default() Spec {
	return Spec{
		OutboundPort: OutboundPort,
		InboundPort:  InboundPort,
		TunnelPort:   TunnelPort,
		ProxyUIDs:    []uint32{DefaultProxyID},
		ProxyGIDs:    []uint32{DefaultProxyID},
	}
}

// OwnPorts are the ports at which the agent itself listens, sorted. A connection to one of them at one of this
// workload's own addresses is a loop; at another host's address it is ordinary traffic.
func (s Spec) OwnPorts() []uint16 {
	ports := []uint16{AdminPort, s.OutboundPort, s.InboundPort, StatusPort, ReadinessPort, DNSPort, MetricsPort}
	slices.Sort(ports)
	return ports
}

// Validate finds what the types cannot rule out. Its errors name the value and say what would be right.
func (s Spec) Validate() error {
	if err := s.validatePorts(); err != nil {
		return err
	}
	if len(s.ProxyUIDs)+len(s.ProxyGIDs) == 0 {
		return errors.New("no proxy user and no proxy group: the agent's own connections would be captured; name one")
	}
	if slices.Contains(s.ProxyUIDs, noID) || slices.Contains(s.ProxyGIDs, noID) {
		return fmt.Errorf("%d is not a user or group: the kernel keeps it for \"none\"", uint32(noID))
	}
	for _, ranges := range [][]PortRange{
		s.Inbound.List, s.InboundExcluded, s.OutboundPorts, s.OutboundPortsExcluded,
	} {
		for _, r := range ranges {
			if r.First == 0 || r.Last < r.First {
				return fmt.Errorf("ports %s: a range goes from a port that is not 0 upwards", r)
			}
		}
	}
	for _, prefix := range slices.Concat(s.Outbound.List, s.OutboundExcluded) {
		if !prefix.IsValid() {
			return errors.New("an outbound network is not set")
		}
	}
	for _, name := range s.InterfacesExcluded {
		if _, err := ParseInterface(name); err != nil {
			return err
		}
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
		port uint16
		name string
	}{{s.OutboundPort, "outbound"}, {s.InboundPort, "inbound"}, {s.TunnelPort, "tunnel"}} {
		if p.port == 0 {
			return fmt.Errorf("the %s port is 0: use one from 1 to 65535", p.name)
		}
		if other, ok := taken[p.port]; ok {
			return fmt.Errorf("the %s port and the %s port are both %d: use different ones", other, p.name, p.port)
		}
		taken[p.port] = p.name
	}
	return nil
}
