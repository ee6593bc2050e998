package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os/signal"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/pillion-proxy/pillion/internal/live"
	"github.com/pillion-proxy/pillion/internal/terminal"
)

// newTop is `pillion top`.
func newTop() *cobra.Command {
	var admin adminOptions
	form, interval, once := outputText, time.Second, false
	cmd := &cobra.Command{
		Use:   "top",
		Short: "Show the busiest destinations",
		Long: `Show where a running agent's traffic goes: for each destination the requests and connections that end each second (the
mean of ten), the share that succeeded since the start, the latency of requests in the last half to whole minute, and
the bytes since the start.

On a terminal the table is made anew at each interval, until it is interrupted. Elsewhere it is printed once.`,
		Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := applyEnvironment(cmd.Flags()); err != nil {
				return err
			}
			if interval < 100*time.Millisecond {
				return fmt.Errorf("--interval %v: too short to read; use 100ms or more", interval)
			}
			out := cmd.OutOrStdout()
			ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGINT, syscall.SIGTERM)
			defer stop()
			if once || form == outputJSON || !terminal.IsTerminal(out) {
				return showTop(ctx, &admin, out, form, 0)
			}
			tick := time.NewTicker(interval)
			defer tick.Stop()
			for {
				if err := showTop(ctx, &admin, out, form, topRows); err != nil {
					if ctx.Err() != nil {
						return nil
					}
					return err
				}
				select {
				case <-tick.C:
				case <-ctx.Done():
					return nil
				}
			}
		},
	}
	flags := cmd.Flags()
	flags.SortFlags = false
	durationFlag(flags, &interval, "interval", "time from one table to the next")
	parsedSwitch(flags, &once, "once", "", "print one table and end")
	parsed(flags, &form, parseOutput, "output", "o", string(form), "form", "form of the result: text or json, which is printed once")
	admin.bind(flags)
	return cmd
}

// topRows is how much of a table that is made anew fits on most terminals.
const topRows = 20

// showTop prints the table; with rows, over the last one.
func showTop(ctx context.Context, admin *adminOptions, out io.Writer, form output, rows int) error {
	var s live.Snapshot
	if err := admin.readJSON(ctx, "/live", &s); err != nil {
		return err
	}
	if form == outputJSON {
		return printJSON(out, s.Destinations)
	}
	text := terminal.Top(&s, terminal.NewPainter(out), rows)
	if rows > 0 {
		text = "\x1b[H\x1b[J" + text // from the upper left corner on
	}
	_, err := io.WriteString(out, text)
	return ignoreClosed(err)
}

func printJSON(out io.Writer, value any) error {
	encoder := json.NewEncoder(out)
	encoder.SetIndent("", "  ")
	return ignoreClosed(encoder.Encode(value))
}

// ignoreClosed forgives a reader who has seen enough, such as head.
func ignoreClosed(err error) error {
	if errors.Is(err, syscall.EPIPE) {
		return nil
	}
	return err
}
