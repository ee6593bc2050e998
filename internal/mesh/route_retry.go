package mesh

import (
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/pillion-proxy/pillion/internal/wire"
)

// RetryPolicy is which requests are sent again (envoy.config.route.v3.RetryPolicy).
type RetryPolicy struct {
	On      RetryConditions
	Retries uint32 // after the first try

	TryTimeout time.Duration // of each try; 0: no limit

	Codes          []uint32        // of RetryStatusCodes
	Headers        []HeaderMatcher // of RetryHeaders: of a response
	RequestHeaders []HeaderMatcher // a request must match one; empty: all requests do

	BackOff, MaxBackOff time.Duration

	OtherHosts      bool   // hosts that were tried are avoided
	HostChoices     uint32 // how often a host is chosen at most to avoid those
	OtherPriorities uint32 // after this many tries priorities that were tried are avoided; 0: never

	Compiled atomic.Value `json:"-"` // of package route, which sets it when the matchers are first used
}

// DefaultRetry returns a policy without conditions, with Envoy's defaults.
func DefaultRetry() *RetryPolicy {
	return &RetryPolicy{Retries: 1, HostChoices: 1, BackOff: defaultBackOff, MaxBackOff: 10 * defaultBackOff}
}

// Clone returns a policy that can be changed. It has not been compiled.
func (r *RetryPolicy) Clone() *RetryPolicy {
	return &RetryPolicy{
		On: r.On, Retries: r.Retries, TryTimeout: r.TryTimeout,
		Codes: slices.Clone(r.Codes), Headers: slices.Clone(r.Headers), RequestHeaders: slices.Clone(r.RequestHeaders),
		BackOff: r.BackOff, MaxBackOff: r.MaxBackOff,
		OtherHosts: r.OtherHosts, HostChoices: r.HostChoices, OtherPriorities: r.OtherPriorities,
	}
}

// RetryConditions is a set of conditions.
type RetryConditions uint32

// The conditions.
const (
	Retry5xx RetryConditions = 1 << iota
	RetryGatewayError
	RetryReset
	RetryResetBeforeRequest
	RetryConnectFailure
	RetryRefusedStream
	RetryRateLimited
	Retry4xx
	RetryStatusCodes
	RetryHeaders
	RetryCancelled
	RetryDeadlineExceeded
	RetryInternal
	RetryResourceExhausted
	RetryUnavailable
)

// RetryOfGRPC are the conditions on the status of gRPC.
const RetryOfGRPC = RetryCancelled | RetryDeadlineExceeded | RetryInternal | RetryResourceExhausted | RetryUnavailable

// RetryConditionsOf returns the conditions in a list with commas. It leaves out unknown ones.
func RetryConditionsOf(list string) (on RetryConditions) {
	for name := range strings.SplitSeq(list, ",") {
		on |= retryConditions[strings.TrimSpace(name)]
	}
	return on
}

// retryConditions has the conditions by their names in retry_on.
var retryConditions = map[string]RetryConditions{
	"5xx":                    Retry5xx,
	"gateway-error":          RetryGatewayError,
	"reset":                  RetryReset,
	"reset-before-request":   RetryResetBeforeRequest,
	"connect-failure":        RetryConnectFailure,
	"refused-stream":         RetryRefusedStream,
	"envoy-ratelimited":      RetryRateLimited,
	"retriable-4xx":          Retry4xx,
	"retriable-status-codes": RetryStatusCodes,
	"retriable-headers":      RetryHeaders,
	"cancelled":              RetryCancelled,
	"deadline-exceeded":      RetryDeadlineExceeded,
	"internal":               RetryInternal,
	"resource-exhausted":     RetryResourceExhausted,
	"unavailable":            RetryUnavailable,
}

// String returns the conditions as they stand in retry_on.
func (r RetryConditions) String() string {
	var names []string
	for name, condition := range retryConditions {
		if r&condition != 0 {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return strings.Join(names, ",")
}

const defaultBackOff = 25 * time.Millisecond

var retryFields = message{"envoy.config.route.v3.RetryPolicy", Traffic, []field{
	1:  {"retry_on", decoded},
	2:  {"num_retries", once},
	3:  {"per_try_timeout", once},
	4:  {"retry_priority", once},
	5:  {"retry_host_predicate", decoded},
	6:  {"host_selection_retry_max_attempts", decoded},
	7:  {"retriable_status_codes", decoded},
	8:  {"retry_back_off", once},
	9:  {"retriable_headers", decoded},
	10: {"retriable_request_headers", decoded},
	11: {"rate_limited_retry_back_off", traffic},
	12: {"retry_options_predicates", traffic},
	13: {"per_try_idle_timeout", traffic},
	14: {"refresh_cluster_on_retry", traffic},
}}

// sharedRetry returns the policy in the current field. Most routes have the same.
func (d *decoder) sharedRetry(m *wire.Message) *RetryPolicy {
	return share(d, retryFields.name, m.Bytes(), func() *RetryPolicy { return d.retry(m.Message()) })
}

// retry returns a policy. One without conditions never retries: it takes the place of the virtual host's.
func (d *decoder) retry(m wire.Message) *RetryPolicy {
	r := DefaultRetry()
	for d.next(&m, &retryFields) {
		switch m.Number {
		case 1:
			r.On = d.retryOn(m.String())
		case 2:
			r.Retries = d.uint32Value(m.Message())
		case 3:
			r.TryTimeout = d.duration(m.Message())
		case 4:
			r.OtherPriorities = d.retryPriority(m.Message())
		case 5:
			r.OtherHosts = d.retryPredicate(m.Message()) || r.OtherHosts
		case 6:
			r.HostChoices = uint32(min(max(int64(m.Uint64()), 1), 1000))
		case 7:
			for code := range m.Varints() {
				r.Codes = append(r.Codes, uint32(code))
			}
		case 8:
			r.BackOff, r.MaxBackOff = d.backOff(m.Message(), &backOffFields, defaultBackOff)
		case 9:
			r.Headers = append(r.Headers, d.headerMatcher(m.Message()))
		case 10:
			r.RequestHeaders = append(r.RequestHeaders, d.headerMatcher(m.Message()))
		}
	}
	return r
}

// retryOn returns the conditions in a list with commas. Unknown ones are reported.
func (d *decoder) retryOn(list string) (on RetryConditions) {
	for name := range strings.SplitSeq(list, ",") {
		switch condition, known := retryConditions[strings.TrimSpace(name)]; {
		case known:
			on |= condition
		case name != "":
			d.report(Traffic, "the condition "+name+" is not supported")
		}
	}
	return on
}

var backOffFields = message{"envoy.config.route.v3.RetryPolicy.RetryBackOff", Traffic, []field{1: {"base_interval", once}, 2: {"max_interval", once}}}

// backOff returns the least interval and the greatest. Without a least one, it is absent.
func (d *decoder) backOff(m wire.Message, table *message, absent time.Duration) (base, limit time.Duration) {
	for d.next(&m, table) {
		switch m.Number {
		case 1:
			base = d.duration(m.Message())
		case 2:
			limit = d.duration(m.Message())
		}
	}
	if base <= 0 {
		d.report(Traffic, "no interval; the default is used")
		base = absent
	}
	if limit == 0 {
		limit = 10 * min(base, time.Hour)
	}
	return base, max(limit, base)
}

// The two extensions of retry policies that istiod configures.
const (
	previousHostsType      = typePrefix + "envoy.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate"
	previousPrioritiesType = typePrefix + "envoy.extensions.retry.priority.previous_priorities.v3.PreviousPrioritiesConfig"
)

var retryPredicateFields = message{"envoy.config.route.v3.RetryPolicy.RetryHostPredicate", Traffic, []field{1: {"name", ignored}, 3: {"typed_config", once}}}

// retryPredicate reports whether a predicate is that of the hosts that were tried. Others are reported.
func (d *decoder) retryPredicate(m wire.Message) bool {
	var url string
	for d.next(&m, &retryPredicateFields) {
		url, _ = d.any(m.Message())
	}
	if url != previousHostsType {
		d.report(Traffic, "predicates of type "+strings.TrimPrefix(url, typePrefix)+" are not supported")
	}
	return url == previousHostsType
}

var (
	retryPriorityFields      = message{"envoy.config.route.v3.RetryPolicy.RetryPriority", Traffic, []field{1: {"name", ignored}, 3: {"typed_config", once}}}
	previousPrioritiesFields = message{"envoy.extensions.retry.priority.previous_priorities.v3.PreviousPrioritiesConfig", Traffic, []field{1: {"update_frequency", decoded}}}
)

func (d *decoder) retryPriority(m wire.Message) (tries uint32) {
	var url string
	for d.next(&m, &retryPriorityFields) {
		var value []byte
		url, value = d.any(m.Message())
		if url != previousPrioritiesType {
			continue
		}
		for m := m.Nested(value); d.next(&m, &previousPrioritiesFields); {
			tries = uint32(max(int32(m.Uint64()), 0))
		}
	}
	if url != previousPrioritiesType {
		d.report(Traffic, "priorities of type "+strings.TrimPrefix(url, typePrefix)+" are not supported")
	}
	return tries
}
