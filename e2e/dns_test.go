package e2e

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/miekg/dns"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

// nameServer is a DNS server, usually at the peer and on port 53 of its addresses.
type nameServer struct {
	queries chan string // "transport name" of each query
}

func startNameServer(t *testing.T, ns *nettest.Namespace, addresses ...netip.Addr) *nameServer {
	t.Helper()
	var at []netip.AddrPort
	for _, address := range addresses {
		at = append(at, netip.AddrPortFrom(address, 53))
	}
	return startNameServerAt(t, ns, at...)
}

func startNameServerAt(t *testing.T, ns *nettest.Namespace, addresses ...netip.AddrPort) *nameServer {
	t.Helper()
	s := &nameServer{queries: make(chan string, 1000)}
	for _, address := range addresses {
		at := address.String()
		listener := ns.Listen(t, "tcp", at)
		var packets net.PacketConn
		ns.Do(t, func() (err error) {
			packets, err = net.ListenPacket("udp", at)
			return err
		})
		for _, server := range []*dns.Server{{Listener: listener, Handler: s}, {PacketConn: packets, Handler: s}} {
			done := make(chan struct{})
			go func() {
				defer close(done)
				server.ActivateAndServe()
			}()
			t.Cleanup(func() {
				server.Shutdown()
				<-done
			})
		}
	}
	return s
}

// ServeDNS answers for good.example, evil.example, web.example, cdn.example and many.example (200 addresses), and does not answer
// for silent.example. cdn.example has the address of good.example.
func (s *nameServer) ServeDNS(w dns.ResponseWriter, query *dns.Msg) {
	name := query.Question[0].Name
	s.queries <- w.LocalAddr().Network() + " " + name
	reply := new(dns.Msg).SetReply(query)
	address := func(i int) {
		reply.Answer = append(reply.Answer, &dns.A{
			Hdr: dns.RR_Header{Name: name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 60}, A: net.IPv4(203, 0, 113, byte(i)),
		})
	}
	size := dns.MinMsgSize
	if opt := query.IsEdns0(); opt != nil {
		size = int(opt.UDPSize())
		reply.SetEdns0(4096, false)
	}
	switch name {
	case "web.example.":
		address(80)
	case "good.example.", "cdn.example.", "www.good.example.":
		address(81)
	case "evil.example.":
		address(66)
	case "many.example.":
		for i := range 200 {
			address(i)
		}
	case "silent.example.":
		return
	default:
		reply.Rcode = dns.RcodeNameError
	}
	if w.LocalAddr().Network() == "udp" {
		reply.Truncate(size)
	}
	w.WriteMsg(reply)
}

// asked returns the number of queries for a name since the last call. An agent repeats a query whose answer is slow.
func (s *nameServer) asked(name string) (n int) {
	for len(s.queries) > 0 {
		if strings.HasSuffix(<-s.queries, " "+name) {
			n++
		}
	}
	return n
}

// newDNSStage sets a stage whose DNS is captured, and whose resolv.conf names servers.
func newDNSStage(t *testing.T, servers ...netip.Addr) *stage {
	t.Helper()
	nettest.RequireRoot(t)
	s := &stage{}
	s.pod, s.peer = nettest.PodAndPeer(t)
	s.captureDNS(t, "auto", servers...)
	return s
}

// captureDNS runs init in the pod and starts the agent there.
func (s *stage) captureDNS(t *testing.T, backend string, servers ...netip.Addr) {
	t.Helper()
	dir := t.TempDir()
	if err := os.Chmod(filepath.Dir(dir), 0o755); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "resolv.conf")
	text := ""
	for _, server := range servers {
		text += "nameserver " + server.String() + "\n"
	}
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	mounted := []string{"unshare", "--mount", "--propagation", "private", "sh", "-c",
		fmt.Sprintf("mount --bind %s /etc/resolv.conf && exec \"$@\"", file), "sh"}
	words := append(append(mounted[1:len(mounted):len(mounted)], pillion), append(slices.Clone(initArguments), "--redirect-dns", "--backend", backend)...)
	if out, err := s.pod.Run(s.pod.Command(0, 0, mounted[0], words...)); err != nil {
		t.Fatalf("pillion init: %v\n%s", err, out)
	}
	s.agent = launchAgent(t, s.pod, mounted, "--dns-capture")
	awaitReady(t, s.pod, s.agent)
}

// ask sends a query from the pod to a server.
func (s *stage) ask(t *testing.T, network string, server netip.Addr, name string, size uint16) *dns.Msg {
	t.Helper()
	conn, err := s.pod.Dial(network, netip.AddrPortFrom(server, 53).String(), nettest.Patience)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	query := new(dns.Msg).SetQuestion(name, dns.TypeA)
	if size > 0 {
		query.SetEdns0(size, false)
	}
	client := &dns.Client{Net: network, Timeout: nettest.Patience, UDPSize: size}
	reply, _, err := client.ExchangeWithConn(query, &dns.Conn{Conn: conn, UDPSize: size})
	if err != nil {
		t.Fatalf("%s over %s: %v", name, network, err)
	}
	return reply
}

// answered is ask for a server that answers. Like a resolver, it asks again after SERVFAIL, which is what a client gets if the server
// is held up for longer than the agent waits.
func (s *stage) answered(t *testing.T, network string, server netip.Addr, name string, size uint16) (reply *dns.Msg) {
	t.Helper()
	nettest.Eventually(t, "an answer about "+name, func() bool {
		reply = s.ask(t, network, server, name, size)
		return reply.Rcode != dns.RcodeServerFailure
	})
	return reply
}

func TestCapturedDNSIsAnswered(t *testing.T) {
	t.Parallel()
	servers := []netip.Addr{nettest.PeerIP4, nettest.PeerIP6}
	s := newDNSStage(t, servers...)
	upstream := startNameServer(t, s.peer, servers...)
	for serial, server := range servers {
		for _, c := range []struct {
			network, name string
			size          uint16
			rcode, n      int
			truncated     bool
		}{
			{network: "udp", name: "web.example.", n: 1},
			{network: "tcp", name: "web.example.", n: 1},
			{network: "udp", name: "none.example.", rcode: dns.RcodeNameError},
			{network: "udp", name: "many.example.", size: 4096, n: 200},
			{network: "tcp", name: "many.example.", n: 200},
			{network: "udp", name: "many.example.", truncated: true},
		} {
			reply := s.answered(t, c.network, server, c.name, c.size)
			if reply.Rcode != c.rcode || reply.Truncated != c.truncated || !c.truncated && len(reply.Answer) != c.n {
				t.Errorf("%s over %s from %v: %d answers, %s, truncated: %v", c.name, c.network, server, len(reply.Answer),
					dns.RcodeToString[reply.Rcode], reply.Truncated)
			}
		}
		// The second server's answers come from the cache, so the agent answers and not the dialled server.
		if n := upstream.asked("web.example."); (n > 0) != (serial == 0) {
			t.Errorf("%d queries for web.example. reach the upstream server while %v is asked", n, server)
		}
	}
	s.agent.log.await(t, "msg=query", "name=web.example.", "rcode=NOERROR", "cached=true")
	// Other connections are still carried.
	for _, w := range s.ways() {
		downstream, upstream := w.connect(t)
		converse(t, downstream, upstream)
	}
}

// A name server that does not answer or does not exist is reported as SERVFAIL.
func TestUnresponsiveNameServerIsSERVFAIL(t *testing.T) {
	t.Parallel()
	s := newDNSStage(t, nettest.PeerIP4)
	if reply := s.ask(t, "udp", nettest.PeerIP4, "web.example.", 0); reply.Rcode != dns.RcodeServerFailure {
		t.Errorf("without a server: %s", dns.RcodeToString[reply.Rcode])
	}
	startNameServer(t, s.peer, nettest.PeerIP4)
	if reply := s.ask(t, "udp", nettest.PeerIP4, "silent.example.", 0); reply.Rcode != dns.RcodeServerFailure {
		t.Errorf("of a silent server: %s", dns.RcodeToString[reply.Rcode])
	}
}

// Docker's resolver listens at 127.0.0.11, and rules in the container translate between port 53 and its ports.
func TestDNSIsCapturedBesideDockersResolver(t *testing.T) {
	t.Parallel()
	nettest.RequireRoot(t)
	resolver := netip.MustParseAddr("127.0.0.11")
	for _, backend := range []string{"iptables-nft", "iptables-legacy", "nftables"} {
		for _, docker := range []string{nft, legacy} {
			t.Run(backend+" beside "+docker, func(t *testing.T) {
				s := &stage{}
				s.pod, s.peer = nettest.PodAndPeer(t)
				upstream := startNameServerAt(t, s.pod, netip.AddrPortFrom(resolver, 39321))
				for _, rule := range []string{
					"-N DOCKER_OUTPUT", "-N DOCKER_POSTROUTING", "-I OUTPUT -d 127.0.0.11 -j DOCKER_OUTPUT", "-I POSTROUTING -d 127.0.0.11 -j DOCKER_POSTROUTING",
					"-A DOCKER_OUTPUT -d 127.0.0.11 -p udp --dport 53 -j DNAT --to-destination 127.0.0.11:39321",
					"-A DOCKER_POSTROUTING -s 127.0.0.11 -p udp --sport 39321 -j SNAT --to-source :53",
					"-A DOCKER_OUTPUT -d 127.0.0.11 -p tcp --dport 53 -j DNAT --to-destination 127.0.0.11:39321",
					"-A DOCKER_POSTROUTING -s 127.0.0.11 -p tcp --sport 39321 -j SNAT --to-source :53",
				} {
					s.pod.MustRun(t, requireProgram(t, "iptables-"+docker), append([]string{"-t", "nat"}, strings.Fields(rule)...)...)
				}
				s.captureDNS(t, backend, resolver)
				for serial := range 3 {
					for network, name := range map[string]string{"udp": "web.example.", "tcp": "many.example."} {
						if reply := s.answered(t, network, resolver, name, 0); len(reply.Answer) == 0 {
							t.Errorf("%s over %s: %s without answers", name, network, dns.RcodeToString[reply.Rcode])
						}
					}
					if n := upstream.asked("web.example."); (n > 0) != (serial == 0) { // then the agent's cache has the answer
						t.Errorf("round %d: %d queries for web.example. reach Docker's resolver", serial, n)
					}
				}
			})
		}
	}
}
