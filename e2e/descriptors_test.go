package e2e

import (
	"bufio"
	"context"
	"io"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

// An agent without free descriptors logs that once, names it in its readiness, and recovers when descriptors become free.
//
// A connection needs two descriptors. The test uses an even and an odd limit: with one of them, the last free descriptor
// goes to an accepted connection, and its upstream gets no descriptor.
func TestAgentRecoversFromLackOfDescriptors(t *testing.T) {
	t.Parallel()
	for _, limit := range []string{"60", "61"} {
		t.Run("limit "+limit, func(t *testing.T) {
			t.Parallel()
			runOutOfDescriptors(t, limit)
		})
	}
}

func runOutOfDescriptors(t *testing.T, limit string) {
	nettest.RequireRoot(t)
	s := &stage{}
	s.pod, s.peer = nettest.PodAndPeer(t)
	initPod(t, s.pod, nft)
	s.agent = launchAgent(t, s.pod, []string{"prlimit", "--nofile=" + limit + ":" + limit})
	awaitReady(t, s.pod, s.agent)
	w := s.inbound()
	downstream, upstream := w.connect(t)
	converse(t, downstream, upstream)

	// An existing connection can still be used for probes while new ones are not accepted.
	prober := w.dial(t, netip.AddrPortFrom(nettest.PodIP4, 15021).String())
	if status := probe(t, prober); status != 200 {
		t.Fatalf("readiness = %d at the start", status)
	}

	echo := w.to.Listen(t, "tcp", netip.AddrPortFrom(w.address, 0).String())
	serveEcho(t, echo)
	address := echo.Addr().String()
	begin := time.Now()
	release := overload(t, w.from, address, 80)
	s.agent.log.await(t, `msg="cannot accept, trying again until it works"`, "too many open files", "remedy=")
	nettest.Eventually(t, "readiness turns off", func() bool { return probe(t, prober) == 503 })
	converse(t, downstream, upstream) // those that are open are not disturbed
	for range 20 {                    // under continuous load
		converse(t, downstream, upstream)
	}
	select {
	case <-s.agent.Exited():
		t.Fatal("the agent ended")
	default:
	}
	release()

	s.agent.log.await(t, `msg="accepting again"`)
	nettest.Eventually(t, "new connections are carried again", func() bool { return askEcho(w.from, address, 1) == nil })
	nettest.Eventually(t, "readiness turns on", func() bool { return probe(t, prober) == 200 })
	converse(t, downstream, upstream)
	// One line per episode. After a pause of the load there may be another, but not one for each attempt.
	atMost := 2 + int(time.Since(begin).Seconds())
	if lines := s.agent.log.lines(`msg="cannot accept`); len(lines) > atMost {
		t.Errorf("the accept error was logged %d times in %v, want once", len(lines), time.Since(begin))
	}
	assertQuiet(t, s.agent)
}

// overload keeps n clients connected to address until release is called. A client that is refused connects again.
func overload(t *testing.T, from *nettest.Namespace, address string, n int) (release func()) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), nettest.Patience)
	var clients sync.WaitGroup
	for range n {
		clients.Go(func() {
			for ctx.Err() == nil {
				conn, err := from.Dial("tcp", address, nettest.Patience)
				if err != nil {
					continue
				}
				stop := context.AfterFunc(ctx, func() { conn.Close() })
				conn.Read(make([]byte, 1)) // until it is turned away, or released
				stop()
				conn.Close()
			}
		})
	}
	release = sync.OnceFunc(func() {
		cancel()
		clients.Wait()
	})
	t.Cleanup(release)
	return release
}

// probe asks for readiness on a connection that stays open, and returns the status.
func probe(t *testing.T, conn net.Conn) int {
	t.Helper()
	conn.SetDeadline(time.Now().Add(nettest.Patience))
	writes(t, conn, "GET /healthz/ready HTTP/1.1\r\nHost: pod\r\n\r\n")
	response, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	if _, err := io.Copy(io.Discard, response.Body); err != nil {
		t.Fatal(err)
	}
	return response.StatusCode
}

func TestConnectionsOverTheLimitAreRefusedWithReason(t *testing.T) {
	t.Parallel()
	s := newStage(t, "--max-connections", "4")
	var open [][2]*net.TCPConn
	for _, w := range s.ways() { // both directions count together
		downstream, upstream := w.connect(t)
		converse(t, downstream, upstream)
		open = append(open, [2]*net.TCPConn{downstream, upstream})
	}
	for _, w := range s.ways() {
		if err := tryConnection(w.from, netip.AddrPortFrom(w.address, 9).String()); !isReset(err) {
			t.Errorf("%s: downstream sees %v, want a reset", w.name, err)
		}
	}
	s.agent.log.await(t, `msg="connection refused"`, "reason=max_connections")
	for _, pair := range open {
		converse(t, pair[0], pair[1])
	}
	open[0][0].Close()
	open[0][1].Close()
	s.agent.log.await(t, "reason=closed")
	downstream, upstream := s.outbound().connect(t)
	converse(t, downstream, upstream)
}
