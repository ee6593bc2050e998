package main

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/internal/commandline"
	"github.com/pillion-proxy/pillion/internal/terminal"
	"github.com/pillion-proxy/pillion/iptables"
	"github.com/pillion-proxy/pillion/iptables/kernel"
	"github.com/pillion-proxy/pillion/iptables/report"
)

// newRules is `pillion rules`. Its commands change nothing.
func newRules() *cobra.Command {
	cmd := commandline.Group(&cobra.Command{
		Use:   "rules",
		Short: "Inspect the rules: list them, compare them with the flags, trace a packet",
	})
	cmd.AddCommand(newRulesShow(), newRulesCheck(), newRulesExplain())
	return cmd
}

// viewOptions are common to the commands about rules: init's flags, and which rules are meant.
type viewOptions struct {
	*initOptions
	planned bool
	like    string
	view    *pflag.FlagSet // where to look, and the output format
	capture flagGroups     // any of them selects the planned rules
}

func newViewOptions() *viewOptions {
	return &viewOptions{initOptions: newInitOptions(false), like: "init"}
}

// bind adds init's flags behind those of the command itself.
func (o *viewOptions) bind(cmd *cobra.Command, title string, own func(*pflag.FlagSet)) {
	view := flagBinding{title, func(flags *pflag.FlagSet) {
		own(flags)
		o.bindView(flags)
	}}
	like := flagBinding{"Whose flags these are", func(flags *pflag.FlagSet) {
		choiceFlag(flags, &o.like, "like", "the command whose defaults and verdicts apply", "init", "istio-iptables")
		o.bindDualStack(flags)
	}}
	groups := bindGroups(cmd, append([]flagBinding{view, like}, o.captureGroups()...)...)
	o.view, o.capture = groups[0].flags, groups[1:]
}

// look runs fn in the selected network namespace.
func (o *viewOptions) look(fn func() error) error {
	if err := applyEnvironment(o.view); err != nil {
		return err
	}
	return howToLook(o.inNamespace(fn))
}

func (o *viewOptions) bindPlanned(flags *pflag.FlagSet) {
	parsedSwitch(flags, &o.planned, "planned", "", "use the rules that init would install for the flags below and the environment, not those in force; implied by any of these flags")
}

// readSpec derives the spec from flags and environment.
func (o *viewOptions) readSpec(flags *pflag.FlagSet, log *slog.Logger) error {
	if err := applyEnvironment(flags); err != nil {
		return err
	}
	if o.like == "istio-iptables" {
		o.spec.Compat = true
		if !flags.Changed("drop-invalid") {
			o.spec.DropInvalid = false
		}
	}
	if err := o.complete(log); err != nil {
		return err
	}
	if err := o.spec.Validate(); err != nil {
		return valueError{nameSettings(flags, err)}
	}
	return nil
}

// rules returns the planned rules if a flag of init is set, else those in force, with the chains of others.
func (o *viewOptions) rules(cmd *cobra.Command, log *slog.Logger) (iptables.Live, error) {
	for _, group := range o.capture {
		group.flags.VisitAll(func(flag *pflag.Flag) { o.planned = o.planned || flag.Changed })
	}
	if o.planned {
		if err := o.readSpec(cmd.Flags(), log); err != nil {
			return iptables.Live{}, err
		}
		planned, err := iptables.Planned(o.spec)
		return iptables.Live{Held: planned}, err
	}
	live, err := iptables.Look(cmd.Context())
	for _, warning := range live.Warnings {
		log.Warn(warning)
	}
	return live, err
}

// print writes a result in the selected format.
func (o *viewOptions) print(to io.Writer, value any, text string) error {
	if o.output == outputJSON {
		return writeJSON(to, value)
	}
	_, err := io.WriteString(to, decorate(text, terminal.NewPainter(to)))
	return err
}

const noRules = "there are no rules\n"

// howToLook replaces the remedy of a missing capability. The original is for init's container; the rules of a running pod
// are read from another container or from the node.
func howToLook(err error) error {
	var missing kernel.MissingCapabilityError
	if !errors.As(err, &missing) {
		return err
	}
	return &namedError{fmt.Sprintf("capability CAP_%s is missing, which reading the rules requires: "+
		"use \"kubectl debug POD -it --profile=netadmin --custom=root.json --image=IMAGE -- pilot-agent rules show\" "+
		"with {\"securityContext\": {\"runAsUser\": 0, \"runAsNonRoot\": false}} in root.json, "+
		"or as root on the node \"pillion rules show --network-namespace /proc/PID/ns/net\"", string(missing)), err}
}

func newRulesShow() *cobra.Command {
	o := newViewOptions()
	cmd := &cobra.Command{
		Use:   "show",
		Short: "Show the rules in force, or the planned ones, with their reasons",
		Long: `Show the rules in force in this network namespace: all flavours and both families, in the tables that init uses, in the
order in which packets reach them, with the reasons of our rules and the kernel's counters. With any of init's flags, or
with --planned, show the rules that init would install.`,
		Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return o.look(func() error {
				live, err := o.rules(cmd, o.log.logger(cmd.ErrOrStderr()))
				if err != nil {
					return err
				}
				text := report.ShowText(live.Held)
				if text == "" {
					text = noRules
				}
				return o.print(cmd.OutOrStdout(), struct {
					Planned bool           `json:"planned"`
					Rules   []report.Shown `json:"rules"`
				}{o.planned, report.Show(live.Held)}, text)
			})
		},
	}
	o.bind(cmd, "What is shown, and the output", o.bindPlanned)
	return cmd
}

// errDifferent ends a check that has printed differences.
var errDifferent = errors.New("the rules do not match the flags")

// unknownError means that a check could not compare.
type unknownError struct{ err error }

func (e unknownError) Error() string { return e.err.Error() }
func (e unknownError) Unwrap() error { return e.err }

func newRulesCheck() *cobra.Command {
	o := newViewOptions()
	cmd := &cobra.Command{
		Use:   "check",
		Short: "Compare the rules in force with those that init would install for the same flags",
		Long: `Compare the rules in force in this network namespace with those that init would install for the same flags and
environment. Print each difference in one line, with its effect on traffic, and a warning for each rule of others that
precedes our jump and may decide about a packet. Exit status: 0 without a difference, 1 with one, 2 if the comparison
failed.`,
		Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			err := o.look(func() error {
				if err := o.readSpec(cmd.Flags(), o.log.logger(cmd.ErrOrStderr())); err != nil {
					return err
				}
				backend, err := o.backendOptions.choose()
				if err != nil {
					return err
				}
				found, err := report.Check(cmd.Context(), o.spec, backend)
				if err != nil {
					return err
				}
				if err := o.print(cmd.OutOrStdout(), found, found.String()); err != nil || found.Equal {
					return err
				}
				return errDifferent
			})
			if err == nil || errors.Is(err, errDifferent) {
				return err
			}
			return unknownError{err}
		},
	}
	o.bind(cmd, "Where, and the output", o.backendOptions.bind)
	return cmd
}

func newRulesExplain() *cobra.Command {
	o := newViewOptions()
	var question report.Question
	ids := [2]string{}
	cmd := &cobra.Command{
		Use:   "explain",
		Short: "Trace a packet through the rules and print the verdict",
		Long: `Trace a packet through the rules in force in this network namespace, or with any of init's flags or --planned through
those that init would install. Print each rule that the packet meets, with its reason, and the verdict. The tables are raw,
mangle and nat, not filter. No packet is sent.

    pillion rules explain --uid 1000 --dst 198.51.100.7:443
    pillion rules explain --from 203.0.113.9 --dst :8080`,
		Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if question.From.IsValid() == (ids[0] != "") {
				return usageError{Err: errors.New("give either the sending user (--uid) or the remote sender (--from)")}
			}
			if question.Dst.Port() == 0 {
				return usageError{Err: errors.New("give the destination: --dst 198.51.100.7:443")}
			}
			if ids[0] != "" && ids[1] == "" {
				question.GID = question.UID
			}
			return o.look(func() error {
				live, err := o.rules(cmd, o.log.logger(cmd.ErrOrStderr()))
				if err != nil {
					return err
				}
				packet, err := question.Packet()
				if err != nil {
					return valueUnlessSystem(err)
				}
				explanation := report.Explain(packet, live.Held, live.Foreign)
				return o.print(cmd.OutOrStdout(), explanation, explanation.String())
			})
		},
	}
	o.bind(cmd, "The packet, and the output", func(flags *pflag.FlagSet) {
		id := func(into *uint32, text *string) func(string) (uint32, error) {
			return func(given string) (uint32, error) {
				number, err := strconv.ParseUint(given, 10, 32)
				if err != nil {
					return 0, fmt.Errorf("%s is not a user or group: use a number such as 1000", capture.Quoted(given))
				}
				*into, *text = uint32(number), given
				return *into, nil
			}
		}
		parsed(flags, new(uint32), id(&question.UID, &ids[0]), "uid", "", "", "number", "user of the local process that sends the packet")
		parsed(flags, new(uint32), id(&question.GID, &ids[1]), "gid", "", "", "number", "group of that process (default: the number of the user)")
		parsed(flags, &question.From, report.ParseAddress, "from", "", "", "address", "remote host that sends the packet")
		parsed(flags, &question.Dst, report.ParseDestination, "dst", "", "", "address:port", "destination; with --from, :port means the pod's own address")
		parsed(flags, &question.Src, report.ParseAddress, "src", "", "", "address", "source address of a local process (default: the kernel's choice)")
		parsed(flags, &question.Interface, capture.ParseInterface, "iface", "", "", "name", "interface on which the packet arrives or leaves (default: by the routes)")
		parsed(flags, &question.Protocol, report.ParseProtocol, "proto", "", "tcp", "tcp|udp", "protocol")
		parsed(flags, &question.Mark, capture.ParseNumber, "mark", "", "0", "number", "packet mark; decimal or 0x…")
		parsed(flags, &question.State, report.ParseState, "state", "", "new", "new|established|invalid", "conntrack state")
		o.bindPlanned(flags)
	})
	return cmd
}

// decorate makes headings bold and remarks faint.
func decorate(text string, paint terminal.Painter) string {
	var pretty strings.Builder
	for line := range strings.Lines(text) {
		body := strings.TrimSuffix(line, "\n")
		switch {
		case strings.HasPrefix(strings.TrimSpace(body), "#"):
			pretty.WriteString(paint.Paint(terminal.Faint, body) + "\n")
		case !strings.HasPrefix(body, " "):
			pretty.WriteString(paint.Paint(terminal.Bold, body) + "\n")
		default:
			pretty.WriteString(line)
		}
	}
	return pretty.String()
}
