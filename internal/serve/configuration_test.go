package serve

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/httpforward"
	"github.com/pillion-proxy/pillion/internal/identity"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/internal/tcp"
	"github.com/pillion-proxy/pillion/internal/upstream"
)

// plane is a control plane's configuration.
type plane struct{ current atomic.Pointer[mesh.Snapshot] }

func (p *plane) Snapshot() *mesh.Snapshot { return p.current.Load() }

func (p *plane) Identity() *identity.Identity { return nil }

// held is one connection of a role with a control plane, on its walk until it may be carried.
type held struct {
	plane  *plane
	role   *Role
	poller *tcp.Poller
	client *net.TCPConn
	cut    func()

	passed chan *mesh.Snapshot // what a connection that may be carried obeys
	ended  chan *flow.Record
}

// Closed implements flow.Sink.
func (h *held) Closed(record *flow.Record) { h.ended <- record }

// hold opens a connection, and waits until it is listed.
func hold(t *testing.T, p *plane, wait time.Duration) *held {
	t.Helper()
	poller, err := tcp.NewPoller()
	if err != nil {
		t.Fatal(err)
	}
	h := &held{plane: p, poller: poller, passed: make(chan *mesh.Snapshot, 1), ended: make(chan *flow.Record, 1)}
	config := Config{Poller: poller, Flows: flow.NewTable(h), Wait: wait, HTTP: httpforward.Config{
		Pool: upstream.NewPool(time.Hour), Settings: httpforward.Settings{MaxHeadBytes: 64 << 10, MaxHeadFields: 100},
	}}
	if p != nil {
		config.Mesh = p
	}
	if h.role, err = NewRole(config); err != nil {
		t.Fatal(err)
	}
	listener, err := poller.Listen(netip.MustParseAddrPort("127.0.0.1:0"))
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	client, err := net.Dial("tcp", listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	h.client = client.(*net.TCPConn)
	h.client.SetDeadline(time.Now().Add(nettest.Patience))
	down, err := listener.Accept()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	h.cut = func() { cancel(); poller.WakeAll() }
	done := make(chan struct{})
	go func() {
		defer close(done)
		h.walk(ctx, down)
	}()
	t.Cleanup(func() {
		h.client.Close()
		h.cut()
		<-done
		config.HTTP.Pool.Close()
		poller.Close()
	})
	nettest.Eventually(t, "the connection to be listed", func() bool { return h.role.flows.Open() == 1 || len(h.ended) > 0 })
	return h
}

func (h *held) walk(ctx context.Context, down *tcp.Conn) {
	c := h.role.Open(ctx, down)
	defer c.Close()
	c.Record.OriginalDestination = netip.MustParseAddrPort("198.51.100.1:80")
	c.List()
	if c.AwaitConfiguration() && c.ReadFirst(false) && c.Admit() {
		var obeyed *mesh.Snapshot
		if c.governed != nil {
			obeyed = c.governed.snapshot
		}
		h.passed <- obeyed
		c.Refuse(flow.Closed, nil)
	}
}

func (h *held) publish(s *mesh.Snapshot) {
	h.plane.current.Store(s)
	h.poller.WakeAll()
}

func (h *held) awaitEnd(t *testing.T) *flow.Record {
	t.Helper()
	select {
	case record := <-h.ended:
		return record
	case <-time.After(nettest.Patience):
		t.Fatal("the connection did not end")
		panic("unreachable")
	}
}

func TestWithoutAControlPlaneConnectionsDoNotWait(t *testing.T) {
	h := hold(t, nil, 0)
	if record := h.awaitEnd(t); record.Reason != flow.Closed || <-h.passed != nil {
		t.Errorf("ended with %s", record.Reason)
	}
}

func TestAHeldConnectionObeysTheFirstSnapshot(t *testing.T) {
	h := hold(t, &plane{}, time.Hour)
	io.WriteString(h.client, "early")
	h.client.CloseWrite() // not the end of a client that waits for a response
	first := &mesh.Snapshot{}
	h.publish(first)
	if record := h.awaitEnd(t); record.Reason != flow.Closed || <-h.passed != first {
		t.Errorf("ended with %s", record.Reason)
	}
}

func TestAHeldConnectionEndsByName(t *testing.T) {
	for name, c := range map[string]struct {
		wait    time.Duration
		end     func(*held)
		reason  flow.Reason
		orderly bool
	}{
		"the wait is over":        {time.Millisecond, func(*held) {}, flow.NoConfiguration, false},
		"no wait":                 {0, func(*held) {}, flow.NoConfiguration, false},
		"the agent drains":        {time.Hour, func(h *held) { h.role.Drain(); h.poller.WakeAll() }, flow.Drained, true},
		"the agent is cut":        {time.Hour, func(h *held) { h.cut() }, flow.DrainDeadline, false},
		"the client resets it":    {time.Hour, func(h *held) { h.client.SetLinger(0); h.client.Close() }, flow.DownstreamReset, false},
		"a snapshot that refuses": {time.Hour, func(h *held) { h.publish(refusing()) }, flow.MeshRefused, false},
	} {
		t.Run(name, func(t *testing.T) {
			h := hold(t, &plane{}, c.wait)
			c.end(h)
			record := h.awaitEnd(t)
			if record.Reason != c.reason {
				t.Errorf("reason %s (%v), want %s", record.Reason, record.Err, c.reason)
			}
			if _, err := h.client.Read(make([]byte, 1)); c.reason != flow.DownstreamReset && errors.Is(err, syscall.ECONNRESET) == c.orderly {
				t.Errorf("the client reads %v; an orderly end: %v", err, c.orderly)
			}
			if len(h.passed) > 0 {
				t.Error("the connection passed")
			}
		})
	}
}

// refusing returns a snapshot that closes inbound connections.
func refusing() *mesh.Snapshot {
	edit := (*mesh.Snapshot)(nil).Edit()
	edit.SetListener("virtualInbound", &mesh.Listener{Name: "virtualInbound", Refused: true})
	s, _ := edit.Snapshot()
	return s
}
