package upstream

import (
	"errors"
	"io"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/internal/tcp"
	"github.com/pillion-proxy/pillion/internal/tcp/layertest"
)

// A TLS 1.3 server sends session tickets after the handshake or later. They do not make a pooled connection unusable.
func TestPooledConnectionUnderALayer(t *testing.T) {
	for _, c := range []struct {
		name   string
		send   func(*layertest.Peer) error
		usable bool
	}{
		{"nothing", func(*layertest.Peer) error { return nil }, true},
		{"a ticket", (*layertest.Peer).Ticket, true},
		{"the close message", (*layertest.Peer).CloseMessage, false},
		{"a ticket, then the close message", func(p *layertest.Peer) error { p.Ticket(); return p.CloseMessage() }, false},
		{"FIN", (*layertest.Peer).Truncate, false},
		{"data", func(p *layertest.Peer) error {
			_, err := io.WriteString(p, "HTTP/1.1 408 Request Timeout\r\n\r\n")
			return err
		}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newServer(t)
			pool := s.newPool(t, longLife)
			peer, conn := layertest.Accept(t, s.poller)
			if err := c.send(peer); err != nil {
				t.Fatal(err)
			}
			if c.name != "nothing" { // the bytes must have arrived before Take
				for s.w.Wait(time.Now().Add(nettest.Patience), conn, nil) == nil && !conn.Readable() {
				}
			}
			if !c.usable {
				nettest.Eventually(t, "the end of its use", func() bool { return !conn.Quiet() })
			}
			pool.Give(s.target(), conn)
			got := pool.Take(s.target())
			if (got != nil) != c.usable {
				t.Errorf("taken: %v", got != nil)
			}
			if got == nil {
				if err := readEnd(peer); err != io.EOF {
					t.Errorf("the server reads %v", err)
				}
				return
			}
			io.WriteString(struct{ io.Writer }{got}, "question")
			if p := make([]byte, 8); true {
				if _, err := io.ReadFull(peer, p); err != nil || string(p) != "question" {
					t.Errorf("the server reads %q, %v", p, err)
				}
			}
		})
	}
}

func readEnd(peer *layertest.Peer) error {
	_, err := peer.Read(make([]byte, 1))
	return err
}

func TestErrorOfALayerIsADialError(t *testing.T) {
	s := newServer(t)
	refused := errors.New("handshake failed")
	var stats Stats
	target := s.target()
	target.Security = &Security{Handshake: func(*tcp.Waiter, *tcp.Conn, time.Time) error { return refused }}
	up, _, err := (&Dialer{Poller: s.poller, Stats: &stats}).Dial(s.w, target)
	if up != nil || err != refused || stats.Failed.Load() != 1 || stats.Connected.Load() != 0 || stats.Active.Load() != 0 {
		t.Errorf("Dial = %v, %v; counted %d failures", up, err, stats.Failed.Load())
	}
	far, err := s.listener.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer far.Close()
	s.wantClosed(t, far)
}

// A handshake needs a bound: its peer may be silent.
func TestALayerHasTheDialsDeadline(t *testing.T) {
	s := newServer(t)
	for _, timeout := range []time.Duration{0, time.Hour} {
		began := time.Now()
		var got time.Time
		target := s.target()
		target.Security = &Security{Handshake: func(_ *tcp.Waiter, _ *tcp.Conn, deadline time.Time) error {
			got = deadline
			return nil
		}}
		up, _, err := (&Dialer{Poller: s.poller, Timeout: timeout}).Dial(s.w, target)
		if err != nil {
			t.Fatal(err)
		}
		up.Close()
		if timeout == 0 && !got.IsZero() || timeout > 0 && (got.Before(began.Add(timeout)) || got.After(time.Now().Add(timeout))) {
			t.Errorf("with a timeout of %v the deadline is %v", timeout, got)
		}
	}
}
