// Package ownport holds what the servers of the agent's own ports share: bounds on what a client can make them keep, the
// guard that distinguishes processes of this pod from the network and from web pages, and Go's profiles.
package ownport

import (
	"log/slog"
	"net"
	"net/http"
	"slices"
	"sync"
	"time"
)

// maxConnections bounds the connections of one listener. The kubelet uses one at a time. Other clients that can reach the
// port must not be able to use up the agent's descriptors.
const maxConnections = 100

// NewServer serves handler with bounds on what a client can make it keep: bytes, time and, with Bound, connections.
// Errors of client connections are logged at debug level.
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

// Extend allows d from now for writing the response, in place of the server's WriteTimeout. A request without a body has no
// other time limit: net/http ends ReadTimeout when the request has been read.
func Extend(w http.ResponseWriter, d time.Duration) {
	// It fails for a writer without a connection. Such a writer has no limit.
	_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(d))
}

// Bound keeps at most maxConnections of a listener's connections open. A new connection evicts the oldest, so that clients
// that hold many connections cannot keep the kubelet out.
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
		l.open[0].Conn.Close() // its server sees an error and calls boundConn.Close
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
