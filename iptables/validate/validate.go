// Package validate verifies installed rules by opening connections that they must capture.
package validate

import (
	"cmp"
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/iptables"
	"github.com/pillion-proxy/pillion/iptables/kernel"
	"github.com/pillion-proxy/pillion/iptables/policy"
	"github.com/pillion-proxy/pillion/iptables/ruleset"
	"github.com/pillion-proxy/pillion/iptables/trace"
)

// Capture verifies by connections, in the network namespace of the calling thread, that the rules for spec are in
// effect: inbound, outbound and DNS, in each family, as far as spec captures them. It listens at the agent's ports,
// opens connections that must be redirected there, and retries until all of them have arrived or too little time is
// left before ctx ends. The error names those that did not arrive. unproven lists what this process cannot try, with
// the reason.
//
// The outbound probe must run as a captured user and the inbound probe as the agent's user, so a process that may
// change its user does that for its sockets. With permission to read the rules, it dials only what they redirect, and
// no packet leaves the namespace. Without it, an uncaptured probe packet is dropped at the first router: its TTL is 1.
func Capture(ctx context.Context, spec capture.Spec, port uint16) (unproven []string, err error) {
	v := validation{spec: spec, port: port}
	if v.capabilities, err = kernel.EffectiveCapabilities(); err != nil {
		return nil, err
	}
	state, err := kernel.ReadIPv6()
	if err != nil {
		return nil, err
	}
	wanted, err := state.Wanted(spec.IPv6)
	if err != nil {
		return nil, err
	}
	_, err = iptables.Look(ctx)
	v.readable = !kernel.IsRefused(err)
	v.plan(ruleset.IPv4)
	if wanted {
		if !state.Source {
			v.pending = append(v.pending, &proof{name: "inbound ipv6", err: fmt.Errorf("%s is missing on %s", capture.InboundSource6, ruleset.Loopback)})
		}
		v.plan(ruleset.IPv6)
	}
	if len(v.pending) == 0 {
		return nil, fmt.Errorf("no connection can be tried: %s", strings.Join(v.unproven(), "; "))
	}
	ticker := time.NewTicker(probeInterval)
	defer ticker.Stop()
	for {
		err := v.attempt(ctx)
		deadline, limited := ctx.Deadline()
		if err == nil || limited && time.Until(deadline) < probeInterval { // too little time for another attempt
			return v.unproven(), err
		}
		select {
		case <-ctx.Done():
			return v.unproven(), err
		case <-ticker.C:
		}
	}
}

const (
	probeInterval = time.Second
	leastShare    = probeInterval / 2
)

// validation is one run of Capture.
type validation struct {
	spec         capture.Spec
	port         uint16
	capabilities uint64
	readable     bool // the rules in force can be read
	pending      []*proof
	untried      []*proof
}

// proof is a connection that has to arrive at the agent.
type proof struct {
	name   string
	packet trace.Packet
	want   trace.Verdict
	// obstacle is why this process cannot open the connection. The rules in force are traced instead, if they are
	// readable.
	obstacle string
	err      error
}

// plan finds connections that prove a family's rules.
func (v *validation) plan(family ruleset.Family) {
	f, s := ruleset.AddressesOf(family), v.spec
	rules := policy.Rules(s, family)
	here := []netip.Addr{f.InboundSource.Addr()}
	if _, own, err := kernel.RouteTo(ruleset.Discard(family).Addr(), netip.Addr{}, 0); err == nil {
		here = append(here, own)
	}
	away := []netip.Addr{ruleset.Discard(family).Addr()}
	for _, prefix := range s.Outbound.List {
		if address := prefix.Addr().Next(); family.Owns(prefix) && prefix.Contains(address) {
			away = append(away, address)
		}
	}
	agent := []identity{{first(s.ProxyUIDs), first(s.ProxyGIDs)}, {0, first(s.ProxyGIDs)}}
	others := []identity{{nobody, nobody}, {nobody, first(s.OwnerGroups.List)}}

	in, out := trace.Verdict{Action: trace.Redirected, Port: s.InboundPort}, trace.Verdict{Action: trace.Redirected, Port: s.OutboundPort}
	if s.Mode == capture.TPROXY {
		in.Action = trace.Given
	}
	ports := func(listed []capture.PortRange) []uint16 {
		ports := []uint16{v.port}
		for _, r := range listed {
			ports = append(ports, r.First)
		}
		return ports
	}
	if !s.Inbound.None() {
		v.prove("inbound", rules, ruleset.TCP, in, agent, here, ports(s.Inbound.List))
	}
	if !s.Outbound.None() || len(s.OutboundPorts) > 0 {
		v.prove("outbound", rules, ruleset.TCP, out, others, away, ports(s.OutboundPorts))
	}
	if s.CapturesDNS() {
		servers := append([]netip.Addr{f.Localhost.Addr()}, s.DNSServers...)
		for _, protocol := range []ruleset.Protocol{ruleset.UDP, ruleset.TCP} {
			v.prove("DNS over "+string(protocol), rules, protocol, trace.Verdict{Action: trace.Redirected, Port: capture.DNSPort}, others, servers, []uint16{ruleset.DNSPort})
		}
	}
}

const nobody = 65534

// identity is a user and a group.
type identity struct{ uid, gid uint32 }

func first(ids []capture.IDRange) uint32 {
	if len(ids) == 0 {
		return nobody
	}
	return ids[0].First
}

// prove finds a connection for which the rules have the verdict want, preferably one that this process can open.
func (v *validation) prove(what string, rules ruleset.Ruleset, protocol ruleset.Protocol, want trace.Verdict, users []identity, to []netip.Addr, ports []uint16) {
	p := &proof{name: what + " " + rules.Family.String(), want: want, obstacle: "the rules capture no destination that has a route"}
	users = append([]identity{self()}, users...)
	for _, address := range to {
		link, src, err := kernel.RouteTo(address, netip.Addr{}, 0)
		if ruleset.FamilyOf(address) != rules.Family || err != nil {
			continue
		}
		if link == ruleset.Loopback {
			src = ruleset.AddressesOf(rules.Family).Localhost.Addr()
		}
		for _, port := range ports {
			for _, user := range users {
				packet := trace.Packet{Protocol: protocol, Out: link, UID: user.uid, GID: user.gid, Src: src, Dst: netip.AddrPortFrom(address, port)}
				if p.obstacle == "" || trace.Of(rules, packet).Verdict != want {
					continue
				}
				if obstacle := v.obstacle(user, want); obstacle == "" || !p.packet.Dst.IsValid() {
					p.packet, p.obstacle = packet, obstacle
				}
			}
		}
	}
	if p.obstacle != "" {
		v.untried = append(v.untried, p)
	}
	if p.obstacle == "" || p.packet.Dst.IsValid() && v.readable {
		v.pending = append(v.pending, p)
	}
}

// unproven lists what was not tried. Proofs with the same obstacle share a line.
func (v *validation) unproven() []string {
	var told []string
	for _, p := range v.untried {
		reason := " not tried: " + p.obstacle
		if at := slices.IndexFunc(told, func(text string) bool { return strings.HasSuffix(text, reason) }); at >= 0 {
			told[at] = strings.TrimSuffix(told[at], reason) + ", " + p.name + reason
		} else {
			told = append(told, p.name+reason)
		}
	}
	return told
}

// self returns this process's user and group.
func self() identity { return identity{uint32(os.Geteuid()), uint32(os.Getegid())} }

// obstacle returns why this process cannot open a connection as user, or cannot receive it.
func (v *validation) obstacle(user identity, want trace.Verdict) string {
	switch {
	case user != self() && !v.has(unix.CAP_SETUID, unix.CAP_SETGID):
		return fmt.Sprintf("needs user %d and group %d, or CAP_SETUID and CAP_SETGID", user.uid, user.gid)
	case want.Action == trace.Given && !v.has(unix.CAP_NET_ADMIN):
		return "needs CAP_NET_ADMIN to listen for TPROXY"
	}
	return ""
}

func (v *validation) has(bits ...int) bool {
	return !slices.ContainsFunc(bits, func(bit int) bool { return v.capabilities&(1<<bit) == 0 })
}

// attempt tries the pending proofs one after the other: sockets must be created on the calling thread.
func (v *validation) attempt(ctx context.Context) error {
	var live iptables.Live
	if v.readable {
		var err error
		if live, err = iptables.Look(context.WithoutCancel(ctx)); err != nil { // the programs have their own time limit
			return err
		}
	}
	var failures []string
	left := len(v.pending)
	v.pending = slices.DeleteFunc(v.pending, func(p *proof) bool {
		if p.packet.Dst.IsValid() {
			if p.err = nil; v.readable {
				p.err = p.look(live)
			}
			if p.err == nil && p.obstacle == "" {
				p.err = p.try(ctx, left)
			}
		}
		left--
		if p.err != nil {
			failures = append(failures, fmt.Sprintf("%s: %v", p.name, p.err))
		}
		return p.err == nil
	})
	if len(failures) == 0 {
		return nil
	}
	return fmt.Errorf("not captured: %s", strings.Join(failures, "; "))
}

// look traces the connection through the rules in force.
func (p *proof) look(live iptables.Live) error {
	walk := trace.Trace(p.packet, live.Held...)
	if walk.Verdict == p.want {
		return nil
	}
	return fmt.Errorf("in the rules in force, traffic of user %d to %s is %s", p.packet.UID, p.packet.Dst, walk.InWords(p.packet))
}

// try opens the connection and waits for it at the agent's port. The time limit is remaining/left, so that one failure
// does not starve the others, and at least leastShare.
func (p *proof) try(ctx context.Context, left int) error {
	share := probeInterval
	if deadline, ok := ctx.Deadline(); ok {
		share = min(share, max(leastShare, time.Until(deadline)/time.Duration(left)))
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), share)
	defer cancel()
	at := netip.AddrPortFrom(ruleset.AddressesOf(ruleset.FamilyOf(p.packet.Dst.Addr())).Localhost.Addr(), p.want.Port)
	listening := net.ListenConfig{Control: beside}
	if p.want.Action == trace.Given {
		at = netip.AddrPortFrom(ruleset.AddressesOf(ruleset.FamilyOf(p.packet.Dst.Addr())).Anywhere, p.want.Port)
		listening.Control = transparently
	}
	arrived, closer, err := p.listen(ctx, listening, at.String())
	if err != nil {
		return err
	}
	defer closer()
	from := net.Dialer{Control: nearby}
	if p.packet.Protocol == ruleset.UDP {
		from.LocalAddr = net.UDPAddrFromAddrPort(netip.AddrPortFrom(p.packet.Src, 0))
	} else {
		from.LocalAddr = net.TCPAddrFromAddrPort(netip.AddrPortFrom(p.packet.Src, 0))
	}
	var conn net.Conn
	err = as(p.packet.UID, p.packet.GID, func() (err error) {
		conn, err = from.DialContext(ctx, string(p.packet.Protocol), p.packet.Dst.String())
		return err
	})
	if err != nil {
		return fmt.Errorf("user %d: %w", p.packet.UID, err)
	}
	defer conn.Close()
	if p.packet.Protocol == ruleset.UDP {
		if _, err := conn.Write([]byte("pillion")); err != nil {
			return err
		}
	}
	if err := arrived(conn.LocalAddr().String()); err != nil {
		return fmt.Errorf("traffic of user %d to %s did not reach port %d: %w", p.packet.UID, p.packet.Dst, p.want.Port, err)
	}
	return nil
}

// listen listens at the agent's port. arrived waits for a connection or packet from the given address.
func (p *proof) listen(ctx context.Context, config net.ListenConfig, at string) (arrived func(from string) error, closer func() error, err error) {
	deadline, _ := ctx.Deadline()
	config.SetMultipathTCP(false)
	if p.packet.Protocol == ruleset.UDP {
		packets, err := config.ListenPacket(ctx, "udp", at)
		if err != nil {
			return nil, nil, err
		}
		return func(from string) error {
			packets.SetReadDeadline(deadline)
			for buffer := make([]byte, 16); ; {
				if _, sender, err := packets.ReadFrom(buffer); err != nil || sender.String() == from {
					return err
				}
			}
		}, packets.Close, nil
	}
	listener, err := config.Listen(ctx, "tcp", at)
	if err != nil {
		return nil, nil, err
	}
	return func(from string) error {
		listener.(*net.TCPListener).SetDeadline(deadline)
		for {
			conn, err := listener.Accept()
			if err != nil {
				return err
			}
			conn.Close()
			if conn.RemoteAddr().String() == from {
				return nil
			}
		}
	}, listener.Close, nil
}

// as runs fn on a thread whose new sockets belong to this user and group. The rules match the owner of the socket;
// setfsuid(2) changes only this thread.
func as(uid, gid uint32, fn func() error) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	const ask = -1
	oldGID, _ := unix.SetfsgidRetGid(int(gid))
	oldUID, _ := unix.SetfsuidRetUid(int(uid))
	defer func() { unix.SetfsgidRetGid(oldGID) }()
	defer func() { unix.SetfsuidRetUid(oldUID) }()
	nowGID, _ := unix.SetfsgidRetGid(ask)
	nowUID, _ := unix.SetfsuidRetUid(ask)
	if nowUID != int(uid) || nowGID != int(gid) {
		return fmt.Errorf("becoming user %d and group %d for a socket: %w", uid, gid, unix.EPERM)
	}
	return fn()
}

// beside lets the probe listen where the agent already listens.
func beside(_, _ string, c syscall.RawConn) error {
	return set(c, option{unix.SOL_SOCKET, unix.SO_REUSEADDR}, option{unix.SOL_SOCKET, unix.SO_REUSEPORT})
}

// transparently is beside for a socket that receives connections from TPROXY.
func transparently(network, _ string, c syscall.RawConn) error {
	level := option{unix.SOL_IP, unix.IP_TRANSPARENT}
	if strings.HasSuffix(network, "6") {
		level = option{unix.SOL_IPV6, unix.IPV6_TRANSPARENT}
	}
	return set(c, option{unix.SOL_SOCKET, unix.SO_REUSEADDR}, option{unix.SOL_SOCKET, unix.SO_REUSEPORT}, level)
}

// nearby limits packets to the first router.
func nearby(network, _ string, c syscall.RawConn) error {
	if strings.HasSuffix(network, "6") {
		return set(c, option{unix.SOL_IPV6, unix.IPV6_UNICAST_HOPS})
	}
	return set(c, option{unix.SOL_IP, unix.IP_TTL})
}

type option struct{ level, name int }

// set sets socket options to 1.
func set(c syscall.RawConn, options ...option) (err error) {
	controlErr := c.Control(func(fd uintptr) {
		for _, o := range options {
			err = cmp.Or(err, unix.SetsockoptInt(int(fd), o.level, o.name, 1))
		}
	})
	return cmp.Or(controlErr, err)
}
