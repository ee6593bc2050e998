package agent

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"time"

	"github.com/pillion-proxy/pillion/internal/dns"
)

// ResolvConf is where the workload's own name servers stand, and the agent's too: a pod's containers share them.
const ResolvConf = "/etc/resolv.conf"

// resolve makes the resolver, when DNS is captured, and binds its port. It is bound to loopback: an answer from another
// address would miss its entry in connection tracking.
func (a *Agent) resolve() error {
	if !a.config.DNSCapture {
		return nil
	}
	servers, err := a.nameServers(ResolvConf)
	if err != nil {
		return fmt.Errorf("--dns-capture: %w", err)
	}
	resolver, err := dns.New(dns.Config{
		Upstreams: servers,
		CacheSize: a.config.DNSCacheSize,
		Sink:      a.resolved,
		Log:       a.log,
	})
	if err != nil {
		return fmt.Errorf("--dns-capture: %w", err)
	}
	a.resolver = resolver
	return nil
}

// nameServers are those of the configuration, or else those that the file at path names.
func (a *Agent) nameServers(path string) ([]netip.AddrPort, error) {
	if len(a.config.DNSServers) > 0 {
		return a.config.DNSServers, nil
	}
	servers, err := dns.ReadResolvConf(path)
	if err == nil && len(servers) == 0 {
		err = fmt.Errorf("%s names no server; name those to ask with --dns-servers", path)
	}
	return servers, err
}

// resolved tells of a query, as flowLog tells of a connection.
func (a *Agent) resolved(q dns.Query) {
	if !a.log.Enabled(context.Background(), slog.LevelDebug) {
		return
	}
	a.log.LogAttrs(context.Background(), slog.LevelDebug, "query",
		slog.String("name", q.Name), slog.String("type", q.Type), slog.String("rcode", q.Rcode),
		slog.String("transport", q.Transport), slog.String("upstream", orDash(q.Upstream)),
		slog.Duration("duration", q.Duration.Round(time.Microsecond)),
		slog.Bool("cached", q.Cached), slog.Bool("joined", q.Joined), slog.Bool("truncated", q.Truncated))
}
