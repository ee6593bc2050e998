package main

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/internal/egress"
	"github.com/pillion-proxy/pillion/internal/fault"
	"github.com/pillion-proxy/pillion/internal/ownport"
	"github.com/pillion-proxy/pillion/internal/terminal"
	command "github.com/pillion-proxy/pillion/run"
)

// exitStatus ends the program with the status of a command. If it has an error, the command was not started.
type exitStatus struct {
	status int
	err    error
}

func (e exitStatus) Error() string {
	if e.err == nil {
		return fmt.Sprintf("exit status %d", e.status)
	}
	return e.err.Error()
}

func (e exitStatus) Unwrap() error { return e.err }

// runOptions holds the values of the flags of `pillion run`.
type runOptions struct {
	config  command.Config
	summary string // auto, on or off
	others  string // allow or deny
	udp     string // allow or deny
}

// newRun is `pillion run`.
func newRun() *cobra.Command {
	o := runOptions{config: command.Config{Log: "text"}, summary: automatic, others: "allow", udp: "deny"}
	cmd := &cobra.Command{
		Use:   "run [flags] -- COMMAND [ARGUMENT...]",
		Short: "Run a command and show its network traffic",
		Long: `Run a command in a network namespace of its own, and show each connection and request that it makes.

No capability is required where the system permits user namespaces. The command reaches what you reach, over your own
network, with its own environment, directory, user and terminal. It has no capability and cannot gain one: sudo and other
set-user-ID programs do not work inside. TCP and DNS are carried, with --udp allow other UDP as well.

The exit status is that of the command, or 128 and the number of the signal that ended it; 126 if it cannot be executed, 127
if it does not exist. When the command ends, processes that it has left are killed.`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return usageError{Err: fmt.Errorf("a command is required, such as %s -- curl http://example.com/", cmd.CommandPath())}
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error { return o.run(args) },
	}
	o.bind(cmd)
	return cmd
}

func (o *runOptions) bind(cmd *cobra.Command) {
	flags := cmd.Flags()
	flags.SortFlags = false
	flags.SetInterspersed(false) // flags after the command are the command's
	textFlag(flags, &o.config.Log, "log", "off|text|json|path", "where records are written as they end: a line each on standard error, or to a file; JSON if its name ends with .json or .jsonl")
	choiceFlag(flags, &o.summary, "summary", "print a table of the destinations at the end; auto: on a terminal", automatic, "on", turnedOff)
	textFlag(flags, &o.config.Record, "record", "path", "file of all records, one line of JSON each; requests as an HTTP Archive if its name ends with .har")
	parsed(flags, &o.config.Bodies, parseBodies, "record-bodies", "", "0", "bytes", "an HTTP Archive has bodies, up to this size each, as 64Ki; without a value 1Mi; 0: none").NoOptDefVal = "1Mi"
	parsedSwitch(flags, &o.config.Credentials, "record-credentials", "", "an HTTP Archive has credentials in clear; otherwise they are masked")
	parsed(flags, &o.config.UI, parseUI, "ui", "", "", "address", "serve the live page at this address of the machine's loopback, such as 127.0.0.1:0 for any free port")
	portsFlag(flags, &o.config.HostLoopback, "host-loopback", "ports of 127.0.0.1 and ::1 that lead to the machine's loopback, such as 5432,8080; * for all")
	rulesFlag(flags, &o.config.Rules.Allow, "allow", "with --default deny, a destination that is allowed: a host such as example.com or *.example.com, an address or a network, with :PORT to allow one port; several are separated by commas")
	rulesFlag(flags, &o.config.Rules.Deny, "deny", "a destination that is denied, as for --allow; it takes precedence")
	choiceFlag(flags, &o.others, "default", "whether destinations without a rule are allowed", "allow", "deny")
	choiceFlag(flags, &o.udp, "udp", "whether UDP besides DNS is carried; denied datagrams are rejected and reported", "allow", "deny")
	publish := func(text string) ([]command.Port, error) {
		ports := o.config.Publish
		for item := range strings.SplitSeq(text, ",") {
			port, err := command.ParsePort(item)
			if err != nil {
				return nil, err
			}
			ports = append(ports, port)
		}
		return ports, nil
	}
	parsed(flags, &o.config.Publish, publish, "publish", "p", "", "[address:]port[:port]", "make a port of the command reachable at a port of this machine, by default on 127.0.0.1, and show what arrives there")
	parsedSwitch(flags, &o.config.PublishAll, "publish-all", "P", "publish every port at which the command listens, on 127.0.0.1")
	faults := func(text string) (fault.Set, error) {
		rule, err := fault.Parse(text)
		return append(o.config.Faults, rule), err
	}
	parsed(flags, &o.config.Faults, faults, "fault", "", "", "fault", "a fault on purpose, in both directions, such as \"host=api.example,delay=200ms,percent=10\", \"abort=503\", \"rate=1MB/s\" or \"reset\"; may be repeated, the first that is drawn counts")
	parsedSwitch(flags, &o.config.Decrypt, "decrypt", "", "end TLS in pillion and show what is inside; the command gets a certificate authority of this run by variables such as SSL_CERT_FILE, and servers are verified as always")
	parsed(flags, &o.config.Servers, parseServers, "dns-servers", "", "", "addresses", "DNS servers to ask, separated by commas; empty: those in /etc/resolv.conf")
}

// parseUI verifies the address of the live page. What it shows is for this machine only.
func parseUI(text string) (string, error) {
	host, port, err := net.SplitHostPort(text)
	if err == nil && port != "0" {
		_, err = capture.ParsePort(port)
	}
	if err != nil || host == "" || !ownport.NamesLoopback(host) {
		return "", fmt.Errorf("%s is not an address and a port of loopback: use 127.0.0.1:0 or [::1]:8080", capture.Quoted(text))
	}
	return text, nil
}

// parseBodies reads the size of recorded bodies.
func parseBodies(text string) (int, error) {
	n, err := parseBytes(text)
	if err == nil && n > command.MaxBodies {
		return 0, fmt.Errorf("more than %dMi, which all bodies may take together", command.MaxBodies>>20)
	}
	return n, err
}

// rulesFlag adds to target, so that it may be repeated.
func rulesFlag(flags *pflag.FlagSet, target *[]egress.Rule, name, usage string) {
	parse := func(text string) ([]egress.Rule, error) {
		rules := *target
		for item := range strings.SplitSeq(text, ",") {
			rule, err := egress.ParseRule(item)
			if err != nil {
				return nil, err
			}
			rules = append(rules, rule)
		}
		return rules, nil
	}
	parsed(flags, target, parse, name, "", "", "destinations", usage)
}

// run runs the command. Its exit status is that of the program.
func (o *runOptions) run(args []string) error {
	o.config.Rules.DenyOthers = o.others == "deny"
	o.config.Datagrams = o.udp == "allow"
	if len(o.config.Rules.Allow) > 0 && !o.config.Rules.DenyOthers {
		return valueError{errors.New("--allow has no effect while other destinations are allowed: add --default deny")}
	}
	if o.config.Bodies > 0 && !o.config.Archives() {
		return valueError{errors.New("--record-bodies has no effect without an HTTP Archive: add --record FILE.har")}
	}
	if o.config.Credentials && !o.config.Archives() {
		return valueError{errors.New("--record-credentials has no effect without an HTTP Archive: add --record FILE.har")}
	}
	if log := o.config.Log; !slices.Contains([]string{"off", "text", "json"}, log) && !strings.ContainsAny(log, "./") {
		return valueError{fmt.Errorf("--log %s: use off, text or json, or the path of a file, such as ./%[1]s", log)}
	}
	o.config.Command, o.config.Version = args, version
	o.config.Errors = os.Stderr
	o.config.Summary = o.summary == "on" || o.summary == automatic && terminal.IsTerminal(os.Stderr)
	o.config.Logger = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
	status, err := command.Run(o.config)
	if status == 0 && err == nil {
		return nil
	}
	return exitStatus{status, err}
}
