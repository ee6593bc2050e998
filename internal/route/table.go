package route

import (
	"bytes"
	"math/rand/v2"
	"strings"
	"sync/atomic"

	"github.com/pillion-proxy/pillion/internal/mesh"
)

// Table is the compiled form of mesh.Routes. It is safe for concurrent use. Virtual hosts, routes and plans are compiled
// when the first request needs them, because a sidecar has the routes of all services and uses few.
type Table struct {
	source  *mesh.Routes
	domains domains
	changes bool                   // see ChangesPolicies
	hosts   []atomic.Pointer[host] // nil: not compiled yet; in the order of the source
}

// Of returns the table of r. It is compiled once and kept with r, so that snapshots that share r share the table.
func Of(r *mesh.Routes) *Table {
	if t, ok := r.Compiled.Load().(*Table); ok {
		return t
	}
	t := &Table{source: r, domains: indexDomains(r.Hosts), changes: changesPolicies(r), hosts: make([]atomic.Pointer[host], len(r.Hosts))}
	if !r.Compiled.CompareAndSwap(nil, t) {
		return r.Compiled.Load().(*Table)
	}
	return t
}

// Choice is what the routes have for a request.
type Choice struct {
	Host    *mesh.VirtualHost // nil: no virtual host is for the request's host
	Route   *mesh.Route       // nil: no route matches, or the request is refused or redirected to HTTPS
	Cluster *Cluster          // the one of the route's clusters that was drawn; nil: Route is nil. Its name is empty if the route answers
	Reply   *Reply            // not nil: there is no route to follow
	Fault   *mesh.Fault       // the HTTP filter's, for routes without faults; the caller sets it, and may leave it nil

	table *Table
}

// Find returns the virtual host, the route and the cluster of a request.
func (t *Table) Find(r *Request) Choice {
	c := Choice{table: t}
	if t.source.Refused {
		c.Reply = Refused
		return c
	}
	h := t.host(r)
	if h == nil {
		c.Reply = NoRoute
		return c
	}
	c.Host = h.source
	switch {
	case h.source.Refused:
		c.Reply = Refused
		return c
	case h.insecure(r):
		c.Reply = secureRedirect(r)
		return c
	}
	i := h.find(&search{Request: r, path: t.path(r)})
	switch {
	case i < 0:
		c.Reply = NoRoute
	case h.routes[i].source.Refused:
		c.Reply = Refused
	default:
		c.Route = h.routes[i].source
		c.Cluster = h.routes[i].cluster(t, h.source, r)
	}
	return c
}

// host returns the compiled virtual host of a request, or nil.
func (t *Table) host(r *Request) *host {
	i := t.domains.any
	var name []byte
	if len(r.Authority) > 0 {
		name = t.domain(r.Authority)
		if l := &r.last; l.table == t && l.domain == string(name) {
			return l.host
		}
		i = t.domains.find(name)
	}
	if i < 0 {
		return nil
	}
	h := t.compiled(i)
	for _, domain := range h.source.Domains {
		if domain.Kind == mesh.DomainExact && domain.Text == string(name) {
			r.last = lastHost{t, domain.Text, h}
			break
		}
	}
	return h
}

func (t *Table) compiled(i int) *host {
	if h := t.hosts[i].Load(); h != nil {
		return h
	}
	h := compileHost(&t.source.Hosts[i])
	if !t.hosts[i].CompareAndSwap(nil, h) {
		return t.hosts[i].Load()
	}
	return h
}

// domain returns the part of a request's authority that domains are compared with.
func (t *Table) domain(authority []byte) []byte {
	if t.source.IgnorePort {
		return authority[:portStart(authority)]
	}
	return authority
}

// portStart returns the index of the colon before the port, or the length of authority. A colon in brackets belongs to an
// IPv6 address.
func portStart(authority []byte) int {
	colon := bytes.LastIndexByte(authority, ':')
	if colon < 0 || bytes.LastIndexByte(authority, ']') > colon {
		return len(authority)
	}
	return colon
}

// path returns the part of a request's target that routes are chosen by: without query, fragment and, if so configured,
// without parameters. It is nil if the request has no path, as that of CONNECT.
func (t *Table) path(r *Request) []byte {
	path := plain(origin(r.Path))
	if t.source.IgnorePathParameters {
		path, _, _ = bytes.Cut(path, []byte(";"))
	}
	return path
}

// origin returns a request's target from its path on. A target in absolute form has scheme and authority before the path.
func origin(target []byte) []byte {
	if len(target) == 0 || target[0] == '/' {
		return target
	}
	_, rest, absolute := bytes.Cut(target, []byte("://"))
	if !absolute {
		return target
	}
	start := bytes.IndexAny(rest, "/?#")
	if start < 0 || rest[start] != '/' {
		return []byte("/")
	}
	return rest[start:]
}

// plain returns path without query and fragment.
func plain(path []byte) []byte {
	if i := bytes.IndexAny(path, "?#"); i >= 0 {
		return path[:i]
	}
	return path
}

// insecure reports whether the request must be redirected to HTTPS. X-Forwarded-Proto has the scheme that the client used.
func (h *host) insecure(r *Request) bool {
	switch h.source.RequireTLS {
	case mesh.TLSNotRequired:
		return false
	case mesh.TLSRequiredExternally:
		if internal, _ := lookup(r.Fields, "x-envoy-internal"); string(internal) == "true" {
			return false
		}
	}
	return !strings.EqualFold(string(forwardedProto(r)), "https")
}

func forwardedProto(r *Request) []byte {
	if proto, n := lookup(r.Fields, "x-forwarded-proto"); n > 0 {
		return proto
	}
	return r.Scheme
}

// cluster returns one of the route's clusters, drawn by their weights.
func (r *route) cluster(t *Table, h *mesh.VirtualHost, request *Request) *Cluster {
	clusters := r.clusters.Load()
	if clusters == nil {
		clusters = compileClusters(t.source, h, r.source)
		if !r.clusters.CompareAndSwap(nil, clusters) {
			clusters = r.clusters.Load()
		}
	}
	if len(clusters.all) == 1 {
		return &clusters.all[0]
	}
	drawn := request.random() % clusters.total
	for i := range clusters.all {
		weight := uint64(clusters.all[i].weight)
		if drawn < weight {
			return &clusters.all[i]
		}
		drawn -= weight
	}
	return &clusters.all[0] // not reached: the sum of the weights is total
}

func (r *Request) random() uint64 {
	if r.Random != nil {
		return r.Random()
	}
	return rand.Uint64()
}

// drawn reports whether a case of a fraction is drawn.
func (r *Request) drawn(f mesh.Fraction) bool {
	switch {
	case f.Numerator == 0:
		return false
	case f.Numerator >= f.Denominator:
		return true
	}
	return r.random()%uint64(f.Denominator) < uint64(f.Numerator)
}
