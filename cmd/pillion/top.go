package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/pillion-proxy/pillion/internal/live"
	"github.com/pillion-proxy/pillion/internal/terminal"
)

// topOptions are the flags of `pillion top`.
type topOptions struct {
	admin    adminOptions
	form     output
	interval time.Duration
	once     bool
	sorted   terminal.Order
}

// newTop is `pillion top`.
func newTop() *cobra.Command {
	o := &topOptions{form: outputText, interval: time.Second, sorted: terminal.ByRate}
	cmd := &cobra.Command{
		Use:   "top",
		Short: "Show the busiest destinations",
		Long: `Show the destinations of a running agent's traffic: for each, the requests and connections that end per second (mean of
ten seconds) and in total, the share that succeeded, the latency of requests in the last half to whole minute, and the
bytes. Totals are since the start of the agent.

On a terminal the table fills the screen and is redrawn at each interval. Keys: q quits; r, t, e, p, b and n sort by rate,
total, errors, p99 latency, bytes and name. Elsewhere the table is printed once.`,
		Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := applyEnvironment(cmd.Flags()); err != nil {
				return err
			}
			if o.interval < 100*time.Millisecond {
				return valueError{fmt.Errorf("--interval %v: use 100ms or more", o.interval)}
			}
			ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGINT, syscall.SIGTERM)
			defer stop()
			out := cmd.OutOrStdout()
			if o.once || o.form == outputJSON || !terminal.IsTerminal(out) {
				return o.print(ctx, out)
			}
			return o.watch(ctx, cmd.InOrStdin(), out)
		},
	}
	flags := cmd.Flags()
	flags.SortFlags = false
	durationFlag(flags, &o.interval, "interval", "time between two tables")
	parsedSwitch(flags, &o.once, "once", "", "print one table and exit")
	var names []string
	for _, order := range terminal.Orders {
		names = append(names, string(order))
	}
	parsed(flags, &o.sorted, func(text string) (terminal.Order, error) {
		if !slices.Contains(names, text) {
			return "", fmt.Errorf("unknown order %q: use one of %s", text, strings.Join(names, ", "))
		}
		return terminal.Order(text), nil
	}, "sort", "", string(o.sorted), strings.Join(names, "|"), "order of the rows")
	parsed(flags, &o.form, parseOutput, "output", "o", string(o.form), "text|json", "output format; json is printed once")
	o.admin.bind(flags)
	return cmd
}

// read returns the agent's state, with its destinations in order.
func (o *topOptions) read(ctx context.Context) (*live.Snapshot, error) {
	s := new(live.Snapshot)
	if err := o.admin.readJSON(ctx, "/live", "", s); err != nil {
		return nil, err
	}
	return s, nil
}

func (o *topOptions) print(ctx context.Context, out io.Writer) error {
	s, err := o.read(ctx)
	if err != nil {
		return err
	}
	terminal.Sort(s.Destinations, o.sorted)
	if o.form == outputJSON {
		return printJSON(out, s.Destinations)
	}
	_, err = io.WriteString(out, terminal.Top(s, terminal.NewPainter(out), terminal.Fit{Sorted: o.sorted}))
	return ignoreClosed(err)
}

// watch redraws the table at each interval, at each key and when the terminal changes its size, until q or the end of ctx.
func (o *topOptions) watch(ctx context.Context, in io.Reader, out io.Writer) (err error) {
	snapshot, err := o.read(ctx) // an agent that does not answer leaves the terminal as it is
	if err != nil {
		return err
	}
	keyboard, err := terminal.OpenKeyboard(in)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, keyboard.Close()) }()
	screen, err := terminal.OpenScreen(out)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, screen.Close()) }()
	resized := make(chan os.Signal, 1)
	signal.Notify(resized, syscall.SIGWINCH)
	defer signal.Stop(resized)

	// Reading in the background keeps the keys working while the agent is slow.
	ctx, cancel := context.WithCancel(ctx)
	var reading sync.WaitGroup
	defer reading.Wait()
	defer cancel()
	type result struct {
		snapshot *live.Snapshot
		err      error
	}
	results := make(chan result)
	reading.Go(func() {
		tick := time.NewTicker(o.interval)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
			case <-ctx.Done():
				return
			}
			s, err := o.read(ctx)
			select {
			case results <- result{s, err}:
			case <-ctx.Done():
				return
			}
		}
	})

	paint := terminal.NewPainter(out)
	for {
		terminal.Sort(snapshot.Destinations, o.sorted)
		columns, rows := terminal.Size(out)
		fit := terminal.Fit{Columns: columns, Rows: rows, Sorted: o.sorted, Keys: keyboard != nil}
		if err := screen.Draw(terminal.Top(snapshot, paint, fit)); err != nil {
			return ignoreClosed(err)
		}
		select {
		case got := <-results:
			if got.err != nil {
				return got.err
			}
			snapshot = got.snapshot
		case key := <-keyboard.Pressed():
			if key == 'q' {
				return nil
			}
			if order, ok := terminal.OrderOf(key); ok {
				o.sorted = order
			}
		case <-resized:
		case <-ctx.Done():
			return nil
		}
	}
}

func printJSON(out io.Writer, value any) error {
	encoder := json.NewEncoder(out)
	encoder.SetIndent("", "  ")
	return ignoreClosed(encoder.Encode(value))
}

// ignoreClosed turns the error of a reader that has closed, such as head, into success.
func ignoreClosed(err error) error {
	if errors.Is(err, syscall.EPIPE) {
		return nil
	}
	return err
}
