package tcp_test

import (
	"errors"
	"io"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/budget"
	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/internal/tcp"
)

// client is the peer of the tests' connections, behind a load balancer.
var client = netip.MustParseAddr("203.0.113.1")

// bystander is an owner that is not to be evicted.
type bystander struct{ t *testing.T }

func (o bystander) Interrupt() { o.t.Error("another account was evicted") }
func (bystander) Continue()    {}

// Limits of these tests: the peer holds more than half of the budget.
const (
	heldLimit = 75_000
	heldLeast = 40_000
)

// exhaust uses up the rest of the budget by another peer, and returns how much that holds.
func exhaust(t *testing.T, b *budget.Budget) (n int) {
	t.Helper()
	nettest.Eventually(t, "what the layer holds is reported", func() bool { return b.Used() >= heldLeast })
	n = heldLimit + 1 - b.Used()
	other := new(budget.Account)
	other.Open(b, bystander{t}, netip.MustParseAddr("198.51.100.1"))
	t.Cleanup(other.Close)
	if !other.Hold(n) {
		t.Fatal("there is no memory for another account")
	}
	return n
}

// A peer that sends the beginning of a record holds memory for as long as the connection waits.
func TestAnUnfinishedRecordIsInTheBudget(t *testing.T) {
	r, b := newLayerRig(t), budget.New(heldLimit)
	r.conn.SetBudget(b, client)
	if _, err := r.peer.TCPConn.Write(append([]byte{'D', 0xff, 0xff}, make([]byte, heldLeast)...)); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error)
	go func() {
		for {
			_, err := r.conn.Read(make([]byte, 100))
			if err == tcp.ErrAgain {
				err = r.w.Wait(time.Now().Add(nettest.Patience), r.conn, nil)
			}
			if err != nil {
				ended <- err
				return
			}
		}
	}()
	others := exhaust(t, b)
	if err := <-ended; err != budget.ErrEvicted {
		t.Fatalf("the connection ended with %v", err)
	}
	_, write := r.conn.Write([]byte("x"))
	if failed := r.conn.Failed(); write != budget.ErrEvicted || failed != budget.ErrEvicted || !r.conn.Ended() {
		t.Errorf("a write fails with %v, and the connection with %v", write, failed)
	}
	if used := b.Used(); used != others {
		t.Errorf("%d bytes are accounted for, want %d", used, others)
	}
}

// A closed connection holds what its peer does not take.
func TestUnsentBytesOfAClosedConnectionAreInTheBudget(t *testing.T) {
	r, b := newLayerRig(t), budget.New(1)
	for len(r.fill(t, random(64<<20))) > 0 { // the kernels may find room after it
		r.w.Wait(time.Now().Add(20*time.Millisecond), r.conn, nil)
	}
	r.conn.SetBudget(b, client)
	r.conn.Close()
	nettest.Eventually(t, "the connection is evicted", func() bool { return b.Evictions() == 1 && b.Used() == 0 })
	if _, err := io.ReadAll(r.peer); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the peer reads %v", err)
	}
}

// Discarded bytes are not decoded, and take no memory.
func TestInputIsDiscarded(t *testing.T) {
	r, b := newLayerRig(t), budget.New(heldLimit)
	r.conn.SetBudget(b, client)
	const size = 3 << 20
	sent := make(chan error, 1)
	go func() {
		_, err := r.peer.TCPConn.Write(make([]byte, size))
		sent <- errors.Join(err, r.peer.TCPConn.CloseWrite())
	}()
	total := 0
	for ended := error(nil); ended == nil; {
		n, err := r.conn.Discard()
		if total += n; err == tcp.ErrAgain {
			r.wait(t)
		} else {
			ended = err
		}
	}
	if err := <-sent; total != size || err != nil || b.Evictions() != 0 {
		t.Errorf("%d bytes, %v, %d evictions", total, err, b.Evictions())
	}
}
