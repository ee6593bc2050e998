package dns

import (
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/pillion-proxy/pillion/internal/sockopt"
)

const (
	// receiveBuffer is the size of a UDP socket's receive buffer in bytes. The kernel limits it to net.core.rmem_max and
	// doubles it. A query occupies 768 bytes, so the kernel's default of 212,992 bytes holds fewer than 300 queries.
	receiveBuffer = 2 << 20
	// dropDelay is the time from a query to the next check of the kernel's counters.
	dropDelay = time.Second
)

// dropWatch counts the queries that the kernel drops because the receive buffer of a socket is full. Whenever that happens,
// there are queries in the buffer, and the next one that is read starts the timer. So drops are counted within dropDelay,
// and an idle resolver needs no timer.
type dropWatch struct {
	timer   *time.Timer // calls countDrops
	running atomic.Bool // the timer

	mu       sync.Mutex
	counters []dropCounter
	unlogged int64     // drops since the last warning
	logged   time.Time // of the last warning
}

// dropCounter is the kernel's counter of one socket.
type dropCounter struct {
	socket *net.UDPConn
	last   uint32 // value at the last check
}

// watchDrops enlarges the receive buffers and prepares the counters. They may have a value already: the socket may have
// been bound for a while.
func (s *Server) watchDrops() {
	for _, socket := range s.UDP {
		_ = socket.SetReadBuffer(receiveBuffer) // a smaller buffer works as well
		s.drops.counters = append(s.drops.counters, dropCounter{socket: socket})
	}
	s.drops.timer = time.AfterFunc(time.Hour, s.countDrops)
	s.drops.timer.Stop()
}

// noteQuery starts the timer unless it runs. It is called for each query over UDP.
func (w *dropWatch) noteQuery() {
	if !w.running.Load() && w.running.CompareAndSwap(false, true) {
		w.timer.Reset(dropDelay)
	}
}

// countDrops adds new drops to the statistics and logs them, at most once in logInterval.
func (s *Server) countDrops() {
	w := &s.drops
	w.running.Store(false) // before the check: a query that is read after a later drop starts the timer again
	w.mu.Lock()
	defer w.mu.Unlock()
	for i := range w.counters {
		c := &w.counters[i]
		now, err := readDrops(c.socket)
		if err != nil {
			continue // the socket is closed, or the kernel is older than Linux 4.12
		}
		s.Stats.ReceiveDrops.Add(int64(now - c.last)) // also after an overflow
		w.unlogged += int64(now - c.last)
		c.last = now
	}
	if at := s.now(); w.unlogged > 0 && at.Sub(w.logged) >= logInterval {
		s.Log.Warn("dns: the kernel dropped queries, receive buffer full", "dropped", w.unlogged,
			"remedy", "raise net.core.rmem_max on the node, or send fewer queries at once")
		w.unlogged, w.logged = 0, at
	}
}

func readDrops(socket *net.UDPConn) (drops uint32, err error) {
	raw, err := socket.SyscallConn()
	if err != nil {
		return 0, err
	}
	controlErr := raw.Control(func(fd uintptr) { drops, err = sockopt.Drops(int(fd)) })
	if controlErr != nil {
		return 0, controlErr
	}
	return drops, err
}
