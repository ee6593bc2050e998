package e2e

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

// newTPROXYStage returns a stage with TPROXY for inbound connections, with an agent as Istio's injector starts it.
func newTPROXYStage(t testing.TB, flags ...string) *stage {
	t.Helper()
	nettest.RequireRoot(t)
	s := &stage{tproxy: true}
	s.pod, s.peer = nettest.PodAndPeer(t)
	programTPROXY(t, s.pod)
	s.agent = launchAgentBy(t, s.pod, borrowing(0), append(flags, "--interception-mode", "TPROXY")...)
	awaitReady(t, s.pod, s.agent)
	return s
}

// borrowing is the beginning of a command line that runs a command as a user of the agent's group, with the one capability
// that is needed to use clients' addresses. Only root keeps it across exec.
func borrowing(uid int) []string {
	return []string{
		"setpriv", "--reuid", fmt.Sprint(uid), "--regid", fmt.Sprint(agentUID), "--clear-groups",
		"--bounding-set", "-all,+net_admin", "--inh-caps=-all", "--no-new-privs",
	}
}

// programTPROXY runs init in the pod with the arguments of Istio's injector.
func programTPROXY(t testing.TB, pod *nettest.Namespace) {
	t.Helper()
	arguments := slices.Clone(initArguments)
	arguments[slices.Index(arguments, "REDIRECT")] = "TPROXY"
	if stdout, stderr, code := execute(t, pod, []string{pathWith(t, nft)}, arguments...); code != 0 {
		t.Fatalf("pillion init: exit code %d\n%s%s", code, stdout, stderr)
	}
}

// borrowed are the ways on which the workload sees its client's address.
func (s *stage) borrowed() []way { return s.ways()[:2] }

// In each test below, way.connect or the server of a dialogue checks that the workload sees its client's address.
func TestTPROXYCarriesConnections(t *testing.T) {
	t.Parallel()
	s := newTPROXYStage(t)
	s.everyWay(t, func(t *testing.T, w way) {
		t.Run("half-close by downstream", func(t *testing.T) {
			downstream, upstream := w.connect(t)
			halfClose(t, downstream, upstream)
		})
		t.Run("half-close by upstream", func(t *testing.T) {
			downstream, upstream := w.connect(t)
			halfClose(t, upstream, downstream)
		})
		t.Run("reset by downstream", func(t *testing.T) {
			downstream, upstream := w.connect(t)
			converse(t, downstream, upstream)
			reset(t, downstream)
			if _, err := upstream.Read(make([]byte, 1)); !isReset(err) {
				t.Errorf("upstream sees %v, want a reset", err)
			}
		})
		t.Run("reset by upstream", func(t *testing.T) {
			downstream, upstream := w.connect(t)
			converse(t, downstream, upstream)
			reset(t, upstream)
			if _, err := downstream.Read(make([]byte, 1)); !isReset(err) {
				t.Errorf("downstream sees %v, want a reset", err)
			}
		})
		t.Run("refused", func(t *testing.T) {
			address := netip.AddrPortFrom(w.address, 9).String()
			if err := tryConnection(w.from, address); !isReset(err) && !isRefused(err) {
				t.Errorf("downstream sees %v, want a reset", err)
			}
			s.agent.log.await(t, "original_destination="+address, "reason=upstream_refused")
		})
		t.Run("server first", func(t *testing.T) {
			downstream, upstream := w.connect(t)
			writes(t, upstream, "220 at your service")
			reads(t, downstream, "220 at your service")
		})
		t.Run("record", func(t *testing.T) {
			downstream, upstream := w.connect(t)
			converse(t, downstream, upstream)
			downstream.Close()
			upstream.Close()
			line := s.agent.log.await(t, `msg="connection closed"`, "downstream="+downstream.LocalAddr().String())
			for key, want := range map[string]string{
				"original_destination": upstream.LocalAddr().String(),
				"upstream_local":       upstream.RemoteAddr().String(),
			} {
				if got := attribute(t, line, key); got != want {
					t.Errorf("%s: got %s, want %s", key, got, want)
				}
			}
		})
		for _, http2 := range []bool{false, true} {
			t.Run(fmt.Sprintf("HTTP, 2: %v", http2), func(t *testing.T) {
				handler := func(response http.ResponseWriter, r *http.Request) {
					response.Header().Set("X-Recorded", r.Header.Get("X-Forwarded-For"))
					echo(response, r)
				}
				d := newDialogue(t, w, http2, handler)
				for serial := range 20 {
					want := strings.Repeat(fmt.Sprint(serial), 10_000)
					response := d.do(t, d.request(t, "POST", "/", strings.NewReader(want)))
					if got := text(t, response); got != want {
						t.Fatalf("request %d was answered %.100q", serial, got)
					}
					if got := response.Header.Get("X-Recorded"); w.to == s.pod && got != w.seenAs.String() {
						t.Errorf("X-Forwarded-For is %q, want %v", got, w.seenAs)
					}
				}
			})
		}
	})
}

func TestTPROXYWithTwoHundredConnectionsOfOneClient(t *testing.T) {
	t.Parallel()
	s := newTPROXYStage(t)
	for _, w := range s.borrowed() {
		t.Run(w.name, func(t *testing.T) {
			listener := w.to.Listen(t, "tcp", netip.AddrPortFrom(w.address, 0).String())
			serveEach(t, listener, func(conn net.Conn) {
				if seen := conn.RemoteAddr().(*net.TCPAddr).AddrPort().Addr(); seen != w.seenAs {
					t.Errorf("the workload sees %v, want %v", seen, w.seenAs)
				}
				io.Copy(conn, conn)
			})
			var clients sync.WaitGroup
			for serial := range 200 {
				clients.Go(func() {
					if err := askEcho(w.from, listener.Addr().String(), serial); err != nil {
						t.Errorf("connection %d: %v", serial, err)
					}
				})
			}
			clients.Wait()
		})
	}
}

// A pooled connection has the address of its client, so another client must not use it.
func TestTPROXYUpstreamConnectionServesOneClientAddress(t *testing.T) {
	t.Parallel()
	s := newTPROXYStage(t, "--upstream-idle-timeout", "1m")
	w := s.borrowed()[0]
	address := netip.AddrPortFrom(w.address, 8080)
	listener := w.to.Listen(t, "tcp", address.String())
	serveEach(t, listener, func(conn net.Conn) {
		requests := bufio.NewReader(conn)
		for {
			request, err := http.ReadRequest(requests)
			if err != nil {
				return
			}
			seen := conn.RemoteAddr().String()
			fmt.Fprintf(conn, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", len(seen), seen)
			request.Body.Close()
		}
	})
	asks := func(source netip.Addr) (seen netip.AddrPort) {
		out, err := w.from.Run(w.from.Command(0, 0, "curl", "--silent", "--show-error", "--fail", "--noproxy", "*",
			"--max-time", "60", "--interface", source.String(), "http://"+address.String()))
		if err != nil {
			t.Fatal(err)
		}
		return netip.MustParseAddrPort(out)
	}
	known := map[netip.AddrPort]bool{}
	nettest.Eventually(t, "a client's connection is used for its next one", func() bool { // after the agent has seen curl's close
		seen := asks(nettest.PeerIP4)
		if seen.Addr() != nettest.PeerIP4 {
			t.Errorf("a client at %v is seen as %v", nettest.PeerIP4, seen)
		}
		again := known[seen]
		known[seen] = true
		return again
	})
	if other := asks(nettest.Elsewhere4); other.Addr() != nettest.Elsewhere4 {
		t.Errorf("a client at %v is seen as %v", nettest.Elsewhere4, other)
	}
}

// A connection of the agent's group to the pod's own address is a call of the workload's own service, and is inbound like
// any other.
func TestTPROXYCallOfOwnServiceHasThePodsAddress(t *testing.T) {
	t.Parallel()
	s := newTPROXYStage(t)
	for _, own := range []netip.Addr{nettest.PodIP4, nettest.PodIP6} {
		address := netip.AddrPortFrom(own, 8080)
		listener := s.pod.Listen(t, "tcp", address.String())
		serveEach(t, listener, func(conn net.Conn) { fmt.Fprint(conn, conn.RemoteAddr()) })
		out, err := s.pod.Run(s.pod.Command(workloadUID, agentUID, "timeout", "60", "bash", "-c",
			fmt.Sprintf("exec 3<>/dev/tcp/%s/%d && cat <&3", own, address.Port())))
		if err != nil {
			t.Fatal(err)
		}
		line := s.agent.log.await(t, "original_destination="+address.String(), "reason=closed")
		if seen := netip.MustParseAddrPort(out); seen.Addr() != own || seen.String() != attribute(t, line, "upstream_local") {
			t.Errorf("the workload sees %v: %s", seen, line)
		}
	}
}

func TestTPROXYRefusesForeignAddress(t *testing.T) {
	t.Parallel()
	s := newTPROXYStage(t)
	for _, foreign := range []struct{ address, gateway netip.Addr }{
		{netip.MustParseAddr("203.0.113.99"), nettest.PodIP4},
		{netip.MustParseAddr("2001:db8:9::99"), nettest.PodIP6},
	} {
		s.peer.MustRun(t, "ip", "route", "add", foreign.address.String(), "via", foreign.gateway.String())
		dst := netip.AddrPortFrom(foreign.address, 80).String()
		nettest.Eventually(t, dst+" is refused by name", func() bool { // one in a second is logged
			if err := tryConnection(s.peer, dst); !isReset(err) && !isRefused(err) {
				t.Fatalf("%s: the other side sees %v, want a reset", dst, err)
			}
			return len(s.agent.log.lines(`msg="connection refused"`, "reason=foreign_address", "original_destination="+dst)) > 0
		})
	}
	for _, port := range ownPorts {
		if dst := netip.AddrPortFrom(nettest.PodIP4, port).String(); port != 15008 && !served(nettest.PodIP4, port) {
			if err := tryConnection(s.peer, dst); !isReset(err) && !isRefused(err) {
				t.Errorf("%s: the other side sees %v, want a reset", dst, err)
			}
		}
	}
	assertQuiet(t, s.agent)
}

// The mode of a pod changes by an agent and its rules, one after the other.
func TestTPROXYAgentServesRedirectedConnections(t *testing.T) {
	t.Parallel()
	nettest.RequireRoot(t)
	s := &stage{}
	s.pod, s.peer = nettest.PodAndPeer(t)
	initPod(t, s.pod, nft)
	s.agent = launchAgentBy(t, s.pod, borrowing(0), "--interception-mode", "TPROXY")
	awaitReady(t, s.pod, s.agent)
	s.everyWay(t, func(t *testing.T, w way) {
		downstream, upstream := w.connect(t)
		converse(t, downstream, upstream)
	})
}

func TestTPROXYDrain(t *testing.T) {
	t.Parallel()
	s := newTPROXYStage(t, "--drain-delay", "200ms", "--drain-timeout", "1h")
	w := s.borrowed()[1]
	downstream, upstream := w.connect(t)
	converse(t, downstream, upstream)
	greeter := w.to.Listen(t, "tcp", netip.AddrPortFrom(w.address, 0).String())
	serveEach(t, greeter, func(conn net.Conn) { fmt.Fprint(conn, "hello") })
	if err := tryConnection(w.from, greeter.Addr().String()); err != nil {
		t.Fatal(err)
	}
	s.agent.Signal(syscall.SIGTERM)
	nettest.Eventually(t, "new connections are reset", func() bool {
		return isReset(tryConnection(w.from, greeter.Addr().String()))
	})
	s.agent.log.await(t, "msg=draining", "inbound_left=1")
	converse(t, downstream, upstream)
	downstream.Close()
	upstream.Close()
	if code := s.agent.ends(t, nettest.Patience); code != 0 {
		t.Errorf("exit code %d, want 0; log:\n%s", code, s.agent.log)
	}
}

func TestTPROXYAgentHasOneCapability(t *testing.T) {
	t.Parallel()
	s := newTPROXYStage(t)
	for key, want := range map[string]string{
		"Uid": "0\t0\t0\t0", "Gid": "1337\t1337\t1337\t1337", "CapEff": "0000000000001000", "CapBnd": "0000000000001000",
	} {
		if got := s.agent.status(t, key); got != want {
			t.Errorf("%s is %q, want %q", key, got, want)
		}
	}
	_, dump := get(t, s.pod, "http://127.0.0.1:15000/config_dump?resource=static_listeners")
	var shown struct {
		Configs []struct {
			Listener struct {
				Name        string `json:"name"`
				Transparent bool   `json:"transparent"`
			} `json:"listener"`
		} `json:"configs"`
	}
	if err := json.Unmarshal([]byte(dump), &shown); err != nil || len(shown.Configs) == 0 {
		t.Fatalf("%v: %s", err, dump)
	}
	for _, c := range shown.Configs {
		if c.Listener.Transparent != (c.Listener.Name == "virtualInbound") {
			t.Errorf("%s, transparent: %v", c.Listener.Name, c.Listener.Transparent)
		}
	}
}

// An agent that cannot provide the requested mode reports the reason and does not start.
func TestTPROXYAgentWithoutCapabilityExits(t *testing.T) {
	t.Parallel()
	nettest.RequireRoot(t)
	pod := nettest.New(t, "pod")
	for _, c := range []struct {
		name     string
		wrapper  []string
		variable string
		code     int
		want     []string
	}{
		{"user 1337", borrowing(agentUID), "PILLION_INTERCEPTION_MODE", 2,
			[]string{"--interception-mode TPROXY", "as user 1337", "run it as user 0 and group 1337", "NET_ADMIN"}},
		{"no capability", unprivileged(workloadUID), "ISTIO_META_INTERCEPTION_MODE", 1,
			[]string{"--interception-mode TPROXY", "needs the capability NET_ADMIN", "securityContext", "use REDIRECT"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			var complaint bytes.Buffer
			words := append(c.wrapper, pillion, "agent")
			cmd := pod.Command(0, 0, words[0], words[1:]...)
			cmd.Env = append(os.Environ(), c.variable+"=TPROXY")
			cmd.Stderr = &complaint
			p := pod.Start(t, cmd)
			code, err := p.Wait(nettest.Patience)
			if err != nil || code != c.code {
				t.Fatalf("exit code %d, %v, want %d", code, err, c.code)
			}
			last := strings.TrimSpace(complaint.String())
			last = last[strings.LastIndex(last, "\n")+1:]
			for _, want := range c.want {
				if !strings.Contains(last, want) {
					t.Errorf("stderr lacks %q: %s", want, &complaint)
				}
			}
		})
	}
}
