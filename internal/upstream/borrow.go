package upstream

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pillion-proxy/pillion/internal/tcp"
)

// Borrower dials the workload from the addresses of its clients. Make it with NewBorrower.
//
// The address is the client's, and the port cannot be. Between the client's address and port and the workload's there is
// a connection already, the downstream one, which ends here as the new one would. A network namespace has one socket for
// each pair of ends: the SYN of a second one reaches the first, and what comes of that resets it. So the port is another,
// which must not be that of any connection that the client has, or opens while ours lasts. The first is known here. The
// second is made unlikely by ports that clients are not given: Linux, Windows and macOS take theirs from 32768 upwards.
type Borrower struct {
	mark uint32

	mu     sync.Mutex
	served map[ends]struct{} // only those that a dial could meet
}

// ends are both ends of a connection.
type ends struct{ client, workload netip.AddrPort }

const (
	firstPort = 16384
	portCount = 16384
	maxTries  = 32 // at which, with half of the ports in use, one dial in four thousand million fails
)

// NewBorrower makes a Borrower that marks what it sends.
func NewBorrower(mark uint32) *Borrower {
	return &Borrower{mark: mark, served: make(map[ends]struct{})}
}

// Serve says that there is a connection from client to workload, until the returned function is called. Of most clients
// nothing has to be remembered: their ports are never drawn.
func (b *Borrower) Reserve(client, workload netip.AddrPort) (done func()) {
	if client.Port() < firstPort || client.Port() >= firstPort+portCount {
		return func() {}
	}
	e := ends{client, workload}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.served[e] = struct{}{}
	return func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		delete(b.served, e)
	}
}

func (b *Borrower) serves(e ends) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	_, yes := b.served[e]
	return yes
}

// dial tries ports until one is free. They are drawn at random, so that nobody can tell from one connection the ends of
// the next. A port in TIME_WAIT is free: the kernel lets whoever binds it follow at once, by the timestamps.
func (b *Borrower) dial(poller *tcp.Poller, w *tcp.Waiter, target Target, deadline time.Time) (up *tcp.Conn, err error) {
	err = fmt.Errorf("connecting to %v from %v: no port is free: %w", target.Address, target.Source, unix.EADDRINUSE)
	for range maxTries {
		local := netip.AddrPortFrom(target.Source, uint16(firstPort+rand.IntN(portCount)))
		if local == target.Address || b.serves(ends{local, target.Address}) {
			continue
		}
		up, err = poller.DialAs(w, local, b.mark, target.Address, deadline)
		if !errors.Is(err, unix.EADDRINUSE) && !errors.Is(err, unix.EADDRNOTAVAIL) {
			break
		}
	}
	return up, err
}
