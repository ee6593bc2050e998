package route

import (
	"fmt"

	"github.com/pillion-proxy/pillion/internal/mesh"
)

// Step is a route that was compared with a request.
type Step struct {
	Route *mesh.Route
	Close bool   // the path matched
	Why   string // the first condition that the request does not meet; empty: the route matched
}

// Explain finds what Find does, and returns the routes that were compared with the request, in their order. The last one is
// the route that matched, if there is one. Explain allocates, and is meant for people.
func (t *Table) Explain(r *Request) (Choice, []Step) {
	c := t.Find(r)
	if c.Host == nil || c.Host.Refused {
		return c, nil
	}
	h := t.host(r)
	if h.insecure(r) {
		return c, nil
	}
	var steps []Step
	path := t.path(r)
	s := search{Request: r, path: path}
	for i := range h.routes {
		if len(path) == 0 {
			steps = append(steps, Step{Route: h.routes[i].source, Why: "the request has no path"})
			continue
		}
		m := h.routes[i].miss(&s)
		steps = append(steps, Step{h.routes[i].source, m.kind != missedPath, h.routes[i].why(m, r, path)})
		if m.kind == matched {
			break
		}
	}
	return c, steps
}

// Domain returns the domain by which the virtual host of a request was found.
func (c *Choice) Domain(r *Request) string {
	if c.Host == nil {
		return ""
	}
	name := c.table.domain(r.Authority)
	best := mesh.Domain{Kind: mesh.DomainAny}
	for _, d := range c.Host.Domains {
		alone := indexDomains([]mesh.VirtualHost{{Domains: []mesh.Domain{d}}})
		if alone.find(name) == 0 && (d.Kind < best.Kind || d.Kind == best.Kind && len(d.Text) > len(best.Text)) {
			best = d
		}
	}
	return best.String()
}

// why describes the condition that a request does not meet.
func (r *route) why(m miss, request *Request, path []byte) string {
	match := &r.source.Match
	switch m.kind {
	case missedPath:
		verb := map[mesh.PathMatchKind]string{mesh.PathExact: "is not", mesh.PathPrefix: "does not begin with", mesh.PathRegex: "does not match", mesh.PathSeparatedPrefix: "is not below"}[match.Kind]
		return fmt.Sprintf("path %s %s %s", path, verb, match.Path)
	case missedHeader:
		h := &match.Headers[m.index]
		return foundHeader(h, request) + " " + wantedHeader(h)
	case missedQuery:
		return whyQuery(&match.Query[m.index], request)
	case missedMetadata:
		return "metadata of " + match.Metadata[m.index].Filter + " does not match"
	}
	return ""
}

func whyQuery(q *mesh.QueryMatcher, r *Request) string {
	value, present := parameter(r.Path, q.Name)
	switch {
	case q.Text == nil && present:
		return "parameter " + q.Name + " must be absent"
	case q.Text == nil:
		return "parameter " + q.Name + " must be present"
	case !present:
		return fmt.Sprintf("parameter %s is absent, must be %s", q.Name, wantedText(q.Text))
	}
	return fmt.Sprintf("parameter %s is %q, must be %s", q.Name, value, wantedText(q.Text))
}

func foundHeader(h *mesh.HeaderMatcher, r *Request) string {
	value, n := r.field(h.Name)
	switch {
	case n == 0:
		return "header " + h.Name + " is absent,"
	case n > 1:
		return fmt.Sprintf("header %s has %d values,", h.Name, n)
	}
	return fmt.Sprintf("header %s is %q,", h.Name, value)
}

func wantedHeader(h *mesh.HeaderMatcher) string {
	must := "must be "
	if h.Invert {
		must = "must be present and not "
	}
	switch {
	case h.Kind == mesh.HeaderPresence && h.Present != h.Invert:
		return "must be present"
	case h.Kind == mesh.HeaderPresence:
		return "must be absent"
	case h.Kind == mesh.HeaderRange:
		return fmt.Sprintf("%sfrom %d to %d", must, h.Start, h.End-1)
	}
	return must + wantedText(&h.Text)
}

// wantedText describes a text that matches.
func wantedText(m *mesh.StringMatcher) string {
	words := map[mesh.MatchKind]string{
		mesh.MatchExact: "", mesh.MatchPrefix: "a text that begins with ", mesh.MatchSuffix: "a text that ends with ",
		mesh.MatchContains: "a text with ", mesh.MatchRegex: "a match of ",
	}[m.Kind] + fmt.Sprintf("%q", m.Text)
	if m.IgnoreCase {
		words += " in any case"
	}
	return words
}
