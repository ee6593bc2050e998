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
	"github.com/pillion-proxy/pillion/internal/listener"
	"github.com/pillion-proxy/pillion/internal/live"
	"github.com/pillion-proxy/pillion/internal/metrics"
	"github.com/pillion-proxy/pillion/internal/podinfo"
	"github.com/pillion-proxy/pillion/internal/scrape"
	"github.com/pillion-proxy/pillion/internal/status"
)

// server is one of the ports at which the agent itself answers.
type server struct {
	name      string // for logs
	flag      string
	port      uint16
	addresses []netip.Addr
	http      *http.Server
	listeners []net.Listener
}

// The two ways to bind. An agent's orders are taken from its own pod alone, and outbound open to the network would be an
// open relay; inbound has to be bound to all addresses, as nat PREROUTING redirects to the receiving interface's.
var (
	loopback     = []netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 1}), netip.IPv6Loopback()}
	allAddresses = []netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()}
)

// serve makes the servers that are on. Readiness is the last to be closed, so that a drain can be watched.
func (a *Agent) serve() error {
	gates := a.gates()
	ready := healthz.NewHandler(gates...)
	add := func(name, flag string, port uint16, addresses []netip.Addr, handler http.Handler) {
		if port != 0 {
			a.servers = append(a.servers, &server{
				name: name, flag: flag, port: port, addresses: addresses, http: healthz.NewServer(handler, a.log),
			})
		}
	}
	probers, err := healthz.ParseProbers(a.config.AppProbers, healthz.ProbeConfig{
		Address:    parseAddress(a.config.Pod.IP),
		Localhost:  a.config.ProbeLocalhost,
		StatusPort: a.config.StatusPort,
		HTTP2:      a.config.ProbeHTTP2,
		KeepAlive:  a.config.ProbeKeepAlive,
	})
	if err != nil {
		return err
	}
	a.probers = probers
	targets, err := scrape.ParseTargets(a.config.ScrapeTargets, a.ownPorts()...)
	if err != nil {
		return err
	}
	if a.telling.live != nil {
		add("admin", "--admin-port", a.config.AdminPort, loopback, a.adminHandler())
	}
	if a.telling.metrics != nil {
		add("metrics", "--metrics-port", a.config.MetricsPort, allAddresses, a.telling.metrics.Handler())
		add("status", "--status-port", a.config.StatusPort, allAddresses, status.NewHandler(status.Config{
			Ready:   ready,
			Probers: probers,
			Metrics: scrape.NewHandler(scrape.Config{Own: a.writeMetrics, Targets: targets, Log: a.log}),
			Quit:    a.quit, Drain: a.announce,
			Log:              a.log,
			MetricsLocalOnly: a.config.MetricsLocalOnly,
			Profiling:        a.config.Profiling,
		}))
	}
	add("readiness", "--readiness-port", a.config.ReadinessPort, allAddresses, ready)
	return nil
}

// start serves until close.
func (a *Agent) start(s *server) {
	for _, ln := range s.listeners {
		a.serverLoops.Go(func() {
			if err := s.http.Serve(ln); !errors.Is(err, http.ErrServerClosed) {
				a.log.Error("not served any more", "server", s.name, "address", ln.Addr().String(), "error", err)
			}
		})
	}
}

func (a *Agent) writeMetrics(w io.Writer) error { return a.telling.metrics.Write(w, false) }

// gates are what readiness waits for.
func (a *Agent) gates() []healthz.Gate {
	return []healthz.Gate{
		{Name: "drain", Open: a.notDraining},
		{Name: "healthcheck", Open: a.notFailedByHand},
		{Name: "outbound", Open: a.outbound.Accepting},
		{Name: "inbound", Open: a.inbound.Accepting},
		{Name: "addresses", Open: a.addresses.Current},
	}
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

// adminHandler shows this agent in Envoy's words.
func (a *Agent) adminHandler() http.Handler {
	looking := a.telling.live.Handler(live.Sources{Table: a.telling.table, Gates: a.liveGates})
	return admin.NewHandler(admin.Config{
		Version:   a.config.Version,
		Started:   a.started,
		Address:   netip.AddrPortFrom(loopback[0], a.config.AdminPort),
		Node:      node(a.config.Pod),
		Options:   admin.Options{Concurrency: runtime.GOMAXPROCS(0), LogLevel: a.logLevel().String(), DrainTime: a.config.DrainTimeout},
		Listeners: a.listeners,
		Carrying: admin.Carrying{
			OwnPorts: a.ownPorts(), OwnAddresses: a.addresses.All, OpaquePorts: ranges(a.config.OpaquePorts),
			InboundSources: []netip.Addr{capture.InboundSource4, capture.InboundSource6}, TPROXYMark: a.tproxyMark(),
			ConnectTimeout: a.config.ConnectTimeout, IdleTimeout: a.config.IdleTimeout,
			RequestTimeout: a.config.RequestTimeout, RequestHeadTimeout: a.config.RequestHeadTimeout,
			UpstreamIdleTimeout: a.config.UpstreamIdleTimeout,
			MaxHeadBytes:        a.config.MaxHeadBytes, MaxHeadFields: a.config.MaxHeadFields,
		},
		Flows:       a.telling.table,
		Ready:       a.state,
		Unready:     func() []string { return healthz.Closed(a.gates()) },
		Metrics:     a.telling.metrics,
		LogLevel:    a.logLevel,
		SetLogLevel: a.config.LogLevel.Set,
		Drain:       a.drainListeners,
		Quit:        a.quit,
		Health:      func(ok bool) { a.failedByHand.Store(!ok) },
		ReopenLogs:  a.ReopenLogs,
		Page:        looking,
		Live:        looking,
		Log:         a.log,
	})
}

// serves are the paths of the ports that are not the admin's own, by the names of their servers.
var serves = map[string][]string{
	"readiness": {"/healthz/ready", "/healthz/live"},
	"status":    {"/healthz/ready", "/stats/prometheus", "/metrics", "/app-health/", "/app-lifecycle/"},
	"metrics":   {metrics.Path},
}

// listeners are what is bound, which is less without IPv6.
func (a *Agent) listeners() []admin.Listener {
	carrying := func(name string, s *listener.Server) admin.Listener {
		l := admin.Listener{Name: name}
		for _, ln := range s.Listeners {
			l.Addresses = append(l.Addresses, ln.Addr())
		}
		return l
	}
	list := []admin.Listener{carrying(admin.VirtualOutbound, a.outbound), carrying(admin.VirtualInbound, a.inbound)}
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

// state is what Envoy calls it.
func (a *Agent) state() (string, bool) {
	switch {
	case a.draining.Load(), a.failedByHand.Load():
		return "DRAINING", false
	case len(healthz.Closed(a.gates())) > 0:
		return "INITIALIZING", false
	}
	return "LIVE", true
}

// node names the agent as pilot-agent does. What is not known is left out.
func node(pod podinfo.Pod) admin.Node {
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
		ID:       "sidecar~" + pod.IP + "~" + known(pod.Name, pod.Namespace) + "~" + known(pod.Namespace, "svc.cluster.local"),
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

// parseAddress is invalid for what is no address.
func parseAddress(text string) netip.Addr {
	address, _ := netip.ParseAddr(text)
	return address
}
