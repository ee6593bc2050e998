package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os/signal"
	"strconv"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/pillion-proxy/pillion/internal/live"
	"github.com/pillion-proxy/pillion/internal/terminal"
)

// newTap is `pillion tap`.
func newTap() *cobra.Command {
	var admin adminOptions
	form, count := outputText, 0
	filters := make(map[string]*string)
	cmd := &cobra.Command{
		Use:   "tap",
		Short: "Follow requests and connections as they end",
		Long: `Follow requests and connections of a running agent as they end: one line for each, with the time, the direction, the
status, what it was, where it went, how long it took, and why it ended when that was not in order.

What is asked for with flags must all fit. A host is that of a request, with or without its port, or the server name of
a TLS connection. When more ends than can be shown, how many were skipped is said on standard error.

  pillion tap --direction outbound --status 5xx
  pillion tap --host api.example --path /v2/ -n 10 -o json`,
		Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := applyEnvironment(cmd.Flags()); err != nil {
				return err
			}
			query := url.Values{"n": {strconv.Itoa(count)}}
			for key, value := range filters {
				if *value != "" {
					query.Set(key, *value)
				}
			}
			ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGINT, syscall.SIGTERM)
			defer stop()
			body, err := admin.open(ctx, "/live/tap", query.Encode())
			if err != nil {
				return err
			}
			defer body.Close()
			err = followTap(body, cmd.OutOrStdout(), cmd.ErrOrStderr(), form)
			switch {
			case ctx.Err() != nil || errors.Is(err, syscall.EPIPE):
				return nil // whoever looked has seen enough
			case err == nil && count == 0:
				return errors.New("the agent has ended")
			}
			return err
		},
	}
	flags := cmd.Flags()
	flags.SortFlags = false
	for _, key := range live.FilterKeys {
		filters[key] = new(string)
		parse := func(text string) (string, error) { return text, new(live.Filter).Set(key, text) }
		parsed(flags, filters[key], parse, key, "", "", filterKinds[key][0], filterKinds[key][1])
	}
	parsed(flags, &count, parseCount, "count", "n", "0", "count", "end after so many; 0 for no end")
	parsed(flags, &form, parseOutput, "output", "o", string(form), "form", "form of the lines: text or json")
	admin.bind(flags)
	return cmd
}

// filterKinds has, for each key of a filter, what its value is and what it chooses.
var filterKinds = map[string][2]string{
	"direction": {"inbound|outbound", "only this direction"},
	"host":      {"name", "only requests for this host, or TLS connections to it"},
	"path":      {"prefix", "only requests whose path begins so"},
	"status":    {"status", "only requests answered so: 404, or a class such as 5xx"},
	"address":   {"address", "only with this address on any side: IP, IP:port or CIDR"},
}

const longestTapLine = 64 << 10

// followTap prints lines of the tap until it ends.
func followTap(body io.Reader, out, complaints io.Writer, form output) error {
	paint, aligned := terminal.NewPainter(out), terminal.IsTerminal(out)
	scanner := bufio.NewScanner(body)
	scanner.Buffer(nil, longestTapLine)
	for scanner.Scan() {
		line := bytes.TrimSpace(scanner.Bytes())
		if len(line) == 0 {
			continue // the agent shows that it is there
		}
		var tapped live.Tapped
		if err := json.Unmarshal(line, &tapped); err != nil {
			return fmt.Errorf("reading a record: %w", err)
		}
		var err error
		switch {
		case tapped.Record == nil:
			fmt.Fprintf(complaints, "skipped %d: more ended than could be shown\n", tapped.Skipped)
		case form == outputJSON:
			_, err = fmt.Fprintf(out, "%s\n", line)
		default:
			_, err = fmt.Fprintln(out, terminal.Record(tapped.Record, paint, aligned))
		}
		if err != nil {
			return err
		}
	}
	if err := scanner.Err(); err != nil && !errors.Is(err, context.Canceled) {
		return fmt.Errorf("following the agent: %w", err)
	}
	return nil
}
