package healthz

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
	"github.com/pillion-proxy/pillion/internal/sockopt"
)

// The bounds of a probe. Whoever reaches the status port can ask for one.
const (
	maxProbes    = 32               // at the same time, see crowd
	maxProbeTime = 10 * time.Minute // whatever timeoutSeconds says
	maxBody      = 10 << 10         // of what the workload answers
	maxReason    = 500              // of what we answer when it does not
	maxService   = 1 << 10          // of the name of a gRPC service
)

// ProbeConfig says how probes reach the workload.
type ProbeConfig struct {
	// Address is the workload's own, to which probes connect. It is needed when there are probes, but for Localhost.
	Address netip.Addr
	// Localhost makes probes connect to 127.0.0.1, or to ::1 when Address is an IPv6 address.
	Localhost bool
	// StatusPort is the port that probes come in by. In a Host field it is replaced by the probed port.
	StatusPort uint16
	// HTTP2 lets an HTTPS probe use HTTP/2 when the workload chooses it.
	HTTP2 bool
	// KeepAlive leaves the connection of an HTTP probe open for the next one.
	KeepAlive bool
	// Dial opens a connection. Nil dials from the address that the rules let pass, so that a probe meets the workload
	// and not the agent.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
}

// Probers are the workload's own probes, by the path under which the kubelet asks for them. It is an http.Handler for
// all methods, and for any number of goroutines.
type Probers struct {
	byPath  map[string]prober
	http    *http.Client
	running crowd
}

// prober is one probe.
type prober struct {
	target  string // for people
	timeout time.Duration
	probe   probe
}

// probe asks the workload once. It returns when ctx ends. from is the kubelet's request. An error means that the
// workload gave no answer, or not the one that it should.
type probe interface {
	run(ctx context.Context, from *http.Request) (answer, error)
}

// answer is what the kubelet is told.
type answer struct {
	status int
	body   []byte
}

var proberPath = regexp.MustCompile(`^/(app-health|app-lifecycle)/[^/]+/(livez|readyz|startupz|prestopz|poststartz)$`)

// ParseProbers reads the probes that an injector recorded: the value of ISTIO_KUBE_APP_PROBERS, a JSON object whose
// names are paths and whose values are probes as Kubernetes writes them. An empty text has none. Ports must be numbers.
//
// The time limit is timeoutSeconds, and ten minutes at most. Zero is no other limit for HTTP and TCP, and an immediate
// end for gRPC.
func ParseProbers(text string, config ProbeConfig) (*Probers, error) {
	var recorded map[string]json.RawMessage
	if text != "" {
		if err := json.Unmarshal([]byte(text), &recorded); err != nil {
			return nil, fmt.Errorf("ISTIO_KUBE_APP_PROBERS: %w: it must be a JSON object of probes by their paths, as the injector writes it", err)
		}
	}
	if len(recorded) > 0 && !config.Address.IsValid() && !config.Localhost {
		return nil, errors.New("ISTIO_KUBE_APP_PROBERS has probes, and the workload's address is not known: set INSTANCE_IP")
	}
	config = config.complete()
	p := &Probers{
		byPath: make(map[string]prober, len(recorded)),
		http:   newProbeClient(config),
	}
	for _, path := range slices.Sorted(maps.Keys(recorded)) {
		if !proberPath.MatchString(path) {
			return nil, fmt.Errorf("ISTIO_KUBE_APP_PROBERS: %q: the path must be /app-health/CONTAINER/ and livez, readyz or startupz, "+
				"or /app-lifecycle/CONTAINER/ and prestopz or poststartz", path)
		}
		prober, err := p.parse(recorded[path], config)
		if err != nil {
			return nil, fmt.Errorf("ISTIO_KUBE_APP_PROBERS: %q: %w", path, err)
		}
		p.byPath[path] = prober
	}
	return p, nil
}

// complete fills in what is left open. Address is where to connect to from now on.
func (c ProbeConfig) complete() ProbeConfig {
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

// bindNoPort shares the source's ports with the connections that inbound opens: were they all in use, there would be
// none left for a probe.
func bindNoPort(_, _ string, raw syscall.RawConn) error {
	var optionErr error
	if err := raw.Control(func(fd uintptr) { optionErr = sockopt.SetBindNoPort(int(fd)) }); err != nil {
		return err
	}
	return optionErr
}

// parse reads one probe. Fields that it does not know it leaves alone: Kubernetes has more than matter here.
func (p *Probers) parse(text json.RawMessage, config ProbeConfig) (prober, error) {
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

// probePort is a port that must be a number; Kubernetes also knows names.
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

// ServeHTTP runs the probe of the request's path. It answers what the workload answers, but for redirects, see
// httpProbe. When the workload does not answer as it should the status is 500 and the body says why in one line. Nothing
// but status and body comes from the workload: this port is ours, and its body is plain text to a browser.
func (p *Probers) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	prober, known := p.byPath[r.URL.Path]
	if !known {
		http.Error(w, "app prober config does not exists for "+r.URL.Path, http.StatusBadRequest)
		return
	}
	Extend(w, prober.timeout+5*time.Second)
	ctx, cancel := context.WithTimeout(r.Context(), prober.timeout)
	defer cancel()
	ctx, leave := p.running.join(ctx, r.RemoteAddr)
	defer leave()
	answer, err := prober.probe.run(ctx, r)
	if err != nil && context.Cause(ctx) == errCrowded {
		http.Error(w, fmt.Sprintf("%s (%s): %v", r.URL.Path, prober.target, errCrowded), http.StatusServiceUnavailable)
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

// crowd is the running probes. One more may always run. When they are too many, the address that asked for the most loses
// its oldest: a stranger who holds many slow ones is in nobody's way but his own. To share one run among callers would not
// do that, as the workload hears their fields, and a stranger can have others each time.
type crowd struct {
	mu      sync.Mutex
	running []*running // the oldest first
}

type running struct {
	by  netip.Addr
	end context.CancelCauseFunc
}

var errCrowded = fmt.Errorf("%d probes are running, which is as many as may, and most for the same address as this one, their oldest", maxProbes)

// join adds a probe that remote asks for. It ends with errCrowded when it has to make room, and is to leave in any case.
func (c *crowd) join(ctx context.Context, remote string) (_ context.Context, leave func()) {
	from, _ := netip.ParseAddrPort(remote) // what is none is an address like any other
	ctx, end := context.WithCancelCause(ctx)
	joined := &running{from.Addr(), end}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.running = append(c.running, joined); len(c.running) > maxProbes {
		c.makeRoom()
	}
	return ctx, func() {
		end(nil)
		c.mu.Lock()
		defer c.mu.Unlock()
		c.running = slices.DeleteFunc(c.running, func(r *running) bool { return r == joined })
	}
}

// makeRoom ends one probe; c.mu is held. It leaves at once, as its workload may take a moment to be let go.
func (c *crowd) makeRoom() {
	most, asked := 0, make(map[netip.Addr]int)
	for _, r := range c.running {
		asked[r.by]++
		most = max(most, asked[r.by])
	}
	oldest := slices.IndexFunc(c.running, func(r *running) bool { return asked[r.by] == most })
	c.running[oldest].end(errCrowded)
	c.running = slices.Delete(c.running, oldest, oldest+1)
}

// reason is one line about an error, which may quote what the workload sent.
func (p prober) reason(ctx context.Context, err error) string {
	switch {
	case p.timeout == 0:
		return "timeoutSeconds is 0, so that the time is up at once: set it to 1 or more"
	case ctx.Err() != nil, errors.Is(err, context.DeadlineExceeded), errors.Is(err, os.ErrDeadlineExceeded):
		return fmt.Sprintf("no answer within %v", p.timeout)
	}
	line := strings.Join(strings.Fields(err.Error()), " ")
	return strings.ToValidUTF8(line[:min(len(line), maxReason)], "")
}

// Close closes the connections that are kept for further probes.
func (p *Probers) Close() { p.http.CloseIdleConnections() }

// tcpProbe is content with a connection.
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
