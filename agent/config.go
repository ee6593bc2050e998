// Package agent is the housekeeper: it builds all parts, binds the ports, starts, drains and stops.
package agent

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"strings"
	"time"

	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/internal/dns"
	"github.com/pillion-proxy/pillion/internal/edge"
	"github.com/pillion-proxy/pillion/internal/export"
	"github.com/pillion-proxy/pillion/internal/httpforward"
	"github.com/pillion-proxy/pillion/internal/istiod"
	"github.com/pillion-proxy/pillion/internal/metrics"
	"github.com/pillion-proxy/pillion/internal/podinfo"
	"github.com/pillion-proxy/pillion/internal/tracing"
)

// Config configures an agent. Start from Default.
type Config struct {
	Ports        Ports
	Gateway      bool         // accept connections at the listeners of the control plane, and capture no traffic
	Edge         *edge.Source // likewise, at the listeners of this in the place of a control plane; may be nil
	Interception Interception
	Connections  Connections
	HTTP         HTTP
	ControlPlane ControlPlane
	DNS          DNS
	Policy       Policy
	Drain        Drain
	AccessLog    AccessLog
	Tracing      *tracing.Options // nil: no requests are traced, unless a control plane asks for it
	Metrics      Metrics
	Status       Status

	SpanAttributes []export.Resource // of this process, in spans that a control plane asks for; added to those of Workload
	Workload       Workload

	// SettingName spells a field of Config for people, such as --connect-timeout for ConnectTimeout. nil: as it is.
	SettingName func(field string) string

	Version  string
	Log      *slog.Logger
	LogLevel *slog.LevelVar // of Log; the admin server can change it

	RecentLog io.WriterTo // the last lines of Log, for the admin server; nil: not kept
}

// Ports are where the agent listens. Status, Metrics and Admin are optional: zero turns them off.
type Ports struct {
	Outbound  uint16 // rules redirect the workload's own connections here
	Inbound   uint16 // rules bring connections to the workload here
	Readiness uint16 // /healthz
	Status    uint16 // probes, merged metrics, orders of the pod
	Metrics   uint16 // the agent's own metrics
	Admin     uint16 // Envoy's admin paths and the live page, on loopback; zero also keeps no records for it
}

// Interception is how rules bring inbound connections.
type Interception struct {
	Mode       capture.Mode
	TPROXYMark uint32 // with capture.TPROXY: mark of packets that are sent from a client's address; must be the rules' mark
}

// Connections applies to connections of every protocol.
type Connections struct {
	ConnectTimeout   time.Duration // for a dial upstream; zero leaves it to the kernel
	IdleTimeout      time.Duration // closes connections without traffic; zero: never
	HalfCloseTimeout time.Duration // the same once one side has closed; zero: never
	Max              int           // inbound and outbound together; zero: limited by file descriptors only

	OpaquePorts          capture.Ports // destination ports whose protocol is not detected
	DetectionDelay       time.Duration // silence before the upstream is dialled
	DetectionHold        time.Duration // how long an ambiguous beginning is held
	InboundProxyProtocol capture.Ports // inbound ports whose workload expects a PROXY protocol header
}

// HTTP applies to forwarded HTTP messages.
type HTTP struct {
	MaxHeadBytes        int
	MaxHeadFields       int
	MaxHeldBytes        int           // memory for heads and held bodies of all connections; zero: a share of the memory limit, see heldBytes
	RequestHeadTimeout  time.Duration // for the head of a request; zero: no limit
	RequestTimeout      time.Duration // from the whole request to the head of its response; zero: no limit
	UpstreamIdleTimeout time.Duration // closes idle HTTP/1 connections to upstreams; zero: no reuse
	InboundFields       httpforward.Fields
	OutboundFields      httpforward.Fields
}

// ControlPlane is who configures the agent.
type ControlPlane struct {
	Pod  *istiod.Pod   // how istiod is reached; nil: the agent decides alone
	Wait time.Duration // how long connections are held for the first configuration; zero: they are refused at once
	Kept string        // directory that keeps the last configuration for a restart; empty: it is not kept

	StrictPaths bool // inbound requests whose path servers may read in different ways are rejected
	Rejudge     bool // an inbound connection of bytes, or one of a gateway, ends at once when a changed policy denies it
}

// DNS configures the resolver.
type DNS struct {
	Capture   bool             // serve the workload's queries; the rules redirect them to port 15053
	Servers   []netip.AddrPort // upstreams; empty: those of ResolvConf
	CacheSize int              // in answers; zero: no cache
}

// Drain is how a shutdown lets connections finish. Both times count from the announcement.
type Drain struct {
	Delay   time.Duration // until the listeners close
	Timeout time.Duration // until the remaining connections are cut
}

// Metrics configures the agent's metrics.
type Metrics struct {
	MaxSeries int // bounds the series of a scrape
}

// Status configures the status port.
type Status struct {
	MetricsLocalOnly bool // merged metrics are served to processes of this pod only
	Profiling        bool // serve /debug/pprof/ to processes of this pod
}

// Workload describes the workload, as the injector does.
type Workload struct {
	Pod            podinfo.Pod
	Probers        string // its probes as JSON, see probe.Parse
	ProbeLocalhost bool   // send probes to localhost, not to the pod's address
	ProbeHTTP2     bool   // HTTPS probes may use HTTP/2
	ProbeKeepAlive bool   // HTTP probes keep their connection
	ScrapeTargets  string // where its metrics are served, as JSON, see scrape.ParseTargets
	ClusterDomain  string // the DNS domain of its cluster, in lower case; empty: cluster.local
}

// FieldError reports an invalid or unusable value of a Config.
type FieldError = capture.FieldError

func invalid(field, format string, values ...any) error {
	return &FieldError{Field: field, Err: fmt.Errorf(format, values...)}
}

// Bounds of HTTP.MaxHeadBytes, HTTP.MaxHeadFields and HTTP.MaxHeldBytes. One connection can make the agent keep a head of
// the largest size, all connections together what MaxHeldBytes allows.
const (
	minHeadBytes  = 1 << 10
	maxHeadBytes  = 8 << 20
	maxHeadFields = 100_000
	minHeldBytes  = 1 << 20
)

// Default is the default configuration, without its logger.
func Default() Config {
	return Config{
		Ports:        Ports{Outbound: 15001, Inbound: 15006, Readiness: 15021, Status: 15020, Metrics: 15090, Admin: 15000},
		Interception: Interception{Mode: capture.Redirect, TPROXYMark: 1337},
		Connections: Connections{
			ConnectTimeout:   10 * time.Second,
			HalfCloseTimeout: 5 * time.Minute,
			DetectionDelay:   5 * time.Millisecond,
			DetectionHold:    time.Second,
		},
		HTTP: HTTP{
			MaxHeadBytes:        256 << 10,
			MaxHeadFields:       1000,
			RequestHeadTimeout:  time.Minute,
			UpstreamIdleTimeout: 3 * time.Second,
			InboundFields: httpforward.Fields{
				ForwardedFor: httpforward.ForwardedForSetIfAbsent, ForwardedProto: true, RequestID: true, ServiceTime: true,
			},
			OutboundFields: httpforward.Fields{ForwardedProto: true, RequestID: true, ServiceTime: true},
		},
		ControlPlane: ControlPlane{Wait: 10 * time.Second},
		DNS:          DNS{CacheSize: dns.DefaultCacheSize},
		Drain:        Drain{Delay: 5 * time.Second, Timeout: 20 * time.Second},
		AccessLog:    AccessLog{Encoding: textEncoding},
		Metrics:      Metrics{MaxSeries: metrics.DefaultMaxSeries},
		Status:       Status{Profiling: true},
		Workload:     Workload{Pod: podinfo.UnknownPod()},
		LogLevel:     new(slog.LevelVar),
	}
}

// Validate returns the first invalid value as a FieldError.
func (c Config) Validate() error {
	for _, validate := range []func() error{
		c.validatePorts, c.validateDurations, c.validateLimits, c.Interception.validate, c.AccessLog.validate, c.Policy.validate,
	} {
		if err := validate(); err != nil {
			return err
		}
	}
	if c.Log == nil || c.LogLevel == nil {
		return errors.New("agent: Config.Log and Config.LogLevel are required")
	}
	return nil
}

func (c Config) validatePorts() error {
	taken := map[uint16]string{}
	for _, p := range []struct {
		field    string
		port     uint16
		optional bool
	}{
		{"Ports.Outbound", c.Ports.Outbound, false},
		{"Ports.Inbound", c.Ports.Inbound, false},
		{"Ports.Readiness", c.Ports.Readiness, false},
		{"Ports.Status", c.Ports.Status, true},
		{"Ports.Metrics", c.Ports.Metrics, true},
		{"Ports.Admin", c.Ports.Admin, true},
	} {
		if p.port == 0 && p.optional {
			continue
		}
		if p.port == 0 {
			return invalid(p.field, "0 is not a port; use 1 to 65535")
		}
		if other := taken[p.port]; other != "" {
			return &FieldError{Field: p.field, Value: fmt.Sprint(p.port), Other: other, Err: errors.New("this port is already used by")}
		}
		taken[p.port] = p.field
	}
	return nil
}

func (c Config) validateDurations() error {
	for _, d := range []struct {
		field    string
		duration time.Duration
	}{
		{"Connections.ConnectTimeout", c.Connections.ConnectTimeout},
		{"Connections.IdleTimeout", c.Connections.IdleTimeout},
		{"Connections.HalfCloseTimeout", c.Connections.HalfCloseTimeout},
		{"Connections.DetectionDelay", c.Connections.DetectionDelay},
		{"Connections.DetectionHold", c.Connections.DetectionHold},
		{"HTTP.RequestHeadTimeout", c.HTTP.RequestHeadTimeout},
		{"HTTP.RequestTimeout", c.HTTP.RequestTimeout},
		{"HTTP.UpstreamIdleTimeout", c.HTTP.UpstreamIdleTimeout},
		{"ControlPlane.Wait", c.ControlPlane.Wait},
		{"Drain.Delay", c.Drain.Delay},
		{"Drain.Timeout", c.Drain.Timeout},
	} {
		if d.duration < 0 {
			return invalid(d.field, "%v is negative; use 0s or more", d.duration)
		}
	}
	if c.Drain.Delay > c.Drain.Timeout {
		return &FieldError{Field: "Drain.Delay", Value: c.Drain.Delay.String(), Other: "Drain.Timeout",
			Err: fmt.Errorf("must not be longer than %v, the value of", c.Drain.Timeout)}
	}
	return nil
}

func (c Config) validateLimits() error {
	if c.Connections.Max < 0 {
		return invalid("Connections.Max", "%d is negative; use 0 for no limit", c.Connections.Max)
	}
	if n := c.HTTP.MaxHeadBytes; n < minHeadBytes || n > maxHeadBytes {
		return invalid("HTTP.MaxHeadBytes", "%d is out of range; use %d to %d", n, minHeadBytes, maxHeadBytes)
	}
	if n := c.HTTP.MaxHeadFields; n < 1 || n > maxHeadFields {
		return invalid("HTTP.MaxHeadFields", "%d is out of range; use 1 to %d", n, maxHeadFields)
	}
	if n := c.HTTP.MaxHeldBytes; n != 0 && n < minHeldBytes {
		return invalid("HTTP.MaxHeldBytes", "%d is too small; use %d or more, or 0 for a share of the memory limit", n, minHeldBytes)
	}
	if domain := c.Workload.ClusterDomain; strings.Trim(domain, "abcdefghijklmnopqrstuvwxyz0123456789-.") != "" || len(domain) > 253 {
		return invalid("Workload.ClusterDomain", "%.80q is not a domain in lower case; use one such as cluster.local", domain)
	}
	if n := c.Metrics.MaxSeries; n < metrics.MinMaxSeries || n > metrics.MaxMaxSeries {
		return invalid("Metrics.MaxSeries", "%d is out of range; use %d to %d", n, metrics.MinMaxSeries, metrics.MaxMaxSeries)
	}
	return nil
}

func (i Interception) validate() error {
	if i.Mode != capture.Redirect && i.Mode != capture.TPROXY {
		return invalid("Interception.Mode", "%q is not a mode; use %s or %s", i.Mode, capture.Redirect, capture.TPROXY)
	}
	if i.Mode == capture.TPROXY && (i.TPROXYMark == 0 || i.TPROXYMark == capture.LoopMark) {
		return invalid("Interception.TPROXYMark", "%d is reserved; use the rules' mark, which is neither 0 nor %d", i.TPROXYMark, capture.LoopMark)
	}
	return nil
}
