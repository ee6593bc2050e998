package main

import (
	"github.com/spf13/cobra"

	"github.com/pillion-proxy/pillion/iptables"
)

// newCleanup is `pillion cleanup`. It needs none of init's arguments: what is ours is found by its name.
func newCleanup() *cobra.Command {
	var options changeOptions
	cmd := &cobra.Command{
		Use:   "cleanup",
		Short: "Take away all that init has made in this network namespace",
		Long: `Take away all that init has made in this network namespace, in whichever flavour of iptables or in nftables, whatever the
arguments were: the rules, the policy routing of TPROXY, ::6 on the loopback, and in nftables the built-in chains of the
raw, mangle and nat tables, and the tables, where nobody has anything in them. Rules of other people stay as they are.
There being nothing to take away is a success.`,
		Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := applyEnvironment(cmd.Flags()); err != nil {
				return err
			}
			return options.inNamespace(func() error {
				return options.carryOut(cmd.Context(), cmd.OutOrStdout(), options.log.logger(cmd.ErrOrStderr()), iptables.PlanCleanup)
			})
		},
	}
	options.bind(cmd.Flags(), "print what would be removed, and change nothing")
	return cmd
}
