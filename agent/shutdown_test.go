package agent

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	miekg "github.com/miekg/dns"

	"github.com/pillion-proxy/pillion/internal/dns"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/listener"
	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/internal/tcp"
)

// An announcement by order and a later signal share one drain delay: the signal waits only for the rest of it.
func TestTheDrainDelayCountsFromTheFirstAnnouncement(t *testing.T) {
	const delay = 5 * time.Second
	for _, c := range []struct{ passed, want time.Duration }{{0, delay}, {2 * time.Second, 3 * time.Second}, {delay, 0}, {time.Hour, 0}} {
		synctest.Test(t, func(t *testing.T) {
			a := &Agent{config: Config{Drain: Drain{Delay: delay}}}
			a.announcing.Do(func() { a.announced = time.Now() })
			time.Sleep(c.passed)
			signalled := time.Now()
			a.announceInTime(t.Context())
			if waited := time.Since(signalled); waited != c.want {
				t.Errorf("%v after the announcement the signal waits %v, want %v", c.passed, waited, c.want)
			}
		})
	}
}

func TestTheDrainTimeoutEndsTheDrainDelay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &Agent{config: Config{Drain: Drain{Delay: time.Hour}}}
		a.announcing.Do(func() { a.announced = time.Now() })
		deadline, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		signalled := time.Now()
		a.announceInTime(deadline)
		if waited := time.Since(signalled); waited != time.Second {
			t.Errorf("the signal waits %v, want the drain timeout of 1s", waited)
		}
	})
}

// recordingRole records the calls of shutdown, in order.
type recordingRole struct {
	resetting
	name  string
	calls *[]string
}

func (r recordingRole) Announce() { *r.calls = append(*r.calls, r.name+" announced") }
func (r recordingRole) Drain()    { *r.calls = append(*r.calls, r.name+" drained") }
func (r recordingRole) Close()    { *r.calls = append(*r.calls, r.name+" closed") }

// A further listener is one more entry in the list and drains in its place. Only inbound listeners announce.
func TestShutdownWalksTheListenersInTheirOrder(t *testing.T) {
	poller, err := tcp.NewPoller()
	if err != nil {
		t.Fatal(err)
	}
	defer poller.Close()
	config, log := testConfig()
	a := &Agent{config: config, log: config.Log, poller: poller}
	a.over, a.quitting = context.WithCancel(t.Context())
	defer a.quitting()
	var calls []string
	for _, l := range []*trafficListener{
		{name: "gateway", direction: flow.Inbound}, {name: "inbound", direction: flow.Inbound}, {name: "outbound", direction: flow.Outbound},
	} {
		l.role = recordingRole{name: l.name, calls: &calls}
		l.server = &listener.Server{Name: l.name, Handler: l.role, Limit: new(listener.Limit), Log: a.log}
		l.server.Start()
		a.listeners = append(a.listeners, l)
	}
	if err := a.shutdown(t.Context()); err != nil {
		t.Errorf("shutdown: %v\n%s", err, log)
	}
	want := []string{"gateway announced", "inbound announced", "gateway drained", "inbound drained", "outbound drained", "gateway closed", "inbound closed", "outbound closed"}
	if !slices.Equal(calls, want) {
		t.Errorf("calls %q, want %q", calls, want)
	}
}

// holdingRole keeps each connection open until release is closed or the connection is cut.
type holdingRole struct {
	resetting
	release chan struct{}
}

func (holdingRole) Announce() {}
func (holdingRole) Drain()    {}
func (holdingRole) Close()    {}

func (r holdingRole) ServeConn(ctx context.Context, down *tcp.Conn) {
	select {
	case <-r.release:
		down.Close()
	case <-ctx.Done():
		down.Reset()
	}
}

// newHoldingAgent returns an agent with one listener and one connection that stays open until release is closed.
func newHoldingAgent(t *testing.T, drain Drain) (a *Agent, client net.Conn, release chan struct{}) {
	t.Helper()
	poller, err := tcp.NewPoller()
	if err != nil {
		t.Fatal(err)
	}
	ln, err := poller.Listen(netip.MustParseAddrPort("127.0.0.1:0"))
	if err != nil {
		t.Fatal(err)
	}
	config, _ := testConfig()
	config.Drain = drain
	a = &Agent{config: config, log: config.Log, poller: poller}
	a.over, a.quitting = context.WithCancel(t.Context())
	release = make(chan struct{})
	l := &trafficListener{name: "inbound", direction: flow.Inbound, role: holdingRole{release: release}}
	l.server = &listener.Server{Name: l.name, Listeners: []*tcp.Listener{ln}, Handler: l.role, Limit: new(listener.Limit), Log: a.log}
	a.listeners = []*trafficListener{l}
	l.server.Start()
	client, err = net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	client.SetDeadline(time.Now().Add(patience))
	nettest.Eventually(t, "the connection to be served", func() bool { return l.server.Active() == 1 })
	t.Cleanup(func() {
		client.Close()
		l.server.Stop()
		l.server.Abort()
		a.quitting()
		poller.Close()
	})
	return a, client, release
}

// isCut reports whether the agent has reset a connection.
func isCut(client net.Conn) bool {
	_, err := client.Read(make([]byte, 1))
	return err != nil && !errors.Is(err, os.ErrDeadlineExceeded)
}

func TestASecondSignalCutsConnectionsAtOnce(t *testing.T) {
	a, client, _ := newHoldingAgent(t, Drain{Delay: time.Hour, Timeout: time.Hour})
	force, startForce := context.WithCancel(t.Context())
	result := make(chan error, 1)
	go func() { result <- a.shutdown(force) }()
	nettest.Eventually(t, "the drain to begin", a.draining.Load)
	startForce()
	if err := <-result; !errors.Is(err, ErrForced) || !strings.HasSuffix(err.Error(), ": 1, because a second signal came") {
		t.Errorf("shutdown: %v, want ErrForced for one connection", err)
	}
	if !isCut(client) {
		t.Error("the connection is still open")
	}
}

func TestConnectionsAreCutAtTheDrainTimeout(t *testing.T) {
	a, client, _ := newHoldingAgent(t, Drain{Timeout: time.Millisecond})
	if err := a.shutdown(t.Context()); !errors.Is(err, ErrForced) || !strings.HasSuffix(err.Error(), ": 1, because the drain timeout passed") {
		t.Errorf("shutdown: %v, want ErrForced for one connection", err)
	}
	if !isCut(client) {
		t.Error("the connection is still open")
	}
}

// Connections need names until their end, so the resolver drains after the listeners. Queries in progress are answered.
func TestTheResolverDrainsAfterTheConnections(t *testing.T) {
	arrived, answer := make(chan string, 10), make(chan struct{})
	upstreamSocket, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	upstream := &miekg.Server{PacketConn: upstreamSocket, Handler: miekg.HandlerFunc(func(w miekg.ResponseWriter, q *miekg.Msg) {
		arrived <- q.Question[0].Name
		if q.Question[0].Name == "slow.example." {
			<-answer
		}
		_ = w.WriteMsg(new(miekg.Msg).SetReply(q))
	})}
	upstreamDone := make(chan error, 1)
	go func() { upstreamDone <- upstream.ActivateAndServe() }()
	defer func() {
		_ = upstream.Shutdown()
		<-upstreamDone
	}()

	socket, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	a, _, release := newHoldingAgent(t, Drain{Timeout: time.Hour})
	a.resolver, err = dns.New(dns.Config{
		UDP: []*net.UDPConn{socket}, Upstreams: []netip.AddrPort{upstreamSocket.LocalAddr().(*net.UDPAddr).AddrPort()},
		Timeout: patience, Log: a.log,
	})
	if err != nil {
		t.Fatal(err)
	}
	a.resolver.Start()
	query := func(name string) error {
		client := miekg.Client{Timeout: patience}
		m, _, err := client.Exchange(new(miekg.Msg).SetQuestion(name, miekg.TypeA), socket.LocalAddr().String())
		if err == nil && m.Rcode != miekg.RcodeSuccess {
			err = errors.New(miekg.RcodeToString[m.Rcode])
		}
		return err
	}

	result, slow := make(chan error, 1), make(chan error, 1)
	go func() { result <- a.shutdown(t.Context()) }()
	nettest.Eventually(t, "the listener to close", func() bool { return a.listeners[0].server.Accepting() != nil })
	if err := query("during.example."); err != nil {
		t.Errorf("a query while a connection is open: %v", err)
	}
	<-arrived
	go func() { slow <- query("slow.example.") }()
	<-arrived
	close(release) // the last connection ends while a query is in progress
	nettest.Eventually(t, "the connection to end", func() bool { return a.listeners[0].server.Active() == 0 })
	select {
	case err := <-result:
		t.Errorf("shutdown returned %v with a query in progress", err)
	default:
	}
	close(answer)
	if err := <-slow; err != nil {
		t.Errorf("the query in progress: %v", err)
	}
	if err := <-result; err != nil {
		t.Errorf("shutdown: %v", err)
	}
	if _, err := socket.Write(nil); !errors.Is(err, net.ErrClosed) {
		t.Errorf("the resolver's socket after shutdown: %v, want closed", err)
	}
}
