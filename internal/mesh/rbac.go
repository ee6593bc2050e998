package mesh

import (
	"net/netip"
	"slices"
	"sort"
	"strings"
	"sync/atomic"

	"github.com/pillion-proxy/pillion/internal/wire"
)

// RBAC decides whether a connection or a request is allowed (envoy.extensions.filters.network.rbac.v3.RBAC and
// envoy.extensions.filters.http.rbac.v3.RBAC). Values are shared between the filter chains of a listener.
type RBAC struct {
	// Rules is nil if the filter has no opinion: all is allowed. Rules without policies are something else: with the
	// action Allow, all is denied.
	Rules *Rules

	Shadow       *Rules // evaluated and recorded, never enforced; may be nil
	ShadowPrefix string // of the names under which the result of Shadow is recorded

	Refused bool // something outside of the rules is not understood, so all is denied

	Compiled atomic.Value `json:"-"` // of package authz, which sets it when the policy is first applied
}

// Restricts reports whether r can deny anything.
func (r *RBAC) Restricts() bool {
	if r.Refused || r.Rules == nil {
		return r.Refused
	}
	return r.Rules.Refused || r.Rules.Action == Allow || r.Rules.Action == Deny && len(r.Rules.Policies) > 0
}

// Rules are policies and what becomes of what they match (envoy.config.rbac.v3.RBAC).
type Rules struct {
	Action   Action
	Policies []AccessPolicy // in the order of their names, in which the first that matches is recorded

	Refused bool // something outside of the policies is not understood, so all is denied
}

// Action is what becomes of what a policy matches.
type Action uint8

// The actions, with Envoy's numbers. Conditions have three values, since one that is not understood is Unknown.
const (
	Allow Action = iota // only what a policy matches with certainty is allowed
	Deny                // what a policy matches, or may match, is denied
	Log                 // all is allowed
)

// AccessPolicy matches if both of its conditions are met (envoy.config.rbac.v3.Policy).
type AccessPolicy struct {
	Name       string
	Permission Condition // on what is done
	Principal  Condition // on who does it
	Unknown    bool      // it has another part that is not understood, so it never matches with certainty
}

// Condition is a tree of matchers (envoy.config.rbac.v3.Permission and Principal).
type Condition struct {
	Kind ConditionKind
	Of   []Condition // of ConditionAll and ConditionAny: more than one; of ConditionNot: one

	Text       *StringMatcher // of ConditionPrincipal, ConditionPath and ConditionServerName
	Template   string         // of ConditionTemplate
	Header     *HeaderMatcher
	Metadata   *MetadataMatcher
	Addresses  netip.Prefix // of ConditionDestination, ConditionPeer and ConditionClient
	Start, End int32        // of ConditionPort: Start ≤ port < End
}

// ConditionKind is how a Condition matches.
type ConditionKind uint8

// The kinds. A ConditionUnknown is not understood, and reported. Its value is neither true nor false, and so may be that of
// a condition that it is a part of.
const (
	ConditionUnknown     ConditionKind = iota
	ConditionTrue                      // always met
	ConditionAll                       // all of its parts are met
	ConditionAny                       // a part is met
	ConditionNot                       // its part is not met
	ConditionHeader                    // of a request
	ConditionPath                      // of a request, normalized, without query and fragment
	ConditionTemplate                  // of the same path
	ConditionMetadata                  // that a filter left, such as a claim of a token
	ConditionDestination               // the original destination's address
	ConditionPort                      // the original destination's port
	ConditionServerName                // of the ClientHello
	ConditionPrincipal                 // a name in the client's certificate; without Text, any certificate
	ConditionPeer                      // the address of the TCP connection's peer, whatever a PROXY header has
	ConditionClient                    // the client's address, from X-Forwarded-For or a PROXY header if that is configured
)

// maxConditions bounds the conditions of one resource. A condition takes more than 100 bytes, but may be encoded in two.
const maxConditions = 100_000

var networkRBACFields = message{networkRBACType, Security, []field{
	1: {"rules", once},
	2: {"shadow_rules", once},
	3: {"stat_prefix", ignored},
	4: {"enforcement_type", decoded},
	5: {"shadow_rules_stat_prefix", decoded},
	6: {"matcher", security},
	7: {"shadow_matcher", security},
	8: {"delay_deny", traffic},
}}

// networkRBAC returns a policy of connections. It is judged once for a connection.
func (d *decoder) networkRBAC(m wire.Message) *RBAC {
	r := &RBAC{}
	own := d.refusals
	for d.next(&m, &networkRBACFields) {
		switch m.Number {
		case 1:
			own += d.enforcedRules(m.Message(), &r.Rules)
		case 2:
			d.shadowRules(m.Message(), &r.Shadow)
		case 4:
			if m.Uint64() != 0 {
				d.report(Security, "connections are judged once only")
			}
		case 5:
			r.ShadowPrefix = m.String()
		}
	}
	r.Refused = d.refusals > own
	return r
}

var httpRBACFields = message{rbacType, Security, []field{
	1: {"rules", once},
	2: {"shadow_rules", once},
	3: {"shadow_rules_stat_prefix", decoded},
	4: {"matcher", security},
	5: {"shadow_matcher", security},
	6: {"rules_stat_prefix", ignored},
	7: {"track_per_rule_stats", ignored},
}}

// httpRBAC returns a policy of requests.
func (d *decoder) httpRBAC(m wire.Message) *RBAC {
	r := &RBAC{}
	own := d.refusals
	for d.next(&m, &httpRBACFields) {
		switch m.Number {
		case 1:
			own += d.enforcedRules(m.Message(), &r.Rules)
		case 2:
			d.shadowRules(m.Message(), &r.Shadow)
		case 3:
			r.ShadowPrefix = m.String()
		}
	}
	r.Refused = d.refusals > own
	return r
}

var rulesFields = message{"envoy.config.rbac.v3.RBAC", Security, []field{
	1: {"action", decoded},
	2: {"policies", decoded},
	3: {"audit_logging_options", traffic},
}}

// enforcedRules sets r. Findings in rules that only log restrict nothing.
func (d *decoder) enforcedRules(m wire.Message, r **Rules) (refusals int) {
	action := Allow
	for m := m; m.Next(); {
		if m.Number == 1 {
			action = Action(m.Uint64())
		}
	}
	if action == Log {
		d.shadowRules(m, r)
		return 0
	}
	return d.rules(m, r)
}

// shadowRules sets r to rules that are not enforced. Findings in them restrict nothing.
func (d *decoder) shadowRules(m wire.Message, r **Rules) {
	shadow := d.shadow
	d.shadow = true
	d.refusals -= d.rules(m, r)
	d.shadow = shadow
}

// rules sets r. It returns the number of findings in them. Those outside of the policies refuse the rules.
func (d *decoder) rules(m wire.Message, r **Rules) (refusals int) {
	before, own := d.refusals, d.refusals
	rules := &Rules{}
	*r = rules
	for d.next(&m, &rulesFields) {
		switch m.Number {
		case 1:
			rules.Action = Action(d.enum(&m, uint64(Log)))
		case 2:
			start := d.refusals
			policy := d.policyEntry(m.Message())
			own += d.refusals - start
			rules.Policies = append(rules.Policies, policy)
		}
	}
	sort.SliceStable(rules.Policies, func(i, j int) bool { return rules.Policies[i].Name < rules.Policies[j].Name })
	for i := 1; i < len(rules.Policies); i++ {
		if rules.Policies[i].Name == rules.Policies[i-1].Name { // protobuf keeps the last one only
			d.report(Security, "two policies with the name "+rules.Policies[i].Name)
		}
	}
	rules.Refused = d.refusals > own
	return d.refusals - before
}

var (
	policyEntryFields = message{"envoy.config.rbac.v3.RBAC.PoliciesEntry", Security, []field{1: {"key", decoded}, 2: {"value", once}}}

	policyFields = message{"envoy.config.rbac.v3.Policy", Security, []field{
		1: {"permissions", decoded},
		2: {"principals", decoded},
		3: {"condition", security}, // an expression of CEL
		4: {"checked_condition", security},
		5: {"cel_config", ignored}, // of a condition
	}}
)

// policyEntry returns a policy with its name.
func (d *decoder) policyEntry(m wire.Message) (p AccessPolicy) {
	before, inner := d.refusals, d.refusals
	for d.next(&m, &policyEntryFields) {
		switch m.Number {
		case 1:
			p.Name = m.String()
		case 2:
			start := d.refusals
			d.accessPolicy(m.Message(), &p)
			inner += d.refusals - start
		}
	}
	p.Unknown = p.Unknown || d.refusals > inner
	if d.refusals == before && (p.Permission.Kind == ConditionUnknown || p.Principal.Kind == ConditionUnknown) {
		d.report(Security, "a policy without permissions or principals")
	}
	return p
}

// accessPolicy reads what a policy matches: any of its permissions by any of its principals.
func (d *decoder) accessPolicy(m wire.Message, p *AccessPolicy) {
	var permissions, principals []Condition
	own := d.refusals
	for d.next(&m, &policyFields) {
		start := d.refusals
		switch m.Number {
		case 1:
			permissions = append(permissions, d.permission(m.Message()))
		case 2:
			principals = append(principals, d.principal(m.Message()))
		}
		own += d.refusals - start
	}
	p.Unknown = d.refusals > own
	p.Permission, p.Principal = combine(ConditionAny, permissions), combine(ConditionAny, principals)
}

// combine returns all or any of conditions. A single condition is returned as it is. Without conditions the result is not
// understood, because Envoy rejects that.
func combine(kind ConditionKind, of []Condition) Condition {
	switch len(of) {
	case 0:
		return Condition{}
	case 1:
		return of[0]
	}
	return Condition{Kind: kind, Of: slices.Clip(of)}
}

var permissionFields = message{"envoy.config.rbac.v3.Permission", Security, []field{
	1:  {"and_rules", choice},
	2:  {"or_rules", choice},
	3:  {"any", choice},
	4:  {"header", choice},
	5:  {"destination_ip", choice},
	6:  {"destination_port", choice},
	7:  {"metadata", choice},
	8:  {"not_rule", choice},
	9:  {"requested_server_name", choice},
	10: {"url_path", choice},
	11: {"destination_port_range", choice},
	12: {"matcher", security},
	13: {"uri_template", choice},
	14: {"sourced_metadata", security},
}}

var permissionSetFields = message{"envoy.config.rbac.v3.Permission.Set", Security, []field{1: {"rules", decoded}}}

// permission returns a condition on what is done. Findings outside of its parts leave it unknown.
func (d *decoder) permission(m wire.Message) (c Condition) {
	if !d.mayRead() {
		return Condition{}
	}
	own, set := d.refusals, false
	for d.next(&m, &permissionFields) {
		start := d.refusals
		set = true
		switch m.Number {
		case 1:
			c = d.conditionSet(m.Message(), &permissionSetFields, ConditionAll, d.permission)
		case 2:
			c = d.conditionSet(m.Message(), &permissionSetFields, ConditionAny, d.permission)
		case 3:
			c = d.always(&m)
		case 4:
			c = Condition{Kind: ConditionHeader, Header: new(d.headerMatcher(m.Message()))}
		case 5:
			c = Condition{Kind: ConditionDestination, Addresses: d.prefix(m.Message())}
		case 6:
			port := int32(d.port(uint32(m.Uint64())))
			c = Condition{Kind: ConditionPort, Start: port, End: port + 1}
		case 7:
			c = Condition{Kind: ConditionMetadata, Metadata: new(d.metadataMatcher(m.Message()))}
		case 8:
			c = Condition{Kind: ConditionNot, Of: []Condition{d.permission(m.Message())}}
		case 9:
			c = Condition{Kind: ConditionServerName, Text: new(d.stringMatcher(m.Message()))}
		case 10:
			c = Condition{Kind: ConditionPath, Text: d.pathMatcher(m.Message())}
		case 11:
			c = Condition{Kind: ConditionPort}
			c.Start, c.End = d.portRange(m.Message())
		case 13:
			c = Condition{Kind: ConditionTemplate, Template: d.uriTemplate(m.Message())}
		}
		if m.Number == 1 || m.Number == 2 || m.Number == 8 {
			own += d.refusals - start
		}
	}
	return d.condition(c, set, own)
}

var (
	principalFields = message{"envoy.config.rbac.v3.Principal", Security, []field{
		1:  {"and_ids", choice},
		2:  {"or_ids", choice},
		3:  {"any", choice},
		4:  {"authenticated", choice},
		5:  {"source_ip", security},
		6:  {"header", choice},
		7:  {"metadata", choice},
		8:  {"not_id", choice},
		9:  {"url_path", choice},
		10: {"direct_remote_ip", choice},
		11: {"remote_ip", choice},
		12: {"filter_state", security},
		13: {"sourced_metadata", security},
		14: {"custom", security},
	}}

	principalSetFields  = message{"envoy.config.rbac.v3.Principal.Set", Security, []field{1: {"ids", decoded}}}
	authenticatedFields = message{"envoy.config.rbac.v3.Principal.Authenticated", Security, []field{2: {"principal_name", once}}}
)

// principal returns a condition on who does something. Findings outside of its parts leave it unknown.
func (d *decoder) principal(m wire.Message) (c Condition) {
	if !d.mayRead() {
		return Condition{}
	}
	own, set := d.refusals, false
	for d.next(&m, &principalFields) {
		start := d.refusals
		set = true
		switch m.Number {
		case 1:
			c = d.conditionSet(m.Message(), &principalSetFields, ConditionAll, d.principal)
		case 2:
			c = d.conditionSet(m.Message(), &principalSetFields, ConditionAny, d.principal)
		case 3:
			c = d.always(&m)
		case 4:
			c = Condition{Kind: ConditionPrincipal}
			for m := m.Message(); d.next(&m, &authenticatedFields); {
				c.Text = new(d.stringMatcher(m.Message()))
			}
		case 6:
			c = Condition{Kind: ConditionHeader, Header: new(d.headerMatcher(m.Message()))}
		case 7:
			c = Condition{Kind: ConditionMetadata, Metadata: new(d.metadataMatcher(m.Message()))}
		case 8:
			c = Condition{Kind: ConditionNot, Of: []Condition{d.principal(m.Message())}}
		case 9:
			c = Condition{Kind: ConditionPath, Text: d.pathMatcher(m.Message())}
		case 10:
			c = Condition{Kind: ConditionPeer, Addresses: d.prefix(m.Message())}
		case 11:
			c = Condition{Kind: ConditionClient, Addresses: d.prefix(m.Message())}
		}
		if m.Number == 1 || m.Number == 2 || m.Number == 8 {
			own += d.refusals - start
		}
	}
	return d.condition(c, set, own)
}

// mayRead counts a condition. It reports whether there may be another one.
func (d *decoder) mayRead() bool {
	d.conditions++
	if d.conditions > maxConditions {
		d.report(Security, "more conditions than are supported")
	}
	return d.conditions <= maxConditions
}

// condition returns c, unless there are more findings than own: then it is not understood. One that is not set is reported.
func (d *decoder) condition(c Condition, set bool, own int) Condition {
	if d.refusals > own {
		return Condition{}
	}
	if !set {
		d.report(Security, "a condition without a matcher")
	}
	return c
}

// conditionSet returns all or any of the conditions in a set. Findings outside of the conditions leave it unknown.
func (d *decoder) conditionSet(
	m wire.Message, table *message, kind ConditionKind, element func(wire.Message) Condition,
) Condition {
	var of []Condition
	own := d.refusals
	for d.next(&m, table) {
		start := d.refusals
		of = append(of, element(m.Message()))
		own += d.refusals - start
	}
	if len(of) == 0 && d.refusals == own {
		d.report(Security, "an empty set of conditions")
	}
	if d.refusals > own {
		return Condition{}
	}
	return combine(kind, of)
}

// always returns a condition that is always met. Envoy rejects one that would never be.
func (d *decoder) always(m *wire.Message) Condition {
	if !m.Bool() {
		d.report(Security, "false, which Envoy rejects")
	}
	return Condition{Kind: ConditionTrue}
}

// prefix returns a range of addresses.
func (d *decoder) prefix(m wire.Message) netip.Prefix {
	var ranges []netip.Prefix
	if d.cidrRange(m, &ranges); len(ranges) == 0 {
		return netip.Prefix{}
	}
	return ranges[0]
}

func (d *decoder) portRange(m wire.Message) (start, end int32) {
	for d.next(&m, &portRangeFields) {
		switch m.Number {
		case 1:
			start = int32(m.Uint64())
		case 2:
			end = int32(m.Uint64())
		}
	}
	return start, end
}

var pathMatcherFields = message{"envoy.type.matcher.v3.PathMatcher", Security, []field{1: {"path", choice}}}

func (d *decoder) pathMatcher(m wire.Message) (text *StringMatcher) {
	for d.next(&m, &pathMatcherFields) {
		text = new(d.stringMatcher(m.Message()))
	}
	if text == nil {
		d.report(Security, "a matcher of paths without a pattern")
	}
	return text
}

var (
	extensionFields = message{"envoy.config.core.v3.TypedExtensionConfig", Security, []field{
		1: {"name", ignored}, // the type counts
		2: {"typed_config", once},
	}}

	uriTemplateFields = message{"envoy.extensions.path.match.uri_template.v3.UriTemplateMatchConfig", Security, []field{1: {"path_template", decoded}}}
)

// uriTemplate returns a template of paths. In it, a segment * stands for one segment, and ** for any number of them. Other
// templates are reported.
func (d *decoder) uriTemplate(m wire.Message) (template string) {
	for d.next(&m, &extensionFields) {
		url, value := d.any(m.Message())
		if url != typePrefix+uriTemplateFields.name {
			d.report(Security, "matchers of type "+shortType(url)+" are not supported")
			continue
		}
		for m := m.Nested(value); d.next(&m, &uriTemplateFields); {
			template = m.String()
		}
	}
	if !isTemplate(template) {
		d.report(Security, "a template of paths that is not supported")
	}
	return template
}

// isTemplate reports whether text is a template of segments that are literal, * or **. After ** they have to be literal.
func isTemplate(text string) bool {
	rest, ok := strings.CutPrefix(text, "/")
	for last := false; ok && rest != ""; {
		var segment string
		segment, rest, _ = strings.Cut(rest, "/")
		operator := segment == "*" || segment == "**"
		if operator && last || !operator && strings.ContainsAny(segment, "*{}=") {
			return false
		}
		last = last || segment == "**"
	}
	return ok
}
