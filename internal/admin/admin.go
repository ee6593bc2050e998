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

	"github.com/pillion-proxy/pillion/internal/flow"
)

// The listeners that carry traffic, by Envoy's names. The others serve something of the agent's own.
const (
	VirtualOutbound = "virtualOutbound"
	VirtualInbound  = "virtualInbound"
)

// Config holds what the server shows and the commands that it accepts. Its functions are called from any goroutine and must
// return at once. A nil function is a command that this agent does not support; the response is 501.
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
	Unready func() []string                // closed gates; optional
	Metrics Gatherer                       // required

	RecentLog   io.WriterTo       // the last lines of the agent's log; nil: not kept
	LogLevel    func() slog.Level // required
	SetLogLevel func(slog.Level)
	Drain       func(DrainOrder)
	Quit        func() // called after the response was sent
	Health      func(ok bool)
	ReopenLogs  func()

	ControlPlane ControlPlane // nil: the agent decides alone

	Page    http.Handler // for a browser at /; nil serves the list of paths
	Live    http.Handler // for /live and below; optional
	View    http.Handler // for what is below /config/; optional
	Explain http.Handler // for /explain; optional

	Certificates http.Handler // for /identity and /identity/handshake; optional

	Log *slog.Logger // of commands; required
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

// Listener is a listener of the agent and the addresses that it is bound to, the main one first.
type Listener struct {
	Name      string
	Addresses []netip.AddrPort
	Serves    []string // paths that the agent itself serves there
}

// Carrying describes how traffic is carried. Times have the meaning of the agent's flags.
type Carrying struct {
	OwnPorts       []uint16            // refused at OwnAddresses
	OwnAddresses   func() []netip.Addr // required
	OpaquePorts    [][2]uint16         // the first and last of ranges without protocol detection
	InboundSources []netip.Addr        // from which the workload is dialled, except with TPROXY
	TPROXYMark     uint32              // of packets with a client's source address; zero: inbound listeners are not transparent

	ConnectTimeout, IdleTimeout, RequestTimeout, RequestHeadTimeout, UpstreamIdleTimeout time.Duration

	MaxHeadBytes, MaxHeadFields int
}

// DrainOrder holds the parameters of /drain_listeners.
type DrainOrder struct {
	InboundOnly bool
	Graceful    bool // announce and keep accepting for the drain delay; else stop listening at once
	SkipExit    bool // keep listening after the drain
}

// command is one path. As in Envoy, a command that only reads accepts any method.
type command struct {
	path       string
	help       string
	parameters []string // each as "name: help"
	changes    bool     // needs POST
	run        func(*handler, http.ResponseWriter, *http.Request)
}

// commands are in the order of /help. init fills it, because /help reads it.
var commands []command

func init() {
	commands = []command{
		{path: "/", help: "live page for browsers, this list for other clients", run: (*handler).root},
		{path: "/certs", help: "print certs on machine", run: (*handler).certs},
		{path: "/clusters", help: "print destinations of open connections, at most 4096",
			parameters: []string{"format: text or json"}, run: (*handler).clusters},
		{path: "/config/", help: "what the control plane has configured, in short, as JSON: /config/findings, and by kind: " + viewKinds,
			parameters: []string{"name: of the objects, with their details"}, run: (*handler).view},
		{path: "/config_dump", help: "print the configuration in Envoy's terms", parameters: []string{
			"resource: the list to print, such as static_listeners", "mask: the fields to print, such as listener.name",
			"name_regex: print resources whose whole name matches", "include_eds: print endpoints too",
			"redact: headers, to leave out their values",
		}, run: (*handler).configDump},
		{path: "/debug/pprof/", help: "Go profiles", run: (*handler).profile},
		{path: "/drain_listeners", help: "drain listeners", changes: true, parameters: []string{
			"graceful: announce first, stop listening after the delay", "skip_exit: keep listening; requires graceful", "inboundonly: drain inbound only",
		}, run: (*handler).drain},
		{path: "/explain", help: "what becomes of a request, by the configuration in force, as JSON", parameters: []string{
			"url: of the request", "method: GET by default", "header: name: value; may be repeated", "from: outbound or inbound",
			"destination: the original one, if the host does not determine it", "peer: identity of an inbound client",
		}, run: (*handler).explain},
		{path: "/healthcheck/fail", help: "cause readiness to fail", changes: true, run: (*handler).healthcheck},
		{path: "/healthcheck/ok", help: "let readiness succeed again", changes: true, run: (*handler).healthcheck},
		{path: "/help", help: "print this list", run: (*handler).help},
		{path: "/identity", help: "the workload's certificate and roots of trust, as JSON", run: (*handler).identity},
		{path: "/identity/handshake", help: "what a server presents to this workload, as JSON", changes: true, parameters: []string{
			"to: HOST:PORT", "sni: the name to ask for", "alpn: protocols to offer, with commas", "expect: a name that the server must have",
			"timeout: a duration",
		}, run: (*handler).identity},
		{path: "/init_dump", help: "print closed gates of readiness", run: (*handler).initDump},
		{path: "/listeners", help: "print listeners", parameters: []string{"format: text or json"}, run: (*handler).listeners},
		{path: "/live", help: "current traffic as JSON; /live/records, /live/tap, /live/events", run: (*handler).live},
		{path: "/log", help: "print the last lines of the agent's log, at most 1000", run: (*handler).recentLog},
		{path: "/logging", help: "print or change log levels", changes: true, parameters: []string{
			"level: for all loggers", "paths: logger:level,...", "<logger>: its level",
		}, run: (*handler).logging},
		{path: "/memory", help: "print memory in use", run: (*handler).memory},
		{path: "/quitquitquit", help: "exit the server", changes: true, run: (*handler).quit},
		{path: "/ready", help: "print server state, return 200 if LIVE, otherwise return 503", run: (*handler).ready},
		{path: "/reopen_logs", help: "reopen the access log", changes: true, run: (*handler).reopenLogs},
		{path: "/server_info", help: "print server version, state and options", run: (*handler).serverInfo},
		{path: "/stats", help: "print metrics", parameters: []string{
			"format: text, json or prometheus", "filter: a regular expression that matches a part of the name",
			"usedonly: without counters that are 0", "type: Counters, Gauges, Histograms, TextReadouts or All",
		}, run: (*handler).stats},
		{path: "/stats/prometheus", help: "print metrics in prometheus format",
			parameters: []string{"filter, usedonly, type: as above"}, run: (*handler).prometheus},
	}
}

// viewKinds are the kinds of objects below /config/.
const viewKinds = "cluster, listener, route, endpoint, policy, name"

type handler struct {
	Config
	loggers loggers
	slots   chan struct{}
	dumping chan struct{} // holds one element while the control plane's resources are shown
	foreign *http.CrossOriginProtection
}

// NewHandler serves the admin paths. Serve it on loopback only, with bounds on heads, time and connections. A path that
// takes longer than the server's write timeout extends its own deadline.
func NewHandler(config Config) http.Handler {
	h := &handler{Config: config, slots: make(chan struct{}, maxRequests), dumping: make(chan struct{}, 1),
		foreign: http.NewCrossOriginProtection()}
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
	case command.path == "/live": // its streams last, and package live bounds them
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
		answer(w, http.StatusServiceUnavailable, fmt.Sprintf("%d requests are in progress, the maximum; retry later\n", maxRequests))
		return
	}
	if command.changes {
		h.Log.Info("admin command", "path", r.URL.Path, "query", fmt.Sprintf("%.100s", r.URL.RawQuery))
	}
	r.Body = http.MaxBytesReader(w, r.Body, maxBody)
	command.run(h, w, r)
}

func find(path string) *command {
	for i := range commands {
		c := &commands[i]
		if c.path == path || c.path == "/live" && strings.HasPrefix(path, "/live/") ||
			strings.HasSuffix(c.path, "/") && c.path != "/" && strings.HasPrefix(path, c.path) {
			return c
		}
	}
	return nil
}

// answer writes a text response.
func answer(w http.ResponseWriter, code int, text string) {
	w.Header().Set("Content-Type", "text/plain; charset=UTF-8")
	w.WriteHeader(code)
	io.WriteString(w, text)
}

// refuse writes a 400 response. The text describes a valid request.
func refuse(w http.ResponseWriter, format string, values ...any) {
	answer(w, http.StatusBadRequest, fmt.Sprintf(format, values...)+"\n")
}

// answerJSON writes v in Envoy's formatting.
func answerJSON(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	encoder := json.NewEncoder(w)
	encoder.SetEscapeHTML(false)
	encoder.SetIndent("", " ")
	encoder.Encode(v) // an error means that the client left
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

func (h *handler) view(w http.ResponseWriter, r *http.Request) { h.show(h.View, w, r) }

func (h *handler) explain(w http.ResponseWriter, r *http.Request) { h.show(h.Explain, w, r) }

// show lets shown answer, which takes one of the few turns of expensive requests.
func (h *handler) show(shown http.Handler, w http.ResponseWriter, r *http.Request) {
	if shown == nil {
		notSupported(w)
		return
	}
	if !h.begin(w, r) {
		return
	}
	defer h.end()
	shown.ServeHTTP(w, r)
}

// identity serves certificates. A handshake counts as a request in progress.
func (h *handler) identity(w http.ResponseWriter, r *http.Request) {
	if h.Certificates == nil {
		notSupported(w)
		return
	}
	h.Certificates.ServeHTTP(w, r)
}

func (h *handler) help(w http.ResponseWriter, _ *http.Request) {
	answer(w, http.StatusOK, "admin commands are:\n"+list())
}
