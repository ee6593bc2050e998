package live

import (
	"cmp"
	"net/netip"
	"slices"
	"time"

	"github.com/pillion-proxy/pillion/internal/flow"
)

// The bounds of a snapshot.
const (
	maxConnections = 500
	rateSeconds    = 10 // rates are the mean of the last ten whole seconds
)

// Snapshot is the state at one moment, in JSON. The names are stable. Rates are per second, the mean of the last ten
// seconds; latencies are of requests in the last half to whole minute, within 6.25 %; all else counts from the start.
type Snapshot struct {
	Version       string        `json:"version"`
	Time          time.Time     `json:"time"`
	Started       time.Time     `json:"started"`
	UptimeSeconds float64       `json:"uptimeSeconds"`
	Ready         bool          `json:"ready"` // every gate is open
	Gates         []Gate        `json:"gates"`
	Inbound       Totals        `json:"inbound"`
	Outbound      Totals        `json:"outbound"`
	Reasons       []Reason      `json:"reasons"`      // why flows failed, the most frequent of late first
	Destinations  []Destination `json:"destinations"` // the busiest first; "(other)" stands for those over the bound
	Peers         []Destination `json:"peers"`        // who calls the workload, likewise
	Open          int           `json:"open"`         // connections that are open
	Connections   []Connection  `json:"connections"`  // the youngest 500 of them, the oldest first
	Followers     int           `json:"followers"`    // who hear of each record: pages and taps
}

// Gate is one thing that readiness waits for.
type Gate struct {
	Name string `json:"name"`
	Open bool   `json:"open"`
	Why  string `json:"why,omitempty"` // it is closed
}

// Counts is what happened in a direction, at a destination or with a peer. A flow is a request, or a connection in which
// no requests are seen; it is an error when it ended otherwise than in order, or with a status of 5xx or
// a gRPC status that stands for one.
type Counts struct {
	Requests             uint64  `json:"requests"`
	Connections          uint64  `json:"connections"`
	Flows                uint64  `json:"flows"` // that have ended
	Errors               uint64  `json:"errors"`
	Bytes                uint64  `json:"bytes"` // of flows that have ended, both ways; of requests, the bodies'
	RequestsPerSecond    float64 `json:"requestsPerSecond"`
	ConnectionsPerSecond float64 `json:"connectionsPerSecond"`
	FlowsPerSecond       float64 `json:"flowsPerSecond"`
	ErrorsPerSecond      float64 `json:"errorsPerSecond"`
	BytesPerSecond       float64 `json:"bytesPerSecond"`
	P50MS                float64 `json:"p50Ms"` // 0 when there was no request
	P95MS                float64 `json:"p95Ms"`
	P99MS                float64 `json:"p99Ms"`
}

// Totals are the counts of a direction, and their course over the last minute: a number for each whole second, the
// oldest first.
type Totals struct {
	Counts
	RequestsBySecond    []uint64 `json:"requestsBySecond"`
	ConnectionsBySecond []uint64 `json:"connectionsBySecond"`
	ErrorsBySecond      []uint64 `json:"errorsBySecond"`
}

// Destination is a host that requests are for, or the original destination of what has none; or a peer's address.
type Destination struct {
	Direction string `json:"direction"`
	Name      string `json:"name"`
	Counts
}

// Reason is why flows failed: a flow.Reason, or status_5xx or grpc_status for a response that says so.
type Reason struct {
	Reason string `json:"reason"`
	Text   string `json:"text"`
	Count  uint64 `json:"count"`
	Recent uint64 `json:"recent"` // in the last half to whole minute
}

// Connection is an open connection.
type Connection struct {
	Direction   string  `json:"direction"`
	Protocol    string  `json:"protocol,omitempty"` // left out until it is known
	Downstream  string  `json:"downstream"`
	Destination string  `json:"destination,omitempty"`
	SNI         string  `json:"sni,omitempty"`
	AgeSeconds  float64 `json:"ageSeconds"`
	Received    uint64  `json:"received"` // bytes
	Sent        uint64  `json:"sent"`
	Requests    uint64  `json:"requests"` // that have ended
}

// snapshot looks at everything.
func (v *View) snapshot(sources *Sources) *Snapshot {
	now := time.Now()
	s := &Snapshot{
		Version:       v.version,
		Time:          now.Round(0),
		Started:       v.started.Round(0),
		UptimeSeconds: now.Sub(v.started).Seconds(),
		Gates:         []Gate{},
		Destinations:  []Destination{},
		Peers:         []Destination{},
		Connections:   []Connection{},
		Followers:     len(v.following.list()),
	}
	if sources.Gates != nil {
		s.Gates = append(s.Gates, sources.Gates()...)
	}
	s.Ready = !slices.ContainsFunc(s.Gates, func(g Gate) bool { return !g.Open })
	second := v.second(now)
	var all sums
	s.Inbound = v.totals(s, flow.Inbound, second, &all)
	s.Outbound = v.totals(s, flow.Outbound, second, &all)
	for _, t := range v.peers.all() {
		var one sums
		one.read(t, second)
		s.Peers = append(s.Peers, Destination{flow.Inbound.String(), t.name, one.counts(second)})
	}
	byRate(s.Destinations)
	byRate(s.Peers)
	s.Reasons = all.failures(v.setting)
	s.addConnections(sources.Table, now)
	return s
}

// totals adds up a direction, whose destinations go into the snapshot.
func (v *View) totals(s *Snapshot, direction flow.Direction, second uint32, all *sums) Totals {
	var total sums
	for _, t := range v.destinations[direction].all() {
		var one sums
		one.read(t, second)
		s.Destinations = append(s.Destinations, Destination{direction.String(), t.name, one.counts(second)})
		total.add(&one)
	}
	all.add(&total)
	// A connection of requests has no destination before its first request, but it is a connection.
	var connections sums
	connections.read(&v.connections[direction], second)
	total.total.connections = connections.total.connections
	for i := range total.seconds {
		total.seconds[i].connections = connections.seconds[i].connections
	}
	t := Totals{Counts: total.counts(second)}
	for _, c := range total.seconds {
		t.RequestsBySecond = append(t.RequestsBySecond, c.requests)
		t.ConnectionsBySecond = append(t.ConnectionsBySecond, c.connections)
		t.ErrorsBySecond = append(t.ErrorsBySecond, c.errors)
	}
	return t
}

func (s *sums) add(more *sums) {
	s.total.add(more.total)
	for i := range s.seconds {
		s.seconds[i].add(more.seconds[i])
	}
	for i := range s.latency {
		s.latency[i] += more.latency[i]
	}
	s.reasons = addReasons(s.reasons, more.reasons)
	s.recent = addReasons(s.recent, more.recent)
}

func (s *sums) counts(second uint32) Counts {
	var late counts
	span := min(rateSeconds, int(second))
	for _, c := range s.seconds[minute-span:] {
		late.add(c)
	}
	rate := func(n uint64) float64 { return float64(n) / float64(max(1, span)) }
	return Counts{
		Requests:             s.total.requests,
		Connections:          s.total.connections,
		Flows:                s.total.flows,
		Errors:               s.total.errors,
		Bytes:                s.total.bytes,
		RequestsPerSecond:    rate(late.requests),
		ConnectionsPerSecond: rate(late.connections),
		FlowsPerSecond:       rate(late.flows),
		ErrorsPerSecond:      rate(late.errors),
		BytesPerSecond:       rate(late.bytes),
		P50MS:                milliseconds(s.percentile(0.50)),
		P95MS:                milliseconds(s.percentile(0.95)),
		P99MS:                milliseconds(s.percentile(0.99)),
	}
}

// failures lists the reasons of failures, the most frequent of the last minute first.
func (s *sums) failures(setting func(string) string) []Reason {
	list := []Reason{}
	for i, n := range s.reasons {
		if n == 0 {
			continue
		}
		recent := uint64(0)
		if s.recent != nil {
			recent = s.recent[i]
		}
		var text string
		if said := i - len(flow.Explanations); said >= 0 {
			text = saidFailures[said].Text
		} else {
			text = flow.Explanations[i].Render(setting)
		}
		list = append(list, Reason{reasonNames[i], text, n, recent})
	}
	slices.SortStableFunc(list, func(a, b Reason) int {
		return cmp.Or(cmp.Compare(b.Recent, a.Recent), cmp.Compare(b.Count, a.Count))
	})
	return list
}

// byRate puts the busiest first, and keeps the order of those that rest from one look to the next.
func byRate(list []Destination) {
	slices.SortFunc(list, func(a, b Destination) int {
		return cmp.Or(cmp.Compare(b.FlowsPerSecond, a.FlowsPerSecond), cmp.Compare(b.Flows, a.Flows),
			cmp.Compare(a.Name, b.Name), cmp.Compare(a.Direction, b.Direction))
	})
}

// addConnections copies what is open. Nobody opens or closes a connection meanwhile, so it stops at a bound, and makes
// text of it only afterwards.
func (s *Snapshot) addConnections(table *flow.Table, now time.Time) {
	if table == nil {
		return
	}
	type open struct {
		direction               flow.Direction
		carried                 bool
		protocol                flow.Protocol
		downstream, destination netip.AddrPort
		sni                     string
		opened                  time.Time
		received, sent, ended   uint64
	}
	s.Open = table.Open()
	list := make([]open, 0, min(s.Open+1, maxConnections))
	table.Each(func(r *flow.Record) bool {
		o := open{
			direction: r.Direction, carried: r.Carried(), downstream: r.Downstream, destination: r.OriginalDestination, opened: r.Opened,
			received: r.Received.Load(), sent: r.Sent.Load(), ended: r.Requests.Load(),
		}
		if o.carried {
			o.protocol, o.sni = r.Protocol, r.TLS.ServerName
		}
		list = append(list, o)
		return len(list) < maxConnections
	})
	slices.SortStableFunc(list, func(a, b open) int { return a.opened.Compare(b.opened) })
	for _, o := range list {
		c := Connection{
			Direction: o.direction.String(), Downstream: show(o.downstream), Destination: show(o.destination), SNI: o.sni,
			AgeSeconds: now.Sub(o.opened).Seconds(), Received: o.received, Sent: o.sent, Requests: o.ended,
		}
		if o.carried {
			c.Protocol = o.protocol.String()
		}
		s.Connections = append(s.Connections, c)
	}
}
