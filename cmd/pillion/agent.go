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
	"github.com/pillion-proxy/pillion/internal/logring"
	"github.com/pillion-proxy/pillion/internal/podinfo"
	"github.com/pillion-proxy/pillion/internal/tracing"
)

// newAgent is `pillion agent`.
func newAgent() *cobra.Command {
	o := newAgentOptions()
	cmd := &cobra.Command{
		Use:   "agent",
		Short: "Forward the traffic that the rules redirect",
		Long: `Forward the traffic that the rules of "pillion init" redirect, in and out.

Run it beside the workload, as the user that the rules exempt (1337). It needs no capability. It writes no file except the
access log, if --access-log names one. With --interception-mode TPROXY the workload sees its clients' addresses; that
requires user 0, group 1337 and the capability NET_ADMIN.

SIGTERM starts a shutdown that lets connections finish; a second SIGTERM cuts them. The exit status is 0 if all
connections finished, and 1 if some were cut. SIGHUP reopens the access log.

The workload's identity, probes and metrics are read from the variables of Istio's injector, such as POD_NAME,
INSTANCE_IP, ISTIO_KUBE_APP_PROBERS and ISTIO_PROMETHEUS_ANNOTATIONS. If they name a control plane, istiod configures the agent; they
identify the workload to it, as CA_ADDR and ISTIO_META_CLUSTER_ID do.

Each flag can also be set by the environment variable in brackets.`,
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

// agentOptions holds the values of the agent's flags.
type agentOptions struct {
	config        agent.Config
	level, format string        // of the log
	grace         time.Duration // terminationGracePeriodSeconds of the pod; zero: unknown
	memory        int           // limit in bytes; zero: the container's
	controlPlane  string        // auto, off or an address
	kept          string        // auto, off or a directory
	recent        logring.Ring  // the last lines of the log

	asSidecar   bool           // started as Istio's sidecar
	proxyConfig map[string]any // Istio's ProxyConfig; may be nil
	volumes     string         // below which the injector's volumes are mounted; empty: the root directory
}

func newAgentOptions() *agentOptions {
	return &agentOptions{config: agent.Default(), level: "info", format: "text", controlPlane: automatic, kept: automatic}
}

// bind adds the flags and the environment variables that set them.
func (o *agentOptions) bind(flags *pflag.FlagSet) {
	config := &o.config
	flags.SortFlags = false
	portFlag(flags, &config.Ports.Outbound, "outbound-port", "port to which the rules redirect outbound connections; bound to loopback")
	portFlag(flags, &config.Ports.Inbound, "inbound-port", "port to which the rules redirect inbound connections")
	portFlag(flags, &config.Ports.Readiness, "readiness-port", "port of /healthz/ready and /healthz/live")
	optionalPortFlag(flags, &config.Ports.Status, "status-port", "port of the workload's probes, the merged metrics, /quitquitquit and /drain; 0: off")
	optionalPortFlag(flags, &config.Ports.Metrics, "metrics-port", "port of the agent's own metrics; 0: off")
	optionalPortFlag(flags, &config.Ports.Admin, "admin-port", "port of Envoy's admin paths and the live page, on loopback; 0: off")
	mode := func(text string) (capture.Mode, error) {
		if m := capture.Mode(text); m == capture.Redirect || m == capture.TPROXY {
			return m, nil
		}
		return "", fmt.Errorf("use one of %s, %s, as for init", capture.Redirect, capture.TPROXY)
	}
	parsed(flags, &config.Interception.Mode, mode, "interception-mode", "", string(config.Interception.Mode), "REDIRECT|TPROXY", "how the rules bring inbound connections; with TPROXY the workload sees the clients' addresses")
	parsed(flags, &config.Interception.TPROXYMark, capture.ParseNumber, "tproxy-mark", "", "1337", "mark", "with TPROXY, the packet mark that the rules use")
	durationFlag(flags, &config.Connections.ConnectTimeout, "connect-timeout", "time limit for connecting upstream, with all attempts; 0s leaves it to the kernel")
	durationFlag(flags, &config.Connections.IdleTimeout, "idle-timeout", "close a connection that is idle for this long; 0s: never")
	durationFlag(flags, &config.Connections.HalfCloseTimeout, "half-close-timeout", "the same once one side has closed; 0s: never")
	portsFlag(flags, &config.Connections.OpaquePorts, "opaque-ports", "destination ports without protocol detection, such as 3306,5000:5010; * for all")
	durationFlag(flags, &config.Connections.DetectionDelay, "detection-delay", "connect upstream if the client sends nothing for this long")
	durationFlag(flags, &config.Connections.DetectionHold, "detection-hold", "hold first bytes that may still become HTTP or TLS at most this long")
	portsFlag(flags, &config.Connections.InboundProxyProtocol, "inbound-proxy-protocol-ports", "inbound ports where the workload receives a PROXY protocol v2 header; they are opaque")
	countFlag(flags, &config.HTTP.MaxHeadBytes, "max-head-bytes", "maximum size of a message head in bytes; larger requests get 431, larger responses become 502")
	countFlag(flags, &config.HTTP.MaxHeadFields, "max-head-fields", "maximum number of header fields, with the same effect")
	parsed(flags, &config.HTTP.MaxHeldBytes, parseBytes, "max-held-bytes", "", "0", "bytes", "memory for unfinished heads, header blocks and held bodies of all connections, as 32Mi; beyond it the largest get 503 or a reset; 0: a quarter of the memory limit")
	durationFlag(flags, &config.HTTP.RequestHeadTimeout, "request-head-timeout", "time limit for the head of a request, then 408; 0s: no limit")
	durationFlag(flags, &config.HTTP.RequestTimeout, "request-timeout", "time limit from a complete request to the start of its response, then 504; 0s: no limit")
	durationFlag(flags, &config.HTTP.UpstreamIdleTimeout, "upstream-idle-timeout", "close HTTP/1 connections to the workload that no client has used for this long; 0s: at once")
	parsed(flags, &config.HTTP.InboundFields.ForwardedFor, parseForwardedFor, "x-forwarded-for", "", "set-if-absent", "set-if-absent|append|off", "how x-forwarded-for of inbound requests gets the client's address")
	switchFlag(flags, "x-forwarded-proto", "set x-forwarded-proto in requests without it", &config.HTTP.InboundFields.ForwardedProto, &config.HTTP.OutboundFields.ForwardedProto)
	switchFlag(flags, "x-request-id", "set x-request-id in requests without it", &config.HTTP.InboundFields.RequestID, &config.HTTP.OutboundFields.RequestID)
	switchFlag(flags, "x-envoy-upstream-service-time", "set x-envoy-upstream-service-time in responses", &config.HTTP.InboundFields.ServiceTime, &config.HTTP.OutboundFields.ServiceTime)
	countFlag(flags, &config.Connections.Max, "max-connections", "limit of open connections, inbound and outbound together; 0: limited by file descriptors only")
	parsed(flags, &o.memory, parseBytes, "memory-limit", "", "0", "bytes", "memory that the process may use, as 128Mi; 0: the container's limit; GOMEMLIMIT can lower it")
	durationFlag(flags, &config.Drain.Delay, "drain-delay", "on shutdown, keep accepting this long after readiness fails")
	durationFlag(flags, &config.Drain.Timeout, "drain-timeout", "on shutdown, cut the remaining connections this long after readiness fails")
	parsed(flags, &o.grace, parseGrace, "termination-grace-period", "", "0s", "duration", "the pod's terminationGracePeriodSeconds, as 30 or 30s; minus a margin, it is the limit of --drain-timeout and its default; 0s: unknown")
	parsed(flags, &o.controlPlane, parseControlPlane, "control-plane", "", o.controlPlane, "auto|off|address", "address of the istiod that configures the agent, as HOST:PORT; auto: that of the pod's Istio configuration, if it has a root certificate or a token for it; off: none")
	durationFlag(flags, &config.ControlPlane.Wait, "configuration-wait", "with a control plane, hold connections at most this long for the first configuration, then refuse them; 0s: refuse at once")
	parsedSwitch(flags, &config.ControlPlane.StrictPaths, "strict-paths", "", "with a control plane, answer inbound requests 400 whose path servers may read in different ways")
	parsedSwitch(flags, &config.ControlPlane.Rejudge, "rejudge-connections", "", "with a control plane, reset an inbound connection that is not HTTP, or one of a gateway, at once when a changed policy denies it")
	textFlag(flags, &o.kept, "kept-configuration", "path|off|auto", "directory that keeps the last configuration for a restart; auto: "+memoryVolume+" if it exists")
	parsedSwitch(flags, &config.DNS.Capture, "dns-capture", "", "answer the workload's DNS queries that init --redirect-dns redirects to port 15053")
	parsed(flags, &config.DNS.Servers, parseServers, "dns-servers", "", "", "addresses", "DNS servers to ask, separated by commas; empty: those in "+agent.ResolvConf)
	countFlag(flags, &config.DNS.CacheSize, "dns-cache-size", "number of cached DNS answers; 0: no cache")
	unlisted := func(text string) (bool, error) {
		if text != allowAny && text != denyUnlisted {
			return false, fmt.Errorf("use one of %s, %s", allowAny, denyUnlisted)
		}
		return text == denyUnlisted, nil
	}
	parsed(flags, &config.Policy.DenyUnlisted, unlisted, "outbound-policy", "", allowAny, allowAny+"|"+denyUnlisted, "whether the workload may reach destinations without a rule")
	rulesFlag(flags, &config.Policy.Allow, "allow", "with --outbound-policy deny-unlisted, destinations that are allowed: a host such as example.com or *.example.com, an address or a network, with :PORT for one port; several are separated by commas")
	rulesFlag(flags, &config.Policy.Deny, "deny", "destinations that are denied, as for --allow; they take precedence")
	textFlag(flags, &config.Policy.File, "outbound-policy-file", "path", "file with further rules, one on a line; it is read again when it changes")
	textFlag(flags, &config.AccessLog.Path, "access-log", "path", "file of the access log, with a line for each connection and request; off: no log; empty: /dev/stdout, but with a control plane the logs that it configures")
	choiceFlag(flags, &config.AccessLog.Encoding, "access-log-encoding", "encoding of the lines", "text", "json")
	textFlag(flags, &config.AccessLog.Format, "access-log-format", "format", "format of a line, in Envoy's command operators; with json, an object of them; empty: Istio's format")
	textFlag(flags, &config.AccessLog.Filter, "access-log-filter", "filter", "filter of the lines, such as \"errors; status=4xx,slower=250ms; sample=1%\"")
	parsedSwitch(flags, &config.AccessLog.TCPStart, "access-log-tcp-start", "", "also write a line when an opaque connection begins")
	durationFlag(flags, &config.AccessLog.Interval, "access-log-interval", "write a line at this interval for opaque connections that stay open; 0s: never")
	textFlag(flags, &config.Workload.ClusterDomain, "cluster-domain", "domain", "DNS domain of the cluster, for names of services in metrics; empty: that of the search list in "+agent.ResolvConf)
	countFlag(flags, &config.Metrics.MaxSeries, "metrics-max-series", "upper limit of the series in a scrape of the agent's own metrics, 5000 to 100000")
	switchFlag(flags, "profiling", "serve /debug/pprof/ on the status port, to processes of the pod only", &config.Status.Profiling)
	choiceFlag(flags, &o.level, "log-level", "lowest level that is logged; debug logs each connection and request", "debug", "info", "warn", "error")
	choiceFlag(flags, &o.format, "log-format", "encoding of the log on standard error", "text", "json")
	for _, name := range flagNames(flags) {
		variables := []string{"PILLION_" + strings.ToUpper(strings.ReplaceAll(name, "-", "_"))}
		if injected := injectedVariables[name]; injected != "" {
			variables = append(variables, injected)
		}
		twin(flags, name, variables...)
	}
}

// The values of --outbound-policy.
const (
	allowAny     = "allow-any"
	denyUnlisted = "deny-unlisted"
)

const interceptionVariable = "ISTIO_META_INTERCEPTION_MODE"

// injectedVariables are variables of Istio's injector that set a flag.
var injectedVariables = map[string]string{
	"interception-mode":        interceptionVariable,
	"dns-capture":              "ISTIO_META_DNS_CAPTURE",
	"readiness-port":           "ENVOY_STATUS_PORT",
	"metrics-port":             "ENVOY_PROMETHEUS_PORT",
	"termination-grace-period": "TERMINATION_GRACE_PERIOD",
}

// run runs the agent that the flags describe. The caller has applied the environment.
func (o *agentOptions) run(flags *pflag.FlagSet) error {
	if err := o.prepare(flags); err != nil {
		return err
	}
	if err := o.findControlPlane(); err != nil {
		return err
	}
	return runAgent(o.config)
}

// prepare completes the configuration by what no flag sets, and limits the memory of this process.
func (o *agentOptions) prepare(flags *pflag.FlagSet) error {
	o.config.Log, o.config.RecentLog = o.newLogger(), &o.recent
	o.config.Version, o.config.SettingName = version, settingFlag
	o.fitDrain(flags)
	readPod(&o.config)
	var err error
	if o.config.Tracing, err = tracing.FromEnvironment(os.Getenv); err != nil {
		return valueError{err}
	}
	if o.config.SpanAttributes, err = tracing.ResourceFromEnvironment(os.Getenv); err != nil {
		return valueError{err}
	}
	if err := limitMemory(int64(o.memory), controlGroup); err != nil {
		o.config.Log.Warn("cannot apply the container's memory limit", "error", err)
	}
	if o.config.Gateway {
		collectLess()
	}
	return nil
}

// drainMargin is the part of a grace period that remains after the drain, for the kubelet and for flushing logs.
const drainMargin = 5 * time.Second

// fitDrain fits the drain into the grace period, after which the kubelet kills the container. A timeout that was not set
// becomes the whole period minus the margin, so that no connection is cut early.
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
		o.config.Log.Warn("drain delay shortened to fit the grace period",
			"drain_delay", o.config.Drain.Delay, "shortened_to", limit, "termination_grace_period", o.grace)
		o.config.Drain.Delay = limit
	}
}

// runAgent runs an agent until signals end it.
func runAgent(config agent.Config) error {
	hangUps := make(chan os.Signal, 1)
	signal.Notify(hangUps, syscall.SIGHUP)
	defer close(hangUps)
	defer signal.Stop(hangUps)

	// The channel holds two signals, so that a second one is not lost while the first is handled.
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT)
	defer signal.Stop(signals)

	a, err := agent.New(config)
	if err != nil {
		return valueUnlessSystem(flagNamed(err))
	}
	warnIfCaptured(config.Log, uint32(os.Geteuid()), uint32(os.Getegid()))
	drain, startDrain := context.WithCancel(context.Background())
	force, startForce := context.WithCancel(context.Background())
	defer startForce()
	defer startDrain()
	go func() {
		config.Log.Info("shutting down", "signal", (<-signals).String())
		startDrain()
		config.Log.Warn("cutting connections", "signal", (<-signals).String())
		startForce()
	}()
	go func() {
		for range hangUps {
			a.ReopenLogs()
		}
	}()
	return flagNamed(a.Run(drain, force))
}

// readPod reads the workload's description from the variables of Istio's injector. Unreadable labels are logged, not fatal.
func readPod(config *agent.Config) {
	pod, err := podinfo.Read(os.Getenv, podinfo.LabelsFile)
	if err != nil {
		config.Log.Warn("cannot read all of the pod's labels", "error", err)
	}
	config.Workload.Pod = pod
	config.Workload.Probers = os.Getenv("ISTIO_KUBE_APP_PROBERS")
	config.Workload.ScrapeTargets = os.Getenv("ISTIO_PROMETHEUS_ANNOTATIONS")
	if config.Workload.ClusterDomain == "" {
		config.Workload.ClusterDomain = podinfo.ClusterDomain(agent.ResolvConf)
	}
	for variable, target := range map[string]*bool{
		"REWRITE_PROBE_LEGACY_LOCALHOST_DESTINATION": &config.Workload.ProbeLocalhost,
		"ENABLE_PROBE_KEEPALIVE_CONNECTIONS":         &config.Workload.ProbeKeepAlive,
		"ISTIO_ENABLE_HTTP2_PROBING":                 &config.Workload.ProbeHTTP2,
		"METRICS_LOCALHOST_ACCESS_ONLY":              &config.Status.MetricsLocalOnly,
	} {
		*target, _ = strconv.ParseBool(os.Getenv(variable)) // an invalid value means off, as in pilot-agent
	}
}

// newLogger logs to standard error and to the ring, from the level on that the flag sets. The agent can change the level.
func (o *agentOptions) newLogger() *slog.Logger {
	adjustable := o.config.LogLevel
	if err := adjustable.UnmarshalText([]byte(o.level)); err != nil {
		panic(err) // the flag accepts valid levels only
	}
	options := slog.HandlerOptions{Level: adjustable}
	var stderr slog.Handler = slog.NewTextHandler(os.Stderr, &options)
	if o.format == "json" {
		stderr = slog.NewJSONHandler(os.Stderr, &options)
	}
	return slog.New(slog.NewMultiHandler(stderr, o.recent.Handler(adjustable)))
}
