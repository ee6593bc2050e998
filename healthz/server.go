package healthz

import (
	"log/slog"
	"net"
	"net/http"
	"slices"
	"sync"
	"time"
)

// maxConnections bounds who can ask at the same time. The kubelet asks on one connection after the other; everybody else
// who can reach the port must not be able to use up the agent's descriptors.
const maxConnections = 100

// NewServer serves handler with bounds on what a stranger can make it keep: bytes, time and, with Bound, connections. Its
// own troubles with clients are logged at debug level.
func NewServer(handler http.Handler, log *slog.Logger) *http.Server {
	return &http.Server{
		Handler:        handler,
		ReadTimeout:    5 * time.Second,
		WriteTimeout:   5 * time.Second,
		IdleTimeout:    30 * time.Second,
		MaxHeaderBytes: 8 << 10,
		ErrorLog:       slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
}

// Extend gives the answer d from now to be written, in place of the server's WriteTimeout. A request without a body has no
// other limit: package net/http ends ReadTimeout when it has been read.
func Extend(w http.ResponseWriter, d time.Duration) {
	// It fails for a writer without a connection, which has no limit either.
	_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(d))
}

// Bound keeps at most maxConnections of a listener's connections open. The newest is always served, at the cost of the
// oldest: strangers who hold many must not keep the kubelet out.
func Bound(listener net.Listener) net.Listener { return &boundListener{Listener: listener} }

type boundListener struct {
	net.Listener
	mu   sync.Mutex
	open []*boundConn // the oldest first
}

func (l *boundListener) Accept() (net.Conn, error) {
	accepted, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	conn := &boundConn{Conn: accepted, listener: l}
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.open) == maxConnections {
		l.open[0].Conn.Close() // its server notices, and calls Close
		l.open = slices.Delete(l.open, 0, 1)
	}
	l.open = append(l.open, conn)
	return conn, nil
}

type boundConn struct {
	net.Conn
	listener *boundListener
}

func (c *boundConn) Close() error {
	l := c.listener
	l.mu.Lock()
	l.open = slices.DeleteFunc(l.open, func(open *boundConn) bool { return open == c })
	l.mu.Unlock()
	return c.Conn.Close()
}
