package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/iptables"
	"github.com/pillion-proxy/pillion/iptables/validate"
)

// newInit is `pillion init`: istio-iptables' flags, better defaults.
func newInit() *cobra.Command {
	options := newInitOptions(false)
	cmd := &cobra.Command{
		Use:   "init",
		Short: "Install the rules that redirect this network namespace's connections to the agent",
		Long: `Install the rules that redirect this network namespace's connections to the agent.

Run it before the workload starts, as root with CAP_NET_ADMIN and CAP_NET_RAW. Running it again repairs what has been
changed and otherwise does nothing. Separate the items of a list by commas; write ranges as 8000:9000 for ports and
1337-1340 for users and groups; names of services, users and groups are looked up. A flag overrides the environment
variables in brackets after it.
` + variablesAlone,
		Args: noArguments,
		RunE: options.run,
	}
	options.bind(cmd)
	return cmd
}

// istioIPTables is the command that keeps the exit statuses of the program of that name.
const istioIPTables = "istio-iptables"

// newIstioIPTables is `pillion istio-iptables`: the same flags with istio-iptables' own defaults and verdicts.
func newIstioIPTables() *cobra.Command {
	options := newInitOptions(true)
	cmd := &cobra.Command{
		Use:   istioIPTables,
		Short: "Like init, with the defaults and verdicts of istio-iptables",
		Long: `Like init, with the defaults and verdicts of istio-iptables, so that an injector can call it unchanged.

IPv6 gets rules only if the first global address is IPv6, or with --dual-stack if any global address is. Packets that conntrack calls INVALID are
dropped only with --drop-invalid. Every mode except TPROXY means REDIRECT. TPROXY also captures the tunnel port. With DNS
capture, TCP to port 53 over the loopback is treated like any other destination.
` + variablesAlone,
		Args: cobra.ArbitraryArgs,
		RunE: options.run,
	}
	options.bind(cmd)
	return cmd
}

// variablesAlone describes the variables that have no flag.
const variablesAlone = `
$ISTIO_OUTBOUND_OWNER_GROUPS lists the groups whose outbound connections are captured (* or unset: all; empty: none).
$ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE lists excluded groups if all are captured. $ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR is the
loopback network that is never captured (default 127.0.0.1/32).`

// initOptions are the settings from the command line and the environment.
type initOptions struct {
	changeOptions
	backendOptions
	spec capture.Spec
	uids []capture.IDRange // nil: the user $ENVOY_USER
	gids []capture.IDRange // nil: the same as uids

	// namesakes are groups with the names of the users. istio-iptables uses them as the agent's groups, if they exist.
	namesakes []capture.IDRange

	warnings      []string // about flags; they are read before the log exists
	dualStack     bool
	cleanupOnly   bool
	skipRules     bool
	validate      bool
	probePort     uint16
	probeTimeout  time.Duration
	withoutEffect bool // accepted and ignored: every run repairs the rules
}

func newInitOptions(compat bool) *initOptions {
	o := &initOptions{spec: capture.Default(), probePort: 15002, probeTimeout: 5 * time.Second}
	o.spec.Compat = compat
	if !compat {
		o.spec.DropInvalid = true
	}
	return o
}

func (o *initOptions) run(cmd *cobra.Command, _ []string) error {
	ctx, stdout := cmd.Context(), cmd.OutOrStdout()
	if err := applyEnvironment(cmd.Flags()); err != nil {
		return err
	}
	log := o.log.logger(cmd.ErrOrStderr())
	if err := o.complete(log); err != nil {
		return err
	}
	if err := o.spec.Validate(); err != nil {
		return valueError{nameSettings(cmd.Flags(), err)}
	}
	err := o.inNamespace(func() error { return o.here(ctx, stdout, log) })
	return nameSettings(cmd.Flags(), err)
}

// complete derives the spec from flags, environment and resolv.conf.
func (o *initOptions) complete(log *slog.Logger) error {
	s := &o.spec
	if err := o.readEnvironmentAlone(); err != nil {
		return err
	}
	s.ProxyUIDs = o.uids
	if len(o.uids) == 0 {
		s.ProxyUIDs = proxyUser()
	}
	switch s.ProxyGIDs = o.gids; {
	case len(o.gids) > 0:
	case s.Compat && len(o.namesakes) > 0:
		s.ProxyGIDs = o.namesakes
	default:
		s.ProxyGIDs = s.ProxyUIDs
	}
	for _, warning := range o.warnings {
		log.Warn(warning)
	}
	switch {
	case s.Compat && o.dualStack:
		s.IPv6 = capture.IPv6WhenUsed
	case s.Compat:
		s.IPv6 = capture.IPv6WhenFirst
	}
	if s.RedirectDNS && !s.CaptureAllDNS {
		text, err := os.ReadFile(resolvConf)
		s.DNSServers = capture.ParseNameservers(string(text))
		switch {
		case err != nil:
			log.Warn(fmt.Sprintf("DNS is not captured: %v; --capture-all-dns works without servers", err))
		case len(s.DNSServers) == 0:
			log.Warn(fmt.Sprintf("DNS is not captured: %s has no name server; --capture-all-dns works without", resolvConf))
		}
	}
	return nil
}

const resolvConf = "/etc/resolv.conf"

// here carries out the options in the network namespace of the calling thread.
func (o *initOptions) here(ctx context.Context, stdout io.Writer, log *slog.Logger) error {
	backend, err := o.backendOptions.choose()
	if err != nil {
		return err
	}
	makePlan := func(ctx context.Context) (*iptables.Plan, error) { return iptables.PlanInit(ctx, o.spec, backend) }
	switch s := o.spec; {
	case o.cleanupOnly:
		makePlan = iptables.PlanCleanup
	case s.Inbound.None() && s.Outbound.None() && len(s.OutboundPorts) == 0 && !s.CapturesDNS():
		log.Warn("nothing is captured: use -b '*' for inbound and -i '*' for outbound connections")
	}
	if !o.skipRules {
		if err := o.carryOut(ctx, stdout, log, makePlan); err != nil {
			return err
		}
	}
	if !o.validate || o.cleanupOnly || o.dryRun {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, o.probeTimeout)
	defer cancel()
	unproven, err := validate.Capture(ctx, o.spec, o.probePort)
	for _, what := range unproven {
		log.Info(what)
	}
	if err != nil {
		return validationError{err}
	}
	return nil
}

// validationError means that the rules are not in effect.
type validationError struct{ err error }

func (e validationError) Error() string { return "validation failed: " + e.err.Error() }
func (e validationError) Unwrap() error { return e.err }
