package listener

import (
	"context"
	"io"
	"log/slog"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/internal/tcp"
	"github.com/pillion-proxy/pillion/internal/tcp/layertest"
)

// flooding writes to each connection under a record layer until the socket is full, and closes it.
type flooding struct{ closed chan struct{} }

func (f flooding) ServeConn(_ context.Context, conn *tcp.Conn) {
	layertest.Under(conn, nil)
	for p := make([]byte, 1<<20); ; {
		if _, err := conn.Write(p); err != nil {
			break
		}
	}
	conn.Close()
	f.closed <- struct{}{}
}

func (flooding) Refuse(conn *tcp.Conn) { conn.Reset() }

// The descriptor of a connection that is closed and still sends is in use, so it counts.
func TestAConnectionThatStillSendsCountsForTheLimit(t *testing.T) {
	handler, limit := flooding{make(chan struct{}, 1)}, NewLimit(1)
	s := serving(t, 1, handler, limit, slog.DiscardHandler)
	conn := dial(t, s, 0)
	select {
	case <-handler.closed:
	case <-time.After(patience):
		t.Fatal("the connection was not served")
	}
	nettest.Eventually(t, "the connection has been served", func() bool { return s.Active() == 0 })
	if got := limit.open.Load(); got != 1 {
		t.Errorf("%d connections count while one still sends", got)
	}
	if _, err := io.Copy(io.Discard, conn); err != nil {
		t.Error(err)
	}
	nettest.Eventually(t, "the connection no longer counts", func() bool { return limit.open.Load() == 0 })
}
