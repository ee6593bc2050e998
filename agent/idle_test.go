//go:build !race

package agent

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net"
	"net/netip"
	"runtime"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pillion-proxy/pillion/internal/budget"
	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/internal/localaddr"
	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/internal/tcp"
)

// The memory of an idle HTTP/1.1 connection with all sinks, as the default agent has them.
//
// The sizes of objects and of stacks are steps: one field too many in an object that each connection has, or some bytes in
// the frames below which it waits, cost every connection a step. Objects are counted by size, rounded to whole ones for each
// connection, so that the result is exact: what connections share, such as the tables of maps, does not count. Raise a
// limit only for something that is worth it times ten thousand.
func TestAnIdleHTTP1ConnectionTakesLittleMemory(t *testing.T) {
	const (
		warm, many = 100, 500
		heapLimit  = 1968
		stackLimit = 4096 + 4096/8
	)
	s := newIdleStage(t, warm+many)
	s.open(warm)
	before := memoryInUse()
	s.open(many)
	after := memoryInUse()
	heap, list := 0, ""
	for i, class := range after.BySize {
		grown := int64(class.Mallocs-class.Frees) - int64(before.BySize[i].Mallocs-before.BySize[i].Frees)
		if n := int(math.Round(float64(grown) / many)); n > 0 {
			heap += n * int(class.Size)
			list += fmt.Sprintf(" %d×%d", n, class.Size)
		}
	}
	if heap > heapLimit {
		t.Errorf("an idle connection takes %d bytes of heap, limit %d; objects:%s", heap, heapLimit, list)
	}
	stack := (int64(after.StackInuse) - int64(before.StackInuse)) / many
	if stack > stackLimit {
		t.Errorf("an idle connection takes %d bytes of stack, limit %d", stack, stackLimit)
	}
	t.Logf("%d bytes of heap in%s; %d bytes of stack", heap, list, stack)
}

// memoryInUse returns what garbage collection leaves. A collection halves each stack of which at most a quarter is in use,
// and empties pools in two steps.
func memoryInUse() (stats runtime.MemStats) {
	for range 3 {
		runtime.GC()
	}
	runtime.ReadMemStats(&stats)
	return stats
}

// idleStage is an agent without ports: clients connect to its poller, and the test is the workload.
type idleStage struct {
	*testing.T
	role    role
	ctx     context.Context
	serving sync.WaitGroup
	clients []net.Conn // for open
	downs   []*tcp.Conn
	origin  int   // a listening socket
	ups     []int // its connections
}

// newIdleStage prepares connections of clients. They connect before the workload takes over the address.
func newIdleStage(t *testing.T, connections int) *idleStage {
	nettest.RequireRoot(t)
	config, _ := testConfig()
	config.Log = slog.New(slog.DiscardHandler)
	config.AccessLog.Path = t.TempDir() + "/access.log"
	config.Interception.Mode = capture.TPROXY // the local end is the original destination then: no rules are needed
	address := netip.MustParseAddr("127.0.0.2")
	a := &Agent{config: config, log: config.Log, budget: budget.New(1 << 20), addresses: localaddr.Of(address)}
	var err error
	if a.poller, err = tcp.NewPoller(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.poller.Close() })
	if err := a.tell(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.telling.close() })
	if err := a.addListeners(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.listeners[0].pool.Close() })

	s := &idleStage{T: t, role: a.listeners[0].role, ups: make([]int, 0, connections)}
	listener, err := a.poller.Listen(netip.AddrPortFrom(address, 0))
	if err != nil {
		t.Fatal(err)
	}
	for range connections {
		client, err := net.DialTimeout("tcp", listener.Addr().String(), nettest.Patience)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { client.Close() })
		down, err := listener.Accept()
		if err != nil {
			t.Fatal(err)
		}
		s.clients, s.downs = append(s.clients, client), append(s.downs, down)
	}
	listener.Close()
	s.listen(listener.Addr())

	ctx, cancel := context.WithCancel(t.Context())
	s.ctx = ctx
	t.Cleanup(func() {
		cancel()
		a.poller.WakeAll()
		s.serving.Wait()
	})
	return s
}

// listen opens the workload's socket. Sockets of package net would be part of the measurement.
func (s *idleStage) listen(address netip.AddrPort) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		s.Fatal(err)
	}
	s.origin = fd
	s.Cleanup(func() {
		for _, fd := range append(s.ups, s.origin) {
			unix.Close(fd)
		}
	})
	patience := unix.NsecToTimeval(int64(nettest.Patience)) // accepted sockets inherit it
	for _, err := range []error{
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &patience),
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1),
		unix.Bind(fd, &unix.SockaddrInet4{Addr: address.Addr().As4(), Port: int(address.Port())}),
		unix.Listen(fd, 16),
	} {
		if err != nil {
			s.Fatal(err)
		}
	}
}

// open serves the next n connections. Each has three requests and is idle then.
func (s *idleStage) open(n int) {
	s.Helper()
	for range n {
		client, down := s.clients[0], s.downs[0]
		s.clients, s.downs = s.clients[1:], s.downs[1:]
		s.serving.Go(func() { s.role.ServeConn(s.ctx, down) })
		client.SetDeadline(time.Now().Add(nettest.Patience))
		up := -1
		for range 3 {
			if _, err := io.WriteString(client, "GET /items HTTP/1.1\r\nHost: shop.example\r\n\r\n"); err != nil {
				s.Fatal(err)
			}
			if up < 0 {
				up = s.accept()
			}
			readHead(s.T, func(p []byte) (int, error) { return unix.Read(up, p) })
			if _, err := unix.Write(up, []byte("HTTP/1.1 204 No Content\r\n\r\n")); err != nil {
				s.Fatal(err)
			}
			readHead(s.T, client.Read)
		}
	}
}

func (s *idleStage) accept() int {
	s.Helper()
	fd, _, err := unix.Accept(s.origin)
	if err != nil {
		s.Fatal(err)
	}
	s.ups = append(s.ups, fd)
	return fd
}

// readHead reads to the empty line. No body follows.
func readHead(t *testing.T, read func([]byte) (int, error)) {
	t.Helper()
	var buf [512]byte
	for have := 0; !bytes.HasSuffix(buf[:have], []byte("\r\n\r\n")); {
		n, err := read(buf[have:])
		if n <= 0 {
			t.Fatal(n, err)
		}
		have += n
	}
}
