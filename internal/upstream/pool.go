package upstream

import (
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/pillion-proxy/pillion/internal/tcp"
)

// Target is where a connection leads, and from which address. An invalid Source leaves that to the kernel. Connections to
// the same Target are as good as each other: a request may take any of them.
type Target struct {
	Source   netip.Addr
	Borrowed bool // Source is the client's, and needs a Borrower
	Address  netip.AddrPort
}

// maxIdle bounds the connections that a Pool keeps, for one target and for all.
const (
	maxIdlePerTarget = 256
	maxIdle          = 1024
)

// Pool keeps upstream connections that are between two requests, for whoever has the next one for the same target. The
// one that was used last is taken first. Make it with NewPool.
type Pool struct {
	Stats Stats // of the direction that the pool belongs to

	idleLife time.Duration

	mu     sync.Mutex
	idle   map[Target][]resting // in the order in which they were given
	count  int
	sweep  *time.Timer // nil while nothing is idle
	closed bool
}

type resting struct {
	conn  *tcp.Conn
	since time.Time
}

// NewPool makes a pool that gives out no connection that has rested for idleLife, and closes it half as long after that
// at the latest. It should be shorter than any server's own limit, so that it is rarely the server that closes. Zero or
// less keeps none.
func NewPool(idleLife time.Duration) *Pool {
	return &Pool{idleLife: idleLife, idle: make(map[Target][]resting)}
}

// Take returns a connection to target that was open a moment ago, or nil. The caller owns it.
func (p *Pool) Take(target Target) *tcp.Conn {
	for {
		last := p.last(target)
		if last.conn == nil {
			p.Stats.Missed.Add(1)
			return nil
		}
		if time.Since(last.since) < p.idleLife && last.conn.Quiet() {
			p.Stats.Reused.Add(1)
			return last.conn
		}
		last.conn.Close()
	}
}

// last takes the connection that was given last, or none, out of the pool.
func (p *Pool) last(target Target) resting {
	p.mu.Lock()
	defer p.mu.Unlock()
	list := p.idle[target]
	if len(list) == 0 {
		return resting{}
	}
	end := len(list) - 1
	last := list[end]
	p.keep(target, slices.Delete(list, end, end+1))
	return last
}

// Give hands over a connection on which no request is under way and which is fit for the next. The pool closes it when
// it has no room.
func (p *Pool) Give(target Target, conn *tcp.Conn) {
	conn.Rest()
	if !p.put(target, conn) {
		conn.Close()
	}
}

func (p *Pool) put(target Target, conn *tcp.Conn) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	list := p.idle[target]
	if p.closed || p.idleLife <= 0 || p.count >= maxIdle || len(list) >= maxIdlePerTarget {
		return false
	}
	p.keep(target, append(list, resting{conn, time.Now()}))
	if p.sweep == nil {
		p.sweep = time.AfterFunc(p.idleLife, p.closeUnused)
	}
	return true
}

// keep stores a target's list, with the lock held. An empty one keeps its memory until the next sweep.
func (p *Pool) keep(target Target, list []resting) {
	p.count += len(list) - len(p.idle[target])
	p.idle[target] = list
}

// closeUnused closes what has rested too long, and comes again as long as there is more.
func (p *Pool) closeUnused() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closeBefore(time.Now().Add(-p.idleLife))
	if len(p.idle) > 0 {
		p.sweep.Reset(p.idleLife / 2)
		return
	}
	p.sweep = nil
}

// closeBefore closes what has rested since the given time or longer, with the lock held.
func (p *Pool) closeBefore(limit time.Time) {
	for target, list := range p.idle {
		if len(list) == 0 {
			delete(p.idle, target)
			continue
		}
		old := 0
		for old < len(list) && !list[old].since.After(limit) {
			list[old].conn.Close()
			old++
		}
		p.keep(target, slices.Delete(list, 0, old)) // which forgets them, too
	}
}

// Close closes all connections. What is given later is closed at once.
func (p *Pool) Close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
	if p.sweep != nil {
		p.sweep.Stop()
	}
	p.closeBefore(time.Now())
}

// Idle is the number of connections that the pool keeps now.
func (p *Pool) Idle() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.count
}
