// Package probe runs the workload's own probes for the kubelet.
//
// The injector redirects a pod's probes to the agent and records the originals. Without that, a probe would be carried
// by the agent like other traffic, and a TCP probe would succeed whenever the agent accepts. A probe is sent from the
// address that the rules let pass, so it meets the workload itself, and the kubelet receives the workload's answer.
package probe

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/internal/ownport"
	"github.com/pillion-proxy/pillion/internal/sockopt"
)

// The bounds of a probe. Any client that reaches the status port can request one.
const (
	maxProbes    = 32               // at the same time, see runningProbes
	maxProbeTime = 10 * time.Minute // also when timeoutSeconds is larger
	maxBody      = 10 << 10         // of the workload's answer
	maxReason    = 500              // of our answer when the probe failed
	maxService   = 1 << 10          // of the name of a gRPC service
)

// ErrNoAddress reports probes without an address to send them to.
var ErrNoAddress = errors.New("there are probes, but the workload's address is unknown")

// Config configures how probes reach the workload.
type Config struct {
	// Address is the workload's address, to which probes connect. Required if there are probes, unless Localhost is set.
	Address netip.Addr
	// Localhost makes probes connect to 127.0.0.1, or to ::1 when Address is an IPv6 address.
	Localhost bool
	// StatusPort is the port where the kubelet sends probes. In a Host field it is replaced by the probed port.
	StatusPort uint16
	// HTTP2 lets an HTTPS probe use HTTP/2 when the workload chooses it.
	HTTP2 bool
	// KeepAlive leaves the connection of an HTTP probe open for the next one.
	KeepAlive bool
	// Dial opens a connection. Nil dials from the source address that the rules do not redirect.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
}

// Probers are the workload's own probes, by the path that the kubelet requests. It is an http.Handler for all methods.
type Probers struct {
	byPath  map[string]prober
	http    *http.Client
	running runningProbes
}

// prober is one probe.
type prober struct {
	target  string // for messages
	timeout time.Duration
	probe   probe
}

// probe sends one probe. It returns when ctx ends. from is the kubelet's request. An error means that the workload gave no
// answer or a wrong one.
type probe interface {
	run(ctx context.Context, from *http.Request) (answer, error)
}

// answer is the response to the kubelet.
type answer struct {
	status int
	body   []byte
}

var proberPath = sync.OnceValue(func() *regexp.Regexp {
	return regexp.MustCompile(`^/(app-health|app-lifecycle)/[^/]+/(livez|readyz|startupz|prestopz|poststartz)$`)
})

// Parse reads the probes that an injector recorded: a JSON object whose names are paths and whose values are probes as
// Kubernetes writes them. An empty text means no probes. Ports must be numbers.
//
// The time limit is timeoutSeconds, and at most ten minutes. With timeoutSeconds 0 an HTTP or TCP probe has the ten minutes,
// and a gRPC probe fails at once, as with Istio's agent.
func Parse(text string, config Config) (*Probers, error) {
	var recorded map[string]json.RawMessage
	if text != "" {
		if err := json.Unmarshal([]byte(text), &recorded); err != nil {
			return nil, fmt.Errorf("%w: must be a JSON object of probes by path, as the injector writes it", err)
		}
	}
	if len(recorded) > 0 && !config.Address.IsValid() && !config.Localhost {
		return nil, ErrNoAddress
	}
	config = config.complete()
	p := &Probers{
		byPath: make(map[string]prober, len(recorded)),
		http:   newProbeClient(config),
	}
	for _, path := range slices.Sorted(maps.Keys(recorded)) {
		if !proberPath().MatchString(path) {
			return nil, fmt.Errorf("%q: the path must be /app-health/CONTAINER/ and livez, readyz or startupz, "+
				"or /app-lifecycle/CONTAINER/ and prestopz or poststartz", path)
		}
		prober, err := p.parse(recorded[path], config)
		if err != nil {
			return nil, fmt.Errorf("%q: %w", path, err)
		}
		p.byPath[path] = prober
	}
	return p, nil
}

// complete fills in defaults. From now on Address is the address to connect to.
func (c Config) complete() Config {
	c.Address = c.Address.Unmap()
	source := capture.InboundSource4
	if c.Address.Is6() {
		source = capture.InboundSource6
	}
	if c.Localhost {
		loopback := netip.AddrFrom4([4]byte{127, 0, 0, 1})
		if c.Address.Is6() {
			loopback = netip.IPv6Loopback()
		}
		c.Address = loopback
	}
	if c.Dial == nil {
		dialer := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(source, 0)), Control: bindNoPort}
		c.Dial = dialer.DialContext
	}
	return c
}

// bindNoPort lets probes share source ports with inbound's connections. Otherwise a probe could not find a free port when
// inbound uses all of them.
func bindNoPort(_, _ string, raw syscall.RawConn) error {
	var optionErr error
	if err := raw.Control(func(fd uintptr) { optionErr = sockopt.SetBindNoPort(int(fd)) }); err != nil {
		return err
	}
	return optionErr
}

// parse reads one probe. Unknown fields are ignored: Kubernetes has more fields than matter here.
func (p *Probers) parse(text json.RawMessage, config Config) (prober, error) {
	var recorded struct { // the names are for errors: package json reads them in any case
		HTTPGet *struct {
			Path   string    `json:"path"`
			Port   probePort `json:"port"`
			Scheme string    `json:"scheme"`
		} `json:"httpGet"`
		TCPSocket *struct {
			Port probePort `json:"port"`
		} `json:"tcpSocket"`
		GRPC *struct {
			Port    probePort `json:"port"`
			Service string    `json:"service"`
		} `json:"grpc"`
		TimeoutSeconds int32 `json:"timeoutSeconds"`
	}
	if err := json.Unmarshal(text, &recorded); err != nil {
		return prober{}, err
	}
	handlers := 0
	for _, has := range []bool{recorded.HTTPGet != nil, recorded.TCPSocket != nil, recorded.GRPC != nil} {
		if has {
			handlers++
		}
	}
	if handlers != 1 {
		return prober{}, fmt.Errorf("%d handlers: give exactly one of httpGet, tcpSocket and grpc", handlers)
	}
	if recorded.TimeoutSeconds < 0 {
		return prober{}, fmt.Errorf("timeoutSeconds %d: must be 0 or more", recorded.TimeoutSeconds)
	}
	timeout := min(time.Duration(recorded.TimeoutSeconds)*time.Second, maxProbeTime)
	unlessZero := timeout
	if timeout == 0 {
		unlessZero = maxProbeTime
	}
	switch {
	case recorded.HTTPGet != nil:
		get := recorded.HTTPGet
		address, err := get.Port.at(config.Address)
		if err != nil {
			return prober{}, err
		}
		scheme := strings.ToLower(get.Scheme)
		switch scheme {
		case "":
			scheme = "http"
		case "http", "https":
		default:
			return prober{}, fmt.Errorf("scheme %q: must be HTTP or HTTPS", get.Scheme)
		}
		to := probeURL(scheme, address, get.Path)
		return prober{to.String(), unlessZero, &httpProbe{to, config.StatusPort, p.http}}, nil
	case recorded.TCPSocket != nil:
		address, err := recorded.TCPSocket.Port.at(config.Address)
		return prober{"tcp://" + address, unlessZero, &tcpProbe{address, config.Dial}}, err
	default:
		address, err := recorded.GRPC.Port.at(config.Address)
		if n := len(recorded.GRPC.Service); n > maxService {
			err = fmt.Errorf("service has a name of %d bytes: must be %d at most", n, maxService)
		}
		return prober{"grpc://" + address + "/" + url.PathEscape(recorded.GRPC.Service), timeout, &grpcProbe{address, recorded.GRPC.Service, config.Dial}}, err
	}
}

// probePort is a port that must be a number; Kubernetes also accepts names.
type probePort uint16

func (p *probePort) UnmarshalJSON(text []byte) error {
	if text[0] == '"' {
		return fmt.Errorf("port %.100s is a name: give the number of the container's port, which the injector should have put here", text)
	}
	n, err := strconv.ParseUint(string(text), 10, 16)
	if err != nil || n == 0 {
		return fmt.Errorf("port %.100s: must be a number from 1 to 65535", text)
	}
	*p = probePort(n)
	return nil
}

func (p probePort) at(address netip.Addr) (string, error) {
	if p == 0 {
		return "", errors.New("no port: give a number from 1 to 65535")
	}
	return netip.AddrPortFrom(address, uint16(p)).String(), nil
}

// ServeHTTP runs the probe of the request's path and returns the workload's answer; for redirects see httpProbe. If the
// probe fails, the status is 500 and the body is one line with the reason. Only status and body are taken from the
// workload, and the body is sent as plain text: a browser must not take it for a page of this port.
func (p *Probers) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	prober, known := p.byPath[r.URL.Path]
	if !known {
		http.Error(w, "app prober config does not exists for "+r.URL.Path, http.StatusBadRequest)
		return
	}
	ownport.Extend(w, prober.timeout+5*time.Second)
	ctx, cancel := context.WithTimeout(r.Context(), prober.timeout)
	defer cancel()
	ctx, leave := p.running.join(ctx, r.RemoteAddr)
	defer leave()
	answer, err := prober.probe.run(ctx, r)
	if err != nil && context.Cause(ctx) == errEvicted {
		http.Error(w, fmt.Sprintf("%s (%s): %v", r.URL.Path, prober.target, errEvicted), http.StatusServiceUnavailable)
		return
	}
	if err != nil {
		http.Error(w, fmt.Sprintf("%s (%s): %s", r.URL.Path, prober.target, prober.reason(ctx, err)), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(answer.status)
	w.Write(answer.body)
}

// runningProbes bounds the probes that run at the same time. A new probe is always admitted. When there are too many, the
// oldest probe of the address with the most probes is evicted, so that a client with many slow probes hurts only itself.
// Runs are not shared between callers, because the workload sees the caller's header fields.
type runningProbes struct {
	mu      sync.Mutex
	running []*running // the oldest first
}

type running struct {
	by  netip.Addr
	end context.CancelCauseFunc
}

var errEvicted = fmt.Errorf("evicted: %d probes are running, the limit, and this one is the oldest of the address with the most", maxProbes)

// join admits a probe that remote requests. The context's cause is errEvicted if the probe is evicted. The caller must call
// leave.
func (c *runningProbes) join(ctx context.Context, remote string) (_ context.Context, leave func()) {
	from, _ := netip.ParseAddrPort(remote) // an invalid address counts as one address
	ctx, end := context.WithCancelCause(ctx)
	joined := &running{from.Addr(), end}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.running = append(c.running, joined); len(c.running) > maxProbes {
		c.evict()
	}
	return ctx, func() {
		end(nil)
		c.mu.Lock()
		defer c.mu.Unlock()
		c.running = slices.DeleteFunc(c.running, func(r *running) bool { return r == joined })
	}
}

// evict ends one probe; c.mu is held. It is removed at once, because its run may take a moment to return.
func (c *runningProbes) evict() {
	most, asked := 0, make(map[netip.Addr]int)
	for _, r := range c.running {
		asked[r.by]++
		most = max(most, asked[r.by])
	}
	oldest := slices.IndexFunc(c.running, func(r *running) bool { return asked[r.by] == most })
	c.running[oldest].end(errEvicted)
	c.running = slices.Delete(c.running, oldest, oldest+1)
}

// reason describes an error in one line. The line may quote the workload.
func (p prober) reason(ctx context.Context, err error) string {
	switch {
	case p.timeout == 0:
		return "timeoutSeconds is 0, so the time is up at once: set it to 1 or more"
	case ctx.Err() != nil, errors.Is(err, context.DeadlineExceeded), errors.Is(err, os.ErrDeadlineExceeded):
		return fmt.Sprintf("no answer within %v", p.timeout)
	}
	line := strings.Join(strings.Fields(err.Error()), " ")
	return strings.ToValidUTF8(line[:min(len(line), maxReason)], "")
}

// Close closes the connections that KeepAlive left open.
func (p *Probers) Close() { p.http.CloseIdleConnections() }

// tcpProbe succeeds when a connection is established.
type tcpProbe struct {
	address string
	dial    func(ctx context.Context, network, address string) (net.Conn, error)
}

func (p *tcpProbe) run(ctx context.Context, _ *http.Request) (answer, error) {
	conn, err := p.dial(ctx, "tcp", p.address)
	if err != nil {
		return answer{}, err
	}
	conn.Close()
	return answer{status: http.StatusOK}, nil
}
