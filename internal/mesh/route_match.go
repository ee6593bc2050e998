package mesh

import "github.com/pillion-proxy/pillion/internal/wire"

// RouteMatch is the requests that a route is for (envoy.config.route.v3.RouteMatch). All conditions have to be met.
type RouteMatch struct {
	Kind       PathMatchKind
	Path       string // without query and fragment; a pattern of PathRegex
	IgnoreCase bool   // of Path, except for PathRegex
	Headers    []HeaderMatcher
	Query      []QueryMatcher
	Metadata   []MetadataMatcher
	Refused    bool // a condition is not understood; so is the route
}

// PathMatchKind is how a RouteMatch matches a path.
type PathMatchKind uint8

// The kinds.
const (
	PathPrefix          PathMatchKind = iota
	PathExact                         // the path is equal
	PathRegex                         // the whole path matches
	PathSeparatedPrefix               // the path is equal, or goes on with a slash
)

// QueryMatcher matches a parameter of a request's query (envoy.config.route.v3.QueryParameterMatcher).
type QueryMatcher struct {
	Name    string
	Text    *StringMatcher // nil: the presence of the parameter decides
	Present bool           // what is required if Text is nil
}

// A condition that is not decoded would have the route match more requests than it was meant for, so it is a finding of
// security.
var routeMatchFields = message{"envoy.config.route.v3.RouteMatch", Security, []field{
	1:  {"prefix", decoded},
	2:  {"path", decoded},
	4:  {"case_sensitive", once},
	6:  {"headers", decoded},
	7:  {"query_parameters", decoded},
	8:  {"grpc", security},
	9:  {"runtime_fraction", security},
	10: {"safe_regex", once},
	11: {"tls_context", security},
	12: {"connect_matcher", security},
	13: {"dynamic_metadata", decoded},
	14: {"path_separated_prefix", decoded},
	15: {"path_match_policy", security},
	16: {"filter_state", security},
	17: {"cookies", security},
}}

// routeMatch returns a match. In the oneof of paths the last field counts.
func (d *decoder) routeMatch(m wire.Message) RouteMatch {
	var r RouteMatch
	pathed, refused := false, d.refusals
	for d.next(&m, &routeMatchFields) {
		switch m.Number {
		case 1:
			r.Kind, r.Path, pathed = PathPrefix, m.String(), true
		case 2:
			r.Kind, r.Path, pathed = PathExact, m.String(), true
		case 4: // absent means true
			r.IgnoreCase = !d.boolValue(m.Message())
		case 6:
			r.Headers = append(r.Headers, d.headerMatcher(m.Message()))
		case 7:
			r.Query = append(r.Query, d.queryMatcher(m.Message()))
		case 10:
			r.Kind, r.Path, pathed = PathRegex, d.regex(m.Message()), true
		case 13:
			r.Metadata = append(r.Metadata, d.metadataMatcher(m.Message()))
		case 14:
			r.Kind, r.Path, pathed = PathSeparatedPrefix, m.String(), true
		}
	}
	if !pathed {
		d.report(Security, "a match without a path")
	}
	r.Refused = d.refusals > refused
	return r
}

var queryMatcherFields = message{"envoy.config.route.v3.QueryParameterMatcher", Security, []field{1: {"name", decoded}, 5: {"string_match", once}, 6: {"present_match", decoded}}}

// queryMatcher returns a matcher of a parameter. Without a pattern the parameter has to be present.
func (d *decoder) queryMatcher(m wire.Message) QueryMatcher {
	q := QueryMatcher{Present: true}
	for d.next(&m, &queryMatcherFields) {
		switch m.Number {
		case 1:
			q.Name = m.String()
		case 5:
			text := d.stringMatcher(m.Message())
			q.Text, q.Present = &text, false
		case 6:
			q.Text, q.Present = nil, m.Bool()
		}
	}
	if q.Name == "" {
		d.report(Security, "a matcher of a query parameter without a name")
	}
	return q
}
