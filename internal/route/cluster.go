package route

import (
	"cmp"
	"sync/atomic"

	"github.com/pillion-proxy/pillion/internal/mesh"
)

// Cluster is a cluster that a route sends requests to, with what the route and its weight change. A route that answers
// requests has one without a name.
type Cluster struct {
	Name     string
	NotFound *Reply // if the cluster does not exist

	table  *mesh.Routes
	host   *mesh.VirtualHost
	route  *mesh.Route
	source *mesh.WeightedCluster // nil: the route answers
	weight uint32
	faults *faults // nil if the requests get no faults
	cors   *cors   // nil without a policy
	hash   *hashing
	plans  [4]atomic.Pointer[Plan] // by planKind
}

// clusters are the compiled clusters of a route.
type clusters struct {
	all   []Cluster
	total uint64 // of the weights
}

func compileClusters(t *mesh.Routes, h *mesh.VirtualHost, r *mesh.Route) *clusters {
	if r.Forward == nil {
		c := &clusters{all: make([]Cluster, 1)}
		c.all[0].compile(t, h, r, nil)
		return c
	}
	c := &clusters{all: make([]Cluster, len(r.Forward.Clusters))}
	for i := range c.all {
		source := &r.Forward.Clusters[i]
		c.all[i].compile(t, h, r, source)
		c.total += uint64(source.Weight)
	}
	return c
}

func (c *Cluster) compile(t *mesh.Routes, h *mesh.VirtualHost, r *mesh.Route, source *mesh.WeightedCluster) {
	c.table, c.host, c.route, c.source = t, h, r, source
	var p patterns
	c.faults = compileFaults(c.filters(), &p)
	if source == nil {
		return
	}
	c.Name, c.weight = source.Name, source.Weight
	c.NotFound = notFound[r.Forward.NotFoundCode]
	c.cors = compileCORS(c.filters(), &p)
	c.hash = compileHashing(r.Forward.Hash)
}

// filters returns what changes filters, the most specific first.
func (c *Cluster) filters() [4]*mesh.RouteFilters {
	filters := [4]*mesh.RouteFilters{1: &c.route.Filters, 2: &c.host.Filters, 3: &c.table.Filters}
	if c.source != nil {
		filters[0] = &c.source.Filters
	} else {
		filters[0] = &mesh.RouteFilters{}
	}
	return filters
}

// Policy returns what the most specific part of the routes changes of the policy of an HTTP filter, or nil.
func (c *Choice) Policy(filter string) *mesh.RoutePolicy {
	levels := [4]*mesh.RouteFilters{3: &c.table.source.Filters}
	if c.Cluster != nil {
		levels = c.Cluster.filters()
	} else if c.Host != nil {
		levels[2] = &c.Host.Filters
	}
	for _, level := range levels {
		if level == nil {
			continue
		}
		for i := range level.Policies {
			if level.Policies[i].Filter == filter {
				return &level.Policies[i]
			}
		}
	}
	return nil
}

// planKind is a set of what a plan has for some requests only.
type planKind uint8

const (
	crossOrigin planKind = 1 << iota // the origin is allowed
	withCookies                      // the hash is used, so cookies are set that it depends on
)

// plan returns the plan of requests to the cluster.
func (c *Cluster) plan(kind planKind) *Plan {
	if c.hash == nil || len(c.hash.cookies) == 0 {
		kind &^= withCookies
	}
	if p := c.plans[kind].Load(); p != nil {
		return p
	}
	p := c.compilePlan(kind)
	if !c.plans[kind].CompareAndSwap(nil, p) {
		return c.plans[kind].Load()
	}
	return p
}

func (c *Cluster) compilePlan(kind planKind) *Plan {
	p := &Plan{Operation: c.route.Operation}
	c.compileEdits(p)
	if f := c.route.Forward; f != nil {
		p.Idle, p.MaxStream, p.GRPCStream = f.IdleTimeout, f.MaxStreamLength, f.MaxGRPCStream
		if p.MaxStream == nil && p.GRPCStream == nil { // they take the place of the others
			p.Timeout, p.GRPCTimeout = f.Timeout, f.MaxGRPCTimeout
		}
		p.Retry = cmp.Or(f.Retry, c.host.Retry)
		p.Mirrors = c.mirrors()
		p.CountAttempts, p.CountInResponses = c.host.CountAttempts, c.host.CountInResponses
		p.compileRewrites(c.route, cmp.Or(c.source.HostRewrite, f.HostRewrite))
	}
	if kind&withCookies != 0 {
		p.ResponseEdits = append(p.ResponseEdits, c.hash.cookies...)
	}
	if kind&crossOrigin != 0 {
		p.ResponseEdits = append(p.ResponseEdits, c.cors.edits...)
	}
	return p
}

func (c *Cluster) mirrors() []mesh.Mirror {
	for _, mirrors := range [...][]mesh.Mirror{c.route.Forward.Mirrors, c.host.Mirrors, c.table.Mirrors} {
		if len(mirrors) > 0 {
			return mirrors
		}
	}
	return nil
}

// compileEdits adds the edits of the cluster's weight, the route, the virtual host and the table. The later edits win.
func (c *Cluster) compileEdits(p *Plan) {
	levels := [4]*mesh.Edits{&c.route.Edits, &c.route.Edits, &c.host.Edits, &c.table.Edits}
	first := 1
	if c.source != nil {
		levels[0], first = &c.source.Edits, 0
	}
	order := levels[first:]
	for i := range order {
		level := order[i]
		if c.table.SpecificEditsLast {
			level = order[len(order)-1-i]
		}
		p.RequestEdits = appendEdits(p.RequestEdits, &level.Request)
		p.ResponseEdits = appendEdits(p.ResponseEdits, &level.Response)
	}
}
