// Package listener accepts TCP connections until it is stopped, also while the process is out of descriptors or memory.
//
// A failed accept never ends the loop. The loop logs the outage once, backs off, and recovers without help. Stop serves the
// connections that the kernel has already established, so that their clients are not reset.
package listener

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/pillion-proxy/pillion/internal/tcp"
)

const (
	minBackOff = 5 * time.Millisecond
	maxBackOff = time.Second

	// outageEnd is the time without a failure after which an outage is over. It is longer than the longest back-off.
	outageEnd = 2 * maxBackOff

	// acceptTurn is how many connections are accepted before other goroutines run. With the first steps of those connections
	// it is some 0.2 ms.
	acceptTurn = 4

	// maxWarm is how many goroutines of connections that have ended wait for others.
	maxWarm = 32

	// lastCall bounds the time for which a listener empties its queue after Stop.
	lastCall = time.Second
)

// Handler serves connections. ServeConn owns conn and closes it before it returns; ctx is cancelled when the server aborts.
// Refuse closes a connection that exceeds the limit. It is called by the accept loop and must not block.
type Handler interface {
	ServeConn(ctx context.Context, conn *tcp.Conn)
	Refuse(conn *tcp.Conn)
}

// Limit bounds the number of connections of all servers that share it. A connection counts until its descriptor is closed.
// The zero value is unlimited.
type Limit struct {
	max  int64
	open atomic.Int64
}

// NewLimit returns a Limit of max connections at a time. Zero means unlimited.
func NewLimit(max int) *Limit { return &Limit{max: int64(max)} }

// take counts conn, and reports whether it is within the limit. The caller closes conn in both cases.
func (l *Limit) take(conn *tcp.Conn) bool {
	open := conn.Track(&l.open)
	return l.max <= 0 || open <= l.max
}

// Server accepts from several listeners, such as one for each address family, and counts their connections together.
type Server struct {
	Name      string          // for logs
	Listeners []*tcp.Listener // at the start; later Add and Remove change them
	Dynamic   bool            // there may be no listener
	Handler   Handler
	Limit     *Limit
	Log       *slog.Logger

	mu   sync.Mutex // guards Listeners and ends after Start, and the start of loops
	ends map[*tcp.Listener]chan struct{}
	wake func() // wakes the waits of connections; nil before the first listener

	conns, loops context.Context // cancelled by Abort and by Stop
	abort, stop  context.CancelFunc

	openConns, openLoops sync.WaitGroup
	active               atomic.Int64 // connections

	// Goroutines of connections that have ended serve others. Their stacks have grown already: growing one has some 3 % of the
	// cost of a connection with one request. The collector shrinks the stacks of those that wait.
	warm     atomic.Int32   // how many wait for a connection
	handover chan *tcp.Conn // has no buffer; closed by Stop
	cool     sync.Once      // closes handover

	accepting    atomic.Int32 // loops
	backOffs     atomic.Uint64
	firstBackOff atomic.Int64 // nanoseconds; a lower bound of each back-off, set by a test

	outageMu    sync.Mutex
	outage      *time.Timer // ends the outage; nil without an outage
	outageCause error
}

// Start starts the accept loops and returns.
func (s *Server) Start() {
	s.conns, s.abort = context.WithCancel(context.Background())
	s.loops, s.stop = context.WithCancel(context.Background())
	s.handover = make(chan *tcp.Conn)
	for _, ln := range s.Listeners {
		s.begins(ln)
	}
}

// begins starts the accept loop of ln.
func (s *Server) begins(ln *tcp.Listener) {
	ended := make(chan struct{})
	if s.ends == nil {
		s.ends = map[*tcp.Listener]chan struct{}{}
	}
	s.ends[ln], s.wake = ended, ln.WakeAll
	s.openLoops.Add(1)
	s.accepting.Add(1)
	go func() {
		defer close(ended)
		s.acceptLoop(ln)
	}()
}

// Add begins to accept from ln. After Stop it closes ln.
func (s *Server) Add(ln *tcp.Listener) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.loops.Err() != nil {
		ln.Close()
		return
	}
	s.Listeners = append(s.Listeners, ln)
	s.begins(ln)
}

// Remove accepts the connections that are left in ln's queue, closes ln, and returns when both is done. Open connections
// continue. Call it once for a listener.
func (s *Server) Remove(ln *tcp.Listener) {
	s.mu.Lock()
	s.Listeners = slices.DeleteFunc(s.Listeners, func(l *tcp.Listener) bool { return l == ln })
	ended := s.ends[ln]
	delete(s.ends, ln)
	s.mu.Unlock()
	_ = ln.SetDeadline(time.Unix(1, 0))
	<-ended
}

// all returns the listeners.
func (s *Server) all() []*tcp.Listener {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.Listeners)
}

// Addrs returns the addresses of the listeners.
func (s *Server) Addrs() (addresses []netip.AddrPort) {
	for _, ln := range s.all() {
		addresses = append(addresses, ln.Addr())
	}
	return addresses
}

// Close closes the listeners of a server that was not started. Those of another one are closed already.
func (s *Server) Close() {
	for _, ln := range s.all() {
		ln.Close()
	}
}

// Stop accepts the connections that are left in the listeners' queues, closes the listeners, and returns when both is done.
// Open connections continue. A second Stop does nothing.
func (s *Server) Stop() {
	s.mu.Lock()
	if s.loops.Err() == nil {
		s.stop()
		for _, ln := range s.Listeners {
			_ = ln.SetDeadline(time.Unix(1, 0))
		}
	}
	s.mu.Unlock()
	s.openLoops.Wait()
	s.cool.Do(func() { close(s.handover) })
	s.endOutage()
}

// Abort cancels the context of every connection and returns when all have ended.
func (s *Server) Abort() {
	s.abort()
	s.mu.Lock()
	wake := s.wake
	s.mu.Unlock()
	if wake != nil {
		wake()
	}
	s.openConns.Wait()
}

// Wait returns nil when all connections have ended, or the error of ctx when that is done first. Call Stop before, so that
// no connections are added meanwhile.
func (s *Server) Wait(ctx context.Context) error {
	done := make(chan struct{})
	go s.waitConns(done)
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (s *Server) waitConns(done chan<- struct{}) {
	s.openConns.Wait()
	close(done)
}

// Active returns the number of open connections.
func (s *Server) Active() int { return int(s.active.Load()) }

// BackOffs returns how often an accept loop has backed off after an error.
func (s *Server) BackOffs() uint64 { return s.backOffs.Load() }

// Accepting returns nil if every accept loop runs and there is no outage. Otherwise it returns the reason.
func (s *Server) Accepting() error {
	s.outageMu.Lock()
	defer s.outageMu.Unlock()
	if s.outage != nil {
		return s.outageCause
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if accepting := int(s.accepting.Load()); accepting < len(s.Listeners) || accepting == 0 && !s.Dynamic || s.Dynamic && s.loops.Err() != nil {
		return errors.New("not accepting")
	}
	return nil
}

// acceptLoop accepts until Stop.
func (s *Server) acceptLoop(ln *tcp.Listener) {
	defer s.openLoops.Done()
	defer s.accepting.Add(-1)
	defer ln.Close()
	defer s.emptyQueue(ln)
	backOff := time.Duration(0)
	for accepted := 1; ; accepted++ {
		conn, err := ln.Accept()
		switch {
		case err == nil:
			backOff = 0
			s.begin(conn)
			if accepted%acceptTurn == 0 {
				ln.Yield()
			}
		case errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, os.ErrClosed):
			return
		default:
			s.backOffs.Add(1)
			s.failed(fmt.Errorf("accepting on %v: %w", ln.Addr(), err))
			backOff = max(time.Duration(s.firstBackOff.Load()), min(max(minBackOff, 2*backOff), maxBackOff))
			select {
			case <-s.loops.Done():
				return
			case <-time.After(backOff):
			}
		}
	}
}

// emptyQueue accepts the connections that the kernel has already established. Close would reset them.
func (s *Server) emptyQueue(ln *tcp.Listener) {
	for end := time.Now().Add(lastCall); time.Now().Before(end); {
		conn, err := ln.TryAccept()
		if err != nil {
			return
		}
		s.begin(conn)
	}
}

// failed records an accept error and logs the start of an outage. The outage lasts until outageEnd has passed without an
// error, and not just until the next successful accept: out of descriptors, each connection that ends makes room for one
// more, and each of those would otherwise be logged as a recovery.
func (s *Server) failed(err error) {
	s.outageMu.Lock()
	defer s.outageMu.Unlock()
	s.outageCause = err
	if s.outage != nil {
		s.outage.Reset(outageEnd)
		return
	}
	s.outage = time.AfterFunc(outageEnd, s.recovered)
	s.Log.Error("cannot accept, trying again until it works", "listener", s.Name, "error", err, "remedy", remedy(err))
}

func (s *Server) recovered() {
	s.outageMu.Lock()
	defer s.outageMu.Unlock()
	if s.outage != nil {
		s.outage = nil
		s.Log.Info("accepting again", "listener", s.Name)
	}
}

// endOutage cancels the timer that calls recovered.
func (s *Server) endOutage() {
	s.outageMu.Lock()
	defer s.outageMu.Unlock()
	if s.outage != nil {
		s.outage.Stop()
		s.outage = nil
	}
}

// begin serves conn in a goroutine of its own, or refuses it if the limit is reached. It is called before Stop returns.
func (s *Server) begin(conn *tcp.Conn) {
	if !s.Limit.take(conn) {
		s.Handler.Refuse(conn)
		return
	}
	s.openConns.Add(1)
	s.active.Add(1)
	select {
	case s.handover <- conn:
	default:
		go s.serve(conn)
	}
}

// serve serves conn, and then connections that begin hands over.
func (s *Server) serve(conn *tcp.Conn) {
	for conn != nil {
		s.serveConn(conn)
		conn = s.next()
	}
}

// next waits for another connection. It returns nil if enough goroutines wait, and after Stop.
func (s *Server) next() (conn *tcp.Conn) {
	if s.warm.Add(1) <= maxWarm {
		conn = <-s.handover
	}
	s.warm.Add(-1)
	return conn
}

func (s *Server) serveConn(conn *tcp.Conn) {
	defer s.openConns.Done()
	defer s.active.Add(-1)
	s.Handler.ServeConn(s.conns, conn)
}

// remedy returns what the operator can do about an accept error.
func remedy(err error) string {
	switch {
	case errors.Is(err, syscall.EMFILE):
		return "raise this process's nofile limit, or lower --max-connections"
	case errors.Is(err, syscall.ENFILE):
		return "raise fs.file-max on this host"
	default:
		return "unknown; the kernel lacks a resource"
	}
}
