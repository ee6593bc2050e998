package route

import (
	"cmp"
	"slices"
	"strings"
	"sync/atomic"

	"github.com/pillion-proxy/pillion/internal/mesh"
)

// Cluster is a cluster that a route sends requests to, with what the route and its weight change. A route that answers
// requests has one without a name.
type Cluster struct {
	Name     string
	NotFound *Reply // if the cluster does not exist

	table         *mesh.Routes
	host          *mesh.VirtualHost
	route         *mesh.Route
	source        *mesh.WeightedCluster // nil: the route answers
	weight        uint32
	faults        *faults // nil if the requests get no faults
	cors          *cors   // nil without a policy
	hash          *hashing
	redirectRegex *rewrite                // of the path of a redirect; nil without a regular expression
	plans         [4]atomic.Pointer[Plan] // by planKind
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
		if to := r.Redirect; to != nil && to.Regex != nil {
			c.redirectRegex = compileRewrite(to.Regex)
		}
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

// policyLevels returns the parts of the routes that may change policies, the most specific first. Any may be nil.
func (c *Choice) policyLevels() [4]*mesh.RouteFilters {
	levels := [4]*mesh.RouteFilters{3: &c.table.source.Filters}
	if c.Cluster != nil {
		return c.Cluster.filters()
	}
	if c.Host != nil {
		levels[2] = &c.Host.Filters
	}
	return levels
}

// Check returns what the routes change of the questions of an HTTP filter. Values for servers of all its parts are joined; of
// those with one name, the most specific is sent.
func (c *Choice) Check(filter string) *mesh.CheckSettings {
	var joined *mesh.CheckSettings
	for _, level := range c.policyLevels() {
		p := level.Policy(filter)
		if p == nil || p.Check == nil {
			continue
		}
		if joined == nil {
			joined = &mesh.CheckSettings{NoBody: p.Check.NoBody, Body: p.Check.Body}
		}
		for _, v := range p.Check.Context {
			if !slices.ContainsFunc(joined.Context, func(known mesh.NamedValue) bool { return known.Name == v.Name }) {
				joined.Context = append(joined.Context, v)
			}
		}
	}
	slices.SortFunc(joined.Context, func(a, b mesh.NamedValue) int { return strings.Compare(a.Name, b.Name) })
	return joined
}

// ChangesPolicies reports whether a part of the routes changes the policy of an HTTP filter.
func (t *Table) ChangesPolicies() bool { return t.changes }

func changesPolicies(r *mesh.Routes) bool {
	changes := len(r.Filters.Policies) > 0
	for i := range r.Hosts {
		h := &r.Hosts[i]
		changes = changes || len(h.Filters.Policies) > 0
		for k := range h.Routes {
			changes = changes || len(h.Routes[k].Filters.Policies) > 0
			if f := h.Routes[k].Forward; f != nil {
				for n := range f.Clusters {
					changes = changes || len(f.Clusters[n].Filters.Policies) > 0
				}
			}
		}
	}
	return changes
}

// Policy returns what the most specific part of the routes changes of the policy of an HTTP filter, or nil.
func (c *Choice) Policy(filter string) *mesh.RoutePolicy {
	for _, level := range c.policyLevels() {
		if p := level.Policy(filter); p != nil {
			return p
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
