package authz

import (
	"fmt"
	"net/netip"
	"strings"

	"github.com/pillion-proxy/pillion/internal/match"
	"github.com/pillion-proxy/pillion/internal/mesh"
)

// Reason is what one policy contributed to a verdict.
type Reason struct {
	Policy string
	Met    string // "yes", "no" or "unknown"
	Why    string // the conditions that decided
}

// Explain returns what each of the enforced policies makes of s, in their order. It allocates, and is meant for people.
func (p *Policy) Explain(s *Subject) []Reason {
	if p.enforced == nil {
		return nil
	}
	reasons := make([]Reason, len(p.enforced.policies))
	for i := range p.enforced.policies {
		policy := &p.enforced.policies[i]
		reasons[i] = Reason{policy.name, policy.met(s).String(), policy.why(s)}
	}
	return reasons
}

// why names the first condition that is not met with certainty, or both conditions.
func (p *policy) why(s *Subject) string {
	permission, principal := p.permission.met(s), p.principal.met(s)
	switch {
	case permission == no:
		return p.permission.why(s)
	case principal == no:
		return p.principal.why(s)
	case p.unknown:
		return "the policy has a part that is not understood"
	case permission == unknown:
		return p.permission.why(s)
	case principal == unknown:
		return p.principal.why(s)
	}
	return p.permission.why(s) + " and " + p.principal.why(s)
}

// why describes the parts of a condition that make its value.
func (c *condition) why(s *Subject) string {
	met := c.met(s)
	switch c.Kind {
	case mesh.ConditionUnknown:
		return "a condition is not understood"
	case mesh.ConditionTrue:
		return "anything"
	case mesh.ConditionNot:
		if len(c.of) == 1 {
			return "not (" + c.of[0].why(s) + ")"
		}
	case mesh.ConditionAll, mesh.ConditionAny:
		var parts []string
		for i := range c.of {
			if c.of[i].met(s) == met {
				parts = append(parts, c.of[i].why(s))
			}
		}
		joint := " and "
		if (c.Kind == mesh.ConditionAny) == (met == yes) {
			return parts[0]
		}
		return strings.Join(parts, joint)
	}
	word := map[value]string{yes: "is", no: "is not", unknown: "may be"}[met]
	return fmt.Sprintf("%s %s %s", c.found(s), word, c.wanted())
}

// found describes what a condition looks at.
func (c *condition) found(s *Subject) string {
	switch c.Kind {
	case mesh.ConditionDestination:
		return "destination address " + s.Destination.Addr().String()
	case mesh.ConditionPort:
		return fmt.Sprintf("destination port %d", s.Destination.Port())
	case mesh.ConditionPeer:
		return "peer address " + known(s.Peer)
	case mesh.ConditionClient:
		return "client address " + known(s.Client)
	case mesh.ConditionServerName:
		return fmt.Sprintf("server name %q", s.ServerName)
	case mesh.ConditionPrincipal:
		if !s.Secured {
			return "principal of a connection without mutual TLS"
		}
		return fmt.Sprintf("principal %q", s.Names)
	}
	if s.Request == nil {
		return "a request, which is not looked at,"
	}
	switch c.Kind {
	case mesh.ConditionHeader:
		value, present := c.field(s.Request)
		if !present {
			return "header " + c.Header.Name + ", which is absent,"
		}
		return fmt.Sprintf("header %s %q", c.Header.Name, value)
	case mesh.ConditionMetadata:
		return "metadata " + c.Metadata.Filter + "/" + strings.Join(c.Metadata.Path, ".")
	}
	return fmt.Sprintf("path %q", pathOnly(s.Request.Path))
}

// known returns the text of an address that a question may lack.
func known(a netip.Addr) string {
	if !a.IsValid() {
		return "that is not given"
	}
	return a.String()
}

// wanted describes what a condition demands.
func (c *condition) wanted() string {
	switch c.Kind {
	case mesh.ConditionDestination, mesh.ConditionPeer, mesh.ConditionClient:
		return "in " + c.Addresses.String()
	case mesh.ConditionPort:
		if c.End == c.Start+1 {
			return fmt.Sprint(c.Start)
		}
		return fmt.Sprintf("in %d-%d", c.Start, c.End-1)
	case mesh.ConditionTemplate:
		return "of the form " + c.Template
	case mesh.ConditionMetadata:
		return "as demanded"
	case mesh.ConditionPrincipal:
		if c.Text == nil {
			return "any"
		}
	case mesh.ConditionHeader:
		return c.wantedHeader()
	}
	return describe(&c.text)
}

func (c *condition) wantedHeader() string {
	h := c.Header
	var wanted string
	switch h.Kind {
	case mesh.HeaderPresence:
		if wanted = "present"; !h.Present {
			wanted = "absent"
		}
	case mesh.HeaderRange:
		wanted = fmt.Sprintf("in %d-%d", h.Start, h.End-1)
	default:
		wanted = describe(&c.text)
	}
	if h.Invert {
		return "other than " + wanted
	}
	return wanted
}

// describe describes a matcher.
func describe(t *match.Text) string {
	kind := [...]string{
		mesh.MatchExact: "equal to", mesh.MatchPrefix: "with prefix", mesh.MatchSuffix: "with suffix",
		mesh.MatchContains: "with", mesh.MatchRegex: "a match of",
	}[t.Kind]
	return fmt.Sprintf("%s %q", kind, t.Want)
}
