package e2e

import (
	"bufio"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

// arrangement is the back end of init's rules and the mode of inbound connections.
type arrangement struct{ backend, mode string }

// arrangements is a sequence of all arrangements in which each follows each once, including itself. It ends where it began.
func arrangements() (walk []arrangement) {
	var all []arrangement
	for _, backend := range []string{"iptables-nft", "iptables-legacy", "nftables"} {
		all = append(all, arrangement{backend, "REDIRECT"}, arrangement{backend, "TPROXY"})
	}
	for i, a := range all {
		walk = append(walk, a)
		for _, b := range all[i+1:] {
			walk = append(walk, a, b)
		}
	}
	return append(walk, all[0])
}

// manners are sets of arguments that select captured traffic. With each of them, the traffic of workingPod is captured.
var manners = [][][]string{
	{{"-b", "*", "-d", "15090,15021,15020"}, {"-b", "8080,9000"}, {"-b", "8000:9999"}, {"-b", "*", "-d", "22,4000:4100"}},
	{{"-i", "*"}, {"-i", "*", "-x", "192.0.2.0/24,2001:db8:99::/64"}, {"-i", nettest.Elsewhere4.String() + "/32," + nettest.Elsewhere6.String() + "/128"},
		{"-i", "", "-q", "8080,9000"}, {"-i", "*", "-o", "4444,6000:6010"}},
	{{}, {"ISTIO_OUTBOUND_OWNER_GROUPS=0,1000"}, {"ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE=4242"}},
}

// rearrange runs init for the arrangement, each time with other arguments.
func rearrange(t *testing.T, pod *nettest.Namespace, a arrangement, serial int) (output string) {
	t.Helper()
	args := []string{"init", "-p", "15001", "-z", "15006", "-u", "1337", "-m", a.mode, "--backend", a.backend}
	args = append(append(args, manners[0][serial%4]...), manners[1][serial%5]...)
	env := append([]string{initEnvironment}, manners[2][serial%3]...)
	stdout, stderr, code := execute(t, pod, env, args...)
	if code != 0 {
		t.Fatalf("pillion %s: exit code %d\n%s%s", strings.Join(args, " "), code, stdout, stderr)
	}
	return stdout + stderr
}

// workingPod is a pod with an agent for TPROXY and continuous traffic in each direction.
type workingPod struct {
	*stage
	// arranged is even while the rules are those of walk[arranged/2-1], and odd while they change.
	arranged atomic.Int64
	walk     []arrangement
	asked    atomic.Int64
	rounds   []atomic.Int64 // of each way
}

// talk is a downstream connection with one question and one answer at a time, as lines or HTTP.
type talk struct {
	net.Conn
	answers *bufio.Reader
	http    bool
	asked   int
	opened  string // under which arrangement
}

// ask sends a question and returns the client address in the answer, or an error.
func (c *talk) ask() (seen netip.AddrPort, err error) {
	c.asked++
	c.SetDeadline(time.Now().Add(nettest.Patience))
	if !c.http {
		question := fmt.Sprintf("%d times asked\n", c.asked)
		if _, err := fmt.Fprint(c, question); err != nil {
			return seen, err
		}
		answer, err := c.answers.ReadString('\n')
		address, rest, _ := strings.Cut(answer, " ")
		if err != nil || rest != question {
			return seen, fmt.Errorf("answer %q and %w to %q", answer, err, question)
		}
		return netip.ParseAddrPort(address)
	}
	if _, err := fmt.Fprint(c, "GET / HTTP/1.1\r\nHost: there\r\n\r\n"); err != nil {
		return seen, err
	}
	response, err := http.ReadResponse(c.answers, nil)
	if err != nil {
		return seen, err
	}
	defer response.Body.Close()
	address, err := bufio.NewReader(response.Body).ReadString('\n')
	if err != nil || response.StatusCode != http.StatusOK || response.Header.Get("X-Recorded") == "" {
		return seen, fmt.Errorf("status %s, header %v, body %q and %w", response.Status, response.Header, address, err)
	}
	return netip.ParseAddrPort(strings.TrimSpace(address))
}

// serveTalks answers at the way's end: lines on port 9000, HTTP on port 8080. Each answer has the address of the client.
func serveTalks(t *testing.T, w way) {
	serveEach(t, w.to.Listen(t, "tcp", netip.AddrPortFrom(w.address, 9000).String()), func(conn net.Conn) {
		conn.SetDeadline(time.Time{}) // the client has a deadline
		for questions := bufio.NewReader(conn); ; {
			question, err := questions.ReadString('\n')
			if err != nil {
				return
			}
			fmt.Fprintf(conn, "%s %s", conn.RemoteAddr(), question)
		}
	})
	serveEach(t, w.to.Listen(t, "tcp", netip.AddrPortFrom(w.address, 8080).String()), func(conn net.Conn) {
		conn.SetDeadline(time.Time{})
		for requests := bufio.NewReader(conn); ; {
			request, err := http.ReadRequest(requests)
			if err != nil {
				return
			}
			body := conn.RemoteAddr().String() + "\n"
			fmt.Fprintf(conn, "HTTP/1.1 200 OK\r\nX-Recorded: %s\r\nContent-Length: %d\r\n\r\n%s", request.Header.Get("X-Request-Id"), len(body), body)
		}
	})
}

// work opens connections along the way, and asks on these and all that it has kept, until stop is closed. It keeps two of
// each arrangement: those of the first two until the end, others for the next six. No byte may be lost, and no
// connection may bypass the agent.
func (p *workingPod) work(t *testing.T, w way, rounds *atomic.Int64, stop <-chan struct{}) {
	var kept []*talk
	defer func() {
		for _, c := range kept {
			c.Close()
		}
	}()
	ask := func(c *talk) (seen netip.AddrPort, ok bool) {
		seen, err := c.ask()
		if err != nil {
			t.Errorf("%s, HTTP: %v, opened %s, question %d: %v", w.name, c.http, c.opened, c.asked, err)
		} else if c.asked == 1 && seen == c.LocalAddr().(*net.TCPAddr).AddrPort() {
			t.Errorf("%s, HTTP: %v, opened %s: not captured", w.name, c.http, c.opened)
		}
		p.asked.Add(1)
		return seen, err == nil
	}
	for keptUnder := int64(0); ; rounds.Add(1) {
		kept = slices.DeleteFunc(kept, func(c *talk) bool {
			_, ok := ask(c)
			if !ok {
				c.Close()
			}
			return !ok
		})
		under := p.arranged.Load()
		for _, port := range []uint16{9000, 8080} {
			conn, err := w.from.Dial("tcp", netip.AddrPortFrom(w.address, port).String(), nettest.Patience)
			if err != nil {
				t.Errorf("%s: %v", w.name, err)
				continue
			}
			c := &talk{Conn: conn, answers: bufio.NewReader(conn), http: port == 8080, opened: fmt.Sprintf("%d (%v)", under, p.walk[max(under, 2)/2-1])}
			seen, ok := ask(c)
			if ok && w.to == p.pod && under == p.arranged.Load() && under%2 == 0 {
				if borrowed := seen.Addr() == nettest.PeerIP4 || seen.Addr() == nettest.PeerIP6; borrowed != (p.walk[under/2-1].mode == "TPROXY") {
					t.Errorf("%s, opened %s: the workload sees %v", w.name, c.opened, seen)
				}
			}
			if ok && under > keptUnder {
				kept = append(kept, c)
			} else {
				c.Close()
			}
		}
		if keptUnder = under; len(kept) > 16 {
			kept[4].Close()
			kept[5].Close()
			kept = slices.Delete(kept, 4, 6)
		}
		select {
		case <-stop:
			return
		default:
		}
	}
}

// When init runs again with other arguments, neither open nor new connections are disturbed, whether the rules move to
// another back end or the mode of inbound connections changes. The marks and routes of TPROXY are removed only after
// its last connection has ended.
func TestTrafficContinuesWhileInitRunsRepeatedly(t *testing.T) {
	t.Parallel()
	nettest.RequireRoot(t)
	p := &workingPod{stage: &stage{}, walk: arrangements(), rounds: make([]atomic.Int64, 4)}
	p.pod, p.peer = nettest.PodAndPeer(t)
	rearrange(t, p.pod, p.walk[0], 0)
	p.arranged.Store(2)
	p.agent = launchAgentBy(t, p.pod, borrowing(0), "--interception-mode", "TPROXY", "--log-level", "info",
		"--access-log", "off", "--upstream-idle-timeout", "200ms")
	awaitReady(t, p.pod, p.agent)

	stop := make(chan struct{})
	var workers sync.WaitGroup
	for i, w := range p.ways() {
		serveTalks(t, w)
		workers.Go(func() { p.work(t, w, &p.rounds[i], stop) })
	}
	roundTrips := func() {
		for i := range p.rounds {
			before := p.rounds[i].Load()
			nettest.Eventually(t, "traffic continues", func() bool { return p.rounds[i].Load() > before+1 })
		}
	}
	func() {
		defer workers.Wait()
		defer close(stop)
		roundTrips()
		for i, a := range p.walk[1:] {
			p.arranged.Add(1)
			rearrange(t, p.pod, a, i)
			p.arranged.Add(1)
			roundTrips()
			if t.Failed() {
				return
			}
		}
	}()
	t.Logf("%d questions, %d arrangements", p.asked.Load(), len(p.walk))
	if t.Failed() {
		return
	}
	routes := func() string {
		return p.pod.MustRun(t, "sh", "-c", "ip -4 rule list table 133; ip -6 rule list table 133")
	}
	if routes() == "" {
		t.Error("the routes of TPROXY were removed before its connections ended")
	}
	nettest.Eventually(t, "marks and routes of TPROXY are removed after its connections have ended", func() bool {
		rearrange(t, p.pod, p.walk[0], 0)
		return routes() == ""
	})
}
