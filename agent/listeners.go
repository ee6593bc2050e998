package agent

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"syscall"

	"github.com/pillion-proxy/pillion/inbound"
	"github.com/pillion-proxy/pillion/internal/admin"
	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/httpforward"
	"github.com/pillion-proxy/pillion/internal/listener"
	"github.com/pillion-proxy/pillion/internal/serve"
	"github.com/pillion-proxy/pillion/internal/tcp"
	"github.com/pillion-proxy/pillion/internal/upstream"
	"github.com/pillion-proxy/pillion/outbound"
)

// The two ways to bind. The admin server trusts its own pod only, and an outbound listener that is open to the network
// would be an open relay. Inbound binds all addresses, because nat PREROUTING redirects to the address of the receiving
// interface.
var (
	loopback     = []netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 1}), netip.IPv6Loopback()}
	allAddresses = []netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()}
)

// role carries the connections of one listener.
type role interface {
	listener.Handler
	Announce()
	Drain()
	Close()
}

// trafficListener is one entry of Agent.listeners: a port, and the role that carries its connections.
type trafficListener struct {
	name      string // in logs, gates and reports
	shown     string // Envoy's name of the listener
	direction flow.Direction
	role      role
	pool      *upstream.Pool // for this listener only

	field       string // of Config, for errors
	port        uint16
	addresses   []netip.Addr
	transparent bool // TPROXY: packets to a port without a listener are dropped, not refused

	server *listener.Server
	door   *listener.Server // resets new connections after a transparent listener has closed; nil before
}

// addListeners builds the roles and lists them in the order of shutdown. Inbound comes first: the workload may need
// outbound connections to finish the requests that it has accepted.
func (a *Agent) addListeners() error {
	limit := listener.NewLimit(a.config.Connections.Max)
	add := func(l *trafficListener) {
		l.server = &listener.Server{Name: l.name, Handler: l.role, Limit: limit, Log: a.log}
		a.listeners = append(a.listeners, l)
	}
	if a.config.Gateway || a.config.Edge != nil {
		return a.addGateway(add)
	}

	inboundPool := upstream.NewPool(a.config.HTTP.UpstreamIdleTimeout)
	inboundRole, err := inbound.New(inbound.Config{
		Poller:       a.poller,
		OwnPorts:     a.ownPorts(),
		OwnAddresses: a.addresses,
		TPROXYMark:   a.tproxyMark(),
		Flows:        a.telling.table,
		Settings:     a.settings(a.config.Connections.InboundProxyProtocol),
		HTTP:         a.forwarding(inboundPool, a.config.HTTP.InboundFields),
		Mesh:         a.mesh(),
		Wait:         a.config.ControlPlane.Wait,
		Lookup:       a.lookup(),
		Log:          a.log,
		StrictPaths:  a.config.ControlPlane.StrictPaths,
		Rejudge:      a.config.ControlPlane.Rejudge,
		Peers:        a.plane.peers,
		Tracing:      a.exporters(),
		Recorder:     a.recorder(),
	})
	if err != nil {
		return err
	}
	a.authorizer = inboundRole.Role
	add(&trafficListener{
		name: "inbound", shown: admin.VirtualInbound, direction: flow.Inbound, role: inboundRole, pool: inboundPool,
		field: "Ports.Inbound", port: a.config.Ports.Inbound, addresses: allAddresses,
		transparent: a.config.Interception.Mode == capture.TPROXY,
	})

	outboundPool := upstream.NewPool(a.config.HTTP.UpstreamIdleTimeout)
	outboundRole, err := outbound.New(outbound.Config{
		Poller:       a.poller,
		OwnPorts:     a.ownPorts(),
		OwnAddresses: a.addresses,
		Flows:        a.telling.table,
		Egress:       a.egressPolicy(),
		Settings:     a.settings(capture.Ports{}),
		HTTP:         a.forwarding(outboundPool, a.config.HTTP.OutboundFields),
		Mesh:         a.mesh(),
		Wait:         a.config.ControlPlane.Wait,
		Lookup:       a.lookup(),
		Peers:        a.plane.peers,
		Tracing:      a.exporters(),
		Recorder:     a.recorder(),
	})
	if err != nil {
		return err
	}
	a.balancer = outboundRole.Balancer()
	a.telling.reach(outboundRole.Transport)
	add(&trafficListener{
		name: "outbound", shown: admin.VirtualOutbound, direction: flow.Outbound, role: outboundRole, pool: outboundPool,
		field: "Ports.Outbound", port: a.config.Ports.Outbound, addresses: loopback,
	})
	return nil
}

// settings are those of a role. proxyProtocol are the ports whose upstream expects a PROXY protocol header.
func (a *Agent) settings(proxyProtocol capture.Ports) serve.Settings {
	c := a.config.Connections
	return serve.Settings{
		ConnectTimeout:   c.ConnectTimeout,
		IdleTimeout:      c.IdleTimeout,
		HalfCloseTimeout: c.HalfCloseTimeout,
		DetectionDelay:   c.DetectionDelay,
		DetectionHold:    c.DetectionHold,
		OpaquePorts:      c.OpaquePorts,
		ProxyProtocol:    proxyProtocol,
	}
}

// forwarding configures a role's HTTP engines.
func (a *Agent) forwarding(pool *upstream.Pool, fields httpforward.Fields) httpforward.Config {
	c := a.config.HTTP
	return httpforward.Config{
		Pool:   pool,
		Budget: a.budget,
		Settings: httpforward.Settings{
			MaxHeadBytes:   c.MaxHeadBytes,
			MaxHeadFields:  c.MaxHeadFields,
			HeadTimeout:    c.RequestHeadTimeout,
			RequestTimeout: c.RequestTimeout,
			Noted:          a.telling.noted,
			Fields:         fields,
			Tracing:        a.telling.spans.policy,
		},
	}
}

// ownPorts are the agent's ports. Connections to them at this workload's own addresses are refused: they would come back
// to the agent.
func (a *Agent) ownPorts() []uint16 {
	p := a.config.Ports
	spec := capture.Spec{OutboundPort: p.Outbound, InboundPort: p.Inbound}
	ports := spec.OwnPorts()
	for _, port := range []uint16{p.Readiness, p.Status, p.Metrics, p.Admin} {
		if port != 0 && !slices.Contains(ports, port) {
			ports = append(ports, port)
		}
	}
	return ports
}

// tproxyMark is zero in redirect mode.
func (a *Agent) tproxyMark() uint32 {
	if a.config.Interception.Mode == capture.TPROXY {
		return a.config.Interception.TPROXYMark
	}
	return 0
}

// bindListener opens l's port at each of its addresses.
func (a *Agent) bindListener(l *trafficListener) ([]*tcp.Listener, error) {
	open := a.poller.Listen
	if l.transparent {
		open = a.listenTransparent
	}
	return listen(a, l.field, l.addresses, l.port, open)
}

func (a *Agent) listenTransparent(address netip.AddrPort) (*tcp.Listener, error) {
	ln, err := a.poller.ListenTransparent(address)
	if errors.Is(err, syscall.EPERM) {
		return nil, &FieldError{Field: "Interception.Mode", Value: string(capture.TPROXY), Err: fmt.Errorf(
			"the agent needs the capability NET_ADMIN: add it to its securityContext, or use %s for init and agent: %w",
			capture.Redirect, err)}
	}
	return ln, err
}

// listen binds port at each address with open. field names the port in errors. An IPv6 address that this host does not
// have is skipped.
func listen[L any](
	a *Agent, field string, addresses []netip.Addr, port uint16, open func(netip.AddrPort) (L, error),
) ([]L, error) {
	var listeners []L
	for _, address := range addresses {
		ln, err := open(netip.AddrPortFrom(address, port))
		if err != nil && address.Is6() && tcp.LacksIPv6(err) {
			a.log.Info("no IPv6, listening on IPv4 only", "port", port, "error", err)
			continue
		}
		if errors.As(err, new(*FieldError)) {
			return listeners, err
		}
		if err != nil {
			return listeners, &FieldError{Field: field, Value: fmt.Sprint(port), Err: err}
		}
		listeners = append(listeners, ln)
	}
	return listeners, nil
}

// stopListener stops accepting. It may be called more than once, and from several goroutines.
func (a *Agent) stopListener(l *trafficListener) {
	if l.server.Dynamic && a.unfollow != nil {
		a.unfollow()
	}
	l.server.Stop()
	if l.transparent {
		a.doors.Lock()
		defer a.doors.Unlock()
		if l.door == nil {
			l.door = a.openDoor(l)
		}
	}
}

// openDoor binds l's port again to reset new connections. With REDIRECT the kernel refuses them, and clients turn
// elsewhere at once. With TPROXY a packet to a port without a listener is dropped, and clients would wait until the pod
// is gone.
func (a *Agent) openDoor(l *trafficListener) *listener.Server {
	door := &listener.Server{Name: l.name + ", closed", Handler: resetting{}, Limit: new(listener.Limit), Log: a.log}
	var err error
	if door.Listeners, err = a.bindListener(l); err != nil {
		a.log.Warn("cannot reset new connections, they will hang", "listener", l.name, "error", err)
	}
	door.Start()
	return door
}

// closeRoles stops what roles do in the background.
func (a *Agent) closeRoles() {
	for _, l := range a.listeners {
		l.role.Close()
	}
}

// closeDoors leaves the ports to the kernel.
func (a *Agent) closeDoors() {
	a.doors.Lock()
	defer a.doors.Unlock()
	for _, l := range a.listeners {
		if l.door != nil {
			l.door.Stop()
			l.door.Abort()
		}
	}
}

// resetting resets each connection.
type resetting struct{}

func (resetting) ServeConn(_ context.Context, down *tcp.Conn) { down.Reset() }
func (resetting) Refuse(down *tcp.Conn)                       { down.Reset() }
