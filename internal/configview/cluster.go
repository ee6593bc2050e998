package configview

import (
	"fmt"
	"net"
	"sort"
	"strconv"
	"strings"
	"time"

	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/xds"
)

// Cluster is a set of hosts and how they are connected to.
type Cluster struct {
	Object
	Discovery string `json:"discovery"` // static, DNS, EDS or original destination
	Balancing string `json:"balancing"` // such as least request
	TLS       string `json:"tls"`       // to its hosts, in words
	HTTP      string `json:"http"`      // the version to its hosts
	Endpoints int    `json:"endpoints"`
	Healthy   int    `json:"healthy"`

	ConnectTimeout string     `json:"connectTimeout,omitempty"`
	Limits         string     `json:"limits,omitempty"`
	Outliers       string     `json:"outliers,omitempty"`
	Hosts          []Endpoint `json:"hosts,omitempty"` // if the cluster was asked for by its name
}

// Endpoint is a host of a cluster.
type Endpoint struct {
	Cluster  string `json:"cluster"`
	Address  string `json:"address"`
	Health   string `json:"health"`
	Usable   bool   `json:"usable"`
	Weight   uint32 `json:"weight"`
	Priority uint32 `json:"priority"`
	Locality string `json:"locality,omitempty"` // region/zone/subzone
	MeshTLS  bool   `json:"meshTLS"`            // it ends mutual TLS of the mesh
	Workload string `json:"workload,omitempty"` // name.namespace
	Active   int64  `json:"active,omitempty"`   // requests in progress, if that is known
	Load     string `json:"load,omitempty"`     // part of the requests that the endpoints of its priority get, in percent, if that is known
	Panic    bool   `json:"panic,omitempty"`    // all endpoints of its priority get requests, because too few are usable
}

// Ejected is the Health of an endpoint that gets no requests because earlier ones failed.
const Ejected = "EJECTED"

// EndpointOf returns an endpoint as it is configured.
func EndpointOf(cluster string, l *mesh.Locality, e *mesh.Endpoint) Endpoint {
	address := e.Address.String()
	if !e.Address.IsValid() {
		address = net.JoinHostPort(e.Host, strconv.Itoa(int(e.Port)))
	}
	return Endpoint{
		Cluster: cluster, Address: address, Health: healths[e.Health], Usable: e.Health.Usable(), Weight: e.Weight, Priority: l.Priority,
		Locality: strings.TrimRight(l.Region+"/"+l.Zone+"/"+l.SubZone, "/"), MeshTLS: e.TLSMode == "istio", Workload: workload(e.Workload),
	}
}

var (
	discoveries = map[mesh.Discovery]string{mesh.Static: "static", mesh.StrictDNS: "DNS", mesh.LogicalDNS: "DNS", mesh.ByEDS: "EDS",
		mesh.OriginalDestination: "original destination"}
	balancings = map[mesh.Policy]string{mesh.RoundRobin: "round robin", mesh.LeastRequest: "least request", mesh.RingHash: "ring hash",
		mesh.Random: "random", mesh.Maglev: "maglev", mesh.ClusterProvided: "original destination"}
	protocols = map[mesh.UpstreamProtocol]string{mesh.UpstreamHTTP1: "HTTP/1.1", mesh.UpstreamHTTP2: "HTTP/2", mesh.UpstreamAsDownstream: "as downstream"}
	healths   = map[mesh.Health]string{mesh.HealthUnknown: "UNKNOWN", mesh.Healthy: "HEALTHY", mesh.Unhealthy: "UNHEALTHY", mesh.Draining: "DRAINING",
		mesh.TimedOut: "TIMEOUT", mesh.Degraded: "DEGRADED"}
)

func (c *collection) clusters(name string) (list []Cluster) {
	assignments := c.assignments()
	for object, cluster := range decoded(c[xds.Clusters], mesh.DecodeCluster) {
		if !matches(object.Name, name) {
			continue
		}
		shown := Cluster{Object: object}
		if cluster != nil {
			shown.fill(cluster, hostsOf(cluster, assignments))
		}
		if name == "" {
			shown.Hosts = nil
		}
		list = append(list, shown)
	}
	return list
}

// assignments returns the endpoints of the clusters that have them as a resource of their own.
func (c *collection) assignments() map[string]*mesh.Assignment {
	all := make(map[string]*mesh.Assignment)
	for object, a := range decoded(c[xds.Endpoints], mesh.DecodeAssignment) {
		if a != nil && object.State != Warming {
			all[object.Name] = a
		}
	}
	return all
}

func hostsOf(c *mesh.Cluster, assignments map[string]*mesh.Assignment) []Endpoint {
	if c.Discovery == mesh.ByEDS {
		return endpointsOf(c, assignments[c.Assignment])
	}
	return endpointsOf(c, c.Hosts)
}

func endpointsOf(c *mesh.Cluster, assignment *mesh.Assignment) []Endpoint {
	if assignment == nil {
		return nil
	}
	var list []Endpoint
	for i := range assignment.Localities {
		l := &assignment.Localities[i]
		for k := range l.Endpoints {
			list = append(list, EndpointOf(c.Name, l, &l.Endpoints[k]))
		}
	}
	sort.SliceStable(list, func(i, j int) bool { return list[i].Priority < list[j].Priority })
	return list
}

// workload returns name.namespace of istiod's name;namespace;canonical name;revision;cluster. Hosts outside of the mesh have
// no name.
func workload(text string) string {
	parts := strings.Split(text, ";")
	if len(parts) < 2 || parts[0] == "" {
		return ""
	}
	return parts[0] + "." + parts[1]
}

func (c *Cluster) fill(cluster *mesh.Cluster, hosts []Endpoint) {
	c.Origin = cluster.Origin
	c.Discovery, c.Balancing, c.HTTP = discoveries[cluster.Discovery], balancings[cluster.Balancing.Policy], protocols[cluster.HTTP.Protocol]
	c.TLS = upstreamTLS(cluster)
	c.ConnectTimeout = duration(cluster.ConnectTimeout)
	c.Limits, c.Outliers = limits(cluster.Breakers), outliers(cluster.Outliers)
	c.Hosts, c.Endpoints = hosts, len(hosts)
	for _, h := range hosts {
		if h.Usable {
			c.Healthy++
		}
	}
}

// upstreamTLS describes the first transport that matches a host.
func upstreamTLS(c *mesh.Cluster) string {
	if len(c.Transports) == 0 {
		return "plain"
	}
	first := c.Transports[0]
	words := "plain"
	switch {
	case first.Refused:
		words = "refused"
	case first.TLS != nil && first.TLS.Certificate != "":
		words = "mutual TLS"
	case first.TLS != nil && first.TLS.Roots != "":
		words = "TLS"
	case first.TLS != nil:
		words = "TLS, not verified"
	}
	if first.TLSMode != "" {
		words += " in the mesh" // other hosts have another transport, in Istio a plain one
	}
	return words
}

const unlimited = 1<<32 - 1

func limits(b mesh.Breakers) string {
	var parts []string
	for _, l := range []struct {
		limit uint32
		of    string
	}{{b.Connections, "connections"}, {b.Pending, "pending"}, {b.Requests, "requests"}, {b.Retries, "retries"}} {
		if l.limit != unlimited {
			parts = append(parts, fmt.Sprintf("%d %s", l.limit, l.of))
		}
	}
	return strings.Join(parts, ", ")
}

func outliers(o *mesh.Outliers) string {
	if o == nil {
		return ""
	}
	var after []string
	for _, c := range []struct {
		count uint32
		of    string
	}{{o.Consecutive5xx, "5xx"}, {o.ConsecutiveGateway, "gateway errors"}, {o.ConsecutiveLocal, "local errors"}} {
		if c.count != 0 {
			after = append(after, fmt.Sprintf("%d %s", c.count, c.of))
		}
	}
	if after == nil {
		return "no host is ejected"
	}
	return fmt.Sprintf("ejected for %s after %s in a row, at most %d%%", duration(o.Ejection), strings.Join(after, " or "), o.MaxPercent)
}

// duration prints a time as people write it; 0 is empty.
func duration(d time.Duration) string {
	if d == 0 {
		return ""
	}
	text := d.String()
	if strings.HasSuffix(text, "m0s") {
		text = strings.TrimSuffix(text, "0s")
	}
	if strings.HasSuffix(text, "h0m") {
		text = strings.TrimSuffix(text, "0m")
	}
	return text
}

func (c *collection) endpoints(name string) (list []Endpoint) {
	assignments := c.assignments()
	for object, cluster := range decoded(c[xds.Clusters], mesh.DecodeCluster) {
		if cluster != nil && object.State != Warming && matches(object.Name, name) {
			list = append(list, hostsOf(cluster, assignments)...)
		}
	}
	return list
}
