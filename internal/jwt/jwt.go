// Package jwt verifies the JSON Web Tokens of requests, as Envoy's filter jwt_authn does. It does no I/O.
//
// go-jose verifies signatures and decodes keys and tokens. This package finds the tokens, decides which of them a request
// needs, and applies their claims.
package jwt

import (
	"net/http"
	"strings"
	"time"

	"github.com/pillion-proxy/pillion/internal/match"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/route"
)

// Filter is a compiled mesh.JWT. It is never changed, and may be used by several goroutines at a time.
type Filter struct {
	source    *mesh.JWT
	providers []*provider
	rules     []rule
	named     map[string]*mesh.JWTRequirement
	own       []string // names of the header fields that clients must not send
}

type rule struct {
	match    *route.Matcher
	requires *mesh.JWTRequirement
}

// Of returns the filter for j. It is compiled once and kept with j. Snapshots share j.
func Of(j *mesh.JWT) *Filter {
	if f, ok := j.Compiled.Load().(*Filter); ok {
		return f
	}
	f := compile(j)
	if !j.Compiled.CompareAndSwap(nil, f) {
		return j.Compiled.Load().(*Filter)
	}
	return f
}

func compile(j *mesh.JWT) *Filter {
	f := &Filter{source: j, named: map[string]*mesh.JWTRequirement{}}
	for i := range j.Providers {
		p := compileProvider(&j.Providers[i])
		f.providers = append(f.providers, p)
		f.own = append(f.own, p.ownFields()...)
	}
	for i := range j.Rules {
		f.rules = append(f.rules, rule{route.NewMatcher(&j.Rules[i].Match), &j.Rules[i].Requires})
	}
	for i := range j.Named {
		f.named[j.Named[i].Name] = &j.Named[i].JWTRequirement
	}
	return f
}

// Result is what becomes of a request.
type Result struct {
	Reply   *route.Reply // nil: the request passes
	Claims  *Claims      // of its verified tokens; nil: no token was verified
	Edits   []route.Edit // of the request's header
	Reroute bool         // the route is to be chosen again, with the claims

	// Awaited are keys that are being fetched. The request can be checked when they are there, and has to be checked again.
	Awaited *mesh.RemoteKeys
}

// Own returns the names of the header fields that clients must not send, in the head or in trailers.
func (f *Filter) Own() []string { return f.own }

// Requirement is what requests have to meet.
type Requirement struct {
	Own  bool   // that of a route; without it, the filter's rules count
	Name string // of one of the filter's; empty: every request passes
}

// ByRules is the requirement of the filter's rules.
var ByRules = Requirement{}

// Check verifies the tokens that a request needs. r.Path is in its normal form. Without keys, tokens of issuers whose keys
// are fetched are not accepted.
func (f *Filter) Check(r *route.Request, required Requirement, now time.Time, keys Keys) Result {
	if f.source.Refused {
		return Result{Reply: route.Refused}
	}
	result := Result{Edits: f.sanitize(r)}
	if f.source.AllowPreflight && isPreflight(r) {
		return result
	}
	requires := f.required(r, required)
	if requires == nil {
		return result
	}
	c := check{filter: f, request: r, now: now, keys: keys, result: &result}
	failure := c.require(requires)
	switch {
	case result.Awaited != nil:
		return Result{Awaited: result.Awaited}
	case failure != nil:
		return Result{Reply: f.deny(failure, r)}
	}
	return result
}

// required returns what a request has to meet; nil: nothing. A name that is not the filter's is never met.
func (f *Filter) required(r *route.Request, required Requirement) *mesh.JWTRequirement {
	if required.Own {
		if required.Name == "" {
			return nil
		}
		return &mesh.JWTRequirement{Kind: mesh.JWTNamed, Name: required.Name}
	}
	if string(r.Path) == "*" { // OPTIONS about the whole server: what its paths require counts
		root := *r
		root.Path = []byte("/")
		r = &root
	}
	for i := range f.rules {
		if f.rules[i].match.Match(r) {
			return f.rules[i].requires
		}
	}
	return nil
}

// sanitize removes the fields that the filter adds from the request: a client must not make them.
func (f *Filter) sanitize(r *route.Request) (edits []route.Edit) {
	for _, name := range f.own {
		if _, n := route.Lookup(r.Fields, name); n > 0 {
			edits = append(edits, route.Edit{Name: name, Remove: true})
		}
	}
	return edits
}

// isPreflight reports whether a request is a preflight request of CORS.
func isPreflight(r *route.Request) bool {
	_, origins := route.Lookup(r.Fields, "origin")
	_, methods := route.Lookup(r.Fields, "access-control-request-method")
	return string(r.Method) == http.MethodOptions && origins > 0 && methods > 0
}

// check is the verification of one request.
type check struct {
	filter  *Filter
	request *route.Request
	now     time.Time
	keys    Keys
	result  *Result
	seen    map[seenKey]*denial // results of tokens; nil is valid
}

type seenKey struct {
	provider *provider
	token    string
}

// require returns nil if a requirement is met.
func (c *check) require(q *mesh.JWTRequirement) *denial {
	switch q.Kind {
	case mesh.JWTNotRequired:
		return nil
	case mesh.JWTProvided:
		return c.requireProvider(q)
	case mesh.JWTNamed:
		if named := c.filter.named[q.Name]; named != nil && named.Kind != mesh.JWTNamed {
			return c.require(named)
		}
		return notConfigured
	case mesh.JWTAny:
		return c.requireAny(q.Of)
	case mesh.JWTAll:
		for i := range q.Of {
			if failure := c.require(&q.Of[i]); failure != nil {
				return failure
			}
		}
		return nil
	case mesh.JWTAllowMissing:
		return c.allowMissing()
	case mesh.JWTAllowMissingOrFailed:
		_ = c.allowMissing() // valid tokens are used all the same
		return nil
	}
	return notConfigured
}

// requireProvider requires a token of a provider where the provider's tokens are. All tokens there have to be valid.
func (c *check) requireProvider(q *mesh.JWTRequirement) *denial {
	p := c.filter.provider(q.Name)
	if p == nil {
		return notConfigured
	}
	tokens := p.tokens(c.request)
	switch {
	case len(tokens) == 0:
		return missing
	case len(tokens) > maxTokens:
		return tooMany
	}
	for i := range tokens {
		if failure := c.verify(p, &tokens[i], q.Audiences); failure != nil {
			return failure
		}
	}
	return nil
}

func (f *Filter) provider(name string) *provider {
	for _, p := range f.providers {
		if p.source.Name == name {
			return p
		}
	}
	return nil
}

// requireAny requires one of several. The failure is the first that is more specific than that a token is missing or is
// another provider's.
func (c *check) requireAny(of []mesh.JWTRequirement) *denial {
	worst := missing
	for i := range of {
		failure := c.require(&of[i])
		if failure == nil {
			return nil
		}
		if worst == missing || worst == unknownIssuer && failure != missing {
			worst = failure
		}
	}
	return worst
}

// allowMissing requires that each token, if there is any, is valid and of a provider whose tokens are at its place. A token
// of another issuer is not a missing one (CVE-2021-21378).
func (c *check) allowMissing() *denial {
	for _, p := range c.filter.providers {
		tokens := p.tokens(c.request)
		if len(tokens) > maxTokens {
			return tooMany
		}
		for _, t := range tokens {
			if failure := c.verifyAny(&t); failure != nil {
				return failure
			}
		}
	}
	return nil
}

// verifyAny verifies a token by the provider of its issuer, if that has its tokens where t is.
func (c *check) verifyAny(t *token) *denial {
	parsed, failure := parse(t.text)
	if failure != nil {
		return failure
	}
	for _, p := range c.filter.providers {
		if p.source.Issuer == parsed.issuer() && p.has(t.place) {
			return c.verify(p, t, nil)
		}
	}
	for _, p := range c.filter.providers {
		if p.source.Issuer == "" && p.has(t.place) {
			return c.verify(p, t, nil)
		}
	}
	return unknownIssuer
}

// verify verifies a token of a provider once, and takes its claims.
func (c *check) verify(p *provider, t *token, audiences []string) *denial {
	key := seenKey{p, t.text + "\x00" + strings.Join(audiences, "\x00")}
	if failure, ok := c.seen[key]; ok {
		return failure
	}
	claims, failure := p.verify(t.text, audiences, c.now, c.keys)
	if failure == awaited {
		c.result.Awaited = p.source.Remote
	}
	if c.seen == nil {
		c.seen = map[seenKey]*denial{}
	}
	c.seen[key] = failure
	if failure == nil {
		c.take(p, t, claims)
	}
	return failure
}

// take carries out the configuration of a provider for a verified token.
func (c *check) take(p *provider, t *token, claims *parsed) {
	r := c.result
	if !p.source.Forward && t.place.kind == inHeader {
		r.Edits = append(r.Edits, route.Edit{Name: t.place.name, Remove: true})
	}
	if p.source.PayloadHeader != "" {
		r.Edits = append(r.Edits, route.SetField(p.source.PayloadHeader, claims.encoded(p.source.PadPayload)))
	}
	for _, h := range p.source.ClaimHeaders {
		if value, ok := claims.primitive(h.Claim); ok {
			r.Edits = append(r.Edits, route.SetField(h.Header, value))
		}
	}
	if p.source.Metadata != "" {
		if r.Claims == nil {
			r.Claims = &Claims{payloads: match.Metadata{}}
		}
		r.Claims.payloads[p.source.Metadata] = p.split(claims.payload)
	}
	r.Reroute = r.Reroute || p.source.Reroute
}
