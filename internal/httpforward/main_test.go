package httpforward

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/budget"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/internal/tcp"
	"github.com/pillion-proxy/pillion/internal/tcp/layertest"
	"github.com/pillion-proxy/pillion/internal/upstream"
)

func TestMain(m *testing.M) { os.Exit(nettest.Main(m)) }

// rig is an engine in front of an origin, on loopback sockets.
type rig struct {
	engine   *Engine
	poller   *tcp.Poller
	pool     *upstream.Pool
	address  string // where the engine is reached
	cancel   func() // cuts what is open, as the end of a drain does
	records  records
	mu       sync.Mutex                  // for layered, early, balanced and router
	last     atomic.Pointer[flow.Record] // of the connection that was served last
	open     atomic.Int32                // connections that the engine has
	layered  bool                        // downstream connections have a record layer
	security *upstream.Security          // of upstream connections
	group    *tcp.Group                  // likewise
	balanced bool                        // the network may have several servers behind the origin's address
	early    bool                        // dial the origin before the engine begins, for HTTP/1
	many     bool                        // HTTP/2 streams have upstream connections of their own choice
	router   Router                      // of all connections; nil: everything goes to the origin
	peers    *PeerFields                 // of all connections
}

// records collects the records that the engine has closed.
type records struct {
	mu     sync.Mutex
	closed []recorded
	news   chan struct{}
}

// recorded is a copy of a record.
type recorded struct {
	protocol                          flow.Protocol
	method, path, authority, id, grpc string
	forwardedFor                      string
	status                            int
	flags, details                    string
	received, sent                    uint64
	reason                            flow.Reason
	err                               error
	upgraded                          bool
	cluster, route                    string
	unbound                           bool // a sink does not find what it bound when the connection began to be carried
	attempts                          uint8
	workload                          *flow.Workload // of the other side
}

func (r *records) Closed(record *flow.Record) {
	r.mu.Lock()
	defer r.mu.Unlock()
	h := record.HTTP
	r.closed = append(r.closed, recorded{
		record.Protocol, string(h.Method), string(h.Path), string(h.Authority), string(h.ID), string(h.GRPCStatus), string(h.ForwardedFor),
		h.Status, record.Flags(), record.Details(), record.Received.Load(), record.Sent.Load(), record.Reason, record.Err, h.Upgraded,
		record.Cluster, record.Route,
		place.Get(record) == nil && (record.Connection == nil || place.Get(record.Connection) == nil),
		record.Attempts,
		record.Workload.Get(),
	})
	select {
	case r.news <- struct{}{}:
	default:
	}
}

// await returns the n-th record, once it is there.
func (r *records) await(t testing.TB, n int) recorded {
	t.Helper()
	deadline := time.After(nettest.Patience)
	for {
		r.mu.Lock()
		if len(r.closed) > n {
			defer r.mu.Unlock()
			return r.closed[n]
		}
		r.mu.Unlock()
		select {
		case <-r.news:
		case <-deadline:
			t.Fatalf("there are not %d records: %+v", n+1, r.closed)
		}
	}
}

func (r *records) count() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.closed)
}

// newRig starts an engine whose connections all lead to origin.
func newRig(t testing.TB, origin netip.AddrPort, http2 bool, configure ...func(*Config)) *rig {
	t.Helper()
	poller, err := tcp.NewPoller()
	if err != nil {
		t.Fatal(err)
	}
	// Connections that are in the pool by mistake stay there and can be detected.
	pool := upstream.NewPool(time.Hour)
	r := &rig{poller: poller, pool: pool, records: records{news: make(chan struct{}, 1)}}
	config := Config{
		Direction: flow.Inbound,
		Dialer:    upstream.Dialer{Poller: poller},
		Pool:      r.pool,
		Flows:     &r.records,
		Budget:    budget.New(64 << 20),
		Settings: Settings{MaxHeadBytes: 64 << 10, MaxHeadFields: 100, ConnectTimeout: nettest.Patience,
			Fields: Fields{ForwardedFor: ForwardedForSetIfAbsent, ForwardedProto: true, RequestID: true, ServiceTime: true}},
	}
	for _, change := range configure {
		change(&config)
	}
	if r.engine, err = New(config); err != nil {
		t.Fatal(err)
	}
	listener, err := poller.Listen(netip.MustParseAddrPort("127.0.0.1:0"))
	if err != nil {
		t.Fatal(err)
	}
	r.address = listener.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	r.cancel = func() { cancel(); poller.WakeAll() }
	var conns sync.WaitGroup
	conns.Go(func() {
		for {
			down, err := listener.Accept()
			if err != nil {
				return
			}
			r.open.Add(1)
			conns.Go(func() {
				defer r.open.Add(-1)
				r.serve(ctx, down, http2, upstream.Target{Address: origin})
			})
		}
	})
	t.Cleanup(func() {
		listener.Close()
		r.cancel()
		conns.Wait()
		nettest.Eventually(t, "the copies end", func() bool { return r.engine.copies.active.Load() == 0 })
		if n := r.engine.copies.held.Load(); n != 0 {
			t.Errorf("copies hold %d bytes", n)
		}
		r.pool.Close()
		poller.Close()
		if n := r.engine.config.Budget.Used(); n != 0 {
			t.Errorf("%d bytes of the budget are not given back", n)
		}
	})
	return r
}

// set changes how later connections are served.
func (r *rig) set(change func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	change()
}

// serve does what a room does before it hands a connection to its engine.
func (r *rig) serve(ctx context.Context, down *tcp.Conn, http2 bool, to upstream.Target) {
	w := tcp.NewWaiter(ctx)
	defer w.Close()
	r.mu.Lock()
	layered, early, router, peers, many := r.layered, r.early, r.router, r.peers, r.many
	to.Balanced, to.Security, to.Group = r.balanced, r.security, r.group
	r.mu.Unlock()
	if layered {
		layertest.Under(down, nil)
	}
	read := tcp.TakeBuffer()
	for {
		if _, err := read.Fill(down); err == nil && (!http2 || read.Len() >= 24) {
			break
		} else if err != nil && (!errors.Is(err, tcp.ErrAgain) || w.Wait(time.Time{}, down, nil) != nil) {
			read.Release()
			down.Close()
			return
		}
	}
	record := recordOf(down, to.Address)
	r.last.Store(record)
	var up *tcp.Conn
	if early {
		var err error
		if up, _, err = r.engine.config.Dialer.Dial(w, to); err != nil {
			panic(err)
		}
	}
	r.engine.Serve(w, http2, &Connection{Down: down, Read: read, Early: up, Target: to, Router: router, Record: record, Peers: peers, Many: many})
}

// place is where the sink of these tests keeps a value with each connection.
var place = flow.NewPlace()

// recordOf is the record of a connection that goes where it was going.
func recordOf(down *tcp.Conn, dst netip.AddrPort) *flow.Record {
	record := flow.Open(flow.Inbound, down.RemoteAddr())
	record.OriginalDestination = dst
	place.Set(record, "a sink's")
	return record
}

// dial opens a connection to the engine, with a deadline.
func (r *rig) dial(t testing.TB) *net.TCPConn {
	t.Helper()
	return r.dialFrom(t, "127.0.0.1")
}

// dialFrom is dial from another address of loopback, as another peer.
func (r *rig) dialFrom(t testing.TB, address string) *net.TCPConn {
	t.Helper()
	dialer := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(netip.MustParseAddr(address), 0))}
	conn, err := dialer.Dial("tcp", r.address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(nettest.Patience))
	return conn.(*net.TCPConn)
}

// origin is a listener whose connections a test serves by hand.
type origin struct {
	t        testing.TB
	listener *net.TCPListener
	address  netip.AddrPort
}

func newOrigin(t testing.TB) *origin {
	t.Helper()
	listener, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	return &origin{t, listener.(*net.TCPListener), listener.Addr().(*net.TCPAddr).AddrPort()}
}

// accept returns the next connection that the engine makes.
func (o *origin) accept() *net.TCPConn {
	o.t.Helper()
	o.listener.SetDeadline(time.Now().Add(nettest.Patience))
	conn, err := o.listener.AcceptTCP()
	if err != nil {
		o.t.Fatalf("the engine did not connect: %v", err)
	}
	o.t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(nettest.Patience))
	return conn
}

// head reads up to and including an empty line.
func head(t testing.TB, r *bufio.Reader) string {
	t.Helper()
	var text string
	for {
		line, err := r.ReadString('\n')
		text += line
		if err != nil {
			t.Fatalf("after %q: %v", text, err)
		}
		if line == "\r\n" {
			return text
		}
	}
}

// send writes text to a connection.
func send(t testing.TB, conn net.Conn, text string) {
	t.Helper()
	if _, err := io.WriteString(conn, text); err != nil {
		t.Fatal(err)
	}
}

// expect reads exactly the text.
func expect(t testing.TB, r io.Reader, want string) {
	t.Helper()
	got := make([]byte, len(want))
	if n, err := io.ReadFull(r, got); err != nil || string(got) != want {
		t.Fatalf("read %q and %v, want %q", got[:n], err, want)
	}
}

// ok is a small response.
func ok(body string) string {
	return fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
}
