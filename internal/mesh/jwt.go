package mesh

import (
	"sort"
	"sync/atomic"
	"time"

	"github.com/pillion-proxy/pillion/internal/wire"
)

// JWT verifies the JSON Web Tokens of requests (envoy.extensions.filters.http.jwt_authn.v3.JwtAuthentication). Values are
// shared between the filter chains of a listener.
type JWT struct {
	Providers []JWTProvider // in the order of their names
	Rules     []JWTRule     // the first whose match a request meets is used; without one, no token is required

	// Named has requirements that rules and routes refer to, in the order of their names.
	Named []NamedRequirement

	AllowPreflight bool // requests of CORS with the method OPTIONS need no token
	TerseFailures  bool // answers do not name the reason
	Refused        bool // a part is not understood, so all requests are refused

	Compiled atomic.Value `json:"-"` // of package jwt, which sets it when the filter is first used
}

// Restricts reports whether j can refuse a request. Without rules, routes may require one of the named requirements.
func (j *JWT) Restricts() bool { return j.Refused || len(j.Rules) > 0 || len(j.Named) > 0 }

// JWTProvider is an issuer of tokens (envoy.extensions.filters.http.jwt_authn.v3.JwtProvider).
type JWTProvider struct {
	Name      string
	Issuer    string   // empty: any
	Audiences []string // of which the token must have one; empty: any

	// One of these is set.
	Keys   []byte // a JSON Web Key Set. One that cannot be parsed verifies no token.
	Remote *RemoteKeys

	// Where tokens are. If all are empty: the bearer token in the header Authorization, and the parameter access_token.
	Headers []TokenHeader
	Params  []string
	Cookies []string

	Forward       bool   // the token stays in its header
	PayloadHeader string // that the payload is sent in, encoded as base64url; empty: it is not
	PadPayload    bool
	ClaimHeaders  []ClaimHeader

	Metadata    string   // key of the payload in the filter's metadata; empty: it is not there
	SpaceClaims []string // claims in the metadata whose texts are split at spaces

	ClockSkew time.Duration
	Reroute   bool // the route is chosen again afterwards
}

// RemoteKeys is where a JSON Web Key Set is fetched from.
type RemoteKeys struct {
	Service  HTTPService
	CacheFor time.Duration
	Early    bool          // fetched by the first request, instead of by the first token
	Pause    time.Duration // after a fetch that failed

	Retries             uint32 // of a fetch, within the timeout of Service
	BackOff, MaxBackOff time.Duration
}

// HTTPService is a server that is asked by HTTP (envoy.config.core.v3.HttpUri).
type HTTPService struct {
	URI     string
	Cluster string
	Timeout time.Duration
}

// TokenHeader is a header field with a token.
type TokenHeader struct {
	Name   string
	Prefix string // of the value, before the token
}

// ClaimHeader is a header field that a claim is sent in. Values of the client's are removed.
type ClaimHeader struct{ Header, Claim string }

// JWTRule is what the requests that it matches require.
type JWTRule struct {
	Match    RouteMatch
	Requires JWTRequirement
}

// NamedRequirement is a requirement with a name.
type NamedRequirement struct {
	Name string
	JWTRequirement
}

// JWTRequirement is a tree of requirements (envoy.extensions.filters.http.jwt_authn.v3.JwtRequirement).
type JWTRequirement struct {
	Kind      JWTRequirementKind
	Name      string   // of JWTProvided: the provider; of JWTNamed: the requirement
	Audiences []string // of JWTProvided: instead of the provider's; empty: the provider's
	Of        []JWTRequirement
}

// JWTRequirementKind is what a JWTRequirement requires.
type JWTRequirementKind uint8

// The kinds. A JWTUnknown is not understood, and reported. It is not met.
const (
	JWTUnknown              JWTRequirementKind = iota
	JWTNotRequired                             // no token
	JWTProvided                                // a valid token of a provider
	JWTNamed                                   // one of the named requirements
	JWTAny                                     // a part is met
	JWTAll                                     // all parts are met
	JWTAllowMissing                            // no token at all, or valid tokens
	JWTAllowMissingOrFailed                    // always met
)

// Envoy's defaults of fields that are absent.
const (
	defaultClockSkew = time.Minute
	defaultKeysCache = 10 * time.Minute
	defaultKeysPause = time.Second
	keysBackOff      = time.Second
)

var (
	jwtFields = message{jwtType, Security, []field{
		1: {"providers", decoded},
		2: {"rules", decoded},
		3: {"filter_state_rules", security},
		4: {"bypass_cors_preflight", decoded},
		5: {"requirement_map", decoded},
		6: {"strip_failure_response", decoded},
		7: {"stat_prefix", ignored},
	}}

	providerEntryFields    = message{jwtType + ".ProvidersEntry", Security, []field{1: {"key", decoded}, 2: {"value", once}}}
	requirementEntryFields = message{jwtType + ".RequirementMapEntry", Security, []field{1: {"key", decoded}, 2: {"value", once}}}
)

// jwt returns the verification of tokens. Any finding in it refuses all requests.
func (d *decoder) jwt(m wire.Message) *JWT {
	j := &JWT{}
	before := d.refusals
	for d.next(&m, &jwtFields) {
		switch m.Number {
		case 1:
			j.Providers = append(j.Providers, d.jwtProviderEntry(m.Message()))
		case 2:
			j.Rules = append(j.Rules, d.jwtRule(m.Message()))
		case 4:
			j.AllowPreflight = m.Bool()
		case 5:
			j.Named = append(j.Named, d.namedRequirement(m.Message()))
		case 6:
			j.TerseFailures = m.Bool()
		}
	}
	sort.SliceStable(j.Providers, func(a, b int) bool { return j.Providers[a].Name < j.Providers[b].Name })
	sort.SliceStable(j.Named, func(a, b int) bool { return j.Named[a].Name < j.Named[b].Name })
	d.jwtNames(j)
	j.Refused = d.refusals > before
	return j
}

// jwtNames reports names that occur twice, of which protobuf keeps the last, and references to other names.
func (d *decoder) jwtNames(j *JWT) {
	providers, named := map[string]bool{}, map[string]bool{}
	for _, p := range j.Providers {
		if providers[p.Name] {
			d.report(Security, "two providers with the name "+p.Name)
		}
		providers[p.Name] = true
	}
	for _, r := range j.Named {
		if named[r.Name] {
			d.report(Security, "two requirements with the name "+r.Name)
		}
		named[r.Name] = true
	}
	var visit func(r *JWTRequirement)
	visit = func(r *JWTRequirement) {
		if r.Kind == JWTProvided && !providers[r.Name] || r.Kind == JWTNamed && !named[r.Name] {
			d.report(Security, "there is no "+r.Name+" to refer to")
		}
		for i := range r.Of {
			visit(&r.Of[i])
		}
	}
	for i := range j.Rules {
		visit(&j.Rules[i].Requires)
	}
	for i := range j.Named {
		visit(&j.Named[i].JWTRequirement)
	}
}

func (d *decoder) jwtProviderEntry(m wire.Message) JWTProvider {
	p := JWTProvider{ClockSkew: defaultClockSkew}
	for d.next(&m, &providerEntryFields) {
		switch m.Number {
		case 1:
			p.Name = m.String()
		case 2:
			d.jwtProvider(m.Message(), &p)
		}
	}
	if p.Keys == nil && p.Remote == nil {
		d.report(Security, "a provider without keys")
	}
	return p
}

func (d *decoder) namedRequirement(m wire.Message) (r NamedRequirement) {
	for d.next(&m, &requirementEntryFields) {
		switch m.Number {
		case 1:
			r.Name = m.String()
		case 2:
			r.JWTRequirement = d.jwtRequirement(m.Message())
		}
	}
	return r
}

var (
	jwtProviderFields = message{jwtPackage + "JwtProvider", Security, []field{
		1:  {"issuer", decoded},
		2:  {"audiences", decoded},
		3:  {"remote_jwks", choice},
		4:  {"local_jwks", choice},
		5:  {"forward", decoded},
		6:  {"from_headers", decoded},
		7:  {"from_params", decoded},
		8:  {"forward_payload_header", decoded},
		9:  {"payload_in_metadata", decoded},
		10: {"clock_skew_seconds", decoded},
		11: {"pad_forward_payload_header", decoded},
		12: {"jwt_cache_config", ignored},
		13: {"from_cookies", decoded},
		14: {"header_in_metadata", security}, // a policy might match it
		15: {"claim_to_headers", decoded},
		16: {"failed_status_in_metadata", security}, // a policy might match it
		17: {"clear_route_cache", decoded},
		18: {"normalize_payload_in_metadata", once},
		19: {"subjects", security},
		20: {"require_expiration", security},
		21: {"max_lifetime", security},
	}}

	normalizeFields = message{jwtPackage + "JwtProvider.NormalizePayload", Security, []field{1: {"space_delimited_claims", decoded}}}

	tokenHeaderFields = message{jwtPackage + "JwtHeader", Security, []field{1: {"name", decoded}, 2: {"value_prefix", decoded}}}
	claimHeaderFields = message{jwtPackage + "JwtClaimToHeader", Security, []field{
		1: {"header_name", decoded},
		2: {"claim_name", decoded},
		3: {"claim_path", security},
	}}
)

func (d *decoder) jwtProvider(m wire.Message, p *JWTProvider) {
	for d.next(&m, &jwtProviderFields) {
		switch m.Number {
		case 1:
			p.Issuer = m.String()
		case 2:
			p.Audiences = append(p.Audiences, m.String())
		case 3:
			p.Remote = d.remoteKeys(m.Message())
		case 4:
			p.Keys = d.inline(m.Message())
		case 5:
			p.Forward = m.Bool()
		case 6:
			p.Headers = append(p.Headers, d.tokenHeader(m.Message()))
		case 7:
			p.Params = append(p.Params, m.String())
		case 8:
			p.PayloadHeader = d.fieldName(m.String())
		case 9:
			p.Metadata = m.String()
		case 10:
			if seconds := uint32(m.Uint64()); seconds != 0 {
				p.ClockSkew = time.Duration(seconds) * time.Second
			}
		case 11:
			p.PadPayload = m.Bool()
		case 13:
			p.Cookies = append(p.Cookies, m.String())
		case 15:
			p.ClaimHeaders = append(p.ClaimHeaders, d.claimHeader(m.Message()))
		case 17:
			p.Reroute = m.Bool()
		case 18:
			for m := m.Message(); d.next(&m, &normalizeFields); {
				p.SpaceClaims = append(p.SpaceClaims, m.String())
			}
		}
	}
}

// fieldName returns the name of a header field that may be set. Other names are reported.
func (d *decoder) fieldName(name string) string {
	if !Editable(name) {
		d.report(Security, "not the name of a header field that can be set")
		return ""
	}
	return name
}

func (d *decoder) tokenHeader(m wire.Message) (h TokenHeader) {
	for d.next(&m, &tokenHeaderFields) {
		switch m.Number {
		case 1:
			h.Name = m.String()
		case 2:
			h.Prefix = m.String()
		}
	}
	h.Name = d.fieldName(h.Name)
	return h
}

func (d *decoder) claimHeader(m wire.Message) (h ClaimHeader) {
	for d.next(&m, &claimHeaderFields) {
		switch m.Number {
		case 1:
			h.Header = m.String()
		case 2:
			h.Claim = m.String()
		}
	}
	h.Header = d.fieldName(h.Header)
	return h
}

var (
	remoteKeysFields = message{jwtPackage + "RemoteJwks", Security, []field{
		1: {"http_uri", once},
		2: {"cache_duration", once},
		3: {"async_fetch", once},
		4: {"retry_policy", once},
	}}

	// Envoy replaces the conditions as well: 5xx, gateway-error, connect-failure and reset.
	keyRetryFields = message{"envoy.config.core.v3.RetryPolicy", Traffic, []field{
		1: {"retry_back_off", once},
		2: {"num_retries", once},
		3: {"retry_on", ignored},
		4: {"retry_priority", traffic},
		5: {"retry_host_predicate", traffic},
		6: {"host_selection_retry_max_attempts", ignored},
	}}

	keyBackOffFields = message{"envoy.config.core.v3.BackoffStrategy", Traffic, []field{1: {"base_interval", once}, 2: {"max_interval", once}}}

	asyncFetchFields = message{jwtPackage + "JwksAsyncFetch", Security, []field{
		1: {"fast_listener", ignored}, // listeners never wait: requests do
		2: {"failed_refetch_duration", once},
	}}

	httpURIFields = message{"envoy.config.core.v3.HttpUri", Security, []field{1: {"uri", decoded}, 2: {"cluster", choice}, 3: {"timeout", once}}}
)

func (d *decoder) remoteKeys(m wire.Message) *RemoteKeys {
	r := &RemoteKeys{CacheFor: defaultKeysCache, Pause: defaultKeysPause}
	for d.next(&m, &remoteKeysFields) {
		switch m.Number {
		case 1:
			r.Service = d.httpService(m.Message())
		case 2:
			r.CacheFor = d.duration(m.Message())
		case 3:
			r.Early = true
			for m := m.Message(); d.next(&m, &asyncFetchFields); {
				if m.Number == 2 {
					r.Pause = d.duration(m.Message())
				}
			}
		case 4:
			d.keyRetry(m.Message(), r)
		}
	}
	if r.Service.Cluster == "" {
		d.report(Security, "keys without a cluster to fetch them from")
	}
	return r
}

// keyRetry decodes a policy. An empty one allows one retry.
func (d *decoder) keyRetry(m wire.Message, r *RemoteKeys) {
	r.Retries, r.BackOff, r.MaxBackOff = 1, keysBackOff, 10*keysBackOff
	for d.next(&m, &keyRetryFields) {
		switch m.Number {
		case 1:
			r.BackOff, r.MaxBackOff = d.backOff(m.Message(), &keyBackOffFields, keysBackOff)
		case 2:
			r.Retries = d.uint32Value(m.Message())
		}
	}
}

func (d *decoder) httpService(m wire.Message) (s HTTPService) {
	for d.next(&m, &httpURIFields) {
		switch m.Number {
		case 1:
			s.URI = m.String()
		case 2:
			s.Cluster = m.String()
		case 3:
			s.Timeout = d.duration(m.Message())
		}
	}
	return s
}

var jwtRuleFields = message{jwtPackage + "RequirementRule", Security, []field{1: {"match", once}, 2: {"requires", choice}, 3: {"requirement_name", choice}}}

// jwtRule returns a rule. Without a requirement, no token is required.
func (d *decoder) jwtRule(m wire.Message) JWTRule {
	r := JWTRule{Requires: JWTRequirement{Kind: JWTNotRequired}}
	matched := false
	for d.next(&m, &jwtRuleFields) {
		switch m.Number {
		case 1:
			r.Match, matched = d.routeMatch(m.Message()), true
		case 2:
			r.Requires = d.jwtRequirement(m.Message())
		case 3:
			r.Requires = JWTRequirement{Kind: JWTNamed, Name: m.String()}
		}
	}
	if !matched {
		d.report(Security, "a rule without a match")
	}
	return r
}

var (
	requirementFields = message{jwtPackage + "JwtRequirement", Security, []field{
		1: {"provider_name", choice},
		2: {"provider_and_audiences", choice},
		3: {"requires_any", choice},
		4: {"requires_all", choice},
		5: {"allow_missing_or_failed", choice},
		6: {"allow_missing", choice},
		7: {"extract_only_without_validation", security},
	}}

	audiencesFields = message{jwtPackage + "ProviderWithAudiences", Security, []field{1: {"provider_name", decoded}, 2: {"audiences", decoded}}}
	orListFields    = message{jwtPackage + "JwtRequirementOrList", Security, []field{1: {"requirements", decoded}}}
	andListFields   = message{jwtPackage + "JwtRequirementAndList", Security, []field{1: {"requirements", decoded}}}
	emptyFields     = message{"google.protobuf.Empty", Security, nil}
)

// jwtRequirement returns a requirement. Findings in it refuse all requests.
func (d *decoder) jwtRequirement(m wire.Message) (r JWTRequirement) {
	if !d.mayRead() {
		return r
	}
	before := d.refusals
	for d.next(&m, &requirementFields) {
		switch m.Number {
		case 1:
			r = JWTRequirement{Kind: JWTProvided, Name: m.String()}
		case 2:
			r = JWTRequirement{Kind: JWTProvided}
			d.providerAudiences(m.Message(), &r)
		case 3:
			r = JWTRequirement{Kind: JWTAny, Of: d.jwtRequirements(m.Message(), &orListFields)}
		case 4:
			r = JWTRequirement{Kind: JWTAll, Of: d.jwtRequirements(m.Message(), &andListFields)}
		case 5, 6:
			r = JWTRequirement{Kind: JWTAllowMissing}
			if m.Number == 5 {
				r.Kind = JWTAllowMissingOrFailed
			}
			for m := m.Message(); d.next(&m, &emptyFields); {
			}
		}
	}
	if r.Kind == JWTUnknown && d.refusals == before {
		d.report(Security, "an empty requirement")
	}
	return r
}

func (d *decoder) providerAudiences(m wire.Message, r *JWTRequirement) {
	for d.next(&m, &audiencesFields) {
		switch m.Number {
		case 1:
			r.Name = m.String()
		case 2:
			r.Audiences = append(r.Audiences, m.String())
		}
	}
}

func (d *decoder) jwtRequirements(m wire.Message, table *message) (of []JWTRequirement) {
	for d.next(&m, table) {
		of = append(of, d.jwtRequirement(m.Message()))
	}
	if len(of) == 0 {
		d.report(Security, "an empty list of requirements")
	}
	return of
}
