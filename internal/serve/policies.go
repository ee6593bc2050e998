package serve

import (
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/pillion-proxy/pillion/internal/authz"
	"github.com/pillion-proxy/pillion/internal/envoy"
	"github.com/pillion-proxy/pillion/internal/extauthz"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/httpforward"
	"github.com/pillion-proxy/pillion/internal/jwt"
	"github.com/pillion-proxy/pillion/internal/match"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/route"
	"github.com/pillion-proxy/pillion/internal/tcp"
	"github.com/pillion-proxy/pillion/internal/urlpath"
)

// Authorize applies the policies of a connection's filter chain to the connection. Those of its requests are applied to each of
// them. Call it when the client is known, and before anything is dialled on its behalf.
func (c *Conn) Authorize() bool {
	g := c.governed
	if g == nil {
		return true
	}
	if !c.renew(g) {
		return false
	}
	if g.chain == nil || len(g.chain.Policies) == 0 {
		return true
	}
	subject := c.subject()
	policy, denied := authorize(g.chain.Policies, &subject)
	if c.recordVerdicts(g.chain.Policies, &subject, denied); denied {
		c.Record.SetDenial("", envoy.DeniedByPolicy(policy))
		return c.abandon(flow.PolicyDenied, deniedBy(policy))
	}
	if g.asked == g.chain && g.askedSecured == g.secured {
		return true
	}
	g.asked, g.askedSecured = g.chain, g.secured
	return c.authorizeByServers(g, &subject)
}

// recordVerdicts records the verdicts about a connection of policies that are not enforced, without those that select
// connections for external authorization, and explains that others have denied it.
func (c *Conn) recordVerdicts(policies []mesh.NetworkFilter, s *authz.Subject, denied bool) {
	var dry shadows
	if denied {
		dry.explain(c.role, s, policies...)
	}
	for i := range policies {
		if r := policies[i].RBAC; r != nil && strings.HasPrefix(r.ShadowPrefix, flow.DryRunPrefix) {
			dry.add(r, s)
		}
	}
	if verdicts := dry.dryRun(); verdicts != nil {
		c.Record.SetDryRun(verdicts)
	}
}

// explainDenial explains the denial of a connection that was carried. The connection leaves the table first, because its
// readers read the record.
func (c *Conn) explainDenial(explain func(*shadows) (details string)) {
	var l shadows
	details := explain(&l)
	c.role.flows.Leave(c.Record)
	if c.Record.SetDenial("", details); l.denial == "" {
		return
	}
	verdict := l.dryRun()
	verdict.Next = c.Record.HTTP.DryRun
	c.Record.SetDryRun(verdict)
}

// authorizeByServers asks the servers of a chain's policies about the connection.
func (c *Conn) authorizeByServers(g *governed, s *authz.Subject) bool {
	var shadows shadows
	for i := range g.chain.Policies {
		p := &g.chain.Policies[i]
		if p.RBAC != nil {
			shadows.add(p.RBAC, s)
		}
		e := p.ExtAuthz
		switch {
		case e == nil || e.Shadow:
			continue
		case e.Refused:
			return c.abandon(flow.MeshRefused, errRefusedServer)
		case e.When != nil && e.When.Filter == networkRBACFilter && shadows.match(e.When) == match.No:
			continue // what other filters of Envoy leave is not known; see gate.Match
		}
		denial, ok := c.askAbout(e, s)
		switch {
		case !ok && errors.Is(denial, tcp.ErrCanceled):
			return c.abandon(flow.DrainDeadline, nil)
		case !ok:
			return c.abandon(flow.DownstreamLeft, denial)
		case denial != nil:
			c.Record.SetDenial(extauthz.FlagUnauthorized, extauthz.DetailsOf(denial != errDeniedByServer))
			return c.abandon(flow.PolicyDenied, denial)
		}
	}
	return true
}

var errRefusedServer = errors.New("its external authorization is configured in a way that is not supported")

// renew judges a connection inside TLS by the configuration in force now: its client chose how long the handshake took, and
// how long it was silent after it.
func (c *Conn) renew(g *governed) bool {
	s := c.role.mesh.Snapshot()
	if !g.secured || s == g.snapshot {
		return true
	}
	info := c.infoInside()
	if !c.role.admits(s, &info, g.ended) {
		return c.abandon(flow.MeshRefused, errChangedMode)
	}
	chain, refusal := c.role.meet(s, &info)
	if refusal != "" {
		return c.abandon(flow.MeshRefused, errors.New(refusal))
	}
	g.snapshot, g.chain = s, chain
	if g.shown != nil && chain.HTTP == nil {
		return c.abandon(flow.MeshRefused, errChangedMode)
	}
	c.Record.Ask(c.role.recorded(s, chain))
	return c.expect(chain)
}

var errChangedMode = errors.New("since its handshake began the configuration has changed, and does not end TLS here, asks more of clients, or carries no HTTP")

// subject returns the connection as policies see it.
func (c *Conn) subject() authz.Subject {
	hello := c.Record.TLS()
	if !c.governed.secured {
		hello = c.sniffer.Hello
	}
	return authz.Subject{
		Destination: c.Record.OriginalDestination,
		Peer:        c.Record.Direct().Addr(),
		Client:      c.Record.Downstream.Addr(),
		ServerName:  strings.ToLower(hello.ServerName),
		Secured:     c.governed.secured,
		Names:       c.governed.names,
	}
}

// authorize applies network policies in their order. It returns the name of the policy that denies.
func authorize(policies []mesh.NetworkFilter, s *authz.Subject) (policy string, denied bool) {
	for i := range policies {
		if r := policies[i].RBAC; r != nil {
			if v := authz.Of(r).Judge(s); v.Denied {
				return v.Matched, true
			}
		}
	}
	return "", false
}

func deniedBy(policy string) error {
	if policy == "" {
		return errNotAllowed
	}
	return fmt.Errorf("the authorization policy %s denies it", policy)
}

var errNotAllowed = errors.New("no authorization policy allows it")

// gate applies the configuration of HTTP to the requests of one connection: the normal form of their paths, and policies in
// the order of the filters. Its memory is reused from request to request.
type gate struct {
	role    *Role         // nil: no server can be asked
	subject authz.Subject // of the connection; its Request is request while a request is judged
	request authz.Request
	path    []byte // a normal form that differs from the path as it was received

	// What filters leave about the request that was judged last.
	edits     []route.Edit
	responses []route.Edit   // of its response
	claims    *jwt.Claims    // nil: no token was verified
	asked     match.Metadata // of a server that was asked; may be nil
	shadows   shadows
	edited    editedFields // of the request, after edits

	chosen chosen

	forbidden []string // fields that filters make
	queried   bool     // a server has changed the query
	collect   uint32   // how much of the request's body is needed, with bodyFirst

	routed route.Request // the argument of filters; a field, so that it is not allocated
}

// pass returns the reply to a request that must not pass, or nil. It sets the request's path to its normal form. changed
// reports whether that differs from the path as it was received. A question has to be answered first; the request is
// passed again then.
func (g *gate) pass(s *mesh.Snapshot, h *mesh.HTTPManager, r *httpforward.Request) (changed bool, reply *route.Reply, waits *question) {
	g.begin()
	if changed, reply = g.normalize(h, r); reply != nil {
		return changed, reply, nil
	}
	judged := false
	for i := range h.Filters {
		f := s.Filter(&h.Filters[i])
		if f == nil || f.Refused {
			return changed, route.Refused, nil // Inbound refuses the connection as well
		}
		var now bool
		now, reply, waits = g.apply(h, r, f)
		if reply != nil || waits != nil {
			return changed, reply, waits
		}
		judged = judged || now
	}
	switch gateway := g.role != nil && g.role.gateway; {
	case judged && isTunnel(r): // requests inside of it would not be judged; Envoy answers 403 as well
		return changed, denial(""), nil
	case gateway && isTunnel(r):
		return changed, route.NoRoute, nil // requests inside of it would not be routed
	case (judged || gateway) && len(r.Upgrade) > 0 && !mayUpgrade(h, r.Upgrade):
		return changed, route.NoUpgrade, nil // for both reasons: the protocol may carry requests
	}
	return changed || g.queried, nil, nil
}

// begin drops what filters have left about the last request.
func (g *gate) begin() {
	g.edits, g.responses, g.claims, g.asked, g.subject.Request = nil, nil, nil, nil, nil
	g.queried, g.forbidden = false, nil
	g.shadows.clear()
	g.edited.clear()
	g.chosen.begin()
}

// Names of filters under which they leave metadata.
const (
	jwtFilter         = "envoy.filters.http.jwt_authn"
	rbacFilter        = "envoy.filters.http.rbac"
	networkRBACFilter = "envoy.filters.network.rbac"
	extAuthzFilter    = "envoy.filters.http.ext_authz"
)

// Match implements authz.Metadata, for what the filters so far have left. What other filters of Envoy leave is not known.
func (g *gate) Match(m *mesh.MetadataMatcher) match.Value {
	switch m.Filter {
	case jwtFilter:
		return g.claims.Match(m)
	case rbacFilter:
		return g.shadows.match(m)
	case extAuthzFilter:
		return g.asked.Match(m)
	}
	return match.Unknown // Envoy may have a filter that leaves it: a policy must not be void without that
}

// isTunnel reports whether a request asks for a tunnel by CONNECT. Over HTTP/2, CONNECT with a path opens a WebSocket (RFC 8441). Over
// HTTP/1 it is malformed, and servers that serve it like another request let a client send further ones through the tunnel.
func isTunnel(r *httpforward.Request) bool {
	return string(r.Method) == http.MethodConnect && (r.Protocol < flow.HTTP2 || len(r.Path) == 0 || r.Path[0] != '/')
}

// mayUpgrade reports whether h has a protocol that a request asks for.
func mayUpgrade(h *mesh.HTTPManager, protocol []byte) bool {
	return slices.ContainsFunc(h.Upgrades, func(u mesh.Upgrade) bool { return !u.Disabled && strings.EqualFold(u.Protocol, string(protocol)) })
}

// authorize applies a policy of requests.
func (g *gate) authorize(h *mesh.HTTPManager, r *httpforward.Request, rbac *mesh.RBAC) *route.Reply {
	if g.subject.Request == nil {
		if !r.Absolute && otherHost(r) != nil {
			return badHost
		}
		g.describe(r)
	}
	policy := authz.Of(rbac)
	if policy.LooksAtClient() { // looked up only then, because it allocates
		g.subject.Client = clientAddress(h, r, g.subject.Peer)
	}
	g.shadows.add(rbac, &g.subject)
	if v := policy.Judge(&g.subject); v.Denied {
		g.shadows.explain(g.role, &g.subject, mesh.NetworkFilter{RBAC: rbac})
		return denial(v.Matched)
	}
	return nil
}

// authenticate verifies the tokens of a request. Filters behind it see their claims. own is what the route requires; nil: the
// filter's rules count.
func (g *gate) authenticate(r *httpforward.Request, filter *mesh.JWT, own *mesh.RoutePolicy) (reply *route.Reply, waits *question) {
	g.routed = route.Request{
		Method: r.Method, Path: r.Path, Authority: r.Authority, Scheme: r.Scheme, Fields: g.fields(r),
		Downstream: r.Connection.Downstream, Local: r.Connection.OriginalDestination,
	}
	g.forbid(jwt.Of(filter).Own())
	var keys jwt.Keys
	if g.role != nil && g.role.keys != nil {
		keys = g.role.keys
		for i := range filter.Providers {
			if from := filter.Providers[i].Remote; from != nil {
				g.role.keys.Early(from)
			}
		}
	}
	required := jwt.ByRules
	if own != nil {
		required = jwt.Requirement{Own: true, Name: own.Requirement}
	}
	result := jwt.Of(filter).Check(&g.routed, required, time.Now(), keys)
	if result.Awaited != nil {
		before, _ := r.Check.(*question)
		if waits = g.role.awaitKeys(result.Awaited, before); waits != nil {
			return nil, waits
		}
		result = jwt.Of(filter).Check(&g.routed, required, time.Now(), present{keys})
	}
	if result.Claims != nil {
		g.claims = result.Claims
	}
	if result.Reroute {
		g.chosen.again()
	}
	if len(result.Edits) > 0 {
		g.edits = append(g.edits, result.Edits...)
		g.edited.set(r.Fields, g.edits)
		g.subject.Request = nil // described again
	}
	return result.Reply, nil
}

// forbid adds fields that clients must not send in trailers.
func (g *gate) forbid(names []string) {
	if g.forbidden == nil {
		g.forbidden = slices.Clip(names)
	} else {
		g.forbidden = append(g.forbidden, names...)
	}
}

// fields returns the header fields of a request as the filters so far have left them: a policy that looks at the field of a
// claim must not see the one that the client has sent.
func (g *gate) fields(r *httpforward.Request) httpforward.HeaderFields {
	if len(g.edits) == 0 {
		return r.Fields
	}
	return &g.edited
}

// editedFields are header fields after edits.
type editedFields struct{ list []editedField }

type editedField struct{ name, value []byte }

// set sets the fields that edits make of others. The edits remove fields, or add constants.
func (f *editedFields) set(fields httpforward.HeaderFields, edits []route.Edit) {
	f.clear()
	for i := range fields.Len() {
		name, value := fields.At(i)
		f.list = append(f.list, editedField{name, value})
	}
	for i := range edits {
		e := &edits[i]
		named := func(field editedField) bool { return strings.EqualFold(string(field.name), e.Name) }
		present := slices.ContainsFunc(f.list, named)
		if e.Remove || e.Action == mesh.OverwriteOrAdd || e.Action == mesh.OverwriteIfPresent {
			f.list = slices.DeleteFunc(f.list, named)
		}
		if !e.Remove && !(e.Action == mesh.AddIfAbsent && present) && !(e.Action == mesh.OverwriteIfPresent && !present) {
			f.list = append(f.list, editedField{[]byte(e.Name), e.AppendValue(nil, nil)})
		}
	}
}

// clear drops the fields, and keeps the memory of the list.
func (f *editedFields) clear() {
	clear(f.list)
	f.list = f.list[:0]
}

// Len implements httpforward.HeaderFields.
func (f *editedFields) Len() int { return len(f.list) }

// At implements httpforward.HeaderFields.
func (f *editedFields) At(i int) (name, value []byte) { return f.list[i].name, f.list[i].value }

// describe sets the request that policies see.
func (g *gate) describe(r *httpforward.Request) {
	g.subject.Client = g.subject.Peer
	g.request = authz.Request{
		Method: r.Method, Authority: r.Authority, Scheme: r.Scheme, Path: r.Path, Fields: g.fields(r),
		Metadata: g, Scratch: g.request.Scratch,
	}
	if isTunnel(r) {
		g.request.Path = nil // HTTP/1 has the authority there
	}
	g.subject.Request = &g.request
}

// denial is the reply to a request that a policy denies.
func denial(policy string) *route.Reply {
	return &route.Reply{
		Status: http.StatusForbidden, Body: "RBAC: access denied", Details: envoy.DeniedByPolicy(policy), Reason: flow.PolicyDenied, Edited: true,
	}
}

// slashes are the treatments of escaped slashes.
var slashes = [...]urlpath.Slashes{
	mesh.DefaultEscapedSlashes:  urlpath.KeepSlashes,
	mesh.KeepEscapedSlashes:     urlpath.KeepSlashes,
	mesh.RejectEscapedSlashes:   urlpath.RejectSlashes,
	mesh.RedirectEscapedSlashes: urlpath.RedirectSlashes,
	mesh.UnescapeSlashes:        urlpath.UnescapeSlashes,
}

// normalize sets the request's path to its normal form. Policies, routes and the server see that.
func (g *gate) normalize(h *mesh.HTTPManager, r *httpforward.Request) (changed bool, reply *route.Reply) {
	switch {
	case r.Attempt > 0:
		return false, nil // it is normal since the first attempt
	case len(r.Path) > 0 && r.Path[0] == '/':
	case string(r.Method) == "CONNECT", string(r.Path) == "*" && string(r.Method) == "OPTIONS":
		return false, nil
	default:
		return false, badPath
	}
	form := urlpath.Form{Normalize: h.NormalizePath, MergeSlashes: h.MergeSlashes, Slashes: slashes[h.EscapedSlashes]}
	form.Strict = g.role != nil && g.role.strict
	if form.Has(r.Path) {
		return false, nil
	}
	var err error
	switch g.path, err = form.Append(g.path[:0], r.Path); {
	case err == urlpath.ErrRedirect:
		return false, &route.Reply{
			Status: http.StatusTemporaryRedirect, Fields: []route.Field{{Name: "location", Value: string(g.path)}},
			Details: envoy.DetailsPathNormalized, Reason: flow.Completed,
		}
	case err != nil:
		return false, badPath
	case string(g.path) == string(r.Path):
		return false, nil
	}
	r.Path = g.path
	return true, nil
}

// badPath is the reply to a request whose path has no normal form.
var badPath = &route.Reply{
	Status: http.StatusBadRequest, Flags: envoy.FlagDownstreamProtocolError, Details: envoy.DetailsPathNotNormal, Reason: flow.BadFraming,
}

// badHost is the reply to a request of HTTP/2 whose host is not its authority (RFC 9113 §8.3.1): policies would judge one of
// them, and the workload may go by the other.
var badHost = &route.Reply{
	Status: http.StatusBadRequest, Flags: envoy.FlagDownstreamProtocolError, Details: envoy.DetailsHTTP2InvalidField, Reason: flow.BadFraming,
}

// clientAddress returns the address of a request's client: at the edge, the one that it has found. From inside of the mesh, the
// last one in X-Forwarded-For counts, or one before for each trusted proxy.
func clientAddress(h *mesh.HTTPManager, r *httpforward.Request, peer netip.Addr) netip.Addr {
	if h.UseRemoteAddress {
		return r.Client.Addr()
	}
	return httpforward.ForwardedAddress(r.Fields, int(h.TrustedHops), peer)
}
