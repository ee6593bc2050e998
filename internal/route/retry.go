package route

import (
	"bytes"
	"slices"
	"strconv"
	"strings"

	"github.com/pillion-proxy/pillion/internal/mesh"
)

// The fields in which a client of a sidecar asks for retries. Envoy consumes them: they concern this hop only.
const (
	retryOnField      = "x-envoy-retry-on"
	retryGRPCOnField  = "x-envoy-retry-grpc-on"
	maxRetriesField   = "x-envoy-max-retries"
	retryCodesField   = "x-envoy-retriable-status-codes"
	retryHeadersField = "x-envoy-retriable-header-names"

	timeoutField    = "x-envoy-upstream-rq-timeout-ms"
	tryTimeoutField = "x-envoy-upstream-rq-per-try-timeout-ms"
)

// Consumed has the edits that remove the fields by which a request controls its next proxy. The last three have no effect.
var Consumed = removals(retryOnField, retryGRPCOnField, maxRetriesField, retryCodesField, retryHeadersField, timeoutField, tryTimeoutField,
	"x-envoy-upstream-stream-duration-ms", "x-envoy-hedge-on-per-try-timeout", "x-envoy-upstream-rq-timeout-alt-response")

func removals(names ...string) (edits []Edit) {
	for _, name := range names {
		edits = append(edits, Edit{Name: name, Remove: true})
	}
	return edits
}

// IsConsumed reports whether a field is one that Consumed removes.
func IsConsumed(name []byte) bool {
	return asks(name) && slices.ContainsFunc(Consumed, func(e Edit) bool { return equalFold(name, e.Name) })
}

// asks reports whether a field may ask for something of Envoy.
func asks(name []byte) bool {
	const family = "x-envoy-"
	return len(name) > len(family) && equalFold(name[:len(family)], family)
}

// asksForRetries reports whether a field may ask for retries. The edge adds others of the family to each request.
func asksForRetries(name []byte) bool {
	const family = "x-envoy-retr"
	return len(name) > len(family) && equalFold(name[:len(family)], family) || equalFold(name, maxRetriesField)
}

// RetryOf returns how a request with the plan is sent again, or nil if it is not. Its fields may ask for more than the route's
// policy, and have the last word on the number of retries (Envoy's source/common/router/retry_state_impl.cc).
func (p *Plan) RetryOf(r *Request) *mesh.RetryPolicy {
	policy := p.Retry
	if r.Fields != nil {
		for i := range r.Fields.Len() {
			if name, _ := r.Fields.At(i); asksForRetries(name) {
				policy = asked(policy, r.Fields)
				break
			}
		}
	}
	if policy == nil || policy.On == 0 || policy.Retries == 0 || !retriesRequest(policy, r) {
		return nil
	}
	return policy
}

// asked returns a policy with what fields ask for. Without a policy, fields that name no condition have no effect.
func asked(policy *mesh.RetryPolicy, fields Fields) *mesh.RetryPolicy {
	http, n := lookup(fields, retryOnField)
	grpc, m := lookup(fields, retryGRPCOnField)
	if policy == nil {
		if n+m == 0 {
			return nil
		}
		policy = mesh.DefaultRetry()
	}
	own := policy.Clone()
	own.On |= mesh.RetryConditionsOf(string(http))&^mesh.RetryOfGRPC | mesh.RetryConditionsOf(string(grpc))&mesh.RetryOfGRPC
	if value, n := lookup(fields, maxRetriesField); n > 0 {
		if retries, err := strconv.ParseUint(string(value), 10, 32); err == nil {
			own.Retries = uint32(retries)
		}
	}
	codes, _ := lookup(fields, retryCodesField)
	for code := range bytes.SplitSeq(codes, []byte(",")) {
		if code, err := strconv.ParseUint(string(bytes.TrimSpace(code)), 10, 16); err == nil {
			own.Codes = append(own.Codes, uint32(code))
		}
	}
	names, _ := lookup(fields, retryHeadersField)
	for name := range strings.SplitSeq(string(names), ",") {
		if name = strings.TrimSpace(name); name != "" {
			own.Headers = append(own.Headers, mesh.HeaderMatcher{Name: name, Present: true})
		}
	}
	return own
}

// retryHeaders are the compiled matchers of a policy.
type retryHeaders struct{ request, response []header }

func headersOf(p *mesh.RetryPolicy) *retryHeaders {
	if h, ok := p.Compiled.Load().(*retryHeaders); ok {
		return h
	}
	h := &retryHeaders{compileHeaders(p.RequestHeaders), compileHeaders(p.Headers)}
	p.Compiled.Store(h)
	return h
}

func compileHeaders(from []mesh.HeaderMatcher) (headers []header) {
	var p patterns
	for i := range from {
		headers = append(headers, compileHeader(&from[i], &p))
	}
	return headers
}

// retriesRequest reports whether a policy is for requests like r.
func retriesRequest(p *mesh.RetryPolicy, r *Request) bool {
	return len(p.RequestHeaders) == 0 || matchesAny(headersOf(p).request, r)
}

// RetriesFields reports whether a policy retries after a response with these fields.
func RetriesFields(p *mesh.RetryPolicy, fields Fields) bool {
	return p.On&mesh.RetryHeaders != 0 && len(p.Headers) > 0 && matchesAny(headersOf(p).response, &Request{Fields: fields})
}

func matchesAny(headers []header, r *Request) bool {
	s := search{Request: r}
	return slices.ContainsFunc(headers, func(h header) bool { return h.match(&s) })
}
