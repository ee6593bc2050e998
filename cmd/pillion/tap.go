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
	"sync"
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
		Long: `Follow requests and connections of a running agent as they end, one line each: the time, the direction, the status, the
duration, the bytes, the host or destination, the request or protocol, and for a failure the reason.

Filters combine: a record must match all of them. A host is the host of a request, with or without its port, or the server
name of a TLS connection. Records that end faster than they can be shown are skipped, and counted on standard error.

What a policy denies is followed by a line for each policy, up to 16, indented: why it applies or not.

On a terminal each record takes one line of its width, q quits, and the number of records is printed at the end.

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
			ctx, cancel := context.WithCancel(ctx)
			defer cancel()
			body, err := admin.open(ctx, "/live/tap", query.Encode())
			if err != nil {
				return err
			}
			defer body.Close()
			quits, err := quitOnKey(cmd.InOrStdin(), cmd.OutOrStdout(), cancel)
			if err != nil {
				return err
			}
			defer quits()
			seen := tapped{out: cmd.OutOrStdout(), complaints: cmd.ErrOrStderr(), form: form}
			err = seen.follow(body)
			if terminal.IsTerminal(cmd.OutOrStdout()) && form == outputText {
				fmt.Fprintf(cmd.ErrOrStderr(), "%d records, %d failed, %d skipped\n", seen.records, seen.failed, seen.skipped)
			}
			switch {
			case ctx.Err() != nil || errors.Is(err, syscall.EPIPE):
				return nil // the reader has seen enough
			case err == nil && count == 0:
				return errors.New("the agent closed the stream")
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
	parsed(flags, &count, parseCount, "count", "n", "0", "count", "exit after this many records; 0: no limit")
	parsed(flags, &form, parseOutput, "output", "o", string(form), "text|json", "format of the lines")
	admin.bind(flags)
	return cmd
}

// filterKinds has, for each key of a filter, the kind of its value and its help text.
var filterKinds = map[string][2]string{
	"direction": {"inbound|outbound", "only this direction"},
	"host":      {"name", "only requests for this host, or TLS connections to it"},
	"path":      {"prefix", "only requests whose path begins with this"},
	"status":    {"status", "only responses with this status, such as 404, or of a class such as 5xx"},
	"address":   {"address", "only records with this address on either side: IP, IP:port or CIDR"},
}

const longestTapLine = 64 << 10

// quitOnKey calls quit when q is pressed, if both in and out are a terminal. The returned function ends that.
func quitOnKey(in io.Reader, out io.Writer, quit func()) (end func(), err error) {
	if !terminal.IsTerminal(out) {
		return func() {}, nil
	}
	keyboard, err := terminal.OpenKeyboard(in)
	if keyboard == nil || err != nil {
		return func() {}, err
	}
	var waiting sync.WaitGroup
	waiting.Go(func() {
		for key := range keyboard.Pressed() {
			if key == 'q' {
				quit()
			}
		}
	})
	return func() { keyboard.Close(); waiting.Wait() }, nil
}

// tapped prints records and counts them.
type tapped struct {
	out, complaints          io.Writer
	form                     output
	records, failed, skipped uint64
}

// follow prints lines of the tap until it ends. The size of the terminal is read for each, because it may change.
func (t *tapped) follow(body io.Reader) error {
	paint, aligned := terminal.NewPainter(t.out), terminal.IsTerminal(t.out)
	scanner := bufio.NewScanner(body)
	scanner.Buffer(nil, longestTapLine)
	for scanner.Scan() {
		line := bytes.TrimSpace(scanner.Bytes())
		if len(line) == 0 {
			continue // a heartbeat
		}
		var tapped live.Tapped
		if err := json.Unmarshal(line, &tapped); err != nil {
			return fmt.Errorf("reading a record: %w", err)
		}
		var err error
		switch {
		case tapped.Record == nil:
			t.skipped += tapped.Skipped
			fmt.Fprintf(t.complaints, "skipped %d records: too many to show\n", tapped.Skipped)
			continue
		case t.form == outputJSON:
			_, err = fmt.Fprintf(t.out, "%s\n", line)
		default:
			columns, _ := terminal.Size(t.out)
			_, err = fmt.Fprintln(t.out, terminal.Record(tapped.Record, paint, aligned, columns)+terminal.Policies(tapped.Record))
		}
		t.records++
		if tapped.Failed {
			t.failed++
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
