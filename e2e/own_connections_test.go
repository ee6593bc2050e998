package e2e

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/internal/nettest"
)

// otherUID is a user that the rules do not exempt. An agent that runs as it captures its own connections.
const otherUID = 2000

// sendAndRead dials address, sends a text and reads to the end. A reset ends it as well.
func sendAndRead(t *testing.T, from *nettest.Namespace, address, text string) string {
	t.Helper()
	conn, err := from.Dial("tcp", address, nettest.Patience)
	if isReset(err) {
		return "reset"
	} else if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(nettest.Patience))
	if _, err := io.WriteString(conn, text); isReset(err) {
		return "reset" // the kernel reports it once, and a read then returns the end
	}
	answer, err := io.ReadAll(conn)
	if len(answer) == 0 && isReset(err) {
		return "reset"
	}
	return string(answer)
}

// loopCause is the log line about a loop.
const loopCause = `msg="the rules capture the agent's own connections`

func TestAnAgentWhoseUserIsNotExemptReportsTheLoopAndServesOn(t *testing.T) {
	t.Parallel()
	for _, flavour := range []string{nft, native} {
		t.Run(flavour, func(t *testing.T) {
			t.Parallel()
			nettest.RequireRoot(t)
			s := &stage{}
			s.pod, s.peer = nettest.PodAndPeer(t)
			initPod(t, s.pod, flavour)
			s.agent = launchAgentBy(t, s.pod, unprivileged(otherUID), "--opaque-ports", "5432", "--detection-delay", "2s") // in which the clients send
			awaitReady(t, s.pod, s.agent)
			s.agent.log.await(t, "neither user nor group 1337", "uid=2000")
			before := s.agent.descriptors(t)

			const request = "GET /item HTTP/1.1\r\nHost: shop.example\r\nConnection: close\r\n\r\n"
			const each = 5
			for _, address := range []netip.Addr{nettest.Elsewhere4, nettest.Elsewhere6} {
				for _, c := range []struct {
					port       uint16
					sent, want string
				}{
					{80, request, "HTTP/1.1 503 "},
					{80, "POST" + request[3:], "HTTP/1.1 503 "},
					{9, "hello, opaque protocol\n", "reset"},
					{9, "", "reset"}, // a protocol in which the server sends first
					{5432, "any bytes", "reset"},
				} {
					to, times := netip.AddrPortFrom(address, c.port).String(), each
					if c.sent == "" {
						times = 1 // it takes the delay for each connection of the loop
					}
					for range times {
						if got := sendAndRead(t, s.pod, to, c.sent); !strings.HasPrefix(got, c.want) {
							t.Fatalf("%q to %s: %q, want %q", c.sent, to, got, c.want)
						}
					}
				}
			}
			s.agent.access.await(t, `"GET /item HTTP/1.1" 503 UH no_healthy_upstream`)
			s.agent.log.await(t, "reason=loop", "error=", "protocol=opaque")
			nettest.Eventually(t, "descriptors to be closed", func() bool { return s.agent.descriptors(t) <= before })
			if lines := s.agent.log.lines(loopCause); len(lines) != 1 || !strings.Contains(lines[0], fmt.Sprintf("uid=%d", otherUID)) ||
				!strings.Contains(lines[0], "--proxy-uid") {
				t.Errorf("%d lines about the loop, want one with the user and the remedy:\n%s", len(lines), strings.Join(lines, "\n"))
			}
			if lines := s.agent.log.lines(`msg="connection refused"`); len(lines) > 0 {
				t.Errorf("more lines about the loop:\n%s", strings.Join(lines, "\n"))
			}
			// Each connection of the workload has three records, its own and those of two connections that came back, and now
			// and then a fourth one.
			if records, most := len(s.agent.log.lines("reason=loop")), 2*(4*each+1)*4; records > most {
				t.Errorf("%d connections looped, want at most %d", records, most)
			}
			assertQuiet(t, s.agent)

			// Inbound connections are dialled from an address that the rules let pass, whatever the user.
			downstream, upstream := s.inbound().connect(t)
			converse(t, downstream, upstream)
		})
	}
}

// Our rules let the agent's connections to the workload pass, whatever its user. A rule of somebody else may not.
func TestARuleThatCapturesInboundsOwnConnectionsIsReportedAsALoop(t *testing.T) {
	t.Parallel()
	s := newStage(t, patientWithClients...)
	s.pod.MustRun(t, requireProgram(t, "xtables-nft-multi"), "iptables", "-t", "nat", "-I", "OUTPUT",
		"-s", capture.InboundSource4.String(), "-p", "tcp", "-j", "REDIRECT", "--to-ports", "15006")
	before := s.agent.descriptors(t)
	for range 5 {
		for _, c := range []struct{ sent, want string }{
			{"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", "HTTP/1.1 503 "}, {"opaque bytes\n", "reset"},
		} {
			if got := sendAndRead(t, s.peer, netip.AddrPortFrom(nettest.PodIP4, 8080).String(), c.sent); !strings.HasPrefix(got, c.want) {
				t.Fatalf("%q: %q, want %q", c.sent, got, c.want)
			}
		}
	}
	s.agent.log.await(t, "reason=loop", "direction=inbound")
	nettest.Eventually(t, "descriptors to be closed", func() bool { return s.agent.descriptors(t) <= before })
	if lines := s.agent.log.lines(loopCause); len(lines) != 1 || !strings.Contains(lines[0], "rules check") {
		t.Errorf("%d lines about the loop, want one with the remedy:\n%s", len(lines), strings.Join(lines, "\n"))
	}
}

// When a client uses one source port for two destinations, conntrack gives the second redirected connection a random source
// port. A rule makes it that of one of the agent's own connections to the same destination.
func TestAConnectionWithThePortOfAnOwnConnectionIsNoLoop(t *testing.T) {
	t.Parallel()
	s := newStage(t, "--opaque-ports", "9")
	iptables := requireProgram(t, "xtables-nft-multi")
	listener := s.peer.Listen(t, "tcp", netip.AddrPortFrom(nettest.Elsewhere4, 9).String()).(*net.TCPListener)
	for i, received := range []bool{false, true} {
		first, own := s.outbound().connectTo(t, listener)
		if received {
			converse(t, first, own)
		}
		clientPort := strconv.Itoa(2000 + i)
		s.pod.MustRun(t, iptables, "iptables", "-t", "nat", "-I", "POSTROUTING", "-o", "lo", "-p", "tcp", "--sport", clientPort,
			"-j", "SNAT", "--to-source", own.RemoteAddr().String())
		var second net.Conn
		s.pod.Do(t, func() (err error) {
			from := netip.MustParseAddrPort(nettest.PodIP4.String() + ":" + clientPort)
			dialer := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(from), Timeout: nettest.Patience}
			second, err = dialer.Dial("tcp", listener.Addr().String())
			return err
		})
		defer second.Close()
		second.SetDeadline(time.Now().Add(nettest.Patience))
		listener.SetDeadline(time.Now().Add(nettest.Patience))
		other, err := listener.Accept()
		if err != nil {
			t.Fatal(err)
		}
		converse(t, second, other)
		second.Close()
		other.Close()
		s.agent.log.await(t, "downstream="+own.RemoteAddr().String(), "reason=closed")
		converse(t, first, own)
	}
	if lines := s.agent.log.lines(loopCause); len(lines) > 0 {
		t.Errorf("a loop is reported:\n%s", strings.Join(lines, "\n"))
	}
}
