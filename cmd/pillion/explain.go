package main

import (
	"errors"
	"fmt"
	"io"
	"net/netip"

	"github.com/spf13/cobra"

	"github.com/pillion-proxy/pillion/internal/configview"
	"github.com/pillion-proxy/pillion/internal/terminal"
)

// newExplain is `pillion explain`.
func newExplain() *cobra.Command {
	var admin adminOptions
	var headers []string
	var destination, source string
	var all bool
	q := configview.Question{}
	form, from := outputText, "outbound"
	cmd := &cobra.Command{
		Use:   "explain METHOD URL",
		Short: "Explain what becomes of a request, by the configuration in force",
		Long: `Explain what becomes of a request, by the configuration of the control plane that is in force: its listener and filter
chain, what policies decide, its virtual host and route, the earlier routes that came close and the condition that they
missed, and the clusters with their endpoints, TLS, timeouts and retries. The resources of Kubernetes that said so are named.

No request is sent. Weighted clusters are all listed. Faults that only a part of the requests get are named at the route and
do not change the result.`,
		Example: "pillion explain GET http://reviews:9080/reviews/1 -H 'end-user: jason'\npillion explain POST http://10.0.0.7:8080/ --from inbound --peer spiffe://cluster.local/ns/shop/sa/web",
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 2 {
				return usageError{Err: fmt.Errorf("%d arguments: use METHOD URL, such as GET http://reviews:9080/", len(args))}
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			if err := applyEnvironment(cmd.Flags()); err != nil {
				return err
			}
			q.Method, q.URL = args[0], args[1]
			if err := completeQuestion(&q, from, destination, source, headers); err != nil {
				return usageError{Err: err}
			}
			var e configview.Explanation
			if err := admin.readJSON(cmd.Context(), "/explain", q.Values().Encode(), &e); err != nil {
				return err
			}
			out := cmd.OutOrStdout()
			if form == outputJSON {
				return printJSON(out, e)
			}
			_, err = io.WriteString(out, terminal.Explanation(&e, all, terminal.NewPainter(out)))
			return ignoreClosed(err)
		},
		ValidArgsFunction: func(_ *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
			if len(args) == 0 {
				return []string{"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}, cobra.ShellCompDirectiveNoFileComp
			}
			return nil, cobra.ShellCompDirectiveNoFileComp
		},
	}
	flags := cmd.Flags()
	flags.StringArrayVarP(&headers, "header", "H", nil, "header field of the request, as `'NAME: VALUE'`; may be repeated")
	parsed(flags, &from, parseFrom, "from", "", from, "outbound|inbound", "direction of the request")
	flags.StringVar(&destination, "destination", "", "original destination, as `ADDRESS:PORT`; found by the URL if empty")
	flags.StringVar(&q.Peer, "peer", "", "`identity` of an inbound client with mutual TLS, such as spiffe://cluster.local/ns/shop/sa/web")
	flags.StringVar(&source, "source", "", "`ADDRESS` of an inbound client, for policies that look at it")
	flags.BoolVar(&all, "all", false, "list all earlier routes, also those for other paths")
	bindView(cmd, &form, &admin)
	return cmd
}

func parseFrom(text string) (string, error) {
	_, err := configview.ParseFrom(text)
	return text, err
}

func completeQuestion(q *configview.Question, from, destination, source string, headers []string) (err error) {
	if _, err := configview.ParseURL(q.URL); err != nil {
		return err
	}
	q.Inbound, _ = configview.ParseFrom(from) // parseFrom has accepted it
	if !q.Inbound && (q.Peer != "" || source != "") {
		return errors.New("--peer and --source describe an inbound client: add --from inbound")
	}
	if source != "" {
		if q.Source, err = netip.ParseAddr(source); err != nil {
			return fmt.Errorf("--source: %q is not an address, such as 198.51.100.7", source)
		}
	}
	if destination != "" {
		if q.Destination, err = netip.ParseAddrPort(destination); err != nil {
			return fmt.Errorf("--destination: %q is not an address with a port, such as 198.51.100.7:80", destination)
		}
	}
	for _, text := range headers {
		f, err := configview.ParseField(text)
		if err != nil {
			return fmt.Errorf("--header: %w", err)
		}
		q.Fields = append(q.Fields, f)
	}
	return nil
}
