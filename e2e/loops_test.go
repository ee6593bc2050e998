package e2e

import (
	"bytes"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/internal/nettest"
)

// ownPorts are all ports of pillion, also those where it does not listen in this test.
var ownPorts = []uint16{
	capture.AdminPort, capture.OutboundPort, capture.InboundPort, capture.TunnelPort, capture.StatusPort,
	capture.ReadinessPort, capture.DNSPort, capture.MetricsPort,
}

func TestDiallingOwnPortsDoesNotLoop(t *testing.T) {
	t.Parallel()
	for _, flavour := range []string{nft, legacy, native} {
		t.Run(flavour, func(t *testing.T) {
			s := newStageIn(t, flavour)
			local := []netip.Addr{netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("127.0.0.2"), netip.IPv6Loopback()}
			own := []netip.Addr{nettest.PodIP4, nettest.PodIP6}
			before := s.agent.descriptors(t)
			for _, from := range []struct {
				name      string
				namespace *nettest.Namespace
				uid       int
				to        []netip.Addr
			}{
				{"outside", s.peer, workloadUID, own},
				{"inside", s.pod, workloadUID, append(own, local...)},
				{"the agent's own user", s.pod, agentUID, append(own, local...)},
			} {
				for _, address := range from.to {
					for _, port := range ownPorts {
						dst := netip.AddrPortFrom(address, port).String()
						ended, answer := dialAs(t, from.namespace, from.uid, dst)
						if served(address, port) {
							continue
						}
						if !ended || answer != "" {
							t.Errorf("%s to %s: ended: %v, answered %q; want a refused connection", from.name, dst, ended, answer)
						}
					}
				}
			}
			s.agent.log.await(t, `msg="connection refused"`, "reason=loop")
			if !nettest.Within(nettest.Patience, func() bool { return s.agent.descriptors(t) <= before }) {
				t.Errorf("%d descriptors leaked", s.agent.descriptors(t)-before)
			}
			assertQuiet(t, s.agent)
			converse2 := func(w way) { d, u := w.connect(t); converse(t, d, u) }
			converse2(s.inbound())
			converse2(s.outbound())
		})
	}
}

// served reports whether the agent itself answers on the port.
func served(address netip.Addr, port uint16) bool {
	switch port {
	case capture.ReadinessPort, capture.StatusPort, capture.MetricsPort:
		return true
	case capture.AdminPort:
		return address == netip.MustParseAddr("127.0.0.1") || address == netip.IPv6Loopback()
	}
	return false
}

// dialAs connects as a user and reads until the end. It returns whether the connection ended by itself, and the bytes read.
func dialAs(t *testing.T, ns *nettest.Namespace, uid int, address string) (ended bool, answer string) {
	t.Helper()
	host, port, _ := strings.Cut(strings.TrimPrefix(address, "["), "]:")
	if port == "" {
		host, port, _ = strings.Cut(address, ":")
	}
	cmd := ns.Command(uint32(uid), uint32(uid), "timeout", "60", "bash", "-c",
		fmt.Sprintf("exec 3<>/dev/tcp/%s/%s && printf 'GET / HTTP/1.0\r\n\r\n' >&3 && cat <&3", host, port))
	var out, complaint bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &complaint
	ns.Run(cmd)
	return cmd.ProcessState.ExitCode() != 124, out.String() // 124 is timeout's own
}

// assertQuiet fails the test unless an idle agent soon uses less than a fifth of one CPU for half a second. A spinning loop
// would use a whole one.
func assertQuiet(t *testing.T, a *agent) {
	t.Helper()
	const window = 500 * time.Millisecond
	since, before := time.Now(), a.cpu(t)
	nettest.Eventually(t, "the idle agent uses no CPU", func() bool {
		elapsed := time.Since(since)
		if elapsed < window {
			return false
		}
		used := a.cpu(t) - before
		since, before = time.Now(), before+used
		return used < elapsed/5
	})
}

// Prometheus in one pod scrapes port 15090 of another pod: our port numbers have no special meaning at other hosts.
func TestOwnPortNumbersAtOtherHostsAreCarried(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	for _, w := range s.ways()[2:] {
		for _, port := range ownPorts {
			listener := w.to.Listen(t, "tcp", netip.AddrPortFrom(w.address, port).String())
			downstream, upstream := w.connectTo(t, listener.(*net.TCPListener))
			converse(t, downstream, upstream)
		}
	}
}

func TestInboundConnectionForForeignAddressIsRefused(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	for _, foreign := range []struct{ address, gateway netip.Addr }{
		{netip.MustParseAddr("203.0.113.99"), nettest.PodIP4},
		{netip.MustParseAddr("2001:db8:9::99"), nettest.PodIP6},
	} {
		s.peer.MustRun(t, "ip", "route", "add", foreign.address.String(), "via", foreign.gateway.String())
		dst := netip.AddrPortFrom(foreign.address, 80).String()
		// Each is refused, but only one per second is logged.
		nettest.Eventually(t, dst+" is refused by name", func() bool {
			if err := tryConnection(s.peer, dst); !isReset(err) && !isRefused(err) {
				t.Fatalf("%s: the other side sees %v, want a reset", dst, err)
			}
			return len(s.agent.log.lines(`msg="connection refused"`, "reason=foreign_address", "original_destination="+dst)) > 0
		})
	}
	assertQuiet(t, s.agent)
}

func TestInboundIPv6WithoutItsSourceAddressIsRefused(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	ipv6 := s.ways()[1]
	s.pod.MustRun(t, "ip", "address", "del", "::6/128", "dev", "lo")
	var err error
	nettest.Eventually(t, "the agent notices that ::6 is gone", func() bool {
		err = tryConnection(ipv6.from, netip.AddrPortFrom(ipv6.address, 9).String())
		return len(s.agent.log.lines("reason=ipv6_source_missing")) > 0
	})
	if !isReset(err) && !isRefused(err) {
		t.Errorf("downstream sees %v, want a reset", err)
	}
	downstream, upstream := s.inbound().connect(t)
	converse(t, downstream, upstream)

	s.pod.MustRun(t, "ip", "address", "add", "::6/128", "dev", "lo")
	nettest.Eventually(t, "the agent notices that ::6 is back", func() bool {
		before := len(s.agent.log.lines("reason=upstream_refused"))
		tryConnection(ipv6.from, netip.AddrPortFrom(ipv6.address, 9).String())
		return nettest.Within(100*time.Millisecond, func() bool { return len(s.agent.log.lines("reason=upstream_refused")) > before })
	})
	downstream, upstream = ipv6.connect(t)
	converse(t, downstream, upstream)
}

// The addresses of a workload may change while it runs.
func TestNewAddressIsServed(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	later := s.inbound()
	later.address = netip.MustParseAddr("198.51.100.77")
	s.pod.AddAddress(t, "eth0", netip.PrefixFrom(later.address, 24))
	nettest.Eventually(t, "the new address is served", func() bool {
		tryConnection(later.from, netip.AddrPortFrom(later.address, 9).String())
		return len(s.agent.log.lines("original_destination=198.51.100.77:9", "reason=upstream_refused")) > 0
	})
	downstream, upstream := later.connect(t)
	converse(t, downstream, upstream)
}
