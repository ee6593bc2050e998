// Package agent is the housekeeper: it builds every part, binds the ports, starts, drains and stops.
package agent

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"time"

	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/internal/dns"
	"github.com/pillion-proxy/pillion/internal/httpforward"
	"github.com/pillion-proxy/pillion/internal/podinfo"
)

// Config is what an agent needs. Validate says what is wrong with it.
type Config struct {
	OutboundPort  uint16 // where rules redirect what the workload opens
	InboundPort   uint16 // where rules redirect what others open
	ReadinessPort uint16 // /healthz
	StatusPort    uint16 // probes, merged metrics, orders of the pod; zero: not served
	MetricsPort   uint16 // the agent's own metrics; zero: not served
	AdminPort     uint16 // Envoy's admin paths and the live page, on loopback; zero: not served, and nothing is kept for it

	Mode       capture.Mode // how inbound connections come
	TPROXYMark uint32       // with capture.TPROXY, of what is sent from a client's address; the rules know it

	ConnectTimeout   time.Duration // for a dial upstream; zero leaves it to the kernel
	IdleTimeout      time.Duration // ends connections in which nothing moves; zero: never
	HalfCloseTimeout time.Duration // the same once one side has closed; zero: never
	MaxConnections   int           // inbound and outbound together; zero: as many as there are descriptors

	OpaquePorts          capture.Ports // destination ports whose bytes nobody looks at
	DetectionDelay       time.Duration // how long a connection may be silent before its upstream is dialled
	DetectionHold        time.Duration // how long a beginning that could become anything is held
	InboundProxyProtocol capture.Ports // inbound ports whose workload wants a PROXY protocol header

	MaxHeadBytes        int           // of the head of an HTTP message
	MaxHeadFields       int           // in the head of an HTTP message
	RequestHeadTimeout  time.Duration // for the head of a request; zero: for ever
	RequestTimeout      time.Duration // for the response; zero: for ever
	UpstreamIdleTimeout time.Duration // closes idle HTTP/1 connections to upstreams; zero keeps none
	InboundFields       httpforward.Fields
	OutboundFields      httpforward.Fields

	DNSCapture   bool             // serve the workload's DNS queries, which rules redirect to port 15053
	DNSServers   []netip.AddrPort // who answers them; none: those of /etc/resolv.conf
	DNSCacheSize int              // answers that are kept; zero keeps none

	DrainDelay   time.Duration // from the announcement to the closing of the listeners
	DrainTimeout time.Duration // from the beginning of the shutdown to the cutting of what is left

	AccessLog        AccessLog
	AppProbers       string // the value of ISTIO_KUBE_APP_PROBERS
	ProbeLocalhost   bool   // probes go to localhost, in place of the pod's address
	ProbeHTTP2       bool   // HTTPS probes may use HTTP/2
	ProbeKeepAlive   bool   // HTTP probes keep their connection
	ScrapeTargets    string // the value of ISTIO_PROMETHEUS_ANNOTATIONS
	MetricsLocalOnly bool   // merged metrics are for this pod's processes alone
	Profiling        bool   // /debug/pprof/ on the status port, for this pod's processes alone

	// SettingName spells a field of Config for people, such as --connect-timeout for ConnectTimeout. nil: as it is.
	SettingName func(field string) string

	Version  string
	Pod      podinfo.Pod
	Log      *slog.Logger
	LogLevel *slog.LevelVar // of Log, which orders may change
}

// What a limit of heads may be. A connection may make the agent keep so much.
const (
	minHeadBytes  = 1 << 10
	maxHeadBytes  = 8 << 20
	maxHeadFields = 100_000
)

// Default is the configuration of an agent that nobody has told anything, but for its logger.
func Default() Config {
	return Config{
		OutboundPort:        15001,
		InboundPort:         15006,
		ReadinessPort:       15021,
		StatusPort:          15020,
		MetricsPort:         15090,
		AdminPort:           15000,
		Mode:                capture.Redirect,
		TPROXYMark:          1337,
		ConnectTimeout:      10 * time.Second,
		HalfCloseTimeout:    5 * time.Minute,
		DetectionDelay:      5 * time.Millisecond,
		DetectionHold:       time.Second,
		MaxHeadBytes:        256 << 10,
		MaxHeadFields:       1000,
		RequestHeadTimeout:  time.Minute,
		UpstreamIdleTimeout: 3 * time.Second,
		InboundFields: httpforward.Fields{
			ForwardedFor: httpforward.ForwardedForSetIfAbsent, ForwardedProto: true, RequestID: true, ServiceTime: true,
		},
		OutboundFields: httpforward.Fields{ForwardedProto: true, RequestID: true, ServiceTime: true},
		DNSCacheSize:   dns.DefaultCacheSize,
		DrainDelay:     5 * time.Second,
		DrainTimeout:   20 * time.Second,
		AccessLog:      AccessLog{Path: "/dev/stdout", Encoding: "text"},
		Profiling:      true,
		Pod:            podinfo.Nobody(),
		LogLevel:       new(slog.LevelVar),
	}
}

// mayBeOff are the ports that 0 turns off.
var mayBeOff = []string{"--status-port", "--metrics-port", "--admin-port"}

// Validate returns the first thing that is wrong, named by its flag.
func (c Config) Validate() error {
	ports := map[uint16]string{}
	for _, p := range []struct {
		flag string
		port uint16
	}{
		{"--outbound-port", c.OutboundPort}, {"--inbound-port", c.InboundPort}, {"--readiness-port", c.ReadinessPort},
		{"--status-port", c.StatusPort}, {"--metrics-port", c.MetricsPort}, {"--admin-port", c.AdminPort},
	} {
		if p.port == 0 && slices.Contains(mayBeOff, p.flag) {
			continue
		}
		if p.port == 0 {
			return fmt.Errorf("%s: port 0 is not a port; use 1 to 65535", p.flag)
		}
		if other, taken := ports[p.port]; taken {
			return fmt.Errorf("%s: port %d is %s's already; give each its own", p.flag, p.port, other)
		}
		ports[p.port] = p.flag
	}
	for _, d := range []struct {
		flag     string
		duration time.Duration
	}{
		{"--connect-timeout", c.ConnectTimeout}, {"--idle-timeout", c.IdleTimeout},
		{"--half-close-timeout", c.HalfCloseTimeout},
		{"--detection-delay", c.DetectionDelay}, {"--detection-hold", c.DetectionHold},
		{"--request-head-timeout", c.RequestHeadTimeout}, {"--request-timeout", c.RequestTimeout},
		{"--upstream-idle-timeout", c.UpstreamIdleTimeout}, {"--drain-delay", c.DrainDelay}, {"--drain-timeout", c.DrainTimeout},
	} {
		if d.duration < 0 {
			return fmt.Errorf("%s: %v is negative; use 0s or more", d.flag, d.duration)
		}
	}
	if c.DrainDelay > c.DrainTimeout {
		return fmt.Errorf("--drain-delay: %v is longer than --drain-timeout (%v), which counts from the same moment", c.DrainDelay, c.DrainTimeout)
	}
	if c.MaxConnections < 0 {
		return fmt.Errorf("--max-connections: %d is negative; use 0 for no limit", c.MaxConnections)
	}
	if c.MaxHeadBytes < minHeadBytes || c.MaxHeadBytes > maxHeadBytes {
		return fmt.Errorf("--max-head-bytes: %d is out of range; use %d to %d", c.MaxHeadBytes, minHeadBytes, maxHeadBytes)
	}
	if c.MaxHeadFields < 1 || c.MaxHeadFields > maxHeadFields {
		return fmt.Errorf("--max-head-fields: %d is out of range; use 1 to %d", c.MaxHeadFields, maxHeadFields)
	}
	if c.Mode != capture.Redirect && c.Mode != capture.TPROXY {
		return fmt.Errorf("--interception-mode: %q is not a mode; use %s or %s", c.Mode, capture.Redirect, capture.TPROXY)
	}
	if c.Mode == capture.TPROXY && (c.TPROXYMark == 0 || c.TPROXYMark == capture.LoopMark) {
		return fmt.Errorf("--tproxy-mark: %d cannot be the mark; use that of the rules, which is neither 0 nor %d", c.TPROXYMark, capture.LoopMark)
	}
	if err := c.AccessLog.validate(); err != nil {
		return err
	}
	if c.Log == nil || c.LogLevel == nil {
		return errors.New("agent: Config.Log and Config.LogLevel are required")
	}
	return nil
}
