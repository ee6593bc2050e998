package route

import (
	"slices"
	"sync/atomic"

	"github.com/pillion-proxy/pillion/internal/mesh"
)

// host is a compiled virtual host.
type host struct {
	source *mesh.VirtualHost
	routes []route
	paths  *paths // nil: the routes are so few that they are compared one by one
}

// route is a compiled route. Its clusters are compiled when the first request follows it.
type route struct {
	source     *mesh.Route
	path       *pattern    // of a path that is a regular expression
	conditions *conditions // besides the path; may be nil
	clusters   atomic.Pointer[clusters]
}

// conditions are the compiled conditions of a route besides its path.
type conditions struct {
	headers  []header
	query    []query
	metadata []mesh.MetadataMatcher
}

// fewRoutes is the number of routes that are compared one by one.
const fewRoutes = 8

func compileHost(source *mesh.VirtualHost) *host {
	h := &host{source: source, routes: make([]route, len(source.Routes))}
	var p patterns
	for i := range h.routes {
		h.routes[i].compile(&source.Routes[i], &p)
	}
	if len(h.routes) > fewRoutes {
		h.paths = indexPaths(h.routes)
	}
	return h
}

func (r *route) compile(source *mesh.Route, p *patterns) {
	r.source = source
	m := &source.Match
	if m.Kind == mesh.PathRegex {
		r.path = p.get(m.Path)
	}
	if m.Refused || len(m.Headers)+len(m.Query)+len(m.Metadata) == 0 {
		return
	}
	c := &conditions{metadata: m.Metadata}
	for i := range m.Headers {
		c.headers = append(c.headers, compileHeader(&m.Headers[i], p))
	}
	for i := range m.Query {
		c.query = append(c.query, compileQuery(&m.Query[i], p))
	}
	r.conditions = c
}

// find returns the index of the first route that matches, or -1.
func (h *host) find(s *search) int {
	if len(s.path) == 0 {
		return -1
	}
	if h.paths != nil {
		return h.paths.find(h.routes, s)
	}
	for i := range h.routes {
		if h.routes[i].miss(s).kind == matched {
			return i
		}
	}
	return -1
}

// paths is an index of the routes of a virtual host by their paths. Routes of the same kind with the same path are linked.
type paths struct {
	index    index
	next     []int32 // of each route, the next one with its path; 0: it is the last
	prefixes []int   // the lengths of the paths that are prefixes, ascending
	others   []int32 // the routes whose paths are compared one by one, ascending
}

// Keys of the index.
const (
	exactKey  = byte(mesh.PathExact)
	prefixKey = byte(mesh.PathPrefix) // of both kinds of prefixes
)

func indexPaths(routes []route) *paths {
	p := &paths{index: newIndex(len(routes)), next: make([]int32, len(routes))}
	last := map[string]int{} // the last route with a key
	for i := range routes {
		m := &routes[i].source.Match
		key, indexed := pathKey(m)
		if !indexed {
			p.others = append(p.others, int32(i))
			continue
		}
		if before, linked := last[string(key)+m.Path]; linked {
			p.next[before] = int32(i)
		} else {
			p.index.add(hashPath(key, m.Path), i)
		}
		last[string(key)+m.Path] = i
		if key == prefixKey {
			p.prefixes = append(p.prefixes, len(m.Path))
		}
	}
	slices.Sort(p.prefixes)
	p.prefixes = slices.Clip(slices.Compact(p.prefixes))
	return p
}

// pathKey returns the kind of a path's key in the index, and whether it can be indexed.
func pathKey(m *mesh.RouteMatch) (key byte, indexed bool) {
	if m.IgnoreCase || m.Path == "" {
		return 0, false
	}
	switch m.Kind {
	case mesh.PathExact:
		return exactKey, true
	case mesh.PathPrefix, mesh.PathSeparatedPrefix:
		return prefixKey, true
	}
	return 0, false
}

func hashPath(key byte, path string) uint64 {
	h := hashStart(key)
	for _, c := range []byte(path) {
		h = hashByte(h, c)
	}
	return h
}

// find returns the index of the first route that matches, or -1. The paths that a request can match are tried in any order,
// and routes behind the best one found are skipped, so that the result is that of a search in the order of the routes.
func (p *paths) find(routes []route, s *search) int {
	path, best := s.path, len(routes)
	exact, prefix, done := hashStart(exactKey), hashStart(prefixKey), 0
	for _, length := range p.prefixes {
		if length > len(path) {
			break
		}
		for ; done < length; done++ {
			prefix = hashByte(prefix, path[done])
		}
		best = p.try(routes, s, prefix, best)
	}
	for _, c := range path {
		exact = hashByte(exact, c)
	}
	best = p.try(routes, s, exact, best)
	for _, i := range p.others {
		if int(i) >= best {
			break
		}
		if routes[i].miss(s).kind == matched {
			best = int(i)
		}
	}
	if best == len(routes) {
		return -1
	}
	return best
}

// try returns the first route before best that has a hash and matches, or best.
func (p *paths) try(routes []route, s *search, hash uint64, best int) int {
	for found := p.index.probe(hash); found.next(&p.index); {
		for i := found.value; i < best; i = int(p.next[i]) {
			if routes[i].miss(s).kind == matched {
				best = i
			}
			if p.next[i] == 0 {
				break
			}
		}
	}
	return best
}
