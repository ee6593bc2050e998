// Package authz judges connections and requests by policies of role-based access control, as Envoy does. It does no I/O.
//
// Compile makes a Policy of the values that the control plane sent. Policy.Judge then decides without allocation. Conditions
// have three values. One that is not understood, or that looks at something that is not known, is Unknown, and so may be
// a policy with such a part. A policy that allows has to be met with certainty; one that denies is also applied if it may be
// met. So a misunderstanding never allows more.
package authz

import (
	"net/netip"
	"slices"

	"github.com/pillion-proxy/pillion/internal/match"
	"github.com/pillion-proxy/pillion/internal/mesh"
)

// Subject is a connection or a request, as conditions see it. Its bytes belong to the caller.
type Subject struct {
	Destination netip.AddrPort // original destination
	Peer        netip.Addr     // of the connection
	Client      netip.Addr     // the client's address, from X-Forwarded-For if that is configured; otherwise Peer
	ServerName  string         // of the ClientHello, in lower case; empty: it had no name

	// Secured means that the connection has TLS that ended here. Names has the names in the client's certificate: first its
	// URIs, then its DNS names, then its subject.
	Secured bool
	Names   []string

	Request *Request // nil: a connection whose requests are not looked at
}

// Request is the part of a Subject that connections do not have.
type Request struct {
	Method, Authority, Scheme []byte
	Path                      []byte // normalized, with its query; nil: a request without a path, as CONNECT
	Fields                    Fields // may be nil
	Metadata                  Metadata

	// Scratch is memory in which the values of repeated fields are joined. Judge grows it; a caller that keeps it between
	// requests saves the allocation.
	Scratch []byte

	plain []byte // see plainPath
}

// Fields are the header fields of a request in the order of their arrival, without pseudo-header fields.
type Fields interface {
	Len() int
	At(i int) (name, value []byte) // the name in any case
}

// Metadata has values that filters left about a request, such as the claims of its token. Nil is without values.
type Metadata interface {
	// Match compares a value. A missing value does not match; m.Invert inverts that as well.
	Match(m *mesh.MetadataMatcher) match.Value
}

// Policy is a compiled mesh.RBAC. It is never changed, and may be used by several goroutines at a time.
type Policy struct {
	refused          bool
	enforced, shadow *rules
	prefix           string
	client           bool
}

// LooksAtClient reports whether a condition looks at Subject.Client.
func (p *Policy) LooksAtClient() bool { return p.client }

type rules struct {
	action   mesh.Action
	refused  bool
	policies []policy
	blocks   []block // of them
}

type policy struct {
	name                  string
	permission, principal condition
	unknown               bool
}

// Of returns the policy for r. It is compiled once and kept with r. Snapshots share r.
func Of(r *mesh.RBAC) *Policy {
	if p, ok := r.Compiled.Load().(*Policy); ok {
		return p
	}
	p := Compile(r)
	if !r.Compiled.CompareAndSwap(nil, p) {
		return r.Compiled.Load().(*Policy)
	}
	return p
}

// Compile returns the policy for r. A part that cannot be compiled is Unknown.
func Compile(r *mesh.RBAC) *Policy {
	p := &Policy{refused: r.Refused, enforced: compileRules(r.Rules), shadow: compileRules(r.Shadow), prefix: r.ShadowPrefix}
	p.client = p.enforced.looksAtClient() || p.shadow.looksAtClient()
	return p
}

func compileRules(r *mesh.Rules) *rules {
	if r == nil {
		return nil
	}
	compiled := &rules{action: r.Action, refused: r.Refused, policies: make([]policy, len(r.Policies))}
	for i := range r.Policies {
		p := &r.Policies[i]
		compiled.policies[i] = policy{p.Name, compile(&p.Permission), compile(&p.Principal), p.Unknown}
	}
	compiled.blocks = newBlocks(compiled.policies)
	return compiled
}

func (r *rules) looksAtClient() bool {
	return r != nil && slices.ContainsFunc(r.policies, func(p policy) bool { return p.looksAt(mesh.ConditionClient) })
}

// looksAt reports whether p has a condition of a kind.
func (p *policy) looksAt(kind mesh.ConditionKind) bool {
	return p.permission.looksAt(kind) || p.principal.looksAt(kind)
}

// Verdict is the result of a Policy.
type Verdict struct {
	Denied  bool
	Matched string // name of the policy that decided; empty: no policy matched
	Refused bool   // denied because the configuration is not understood
}

// Judge returns the verdict of the policies that are enforced.
func (p *Policy) Judge(s *Subject) Verdict {
	if p.refused {
		return Verdict{Denied: true, Refused: true}
	}
	return p.enforced.judge(s)
}

// Shadow is what the policies that are not enforced would decide.
type Shadow struct {
	Verdict
	Prefix string // of the names under which the verdict is recorded
}

// Shadow returns the verdict of the policies that are only recorded. ok is false without such policies.
func (p *Policy) Shadow(s *Subject) (shadow Shadow, ok bool) {
	if p.shadow == nil {
		return Shadow{}, false
	}
	return Shadow{p.shadow.judge(s), p.prefix}, true
}

// judge returns the verdict of r. A nil r allows everything.
func (r *rules) judge(s *Subject) Verdict {
	switch {
	case r == nil:
		return Verdict{}
	case r.refused:
		return Verdict{Denied: r.action != mesh.Log, Refused: true}
	}
	for i := range r.blocks {
		if p := r.blocks[i].match(s, r.action == mesh.Deny); p != nil {
			return Verdict{Denied: r.action == mesh.Deny, Matched: p.name}
		}
	}
	return Verdict{Denied: r.action != mesh.Deny && r.action != mesh.Log}
}

// met returns whether both conditions of p are met.
func (p *policy) met(s *Subject) value {
	met := p.permission.met(s)
	if met != no {
		met = min(met, p.principal.met(s))
	}
	if p.unknown {
		met = min(met, unknown)
	}
	return met
}

// value is the value of a condition. The values are ordered, so all of several is their minimum, any of them their maximum.
type value = match.Value

const (
	no      = match.No
	unknown = match.Unknown
	yes     = match.Yes
)

func truth(is bool) value { return match.Of(is) }
