package mesh

import (
	"math"
	"time"

	"github.com/pillion-proxy/pillion/internal/wire"
)

// Forward sends requests to a cluster (envoy.config.route.v3.RouteAction).
type Forward struct {
	Clusters     []WeightedCluster // one is chosen by weight; empty: the choice is not supported, and the route is refused
	NotFoundCode int               // status if the cluster is not known

	PrefixRewrite string // replaces the part of the path that matched; empty: not
	RegexRewrite  *RegexRewrite
	HostRewrite   string // empty: not
	ForwardedHost bool   // x-forwarded-host has the host before it was rewritten

	Timeout         time.Duration  // from the end of the request to that of the response; 0: no limit
	MaxGRPCTimeout  *time.Duration // bounds grpc-timeout, if that replaces Timeout; 0: no bound; nil: Timeout is not replaced
	IdleTimeout     *time.Duration // of the stream; 0: no limit; nil: the listener's
	MaxStreamLength *time.Duration // of the stream in time; 0: no limit; nil: the listener's
	MaxGRPCStream   *time.Duration // bounds grpc-timeout, if that replaces MaxStreamLength; 0: no bound; nil: MaxStreamLength is not replaced

	Retry   *RetryPolicy // nil: the virtual host's
	Mirrors []Mirror     // empty: the virtual host's
	Hash    []HashPolicy
}

// WeightedCluster is a cluster that a part of the requests is sent to. Its edits precede those of the route.
type WeightedCluster struct {
	Name        string
	Weight      uint32 // in proportion to the sum of all
	HostRewrite string // empty: the route's
	Edits       Edits
	Filters     RouteFilters
}

// RegexRewrite replaces all matches of a regular expression. The substitution has \1 for the first group, \0 for the match.
type RegexRewrite struct {
	Pattern, Substitution string
}

// Mirror copies a part of the requests to another cluster (RouteAction.RequestMirrorPolicy).
type Mirror struct {
	Cluster     string
	Fraction    Fraction
	KeepHost    bool   // the host is not extended by -shadow
	HostRewrite string // empty: not
}

// HashPolicy is a part of the hash that a host is chosen by (RouteAction.HashPolicy).
type HashPolicy struct {
	Kind       HashKind
	Name       string         // of the header field, cookie or parameter
	Rewrite    *RegexRewrite  // of the header field's value
	TTL        *time.Duration // a request without the cookie is given one of this age; 0: for a session; nil: it is not
	Path       string         // of the cookie that is given
	Attributes []CookieAttribute
	Terminal   bool // further policies are not used if this one yields a hash
}

// CookieAttribute is an attribute of a cookie.
type CookieAttribute struct{ Name, Value string }

// HashKind is what is hashed.
type HashKind uint8

// The kinds. A policy of HashNothing yields no hash.
const (
	HashNothing HashKind = iota
	HashHeader
	HashCookie
	HashSourceIP
	HashQuery
)

const defaultTimeout = 15 * time.Second

var forwardFields = message{"envoy.config.route.v3.RouteAction", Traffic, []field{
	1:  {"cluster", decoded},
	2:  {"cluster_header", decoded}, // to be refused
	3:  {"weighted_clusters", once},
	4:  {"metadata_match", traffic},
	5:  {"prefix_rewrite", decoded},
	6:  {"host_rewrite_literal", decoded},
	7:  {"auto_host_rewrite", traffic},
	8:  {"timeout", once},
	9:  {"retry_policy", once},
	11: {"priority", decoded},
	13: {"rate_limits", traffic},
	14: {"include_vh_rate_limits", ignored}, // rate limits themselves are reported
	15: {"hash_policy", decoded},
	17: {"cors", security},
	20: {"cluster_not_found_response_code", decoded},
	23: {"max_grpc_timeout", once},
	24: {"idle_timeout", once},
	25: {"upgrade_configs", traffic},
	26: {"internal_redirect_action", traffic},
	27: {"hedge_policy", traffic},
	28: {"grpc_timeout_offset", traffic},
	29: {"host_rewrite_header", traffic},
	30: {"request_mirror_policies", decoded},
	31: {"max_internal_redirects", ignored}, // internal redirects themselves are reported
	32: {"regex_rewrite", once},
	33: {"retry_policy_typed_config", traffic},
	34: {"internal_redirect_policy", traffic},
	35: {"host_rewrite_path_regex", traffic},
	36: {"max_stream_duration", once},
	37: {"cluster_specifier_plugin", decoded}, // to be refused
	38: {"append_x_forwarded_host", decoded},
	39: {"inline_cluster_specifier_plugin", once}, // to be refused
	40: {"early_data_policy", ignored},
	41: {"path_rewrite_policy", traffic},
	42: {"flush_timeout", ignored},
	44: {"host_rewrite", traffic},
	45: {"path_rewrite", traffic},
}}

// notFoundCodes has the values of the enumeration RouteAction.ClusterNotFoundResponseCode.
var notFoundCodes = [...]int{503, 404, 500}

// forward returns an action. In the oneof of the clusters the last field counts.
func (d *decoder) forward(m wire.Message) *Forward {
	f := &Forward{Timeout: defaultTimeout, NotFoundCode: notFoundCodes[0]}
	chosen := false
	for d.next(&m, &forwardFields) {
		switch m.Number {
		case 1, 2, 3, 37, 39:
			chosen = true
		}
		switch m.Number {
		case 1:
			f.Clusters = []WeightedCluster{{Name: m.String(), Weight: 1}}
		case 2, 37, 39:
			m.Bytes()
			f.Clusters = nil
			d.report(Traffic, "not supported; the route is refused")
		case 3:
			f.Clusters = d.weightedClusters(m.Message())
		case 5:
			f.PrefixRewrite = d.headerText(&m)
		case 6:
			f.HostRewrite = d.headerText(&m)
		case 8:
			f.Timeout = d.duration(m.Message())
		case 9:
			f.Retry = d.sharedRetry(&m)
		case 11:
			if m.Uint64() != 0 {
				d.report(Traffic, "routing priorities are not supported")
			}
		case 15:
			add(d, &f.Hash, &m, d.hashPolicy(m.Message()))
		case 20:
			f.NotFoundCode = notFoundCodes[d.enum(&m, uint64(len(notFoundCodes)-1))]
		case 23:
			f.MaxGRPCTimeout = new(d.duration(m.Message()))
		case 24:
			f.IdleTimeout = new(d.duration(m.Message()))
		case 30:
			add(d, &f.Mirrors, &m, d.mirror(m.Message()))
		case 32:
			f.RegexRewrite = d.rewrite(m.Message())
		case 36:
			for m := m.Message(); d.next(&m, &streamDurationFields); {
				switch m.Number {
				case 1:
					f.MaxStreamLength = new(d.duration(m.Message()))
				case 2:
					f.MaxGRPCStream = new(d.duration(m.Message()))
				}
			}
		case 38:
			f.ForwardedHost = m.Bool()
		}
	}
	if !chosen {
		d.report(Traffic, "no cluster; the route is refused")
	}
	return f
}

var streamDurationFields = message{"envoy.config.route.v3.RouteAction.MaxStreamDuration", Traffic, []field{
	1: {"max_stream_duration", once},
	2: {"grpc_timeout_header_max", once},
	3: {"grpc_timeout_header_offset", traffic},
}}

var weightedClustersFields = message{"envoy.config.route.v3.WeightedCluster", Traffic, []field{
	1: {"clusters", decoded},
	2: {"runtime_key_prefix", ignored},
	3: {"total_weight", ignored}, // weights are in proportion to their sum
	4: {"header_name", traffic},
	5: {"use_hash_policy", traffic},
}}

// weightedClusters returns clusters. It returns nil if Envoy would not accept the sum of their weights.
func (d *decoder) weightedClusters(m wire.Message) (clusters []WeightedCluster) {
	var sum uint64
	for d.next(&m, &weightedClustersFields) {
		cluster := d.weightedCluster(m.Message())
		add(d, &clusters, &m, cluster)
		sum += uint64(cluster.Weight)
	}
	if sum == 0 || sum > math.MaxUint32 {
		d.report(Traffic, "the sum of the weights is 0 or too large; the route is refused")
		return nil
	}
	return clusters
}

var clusterWeightFields = message{"envoy.config.route.v3.WeightedCluster.ClusterWeight", Traffic, []field{
	1:  {"name", decoded},
	2:  {"weight", once},
	3:  {"metadata_match", traffic},
	4:  {"request_headers_to_add", decoded},
	5:  {"response_headers_to_add", decoded},
	6:  {"response_headers_to_remove", decoded},
	9:  {"request_headers_to_remove", decoded},
	10: {"typed_per_filter_config", decoded},
	11: {"host_rewrite_literal", decoded},
	12: {"cluster_header", security}, // the cluster without a name would get the requests
}}

func (d *decoder) weightedCluster(m wire.Message) (c WeightedCluster) {
	for d.next(&m, &clusterWeightFields) {
		switch m.Number {
		case 1:
			c.Name = m.String()
		case 2:
			c.Weight = d.uint32Value(m.Message())
		case 4:
			d.addHeader(m.Message(), &c.Edits.Request)
		case 5:
			d.addHeader(m.Message(), &c.Edits.Response)
		case 6:
			d.removeHeader(&m, &c.Edits.Response)
		case 9:
			d.removeHeader(&m, &c.Edits.Request)
		case 10:
			d.routeFilter(m.Message(), &c.Filters)
		case 11:
			c.HostRewrite = d.headerText(&m)
		}
	}
	return c
}

var rewriteFields = message{"envoy.type.matcher.v3.RegexMatchAndSubstitute", Traffic, []field{1: {"pattern", once}, 2: {"substitution", decoded}}}

func (d *decoder) rewrite(m wire.Message) *RegexRewrite {
	r := &RegexRewrite{}
	for d.next(&m, &rewriteFields) {
		switch m.Number {
		case 1:
			r.Pattern = d.regex(m.Message())
		case 2:
			r.Substitution = m.String()
		}
	}
	return r
}

var mirrorFields = message{"envoy.config.route.v3.RouteAction.RequestMirrorPolicy", Traffic, []field{
	1: {"cluster", decoded},
	3: {"runtime_fraction", once},
	4: {"trace_sampled", ignored}, // copies have no spans of their own
	5: {"cluster_header", traffic},
	6: {"disable_shadow_host_suffix_append", decoded},
	7: {"request_headers_mutations", traffic},
	8: {"host_rewrite_literal", decoded},
}}

// mirror returns a mirror. Without a fraction all requests are copied.
func (d *decoder) mirror(m wire.Message) Mirror {
	mirror := Mirror{Fraction: always}
	for d.next(&m, &mirrorFields) {
		switch m.Number {
		case 1:
			mirror.Cluster = m.String()
		case 3:
			mirror.Fraction = d.runtimeFraction(m.Message())
		case 6:
			mirror.KeepHost = m.Bool()
		case 8:
			mirror.HostRewrite = d.headerText(&m)
		}
	}
	return mirror
}

var hashPolicyFields = message{"envoy.config.route.v3.RouteAction.HashPolicy", Traffic, []field{
	1: {"header", once},
	2: {"cookie", once},
	3: {"connection_properties", once},
	4: {"terminal", decoded},
	5: {"query_parameter", once},
	6: {"filter_state", once}, // to be reported
}}

var (
	hashHeaderFields     = message{"envoy.config.route.v3.RouteAction.HashPolicy.Header", Traffic, []field{1: {"header_name", decoded}, 2: {"regex_rewrite", once}}}
	hashCookieFields     = message{"envoy.config.route.v3.RouteAction.HashPolicy.Cookie", Traffic, []field{1: {"name", decoded}, 2: {"ttl", once}, 3: {"path", decoded}, 4: {"attributes", decoded}}}
	hashAttributeFields  = message{"envoy.config.route.v3.RouteAction.HashPolicy.CookieAttribute", Traffic, []field{1: {"name", decoded}, 2: {"value", decoded}}}
	hashConnectionFields = message{"envoy.config.route.v3.RouteAction.HashPolicy.ConnectionProperties", Traffic, []field{1: {"source_ip", decoded}}}
	hashQueryFields      = message{"envoy.config.route.v3.RouteAction.HashPolicy.QueryParameter", Traffic, []field{1: {"name", decoded}}}
)

// hashPolicy returns a policy. In the oneof of what is hashed the last field counts.
func (d *decoder) hashPolicy(m wire.Message) HashPolicy {
	var h HashPolicy
	terminal := false
	for d.next(&m, &hashPolicyFields) {
		switch m.Number {
		case 1:
			h = HashPolicy{Kind: HashHeader}
			for m := m.Message(); d.next(&m, &hashHeaderFields); {
				switch m.Number {
				case 1:
					h.Name = m.String()
				case 2:
					h.Rewrite = d.rewrite(m.Message())
				}
			}
		case 2:
			h = d.hashCookie(m.Message())
		case 3:
			h = HashPolicy{}
			for m := m.Message(); d.next(&m, &hashConnectionFields); {
				h.Kind = HashNothing
				if m.Bool() {
					h.Kind = HashSourceIP
				}
			}
		case 4:
			terminal = m.Bool()
		case 5:
			h = HashPolicy{Kind: HashQuery}
			for m := m.Message(); d.next(&m, &hashQueryFields); {
				h.Name = m.String()
			}
		case 6:
			m.Bytes()
			h = HashPolicy{}
			d.report(Traffic, unsupported)
		}
	}
	h.Terminal = terminal
	return h
}

func (d *decoder) hashCookie(m wire.Message) HashPolicy {
	h := HashPolicy{Kind: HashCookie}
	for d.next(&m, &hashCookieFields) {
		switch m.Number {
		case 1:
			h.Name = m.String()
		case 2:
			h.TTL = new(d.duration(m.Message()))
		case 3:
			h.Path = m.String()
		case 4:
			var a CookieAttribute
			for m := m.Message(); d.next(&m, &hashAttributeFields); {
				switch m.Number {
				case 1:
					a.Name = m.String()
				case 2:
					a.Value = m.String()
				}
			}
			h.Attributes = append(h.Attributes, a)
		}
	}
	return h
}

// Redirect answers requests with a redirect (envoy.config.route.v3.RedirectAction). Empty parts are those of the
// request.
type Redirect struct {
	Scheme, Host string
	Port         uint32
	Path         string // replaces the path, and the query if it has one
	Prefix       string // replaces the part of the path that matched
	Regex        *RegexRewrite
	Code         int // status
	StripQuery   bool
}

var redirectFields = message{"envoy.config.route.v3.RedirectAction", Traffic, []field{
	1:  {"host_redirect", decoded},
	2:  {"path_redirect", decoded},
	3:  {"response_code", decoded},
	4:  {"https_redirect", decoded},
	5:  {"prefix_rewrite", decoded},
	6:  {"strip_query", decoded},
	7:  {"scheme_redirect", decoded},
	8:  {"port_redirect", decoded},
	9:  {"regex_rewrite", once},
	10: {"path_rewrite", security}, // the redirect would lead elsewhere
}}

// redirectCodes has the values of the enumeration RedirectAction.RedirectResponseCode.
var redirectCodes = [...]int{301, 302, 303, 307, 308}

// redirect returns a redirect. In the oneofs of schemes and of paths the last field counts.
func (d *decoder) redirect(m wire.Message) *Redirect {
	r := &Redirect{Code: redirectCodes[0]}
	for d.next(&m, &redirectFields) {
		switch m.Number {
		case 2, 5, 9:
			r.Path, r.Prefix, r.Regex = "", "", nil
		}
		switch m.Number {
		case 1:
			r.Host = d.headerText(&m)
		case 2:
			r.Path = d.headerText(&m)
		case 3:
			r.Code = redirectCodes[d.enum(&m, uint64(len(redirectCodes)-1))]
		case 4:
			r.Scheme = ""
			if m.Bool() {
				r.Scheme = "https"
			}
		case 5:
			r.Prefix = d.headerText(&m)
		case 6:
			r.StripQuery = m.Bool()
		case 7:
			r.Scheme = d.headerText(&m)
		case 8:
			r.Port = uint32(m.Uint64())
		case 9:
			r.Regex = d.rewrite(m.Message())
		}
	}
	if r.Port > 65535 {
		d.report(Traffic, "not a port; the port stays")
		r.Port = 0
	}
	return r
}

// Response answers requests (envoy.config.route.v3.DirectResponseAction).
type Response struct {
	Status int
	Body   []byte
}

var responseFields = message{"envoy.config.route.v3.DirectResponseAction", Traffic, []field{1: {"status", decoded}, 2: {"body", once}, 3: {"body_format", traffic}}}

func (d *decoder) response(m wire.Message) *Response {
	r := &Response{}
	for d.next(&m, &responseFields) {
		switch m.Number {
		case 1:
			r.Status = int(uint32(m.Uint64()))
		case 2:
			r.Body = d.inline(m.Message())
		}
	}
	if r.Status < 200 || r.Status > 599 {
		d.report(Security, "not the status of a response")
	}
	return r
}
