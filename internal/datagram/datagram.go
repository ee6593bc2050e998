// Package datagram carries UDP datagrams that arrive as packets of a link, by sockets of the caller's network, and passes
// answers back as packets. It is a translation of addresses without the kernel's: each client, an address and a port inside,
// has one socket for all its destinations. So destinations see one source (RFC 4787 §4.1), and answers have their real one.
// Answers are accepted from hosts that the client has sent to. An ICMP error that a datagram meets is passed back as well.
//
// Everything is bounded for the process: clients, flows, and datagrams that wait for a judgement. When a bound is reached, the
// flow or the client that was idle for longest ends.
package datagram

import (
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pillion-proxy/pillion/internal/flow"
)

// The bounds of a Carrier.
const (
	maxClients = 512 // each has a descriptor
	maxFlows   = 4096
	maxJudging = 64      // flows that wait for a judgement
	maxWaiting = 16      // datagrams of such a flow
	maxHeld    = 1 << 20 // bytes of all datagrams that wait

	// idleTime ends a flow. RFC 4787 §4.3 recommends 5 minutes, and requires 2.
	idleTime = 5 * time.Minute
	// refusedTime is how long a judgement against a flow counts: names may be resolved meanwhile.
	refusedTime = time.Second
)

// Config configures a Carrier.
type Config struct {
	Links     []*os.File   // packet sockets, non-blocking, one for each family; closed by Close
	Addresses []netip.Addr // of clients; packets with others are discarded

	// Judge returns "" if a destination is allowed, and otherwise why not. It may block. nil: everything is allowed.
	Judge func(to netip.AddrPort) (denied string)

	// Began receives each flow that is carried, and may set its Live. It must not block. nil: not called.
	Began func(*Flow)

	// Ended receives each flow when it ends, and a denied one at once. It must not block.
	Ended func(Flow)
}

// Flow is what a client and a destination have exchanged.
type Flow struct {
	Client, Destination netip.AddrPort
	Opened, Used        time.Time    // first and last datagram
	Sent, Received      uint64       // bytes of payload that the client has sent and received
	Live                *flow.Record // counts the same bytes while they move; nil: not counted
	Denied              string       // why the flow was not carried
	Failure             string       // why the last datagram that failed could not be carried
}

func (f *Flow) count(sent, received int) {
	f.Sent += uint64(sent)
	f.Received += uint64(received)
	if f.Live != nil {
		f.Live.Received.Add(uint64(sent))
		f.Live.Sent.Add(uint64(received))
	}
}

// Carrier carries datagrams. Make it with New.
type Carrier struct {
	config  Config
	running sync.WaitGroup
	stop    chan struct{}
	buffers sync.Pool // of *[]byte, for answers
	carries func(*packet) bool

	mu      sync.Mutex
	clients map[netip.AddrPort]*client
	flows   int
	judging int
	held    int // bytes that wait for a judgement
	closed  bool
}

// client is a socket of the command.
type client struct {
	address netip.AddrPort
	link    *os.File
	socket  *socket
	flows   map[netip.AddrPort]*carriedFlow
	hosts   map[netip.Addr]int // flows that are carried, by address
}

// state is that of a flow.
type state int

const (
	judging state = iota
	carried
	refused
)

type carriedFlow struct {
	Flow
	state   state
	waiting [][]byte // while judging
}

// New returns a Carrier that works until Close.
func New(config Config) *Carrier {
	return start(&Carrier{config: config, carries: config.carries})
}

func start(c *Carrier) *Carrier {
	c.stop, c.clients = make(chan struct{}), make(map[netip.AddrPort]*client)
	c.buffers.New = func() any { b := make([]byte, headroom+maxPacket); return &b }
	for _, link := range c.config.Links {
		c.running.Go(func() { c.read(link) })
	}
	c.running.Go(c.endIdle)
	return c
}

// Close ends all flows.
func (c *Carrier) Close() {
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return
	}
	c.closed = true
	for _, one := range c.clients {
		c.endClient(one)
	}
	c.mu.Unlock()
	close(c.stop)
	for _, link := range c.config.Links {
		link.Close()
	}
	c.running.Wait()
}

// read carries the datagrams of a link until it is closed or its namespace disappears.
func (c *Carrier) read(link *os.File) {
	frame := make([]byte, maxFrame)
	for {
		n, err := link.Read(frame)
		if err != nil {
			return
		}
		if p, ok := parse(frame[:n]); ok && c.carries(&p) {
			c.send(link, &p)
		}
	}
}

// carries reports whether a datagram is one of the command to another host. A socket that is bound to the link can send
// datagrams for loopback addresses.
func (c *Config) carries(p *packet) bool {
	to, own := p.destination.Addr(), false
	for _, address := range c.Addresses {
		if to == address {
			return false
		}
		own = own || address == p.source.Addr()
	}
	broadcast := netip.AddrFrom4([4]byte{255, 255, 255, 255})
	return own && !to.IsLoopback() && !to.IsUnspecified() && !to.IsMulticast() && !to.Is4In6() && to != broadcast && p.destination.Port() != 0
}

// send carries a datagram to its destination. A datagram that cannot be carried is answered with an ICMP error.
func (c *Carrier) send(link *os.File, p *packet) {
	c.mu.Lock()
	one, f := c.find(link, p)
	if f == nil || f.state == judging {
		c.mu.Unlock()
		return
	}
	state, out := f.state, one.socket
	c.mu.Unlock()
	if state == refused {
		c.reject(one, p.destination, unix.EACCES)
		return
	}
	c.transmit(one, out, p.destination, p.payload)
}

// transmit sends a datagram, and reports an error to its sender.
func (c *Carrier) transmit(one *client, out *socket, to netip.AddrPort, payload []byte) {
	err := out.send(to, payload)
	if err != nil { // of an earlier datagram, or of this one
		c.drain(one, out)
		err = out.send(to, payload)
	}
	if err == nil || err == errClosed {
		return
	}
	c.fail(one, to, err)
}

// fail records why a datagram was not carried, and reports it to its sender.
func (c *Carrier) fail(one *client, to netip.AddrPort, err error) {
	c.mu.Lock()
	if f := one.flows[to]; f != nil {
		f.Failure = err.Error()
	}
	c.mu.Unlock()
	if number, ok := err.(unix.Errno); ok && number != unix.EAGAIN && number != unix.ENOBUFS {
		c.reject(one, to, number)
	}
}

func (c *Carrier) reject(one *client, to netip.AddrPort, cause unix.Errno) {
	_, _ = one.link.Write(unreachable(one.address, to, cause)) // fails when the namespace has disappeared
}

// find returns the flow of a datagram, and makes it if it is new. The flow is nil if the datagram cannot be carried. The
// datagram waits if its flow is judged.
func (c *Carrier) find(link *os.File, p *packet) (*client, *carriedFlow) {
	one := c.client(link, p)
	if one == nil {
		return nil, nil
	}
	now := time.Now()
	f := one.flows[p.destination]
	if f != nil && f.state == refused && now.Sub(f.Used) > refusedTime {
		c.remove(one, f)
		f = nil
	}
	if f == nil {
		f = c.open(one, p.destination, now)
	}
	switch {
	case f == nil:
		return one, nil
	case f.state == judging && len(f.waiting) < maxWaiting && c.held+len(p.payload) <= maxHeld:
		f.waiting = append(f.waiting, slices.Clone(p.payload))
		c.held += len(p.payload)
	case f.state == carried:
		f.Used = now
		f.count(len(p.payload), 0)
	}
	return one, f
}

// client returns the client of a datagram, and makes it if it is new; nil if that fails.
func (c *Carrier) client(link *os.File, p *packet) *client {
	if c.closed {
		return nil
	}
	if one := c.clients[p.source]; one != nil {
		return one
	}
	if len(c.clients) >= maxClients {
		c.endClient(c.idlest())
	}
	out, err := newSocket(p.source.Addr().Is6())
	if err != nil {
		now := time.Now()
		c.config.Ended(Flow{Client: p.source, Destination: p.destination, Opened: now, Used: now, Failure: "opening a socket: " + err.Error()})
		return nil
	}
	one := &client{address: p.source, link: link, socket: out, flows: make(map[netip.AddrPort]*carriedFlow), hosts: make(map[netip.Addr]int)}
	c.clients[p.source] = one
	c.running.Go(func() { c.receive(one) })
	return one
}

// open adds a flow to a client; nil if too many wait for a judgement.
func (c *Carrier) open(one *client, to netip.AddrPort, now time.Time) *carriedFlow {
	if c.config.Judge != nil && c.judging >= maxJudging {
		c.config.Ended(Flow{Client: one.address, Destination: to, Opened: now, Used: now, Failure: "too many destinations at once are to be judged"})
		return nil
	}
	if c.flows >= maxFlows {
		c.endIdlestFlow()
	}
	f := &carriedFlow{Flow: Flow{Client: one.address, Destination: to, Opened: now, Used: now}}
	one.flows[to] = f
	c.flows++
	if c.config.Judge == nil {
		c.accept(one, f)
		return f
	}
	c.judging++
	c.running.Go(func() { c.judge(one, f) })
	return f
}

func (c *Carrier) accept(one *client, f *carriedFlow) {
	f.state = carried
	if c.config.Began != nil {
		c.config.Began(&f.Flow)
	}
	one.hosts[f.Destination.Addr()]++
}

// judge decides about a flow, and carries or refuses what waits for that.
func (c *Carrier) judge(one *client, f *carriedFlow) {
	denied := c.config.Judge(f.Destination)
	c.mu.Lock()
	c.judging--
	for _, payload := range f.waiting {
		c.held -= len(payload)
	}
	if one.flows[f.Destination] != f { // it has ended
		c.mu.Unlock()
		return
	}
	waiting := f.waiting
	f.waiting = nil
	if denied != "" {
		f.state, f.Denied = refused, denied
		c.config.Ended(f.Flow)
	} else {
		c.accept(one, f)
		for _, payload := range waiting {
			f.count(len(payload), 0)
		}
	}
	c.mu.Unlock()
	if denied != "" {
		c.reject(one, f.Destination, unix.EACCES)
		return
	}
	for _, payload := range waiting {
		c.transmit(one, one.socket, f.Destination, payload)
	}
}

// receive passes answers to a client until its socket is closed.
func (c *Carrier) receive(one *client) {
	for {
		failed, err := one.socket.wait()
		if err != nil {
			return
		}
		if failed {
			c.drain(one, one.socket)
		}
		buffer := c.buffers.Get().(*[]byte)
		for {
			n, from, err := one.socket.receive((*buffer)[headroom:])
			if err == unix.EAGAIN || err == errClosed {
				break
			}
			if err != nil {
				c.drain(one, one.socket)
				continue
			}
			c.pass(one, from, *buffer, n)
		}
		c.buffers.Put(buffer)
	}
}

// pass gives an answer of n bytes to a client.
func (c *Carrier) pass(one *client, from netip.AddrPort, buffer []byte, n int) {
	if !c.expects(one, from, n) {
		return
	}
	frame := answer(buffer, n, from, one.address)
	if frame == nil {
		c.fail(one, from, unix.EMSGSIZE)
		return
	}
	_, _ = one.link.Write(frame) // fails when the namespace has disappeared
}

// expects reports whether an answer is from a host that the client has sent to, and counts it. A host may answer from another
// port, as servers of TFTP do (RFC 1350 §4).
func (c *Carrier) expects(one *client, from netip.AddrPort, n int) bool {
	c.mu.Lock()
	f, known := one.flows[from], one.hosts[from.Addr()] > 0
	c.mu.Unlock()
	if f == nil && (!known || c.config.Judge != nil && c.config.Judge(from) != "") {
		return false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	now := time.Now()
	if f = one.flows[from]; f == nil {
		if c.closed || c.clients[one.address] != one || c.flows >= maxFlows {
			return false
		}
		f = &carriedFlow{Flow: Flow{Client: one.address, Destination: from, Opened: now}}
		one.flows[from] = f
		c.flows++
		c.accept(one, f)
	}
	if f.state != carried {
		return false
	}
	f.Used = now
	f.count(0, n)
	return true
}

// drain passes the ICMP errors that a socket has received to its client.
func (c *Carrier) drain(one *client, out *socket) {
	for {
		to, cause, err := out.failure()
		if err != nil {
			return
		}
		if cause != 0 {
			c.fail(one, to, cause)
		}
	}
}

// endIdle ends idle flows, and clients without flows, until Close.
func (c *Carrier) endIdle() {
	ticker := time.NewTicker(idleTime / 20)
	defer ticker.Stop()
	for {
		select {
		case <-c.stop:
			return
		case now := <-ticker.C:
			c.endUnusedSince(now.Add(-idleTime))
		}
	}
}

func (c *Carrier) endUnusedSince(then time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, one := range c.clients {
		for _, f := range one.flows {
			if f.Used.Before(then) {
				c.remove(one, f)
			}
		}
		if len(one.flows) == 0 {
			c.endClient(one)
		}
	}
}

// remove ends a flow.
func (c *Carrier) remove(one *client, f *carriedFlow) {
	delete(one.flows, f.Destination)
	c.flows--
	if f.state == carried {
		if one.hosts[f.Destination.Addr()]--; one.hosts[f.Destination.Addr()] == 0 {
			delete(one.hosts, f.Destination.Addr())
		}
	}
	if f.state != refused { // refused flows were reported
		c.config.Ended(f.Flow)
	}
}

func (c *Carrier) endClient(one *client) {
	for _, f := range one.flows {
		c.remove(one, f)
	}
	delete(c.clients, one.address)
	one.socket.close()
}

// idlest returns the client whose last datagram is the oldest.
func (c *Carrier) idlest() (found *client) {
	var oldest time.Time
	for _, one := range c.clients {
		var last time.Time
		for _, f := range one.flows {
			if f.Used.After(last) {
				last = f.Used
			}
		}
		if found == nil || last.Before(oldest) {
			found, oldest = one, last
		}
	}
	return found
}

func (c *Carrier) endIdlestFlow() {
	var owner *client
	var oldest *carriedFlow
	for _, one := range c.clients {
		for _, f := range one.flows {
			if oldest == nil || f.Used.Before(oldest.Used) {
				owner, oldest = one, f
			}
		}
	}
	c.remove(owner, oldest)
}
