package run

import (
	"context"
	"net"
	"net/netip"
	"time"

	"github.com/pillion-proxy/pillion/internal/budget"
	"github.com/pillion-proxy/pillion/internal/datagram"
	"github.com/pillion-proxy/pillion/internal/dns"
	"github.com/pillion-proxy/pillion/internal/egress"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/httpforward"
	"github.com/pillion-proxy/pillion/internal/listener"
	"github.com/pillion-proxy/pillion/internal/sandbox"
	"github.com/pillion-proxy/pillion/internal/serve"
	"github.com/pillion-proxy/pillion/internal/tcp"
	"github.com/pillion-proxy/pillion/internal/upstream"
	"github.com/pillion-proxy/pillion/outbound"
)

// Limits of what the command's connections may hold.
const (
	maxHeldBytes  = 64 << 20
	maxHeadBytes  = 1 << 20
	maxHeadFields = 10_000
)

// traffic carries the command's connections and queries.
type traffic struct {
	table    *flow.Table
	poller   *tcp.Poller
	pool     *upstream.Pool
	note     flow.Fields // of records
	servers  []netip.AddrPort
	names    *dns.Table
	role     *outbound.Proxy
	listener *listener.Server
	resolver *dns.Server
	policy   *egress.Policy // nil: everything is allowed

	datagrams *datagram.Carrier // nil: datagrams are rejected
}

// newTraffic makes what needs no socket of the sandbox. adopt must follow.
func newTraffic(config Config, records *records) (*traffic, error) {
	t := &traffic{table: flow.NewTable(records.sinks()...), pool: upstream.NewPool(0), note: noted(&config)}
	var err error
	if t.servers, err = nameServers(config.Servers); err != nil {
		return nil, err
	}
	t.names, _ = dns.NewTable(readHosts(hostsFile), dns.Scope{}) // invalid names cannot be queried
	if t.poller, err = tcp.NewPoller(); err != nil {
		return nil, err
	}
	return t, nil
}

// adopt takes over the sockets of the sandbox.
func (t *traffic) adopt(config Config, box *sandbox.Sandbox, records *records, decryption *decryption) error {
	if err := t.addResolver(config, box, records); err != nil {
		return err
	}
	if err := t.addOutbound(config, box, decryption); err != nil {
		return err
	}
	if config.Datagrams {
		t.carryDatagrams(box, records)
	}
	return nil
}

// settings are those of all connections. Bytes that decide the protocol are held for a short time only, because the command
// runs beside a person.
func settings() serve.Settings {
	return serve.Settings{
		ConnectTimeout: 2 * time.Minute, DetectionDelay: 5 * time.Millisecond, DetectionHold: time.Second,
	}
}

// noted is what records carry for an archive.
func noted(config *Config) flow.Fields {
	note := flow.Fields{Heads: config.Archives()}
	if note.Heads && config.Bodies > 0 {
		note.Bodies = flow.NewBodies(config.Bodies, MaxBodies)
	}
	return note
}

func (t *traffic) forwarding(pool *upstream.Pool) httpforward.Config {
	return httpforward.Config{
		Pool: pool, Budget: budget.New(maxHeldBytes),
		Settings: httpforward.Settings{
			MaxHeadBytes: maxHeadBytes, MaxHeadFields: maxHeadFields, Note: t.note,
		},
	}
}

func (t *traffic) addOutbound(config Config, box *sandbox.Sandbox, decryption *decryption) error {
	server := &listener.Server{Name: "outbound", Limit: listener.NewLimit(0), Log: config.Logger}
	var ports []uint16
	for _, bound := range box.TCP {
		ports = append(ports, bound.Addr().(*net.TCPAddr).AddrPort().Port())
		adopted, err := t.poller.Adopt(bound)
		if err != nil {
			return err
		}
		server.Listeners = append(server.Listeners, adopted)
	}
	parts := outbound.Config{
		Poller: t.poller, OwnPorts: ports, OwnAddresses: closed{}, Flows: t.table, Settings: settings(), HTTP: t.forwarding(t.pool), Faults: config.Faults,
	}
	if t.policy != nil {
		parts.Egress = t.policy
	}
	if decryption != nil {
		parts.Decryption = decryption
	}
	role, err := outbound.New(parts)
	if err != nil {
		return err
	}
	t.role, server.Handler, t.listener = role, role, server
	return nil
}

// closed are the addresses at which the ports of the listeners are not a destination: the sandbox's own.
type closed struct{}

// Contains implements outbound.Addresses.
func (closed) Contains(address netip.Addr) bool {
	return address.IsLoopback() || address == sandbox.Address4 || address == sandbox.Address6
}

// addResolver makes the resolver, and the policy that judges its queries and looks names up by it.
func (t *traffic) addResolver(config Config, box *sandbox.Sandbox, records *records) error {
	parts := dns.Config{UDP: box.DNS, TCP: box.DNSTCP, Upstreams: t.servers, CacheSize: dns.DefaultCacheSize, Log: config.Logger}
	if config.governs() {
		parts.Refuse = func(name string) bool { return t.policy.Query(name) }
		parts.Learn = func(name string, addresses []netip.Addr) { t.policy.Learn(name, addresses) }
		parts.Sink = records.queried
	}
	resolver, err := dns.New(parts)
	if err != nil {
		return err
	}
	if config.governs() {
		t.policy = egress.New(config.Rules, resolver)
	}
	resolver.SetNames(t.names)
	t.resolver = resolver
	return nil
}

func (t *traffic) start() {
	t.listener.Start()
	t.resolver.Start()
}

// end lets connections end in order until ctx is done, and cuts the others.
func (t *traffic) end(ctx context.Context) {
	t.listener.Stop()
	t.role.Drain()
	t.poller.WakeAll()
	_ = t.listener.Wait(ctx)
	t.listener.Abort()
	_ = t.resolver.Shutdown(ctx)
	if t.datagrams != nil {
		t.datagrams.Close()
	}
	t.poller.Settle(ctx)
}

func (t *traffic) close() {
	if t.datagrams != nil {
		t.datagrams.Close()
	}
	t.pool.Close()
	if t.poller != nil {
		t.poller.Close()
	}
}
