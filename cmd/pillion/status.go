package main

import (
	"io"

	"github.com/spf13/cobra"

	"github.com/pillion-proxy/pillion/internal/live"
	"github.com/pillion-proxy/pillion/internal/terminal"
)

// newStatus is `pillion status`.
func newStatus() *cobra.Command {
	var admin adminOptions
	form := outputText
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show the state of a running agent",
		Long: `Show the state of a running agent on one screen: its version and age, whether it is ready or which gates are closed, how
much it forwards and has forwarded, and why requests and connections failed.

The exit status is 0 if the agent answers, ready or not; "pillion wait" waits for readiness.`,
		Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := applyEnvironment(cmd.Flags()); err != nil {
				return err
			}
			var s live.Snapshot
			if err := admin.readJSON(cmd.Context(), "/live", "", &s); err != nil {
				return err
			}
			out := cmd.OutOrStdout()
			if form == outputJSON {
				s.Connections, s.Destinations, s.Peers = nil, nil, nil // too long for one screen; /live has them
				return printJSON(out, s)
			}
			_, err := io.WriteString(out, terminal.Status(&s, terminal.NewPainter(out)))
			return ignoreClosed(err)
		},
	}
	flags := cmd.Flags()
	flags.SortFlags = false
	parsed(flags, &form, parseOutput, "output", "o", string(form), "text|json", "output format")
	admin.bind(flags)
	return cmd
}
