package admin

import (
	"cmp"
	"fmt"
	"iter"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"sort"
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
	sort.Slice(hosts, func(i, j int) bool {
		a, b := &hosts[i], &hosts[j]
		return cmp.Or(strings.Compare(a.cluster, b.cluster), a.address.Compare(b.address)) < 0
	})
	return hosts
}

// clusterStatus is a cluster with its hosts.
type clusterStatus struct {
	name   string
	added  bool // by the control plane
	limits Limits
	hosts  []hostStatus
}

// limitNames are Envoy's names of Limits.
var limitNames = [...]string{"max_connections", "max_pending_requests", "max_requests", "max_retries"}

// hostStatus is a host. open is negative if the connections to it are not counted.
type hostStatus struct {
	Host
	open int
}

// statuses returns the agent's own clusters with the destinations of open connections, and the control plane's with their
// endpoints. One of the same name is both.
func (h *handler) statuses() iter.Seq[clusterStatus] {
	return func(yield func(clusterStatus) bool) {
		open := h.hosts()
		own := []string{envoy.BlackHoleCluster, envoy.InboundPassthroughCluster, envoy.PassthroughCluster}
		opened := func(name string) (list []hostStatus) {
			for _, host := range open {
				if host.cluster == name {
					address := host.address
					list = append(list, hostStatus{Host{Address: address.Addr().String(), Port: address.Port(), Weight: 1, Health: "HEALTHY"}, host.open})
				}
			}
			return list
		}
		if h.ControlPlane != nil {
			for c := range h.ControlPlane.Clusters() {
				status := clusterStatus{c.Name, true, c.Limits, opened(c.Name)}
				for _, host := range c.Hosts {
					status.hosts = append(status.hosts, hostStatus{host, -1})
				}
				own = slices.DeleteFunc(own, func(name string) bool { return name == c.Name })
				if !yield(status) {
					return
				}
			}
		}
		for _, name := range own {
			if !yield(clusterStatus{name: name, hosts: opened(name)}) {
				return
			}
		}
	}
}

// clusters prints those of Envoy's fields that the agent has values for. cx_active of the agent's own clusters counts downstream
// connections. There are as many upstream, except with HTTP/1, where idle upstream connections are pooled. That of the control
// plane's hosts counts the connections to them, also those of other clusters with the same address.
func (h *handler) clusters(w http.ResponseWriter, r *http.Request) {
	asJSON, ok := wantsJSON(w, r)
	if !ok {
		return
	}
	if !asJSON {
		w.Header().Set("Content-Type", "text/plain; charset=UTF-8")
		out := &indented{w: w}
		for c := range h.statuses() {
			if out.text(c.text()); out.failed {
				return
			}
		}
		return
	}
	w.Header().Set("Content-Type", "application/json")
	out := &indented{w: w}
	out.open("{\n \"cluster_statuses\": [")
	for c := range h.statuses() {
		if out.failed {
			return
		}
		out.element(2)
		out.value(c.object(), 2)
	}
	out.close("\n ]")
	out.text("\n}\n")
}

func (c *clusterStatus) object() object {
	o := object{"name": c.name, "observability_name": c.name, "added_via_api": c.added}
	if c.added {
		limits := object{}
		for i, name := range limitNames {
			limits[name] = c.limits[i]
		}
		o["circuit_breakers"] = object{"thresholds": []object{limits}}
	}
	var hosts []object
	for i := range c.hosts {
		hosts = append(hosts, c.hosts[i].object())
	}
	if hosts != nil {
		o["host_statuses"] = hosts
	}
	return o
}

func (h *hostStatus) object() object {
	health := object{"eds_health_status": h.Health}
	if h.Ejected {
		health["failed_outlier_check"] = true
	}
	o := object{
		"address":       object{"socket_address": object{"address": h.Address, "port_value": h.Port}},
		"health_status": health, "weight": h.Weight,
	}
	if h.Priority > 0 {
		o["priority"] = h.Priority
	}
	var stats []object
	for _, s := range h.stats() {
		stat := object{"name": s.name, "value": strconv.FormatUint(s.value, 10)}
		if s.gauge {
			stat["type"] = "GAUGE"
		}
		stats = append(stats, stat)
	}
	if stats != nil {
		o["stats"] = stats
	}
	locality := object{}
	for field, value := range map[string]string{"region": h.Region, "zone": h.Zone, "sub_zone": h.SubZone} {
		if value != "" {
			locality[field] = value
		}
	}
	if len(locality) > 0 {
		o["locality"] = locality
	}
	return o
}

func (c *clusterStatus) text() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s::observability_name::%s\n%s::added_via_api::%t\n", c.name, c.name, c.name, c.added)
	for i := range limitNames {
		if c.added {
			fmt.Fprintf(&b, "%s::default_priority::%s::%d\n", c.name, limitNames[i], c.limits[i])
		}
	}
	for i := range c.hosts {
		h := &c.hosts[i]
		address := joinHostPort(h.Address, h.Port)
		lines := []string{
			"hostname::", "health_flags::" + h.flags(), "weight::" + strconv.Itoa(int(h.Weight)), "region::" + h.Region, "zone::" + h.Zone,
			"sub_zone::" + h.SubZone, "canary::false", "priority::" + strconv.Itoa(int(h.Priority)), "success_rate::-1", "local_origin_success_rate::-1",
		}
		for _, s := range h.stats() {
			fmt.Fprintf(&b, "%s::%s::%s::%d\n", c.name, address, s.name, s.value)
		}
		for _, line := range lines {
			fmt.Fprintf(&b, "%s::%s::%s\n", c.name, address, line)
		}
	}
	return b.String()
}

// hostStat is one of the numbers that Envoy has for a host.
type hostStat struct {
	name  string
	value uint64
	gauge bool
}

// stats returns the numbers that are known of a host, by name.
func (h *hostStatus) stats() (list []hostStat) {
	if h.open >= 0 {
		list = append(list, hostStat{"cx_active", uint64(h.open), true})
	}
	if u := h.Use; u != nil {
		list = append(list, hostStat{"cx_active", u.Connections, true}, hostStat{"cx_connect_fail", u.ConnectFailures, false}, hostStat{"rq_active", u.Active, true},
			hostStat{"rq_error", u.Errors, false}, hostStat{"rq_success", u.Successes, false}, hostStat{"rq_total", u.Total, false})
	}
	return list
}

// joinHostPort returns the address of a host as Envoy prints it.
func joinHostPort(address string, port uint16) string {
	return net.JoinHostPort(address, strconv.Itoa(int(port)))
}

// flags returns Envoy's names of the reasons why a host gets no connections.
func (h *hostStatus) flags() string {
	var flags string
	if h.Ejected {
		flags += "/failed_outlier_check"
	}
	switch h.Health {
	case "UNHEALTHY", "TIMEOUT", "DRAINING":
		flags += "/failed_eds_health"
	case "DEGRADED":
		flags += "/degraded_eds_health"
	}
	return cmp.Or(flags, "healthy")
}
