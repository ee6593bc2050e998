package terminal

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/pillion-proxy/pillion/internal/live"
)

// Top is the table of the busiest destinations. It has at most rows of them; 0 means all.
func Top(s *live.Snapshot, paint Painter, rows int) string {
	var text strings.Builder
	fmt.Fprintf(&text, "pillion %s, up %s: in %s/s, out %s/s, %d open\n", s.Version, showAge(s.UptimeSeconds),
		showRate(s.Inbound.FlowsPerSecond), showRate(s.Outbound.FlowsPerSecond), s.Open)
	if len(s.Destinations) == 0 {
		text.WriteString("no traffic yet\n")
		return text.String()
	}
	width := len("DESTINATION")
	for _, d := range s.Destinations {
		width = min(48, max(width, len(d.Name)))
	}
	line := func(direction, name, rate, success, p50, p95, p99, bytes string) string {
		return fmt.Sprintf("%s %s %s %s %s %s %s %s", pad(direction, 8), pad(printable(name), width), pad(rate, -8), success, pad(p50, -8), pad(p95, -8), pad(p99, -8), pad(bytes, -7))
	}
	fmt.Fprintln(&text, paint.Paint(Bold, line("", "DESTINATION", "PER S", pad("SUCCESS", -8), "P50", "P95", "P99", "BYTES")))
	for i, d := range s.Destinations {
		if rows > 0 && i == rows {
			fmt.Fprintf(&text, "and %d more\n", len(s.Destinations)-rows)
			break
		}
		colour := ""
		if d.Errors > 0 {
			colour = Red
		}
		fmt.Fprintln(&text, line(d.Direction, d.Name, showRate(d.FlowsPerSecond), paint.Paint(colour, pad(showSuccess(d.Flows, d.Errors), -8)),
			showMS(d.P50MS), showMS(d.P95MS), showMS(d.P99MS), showBytes(float64(d.Bytes))))
	}
	return text.String()
}

const topReasons = 5

// Status is an agent's state on one screen.
func Status(s *live.Snapshot, paint Painter) string {
	var text strings.Builder
	row := func(name, format string, values ...any) {
		fmt.Fprintf(&text, "%-12s %s\n", name, fmt.Sprintf(format, values...))
	}
	row("pillion", "%s, up %s", s.Version, showAge(s.UptimeSeconds))
	if s.Ready {
		row("ready", "%s", paint.Paint(Green, "yes"))
	} else {
		row("ready", "%s", paint.Paint(Red, "no"))
		for _, gate := range s.Gates {
			if !gate.Open {
				row("", "%s: %s", gate.Name, gate.Why)
			}
		}
	}
	row("connections", "%d open, new per second: %s in, %s out", s.Open,
		showRate(s.Inbound.ConnectionsPerSecond), showRate(s.Outbound.ConnectionsPerSecond))
	row("requests", "per second: %s in, %s out", showRate(s.Inbound.RequestsPerSecond), showRate(s.Outbound.RequestsPerSecond))
	row("latency", "in %s p50, %s p99; out %s p50, %s p99",
		showMS(s.Inbound.P50MS), showMS(s.Inbound.P99MS), showMS(s.Outbound.P50MS), showMS(s.Outbound.P99MS))
	failed, flows := s.Inbound.ErrorsPerSecond+s.Outbound.ErrorsPerSecond, s.Inbound.FlowsPerSecond+s.Outbound.FlowsPerSecond
	share, colour := 0.0, ""
	if failed > 0 {
		share, colour = 100*failed/flows, Red
	}
	row("errors", "%s of what ends, %s per second; %d since the start", paint.Paint(colour, fmt.Sprintf("%.1f%%", share)),
		showRate(failed), s.Inbound.Errors+s.Outbound.Errors)
	for i, reason := range s.Reasons {
		if i == topReasons {
			row("", "and %d other reasons", len(s.Reasons)-topReasons)
			break
		}
		row("", "%6d %s: %s", reason.Count, reason.Reason, reason.Text)
	}
	return text.String()
}

// Record is one line about a record: in columns if aligned, otherwise with single blanks between the words.
func Record(r *live.Record, paint Painter, aligned bool) string {
	column := func(text string, width int) string {
		if aligned {
			return pad(printable(text), width)
		}
		return printable(text)
	}
	status, colour := "-", ""
	if r.Status != 0 {
		status = strconv.Itoa(r.Status)
	}
	switch {
	case r.Failed:
		colour = Red
	case r.Status >= 400:
		colour = Yellow
	case r.Status != 0:
		colour = Green
	}
	what := r.Protocol
	if r.Request {
		what = r.Method + " " + r.Path
	} else if r.SNI != "" {
		what += " " + r.SNI
	}
	host := r.Authority
	if host == "" {
		host = r.Destination
	}
	words := []string{
		paint.Paint(Faint, r.Time.Local().Format("15:04:05.000")),
		column(r.Direction, 8),
		paint.Paint(colour, column(status, 3)),
		column(showMS(r.DurationMS), -7),
		column(showBytes(float64(r.Received+r.Sent)), -6),
		column(host, 28),
		printable(what),
	}
	if r.Failed {
		words = append(words, paint.Paint(colour, strings.TrimSpace(r.Reason+" "+r.Flags)))
	}
	return strings.Join(words, " ")
}
