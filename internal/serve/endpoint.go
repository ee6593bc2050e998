package serve

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"strings"
	"time"

	"github.com/pillion-proxy/pillion/internal/balance"
	"github.com/pillion-proxy/pillion/internal/envoy"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/relay"
	"github.com/pillion-proxy/pillion/internal/route"
	"github.com/pillion-proxy/pillion/internal/secure"
	"github.com/pillion-proxy/pillion/internal/upstream"
)

// namesWait is how long the first request to a cluster waits for the addresses of its hosts. It is the only wait of a
// Router.
const namesWait = 5 * time.Second

// failure is why there is no endpoint.
type failure struct {
	reason flow.Reason
	err    error
	reply  *route.Reply // of HTTP
}

var (
	noHealthyHost = &failure{flow.NoHealthyUpstream, errors.New("the cluster has no healthy endpoint"), &route.Reply{
		Status: 503, Body: "no healthy upstream",
		Flags: envoy.FlagNoHealthyUpstream, Details: envoy.DetailsNoHealthyUpstream, Reason: flow.NoHealthyUpstream, Edited: true,
	}}
	overflow = &failure{flow.UpstreamOverflow, errors.New("a limit of the cluster is reached"), &route.Reply{
		Status: 503, Body: "upstream connect error or disconnect/reset before headers. reset reason: " + envoy.ResetByOverflow,
		Fields: []route.Field{{Name: "x-envoy-overloaded", Value: "true"}},
		Flags:  envoy.FlagUpstreamOverflow, Details: envoy.ResetBeforeResponse(envoy.ResetByOverflow), Reason: flow.UpstreamOverflow, Edited: true,
	}}
	refusedCluster   = &failure{flow.MeshRefused, errors.New("the cluster is refused"), route.Refused}
	refusedTransport = &failure{flow.MeshRefused, errors.New("the cluster's transport to the endpoint is not supported"), route.Refused}
)

// endpoint chooses an endpoint of a cluster and sets it in the target. state is the balancer's; nil: it is not known yet.
// authority is that of a request of HTTP; nil: it is not known, and an endpoint whose TLS needs it is not reached. The caller
// ends the lease.
func (r *Role) endpoint(s *mesh.Snapshot, config *mesh.Cluster, state *balance.Cluster, request *balance.Request, inside secure.Inside, authority []byte, to *upstream.Target) (balance.Lease, *failure) {
	if config.Refused {
		return nil, refusedCluster
	}
	if state == nil {
		state = r.balancer.Cluster(s, config)
	}
	choice, failed := r.pick(state, request)
	switch failed {
	case balance.None:
	case balance.Overflow:
		return nil, overflow
	default:
		return nil, noHealthyHost
	}
	t := choice.Transport
	if t != nil && t.Refused {
		choice.Lease.End(balance.Outcome{GRPC: -1})
		return nil, refusedTransport
	}
	var tls *mesh.UpstreamTLS
	if t != nil {
		tls = t.TLS
	}
	if tls == nil && choice.Endpoint == nil { // as without a control plane: it may be the address of a Service
		*to = upstream.Target{Address: choice.Address, Balanced: true}
	} else {
		host := ""
		if tls != nil && secure.NeedsHost(tls, inside) {
			host = secure.HostOf(authority)
		}
		*to = upstream.Target{Address: choice.Address, Group: choice.Group, Security: r.security(tls, inside, s, r.plain(config), host)}
	}
	return choice.Lease, nil
}

// plain returns how connections to the hosts of a cluster are made and kept, without TLS. Equal options are the same value, so
// that connections are kept when a push changes other parts of a cluster.
func (r *Role) plain(c *mesh.Cluster) *upstream.Security {
	if known, ok := c.Compiled.Load().(*upstream.Security); ok {
		return known
	}
	o := upstream.Options{ConnectTimeout: c.ConnectTimeout, IdleLife: c.HTTP.IdleTimeout, Life: c.HTTP.MaxLifetime, Requests: c.HTTP.MaxRequests, Streams: c.HTTP.MaxStreams}
	if k := c.Keepalive; k != nil {
		o.KeepAliveProbes, o.KeepAliveIdle, o.KeepAliveGap = k.Probes, k.Time, k.Interval
	}
	r.securing.Lock()
	defer r.securing.Unlock()
	if len(r.plains) >= maxSecurities {
		clear(r.plains)
	}
	known := r.plains[o]
	if known == nil {
		known = &upstream.Security{Options: o}
		r.plains[o] = known
	}
	c.Compiled.Store(known)
	return known
}

// pick chooses a host, and waits for the addresses of hosts that are looked up for the first time.
func (r *Role) pick(c *balance.Cluster, request *balance.Request) (balance.Choice, balance.Failure) {
	choice, failed := c.Pick(request)
	if failed != balance.Resolving {
		return choice, failed
	}
	timeout := time.NewTimer(namesWait)
	defer timeout.Stop()
	select {
	case <-c.Resolved():
	case <-timeout.C:
	}
	return c.Pick(request)
}

// Choose sets the target of an outbound connection by the filter chain that Admit has found. A connection of bytes gets an
// endpoint of one of the chain's clusters. The requests of HTTP are routed one by one. Without a control plane, and for destinations without a listener, it does nothing.
func (c *Conn) Choose(to *upstream.Target) bool {
	g := c.governed
	if g == nil || g.chain == nil {
		return true
	}
	var failed *failure
	switch {
	case g.chain.HTTP == nil:
		failed = c.chooseCluster(g, to)
	case !c.HTTP():
		return c.abandon(flow.IdleTimeout, nil) // it has sent nothing, and only requests have an upstream
	default:
		g.routing = c.newRouting(g)
	}
	if failed != nil {
		return c.abandon(failed.reason, fmt.Errorf("cluster %s: %w", c.Record.Cluster, failed.err))
	}
	return true
}

var noSuchCluster = &failure{flow.MeshRefused, errors.New("not configured"), nil}

// chooseCluster chooses a cluster and an endpoint of it for a connection of bytes.
func (c *Conn) chooseCluster(g *governed, to *upstream.Target) *failure {
	name := c.clusterName(g.chain)
	c.Record.Cluster = name
	config := g.snapshot.Cluster(name)
	if config == nil {
		return noSuchCluster // it may have required TLS
	}
	request := balance.Request{Kind: balance.TCP, Original: c.Record.OriginalDestination}
	if g.chain.TCP.HashSource {
		request.Hash, request.Hashed = balance.HashAddress(c.Record.Downstream.Addr()), true
	}
	in := inside(c.protocol)
	if in == secure.TCP && c.role.peers != nil && config.HasMetadataPeer {
		in = secure.MetadataTCP
	}
	lease, failed := c.role.endpoint(g.snapshot, config, nil, &request, in, nil, to)
	if g.lease = lease; lease != nil {
		g.chosen = config
	}
	return failed
}

// serviceName begins the server names that stand for a cluster of a service (outbound_.PORT_.SUBSET_.HOST). A client could reach
// PassthroughCluster, or what else only the configuration may choose, by a chain that takes all server names (CVE-2021-31921).
const serviceName = "outbound_."

// clusterName returns the name of the cluster of a connection of bytes: one of the chain's clusters, drawn by weight, or the
// one that is named as the server name that the client asks for; empty: that names no service.
func (c *Conn) clusterName(chain *mesh.FilterChain) string {
	if chain.ClusterIsSNI {
		if !strings.HasPrefix(c.sniffer.Hello.ServerName, serviceName) {
			return ""
		}
		return c.sniffer.Hello.ServerName
	}
	clusters := chain.TCP.Clusters
	if len(clusters) == 1 {
		return clusters[0].Name
	}
	var sum uint64
	chosen := ""
	for i := range clusters {
		weight := uint64(clusters[i].Weight)
		if sum += weight; weight > 0 && rand.Uint64N(sum) < weight {
			chosen = clusters[i].Name
		}
	}
	return chosen
}

// limits sets the limits of a connection of bytes that the control plane configures.
func (c *Conn) limits(o *relay.Options) {
	if c.role.direction == flow.Inbound || c.governed == nil || c.governed.chain == nil || c.governed.chain.TCP == nil {
		return
	}
	proxy := c.governed.chain.TCP
	if o.IdleTimeout = proxy.IdleTimeout; proxy.MaxDuration > 0 {
		o.Until = c.Record.Opened.Add(proxy.MaxDuration)
	}
}

// endLease ends the place of a connection of bytes at its endpoint.
func (c *Conn) endLease() {
	if lease := c.governed.lease; lease != nil {
		c.governed.lease = nil
		lease.End(balance.Outcome{GRPC: -1, Reason: c.Record.Reason, Connected: c.Record.UpstreamLocal.IsValid(), Duration: c.Record.Duration})
	}
}

// Confirm judges an outbound connection again by what a client sent that was silent before. If it meets another filter
// chain now, the upstream connection that was made meanwhile is given up, unless its server has sent something; the caller
// dials then.
func (c *Conn) Confirm(to *upstream.Target) bool {
	g := c.governed
	if g == nil || g.judged == c.protocol {
		return true
	}
	before := g.chain
	if !c.Admit() {
		return false
	}
	if !c.Authorize() {
		return false
	}
	if g.chain == before && (!c.HTTP() || !to.Secured()) {
		return true
	}
	if c.role.gateway {
		return c.abandon(flow.MeshRefused, errLate) // the other filter chain may end TLS
	}
	if up := c.sniffer.Up; up != nil {
		if c.sniffer.UpRead != nil && !c.HTTP() {
			return c.abandon(flow.MeshRefused, errLate)
		}
		c.giveUp(to)
	}
	return c.Choose(to)
}

var errLate = errors.New("its first bytes came late, and the server that was dialled meanwhile is not the one that they are for")

// giveUp closes an upstream connection on which nothing was sent.
func (c *Conn) giveUp(to *upstream.Target) {
	c.endLease()
	c.governed.chosen = nil
	c.sniffer.Up.Close()
	c.sniffer.Up = nil
	if c.sniffer.UpRead != nil {
		c.sniffer.UpRead.Release()
		c.sniffer.UpRead = nil
	}
	*to = upstream.Target{Address: c.Record.OriginalDestination, Balanced: true}
	c.Record.Upstream, c.Record.UpstreamLocal, c.Record.Security = netip.AddrPort{}, netip.AddrPort{}, nil
}
