// Package healthz reports whether the agent is alive and ready, and waits for readiness.
//
// Readiness is a set of named gates. They are evaluated for each response, and a 503 lists the closed gates with the
// reasons. There is no cached state that could be stale.
package healthz

import (
	"fmt"
	"io"
	"net/http"
	"strings"
)

// Gate is one condition of readiness. Open returns nil if the condition holds, otherwise the reason. It is called from any
// goroutine and must not block.
type Gate struct {
	Name string
	Open func() error
}

// NewHandler serves /healthz/ready, with 200 if all gates are open and 503 otherwise, and /healthz/live, always with 200.
// Other paths are 404. Methods other than GET and HEAD are 405.
func NewHandler(gates ...Gate) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz/ready", func(w http.ResponseWriter, _ *http.Request) {
		closed := Closed(gates)
		if len(closed) == 0 {
			io.WriteString(w, "ready\n")
			return
		}
		http.Error(w, "not ready\n"+strings.Join(closed, "\n"), http.StatusServiceUnavailable)
	})
	mux.HandleFunc("GET /healthz/live", func(w http.ResponseWriter, _ *http.Request) {
		io.WriteString(w, "alive\n")
	})
	return mux
}

// Closed returns a line for each closed gate: its name and the reason.
func Closed(gates []Gate) []string {
	var closed []string
	for _, gate := range gates {
		if err := gate.Open(); err != nil {
			closed = append(closed, fmt.Sprintf("%s: %v", gate.Name, err))
		}
	}
	return closed
}
