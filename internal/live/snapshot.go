package live

import (
	"cmp"
	"net/netip"
	"slices"
	"sort"
	"time"

	"github.com/pillion-proxy/pillion/internal/flow"
)

// The bounds of a snapshot.
const (
	maxConnections = 500
	rateSeconds    = 10 // rates are the mean of the last ten whole seconds
)

// Snapshot is the state at one moment, in JSON. The names are stable. Rates are per second, the mean of the last ten
// seconds. Latencies are of requests in the last half to whole minute, within 6.25 %. Other counts are since the start.
type Snapshot struct {
	Version       string        `json:"version"`
	Pod           string        `json:"pod,omitempty"` // name of the workload's pod; absent if unknown
	Namespace     string        `json:"namespace,omitempty"`
	Time          time.Time     `json:"time"`
	Started       time.Time     `json:"started"`
	UptimeSeconds float64       `json:"uptimeSeconds"`
	Ready         bool          `json:"ready"` // every gate is open
	Gates         []Gate        `json:"gates"`
	ControlPlane  *ControlPlane `json:"controlPlane,omitempty"` // absent if the agent decides alone
	Inbound       Totals        `json:"inbound"`
	Outbound      Totals        `json:"outbound"`
	Reasons       []Reason      `json:"reasons"`      // why flows failed, the most frequent in the last minute first
	Destinations  []Destination `json:"destinations"` // the busiest first; "(other)" sums up those over the bound
	Peers         []Destination `json:"peers"`        // inbound clients, likewise
	Open          int           `json:"open"`         // number of open connections
	Connections   []Connection  `json:"connections"`  // the youngest 500 of them, the oldest first
	Followers     int           `json:"followers"`    // pages and taps that receive each record
}

// PodName returns namespace/name of the workload's pod, the name alone if the namespace is unknown, or "".
func (s *Snapshot) PodName() string {
	if s.Pod == "" || s.Namespace == "" {
		return s.Pod
	}
	return s.Namespace + "/" + s.Pod
}

// Gate is one condition of readiness.
type Gate struct {
	Name string `json:"name"`
	Open bool   `json:"open"`
	Why  string `json:"why,omitempty"` // the reason of a closed gate
}

// Counts are the numbers of a direction, a destination or a peer. A flow is a request, or a connection in which no requests
// are seen. It is an error if it did not end in order, or if its response had a status of 5xx or a gRPC status that
// corresponds to one.
type Counts struct {
	Requests             uint64  `json:"requests"`
	Connections          uint64  `json:"connections"`
	Flows                uint64  `json:"flows"` // ended ones
	Errors               uint64  `json:"errors"`
	Bytes                uint64  `json:"bytes"` // of ended flows, both ways; of requests, the bodies
	RequestsPerSecond    float64 `json:"requestsPerSecond"`
	ConnectionsPerSecond float64 `json:"connectionsPerSecond"`
	FlowsPerSecond       float64 `json:"flowsPerSecond"`
	ErrorsPerSecond      float64 `json:"errorsPerSecond"`
	BytesPerSecond       float64 `json:"bytesPerSecond"`
	P50MS                float64 `json:"p50Ms"` // 0 without requests
	P95MS                float64 `json:"p95Ms"`
	P99MS                float64 `json:"p99Ms"`
}

// Totals are the counts of a direction, in all and for each whole second of the last minute, the oldest first.
type Totals struct {
	Counts
	RequestsBySecond    []uint64 `json:"requestsBySecond"`
	ConnectionsBySecond []uint64 `json:"connectionsBySecond"`
	ErrorsBySecond      []uint64 `json:"errorsBySecond"`
}

// Destination is the host of requests, the original destination of flows without a host, or the address of a peer.
type Destination struct {
	Direction string `json:"direction"`
	Name      string `json:"name"`
	Counts
}

// Reason is why flows failed: a flow.Reason, or status_5xx or grpc_status for a response that reports a failure.
type Reason struct {
	Reason string `json:"reason"`
	Text   string `json:"text"`
	Count  uint64 `json:"count"`
	Recent uint64 `json:"recent"` // in the last half to whole minute
}

// Connection is an open connection.
type Connection struct {
	Direction   string  `json:"direction"`
	Protocol    string  `json:"protocol,omitempty"` // absent until it is detected
	Downstream  string  `json:"downstream"`
	Destination string  `json:"destination,omitempty"`
	SNI         string  `json:"sni,omitempty"`
	AgeSeconds  float64 `json:"ageSeconds"`
	Received    uint64  `json:"received"` // bytes
	Sent        uint64  `json:"sent"`
	Requests    uint64  `json:"requests"` // ended ones
}

// snapshot computes a Snapshot from the tallies and sources.
func (v *View) snapshot(sources *Sources) *Snapshot {
	now := time.Now()
	s := &Snapshot{
		Version:       v.config.Version,
		Pod:           v.config.Pod,
		Namespace:     v.config.Namespace,
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
	if sources.Plane != nil {
		s.ControlPlane = sources.Plane()
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
	s.Reasons = all.failures(v.config.SettingName)
	s.addConnections(sources.Table, now)
	return s
}

// totals adds up a direction and appends its destinations to the snapshot.
func (v *View) totals(s *Snapshot, direction flow.Direction, second uint32, all *sums) Totals {
	var total sums
	for _, t := range v.destinations[direction].all() {
		var one sums
		one.read(t, second)
		s.Destinations = append(s.Destinations, Destination{direction.String(), t.name, one.counts(second)})
		total.add(&one)
	}
	all.add(&total)
	// A connection of requests has no destination before its first request, so connections are counted on their own.
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
	var recent counts
	span := min(rateSeconds, int(second))
	for _, c := range s.seconds[minute-span:] {
		recent.add(c)
	}
	rate := func(n uint64) float64 { return float64(n) / float64(max(1, span)) }
	return Counts{
		Requests:             s.total.requests,
		Connections:          s.total.connections,
		Flows:                s.total.flows,
		Errors:               s.total.errors,
		Bytes:                s.total.bytes,
		RequestsPerSecond:    rate(recent.requests),
		ConnectionsPerSecond: rate(recent.connections),
		FlowsPerSecond:       rate(recent.flows),
		ErrorsPerSecond:      rate(recent.errors),
		BytesPerSecond:       rate(recent.bytes),
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
		if own := i - len(flow.Explanations); own >= 0 {
			text = responseFailures[own].Text
		} else {
			text = flow.Explanations[i].Render(setting)
		}
		list = append(list, Reason{reasonNames[i], text, n, recent})
	}
	sort.SliceStable(list, func(i, j int) bool {
		a, b := &list[i], &list[j]
		return cmp.Or(cmp.Compare(b.Recent, a.Recent), cmp.Compare(b.Count, a.Count)) < 0
	})
	return list
}

// byRate sorts the busiest first. The order of idle ones is the same in each snapshot.
func byRate(list []Destination) {
	sort.Slice(list, func(i, j int) bool {
		a, b := &list[i], &list[j]
		return cmp.Or(cmp.Compare(b.FlowsPerSecond, a.FlowsPerSecond), cmp.Compare(b.Flows, a.Flows),
			cmp.Compare(a.Name, b.Name), cmp.Compare(a.Direction, b.Direction)) < 0
	})
}

// addConnections copies the open connections. The table is locked meanwhile, so it stops at a bound and formats text only
// afterwards.
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
			o.protocol, o.sni = r.Protocol, r.TLS().ServerName
		}
		list = append(list, o)
		return len(list) < maxConnections
	})
	sort.SliceStable(list, func(i, j int) bool { return list[i].opened.Before(list[j].opened) })
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
