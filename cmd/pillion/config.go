package main

import (
	"context"
	"fmt"
	"io"
	"net/url"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/pillion-proxy/pillion/internal/commandline"
	"github.com/pillion-proxy/pillion/internal/configview"
	"github.com/pillion-proxy/pillion/internal/terminal"
)

// newConfig is `pillion config`.
func newConfig() *cobra.Command {
	cmd := commandline.Group(&cobra.Command{
		Use:   "config",
		Short: "Show what the control plane has configured",
	})
	cmd.AddCommand(newConfigShow(), newConfigFindings())
	return cmd
}

func newConfigShow() *cobra.Command {
	var admin adminOptions
	form := outputText
	kinds := make([]string, len(configview.Kinds))
	for i, k := range configview.Kinds {
		kinds[i] = string(k)
	}
	cmd := &cobra.Command{
		Use:   "show KIND [NAME]",
		Short: "Show " + strings.Join(kinds[:len(kinds)-1], ", ") + " or " + kinds[len(kinds)-1] + " objects, one line each, or details by name",
		Long: `Show what the control plane has configured: a line for each object of a kind, or with a name all details of the objects
that have it. A cluster or endpoint is found by the cluster's name or by the host in it, a listener by its name or address,
a route by its table, virtual host or domain, a name by the host or its short name.

The kinds are ` + strings.Join(kinds, ", ") + `. "istioctl proxy-config" shows the same in Envoy's terms.`,
		Example: "pillion config show cluster\npillion config show cluster web.shop.svc.cluster.local\npillion config show route 8080 -o json",
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) < 1 || len(args) > 2 {
				return usageError{Err: fmt.Errorf("%d arguments: use KIND [NAME]; the kinds are %s", len(args), strings.Join(kinds, ", "))}
			}
			if _, err := configview.ParseKind(args[0]); err != nil {
				return usageError{Err: err}
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := applyEnvironment(cmd.Flags()); err != nil {
				return err
			}
			kind, _ := configview.ParseKind(args[0]) // Args has accepted it
			query := url.Values{}
			if len(args) == 2 {
				query.Set("name", args[1])
			}
			var view configview.View
			if err := admin.readJSON(cmd.Context(), "/config/"+string(kind), query.Encode(), &view); err != nil {
				return err
			}
			out := cmd.OutOrStdout()
			if form == outputJSON {
				return printJSON(out, view)
			}
			_, err := io.WriteString(out, terminal.Config(&view, len(args) == 2, terminal.NewPainter(out)))
			return ignoreClosed(err)
		},
		ValidArgsFunction: func(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
			switch len(args) {
			case 0:
				return kinds, cobra.ShellCompDirectiveNoFileComp
			case 1:
				return completeNames(cmd.Context(), &admin, args[0]), cobra.ShellCompDirectiveNoFileComp
			}
			return nil, cobra.ShellCompDirectiveNoFileComp
		},
	}
	bindView(cmd, &form, &admin)
	return cmd
}

// completeNames returns the names of the agent's objects of a kind. It returns nothing if the agent does not answer soon.
func completeNames(ctx context.Context, admin *adminOptions, text string) []string {
	kind, err := configview.ParseKind(text)
	if err != nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	var view configview.View
	if admin.readJSON(ctx, "/config/"+string(kind), "", &view) != nil {
		return nil
	}
	return view.ObjectNames()
}

func newConfigFindings() *cobra.Command {
	var admin adminOptions
	form := outputText
	cmd := &cobra.Command{
		Use:   "findings",
		Short: "List what of the configuration is not honoured, and where it comes from",
		Long: `List what of the control plane's configuration is not honoured, the most important first. The classes are security (what
it concerns is closed), traffic (traffic goes otherwise than configured) and cosmetic. The origin is the resource of
Kubernetes that it stems from, if istiod sent it.

The exit status is 0, with and without findings.`,
		Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := applyEnvironment(cmd.Flags()); err != nil {
				return err
			}
			var list struct {
				Findings []configview.Finding `json:"findings"`
			}
			if err := admin.readJSON(cmd.Context(), "/config/findings", "", &list); err != nil {
				return err
			}
			out := cmd.OutOrStdout()
			if form == outputJSON {
				return printJSON(out, list)
			}
			_, err := io.WriteString(out, terminal.Findings(list.Findings, terminal.NewPainter(out)))
			return ignoreClosed(err)
		},
	}
	bindView(cmd, &form, &admin)
	return cmd
}

// bindView adds the flags of a command that shows something of a running agent.
func bindView(cmd *cobra.Command, form *output, admin *adminOptions) {
	flags := cmd.Flags()
	flags.SortFlags = false
	parsed(flags, form, parseOutput, "output", "o", string(*form), "text|json", "output format")
	admin.bind(flags)
}
