// Package status serves the status port: readiness, the workload's probes, metrics, quit and drain, profiles.
//
// The port is open to the network, because the kubelet and Prometheus connect from there. Paths that change the agent or
// show its internals answer processes of this pod only.
package status

import (
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"strconv"
	"time"

	"github.com/pillion-proxy/pillion/internal/ownport"
)

// Config configures the handler. All fields except the last two are required.
type Config struct {
	// Ready answers a GET with 200 when the agent is ready, else with a code and the reasons.
	Ready http.Handler
	// Probers answers /app-health/ and /app-lifecycle/.
	Probers http.Handler
	// Metrics answers /stats/prometheus and /metrics. If it may take longer than a few seconds it calls ownport.Extend.
	Metrics http.Handler
	// Quit ends the agent, and Drain begins the drain of inbound. Both are called after the response was sent, possibly
	// more than once and from several goroutines. They must not block.
	Quit, Drain func()
	// Log receives accepted and refused orders.
	Log *slog.Logger
	// MetricsLocalOnly serves metrics to processes of this pod only.
	MetricsLocalOnly bool
	// Profiling serves /debug/pprof/.
	Profiling bool
}

const (
	maxBytes   = 64 << 10 // of a request's body; a form may have one
	maxProfile = 2 * time.Minute
)

// NewHandler serves the status port with the paths, codes and bodies of Istio's agent. Serve it with ownport.NewServer.
func NewHandler(config Config) http.Handler {
	metrics := config.Metrics
	if config.MetricsLocalOnly {
		metrics = config.localOnly(metrics)
	}
	mux := http.NewServeMux()
	mux.Handle("/healthz/ready", ready(config.Ready))
	mux.Handle("/stats/prometheus", metrics)
	mux.Handle("/metrics", metrics)
	mux.Handle("/app-health/", config.Probers)
	mux.Handle("/app-lifecycle/", config.Probers)
	mux.Handle("/quitquitquit", config.localOnly(config.order(config.Quit)))
	mux.Handle("/drain", config.localOnly(config.order(config.Drain)))
	if config.Profiling {
		mux.Handle(ownport.ProfilesPath, config.localOnly(profile(http.HandlerFunc(ownport.ServeProfile))))
	}
	return http.MaxBytesHandler(mux, maxBytes)
}

// ready treats every method as GET, and sends no body with 200.
func ready(handler http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		get := r.WithContext(r.Context())
		get.Method = http.MethodGet
		handler.ServeHTTP(&silentWhenOK{ResponseWriter: w}, get)
	})
}

// silentWhenOK swallows the body that goes with 200.
type silentWhenOK struct {
	http.ResponseWriter
	failed bool
}

func (w *silentWhenOK) WriteHeader(code int) {
	w.failed = code != http.StatusOK
	w.ResponseWriter.WriteHeader(code)
}

func (w *silentWhenOK) Write(b []byte) (int, error) {
	if !w.failed {
		return len(b), nil
	}
	return w.ResponseWriter.Write(b)
}

// order executes a POST after its response was sent: afterwards the process may not exist any more.
func (c Config) order(obey func()) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodPost {
			http.Error(w, "Method Not Allowed", http.StatusMethodNotAllowed)
			return
		}
		w.Header().Set("Content-Length", "2")
		io.WriteString(w, "OK")
		_ = http.NewResponseController(w).Flush() // the order is valid even if the client has left
		c.Log.Info("order received on the status port", "path", r.URL.Path, "from", r.RemoteAddr)
		obey()
	})
}

// localOnly rejects requests from outside the pod, and cross-site requests by a browser inside it or behind a port-forward.
func (c Config) localOnly(handler http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !ownport.FromLoopback(r) || !sameSite(r) {
			c.Log.Debug("request refused on the status port", "path", r.URL.Path, "from", r.RemoteAddr, "host", r.Host)
			http.Error(w, "Only requests from localhost are allowed", http.StatusForbidden)
			return
		}
		handler.ServeHTTP(w, r)
	})
}

var otherSites = http.NewCrossOriginProtection()

// sameSite reports whether a request was not caused by a page of another site. A port-forward puts this port on a laptop's
// loopback, where any page can send it a POST. A browser names the page in Origin or Sec-Fetch-Site. With DNS rebinding the
// page counts as this site's own, but then Host has the page's name. Programs other than browsers send neither field.
func sameSite(r *http.Request) bool {
	return otherSites.Check(r) == nil && ownport.NamesLoopback(r.Host)
}

// profile extends the time limit of a profile, and bounds it.
func profile(handler http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked := r.FormValue("seconds")
		if seconds, err := strconv.ParseFloat(asked, 64); err == nil && !(seconds <= maxProfile.Seconds()) {
			http.Error(w, fmt.Sprintf("seconds=%s: must be %v at most", asked, maxProfile.Seconds()), http.StatusBadRequest)
			return
		}
		ownport.Extend(w, maxProfile+10*time.Second)
		handler.ServeHTTP(w, r)
	})
}
