package main

import (
	"errors"
	"syscall"

	"github.com/pillion-proxy/pillion/agent"
)

// fieldNames are the flags and variables that set the fields of agent.Config, as an error names them.
var fieldNames = map[string]string{
	"Edge":                             "--listen",
	"Ports.Outbound":                   "--outbound-port",
	"Ports.Inbound":                    "--inbound-port",
	"Ports.Readiness":                  "--readiness-port",
	"Ports.Status":                     "--status-port",
	"Ports.Metrics":                    "--metrics-port",
	"Ports.Admin":                      "--admin-port",
	"Interception.Mode":                "--interception-mode",
	"Interception.TPROXYMark":          "--tproxy-mark",
	"Connections.ConnectTimeout":       "--connect-timeout",
	"Connections.IdleTimeout":          "--idle-timeout",
	"Connections.HalfCloseTimeout":     "--half-close-timeout",
	"Connections.Max":                  "--max-connections",
	"Connections.OpaquePorts":          "--opaque-ports",
	"Connections.DetectionDelay":       "--detection-delay",
	"Connections.DetectionHold":        "--detection-hold",
	"Connections.InboundProxyProtocol": "--inbound-proxy-protocol-ports",
	"HTTP.MaxHeadBytes":                "--max-head-bytes",
	"HTTP.MaxHeadFields":               "--max-head-fields",
	"HTTP.MaxHeldBytes":                "--max-held-bytes",
	"HTTP.RequestHeadTimeout":          "--request-head-timeout",
	"HTTP.RequestTimeout":              "--request-timeout",
	"HTTP.UpstreamIdleTimeout":         "--upstream-idle-timeout",
	"ControlPlane.Pod":                 "--control-plane",
	"ControlPlane.Wait":                "--configuration-wait",
	"ControlPlane.Kept":                "--kept-configuration",
	"ControlPlane.StrictPaths":         "--strict-paths",
	"ControlPlane.Rejudge":             "--rejudge-connections",
	"DNS.Capture":                      "--dns-capture",
	"DNS.Servers":                      "--dns-servers",
	"DNS.CacheSize":                    "--dns-cache-size",
	"Policy.DenyUnlisted":              "--outbound-policy",
	"Policy.Allow":                     "--allow",
	"Policy.Deny":                      "--deny",
	"Policy.File":                      "--outbound-policy-file",
	"Drain.Delay":                      "--drain-delay",
	"Drain.Timeout":                    "--drain-timeout",
	"AccessLog.Path":                   "--access-log",
	"AccessLog.Encoding":               "--access-log-encoding",
	"AccessLog.Format":                 "--access-log-format",
	"AccessLog.Filter":                 "--access-log-filter",
	"AccessLog.TCPStart":               "--access-log-tcp-start",
	"AccessLog.Interval":               "--access-log-interval",
	"Metrics.MaxSeries":                "--metrics-max-series",
	"Status.Profiling":                 "--profiling",
	"Status.MetricsLocalOnly":          "METRICS_LOCALHOST_ACCESS_ONLY",
	"Workload.Probers":                 "ISTIO_KUBE_APP_PROBERS",
	"Workload.ProbeLocalhost":          "REWRITE_PROBE_LEGACY_LOCALHOST_DESTINATION",
	"Workload.ProbeKeepAlive":          "ENABLE_PROBE_KEEPALIVE_CONNECTIONS",
	"Workload.ProbeHTTP2":              "ISTIO_ENABLE_HTTP2_PROBING",
	"Workload.ScrapeTargets":           "ISTIO_PROMETHEUS_ANNOTATIONS",
	"Workload.ClusterDomain":           "--cluster-domain",
	"Workload.Pod.IP":                  "INSTANCE_IP",
}

// flagNamed rewrites an error about a field of agent.Config to name the field's flag or variable.
func flagNamed(err error) error {
	var field *agent.FieldError
	if !errors.As(err, &field) {
		return err
	}
	return &namedError{field.Text(fieldName), field}
}

func fieldName(field string) string {
	if name := fieldNames[field]; name != "" {
		return name
	}
	return field
}

// valueUnlessSystem makes err a valueError unless a system call failed, such as bind(2) for a port that is in use.
func valueUnlessSystem(err error) error {
	if err == nil || errors.As(err, new(syscall.Errno)) {
		return err
	}
	return valueError{err}
}

// namedError is an error with another text.
type namedError struct {
	text string
	err  error
}

func (e *namedError) Error() string { return e.text }
func (e *namedError) Unwrap() error { return e.err }
