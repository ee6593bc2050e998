// Package outbound carries the connections that this workload opens.
//
// A rule redirected each connection here, and it goes on to its original destination. Only a connection that would go round
// is refused: one to the agent itself, and one of the agent's own that the rules do not exempt.
package outbound

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/pillion-proxy/pillion/internal/balance"
	"github.com/pillion-proxy/pillion/internal/fault"
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
	Poller       *tcp.Poller        // for upstream connections
	OwnPorts     []uint16           // ports of the agent, refused as destinations at OwnAddresses
	OwnAddresses Addresses          // this workload's addresses
	Flows        *flow.Table        // lists open connections and takes their records when they end
	Settings     serve.Settings     // until the first Apply
	HTTP         httpforward.Config // the pool, and the limits on what a peer may send; New sets the other fields
	Egress       serve.Egress       // the policy for destinations; nil: all are allowed
	Faults       fault.Set          // on purpose; may be nil
	Decryption   serve.Decryption   // of TLS; nil: none is decrypted
	Mesh         serve.Mesh         // the configuration of a control plane; may be nil
	Wait         time.Duration      // how long connections are held for the first configuration of Mesh
	Lookup       balance.Lookup     // resolves the names of Mesh's clusters; nil: they have no endpoints
	Tracing      *tracing.Exporters // of spans, as Mesh configures them; nil: it is not followed
	Recorder     serve.Recorder     // of access logs, likewise
	Peers        *peers.Exchange    // of metadata with other proxies of Mesh; may be nil
}

// Addresses distinguishes this workload's own addresses from others.
type Addresses interface {
	Contains(netip.Addr) bool
}

// Proxy serves outbound connections. Make it with New.
type Proxy struct {
	*serve.Role
	policy policy
}

// New checks the configuration.
func New(config Config) (*Proxy, error) {
	if config.OwnAddresses == nil || len(config.OwnPorts) == 0 {
		return nil, errors.New("outbound: OwnPorts and OwnAddresses are required")
	}
	role, err := serve.NewRole(serve.Config{
		Direction:  flow.Outbound,
		Poller:     config.Poller,
		Flows:      config.Flows,
		Settings:   config.Settings,
		HTTP:       config.HTTP,
		Egress:     config.Egress,
		Decryption: config.Decryption,
		Faults:     config.Faults,
		Mesh:       config.Mesh,
		Wait:       config.Wait,
		Lookup:     config.Lookup,
		Peers:      config.Peers,
		Tracing:    config.Tracing,
		Recorder:   config.Recorder,
	})
	if err != nil {
		return nil, fmt.Errorf("outbound: %w", err)
	}
	return &Proxy{role, policy{config.OwnPorts, config.OwnAddresses}}, nil
}

// ServeConn carries one connection to its end, and closes it. When ctx ends, the connection is cut.
func (p *Proxy) ServeConn(ctx context.Context, down *tcp.Conn) {
	c := p.Open(ctx, down)
	defer c.Close()

	dst, err := down.OriginalDst()
	if err != nil {
		c.Refuse(flow.NoOriginalDestination, err)
		return
	}
	c.Record.OriginalDestination = dst
	reason, ok := p.policy.allows(dst)
	if ok && c.Loops() {
		reason, ok, err = flow.Loop, false, upstream.ErrLoop
	}
	if c.Record.Cluster = cluster(reason); !ok {
		c.Refuse(reason, err)
		return
	}
	c.List()
	if !c.AwaitConfiguration() {
		return
	}

	// The side that sends first decides the protocol. If downstream is silent, the upstream is dialled anyway, because it
	// may be the side that sends first.
	if !c.ReadFirst(c.Settings.Detects(dst.Port())) || !c.Permit() || !c.Admit() || !c.Authorize() {
		return
	}
	to, silent := target(dst), c.Silent()
	if !c.Choose(&to) || !c.Decrypt(&to) || !c.Fault() || !c.HTTP() && !c.Dial(&to) {
		return
	}
	if !c.WatchBoth() || !c.Permit() || !c.Confirm(&to) || !c.Decrypt(&to) || silent && !c.Fault() || !c.HTTP() && !c.Dial(&to) ||
		!c.WatchBoth() {
		return
	}
	c.Carry(&to)
}
