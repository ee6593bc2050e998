package agent

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"time"

	"github.com/pillion-proxy/pillion/internal/dns"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/podinfo"
)

// ResolvConf lists the workload's name servers. The containers of a pod share the list.
const ResolvConf = "/etc/resolv.conf"

// resolve makes the resolver and binds its port, if DNS is captured. The port is bound on loopback, because an answer from
// another address would miss its connection tracking entry.
func (a *Agent) resolve() error {
	if !a.config.DNS.Capture {
		return nil
	}
	servers, err := a.nameServers(ResolvConf)
	if err != nil {
		return &FieldError{Field: "DNS.Servers", Err: err}
	}
	config := dns.Config{
		Upstreams:  servers,
		CacheSize:  a.config.DNS.CacheSize,
		AwaitNames: a.config.ControlPlane.Pod != nil,
		Sink:       a.resolved,
		Log:        a.log,
	}
	if a.policy != nil {
		config.Refuse, config.Learn = a.policy.Query, a.policy.Learn
	}
	resolver, err := dns.New(config)
	if err != nil {
		return &FieldError{Field: "DNS.Capture", Err: err}
	}
	a.resolver = resolver
	if session := a.plane.session; session != nil && session.Snapshot() != nil && session.Snapshot().Names() != nil {
		a.setNames(session.Snapshot().Names()) // of kept resources
	}
	return nil
}

// setNames makes the control plane's hosts those that the resolver answers.
func (a *Agent) setNames(names *mesh.Names) {
	if a.resolver == nil {
		return
	}
	hosts := make([]dns.Host, 0, len(names.Hosts))
	for name, host := range names.Hosts {
		hosts = append(hosts, dns.Host{
			Name: name, Addresses: host.Addresses, Kubernetes: host.Registry == "Kubernetes", ShortName: host.ShortName, Namespace: host.Namespace,
		})
	}
	node := &a.config.ControlPlane.Pod.Node
	scope := dns.Scope{Namespace: node.Namespace, Domain: "svc." + cmp.Or(node.Domain, podinfo.DefaultClusterDomain)}
	if search := podinfo.SearchList(ResolvConf); len(search) > 0 {
		scope.Search = search[0]
	}
	table, invalid := dns.NewTable(hosts, scope)
	if len(invalid) > 0 {
		a.log.Warn("hosts of the control plane that DNS cannot have", "count", len(invalid), "first", invalid[0])
	}
	a.resolver.SetNames(table)
}

// nameServers returns the configured servers, or else those in the file at path.
func (a *Agent) nameServers(path string) ([]netip.AddrPort, error) {
	if len(a.config.DNS.Servers) > 0 {
		return a.config.DNS.Servers, nil
	}
	servers, err := dns.ReadResolvConf(path)
	if err == nil && len(servers) == 0 {
		err = fmt.Errorf("%s names no server; set the servers to ask", path)
	}
	return servers, err
}

// resolved logs a query at debug level, as flowLog logs connections.
func (a *Agent) resolved(q dns.Query) {
	if !a.log.Enabled(context.Background(), slog.LevelDebug) {
		return
	}
	a.log.LogAttrs(context.Background(), slog.LevelDebug, "query",
		slog.String("name", q.Name), slog.String("type", q.Type), slog.String("rcode", q.Rcode),
		slog.String("transport", q.Transport), slog.String("upstream", orDash(q.Upstream)),
		slog.Duration("duration", q.Duration.Round(time.Microsecond)),
		slog.Bool("mesh", q.Named), slog.Bool("cached", q.Cached), slog.Bool("joined", q.Joined), slog.Bool("truncated", q.Truncated))
}
