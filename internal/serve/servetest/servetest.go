// Package servetest holds a role to the promises that all roles share, in namespaces with real rules. Only tests import
// it.
//
// A role's test describes where its clients and its servers are and calls Promises; what only this role promises, it
// tests with the same Rig.
package servetest

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/httpforward"
	"github.com/pillion-proxy/pillion/internal/identity"
	"github.com/pillion-proxy/pillion/internal/localaddr"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/internal/serve"
	"github.com/pillion-proxy/pillion/internal/tcp"
	"github.com/pillion-proxy/pillion/internal/upstream"
)

// Role is what a direction's Proxy is.
type Role interface {
	ServeConn(ctx context.Context, down *tcp.Conn)
	Refuse(down *tcp.Conn)
	Apply(serve.Settings) error
	Announce()
	Drain()
}

// Parts is what a role is made of.
type Parts struct {
	Poller    *tcp.Poller
	Flows     *flow.Table
	Addresses *localaddr.Set // of the pod
	HTTP      httpforward.Config
	Settings  serve.Settings
}

// Place describes where a role's traffic goes.
type Place struct {
	Outbound bool   // clients are in the pod and servers behind the peer; else the other way round
	Port     uint16 // at which the role listens
	Rules    bool   // redirect the clients' connections to Port
	New      func(t testing.TB, parts Parts) Role
}

// Rig is a role that serves connections in a pod.
type Rig struct {
	Role           Role
	Pod, Peer      *nettest.Namespace
	Client, Server *nettest.Namespace
	Address        netip.Addr // of servers
	Settings       serve.Settings

	records chan Ended
	discard atomic.Bool // records are not kept
	follow  atomic.Bool // denials are explained
	flows   *flow.Table
	poller  *tcp.Poller
	cut     func()
}

// Ended is a copy of a closed record.
type Ended struct {
	Request                                                bool
	Direction                                              flow.Direction
	Protocol                                               flow.Protocol
	Reason                                                 flow.Reason
	Err                                                    error
	Downstream, OriginalDestination, Upstream, UpstreamEnd netip.AddrPort
	TransportFailure, Peer                                 string
	Received, Sent                                         uint64
	Attempts                                               uint8
	Cluster, Route, Flags                                  string
	Details                                                string // of a request, or of a connection that is denied
	Termination                                            string // Envoy's connection_termination_details
	ServerName                                             string
	DryRun                                                 string
	Explanation                                            string // of a denial, with Follow
}

// Closed implements flow.Sink.
func (r *Rig) Closed(record *flow.Record) {
	if r.discard.Load() {
		return
	}
	details, dry, why := "", "", ""
	if record.HTTP != nil {
		details, dry, why = record.HTTP.Details, record.HTTP.DryRun.String(), record.HTTP.DryRun.Explanation()
	}
	r.records <- Ended{
		record.IsRequest(), record.Direction, record.Protocol, record.Reason, record.Err, record.Downstream, record.OriginalDestination,
		record.Upstream, record.UpstreamLocal, record.TransportFailure, record.Peer(), record.Received.Load(), record.Sent.Load(),
		record.Attempts, record.Cluster, record.Route, record.Flags(), details, record.TerminationDetails(), record.ServerName(), dry, why,
	}
}

// Follow has denials explained in the records from now on, or not.
func (r *Rig) Follow(follow bool) { r.follow.Store(follow) }

// Followed implements what flow.Table asks of its sinks.
func (r *Rig) Followed() bool { return r.follow.Load() }

// Records returns the records that are closed; see Await.
func (r *Rig) Records() <-chan Ended { return r.records }

// clientPort is the last source port of a client. The rules of an outbound role tell clients from the role by it.
var clientPort atomic.Uint32

func init() { clientPort.Store(10000) }

// NewRig starts a role with settings.
func NewRig(t *testing.T, place Place, settings serve.Settings) *Rig {
	t.Helper()
	nettest.RequireRoot(t)
	r := &Rig{Settings: settings, records: make(chan Ended, 100)}
	r.Pod, r.Peer = nettest.PodAndPeer(t)
	r.Client, r.Server, r.Address = r.Peer, r.Pod, nettest.PodIP4
	chain := []string{"PREROUTING", "-i", "eth0"}
	if place.Outbound {
		r.Client, r.Server, r.Address = r.Pod, r.Peer, nettest.Elsewhere4
		chain = []string{"OUTPUT", "--sport", "10000:19999", "!", "-d", "198.51.100.0/24"}
	}
	if place.Rules {
		rule := append([]string{"-t", "nat", "-A", chain[0], "-p", "tcp"}, chain[1:]...)
		r.Pod.MustRun(t, "iptables", append(rule, "-j", "REDIRECT", "--to-ports", "15006")...)
	}
	var listener *tcp.Listener
	r.Pod.Do(t, func() (err error) {
		if r.poller, err = tcp.NewPoller(); err != nil {
			return err
		}
		port := place.Port
		if place.Rules {
			port = 15006
		}
		listener, err = r.poller.Listen(netip.AddrPortFrom(netip.IPv4Unspecified(), port))
		return err
	})
	pool := upstream.NewPool(time.Hour)
	r.flows = flow.NewTable(r)
	r.Role = place.New(t, Parts{
		Poller:    r.poller,
		Flows:     r.flows,
		Addresses: localaddr.Of(nettest.PodIP4, nettest.PodIP6),
		HTTP:      httpforward.Config{Pool: pool, Settings: httpforward.Settings{MaxHeadBytes: 64 << 10, MaxHeadFields: 100}},
		Settings:  settings,
	})
	ctx, cancel := context.WithCancel(context.Background())
	r.cut = func() { cancel(); r.poller.WakeAll() }
	var conns sync.WaitGroup
	conns.Go(func() {
		for {
			down, err := listener.Accept()
			if err != nil {
				return
			}
			conns.Go(func() { // dials happen in the namespace of the thread
				_ = r.Pod.Try(func() error { r.Role.ServeConn(ctx, down); return nil })
			})
		}
	})
	t.Cleanup(func() {
		listener.Close()
		r.cut()
		conns.Wait()
		pool.Close()
		r.poller.Close()
		if open := r.flows.Open(); open != 0 {
			t.Errorf("%d connections are still listed", open)
		}
	})
	return r
}

// Await returns the next record that is closed.
func (r *Rig) Await(t *testing.T) Ended {
	t.Helper()
	select {
	case ended := <-r.records:
		return ended
	case <-time.After(nettest.Patience):
		t.Fatal("no record was closed")
		panic("unreachable")
	}
}

// AwaitListed waits until n connections are listed.
func (r *Rig) AwaitListed(t *testing.T, n int) {
	t.Helper()
	nettest.Eventually(t, "the connections to be listed", func() bool { return r.flows.Open() == n })
}

// Discard drops the records of connections that close from now on.
func (r *Rig) Discard() { r.discard.Store(true) }

// Wake wakes the connections, as the agent does after a push.
func (r *Rig) Wake() { r.poller.WakeAll() }

// Dial connects a client to address.
func (r *Rig) Dial(t *testing.T, address netip.AddrPort) *net.TCPConn {
	t.Helper()
	conn, err := r.TryDial(address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// TryDial connects a client to address. The caller closes the connection.
func (r *Rig) TryDial(address netip.AddrPort) (*net.TCPConn, error) {
	var conn net.Conn
	err := r.Client.Try(func() (err error) {
		source := &net.TCPAddr{Port: int(clientPort.Add(1))}
		conn, err = (&net.Dialer{Timeout: nettest.Patience, LocalAddr: source}).Dial("tcp4", address.String())
		return err
	})
	if err != nil {
		return nil, err
	}
	conn.SetDeadline(time.Now().Add(nettest.Patience))
	return conn.(*net.TCPConn), nil
}

// Listen starts a server at a port. Its connections arrive on the returned channel.
func (r *Rig) Listen(t *testing.T, port string) <-chan *net.TCPConn {
	t.Helper()
	listener := r.Server.Listen(t, "tcp4", net.JoinHostPort(r.Address.String(), port))
	conns := make(chan *net.TCPConn, 10)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			conn.SetDeadline(time.Now().Add(nettest.Patience))
			conns <- conn.(*net.TCPConn)
		}
	}()
	t.Cleanup(func() {
		listener.Close()
		<-done
		for len(conns) > 0 {
			(<-conns).Close()
		}
	})
	return conns
}

// Take returns the server's next connection.
func Take(t *testing.T, conns <-chan *net.TCPConn) *net.TCPConn {
	t.Helper()
	select {
	case conn := <-conns:
		t.Cleanup(func() { conn.Close() })
		return conn
	case <-time.After(nettest.Patience):
		t.Fatal("no connection reached the server")
		panic("unreachable")
	}
}

// Send writes text.
func Send(t *testing.T, conn net.Conn, text string) {
	t.Helper()
	if _, err := io.WriteString(conn, text); err != nil {
		t.Fatal(err)
	}
}

// Expect reads text.
func Expect(t *testing.T, conn net.Conn, text string) {
	t.Helper()
	got := make([]byte, len(text))
	if n, err := io.ReadFull(conn, got); err != nil || string(got) != text {
		t.Fatalf("read %q, %v; want %q", got[:n], err, text)
	}
}

// ExpectEnd reads the end of a connection: io.EOF or ECONNRESET.
func ExpectEnd(t *testing.T, conn net.Conn, want error) {
	t.Helper()
	if n, err := conn.Read(make([]byte, 1)); n != 0 || !errors.Is(err, want) {
		t.Errorf("read %d bytes, %v; want %v", n, err, want)
	}
}

// ExpectRefusal connects from a namespace to a role that resets the connection at once. Whether connect sees the reset or
// the first read does is a race.
func ExpectRefusal(t *testing.T, from *nettest.Namespace, address netip.AddrPort) {
	t.Helper()
	conn, err := from.Dial("tcp", address.String(), nettest.Patience)
	if err == nil {
		defer conn.Close()
		_, err = conn.Read(make([]byte, 1))
	}
	if !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("%v answers %v, want a reset", address, err)
	}
}

// At is a port of the servers' address.
func (r *Rig) At(port uint16) netip.AddrPort { return netip.AddrPortFrom(r.Address, port) }

// Defaults are settings under which only events decide.
func Defaults() serve.Settings {
	return serve.Settings{ConnectTimeout: nettest.Patience, DetectionDelay: time.Hour, DetectionHold: time.Hour}
}

const request = "GET / HTTP/1.1\r\nHost: example.com\r\n\r\n"

// Promises holds a role to what all roles promise.
func Promises(t *testing.T, place Place) {
	direction := flow.Inbound
	if place.Outbound {
		direction = flow.Outbound
	}
	start := func(t *testing.T, change func(*serve.Settings)) *Rig {
		settings := Defaults()
		if change != nil {
			change(&settings)
		}
		return NewRig(t, place, settings)
	}

	t.Run("opaque bytes reach the original destination, and the record names the whole way", func(t *testing.T) {
		r := start(t, nil)
		conns := r.Listen(t, "81")
		client := r.Dial(t, r.At(81))
		Send(t, client, "\x00question")
		server := Take(t, conns)
		Expect(t, server, "\x00question")
		Send(t, server, "answer")
		Expect(t, client, "answer")
		client.CloseWrite()
		ExpectEnd(t, server, io.EOF)
		server.Close()
		ExpectEnd(t, client, io.EOF)
		got := r.Await(t)
		want := Ended{
			Direction: direction, Protocol: flow.Opaque, Reason: flow.Closed,
			Downstream:          client.LocalAddr().(*net.TCPAddr).AddrPort(),
			OriginalDestination: r.At(81), Upstream: r.At(81),
			UpstreamEnd: server.RemoteAddr().(*net.TCPAddr).AddrPort(),
			Received:    9, Sent: 6, Attempts: 1,
		}
		want.Cluster, want.Route, want.Flags = got.Cluster, got.Route, got.Flags // the role's
		if got != want {
			t.Errorf("the record is\n%+v, want\n%+v", got, want)
		}
	})

	t.Run("a request of HTTP has a record, and its connection has none", func(t *testing.T) {
		r := start(t, nil)
		conns := r.Listen(t, "81")
		client := r.Dial(t, r.At(81))
		Send(t, client, request)
		server := Take(t, conns)
		if got, err := http.ReadRequest(bufio.NewReader(server)); err != nil || got.Host != "example.com" {
			t.Fatalf("the server got %v, %v", got, err)
		}
		Send(t, server, "HTTP/1.1 204 No Content\r\n\r\n")
		if got, err := http.ReadResponse(bufio.NewReader(client), nil); err != nil || got.StatusCode != 204 {
			t.Fatalf("the client got %v, %v", got, err)
		}
		if got := r.Await(t); !got.Request || got.Protocol != flow.HTTP11 || got.Reason != flow.Completed || got.Direction != direction {
			t.Errorf("the record is %+v", got)
		}
		client.Close()
		r.AwaitListed(t, 0)
		if len(r.records) > 0 {
			t.Errorf("another record: %+v", r.Await(t))
		}
	})

	t.Run("a server that speaks first is dialled for a silent client", func(t *testing.T) {
		r := start(t, func(s *serve.Settings) { s.DetectionDelay = 0 })
		conns := r.Listen(t, "81")
		client := r.Dial(t, r.At(81))
		Send(t, Take(t, conns), "220 ready\r\n")
		Expect(t, client, "220 ready\r\n")
	})

	t.Run("a silent client may still speak HTTP, and its first request takes the connection that was dialled", func(t *testing.T) {
		r := start(t, func(s *serve.Settings) { s.DetectionDelay = 0 })
		conns := r.Listen(t, "81")
		client := r.Dial(t, r.At(81))
		server := Take(t, conns)
		Send(t, client, request)
		Expect(t, server, "GET / HTTP/1.1\r\n")
		Send(t, server, "HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n")
		if got := r.Await(t); !got.Request || got.Reason != flow.Completed || len(conns) != 0 {
			t.Errorf("the record is %+v, and %d other connections reached the server", got, len(conns))
		}
	})

	t.Run("the protocol of an opaque port is not detected", func(t *testing.T) {
		r := start(t, func(s *serve.Settings) { s.OpaquePorts = portList(t, "81") })
		conns := r.Listen(t, "81")
		client := r.Dial(t, r.At(81))
		server := Take(t, conns) // before a byte was sent
		Send(t, client, request)
		Expect(t, server, request)
		client.Close()
		server.Close()
		if got := r.Await(t); got.Request || got.Protocol != flow.Opaque {
			t.Errorf("the record is %+v", got)
		}
	})

	t.Run("a dial that fails is a reset with its reason", func(t *testing.T) {
		r := start(t, nil)
		client := r.Dial(t, r.At(82))
		Send(t, client, "\x00")
		ExpectEnd(t, client, syscall.ECONNRESET)
		got := r.Await(t)
		if got.Reason != flow.UpstreamRefused || !errors.Is(got.Err, syscall.ECONNREFUSED) || got.Upstream != r.At(82) ||
			got.TransportFailure != "delayed connect error: Connection refused" {
			t.Errorf("the record is %+v", got)
		}
	})

	t.Run("a connection over the limit is a reset with its reason", func(t *testing.T) {
		r := start(t, nil)
		var listener *tcp.Listener
		r.Pod.Do(t, func() (err error) {
			listener, err = r.poller.Listen(netip.MustParseAddrPort("127.0.0.1:0"))
			return err
		})
		defer listener.Close()
		conn, err := r.Pod.Dial("tcp", listener.Addr().String(), nettest.Patience)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		down, err := listener.Accept()
		if err != nil {
			t.Fatal(err)
		}
		r.Role.Refuse(down)
		ExpectEnd(t, conn, syscall.ECONNRESET)
		if got := r.Await(t); got.Reason != flow.MaxConnections || got.Direction != direction || got.Downstream.Port() == 0 {
			t.Errorf("the record is %+v", got)
		}
	})

	t.Run("the end of the context cuts a connection, also while its client is silent", func(t *testing.T) {
		for _, sent := range []string{"", "GET /", "\x00"} {
			r := start(t, nil)
			r.Listen(t, "81")
			client := r.Dial(t, r.At(81))
			Send(t, client, sent)
			r.AwaitListed(t, 1)
			r.cut()
			ExpectEnd(t, client, syscall.ECONNRESET)
			if got := r.Await(t); got.Reason != flow.DrainDeadline {
				t.Errorf("after %q the record is %+v", sent, got)
			}
		}
	})

	t.Run("a drain ends a connection on which neither side has sent anything, in order", func(t *testing.T) {
		r := start(t, func(s *serve.Settings) { s.DetectionDelay = 0 })
		conns := r.Listen(t, "81")
		client := r.Dial(t, r.At(81))
		server := Take(t, conns)
		r.Role.Drain()
		r.poller.WakeAll()
		ExpectEnd(t, client, io.EOF)
		ExpectEnd(t, server, io.EOF)
		if got := r.Await(t); got.Reason != flow.Drained {
			t.Errorf("the record is %+v", got)
		}
	})

	t.Run("responses close their connections once the drain is announced", func(t *testing.T) {
		r := start(t, nil)
		r.Role.Announce()
		conns := r.Listen(t, "81")
		client := r.Dial(t, r.At(81))
		Send(t, client, request)
		Send(t, Take(t, conns), "HTTP/1.1 204 No Content\r\n\r\n")
		if got, err := http.ReadResponse(bufio.NewReader(client), nil); err != nil || !got.Close {
			t.Errorf("the client got %v, %v", got, err)
		}
	})

	t.Run("a connection keeps the settings that it began with, and new ones have the new settings", func(t *testing.T) {
		r := start(t, nil)
		conns := r.Listen(t, "81")
		old := r.Dial(t, r.At(81))
		r.AwaitListed(t, 1)
		settings := r.Settings
		settings.OpaquePorts = portList(t, "81")
		if err := r.Role.Apply(settings); err != nil {
			t.Fatal(err)
		}
		fresh := r.Dial(t, r.At(81))
		Take(t, conns) // opaque: it was dialled before the client sent anything
		r.AwaitListed(t, 2)
		Send(t, old, request)
		server := Take(t, conns)
		Expect(t, server, "GET / HTTP/1.1\r\n")
		Send(t, server, "HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n")
		if got := r.Await(t); !got.Request {
			t.Errorf("the record of the old connection is %+v", got)
		}
		fresh.SetLinger(0)
		fresh.Close()
		if got := r.Await(t); got.Request || got.Protocol != flow.Opaque || got.Reason != flow.DownstreamReset {
			t.Errorf("the record of the new connection is %+v", got)
		}
	})

	t.Run("the settings of HTTP apply from the start", func(t *testing.T) {
		r := start(t, func(s *serve.Settings) { s.HTTP = &httpforward.Settings{MaxHeadBytes: 100, MaxHeadFields: 1} })
		client := r.Dial(t, r.At(81))
		Send(t, client, "GET / HTTP/1.1\r\nHost: example.com\r\nA: 1\r\n\r\n")
		if got, err := http.ReadResponse(bufio.NewReader(client), nil); err != nil || got.StatusCode != 431 {
			t.Errorf("the client got %v, %v", got, err)
		}
	})

	t.Run("a new connect timeout applies to later requests of an open connection", func(t *testing.T) {
		r := start(t, nil)
		r.Server.MustRun(t, "iptables", "-A", "INPUT", "-p", "tcp", "--dport", "81", "--syn", "-j", "DROP")
		client := r.Dial(t, r.At(81))
		r.AwaitListed(t, 1)
		settings := r.Settings
		settings.ConnectTimeout = time.Millisecond
		if err := r.Role.Apply(settings); err != nil {
			t.Fatal(err)
		}
		Send(t, client, request)
		if got := r.Await(t); !got.Request || got.Reason != flow.UpstreamTimeout {
			t.Errorf("the record is %+v", got)
		}
	})

	t.Run("a connection in which nothing moves ends after the idle time", func(t *testing.T) {
		r := start(t, func(s *serve.Settings) { s.IdleTimeout, s.DetectionDelay = time.Millisecond, 0 })
		r.Listen(t, "81")
		if conn, err := r.TryDial(r.At(81)); err == nil { // else the reset was quicker than connect
			defer conn.Close()
			ExpectEnd(t, conn, syscall.ECONNRESET)
		} else if !errors.Is(err, syscall.ECONNRESET) {
			t.Fatal(err)
		}
		if got := r.Await(t); got.Reason != flow.IdleTimeout {
			t.Errorf("the record is %+v", got)
		}
	})

	t.Run("without connection tracking a connection is refused", func(t *testing.T) {
		bare := place
		bare.Rules, bare.Port = false, 15006
		settings := Defaults()
		r := NewRig(t, bare, settings)
		ExpectRefusal(t, r.Pod, netip.MustParseAddrPort("127.0.0.1:15006"))
		if got := r.Await(t); got.Reason != flow.NoOriginalDestination || got.Err == nil {
			t.Errorf("the record is %+v", got)
		}
	})

	t.Run("a connection to a port of the agent at an own address is refused", func(t *testing.T) {
		r := start(t, nil)
		ExpectRefusal(t, r.Peer, netip.AddrPortFrom(nettest.PodIP4, 15006))
		if got := r.Await(t); got.Reason != flow.Loop {
			t.Errorf("the record is %+v", got)
		}
	})

	// As with rules that do not exempt the agent's user.
	t.Run("connections of the role that a rule sends back to it end as a loop", func(t *testing.T) {
		r := start(t, func(s *serve.Settings) { s.OpaquePorts = portList(t, "82") })
		r.Pod.MustRun(t, "iptables", "-t", "nat", "-I", "OUTPUT", "-p", "tcp", "--dport", "81:82", "-j", "REDIRECT", "--to-ports", "15006")
		http2 := &http.Transport{Protocols: new(http.Protocols), DialContext: func(_ context.Context, _, address string) (net.Conn, error) {
			return r.TryDial(netip.MustParseAddrPort(address))
		}}
		http2.Protocols.SetUnencryptedHTTP2(true)
		defer http2.CloseIdleConnections()
		unavailable := func(response *http.Response, err error) {
			t.Helper()
			if err != nil {
				t.Fatal(err)
			}
			defer response.Body.Close()
			if response.StatusCode != 503 {
				t.Errorf("the client got %d", response.StatusCode)
			}
		}
		reset := func(port uint16, sent string) {
			t.Helper()
			client, err := r.TryDial(r.At(port))
			if err == nil {
				defer client.Close()
				if sent != "" {
					_, err = io.WriteString(client, sent)
				}
				if err == nil {
					_, err = client.Read(make([]byte, 1))
				}
			}
			if !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("the client got %v for %q to port %d, want a reset", err, sent, port)
			}
		}
		for _, c := range []struct {
			name    string
			connect func()
		}{
			{"HTTP/1", func() {
				client := r.Dial(t, r.At(81))
				defer client.Close()
				Send(t, client, request)
				unavailable(http.ReadResponse(bufio.NewReader(client), nil))
			}},
			{"HTTP/2", func() {
				ask, _ := http.NewRequest("POST", "http://"+r.At(81).String(), strings.NewReader("body"))
				if response, err := http2.RoundTrip(ask); err == nil { // else GOAWAY came before the request
					unavailable(response, nil)
				}
				http2.CloseIdleConnections()
			}},
			{"opaque bytes", func() { reset(81, "\x00question") }},
			{"an opaque port", func() { reset(82, "") }},
			{"silence", func() {
				settings := r.Settings
				settings.DetectionDelay = 0
				if err := r.Role.Apply(settings); err != nil {
					t.Fatal(err)
				}
				reset(81, "")
				if err := r.Role.Apply(r.Settings); err != nil {
					t.Fatal(err)
				}
			}},
		} {
			c.connect()
			ends := []Ended{r.Await(t)}
			r.AwaitListed(t, 0)
			for len(r.records) > 0 {
				ends = append(ends, r.Await(t))
			}
			loops := 0
			for _, end := range ends {
				if end.Reason == flow.Loop && errors.Is(end.Err, upstream.ErrLoop) {
					loops++
				}
			}
			if loops == 0 || len(ends) > 20 { // an HTTP/2 client retries by itself
				t.Errorf("%s: %d loops, and the records are %+v", c.name, loops, ends)
			}
		}
	})
}

func portList(t *testing.T, text string) capture.Ports {
	t.Helper()
	ports, err := capture.ParsePorts(text)
	if err != nil {
		t.Fatal(err)
	}
	return ports
}

// Configured is a control plane that has configured the role.
type Configured struct {
	InForce atomic.Pointer[mesh.Snapshot]
	Own     atomic.Pointer[identity.Identity]
}

// Snapshot implements serve.Mesh.
func (c *Configured) Snapshot() *mesh.Snapshot { return c.InForce.Load() }

// Identity implements serve.Mesh.
func (c *Configured) Identity() *identity.Identity { return c.Own.Load() }

// OwnPorts are the agent's ports.
func OwnPorts() []uint16 { return capture.Default().OwnPorts() }
