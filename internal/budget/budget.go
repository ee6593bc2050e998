// Package budget bounds the memory that peers can make the process hold: unfinished heads, header blocks, and messages
// that are kept so that they can be sent again.
//
// Each connection has an Account. It reports how much it holds before it waits, if that is more than an ordinary
// connection needs; other connections never take the lock. When the budget is used up, the account with the most memory
// of the peer with the most memory is evicted, the oldest among equals: its goroutine is interrupted, answers or resets
// its connection, and frees the memory. So a peer that holds much only harms itself, and others are served on.
package budget

import (
	"errors"
	"math/bits"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
)

// ErrEvicted is the error of a connection that was evicted.
var ErrEvicted = errors.New("the memory budget is used up, and this connection held the most")

// Owner is the goroutine of an account, as far as it can be interrupted.
type Owner interface {
	Interrupt() // ends its present wait, or else its next one; called from any goroutine
	Continue()  // takes Interrupt back; called by the owner
}

// Budget is shared by all connections of a process. Make it with New. A nil Budget has no limit.
type Budget struct {
	limit     int
	places    int          // for detained connections
	used      atomic.Int64 // the sum of all accounts; written under mu
	evictions atomic.Uint64
	detained  atomic.Int32 // connections, after their eviction

	mu      sync.Mutex
	peers   map[netip.Addr]*peer // that hold something
	evicted int                  // of used: held by accounts that were evicted
}

// peer holds the accounts of one peer.
type peer struct {
	held    int
	classes [classes]list // accounts by size
}

// Accounts of one class differ in size by a factor of less than two. Within a class the oldest is evicted first.
const (
	smallestClass = 12 // of up to 4 KiB
	classes       = 16
)

func class(n int) int { return min(max(bits.Len(uint(n-1))-smallestClass, 0), classes-1) }

// list is a list of accounts, the oldest first.
type list struct{ first, last *Account }

// New returns a budget of limit bytes.
func New(limit int) *Budget {
	return &Budget{limit: limit, places: places(limit), peers: make(map[netip.Addr]*peer)}
}

// Limit returns the size of the budget in bytes; 0 for a nil Budget.
func (b *Budget) Limit() int {
	if b == nil {
		return 0
	}
	return b.limit
}

// Used returns how many bytes all accounts hold.
func (b *Budget) Used() int {
	if b == nil {
		return 0
	}
	return int(b.used.Load())
}

// Evictions returns how many accounts were evicted.
func (b *Budget) Evictions() uint64 {
	if b == nil {
		return 0
	}
	return b.evictions.Load()
}

// Tight reports whether more than half of the budget is used: then optional memory, such as larger buffers, is to be
// avoided.
func (b *Budget) Tight() bool { return b != nil && int(b.used.Load()) > b.limit/2 }

// Bounds of the connections that wait for their end.
const (
	// detainedSize is about the memory of such a connection, that of the kernel included.
	detainedSize = 16 << 10

	// maxDetained bounds their number, and so their memory, which no account has, to 64 MiB. They wait for a second on average:
	// 4,096 attackers that replace evicted connections at once are slowed to one each in that time. Further evicted connections
	// are closed at once, whoever holds the places: that costs the agent work, and honest peers no time.
	maxDetained = 4096

	// detainedShare is the divisor of the process's descriptors that they may have. The others are for served connections.
	detainedShare = 4
)

// places returns how many connections may be detained by a budget of limit bytes. The limit of descriptors is the one that the
// Go runtime has raised at the start.
func places(limit int) int {
	n := min(limit/detainedSize, maxDetained)
	var files syscall.Rlimit
	if syscall.Getrlimit(syscall.RLIMIT_NOFILE, &files) == nil {
		n = int(min(uint64(n), files.Cur/detainedShare))
	}
	return n
}

// Detain counts a connection that stays open for some time after it was evicted, so that its peer does not replace it at once.
// It returns false if there are so many that they need as much memory as the budget has, a quarter of the descriptors, or more
// than maxDetained. Otherwise Release must follow.
func (b *Budget) Detain() bool {
	if b == nil {
		return false
	}
	if int(b.detained.Add(1)) > b.places {
		b.Release()
		return false
	}
	return true
}

// Release ends what Detain has begun.
func (b *Budget) Release() { b.detained.Add(-1) }

// Account counts the memory of one connection. Its methods belong to the goroutine of the connection. The zero value has no
// budget and no limit.
type Account struct {
	budget *Budget
	owner  Owner
	peer   netip.Addr

	held    int         // written by the owner only, under mu
	evicted atomic.Bool // written under mu

	next, prev *Account // of a list; guarded by mu
}

// Open begins an empty account. The memory is attributed to peer; addresses of one IPv6 prefix of 64 bits count as one
// peer. Close must be called before the account is opened again.
func (a *Account) Open(b *Budget, owner Owner, peer netip.Addr) {
	if peer = peer.Unmap(); peer.Is6() {
		if prefix, err := peer.WithZone("").Prefix(64); err == nil {
			peer = prefix.Addr()
		}
	}
	a.budget, a.owner, a.peer = b, owner, peer
}

// Hold reports that the account holds n bytes from now on; less than 0 counts as 0. It returns false if the account has
// been evicted, now or before, or if there is no memory at all: the owner must end the connection, free the memory, and
// report that.
func (a *Account) Hold(n int) bool {
	if a.budget == nil {
		return true
	}
	if n = max(n, 0); n == a.held {
		return !a.evicted.Load()
	}
	b := a.budget
	b.mu.Lock()
	defer b.mu.Unlock()
	switch more := n - a.held; {
	case a.evicted.Load():
		if more < 0 {
			b.used.Add(int64(more))
			b.evicted += more
			a.held = n
		}
		return false
	case more > 0 && int(b.used.Load())+more > b.limit+b.limit/overdraft: // others have not yet freed what they held
		b.evict(a)
		return false
	}
	b.set(a, n)
	for int(b.used.Load())-b.evicted > b.limit {
		b.evict(b.heaviest().largest())
	}
	return !a.evicted.Load()
}

// overdraft is the part of the limit by which memory of evicted accounts may exceed it.
const overdraft = 2

// Evicted reports whether the account has been evicted since it was opened.
func (a *Account) Evicted() bool { return a.evicted.Load() }

// Close ends the account. Its memory has been freed, or is now attributed otherwise. Closing a closed account does
// nothing.
func (a *Account) Close() {
	a.Hold(0)
	if a.evicted.Load() { // it is not listed any more, so this cannot change
		a.owner.Continue()
		a.evicted.Store(false)
	}
	a.budget, a.owner, a.peer = nil, nil, netip.Addr{}
}

// set changes what a holds.
func (b *Budget) set(a *Account, n int) {
	b.list(a, n)
	b.used.Add(int64(n - a.held))
	a.held = n
}

// list puts a where an account of n bytes belongs, nowhere if n is zero.
func (b *Budget) list(a *Account, n int) {
	p := b.peers[a.peer]
	if p == nil {
		p = new(peer)
		b.peers[a.peer] = p
	}
	switch {
	case a.held > 0 && (n == 0 || class(n) != class(a.held)):
		p.classes[class(a.held)].remove(a)
		if n > 0 {
			p.classes[class(n)].add(a)
		}
	case a.held == 0 && n > 0:
		p.classes[class(n)].add(a)
	}
	if p.held += n - a.held; p.held == 0 {
		delete(b.peers, a.peer)
	}
}

// heaviest returns the peer that holds the most.
func (b *Budget) heaviest() (most *peer) {
	for _, p := range b.peers {
		if most == nil || p.held > most.held {
			most = p
		}
	}
	return most
}

// largest returns the oldest of the largest accounts.
func (p *peer) largest() *Account {
	for i := len(p.classes) - 1; ; i-- {
		if a := p.classes[i].first; a != nil {
			return a
		}
	}
}

// evict interrupts the owner of a, so that it frees the memory.
func (b *Budget) evict(a *Account) {
	b.list(a, 0)
	b.evicted += a.held
	a.evicted.Store(true)
	b.evictions.Add(1)
	a.owner.Interrupt()
}

func (l *list) add(a *Account) {
	a.prev, a.next = l.last, nil
	if l.last != nil {
		l.last.next = a
	} else {
		l.first = a
	}
	l.last = a
}

func (l *list) remove(a *Account) {
	if a.prev != nil {
		a.prev.next = a.next
	} else {
		l.first = a.next
	}
	if a.next != nil {
		a.next.prev = a.prev
	} else {
		l.last = a.prev
	}
	a.next, a.prev = nil, nil
}
