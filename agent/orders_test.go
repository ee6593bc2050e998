package agent

import (
	"errors"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/admin"
	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/listener"
	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/internal/tcp"
)

// stopped reports whether a listener has stopped accepting.
func stopped(l *trafficListener) bool { return l.server.Accepting() != nil }

func TestOrdersToDrainListeners(t *testing.T) {
	for _, c := range []struct {
		order                         admin.DrainOrder
		drains, stopsInbound, stopOut bool
	}{
		{admin.DrainOrder{}, false, true, true},
		{admin.DrainOrder{InboundOnly: true}, false, true, false},
		{admin.DrainOrder{Graceful: true}, true, true, true},
		{admin.DrainOrder{Graceful: true, InboundOnly: true}, true, true, false},
		{admin.DrainOrder{Graceful: true, SkipExit: true}, true, false, false},
	} {
		a, _, _ := newHoldingAgent(t, Drain{Timeout: time.Hour})
		ln, err := a.poller.Listen(netip.MustParseAddrPort("127.0.0.1:0"))
		if err != nil {
			t.Fatal(err)
		}
		outbound := &trafficListener{name: "outbound", direction: flow.Outbound, role: holdingRole{}}
		outbound.server = &listener.Server{Name: outbound.name, Listeners: []*tcp.Listener{ln}, Handler: outbound.role, Limit: new(listener.Limit), Log: a.log}
		outbound.server.Start()
		a.listeners = append(a.listeners, outbound)

		a.drainListeners(c.order)
		a.running.Wait()
		if got := a.draining.Load(); got != c.drains {
			t.Errorf("%+v: draining %t, want %t", c.order, got, c.drains)
		}
		if in, out := stopped(a.listeners[0]), stopped(a.listeners[1]); in != c.stopsInbound || out != c.stopOut {
			t.Errorf("%+v: inbound stopped: %t, outbound stopped: %t, want %t and %t", c.order, in, out, c.stopsInbound, c.stopOut)
		}
		if n := a.listeners[0].server.Active(); n != 1 {
			t.Errorf("%+v: %d connections, want the open one to stay", c.order, n)
		}
		outbound.server.Stop()
	}
}

// Envoy's clients repeat the order. Each would hold a goroutine for the drain delay.
func TestRepeatedGracefulOrdersWaitOnce(t *testing.T) {
	a, _, _ := newHoldingAgent(t, Drain{Delay: time.Hour, Timeout: time.Hour})
	a.drainListeners(admin.DrainOrder{Graceful: true})
	a.drainListeners(admin.DrainOrder{Graceful: true})
	if stopped(a.listeners[0]) {
		t.Error("the listener stopped before the drain delay")
	}
	a.endOrders()
	if stopped(a.listeners[0]) {
		t.Error("the end of the agent carried out an order that was waiting")
	}
	a.drainListeners(admin.DrainOrder{})
	a.running.Wait()
	if stopped(a.listeners[0]) {
		t.Error("an order after the end of the agent was carried out")
	}
}

// With TPROXY, a packet to a port without a listener is dropped. A client would wait for it until the pod is gone.
func TestAStoppedTransparentListenerResetsNewConnections(t *testing.T) {
	nettest.RequireRoot(t)
	ns := nettest.New(t, "door")
	config, _ := testConfig()
	config.Interception.Mode = capture.TPROXY
	a, err := newIn(t, ns, config)
	if err != nil {
		t.Fatal(err)
	}
	stop := run(t, ns, a)
	var inbound *trafficListener
	for _, l := range a.listeners {
		if l.direction == flow.Inbound {
			inbound = l
		}
	}
	ns.Do(t, func() error {
		a.stopListener(inbound)
		a.stopListener(inbound) // changes nothing
		return nil
	})
	conn, err := ns.Dial("tcp", "127.0.0.1:15006", patience)
	if err == nil {
		conn.SetDeadline(time.Now().Add(patience))
		_, err = conn.Read(make([]byte, 1))
		conn.Close()
	}
	if !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("a new connection: %v, want a reset", err)
	}
	if err := stop(); err != nil {
		t.Errorf("Run: %v", err)
	}
	if conn, err := ns.Dial("tcp", "127.0.0.1:15006", patience); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("a connection after the end: %v, want it refused", err)
		if err == nil {
			conn.Close()
		}
	}
}
