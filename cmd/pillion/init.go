package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os/signal"
	"os/user"
	"strconv"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/iptables"
)

// newInit is `pillion init`. It takes the flags of istio-iptables, so that an injector can call it unchanged.
func newInit() *cobra.Command {
	options := initOptions{spec: capture.Default()}
	cmd := &cobra.Command{
		Use:     "init",
		Aliases: []string{"istio-iptables"},
		Short:   "Install the rules that redirect this network namespace's TCP connections to the agent",
		Long: `Install the rules that redirect this network namespace's TCP connections to the agent.

Run it before the workload starts, as root with CAP_NET_ADMIN and CAP_NET_RAW. Running it again repairs what has been
changed and otherwise does nothing. Lists are separated by commas; a port range is written 8000:9000.`,
		Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := applyEnvironment(cmd.Flags()); err != nil {
				return err
			}
			return options.run(cmd.Context(), cmd.OutOrStdout(), cmd.ErrOrStderr())
		},
	}
	options.bind(cmd.Flags())
	return cmd
}

// initOptions is what the command line and the environment of `pillion init` say.
type initOptions struct {
	changeOptions
	spec capture.Spec
	uids []uint32 // nil: DefaultProxyID
	gids []uint32 // nil: the same as uids
	mode string
}

func (o *initOptions) bind(flags *pflag.FlagSet) {
	s := &o.spec
	parsed(flags, &s.OutboundPort, capture.ParsePort, "envoy-port", "p", fmt.Sprint(s.OutboundPort), "port",
		"port of the agent to which captured outbound connections go")
	parsed(flags, &s.InboundPort, capture.ParsePort, "inbound-capture-port", "z", fmt.Sprint(s.InboundPort), "port",
		"port of the agent to which captured inbound connections go")
	parsed(flags, &s.TunnelPort, capture.ParsePort, "inbound-tunnel-port", "e", fmt.Sprint(s.TunnelPort), "port",
		"inbound port of tunnels, never captured")
	parsed(flags, &o.uids, parseUsers, "proxy-uid", "u", "", "list",
		fmt.Sprintf("users, by number or name, whose connections are not captured; empty is %d", capture.DefaultProxyID))
	parsed(flags, &o.gids, parseGroups, "proxy-gid", "g", "", "list",
		"groups, by number or name, whose connections are not captured; empty is the numbers of the users")
	parsed(flags, &o.mode, parseMode, "istio-inbound-interception-mode", "m", "", "mode",
		"how inbound connections are captured: REDIRECT, which is also what empty means")
	parsed(flags, &s.Inbound, capture.ParsePorts, "istio-inbound-ports", "b", "", "ports",
		"inbound ports to capture, * for all; empty is none")
	parsed(flags, &s.InboundExcluded, capture.ParsePortList, "istio-local-exclude-ports", "d", "", "ports",
		"inbound ports left alone when all are captured")
	parsed(flags, &s.Outbound, capture.ParsePrefixes, "istio-service-cidr", "i", "", "networks",
		"outbound networks to capture, * for all; empty is none")
	parsed(flags, &s.OutboundExcluded, capture.ParsePrefixList, "istio-service-exclude-cidr", "x", "", "networks",
		"outbound networks left alone")
	parsed(flags, &s.OutboundPorts, capture.ParsePortList, "istio-outbound-ports", "q", "", "ports",
		"outbound ports captured at every address that is not left alone")
	parsed(flags, &s.OutboundPortsExcluded, capture.ParsePortList, "istio-local-outbound-ports-exclude", "o", "", "ports",
		"outbound ports left alone at every address")
	parsed(flags, &s.InterfacesExcluded, capture.ParseInterfaces, "istio-exclude-interfaces", "c", "", "list",
		"interfaces left alone in both directions")
	o.changeOptions.bind(flags, "print what would change, with reasons, and change nothing")

	// istio-iptables has no variable for --envoy-port.
	twin(flags, "inbound-capture-port", "INBOUND_CAPTURE_PORT")
	twin(flags, "inbound-tunnel-port", "INBOUND_TUNNEL_PORT")
	twin(flags, "proxy-uid", "PROXY_UID")
	twin(flags, "proxy-gid", "PROXY_GID")
	twin(flags, "istio-inbound-interception-mode", "ISTIO_INBOUND_INTERCEPTION_MODE")
	twin(flags, "istio-inbound-ports", "ISTIO_INBOUND_PORTS")
	twin(flags, "istio-local-exclude-ports", "ISTIO_LOCAL_EXCLUDE_PORTS")
	twin(flags, "istio-service-cidr", "ISTIO_SERVICE_CIDR")
	twin(flags, "istio-service-exclude-cidr", "ISTIO_SERVICE_EXCLUDE_CIDR")
	twin(flags, "istio-outbound-ports", "ISTIO_OUTBOUND_PORTS")
	twin(flags, "istio-local-outbound-ports-exclude", "ISTIO_LOCAL_OUTBOUND_PORTS_EXCLUDE")
	twin(flags, "istio-exclude-interfaces", "ISTIO_EXCLUDE_INTERFACES")
	twin(flags, "dry-run", "DRY_RUN")
}

func (o *initOptions) run(ctx context.Context, stdout, stderr io.Writer) error {
	log := o.log.logger(stderr)
	if len(o.uids) > 0 {
		o.spec.ProxyUIDs, o.spec.ProxyGIDs = o.uids, o.uids
	}
	if len(o.gids) > 0 {
		o.spec.ProxyGIDs = o.gids
	}
	if err := o.spec.Validate(); err != nil {
		return err
	}
	if o.spec.Inbound.None() && o.spec.Outbound.None() && len(o.spec.OutboundPorts) == 0 {
		log.Warn("nothing will be captured: -b '*' captures inbound, -i '*' outbound connections")
	}
	return o.carryOut(ctx, stdout, log, func(ctx context.Context) (*iptables.Plan, error) {
		return iptables.PlanInit(ctx, o.spec)
	})
}

// changeOptions are what init and cleanup have in common: how to treat a plan.
type changeOptions struct {
	dryRun bool
	output output
	log    logOptions
}

func (o *changeOptions) bind(flags *pflag.FlagSet, dryRun string) {
	parsedSwitch(flags, &o.dryRun, "dry-run", "n", dryRun)
	parsed(flags, &o.output, parseOutput, "output", "", string(outputText), "form", "form of the result: text or json")
	o.log.bind(flags)
}

// carryOut makes a plan and commits it, or only shows it, and reports what happened.
func (o *changeOptions) carryOut(ctx context.Context, stdout io.Writer, log *slog.Logger, makePlan func(context.Context) (*iptables.Plan, error)) error {
	ctx, stop := signal.NotifyContext(ctx, syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if !o.dryRun {
		release, err := iptables.Lock(ctx)
		if err != nil {
			return err
		}
		defer release()
	}
	plan, err := makePlan(ctx)
	if err != nil {
		return err
	}
	text := plan.String()
	if !o.dryRun {
		if err := plan.Commit(ctx); err != nil {
			return err
		}
		text = ""
		if summary := plan.Summary(); summary != "" {
			text = summary + "\n"
		}
	}
	for _, warning := range plan.Warnings {
		log.Warn(warning)
	}
	if o.output == outputJSON {
		encoder := json.NewEncoder(stdout)
		encoder.SetIndent("", "  ")
		return encoder.Encode(struct {
			DryRun bool           `json:"dryRun"`
			Plan   *iptables.Plan `json:"plan"`
		}{o.dryRun, plan})
	}
	_, err = io.WriteString(stdout, text)
	return err
}

func parseUsers(text string) ([]uint32, error) {
	return capture.ParseIDs(text, func(name string) (string, error) {
		found, err := user.Lookup(name)
		if err != nil {
			return "", err
		}
		return found.Uid, nil
	})
}

func parseGroups(text string) ([]uint32, error) {
	return capture.ParseIDs(text, func(name string) (string, error) {
		found, err := user.LookupGroup(name)
		if err != nil {
			return "", err
		}
		return found.Gid, nil
	})
}

func parseMode(text string) (string, error) {
	switch text {
	case "", "REDIRECT":
		return text, nil
	case "TPROXY":
		return "", errors.New("TPROXY is not supported yet: use REDIRECT")
	}
	return "", fmt.Errorf("%q is not a mode: use REDIRECT", text)
}

// output is the form of what a command prints.
type output string

const (
	outputText output = "text"
	outputJSON output = "json"
)

func parseOutput(text string) (output, error) {
	switch o := output(text); o {
	case outputText, outputJSON:
		return o, nil
	}
	return "", fmt.Errorf("%q is not a form: use text or json", text)
}

// logOptions are the flags by which injectors set the log.
type logOptions struct {
	level slog.Level
	json  bool
}

func (o *logOptions) bind(flags *pflag.FlagSet) {
	parsed(flags, &o.level, parseLogLevel, "log_output_level", "", "default:info", "level",
		"least level that is logged: debug, info, warn, error or none, with \"default:\" in front if you like")
	parsedSwitch(flags, &o.json, "log_as_json", "", "log JSON instead of text")
}

func (o *logOptions) logger(to io.Writer) *slog.Logger {
	options := &slog.HandlerOptions{Level: o.level}
	if o.json {
		return slog.New(slog.NewJSONHandler(to, options))
	}
	return slog.New(slog.NewTextHandler(to, options))
}

// parseLogLevel reads a list of scope:level. Here is one scope, default, whose name may be left out; the levels of
// others must exist but have no effect.
func parseLogLevel(text string) (slog.Level, error) {
	levels := map[string]slog.Level{
		"debug": slog.LevelDebug, "info": slog.LevelInfo, "warn": slog.LevelWarn, "error": slog.LevelError,
		"fatal": slog.LevelError + 4, "none": slog.LevelError + 8,
	}
	result := slog.LevelInfo
	for item := range strings.SplitSeq(text, ",") {
		scope, name, scoped := strings.Cut(item, ":")
		if !scoped {
			scope, name = "default", item
		}
		level, ok := levels[name]
		if !ok {
			return 0, fmt.Errorf("%q is not a log level: use debug, info, warn, error, fatal or none", item)
		}
		if scope == "default" || scope == "all" {
			result = level
		}
	}
	return result, nil
}

// parsed adds a flag whose text is turned into a value as soon as it is set, so that a bad one is reported with the
// flag's or the variable's name. The value that stands for text must be in the place already.
func parsed[T any](flags *pflag.FlagSet, into *T, parse func(string) (T, error), name, short, text, kind, usage string) *pflag.Flag {
	return flags.VarPF(&parsedValue[T]{into: into, parse: parse, text: text, kind: kind}, name, short, usage)
}

// parsedSwitch adds a flag that is off, and on when it stands alone.
func parsedSwitch(flags *pflag.FlagSet, into *bool, name, short, usage string) {
	parsed(flags, into, parseSwitch, name, short, "false", "bool", usage).NoOptDefVal = "true"
}

func parseSwitch(text string) (bool, error) {
	on, err := strconv.ParseBool(text)
	if err != nil {
		return false, fmt.Errorf("%q is neither on nor off: use true or false", text)
	}
	return on, nil
}

type parsedValue[T any] struct {
	into  *T
	parse func(string) (T, error)
	text  string
	kind  string
}

func (v *parsedValue[T]) String() string { return v.text }
func (v *parsedValue[T]) Type() string   { return v.kind }

func (v *parsedValue[T]) Set(text string) error {
	value, err := v.parse(text)
	if err == nil {
		*v.into, v.text = value, text
	}
	return err
}

// flagError tells a bad value, which is a failure like any other, from a command line that makes no sense.
func flagError(_ *cobra.Command, err error) error {
	if errors.As(err, new(*pflag.InvalidValueError)) {
		return err
	}
	return usageError{err}
}

func noArguments(_ *cobra.Command, args []string) error {
	if len(args) > 0 {
		return usageError{fmt.Errorf("unexpected argument %q: every value belongs to a flag", args[0])}
	}
	return nil
}
