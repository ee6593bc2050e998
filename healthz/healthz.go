// Package healthz answers whether the agent is alive and ready, and asks the workload the same for the kubelet.
//
// Readiness is a set of named gates. Each is asked anew for each answer, and an answer of 503 names those that are
// closed and why. The workload's own probes are sent to the agent by whoever injected it: Probers run them, and what
// the kubelet hears is what it would have heard itself.
package healthz

import (
	"fmt"
	"io"
	"net/http"
	"strings"
)

// Gate is one thing that readiness waits for. Open returns nil when it is there, else why not. It is called from any
// goroutine and must answer at once.
type Gate struct {
	Name string
	Open func() error
}

// NewHandler serves /healthz/ready, which is 200 when every gate is open and 503 otherwise, and /healthz/live, which is
// 200 as long as anything answers. Other paths are 404, other methods than GET and HEAD are 405.
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

// Closed returns a line for each gate that is closed: its name and why.
func Closed(gates []Gate) []string {
	var closed []string
	for _, gate := range gates {
		if err := gate.Open(); err != nil {
			closed = append(closed, fmt.Sprintf("%s: %v", gate.Name, err))
		}
	}
	return closed
}
