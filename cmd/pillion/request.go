package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
)

const (
	requestTime    = time.Minute
	maxAnswer      = 256 << 20 // more than a dump or all metrics of an agent ever are
	maxComplaint   = 1 << 10   // of an answer that becomes an error
	requestExample = "pillion request GET config_dump\npillion request POST logging?level=debug"
)

// debugPorts are those that pilot-agent's request asks: the admin server, the debugging port of old versions, status and
// readiness.
var debugPorts = []uint16{15000, 15004, 15020, 15021}

// newRequest is `pillion request`, with the arguments and the flag of pilot-agent's.
func newRequest() *cobra.Command {
	port := debugPorts[0]
	cmd := &cobra.Command{
		Use:   "request METHOD PATH [BODY]",
		Short: "Ask the agent's admin server and print its answer",
		Long: "Send a request to the agent on loopback and print the body of its answer, and a line's end. An answer over 399\n" +
			"is an error, but for 404.",
		Example: requestExample,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) < 2 || len(args) > 3 {
				return usageError{fmt.Errorf("%d arguments: use METHOD PATH [BODY], such as GET config_dump", len(args))}
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := applyEnvironment(cmd.Flags()); err != nil {
				return err
			}
			if !slices.Contains(debugPorts, port) {
				return fmt.Errorf("--debug-port %d is none of the agent's: use 15000, 15004, 15020 or 15021", port)
			}
			ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGTERM, syscall.SIGINT)
			defer stop()
			ctx, cancel := context.WithTimeout(ctx, requestTime)
			defer cancel()
			body := strings.Join(args[2:], "")
			url := fmt.Sprintf("http://127.0.0.1:%d/%s", port, strings.TrimPrefix(args[1], "/"))
			return request(ctx, cmd.OutOrStdout(), strings.ToUpper(args[0]), url, body)
		},
	}
	flags := cmd.Flags()
	portFlag(flags, &port, "debug-port", "which of the agent's ports to ask: 15000, 15004, 15020 or 15021")
	twin(flags, "debug-port", "PILLION_REQUEST_DEBUG_PORT")
	return cmd
}

// request sends one request, and copies the body of its answer to out. No proxy that the environment names is used.
func request(ctx context.Context, out io.Writer, method, url, body string) error {
	request, err := http.NewRequestWithContext(ctx, method, url, strings.NewReader(body))
	if err != nil {
		return fmt.Errorf("making the request: %w", err)
	}
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DisableCompression: true}}
	response, err := client.Do(request)
	if err != nil {
		return fmt.Errorf("asking the agent: %w", err)
	}
	defer response.Body.Close()
	if response.StatusCode > 399 && response.StatusCode != http.StatusNotFound {
		complaint, _ := io.ReadAll(io.LimitReader(response.Body, maxComplaint))
		return fmt.Errorf("%s %s: the agent answered %s: %s", method, url, response.Status, strings.Join(strings.Fields(string(complaint)), " "))
	}
	n, err := io.Copy(out, io.LimitReader(response.Body, maxAnswer+1))
	if err == nil && n > maxAnswer {
		err = errors.New("it is longer than 256 MiB; ask for a part of it")
	}
	if err != nil {
		return fmt.Errorf("reading the answer: %w", err)
	}
	_, err = fmt.Fprintln(out)
	return err
}
