package outbound

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/internal/serve/servetest"
)

// The servers of a service. The peer chooses one for each connection to the service's address, by DNAT as kube-proxy does.
var backends = []netip.Addr{
	netip.MustParseAddr("203.0.113.11"), netip.MustParseAddr("203.0.113.12"), netip.MustParseAddr("203.0.113.13"),
}

// service is a rig whose server address is a service's.
type service struct{ *servetest.Rig }

// newService starts a server at port 80 of each backend. It answers each request with its own address.
func newService(t *testing.T, change func(*servetest.Rig)) service {
	t.Helper()
	settings := servetest.Defaults()
	// An attempt may take a third of this: less than the second after which the kernel sends a SYN again, and the rules below
	// choose again.
	settings.ConnectTimeout = 2 * time.Second
	r := servetest.NewRig(t, place(), settings)
	if change != nil {
		change(r)
	}
	for _, backend := range backends {
		r.Peer.AddAddress(t, "lo", netip.PrefixFrom(backend, 32))
		serveName(t, r.Peer.Listen(t, "tcp4", netip.AddrPortFrom(backend, 80).String()), backend.String())
	}
	return service{r}
}

func serveName(t *testing.T, listener net.Listener, name string) {
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, name) })}
	served := make(chan struct{})
	go func() {
		defer close(served)
		server.Serve(listener)
	}()
	t.Cleanup(func() { server.Close(); <-served })
}

// choose appends a rule that sends new connections to the service's port to a backend. match restricts the rule.
func (s service) choose(t *testing.T, port int, backend netip.AddrPort, match ...string) {
	t.Helper()
	rule := []string{"-t", "nat", "-A", "PREROUTING", "-p", "tcp", "-d", s.Address.String(), "--dport", fmt.Sprint(port)}
	rule = append(rule, match...)
	s.Peer.MustRun(t, "iptables", append(rule, "-j", "DNAT", "--to-destination", backend.String())...)
}

// get sends a request and returns the backend that answered it.
func get(t *testing.T, conn net.Conn) string {
	t.Helper()
	servetest.Send(t, conn, "GET / HTTP/1.1\r\nHost: service\r\n\r\n")
	response, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatal(err)
	}
	body, err := io.ReadAll(response.Body)
	if err != nil || response.StatusCode != 200 {
		t.Fatalf("status %d, %q, %v", response.StatusCode, body, err)
	}
	return string(body)
}

// direct connects without the agent.
func (s service) direct(t *testing.T) net.Conn {
	t.Helper()
	conn, err := s.Client.Dial("tcp4", s.At(80).String(), nettest.Patience)
	if err != nil {
		t.Fatal(err)
	}
	return conn
}

// A client that opens a connection for each request is spread over the servers of a service as it is without the agent.
func TestEachConnectionToAServiceGetsAServerOfItsOwn(t *testing.T) {
	const connections = 300
	s := newService(t, nil)
	s.choose(t, 80, netip.AddrPortFrom(backends[0], 80), "-m", "statistic", "--mode", "random", "--probability", "0.3333")
	s.choose(t, 80, netip.AddrPortFrom(backends[1], 80), "-m", "statistic", "--mode", "random", "--probability", "0.5")
	s.choose(t, 80, netip.AddrPortFrom(backends[2], 80))
	spread := func(connect func() net.Conn, closed func()) map[string]int {
		count := make(map[string]int)
		for range connections {
			conn := connect()
			count[get(t, conn)]++
			conn.Close()
			closed()
		}
		return count
	}
	direct := spread(func() net.Conn { return s.direct(t) }, func() {})
	carried := spread(func() net.Conn { return s.Dial(t, s.At(80)) }, func() { s.Await(t) })
	t.Logf("%d connections: direct %v, carried %v", connections, direct, carried)
	for _, backend := range backends {
		// The mean is 100. A number below 50 has a probability of 10⁻¹⁰.
		if name := backend.String(); direct[name] < 50 || carried[name] < 50 {
			t.Errorf("%s served %d direct and %d carried connections of %d", name, direct[name], carried[name], connections)
		}
	}
}

// After a selector has moved, new connections reach the new servers at once, and an open connection stays where it is.
func TestAfterAServiceHasMovedNewConnectionsReachItsNewServer(t *testing.T) {
	s := newService(t, nil)
	old, current := backends[0].String(), backends[1].String()
	s.choose(t, 80, netip.AddrPortFrom(backends[0], 80))
	kept := s.Dial(t, s.At(80))
	for range 10 {
		conn := s.Dial(t, s.At(80))
		if got := get(t, conn); got != old {
			t.Fatalf("%s answered before the move", got)
		}
		conn.Close()
	}
	if got := get(t, kept); got != old {
		t.Fatalf("%s answered before the move", got)
	}
	s.Peer.MustRun(t, "iptables", "-t", "nat", "-F", "PREROUTING")
	s.choose(t, 80, netip.AddrPortFrom(backends[1], 80))
	for range 10 {
		conn := s.Dial(t, s.At(80))
		if got := get(t, conn); got != current {
			t.Errorf("%s answered a connection that was opened after the move", got)
		}
		conn.Close()
	}
	if got := get(t, kept); got != old {
		t.Errorf("%s answered on the connection that was opened before the move", got)
	}
}

// Every second connection to the service reaches a backend that does not accept it. The agent's next attempt reaches the
// other one.
func TestADialToAServiceIsAttemptedAgain(t *testing.T) {
	for name, dead := range map[string]netip.AddrPort{
		"a backend that refuses":    netip.AddrPortFrom(backends[0], 9),
		"a backend that is silent":  netip.MustParseAddrPort("203.0.113.14:80"),
		"a host that has gone away": netip.MustParseAddrPort("203.0.113.15:80"),
	} {
		t.Run(name, func(t *testing.T) {
			s := newService(t, func(r *servetest.Rig) {
				r.Peer.AddAddress(t, "lo", netip.MustParsePrefix("203.0.113.14/32"))
				r.Peer.MustRun(t, "iptables", "-A", "INPUT", "-d", "203.0.113.14", "-j", "DROP")
				r.Peer.MustRun(t, "iptables", "-A", "INPUT", "-d", "203.0.113.15", "-j", "REJECT", "--reject-with", "icmp-host-unreachable")
				r.Peer.AddAddress(t, "lo", netip.MustParsePrefix("203.0.113.15/32"))
			})
			// attempted returns the record of what use does. On a machine that pauses, the kernel may send the first SYN again before
			// the agent's next attempt; that has no part in this test.
			attempted := func(port uint16, use func(client net.Conn)) servetest.Ended {
				for tries := 1; ; tries++ {
					s.Peer.MustRun(t, "iptables", "-t", "nat", "-F", "PREROUTING")
					s.choose(t, int(port), dead, "-m", "statistic", "--mode", "nth", "--every", "2", "--packet", "0")
					s.choose(t, int(port), netip.AddrPortFrom(backends[1], port))
					began := time.Now()
					use(s.Dial(t, s.At(port)))
					if got := s.Await(t); got.Attempts != 1 || time.Since(began) < time.Second || tries == 5 {
						return got
					}
				}
			}
			if got := attempted(80, func(client net.Conn) {
				if got := get(t, client); got != backends[1].String() {
					t.Errorf("%s answered", got)
				}
			}); got.Attempts != 2 || got.Reason != flow.Completed {
				t.Errorf("the record of the request is %+v", got)
			}

			listener := s.Peer.Listen(t, "tcp4", netip.AddrPortFrom(backends[1], 81).String())
			if got := attempted(81, func(client net.Conn) {
				servetest.Send(t, client, "\x00opaque")
				server, err := listener.Accept()
				if err != nil {
					t.Fatal(err)
				}
				defer server.Close()
				servetest.Expect(t, server, "\x00opaque")
				client.Close()
			}); got.Attempts != 2 || got.Protocol != flow.Opaque {
				t.Errorf("the record of the connection is %+v", got)
			}
		})
	}
}

// When every attempt fails, downstream learns of it.
func TestADialIsAttemptedThreeTimes(t *testing.T) {
	r := servetest.NewRig(t, place(), servetest.Defaults())
	client := r.Dial(t, r.At(9))
	servetest.Send(t, client, "GET / HTTP/1.1\r\nHost: a\r\n\r\n")
	response, err := http.ReadResponse(bufio.NewReader(client), nil)
	if err != nil || response.StatusCode != 503 {
		t.Errorf("the client got %v, %v", response, err)
	}
	if got := r.Await(t); got.Attempts != 3 || got.Reason != flow.UpstreamRefused {
		t.Errorf("the record is %+v", got)
	}
}
