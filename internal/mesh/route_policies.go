package mesh

import (
	"sort"

	"github.com/pillion-proxy/pillion/internal/wire"
)

// Types of what a route changes of a filter.
const (
	routeRBACType     = httpPrefix + "rbac.v3.RBACPerRoute"
	routeJWTType      = jwtPackage + "PerRouteConfig"
	routeExtAuthzType = extAuthzPackage + "ExtAuthzPerRoute"
	routeSessionType  = httpPrefix + "stateful_session.v3.StatefulSessionPerRoute"
)

var (
	routeRBACFields     = message{routeRBACType, Security, []field{2: {"rbac", once}}}
	routeJWTFields      = message{routeJWTType, Security, []field{1: {"disabled", choice}, 2: {"requirement_name", choice}}}
	routeExtAuthzFields = message{routeExtAuthzType, Security, []field{1: {"disabled", choice}, 2: {"check_settings", choice}}}
	routeSessionFields  = message{routeSessionType, Traffic, []field{1: {"disabled", ignored}, 2: {"stateful_session", traffic}}}
)

// routeRBAC returns the policy of a route. If it is absent, the filter is turned off.
func (d *decoder) routeRBAC(m wire.Message, filter string) RoutePolicy {
	p := RoutePolicy{Filter: filter, Disabled: true}
	for d.next(&m, &routeRBACFields) {
		p.Disabled, p.RBAC = false, d.httpRBAC(m.Message())
	}
	return p
}

func (d *decoder) routeJWT(m wire.Message, filter string) RoutePolicy {
	p := RoutePolicy{Filter: filter}
	for d.next(&m, &routeJWTFields) {
		switch m.Number {
		case 1:
			p.Disabled, p.Requirement = m.Bool(), ""
		case 2:
			p.Disabled, p.Requirement = false, m.String()
		}
	}
	if !p.Disabled && p.Requirement == "" {
		d.report(Security, emptyOverride)
	}
	return p
}

const emptyOverride = "a configuration of a route without content, which Envoy rejects"

func (d *decoder) routeExtAuthz(m wire.Message, filter string) RoutePolicy {
	p := RoutePolicy{Filter: filter}
	for d.next(&m, &routeExtAuthzFields) {
		switch m.Number {
		case 1:
			p.Disabled, p.Check = m.Bool(), nil
		case 2:
			p.Disabled, p.Check = false, d.checkSettings(m.Message())
		}
	}
	if !p.Disabled && p.Check == nil {
		d.report(Security, emptyOverride)
	}
	return p
}

var (
	checkSettingsFields = message{extAuthzPackage + "CheckSettings", Security, []field{
		1: {"context_extensions", decoded},
		2: {"disable_request_body_buffering", decoded},
		3: {"with_request_body", once},
		4: {"grpc_service", security}, // another server
		5: {"http_service", security},
		6: {"emit_client_span", ignored},
	}}

	contextEntryFields = message{extAuthzPackage + "CheckSettings.ContextExtensionsEntry", Security, []field{1: {"key", decoded}, 2: {"value", decoded}}}
)

func (d *decoder) checkSettings(m wire.Message) *CheckSettings {
	c := &CheckSettings{}
	for d.next(&m, &checkSettingsFields) {
		switch m.Number {
		case 1:
			c.Context = append(c.Context, d.contextEntry(m.Message()))
		case 2:
			c.NoBody = m.Bool()
		case 3:
			c.Body = d.authzBody(m.Message())
		}
	}
	sort.SliceStable(c.Context, func(i, j int) bool { return c.Context[i].Name < c.Context[j].Name })
	for i := 1; i < len(c.Context); i++ {
		if c.Context[i].Name == c.Context[i-1].Name {
			d.report(Security, "two values of "+c.Context[i].Name)
		}
	}
	return c
}

func (d *decoder) contextEntry(m wire.Message) (v NamedValue) {
	for d.next(&m, &contextEntryFields) {
		switch m.Number {
		case 1:
			v.Name = m.String()
		case 2:
			v.Value = m.String()
		}
	}
	return v
}
