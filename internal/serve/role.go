// Package serve holds the steps of a connection that every role shares: the agent's two directions, and a gateway. A role orders the steps in a walk of its own, its ServeConn, readable from top to bottom. The steps are written
// here once.
//
// A walk opens a Conn and then either refuses it or detects its protocol and carries it:
//
//	Open → (Refuse | List → AwaitConfiguration → ReadFirst → Permit → Admit → Secure → Authorize → Dial → WatchBoth → Permit → Admit → Secure → WatchBoth → Authorize → Carry) → Close
//
// The policies of a role, its choice of a target and everything that differs between roles stay in the role.
package serve

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/pillion-proxy/pillion/internal/balance"
	"github.com/pillion-proxy/pillion/internal/budget"
	"github.com/pillion-proxy/pillion/internal/callout"
	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/internal/fault"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/httpforward"
	"github.com/pillion-proxy/pillion/internal/identity"
	"github.com/pillion-proxy/pillion/internal/jwks"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/peers"
	"github.com/pillion-proxy/pillion/internal/secure"
	"github.com/pillion-proxy/pillion/internal/tcp"
	"github.com/pillion-proxy/pillion/internal/tracing"
	"github.com/pillion-proxy/pillion/internal/upstream"
)

// Config is what a Role needs. All fields without a stated zero are required.
type Config struct {
	Direction flow.Direction
	Gateway   bool               // connections are accepted for listeners of Mesh; Direction is Outbound
	Poller    *tcp.Poller        // for upstream connections
	Flows     *flow.Table        // lists open connections and takes their records when they end
	Borrower  *upstream.Borrower // dials from clients' addresses; nil: targets with a borrowed source never occur
	Settings  Settings           // until the first Apply

	// Mesh is the configuration of a control plane; nil: there is none. Connections are held at most Wait for its first
	// snapshot.
	Mesh Mesh
	Wait time.Duration

	// Lookup resolves the names of Mesh's clusters; nil: such clusters have no endpoints.
	Lookup balance.Lookup

	// Peers exchanges metadata with other proxies where the configuration says so; nil: never.
	Peers   *peers.Exchange
	Strict  bool         // paths of requests that servers may read in different ways are rejected
	Rejudge bool         // a connection of bytes ends when a changed policy denies it
	Log     *slog.Logger // of keys that cannot be fetched; nil: not logged
	Egress  Egress       // the policy for outbound connections; nil: everything is allowed

	Faults fault.Set // on purpose; may be nil

	// Tracing has the exporters of the spans that Mesh asks for; nil: it is not followed.
	Tracing *tracing.Exporters

	// Recorder makes the access logs and metrics that Mesh asks for; nil: they are not followed.
	Recorder Recorder

	Decryption Decryption // of outbound connections; nil: none is decrypted

	// The pool, and the limits on what a peer may send unless Settings.HTTP has them. NewRole sets the fields that Config
	// has itself.
	HTTP httpforward.Config
}

// Mesh is the configuration of a control plane. Whoever publishes the first snapshot wakes the waits of the poller.
type Mesh interface {
	// Snapshot returns what is in force, and nil before the first configuration.
	Snapshot() *mesh.Snapshot

	// Identity returns the workload's certificate and the roots of trust, and nil before they have come.
	Identity() *identity.Identity
}

// Settings is what may change while connections are open. A value is never modified: Apply replaces it. A connection uses
// the value that it began with until it ends; only the HTTP engine also applies a new value to later requests of an open
// connection (see httpforward.Settings).
type Settings struct {
	ConnectTimeout   time.Duration // for the dial; zero or less leaves it to the kernel
	IdleTimeout      time.Duration // ends a connection in which nothing moves; zero or less: never
	HalfCloseTimeout time.Duration // the same once one side has closed; zero or less: never

	DetectionDelay time.Duration // how long downstream may be silent before the upstream is dialled
	DetectionHold  time.Duration // how long to hold first bytes that do not decide the protocol
	OpaquePorts    capture.Ports // destination ports whose protocol is not detected
	ProxyProtocol  capture.Ports // inbound: destination ports that get a PROXY protocol header; not detected either

	// HTTP replaces the HTTP engine's settings, with the first three timeouts above. nil: unchanged.
	HTTP *httpforward.Settings
}

// http returns the HTTP engine's settings under s. unchanged are those that it has if s does not replace them.
func (s *Settings) http(unchanged httpforward.Settings) httpforward.Settings {
	http := unchanged
	if s.HTTP != nil {
		http = *s.HTTP
	}
	http.ConnectTimeout, http.IdleTimeout, http.HalfCloseTimeout = s.ConnectTimeout, s.IdleTimeout, s.HalfCloseTimeout
	return http
}

// Detects reports whether the protocol of connections to port is detected.
func (s *Settings) Detects(port uint16) bool {
	return !s.OpaquePorts.Contains(port) && !s.ProxyProtocol.Contains(port)
}

// Role is the state that the connections of one role share. Make it with NewRole.
type Role struct {
	direction  flow.Direction
	gateway    bool
	flows      *flow.Table
	dialer     upstream.Dialer
	engine     *httpforward.Engine
	budget     *budget.Budget
	draining   func() bool // engine.Draining; here, so that it is allocated once
	settings   atomic.Pointer[Settings]
	mesh       Mesh
	contexts   *secure.Contexts // nil without mesh
	peers      *peers.Exchange  // nil: metadata is not exchanged
	wait       time.Duration
	egress     Egress
	decryption Decryption
	exporters  *tracing.Exporters
	recorder   Recorder

	balancer   *balance.Balancer // nil without mesh; inbound, of the servers that are asked about connections and requests
	securities atomic.Pointer[map[secured]*upstream.Security]
	plains     map[upstream.Options]*upstream.Security
	trusted    atomic.Pointer[trusted]
	securing   sync.Mutex // held to replace securities, and for plains
	faults     fault.Set

	callouts *callout.Client // nil without mesh
	keys     *jwks.Store     // likewise
	asking   asking
	strict   bool // see Config
	rejudges bool // likewise
}

// NewRole checks the configuration.
func NewRole(config Config) (*Role, error) {
	if config.Poller == nil || config.Flows == nil {
		return nil, errors.New("a poller and a flow table are required")
	}
	r := &Role{
		direction:  config.Direction,
		gateway:    config.Gateway,
		flows:      config.Flows,
		mesh:       config.Mesh,
		peers:      config.Peers,
		wait:       config.Wait,
		egress:     config.Egress,
		decryption: config.Decryption,
		exporters:  config.Tracing,
		recorder:   config.Recorder,
		faults:     config.Faults,
		strict:     config.Strict,
		rejudges:   config.Rejudge,
		budget:     config.HTTP.Budget,
		dialer:     upstream.Dialer{Poller: config.Poller, Borrow: config.Borrower}, // the timeout comes from the settings
	}
	if config.HTTP.Pool != nil { // otherwise httpforward.New reports that it is missing
		r.dialer.Stats = &config.HTTP.Pool.Stats
	}
	forwarding := config.HTTP
	forwarding.Direction, forwarding.Dialer, forwarding.Flows = config.Direction, r.dialer, config.Flows
	forwarding.Settings = config.Settings.http(forwarding.Settings)
	var err error
	if r.engine, err = httpforward.New(forwarding); err != nil {
		return nil, err
	}
	r.draining = r.engine.Draining
	if r.mesh != nil {
		r.contexts = secure.NewContexts(r.mesh, config.Log)
		r.securities.Store(&map[secured]*upstream.Security{})
		r.plains = map[upstream.Options]*upstream.Security{}
	}
	if r.mesh != nil {
		r.balancer = balance.New(balance.Config{Snapshot: r.mesh.Snapshot, Lookup: config.Lookup, Retire: config.HTTP.Pool.Retire})
		r.callouts = callout.New(callout.Config{Snapshot: r.mesh.Snapshot, Balancer: r.balancer, Security: r.calloutSecurity})
		r.keys = jwks.New(r.callouts, config.Log)
	}
	r.settings.Store(&config.Settings)
	return r, nil
}

// Apply replaces the settings for connections that are opened from now on. Those of HTTP also apply to later requests of
// open connections; see httpforward.Settings. Invalid settings change nothing. Calls must not be concurrent.
func (r *Role) Apply(settings Settings) error {
	if err := r.engine.Apply(settings.http(r.engine.Settings())); err != nil {
		return err
	}
	r.settings.Store(&settings)
	return nil
}

// Announce makes responses to HTTP/1 requests close their connections; see httpforward.Engine.
func (r *Role) Announce() { r.engine.Announce() }

// Drain ends connections that carry no request; see httpforward.Engine. Wake the poller after it.
func (r *Role) Drain() { r.engine.Drain() }

// Close stops what the role does in the background. Call it after the role's connections have ended.
func (r *Role) Close() {
	if r.keys != nil {
		r.keys.Close()
	}
	if r.callouts != nil {
		r.callouts.Close()
	}
	if r.balancer != nil {
		r.balancer.Close()
	}
}

// Asked returns how often servers of external authorization have allowed, denied, and not answered.
func (r *Role) Asked() (allowed, denied, failed uint64) {
	return r.asking.allowed.Load(), r.asking.denied.Load(), r.asking.failed.Load()
}

// KeyFetches returns how often keys of tokens were fetched, and could not be.
func (r *Role) KeyFetches() (fetched, failed uint64) {
	if r.keys == nil {
		return 0, 0
	}
	return r.keys.Stats()
}

// Balancer returns the state of the clusters that requests go to; nil without a control plane.
func (r *Role) Balancer() *balance.Balancer { return r.balancer }

// Refuse resets a connection that exceeds the limit.
func (r *Role) Refuse(down *tcp.Conn) {
	record := r.open(down)
	down.Reset()
	record.Close(r.flows, flow.MaxConnections, nil)
}

// open returns the record of a connection that begins now.
func (r *Role) open(down *tcp.Conn) *flow.Record {
	record := flow.Open(r.direction, down.RemoteAddr())
	record.Gateway = r.gateway
	if r.mesh != nil {
		record.Ask(r.unmatched(r.mesh.Snapshot(), 0))
	}
	return record
}

// Open begins the walk of a connection. The returned Conn owns it from then on. When ctx ends, the connection is reset.
// The caller must close the Conn.
func (r *Role) Open(ctx context.Context, down *tcp.Conn) *Conn {
	w, record := tcp.NewWaiter(ctx), r.open(down)
	w.Begin(down, down.RemoteAddr().Addr())
	return &Conn{ // not on the stack, which its bytes could double
		Down:     down,
		Record:   record,
		Settings: r.settings.Load(),
		role:     r,
		w:        w,
	}
}
