package main

import (
	"errors"
	"fmt"
	"os/signal"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/pillion-proxy/pillion/internal/clustercheck"
	"github.com/pillion-proxy/pillion/internal/commandline"
	"github.com/pillion-proxy/pillion/internal/kubeapi"
)

// errFailed ends a check that has printed what failed.
var errFailed = errors.New("a check failed")

// newCheck is `pillionctl check`.
func newCheck() *cobra.Command {
	var kubeconfig, context, namespace, output string
	cmd := &cobra.Command{
		Use:   "check",
		Short: "Check what pods with pillion need from a cluster",
		Long: `Check what pods with pillion need from a cluster: its version and nodes, the webhook with its certificates and pods, and
the Pod Security level of a namespace. A pod is sent as a dry run, to see whether it would be admitted and injected. One
line for each check, with a remedy if it failed. Nothing is created or changed.

The exit status is 1 if a check failed. A check that the credentials do not permit is skipped.`,
		Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if output != "text" && output != "json" {
				return usageError{Err: fmt.Errorf("--output %q: use text or json", output)}
			}
			ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGINT, syscall.SIGTERM)
			defer stop()
			api, err := kubeapi.Open(ctx, kubeconfig, context)
			if err != nil {
				return err
			}
			if namespace == "" {
				namespace = api.Namespace
			}
			found := clustercheck.Run(ctx, api, clustercheck.Config{Version: version, Namespace: namespace, Now: time.Now()})
			if err := found.Write(cmd.OutOrStdout(), output == "json"); err != nil {
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
	flags.StringVarP(&namespace, "namespace", "n", "", "namespace in which pods are to get pillion (default: the context's)")
	flags.StringVar(&kubeconfig, "kubeconfig", "", "kubeconfig file (default: $KUBECONFIG, ~/.kube/config, or the pod's service account)")
	flags.StringVar(&context, "context", "", "context of the kubeconfig (default: the current one)")
	flags.StringVarP(&output, "output", "o", "text", "output format: text or json")
	commandline.SetChoices(flags.Lookup("output"), "text", "json")
	return cmd
}
