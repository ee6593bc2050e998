package main

import (
	"fmt"
	"log/slog"
	"net"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/pillion-proxy/pillion/internal/inject"
)

// newWebhook is `pillionctl webhook`.
func newWebhook() *cobra.Command {
	var options inject.Options
	var config inject.WebhookConfig
	address, level := ":9443", "info"
	cmd := &cobra.Command{
		Use:   "webhook",
		Short: "Serve the admission webhook that injects pods as they are created",
		Long: `Serve the admission webhook that injects pods as they are created: /inject for the API server and /healthz for probes,
both over TLS. Certificate and key are reloaded when their files change. A pod that cannot be injected as its annotations
request is refused with the reason. deploy/kustomize and deploy/helm install it.`,
		Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := options.Validate(); err != nil {
				return flagNamed(err)
			}
			var from slog.Level
			if err := from.UnmarshalText([]byte(level)); err != nil {
				return fmt.Errorf("--log-level %q: use debug, info, warn or error", level)
			}
			ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGTERM, syscall.SIGINT)
			defer stop()
			listener, err := net.Listen("tcp", address)
			if err != nil {
				return fmt.Errorf("--listen %s: %w", address, err)
			}
			config.Listener, config.Options = listener, options
			config.Log = slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), &slog.HandlerOptions{Level: from}))
			config.Log.Info("webhook started", "address", listener.Addr().String())
			return inject.Serve(ctx, config)
		},
	}
	flags := cmd.Flags()
	flags.SortFlags = false
	flags.StringVar(&address, "listen", address, "address and port")
	flags.StringVar(&config.CertFile, "tls-cert", "/tls/tls.crt", "certificate file, PEM")
	flags.StringVar(&config.KeyFile, "tls-key", "/tls/tls.key", "key file, PEM")
	bindOptions(flags, &options)
	flags.StringVar(&level, "log-level", level, "lowest level to log: debug, info, warn or error")
	return cmd
}
