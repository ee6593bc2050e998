package gateway

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/listener"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/internal/serve/servetest"
	"github.com/pillion-proxy/pillion/internal/tcp"
)

// echo echoes the bytes of each connection.
type echo struct{}

func (echo) ServeConn(ctx context.Context, conn *tcp.Conn) {
	w := tcp.NewWaiter(ctx)
	defer w.Close()
	defer conn.Close()
	buf := make([]byte, 100)
	for {
		n, err := conn.Read(buf)
		if err == nil {
			_, err = conn.Write(buf[:n])
		}
		if err == tcp.ErrAgain {
			err = w.Wait(time.Time{}, conn, nil)
		}
		if err != nil {
			return
		}
	}
}

func (echo) Refuse(conn *tcp.Conn) { conn.Close() }

// sockets are the listeners of a gateway in a namespace, with a server that echoes.
type sockets struct {
	*Listeners
	ns    *nettest.Namespace
	plane *servetest.Configured
	log   *strings.Builder
}

func newSockets(t *testing.T) *sockets {
	t.Helper()
	nettest.RequireRoot(t)
	s := &sockets{ns: nettest.New(t, "gateway"), plane: &servetest.Configured{}, log: &strings.Builder{}}
	poller, err := tcp.NewPoller()
	if err != nil {
		t.Fatal(err)
	}
	log := slog.New(slog.NewTextHandler(s.log, nil))
	server := &listener.Server{Name: "gateway", Dynamic: true, Handler: echo{}, Limit: new(listener.Limit), Log: log}
	server.Start()
	if err := server.Accepting(); err != nil {
		t.Errorf("a gateway without listeners: %v", err)
	}
	t.Cleanup(func() {
		server.Stop()
		if server.Accepting() == nil {
			t.Error("a stopped gateway accepts")
		}
		server.Abort()
		poller.Close()
	})
	s.Listeners = NewListeners(ListenersConfig{Poller: poller, Server: server, Mesh: s.plane, OwnPorts: []uint16{15021}, Log: log})
	return s
}

// push makes listeners with these names and addresses the configuration, and applies it.
func (s *sockets) push(t *testing.T, listeners map[string]string) (all bool) {
	t.Helper()
	edit := (*mesh.Snapshot)(nil).Edit()
	for name, addresses := range listeners {
		l := &mesh.Listener{Name: name, Default: &mesh.FilterChain{Refused: true}}
		for address := range strings.FieldsSeq(addresses) {
			l.Addresses = append(l.Addresses, netip.MustParseAddrPort(address))
		}
		edit.SetListener(name, l)
	}
	snapshot, _ := edit.Snapshot()
	s.plane.InForce.Store(snapshot)
	s.ns.Do(t, func() error { all = s.Apply(); return nil })
	return all
}

func (s *sockets) dial(port int) (net.Conn, error) {
	conn, err := s.ns.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", port), nettest.Patience)
	if err == nil {
		conn.SetDeadline(time.Now().Add(nettest.Patience))
	}
	return conn, err
}

// open returns a connection that is served.
func (s *sockets) open(t *testing.T, port int) net.Conn {
	t.Helper()
	conn, err := s.dial(port)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	wantServed(t, conn)
	return conn
}

func wantServed(t *testing.T, conn net.Conn) {
	t.Helper()
	servetest.Send(t, conn, "ping")
	servetest.Expect(t, conn, "ping")
}

func (s *sockets) wantClosed(t *testing.T, port int) {
	t.Helper()
	if conn, err := s.dial(port); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("port %d: %v, %v; want refused", port, conn, err)
	}
}

// Sockets come and go with the addresses in the configuration. A socket whose address stays is the same one, and open
// connections go on.
func TestSocketsFollowTheConfiguration(t *testing.T) {
	s := newSockets(t)
	if s.Bound() == nil {
		t.Error("ready before the first configuration")
	}
	s.wantClosed(t, 8080)
	if !s.push(t, map[string]string{"a": "0.0.0.0:8080"}) || s.Bound() != nil {
		t.Error("8080 is not bound")
	}
	first := s.open(t, 8080)
	socket, _ := s.at(netip.MustParseAddrPort("0.0.0.0:8080"))
	s.push(t, map[string]string{"renamed": "0.0.0.0:8080", "b": "127.0.0.1:8081 127.0.0.2:8081"})
	if same, _ := s.at(netip.MustParseAddrPort("0.0.0.0:8080")); same != socket {
		t.Error("a socket whose address stays was replaced")
	}
	wantServed(t, first)
	s.open(t, 8081)
	names := ""
	for name, at := range s.Names() {
		names += fmt.Sprint(name, at)
	}
	if names != "b[127.0.0.1:8081 127.0.0.2:8081]renamed[0.0.0.0:8080]" {
		t.Errorf("the listeners are %s", names)
	}
	s.push(t, map[string]string{"b": "127.0.0.1:8081"})
	s.wantClosed(t, 8080)
	wantServed(t, first)
	s.open(t, 8081)
	s.push(t, map[string]string{"b": "0.0.0.0:8081"}) // the old socket makes room for the new one
	s.open(t, 8081)
	if !s.push(t, nil) || s.Bound() != nil {
		t.Error("a gateway without listeners is not ready")
	}
	wantServed(t, first)
}

// An address that cannot be bound is reported by name, once for each cause, and others are bound. It is bound when it can be.
func TestAnAddressThatCannotBeBoundIsReported(t *testing.T) {
	s := newSockets(t)
	taken, own := s.ns.Listen(t, "tcp4", "0.0.0.0:8080"), s.ns.Listen(t, "tcp4", "0.0.0.0:15021")
	configured := map[string]string{"a": "0.0.0.0:8080", "b": "0.0.0.0:8081", "own": "0.0.0.0:15021"}
	for range 3 {
		if s.push(t, configured) {
			t.Error("all addresses are bound")
		}
	}
	s.open(t, 8081)
	failures := s.Failures()
	if len(failures) != 2 || failures[0].Listener != "a" || !errors.Is(failures[0].Err, syscall.EADDRINUSE) || !strings.Contains(failures[1].Err.Error(), "a port of the agent itself") {
		t.Errorf("the failures are %+v", failures)
	}
	if err := s.Bound(); err == nil || !strings.Contains(err.Error(), "listener a: ") {
		t.Errorf("ready: %v", err)
	}
	if n := strings.Count(s.log.String(), "cannot bind a listener"); n != 2 {
		t.Errorf("%d lines for two failures:\n%s", n, s.log)
	}
	taken.Close()
	delete(configured, "own")
	if !s.push(t, configured) || len(s.Failures()) > 0 || s.Bound() != nil {
		t.Errorf("8080 is free: %v, %v", s.Failures(), s.Bound())
	}
	s.open(t, 8080)
	configured["own"] = "0.0.0.0:15021"
	if s.push(t, configured) || s.Bound() != nil {
		t.Errorf("a later failure makes the gateway unready: %v", s.Bound())
	}
	own.Close()
}

func TestAFailureNamesItsRemedy(t *testing.T) {
	l := NewListeners(ListenersConfig{})
	err := l.explain(netip.MustParseAddrPort("0.0.0.0:80"), os.NewSyscallError("bind", syscall.EACCES))
	if !errors.Is(err, syscall.EACCES) || !strings.Contains(err.Error(), "NET_BIND_SERVICE") || !strings.Contains(err.Error(), "to 80 or less") {
		t.Errorf("the error is %v", err)
	}
}

// A configuration cannot use up the descriptors of the process.
func TestTheNumberOfSocketsIsBounded(t *testing.T) {
	s := newSockets(t)
	var addresses strings.Builder
	for port := range MaxListeners + 1 {
		fmt.Fprintf(&addresses, "127.0.0.1:%d ", 20000+port)
	}
	if s.push(t, map[string]string{"many": addresses.String()}) {
		t.Error("all addresses are bound")
	}
	if failures := s.Failures(); len(failures) != 1 || failures[0].Address.Port() != 20000+MaxListeners || !errors.Is(failures[0].Err, errTooMany) {
		t.Errorf("the failures are %v", failures)
	}
	s.open(t, 20000+MaxListeners-1)
	s.wantClosed(t, 20000+MaxListeners)
}

// Clients lose no connection while other sockets come and go.
func TestConnectionsAreServedWhileSocketsComeAndGo(t *testing.T) {
	s := newSockets(t)
	s.push(t, map[string]string{"a": "0.0.0.0:8080"})
	var clients sync.WaitGroup
	done := make(chan struct{})
	for range 2 {
		clients.Go(func() {
			for {
				select {
				case <-done:
					return
				default:
				}
				conn, err := s.dial(8080)
				if err != nil {
					t.Error(err)
					return
				}
				io.WriteString(conn, "ping")
				if _, err := io.ReadFull(conn, make([]byte, 4)); err != nil {
					t.Error(err)
				}
				conn.Close()
			}
		})
	}
	for i := range 50 {
		s.push(t, map[string]string{"a": "0.0.0.0:8080", "b": fmt.Sprintf("0.0.0.0:%d", 8081+i)})
	}
	close(done)
	clients.Wait()
}
