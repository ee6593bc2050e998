package httpforward

import (
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/net/http2"

	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/internal/tcp"
	"github.com/pillion-proxy/pillion/internal/upstream"
)

// The server's first frames were read before the client sent anything. They reach the client once, in order, and
// streams work afterwards.
func TestFramesSentBeforeTheClientSpokeAreNotLost(t *testing.T) {
	o := newOrigin(t)
	r := newRig(t, o.address, true, plain)
	listener, err := r.poller.Listen(netip.MustParseAddrPort("127.0.0.1:0"))
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	conn, err := net.Dial("tcp", listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	conn.SetDeadline(time.Now().Add(nettest.Patience))
	client := newSpeaker(t, conn.(*net.TCPConn))
	w := tcp.NewWaiter(t.Context())
	down, err := listener.Accept()
	if err != nil {
		t.Fatal(err)
	}
	up, _, err := r.engine.config.Dialer.Dial(w, upstream.Target{Address: o.address})
	if err != nil {
		t.Fatal(err)
	}
	server := newSpeaker(t, o.accept())
	server.sends("SETTINGS 3=100")
	send(t, conn, http2.ClientPreface)
	client.sends("SETTINGS")
	fill := func(from *tcp.Conn, least int) *tcp.Buffer {
		buffer := tcp.TakeBuffer()
		for buffer.Len() < least {
			if _, err := buffer.Fill(from); err == tcp.ErrAgain {
				_ = w.Wait(time.Now().Add(nettest.Patience), from, nil)
			} else if err != nil {
				t.Fatal(err)
			}
		}
		return buffer
	}
	const header, setting = 9, 6
	early, read := fill(up, header+setting), fill(down, len(http2.ClientPreface)+header)
	served := make(chan struct{})
	go func() {
		defer close(served)
		defer w.Close()
		r.engine.serveHTTP2(w, &Connection{
			Down: down, Read: read, Early: up, EarlyRead: early,
			Target: upstream.Target{Address: o.address}, Record: recordOf(down, o.address),
		})
	}()
	defer func() { conn.Close(); server.conn.Close(); <-served }()
	client.reads("SETTINGS 3=100 6=65536")
	expect(t, server.conn, http2.ClientPreface)
	server.reads("SETTINGS 2=0 6=65536")
	client.sends("GET 1")
	server.reads("HEADERS 1 end " + getFields)
	server.sends("HEADERS 1 end :status=200")
	client.reads("HEADERS 1 end :status=200")
}
