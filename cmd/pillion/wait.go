package main

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"os/signal"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/pillion-proxy/pillion/healthz"
)

// newWait is `pillion wait`, with the flags of pilot-agent.
func newWait() *cobra.Command {
	timeout, requestTimeout, period := 60, 500, 500
	address := "http://localhost:15021/healthz/ready"
	cmd := &cobra.Command{
		Use:   "wait",
		Short: "Wait until the agent is ready",
		Long:  "Poll the agent's readiness until it is ready (exit status 0) or the time is up (exit status 1).",
		Args:  noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := applyEnvironment(cmd.Flags()); err != nil {
				return err
			}
			if parsed, err := url.Parse(address); err != nil || parsed.Scheme != "http" || parsed.Host == "" {
				return valueError{fmt.Errorf("--url %q: not an http URL; use one such as http://localhost:15021/healthz/ready", address)}
			}
			if requestTimeout == 0 || period == 0 {
				return valueError{errors.New("--requestTimeoutMillis and --periodMillis: 0 is too short; use 1 or more")}
			}
			ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGTERM, syscall.SIGINT)
			defer stop()
			ctx, cancel := context.WithTimeout(ctx, time.Duration(timeout)*time.Second)
			defer cancel()
			return healthz.Wait(ctx, address, time.Duration(requestTimeout)*time.Millisecond, time.Duration(period)*time.Millisecond)
		},
	}
	flags := cmd.Flags()
	flags.SortFlags = false
	countFlag(flags, &timeout, "timeoutSeconds", "how long to wait, in seconds")
	countFlag(flags, &requestTimeout, "requestTimeoutMillis", "time limit of one request, in milliseconds")
	countFlag(flags, &period, "periodMillis", "time between requests, in milliseconds")
	flags.StringVar(&address, "url", address, "URL to poll")
	twin(flags, "timeoutSeconds", "PILLION_WAIT_TIMEOUT_SECONDS")
	twin(flags, "requestTimeoutMillis", "PILLION_WAIT_REQUEST_TIMEOUT_MILLIS")
	twin(flags, "periodMillis", "PILLION_WAIT_PERIOD_MILLIS")
	twin(flags, "url", "PILLION_WAIT_URL")
	return cmd
}
