package admin

import (
	"cmp"
	"fmt"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/pillion-proxy/pillion/internal/envoy"
	"github.com/pillion-proxy/pillion/internal/flow"
)

// maxHosts bounds the destinations in a response.
const maxHosts = 4096

// host is a destination of open connections. It is healthy in Envoy's sense, because there are no health checks.
type host struct {
	cluster string
	address netip.AddrPort
	open    int
}

// hosts counts the open connections by destination. Beyond maxHosts, the destinations of the oldest connections are left
// out.
func (h *handler) hosts() []host {
	type key struct {
		direction flow.Direction
		address   netip.AddrPort
	}
	open := make(map[key]int)
	h.Flows.Each(func(r *flow.Record) bool {
		k := key{r.Direction, r.OriginalDestination}
		if n := open[k]; r.Carried() && (n > 0 || len(open) < maxHosts) {
			open[k] = n + 1
		}
		return true
	})
	hosts := make([]host, 0, len(open))
	for k, n := range open {
		hosts = append(hosts, host{k.direction.Passthrough(), k.address, n})
	}
	slices.SortFunc(hosts, func(a, b host) int {
		return cmp.Or(strings.Compare(a.cluster, b.cluster), a.address.Compare(b.address))
	})
	return hosts
}

// clusters prints those of Envoy's fields that the agent has values for. cx_active counts downstream connections. There are
// as many upstream, except with HTTP/1, where idle upstream connections are pooled.
func (h *handler) clusters(w http.ResponseWriter, r *http.Request) {
	asJSON, ok := wantsJSON(w, r)
	if !ok {
		return
	}
	hosts := h.hosts()
	names := []string{envoy.BlackHoleCluster, envoy.InboundPassthroughCluster, envoy.PassthroughCluster}
	if !asJSON {
		answer(w, http.StatusOK, clustersText(names, hosts))
		return
	}
	statuses := []object{}
	for _, name := range names {
		status := object{"name": name, "observability_name": name, "added_via_api": false}
		var of []object
		for _, host := range hosts {
			if host.cluster == name {
				of = append(of, object{
					"address":       socketAddress(host.address),
					"stats":         []object{{"type": "GAUGE", "name": "cx_active", "value": strconv.Itoa(host.open)}},
					"health_status": object{"eds_health_status": "HEALTHY"},
					"weight":        1,
				})
			}
		}
		if of != nil {
			status["host_statuses"] = of
		}
		statuses = append(statuses, status)
	}
	answerJSON(w, object{"cluster_statuses": statuses})
}

func clustersText(names []string, hosts []host) string {
	var b strings.Builder
	for _, name := range names {
		fmt.Fprintf(&b, "%s::observability_name::%s\n%s::added_via_api::false\n", name, name, name)
		for _, host := range hosts {
			if host.cluster != name {
				continue
			}
			for _, line := range []string{
				"cx_active::" + strconv.Itoa(host.open), "hostname::", "health_flags::healthy", "weight::1", "region::", "zone::",
				"sub_zone::", "canary::false", "priority::0", "success_rate::-1", "local_origin_success_rate::-1",
			} {
				fmt.Fprintf(&b, "%s::%s::%s\n", name, host.address, line)
			}
		}
	}
	return b.String()
}
