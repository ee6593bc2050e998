package authz

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
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
		reasons[i] = p.enforced.policies[i].explain(s)
	}
	return reasons
}

func (p *policy) explain(s *Subject) Reason { return Reason{p.name, p.met(s).String(), p.why(s)} }

// String returns r as one line.
func (r *Reason) String() string {
	applies := map[string]string{"yes": "applies", "no": "does not apply", "unknown": "may apply"}[r.Met]
	return r.Policy + ": " + applies + ", since " + r.Why
}

// Bounds of an explanation.
const (
	maxExplained = 16      // policies
	maxLine      = 1 << 10 // bytes of a policy's line
	maxDenial    = 4 << 10 // bytes of all lines
	maxShown     = 128     // bytes of a value
	cutMark      = "…"
)

// Denial explains why the enforced policies deny s, a line for each policy. The first policies that fit the bounds are
// explained, the one that matches before the others, and the rest is counted. It allocates.
func (p *Policy) Denial(s *Subject) string {
	if p.refused || p.enforced.refused {
		return "the policies have a part that is not supported"
	}
	policies, matched := p.enforced.policies, p.enforced.judge(s).Matched
	if len(policies) == 0 {
		return "there is no policy that allows anything"
	}
	var lines []string
	room := maxDenial
	for _, matching := range []bool{true, false} {
		for i := range policies {
			if (policies[i].name == matched) != matching {
				continue
			}
			reason := policies[i].explain(s)
			line := cut(reason.String(), maxLine)
			if room -= len(line); len(lines) == maxExplained || room < 0 {
				return strings.Join(append(lines, fmt.Sprintf("and %d more", len(policies)-len(lines))), "\n")
			}
			lines = append(lines, line)
		}
	}
	return strings.Join(lines, "\n")
}

// cut shortens text to a number of bytes.
func cut(text string, most int) string {
	if len(text) <= most {
		return text
	}
	return strings.ToValidUTF8(text[:most-len(cutMark)], "") + cutMark
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
		for i, size := 0, 0; i < len(c.of) && size < maxLine; i++ { // the rest would be cut
			if c.of[i].met(s) == met {
				part := c.of[i].why(s)
				size += len(part)
				parts = append(parts, part)
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
		return "server name " + quoted(s.ServerName)
	case mesh.ConditionPrincipal:
		if !s.Secured {
			return "principal of a connection without mutual TLS"
		}
		return fmt.Sprintf("principal %.*q", maxShown, s.Names[:min(len(s.Names), 4)])
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
		if isSecret(c.Header.Name) {
			return "header " + c.Header.Name + ", whose value is not shown,"
		}
		return "header " + c.Header.Name + " " + quoted(head(value))
	case mesh.ConditionMetadata:
		return "metadata " + c.Metadata.Filter + "/" + strings.Join(c.Metadata.Path, ".")
	}
	return "path " + quoted(head(pathOnly(s.Request.Path)))
}

// quoted returns the beginning of a text in quotes.
func quoted(text string) string { return strconv.Quote(cut(text, maxShown)) }

// head returns as much of a value as quoted looks at.
func head(value []byte) string { return string(value[:min(len(value), maxShown+1)]) }

// isSecret reports whether a header field may have a credential.
func isSecret(name string) bool {
	name = strings.ToLower(name)
	return !strings.HasPrefix(name, ":") && slices.ContainsFunc(secrets[:], func(word string) bool { return strings.Contains(name, word) })
}

var secrets = [...]string{"auth", "cookie", "token", "secret", "password", "key", "session", "jwt", "credential", "signature"}

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
		if wanted = describe(&c.text); isSecret(h.Name) {
			wanted = "as demanded"
		}
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
	return kind + " " + quoted(t.Want)
}
