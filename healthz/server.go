package healthz

import (
	"log/slog"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"
)

// maxConnections bounds who can ask at the same time. The kubelet asks on one connection after the other; everybody else
// who can reach the port must not be able to use up the agent's descriptors.
const maxConnections = 100

// NewServer serves handler with bounds on what a stranger can make it keep: bytes, time and connections. Its own
// troubles with clients are logged at debug level.
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

// Bound closes connections over the limit as soon as they are accepted.
func Bound(listener net.Listener) net.Listener { return &boundListener{Listener: listener} }

type boundListener struct {
	net.Listener
	open atomic.Int32
}

func (l *boundListener) Accept() (net.Conn, error) {
	for {
		conn, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if l.open.Add(1) <= maxConnections {
			return &boundConn{Conn: conn, closed: sync.OnceFunc(func() { l.open.Add(-1) })}, nil
		}
		l.open.Add(-1)
		conn.Close()
	}
}

type boundConn struct {
	net.Conn
	closed func()
}

func (c *boundConn) Close() error {
	c.closed()
	return c.Conn.Close()
}
