//go:build !race

package inbound

import (
	"bytes"
	"context"
	"crypto/tls"
	"io"
	"net"
	"net/netip"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/httpforward"
	"github.com/pillion-proxy/pillion/internal/localaddr"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/internal/secure/securetest"
	"github.com/pillion-proxy/pillion/internal/serve"
	"github.com/pillion-proxy/pillion/internal/serve/servetest"
	"github.com/pillion-proxy/pillion/internal/tcp"
	"github.com/pillion-proxy/pillion/internal/upstream"
)

// An idle HTTP/1 connection keeps a stack of 4 KiB. The sizes of stacks are powers of two: a few bytes more in the frames
// below which it waits would double what ten thousand of them take.
func TestAnIdleHTTP1ConnectionHasASmallStack(t *testing.T) {
	testIdleStack(t, nil, func(conn net.Conn) net.Conn { return conn })
}

// Nor does a connection inside TLS need more: the deep calls of a handshake have another stack.
func TestAnIdleTLSConnectionHasASmallStack(t *testing.T) {
	authority := securetest.New(t, "root of the mesh")
	plane := &servetest.Configured{}
	plane.Own.Store(authority.Identity(t, idOfServer))
	own := chain("tls", nil, true, true)
	own.HTTP.ClientCert, own.HTTP.ClientCertDetails = mesh.AppendClientCert, mesh.ClientCertDetails{Subject: true, DNS: true, URI: true}
	plane.InForce.Store(snapshotOf(t, []*mesh.FilterChain{own}, true))
	config := &tls.Config{
		Certificates: []tls.Certificate{*authority.Leaf(t, idOfClient, nil)}, InsecureSkipVerify: true, NextProtos: []string{"istio-http/1.1", "istio", "http/1.1"},
	}
	testIdleStack(t, plane, func(conn net.Conn) net.Conn { return tls.Client(conn, config) })
}

// testIdleStack makes requests on many connections with a control plane, which may be nil.
func testIdleStack(t *testing.T, plane serve.Mesh, secured func(net.Conn) net.Conn) {
	const many, limit = 400, 6 << 10
	poller, err := tcp.NewPoller()
	if err != nil {
		t.Fatal(err)
	}
	defer poller.Close()
	pool := upstream.NewPool(time.Hour)
	defer pool.Close()
	proxy, err := New(Config{
		Poller: poller, OwnPorts: []uint16{15006}, OwnAddresses: localaddr.Of(netip.MustParseAddr("127.0.0.2")),
		TPROXYMark: 1, // the local end is the original destination then: no rules are needed
		Flows:      flow.NewTable(),
		Settings:   serve.Settings{DetectionDelay: time.Hour, DetectionHold: time.Hour, ConnectTimeout: nettest.Patience, IdleTimeout: time.Hour},
		HTTP:       httpforward.Config{Pool: pool, Settings: httpforward.Settings{MaxHeadBytes: 64 << 10, MaxHeadFields: 100}},
		Mesh:       plane, Wait: nettest.Patience,
	})
	if err != nil {
		t.Fatal(err)
	}

	// The clients connect before the origin takes over the address.
	listener, err := poller.Listen(netip.MustParseAddrPort("127.0.0.2:0"))
	if err != nil {
		t.Fatal(err)
	}
	address := listener.Addr().String()
	var clients []net.Conn
	var downs []*tcp.Conn
	for range many {
		client, err := net.DialTimeout("tcp", address, nettest.Patience)
		if err != nil {
			t.Fatal(err)
		}
		defer client.Close()
		down, err := listener.Accept()
		if err != nil {
			t.Fatal(err)
		}
		clients, downs = append(clients, secured(client)), append(downs, down)
	}
	listener.Close()
	origin, err := net.Listen("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	defer origin.Close()

	ctx, cancel := context.WithCancel(t.Context())
	var serving sync.WaitGroup
	defer serving.Wait()
	defer func() { cancel(); poller.WakeAll() }()
	var stats runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&stats)
	before := int64(stats.StackInuse)
	for i, down := range downs {
		serving.Go(func() { proxy.ServeConn(ctx, down) })
		var up net.Conn
		for range 3 {
			exchange(t, clients[i], "GET / HTTP/1.1\r\nHost: a\r\n\r\n", func() net.Conn {
				if up == nil { // the test is the origin: a server's goroutines would have stacks, too
					if up, err = origin.Accept(); err != nil {
						t.Fatal(err)
					}
				}
				return up
			})
		}
		defer up.Close()
	}
	var each int64
	defer func() { t.Logf("%d bytes of stack each, limit %d", each, limit) }()
	nettest.Eventually(t, "idle connections have small stacks", func() bool {
		runtime.GC() // halves each stack of which at most a quarter is in use
		runtime.ReadMemStats(&stats)
		each = (int64(stats.StackInuse) - before) / many
		return each < limit
	})
}

// exchange sends a request, answers it at the upstream connection, and reads the answer.
func exchange(t *testing.T, client net.Conn, request string, upstream func() net.Conn) {
	t.Helper()
	if _, err := io.WriteString(client, request); err != nil {
		t.Fatal(err)
	}
	up := upstream()
	readHead(t, up)
	if _, err := io.WriteString(up, "HTTP/1.1 204 No Content\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	readHead(t, client)
}

// readHead reads to the empty line. No body follows.
func readHead(t *testing.T, conn net.Conn) {
	t.Helper()
	conn.SetReadDeadline(time.Now().Add(nettest.Patience))
	var head []byte
	for one := make([]byte, 512); !bytes.HasSuffix(head, []byte("\r\n\r\n")); {
		n, err := conn.Read(one)
		if err != nil {
			t.Fatal(err)
		}
		head = append(head, one[:n]...)
	}
}
