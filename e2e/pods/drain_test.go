package pods

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/nettest"
)

const (
	loadEach = 3     // clients of each kind
	wanted   = 10000 // requests in all, at least
	lasting  = 300   // messages of a long connection after its pod was taken out of the endpoints
)

// load is a set of clients of all kinds that never pause, with their results. They connect to the current endpoint, as
// through a service, and reconnect when the server closes.
type load struct {
	from     *nettest.Namespace
	endpoint atomic.Pointer[pod]
	clients  sync.WaitGroup
	stopped  atomic.Bool

	asked  [2 * loadEach]atomic.Int64 // by each client of HTTP
	done   [3]atomic.Int64            // HTTP/1, h2c, TCP
	onOld  atomic.Int64               // long connections to a pod that is no longer an endpoint
	mu     sync.Mutex
	failed []error
}

func (l *load) fail(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.failed) < 10 {
		l.failed = append(l.failed, err)
	}
}

func (l *load) total() (sum int64) {
	for i := range l.done {
		sum += l.done[i].Load()
	}
	return sum
}

func (l *load) start(t *testing.T) {
	for each := range loadEach {
		for i, port := range []int{8080, 8081} {
			c := client(t, i == 1, func() (net.Conn, error) {
				return l.from.Dial("tcp", l.endpoint.Load().at(port), nettest.Patience)
			})
			l.clients.Go(func() { l.ask(c, i, &l.asked[2*each+i]) })
		}
		l.clients.Go(l.speak)
	}
}

// ask sends one request after the other. It uses POST, so that a failed request is not repeated unnoticed.
func (l *load) ask(c *http.Client, kind int, asked *atomic.Int64) {
	for !l.stopped.Load() {
		if err := post(c); err != nil {
			l.fail(fmt.Errorf("kind %d: %w", kind, err))
		}
		l.done[kind].Add(1)
		asked.Add(1)
	}
}

// speak opens long connections that only the client may end.
func (l *load) speak() {
	for !l.stopped.Load() {
		if err := l.converse(l.endpoint.Load()); err != nil {
			l.fail(fmt.Errorf("a long connection: %w", err))
		}
	}
}

func (l *load) converse(to *pod) error {
	conn, err := l.from.Dial("tcp", to.at(7000), nettest.Patience)
	if err != nil {
		return err
	}
	defer conn.Close()
	reader := bufio.NewReader(conn)
	for rest := lasting; rest > 0; {
		if err := echoOnce(conn, reader); err != nil {
			return err
		}
		l.done[2].Add(1)
		if l.endpoint.Load() != to || l.stopped.Load() {
			if rest == lasting {
				l.onOld.Add(1)
			}
			rest--
		}
	}
	if err := conn.(*net.TCPConn).CloseWrite(); err != nil {
		return err
	}
	if _, err := reader.ReadByte(); !errors.Is(err, io.EOF) {
		return fmt.Errorf("it ends with %v", err)
	}
	return nil
}

func (l *load) stop() {
	l.stopped.Store(true)
	l.clients.Wait()
}

// stopUnderLoad stops one of two pods as a kubelet does, while a third sends them load through sidecars on both sides.
// The endpoints follow readiness a second later. In classic order the agent receives SIGTERM while the workload still
// runs; in native order the agent's preStop hook runs first, then the workload ends, and after that the agent.
func stopUnderLoad(t *testing.T, n *node, native bool) {
	name := map[bool]string{false: "classic", true: "native"}[native]
	var pods []*pod
	for _, role := range []string{"caller", "old", "new"} {
		pods = append(pods, n.playFile(t, "web.yaml", name+"-"+role))
	}
	caller, old, next := pods[0], pods[1], pods[2]
	l := &load{from: caller.Namespace}
	l.endpoint.Store(old)
	l.start(t)
	defer l.stop()
	nettest.Eventually(t, "load of each kind", func() bool {
		return min(l.done[0].Load(), l.done[1].Load(), l.done[2].Load()) >= 500
	})

	if native {
		old.exec(t, "pilot-agent", "request", "--debug-port=15020", "POST", "drain")
	} else {
		old.signal(t, "istio-proxy", "TERM")
	}
	l.follow(t, n, old, next)
	if native {
		old.signal(t, "nginx", "QUIT")
		old.ends(t, "nginx")
		old.signal(t, "istio-proxy", "TERM")
	}
	if code := old.ends(t, "istio-proxy"); code != "0" {
		t.Errorf("the agent ends with %s", code)
	}
	if l.onOld.Load() != loadEach {
		t.Errorf("%d long connections outlived the announcement, want %d", l.onOld.Load(), loadEach)
	}
	nettest.Eventually(t, "10,000 requests", func() bool { return l.total() >= wanted })
	l.stop()
	t.Logf("%d by HTTP/1, %d by h2c, %d over long connections, failed: %d", l.done[0].Load(), l.done[1].Load(), l.done[2].Load(), len(l.failed))
	for _, err := range l.failed {
		t.Error(err)
	}
}

// follow removes a pod from the endpoints a second after it stops being ready, the time for the change to spread.
func (l *load) follow(t *testing.T, n *node, old, next *pod) {
	c := client(t, false, dialer(n.Namespace, old.at(15021)))
	if !nettest.Within(nettest.Patience, func() bool {
		response, err := c.Get("http://old.example/healthz/ready")
		if err != nil {
			return false
		}
		response.Body.Close()
		return response.StatusCode == http.StatusServiceUnavailable
	}) {
		t.Error("readiness does not turn off")
	}
	<-time.After(time.Second)
	l.endpoint.Store(next)
	// After two more requests of each client, no request to the old pod is in progress.
	var before [2 * loadEach]int64
	for i := range l.asked {
		before[i] = l.asked[i].Load()
	}
	nettest.Eventually(t, "all clients follow the endpoint", func() bool {
		for i := range l.asked {
			if l.asked[i].Load() < before[i]+2 {
				return false
			}
		}
		return true
	})
}
