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

// newProxy is `pillion proxy`, with the arguments and the variables of pilot-agent's.
func newProxy() *cobra.Command {
	p := newProxyOptions()
	cmd := &cobra.Command{
		Use:   "proxy [sidecar]",
		Short: "Run the agent as Istio's injector starts a sidecar",
		Long: `Run "pillion agent" as Istio's injector starts its own sidecar: with pilot-agent's arguments and variables.

Istio's configuration is taken from the annotation proxy.istio.io/config in ` + podinfo.AnnotationsFile + `, the variable
PROXY_CONFIG and the file of --meshConfig, the first being the strongest; flags of "pillion agent" and their PILLION_
variables are stronger than all of them. There is no control plane, and nothing waits for one. Unknown flags are let
pass, and what has no effect is named once in the log.`,
		// Unknown flags are told, so they are looked for here.
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
			if role := flags.Args(); len(role) > 0 && role[0] != "sidecar" {
				return fmt.Errorf("%q is not what this is: only proxy sidecar is, and gateways and waypoints need Envoy", role[0])
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

// proxyOptions are an agent's, and what Istio says of it.
type proxyOptions struct {
	*agentOptions
	concurrency int
	meshConfig  string // a file
	annotations string // a file
	istioLevel  string // of log_output_level
	json        bool
	domain      string   // of the pod; its part after .svc. is the cluster's
	unknown     []string // flags that nobody knows
	idle        []string // keys of the configuration that have no effect
}

func newProxyOptions() *proxyOptions {
	return &proxyOptions{
		agentOptions: newAgentOptions(),
		meshConfig:   "./etc/istio/config/mesh",
		annotations:  podinfo.AnnotationsFile,
	}
}

func (p *proxyOptions) bind(flags *pflag.FlagSet) {
	p.agentOptions.bind(flags)
	flags.Lookup("profiling").NoOptDefVal = "true" // it stands alone in pilot-agent's command line
	countFlag(flags, &p.concurrency, "concurrency", "cores to use; 0: as Istio's configuration says, or ISTIO_CPU_LIMIT")
	textFlag(flags, &p.meshConfig, "meshConfig", "path", "file with Istio's mesh configuration; it may be missing")
	parsed(flags, &p.istioLevel, parseIstioLevel, "log_output_level", "", "", "level", "least level that is logged, as default:info; --log-level is stronger")
	parsedSwitch(flags, &p.json, "log_as_json", "", "the same as --log-format json")
	textFlag(flags, &p.domain, "domain", "domain", "the pod's DNS domain, as NAMESPACE.svc.DOMAIN; --cluster-domain overrides it")
	for _, name := range []string{"stsPort", "tokenManagerPlugin", "serviceCluster", "proxyLogLevel", "proxyComponentLogLevel",
		"templateFile", "outlierLogPath", "log_target", "log_stacktrace_level", "log_caller"} {
		textFlag(flags, new(string), name, "text", "has no effect")
	}
	parsedSwitch(flags, new(bool), "vklog", "", "has no effect")
}

// unknownFlags names the flags in args that flags has not.
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

// settle sets what the command line left alone, and the cores that are used.
func (p *proxyOptions) settle(flags *pflag.FlagSet) error {
	// A pod without rules: then there is nothing to carry, in any mode.
	if os.Getenv(interceptionVariable) == "NONE" {
		os.Unsetenv(interceptionVariable)
	}
	if err := applyEnvironment(flags); err != nil {
		return err
	}
	if _, domain, found := strings.Cut(p.domain, ".svc."); found && !flags.Changed("cluster-domain") {
		p.config.Workload.ClusterDomain = domain
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
	// Who lengthens the time in which Istio's sidecar lives on wants that time, and then some for connections.
	if p.config.Drain.Delay > p.config.Drain.Timeout {
		p.config.Drain.Timeout = p.config.Drain.Delay + drainAfterDelay
	}
	log := newLogger(p.config.LogLevel, p.level, p.format)
	if broken != nil {
		log.Warn("the pod's annotations are incomplete", "error", broken)
	}
	if err := p.useCores(config); err != nil {
		return err
	}
	log.Info("running in the place of Istio's sidecar", "cores", runtime.GOMAXPROCS(0),
		"without_effect", slices.Concat(slices.Sorted(slices.Values(p.idle)), p.unknown, idleVariables(os.Environ())))
	return nil
}

// idleVariables names what Istio's agent would heed and this one does not. Metadata, which nobody asks for, is not told of.
func idleVariables(environment []string) (names []string) {
	known := strings.Fields(`CA_ADDR CA_PROVIDER CA_ROOT_CA DISABLE_ENVOY DNS_PROXY_ADDR ENVOY_SECURE_METRICS_PORT
		ENVOY_SECURE_MERGED_METRICS_PORT FILE_MOUNTED_CERTS ISTIO_BOOTSTRAP_OVERRIDE JWT_POLICY OUTPUT_CERTS PILOT_CERT_PROVIDER
		PROV_CERT SECRET_TTL XDS_ROOT_CA`)
	for _, variable := range environment {
		name, _, _ := strings.Cut(variable, "=")
		if slices.Contains(known, name) || strings.HasPrefix(name, "XDS_HEADER_") || strings.HasPrefix(name, "CA_HEADER_") {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

// drainAfterDelay is what the defaults leave connections, once the delay is over.
const drainAfterDelay = 15 * time.Second

// said is a value and who said it.
type said struct {
	proxyconfig.Value
	by string
}

// readIstio reads Istio's configuration, each key from the strongest that says it. broken says what is wrong with the
// file of annotations, which is done without.
func (p *proxyOptions) readIstio() (config map[string]said, broken, err error) {
	annotations, broken := podinfo.Annotations(p.annotations)
	mesh, err := readBounded(p.meshConfig)
	if err != nil {
		return nil, broken, fmt.Errorf("--meshConfig: %w", err)
	}
	config = make(map[string]said)
	for _, source := range []struct{ name, text, under string }{
		{"--meshConfig " + p.meshConfig, mesh, "defaultConfig"},
		{"environment variable PROXY_CONFIG", os.Getenv("PROXY_CONFIG"), ""},
		{"annotation proxy.istio.io/config", annotations["proxy.istio.io/config"], ""},
	} {
		part, err := proxyconfig.Parse(source.text)
		if err != nil {
			return nil, broken, fmt.Errorf("%s: %w", source.name, err)
		}
		if source.under != "" {
			part = part.Under(source.under)
		}
		for key, value := range part {
			config[key] = said{value, source.name + ": " + key}
		}
	}
	const statusPort = "status.sidecar.istio.io/port"
	if port, has := annotations[statusPort]; has {
		config["statusPort"] = said{proxyconfig.Value{Text: port}, "annotation " + statusPort}
	}
	for key := range maps.Keys(config) {
		top, _, _ := strings.Cut(key, ".")
		if !slices.Contains(heeded, top) && !slices.Contains(p.idle, top) {
			p.idle = append(p.idle, top)
		}
	}
	return config, broken, nil
}

// heeded are the keys of Istio's configuration that mean something here, or in the pod.
var heeded = []string{
	"statusPort", "proxyAdminPort", "interceptionMode", "terminationDrainDuration", "drainDuration", "concurrency",
	"holdApplicationUntilProxyStarts", "proxyMetadata", // both are the injector's to see to
}

// readBounded reads a file that may be missing.
func readBounded(name string) (string, error) {
	file, err := os.Open(name)
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	} else if err != nil {
		return "", err
	}
	defer file.Close()
	const most = 4 << 20 // what is longer than Parse takes, it refuses
	text, err := io.ReadAll(io.LimitReader(file, most))
	return string(text), err
}

// setting is what Istio's words say in the place of a flag.
type setting struct {
	flag string
	said
}

// settings translates. Of two for one flag the first counts.
func (p *proxyOptions) settings(config map[string]said) (settings []setting) {
	add := func(flag string, value said) {
		if value.by != "" {
			settings = append(settings, setting{flag, value})
		}
	}
	variable := func(name, otherwise string) said {
		text := os.Getenv(name)
		if text == "" {
			text = otherwise
		}
		return said{proxyconfig.Value{Text: text}, "environment variable " + name}
	}
	add("status-port", config["statusPort"])
	add("admin-port", config["proxyAdminPort"])
	if mode := config["interceptionMode"]; mode.Text != "NONE" {
		add("interception-mode", mode)
	}
	if exit, _ := strconv.ParseBool(os.Getenv("EXIT_ON_ZERO_ACTIVE_CONNECTIONS")); exit {
		add("drain-delay", variable("MINIMUM_DRAIN_DURATION", "5s"))
		add("drain-timeout", variable("EXIT_ON_ZERO_ACTIVE_CONNECTIONS", "").means("24h0m0s")) // as long as it takes, or the kubelet lets it
	} else {
		add("drain-delay", config["terminationDrainDuration"])
		add("drain-timeout", config["drainDuration"])
	}
	if p.istioLevel != "" {
		add("log-level", said{proxyconfig.Value{Text: p.istioLevel}, "--log_output_level"})
	}
	if p.json {
		add("log-format", said{proxyconfig.Value{Text: "json"}, "--log_as_json"})
	}
	return settings
}

// means is what a switch amounts to.
func (s said) means(text string) said {
	s.Text = text
	return s
}

// apply sets the flag, unless somebody did who is stronger.
func (s setting) apply(flags *pflag.FlagSet) error {
	if flags.Changed(s.flag) {
		return nil
	}
	if s.Unreadable {
		return s.complaint()
	}
	if err := flags.Set(s.flag, s.Text); err != nil {
		return fmt.Errorf("%s: %q (for --%s): %w", s.by, s.Text, s.flag, err)
	}
	return nil
}

func (s said) complaint() error {
	return fmt.Errorf("%s: its form is not read here; write the plain value behind its key", s.by)
}

// useCores limits the cores that are used at once. GOMAXPROCS is stronger than all that Istio says, and the runtime knows
// the limit of the container's control group where nobody says anything.
func (p *proxyOptions) useCores(config map[string]said) error {
	if os.Getenv("GOMAXPROCS") != "" {
		return nil
	}
	cores := p.concurrency
	if told, has := config["concurrency"]; has && cores == 0 {
		if told.Unreadable {
			return told.complaint()
		}
		n, err := parseCount(told.Text)
		if err != nil {
			return fmt.Errorf("%s: %q: %w", told.by, told.Text, err)
		}
		if cores = n; cores == 0 {
			cores = runtime.NumCPU()
		}
	}
	if limit := os.Getenv("ISTIO_CPU_LIMIT"); limit != "" && cores == 0 {
		n, err := parseCPU(limit)
		if err != nil {
			return fmt.Errorf("environment variable ISTIO_CPU_LIMIT=%q: %w", limit, err)
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

// parseIstioLevel takes the level of scopes that are not named, as pilot-agent writes it: a level, or scope:level, with
// commas between them.
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
			return "", fmt.Errorf("%q is no level: use debug, info, warn, error, fatal or none", word)
		}
	}
	return level, nil
}
