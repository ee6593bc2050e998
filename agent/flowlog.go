package agent

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/upstream"
)

// refusalPeriod bounds the log lines that clients can cause: for each reason one refusal in this time.
const refusalPeriod = time.Second

// flowLog logs connections and requests that have ended: each one at debug level, and refused connections as warnings. It is
// a flow.Sink.
type flowLog struct {
	log   *slog.Logger
	level slog.Leveler // of log, at most; asking the log itself takes several calls for each request
	loop  sync.Once    // for logging the first connection that the rules sent back to the agent

	mu       sync.Mutex
	refusals map[flow.Reason]*refusals
}

// refusals of one reason.
type refusals struct {
	logged  time.Time
	skipped int // since logged
}

// Closed logs one record.
func (l *flowLog) Closed(r *flow.Record) {
	loops := errors.Is(r.Err, upstream.ErrLoop)
	if loops {
		l.loop.Do(func() { l.logLoop(r) })
	}
	if (r.Reason.ByPolicy() || r.Reason.OfHandshake()) && !loops {
		if skipped, ok := l.admit(r); ok {
			l.log.LogAttrs(context.Background(), slog.LevelWarn, "connection refused",
				append(attributes(r), slog.Int("not_logged_before", skipped))...)
		}
		return
	}
	if l.level.Level() <= slog.LevelDebug {
		what := "connection closed"
		if r.IsRequest() {
			what = "request"
		}
		l.log.LogAttrs(context.Background(), slog.LevelDebug, what, attributes(r)...)
	}
}

// logLoop logs the cause of a loop. There is one line for all of them: the cause is a setting, and every connection that the
// rules capture has the same end.
func (l *flowLog) logLoop(r *flow.Record) {
	remedy := "run the agent as a user or group that the rules exempt (--proxy-uid and --proxy-gid of init, 1337 by default)"
	if r.Direction == flow.Inbound {
		remedy = "run \"pillion rules check\": no rule may capture connections from 127.0.0.6 and ::6, or with TPROXY those with its mark"
	}
	l.log.LogAttrs(context.Background(), slog.LevelError, "the rules capture the agent's own connections, so all captured ones fail",
		slog.String("direction", r.Direction.String()), slog.String("original_destination", orDash(r.OriginalDestination)),
		slog.Int("uid", os.Geteuid()), slog.Int("gid", os.Getegid()), slog.String("remedy", remedy))
}

// admit reports whether r may be logged, and how many refusals of its reason were skipped since the last one that was
// logged.
func (l *flowLog) admit(r *flow.Record) (skipped int, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.refusals == nil {
		l.refusals = make(map[flow.Reason]*refusals)
	}
	seen := l.refusals[r.Reason]
	if seen == nil {
		seen = &refusals{}
		l.refusals[r.Reason] = seen
	}
	now := time.Now()
	if now.Sub(seen.logged) < refusalPeriod {
		seen.skipped++
		return 0, false
	}
	skipped = seen.skipped
	seen.logged, seen.skipped = now, 0
	return skipped, true
}

func attributes(r *flow.Record) []slog.Attr {
	attrs := []slog.Attr{
		slog.String("direction", r.Direction.String()),
		slog.String("protocol", r.Protocol.String()),
		slog.String("downstream", r.Downstream.String()),
		slog.String("original_destination", orDash(r.OriginalDestination)),
		slog.String("upstream_local", orDash(r.UpstreamLocal)),
		slog.Uint64("received", r.Received.Load()),
		slog.Uint64("sent", r.Sent.Load()),
		slog.Duration("duration", r.Duration.Round(time.Microsecond)),
		slog.String("reason", string(r.Reason)),
	}
	if flags := r.Flags(); flags != "" || r.IsRequest() {
		attrs = append(attrs, slog.String("flags", flags))
	}
	if r.Protocol == flow.TLS {
		attrs = append(attrs, slog.String("server_name", r.TLS().ServerName), slog.String("alpn", strings.Join(r.TLS().ALPN, ",")))
	}
	if r.IsRequest() {
		attrs = append(attrs, requestAttributes(r)...)
	}
	if r.Err != nil {
		attrs = append(attrs, slog.String("error", r.Err.Error()))
	}
	return attrs
}

func requestAttributes(r *flow.Record) []slog.Attr {
	attrs := []slog.Attr{
		slog.String("method", string(r.HTTP.Method)),
		slog.String("path", string(r.HTTP.Path)),
		slog.String("authority", string(r.HTTP.Authority)),
		slog.String("request_id", string(r.HTTP.ID)),
		slog.Int("status", r.HTTP.Status),
		slog.String("details", r.Details()),
	}
	if r.HTTP.GRPCStatus != nil {
		attrs = append(attrs, slog.String("grpc_status", string(r.HTTP.GRPCStatus)))
	}
	return attrs
}

func orDash(address netip.AddrPort) string {
	if !address.IsValid() {
		return "-"
	}
	return address.String()
}
