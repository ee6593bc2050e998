package agent

import (
	"context"
	"net/netip"
	"time"

	"github.com/pillion-proxy/pillion/internal/balance"
	"github.com/pillion-proxy/pillion/internal/dns"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/podinfo"
)

// lookup returns what resolves the names of the control plane's clusters: the workload's name servers, as they would be
// asked for these names by the workload. It returns nil without a configuration or without servers.
func (a *Agent) lookup() balance.Lookup {
	if a.mesh() == nil {
		return nil
	}
	servers, err := a.nameServers(ResolvConf)
	var client *dns.Client
	if err == nil {
		client, err = dns.NewClient(servers, podinfo.SearchList(ResolvConf), a.log)
	}
	if err != nil {
		a.log.Warn("clusters with hosts by name have no endpoints", "error", err)
		return nil
	}
	return func(ctx context.Context, name string, family mesh.DNSFamily) ([]netip.Addr, time.Duration, error) {
		return lookupFamily(ctx, client.Lookup, name, family)
	}
}

// lookupFamily looks up the addresses of the families that a cluster uses, in the order of its preference.
func lookupFamily(ctx context.Context, lookup func(ctx context.Context, name string, ipv6 bool) ([]netip.Addr, time.Duration, error), name string, family mesh.DNSFamily) ([]netip.Addr, time.Duration, error) {
	order := map[mesh.DNSFamily][]bool{
		mesh.DNSAuto: {true, false}, mesh.DNSv4: {false}, mesh.DNSv6: {true}, mesh.DNSv4Preferred: {false, true}, mesh.DNSAll: {false, true},
	}[family]
	var all []netip.Addr
	var shortest time.Duration
	for _, ipv6 := range order {
		addresses, ttl, err := lookup(ctx, name, ipv6)
		if err != nil {
			return nil, 0, err
		}
		all = append(all, addresses...)
		if shortest == 0 || ttl > 0 && ttl < shortest {
			shortest = ttl
		}
		if len(all) > 0 && family != mesh.DNSAll {
			break
		}
	}
	return all, shortest, nil
}
