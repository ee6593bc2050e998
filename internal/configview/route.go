package configview

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"sort"
	"strconv"
	"strings"

	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/xds"
)

// Table is a table of routes. One that is a part of a listener has the listener's state.
type Table struct {
	Object
	Listener string `json:"listener,omitempty"` // that it is a part of
	Hosts    []Host `json:"hosts"`
}

// Host is the routes of some domains.
type Host struct {
	Name    string   `json:"name"`
	Domains []string `json:"domains"`
	TLS     bool     `json:"requireTLS,omitempty"` // requests without TLS are redirected
	Refused bool     `json:"refused,omitempty"`
	Routes  []Route  `json:"routes"`
}

// Route is what becomes of the requests that it matches.
type Route struct {
	Name    string `json:"name,omitempty"`
	Match   string `json:"match"`          // in words
	To      string `json:"to"`             // in words
	With    string `json:"with,omitempty"` // what is done on the way, in words
	Origin  string `json:"origin,omitempty"`
	Refused bool   `json:"refused,omitempty"`
}

func (c *collection) tables(name string) (list []Table) {
	add := func(t Table, routes *mesh.Routes) {
		t.Hosts = []Host{}
		selected := matches(t.Name, name)
		for i := range routes.Hosts {
			host := hostOf(&routes.Hosts[i], routes.Refused)
			if selected || host.Name == name || slices.Contains(host.Domains, name) {
				t.Hosts = append(t.Hosts, host)
			}
		}
		if selected || len(t.Hosts) > 0 {
			list = append(list, t)
		}
	}
	for object, routes := range decoded(c[xds.Routes], mesh.DecodeRoutes) {
		if routes == nil {
			routes = &mesh.Routes{}
		}
		add(Table{Object: object}, routes)
	}
	for object, l := range decoded(c[xds.Listeners], mesh.DecodeListener) {
		if l == nil {
			continue
		}
		for _, routes := range inlineRoutes(l) {
			part := object
			part.Name, part.Findings = routes.Name, nil
			add(Table{Object: part, Listener: object.Name}, routes)
		}
	}
	sort.SliceStable(list, func(i, j int) bool { return list[i].Name < list[j].Name })
	return list
}

// inlineRoutes returns the tables in a listener, each once: chains for TLS and for plain connections have the same.
func inlineRoutes(l *mesh.Listener) []*mesh.Routes {
	byName := make(map[string]*mesh.Routes)
	for _, chain := range slices.Concat(l.Chains, []*mesh.FilterChain{l.Default}) {
		if chain != nil && chain.HTTP != nil && chain.HTTP.Routes != nil {
			byName[chain.HTTP.Routes.Name] = chain.HTTP.Routes
		}
	}
	return slices.SortedFunc(maps.Values(byName), func(a, b *mesh.Routes) int { return cmp.Compare(a.Name, b.Name) })
}

func hostOf(h *mesh.VirtualHost, refused bool) Host {
	shown := Host{Name: h.Name, Domains: []string{}, TLS: h.RequireTLS != mesh.TLSNotRequired, Refused: h.Refused || refused, Routes: []Route{}}
	for _, d := range h.Domains {
		text := map[mesh.DomainKind]string{mesh.DomainExact: d.Text, mesh.DomainSuffix: "*" + d.Text, mesh.DomainPrefix: d.Text + "*", mesh.DomainAny: "*"}[d.Kind]
		shown.Domains = append(shown.Domains, text)
	}
	for i := range h.Routes {
		r := routeOf(&h.Routes[i], h)
		r.Refused = r.Refused || shown.Refused
		shown.Routes = append(shown.Routes, r)
	}
	return shown
}

func routeOf(r *mesh.Route, h *mesh.VirtualHost) Route {
	return Route{Name: r.Name, Match: routeMatch(&r.Match), To: routeTo(r), With: routeWith(r, h), Origin: r.Origin, Refused: r.Refused}
}

// routeMatch describes the requests that a route is for. A star stands for any text.
func routeMatch(m *mesh.RouteMatch) string {
	parts := []string{""}
	switch m.Kind {
	case mesh.PathPrefix:
		parts[0] = m.Path + "*"
	case mesh.PathExact:
		parts[0] = m.Path
	case mesh.PathRegex:
		parts[0] = "~" + m.Path
	case mesh.PathSeparatedPrefix:
		parts[0] = m.Path + "[/*]"
	}
	if m.IgnoreCase {
		parts[0] += " in any case"
	}
	for i := range m.Headers {
		parts = append(parts, headerWords(&m.Headers[i]))
	}
	for _, q := range m.Query {
		switch {
		case q.Text != nil:
			parts = append(parts, "?"+q.Name+textWords(q.Text))
		case q.Present:
			parts = append(parts, "?"+q.Name)
		default:
			parts = append(parts, "no ?"+q.Name)
		}
	}
	for _, m := range m.Metadata {
		parts = append(parts, "metadata "+strings.Join(append([]string{m.Filter}, m.Path...), "."))
	}
	return strings.Join(parts, ", ")
}

func headerWords(h *mesh.HeaderMatcher) string {
	not := ""
	if h.Invert {
		not = "not "
	}
	switch h.Kind {
	case mesh.HeaderText:
		return not + h.Name + textWords(&h.Text)
	case mesh.HeaderRange:
		return fmt.Sprintf("%s%s from %d to %d", not, h.Name, h.Start, h.End-1)
	}
	if h.Present == h.Invert {
		return "no " + h.Name
	}
	return "with " + h.Name
}

// textWords describes a matcher, after the name of what it matches.
func textWords(m *mesh.StringMatcher) string {
	words := map[mesh.MatchKind]string{mesh.MatchExact: "=" + m.Text, mesh.MatchPrefix: "=" + m.Text + "*", mesh.MatchSuffix: "=*" + m.Text,
		mesh.MatchContains: "=*" + m.Text + "*", mesh.MatchRegex: "~" + m.Text}[m.Kind]
	if m.IgnoreCase {
		words += " in any case"
	}
	return words
}

// routeTo describes where a route's requests go.
func routeTo(r *mesh.Route) string {
	switch {
	case r.Forward != nil && len(r.Forward.Clusters) > 0:
		var shares []share
		for _, c := range r.Forward.Clusters {
			shares = append(shares, share{c.Name, c.Weight})
		}
		return sharesWords(shares)
	case r.Redirect != nil:
		to := r.Redirect.Host
		if to == "" && (r.Redirect.Scheme != "" || r.Redirect.Port != 0) {
			to = "{host}" // of the request
		}
		if r.Redirect.Scheme != "" {
			to = r.Redirect.Scheme + "://" + to
		}
		if r.Redirect.Port != 0 {
			to += fmt.Sprintf(":%d", r.Redirect.Port)
		}
		return strings.TrimSpace(fmt.Sprintf("redirect %d %s", r.Redirect.Code, to+r.Redirect.Path+r.Redirect.Prefix))
	case r.Respond != nil:
		return fmt.Sprintf("answer %d", r.Respond.Status)
	}
	return "nowhere"
}

// routeWith describes what is done with a request on its way.
func routeWith(r *mesh.Route, h *mesh.VirtualHost) string {
	parts := filterWords(&r.Filters)
	if r.Forward != nil {
		parts = append(forwardWords(r.Forward, h), parts...)
	}
	return strings.Join(parts, ", ")
}

// filterWords describes what a route configures of filters.
func filterWords(f *mesh.RouteFilters) (parts []string) {
	if fault := f.Fault; fault != nil && !fault.Disabled {
		if fault.Delay != 0 {
			parts = append(parts, fmt.Sprintf("delayed by %s for %s", duration(fault.Delay), percentage(fault.DelayFraction)))
		}
		if fault.Abort != nil && fault.Abort.GRPC != nil {
			parts = append(parts, fmt.Sprintf("answered with gRPC status %d for %s", *fault.Abort.GRPC, percentage(fault.AbortFraction)))
		} else if fault.Abort != nil {
			parts = append(parts, fmt.Sprintf("answered %d for %s", fault.Abort.Status, percentage(fault.AbortFraction)))
		}
	}
	if f.CORS != nil && !f.CORS.Disabled {
		parts = append(parts, "CORS")
	}
	for _, p := range f.Policies {
		verb := "own "
		if p.Disabled {
			verb = "without "
		}
		parts = append(parts, verb+p.Filter)
	}
	return parts
}

func percentage(f mesh.Fraction) string {
	return strconv.FormatFloat(100*float64(f.Numerator)/float64(max(f.Denominator, 1)), 'g', 4, 64) + "%"
}

// forwardWords describes how a request is forwarded.
func forwardWords(f *mesh.Forward, h *mesh.VirtualHost) (parts []string) {
	if f.Timeout != 0 {
		parts = append(parts, "timeout "+duration(f.Timeout))
	}
	retry := f.Retry
	if retry == nil {
		retry = h.Retry
	}
	if retry != nil && retry.Retries > 0 {
		parts = append(parts, fmt.Sprintf("%d retries", retry.Retries))
	}
	for _, m := range f.Mirrors {
		parts = append(parts, "mirrored to "+m.Cluster)
	}
	if f.PrefixRewrite != "" {
		parts = append(parts, "prefix becomes "+f.PrefixRewrite)
	}
	if f.RegexRewrite != nil {
		parts = append(parts, "path rewritten")
	}
	if f.HostRewrite != "" {
		parts = append(parts, "host becomes "+f.HostRewrite)
	}
	if len(f.Hash) > 0 {
		parts = append(parts, "by hash")
	}
	return parts
}

// Name is what a host of the control plane's table of names resolves to.
type Name struct {
	Host      string   `json:"host"`
	Addresses []string `json:"addresses"`
	Registry  string   `json:"registry,omitempty"`
	ShortName string   `json:"shortName,omitempty"`
	Namespace string   `json:"namespace,omitempty"`
}

func (c *collection) names(name string) (list []Name) {
	for _, table := range decoded(c[xds.Names], mesh.DecodeNames) {
		if table == nil {
			continue
		}
		for _, host := range slices.Sorted(maps.Keys(table.Hosts)) {
			found := table.Hosts[host]
			if name != "" && name != host && name != found.ShortName {
				continue
			}
			shown := Name{Host: host, Addresses: []string{}, Registry: found.Registry, ShortName: found.ShortName, Namespace: found.Namespace}
			for _, a := range found.Addresses {
				shown.Addresses = append(shown.Addresses, a.String())
			}
			list = append(list, shown)
		}
	}
	return list
}
