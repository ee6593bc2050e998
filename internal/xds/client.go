// Package xds holds one stream of aggregated discovery (ADS) to a control plane, in the delta protocol or that of the
// state of the world. It reads the names of resources and not their content: that is the Handler's part.
//
// A lost stream changes nothing: what was received stays in force, and a new stream asks for the same names.
package xds

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"
)

// Method returns the path of the gRPC method of the protocol.
func Method(delta bool) string {
	if delta {
		return "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources"
	}
	return "/envoy.service.discovery.v3.AggregatedDiscoveryService/StreamAggregatedResources"
}

// Stream is a stream of messages, such as a grpcwire.Stream. One goroutine sends and another receives.
type Stream interface {
	Send(message []byte) error
	Receive() ([]byte, error) // io.EOF after an orderly end
	Close()                   // ends Send and Receive. It may be called more than once
}

// Update is one response: resources that are new or may have changed, and names of resources that are gone. Resources
// share the memory of the response, so a handler that keeps one byte of them keeps all.
type Update struct {
	Type      Type
	Resources []Resource
	Removed   []string
}

// Outcome is what a Handler made of an Update.
type Outcome struct {
	// Rejected names the resources that cannot be used. The response is rejected with their names, and the control plane
	// shows that to people. It does not send them again until they change. The other resources of the Update are in force.
	Rejected []Rejected

	// Wanted has the names of each type that are asked for from now on. Types that are not in it stay as they are. For
	// a wildcard type nil asks for all.
	Wanted map[Type][]string
}

// Handler takes updates, one at a time.
type Handler interface {
	Update(Update) Outcome
}

// Config is the configuration of a Client. Connect, Handler and Log are required.
type Config struct {
	Delta   bool
	Node    []byte // encoded envoy.config.core.v3.Node
	Connect func(ctx context.Context) (Stream, error)
	Handler Handler
	Log     *slog.Logger

	// MinBackoff and MaxBackoff bound the pause before a stream is opened again. The pause is random between 0 and a
	// bound that doubles with each failure, so that the agents of a mesh do not come back all at once. 0: 500 ms, 30 s.
	MinBackoff, MaxBackoff time.Duration
}

// Client holds the stream. Make it with New and start it with Run.
type Client struct {
	config  Config
	session *session

	mu     sync.Mutex
	status Status
}

// Status is the state of the stream, for people.
type Status struct {
	Connected bool
	Since     time.Time // of Connected's last change; zero before the first
	LastError error     // that ended the last stream, or kept it from being opened
	Failures  int       // in sequence: streams that ended before a response
	Streams   int64     // that were answered
	Failed    int64     // streams that ended before a response
	Lost      int64     // streams that ended after one
	Server    string    // that answered last, as it names itself; empty: it does not
	Types     [Types]TypeStatus
}

// TypeStatus is the state of one type.
type TypeStatus struct {
	Asked     bool
	Held      int       // resources
	Updates   int64     // responses
	Rejected  int64     // responses
	Last      time.Time // of the last response
	Version   string    // of the push that the last response belongs to, as the control plane names it; may be empty
	LastError string    // its rejection; empty if it was accepted
}

// New returns a client.
func New(config Config) *Client {
	if config.MinBackoff == 0 {
		config.MinBackoff = 500 * time.Millisecond
	}
	if config.MaxBackoff == 0 {
		config.MaxBackoff = 30 * time.Second
	}
	return &Client{config: config, session: newSession(config.Delta, config.Node)}
}

// Status returns the current state.
func (c *Client) Status() Status {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.status
}

// Run holds a stream until ctx ends, opening another one after each that ends.
func (c *Client) Run(ctx context.Context) {
	bound := c.config.MinBackoff
	for ctx.Err() == nil {
		answered, err := c.stream(ctx)
		if ctx.Err() != nil {
			return
		}
		c.disconnected(answered, err)
		if answered {
			bound = c.config.MinBackoff
		}
		pause := time.Duration(rand.Int64N(int64(bound) + 1))
		c.config.Log.Warn("control plane stream ended", "err", err, "retry_in", pause.Round(time.Millisecond))
		bound = min(2*bound, c.config.MaxBackoff)
		timer := time.NewTimer(pause)
		select {
		case <-ctx.Done():
		case <-timer.C:
		}
		timer.Stop()
	}
}

// stream opens a stream and serves it to its end. answered reports whether a response came.
func (c *Client) stream(ctx context.Context) (answered bool, err error) {
	stream, err := c.config.Connect(ctx)
	if err != nil {
		return false, fmt.Errorf("connecting: %w", err)
	}
	defer stream.Close()
	defer context.AfterFunc(ctx, stream.Close)()
	if err := c.send(stream, c.session.open()...); err != nil {
		return false, reason(stream, err)
	}
	for {
		message, err := stream.Receive()
		if err == io.EOF {
			return answered, errors.New("closed by the control plane")
		}
		if err != nil {
			return answered, fmt.Errorf("receiving: %w", err)
		}
		if !answered {
			c.connected()
			answered = true
		}
		if err := c.handle(stream, message); err != nil {
			return answered, err
		}
	}
}

// reason returns why a stream that failed to send ended: the status that the server gave, if there is one.
func reason(stream Stream, err error) error {
	if _, status := stream.Receive(); status != nil && status != io.EOF {
		err = status
	}
	return fmt.Errorf("sending: %w", err)
}

// handle passes a response to the handler and answers it. The answer comes first and subscriptions follow, as they
// concern other types.
func (c *Client) handle(stream Stream, message []byte) error {
	r, err := decode(message, c.config.Delta)
	if err != nil {
		return err // it cannot be answered without its nonce
	}
	if err := c.session.receive(r); err != nil {
		return err
	}
	outcome := c.config.Handler.Update(Update{Type: r.typ, Resources: r.resources, Removed: r.removed})
	requests := []request{c.session.answer(r, outcome.Rejected)}
	for t := range Type(Types) {
		if names, ok := outcome.Wanted[t]; ok {
			requests = append(requests, c.session.subscribe(t, names)...)
		}
	}
	c.updated(r, requests[0].err)
	if err := c.send(stream, requests...); err != nil {
		return reason(stream, err)
	}
	return nil
}

func (c *Client) send(stream Stream, requests ...request) error {
	for i := range requests {
		if err := stream.Send(requests[i].encode(c.config.Delta)); err != nil {
			return err
		}
	}
	return nil
}

func (c *Client) connected() {
	c.config.Log.Info("control plane connected")
	c.mu.Lock()
	defer c.mu.Unlock()
	c.status.Connected, c.status.Since, c.status.Failures = true, time.Now(), 0
	c.status.Streams++
}

func (c *Client) disconnected(answered bool, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.status.Connected || c.status.Since.IsZero() {
		c.status.Since = time.Now()
	}
	c.status.Connected, c.status.LastError = false, err
	if answered {
		c.status.Lost++
	} else {
		c.status.Failures++
		c.status.Failed++
	}
}

func (c *Client) updated(r *response, rejection string) {
	if rejection != "" {
		c.config.Log.Warn("configuration rejected", "type", r.typ, "err", rejection)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if r.server != "" {
		c.status.Server = r.server
	}
	s := &c.status.Types[r.typ]
	s.Updates++
	s.Last, s.LastError, s.Version = time.Now(), rejection, r.version[:min(len(r.version), maxServer)]
	if rejection != "" {
		s.Rejected++
	}
	for t := range c.session.types {
		c.status.Types[t].Asked, c.status.Types[t].Held = c.session.types[t].asked, len(c.session.types[t].held)
	}
}
