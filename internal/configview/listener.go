package configview

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/xds"
)

// Listener is how connections to an address are treated.
type Listener struct {
	Object
	Addresses []string `json:"addresses"`
	Direction string   `json:"direction,omitempty"`
	Bound     bool     `json:"bound"` // it has a socket; otherwise connections come by their original destination
	Chains    []Chain  `json:"chains"`
}

// Chain is what becomes of the connections that it matches.
type Chain struct {
	Name    string   `json:"name,omitempty"`
	Match   string   `json:"match"` // in words
	TLS     string   `json:"tls"`   // in words
	To      string   `json:"to"`    // in words: a cluster, or a table of routes
	Filters []string `json:"filters,omitempty"`
	Origin  string   `json:"origin,omitempty"`
	Refused bool     `json:"refused,omitempty"` // its connections are closed
}

func (c *collection) listeners(name string) (list []Listener) {
	for object, l := range decoded(c[xds.Listeners], mesh.DecodeListener) {
		shown := Listener{Object: object, Addresses: []string{}, Chains: []Chain{}}
		if l != nil {
			shown.fill(l)
		}
		if matches(object.Name, name) || slices.Contains(shown.Addresses, name) {
			list = append(list, shown)
		}
	}
	return list
}

func (l *Listener) fill(from *mesh.Listener) {
	for _, a := range from.Addresses {
		l.Addresses = append(l.Addresses, a.String())
	}
	l.Direction = map[mesh.Direction]string{mesh.Inbound: "inbound", mesh.Outbound: "outbound"}[from.Direction]
	l.Bound = !from.Virtual
	for _, chain := range from.Chains {
		l.Chains = append(l.Chains, chainOf(chain, matchWords(&chain.Match)))
	}
	if from.Default != nil {
		l.Chains = append(l.Chains, chainOf(from.Default, "others"))
	}
	if from.Refused {
		for i := range l.Chains {
			l.Chains[i].Refused = true
		}
	}
}

func chainOf(c *mesh.FilterChain, match string) Chain {
	shown := Chain{Name: c.Name, Match: match, TLS: downstreamTLS(c.TLS), To: destination(c), Origin: c.Origin, Refused: c.Refused}
	for _, f := range c.Policies {
		shown.Filters = append(shown.Filters, f.Name)
	}
	if c.HTTP != nil {
		for _, f := range c.HTTP.Filters {
			shown.Filters = append(shown.Filters, f.Name)
		}
	}
	return shown
}

// matchWords describes which connections a chain is for.
func matchWords(m *mesh.ChainMatch) string {
	var parts []string
	add := func(format string, values ...any) { parts = append(parts, fmt.Sprintf(format, values...)) }
	if m.Port != 0 {
		add("port %d", m.Port)
	}
	if len(m.Destinations) > 0 {
		add("to %s", prefixes(m.Destinations))
	}
	if len(m.ServerNames) > 0 {
		add("SNI %s", strings.Join(m.ServerNames, " or "))
	}
	if transport := transportWords(m); transport != "" {
		add("%s", transport)
	}
	switch m.SourceType {
	case mesh.LocalSource:
		add("from this host")
	case mesh.ExternalSource:
		add("from other hosts")
	}
	if sources := slices.Concat(m.DirectSources, m.Sources); len(sources) > 0 {
		add("from %s", prefixes(sources))
	}
	if len(m.SourcePorts) > 0 {
		add("from ports %s", strings.Trim(fmt.Sprint(m.SourcePorts), "[]"))
	}
	if parts == nil {
		return "all"
	}
	return strings.Join(parts, ", ")
}

// Protocols in the matches of istiod: those that http_inspector finds, and the ALPN of sidecars.
var (
	plainHTTP = []string{"http/1.0", "http/1.1", "h2c"}
	meshHTTP  = []string{"istio-http/1.0", "istio-http/1.1", "istio-h2"}
	meshTCP   = []string{"istio-peer-exchange", "istio"}
)

func transportWords(m *mesh.ChainMatch) string {
	only := func(of ...string) bool {
		return !slices.ContainsFunc(m.Protocols, func(p string) bool { return !slices.Contains(of, p) })
	}
	protocols := strings.Join(m.Protocols, ", ")
	switch {
	case m.Transport == "tls" && protocols == "":
		return "TLS"
	case m.Transport == "tls" && only(meshHTTP...):
		return "HTTP over TLS of the mesh"
	case m.Transport == "tls" && only(meshTCP...):
		return "TCP over TLS of the mesh"
	case m.Transport == "tls" && only(slices.Concat(meshHTTP, meshTCP)...):
		return "TLS of the mesh"
	case m.Transport == "tls":
		return "TLS with ALPN " + protocols
	case m.Transport == "raw_buffer" && protocols == "":
		return "plain"
	case protocols != "" && only(plainHTTP...):
		return "plain HTTP"
	}
	return protocols
}

func prefixes(list []netip.Prefix) string {
	var texts []string
	for _, p := range list {
		if p.IsSingleIP() {
			texts = append(texts, p.Addr().String())
		} else {
			texts = append(texts, p.String())
		}
	}
	return strings.Join(texts, " or ")
}

func downstreamTLS(t *mesh.DownstreamTLS) string {
	switch {
	case t == nil:
		return "none"
	case t.RequireClient && t.Roots != "":
		return "mutual"
	case t.Roots != "":
		return "mutual if the client has a certificate"
	}
	return "server only"
}

// destination describes where a chain's connections or requests go.
func destination(c *mesh.FilterChain) string {
	switch {
	case c.ClusterIsSNI:
		return "the cluster that SNI names"
	case c.TCP != nil:
		var shares []share
		for _, cluster := range c.TCP.Clusters {
			shares = append(shares, share{cluster.Name, cluster.Weight})
		}
		return sharesWords(shares)
	case c.HTTP != nil && c.HTTP.Routes != nil:
		return "routes " + c.HTTP.Routes.Name
	case c.HTTP != nil:
		return "routes " + c.HTTP.RouteName
	}
	return "nowhere"
}

// share is a cluster and its weight.
type share struct {
	cluster string
	weight  uint32
}

func sharesWords(list []share) string {
	if len(list) == 1 {
		return list[0].cluster
	}
	var texts []string
	for _, s := range list {
		texts = append(texts, fmt.Sprintf("%s (%d)", s.cluster, s.weight))
	}
	return strings.Join(texts, ", ")
}

// Policy is a filter of a chain that may refuse connections or requests.
type Policy struct {
	Listener string `json:"listener"`
	Chain    string `json:"chain"` // what it matches, in words
	Name     string `json:"name"`
	Type     string `json:"type"`
	Per      string `json:"per"`               // connection or request
	Rules    string `json:"rules,omitempty"`   // in words
	Refused  bool   `json:"refused,omitempty"` // the chain is closed
}

// judging has parts of the types of filters that refuse.
var judging = []string{"rbac", "jwt_authn", "ext_authz", "ratelimit"}

func (c *collection) policies(name string) (list []Policy) {
	for object, l := range decoded(c[xds.Listeners], mesh.DecodeListener) {
		if l == nil || !matches(object.Name, name) {
			continue
		}
		for i, chain := range slices.Concat(l.Chains, []*mesh.FilterChain{l.Default}) {
			if chain == nil {
				continue
			}
			match := "others"
			if i < len(l.Chains) {
				match = matchWords(&chain.Match)
			}
			list = append(list, policiesOf(object.Name, match, chain, chain.Refused || l.Refused)...)
		}
	}
	return list
}

func policiesOf(listener, match string, c *mesh.FilterChain, refused bool) (list []Policy) {
	add := func(name, kind, per, rules string) {
		if slices.ContainsFunc(judging, func(part string) bool { return strings.Contains(kind, part) }) {
			list = append(list, Policy{Listener: listener, Chain: match, Name: name, Type: kind, Per: per, Rules: rules, Refused: refused})
		}
	}
	for _, f := range c.Policies {
		add(f.Name, f.Type, "connection", rbacWords(f.RBAC)+authzWords(f.ExtAuthz))
	}
	if c.HTTP != nil {
		for i := range c.HTTP.Filters {
			f := &c.HTTP.Filters[i]
			add(f.Name, f.Type, "request", rbacWords(f.RBAC)+jwtWords(f.JWT)+authzWords(f.ExtAuthz))
		}
	}
	return list
}

// jwtWords describes which tokens are verified.
func jwtWords(j *mesh.JWT) string {
	if j == nil {
		return ""
	}
	var issuers []string
	for _, p := range j.Providers {
		issuers = append(issuers, cmp.Or(p.Issuer, p.Name))
	}
	return "verifies tokens of " + strings.Join(issuers, ", ")
}

// authzWords describes which server is asked.
func authzWords(e *mesh.ExtAuthz) string {
	if e == nil {
		return ""
	}
	server := "a server that is not understood"
	switch {
	case e.GRPC != nil:
		server = e.GRPC.Cluster
	case e.HTTP != nil:
		server = e.HTTP.Service.Cluster
	}
	words := "asks " + server
	if e.AllowFailure {
		words += ", and allows what it cannot be asked about"
	}
	return words
}

// rbacWords describes what a policy does, by the names of its rules. In Istio they have the names of AuthorizationPolicies.
func rbacWords(r *mesh.RBAC) string {
	switch {
	case r == nil:
		return ""
	case r.Refused:
		return "denies all: not understood"
	}
	words := rulesWords(r.Rules)
	if r.Shadow != nil {
		words += "; dry run: " + rulesWords(r.Shadow)
	}
	return words
}

func rulesWords(r *mesh.Rules) string {
	switch {
	case r == nil:
		return "allows all"
	case r.Refused:
		return "denies all: not understood"
	case r.Action == mesh.Allow && len(r.Policies) == 0:
		return "denies all"
	case len(r.Policies) == 0:
		return "allows all"
	}
	var names []string
	for _, policy := range r.Policies {
		names = append(names, policy.Name)
	}
	action := map[mesh.Action]string{mesh.Allow: "allows only ", mesh.Deny: "denies ", mesh.Log: "records "}[r.Action]
	return action + strings.Join(names, ", ")
}
