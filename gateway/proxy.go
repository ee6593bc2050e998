// Package gateway carries the connections that a gateway accepts from outside, for the listeners that a configuration names.
//
// No rule has redirected them: the address at which a connection was accepted chooses its listener, and the listener's filter
// chains decide what becomes of it. TLS ends here, or passes; requests are routed one by one, and connections of bytes go to
// an endpoint of a cluster. A connection without a filter chain is refused.
package gateway

import (
	"context"
	"errors"
	"fmt"
	"log/slog"

	"github.com/pillion-proxy/pillion/internal/balance"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/httpforward"
	"github.com/pillion-proxy/pillion/internal/peers"
	"github.com/pillion-proxy/pillion/internal/serve"
	"github.com/pillion-proxy/pillion/internal/tcp"
	"github.com/pillion-proxy/pillion/internal/tracing"
	"github.com/pillion-proxy/pillion/internal/upstream"
)

// Config is what a Proxy needs. All fields without a stated zero are required.
type Config struct {
	Poller   *tcp.Poller        // for upstream connections
	Flows    *flow.Table        // lists open connections and takes their records when they end
	Settings serve.Settings     // until the first Apply
	HTTP     httpforward.Config // the pool, and the limits on what a peer may send; New sets the other fields
	Mesh     serve.Mesh         // the listeners, and all that they lead to
	Lookup   balance.Lookup     // resolves the names of Mesh's clusters; nil: they have no endpoints
	Log      *slog.Logger       // nil: not logged
	Tracing  *tracing.Exporters // of spans, as Mesh configures them; nil: it is not followed
	Recorder serve.Recorder     // of access logs, likewise
	Peers    *peers.Exchange    // of metadata with the proxies of upstreams; nil: never
	Rejudge  bool               // a connection of bytes ends when a changed policy of Mesh denies it
}

// Proxy serves the connections of all listeners. Make it with New.
type Proxy struct{ *serve.Role }

// New checks the configuration.
func New(config Config) (*Proxy, error) {
	if config.Mesh == nil {
		return nil, errors.New("gateway: Mesh is required")
	}
	role, err := serve.NewRole(serve.Config{
		Direction: flow.Outbound, // as Istio's gateways report their traffic
		Gateway:   true,
		Poller:    config.Poller,
		Flows:     config.Flows,
		Settings:  config.Settings,
		HTTP:      config.HTTP,
		Mesh:      config.Mesh,
		Lookup:    config.Lookup,
		Log:       config.Log,
		Peers:     config.Peers,
		Tracing:   config.Tracing,
		Recorder:  config.Recorder,
		Rejudge:   config.Rejudge,
	})
	if err != nil {
		return nil, fmt.Errorf("gateway: %w", err)
	}
	return &Proxy{role}, nil
}

// ServeConn carries one connection to its end, and closes it. When ctx ends, the connection is cut.
func (p *Proxy) ServeConn(ctx context.Context, down *tcp.Conn) {
	c := p.Open(ctx, down)
	defer c.Close()

	dst := down.LocalAddr()
	if !dst.IsValid() {
		c.Refuse(flow.NoOriginalDestination, nil)
		return
	}
	c.Record.OriginalDestination = dst
	if !c.AwaitConfiguration() || !c.TakeProxyHeader() {
		return
	}
	c.List()

	// The client's first bytes choose the filter chain. A listener of bytes without TLS has only one, and the server may be the
	// side that sends first.
	if !c.ReadFirst(true) || !c.Admit() || !c.Secure() || !c.Authorize() {
		return
	}
	var to upstream.Target
	if !c.Choose(&to) || !c.HTTP() && !c.Dial(&to) {
		return
	}
	if !c.WatchBoth() || !c.Confirm(&to) {
		return
	}
	c.Carry(&to)
}
