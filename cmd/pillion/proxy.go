package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/pillion-proxy/pillion/internal/podinfo"
	"github.com/pillion-proxy/pillion/internal/proxyconfig"
)

// newProxy is `pillion proxy`, with the arguments and the variables of `pilot-agent proxy`.
func newProxy() *cobra.Command {
	p := newProxyOptions()
	cmd := &cobra.Command{
		Use:   "proxy [sidecar|router]",
		Short: "Run the agent as Istio's injector starts a sidecar or a gateway",
		Long: `Run "pillion agent" as Istio's injector starts its own sidecar: with pilot-agent's arguments and variables. With router, the
agent is a gateway: it captures no traffic, and accepts connections at the listeners that istiod sends it.

Istio's configuration is read from the annotation proxy.istio.io/config in ` + podinfo.AnnotationsFile + `, the variable
PROXY_CONFIG and the file of --meshConfig, in this order of precedence. Flags of "pillion agent" and their PILLION_
variables override all three. istiod configures the agent unless --control-plane is off. Unknown flags are ignored.
The log names each setting without effect once.`,
		// RunE parses the flags itself, because the log names the unknown ones.
		DisableFlagParsing: true,
		RunE: func(cmd *cobra.Command, args []string) error {
			flags := cmd.Flags()
			p.unknown = unknownFlags(flags, args)
			flags.ParseErrorsAllowlist.UnknownFlags = true
			if err := flags.Parse(args); err != nil {
				return flagError(cmd, err)
			}
			if help, _ := flags.GetBool("help"); help {
				return cmd.Help()
			}
			if role := flags.Args(); len(role) > 0 && role[0] != "sidecar" && role[0] != "router" {
				return usageError{Err: fmt.Errorf("role %q is not supported: only \"proxy sidecar\" and \"proxy router\" are; waypoints need Envoy", role[0])}
			} else if len(role) > 0 {
				p.config.Gateway = role[0] == "router"
			}
			if err := p.settle(flags); err != nil {
				return err
			}
			return p.agentOptions.run(flags)
		},
	}
	p.bind(cmd.Flags())
	return cmd
}

// proxyOptions are an agent's options, and where Istio's configuration is read from.
type proxyOptions struct {
	*agentOptions
	concurrency int
	meshConfig  string // a file
	annotations string // a file
	istioLevel  string // from --log_output_level
	json        bool
	domain      string   // of the pod; its part after .svc. is the cluster's
	unknown     []string // flags without a meaning here
	idle        []string // keys of the configuration without effect
}

func newProxyOptions() *proxyOptions {
	options := newAgentOptions()
	options.asSidecar, options.proxyConfig = true, map[string]any{}
	return &proxyOptions{
		agentOptions: options,
		meshConfig:   "./etc/istio/config/mesh",
		annotations:  podinfo.AnnotationsFile,
	}
}

func (p *proxyOptions) bind(flags *pflag.FlagSet) {
	p.agentOptions.bind(flags)
	flags.Lookup("profiling").NoOptDefVal = "true" // pilot-agent's command line has it without a value
	countFlag(flags, &p.concurrency, "concurrency", "number of cores to use; 0: from Istio's configuration or ISTIO_CPU_LIMIT")
	textFlag(flags, &p.meshConfig, "meshConfig", "path", "file of Istio's mesh configuration; may be missing")
	parsed(flags, &p.istioLevel, parseIstioLevel, "log_output_level", "", "", "level", "lowest level that is logged, as default:info; --log-level overrides it")
	parsedSwitch(flags, &p.json, "log_as_json", "", "same as --log-format json")
	textFlag(flags, &p.domain, "domain", "domain", "the pod's DNS domain, as NAMESPACE.svc.DOMAIN; --cluster-domain overrides it")
	for _, name := range ignoredFlags {
		textFlag(flags, new(string), name, "text", "accepted and ignored")
	}
	parsedSwitch(flags, new(bool), "vklog", "", "accepted and ignored")
}

// ignoredFlags are pilot-agent's flags with a value and without a meaning here.
var ignoredFlags = []string{"stsPort", "tokenManagerPlugin", "serviceCluster", "proxyLogLevel", "proxyComponentLogLevel",
	"templateFile", "outlierLogPath", "log_target", "log_stacktrace_level", "log_caller"}

// idleFlags lists the flags without effect on the command line, those of pilot-agent first.
func (p *proxyOptions) idleFlags(flags *pflag.FlagSet) (names []string) {
	for _, name := range append(slices.Clone(ignoredFlags), "vklog") {
		if flags.Changed(name) {
			names = append(names, "--"+name)
		}
	}
	return append(names, p.unknown...)
}

// unknownFlags lists the flags in args that are not in flags.
func unknownFlags(flags *pflag.FlagSet, args []string) (unknown []string) {
	for _, arg := range args {
		name, _, _ := strings.Cut(arg, "=")
		long, isLong := strings.CutPrefix(name, "--")
		switch {
		case arg == "--":
			return unknown
		case isLong && flags.Lookup(long) == nil,
			!isLong && len(name) > 1 && name[0] == '-' && flags.ShorthandLookup(name[1:2]) == nil:
			unknown = append(unknown, name)
		}
	}
	return unknown
}

// settle applies the environment and Istio's configuration to flags that the command line did not set, and limits the cores.
func (p *proxyOptions) settle(flags *pflag.FlagSet) error {
	// With "NONE" the pod has no rules, and the mode does not matter; nor does it for a gateway.
	if os.Getenv(interceptionVariable) == "NONE" || p.config.Gateway {
		os.Unsetenv(interceptionVariable)
	}
	if err := applyEnvironment(flags); err != nil {
		return err
	}
	if _, domain, found := strings.Cut(p.domain, ".svc."); found && !flags.Changed("cluster-domain") {
		p.config.Workload.ClusterDomain = strings.ToLower(strings.TrimSuffix(domain, "."))
	}
	config, broken, err := p.readIstio()
	if err != nil {
		return err
	}
	for _, s := range p.settings(config) {
		if err := s.apply(flags); err != nil {
			return err
		}
	}
	// A longer delay must not take the time that connections get after it.
	if p.config.Drain.Delay > p.config.Drain.Timeout {
		p.config.Drain.Timeout = p.config.Drain.Delay + drainAfterDelay
	}
	log := p.newLogger()
	if broken != nil {
		log.Warn("cannot read all of the pod's annotations", "error", broken)
	}
	if err := p.useCores(config); err != nil {
		return err
	}
	role := "sidecar"
	if p.config.Gateway {
		role, p.config.DNS.Capture = "gateway", false // nothing is captured
	}
	log.Info("running as Istio's "+role, "cores", runtime.GOMAXPROCS(0),
		"without_effect", slices.Concat(slices.Sorted(slices.Values(p.idle)), p.idleFlags(flags), idleVariables(os.Environ(), p.controlPlane != turnedOff)))
	return nil
}

// idleVariables lists variables that configure Istio's agent and have no effect here. Metadata has no effect without a
// control plane.
func idleVariables(environment []string, controlPlane bool) (names []string) {
	known := strings.Fields(`DISABLE_ENVOY DNS_PROXY_ADDR ENVOY_SECURE_METRICS_PORT ENVOY_SECURE_MERGED_METRICS_PORT
		ISTIO_BOOTSTRAP_OVERRIDE JWT_POLICY PILOT_CERT_PROVIDER`)
	prefixes := []string{}
	if !controlPlane {
		known = append(known, strings.Fields("CA_ADDR CA_PROVIDER CA_ROOT_CA FILE_MOUNTED_CERTS OUTPUT_CERTS PROV_CERT SECRET_TTL WORKLOAD_IDENTITY_SOCKET_FILE XDS_ROOT_CA")...)
		prefixes = append(prefixes, "XDS_HEADER_", "CA_HEADER_")
	}
	for _, variable := range environment {
		name, _, _ := strings.Cut(variable, "=")
		hasPrefix := func(prefix string) bool { return strings.HasPrefix(name, prefix) }
		if slices.Contains(known, name) || slices.ContainsFunc(prefixes, hasPrefix) {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

// drainAfterDelay is the time that the defaults leave to connections after the delay.
const drainAfterDelay = 15 * time.Second

// sourced is a value and the name of its source.
type sourced struct {
	proxyconfig.Value
	by string
}

// readIstio reads Istio's configuration, each key from the source of the highest precedence. broken is an error in the
// file of annotations; the valid part of the file is used.
func (p *proxyOptions) readIstio() (config map[string]sourced, broken, err error) {
	annotations, broken := podinfo.Annotations(p.annotations)
	mesh, err := readBounded(p.meshConfig)
	if err != nil {
		return nil, broken, fmt.Errorf("--meshConfig: %w", err)
	}
	config = make(map[string]sourced)
	for _, source := range []struct{ name, text, under string }{
		{"--meshConfig " + p.meshConfig, mesh, "defaultConfig"},
		{"environment variable PROXY_CONFIG", os.Getenv("PROXY_CONFIG"), ""},
		{"annotation proxy.istio.io/config", annotations["proxy.istio.io/config"], ""},
	} {
		part, err := proxyconfig.Parse(source.text)
		if err != nil {
			return nil, broken, valueError{fmt.Errorf("%s: %w", source.name, err)}
		}
		object, err := proxyconfig.Object(source.text)
		if err != nil {
			return nil, broken, valueError{fmt.Errorf("%s: %w", source.name, err)}
		}
		if source.under != "" {
			part = part.Under(source.under)
			object, _ = object[source.under].(map[string]any)
		}
		proxyconfig.Merge(p.proxyConfig, object)
		for key, value := range part {
			config[key] = sourced{value, source.name + ": " + key}
		}
	}
	const statusPort = "status.sidecar.istio.io/port"
	if port, has := annotations[statusPort]; has {
		config["statusPort"] = sourced{proxyconfig.Value{Text: port}, "annotation " + statusPort}
	}
	for key := range maps.Keys(config) {
		top, _, _ := strings.Cut(key, ".")
		if !slices.Contains(effective, top) && !slices.Contains(p.idle, top) && !(p.controlPlane != turnedOff && slices.Contains(discovery, top)) {
			p.idle = append(p.idle, top)
		}
	}
	return config, broken, nil
}

// effective are the keys of Istio's configuration that have an effect, here or in the injector.
var effective = []string{
	"statusPort", "proxyAdminPort", "interceptionMode", "terminationDrainDuration", "drainDuration", "concurrency",
	"holdApplicationUntilProxyStarts", "proxyMetadata", // both in the injector
}

// discovery are the keys that have an effect with a control plane.
var discovery = []string{"discoveryAddress", "controlPlaneAuthPolicy"}

// readBounded reads a file that may be missing.
func readBounded(name string) (string, error) {
	file, err := os.Open(name)
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	} else if err != nil {
		return "", err
	}
	defer file.Close()
	const most = 4 << 20 // more than Parse accepts
	text, err := io.ReadAll(io.LimitReader(file, most))
	return string(text), err
}

// setting is a value of Istio's configuration for a flag.
type setting struct {
	flag string
	sourced
}

// settings translates Istio's configuration. Of two settings for one flag the first counts.
func (p *proxyOptions) settings(config map[string]sourced) (settings []setting) {
	add := func(flag string, value sourced) {
		if value.by != "" {
			settings = append(settings, setting{flag, value})
		}
	}
	variable := func(name, otherwise string) sourced {
		text := os.Getenv(name)
		if text == "" {
			text = otherwise
		}
		return sourced{proxyconfig.Value{Text: text}, "environment variable " + name}
	}
	add("status-port", config["statusPort"])
	add("admin-port", config["proxyAdminPort"])
	if mode := config["interceptionMode"]; mode.Text != "NONE" && !p.config.Gateway {
		add("interception-mode", mode)
	}
	if exit, _ := strconv.ParseBool(os.Getenv("EXIT_ON_ZERO_ACTIVE_CONNECTIONS")); exit {
		add("drain-delay", variable("MINIMUM_DRAIN_DURATION", "5s"))
		add("drain-timeout", variable("EXIT_ON_ZERO_ACTIVE_CONNECTIONS", "").means("24h0m0s")) // no limit except the kubelet's
	} else {
		add("drain-delay", config["terminationDrainDuration"])
		add("drain-timeout", config["drainDuration"])
	}
	if p.istioLevel != "" {
		add("log-level", sourced{proxyconfig.Value{Text: p.istioLevel}, "--log_output_level"})
	}
	if p.json {
		add("log-format", sourced{proxyconfig.Value{Text: "json"}, "--log_as_json"})
	}
	return settings
}

// means returns s with another text, for a switch that stands for a value.
func (s sourced) means(text string) sourced {
	s.Text = text
	return s
}

// apply sets the flag, unless a source of higher precedence has set it.
func (s setting) apply(flags *pflag.FlagSet) error {
	if flags.Changed(s.flag) {
		return nil
	}
	if s.Unreadable {
		return s.complaint()
	}
	if err := flags.Set(s.flag, s.Text); err != nil {
		return valueError{fmt.Errorf("%s: %q (for --%s): %w", s.by, s.Text, s.flag, cause(err))}
	}
	return nil
}

func (s sourced) complaint() error {
	return valueError{fmt.Errorf("%s: unsupported YAML: write a plain value after the key", s.by)}
}

// useCores limits the number of cores. GOMAXPROCS overrides Istio's settings. Without any setting, the runtime applies the
// limit of the container's control group.
func (p *proxyOptions) useCores(config map[string]sourced) error {
	if os.Getenv("GOMAXPROCS") != "" {
		return nil
	}
	cores := p.concurrency
	if set, has := config["concurrency"]; has && cores == 0 {
		if set.Unreadable {
			return set.complaint()
		}
		n, err := parseCount(set.Text)
		if err != nil {
			return valueError{fmt.Errorf("%s: %q: %w", set.by, set.Text, err)}
		}
		if cores = n; cores == 0 {
			cores = runtime.NumCPU()
		}
	}
	if limit := os.Getenv("ISTIO_CPU_LIMIT"); limit != "" && cores == 0 {
		n, err := parseCPU(limit)
		if err != nil {
			return valueError{fmt.Errorf("environment variable ISTIO_CPU_LIMIT=%q: %w", limit, err)}
		}
		cores = n
	}
	if cores > 0 {
		runtime.GOMAXPROCS(min(cores, runtime.NumCPU()))
	}
	return nil
}

// parseCPU rounds a quantity of processors up to whole ones.
func parseCPU(text string) (int, error) {
	number, milli := strings.CutSuffix(text, "m")
	cores, err := strconv.ParseFloat(number, 64)
	if err != nil || !(cores >= 0 && cores < 1<<20) {
		return 0, errors.New("not a quantity of processors: use one such as 2 or 1500m")
	}
	if milli {
		cores /= 1000
	}
	whole := int(cores)
	if float64(whole) < cores {
		whole++
	}
	return whole, nil
}

// parseIstioLevel returns the level of the default scope from a list in pilot-agent's form: level or scope:level, separated
// by commas.
func parseIstioLevel(text string) (string, error) {
	level := ""
	for item := range strings.SplitSeq(text, ",") {
		scope, word, scoped := strings.Cut(item, ":")
		if !scoped {
			scope, word = "default", scope
		}
		if scope != "default" && scope != "all" {
			continue
		}
		switch word {
		case "debug", "info", "warn", "error":
			level = word
		case "fatal", "none":
			level = "error"
		default:
			return "", fmt.Errorf("%q is not a level: use debug, info, warn, error, fatal or none", word)
		}
	}
	return level, nil
}
