package main

import (
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/pillion-proxy/pillion/internal/edge"
)

// gatewayOptions are an agent's options, and those of a gateway without a control plane.
type gatewayOptions struct {
	*agentOptions
	edge  edge.Config
	file  string // in the place of edge; may be empty
	check bool
}

// newGateway is `pillion gateway`.
func newGateway() *cobra.Command {
	o := &gatewayOptions{agentOptions: newAgentOptions()}
	o.config.HTTP.MaxHeadBytes, o.config.HTTP.MaxHeadFields = 60<<10, 100 // those of Envoy's listeners
	o.config.Drain.Delay = 0
	cmd := &cobra.Command{
		Use:   "gateway [flags]",
		Short: "Take HTTP and HTTPS in from outside, without a control plane",
		Long: `Listen for HTTP/1 and HTTP/2, with or without TLS, and send each request to an endpoint of the route for its host and path.

The settings are flags or, with --config, a file of the same names, one on a line. The file and the certificates are read again
when they change; what cannot be used leaves the settings before in force.

SIGTERM starts a shutdown that lets requests finish; a second SIGTERM cuts them. Gateways of a mesh are run by
"pillion proxy router".`,
		Example: `pillion gateway --listen 8080 --route '*=127.0.0.1:3000'
pillion gateway --listen 8443 --redirect-http 8080 --cert shop.crt --key shop.key \
    --route shop.example=10.0.0.1:8080,10.0.0.2:8080 --route shop.example/api=api.internal:9000
pillion gateway --config edge.yaml --check`,
		Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := applyEnvironment(cmd.Flags()); err != nil {
				return err
			}
			return o.run(cmd)
		},
	}
	o.bind(cmd.Flags())
	return cmd
}

// gatewayFlags are the flags of the agent that a gateway has as well.
var gatewayFlags = strings.Fields(`readiness-port status-port metrics-port admin-port connect-timeout idle-timeout max-head-bytes
	max-head-fields max-held-bytes request-head-timeout request-timeout upstream-idle-timeout max-connections memory-limit
	drain-delay drain-timeout dns-servers access-log access-log-encoding access-log-format access-log-filter metrics-max-series
	profiling log-level log-format`)

func (o *gatewayOptions) bind(flags *pflag.FlagSet) {
	flags.SortFlags = false
	for i := range edge.Settings {
		s := &edge.Settings[i]
		set := func(value string) (edge.Config, error) {
			next := o.edge
			return next, s.Set(&next, value)
		}
		if s.Kind == "bool" {
			parsed(flags, &o.edge, set, s.Name, "", "false", s.Kind, s.Usage).NoOptDefVal = "true"
			continue
		}
		parsed(flags, &o.edge, set, s.Name, "", "", s.Kind, s.Usage+"; may be repeated")
	}
	textFlag(flags, &o.file, "config", "path", "file with these settings instead, as \"listen: 8443\" on a line; several values are a list of YAML")
	parsedSwitch(flags, &o.check, "check", "", "check the settings and the certificates, and end")
	all := pflag.NewFlagSet("", pflag.ContinueOnError)
	o.agentOptions.bind(all)
	for _, name := range gatewayFlags {
		flags.AddFlag(all.Lookup(name))
	}
}

func (o *gatewayOptions) run(cmd *cobra.Command) error {
	flags := cmd.Flags()
	for i := range edge.Settings {
		if name := edge.Settings[i].Name; o.file != "" && flags.Changed(name) {
			return valueError{fmt.Errorf("--%s has no effect with --config: write it into %s", name, o.file)}
		}
	}
	if err := o.prepare(flags); err != nil {
		return err
	}
	source, err := edge.New(o.edge, o.file, o.config.Log)
	if err != nil {
		if setting := (*edge.Error)(nil); o.file == "" && errors.As(err, &setting) {
			err = fmt.Errorf("--%w", err)
		}
		return valueError{err}
	}
	if o.check {
		return nil
	}
	collectLess()
	o.config.Edge = source
	return runAgent(o.config)
}
