package main

import (
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/pillion-proxy/pillion/internal/live"
)

// newStatus is `pillion status`.
func newStatus() *cobra.Command {
	var admin adminOptions
	form := outputText
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Tell how a running agent is",
		Long: `Tell how a running agent is, on one screen: its version and age, whether it is ready or what keeps it from that, how much
it carries, and why requests and connections failed.

The exit status is 0 when the agent answers, ready or not; "pillion wait" waits for readiness.`,
		Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := applyEnvironment(cmd.Flags()); err != nil {
				return err
			}
			var s live.Snapshot
			if err := admin.readJSON(cmd.Context(), "/live", &s); err != nil {
				return err
			}
			out := cmd.OutOrStdout()
			if form == outputJSON {
				s.Connections, s.Destinations, s.Peers = nil, nil, nil // one screen; /live has all of it
				return printJSON(out, s)
			}
			_, err := io.WriteString(out, statusText(&s, newPainter(out)))
			return ignoreClosed(err)
		},
	}
	flags := cmd.Flags()
	flags.SortFlags = false
	parsed(flags, &form, parseOutput, "output", "o", string(form), "form", "form of the result: text or json")
	admin.bind(flags)
	return cmd
}

const topReasons = 5

// statusText is the screen.
func statusText(s *live.Snapshot, paint painter) string {
	var text strings.Builder
	row := func(name, format string, values ...any) {
		fmt.Fprintf(&text, "%-12s %s\n", name, fmt.Sprintf(format, values...))
	}
	row("pillion", "%s, up %s", s.Version, showAge(s.UptimeSeconds))
	if s.Ready {
		row("ready", "%s", paint.paint(green, "yes"))
	} else {
		row("ready", "%s", paint.paint(red, "no"))
		for _, gate := range s.Gates {
			if !gate.Open {
				row("", "%s: %s", gate.Name, gate.Why)
			}
		}
	}
	row("connections", "%d open, new per second: %s in, %s out", s.Open,
		showRate(s.Inbound.ConnectionsPerSecond), showRate(s.Outbound.ConnectionsPerSecond))
	row("requests", "per second: %s in, %s out", showRate(s.Inbound.RequestsPerSecond), showRate(s.Outbound.RequestsPerSecond))
	row("latency", "in %s p50, %s p99; out %s p50, %s p99",
		showMS(s.Inbound.P50MS), showMS(s.Inbound.P99MS), showMS(s.Outbound.P50MS), showMS(s.Outbound.P99MS))
	failed, flows := s.Inbound.ErrorsPerSecond+s.Outbound.ErrorsPerSecond, s.Inbound.FlowsPerSecond+s.Outbound.FlowsPerSecond
	share, colour := 0.0, ""
	if failed > 0 {
		share, colour = 100*failed/flows, red
	}
	row("errors", "%s of what ends, %s per second; %d since the start", paint.paint(colour, fmt.Sprintf("%.1f%%", share)),
		showRate(failed), s.Inbound.Errors+s.Outbound.Errors)
	for i, reason := range s.Reasons {
		if i == topReasons {
			row("", "and %d other reasons", len(s.Reasons)-topReasons)
			break
		}
		row("", "%6d %s: %s", reason.Count, reason.Reason, reason.Text)
	}
	return text.String()
}
