// Package status serves the port by which the pod deals with its sidecar: readiness, the workload's probes, metrics,
// quitting and draining, profiles.
//
// The port is open to the network, as the kubelet and Prometheus come from there. What changes the agent or shows its
// inside answers this pod's own processes alone.
package status

import (
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/pprof"
	"strconv"
	"time"

	"github.com/pillion-proxy/pillion/internal/ownport"
)

// Config is what the handler answers from. All of it must be set, but for the last two.
type Config struct {
	// Ready answers a GET with 200 when the agent is ready, else with a code and the reasons.
	Ready http.Handler
	// Probers answers /app-health/ and /app-lifecycle/.
	Probers http.Handler
	// Metrics answers /stats/prometheus and /metrics. If it may take longer than a few seconds it calls ownport.Extend.
	Metrics http.Handler
	// Quit ends the agent, and Drain begins the drain of inbound. Both are called after the answer has gone out, perhaps
	// from several goroutines and more than once, and must return at once.
	Quit, Drain func()
	// Log is told who quits and drains, and who may not.
	Log *slog.Logger
	// MetricsLocalOnly keeps metrics from the network.
	MetricsLocalOnly bool
	// Profiling serves /debug/pprof/.
	Profiling bool
}

const (
	maxBytes   = 64 << 10 // of a request's body: nothing here needs one but pprof's symbols
	maxProfile = 2 * time.Minute
)

// NewHandler serves the paths, codes and bodies of the status port that Istio's agent has. It is to be served by
// ownport.NewServer.
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
		// Package pprof also registers itself with http.DefaultServeMux, which nothing of ours serves.
		for path, handler := range map[string]http.HandlerFunc{
			"":        pprof.Index, // and the profiles by their names
			"cmdline": pprof.Cmdline,
			"profile": pprof.Profile,
			"symbol":  pprof.Symbol,
			"trace":   pprof.Trace,
		} {
			mux.Handle("/debug/pprof/"+path, config.localOnly(profile(handler)))
		}
	}
	return http.MaxBytesHandler(mux, maxBytes)
}

// ready asks as a GET, whatever was asked with, and says nothing but the code when the answer is yes.
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

// order does what a POST asks for, once its answer has gone out: after it there may be no process to answer.
func (c Config) order(obey func()) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodPost {
			http.Error(w, "Method Not Allowed", http.StatusMethodNotAllowed)
			return
		}
		w.Header().Set("Content-Length", "2")
		io.WriteString(w, "OK")
		_ = http.NewResponseController(w).Flush() // a client that has left gave the order all the same
		c.Log.Info("an order on the status port", "path", r.URL.Path, "from", r.RemoteAddr)
		obey()
	})
}

// localOnly refuses who is not a process of this pod, and who is one without knowing it, see ownport.FromLoopback and byItself.
func (c Config) localOnly(handler http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !ownport.FromLoopback(r) || !byItself(r) {
			c.Log.Debug("refused on the status port", "path", r.URL.Path, "from", r.RemoteAddr, "host", r.Host)
			http.Error(w, "Only requests from localhost are allowed", http.StatusForbidden)
			return
		}
		handler.ServeHTTP(w, r)
	})
}

var otherSites = http.NewCrossOriginProtection()

// byItself refuses a browser that somebody else's page made ask: a port-forward puts this port on a laptop's loopback,
// where any page may send it a POST. A browser says which page it was, in Origin or Sec-Fetch-Site. It believes the page
// to be ours if its name has come to mean 127.0.0.1 meanwhile, but then Host has that name. Programs other than browsers
// say none of this.
func byItself(r *http.Request) bool {
	return otherSites.Check(r) == nil && ownport.NamesLoopback(r.Host)
}

// profile gives a profile the time that it takes, which must be bounded.
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
