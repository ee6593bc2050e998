package relay

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/tcp"
	"github.com/pillion-proxy/pillion/internal/tcp/layertest"
)

// far is the far end of a connection, with or without a layer.
type far interface {
	net.Conn
	CloseWrite() error
}

// layerRig is a rig with a record layer on one side or on both.
type layerRig struct {
	*rig
	client, server far
}

func newLayerRig(t *testing.T, layeredDown, layeredUp bool) *layerRig {
	t.Helper()
	poller, err := tcp.NewPoller()
	if err != nil {
		t.Fatal(err)
	}
	r := &layerRig{rig: &rig{poller: poller, ended: make(chan struct{})}}
	end := func(layered bool) (far, *tcp.Conn) {
		conn, near := pair(t, poller)
		conn.SetDeadline(time.Now().Add(3 * patience))
		t.Cleanup(func() { conn.Close() })
		if !layered {
			return conn, near
		}
		layertest.Under(near, nil)
		return &layertest.Peer{TCPConn: conn, Record: 40_000}, near // larger than the relay's buffer
	}
	var down, up *tcp.Conn
	r.client, down = end(layeredDown)
	r.server, up = end(layeredUp)
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		defer close(r.ended)
		w := tcp.NewWaiter(ctx)
		defer w.Close()
		r.end, r.err = Run(w, down, up, Options{FromDown: &r.fromDown, FromUp: &r.fromUp})
	}()
	t.Cleanup(func() {
		cancel()
		poller.WakeAll()
		<-r.ended
		poller.Close()
	})
	return r
}

// layers runs a test with a layer on down, on up, and on both.
func layers(t *testing.T, test func(t *testing.T, r *layerRig)) {
	t.Run("down", func(t *testing.T) { test(t, newLayerRig(t, true, false)) })
	t.Run("up", func(t *testing.T) { test(t, newLayerRig(t, false, true)) })
	t.Run("both", func(t *testing.T) { test(t, newLayerRig(t, true, true)) })
}

func TestLayeredSidesCarryEveryByteAndTheirHalfCloses(t *testing.T) {
	awaitNoPipes(t)
	before := openPipes(t)
	layers(t, func(t *testing.T, r *layerRig) {
		const size = 4 << 20
		var all sync.WaitGroup
		for _, c := range []struct {
			from, to far
			bytes    []byte
		}{{r.client, r.server, pattern(size)}, {r.server, r.client, pattern(size / 2)}} {
			all.Go(func() {
				c.from.Write(c.bytes)
				c.from.CloseWrite()
			})
			all.Go(func() {
				if got, err := io.ReadAll(c.to); err != nil || !bytes.Equal(got, c.bytes) {
					t.Errorf("%d of %d bytes arrived, %v", len(got), len(c.bytes), err)
				}
			})
		}
		all.Wait()
		r.wantEnd(t, Closed)
		if r.fromDown.Load() != size || r.fromUp.Load() != size/2 {
			t.Errorf("counted %d and %d bytes", r.fromDown.Load(), r.fromUp.Load())
		}
	})
	if after := openPipes(t); after != before {
		t.Errorf("%d pipes were opened for connections that cannot be spliced", after-before)
	}
}

// A record may exceed the relay's buffer, and the socket has no event for the rest of it.
func TestARecordLargerThanTheBufferArrivesWhole(t *testing.T) {
	layers(t, func(t *testing.T, r *layerRig) {
		for _, c := range []struct{ from, to far }{{r.client, r.server}, {r.server, r.client}} {
			want := pattern(40_000)
			c.from.Write(want)
			got := make([]byte, len(want))
			if n, err := io.ReadFull(c.to, got); err != nil || !bytes.Equal(got, want) {
				t.Errorf("%d bytes arrived, %v", n, err)
			}
		}
	})
}

// A truncated stream must not look complete to the other side.
func TestATruncatedSideBecomesAReset(t *testing.T) {
	layers(t, func(t *testing.T, r *layerRig) {
		near, other, want := r.client, r.server, DownReset
		if _, layered := near.(*layertest.Peer); !layered {
			near, other, want = r.server, r.client, UpReset
		}
		near.Write([]byte("half"))
		got := make([]byte, 4)
		if _, err := io.ReadFull(other, got); err != nil {
			t.Fatal(err)
		}
		near.(*layertest.Peer).Truncate()
		r.wantEnd(t, want)
		if !errors.Is(r.err, io.ErrUnexpectedEOF) {
			t.Errorf("the error is %v", r.err)
		}
		if _, err := other.Read(got); err == nil || err == io.EOF {
			t.Errorf("the other side reads %v", err)
		}
	})
}

func TestATicketIsNotForwarded(t *testing.T) {
	layers(t, func(t *testing.T, r *layerRig) {
		near, other := r.client, r.server
		if _, layered := near.(*layertest.Peer); !layered {
			near, other = r.server, r.client
		}
		near.(*layertest.Peer).Ticket()
		near.Write([]byte("data"))
		near.(*layertest.Peer).Ticket()
		near.CloseWrite()
		if got, err := io.ReadAll(other); string(got) != "data" || err != nil {
			t.Errorf("the other side reads %q, %v", got, err)
		}
		other.Write([]byte("answer"))
		other.CloseWrite()
		if got, err := io.ReadAll(near); string(got) != "answer" || err != nil {
			t.Errorf("in the other direction: %q, %v", got, err)
		}
		r.wantEnd(t, Closed)
	})
}
