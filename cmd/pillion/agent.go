package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/pillion-proxy/pillion/agent"
	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/internal/podinfo"
)

// newAgent is `pillion agent`.
func newAgent() *cobra.Command {
	o := newAgentOptions()
	cmd := &cobra.Command{
		Use:   "agent",
		Short: "Carry the traffic that the rules redirect",
		Long: `Carry the traffic that the rules of "pillion init" redirect, in and out.

Run it beside the workload, as the user that the rules leave alone (1337). It needs no capability, and writes no file
but the access log, if that is told to be one. With --interception-mode TPROXY the workload sees its clients' own
addresses; that needs user 0, group 1337 and the capability NET_ADMIN. SIGTERM begins a shutdown that lets connections finish; a second one ends
it at once. The exit status is 0 when every connection had its time, and 1 when some were cut. SIGHUP opens the access
log anew.

Who the workload is, its probes and its metrics are taken from the variables of Istio's injector, such as POD_NAME,
INSTANCE_IP, ISTIO_KUBE_APP_PROBERS and ISTIO_PROMETHEUS_ANNOTATIONS.

Each flag can be given by the environment variable in brackets instead.`,
		Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := applyEnvironment(cmd.Flags()); err != nil {
				return err
			}
			return o.run(cmd.Flags())
		},
	}
	o.bind(cmd.Flags())
	return cmd
}

// agentOptions are what the flags of an agent say.
type agentOptions struct {
	config        agent.Config
	level, format string        // of the log
	grace         time.Duration // of the pod; zero: not known
}

func newAgentOptions() *agentOptions {
	return &agentOptions{config: agent.Default(), level: "info", format: "text"}
}

// bind adds the flags and their twins.
func (o *agentOptions) bind(flags *pflag.FlagSet) {
	config := &o.config
	flags.SortFlags = false
	portFlag(flags, &config.Ports.Outbound, "outbound-port", "where the rules redirect what the workload opens; bound to loopback")
	portFlag(flags, &config.Ports.Inbound, "inbound-port", "where the rules redirect what others open to the workload")
	portFlag(flags, &config.Ports.Readiness, "readiness-port", "serves /healthz/ready and /healthz/live")
	optionalPortFlag(flags, &config.Ports.Status, "status-port", "serves the workload's probes and metrics, and orders of its pod; 0 for none")
	optionalPortFlag(flags, &config.Ports.Metrics, "metrics-port", "serves the agent's own metrics; 0 for none")
	optionalPortFlag(flags, &config.Ports.Admin, "admin-port", "serves Envoy's admin paths and the live page, on loopback; 0 for none")
	mode := func(text string) (capture.Mode, error) {
		if m := capture.Mode(text); m == capture.Redirect || m == capture.TPROXY {
			return m, nil
		}
		return "", fmt.Errorf("use one of %s, %s, as for init", capture.Redirect, capture.TPROXY)
	}
	parsed(flags, &config.Interception.Mode, mode, "interception-mode", "", string(config.Interception.Mode), "REDIRECT|TPROXY", "how the rules bring what others open; with TPROXY the workload sees their addresses")
	parsed(flags, &config.Interception.TPROXYMark, capture.ParseNumber, "tproxy-mark", "", "1337", "mark", "with TPROXY, the mark that the rules know")
	durationFlag(flags, &config.Connections.ConnectTimeout, "connect-timeout", "how long a dial upstream may take; 0s leaves it to the kernel")
	durationFlag(flags, &config.Connections.IdleTimeout, "idle-timeout", "end a connection in which nothing moves for so long; 0s never")
	durationFlag(flags, &config.Connections.HalfCloseTimeout, "half-close-timeout", "the same once one side has closed; 0s never")
	portsFlag(flags, &config.Connections.OpaquePorts, "opaque-ports", "destination ports whose bytes nobody looks at, such as 3306,5000:5010; * for all")
	durationFlag(flags, &config.Connections.DetectionDelay, "detection-delay", "dial upstream when downstream has said nothing for so long")
	durationFlag(flags, &config.Connections.DetectionHold, "detection-hold", "hold a beginning that could still be HTTP or TLS at most so long")
	portsFlag(flags, &config.Connections.InboundProxyProtocol, "inbound-proxy-protocol-ports", "inbound ports whose workload gets a PROXY protocol v2 header; they are opaque")
	countFlag(flags, &config.HTTP.MaxHeadBytes, "max-head-bytes", "answer 431 to a request whose head is larger, and 502 in place of such a response")
	countFlag(flags, &config.HTTP.MaxHeadFields, "max-head-fields", "the same for the number of fields")
	durationFlag(flags, &config.HTTP.RequestHeadTimeout, "request-head-timeout", "answer 408 when the head of a request takes longer; 0s never")
	durationFlag(flags, &config.HTTP.RequestTimeout, "request-timeout", "answer 504 when the response to a whole request takes longer to begin; 0s never")
	durationFlag(flags, &config.HTTP.UpstreamIdleTimeout, "upstream-idle-timeout", "close HTTP/1 connections to upstreams that have been idle so long; 0s keeps none")
	parsed(flags, &config.HTTP.InboundFields.ForwardedFor, parseForwardedFor, "x-forwarded-for", "", "set-if-absent", "set-if-absent|append|off", "what inbound requests get, with the address of the peer")
	switchFlag(flags, "x-forwarded-proto", "set x-forwarded-proto in requests that have none", &config.HTTP.InboundFields.ForwardedProto, &config.HTTP.OutboundFields.ForwardedProto)
	switchFlag(flags, "x-request-id", "set x-request-id in requests that have none", &config.HTTP.InboundFields.RequestID, &config.HTTP.OutboundFields.RequestID)
	switchFlag(flags, "x-envoy-upstream-service-time", "set x-envoy-upstream-service-time in responses", &config.HTTP.InboundFields.ServiceTime, &config.HTTP.OutboundFields.ServiceTime)
	countFlag(flags, &config.Connections.Max, "max-connections", "inbound and outbound together; 0 for no limit but the descriptors")
	durationFlag(flags, &config.Drain.Delay, "drain-delay", "on shutdown, go on accepting for so long after readiness turned off")
	durationFlag(flags, &config.Drain.Timeout, "drain-timeout", "on shutdown, cut what is left so long after readiness turned off")
	parsed(flags, &o.grace, parseGrace, "termination-grace-period", "", "0s", "duration", "of the pod, as 30 or 30s: the drain timeout, if none is given, is this without a margin, and never more; 0s: not known")
	parsedSwitch(flags, &config.DNS.Capture, "dns-capture", "", "answer the workload's DNS queries, which init --redirect-dns sends to port 15053")
	parsed(flags, &config.DNS.Servers, parseServers, "dns-servers", "", "", "addresses", "who is asked, separated by commas; none: the servers of "+agent.ResolvConf)
	countFlag(flags, &config.DNS.CacheSize, "dns-cache-size", "DNS answers that are kept, as long as they live; 0 for none")
	textFlag(flags, &config.AccessLog.Path, "access-log", "path|off", "where a line is written for each connection and request; /dev/stdout is standard output")
	choiceFlag(flags, &config.AccessLog.Encoding, "access-log-encoding", "form of the lines", "text", "json")
	textFlag(flags, &config.AccessLog.Format, "access-log-format", "format", "what a line says, in Envoy's operators; with json, an object of them. Empty: as Istio has it")
	textFlag(flags, &config.AccessLog.Filter, "access-log-filter", "filter", "which lines are written, such as \"errors; status=4xx,slower=250ms; sample=1%\"")
	parsedSwitch(flags, &config.AccessLog.TCPStart, "access-log-tcp-start", "", "write a line when an opaque connection begins, too")
	durationFlag(flags, &config.AccessLog.Interval, "access-log-interval", "write a line so often for opaque connections that stay open; 0s never")
	switchFlag(flags, "profiling", "serve /debug/pprof/ to processes of the pod, at the status port", &config.Status.Profiling)
	choiceFlag(flags, &o.level, "log-level", "least level that is logged; debug tells of each connection and request", "debug", "info", "warn", "error")
	choiceFlag(flags, &o.format, "log-format", "form of the log on standard error", "text", "json")
	for _, name := range flagNames(flags) {
		variables := []string{"PILLION_" + strings.ToUpper(strings.ReplaceAll(name, "-", "_"))}
		if injected := injectedVariables[name]; injected != "" {
			variables = append(variables, injected)
		}
		twin(flags, name, variables...)
	}
}

const interceptionVariable = "ISTIO_META_INTERCEPTION_MODE"

// injectedVariables are set by Istio's injector, and mean what a flag means.
var injectedVariables = map[string]string{
	"interception-mode":        interceptionVariable,
	"dns-capture":              "ISTIO_META_DNS_CAPTURE",
	"readiness-port":           "ENVOY_STATUS_PORT",
	"metrics-port":             "ENVOY_PROMETHEUS_PORT",
	"termination-grace-period": "TERMINATION_GRACE_PERIOD",
}

// run runs the agent that the flags describe. They must have been set, also from the environment.
func (o *agentOptions) run(flags *pflag.FlagSet) error {
	o.config.Log = newLogger(o.config.LogLevel, o.level, o.format)
	o.config.Version, o.config.SettingName = version, settingFlag
	o.fitDrain(flags)
	readPod(&o.config)
	if err := limitMemory("/sys/fs/cgroup", os.Getenv("GOMEMLIMIT")); err != nil {
		o.config.Log.Warn("the container's memory limit is not heeded", "error", err)
	}
	return runAgent(o.config)
}

// drainMargin is what is left of a grace period when the drain is over: for the kubelet, and to write logs out.
const drainMargin = 5 * time.Second

// fitDrain fits the drain into the grace period, at whose end the kubelet kills. A timeout that nobody gave is all of it
// but the margin, so that nothing is cut early.
func (o *agentOptions) fitDrain(flags *pflag.FlagSet) {
	if o.grace == 0 {
		return
	}
	limit := o.grace - min(drainMargin, o.grace/4)
	if !flags.Changed("drain-timeout") || o.config.Drain.Timeout > limit {
		o.config.Drain.Timeout = limit
	}
	if !flags.Changed("drain-delay") {
		limit /= 2
	}
	if o.config.Drain.Delay > limit {
		o.config.Log.Warn("the drain delay is shortened, as the pod would be killed within it: raise its grace period",
			"drain_delay", o.config.Drain.Delay, "shortened_to", limit, "termination_grace_period", o.grace)
		o.config.Drain.Delay = limit
	}
}

// runAgent runs an agent until the signals end it.
func runAgent(config agent.Config) error {
	hangUps := make(chan os.Signal, 1)
	signal.Notify(hangUps, syscall.SIGHUP)
	defer close(hangUps)
	defer signal.Stop(hangUps)

	// The second signal is waited for from the start: one that comes while the first is handled must not be lost.
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT)
	defer signal.Stop(signals)

	a, err := agent.New(config)
	if err != nil {
		return flagNamed(err)
	}
	drain, startDrain := context.WithCancel(context.Background())
	force, startForce := context.WithCancel(context.Background())
	defer startForce()
	defer startDrain()
	go func() {
		config.Log.Info("shutting down", "signal", (<-signals).String())
		startDrain()
		config.Log.Warn("ending at once", "signal", (<-signals).String())
		startForce()
	}()
	go func() {
		for range hangUps {
			a.ReopenLogs()
		}
	}()
	return a.Run(drain, force)
}

// readPod takes what Istio's injector says of the workload. What cannot be read of the labels is told and done without.
func readPod(config *agent.Config) {
	pod, err := podinfo.Read(os.Getenv, podinfo.LabelsFile)
	if err != nil {
		config.Log.Warn("the pod's labels are incomplete", "error", err)
	}
	config.Workload.Pod = pod
	config.Workload.Probers = os.Getenv("ISTIO_KUBE_APP_PROBERS")
	config.Workload.ScrapeTargets = os.Getenv("ISTIO_PROMETHEUS_ANNOTATIONS")
	for variable, target := range map[string]*bool{
		"REWRITE_PROBE_LEGACY_LOCALHOST_DESTINATION": &config.Workload.ProbeLocalhost,
		"ENABLE_PROBE_KEEPALIVE_CONNECTIONS":         &config.Workload.ProbeKeepAlive,
		"ISTIO_ENABLE_HTTP2_PROBING":                 &config.Workload.ProbeHTTP2,
		"METRICS_LOCALHOST_ACCESS_ONLY":              &config.Status.MetricsLocalOnly,
	} {
		*target, _ = strconv.ParseBool(os.Getenv(variable)) // what is neither is off, as for pilot-agent
	}
}

// newLogger logs from level on, which adjustable can change later.
func newLogger(adjustable *slog.LevelVar, level, format string) *slog.Logger {
	if err := adjustable.UnmarshalText([]byte(level)); err != nil {
		panic(err) // the flag admits no other words
	}
	options := slog.HandlerOptions{Level: adjustable}
	if format == "json" {
		return slog.New(slog.NewJSONHandler(os.Stderr, &options))
	}
	return slog.New(slog.NewTextHandler(os.Stderr, &options))
}
