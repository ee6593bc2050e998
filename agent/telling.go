package agent

import (
	"context"
	"log/slog"
	"net/http"
	"net/netip"
	"sync"
	"time"

	"github.com/pillion-proxy/pillion/internal/accesslog"
	"github.com/pillion-proxy/pillion/internal/cel"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/live"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/metrics"
	"github.com/pillion-proxy/pillion/internal/podinfo"
	"github.com/pillion-proxy/pillion/internal/relay"
	"github.com/pillion-proxy/pillion/internal/serve"
	"github.com/pillion-proxy/pillion/internal/tracing"
)

// AccessLog configures the access log.
type AccessLog struct {
	Path     string // "off": no log; empty: /dev/stdout, or with a control plane the logs that it configures
	Encoding string // text or json
	Format   string // empty: Istio's
	Filter   string // empty: everything
	TCPStart bool
	Interval time.Duration // zero: never
}

// minInterval bounds how often the open connections are scanned, and how much is written about idle ones.
const minInterval = 10 * time.Millisecond

// off reports whether the agent has no log of its own. With a control plane it has one only if a setting asks for it.
func (c AccessLog) off(plane bool) bool {
	return c.Path == "off" || plane && c == AccessLog{Encoding: textEncoding}
}

// Encodings of lines.
const (
	textEncoding = "text"
	jsonEncoding = "json"
)

// defaultPath is that of the agent's own log.
const defaultPath = "/dev/stdout"

func (c AccessLog) validate() error {
	if _, err := c.format(); err != nil {
		return &FieldError{Field: "AccessLog.Format", Err: err}
	}
	if _, err := accesslog.ParseFilter(c.Filter); err != nil {
		return &FieldError{Field: "AccessLog.Filter", Err: err}
	}
	if c.Interval != 0 && c.Interval < minInterval {
		return invalid("AccessLog.Interval", "%v is too short; use %v or more, or 0s for never", c.Interval, minInterval)
	}
	return nil
}

// telling holds the sinks of flow records. A sink that is turned off is nil. close does not clear them: the agent's ports
// outlive the access log and still read them.
type telling struct {
	table   *flow.Table
	access  *accesslog.Log
	planned *accesslog.Sinks // of the control plane; nil: its logs are not followed
	noted   *flow.Noted
	metrics *metrics.Metrics
	live    *live.View
	spans   spans

	stop   func() // ends the ticker
	closed bool
}

// tell makes the sinks and opens the access log.
func (a *Agent) tell() error {
	t := &a.telling
	sinks := []flow.Sink{&flowLog{log: a.log, level: a.config.LogLevel}}
	plane := a.config.ControlPlane.Pod != nil
	t.noted = flow.NewNoted(flow.Fields{})
	switch c := a.config.AccessLog; {
	case !c.off(plane):
		log, err := c.open(a.config)
		if err != nil {
			return err
		}
		t.access, t.noted = log, flow.NewNoted(log.Fields())
		sinks = append(sinks, log)
	case plane && c.Path != "off":
		t.planned = &accesslog.Sinks{Noted: t.noted, Log: a.log, Resource: a.attributes()}
	}
	if a.config.Ports.Metrics != 0 || a.config.Ports.Status != 0 || a.config.Ports.Admin != 0 {
		t.metrics = metrics.New(a.config.Workload.Pod, metrics.Options{
			Version: a.config.Version, ClusterDomain: a.config.Workload.ClusterDomain, MaxSeries: a.config.Metrics.MaxSeries,
			Service: a.serviceOf,
		})
		sinks = append(sinks, t.metrics)
	}
	if a.config.Ports.Admin != 0 {
		t.live = live.New(live.Config{Version: a.config.Version, SettingName: a.config.SettingName,
			Pod: known(a.config.Workload.Pod.Name), Namespace: known(a.config.Workload.Pod.Namespace)})
		sinks = append(sinks, t.live)
	}
	a.traceRequests()
	t.table = flow.NewTable(append(sinks, tracing.Sink{})...)
	return nil
}

// reach sets what reaches the receivers of spans and records that a control plane names. Call it before anything is carried.
func (t *telling) reach(transport func(cluster string, http2 bool) http.RoundTripper) {
	t.spans.exporters.Transport = transport
	if t.planned != nil {
		t.planned.Transport = transport
	}
}

// follow lets go of the access logs and the receivers of spans that other listeners had.
func (t *telling) follow(s *mesh.Snapshot) {
	t.spans.exporters.Keep(s.Tracings())
	if t.planned != nil {
		t.planned.Keep(s.AccessLogs())
	}
}

// known returns a part of the pod's description, or "" if it is unknown.
func known(text string) string {
	if text == podinfo.Unknown {
		return ""
	}
	return text
}

// format compiles Format for the encoding.
func (c AccessLog) format() (*accesslog.Format, error) {
	if c.Encoding == jsonEncoding {
		return accesslog.ParseJSONFormat(c.Format)
	}
	return accesslog.ParseFormat(c.Format)
}

func (c AccessLog) open(config Config) (*accesslog.Log, error) {
	format, err := c.format()
	if err != nil {
		return nil, err
	}
	filter, err := accesslog.ParseFilter(c.Filter)
	if err != nil {
		return nil, err
	}
	if c.Path == "" {
		c.Path = defaultPath
	}
	log, err := accesslog.New(accesslog.Config{
		Path: c.Path, Format: format, Filter: filter, TCPStart: c.TCPStart, Interval: c.Interval, Logger: config.Log,
	})
	if err != nil {
		return nil, &FieldError{Field: "AccessLog.Path", Value: c.Path, Err: err}
	}
	return log, nil
}

// recorder makes what the control plane asks to be recorded; nil: there is no control plane.
func (a *Agent) recorder() serve.Recorder {
	if a.config.ControlPlane.Pod == nil {
		return nil
	}
	return recorder{&a.telling, a.log}
}

// recorder implements serve.Recorder.
type recorder struct {
	*telling
	log *slog.Logger
}

func (r recorder) Logs(logs []mesh.AccessLog) []flow.Sink { return r.planned.Of(logs) }

func (r recorder) Metrics(s *mesh.Stats) any {
	if r.metrics == nil {
		return nil
	}
	return r.metrics.Plan(s, r.place)
}

// place returns where records have a header field that an expression reads; negative: they do not.
func (r recorder) place(h cel.Header) int {
	place, err := r.noted.Add(h.Name, h.Response)
	if err != nil {
		r.log.Warn("header field not recorded", "field", h.Name, "error", err)
	}
	return place
}

// watch connects the metrics to the counters of other parts, and starts the scans of open connections if an interval is
// configured.
func (t *telling) watch(a *Agent) {
	if t.metrics != nil {
		sources := metrics.Sources{
			Upstream: a.upstreamStats,
			Backoffs: a.backOffs,
			Gates:    a.gateStates,
			Draining: a.draining.Load,
			Pipes:    relay.Pipes,
			Held: func() (used, limit int, evictions uint64) {
				return a.budget.Used(), a.budget.Limit(), a.budget.Evictions()
			},
		}
		switch {
		case t.access != nil:
			sources.AccessLog = func() (written, dropped uint64) { return t.access.Written(), t.access.Dropped() }
		case t.planned != nil:
			sources.AccessLog = t.planned.Counts
		}
		if t.spans.policy != nil || a.plane.session != nil {
			sources.Spans = t.spans.counted
		}
		if a.plane.session != nil {
			sources.ControlPlane = a.controlPlaneCounts
		}
		if a.resolver != nil {
			sources.DNS = &a.resolver.Stats
		}
		t.metrics.Watch(t.table, sources)
	}
	if t.access == nil || a.config.AccessLog.Interval == 0 {
		return
	}
	done, ended := make(chan struct{}), make(chan struct{})
	go t.repeat(lookEvery(a.config.AccessLog.Interval), done, ended)
	t.stop = func() {
		close(done)
		<-ended
	}
}

// lookEvery is the time between scans of the open connections. Each connection gets a line in every interval, late by at
// most 4 % of it or minInterval.
func lookEvery(interval time.Duration) time.Duration { return max(interval/25, minInterval) }

// repeat scans the open connections, so that the access log can report long-lived ones.
func (t *telling) repeat(every time.Duration, done <-chan struct{}, ended chan<- struct{}) {
	defer close(ended)
	ticker := time.NewTicker(every)
	defer ticker.Stop()
	for {
		select {
		case <-done:
			return
		case <-ticker.C:
			t.access.Progress(t.table)
		}
	}
}

// flushTime bounds how long shutdown waits for a slow disk.
const flushTime = 2 * time.Second

// close flushes the access log and the spans, and ends the streams of live viewers. A second call does nothing.
func (t *telling) close() error {
	if t.closed {
		return nil
	}
	t.closed = true
	if t.stop != nil {
		t.stop()
	}
	if t.live != nil {
		t.live.Close()
	}
	ctx, cancel := context.WithTimeout(context.Background(), flushTime)
	defer cancel()
	return t.flush(ctx)
}

// flush closes the access log and the exporters of spans, at the same time.
func (t *telling) flush(ctx context.Context) error {
	var closing sync.WaitGroup
	closing.Go(func() { t.spans.close(ctx) })
	defer closing.Wait()
	switch {
	case t.access != nil:
		return t.access.Close(ctx)
	case t.planned != nil:
		return t.planned.Close(ctx)
	}
	return nil
}

// upstreamStats sums the upstream connections of a direction's listeners.
func (a *Agent) upstreamStats(direction flow.Direction) metrics.Upstream {
	var sum metrics.Upstream
	for _, l := range a.listeners {
		if l.direction == direction {
			s := &l.pool.Stats
			sum.Active += int(s.Active.Load())
			sum.Connected += s.Connected.Load()
			sum.Failed += s.Failed.Load()
			sum.Redialled += s.Redialled.Load()
			sum.Reused += s.Reused.Load()
			sum.Missed += s.Missed.Load()
			sum.Retried += s.Retried.Load()
			sum.Copied += s.Copied.Load()
			sum.CopiesDropped += s.CopiesDropped.Load()
		}
	}
	return sum
}

// countUpstream adds the open connections to each endpoint that outbound traffic has.
func (a *Agent) countUpstream(to map[netip.AddrPort]int) {
	for _, l := range a.listeners {
		if l.direction == flow.Outbound {
			l.pool.Stats.Count(to)
		}
	}
}

func (a *Agent) backOffs() (sum uint64) {
	for _, l := range a.listeners {
		sum += l.server.BackOffs()
	}
	return sum
}
