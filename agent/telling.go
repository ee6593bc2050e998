package agent

import (
	"context"
	"fmt"
	"time"

	"github.com/pillion-proxy/pillion/internal/accesslog"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/live"
	"github.com/pillion-proxy/pillion/internal/metrics"
	"github.com/pillion-proxy/pillion/internal/relay"
)

// AccessLog says which lines are written, and where. The texts mean what the flags say.
type AccessLog struct {
	Path     string // "off": no log
	Encoding string // text or json
	Format   string // empty: Istio's
	Filter   string // empty: everything
	TCPStart bool
	Interval time.Duration // zero: never
}

// minInterval bounds how often all open connections are looked at, and what is written of those at rest.
const minInterval = 10 * time.Millisecond

// off reports whether there is no log.
func (c AccessLog) off() bool { return c.Path == "off" }

func (c AccessLog) validate() error {
	if _, err := c.format(); err != nil {
		return fmt.Errorf("--access-log-format: %w", err)
	}
	if _, err := accesslog.ParseFilter(c.Filter); err != nil {
		return fmt.Errorf("--access-log-filter: %w", err)
	}
	if c.Interval != 0 && c.Interval < minInterval {
		return fmt.Errorf("--access-log-interval: %v is too short; use %v or more, or 0s for never", c.Interval, minInterval)
	}
	return nil
}

// telling is what becomes of records. What is off is nil. Its parts stay as they are when it is closed: the agent's ports
// are served on, and what they show must be there.
type telling struct {
	table   *flow.Table
	access  *accesslog.Log
	metrics *metrics.Metrics
	live    *live.View

	stop   func() // ends the ticker
	closed bool
}

// tell makes the parts that tell of traffic, and opens the access log.
func (a *Agent) tell() error {
	t := &a.telling
	sinks := []flow.Sink{&flowLog{log: a.log}}
	if !a.config.AccessLog.off() {
		log, err := a.config.AccessLog.open(a.config)
		if err != nil {
			return err
		}
		t.access = log
		sinks = append(sinks, log)
	}
	if a.config.MetricsPort != 0 || a.config.StatusPort != 0 || a.config.AdminPort != 0 {
		t.metrics = metrics.New(a.config.Pod, a.config.Version)
		sinks = append(sinks, t.metrics)
	}
	if a.config.AdminPort != 0 {
		t.live = live.New(live.Config{Version: a.config.Version, SettingName: a.config.SettingName})
		sinks = append(sinks, t.live)
	}
	t.table = flow.NewTable(sinks...)
	return nil
}

// format compiles the format of the encoding.
func (c AccessLog) format() (*accesslog.Format, error) {
	if c.Encoding == "json" {
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
	log, err := accesslog.New(accesslog.Config{
		Path: c.Path, Format: format, Filter: filter, TCPStart: c.TCPStart, Interval: c.Interval, Logger: config.Log,
	})
	if err != nil {
		return nil, fmt.Errorf("--access-log %s: %w", c.Path, err)
	}
	return log, nil
}

// noted are the fields that the access log wants of messages.
func (a *Agent) noted() flow.Fields {
	if a.config.AccessLog.off() {
		return flow.Fields{}
	}
	format, err := a.config.AccessLog.format()
	if err != nil {
		return flow.Fields{} // Validate has refused it
	}
	return format.Fields()
}

// watch gives the metrics what other parts count, and begins to tell of open connections where that is wanted.
func (t *telling) watch(a *Agent) {
	if t.metrics != nil {
		sources := metrics.Sources{
			Upstream: a.upstreamStats,
			Backoffs: func() uint64 { return a.inbound.BackOffs() + a.outbound.BackOffs() },
			Gates:    a.gateStates,
			Draining: a.draining.Load,
			Pipes:    relay.Pipes,
		}
		if t.access != nil {
			sources.AccessLog = func() (written, dropped uint64) { return t.access.Written(), t.access.Dropped() }
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

// lookEvery is how often all open connections are looked at, for each to have a line in every interval: one comes 4 % of
// that late at most, or minInterval.
func lookEvery(interval time.Duration) time.Duration { return max(interval/25, minInterval) }

// repeat lets the access log tell of connections that are open for long.
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

// flushTime bounds how long the end of the agent waits for a disk.
const flushTime = 2 * time.Second

// close writes what the access log still has, and ends the streams of those who look on. The second call does nothing.
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
	if t.access == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), flushTime)
	defer cancel()
	return t.access.Close(ctx)
}

// upstreamStats is what the metrics say of a direction's upstream connections.
func (a *Agent) upstreamStats(direction flow.Direction) metrics.Upstream {
	s := &a.pools[direction].Stats
	return metrics.Upstream{
		Active:    int(s.Active.Load()),
		Connected: s.Connected.Load(), Failed: s.Failed.Load(),
		Reused: s.Reused.Load(), Missed: s.Missed.Load(),
		Retried: s.Retried.Load(),
	}
}
