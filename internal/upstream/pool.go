package upstream

import (
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/pillion-proxy/pillion/internal/tcp"
)

// Target is the address of an upstream, and the source address from which it is dialled. With an invalid Source the
// kernel chooses. Connections with equal Targets are interchangeable unless the Target is Balanced.
type Target struct {
	Source  netip.Addr
	Address netip.AddrPort

	Borrowed bool // Source is the client's address, and needs a Borrower

	// Balanced means that the address may stand for several servers, one of which the network chooses for each new
	// connection, as it does behind the address of a Service. A client that opens a connection expects a new choice, so a
	// connection to a balanced Target serves one downstream connection only, and never enters a Pool. When a dial fails,
	// the next one may reach another server: see Dialer.Dial.
	Balanced bool

	// HTTP2 marks connections whose HTTP/1 messages a layer translates into HTTP/2. The caller of Dial sets the layer.
	HTTP2 bool

	// Group has the connections that Pool.Retire closes together; nil: they are not retired.
	Group *tcp.Group

	// Security secures and limits the connections; nil: they are plain, and have no limits of their own. Connections with
	// different values are not interchangeable.
	Security *Security
}

// Secured reports whether fresh connections begin with a handshake.
func (t *Target) Secured() bool { return t.Security != nil && t.Security.Handshake != nil }

// options returns the limits of the connections; nil: none.
func (t *Target) options() *Options {
	if t.Security == nil {
		return nil
	}
	return &t.Security.Options
}

// Over reports whether a connection with a use serves no further request.
func (t *Target) Over(u *Use, now time.Time) bool {
	o := t.options()
	return o != nil && (o.Requests > 0 && u.Requests >= o.Requests || o.Life > 0 && u.Opened != 0 && now.UnixNano()-u.Opened >= int64(o.Life))
}

// Streams returns how many of the streams that a peer takes at a time are used on a connection.
func (t *Target) Streams(peer uint32) uint32 {
	if o := t.options(); o != nil && o.Streams > 0 {
		return min(peer, o.Streams)
	}
	return peer
}

// Options are how connections to a Target are made, and how long they are used. Zero is no limit, and leaves a setting as it
// is.
type Options struct {
	ConnectTimeout time.Duration // in place of Dialer.Timeout
	IdleLife       time.Duration // in a Pool, if it is shorter than the Pool's
	Life           time.Duration // of a connection; it ends with the request in progress
	Requests       uint32        // on a connection
	Streams        uint32        // at a time, on a connection of HTTP/2

	KeepAliveProbes             uint32
	KeepAliveIdle, KeepAliveGap time.Duration // before the first probe, and between two; whole seconds
}

// Use is what a connection has been used for.
type Use struct {
	Opened   int64  // in Unix nanoseconds; 0: not known
	Requests uint32 // that were sent
}

// Security secures fresh connections to a Target, and limits them. It is never modified.
type Security struct {
	// Handshake puts a record layer under a connection, until the deadline; zero is none. Its error is the dial's. nil: the
	// connections are plain.
	Handshake func(w *tcp.Waiter, up *tcp.Conn, deadline time.Time) error

	Options
}

// maxIdle bounds the connections that a Pool keeps, for one target and for all.
const (
	maxIdlePerTarget = 256
	maxIdle          = 1024
)

// Pause is how long a connection was idle at most that the poller's events, without a system call, show to be open with
// certainty enough for a request that can be sent again.
const Pause = 20 * time.Millisecond

// Pool keeps upstream connections between two requests. The most recently used connection to a target is taken first.
// Balanced targets do not belong in it.
// Make it with NewPool.
type Pool struct {
	Stats Stats // of the direction that the pool belongs to

	idleLife time.Duration

	mu     sync.Mutex
	idle   map[Target]*shelf
	count  int
	sweep  *time.Timer // nil while no connection is idle
	closed bool
}

// shelf has the connections to one target, in the order in which Give received them. An empty one keeps its memory until the
// next sweep.
type shelf struct{ conns []resting }

type resting struct {
	conn  *tcp.Conn
	since time.Time
	use   Use
}

// NewPool makes a pool that does not return a connection that was idle for idleLife, and closes it at most half as long
// after that. idleLife should be shorter than the servers' own limits, so that a server rarely closes first. With zero or
// less the pool keeps no connection.
func NewPool(idleLife time.Duration) *Pool {
	return &Pool{idleLife: idleLife, idle: make(map[Target]*shelf)}
}

// Take returns a connection to target that was open when Take looked, or nil. The caller owns it.
func (p *Pool) Take(target Target) *tcp.Conn {
	conn, _ := p.TakeUsed(&target, false)
	return conn
}

// TakeUsed is Take for a target with options: it also returns what the connection has been used for. For a request that can be
// sent again, a connection that was idle for at most Pause need not be looked at: its events are enough. That saves a request
// of a busy service a system call.
func (p *Pool) TakeUsed(target *Target, repeatable bool) (*tcp.Conn, Use) {
	life := p.idleLife
	if o := target.options(); o != nil && o.IdleLife > 0 {
		life = min(life, o.IdleLife)
	}
	for {
		last := p.last(*target)
		if last.conn == nil {
			p.Stats.Missed.Add(1)
			return nil, Use{}
		}
		now := time.Now()
		idle := now.Sub(last.since)
		if idle < life && !last.conn.Retired() && !target.Over(&last.use, now) && (repeatable && idle <= Pause && last.conn.SeemsQuiet() || last.conn.Quiet()) {
			p.Stats.Reused.Add(1)
			return last.conn, last.use
		}
		last.conn.Close()
	}
}

// last removes the connection that Give received last. Its conn is nil if the list is empty.
func (p *Pool) last(target Target) resting {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := p.idle[target]
	if s == nil || len(s.conns) == 0 {
		return resting{}
	}
	end := len(s.conns) - 1
	last := s.conns[end]
	s.conns = slices.Delete(s.conns, end, end+1)
	p.count--
	return last
}

// Give hands over a connection that has no request in progress and can carry another. A full pool closes it.
func (p *Pool) Give(target Target, conn *tcp.Conn) { p.GiveUsed(target, conn, Use{}) }

// GiveUsed is Give for a connection whose use counts; see TakeUsed.
func (p *Pool) GiveUsed(target Target, conn *tcp.Conn, use Use) {
	conn.Rest()
	now := time.Now()
	if conn.Retired() || target.Over(&use, now) || !p.put(target, resting{conn, now, use}) {
		conn.Close()
	}
}

func (p *Pool) put(target Target, r resting) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := p.idle[target]
	if p.closed || p.idleLife <= 0 || p.count >= maxIdle || s != nil && len(s.conns) >= maxIdlePerTarget {
		return false
	}
	if s == nil {
		s = new(shelf)
		p.idle[target] = s
	}
	s.conns = append(s.conns, r)
	p.count++
	if p.sweep == nil {
		p.sweep = time.AfterFunc(p.idleLife, p.closeUnused)
	}
	return true
}

// closeUnused closes connections that were idle for too long, and runs again while others are left.
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

// closeBefore closes connections that became idle at limit or before, with the lock held.
func (p *Pool) closeBefore(limit time.Time) {
	for target, s := range p.idle {
		if len(s.conns) == 0 {
			delete(p.idle, target)
			continue
		}
		old := 0
		for old < len(s.conns) && !s.conns[old].since.After(limit) {
			s.conns[old].conn.Close()
			old++
		}
		s.conns = slices.Delete(s.conns, 0, old) // Delete clears the freed elements
		p.count -= old
	}
}

// Retire closes the idle connections of these groups. Those in use are closed when their requests have ended, and so are those
// that are being dialled.
func (p *Pool) Retire(groups map[*tcp.Group]struct{}) {
	p.Stats.open.Retire(groups)
	p.mu.Lock()
	defer p.mu.Unlock()
	for target, s := range p.idle {
		if _, ok := groups[target.Group]; !ok {
			continue
		}
		for i := range s.conns {
			s.conns[i].conn.Close()
		}
		p.count -= len(s.conns)
		clear(s.conns)
		s.conns = s.conns[:0]
	}
}

// Close closes all connections, and those that Give receives later.
func (p *Pool) Close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
	if p.sweep != nil {
		p.sweep.Stop()
	}
	p.closeBefore(time.Now())
}

// Idle returns the number of connections in the pool.
func (p *Pool) Idle() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.count
}
