// Package httpforward forwards HTTP: it reads requests from a downstream connection, sends them to an upstream one, and
// brings the responses back.
//
// There is one engine for HTTP/1 and one for HTTP/2, each one goroutine for a downstream connection and whatever is
// upstream of it. The upstream of each request is chosen by a Router (router.go): its Decision names the target, and
// session.connect (HTTP/1) finds a connection to it. Everything that HTTP does not oblige a proxy to change keeps its bytes. Each request has a flow.Record
// of its own, closed exactly once.
package httpforward

import (
	"errors"
	"sync/atomic"
	"time"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/tcp"
	"github.com/pillion-proxy/pillion/internal/upstream"
)

// Config is what an Engine needs. All fields without a stated zero are required.
type Config struct {
	Direction flow.Direction
	Dialer    upstream.Dialer
	Pool      *upstream.Pool // of idle HTTP/1 connections
	Flows     flow.Sink      // takes each request's record
	Note      flow.Fields    // of which fields records carry the values

	MaxHeadBytes  int // of a request or response head, a header list, or trailers
	MaxHeadFields int

	HeadTimeout      time.Duration // for the head of a request from its first byte; zero or less: for ever
	RequestTimeout   time.Duration // from the end of the request to the head of its response; zero or less: for ever
	IdleTimeout      time.Duration // ends a connection in which nothing moves; zero or less: never
	HalfCloseTimeout time.Duration // the same once downstream has closed its half; zero or less: never

	Fields Fields
}

// Connection is what an engine takes over from a room. The engine owns all of it.
type Connection struct {
	Down *tcp.Conn
	Read *tcp.Buffer // what was read from Down; never nil, and not empty

	// An upstream connection that was made before downstream spoke; nil: none. It serves the first request. EarlyRead is
	// what was read from it: nil but for HTTP/2, whose servers may speak first.
	Early     *tcp.Conn
	EarlyRead *tcp.Buffer

	Record *flow.Record // the connection's: who and where. The room closes it; the engine counts in it

	// Target is where the connection itself leads: the upstream of Early, and of all streams of an HTTP/2 connection, whose
	// upstream connection is made before the first request.
	Target upstream.Target

	Router Router // chooses the upstream of each request; nil: Target for all
}

// Engine forwards the HTTP of one direction. Make it with New.
type Engine struct {
	config Config
	state  atomic.Int32 // one of the states below
}

// The states, in their order. A connection looks at the state when it is woken; the agent wakes all.
const (
	serving   int32 = iota
	announced       // HTTP/1 answers say that the connection closes
	draining        // also, connections without a request close, and HTTP/2 is told to go away
)

// New checks the configuration.
func New(config Config) (*Engine, error) {
	if config.Dialer.Poller == nil || config.Pool == nil || config.Flows == nil ||
		config.MaxHeadBytes <= 0 || config.MaxHeadFields <= 0 {
		return nil, errors.New("httpforward: Dialer, Pool, Flows and the limits of heads are required")
	}
	return &Engine{config: config}, nil
}

// Announce says that the end is near: from now on answers to HTTP/1 requests close their connection, so that their
// clients go elsewhere without losing a request.
func (e *Engine) Announce() { e.state.CompareAndSwap(serving, announced) }

// Drain ends connections as soon as they have no request: HTTP/1 closes those that wait for one, HTTP/2 says GOAWAY. Wake
// the poller after it: connections that wait look at the state then.
func (e *Engine) Drain() { e.state.Store(draining) }

// Draining reports whether Drain was called.
func (e *Engine) Draining() bool { return e.state.Load() == draining }

// Serve serves the requests of a connection until it ends, by HTTP/2 or HTTP/1.
func (e *Engine) Serve(w *tcp.Waiter, http2 bool, c Connection) {
	if http2 {
		e.ServeHTTP2(w, c)
		return
	}
	e.ServeHTTP1(w, c)
}
