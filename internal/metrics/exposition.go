package metrics

import (
	"cmp"
	"compress/gzip"
	"fmt"
	"io"
	"net/http"
	"runtime"
	"runtime/metrics"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/pillion-proxy/pillion/internal/dns"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/promtext"
)

// Path is Envoy's path for Prometheus metrics.
const Path = "/stats/prometheus"

// maxScrapes is the number of concurrent scrapes. Further ones are answered 503.
const maxScrapes = 4

// Sources are numbers that other packages keep. They are read at each scrape, on its goroutine; nil sources are omitted.
type Sources struct {
	Upstream  func(flow.Direction) Upstream
	AccessLog func() (written, dropped uint64)           // lines
	Spans     func() (exported, dropped, failed uint64)  // of traces
	Backoffs  func() uint64                              // times that accept loops paused for lack of descriptors
	Pipes     func() int                                 // pipes that relays hold, in use or for the next connection
	Held      func() (used, limit int, evictions uint64) // memory budget for heads and held bodies
	Gates     func() []Gate                              // readiness gates
	Draining  func() bool
	DNS       *dns.Stats // nil: no resolver

	ControlPlane func() ControlPlane // nil: the agent decides alone
}

// Upstream holds the counters of a direction's upstream connections.
type Upstream struct {
	Active            int    // open connections, in use or in the pool
	Connected, Failed uint64 // attempts to connect
	Redialled         uint64 // those that repeated a failed attempt
	Reused, Missed    uint64 // requests that found a connection in the pool, and that did not
	Retried           uint64 // requests that were sent again

	Copied, CopiesDropped uint64 // copies of requests for mirrors: sent, and left out
}

// Gate is one condition of readiness.
type Gate struct {
	Name string
	Open bool
}

// Handler serves GET and HEAD of Path, as text or OpenMetrics, compressed if that is wanted. Other paths are 404 and other
// methods 405. Few answers are written at a time, so the server must bound how long a reader may take for one.
func (m *Metrics) Handler() http.Handler {
	mux := http.NewServeMux()
	slots := make(chan struct{}, maxScrapes)
	mux.HandleFunc("GET "+Path, func(w http.ResponseWriter, r *http.Request) {
		select {
		case slots <- struct{}{}:
			defer func() { <-slots }()
			m.serve(w, r)
		default:
			http.Error(w, "too many concurrent scrapes", http.StatusServiceUnavailable)
		}
	})
	return mux
}

func (m *Metrics) serve(w http.ResponseWriter, r *http.Request) {
	format := promtext.Negotiate(strings.Join(r.Header.Values("Accept"), ","))
	w.Header().Set("Content-Type", format.ContentType())
	w.Header().Set("Vary", "Accept, Accept-Encoding")
	out := io.Writer(w)
	if promtext.AcceptsGzip(r.Header.Values("Accept-Encoding")) {
		w.Header().Set("Content-Encoding", "gzip")
		if r.Method == http.MethodHead {
			return
		}
		zip := gzip.NewWriter(w)
		defer zip.Close()
		out = zip
	}
	_ = m.Write(out, format == promtext.OpenMetrics) // an error means that the scraper has left or reads too slowly
}

// Write writes everything, in the text format or in OpenMetrics with its end mark.
func (m *Metrics) Write(w io.Writer, openMetrics bool) error {
	format := promtext.Text
	if openMetrics {
		format = promtext.OpenMetrics
	}
	err := promtext.WriteMetrics(w, format, m.Gather())
	if err == nil {
		_, err = io.WriteString(w, format.End())
	}
	if err != nil {
		return fmt.Errorf("writing metrics: %w", err)
	}
	return nil
}

// Gather returns all families, sorted by name. A number that the kernel does not supply is omitted.
func (m *Metrics) Gather() []promtext.MetricFamily {
	var f families
	open := m.lookAtOpen()
	m.istio(&f)
	m.envoy(&f, open)
	m.own(&f, open)
	m.fromSources(&f)
	f.goRuntime()
	f.process()
	f = slices.DeleteFunc(f, func(family *family) bool { return len(family.Metrics) == 0 })
	slices.SortFunc(f, func(a, b *family) int { return cmp.Compare(a.Name, b.Name) })
	all := make([]promtext.MetricFamily, len(f))
	for i, family := range f {
		all[i] = promtext.MetricFamily(*family)
	}
	return all
}

// lookAtOpen counts open connections, and brings their byte counters up to date.
func (m *Metrics) lookAtOpen() (open [2][len(protocols)]int) {
	if m.table == nil {
		return open
	}
	m.table.Each(func(r *flow.Record) bool {
		protocol := undecided
		if r.Carried() {
			protocol = protocolOf(r)
		}
		open[r.Direction][protocol]++
		m.progress(r)
		return true
	})
	return open
}

// families are those gathered so far.
type families []*family

func (f *families) counter(name, help string) *family { return f.add(name, help, promtext.Counter) }
func (f *families) gauge(name, help string) *family   { return f.add(name, help, promtext.Gauge) }
func (f *families) histogram(name, help string) *family {
	return f.add(name, help, promtext.Histogram)
}

//go:noinline // in a hundred places
func (f *families) add(name, help string, kind promtext.Type) *family {
	family := &family{Name: name, Help: help, Type: kind}
	*f = append(*f, family)
	return family
}

// family has one metric for each set of labels.
type family promtext.MetricFamily

// counts adds the value of a counter.
func (f *family) counts(n uint64, labels ...promtext.Label) { f.is(float64(n), labels...) }

// is adds a value.
//
//go:noinline // in a hundred places
func (f *family) is(value float64, labels ...promtext.Label) {
	f.Metrics = append(f.Metrics, promtext.Metric{Labels: labels, Value: value})
}

// observed adds a histogram.
func (f *family) observed(h promtext.Metric, labels []promtext.Label) {
	h.Labels = labels
	f.Metrics = append(f.Metrics, h)
}

func (m *Metrics) istio(f *families) {
	before := len(*f)
	defer func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		if len(m.plans) > 0 {
			for _, family := range (*f)[before:] {
				family.merge()
			}
		}
	}()
	f.gauge("istio_build", "Version of the proxy.").is(1, label("component", "proxy"), label("tag", m.version))
	total := f.counter("istio_requests_total", "Ended requests.")
	duration := f.histogram("istio_request_duration_milliseconds", "Duration of requests, until the last byte of the response.")
	received := f.histogram("istio_request_bytes", "Sizes of request bodies.")
	sent := f.histogram("istio_response_bytes", "Sizes of response bodies.")
	requestMessages := f.counter("istio_request_messages_total", "gRPC messages in requests.")
	responseMessages := f.counter("istio_response_messages_total", "gRPC messages in responses.")
	opened := f.counter("istio_tcp_connections_opened_total", "Opaque connections opened.")
	closed := f.counter("istio_tcp_connections_closed_total", "Opaque connections closed.")
	sentBytes := f.counter("istio_tcp_sent_bytes_total", "Bytes to downstream on opaque connections.")
	receivedBytes := f.counter("istio_tcp_received_bytes_total", "Bytes from downstream on opaque connections.")
	for i := range m.directions {
		d := &m.directions[i]
		sets, services := d.requests()
		for _, s := range sets {
			h := s.duration.expose(float64(time.Millisecond))
			requests := promtext.Metric{Value: float64(h.Count)}
			s.exemplar.Load().mark(&h)
			for i, metric := range []promtext.Metric{requests, h, s.received.expose(1), s.sent.expose(1)} {
				[...]*family{total, duration, received, sent}[i].planned(metric, s.plan, requestMetrics[i], s.labels, s.values)
			}
		}
		for _, s := range services {
			if s.grpc.Load() {
				requestMessages.counts(s.requestMessages.Load(), s.labels...)
				responseMessages.counts(s.responseMessages.Load(), s.labels...)
			}
		}
		for _, s := range d.tcpSets() {
			if s.opened.Load()+s.closed.Load() > 0 {
				for i, n := range []uint64{s.opened.Load(), s.closed.Load(), s.sent.Load(), s.received.Load()} {
					[...]*family{opened, closed, sentBytes, receivedBytes}[i].
						planned(promtext.Metric{Value: float64(n)}, s.plan, connectionMetrics[i], s.labels, "")
				}
			}
		}
	}
}

// planned adds a metric with the labels of a plan, unless that drops it.
func (f *family) planned(m promtext.Metric, p *plan, name string, labels []promtext.Label, values string) {
	if !p.drops(name) {
		f.observed(m, p.labels(name, labels, values))
	}
}

// requests returns the sets of requests, and the services that they went to, in the order in which they were first seen.
func (d *direction) requests() (sets []*requestSet, services []*service) {
	d.mu.RLock()
	sets = d.inTurn[:len(d.inTurn):len(d.inTurn)]
	d.mu.RUnlock()
	seen := make(map[*service]bool)
	for _, s := range sets {
		if !seen[s.service] {
			seen[s.service] = true
			services = append(services, s.service)
		}
	}
	return sets, services
}

// listenerNames are Istio's names of the listeners that carry traffic.
var listenerNames = [...]string{flow.Inbound: "virtualInbound", flow.Outbound: "virtualOutbound"}

// envoy adds the metrics of Envoy that apply to the agent, with the names, types and labels that they have under Istio.
func (m *Metrics) envoy(f *families, open [2][len(protocols)]int) {
	live := 1.0
	if m.sources.Draining != nil && m.sources.Draining() {
		live = 0
	}
	f.gauge("envoy_server_live", "1 unless the agent is draining.").is(live)
	f.gauge("envoy_server_uptime", "Seconds since the agent started.").is(float64(int64(time.Since(m.started).Seconds())))
	f.gauge("envoy_server_concurrency", "Number of worker threads (GOMAXPROCS).").is(float64(runtime.GOMAXPROCS(0)))
	memory := []metrics.Sample{{Name: "/memory/classes/heap/objects:bytes"}, {Name: "/memory/classes/total:bytes"},
		{Name: "/memory/classes/heap/released:bytes"}}
	metrics.Read(memory)
	f.gauge("envoy_server_memory_allocated", "Bytes of allocated heap objects.").is(float64(memory[0].Value.Uint64()))
	f.gauge("envoy_server_memory_heap_size", "Bytes of memory obtained from the system and not returned.").
		is(float64(memory[1].Value.Uint64() - memory[2].Value.Uint64()))
	active := f.gauge("envoy_http_downstream_cx_active", "Open HTTP connections from downstream.")
	total := f.counter("envoy_http_downstream_cx_total", "HTTP connections from downstream.")
	accepted := f.gauge("envoy_listener_downstream_cx_active", "Open connections from downstream.")
	answered := f.counter("envoy_listener_http_downstream_rq", "Responses to downstream, by status class.")
	requests := f.counter("envoy_cluster_upstream_rq_total", "Requests sent on an upstream connection.")
	classes := f.counter("envoy_cluster_upstream_rq", "Responses to requests sent on an upstream connection, by status class.")
	for i := range m.directions {
		d := &m.directions[i]
		prefix := label("http_conn_manager_prefix", flow.Direction(i).String())
		listener := label("listener_address", listenerNames[i])
		if m.table != nil {
			n := 0
			for _, of := range open[i] {
				n += of
			}
			accepted.is(float64(n), listener)
		}
		active.is(float64(open[i][http1]+open[i][http2]), prefix)
		total.counts(d.connections[http1].Load()+d.connections[http2].Load(), prefix)
		n := uint64(0)
		for class := range d.upstream {
			of := d.upstream[class].Load()
			if n += of; class > 0 {
				name := label("response_code_class", strconv.Itoa(class)+"xx")
				classes.counts(of, name, label("cluster_name", d.cluster))
				answered.counts(d.downstream[class].Load(), name, prefix, listener)
			}
		}
		requests.counts(n, label("cluster_name", d.cluster))
	}
}

func (m *Metrics) own(f *families, open [2][len(protocols)]int) {
	flows := f.counter("pillion_flows_total", "Ended requests, and ended connections without requests, by reason.")
	connections := f.counter("pillion_connections_total", "Connections, by detected protocol.")
	opened := f.gauge("pillion_open_connections", "Open connections.")
	unnamed := f.counter("pillion_metrics_unnamed_requests_total", "Requests counted under the host \"unknown\" because the limit of hosts is reached or the host is not served.")
	folded := f.counter("pillion_metrics_folded_requests_total", "Requests counted with fewer labels because the limit of label combinations is reached.")
	for i := range m.directions {
		d := &m.directions[i]
		direction := label("direction", flow.Direction(i).String())
		for _, e := range flow.Explanations {
			flows.counts(d.end(e.Reason).flows.Load(), direction, label("reason", string(e.Reason)))
		}
		for protocol, name := range protocols {
			if protocol != undecided {
				connections.counts(d.connections[protocol].Load(), direction, label("protocol", name))
			}
			if m.table != nil {
				opened.is(float64(open[i][protocol]), direction, label("protocol", name))
			}
		}
		unnamed.counts(d.unnamed.Load(), direction)
		folded.counts(d.folded.Load(), direction)
	}
	m.dryRuns(f)
}

func (m *Metrics) fromSources(f *families) {
	s := &m.sources
	if s.Upstream != nil {
		active := f.gauge("envoy_cluster_upstream_cx_active", "Open upstream connections.")
		total := f.counter("envoy_cluster_upstream_cx_total", "Attempts to connect upstream.")
		failed := f.counter("envoy_cluster_upstream_cx_connect_fail", "Failed attempts to connect upstream.")
		retries := f.counter("envoy_cluster_upstream_rq_retry", "Requests retried on a fresh upstream connection.")
		redialled := f.counter("pillion_redials_total", "Second and third attempts to connect upstream.")
		copied := f.counter("pillion_mirrored_total", "Copies of requests sent to mirrors.")
		dropped := f.counter("pillion_mirrored_dropped_total", "Copies of requests that were not sent: too long, or too many at a time.")
		reused := f.counter("pillion_pool_reused_total", "Requests that reused a pooled connection.")
		missed := f.counter("pillion_pool_missed_total", "Requests that found no pooled connection.")
		for i := range m.directions {
			n := s.Upstream(flow.Direction(i))
			cluster, direction := label("cluster_name", m.directions[i].cluster), label("direction", flow.Direction(i).String())
			active.is(float64(n.Active), cluster)
			total.counts(n.Connected+n.Failed, cluster)
			failed.counts(n.Failed, cluster)
			retries.counts(n.Retried, cluster)
			redialled.counts(n.Redialled, direction)
			copied.counts(n.Copied, direction)
			dropped.counts(n.CopiesDropped, direction)
			reused.counts(n.Reused, direction)
			missed.counts(n.Missed, direction)
		}
	}
	if s.AccessLog != nil {
		written, dropped := s.AccessLog()
		f.counter("pillion_access_log_written_total", "Access log lines written, and records sent to services.").counts(written)
		f.counter("pillion_access_log_dropped_total", "Access log lines and records for services that were lost: the queue was full, or the service did not take them.").counts(dropped)
	}
	if s.Spans != nil {
		exported, dropped, failed := s.Spans()
		f.counter("pillion_spans_exported_total", "Spans that the receiver of traces has taken.").counts(exported)
		f.counter("pillion_spans_dropped_total", "Spans dropped because the queue was full.").counts(dropped)
		f.counter("pillion_spans_failed_total", "Spans that could not be sent, or that the receiver rejected.").counts(failed)
	}
	if s.DNS != nil {
		f.resolver(s.DNS)
	}
	if s.ControlPlane != nil {
		c := s.ControlPlane()
		f.controlPlane(&c, s.Draining != nil && s.Draining())
	}
	if s.Backoffs != nil {
		f.counter("pillion_accept_backoffs_total", "Times an accept loop backed off.").counts(s.Backoffs())
	}
	if s.Pipes != nil {
		f.gauge("pillion_pipes", "Open pipes of relays, in use or kept for reuse.").is(float64(s.Pipes()))
	}
	if s.Held != nil {
		used, limit, evictions := s.Held()
		f.gauge("pillion_held_bytes", "Memory for heads and held bodies, beyond what ordinary connections need.").is(float64(used))
		f.gauge("pillion_held_limit_bytes", "Limit of pillion_held_bytes.").is(float64(limit))
		f.counter("pillion_held_evictions_total", "Connections ended because the limit of pillion_held_bytes was reached.").counts(evictions)
	}
	if s.Gates != nil {
		gates := f.gauge("pillion_gate_open", "1 if the readiness gate is open.")
		for _, gate := range s.Gates() {
			open := 0.0
			if gate.Open {
				open = 1
			}
			gates.is(open, label("gate", gate.Name))
		}
	}
}
