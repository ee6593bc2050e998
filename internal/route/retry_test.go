package route

import (
	"slices"
	"testing"

	"github.com/pillion-proxy/pillion/internal/mesh"
)

// A request may ask for more than its route's policy, and has the last word on the number of retries.
func TestARequestAsksForRetries(t *testing.T) {
	policy := func() *mesh.RetryPolicy {
		return &mesh.RetryPolicy{On: mesh.RetryConnectFailure, Retries: 2, Codes: []uint32{503}, HostChoices: 5}
	}
	for _, test := range []struct {
		name    string
		policy  *mesh.RetryPolicy
		fields  []string
		on      mesh.RetryConditions
		retries uint32 // 0: the request is not retried
		codes   []uint32
	}{
		{"none", nil, nil, 0, 0, nil},
		{"the route's", policy(), []string{"x-other", "5xx", "x-envoy-other", "5xx"}, mesh.RetryConnectFailure, 2, []uint32{503}},
		{"more conditions", policy(), []string{"X-Envoy-Retry-On", "5xx, reset,unknown,unavailable"}, mesh.RetryConnectFailure | mesh.Retry5xx | mesh.RetryReset, 2, []uint32{503}},
		{"conditions of gRPC", policy(), []string{"x-envoy-retry-grpc-on", "unavailable,5xx"}, mesh.RetryConnectFailure | mesh.RetryUnavailable, 2, []uint32{503}},
		{"without a policy", nil, []string{"x-envoy-retry-on", "5xx"}, mesh.Retry5xx, 1, nil},
		{"without a policy, gRPC", nil, []string{"x-envoy-retry-grpc-on", "cancelled"}, mesh.RetryCancelled, 1, nil},
		{"a number only", nil, []string{"x-envoy-max-retries", "3"}, 0, 0, nil},
		{"another number", policy(), []string{"x-envoy-max-retries", "7"}, mesh.RetryConnectFailure, 7, []uint32{503}},
		{"no retries", policy(), []string{"x-envoy-max-retries", "0"}, 0, 0, nil},
		{"a malformed number", policy(), []string{"x-envoy-max-retries", "many"}, mesh.RetryConnectFailure, 2, []uint32{503}},
		{"more codes", policy(), []string{"x-envoy-retriable-status-codes", "429, x,418"}, mesh.RetryConnectFailure, 2, []uint32{503, 429, 418}},
	} {
		r := to("c")
		r.Forward.Retry = test.policy
		q := request("GET /", test.fields...)
		got := outcome(r, q).Plan.RetryOf(q)
		switch {
		case test.retries == 0:
			if got != nil {
				t.Errorf("%s: %+v, want none", test.name, got)
			}
		case got == nil || got.On != test.on || got.Retries != test.retries || !slices.Equal(got.Codes, test.codes):
			t.Errorf("%s: %+v", test.name, got)
		case test.policy != nil && (test.policy.Retries != 2 || len(test.policy.Codes) != 1):
			t.Errorf("%s: the route's policy has changed to %+v", test.name, test.policy)
		}
	}
}

// A policy may be for some requests only, and retry after responses with some fields.
func TestFieldsDecideAboutRetries(t *testing.T) {
	r := to("c")
	r.Forward.Retry = &mesh.RetryPolicy{
		On: mesh.RetryHeaders, Retries: 1,
		RequestHeaders: []mesh.HeaderMatcher{{Name: ":method", Kind: mesh.HeaderText, Text: mesh.StringMatcher{Text: "GET"}}},
		Headers:        []mesh.HeaderMatcher{{Name: "x-again", Kind: mesh.HeaderText, Text: mesh.StringMatcher{Kind: mesh.MatchRegex, Text: "y.s"}}},
	}
	post := request("POST /")
	if got := outcome(r, post).Plan.RetryOf(post); got != nil {
		t.Errorf("a request that the policy is not for: %+v", got)
	}
	get := request("GET /", "x-envoy-retriable-header-names", "x-later, x-soon")
	plan := outcome(r, get).Plan
	asking := plan.RetryOf(get)
	get.Fields = nil
	for _, test := range []struct {
		policy *mesh.RetryPolicy
		field  [2]string
		want   bool
	}{
		{plan.RetryOf(get), [2]string{"X-Again", "yes"}, true},
		{plan.RetryOf(get), [2]string{"x-again", "no"}, false},
		{plan.RetryOf(get), [2]string{"x-soon", "1"}, false},
		{asking, [2]string{"x-soon", "1"}, true},
		{asking, [2]string{"x-again", "yes"}, true},
		{&mesh.RetryPolicy{Headers: r.Forward.Retry.Headers}, [2]string{"x-again", "yes"}, false}, // without the condition
	} {
		if got := RetriesFields(test.policy, fieldList(test.field[:])); got != test.want {
			t.Errorf("%v: %v", test.field, got)
		}
	}
}
