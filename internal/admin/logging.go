package admin

import (
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"sync"
)

// ownLogger is the name of the agent's logger.
const ownLogger = "pillion"

// loggerNames are the loggers of Envoy, by which istioctl and scripts change levels, and the agent's own, in the order of
// the list.
var loggerNames = func() []string {
	names := strings.Fields(`admin alternate_protocols_cache assert aws backtrace basic_auth cache_filter client compression
		config conn_handler connection credential_injector decompression dns dynamic_forward_proxy eds ext_authz ext_proc file
		filter forward_proxy geolocation golang grpc happy_eyeballs hc health_checker http http2 hystrix init io jwt kafka
		key_value_store lua main matcher misc mongo multi_connection oauth2 pool quic quic_stream rate_limit_quota rbac rds
		redis router runtime secret stats tap thrift tracing udp upstream wasm websocket`)
	names = append(names, ownLogger)
	slices.Sort(names)
	return names
}()

// levels are Envoy's, with the corresponding levels of slog. critical and off are above all levels that the agent uses.
var levels = []struct {
	name  string
	level slog.Level
}{
	{"trace", slog.LevelDebug - 4}, {"debug", slog.LevelDebug}, {"info", slog.LevelInfo}, {"warning", slog.LevelWarn},
	{"error", slog.LevelError}, {"critical", slog.LevelError + 4}, {"off", slog.LevelError + 8},
}

// resetLevel is the level that `istioctl proxy-config log --reset` sends for all loggers: Envoy's default under Istio. It
// restores the agent's own default, since a reset must not hide messages that are logged by default.
const resetLevel = slog.LevelWarn

func levelName(level slog.Level) string {
	name := levels[0].name
	for _, l := range levels {
		if level >= l.level {
			name = l.name
		}
	}
	return name
}

func parseLevel(name string) (slog.Level, error) {
	for _, l := range levels {
		if l.name == name || name == "warn" && l.level == slog.LevelWarn {
			return l.level, nil
		}
	}
	return 0, fmt.Errorf("%.50q is not a level: use trace, debug, info, warning, error, critical or off", name)
}

// loggers holds the levels that were requested. The agent has one log, so all loggers have the same effective level: that of
// ownLogger, or a more verbose one that was requested for another logger. The order of requests for several loggers, which
// istioctl sends one by one, does not matter.
type loggers struct {
	mu        sync.Mutex
	byDefault slog.Level
	own       slog.Level            // of ownLogger
	others    map[string]slog.Level // by name, if requested
}

// change changes levels and sets the effective one.
func (l *loggers) change(change levelChange, set func(slog.Level)) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if change.all != nil {
		l.own = *change.all
		if l.own == resetLevel {
			l.own = l.byDefault
		}
		clear(l.others)
	}
	for name, level := range change.some {
		if name == ownLogger {
			l.own = level
		} else {
			l.others[name] = level
		}
	}
	level := l.own
	for _, other := range l.others {
		level = min(level, other)
	}
	set(level)
}

// listLoggers prints the loggers as Envoy does.
func listLoggers(level slog.Level) string {
	var b strings.Builder
	b.WriteString("active loggers:\n")
	for _, name := range loggerNames {
		fmt.Fprintf(&b, "  %s: %s\n", name, levelName(level))
	}
	return b.String()
}

// levelChange is a requested change of levels.
type levelChange struct {
	all  *slog.Level
	some map[string]slog.Level
}

// logging changes the levels as the query asks, by level=L, paths=LOGGER:L,... or LOGGER=L, and prints them.
func (h *handler) logging(w http.ResponseWriter, r *http.Request) {
	query := r.URL.Query()
	if len(query) > 1 {
		refuse(w, "%d parameters: use one of level=, paths= and LOGGER=", len(query))
		return
	}
	for name := range query {
		change, err := parseLevelChange(name, query.Get(name))
		if err != nil {
			refuse(w, "%v", err)
			return
		}
		if h.SetLogLevel == nil {
			notSupported(w)
			return
		}
		h.loggers.change(change, h.SetLogLevel)
	}
	answer(w, http.StatusOK, listLoggers(h.LogLevel()))
}

func parseLevelChange(parameter, value string) (change levelChange, err error) {
	change.some = make(map[string]slog.Level)
	switch parameter {
	case "level":
		level, err := parseLevel(value)
		change.all = &level
		return change, err
	case "paths":
		for pair := range strings.SplitSeq(value, ",") {
			i := strings.IndexAny(pair, ":=")
			if i < 0 {
				return change, fmt.Errorf("paths=%.50q: use LOGGER:LEVEL, such as %s:debug", value, ownLogger)
			}
			if err := change.add(pair[:i], pair[i+1:]); err != nil {
				return change, err
			}
		}
		return change, nil
	}
	return change, change.add(parameter, value)
}

func (c *levelChange) add(name, text string) error {
	if !slices.Contains(loggerNames, name) {
		return fmt.Errorf("%.50q is not a logger: POST /logging without parameters lists them", name)
	}
	level, err := parseLevel(text)
	if err == nil {
		c.some[name] = level
	}
	return err
}
