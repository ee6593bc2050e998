package agent

import (
	"context"
	"errors"
	"sync"

	"github.com/pillion-proxy/pillion/gateway"
	"github.com/pillion-proxy/pillion/internal/admin"
	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/internal/configdump"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/upstream"
)

// addGateway builds the role of a gateway in the place of the two directions.
func (a *Agent) addGateway(add func(*trafficListener)) error {
	if a.mesh() == nil {
		return &FieldError{Field: "ControlPlane.Pod", Err: errors.New("a gateway needs a control plane, which names its listeners")}
	}
	pool := upstream.NewPool(a.config.HTTP.UpstreamIdleTimeout)
	role, err := gateway.New(gateway.Config{
		Poller:   a.poller,
		Flows:    a.telling.table,
		Settings: a.settings(capture.Ports{}),
		HTTP:     a.forwarding(pool, a.config.HTTP.OutboundFields),
		Mesh:     a.mesh(),
		Lookup:   a.lookup(),
		Log:      a.log,
		Peers:    a.plane.peers,
		Tracing:  a.exporters(),
		Recorder: a.recorder(),
		Rejudge:  a.config.ControlPlane.Rejudge,
	})
	if err != nil {
		return err
	}
	a.authorizer, a.balancer = role.Role, role.Balancer()
	a.telling.reach(role.Transport)
	l := &trafficListener{name: "gateway", direction: flow.Outbound, role: role, pool: pool}
	add(l)
	l.server.Dynamic = true
	a.accepting = gateway.NewListeners(gateway.ListenersConfig{
		Poller: a.poller, Server: l.server, Mesh: a.mesh(), OwnPorts: a.ownPorts(), Log: a.log,
	})
	return nil
}

// startAccepting begins to bind what the configuration names. It does nothing unless the agent is a gateway.
func (a *Agent) startAccepting() {
	if a.accepting == nil {
		return
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	a.unfollow = func() { cancel(); <-ended }
	if e := a.config.Edge; e != nil {
		var both sync.WaitGroup
		both.Go(func() { e.Run(ctx, a.followBound) })
		both.Go(func() { a.accepting.Run(ctx) })
		go func() {
			defer close(ended)
			both.Wait()
		}()
		return
	}
	go func() {
		defer close(ended)
		select {
		case <-ctx.Done():
		case <-a.plane.session.Initialized():
			a.accepting.Run(ctx)
		}
	}()
}

// acceptFirst binds the ports of a gateway without a control plane. One that cannot be bound is an error; later ones, after a
// change, are tried again.
func (a *Agent) acceptFirst() error {
	if a.config.Edge == nil || a.accepting.Apply() {
		return nil
	}
	for _, l := range a.listeners {
		l.server.Stop()
		l.server.Abort()
	}
	failed := a.accepting.Failures()[0]
	return &FieldError{Field: "Edge", Value: failed.Address.String(), Err: failed.Err}
}

// where describes the ports of the traffic, for the log.
func (a *Agent) where() []any {
	if a.config.Edge != nil {
		return []any{"ports", len(a.listeners[0].server.Addrs()), "readiness_port", a.config.Ports.Readiness}
	}
	if a.accepting != nil {
		return []any{"ports", "those of the control plane", "readiness_port", a.config.Ports.Readiness}
	}
	return []any{"outbound_port", a.config.Ports.Outbound, "inbound_port", a.config.Ports.Inbound, "readiness_port", a.config.Ports.Readiness}
}

// acceptingAt lists the listeners of the configuration that are bound.
func (a *Agent) acceptingAt() (list []admin.Listener) {
	for name, addresses := range a.accepting.Names() {
		list = append(list, admin.Listener{Name: name, Addresses: addresses})
	}
	return list
}

// unbound returns the listeners of the configuration that cannot be bound.
func (a *Agent) unbound() map[string]*configdump.Refusal {
	if a.accepting == nil {
		return nil
	}
	refused := map[string]*configdump.Refusal{}
	for _, f := range a.accepting.Failures() {
		refused[f.Listener] = &configdump.Refusal{Reason: f.Err.Error(), At: f.Since}
	}
	return refused
}
