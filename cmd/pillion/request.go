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
	maxAnswer      = 256 << 20 // larger than any dump or scrape of an agent
	maxComplaint   = 1 << 10   // bytes of an error response that are printed
	requestExample = "pillion request GET config_dump\npillion request POST logging?level=debug"
)

// debugPorts are the ports that pilot-agent's request accepts: admin, the debugging port of old versions, status and
// readiness.
var debugPorts = []uint16{15000, 15004, 15020, 15021}

// newRequest is `pillion request`, with the arguments and the flag of `pilot-agent request`.
func newRequest() *cobra.Command {
	port := debugPorts[0]
	cmd := &cobra.Command{
		Use:   "request METHOD PATH [BODY]",
		Short: "Send a request to the agent's admin server and print the response",
		Long: "Send a request to the agent on loopback and print the body of the response and a newline. A status above 399 is\n" +
			"an error, except 404.",
		Example: requestExample,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) < 2 || len(args) > 3 {
				return usageError{Err: fmt.Errorf("%d arguments: use METHOD PATH [BODY], such as GET config_dump", len(args))}
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := applyEnvironment(cmd.Flags()); err != nil {
				return err
			}
			if !slices.Contains(debugPorts, port) {
				return valueError{fmt.Errorf("--debug-port %d is not one of the agent's ports: use 15000, 15004, 15020 or 15021", port)}
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
	portFlag(flags, &port, "debug-port", "the agent's port to send to: 15000, 15004, 15020 or 15021")
	twin(flags, "debug-port", "PILLION_REQUEST_DEBUG_PORT")
	return cmd
}

// request sends one request and copies the body of the response to out. It ignores the environment's HTTP proxies.
func request(ctx context.Context, out io.Writer, method, url, body string) error {
	request, err := http.NewRequestWithContext(ctx, method, url, strings.NewReader(body))
	if err != nil {
		return fmt.Errorf("making the request: %w", err)
	}
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DisableCompression: true}}
	response, err := client.Do(request)
	if err != nil {
		return fmt.Errorf("sending the request: %w", err)
	}
	defer response.Body.Close()
	if response.StatusCode > 399 && response.StatusCode != http.StatusNotFound {
		complaint, _ := io.ReadAll(io.LimitReader(response.Body, maxComplaint))
		return fmt.Errorf("%s %s: the agent answered %s: %s", method, url, response.Status, strings.Join(strings.Fields(string(complaint)), " "))
	}
	n, err := io.Copy(out, io.LimitReader(response.Body, maxAnswer+1))
	if err == nil && n > maxAnswer {
		err = errors.New("longer than 256 MiB; request a part of it")
	}
	if err != nil {
		return fmt.Errorf("reading the response: %w", err)
	}
	_, err = fmt.Fprintln(out)
	return err
}
