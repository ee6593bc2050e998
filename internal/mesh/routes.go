package mesh

import (
	"strings"
	"sync/atomic"

	"github.com/pillion-proxy/pillion/internal/wire"
)

// Routes is a table of routes (envoy.config.route.v3.RouteConfiguration). A table without hosts is valid: every request
// is answered with 404.
type Routes struct {
	Name    string
	Hosts   []VirtualHost
	Refused bool // a part that concerns all hosts is not understood, so requests are refused

	IgnorePort           bool // of a request's host when a virtual host is chosen
	IgnorePathParameters bool // from a semicolon to the end of a path's segment, when a route is chosen
	SpecificEditsLast    bool // edits are made from the table's to the route's, so the latter win; otherwise the reverse

	Edits   Edits
	Filters RouteFilters
	Mirrors []Mirror

	Compiled atomic.Value `json:"-"` // of package route, which sets it when the routes are first used
}

// VirtualHost has the routes of some domains (envoy.config.route.v3.VirtualHost).
type VirtualHost struct {
	Name    string
	Domains []Domain
	Routes  []Route // the first that matches is used
	Refused bool    // a part that concerns all routes is not understood, so requests are refused

	RequireTLS       RequireTLS
	CountAttempts    bool // in x-envoy-attempt-count of requests
	CountInResponses bool // in x-envoy-attempt-count of responses

	Retry   *RetryPolicy // of routes without one; nil: no retries
	Edits   Edits
	Filters RouteFilters
	Mirrors []Mirror // of routes without mirrors; empty: the table's
}

// Domain matches a request's host. Exact domains come before suffixes, and these before prefixes. Of a kind the longest that
// matches is used.
type Domain struct {
	Kind DomainKind
	Text string // in lower case, without the star; the star stands for at least one byte
}

// DomainKind is how a Domain matches.
type DomainKind uint8

// The kinds.
const (
	DomainExact  DomainKind = iota
	DomainSuffix            // *.example.com
	DomainPrefix            // example.*
	DomainAny               // *
)

// RequireTLS is which requests are redirected to HTTPS.
type RequireTLS uint8

// The requirements, with Envoy's numbers.
const (
	TLSNotRequired RequireTLS = iota
	TLSRequiredExternally
	TLSRequired
)

// Route is what becomes of the requests that it matches (envoy.config.route.v3.Route). One of Forward, Redirect and
// Respond is set, unless it is refused.
type Route struct {
	Name      string
	Match     RouteMatch
	Forward   *Forward
	Redirect  *Redirect
	Respond   *Response
	Refused   bool // it is not understood, so requests that may match it are refused
	Operation string
	Edits     Edits
	Filters   RouteFilters
	Origin    string // resource of the configuration that the route stems from
}

var routesFields = message{"envoy.config.route.v3.RouteConfiguration", Traffic, []field{
	1:  {"name", decoded},
	2:  {"virtual_hosts", decoded},
	3:  {"internal_only_headers", security}, // would reach the workload
	4:  {"response_headers_to_add", decoded},
	5:  {"response_headers_to_remove", decoded},
	6:  {"request_headers_to_add", decoded},
	7:  {"validate_clusters", ignored}, // an unknown cluster is an answer with 503
	8:  {"request_headers_to_remove", decoded},
	9:  {"vhds", traffic},
	10: {"most_specific_header_mutations_wins", decoded},
	11: {"max_direct_response_body_size_bytes", ignored}, // resources are bounded
	12: {"cluster_specifier_plugins", traffic},
	13: {"request_mirror_policies", decoded},
	14: {"ignore_port_in_host_matching", decoded},
	15: {"ignore_path_parameters_in_path_matching", decoded},
	16: {"typed_per_filter_config", decoded},
	17: {"metadata", ignored},
	18: {"vhost_header", security}, // another host would be chosen
	19: {"route_specifiers", security},
}}

func (d *decoder) routes(m wire.Message) *Routes {
	r := &Routes{}
	refused := d.refusals
	var hosts int // findings of security that concern one host
	for d.next(&m, &routesFields) {
		switch m.Number {
		case 1:
			r.Name = m.String()
		case 2:
			before := d.refusals
			add(d, &r.Hosts, &m, d.virtualHost(m.Message()))
			hosts += d.refusals - before
		case 4:
			d.addHeader(m.Message(), &r.Edits.Response)
		case 5:
			d.removeHeader(&m, &r.Edits.Response)
		case 6:
			d.addHeader(m.Message(), &r.Edits.Request)
		case 8:
			d.removeHeader(&m, &r.Edits.Request)
		case 10:
			r.SpecificEditsLast = m.Bool()
		case 13:
			add(d, &r.Mirrors, &m, d.mirror(m.Message()))
		case 14:
			r.IgnorePort = m.Bool()
		case 15:
			r.IgnorePathParameters = m.Bool()
		case 16:
			d.routeFilter(m.Message(), &r.Filters)
		}
	}
	r.Refused = d.refusals-hosts > refused
	d.ambiguous(r)
	return r
}

// ambiguous refuses the hosts that have a domain in common. Envoy rejects their table.
func (d *decoder) ambiguous(r *Routes) {
	owners := map[Domain]int{}
	for i := range r.Hosts {
		for _, domain := range r.Hosts[i].Domains {
			owner, taken := owners[domain]
			if !taken {
				owners[domain] = i
				continue
			}
			r.Hosts[owner].Refused, r.Hosts[i].Refused = true, true
			d.report(Security, "the virtual hosts "+r.Hosts[owner].Name+" and "+r.Hosts[i].Name+" have the same domain "+domain.String())
		}
	}
}

func (domain Domain) String() string {
	switch domain.Kind {
	case DomainSuffix, DomainAny:
		return "*" + domain.Text
	case DomainPrefix:
		return domain.Text + "*"
	}
	return domain.Text
}

var virtualHostFields = message{"envoy.config.route.v3.VirtualHost", Traffic, []field{
	1:  {"name", decoded},
	2:  {"domains", decoded},
	3:  {"routes", decoded},
	4:  {"require_tls", decoded},
	5:  {"virtual_clusters", cosmetic},
	6:  {"rate_limits", traffic},
	7:  {"request_headers_to_add", decoded},
	8:  {"cors", security},
	10: {"response_headers_to_add", decoded},
	11: {"response_headers_to_remove", decoded},
	13: {"request_headers_to_remove", decoded},
	14: {"include_request_attempt_count", decoded},
	15: {"typed_per_filter_config", decoded},
	16: {"retry_policy", once},
	17: {"hedge_policy", traffic},
	18: {"per_request_buffer_limit_bytes", ignored}, // buffers have limits of their own
	19: {"include_attempt_count_in_response", decoded},
	20: {"retry_policy_typed_config", traffic},
	21: {"matcher", security}, // it takes the place of the routes
	22: {"request_mirror_policies", decoded},
	23: {"include_is_timeout_retry_header", traffic},
	24: {"metadata", ignored},
	25: {"request_body_buffer_limit", ignored},
	26: {"route_specifiers", security},
}}

// virtualHost returns a virtual host. Findings of security outside of its routes refuse it.
func (d *decoder) virtualHost(m wire.Message) VirtualHost {
	var h VirtualHost
	refused := d.refusals
	var routes int // findings of security that concern one route
	for d.next(&m, &virtualHostFields) {
		switch m.Number {
		case 1:
			h.Name = m.String()
		case 2:
			add(d, &h.Domains, &m, DomainOf(m.String()))
		case 3:
			before := d.refusals
			add(d, &h.Routes, &m, d.route(m.Message()))
			routes += d.refusals - before
		case 4:
			h.RequireTLS = RequireTLS(d.enum(&m, uint64(TLSRequired)))
		case 7:
			d.addHeader(m.Message(), &h.Edits.Request)
		case 10:
			d.addHeader(m.Message(), &h.Edits.Response)
		case 11:
			d.removeHeader(&m, &h.Edits.Response)
		case 13:
			d.removeHeader(&m, &h.Edits.Request)
		case 14:
			h.CountAttempts = m.Bool()
		case 15:
			d.routeFilter(m.Message(), &h.Filters)
		case 16:
			h.Retry = d.sharedRetry(&m)
		case 19:
			h.CountInResponses = m.Bool()
		case 22:
			add(d, &h.Mirrors, &m, d.mirror(m.Message()))
		}
	}
	h.Refused = d.refusals-routes > refused
	if len(h.Domains) == 0 {
		d.report(Traffic, "a virtual host without domains")
	}
	return h
}

// DomainOf compiles one of a virtual host's domains. Only a star at an end is a wildcard.
func DomainOf(text string) Domain {
	text = strings.ToLower(text)
	if rest, ok := strings.CutPrefix(text, "*"); ok {
		if rest == "" {
			return Domain{Kind: DomainAny}
		}
		return Domain{DomainSuffix, rest}
	}
	if rest, ok := strings.CutSuffix(text, "*"); ok {
		return Domain{DomainPrefix, rest}
	}
	return Domain{DomainExact, text}
}

var routeFields = message{"envoy.config.route.v3.Route", Traffic, []field{
	1:  {"match", once},
	2:  {"route", once},
	3:  {"redirect", once},
	4:  {"metadata", once},
	5:  {"decorator", once},
	7:  {"direct_response", once},
	9:  {"request_headers_to_add", decoded},
	10: {"response_headers_to_add", decoded},
	11: {"response_headers_to_remove", decoded},
	12: {"request_headers_to_remove", decoded},
	13: {"typed_per_filter_config", decoded},
	14: {"name", decoded},
	15: {"tracing", cosmetic},
	16: {"per_request_buffer_limit_bytes", ignored}, // buffers have limits of their own
	17: {"filter_action", once},                     // to be refused
	18: {"non_forwarding_action", once},             // to be refused
	19: {"stat_prefix", cosmetic},
	20: {"request_body_buffer_limit", ignored},
	21: {"route_specifiers", security},
}}

// route returns a route. It is refused if it has findings of security or no action that is supported. In the oneof of its
// actions the last field counts.
func (d *decoder) route(m wire.Message) Route {
	var r Route
	refused, matched, first := d.refusals, false, len(d.findings)
	for d.next(&m, &routeFields) {
		switch m.Number {
		case 2, 3, 7, 17, 18:
			r.Forward, r.Redirect, r.Respond = nil, nil, nil
		}
		switch m.Number {
		case 1:
			r.Match, matched = d.routeMatch(m.Message()), true
		case 2:
			r.Forward = d.forward(m.Message())
		case 3:
			r.Redirect = d.redirect(m.Message())
		case 4:
			r.Origin = d.origin(m.Message())
		case 5:
			r.Operation = d.decorator(m.Message())
		case 7:
			r.Respond = d.response(m.Message())
		case 9:
			d.addHeader(m.Message(), &r.Edits.Request)
		case 10:
			d.addHeader(m.Message(), &r.Edits.Response)
		case 11:
			d.removeHeader(&m, &r.Edits.Response)
		case 12:
			d.removeHeader(&m, &r.Edits.Request)
		case 13:
			d.routeFilter(m.Message(), &r.Filters)
		case 14:
			r.Name = m.String()
		case 17, 18:
			m.Message()
			d.report(Traffic, unsupported)
		}
	}
	if !matched {
		d.report(Security, "a route without a match")
	}
	if r.Forward == nil && r.Redirect == nil && r.Respond == nil {
		d.report(Traffic, "a route without an action; its requests are refused")
		r.Refused = true
	}
	r.Refused = r.Refused || d.refusals > refused || r.Forward != nil && len(r.Forward.Clusters) == 0
	d.attribute(first, r.Origin)
	return r
}

// origin returns the resource of the configuration that istiod adds to metadata.
func (d *decoder) origin(m wire.Message) (origin string) {
	for d.next(&m, &metadataFields) {
		if key, value := d.entry(m.Message()); key == istioMetadata {
			d.strings(value, func(name, text string) {
				if name == "config" {
					origin = text
				}
			})
		}
	}
	return origin
}

var decoratorFields = message{"envoy.config.route.v3.Decorator", Cosmetic, []field{1: {"operation", decoded}, 2: {"propagate", cosmetic}}}

func (d *decoder) decorator(m wire.Message) (operation string) {
	for d.next(&m, &decoratorFields) {
		operation = m.String()
	}
	return operation
}
