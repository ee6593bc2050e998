package secure

import (
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pillion-proxy/pillion/internal/budget"
	"github.com/pillion-proxy/pillion/internal/nettest"
	"github.com/pillion-proxy/pillion/internal/tcp"
)

// A chain of certificates larger than any of a mesh ends the handshake before the peer is verified.
func TestALargeHandshakeIsEnded(t *testing.T) {
	w := newWorld(t)
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		for copies, accepted := range map[int]bool{10: true, 300: false} {
			chain := *w.client
			for range copies {
				chain.Certificate = append(chain.Certificate, w.Certificate.Raw)
			}
			peer := w.peer()
			peer.Certificates, peer.MaxVersion = []tls.Certificate{chain}, version
			_, e, err := w.serve(t, w.mutual(), peer, nil)
			switch {
			case accepted && (err != nil || e.session == nil):
				t.Errorf("%d certificates: %v", copies, err)
			case !accepted && (err == nil || !strings.Contains(err.Error(), "more than 65536 bytes")):
				t.Errorf("%d certificates: %+v, %v", copies, e.session, err)
			}
		}
	}
}

// Handshakes of clients that stop are within the memory budget: those that exceed it are ended.
func TestStalledHandshakesAreInTheBudget(t *testing.T) {
	w := newWorld(t)
	const fit, more = 4, 3
	memory := Memory{budget.New(fit*(handshakeMemory+maxRecord+100) + handshakeMemory/2), netip.MustParseAddr("198.51.100.1")}
	ended := make(chan error)
	var clients []net.Conn
	for range fit + more {
		far, near := w.pair(t)
		if _, err := far.Write([]byte{22, 3, 1, 2, 0, 1, 0, 1}); err != nil {
			t.Fatal(err)
		}
		clients = append(clients, far)
		go func() {
			waiter := tcp.NewWaiter(t.Context())
			defer waiter.Close()
			_, err := Server(waiter, near, nil, NewServer(w.mutual()), memory, time.Now().Add(nettest.Patience))
			near.Reset()
			ended <- err
		}()
	}
	for range more {
		if err := <-ended; !errors.Is(err, budget.ErrEvicted) || failureOf(err).Failure != NoMemory {
			t.Errorf("ended with %v, want %v", err, NoMemory)
		}
	}
	for _, client := range clients {
		client.Close()
	}
	for range fit {
		if err := <-ended; errors.Is(err, budget.ErrEvicted) {
			t.Errorf("ended with %v, and there was memory", err)
		}
	}
	if used := memory.Budget.Used(); used != 0 {
		t.Errorf("%d bytes are accounted for after the handshakes", used)
	}
}

// The beginning of a record is within the memory budget, and so is the memory of crypto/tls for the records of TLS 1.2.
func TestUnfinishedRecordsAreInTheBudget(t *testing.T) {
	w := newWorld(t)
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		memory := Memory{budget.New(handshakeMemory * 3), netip.MustParseAddr("127.0.0.1")}
		far, near := w.pair(t)
		config := w.peer()
		config.MaxVersion = version
		sent := make(chan error, 1)
		go func() {
			err := tls.Client(far, config).Handshake()
			_, written := far.Write(append([]byte{23, 3, 3, 0x40, 0}, make([]byte, 16_000)...))
			sent <- errors.Join(err, written)
		}()
		e := &end{Conn: near, w: tcp.NewWaiter(t.Context())}
		t.Cleanup(e.w.Close)
		if _, err := Server(e.w, near, nil, NewServer(w.mutual()), memory, time.Now().Add(nettest.Patience)); err != nil {
			t.Fatal(err)
		}
		ended := make(chan error)
		go func() {
			_, err := e.read(make([]byte, 100))
			ended <- err
		}()
		if err := <-sent; err != nil {
			t.Fatal(err)
		}
		nettest.Eventually(t, "the record is accounted for", func() bool { return memory.Budget.Used() >= 16_000 })
		if far.Close(); <-ended == nil {
			t.Error("an unfinished record was read")
		}
		if near.Reset(); memory.Budget.Used() != 0 {
			t.Errorf("%d bytes are accounted for after the end", memory.Budget.Used())
		}
	}
}

// Behind a load balancer all connections have its address. The records of its clients are not those of one peer, which would
// be evicted in place of a client with more memory than any of them.
func TestRecordsAreAttributedToTheClientOfALoadBalancer(t *testing.T) {
	w, b := newWorld(t), budget.New(1<<20)
	ended := make(chan error)
	var clients []net.Conn
	for i := range 3 {
		far, near := w.pair(t)
		clients = append(clients, far)
		go func() {
			if tls.Client(far, w.peer()).Handshake() == nil {
				far.Write(append([]byte{23, 3, 3, 0x40, 0}, make([]byte, 16_000)...))
			}
		}()
		e := &end{Conn: near, w: tcp.NewWaiter(t.Context())}
		t.Cleanup(e.w.Close)
		memory := Memory{b, netip.AddrFrom4([4]byte{203, 0, 113, byte(i)})}
		if _, err := Server(e.w, near, nil, NewServer(w.mutual()), memory, time.Now().Add(nettest.Patience)); err != nil {
			t.Fatal(err)
		}
		go func() {
			_, err := e.read(make([]byte, 100))
			near.Reset()
			ended <- err
		}()
		nettest.Eventually(t, "the record is accounted for", func() bool { return b.Used() >= (i+1)*16_000 })
	}
	all := b.Used()
	owner := tcp.NewWaiter(t.Context())
	defer owner.Close()
	hold := func(i, n int) *budget.Account {
		a := new(budget.Account)
		a.Open(b, owner, netip.AddrFrom4([4]byte{198, 51, 100, byte(i)}))
		t.Cleanup(a.Close)
		a.Hold(n)
		return a
	}
	others := 0
	for ; b.Limit()-b.Used() >= all*3/4; others++ {
		hold(others, all/6)
	}
	if most := hold(others, b.Limit()-b.Used()+1); !most.Evicted() || b.Evictions() != 1 {
		t.Errorf("the client with the most memory is evicted: %v; %d evictions", most.Evicted(), b.Evictions())
	}
	for _, client := range clients {
		client.Close()
		if err := <-ended; errors.Is(err, budget.ErrEvicted) {
			t.Errorf("a client with little memory ended with %v", err)
		}
	}
}

// An error of the system is not a violation of TLS by the peer.
func TestErrorsOfTheSystemAreNotThePeers(t *testing.T) {
	for number, want := range map[unix.Errno]Failure{
		unix.ECONNRESET: Ended, unix.ETIMEDOUT: Ended, unix.EHOSTUNREACH: Ended, unix.EPIPE: Ended,
		unix.ENOSPC: NoResources, unix.EMFILE: NoResources, unix.ENFILE: NoResources, unix.ENOMEM: NoResources,
	} {
		if got := failureOf(fmt.Errorf("waiting: %w", os.NewSyscallError("epoll_ctl", number))).Failure; got != want {
			t.Errorf("%v is %v, want %v", number, got, want)
		}
	}
}
