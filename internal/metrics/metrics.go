// Package metrics counts flows and exposes the counts to Prometheus.
//
// Metrics is a flow.Opener: all its numbers about traffic come from records. They are Istio's standard metrics, with the
// same names and labels, so that Istio's dashboards and Kiali can read them; those of Envoy's metrics that apply to the
// agent; and pillion's own. The counters are atomics of this package, because a request must cost little and Istio has many
// labels. The metrics of the runtime and the process have the names and values of client_golang's collectors. That library
// is not linked, because it brings protobuf's reflection, and both together are 2.2 MB of the binary. Tests compare the results with it.
//
// The number of series is bounded for any input: see DefaultMaxSeries.
//
// Differences from Istio: bytes of requests and responses count bodies only, and durations have fractions of a millisecond.
// Peers are known from their certificates and from what their proxies say of them (package peers); without a control plane
// they are unknown.
package metrics

import (
	"bytes"
	"strings"
	"sync"
	"time"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/podinfo"
)

// Metrics counts flows. It is safe for concurrent use.
type Metrics struct {
	version    string
	started    time.Time
	directions [2]direction

	table   *flow.Table
	sources Sources

	mu    sync.Mutex
	plans map[string]*plan // of control planes, by what they are made of; guarded by mu
}

// Options configure Metrics.
type Options struct {
	Version       string // of the agent, shown by istio_build
	ClusterDomain string // DNS domain of the cluster; empty: cluster.local
	MaxSeries     int    // bounds the series of a scrape, from MinMaxSeries to MaxMaxSeries; zero: DefaultMaxSeries

	// Service returns the service of a control plane's cluster, such as "outbound|80||web.shop.svc.cluster.local": its host,
	// name and namespace. The host is empty if the service is not known. nil: there is no control plane.
	Service func(cluster string) (host, name, namespace string)
}

// New returns the metrics of this workload.
func New(pod podinfo.Pod, o Options) *Metrics {
	if o.ClusterDomain == "" {
		o.ClusterDomain = podinfo.DefaultClusterDomain
	}
	if o.MaxSeries == 0 {
		o.MaxSeries = DefaultMaxSeries
	}
	m := &Metrics{version: o.Version, started: time.Now()}
	for i := range m.directions {
		m.directions[i].init(flow.Direction(i), &pod, o)
	}
	return m
}

// Watch sets the flow table and the sources of numbers that are not in records. Optional; call it before the first scrape.
func (m *Metrics) Watch(table *flow.Table, sources Sources) { m.table, m.sources = table, sources }

// place is where a connection keeps its *carried or *lastRequest.
var place = flow.NewPlace()

// Protocols of a connection, as values of the label.
const (
	opaque = iota
	tls
	http1
	http2
	undecided
)

var protocols = [...]string{"opaque", "tls", "http1", "http2", "undecided"}

func protocolOf(r *flow.Record) int {
	switch r.Protocol {
	case flow.TLS:
		return tls
	case flow.HTTP10, flow.HTTP11:
		return http1
	case flow.HTTP2:
		return http2
	}
	return opaque
}

// carried is the state of an open opaque connection. Its owner uses it before the connection is carried and after the table
// removed it, and Table.Each in between; the lock of the table orders these.
type carried struct {
	*tcpSet                      // nil: not counted yet, because the peer may still describe itself
	receivedCounted, sentCounted uint64
}

// count adds the bytes moved since the last call.
func (c *carried) count(d *direction, r *flow.Record) {
	if c.tcpSet == nil {
		c.open(d, r)
	}
	received, sent := r.Received.Load(), r.Sent.Load()
	c.received.Add(received - c.receivedCounted)
	c.sent.Add(sent - c.sentCounted)
	c.receivedCounted, c.sentCounted = received, sent
}

// open counts a connection as opened. Its bytes are counted in the same set.
func (c *carried) open(d *direction, r *flow.Record) {
	c.tcpSet = d.tcpSet(d.end(flow.Closed).tcp, r)
	c.opened.Add(1)
}

// Opened counts a connection when the agent begins to carry it.
func (m *Metrics) Opened(r *flow.Record) {
	d := &m.directions[r.Direction]
	protocol := protocolOf(r)
	d.connections[protocol].Add(1)
	if protocol == http1 || protocol == http2 {
		place.Set(r, new(lastRequest))
		return
	}
	if unmeasured(r) {
		return
	}
	c := new(carried)
	if s := r.Security; s == nil || !s.Exchanges || r.Workload.Get() != nil {
		c.open(d, r)
	} // otherwise with the next scrape, or at its end
	place.Set(r, c)
}

// Progress brings the byte counters of open connections up to date. Each scrape does so as well.
func (m *Metrics) Progress(table *flow.Table) {
	table.Each(func(r *flow.Record) bool {
		m.progress(r)
		return true
	})
}

func (m *Metrics) progress(r *flow.Record) {
	if !r.Carried() {
		return
	}
	if c, ok := place.Get(r).(*carried); ok {
		c.count(&m.directions[r.Direction], r)
	}
}

// Closed counts an ended request or connection.
func (m *Metrics) Closed(r *flow.Record) {
	d := &m.directions[r.Direction]
	if r.HTTP.DryRun != nil {
		d.dryRun(r)
	}
	if r.IsRequest() {
		d.request(r)
	} else {
		d.connection(r)
	}
}

// connection counts as Istio does. A connection whose destination refuses or cannot be reached counts as opened and closed,
// with its flags. A connection that no filter chain of Istio would accept is not counted. The bytes of a carried connection
// have no flags, because they are counted while it is open.
func (d *direction) connection(r *flow.Record) {
	end := d.end(r.Reason)
	end.flows.Add(1)
	if r.Reason.ByPolicy() && r.Reason != flow.Loop || unmeasured(r) {
		return
	}
	set := d.tcpSet(end.tcp, r)
	c, ok := place.Get(r).(*carried)
	if !ok {
		set.opened.Add(1)
		c = &carried{tcpSet: set}
	}
	c.count(d, r)
	set.closed.Add(1)
}

// lastRequest caches the counters of a connection's last request, since most requests resemble the one before. Only the
// goroutine that owns the connection uses it.
type lastRequest struct {
	host     []byte // as the client sent it, after the cluster if that is one of a service
	flags    string
	status   int32
	grpc     bool
	security *flow.Security // that of the record: requests of a connection share it
	workload *flow.Workload // likewise, as long as the peer describes itself in the same words
	set      *requestSet    // nil: no request yet, or its labels were folded into those of others
	end      *end
}

func (l *lastRequest) like(r *flow.Record) bool {
	h, p := r.HTTP, planOf(r)
	return l.set != nil && p == l.set.plan && (p == nil || len(p.programs) == 0) && h.Status == int(l.status) && h.GRPC == l.grpc && r.Reason == l.end.reason && h.Flags == l.flags &&
		l.names(r) && string(h.GRPCStatus) == grpcStatuses[l.set.grpcStatus] && l.security == r.Security && l.workload == r.Workload.Get()
}

// names reports whether a request has the host and the cluster of l.
func (l *lastRequest) names(r *flow.Record) bool {
	cluster := serviceCluster(r)
	return len(l.host) == len(cluster)+len(r.HTTP.Authority) && string(l.host[:len(cluster)]) == cluster && bytes.Equal(l.host[len(cluster):], r.HTTP.Authority)
}

// serviceCluster returns the cluster of a request if it belongs to a service.
func serviceCluster(r *flow.Record) string {
	if strings.HasPrefix(r.Cluster, meshCluster) {
		return r.Cluster
	}
	return ""
}

func (d *direction) request(r *flow.Record) {
	d.class(r)
	if unmeasured(r) {
		d.end(r.Reason).flows.Add(1)
		return
	}
	last, ok := place.Get(r.Connection).(*lastRequest)
	if !ok { // the connection was never carried
		last = new(lastRequest)
		place.Set(r.Connection, last)
	}
	set, end := last.set, last.end
	if !last.like(r) {
		var named bool
		set, named = d.requestSet(r)
		end = d.end(r.Reason)
		*last = lastRequest{
			host: last.host[:0], flags: r.HTTP.Flags,
			status: int32(r.HTTP.Status), grpc: r.HTTP.GRPC, security: r.Security, workload: r.Workload.Get(), end: end,
		}
		if named {
			last.set = set
			last.host = append(append(last.host, serviceCluster(r)...), r.HTTP.Authority...)
		}
	}
	end.flows.Add(1)
	set.duration.observe(uint64(max(r.Duration, 0)), &durationLimits)
	if t := r.HTTP.Trace; t != nil && t.Sampled {
		set.exemplify(r)
	}
	set.received.observe(r.Received.Load(), &byteLimits)
	set.sent.observe(r.Sent.Load(), &byteLimits)
	if r.HTTP.GRPC {
		set.service.count(r.HTTP, set.plan)
	}
}

// count counts the messages of a gRPC call.
func (s *service) count(h *flow.Request, p *plan) {
	if !p.drops("request_messages_total") {
		s.requestMessages.Add(h.Messages)
	}
	if !p.drops("response_messages_total") {
		s.responseMessages.Add(h.ResponseMessages)
	}
	if !p.drops("request_messages_total") || !p.drops("response_messages_total") {
		s.grpc.Store(true)
	}
}

// class counts a request by the class of its status.
func (d *direction) class(r *flow.Record) {
	class := statusClass(r.HTTP.Status)
	d.downstream[class].Add(1)
	if r.UpstreamLocal.IsValid() {
		d.upstream[class].Add(1)
	}
}

// statusClass returns the first digit of a status, or 0 if it is not a status.
func statusClass(status int) int {
	if status < 100 || status > 599 {
		return 0
	}
	return status / 100
}
