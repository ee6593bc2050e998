// Package httpforward forwards HTTP: it reads requests from a downstream connection, sends them to an upstream
// connection, and returns the responses.
//
// There is one engine for HTTP/1 and one for HTTP/2. Each downstream connection, together with its upstream, is served
// by one goroutine. A Router (router.go) chooses the upstream of each request: its Decision names the target, and
// session.connect (HTTP/1) finds a connection to it. Every byte is preserved unless HTTP requires a proxy to change it.
// Each request has its own flow.Record. The record is closed exactly once.
package httpforward

import (
	"errors"
	"sync/atomic"
	"time"

	"github.com/pillion-proxy/pillion/internal/budget"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/http1"
	"github.com/pillion-proxy/pillion/internal/tcp"
	"github.com/pillion-proxy/pillion/internal/tracing"
	"github.com/pillion-proxy/pillion/internal/upstream"
)

// Config is what an Engine needs. All fields without a stated zero are required.
type Config struct {
	Direction flow.Direction
	Dialer    upstream.Dialer // its Timeout is not used: see Settings.ConnectTimeout
	Pool      *upstream.Pool  // of idle HTTP/1 connections
	Flows     flow.Sink       // takes each request's record
	Budget    *budget.Budget  // of what connections hold while they wait; nil: no limit
	Settings                  // until the first Apply

	resetPause time.Duration // zero: resetPause. A test changes it
	detention  time.Duration // zero: detention. A test changes it
	maxInterim int           // interim responses to a request; zero: maxInterim. Tests change it
}

// Settings is what may change while connections are open. A value is never modified: Apply replaces it. HTTP/1 reads it
// once for each request, when the first byte of the request has arrived, and before each wait for a request. HTTP/2 reads
// Note and Fields once for each request. It reads the others once for each connection, because the limits are announced
// to the peer and the timeouts cover all streams.
type Settings struct {
	MaxHeadBytes  int // of a request or response head, a header list, or trailers
	MaxHeadFields int

	ConnectTimeout   time.Duration // for a dial with all its attempts; zero or less leaves it to the kernel
	HeadTimeout      time.Duration // for the head of a request from its first byte; zero or less: no limit
	RequestTimeout   time.Duration // from the end of the request to the head of its response; zero or less: no limit
	IdleTimeout      time.Duration // ends a connection on which no byte moves; zero or less: never
	HalfCloseTimeout time.Duration // the same once downstream has half-closed; zero or less: never

	Note   flow.Fields // fields whose values are recorded
	Noted  *flow.Noted // likewise, in the place of Note's names and certificates; nil: those of Note
	Fields Fields      // fields that are added to messages

	Tracing *tracing.Policy // of requests whose Decision has none; nil: they are not traced

	edge      *Edge     // of the requests; nil: they come from inside of the mesh
	unlimited *Settings // without the limits of edge; nil: as these
}

// ofServers returns the settings for responses.
func (s *Settings) ofServers() *Settings {
	if s.unlimited != nil {
		return s.unlimited
	}
	return s
}

// noted are the fields whose values are recorded.
func (s *Settings) noted(response bool) []string {
	switch {
	case s.Noted != nil && response:
		return s.Noted.Response()
	case s.Noted != nil:
		return s.Noted.Request()
	case response:
		return s.Note.Response
	}
	return s.Note.Request
}

// NotesCertificates reports whether records have the certificates of TLS.
func (s *Settings) NotesCertificates() bool {
	return s.Note.Certificates || s.Noted != nil && s.Noted.Load().Certificates
}

func (s *Settings) check() error {
	if s.MaxHeadBytes <= 0 || s.MaxHeadFields <= 0 {
		return errors.New("httpforward: the limits of heads are required")
	}
	return nil
}

// limits returns the limits of a head.
func (s *Settings) limits() http1.Limits {
	return http1.Limits{Head: s.MaxHeadBytes, Fields: s.MaxHeadFields}
}

// Connection is what the caller hands to an engine. The engine owns all of it, except that the caller closes Record.
type Connection struct {
	Down *tcp.Conn
	Read *tcp.Buffer // bytes already read from Down; never nil, and not empty

	// An upstream connection opened before downstream sent anything; or nil. It serves the first request.
	// EarlyRead holds the bytes read from it; nil except for HTTP/2, whose servers may send first.
	Early     *tcp.Conn
	EarlyRead *tcp.Buffer

	Record *flow.Record // of the connection. The caller closes it; the engine counts bytes and requests in it

	// Target is the upstream of the connection itself: of Early, and of all streams of an HTTP/2 connection, whose
	// upstream connection is opened before the first request.
	Target upstream.Target

	Router Router // chooses the upstream of each request; nil: Target for all

	// Many has the streams of an HTTP/2 connection carried by upstream connections of their own choice. Without it, all are
	// carried by one connection to Target, under the same numbers: that is cheaper.
	Many bool

	Peers *PeerFields // fields about peers; nil: they are fields like any other

	Returned *tcp.Conn // the upstream connection whose other end Down seems to be; see upstream.Stats.Returned
}

// Retirement may be implemented by a Router. A retired connection ends as in a drain of the engine, but without losing a
// request that is on its way. HTTP/1 announces the close in the response to a request in progress, or to one that comes within drainGrace; HTTP/2 sends
// GOAWAY, and serves new streams for drainGrace.
type Retirement interface {
	// Retired is called when the connection is woken and for each response, by the goroutine of the connection.
	Retired() bool
}

// OnlyHTTP may be implemented by a Router that judges requests.
type OnlyHTTP interface {
	// OnlyHTTP reports whether the connection must not become opaque when its upstream does not speak HTTP/2: the bytes would
	// pass without being judged.
	OnlyHTTP() bool
}

func (c *Connection) onlyHTTP() bool {
	r, ok := c.Router.(OnlyHTTP)
	return ok && r.OnlyHTTP()
}

// retired reports whether the connection is to end.
func (c *Connection) retired() bool {
	if c.Router == nil {
		return false
	}
	r, ok := c.Router.(Retirement)
	return ok && r.Retired()
}

// Engine forwards the HTTP of one direction. Make it with New.
type Engine struct {
	config   Config // without Settings
	settings atomic.Pointer[Settings]
	state    atomic.Int32 // one of the states below
	copies   copies
}

// The states, in their order. A connection checks the state when it is woken, so the poller must be woken after a change.
const (
	serving   int32 = iota
	announced       // HTTP/1 responses carry Connection: close
	draining        // also, connections without a request close, and HTTP/2 sends GOAWAY
)

// New checks the configuration.
func New(config Config) (*Engine, error) {
	if config.Dialer.Poller == nil || config.Pool == nil || config.Flows == nil {
		return nil, errors.New("httpforward: Dialer, Pool and Flows are required")
	}
	e := &Engine{config: config}
	if config.resetPause == 0 {
		e.config.resetPause = resetPause
	}
	if config.detention == 0 {
		e.config.detention = detention
	}
	if config.maxInterim == 0 {
		e.config.maxInterim = maxInterim
	}
	e.config.Settings = Settings{}
	if err := e.Apply(config.Settings); err != nil {
		return nil, err
	}
	return e, nil
}

// Apply replaces the settings. See Settings for which requests and connections use them. Invalid settings change nothing.
func (e *Engine) Apply(settings Settings) error {
	if err := settings.check(); err != nil {
		return err
	}
	e.settings.Store(&settings)
	return nil
}

// Settings returns the current settings.
func (e *Engine) Settings() Settings { return *e.settings.Load() }

// dialer returns the dialer for c, or for a request of it, with these settings.
func (e *Engine) dialer(c *Connection, settings *Settings) upstream.Dialer {
	dialer := e.config.Dialer
	dialer.Timeout, dialer.Returned = settings.ConnectTimeout, c.Returned
	return dialer
}

// Announce prepares for a drain: from now on responses to HTTP/1 requests close their connection, so that clients
// reconnect elsewhere without losing a request.
func (e *Engine) Announce() { e.state.CompareAndSwap(serving, announced) }

// Drain closes each connection as soon as it has no request: HTTP/1 closes connections that wait for one, HTTP/2 sends
// GOAWAY. Call Poller.WakeAll afterwards, because a waiting connection checks the state only when it is woken.
func (e *Engine) Drain() { e.state.Store(draining) }

// Draining reports whether Drain was called.
func (e *Engine) Draining() bool { return e.state.Load() == draining }

// Serve serves the requests of a connection until it ends, as HTTP/2 or HTTP/1.
//
// A goroutine's stack does not shrink again while more than a quarter of it is in use, so the frames below which an idle
// connection waits have to stay small: they pass pointers, and what is large is built in functions that have returned.
//
// The engine keeps c and changes it.
func (e *Engine) Serve(w *tcp.Waiter, http2 bool, c *Connection) {
	switch {
	case http2 && c.Many:
		e.serveHub(w, c)
		return
	case http2:
		e.serveHTTP2(w, c)
		return
	}
	e.serveHTTP1(w, c)
}
