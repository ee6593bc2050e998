package route

import (
	"net/http"

	"github.com/pillion-proxy/pillion/internal/envoy"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/mesh"
)

// cors is a compiled policy of cross-origin requests.
type cors struct {
	origins          []allowedOrigin
	methods, headers string
	maxAge           string
	credentials      bool
	privateNetwork   bool
	forwardUnmatched bool // preflight requests of other origins
	enabled          mesh.Fraction
	edits            []Edit // of responses to allowed origins
}

// allowedOrigin is an origin that is allowed.
type allowedOrigin struct {
	source  *mesh.StringMatcher
	pattern *pattern // of MatchRegex
	any     bool     // the matcher accepts "*"
}

// compileCORS merges the policies of the filters field by field, or returns nil. The most specific one decides whether there
// is a policy.
func compileCORS(filters [4]*mesh.RouteFilters, p *patterns) *cors {
	var policies []*mesh.CORS
	for _, level := range filters {
		switch c := level.CORS; {
		case c == nil:
		case !c.Disabled:
			policies = append(policies, c)
		case len(policies) == 0:
			return nil
		}
	}
	if len(policies) == 0 {
		return nil
	}
	c := &cors{enabled: policies[0].Enabled}
	var expose string
	var credentials, privateNetwork, forward *bool
	for _, policy := range policies {
		if len(c.origins) == 0 {
			c.origins = compileOrigins(policy.Origins, p)
		}
		first(&c.methods, policy.Methods)
		first(&c.headers, policy.Headers)
		first(&c.maxAge, policy.MaxAge)
		first(&expose, policy.Expose)
		first(&credentials, policy.Credentials)
		first(&privateNetwork, policy.PrivateNetwork)
		first(&forward, policy.ForwardUnmatched)
	}
	c.credentials = credentials != nil && *credentials
	c.privateNetwork = privateNetwork != nil && *privateNetwork
	c.forwardUnmatched = forward == nil || *forward
	c.edits = []Edit{compileEdit(allowOrigin, "%REQ(origin)%", mesh.OverwriteOrAdd, false)}
	if c.credentials {
		c.edits = append(c.edits, compileEdit(allowCredentials, "true", mesh.OverwriteOrAdd, false))
	}
	if expose != "" {
		c.edits = append(c.edits, Edit{Name: "access-control-expose-headers", Action: mesh.OverwriteOrAdd, value: expose})
	}
	return c
}

const (
	allowOrigin      = "access-control-allow-origin"
	allowCredentials = "access-control-allow-credentials"
)

// first sets a value that is not set yet.
func first[T comparable](value *T, next T) {
	var unset T
	if *value == unset {
		*value = next
	}
}

func compileOrigins(matchers []mesh.StringMatcher, p *patterns) (origins []allowedOrigin) {
	for i := range matchers {
		o := allowedOrigin{source: &matchers[i]}
		if o.source.Kind == mesh.MatchRegex {
			o.pattern = p.get(o.source.Text)
		}
		o.any = matchText(o.source, o.pattern, []byte("*"))
		origins = append(origins, o)
	}
	return origins
}

func (c *cors) allowed(value []byte) bool {
	for i := range c.origins {
		if o := &c.origins[i]; o.any || matchText(o.source, o.pattern, value) {
			return true
		}
	}
	return false
}

// decide reports whether the origin of a request is allowed, and returns the reply to a preflight request. A request without
// an origin is not a cross-origin request.
func (c *cors) decide(r *Request) (allowed bool, reply *Reply) {
	if c == nil || !r.drawn(c.enabled) {
		return false, nil
	}
	from, _ := lookup(r.Fields, "origin")
	if len(from) == 0 {
		return false, nil
	}
	allowed = c.allowed(from)
	method, _ := lookup(r.Fields, "access-control-request-method")
	if string(r.Method) != http.MethodOptions || len(method) == 0 || !allowed && c.forwardUnmatched {
		return allowed, nil
	}
	return allowed, c.preflight(r, from, method, allowed)
}

func (c *cors) preflight(r *Request, from, method []byte, allowed bool) *Reply {
	reply := &Reply{Status: http.StatusOK, Details: envoy.DetailsCORS, Reason: flow.Completed}
	add := func(name, value string) {
		if value != "" {
			reply.Fields = append(reply.Fields, Field{name, value})
		}
	}
	if allowed {
		add(allowOrigin, string(from))
	}
	if c.credentials {
		add(allowCredentials, "true")
	}
	methods, headers := c.methods, c.headers
	if methods == "*" {
		methods = string(method)
	}
	if headers == "*" {
		requested, _ := lookup(r.Fields, "access-control-request-headers")
		headers = string(requested)
	}
	add("access-control-allow-methods", methods)
	add("access-control-allow-headers", headers)
	add("access-control-max-age", c.maxAge)
	if network, _ := lookup(r.Fields, "access-control-request-private-network"); c.privateNetwork && string(network) == "true" {
		add("access-control-allow-private-network", "true")
	}
	return reply
}
