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
// It uses the client's address but not its port. The downstream connection already exists between the client's address
// and port and the workload's, and it ends in this network namespace, as the new connection would. A namespace has one
// socket for each pair of ends: the SYN of a second connection would reach the first one and cause its reset. So the port
// must differ from those of all connections that the client has, or opens while ours lasts. Reserve records the former.
// The latter are unlikely, because ports are drawn below the ephemeral ranges: Linux, Windows and macOS assign theirs from
// 32768 upwards.
type Borrower struct {
	mark uint32

	mu     sync.Mutex
	served map[ends]struct{} // only those whose client port may be drawn
}

// ends are both ends of a connection.
type ends struct{ client, workload netip.AddrPort }

const (
	firstPort = 16384
	portCount = 16384
	maxTries  = 32 // with half of the ports in use, one dial in 2³² fails
)

// NewBorrower makes a Borrower whose connections have mark on their packets.
func NewBorrower(mark uint32) *Borrower {
	return &Borrower{mark: mark, served: make(map[ends]struct{})}
}

// Reserve keeps dials to workload from using client's address and port until release is called. A port that is never
// drawn needs no entry, and most clients have such a port.
func (b *Borrower) Reserve(client, workload netip.AddrPort) (release func()) {
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

func (b *Borrower) reserved(e ends) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	_, ok := b.served[e]
	return ok
}

// dial tries ports until one is free. Ports are drawn at random, so that the ends of the next connection cannot be
// predicted. A port in TIME_WAIT is free: an explicitly bound socket may reuse it at once, protected by TCP timestamps.
func (b *Borrower) dial(poller *tcp.Poller, w *tcp.Waiter, target Target, deadline time.Time) (up *tcp.Conn, err error) {
	err = fmt.Errorf("connecting to %v from %v: no port is free: %w", target.Address, target.Source, unix.EADDRINUSE)
	for range maxTries {
		local := netip.AddrPortFrom(target.Source, uint16(firstPort+rand.IntN(portCount)))
		if local == target.Address || b.reserved(ends{local, target.Address}) {
			continue
		}
		up, err = poller.DialAs(w, local, b.mark, target.Address, deadline)
		if !errors.Is(err, unix.EADDRINUSE) && !errors.Is(err, unix.EADDRNOTAVAIL) {
			break
		}
	}
	return up, err
}
