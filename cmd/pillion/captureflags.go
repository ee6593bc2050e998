package main

import (
	"fmt"
	"os"
	"os/user"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/internal/commandline"
)

// bind adds the flags of istio-iptables by subject, with their environment variables.
func (o *initOptions) bind(cmd *cobra.Command) {
	bindGroups(cmd, append(o.captureGroups(),
		flagBinding{"How rules are installed", o.bindChange}, flagBinding{"Validation", o.bindValidation},
		flagBinding{"Accepted and ignored", o.bindTolerated})...)
}

// captureGroups are the flags that select what is captured.
func (o *initOptions) captureGroups() []flagBinding {
	return []flagBinding{
		{"The agent", o.bindAgent}, {"Inbound connections", o.bindInbound}, {"Outbound connections", o.bindOutbound}, {"DNS", o.bindDNS},
	}
}

// flagBinding adds the flags of one subject.
type flagBinding struct {
	title string
	bind  func(*pflag.FlagSet)
}

// bindGroups adds flags to a command. Its help shows them by group.
func bindGroups(cmd *cobra.Command, groups ...flagBinding) (help flagGroups) {
	for _, group := range groups {
		flags := pflag.NewFlagSet("", pflag.ContinueOnError)
		flags.SortFlags = false
		group.bind(flags)
		help = append(help, flagGroup{group.title, flags})
		cmd.Flags().AddFlagSet(flags)
	}
	cmd.SetUsageFunc(help.usage)
	return help
}

func (o *initOptions) bindAgent(flags *pflag.FlagSet) {
	s := &o.spec
	// istio-iptables has no variable for --envoy-port.
	parsed(flags, &s.OutboundPort, capture.ParsePort, "envoy-port", "p", fmt.Sprint(s.OutboundPort), "port",
		"the agent's port for captured outbound connections")
	parsed(flags, &s.InboundPort, capture.ParsePort, "inbound-capture-port", "z", fmt.Sprint(s.InboundPort), "port",
		"the agent's port for captured inbound connections")
	twin(flags, "inbound-capture-port", "INBOUND_CAPTURE_PORT")
	users := func(text string) ([]capture.IDRange, error) {
		o.namesakes, _ = parseGroups(text)
		return parseUsers(text)
	}
	parsed(flags, &o.uids, users, "proxy-uid", "u", "", "list",
		fmt.Sprintf("users of the agent, whose connections are not captured; empty: $ENVOY_USER (default istio-proxy), or %d if that user does not exist", capture.DefaultProxyID))
	twin(flags, "proxy-uid", "PROXY_UID")
	parsed(flags, &o.gids, parseGroups, "proxy-gid", "g", "", "list",
		"groups of the agent, whose connections are not captured; empty: the numbers of the users")
	twin(flags, "proxy-gid", "PROXY_GID")
}

func (o *initOptions) bindInbound(flags *pflag.FlagSet) {
	s := &o.spec
	mode := parsed(flags, &s.Mode, o.parseMode, "istio-inbound-interception-mode", "m", "", "mode",
		"how inbound connections are captured: REDIRECT (also if empty) or TPROXY")
	commandline.SetChoices(mode, string(capture.Redirect), string(capture.TPROXY))
	twin(flags, "istio-inbound-interception-mode", "ISTIO_INBOUND_INTERCEPTION_MODE")
	parsed(flags, &s.Inbound, capture.ParsePorts, "istio-inbound-ports", "b", "", "ports",
		"inbound ports to capture, * for all; empty: none")
	twin(flags, "istio-inbound-ports", "ISTIO_INBOUND_PORTS")
	parsed(flags, &s.InboundExcluded, capture.ParsePortList, "istio-local-exclude-ports", "d", "", "ports",
		"inbound ports not captured, such as the agent's own 15090,15021,15020; only with -b '*'")
	twin(flags, "istio-local-exclude-ports", "ISTIO_LOCAL_EXCLUDE_PORTS")
	parsed(flags, &s.TunnelPort, capture.ParsePort, "inbound-tunnel-port", "e", fmt.Sprint(s.TunnelPort), "port",
		"inbound tunnel (HBONE) port; not captured")
	twin(flags, "inbound-tunnel-port", "INBOUND_TUNNEL_PORT")
	parsedSwitch(flags, &s.DropInvalid, "drop-invalid", "", "drop packets that conntrack calls INVALID")
	twin(flags, "drop-invalid", "INVALID_DROP", "DROP_INVALID")
	parsed(flags, &s.TPROXYMark, capture.ParseNumber, "istio-inbound-tproxy-mark", "t", fmt.Sprint(s.TPROXYMark), "number",
		"mark of packets that TPROXY passes to the agent; decimal or 0x…")
	twin(flags, "istio-inbound-tproxy-mark", "ISTIO_INBOUND_TPROXY_MARK")
	parsed(flags, &s.TPROXYTable, capture.ParseNumber, "istio-inbound-tproxy-route-table", "r", fmt.Sprint(s.TPROXYTable), "number",
		"routing table for marked packets; decimal or 0x…")
	twin(flags, "istio-inbound-tproxy-route-table", "ISTIO_INBOUND_TPROXY_ROUTE_TABLE")
}

func (o *initOptions) bindOutbound(flags *pflag.FlagSet) {
	s := &o.spec
	parsed(flags, &s.Outbound, capture.ParsePrefixes, "istio-service-cidr", "i", "", "networks",
		"outbound networks to capture, * for all; empty: none")
	twin(flags, "istio-service-cidr", "ISTIO_SERVICE_CIDR")
	parsed(flags, &s.OutboundExcluded, capture.ParsePrefixList, "istio-service-exclude-cidr", "x", "", "networks",
		"outbound networks not captured")
	twin(flags, "istio-service-exclude-cidr", "ISTIO_SERVICE_EXCLUDE_CIDR")
	parsed(flags, &s.OutboundPorts, capture.ParsePortList, "istio-outbound-ports", "q", "", "ports",
		"outbound ports captured at every address that -x does not exclude")
	twin(flags, "istio-outbound-ports", "ISTIO_OUTBOUND_PORTS")
	parsed(flags, &s.OutboundPortsExcluded, capture.ParsePortList, "istio-local-outbound-ports-exclude", "o", "", "ports",
		"outbound ports not captured at any address; 53 disables DNS capture")
	twin(flags, "istio-local-outbound-ports-exclude", "ISTIO_LOCAL_OUTBOUND_PORTS_EXCLUDE")
	parsed(flags, &s.InterfacesExcluded, capture.ParseInterfaces, "istio-exclude-interfaces", "c", "", "list",
		"interfaces not captured in either direction")
	twin(flags, "istio-exclude-interfaces", "ISTIO_EXCLUDE_INTERFACES")
	parsed(flags, &s.VirtualInterfaces, capture.ParseInterfaces, "kube-virt-interfaces", "k", "", "list",
		"interfaces of virtual machines; connections that arrive there are outbound")
	twin(flags, "kube-virt-interfaces", "KUBE_VIRT_INTERFACES")
}

func (o *initOptions) bindDNS(flags *pflag.FlagSet) {
	parsedSwitch(flags, &o.spec.RedirectDNS, "redirect-dns", "",
		fmt.Sprintf("redirect DNS queries to the servers in %s to port %d", resolvConf, capture.DNSPort))
	twin(flags, "redirect-dns", "ISTIO_META_DNS_CAPTURE", "REDIRECT_DNS")
	parsedSwitch(flags, &o.spec.CaptureAllDNS, "capture-all-dns", "", "with --redirect-dns: redirect queries to any server")
	twin(flags, "capture-all-dns", "CAPTURE_ALL_DNS")
}

func (o *initOptions) bindChange(flags *pflag.FlagSet) {
	o.changeOptions.bind(flags, "print what would change, with reasons, and change nothing; $DRY_RUN_FILE_PATH: file for the commands")
	o.bindDualStack(flags)
	o.backendOptions.bind(flags)
	parsedSwitch(flags, &o.cleanupOnly, "cleanup-only", "", "remove everything that init has installed, whatever its arguments were, and install nothing")
	twin(flags, "cleanup-only", "CLEANUP_ONLY")
	parsedSwitch(flags, &o.skipRules, "skip-rule-apply", "", "install no rules")
	twin(flags, "skip-rule-apply", "SKIP_RULE_APPLY")
}

func (o *initOptions) bindDualStack(flags *pflag.FlagSet) {
	parsedSwitch(flags, &o.dualStack, "dual-stack", "", "also install IPv6 rules when the first address is IPv4; always on for init")
	twin(flags, "dual-stack", "ISTIO_DUAL_STACK", "DUAL_STACK")
}

func (o *initOptions) bindValidation(flags *pflag.FlagSet) {
	parsedSwitch(flags, &o.validate, "run-validation", "",
		"verify by connections that inbound, outbound and DNS are captured as configured; exit status 126 if not")
	twin(flags, "run-validation", "RUN_VALIDATION")
	parsed(flags, &o.probePort, capture.ParsePort, "iptables-probe-port", "", fmt.Sprint(o.probePort), "uint16", "destination port of these connections, where any port will do")
	twin(flags, "iptables-probe-port", "IPTABLES_PROBE_PORT")
	parsed(flags, &o.probeTimeout, parseDuration, "probe-timeout", "", o.probeTimeout.String(), "duration", "how long to retry")
	twin(flags, "probe-timeout", "PROBE_TIMEOUT")
}

func (o *initOptions) bindTolerated(flags *pflag.FlagSet) {
	parsedSwitch(flags, &o.withoutEffect, "reconcile", "", "every run repairs what differs")
	twin(flags, "reconcile", "RECONCILE")
	parsedSwitch(flags, &o.withoutEffect, "force-apply", "", "every run installs what is missing")
	twin(flags, "force-apply", "FORCE_APPLY")
	parsed(flags, new(string), asItIs, "log_target", "", "", "path", "the log always goes to standard error")
	for _, name := range []string{"log_stacktrace_level", "log_caller", "vklog"} {
		parsed(flags, new(string), asItIs, name, "", "", "text", "the log has no stacks and no callers")
	}
}

// readEnvironmentAlone reads the variables of istio-iptables that have no flag. The first invalid value is an error
// that names the variable.
func (o *initOptions) readEnvironmentAlone() error {
	s := &o.spec
	variables := []struct {
		name string
		read func(text string) error
	}{
		{"ISTIO_OUTBOUND_OWNER_GROUPS", func(text string) (err error) {
			s.OwnerGroups, err = capture.ParseGroups(text, lookUpGroup)
			return err
		}},
		{"ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE", func(text string) (err error) {
			s.OwnerGroupsExcluded, err = parseGroups(text)
			return err
		}},
		{"ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR", func(text string) (err error) {
			if text != "" {
				s.Localhost4, err = capture.ParseLocalhost4(text)
			}
			return err
		}},
	}
	for _, v := range variables {
		text, set := os.LookupEnv(v.name)
		if !set {
			continue // set but empty differs: it captures no group
		}
		if err := v.read(text); err != nil {
			return valueError{fmt.Errorf("environment variable %s=%s: %w", v.name, capture.Quoted(text), err)}
		}
	}
	return nil
}

// proxyUser is the agent's default user.
func proxyUser() []capture.IDRange {
	name := os.Getenv("ENVOY_USER")
	if name == "" {
		name = "istio-proxy"
	}
	if found, err := user.Lookup(name); err == nil {
		if ids, err := parseUsers(found.Uid); err == nil {
			return ids
		}
	}
	return []capture.IDRange{{First: capture.DefaultProxyID, Last: capture.DefaultProxyID}}
}

// parseMode reads a mode. Like istio-iptables, istio-iptables mode reads every unknown word as REDIRECT.
func (o *initOptions) parseMode(text string) (capture.Mode, error) {
	switch mode := capture.Mode(text); {
	case mode == capture.TPROXY, mode == capture.Redirect:
		return mode, nil
	case text == "":
		return capture.Redirect, nil
	case o.spec.Compat:
		o.warnings = append(o.warnings, fmt.Sprintf("-m %s is not a mode: using REDIRECT", capture.Quoted(text)))
		return capture.Redirect, nil
	}
	return "", fmt.Errorf("%s is not a mode: use REDIRECT or TPROXY", capture.Quoted(text))
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

func parseGroups(text string) ([]capture.IDRange, error) { return capture.ParseIDs(text, lookUpGroup) }

func lookUpGroup(name string) (string, error) {
	found, err := user.LookupGroup(name)
	if err != nil {
		return "", err
	}
	return found.Gid, nil
}

func asItIs(text string) (string, error) { return text, nil }

// flagGroups are the flags of a command by subject.
type flagGroups []flagGroup

type flagGroup struct {
	title string
	flags *pflag.FlagSet
}

// usage prints the flags group by group.
func (groups flagGroups) usage(cmd *cobra.Command) error {
	var text strings.Builder
	fmt.Fprintf(&text, "Usage:\n  %s\n", cmd.UseLine())
	for _, g := range groups {
		fmt.Fprintf(&text, "\n%s:\n%s", g.title, g.flags.FlagUsages())
	}
	_, err := cmd.OutOrStderr().Write([]byte(text.String()))
	return err
}
