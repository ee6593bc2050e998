package main

import (
	"fmt"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/pillion-proxy/pillion/internal/checklist"
	"github.com/pillion-proxy/pillion/internal/preflight"
)

// newCheck is `pillion check`.
func newCheck() *cobra.Command {
	var admin adminOptions
	agent := newAgentOptions()
	where := changeOptions{}
	form := outputText
	cmd := &cobra.Command{
		Use:   "check",
		Short: "Check what init and the agent need here",
		Long: `Check what init and the agent need from this network namespace, its kernel and its container: versions, capabilities,
whether the kernel takes the rules, the rules in force, ports, limits, and the agent if it runs. One line for each check,
with a remedy if it failed.

It changes nothing here. Whether rules can be installed is tried in a network namespace of its own, which requires
CAP_SYS_ADMIN; without it the tables are only read. The exit status is 1 if a check failed.`,
		Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := applyEnvironment(cmd.Flags()); err != nil {
				return err
			}
			config := preflight.Config{
				Version:     version,
				Admin:       admin.address,
				MemoryLimit: func() (int64, error) { return memoryLimit(controlGroup) },
				HowToLook:   howToLook,
				Elsewhere:   where.namespace != "",
			}
			ports := agent.config.Ports
			for _, port := range []preflight.Port{
				{Number: ports.Outbound, Setting: "--outbound-port"}, {Number: ports.Inbound, Setting: "--inbound-port"},
				{Number: ports.Readiness, Setting: "--readiness-port"}, {Number: ports.Status, Setting: "--status-port"},
				{Number: ports.Metrics, Setting: "--metrics-port"}, {Number: ports.Admin, Setting: "--admin-port"},
			} {
				if port.Number != 0 {
					config.Ports = append(config.Ports, port)
				}
			}
			var found checklist.List
			err := where.inNamespace(func() error {
				found = preflight.Run(cmd.Context(), config)
				return nil
			})
			if err != nil {
				return err
			}
			if err := ignoreClosed(found.Write(cmd.OutOrStdout(), form == outputJSON)); err != nil {
				return fmt.Errorf("printing the checks: %w", err)
			}
			if found.Failed() {
				return errFailed
			}
			return nil
		},
	}
	flags := cmd.Flags()
	flags.SortFlags = false
	parsed(flags, &form, parseOutput, "output", "o", string(form), "text|json", "output format")
	admin.bind(flags)
	where.namespaceFlag = parsed(flags, &where.namespace, asItIs, "network-namespace", "", "", "path", "check this network namespace, such as /proc/4711/ns/net")
	agentFlags := pflag.NewFlagSet("", pflag.ContinueOnError)
	agent.bind(agentFlags)
	for _, name := range []string{"outbound-port", "inbound-port", "readiness-port", "status-port", "metrics-port", "admin-port"} {
		flags.AddFlag(agentFlags.Lookup(name))
	}
	return cmd
}
