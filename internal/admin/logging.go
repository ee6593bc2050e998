package admin

import (
	"fmt"
	"log/slog"
	"net/http"
	"strings"
)

// logger is the one that this agent has.
const logger = "pillion"

// levels are Envoy's, with what they are here. critical and off are above all that the agent logs.
var levels = []struct {
	name  string
	level slog.Level
}{
	{"trace", slog.LevelDebug - 4}, {"debug", slog.LevelDebug}, {"info", slog.LevelInfo}, {"warning", slog.LevelWarn},
	{"error", slog.LevelError}, {"critical", slog.LevelError + 4}, {"off", slog.LevelError + 8},
}

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
		if l.name == name {
			return l.level, nil
		}
	}
	return 0, fmt.Errorf("%.50q is not a level: use trace, debug, info, warning, error, critical or off", name)
}

// logging prints the level after it has done what the query asks: one of level=L, paths=logger:L,... and logger=L.
func (h *handler) logging(w http.ResponseWriter, r *http.Request) {
	query := r.URL.Query()
	if len(query) > 1 {
		refuse(w, "%d parameters: use one of level=, paths= and %s=", len(query), logger)
		return
	}
	for name := range query {
		level, err := asked(name, query.Get(name))
		if err != nil {
			refuse(w, "%v", err)
			return
		}
		if h.SetLogLevel == nil {
			notSupported(w)
			return
		}
		h.SetLogLevel(level)
	}
	answer(w, http.StatusOK, fmt.Sprintf("active loggers:\n  %s: %s\n", logger, levelName(h.LogLevel())))
}

// asked is the level that a parameter of /logging asks for.
func asked(parameter, value string) (slog.Level, error) {
	switch parameter {
	case "level", logger:
		return parseLevel(value)
	case "paths":
		var level slog.Level
		for pair := range strings.SplitSeq(value, ",") {
			name, text, found := strings.Cut(pair, ":")
			if !found {
				return 0, fmt.Errorf("paths=%.50q: use logger:level, such as %s:debug", value, logger)
			}
			if name != logger {
				return 0, notALogger(name)
			}
			var err error
			if level, err = parseLevel(text); err != nil {
				return 0, err
			}
		}
		return level, nil
	}
	return 0, notALogger(parameter)
}

func notALogger(name string) error {
	return fmt.Errorf("%.50q is not a logger: the only one is %s", name, logger)
}
