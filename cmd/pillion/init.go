package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os/user"

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
	backendOptions
	spec capture.Spec
	uids []capture.IDRange // nil: DefaultProxyID
	gids []capture.IDRange // nil: the same as uids
	mode string            // checked, and then of one kind only
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
	o.backendOptions.bind(flags)
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
	backend, err := o.backendOptions.choose()
	if err != nil {
		return err
	}
	if o.spec.Inbound.None() && o.spec.Outbound.None() && len(o.spec.OutboundPorts) == 0 {
		log.Warn("nothing will be captured: -b '*' captures inbound, -i '*' outbound connections")
	}
	return o.carryOut(ctx, stdout, log, func(ctx context.Context) (*iptables.Plan, error) {
		return iptables.PlanInit(ctx, o.spec, backend)
	})
}

func parseUsers(text string) ([]capture.IDRange, error) {
	return capture.ParseIDs(text, func(name string) (string, error) {
		found, err := user.Lookup(name)
		if err != nil {
			return "", err
		}
		return found.Uid, nil
	})
}

func parseGroups(text string) ([]capture.IDRange, error) {
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
