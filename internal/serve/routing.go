package serve

import (
	"bytes"
	"cmp"
	"net/netip"
	"slices"

	"github.com/pillion-proxy/pillion/internal/balance"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/httpforward"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/route"
	"github.com/pillion-proxy/pillion/internal/secure"
	"github.com/pillion-proxy/pillion/internal/sniff"
	"github.com/pillion-proxy/pillion/internal/tracing"
	"github.com/pillion-proxy/pillion/internal/upstream"
)

// routing is the Router of an HTTP connection with a control plane, outbound or at a gateway. Each request follows the configuration in force
// when it arrives: listener, filter chain, virtual host, route, cluster, endpoint. A request that the configuration refuses
// is answered here. It belongs to the connection's goroutine.
type routing struct {
	role   *Role
	info   mesh.ConnInfo
	inside secure.Inside

	accepted *accepted // of a gateway; otherwise nil

	judged  *mesh.Snapshot // by the last request, and what follows from it; of a gateway, the last one with a filter chain
	manager *mesh.HTTPManager
	traced  *tracing.Policy // nil: not by the configuration

	names []string // of the client's certificate; see authz.Subject
	gate  *gate    // nil: the configuration has no policies for the requests

	client *httpforward.PeerFields // of a client inside TLS that is ended here; may be nil

	recorded *flow.Telemetry // nil: as of the connection

	plain, described *httpforward.PeerFields // without and with the exchange of metadata; described may be nil

	routes *mesh.Routes
	table  *route.Table
	fault  *mesh.Fault // of the HTTP filter; may be nil

	misdirected *mesh.Misdirected // may be nil

	refused *route.Reply // not nil: the reply to all requests
	retired bool         // of an outbound connection: see judge

	last lookup // the requests of a connection mostly have one cluster

	request route.Request   // reused, so that it is not allocated
	host    []byte          // the authority of a request as its route rewrites it
	asks    bool            // the request has fields of route.Consumed
	pick    balance.Request // as well
}

// lookup is a cluster of a snapshot by its name.
type lookup struct {
	snapshot *mesh.Snapshot
	name     string
	config   *mesh.Cluster    // nil: there is none
	hosts    *mesh.Assignment // of config
	state    *balance.Cluster // nil: there is none, or it is refused
}

// cluster looks a cluster up, unless the request before had the same one. The balancer may have gone on to another snapshot
// meanwhile, or back to one before.
func (r *routing) cluster(s *mesh.Snapshot, name string) *mesh.Cluster {
	if l := &r.last; l.snapshot != s || l.name != name || l.state != nil && !l.state.Follows(l.config, l.hosts) {
		*l = lookup{snapshot: s, name: name, config: s.Cluster(name)}
		if l.config != nil && !l.config.Refused {
			l.hosts, l.state = s.Hosts(l.config), r.role.balancer.Cluster(s, l.config)
		}
	}
	return r.last.config
}

func (c *Conn) newRouting(g *governed) *routing {
	r := &routing{role: c.role, info: c.info(), inside: inside(c.protocol), client: g.peers, names: g.names}
	if c.role.gateway {
		accepted := c.accepted()
		r.accepted, r.info = &accepted, accepted.info
	}
	r.request.Downstream, r.request.Local = c.Record.Downstream, c.Record.OriginalDestination
	r.pick.Original = c.Record.OriginalDestination
	if c.protocol == sniff.HTTP2 {
		r.pick.Kind = balance.HTTP2
	}
	if c.role.gateway { // inside TLS it may meet another filter chain
		r.judge(g.snapshot)
	} else {
		r.follow(g.snapshot, g.chain)
	}
	return r
}

// judge finds the routes of the connection in a snapshot. An outbound connection is retired if a new one would be carried as bytes,
// but not to its original destination as they are. Until it has ended, its requests follow the last routes, whose policies are looked
// up in s. Without routes they are refused: at the original destination no new connection may arrive like that.
func (r *routing) judge(s *mesh.Snapshot) {
	chain, refusal := r.role.meet(s, &r.info)
	r.retired = refusal == "" && !r.role.gateway && chain != nil && chain.HTTP == nil && !passes(s, chain)
	switch {
	case refusal != "":
		r.follow(s, nil)
		r.refused = route.Refused
	case r.retired:
		if r.judged = s; r.table == nil {
			r.refused = cmp.Or(r.refused, route.Refused)
		}
	default:
		r.follow(s, chain)
	}
}

// passes reports whether the connections of bytes of a chain go where they were going, as they are.
func passes(s *mesh.Snapshot, chain *mesh.FilterChain) bool {
	if chain.TCP == nil || len(chain.TCP.Clusters) != 1 {
		return false
	}
	c := s.Cluster(chain.TCP.Clusters[0].Name)
	if c == nil || c.Refused || c.Discovery != mesh.OriginalDestination {
		return false
	}
	t := c.TransportTo(&mesh.Endpoint{})
	return t == nil || t.TLS == nil && !t.Refused
}

// follow finds the routes of the filter chain that the connection meets in a snapshot. chain may be nil.
func (r *routing) follow(s *mesh.Snapshot, chain *mesh.FilterChain) {
	r.judged, r.manager, r.table, r.refused, r.described, r.traced, r.gate, r.recorded = s, nil, nil, nil, nil, nil, nil, nil
	r.recorded, r.last = r.role.recorded(s, chain), lookup{}
	switch {
	case r.role.gateway && chain != nil && chain.HTTP == nil:
		r.refused = refusedChain
	case chain == nil || chain.HTTP == nil:
		// The destination is no longer one of HTTP. The connection goes on as one without a listener.
	default:
		r.manager, r.plain, r.traced = chain.HTTP, withoutClient(chain.HTTP), r.role.tracing(chain.HTTP)
		if r.client != nil {
			r.plain = r.client
		}
		if r.role.peers != nil && r.manager.ExchangesMetadata() {
			r.described = r.role.exchanging(r.plain)
		}
		if r.admit(s, chain); r.refused != nil {
			return
		}
		if r.routes = s.Routes(chain.HTTP); r.routes == nil {
			r.refused = route.NoRoute
			return
		}
		r.table, r.fault, r.misdirected = route.Of(r.routes), s.Fault(chain.HTTP), chain.HTTP.MisdirectedFilter()
		if r.gate != nil && r.table.ChangesPolicies() {
			r.gate.chosen.table = r.table
		}
	}
}

// look judges the connection by the snapshot in force, if that is another one. It returns that.
func (r *routing) look() *mesh.Snapshot {
	s := r.role.mesh.Snapshot()
	switch {
	case s == r.judged:
	case r.role.gateway && r.accepted.bars(): // the manager stays, for the edge
		r.judged, r.refused = nil, refusedChain
	case !r.role.gateway || r.accepted.removed.IsZero():
		r.judge(s)
	}
	return s
}

// Route implements httpforward.Router.
func (r *routing) Route(q *httpforward.Request) httpforward.Decision {
	s := r.look()
	switch {
	case r.refused != nil:
		return httpforward.Decision{Reply: r.refused, Tracing: r.traced, Telemetry: r.recorded, DryRun: r.explain()}
	case r.role.gateway && q.Previous == nil && q.Check == nil && r.accepted.late():
		return httpforward.Decision{Reply: refusedChain, Tracing: r.traced, Telemetry: r.recorded}
	case !q.Entered && edgeOf(r.manager) != nil: // it arrived under a configuration that has left its client's fields
		return httpforward.Decision{Reply: route.Refused, Tracing: r.traced, Telemetry: r.recorded}
	case r.table == nil:
		return httpforward.Decision{Target: upstream.Target{Address: r.info.Destination, Balanced: true}}
	case q.Previous != nil:
		return r.again(s, q)
	case r.gate != nil:
		return r.pass(s, q)
	}
	r.view(q)
	choice := r.table.Find(&r.request)
	return r.forward(s, &choice)
}

// forward decides about the request that view has set, by its route.
func (r *routing) forward(s *mesh.Snapshot, choice *route.Choice) httpforward.Decision {
	if m := r.misdirected; m != nil && m.Match(secure.HostOf(r.request.Authority)) {
		return httpforward.Decision{Reply: route.Misdirected, Tracing: r.traced, Telemetry: r.recorded}
	}
	choice.Fault = r.fault
	if choice.Cluster == nil {
		return httpforward.Decision{Reply: choice.Reply, Route: name(choice), Tracing: r.traced, Telemetry: r.recorded}
	}
	config := r.cluster(s, choice.Cluster.Name)
	outcome := choice.Outcome(&r.request, config != nil && hashes(config))
	d := httpforward.Decision{Cluster: choice.Cluster.Name, Route: name(choice), Reply: outcome.Reply, Plan: outcome.Plan, Delay: outcome.Delay, ResponseRate: outcome.ResponseRate, Tracing: r.traced, Telemetry: r.recorded}
	if r.asks {
		d.Edits = route.Consumed
	}
	switch {
	case d.Reply != nil:
		return d
	case config == nil:
		d.Reply = choice.Cluster.NotFound
		return d
	}
	r.pick.Hash, r.pick.Hashed = 0, false
	if hashes(config) {
		r.pick.Hash, r.pick.Hashed = choice.Cluster.Hash(&r.request)
	}
	d.Hash, d.Hashed = r.pick.Hash, r.pick.Hashed
	r.pick.Avoid, r.pick.Tried = nil, nil
	r.send(s, config, &d)
	if d.Reply == nil && d.Plan != nil && len(d.Plan.Mirrors) > 0 {
		r.mirror(s, &d)
	}
	return d
}

func name(c *route.Choice) string {
	if c.Route == nil {
		return ""
	}
	return c.Route.Name
}

// hashes reports whether a cluster's endpoints are chosen by hash.
func hashes(c *mesh.Cluster) bool {
	return c.Balancing.Policy == mesh.RingHash || c.Balancing.Policy == mesh.Maglev
}

// again decides about a retry: its cluster stays, and its endpoint is chosen again.
func (r *routing) again(s *mesh.Snapshot, q *httpforward.Request) httpforward.Decision {
	r.view(q) // the bytes of the first attempt are gone, and the authority may decide which server is accepted
	before := q.Previous
	d := httpforward.Decision{
		Cluster: before.Cluster, Route: before.Route, Plan: before.Plan, Telemetry: before.Telemetry, DryRun: before.DryRun,
		Hash: before.Hash, Hashed: before.Hashed, Tried: withTried(before),
	}
	config := r.cluster(s, d.Cluster)
	if config == nil {
		d.Reply = noHealthyHost.reply
		return d
	}
	r.pick.Hash, r.pick.Hashed = d.Hash, d.Hashed // other requests may have been decided about meanwhile
	r.pick.Avoid, r.pick.Tried, r.pick.Priorities = nil, d.Tried, 0
	if p := d.Plan; p != nil && p.Retry != nil {
		r.pick.Priorities = p.Retry.OtherPriorities
		if p.Retry.OtherHosts {
			r.pick.Avoid, r.pick.Repicks = d.Tried, p.Retry.HostChoices
		}
	}
	r.send(s, config, &d)
	return d
}

// maxTried bounds the endpoints that a retry avoids. A request may ask for any number of retries.
const maxTried = 100

// withTried returns the endpoints of the last attempts, the one of a decision included. Decisions share no memory.
func withTried(d *httpforward.Decision) []netip.AddrPort {
	return append(slices.Clip(d.Tried[max(0, len(d.Tried)-maxTried+1):]), d.Target.Address)
}

// send sets the endpoint of a decision, or the reply if there is none.
func (r *routing) send(s *mesh.Snapshot, config *mesh.Cluster, d *httpforward.Decision) {
	d.AsDownstream = config.HTTP.Protocol == mesh.UpstreamAsDownstream
	d.HTTP2 = config.HTTP.Protocol == mesh.UpstreamHTTP2
	in := r.upstreamProtocol(config)
	d.Translate = in != r.inside
	if r.pick.Kind = balance.HTTP1; in == secure.HTTP2 {
		r.pick.Kind = balance.HTTP2
	}
	lease, failed := r.role.endpoint(s, config, r.last.state, &r.pick, in, r.authority(d.Plan), &d.Target)
	if failed != nil {
		d.Target, d.Reply = upstream.Target{}, failed.reply
		return
	}
	d.Lease = lease
	if d.Peers = r.plain; r.exchanges(config) {
		d.Peers = r.described
	}
}

// authority returns the authority of the request that view has set as it is sent. p may be nil.
func (r *routing) authority(p *route.Plan) []byte {
	if p == nil || !p.RewritesHost {
		return r.request.Authority
	}
	r.host = p.AppendHost(r.host[:0], r.request.Authority)
	return r.host
}

// upstreamProtocol returns the protocol in which a request goes to the endpoints of a cluster. gRPC needs HTTP/2: a call keeps
// that, also where the cluster asks for HTTP/1, as the name of a port does that does not begin with grpc.
func (r *routing) upstreamProtocol(config *mesh.Cluster) secure.Inside {
	switch {
	case config.HTTP.Protocol == mesh.UpstreamAsDownstream, r.request.GRPC && r.inside == secure.HTTP2:
		return r.inside
	case config.HTTP.Protocol == mesh.UpstreamHTTP2:
		return secure.HTTP2
	}
	return secure.HTTP1
}

// exchanges reports whether metadata is exchanged with the hosts of a cluster. Those outside of the mesh do not receive it.
func (r *routing) exchanges(with *mesh.Cluster) bool {
	return r.described != nil && !with.External && with.Discovery != mesh.OriginalDestination
}

// OnlyHTTP implements httpforward.OnlyHTTP.
func (r *routing) OnlyHTTP() bool { return true }

// view sets the request that routes see.
func (r *routing) view(q *httpforward.Request) {
	to := &r.request
	to.Method, to.Path, to.Authority, to.Scheme, to.Fields = q.Method, q.Path, q.Authority, q.Scheme, q.Fields
	to.Downstream = q.Client
	to.GRPC, r.asks = inspect(q.Fields)
}

var applicationGRPC = []byte("application/grpc")

// inspect reports whether a request is one of gRPC by its content-type, and whether it asks for retries or timeouts of its own.
func inspect(fields route.Fields) (grpc, asks bool) {
	const contentType = "content-type"
	known := false
	for i := range fields.Len() {
		name, value := fields.At(i)
		if len(name) == len(contentType) && !known && bytes.EqualFold(name, []byte(contentType)) {
			rest, found := bytes.CutPrefix(value, applicationGRPC)
			grpc, known = found && (len(rest) == 0 || rest[0] == '+' || rest[0] == ';'), true
		}
		asks = asks || route.IsConsumed(name)
	}
	return grpc, asks
}

// mirror adds the endpoints that copies of the request are sent to.
func (r *routing) mirror(s *mesh.Snapshot, d *httpforward.Decision) {
	authority := r.authority(d.Plan)
	for i := range d.Plan.Mirrors {
		m := &d.Plan.Mirrors[i]
		config := s.Cluster(m.Cluster)
		if config == nil || len(d.Mirrors) == httpforward.MaxMirrors || !r.request.Drawn(m) {
			continue
		}
		if !r.role.balancer.Cluster(s, config).Known() {
			continue // a request does not wait for the addresses of hosts that get a copy of it
		}
		in := r.upstreamProtocol(config)
		copied := httpforward.Mirror{Policy: m, HTTP2: in == secure.HTTP2}
		request := balance.Request{Original: r.info.Destination}
		lease, failed := r.role.endpoint(s, config, nil, &request, in, route.MirrorHost(m, authority), &copied.Target)
		if failed == nil {
			copied.Lease = lease
			d.Mirrors = append(d.Mirrors, copied)
		}
	}
}
