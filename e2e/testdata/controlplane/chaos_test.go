package controlplane

import (
	"context"
	"errors"
	"flag"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/istiod"
	"github.com/pillion-proxy/pillion/internal/xds"
)

// errCut is the error of a connection that a test has cut.
var errCut = errors.New("connection reset by peer")

// cutConn is a connection that is cut once it has carried some bytes in one direction.
type cutConn struct {
	net.Conn
	received, sent       atomic.Int64
	readAfter, sentAfter int64 // negative: never
	once                 sync.Once
	cut                  chan struct{}
}

func (c *cutConn) end() {
	c.once.Do(func() {
		c.Conn.Close()
		close(c.cut)
	})
}

func (c *cutConn) Read(b []byte) (int, error) {
	if c.readAfter >= 0 {
		left := c.readAfter - c.received.Load()
		if left <= 0 {
			c.end()
			return 0, errCut
		}
		b = b[:min(len(b), int(left))]
	}
	n, err := c.Conn.Read(b)
	c.received.Add(int64(n))
	return n, err
}

func (c *cutConn) Write(b []byte) (int, error) {
	if c.sentAfter >= 0 && c.sent.Load()+int64(len(b)) > c.sentAfter {
		n, _ := c.Conn.Write(b[:max(c.sentAfter-c.sent.Load(), 0)])
		c.sent.Add(int64(n))
		c.end()
		return n, errCut
	}
	n, err := c.Conn.Write(b)
	c.sent.Add(int64(n))
	return n, err
}

// trial is a client whose connections a test provides.
type trial struct {
	client *xds.Client
	stop   func()
}

// begin starts a client. connect makes each of its connections; the first has number 0.
func begin(t *testing.T, p *plane, delta bool, m *mirror, connect func(number int, conn net.Conn) net.Conn) *trial {
	t.Helper()
	encoded, err := node.Encode()
	if err != nil {
		t.Fatal(err)
	}
	number := -1
	peer := &istiod.Server{Address: p.address, Plaintext: true, Dial: func(ctx context.Context, network, address string) (net.Conn, error) {
		conn, err := new(net.Dialer).DialContext(ctx, network, address)
		if err != nil {
			return nil, err
		}
		number++
		return connect(number, conn), nil
	}}
	a := &trial{client: xds.New(xds.Config{
		Delta: delta, Node: encoded, Handler: m, Log: slog.New(slog.DiscardHandler), MinBackoff: time.Microsecond, MaxBackoff: time.Millisecond,
		Connect: func(ctx context.Context) (xds.Stream, error) {
			connection, err := peer.Connect()
			if err != nil {
				return nil, err
			}
			stream, err := connection.Stream(ctx, xds.Method(delta))
			if err != nil {
				connection.Close()
				return nil, err
			}
			return &closing{stream, connection}, nil
		},
	})}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { a.client.Run(ctx); close(done) }()
	a.stop = func() { cancel(); <-done }
	return a
}

// closing is a stream that closes its connection with it.
type closing struct {
	xds.Stream
	connection *istiod.Connection
}

func (c *closing) Close() {
	c.Stream.Close()
	c.connection.Close()
}

// holding returns what a mirror holds when services are served.
func holding(services ...string) (held []string) {
	for _, name := range services {
		held = append(held, "CDS "+name, "EDS "+name)
	}
	return append(held, "LDS 0.0.0.0_80", "RDS 80")
}

// cutStep is the distance of the places where a connection is cut. With 1 the test takes a minute.
var cutStep = flag.Int64("cut-step", 7, "bytes between the places where a connection is cut")

// The connection of a short exchange is cut anywhere, in each direction. What the control plane has then changed to arrives
// over the next connection.
func TestTheConnectionMayBeCutAnywhere(t *testing.T) {
	bothProtocols(t, func(t *testing.T, delta bool) {
		p := startPlane(t)
		p.serve(t, "1", "cart")
		whole := &cutConn{readAfter: -1, sentAfter: -1, cut: make(chan struct{})}
		m := newMirror()
		a := begin(t, p, delta, m, func(_ int, conn net.Conn) net.Conn { whole.Conn = conn; return whole })
		m.await(t, holding("cart")...)
		received, sent := whole.received.Load(), whole.sent.Load()
		a.stop()
		if received < 500 || sent < 300 {
			t.Fatalf("%d bytes were received and %d sent", received, sent)
		}
		for at := int64(0); at < received; at += *cutStep {
			cutOnce(t, p, delta, &cutConn{readAfter: at, sentAfter: -1, cut: make(chan struct{})})
		}
		for at := int64(0); at < sent; at += *cutStep {
			cutOnce(t, p, delta, &cutConn{readAfter: -1, sentAfter: at, cut: make(chan struct{})})
		}
	})
}

func cutOnce(t *testing.T, p *plane, delta bool, c *cutConn) {
	t.Helper()
	p.serve(t, "1", "cart")
	m := newMirror()
	a := begin(t, p, delta, m, func(number int, conn net.Conn) net.Conn {
		if number > 0 {
			return conn
		}
		c.Conn = conn
		return c
	})
	defer a.stop()
	<-c.cut
	p.serve(t, "2", "pay")
	m.await(t, holding("pay")...)
	if status := a.client.Status(); !status.Connected {
		t.Errorf("cut after %d bytes read, %d sent: status %+v", c.readAfter, c.sentAfter, status)
	}
}
