package agent

import (
	"errors"
	"io"
	"net"
	"net/http"
	"net/netip"
	"runtime"
	"slices"
	"strings"

	"github.com/pillion-proxy/pillion/healthz"
	"github.com/pillion-proxy/pillion/internal/admin"
	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/internal/certview"
	"github.com/pillion-proxy/pillion/internal/configview"
	"github.com/pillion-proxy/pillion/internal/controlplane"
	"github.com/pillion-proxy/pillion/internal/live"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/metrics"
	"github.com/pillion-proxy/pillion/internal/ownport"
	"github.com/pillion-proxy/pillion/internal/podinfo"
	"github.com/pillion-proxy/pillion/internal/probe"
	"github.com/pillion-proxy/pillion/internal/scrape"
	"github.com/pillion-proxy/pillion/internal/status"
)

// server is one of the ports where the agent itself answers.
type server struct {
	name      string // for logs
	field     string // of Config, for errors
	port      uint16
	addresses []netip.Addr
	http      *http.Server
	listeners []net.Listener
}

// serve makes the servers whose port is not zero, in the order of shutdown. Readiness closes last, so that a drain can be
// observed.
func (a *Agent) serve() error {
	gates := a.gates()
	ready := healthz.NewHandler(gates...)
	add := func(name, field string, port uint16, addresses []netip.Addr, handler http.Handler) {
		if port != 0 {
			a.servers = append(a.servers, &server{
				name: name, field: field, port: port, addresses: addresses, http: ownport.NewServer(handler, a.log),
			})
		}
	}
	probers, err := probe.Parse(a.config.Workload.Probers, probe.Config{
		Address:    parseAddress(a.config.Workload.Pod.IP),
		Localhost:  a.config.Workload.ProbeLocalhost,
		StatusPort: a.config.Ports.Status,
		HTTP2:      a.config.Workload.ProbeHTTP2,
		KeepAlive:  a.config.Workload.ProbeKeepAlive,
	})
	if errors.Is(err, probe.ErrNoAddress) {
		return &FieldError{Field: "Workload.Pod.IP", Err: err}
	}
	if err != nil {
		return &FieldError{Field: "Workload.Probers", Err: err}
	}
	a.probers = probers
	targets, err := scrape.ParseTargets(a.config.Workload.ScrapeTargets, a.ownPorts()...)
	if err != nil {
		return &FieldError{Field: "Workload.ScrapeTargets", Err: err}
	}
	if a.telling.live != nil {
		add("admin", "Ports.Admin", a.config.Ports.Admin, loopback, a.adminHandler())
	}
	if a.telling.metrics != nil {
		add("metrics", "Ports.Metrics", a.config.Ports.Metrics, allAddresses, a.telling.metrics.Handler())
		add("status", "Ports.Status", a.config.Ports.Status, allAddresses, status.NewHandler(status.Config{
			Ready:   ready,
			Probers: probers,
			Metrics: scrape.NewHandler(scrape.Config{Own: a.writeMetrics, Targets: targets, Log: a.log}),
			Quit:    a.quit, Drain: a.announce,
			Log:              a.log,
			MetricsLocalOnly: a.config.Status.MetricsLocalOnly,
			Profiling:        a.config.Status.Profiling,
		}))
	}
	add("readiness", "Ports.Readiness", a.config.Ports.Readiness, allAddresses, ready)
	return nil
}

// start serves until s.http is closed.
func (a *Agent) start(s *server) {
	for _, ln := range s.listeners {
		a.serverLoops.Go(func() {
			if err := s.http.Serve(ln); !errors.Is(err, http.ErrServerClosed) {
				a.log.Error("HTTP server stopped", "server", s.name, "address", ln.Addr().String(), "error", err)
			}
		})
	}
}

func (a *Agent) writeMetrics(w io.Writer) error { return a.telling.metrics.Write(w, false) }

// gates are the conditions of readiness.
func (a *Agent) gates() []healthz.Gate {
	gates := []healthz.Gate{
		{Name: "drain", Open: a.notDraining},
		{Name: "healthcheck", Open: a.notFailedByHand},
	}
	for _, l := range slices.Backward(a.listeners) {
		gates = append(gates, healthz.Gate{Name: l.name, Open: l.server.Accepting})
	}
	if a.accepting != nil {
		gates = append(gates, healthz.Gate{Name: "listeners", Open: a.accepting.Bound})
	}
	gates = append(gates, healthz.Gate{Name: "addresses", Open: a.addresses.Current})
	return append(gates, a.controlPlaneGates()...)
}

func (a *Agent) gateStates() (states []metrics.Gate) {
	for _, gate := range a.gates() {
		states = append(states, metrics.Gate{Name: gate.Name, Open: gate.Open() == nil})
	}
	return states
}

func (a *Agent) liveGates() (gates []live.Gate) {
	for _, gate := range a.gates() {
		g := live.Gate{Name: gate.Name, Open: true}
		if err := gate.Open(); err != nil {
			g.Open, g.Why = false, err.Error()
		}
		gates = append(gates, g)
	}
	return gates
}

// adminHandler is the admin server's handler.
func (a *Agent) adminHandler() http.Handler {
	looking := a.telling.live.Handler(live.Sources{Table: a.telling.table, Gates: a.liveGates, Plane: a.livePlane()})
	return admin.NewHandler(admin.Config{
		Version:   a.config.Version,
		Started:   a.started,
		Address:   netip.AddrPortFrom(loopback[0], a.config.Ports.Admin),
		Node:      a.node(),
		Options:   admin.Options{Concurrency: runtime.GOMAXPROCS(0), LogLevel: a.logLevel().String(), DrainTime: a.config.Drain.Timeout},
		Listeners: a.bound,
		Carrying: admin.Carrying{
			OwnPorts: a.ownPorts(), OwnAddresses: a.addresses.All, OpaquePorts: ranges(a.config.Connections.OpaquePorts),
			InboundSources: []netip.Addr{capture.InboundSource4, capture.InboundSource6}, TPROXYMark: a.tproxyMark(),
			ConnectTimeout: a.config.Connections.ConnectTimeout, IdleTimeout: a.config.Connections.IdleTimeout,
			RequestTimeout: a.config.HTTP.RequestTimeout, RequestHeadTimeout: a.config.HTTP.RequestHeadTimeout,
			UpstreamIdleTimeout: a.config.HTTP.UpstreamIdleTimeout,
			MaxHeadBytes:        a.config.HTTP.MaxHeadBytes, MaxHeadFields: a.config.HTTP.MaxHeadFields,
		},
		Flows:        a.telling.table,
		Ready:        a.state,
		Unready:      func() []string { return healthz.Closed(a.gates()) },
		Metrics:      a.telling.metrics,
		RecentLog:    a.config.RecentLog,
		LogLevel:     a.logLevel,
		SetLogLevel:  a.config.LogLevel.Set,
		Drain:        a.drainListeners,
		Quit:         a.quit,
		Health:       func(ok bool) { a.failedByHand.Store(!ok) },
		ReopenLogs:   a.ReopenLogs,
		ControlPlane: a.shownControlPlane(),
		Page:         looking,
		Live:         looking,
		View:         configview.Handler(a.resources()),
		Explain:      configview.ExplainHandler(a.snapshot(), a.inUse),
		Certificates: certview.Handler(a.certificates()),
		Log:          a.log,
	})
}

// serves are the paths of each server but the admin server, by its name.
var serves = map[string][]string{
	"readiness": {"/healthz/ready", "/healthz/live"},
	"status":    {"/healthz/ready", "/stats/prometheus", "/metrics", "/app-health/", "/app-lifecycle/"},
	"metrics":   {metrics.Path},
}

// bound lists the addresses of all listeners. There are fewer of them without IPv6.
func (a *Agent) bound() (list []admin.Listener) {
	if a.accepting != nil {
		list = a.acceptingAt()
	}
	for _, carrying := range slices.Backward(a.listeners) {
		if !carrying.server.Dynamic {
			list = append(list, admin.Listener{Name: carrying.shown, Addresses: carrying.server.Addrs()})
		}
	}
	for _, s := range slices.Backward(a.servers) {
		if serves[s.name] == nil {
			continue
		}
		l := admin.Listener{Name: s.name, Serves: serves[s.name]}
		for _, ln := range s.listeners {
			at := ln.Addr().(*net.TCPAddr).AddrPort()
			l.Addresses = append(l.Addresses, netip.AddrPortFrom(at.Addr().Unmap(), at.Port()))
		}
		list = append(list, l)
	}
	return list
}

// state returns Envoy's name of the agent's state, and whether the agent is ready.
func (a *Agent) state() (string, bool) {
	switch {
	case a.draining.Load(), a.failedByHand.Load():
		return "DRAINING", false
	case len(healthz.Closed(a.gates())) > 0:
		return "INITIALIZING", false
	}
	return "LIVE", true
}

// node names the agent as the control plane has it, or as pilot-agent does without one.
func (a *Agent) node() admin.Node {
	if pod := a.plane.pod; pod != nil {
		return admin.Node{ID: pod.Node.ID(), Cluster: pod.Node.Cluster, Metadata: pod.Node.Metadata}
	}
	return node(a.config.Workload.Pod, a.config.Workload.ClusterDomain)
}

// shownControlPlane returns what the admin server shows, or nil without a control plane.
func (a *Agent) shownControlPlane() admin.ControlPlane {
	if a.plane.session == nil {
		return nil
	}
	return shown{a.plane.session, a.balancer, a.countUpstream, a.unbound}
}

// snapshot returns the function that returns the configuration in force, or nil without a control plane.
func (a *Agent) snapshot() func() *mesh.Snapshot {
	if a.plane.session == nil {
		return nil
	}
	return a.plane.session.Snapshot
}

// certificates returns the source of the workload's certificates, or nil without one.
func (a *Agent) certificates() certview.Source {
	if a.plane.session == nil || !a.plane.session.HasIdentity() {
		return nil
	}
	return certificates{a.plane.session}
}

// resources returns the function that returns the control plane's resources, or nil without a control plane.
func (a *Agent) resources() func() controlplane.Resources {
	if a.plane.session == nil {
		return nil
	}
	return a.plane.session.Resources
}

// node names the agent as pilot-agent does. Unknown parts are left out.
func node(pod podinfo.Pod, domain string) admin.Node {
	if domain == "" {
		domain = podinfo.DefaultClusterDomain
	}
	known := func(parts ...string) string {
		return strings.Join(slices.DeleteFunc(parts, func(part string) bool { return part == podinfo.Unknown }), ".")
	}
	metadata := map[string]any{}
	for name, value := range map[string]string{
		"NAME": pod.Name, "NAMESPACE": pod.Namespace, "INSTANCE_IPS": pod.IP, "SERVICE_ACCOUNT": pod.ServiceAccount,
		"WORKLOAD_NAME": pod.Workload, "CLUSTER_ID": pod.Cluster, "MESH_ID": pod.Mesh,
	} {
		if value != podinfo.Unknown && value != "" {
			metadata[name] = value
		}
	}
	return admin.Node{
		ID:       "sidecar~" + pod.IP + "~" + known(pod.Name, pod.Namespace) + "~" + known(pod.Namespace, "svc."+domain),
		Cluster:  known(pod.App, pod.Namespace),
		Metadata: metadata,
	}
}

func ranges(ports capture.Ports) (list [][2]uint16) {
	if ports.All {
		return [][2]uint16{{1, 65535}}
	}
	for _, r := range ports.List {
		list = append(list, [2]uint16{r.First, r.Last})
	}
	return list
}

// parseAddress returns the zero Addr if text is not an address.
func parseAddress(text string) netip.Addr {
	address, _ := netip.ParseAddr(text)
	return address
}

// listenHTTP binds an address for its own family only, so that the other family can be bound, or be missing, by itself.
func listenHTTP(address netip.AddrPort) (net.Listener, error) {
	network := "tcp4"
	if address.Addr().Is6() {
		network = "tcp6"
	}
	listener, err := net.Listen(network, address.String())
	if err != nil {
		return nil, err
	}
	return ownport.Bound(listener), nil
}
