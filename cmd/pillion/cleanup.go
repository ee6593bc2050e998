package main

import (
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/pillion-proxy/pillion/iptables"
)

// newCleanup is `pillion cleanup`. It needs none of init's arguments: what is ours is found by its name.
func newCleanup() *cobra.Command {
	var dryRun bool
	output := outputText
	log := logOptions{}
	cmd := &cobra.Command{
		Use:   "cleanup",
		Short: "Take away all that init has made in this network namespace",
		Long: `Take away all that init has made in this network namespace, in whichever flavour of iptables it is, whatever the
arguments were. Rules of other people stay as they are. There being nothing to take away is a success.`,
		Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGINT, syscall.SIGTERM)
			defer stop()
			plan, err := iptables.PlanCleanup(ctx)
			if err != nil {
				return err
			}
			return carryOut(ctx, plan, dryRun, output, cmd.OutOrStdout(), log.logger(cmd.ErrOrStderr()))
		},
	}
	parsedSwitch(cmd.Flags(), &dryRun, "dry-run", "n", "print what would be removed, and change nothing")
	output.bind(cmd.Flags())
	log.bind(cmd.Flags())
	return cmd
}
