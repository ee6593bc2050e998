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

// A request that arrives after upstream has closed was not processed, and downstream may repeat it elsewhere: the
// GOAWAY names an earlier last stream.
func TestARequestThatComesBehindUpstreamsEndMayBeSentAgain(t *testing.T) {
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
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(nettest.Patience))
	client := newSpeaker(t, conn.(*net.TCPConn))
	w := tcp.NewWaiter(t.Context())

	down, err := listener.Accept()
	if err != nil {
		t.Fatal(err)
	}
	send(t, conn, http2.ClientPreface)
	client.sends("SETTINGS")
	read := tcp.TakeBuffer()
	for read.Len() < len(http2.ClientPreface)+9 {
		if _, err := read.Fill(down); err == tcp.ErrAgain {
			_ = w.Wait(time.Time{}, down, nil)
		} else if err != nil {
			t.Fatal(err)
		}
	}
	up, _, err := r.engine.config.Dialer.Dial(w, upstream.Target{Address: o.address})
	if err != nil {
		t.Fatal(err)
	}
	client.sends("GET 1")
	o.accept().Close()
	for !down.Readable() || !up.Readable() {
		if err := w.Wait(time.Time{}, down, up); err != nil {
			t.Fatal(err)
		}
	}
	served := make(chan struct{})
	go func() {
		defer close(served)
		defer w.Close()
		r.engine.serveHTTP2(w, &Connection{
			Down: down, Read: read, Early: up, Target: upstream.Target{Address: o.address}, Record: recordOf(down, o.address),
		})
	}()
	defer func() { conn.Close(); <-served }()
	client.reads("SETTINGS 3=4096 6=65536")
	client.reads("SETTINGS ack")
	client.reads("GOAWAY 0 NO_ERROR")
	client.reads("the end")
}
