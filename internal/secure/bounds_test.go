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
