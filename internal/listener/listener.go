// Package listener accepts TCP connections for as long as it is told to, whatever the process runs out of.
//
// An accept that fails never ends the loop: it waits, tells it once, and recovers by itself. Stopping takes what the
// kernel has already accepted on our behalf, so that no client that got through is reset.
package listener

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/pillion-proxy/pillion/internal/tcp"
)

const (
	minBackOff = 5 * time.Millisecond
	maxBackOff = time.Second

	// outageEnd is how long nothing must fail for an outage to be over: longer than the longest back-off.
	outageEnd = 2 * maxBackOff

	// lastCall bounds how long a listener takes connections from its queue after it was told to stop.
	lastCall = time.Second
)

// Handler takes connections. ServeConn owns conn and closes it before it returns; ctx ends when the server aborts.
// Refuse is given a connection that is over the limit, to close; it is called in the accept loop and must not block.
type Handler interface {
	ServeConn(ctx context.Context, conn *tcp.Conn)
	Refuse(conn *tcp.Conn)
}

// Limit bounds the connections of all servers that share it. The zero value has no bound.
type Limit struct {
	max  int64
	open atomic.Int64
}

// NewLimit allows max connections at a time, any number when max is zero.
func NewLimit(max int) *Limit { return &Limit{max: int64(max)} }

func (l *Limit) take() bool {
	if l.open.Add(1) > l.max && l.max > 0 {
		l.open.Add(-1)
		return false
	}
	return true
}

func (l *Limit) give() { l.open.Add(-1) }

// Server accepts from several listeners, one for each family, and counts their connections together.
type Server struct {
	Name      string // for logs
	Listeners []*tcp.Listener
	Handler   Handler
	Limit     *Limit
	Log       *slog.Logger

	conns, loops context.Context // end by Abort and by Stop
	abort, stop  context.CancelFunc

	openConns, openLoops sync.WaitGroup
	active               atomic.Int64 // connections
	accepting            atomic.Int32 // loops
	backOffs             atomic.Uint64
	firstBackOff         atomic.Int64 // nanoseconds, if more than minBackOff; a test sets it

	outageMu    sync.Mutex
	outage      *time.Timer // ends the outage; nil when there is none
	outageCause error
}

// Start begins to accept. It does not block.
func (s *Server) Start() {
	s.conns, s.abort = context.WithCancel(context.Background())
	s.loops, s.stop = context.WithCancel(context.Background())
	for _, ln := range s.Listeners {
		s.openLoops.Add(1)
		s.accepting.Add(1)
		go s.acceptLoop(ln)
	}
}

// Stop takes the connections that wait in the listeners' queues, closes the listeners, and returns when both is done.
// Connections go on. Stopping twice does nothing.
func (s *Server) Stop() {
	if s.loops.Err() == nil {
		s.stop()
		for _, ln := range s.Listeners {
			_ = ln.SetDeadline(time.Unix(1, 0))
		}
	}
	s.openLoops.Wait()
	s.endOutage()
}

// Abort tells every connection to end at once. It returns when all have ended.
func (s *Server) Abort() {
	s.abort()
	for _, ln := range s.Listeners {
		ln.WakeAll()
	}
	s.openConns.Wait()
}

// Wait returns when no connection is left, or when ctx ends, with its error. It makes sense after Stop.
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

// Active is the number of connections that are open now.
func (s *Server) Active() int { return int(s.active.Load()) }

// BackOffs is how often accepting has failed and rested.
func (s *Server) BackOffs() uint64 { return s.backOffs.Load() }

// Accepting returns nil when every listener accepts, and has done so without failure for a while; else why not.
func (s *Server) Accepting() error {
	s.outageMu.Lock()
	defer s.outageMu.Unlock()
	if s.outage != nil {
		return s.outageCause
	}
	if int(s.accepting.Load()) < max(1, len(s.Listeners)) {
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
	for {
		conn, err := ln.Accept()
		switch {
		case err == nil:
			backOff = 0
			s.begin(conn)
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

// emptyQueue takes the connections that the kernel has accepted on our behalf. Close would reset them.
func (s *Server) emptyQueue(ln *tcp.Listener) {
	for end := time.Now().Add(lastCall); time.Now().Before(end); {
		conn, err := ln.TryAccept()
		if err != nil {
			return
		}
		s.begin(conn)
	}
}

// failed notes that accept failed. An outage is told once: it is over when nothing has failed for a while, and not as
// soon as a single connection gets through. Out of descriptors, one often does: each that ends makes room for the next.
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

// endOutage keeps recovered from being called any more.
func (s *Server) endOutage() {
	s.outageMu.Lock()
	defer s.outageMu.Unlock()
	if s.outage != nil {
		s.outage.Stop()
		s.outage = nil
	}
}

// begin gives conn a goroutine of its own, or refuses it.
func (s *Server) begin(conn *tcp.Conn) {
	if !s.Limit.take() {
		s.Handler.Refuse(conn)
		return
	}
	s.openConns.Add(1)
	s.active.Add(1)
	go s.serveConn(conn)
}

func (s *Server) serveConn(conn *tcp.Conn) {
	defer s.openConns.Done()
	defer s.Limit.give()
	defer s.active.Add(-1)
	s.Handler.ServeConn(s.conns, conn)
}

// remedy says what the operator can do about an accept error.
func remedy(err error) string {
	switch {
	case errors.Is(err, syscall.EMFILE):
		return "raise this process's nofile limit, or lower --max-connections"
	case errors.Is(err, syscall.ENFILE):
		return "raise fs.file-max on this host"
	default:
		return "none known; the kernel is short of something"
	}
}
