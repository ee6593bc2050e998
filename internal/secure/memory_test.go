//go:build !race

package secure

import (
	"crypto/tls"
	"io"
	"net"
	"runtime"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/internal/tcp"
)

// A request and its response inside TLS allocate no memory. Both ends of the connection are ours.
func TestARequestAllocatesNothing(t *testing.T) {
	w := newWorld(t)
	client, server := w.ends(t)
	p := make([]byte, 1000)
	pass := func(from, to *end) {
		if _, err := from.Write(p[:100]); err != nil {
			t.Fatal(err)
		}
		if n, err := to.read(p); n != 100 || err != nil {
			t.Fatal(n, err)
		}
	}
	once := func() { pass(client, server); pass(server, client) }
	once()
	if n := testing.AllocsPerRun(100, once); n > 0 {
		t.Errorf("%v allocations", n)
	}
}

// An idle connection keeps two ciphers and their secrets. The peer's certificate belongs to the session, which its owner may
// drop.
func TestMemoryOfAnIdleConnection(t *testing.T) {
	w := newWorld(t)
	const conns, most = 200, 3_500
	config := w.mutual("h2", "http/1.1")
	heap := func() uint64 {
		runtime.GC()
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	var ends []*end
	var far []net.Conn
	for range conns {
		conn, near := w.pair(t)
		ends, far = append(ends, &end{Conn: near, w: tcp.NewWaiter(t.Context())}), append(far, conn)
	}
	context, before := NewServer(config), heap()
	for i, e := range ends {
		peer := tls.Client(far[i], w.peer("http/1.1"))
		go io.WriteString(peer, "a request")
		session, err := Server(e.w, e.Conn, nil, context, Memory{}, time.Now().Add(nettest.Patience))
		if err != nil {
			t.Fatal(err)
		}
		if session.SPIFFE != idOfClient {
			t.Fatal(session.SPIFFE)
		}
		if _, err := e.read(make([]byte, 100)); err != nil {
			t.Fatal(err)
		}
		if _, err := e.Write([]byte("a response")); err != nil {
			t.Fatal(err)
		}
	}
	if each := (heap() - before) / conns; each > most {
		t.Errorf("%d bytes, want at most %d", each, most)
	} else {
		t.Logf("%d bytes", each)
	}
	for _, e := range ends {
		e.Reset()
		e.w.Close()
	}
}
