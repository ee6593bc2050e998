// Package logring keeps the last lines of the agent's own log in memory, so that a support case has it after the fact.
//
// It holds at most 1,000 lines and 256 KiB; older lines are dropped first. Its lines have neither the queries of paths nor
// request IDs, unlike the log itself at level debug.
package logring

import (
	"io"
	"log/slog"
	"regexp"
	"strings"
	"sync"
)

// The bounds of a Ring.
const (
	MaxLines = 1000
	MaxBytes = 256 << 10
	maxLine  = 4 << 10 // longer lines are cut
)

// Ring is the last lines. The zero value is empty and ready for use. It is safe for concurrent use.
type Ring struct {
	mu    sync.Mutex
	lines [MaxLines]string
	first int // the oldest
	count int
	bytes int
}

// Write adds one line with its newline. slog's handlers write one line at a time.
func (r *Ring) Write(line []byte) (int, error) {
	kept := string(line)
	if len(kept) > maxLine {
		kept = strings.ToValidUTF8(kept[:maxLine-len("…\n")], "") + "…\n"
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for r.count == MaxLines || r.bytes+len(kept) > MaxBytes {
		r.bytes -= len(r.lines[r.first])
		r.lines[r.first] = ""
		r.first = (r.first + 1) % MaxLines
		r.count--
	}
	r.lines[(r.first+r.count)%MaxLines] = kept
	r.count++
	r.bytes += len(kept)
	return len(line), nil
}

// WriteTo writes the lines, the oldest first. The ring is not locked meanwhile.
func (r *Ring) WriteTo(w io.Writer) (int64, error) {
	r.mu.Lock()
	var text strings.Builder
	text.Grow(r.bytes)
	for i := range r.count {
		text.WriteString(r.lines[(r.first+i)%MaxLines])
	}
	r.mu.Unlock()
	n, err := io.WriteString(w, text.String())
	return int64(n), err
}

// Handler returns a handler that adds records of a level to the ring, as text.
func (r *Ring) Handler(level slog.Leveler) slog.Handler {
	return slog.NewTextHandler(r, &slog.HandlerOptions{Level: level, ReplaceAttr: withoutSecrets})
}

// withoutSecrets removes what a client may have sent in confidence.
func withoutSecrets(_ []string, a slog.Attr) slog.Attr {
	switch a.Key {
	case "path":
		path, _, _ := strings.Cut(a.Value.String(), "?")
		return slog.String(a.Key, path)
	case "request_id":
		return slog.Attr{}
	case "error", "err":
		return slog.String(a.Key, query().ReplaceAllString(a.Value.String(), "?…"))
	}
	return a
}

// query is a query in the URL of an error, which net/http quotes.
var query = sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile(`\?[^\s"]+`) })
