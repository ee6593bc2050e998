// Package admin is the server on loopback that shows the state of the agent and accepts commands. Paths and JSON are those
// of Envoy's admin interface, so that istioctl, Kiali and scripts can read them.
//
// Every answer is true of this agent. Envoy's fields are used where they fit; state without such a field is left out. A
// JSON answer for which Envoy has a protobuf message parses strictly as that message.
//
// It keeps no state: everything that it shows or changes is a value or a function in Config.
package admin

import (
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/netip"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/pillion-proxy/pillion/internal/flow"
)

// The listeners that carry traffic, by Envoy's names. The others serve something of the agent's own.
const (
	VirtualOutbound = "virtualOutbound"
	VirtualInbound  = "virtualInbound"
)

// Config is what the server shows and orders. Its functions are called from any goroutine and must answer at once.
// Those that are nil stand for an order that this agent does not take; it is answered 501.
type Config struct {
	Version   string
	Started   time.Time
	Address   netip.AddrPort // where this server is bound
	Node      Node
	Options   Options
	Listeners func() []Listener // as they were bound; required
	Carrying  Carrying
	Flows     *flow.Table // required

	Ready   func() (state string, ok bool) // LIVE and true, else PRE_INITIALIZING, INITIALIZING or DRAINING; required
	Unready func() []string                // what readiness waits for; nil is nothing
	Metrics prometheus.Gatherer            // required

	LogLevel      func() slog.Level // required
	SetLogLevel   func(slog.Level)
	Drain         func(DrainOrder)
	Quit          func() // is called when the answer has gone out
	Health        func(ok bool)
	ResetCounters func()
	ReopenLogs    func()

	Page http.Handler // for a browser at /; nil serves the list of paths
	Live http.Handler // for /live and below; nil is none

	Log *slog.Logger // of orders; required
}

// Node identifies the agent, as the injector set it.
type Node struct {
	ID, Cluster string
	Metadata    map[string]any // encodable as JSON
}

// Options are the command-line options that Envoy has as well.
type Options struct {
	Concurrency int
	LogLevel    string
	DrainTime   time.Duration
}

// Listener is one of the agent's, with the addresses that it is bound to, the main one first.
type Listener struct {
	Name      string
	Addresses []netip.AddrPort
	Serves    []string // paths that the agent answers there itself
}

// Carrying is how traffic is carried. Times mean what they mean in the agent's flags.
type Carrying struct {
	OwnPorts       []uint16            // refused at OwnAddresses
	OwnAddresses   func() []netip.Addr // required
	OpaquePorts    [][2]uint16         // the first and last of ranges whose bytes nobody looks at
	InboundSources []netip.Addr        // from which the workload is dialled, unless it is from its clients' own
	TPROXYMark     uint32              // of what is sent from clients' addresses; zero: inbound listeners are not transparent

	ConnectTimeout, IdleTimeout, RequestTimeout, RequestHeadTimeout, UpstreamIdleTimeout time.Duration

	MaxHeadBytes, MaxHeadFields int
}

// DrainOrder holds the parameters of /drain_listeners.
type DrainOrder struct {
	InboundOnly bool
	Graceful    bool // announce and go on accepting, else stop listening at once
	SkipExit    bool // do not end when drained
}

// command is one path. Envoy answers reading ones by any method.
type command struct {
	path       string
	help       string
	parameters []string // name: help
	changes    bool     // needs POST
	run        func(*handler, http.ResponseWriter, *http.Request)
}

// commands are in the order of /help. handler.find looks here. init fills it, as /help reads it.
var commands []command

func init() {
	commands = []command{
		{path: "/", help: "page for browsers, this list for others", run: (*handler).root},
		{path: "/certs", help: "print certs on machine", run: (*handler).certs},
		{path: "/clusters", help: "destinations that open connections are carried to, at most 4096 of them",
			parameters: []string{"format: text or json"}, run: (*handler).clusters},
		{path: "/config_dump", help: "print how traffic is carried, in Envoy's words", parameters: []string{
			"resource: the list to print, such as static_listeners", "mask: the fields to print, such as listener.name",
			"name_regex: print what has a name that matches as a whole", "include_eds: print endpoints too",
		}, run: (*handler).configDump},
		{path: "/debug/pprof/", help: "Go profiles", run: (*handler).profile},
		{path: "/drain_listeners", help: "drain listeners", changes: true, parameters: []string{
			"graceful: announce, and stop listening later", "skip_exit: stay when drained; needs graceful", "inboundonly: drain inbound alone",
		}, run: (*handler).drain},
		{path: "/healthcheck/fail", help: "cause readiness to fail", changes: true, run: (*handler).healthcheck},
		{path: "/healthcheck/ok", help: "let readiness succeed again", changes: true, run: (*handler).healthcheck},
		{path: "/help", help: "print this list", run: (*handler).help},
		{path: "/init_dump", help: "print what readiness waits for", run: (*handler).initDump},
		{path: "/listeners", help: "print listeners", parameters: []string{"format: text or json"}, run: (*handler).listeners},
		{path: "/live", help: "connections as they come and go", run: (*handler).live},
		{path: "/logging", help: "print or change log levels", changes: true, parameters: []string{
			"level: for all loggers", "paths: logger:level,...", "<logger>: its level",
		}, run: (*handler).logging},
		{path: "/memory", help: "print memory in use", run: (*handler).memory},
		{path: "/quitquitquit", help: "exit the server", changes: true, run: (*handler).quit},
		{path: "/ready", help: "print server state, return 200 if LIVE, otherwise return 503", run: (*handler).ready},
		{path: "/reopen_logs", help: "reopen the access log", changes: true, run: (*handler).reopenLogs},
		{path: "/reset_counters", help: "reset all counters to zero", changes: true, run: (*handler).resetCounters},
		{path: "/server_info", help: "print server version, state and options", run: (*handler).serverInfo},
		{path: "/stats", help: "print metrics", parameters: []string{
			"format: text, json or prometheus", "filter: a regular expression that names match somewhere",
			"usedonly: without counters that are 0", "type: Counters, Gauges, Histograms, TextReadouts or All",
		}, run: (*handler).stats},
		{path: "/stats/prometheus", help: "print metrics in prometheus format",
			parameters: []string{"filter, usedonly, type: as above"}, run: (*handler).prometheus},
	}
}

type handler struct {
	Config
	loggers loggers
	slots   chan struct{}
	foreign *http.CrossOriginProtection
}

// NewHandler serves the admin paths. Serve it on loopback alone, with bounds on heads, time and connections; a handler
// that takes longer than the server's write time-out moves its own.
func NewHandler(config Config) http.Handler {
	h := &handler{Config: config, slots: make(chan struct{}, maxRequests), foreign: http.NewCrossOriginProtection()}
	h.loggers.others = make(map[string]slog.Level)
	if config.LogLevel != nil {
		h.loggers.byDefault = config.LogLevel()
		h.loggers.own = h.loggers.byDefault
	}
	return h
}

func (h *handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Cache-Control", "no-cache, max-age=0")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	if why := h.refuses(r); why != "" {
		answer(w, http.StatusForbidden, why+"\n")
		return
	}
	command := find(r.URL.Path)
	switch {
	case command == nil:
		answer(w, http.StatusNotFound, "invalid path. admin commands are:\n"+list())
		return
	case command.path == "/live": // its streams stay, and it bounds them itself
		command.run(h, w, r)
		return
	case command.changes && r.Method != http.MethodPost:
		w.Header().Set("Allow", http.MethodPost)
		answer(w, http.StatusMethodNotAllowed, fmt.Sprintf("Method %s not allowed, POST required.", r.Method))
		return
	}
	select {
	case h.slots <- struct{}{}:
		defer func() { <-h.slots }()
	default:
		answer(w, http.StatusServiceUnavailable, fmt.Sprintf("%d requests are being answered already; ask again\n", maxRequests))
		return
	}
	if command.changes {
		h.Log.Info("admin order", "path", r.URL.Path, "query", fmt.Sprintf("%.100s", r.URL.RawQuery))
	}
	r.Body = http.MaxBytesReader(w, r.Body, maxBody)
	command.run(h, w, r)
}

func find(path string) *command {
	for i := range commands {
		c := &commands[i]
		if c.path == path || c.path == "/live" && strings.HasPrefix(path, "/live/") ||
			c.path == "/debug/pprof/" && strings.HasPrefix(path, c.path) {
			return c
		}
	}
	return nil
}

// answer writes a text.
func answer(w http.ResponseWriter, code int, text string) {
	w.Header().Set("Content-Type", "text/plain; charset=UTF-8")
	w.WriteHeader(code)
	io.WriteString(w, text)
}

// refuse answers what cannot be done as asked. The text says what would be right.
func refuse(w http.ResponseWriter, format string, values ...any) {
	answer(w, http.StatusBadRequest, fmt.Sprintf(format, values...)+"\n")
}

// answerJSON writes v as Envoy prints it.
func answerJSON(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	encoder := json.NewEncoder(w)
	encoder.SetEscapeHTML(false)
	encoder.SetIndent("", " ")
	encoder.Encode(v) // who does not take it has gone
}

func list() string {
	var b strings.Builder
	for _, c := range commands {
		post := ""
		if c.changes {
			post = " (POST)"
		}
		fmt.Fprintf(&b, "  %s%s: %s\n", c.path, post, c.help)
		for _, parameter := range c.parameters {
			fmt.Fprintf(&b, "      %s\n", parameter)
		}
	}
	return b.String()
}

func (h *handler) root(w http.ResponseWriter, r *http.Request) {
	if h.Page != nil && strings.Contains(r.Header.Get("Accept"), "text/html") {
		h.Page.ServeHTTP(w, r)
		return
	}
	h.help(w, r)
}

func (h *handler) live(w http.ResponseWriter, r *http.Request) {
	if h.Live == nil {
		http.NotFound(w, r)
		return
	}
	h.Live.ServeHTTP(w, r)
}

func (h *handler) help(w http.ResponseWriter, _ *http.Request) {
	answer(w, http.StatusOK, "admin commands are:\n"+list())
}
