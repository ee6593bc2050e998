package mesh

import (
	"time"

	"github.com/pillion-proxy/pillion/internal/wire"
)

// RouteFilters is what a route, or what contains it, changes of HTTP filters. For each filter the most specific one counts:
// the cluster's, else the route's, else the virtual host's, else the table's. The fields of CORS are looked up one by one.
type RouteFilters struct {
	Fault    *Fault
	CORS     *CORS
	Policies []RoutePolicy // at most one for each filter
}

// Policy returns the change of the policy of an HTTP filter, or nil. f may be nil.
func (f *RouteFilters) Policy(filter string) *RoutePolicy {
	for i := 0; f != nil && i < len(f.Policies); i++ {
		if f.Policies[i].Filter == filter {
			return &f.Policies[i]
		}
	}
	return nil
}

// RoutePolicy is what a route changes of a policy.
type RoutePolicy struct {
	Filter   string // name of the HTTP filter, which may be of any type if it is turned off
	Disabled bool   // the filter is turned off; the other fields are not set

	// One of these is set.
	RBAC        *RBAC          // instead of the filter's
	Requirement string         // name of the requirement in the filter's JWT that tokens have to meet, instead of its rules
	Check       *CheckSettings // of ext_authz
}

// CheckSettings are what a route changes of the questions to a server
// (envoy.extensions.filters.http.ext_authz.v3.CheckSettings).
type CheckSettings struct {
	Context []NamedValue // sent to the server, in the order of their names
	NoBody  bool         // the body is not sent
	Body    *AuthzBody   // instead of the filter's; may be nil
}

// Fault is faults that requests are given (envoy.extensions.filters.http.fault.v3.HTTPFault).
type Fault struct {
	Disabled bool // no faults; the other fields are not set

	Delay         time.Duration
	DelayFraction Fraction
	Abort         *Abort
	AbortFraction Fraction

	Rate         uint64 // of responses, in bytes for each second; 0: not limited
	RateFraction Fraction

	Cluster   string          // empty: requests to all clusters
	Headers   []HeaderMatcher // of requests that are given faults: all must match
	MaxActive *uint32         // faults at a time; nil: no limit
}

// Abort answers a request.
type Abort struct {
	Status int     // of HTTP, if GRPC is nil
	GRPC   *uint32 // status of gRPC
	Body   string  // empty: the default
}

// CORS is a policy of cross-origin requests (envoy.extensions.filters.http.cors.v3.CorsPolicy).
type CORS struct {
	Disabled bool // no policy; the other fields are not set

	Origins          []StringMatcher // of which one must match
	Methods          string
	Headers          string
	Expose           string
	MaxAge           string
	Credentials      *bool
	PrivateNetwork   *bool
	ForwardUnmatched *bool // preflight requests of other origins are forwarded; nil: they are
	Enabled          Fraction
}

// Keys and types of the filters that a route can configure.
const (
	faultKey = "envoy.filters.http.fault"
	corsKey  = "envoy.filters.http.cors"

	faultType        = typePrefix + "envoy.extensions.filters.http.fault.v3.HTTPFault"
	corsType         = typePrefix + "envoy.extensions.filters.http.cors.v3.CorsPolicy"
	filterConfigType = typePrefix + "envoy.config.route.v3.FilterConfig"
)

// harmlessFilters has the types of configurations of filters that decide nothing about security.
var harmlessFilters = map[string]bool{
	typePrefix + httpPrefix + "buffer.v3.BufferPerRoute":          true,
	typePrefix + httpPrefix + "compressor.v3.CompressorPerRoute":  true,
	typePrefix + httpPrefix + "ext_proc.v3.ExtProcPerRoute":       true,
	typePrefix + httpPrefix + "local_ratelimit.v3.LocalRateLimit": true,
	typePrefix + httpPrefix + "ratelimit.v3.RateLimitPerRoute":    true,
}

// routeFilter reads an entry of typed_per_filter_config. A configuration of a filter that may concern security, or that
// is not known, is a finding of security: without it a request might pass that must not.
func (d *decoder) routeFilter(m wire.Message, f *RouteFilters) {
	key, value := d.entry(m)
	url, config := d.any(value)
	m = m.Nested(config)
	optional, disabled := false, false
	if url == filterConfigType {
		url, m, optional, disabled = d.filterConfig(m)
	}
	switch {
	case key == faultKey && disabled:
		f.Fault = &Fault{Disabled: true}
	case key == corsKey && disabled:
		f.CORS = &CORS{Disabled: true}
	case disabled:
		d.routePolicy(f, RoutePolicy{Filter: key, Disabled: true})
	case key == faultKey && url == faultType:
		f.Fault = d.fault(m)
	case key == corsKey && url == corsType:
		f.CORS = d.cors(m)
	case url == typePrefix+routeRBACType:
		d.routePolicy(f, d.routeRBAC(m, key))
	case url == typePrefix+routeJWTType:
		d.routePolicy(f, d.routeJWT(m, key))
	case url == typePrefix+routeExtAuthzType:
		d.routePolicy(f, d.routeExtAuthz(m, key))
	case url == typePrefix+routeSessionType:
		d.fields(m, &routeSessionFields)
	case optional && url != "": // without a type it turns on a filter
	case harmlessFilters[url]:
		d.report(Traffic, "the configuration of the filter "+key+" is not supported")
	default:
		d.report(Security, "the configuration of the filter "+key+" of type "+shortType(url)+" is not supported")
	}
}

// routePolicy adds p. Of two of one filter protobuf keeps the last.
func (d *decoder) routePolicy(f *RouteFilters, p RoutePolicy) {
	for _, other := range f.Policies {
		if other.Filter == p.Filter {
			d.report(Security, "two configurations of the filter "+p.Filter)
		}
	}
	f.Policies = append(f.Policies, p)
}

var filterConfigFields = message{"envoy.config.route.v3.FilterConfig", Security, []field{1: {"config", once}, 2: {"is_optional", decoded}, 3: {"disabled", decoded}}}

func (d *decoder) filterConfig(m wire.Message) (url string, config wire.Message, optional, disabled bool) {
	config = m.Nested(nil)
	for d.next(&m, &filterConfigFields) {
		switch m.Number {
		case 1:
			var value []byte
			url, value = d.any(m.Message())
			config = m.Nested(value)
		case 2:
			optional = m.Bool()
		case 3:
			disabled = m.Bool()
		}
	}
	return url, config, optional, disabled
}

var faultFields = message{"envoy.extensions.filters.http.fault.v3.HTTPFault", Traffic, []field{
	1:  {"delay", once},
	2:  {"abort", once},
	3:  {"upstream_cluster", decoded},
	4:  {"headers", decoded},
	5:  {"downstream_nodes", security}, // other clients would be given the faults
	6:  {"max_active_faults", once},
	7:  {"response_rate_limit", once},
	8:  {"delay_percent_runtime", ignored}, // runtime keys are not supported
	9:  {"abort_percent_runtime", ignored},
	10: {"delay_duration_runtime", ignored},
	11: {"abort_http_status_runtime", ignored},
	12: {"max_active_faults_runtime", ignored},
	13: {"response_rate_limit_percent_runtime", ignored},
	14: {"abort_grpc_status_runtime", ignored},
	15: {"disable_downstream_cluster_stats", ignored},
	16: {"filter_metadata", cosmetic},
}}

var (
	faultDelayFields = message{"envoy.extensions.filters.common.fault.v3.FaultDelay", Traffic, []field{3: {"fixed_delay", once}, 4: {"percentage", once}, 5: {"header_delay", traffic}}}
	faultRateFields  = message{"envoy.extensions.filters.common.fault.v3.FaultRateLimit", Traffic, []field{1: {"fixed_limit", once}, 2: {"percentage", once}, 3: {"header_limit", traffic}}}
	fixedRateFields  = message{"envoy.extensions.filters.common.fault.v3.FaultRateLimit.FixedLimit", Traffic, []field{1: {"limit_kbps", decoded}}}
	faultAbortFields = message{"envoy.extensions.filters.http.fault.v3.FaultAbort", Traffic, []field{
		2: {"http_status", decoded},
		3: {"percentage", once},
		4: {"header_abort", traffic},
		5: {"grpc_status", decoded},
		6: {"response_body", decoded},
	}}
)

// fault returns faults. A fault without a percentage never occurs.
func (d *decoder) fault(m wire.Message) *Fault {
	f := &Fault{DelayFraction: never, AbortFraction: never, RateFraction: never}
	for d.next(&m, &faultFields) {
		switch m.Number {
		case 1:
			for m := m.Message(); d.next(&m, &faultDelayFields); {
				switch m.Number {
				case 3:
					f.Delay = d.duration(m.Message())
				case 4:
					f.DelayFraction = d.fraction(m.Message())
				}
			}
		case 2:
			d.abort(m.Message(), f)
		case 3:
			f.Cluster = m.String()
		case 4:
			f.Headers = append(f.Headers, d.headerMatcher(m.Message()))
		case 6:
			f.MaxActive = new(d.uint32Value(m.Message()))
		case 7:
			d.rateLimit(m.Message(), f)
		}
	}
	if f.Rate > 0 && f.MaxActive != nil {
		d.report(Traffic, "response_rate_limit with max_active_faults; rates are not limited")
		f.Rate = 0
	}
	return f
}

// rateLimit reads the rate of responses, in KiB for each second.
func (d *decoder) rateLimit(m wire.Message, f *Fault) {
	for d.next(&m, &faultRateFields) {
		switch m.Number {
		case 1:
			for m := m.Message(); d.next(&m, &fixedRateFields); {
				f.Rate = min(m.Uint64(), 1<<32) << 10
			}
		case 2:
			f.RateFraction = d.fraction(m.Message())
		}
	}
}

// abort reads the answer of a fault. Without a status requests are not aborted. In the oneof of the statuses the last field
// counts.
func (d *decoder) abort(m wire.Message, f *Fault) {
	var a Abort
	for d.next(&m, &faultAbortFields) {
		switch m.Number {
		case 2:
			a.Status, a.GRPC = int(uint32(m.Uint64())), nil
			if a.Status < 200 || a.Status > 599 {
				d.report(Traffic, "not the status of a response; requests are not aborted")
				a.Status = 0
			}
		case 3:
			f.AbortFraction = d.fraction(m.Message())
		case 5:
			a.Status, a.GRPC = 0, new(uint32(m.Uint64()))
		case 6:
			a.Body = m.String()
		}
	}
	if a.Status != 0 || a.GRPC != nil {
		f.Abort = &a
	}
}

var corsFields = message{"envoy.extensions.filters.http.cors.v3.CorsPolicy", Security, []field{
	1:  {"allow_origin_string_match", decoded},
	2:  {"allow_methods", decoded},
	3:  {"allow_headers", decoded},
	4:  {"expose_headers", decoded},
	5:  {"max_age", decoded},
	6:  {"allow_credentials", once},
	7:  {"filter_enabled", once},
	8:  {"shadow_enabled", cosmetic}, // counts only
	9:  {"allow_private_network_access", once},
	10: {"forward_not_matching_preflights", once},
}}

// cors returns a policy. Without a fraction it is enabled for all requests.
func (d *decoder) cors(m wire.Message) *CORS {
	c := &CORS{Enabled: always}
	for d.next(&m, &corsFields) {
		switch m.Number {
		case 1:
			c.Origins = append(c.Origins, d.stringMatcher(m.Message()))
		case 2:
			c.Methods = d.headerText(&m)
		case 3:
			c.Headers = d.headerText(&m)
		case 4:
			c.Expose = d.headerText(&m)
		case 5:
			c.MaxAge = d.headerText(&m)
		case 6:
			c.Credentials = new(d.boolValue(m.Message()))
		case 7:
			c.Enabled = d.runtimeFraction(m.Message())
		case 9:
			c.PrivateNetwork = new(d.boolValue(m.Message()))
		case 10:
			c.ForwardUnmatched = new(d.boolValue(m.Message()))
		}
	}
	return c
}
