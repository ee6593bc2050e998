package main

import (
	"github.com/spf13/cobra"

	"github.com/pillion-proxy/pillion/iptables"
)

// newCleanup is `pillion cleanup`. It does not need init's arguments: our rules are found by their names.
func newCleanup() *cobra.Command {
	var options changeOptions
	cmd := &cobra.Command{
		Use:   "cleanup",
		Short: "Remove everything that init has installed in this network namespace",
		Long: `Remove everything that init has installed in this network namespace, in either flavour of iptables or in nftables and
whatever its arguments were: the rules, the policy routing of TPROXY, ::6 on the loopback, and in nftables the built-in
chains and the tables raw, mangle and nat if they are unused. Rules of others stay unchanged. It is a success if there is
nothing to remove.`,
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
