package upstream

import (
	"errors"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/internal/tcp"
)

// TestBorrowedPortsAvoidTheClientsOwnConnections has a client that uses every other port. With random ports, some of the
// borrowed connections would collide with the client's own.
func TestBorrowedPortsAvoidTheClientsOwnConnections(t *testing.T) {
	nettest.RequireRoot(t)
	const mark = 77
	pod, _ := nettest.PodAndPeer(t)
	pod.DeliverMarked(t, mark)
	pod.AnswerMarked(t)
	poller, err := tcp.NewPoller()
	if err != nil {
		t.Fatal(err)
	}
	defer poller.Close()
	w := tcp.NewWaiter(t.Context())
	defer w.Close()
	for _, c := range []struct{ here, client netip.Addr }{
		{nettest.PodIP4, netip.MustParseAddr("203.0.113.50")}, {nettest.PodIP6, netip.MustParseAddr("2001:db8:9::50")},
	} {
		var listener *tcp.Listener
		pod.Do(t, func() (err error) {
			listener, err = poller.Listen(netip.AddrPortFrom(c.here, 0))
			return err
		})
		defer listener.Close()
		borrower := NewBorrower(mark)
		dialer := Dialer{Poller: poller, Timeout: nettest.Patience, Borrow: borrower}
		target := Target{Source: c.client, Borrowed: true, Address: listener.Addr()}
		dial := func() (conn *tcp.Conn, err error) {
			pod.Do(t, func() error { conn, _, err = dialer.Dial(w, target); return nil })
			return conn, err
		}
		serve := func(first uint16) (done []func()) {
			for port := first; port < firstPort+portCount; port += 2 {
				done = append(done, borrower.Reserve(netip.AddrPortFrom(c.client, port), target.Address))
			}
			return done
		}
		even := serve(firstPort)
		for range 100 {
			conn, err := dial()
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			if local := conn.LocalAddr(); local.Addr() != c.client || local.Port() < firstPort || local.Port() >= firstPort+portCount || local.Port()%2 == 0 {
				t.Errorf("dialled from %v", local)
			}
		}
		serve(firstPort + 1)
		if conn, err := dial(); !errors.Is(err, unix.EADDRINUSE) || Reason(err) != flow.UpstreamUnreachable {
			t.Errorf("without a free port: %v, %v", conn, err)
		}
		for _, done := range even {
			done()
		}
		conn, err := dial()
		if err != nil {
			t.Fatalf("with free ports again: %v", err)
		}
		conn.Close()
	}
}

func TestReserveRecordsOnlyPortsThatMayBeDrawn(t *testing.T) {
	borrower := NewBorrower(1)
	workload := netip.MustParseAddrPort("192.0.2.1:80")
	for _, port := range []uint16{firstPort - 1, firstPort + portCount} {
		client := netip.AddrPortFrom(netip.MustParseAddr("203.0.113.50"), port)
		if n := testing.AllocsPerRun(100, func() { borrower.Reserve(client, workload)() }); n != 0 {
			t.Errorf("Reserve for port %d: %v allocations", port, n)
		}
	}
	for _, port := range []uint16{firstPort, firstPort + portCount - 1} {
		client := netip.AddrPortFrom(netip.MustParseAddr("203.0.113.50"), port)
		done := borrower.Reserve(client, workload)
		if !borrower.reserved(ends{client, workload}) {
			t.Errorf("a connection from port %d is not recorded", port)
		}
		done()
		if borrower.reserved(ends{client, workload}) {
			t.Errorf("a connection from port %d is still recorded after release", port)
		}
	}
}

// TestPortsInTimeWaitAreReused opens more connections than there are ports, so that ports in TIME_WAIT must be reused.
func TestPortsInTimeWaitAreReused(t *testing.T) {
	nettest.RequireRoot(t)
	const mark = 77
	pod, _ := nettest.PodAndPeer(t)
	pod.DeliverMarked(t, mark)
	pod.AnswerMarked(t)
	poller, err := tcp.NewPoller()
	if err != nil {
		t.Fatal(err)
	}
	defer poller.Close()
	w := tcp.NewWaiter(t.Context())
	defer w.Close()
	local := netip.MustParseAddrPort("203.0.113.50:20000")
	pod.Do(t, func() error {
		listener, err := poller.Listen(netip.AddrPortFrom(nettest.PodIP4, 0))
		if err != nil {
			return err
		}
		defer listener.Close()
		for range 20 {
			near, err := poller.DialAs(w, local, mark, listener.Addr(), time.Now().Add(nettest.Patience))
			if err != nil {
				return err
			}
			far, err := listener.Accept()
			if err != nil {
				return err
			}
			near.Close() // the side that closes first is in TIME_WAIT
			if _, err := far.Read(make([]byte, 1)); err == tcp.ErrAgain {
				_ = w.Wait(time.Now().Add(nettest.Patience), far, nil)
			}
			far.Close()
		}
		return nil
	})
}
