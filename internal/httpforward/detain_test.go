package httpforward

import (
	"errors"
	"net"
	"net/http"
	"os"
	"testing"
	"time"

	"golang.org/x/net/http2"

	"github.com/pillion-proxy/pillion/internal/budget"
	"github.com/pillion-proxy/pillion/internal/nettest"
)

// wantDetained checks that an evicted connection stays open: its end would arrive right after the last response. When the client
// closes it, it ends.
func (r *rig) wantDetained(t *testing.T, conn net.Conn) {
	t.Helper()
	conn.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
	if n, err := conn.Read(make([]byte, 100)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("%d bytes and %v follow, want an open connection", n, err)
	}
	b := r.engine.config.Budget
	if used := b.Used(); used != 0 {
		t.Errorf("the connection holds %d bytes", used)
	}
	conn.Close()
	nettest.Eventually(t, "another connection may be detained", b.Detain)
}

// A client that replaces evicted connections waits for their end for some time. The budget has room for one that is detained.
func TestAnEvictedConnectionIsDetained(t *testing.T) {
	detained := func(c *Config) {
		c.Budget, c.detention, c.MaxHeadBytes = budget.New(20<<10), time.Hour, 256<<10
	}
	served := func(http.ResponseWriter, *http.Request) {}
	t.Run("HTTP/1", func(t *testing.T) {
		r := newRig(t, serveHTTP2(t, served), false, plain, detained)
		conn := r.dial(t)
		send(t, conn, largeHead)
		r.wantOverloaded(t, conn)
		r.wantDetained(t, conn)
	})
	attack := func(t *testing.T, r *rig) {
		client := newSpeaker(t, r.dial(t))
		send(t, client.conn, http2.ClientPreface)
		client.sends("SETTINGS")
		client.unfinished(1, 200<<10)
		client.until("GOAWAY 0 ENHANCE_YOUR_CALM")
		r.wantDetained(t, client.conn)
	}
	t.Run("HTTP/2", func(t *testing.T) { attack(t, newRig(t, serveHTTP2(t, served), true, plain, detained)) })
	t.Run("HTTP/2, routed", func(t *testing.T) {
		attack(t, newHub(t, serveHTTP2(t, served), &planned{decide: func(*Request, *Decision) {}}, detained))
	})
}
