// Package dns is the agent's resolver. The rules redirect the workload's queries to it, and it forwards them to the servers
// that the workload would have queried. Names of the control plane, if there is one, it answers itself.
//
// Messages keep their bytes in both directions, except for the ID and for the OPT record that is added for downstreams
// without EDNS and removed from their answers. Names are never completed, rewritten or sorted. The walker of messages is
// our own, because decoding and encoding by github.com/miekg/dns does not promise to preserve a message's bytes, and its
// types of records take 0.6 MB of the program. A record of an unknown type passes like any other. That library is the tests'
// peer.
//
// Every query that is read is answered, with SERVFAIL if there is no other answer. Bytes, time, concurrent queries,
// connections and the cache are bounded.
package dns

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// Defaults of Config. Timeout and MaxInFlight use theirs for zero.
const (
	DefaultTimeout     = 2 * time.Second
	DefaultMaxInFlight = 1000
	DefaultCacheSize   = 4096
)

const (
	// rounds is how often a server that does not answer is queried. One lost packet must not fail a lookup.
	rounds = 2
	// budget is the time for all tries of a query, in Timeouts.
	budget = 5
)

// DefaultListen are the addresses to which the rules redirect queries. An answer from another address would not match the
// conntrack entry of its query.
var DefaultListen = []netip.AddrPort{
	netip.MustParseAddrPort("127.0.0.1:15053"),
	netip.MustParseAddrPort("[::1]:15053"),
}

// Config configures a Server. Upstreams and Log are required.
type Config struct {
	// Listen are the addresses that New binds for UDP and TCP if the fields UDP and TCP are empty. An empty Listen means
	// DefaultListen, without ::1 if the host does not have that address.
	Listen []netip.AddrPort
	// UDP and TCP are bound sockets. The Server owns them once New has succeeded.
	UDP []*net.UDPConn
	TCP []*net.TCPListener

	// Upstreams are queried in this order, as those of resolv.conf are.
	Upstreams []netip.AddrPort
	// Timeout is for one try with one upstream over one transport; zero means DefaultTimeout. A query has five times
	// that in all.
	Timeout time.Duration
	// MaxInFlight bounds the concurrent queries, and with them the sockets to upstreams; zero means DefaultMaxInFlight.
	// Queries above the limit are answered SERVFAIL at once.
	MaxInFlight int
	// CacheSize is the number of answers that are cached, at about a kilobyte each. Zero turns the cache off.
	CacheSize int
	// AwaitNames answers every query SERVFAIL until the first call of SetNames.
	AwaitNames bool

	// Dial opens sockets to upstreams; network is udp or tcp. Nil means net.Dialer. Each query over UDP has a socket of
	// its own, so that the kernel draws its source port. The rules must not redirect these sockets.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
	// Refuse reports whether queries for a name are answered REFUSED, and Learn receives the addresses of each other answer.
	// Names are as in Query. Both are called from several goroutines. They may be nil.
	Refuse func(name string) bool
	Learn  func(name string, addresses []netip.Addr)
	// Sink receives every well-formed query when its answer is ready. It is called from several goroutines and must not
	// block. It may be nil.
	Sink func(Query)
	Log  *slog.Logger
}

// Query is one query and how it was answered.
type Query struct {
	Name      string         // fully qualified, as sent; unprintable bytes are escaped, so it has at most 1,004 bytes
	Type      string         // A, AAAA; TYPE65400 for a type without a name
	Rcode     string         // NOERROR, NXDOMAIN, SERVFAIL; of the header, without the extension by EDNS
	Transport string         // udp or tcp
	Upstream  netip.AddrPort // source of the answer; invalid if no upstream answered
	Duration  time.Duration
	Cached    bool // answered from the cache
	Named     bool // answered from the control plane's names
	Refused   bool // by Config.Refuse
	Joined    bool // shared the answer of an identical query in progress
	Truncated bool // the answer did not fit; downstream has to repeat the query over TCP
}

// Stats holds counters, and the gauges InFlight, TCPConns, CacheEntries, CacheBytes and Hosts.
type Stats struct {
	UDPQueries, TCPQueries atomic.Int64     // received packets and frames, also malformed ones
	Answers                [16]atomic.Int64 // by response code of the header
	Dropped                atomic.Int64     // packets and frames that are not queries: too short, or responses
	Malformed              atomic.Int64     // answered FORMERR
	Overloaded             atomic.Int64     // above MaxInFlight, answered SERVFAIL
	Loops                  atomic.Int64     // queries of our own that the rules redirected back, answered SERVFAIL
	ReceiveDrops           atomic.Int64     // packets that the kernel dropped because the receive buffer was full
	Unanswered             atomic.Int64     // answered SERVFAIL because no upstream answered
	Truncated              atomic.Int64     // answers that did not fit
	Cached, Joined         atomic.Int64     // answers without an upstream query of their own
	Named                  atomic.Int64     // answers from the control plane's names
	Early                  atomic.Int64     // before these names had arrived, answered SERVFAIL
	InFlight               atomic.Int64     // queries in progress

	UpstreamQueries  atomic.Int64 // over either transport
	UpstreamTCP      atomic.Int64 // over TCP
	UpstreamFailures atomic.Int64 // tries without an answer
	UpstreamStrays   atomic.Int64 // packets with a wrong ID or question: late, or forged

	TCPConns, TCPEvicted     atomic.Int64 // open connections; idle ones closed to make room for a new one
	CacheEntries, CacheBytes atomic.Int64 // in the cache
	Hosts                    atomic.Int64 // of the control plane
}

// Server is the resolver. New makes it and binds its sockets.
type Server struct {
	Config
	Stats Stats

	upstreams []*upstream
	cache     *cache // nil: no cache
	names     atomic.Pointer[Table]
	now       func() time.Time
	idle      time.Duration // of a TCP connection

	queries context.Context // ends when the time of Shutdown is up
	abort   context.CancelFunc
	stopped chan struct{} // closed by Shutdown
	stop    sync.Once
	open    sync.WaitGroup // loops, connections and queries

	flightsMu sync.Mutex
	flights   map[string]*flight // by join key

	connsMu sync.Mutex
	conns   map[*conn]struct{}

	drops dropWatch
	own   ownSockets
}

// New validates config and binds its addresses.
func New(config Config) (*Server, error) {
	if config.Timeout == 0 {
		config.Timeout = DefaultTimeout
	}
	if config.MaxInFlight == 0 {
		config.MaxInFlight = DefaultMaxInFlight
	}
	if config.Dial == nil {
		config.Dial = new(net.Dialer).DialContext
	}
	s := &Server{
		Config: config, now: time.Now, idle: idleTime, stopped: make(chan struct{}),
		flights: make(map[string]*flight), conns: make(map[*conn]struct{}),
	}
	if err := s.validate(); err != nil {
		return nil, err
	}
	for _, addr := range config.Upstreams {
		s.upstreams = append(s.upstreams, &upstream{addr: addr})
	}
	if config.CacheSize > 0 {
		s.cache = newCache(config.CacheSize, &s.Stats)
	}
	if len(s.UDP)+len(s.TCP) == 0 {
		if err := s.bind(); err != nil {
			return nil, err
		}
	}
	s.watchDrops()
	s.queries, s.abort = context.WithCancel(context.Background())
	return s, nil
}

func (s *Server) validate() error {
	for _, bound := range []struct {
		name  string
		value int64
	}{{"Timeout", int64(s.Timeout)}, {"MaxInFlight", int64(s.MaxInFlight)}, {"CacheSize", int64(s.CacheSize)}} {
		if bound.value < 0 {
			return fmt.Errorf("dns: %s is %d; use 0 or more", bound.name, bound.value)
		}
	}
	if len(s.Upstreams) == 0 {
		return errors.New("dns: Upstreams is empty; name at least one server, such as those of /etc/resolv.conf")
	}
	for _, upstream := range s.Upstreams {
		if !upstream.IsValid() || upstream.Port() == 0 {
			return fmt.Errorf("dns: upstream %v has no address or no port", upstream)
		}
		for _, own := range s.addresses() {
			if reaches(upstream, own) {
				return fmt.Errorf("dns: upstream %v is where this resolver listens (%v), a loop; name another server", upstream, own)
			}
		}
	}
	return nil
}

// addresses are those where the server listens, or will listen.
func (s *Server) addresses() []netip.AddrPort {
	var own []netip.AddrPort
	for _, conn := range s.UDP {
		own = append(own, conn.LocalAddr().(*net.UDPAddr).AddrPort())
	}
	for _, ln := range s.TCP {
		own = append(own, ln.Addr().(*net.TCPAddr).AddrPort())
	}
	if len(own) > 0 {
		return own
	}
	if len(s.Listen) > 0 {
		return s.Listen
	}
	return DefaultListen
}

// reaches reports whether packets to upstream arrive at a socket that is bound to own. A packet to the unspecified address
// goes to this host; a socket bound to it receives packets to every address of this host.
func reaches(upstream, own netip.AddrPort) bool {
	to, at := upstream.Addr().Unmap().WithZone(""), own.Addr().Unmap().WithZone("")
	return upstream.Port() == own.Port() &&
		(to == at || to.IsUnspecified() || at.IsUnspecified() && to.IsLoopback())
}

func (s *Server) bind() error {
	for _, addr := range s.addresses() {
		udp, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(addr))
		if len(s.Listen) == 0 && addr.Addr().Is6() && (errors.Is(err, syscall.EADDRNOTAVAIL) || errors.Is(err, syscall.EAFNOSUPPORT)) {
			continue
		}
		if err == nil {
			s.UDP = append(s.UDP, udp)
			var tcp *net.TCPListener
			if tcp, err = net.ListenTCP("tcp", net.TCPAddrFromAddrPort(addr)); err == nil {
				s.TCP = append(s.TCP, tcp)
			}
		}
		if err != nil {
			s.closeSockets()
			return fmt.Errorf("dns: %w", err)
		}
	}
	return nil
}

// SetNames replaces the names that are answered without upstreams. Queries in progress are not affected. It may be called
// at any time.
func (s *Server) SetNames(names *Table) {
	s.names.Store(names)
	s.Stats.Hosts.Store(int64(names.Hosts()))
}

// Start starts to serve and returns.
func (s *Server) Start() {
	for _, socket := range s.UDP {
		s.open.Go(func() { s.serveUDP(socket) })
	}
	for _, ln := range s.TCP {
		s.open.Go(func() { s.acceptTCP(ln) })
	}
}

// Shutdown stops reading queries and returns when those in progress are answered. If ctx ends before that, they are
// answered SERVFAIL and ctx's error is returned. In any case all sockets are closed. It may be called twice, and without
// Start.
func (s *Server) Shutdown(ctx context.Context) error {
	s.stop.Do(s.stopReading)
	// abortAll ends all waits for upstreams, so the loops need not watch ctx themselves.
	aborting := context.AfterFunc(ctx, s.abortAll)
	s.open.Wait()
	inTime := aborting()
	s.abort()
	s.drops.timer.Stop()
	s.countDrops()
	s.closeSockets()
	if !inTime {
		return ctx.Err()
	}
	return nil
}

// stopReading ends the loops. UDP sockets stay open for answers.
func (s *Server) stopReading() {
	close(s.stopped)
	for _, socket := range s.UDP {
		_ = socket.SetReadDeadline(past)
	}
	for _, ln := range s.TCP {
		_ = ln.SetDeadline(past)
	}
	s.connsMu.Lock()
	defer s.connsMu.Unlock()
	for c := range s.conns {
		_ = c.SetReadDeadline(past)
	}
}

// abortAll ends queries to upstreams, and writes to downstreams that do not read.
func (s *Server) abortAll() {
	s.abort()
	s.connsMu.Lock()
	defer s.connsMu.Unlock()
	for c := range s.conns {
		c.giveUp()
	}
}

func (s *Server) closeSockets() {
	for _, socket := range s.UDP {
		socket.Close()
	}
	for _, ln := range s.TCP {
		ln.Close()
	}
}

// past is a deadline that ends a read or write in progress.
var past = time.Unix(1, 0)

// pause waits a second after a socket error, so that a permanent error does not become a busy loop. It returns false if
// the server has stopped.
func (s *Server) pause(operation string, err error) bool {
	select {
	case <-s.stopped:
		return false
	default:
	}
	if errors.Is(err, net.ErrClosed) {
		return false
	}
	s.Log.Warn("dns: socket error, trying again", "operation", operation, "error", err)
	select {
	case <-s.stopped:
		return false
	case <-time.After(time.Second):
		return true
	}
}
