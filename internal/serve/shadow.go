package serve

import (
	"strings"

	"github.com/pillion-proxy/pillion/internal/authz"
	"github.com/pillion-proxy/pillion/internal/envoy"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/match"
	"github.com/pillion-proxy/pillion/internal/mesh"
)

// shadows are the verdicts of policies that are not enforced. Policies of external authorization are such: a filter asks a
// server if one of them matches.
type shadows struct {
	list   []authz.Shadow
	denial string // why policies that are enforced have denied, while records are followed; see flow.DryRun
}

// add judges by the policies of r that are not enforced.
func (l *shadows) add(r *mesh.RBAC, s *authz.Subject) {
	if r.Shadow == nil {
		return
	}
	if shadow, ok := authz.Of(r).Shadow(s); ok {
		l.list = append(l.list, shadow)
	}
}

// explain explains the denial by one of policies, if records are followed. role may be nil.
func (l *shadows) explain(role *Role, s *authz.Subject, policies ...mesh.NetworkFilter) {
	if role == nil || !role.flows.Followed() {
		return
	}
	for i := range policies {
		if r := policies[i].RBAC; r != nil && authz.Of(r).Judge(s).Denied {
			l.denial = authz.Of(r).Denial(s)
			return
		}
	}
}

// clear drops the verdicts.
func (l *shadows) clear() { l.list, l.denial = l.list[:0], "" }

// dryRun returns the verdicts for a record; nil: there are none.
func (l *shadows) dryRun() (first *flow.DryRun) {
	if l.denial != "" {
		first = &flow.DryRun{Denied: true, Enforced: l.denial}
	}
	for i := len(l.list) - 1; i >= 0; i-- {
		s := &l.list[i]
		first = &flow.DryRun{Prefix: s.Prefix, Policy: s.Matched, Denied: s.Denied, Next: first}
	}
	return first
}

// match compares a verdict. One by rules that are not understood may be any: a filter that looks at it asks a server then.
func (l *shadows) match(m *mesh.MetadataMatcher) match.Value {
	key := ""
	if len(m.Path) == 1 {
		key = m.Path[0]
	}
	for i := range l.list {
		shadow := &l.list[i]
		name, ok := strings.CutPrefix(key, shadow.Prefix)
		switch {
		case !ok || name != envoy.DryRunPolicy && name != envoy.DryRunResult:
		case shadow.Refused:
			return match.Unknown
		case name == envoy.DryRunPolicy:
			return match.MatchText(m, shadow.Matched, shadow.Matched != "")
		default:
			return match.MatchText(m, result(shadow), true)
		}
	}
	return match.MatchText(m, "", false)
}

// result returns Envoy's word for a verdict.
func result(s *authz.Shadow) string {
	if s.Denied {
		return "denied"
	}
	return "allowed"
}
