// Package dns is the agent's resolver. It sends the workload's queries, which the rules redirect to it, to the servers
// that the workload would have asked.
//
// Messages keep their bytes in both directions, except for the ID and for the OPT record that is added for downstreams
// without EDNS and removed from their answers. Names are never completed, rewritten or sorted. The walker of messages is
// our own, because decoding and encoding by github.com/miekg/dns does not promise to preserve a message's bytes. A record
// of an unknown type passes like any other. That library has the constants and their names, and is the tests' peer.
//
// Every query is answered, with SERVFAIL if there is no other answer. Bytes, time, concurrent queries, connections and
// the cache are bounded.
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

// What zero means in Config, and what callers that have no wish of their own put into it.
const (
	DefaultTimeout     = 2 * time.Second
	DefaultMaxInFlight = 1000
	DefaultCacheSize   = 4096
)

const (
	// rounds is how often a server that does not answer is asked. One lost packet must not fail a lookup.
	rounds = 2
	// budget is how many Timeouts all tries of a query may take together.
	budget = 5
)

// DefaultListen is where the rules send queries: an answer from another address would miss its conntrack entry.
var DefaultListen = []netip.AddrPort{
	netip.MustParseAddrPort("127.0.0.1:15053"),
	netip.MustParseAddrPort("[::1]:15053"),
}

// Config says where queries come from and where they go. Upstreams and Log are needed.
type Config struct {
	// Listen are the addresses that New binds, each for UDP and for TCP, when UDP and TCP are empty. None means
	// DefaultListen, without ::1 where the host has no such address.
	Listen []netip.AddrPort
	// UDP and TCP are sockets that are bound already. They belong to the Server as soon as New has succeeded.
	UDP []*net.UDPConn
	TCP []*net.TCPListener

	// Upstreams are asked in this order, as resolv.conf has it.
	Upstreams []netip.AddrPort
	// Timeout is for one try with one upstream over one transport; zero means DefaultTimeout. A query has five times
	// that in all.
	Timeout time.Duration
	// MaxInFlight bounds the queries, and by it the sockets to upstreams, at a time; zero means DefaultMaxInFlight. What
	// comes above it is answered SERVFAIL at once.
	MaxInFlight int
	// CacheSize is how many answers are kept, at about a kilobyte each. Zero keeps none.
	CacheSize int

	// Dial opens sockets to upstreams, network being udp or tcp; nil means those of a net.Dialer. Each query over UDP
	// has a socket of its own, so that its source port is as hard to guess as the kernel makes it. The rules must not
	// redirect these sockets.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
	// Sink is told of every query that could be read, when its answer is ready. It is called from several goroutines
	// and must not block. It may be nil.
	Sink func(Query)
	Log  *slog.Logger
}

// Query is one query and how it was answered.
type Query struct {
	Name      string         // fully qualified, as sent; whatever is not printable is escaped, so it is 1,004 bytes at most
	Type      string         // A, AAAA; TYPE65400 where there is no name for it
	Rcode     string         // NOERROR, NXDOMAIN, SERVFAIL; of the header, without what EDNS adds
	Transport string         // udp or tcp
	Upstream  netip.AddrPort // whose answer this is; invalid when no upstream gave it now
	Duration  time.Duration
	Cached    bool // from the cache
	Joined    bool // the same query was under way already, and its answer served this one too
	Truncated bool // did not fit, so that downstream must come again over TCP
}

// Stats counts. Fields that count down again say so.
type Stats struct {
	UDPQueries, TCPQueries atomic.Int64     // packets and frames, whatever was in them
	Answers                [16]atomic.Int64 // by response code of the header
	Dropped                atomic.Int64     // no query at all: too short, or itself an answer
	Malformed              atomic.Int64     // answered FORMERR
	Overloaded             atomic.Int64     // above MaxInFlight, answered SERVFAIL
	Unanswered             atomic.Int64     // no upstream answered, so SERVFAIL
	Truncated              atomic.Int64     // answers that did not fit
	Cached, Joined         atomic.Int64     // answers that took no upstream query of their own
	InFlight               atomic.Int64     // queries now

	UpstreamQueries  atomic.Int64 // over either transport
	UpstreamTCP      atomic.Int64 // over TCP
	UpstreamFailures atomic.Int64 // tries that gave no answer
	UpstreamStrays   atomic.Int64 // packets with a wrong ID or question: late, or forged

	TCPConns, TCPEvicted     atomic.Int64 // connections now; closed while idle to make room for a new one
	CacheEntries, CacheBytes atomic.Int64 // in the cache now
}

// Server is the resolver. Its sockets are bound from New on.
type Server struct {
	Config
	Stats Stats

	upstreams []*upstream
	cache     *cache // nil keeps nothing
	now       func() time.Time
	idle      time.Duration // of a TCP connection

	queries context.Context // ends when Shutdown has no more time
	abort   context.CancelFunc
	stopped chan struct{} // closed by Shutdown
	stop    sync.Once
	open    sync.WaitGroup // loops, connections and queries

	flightsMu sync.Mutex
	flights   map[string]*flight // by join key

	connsMu sync.Mutex
	conns   map[*conn]struct{}
}

// New validates config and binds what it names.
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
	s.queries, s.abort = context.WithCancel(context.Background())
	return s, nil
}

func (s *Server) validate() error {
	for _, bound := range []struct {
		name  string
		value int64
	}{{"Timeout", int64(s.Timeout)}, {"MaxInFlight", int64(s.MaxInFlight)}, {"CacheSize", int64(s.CacheSize)}} {
		if bound.value < 0 {
			return fmt.Errorf("dns: %s is %d; give a positive one", bound.name, bound.value)
		}
	}
	if len(s.Upstreams) == 0 {
		return errors.New("dns: Upstreams is empty; name at least one server, such as those in /etc/resolv.conf")
	}
	for _, upstream := range s.Upstreams {
		if !upstream.IsValid() || upstream.Port() == 0 {
			return fmt.Errorf("dns: upstream %v has no address or no port", upstream)
		}
		for _, own := range s.addresses() {
			if reaches(upstream, own) {
				return fmt.Errorf("dns: upstream %v is where this resolver listens (%v), so queries would go round; name another server", upstream, own)
			}
		}
	}
	return nil
}

// addresses are where the server listens, or will.
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

// reaches tells whether what is sent to upstream arrives at a socket that is bound to own. The unspecified address
// means this host when one dials it, and every address of this host when one listens there.
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

// Start begins to serve. It does not block.
func (s *Server) Start() {
	for _, socket := range s.UDP {
		s.open.Go(func() { s.serveUDP(socket) })
	}
	for _, ln := range s.TCP {
		s.open.Go(func() { s.acceptTCP(ln) })
	}
}

// Shutdown stops reading queries and returns when those under way are answered. When ctx ends before that, they are
// answered SERVFAIL and ctx's error is returned. In any case no socket is left. It may be called twice, and without
// Start.
func (s *Server) Shutdown(ctx context.Context) error {
	s.stop.Do(s.stopReading)
	// The abort wakes whatever waits for an upstream, so the loops need no second ear for ctx.
	aborting := context.AfterFunc(ctx, s.abortAll)
	s.open.Wait()
	inTime := aborting()
	s.abort()
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

// abortAll ends tries at upstreams, and writes to downstreams that do not read.
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

// past is a deadline that ends waits.
var past = time.Unix(1, 0)

// pause waits a moment after a socket failed, so that a lasting failure is no busy loop. It returns false when the
// server has stopped.
func (s *Server) pause(doing string, err error) bool {
	select {
	case <-s.stopped:
		return false
	default:
	}
	if errors.Is(err, net.ErrClosed) {
		return false
	}
	s.Log.Warn("dns: a socket failed, trying again", "doing", doing, "error", err)
	select {
	case <-s.stopped:
		return false
	case <-time.After(time.Second):
		return true
	}
}
